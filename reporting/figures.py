"""Figures that more than one script draws, and what all figures have in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# Figures share these colours; the order keeps neighbours apart for colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("x", "s", "o", "+", "^", "v", "d")
SMOOTHED = 5  # epochs that a bold line is the mean of
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


def draw_curriculum(
    levels: dict[str, list[tuple[int, int]]], panels: dict[str, dict[str, np.ndarray]], path: Path
) -> None:
    """Guidance levels by epoch, and below it curves by epoch.

    Args:
        levels: curriculum -> pairs of epoch, from 1, and level in percent; several of an epoch that mixes levels.
        panels: what a panel shows -> row -> values by epoch, (E,).
    """
    figure, (top, *others) = new_figure(
        1 + len(panels), 1, figsize=(8, 3 + 3 * len(panels)), sharex=True, height_ratios=(2, *[3] * len(panels))
    )
    for number, (name, points) in enumerate(levels.items()):
        marker, colour = MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)]
        top.plot(*zip(*points, strict=True), marker, color=colour, markersize=4, label=name)
    top.set_ylabel("guidance level (%)\n100 = real images only")
    top.set_ylim(-5, 105)
    top.grid(alpha=0.3)
    if levels:
        top.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _draw_panels(others, panels)
    save_figure(figure, path)


def draw_lines(panels: dict[str, dict[str, np.ndarray]], smoothed: int, path: Path) -> None:
    """Curves by epoch: what a panel shows -> row -> values, (E,). `smoothed`: epochs that a line is the mean of."""
    figure, axes = new_figure(len(panels), 1, figsize=(8, 3 * len(panels)), sharex=True, squeeze=False)
    _draw_panels(axes[:, 0], panels, smoothed)
    save_figure(figure, path)


def _draw_panels(axes, panels: dict[str, dict[str, np.ndarray]], smoothed: int = SMOOTHED) -> None:
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for (label, lines), axis in zip(panels.items(), axes, strict=True):
        for name, values in lines.items():
            number = names.index(name)
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3]}
            epochs = np.arange(1, len(values) + 1)
            if smoothed > 1:
                # Few validation images make a jagged line: show it faintly, under its mean over some epochs.
                axis.plot(epochs, values, alpha=0.2, linewidth=1, **style)
            means = [values[max(0, i - smoothed + 1) : i + 1].mean() for i in range(len(values))]
            axis.plot(epochs, means, linewidth=2, label=name, **style)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("epoch")
    axes[0].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_by_frequency(lines: dict[str, np.ndarray], counts: np.ndarray, label: str, path: Path) -> None:
    """A figure of each class by how many training images it has: classes in order of that, in up to 10 groups.

    Args:
        lines: row -> figure of each class, (C,), NaN where it has none.
        counts: training images of each class, (C,).
        label: what the figure is, with its unit.
    """
    groups = [group for group in np.array_split(np.argsort(-counts, kind="stable"), 10) if len(group)]
    figure, axis = new_figure(figsize=(8, 4))
    for number, (name, values) in enumerate(lines.items()):
        found = [values[group][~np.isnan(values[group])] for group in groups]
        means = [group.mean() if len(group) else np.nan for group in found]
        axis.plot(
            range(len(groups)), means, linewidth=2, marker=".", label=name, color=COLOURS[number % len(COLOURS)],
            linestyle=("-", "--", ":")[number // len(COLOURS) % 3],
        )  # fmt: skip
    ranges = [(counts[group].max(), counts[group].min()) for group in groups]
    axis.set_xticks(range(len(groups)), [f"{most}" if most == least else f"{most}–{least}" for most, least in ranges])
    axis.tick_params(axis="x", labelsize=8)
    axis.set(xlabel="training images of a class", ylabel=label)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)
