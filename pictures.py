"""Pictures of a training run: what it trained on, and which hard classes were taken for what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLUMNS, TILE, LINE = 8, 72, 24  # images a row; sides in pixels


def sheet(images: list[np.ndarray], captions: list[tuple[str, str]]) -> np.ndarray:
    """Images uint8 (H, W, 3) in rows of eight, two lines of text below each: uint8 (height, width, 3)."""
    rows = -(-len(images) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (TILE + 4), rows * (TILE + LINE + 4)), "white")
    draw = ImageDraw.Draw(page)
    for number, (pixels, (first, second)) in enumerate(zip(images, captions, strict=True)):
        left, top = number % COLUMNS * (TILE + 4), number // COLUMNS * (TILE + LINE + 4)
        page.paste(Image.fromarray(pixels).resize((TILE, TILE)), (left, top))
        draw.text((left, top + TILE), first, "black", font_size=10)
        draw.text((left, top + TILE + 11), second[:12], "black", font_size=10)
    return np.asarray(page)


def draw_confusion(counts: np.ndarray, hard: np.ndarray, class_names: list[str], path: Path) -> None:
    """Write a PNG of what the test images of the hard classes were taken for, in shares of each class.

    Args:
        counts: int (C, C), of evaluation.confusion.
        hard: class indices of the rows, (H,).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    classes = counts.shape[1]
    rows = counts[hard] / np.maximum(1, counts[hard].sum(1, keepdims=True))
    figure, axes = pyplot.subplots(figsize=(min(20, 2 + 0.2 * classes), min(20, 1.5 + 0.22 * len(hard))))
    drawn = axes.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if classes <= 100:
        axes.set_xticks(range(classes), class_names, rotation=90, fontsize=6)
    if len(hard) <= 100:
        axes.set_yticks(range(len(hard)), [class_names[label] for label in hard], fontsize=6)
    axes.set(xlabel="taken for", ylabel="few-shot class", title="Test images of the few-shot classes")
    figure.colorbar(drawn, label="share of the class")
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
