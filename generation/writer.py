"""Images of a spectrum and their rows, written whole in the background."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from generation.sizes import resize
from runtime import files
from runtime.cli import UserError, is_full_disk
from runtime.device import count_cores
from runtime.retry import retry

# How each format is saved. Chroma is not subsampled in JPEG: small coloured things (digits, birds) would lose colour.
SAVE_OPTIONS = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "quality": 95},
}
# Bytes a pixel of photographs, for estimates before there are images to go by.
BYTES_PER_PIXEL = {"png": 1.7, "jpg": 0.6, "webp": 0.4}
AHEAD = 4  # batches that may wait to be written before drawing waits for the disk


def as_saved(image: Image.Image, suffix: str) -> Image.Image:
    """What a file of this format will hold of an image: jpg and webp lose some of it."""
    if suffix == "png":
        return image
    content = io.BytesIO()
    image.save(content, **SAVE_OPTIONS[suffix])
    return Image.open(content).convert("RGB")


def save_image(image: Image.Image, path: Path) -> None:
    """Save an image under its final name, whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")

    def save() -> None:
        image.save(beside, **SAVE_OPTIONS[path.suffix[1:]])
        beside.replace(path)

    try:
        retry(save)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


class ImageWriter:
    """Saves batches of images and then their rows, in order, while the next ones are being drawn.

    Use it as a context: on leaving, whatever was handed over is on the disk, also after an error.

    Args:
        shard: the folder to write to.
        retouch: changes an image at the size at which it is saved, given its row; None leaves it as drawn.

    Attributes:
        rejected: rows of the images that were not good and were not saved.
        seen: images handed over so far and looked at.
        waited: seconds for which `put` had to wait for the disk.
    """

    def __init__(self, shard: Path, retouch: Callable[[Image.Image, dict], Image.Image] | None = None):
        self.shard, self.retouch = shard, retouch
        for unfinished in shard.glob(".*.tmp"):  # what a killed run was writing
            unfinished.unlink()
        self.rows = files.RowWriter(shard)
        self.rejected: list[dict] = []
        self.seen = self.saved = 0
        self.waited = 0.0
        self._room = threading.Semaphore(AHEAD)
        self._error: Exception | None = None
        self._line = ThreadPoolExecutor(1, "rows")  # one batch after another
        self._encoders = ThreadPoolExecutor(min(8, count_cores()), "images")
        self._last: Future | None = None

    def put(self, images, good, ready, rows: list[dict | None]) -> None:
        """Hand over a batch.

        Args:
            images: uint8 tensor (N, H, W, 3) on the CPU.
            good: bool tensor (N,) on the CPU: False for images that must not be saved.
            ready: called before either is looked at; returns when they are there.
            rows: a row for metadata.jsonl for each image, whose width and height are the size to save at, or None
                where the image is not to be saved.

        Raises:
            UserError: an earlier batch could not be written.
        """
        began = time.monotonic()
        self._room.acquire()
        self.waited += time.monotonic() - began
        self._stop_on_error()
        self._last = self._line.submit(self._write, images, good, ready, rows)

    def drain(self) -> None:
        """Wait until everything handed over is on the disk.

        Raises:
            UserError: something could not be written.
        """
        if self._last is not None:
            self._last.result()
        self._stop_on_error()

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, kind, *_) -> None:
        self._line.shutdown()
        self._encoders.shutdown()
        try:
            self.rows.close()
        except OSError as error:  # a full disk: rows that did not fit are written out once more
            self._error = self._error or error
        if kind is None:
            self._stop_on_error()

    def _stop_on_error(self) -> None:
        if self._error is not None:
            if not isinstance(self._error, OSError):
                raise self._error
            what = self._error.filename or self.shard
            way_out = "free some space and " if is_full_disk(self._error) else ""
            raise UserError(
                f"{what}: {self._error.strerror or self._error}; {self.saved} images were saved, "
                f"{way_out}run the same command again to resume"
            )

    def _write(self, images, good, ready, rows: list[dict | None]) -> None:
        try:
            if self._error is None:
                ready()
                made = [made for made in zip(images.numpy(), good.tolist(), rows, strict=True) if made[2]]
                kept = [(pixels, row) for pixels, fine, row in made if fine]
                list(self._encoders.map(self._save, kept))
                self.rows.append([row for _, row in kept])
                self.rejected += [row for _, fine, row in made if not fine]
                self.seen += len(made)
                self.saved += len(kept)
        except Exception as error:  # of this thread: `put` and `drain` raise it
            self._error = error
        finally:
            self._room.release()

    def _save(self, item: tuple[np.ndarray, dict]) -> None:
        pixels, row = item
        image = resize(Image.fromarray(pixels), (row["width"], row["height"]))
        save_image(self.retouch(image, row) if self.retouch else image, self.shard / row["file_name"])
