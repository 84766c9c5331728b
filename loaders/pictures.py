"""From an image file, or pixels in memory, to RGB and a digest."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from runtime.cli import UserError


def read_image_file(path: Path, what: str) -> tuple[Image.Image, str]:
    """The image of a file, upright and as RGB, and the sha256 of the file's bytes.

    Raises:
        UserError: no such file, or one that does not decode; the message begins with `what`.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            return to_rgb(image), hashlib.sha256(content).hexdigest()
    except FileNotFoundError:
        raise UserError(f"{what}: no such file {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{what}: not a readable image ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as upright 8-bit RGB: 16 bits are scaled, not cut off; what is transparent becomes white."""
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
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not a readable image ({error}); run generate_spectrum.py again") from None


def decodes(path: Path) -> bool:
    """Whether an image file is whole."""
    return image_size(path) is not None


def image_size(path: Path) -> tuple[int, int] | None:
    """Width and height of an image file that is whole, else None."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.size
    except (OSError, ValueError, SyntaxError):
        return None
