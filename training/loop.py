"""What every trainer does: passes over images, step by step.

A script names its own loss and metrics in a subclass of `Trainer`. Beside it: epochs.py (a run's epochs, checkpoints
and results), graphs.py (a step as one CUDA graph), flags.py, pool.py (the images), log.py (TensorBoard).

A step never makes the host wait for the device: what a pass needs is drawn and copied before its first step, losses are
added up on the device, and tests/test_steps.py holds it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from curricula import REAL
from loaders.base import DataSet
from runtime import cli, files
from runtime.device import read_later, sum_type
from runtime.signals import StopSignals
from training import distributed, log, optimization
from training.pool import Pool

LOOK_EVERY = 50  # steps after which the sum of the losses is looked at


class Stopped(Exception):
    """A signal came. `state` is what a pass needs to resume with its next batch; empty outside of a pass.

    `saved` says, for the user, what was written.
    """

    def __init__(self, state: dict | None = None, saved: str = ""):
        super().__init__()
        self.state, self.saved = state or {}, saved


@dataclass
class Pass:
    """One pass over images: an epoch's, or adaptive's over real ones.

    Attributes:
        epoch: from 0.
        purpose: `epoch` or `real pass`.
        places: of the images in the pool, before shuffling, int (N,).
        labels: in the order in which the pass takes the images, int64 (N,), on the device.
        synthetic: in that order too, bool (N,), on the device.
        unreadable: places of this process's images that could not be read so far.
    """

    epoch: int
    purpose: str
    places: np.ndarray
    labels: object
    synthetic: object
    unreadable: list[int] = field(default_factory=list)


@dataclass
class Batch:
    """A batch of a pass, of whose images this process has some rows.

    Attributes:
        of: the pass.
        numbers: of the whole batch's images in the pass, int64 (n,), on the CPU.
        rows: which of them are this process's.
        images: of those rows, uint8 (m, 3, H, W), on the device.
        labels: of the whole batch, int64 (n,), on the device.
        synthetic: of the whole batch, bool (n,), on the device.
        generator: on the CPU, for what a trainer draws for the whole batch within its step.
        draws: what was drawn for the whole batch before the pass (`Trainer.draw`), (..., n) each, on the device.
        constants: of the pass (`Trainer.constants`), on the device.
    """

    of: Pass
    numbers: object
    rows: slice
    images: object
    labels: object
    synthetic: object
    generator: object
    draws: dict[str, object] = field(default_factory=dict)
    constants: dict[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        """Images of the whole batch."""
        return len(self.numbers)

    @property
    def own_places(self) -> np.ndarray:
        """Places in the pool of this process's images, int (m,)."""
        return self.of.places[self.numbers[self.rows].numpy()]


@dataclass
class Trainer:
    """What a pass over images needs: the model in its three forms, its optimiser, and the images.

    A script subclasses it and defines `batch_loss`, `epoch_places`, `predict`, `validate` and `finish`.

    Attributes:
        levels: the levels that the curriculum may ask for.
        model: the module itself, whose weights are saved and evaluated.
        step_model: the same module, compiled and wrapped as the flags say.
        average: the moving average of the weights, or None.
    """

    args: object
    data: DataSet
    levels: list[int]
    pool: Pool
    model: object
    step_model: object
    average: object
    optimizer: object
    device: str
    signals: StopSignals

    chosen_by = "macro"  # the figure of `validate` that the best epoch is chosen by
    softmax_scale = 1.0  # what logits are multiplied by to give probabilities
    step_graph = None  # takes a step as `update` does (graphs.StepGraph), where a script wants one

    @property
    def evaluated(self):
        """The model whose accuracies are reported."""
        return self.average.module if self.average else self.model

    # What a script defines.

    def batch_loss(self, batch: Batch):
        """The loss of a batch, a scalar whose gradient, averaged over the processes, is the whole batch's."""
        raise NotImplementedError

    def epoch_places(self, epoch: int, stage: list[int]) -> np.ndarray:
        """The places in the pool of the images that an epoch trains on, before shuffling; `stage` has its levels."""
        raise NotImplementedError

    def order(self, places: np.ndarray, generator):
        """In which order a pass takes its images, int64 (N,): at random."""
        import torch

        return torch.randperm(len(places), generator=generator)

    def predict(self, store, places: np.ndarray):
        """Logits, float (N, C), of the evaluated model."""
        raise NotImplementedError

    def validate(self) -> dict[str, float | None]:
        """The figures on the validation set, by name."""
        raise NotImplementedError

    def finish(self, state: dict, writer) -> None:
        """Test the last and the best-by-validation weights, and write what the run leaves; `writer` in one process."""
        raise NotImplementedError

    # What a script may define.

    def begin_epoch(self, epoch: int, state: dict) -> None:
        """What is done before an epoch; what it changes is kept in `state`, for a run that resumes within the epoch."""

    def draw(self, count: int, generator) -> dict:
        """What is drawn on the CPU for a batch of `count` images, by name, (..., count) each; `Batch.draws` has it."""
        return {}

    def constants(self, this: Pass) -> dict:
        """What all batches of a pass share, by name, tensors on the device; `Batch.constants` has them."""
        return {}

    def strengths(self, epoch: int, places: np.ndarray, purpose: str) -> np.ndarray | None:
        """At which strength each image of a pass is augmented (class_augmentation.py), int (N,); None: not at all."""
        return None

    def epoch_figures(self) -> dict[str, float]:
        """Further figures of an epoch for its history, by name; those called cuda_NAME are logged."""
        return {}

    def pictures(self, epoch: int, places: np.ndarray) -> dict[str, np.ndarray]:
        """What TensorBoard shows where a stage begins: tag -> picture, uint8 (H, W, 3)."""
        return {"train/images": log.sheet(self.pool, self.data, self.args.seed, epoch, places)}

    # The pass.

    def train(self, epoch: int, places: np.ndarray, purpose: str = "epoch", start: dict | None = None) -> dict:
        """One pass over the images at `places`; every draw depends on the seed, the epoch and the purpose alone.

        Args:
            purpose: `epoch`, or `real pass` for adaptive's pass over uniform real images.
            start: state of a pass that was Stopped, to resume it.

        Raises:
            Stopped: a signal came.
            UserError: the loss is not finite.
        """
        import torch

        # Draw the order and what its batches need, or take up those of the pass that was stopped.
        torch.manual_seed(files.digest_int(purpose, self.args.seed, epoch))
        name = "augment" if purpose == "epoch" else f"augment {purpose}"
        generator = torch.Generator().manual_seed(files.digest_int(name, self.args.seed, epoch))
        parts = split_batches(self.order(places, generator), self.args.batch_size)
        draws = [self.draw(len(part), generator) for part in parts]
        done, total = 0, torch.zeros((), dtype=sum_type(self.device), device=self.device)
        if start:
            done, total = start["batches"], start["total"].to(self.device)
            restore_draws(start, generator, self.device)

        # Take a step for each batch.
        self.step_model.train()
        rate = self.rate(epoch, purpose, done, len(parts))
        looked = None
        began = time.monotonic()
        with closing(self.batches(epoch, places, purpose, parts, draws, done, generator)) as batches:
            for number, batch in enumerate(batches, done):
                rate = self.rate(epoch, purpose, number, len(parts))
                total += self.step(batch, rate) * len(batch)
                if number % LOOK_EVERY == 0:
                    looked = self.look_at_loss(looked, total, epoch)
                if number + 1 < len(parts) and (distributed.world() == 1 or number % 10 == 0) and self.signalled():
                    total = distributed.total(total, self.device) / distributed.world()
                    stop_on_bad_loss(total.item(), epoch)  # no checkpoint of it: the last good one stays
                    raise Stopped({"batches": number + 1, "total": total} | current_draws(generator, self.device))

        # What the pass came to.
        total = (distributed.total(total, self.device) / distributed.world()).item()
        seconds = time.monotonic() - began
        stop_on_bad_loss(total, epoch)
        return {
            "loss": total / len(places),
            "lr": rate,
            "images": len(places),
            "synthetic_share": float((self.pool.levels[places] < REAL).mean()),
            "images_per_second": sum(len(part) for part in parts[done:]) / seconds,
        }

    def batches(
        self, epoch: int, places: np.ndarray, purpose: str, parts: list, draws: list[dict], done: int, generator
    ) -> Iterator[Batch]:
        """The batches of a pass from number `done` on, with their images.

        Args:
            parts: each batch's images by their numbers in the pass, int64 (n,).
            draws: each batch's draws.
        """
        import torch

        # What the whole pass needs goes to the device at once.
        order, sizes = torch.cat(parts), [len(part) for part in parts]
        labels = torch.from_numpy(self.pool.labels[places])[order].to(self.device)
        synthetic = torch.from_numpy(self.pool.levels[places] < REAL)[order].to(self.device)
        whole = {name: torch.cat([one[name] for one in draws], -1).to(self.device) for name in draws[0]}
        this = Pass(epoch, purpose, places, labels, synthetic)
        constants = self.constants(this)
        stops = np.cumsum(sizes).tolist()
        spans = [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)][done:]
        rest = [(part, distributed.share(len(part))) for part in parts[done:]]
        strengths = self.strengths(epoch, places, purpose)

        def own(values: np.ndarray) -> list:
            """This process's rows of each batch's values, given those of the pass in its own order, (N,)."""
            return [torch.from_numpy(values)[part[rows]] for part, rows in rest]

        images = self.pool.images.training(
            own(places),
            [torch.arange(span.start, span.stop)[rows] for span, (_, rows) in zip(spans, rest, strict=True)],
            files.digest_int("crop", purpose, self.args.seed, epoch),
            None if strengths is None else own(strengths),
        )
        with closing(images):
            for span, (part, rows), some in zip(spans, rest, images, strict=True):
                drawn = {name: values[..., span] for name, values in whole.items()}
                yield Batch(this, part, rows, some, labels[span], synthetic[span], generator, drawn, constants)

    def rate(self, epoch: int, purpose: str, number: int, batches: int) -> float:
        """The learning rate of a pass's batch; a real pass holds that of the middle of its epoch."""
        if purpose == "real pass":
            return optimization.learning_rate(self.args, epoch + 0.5)
        return optimization.learning_rate(self.args, epoch + number / batches, 1 / batches)

    def step(self, batch: Batch, rate: float):
        """Move the weights by one batch at a learning rate. Returns its loss, float64 (float32 on mps), detached."""
        optimization.set_rate(self.optimizer, rate)
        loss = self.step_graph(batch) if self.step_graph else self.update(batch)
        if self.average:
            self.average.n_averaged += 1
        return loss

    def update(self, batch: Batch):
        """The part of a step that is the device's: forward, loss, backward, optimiser. Returns as `step` does."""
        import torch

        loss = self.batch_loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.args.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
        self.optimizer.step()
        if self.average:
            optimization.update_average(self.average, self.model)
        return loss.detach().to(sum_type(loss.device.type))

    def look_at_loss(self, before, total, epoch: int):
        """Raise UserError where the sum of the losses, or what it was at the last look, is not finite.

        A sum on a GPU is still on its way there: it is read at the next look, which is given it as `before`.
        """
        now = read_later(total)
        if before:
            stop_on_bad_loss(before(), epoch)
        if not total.is_cuda:
            stop_on_bad_loss(now(), epoch)
        return now

    def signalled(self) -> bool:
        """Whether a signal came to any of the processes. All must ask together."""
        return distributed.any_of(self.signals.received is not None, self.device)

    def stop_on_signal(self) -> None:
        """Raise Stopped where a signal came; between two batches of an evaluation."""
        if self.signalled():
            raise Stopped()

    # Adaptive.

    def look(self) -> dict[int, list[float]]:
        """The true class's probability of each held-out image, by level."""
        from training import evaluation

        return {
            level: evaluation.true_class_probability(
                self.predict(self.pool.images, places), self.pool.labels[places], self.softmax_scale
            ).tolist()
            for level, places in self.pool.looks.items()
        }

    def real_pass_places(self, epoch: int) -> np.ndarray:
        """The uniform real images of adaptive's pass before an epoch, int (n,)."""
        real = np.flatnonzero((self.pool.levels == REAL) & ~self.pool.held)
        return np.random.default_rng([self.args.seed, epoch, 1]).permutation(real)[: self.args.real_pass_images]


def stop_on_bad_loss(total: float, epoch: int) -> None:
    """Raise UserError where the sum of an epoch's losses is not finite."""
    if not math.isfinite(total):
        raise cli.UserError(
            f"epoch {epoch}: the loss is not finite; the checkpoint of the epoch before is kept. Expected a lower --lr"
        )


def split_batches(order, batch_size: int) -> list:
    """An order, int64 (N,), in batches; a last batch of one image joins the one before: BatchNorm needs two."""
    import torch

    parts = list(order.split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def current_draws(generator, device: str) -> dict:
    """The states of all generators that a pass draws from."""
    import torch

    state = {"generator": generator.get_state(), "rng": torch.get_rng_state()}
    if device.startswith("cuda"):
        state["device_rng"] = torch.cuda.get_rng_state(device)
    if device == "mps":
        state["device_rng"] = torch.mps.get_rng_state()
    return state


def restore_draws(state: dict, generator, device: str) -> None:
    """Give the generators the states of `current_draws`."""
    import torch

    generator.set_state(state["generator"].cpu())
    torch.set_rng_state(state["rng"].cpu())
    if device.startswith("cuda") and "device_rng" in state:
        torch.cuda.set_rng_state(state["device_rng"].cpu(), device)
    if device == "mps" and "device_rng" in state:
        torch.mps.set_rng_state(state["device_rng"].cpu())
