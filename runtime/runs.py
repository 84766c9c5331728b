"""Run folders: what was run, checkpoints that survive a kill, and results."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.cli import UserError

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "open_clip_torch", "timm", "numpy", "pillow")
HERE = Path(__file__).resolve().parents[1]  # the project's own folder
COMMIT = "commit.txt"  # in a snapshot of the code, the commit that it was taken of
RESUMABLE = 75  # exit code of a script that a signal stopped ("try again" in sysexits.h): the same command goes on
# Arguments that may differ when a run is taken up again: they change where and how fast it runs, not its result.
FREE = ("out", "overwrite", "device", "workers", "data_root")


def digest_int(*parts: Any) -> int:
    """A whole number below 2^63 that depends on `parts` alone: the same in every process and on every machine."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def digest_files(paths: list[Path]) -> str:
    """A digest of the contents of files, in the given order: 16 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=8)
    for path in paths:
        with path.open("rb") as file:
            state.update(hashlib.file_digest(file, "blake2b").digest())
    return state.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file so that at any moment either the old or the new content stands there, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def write_json(path: Path, content: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: missing, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_json_lines(path: Path) -> list[Any]:
    """The content of a file with one JSON value a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def save_checkpoint(path: Path, state: dict) -> None:
    """Save tensors and plain Python so that a kill at any moment leaves a whole checkpoint.

    The checkpoint before it stays, under `previous_checkpoint(path)`.
    """
    import torch

    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        path.replace(previous_checkpoint(path))
    beside.replace(path)


def previous_checkpoint(path: Path) -> Path:
    """Where `save_checkpoint` leaves the checkpoint before the last."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_latest_checkpoint(path: Path, device: str) -> dict | None:
    """The last checkpoint that can be read: that at `path`, else, saying so, the previous one. None if there is none.

    Raises:
        UserError: there are checkpoints, but none can be read.
    """
    previous = previous_checkpoint(path)
    if path.exists():
        try:
            return load_checkpoint(path, device)
        except UserError as error:
            if not previous.exists():
                raise
            print(f"{error}; going on from the previous one, {previous.name}", flush=True)
    return load_checkpoint(previous, device) if previous.exists() else None


def load_checkpoint(path: Path, device: str) -> dict:
    """What `save_checkpoint` saved. Nothing in the file is executed.

    Raises:
        UserError: the file cannot be read.
    """
    import torch

    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises a different class for each way in which a file is damaged
        raise UserError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); delete it, or pass --overwrite, to start anew"
        ) from error


class StopSignals:
    """While it is entered, SIGTERM and SIGUSR2 (what Slurm sends before it takes a machine away) are only noted.

    A loop looks at `received` between two batches, so no signal can cut a step or the writing of a file short.
    """

    def __init__(self):
        self.received: str | None = None

    def __enter__(self) -> StopSignals:
        # Only the main thread may handle signals; a script that runs in another one is not the one they are meant for.
        numbers = (signal.SIGTERM, signal.SIGUSR2) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.received = signal.Signals(number).name


def leave_signals(worker: int = 0) -> None:
    """For a DataLoader's `worker_init_fn`: StopSignals' signals, which a whole process group may get, are for the main
    process; a worker that one of them ends would end it too, in the middle of a step.
    """
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def commit() -> str:
    """The commit of this code, marked where the checkout differs from it; in a job's snapshot that of the snapshot."""
    if (HERE / COMMIT).is_file():
        return (HERE / COMMIT).read_text(encoding="utf-8").strip()
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        found = ""
    return found or "unknown"


def environment() -> dict:
    """Versions, machine and code that a result depends on."""
    return {
        "python": platform.python_version(),
        "commit": commit(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold a run folder, so that no other process trains there at the same time.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is at work there; wait for it, or take another --out") from None
        yield


def open_run(folder: Path, args: Namespace, inputs: dict, overwrite: bool) -> bool:
    """Make a run folder ready: new, to be resumed, or complete.

    args.json records the effective arguments, the digests of the inputs, and versions. Where it already stands, the
    arguments and inputs must be the same.

    Returns:
        True where the folder already holds results.json: there is nothing left to do.

    Raises:
        UserError: the folder holds a run with other arguments or inputs.
    """
    path = folder / "args.json"
    wanted = {"args": effective_arguments(args), "inputs": inputs}
    if overwrite:
        for name in ("args.json", "checkpoint.pt", "checkpoint.previous.pt", "results.json", "predictions.npz"):
            (folder / name).unlink(missing_ok=True)
        for events in folder.glob("events.out.tfevents.*"):
            events.unlink()
    if path.exists():
        stop_on_difference(path, {name: read_json(path).get(name) for name in wanted}, wanted, "--overwrite")
    else:
        write_json(path, wanted | {"environment": environment()})
    return (folder / "results.json").exists()


def effective_arguments(args: Namespace) -> dict:
    """Arguments as args.json has them, without those that change where and how fast a run goes."""
    return {name: _portable(value) for name, value in vars(args).items() if name not in FREE}


def _portable(value: Any) -> Any:
    """An argument as args.json has it: a path as text, one below the project's own folder relative to that."""
    return str(value).removeprefix(f"{HERE}{os.sep}") if isinstance(value, str | Path) else value


def stop_on_difference(path: Path, found: dict, wanted: dict, way_out: str) -> None:
    """Raise UserError, naming each difference, where what stands in `path` is not what this command asks for."""

    def flat(content: dict, prefix: str = "") -> dict:
        items: dict = {}
        for name, value in content.items():
            items |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return items

    found, wanted = flat(found), flat(json.loads(json.dumps(wanted)))
    different = [
        f"{name} is {found.get(name)!r} there, {wanted.get(name)!r} here"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if different:
        raise UserError(
            f"{path} was written by a run with other settings: {'; '.join(different)}. "
            f"Expected the same, another --out, or {way_out}"
        )
