"""The embedded benchmark's split, class groups, and the mix that an epoch trains on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import datasets
from cli import UserError


def test_splits_are_disjoint_and_balanced():
    split = datasets.digits_split()
    together = np.concatenate(list(split.values()))
    assert len(together) == len(set(together.tolist())) == 1797
    labels = datasets.digits_scans()[1]
    for part, count in (("web", 60), ("val", 8), ("test", 50)):
        assert np.bincount(labels[split[part]]).tolist() == [count] * 10


@pytest.mark.parametrize("imb_ratio", [1.1, 10, 30, 60])
def test_train_val_test_and_web_share_no_image(imb_ratio):
    data = datasets.load("digits", imb_ratio)
    web = {f"index:{i}" for i in datasets.digits_split()["web"]}
    parts = [set(data.train.sources), set(data.val.sources), set(data.test.sources), web]
    assert len(set.union(*parts)) == sum(map(len, parts))


def test_counts_follow_the_exponential_rule():
    # int(60 * 30^(-k/9)), by hand: the ratio of neighbours is 30^(1/9) = 1.459.
    assert datasets.load("digits", 30).counts.tolist() == [60, 41, 28, 19, 13, 9, 6, 4, 2, 2]
    assert sum(datasets.long_tail_counts(500, 100, 100)) == 10847
    assert sum(datasets.long_tail_counts(500, 100, 50)) == 12608
    assert sum(datasets.long_tail_counts(500, 100, 10)) == 19573
    with pytest.raises(UserError, match="--imb-ratio 1: class two would have 60 training images, of 59"):
        datasets.load("digits", 1)


def test_groups_by_training_count():
    groups = datasets.load("digits", 30).groups
    assert {name: classes.tolist() for name, classes in groups.items()} == {
        "many": [0, 1],
        "medium": [2],
        "few": [3, 4, 5, 6, 7, 8, 9],
    }


def test_the_split_does_not_depend_on_the_imbalance():
    small, large = datasets.load("digits", 60), datasets.load("digits", 10)
    assert set(small.train.sources) < set(large.train.sources)
    assert np.array_equal(small.test.images, large.test.images)


def test_bad_data_set_and_ratio_are_named():
    with pytest.raises(UserError, match="--dataset mnist"):
        datasets.load("mnist", 1)
    with pytest.raises(UserError, match="--imb-ratio 0.5"):
        datasets.load("digits", 0.5)


def test_stage_mix_by_hand():
    # 100 images of class 0, 5 of the hard class 1; 30 of the 100 stay, and 30 * 0.25 / 0.75 = 10 hard ones are wanted.
    labels = np.array([0] * 100 + [1] * 5)
    is_hard = np.array([False, True])
    real, drawn = datasets.stage_mix(labels, is_hard, 40, 0.25, 0.3, np.random.default_rng(0))
    assert (labels[real] == 1).sum() == 5 and (labels[real] == 0).sum() == 30
    assert len(drawn) == len(set(drawn.tolist())) == 5
    # With 2 synthetic images there are not enough: each is taken twice, and one of them a third time.
    _, drawn = datasets.stage_mix(labels, is_hard, 2, 0.25, 0.3, np.random.default_rng(0))
    assert sorted(np.bincount(drawn, minlength=2).tolist()) == [2, 3]


def test_stage_mix_of_imagenet_lt():
    # 114,203 non-hard and 1,643 hard images, factor 0.3, 136 of 1,000 classes: 34,261 stay, 5,393 hard are wanted.
    labels = np.array([0] * 114203 + [1] * 1643)
    real, drawn = datasets.stage_mix(labels, np.array([False, True]), 6000, 0.136, 0.3, np.random.default_rng(0))
    assert len(real) == 34261 + 1643 and len(drawn) == 5393 - 1643


@given(
    others=st.integers(1, 200),
    hard=st.integers(1, 50),
    synthetic=st.integers(1, 60),
    share=st.floats(0, 0.95),
    undersample=st.floats(0, 1),
)
def test_stage_mix_keeps_its_promises(others, hard, synthetic, share, undersample):
    labels = np.array([0] * others + [1] * hard)
    real, drawn = datasets.stage_mix(
        labels, np.array([False, True]), synthetic, share, undersample, np.random.default_rng(1)
    )
    assert len(set(real.tolist())) == len(real) and (labels[real] == 1).sum() == hard
    assert len(drawn) == 0 or (0 <= drawn.min() and drawn.max() < synthetic)
    counts = np.bincount(drawn, minlength=synthetic)
    assert counts.max() - counts.min() <= 1
    if len(drawn):
        # Whole images: the share is met to within half an image of the wanted count.
        stay = (labels[real] == 0).sum()
        assert abs(hard + len(drawn) - stay * share / (1 - share)) <= 0.5 + 1e-6


def test_sources_outside_the_data_root_are_refused(tmp_path):
    train = datasets.load("digits", 30).train
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        with pytest.raises(UserError, match="outside --data-root"):
            list(datasets.read_sources([name], train, tmp_path / "root"))
