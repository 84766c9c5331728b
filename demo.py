"""The whole road on an embedded benchmark, in about three minutes on two CPU cores.

Finds the hard images, draws a spectrum for them with a tiny Stable Diffusion from assets/, filters it with the tiny
CLIP beside it, trains with and without curricula over several seeds, and reports.

    digits  long-tailed: the images of the few-shot classes are hard; a ResNet-8
    toycam  low quality: the images whose class the CLIP, zero-shot, finds unlikely are hard; FLYP of that CLIP

Reads:  nothing but the project and scikit-learn's digits (toycam draws its own data, into runs/toycam)
Writes: OUT/hard.csv, prompts.json, spectrum/, train/ (a run folder each, TensorBoard logs inside), and what report.py
        writes: report.html, table.md, table.csv, table.tex, pictures

    python demo.py --out runs/demo
    python demo.py --dataset toycam --out runs/demo_toycam
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

from runtime import cli, steps

SCRIPTS = {"digits": "train_lt.py", "toycam": "train_iwildcam.py"}
ARMS = {
    "digits": [
        ("--loss", "ce", "--curriculum", "none"),
        ("--loss", "ce", "--curriculum", "all"),
        ("--loss", "ce", "--curriculum", "d2s"),
        ("--loss", "bs", "--curriculum", "none"),
        ("--loss", "bs", "--curriculum", "d2s"),
        ("--loss", "bs", "--curriculum", "d2s", "--prior", "stage"),
    ],
    "toycam": [("--loss", "flyp", "--curriculum", curriculum) for curriculum in ("none", "all", "adaptive")],
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "demo")
    parser.add_argument("--dataset", choices=list(ARMS), default="digits", help="the benchmark")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="FOLDER", help="where everything goes")
    parser.add_argument(
        "--train-seeds",
        type=cli.whole(0),
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="seeds that each row of the table is trained with",
    )
    parser.add_argument(
        "--jobs", type=cli.whole(1), default=min(4, os.cpu_count() or 1), metavar="N", help="training runs at a time"
    )
    return parser


def train_all(commands: list[list[str]], jobs: int) -> None:
    """Run commands, `jobs` at a time, one CPU thread each.

    Raises:
        UserError: one of them failed; its output is printed.
    """
    waiting, running = list(commands), []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with cli.progress(len(commands), "training", "run") as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                output = tempfile.TemporaryFile("w+")
                process = subprocess.Popen(waiting.pop(0), stdout=output, stderr=subprocess.STDOUT, env=environment)
                running.append((process, output))
            for process, output in [pair for pair in running if pair[0].poll() is not None]:
                running.remove((process, output))
                bar.update()
                if process.returncode:
                    for other, _ in running:
                        other.terminate()
                    output.seek(0)
                    raise cli.UserError(f"training failed: {shlex.join(process.args)}\n{output.read()}")
            time.sleep(0.05)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    began = time.monotonic()
    arms, script = ARMS[args.dataset], SCRIPTS[args.dataset]
    folder = steps.make_spectrum(args.out, args.dataset, 30 if args.dataset == "digits" else None)
    print(f"training {len(arms)} rows with {len(args.train_seeds)} seeds each", flush=True)
    commands, folders = [], []
    for arm in arms:
        for seed in args.train_seeds:
            name = "_".join(word for word in arm if not word.startswith("--"))
            folders.append(args.out / "train" / f"{name}_seed{seed}")
            commands.append(
                steps.command(
                    script, "--dataset", args.dataset, *arm, "--seed", seed, "--spectrum", folder, "--out", folders[-1]
                )
            )
    train_all(commands, args.jobs)
    steps.run("report.py", "--runs", *folders, "--spectrum", folder, "--out", args.out)
    print(
        f"done in {time.monotonic() - began:.0f} s; look at {args.out / 'spectrum.png'}, "
        f"and at the curves with: tensorboard --logdir {args.out / 'train'}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
