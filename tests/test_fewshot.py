"""Few-shot data: CoOp's splits, Aircraft's lists, ImageNet's folders, and the draw of K images a class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import check_data
import datasets
from loaders import fewshot
from runtime.cli import UserError

CLASSES = ["abbey", "airport terminal", "bakery"]


def draw(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (shade % 256, shade // 256, 99)).save(path)


@pytest.fixture
def pets(tmp_path):
    """A folder in CoOp's layout: three classes of six, two and three images in train, val and test."""
    rows = {}
    shade = 0
    for part, count in (("train", 6), ("val", 2), ("test", 3)):
        rows[part] = []
        for label, name in enumerate(CLASSES):
            for number in range(count):
                shade += 1
                draw(tmp_path / "images" / f"{label}_{part}_{number}.jpg", 40 * shade)
                rows[part].append([f"{label}_{part}_{number}.jpg", label, name])
    write_split(tmp_path, rows)
    return tmp_path


def write_split(root: Path, rows: dict) -> None:
    (root / "split_zhou_OxfordPets.json").write_text(json.dumps(rows))


def read_split(root: Path) -> dict:
    return json.loads((root / "split_zhou_OxfordPets.json").read_text())


def test_a_coop_split_is_read_as_it_says(pets):
    data = datasets.load("pets", None, pets)
    assert data.class_names == CLASSES
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 18, "val": 6, "test": 9}
    assert data.test.sources[0] == "images/0_test_0.jpg" and data.test.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.train.read(7)[0].size == (20, 16)
    assert datasets.TEMPLATES["pets"] == ["a pet photo of a {}"]


def test_shots_follow_from_seed_and_class_alone(pets):
    data = datasets.load("pets", None, pets)
    few = fewshot.draw_shots(data, 2, 0)
    assert np.bincount(few.train.labels).tolist() == [2, 2, 2]
    assert len(few.val) == 6 and len(few.test) == 9
    assert set(few.train.sources) < set(fewshot.draw_shots(data, 4, 0).train.sources)  # fewer are among more
    others = {fewshot.shots_digest(fewshot.draw_shots(data, 2, seed).train) for seed in range(6)}
    assert len(others) > 3
    # other classes, and the order on the disk, change nothing
    order = np.random.default_rng(0).permutation(18)
    shuffled = fewshot.DataSet("pets", CLASSES, data.train.take(order), data.val, data.test)
    assert sorted(fewshot.draw_shots(shuffled, 2, 0).train.sources) == sorted(few.train.sources)
    one = sorted(few.train.sources)[:2]
    ranks = fewshot.rank_images("shots", 0, 0, [f"images/0_train_{number}.jpg" for number in range(6)])
    assert sorted(ranks[:2]) == one


def test_the_draw_is_the_same_on_every_machine():
    """Written down once: blake2b of (purpose, seed, label, name)."""
    import hashlib

    names = [f"images/{number}.jpg" for number in range(9)]
    digests = {name: hashlib.blake2b(f"shots\x007\x003\x00{name}".encode(), digest_size=8).digest() for name in names}
    expected = sorted(names, key=lambda name: int.from_bytes(digests[name], "big") >> 1)
    assert fewshot.rank_images("shots", 7, 3, names) == expected


@pytest.mark.parametrize(("shots", "message"), [(7, r"--shots 7: class abbey \(0\) has 6 training images"), (0, None)])
def test_more_shots_than_images_are_refused(pets, shots, message):
    if message:
        with pytest.raises(UserError, match=message):
            fewshot.draw_shots(datasets.load("pets", None, pets), shots, 0)


def test_a_class_without_a_test_image_is_refused(pets):
    rows = read_split(pets)
    rows["test"] = [row for row in rows["test"] if row[1] != 1]
    write_split(pets, rows)
    with pytest.raises(UserError, match=r"class airport terminal \(1\) has no test image"):
        fewshot.draw_shots(datasets.load("pets", None, pets), 2, 0)


def renumber(rows: dict, label: int, other: int) -> None:
    for part in rows.values():
        for row in part:
            row[1] = other if row[1] == label else row[1]


def rename(rows: dict, label: int, name: str) -> None:
    for part in rows.values():
        for row in part:
            row[2] = name if row[1] == label else row[2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows["val"][0].__setitem__(0, "absent.jpg"), "lists 1 images of 6 that are not below"),
        (lambda rows: rows["val"][0].__setitem__(0, "../x.jpg"), "expected a path below --data-root"),
        (lambda rows: rows["val"][0].__setitem__(2, "abbeys"), "label 0 is called abbey and abbeys"),
        (lambda rows: rename(rows, 2, "abbey"), "classes 0 and 2 are both called abbey"),
        (lambda rows: rows.pop("test"), "not a CoOp split"),
        (lambda rows: renumber(rows, 2, 7), "no image of label 2"),
    ],
)
def test_a_wrong_split_is_one_line(pets, spoil, message):
    rows = read_split(pets)
    spoil(rows)
    write_split(pets, rows)
    with pytest.raises(UserError, match=message) as error:
        datasets.load("pets", None, pets)
    assert "\n" not in str(error.value)


def test_check_data_knows_the_published_counts_and_sees_one_image_in_two_splits(pets, capsys):
    flags = ["--dataset", "pets", "--data-root", str(pets), "--shots", "6"]
    assert check_data.main(flags) == 1
    shown = capsys.readouterr().out
    assert "train: 18 found, 2944 expected" in shown and "classes: 3 found, 37 expected" in shown
    assert "18 shots, digest " in shown and "same image" not in shown
    draw(pets / "images/1_test_0.jpg", 40 * 1)  # as the first training image
    check_data.main(flags)
    assert "images/0_train_0.jpg of train and images/1_test_0.jpg of test are the same image" in capsys.readouterr().out


def test_published_counts_are_those_of_the_paper_s_ten_data_sets():
    assert set(fewshot.COUNTS) == set(fewshot.NAMES) and len(fewshot.NAMES) == 10
    assert fewshot.COUNTS["caltech101"] == {"classes": 100, "train": 4128, "val": 1649, "test": 2465}


def test_aircraft_names_are_the_rest_of_a_line(tmp_path):
    (tmp_path / "variants.txt").write_text("707-320\nF/A-18\nDH-82 x\n")
    for part in ("train", "val", "test"):
        lines = []
        for label, name in enumerate(["707-320", "F/A-18", "DH-82 x"]):
            draw(tmp_path / "images" / f"{part}{label}.jpg", label)
            lines.append(f"{part}{label} {name}")
        (tmp_path / f"images_variant_{part}.txt").write_text("\n".join(lines))
    data = datasets.load("aircraft", None, tmp_path)
    assert data.class_names == ["707-320", "F/A-18", "DH-82 x"] and data.val.labels.tolist() == [0, 1, 2]
    (tmp_path / "images_variant_val.txt").write_text("val0 707-321\n")
    with pytest.raises(UserError, match="variant '707-321' is not in"):
        datasets.load("aircraft", None, tmp_path)


def test_imagenet_holds_validation_images_out_and_takes_val_for_test(tmp_path, monkeypatch):
    import open_clip

    monkeypatch.setattr(open_clip, "IMAGENET_CLASSNAMES", ["tench", "goldfish"])
    for wnid in ("n01", "n02"):
        for number in range(15):
            draw(tmp_path / "images/train" / wnid / f"{number}.JPEG", number)
        draw(tmp_path / "images/val" / wnid / "0.JPEG", 3)
    # What systems leave behind is no image and no class.
    (tmp_path / "images/train/n01/folder.JPEG").mkdir()
    (tmp_path / "images/train/__MACOSX").mkdir()
    for name in ("images/train/n01/._0.JPEG", "images/train/n02/Thumbs.db", "images/train/__MACOSX/._n01.JPEG"):
        (tmp_path / name).write_bytes(b"no image")
    data = datasets.load("imagenet", None, tmp_path)
    assert "left out: 1 folders within classes, 3 hidden files and folders" in data.note
    assert data.class_names == ["tench", "goldfish"]
    assert [len(part) for part in data.splits.values()] == [10, 20, 2]
    assert not set(data.train.sources) & set(data.val.sources)
    assert data.published_counts.tolist() == [15, 15]


def test_shots_can_be_drawn_from_any_image_folder_and_from_the_embedded_digits(tmp_path):
    for part, count in (("train", 8), ("test", 2)):
        for name in ("cat", "dog"):
            for number in range(count):
                draw(tmp_path / part / name / f"{number}.png", 7 * number)
    folder = fewshot.draw_shots(datasets.load("imagefolder", None, tmp_path), 4, 1)
    assert np.bincount(folder.train.labels).tolist() == [4, 4] and len(folder.val) == 2
    digits = fewshot.draw_shots(datasets.load("fewshot_digits", None), 16, 0)
    assert len(digits.train) == 160 and len(digits.val) == 80 and len(digits.test) == 500
    assert not set(digits.train.sources) & set(digits.test.sources)
