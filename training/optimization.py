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
