"""What every loader makes: sets of images, and a long-tailed data set of three of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from loaders.pictures import read_image_file, sha256_pixels
from runtime.cli import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSet:
    """Images in memory, or the files that hold them.

    Attributes:
        images: uint8 (N, H, W, 3), or N paths, which are read when an image is needed.
        labels: int64, (N,).
        sources: N names that stay the same whatever subset is drawn (`index:N`, or a path relative to the data root).
            A synthetic image's is that of the real image that it was drawn from.
        domains: the domain of each image (background, camera), int64 (N,), by its place in the data set's
            `domain_names`; None where nothing tells.
    """

    images: np.ndarray | list[Path]
    labels: np.ndarray
    sources: list[str]
    domains: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.images, np.ndarray)

    def take(self, indices: np.ndarray) -> ImageSet:
        """The images at `indices` (int, any length), in that order."""
        images = self.images[indices] if self.in_memory else [self.images[i] for i in indices]
        domains = None if self.domains is None else self.domains[indices]
        return ImageSet(images, self.labels[indices], [self.sources[i] for i in indices], domains)

    def read(self, place: int) -> tuple[Image.Image, str]:
        """The image at `place` as RGB, and its sha256: of its pixels in memory, else of its file.

        Raises:
            UserError: it does not decode.
        """
        if self.in_memory:
            return Image.fromarray(self.images[place]), sha256_pixels(self.images[place])
        return read_image_file(self.images[place], f"source {self.sources[place]}")

    def sha256(self, place: int) -> str:
        """The sha256 that `read` gives, without decoding.

        Raises:
            UserError: it cannot be read.
        """
        if self.in_memory:
            return sha256_pixels(self.images[place])
        try:
            with self.images[place].open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"source {self.sources[place]}: {error.strerror}") from None


@dataclass(frozen=True)
class LongTailed:
    """A long-tailed data set: few-shot classes have fewer than `few_below` training images, many-shot ones more than
    `many_above`.

    Attributes:
        mean, std: of the three channels, for images in [0, 1]: what a classifier's input is normalised by.
        note: where the validation set comes from, for people.
        held_out: training images of each class that became the validation set, (C,). Groups go by the counts before.
        files: what the data set was read from beside the images (lists, an archive), for digests.
        domain_names: what the images' domains are called; empty where they have none.
        extra: further real images, which are trained on only where they are asked for; None where there are none.
    """

    name: str
    class_names: list[str]
    train: ImageSet
    val: ImageSet
    test: ImageSet
    few_below: int = 20
    many_above: int = 100
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    note: str = ""
    held_out: np.ndarray | int = 0
    files: list[Path] = field(default_factory=list)
    domain_names: list[str] = field(default_factory=list)
    extra: ImageSet | None = None

    @property
    def counts(self) -> np.ndarray:
        """Training images of each class, int64 (C,)."""
        return np.bincount(self.train.labels, minlength=len(self.class_names))

    @property
    def published_counts(self) -> np.ndarray:
        """The same before images were held out for validation, which is what many, medium and few go by."""
        return self.counts + self.held_out

    @property
    def groups(self) -> dict[str, np.ndarray]:
        """Class indices of the groups many, medium and few, by training count."""
        counts = self.published_counts
        few, many = counts < self.few_below, counts > self.many_above
        return {"many": np.flatnonzero(many), "medium": np.flatnonzero(~many & ~few), "few": np.flatnonzero(few)}

    @property
    def splits(self) -> dict[str, ImageSet]:
        """Every split by its name."""
        return {"train": self.train, "val": self.val, "test": self.test}


def long_tail_counts(largest: int, classes: int, imb_ratio: float) -> list[int]:
    """Class counts int(largest * imb_ratio^(-k / (classes - 1))): CIFAR-LT's exponential rule (Cao et al., 2019)."""
    # The small addend keeps 60 / 30 at 2 where the power comes out at 1.9999999999999998.
    return [int(largest * imb_ratio ** (-k / (classes - 1)) + 1e-9) for k in range(classes)]


def fold_of(source: str, folds: int) -> int:
    """The part, 0 to folds - 1, that an image belongs to where a training set is cut into `folds` parts."""
    return int.from_bytes(hashlib.blake2b(f"fold\0{source}".encode(), digest_size=8).digest(), "big") % folds


def hold_out(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a training set that has no validation set: indices of what stays, and of what is held out.

    Of each class one image in 20 is held out, and one of a class with 5 to 19 images; smaller classes keep all.
    """
    held = []
    for label in range(int(labels.max()) + 1):
        indices = np.flatnonzero(labels == label)
        count = max(len(indices) // 20, 1 if len(indices) >= 5 else 0)
        held.append(np.random.default_rng([seed, label]).permutation(indices)[:count])
    held = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), held), held


def with_validation(
    name: str, class_names: list[str], train: ImageSet, test: ImageSet, seed: int, files: list[Path], **further
) -> LongTailed:
    """A data set without a validation set of its own: one is held out of the training set.

    Args:
        further: other attributes of the data set.
    """
    stays, held = hold_out(train.labels, seed)
    if not len(held):
        raise UserError(
            f"{name}: no class has 5 training images or more, so none can be held out; expected a val folder"
        )
    return LongTailed(
        name,
        class_names,
        train.take(stays),
        train.take(held),
        test,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        note=f"validation: {len(held)} images held out of the training set, one in 20 of each class",
        held_out=np.bincount(train.labels[held], minlength=len(class_names)),
        files=files,
        **further,
    )


def file_set(root: Path, names: list[str], labels: Iterable[int]) -> ImageSet:
    """The images `names`, relative to `root`, as files."""
    return ImageSet([root / name for name in names], np.array(list(labels), dtype=np.int64), names)


def missing_files(root: Path, names: list[str]) -> list[str]:
    """Those of `names`, relative to `root`, that are not there. Each folder is listed once, which is quick."""
    listings: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, _, base = name.rpartition("/")
        if folder not in listings:
            try:
                listings[folder] = set(os.listdir(root / folder))
            except OSError:
                listings[folder] = set()
        if base not in listings[folder]:
            missing.append(name)
    return missing
