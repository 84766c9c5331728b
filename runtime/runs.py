"""Run folders: what was run, with which code, and whether it may be resumed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.cli import UserError
from runtime.files import check_object, read_object, remove_unfinished, take_lock, write_json

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "open_clip_torch", "timm", "numpy", "pillow")
HERE = Path(__file__).resolve().parents[1]  # the project's own folder
COMMIT = "commit.txt"  # in a snapshot of the code, the commit that it was taken of
CLAIM_SECONDS = 10  # the loading processes of a killed run, which hold its lock, find out within five that it is gone
RESUMABLE = 75  # exit code of a script that a signal stopped ("try again" in sysexits.h): the same command resumes
# Arguments that may differ when a run is taken up again: they change where and how fast it runs, not its result.
FREE = ("out", "overwrite", "device", "workers", "data_root", "checkpoint_every", "cuda_graph")
# Entries of args.json that only the tests after the last epoch depend on.
TESTED = {"inputs.data", "splits.test", "splits.id_test"}


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
        for _ in range(CLAIM_SECONDS):
            try:
                take_lock(file)
                break
            except BlockingIOError:
                time.sleep(1)
        else:
            raise UserError(f"{folder}: another process is at work there; wait for it, or take another --out")
        remove_unfinished(folder)
        yield


def open_run(folder: Path, args: Namespace, inputs: dict, splits: dict[str, str], overwrite: bool) -> bool:
    """Make a run folder ready: new, to be resumed, or complete.

    args.json records the effective arguments, the digests of the inputs and splits, and versions. Where it exists
    already, they must be the same, but for the test images of a run that is not complete: they change no training.

    Args:
        splits: each split's images in words; a folder of an older version has none, and is compared by its inputs.

    Returns:
        True where the folder already holds results.json: there is nothing left to do.

    Raises:
        UserError: the folder holds a run with other arguments or inputs.
    """
    path, results = folder / "args.json", folder / "results.json"
    wanted = {"args": effective_arguments(args), "inputs": inputs, "splits": splits}
    if overwrite:
        for name in ("args.json", "checkpoint.pt", "checkpoint.previous.pt", "results.json", "predictions.npz"):
            (folder / name).unlink(missing_ok=True)
        for events in folder.glob("events.out.tfevents.*"):
            events.unlink()
    if not path.exists():
        write_json(path, wanted | {"environment": environment()})
        return results.exists()
    content, way_out = read_object(path), "--overwrite"
    found = {name: content.get(name) for name in wanted}
    if found["splits"] is None:
        found["splits"] = splits
    elif (different := differences(found, wanted)) and different.keys() <= TESTED:
        if not results.exists():
            said = [f"{name} was {old}, is {new}" for name, (old, new) in different.items()]
            print(f"{folder}: resuming with other test data, all else is the same: {'; '.join(said)}", flush=True)
            write_json(path, content | wanted)
            return False
        way_out += f"; to test its weights on these images, delete {results}"
    stop_on_difference(path, found, wanted, way_out)
    return results.exists()


def stop_on_other_arguments(args: Namespace) -> None:
    """Raise UserError where the run in `args.out` has other arguments: `open_run` comes after minutes of reading."""
    path = args.out / "args.json"
    if path.exists() and not args.overwrite:
        found = {"args": read_object(path).get("args")}
        stop_on_difference(path, found, {"args": effective_arguments(args)}, "--overwrite")


def read_arguments(folder: Path, *names: str) -> dict:
    """The effective arguments of a run folder, by its args.json.

    Args:
        names: what must be among them; a run of train_lt.py has it.

    Raises:
        UserError: no run folder, or one that lacks one of `names`.
    """
    path = folder / "args.json"
    found = check_object(read_object(path, "args")["args"], f"{path}: args")
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{path}: its args have no {', '.join(missing)}; expected a run of train_lt.py")
    return found


def effective_arguments(args: Namespace) -> dict:
    """Arguments as args.json has them, without the ones that only change where and how fast a run goes."""
    return {name: _portable(value) for name, value in vars(args).items() if name not in FREE}


def _portable(value: Any) -> Any:
    """An argument as args.json has it: a path as text, one below the project's own folder relative to that."""
    return str(value).removeprefix(f"{HERE}{os.sep}") if isinstance(value, str | Path) else value


def differences(found: dict, wanted: dict) -> dict[str, tuple]:
    """What differs between two contents of a JSON file: name, or NAME.NAME -> (value of `found`, of `wanted`)."""

    def flat(content: dict, prefix: str = "") -> dict:
        items: dict = {}
        for name, value in content.items():
            items |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return items

    found, wanted = flat(found), flat(json.loads(json.dumps(wanted)))
    return {
        name: (found.get(name), wanted.get(name))
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    }


def stop_on_other(path: Path, wanted: dict, way_out: str) -> None:
    """Raise UserError, naming each difference, where a file is there and holds other values than this command's."""
    if path.exists():
        stop_on_difference(path, read_object(path), wanted, way_out)


def stop_on_difference(path: Path, found: dict, wanted: dict, way_out: str) -> None:
    """Raise UserError, naming each difference, where `path` holds other values than this command asks for."""
    different = [f"{name} is {old!r} there, {new!r} here" for name, (old, new) in differences(found, wanted).items()]
    if different:
        raise UserError(
            f"{path} was written by a run with other settings: {'; '.join(different)}. "
            f"Expected the same, another --out, or {way_out}"
        )
