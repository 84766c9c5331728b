"""Files written whole and read strictly: tables with a header, and rows that are on the disk once they are written."""

from __future__ import annotations

import csv
import gc
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.cli import UserError


def write_csv(path: Path, columns: list[str], rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"{path}: a row has {sorted(row)}; expected {columns}")
            writer.writerow([row[column] for column in columns])
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read_csv(path: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with their line's number in the table (the header is row 1)."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file ({error})") from None
    found = rows[0] if rows else []
    missing = [column for column in columns if column not in found]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}; expected {','.join(columns)}")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(found):
            raise UserError(f"{path} row {number}: expected {len(found)} values")
        yield number, dict(zip(found, row))  # noqa: B905  (as long as each other; strict costs a third more)


class RowWriter:
    """Appends rows to a file of JSON lines, each batch flushed to the disk before the next is begun."""

    def __init__(self, folder: Path, name: str = "metadata.jsonl"):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self.file = path.open("a", encoding="utf-8")
        if torn:  # a killed run left half a line: end it, so that the next row does not join it
            self.file.write("\n")

    def append(self, rows: Iterable[dict]) -> None:
        """Write rows, whose images must already stand under their final names."""
        for row in rows:
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


@contextmanager
def without_garbage_collection():
    """For what reads 100,000s of rows that all stay: looking for garbage among them takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
