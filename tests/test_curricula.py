"""Curricula against schedules worked out by hand, and what holds for all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curricula import (
    CURRICULA,
    balanced_mix,
    describe_schedule,
    epoch_levels,
    held_out_sources,
    long_tail_epoch,
    most_progress,
    needed_levels,
    places_by_label,
    progress_of,
    replaced_epoch,
    stage_lengths,
    stage_mix,
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


def test_imagenet_lt_has_twelve_epochs_a_level_then_five_real():
    levels = [*LEVELS, 100]
    found = [epoch_levels("d2s", epoch, 60, levels) for epoch in range(65)]
    assert found == [[0]] * 12 + [[10]] * 12 + [[30]] * 12 + [[50]] * 12 + [[100]] * 12 + [[]] * 5
    said = describe_schedule("d2s", 65, 60, levels)
    assert said == (
        "12 epochs of level 0, 12 of level 10, 12 of level 30, 12 of level 50, 12 of level 100, "
        "then 5 of all real images"
    )


def test_schedules_in_words():
    assert describe_schedule("none", 3, 0, LEVELS) == "3 epochs of all real images"
    assert describe_schedule("d2s", 3, 2, [0, 50]) == "1 epoch of level 0, 1 of level 50, then 1 of all real images"
    assert describe_schedule("all", 3, 3, [50, 100]) == "3 epochs of levels 50, 100"
    found = describe_schedule("adaptive", 20, 15, [50, 70, 90, 100])
    assert found == "15 epochs of one of the levels 50, 70, 90, 100 (adaptive), then 5 of all real images"
    # 3 : 1 of 8 epochs
    assert describe_schedule("s2d", 9, 8, [0, 50], shares=[1, 3]) == (
        "6 epochs of level 50, 2 of level 0, then 1 of all real images"
    )


def test_the_real_level_is_a_stage_a_turn_and_a_candidate():
    assert [epoch_levels("cyclic", epoch, 4, [50, 100])[0] for epoch in range(4)] == [50, 100, 50, 100]
    assert epoch_levels("all", 0, 1, [50, 100]) == [50, 100]
    assert epoch_levels("s2d", 0, 4, [50, 100]) == [100]
    assert {epoch_levels("random", epoch, 40, [50, 100])[0] for epoch in range(40)} == {50, 100}
    assert epoch_levels("adaptive", 0, 1, [50, 100], progress={50: 0.1, 100: 0.2}) == [100]


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
names = st.sampled_from(list(CURRICULA))


@given(curriculum=names, levels=levels_lists, extra=st.integers(0, 20), real=st.integers(0, 5))
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
    with pytest.raises(UserError, match="--levels 100: --curriculum adaptive has .* expected a level below 100"):
        held_out_sources({}, {"a": 0}, np.array([5]), 2, 0)  # of real images alone


# ---------------------------------------------------------------------------------------------------------------------
# the mix


def test_stage_mix_by_hand():
    # 100 images of class 0, 5 of the hard class 1; 30 of the 100 stay, and 30 * 0.25 / 0.75 = 10 hard ones are wanted.
    labels = np.array([0] * 100 + [1] * 5)
    is_hard = np.array([False, True])
    real, drawn = stage_mix(labels, is_hard, 40, 0.25, 0.3, np.random.default_rng(0))
    assert (labels[real] == 1).sum() == 5 and (labels[real] == 0).sum() == 30
    assert len(drawn) == len(set(drawn.tolist())) == 5
    # With 2 synthetic images there are not enough: each is taken twice, and one of them a third time.
    _, drawn = stage_mix(labels, is_hard, 2, 0.25, 0.3, np.random.default_rng(0))
    assert sorted(np.bincount(drawn, minlength=2).tolist()) == [2, 3]


def test_stage_mix_of_imagenet_lt():
    # 114,203 non-hard and 1,643 hard images, factor 0.3, 136 of 1,000 classes: 34,261 stay, 5,393 hard are wanted.
    labels = np.array([0] * 114203 + [1] * 1643)
    real, drawn = stage_mix(labels, np.array([False, True]), 6000, 0.136, 0.3, np.random.default_rng(0))
    assert len(real) == 34261 + 1643 and len(drawn) == 5393 - 1643


@given(
    others=st.integers(1, 200),
    hard=st.integers(1, 50),
    synthetic=st.integers(1, 60),
    share=st.floats(0, 0.95),
    keep_others=st.floats(0, 1),
)
def test_stage_mix_keeps_its_promises(others, hard, synthetic, share, keep_others):
    labels = np.array([0] * others + [1] * hard)
    real, drawn = stage_mix(labels, np.array([False, True]), synthetic, share, keep_others, np.random.default_rng(1))
    assert len(set(real.tolist())) == len(real) and (labels[real] == 1).sum() == hard
    assert len(drawn) == 0 or (0 <= drawn.min() and drawn.max() < synthetic)
    counts = np.bincount(drawn, minlength=synthetic)
    assert counts.max() - counts.min() <= 1
    if len(drawn):
        # Whole images: the share is met to within half an image of the wanted count.
        stay = (labels[real] == 0).sum()
        assert abs(hard + len(drawn) - stay * share / (1 - share)) <= 0.5 + 1e-6


@given(st.lists(st.integers(0, 5), max_size=40))
def test_the_places_of_each_class_are_those_that_a_search_finds(labels):
    found = places_by_label(np.array(labels, dtype=int), 6)
    assert [places.tolist() for places in found] == [
        [place for place, other in enumerate(labels) if other == label] for label in range(6)
    ]


def test_balanced_mix_by_hand():
    # 20 of the 40 others stay; 20 * 0.5 / 0.5 = 20 hard images are wanted, 10 of each hard class. Class 1 has 4 real
    # ones and 3 synthetic: 6 more are each of the three twice. Class 2 has 12 real ones: it keeps them, and gets none.
    labels = np.array([0] * 40 + [1] * 4 + [2] * 12)
    real, drawn = balanced_mix(
        labels, np.array([False, True, True]), np.array([2, 1, 1, 2, 1]), 0.5, 0.5, np.random.default_rng(0)
    )
    assert np.bincount(labels[real]).tolist() == [20, 4, 12]
    assert np.bincount(drawn, minlength=5).tolist() == [0, 2, 2, 0, 2]


@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=6),
    synthetic=st.lists(st.integers(0, 5), max_size=40),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 9),
)
def test_balanced_mix_keeps_its_promises(counts, synthetic, share, seed):
    is_hard = np.arange(len(counts)) > 0
    labels = np.repeat(np.arange(len(counts)), counts)
    synthetic = np.array([label for label in synthetic if 0 < label < len(counts)], dtype=int)
    real, drawn = balanced_mix(labels, is_hard, synthetic, share, 1.0, np.random.default_rng(seed))
    assert sorted(real.tolist()) == list(range(len(labels)))
    sizes = np.bincount(np.concatenate([labels, synthetic[drawn]]), minlength=len(counts))
    wanted = round(counts[0] * share / (1 - share))
    for label in range(1, len(counts)):
        if (synthetic == label).any() and sizes[label] > counts[label]:
            assert sizes[label] in (wanted // (len(counts) - 1), wanted // (len(counts) - 1) + 1)
        else:
            assert sizes[label] == counts[label]
    times = np.bincount(drawn, minlength=len(synthetic))
    for label in set(synthetic.tolist()):
        assert np.ptp(times[synthetic == label]) <= 1


# 40 others of class 0, 4 real images of the hard class 1, and of those 3 synthetic ones at 0 and 2 at 50.
POOL_LEVELS = np.array([100] * 44 + [0] * 3 + [50] * 2)
POOL_LABELS = np.array([0] * 40 + [1] * 9)
NOT_HELD = np.zeros(49, dtype=bool)


def long_tail(stage, held=NOT_HELD, balanced=False):
    """A share of 0.5 with half of the others: 20 others, 20 hard images."""
    rng = np.random.default_rng(0)
    return long_tail_epoch(POOL_LEVELS, POOL_LABELS, held, np.array([False, True]), stage, 0.5, 0.5, balanced, rng)


@pytest.mark.parametrize("balanced", [False, True])
def test_every_stage_keeps_the_share_of_hard_images_and_the_end_has_all_real_ones(balanced):
    for stage in ([0], [50], [0, 50], [100], [50, 100]):
        places = long_tail(stage, balanced=balanced)
        times = np.bincount(places, minlength=49)
        assert times[:40].sum() == 20 and times[40:].sum() == 20
        assert (times[40:44] >= 1).all() and set(POOL_LEVELS[places]) <= {*stage, 100}
        assert np.ptp(times[40:44]) <= 1
    # The stage of level 100: 4 real hard images and 16 more, each four times over.
    assert np.bincount(long_tail([100], balanced=balanced), minlength=49)[40:].tolist() == [5, 5, 5, 5, 0, 0, 0, 0, 0]
    assert long_tail([], balanced=balanced).tolist() == list(range(44))


def test_images_that_are_held_out_are_in_no_stage_and_in_the_real_epochs_after():
    held = NOT_HELD.copy()
    held[[40, 44]] = True
    for stage in ([0], [100], [0, 50, 100]):
        places = long_tail(stage, held)
        assert not {40, 44} & set(places.tolist()) and (POOL_LABELS[places] == 1).sum() == 20
    assert long_tail([], held).tolist() == list(range(44))


# Real images 0 to 3, of which 1, 2 and 3 are hard; 1 has three images at 50 and one at 90, 2 has one at 90, 3 has none.
TRAP_LEVELS = np.array([100, 100, 100, 100, 50, 50, 50, 90, 90])
TRAP_SOURCES = np.array([0, 1, 2, 3, 1, 1, 1, 1, 2])
TRAP_HARD = np.array([False, True, True, True, True, True, True, True, True])


def traps(stage, per_hard_image=None, held=(), seed=0):
    kept_out = np.isin(TRAP_SOURCES, held)
    rng = np.random.default_rng(seed)
    return sorted(replaced_epoch(TRAP_LEVELS, TRAP_SOURCES, kept_out, TRAP_HARD, stage, per_hard_image, rng).tolist())


def test_all_accepted_images_of_a_level_stand_in_for_the_hard_ones():
    assert traps([50]) == [0, 4, 5, 6]
    assert traps([90]) == [0, 7, 8]
    assert traps([50, 90]) == [0, 4, 5, 6, 7, 8]
    assert traps([100]) == [0, 1, 2, 3]
    assert traps([90, 100]) == [0, 1, 2, 3, 7, 8]
    assert traps([]) == [0, 1, 2, 3]
    assert traps([50, 90], held=[1]) == [0, 8] and traps([], held=[1]) == [0, 1, 2, 3]


def test_per_hard_image_draws_some_and_keeps_the_hard_images_without_any():
    drawn = [traps([50], 1, seed=seed) for seed in range(30)]
    assert {tuple(places) for places in drawn} == {(0, 2, 3, place) for place in (4, 5, 6)}
    assert {tuple(traps([50], 2, seed=seed)) for seed in range(30)} == {
        (0, 2, 3, 4, 5), (0, 2, 3, 4, 6), (0, 2, 3, 5, 6)
    }  # fmt: skip
    assert traps([50], 5) == [0, 2, 3, 4, 5, 6]
    assert traps([90], 1, held=[1]) == [0, 3, 8]


def test_an_epoch_of_iwildcam_has_a_fifth_synthetic_images():
    # The paper's numbers: 129,809 images, 8,260 hard; 90,093 accepted of three levels, 30,031 a level.
    levels = np.array([100] * 129809 + [50] * 30031)
    sources = np.concatenate([np.arange(129809), np.arange(30031) % 8260])
    is_hard = sources < 8260
    rng = np.random.default_rng(0)
    places = replaced_epoch(levels, sources, np.zeros(len(levels), dtype=bool), is_hard, [50], None, rng)
    assert len(places) == 129809 - 8260 + 30031
    assert (levels[places] < 100).mean() == pytest.approx(0.198, abs=5e-4)
