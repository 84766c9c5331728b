"""From an image file, or pixels in memory, to RGB and a digest. Every reader of an image goes through this file.

Trainers, CLIP, the generator and the checks see one picture of a file: its first frame, turned as its EXIF says, 16
bits scaled to 8, transparent parts on white. Colour profiles are not applied, as in all published results.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.retry import read_bytes, retry
from runtime.text import UserError

ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 lie on their side


@contextmanager
def open_image(file: Path | BinaryIO, what: str, hint: str = "", whole: bool = False) -> Iterator[Image.Image]:
    """An image file, opened. Whatever a decoder raises within becomes one line that begins with `what`.

    Args:
        whole: read all of a file first; else, for who wants its size, no more than its head.

    Raises:
        UserError: no such file, or one that does not decode.
    """
    try:
        if whole and isinstance(file, Path):
            file = io.BytesIO(read_bytes(file))
        with retry(lambda: Image.open(file)) as image:
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{what}: no such file{hint}") from None
    except Exception as error:  # a damaged file can make a decoder raise any class
        raise UserError(f"{what}: not a readable image ({reason_of(error)}){hint}") from None


def reason_of(error: Exception) -> str:
    """What a decoder says is wrong, in one line and without addresses of objects."""
    if isinstance(error, UnidentifiedImageError):
        return "of no image format that is known"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r" at 0x[0-9a-f]+", "", first)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 where there is none, or none that can be read."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF says nothing about the pixels
        return 1
    return found if found in range(1, 9) else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image once it is upright; only its header is read."""
    return image.size[::-1] if orientation_of(image) >= 5 else image.size


def read_image_file(path: Path, what: str) -> tuple[Image.Image, str]:
    """The image of a file, upright and as RGB, and the sha256 of the file's bytes.

    Raises:
        UserError: no such file, or one that does not decode; the message begins with `what`.
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{what}: no such file {path}") from None
    except OSError as error:
        raise UserError(f"{what}: not a readable image ({error.strerror})") from None
    with open_image(io.BytesIO(content), what) as image:
        return to_rgb(image), hashlib.sha256(content).hexdigest()


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as upright 8-bit RGB: 16 bits are scaled, not cut off; transparent parts become white."""
    if orientation_of(image) > 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, or 32 that hold 16; convert() would clip at 255
        grey = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.clip(grey / 257 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def sha256_pixels(pixels: np.ndarray) -> str:
    """The sha256 of an image held in memory: uint8 (H, W, 3)."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def read_image(path: Path) -> Image.Image:
    """A synthetic image as RGB.

    Raises:
        UserError: it does not decode.
    """
    with open_image(path, str(path), "; run generate_spectrum.py again", whole=True) as image:
        return to_rgb(image)


def header_error(path: Path) -> str:
    """What is wrong with an image file as far as its header tells; empty where nothing is."""
    try:
        if not retry(path.stat).st_size:
            return "empty"
        with open_image(path, ""):
            return ""
    except FileNotFoundError:
        return "missing"
    except UserError as error:
        return str(error).removeprefix(": ")
    except OSError as error:
        return error.strerror


def decodes(path: Path) -> bool:
    """Whether an image file is whole."""
    return image_size(path) is not None


def image_size(path: Path) -> tuple[int, int] | None:
    """Width and height of an image file that is whole, else None."""
    try:
        with open_image(path, str(path), whole=True) as image:
            image.load()
            return image.size
    except UserError:
        return None
