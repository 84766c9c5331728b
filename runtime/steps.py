"""Runs one script after another, as a user would type them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from runtime.cli import UserError

HERE = Path(__file__).resolve().parents[1]  # where the scripts are


def command(script: str, *arguments) -> list[str]:
    """The command line of a script of this project."""
    return [sys.executable, str(HERE / script), *(str(argument) for argument in arguments)]


def run(script: str, *arguments) -> None:
    """Print a command as a user would type it, and run it.

    Raises:
        UserError: the script ended with another exit code than 0.
    """
    print("$", shlex.join(["python", script, *(str(argument) for argument in arguments)]), flush=True)
    code = subprocess.run(command(script, *arguments), check=False).returncode
    if code:
        raise UserError(f"{script} ended with exit code {code}; its message is above")


def make_spectrum(folder: Path, dataset: str, imb_ratio: float | None = None, *generate) -> Path:
    """Steps 1 to 4: hard.csv, prompts.json and a filtered spectrum, in `folder`. What is there already is kept.

    Args:
        generate: further arguments of generate_spectrum.py.

    Returns:
        The spectrum folder.
    """
    data = ("--dataset", dataset) if imb_ratio is None else ("--dataset", dataset, "--imb-ratio", f"{imb_ratio:g}")
    hard, prompts, out = folder / "hard.csv", folder / "prompts.json", folder / "spectrum"
    run("find_hard.py", *data, "--out", hard)
    run("write_prompts.py", "--dataset", dataset, "--hard", hard, "--out", prompts)
    run("generate_spectrum.py", *data, "--hard", hard, "--prompts", prompts, "--out", out, *generate)
    run("filter_clipscore.py", *data, "--spectrum", out, "--prompts", prompts)
    return out
