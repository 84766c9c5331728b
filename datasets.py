"""Every data set by its name: one table, `load`, and the flags that choose the data.

A new data set needs two edits: a file in loaders/ with its loader and its Entry (both types are in loaders/base.py;
loaders/folders.py is an example), and that file's DATASETS in TABLE below.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from loaders import biased_digits, birds, cameratraps, cifar, digits, fewshot, folders, lists
from loaders.base import DataSet, Entry
from runtime import cli
from runtime.cli import UserError

TABLE: dict[str, Entry] = {
    **digits.DATASETS,
    **biased_digits.DATASETS,
    **cifar.DATASETS,
    **folders.DATASETS,
    **lists.DATASETS,
    **cameratraps.DATASETS,
    **fewshot.DATASETS,
    **birds.DATASETS,
}
# data set -> "data" (the flags that all scripts share) or the script -> flag -> value
DEFAULTS: dict[str, dict[str, dict]] = {name: entry.defaults for name, entry in TABLE.items()}
TEMPLATES: dict[str, list[str]] = {name: entry.templates for name, entry in TABLE.items()}
CAMERA_TRAPS = [name for name, entry in TABLE.items() if entry.camera_traps]


def add_flags(parser: cli.Parser, default: str = "digits", choices: Iterable[str] = DEFAULTS) -> None:
    """The flags that choose the data. The defaults of a script's other flags follow the data set."""
    parser.shipped, parser.default_root = DEFAULTS, default_data_root
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default=default,
        choices=sorted(choices),
        metavar="NAME",
        help="data set, whose defaults are shown here: %(choices)s",
    )
    group.add_argument(
        "--imb-ratio",
        type=cli.number(1),
        metavar="RATIO",
        help="images of the largest training class over those of the smallest",
    )
    group.add_argument(
        "--data-root",
        type=cli.existing_path,
        metavar="FOLDER",
        help="folder of the data set's images (for CIFAR also a zip); digits and toycam need none (default: "
        "$DISCL_DATA/DATASET, where that variable is set)",
    )
    group.add_argument(
        "--data-seed",
        type=cli.whole(0),
        default=0,
        metavar="N",
        help="which images a data set that is made long-tailed keeps, and which are held out for validation",
    )


def default_data_root(name: str) -> Path | None:
    """Where a data set lies if no flag says so: $DISCL_DATA/NAME (or .zip); None without that variable."""
    root = os.environ.get("DISCL_DATA")
    if not root or TABLE[name].root != "needed":
        return None
    folder = Path(root) / name
    archive = folder.with_suffix(".zip")
    return archive if archive.is_file() and not folder.exists() else folder


def add_shot_flags(parser: cli.Parser) -> None:
    """The flags of a few-shot draw from a data set."""
    parser.add_argument("--shots", type=cli.whole(1), metavar="K", help="train on K images a class (default: on all)")
    parser.add_argument("--shot-seed", type=cli.whole(0), default=0, metavar="N", help="which K images")


def load_shots(args) -> DataSet:
    """The data set that the flags name, with --shots images a class to train on where they say so."""
    data = load(args.dataset, args.imb_ratio, args.data_root, args.data_seed)
    return data if args.shots is None else fewshot.draw_shots(data, args.shots, args.shot_seed)


def load(name: str, imb_ratio: float | None, data_root: Path | None = None, seed: int = 0) -> DataSet:
    """The data set called `name`.

    Args:
        imb_ratio: training images of the largest class over those of the smallest, at least 1. None where the data set
            is long-tailed by itself.
        data_root: folder (or zip) of the data; the embedded ones need none.
        seed: decides which images a data set that is made long-tailed keeps, and which are held out for validation.

    Raises:
        UserError: no such data set, no such data, or an imbalance ratio that it cannot have.
    """
    if name not in TABLE:
        raise UserError(f"--dataset {name}: unknown; expected one of {', '.join(sorted(TABLE))}")
    entry = TABLE[name]
    if imb_ratio is None and entry.imb_ratio == "needed":
        raise UserError(f"--dataset {name}: expected --imb-ratio, such as 100")
    if imb_ratio is not None and entry.imb_ratio == "refused":
        raise UserError(f"--imb-ratio {imb_ratio:g}: {name} has its own class counts; expected no --imb-ratio")
    if imb_ratio is not None and imb_ratio < 1:
        raise UserError(f"--imb-ratio {imb_ratio:g}: expected 1 or more")
    if data_root is None and entry.root == "needed":
        raise UserError(
            f"--dataset {name}: expected --data-root, the folder of its images, or $DISCL_DATA with a folder {name}; "
            f"{entry.layout}"
        )
    if data_root is not None and entry.root == "unused":
        raise UserError(f"--data-root {data_root}: {name} is embedded and needs no folder; expected no --data-root")
    if data_root is not None and entry.root == "needed" and not data_root.exists():
        raise UserError(f"--data-root {data_root}: no such folder; {entry.layout}")
    return entry.load(name, imb_ratio, data_root, seed)
