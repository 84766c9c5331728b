"""Generative curricula: which guidance levels an epoch trains on. Pure functions, no torch, no state.

Levels are whole percents: 0 is text only, 100 the real image. An epoch without a level trains on real images alone.
The names are those of the DisCL paper's ablations; `d2s` (diverse to specific) is its long-tail curriculum.
"""

from __future__ import annotations

import random

from cli import UserError

CURRICULA = ("none", "text_only", "fixed", "all", "d2s", "s2d", "random")


def epoch_levels(
    curriculum: str, epoch: int, curriculum_epochs: int, levels: list[int], fixed_level: int = 50, seed: int = 0
) -> list[int]:
    """The guidance levels whose synthetic images join epoch `epoch`.

    Args:
        curriculum: one of CURRICULA.
        epoch: from 0.
        curriculum_epochs: epochs from this one on are real only, whatever the curriculum.
        levels: the spectrum's levels in percent, in any order.
        fixed_level: the level of `fixed`.
        seed: decides the draws of `random`.

    Returns:
        Ascending levels; empty for real only. Each of `d2s` and `s2d` has an equal share of the curriculum epochs, and
        the epochs left over go one each to the earliest stages (DisCL).

    Raises:
        UserError: no such curriculum, or fewer curriculum epochs than stages.
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
    if curriculum_epochs < len(levels):
        raise UserError(
            f"--curriculum-epochs {curriculum_epochs}: expected at least one for each of the "
            f"{len(levels)} levels {levels}"
        )
    stages = levels if curriculum == "d2s" else levels[::-1]
    return [stages[stage_of(epoch, curriculum_epochs, len(stages))]]


def stage_of(epoch: int, epochs: int, stages: int) -> int:
    """The stage, from 0, of an epoch where `epochs` are shared equally and the earliest stages take those left over."""
    share, left = divmod(epochs, stages)
    longer = left * (share + 1)
    return epoch // (share + 1) if epoch < longer else left + (epoch - longer) // share


def needed_levels(curriculum: str, levels: list[int], fixed_level: int) -> list[int]:
    """The levels that a curriculum can ask for in any epoch."""
    return {"none": [], "text_only": [0], "fixed": [fixed_level]}.get(curriculum, sorted(set(levels)))
