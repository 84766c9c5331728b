"""One tuning step on generators of published sizes with random weights, on the CPU, in bfloat16 (7 GB, minutes).

DISCL_FULL_SIZE=1 python -m pytest tests/test_full_size.py
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

import datasets
import models
import tune_generator
from bench import bench_spectrum, bench_tune
from spectrum import tables

WEIGHTS = {
    "sd21": {"unet": 3_319_808, "text_encoder": 3_014_656},
    "refiner": {"unet": 13_500_416, "text_encoder_2": 5_242_880},
}


def build(shape: str):
    if shape == "sd21":
        return bench_tune.build_sd21(bench_tune.SD21, dtype=torch.bfloat16)
    return bench_spectrum.build_refiner(bench_spectrum.REFINER, dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.skipif("DISCL_FULL_SIZE" not in os.environ, reason="needs 7 GB and minutes")
@pytest.mark.parametrize("shape", WEIGHTS)
def test_one_step_of_a_generator_of_published_size(shape, tmp_path, monkeypatch):
    pipe = build(shape)
    monkeypatch.setattr(models, "load_generator", lambda *_: pipe)
    monkeypatch.setattr(models, "check_generator", lambda name: None)
    monkeypatch.setattr(models, "describe_generator", lambda *_: {"generator": shape, "revision": "0"})
    train = datasets.load("fewshot_digits", None).train
    row = {"source": train.sources[0], "label": 0, "class_name": "zero", "reason": "", "score": ""}
    tables.write_hard(tmp_path / "hard.csv", [row])
    flags = ["--dataset", "fewshot_digits", "--hard", str(tmp_path / "hard.csv"), "--generator", shape]
    flags += ["--batch-size", "1", "--epochs", "1", "--warmup-steps", "0", "--resolution", "64", "--samples", "0"]
    assert tune_generator.main([*flags, "--dtype", "bfloat16", "--device", "cpu", "--out", str(tmp_path / "t")]) == 0
    adapter = load_file(tmp_path / "t/0/pytorch_lora_weights.safetensors")
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in adapter.values())
    learnt = {name for name, weight in adapter.items() if "lora_B" in name and weight.abs().sum() > 0}
    assert len(learnt) == len(adapter) / 2  # every layer, in both halves
    counts = dict.fromkeys(WEIGHTS[shape], 0)
    for name, weight in adapter.items():
        counts[name.split(".")[0]] += weight.numel()
    assert counts == WEIGHTS[shape]
    history = [json.loads(line) for line in (tmp_path / "t/0/history.jsonl").read_text().splitlines()]
    assert history[-1]["step"] == 1 and history[-1]["loss"] > 0
