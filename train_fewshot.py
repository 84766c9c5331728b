"""DataDream, step 3: train a classifier on a few real images a class, on synthetic ones, or on both.

A CLIP with low-rank adapters on both towers (or fine-tuned whole, or a linear probe over it), whose logits are scaled
cosines to the class prompts; or a ResNet or any model of timm. Batches are half real and half synthetic, and the loss
is 0.8 times that of the real half plus 0.2 times that of the synthetic one.

Reads:  the data set (--shots K a class), for synthetic images a spectrum folder; where filter_clipscore.py has scored
        it, its accepted images, else all of them
Writes: OUT/args.json, shots.csv, checkpoint.pt, TensorBoard events, history.jsonl, predictions.npz, results.json: test
        accuracy of the last epoch, of the best by validation, and for a CLIP zero-shot and of WiSE-FT
        with --grid OUT/grid/SETTING/, a run each, and the results of the one that is best on validation

After a kill, the same command resumes after the last finished epoch, to the same result; SIGTERM and SIGUSR2
are answered by a checkpoint within the epoch and exit code 75. `torchrun --nproc-per-node N train_fewshot.py ...`
trains in N processes. The test set is evaluated once, at the end.

    python train_fewshot.py --dataset fewshot_digits --shots 4 --images real
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

import datasets
from curricula import REAL
from loaders.base import DataSet, ImageSet
from runtime import cli, files
from runtime.signals import StopSignals
from spectrum import folder as spectrum_folder
from spectrum.kept import load_spectrum
from training import distributed, epochs, flags, optimization
from training.fewshot import Trainer
from training.pool import build_pool, check_files, describe_splits, method_of, prepare_spectrum

GRID_FLAGS = {
    "lr": cli.number(0), "weight_decay": cli.number(0), "epochs": cli.whole(1), "real_weight": cli.number(0, 1)
}  # fmt: skip


def grid(text: str) -> tuple[str, list[float]]:
    """The argparse type of FLAG=A,B,...: a flag of GRID_FLAGS and its values."""
    name, _, listed = text.partition("=")
    name = name.replace("-", "_")
    if name not in GRID_FLAGS or not listed:
        known = ", ".join(flag.replace("_", "-") for flag in GRID_FLAGS)
        raise argparse.ArgumentTypeError(f"{text!r}: expected FLAG=A,B,... with FLAG of {known}")
    return name, [GRID_FLAGS[name](value) for value in listed.split(",")]


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "train_fewshot")
    datasets.add_flags(parser, "fewshot_digits")
    datasets.add_shot_flags(parser)
    flags.add_run_flags(parser)
    group = parser.add_argument_group("images")
    group.add_argument("--images", choices=["real", "synthetic", "both"], default="both", help="images to train on")
    group.add_argument(
        "--real-weight", type=cli.number(0, 1), default=0.8, metavar="LAMBDA",
        help="a batch's loss is LAMBDA * that of its real half + (1 - LAMBDA) * that of its synthetic half",
    )  # fmt: skip
    flags.add_curriculum_flags(group)
    flags.add_method_flag(group)
    parser.set_defaults(curriculum="all")
    add_model_flags(parser.add_argument_group("model"))
    group = parser.add_argument_group("training")
    flags.add_training_flags(group)
    group.add_argument(
        "--augment", choices=["none", "shift", "resized_crop", "datadream"], default="datadream",
        help="shift: by up to 1/8; resized_crop: mirrored (large images are cropped at random anyway; small ones are "
        "shifted); datadream: the same, with RandAugment, colour jitter, grey, blur and solarisation",
    )  # fmt: skip
    group.add_argument(
        "--mix", choices=["none", "cutmix", "mixup", "both"], default="none",
        help="mix the images of a batch with others of their own kind, real or synthetic",
    )  # fmt: skip
    group.add_argument(
        "--mix-share", type=cli.number(0, 1), default=0.2, metavar="SHARE", help="share of the batches that --mix mixes"
    )
    group.add_argument(
        "--grid", type=grid, nargs="+", default=[], metavar="FLAG=A,B",
        help="train with every combination of these values, and take the one that is best on validation",
    )  # fmt: skip
    return parser


def add_model_flags(group) -> None:
    group.add_argument(
        "--model", default="clip", metavar="NAME",
        help="clip (the model of --clip), or a classifier: resnet8 and so on for small images, resnet50 for large, "
        "timm:NAME",
    )  # fmt: skip
    group.add_argument(
        "--clip", default="ViT-B-16:openai", metavar="NAME",
        help="open_clip model: ARCHITECTURE:TAG, ARCHITECTURE:FILE, hf-hub:NAME or folder",
    )  # fmt: skip
    group.add_argument(
        "--tune", choices=["lora", "probe", "full"], default="lora",
        help="of a CLIP: adapters, a linear head over its image embeddings that starts as the zero-shot one, or all "
        "weights; a classifier is trained whole",
    )  # fmt: skip
    group.add_argument(
        "--template", metavar="TEXT", help="class prompt, with {} (default: the data set's tuning prompt)"
    )
    group.add_argument("--lora-rank", type=cli.whole(1), default=16, metavar="N", help="rank of the adapters")
    group.add_argument("--lora-alpha", type=cli.number(0), default=32, metavar="A", help="adapters' scale times rank")
    group.add_argument(
        "--lora-dropout", type=cli.number(0, 0.99), default=0.1, metavar="SHARE", help="dropout on the adapters' inputs"
    )
    group.add_argument(
        "--lora-targets",
        choices=["q", "k", "v", "out"],
        nargs="+",
        default=["q", "v"],
        help="projections with adapters",
    )
    group.add_argument("--tower", choices=["image", "text", "both"], default="both", help="towers with adapters")
    group.add_argument("--pretrained", action="store_true", help="start from timm's weights of a timm: model")
    group.add_argument(
        "--image-size", type=cli.whole(8), default=224, metavar="PIXELS", help="side of a classifier's large images"
    )


def complete_flags(args) -> None:
    """Defaults that follow from other flags, and what does not go together.

    Raises:
        UserError: the latter.
    """
    args.template = args.template or datasets.TEMPLATES[args.dataset][0]
    if "{}" not in args.template:
        raise cli.UserError(f"--template {args.template!r}: expected a text with {{}}, where the class name goes")
    if args.images == "real":
        args.curriculum = "none"
    elif args.curriculum == "none":
        raise cli.UserError(f"--curriculum none: --images {args.images} has synthetic images; expected another one")
    if args.images == "synthetic" and args.curriculum not in ("all", "text_only", "fixed"):
        raise cli.UserError(
            f"--curriculum {args.curriculum}: ends with real images; expected all with --images synthetic"
        )
    if args.images == "both" and args.batch_size % 2:
        raise cli.UserError(f"--batch-size {args.batch_size}: expected an even number, half of it real images")
    if args.curriculum_epochs is None:
        args.curriculum_epochs = args.epochs
    if args.images == "synthetic" and args.curriculum_epochs < args.epochs:
        raise cli.UserError(
            f"--curriculum-epochs {args.curriculum_epochs}: the epochs after it have real images alone; expected "
            f"{args.epochs}, as --epochs, with --images synthetic"
        )
    flags.check_flags(args)


def finished(args) -> bool:
    """Whether the run that these arguments name is complete."""
    return (run_folder(args) / "results.json").is_file()


def run_folder(args) -> Path:
    """Where a run goes: --out, or a name that its main settings make."""
    words = [args.dataset, f"{args.shots}shots" if args.shots else "whole", args.images]
    words += [f"clip_{args.tune}" if args.model == "clip" else args.model.replace(":", "-")]
    words += ["zero-shot"] * (args.model == "clip" and not args.lr)
    if args.images != "real":
        words += [args.curriculum, args.spectrum.name]
    return args.out or Path("runs", "_".join(words) + f"_draw{args.shot_seed}_seed{args.seed}")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    complete_flags(args)
    args.out = run_folder(args)
    args.device = distributed.start(args.device)
    points = grid_points(args)
    if args.model != "clip":
        import models  # takes seconds

        models.check_classifier(args.model, args.pretrained)
    data = datasets.load_shots(args)
    levels, synthetic = [], {}
    inputs: dict = {"data": files.digest_int(*data.train.sources, *data.val.sources, *data.test.sources)}
    if args.model == "clip" and (digest := spectrum_folder.describe_clip(args.clip)["clip_digest"]):
        inputs["clip"] = digest
    if args.curriculum != "none":
        levels, _ = prepare_spectrum(args, with_real=args.images != "synthetic")
        if min(levels) == REAL:
            raise cli.UserError(f"--images {args.images}: no level below {REAL} is asked for; expected one")
        for one in [args, *(point for _, point in points)]:
            one.method = method_of(args)
            epochs.stage_of(one, 0, levels)
        synthetic = load_spectrum(args.spectrum, [level for level in levels if level < REAL], data, False)
        inputs["spectrum"] = files.digest_files(spectrum_folder.decisive_files(args.spectrum))
        inputs["synthetic"] = [len(synthetic[level]) for level in sorted(synthetic)]
    check_files(args, data.splits)
    if args.grid:
        return search(args, points, lambda point: train(point, data, levels, synthetic, inputs))
    return train(args, data, levels, synthetic, inputs)


def train(args, data: DataSet, levels: list[int], synthetic: dict, inputs: dict) -> int:
    """One run. Returns the script's exit code."""
    splits = describe_splits(data.splits, *data.class_names)
    return epochs.run(args, inputs, splits, lambda signals: prepare(args, data, levels, synthetic, signals))


def grid_points(args) -> list[tuple[dict, argparse.Namespace]]:
    """The runs of --grid: the values of each, and all of its arguments.

    Raises:
        UserError: flags of one of them do not go together.
    """
    points = []
    for values in itertools.product(*(values for _, values in args.grid)) if args.grid else ():
        chosen = dict(zip([name for name, _ in args.grid], values, strict=True))
        name = "_".join(f"{flag}-{value:g}" for flag, value in chosen.items())
        point = argparse.Namespace(**(vars(args) | chosen | {"grid": [], "out": args.out / "grid" / name}))
        if "epochs" in chosen:  # a curriculum to the end of the run is one in each of them
            whole = args.curriculum_epochs == args.epochs
            point.curriculum_epochs = point.epochs if whole else min(args.curriculum_epochs, point.epochs)
        flags.check_flags(point)
        points.append((chosen, point))
    return points


def search(args, points: list[tuple[dict, argparse.Namespace]], run: Callable) -> int:
    """A run for each point of --grid, and the results of the one that is best on validation, as --out's own."""
    rows = []
    for chosen, point in points:
        code = run(point)
        if code:
            return code
        results = files.read_json(point.out / "results.json")
        folder = f"grid/{point.out.name}"
        rows.append(chosen | {"val_overall": results["best_by_val"]["val_overall"], "folder": folder})
    best = max(rows, key=lambda row: row["val_overall"])
    if distributed.rank() == 0:
        for name in ("args.json", "history.jsonl", "predictions.npz", "shots.csv"):
            shutil.copyfile(args.out / best["folder"] / name, args.out / name)
        files.write_json(
            args.out / "results.json", files.read_json(args.out / best["folder"] / "results.json") | {"grid": rows}
        )
        print(f"{args.out}: best of {len(rows)} on validation: {best['folder']}, {best['val_overall']:.1f} %")
    return 0


def prepare(args, data: DataSet, levels: list[int], synthetic: dict, signals: StopSignals) -> tuple[Trainer, dict]:
    """The model, its optimiser and the images on the device, and the run's state: new, or its last checkpoint's."""
    import torch

    import models
    from runtime.device import check_bfloat16, pick_device

    device = pick_device(args.device)
    check_bfloat16(args.precision, device)
    torch.manual_seed(files.digest_int("weights", args.seed))
    tokens, adapters, zero_shot = None, [], {}
    if args.model == "clip":
        model, tokens, adapters, data, size = build_clip(args, data, device)
        zero_shot = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    else:
        size = data.train.images.shape[1] if data.train.in_memory else args.image_size
        model = models.build_classifier(args.model, len(data.class_names), size, args.pretrained).to(device)
        data = models.with_own_statistics(data, args.model, args.pretrained)
    model = distributed.synchronised(model, device)
    optimizer = optimization.build_optimizer(args, model)
    state = epochs.start_or_resume(args, model, optimizer, None, device)
    step_model = distributed.wrap(torch.compile(model) if args.compile else model, device)

    def store(sets: list[ImageSet], augment: str = ""):
        return build_store(args, sets, device, size, augment)

    pool = build_pool(args, data, synthetic, levels, lambda sets: store(sets, args.augment))
    trainer = Trainer(
        args, data, levels, pool, model, step_model, None, optimizer, device, signals, tokens, zero_shot, adapters,
        {"val": store([data.val]), "test": store([data.test])},
    )  # fmt: skip
    return trainer, state


def build_clip(args, data: DataSet, device: str) -> tuple:
    """The CLIP to tune (clip.TunedClip), its class prompts' tokens, its adapters, the data as it sees them, their size.

    Raises:
        UserError: images in memory of another size than the CLIP's, or a tower without an attention layer of torch's.
    """
    import models
    from training import clip as heads
    from training import lora

    # Load the CLIP and its class prompts.
    clip, _, tokenizer = models.load_clip(args.clip, device)
    size, mean, std = heads.input_of(clip, args.clip)
    data = dataclasses.replace(data, mean=mean, std=std)
    if data.train.in_memory and data.train.images.shape[1:3] != (size, size):
        raise cli.UserError(
            f"--clip {args.clip}: takes images of {size}x{size}; expected one of the size of {data.name}'s"
        )
    tokens = tokenizer(heads.captions_of(data.spoken_names, [args.template])).to(device)
    # Choose which weights are trained: all, a linear head, or adapters.
    tuned = heads.TunedClip(clip)
    if args.tune == "full":
        clip.requires_grad_(True)
        clip.logit_scale.requires_grad_(False)
        return tuned.to(device), tokens, [], data, size
    clip.requires_grad_(False)
    if args.tune == "probe":
        tuned = heads.TunedClip(clip, heads.zero_shot_head(tuned, tokens, len(data.class_names)))
        clip.requires_grad_(False)
        return tuned.to(device), tokens, [], data, size
    text = getattr(clip, "text", None) or clip.transformer
    towers = {"image": [clip.visual], "text": [text], "both": [clip.visual, text]}[args.tower]
    adapters = []
    for tower in towers:
        own = lora.add_clip_adapters(tower, args.lora_targets, args.lora_rank, args.lora_alpha, args.lora_dropout)
        if not own:
            raise cli.UserError(
                f"--clip {args.clip}: a tower without adaptable attention; expected --tune full or probe"
            )
        adapters += own
    return tuned.to(device), tokens, adapters, data, size


def build_store(args, sets: list[ImageSet], device: str, size: int, augment: str):
    """The images of some sets as one store (training/stores.py), augmented in training as `augment` says."""
    from training import stores

    more = augment if augment == "datadream" else False
    if sets[0].in_memory:
        images = np.concatenate([one.images for one in sets])
        return stores.InMemory(images, device, "contiguous", more)
    paths = [path for one in sets for path in one.images]
    return stores.Decoded(paths, device, size, args.workers, more, stores.Crop(0.25, 1.0, "bicubic"))


if __name__ == "__main__":
    cli.run(main)
