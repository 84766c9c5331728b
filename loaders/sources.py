"""Real images by the names that hard.csv gives them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from loaders.base import ImageSet, is_below
from loaders.pictures import open_image, read_image_file, upright_size
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
            if not is_below(name):
                raise UserError(f"source {name}: lies outside --data-root {data_root}")
            yield read_image_file(data_root / name, f"source {name}")


class Sources:
    """The source images by name, read one at a time.

    Args:
        train: the training set that `index:N` names refer to.
        data_root: the folder that other names lie below.
    """

    def __init__(self, train: ImageSet, data_root: Path | None):
        self.train, self.data_root = train, data_root
        self.places = {source: place for place, source in enumerate(train.sources)}

    def read(self, name: str) -> tuple[Image.Image, str]:
        """A source as RGB, upright, and its sha256.

        Raises:
            UserError: no such image, or one that does not decode.
        """
        place = [self.places[name]] if name in self.places else []
        return next(read_sources([name], self.train.take(np.array(place, dtype=int)), self.data_root))

    def sha256(self, name: str) -> str:
        """The sha256 that `read` gives, without decoding a file.

        Raises:
            UserError: it cannot be read.
        """
        if name in self.places:
            return self.train.sha256(self.places[name])
        return self.read(name)[1]

    def size(self, name: str) -> tuple[int, int]:
        """Width and height of a source, upright. Only the head of a file is read.

        Raises:
            UserError: no such image, or none that can be opened.
        """
        if name in self.places and self.train.in_memory:
            return self.train.images.shape[2], self.train.images.shape[1]
        if name in self.places:
            path = self.train.images[self.places[name]]
        elif self.data_root is not None and not name.startswith("index:") and is_below(name):
            path = self.data_root / name
        else:
            path = None
        if path is None or not path.is_file():
            return self.read(name)[0].size  # which says what is wrong with it
        with open_image(path, f"source {name}") as image:
            return upright_size(image)
