"""The device to compute on."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from runtime.cli import UserError, first_line, is_out_of_memory

if TYPE_CHECKING:
    import torch


# Of glibc's malloc.h: blocks from so many bytes up are asked for one by one; free memory beyond is given back.
MMAP_THRESHOLD, KEPT_BLOCK = -3, 2**28
TRIM_THRESHOLD, KEPT_MEMORY = -1, 2**30


def count_cores() -> int:
    """The cores that this process may use: Slurm and taskset leave it some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_device(name: str) -> str:
    """The device that `auto`, `cpu`, `cuda`, `cuda:N` or `mps` means on this machine.

    On a Mac's GPU (mps) everything computes in float32, without pinned memory, CUDA graphs or streams. Nothing here was
    ever run on one, and `auto` does not take it. For a CPU, freed memory is kept from here on (`keep_freed_memory`).

    Raises:
        UserError: no such device here.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        keep_freed_memory()
        return name
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: cannot be used here: no Mac with a GPU that torch knows")
        _say_untested()
        return name
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here: {first_line(error)}") from error
    return name


@cache
def keep_freed_memory() -> None:
    """Have the C library keep what tensors free for the next ones, up to a gigabyte, where it is glibc.

    Else each large tensor's memory goes back to the system, and is asked for and cleared anew, page by page: half of
    the time of turning a batch of photographs into floats, and a twentieth of a step of ResNet-32.
    """
    try:
        adjust = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    adjust(MMAP_THRESHOLD, KEPT_BLOCK)
    adjust(TRIM_THRESHOLD, KEPT_MEMORY)


@cache
def _say_untested() -> None:
    print("--device mps: accepted, but never tested: look whether results are those of --device cpu", flush=True)


def check_bfloat16(precision: str, device: str) -> None:
    """Raise UserError where `precision` is bf16 and the card has no bfloat16 (compute capability below 8), or is a
    Mac's."""
    import torch

    if precision == "bf16" and device == "mps":
        raise UserError("--precision bf16: not on --device mps; expected fp32")
    if precision == "bf16" and device.startswith("cuda") and torch.cuda.get_device_capability(device)[0] < 8:
        raise UserError(f"--precision bf16: {torch.cuda.get_device_name(device)} has no bfloat16; expected fp32")


class Fitting:
    """How many images a model is shown at once, as many as fit into memory: found out by halving, and remembered."""

    def __init__(self):
        self.most = math.inf

    def run(self, count: int, compute: Callable[[slice], torch.Tensor]) -> list:
        """What `compute` gives of `count` images, part by part, in their order.

        Raises:
            UserError: not even one image fits.
        """
        parts, start = [], 0
        while start < count:
            most = int(min(count - start, self.most))
            try:
                parts.append(compute(slice(start, start + most)))
                start += most
                continue
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if most == 1:
                    raise UserError(
                        f"--device: one image does not fit into memory beside the model ({first_line(error)}); "
                        "expected a smaller model, or another device"
                    ) from None
            # Not within the except clause, whose exception holds what has to be freed.
            free_memory()
            self.most = most // 2
            print(f"{most} images do not fit into memory: {self.most} at once", flush=True)
        return parts


def free_memory() -> None:
    """Give back what torch holds of a device's memory for later."""
    import torch

    torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def sum_type(device: str) -> torch.dtype:
    """The number type that losses are summed in: float64, which a Mac's GPU has not."""
    import torch

    return torch.float32 if device == "mps" else torch.float64


def read_later(value: torch.Tensor) -> Callable[[], float]:
    """A number on the device, to be read by a later call: the copy is asked for now, and the device goes on working."""
    import torch

    copy = value.detach().to("cpu", non_blocking=value.is_cuda)
    copied = torch.cuda.Event() if value.is_cuda else None
    if copied:
        copied.record(torch.cuda.current_stream(value.device))

    def read() -> float:
        if copied:
            copied.synchronize()
        return copy.item()

    return read
