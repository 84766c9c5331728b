"""Anyone's own images, in a folder for each class."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
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
from runtime.text import UserError, same_form

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


# What systems and editors leave in folders, which is no data. Hidden files and folders are left out too.
LITTER = {"Thumbs.db", "desktop.ini", "__MACOSX"}


def class_folders(root: Path, part: str, left_out: Counter | None = None) -> list[tuple[str, list[str]]]:
    """The classes below ROOT/PART, by the alphabet, each with its images' paths relative to `root`.

    Args:
        left_out: counts what was passed over, by its kind.

    Raises:
        UserError: no such folder, no class in it, or a name that is not UTF-8.
    """
    left_out = Counter() if left_out is None else left_out
    if not (root / part).is_dir():
        raise UserError(f"--data-root {root}: no folder {part} there; expected {part}/CLASS/* images")
    classes = []
    for folder in list_folder(root / part):
        if is_litter(folder.name):
            left_out["hidden files and folders"] += 1
        elif not folder.is_dir():
            left_out["files beside the class folders"] += 1
        else:
            names = [
                f"{part}/{folder.name}/{entry.name}" for entry in list_folder(folder.path) if is_image(entry, left_out)
            ]
            if names:
                classes.append((folder.name, names))
            else:
                left_out[f"class folders of {part} without an image"] += 1
    if not classes:
        raise UserError(f"--data-root {root}: no class folder with an image in {part}; expected {part}/CLASS/* images")
    return classes


def passed_over(left_out: Counter) -> str:
    """What `class_folders` left out, for a data set's note; empty where it took all."""
    return f"; left out: {', '.join(f'{count} {kind}' for kind, count in sorted(left_out.items()))}" if left_out else ""


def list_folder(folder: Path | str) -> list[os.DirEntry]:
    """What a folder holds, by the alphabet.

    Raises:
        UserError: it cannot be read, or a name in it is not UTF-8.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    for entry in entries:
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{folder}: the name {os.fsencode(entry.name)!r} is not UTF-8; expected it renamed"
            ) from None
    return entries


def is_litter(name: str) -> bool:
    """Whether a file or folder is no data by its name: hidden, or left by a system."""
    return name.startswith(".") or name in LITTER


def is_image(entry: os.DirEntry, left_out: Counter) -> bool:
    """Whether an entry of a class folder is an image that is read; what it is otherwise is counted."""
    if is_litter(entry.name):
        left_out["hidden files and folders"] += 1
    elif entry.is_dir():
        left_out["folders within classes"] += 1
    elif not entry.name.lower().endswith(IMAGE_ENDINGS):
        left_out[f"files ending in {Path(entry.name).suffix or 'nothing'}"] += 1
    else:
        return True
    return False


def load(name: str, imb_ratio: float | None, root: Path, seed: int) -> DataSet:
    """Anyone's own images: train/CLASS/*, test/CLASS/* and, if there is one, val/CLASS/*.

    With `imb_ratio` the training set is made long-tailed, in the alphabet's order of the classes; otherwise it is taken
    as it is. Without a val folder a validation set is held out of the training set.
    """
    # List the images of each class and split.
    left_out: Counter = Counter()
    by_part = {
        part: class_folders(root, part, left_out)
        for part in ("train", "val", "test")
        if part != "val" or (root / part).is_dir()
    }
    class_names = [folder for folder, _ in by_part["train"]]
    label_of = {same_form(folder): label for label, folder in enumerate(class_names)}
    doubled = next((folder for label, folder in enumerate(class_names) if label_of[same_form(folder)] != label), None)
    if doubled is not None:
        raise UserError(
            f"--data-root {root}: two folders of train are called {doubled}, in two spellings of one letter; expected "
            "one folder a class"
        )
    passed = passed_over(left_out)
    # Make the training set long-tailed where --imb-ratio asks for it.
    sets = {}
    for part, classes in by_part.items():
        unknown = [folder for folder, _ in classes if same_form(folder) not in label_of]
        if unknown:
            raise UserError(f"--data-root {root}: {part}/{unknown[0]} is no class of train; expected the same folders")
        counts = {folder: len(names) for folder, names in classes}
        if part == "train" and imb_ratio is not None:
            wanted = long_tail_counts(max(counts.values()), max(2, len(classes)), imb_ratio)
            if min(wanted) < 1:
                raise UserError(
                    f"--imb-ratio {imb_ratio:g}: the smallest class would keep none of its images; expected at most "
                    f"{max(counts.values())}, the images of the largest"
                )
            classes = [
                (folder, sorted(np.random.default_rng([seed, label]).permutation(names)[: wanted[label]].tolist()))
                for label, (folder, names) in enumerate(classes)
            ]
        names = [name for _, some in classes for name in some]
        labels = [label_of[same_form(folder)] for folder, some in classes for _ in some]
        sets[part] = file_set(root, names, labels)
    if "val" not in sets:
        held = with_validation(name, class_names, sets["train"], sets["test"], seed, [])
        return dataclasses.replace(held, note=held.note + passed)
    return DataSet(
        name,
        class_names,
        sets["train"],
        sets["val"],
        sets["test"],
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        note=f"validation: the folder val{passed}",
    )


DATASETS = {
    "imagefolder": Entry(
        load=load,
        layout="expected train/CLASS/*, test/CLASS/* and perhaps val/CLASS/*",
        imb_ratio="optional",
        defaults={"generate_spectrum": REFINER, "filter_clipscore": CLIP_FILTER, "train_lt": LARGE},
    )
}
