"""The embedded benchmark's split, class groups, and the mix that an epoch trains on."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import check_data
import datasets
from loaders import base, cifar, digits, lists
from loaders.sources import read_sources
from runtime.cli import UserError


def test_lists_and_files_may_spell_a_letter_differently(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    folder = tmp_path / "images" / decomposed
    folder.mkdir(parents=True)
    for name in (f"{composed}.jpg", "plain.jpg"):
        (folder / name).write_bytes(b"")
    listed = [f"images/{composed}/{decomposed}.jpg", f"images/{decomposed}/plain.jpg"]
    found = base.listed_set(tmp_path, listed, [0, 1], tmp_path / "list.txt")
    assert found.sources == [f"images/{decomposed}/{composed}.jpg", f"images/{decomposed}/plain.jpg"]
    with pytest.raises(UserError, match="lists 1 images of 1 that are not below"):
        base.listed_set(tmp_path, [f"images/{composed}/t\u00e9.jpg"], [0], tmp_path / "list.txt")


def test_splits_are_disjoint_and_balanced():
    split = digits.split_scans()
    together = np.concatenate(list(split.values()))
    assert len(together) == len(set(together.tolist())) == 1797
    labels = digits.read_scans()[1]
    for part, count in (("web", 60), ("val", 8), ("test", 50)):
        assert np.bincount(labels[split[part]]).tolist() == [count] * 10


@pytest.mark.parametrize("imb_ratio", [1.1, 10, 30, 60])
def test_train_val_test_and_web_share_no_image(imb_ratio):
    data = datasets.load("digits", imb_ratio)
    web = {f"index:{i}" for i in digits.split_scans()["web"]}
    parts = [set(data.train.sources), set(data.val.sources), set(data.test.sources), web]
    assert len(set.union(*parts)) == sum(map(len, parts))


def test_counts_follow_the_exponential_rule():
    # int(60 * 30^(-k/9)), by hand: the ratio of neighbours is 30^(1/9) = 1.459.
    assert datasets.load("digits", 30).counts.tolist() == [60, 41, 28, 19, 13, 9, 6, 4, 2, 2]
    assert sum(base.long_tail_counts(500, 100, 100)) == 10847
    assert sum(base.long_tail_counts(500, 100, 50)) == 12608
    assert sum(base.long_tail_counts(500, 100, 10)) == 19573
    with pytest.raises(UserError, match="--imb-ratio 1: class two would have 60 training images, of 59"):
        datasets.load("digits", 1)


def test_groups_by_training_count():
    groups = datasets.load("digits", 30).groups
    assert {name: classes.tolist() for name, classes in groups.items()} == {
        "many": [0, 1],
        "medium": [2],
        "few": [3, 4, 5, 6, 7, 8, 9],
    }


def test_the_split_does_not_depend_on_the_imbalance():
    small, large = datasets.load("digits", 60), datasets.load("digits", 10)
    assert set(small.train.sources) < set(large.train.sources)
    assert np.array_equal(small.test.images, large.test.images)


def test_bad_data_set_and_ratio_are_named():
    with pytest.raises(UserError, match="--dataset mnist"):
        datasets.load("mnist", 1)
    with pytest.raises(UserError, match="--imb-ratio 0.5"):
        datasets.load("digits", 0.5)


def test_sources_outside_the_data_root_are_refused(tmp_path):
    train = datasets.load("digits", 30).train
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        with pytest.raises(UserError, match="outside --data-root"):
            list(read_sources([name], train, tmp_path / "root"))


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR, in small: its layouts with 10 images a class


def small_cifar(root, classes=10, per_class=10, ending="png"):
    for part in ("train", "test"):
        for label in range(classes):
            folder = root / part / f"class{label:02d}"
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = np.random.default_rng([label, i, part == "test"]).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.{ending}")
    return root


@pytest.fixture(scope="module")
def cifar_root(tmp_path_factory):
    return small_cifar(tmp_path_factory.mktemp("cifar"))


def test_cifar_lt_from_a_folder(cifar_root):
    data = datasets.load("cifar10_lt", 10, cifar_root)
    # int(10 * 10^(-k/9)), by hand.
    assert data.counts.tolist() == [10, 7, 5, 4, 3, 2, 2, 1, 1, 1]
    assert data.train.images.shape == (36, 32, 32, 3) and len(data.test) == 100
    assert np.bincount(data.val.labels, minlength=10).tolist() == [0, 3, 5, 6, 7, 8, 8, 9, 9, 9]
    assert not set(data.train.sources) & set(data.val.sources)
    pixels = np.asarray(Image.open(cifar_root / data.train.sources[20]))
    assert np.array_equal(data.train.images[20], pixels)


def test_a_subset_depends_on_the_seed_alone_and_larger_ratios_keep_a_part(cifar_root):
    first, again, other = (datasets.load("cifar10_lt", 5, cifar_root, seed).train.sources for seed in (0, 0, 1))
    assert first == again and set(first) != set(other)
    assert set(datasets.load("cifar10_lt", 10, cifar_root).train.sources) < set(first)


def test_folder_zip_and_parquet_hold_the_same_data_set(cifar_root, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "hf").mkdir()
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for path in sorted(cifar_root.glob("*/*/*.png")):
            archive.write(path, path.relative_to(cifar_root))
    for part in ("train", "test"):
        paths = sorted((cifar_root / part).glob("*/*.png"))
        table = {
            "img": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
            "label": [int(path.parent.name[-2:]) for path in paths],
        }
        parquet.write_table(pyarrow.table(table), tmp_path / f"hf/{part}-00000-of-00001.parquet")
    folder = datasets.load("cifar10_lt", 5, cifar_root)
    for root in (tmp_path / "c.zip", tmp_path / "hf"):
        data = datasets.load("cifar10_lt", 5, root)
        for part in ("train", "val", "test"):
            assert np.array_equal(getattr(data, part).images, getattr(folder, part).images)
            assert np.array_equal(getattr(data, part).labels, getattr(folder, part).labels)


def test_torchvisions_folder_is_read_after_its_checksums(tmp_path, monkeypatch):
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    files = {
        "data_batch_1": {"data": rng.integers(0, 256, (100, 3072), dtype=np.uint8), "labels": list(range(10)) * 10},
        "test_batch": {"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))},
        "batches.meta": {"label_names": [f"name{label}" for label in range(10)]},
    }
    sums = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    with pytest.raises(UserError, match="not found or corrupted"):  # torchvision's checksums are the real CIFAR's
        datasets.load("cifar10_lt", 5, tmp_path)
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    data = datasets.load("cifar10_lt", 5, tmp_path)
    assert data.class_names[3] == "name3" and data.counts[0] == 10
    place = int(data.train.sources[5].removeprefix("index:"))
    assert np.array_equal(
        data.train.images[5], files["data_batch_1"]["data"][place].reshape(3, 32, 32).transpose(1, 2, 0)
    )


def test_every_fifth_class_of_cifar100_is_long_tailed_by_itself(tmp_path, monkeypatch):
    for label in range(100):
        for part, count in (("train", 10), ("test", 1)):
            folder = tmp_path / part / f"c{label:02d}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (label, i, 0)).save(folder / f"{i}.png")
    monkeypatch.setattr(cifar, "VAL_PER_CLASS_LEFT_OVER", 3)
    data = datasets.load("cifar100_lt_20", 5, tmp_path)
    assert data.class_names == [f"c{label:02d}" for label in range(0, 100, 5)]
    assert data.counts.tolist() == [int(10 * 5 ** (-k / 19)) for k in range(20)]
    # Each image's red is its class among the hundred, and each class has its test image.
    assert [*data.train.images[:, 0, 0, 0]] == [5 * label for label in data.train.labels]
    assert data.test.labels.tolist() == list(range(20)) and data.test.images[3, 0, 0, 0] == 15
    assert all(
        source.startswith(f"train/c{5 * k:02d}/")
        for source, k in zip(data.train.sources, data.train.labels, strict=True)
    )
    # With the web: the same groups, validation and test, and every image that the draw and validation leave.
    plus = datasets.load("cifar100_lt_20_plus_web", 5, tmp_path)
    assert set(plus.train.sources) == {f"train/{name}/{i}.png" for name in data.class_names for i in range(10)} - set(
        data.val.sources
    )
    assert (plus.val.sources, plus.test.sources) == (data.val.sources, data.test.sources)
    assert (plus.published_counts == data.counts).all()


@pytest.mark.parametrize(
    ("dataset", "ratio", "message"),
    [
        ("cifar100_lt", 10, "10 classes in train, 10 in test; expected the same 100"),
        ("cifar10_lt", 1, "leaves no image for validation"),
        ("cifar10_lt", 1000, "would have 0 training images"),
        ("cifar10_lt", None, "expected --imb-ratio"),
        ("imagenet_lt", 10, "has its own class counts"),
    ],
)
def test_bad_ratios_and_classes_are_named(cifar_root, dataset, ratio, message):
    with pytest.raises(UserError, match=message):
        datasets.load(dataset, ratio, cifar_root)


NEED_A_ROOT = sorted(name for name, entry in datasets.TABLE.items() if entry.root == "needed")


@pytest.mark.parametrize("dataset", NEED_A_ROOT)
def test_a_missing_root_and_a_wrong_layout_are_named(dataset, tmp_path):
    ratio = 10 if dataset.startswith("cifar") else None
    with pytest.raises(UserError, match="expected --data-root"):
        datasets.load(dataset, ratio)
    with pytest.raises(UserError, match="no such folder; expected"):
        datasets.load(dataset, ratio, tmp_path / "none")
    with pytest.raises(UserError, match=f"{tmp_path}.*(no train|no folder train|no such file)"):
        datasets.load(dataset, ratio, tmp_path)


def test_a_damaged_cifar_image_is_named(tmp_path):
    small_cifar(tmp_path, per_class=2)
    (tmp_path / "train/class00/0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="train/class00/0.png: not a readable image"):
        datasets.load("cifar10_lt", 2, tmp_path)
    (tmp_path / "c.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="not a readable zip file"):
        datasets.load("cifar10_lt", 2, tmp_path / "c.zip")


# ---------------------------------------------------------------------------------------------------------------------
# large images stay in their files


def draw_files(root, names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), (i % 256, 0, 0)).save(root / name)


def test_imagefolder_holds_out_one_in_twenty(tmp_path):
    draw_files(tmp_path, [f"train/{c}/{i}.jpg" for c, n in (("a", 45), ("b", 6), ("c", 4)) for i in range(n)])
    draw_files(tmp_path, [f"test/{c}/{i}.jpg" for c in "abc" for i in range(2)])
    data = datasets.load("imagefolder", None, tmp_path)
    assert data.class_names == ["a", "b", "c"]
    assert data.counts.tolist() == [43, 5, 4] and np.bincount(data.val.labels).tolist() == [2, 1]
    assert data.held_out.tolist() == [2, 1, 0] and "held out" in data.note
    assert not data.train.in_memory and data.train.images[0].is_file()
    assert data.train.read(0)[0].size == (20, 10)
    assert not set(data.train.sources) & set(data.val.sources)
    (tmp_path / "val").mkdir()
    draw_files(tmp_path, ["val/a/0.jpg"])
    data = datasets.load("imagefolder", None, tmp_path)
    assert data.counts.tolist() == [45, 6, 4] and len(data.val) == 1


def test_groups_go_by_the_counts_before_images_were_held_out(tmp_path):
    draw_files(tmp_path, [f"train/{c}/{i}.jpg" for c, n in (("a", 20), ("b", 19)) for i in range(n)])
    draw_files(tmp_path, [f"test/{c}/0.jpg" for c in "ab"])
    data = datasets.load("imagefolder", None, tmp_path)
    assert data.counts.tolist() == [19, 18]
    assert {name: classes.tolist() for name, classes in data.groups.items()} == {"many": [], "medium": [0], "few": [1]}


def test_imagefolder_made_long_tailed(tmp_path):
    draw_files(tmp_path, [f"{part}/{c}/{i}.png" for part in ("train", "val", "test") for c in "abc" for i in range(9)])
    data = datasets.load("imagefolder", 9, tmp_path)
    assert data.counts.tolist() == [9, 3, 1]
    with pytest.raises(UserError, match="--imb-ratio 20"):
        datasets.load("imagefolder", 20, tmp_path)
    draw_files(tmp_path, ["test/d/0.png"])
    with pytest.raises(UserError, match="test/d is no class of train"):
        datasets.load("imagefolder", None, tmp_path)


WNIDS = ["n01440764", "n01443537"]  # tench, goldfish


def imagenet_lt(root, nested_list, nested_disk):
    train = [f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in WNIDS for i in range(3)]
    val = [f"train/{wnid}/{wnid}_9.JPEG" for wnid in WNIDS]

    def test_names(nested):
        folders = WNIDS if nested else [""] * 2
        return [str(Path("val") / folder / f"ILSVRC2012_val_{i}.JPEG") for i, folder in enumerate(folders)]

    draw_files(root, [*train, *val, *test_names(nested_disk)])
    rows = {"train": train, "val": val, "test": test_names(nested_list)}
    for part, names in rows.items():
        labels = [0, 0, 0, 1, 1, 1] if part == "train" else [0, 1]
        lines = [f"{name} {label}\n" for name, label in zip(names, labels, strict=True)]
        (root / f"ImageNet_LT_{part}.txt").write_text("".join(lines))


@pytest.mark.parametrize("nested_list", [True, False])
@pytest.mark.parametrize("nested_disk", [True, False])
def test_imagenet_lt_in_both_layouts_of_its_test_list(tmp_path, nested_list, nested_disk):
    imagenet_lt(tmp_path, nested_list, nested_disk)
    data = datasets.load("imagenet_lt", None, tmp_path)
    assert len(data.class_names) == 1000 and data.class_names[:2] == ["tench", "goldfish"]
    assert data.counts[:3].tolist() == [3, 3, 0]
    assert data.test.labels.tolist() == [0, 1] and all(path.is_file() for path in data.test.images)
    assert data.test.read(1)[0].size == (20, 10)


def test_a_list_that_names_absent_images_is_refused(tmp_path):
    imagenet_lt(tmp_path, True, True)
    (tmp_path / "train/n01440764/n01440764_1.JPEG").unlink()
    with pytest.raises(UserError, match=r"ImageNet_LT_train.txt: lists 1 images of 6 .* train/n01440764/n01440764_1"):
        datasets.load("imagenet_lt", None, tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train/a.JPEG", "line 7"),
        ("train/a.JPEG 1000", "a label below 1000"),
        ("train/a.JPEG x", "line 7"),
        ("../a.JPEG 0", "below --data-root"),
        ("/etc/a.JPEG 0", "below --data-root"),
    ],
)
def test_bad_list_rows_are_named(tmp_path, line, message):
    imagenet_lt(tmp_path, True, True)
    with (tmp_path / "ImageNet_LT_train.txt").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=message):
        datasets.load("imagenet_lt", None, tmp_path)


def test_places_lt_takes_class_names_from_its_paths(tmp_path):
    rows = {
        "train": [("data_256/a/art_school/1.jpg", 0), ("data_256/b/barn/indoor/1.jpg", 1)],
        "val": [("val_256/1.jpg", 0)],
        "test": [("val_256/2.jpg", 1)],
    }
    for part, some in rows.items():
        draw_files(tmp_path, [name for name, _ in some])
        (tmp_path / f"Places_LT_{part}.txt").write_text("".join(f"{name} {label}\n" for name, label in some))
    data = datasets.load("places_lt", None, tmp_path)
    assert data.class_names[:3] == ["art school", "barn/indoor", "2"]
    assert (len(data.train), len(data.val), len(data.test)) == (2, 1, 1)


def inat2018(root, names_by_part):
    for part, rows in names_by_part.items():
        content = {
            "images": [{"id": i, "file_name": name} for i, (name, _) in enumerate(rows)],
            "annotations": [{"image_id": i, "category_id": label} for i, (_, label) in enumerate(rows)],
            "categories": [{"id": 1, "name": "lynx"}, {"id": 0, "name": "elk"}],
        }
        (root / f"{part}2018.json").write_text(json.dumps(content))


def test_inat2018_tests_on_val2018_and_holds_validation_out(tmp_path):
    train = [(f"train_val2018/Mammalia/{label}/{i}.jpg", label) for label in range(2) for i in range(6)]
    val = [("train_val2018/Mammalia/0/99.jpg", 0)]
    draw_files(tmp_path, [name for name, _ in train + val])
    inat2018(tmp_path, {"train": train, "val": val})
    data = datasets.load("inat2018", None, tmp_path)
    assert data.class_names == ["elk", "lynx"] and data.test.sources == [val[0][0]]
    assert data.counts.tolist() == [5, 5] and (data.counts + data.held_out).tolist() == [6, 6]
    (tmp_path / train[3][0]).unlink()
    with pytest.raises(UserError, match="train2018.json: lists 1 images of 12"):
        datasets.load("inat2018", None, tmp_path)
    (tmp_path / "train2018.json").write_text('{"images": 3}')
    with pytest.raises(UserError, match="not an iNaturalist annotation file"):
        datasets.load("inat2018", None, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# check_data.py


def test_the_check_of_the_embedded_benchmark_finds_nothing(capsys):
    assert check_data.main([]) == 0
    assert "all as expected" in capsys.readouterr().out


def test_the_check_names_counts_and_checksums(tmp_path, capsys):
    imagenet_lt(tmp_path, True, True)
    (tmp_path / "train/n01440764/n01440764_2.JPEG").write_bytes(b"no image")
    assert check_data.main(["--dataset", "imagenet_lt", "--data-root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "train: 6 found, 115846 expected" in said and "998 classes without an image" in said
    assert "ImageNet_LT_train.txt: another file than the published one" in said
    assert said.count("n01440764_2.JPEG") == 1 and "n01440764_2.JPEG (not a readable image" in said
    Image.linear_gradient("L").save(tmp_path / "torn.jpg")
    torn = (tmp_path / "torn.jpg").read_bytes()[:2000]  # with its header
    (tmp_path / "train/n01440764/n01440764_2.JPEG").write_bytes(torn)
    assert check_data.main(["--dataset", "imagenet_lt", "--data-root", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "decoded 5 of 6 train images" in said and "n01440764_2.JPEG: not a readable image" in said


def test_the_check_finds_images_in_two_splits(tmp_path, capsys):
    imagenet_lt(tmp_path, True, True)
    with (tmp_path / "ImageNet_LT_val.txt").open("a") as file:
        file.write("train/n01440764/n01440764_0.JPEG 0\n")
    check_data.main(["--dataset", "imagenet_lt", "--data-root", str(tmp_path)])
    assert (
        "1 images are both in train and in val, the first train/n01440764/n01440764_0.JPEG" in capsys.readouterr().out
    )


def test_the_checksum_is_gits(tmp_path):
    import subprocess

    (tmp_path / "f").write_bytes(b"some list\n")
    git = subprocess.run(["git", "hash-object", str(tmp_path / "f")], capture_output=True, text=True, check=True)
    assert check_data.git_checksum(tmp_path / "f") == git.stdout.strip()


def test_digits_with_the_webs_scans_keep_the_groups_and_the_test_set_of_digits():
    data, plus = datasets.load("digits", 30), datasets.load("digits_plus_web", 30)
    assert (plus.counts == data.counts + 60).all() and len(plus.train) == len(data.train) + 600
    assert {name: group.tolist() for name, group in plus.groups.items()} == {
        name: group.tolist() for name, group in data.groups.items()
    }
    assert plus.test.sources == data.test.sources and len(set(plus.train.sources)) == len(plus.train)


# ---------------------------------------------------------------------------------------------------------------------
# names, litter, and what check_data finds


def test_imagenets_names_are_those_of_clip_and_no_two_classes_share_one():
    from timm.data import ImageNetInfo

    names = lists.imagenet_names(ImageNetInfo("imagenet-1k").label_names())
    assert (names[0], names[134], names[517]) == ("tench", "crane bird", "construction crane")
    assert (names[657], names[744], names[836], names[837]) == ("missile", "projectile", "sunglass", "sunglasses")
    assert len(set(names)) == 1000 and base.name_problems(names) == []
    assert lists.imagenet_names(["cats", "n01440764"]) == ["cats", "tench"]


@pytest.mark.parametrize(
    ("folders", "name"),
    [(("a", "art_school"), "art school"), (("art_school",), "art school"), (("b", "barn", "indoor"), "barn/indoor")],
)
def test_both_forms_of_the_lists_of_places_give_names(folders, name):
    assert lists.places_name(folders) == name


def test_empty_and_shared_names_are_problems():
    found = base.name_problems(["crane", "caf\u00e9", " ", "crane", "cafe\u0301", "a_b", "a b"])
    assert found == [
        "class 2 has an empty name",
        "classes [0, 3] are all called 'crane'",
        "classes [1, 4] are all called 'caf\u00e9'",
        "classes [5, 6] are all called 'a b'",
    ]
    assert base.name_problems(["Red Fox", "crane", "red_fox"]) == [
        "classes [0, 2] are all called 'Red Fox' and 'red fox', which CLIP reads as one name"
    ]


def test_inat2018_takes_its_names_from_categories_json(tmp_path):
    train = [(f"train_val2018/Mammalia/{label}/{i}.jpg", label) for label in range(2) for i in range(6)]
    draw_files(tmp_path, [name for name, _ in [*train, ("train_val2018/Mammalia/0/99.jpg", 0)]])
    inat2018(tmp_path, {"train": train, "val": [("train_val2018/Mammalia/0/99.jpg", 0)]})
    (tmp_path / "categories.json").write_text('[{"id": 1, "name": "Lynx lynx"}, {"id": 0, "name": "Alces alces"}]')
    assert datasets.load("inat2018", None, tmp_path).class_names == ["Alces alces", "Lynx lynx"]
    (tmp_path / "categories.json").write_text('[{"id": 0, "name": "Alces alces"}]')
    with pytest.raises(UserError, match="categories.json: not iNaturalist's list of categories .KeyError: 1."):
        datasets.load("inat2018", None, tmp_path)


def test_what_is_no_data_is_left_out_and_counted(tmp_path):
    draw_files(tmp_path, [f"{part}/{c}/{i}.png" for part in ("train", "test") for c in "ab" for i in range(6)])
    for name in ("train/a/._0.png", "train/a/Thumbs.db", "train/a/notes.txt", "train/.ipynb_checkpoints/x.png",
                 "train/__MACOSX/a/0.png", "train/b/old/0.png", "train/b/0.GIF", "test/readme.md"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "train/a/folder.png").mkdir()
    (tmp_path / "train/c").mkdir()
    (tmp_path / "train/d").mkdir()
    data = datasets.load("imagefolder", None, tmp_path)
    assert data.class_names == ["a", "b"] and data.published_counts.tolist() == [6, 6]
    assert data.note.endswith(
        "left out: 2 class folders of train without an image, 1 files beside the class folders, "
        "1 files ending in .GIF, 1 files ending in .txt, 2 folders within classes, 4 hidden files and folders"
    )


def test_names_that_are_not_utf8_are_refused_and_both_forms_of_a_letter_are_one_class(tmp_path):
    draw_files(tmp_path, [f"train/caf\u00e9/{i}.png" for i in range(6)] + ["test/cafe\u0301/0.png"])
    assert datasets.load("imagefolder", None, tmp_path).test.labels.tolist() == [0]
    (tmp_path / "train/caf\u00e9" / os.fsdecode(b"\xe9.png")).write_bytes(b"x")
    with pytest.raises(UserError, match=r"the name b'\\xe9.png' is not UTF-8; expected it renamed"):
        datasets.load("imagefolder", None, tmp_path)


def test_check_data_looks_into_the_files(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in [f"{part}/{c}/{i}.png" for part in ("train", "val", "test") for c in "ab" for i in range(3)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / name)
    flags = ["--dataset", "imagefolder", "--data-root", str(tmp_path), "--decode", "2"]
    assert check_data.main(flags) == 0
    assert "decoded 2 of 6 train, 2 of 6 val, 2 of 6 test" in capsys.readouterr().out.replace(" images", "")
    shutil.copy(tmp_path / "train/a/0.png", tmp_path / "test/a/copy.png")
    shutil.copy(tmp_path / "train/a/1.png", tmp_path / "train/b/copy.png")
    shutil.copy(tmp_path / "train/a/2.png", tmp_path / "train/a/copy.png")  # twice in one class: no leak
    assert check_data.main(flags) == 1
    out = capsys.readouterr().out
    assert "train/a/0.png of train and test/a/copy.png of test are the same image" in out
    assert "train/a/1.png of train and train/b/copy.png of train are the same image" in out and "2 problems" in out
    (tmp_path / "val/a/0.png").write_bytes(b"")
    (tmp_path / "test/b/0.png").write_bytes(b"no image")
    assert check_data.main([*flags[:-1], "0"]) == 1
    out = capsys.readouterr().out
    assert f"val: {tmp_path}/val/a/0.png (empty)" in out and f"{tmp_path}/test/b/0.png (not a readable image" in out
    data = datasets.load("imagefolder", None, tmp_path)
    with pytest.raises(UserError, match="2 images cannot be used: val: .*(empty).*; test: .*not a readable image"):
        base.stop_on_unreadable(data.splits)


def test_every_entry_of_the_table_is_whole():
    for name, entry in datasets.TABLE.items():
        assert entry.score_prompt.count("{}") == 1 and all("{}" in template for template in entry.templates), name
        assert bool(entry.layout) == (entry.root == "needed"), name
        assert {"generate_spectrum", "filter_clipscore", "train_lt"} <= entry.defaults.keys(), name
    # DisCL takes CLIPScore against "a photo of X", without an article.
    paper = ("imagenet_lt", "places_lt", "inat2018", "cifar10_lt", "cifar100_lt")
    assert {datasets.TABLE[name].score_prompt for name in paper} == {"a photo of {}"}
