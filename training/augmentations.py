"""What is done to training images, in batches on the device: shifts, flips, colour jitter, normalisation.

The draws come from a CPU generator, for the whole batch, of which a process may hold a share: so the same images are
made whatever the device and however many processes there are.
"""

from __future__ import annotations

import torch

AUGMENTATIONS = ("none", "shift", "crop_flip", "resized_crop", "cuda", "resize")
ALL = slice(None)


def shift(
    images: torch.Tensor, generator: torch.Generator, count: int, rows: slice, flip: bool, edge: bool
) -> torch.Tensor:
    """Images shifted by up to 1/8 of their side, each by its own draw, and with `flip` mirrored in half of the cases.

    Args:
        images: uint8 (n, 3, H, W), rows `rows` of a batch of `count`.
        edge: what lies outside the image repeats its edge; otherwise it is black.

    Returns:
        uint8 (n, 3, H, W).
    """
    height, width = images.shape[2:]
    pad = max(1, min(height, width) // 8)
    top, left = torch.randint(2 * pad + 1, (2, count), generator=generator)[:, rows].to(images.device)
    y = top[:, None] - pad + torch.arange(height, device=images.device)
    x = left[:, None] - pad + torch.arange(width, device=images.device)
    if flip:
        mirrored = torch.rand(count, generator=generator)[rows].to(images.device) < 0.5
        x = torch.where(mirrored[:, None], x.flip(1), x)
    at = torch.arange(len(images), device=images.device)[:, None, None]
    inside_y, inside_x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    # Whole pixels are gathered from images laid out (n, H, W, 3): a third of the look-ups.
    shifted = images.permute(0, 2, 3, 1)[at, inside_y[:, :, None], inside_x[:, None, :]].permute(0, 3, 1, 2)
    if edge:
        return shifted
    inside = (y == inside_y)[:, None, :, None] & (x == inside_x)[:, None, None, :]
    return shifted * inside


def flip(images: torch.Tensor, generator: torch.Generator, count: int, rows: slice) -> torch.Tensor:
    """Images (n, 3, H, W), each mirrored in half of the cases."""
    mirrored = torch.rand(count, generator=generator)[rows].to(images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def color_jitter(
    images: torch.Tensor, strength: float, generator: torch.Generator, count: int, rows: slice
) -> torch.Tensor:
    """Brightness, contrast and saturation, each by a factor drawn from [1 - strength, 1 + strength], in this order.

    Args:
        images: (n, 3, H, W), values 0 to 255, rows `rows` of a batch of `count`.

    Returns:
        float (n, 3, H, W), values 0 to 255.
    """
    factors = 1 + strength * (2 * torch.rand(3, count, generator=generator)[:, rows] - 1)
    brightness, contrast, saturation = factors.to(images.device)[:, :, None, None, None]
    grey = torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]
    images = images.to(torch.float32, copy=True).mul_(brightness).clamp_(0, 255)
    mean = (images.mean((2, 3), keepdim=True) * grey).sum(1, keepdim=True)
    images.sub_(mean).mul_(contrast).add_(mean).clamp_(0, 255)
    own = (images * grey).sum(1, keepdim=True)
    return images.sub_(own).mul_(saturation).add_(own).clamp_(0, 255)


def augment(
    args, images: torch.Tensor, generator: torch.Generator, count: int, rows: slice = ALL, cropped: bool = False
) -> torch.Tensor:
    """Training images uint8 (n, 3, H, W), rows `rows` of a batch of `count`, augmented: values 0 to 255.

    The crop of `resized_crop` is made where the image is decoded (training/stores.py); its flip is made here. So are
    the operations of `cuda`, beside which an image is flipped and, if it was not `cropped` there, shifted as by
    crop_flip.
    """
    if args.augment in ("shift", "crop_flip") or (args.augment == "cuda" and not cropped):
        images = shift(images, generator, count, rows, args.augment != "shift", args.augment == "shift")
    elif args.augment in ("resized_crop", "cuda"):
        images = flip(images, generator, count, rows)
    if args.color_jitter:
        images = color_jitter(images, args.color_jitter, generator, count, rows)
    return images


def normalise(images: torch.Tensor, mean: tuple, std: tuple) -> torch.Tensor:
    """Images (N, 3, H, W) of values 0 to 255, as float with the channels' mean and standard deviation taken out."""
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return images.to(torch.float32, copy=True).div_(255 * std).sub_(mean / std)


def mixer(name: str, num_classes: int):
    """torchvision's CutMix or MixUp: images and labels of a batch to mixed images and label shares (N, C)."""
    from torchvision.transforms import v2

    kind = {"cutmix": v2.CutMix, "mixup": v2.MixUp}[name]
    return kind(num_classes=num_classes)
