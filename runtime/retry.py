"""Reading and writing on network file systems, which fail now and then and work again a moment later."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EREMOTEIO, errno.ENETUNREACH}
TRANSIENT |= {errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH}
PAUSES = (0.2, 1.0, 4.0)  # seconds before the second, third and last try


def retry(act: Callable[[], Any]) -> Any:
    """What `act`, which may be done again, gives; an error that may pass is waited out a few times.

    Raises:
        OSError: the last try's, or at once one that does not pass, as of a file that is not there or a full disk.
    """
    for pause in PAUSES:
        try:
            return act()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
        time.sleep(pause)
    return act()


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        OSError: it cannot be read.
    """
    return retry(path.read_bytes)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, to the disk. Its name is a temporary one: a kill leaves a part of it.

    Raises:
        OSError: it cannot be written.
    """

    def write() -> None:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    retry(write)


def append_bytes(file, content: bytes) -> None:
    """Append to a file that is open unbuffered and that no other process writes, to the disk: all of it or nothing.

    Raises:
        OSError: it cannot be written.
    """
    start = os.fstat(file.fileno()).st_size

    def write() -> None:
        left = memoryview(content)
        while left:
            left = left[os.write(file.fileno(), left) :]
        os.fsync(file.fileno())

    def write_whole() -> None:
        try:
            write()
        except OSError:
            os.ftruncate(file.fileno(), start)  # what was written of it
            raise

    retry(write_whole)
