"""What is done to training images, in batches on the device: shifts, flips, colour jitter, normalisation.

All draws of a pass come from a CPU generator, batch by batch, and go to the device at once: so the same images are made
whatever the device and however many processes there are, and no step waits for a copy.
"""

from __future__ import annotations

from functools import lru_cache

import torch

AUGMENTATIONS = ("none", "shift", "crop_flip", "resized_crop", "cuda", "resize")
ALL = slice(None)


def draw(args, side: int, count: int, generator: torch.Generator, cropped: bool = False) -> dict[str, torch.Tensor]:
    """What is drawn for a batch of `count` images, by name; the images are the last dimension of each.

    The crop of `resized_crop` is made where the image is decoded (training/stores.py); its flip is made here. So are
    the operations of `cuda`, beside which an image is flipped and, if it was not `cropped` there, shifted as by
    crop_flip.

    Args:
        side: the shorter side of the images.

    Returns:
        Those of `shifts` int64 (2, n), `mirrored` bool (n,) and `jitter` float (3, n) that `augment` needs.
    """
    draws = {}
    shifted = args.augment in ("shift", "crop_flip") or (args.augment == "cuda" and not cropped)
    if shifted:
        draws["shifts"] = draw_shifts(side, count, generator)
    if args.augment in ("crop_flip", "resized_crop", "cuda"):
        draws["mirrored"] = draw_mirrored(count, generator)
    if args.color_jitter:
        draws["jitter"] = 1 + args.color_jitter * (2 * torch.rand(3, count, generator=generator) - 1)
    return draws


def draw_shifts(side: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """How far down and to the right each image is moved, int64 (2, n): up to 1/8 of the side either way."""
    pad = max(1, side // 8)
    return torch.randint(2 * pad + 1, (2, count), generator=generator) - pad


def draw_mirrored(count: int, generator: torch.Generator) -> torch.Tensor:
    """Whether each image is mirrored, bool (n,), with even odds."""
    return torch.rand(count, generator=generator) < 0.5


def augment(args, images: torch.Tensor, draws: dict[str, torch.Tensor], rows: slice = ALL) -> torch.Tensor:
    """Training images uint8 (n, 3, H, W) augmented: values 0 to 255.

    Args:
        draws: of the whole batch (`draw`), on the device.
        rows: which images of the batch these are.
    """
    own = {name: values[..., rows] for name, values in draws.items()}
    if "shifts" in own:
        images = shift(images, own["shifts"], own.get("mirrored"), args.augment == "shift")
    elif "mirrored" in own:
        images = flip(images, own["mirrored"])
    return color_jitter(images, own["jitter"]) if "jitter" in own else images


def shift(images: torch.Tensor, shifts: torch.Tensor, mirrored: torch.Tensor | None, edge: bool) -> torch.Tensor:
    """Images shifted each by its own draw, and then mirrored where `mirrored` says so.

    Args:
        images: uint8 (n, 3, H, W).
        edge: what lies outside the image repeats its edge; otherwise it is black.

    Returns:
        uint8 (n, 3, H, W).
    """
    height, width = images.shape[2:]
    y = shifts[0, :, None] + torch.arange(height, device=images.device)
    x = shifts[1, :, None] + torch.arange(width, device=images.device)
    if mirrored is not None:
        x = torch.where(mirrored[:, None], x.flip(1), x)
    at = torch.arange(len(images), device=images.device)[:, None, None]
    inside_y, inside_x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    # Whole pixels are gathered from images laid out (n, H, W, 3): a third of the look-ups.
    shifted = images.permute(0, 2, 3, 1)[at, inside_y[:, :, None], inside_x[:, None, :]].permute(0, 3, 1, 2)
    if edge:
        return shifted
    inside = (y == inside_y)[:, None, :, None] & (x == inside_x)[:, None, None, :]
    return shifted * inside


def flip(images: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Images (n, 3, H, W), mirrored where `mirrored`, bool (n,), says so."""
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def color_jitter(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation of images, each multiplied by its factor, in this order.

    Args:
        images: (n, 3, H, W), values 0 to 255.
        factors: float (3, n).

    Returns:
        float (n, 3, H, W), values 0 to 255.
    """
    brightness, contrast, saturation = factors[:, :, None, None, None]
    grey = on_device((0.299, 0.587, 0.114), images.device)
    images = images.to(torch.float32, copy=True).mul_(brightness).clamp_(0, 255)
    mean = (images.mean((2, 3), keepdim=True) * grey).sum(1, keepdim=True)
    images.sub_(mean).mul_(contrast).add_(mean).clamp_(0, 255)
    own = (images * grey).sum(1, keepdim=True)
    return images.sub_(own).mul_(saturation).add_(own).clamp_(0, 255)


@lru_cache(maxsize=64)
def on_device(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """A constant of each channel, float (C, 1, 1), copied to the device once."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)[:, None, None]


@lru_cache(maxsize=64)
def statistics(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple:
    """The divisor of images of values 0 to 255, and the offset subtracted after it, float (C, 1, 1) each."""
    with torch.inference_mode(False):
        mean, std = on_device(mean, device), on_device(std, device)
        return 255 * std, mean / std


def normalise(images: torch.Tensor, mean: tuple, std: tuple) -> torch.Tensor:
    """Images (N, 3, H, W) of values 0 to 255, as float with the channels' mean and standard deviation taken out."""
    scale, offset = statistics(tuple(mean), tuple(std), images.device)
    return images.to(torch.float32, copy=True).div_(scale).sub_(offset)


def mixer(name: str, num_classes: int):
    """torchvision's CutMix or MixUp: images and labels of a batch to mixed images and label shares (N, C)."""
    from torchvision.transforms import v2

    kind = {"cutmix": v2.CutMix, "mixup": v2.MixUp}[name]
    return kind(num_classes=num_classes)
