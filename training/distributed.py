"""Several processes on one training run, as `torchrun` starts them; or one, where it does not."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

from runtime.cli import UserError, first_line, is_out_of_memory, out_of_memory


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device: str) -> str:
    """Join the other processes, where torchrun started several.

    Args:
        device: what --device says.

    Returns:
        The same, or with several processes the device of this one: with CUDA one for each process of a machine.

    Raises:
        UserError: --device names one device for several processes.
    """
    if world() == 1:
        return device
    if device.startswith(("cuda:", "mps")):
        raise UserError(f"--device {device}: expected cuda or auto with torchrun, which gives each process a device")
    import torch

    from runtime.device import pick_device

    device = pick_device(device)
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    # The functions of torch.distributed.nn, which DistributedDataParallel imports, have the group of all processes as
    # their default. Imported after the group is made they would keep it, and gloo's threads with it, to the
    # interpreter's end, which those can abort.
    import torch.distributed.nn

    torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    return device


def stop() -> None:
    """Leave the other processes. No wrapped model may be in use any more: it holds the group, and gloo's threads."""
    import torch

    if world() > 1:
        gc.collect()  # a model in a cycle of references holds it too
        torch.distributed.destroy_process_group()


@contextmanager
def first_process_first(device: str) -> Iterator[None]:
    """The first process goes through the block, and then the others do, which find there what it wrote.

    Raises:
        UserError: in the others, where the first has failed.
    """
    if rank() > 0 and any_of(False, device):
        raise UserError("the first process has stopped, and says why")
    try:
        yield
    except BaseException:
        if rank() == 0:
            any_of(True, device)
        raise
    if rank() == 0:
        any_of(False, device)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Say in one line that memory ran out, or that another process of the run has stopped.

    Raises:
        UserError: in place of torch's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        import torch

        if is_out_of_memory(error):
            raise out_of_memory(error) from None
        if world() > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise UserError(f"another process of this run has stopped, and says why ({first_line(error)})") from None
        raise


def synchronised(model, device: str):
    """The model with BatchNorm statistics over the whole batch, where it is on GPUs.

    On the CPU torch has no such layer: there each process normalises by its own share of the batch.
    """
    import torch

    return model if world() == 1 or device == "cpu" else torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)


def wrap(model, device: str):
    """The model whose gradients are averaged over the processes."""
    import torch

    if world() == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=None if device == "cpu" else [device])


def share(count: int) -> slice:
    """Which of the `count` images of a batch are this process's: each gets every world-th.

    A batch of fewer images than processes goes to all of them whole, as does every batch of a single process.
    """
    return slice(None) if world() == 1 or count < world() else slice(rank(), None, world())


def any_of(flag: bool, device: str) -> bool:
    """Whether the flag is set in any process. All must ask together."""
    import torch

    if world() == 1:
        return flag
    found = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found)


def total(value, device: str):
    """The sum of a tensor over all processes."""
    import torch

    if world() > 1:
        value = value.to(device)
        torch.distributed.all_reduce(value)
    return value


def gathered(value, rows: slice, count: int):
    """A batch's vectors, (count, ...), from each process's `rows` of them, for a loss of the whole batch.

    Each process has to compute that same loss. The gradient that reaches its own rows is then `world()` times the
    loss's, so that after the mean over the processes the weights have the loss's gradient, as those have that stand
    behind no gathering (a logit scale).
    """
    import torch

    if rows == slice(None):
        return value

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, own):
            whole = own.new_zeros(count, *own.shape[1:])
            whole[rows] = own
            torch.distributed.all_reduce(whole)
            return whole

        @staticmethod
        def backward(ctx, gradient):
            return world() * gradient[rows]

    return Gather.apply(value)


def same_buffers(model) -> None:
    """Give every process the first one's BatchNorm statistics."""
    import torch

    if world() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
