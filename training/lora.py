"""Low-rank adapters (LoRA, Hu et al., 2022) in training: of a generator, several at once, and of a CLIP's attention.

torch is imported at the top: a trainer imports this module where it trains.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from runtime import files
from runtime.cli import UserError, first_line

# DataDream's targets: every projection of every attention layer. Names as peft matches them, by their ends.
UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
CLIP_TARGETS = ("q", "k", "v", "out")


class GroupedLinear(nn.Module):
    """A frozen linear layer with several adapters side by side: y = x W + b + alpha / rank * x A B.

    The batch is in as many equal parts as there are adapters, and each part goes through its own. Nothing that one
    adapter computes reaches another, so that each is trained as if it were alone.

    Args:
        base: the layer, whose own weights are frozen.
        groups: number of adapters.

    Shapes: (N, ..., in) to (N, ..., out), N a multiple of `groups`.
    """

    def __init__(self, base: nn.Linear, groups: int, rank: int, alpha: float):
        super().__init__()
        self.base, self.groups, self.scale = base.requires_grad_(False), groups, alpha / rank
        device = base.weight.device
        self.a = nn.Parameter(torch.zeros(groups, base.in_features, rank, device=device))
        self.b = nn.Parameter(torch.zeros(groups, rank, base.out_features, device=device))

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        parts = x.reshape(self.groups, -1, x.shape[-1])
        y = self.base(x)
        # One kernel multiplies by B, scales and adds: on a GPU the launches of a step take as long as its arithmetic.
        low = torch.bmm(parts, self.a)
        return torch.baddbmm(y.reshape(self.groups, -1, y.shape[-1]), low, self.b, alpha=self.scale).view_as(y)


def text_encoders(pipe) -> dict[str, nn.Module]:
    """A pipeline's text encoders by the name of their component: one or two of text_encoder and text_encoder_2."""
    found = {name: getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")}
    return {name: module for name, module in found.items() if module is not None}


def add_adapters(pipe, parts: list[str], groups: int, rank: int, alpha: float) -> dict[str, GroupedLinear]:
    """Put adapters into a pipeline's attention layers; they replace the adapters of an earlier call.

    Args:
        parts: the parts to adapt: `unet`, `text` (all text encoders), or both.

    Returns:
        The layers by their name in a file, such as `unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q`, in
        the models' own order.
    """
    modules = {"unet": pipe.unet} if "unet" in parts else {}
    modules |= text_encoders(pipe) if "text" in parts else {}
    layers: dict[str, GroupedLinear] = {}
    for component, module in modules.items():
        remove_adapters(module)
        for name, layer in find_targets(component, module):
            adapted = GroupedLinear(layer, groups, rank, alpha)
            module.set_submodule(name, adapted)
            layers[f"{component}.{_text_model(component, name)}"] = adapted
    return layers


def find_targets(component: str, module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers of a component (unet, text_encoder, text_encoder_2) that have adapters, by name."""
    endings = UNET_TARGETS if component == "unet" else TEXT_TARGETS
    return [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and any(f".{name}".endswith(f".{ending}") for ending in endings)
    ]


def count_weights(name_or_path: str, revision: str | None, parts: list[str], rank: int) -> dict[str, int]:
    """Weights that an adapter has, by component, from the generator's configuration alone.

    Raises:
        UserError: nothing of that name can be loaded.
    """
    import diffusers
    import transformers

    try:
        config = diffusers.DiffusionPipeline.load_config(name_or_path, revision=revision)
        wanted = ["unet"] * ("unet" in parts)
        wanted += ["text_encoder", "text_encoder_2"] if "text" in parts else []
        modules = {}
        for name in wanted:
            if name not in config or config[name][0] is None:
                continue
            with torch.device("meta"):
                if name == "unet":
                    loaded = diffusers.UNet2DConditionModel.load_config(name_or_path, subfolder=name, revision=revision)
                    modules[name] = diffusers.UNet2DConditionModel.from_config(loaded)
                else:
                    kind = getattr(transformers, config[name][1])
                    loaded = kind.config_class.from_pretrained(name_or_path, subfolder=name, revision=revision)
                    modules[name] = kind(loaded)
    except (OSError, ValueError) as error:
        raise UserError(f"--generator {name_or_path}: cannot be loaded: {first_line(error)}") from error
    return {
        name: sum(rank * (layer.in_features + layer.out_features) for _, layer in find_targets(name, module))
        for name, module in modules.items()
    }


def remove_adapters(module: nn.Module) -> None:
    """Give a module its own linear layers back."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, GroupedLinear):
            module.set_submodule(name, layer.base)


def _text_model(component: str, name: str) -> str:
    """A text encoder's layer as files name it. transformers 5 leaves `text_model.` out, older versions need it."""
    plain = component == "unet" or name.startswith("text_model.")
    return name if plain else f"text_model.{name}"


@torch.no_grad()
def start_adapters(layers: dict[str, GroupedLinear], seeds: list[int]) -> None:
    """Untrained weights: A normal with standard deviation 1 / rank, by each adapter's own seed; B zero."""
    for group, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for layer in layers.values():
            shape = layer.a.shape[1:]
            layer.a[group] = torch.randn(shape, generator=generator).div(shape[1]).to(layer.a.device)
            layer.b[group] = 0


def parameters(layers: dict[str, GroupedLinear]) -> list[nn.Parameter]:
    """All trainable weights, A and B of each layer."""
    return [parameter for layer in layers.values() for parameter in (layer.a, layer.b)]


@torch.no_grad()
def clip_gradients(layers: dict[str, GroupedLinear], norm: float) -> torch.Tensor:
    """Shorten each adapter's gradient to `norm`, as torch's clip_grad_norm_ does for a model.

    Returns:
        The norms before, float (groups,).
    """
    # SDXL reads its first text encoder one layer before the last, whose adapters have no gradient.
    gradients = [parameter.grad for parameter in parameters(layers) if parameter.grad is not None]
    groups = [[gradient[group] for gradient in gradients] for group in range(len(gradients[0]))]
    norms = torch.stack([nn.utils.get_total_norm(own) for own in groups])
    for own, factor in zip(groups, (norm / (norms + 1e-6)).clamp(max=1), strict=True):
        torch._foreach_mul_(own, factor)
    return norms


def adapter_weights(layers: dict[str, GroupedLinear], group: int) -> dict[str, torch.Tensor]:
    """One adapter as diffusers reads it: NAME.lora_A.weight (rank, in) and NAME.lora_B.weight (out, rank)."""
    weights = {}
    for name, layer in layers.items():
        for kind, tensor in (("lora_A", layer.a), ("lora_B", layer.b)):
            weights[f"{name}.{kind}.weight"] = tensor[group].detach().float().T.contiguous().cpu()
    return weights


def save_adapter(path: Path, weights: dict[str, torch.Tensor], rank: int, alpha: float, notes: dict[str, str]) -> None:
    """Write an adapter in diffusers' format, whole or not at all.

    alpha is in the metadata under diffusers' own key: without it a reader takes alpha = rank.

    Args:
        notes: further metadata.
    """
    from safetensors.torch import save

    endings = {
        name: UNET_TARGETS if name == "unet" else TEXT_TARGETS for name in {key.split(".")[0] for key in weights}
    }
    config = {
        f"{component}.{key}": value
        for component, targets in sorted(endings.items())
        for key, value in {"r": rank, "lora_alpha": alpha, "target_modules": list(targets)}.items()
    }
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)} | notes
    content = save(weights, metadata)
    # safetensors orders metadata anew in each process; sorted, equal weights are equal files.
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    files.write_content(path, len(header).to_bytes(8, "little") + header + content[8 + length :])


class LoraAttention(nn.Module):
    """torch's multi-head attention with adapters on some of its projections: W x + b + strength * alpha / rank * B A x.

    torch holds q, k and v as rows of one weight inside the layer, out of peft's reach; here they are computed openly.

    Args:
        attention: the layer, with its batch first or second; its own weights are frozen.
        targets: of CLIP_TARGETS.
        dropout: share of an adapter's inputs that is dropped in training.

    Attributes:
        strength: what the adapters count for, 0 (not at all) to 1: WiSE-FT's alpha.
    """

    def __init__(self, attention: nn.MultiheadAttention, targets: list[str], rank: int, alpha: float, dropout: float):
        super().__init__()
        self.attention, self.scale, self.strength = attention.requires_grad_(False), alpha / rank, 1.0
        width, device = attention.embed_dim, attention.in_proj_weight.device
        self.dropout = nn.Dropout(dropout)
        # As loralib and peft draw it: evenly from -1 / sqrt(width) to 1 / sqrt(width).
        self.a = nn.ParameterDict({name: _even(rank, width, device) for name in targets})
        self.b = nn.ParameterDict({name: torch.zeros(width, rank, device=device) for name in targets})

    def _project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._own(name)
        y = F.linear(x, weight, bias)
        if name not in self.a:
            return y
        low = F.linear(F.linear(self.dropout(x), self.a[name]), self.b[name])
        return y + self.strength * self.scale * low

    def _own(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The frozen weight (width, width) and bias (width,) of a projection."""
        layer = self.attention
        if name == "out":
            return layer.out_proj.weight, layer.out_proj.bias
        rows = slice(CLIP_TARGETS.index(name) * layer.embed_dim, (CLIP_TARGETS.index(name) + 1) * layer.embed_dim)
        return layer.in_proj_weight[rows], None if layer.in_proj_bias is None else layer.in_proj_bias[rows]

    def forward(self, query, key, value, need_weights: bool = False, attn_mask=None, **kwargs):
        """As nn.MultiheadAttention without weights: (output, None)."""
        parts = [self._project(name, x) for name, x in zip("qkv", (query, key, value), strict=True)]
        if not self.attention.batch_first:
            parts = [x.transpose(0, 1) for x in parts]
        heads = [x.unflatten(2, (self.attention.num_heads, -1)).transpose(1, 2) for x in parts]
        mask = attn_mask.to(heads[0].dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)
        return self._project("out", y if self.attention.batch_first else y.transpose(0, 1)), None

    @torch.no_grad()
    def merge(self) -> nn.MultiheadAttention:
        """The layer with its adapters added to its weights; they must not be added twice."""
        for name in self.a:
            self._own(name)[0].add_(self.strength * self.scale * self.b[name] @ self.a[name])
        return self.attention


def _even(rank: int, width: int, device) -> torch.Tensor:
    return torch.empty(rank, width, device=device).uniform_(-(width**-0.5), width**-0.5)


def add_clip_adapters(
    tower: nn.Module, targets: list[str], rank: int, alpha: float, dropout: float = 0.0
) -> list[LoraAttention]:
    """Freeze a tower of an open_clip model and put adapters into each of its attention layers.

    Returns:
        The layers; none where the tower has no attention of torch's kind.
    """
    tower.requires_grad_(False)
    layers = []
    for name, layer in list(tower.named_modules()):
        if isinstance(layer, nn.MultiheadAttention) and layer._qkv_same_embed_dim:
            layers.append(LoraAttention(layer, targets, rank, alpha, dropout))
            tower.set_submodule(name, layers[-1])
    return layers
