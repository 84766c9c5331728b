"""Figures that more than one script draws, and what all figures have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Figures share these colours; the order keeps neighbours apart for colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
COLUMNS, TILE, LINE = 8, 72, 24  # of a sheet: images a row; sides of an image and its text in pixels


def new_figure(*args, **kwargs):
    """A matplotlib figure that needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*args, **kwargs)


def save_figure(figure, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def draw_acceptance(names: list[str], levels: list[int], made: np.ndarray, kept: np.ndarray, path: Path) -> None:
    """The share of images that CLIPScore keeps: a row for each class or group, a column for each level.

    Args:
        names: what the R rows are.
        levels: what the L columns are, percent.
        made: images drawn, int (R, L).
        kept: images kept, int (R, L).
    """
    share = 100 * kept / np.maximum(made, 1)
    figure, axis = new_figure(figsize=(1.5 + len(levels), 1 + 0.45 * len(names)))
    axis.imshow(share, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(share):
        axis.text(
            j,
            i,
            f"{value:.0f} %\n{kept[i, j]} of {made[i, j]}",
            ha="center",
            va="center",
            fontsize=7,
            color="black" if value > 60 else "white",
        )
    axis.set_xticks(range(len(levels)), levels)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("guidance level (%)")
    axis.set_title("images that CLIPScore keeps", fontsize=10)
    save_figure(figure, path)


def sheet(images: list[np.ndarray], captions: list[tuple[str, str]], columns: int = COLUMNS) -> np.ndarray:
    """Images uint8 (H, W, 3) in rows of `columns`, two lines of text below each: uint8 (height, width, 3)."""
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (TILE + 4), rows * (TILE + LINE + 4)), "white")
    draw = ImageDraw.Draw(page)
    for number, (pixels, (first, second)) in enumerate(zip(images, captions, strict=True)):
        left, top = number % columns * (TILE + 4), number // columns * (TILE + LINE + 4)
        page.paste(Image.fromarray(pixels).resize((TILE, TILE)), (left, top))
        draw.text((left, top + TILE), first, "black", font_size=10)
        draw.text((left, top + TILE + 11), second[:12], "black", font_size=10)
    return np.asarray(page)


def draw_progress(history: list[dict], path: Path) -> None:
    """Write a PNG of adaptive's looks: each level's progress before each epoch, with a dot where it was trained on."""
    looks = [record for record in history if "progress" in record]
    levels = sorted({int(level) for record in looks for level in record["progress"]})
    figure, axis = new_figure(figsize=(8, 3.5))
    for level, colour in zip(levels, (COLOURS * len(levels))[: len(levels)], strict=True):
        epochs = [record["epoch"] + 1 for record in looks]
        values = [record["progress"][str(level)] for record in looks]
        axis.plot(epochs, values, color=colour, linewidth=1.5, label=f"level {level}")
        chosen = [(e, v) for e, v, record in zip(epochs, values, looks, strict=True) if record["levels"] == [level]]
        if chosen:
            axis.plot(*zip(*chosen, strict=True), "o", color=colour, markersize=6)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(xlabel="epoch", ylabel="progress", title="Progress by level; the level trained on has a dot")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def draw_confusion(counts: np.ndarray, hard: np.ndarray, class_names: list[str], path: Path) -> None:
    """Write a PNG of what the test images of the hard classes were taken for, in shares of each class.

    Args:
        counts: int (C, C), of evaluation.confusion.
        hard: class indices of the rows, (H,).
    """
    classes = counts.shape[1]
    rows = counts[hard] / np.maximum(1, counts[hard].sum(1, keepdims=True))
    figure, axes = new_figure(figsize=(min(20, 2 + 0.2 * classes), min(20, 1.5 + 0.22 * len(hard))))
    drawn = axes.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    if classes <= 100:
        axes.set_xticks(range(classes), class_names, rotation=90, fontsize=6)
    if len(hard) <= 100:
        axes.set_yticks(range(len(hard)), [class_names[label] for label in hard], fontsize=6)
    axes.set(xlabel="taken for", ylabel="few-shot class", title="Test images of the few-shot classes")
    figure.colorbar(drawn, label="share of the class")
    save_figure(figure, path)
