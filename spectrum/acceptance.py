"""Which synthetic images are kept (`decide_kept` has the rule), and how many: by class, level and class group."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from operator import itemgetter

import numpy as np

SHOWN = 20  # classes that a table lists one by one


def no_score(reason: str) -> dict:
    """The entry of an image that has no score."""
    return {"text_score": math.nan, "image_score": math.nan, "kept": False, "reason": reason}


def decide_kept(
    rows: list[dict],
    scores: dict[str, dict],
    threshold: float | None,
    keep_share: float | None = None,
    per: str = "all",
) -> None:
    """Set `kept` and `reason` of every scored row, in place.

    Args:
        threshold: keep text scores from here up; not looked at where there is a `keep_share`.
        keep_share: keep the best of each group, share times its scored images, rounded up.
        per: what a group is: `class-level`, `level` or `all`.
    """
    groups = defaultdict(list)
    for row in rows:
        entry = scores.get(row["file_name"])
        if entry is None or math.isnan(entry["text_score"]):
            continue
        if keep_share is None:
            entry["kept"] = entry["text_score"] >= threshold
            entry["reason"] = "" if entry["kept"] else "low text score"
        else:
            group = {"class-level": (row["label"], row["level"]), "level": row["level"], "all": None}[per]
            groups[group].append((-entry["text_score"], row["file_name"]))
    for group in groups.values():
        most = math.ceil(keep_share * len(group) - 1e-9)  # the small number keeps 0.1 * 30 at 3
        for place, (_, name) in enumerate(sorted(group)):
            scores[name]["kept"] = place < most
            scores[name]["reason"] = "" if place < most else "outside the kept share"


def count_kept(rows: list[dict], scores: dict[str, dict]) -> tuple[Counter, Counter]:
    """Images made and kept, by (label, level)."""
    place_of = itemgetter("label", "level")
    made = Counter(map(place_of, rows))
    kept = Counter(place_of(row) for row in rows if scores[row["file_name"]]["kept"])
    return made, kept


def tabulate(
    made: Counter, kept: Counter, names: dict[int, str], groups: dict[int, str], shown: int = SHOWN
) -> tuple[list[str], list[int], np.ndarray, np.ndarray]:
    """The acceptance table: a row for each class (where they are few), for each class group, and for all.

    Args:
        made: images by (label, level); `kept` likewise.
        names: class name by label.
        groups: many, medium or few, by label.
        shown: classes that are listed one by one, at most; of more there are the groups alone.

    Returns:
        The rows' names, the levels, and images made and kept: int (rows, levels).
    """
    levels = sorted({level for _, level in made})
    lines = {names[label]: [label] for label in sorted(names)} if len(names) <= shown else {}
    if len(set(names.values())) < len(names):  # names may repeat: tell the classes apart by index
        lines = {f"{names[label]} ({label})": [label] for label in sorted(names)} if lines else {}
    for group in ("many", "medium", "few"):
        inside = [label for label in names if groups.get(label) == group]
        lines |= {f"all {group}-shot": inside} if inside else {}
    lines["all"] = list(names)
    tables = (
        np.array([[sum(table[label, level] for label in labels) for level in levels] for labels in lines.values()])
        for table in (made, kept)
    )
    return list(lines), levels, *tables


def format_table(names: list[str], levels: list[int], made: np.ndarray, kept: np.ndarray) -> str:
    """The acceptance table as text: kept of made images, and the share over all levels."""
    width = max(len("class"), *(len(name) for name in names))
    lines = ["  ".join(["class".ljust(width), *(f"level {level:>3}".rjust(13) for level in levels), "all levels"])]
    for name, of, some in zip(names, made, kept, strict=True):
        cells = (f"{k}/{m}".rjust(13) for k, m in zip(some, of, strict=True))
        lines.append("  ".join([name.ljust(width), *cells, f"{some.sum() / max(1, of.sum()):10.1%}"]))
    return "\n".join(lines)


def paper_line(published: tuple[int, int] | None, made: int, kept: int) -> str:
    """Ours beside the acceptance that DisCL reports, as (made, kept); empty where it reports none."""
    if published is None:
        return ""
    theirs, accepted = published
    return (
        f"DisCL reports {accepted / theirs:.1%} on this data set ({accepted:,} of {theirs:,}); "
        f"here it is {kept / made:.1%} ({kept:,} of {made:,})"
    )
