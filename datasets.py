"""Real data sets, the spectrum as a data set, and the mix of the two that an epoch trains on.

Every data set is one `LongTailed`: a training set with long-tailed class counts, a validation set to choose by, and a
test set to report on.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from loaders import biased_digits, birds, digits, fewshot
from loaders.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageSet,
    LongTailed,
    file_set,
    long_tail_counts,
    missing_files,
    with_validation,
)
from loaders.defaults import DEFAULTS
from loaders.pictures import read_image
from runtime import cli
from runtime.cli import UserError
from spectrum import folder as spectrum_folder

PHOTOS = [
    "a photo of a {}",
    "a 8k real photo: a {}",
    "a 8k real photo: a {} in bright daylight",
    "a 8k real photo: a {} in the evening",
    "a 8k real photo: a {} seen from close by",
    "a 8k real photo: a {} seen from afar",
    "a 8k real photo: a {} seen from the side",
    "a 8k real photo: a {} outdoors",
    "a 8k real photo: a {} indoors",
    "a 8k real photo: a {} against a plain background",
]
CAMERA_TRAPS = ("iwildcam", "cameratraps", "toycam")
# Templates of `write_prompts.py --source template`; the first is also the one that CLIPScore is taken against.
TEMPLATES: dict[str, list[str]] = {
    **dict.fromkeys(DEFAULTS, PHOTOS),
    **fewshot.TEMPLATES,
    "fewshot_digits": ["a photo of a {}"],
    **dict.fromkeys(CAMERA_TRAPS, ["a photo of {} in the wild"]),
    **dict.fromkeys((*digits.LOOKS, "digits_plus_web"), digits.TEMPLATES),
    "biased_digits": biased_digits.TEMPLATES,
    **birds.TEMPLATES,
}


def add_flags(parser: cli.Parser, default: str = "digits", choices: Iterable[str] = DEFAULTS) -> None:
    """The flags that choose the data. Defaults of other flags follow the data set (`loaders/defaults.py`)."""
    parser.shipped = DEFAULTS
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default=default,
        choices=sorted(choices),
        help="data set; the defaults shown here are the chosen one's",
    )
    group.add_argument(
        "--imb-ratio",
        type=cli.number(1),
        metavar="RATIO",
        help="images of the largest training class over those of the smallest",
    )
    group.add_argument(
        "--data-root",
        type=cli.existing_path,
        metavar="FOLDER",
        help="folder of the data set's images (for CIFAR also a zip); digits and toycam need none (default: "
        "$DISCL_DATA/DATASET, where that variable is set)",
    )
    group.add_argument(
        "--data-seed",
        type=cli.whole(0),
        default=0,
        metavar="N",
        help="which images a data set that is made long-tailed keeps, and which are held out for validation",
    )


def add_shot_flags(parser: cli.Parser) -> None:
    """The flags of a few-shot draw from a data set."""
    parser.add_argument("--shots", type=cli.whole(1), metavar="K", help="train on K images a class (default: on all)")
    parser.add_argument("--shot-seed", type=cli.whole(0), default=0, metavar="N", help="which K images")


def load_shots(args) -> LongTailed:
    """The data set that the flags name, with --shots images a class to train on where they say so."""
    data = load(args.dataset, args.imb_ratio, args.data_root, args.data_seed)
    return data if args.shots is None else fewshot.draw_shots(data, args.shots, args.shot_seed)


def load(name: str, imb_ratio: float | None, data_root: Path | None = None, seed: int = 0) -> LongTailed:
    """The data set called `name`.

    Args:
        imb_ratio: training images of the largest class over those of the smallest, at least 1. None where the data set
            is long-tailed by itself.
        data_root: folder (or zip) of the data; digits and toycam need none.
        seed: decides which images a data set that is made long-tailed keeps, and which are held out for validation.

    Raises:
        UserError: no such data set, no such data, or an imbalance ratio that it cannot have.
    """
    if imb_ratio is not None and imb_ratio < 1:
        raise UserError(f"--imb-ratio {imb_ratio:g}: expected 1 or more")
    if name == "digits_plus_web":
        return digits.load_plus_web(name, imb_ratio)
    if name in digits.LOOKS:
        return digits.load(name, imb_ratio)
    if name == "fewshot_digits":
        refuse_ratio(name, imb_ratio)
        return digits.load_pool(name)
    if name in CAMERA_TRAPS:
        from loaders import cameratraps

        refuse_ratio(name, imb_ratio)
        return cameratraps.load(name, data_root)
    if name == "biased_digits":
        refuse_ratio(name, imb_ratio)
        return biased_digits.load(data_root)
    if name not in LOADERS:
        raise UserError(f"--dataset {name}: unknown; expected one of {', '.join(DEFAULTS)}")
    if data_root is None:
        raise UserError(
            f"--dataset {name}: expected --data-root, the folder of its images, or $DISCL_DATA with a folder {name}; "
            f"{LAYOUTS[name]}"
        )
    if not data_root.exists():
        raise UserError(f"--data-root {data_root}: no such folder; {LAYOUTS[name]}")
    return LOADERS[name](name, imb_ratio, data_root, seed)


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR-10-LT and CIFAR-100-LT: CIFAR made long-tailed, in memory. The largest class keeps all of its images.

CIFAR_CLASSES = {"cifar10_lt": 10, "cifar100_lt": 100}
# Means and standard deviations of each training set's own pixels, in [0, 1].
CIFAR_STATISTICS = {
    "cifar10_lt": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100_lt": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
VAL_PER_CLASS_LEFT_OVER = 20


@dataclass(frozen=True)
class Cifar:
    """One split of CIFAR as it lies on the disk: labels, names of the images, and a way to decode some of them."""

    class_names: list[str]
    labels: np.ndarray
    sources: list[str]
    decode: object  # indices, int (n,) -> uint8 (n, 32, 32, 3)

    def take(self, indices: np.ndarray) -> ImageSet:
        return ImageSet(self.decode(indices), self.labels[indices], [self.sources[i] for i in indices])


def load_cifar_lt(name: str, imb_ratio: float | None, root: Path, seed: int) -> LongTailed:
    """CIFAR with int(n * imb_ratio^(-k / (classes - 1))) training images of class k, n those of the largest class.

    Which images stay is decided by `seed` alone, and a larger ratio keeps a part of what a smaller one keeps. CIFAR has
    no validation set, and published figures train on the whole long-tailed set: validation takes up to 20 images a
    class of those that the draw leaves over. (The largest class leaves none.)
    """
    train, test = cifar_split(name, root, "train"), cifar_split(name, root, "test")
    classes = CIFAR_CLASSES[name]
    if train.class_names != test.class_names or len(train.class_names) != classes:
        raise UserError(
            f"--data-root {root}: {len(train.class_names)} classes in train, {len(test.class_names)} in test; "
            f"expected the same {classes} of {name.removesuffix('_lt')} in both"
        )
    if imb_ratio is None:
        raise UserError(f"--dataset {name}: expected --imb-ratio, such as 100")
    by_class = [np.flatnonzero(train.labels == label) for label in range(classes)]
    counts = long_tail_counts(max(map(len, by_class)), classes, imb_ratio)
    kept, left = [], []
    for label, (indices, count) in enumerate(zip(by_class, counts, strict=True)):
        if not 1 <= count <= len(indices):
            raise UserError(
                f"--imb-ratio {imb_ratio:g}: class {train.class_names[label]} would have {count} training images, "
                f"of {len(indices)} there are"
            )
        order = np.random.default_rng([seed, label]).permutation(indices)
        kept.append(np.sort(order[:count]))
        left.append(np.sort(order[count:][-VAL_PER_CLASS_LEFT_OVER:]))
    if not sum(map(len, left)):
        raise UserError(f"--imb-ratio {imb_ratio:g}: leaves no image for validation; expected a larger ratio")
    mean, std = CIFAR_STATISTICS[name]
    return LongTailed(
        name,
        train.class_names,
        train.take(np.concatenate(kept)),
        train.take(np.concatenate(left)),
        test.take(np.arange(len(test.labels))),
        mean=mean,
        std=std,
        note=f"validation: up to {VAL_PER_CLASS_LEFT_OVER} images a class that the long-tailed draw left over",
    )


def cifar_split(name: str, root: Path, part: str) -> Cifar:
    """The split `part` (train or test) of CIFAR, in whichever of its forms lies at `root`.

    Raises:
        UserError: none of them does.
    """
    if root.is_file():
        return cifar_zip(root, part)
    if (root / part).is_dir():
        return cifar_folder(root, part)
    parquet = sorted([*root.glob(f"**/{part}-*.parquet"), *root.glob(f"**/{part}.parquet")])
    if parquet:
        return cifar_parquet(name, parquet)
    if (root / {"cifar10_lt": "cifar-10-batches-py", "cifar100_lt": "cifar-100-python"}[name]).is_dir():
        return cifar_torchvision(name, root, part)
    raise UserError(f"--data-root {root}: no {part} images there; {LAYOUTS[name]}")


def cifar_zip(path: Path, part: str) -> Cifar:
    """A split from the images TRAIN_OR_TEST/CLASS/* of a zip file; class indices go by the alphabet."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--data-root {path}: not a readable zip file ({error})") from None
    names = sorted(
        name
        for name in archive.namelist()
        if name.count("/") == 2 and name.startswith(f"{part}/") and not name.endswith("/")
    )
    return cifar_images(path, part, names, lambda name: io.BytesIO(archive.read(name)))


def cifar_folder(root: Path, part: str) -> Cifar:
    """A split from the images TRAIN_OR_TEST/CLASS/* of a folder; class indices go by the alphabet."""
    names = [name for _, names in class_folders(root, part) for name in names]
    return cifar_images(root, part, names, lambda name: root / name)


def cifar_images(root: Path, part: str, names: list[str], place) -> Cifar:
    classes = sorted({name.split("/")[1] for name in names})
    index = {name: label for label, name in enumerate(classes)}
    if not names:
        raise UserError(f"--data-root {root}: no image {part}/CLASS/* there")

    def decode(indices: np.ndarray) -> np.ndarray:
        pixels = np.empty((len(indices), 32, 32, 3), dtype=np.uint8)
        for at, i in enumerate(indices):
            try:
                with Image.open(place(names[i])) as image:
                    pixels[at] = np.asarray(image.convert("RGB"))
            except (OSError, ValueError, SyntaxError, KeyError, zipfile.BadZipFile) as error:
                raise UserError(f"--data-root {root}: {names[i]}: not a readable 32x32 image ({error})") from None
        return pixels

    return Cifar(classes, np.array([index[name.split("/")[1]] for name in names]), names, decode)


def cifar_parquet(name: str, paths: list[Path]) -> Cifar:
    """A split from Hugging Face's parquet files: a column of PNGs (img) and one of labels (fine_label, or label)."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{paths[0]}: reading parquet needs pyarrow; expected it installed (pip install pyarrow)"
        ) from None
    images, labels = [], []
    column = {"cifar10_lt": "label", "cifar100_lt": "fine_label"}[name]
    for path in paths:
        try:
            table = parquet.read_table(path)
        except Exception as error:  # pyarrow has classes of its own for what can be wrong with a file
            raise UserError(f"{path}: not a readable parquet file ({error})") from None
        if "img" not in table.column_names or column not in table.column_names:
            raise UserError(f"{path}: columns {', '.join(table.column_names)}; expected img and {column}")
        images += table.column("img").to_pylist()
        labels += table.column(column).to_pylist()
    meta = parquet.read_schema(paths[0]).metadata or {}
    features = json.loads(meta.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(column, {}).get("names") or [str(label) for label in range(CIFAR_CLASSES[name])]

    def decode(indices: np.ndarray) -> np.ndarray:
        return np.stack([np.asarray(Image.open(io.BytesIO(images[i]["bytes"])).convert("RGB")) for i in indices])

    return Cifar(names, np.array(labels), [f"index:{i}" for i in range(len(labels))], decode)


def cifar_torchvision(name: str, root: Path, part: str) -> Cifar:
    """A split from torchvision's own folder. torchvision reads its files after it has verified their checksums."""
    from torchvision import datasets as theirs

    kind = {"cifar10_lt": theirs.CIFAR10, "cifar100_lt": theirs.CIFAR100}[name]
    try:
        data = kind(root, train=part == "train", download=False)
    except RuntimeError as error:
        raise UserError(f"--data-root {root}: {str(error).splitlines()[0]}") from None
    return Cifar(
        list(data.classes),
        np.array(data.targets, dtype=np.int64),
        [f"index:{i}" for i in range(len(data.targets))],
        lambda indices: data.data[indices],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Large data sets: images stay in their files.

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def class_folders(root: Path, part: str) -> list[tuple[str, list[str]]]:
    """The classes below ROOT/PART, by the alphabet, each with its images' paths relative to `root`.

    Raises:
        UserError: no such folder, no class in it, or a class without an image.
    """
    if not (root / part).is_dir():
        raise UserError(f"--data-root {root}: no folder {part} there; expected {part}/CLASS/* images")
    classes = []
    for folder in sorted(entry.name for entry in os.scandir(root / part) if entry.is_dir()):
        names = sorted(
            f"{part}/{folder}/{entry.name}"
            for entry in os.scandir(root / part / folder)
            if entry.name.lower().endswith(IMAGE_ENDINGS)
        )
        if not names:
            raise UserError(f"--data-root {root}: class folder {part}/{folder} holds no image")
        classes.append((folder, names))
    if not classes:
        raise UserError(f"--data-root {root}: no class folder in {part}; expected {part}/CLASS/* images")
    return classes


def load_imagefolder(name: str, imb_ratio: float | None, root: Path, seed: int) -> LongTailed:
    """Anyone's own images: train/CLASS/*, test/CLASS/* and, if there is one, val/CLASS/*.

    With `imb_ratio` the training set is made long-tailed, in the alphabet's order of the classes; otherwise it is taken
    as it is. Without a val folder a validation set is held out of the training set.
    """
    by_part = {
        part: class_folders(root, part) for part in ("train", "val", "test") if part != "val" or (root / part).is_dir()
    }
    class_names = [folder for folder, _ in by_part["train"]]
    sets = {}
    for part, classes in by_part.items():
        unknown = sorted({folder for folder, _ in classes} - set(class_names))
        if unknown:
            raise UserError(f"--data-root {root}: {part}/{unknown[0]} is no class of train; expected the same folders")
        counts = {folder: len(names) for folder, names in classes}
        if part == "train" and imb_ratio is not None:
            wanted = long_tail_counts(max(counts.values()), max(2, len(classes)), imb_ratio)
            if min(wanted) < 1:
                raise UserError(f"--imb-ratio {imb_ratio:g}: leaves classes of {max(counts.values())} images none")
            classes = [
                (folder, sorted(np.random.default_rng([seed, label]).permutation(names)[: wanted[label]].tolist()))
                for label, (folder, names) in enumerate(classes)
            ]
        names = [name for _, some in classes for name in some]
        labels = [class_names.index(folder) for folder, some in classes for _ in some]
        sets[part] = file_set(root, names, labels)
    if "val" not in sets:
        return with_validation(name, class_names, sets["train"], sets["test"], seed, [])
    return LongTailed(
        name,
        class_names,
        sets["train"],
        sets["val"],
        sets["test"],
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        note="validation: the folder val",
    )


LIST_FILES = {"imagenet_lt": "ImageNet_LT_{}.txt", "places_lt": "Places_LT_{}.txt"}


def read_list(path: Path, classes: int) -> tuple[list[str], list[int]]:
    """The paths and labels of an official list file, one `PATH LABEL` a line.

    Raises:
        UserError: no such file, or a line that is no such pair.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected the official list of the data set there") from None
    names, labels = [], []
    for number, line in enumerate(lines, 1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal() or int(label) >= classes:
            raise UserError(f"{path} line {number}: {line[:80]!r}: expected a path and a label below {classes}")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{path} line {number}: {name}: expected a path below --data-root")
        names.append(name)
        labels.append(int(label))
    return names, labels


def stop_on_missing(root: Path, names: list[str], what: Path) -> None:
    """Raise UserError where images that `what` lists are not below `root`."""
    missing = missing_files(root, names)
    if missing:
        raise UserError(
            f"{what}: lists {len(missing)} images of {len(names)} that are not below --data-root {root}, the first "
            f"{missing[0]}"
        )


def load_listed(name: str, imb_ratio: float | None, root: Path, seed: int) -> LongTailed:
    """ImageNet-LT or Places-LT, by their official lists, which lie in `root` beside the images' folders.

    ImageNet-LT's validation list names training images of ILSVRC2012, its test list the 50,000 validation images, by
    `val/WNID/NAME` or flat `val/NAME`; either may be how they lie on the disk.
    """
    refuse_ratio(name, imb_ratio)
    classes = {"imagenet_lt": 1000, "places_lt": 365}[name]
    lists = {part: root / LIST_FILES[name].format(part) for part in ("train", "val", "test")}
    read = {part: read_list(path, classes) for part, path in lists.items()}
    folders = {}
    for path, label in zip(*read["train"], strict=True):
        folders.setdefault(label, Path(path).parts[1:-1])
    class_names = ["/".join(folders.get(label, (str(label),))) for label in range(classes)]
    if name == "imagenet_lt":
        names, labels = read["test"]
        read["test"] = (imagenet_val_layout(root, names, labels, class_names), labels)
        class_names = imagenet_names(class_names)
    else:
        class_names = ["/".join(folders.get(label, ("", str(label)))[1:]).replace("_", " ") for label in range(classes)]
    for part, (names, _) in read.items():
        stop_on_missing(root, names, lists[part])
    sets = {part: file_set(root, *rows) for part, rows in read.items()}
    return LongTailed(
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


def imagenet_names(wnids: list[str]) -> list[str]:
    """English names of ImageNet classes; a folder that is no ImageNet id keeps its name."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    known = set(info.label_names())
    return [info.label_name_to_description(wnid).split(",")[0] if wnid in known else wnid for wnid in wnids]


def load_inat2018(name: str, imb_ratio: float | None, root: Path, seed: int) -> LongTailed:
    """iNaturalist 2018 by its official train2018.json and val2018.json; val2018 is the test set, as everywhere.

    A validation set is held out of the training set; the groups go by the counts before.
    """
    refuse_ratio(name, imb_ratio)
    paths = {part: root / f"{part}2018.json" for part in ("train", "val")}
    sets, class_names = {}, []
    for part, path in paths.items():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            files = {image["id"]: image["file_name"] for image in content["images"]}
            rows = [(files[row["image_id"]], int(row["category_id"])) for row in content["annotations"]]
            class_names = class_names or [
                row["name"] for row in sorted(content["categories"], key=lambda row: row["id"])
            ]
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; {LAYOUTS[name]}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not an iNaturalist annotation file ({type(error).__name__}: {error})") from None
        for file_name, label in rows:
            if not 0 <= label < len(class_names):
                raise UserError(f"{path}: {file_name} has category {label}; expected one below {len(class_names)}")
            if Path(file_name).is_absolute() or ".." in Path(file_name).parts:
                raise UserError(f"{path}: {file_name}: expected a path below --data-root")
        rows.sort()
        names = [file_name for file_name, _ in rows]
        stop_on_missing(root, names, path)
        sets[part] = file_set(root, names, (label for _, label in rows))
    return with_validation(name, class_names, sets["train"], sets["val"], seed, list(paths.values()))


def refuse_ratio(name: str, imb_ratio: float | None) -> None:
    if imb_ratio is not None:
        raise UserError(f"--imb-ratio {imb_ratio:g}: {name} has its own class counts; expected no --imb-ratio")


def load_grouped(name: str, imb_ratio: float | None, root: Path, seed: int) -> LongTailed:
    """A data set of ALIA."""
    refuse_ratio(name, imb_ratio)
    return birds.LOADERS[name](name, root, seed)


LOADERS = {
    "cifar10_lt": load_cifar_lt,
    "cifar100_lt": load_cifar_lt,
    "imagefolder": load_imagefolder,
    "imagenet_lt": load_listed,
    "places_lt": load_listed,
    "inat2018": load_inat2018,
    **dict.fromkeys(fewshot.NAMES, fewshot.load),
    **dict.fromkeys(birds.LOADERS, load_grouped),
}
CIFAR_LAYOUT = (
    "expected train/CLASS/* and test/CLASS/* (a folder or a zip of them), Hugging Face's parquet files, or "
    "torchvision's folder"
)
# Said where the data are not as expected.
LAYOUTS = {
    "cifar10_lt": CIFAR_LAYOUT,
    "cifar100_lt": CIFAR_LAYOUT,
    "imagefolder": "expected train/CLASS/*, test/CLASS/* and perhaps val/CLASS/*",
    "imagenet_lt": "expected ILSVRC2012's train and val folders and ImageNet_LT_train.txt, _val.txt and _test.txt",
    "places_lt": "expected data_256, val_256 and so on, and Places_LT_train.txt, _val.txt and _test.txt",
    "inat2018": "expected train2018.json, val2018.json and the folder train_val2018",
    **fewshot.LAYOUTS,
    **birds.LAYOUTS,
}


# ---------------------------------------------------------------------------------------------------------------------
# hard images and the spectrum, beside the real data


def load_spectrum(folder: Path, levels: list[int], data: LongTailed) -> dict[int, ImageSet]:
    """The kept synthetic images of each level: in memory and in the size of the data set's own, or as files like them.

    Raises:
        UserError: not filtered, a level without a kept image, an image that does not decode, or a spectrum that was
            drawn from other images than this training set's.
    """
    plan = spectrum_folder.read_plan(folder)
    if plan["dataset"] != data.name:
        raise UserError(f"{folder}: made for --dataset {plan['dataset']}; expected a spectrum of {data.name}")
    places = {source: place for place, source in enumerate(data.train.sources)}
    digests: dict[int, str] = {}  # a source has many rows, and is read once
    by_level: dict[int, list[dict]] = {level: [] for level in levels}
    for row in spectrum_folder.kept_rows(folder, levels):
        place = places.get(row["source"])
        if place is not None and place not in digests:
            digests[place] = data.train.sha256(place)
        if (
            place is None
            or data.train.labels[place] != row["label"]
            or data.class_names[row["label"]] != row.get("class_name", data.class_names[row["label"]])
            or digests[place] != row["source_sha256"]
        ):
            raise UserError(
                f"{folder}: made for other data: its source {row['source']} (class {row['label']}) is no "
                f"training image of {data.name} with these flags; expected the --dataset, --data-root and --imb-ratio "
                "that it was made with"
            )
        by_level[row["level"]].append(row)

    def image_set(rows: list[dict]) -> ImageSet:
        labels, sources = np.array([row["label"] for row in rows]), [row["source"] for row in rows]
        if not data.train.in_memory:
            return ImageSet([folder / row["file_name"] for row in rows], labels, sources)
        height, width = data.train.images.shape[1:3]
        images = (read_image(folder / row["file_name"]) for row in rows)
        resized = (
            image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
            for image in images
        )
        return ImageSet(np.stack([np.asarray(image) for image in resized]), labels, sources)

    return {level: image_set(rows) for level, rows in by_level.items()}
