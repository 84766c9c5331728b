"""Figures that more than one script draws, and what all figures have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np

# Figures share these colours; the order keeps neighbours apart for colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


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
