"""The data sets of ALIA: CUB, Waterbirds, Planes, and the seven classes of iWildCam, by their own list files.

Each image has a domain (where there is one): the background, the ground or the camera. `extra` holds the real images
that the paper adds in its row "+ extra real data".
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from loaders.base import (
    CLIP_FILTER,
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataSet,
    Entry,
    ImageSet,
    listed_set,
    with_validation,
)
from runtime.text import UserError, parse_whole, read_csv, read_lines

LAYOUTS = {
    "cub": "expected CUB_200_2011: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt and images/",
    "waterbirds": "expected waterbird_complete95_forest2water2: metadata.csv and the folders of images",
    "waterbirds_biased": "expected waterbird_complete95_forest2water2: metadata.csv and the folders of images",
    "planes": "expected ALIA's planes_ext.csv and FGVC-Aircraft's images as images/NUMBER.jpg",
    "iwildcam7": "expected WILDS's iwildcam_v2.0: train/*.jpg and metadata.csv, or ALIA's lists train_subset.csv, "
    "train_extra_subset.csv, val_subset.csv and test_subset.csv",
}
CUB_HELD_BACK = 5  # training images a class, the last ones, that are the paper's extra data
WATERBIRDS_STEP = 4  # one in four of the images whose background goes with the class
IWILDCAM7 = {
    0: "background",
    24: "cattle",
    32: "elephants",
    36: "impalas",
    48: "zebras",
    49: "giraffes",
    52: "dik-diks",
}
PLANES_PARTS = ("train", "val", "test")


def number(path: Path, line: int, row: dict[str, str], column: str, allowed) -> int:
    """A whole number of a row that is one of `allowed`.

    Raises:
        UserError: it is not.
    """
    value = parse_whole(row[column].strip())
    if value not in allowed:
        raise UserError(f"{path} row {line}: {column} is {row[column]!r}; expected one of {sorted(allowed)[:8]}")
    return value


def make_set(root: Path, rows: list[tuple], what: Path) -> ImageSet:
    """The images of rows (name, label, domain).

    Raises:
        UserError: a name that leads out of the folder, or an image that is not there.
    """
    plain = listed_set(root, [row[0] for row in rows], [row[1] for row in rows], what)
    return ImageSet(plain.images, plain.labels, plain.sources, np.array([row[2] for row in rows], dtype=np.int64))


def data_set(name: str, class_names: list[str], domain_names: list[str], files: list[Path], note: str, **sets):
    """A data set of image files; without a test image of some group it would have nothing to report."""
    for part in ("train", "val", "test"):
        if not len(sets[part]):
            raise UserError(f"{files[0]}: no {part} image in it; expected some in train, val and test")
    return DataSet(
        name,
        class_names,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        note=note,
        files=files,
        domain_names=domain_names,
        **sets,
    )


# ---------------------------------------------------------------------------------------------------------------------


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """The lines of one of CUB's files: a number, a blank, and the rest.

    Raises:
        UserError: no such file, or a line that is none.
    """
    pairs = []
    for line_number, line in read_lines(path, LAYOUTS["cub"]):
        key, _, value = line.partition(" ")
        if not key.isdecimal() or not value:
            raise UserError(f"{path} line {line_number}: {line[:60]!r}: expected a number and a value")
        pairs.append((key, value))
    return pairs


def spoken_bird(folder: str) -> str:
    """A class of CUB as the prompts say it: `059.California_Gull` to `California Gull`, with the authors' two names."""
    name = re.sub(r"[\d.]", "", folder).replace("_", " ").strip()
    return {"Whip poor Will": "Eastern whip-poor-will", "Geococcyx": "Roadrunner"}.get(name, name)


def load_cub(name: str, imb_ratio: None, root: Path, seed: int) -> DataSet:
    """CUB-200-2011: train is the official one without the last five images a class, which are extra; the official test.

    ALIA chooses on the test set; here validation is held out of train.
    """
    classes = read_pairs(root / "classes.txt")
    names = [spoken_bird(folder) for _, folder in classes]
    label_of = {key: label for label, (key, _) in enumerate(classes)}
    labels = dict(read_pairs(root / "image_class_labels.txt"))
    training = dict(read_pairs(root / "train_test_split.txt"))
    by_class: dict[bool, dict[int, list]] = {True: {}, False: {}}
    for key, path in read_pairs(root / "images.txt"):
        if labels.get(key) not in label_of or training.get(key) not in ("0", "1"):
            raise UserError(f"{root / 'images.txt'}: image {key} has no class or no split; {LAYOUTS['cub']}")
        label = label_of[labels[key]]
        by_class[training[key] == "1"].setdefault(label, []).append((f"images/{path}", label, 0))
    train, extra = [], []
    for label, rows in sorted(by_class[True].items()):
        if len(rows) <= CUB_HELD_BACK:
            raise UserError(f"{root}: class {names[label]} has {len(rows)} training images; expected more than 5")
        train += rows[:-CUB_HELD_BACK]
        extra += rows[-CUB_HELD_BACK:]
    test = [row for _, rows in sorted(by_class[False].items()) for row in rows]
    if not test:
        raise UserError(f"{root / 'train_test_split.txt'}: no test image in it; {LAYOUTS['cub']}")
    images, files = root / "images.txt", [root / "images.txt", root / "train_test_split.txt"]
    sets = [make_set(root, rows, images) for rows in (train, test, extra)]
    plain = [ImageSet(one.images, one.labels, one.sources) for one in sets]  # CUB names no domain
    return with_validation(name, names, plain[0], plain[1], seed, files, extra=plain[2])


def load_waterbirds(name: str, imb_ratio: None, root: Path, seed: int) -> DataSet:
    """Waterbirds as it is, or as `waterbirds_biased` what ALIA trains on: a quarter, with the background of the class.

    There train is one in four, drawn by `seed`, of the 4,555 training images whose place is the class's; val has the
    like images of val; extra the 839 others of train and val. The authors drew another quarter for each training seed.
    """
    path = root / "metadata.csv"
    rows: dict[str, list] = {"0": [], "1": [], "2": []}
    for line, row in read_csv(path, {"img_filename", "y", "split", "place"}, LAYOUTS[name]):
        label, place = (number(path, line, row, column, (0, 1)) for column in ("y", "place"))
        rows[str(number(path, line, row, "split", (0, 1, 2)))].append((row["img_filename"], label, place))
    train, val, test = rows["0"], rows["1"], rows["2"]
    extra, note = [], "validation: the official one"
    if name == "waterbirds_biased":
        pure = [row for row in train if row[1] == row[2]]
        kept = np.sort(np.random.default_rng(seed).permutation(len(pure))[: -(-len(pure) // WATERBIRDS_STEP)])
        extra = [row for row in [*train, *val] if row[1] != row[2]]
        train, val = [pure[i] for i in kept], [row for row in val if row[1] == row[2]]
        note = "validation: the images of val whose background goes with the class, as biased as train"
    sets = {part: make_set(root, some, path) for part, some in (("train", train), ("val", val), ("test", test))}
    sets["extra"] = make_set(root, extra, path) if extra else None
    return data_set(name, ["landbird", "waterbird"], ["land", "water"], [path], note, **sets)


def load_planes(name: str, imb_ratio: None, root: Path, seed: int) -> DataSet:
    """Airbus and Boeing in the air, on grass and on roads, by ALIA's planes_ext.csv; half of its val is extra."""
    path = root / "planes_ext.csv"
    grounds, planes = ["air", "grass", "road"], ["Airbus", "Boeing"]
    rows: dict[str, list] = {part: [] for part in PLANES_PARTS}
    for line, row in read_csv(path, {"Split", "Plane", "Ground", "Filename"}, LAYOUTS[name]):
        if row["Split"] not in rows or row["Plane"] not in planes or row["Ground"] not in grounds:
            raise UserError(
                f"{path} row {line}: {row['Split']}, {row['Plane']}, {row['Ground']}: expected a split of "
                f"{', '.join(PLANES_PARTS)}, Airbus or Boeing, and a ground of {', '.join(grounds)}"
            )
        image = f"images/{Path(row['Filename']).name}"  # the list names the authors' own folders
        rows[row["Split"]].append((image, planes.index(row["Plane"]), grounds.index(row["Ground"])))
    order = np.random.default_rng(seed).permutation(len(rows["val"]))
    half = [[rows["val"][i] for i in np.sort(part)] for part in np.array_split(order, 2)]
    sets = {part: make_set(root, some, path) for part, some in (*rows.items(), ("val", half[0]), ("extra", half[1]))}
    return data_set(name, planes, grounds, [path], "validation: half of ALIA's, drawn by --data-seed", **sets)


def load_iwildcam7(name: str, imb_ratio: None, root: Path, seed: int) -> DataSet:
    """Seven classes of iWildCam: by ALIA's lists where they lie in `root`, else all of WILDS's train, id_val and test.

    ALIA's lists have 6,052 training, 2,826 validation and 8,483 test images (two cameras), and 2,224 extra ones.
    """
    # Read ALIA's lists, or WILDS's table.
    lists = {part: root / f"{file}_subset.csv" for part, file in
             (("train", "train"), ("extra", "train_extra"), ("val", "val"), ("test", "test"))}  # fmt: skip
    columns = {"filename", "y", "location_remapped"}
    found: dict[str, list] = {}
    if lists["train"].is_file():
        files = list(lists.values())
        tables = {
            part: [(path, *pair) for pair in read_csv(path, columns, LAYOUTS[name])] for part, path in lists.items()
        }
        note = "validation: ALIA's list"
    else:
        files = [root / "metadata.csv"]
        rows = read_csv(files[0], columns | {"split"}, LAYOUTS[name])
        parts = {"train": "train", "id_val": "val", "test": "test"}
        tables = {part: [] for part in parts.values()}
        for line, row in rows:
            if row["split"] in parts and parse_whole(row["y"]) in IWILDCAM7:
                tables[parts[row["split"]]].append((files[0], line, row))
        note = "validation: WILDS's id_val; all images of the seven classes, as ALIA's lists are not in --data-root"
    # Check every row, and number classes and cameras from 0.
    labels = {y: label for label, y in enumerate(IWILDCAM7)}
    cameras: set[int] = set()
    for part, table in tables.items():
        found[part] = []
        for path, line, row in table:
            camera = parse_whole(row["location_remapped"].strip())
            if camera is None:
                raise UserError(
                    f"{path} row {line}: location_remapped is {row['location_remapped']!r}; expected a camera's number"
                )
            cameras.add(camera)
            label = labels[number(path, line, row, "y", IWILDCAM7)]
            found[part].append((f"train/{row['filename']}", label, camera))
    places = {camera: place for place, camera in enumerate(sorted(cameras))}
    sets = {
        part: make_set(root, [(file, label, places[camera]) for file, label, camera in some], files[0])
        for part, some in found.items()
    }
    names = [f"camera {camera}" for camera in sorted(cameras)]
    return data_set(name, list(IWILDCAM7.values()), names, files, note, **sets)


# ALIA (Dunlap et al., 2023): its code's settings; the image guidance of its editors is in recipes/.
EDITS = {
    "generator": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "levels": [50],
    "seeds": 2,
    "steps": 50,
    "text_guidance": 7.5,
    **CLIP_FILTER,
}
TRAINING = {
    "model": "timm:resnet50.tv_in1k",
    "epochs": 100,
    "curriculum_epochs": 100,
    "keep_others": 1.0,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "augment": "resize",
    "memory_format": "channels_last",
}
ALIA: dict[str, dict] = {
    "find_hard": {"rule": "all"},
    "generate_spectrum": EDITS,
    "filter_clipscore": CLIP_FILTER,
    "filter_edits": {"clip": "ViT-L-14:openai"},
    "train_lt": TRAINING,
}


def entry(name: str, load, template: str, **defaults) -> Entry:
    """A row of the table whose defaults are ALIA's but for these."""
    return Entry(load=load, layout=LAYOUTS[name], templates=[template], score_prompt=template, defaults=ALIA | defaults)


DATASETS = {
    "cub": entry(
        "cub",
        load_cub,
        "a photo of a {} bird",
        describe_domains={"prefix": "a photo of a {} bird", "superclass": "bird"},
        generate_spectrum=EDITS | {"levels": [40]},
        train_lt=TRAINING | {"lr": 0.01},
    ),
    **{
        name: entry(name, load_waterbirds, "a photo of a {}", describe_domains={"superclass": "bird"})
        for name in ("waterbirds", "waterbirds_biased")
    },
    "planes": entry(
        "planes",
        load_planes,
        "a photo of an {} airplane",
        describe_domains={"prefix": "a photo of an {} airplane", "superclass": "airplane"},
        generate_spectrum=EDITS | {"levels": [40]},
        train_lt=TRAINING | {"model": "timm:resnet18.tv_in1k"},
    ),
    "iwildcam7": entry(
        "iwildcam7",
        load_iwildcam7,
        "a camera trap photo of {} in the wild",
        describe_domains={"prefix": "a camera trap photo of a {}", "superclass": "animal"},
    ),
}
