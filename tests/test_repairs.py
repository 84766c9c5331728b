"""Data that were mended: a run whose training images are the same resumes and says so; any other is refused."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from small_data import draw_cats_and_dogs, draw_toycam

import train_fewshot
import train_iwildcam
import train_lt
from loaders import toycam
from loaders.base import ImageSet
from runtime import files
from runtime.cli import UserError
from training import fewshot, loop
from training.pool import describe_splits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("blank_figures")]  # whole runs
SHORT = ["--epochs", "2", "--warmup-epochs", "0", "--batch-size", "6", "--workers", "0", "--device", "cpu"]
SMALL = ["--dataset", "imagefolder", "--model", "resnet8", "--image-size", "32", *SHORT]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of JPEGs of 64 pixels, in folders."""
    return draw_cats_and_dogs(tmp_path_factory.mktemp("images"), 6, 64, "jpg")


@pytest.fixture(scope="module")
def traps(tmp_path_factory):
    """Camera traps: nine images of each split."""
    root = draw_toycam(tmp_path_factory.mktemp("traps") / "traps", 9, 9)
    (root / "class_names.txt").write_text("\n".join(toycam.CLASSES), encoding="utf-8")
    return root


@pytest.fixture(params=["train_lt", "train_iwildcam", "train_fewshot"])
def run(request, images, traps, tmp_path, monkeypatch):
    """A copy of a trainer's data, a function that trains in a folder, and one of the data's test images."""
    root = shutil.copytree(traps if request.param == "train_iwildcam" else images, tmp_path / "data")
    flags = ["--data-root", str(root), *(["--images", "real"] if request.param == "train_fewshot" else [])]
    if request.param == "train_iwildcam":
        monkeypatch.setattr(train_iwildcam, "ALPHAS", [1.0])
        flags += ["--dataset", "cameratraps", "--clip", f"{ROOT}/assets/toycam_clip", "--precision", "fp32", *SHORT]
        image = root / "train" / [row["filename"] for row in listed(root) if row["split"] == "test"][2]
    else:
        flags += SMALL
        image = root / "test/dog/1.jpg"
    main = {"train_lt": train_lt, "train_iwildcam": train_iwildcam, "train_fewshot": train_fewshot}[request.param].main
    return root, lambda out: main([*flags, "--out", str(tmp_path / out)]), image


def listed(root) -> list[dict]:
    with (root / "metadata.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def take_out(root, image) -> None:
    """Remove an image and, where there is one, its row of metadata.csv."""
    image.unlink()
    if (root / "metadata.csv").is_file():
        rows = listed(root)
        files.write_csv(root / "metadata.csv", list(rows[0]), [row for row in rows if row["filename"] != image.name])


def cut(path) -> None:
    """Cut off the end of an image file: its header is whole."""
    path.write_bytes(path.read_bytes()[:-100])


def logits_of(folder) -> np.ndarray:
    with np.load(folder / "predictions.npz") as found:
        return found["ood_logits" if "ood_logits" in found.files else "logits"]


def never(*_, **__):
    raise AssertionError("trained again")


def test_a_run_resumes_without_the_test_image_that_ended_it(run, tmp_path, monkeypatch, capsys):
    root, train, image = run
    cut(image)
    with pytest.raises(UserError, match=f"{image.name}: not a readable image"):
        train("r")
    take_out(root, image)
    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "train", never)
        assert train("r") == 0
    before, after = (9, 8) if (root / "metadata.csv").is_file() else (6, 5)
    said = [line for line in capsys.readouterr().out.splitlines() if "resuming with other test data" in line]
    assert len(said) == 1 and f"splits.test was {before} images" in said[0] and f", is {after} images" in said[0]
    assert train("whole") == 0  # begun without it
    assert np.array_equal(logits_of(tmp_path / "r"), logits_of(tmp_path / "whole"))
    assert len(logits_of(tmp_path / "r")) == after
    recorded = [files.read_json(tmp_path / name / "args.json") for name in ("r", "whole")]
    assert all(recorded[0][name] == recorded[1][name] for name in ("inputs", "splits"))


def test_a_complete_run_is_not_that_of_other_test_images_but_can_be_tested_on_them(run, tmp_path, monkeypatch):
    root, train, image = run
    assert train("r") == 0
    take_out(root, image)
    monkeypatch.setattr(loop.Trainer, "train", never)
    results = tmp_path / "r/results.json"
    with pytest.raises(UserError, match=f"other settings: inputs.data is .*delete {results}") as found:
        train("r")
    assert "\n" not in str(found.value)
    tested = len(logits_of(tmp_path / "r"))
    results.unlink()
    assert train("r") == 0 and len(logits_of(tmp_path / "r")) == tested - 1


def stopped_at_its_tests(train, trainer, patch) -> None:
    """A run that is trained, but not tested."""

    def fail(*_):
        raise KeyboardInterrupt

    with patch.context() as inner:
        inner.setattr(trainer, "finish", fail)
        with pytest.raises(KeyboardInterrupt):
            train("r")


def test_a_run_of_other_training_images_is_refused(images, tmp_path, monkeypatch):
    """An image fewer to train on or to choose by, and a class renamed: its label may be another one then."""

    def train(out: str) -> int:
        return train_lt.main([*SMALL, "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / out)])

    shutil.copytree(images, tmp_path / "data")
    stopped_at_its_tests(train, train_lt.Trainer, monkeypatch)
    for part in ("train", "val"):
        image = tmp_path / "data" / part / "cat/1.jpg"
        content = image.read_bytes()
        image.unlink()
        with pytest.raises(UserError, match=rf"splits.{part} is '\d+ images \(.*\)' there, '\d+ images .* here"):
            train("r")
        image.write_bytes(content)
    for part in ("train", "val", "test"):
        (tmp_path / "data" / part / "cat").rename(tmp_path / "data" / part / "wolf")
    with pytest.raises(UserError, match="splits.train is '12 images"):
        train("r")
    for part in ("train", "val", "test"):
        (tmp_path / "data" / part / "wolf").rename(tmp_path / "data" / part / "cat")
    assert train("r") == 0


def test_a_folder_without_splits_is_compared_by_its_inputs(images, tmp_path, monkeypatch):
    """As runs of older versions left it."""

    def train(out: str) -> int:
        return train_lt.main([*SMALL, "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / out)])

    shutil.copytree(images, tmp_path / "data")
    stopped_at_its_tests(train, train_lt.Trainer, monkeypatch)
    path = tmp_path / "r/args.json"
    files.write_json(path, {name: value for name, value in files.read_json(path).items() if name != "splits"})
    image = tmp_path / "data/test/dog/1.jpg"
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(UserError, match="other settings: inputs.data is"):
        train("r")
    image.write_bytes(content)
    assert train("r") == 0 and train("r") == 0


def test_a_split_is_its_images_their_labels_domains_and_the_class_names():
    one = ImageSet(np.zeros((2, 1, 1, 3), np.uint8), np.array([0, 1]), ["a", "b"], np.array([0, 1]))
    others = [
        replace(one, labels=np.array([1, 1])),
        replace(one, sources=["a", "c"]),
        replace(one, sources=["b", "a"]),
        replace(one, domains=np.array([1, 1])),
        replace(one, domains=None),
        one.take(np.array([0])),
    ]
    described = [describe_splits({"train": some}, "cat", "dog")["train"] for some in (one, *others)]
    described += [describe_splits({"train": one}, "cat", "wolf")["train"]]
    assert len(set(described)) == 8 and described[0].startswith("2 images (digest ")
    assert describe_splits({"train": one}, "cat", "dog")["train"] == described[0]


def test_camera_traps_that_were_mended_stay_left_out_of_a_run_that_has_met_them(traps, tmp_path, monkeypatch, capsys):
    """As in a run that nobody interrupted; the user is told."""
    root = shutil.copytree(traps, tmp_path / "data")
    monkeypatch.setattr(train_iwildcam, "ALPHAS", [1.0])
    image = root / "train" / next(row["filename"] for row in listed(root) if row["split"] == "train")
    content = image.read_bytes()
    cut(image)
    flags = ["--dataset", "cameratraps", "--data-root", str(root), "--clip", f"{ROOT}/assets/toycam_clip"]
    flags += ["--precision", "fp32", *SHORT, "--out"]
    assert train_iwildcam.main([*flags, str(tmp_path / "whole")]) == 0
    stopped = train_iwildcam.epochs.checkpoints.save_checkpoint

    def stop_after(path, state):
        stopped(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_iwildcam.epochs.checkpoints, "save_checkpoint", stop_after)
        with pytest.raises(KeyboardInterrupt):
            train_iwildcam.main([*flags, str(tmp_path / "r")])
    image.write_bytes(content)
    assert train_iwildcam.main([*flags, str(tmp_path / "r")]) == 0
    assert "1 training images that could not be read in earlier epochs stay left out" in capsys.readouterr().out
    assert np.array_equal(logits_of(tmp_path / "r"), logits_of(tmp_path / "whole"))
    assert files.read_json(tmp_path / "r/results.json")["unreadable"] == [str(image)]


def test_few_shot_training_looks_at_every_image_first(images, tmp_path, monkeypatch):
    root = shutil.copytree(images, tmp_path / "data")
    for name in ("train/cat/0.jpg", "test/dog/1.jpg"):
        (root / name).write_bytes(b"")
    monkeypatch.setattr(fewshot.Trainer, "train", never)
    with pytest.raises(UserError, match="^2 images cannot be used: train: .*0.jpg .empty.; test: .*1.jpg .empty."):
        train_fewshot.main([*SMALL, "--images", "real", "--data-root", str(root), "--out", str(tmp_path / "r")])
