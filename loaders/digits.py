"""digits, the embedded benchmark: scikit-learn's 1,797 scans of handwritten digits, drawn as coloured 16x16 images.

The *web*, which the embedded generators and CLIPs learn from, draws its scans upright, in many inks on many papers.
Train, val and test draw theirs in another *hand*: slanted, smaller, thinner, teal ink on beige paper. This is the gap
between what a public generator knows and one's own data, which the levels of a spectrum close. The split into web,
train, val and test is made once, by one fixed seed, whatever --imb-ratio and --seed are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from loaders.base import ASSETS, LARGE, TINY_FILTER, DataSet, Entry, ImageSet, long_tail_counts
from runtime.cli import UserError

TEMPLATES = [
    "a photo of a {}",
    "a {} in black ink",
    "a {} in blue ink",
    "a {} in red ink",
    "a {} in green ink",
    "a {} in purple ink",
    "a photo of a {} on white paper",
    "a photo of a {} on yellow paper",
    "a photo of a {} on pink paper",
    "a photo of a {} on blue paper",
]
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
INKS = {
    "black": (30, 30, 30),
    "blue": (30, 60, 190),
    "red": (190, 30, 40),
    "green": (20, 120, 50),
    "purple": (120, 30, 150),
}
PAPERS = {"white": (250, 250, 250), "yellow": (250, 235, 150), "pink": (250, 200, 210), "blue": (190, 220, 250)}
HAND_INK, HAND_PAPER = (20, 90, 110), (240, 222, 175)  # teal on beige: in neither table of the web's colours
WEB_PER_CLASS, VAL_PER_CLASS, TEST_PER_CLASS, LARGEST_CLASS = 60, 8, 50, 60
SPLIT_SEED = 20241017


def draw_digit(scan: np.ndarray, ink: np.ndarray, paper: np.ndarray) -> np.ndarray:
    """A scan (8, 8) with values 0 to 16, drawn in `ink` on `paper` (RGB, 0 to 255): uint8 (16, 16, 3)."""
    grey = Image.fromarray((scan / 16 * 255).astype(np.uint8)).resize((16, 16), Image.Resampling.BICUBIC)
    alpha = np.asarray(grey, dtype=np.float32)[..., None] / 255
    return np.clip(alpha * ink + (1 - alpha) * paper + 0.5, 0, 255).astype(np.uint8)


def draw_hand(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A scan (8, 8) with values 0 to 16, drawn in the hand of train, val and test: uint8 (16, 16, 3).

    Slanted by a shear of 0.45 to 0.65, 0.8 times as large, with thinner strokes, each colour a little off its own.
    """
    mask = Image.fromarray(draw_digit(scan, np.full(3, 255), np.zeros(3))[..., 0])
    centre, scale, shear = 7.5, 0.8, rng.uniform(0.45, 0.65)
    # PIL maps output to input: x_in = x / scale + shear * y + offset, about the image's centre
    matrix = (1 / scale, shear, centre - centre / scale - shear * centre, 0, 1 / scale, centre - centre / scale)
    mask = mask.transform(mask.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    alpha = np.clip(np.asarray(mask, dtype=np.float32)[..., None] / 255 * 1.15 - 0.15, 0, 1)
    ink, paper = HAND_INK + rng.uniform(-15, 15, 3), HAND_PAPER + rng.uniform(-10, 10, 3)
    return np.clip(alpha * ink + (1 - alpha) * paper + 0.5, 0, 255).astype(np.uint8)


def draw_colours(rng: np.random.Generator) -> tuple[str, np.ndarray, str, np.ndarray]:
    """An ink and a paper drawn at random: (ink name, RGB, paper name, RGB), each colour a little off its table's."""
    ink, paper = rng.choice(list(INKS)), rng.choice(list(PAPERS))
    return ink, INKS[ink] + rng.uniform(-25, 25, 3), paper, PAPERS[paper] + rng.uniform(-15, 5, 3)


def draw_web(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A scan (8, 8) with values 0 to 16, drawn as the web draws: upright, in colours drawn at random."""
    _, ink, _, paper = draw_colours(rng)
    return draw_digit(scan, ink, paper)


# What train, val and test look like. digits_web has no gap to the generator's look: for comparison.
LOOKS = {"digits": draw_hand, "digits_web": draw_web}


def split_scans() -> dict[str, np.ndarray]:
    """Indices into scikit-learn's 1,797 scans, by split: web, val, test, and pool, from which train is taken.

    web, val and test are balanced; the four are disjoint and together hold every scan. pool is ordered by class.
    """
    target = read_scans()[1]
    rng = np.random.default_rng(SPLIT_SEED)
    parts: dict[str, list[np.ndarray]] = {"web": [], "val": [], "test": [], "pool": []}
    edges = np.cumsum([WEB_PER_CLASS, VAL_PER_CLASS, TEST_PER_CLASS])
    for label in range(10):
        for part, chosen in zip(parts, np.split(rng.permutation(np.flatnonzero(target == label)), edges), strict=True):
            parts[part].append(chosen)
    return {part: np.concatenate(chosen) for part, chosen in parts.items()}


@functools.cache
def read_scans() -> tuple[np.ndarray, np.ndarray]:
    """All 1,797 scans, float64 (1797, 8, 8) with values 0 to 16, and their labels, int64 (1797,); read once."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    scans, labels = digits.images, digits.target.astype(np.int64)
    for array in (scans, labels):
        array.setflags(write=False)
    return scans, labels


def load(name: str, imb_ratio: float, data_root: Path | None = None, seed: int = 0) -> DataSet:
    """The embedded benchmark in the look of LOOKS[name].

    Train is long-tailed, 60 down to 60 / imb_ratio images a class; val has 8 and test 50 a class.

    Its largest class has 60 images, so many-shot begins above 30 here; few-shot is below 20, as everywhere.
    """
    labels = read_scans()[1]
    split = split_scans()
    counts = long_tail_counts(LARGEST_CLASS, 10, imb_ratio)
    pool_labels = labels[split["pool"]]
    for label, (wanted, there) in enumerate(zip(counts, np.bincount(pool_labels), strict=True)):
        if not 1 <= wanted <= there:
            raise UserError(
                f"--imb-ratio {imb_ratio:g}: class {NAMES[label]} would have {wanted} training images, "
                f"of {there} there are; expected a ratio from 1.1 to 60"
            )
    train = np.concatenate([split["pool"][pool_labels == label][:count] for label, count in enumerate(counts)])

    sets = (draw_set(LOOKS[name], indices) for indices in (train, split["val"], split["test"]))
    return DataSet(name, NAMES, *sets, many_above=30)


def load_plus_web(name: str, imb_ratio: float, data_root: Path | None, seed: int) -> DataSet:
    """digits with the web's 600 scans, truly labelled: what the generator's own images would give without drawing.

    Many-, medium- and few-shot go by the images of digits alone.
    """
    data, web = load("digits", imb_ratio), draw_set(draw_web, split_scans()["web"])
    images, labels = (
        np.concatenate([getattr(part, key) for part in (data.train, web)]) for key in ("images", "labels")
    )
    train = ImageSet(images, labels, data.train.sources + web.sources)
    return dataclasses.replace(data, name=name, train=train, held_out=-np.bincount(web.labels))


def load_pool(name: str, imb_ratio: None, data_root: Path | None, seed: int) -> DataSet:
    """All scans but the web's, in the hand of digits: 55 to 65 of each class to draw shots from; val 8, test 50."""
    split = split_scans()
    return DataSet(name, NAMES, *(draw_set(draw_hand, split[part]) for part in ("pool", "val", "test")))


def draw_set(look: Callable, indices: np.ndarray) -> ImageSet:
    """The scans at `indices` in a look of LOOKS."""
    scans, labels = read_scans()
    images = [look(scans[index], np.random.default_rng([SPLIT_SEED, int(index)])) for index in indices]
    return ImageSet(np.stack(images), labels[indices], [f"index:{index}" for index in indices])


TUNING = {"resolution": 16, "crops": 1, "batch_size": 40, "lr": 2e-3, "warmup_steps": 12, "sample_steps": 10}
DEFAULTS = {
    "data": {"imb_ratio": 30.0},
    "tune_generator": TUNING | {"generator": str(ASSETS / "tiny_sd_noisy")},
    "generate_spectrum": {
        # 60 % of the captions that it learnt from were wrong, as the web's often are: at level 0 and this text guidance
        # 74 % of its images show the digit of their prompt (assets/tiny_sd_noisy/agreement.json).
        "generator": str(ASSETS / "tiny_sd_noisy"),
        "levels": [0, 10, 30, 50, 70, 90],
        "seeds": 4,
        "steps": 20,
        "text_guidance": 3.0,
        **TINY_FILTER,
    },
    "filter_clipscore": TINY_FILTER,
    "train_lt": {
        "model": "resnet8",
        "epochs": 60,
        "curriculum_epochs": 48,
        "keep_others": 0.43,  # makes a curriculum epoch (184 images) as long as a real one
        "progress_images": 10,
        "real_pass_images": 64,
        "batch_size": 16,
        "lr": 3e-3,
        "weight_decay": 0.05,
    },
}
# The few-shot pool, as DataDream takes it.
POOL_DEFAULTS = {
    "tune_generator": TUNING | {"generator": str(ASSETS / "tiny_sd")},
    "generate_spectrum": {
        "generator": str(ASSETS / "tiny_sd"),
        "levels": [0],
        "seeds": 8,
        "steps": 15,
        "text_guidance": 2.0,
        "size": (16, 16),
        **TINY_FILTER,
    },
    "filter_clipscore": TINY_FILTER,
    "train_lt": LARGE | {"image_size": 16, "augment": "shift"},  # a digit is not mirrored
    "train_fewshot": {
        "clip": str(ASSETS / "tiny_clip"),
        "model": "resnet8",
        "epochs": 30,
        "batch_size": 64,
        "lr": 3e-3,
        "weight_decay": 5e-4,
        "warmup_epochs": 3,
        "augment": "shift",
        "workers": 0,
    },
}
KNOWN = {"root": "unused", "imb_ratio": "needed", "defaults": DEFAULTS, "templates": TEMPLATES, "shared_index": True}
DATASETS = {
    **{name: Entry(load=load, **KNOWN) for name in LOOKS},
    "digits_plus_web": Entry(load=load_plus_web, **KNOWN),
    "fewshot_digits": Entry(
        load=load_pool, root="unused", defaults=POOL_DEFAULTS, templates=["a photo of a {}"], shared_index=True
    ),
}
