"""Width and height of generated images: those of the source, rounded to a multiple that the generator needs."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from loaders.sources import Sources
from runtime.cli import UserError

TRIAL = 200  # sources that are looked at one after another at first
LONG_WAIT = 2e-4  # seconds for a file, as a network disk takes: a local one gives 20,000 heads of files a second


def round_size(size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Width and height, each rounded to the nearest multiple (halves down), at least one: 480x270 to 480x272 for 8."""
    width, height = (max(multiple, (2 * side + multiple - 1) // (2 * multiple) * multiple) for side in size)
    return width, height


def draw_size(
    source: tuple[int, int], asked: str | tuple[int, int], native: int, multiple: int, most: float = math.inf
) -> tuple[int, int]:
    """The size at which a source is drawn.

    Args:
        source: the source's own width and height.
        asked: `source` (its own size), `native` (scaled, shape kept, to the area of native x native), or width and
            height.
        native: side in pixels that the generator was made for.
        multiple: what the generator's sides must divide by.
        most: pixels from which up a source is drawn as `native` asks, where `source` is asked for.
    """
    if asked == "native" or (asked == "source" and source[0] * source[1] > most):
        scale = native / (source[0] * source[1]) ** 0.5
        return round_size((round(source[0] * scale), round(source[1] * scale)), multiple)
    return round_size(source if asked == "source" else asked, multiple)


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """An image at this width and height, by the Lanczos filter; itself where it has them."""
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def read_sizes(
    names: list[str], sources: Sources, must: bool = True
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Width and height of each source, and the reason for each that cannot be opened.

    Raises:
        UserError: a source of another data set, or, with `must`, not one that can be opened.
    """

    def look(name: str) -> tuple[int, int] | str:
        try:
            return sources.size(name)
        except UserError as error:
            if name not in sources.places and name.startswith("index:"):
                raise  # other data than hard.csv was made from: all of it is wrong, not this image
            return str(error)

    # Look at some, to see whether files are waited for: where they are not, threads cost three times as much as one.
    first, rest = names[:TRIAL], names[TRIAL:]
    began, busy = time.perf_counter(), time.thread_time()
    looked = list(map(look, first))
    waited = time.perf_counter() - began - (time.thread_time() - busy)
    if waited > LONG_WAIT * len(first):
        with ThreadPoolExecutor(8) as pool:
            looked += pool.map(look, rest)
    else:
        looked += map(look, rest)
    found = dict(zip(names, looked, strict=True))
    sizes = {name: size for name, size in found.items() if not isinstance(size, str)}
    unreadable = {name: why for name, why in found.items() if isinstance(why, str)}
    if must and not sizes:
        raise UserError(next(iter(unreadable.values())))
    return sizes, unreadable
