"""The project's scripts as processes of their own, but forks of the test's process, which has the libraries imported
already: a start costs milliseconds instead of seconds."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

from runtime.signals import end_children

LIMIT = 300  # seconds, after which a process that neither ends nor dies is a fault


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def start(act: Callable[[], int | None], out: Path, err: Path | None = None) -> ForkProcess:
    """Call `act` in a fork with a process group of its own, its output appended to files."""

    def run() -> None:
        os.setsid()
        for number, path in ((1, out), (2, err or out)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        # pytest has put streams of its own there.
        sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
        try:
            raise SystemExit(act() or 0)
        finally:
            end_children()  # which a fork of multiprocessing does not come to by itself

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait(process: ForkProcess, kill_at: float = LIMIT, kill: Callable[[int, int], None] = os.killpg) -> int:
    """The exit code of a fork, or -SIGKILL where it was killed, as by `kill` after so many seconds."""
    end = time.monotonic() + kill_at
    while process.exitcode is None:
        if time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):  # so young that it has no group yet
                kill(process.pid, signal.SIGKILL)
                end = time.monotonic() + LIMIT
        time.sleep(0.002)
    assert kill_at < LIMIT or time.monotonic() < end, "the run did not end"
    return process.exitcode


@functools.cache
def load_libraries() -> None:
    """What the scripts import once they need it, so that forks have it from here."""
    import matplotlib.pyplot  # noqa: F401
    import open_clip  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import timm  # noqa: F401
    from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    from torchvision.transforms import v2  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401


def type_command(folder: Path, script: str, *words) -> Done:
    """What `python SCRIPT WORDS` does in a folder; SCRIPT is a path from the project's root, and runs as __main__."""
    load_libraries()

    def act() -> None:
        os.chdir(folder)
        sys.argv = [str(ROOT / script), *map(str, words)]
        sys.path.insert(0, str((ROOT / script).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")

    out, err = folder / ".out", folder / ".err"
    code = wait(start(act, out, err))
    said = Done(code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))
    out.unlink()
    err.unlink()
    return said


def train_together(act: Callable[[], int | None], folder: Path, processes: int = 2) -> list[Done]:
    """Call `act` in so many forks that are one training run, as torchrun starts them; by rank."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def act_as(rank: int) -> int | None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return act()

    logs = [(folder / f".out{rank}", folder / f".err{rank}") for rank in range(processes)]
    running = [start(lambda rank=rank: act_as(rank), *logs[rank]) for rank in range(processes)]
    codes = [wait(process) for process in running]
    return [Done(code, out.read_text(), err.read_text()) for code, (out, err) in zip(codes, logs, strict=True)]


def gloo_threads() -> list[str]:
    """Threads of torch.distributed that this process still has: at exit they can abort it."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]
