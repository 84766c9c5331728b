"""ALIA's additions to training: all real images and edits besides, parts left out, and figures by group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import curricula
from curricula import REAL
from loaders.base import DataSet, ImageSet, fold_of, join_sets
from runtime import cli
from runtime.text import parse_whole, read_csv
from spectrum import edit_rules
from spectrum import folder as spectrum_folder
from training.pool import Pool

EDITS = ("text", "user", "domains")


def add_edit_flags(group) -> None:
    """The flags of edits that are added to the real images."""
    group.add_argument(
        "--add",
        metavar="all|N|SHARE|like:FILE",
        help="ALIA: train on all real images and on edits besides, at most one of each source: of all sources, N, "
        "a SHARE of the real images, or as many of each class as FILE (column label) has rows; like:extra for as many "
        "as the extra real images",
    )
    group.add_argument("--add-once", action="store_true", help="draw the edits of --add once, not anew each epoch")
    group.add_argument(
        "--edits",
        choices=EDITS,
        help="for --add: what the images of --spectrum are, as tables call them: text to image, edits by a user's "
        "prompt, or edits toward domains (default: what the spectrum's plan says; else checked)",
    )
    group.add_argument(
        "--edit-rules",
        nargs="+",
        choices=["none", *edit_rules.RULES],
        metavar="RULE",
        help=f"apply these rules of filter_edits.py alone: {', '.join(edit_rules.RULES)}, or none (default: all that "
        "it was run with)",
    )


def add_real_flags(group) -> None:
    """The flags of the real images that are trained on."""
    group.add_argument(
        "--extra-real", action="store_true", help="train on the data set's extra real images too, where it has some"
    )
    group.add_argument(
        "--epoch-images",
        type=cli.whole(1),
        metavar="N",
        help="images of every epoch, repeated or cut to N, so that rows with and without edits take as many steps",
    )
    group.add_argument(
        "--leave-out",
        type=cli.shard,
        metavar="I/K",
        help="train without part I of K of the training images, for filter_edits.py --thresholds folds",
    )


def check_flags(args) -> None:
    """Raise UserError where the flags of edits do not go together."""
    if args.add and args.curriculum in ("none", "adaptive"):
        raise cli.UserError(f"--add {args.add}: --curriculum {args.curriculum} names no level; expected all or another")
    for name in ("add_once", "edits"):
        if getattr(args, name) and not args.add:
            raise cli.UserError(f"--{name.replace('_', '-')}: expected with --add only")
    if args.edit_rules and args.curriculum == "none":
        raise cli.UserError("--edit-rules: --curriculum none takes no edit; expected all or another")
    if args.edit_rules and "none" in args.edit_rules and len(args.edit_rules) > 1:
        raise cli.UserError("--edit-rules: expected none alone, or rules")


def check_edits(args) -> str:
    """What the images of --spectrum are, by its plan.

    Raises:
        UserError: --edits says otherwise.
    """
    plan = spectrum_folder.read_plan(args.spectrum)
    found = "user"
    if plan.get("pure_noise") and plan["levels"] == [0]:
        found = "text"
    elif any(row.get("domain") for row in spectrum_folder.read_rows(args.spectrum)):
        found = "domains"
    if args.edits not in (None, found):
        raise cli.UserError(f"--edits {args.edits}: {args.spectrum} is {found}; expected --edits {found}")
    return found


def place_additions(args, pool: Pool, stage: list[int], wanted: np.ndarray | None, epoch: int) -> np.ndarray:
    """The images of an epoch, as places in the pool: every real one, and edits of the stage's levels (ALIA).

    Args:
        wanted: edits of each class, int (C,); None for one of every source.
    """
    rng = np.random.default_rng([args.seed, 5] if args.add_once else [args.seed, epoch, 5])
    edits = np.flatnonzero(np.isin(pool.levels, stage) & (pool.levels < REAL))
    sources = [pool.sources[place] for place in edits]
    chosen = curricula.choose_additions(pool.labels[edits], sources, wanted, rng)
    return np.concatenate([np.flatnonzero(pool.levels == REAL), edits[chosen]])


def choose_training_images(args, data: DataSet) -> DataSet:
    """The data set with the training images that --leave-out and --extra-real ask for.

    Raises:
        UserError: no extra images, or a class without an image.
    """
    train = data.train
    if args.extra_real:
        if data.extra is None:
            raise cli.UserError(f"--extra-real: {data.name} has no extra real images")
        train = join_sets(train, data.extra)
    if args.leave_out:
        index, count = args.leave_out
        train = train.take(np.array([i for i, name in enumerate(train.sources) if fold_of(name, count) != index], int))
    data = replace(data, train=train)
    if args.leave_out and not data.counts.all():
        name = data.class_names[int(np.argmin(data.counts))]
        raise cli.UserError(f"--leave-out {args.leave_out}: leaves class {name} no image; expected fewer parts")
    return data


def count_wanted(args, data: DataSet) -> np.ndarray | None:
    """Edits of each class that --add asks for, int (C,); None for one of every source.

    Raises:
        UserError: not such a number, or a file without labels.
    """
    kind, _, name = args.add.partition(":")
    if kind != "like":
        return curricula.addition_counts(args.add, data.train.labels, len(data.class_names))
    if name == "extra":
        if data.extra is None:
            raise cli.UserError(f"--add like:extra: {data.name} has no extra real images")
        labels = data.extra.labels
    else:
        labels = read_labels(Path(name), len(data.class_names))
    return np.bincount(labels, minlength=len(data.class_names))


def read_labels(path: Path, classes: int) -> np.ndarray:
    """The column label of a CSV file, int (N,)."""
    labels = []
    for number, row in read_csv(path, ["label"]):
        label = parse_whole(row["label"])
        if label is None or label >= classes:
            raise cli.UserError(f"{path} row {number}: label {row['label'][:40]!r}: expected a class below {classes}")
        labels.append(label)
    if not labels:
        raise cli.UserError(f"{path}: no row; expected a label for each image that --add adds")
    return np.array(labels, dtype=int)


def test_figures(data: DataSet, predicted: np.ndarray) -> dict:
    """Accuracies in percent; where images have domains also by group, in and out of distribution, and macro-F1.

    Args:
        predicted: class of each test image, int (N,).
    """
    from training import evaluation

    found = evaluation.accuracies(predicted, data.test.labels, len(data.class_names), data.groups)
    if groups := group_figures(data, data.test, predicted):
        found |= groups | {"macro_f1": evaluation.macro_f1(predicted, data.test.labels)}
    return found


def group_figures(data: DataSet, images: ImageSet, predicted: np.ndarray) -> dict:
    """Figures by group of some images of a data set, in percent; empty where they have no domains.

    Args:
        predicted: class of each image, int (N,).
    """
    from training import domain_groups

    if not data.domain_names or images.domains is None:
        return {}
    train = data.train
    seen = domain_groups.seen_groups(train.labels, train.domains, len(data.class_names), len(data.domain_names))
    groups = domain_groups.group_accuracies(predicted, images.labels, images.domains, seen)
    label, domain = groups["worst_group_name"]
    groups["worst_group_name"] = f"{data.class_names[label]}, {data.domain_names[domain]}"
    return groups | {"seen_groups": seen.tolist()}


def say_untested_groups(data: DataSet, figures: dict) -> None:
    """Print which groups have no test image, and which figure is not measured for that reason."""
    if "per_group" not in figures:
        return
    missing = [
        f"{data.class_names[label]}, {data.domain_names[domain]}"
        for label, row in enumerate(figures["per_group"])
        for domain, value in enumerate(row)
        if value is None
    ]
    if missing:
        groups = len(data.class_names) * len(data.domain_names)
        print(f"{len(missing)} of {groups} groups have no test image and do not count, the first: {missing[0]}")
    for name, what in (("id", "in"), ("ood", "out of")):
        if figures[name] is None:
            print(f"no test image is of a group {what} the training distribution: {name.upper()} is not measured")
