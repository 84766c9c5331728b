"""Checkpoints that survive a kill: tensors and plain Python; reading one executes nothing."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.cli import UserError, first_line
from runtime.retry import retry


def save_checkpoint(path: Path, state: dict) -> None:
    """Save tensors and plain Python so that a kill at any moment leaves a whole checkpoint.

    The checkpoint before it stays, under `previous_checkpoint(path)`.

    Raises:
        UserError: it cannot be written (a full disk).
    """
    import torch

    beside = path.with_name(f".{path.name}.tmp")

    def write() -> None:
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    try:
        retry(write)
    except (OSError, RuntimeError) as error:  # torch has its own error for a full disk
        beside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({first_line(error)}); the checkpoint before is kept") from None
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
        content = retry(lambda: torch.load(path, map_location=device, weights_only=True))
    except Exception as error:  # torch.load raises a different class for each way in which a file is damaged
        raise UserError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); delete it, or pass --overwrite, to start anew"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; expected a checkpoint, which is a dictionary")
    return content


def remove_previous(path: Path) -> None:
    """Leave the last checkpoint alone."""
    previous_checkpoint(path).unlink(missing_ok=True)
