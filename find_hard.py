"""Step 1: which training images are hard.

--rule few: in a long-tailed data set, all images of the few-shot classes, which have fewer than --few-below training
images (DisCL). --rule confidence: images on which a model gives the true class a low probability, as in data of low
quality (DisCL). The model is a run of train_lt.py (--checkpoint) or a CLIP, zero-shot or fine-tuned (--clip). --rule
all: every training image, which ALIA edits.

Reads:  the training set; for confidence the model
Writes: OUT (hard.csv: source, label, class_name, reason, score): a row for each hard image; the score is the class's
        image count, or the true class's probability
        OUT with .png: the scores drawn, and where hard begins
        for confidence: OUT with .probabilities.jsonl and .probabilities.json, the score of every training image and
        what made it. After a kill, the same command resumes after the last batch there

    python find_hard.py --dataset digits --out runs/hard.csv
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np

import datasets
from loaders.base import DataSet
from runtime import cli, files, runs
from runtime.text import counted
from spectrum import folder as spectrum_folder
from spectrum import tables
from spectrum.flags import add_clip_flag, add_device_flags

SHOWN = 20  # classes or images that are listed one by one


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "find_hard")
    datasets.add_flags(parser)
    parser.add_argument(
        "--rule",
        choices=["few", "confidence", "all"],
        default="few",
        help="few: all images of the few-shot classes; confidence: images whose true class a model finds unlikely; "
        "all: every training image",
    )
    parser.add_argument(
        "--few-below",
        type=cli.whole(1),
        default=20,
        metavar="IMAGES",
        help="a class is few-shot with fewer training images than this, those held out for validation counted in",
    )
    parser.accept_old("--few-max", "--few-below")
    parser.add_argument(
        "--out", type=cli.new_file, default=Path("runs/hard.csv"), metavar="FILE", help="the table to write"
    )
    group = parser.add_argument_group("confidence")
    rule = group.add_mutually_exclusive_group()
    rule.add_argument(
        "--fraction",
        type=cli.number(0, 1),
        default=0.1,
        metavar="SHARE",
        help="share of the training images that is hard, by the lowest probabilities",
    )
    rule.add_argument(
        "--threshold",
        type=cli.number(0, 1),
        metavar="PROBABILITY",
        help="instead of --fraction: images with a lower probability than this are hard",
    )
    model = group.add_mutually_exclusive_group()
    model.add_argument("--checkpoint", type=cli.existing_folder, metavar="FOLDER", help="run folder of train_lt.py")
    add_clip_flag(model)
    group.add_argument(
        "--templates",
        nargs="+",
        default=["a photo of a {}"],
        metavar="TEXT",
        help="texts that the CLIP reads, with {} for the class name; embeddings of more than one are averaged",
    )
    add_device_flags(group)
    return parser


def find_few(data: DataSet, few_below: int) -> list[int]:
    """Indices of the training images of few-shot classes.

    Raises:
        UserError: no class is.
    """
    counts = data.published_counts
    if counts.min() >= few_below:
        raise cli.UserError(
            f"--few-below {few_below}: no class of {data.name} has fewer images; the smallest has {counts.min()}"
        )
    return [place for place, label in enumerate(data.train.labels.tolist()) if counts[label] < few_below]


# ---------------------------------------------------------------------------------------------------------------------
# confidence


def checkpoint_batches(args, data: DataSet, places: list[int]):
    """Batches of (places, probabilities of all classes (n, C) or None, place -> error), by a checkpoint.

    The images are those of the run's own evaluation: its size, its crop, its normalisation.

    Raises:
        UserError: the run is of other data, its checkpoint does not fit its model, or an image does not decode.
    """
    import torch

    import models
    from runtime.device import pick_device
    from spectrum import embeddings
    from training import evaluation, losses, stores

    # Check that the run is of this data.
    trained = runs.read_arguments(args.checkpoint, "dataset", "model", "loss", "image_size", "augment", "pretrained")
    for name in ("dataset", "imb_ratio", "data_seed"):
        if trained.get(name) != getattr(args, name):
            raise cli.UserError(
                f"--checkpoint {args.checkpoint}: was trained with --{name.replace('_', '-')} {trained.get(name)}; "
                f"expected {getattr(args, name)}"
            )
    device = pick_device(args.device)
    # Load its model.
    size = data.train.images.shape[1] if data.train.in_memory else trained["image_size"]
    if not (args.checkpoint / "checkpoint.pt").is_file():
        raise cli.UserError(f"--checkpoint {args.checkpoint}: no checkpoint.pt there; expected a run of train_lt.py")
    model = models.load_trained(args.checkpoint, trained, len(data.class_names), size).to(device)
    data = models.with_own_statistics(data, trained["model"], trained["pretrained"])
    # Evaluate the training images.
    workers = embeddings.default_workers(device) if args.workers is None else args.workers
    crop, scale = stores.crop_of(trained["augment"]), losses.softmax_scale(trained["loss"])
    store = stores.build([data.train], device, size, workers, "contiguous", crop=crop)
    done = 0
    for images in store.evaluation(np.array(places), args.batch_size):
        with torch.inference_mode():
            logits = evaluation.forward(model, store, images, data)
        yield list(range(done, done + len(images))), (logits * scale).softmax(1), {}
        done += len(images)


def clip_batches(args, data: DataSet, places: list[int]):
    """As `checkpoint_batches`, by a CLIP: the softmax of the scaled cosines to each class's mean text embedding."""
    import torch
    from torch.nn import functional as F

    import models
    from runtime.device import pick_device
    from spectrum import embeddings

    device = pick_device(args.device)
    clip = embeddings.Clip(models.load_clip(args.clip, device), device, args.batch_size, args.workers)
    texts = [clip.texts([template.replace("{}", name) for name in data.spoken_names]) for template in args.templates]
    head = F.normalize(torch.stack(texts).mean(0), dim=-1)
    scale = clip.model.logit_scale.exp().item()
    read = embeddings.read_training_images(data.train, args.data_root)
    for found, vectors, wrong in clip.images([data.train.sources[place] for place in places], read):
        yield found, (scale * vectors @ head.T).softmax(1) if found else None, wrong


def probabilities(args, data: DataSet) -> np.ndarray:
    """The true class's probability of every training image, float64 (N,); NaN where it cannot be read.

    Raises:
        UserError: the model gives a probability that is not finite, or the scores there are another model's.
    """
    if args.checkpoint:
        path = args.checkpoint / "checkpoint.pt"
        model, digest = args.checkpoint.name, files.digest_files([path] if path.is_file() else [])
    else:
        model, digest = spectrum_folder.describe_clip(args.clip).values()
    made_by = {
        "dataset": args.dataset,
        "imb_ratio": args.imb_ratio,
        "images": len(data.train),
        "class_names": files.digest_int(*data.class_names),
        "model": model,
        "model_digest": digest or files.digest_files([]),
        "templates": args.templates if args.clip else [],
    }
    path, note = args.out.with_suffix(".probabilities.jsonl"), args.out.with_suffix(".probabilities.json")
    if note.exists() and path.exists():
        runs.stop_on_difference(note, files.read_object(note), made_by, f"delete {path}")
    else:
        path.unlink(missing_ok=True)
        files.write_json(note, made_by)
    found = tables.read_probabilities(path) if path.exists() else {}
    # Those that could not be read are tried again.
    places = [place for place, name in enumerate(data.train.sources) if found.get(name) is None]
    batches = (checkpoint_batches if args.checkpoint else clip_batches)(args, data, places) if places else ()
    with cli.progress(len(places), "scoring", "image") as bar:
        for inside, batch, wrong in batches:
            rows = [(data.train.sources[places[i]], None) for i in wrong]
            for i, row in zip(inside, batch if inside else (), strict=True):
                value = row[data.train.labels[places[i]]].item()
                if not math.isfinite(value):
                    raise cli.UserError(
                        f"{args.checkpoint or args.clip}: gives {data.train.sources[places[i]]} a probability that is "
                        "not finite; expected another checkpoint"
                    )
                rows.append((data.train.sources[places[i]], value))
            tables.append_probabilities(path, rows)
            found |= rows
            bar.update(len(rows))
    print(f"{path}: the probability of {len(data.train)} images, {len(places)} newly scored")
    return np.array([found[name] for name in data.train.sources], dtype=float)  # None becomes NaN


def find_unlikely(scores: np.ndarray, fraction: float, threshold: float | None) -> list[int]:
    """Indices of the images whose probability, float (N,), is below `threshold` or, where it is None, of the lowest
    `fraction` of the known ones, rounded up; ties go to the earlier image."""
    known = np.flatnonzero(~np.isnan(scores))
    if threshold is not None:
        return known[scores[known] < threshold].tolist()
    most = math.ceil(fraction * len(known) - 1e-9)  # the small number keeps 0.1 * 30 at 3
    return sorted(known[np.argsort(scores[known], kind="stable")][:most].tolist())


# ---------------------------------------------------------------------------------------------------------------------


def draw_counts(counts: np.ndarray, few_below: int, path: Path) -> None:
    """Training images of each class (C,), in descending order, few-shot classes in another colour."""
    from reporting.figures import COLOURS, new_figure, save_figure

    ordered = np.sort(counts)[::-1]
    figure, axis = new_figure(figsize=(6, 3))
    for colour, chosen, name in (
        (COLOURS[0], ordered >= few_below, "others"),
        (COLOURS[1], ordered < few_below, f"few-shot: fewer than {few_below}"),
    ):
        axis.bar(np.flatnonzero(chosen), ordered[chosen], width=1, color=colour, label=name)
    axis.axhline(few_below, color="black", linewidth=0.8, linestyle="--")
    axis.set(xlabel="classes, by training images", ylabel="training images")
    axis.legend(fontsize=8)
    save_figure(figure, path)


def draw_probabilities(scores: np.ndarray, hard: list[int], path: Path) -> None:
    """A histogram of probabilities (N,), the hard ones in another colour."""
    from reporting.figures import COLOURS, new_figure, save_figure

    is_hard = np.zeros(len(scores), bool)
    is_hard[hard] = True
    figure, axis = new_figure(figsize=(6, 3))
    axis.hist(
        [scores[~is_hard & ~np.isnan(scores)], scores[is_hard]],
        bins=np.linspace(0, 1, 51),
        stacked=True,
        color=COLOURS[:2],
        label=["others", f"hard: up to {scores[is_hard].max():.3g}"],
    )
    axis.set(xlabel="probability of the true class", ylabel="training images", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(fontsize=8)
    save_figure(figure, path)


def print_counts(hard: list[dict], data: DataSet) -> None:
    """Hard images of each class, most first."""
    found = Counter(row["label"] for row in hard)
    for label, number in found.most_common(SHOWN):
        print(f"  {data.class_names[label]} ({label}): {number} of {data.counts[label]} images hard")
    if len(found) > SHOWN:
        print(f"  and {len(found) - SHOWN} more classes")


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.rule == "confidence" and not (args.checkpoint or args.clip):
        raise cli.UserError(
            "--rule confidence: expected --checkpoint or --clip, the model that gives the probabilities"
        )
    # Only what was typed: some data sets have these by default.
    unused = parser.typed("--fraction", "--threshold", "--checkpoint", "--clip", "--templates")
    if unused and args.rule != "confidence":
        raise cli.UserError(f"{unused[0]}: expected with --rule confidence only, not with --rule {args.rule}")
    if args.clip and any("{}" not in template for template in args.templates):
        raise cli.UserError("--templates: expected texts with {}, where the class name goes")
    data = datasets.load(args.dataset, args.imb_ratio, args.data_root, args.data_seed)
    picture = args.out.with_suffix(".png")
    missing = []
    if args.rule in ("few", "all"):
        places = find_few(data, args.few_below) if args.rule == "few" else list(range(len(data.train)))
        scores = data.published_counts[data.train.labels]
        draw_counts(data.published_counts, args.few_below, picture)
    else:
        scores = probabilities(args, data)
        places = find_unlikely(scores, args.fraction, args.threshold)
        missing = [data.train.sources[place] for place in np.flatnonzero(np.isnan(scores))]
        if not places:
            limit = f"--fraction {args.fraction}" if args.threshold is None else f"--threshold {args.threshold}"
            lowest = f"; the lowest probability is {np.nanmin(scores):.3g}" if len(missing) < len(scores) else ""
            raise cli.UserError(f"{limit}: no image of {data.name} is hard{lowest}")
        draw_probabilities(scores, places, picture)
    hard = [
        {
            "source": data.train.sources[place],
            "label": int(data.train.labels[place]),
            "class_name": data.class_names[data.train.labels[place]],
            "reason": args.rule,
            "score": f"{scores[place]:.6g}" if args.rule == "confidence" else scores[place],
        }
        for place in places
    ]
    tables.write_hard(args.out, hard)
    classes = {row["label"] for row in hard}
    print(
        f"{args.out}: {counted(len(hard), 'hard image')} of {len(data.train)}, in "
        f"{counted(len(classes), 'class', 'classes')} of {len(data.counts)}"
    )
    print_counts(hard, data)
    for name in missing[:SHOWN]:
        print(f"{name}: unreadable, left out")
    if missing:
        print(f"{len(missing)} images cannot be read and are left out; mend them and run the same command again")
    return 1 if missing else 0


if __name__ == "__main__":
    cli.run(main)
