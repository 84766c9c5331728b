"""Text from outside, read in one place: UTF-8 files, lines, CSV tables, JSON and whole numbers, each error one line."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import orjson

from runtime.retry import read_bytes


class UserError(ValueError):
    """Bad input. Its message is one line that names the flag, file or row, and what was expected."""


# What taking values out of content of another form than was expected raises.
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def counted(count: int, one: str, many: str = "") -> str:
    """A count and its noun, whose plural adds an s where `many` does not say otherwise: "1 image", "3 images"."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def read_text(path: Path, hint: str = "") -> str:
    """The text of a UTF-8 file, with or without a byte-order mark, line ends as they are.

    Args:
        hint: added to the error where there is no such file.

    Raises:
        UserError: no such file, or one in another encoding.
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{hint and f'; {hint}'}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if content[:2] in MARKS or content[:200:2].count(0) + content[1:200:2].count(0) > 50:
        raise UserError(f"{path}: is UTF-16; expected it saved as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path} line {line}: is not UTF-8 (byte 0x{content[error.start]:02x}; perhaps Windows-1252 or Latin-1); "
            "expected it saved as UTF-8"
        ) from None


def read_lines(path: Path, hint: str = "") -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers, without line ends and blanks around them.

    Raises:
        UserError: as `read_text`.
    """
    lines = enumerate(read_text(path, hint).replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_csv(path: Path, columns: Iterable[str], hint: str = "") -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV file by column, with their numbers (the header is row 1; blank lines count for none).

    Args:
        columns: what the file must have; it may have more.
        hint: added to the error where the file or a column is missing.

    Raises:
        UserError: as `read_text`; a column missing or there twice; a row with more or fewer values than the header.
    """
    header, rows = _read_table(path, columns, hint)
    for number, row in rows:
        yield number, dict(zip(header, row))  # noqa: B905  (as long as each other; strict costs a third more)


def read_columns(path: Path, columns: list[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """As `read_csv`, but of two or more columns alone, in their order: for tables of 100,000s of rows."""
    header, rows = _read_table(path, columns)
    values_of = itemgetter(*(header.index(column) for column in columns))
    for number, row in rows:
        yield number, values_of(row)


def _read_table(path: Path, columns: Iterable[str], hint: str = "") -> tuple[list[str], Iterator[tuple[int, list]]]:
    """The header of a CSV file, checked, and its rows by number, which are checked when they are asked for."""
    rows = filter(None, _read_records(path, hint))
    header = next(rows, [])
    missing = [column for column in columns if column not in header]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}; {hint or 'expected ' + ','.join(columns)}")
    doubled = next((name for name in header if header.count(name) > 1), None)
    if doubled is not None:
        raise UserError(f"{path}: column {doubled!r} is there twice; expected each once")
    return header, _check_lengths(path, len(header), rows)


def _read_records(path: Path, hint: str) -> Iterator[list[str]]:
    reader = csv.reader(io.StringIO(read_text(path, hint), newline=""))
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: not a readable CSV file ({error})") from None


def _check_lengths(path: Path, length: int, rows: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    for number, row in enumerate(rows, 2):
        if len(row) != length:
            quotes = '; a text that holds a comma needs "quotes"' if len(row) > length else ""
            raise UserError(
                f"{path} row {number}: {counted(len(row), 'value')}; expected {counted(length, 'value')}{quotes}"
            )
        yield number, row


def parse_json(text: str, where: object) -> Any:
    """What a JSON text holds.

    Raises:
        UserError: it is none; the message begins with `where`.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError as error:  # also a number of thousands of digits
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "a number has too many digits"
        raise UserError(f"{where}: not valid JSON ({reason})") from None


def parse_row(line: bytes) -> dict | None:
    """The object on a line of JSON; None where the line holds none: a killed process leaves half a line.

    Three times as fast as json.loads, with the same result, but for whole numbers of more than 64 bits, which no row
    has: they become floats, and are refused where a whole number is expected.
    """
    try:
        row = orjson.loads(line)
    except ValueError:  # also of what only Python's reader takes: NaN, Infinity, half a surrogate pair
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            return None
    return row if type(row) is dict else None


def parse_whole(text: str) -> int | None:
    """A whole number of 0 or more in up to 18 digits; None for any other text."""
    return int(text) if text.isdecimal() and len(text) <= 18 else None


def same_form(name: str) -> str:
    """A name in the form in which two spellings of one letter (composed, decomposed) are equal."""
    return unicodedata.normalize("NFC", name)
