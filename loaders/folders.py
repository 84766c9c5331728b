"""Anyone's own images, in a folder for each class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from loaders.base import (
    CLIP_FILTER,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LARGE,
    REFINER,
    DataSet,
    Entry,
    file_set,
    long_tail_counts,
    with_validation,
)
from runtime.cli import UserError

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


def load(name: str, imb_ratio: float | None, root: Path, seed: int) -> DataSet:
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
    return DataSet(
        name,
        class_names,
        sets["train"],
        sets["val"],
        sets["test"],
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        note="validation: the folder val",
    )


DATASETS = {
    "imagefolder": Entry(
        load=load,
        layout="expected train/CLASS/*, test/CLASS/* and perhaps val/CLASS/*",
        imb_ratio="optional",
        defaults={"generate_spectrum": REFINER, "filter_clipscore": CLIP_FILTER, "train_lt": LARGE},
    )
}
