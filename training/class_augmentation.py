"""CUDA (Ahn, Ko and Yun, ICLR 2023): a curriculum of augmentation, in which each class has a level of learning.

A class's level is how strongly its images are augmented. Before each epoch the model is tried on images of the class at
every strength up to its level; where it gets enough of each right the level rises by one, otherwise it falls by one.
In an epoch half of the images (AUGMENTED) are augmented at their class's level: as many random operations as the level
says, the stronger the higher it is.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as T

from curricula import places_by_label

# The constants of the paper: the highest level; images tried at strength s are TRIED * (s + 1); the share of them that
# has to be right; the share of training images that is augmented; the strength at which an operation is at its most.
HIGHEST, TRIED, RIGHT, AUGMENTED, FULL = 10, 10, 0.6, 0.5, 30

# Pillow's filters of these names, which leave the border as it is.
EDGES = torch.tensor([[-1.0, -1, -1], [-1, 10, -1], [-1, -1, -1]]) / 2
DETAIL = torch.tensor([[0.0, -1, 0], [-1, 10, -1], [0, -1, 0]]) / 6
SMOOTH = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13


def updated(levels: np.ndarray, right: np.ndarray, tried: np.ndarray) -> np.ndarray:
    """The levels after a trial.

    Args:
        levels: of each class, int (C,).
        right, tried: images of each class that the model got right, and that it was tried on, at each strength,
            int (C, HIGHEST + 1).

    Returns:
        One more where more than RIGHT of the images were right at every strength up to the level, otherwise one less;
        from 0 to HIGHEST. A class that was not tried keeps its level.
    """
    needed = np.arange(HIGHEST + 1) <= levels[:, None]
    passed = ((right > RIGHT * tried) | ~needed).all(1)
    changed = np.clip(levels + np.where(passed, 1, -1), 0, HIGHEST)
    return np.where(tried[:, 0] > 0, changed, levels)


def trial(labels: np.ndarray, levels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What the model is tried on: TRIED * (s + 1) images of each class, drawn with replacement, at each strength s.

    Args:
        labels: class of each image, int (N,).
        levels: of each class, int (C,).

    Returns:
        Places in `labels` and strengths, int (n,) each; by class, and within it by strength.
    """
    places, strengths = [], []
    for own, level in zip(places_by_label(labels, len(levels)), levels.tolist(), strict=True):
        for strength in range(level + 1 if len(own) else 0):
            count = TRIED * (strength + 1)
            places.append(rng.choice(own, count))
            strengths.append(np.full(count, strength))
    return np.concatenate(places), np.concatenate(strengths)


def counted(labels: np.ndarray, strengths: np.ndarray, chosen: np.ndarray, classes: int) -> np.ndarray:
    """How many of the `chosen` images, bool (n,), each class has at each strength: int (C, HIGHEST + 1)."""
    width = HIGHEST + 1
    return np.bincount((labels * width + strengths)[chosen], minlength=classes * width).reshape(classes, width)


def epoch_strengths(labels: np.ndarray, levels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The strength at which each image of an epoch is augmented, int (N,): its class's level, or 0 for AUGMENTED."""
    return np.where(rng.random(len(labels)) < AUGMENTED, levels[labels], 0)


# ---------------------------------------------------------------------------------------------------------------------
# the operations: image uint8 (3, H, W), a value, and a sign where there are two directions -> uint8 (3, H, W)


def filtered(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """A 3x3 filter of each channel, borders left as they are."""
    weights = kernel.to(image.device)[None, None].expand(3, 1, 3, 3)
    inside = F.conv2d(image[None].float(), weights, groups=3)[0]
    result = image.clone()
    result[:, 1:-1, 1:-1] = inside.add_(0.5).clamp_(0, 255).to(torch.uint8)
    return result


def blurred(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """A Gaussian blur of `sigma` pixels."""
    if sigma == 0:
        return image
    side = min(2 * math.ceil(3 * sigma) + 1, 2 * (min(image.shape[1:]) // 2) - 1)
    return T.gaussian_blur(image, [side, side], [sigma, sigma])


def moved(
    image: torch.Tensor, angle: float = 0, x: float = 0, y: float = 0, scale: float = 1, shear: tuple = (0.0, 0.0)
) -> torch.Tensor:
    """Rotated by degrees, shifted by pixels, enlarged and sheared about the centre; what lies outside is black."""
    return T.affine(image, angle, [round(x), round(y)], scale, [math.degrees(math.atan(part)) for part in shear])


def solarized_sum(image: torch.Tensor, addition: float) -> torch.Tensor:
    return T.solarize((image.int() + int(addition)).clamp(0, 255).to(torch.uint8), 128)


# The operation, and its value at strength 0 and at strength FULL.
OPERATIONS = [
    (lambda image, value, sign: T.vertical_flip(image), 0, 1),
    (lambda image, value, sign: T.horizontal_flip(image), 0, 1),
    (lambda image, value, sign: filtered(image, EDGES), 0, 1),
    (lambda image, value, sign: filtered(image, DETAIL), 0, 1),
    (lambda image, value, sign: filtered(image, SMOOTH), 0, 1),
    (lambda image, value, sign: T.autocontrast(image), 0, 1),
    (lambda image, value, sign: T.equalize(image), 0, 1),
    (lambda image, value, sign: T.invert(image), 0, 1),
    (lambda image, value, sign: blurred(image, value), 0, 2),
    (lambda image, value, sign: moved(image, scale=value), 1, 1.5),
    (lambda image, value, sign: moved(image, angle=sign * value), 0, 30),
    (lambda image, value, sign: T.posterize(image, max(1, int(value))), 0, 4),
    (lambda image, value, sign: T.solarize(image, min(255, value)), 0, 256),
    (lambda image, value, sign: solarized_sum(image, value), 0, 110),
    (lambda image, value, sign: T.adjust_saturation(image, value), 0.1, 1.9),
    (lambda image, value, sign: T.adjust_contrast(image, value), 0.1, 1.9),
    (lambda image, value, sign: T.adjust_brightness(image, value), 0.1, 1.9),
    (lambda image, value, sign: T.adjust_sharpness(image, value), 0.1, 1.9),
    (lambda image, value, sign: moved(image, shear=(sign * value, 0.0)), 0, 0.3),
    (lambda image, value, sign: moved(image, shear=(0.0, sign * value)), 0, 0.3),
    (lambda image, value, sign: moved(image, x=sign * value), 0, 100),
    (lambda image, value, sign: moved(image, y=sign * value), 0, 100),
]


def augmented(image: torch.Tensor, strength: int, seed: int, number: int) -> torch.Tensor:
    """An image uint8 (3, H, W) after `strength` operations drawn with replacement, each strength / FULL into its range.

    Args:
        seed, number: decide the draws: of the epoch, and the image's number in it.
    """
    if strength == 0:
        return image
    rng = np.random.default_rng([seed, number])
    for kind, sign in zip(rng.integers(len(OPERATIONS), size=strength), rng.choice([-1, 1], strength), strict=True):
        operation, low, high = OPERATIONS[kind]
        image = operation(image, low + (high - low) * strength / FULL, int(sign))
    return image
