"""Benches run to their end, and note what they measured."""

from __future__ import annotations

import importlib
import json

import forks
import pytest
from conftest import ROOT

from bench import timing

COMMANDS = {
    "bench_train": "--parts cifar v2 one loader timm --steps 2 --rounds 1 --workers 0 --jpegs 8 --jpeg-side 320 "
    "--device cpu",
    "bench_filter": "--images 4 --size 32 --rounds 1 --workers 0 --device cpu",
    "bench_growth": "--parts plan filter --units 2000",
    "bench_flyp": "--batch-size 8 --steps 2 --rounds 1 --workers 0 --device cpu",
    "bench_rethreshold": "--rows 64 --rounds 1",
    "bench_spectrum": "--sources 2 --steps 5 --levels 0 60 --plain-batch 2 --rounds 2 --device cpu",
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
    assert len(found) == {"bench_train": 8, "bench_growth": 2}.get(name, 1) and all(rate > 0 for rate in rates)
    assert not [key for row in found for key in row if "error" in key]
    # What is timed against something else is timed in turns, and each round is kept.
    sides = [row["rounds"] for row in found if "rounds" in row]
    count = {"bench_train": 7, "bench_growth": 0}.get(name, 1)
    assert len(sides) == count
    assert {len(rates) for side in sides for rates in side.values()} <= {2 if name == "bench_spectrum" else 1}
    # Both sides come to the same: up to rounding, to one of 255 in a pixel, and to what two steps make of rounding.
    most = {"pixels": 1, "logits": 0.01}
    apart = {key: value for row in found for key, value in row.items() if key.startswith("largest_difference")}
    assert bool(apart) == (name not in ("bench_growth", "bench_rethreshold"))
    assert all(value <= most.get(key.rpartition("_")[2], 1e-4) for key, value in apart.items()), apart


def test_sides_are_timed_in_turn_and_the_median_of_each_rounds_ratio_counts():
    """Rounds of 1, 2 and 4 seconds against 3, 2 and 4 for as many images: ratios 3, 1 and 1."""
    calls, seconds = [], {"ours": iter([9.0, 1.0, 2.0, 4.0]), "theirs": iter([9.0, 3.0, 2.0, 4.0])}

    def call(name: str):
        def run() -> None:
            calls.append(name)
            now[0] += next(seconds[name])

        return run

    now = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "spent", lambda: (now[0], now[0] / 2))
        found = timing.compare(call("ours"), call("theirs"), images=4, rounds=3)
    assert calls == ["ours", "theirs"] * 4  # the first of each to warm up
    assert found["rounds"]["ours"] == [4.0, 2.0, 1.0] and found["rounds"]["theirs_per_cpu_second"] == [8 / 3, 4.0, 2.0]
    assert found["ours"] == 2.0 and found["theirs"] == 4 / 3 and found["ratio"] == found["ratio_per_cpu_second"] == 1.0


def test_growth_ends_with_1_after_all_parts_where_one_failed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    growth = importlib.import_module("bench_growth")

    def lost(*_):
        raise OSError("no room")

    parts = {"plan": lambda *_: ["-c", "raise SystemExit('gone')"], "start": lost, "score": lambda *_: ["-c", "2"]}
    for name, part in parts.items():
        monkeypatch.setitem(growth.PARTS, name, part)
    out = tmp_path / "growth.jsonl"
    words = ["--units", "10", "--out", str(out), "--parts"]
    assert growth.main([*words, "plan", "start", "score"]) == 1
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["part"] for row in rows] == ["plan", "start", "score"]
    assert rows[0]["code"] == 1 and rows[1]["error"] == "no room"
    assert "error" not in rows[2] and rows[2]["cpu_seconds"] > 0
    assert growth.main([*words, "score"]) == 0
