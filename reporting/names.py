"""What tables, figures and run folders call the settings of a run."""

from __future__ import annotations

import re
from pathlib import Path

DATASET_NAMES = {
    "cifar10_lt": "CIFAR10-LT",
    "cifar100_lt": "CIFAR100-LT",
    "cifar100_lt_20": "CIFAR100-LT, every fifth class",
    "cifar100_lt_20_plus_web": "CIFAR100-LT, every fifth class, and the images that the draw left over",
    "imagenet_lt": "ImageNet-LT",
    "iwildcam": "iWildCam",
    "inat2018": "iNaturalist 2018",
    "places_lt": "Places-LT",
    "aircraft": "FGVC-Aircraft",
    "caltech101": "Caltech101",
    "cars": "Stanford Cars",
    "dtd": "DTD",
    "eurosat": "EuroSAT",
    "flowers102": "Flowers102",
    "food101": "Food101",
    "imagenet": "ImageNet",
    "pets": "Oxford Pets",
    "sun397": "SUN397",
    "cub": "CUB",
    "waterbirds": "Waterbirds",
    "waterbirds_biased": "Waterbirds, 100 % biased",
    "planes": "Planes",
    "iwildcam7": "iWildCam, 7 classes",
}
LOSS_NAMES = {"ce": "CE", "bs": "BS", "focal": "focal", "ldam": "LDAM", "la": "LA", "lpft": "LP-FT", "flyp": "FLYP"}
CURRICULUM_NAMES = {"text_only": "text only", "all": "all levels"}
# Test figures of results.json in a table's order. WE is WiSE-FT's weight ensembling.
FIGURES = (
    "many", "medium", "few", "overall", "ood_f1", "id_f1", "ood_f1_we", "id_f1_we", "ood_acc", "id_acc",
    "id", "ood", "balanced", "worst_group", "macro_f1",
)  # fmt: skip
FIGURE_NAMES = {
    "overall": "all",
    "ood_f1": "OOD macro-F1",
    "id_f1": "ID macro-F1",
    "ood_f1_we": "OOD macro-F1 with WE",
    "id_f1_we": "ID macro-F1 with WE",
    "ood_acc": "OOD accuracy",
    "id_acc": "ID accuracy",
    "id": "ID",
    "ood": "OOD",
    "balanced": "all groups",
    "worst_group": "worst group",
    "macro_f1": "macro-F1",
}
MIX_NAMES = {"cutmix": "CutMix", "mixup": "mixup"}
# What --edits says of the images that --add takes.
EDIT_NAMES = {"text": "text to image", "user": "edits by the user's prompt", "domains": "ALIA"}
ZERO_SHOT = "zero-shot"  # the row of a CLIP that is not tuned


def is_balanced(args: dict) -> bool:
    """Whether a stage fills every hard class up to one size (`--fill balanced`; older runs: `--balanced`)."""
    return bool(args.get("balanced")) or args.get("fill") == "balanced"


def row_name(args: dict) -> str:
    """What a table calls a run's settings."""
    if "images" in args:
        return few_shot_row(args)
    if "clip" in args and not args.get("lr"):
        return ZERO_SHOT
    loss = args.get("loss", "ce")
    name = LOSS_NAMES.get(loss, loss)
    curriculum = args.get("curriculum", "none")
    if loss == "bs" and args.get("prior") == "stage":
        name += " (stage prior)"
    if args.get("augment") == "cuda":
        name += " + CUDA"
    if args.get("method") not in (None, "untuned"):
        name += f" + {args['method']} tuning"
    if args.get("merge_same_class"):
        name += " (classes merged)"
    name += "".join(f" + {word}" for word in added_names(args))
    if curriculum == "fixed":
        name += f" + level {args.get('fixed_level', 50)}"
    elif curriculum != "none" and not (args.get("add") and curriculum == "all"):
        name += f" + {CURRICULUM_NAMES.get(curriculum, curriculum)}"
    elif loss == "ce" and args.get("init_checkpoint"):
        name += ", trained on"
    if is_balanced(args):
        name += ", balanced fill"
    return name


def added_names(args: dict) -> list[str]:
    """What a row of ALIA's tables adds to the real images: augmentations, extra real images, edits and their rules."""
    words = ["RandAugment"] if args.get("randaugment") else []
    words += [MIX_NAMES[args["mix"]]] if args.get("mix") in MIX_NAMES else []
    words += ["extra real"] if args.get("extra_real") else []
    if args.get("add"):
        rules = list(args.get("edit_rules") or [])
        suffix = {(): "", ("none",): ", unfiltered"}.get(tuple(rules), f" ({', '.join(rules)})")
        words.append(EDIT_NAMES.get(args.get("edits"), "edits") + suffix)
    return words


def few_shot_row(args: dict) -> str:
    """The row of a run of train_fewshot.py: its images, the origin of the synthetic ones, and other differences."""
    if args.get("model") == "clip" and not args.get("lr"):
        return ZERO_SHOT
    drawn = f"{args.get('method', 'untuned')} synthetic"
    name = {"real": "real", "synthetic": drawn, "both": f"real + {drawn}"}[args["images"]]
    if args["images"] != "real" and args.get("curriculum") != "all":
        name += f" + {args['curriculum']}"
    if args.get("model") == "clip" and args.get("tune") != "lora":
        name += f", {args['tune']}"
    return name


def table_name(args: dict) -> str:
    """What the table of a run's settings is called: data set, imbalance ratio where it was chosen, model or CLIP."""
    name = DATASET_NAMES.get(args["dataset"], args["dataset"])
    if "images" in args:
        name += f", {args['shots']} shots" if args.get("shots") else ""
        if args["model"] != "clip":
            return f"{name}, {re.sub(r'^resnet', 'ResNet-', str(args['model']))}"
    if args.get("imb_ratio") is not None:
        name += f" IR{float(args['imb_ratio']):g}"
    if "clip" in args:
        return f"{name}, {Path(str(args['clip']).removeprefix('hf-hub:').partition(':')[0]).name}"
    return f"{name}, {re.sub(r'^resnet', 'ResNet-', str(args['model']).removeprefix('timm:').partition('.')[0])}"


def folder_name(args: dict, shipped: dict[str, dict], script: str) -> str:
    """The run folder's name, without the seed: the settings that differ from the data set's defaults.

    Args:
        shipped: the data set's defaults: "data" or the script -> flag -> value.
        script: the trainer, "train_lt" or "train_iwildcam".
    """
    words = [args["dataset"]]
    if args["imb_ratio"] not in (None, shipped.get("data", {}).get("imb_ratio")):
        words.append(f"ir{args['imb_ratio']:g}")
    model = "clip" if "clip" in args else "model"
    if args[model] != shipped[script][model]:
        words.append(re.sub(r"\W", "-", Path(args[model]).name))
    if args.get("init_checkpoint"):
        words.append("init")
    words.append(args["loss"])
    if args.get("prior") == "stage":
        words.append("stage")
    if args.get("augment") == "cuda":
        words.append("cuda")
    if args.get("merge_same_class"):
        words.append("merged")
    if "clip" in args and not args["lr"]:
        words.append("zero-shot")
    words.append(f"fixed{args['fixed_level']}" if args["curriculum"] == "fixed" else args["curriculum"])
    if is_balanced(args):
        words.append("balanced")
    words += [f"{args['method']}-tuned"] if args.get("method") not in (None, "untuned") else []
    words += [str(args[name]) for name in ("mix",) if args.get(name) in MIX_NAMES]
    words += [name.replace("_", "-") for name in ("randaugment", "extra_real") if args.get(name)]
    if args.get("add"):
        words += [args.get("edits") or "edits", *(args.get("edit_rules") or [])]
    return "_".join(words)


def figure_order(name: str) -> int:
    return FIGURES.index(name) if name in FIGURES else len(FIGURES)
