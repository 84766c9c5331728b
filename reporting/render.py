"""Tables of results as text: cells, notes, Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io

from reporting import comparisons, overview, tables
from reporting.names import FIGURE_NAMES, ZERO_SHOT
from reporting.tables import Row, Table
from runtime.text import counted

SHOWN = 3  # folders that a line names
COMPARED = (
    ("ood", "worst_group"),
    ("few", "overall"),
    ("ood_f1", "id_f1"),
)  # the figures that rows are compared by; the first pair there is
SPOKEN = {
    "few": "few-shot accuracy",
    "overall": "accuracy over all classes",
    "ood": "accuracy out of distribution",
    "worst_group": "accuracy of the worst group",
}
RULE = (
    "± is the standard error of the difference over seeds, which are not paired; 'better' and 'worse' are written only "
    "beyond two of them, which chance alone passes in about one case in eight where both have three seeds; the spread "
    "of published figures is not known and not counted"
)


def heading(table: Table) -> list[str]:
    """The words above a table's columns; a comparison has one only where there is something to compare with."""
    words = ["test accuracy, %" if "overall" in table.figures else "test, %"]
    words += [FIGURE_NAMES.get(name, name) for name in table.figures] + ["seeds"]
    if has_gains(table):
        words.append("against the row without")
    return words + (["published", "ours − published"] if has_published(table) else [])


def has_published(table: Table) -> bool:
    return any(row.expected for row in table.rows.values())


def has_gains(table: Table) -> bool:
    return any(comparisons.plain_row(table.rows.values(), row) for row in table.rows.values())


def cells(table: Table, row: Row) -> list[str]:
    """A row as text: its name, mean (standard deviation) of each figure, seeds, and its comparisons."""
    words = [row.name]
    for name in table.figures:
        pair = comparisons.results_of(row, name)
        spread = f" ({pair[1]:.1f})" if pair and pair[1] is not None else ""
        words.append(f"{pair[0]:.1f}{spread}" if pair else "–")
    words.append(str(len(row.runs)) if row.runs and row.base != ZERO_SHOT else "–")
    if has_gains(table):
        words.append(", ".join(gains(table, row)) or "–")
    if has_published(table):
        words.append(
            ", ".join(f"{FIGURE_NAMES.get(name, name)} {value:g}" for name, value in row.expected.items()) or "–"
        )
        pairs = {name: comparisons.against_published(row, name) for name in row.expected}
        words.append(", ".join(difference(name, pair) for name, pair in pairs.items() if pair) or "–")
    return words


def gains(table: Table, row: Row) -> list[str]:
    """What a row's curriculum or CUDA adds over the same loss without, in points."""
    plain = comparisons.plain_row(table.rows.values(), row)
    if plain is None:
        return []
    names = next((pair for pair in COMPARED if set(pair) & set(table.figures)), ())
    found = [(name, comparisons.against_row(row, plain, name)) for name in names]
    return [difference(name, pair) for name, pair in found if pair]


def difference(name: str, pair: tuple[float, float | None]) -> str:
    """A figure's difference in points, with its standard error and what may be said of it."""
    value, error = pair
    words = [FIGURE_NAMES.get(name, name), _points(value)]
    words += [f"± {error:.1f}"] if error is not None else []
    return " ".join([*words, comparisons.verdict(value, error)]).strip()


# ---------------------------------------------------------------------------------------------------------------------
# findings


def findings(table: Table) -> str:
    """What a table shows, in words: which row leads in each figure and by how much, and what the curricula add."""
    names = next((pair for pair in COMPARED if set(pair) & set(table.figures)), ())
    names = [name for name in names if name in table.figures]
    sentences = [text for name in names if (text := _leader(table, name))]
    sentences += [text for name in names[:1] if (text := _curricula(table, name))]
    return f"{table.name}. {' '.join(sentences)}" if sentences else ""


def _leader(table: Table, name: str) -> str:
    """The row that is highest in a figure, how far the next is behind it, and whether that is more than noise."""
    rows = [row for row in table.rows.values() if comparisons.results_of(row, name)]
    if not rows:
        return ""
    best, *others = sorted(rows, key=lambda row: -comparisons.results_of(row, name)[0])
    what, value = SPOKEN.get(name, FIGURE_NAMES.get(name, name)), comparisons.results_of(best, name)[0]
    if not others:
        return f"{best.name} has {value:.1f} % {what} ({_seeds(best)})."
    text = f"Highest in {what}: {best.name}, {value:.1f} % ({_seeds(best)})"
    ahead, error = comparisons.against_row(best, others[0], name)
    if not ahead:
        return f"{text}, and {others[0].name} ({_seeds(others[0])})."
    text += (
        f", {ahead:.1f}{f' ± {error:.1f}' if error is not None else ''} above {others[0].name} ({_seeds(others[0])})"
    )
    if error is None:
        return f"{text}; with one seed a row it cannot be told from noise."
    return f"{text}, {'a clear lead' if comparisons.verdict(ahead, error) else 'within the noise'}."


def _curricula(table: Table, name: str) -> str:
    """How many rows with a curriculum, CUDA or additions differ clearly from the same loss without; the best one."""
    gains = {}
    for row in table.rows.values():
        plain = comparisons.plain_row(table.rows.values(), row)
        if plain is not None and (pair := comparisons.against_row(row, plain, name)):
            gains[row.name] = pair
    known = {row: pair for row, pair in gains.items() if pair[1] is not None}
    if not gains:
        return ""
    what = f"in {SPOKEN.get(name, FIGURE_NAMES.get(name, name))} against the same loss without"
    if not known:
        best = max(gains, key=lambda row: gains[row][0])
        return f"The most {what}: {best}, {_points(gains[best][0])}, of one seed."
    verdicts = [comparisons.verdict(*pair) for pair in known.values()]
    best = max(known, key=lambda row: known[row][0])
    left_out = len(gains) - len(known)
    return (
        f"Of {counted(len(known), 'row')} with a curriculum, CUDA or additions, {what}: {verdicts.count('better')} "
        f"clearly better, {verdicts.count('worse')} clearly worse; the most: {best}, {_points(known[best][0])} ± "
        f"{known[best][1]:.1f}." + (f" {counted(left_out, 'row')} with one seed not counted." if left_out else "")
    )


def _points(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _seeds(row: Row) -> str:
    return "untuned" if row.base == ZERO_SHOT else counted(len(row.runs), "seed")


# ---------------------------------------------------------------------------------------------------------------------
# notes


def notes(table: Table) -> list[str]:
    """What a reader has to know of a table."""
    lines = [f"{remark}." for remark in table.remarks]
    if has_gains(table) or has_published(table):
        lines.append(f"{RULE}.")
    lines += plain_notes(table) + recipe_notes(table) + input_notes(table) + published_notes(table)
    lines += history_notes(table) + code_notes(table)
    waiting = tables.missing(table)
    begun = {row.recipe.path for row in table.rows.values() if row.recipe and row.runs}
    some = [f"{name} (seed {', '.join(map(str, seeds))})" for name, (recipe, seeds) in waiting.items()
            if recipe.path in begun]  # fmt: skip
    none = [name for name, (recipe, _) in waiting.items() if recipe.path not in begun]
    if some:
        lines.append(f"Missing seeds: {'; '.join(some)}")
    if none:
        lines.append(f"Missing rows: {'; '.join(none)}")
    return lines


def plain_notes(table: Table) -> list[str]:
    """Which of several rows without a curriculum each row with one is compared with."""
    rows, compared = list(table.rows.values()), {}
    for row in rows:
        if len(comparisons.plain_rows(rows, row)) > 1:
            compared.setdefault(comparisons.plain_row(rows, row).name, []).append(row.name)
    parts = [f"{', '.join(names)} with {plain}" for plain, names in compared.items()]
    return (
        [f"Of several rows without, the nearest in images trained on is compared: {'; '.join(parts)}"] if parts else []
    )


def recipe_notes(table: Table) -> list[str]:
    """A line for each row that has a recipe's name but not its flags, or whose name has no room for its own."""
    lines = []
    for row in table.rows.values():
        if row.name.endswith(("flag more)", "flags more)")) and not row.like:
            flags = [tables.typed(flag, ours) for flag, (ours, _) in row.differences.items()]
            lines.append(f"{row.name} was run with {', '.join(flags)}; all else as the data set's defaults")
        if row.like and not row.recipe and row.name != ZERO_SHOT:
            flags = [f"{tables.typed(flag, ours)} (recipe: {tables.typed(flag, theirs)})"
                     for flag, (ours, theirs) in row.differences.items()]  # fmt: skip
            figures = ", ".join(f"{FIGURE_NAMES.get(n, n)} {value:g}" for n, value in row.like.expected.items())
            lines.append(
                f"{row.name} was not run as {row.like.file} says and does not count as its row: {', '.join(flags)}"
                + (f"; published for the recipe: {figures}" if figures else "")
            )
    return lines


def input_notes(table: Table) -> list[str]:
    """A line for each setting that was trained on several spectra or from several start models."""
    lines = []
    for what, name in (("spectrum", "spectra"), ("init_checkpoint", "start models")):
        by_base: dict[str, dict[str, list[str]]] = {}
        for row in table.rows.values():
            for run in row.runs if row.name != ZERO_SHOT else []:
                digest = str(run["inputs"].get(what) or "not recorded")[:8]
                draw = f", shot seed {run['args'].get('shot_seed') or 0}" if run["args"].get("shots") else ""
                by_base.setdefault(row.base + draw, {}).setdefault(digest, []).append(str(run["args"].get(what)))
        for base, digests in by_base.items():
            if len(digests) > 1:
                parts = [f"{digest} ({', '.join(dict.fromkeys(paths))})" for digest, paths in digests.items()]
                lines.append(f"{base} was trained with several {name}, each in a row of its own: {'; '.join(parts)}")
    if " (data " in table.name:
        lines.append("Runs on other images of this data set have a table of their own: they are not comparable")
    return lines


def published_notes(table: Table) -> list[str]:
    """The sources of the published figures."""
    by_source: dict[str, list[str]] = {}
    for row in table.rows.values():
        if row.expected:
            by_source.setdefault((row.recipe or row.published).source, []).append(row.name)
    parts = [f"{source} ({', '.join(rows)})" for source, rows in by_source.items()]
    lines = [f"Published in: {'; '.join(parts)}"]
    only = [row.name for row in table.rows.values() if not row.runs]
    if only:
        lines.append(f"Published only, trained by no recipe here: {'; '.join(only)}")
    return lines if by_source else []


def history_notes(table: Table) -> list[str]:
    """Which runs the curves leave out."""
    made = [run for row in table.rows.values() if row.name != ZERO_SHOT for run in row.runs]
    without = [str(run["folder"]) for run in made if not run["history"]]
    if not without or len(without) == len(made):
        return []
    return [f"Curves by epoch leave out runs without a history: {_some(without)}"]


def _some(folders: list[str]) -> str:
    """The first folders of a list, and how many more there are."""
    more = f" and {len(folders) - SHOWN} more" if len(folders) > SHOWN else ""
    return ", ".join(folders[:SHOWN]) + more


def code_notes(table: Table) -> list[str]:
    """Which code made which runs, where it was not one version."""
    by_commit: dict[str, list[str]] = {}
    for row in table.rows.values():
        for run in row.runs if row.name != ZERO_SHOT else []:
            if run["commit"]:
                by_commit.setdefault(run["commit"], []).append(str(run["folder"]))
    if len(by_commit) < 2:
        return []
    parts = [f"{commit} made {_some(folders)}" for commit, folders in by_commit.items()]
    return [f"Mixed code versions, comparable only if nothing between them matters: {'; '.join(parts)}"]


# ---------------------------------------------------------------------------------------------------------------------
# formats


def markdown(found: list[Table]) -> str:
    """The tables as Markdown, an overview of several data sets first; each has a heading where there are several."""

    def part(name: str, words: list[str], rows: list[list[str]], remarks: list[str]) -> str:
        lines = [f"### {name}", ""] if len(found) > 1 else []
        lines += ["| " + " | ".join(words) + " |", "|---" * len(words) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
        lines += [text for remark in remarks for text in ("", remark)]
        return "\n".join(lines) + "\n"

    parts = [part(*one, []) for one in overview.build(found)]
    for table in found:
        rows = [cells(table, row) for row in table.rows.values()]
        parts.append(part(table.name, heading(table), rows, notes(table)))
    return "\n".join(parts)


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "−": "$-$",
         "±": r"$\pm$", **{mark: f"\\{mark}" for mark in "%&_#${}"}}  # fmt: skip


def latex(found: list[Table]) -> str:
    """The tables as LaTeX (booktabs), an overview of several data sets first."""

    def line(words: list[str]) -> str:
        escaped = ["".join(LATEX.get(letter, letter) for letter in word) for word in words]
        return " & ".join(escaped) + r" \\"

    parts = []
    grids = [(table.name, heading(table), [cells(table, row) for row in table.rows.values()]) for table in found]
    for name, words, rows in [*overview.build(found), *grids]:
        parts.append(
            "\n".join(
                [f"% {name}; needs \\usepackage{{booktabs}}", rf"\begin{{tabular}}{{l{'r' * (len(words) - 1)}}}",
                 r"\toprule", line(words), r"\midrule", *map(line, rows), r"\bottomrule", r"\end{tabular}"]
            )
            + "\n"
        )  # fmt: skip
    return "\n".join(parts)


def long_csv(found: list[Table]) -> str:
    """All figures of all tables, one a line, after the last epoch and at the best by validation; 2 decimals.

    `error` is the standard error of `difference`, ours minus the published figure.
    """
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    names = ["table", "row", "epoch", "seeds", "figure", "mean", "std", "published", "difference", "error", "source"]
    out.writerow(names)
    for table in found:
        for row in table.rows.values():
            for epoch in ("last", "best_by_val"):
                for name in table.figures:
                    pair = comparisons.results_of(row, name, epoch)
                    expected = row.expected.get(name) if epoch == "last" else None
                    against = comparisons.against_published(row, name) if epoch == "last" else None
                    error = against[1] if against else None
                    out.writerow(
                        [
                            table.name,
                            row.name,
                            epoch,
                            len(row.runs),
                            FIGURE_NAMES.get(name, name),
                            f"{pair[0]:.2f}" if pair else "",
                            f"{pair[1]:.2f}" if pair and pair[1] is not None else "",
                            f"{expected:.2f}" if expected is not None else "",
                            f"{against[0]:+.2f}" if against else "",
                            f"{error:.2f}" if error is not None else "",
                            (row.recipe or row.published).source if expected is not None else "",
                        ]
                    )
    return text.getvalue()
