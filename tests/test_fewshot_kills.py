"""SIGKILL at random moments of tuning and of few-shot training: the same command again makes the same files.

KILLS=20 python -m pytest tests/test_fewshot_kills.py  # as many kills of each script (default 1)
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

KILLS = int(os.environ.get("KILLS", "1"))
TUNE = [
    "--mode",
    "cls",
    "--together",
    "5",
    "--batch-size",
    "2",
    "--epochs",
    "150",
    "--warmup-steps",
    "2",
    "--rank",
    "2",
]
SCRIPTS = {
    "tune_generator": ["--shots", "2", *TUNE, "--samples", "2", "--sample-steps", "2"],
    "train_fewshot": ["--shots", "4", "--images", "real", "--epochs", "300", "--batch-size", "8", "--mix", "both"],
}


def run_under_kills(command: list[str], kills: int, longest: float, rng: random.Random) -> int:
    """Run a command again and again until it ends by itself: how often it was killed, at most `kills` times."""
    for number in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert process.wait(timeout=rng.uniform(0, longest)) == 0
            return number
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return kills


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


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_any_moment_a_script_makes_the_same_files(script, tmp_path):
    def command(out: str) -> list[str]:
        words = ["--dataset", "fewshot_digits", *SCRIPTS[script], "--out", str(tmp_path / out)]
        return [sys.executable, str(ROOT / f"{script}.py"), *words]

    began = time.monotonic()
    subprocess.run(command("whole"), stdout=subprocess.DEVNULL, check=True)
    longest, whole = 1.2 * (time.monotonic() - began), what_was_made(tmp_path / "whole")
    assert len(whole) >= 4
    rng, killed, rounds = random.Random(0), 0, 0
    while killed < KILLS:
        rounds += 1
        killed += run_under_kills(command(f"round{rounds}"), KILLS - killed, longest, rng)
        assert what_was_made(tmp_path / f"round{rounds}") == whole
    print(f"{script}: {killed} kills in {rounds} runs, the same {len(whole)} files each time")
