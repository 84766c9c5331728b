"""Benches run to their end, and note what they measured."""

from __future__ import annotations

import json

import forks
import pytest

COMMANDS = {
    "bench_train": "--parts cifar v2 one loader --steps 2 --rounds 1 --workers 0 --jpegs 8 --device cpu",
    "bench_filter": "--images 4 --size 32 --rounds 1 --workers 0 --device cpu",
    "bench_growth": "--parts plan filter --units 2000",
    "bench_flyp": "--batch-size 8 --steps 2 --rounds 1 --workers 0 --device cpu",
    "bench_rethreshold": "--rows 64",
    "bench_spectrum": "--sources 2 --steps 5 --levels 0 60 --plain-batch 2 --device cpu",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_bench_notes_what_it_measured(name, tmp_path):
    out = tmp_path / "found.json"
    done = forks.type_command(tmp_path, f"bench/{name}.py", *COMMANDS[name].split(), "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.read_text(encoding="utf-8")
    whole = name in ("bench_filter", "bench_rethreshold", "bench_spectrum")
    found = [json.loads(text)] if whole else [json.loads(line) for line in text.splitlines()]
    rates = [row.get("images_per_second", row.get("ours", row.get("cpu_seconds"))) for row in found]
    assert len(found) == {"bench_train": 6, "bench_growth": 2}.get(name, 1) and all(rate > 0 for rate in rates)
    assert not [key for row in found for key in row if "error" in key]
    # Both sides come to the same: up to rounding, to one of 255 in a pixel, and to what two steps make of rounding.
    most = {"pixels": 1, "logits": 0.01}
    apart = {key: value for row in found for key, value in row.items() if key.startswith("largest_difference")}
    assert bool(apart) == (name not in ("bench_growth", "bench_rethreshold"))
    assert all(value <= most.get(key.rpartition("_")[2], 1e-4) for key, value in apart.items()), apart
