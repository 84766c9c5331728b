"""Generative curricula: which guidance levels, and which images, an epoch trains on. Pure functions, no torch.

Levels are whole percents: 0 is text only, REAL (100) the real image, which is a level like the others: its stage keeps
the mix of the curriculum. An epoch without a level comes after the curriculum and trains on all real images. The names
are those of the DisCL paper's ablations; `d2s` (diverse to specific) is its long-tail curriculum.
"""

from __future__ import annotations

import random

import numpy as np

from runtime.text import UserError, counted

REAL = 100  # the guidance level of a real image
# Every curriculum, for --help and in a table's order. A new one needs its name here and its levels in `epoch_levels`.
CURRICULA = {
    "none": "real images alone",
    "text_only": "level 0",
    "fixed": "--fixed-level",
    "all": "all levels at once",
    "d2s": "from diverse (the lowest level) to specific",
    "s2d": "the reverse",
    "random": "a random level each epoch",
    "cyclic": "up and down, a level an epoch",
    "adaptive": "the level on which the model progresses most",
}


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
    """The guidance levels whose images epoch `epoch` draws from.

    Args:
        curriculum: one of CURRICULA.
        epoch: from 0.
        curriculum_epochs: epochs from this one on have all real images, whatever the curriculum.
        levels: of the curriculum in percent, in any order; REAL may be one of them.
        fixed_level: the level of `fixed`.
        seed: decides the draws of `random`.
        shares: time of each level in `d2s` and `s2d`, in the order of ascending levels; equal where none are given.
        progress: what `adaptive` chooses by: the progress (`progress_of`) of each level before this epoch.

    Returns:
        Ascending levels; empty after the curriculum. The stages of `d2s` and `s2d` are as long as `stage_lengths` says.
        `cyclic` takes another level each epoch, up and down: levels a, b, c give a b c b a b c b ...

    Raises:
        UserError: no such curriculum, or a stage without an epoch.
    """
    if curriculum not in CURRICULA:
        raise UserError(f"--curriculum {curriculum}: unknown; expected one of {', '.join(CURRICULA)}")
    if curriculum == "none" or epoch >= curriculum_epochs:
        return []
    levels = sorted(set(levels))
    # The same levels in every epoch, a draw, a walk up and down, or by the progress.
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
    # d2s and s2d: one stage after the other.
    if shares is not None and len(shares) != len(levels):
        raise UserError(f"--level-shares: {len(shares)} given; expected one for each of the levels {levels}")
    shares = [1.0] * len(levels) if shares is None else shares
    direction = slice(None, None, -1 if curriculum == "s2d" else 1)
    return [stage_level(epoch, curriculum_epochs, levels[direction], shares[direction])]


def stage_level(epoch: int, epochs: int, levels: list[int], shares: list[float]) -> int:
    """The level of epoch `epoch` where each of the levels, in this order, has its share of the epochs.

    Raises:
        UserError: too few epochs for the levels.
    """
    lengths = stage_lengths(epochs, shares)
    if any(share and not length for share, length in zip(shares, lengths, strict=True)):
        some = sorted(level for level, share in zip(levels, shares, strict=True) if share)
        raise UserError(
            f"--curriculum-epochs {epochs}: expected at least one for each of the {len(some)} levels {some}"
        )
    return levels[int(np.searchsorted(np.cumsum(lengths), epoch, side="right"))]


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


def describe_schedule(
    curriculum: str,
    epochs: int,
    curriculum_epochs: int,
    levels: list[int],
    fixed_level: int = 50,
    shares: list[float] | None = None,
) -> str:
    """The whole schedule in words: "12 epochs of level 0, 12 of level 10, then 5 of all real images"."""
    if curriculum == "none":
        return f"{counted(epochs, 'epoch')} of all real images"
    parts: list[tuple[int, str]] = []
    if curriculum in ("random", "cyclic", "adaptive"):
        names = ", ".join(str(level) for level in sorted(set(levels)))
        parts.append((curriculum_epochs, f"one of the levels {names} ({curriculum})"))
    else:
        for epoch in range(curriculum_epochs):
            stage = epoch_levels(curriculum, epoch, curriculum_epochs, levels, fixed_level, shares=shares)
            what = f"level{'s' * (len(stage) > 1)} {', '.join(str(level) for level in stage)}"
            if parts and parts[-1][1] == what:
                parts[-1] = (parts[-1][0] + 1, what)
            else:
                parts.append((1, what))
    words = [f"{count if number else counted(count, 'epoch')} of {what}" for number, (count, what) in enumerate(parts)]
    if epochs > curriculum_epochs:
        words.append(f"then {epochs - curriculum_epochs} of all real images")
    return ", ".join(words)


def needed_levels(curriculum: str, levels: list[int], fixed_level: int) -> list[int]:
    """The levels that a curriculum can ask for in any epoch."""
    return {"none": [], "text_only": [0], "fixed": [fixed_level]}.get(curriculum, sorted(set(levels)))


# ---------------------------------------------------------------------------------------------------------------------
# adaptive: the level on which the model makes most progress (DisCL, after DoCL). Progress is measured on a validation
# set of hard images that have every level, one image a level, which is never trained on.


def progress_of(before: np.ndarray, after: np.ndarray) -> float:
    """The progress of one level by a pass over uniform real images (DisCL, Algorithm 2).

    Args:
        before: the true class's probability of each validation image before the pass, in [0, 1], (V,).
        after: the same after it, (V,).

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
    if not by_level:
        raise UserError(f"--levels {REAL}: --curriculum adaptive has no level to choose; expected a level below {REAL}")
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


# ---------------------------------------------------------------------------------------------------------------------
# the mix: which images of the pool (real ones first, then synthetic ones) an epoch trains on


def long_tail_epoch(
    levels: np.ndarray,
    labels: np.ndarray,
    held: np.ndarray,
    is_hard: np.ndarray,
    stage: list[int],
    hard_share: float,
    keep_others: float,
    fill_balanced: bool,
    rng: np.random.Generator,
) -> np.ndarray:
    """The images that an epoch of a long-tailed data set trains on (DisCL), before shuffling.

    After the curriculum (no stage) all real images. Within it the mix of `stage_mix` or `balanced_mix`, filled up from
    the images of the stage's levels; where REAL is one, real images of hard classes are repeated.

    Args:
        levels, labels: of each image of the pool, int (N,); a real image's level is REAL.
        held: whether an image is kept out of the curriculum, bool (N,).
        is_hard: whether a class is hard, bool (C,).
        stage: the epoch's levels.

    Returns:
        Indices into the pool, int (n,); ascending levels, real images first.
    """
    real = np.flatnonzero(levels == REAL)
    if not stage:
        return real
    real = real[~held[real]]
    candidates = np.flatnonzero(np.isin(levels, stage) & is_hard[labels] & ~held)
    if fill_balanced:
        kept, drawn = balanced_mix(labels[real], is_hard, labels[candidates], hard_share, keep_others, rng)
    else:
        kept, drawn = stage_mix(labels[real], is_hard, len(candidates), hard_share, keep_others, rng)
    fill = candidates[drawn]
    return np.concatenate([real[kept], fill[np.argsort(levels[fill], kind="stable")]])


def stage_mix(
    labels: np.ndarray,
    is_hard: np.ndarray,
    candidates: int,
    hard_share: float,
    keep_others: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """What one epoch of a long-tail curriculum trains on (DisCL).

    All real images of the hard classes stay in. Of the others a random share stays. Candidates fill up until
    hard-class images are `hard_share` of the whole: each at most once while there are enough, else all of them as often
    as possible and the rest at random.

    Args:
        labels: class of each real training image, int (N,).
        is_hard: whether a class is hard, bool (C,).
        candidates: how many images there are to fill up with, at least 1.
        hard_share: in [0, 1).
        keep_others: share of the non-hard images that stays, in [0, 1].
        rng: decides the draws.

    Returns:
        Indices of real images, and of candidates.
    """
    hard = np.flatnonzero(is_hard[labels])
    others = rng.permutation(np.flatnonzero(~is_hard[labels]))
    others = others[: round(len(others) * keep_others)]
    wanted = max(0, round(len(others) * hard_share / (1 - hard_share)) - len(hard))
    rounds, rest = divmod(wanted, candidates)
    drawn = np.concatenate([np.tile(np.arange(candidates), rounds), rng.permutation(candidates)[:rest]])
    return np.concatenate([hard, others]), drawn


def balanced_mix(
    labels: np.ndarray,
    is_hard: np.ndarray,
    candidate_labels: np.ndarray,
    hard_share: float,
    keep_others: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """`stage_mix` that fills every hard class up to one size, instead of drawing from all candidates alike.

    The size is the one at which the hard classes together are `hard_share` of the whole. A class with more real images
    keeps them, and one without a candidate stays as it is. Within a class each candidate is drawn at most once while
    there are enough, else all of them as often as possible and the rest at random.

    Args:
        candidate_labels: class of each candidate, int (M,).

    Returns:
        Indices of real images, and of candidates.
    """
    hard = np.flatnonzero(is_hard[labels])
    others = rng.permutation(np.flatnonzero(~is_hard[labels]))
    others = others[: round(len(others) * keep_others)]

    # How many more images each hard class needs.
    wanted = round(len(others) * hard_share / (1 - hard_share))
    classes = np.flatnonzero(is_hard)
    needed = np.zeros(len(is_hard), dtype=int)
    needed[classes] = wanted // len(classes)
    needed[rng.permutation(classes)[: wanted % len(classes)]] += 1
    needed -= np.bincount(labels, minlength=len(is_hard))

    # Draw them, class by class.
    drawn, by_label = [np.zeros(0, dtype=int)], places_by_label(candidate_labels, len(is_hard))
    for label in classes:
        of_class = by_label[label]
        if len(of_class) and needed[label] > 0:
            rounds, rest = divmod(int(needed[label]), len(of_class))
            drawn += [np.tile(of_class, rounds), rng.permutation(of_class)[:rest]]
    return np.concatenate([hard, others]), np.concatenate(drawn)


def replaced_epoch(
    levels: np.ndarray,
    source_ids: np.ndarray,
    held: np.ndarray,
    is_hard: np.ndarray,
    stage: list[int],
    per_hard_image: int | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """The images that an epoch of low-quality data trains on (DisCL, Algorithm 2), before shuffling.

    After the curriculum (no stage) all real images. Within it every real image that is not hard, and in place of the
    hard ones all images of the stage's levels; where REAL is one, the hard images themselves.

    Args:
        levels: of each image of the pool, int (N,); a real image's level is REAL.
        source_ids: a number for each image of the pool, the same for all of one source, int (N,).
        held: whether an image is kept out of the curriculum, bool (N,).
        is_hard: whether an image is a hard real one or was made from one, bool (N,).
        stage: the epoch's levels.
        per_hard_image: at most so many images, drawn at random, in place of a hard one, which stays where there is
            none; None: all of them, and a hard image without one is left out.

    Returns:
        Indices into the pool, int (n,), ascending but for the draw of `per_hard_image`.
    """
    real = levels == REAL
    if not stage:
        return np.flatnonzero(real)
    others = np.flatnonzero(real & ~is_hard & ~held)
    candidates = np.flatnonzero(np.isin(levels, stage) & is_hard & ~held)
    if per_hard_image is None:
        return np.concatenate([others, candidates])

    # The first few of each source in a random order; a source without any keeps its real image.
    shuffled = rng.permutation(candidates)
    by_source = shuffled[np.argsort(source_ids[shuffled], kind="stable")]
    _, first, counts = np.unique(source_ids[by_source], return_index=True, return_counts=True)
    position = np.arange(len(by_source)) - np.repeat(first, counts)
    bare = real & is_hard & ~held & ~np.isin(source_ids, source_ids[candidates])
    return np.concatenate([others, np.flatnonzero(bare), by_source[position < per_hard_image]])


# ---------------------------------------------------------------------------------------------------------------------
# additions: all real images, and edits of some of them besides (ALIA)


def addition_counts(asked: str, labels: np.ndarray, classes: int, like: np.ndarray | None = None) -> np.ndarray | None:
    """How many edits of each class an epoch adds, int (C,); None for one of every source that has any.

    Args:
        asked: `all`; a whole number of edits, or a share of the real images, both shared out by the classes' counts;
            `like` for the counts of `like`.
        labels: of the real images, int (N,).
        like: counts of a further real data set, (C,).

    Raises:
        UserError: none of these.
    """
    if asked == "all":
        return None
    if asked == "like":
        return like
    try:
        number = float(asked)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf") or (number > 1 and number != int(number)):
        raise UserError(f"--add {asked}: expected all, a number of edits, a share of the real images, or like:FILE")
    total = int(number) if "." not in asked else round(number * len(labels))
    exact = total * np.bincount(labels, minlength=classes) / len(labels)
    counts = exact.astype(int)
    for label in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:  # largest remainders first
        counts[label] += 1
    return counts


def choose_additions(
    labels: np.ndarray, sources: list[str], wanted: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """Edits to add, as indices: one at random of each source; of these each class's share, drawn with replacement where
    there are too few. A class without an edit is passed over (ALIA).

    Args:
        labels: class of each edit, int (M,).
        sources: the real image that each edit was made from.
        wanted: edits of each class, (C,); None for one of every source.
    """
    by_source: dict[str, list[int]] = {}
    for place, source in enumerate(sources):
        by_source.setdefault(source, []).append(place)
    chosen = np.array([places[rng.integers(len(places))] for places in by_source.values()], dtype=int)
    if wanted is None:
        return chosen
    parts, by_label = [np.zeros(0, dtype=int)], places_by_label(labels[chosen], len(wanted))
    for label in np.flatnonzero(wanted):
        own = chosen[by_label[label]]
        if len(own):
            parts.append(rng.choice(own, wanted[label], replace=len(own) < wanted[label]))
    return np.concatenate(parts)


def places_by_label(labels: np.ndarray, classes: int) -> list[np.ndarray]:
    """The places of each class's images, ascending: one sort, which a search for each of 8,142 classes outlasts.

    Args:
        labels: int (N,), below `classes`.
    """
    ends = np.cumsum(np.bincount(labels, minlength=classes))
    return np.split(np.argsort(labels, kind="stable"), ends[:-1])


def repeat_to(places: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` of the places: all of them as often as possible, and the rest at random."""
    rounds, rest = divmod(size, len(places))
    return np.concatenate([np.tile(places, rounds), rng.permutation(places)[:rest]])
