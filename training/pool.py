"""What a curriculum trains on: the real images and the synthetic ones of its levels, in one pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import curricula
from curricula import REAL
from loaders.base import DataSet, ImageSet, stop_on_unreadable
from runtime import files, runs, steps
from runtime.cli import UserError
from spectrum import folder as spectrum_folder
from training import distributed
from training.flags import DEFAULT_SPECTRUM

SHOWN = 5  # images that an error names
# Embedded data sets and their default spectrum, which is made first where it is missing.
EMBEDDED = {"digits": DEFAULT_SPECTRUM, "toycam": Path("runs/toycam_road/spectrum")}


@dataclass
class Pool:
    """Everything that may be trained on: the real images first, then the synthetic ones by ascending level.

    Attributes:
        images: of all of them (stores.py).
        labels: int64 (N,).
        levels: guidance level in percent, REAL for real images, int (N,).
        sources: N names: each image's own, or that of the real image that a synthetic one was drawn from.
        held: whether an image is kept out while the curriculum lasts, bool (N,): adaptive looks at it.
        looks: for each level, the places of the held-out images that progress is measured on.
    """

    images: object
    labels: np.ndarray
    levels: np.ndarray
    sources: list[str]
    held: np.ndarray
    looks: dict[int, np.ndarray] = field(default_factory=dict)


def build_pool(
    args,
    data: DataSet,
    synthetic: dict[int, ImageSet],
    levels: list[int],
    store: Callable[[list[ImageSet]], object],
) -> Pool:
    """The pool of a run; for adaptive, some hard images and all synthetic images drawn from them are held out.

    Args:
        levels: of the curriculum; REAL may be one of them.
        store: makes one store of images (training/stores.py) of several sets.
    """
    sets = [data.train, *(synthetic[level] for level in sorted(synthetic))]
    labels = np.concatenate([one.labels for one in sets])
    level_of = np.repeat([REAL, *sorted(synthetic)], [len(one) for one in sets])
    sources = [source for one in sets for source in one.sources]
    pool = Pool(store(sets), labels, level_of, sources, np.zeros(len(labels), dtype=bool))
    if args.curriculum == "adaptive":
        by_level = {level: one.sources for level, one in synthetic.items()}
        labels_by_source = dict(zip(data.train.sources, data.train.labels.tolist(), strict=True))
        chosen = curricula.held_out_sources(by_level, labels_by_source, data.counts, args.progress_images, args.seed)
        pool.held = np.isin(sources, chosen)
        for level in levels:
            first = {sources[place]: place for place in np.flatnonzero(pool.held & (pool.levels == level))[::-1]}
            pool.looks[level] = np.array([first[source] for source in chosen])
        if distributed.rank() == 0:
            hard, real = len(set(sources[len(data.train) :])), int(((level_of == REAL) & ~pool.held).sum())
            print(
                f"adaptive: {len(chosen)} of {hard} hard images held out (--progress-images), and before each epoch a "
                f"pass over {min(real, args.real_pass_images)} of {real} real images (--real-pass-images)",
                flush=True,
            )
    return pool


def check_files(args, splits: dict[str, ImageSet]) -> None:
    """Open the header of every image file before anything is trained, and name what cannot be used all at once.

    It takes minutes for a million files: cheaper checks come before it, and a complete run needs none.

    Raises:
        UserError: a file is missing, empty or no image; or the run was begun with other arguments.
    """
    if (args.out / "results.json").is_file() and not args.overwrite:
        return
    with distributed.first_process_first(args.device):
        if distributed.rank() == 0:
            if not vars(args).get("grid"):  # its folder gets the arguments of its best run
                runs.stop_on_other_arguments(args)
            stop_on_unreadable(splits)


def describe_splits(splits: dict[str, ImageSet], *classes: object) -> dict[str, str]:
    """Each split for args.json: how many images, and a digest of their names, labels and domains and of `classes`."""

    def describe(part: ImageSet) -> str:
        domains = [] if part.domains is None else part.domains.tolist()
        digest = files.digest_int(*part.sources, *part.labels.tolist(), *domains, *classes)
        return f"{len(part)} images (digest {digest:016x})"

    return {name: describe(part) for name, part in splits.items()}


def say_unused_spectrum(args, parser) -> None:
    """Say so where the command line names a spectrum, and no curriculum that would train on it."""
    if args.curriculum == "none" and parser.typed("--spectrum") and distributed.rank() == 0:
        print(f"--spectrum {args.spectrum}: not used, as --curriculum none trains on real images alone", flush=True)


def prepare_spectrum(args, with_real: bool = True) -> tuple[list[int], list[int]]:
    """The levels that the curriculum may ask for, and the hard classes; makes the default spectrum if it is missing.

    Args:
        with_real: whether the real images are one of the levels where --levels does not say which.
    """
    with distributed.first_process_first(args.device):
        if args.spectrum == EMBEDDED.get(args.dataset) and not (args.spectrum / "scores.csv").exists():
            print(f"{args.spectrum}: no finished spectrum there; making it first", flush=True)
            steps.make_spectrum(args.spectrum.parent, args.dataset, args.imb_ratio)
    plan = spectrum_folder.read_plan(args.spectrum)
    levels = args.levels or [*plan["levels"], *([REAL] if with_real else [])]
    levels = curricula.needed_levels(args.curriculum, levels, args.fixed_level)
    if distributed.rank() == 0:
        schedule = curricula.describe_schedule(
            args.curriculum, args.epochs, args.curriculum_epochs, levels, args.fixed_level, args.level_shares
        )
        print(f"schedule: {schedule}", flush=True)
    return levels, plan["hard_classes"]


def method_of(args) -> str:
    """How a spectrum's generator was tuned: on the data set (dset), each class (cls), each image (source); or untuned.

    Raises:
        UserError: --method says otherwise.
    """
    names = list(spectrum_folder.read_plan(args.spectrum).get("loras") or {})
    kinds = {"all": "dset", "source": "source", "class": "cls"}
    found = kinds[names[0].partition("_")[0]] if names else "untuned"
    if args.method not in (None, found):
        raise UserError(f"--method {args.method}: {args.spectrum} is {found}; expected --method {found}")
    return found


def print_gaps(args, hard_classes: list[int], synthetic: dict[int, ImageSet], class_names: list[str]) -> None:
    """Say which hard classes the filter left without an image at a level, and what training does there."""
    there = {level: set(synthetic[level].labels.tolist()) for level in sorted(synthetic)}
    gaps = [(label, level) for level, labels in there.items() for label in hard_classes if label not in labels]
    if gaps and distributed.rank() == 0:
        more = "" if args.add else "; filter_clipscore.py --min-per-class-level plans more of them"
        print(
            f"{len(gaps)} of {len(hard_classes) * len(synthetic)} hard classes and levels have no accepted image, the "
            f"first {class_names[gaps[0][0]]} at level {gaps[0][1]}: there a class has its real images alone{more}"
        )
