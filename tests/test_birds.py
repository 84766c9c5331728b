"""ALIA's data sets: made folders in their layouts, published counts, domains, and what is refused."""

from __future__ import annotations

import collections
import csv

import numpy as np
import pytest

import datasets
from loaders import base, biased_digits
from runtime.cli import UserError
from training import additions


def touch(root, names) -> None:
    """Empty files: the loaders only look whether an image is there."""
    for folder in {str(name).rpartition("/")[0] for name in names}:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).touch()


def write_csv(path, columns, rows) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


# ---------------------------------------------------------------------------------------------------------------------
# biased_digits


def test_the_paper_goes_with_the_class_in_train_and_val_but_not_in_test():
    data = datasets.load("biased_digits", None)
    assert [len(part) for part in (data.train, data.val, data.test, data.extra)] == [300, 80, 2000, 250]
    assert data.counts.tolist() == [30] * 10 and data.domain_names == ["white", "yellow", "pink", "blue"]
    for part, off in ((data.train, 2), (data.val, 0)):  # round(0.05 * 30) = 2 of a class; round(0.05 * 8) = 0
        agree = part.domains == part.labels % 4
        assert [(~agree)[part.labels == label].sum() for label in range(10)] == [off] * 10
    table = np.bincount(data.test.labels * 4 + data.test.domains, minlength=40)
    assert table.tolist() == [50] * 40
    # The paper is what one sees: the border's colour is nearest to the named one.
    for part in (data.train, data.test):
        border = np.concatenate([part.images[:, :, 0], part.images[:, :, -1]], 1)
        colours = np.array(list(biased_digits.digits.PAPERS.values())) - 5
        seen = ((np.median(border, 1)[:, None] - colours) ** 2).sum(-1).argmin(1)
        assert (seen == part.domains).mean() > 0.99


def test_biased_digits_splits_share_no_scan():
    data = datasets.load("biased_digits", None)
    scans = [
        {source.split(":")[1] for source in part.sources} for part in (data.train, data.val, data.test, data.extra)
    ]
    assert sum(map(len, scans)) == len(set.union(*scans)) == 300 + 80 + 500 + 250
    web = set(map(str, biased_digits.digits.split_scans()["web"]))
    assert not web & set.union(*scans)


# ---------------------------------------------------------------------------------------------------------------------
# CUB


def make_cub(root, train=(30, 12), test=(3, 4)):
    folders = ["001.Whip_poor_Will", "002.California_Gull"]
    images, labels, split, number = [], [], [], 0
    for label, folder in enumerate(folders):
        for place in range(train[label] + test[label]):
            number += 1
            images.append(f"{number} {folder}/{place:03d} a.jpg")
            labels.append(f"{number} {label + 1}")
            split.append(f"{number} {int(place < train[label])}")
    root.mkdir(exist_ok=True)
    for name, lines in (
        ("classes", [f"{i + 1} {folder}" for i, folder in enumerate(folders)]),
        ("images", images), ("image_class_labels", labels), ("train_test_split", split),
    ):  # fmt: skip
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    touch(root, [f"images/{line.split(' ', 1)[1]}" for line in images])
    return root


def test_cub_holds_back_the_last_five_of_a_class(tmp_path):
    data = datasets.load("cub", None, make_cub(tmp_path / "cub"))
    assert data.class_names == ["Eastern whip-poor-will", "California Gull"]
    assert data.published_counts.tolist() == [25, 7]  # 30 - 5 and 12 - 5
    assert np.bincount(data.extra.labels).tolist() == [5, 5] and len(data.test) == 7
    assert [name.split("/")[-1] for name in data.extra.sources[:5]] == [f"{i:03d} a.jpg" for i in range(25, 30)]
    assert data.note.startswith("validation: 2 images held out") and not {*data.val.sources} & {*data.train.sources}


def test_cub_of_the_published_size_gives_the_published_counts(tmp_path, monkeypatch):
    """200 classes, 29 or 30 training images: 5,994 and 5,794; less 5 a class: 4,994."""
    monkeypatch.setattr(base, "missing_files", lambda root, names: [])
    numbers = [(30, 29)] * 194 + [(29, 28)] * 6
    numbers[-1] = (29, 5794 - 193 * 29 - 5 * 28 - 29)
    root, number = tmp_path, 0
    lines = {name: [] for name in ("classes", "images", "image_class_labels", "train_test_split")}
    for label, (train, test) in enumerate(numbers):
        lines["classes"].append(f"{label + 1} {label + 1:03d}.Bird")
        for place in range(train + test):
            number += 1
            lines["images"].append(f"{number} {label + 1:03d}.Bird/{place}.jpg")
            lines["image_class_labels"].append(f"{number} {label + 1}")
            lines["train_test_split"].append(f"{number} {int(place < train)}")
    for name, some in lines.items():
        (root / f"{name}.txt").write_text("\n".join(some))
    data = datasets.load("cub", None, root)
    assert (data.published_counts.sum(), len(data.extra), len(data.test)) == (4994, 1000, 5794)


# ---------------------------------------------------------------------------------------------------------------------
# Waterbirds

WATERBIRDS = {  # split -> (label, place) -> images, as published
    0: {(0, 0): 3498, (0, 1): 184, (1, 0): 56, (1, 1): 1057},
    1: {(0, 0): 467, (0, 1): 466, (1, 0): 133, (1, 1): 133},
    2: {(0, 0): 2255, (0, 1): 2255, (1, 0): 642, (1, 1): 642},
}


def waterbirds_rows(counts):
    number = 0
    for split, groups in counts.items():
        for (label, place), images in groups.items():
            for _ in range(images):
                number += 1
                yield f"{label}.Bird/{number}.jpg", label, split, place


@pytest.mark.slow
def test_waterbirds_biased_has_the_published_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "missing_files", lambda root, names: [])
    write_csv(tmp_path / "metadata.csv", ["img_filename", "y", "split", "place"], waterbirds_rows(WATERBIRDS))
    whole = datasets.load("waterbirds", None, tmp_path)
    assert [len(part) for part in (whole.train, whole.val, whole.test)] == [4795, 1199, 5794] and whole.extra is None
    data = datasets.load("waterbirds_biased", None, tmp_path)
    assert [len(part) for part in (data.train, data.val, data.test, data.extra)] == [1139, 600, 5794, 839]
    assert (data.train.domains == data.train.labels).all() and (data.val.domains == data.val.labels).all()
    assert (data.extra.domains != data.extra.labels).all()
    again, other = (datasets.load("waterbirds_biased", None, tmp_path, seed) for seed in (0, 1))
    assert again.train.sources == data.train.sources != other.train.sources


# ---------------------------------------------------------------------------------------------------------------------
# Planes and iWildCam


def test_planes_are_read_by_the_authors_list(tmp_path):
    groups = [("train", "Airbus", "air", 3), ("train", "Boeing", "grass", 2), ("val", "Airbus", "road", 5),
              ("test", "Boeing", "air", 4)]  # fmt: skip
    rows, number = [], 0
    for split, plane, ground, count in groups:
        for _ in range(count):
            number += 1
            file = f"data/planes/manufacturer/x/{split}/{plane}/{ground}/{number:07d}.jpg"
            rows.append([number, split, plane, ground, file, 0, 0])
    write_csv(tmp_path / "planes_ext.csv", ["", "Split", "Plane", "Ground", "Filename", "Label", "Group"], rows)
    touch(tmp_path, [f"images/{i:07d}.jpg" for i in range(1, number + 1)])
    data = datasets.load("planes", None, tmp_path)
    assert [len(part) for part in (data.train, data.val, data.extra, data.test)] == [5, 3, 2, 4]
    assert not {*data.val.sources} & {*data.extra.sources} and data.class_names == ["Airbus", "Boeing"]
    assert data.train.domains.tolist() == [0, 0, 0, 1, 1] and data.test.domains.tolist() == [0] * 4


WILDS = ["split", "y", "filename", "location_remapped"]


def test_iwildcam7_from_metadata_and_from_the_authors_lists(tmp_path):
    rows = [("train", 24, "a.jpg", 3), ("train", 5, "b.jpg", 3), ("id_test", 0, "c.jpg", 3), ("test", 52, "d.jpg", 287),
            ("id_val", 32, "e.jpg", 4), ("val", 24, "f.jpg", 9), ("train", 99999, "g.jpg", 3)]  # fmt: skip
    write_csv(tmp_path / "metadata.csv", WILDS, rows)
    touch(tmp_path, [f"train/{letter}.jpg" for letter in "abcdefg"])
    data = datasets.load("iwildcam7", None, tmp_path)
    assert data.train.sources == ["train/a.jpg"] and data.val.sources == ["train/e.jpg"]
    assert data.train.labels.tolist() == [1] and data.test.labels.tolist() == [6] and data.extra is None
    assert [data.domain_names[place] for place in data.test.domains] == ["camera 287"]
    for name, chosen in (("train", "ab"), ("train_extra", "d"), ("val", "c"), ("test", "f")):
        write_csv(tmp_path / f"{name}_subset.csv", WILDS, [(name, 48, f"{letter}.jpg", 1) for letter in chosen])
    data = datasets.load("iwildcam7", None, tmp_path)
    assert [len(part) for part in (data.train, data.extra, data.val, data.test)] == [2, 1, 1, 1]
    assert data.class_names[data.train.labels[0]] == "zebras"


PLANES = {  # split -> (plane, ground) -> images; of val and test only the sums are published
    "train": {("Airbus", "air"): 98, ("Airbus", "road"): 70, ("Boeing", "air"): 129, ("Boeing", "grass"): 112},
    "val": {("Airbus", "grass"): 358, ("Boeing", "road"): 357},
    "test": {("Airbus", "grass"): 353, ("Boeing", "road"): 354},
}


def test_planes_of_the_published_size_give_the_published_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "missing_files", lambda root, names: [])
    rows = [
        [split, plane, ground, f"data/{split}/{plane}/{ground}/{i}.jpg"]
        for split, groups in PLANES.items()
        for (plane, ground), count in groups.items()
        for i in range(count)
    ]
    write_csv(tmp_path / "planes_ext.csv", ["Split", "Plane", "Ground", "Filename"], rows)
    data = datasets.load("planes", None, tmp_path)
    assert [len(part) for part in (data.train, data.test)] == [409, 707]
    assert {len(data.val), len(data.extra)} == {357, 358} and data.counts.tolist() == [168, 241]
    pairs = zip(data.train.labels.tolist(), data.train.domains.tolist(), strict=True)
    groups = collections.Counter((data.class_names[label], data.domain_names[domain]) for label, domain in pairs)
    assert groups == PLANES["train"]


IWILDCAM7 = {  # images of each class, as published: background, cattle, elephants, impalas, zebras, giraffes, dik-diks
    "train": (2210, 801, 366, 981, 720, 460, 514),
    "train_extra": (402, 506, 91, 625, 85, 47, 468),
    "val": (2826, 0, 0, 0, 0, 0, 0),  # of which only the sum is
    "test": (127, 1416, 2003, 4533, 144, 47, 213),
}


def test_iwildcam7_of_the_published_size_gives_the_published_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "missing_files", lambda root, names: [])
    for part, counts in IWILDCAM7.items():
        labels = [y for y, count in zip((0, 24, 32, 36, 48, 49, 52), counts, strict=True) for _ in range(count)]
        cameras = [287] * 492 + [288] * 7991 if part == "test" else [3] * len(labels)
        rows = [(y, f"{part}{i}.jpg", camera) for i, (y, camera) in enumerate(zip(labels, cameras, strict=True))]
        write_csv(tmp_path / f"{part}_subset.csv", ["y", "filename", "location_remapped"], rows)
    data = datasets.load("iwildcam7", None, tmp_path)
    for part, counts in (("train", "train"), ("extra", "train_extra"), ("test", "test")):
        assert np.bincount(getattr(data, part).labels, minlength=7).tolist() == list(IWILDCAM7[counts])
    assert [len(part) for part in (data.train, data.extra, data.val, data.test)] == [6052, 2224, 2826, 8483]
    assert np.bincount(data.test.domains).tolist() == [0, 492, 7991]
    assert data.domain_names == ["camera 3", "camera 287", "camera 288"]


def test_groups_without_a_test_image_are_named_and_do_not_count(tmp_path, capsys):
    """Training shows Airbus in the air and Boeing on grass; the test set has Boeing in the air and on roads alone."""
    groups = [("train", "Airbus", "air", 4), ("train", "Boeing", "grass", 4), ("val", "Airbus", "air", 2),
              ("test", "Boeing", "air", 4), ("test", "Boeing", "road", 2)]  # fmt: skip
    rows = [[*group[:3], f"{'_'.join(group[:3])}{i}.jpg"] for group in groups for i in range(group[3])]
    write_csv(tmp_path / "planes_ext.csv", ["Split", "Plane", "Ground", "Filename"], rows)
    touch(tmp_path, [f"images/{row[3]}" for row in rows])
    data = datasets.load("planes", None, tmp_path)
    # Three of the four in the air and none of the two on roads are taken for Boeing.
    found = additions.test_figures(data, np.array([1, 1, 1, 0, 0, 0]))
    assert found["id"] is None and found["ood"] == 50.0 and found["balanced"] == 37.5
    assert (found["worst_group"], found["worst_group_name"]) == (0.0, "Boeing, road")
    assert found["per_group"] == [[None, None, None], [75.0, None, 0.0]]
    additions.say_untested_groups(data, found)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "4 of 6 groups have no test image and do not count, the first: Airbus, air",
        "no test image is of a group in the training distribution: ID is not measured",
    ]


# ---------------------------------------------------------------------------------------------------------------------


def test_bad_lists_are_named(tmp_path):
    def refused(name, message):
        with pytest.raises(UserError, match=message):
            datasets.load(name, None, tmp_path)

    refused("waterbirds", r"metadata.csv: no such file; expected waterbird_complete95")
    write_csv(tmp_path / "metadata.csv", ["img_filename", "y", "split"], [("a.jpg", 0, 0)])
    refused("waterbirds", "no column place")
    write_csv(tmp_path / "metadata.csv", ["img_filename", "y", "split", "place"], [("a.jpg", 2, 0, 0)])
    refused("waterbirds", r"metadata.csv row 2: y is '2'; expected one of \[0, 1\]")
    write_csv(tmp_path / "metadata.csv", ["img_filename", "y", "split", "place"], [("../a.jpg", 0, 0, 0)])
    refused("waterbirds", r"\.\./a.jpg: expected a path below --data-root")
    touch(tmp_path, ["x/a.jpg", "x/b.jpg"])
    write_csv(
        tmp_path / "metadata.csv", ["img_filename", "y", "split", "place"], [("x/a.jpg", 0, 0, 0), ("x/b.jpg", 0, 1, 0)]
    )
    refused("waterbirds", "lists no image of a split; expected some in each")
    refused("planes", "planes_ext.csv: no such file")
    refused("cub", "classes.txt: no such file")
    (make_cub(tmp_path) / "train_test_split.txt").write_text("1 1\n")
    refused("cub", "image 2 has no class or no split")
    refused("iwildcam7", "no column")
    with pytest.raises(UserError, match="--imb-ratio 10: cub has its own class counts"):
        datasets.load("cub", 10, tmp_path)
    with pytest.raises(UserError, match="--data-root .*: biased_digits is embedded and needs no folder"):
        datasets.load("biased_digits", None, tmp_path)
