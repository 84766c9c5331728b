"""Another --threshold on a spectrum whose images are all scored: seconds and memory of the whole command.

Writes: OUT, a JSON with the seconds (medians, and those of each round), the peak memory and the machine

    python bench/bench_rethreshold.py --rows 200000 --out bench/results/filter_rethreshold.json
"""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timing import spent

from runtime import cli, files, runs
from spectrum import tables
from spectrum.units import Unit

ROOT = Path(__file__).resolve().parents[1]
LEVELS, SEEDS, CLASSES = [0, 10, 30, 50], 8, 136


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "bench_rethreshold")
    parser.add_argument("--rows", type=cli.whole(32), default=200_000, metavar="N", help="synthetic images")
    parser.add_argument("--rounds", type=cli.whole(1), default=3, metavar="N", help="measurements; the median counts")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench/results/filter_rethreshold.json"),
        metavar="FILE",
        help="the file to write",
    )
    return parser


def source_name(source: int) -> str:
    """The name of a hard image by its number."""
    label = source % CLASSES
    return f"train/n{label:08d}/n{label:08d}_{source}.JPEG"


def make_spectrum(folder: Path, rows: int, dataset: str = "digits", image: Path | None = None) -> None:
    """A spectrum that looks scored, as of ImageNet-LT's size and names; its image files are empty, or links to one."""
    rng, clip, shard = random.Random(0), ROOT / "assets/tiny_clip", folder / "shard-00000"
    shard.mkdir(parents=True)
    labels = [str(label) for label in range(CLASSES)]
    plan = {"dataset": dataset, "imb_ratio": 30.0 if dataset == "digits" else None, "data_seed": 0}
    plan |= {"hard_classes": list(range(CLASSES)), "levels": LEVELS}
    files.write_json(folder / "plan.json", plan)
    texts = {label: f"a photo of a class {label}" for label in labels}
    prompts = {
        label: {"class_name": f"class {label}", "score_prompt": texts[label], "prompts": ["p"]} for label in labels
    }
    files.write_json(folder / "prompts.json", prompts)
    made_by = {"clip": clip.name, "clip_digest": files.digest_files(sorted(clip.glob("*"))), "score_prompts": texts}
    files.write_json(
        folder / "scores.json", made_by | {"groups": dict.fromkeys(labels, "few"), "rounds": 0, "threshold": 0.25}
    )
    scores = {}
    with (shard / "metadata.jsonl").open("w") as table:
        for number in range(rows):
            source, place = divmod(number, len(LEVELS) * SEEDS)
            label = source % CLASSES
            unit = Unit(source_name(source), LEVELS[place // SEEDS], place % SEEDS)
            row = {
                "file_name": unit.file_name,
                "source": unit.source,
                "source_sha256": "0" * 64,
                "label": label,
                "class_name": f"class {label}",
                "level": unit.level,
                "seed": unit.seed,
                "redraws": 0,
                "prompt": f"a 8k real photo: a class {label} rests on a rocky shore in the morning light, {place}",
                "text_guidance": 10.0,
                "steps": 50,
                "start_timestep": 981,
                "width": 512,
                "height": 512,
                "generator": "stabilityai/stable-diffusion-xl-refiner-1.0",
                "revision": "main",
                "scheduler": "EulerDiscreteScheduler",
            }
            table.write(json.dumps(row) + "\n")
            if image:
                (shard / unit.file_name).symlink_to(image)
            else:
                (shard / unit.file_name).touch()
            scores[f"{shard.name}/{unit.file_name}"] = {
                "text_score": rng.gauss(0.29, 0.03),
                "image_score": rng.gauss(0.8, 0.05),
                "kept": False,
                "reason": "low text score",
            }
    tables.write_scores(folder / "scores.csv", scores, scores)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_spectrum(folder, args.rows)
        command = [sys.executable, ROOT / "filter_clipscore.py", "--spectrum", folder]
        command += ["--prompts", folder / "prompts.json"]
        rounds = []
        for number in range(args.rounds):
            before = spent()
            subprocess.run([*command, "--threshold", f"{0.3 + number / 100:g}"], check=True)  # each time another
            rounds.append([round(end - begin, 2) for begin, end in zip(before, spent(), strict=True)])
    seconds, cpu_seconds = (statistics.median(values) for values in zip(*rounds, strict=True))
    result = {
        "rows": args.rows,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "rounds": {"seconds": [one for one, _ in rounds], "cpu_seconds": [one for _, one in rounds]},
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        "device": f"{platform.machine()} CPU",
        "load_average": round(os.getloadavg()[0], 1),
        "environment": runs.environment(),
    }
    files.write_json(args.out, result)
    print(json.dumps({name: value for name, value in result.items() if name != "environment"}, indent=2))
    return 0


if __name__ == "__main__":
    cli.run(main)
