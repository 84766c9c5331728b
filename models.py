"""Classifiers, generators and CLIPs, built or loaded by name or path.

torch is imported at the top; diffusers, transformers and open_clip take seconds to import and are
imported where they load.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from cli import UserError


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
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, 0, self.extra)))


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
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

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
        return F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


# The same word means two families in the literature: by these depths a name is one for small or for large images.
SMALL_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
LARGE_DEPTHS = (10, 18, 34, 50, 101, 152)


def build_classifier(
    name: str,
    num_classes: int,
    image_size: int | None = None,
    pretrained: bool = False,
    cosine_head: bool = False,
) -> nn.Module:
    """A classifier, with fresh weights unless `pretrained`.

    Args:
        name: `resnet8`, `resnet14`, `resnet20`, `resnet32`, `resnet44`, `resnet56`, `resnet110`: He et al.'s for small
            images. `resnet10`, `resnet18`, `resnet34`, `resnet50`, `resnet101`, `resnet152`: torchvision's for large
            ones (resnet10 has one block a stage, as in the long-tail literature). `timm:NAME`: any model of timm.
        image_size: side of the images in pixels, for models of timm that are built for one size.
        pretrained: start from timm's weights for that name, with a new last layer.
        cosine_head: end in a CosineHead instead of a linear layer.

    Raises:
        UserError: no such classifier, or one without pre-trained weights.
    """
    match = re.fullmatch(r"resnet(\d+)", name)
    depth = int(match[1]) if match else 0
    if pretrained and not name.startswith("timm:"):
        raise UserError(f"--pretrained with --model {name}: expected a model of timm, such as timm:resnet50")
    if depth in SMALL_DEPTHS:
        model: nn.Module = CifarResNet(depth, num_classes)
    elif depth in LARGE_DEPTHS:
        from torchvision.models import resnet

        if depth == 10:
            model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
        else:
            model = getattr(resnet, name)(num_classes=num_classes)
    elif name.startswith("timm:"):
        model = _build_timm(name, num_classes, image_size, pretrained)
    else:
        raise UserError(
            f"--model {name}: unknown; expected resnetN with N of {SMALL_DEPTHS} for small images or {LARGE_DEPTHS} "
            "for large ones, or timm:NAME"
        )
    if cosine_head:
        place, last = [(place, layer) for place, layer in model.named_modules() if isinstance(layer, nn.Linear)][-1]
        parent, _, attribute = place.rpartition(".")
        setattr(model.get_submodule(parent), attribute, CosineHead(last.in_features, last.out_features))
    return model


def _build_timm(name: str, num_classes: int, image_size: int | None, pretrained: bool) -> nn.Module:
    import timm

    plain = name.removeprefix("timm:")
    if not timm.is_model(plain):
        raise UserError(f"--model {name}: timm has no model of that name; expected one of timm.list_models()")
    config = timm.get_pretrained_cfg(plain)
    sized = {"img_size": image_size} if image_size and config is not None and config.fixed_input_size else {}
    try:
        return timm.create_model(plain, pretrained=pretrained, num_classes=num_classes, **sized)
    except Exception as error:  # no network, no weights, a size that the model cannot have: each its own class
        raise UserError(f"--model {name}: cannot be built: {_first_line(error)}") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Start a classifier from a checkpoint: one of train_lt.py (its last epoch), or a file of weights alone.

    Raises:
        UserError: not readable, or the weights of another architecture or number of classes.
    """
    import runs

    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--init-checkpoint {path}: not readable ({_first_line(error)})") from error
    else:
        content = runs.load_checkpoint(path, "cpu")
        weights = content.get("model", content)
    wanted = model.state_dict()
    different = [name for name in sorted(weights.keys() ^ wanted.keys())]
    different += [
        f"{name} {tuple(weights[name].shape)}, here {tuple(wanted[name].shape)}"
        for name in sorted(weights.keys() & wanted.keys())
        if weights[name].shape != wanted[name].shape
    ]
    if different:
        raise UserError(
            f"--init-checkpoint {path}: weights of another model: {len(different)} differ, the first {different[0]}; "
            "expected the same --model, --loss kind and classes"
        )
    model.load_state_dict(weights)


def load_generator(name_or_path: str, device: str, revision: str | None = None):
    """An image-to-image diffusion pipeline by hub name or local folder, ready to draw on `device`.

    No safety checker (it blacks out harmless images), no watermark, and no progress bar of its own.

    Raises:
        UserError: nothing of that name can be loaded.
    """
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    _check_path("--generator", name_or_path, "model_index.json")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        pipe = diffusers.AutoPipelineForImage2Image.from_pretrained(
            name_or_path, dtype=dtype, revision=revision, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"--generator {name_or_path}: cannot be loaded: {_first_line(error)}") from error
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    if hasattr(pipe, "watermark"):
        pipe.watermark = None
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_clip(name_or_path: str, device: str):
    """An open_clip model by `ARCHITECTURE:TAG` (`ViT-B-32:openai`) or local folder.

    OpenAI's weights were trained with QuickGELU and are always loaded with it.

    Returns:
        model (in evaluation mode), preprocess (PIL image to float (3, H, W)), tokenizer (texts to int (N, length)).

    Raises:
        UserError: nothing of that name can be loaded.
    """
    import open_clip

    try:
        if Path(name_or_path).is_dir():
            _check_path("--clip", name_or_path, "open_clip_config.json")
            name = f"local-dir:{Path(name_or_path).resolve()}"
            model, preprocess = open_clip.create_model_from_pretrained(name, device=device)
        else:
            name, _, tag = name_or_path.partition(":")
            if not tag:
                raise ValueError("expected a folder that exists, or ARCHITECTURE:TAG such as ViT-B-32:openai")
            model, preprocess = open_clip.create_model_from_pretrained(
                name, pretrained=tag, device=device, force_quick_gelu=tag == "openai"
            )
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--clip {name_or_path}: cannot be loaded: {_first_line(error)}") from error
    return model.eval(), preprocess, tokenizer


def _check_path(flag: str, name: str, needed: str) -> None:
    """Raise UserError where `name` can only be a local folder and is none, before a hub is asked for it."""
    path = Path(name)
    looks_local = path.is_absolute() or name.startswith(".") or name.count("/") != 1 or path.exists()
    if looks_local and "/" in name and not (path / needed).is_file():
        raise UserError(f"{flag} {name}: expected a folder that holds {needed}, or a name on the hub")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def pick_device(name: str) -> str:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means on this machine.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here: {_first_line(error)}") from error
    return name
