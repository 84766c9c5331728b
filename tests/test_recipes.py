"""Recipes: their form, what they say of themselves, and that each starts, on stand-in data in its layout."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shlex
import signal

import numpy as np
import pytest
import tiny_editors
import torch
from conftest import ROOT
from PIL import Image

import datasets
import find_hard
import models
import report
import train_lt
from reporting import names, recipes, tables
from runtime import checkpoints, cli, runs
from runtime.cli import UserError
from spectrum import edit_rules
from training import loop

ALL = sorted((ROOT / "recipes").rglob("*.args"))
WITH_COMMAND = [path for path in ALL if "\n# expected: " in path.read_text(encoding="utf-8")]
# What makes a recipe cheap, appended to its command.
CHEAP = {
    "find_hard": "",
    "tune_generator": f"--generator {ROOT}/assets/tiny_sd --resolution 16 --crops 1 --epochs 2 --batch-size 4 --rank 2 "
    "--warmup-steps 0 --samples 0 --dtype float32",
    "write_prompts": "--count 2",
    "generate_spectrum": f"--generator {ROOT}/assets/tiny_sd --steps 10 --seeds 1 --size 16x16 --dtype float32",
    "filter_clipscore": f"--clip {ROOT}/assets/tiny_clip --threshold -1",
    "filter_edits": f"--clip {ROOT}/assets/tiny_clip --workers 0",
    "train_lt": "--model resnet8 --no-pretrained --batch-size 4 --image-size 32 --workers 0 "
    "--real-pass-images 8 --progress-images 2",
    "train_iwildcam": f"--clip {ROOT}/assets/toycam_clip --batch-size 4 --workers 0 --precision fp32 --device cpu "
    "--real-pass-images 8 --progress-images 2",
}


def name_of(path) -> str:
    return str(path.relative_to(ROOT / "recipes"))


def command_of(path) -> tuple[str, list[str]]:
    """The script and the arguments of a recipe's own command, its @file where it lies."""
    _, script, *words = shlex.split(recipes.read(path).command)
    assert f"@recipes/{name_of(path)}" in words
    return script.removesuffix(".py"), [word.replace("@recipes", f"@{ROOT}/recipes") for word in words]


@functools.cache
def parse(path):
    script, words = command_of(path)
    with cli.paths_unchecked(True):
        return importlib.import_module(script).build_parser().parse_args(words)


# ---------------------------------------------------------------------------------------------------------------------
# form


@pytest.mark.parametrize("path", WITH_COMMAND, ids=name_of)
def test_a_recipe_says_what_it_is(path):
    recipe, args = recipes.read(path), parse(path)
    text = path.read_text(encoding="utf-8")
    assert all(len(line) <= 150 for line in text.splitlines())
    for needed in re.findall(r"recipes/\S+\.args", text.splitlines()[4]):
        assert (ROOT / needed).is_file(), needed
    assert "(estimate)" in text.splitlines()[3] or "CPU" in text.splitlines()[3]
    if not recipe.script.startswith("train_"):
        return
    assert recipe.title == f"{names.table_name(vars(args))}: {names.row_name(vars(args))}"
    assert recipe.expected or recipe.source.startswith("not published")
    assert args.out is None, "seeds would share a folder"


def test_no_two_recipes_share_a_run_folder_or_a_row():
    trained = [parse(path) for path in WITH_COMMAND if command_of(path)[0].startswith("train_")]
    scripts = [command_of(path)[0] for path in WITH_COMMAND if command_of(path)[0].startswith("train_")]
    pairs = zip(scripts, trained, strict=True)
    folders = [str(importlib.import_module(script).run_folder(args)) for script, args in pairs]
    assert len(folders) > 100 and len(set(folders)) == len(folders)
    named = [(names.table_name(vars(args)), names.row_name(vars(args))) for args in trained]
    assert len(set(named)) == len(named)


TRAINED = [path for path in WITH_COMMAND if "\n# python train_" in path.read_text(encoding="utf-8")]
UNSTATED = {"memory_format", "spectrum"}  # speed; a place


@pytest.mark.parametrize("path", TRAINED, ids=name_of)
def test_a_recipe_states_every_number_that_the_data_set_has_a_default_for(path):
    """So that no published row changes by an edit elsewhere."""
    script, _ = command_of(path)
    words = [word for word, _ in cli.expand_files([f"@{path}"])]
    stated = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    args = parse(path)
    shipped = datasets.DEFAULTS[args.dataset]
    needed = set(shipped.get("data", {}) | shipped[script]) | {"epochs", "optimizer", "lr", "schedule", "precision"}
    if args.curriculum == "none":
        needed -= tables.OF_CURRICULUM | {"progress_images", "real_pass_images"}
    assert needed - stated - UNSTATED == set()


@pytest.mark.parametrize(
    ("recipe", "own"),
    [
        ("imagenet_lt/r10_ce_d2s", {"curriculum", "levels", "init_checkpoint", "spectrum"}),
        ("inat2018/r10_ce_d2s", {"curriculum", "levels", "init_checkpoint", "spectrum"}),
        ("cifar100_lt/ir100_r32_ce", {"levels", "spectrum"}),
        ("iwildcam/b16_flyp", {"levels", "spectrum"}),
    ],
)
def test_the_numbers_of_a_recipe_are_the_data_sets_defaults(recipe, own):
    """What differs is named here; of the rest a recipe and a command without it are the same run."""
    path = ROOT / f"recipes/{recipe}.args"
    script, words = command_of(path)
    stated = report.effective_arguments(script, words)
    default = report.effective_arguments(script, ["--dataset", parse(path).dataset])
    assert {flag for flag in stated if stated[flag] != default[flag]} == own


def test_the_papers_schedule_of_imagenet_lt_is_in_its_recipe():
    """DisCL v4, Table 9: 60 of 65 epochs on levels 0, 0.1, 0.3, 0.5 and 1.0, twelve each."""
    args = parse(ROOT / "recipes/imagenet_lt/r10_bs_d2s.args")
    assert (args.epochs, args.curriculum_epochs, args.levels) == (65, 60, [0, 10, 30, 50, 100])
    assert (args.optimizer, args.lr, args.weight_decay, args.batch_size) == ("adam", 1e-3, 1e-5, 128)
    assert parse(ROOT / "recipes/iwildcam/b16_flyp_adaptive.args").levels == [50, 70, 90, 100]


def test_published_figures_name_version_and_table():
    found, complaints = recipes.read_all(report.effective_arguments)
    assert complaints == [] and sum(bool(recipe.expected) for recipe in found) > 40
    sources = {recipe.source for recipe in found if recipe.expected} | {row.source for row in recipes.read_published()}
    assert [
        source for source in sources if source.startswith("DisCL") and not re.match(r"DisCL v[14], [Tt]able", source)
    ] == []
    by_name = {recipe.file: recipe.expected for recipe in found}
    for name, value in {
        "cifar100_lt/ir50_r10_ce_cuda": 33.13, "cifar100_lt/ir50_r10_bs_cuda": 36.21, "inat2018/r10_ce_cuda": 43.18,
        "inat2018/r10_bs_cuda": 50.23, "imagenet_lt/r34_ce": 42.98, "imagenet_lt/r34_ce_d2s": 44.26,
        "imagenet_lt/r34_bs_cuda": 47.33, "imagenet_lt/r34_bs_d2s": 48.42,
    }.items():  # fmt: skip
        assert by_name[f"recipes/{name}.args"]["overall"] == value
    titles = {names.table_name(recipe.args) for recipe in found}
    assert {row.table for row in recipes.read_published()} <= titles
    # Table 5 of v4: what the filter kept at ratio 100 and 50.
    texts = [(ROOT / f"recipes/cifar100_lt/ir{ratio}_filter.args").read_text() for ratio in (100, 50)]
    assert "809 of 2,592" in texts[0] and "668 of 2,144" in texts[1]


def test_recipes_start_from_the_runs_that_they_need():
    for path in WITH_COMMAND:
        script, _ = command_of(path)
        args = parse(path)
        if script != "train_lt" or not args.init_checkpoint:
            continue
        needs = path.read_text(encoding="utf-8").splitlines()[4]
        needed = parse(ROOT / re.search(r"recipes/\S+_ce\.args", needs)[0])
        assert args.init_checkpoint == train_lt.run_folder(needed) / "checkpoint.pt"
        assert (args.model, args.dataset) == (needed.model, needed.dataset) and not needed.init_checkpoint


@pytest.mark.parametrize("model", ["resnet10", "resnet32", "resnet34", "resnet50"])
def test_every_model_of_the_recipes_is_built(model):
    assert model in {getattr(parse(path), "model", None) for path in WITH_COMMAND}
    with torch.device("meta"):
        assert models.build_classifier(model, 10, 32)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_header_is_read():
    recipe = recipes.read(ROOT / "recipes/imagenet_lt/r10_bs_d2s.args", report.effective_arguments)
    assert recipe.expected == {"many": 52.68, "medium": 37.68, "few": 21.36, "overall": 41.33}
    assert recipe.source.startswith("DisCL") and recipe.script == "train_lt"
    assert (recipe.args["lr"], recipe.args["curriculum"], recipe.args["epochs"]) == (1e-3, "d2s", 65)


HEADER = "# A, B: C\n# python {}.py @recipes/{} --seed 0\n# expected: all 1 (X)\n# GPU-hours: 1\n# needs: none\n{}\n"


def test_a_users_own_recipe_that_cannot_be_read_is_named_and_stops_nothing(tmp_path):
    (tmp_path / "a.args").write_text("# a row\n# expected: nothing\n--dataset digits\n")
    (tmp_path / "b.args").write_text(HEADER.format("train_lt", "b.args", "--no-such-flag 1"))
    (tmp_path / "c.args").write_text(HEADER.format("train_mine", "c.args", ""))
    (tmp_path / "d.args").write_bytes(b"# \xff\n# expected: all 1\n")
    (tmp_path / "e.args").write_text("# no header at all\n")
    (tmp_path / "f.args").write_text(HEADER.format("train_lt", "f.args", "--dataset digits"))
    found, complaints = recipes.read_all(report.effective_arguments, tmp_path)
    assert [recipe.path.name for recipe in found] == ["f.args"] and len(complaints) == 4
    assert "a.args: expected a header of five lines" in complaints[0]
    assert "unrecognized arguments: --no-such-flag" in complaints[1]
    assert "train_mine.py; expected one of train_lt, train_iwildcam, train_fewshot" in complaints[2]
    assert "d.args: not UTF-8" in complaints[3]


# ---------------------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ("--few-belowx 7", "unrecognized arguments: --few-belowx 7, in {}/base.args"),
        ("--few-below 0", "argument --few-below: '0': expected a whole number of 1 or more, in {}/base.args"),
        ("--rule some", "argument --rule: invalid choice: 'some' (choose from "),
        ("@other.args", "{}/other.args: no such file, which {}/base.args includes"),
        ("@row.args", "{}/row.args: includes itself"),
        ('--out "x', "{}/base.args: No closing quotation"),
    ],
)
def test_what_is_wrong_in_a_recipe_names_the_file(tmp_path, capsys, inner, message):
    (tmp_path / "base.args").write_text(inner + "\n")
    (tmp_path / "row.args").write_text("@base.args\n--dataset digits\n")
    with pytest.raises(SystemExit) as caught:
        find_hard.build_parser().parse_args([f"@{tmp_path}/row.args"])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and len(said.splitlines()) == 1
    assert message.replace("{}", str(tmp_path)) in said
    assert "base.args" in said or "row.args" in said


def test_what_is_wrong_on_the_command_line_blames_no_recipe(tmp_path, capsys):
    (tmp_path / "row.args").write_text("--dataset digits --few-below 7\n")
    with pytest.raises(SystemExit):
        find_hard.build_parser().parse_args([f"@{tmp_path}/row.args", "--few-below", "none"])
    assert capsys.readouterr().err.endswith("'none': expected a whole number of 1 or more (see --help)\n")


def test_an_included_file_lies_beside_the_one_that_includes_it(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/base.args").write_text("--few-below 7 --rule few\n")
    (tmp_path / "a/b/row.args").write_text("@../base.args\n--few-below 8  # the later one holds\n")
    monkeypatch.chdir(tmp_path)
    args = find_hard.build_parser().parse_args(["@a/b/row.args"])
    assert (args.few_below, args.rule) == (8, "few")


def test_the_data_root_comes_from_the_flag_or_one_variable(tmp_path, monkeypatch):
    parser = find_hard.build_parser()
    words = ["--dataset", "cifar100_lt", "--imb-ratio", "100"]
    assert parser.parse_args(words).data_root is None
    with pytest.raises(UserError, match="expected --data-root, .* or \\$DISCL_DATA with a folder cifar100_lt"):
        find_hard.main(words)
    monkeypatch.setenv("DISCL_DATA", str(tmp_path))
    assert parser.parse_args(words).data_root == tmp_path / "cifar100_lt"
    assert parser.parse_args([*words, "--data-root", str(ROOT)]).data_root == ROOT
    assert parser.parse_args([]).data_root is None  # digits lies in scikit-learn
    with pytest.raises(UserError, match=f"--data-root {tmp_path}/cifar100_lt: no such folder"):
        find_hard.main(words)
    (tmp_path / "cifar100_lt.zip").write_bytes(b"PK")
    assert parser.parse_args(words).data_root == tmp_path / "cifar100_lt.zip"


# ---------------------------------------------------------------------------------------------------------------------
# every recipe starts


def write_cifar100(root):
    """CIFAR-100's folders with 100 training images a class, each class's the same one."""
    for label in range(100):
        for part, count in (("train", 100), ("test", 1)):
            folder = root / part / f"c{label:02d}"
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (label, 2 * label, 0)).save(folder / "0.png")
            for i in range(1, count):
                os.link(folder / "0.png", folder / f"{i}.png")


def write_large(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (i % 256, 7 * i % 256, 0)).save(root / name)


def write_imagenet_lt(root):
    """ImageNet-LT's lists with two classes: 24 and 6 training images."""
    wnids, counts = ["n01440764", "n01443537"], (24, 6)
    train = [(f"train/{w}/{w}_{i}.JPEG", k) for k, w in enumerate(wnids) for i in range(counts[k])]
    parts = {
        "train": train,
        "val": [(f"train/{w}/{w}_99.JPEG", k) for k, w in enumerate(wnids)],
        "test": [(f"val/ILSVRC2012_val_{k}.JPEG", k) for k in range(2)],
    }
    for part, pairs in parts.items():
        write_large(root, [name for name, _ in pairs])
        (root / f"ImageNet_LT_{part}.txt").write_text("".join(f"{name} {k}\n" for name, k in pairs))


def write_inat2018(root):
    """iNaturalist 2018's annotation files with two classes: 24 and 6 training images."""
    train = [(f"train_val2018/Aves/{k}/{i}.jpg", k) for k, count in enumerate((24, 6)) for i in range(count)]
    for part, pairs in (("train", train), ("val", [("train_val2018/Aves/0/99.jpg", 0)])):
        write_large(root, [name for name, _ in pairs])
        content = {
            "images": [{"id": i, "file_name": name} for i, (name, _) in enumerate(pairs)],
            "annotations": [{"image_id": i, "category_id": k} for i, (_, k) in enumerate(pairs)],
            "categories": [{"id": k, "name": f"bird {k}"} for k in range(2)],
        }
        (root / f"{part}2018.json").write_text(json.dumps(content))


def write_iwildcam(root):
    """iWildCam's metadata.csv with 24 training images of two classes, and two of each other split."""
    splits = {"train": 24, "val": 2, "test": 2, "id_val": 2, "id_test": 2}
    names = {f"{split}{i}.jpg": (split, i % 2 * 40, place) for place, split in enumerate(splits)
             for i in range(splits[split])}  # fmt: skip
    write_large(root / "train", list(names))
    rows = [f"{split},{label},{name},{place}" for name, (split, label, place) in names.items()]
    (root / "metadata.csv").write_text("\n".join(["split,y,filename,location_remapped", *rows]) + "\n")


def write_planes(root):
    """ALIA's planes_ext.csv with 12 training images and four of val and test."""
    splits = ["train"] * 12 + ["val"] * 4 + ["test"] * 4
    write_large(root / "images", [f"{i}.jpg" for i in range(20)])
    lines = [
        f"{split},{('Airbus', 'Boeing')[i % 2]},{('air', 'grass')[i % 2]},x/{i}.jpg" for i, split in enumerate(splits)
    ]
    (root / "planes_ext.csv").write_text("\n".join(["Split,Plane,Ground,Filename", *lines]) + "\n")


def write_iwildcam7(root):
    """ALIA's four lists with two classes."""
    for part, count in (("train", 12), ("train_extra", 4), ("val", 4), ("test", 4)):
        names = [f"{part}{i}.jpg" for i in range(count)]
        write_large(root / "train", names)
        rows = [f"{24 * (i % 2)},{name},{i % 3}" for i, name in enumerate(names)]
        (root / f"{part}_subset.csv").write_text("\n".join(["y,filename,location_remapped", *rows]) + "\n")


STAND_INS = {
    "cifar100_lt": write_cifar100,
    "imagenet_lt": write_imagenet_lt,
    "inat2018": write_inat2018,
    "iwildcam": write_iwildcam,
    "planes": write_planes,
    "iwildcam7": write_iwildcam7,
}


# Rows that differ in numbers alone: ALIA's on Planes, and those of CIFAR100-LT at ratio 100, stand for the others.
STARTED = {
    "iwildcam7": "hard|prompts|generate_spectrum|filter_spectrum|d2s",
    "cifar100_lt": "(?!ir10_|ir50_).*|ir.*(hard|prompts|generate|filter|_bs_d2s)",
}


@pytest.mark.parametrize("ratio", ["ir10", "ir50"])
def test_ratios_of_cifar_differ_in_numbers_alone(ratio):
    """So that those at ratio 100 may stand for them below."""

    def without_numbers(path) -> list[str]:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [re.sub(r"\d+(\.\d+)?", "N", line) for line in lines if not line.startswith("#")]

    folder = ROOT / "recipes/cifar100_lt"
    paths = [folder / f"{ratio}.args", *folder.glob(f"{ratio}_*.args")]
    assert len(paths) == 46
    for path in paths:
        assert without_numbers(path) == without_numbers(folder / path.name.replace(ratio, "ir100", 1)), path.name


def stop_in_the_second_step(monkeypatch) -> list[int]:
    """Every run is told to stop at the second step of its training; the list holds the steps so far."""
    steps, rate = [], loop.Trainer.rate

    def counting(self, epoch, purpose, number, batches):
        steps.extend([1] * (purpose == "epoch"))
        if len(steps) == 3:  # the rate is asked for once before the first step
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(self, epoch, purpose, number, batches)

    monkeypatch.setattr(loop.Trainer, "rate", counting)
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("dataset", STAND_INS)
def test_every_recipe_starts(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")  # whose domains.json is named from the root
    monkeypatch.setenv("DISCL_DATA", str(tmp_path / "data"))
    STAND_INS[dataset](tmp_path / "data" / dataset)
    # Nothing is dropped: every level of every row has an image.
    monkeypatch.setattr(edit_rules, "best_text", lambda similarities: np.zeros(len(similarities), int))
    monkeypatch.setattr(edit_rules, "confidence_rule", lambda found, *others: np.full(len(found), "", object))
    monkeypatch.setattr(datasets, "load", functools.cache(datasets.load))
    steps = stop_in_the_second_step(monkeypatch)
    paths = [path for path in WITH_COMMAND if path.parent.name == dataset]
    paths = [path for path in paths if re.fullmatch(STARTED.get(dataset, ".*"), path.stem)]
    order = list(CHEAP)
    for path in sorted(paths, key=lambda path: order.index(command_of(path)[0])):
        script, words = command_of(path)
        module, extra = importlib.import_module(script), shlex.split(CHEAP[script])
        with cli.paths_unchecked(True):
            args = module.build_parser().parse_args(words)
        if script == "generate_spectrum" and args.image_guidance:
            extra[1] = str(tiny_editors.save_pix2pix(tmp_path / "editor"))
        if script == "generate_spectrum" and args.per_class:
            extra[extra.index("--seeds")] = "--per-class"
        if script == "filter_edits" and args.checkpoint and not args.checkpoint[0].exists():
            base = next(
                ROOT / name
                for name in re.findall(r"recipes/\S+\.args", path.read_text())
                if "train_lt" in (ROOT / name).read_text()
            )
            short = "--epochs 1 --epoch-images 4 --curriculum-epochs 1".split()
            train = [f"@{base}", *shlex.split(CHEAP["train_lt"]), *short, "--out", str(args.checkpoint[0])]
            steps.clear()
            assert train_lt.main(train) == 0
        if script == "find_hard" and parse(path).clip:
            extra += ["--clip", f"{ROOT}/assets/toycam_clip", "--fraction", "0.5"]  # the tuned one is not there
        steps.clear()
        if script.startswith("train_"):
            if (
                getattr(args, "init_checkpoint", None) and not args.init_checkpoint.exists()
            ):  # a small model's stands in
                args.init_checkpoint.parent.mkdir(parents=True)
                small = models.build_classifier("resnet8", 1000 if dataset == "imagenet_lt" else 2)
                checkpoints.save_checkpoint(args.init_checkpoint, {"model": small.state_dict()})
            extra += ["--out", f"trained/{path.stem}"]
        code = module.main([*words, *extra])
        if script == "find_hard":  # a few of the hard images stand for all of them
            lines = args.out.read_text(encoding="utf-8").splitlines()
            args.out.write_text("\n".join(lines[:7]) + "\n", encoding="utf-8")
        if not script.startswith("train_"):
            assert code == 0, name_of(path)
            continue
        assert code == runs.RESUMABLE and len(steps) >= 2, name_of(path)
        saved = checkpoints.load_checkpoint(tmp_path / "trained" / path.stem / "checkpoint.pt", "cpu")
        stopped = saved["partial"]["pass"]
        assert stopped["batches"] >= 1 and np.isfinite(float(stopped["total"]))
