"""How far two sets of feature vectors are apart: MMD and the Fréchet distance, on features computed before.

Written out here because the metric classes of torchmetrics embed images themselves, and have no Gaussian kernel.
"""

from __future__ import annotations

import functools
import math
import random
from pathlib import Path

import numpy as np

from loaders.base import ImageSet
from runtime.cli import UserError
from runtime.files import digest_int

ROWS_AT_ONCE = 2048
FLOOR_DRAWS = 10  # of one alone the distance is off by a third where few directions hold most of the variance
DISTANCE_IMAGES = 5000  # a set of more is drawn from at random: the distances need no more, and MMD is quadratic


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances of float (N, D) and (M, D): (N, M)."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T, 0)


def median_distance(x: np.ndarray) -> float:
    """The median Euclidean distance between two of at most 2,000 vectors of float (N, D), N at least 2; of more every
    second, third and so on, for they come class by class.

    The usual bandwidth of a Gaussian kernel (Gretton et al., 2012, "A kernel two-sample test").
    """
    x = x[:: math.ceil(len(x) / ROWS_AT_ONCE)]
    return float(np.median(np.sqrt(squared_distances(x, x)[np.triu_indices(len(x), 1)])))


def mmd(x: np.ndarray, y: np.ndarray, bandwidth: float) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy, Gaussian kernel exp(-d^2 / (2 bandwidth^2)).

    Unbiased at any sample size, so it may come out below 0 where the two sets are alike (Gretton et al., 2012).

    Args:
        x: float (N, D), N at least 2.
        y: float (M, D), M at least 2.
    """

    def total(a: np.ndarray, b: np.ndarray) -> float:
        parts = (a[start : start + ROWS_AT_ONCE] for start in range(0, len(a), ROWS_AT_ONCE))
        return sum(np.exp(squared_distances(part, b) / (-2 * bandwidth**2)).sum() for part in parts)

    n, m = len(x), len(y)
    # The n pairs of a vector with itself have kernel 1 and are left out.
    return float((total(x, x) - n) / (n * (n - 1)) + (total(y, y) - m) / (m * (m - 1)) - 2 * total(x, y) / (n * m))


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of float (N, D), N at least 2."""
    return x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))


def frechet(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """The squared Fréchet distance of two Gaussians, each (mean, covariance) (Heusel et al., 2017: FID).

    |mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)). It is biased upwards in small samples.
    """
    root = square_root(a[1])
    # root @ cov_b @ root is symmetric and has the eigenvalues of cov_a @ cov_b, also where these are singular.
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b[1] @ root), 0)).sum()
    return float(((a[0] - b[0]) ** 2).sum() + np.trace(a[1]) + np.trace(b[1]) - 2 * cross)


def frechet_floor(real: tuple[np.ndarray, np.ndarray], count: int) -> float:
    """The Fréchet distance that `count` vectors drawn from the real images' own Gaussian have to it, mean of ten draws.

    Zero for infinitely many samples; any value above that comes from the finite sample size.
    """
    rng, root = np.random.default_rng(0), square_root(real[1])
    samples = (real[0] + rng.standard_normal((count, len(root))) @ root for _ in range(FLOOR_DRAWS))
    return float(np.mean([frechet(real, moments(sample)) for sample in samples]))


def square_root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a symmetric positive semidefinite matrix (D, D)."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def draw_some(items: list, most: int, *seed) -> list:
    """At most `most` of the items, in their order, the same ones each time."""
    chosen = random.Random(digest_int(*seed)).sample(range(len(items)), min(most, len(items)))
    return [items[place] for place in sorted(chosen)]


def measure_levels(
    rows: list[dict], scores: dict[str, dict], train: ImageSet, data_root: Path | None, clip, folder: Path
) -> list[dict]:
    """MMD and Fréchet distance of each level to the real images of the same classes, in the CLIP's feature space.

    Each level has two rows, one for all images made and one for those kept; a row is left out where there are fewer
    than two images.

    Args:
        rows: of all images in the spectrum folder `folder`.
        scores: of scores.csv, by file name.
        clip: an embeddings.Clip.

    Raises:
        UserError: fewer than two real images can be read.
    """
    from spectrum.embeddings import read_files, read_training_images

    # Embed the real images of the same classes.
    labels = {row["label"] for row in rows}
    real = [name for name, label in zip(train.sources, train.labels.tolist(), strict=True) if label in labels]
    real = draw_some(real, DISTANCE_IMAGES, "real")
    vectors, wrong = clip.all_images(real, read_training_images(train, data_root), "embedding real images")
    if wrong:
        print(
            f"{len(wrong)} of {len(real)} real images cannot be read and are left out, the first: {wrong[min(wrong)]}"
        )
    vectors = np.delete(vectors.double().numpy(), sorted(wrong), axis=0)
    if len(vectors) < 2:
        raise UserError("--distance: fewer than two real images of the classes can be read")
    bandwidth, real_moments = median_distance(vectors), moments(vectors)
    # Measure each level, all images and those kept.
    table, floor = [], functools.cache(functools.partial(frechet_floor, real_moments))
    for level in sorted({row["level"] for row in rows}):
        found = [
            row for row in rows if row["level"] == level and not math.isnan(scores[row["file_name"]]["text_score"])
        ]
        found = draw_some([row["file_name"] for row in found], DISTANCE_IMAGES, "level", level)
        features, _ = clip.all_images(found, read_files(folder), f"embedding level {level}")
        features = features.double().numpy()
        kept = np.array([scores[name]["kept"] for name in found], bool)
        for what, part in (("made", features), ("kept", features[kept])):
            if len(part) < 2:
                continue
            table.append(
                {
                    "level": level,
                    "images": what,
                    "count": len(part),
                    "real_count": len(vectors),
                    "mmd": mmd(part, vectors, bandwidth),
                    "frechet": frechet(real_moments, moments(part)),
                    "frechet_floor": floor(len(part)),
                }
            )
    return table
