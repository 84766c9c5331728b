"""SIGKILL at moments chosen by chance, and in the moments of writing: the same command then leaves what an undisturbed
run leaves, bit for bit on the CPU.

KILLS=100 in the environment kills so many runs of each step (default: 3). Each run is a fork of this process, which has
the libraries imported already; its loading processes are forks of it.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import forks
import numpy as np
import pytest
from conftest import ROOT
from forks import LIMIT
from small_data import draw_cats_and_dogs, draw_toycam

import filter_clipscore
import generate_spectrum
import models
import train_iwildcam
import train_lt
from loaders import toycam
from runtime import checkpoints, files

KILLS = int(os.environ.get("KILLS", 3))
WRITING = ("fsync", "replace", "link")  # of os: what every write of a result goes through
FREE = {"seconds", "images_per_second"}


def on_each_write(act: Callable[[int, bool], None]) -> None:
    """From now on `act` is called before each call that makes a write last and after it, with its number from 1."""
    numbers = itertools.count(1)

    def watched(real: Callable) -> Callable:
        def call(*args, **kwargs):
            number = next(numbers)
            act(number, True)
            result = real(*args, **kwargs)
            act(number, False)
            return result

        return call

    for name in WRITING:
        setattr(os, name, watched(getattr(os, name)))


def die_while_writing(at: int, early: bool) -> None:
    """This process is killed by its write number `at`, before it is made or after it."""

    def die(number: int, before: bool) -> None:
        if (number, before) == (at, early):
            os.kill(os.getpid(), signal.SIGKILL)

    on_each_write(die)


def run(main: Callable, argv: list[str], log: Path, prepare: Callable = lambda: None, kill_at: float = LIMIT) -> int:
    """Run a script in a process group of its own and kill it after so many seconds; its exit code, or -SIGKILL."""
    # Now and then the main process alone: its loading processes find out for themselves.
    kill = os.kill if random.random() < 0.1 else os.killpg
    return forks.wait(forks.start(lambda: prepare() or main(argv), log), kill_at, kill)


# ---------------------------------------------------------------------------------------------------------------------
# the steps: a command, and all that its folder must hold in the end


def drawn(folder: Path) -> dict:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("shard-*/*.png")}
    rows = [row for path in folder.glob("shard-*/metadata.jsonl") for row in lines_of(path)]
    return found | {"plan": (folder / "plan.json").read_bytes(), "rows": {row["file_name"]: row for row in rows}}


def lines_of(path: Path) -> list[dict]:
    """The rows of a file of JSON lines, without those that a kill cut short."""
    rows = []
    for line in path.read_text().split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def filtered(folder: Path) -> dict:
    return {name: (folder / name).read_bytes() for name in ("scores.csv", "scores.json")}


def trained(folder: Path) -> dict:
    """Results, history, predictions and weights, without times."""
    state = checkpoints.load_checkpoint(folder / "checkpoint.pt", "cpu")
    history = [
        {k: v for k, v in row.items() if k not in FREE} for row in files.read_json_lines(folder / "history.jsonl")
    ]
    results = {k: v for k, v in files.read_json(folder / "results.json").items() if k not in FREE}
    predictions = np.load(folder / "predictions.npz")
    arrays = {name: predictions[name].tobytes() for name in predictions.files}
    weights = {name: value.numpy().tobytes() for name, value in state["model"].items()}
    return {"results": results, "history": history, **arrays, **weights}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two classes of images in files."""
    return draw_cats_and_dogs(tmp_path_factory.mktemp("images"), 9, 32, "png")


@pytest.fixture(scope="module")
def traps(tmp_path_factory) -> Path:
    """A camera-trap data set of a few of toycam's images."""
    root = draw_toycam(tmp_path_factory.mktemp("traps") / "toycam", 9, 9)
    (root / "class_names.txt").write_text("\n".join(toycam.CLASSES))
    return root


@pytest.fixture(params=["generate", "filter", "train_lt", "train_iwildcam"])
def step(request, road, images, traps, tmp_path, monkeypatch):
    """A step's main, its arguments but for the folder, how its folder begins, and what it must hold."""
    few = tmp_path / "few.csv"
    few.write_text("".join(road.hard.read_text().splitlines(keepends=True)[:7]))
    train = ["--curriculum", "none", "--epochs", "3", "--out"]
    if request.param == "generate":
        flags = ["--hard", str(few), "--prompts", str(road.prompts), "--levels", "50", "90", "--seeds", "1"]
        return generate_spectrum.main, [*flags, "--steps", "4", "--batch-size", "3", "--out"], Path.mkdir, drawn
    if request.param == "filter":
        flags = ["--prompts", str(road.prompts), "--threshold", "0.1", "--batch-size", "16", "--spectrum"]
        unscored = shutil.ignore_patterns("scores*", "acceptance.png")
        return filter_clipscore.main, flags, lambda to: shutil.copytree(road.spectrum, to, ignore=unscored), filtered
    if request.param == "train_lt":
        flags = ["--dataset", "imagefolder", "--data-root", str(images), "--model", "resnet10", "--image-size", "32"]
        return (
            train_lt.main,
            [*flags, "--batch-size", "6", "--warmup-epochs", "0", "--workers", "2", *train],
            Path.mkdir,
            trained,
        )
    flags = ["--dataset", "cameratraps", "--data-root", str(traps), "--clip", f"{ROOT}/assets/toycam_clip"]
    flags += ["--batch-size", "4", "--precision", "fp32", "--lr", "3e-4", "--workers", "1"]
    monkeypatch.setattr(train_iwildcam, "ALPHAS", [0.0, 0.5, 1.0])  # each starts the worker anew
    return train_iwildcam.main, [*flags, *train], Path.mkdir, trained


@pytest.mark.slow
def test_a_step_killed_at_any_moment_leaves_what_an_undisturbed_run_leaves(step, tmp_path, monkeypatch):
    main, flags, begin, content = step
    for name in ("SAVE_SECONDS", "SAVE_PAUSE"):  # else only the end of such a short run is saved
        monkeypatch.setattr(filter_clipscore, name, 0)
    log, rng = tmp_path / "log.txt", random.Random(files.digest_int(main.__module__))
    random.seed(0)
    begin(tmp_path / "whole")
    began, made = time.monotonic(), multiprocessing.Value("i")

    def note(number: int, before: bool) -> None:
        made.value = max(made.value, number)

    assert run(main, [*flags, str(tmp_path / "whole")], log, lambda: on_each_write(note)) == 0, log.read_text()
    length, expected = time.monotonic() - began, content(tmp_path / "whole")
    killed = 0

    def kill(folder: Path, at: int = 0) -> bool:
        """Kill a run in its write number `at`, or without one at any moment; False if it ended before."""
        nonlocal killed
        early = rng.random() < 0.5
        prepare, kill_at = lambda: die_while_writing(at, early), LIMIT if at else length * rng.random()
        code = run(main, [*flags, str(folder)], log, prepare, kill_at)
        assert code in (0, -signal.SIGKILL), log.read_text()[-3000:]
        killed += code == -signal.SIGKILL
        return code == -signal.SIGKILL

    for number in range(KILLS):
        folder = tmp_path / f"killed{number}"
        begin(folder)
        # In a write of each part of the run; then perhaps a few times more, and then it is finished.
        goes_on = kill(folder, 1 + int(made.value * (number + rng.random()) / KILLS))
        while goes_on and rng.random() < 0.5:
            goes_on = kill(folder, rng.randrange(made.value) if rng.random() < 0.5 else 0)
        assert run(main, [*flags, str(folder)], log) == 0, log.read_text()[-3000:]
        found = content(folder)
        assert found.keys() == expected.keys() and all(found[name] == expected[name] for name in expected)
        assert not list(folder.rglob("*.tmp"))
        shutil.rmtree(folder)
    assert killed
    print(f"{main.__module__}: {killed} kills over {KILLS} folders, of a run of {made.value} writes: the same bytes")


assert models  # imported here, and so in every fork
