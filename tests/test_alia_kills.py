"""SIGKILL at moments chosen by chance in each of ALIA's steps: what the same command leaves in the end is the same.

KILLS=20 in the environment kills each step twenty times instead of once. Each run is a fork of this process.
"""

from __future__ import annotations

import importlib
import os
import random
import shutil
import signal
import time

import forks
import pytest
import tiny_editors

KILLS = int(os.environ.get("KILLS", 1))
DATA = ["--dataset", "biased_digits"]
FINAL = {  # what an undisturbed run leaves and a killed one must leave too, bit by bit
    "describe_domains": ["captions.jsonl", "domains.json", "sources.csv"],
    "generate_spectrum": ["shard-*/*.png", "plan.json"],
    "filter_edits": ["edits.csv", "edits.json"],
}


def call(script: str, *flags) -> int:
    return importlib.import_module(script).main([*DATA, *map(str, flags)])


def state(folder) -> dict:
    """Size and time of every file."""
    found = {}
    for path in folder.rglob("*"):
        try:
            found[path] = (path.stat().st_size, path.stat().st_mtime_ns)
        except FileNotFoundError:  # a temporary name that was renamed
            continue
    return found


def contents(script: str, folder) -> dict[str, bytes]:
    paths = [path for pattern in FINAL[script] for path in folder.glob(pattern)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def start(script: str, flags, folder):
    log = folder.parent / "log.txt"
    return forks.start(lambda: call(script, *flags, folder), log), log


def kill_after(script: str, flags, folder, changes: int, pause: float) -> bool:
    """Start a script and kill it `pause` seconds after so many changes of its folder; False if it ended before."""
    process, log = start(script, flags, folder)
    before, seen = state(folder), 0
    while process.exitcode is None and seen < changes:
        time.sleep(0.002)
        now = state(folder)
        seen += sum(before.get(path) != value for path, value in now.items())
        before = now
    code = forks.wait(process, pause)
    assert code in (0, -signal.SIGKILL), log.read_text()[-3000:]
    return code == -signal.SIGKILL


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Hard images, prompts and a small spectrum of the embedded generator, made by the scripts; an editor."""
    root = tmp_path_factory.mktemp("kills")
    hard, prompts = root / "hard.csv", root / "prompts.json"
    assert call("find_hard", "--out", hard) == 0
    lines = hard.read_text().splitlines(keepends=True)
    hard.write_text("".join(lines[:1] + lines[1::12]))  # 25 of the 300
    assert call("write_prompts", "--hard", hard, "--out", prompts) == 0
    tiny_editors.save_pix2pix(root / "editor")
    made = ["--hard", hard, "--prompts", prompts, "--out", root / "edits", "--steps", "4", "--seeds", "2"]
    assert call("generate_spectrum", *made) == 0
    return root


@pytest.mark.slow
@pytest.mark.parametrize("script", FINAL)
def test_a_step_killed_again_and_again_leaves_what_an_undisturbed_one_does(script, inputs, tmp_path):
    hard, prompts = inputs / "hard.csv", inputs / "prompts.json"
    flags = {
        "describe_domains": ["--batch-size", 10, "--out"],
        "generate_spectrum": [
            *("--hard", hard, "--prompts", prompts, "--generator", inputs / "editor", "--levels", 50, "--seeds", 2),
            *("--image-guidance", 1.5, "--steps", 4, "--batch-size", 5, "--out"),
        ],
        "filter_edits": ["--rules", "class", "--prompts", prompts, "--spectrum"],
    }[script]

    def fresh(name: str):
        folder = tmp_path / name
        if script == "filter_edits":
            shutil.copytree(inputs / "edits", folder)
        return folder

    whole = fresh("whole")
    assert call(script, *flags, whole) == 0
    expected = contents(script, whole)
    assert len(expected) >= len(FINAL[script])
    rng, killed, tries = random.Random(0), 0, 0
    while killed < KILLS:
        folder = fresh(f"killed{tries}")
        for _ in range(4):  # each folder is killed a few times, and then finished
            if not kill_after(script, flags, folder, rng.randrange(1, 9), 0.1 * rng.random()):
                break
            killed += 1
        process, log = start(script, flags, folder)
        assert forks.wait(process) == 0, log.read_text()[-3000:]
        assert contents(script, folder) == expected
        assert not list(folder.rglob("*.tmp"))
        tries += 1
        assert tries <= 2 * KILLS + 2, "it ends before it can be killed"
    print(f"{script}: {killed} kills over {tries} folders, {len(expected)} files the same")
