"""Losses against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from losses import balanced_softmax, loss_by_name


def test_balanced_softmax_by_hand():
    # Equal logits: the loss is -log of the label's share of the images, 9 of 10 and 1 of 10.
    logits = torch.zeros(2, 2, dtype=torch.float64)
    counts = torch.tensor([9, 1])
    assert balanced_softmax(logits, torch.tensor([0, 0]), counts).item() == pytest.approx(-math.log(0.9))
    assert balanced_softmax(logits, torch.tensor([1, 1]), counts).item() == pytest.approx(-math.log(0.1))
    # Logits that undo the prior: 1 * e^log(9) = 9 * e^0.
    logits = torch.tensor([[0.0, math.log(9)]], dtype=torch.float64)
    assert balanced_softmax(logits, torch.tensor([0]), counts).item() == pytest.approx(math.log(2))


def test_balanced_softmax_of_equal_counts_is_cross_entropy():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    assert balanced_softmax(logits, labels, torch.tensor([7, 7, 7])).item() == pytest.approx(
        loss_by_name("ce", logits, labels, torch.tensor([1, 2, 3])).item(), rel=1e-5
    )


def test_a_class_without_images_leaves_loss_and_gradient_finite():
    logits = torch.zeros(1, 2, requires_grad=True)
    loss = balanced_softmax(logits, torch.tensor([0]), torch.tensor([5, 0]))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
