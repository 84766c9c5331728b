"""What it costs to begin, as the work grows: the plan of a spectrum of 10^4, 10^5 and 10^6 images, and a shard's start.

For each number of units a folder of so many / 20 small JPEGs in 100 classes is made, links to one file, and hard.csv of
all of them; generate_spectrum.py plans 4 levels and 5 seeds of each.

    plan    --dry-run of all units
    start   shard 0 of 64 up to its first batch, the generator (assets/tiny_sd) loaded

bench_rethreshold.py has another threshold on so many scored images.

Reads:  nothing
Writes: a line of JSON to --out for each: CPU seconds, and the memory that was most

    python bench/bench_growth.py --units 10000 100000
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image
from timing import note

from runtime import cli, files
from spectrum import tables

ROOT = Path(__file__).resolve().parents[1]
LEVELS, SEEDS, CLASSES = (0, 30, 50, 70), 5, 100
# Ends a shard's start where it would draw its first batch.
STARTER = """
import sys
sys.path.insert(0, {root!r})
import generate_spectrum
from generation import job
job.Job.draw_batch = lambda self, *_: sys.exit(0)
generate_spectrum.main(sys.argv[1:])
"""


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "bench/bench_growth")
    parser.add_argument(
        "--units", type=cli.whole(2000), nargs="+", default=[10_000, 100_000], metavar="N", help="images"
    )
    parser.add_argument("--parts", nargs="+", choices=["plan", "start"], default=["plan", "start"], help="what runs")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/growth.jsonl"), metavar="FILE", help="where lines are added"
    )
    return parser


def make_inputs(folder: Path, units: int) -> list[str]:
    """A folder of sources, hard.csv and prompts.json: the arguments that name them."""
    sources = units // (len(LEVELS) * SEEDS)
    first = folder / "first.jpg"
    Image.linear_gradient("L").convert("RGB").resize((48, 32)).save(first)
    names = [f"train/{number % CLASSES:03d}/{number:07d}.jpg" for number in range(sources)]
    others = [f"{split}/{label:03d}/0.jpg" for split in ("val", "test") for label in range(CLASSES)]
    for name in (*names, *others):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(first, folder / name)
    tables.write_hard(
        folder / "hard.csv",
        (
            {"source": name, "label": n % CLASSES, "class_name": f"{n % CLASSES:03d}", "reason": "few", "score": 1}
            for n, name in enumerate(names)
        ),
    )
    texts = [f"a photo of it, number {number}" for number in range(5)]
    prompts = {
        str(label): {"class_name": f"{label:03d}", "score_prompt": "x", "prompts": texts} for label in range(CLASSES)
    }
    files.write_json(folder / "prompts.json", prompts)
    inputs = ["--dataset", "imagefolder", "--data-root", folder, "--hard", folder / "hard.csv"]
    inputs += ["--prompts", folder / "prompts.json", "--generator", ROOT / "assets/tiny_sd", "--device", "cpu"]
    inputs += ["--steps", 20, "--seeds", SEEDS, "--levels", *LEVELS, "--size", "source"]
    return [str(word) for word in inputs]


def measure(command: list) -> dict:
    """CPU seconds, seconds by the clock and largest memory of a command."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    said = child.stdout.read()
    _, code, usage = os.wait4(child.pid, 0)
    found = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "seconds": time.perf_counter() - began}
    found |= {"peak_memory_mb": usage.ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)}
    return found if code == 0 else found | {"error": said[-300:], "code": os.waitstatus_to_exitcode(code)}


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    for units in args.units:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            inputs = make_inputs(folder, units)
            commands = {
                "plan": [ROOT / "generate_spectrum.py", *inputs, "--dry-run", "--out", folder / "plan"],
                "start": ["-c", STARTER.format(root=str(ROOT)), *inputs, "--shard", "0/64", "--out", folder / "start"],
            }
            for part in args.parts:
                note(args.out, {"part": part, "units": units, **measure(commands[part])})
    return 0


if __name__ == "__main__":
    cli.run(main)
