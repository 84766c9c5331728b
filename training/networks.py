"""The small-image ResNets and the last layers of classifiers."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free shortcut (He et al., 2016, option A)."""

    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - width_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
        return F.relu(y + (F.pad(shortcut, (0, 0, 0, 0, 0, self.extra)) if self.extra else shortcut))


class CifarResNet(nn.Module):
    """The ResNet for small images of He et al. (2016), section 4.2: 6n + 2 layers, widths 16, 32, 64.

    Args:
        depth: 6n + 2: 8, 14, 20, 32, 44, 56, 110.

    Shapes: float (N, 3, H, W), normalised, to logits (N, num_classes).
    """

    def __init__(self, depth: int, num_classes: int):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks, width_in = [], 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for i in range((depth - 2) // 6):
                blocks.append(BasicBlock(width_in, width, stride if i == 0 else 1))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # by the inputs, as LDAM-DRW and classifier-balancing do
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.head(x.mean((2, 3)))


class CosineHead(nn.Module):
    """A last layer whose logits are cosines of features and class weights, in [-1, 1], as LDAM takes them.

    Shapes: float (N, D) to (N, num_classes).
    """

    def __init__(self, features: int, num_classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, features))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with _full_precision(x.device.type):
            return F.linear(F.normalize(x.float(), dim=-1), F.normalize(self.weight, dim=1))


class FullPrecisionLinear(nn.Linear):
    """A last layer that autocast leaves in float32.

    In bfloat16 the best logit of one image in a hundred equals the next, and such ties all go to the class of the lower
    index, which in a long-tailed data set made by index is the larger one.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with _full_precision(x.device.type):
            return super().forward(x.float())


def _full_precision(device: str):
    """A context without autocast."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
