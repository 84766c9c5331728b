"""The device to compute on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from runtime.cli import UserError, first_line

if TYPE_CHECKING:
    import torch


def pick_device(name: str) -> str:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` means on this machine.

    Raises:
        UserError: no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here: {first_line(error)}") from error
    return name


def check_bfloat16(precision: str, device: str) -> None:
    """Raise UserError where `precision` is bf16 and the card has no bfloat16 (compute capability below 8)."""
    import torch

    if precision == "bf16" and device.startswith("cuda") and torch.cuda.get_device_capability(device)[0] < 8:
        raise UserError(f"--precision bf16: {torch.cuda.get_device_name(device)} has no bfloat16; expected fp32")


def read_later(value: torch.Tensor) -> Callable[[], float]:
    """A number on the device, to be read by a later call: the copy is asked for now, and the device goes on working."""
    import torch

    copy = value.detach().to("cpu", non_blocking=True)
    copied = torch.cuda.Event() if value.is_cuda else None
    if copied:
        copied.record(torch.cuda.current_stream(value.device))

    def read() -> float:
        if copied:
            copied.synchronize()
        return copy.item()

    return read
