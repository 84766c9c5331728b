"""The flags of the trainers: the shared ones, and the losses, models and images of train_lt.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import curricula
from runtime import cli
from runtime.device import count_cores
from training import distributed, losses, optimization

DEFAULT_SPECTRUM = Path("runs/spectrum")


def add_run_flags(parser) -> None:
    """Where a run goes and what it runs on."""
    parser.add_argument(
        "--out",
        type=cli.new_folder,
        metavar="FOLDER",
        help="run folder (default: below runs/, with a name that the settings make)",
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds a run")
    parser.add_argument("--seed", type=cli.whole(0), default=0, metavar="N", help="seed of weights, order and draws")
    cli.add_device_flag(parser)
    parser.add_argument(
        "--workers",
        type=cli.whole(0),
        default=min(4, count_cores()),
        metavar="N",
        help="processes that decode large images; by default 4, or as many as there are cores",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=cli.whole(1),
        default=1,
        metavar="N",
        help="epochs from one checkpoint to the next; a signal writes one at once",
    )


def add_curriculum_flags(group, spelling: Callable[[str], str] = str) -> None:
    """The flags of a curriculum; `spelling` turns the typed name into the one of curricula.py."""
    group.add_argument(
        "--curriculum",
        type=spelling,
        choices=curricula.CURRICULA,
        default="none",
        help="guidance levels of each epoch: "
        + "; ".join(f"{name}: {levels}" for name, levels in curricula.CURRICULA.items()),
    )
    group.add_argument(
        "--spectrum",
        type=Path,
        default=DEFAULT_SPECTRUM,
        metavar="FOLDER",
        help="filtered folder of generate_spectrum.py",
    )
    group.add_argument(
        "--levels",
        type=cli.level,
        nargs="+",
        metavar="PERCENT",
        help="guidance levels to use; 100, the real image, is a stage of d2s, s2d, random, cyclic and all and a "
        "candidate of adaptive (default: all of the spectrum, and 100)",
    )
    group.add_argument(
        "--level-shares",
        type=cli.number(0),
        nargs="+",
        metavar="SHARE",
        help="share of the epochs of d2s and s2d for each level, by ascending level (default: equal shares)",
    )
    group.add_argument("--fixed-level", type=cli.level, default=50, metavar="PERCENT", help="level of fixed")
    group.add_argument(
        "--curriculum-epochs",
        type=cli.whole(0),
        metavar="N",
        help="epochs of the curriculum; the epochs after them train on all real images",
    )
    group.add_argument(
        "--progress-images",
        type=cli.whole(1),
        default=100,
        metavar="N",
        help="hard images that adaptive holds out of training to measure progress on",
    )
    group.add_argument(
        "--real-pass-images",
        type=cli.whole(0),
        default=5000,
        metavar="N",
        help="real images, drawn uniformly, of the training pass by which adaptive measures progress before each epoch",
    )


def add_method_flag(group) -> None:
    group.add_argument(
        "--method",
        choices=["untuned", "cls", "dset", "source"],
        help="how the generator of the spectrum was tuned, as tables call it (default: what the spectrum's plan says; "
        "else checked)",
    )


def add_training_flags(group) -> None:
    group.add_argument("--epochs", type=cli.whole(1), metavar="N", default=80, help="epochs, curriculum included")
    group.add_argument("--batch-size", type=cli.whole(1), metavar="N", default=128, help="images in a step")
    group.add_argument("--optimizer", choices=optimization.OPTIMIZERS, default="adamw", help="how weights are updated")
    group.add_argument("--lr", type=cli.number(0), metavar="RATE", default=1e-3, help="peak learning rate")
    group.add_argument("--momentum", type=cli.number(0, 1), default=0.9, metavar="SHARE", help="momentum of sgd")
    group.add_argument("--weight-decay", type=cli.number(0), metavar="RATE", default=0.0, help="weight decay")
    group.add_argument(
        "--schedule",
        choices=optimization.SCHEDULES,
        default="cosine",
        help="learning rate: a cosine to 0, or lowered at --step-epochs",
    )
    group.add_argument(
        "--step-epochs",
        type=cli.whole(0),
        nargs="+",
        default=[160, 180],
        metavar="N",
        help="epochs at which --schedule steps lowers the rate",
    )
    group.add_argument(
        "--step-factor",
        type=cli.number(0, 1),
        default=0.01,
        metavar="FACTOR",
        help="factor applied to the learning rate at each of --step-epochs",
    )
    group.add_argument(
        "--warmup-epochs", type=cli.number(0), default=0, metavar="N", help="epochs over which the rate rises to --lr"
    )
    group.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast, which GPUs compute faster"
    )
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    group.add_argument(
        "--clip-grad",
        type=cli.number(0),
        metavar="NORM",
        help="clip the gradient to this norm (default: no clipping)",
    )


def add_loss_flags(group) -> None:
    group.add_argument(
        "--loss",
        choices=losses.LOSSES,
        default="ce",
        help="ce: cross-entropy; bs: Balanced Softmax; focal; ldam: label-distribution-aware margins; la: logit "
        "adjustment",
    )
    group.add_argument(
        "--prior",
        choices=["real", "stage"],
        default="real",
        help="class counts that bs, la and ldam use: of the real training set, or of the epoch's images",
    )
    group.add_argument("--focal-gamma", type=cli.number(0), default=2.0, metavar="GAMMA", help="exponent of focal")
    group.add_argument(
        "--ldam-margin", type=cli.number(0), default=0.5, metavar="COSINE", help="ldam's margin of the smallest class"
    )
    group.add_argument(
        "--la-tau", type=cli.number(0), default=1.0, metavar="TAU", help="factor of la's log class shares"
    )
    group.add_argument(
        "--drw", action="store_true", help="deferred re-weighting: classes weighted by their effective number of images"
    )
    group.add_argument(
        "--drw-epoch",
        type=cli.whole(0),
        metavar="N",
        help="epoch from which --drw weights (default: four fifths of --epochs)",
    )
    group.add_argument(
        "--class-weights",
        choices=["none", "inverse"],
        default="none",
        help="inverse: a class weighs 1 / its images in the epoch, synthetic ones counted in; the largest weight is 1",
    )
    group.add_argument(
        "--real-weight",
        type=cli.number(0, 1),
        metavar="LAMBDA",
        help="a batch's loss is LAMBDA * that of its real images + (1 - LAMBDA) * that of its synthetic ones "
        "(default: all images weigh the same)",
    )


def add_model_flags(group) -> None:
    group.add_argument(
        "--model",
        metavar="NAME",
        default="resnet32",
        help="classifier: resnet8, 14, 20, 32, 44, 56, 110 for small images, resnet10, 18, 34, 50, 101, 152 for large; "
        "timm:NAME",
    )
    group.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="start from timm's weights of a timm: model",
    )
    group.add_argument(
        "--init-checkpoint", type=cli.existing_file, metavar="FILE", help="start from these weights of the same model"
    )
    group.add_argument(
        "--image-size",
        type=cli.whole(8),
        default=224,
        metavar="PIXELS",
        help="side of large images in training",
    )
    group.add_argument(
        "--augment",
        choices=["none", "shift", "crop_flip", "resized_crop", "cuda", "resize"],
        default="shift",
        help="shift: by up to 1/8, edges repeated; crop_flip: the same on black, and mirrored; resized_crop: a random "
        "part of a large image, mirrored; cuda: crop_flip or resized_crop, and as many random operations as the "
        "class's level of learning says; resize: nothing, and large images whole, squeezed to a square",
    )
    group.add_argument(
        "--color-jitter",
        type=cli.number(0, 1),
        default=0.0,
        metavar="STRENGTH",
        help="random brightness, contrast and saturation, by a factor of up to 1 +- STRENGTH",
    )
    group.add_argument("--randaugment", action="store_true", help="torchvision's RandAugment of each image")
    group.add_argument(
        "--mix", choices=["none", "cutmix", "mixup"], default="none", help="mix the images of a batch with each other"
    )


def check_flags(args) -> None:
    """Raise UserError where flags that all trainers have do not go together."""
    if args.schedule == "cosine" and args.warmup_epochs >= args.epochs:
        raise cli.UserError(f"--warmup-epochs {args.warmup_epochs:g}: expected fewer than --epochs {args.epochs}")
    if args.curriculum != "none" and args.curriculum_epochs < 1:
        raise cli.UserError(
            f"--curriculum-epochs {args.curriculum_epochs}: --curriculum {args.curriculum} has no epoch; expected 1 or "
            "more, or --curriculum none"
        )
    if args.curriculum != "none" and args.curriculum_epochs > args.epochs:
        raise cli.UserError(
            f"--curriculum-epochs {args.curriculum_epochs}: expected at most --epochs {args.epochs}; pass both"
        )
    late = [str(epoch) for epoch in args.step_epochs if epoch >= args.epochs]
    if args.schedule == "steps" and late and distributed.rank() == 0:
        print(f"--step-epochs {' '.join(late)}: not within --epochs {args.epochs}; the rate is not lowered there")
    if args.level_shares and args.curriculum not in ("d2s", "s2d"):
        raise cli.UserError(f"--level-shares: --curriculum {args.curriculum} has no stages; expected d2s or s2d")
