"""Losses against values worked out by hand, or by another way of computing them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from training import losses
from training.losses import (
    LOSSES,
    balanced_softmax,
    batch_mean,
    class_balanced_weights,
    focal,
    image_weights,
    ldam,
    per_image,
)

ARGS = {"focal_gamma": 2.0, "la_tau": 1.0, "ldam_margin": 0.5}


def by_name(name, logits, labels, counts, **constants):
    return per_image(SimpleNamespace(loss=name, **{**ARGS, **constants}), logits, labels, counts)


def test_balanced_softmax_by_hand():
    # Equal logits: the loss is -log of the label's share of the images, 9 of 10 and 1 of 10.
    logits = torch.zeros(2, 2, dtype=torch.float64)
    counts = torch.tensor([9, 1])
    found = balanced_softmax(logits, torch.tensor([0, 1]), counts).tolist()
    assert found == pytest.approx([-math.log(0.9), -math.log(0.1)])
    # Logits that undo the prior: 1 * e^log(9) = 9 * e^0.
    logits = torch.tensor([[0.0, math.log(9)]], dtype=torch.float64)
    assert balanced_softmax(logits, torch.tensor([0]), counts).item() == pytest.approx(math.log(2))


def test_balanced_softmax_of_equal_counts_is_cross_entropy():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    assert by_name("bs", logits, labels, torch.tensor([7, 7, 7])).tolist() == pytest.approx(
        by_name("ce", logits, labels, torch.tensor([1, 2, 3])).tolist(), rel=1e-5
    )


@pytest.mark.parametrize("name", LOSSES)
def test_a_class_without_images_leaves_loss_and_gradient_finite(name):
    logits = torch.zeros(1, 2, requires_grad=True)
    loss = by_name(name, logits, torch.tensor([0]), torch.tensor([5, 0]))
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()


def test_logit_adjustment_with_tau_1_is_balanced_softmax_and_with_tau_0_cross_entropy():
    torch.manual_seed(0)
    logits, labels, counts = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 3, 3, 0]), torch.tensor([50, 9, 3, 1])
    for tau, same in ((1.0, "bs"), (0.0, "ce")):
        found, expected = (by_name(name, logits, labels, counts, la_tau=tau) for name in ("la", same))
        assert torch.allclose(found, expected)
    # tau 2 by hand: priors squared, 0.81 and 0.01 of their sum 0.82.
    found = by_name("la", torch.zeros(1, 2).double(), torch.tensor([1]), torch.tensor([9, 1]), la_tau=2.0)
    assert found.item() == pytest.approx(-math.log(0.01 / 0.82))


def test_focal_loss_by_hand():
    # Equal logits of 4 classes: p = 1/4, (3/4)^2 * log 4.
    logits = torch.zeros(1, 4, dtype=torch.float64)
    assert focal(logits, torch.tensor([2]), 2.0).item() == pytest.approx(0.5625 * math.log(4))
    # p = 0.9: (0.1)^2 * -log 0.9, a hundredth of the cross-entropy.
    logits = torch.tensor([[math.log(9), 0.0]], dtype=torch.float64)
    assert focal(logits, torch.tensor([0]), 2.0).item() == pytest.approx(0.01 * -math.log(0.9))


def test_focal_loss_of_a_certain_image_has_a_finite_gradient():
    logits = torch.tensor([[200.0, 0.0], [20.0, 0.0]], requires_grad=True)  # p rounds to 1; 1 - p is 2e-9
    loss = focal(logits, torch.tensor([0, 0]), 0.5)
    loss.sum().backward()
    assert logits.grad.isfinite().all()
    # (1 - p)^gamma * -log p, where both are e^-20: e^-30
    assert loss[0].item() == 0 and loss[1].item() == pytest.approx(math.exp(-30), rel=1e-4)


def test_focal_loss_with_gamma_0_is_cross_entropy_and_agrees_with_torchvision():
    from torchvision.ops import sigmoid_focal_loss

    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 1, 0])
    assert torch.allclose(focal(logits, labels, 0.0), F.cross_entropy(logits, labels, reduction="none"))
    # Of two classes, a softmax over (x, 0) is a sigmoid of x.
    x = torch.randn(7).double()
    theirs = sigmoid_focal_loss(x, torch.ones(7).double(), alpha=-1, gamma=2.0)
    assert torch.allclose(focal(torch.stack([x, torch.zeros(7)], 1), torch.zeros(7).long(), 2.0), theirs)


def test_ldam_by_hand():
    # Counts 16 and 1: count^(-1/4) is 1/2 and 1, so with the largest margin 0.5 the margins are 0.25 and 0.5.
    cosines = torch.tensor([[0.6, 0.2], [0.6, 0.2]], dtype=torch.float64)
    found = ldam(cosines, torch.tensor([0, 1]), torch.tensor([16, 1]), 0.5, scale=10.0).tolist()
    assert found[0] == pytest.approx(math.log(1 + math.exp(10 * (0.2 - 0.35))))
    assert found[1] == pytest.approx(math.log(1 + math.exp(10 * (0.6 + 0.3))))


def test_class_balanced_weights_by_hand():
    # beta 1/2: effective numbers of 1, 2, 3 images are 1, 1.5, 1.75; weights 1 : 2/3 : 4/7, mean 47/63.
    found = class_balanced_weights(torch.tensor([1, 2, 3]), 0.5).tolist()
    assert found == pytest.approx([63 / 47, 63 / 47 * 2 / 3, 63 / 47 * 4 / 7])
    assert class_balanced_weights(torch.tensor([500, 5])).mean().item() == pytest.approx(1)


def test_class_weights_are_those_of_cross_entropy():
    torch.manual_seed(0)
    logits, labels, weights = torch.randn(6, 3), torch.tensor([0, 1, 2, 1, 0, 0]), torch.tensor([1.0, 2.0, 5.0])
    of_images = image_weights(labels, torch.zeros(6, dtype=torch.bool), weights, None)
    found = batch_mean(F.cross_entropy(logits, labels, reduction="none"), of_images)
    assert torch.allclose(found, F.cross_entropy(logits, labels, weights))


def test_real_weight_is_lambda_times_the_real_mean_and_the_rest_of_the_synthetic():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    synthetic = torch.tensor([False, False, False, True])
    weights = image_weights(torch.zeros(4, dtype=torch.long), synthetic, None, 0.8)
    assert batch_mean(values, weights).item() == pytest.approx(0.8 * 2 + 0.2 * 10)
    for kind in (True, False):  # a batch of one kind
        weights = image_weights(torch.zeros(4, dtype=torch.long), torch.full((4,), kind), None, 0.8)
        assert batch_mean(values, weights).item() == pytest.approx(4)
    assert image_weights(torch.zeros(4, dtype=torch.long), synthetic, None, None) is None
    assert batch_mean(values, None).item() == 4


@given(
    labels=st.lists(st.integers(0, 2), min_size=2, max_size=9),
    share=st.floats(0.05, 0.95),
    class_weights=st.lists(st.floats(0.1, 9), min_size=3, max_size=3),
)
def test_real_and_synthetic_keep_their_shares_whatever_the_class_weights(labels, share, class_weights):
    synthetic = torch.arange(len(labels)) % 2 == 0
    weights = image_weights(torch.tensor(labels), synthetic, torch.tensor(class_weights), share)
    assert (weights[synthetic].sum() / weights.sum()).item() == pytest.approx(1 - share, abs=1e-4)


@pytest.mark.parametrize("name", losses.MIXABLE)
def test_mixed_labels_are_the_mix_of_the_losses(name):
    torch.manual_seed(0)
    logits, counts = torch.randn(4, 3).double(), torch.tensor([50, 9, 3])
    a, b = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 0, 0])
    mixed = 0.3 * F.one_hot(a, 3).double() + 0.7 * F.one_hot(b, 3).double()
    expected = 0.3 * by_name(name, logits, a, counts) + 0.7 * by_name(name, logits, b, counts)
    assert torch.allclose(by_name(name, logits, mixed, counts), expected)
