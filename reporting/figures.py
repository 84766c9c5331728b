"""Figures that more than one script draws, and what all figures have in common."""

from __future__ import annotations

import functools
import re
import textwrap
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Figures share these colours; the order keeps neighbours apart for colour-blind readers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# Fonts with Chinese, Japanese and Korean characters; the installed ones are used.
WIDE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Source Han Sans SC", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "Droid Sans Fallback", "IPAGothic", "PingFang SC", "Hiragino Sans", "Microsoft YaHei",
    "Malgun Gothic", "Arial Unicode MS",
)  # fmt: skip
MARKERS = ("x", "s", "o", "+", "^", "v", "d")
MOST_GROUPS = 60  # columns of draw_groups
WIDTH, LEGEND = 5, 60  # of a figure of curves, in inches; of its legend, in letters: a telephone shows both legibly
SMOOTHED = 5  # epochs that a bold line is the mean of
COLUMNS, TILE, LINE = 8, 72, 24  # of a sheet: images a row; sides of an image and its text in pixels


def style_of(names: list[str]) -> dict[str, dict]:
    """The look of each row in all figures of a table: its colour, and a dash once the colours are used up."""
    dashes = ("-", "--", ":", "-.")
    return {
        name: {"color": COLOURS[k % len(COLOURS)], "linestyle": dashes[k // len(COLOURS) % len(dashes)]}
        for k, name in enumerate(names)
    }


def add_legend(figure, axes) -> None:
    """One legend for all of a figure's axes, below them and no wider, so that a narrow screen shows it too."""
    found = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if found:
        names = [textwrap.fill(name, LEGEND) for name in found]
        columns = max(1, min(3, LEGEND // (max(map(len, names)) + 6)))
        below = figure.subplotpars.bottom - 0.62 / figure.get_figheight()  # room for the axis label, in inches
        figure.legend(found.values(), names, fontsize=9, loc="upper left", bbox_to_anchor=(0, below), ncols=columns)


def new_figure(*args, **kwargs):
    """A matplotlib figure that needs no display and draws class names as they are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    installed = {font.name for font in font_manager.fontManager.ttflist}
    # Two `$` in a class name are no formula, and a character that the first font lacks is taken from the next.
    matplotlib.rcParams["text.parse_math"] = False
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", *(name for name in WIDE_FONTS if name in installed)]
    return pyplot.subplots(*args, **kwargs)


def save_figure(figure, path: Path) -> None:
    """Write a figure, and say in one line which characters no installed font has."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    missing = [found[1] for warning in caught if (found := re.search(r"Glyph (\d+) .* missing", str(warning.message)))]
    if missing:
        letters = "".join(dict.fromkeys(chr(int(number)) for number in missing))
        print(f"warning: {path.name}: no installed font has {letters[:20]}: boxes instead; {WIDE_FONTS[0]} has most")


def draw_acceptance(
    names: list[str],
    levels: list,
    made: np.ndarray,
    kept: np.ndarray,
    path: Path,
    columns: str = "guidance level (%)",
    title: str = "images that CLIPScore keeps",
) -> None:
    """The share of images that a filter keeps: a row for each class or group, a column for each level or domain.

    Args:
        names: what the R rows are.
        levels: what the L columns are: levels in percent, or domains.
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
    long = any(len(str(level)) > 8 for level in levels)
    axis.set_xticks(range(len(levels)), levels, **({"rotation": 30, "ha": "right"} if long else {}))
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel(columns)
    axis.set_title(title, fontsize=10)
    save_figure(figure, path)


def sheet(images: list[np.ndarray], captions: list[tuple[str, str]], columns: int = COLUMNS) -> np.ndarray:
    """Images uint8 (H, W, 3) in rows of `columns`, two lines of text below each: uint8 (height, width, 3)."""
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (TILE + 4), rows * (TILE + LINE + 4)), "white")
    draw, font = ImageDraw.Draw(page), sheet_font()
    for number, (pixels, (first, second)) in enumerate(zip(images, captions, strict=True)):
        left, top = number % columns * (TILE + 4), number // columns * (TILE + LINE + 4)
        page.paste(Image.fromarray(pixels).resize((TILE, TILE)), (left, top))
        draw.text((left, top + TILE), first, "black", font)
        draw.text((left, top + TILE + 11), second[:12], "black", font)
    return np.asarray(page)


@functools.cache
def sheet_font() -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings: Pillow's own has no umlaut, accent or Greek letter."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 9)


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
        counts: int (H, C), of evaluation.confusion.
        hard: class indices of the rows, (H,).
    """
    classes = counts.shape[1]
    rows = counts / np.maximum(1, counts.sum(1, keepdims=True))
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
    levels: dict[str, list[tuple[int, int]]],
    panels: dict[str, dict[str, np.ndarray]],
    styles: dict[str, dict],
    path: Path,
) -> None:
    """Guidance levels by epoch, and below it curves by epoch.

    Args:
        levels: row -> pairs of epoch, from 1, and level in percent; several of an epoch that mixes levels.
        panels: what a panel shows -> row -> values by seed and epoch, (S, E).
        styles: of `style_of`.
    """
    figure, (top, *others) = new_figure(
        1 + len(panels), 1, figsize=(WIDTH, 3 + 2.5 * len(panels)), sharex=True, height_ratios=(2, *[3] * len(panels))
    )
    for number, (name, points) in enumerate(levels.items()):
        # Rows at one level would hide each other: each has its own small shift and an open marker.
        shift = 2.5 * (number - (len(levels) - 1) / 2)
        epochs, values = zip(*points, strict=True)
        marker, colour = MARKERS[number % len(MARKERS)], styles[name]["color"]
        top.plot(epochs, np.array(values) + shift, marker, color=colour, markersize=4, fillstyle="none", label=name)
    top.set_ylabel("guidance level (%)\n100 = real images only")
    top.set_ylim(-5 - 1.25 * len(levels), 105 + 1.25 * len(levels))
    top.grid(alpha=0.3)
    _draw_panels(others, panels, styles)
    add_legend(figure, (*others, top))
    save_figure(figure, path)


def draw_groups(
    rows: dict[str, np.ndarray], seen: np.ndarray, class_names: list[str], domain_names: list[str], path: Path
) -> None:
    """Accuracy of each row of a table by group, a class in a domain; groups that training shows are marked.

    Args:
        rows: accuracies in percent by row, NaN without a test image, (C, D).
        seen: whether training shows a group, bool (C, D).
    """
    tested = ~np.isnan(np.stack(list(rows.values()))).all(0)
    places = np.argwhere(tested)
    if len(places) <= MOST_GROUPS:
        values = np.stack([row[tested] for row in rows.values()])
        words = [f"{class_names[c]}, {domain_names[d]}{' *' if seen[c, d] else ''}" for c, d in places]
    else:  # too many to read: the mean over a domain's classes
        domains = np.flatnonzero(tested.any(0))
        values = np.stack([np.nanmean(row[:, domains], 0) for row in rows.values()])
        words = [domain_names[d] for d in domains]
    figure, axis = new_figure(figsize=(2.5 + 0.34 * len(words), 2.2 + 0.3 * len(rows)))
    axis.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto", interpolation="nearest")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "black" if value > 60 else "white"
            axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_title("test accuracy by group (%); * training shows this group", fontsize=9)
    save_figure(figure, path)


def draw_lines(panels: dict[str, dict[str, np.ndarray]], styles: dict[str, dict], smoothed: int, path: Path) -> None:
    """Curves by epoch.

    Args:
        panels: what a panel shows -> row -> values by seed and epoch, (S, E).
        styles: of `style_of`.
        smoothed: epochs that a line is the mean of.
    """
    figure, axes = new_figure(len(panels), 1, figsize=(WIDTH, 2.5 * len(panels)), sharex=True, squeeze=False)
    _draw_panels(axes[:, 0], panels, styles, smoothed)
    add_legend(figure, axes[:, 0])
    save_figure(figure, path)


def _draw_panels(axes, panels: dict, styles: dict[str, dict], smoothed: int = SMOOTHED) -> None:
    """A line for the mean over seeds, and a band of one standard deviation to either side."""
    for (label, lines), axis in zip(panels.items(), axes, strict=True):
        smoothed_lines = {name: smooth(values, smoothed) for name, values in lines.items()}
        widths = nested_widths(smoothed_lines)
        for name, values in smoothed_lines.items():
            epochs = np.arange(1, values.shape[1] + 1)
            _draw_band(axis, epochs, values, name, styles[name], linewidth=widths[name])
        axis.set_ylabel(textwrap.fill(label, 28))
        axis.grid(alpha=0.3)
    if len(axes):
        axes[-1].set_xlabel("epoch")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)


def _draw_band(axis, places, values: np.ndarray, name: str, style: dict, **more) -> None:
    """A line of the mean over seeds of values (S, N), and where there are several seeds a band about it."""
    low, middle, high = bands(values)
    axis.plot(places, middle, label=name, **style, **more)
    if len(values) > 1:
        axis.fill_between(places, low, high, color=style["color"], alpha=0.12, linewidth=0)


def nested_widths(lines: dict[str, np.ndarray]) -> dict[str, float]:
    """Line widths by row: a line that a later one covers is wider by 2 for each such line, and shows on both sides."""
    means = {name: values.mean(0) for name, values in lines.items()}
    names = list(means)
    return {
        name: 2.0 + 2 * sum(np.array_equal(means[name], means[other], equal_nan=True) for other in names[k + 1 :])
        for k, name in enumerate(names)
    }


def bands(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds (S, N) -> (N,), and one standard deviation (n - 1) below and above it: low, mean, high.

    With one seed all three are its values.
    """
    middle = values.mean(0)
    spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros_like(middle)
    return middle - spread, middle, middle + spread


def smooth(values: np.ndarray, epochs: int) -> np.ndarray:
    """Each value's mean with those of the epochs before it, up to `epochs` of them: (S, E) -> (S, E)."""
    means = [values[:, max(0, i - epochs + 1) : i + 1].mean(1) for i in range(values.shape[1])]
    return np.stack(means, axis=1)


def draw_by_frequency(
    lines: dict[str, np.ndarray], counts: np.ndarray, styles: dict[str, dict], label: str, path: Path
) -> None:
    """A figure of each class by how many training images it has: classes in order of that, in up to 10 groups.

    Args:
        lines: row -> figure by seed and class, (S, C), NaN where a class has none; the band is one standard deviation
            over seeds.
        counts: training images of each class, (C,).
        styles: of `style_of`.
        label: what the figure is, with its unit.
    """
    groups = [group for group in np.array_split(np.argsort(-counts, kind="stable"), 10) if len(group)]
    figure, axis = new_figure(figsize=(WIDTH, 3.5))
    by_group = {}
    for name, values in lines.items():
        known = [values[:, group][:, ~np.isnan(values[:, group]).any(0)] for group in groups]
        means = [group.mean(1) if group.size else np.full(len(values), np.nan) for group in known]
        by_group[name] = np.stack(means, axis=1)
    widths = nested_widths(by_group)
    for name, values in by_group.items():
        _draw_band(axis, range(len(groups)), values, name, styles[name], linewidth=widths[name], marker=".")
    ranges = [(counts[group].max(), counts[group].min()) for group in groups]
    words = [f"{most}" if most == least else f"{most}–\n{least}" for most, least in ranges]
    axis.set_xticks(range(len(groups)), words, fontsize=8)  # in two lines: ten of them have no room in one
    axis.set(xlabel="training images of a class", ylabel=label)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.grid(alpha=0.3)
    add_legend(figure, [axis])
    save_figure(figure, path)
