"""Few-shot tables of several data sets in one: means by hand, gaps, published rows."""

from __future__ import annotations

import json

import report
from reporting import recipes
from runtime import files


def write_run(folder, dataset: str, images: str, seed: int, overall: float, **extra) -> str:
    args = {"dataset": dataset, "imb_ratio": None, "shots": 16, "shot_seed": 0, "model": "clip"}
    args |= {
        "clip": "ViT-B-16:openai",
        "images": images,
        "lr": 1e-4,
        "tune": "lora",
        "curriculum": "none",
        "seed": seed,
    }
    kind = {"eurosat": "satellite", "dtd": "texture"}[dataset]
    args |= {"mix": "both", "template": f"a {kind} photo of a {{}}"} | extra
    files.write_json(folder / "args.json", {"args": args, "inputs": {"data": 1}})
    found = {"overall": overall, "per_class": [overall]}
    content = {"last": found, "best_by_val": found, "zero_shot": {"overall": 50.0}, "train_counts": [16]}
    files.write_json(folder / "results.json", content)
    return str(folder)


def test_methods_are_rows_data_sets_columns_and_a_mean_stands_where_all_are_there(tmp_path):
    both = {"method": "dset", "curriculum": "all", "curriculum_epochs": 60}
    folders = [
        write_run(tmp_path / "a", "eurosat", "real", 0, 90.0),
        write_run(tmp_path / "b", "eurosat", "real", 1, 94.0),
        write_run(tmp_path / "c", "dtd", "real", 0, 70.0),
        write_run(tmp_path / "d", "dtd", "both", 0, 75.0, **both),
    ]
    assert report.main(["--runs", *folders, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/table.md").read_text()
    overview = text[: text.index("### ", 4)].splitlines()
    assert overview[0] == "### 2 data sets, 16 shots, ViT-B-16"
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:]
        for line in overview[2:]
        if line and "---" not in line
    }
    columns = rows["test accuracy, %"]
    assert columns[-1] == "mean of 2" and sorted(columns[:2]) == ["DTD", "EuroSAT"]
    by_name = {name: dict(zip(columns, cells, strict=True)) for name, cells in rows.items()}
    assert by_name["real"] == {"EuroSAT": "92.0", "DTD": "70.0", "mean of 2": "81.0"}  # (92 + 70) / 2
    # Published by DataDream: 93.5 and 73.9 for real, 93.4 and 74.1 for both.
    assert by_name["real, published"] == {"EuroSAT": "93.5", "DTD": "73.9", "mean of 2": "83.7"}
    assert by_name["real + dset synthetic"] == {"EuroSAT": "–", "DTD": "75.0", "mean of 2": "–"}
    assert "16 shots, ViT-B-16" in (tmp_path / "out/report.html").read_text()
    assert json.loads((tmp_path / "a/results.json").read_text())["last"]["overall"] == 90


def test_one_data_set_has_no_overview(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.read_all, "__defaults__", (recipes.FOLDER / "none",))
    folders = [write_run(tmp_path / "a", "dtd", "real", 0, 70.0)]
    assert report.main(["--runs", *folders, "--out", str(tmp_path / "out")]) == 0
    assert "mean of" not in (tmp_path / "out/table.md").read_text()
