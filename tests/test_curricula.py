"""Curricula against schedules worked out by hand, and what holds for all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli import UserError
from curricula import CURRICULA, epoch_levels, needed_levels

LEVELS = [0, 10, 30, 50]

# 65 epochs of which 60 curriculum: ImageNet-LT's schedule. 6 and 2 left over: the first two stages are longer.
BY_HAND = {
    ("d2s", 8, 8): [0, 0, 10, 10, 30, 30, 50, 50],
    ("d2s", 7, 6): [0, 0, 10, 10, 30, 50, None],
    ("s2d", 7, 6): [50, 50, 30, 30, 10, 0, None],
    ("d2s", 5, 4): [0, 10, 30, 50, None],
    ("text_only", 3, 2): [0, 0, None],
    ("fixed", 3, 2): [30, 30, None],
    ("none", 2, 2): [None, None],
}


@pytest.mark.parametrize(("case", "expected"), BY_HAND.items(), ids=lambda value: str(value))
def test_schedules_worked_out_by_hand(case, expected):
    curriculum, epochs, curriculum_epochs = case
    found = [epoch_levels(curriculum, epoch, curriculum_epochs, LEVELS, fixed_level=30) for epoch in range(epochs)]
    assert found == [[] if level is None else [level] for level in expected]


def test_imagenet_lt_has_fifteen_epochs_a_level_then_five_real():
    found = [epoch_levels("d2s", epoch, 60, LEVELS) for epoch in range(65)]
    assert found == [[0]] * 15 + [[10]] * 15 + [[30]] * 15 + [[50]] * 15 + [[]] * 5


def test_all_uses_every_level_at_once():
    assert epoch_levels("all", 0, 2, [50, 0, 10, 10]) == [0, 10, 50]


def test_random_depends_on_seed_and_epoch_alone():
    def drawn(seed):
        return [epoch_levels("random", epoch, 40, LEVELS, seed=seed) for epoch in range(40)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert {level for [level] in drawn(0)} == set(LEVELS)


def test_too_few_epochs_for_the_stages_is_an_error():
    with pytest.raises(UserError, match="--curriculum-epochs 3"):
        epoch_levels("d2s", 0, 3, LEVELS)


levels_lists = st.lists(st.integers(0, 99), min_size=1, max_size=8, unique=True)


@given(curriculum=st.sampled_from(CURRICULA), levels=levels_lists, extra=st.integers(0, 20), real=st.integers(0, 5))
def test_every_epoch_stays_within_the_levels_and_ends_real(curriculum, levels, extra, real):
    curriculum_epochs = len(levels) + extra
    for epoch in range(curriculum_epochs + real):
        found = epoch_levels(curriculum, epoch, curriculum_epochs, levels, fixed_level=levels[0])
        assert set(found) <= set(needed_levels(curriculum, levels, levels[0]))
        assert bool(found) == (curriculum != "none" and epoch < curriculum_epochs)


@given(levels=levels_lists, extra=st.integers(0, 30))
def test_d2s_ascends_with_equal_shares_and_s2d_is_its_mirror(levels, extra):
    epochs = len(levels) + extra
    rising = [epoch_levels("d2s", epoch, epochs, levels)[0] for epoch in range(epochs)]
    assert rising == sorted(rising)
    lengths = [rising.count(level) for level in sorted(levels)]
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)
    falling = [epoch_levels("s2d", epoch, epochs, levels)[0] for epoch in range(epochs)]
    assert [sorted(levels).index(level) for level in rising] == [
        sorted(levels, reverse=True).index(level) for level in falling
    ]
