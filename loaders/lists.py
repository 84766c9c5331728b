"""The large long-tailed sets, by their official lists: ImageNet-LT, Places-LT and iNaturalist 2018."""

from __future__ import annotations

from pathlib import Path

from loaders.base import (
    CLIP_FILTER,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LARGE,
    PAPER_SCORE_PROMPT,
    REFINER,
    DataSet,
    Entry,
    is_below,
    listed_set,
    missing_files,
    with_validation,
)
from runtime.text import MALFORMED, UserError, parse_json, parse_whole, read_lines, read_text

NAMES_FILE = "categories.json"  # iNaturalist's names, which train2018.json itself holds as numbers alone
LAYOUTS = {
    "imagenet_lt": "expected ILSVRC2012's train and val folders and ImageNet_LT_train.txt, _val.txt and _test.txt",
    "places_lt": "expected data_256, val_256 and so on, and Places_LT_train.txt, _val.txt and _test.txt",
    "inat2018": "expected train2018.json, val2018.json, categories.json and the folder train_val2018",
}
LIST_FILES = {"imagenet_lt": "ImageNet_LT_{}.txt", "places_lt": "Places_LT_{}.txt"}


def read_list(path: Path, classes: int) -> tuple[list[str], list[int]]:
    """The paths and labels of an official list file, one `PATH LABEL` a line.

    Raises:
        UserError: no such file, or a line that is no such pair.
    """
    names, labels = [], []
    for number, line in read_lines(path, "expected the official list of the data set there"):
        name, _, text = line.rpartition(" ")
        label = parse_whole(text)
        if not name or label is None or label >= classes:
            raise UserError(f"{path} line {number}: {line[:80]!r}: expected a path and a label below {classes}")
        if not is_below(name):
            raise UserError(f"{path} line {number}: {name}: expected a path below --data-root")
        names.append(name)
        labels.append(label)
    return names, labels


def load_listed(name: str, imb_ratio: float | None, root: Path, seed: int) -> DataSet:
    """ImageNet-LT or Places-LT, by their official lists, which lie in `root` beside the images' folders.

    ImageNet-LT's validation list names training images of ILSVRC2012, its test list the 50,000 validation images, by
    `val/WNID/NAME` or flat `val/NAME`; either may be how they lie on the disk.
    """
    classes = {"imagenet_lt": 1000, "places_lt": 365}[name]
    lists = {part: root / LIST_FILES[name].format(part) for part in ("train", "val", "test")}
    read = {part: read_list(path, classes) for part, path in lists.items()}
    folders: dict[int, tuple[str, ...]] = {}
    for path, label in zip(*read["train"], strict=True):
        folders.setdefault(label, Path(path).parts[1:-1])
    if name == "imagenet_lt":
        wnids = ["/".join(folders.get(label, (str(label),))) for label in range(classes)]
        names, labels = read["test"]
        read["test"] = (imagenet_val_layout(root, names, labels, wnids), labels)
        class_names = imagenet_names(wnids)
    else:
        class_names = [places_name(folders.get(label, (str(label),))) for label in range(classes)]
    sets = {part: listed_set(root, *rows, lists[part]) for part, rows in read.items()}
    return DataSet(
        name,
        class_names,
        sets["train"],
        sets["val"],
        sets["test"],
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        note="validation: the official list",
        files=list(lists.values()),
    )


def imagenet_val_layout(root: Path, names: list[str], labels: list[int], wnids: list[str]) -> list[str]:
    """The paths of ImageNet's validation images as they lie below `root`, whichever way the list writes them."""
    missing = set(missing_files(root, names[:1]))
    if not missing:
        return names
    flat = [f"{Path(name).parts[0]}/{Path(name).name}" for name in names]
    nested = [
        f"{Path(name).parts[0]}/{wnids[label]}/{Path(name).name}" for name, label in zip(names, labels, strict=True)
    ]
    return next((other for other in (flat, nested) if not missing_files(root, other[:1])), names)


# Two pairs of classes share a name in CLIP's list; one of each takes WordNet's.
OWN_NAMES = {744: "projectile", 836: "sunglass"}


def imagenet_names(wnids: list[str]) -> list[str]:
    """The names that CLIP's authors gave ImageNet's classes; a folder that is no ImageNet id keeps its name."""
    import open_clip
    from timm.data import ImageNetInfo

    places = {wnid: place for place, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    names = dict(enumerate(open_clip.IMAGENET_CLASSNAMES)) | OWN_NAMES
    return [names[places[wnid]] if wnid in places else wnid for wnid in wnids]


def places_name(folders: tuple[str, ...]) -> str:
    """The name of a class of Places by its images' folders: a/art_school, or art_school alone, is `art school`."""
    if len(folders) > 1 and len(folders[0]) == 1:  # the initial letter under which Places files its classes
        folders = folders[1:]
    return "/".join(folders).replace("_", " ")


def inat_names(root: Path, classes: int) -> list[str] | None:
    """The species of categories.json by class index; None where there is no such file.

    Raises:
        UserError: another file than the organisers', or one that lacks a class.
    """
    path = root / NAMES_FILE
    if not path.is_file():
        return None
    try:
        names = {int(row["id"]): str(row["name"]) for row in parse_json(read_text(path), path)}
        return [names[label] for label in range(classes)]
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"{path}: not iNaturalist's list of categories ({type(error).__name__}: {error})") from None


def load_inat2018(name: str, imb_ratio: float | None, root: Path, seed: int) -> DataSet:
    """iNaturalist 2018 by its official train2018.json and val2018.json; val2018 is the test set, as everywhere.

    A validation set is held out of the training set; the groups go by the counts before.
    """
    paths = {part: root / f"{part}2018.json" for part in ("train", "val")}
    sets, class_names = {}, []
    for part, path in paths.items():
        try:
            content = parse_json(read_text(path, LAYOUTS[name]), path)
            files = {image["id"]: str(image["file_name"]) for image in content["images"]}
            rows = [(files[row["image_id"]], int(row["category_id"])) for row in content["annotations"]]
            class_names = class_names or [
                str(row["name"]) for row in sorted(content["categories"], key=lambda row: row["id"])
            ]
        except UserError:
            raise
        except MALFORMED as error:
            raise UserError(f"{path}: not an iNaturalist annotation file ({type(error).__name__}: {error})") from None
        for file_name, label in rows:
            if not 0 <= label < len(class_names):
                raise UserError(f"{path}: {file_name} has category {label}; expected one below {len(class_names)}")
        rows.sort()
        sets[part] = listed_set(root, [file_name for file_name, _ in rows], (label for _, label in rows), path)
    class_names = inat_names(root, len(class_names)) or class_names
    return with_validation(name, class_names, sets["train"], sets["val"], seed, list(paths.values()))


DEFAULTS = {"generate_spectrum": REFINER, "filter_clipscore": CLIP_FILTER, "train_lt": LARGE}
DATASETS = {
    "imagenet_lt": Entry(
        load=load_listed,
        layout=LAYOUTS["imagenet_lt"],
        score_prompt=PAPER_SCORE_PROMPT,
        defaults=DEFAULTS,
        counts={"train": 115846, "val": 20000, "test": 50000, "classes": 1000},
        checksums={
            "ImageNet_LT_train.txt": ("a063f095fcd475db4cf8b0658c4b73955535bbf9",),
            "ImageNet_LT_val.txt": ("3ed3188b",),
            "ImageNet_LT_test.txt": ("76a2fb97", "0b447ac5"),  # two versions are in use
        },
        acceptance={None: (51917, 24141)},
    ),
    "places_lt": Entry(
        load=load_listed,
        layout=LAYOUTS["places_lt"],
        score_prompt=PAPER_SCORE_PROMPT,
        defaults=DEFAULTS,
        counts={"train": 62500, "val": 7300, "test": 36500, "classes": 365},
    ),
    "inat2018": Entry(
        load=load_inat2018,
        layout=LAYOUTS["inat2018"],
        score_prompt=PAPER_SCORE_PROMPT,
        defaults=DEFAULTS | {"generate_spectrum": REFINER | {"seeds": 4}},
        names_file=NAMES_FILE,
        counts={"train": 437513, "test": 24426, "classes": 8142},
        acceptance={None: (179824, 75234)},
    ),
}
