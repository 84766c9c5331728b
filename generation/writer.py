"""Pictures in and out of a spectrum: sources of any kind as RGB, sizes, and files written whole in the background."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from loaders.base import ImageSet
from loaders.sources import read_sources
from runtime.cli import UserError
from spectrum import folder as spectrum_folder

# How each format is saved. Chroma is not subsampled in JPEG: small coloured things (digits, birds) would lose colour.
SAVE_OPTIONS = {
    "png": {"format": "PNG"},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "quality": 95},
}
# Bytes a pixel of photographs, for estimates before there are images to go by.
BYTES_PER_PIXEL = {"png": 1.7, "jpg": 0.6, "webp": 0.4}
AHEAD = 4  # batches that may wait to be written before drawing waits for the disk


def round_size(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Width and height, each rounded to the nearest multiple (halves down), at least one: 480x270 to 480x272 for 8."""
    width, height = (max(multiple, (2 * side + multiple - 1) // (2 * multiple) * multiple) for side in size)
    return width, height


def draw_size(source: tuple[int, int], asked: str | tuple[int, int], native: int, multiple: int) -> tuple[int, int]:
    """The size at which a source is drawn.

    Args:
        source: the source's own width and height.
        asked: `source` (its own size), `native` (scaled, shape kept, to the area of native x native), or width and
            height.
        native: side in pixels that the generator was made for.
        multiple: what the generator's sides must divide by.
    """
    if asked == "native":
        scale = native / (source[0] * source[1]) ** 0.5
        return round_size((round(source[0] * scale), round(source[1] * scale)), multiple)
    return round_size(source if asked == "source" else asked, multiple)


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
        if name in self.places or self.data_root is None or name.startswith("index:"):
            return self.read(name)[0].size
        if Path(name).is_absolute() or ".." in Path(name).parts or not (self.data_root / name).is_file():
            return self.read(name)[0].size  # which says what is wrong with it
        try:
            with Image.open(self.data_root / name) as image:
                turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5 to 8 lie on their side
                return image.size[::-1] if turned else image.size
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"source {name}: not a readable image ({error})") from None


class Reader:
    """Reads the sources of a batch in the background, at the size at which they are drawn.

    Args:
        prepare: what else to make of each source at its own size, if anything.

    Attributes:
        sha256: of each source that was read.
        prepared: what `prepare` made of the sources that `finish` gave, until it is taken away.
        unreadable: why, for each source that could not be read.
    """

    def __init__(self, sources: Sources, unreadable: dict[str, str], prepare: Callable | None = None):
        self.sources, self.unreadable, self.pool = sources, dict(unreadable), ThreadPoolExecutor(4)
        self.prepare = prepare
        self.sha256: dict[str, str] = {}
        self.prepared: dict = {}
        self.begun: dict[tuple, object] = {}

    def begin(self, names: list[str], size: tuple[int, int]) -> None:
        """Begin to read."""
        for name in names:
            if name not in self.unreadable and (name, size) not in self.begun:
                self.begun[name, size] = self.pool.submit(self._read, name, size)

    def finish(self, names: list[str], size: tuple[int, int]) -> dict:
        """The images of these sources, but for the unreadable ones."""
        self.begin(names, size)
        found = {}
        for name in names:
            if name not in self.unreadable:
                image, about, prepared = self.begun.pop((name, size)).result()
                if image is None:
                    self.unreadable[name] = about
                else:
                    found[name], self.sha256[name] = image, about
                    if self.prepare:
                        self.prepared[name] = prepared
        return found

    def digest(self, name: str) -> str:
        """The sha256 of a source, which is read for it alone where nothing else needed it."""
        if name not in self.sha256:
            self.sha256[name] = self.sources.sha256(name)
        return self.sha256[name]

    def _read(self, name: str, size: tuple[int, int]) -> tuple:
        """The image, its sha256, and what `prepare` makes of it; None, why not, and None where it cannot be read."""
        try:
            image, sha256 = self.sources.read(name)
        except UserError as error:
            return None, str(error), None
        return resize(image, size), sha256, self.prepare(image) if self.prepare else None


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image at this width and height, by the Lanczos filter; itself where it has them."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def save_image(pixels: np.ndarray, path: Path, size: tuple[int, int] | None = None) -> None:
    """Save pixels, uint8 (H, W, 3), under their final name, whole or not at all, resized to width and height `size`."""
    image = Image.fromarray(pixels)
    image = image if size is None else resize(image, size)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        image.save(beside, **SAVE_OPTIONS[path.suffix[1:]])
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


class ImageWriter:
    """Saves batches of images and then their rows, in order, while the next ones are being drawn.

    Use it as a context: on leaving, whatever was handed over is on the disk, also after an error.

    Attributes:
        rejected: rows of the images that were not good and were not saved.
        seen: images handed over so far and looked at.
        waited: seconds for which `put` had to wait for the disk.
    """

    def __init__(self, shard: Path):
        self.shard = shard
        for unfinished in shard.glob(".*.tmp"):  # what a killed run was writing
            unfinished.unlink()
        self.rows = spectrum_folder.RowWriter(shard)
        self.rejected: list[dict] = []
        self.seen = self.saved = 0
        self.waited = 0.0
        self._room = threading.Semaphore(AHEAD)
        self._error: Exception | None = None
        self._line = ThreadPoolExecutor(1, "rows")  # one batch after another
        self._encoders = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "images")
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
            way_out = "free some space and " if self._error.errno == errno.ENOSPC else ""
            raise UserError(
                f"{what}: {self._error.strerror or self._error}; {self.saved} images were saved, "
                f"{way_out}run the same command again to go on"
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
        save_image(pixels, self.shard / row["file_name"], (row["width"], row["height"]))
