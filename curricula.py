"""Generative curricula: which guidance levels an epoch trains on. Pure functions, no torch, no state.

Levels are whole percents: 0 is text only, 100 the real image. An epoch without a level trains on real images alone.
The names are those of the DisCL paper's ablations; `d2s` (diverse to specific) is its long-tail curriculum.
"""

from __future__ import annotations

import random

import numpy as np

from runtime.cli import UserError

CURRICULA = ("none", "text_only", "fixed", "all", "d2s", "s2d", "random", "cyclic", "adaptive")


def epoch_levels(
    curriculum: str,
    epoch: int,
    curriculum_epochs: int,
    levels: list[int],
    fixed_level: int = 50,
    seed: int = 0,
    shares: list[float] | None = None,
    progress: dict[int, float] | None = None,
) -> list[int]:
    """The guidance levels whose synthetic images join epoch `epoch`.

    Args:
        curriculum: one of CURRICULA.
        epoch: from 0.
        curriculum_epochs: epochs from this one on are real only, whatever the curriculum.
        levels: the spectrum's levels in percent, in any order.
        fixed_level: the level of `fixed`.
        seed: decides the draws of `random`.
        shares: time of each level in `d2s` and `s2d`, in the order of ascending levels; equal where none are given.
        progress: what `adaptive` chooses by: the progress (`progress_of`) of each level at the look before this epoch.

    Returns:
        Ascending levels; empty for real only. The stages of `d2s` and `s2d` are as long as `stage_lengths` says.
        `cyclic` takes another level each epoch, up and down: levels a, b, c give a b c b a b c b ...

    Raises:
        UserError: no such curriculum, or a stage without an epoch.
    """
    if curriculum not in CURRICULA:
        raise UserError(f"--curriculum {curriculum}: unknown; expected one of {', '.join(CURRICULA)}")
    if curriculum == "none" or epoch >= curriculum_epochs:
        return []
    levels = sorted(set(levels))
    if curriculum == "text_only":
        return [0]
    if curriculum == "fixed":
        return [fixed_level]
    if curriculum == "all":
        return levels
    if curriculum == "random":
        # A generator of its own for each epoch: a resumed run draws what an uninterrupted one would have.
        return [random.Random(f"{seed} {epoch}").choice(levels)]
    if curriculum == "cyclic":
        there_and_back = levels + levels[-2:0:-1]
        return [there_and_back[epoch % len(there_and_back)]]
    if curriculum == "adaptive":
        return [most_progress({level: progress[level] for level in levels})]
    if shares is not None and len(shares) != len(levels):
        raise UserError(f"--level-shares: {len(shares)} given; expected one for each of the levels {levels}")
    shares = [1.0] * len(levels) if shares is None else list(shares)
    if curriculum == "s2d":
        levels, shares = levels[::-1], shares[::-1]
    lengths = stage_lengths(curriculum_epochs, shares)
    some = [level for level, share in zip(levels, shares, strict=True) if share]
    if any(share and not length for share, length in zip(shares, lengths, strict=True)):
        raise UserError(
            f"--curriculum-epochs {curriculum_epochs}: expected at least one for each of the {len(some)} levels "
            f"{sorted(some)}"
        )
    ends = np.cumsum(lengths)
    return [levels[int(np.searchsorted(ends, epoch, side="right"))]]


def stage_lengths(epochs: int, shares: list[float]) -> list[int]:
    """Epochs of each stage: its share of `epochs`, rounded down; those left over go one each to the earliest (DisCL)
    that have a share.

    A stage whose share is above 0 may still come out with no epoch, where there are too few.
    """
    total = sum(shares)
    if min(shares) < 0 or total <= 0:
        raise UserError(f"--level-shares {shares}: expected numbers of 0 or more that are not all 0")
    # The small addend keeps 10 * 0.3 at 3 where the product comes out below it.
    lengths = [int(epochs * share / total + 1e-9) for share in shares]
    for stage in [stage for stage, share in enumerate(shares) if share][: epochs - sum(lengths)]:
        lengths[stage] += 1
    return lengths


def needed_levels(curriculum: str, levels: list[int], fixed_level: int) -> list[int]:
    """The levels that a curriculum can ask for in any epoch."""
    return {"none": [], "text_only": [0], "fixed": [fixed_level]}.get(curriculum, sorted(set(levels)))


# ---------------------------------------------------------------------------------------------------------------------
# adaptive: the level on which the model makes most progress (DisCL, after DoCL). Progress is measured on a validation
# set of hard images that have every level, one image a level, which is never trained on.


def progress_of(before: np.ndarray, after: np.ndarray) -> float:
    """The progress of one level between two looks.

    Args:
        before: the true class's probability of each validation image at the last look, in [0, 1], (V,).
        after: the same at this look, (V,).

    Returns:
        The mean change; changes further than 1.5 interquartile ranges outside the quartiles are dropped (DisCL).
    """
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    low, high = np.quantile(change, [0.25, 0.75])
    margin = 1.5 * (high - low)
    return float(change[(change >= low - margin) & (change <= high + margin)].mean())


def most_progress(progress: dict[int, float]) -> int:
    """The level with the largest progress; of equal ones the lowest, which is the most diverse."""
    return max(sorted(progress), key=lambda level: progress[level])


def held_out_sources(
    by_level: dict[int, list[str]], labels: dict[str, int], counts: np.ndarray, size: int, seed: int
) -> list[str]:
    """The hard images that `adaptive` measures progress on: they and their synthetic images are kept out of training.

    A source is passed over where it would take a class's last real image, or the last synthetic image of a level.

    Args:
        by_level: for each level the source of each of its synthetic images.
        labels: class of each source.
        counts: real training images of each class, (C,).
        size: sources wanted, at least 1.
        seed: decides the draw.

    Returns:
        At most `size` sources, sorted; each has a synthetic image of every level.

    Raises:
        UserError: no source can be held out.
    """
    everywhere = set.intersection(*(set(sources) for sources in by_level.values()))
    left = counts.copy()
    images = {level: {} for level in by_level}
    for level, sources in by_level.items():
        for source in sources:
            images[level][source] = images[level].get(source, 0) + 1
    pool = {level: len(sources) for level, sources in by_level.items()}
    order = sorted(everywhere)
    random.Random(f"held out {seed}").shuffle(order)
    chosen = []
    for source in order:
        if left[labels[source]] > 1 and all(pool[level] > images[level][source] for level in pool):
            left[labels[source]] -= 1
            for level in pool:
                pool[level] -= images[level][source]
            chosen.append(source)
        if len(chosen) == size:
            break
    if not chosen:
        raise UserError(
            f"--curriculum adaptive: no hard image can be held out; expected one with an accepted image of every "
            f"level {sorted(by_level)}, in a class of two or more images"
        )
    return sorted(chosen)
