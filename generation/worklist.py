"""The work list of a spectrum: every image to draw, in batches of one shape, shared out among processes.

Pure Python, so that a million images are planned in seconds before any model is loaded. The batches follow from the
plan and the batch size alone, not from the shards or from the images that exist already: an image is always drawn
beside the same others, and comes out the same to the last bit.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from runtime.cli import UserError
from spectrum.units import Unit

# So many sources pass through all levels and seeds before the next ones begin. This bounds the memory for encoded
# sources (1 GB for this many at 1024x1024).
GROUP = 2048


class Batch(NamedTuple):
    """Work units that are drawn together: of one level, one size in pixels (width, height) and one LoRA adapter.

    The adapter is None where all units are drawn with the same.
    """

    level: int
    size: tuple[int, int]
    adapter: str | None
    units: list[Unit]


def steps_at(level: int, steps: int, by_noise: bool = False) -> int:
    """Denoising steps that a level runs: round(steps * (100 - level) / 100), at least 1.

    Args:
        by_noise: round up instead, for levels by noise (`noise_at`): no step is longer than those of level 0.
    """
    # Whole numbers: int(50 * (1 - 0.9)) would be 4.
    return -(-steps * (100 - level) // 100) if by_noise else max(1, (2 * steps * (100 - level) + 100) // 200)


def noise_at(level: int, steps: int) -> list[float]:
    """Where each step of a level by noise begins, as a share of the noise schedule: from (100 - level) / 100, evenly.

    A model of 4 steps denoises level 0 from 1, 0.75, 0.5 and 0.25, level 70 from 0.3 and 0.15.
    """
    run = steps_at(level, steps, by_noise=True)
    return [(100 - level) * (run - step) / (100 * run) for step in range(run)]


def check_steps(levels: Iterable[int], steps: int) -> None:
    """Raise UserError where two levels come to the same number of denoising steps."""
    by_steps: dict[int, int] = {}
    for level in sorted(set(levels)):
        other = by_steps.setdefault(steps_at(level, steps), level)
        if other != level:
            raise UserError(
                f"--levels {other} {level}: both are {steps_at(level, steps)} of --steps {steps}; expected levels that "
                "differ, more steps, or --levels-by noise"
            )


def order_units(seeds: dict[str, int], levels: list[int]) -> Iterator[Unit]:
    """Every unit of a plan: by group of sources, then level, source and seed.

    Args:
        seeds: how many images of a level each source has.
    """
    sources = list(seeds)
    for start in range(0, len(sources), GROUP):
        for level in levels:
            for source in sources[start : start + GROUP]:
                for seed in range(seeds[source]):
                    yield Unit(source, level, seed)


def make_batches(
    units: Iterable[Unit],
    size_of: Callable[[str], tuple[int, int]],
    batch_size: int,
    adapter_of: Callable[[Unit], str | None] = lambda unit: None,
) -> list[Batch]:
    """Full batches in the order in which they fill up, then the batches that stay short.

    Args:
        size_of: width and height in pixels at which a source is drawn.
        adapter_of: name of the adapter that a unit is drawn with, or None.
    """
    batches, filling = [], {}
    sizes: dict[str, tuple[int, int]] = {}  # asked once for each source, not for each of its units
    for unit in units:
        if unit.source not in sizes:
            sizes[unit.source] = size_of(unit.source)
        kind = (unit.level, sizes[unit.source], adapter_of(unit))
        group = filling.setdefault(kind, [])
        group.append(unit)
        if len(group) == batch_size:
            batches.append(Batch(*kind, filling.pop(kind)))
    return batches + [Batch(*kind, group) for kind, group in filling.items()]


def cost(batch: Batch, steps: int) -> int:
    """UNet work of a batch whose images take so many steps: steps times images times pixels."""
    return steps * len(batch.units) * batch.size[0] * batch.size[1]


def share_out(batches: list[Batch], steps_of: Callable[[int], int], shards: int) -> list[list[Batch]]:
    """The batches of each shard, in their own order: the costliest first, each to the shard with the least work.

    The shares differ by no more than the costliest batch, and whatever the number of shards, together they hold every
    batch once.

    Args:
        steps_of: denoising steps of a level.
    """
    work = [(0, shard) for shard in range(shards)]
    owner = [0] * len(batches)
    costs = [cost(batch, steps_of(batch.level)) for batch in batches]
    for place in sorted(range(len(batches)), key=lambda place: (-costs[place], place)):
        done, owner[place] = work[0]
        heapq.heapreplace(work, (done + costs[place], owner[place]))
    shares: list[list[Batch]] = [[] for _ in range(shards)]
    for batch, shard in zip(batches, owner, strict=True):
        shares[shard].append(batch)
    return shares
