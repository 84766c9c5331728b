"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("cosine", "steps")


def build_optimizer(args, model):
    """The optimiser called `args.optimizer`, over all parameters that are trained."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    if args.optimizer == "sgd":
        return torch.optim.SGD(trained, args.lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    return kind(trained, args.lr, weight_decay=args.weight_decay, fused=True)


def learning_rate(args, epoch: float, step: float = 0.0) -> float:
    """The learning rate at a moment of training.

    Args:
        epoch: epochs done, a fraction within an epoch.
        step: one step's part of an epoch; the first step of a warm-up is no step at rate 0.

    Returns:
        Over `args.warmup_epochs` a line from 0 to `args.lr`; then a cosine from `args.lr` to 0 at `args.epochs`, or
        `args.lr`, multiplied by `args.step_factor` from each of the epochs `args.step_epochs` on.
    """
    if epoch < args.warmup_epochs:
        return args.lr * min(1.0, (epoch + step) / args.warmup_epochs)
    if args.schedule == "steps":
        return args.lr * args.step_factor ** sum(epoch >= at for at in args.step_epochs)
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def moving_average(model, decay: float):
    """An exponential moving average of a model's weights and BatchNorm statistics, which takes each step's."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def update_average(average, model) -> None:
    """A step of a `moving_average`, as torch's own, but without its copies between host and device.

    Its counter `n_averaged`, on the CPU, is the caller's.
    """
    import itertools

    import torch

    pairs = [
        [value.detach() for value in itertools.chain(one.parameters(), one.buffers())]
        for one in (average.module, model)
    ]
    with torch.no_grad():
        if average.n_averaged == 0:
            for averaged, value in zip(*pairs, strict=True):
                averaged.copy_(value)
            return
        for kind in {value.dtype for value in pairs[0]}:
            chosen = [[value for value in one if value.dtype == kind] for one in pairs]
            average.multi_avg_fn(*chosen, None)


def set_rate(optimizer, rate: float) -> None:
    """Set the learning rate, in place where it lies on the device."""
    for group in optimizer.param_groups:
        if hasattr(group["lr"], "fill_"):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def move_rate(optimizer, device: str) -> None:
    """Keep the learning rate on the device, where a CUDA graph reads it."""
    import torch

    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        if "capturable" in group:
            group["capturable"] = True


def state_of(optimizer) -> dict:
    """An optimiser's state as a checkpoint has it: the same wherever the learning rate lies."""
    state = optimizer.state_dict()
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    groups = [group | {"capturable": False} if "capturable" in group else group for group in groups]
    return state | {"param_groups": groups}
