"""Before training: is a data set on the disk what it should be?

Checks the layout, the counts of images and classes against the published ones, class names, the checksums of official
list files, that no image is in two splits or two classes (by name and by content), the header of every image, and that
a sample of them decodes.

Reads:  the data set
Writes: nothing; exit code 0 if all is well, 1 if something is wrong

With --shots the few-shot draw is made, and printed with its digest: the same on every machine.

    python check_data.py --dataset digits
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from pathlib import Path

import numpy as np

import datasets
from loaders import fewshot
from loaders.base import DataSet, ImageSet, find_unreadable, name_problems
from runtime import cli
from runtime.retry import read_bytes

SHOWN = 50  # problems that are printed one by one


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
    content = read_bytes(path)
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def wrong_counts(data: DataSet, imb_ratio: float | None) -> list[str]:
    """A line for each number of images or classes that is not the published one, and for classes without an image."""
    entry = datasets.TABLE[data.name]
    known = entry.counts | ({"train": entry.train_counts[imb_ratio]} if imb_ratio in entry.train_counts else {})
    found = {name: len(part) for name, part in data.splits.items()} | {"classes": len(data.class_names)}
    found["train"] += int(np.sum(data.held_out))
    problems = [
        f"{name}: {found[name]} found, {expected} expected"
        for name, expected in known.items()
        if found[name] != expected
    ]
    for name, part in data.splits.items():
        empty = np.flatnonzero(np.bincount(part.labels, minlength=len(data.class_names)) == 0)
        if len(empty) and name != "val" and not entry.camera_traps:  # which miss some in each split
            problems.append(f"{name}: {len(empty)} classes without an image, the first {data.class_names[empty[0]]}")
        if len(set(part.sources)) < len(part):
            problems.append(f"{name}: {len(part) - len(set(part.sources))} images are listed twice")
    return problems


def shared_between_splits(data: DataSet) -> list[str]:
    """A line for two splits that name the same images, or that should not share a camera and do."""
    entry, parts, problems = datasets.TABLE[data.name], data.splits, []
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
    return problems


def wrong_checksums(data: DataSet) -> list[str]:
    """A line for each official list file that is not the published one."""
    known = datasets.TABLE[data.name].checksums
    return [
        f"{path}: another file than the published one (checksum {git_checksum(path)[:8]})"
        for path in data.files
        if path.name in known and not git_checksum(path).startswith(known[path.name])
    ]


def wrong_names(data: DataSet) -> list[str]:
    """A line for each empty or shared class name, and where classes are called by numbers."""
    entry = datasets.TABLE[data.name]
    problems = [] if entry.shared_names else name_problems(data.class_names)
    if entry.names_file and data.class_names[0].isdecimal():
        problems.append(
            f"{entry.names_file}: not in --data-root, so classes have numbers for names, which no prompt can hold"
        )
    return problems


def decode_some(data: DataSet, count: int) -> list[str]:
    """A line for each of up to `count` images of each split, drawn at random, that does not decode."""
    problems, tried = [], Counter()
    for name, part in data.splits.items():
        for place in np.random.default_rng(0).permutation(len(part))[: 0 if part.in_memory else count]:
            try:
                part.read(int(place))
                tried[name] += 1
            except cli.UserError as error:
                problems.append(str(error))
    if tried:
        print("decoded", ", ".join(f"{tried[name]} of {len(data.splits[name])} {name} images" for name in tried))
    return problems


def find_twins(splits: dict[str, ImageSet]) -> list[str]:
    """A line for each image that is, byte for byte, in two splits or in two classes of one.

    Files are told apart by size first, then by their first 4,096 bytes, and only then by all of them.
    """
    groups: list[list[tuple[str, ImageSet, int]]] = [
        [(name, part, place) for name, part in splits.items() for place in range(len(part))]
    ]
    for key in (size_of, beginning_of, lambda part, place: part.sha256(place)):
        by_key: dict = {}
        for number, group in enumerate(groups):
            for name, part, place in group:
                by_key.setdefault((number, key(part, place)), []).append((name, part, place))
        groups = [group for group in by_key.values() if len(group) > 1]
    problems = []
    for group in groups:
        (name, part, place), *others = group
        for other, there, at in others:
            if other != name or there.labels[at] != part.labels[place]:
                problems.append(
                    f"{part.sources[place]} of {name} and {there.sources[at]} of {other} are the same image"
                )
    return problems


def size_of(part: ImageSet, place: int) -> int:
    """Bytes of an image's file; 0 in memory."""
    return 0 if part.in_memory else os.stat(part.images[place]).st_size


def beginning_of(part: ImageSet, place: int) -> bytes:
    """The first 4,096 bytes of an image's file; nothing in memory."""
    if part.in_memory:
        return b""
    with open(part.images[place], "rb") as file:
        return file.read(4096)


def check(data: DataSet, imb_ratio: float | None, decode: int) -> tuple[list[str], list[str]]:
    """Errors in a data set that could be loaded, and oddities of the published data themselves."""
    problems = wrong_counts(data, imb_ratio) + shared_between_splits(data) + wrong_checksums(data) + wrong_names(data)
    unreadable = find_unreadable(data.splits)
    problems += unreadable
    if unreadable:
        return problems, []
    problems += decode_some(data, decode)
    twins = find_twins(data.splits)
    return (problems, twins) if datasets.TABLE[data.name].counts else (problems + twins, [])


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
    problems, oddities = check(data, args.imb_ratio, args.decode)
    if args.shots is not None:
        drawn = fewshot.draw_shots(data, args.shots, args.shot_seed)
        print(
            f"{len(drawn.train)} shots, digest {fewshot.shots_digest(drawn.train)}, the first {drawn.train.sources[0]}"
        )
        problems += same_content(drawn)
    for oddity in oddities[:SHOWN]:
        print(f"in the published data: {oddity}")
    for problem in problems[:SHOWN]:
        print(f"problem: {problem}")
    for kind, lines in (("such oddities", oddities), ("problems", problems)):
        if len(lines) > SHOWN:
            print(f"and {len(lines) - SHOWN} more {kind}")
    print(f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "all as expected")
    return 1 if problems else 0


if __name__ == "__main__":
    cli.run(main)
