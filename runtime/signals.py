"""Signals: what Slurm sends before it takes a machine away, and what ends loading processes."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import multiprocessing.util  # its own handler at exit, which waits, is registered here: before ours, so run after it
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def hold_signals() -> Iterator[None]:
    """Within it StopSignals' signals and Ctrl-C wait, and processes that are started within it never see them.

    A DataLoader's worker that is ended between its start and `begin_worker` would end the main process too.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR2))
    # Ctrl-C reaches Python by any thread, whatever this one blocks.
    in_main, noted = threading.current_thread() is threading.main_thread(), []
    handler = signal.signal(signal.SIGINT, lambda *_: noted.append(True)) if in_main else None
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if noted:
            signal.raise_signal(signal.SIGINT)


def begin_worker(worker: int = 0) -> None:
    """For a DataLoader's `worker_init_fn`: what a whole process group may get is for the main process; a worker that
    such a signal ends would end it too, in the middle of a step. And a worker looks for no garbage among what it shares
    with the main process: each object that is looked at would be copied.
    """
    gc.freeze()
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_children() -> None:
    """Kill the processes that this one started and still has, before the interpreter waits for them.

    After an error a DataLoader's workers are still there, and their signals are left to the main process
    (`begin_worker`): the interpreter, which sends SIGTERM and waits, would wait for ever.
    """
    for child in multiprocessing.active_children():
        child.kill()
