"""ALIA's additions to training: all real images and edits besides, parts left out, and figures by group."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np

import curricula
from loaders.base import DataSet, fold_of, join_sets
from runtime import cli


def add_flags(group) -> None:
    """The flags that add edits and choose the real images."""
    group.add_argument(
        "--add",
        metavar="all|N|SHARE|like:FILE",
        help="ALIA: train on all real images and on edits besides, at most one of each source: of all sources, N, "
        "a SHARE of the real images, or as many of each class as FILE (column label) has rows; like:extra for as many "
        "as the extra real images",
    )
    group.add_argument("--add-once", action="store_true", help="draw the edits of --add once, not anew each epoch")
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
    if not data.counts.all():
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
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise cli.UserError(f"--add like:{path}: not a readable CSV file ({cli.first_line(error)})") from None
    for number, row in enumerate(rows, 2):
        if not row.get("label", "").isdecimal() or int(row["label"]) >= classes:
            raise cli.UserError(f"{path} row {number}: label is {row.get('label')!r}; expected a class below {classes}")
    return np.array([int(row["label"]) for row in rows], dtype=int)


def test_figures(data: DataSet, logits) -> dict:
    """Accuracies in percent; where images have domains also by group, in and out of distribution, and macro-F1."""
    from training import domain_groups, evaluation

    found = evaluation.accuracies(logits, data.test.labels, data.groups)
    if data.domain_names and data.test.domains is not None:
        predicted, count = logits.argmax(1).numpy(), len(data.domain_names)
        train = data.train
        seen = domain_groups.seen_groups(train.labels, train.domains, len(data.class_names), count)
        groups = domain_groups.group_accuracies(predicted, data.test.labels, data.test.domains, seen)
        label, domain = groups.pop("worst_group_name")
        groups["worst_group_name"] = f"{data.class_names[label]}, {data.domain_names[domain]}"
        found |= groups | {"macro_f1": evaluation.macro_f1(predicted, data.test.labels)}
    return found
