"""The bench of tuning: our adapters and images against the plain way's, on a tiny generator."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
import torch

from bench import bench_tune as bench
from bench import count_tuning

TINY = {
    "unet": bench.SMALL["unet"]
    | {"block_out_channels": (8, 16, 16, 16), "attention_head_dim": 2, "layers_per_block": 1, "cross_attention_dim": 16}
    | {"norm_num_groups": 4},
    "vae": bench.SMALL["vae"] | {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
    "text": bench.SMALL["text"]
    | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def run_here(script: str, *words) -> np.ndarray:
    """A script in this process: the test need not wait for imports."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    assert module.main([str(word) for word in words]) == 0
    return np.array([1.0, 2.0])


@pytest.mark.slow
def test_both_ways_make_the_same_adapters_and_images(tmp_path, monkeypatch):
    monkeypatch.setitem(bench.CONFIGS, "small", TINY)
    monkeypatch.setattr(bench, "run", run_here)
    command = ["--device", "cpu", "--resolution", "64", "--classes", "2", "--shots", "2", "--batch-size", "2"]
    command += ["--epochs", "4", "--rank", "2", "--per-class", "3", "--steps", "2", "--together", "2", "--rounds", "1"]
    result = bench.main([*command, "--out", str(tmp_path / "result.json")])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["largest_difference_of_adapters"] < 0.01 and result["largest_difference_of_pixels"] <= 1
    seconds, cpu_seconds = result["tuning_seconds_a_class"], result["generation_cpu_seconds_a_class"]
    assert seconds == {"ours": 0.5, "theirs": 1.0, "ratio": 2.0, "rounds": [[0.5, 1.0]]}
    assert cpu_seconds == {"ours": 1.0, "theirs": 2.0, "ratio": 2.0, "rounds": [[1.0, 2.0]]}


def test_of_three_rounds_the_median_of_the_rounds_ratios_counts():
    """Seconds 1, 2, 4 against 3, 4, 4: ratios 3, 2, 1; steps a second 4, 2, 9 against 2, 1, 3: ratios 2, 2, 3."""
    of = lambda seconds, rate: {"tuning_seconds_a_class": seconds, "tuning_steps_per_second": rate}  # noqa: E731
    rounds = [[of(1.0, 4.0), of(3.0, 2.0)], [of(2.0, 2.0), of(4.0, 1.0)], [of(4.0, 9.0), of(4.0, 3.0)]]
    found = bench.compare_rounds(rounds)
    pairs = [[1.0, 3.0], [2.0, 4.0], [4.0, 4.0]]
    assert found["tuning_seconds_a_class"] == {"ours": 2.0, "theirs": 4.0, "ratio": 2.0, "rounds": pairs}
    assert found["tuning_steps_per_second"]["ratio"] == 2.0 and found["tuning_steps_per_second"]["ours"] == 4.0


def test_sd21_has_the_published_number_of_weights():
    """866 million in the UNet, 340 in the text encoder; LoRA of rank 16: 3.32 + 3.01 million (DataDream)."""
    from training.lora import add_adapters

    pipe = bench.build_sd21(bench.SD21, "meta")
    weights = {name: sum(w.numel() for w in getattr(pipe, name).parameters()) for name in ("unet", "text_encoder")}
    assert round(weights["unet"] / 1e6) == 866 and round(weights["text_encoder"] / 1e6) == 340
    counts = {"unet": 0, "text_encoder": 0}
    for name, layer in add_adapters(pipe, ["unet", "text"], 1, 16, 16).items():
        counts[name.split(".")[0]] += layer.a.numel() + layer.b.numel()
    assert counts == {"unet": 3_319_808, "text_encoder": 3_014_656}


@pytest.mark.slow
def test_a_steps_work_is_counted_by_shapes_alone(tmp_path, monkeypatch):
    """Each adapted layer adds its product in one kernel; the arithmetic is that of a step that is taken, to 1 %."""
    from torch.utils.flop_counter import FlopCounterMode

    from training.lora import add_adapters

    monkeypatch.setitem(bench.CONFIGS, "small", TINY)
    words = ["--model", "small", "--resolution", "64", "--batch-size", "4", "--shots", "2", "--rank", "2"]
    count_tuning.main([*words, "--together", "1", "--out", str(tmp_path / "counted.jsonl")])
    found = json.loads((tmp_path / "counted.jsonl").read_text())
    pipe = bench.build_sd21(TINY)
    for part in (pipe.unet, pipe.text_encoder):
        part.requires_grad_(False)
    layers = add_adapters(pipe, ["unet", "text"], 1, 2, 2.0)
    assert found["most_frequent"]["aten.baddbmm.default"] == len(layers)
    # One prompt, since equal ones are read once.
    text = torch.randint(500, (1, 77))
    with FlopCounterMode(display=False, custom_mapping=count_tuning.ATTENTION) as flops:
        told = pipe.text_encoder(text)[0].expand(4, -1, -1)
        pipe.unet(torch.randn(4, 4, 8, 8), 500, told).sample.square().mean().backward()
    assert found["tflop"] == pytest.approx(flops.get_total_flops() / 1e12, rel=0.01)
