"""Tables against numbers worked out by hand, from run folders written by hand; the page and the figures from them."""

from __future__ import annotations

import csv
import functools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import report
from loaders.base import DataSet
from reporting import comparisons, curves, names, recipes, render, tables
from runtime import files
from runtime.cli import UserError

COUNTS = [400, 200, 50, 10, 5]  # of five classes
pytestmark = pytest.mark.usefixtures("blank_figures")


def write_run(
    folder, seed, overall, few, curriculum="none", history=3, commit=None, per_class=None, inputs=None, **extra
):
    args = {
        "dataset": "digits", "imb_ratio": 30.0, "model": "resnet8", "loss": "ce", "prior": "real",
        "curriculum": curriculum, "fixed_level": 50, "seed": seed, "lr": 3e-3, **extra,
    }  # fmt: skip
    inputs = {"data": 1, **({"spectrum": "a"} if curriculum != "none" else {}), **(inputs or {})}
    found = {"overall": overall, "many": None, "medium": 50.0, "few": few, "epoch": 2, "per_class": per_class}
    content = {"args": args, "inputs": inputs} | ({"environment": {"commit": commit}} if commit else {})
    files.write_json(folder / "args.json", content)
    best = found | {"overall": overall + 1, "val_overall": 3.0}
    files.write_json(folder / "results.json", {"last": found, "best_by_val": best, "train_counts": COUNTS})
    level = [100] if curriculum == "none" else [50]
    record = {"levels": level, "val_overall": 10.0, "val_few": 20.0, "val_many": None, "val_medium": 5.0,
              "synthetic_share": 0.25 * (curriculum != "none")}  # fmt: skip
    if history:
        (folder / "history.jsonl").write_text(
            "".join(json.dumps({"epoch": e, **record}) + "\n" for e in range(history))
        )
    return str(folder)


def write_recipe(root, name, title, expected, flags):
    (root / "recipes/digits").mkdir(parents=True, exist_ok=True)
    (root / f"recipes/digits/{name}.args").write_text(
        f"# {title}\n# python train_lt.py @recipes/digits/{name}.args --seed 0\n# expected: {expected}\n"
        f"# GPU-hours: 1 (estimate)\n# needs: nothing\n--dataset digits --lr 3e-3 {flags}\n"
    )


@pytest.fixture(autouse=True)
def no_recipes(monkeypatch):
    """Most tests have no recipes of their own, and the project's are not about them."""
    monkeypatch.setattr(recipes.read_all, "__defaults__", (recipes.FOLDER / "none",))
    monkeypatch.setattr(recipes.read_published, "__defaults__", (recipes.FOLDER / "none.csv",))


@pytest.fixture
def two_recipes(tmp_path, monkeypatch):
    write_recipe(tmp_path, "ce", "digits IR30, ResNet-8: CE", "few 41.5, all 70 (A Paper)", "--loss ce")
    write_recipe(tmp_path, "ce_d2s", "digits IR30, ResNet-8: CE + d2s", "not published", "--curriculum d2s")
    monkeypatch.setattr(recipes.read_all, "__defaults__", (tmp_path / "recipes",))


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_table_holds_mean_and_standard_deviation(tmp_path, drawn):
    folders = [write_run(tmp_path / f"r{seed}", seed, overall, 40) for seed, overall in enumerate([70, 72, 77])]
    folders.insert(0, write_run(tmp_path / "d", 0, 80, 60, "d2s"))
    assert report.main(["--runs", *folders, "--out", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    assert lines[0] == "| test accuracy, % | many | medium | few | all | seeds | against the row without |"
    # Mean of 70, 72, 77 is 73; deviations -3, -1, 4: variance (9 + 1 + 16) / 2 = 13, root 3.6056. One run has none.
    assert lines[2] == "| CE | – | 50.0 (0.0) | 40.0 (0.0) | 73.0 (3.6) | 3 | – |"
    # One run has no standard error: the difference stands there without one, and without a word.
    assert lines[3] == "| CE + d2s | – | 50.0 | 60.0 | 80.0 | 1 | few +20.0, all +7.0 |"
    rows = {(row["row"], row["epoch"], row["figure"]): row for row in read_csv(tmp_path / "out/table.csv")}
    assert len(rows) == 2 * 2 * 4
    assert rows["CE", "last", "all"] | {"mean": "73.00", "std": "3.61", "seeds": "3"} == rows["CE", "last", "all"]
    assert rows["CE", "best_by_val", "all"]["mean"] == "74.00"
    assert (rows["CE + d2s", "last", "few"]["mean"], rows["CE + d2s", "last", "few"]["std"]) == ("60.00", "")
    assert rows["CE", "last", "many"]["mean"] == ""
    assert Image.open(tmp_path / "out/curriculum.png").size[0] > 500


def test_the_latex_table_is_escaped(tmp_path):
    run = write_run(tmp_path / "a", 0, 80, 60, "d2s")
    report.main(["--runs", run, "--out", str(tmp_path / "out")])
    text = (tmp_path / "out/table.tex").read_text()
    assert render.LATEX["~"] == r"\textasciitilde{}"
    assert r"test accuracy, \% & many & medium & few & all & seeds \\" in text
    assert r"CE + d2s & -- & 50.0 & 60.0 & 80.0 & 1 \\" in text
    assert text.count(r"\begin{tabular}{lrrrrr}") == text.count(r"\end{tabular}") == 1


def test_what_was_published_stands_beside_it_and_what_is_missing_below(tmp_path, two_recipes):
    folders = [write_run(tmp_path / f"r{seed}", seed, overall, 40) for seed, overall in enumerate([70, 73])]
    report.main(["--runs", *folders, "--out", str(tmp_path / "out")])
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    # Few: 40 - 41.5 = -1.5; all: (70 + 73) / 2 - 70 = +1.5.
    # The standard error of the mean of 70 and 73 is 2.12 / root 2 = 1.5: +1.5 is one of it, no "better".
    assert lines[2].endswith("| 71.5 (2.1) | 2 | few 41.5, all 70 | few −1.5 ± 0.0 worse, all +1.5 ± 1.5 |")
    assert "Missing seeds: CE (seed 2)" in lines and "Missing rows: CE + d2s" in lines
    rows = {(row["epoch"], row["figure"]): row for row in read_csv(tmp_path / "out/table.csv")}
    assert (rows["last", "all"]["published"], rows["last", "all"]["difference"]) == ("70.00", "+1.50")
    assert rows["last", "all"]["source"] == "A Paper" and rows["best_by_val", "all"]["published"] == ""
    page = (tmp_path / "out/report.html").read_text()
    assert "python train_lt.py @recipes/digits/ce_d2s.args --seed 2" in page


def test_rows_of_alia_have_names_groups_and_an_order(tmp_path):
    alia = {"curriculum": "all", "add": "like:extra", "edits": "domains", "dataset": "planes", "imb_ratio": None}
    rows = {
        "CE": {"curriculum": "none"},
        "CE + CutMix": {"curriculum": "none", "mix": "cutmix"},
        "CE + RandAugment": {"curriculum": "none", "randaugment": True},
        "CE + text to image": {"edits": "text"},
        "CE + edits by the user's prompt, unfiltered": {"edits": "user", "edit_rules": ["none"]},
        "CE + ALIA, unfiltered": {"edit_rules": ["none"]},
        "CE + ALIA (semantic)": {"edit_rules": ["semantic"]},
        "CE + ALIA (semantic, confidence)": {"edit_rules": ["semantic", "confidence"]},
        "CE + ALIA": {},
        "CE + ALIA + d2s": {"curriculum": "d2s"},
        "CE + extra real": {"curriculum": "none", "extra_real": True},
    }
    plain = {"add": None, "edits": None}
    folders = []
    for place, flags in enumerate(rows.values()):
        settings = alia | (plain if flags.get("curriculum") == "none" else {}) | flags
        folder = write_run(tmp_path / f"r{place}", 0, 70 + place, 40, **settings)
        content = files.read_json(tmp_path / f"r{place}/results.json")
        content["last"] |= {"id": 90.0, "ood": 50.0 + place, "balanced": 70.0, "worst_group": 30.0 + place}
        files.write_json(tmp_path / f"r{place}/results.json", content)
        folders.append(folder)
    report.main(["--runs", *folders[::-1], "--out", str(tmp_path / "out")])
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    assert lines[0].startswith("| test accuracy, % | all | ID | OOD | all groups | worst group | seeds | against the")
    assert [line.split("|")[1].split(" (--")[0].strip() for line in lines[2 : 2 + len(rows)]] == list(rows)
    assert "| 71.0 | 90.0 | 51.0 | 70.0 | 31.0 | 1 | OOD +1.0, worst group +1.0 |" in lines[3]
    assert lines[2].endswith("| 70.0 | 90.0 | 50.0 | 70.0 | 30.0 | 1 | – |")


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"epochs": 3, "weight_decay": 0.05}, "CE (--epochs 3)"),  # weight decay 0.05 is the default of digits
        ({"clip_grad": 1.0, "ema": 0.999, "color_jitter": 0.2}, "CE (--clip-grad 1, --color-jitter 0.2, --ema 0.999)"),
        ({"precision": "bf16"}, "CE (--precision bf16)"),
        ({"lr": 0.003, "memory_format": "channels_last", "levels": [10]}, "CE"),  # change no result of this row
    ],
)
def test_a_run_is_a_recipes_row_only_with_all_of_its_flags(tmp_path, two_recipes, flags, name):
    run = write_run(tmp_path / "a", 0, 70, 40, **flags)
    report.main(["--runs", run, "--out", str(tmp_path / "out")])
    text = (tmp_path / "out/table.md").read_text()
    [row] = [line for line in text.splitlines() if line.startswith("| CE")]
    assert row.startswith(f"| {name} | ")
    assert ("few 41.5, all 70 |" in row) == (name == "CE")
    notes = [line for line in text.splitlines() if "was not run as" in line]
    if name == "CE":
        assert notes == [] and "Missing seeds: CE (seed 1, 2)" in text
    else:
        assert notes[0].startswith(f"{name} was not run as recipes/digits/ce.args says and does not count as its row: ")
        assert "published for the recipe: few 41.5, all 70" in notes[0] and "Missing rows: CE; CE + d2s" in text


def rows_of(folders, tmp_path):
    """The names of a report's rows and how many runs each has; its text."""
    assert report.main(["--runs", *folders, "--out", str(tmp_path / "out")]) == 0
    found = {row["row"]: int(row["seeds"]) for row in read_csv(tmp_path / "out/table.csv")}
    return found, (tmp_path / "out/table.md").read_text()


def test_runs_with_other_flags_are_not_averaged(tmp_path):
    folders = [
        write_run(tmp_path / f"{i}", i, 70, 40, **flags) for i, flags in enumerate([{}, {"lr": 0.2}, {}, {"ema": 0.9}])
    ]
    found, _ = rows_of(folders, tmp_path)
    assert found == {"CE": 2, "CE (--lr 0.2)": 1, "CE (--ema 0.9)": 1}


def test_another_spectrum_or_start_model_makes_another_row_and_a_note(tmp_path, two_recipes):
    folders = [
        write_run(tmp_path / "a", 0, 70, 40, "d2s", inputs={"spectrum": "aaaaaaaaaa"}, spectrum="x"),
        write_run(tmp_path / "b", 1, 71, 40, "d2s", inputs={"spectrum": "bbbbbbbbbb"}, spectrum="y"),
        write_run(tmp_path / "c", 2, 72, 40, "d2s", inputs={"spectrum": "aaaaaaaaaa"}, spectrum="z"),
        write_run(tmp_path / "d", 0, 60, 40, loss="bs", init_checkpoint="m", inputs={"init_checkpoint": "1111"}),
        write_run(tmp_path / "e", 1, 60, 40, loss="bs", init_checkpoint="n", inputs={"init_checkpoint": "2222"}),
    ]
    found, text = rows_of(folders, tmp_path)
    assert found["CE + d2s, spectrum aaaaaaaa"] == 2 and found["CE + d2s, spectrum bbbbbbbb"] == 1
    assert found["BS, start model 1111"] == found["BS, start model 2222"] == 1
    assert "CE + d2s was trained with several spectra, each in a row of its own: aaaaaaaa (x, z); bbbbbbbb (y)" in text
    assert "BS was trained with several start models" in text


def test_runs_on_other_images_make_a_table_of_their_own(tmp_path):
    folders = [write_run(tmp_path / f"{data}{seed}", seed, 70 + data, 40, inputs={"data": data})
               for data, seed in ((1, 0), (1, 1), (2, 0))]  # fmt: skip
    _, text = rows_of(folders, tmp_path)
    assert re.findall(r"^### (.*)$", text, re.M) == ["digits IR30, ResNet-8 (data 1)", "digits IR30, ResNet-8 (data 2)"]
    assert "| CE | – | 50.0 (0.0) | 40.0 (0.0) | 71.0 (0.0) | 2 |" in text and "| 72.0 | 1 |" in text
    assert "not comparable" in text


def test_a_flag_that_all_rows_share_that_read_it_is_a_remark(tmp_path):
    for number, (curriculum, more) in enumerate([("none", {}), ("d2s", {"hard_share": 0.3}), ("all", {})]):
        flags = {"epochs": 7, "curriculum_epochs": 6, **more}
        write_run(tmp_path / f"{number}", 0, 70, 40, curriculum, **flags)
    [table] = tables.read(tables.run_folders([tmp_path]), [], report.effective_arguments)
    assert list(table.rows) == ["CE", "CE + all levels", "CE + d2s (--hard-share 0.3)"]
    assert table.remarks == ["Rows without a recipe were run with --curriculum-epochs 6, --epochs 7"]


def test_five_epochs_are_five_whether_noted_as_a_whole_number_or_not(tmp_path):
    for seed, warmup in enumerate((5, 5.0, 5.5)):
        write_run(tmp_path / f"{seed}", seed, 70, 40, warmup_epochs=warmup)
    [table] = tables.read(tables.run_folders([tmp_path]), [], report.effective_arguments)
    assert [len(row.runs) for row in table.rows.values()] == [2, 1]


@pytest.mark.parametrize(("last", "more"), [({}, "1 flag more"), ({"weight_decay": 0.2}, "2 flags more")])
def test_a_row_with_many_flags_has_a_short_name_and_a_note(tmp_path, last, more):
    flags = {"epochs": 3, "lr": 0.2, "optimizer": "sgd", "ema": 0.9, **last}
    found, text = rows_of([write_run(tmp_path / "a", 0, 70, 40, **flags)], tmp_path)
    [name] = found
    assert name == f"CE (--ema 0.9, --epochs 3, --lr 0.2, {more})"
    assert (
        f"{name} was run with --ema 0.9, --epochs 3, --lr 0.2, --optimizer sgd{', --weight-decay 0.2' * len(last)};"
        in text
    )


def test_groups_at_their_bounds():
    counts = np.array([101, 100, 20, 19])
    data = SimpleNamespace(published_counts=counts, few_below=20, many_above=100)
    groups = DataSet.groups.fget(data)
    assert {name: group.tolist() for name, group in groups.items()} == {"many": [0], "medium": [1, 2], "few": [3]}


def test_few_shot_draws_are_averaged_though_their_images_differ(tmp_path):
    folders = [
        tmp_path
        / write_run(tmp_path / f"{d}{s}", s, 70 + d, 40, shots=4, shot_seed=d, inputs={"data": d, "spectrum": d})
        for d in range(3)
        for s in range(2)
    ]
    [table] = tables.read(folders, [], lambda *_: {})
    assert [len(row.runs) for row in table.rows.values()] == [6]
    assert comparisons.results_of(next(iter(table.rows.values())), "overall")[0] == 71
    assert not render.input_notes(table)  # each draw has a spectrum of its own, and none of them a row of its own


def test_another_spectrum_of_one_few_shot_draw_makes_another_row(tmp_path):
    """And is not averaged with the first, whatever the seeds; the note says which spectra these were."""
    for draw, seed, spectrum in ((0, 0, "a"), (0, 1, "a"), (1, 0, "b"), (0, 2, "c"), (0, 3, "c")):
        inputs, more = {"data": draw, "spectrum": spectrum}, {"spectrum": f"runs/{spectrum}"}
        write_run(tmp_path / f"{draw}{seed}", seed, 70, 40, shots=4, shot_seed=draw, inputs=inputs, **more)
    [table] = tables.read(tables.run_folders([tmp_path]), [], lambda *_: {})
    assert [[run["inputs"]["spectrum"] for run in row.runs] for row in table.rows.values()] == [
        ["a", "a", "b"],
        ["c", "c"],
    ]
    [note] = render.input_notes(table)
    assert note.startswith(
        "CE, shot seed 0 was trained with several spectra, each in a row of its own: a (runs/a); c ("
    )


def test_a_few_shot_row_is_named_by_what_its_table_does_not_say(tmp_path):
    args = {"dataset": "fewshot_digits", "imb_ratio": None, "shots": 4, "model": "resnet8", "seed": 0, "epochs": 4,
            "template": "a photo of a {}"}  # fmt: skip
    more = {"real": {"curriculum": "none"}, "both": {"curriculum": "all", "curriculum_epochs": 4, "method": "untuned"}}
    for images, own in more.items():
        files.write_json(tmp_path / images / "args.json", {"args": args | own | {"images": images}})
        files.write_json(tmp_path / images / "results.json", {"last": {"overall": 90.0}})
    [table] = tables.read(tables.run_folders([tmp_path]), [], lambda *_: {"epochs": 4, "images": "both"})
    assert list(table.rows) == ["real", "real + untuned synthetic"] and not table.remarks
    # A table without a few-shot column is summed up by its accuracy over all classes.
    assert "The most in accuracy over all classes against the same loss without: real + untuned" in render.findings(
        table
    )


def test_better_and_worse_need_two_standard_errors():
    # 70, 72, 74: mean 72, standard deviation 2, error 2 / root 3 = 1.155; 60, 62, 64 the same: together 1.633.
    def row(*values):
        return tables.Row("", [{"results": {"last": {"overall": value}}} for value in values])

    value, error = comparisons.against_row(row(70, 72, 74), row(60, 62, 64), "overall")
    assert (value, round(error, 3)) == (10, 1.633)
    assert [comparisons.verdict(v, 1.0) for v in (2.0, 2.01, -2.0, -2.01)] == ["", "better", "", "worse"]
    assert comparisons.verdict(50.0, None) == ""
    assert comparisons.against_row(row(70), row(60, 62), "overall") == (9, None)


def test_what_was_published_alone_has_a_row_without_runs(tmp_path, monkeypatch):
    (tmp_path / "published.csv").write_text(
        'table,row,figures,source\n"digits IR30, ResNet-8",CE + X,"few 7.30, all 37.20","A Paper v1, Table 1"\n'
    )
    monkeypatch.setattr(recipes.read_published, "__defaults__", (tmp_path / "published.csv",))
    _, text = rows_of([write_run(tmp_path / "a", 0, 70, 40)], tmp_path)
    assert "| CE + X | – | – | – | – | – | few 7.3, all 37.2 | – |" in text
    assert "Published only, trained by no recipe here: CE + X" in text and "A Paper v1, Table 1 (CE + X)" in text
    (tmp_path / "published.csv").write_text("table,row,figures,source\na,b,none,c\n")
    with pytest.raises(UserError, match="published.csv, line 2: expected table, row"):
        recipes.read_published(tmp_path / "published.csv")


def test_other_data_ratios_and_models_are_other_tables(tmp_path):
    folders = [
        write_run(tmp_path / "a", 0, 70, 40),
        write_run(tmp_path / "b", 0, 60, 40, imb_ratio=10.0),
        write_run(tmp_path / "c", 0, 50, 40, model="resnet20"),
        write_run(tmp_path / "d", 0, 40, 40, dataset="cifar100_lt", imb_ratio=100.0, model="resnet32"),
    ]
    report.main(["--runs", *folders, "--out", str(tmp_path / "out")])
    text = (tmp_path / "out/table.md").read_text()
    assert re.findall(r"^### (.*)$", text, re.M) == [
        "digits IR30, ResNet-8", "digits IR10, ResNet-8", "digits IR30, ResNet-20", "CIFAR100-LT IR100, ResNet-32"
    ]  # fmt: skip
    assert (tmp_path / "out/cifar100_lt_ir100_resnet_32_curriculum.png").is_file()


def test_rows_have_one_order_whatever_the_folders_are_called(tmp_path):
    rows = [("bs", "d2s"), ("ce", "d2s"), ("bs", "none"), ("ce", "none"), ("ce", "all")]
    folders = [write_run(tmp_path / f"{i}", 0, 70, 40, c, loss=loss) for i, (loss, c) in enumerate(rows)]
    for given in (folders, folders[::-1]):
        found = tables.read(tables.run_folders([tmp_path / folder for folder in given]), [], report.effective_arguments)
        assert list(found[0].rows) == ["CE", "CE + all levels", "CE + d2s", "BS", "BS + d2s"]


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ({"loss": "bs", "prior": "stage", "curriculum": "d2s"}, "BS (stage prior) + d2s"),
        ({"loss": "ce", "prior": "stage", "curriculum": "text_only"}, "CE + text only"),
        ({"loss": "ce", "augment": "cuda"}, "CE + CUDA"),
        ({"loss": "ce", "curriculum": "fixed", "fixed_level": 70}, "CE + level 70"),
        ({"loss": "ce", "init_checkpoint": "a.pt"}, "CE, trained on"),
        ({"loss": "bs", "init_checkpoint": "a.pt"}, "BS"),
        ({"loss": "bs", "curriculum": "d2s", "balanced": True}, "BS + d2s, balanced fill"),
        ({"loss": "ldam", "curriculum": "all"}, "LDAM + all levels"),
    ],
)
def test_row_names(args, name):
    assert names.row_name(args) == name


# ---------------------------------------------------------------------------------------------------------------------
# bad input


def test_two_results_of_one_seed_are_an_error_and_a_copy_counts_once(tmp_path, capsys):
    a, b = write_run(tmp_path / "a", 0, 70, 40), write_run(tmp_path / "b", 0, 71, 40)
    with pytest.raises(UserError, match=f"{b} and {a} are the same run with the same seed, but have other results"):
        report.main(["--runs", a, b, "--out", str(tmp_path / "out")])
    c = write_run(tmp_path / "c", 0, 70, 40, spectrum="elsewhere")  # what is read may lie elsewhere
    found, _ = rows_of([a, c, a], tmp_path)
    assert found == {"CE": 1} and f"{c}: left out, the same run as {a}" in capsys.readouterr().out


def test_an_unfinished_run_and_an_empty_folder_are_named_and_left_out(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "all/half", 1, 70, 40)
    (tmp_path / "all/half/results.json").unlink()
    write_run(tmp_path / "all/done", 0, 70, 40)
    report.main(["--runs", str(tmp_path / "empty"), str(tmp_path / "all"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert f"{tmp_path}/empty: not finished, left out" in said
    assert f"{tmp_path}/all/half: not finished, left out" in said and "| CE |" in said and "| 70.0 | 1 |" in said
    with pytest.raises(UserError, match="nothing to report"):
        report.main(["--runs", str(tmp_path / "empty"), "--out", str(tmp_path / "out")])


def test_runs_of_mixed_code_are_named_in_one_line(tmp_path, capsys):
    a, b = (write_run(tmp_path / name, seed, 70, 40, commit=f"{name}000") for seed, name in enumerate("ab"))
    c = write_run(tmp_path / "c", 2, 70, 40, commit="a000")
    report.main(["--runs", a, b, c, "--out", str(tmp_path / "out")])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Mixed code versions")]
    assert f"a000 made {a}, {c}; b000 made {b}" in line
    assert line in (tmp_path / "out/table.md").read_text()
    report.main(["--runs", a, c, "--out", str(tmp_path / "out")])
    assert "Mixed" not in capsys.readouterr().out


DAMAGED = {
    "results.json": ["{", "[]", '{"best": 1}', "\x00"],
    "args.json": ["{", "7", '{"args": {"dataset": "digits", "seed": 0}}',
                  '{"args": {"dataset": "gone", "seed": 0, "model": "m"}}',
                  '{"args": {"dataset": "digits", "model": "resnet8", "seed": "x"}}'],
    "history.jsonl": ['{"epoch": 0', '{"epoch": 0}\n', "3\n"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), [(name, text) for name, some in DAMAGED.items() for text in some])
def test_a_damaged_or_older_run_is_named_and_the_others_are_reported(tmp_path, capsys, name, content):
    run, other = write_run(tmp_path / "a", 0, 70, 40), write_run(tmp_path / "b", 1, 72, 40)
    (tmp_path / "a" / name).write_text(content)
    found, _ = rows_of([run, other], tmp_path)
    assert found == {"CE": 1}
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{run}: left out: ")]


# ---------------------------------------------------------------------------------------------------------------------
# figures and the page


class Page(HTMLParser):
    """What a page holds: links to elsewhere, pictures, and tags that were not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.pictures, self.cells = [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [value for name, value in attrs.items() if name in ("src", "href") and value[:5] != "data:"]
        if tag == "img":
            self.pictures.append(attrs)
        self.cells += tag == "td"
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_holds_everything_and_needs_no_other_file(tmp_path, two_recipes, drawn):
    folders = [
        write_run(tmp_path / "a", 0, 70, 40, per_class=[90, 80, 70, None, 20]),
        write_run(tmp_path / "b", 0, 72, 42, "d2s", per_class=[88, 80, 70, None, 40]),
    ]
    report.main(["--runs", *folders, "--out", str(tmp_path / "out")])
    text = (tmp_path / "out/report.html").read_text()
    page = Page(text)
    assert page.open == [] and page.links == [] and "http" not in re.sub(r"base64,[^\"]*", "", text)
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {f"{name}.png" for name in ("curriculum", "groups", "synthetic", "frequency", "gain")}
    assert len(page.pictures) == len(pictures) and all(picture["alt"] for picture in page.pictures)
    # A narrow screen breaks no line after the hyphens of a flag.
    assert report.page.note("<b> (--lr 3e-3)") == '<p class="note">&lt;b&gt; (<span class="flag">--lr</span> 3e-3)</p>'
    assert page.cells == 2 * 8 and 'name="viewport"' in text
    # Not "by their training images": with the web's images added the groups stay those of the long-tailed set.
    assert "with fewer than 20 images in the long-tailed training set" in text
    assert "few&nbsp;−1.5, all&nbsp;+0.0" in text


def test_results_that_were_kept_without_a_history_make_the_table(tmp_path):
    run = write_run(tmp_path / "results/digits/a", 0, 70, 40, history=0)
    report.main(["--runs", run, "--out", str(tmp_path / "out")])
    assert "| CE | – | 50.0 | 40.0 | 70.0 | 1 |" in (tmp_path / "out/table.md").read_text()
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_run_without_a_history_takes_no_curve_from_the_other_seeds(tmp_path):
    for seed, history in enumerate((0, 3, 3)):
        write_run(tmp_path / f"r{seed}", seed, 70, 40, "d2s", history=history)
    [table] = tables.read(tables.run_folders([tmp_path]), [], report.effective_arguments)
    [row] = table.rows.values()
    assert curves.curves(row, "val_few").tolist() == [[20.0] * 3] * 2
    _, _, _, points, *_ = next(curves.by_epoch([row], {"CE + d2s": {}}))
    assert points == {"CE + d2s": [(1, 50), (2, 50), (3, 50)]}
    assert f"Curves by epoch leave out runs without a history: {tmp_path / 'r0'}" in render.notes(table)


def test_figures_that_would_show_nothing_are_not_drawn(tmp_path):
    """Levels where no row has a curriculum, a group that has all classes, and classes in order of equal counts."""
    write_run(tmp_path / "a", 0, 70, 40, per_class=[90, 80, 70, 50, 20])
    record = {"epoch": 0, "levels": [100], "val_overall": 10.0, "val_medium": 10.0}
    (tmp_path / "a/history.jsonl").write_text(json.dumps(record) + "\n")
    for counts, wanted in (([400, 200, 50, 10, 5], ["curriculum", "frequency"]), ([30] * 5, ["curriculum"])):
        path = tmp_path / "a/results.json"
        files.write_json(path, files.read_json(path) | {"train_counts": counts})
        [table] = tables.read(tables.run_folders([tmp_path]), [], report.effective_arguments)
        found = list(curves.comparative_figures(list(table.rows.values())))
        assert [figure[0] for figure in found] == wanted
        assert found[0][1].startswith("Accuracy on") and found[0][2] is report.figures.draw_lines


@pytest.mark.slow
def test_tables_in_the_documents_are_what_report_makes_of_the_kept_results(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.read_all, "__defaults__", (recipes.FOLDER,))
    monkeypatch.setattr(recipes, "read_all", functools.cache(recipes.read_all))
    monkeypatch.setattr(recipes.read_published, "__defaults__", (recipes.FOLDER / "published.csv",))
    found = {}
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text(encoding="utf-8")
        found |= {folder: text for folder in re.findall(r"python report.py --runs (results/[\w/]+)", text)}
    assert "results/cifar100_lt" in found
    for folder, text in found.items():
        report.main(["--runs", str(ROOT / folder), "--out", str(tmp_path / folder)])
        table = (tmp_path / folder / "table.md").read_text(encoding="utf-8").partition("\n\n")[0]
        assert table in text, folder


def test_gain_is_over_the_same_loss_without_a_curriculum(tmp_path, monkeypatch):
    folders = [
        write_run(tmp_path / "a", 0, 70, 40, per_class=[90, 80, 70, 50, 20]),
        write_run(tmp_path / "b", 0, 70, 40, "d2s", per_class=[88, 80, 70, 55, 40]),
        write_run(tmp_path / "c", 1, 70, 40, "d2s", per_class=[90, 80, 70, 65, 40]),
        write_run(tmp_path / "d", 0, 70, 40, loss="bs", per_class=[0, 0, 0, 0, 0]),
        write_run(tmp_path / "e", 0, 70, 40, "d2s", loss="la", per_class=[0, 0, 0, 0, 0]),
    ]
    drawn = {}
    monkeypatch.setattr(
        report.figures, "draw_by_frequency", lambda lines, counts, styles, label, path: drawn.update({label: lines})
    )
    [table] = tables.read(tables.run_folders([tmp_path / folder for folder in folders]), [], report.effective_arguments)
    report.draw_table(table, tmp_path, "")
    assert list(drawn["gain (points)"]) == ["CE + d2s"]  # no LA without a curriculum to compare with
    assert np.allclose(drawn["gain (points)"]["CE + d2s"], [[-2, 0, 0, 5, 20], [0, 0, 0, 15, 20]])


def test_of_several_rows_without_the_one_of_as_many_images_is_compared(tmp_path, monkeypatch):
    """Not the first by name, which here trained twice as long, and with one seed takes the errors away."""
    for name, images, curriculum, few, more in (
        ("long", 2000, "none", (45,), {"epochs": 60}),
        ("short", 1010, "none", (40, 42), {"epochs": 70}),
        ("decay", 1020, "none", (20, 22), {"epochs": 70, "weight_decay": 0.1}),  # further from d2s by a flag
        ("d2s", 1000, "d2s", (50, 52), {"epochs": 60}),
    ):
        for seed, value in enumerate(few):
            write_run(tmp_path / f"{name}{seed}", seed, 70, value, curriculum, per_class=[value] * 5, **more)
            path = tmp_path / f"{name}{seed}/results.json"
            files.write_json(path, files.read_json(path) | {"images": images})
    drawn = {}
    monkeypatch.setattr(
        report.figures, "draw_by_frequency", lambda lines, counts, styles, label, path: drawn.update({label: lines})
    )
    [table] = tables.read(tables.run_folders([tmp_path]), [], report.effective_arguments)
    text = render.markdown([table])
    report.draw_table(table, tmp_path, "")
    # 51 - 41; the standard error of the mean of 50 and 52 is 1, as that of 40 and 42; of their difference root 2.
    assert "few +10.0 ± 1.4 better" in text
    assert "nearest in images trained on is compared: CE + d2s with CE (--epochs 70)\n" in text
    assert np.allclose(drawn["gain (points)"]["CE + d2s"], [[9] * 5, [11] * 5])


def test_what_stands_below_a_figure_by_frequency_does_not_overlap(tmp_path, monkeypatch, drawn):
    """Ten ranges of three digits each, the axis's label below them, and the legend below that."""
    kept = []
    monkeypatch.setattr(report.figures, "save_figure", lambda figure, path: kept.append(figure))
    report.figures.draw_by_frequency(
        {"a": np.ones((1, 40))}, np.arange(999, 199, -20), {"a": {}}, "", tmp_path / "x.png"
    )
    [figure] = kept
    figure.canvas.draw()
    [axis] = figure.axes
    words = [label.get_window_extent() for label in axis.get_xticklabels()]
    assert len(words) == 10 and all(left.x1 < right.x0 for left, right in zip(words, words[1:], strict=False))
    assert figure.legends[0].get_window_extent().y1 < axis.xaxis.label.get_window_extent().y0 < min(w.y0 for w in words)


def test_classes_are_grouped_by_their_training_images(tmp_path, monkeypatch):
    plotted = []
    axis = SimpleNamespace(plot=lambda x, y, **_: plotted.append(list(y)))
    for name in ("set_xticks", "tick_params", "set", "axhline", "grid", "legend"):
        setattr(axis, name, lambda *_, **__: None)
    monkeypatch.setattr(report.figures, "new_figure", lambda **_: (None, axis))
    for name in ("save_figure", "add_legend"):
        monkeypatch.setattr(report.figures, name, lambda *_: None)
    counts = np.array([1, 2] * 10)  # the ten classes of two images come first, two of them in each group
    values = np.where(counts == 2, 80.0, 10.0)
    values[1] = np.nan
    report.figures.draw_by_frequency({"a": values[None]}, counts, {"a": {}}, "", tmp_path / "x.png")
    assert plotted == [[80.0] * 5 + [10.0] * 5]


def test_rows_look_alike_in_no_figure():
    looks = report.figures.style_of([f"row {k}" for k in range(28)])
    assert len({tuple(look.values()) for look in looks.values()}) == 28
    assert looks["row 7"] == looks["row 0"] | {"linestyle": "--"}  # seven colours, then another dash


def test_a_covered_line_is_wider_than_the_one_upon_it():
    # a, c and d have the same mean; b lies elsewhere.
    lines = {"a": [[1, 3], [3, 1]], "b": [[2, 3], [2, 3]], "c": [[2, 2]], "d": [[2, 2]]}
    widths = report.figures.nested_widths({name: np.array(values, float) for name, values in lines.items()})
    assert widths == {"a": 6, "b": 2, "c": 4, "d": 2}


def test_equal_lines_are_one_under_all_their_names():
    lines = {"a": np.array([[1, 2]]), "b": np.array([[1, 3]]), "c": np.array([[1, 2]]), "d": np.array([[1, 2], [1, 2]])}
    assert {name: line.tolist() for name, line in curves.join_equal(lines).items()} == {
        "a; c": [[1, 2]], "b": [[1, 3]], "d": [[1, 2], [1, 2]],
    }  # fmt: skip


def test_a_band_is_one_standard_deviation_over_seeds():
    # 10, 12, 14: mean 12, standard deviation 2; 0, 0, 3: mean 1, standard deviation root 3.
    low, mean, high = report.figures.bands(np.array([[10.0, 0], [12, 0], [14, 3]]))
    assert np.allclose(mean, [12, 1]) and np.allclose(low, [10, 1 - 3**0.5]) and np.allclose(high, [14, 1 + 3**0.5])
    assert [line.tolist() for line in report.figures.bands(np.array([[5.0, 6]]))] == [[5, 6]] * 3
    # Smoothed first: means of up to two epochs are 1, 2, 4 and 3, 4, 6; the mean of both is 2, 3, 5.
    smooth = report.figures.smooth(np.array([[1.0, 3, 5], [3, 5, 7]]), 2)
    assert smooth.tolist() == [[1, 2, 4], [3, 4, 6]]
    assert np.allclose(report.figures.bands(smooth)[2], np.array([2, 3, 5]) + 2**0.5)


def test_the_first_paragraph_says_which_row_leads_and_over_what_noise(tmp_path):
    def write(name, curriculum, few, overall, **extra):
        return [write_run(tmp_path / f"{name}{s}", s, overall, f, curriculum, **extra) for s, f in enumerate(few)]

    # Standard errors: of 40, 42, 44 (sd 2) and of 50, 52, 54 both 2 / root 3; of their difference 1.63.
    folders = write("a", "none", (40, 42, 44), 70) + write("b", "d2s", (50, 52, 54), 71)
    folders += write("c", "all", (49, 51, 53), 72)
    [table] = tables.read(tables.run_folders([tmp_path]), [], report.effective_arguments)
    said = render.findings(table)
    assert said.startswith(
        "digits IR30, ResNet-8. Highest in few-shot accuracy: CE + d2s, 52.0 % (3 seeds), 1.0 ± 1.6 above CE + all "
        "levels (3 seeds), within the noise. Highest in accuracy over all classes: CE + all levels, 72.0 % (3 seeds), "
        "1.0 ± 0.0 above CE + d2s (3 seeds), a clear lead. Of 2 rows with a curriculum, CUDA or additions, in few-shot "
        "accuracy against the same loss without: 2 clearly better, 0 clearly worse; the most: CE + d2s, +10.0 ± 1.6."
    )
    assert report.main(["--runs", *folders, "--out", str(tmp_path / "out")]) == 0
    assert f"</h1>\n<p>{said}</p>" in (tmp_path / "out/report.html").read_text()
    one = tables.read(tables.run_folders([tmp_path / "a0", tmp_path / "b0"]), [], report.effective_arguments)
    assert "10.0 above CE (1 seed); with one seed a row it cannot be told from noise." in render.findings(one[0])
    assert "The most in few-shot accuracy against the same loss without: CE + d2s, +10.0, of one seed." in (
        render.findings(one[0])
    )
    some = [*sorted(tmp_path.glob("[ab][0-9]")), tmp_path / "c0"]
    some = render.findings(tables.read(tables.run_folders(some), [], report.effective_arguments)[0])
    assert "Of 1 row with a curriculum, CUDA or additions, in" in some
    assert "the most: CE + d2s, +10.0 ± 1.6. 1 row with one seed not counted." in some
    alone = tables.read(tables.run_folders([tmp_path / "b0"]), [], report.effective_arguments)
    assert render.findings(alone[0]) == (
        "digits IR30, ResNet-8. CE + d2s has 50.0 % few-shot accuracy (1 seed). CE + d2s has 71.0 % accuracy over all "
        "classes (1 seed)."
    )


def test_two_rows_may_lead_together(tmp_path):
    """As two whose worst group has 0 %."""
    folders = [write_run(tmp_path / name, 0, 70, 0, name) for name in ("none", "d2s")]
    [table] = tables.read(tables.run_folders(map(Path, folders)), [], report.effective_arguments)
    assert "Highest in few-shot accuracy: CE, 0.0 % (1 seed), and CE + d2s (1 seed)." in render.findings(table)


def test_the_spectrum_sheet_and_the_acceptance_map_are_drawn(road, tmp_path, drawn):
    assert report.main(["--spectrum", str(road.spectrum), "--out", str(tmp_path)]) == 0
    for name in ("spectrum.png", "acceptance.png"):
        image = Image.open(tmp_path / name).convert("RGB")
        assert min(image.size) > 150 and len(set(image.resize((64, 64)).get_flattened_data())) > 20
    assert len(Page((tmp_path / "report.html").read_text()).pictures) == 2


def test_a_class_is_named_beside_its_row_though_its_first_image_is_missing(road, tmp_path, monkeypatch):
    rows = report.spectrum_folder.read_rows(road.spectrum)
    lowest = min(row["level"] for row in rows)
    monkeypatch.setattr(
        report.spectrum_folder, "read_rows", lambda folder: [row for row in rows if row["level"] != lowest]
    )
    figures_drawn = []
    monkeypatch.setattr(report.figures, "save_figure", lambda figure, path: figures_drawn.append(figure))
    report.draw_spectrum(road.spectrum, None, tmp_path / "spectrum.png")
    first = [axis for axis in figures_drawn[0].axes if axis.get_subplotspec().is_first_col()]
    assert first and not any(axis.images for axis in first)
    assert all(axis.get_ylabel() and axis.axison for axis in first)


def test_the_acceptance_of_thousands_of_classes_is_drawn_by_group(tmp_path, monkeypatch):
    """A row for each would be taller than an image can be."""
    rows = [{"file_name": f"shard-00000/{n}.png", "source": str(n), "label": n, "class_name": f"species {n}",
             "level": n % 2, "seed": 0} for n in range(8000)]  # fmt: skip
    scores = {row["file_name"]: {"kept": row["label"] % 4 == 0} for row in rows[:-1]}  # the last has no score
    monkeypatch.setattr(report.spectrum_folder, "read_rows", lambda folder: rows)
    monkeypatch.setattr(report, "read_scores", lambda path: scores)
    files.write_json(
        tmp_path / "scores.json", {"groups": {str(n): "few" if n < 100 else "medium" for n in range(8000)}}
    )
    drawn = {}
    monkeypatch.setattr(report.figures, "draw_acceptance", lambda *args: drawn.update(table=args))
    report.draw_acceptance(tmp_path, tmp_path / "acceptance.png")
    names, levels, made, kept, _ = drawn["table"]
    assert names == ["all medium-shot", "all few-shot", "all"] and levels == [0, 1]
    assert made.tolist() == [[3950, 3950], [50, 50], [4000, 4000]]
    assert kept.tolist() == [[1975, 0], [25, 0], [2000, 0]]


NAMES = ["a $ and $ b", r"\frac{1}{2}$", "狐狸", "キツネ", "x_{1}^2", "&<b>", "\u202eright to left", ""]


def test_class_names_are_drawn_as_they_are(tmp_path, capsys, drawn):
    """Two `$` are no formula; a character that no installed font has is said in one line."""
    made = np.full((len(NAMES), 2), 4)
    report.figures.draw_acceptance(NAMES, [0, 50], made, made - 1, tmp_path / "a.png")
    report.figures.draw_confusion(np.ones((3, len(NAMES)), int), np.arange(3), NAMES, tmp_path / "b.png")
    assert min(Image.open(tmp_path / "a.png").size) > 100 and (tmp_path / "b.png").is_file()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: a.png: no installed")]
    from matplotlib import font_manager

    has_wide = {font.name for font in font_manager.fontManager.ttflist} & set(report.figures.WIDE_FONTS)
    assert len(said) <= 1 and (has_wide or "狐" in said[0])


def test_letters_beyond_ascii_are_drawn_on_a_sheet_as_they_are():
    """Not as one box for all of them."""
    tile = np.zeros((8, 8, 3), np.uint8)
    drawn = {report.figures.sheet([tile], [("real", letter)]).tobytes() for letter in "ÄÖüéñßλж"}
    assert len(drawn) == 8


def test_a_figure_that_fails_is_a_warning_after_the_tables(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such font\nat all")

    monkeypatch.setattr(report.figures, "draw_curriculum", fail)
    assert report.main(["--runs", write_run(tmp_path / "a", 0, 70, 40, "d2s"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "warning: curriculum.png: not drawn: no such font (" in said
    assert "| CE + d2s |" in (tmp_path / "out/table.md").read_text() and (tmp_path / "out/report.html").is_file()
    assert (tmp_path / "out/groups.png").is_file()  # the others are drawn


# ---------------------------------------------------------------------------------------------------------------------
# camera traps


def write_clip_run(folder, seed, curriculum, ood, with_we, untuned=11.0, **extra):
    args = {
        "dataset": "iwildcam", "imb_ratio": None, "clip": "ViT-B-16:openai", "loss": "flyp", "curriculum": curriculum,
        "merge_same_class": False, "lr": 1e-5, "seed": seed, "levels": [50, 70, 90, 100], **extra,
    }  # fmt: skip
    both = {"ood_f1": ood, "id_f1": 50.0, "ood_acc": 70.0, "id_acc": 75.0}
    results = {
        "last": both | {"epoch": 19},
        "best_by_val": both | {"epoch": 18, "val_id_f1": 51.0},
        "last_wise_ft": both | {"ood_f1": with_we, "alpha": 0.6},
        "zero_shot": both | {"ood_f1": untuned, "id_f1": 8.0},
    }
    files.write_json(folder / "args.json", {"args": args})
    files.write_json(folder / "results.json", results)
    record = {"levels": [100], "val_id_f1": 40.0, "val_ood_f1": 30.0, "synthetic_share": 0.0}
    (folder / "history.jsonl").write_text("".join(json.dumps({"epoch": e, **record}) + "\n" for e in range(2)))
    return str(folder)


def test_the_table_of_camera_traps_has_both_domains_and_what_the_paper_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.read_all, "__defaults__", (recipes.FOLDER / "iwildcam",))
    folders = [write_clip_run(tmp_path / f"a{s}", s, "adaptive", 38.0 + s, 39.0) for s in range(3)]
    folders += [write_clip_run(tmp_path / f"n{s}", s, "none", 35.0, 36.0) for s in range(3)]
    assert report.main(["--runs", *folders, "--out", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    assert lines[0].startswith("| test, % | OOD macro-F1 | ID macro-F1 | OOD macro-F1 with WE | ID macro-F1 with WE |")
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines[2:] if line.startswith("| ")}
    assert list(cells) == ["zero-shot", "FLYP", "FLYP + adaptive"]
    # Mean of 38, 39, 40 is 39, standard deviation 1; DisCL reports 38.2 and 54.3, with WE 38.7 and 54.6.
    assert cells["FLYP + adaptive"][1:5] == ["39.0 (1.0)", "50.0 (0.0)", "39.0 (0.0)", "50.0 (0.0)"]
    assert "OOD macro-F1 38.2, ID macro-F1 54.3" in cells["FLYP + adaptive"][-2]
    # Standard error 1 / root 3 = 0.58: +0.8 is less than two of it.
    assert cells["FLYP + adaptive"][-1].startswith("OOD macro-F1 +0.8 ± 0.6, ID macro-F1 −4.3 ± 0.0 worse")
    # An untuned CLIP has no seeds: no deviation, and no error of 0 beside which any rounding would be "better".
    assert cells["zero-shot"][1:3] == ["11.0", "8.0"] and cells["zero-shot"][7] == "–"
    assert cells["zero-shot"][-2:] == ["OOD macro-F1 11, ID macro-F1 8.7", "OOD macro-F1 +0.0, ID macro-F1 −0.7 |"]
    text = (tmp_path / "out/table.md").read_text()
    assert "Missing rows: LP-FT" in text and "zero-shot was not run" not in text
    rows = {(row["row"], row["epoch"], row["figure"]): row for row in read_csv(tmp_path / "out/table.csv")}
    assert rows["FLYP + adaptive", "last", "OOD macro-F1"]["source"].startswith("DisCL")
    assert rows["FLYP", "best_by_val", "OOD accuracy"]["mean"] == "70.00"


def test_a_tuned_clip_is_compared_with_the_untuned_one_by_its_own_error_alone(tmp_path):
    for seeds in (1, 3):
        folders = [write_clip_run(tmp_path / f"{seeds}/{s}", s, "none", 35.0 + s, 36.0, 33.0) for s in range(seeds)]
        [table] = tables.read(tables.run_folders([Path(folder) for folder in folders]), [], report.effective_arguments)
        # Of 35, 36, 37 the mean is 36, the standard deviation 1, the error 1 / root 3.
        said = {
            1: "2.0 above zero-shot (untuned); with one seed",
            3: "3.0 ± 0.6 above zero-shot (untuned), a clear lead",
        }
        assert said[seeds] in render.findings(table)


def test_a_few_shot_clip_has_no_columns_of_camera_traps(tmp_path):
    args = {
        "dataset": "pets", "imb_ratio": None, "shots": 16, "images": "real", "model": "clip", "clip": "ViT-B-16:openai",
        "tune": "lora", "lr": 1e-4, "seed": 0, "curriculum": "none",
    }  # fmt: skip
    files.write_json(tmp_path / "run/args.json", {"args": args})
    files.write_json(
        tmp_path / "run/results.json", {"last": {"overall": 90.0}, "last_wise_ft": {"overall": 91.0, "alpha": 0.5}}
    )
    [table] = tables.read(tables.run_folders([tmp_path]), [], report.effective_arguments)
    assert table.figures == ["overall"]


def test_curves_of_many_rows_are_drawn_by_loss_each_beside_its_row_without(tmp_path):
    for loss, more in (("ce", {}), ("bs", {"prior": "real"}), ("bs", {"prior": "stage"}), ("focal", {})):
        for curriculum in ("none", "all", "d2s", "s2d"):
            if (loss, curriculum) != ("bs", "none") or more == {"prior": "real"}:  # the prior makes no row without
                folder = tmp_path / f"{loss}_{curriculum}_{more.get('prior')}"
                write_run(folder, 0, 70, 40, curriculum, loss=loss, **more)
    [table] = tables.read(tables.run_folders([tmp_path]), [], report.effective_arguments)
    parts = [[row.name for row in part] for part in curves.split_by_loss(list(table.rows.values()))]
    orders = "all levels", "d2s", "s2d"
    ce, bs, focal = ([name, *(f"{name} + {order}" for order in orders)] for name in ("CE", "BS", "focal"))
    assert parts == [[*ce, *bs], ["BS", *(f"BS (stage prior) + {order}" for order in orders), *focal]]
    few = list(table.rows.values())[: curves.MOST_ROWS]
    assert curves.split_by_loss(few) == [few]
    report.draw_table(table, tmp_path / "out", "")
    drawn = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"curriculum.png", "curriculum_2.png"} <= drawn and "curriculum_3.png" not in drawn
