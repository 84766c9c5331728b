"""CIFAR-10-LT and CIFAR-100-LT: CIFAR made long-tailed, in memory. The largest class keeps all of its images."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curricula import places_by_label
from loaders.base import CLIP_FILTER, PAPER_SCORE_PROMPT, REFINER, DataSet, Entry, ImageSet, long_tail_counts
from loaders.folders import class_folders
from loaders.pictures import open_image, to_rgb
from runtime.cli import UserError, first_line
from runtime.retry import read_bytes, retry
from runtime.text import MALFORMED

LAYOUT = (
    "expected train/CLASS/* and test/CLASS/* (a folder or a zip of them), Hugging Face's parquet files, or "
    "torchvision's folder"
)
# What a member of a folder or zip raises that cannot be read; RuntimeError is of a password.
UNREADABLE = (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
CLASSES = {"cifar10_lt": 10, "cifar100_lt": 100}
FIFTH = "cifar100_lt_20"  # every fifth class of CIFAR-100, by index: what a few minutes of one GPU can train in full
# FIFTH and the images that the draw leaves over, which the generator of docs/cifar100_lt.md learns from
FIFTH_PLUS_WEB = "cifar100_lt_20_plus_web"
# Means and standard deviations of each training set's own pixels, in [0, 1].
STATISTICS = {
    "cifar10_lt": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100_lt": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
STATISTICS[FIFTH] = STATISTICS[FIFTH_PLUS_WEB] = STATISTICS["cifar100_lt"]
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


def load(name: str, imb_ratio: float, root: Path, seed: int) -> DataSet:
    """CIFAR with int(n * imb_ratio^(-k / (classes - 1))) training images of class k, n those of the largest class.

    Which images stay is decided by `seed` alone, and a larger ratio keeps a part of what a smaller one keeps. CIFAR has
    no validation set, and published figures train on the whole long-tailed set: validation takes up to 20 images a
    class that the draw leaves over. (The largest class leaves none.) FIFTH_PLUS_WEB trains on the others left over as
    well; many-, medium- and few-shot go by the images of FIFTH alone.
    """
    fifth = name in (FIFTH, FIFTH_PLUS_WEB)
    whole = "cifar100_lt" if fifth else name
    train, test = read_split(whole, root, "train"), read_split(whole, root, "test")
    classes = CLASSES[whole]
    if train.class_names != test.class_names or len(train.class_names) != classes:
        raise UserError(
            f"--data-root {root}: {len(train.class_names)} classes in train, {len(test.class_names)} in test; "
            f"expected the same {classes} of {whole.removesuffix('_lt')} in both"
        )
    if fifth:
        train, test, classes = take_fifth(train), take_fifth(test), classes // 5
    # Draw each class's training images; validation takes some of the others.
    by_class = places_by_label(train.labels, classes)
    counts = long_tail_counts(max(map(len, by_class)), classes, imb_ratio)
    kept, left, web = [], [], []
    for label, (indices, count) in enumerate(zip(by_class, counts, strict=True)):
        if not 1 <= count <= len(indices):
            raise UserError(
                f"--imb-ratio {imb_ratio:g}: class {train.class_names[label]} would have {count} training images, "
                f"of {len(indices)} there are"
            )
        order = np.random.default_rng([seed, label]).permutation(indices)
        kept.append(np.sort(order[:count]))
        left.append(np.sort(order[count:][-VAL_PER_CLASS_LEFT_OVER:]))
        web.append(np.sort(order[count:][:-VAL_PER_CLASS_LEFT_OVER]))
    if not sum(map(len, left)):
        raise UserError(f"--imb-ratio {imb_ratio:g}: leaves no image for validation; expected a larger ratio")
    mean, std = STATISTICS[name]
    added = web if name == FIFTH_PLUS_WEB else []
    return DataSet(
        name,
        train.class_names,
        train.take(np.concatenate(kept + added)),
        train.take(np.concatenate(left)),
        test.take(np.arange(len(test.labels))),
        mean=mean,
        std=std,
        note=f"validation: up to {VAL_PER_CLASS_LEFT_OVER} images a class that the long-tailed draw left over",
        held_out=-np.array([len(indices) for indices in added]) if added else 0,
    )


def take_fifth(split: Cifar) -> Cifar:
    """Classes 0, 5, 10 ... of a split, as classes 0, 1, 2 ..."""
    chosen = np.flatnonzero(split.labels % 5 == 0)
    sources = [split.sources[i] for i in chosen]
    return Cifar(split.class_names[::5], split.labels[chosen] // 5, sources, lambda some: split.decode(chosen[some]))


def read_split(name: str, root: Path, part: str) -> Cifar:
    """The split `part` (train or test) of CIFAR, in whichever of its forms lies at `root`.

    Raises:
        UserError: none of them does.
    """
    if root.is_file():
        return read_zip(root, part)
    if (root / part).is_dir():
        return read_folder(root, part)
    parquet = sorted([*root.glob(f"**/{part}-*.parquet"), *root.glob(f"**/{part}.parquet")])
    if parquet:
        return read_parquet(name, part, parquet)
    if (root / {"cifar10_lt": "cifar-10-batches-py", "cifar100_lt": "cifar-100-python"}[name]).is_dir():
        return read_torchvision(name, root, part)
    raise UserError(f"--data-root {root}: no {part} images there; {LAYOUT}")


def read_zip(path: Path, part: str) -> Cifar:
    """A split from the images TRAIN_OR_TEST/CLASS/* of a zip file; class indices go by the alphabet."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(read_bytes(path)))  # whole: a network file system may lose an open file
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--data-root {path}: not a readable zip file ({error})") from None
    names = sorted(
        name
        for name in archive.namelist()
        if name.count("/") == 2 and name.startswith(f"{part}/") and not name.endswith("/")
    )
    return read_images(path, part, names, lambda name: io.BytesIO(archive.read(name)))


def read_folder(root: Path, part: str) -> Cifar:
    """A split from the images TRAIN_OR_TEST/CLASS/* of a folder; class indices go by the alphabet."""
    names = [name for _, names in class_folders(root, part) for name in names]
    return read_images(root, part, names, lambda name: root / name)


def read_images(root: Path, part: str, names: list[str], place) -> Cifar:
    classes = sorted({name.split("/")[1] for name in names})
    index = {name: label for label, name in enumerate(classes)}
    if not names:
        raise UserError(f"--data-root {root}: no image {part}/CLASS/* there")

    def decode(indices: np.ndarray) -> np.ndarray:
        pixels = np.empty((len(indices), 32, 32, 3), dtype=np.uint8)
        for at, i in enumerate(indices):
            what = f"--data-root {root}: {names[i]}"
            try:
                file = place(names[i])
            except UNREADABLE as error:
                raise UserError(f"{what}: not a readable image ({error})") from None
            pixels[at] = read_pixels(file, what)
        return pixels

    return Cifar(classes, np.array([index[name.split("/")[1]] for name in names]), names, decode)


def read_pixels(file, what: str) -> np.ndarray:
    """An image of CIFAR, uint8 (32, 32, 3).

    Raises:
        UserError: it is none, or of another size.
    """
    with open_image(file, what) as image:
        if image.size != (32, 32):
            raise UserError(f"{what}: is {image.width}x{image.height}; expected 32x32")
        return np.asarray(to_rgb(image))


def read_parquet(name: str, part: str, paths: list[Path]) -> Cifar:
    """A split from Hugging Face's parquet files: a column of PNGs (img) and one of labels (fine_label, or label)."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{paths[0]}: reading parquet needs pyarrow; expected it installed (pip install pyarrow)"
        ) from None
    images, labels, schemas = [], [], []
    column = {"cifar10_lt": "label", "cifar100_lt": "fine_label"}[name]
    for path in paths:
        try:
            table = parquet.read_table(io.BytesIO(read_bytes(path)))
        except Exception as error:  # pyarrow has classes of its own for what can be wrong with a file
            raise UserError(f"{path}: not a readable parquet file ({error})") from None
        if "img" not in table.column_names or column not in table.column_names:
            raise UserError(f"{path}: columns {', '.join(table.column_names)}; expected img and {column}")
        schemas.append(table.schema)
        images += table.column("img").to_pylist()
        labels += table.column(column).to_pylist()
    meta = schemas[0].metadata or {}
    try:
        features = json.loads(meta.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        names = features.get(column, {}).get("names") or [str(label) for label in range(CLASSES[name])]
    except MALFORMED:
        raise UserError(f"{paths[0]}: its metadata huggingface are not readable; expected the classes' names") from None
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        if label not in range(CLASSES[name]) or not (isinstance(image, dict) and isinstance(image.get("bytes"), bytes)):
            raise UserError(
                f"{paths[0].parent}: {part} image {i}, of {column} {label!r}: expected bytes in img and a class below "
                f"{CLASSES[name]}"
            )

    def decode(indices: np.ndarray) -> np.ndarray:
        pixels = np.empty((len(indices), 32, 32, 3), dtype=np.uint8)
        for at, i in enumerate(indices):
            pixels[at] = read_pixels(io.BytesIO(images[i]["bytes"]), f"{paths[0].parent}: {part} image {i}")
        return pixels

    return Cifar(names, np.array(labels, dtype=np.int64), [f"index:{i}" for i in range(len(labels))], decode)


def read_torchvision(name: str, root: Path, part: str) -> Cifar:
    """A split from torchvision's own folder. torchvision reads its files after it has verified their checksums."""
    from torchvision import datasets as theirs

    kind = {"cifar10_lt": theirs.CIFAR10, "cifar100_lt": theirs.CIFAR100}[name]
    try:
        data = retry(lambda: kind(root, train=part == "train", download=False))
    except (OSError, RuntimeError) as error:
        raise UserError(f"--data-root {root}: {first_line(error)}") from None
    return Cifar(
        list(data.classes),
        np.array(data.targets, dtype=np.int64),
        [f"index:{i}" for i in range(len(data.targets))],
        lambda indices: data.data[indices],
    )


# Bag of Tricks' recipe (Zhang et al., 2021).
TRAINING = {
    "model": "resnet32",
    "epochs": 200,
    "curriculum_epochs": 160,
    "keep_others": 0.3,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "weight_decay": 2e-4,
    "schedule": "steps",
    "warmup_epochs": 5,
    "augment": "crop_flip",
    "memory_format": "channels_last",
    # The paper has 5,000 and 100 on ImageNet-LT: 4 % of the real images, and few of the hard ones. As
    # many here would be half of the real images before each epoch, and a third of the hard ones, which train less then.
    "progress_images": 20,
    "real_pass_images": 500,
}
DEFAULTS = {
    "data": {"imb_ratio": 100.0},
    # Small images are drawn at the size that the generator was made for.
    "generate_spectrum": REFINER | {"levels": [50, 70, 90], "size": (512, 512), "save_size": "source"},
    "filter_clipscore": CLIP_FILTER,
    "train_lt": TRAINING,
}
FIFTH_DEFAULTS = DEFAULTS | {"train_lt": TRAINING | {"progress_images": 6, "real_pass_images": 128}}
KNOWN = {
    "load": load,
    "layout": LAYOUT,
    "imb_ratio": "needed",
    "score_prompt": PAPER_SCORE_PROMPT,
    "defaults": DEFAULTS,
}
DATASETS = {
    "cifar10_lt": Entry(
        **KNOWN,
        counts={"test": 10000, "classes": 10},
    ),
    "cifar100_lt": Entry(
        **KNOWN,
        counts={"test": 10000, "classes": 100},
        train_counts={10: 19573, 50: 12608, 100: 10847},
        acceptance={50: (2144, 668), 100: (2592, 809)},  # v4, Table 5: 268 and 324 hard images x 8
    ),
    **{
        name: Entry(**KNOWN | {"defaults": FIFTH_DEFAULTS}, counts={"test": 2000, "classes": 20})
        for name in (FIFTH, FIFTH_PLUS_WEB)
    },
}
