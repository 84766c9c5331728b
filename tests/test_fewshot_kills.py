"""SIGKILL at random moments of tuning and of few-shot training: the same command again makes the same files.

KILLS=20 python -m pytest tests/test_fewshot_kills.py  # as many kills of each script (default 1), which is a fork
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import forks
import numpy as np
import pytest

import datasets
import train_fewshot
import tune_generator
from loaders import digits
from spectrum import tables
from training import tuner

KILLS = int(os.environ.get("KILLS", "1"))
TUNE = "--mode cls --together 2 --batch-size 2 --epochs 8 --warmup-steps 2 --rank 2 --samples 1 --sample-steps 1"
STEPS = {
    "tune_generator": (tune_generator.main, TUNE.split()),
    "train_fewshot": (train_fewshot.main, "--shots 4 --images real --epochs 60 --batch-size 8 --mix both".split()),
}


def what_was_made(out: Path) -> dict[str, object]:
    """The content of the files that a result is read from."""
    found: dict[str, object] = {
        str(path.relative_to(out)): path.read_bytes()
        for pattern in ("*/*.safetensors", "*/history.jsonl", "*/samples_*.png", "*.csv", "*/shots.csv", "prompts.json")
        for path in out.glob(pattern)
    }
    if (out / "results.json").is_file():
        results = json.loads((out / "results.json").read_text())
        found["results"] = {k: v for k, v in results.items() if "second" not in k}
        found["logits"] = np.load(out / "predictions.npz")["logits"].tobytes()
        lines = (out / "history.jsonl").read_text().splitlines()
        found["history"] = [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]
    return found


def write_hard(path: Path) -> None:
    train = datasets.load("fewshot_digits", None).train
    places = [int(place) for label in range(4) for place in np.flatnonzero(train.labels == label)[:2]]
    rows = [
        {"source": train.sources[place], "label": place_label, "class_name": digits.NAMES[place_label]}
        for place in places
        for place_label in [int(train.labels[place])]
    ]
    tables.write_hard(path, [row | {"reason": "few", "score": ""} for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_moment_a_script_makes_the_same_files(step, tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "CHECKPOINT_STEPS", 3)
    (main, flags), log = STEPS[step], tmp_path / "log.txt"
    flags = ["--dataset", "fewshot_digits", *flags]
    if step == "tune_generator":  # four of the ten classes
        flags += ["--hard", str(tmp_path / "hard.csv")]
        write_hard(tmp_path / "hard.csv")

    def run(out: str, kill_at: float = forks.LIMIT) -> int:
        words = [*flags, "--out", str(tmp_path / out)]
        code = forks.wait(forks.start(lambda: main(words), log), kill_at)
        assert code in (0, -signal.SIGKILL), log.read_text()[-3000:]
        return code

    # A short one in this process, so that the forks have the libraries; then an undisturbed one.
    short = ["--epochs", "3", *(["--warmup-epochs", "0"] if step == "train_fewshot" else [])]
    assert main([*flags, *short, "--out", str(tmp_path / "short")]) == 0
    began = time.monotonic()
    run("whole")
    longest, whole = 1.2 * (time.monotonic() - began), what_was_made(tmp_path / "whole")
    assert len(whole) >= 4
    rng, killed, rounds = random.Random(0), 0, 0
    while killed < KILLS:
        rounds += 1
        while killed < KILLS and run(f"round{rounds}", rng.uniform(0, longest)):
            killed += 1
        run(f"round{rounds}")
        assert what_was_made(tmp_path / f"round{rounds}") == whole
    print(f"{step}: {killed} kills in {rounds} runs, the same {len(whole)} files each time")
