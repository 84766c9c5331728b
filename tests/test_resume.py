"""What a run takes up again after a stop within an epoch and one after an epoch: the same weights, bit for bit.

mutants.py leaves out what is restored, one thing after another: the optimiser's state, the averaged weights, the place
in the schedule, both random states, the best weights.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import cut_few_shot_tests, draw_toycam

import train_fewshot
import train_iwildcam
import train_lt
from runtime import checkpoints, files, runs
from training import fewshot, log, loop

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("blank_figures")]  # whole runs
# Rates at which a step that lacks its momentum ends elsewhere; what draws from torch's generator and from the pass's.
LT = "--curriculum none --model resnet8 --epochs 3 --batch-size 64 --lr 0.05 --mix mixup --augment crop_flip"
STEPS = {
    "train_lt": (train_lt.main, f"{LT} --optimizer sgd --momentum 0.9 --ema 0.9"),
    "train_iwildcam": (
        train_iwildcam.main,
        "--dataset toycam --curriculum none --epochs 3 --batch-size 8 --precision fp32 --lr 1e-3 --workers 0",
    ),
    "train_fewshot": (
        train_fewshot.main,
        "--dataset fewshot_digits --shots 2 --images real --model clip --epochs 3 --batch-size 4 --warmup-epochs 0 "
        "--lr 0.01 --lora-dropout 0.5 --mix both",
    ),
}


@pytest.fixture(scope="module")
def traps(tmp_path_factory) -> Path:
    """The first images of each split of toycam, 24 for training."""
    return draw_toycam(tmp_path_factory.mktemp("traps") / "toycam", 24, 6)


def stop_once(monkeypatch, owner, name: str, at: int) -> None:
    """SIGTERM comes to this process in the `at`-th call of a function."""
    real, calls = getattr(owner, name), []

    def counting(*args, **options):
        calls.append(args)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, counting)


def what_was_made(out: Path) -> dict[str, object]:
    """Every tensor of the checkpoint, the history without its speed, and the predictions."""
    state = checkpoints.load_checkpoint(out / "checkpoint.pt", "cpu")
    weights = {"model": state["model"], "best": state["best"]["model"], "average": state.get("average", {})}
    found = {f"{kind} {name}": value for kind, named in weights.items() for name, value in named.items()}
    predictions = np.load(out / "predictions.npz")
    found |= {name: torch.from_numpy(predictions[name]) for name in predictions.files if predictions[name].dtype != "O"}
    rows = files.read_json_lines(out / "history.jsonl")
    return found | {"history": [row | {"images_per_second": 0} for row in rows]}


@pytest.mark.parametrize("script", STEPS)
def test_a_run_stopped_in_an_epoch_and_after_one_ends_with_the_same_weights(
    script, request, tmp_path, monkeypatch, capsys
):
    main, flags = STEPS[script][0], STEPS[script][1].split()
    if script == "train_iwildcam":
        flags += ["--data-root", str(request.getfixturevalue("traps"))]
    cut_few_shot_tests(monkeypatch, 20)
    monkeypatch.setattr(train_iwildcam, "ALPHAS", [0.0, 1.0])  # a look at all validation images for each
    monkeypatch.setattr(fewshot, "ALPHAS", [0.0, 1.0])
    assert main([*flags, "--out", str(tmp_path / "whole")]) == 0
    for owner, name, at, where in (
        (loop.Trainer, "step", 2, "in epoch 0, after batch 2"),
        (log, "log_epoch", 2, "after epoch 1"),
    ):
        with monkeypatch.context() as patch:
            stop_once(patch, owner, name, at)
            assert main([*flags, "--out", str(tmp_path / "stopped")]) == runs.RESUMABLE
        assert f"checkpoint written {where}" in capsys.readouterr().out
    assert main([*flags, "--out", str(tmp_path / "stopped")]) == 0
    whole, stopped = what_was_made(tmp_path / "whole"), what_was_made(tmp_path / "stopped")
    assert whole.keys() == stopped.keys() and len(whole) > 10
    same = {
        name: torch.equal(v, stopped[name]) if name != "history" else v == stopped[name] for name, v in whole.items()
    }
    assert all(same.values()), [name for name, is_same in same.items() if not is_same]
