"""Accuracy by group, a group being a class in a domain: in and out of the training distribution, balanced, worst."""

from __future__ import annotations

import numpy as np

LEAST_SHARE = 0.1  # of a class's training images that a domain must have for the pair to count as seen in training


def seen_groups(labels: np.ndarray, domains: np.ndarray, classes: int, count: int) -> np.ndarray:
    """Which groups training shows, bool (classes, count): those with a tenth of their class's images or more.

    Args:
        labels, domains: of each training image, int (N,).
        count: number of domains.
    """
    table = np.bincount(labels * count + domains, minlength=classes * count).reshape(classes, count)
    return table >= np.maximum(1, LEAST_SHARE * table.sum(1, keepdims=True))


def group_accuracies(predicted: np.ndarray, labels: np.ndarray, domains: np.ndarray, seen: np.ndarray) -> dict:
    """Accuracies in percent; None where there is no such image.

    Args:
        predicted, labels, domains: of each test image, int (N,).
        seen: of `seen_groups`, bool (C, D).

    Returns:
        `id` and `ood` (over the images of groups that training shows, and of the others), `balanced` (mean over the
        groups that have test images), `worst_group`, `worst_group_name` (class and domain index), `per_group` (C, D).
    """
    classes, count = seen.shape
    group = labels * count + domains
    images = np.bincount(group, minlength=classes * count)
    right = np.bincount(group[predicted == labels], minlength=classes * count)
    there = images > 0
    share = np.full(classes * count, np.nan)
    share[there] = 100 * right[there] / images[there]

    def over(chosen: np.ndarray) -> float | None:
        total = int(images[chosen].sum())
        return 100 * int(right[chosen].sum()) / total if total else None

    inside = seen.reshape(-1)
    worst = int(np.nanargmin(share))
    per_group = [[None if np.isnan(value) else float(value) for value in row] for row in share.reshape(classes, count)]
    return {
        "id": over(inside),
        "ood": over(~inside),
        "balanced": float(share[there].mean()),
        "worst_group": float(share[worst]),
        "worst_group_name": [worst // count, worst % count],
        "per_group": per_group,
    }
