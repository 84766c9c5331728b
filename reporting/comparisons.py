"""Figures of a table's rows: means, deviations and errors over seeds, and differences between rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import mean, stdev

from reporting.names import ZERO_SHOT, added_names
from reporting.tables import Row, same


def summary(values: list[float | None]) -> tuple[float, float | None] | None:
    """Mean and standard deviation (n - 1) over seeds; the latter None for one seed; None where a group has no class."""
    known = [value for value in values if value is not None]
    return (mean(known), stdev(known) if len(known) > 1 else None) if known else None


def results_of(row: Row, figure: str, epoch: str = "last") -> tuple[float, float | None] | None:
    """Mean and standard deviation over the row's runs; None for the latter of an untuned CLIP, which has no seeds."""
    pair = summary([(run["results"].get(epoch) or {}).get(figure) for run in row.runs])
    return (pair[0], None) if pair and row.base == ZERO_SHOT else pair


def error_of_mean(row: Row, figure: str, epoch: str = "last") -> float | None:
    """The standard error of a row's mean: standard deviation over the root of the number of seeds; None for one, and 0
    for an untuned CLIP."""
    if row.base == ZERO_SHOT:
        return 0.0
    values = [(run["results"].get(epoch) or {}).get(figure) for run in row.runs]
    pair = summary(values)
    known = sum(value is not None for value in values)
    return pair[1] / known**0.5 if pair and pair[1] is not None else None


def against_published(row: Row, figure: str, epoch: str = "last") -> tuple[float, float | None] | None:
    """Ours minus the published figure, and our standard error (of the published one too little is known)."""
    pair = results_of(row, figure, epoch)
    if pair is None or figure not in row.expected:
        return None
    # Without an error there is no verdict: an untuned CLIP's of 0 would make any rounding "better".
    error = None if row.base == ZERO_SHOT else error_of_mean(row, figure, epoch)
    return pair[0] - row.expected[figure], error


def against_row(row: Row, other: Row, figure: str) -> tuple[float, float | None] | None:
    """The figure of one row minus another's, and the standard error of that: the root of both errors' squares' sum."""
    pairs = [results_of(some, figure) for some in (row, other)]
    if None in pairs:
        return None
    errors = [error_of_mean(some, figure) for some in (row, other)]
    error = None if None in errors else (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    return pairs[0][0] - pairs[1][0], error


def verdict(difference: float, error: float | None) -> str:
    """`better` or `worse` beyond two standard errors, otherwise nothing."""
    if error is None or abs(difference) <= 2 * error:
        return ""
    return "better" if difference > 0 else "worse"


def is_plain(row: Row) -> bool:
    """Whether a row has the real images alone: no curriculum, no CUDA, and nothing added."""
    args = row.args
    return args.get("curriculum", "none") == "none" and args.get("augment") != "cuda" and not added_names(args)


def plain_rows(rows: Iterable[Row], row: Row) -> list[Row]:
    """The rows that a curriculum, CUDA or additions may be compared with: same loss and start, without them."""
    if not row.runs or row.base == ZERO_SHOT or is_plain(row):
        return []
    options = [
        other
        for other in rows
        if other.runs
        and other.base != ZERO_SHOT
        and is_plain(other)
        and other.args.get("loss") == row.args.get("loss")
        and other.args.get("merge_same_class") == row.args.get("merge_same_class")
    ]
    # The paper compares with the model that was trained on real images alone, before its further epochs.
    return [other for other in options if not other.name.endswith(", trained on")] or options


def plain_row(rows: Iterable[Row], row: Row) -> Row | None:
    """Of `plain_rows` the one that trained on the nearest number of images, in steps of a tenth, and then the one whose
    flags differ least."""

    def unlike(other: Row) -> tuple[int, int]:
        images, ours = images_of(other), images_of(row)
        length = round(10 * abs(math.log(images / ours))) if images and ours else 0
        return length, sum(not same(value, row.settings.get(flag)) for flag, value in other.settings.items())

    return min(plain_rows(rows, row), key=unlike, default=None)


def images_of(row: Row) -> float | None:
    """How many images a row's runs trained on, on average; None where a run did not record it."""
    found = [run["results"].get("images") for run in row.runs]
    return mean(found) if all(isinstance(count, int) and count > 0 for count in found) else None
