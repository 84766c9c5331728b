"""Small data sets in folders, for tests that need files of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
from loaders import toycam


def cut_few_shot_tests(patch: pytest.MonkeyPatch, count: int) -> None:
    """Few-shot data sets keep their first test images: a look at fewshot_digits' 500 takes longer than a short run."""
    load = datasets.load_shots

    def load_cut(args):
        data = load(args)
        return dataclasses.replace(data, test=data.test.take(np.arange(count)))

    patch.setattr(datasets, "load_shots", load_cut)


def draw_cats_and_dogs(root: Path, train: int, side: int, ending: str) -> Path:
    """Dark and light noise in folders of two classes: of each `train` images, two for validation and three for test."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", 2), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 90, (side, side, 3)) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i}.{ending}")
    return root


def draw_toycam(root: Path, train: int, other: int) -> Path:
    """The first images of each split of toycam: `train` for training, `other` of each other split."""
    counts = {name: train if name == "train" else other for name in toycam.SPLITS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toycam, "SPLITS", {name: (*where, counts[name]) for name, (*where, _) in toycam.SPLITS.items()})
        toycam.draw(root)
    return root
