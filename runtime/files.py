"""Files written whole and read strictly: digests, JSON, tables with a header, and rows that are on the disk once they
are written.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import gc
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runtime.retry import append_bytes, read_bytes, retry, write_bytes
from runtime.text import UserError, parse_json, read_text


def digest_int(*parts: Any) -> int:
    """A whole number below 2^63 that depends on `parts` alone: the same in every process and on every machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def digest_files(paths: list[Path]) -> str:
    """A digest of the contents of files, in the given order: 16 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=8)
    for path in paths:
        state.update(bytes.fromhex(_digest_file(path)))
    return state.hexdigest()


def _digest_file(path: Path) -> str:
    def read() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()

    return retry(read)


def digest_folder(folder: Path, paths: list[Path]) -> str:
    """As `digest_files`, of files below a folder, whose own digests are kept there by size and time of change.

    A generator's weights are read once and not at every start. Where the folder is not to be written to, they are read.
    """
    kept = folder / ".digests"
    try:
        known = dict(json.loads(kept.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    digests, state = {}, hashlib.blake2b(digest_size=8)
    for path in paths:
        name, found = path.relative_to(folder).as_posix(), path.stat()
        stamp = [found.st_size, found.st_mtime_ns]
        if known.get(name, [])[:2] == stamp:
            digests[name] = known[name]
        else:
            digests[name] = [*stamp, _digest_file(path)]
        state.update(bytes.fromhex(digests[name][2]))
    if digests != known:
        with suppress(OSError):
            write_text(kept, json.dumps(digests))
    return state.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file so that at any moment it holds either the old or the new content, whole."""
    write_content(path, text.encode())


def write_content(path: Path, content: bytes) -> None:
    """As `write_text`, of bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_bytes(beside, content)
        beside.replace(path)
    except BaseException:  # a full disk: no temporary file stays
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: missing, or not JSON.
    """
    return parse_json(read_text(path), path)


def read_object(path: Path, *names: str) -> dict:
    """The content of a JSON file that is an object.

    Args:
        names: what it must hold; it may hold more.

    Raises:
        UserError: missing, not JSON, no object, or one of `names` is not in it.
    """
    return check_object(read_json(path), path, names)


def check_object(content: Any, where: object, names: Iterable[str] = ()) -> dict:
    """`content`, where it is an object with all of `names`.

    Raises:
        UserError: it is not; the message begins with `where`.
    """
    missing = [name for name in names if name not in content] if isinstance(content, dict) else list(names)
    if missing or not isinstance(content, dict):
        raise UserError(f"{where}: expected an object" + (f" with {', '.join(missing)}" if missing else ""))
    return content


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a file with one JSON object a line; blank lines count for none.

    Raises:
        UserError: missing, or a line that is no such object (as a killed writer leaves one).
    """
    lines = enumerate(read_text(path).split("\n"), 1)  # not splitlines(): a text may hold other line ends
    numbered = [(f"{path} line {number}", line) for number, line in lines if line.strip()]
    return [check_object(parse_json(line, where), where) for where, line in numbered]


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Remove what processes that were killed while they wrote left beside a file (or all files) of a folder, in which
    no other process may be writing it.
    """
    for left in folder.glob(f".{name}*.tmp"):
        left.unlink(missing_ok=True)


def write_csv(path: Path, columns: list[str], rows: Iterable[dict]) -> None:
    """`write_text` of a CSV file, from a dictionary for each row."""

    def values_of(row: dict) -> list:
        if len(row) != len(columns):
            raise ValueError(f"{path}: a row has {sorted(row)}; expected {columns}")
        return [row[column] for column in columns]

    write_text(path, _format_csv([columns, *map(values_of, rows)]))


def write_texts(path: Path, columns: list[str], rows: Iterable[Sequence[str]]) -> None:
    """As `write_csv`, from a row's texts in the order of `columns`: for tables of 100,000s of rows."""
    rows = [columns, *rows]
    text = "\n".join(map(",".join, rows)) + "\n"
    # A CSV writer takes longer; it is needed where a text holds a mark that has a meaning there.
    commas, lines = (len(columns) - 1) * len(rows), len(rows)
    plain = (text.count(","), text.count("\n"), text.count('"'), text.count("\r")) == (commas, lines, 0, 0)
    write_text(path, text if plain else _format_csv(rows))


def _format_csv(rows: Iterable[Sequence]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_arrays(path: Path, **arrays: Any) -> None:
    """A .npz file of numpy arrays, whole or not at all."""
    import numpy as np

    content = io.BytesIO()
    np.savez(content, **arrays)
    write_content(path, content.getbuffer())


def take_lock(file, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file until it is closed; on a file system without locks (some of Lustre and NFS) only say so.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        print(
            f"{file.name}: no locks on this file system ({error.strerror}): see to it that no other process works here",
            flush=True,
        )


def add_numbered(folder: Path, stem: str, content: bytes) -> bool:
    """Write STEM-00000.csv, or the next number that is free, whole. A content that is there already stays one file.

    Returns:
        False where another process wrote a file with this stem at the same time, with another content: nothing is
        written then.
    """
    there = sorted(folder.glob(f"{stem}-*.csv"))
    if any(read_bytes(other) == content for other in there):
        return True
    tmp, path = folder / f".{stem}.{os.getpid()}.tmp", folder / f"{stem}-{len(there):05d}.csv"
    try:
        write_bytes(tmp, content)
        os.link(tmp, path)  # fails where another process has just taken it
        return True
    except FileExistsError:
        return read_bytes(path) == content
    finally:
        tmp.unlink(missing_ok=True)


class RowWriter:
    """Appends rows to a file of JSON lines, each batch flushed to the disk before the next is begun."""

    def __init__(self, folder: Path, name: str = "metadata.jsonl"):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        torn = path.exists() and path.stat().st_size > 0 and not read_bytes(path).endswith(b"\n")
        self.file = path.open("ab", buffering=0)
        if torn:  # a killed run left half a line: end it, so that the next row does not join it
            append_bytes(self.file, b"\n")

    def append(self, rows: Iterable[dict]) -> None:
        """Write rows, whose images must already have their final names."""
        append_bytes(self.file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())

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
