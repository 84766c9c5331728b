"""ALIA's rules, additions and groups against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

import curricula
from loaders.base import fold_of
from runtime.cli import UserError
from spectrum import edit_rules as rules
from spectrum.vectors import VectorCache
from training import domain_groups


def test_thresholds_are_the_mean_probability_of_the_true_class():
    """cleanlab's definition; a class without an image has 2.0."""
    probabilities = np.array([[0.9, 0.1, 0.0], [0.5, 0.4, 0.1], [0.3, 0.6, 0.1], [0.8, 0.2, 0.0]])
    found = rules.class_thresholds(probabilities, np.array([0, 0, 1, 1]))
    assert found.tolist() == pytest.approx([0.7, 0.4, 2.0])


def test_confidence_goes_by_the_threshold_of_the_predicted_class():
    thresholds = np.array([0.7, 0.4, 2.0])
    probabilities = np.array(
        [
            [0.7, 0.2, 0.1],  # at the threshold of 0, asked for 0
            [0.69, 0.2, 0.11],  # under it
            [0.3, 0.45, 0.25],  # over that of 1, asked for 0: under 0's, which ALIA's code would take
            [0.05, 0.05, 0.9],  # class 2 has no threshold
        ]
    )
    labels = np.zeros(4, dtype=int)
    assert rules.confidence_rule(probabilities, labels, thresholds).tolist() == [rules.EASY, "", rules.CORRUPTED, ""]
    # Another judge decides alone what is corrupted; what the base model is sure of and right about stays too easy.
    judged = np.array([0, 1, 0, 0])
    assert rules.confidence_rule(probabilities, labels, thresholds, judged).tolist() == [
        rules.EASY,
        rules.CORRUPTED,
        "",
        "",
    ]


def test_clips_rules_go_by_the_nearest_text():
    similarities = np.array([[0.3, 0.2, 0.1], [0.1, 0.3, 0.2], [0.2, 0.1, 0.3]])
    assert rules.semantic_rule(similarities).tolist() == ["", "semantic", "semantic"]
    own = np.array([0, 2, -1])
    assert rules.own_text_rule(similarities, own, "x").tolist() == ["", "x", ""]


def test_the_first_rule_that_drops_gives_the_reason_and_some_are_given_back():
    one, two = (np.array(some, dtype=object) for some in (["", "a", "", "a"], ["b", "b", "", ""]))
    combined = rules.combine([one, two])
    assert combined.tolist() == ["b", "a", "", "a"] and one.tolist() == ["", "a", "", "a"]
    names = [f"{i}.png" for i in range(1000)]
    dropped = np.full(1000, "a", dtype=object)
    back = rules.give_back(dropped, names, 0.2)
    assert 150 < (back == "").sum() < 250 and (rules.give_back(dropped, names, 0) == "a").all()
    assert (rules.give_back(dropped, names, 0.3)[back == ""] == "").all()  # a larger share keeps what a smaller one did


def test_folds_are_even_and_stay():
    folds = [fold_of(f"index:{i}", 3) for i in range(3000)]
    assert min(np.bincount(folds)) > 900 and folds[:4] == [fold_of(f"index:{i}", 3) for i in range(4)]


def test_vectors_are_kept_and_those_of_another_width_are_not(tmp_path):
    cache = VectorCache(tmp_path / "x" / "v.npz", 2)
    assert cache.missing(["a", "b"]) == ["a", "b"]
    cache.add(["a"], np.array([[1.0, 2.0]]))
    cache.save()
    again = VectorCache(cache.path, 2)
    assert again.missing(["a", "b"]) == ["b"] and again.get(["a"]).tolist() == [[1, 2]]
    assert VectorCache(cache.path, 3).missing(["a"]) == ["a"]
    cache.path.write_bytes(b"half")
    with pytest.raises(UserError, match="v.npz: not readable"):
        VectorCache(cache.path, 2)


# ---------------------------------------------------------------------------------------------------------------------
# additions


def test_addition_counts_by_hand():
    labels = np.array([0] * 6 + [1] * 3 + [2])
    counts = curricula.addition_counts
    assert counts("all", labels, 3) is None
    assert counts("20", labels, 3).tolist() == [12, 6, 2] and counts("0.5", labels, 3).tolist() == [3, 2, 0]
    assert counts("1.0", labels, 3).tolist() == [6, 3, 1] and counts("1", labels, 3).sum() == 1
    assert counts("like", labels, 3, np.array([1, 2, 3])).tolist() == [1, 2, 3]
    for wrong in ("0", "-1", "2.5", "x", "nan", "inf"):
        with pytest.raises(UserError, match=f"--add {wrong}: expected all"):
            counts(wrong, labels, 3)


def test_additions_are_one_edit_a_source_and_short_classes_repeat():
    labels = np.array([0, 0, 0, 0, 1, 1])
    sources = ["a", "a", "b", "c", "d", "d"]
    rng = np.random.default_rng(0)
    for _ in range(20):
        chosen = curricula.choose_additions(labels, sources, None, rng)
        assert [sources[place] for place in chosen] == ["a", "b", "c", "d"]
    chosen = curricula.choose_additions(labels, sources, np.array([2, 3, 5]), rng)
    assert np.bincount(labels[chosen], minlength=3).tolist() == [2, 3, 0]  # class 2 has no edit
    assert len({sources[place] for place in chosen[:2]}) == 2  # without replacement while there are enough
    first = [curricula.choose_additions(labels, sources, None, np.random.default_rng(i))[0] for i in range(30)]
    assert set(first) == {0, 1}


def test_an_epoch_of_a_given_length_repeats_or_cuts():
    rng = np.random.default_rng(0)
    found = np.bincount(curricula.repeat_to(np.arange(4), 10, rng), minlength=4)
    assert found.sum() == 10 and set(found.tolist()) == {2, 3}
    assert len(set(curricula.repeat_to(np.arange(4), 3, rng).tolist())) == 3


# ---------------------------------------------------------------------------------------------------------------------
# groups


def test_groups_by_hand():
    labels = np.array([0] * 20 + [1] * 10)
    domains = np.array([0] * 19 + [1] + [1] * 9 + [0])
    seen = domain_groups.seen_groups(labels, domains, 2, 2)
    assert seen.tolist() == [[True, False], [True, True]]  # 1 of 20 is not shown, 1 of 10 is
    test_labels, test_domains = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 1])
    predicted = np.array([0, 1, 1, 1, 1, 0])
    found = domain_groups.group_accuracies(predicted, test_labels, test_domains, seen)
    assert found["id"] == pytest.approx(100 * 3 / 5) and found["ood"] == 0
    assert found["per_group"] == [[50, 0], [None, pytest.approx(200 / 3)]]
    assert found["balanced"] == pytest.approx((50 + 0 + 200 / 3) / 3)
    assert found["worst_group"] == 0 and found["worst_group_name"] == [0, 1]
    all_seen = domain_groups.group_accuracies(predicted, test_labels, test_domains, np.ones((2, 2), bool))
    assert all_seen["ood"] is None
