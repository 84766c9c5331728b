"""biased_digits, the embedded benchmark of ALIA: the paper's colour goes with the digit, but not in the test set.

The scans of digits (digits.py) in the look of the web. In train (30 images a class) and val (8) 95 % of a class are on
the class's own paper; test shows each of its 500 scans on all four papers. A classifier that reads the paper is
right on val, and wrong on three quarters of test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loaders import digits
from loaders.base import ASSETS, TINY_FILTER, DataSet, Entry, ImageSet

PAPERS = list(digits.PAPERS)
TRAIN_PER_CLASS, BIASED_SHARE = 30, 0.95


def own_paper(label: int | np.ndarray) -> int | np.ndarray:
    """The paper that goes with a class, by its place in PAPERS."""
    return label % len(PAPERS)


def draw(scan: np.ndarray, paper: int, *seed: int) -> np.ndarray:
    """A scan (8, 8) with values 0 to 16 in an ink at random on this paper: uint8 (16, 16, 3)."""
    rng = np.random.default_rng([digits.SPLIT_SEED, 2, *seed])
    ink = digits.INKS[rng.choice(list(digits.INKS))] + rng.uniform(-25, 25, 3)
    return digits.draw_digit(scan, ink, digits.PAPERS[PAPERS[paper]] + rng.uniform(-15, 5, 3))


def biased_papers(labels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A paper for each image: its class's own, but for round((1 - share) * n) of a class's n images, which get others.

    Args:
        labels: class of each image, int (N,).
    """
    papers = own_paper(labels)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        others = rng.permutation(places)[: round(len(places) * (1 - share))]
        papers[others] = (papers[others] + rng.integers(1, len(PAPERS), len(others))) % len(PAPERS)
    return papers


def load(name: str, imb_ratio: None, data_root: Path | None, seed: int) -> DataSet:
    """The benchmark. `extra` has, of scans that train leaves over, 25 a class on papers at random."""
    scans, labels = digits.read_scans()
    split = digits.split_scans()
    pool_labels = labels[split["pool"]]
    by_class = [split["pool"][pool_labels == label] for label in range(10)]

    def image_set(indices: np.ndarray, papers: np.ndarray, suffix: bool = False) -> ImageSet:
        images = [draw(scans[i], paper, int(i), int(paper)) for i, paper in zip(indices, papers, strict=True)]
        names = [
            f"index:{i}:{PAPERS[paper]}" if suffix else f"index:{i}" for i, paper in zip(indices, papers, strict=True)
        ]
        return ImageSet(np.stack(images), labels[indices], names, papers)

    def biased(indices: np.ndarray, seed: int) -> ImageSet:
        rng = np.random.default_rng([digits.SPLIT_SEED, 3, seed])
        return image_set(indices, biased_papers(labels[indices], BIASED_SHARE, rng))

    extra = np.concatenate([scans_of[TRAIN_PER_CLASS : TRAIN_PER_CLASS + 25] for scans_of in by_class])
    return DataSet(
        "biased_digits",
        digits.NAMES,
        biased(np.concatenate([scans_of[:TRAIN_PER_CLASS] for scans_of in by_class]), 0),
        biased(split["val"], 1),
        image_set(np.repeat(split["test"], len(PAPERS)), np.tile(np.arange(len(PAPERS)), len(split["test"])), True),
        note="validation: the val split, as biased as train",
        domain_names=PAPERS,
        extra=image_set(extra, np.random.default_rng([digits.SPLIT_SEED, 4]).integers(len(PAPERS), size=len(extra))),
    )


DATASETS = {
    "biased_digits": Entry(
        load=load,
        root="unused",
        templates=["a photo of a {}"],
        defaults={
            "find_hard": {"rule": "all"},
            "describe_domains": {"captioner": str(ASSETS / "tiny_captioner"), "superclass": "digit", "batch_size": 100},
            "generate_spectrum": digits.DEFAULTS["generate_spectrum"]
            | {"generator": str(ASSETS / "tiny_sd"), "levels": [10], "seeds": 1, "text_guidance": 3.0, "steps": 20},
            "filter_clipscore": TINY_FILTER,
            "filter_edits": {"clip": TINY_FILTER["clip"]},
            "train_lt": {
                "model": "resnet8",
                "epochs": 40,
                "curriculum_epochs": 40,
                "keep_others": 1.0,
                "batch_size": 32,
                "lr": 3e-3,
                "weight_decay": 0.05,
                "augment": "none",
            },
        },
    )
}
