"""Tables against numbers worked out by hand, from run folders written by hand."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import report
import runs
from cli import UserError


def write_run(folder, seed, overall, few, curriculum="none", lr=0.1):
    args = {"loss": "ce", "prior": "real", "curriculum": curriculum, "fixed_level": 50, "seed": seed, "lr": lr}
    figures = {"overall": overall, "many": None, "medium": 50.0, "few": few}
    runs.write_json(folder / "args.json", {"args": args})
    runs.write_json(folder / "results.json", {"last": figures, "best_by_val": figures | {"overall": overall + 1}})
    record = {"levels": [100], "val_overall": 10.0, "val_few": 20.0}
    (folder / "history.jsonl").write_text("".join(json.dumps({"epoch": e, **record}) + "\n" for e in range(3)))
    return str(folder)


def test_the_table_holds_mean_and_standard_deviation(tmp_path):
    folders = [write_run(tmp_path / f"r{seed}", seed, overall, 40) for seed, overall in enumerate([70, 72, 77])]
    folders.append(write_run(tmp_path / "d", 0, 80, 60, "d2s"))
    assert report.main(["--runs", *folders, "--out", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    # Mean of 70, 72, 77 is 73; deviations -3, -1, 4: variance (9 + 1 + 16) / 2 = 13, root 3.6056.
    assert lines[2] == "| CE | – | 50.0 (0.0) | 40.0 (0.0) | 73.0 (3.6) | 3 |"
    assert lines[3] == "| CE + d2s | – | 50.0 (0.0) | 60.0 (0.0) | 80.0 (0.0) | 1 |"
    table = (tmp_path / "out/table.csv").read_text().splitlines()
    assert table[1] == "CE,last,3,,,50.00,0.00,40.00,0.00,73.00,3.61"
    assert table[2] == "CE,best_by_val,3,,,50.00,0.00,40.00,0.00,74.00,3.61"
    assert Image.open(tmp_path / "out/curriculum.png").size[0] > 500


def test_runs_that_do_not_belong_together_are_named(tmp_path):
    a, b = write_run(tmp_path / "a", 0, 70, 40), write_run(tmp_path / "b", 1, 70, 40, lr=0.2)
    with pytest.raises(UserError, match="differ in lr"):
        report.main(["--runs", a, b, "--out", str(tmp_path / "out")])
    c = write_run(tmp_path / "c", 0, 70, 40)
    with pytest.raises(UserError, match="same seed"):
        report.main(["--runs", a, c, "--out", str(tmp_path / "out")])


def test_an_unfinished_run_is_named_and_left_out(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    done = write_run(tmp_path / "a", 0, 70, 40)
    report.main(["--runs", str(tmp_path / "empty"), done, "--out", str(tmp_path / "out")])
    assert "empty: not finished, left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing to report"):
        report.main(["--runs", str(tmp_path / "empty"), "--out", str(tmp_path / "out")])


def test_the_spectrum_sheet_and_the_acceptance_map_are_drawn(road, tmp_path):
    assert report.main(["--spectrum", str(road.spectrum), "--out", str(tmp_path)]) == 0
    for name in ("spectrum.png", "acceptance.png"):
        image = Image.open(tmp_path / name).convert("RGB")
        assert min(image.size) > 150 and len(set(image.resize((64, 64)).get_flattened_data())) > 20
