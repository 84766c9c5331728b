"""Real images by the names that hard.csv gives them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from loaders.base import ImageSet
from loaders.pictures import read_image_file
from runtime.cli import UserError


def read_sources(names: list[str], train: ImageSet, data_root: Path | None) -> Iterator[tuple[Image.Image, str]]:
    """The images that hard.csv names, one after another, each with its sha256.

    `index:N` is an image of `train`, hashed over its pixels; any other name is a file below `data_root`.

    Yields:
        An RGB image, and 64 hexadecimal digits.

    Raises:
        UserError: no such image, or one that does not decode.
    """
    places = {source: place for place, source in enumerate(train.sources)}
    for name in names:
        if name in places:
            yield train.read(places[name])
        elif name.startswith("index:") or data_root is None:
            raise UserError(
                f"source {name}: not a training image of this data set; "
                "expected one of the same --dataset and --imb-ratio, or a file below --data-root"
            )
        else:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"source {name}: lies outside --data-root {data_root}")
            yield read_image_file(data_root / name, f"source {name}")
