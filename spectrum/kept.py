"""The kept images of a spectrum, as sets of images beside the real data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from loaders.base import DataSet, ImageSet
from loaders.pictures import read_image
from runtime.cli import UserError
from spectrum import folder as spectrum_folder


def load_spectrum(
    folder: Path, levels: list[int], data: DataSet, filtered: bool = True, rules: list[str] | None = None
) -> dict[int, ImageSet]:
    """The kept synthetic images of each level: in memory and in the size of the data set's own, or as files like them.

    Args:
        filtered: False takes all images where the spectrum was not filtered.
        rules: rules of filter_edits.py to apply, or `none`; None for all that edits.csv was made by.

    Raises:
        UserError: not filtered, a level without a kept image, an image that does not decode, or a spectrum that was
            drawn from other images than this training set's.
    """
    # Sort the kept rows by level; each must belong to an unchanged training image.
    plan = spectrum_folder.read_plan(folder)
    if plan["dataset"] != data.name:
        raise UserError(f"{folder}: made for --dataset {plan['dataset']}; expected a spectrum of {data.name}")
    places = {source: place for place, source in enumerate(data.train.sources)}
    digests: dict[int, str] = {}  # a source has many rows, and is read once
    by_level: dict[int, list[dict]] = {level: [] for level in levels}
    for row in spectrum_folder.kept_rows(folder, levels, filtered, rules):
        place = places.get(row["source"])
        if place is not None and place not in digests:
            digests[place] = data.train.sha256(place)
        if (
            place is None
            or data.train.labels[place] != row["label"]
            or data.class_names[row["label"]] != row.get("class_name", data.class_names[row["label"]])
            or digests[place] != row.get("source_sha256")
        ):
            raise UserError(
                f"{folder}: made for other data: its source {row['source']} (class {row['label']}) is no "
                f"training image of {data.name} with these flags; expected the --dataset, --data-root and --imb-ratio "
                "that it was made with"
            )
        by_level[row["level"]].append(row)

    return {level: images_like(data.train, folder, rows) for level, rows in by_level.items()}


def images_like(real: ImageSet, folder: Path, rows: list[dict]) -> ImageSet:
    """The images of some rows of a spectrum folder as the real ones are: in memory and of their size, or as files."""
    labels, sources = np.array([row["label"] for row in rows]), [row["source"] for row in rows]
    paths = [folder / row["file_name"] for row in rows]
    if not real.in_memory:
        return ImageSet(paths, labels, sources)
    height, width = real.images.shape[1:3]
    resized = (
        image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
        for image in map(read_image, paths)
    )
    return ImageSet(np.stack([np.asarray(image) for image in resized]), labels, sources)
