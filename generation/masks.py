"""Masks of hard.csv: what of each source stays as it is, to the pixel, while the rest is drawn anew (inpainting)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from generation.sizes import resize
from loaders.base import is_below
from loaders.pictures import open_image, read_image_file, upright_size
from loaders.sources import Sources
from runtime.cli import UserError
from spectrum.tables import Hard

KEPT = 128  # grey value from which up a mask keeps a pixel


def find_masks(table: Path, hard: dict[str, Hard]) -> dict[str, Path]:
    """The mask files of the sources that have one; they lie beside hard.csv, below its folder.

    Raises:
        UserError: a mask that lies elsewhere, or is not there.
    """
    found = {}
    for source, row in hard.items():
        if row.mask:
            found[source] = table.parent / row.mask
            if not is_below(row.mask) or not found[source].is_file():
                raise UserError(f"{table}: mask {row.mask!r} of {source}: expected a file below {table.parent}")
    return found


def check_masks(masks: dict[str, Path], sources: Sources) -> None:
    """Raise UserError where a mask has another size than its source, before anything is drawn."""

    def complain(source: str) -> str:
        try:
            wanted = sources.size(source)
        except UserError:  # an unreadable source is skipped, and listed, when its turn comes
            return ""
        with open_image(masks[source], f"mask of {source}") as image:
            size = upright_size(image)
        if size == wanted:
            return ""
        return f"{masks[source]}: is {size[0]}x{size[1]}; expected {wanted[0]}x{wanted[1]}, the size of {source}"

    with ThreadPoolExecutor(8) as pool:
        wrong = next(filter(None, pool.map(complain, masks)), None)
    if wrong:
        raise UserError(wrong)


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Which pixels a mask keeps, at this width and height: bool (H, W); white keeps."""
    image, _ = read_image_file(path, f"mask {path.name}")
    return np.asarray(image.convert("L").resize(size, Image.Resampling.NEAREST)) >= KEPT


class Paster:
    """Puts what the masks keep back into the images that are saved, from sources of their own size.

    Args:
        masks: of `find_masks`.
        sources: reads the sources.
    """

    def __init__(self, masks: dict[str, Path], sources: Sources):
        self.masks, self.sources = masks, sources

    def __call__(self, image: Image.Image, row: dict) -> Image.Image:
        """An image at the size at which it is saved, with what its source's mask keeps.

        Args:
            row: of metadata.jsonl, whose `source` says where the image comes from.
        """
        if row["source"] not in self.masks:
            return image
        kept = read_mask(self.masks[row["source"]], image.size)
        source = resize(self.sources.read(row["source"])[0], image.size)
        return Image.fromarray(np.where(kept[..., None], np.asarray(source), np.asarray(image)))
