"""The rules that keep or drop an edited image (ALIA): pure functions of CLIP similarities and of probabilities.

Each rule gives a reason for each of N images that it drops, and an empty text for the images that it keeps.
"""

from __future__ import annotations

import numpy as np

from runtime.files import digest_int

RULES = ("semantic", "class", "domain", "confidence")
SEMANTIC, CLASS, DOMAIN = "semantic", "another class", "another domain"
EASY, CORRUPTED = "too easy", "class corrupted"
NO_THRESHOLD = 2.0  # of a class without an image: never reached
MEMORISED = 0.99  # thresholds above it come from images that the model has memorised


def best_text(similarities: np.ndarray) -> np.ndarray:
    """The text that each image is nearest to, int (N,), by similarities (N, T)."""
    return similarities.argmax(1)


def semantic_rule(similarities: np.ndarray) -> np.ndarray:
    """Reasons, object (N,), by similarities (N, T) to the positive text, the first, and to negative ones."""
    return np.where(best_text(similarities) == 0, "", SEMANTIC).astype(object)


def own_text_rule(similarities: np.ndarray, own: np.ndarray, reason: str) -> np.ndarray:
    """Reasons, object (N,): `reason` where another text than the image's own, int (N,), is nearest; none for own -1.

    With the classes' texts this is the class rule, with the domains' the domain rule.
    """
    return np.where((best_text(similarities) == own) | (own < 0), "", reason).astype(object)


def class_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mean probability of the true class over each class's images, float64 (C,), as confident learning defines it.

    Northcutt et al., 2021, equation 2. A class without an image has NO_THRESHOLD.

    Args:
        probabilities: (N, C), rows that sum to 1.
        labels: true classes, int (N,).
    """
    own = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    classes = probabilities.shape[1]
    count = np.bincount(labels, minlength=classes)
    total = np.bincount(labels, weights=own, minlength=classes)
    return np.where(count > 0, total / np.maximum(count, 1), NO_THRESHOLD)


def confidence_rule(
    probabilities: np.ndarray, labels: np.ndarray, thresholds: np.ndarray, judged: np.ndarray | None = None
) -> np.ndarray:
    """Reasons, object (N,), by the base model's probabilities (N, C).

    Where the largest reaches the threshold of the predicted class, the edit is too easy if the prediction is the
    class asked for (it changes too little to teach anything), else its class is corrupted.

    Args:
        labels: classes asked for, int (N,).
        thresholds: of `class_thresholds`, (C,).
        judged: the class that another judge sees, int (N,). It then decides alone which edits are corrupted: on biased
            data the base model takes a new background for another class, and would drop the very edits that help.
    """
    predicted = probabilities.argmax(1)
    confident = probabilities.max(1) >= thresholds[predicted]
    reasons = np.full(len(labels), "", dtype=object)
    wrong = confident & (predicted != labels) if judged is None else judged != labels
    reasons[wrong] = CORRUPTED
    reasons[confident & (predicted == labels) & ~wrong] = EASY
    return reasons


def combine(rules: list[np.ndarray]) -> np.ndarray:
    """The first reason of several rules, object (N,)."""
    reasons = rules[0].copy()
    for rule in rules[1:]:
        empty = reasons == ""
        reasons[empty] = rule[empty]
    return reasons


def give_back(reasons: np.ndarray, names: list[str], share: float) -> np.ndarray:
    """Reasons without those of a share of the dropped images, which a digest of their names picks."""
    picked = np.array([digest_int("give back", name) % 1_000_000 < share * 1_000_000 for name in names], dtype=bool)
    return np.where(picked, "", reasons).astype(object)
