"""Curricula against schedules worked out by hand, and what holds for all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curricula import (
    CURRICULA,
    epoch_levels,
    held_out_sources,
    most_progress,
    needed_levels,
    progress_of,
    stage_lengths,
)
from runtime.cli import UserError

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
    ("cyclic", 10, 9): [0, 10, 30, 50, 30, 10, 0, 10, 30, None],
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
        progress = {level: (level * 7 + epoch) % 11 / 11 for level in levels}
        found = epoch_levels(curriculum, epoch, curriculum_epochs, levels, fixed_level=levels[0], progress=progress)
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


def test_cyclic_with_one_or_two_levels():
    assert [epoch_levels("cyclic", epoch, 3, [30])[0] for epoch in range(3)] == [30, 30, 30]
    assert [epoch_levels("cyclic", epoch, 4, [30, 0])[0] for epoch in range(4)] == [0, 30, 0, 30]


@given(levels=levels_lists, epochs=st.integers(1, 40))
def test_cyclic_moves_one_level_at_a_time(levels, epochs):
    ranks = [sorted(levels).index(epoch_levels("cyclic", epoch, epochs, levels)[0]) for epoch in range(epochs)]
    assert ranks[0] == 0
    assert all(abs(a - b) == min(1, len(levels) - 1) for a, b in zip(ranks, ranks[1:], strict=False))


def test_level_shares_by_hand():
    # 12 epochs for 1 : 1 : 2 : 4 are 1.5, 1.5, 3, 6: rounded down 11, the one left over goes to the first stage.
    assert stage_lengths(12, [1, 1, 2, 4]) == [2, 1, 3, 6]
    found = [epoch_levels("d2s", epoch, 12, LEVELS, shares=[1, 1, 2, 4])[0] for epoch in range(12)]
    assert found == [0, 0, 10, 30, 30, 30, 50, 50, 50, 50, 50, 50]
    # s2d gives each level the same share of time: the stages are now 4 : 2 : 1 : 1.
    found = [epoch_levels("s2d", epoch, 12, LEVELS, shares=[1, 1, 2, 4])[0] for epoch in range(12)]
    assert found == [50] * 7 + [30] * 3 + [10] + [0]
    assert stage_lengths(10, [0.3, 0.7]) == [3, 7]
    # A level without a share has no epoch, not even one that is left over.
    assert stage_lengths(5, [0, 1, 1]) == [0, 3, 2]
    assert [epoch_levels("d2s", epoch, 3, LEVELS, shares=[0, 1, 1, 1])[0] for epoch in range(3)] == [10, 30, 50]


@given(epochs=st.integers(0, 300), shares=st.lists(st.floats(0.01, 100), min_size=1, max_size=9))
def test_stages_fill_the_epochs_and_keep_their_shares(epochs, shares):
    lengths = stage_lengths(epochs, shares)
    assert sum(lengths) == epochs
    assert all(abs(length - epochs * share / sum(shares)) <= 1 for length, share in zip(lengths, shares, strict=True))


@pytest.mark.parametrize(
    ("shares", "message"),
    [([1, 1], "one for each of the levels"), ([0] * 4, "not all 0"), ([1e-3, 1, 1, 1], "at least")],
)
def test_bad_level_shares_are_named(shares, message):
    with pytest.raises(UserError, match=message):
        epoch_levels("d2s", 0, 3, LEVELS, shares=shares)


def test_adaptive_trains_on_the_level_of_most_progress():
    assert epoch_levels("adaptive", 0, 5, LEVELS, progress={0: 0.1, 10: -0.2, 30: 0.3, 50: 0.2}) == [30]
    assert epoch_levels("adaptive", 5, 5, LEVELS) == []
    assert most_progress({50: 0.25, 10: 0.25, 30: 0.1}) == 10  # of equal ones the lowest


def test_progress_by_hand():
    # Changes 0, .1, .2, .3, .4, .8: quartiles .125 and .375, so what lies outside [-.25, .75] is dropped.
    before = np.zeros(6)
    assert progress_of(before, np.array([0, 0.1, 0.2, 0.3, 0.4, 0.8])) == pytest.approx(0.2)
    assert progress_of(before, np.array([0, 0.1, 0.2, 0.3, 0.4, 0.7])) == pytest.approx(1.7 / 6)
    assert progress_of(np.array([0.5, 0.7]), np.array([0.6, 0.6])) == pytest.approx(0)
    assert progress_of(np.array([0.2]), np.array([0.9])) == pytest.approx(0.7)


@given(change=st.lists(st.floats(-1, 1), min_size=1, max_size=40), shift=st.floats(-0.5, 0.5))
def test_progress_lies_among_the_changes_and_moves_with_them(change, shift):
    change = np.array(change)
    found = progress_of(np.zeros(len(change)), change)
    assert change.min() - 1e-12 <= found <= change.max() + 1e-12
    assert progress_of(change, change) == 0


sources_by_level = st.dictionaries(
    st.integers(0, 99), st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=30), min_size=1, max_size=4
)


@given(by_level=sources_by_level, size=st.integers(1, 12), seed=st.integers(0, 5))
def test_held_out_sources_have_every_level_and_leave_every_class_and_level_something(by_level, size, seed):
    labels = {source: place // 3 for place, source in enumerate("abcdefghij")}
    counts = np.array([3, 3, 3, 1])
    try:
        chosen = held_out_sources(by_level, labels, counts, size, seed)
    except UserError:
        return
    assert 1 <= len(chosen) <= size and len(set(chosen)) == len(chosen)
    assert chosen == held_out_sources(by_level, labels, counts, size, seed)
    for sources in by_level.values():
        assert set(chosen) <= set(sources)
        assert set(sources) - set(chosen)
    held = np.bincount([labels[source] for source in chosen], minlength=4)
    assert (held < counts).all()


def test_nothing_to_hold_out_is_an_error():
    with pytest.raises(UserError, match="no hard image can be held out"):
        held_out_sources({0: ["a"], 50: ["b"]}, {"a": 0, "b": 0}, np.array([5]), 2, 0)
