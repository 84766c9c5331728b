"""The figures in which a table's rows are compared: by epoch, by class, and by domain.

Each is given as its file's name without ending, its caption, a function of reporting/figures.py, and that function's
arguments but the path.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from reporting import figures, names
from reporting.comparisons import plain_row
from reporting.tables import Row

GROUPS = ("many", "medium", "few")
MOST_ROWS = 9  # of a figure of curves; of more, none could be told from the others
PANELS = {
    "val_overall": "validation accuracy, all classes (%)",
    "val_few": "validation accuracy, few-shot (%)",
    "val_ood": "validation accuracy, OOD (%)",
    "val_worst_group": "validation accuracy, worst group (%)",
    "val_ood_f1": "validation macro-F1, OOD (%)",
    "val_id_f1": "validation macro-F1, ID (%)",
}


def comparative_figures(rows: list[Row]) -> Iterator[tuple]:
    """All figures that the rows' runs allow; curves of many rows by loss, in files that end in _2, _3 and so on."""
    drawn: dict[str, list[tuple]] = {}
    for number, part in enumerate(split_by_loss(rows), 1):
        styles = figures.style_of([row.name for row in part])
        for name, *rest in (*by_epoch(part, styles), *by_class(part, styles), *of_cuda(part, styles)):
            drawn.setdefault(name, []).append((name if number == 1 else f"{name}_{number}", *rest))
    for alike in drawn.values():
        yield from alike
    yield from by_domain(rows)


def split_by_loss(rows: list[Row]) -> list[list[Row]]:
    """The rows in parts of so few that their curves are told apart: losses in turn, each beside its row without."""
    if len(rows) <= MOST_ROWS:
        return [rows]
    by_loss: dict[tuple, list[Row]] = {}
    for row in rows:
        by_loss.setdefault((row.args.get("loss"), row.args.get("prior") == "stage"), []).append(row)
    parts: list[list[Row]] = [[]]
    for part in by_loss.values():
        plain = next((found for row in part if (found := plain_row(rows, row))), None)
        part = ([plain] if plain else []) + [row for row in part if row is not plain]
        more = [row for row in part if row not in parts[-1]]
        if len(parts[-1]) + len(more) <= MOST_ROWS:
            parts[-1] += more
        else:
            parts.append(part)
    return [part for part in parts if part]


def curves(row: Row, name: str) -> np.ndarray | None:
    """A figure by seed and epoch, (S, E), of the runs whose history was kept; None where none was, or has no class."""
    found = [[record.get(name) for record in run["history"]] for run in row.runs if run["history"]]
    if not found or len({len(one) for one in found}) > 1 or any(value is None for one in found for value in one):
        return None
    return np.array(found, dtype=float)


def join_equal(lines: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Lines that would cover each other as one, under all their names."""
    joined: list[tuple[list[str], np.ndarray]] = []
    for name, values in lines.items():
        same = next((same_line for same_line, other in joined if np.array_equal(other, values)), None)
        if same is None:
            joined.append(([name], values))
        else:
            same.append(name)
    return {"; ".join(same_line): values for same_line, values in joined}


def per_class(row: Row) -> np.ndarray | None:
    """Accuracy in percent by seed and class, NaN without a test image, (S, C)."""
    found = [run["results"]["last"].get("per_class") for run in row.runs]
    return np.array(found, dtype=float) if all(found) else None


def all_curves(rows: list[Row], name: str) -> dict[str, np.ndarray]:
    """`curves` of the rows that have the figure, by their names."""
    return {row.name: line for row in rows if (line := curves(row, name)) is not None}


def per_group(row: Row) -> np.ndarray | None:
    """Accuracy of each class in each domain in percent, mean over the seeds, NaN without a test image, (C, D)."""
    found = [run["results"]["last"].get("per_group") for run in row.runs]
    known = all(found) and all("domain_names" in run["results"] for run in row.runs)
    return np.array(found, dtype=float).mean(0) if known else None


def by_epoch(rows: list[Row], styles: dict) -> Iterator[tuple]:
    """Levels, validation figures and the share of synthetic images along the epochs."""
    # Levels, and the validation figures of all classes below them.
    points = {}
    for row in rows:
        history = next((run["history"] for run in row.runs if run["history"]), [])
        found = [(record["epoch"] + 1, level) for record in history for level in record["levels"]]
        # Rows with the same levels, as CE and BS with one curriculum, share their points.
        if history and row.args.get("curriculum", "none") != "none" and found not in points.values():
            points[row.name] = found
    panels = {title: lines for name, title in PANELS.items() if (lines := all_curves(rows, name))}
    if panels and not points:  # real images alone
        yield (
            "curriculum",
            "Accuracy on the validation set by epoch, mean of five epochs; the band is one standard deviation over "
            "seeds.",
            figures.draw_lines, panels, styles, figures.SMOOTHED,
        )  # fmt: skip
    elif panels:
        yield (
            "curriculum",
            "Above: the guidance level of each epoch's synthetic images; 100 is the real image. Markers are shifted "
            "a little apart; rows with equal levels share the first one's. Below: accuracy on the validation set, mean "
            "of five epochs; the band is one standard deviation over seeds.",
            figures.draw_curriculum, points, panels, styles,
        )  # fmt: skip

    # Accuracy of each group that has no panel there.
    missing = [group for group in GROUPS if PANELS.get(f"val_{group}") not in panels]
    groups = {f"{group} (%)": lines for group in missing if (lines := all_curves(rows, f"val_{group}"))}
    if len(groups) + len(GROUPS) - len(missing) > 1:  # where all classes are in one group, it is the overall accuracy
        yield (
            "groups",
            "Validation accuracy of each group of classes by epoch, mean of five epochs; the band is one standard "
            "deviation over seeds.",
            figures.draw_lines, groups, styles, figures.SMOOTHED,
        )  # fmt: skip

    # The share of synthetic images.
    share = join_equal({name: 100 * line for name, line in all_curves(rows, "synthetic_share").items() if line.any()})
    if share:
        yield (
            "synthetic",
            "Share of each epoch's training images that are synthetic; rows with equal shares are one line.",
            figures.draw_lines, {"synthetic images (%)": share},
            {name: styles[name.split("; ")[0]] for name in share}, 1,
        )  # fmt: skip


def by_class(rows: list[Row], styles: dict) -> Iterator[tuple]:
    """Figures by how many training images a class has."""
    counts = next((row.runs[0]["results"].get("train_counts") for row in rows), None)
    known = {row.name: line for row in rows if (line := per_class(row)) is not None and counts}
    # Where classes have about as many images each, their order says nothing.
    if not known or max(counts) < 2 * min(counts):
        return
    yield (
        "frequency",
        "Test accuracy by how many training images a class has: classes in order, in groups of equal size; the band is "
        "one standard deviation over seeds.",
        figures.draw_by_frequency, known, np.array(counts), styles, "test accuracy (%)",
    )  # fmt: skip

    # A curriculum's gain over the same loss without one.
    tested = [row for row in rows if row.name in known]
    gain = {
        row.name: known[row.name] - known[plain.name].mean(0)
        for row in tested
        if row.args.get("curriculum", "none") != "none" and (plain := plain_row(tested, row))
    }
    if gain:
        yield (
            "gain",
            "What a curriculum adds over the mean of the same loss without one, by how many training images a class "
            "has; the band is one standard deviation over seeds.",
            figures.draw_by_frequency, gain, np.array(counts), styles, "gain (points)",
        )  # fmt: skip


def by_domain(rows: list[Row]) -> Iterator[tuple]:
    """Accuracy of each class in each domain."""
    known = {row.name: found for row in rows if (found := per_group(row)) is not None}
    if not known:
        return
    results = next(row for row in rows if row.name in known).runs[0]["results"]
    yield (
        "domains",
        "Test accuracy of each group, a class in a domain: mean over the seeds. A group counts as shown in training "
        "where its domain has a tenth of its class's images or more.",
        figures.draw_groups, known,
        np.array(results["last"]["seen_groups"]), results["class_names"], results["domain_names"],
    )  # fmt: skip


def of_cuda(rows: list[Row], styles: dict) -> Iterator[tuple]:
    """CUDA's level of learning along the epochs."""
    learned = {
        f"level of learning, {names.FIGURE_NAMES.get(group, group)}": lines
        for group in ("overall", *GROUPS)
        if (lines := all_curves(rows, f"cuda_{group}"))
    }
    if learned:
        caption = "CUDA's level of learning by epoch: 0 augments nothing, 10 most."
        yield "cuda", caption, figures.draw_lines, learned, styles, 1
