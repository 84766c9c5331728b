"""Real data sets, the spectrum as a data set, and the mix of the two that an epoch trains on.

Every data set is one `LongTailed`: a training set with long-tailed class counts, a validation set to choose by, and a
test set to report on.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import spectrum
from cli import UserError
from defaults import DEFAULTS

# Templates of `write_prompts.py --source template`; the first is also the one that CLIPScore is taken against.
TEMPLATES: dict[str, list[str]] = {
    "digits": [
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
    ],
}


@dataclass(frozen=True)
class ImageSet:
    """Images in memory.

    Attributes:
        images: uint8, (N, H, W, 3).
        labels: int64, (N,).
        sources: N names that stay the same whatever subset is drawn (`index:N`, or a path relative to the data root).
    """

    images: np.ndarray
    labels: np.ndarray
    sources: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> ImageSet:
        """The images at `indices` (int, any length), in that order."""
        return ImageSet(self.images[indices], self.labels[indices], [self.sources[i] for i in indices])


@dataclass(frozen=True)
class LongTailed:
    """A long-tailed data set: few-shot classes have fewer than `few_below` training images, many-shot ones more than
    `many_above`."""

    name: str
    class_names: list[str]
    train: ImageSet
    val: ImageSet
    test: ImageSet
    few_below: int = 20
    many_above: int = 100

    @property
    def counts(self) -> np.ndarray:
        """Training images of each class, int64 (C,)."""
        return np.bincount(self.train.labels, minlength=len(self.class_names))

    @property
    def groups(self) -> dict[str, np.ndarray]:
        """Class indices of the groups many, medium and few, by training count."""
        few, many = self.counts < self.few_below, self.counts > self.many_above
        return {"many": np.flatnonzero(many), "medium": np.flatnonzero(~many & ~few), "few": np.flatnonzero(few)}


def load(name: str, imb_ratio: float) -> LongTailed:
    """The data set called `name`.

    Args:
        imb_ratio: training images of the largest class over those of the smallest, at least 1.

    Raises:
        UserError: no such data set, or an imbalance ratio below 1.
    """
    if imb_ratio < 1:
        raise UserError(f"--imb-ratio {imb_ratio:g}: expected 1 or more")
    if name == "digits":
        return load_digits(imb_ratio)
    raise UserError(f"--dataset {name}: unknown; expected one of {', '.join(DEFAULTS)}")


def long_tail_counts(largest: int, classes: int, imb_ratio: float) -> list[int]:
    """Class counts int(largest * imb_ratio^(-k / (classes - 1))): CIFAR-LT's exponential rule (Cao et al., 2019)."""
    # The small addend keeps 60 / 30 at 2 where the power comes out at 1.9999999999999998.
    return [int(largest * imb_ratio ** (-k / (classes - 1)) + 1e-9) for k in range(classes)]


# ---------------------------------------------------------------------------------------------------------------------
# digits: the embedded benchmark. scikit-learn's 1,797 scans of handwritten digits (8x8, 16 grey values), drawn as
# coloured 16x16 images. Coloured, because then a handful of training images does not show a class in every ink: what a
# spectrum has to add is visible. The split is made once, by one fixed seed, whatever --imb-ratio and --seed are.

DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
INKS = {
    "black": (30, 30, 30),
    "blue": (30, 60, 190),
    "red": (190, 30, 40),
    "green": (20, 120, 50),
    "purple": (120, 30, 150),
}
PAPERS = {"white": (250, 250, 250), "yellow": (250, 235, 150), "pink": (250, 200, 210), "blue": (190, 220, 250)}
WEB_PER_CLASS, VAL_PER_CLASS, TEST_PER_CLASS, LARGEST_CLASS = 60, 8, 50, 60
DIGITS_SPLIT_SEED = 20241017


def draw_digit(scan: np.ndarray, ink: np.ndarray, paper: np.ndarray) -> np.ndarray:
    """A scan (8, 8) with values 0 to 16, drawn in `ink` on `paper` (RGB, 0 to 255): uint8 (16, 16, 3)."""
    grey = Image.fromarray((scan / 16 * 255).astype(np.uint8)).resize((16, 16), Image.Resampling.BICUBIC)
    alpha = np.asarray(grey, dtype=np.float32)[..., None] / 255
    return np.clip(alpha * ink + (1 - alpha) * paper + 0.5, 0, 255).astype(np.uint8)


def draw_colours(rng: np.random.Generator) -> tuple[str, np.ndarray, str, np.ndarray]:
    """An ink and a paper drawn at random: (ink name, RGB, paper name, RGB), each colour a little off its table's."""
    ink, paper = rng.choice(list(INKS)), rng.choice(list(PAPERS))
    return ink, INKS[ink] + rng.uniform(-25, 25, 3), paper, PAPERS[paper] + rng.uniform(-15, 5, 3)


def digits_split() -> dict[str, np.ndarray]:
    """Indices into scikit-learn's 1,797 scans, by split: web, val, test, and pool, from which train is taken.

    web, val and test are balanced; the four are disjoint and together hold every scan. pool is ordered by class.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    target = sklearn_digits().target
    rng = np.random.default_rng(DIGITS_SPLIT_SEED)
    parts: dict[str, list[np.ndarray]] = {"web": [], "val": [], "test": [], "pool": []}
    edges = np.cumsum([WEB_PER_CLASS, VAL_PER_CLASS, TEST_PER_CLASS])
    for label in range(10):
        for part, chosen in zip(parts, np.split(rng.permutation(np.flatnonzero(target == label)), edges), strict=True):
            parts[part].append(chosen)
    return {part: np.concatenate(chosen) for part, chosen in parts.items()}


def digits_scans() -> tuple[np.ndarray, np.ndarray]:
    """All 1,797 scans, float64 (1797, 8, 8) with values 0 to 16, and their labels, int64 (1797,)."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    return digits.images, digits.target.astype(np.int64)


def load_digits(imb_ratio: float) -> LongTailed:
    """The embedded benchmark: train long-tailed (60 down to 60 / imb_ratio images a class), val 8 and test 50 a class.

    Its largest class has 60 images, so many-shot begins above 30 here; few-shot is below 20, as everywhere.
    """
    scans, labels = digits_scans()
    split = digits_split()
    counts = long_tail_counts(LARGEST_CLASS, 10, imb_ratio)
    pool_labels = labels[split["pool"]]
    for label, (wanted, there) in enumerate(zip(counts, np.bincount(pool_labels), strict=True)):
        if not 1 <= wanted <= there:
            raise UserError(
                f"--imb-ratio {imb_ratio:g}: class {DIGIT_NAMES[label]} would have {wanted} training images, "
                f"of {there} there are; expected a ratio from 1.1 to 60"
            )
    train = np.concatenate([split["pool"][pool_labels == label][:count] for label, count in enumerate(counts)])

    def image_set(indices: np.ndarray) -> ImageSet:
        images = []
        for index in indices:
            _, ink, _, paper = draw_colours(np.random.default_rng([DIGITS_SPLIT_SEED, int(index)]))
            images.append(draw_digit(scans[index], ink, paper))
        return ImageSet(np.stack(images), labels[indices], [f"index:{index}" for index in indices])

    return LongTailed(
        "digits", DIGIT_NAMES, image_set(train), image_set(split["val"]), image_set(split["test"]), many_above=30
    )


# ---------------------------------------------------------------------------------------------------------------------
# hard images and the spectrum, beside the real data


def read_sources(names: list[str], train: ImageSet, data_root: Path | None) -> Iterator[tuple[Image.Image, str]]:
    """The images that hard.csv names, one after another, each with its sha256.

    `index:N` is an image of `train`, hashed over its pixels; any other name is a file below `data_root`.

    Yields:
        An RGB image, and 64 hexadecimal digits.

    Raises:
        UserError: no such image, or one that does not decode.
    """
    places = {source: place for place, source in enumerate(train.sources)}
    for name in names:
        if name in places:
            pixels = train.images[places[name]]
            yield Image.fromarray(pixels), sha256_pixels(pixels)
        elif name.startswith("index:") or data_root is None:
            raise UserError(
                f"source {name}: not a training image of this data set; "
                "expected one of the same --dataset and --imb-ratio, or a file below --data-root"
            )
        else:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"source {name}: lies outside --data-root {data_root}")
            path = data_root / name
            try:
                content = path.read_bytes()
                with Image.open(io.BytesIO(content)) as image:
                    yield to_rgb(image), hashlib.sha256(content).hexdigest()
            except FileNotFoundError:
                raise UserError(f"source {name}: no such file below --data-root {data_root}") from None
            except (OSError, ValueError, SyntaxError) as error:
                raise UserError(f"source {name}: not a readable image ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as upright 8-bit RGB: 16 bits are scaled, not cut off; what is transparent becomes white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, or 32 that hold 16; convert() would clip at 255
        grey = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.clip(grey / 257 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def sha256_pixels(pixels: np.ndarray) -> str:
    """The sha256 of an image held in memory: uint8 (H, W, 3)."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def load_spectrum(folder: Path, levels: list[int], data: LongTailed) -> dict[int, ImageSet]:
    """The kept synthetic images of each level, in the size of the data set's own.

    Raises:
        UserError: not filtered, a level without a kept image, an image that does not decode, or a spectrum that was
            drawn from other images than this training set's.
    """
    places = {source: place for place, source in enumerate(data.train.sources)}
    by_level: dict[int, list[dict]] = {level: [] for level in levels}
    for row in spectrum.kept_rows(folder, levels):
        place = places.get(row["source"])
        if (
            place is None
            or data.train.labels[place] != row["label"]
            or (sha256_pixels(data.train.images[place]) != row["source_sha256"])
        ):
            raise UserError(
                f"{folder}: made for other data: its source {row['source']} (class {row['label']}) is no "
                f"training image of {data.name} with these flags; expected the --dataset and --imb-ratio "
                "that it was made with"
            )
        by_level[row["level"]].append(row)
    height, width = data.train.images.shape[1:3]

    def image_set(rows: list[dict]) -> ImageSet:
        images = (read_image(folder / row["file_name"]) for row in rows)
        resized = (
            image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
            for image in images
        )
        return ImageSet(
            np.stack([np.asarray(image) for image in resized]),
            np.array([row["label"] for row in rows]),
            [row["file_name"] for row in rows],
        )

    return {level: image_set(rows) for level, rows in by_level.items()}


def read_image(path: Path) -> Image.Image:
    """A synthetic image as RGB.

    Raises:
        UserError: it does not decode.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not a readable image ({error}); run generate_spectrum.py again") from None


def stage_mix(
    labels: np.ndarray,
    is_hard: np.ndarray,
    synthetic: int,
    hard_share: float,
    undersample: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """What one epoch of a curriculum trains on (DisCL).

    All real images of the hard classes stay in. Of the others a random share stays. Synthetic images fill up until
    hard-class images, real and synthetic, are `hard_share` of the whole: each at most once while there are enough, else
    all of them as often as possible and the rest at random.

    Args:
        labels: class of each real training image, int (N,).
        is_hard: whether a class is hard, bool (C,).
        synthetic: how many synthetic images there are to draw from, at least 1.
        hard_share: in [0, 1).
        undersample: share of the non-hard images that stays, in [0, 1].
        rng: decides the draws.

    Returns:
        Indices of real images, and of synthetic images.
    """
    hard = np.flatnonzero(is_hard[labels])
    others = rng.permutation(np.flatnonzero(~is_hard[labels]))
    others = others[: round(len(others) * undersample)]
    wanted = max(0, round(len(others) * hard_share / (1 - hard_share)) - len(hard))
    rounds, rest = divmod(wanted, synthetic)
    drawn = np.concatenate([np.tile(np.arange(synthetic), rounds), rng.permutation(synthetic)[:rest]])
    return np.concatenate([hard, others]), drawn
