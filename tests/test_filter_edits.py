"""filter_edits.py on made spectra: rules against plain computations, thresholds from folds, caches, refusals."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_blank
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import datasets
import filter_edits
import train_lt
from loaders.base import ASSETS, fold_of
from runtime import files
from runtime.cli import UserError
from spectrum import edit_rules
from spectrum import folder as spectrum_folder
from spectrum.units import Unit

CLIP = str(ASSETS / "tiny_clip")
pytestmark = pytest.mark.usefixtures("blank_figures")
DOMAINS = {
    "positive": "a photo of a three",
    "negatives": ["a photo of a seven"],
    "domains": [
        {"name": f"on {paper} paper", "prompt": f"a photo of a {{}} on {paper} paper", "instruction": "x"}
        for paper in ("white", "pink")
    ],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Edits that are real test images under other sources' names: every fifth is of another class than it says."""
    root = tmp_path_factory.mktemp("made")
    data, folder = datasets.load("biased_digits", None), root / "spectrum"
    (folder / "shard-00000").mkdir(parents=True)
    rows, truth = [], []
    for place in range(0, 300, 5):
        label = int(data.train.labels[place])
        shown = (label + 1) % 10 if place % 25 == 0 else label
        paper = (0, 2)[place % 2]
        test = np.flatnonzero((data.test.labels == shown) & (data.test.domains == paper))[place % 7]
        unit = Unit(data.train.sources[place], 10, 0)
        Image.fromarray(data.test.images[test]).save(folder / "shard-00000" / unit.file_name)
        name = data.class_names[label]
        rows.append({
            "file_name": unit.file_name, "source": unit.source, "source_sha256": data.train.sha256(place),
            "label": label, "class_name": name, "level": 10, "seed": 0, "redraws": 0,
            "prompt": f"a photo of a {name} on {('white', '', 'pink')[paper]} paper",
        })  # fmt: skip
        truth.append(shown == label)
    (folder / "shard-00000/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = {
        "dataset": "biased_digits",
        "imb_ratio": None,
        "data_seed": 0,
        "hard_classes": list(range(10)),
        "levels": [10],
    }
    files.write_json(folder / "plan.json", plan)
    prompts = {
        str(label): {
            "class_name": name, "score_prompt": f"a photo of a {name}",
            "prompts": [f"a photo of a {name} on {paper} paper" for paper in ("white", "pink")],
            "domains": ["on white paper", "on pink paper"],
        }
        for label, name in enumerate(data.class_names)
    }  # fmt: skip
    files.write_json(root / "prompts.json", prompts)
    files.write_json(root / "domains.json", DOMAINS)
    return root, rows, np.array(truth)


def run(root: Path, *flags, spectrum: Path | None = None) -> list[dict]:
    folder = spectrum or root / "spectrum"
    arguments = ["--dataset", "biased_digits", "--spectrum", str(folder), "--prompts", str(root / "prompts.json")]
    assert filter_edits.main([*arguments, *map(str, flags)]) == 0
    with (folder / "edits.csv").open() as file:
        return list(csv.DictReader(file))


def test_clip_drops_edits_of_another_class_and_keeps_the_rest(made, capsys, drawn):
    root, rows, truth = made
    found = run(root, "--rules", "class", "domain", "--clip", CLIP, "--domains", root / "domains.json")
    kept = np.array([row["kept"] == "1" for row in found])
    assert [row["file_name"] for row in found] == [f"shard-00000/{row['file_name']}" for row in rows]
    assert kept[truth].mean() > 0.85 and kept[~truth].mean() < 0.15
    assert {row["reason"] for row in found} <= {"", "another class", "another domain"}
    assert [row["domain"] for row in found] == [row["prompt"].split(" ", 5)[-1] for row in rows]
    out = capsys.readouterr().out
    assert "class      would drop" in out and "of the real images" in out and "on pink paper" in out
    assert (root / "spectrum/edits_kept.png").is_file() and (root / "spectrum/edits_dropped.png").is_file()
    # What is kept is trained on, without a scores.csv and beside one.
    names = {row["file_name"] for row in found if row["kept"] == "1"}
    assert {row["file_name"] for row in spectrum_folder.kept_rows(root / "spectrum", [10])} == names
    # TensorBoard has the shares and the sheets.
    shown = EventAccumulator(str(root / "spectrum/edits/events")).Reload()
    scalars = {tag: shown.Scalars(tag)[-1].value for tag in shown.Tags()["scalars"]}
    assert scalars["kept/all"] == pytest.approx(100 * kept.mean())
    on_pink = [row["kept"] == "1" for row in found if row["domain"] == "on pink paper"]
    assert scalars["kept/on pink paper"] == pytest.approx(100 * np.mean(on_pink))
    dropped = sum(value for tag, value in scalars.items() if tag.startswith("dropped/"))
    assert dropped == pytest.approx(100 - scalars["kept/all"])
    assert shown.Tags()["images"] == ["edits/kept", "edits/dropped"]
    # Nothing is embedded a second time, by whichever rule.
    run(root, "--rules", "semantic", "--clip", CLIP, "--domains", root / "domains.json")
    assert "embedding" not in capsys.readouterr().err


def test_semantic_warns_where_real_images_fail_too(made, capsys):
    root = made[0]
    found = run(root, "--rules", "semantic", "--clip", CLIP, "--domains", root / "domains.json")
    assert {row["semantic"] for row in found} == {"a photo of a three", "a photo of a seven"}
    assert all((row["kept"] == "1") == (row["semantic"] == "a photo of a three") for row in found)
    assert "warning: semantic would drop real images too" in capsys.readouterr().out


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Two runs that each left a fold out, and a run on all images."""
    root = tmp_path_factory.mktemp("base")
    runs = {"all": ["--epochs", "4"]} | {f"fold{i}": ["--epochs", "2", "--leave-out", f"{i}/2"] for i in range(2)}
    with pytest.MonkeyPatch.context() as patch:
        draw_blank(patch)
        for name, flags in runs.items():
            arguments = ["--dataset", "biased_digits", "--curriculum-epochs", "0", *flags]
            assert train_lt.main([*arguments, "--out", str(root / name)]) == 0
    return root


@pytest.mark.slow
def test_thresholds_come_from_images_that_the_model_has_not_seen(made, base, capsys):
    root, rows, _ = made
    folds = [base / f"fold{i}" for i in range(2)]
    found = run(root, "--rules", "confidence", "--checkpoint", *folds)
    assert "thresholds from folds" in capsys.readouterr().out
    data = datasets.load("biased_digits", None)

    def probabilities(run_folder, images):
        import torch

        from models import build_classifier

        model = build_classifier("resnet8", 10).eval()
        model.load_state_dict(torch.load(run_folder / "checkpoint.pt", weights_only=True)["model"])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            return model(pixels).softmax(1).numpy()

    by_run = [probabilities(folder, data.train.images) for folder in folds]
    own = np.array([by_run[fold_of(name, 2)][i, data.train.labels[i]] for i, name in enumerate(data.train.sources)])
    thresholds = [own[data.train.labels == label].mean() for label in range(10)]
    noted = files.read_json(root / "spectrum/edits.json")["thresholds"]
    assert noted == pytest.approx(thresholds, abs=1e-5)
    for row, edit in zip(rows, found, strict=True):
        pixels = np.asarray(Image.open(root / "spectrum/shard-00000" / row["file_name"]))[None]
        chances = probabilities(folds[fold_of(row["source"], 2)], pixels)[0]
        assert edit["predicted"] == data.class_names[chances.argmax()]
        assert float(edit["confidence"]) == pytest.approx(chances.max(), abs=1e-5)
        sure = chances.max() >= thresholds[chances.argmax()]
        reason = (edit_rules.EASY if chances.argmax() == row["label"] else edit_rules.CORRUPTED) if sure else ""
        assert edit["reason"] == reason
    # A run on all images gives others, from val by itself and from train where asked for.
    run(root, "--rules", "confidence", "--checkpoint", base / "all")
    assert "thresholds from val" in capsys.readouterr().out
    run(root, "--rules", "confidence", "--checkpoint", base / "all", "--thresholds", "train")
    assert "thresholds from train" in capsys.readouterr().out


def test_clip_may_judge_the_class_and_some_dropped_are_given_back(made, base):
    root, _, truth = made
    flags = ["--rules", "confidence", "--checkpoint", base / "all", "--judge-class", "clip", "--clip", CLIP]
    found = run(root, *flags)
    corrupted = np.array([row["reason"] == edit_rules.CORRUPTED for row in found])
    assert corrupted[~truth].mean() > 0.85 and corrupted[truth].mean() < 0.15
    back = run(root, *flags, "--keep-dropped", 1)
    assert all(row["kept"] == "1" for row in back)


def test_what_cannot_be_judged_is_named(made, base, tmp_path):
    root = made[0]

    def refused(message, *flags, spectrum=None):
        with pytest.raises(UserError, match=message):
            run(root, *flags, spectrum=spectrum)

    refused("--rules semantic: expected --domains", "--rules", "semantic", "--clip", CLIP)
    refused("--checkpoint: expected with --rules confidence", "--rules", "confidence")
    refused("--judge-class clip: expected with --rules confidence", "--rules", "class", "--judge-class", "clip")
    refused(
        "--thresholds folds: 1 runs left out",
        "--rules",
        "confidence",
        "--checkpoint",
        base / "all",
        "--thresholds",
        "folds",
    )
    both = [base / "fold0", base / "all"]
    refused("--thresholds val: expected one --checkpoint, not 2", "--rules", "confidence", "--checkpoint", *both)
    with pytest.MonkeyPatch.context() as patch:  # before hours of CLIP's rules
        patch.setattr(filter_edits, "judge_by_clip", None)
        flags = ("--rules", "class", "confidence", "--clip", CLIP, "--checkpoint")
        refused("--thresholds val: expected one --checkpoint, not 2", *flags, *both)
    other = tmp_path / "other"
    shutil.copytree(base / "all", other)
    args = files.read_json(other / "args.json")
    args["args"]["dataset"] = "digits"
    files.write_json(other / "args.json", args)
    refused(
        "was trained with --dataset digits; expected biased_digits, whose classes",
        "--rules",
        "confidence",
        "--checkpoint",
        other,
    )
    args["args"]["dataset"] = "biased_digits"
    files.write_json(other / "args.json", args)
    results = files.read_json(other / "results.json")
    files.write_json(other / "results.json", results | {"class_names": ["cat", "dog", "cow", "pig"]})
    refused(
        "was trained on 4 classes, cat, dog, cow ...; expected the 10 of biased_digits, zero",
        *("--rules", "confidence", "--checkpoint", other),
    )
    empty = tmp_path / "domains.json"
    files.write_json(empty, DOMAINS | {"negatives": []})
    refused("--rules semantic needs a text positive", "--rules", "semantic", "--clip", CLIP, "--domains", empty)
    others = tmp_path / "others.json"
    files.write_json(others, DOMAINS | {"domains": [DOMAINS["domains"][0] | {"name": "at sea"}]})
    refused("none of its domains is one that .*prompts.json", "--rules", "domain", "--clip", CLIP, "--domains", others)
    files.write_json(others, DOMAINS | {"domains": DOMAINS["domains"][:1]})  # edits on pink paper cannot be judged
    refused(
        "of 60 edits are of no domain that both .*prompts.json",
        "--rules",
        "domain",
        "--clip",
        CLIP,
        "--domains",
        others,
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    refused("no plan.json", "--rules", "class", "--clip", CLIP, spectrum=bare)


@pytest.mark.slow
def test_training_adds_edits_to_all_real_images(made, tmp_path):
    root, rows, truth = made
    spectrum = tmp_path / "spectrum"
    shutil.copytree(root / "spectrum", spectrum)
    run(root, "--rules", "class", "--clip", CLIP, spectrum=spectrum)
    kept = [row for row in spectrum_folder.kept_rows(spectrum, [10])]
    train = ["--dataset", "biased_digits", "--epochs", "2", "--curriculum-epochs", "2", "--batch-size", "64"]
    edits = ["--curriculum", "all", "--spectrum", str(spectrum)]

    def figures(name, *flags):
        out = tmp_path / name
        assert train_lt.main([*train, *map(str, flags), "--out", str(out)]) == 0
        return files.read_json(out / "results.json"), files.read_json_lines(out / "history.jsonl")

    # All real images stay, and each source's edit is added once.
    results, history = figures("all", *edits, "--add", "all", "--class-weights", "inverse")
    assert [record["images"] for record in history] == [300 + len(kept)] * 2
    assert all(record[f"val_{name}"] is not None for record in history for name in ("id", "worst_group"))
    assert history[0]["val_ood"] is None  # every image of val is on its class's own paper
    assert history[0]["synthetic_share"] == pytest.approx(len(kept) / (300 + len(kept)))
    last = results["last"]
    assert last["id"] > 0 and {"ood", "balanced", "worst_group", "per_group", "macro_f1"} <= last.keys()
    seen = np.array([[label % 4 == paper for paper in range(4)] for label in range(10)])
    groups = np.array(last["per_group"])
    assert last["id"] == pytest.approx(groups[seen].mean()) and last["ood"] == pytest.approx(groups[~seen].mean())
    assert last["overall"] == pytest.approx(groups.mean()) == pytest.approx(last["balanced"])
    assert last["worst_group"] == groups.min()
    # N of them, by class; epochs of one length whatever is added; extra real images.
    once = ["--epochs", 1, "--curriculum-epochs", 1]
    for name, flags, images in (
        ("n", [*edits, "--add", 20], 320),
        ("like", [*edits, "--add", "like:extra"], 300 + 250),
        ("steps", [*edits, "--add", "all", "--epoch-images", 400], 400),
        ("real", ["--epoch-images", 400], 400),
        ("extra", ["--extra-real"], 550),
    ):
        assert figures(name, *flags, *once)[1][0]["images"] == images, name


def test_training_applies_some_of_the_rules(made, tmp_path):
    root, rows, _ = made
    spectrum = tmp_path / "spectrum"
    shutil.copytree(root / "spectrum", spectrum)
    flags = ("--rules", "semantic", "class", "--keep-dropped", 0.5, "--clip", CLIP, "--domains", root / "domains.json")
    found = {row["file_name"]: row for row in run(root, *flags, spectrum=spectrum)}
    # What one rule drops does not depend on the other, nor on what is given back.
    for rule, kept in (
        ("semantic", {name for name, row in found.items() if row["semantic"] == "a photo of a three"}),
        ("class", {name for name, row in found.items() if row["clip_class"] == class_of(rows, name)}),
    ):
        assert {row["file_name"] for row in spectrum_folder.kept_rows(spectrum, [10], rules=[rule])} == kept
        assert 0 < len(kept) < len(rows)
    both = {row["file_name"] for row in spectrum_folder.kept_rows(spectrum, [10])}
    assert both == {name for name, row in found.items() if row["kept"] == "1"}
    assert len(spectrum_folder.kept_rows(spectrum, [10], rules=["none"])) == len(rows)
    with pytest.raises(
        UserError, match="--edit-rules domain: .*edits.csv was made by semantic class; run filter_edits"
    ):
        spectrum_folder.kept_rows(spectrum, [10], rules=["domain"])
    # A run says which rules it took, and what its images are.
    train = ["--dataset", "biased_digits", "--epochs", "1", "--curriculum-epochs", "1", "--curriculum", "all"]
    train += ["--spectrum", str(spectrum), "--add", "all", "--edit-rules", "class"]
    assert train_lt.main([*train, "--out", str(tmp_path / "run")]) == 0
    args = files.read_json(tmp_path / "run/args.json")["args"]
    assert (args["edit_rules"], args["edits"]) == (["class"], "user")
    [record] = files.read_json_lines(tmp_path / "run/history.jsonl")
    assert record["images"] == 300 + sum(row["clip_class"] == class_of(rows, name) for name, row in found.items())
    with pytest.raises(UserError, match="--edits domains: .*spectrum is user; expected --edits user"):
        train_lt.main([*train, "--edits", "domains", "--out", str(tmp_path / "other")])


def class_of(rows, name) -> str:
    return next(row["class_name"] for row in rows if name.endswith(row["file_name"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--edits", "user"], "--edits: expected with --add only"),
        (["--edit-rules", "class"], "--edit-rules: --curriculum none takes no edit"),
        (["--edit-rules", "none", "class", "--curriculum", "all"], "--edit-rules: expected none alone, or rules"),
        (["--add", "all"], "--add all: --curriculum none names no level"),
        (["--add", "-3", "--curriculum", "all"], "--add -3: expected all, a number"),
        (["--add", "like:/nowhere.csv", "--curriculum", "all"], "/nowhere.csv: no such file"),
        (["--add-once"], "--add-once: expected with --add only"),
        (["--leave-out", "0/3", "--curriculum", "all"], "--leave-out: expected --curriculum none"),
        (["--class-weights", "inverse", "--loss", "bs"], "--class-weights inverse: expected --loss ce"),
        (["--dataset", "digits", "--extra-real"], "--extra-real: digits has no extra real images"),
    ],
)
def test_bad_additions_are_named(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train_lt.main(["--dataset", "biased_digits", "--out", str(tmp_path / "run"), *flags])


def test_inverse_weights_by_hand():
    import torch

    from training import losses

    found = losses.inverse_weights(torch.tensor([4, 2, 0, 1]))
    assert found.tolist() == [0.25, 0.5, 0.0, 1.0]


def test_a_plain_resize_keeps_the_whole_image(tmp_path):
    from training import stores

    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :30, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    rng = np.random.default_rng(0)
    found = [stores.decode(tmp_path / "a.png", 20, draws, stores.WHOLE) for draws in (None, rng)]
    assert (found[0] == found[1]).all() and found[0][:, :8, 0].min() == 255 and found[0][:, 12:, 0].max() == 0


def test_a_class_that_loses_all_its_edits_is_named(made, capsys):
    root = made[0]
    content = json.loads((root / "prompts.json").read_text())
    content["3"]["score_prompt"] = "a photo of a seven"  # no three is nearest to this
    files.write_json(root / "wrong.json", content)
    arguments = [
        "--dataset",
        "biased_digits",
        "--spectrum",
        str(root / "spectrum"),
        "--prompts",
        str(root / "wrong.json"),
    ]
    assert filter_edits.main([*arguments, "--rules", "class", "--clip", CLIP]) == 0
    assert "class three: all of its edits were dropped; it is trained on real images alone" in capsys.readouterr().out
