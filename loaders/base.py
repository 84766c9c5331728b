"""The types that loaders make: ImageSet, DataSet (its splits), and Entry (what is known of a data set beforehand).

Each family of data sets has one file beside this one. It ends in DATASETS, its rows of the table in datasets.py.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from curricula import places_by_label
from loaders.pictures import header_error, read_image_file, sha256_pixels
from runtime import cli
from runtime.retry import read_bytes, retry
from runtime.text import UserError, same_form

ASSETS = Path(__file__).resolve().parents[1] / "assets"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Prompts of photographs, for write_prompts.py.
PHOTOS = [
    "a photo of a {}",
    "a 8k real photo: a {}",
    "a 8k real photo: a {} in bright daylight",
    "a 8k real photo: a {} in the evening",
    "a 8k real photo: a {} seen from close by",
    "a 8k real photo: a {} seen from afar",
    "a 8k real photo: a {} seen from the side",
    "a 8k real photo: a {} outdoors",
    "a 8k real photo: a {} indoors",
    "a 8k real photo: a {} against a plain background",
]
PAPER_SCORE_PROMPT = "a photo of {}"  # what DisCL takes CLIPScore against
# The paper's CLIPScore filter, generator and guidance; generate_spectrum.py --score takes the filter too.
CLIP_FILTER = {"clip": "ViT-B-32:openai", "threshold": 0.3}
REFINER = {
    "generator": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "levels": [0, 10, 30, 50],
    "seeds": 8,
    "steps": 50,
    "text_guidance": 10.0,
    **CLIP_FILTER,
}
TINY_FILTER = {"clip": str(ASSETS / "tiny_clip"), "threshold": 0.3}
# The paper's training of a classifier on large images.
LARGE = {
    "model": "resnet10",
    "epochs": 65,
    "curriculum_epochs": 60,
    "keep_others": 0.3,
    "batch_size": 128,
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 1e-5,
    "augment": "resized_crop",
    "color_jitter": 0.4,
    "memory_format": "channels_last",
}


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
            return hashlib.sha256(read_bytes(self.images[place])).hexdigest()
        except OSError as error:
            raise UserError(f"source {self.sources[place]}: {error.strerror}") from None


def spoken_name(class_name: str) -> str:
    """A class name as prompts and CLIP are told it, with blanks for underscores."""
    return class_name.replace("_", " ")


@dataclass(frozen=True)
class DataSet:
    """A data set: few-shot classes have fewer than `few_below` training images, many-shot ones more than `many_above`.

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
    def spoken_names(self) -> list[str]:
        """The class names as prompts and CLIP are told them."""
        return [spoken_name(name) for name in self.class_names]

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


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the table in datasets.py: a data set before any of its images is read.

    Attributes:
        load: from (name, imbalance ratio or None, data root or None, seed) to the data set.
        defaults: "data" (the flags that all scripts share) or a script's name -> flag -> value.
        layout: the files below --data-root; part of the error where they are not as expected.
        root: whether --data-root is needed, optional, or not used.
        imb_ratio: whether --imb-ratio is needed, optional, or refused.
        templates: prompts that write_prompts.py gives a class, with {} for its name.
        score_prompt: the text that CLIPScore is taken against.
        empty_prompts: prompts of the class of images that show nothing, by its name.
        counts: published numbers of images of each split, and of classes; held-out validation is counted in train.
        train_counts: published numbers of training images by imbalance ratio.
        checksums: beginnings of git's own checksums (`git hash-object`) of list files, by name.
        acceptance: by imbalance ratio (None: there is none), synthetic images made and kept in the paper.
        names_file: what must lie in the data root for the classes to have names that a prompt can hold.
        shared_names: whether the published names themselves give some classes one name.
        camera_traps: whether it has cameras, and splits in and out of domain.
        shared_index: whether `index:N` names one image in all splits.
    """

    load: Callable[[str, float | None, Path | None, int], DataSet]
    defaults: dict[str, dict]
    layout: str = ""
    root: Literal["needed", "optional", "unused"] = "needed"
    imb_ratio: Literal["needed", "optional", "refused"] = "refused"
    templates: list[str] = field(default_factory=lambda: PHOTOS)
    score_prompt: str = "a photo of a {}"
    empty_prompts: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    train_counts: dict[float, int] = field(default_factory=dict)
    checksums: dict[str, tuple[str, ...]] = field(default_factory=dict)
    acceptance: dict[float | None, tuple[int, int]] = field(default_factory=dict)
    names_file: str = ""
    shared_names: bool = False
    camera_traps: bool = False
    shared_index: bool = False


def long_tail_counts(largest: int, classes: int, imb_ratio: float) -> list[int]:
    """Class counts int(largest * imb_ratio^(-k / (classes - 1))): CIFAR-LT's exponential rule (Cao et al., 2019)."""
    # The small addend keeps 60 / 30 at 2 where the power comes out at 1.9999999999999998.
    return [int(largest * imb_ratio ** (-k / (classes - 1)) + 1e-9) for k in range(classes)]


def join_sets(one: ImageSet, other: ImageSet) -> ImageSet:
    """The images of two sets of one data set, one after the other."""
    images = np.concatenate([one.images, other.images]) if one.in_memory else [*one.images, *other.images]
    known = one.domains is not None and other.domains is not None
    domains = np.concatenate([one.domains, other.domains]) if known else None
    return ImageSet(images, np.concatenate([one.labels, other.labels]), [*one.sources, *other.sources], domains)


def fold_of(source: str, folds: int) -> int:
    """The part, 0 to folds - 1, that an image belongs to where a training set is cut into `folds` parts."""
    return int.from_bytes(hashlib.blake2b(f"fold\0{source}".encode(), digest_size=8).digest(), "big") % folds


def hold_out(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a training set that has no validation set: indices of the images that stay, and of the held-out ones.

    Of each class one image in 20 is held out, and one of a class with 5 to 19 images; smaller classes keep all.
    """
    held = []
    for label, indices in enumerate(places_by_label(labels, int(labels.max()) + 1)):
        count = max(len(indices) // 20, 1 if len(indices) >= 5 else 0)
        held.append(np.random.default_rng([seed, label]).permutation(indices)[:count])
    held = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), held), held


def with_validation(
    name: str, class_names: list[str], train: ImageSet, test: ImageSet, seed: int, files: list[Path], **further
) -> DataSet:
    """A data set without a validation set of its own: one is held out of the training set.

    Args:
        further: other attributes of the data set.
    """
    stays, held = hold_out(train.labels, seed)
    if not len(held):
        raise UserError(
            f"{name}: no class has 5 training images or more, so none can be held out; expected a val folder"
        )
    return DataSet(
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
    """Those of `names`, relative to `root`, that are not there. Each folder is listed once, which is quick.

    Raises:
        UserError: a folder that is there cannot be listed.
    """
    listings: dict[str, set[str]] = {}
    missing = []
    for name in names:
        folder, _, base = name.rpartition("/")
        if folder not in listings:
            try:
                listings[folder] = set(retry(partial(os.listdir, root / folder)))
            except (FileNotFoundError, NotADirectoryError):
                listings[folder] = set()
            except OSError as error:
                raise UserError(f"{root / folder}: cannot be listed ({error.strerror})") from None
        if base not in listings[folder]:
            missing.append(name)
    return missing


def spelt_as_there(root: Path, names: list[str]) -> list[str]:
    """`names`, relative to `root`, in the disk's own spelling where only the form of a letter differs (é in one or two
    characters: a list written on one system, files copied by another).
    """
    missing = {name for name in missing_files(root, names) if not name.isascii()}
    listings: dict[Path, dict[str, str]] = {}

    def look_up(name: str) -> str:
        folder = root
        for part in Path(name).parts:
            if folder not in listings:
                listings[folder] = {same_form(there): there for there in os.listdir(folder)} if folder.is_dir() else {}
            folder = folder / listings[folder].get(same_form(part), part)
        return str(folder.relative_to(root))

    return [look_up(name) if name in missing else name for name in names]


def find_unreadable(splits: dict[str, ImageSet]) -> list[str]:
    """A line for each image file that is missing, empty, or whose header cannot be read; of all splits.

    Only headers are read, 32 at a time: some 5,000 images a second from a local disk.
    """
    paths = {path: name for name, part in splits.items() if not part.in_memory for path in part.images}
    if not paths:
        return []
    with cli.progress(len(paths), "looking at every image", "image") as bar, ThreadPoolExecutor(32) as pool:
        found = []
        for path, error in zip(paths, pool.map(header_error, paths), strict=True):
            found += [f"{paths[path]}: {path} ({error})"] if error else []
            bar.update()
    return found


def stop_on_unreadable(splits: dict[str, ImageSet]) -> None:
    """Raise UserError, naming up to 20 at once, where images cannot be used."""
    found = find_unreadable(splits)
    if found:
        count = f"{len(found)} image{'s' * (len(found) > 1)}"
        more = f"; and {len(found) - 20} more" if len(found) > 20 else ""
        raise UserError(f"{count} cannot be used: {'; '.join(found[:20])}{more}. Expected them mended or taken out")


def name_problems(class_names: list[str]) -> list[str]:
    """A line for each class without a name, and for each name that several classes share, capital letters or not: the
    tokenizers of CLIP read them as small ones."""
    names = [same_form(spoken_name(name)).strip() for name in class_names]
    by_name: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        by_name.setdefault(name.lower(), []).append(label)
    empty = by_name.pop("", [])
    found = [f"class {label} has an empty name" for label in empty]
    for labels in by_name.values():
        if labels[1:]:
            capitals = ", which CLIP reads as one name" if len({names[label] for label in labels}) > 1 else ""
            called = " and ".join(dict.fromkeys(repr(names[label]) for label in labels))
            found.append(f"classes {labels} are all called {called}{capitals}")
    return found


def is_below(name: str) -> bool:
    """Whether a path relative to the data root stays below it."""
    return not (Path(name).is_absolute() or ".." in Path(name).parts)


def listed_set(root: Path, names: list[str], labels: Iterable[int], what: Path) -> ImageSet:
    """The images that the list `what` names, relative to `root`, as files.

    Raises:
        UserError: no name, one that leads out of `root`, or images that are not there.
    """
    if not names:
        raise UserError(f"{what}: lists no image of a split; expected some in each")
    outside = next((name for name in names if not is_below(name)), None)
    if outside is not None:
        raise UserError(f"{what}: {outside}: expected a path below --data-root")
    names = spelt_as_there(root, names)
    missing = missing_files(root, names)
    if missing:
        raise UserError(
            f"{what}: lists {len(missing)} images of {len(names)} that are not below --data-root {root}, the first "
            f"{missing[0]}"
        )
    return file_set(root, names, labels)
