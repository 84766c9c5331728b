"""Few-shot results over several data sets in one table: a row a method, a column a data set, and their mean."""

from __future__ import annotations

from statistics import mean
from typing import NamedTuple

from reporting import comparisons
from reporting.tables import Row, Table

FIGURE = "overall"


class Overview(NamedTuple):
    """A table as text."""

    name: str
    heading: list[str]
    rows: list[list[str]]


def build(found: list[Table]) -> list[Overview]:
    """An overview of each group of few-shot tables that differ in their data set alone, where there are several."""
    groups: dict[str, dict[str, Table]] = {}
    for table in found:
        if any("images" in row.args for row in table.rows.values()):
            data, _, rest = table.name.partition(", ")
            groups.setdefault(rest, {})[data] = table
    return [describe(rest, group) for rest, group in groups.items() if len(group) > 1]


def describe(rest: str, group: dict[str, Table]) -> Overview:
    """The overview of some tables by their data set. The mean of a row stands where it has all of them."""
    names = dict.fromkeys(name for table in group.values() for name in table.rows)
    rows = []
    for name in names:
        found = [table.rows.get(name) for table in group.values()]
        rows += [
            line(name, [ours(row) for row in found]),
            line(f"{name}, published", [published(row) for row in found]),
        ]
    words = ["test accuracy, %", *group, f"mean of {len(group)}"]
    return Overview(f"{len(group)} data sets, {rest}", words, [row for row in rows if row])


def line(name: str, values: list[float | None]) -> list[str]:
    """A row's cells; none where no data set has a value."""
    known = [value for value in values if value is not None]
    if not known:
        return []
    shown = [*values, mean(known) if len(known) == len(values) else None]
    return [name, *(f"{value:.1f}" if value is not None else "–" for value in shown)]


def ours(row: Row | None) -> float | None:
    """A row's mean over its seeds after the last epoch."""
    pair = comparisons.results_of(row, FIGURE) if row else None
    return pair[0] if pair else None


def published(row: Row | None) -> float | None:
    return row.expected.get(FIGURE) if row else None
