"""edits.csv: which edits filter_edits.py keeps, and the findings of its rules.

`kept` is the verdict of all rules together, `dropped_by` names each rule that would drop the edit, so that training can
apply some of them alone.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

import numpy as np

from runtime.cli import UserError
from runtime.files import read_json, write_text
from runtime.text import read_text

EDITS = "edits.csv"
FINDINGS = ("semantic", "clip_class", "predicted", "confidence", "threshold")  # empty where their rule is not in use
COLUMNS = ["file_name", "domain", *FINDINGS, "kept", "reason", "dropped_by"]
SHOWN = 20  # classes without a kept edit that are named


def write_edits(path: Path, columns: dict[str, list]) -> None:
    """Write edits.csv from its columns; those of FINDINGS that are not given are empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    empty = [""] * len(columns["file_name"])
    table.writerows(zip(*(columns.get(name, empty) for name in COLUMNS), strict=True))
    write_text(path, text.getvalue())


def read_edits(path: Path) -> dict[str, dict[str, str]]:
    """The rows of edits.csv by file name.

    Raises:
        UserError: missing, not such a table, or a file that is there twice.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path, "run filter_edits.py"), newline=""), restval=""))
    except csv.Error as error:
        raise UserError(f"{path}: not a readable CSV file ({error})") from None
    found: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows, 2):
        if not set(COLUMNS) <= row.keys() or row["kept"] not in ("0", "1"):
            raise UserError(f"{path} row {number}: expected the columns {','.join(COLUMNS)}, and kept 0 or 1")
        if row["file_name"] in found:
            raise UserError(f"{path} row {number}: {row['file_name']} is there twice; expected one row a file")
        found[row["file_name"]] = row
    return found


def kept_edits(folder: Path, rules: list[str] | None = None) -> set[str] | None:
    """The files that edits.csv of a spectrum folder keeps; None where nothing was filtered.

    Args:
        rules: the rules to apply; None for the verdict of all that were run, `none` for no rule at all.

    Raises:
        UserError: a rule that filter_edits.py was not run with.
    """
    path = folder / EDITS
    if rules == ["none"] or (rules is None and not path.is_file()):
        return None
    found = read_edits(path)
    if rules is None:
        return {name for name, row in found.items() if row["kept"] == "1"}
    known = read_json(folder / "edits.json")["rules"]
    for rule in rules:
        if rule not in known:
            raise UserError(f"--edit-rules {rule}: {path} was made by {' '.join(known)}; run filter_edits.py with it")
    return {name for name, row in found.items() if not set(row["dropped_by"].split()) & set(rules)}


def format_table(rows: list[dict], domains: list[str], reasons: np.ndarray) -> list[str]:
    """Lines that say how many edits were made, kept, and dropped for each reason, by domain and over all; then the
    classes that kept none.

    Args:
        domains: of each edit, empty where it has none.
        reasons: of each edit, object (N,), empty where it is kept.
    """
    kinds = sorted(set(reasons.tolist()) - {""})
    lines = ["  ".join(["domain".ljust(30), "made".rjust(6), "kept".rjust(6), *(kind.rjust(16) for kind in kinds)])]
    for name in [*dict.fromkeys(domains), "all"]:
        inside = reasons[[name in ("all", domain) for domain in domains]]
        dropped = [f"{np.sum(inside == kind):16}" for kind in kinds]
        cells = [f"{len(inside):6}", f"{np.sum(inside == ''):6}", *dropped]
        lines.append("  ".join([(name or "-")[:30].ljust(30), *cells]))
    made, kept = Counter(), Counter()
    for row, reason in zip(rows, reasons, strict=True):
        made[row["label"], row["class_name"]] += 1
        kept[row["label"], row["class_name"]] += reason == ""
    gone = [name for label, name in made if not kept[label, name]]
    return lines + [
        f"class {name}: all of its edits were dropped; it is trained on real images alone" for name in gone[:SHOWN]
    ]
