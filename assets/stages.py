"""Training in stages, one model after the other, that a signal stops and the same command resumes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable

import torch
from torch import nn

from runtime import checkpoints, cli, files, runs
from runtime.device import pick_device
from runtime.signals import StopSignals

CHECKPOINT_SECONDS = 300


class Stopped(Exception):
    """A signal or the end of --minutes came; a checkpoint has been written."""


class Work:
    """What every stage needs, and what a checkpoint holds of it.

    Attributes:
        state: settings, seconds so far, the finished stages' weights, the current stage.
        deadline: when --minutes end, in seconds of time.monotonic().
    """

    def __init__(self, args, web, sizes, signals: StopSignals):
        self.web, self.sizes, self.signals = web, sizes, signals
        self.device = pick_device(args.device)
        bf16 = args.precision == "bf16" or (args.precision == "auto" and self.device.startswith("cuda"))
        self.bf16 = bf16
        self.path = args.out / "checkpoint.pt"
        self.deadline = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
        settings = {
            "benchmark": args.benchmark,
            "caption_noise": args.caption_noise,
            "start": files.digest_files(sorted((args.start / "unet").iterdir())) if args.start else None,
            "sizes": json.loads(json.dumps(vars(sizes))),
            "bf16": bf16,
            "noise": "DDPMScheduler",  # older checkpoints, whose generators learnt time backwards, have no such entry
        }
        self.state = {"settings": settings, "seconds": 0.0, "finished": {}, "current": None}
        saved = checkpoints.load_latest_checkpoint(self.path, "cpu")
        if saved:
            runs.stop_on_difference(self.path, saved["settings"], settings, "a new folder")
            self.state = saved
        self.seconds_before, self.began = self.state["seconds"], time.monotonic()
        self.start = args.start
        torch.manual_seed(0)

    def autocast(self) -> torch.autocast:
        """Mixed precision where --precision asks for it; nothing is cached, for a graph could not replay the casts."""
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else "cpu"

    @property
    def seconds(self) -> float:
        """Time spent so far, earlier runs of the command included."""
        return self.seconds_before + time.monotonic() - self.began

    def draws(self) -> dict:
        """The state of every source of random numbers."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.startswith("cuda") else None
        return {"torch": torch.get_rng_state(), "cuda": cuda, "web": self.web.rng.bit_generator.state}

    def restore(self, draws: dict) -> None:
        torch.set_rng_state(draws["torch"].cpu())
        if draws["cuda"] is not None:
            torch.cuda.set_rng_state(draws["cuda"].cpu(), self.device)
        self.web.rng.bit_generator.state = draws["web"]

    def stop_reason(self) -> str | None:
        """The signal that came, or the end of --minutes; None where the work goes on."""
        return self.signals.received or ("the end of --minutes" if time.monotonic() > self.deadline else None)

    def checkpoint(self, step: int, parts: dict) -> None:
        """Write a checkpoint before step `step` of the current stage; `parts` have a state_dict each."""
        self.state["current"] = {"step": step, "draws": self.draws()} | {
            name: part.state_dict() for name, part in parts.items()
        }
        self.save()

    def resume(self, parts: dict) -> int:
        """Load the last checkpoint of `checkpoint` into `parts`, if there is one; gives the next step."""
        current = self.state["current"]
        if not current:
            return 0
        for name, part in parts.items():
            part.load_state_dict(current[name])
        self.restore(current["draws"])
        return current["step"]

    def save(self) -> None:
        self.state["seconds"] = self.seconds
        self.path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.save_checkpoint(self.path, self.state)
        checkpoints.remove_previous(self.path)


class Step:
    """One optimiser step; on a GPU, after some plain ones, it is one CUDA graph: launching kernels took most of it.

    Args:
        loss_of: the loss of a batch. It must not look at values on the host, and shapes must not change.
    """

    PLAIN = 3  # steps before the graph is recorded: libraries choose their algorithms and allocate in them

    def __init__(self, work: Work, model: nn.Module, optimizer, loss_of: Callable[..., torch.Tensor]):
        self.work, self.model, self.optimizer, self.loss_of = work, model, optimizer, loss_of
        self.graph, self.batch, self.loss, self.taken = None, (), None, 0
        self.wanted = work.device.startswith("cuda")

    def compute(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with self.work.autocast():
            loss = self.loss_of(*batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss

    def __call__(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Train on a batch; its loss."""
        self.taken += 1
        if not self.wanted:
            return self.compute(batch)
        if self.taken <= self.PLAIN:  # on the stream of a graph, as recording asks for
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                loss = self.compute(batch).detach()
            torch.cuda.current_stream().wait_stream(stream)
            return loss
        if self.graph is None:
            self.batch = tuple(part.clone() for part in batch)
            self.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.loss = self.compute(self.batch)
            self.graph = graph
        for place, part in zip(self.batch, batch, strict=True):
            place.copy_(part)
        self.graph.replay()
        return self.loss


def build_optimizer(work: Work, model: nn.Module, steps: int, rate: float, weight_decay: float, pct_start: float):
    """AdamW and its one-cycle schedule; on a GPU such that a graph's steps follow the schedule."""
    cuda = work.device.startswith("cuda")
    optimizer = torch.optim.AdamW(
        model.parameters(), torch.tensor(rate, device=work.device) if cuda else rate, weight_decay=weight_decay,
        fused=cuda, capturable=cuda,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        rate,
        total_steps=steps,
        pct_start=pct_start,
        cycle_momentum=not cuda,  # a graph keeps its betas
    )
    return optimizer, schedule


def fit(
    work: Work,
    stage: str,
    model: nn.Module,
    draw: Callable[[int], tuple[torch.Tensor, ...]],
    loss_of: Callable[..., torch.Tensor],
    steps: int,
    rate: float,
    weight_decay: float,
    pct_start: float = 0.3,
    after: Callable[[int], None] | None = None,
    average: nn.Module | None = None,
) -> None:
    """Train `model` (or take its finished weights), with checkpoints on the way.

    Args:
        draw: the batch of step N, tensors on the device.
        loss_of: the loss of such a batch (`Step`).
        after: called after each step.
        average: a moving average of the model that `after` keeps, saved with it.

    Raises:
        Stopped: before the stage was done.
    """
    # Take the finished weights, if there are some.
    held = nn.ModuleDict({"model": model, **({"average": average} if average is not None else {})})
    if stage in work.state["finished"]:
        held.load_state_dict(work.state["finished"][stage]["weights"])
        work.restore(work.state["finished"][stage]["draws"])
        return
    # Take up the last checkpoint, where it is of this stage.
    optimizer, schedule = build_optimizer(work, model, steps, rate, weight_decay, pct_start)
    parts = {"weights": held, "optimizer": optimizer, "schedule": schedule}
    done = work.resume(parts)
    if work.device.startswith("cuda"):  # a checkpoint's rates are on the CPU
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], device=work.device)
    step = Step(work, model, optimizer, loss_of)
    # Train step by step.
    saved = time.monotonic()
    with cli.progress(steps, stage, "step") as bar:
        bar.update(done)
        for number in range(done, steps):
            stop = work.stop_reason()
            if stop or time.monotonic() - saved > CHECKPOINT_SECONDS:
                work.checkpoint(number, parts)
                saved = time.monotonic()
            if stop:
                raise Stopped(f"{stop} came; checkpoint written before step {number} of {steps} of the {stage}")
            loss = step(draw(number))
            schedule.step()
            if after:
                after(number)
            if number % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
    # Keep the finished weights.
    work.state["finished"][stage] = {"weights": held.state_dict(), "draws": work.draws()}
    work.state["current"] = None
    work.save()
