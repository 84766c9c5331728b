"""MMD and the Fréchet distance, by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist, pdist

from spectrum import distances


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 6)), rng.normal(0.5, 1.3, size=(25, 6))


def test_mmd_by_hand():
    """x = {0, 1}, y = {3, 5} on a line, bandwidth 1: pairs of x at 1, of y at 2, between them at 3, 5, 2, 4."""
    kernel = {d: np.exp(-(d**2) / 2) for d in range(1, 6)}
    expected = kernel[1] + kernel[2] - 2 * (kernel[3] + kernel[5] + kernel[2] + kernel[4]) / 4
    found = distances.mmd(np.array([[0.0], [1.0]]), np.array([[3.0], [5.0]]), bandwidth=1)
    assert found == pytest.approx(expected, abs=1e-12)


def test_mmd_equals_scipys_distances(sets, monkeypatch):
    monkeypatch.setattr(distances, "ROWS_AT_ONCE", 7)  # several parts
    x, y = sets
    within = [2 * np.exp(-(pdist(a) ** 2) / 8).sum() / (len(a) * (len(a) - 1)) for a in sets]
    expected = sum(within) - 2 * np.exp(-(cdist(x, y) ** 2) / 8).mean()
    assert distances.mmd(x, y, bandwidth=2) == pytest.approx(expected, abs=1e-12)


def test_mmd_is_unbiased_where_the_sets_are_alike():
    rng = np.random.default_rng(1)
    found = [distances.mmd(rng.normal(size=(8, 3)), rng.normal(size=(12, 3)), 1.5) for _ in range(2000)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_the_bandwidth_is_the_median_distance(sets):
    assert distances.median_distance(sets[0]) == pytest.approx(np.median(pdist(sets[0])))


def test_the_bandwidth_of_many_vectors_is_that_of_all_classes(monkeypatch):
    """Training images come class by class: the first ones alone are of few classes."""
    monkeypatch.setattr(distances, "ROWS_AT_ONCE", 20)
    classes = np.repeat(np.arange(10.0), 5)[:, None]
    assert distances.median_distance(classes) == pytest.approx(np.median(pdist(classes)), abs=0.5)


def test_frechet_by_hand():
    """On a line: (mean difference)^2 + (difference of standard deviations)^2."""
    a, b = (np.array([1.0]), np.array([[4.0]])), (np.array([4.0]), np.array([[9.0]]))
    assert distances.frechet(a, b) == pytest.approx(3**2 + (3 - 2) ** 2)


@pytest.mark.parametrize("count", [25, 4])  # 4 vectors of 6 numbers: a singular covariance
def test_frechet_equals_scipys_matrix_root(sets, count):
    a, b = distances.moments(sets[0]), distances.moments(sets[1][:count])
    root = sqrtm(a[1] @ b[1]).real
    expected = ((a[0] - b[0]) ** 2).sum() + np.trace(a[1] + b[1] - 2 * root)
    assert distances.frechet(a, b) == pytest.approx(expected, abs=1e-5)
    assert distances.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_the_floor_is_that_of_a_sample_of_the_size_and_not_of_one_draw():
    """Where few directions hold most of the variance, as in a CLIP's space, one draw is off by a third."""
    spread, rng = 0.5 ** np.arange(12), np.random.default_rng(7)
    real = np.zeros(12), np.diag(spread**2)
    for count in (50, 60, 70, 80, 90):
        found = []
        for _ in range(300):
            mean, covariance = distances.moments(rng.normal(size=(count, 12)) * spread)
            root = np.linalg.eigvals(real[1] @ covariance).real.clip(0) ** 0.5
            found.append((mean**2).sum() + np.trace(real[1] + covariance) - 2 * root.sum())
        assert distances.frechet_floor(real, count) == pytest.approx(np.mean(found), rel=0.3)


def test_the_floor_falls_with_the_sample(sets):
    real = distances.moments(sets[0])
    floors = [distances.frechet_floor(real, count) for count in (10, 100, 10000)]
    assert floors[0] > floors[1] > floors[2] > 0 and floors[2] < 0.01
