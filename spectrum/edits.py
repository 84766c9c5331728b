"""edits.csv: which edits filter_edits.py keeps, and what each of its rules found.

`kept` is the verdict of all rules together, `dropped_by` names each rule that would drop the edit, so that training can
apply some of them alone.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from runtime.cli import UserError
from runtime.files import read_json, write_text

EDITS = "edits.csv"
COLUMNS = [
    "file_name", "domain", "semantic", "clip_class", "predicted", "confidence", "threshold", "kept", "reason",
    "dropped_by",
]  # fmt: skip


def write_edits(path: Path, rows: Iterable[dict]) -> None:
    """Write edits.csv from dictionaries with COLUMNS."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def read_edits(path: Path) -> dict[str, dict[str, str]]:
    """The rows of edits.csv by file name.

    Raises:
        UserError: missing, not such a table, or a file that is there twice.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, restval=""))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run filter_edits.py") from None
    except (UnicodeDecodeError, csv.Error) as error:
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
