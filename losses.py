"""Losses of long-tailed classification. All take logits (N, C), labels (N,) and return the mean over the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import; a trainer's --help needs the names of the losses alone
    import torch

LOSSES = ("ce", "bs")


def balanced_softmax(logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Balanced Softmax (Ren et al., 2020, equation 4): cross-entropy of logits + log class count.

    Args:
        counts: training images of each class, (C,). A class that the counts lack is taken to have one image.
    """
    from torch.nn import functional as F

    return F.cross_entropy(logits + counts.clamp(min=1).to(logits.dtype).log(), labels)


def loss_by_name(name: str, logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The loss called `name` (one of LOSSES)."""
    from torch.nn import functional as F

    return balanced_softmax(logits, labels, counts) if name == "bs" else F.cross_entropy(logits, labels)
