"""Sources of the batches to come, read in the background."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from generation.sizes import resize
from loaders.sources import Sources
from runtime.cli import UserError


class Prefetcher:
    """Reads the sources of a batch in the background, at the size at which they are drawn.

    Args:
        prepare: what else to make of each source at its own size, if anything.
        sizes: width and height that sources must have.

    Attributes:
        sha256: of each source that was read.
        prepared: what `prepare` made of the sources that `finish` gave, until it is taken away.
        unreadable: why, for each source that could not be read.
    """

    def __init__(self, sources: Sources, unreadable: dict[str, str], prepare: Callable | None = None, sizes=()):
        self.sources, self.unreadable, self.pool = sources, dict(unreadable), ThreadPoolExecutor(4)
        self.prepare, self.sizes = prepare, dict(sizes)
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
        noted = self.sizes.get(name, image.size)
        if noted != image.size:
            what = f"is {image.size[0]}x{image.size[1]}, and was {noted[0]}x{noted[1]} when the spectrum was begun"
            return None, f"source {name}: {what}; expected the same image", None
        return resize(image, size), sha256, self.prepare(image) if self.prepare else None
