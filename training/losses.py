"""Losses of long-tailed classification, each with its source.

All take logits float (N, C) and labels, and return the loss of each image, float (N,). Labels are int64 (N,), or, where
images were mixed, probabilities float (N, C); `focal` and `ldam` take whole labels alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import; a trainer's --help needs the names of the losses alone
    import torch

LOSSES = ("ce", "bs", "focal", "ldam", "la")
MIXABLE = ("ce", "bs", "la")  # the losses that are defined for mixed labels
LDAM_SCALE = 30.0  # of the cosines that LDAM takes for logits, as its authors train it


def balanced_softmax(logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Balanced Softmax (Ren et al., 2020): cross-entropy of logits + log class count.

    Args:
        counts: training images of each class, (C,). A class that the counts lack is taken to have one image.
    """
    from torch.nn import functional as F

    return F.cross_entropy(logits + counts.clamp(min=1).to(logits.dtype).log(), labels, reduction="none")


def logit_adjusted(logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor, tau: float) -> torch.Tensor:
    """The logit-adjusted loss (Menon et al., 2021): cross-entropy of logits + tau * log class share.

    With tau 1 it is Balanced Softmax. A class that the counts lack is taken to have one image.
    """
    from torch.nn import functional as F

    prior = counts.clamp(min=1).to(logits.dtype)
    return F.cross_entropy(logits + tau * (prior / prior.sum()).log(), labels, reduction="none")


def focal(logits: torch.Tensor, labels: torch.Tensor, gamma: float) -> torch.Tensor:
    """The focal loss (Lin et al., 2017) over a softmax: -(1 - p)^gamma log p, p the true class's probability."""
    import torch

    log_p = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    # Where p rounds to 1, a gamma below 1 has an infinite gradient.
    others = (-log_p.expm1()).clamp(min=torch.finfo(log_p.dtype).tiny)
    return -(others**gamma) * log_p


def ldam(
    logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor, max_margin: float, scale: float = LDAM_SCALE
) -> torch.Tensor:
    """Label-distribution-aware margin loss (Cao et al., 2019): the true class's logit must win by its margin.

    Args:
        logits: cosines, in [-1, 1]: those of a model with `models.CosineHead`.
        counts: training images of each class, (C,); a class's margin is proportional to count^(-1/4).
        max_margin: margin of the smallest class.
    """
    import torch
    from torch.nn import functional as F

    margins = counts.clamp(min=1).to(logits.dtype) ** -0.25
    margins = margins * (max_margin / margins.max())
    own = torch.zeros_like(logits).scatter(1, labels[:, None], margins[labels, None])
    return F.cross_entropy(scale * (logits - own), labels, reduction="none")


def class_balanced_weights(counts: torch.Tensor, beta: float = 0.9999) -> torch.Tensor:
    """Weights of classes by their effective number of images, (1 - beta) / (1 - beta^count) (Cui et al., 2019).

    LDAM's deferred re-weighting uses them.

    Args:
        counts: training images of each class, (C,). A class that the counts lack is taken to have one image.

    Returns:
        float64 (C,), their mean 1.
    """
    weights = (1 - beta) / (1 - beta ** counts.clamp(min=1).double())
    return weights / weights.mean()


def per_image(args, logits: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The loss called `args.loss` (one of LOSSES) of each image, (N,); its constants are `args`' too."""
    from torch.nn import functional as F

    if args.loss == "bs":
        return balanced_softmax(logits, labels, counts)
    if args.loss == "la":
        return logit_adjusted(logits, labels, counts, args.la_tau)
    if args.loss == "focal":
        return focal(logits, labels, args.focal_gamma)
    if args.loss == "ldam":
        return ldam(logits, labels, counts, args.ldam_margin)
    return F.cross_entropy(logits, labels, reduction="none")


def softmax_scale(loss: str) -> float:
    """What the logits of a model trained with this loss are multiplied by to give probabilities."""
    return LDAM_SCALE if loss == "ldam" else 1.0


def contrastive(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor | float, same: torch.Tensor | None = None
) -> torch.Tensor:
    """CLIP's symmetric contrastive loss, by which FLYP fine-tunes (Goyal et al., 2023), of a whole batch.

    Args:
        image, text: embeddings of unit length of N pairs, float (N, D).
        scale: of the cosines (the inverse temperature).
        same: class of each pair, int64 (N,): the target of an image is then shared evenly by all captions of its class.
            None for identity targets: captions of other images of the same class are negatives too, as in FLYP.
    """
    import torch
    from torch.nn import functional as F

    logits = scale * image @ text.T
    if same is None:
        targets = torch.arange(len(image), device=image.device)
    else:
        targets = (same[:, None] == same).to(logits.dtype)
        targets = targets / targets.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def inverse_weights(counts: torch.Tensor) -> torch.Tensor:
    """Class weights 1 / count, float (C,), scaled so that the largest is 1; 0 for a class without an image (ALIA)."""
    import torch

    weights = torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)
    return weights / weights.max()


def image_weights(
    labels: torch.Tensor,
    synthetic: torch.Tensor,
    class_weights: torch.Tensor | None,
    real_weight: float | None,
) -> torch.Tensor | None:
    """What each image of a batch counts for in the batch's loss, sum(weight * loss) / sum(weight).

    Args:
        labels: int64 (N,).
        synthetic: whether an image is synthetic, bool (N,).
        class_weights: (C,), or None for equal ones.
        real_weight: lambda of DataDream: the batch's loss is lambda * mean over its real images + (1 - lambda) * mean
            over its synthetic ones; a batch of one kind alone has that kind's mean. None weighs all images alike.

    Returns:
        float (N,), or None where all images weigh the same.
    """
    import torch

    if class_weights is None and real_weight is None:
        return None
    weights = torch.ones(len(labels), device=labels.device)
    if class_weights is not None:
        weights = class_weights.to(weights.dtype)[labels]
    if real_weight is not None:
        of_real, of_synthetic = (weights * ~synthetic).sum(), (weights * synthetic).sum()
        shared = weights * torch.where(synthetic, (1 - real_weight) / of_synthetic, real_weight / of_real)
        # Chosen on the device: to ask which kinds a batch has would make the host wait for it.
        weights = torch.where(synthetic.any() & ~synthetic.all(), shared, weights)
    return weights


def batch_mean(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The loss of a batch from those of its images (N,) and their weights (N,)."""
    return values.mean() if weights is None else (values * weights).sum() / weights.sum()
