"""A CLIP that is fine-tuned, and the heads that it classifies with: zero-shot, linear, and weights between two models.

torch is imported at the top: a trainer imports this module where it trains.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from loaders.base import DataSet
from runtime.cli import UserError
from training import distributed, evaluation
from training.pool import Pool

TEXT_BATCH = 256
PROBE_STEPS, PROBE_DECAY = 200, 1e-4  # of L-BFGS; weight decay of the probe's weights on scaled logits


class TunedClip(nn.Module):
    """A CLIP in training, alone (flyp) or with a linear head over its image embeddings (ce, lpft).

    Args:
        clip: an open_clip model.
        head: weights of the linear head, float (C, D); its text tower is then left out of training.
    """

    def __init__(self, clip: nn.Module, head: torch.Tensor | None = None):
        super().__init__()
        self.clip, self.head = clip, None
        if head is not None:
            self.head = nn.Linear(head.shape[1], head.shape[0], device=head.device)
            self.set_head(head)
            image_tower = {id(parameter) for parameter in clip.visual.parameters()}
            for parameter in clip.parameters():
                parameter.requires_grad_(id(parameter) in image_tower)

    def set_head(self, weight: torch.Tensor, bias: torch.Tensor | float = 0.0) -> None:
        """Give the linear head these weights, (C, D), and bias, (C,)."""
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.copy_(torch.as_tensor(bias))

    def train(self, mode: bool = True) -> TunedClip:
        """As any module's, but a part without a trained weight stays as it is evaluated, BatchNorm's statistics too."""
        super().train(mode)
        for part in self.clip.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings of unit length, float32 (N, D), of images as the CLIP takes them, (N, 3, H, W)."""
        return F.normalize(self.clip.encode_image(images).float(), dim=-1)

    def text_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings of unit length, float32 (N, D), of token ids, int (N, length)."""
        return F.normalize(self.clip.encode_text(tokens).float(), dim=-1)

    @staticmethod
    def logits(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits float32 (N, C) of embeddings, (N, D): never in bfloat16, which cannot tell scaled cosines apart."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), weight.float(), bias)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor | None = None):
        """Logits, (N, C), of a model with a head; else image and text embeddings and their scale (N, D), (M, D), ()."""
        if self.head is not None:
            return self.logits(self.image_features(images), self.head.weight, self.head.bias)
        return self.image_features(images), self.text_features(tokens), self.clip.logit_scale.exp()


class Classifier(nn.Module):
    """What a TunedClip predicts: images (N, 3, H, W) to logits (N, C). Without a head of its own it is given one."""

    def __init__(self, tuned: TunedClip, weight: torch.Tensor | None = None):
        super().__init__()
        self.tuned, self.weight = tuned, weight

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.weight is None:
            return self.tuned(images)
        return self.tuned.logits(self.tuned.image_features(images), self.weight)


class Embedder(nn.Module):
    """The image embeddings of a TunedClip, (N, 3, H, W) to (N, D)."""

    def __init__(self, tuned: TunedClip):
        super().__init__()
        self.tuned = tuned

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.tuned.image_features(images)


def captions_of(class_names: list[str], templates: list[str]) -> list[str]:
    """The captions of all classes, class by class: caption `label * len(templates) + template`."""
    return [template.replace("{}", name) for name in class_names for template in templates]


@torch.no_grad()
def zero_shot_head(tuned: TunedClip, tokens: torch.Tensor, classes: int) -> torch.Tensor:
    """The head that a CLIP's text tower makes: each class's mean caption embedding, of unit length, times the scale.

    Args:
        tokens: of `captions_of`, int (classes * templates, length), on the model's device.

    Returns:
        float32 (C, D): logits are image embeddings times its transpose.
    """
    training = tuned.training
    tuned.eval()
    features = torch.cat([tuned.text_features(part) for part in tokens.split(TEXT_BATCH)])
    tuned.train(training)
    means = F.normalize(features.view(classes, -1, features.shape[1]).mean(1), dim=-1)
    return tuned.clip.logit_scale.exp().float() * means


def probe_images(
    model: TunedClip,
    pool: Pool,
    places: np.ndarray,
    data: DataSet,
    device: str,
    precision: str,
    between: Callable[[], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear probe of the pool's images at `places`, int (n,), from the model's head on; unreadable ones left out.

    Args:
        between: called after each batch; what it raises ends the probe.

    Returns:
        Weights (C, D) and bias (C,).
    """
    features = evaluation.predict(
        Embedder(model), pool.images, places, data, device, precision, width=model.head.in_features, between=between
    )
    wrong = torch.tensor([float(place in pool.images.unreadable) for place in places])
    keep = distributed.total(wrong, device).cpu() == 0
    labels = torch.from_numpy(pool.labels[places])
    return linear_probe(features[keep].to(device), labels[keep].to(device), model.head.weight.detach())


def linear_probe(
    features: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear classifier of fixed embeddings, fitted by L-BFGS to the cross-entropy of all of them at once.

    Args:
        features: float (N, D).
        labels: int64 (N,).
        weight: where it starts, (C, D): the zero-shot head.

    Returns:
        Weights (C, D) and bias (C,).
    """
    weight = weight.clone().requires_grad_(True)
    bias = torch.zeros(len(weight), device=weight.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=PROBE_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + PROBE_DECAY * weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def interpolate(zero_shot: dict, tuned: dict, alpha: float) -> dict:
    """WiSE-FT (Wortsman et al., 2022): the weights (1 - alpha) * zero_shot + alpha * tuned of two state dicts.

    What is not floating point, or not finite (counters, and masks of minus infinity), is the tuned model's.
    """

    def between(name: str, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return value
        mixed = torch.lerp(zero_shot[name], value, alpha)
        return torch.where(value.isfinite() & zero_shot[name].isfinite(), mixed, value)

    return {name: between(name, value) for name, value in tuned.items()}


def save_clip(model: TunedClip, path: Path) -> None:
    """The tuned CLIP alone, as open_clip reads it: whole, or its image tower tuned and its text tower as it was."""
    from safetensors.torch import save_file

    save_file(
        {name: value.detach().cpu().contiguous().clone() for name, value in model.clip.state_dict().items()}, path
    )


def input_of(clip: nn.Module, name: str) -> tuple[int, tuple, tuple]:
    """The side in pixels of a CLIP's square images, and the mean and standard deviation that they are normalised by.

    Raises:
        UserError: its images are not square.
    """
    size = clip.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if height != width:
        raise UserError(f"--clip {name}: takes images of {width}x{height}; expected a model of square ones")
    return height, tuple(clip.visual.image_mean), tuple(clip.visual.image_std)
