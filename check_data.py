"""Before training: is a data set on the disk what it should be?

Checks the layout, the counts of images and classes against the published ones, missing files, that no image is in two
splits, the checksums of official list files, and that a sample of the images decodes.

Reads:  the data set
Writes: nothing; exit code 0 where all is well, 1 where something is not

With --shots the few-shot draw is made, and printed with its digest: the same on every machine.

    python check_data.py --dataset digits
"""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np

import datasets
from loaders import fewshot
from loaders.base import DataSet
from runtime import cli


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "check_data")
    datasets.add_flags(parser)
    datasets.add_shot_flags(parser)
    parser.add_argument(
        "--decode", type=cli.whole(0), default=200, metavar="N", help="images of each split that are decoded"
    )
    return parser


def git_checksum(path: Path) -> str:
    """What `git hash-object` says of a file: 40 hexadecimal digits."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def problems_of(data: DataSet, imb_ratio: float | None, decode: int) -> list[str]:
    """What is wrong with a data set that could be loaded, a line each."""
    problems = []
    parts = data.splits
    entry = datasets.TABLE[data.name]
    known = dict(entry.counts)
    if imb_ratio in entry.train_counts:
        known["train"] = entry.train_counts[imb_ratio]
    found = {name: len(part) for name, part in parts.items()} | {"classes": len(data.class_names)}
    found["train"] += int(np.sum(data.held_out))
    problems += [
        f"{name}: {found[name]} found, {expected} expected"
        for name, expected in known.items()
        if found[name] != expected
    ]
    for name, part in parts.items():
        empty = np.flatnonzero(np.bincount(part.labels, minlength=len(data.class_names)) == 0)
        if len(empty) and name != "val" and not entry.camera_traps:  # which miss some in each split
            problems.append(f"{name}: {len(empty)} classes without an image, the first {data.class_names[empty[0]]}")
        if len(set(part.sources)) < len(part):
            problems.append(f"{name}: {len(part) - len(set(part.sources))} images are listed twice")
    for one, other in itertools.combinations(parts, 2):
        # CIFAR in arrays numbers train and test images each from 0.
        numbered = parts[one].sources[0].startswith("index:")
        if "test" in (one, other) and numbered and not entry.shared_index:
            continue
        shared = set(parts[one].sources) & set(parts[other].sources)
        if shared:
            problems.append(f"{len(shared)} images are both in {one} and in {other}, the first {min(shared)}")
    if entry.camera_traps:
        for name in ("val", "test"):
            shared = set(data.locations["train"].tolist()) & set(data.locations[name].tolist())
            if shared:
                problems.append(
                    f"{len(shared)} cameras of {name} (out of domain) are in train too, the first {min(shared)}"
                )
    for path in data.files:
        expected = entry.checksums.get(path.name)
        if expected and not git_checksum(path).startswith(expected):
            problems.append(f"{path}: another file than the published one (checksum {git_checksum(path)[:8]})")
    for part in parts.values():
        for place in np.random.default_rng(0).permutation(len(part))[: 0 if part.in_memory else decode]:
            try:
                part.read(int(place))
            except cli.UserError as error:
                problems.append(str(error))
    return problems


def same_content(data: DataSet) -> list[str]:
    """A line for each shot whose file, or pixels, are those of a validation or test image of another name."""
    shots = {data.train.sha256(place): source for place, source in enumerate(data.train.sources)}
    problems = []
    for name, part in (("val", data.val), ("test", data.test)):
        for place, source in enumerate(part.sources):
            own = shots.get(part.sha256(place))
            if own is not None:
                problems.append(f"{own} of train and {source} of {name} are the same image")
    return problems


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    data = datasets.load(args.dataset, args.imb_ratio, args.data_root, args.data_seed)
    groups = ", ".join(f"{len(classes)} {name}" for name, classes in data.groups.items())
    print(f"{data.name}: {len(data.class_names)} classes ({groups})")
    print(", ".join(f"{name} {len(part)}" for name, part in data.splits.items()), "images")
    print(f"training images a class: {data.counts.max()} down to {data.counts.min()}")
    if data.note:
        print(data.note)
    problems = problems_of(data, args.imb_ratio, args.decode)
    if args.shots is not None:
        drawn = fewshot.draw_shots(data, args.shots, args.shot_seed)
        print(
            f"{len(drawn.train)} shots, digest {fewshot.shots_digest(drawn.train)}, the first {drawn.train.sources[0]}"
        )
        problems += same_content(drawn)
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{len(problems)} problems" if problems else "all as expected")
    return 1 if problems else 0


if __name__ == "__main__":
    cli.run(main)
