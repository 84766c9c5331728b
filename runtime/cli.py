"""Command lines: what every script's parser has in common, and how a script ends on bad input."""

from __future__ import annotations

import argparse
import errno
import gc
import math
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from runtime.text import UserError, parse_whole, read_lines


def first_line(error: Exception) -> str:
    """What an error says first, of its first 300 characters, or its class where it says nothing."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 300 else f"{line[:300]} ..."


# What an error says where memory ran out and its class does not tell.
NO_MEMORY = ("can't allocate memory", "out of memory")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, the machine's or a device's. torch is not imported for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def out_of_memory(error: Exception) -> UserError:
    """What to say in place of an error that memory ran out."""
    return UserError(f"out of memory ({first_line(error)}); expected a smaller --batch-size, image size or model")


class Parser(argparse.ArgumentParser):
    """argparse, with defaults in the help, no abbreviated flags, and arguments from a file.

    `@recipe.args` reads arguments from a file as a shell would: several to a line, quotes, and comments after `#`. An
    @file in a file is looked for beside that file.
    """

    def __init__(self, doc: str, script: str):
        super().__init__(
            prog=f"{script}.py",
            description=doc,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        self.script = script
        # data set -> "data" or the script -> flag -> value: who adds --dataset sets it
        self.shipped: dict[str, dict[str, dict]] = {}
        self.default_root: Callable[[str], Path | None] = lambda dataset: None  # where a data set lies: as shipped
        self._read: list[tuple[str, Path | None]] = []  # words, and the files that they come from

    def accept_old(self, old: str, flag: str) -> None:
        """Take a flag's old spelling too, which no help shows."""
        self._option_string_actions[old] = self._option_string_actions[flag]

    def error(self, message: str) -> None:
        """Say in one line what is wrong, and in which @file, and leave with exit code 2."""
        named = set(re.split(r"[\s'\":,]+", message.partition("(choose from")[0]))
        typed = {word for word, file in self._read if file is None}
        files = [file for word, file in self._read if file is not None and word in named - typed]
        place = f", in {files[-1]}" if files else ""
        self.exit(2, f"{self.prog}: error: {message}{place} (see --help)\n")

    def typed(self, *options: str) -> list[str]:
        """Those of `options` that the command line gives, itself or in an @file."""
        words = {word.partition("=")[0] for word, _ in self._read}
        return [option for option in options if option in words]

    def expand_files(self, args: list[str]) -> list[str]:
        """Arguments with those of each @file in its place."""
        try:
            self._read = expand_files(args)
        except UserError as error:
            self.error(str(error))
        return [word for word, _ in self._read]

    def parse_args(self, args: list[str] | None = None, namespace=None) -> argparse.Namespace:
        """Parse, after the flags have taken the chosen data set's defaults (so that `--help` shows those)."""
        args = self.expand_files(sys.argv[1:] if args is None else list(args))
        if self.get_default("dataset"):
            chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
            chooser.add_argument("--dataset", default=self.get_default("dataset"))
            try:
                dataset = chooser.parse_known_args(args)[0].dataset
            except argparse.ArgumentError:  # the full parse below meets it again, and says it
                dataset = None
            shipped = self.shipped.get(dataset, {})
            self.set_defaults(**shipped.get("data", {}), **shipped.get(self.script, {}))
        parsed = super().parse_args(args, namespace)
        if getattr(parsed, "data_root", "") is None and self.get_default("dataset"):
            parsed.data_root = self.default_root(parsed.dataset)
        root, out = getattr(parsed, "data_root", None), getattr(parsed, "out", None)
        if root and out and Path(out).resolve() == Path(root).resolve():  # where a message might say to delete it
            self.error(f"--out {out}: is --data-root, the folder of the images; expected another folder")
        return parsed


def expand_files(
    words: list[str], folder: Path = Path(), within: tuple[Path, ...] = ()
) -> list[tuple[str, Path | None]]:
    """The words of a command line, those of each @file in its place.

    Args:
        folder: what the names of @files are relative to.
        within: the files that are being read.

    Returns:
        Pairs of a word and the file that it comes from, None for the command line itself.

    Raises:
        UserError: a file that cannot be read, an open quote in it, or one that includes itself.
    """
    found: list[tuple[str, Path | None]] = []
    for word in words:
        if not word.startswith("@"):
            found.append((word, within[-1] if within else None))
            continue
        path = folder / word[1:]
        includer = f", which {within[-1]} includes" if within else ""
        if path.resolve() in [other.resolve() for other in within]:
            raise UserError(f"{path}: includes itself")
        try:
            inside = [part for _, line in read_lines(path) for part in shlex.split(line, comments=True)]
        except UserError as error:
            raise UserError(f"{error}{includer}") from None
        except ValueError as error:  # an open quote
            raise UserError(f"{path}: {error}") from None
        found += expand_files(inside, path.parent, (*within, path))
    return found


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        """The help with the default as one would type it."""
        default = action.default
        if default is None or default is False or default == [] or isinstance(action, argparse._HelpAction):
            return action.help
        if type(default) in (list, tuple):  # and not a type of a script's own, which prints itself
            words = [str(value) for value in default]
            typed = "x".join(words) if isinstance(default, tuple) else shlex.join(words)  # a tuple is a size
            return f"{action.help} (default: {typed.replace('%', '%%')})"
        return super()._get_help_string(action)


def level(text: str) -> int:
    """A guidance level: whole percent, 0 (text only) to 100 (the real image)."""
    return whole(0, 100)(text)


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """The argparse type of whole numbers from `low` to `high`."""

    def parse(text: str) -> int:
        value = parse_whole(text)
        if value is None or value < low or (high is not None and value > high):
            expected = f"from {low} to {high}" if high is not None else f"of {low} or more"
            raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected a whole number {expected}")
        return value

    return parse


def number(low: float, high: float = float("inf")) -> Callable[[str], float]:
    """The argparse type of numbers from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number from {low:g} to {high:g}")
        return value

    return parse


class Shard(NamedTuple):
    """Which share of the work is this process's: `index` of `count`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def shard(text: str) -> Shard:
    """The argparse type of I/N."""
    index, count = (parse_whole(part) for part in text.partition("/")[::2])
    if index is None or count is None or index >= count:
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N - 1")
    return Shard(index, count)


_paths_checked = True


@contextmanager
def paths_unchecked(unchecked: bool) -> Iterator[None]:
    """Within it, a parser takes files and folders that are not there yet (an earlier job will write them)."""
    global _paths_checked
    before, _paths_checked = _paths_checked, not unchecked
    try:
        yield
    finally:
        _paths_checked = before


def existing_file(text: str) -> Path:
    """The argparse type of a file that must be there."""
    path = Path(text)
    if _paths_checked and not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file")
    return path


def existing_path(text: str) -> Path:
    """The argparse type of a file or folder that must be there."""
    path = Path(text)
    if _paths_checked and not path.exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return path


def existing_folder(text: str) -> Path:
    """The argparse type of a folder that must be there."""
    path = Path(text)
    if _paths_checked and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder")
    return path


def new_folder(text: str) -> Path:
    """The argparse type of a folder that a script writes into, and makes where there is none."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is a file; expected a folder")
    return _writable(path)


def new_file(text: str) -> Path:
    """The argparse type of a file that a script writes."""
    path = Path(text)
    if path.is_dir() or not path.name:
        raise argparse.ArgumentTypeError(f"{text}: is a folder; expected a file")
    return _writable(path)


def _writable(path: Path) -> Path:
    """The path, if it can be written, so that nobody finds out after hours that it cannot."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir() and there != path:
        raise argparse.ArgumentTypeError(f"{path}: {there} is a file; expected a folder")
    if _paths_checked and not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path}: {there} cannot be written; expected another place")
    return path


def add_device_flag(group) -> None:
    """What a model runs on: the --device of every script that has one."""
    group.add_argument(
        "--device", default="auto", help="auto (a GPU of CUDA, else the CPU), cpu, cuda, cuda:N or, untested, mps"
    )


def progress(total: int, what: str, unit: str):
    """A tqdm bar on a terminal; a plain line every half minute where there is none."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True)
    line = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left\n"
    return tqdm(total=total, desc=what, unit=unit, mininterval=30, maxinterval=60, bar_format=line)


def is_full_disk(error: OSError) -> bool:
    """Whether an error says that a disk, or what a user may have of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def report_thread(failed) -> None:
    """What a thread's exception shows: nothing of a full disk, which the main thread is told of and reports."""
    if not (isinstance(failed.exc_value, OSError) and is_full_disk(failed.exc_value)):
        threading.__excepthook__(failed)


def run(main: Callable[[], int]) -> None:
    """Run a script's main and leave with its exit code; bad input is one line and exit code 2."""
    threading.excepthook = report_thread  # TensorBoard writes in one
    # Imports and tables make millions of objects that stay. Python would look for garbage after every 700 new ones,
    # which takes a fifth of a start.
    gc.set_threshold(10_000)
    try:
        code = main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        code = 2
    except OSError as error:  # a full disk, a folder where a file should be, no permission
        if error.strerror is None:
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        then = "; free some space and run the same command again to resume" if is_full_disk(error) else ""
        print(f"{Path(sys.argv[0]).name}: error: {place}{error.strerror}{then}", file=sys.stderr)
        code = 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {out_of_memory(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted; run the same command again to resume", file=sys.stderr)
        code = 130
    raise SystemExit(code)
