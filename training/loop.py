"""What every trainer does: passes over images, the epochs around them, checkpoints and results.

A script names its own loss and metrics in a subclass of `Trainer`; the loop over steps, the curriculum, the signals and
the checkpoints are here. Beside it: flags.py, pool.py (the images), log.py (TensorBoard).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import numpy as np

import curricula
from curricula import REAL
from loaders.base import DataSet
from runtime import checkpoints, cli, files, runs
from runtime.signals import StopSignals
from training import distributed, log, optimization
from training.pool import Pool


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
        labels: int64 (N,), on the device.
        synthetic: bool (N,), on the device.
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
        numbers: of the whole batch's images in the pass, int64 (n,).
        rows: which of them are this process's.
        images: of those rows, uint8 (m, 3, H, W), on the device.
        generator: of augmentation, for draws for the whole batch.
    """

    of: Pass
    numbers: object
    rows: slice
    images: object
    generator: object

    def __len__(self) -> int:
        """Images of the whole batch."""
        return len(self.numbers)

    @property
    def labels(self):
        """Of the whole batch, int64 (n,), on the device."""
        return self.of.labels[self.numbers.to(self.of.labels.device)]

    @property
    def synthetic(self):
        """Of the whole batch, bool (n,), on the device."""
        return self.of.synthetic[self.numbers.to(self.of.labels.device)]

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

        # Draw the order, or take up that of the pass that was stopped.
        torch.manual_seed(files.digest_int(purpose, self.args.seed, epoch))
        name = "augment" if purpose == "epoch" else f"augment {purpose}"
        generator = torch.Generator().manual_seed(files.digest_int(name, self.args.seed, epoch))
        parts = split_batches(self.order(places, generator), self.args.batch_size)
        done, total = 0, torch.zeros((), dtype=torch.float64, device=self.device)
        if start:
            done, total = start["batches"], start["total"].to(self.device)
            restore_draws(start, generator, self.device)

        # Take a step for each batch.
        self.step_model.train()
        rate = self.rate(epoch, purpose, done, len(parts))
        began = time.monotonic()
        with closing(self.batches(epoch, places, purpose, parts, done, generator)) as batches:
            for number, batch in enumerate(batches, done):
                rate = self.rate(epoch, purpose, number, len(parts))
                total += self.step(batch, rate) * len(batch)
                if number % 50 == 0:
                    self.stop_on_bad_loss(total, epoch)
                if number + 1 < len(parts) and (distributed.world() == 1 or number % 10 == 0) and self.signalled():
                    total = distributed.total(total, self.device) / distributed.world()
                    raise Stopped({"batches": number + 1, "total": total} | current_draws(generator, self.device))

        # What the pass came to.
        seconds = time.monotonic() - began
        total = distributed.total(total, self.device) / distributed.world()
        self.stop_on_bad_loss(total, epoch)
        return {
            "loss": total.item() / len(places),
            "lr": rate,
            "images": len(places),
            "synthetic_share": float((self.pool.levels[places] < REAL).mean()),
            "images_per_second": sum(len(part) for part in parts[done:]) / seconds,
        }

    def batches(
        self, epoch: int, places: np.ndarray, purpose: str, parts: list, done: int, generator
    ) -> Iterator[Batch]:
        """The batches of a pass from number `done` on, with their images; `parts` has each one's numbers."""
        import torch

        this = Pass(
            epoch,
            purpose,
            places,
            torch.from_numpy(self.pool.labels[places]).to(self.device),
            torch.from_numpy(self.pool.levels[places] < REAL).to(self.device),
        )
        starts = np.cumsum([0, *map(len, parts)])[done:]
        rest = [(part, distributed.share(len(part))) for part in parts[done:]]
        strengths = self.strengths(epoch, places, purpose)

        def own(values: np.ndarray) -> list:
            """This process's rows of each batch's values, given those of the pass in its own order, (N,)."""
            return [torch.from_numpy(values)[part[rows]] for part, rows in rest]

        images = self.pool.images.training(
            own(places),
            [torch.arange(at, at + len(part))[rows] for at, (part, rows) in zip(starts, rest, strict=False)],
            files.digest_int("crop", purpose, self.args.seed, epoch),
            None if strengths is None else own(strengths),
        )
        with closing(images):
            for (part, rows), some in zip(rest, images, strict=True):
                yield Batch(this, part, rows, some, generator)

    def rate(self, epoch: int, purpose: str, number: int, batches: int) -> float:
        """The learning rate of a pass's batch; a real pass holds that of the middle of its epoch."""
        if purpose == "real pass":
            return optimization.learning_rate(self.args, epoch + 0.5)
        return optimization.learning_rate(self.args, epoch + number / batches, 1 / batches)

    def step(self, batch: Batch, rate: float):
        """Move the weights by one batch. Returns its loss, float64, detached."""
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.batch_loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.args.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.model)
        return loss.detach().double()

    def stop_on_bad_loss(self, total, epoch: int) -> None:
        """Raise UserError where the sum of an epoch's losses is not finite."""
        if not math.isfinite(total.item()):
            raise cli.UserError(
                f"epoch {epoch}: the loss is not finite; the checkpoint of the epoch before is kept. "
                "Expected a lower --lr"
            )

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
    return state if device == "cpu" else state | {"device_rng": torch.cuda.get_rng_state(device)}


def restore_draws(state: dict, generator, device: str) -> None:
    """Give the generators the states of `current_draws`."""
    import torch

    generator.set_state(state["generator"].cpu())
    torch.set_rng_state(state["rng"].cpu())
    if device != "cpu" and "device_rng" in state:
        torch.cuda.set_rng_state(state["device_rng"].cpu(), device)


def stage_of(args, epoch: int, levels: list[int], progress: dict[int, float] | None = None) -> list[int]:
    """The levels of an epoch."""
    return curricula.epoch_levels(
        args.curriculum,
        epoch,
        args.curriculum_epochs,
        levels,
        args.fixed_level,
        args.seed,
        args.level_shares,
        progress if progress is not None else dict.fromkeys(levels, 0.0),
    )


# ---------------------------------------------------------------------------------------------------------------------
# a run: its folder, its epochs, its results


def run(args, inputs: dict, begin: Callable[[StopSignals], tuple[Trainer, dict]]) -> int:
    """Train in the run folder `args.out`, or say that it is complete. Returns the script's exit code.

    Args:
        inputs: digests of what is trained on.
        begin: gives the trainer, and the run's state (`start_or_resume`).
    """
    main_process = distributed.rank() == 0
    with ExitStack() as stack, StopSignals() as signals, distributed.plain_errors():
        with distributed.first_process_first(args.device):
            if main_process:
                stack.enter_context(runs.claim(args.out))
                complete = runs.open_run(args.out, args, inputs, args.overwrite)
            else:
                complete = (args.out / "results.json").exists()
        if complete and main_process:
            print(f"{args.out}: already complete")
        code = 0
        if not complete:
            try:
                fit(*begin(signals))
            except Stopped as stop:
                code = runs.RESUMABLE
                if main_process:
                    name = signals.received or "a signal"
                    print(f"{args.out}: {name} came{stop.saved}; run the same command again to resume", flush=True)
        distributed.stop()
    return code


def start_or_resume(args, model, optimizer, average, device: str) -> dict:
    """The run's state: new, or its last checkpoint's, whose weights the model, its optimiser and its average take."""
    state = {
        "epoch": 0,
        "history": [],
        "seconds": 0.0,
        "best": {"epoch": -1, "figure": -1.0, "model": {}},
        "partial": None,
    }
    saved = checkpoints.load_latest_checkpoint(args.out / "checkpoint.pt", device)
    if saved:
        state = saved
        model.load_state_dict(state["model"])
        if "optimizer" in state:  # a run that has only its tests to do is saved without
            optimizer.load_state_dict(state["optimizer"])
        if average:
            average.load_state_dict(state["average"])
        if distributed.rank() == 0:
            print(f"{args.out}: resuming after epoch {state['epoch']} of {args.epochs}", flush=True)
    return state


def fit(trainer: Trainer, state: dict) -> None:
    """Train to the end, with checkpoints between epochs, and write the results.

    Raises:
        Stopped: a signal came; the checkpoint is written.
    """
    args = trainer.args
    main_process = distributed.rank() == 0
    with ExitStack() as stack, cli.progress(args.epochs, args.out.name, "epoch") as bar:
        writer = log.open_writer(args.out, state["epoch"]) if main_process else None
        if writer:
            stack.callback(writer.close)
        bar.update(state["epoch"])
        for epoch in range(state["epoch"], args.epochs):
            began = time.monotonic()
            try:
                entry = run_epoch(trainer, state, epoch, writer)
            except Stopped as stop:
                state["seconds"] += time.monotonic() - began
                save(trainer, state)
                after = f", after batch {stop.state['batches']}" if stop.state else ""
                stop.saved = f"; checkpoint written in epoch {epoch}{after}"
                raise
            state["history"].append(entry)
            state["seconds"] += time.monotonic() - began
            state["epoch"] = epoch + 1
            if writer:
                log.log_epoch(writer, epoch, entry)
            bar.update()
            due = epoch + 1 == args.epochs or (epoch + 1) % args.checkpoint_every == 0
            if due:
                save(trainer, state)
            if epoch + 1 < args.epochs and trainer.signalled():
                if not due:
                    save(trainer, state)
                raise Stopped(saved=f"; checkpoint written after epoch {epoch}")
        trainer.finish(state, writer)


def run_epoch(trainer: Trainer, state: dict, epoch: int, writer) -> dict:
    """One epoch: its level, its pass and its validation. Returns its entry of the history.

    What is done of it is noted as it goes, and kept in state["partial"] where a signal stops it, so that nothing is
    done twice.
    """
    args = trainer.args
    done = state["partial"] or {}
    state["partial"] = None
    start = done.pop("pass", None)  # where a pass was stopped
    try:
        if "begun" not in done:
            trainer.begin_epoch(epoch, state)
            done["begun"] = True

        # Which levels, and which images.
        if args.curriculum == "adaptive" and epoch < args.curriculum_epochs and "progress" not in done:
            measure_progress(trainer, epoch, done, start)
            start = None
        stage = stage_of(args, epoch, trainer.levels, done.get("progress"))
        places = trainer.epoch_places(epoch, stage)
        if writer and (not state["history"] or state["history"][-1]["levels"] != (stage or [REAL])):
            with log.decoration("TensorBoard's pictures"):
                for tag, picture in trainer.pictures(epoch, places).items():
                    writer.add_image(tag, picture, epoch, dataformats="HWC")

        # Train and validate.
        if "record" not in done:
            done["record"] = trainer.train(epoch, places, start=start)
        found = trainer.validate()
    except Stopped as stop:
        state["partial"] = done | ({"pass": stop.state} if stop.state else {})
        raise
    if found[trainer.chosen_by] > state["best"]["figure"]:
        state["best"] = {
            "epoch": epoch,
            "figure": found[trainer.chosen_by],
            "model": {name: value.clone() for name, value in trainer.evaluated.state_dict().items()},
        }
    entry = {"epoch": epoch, "levels": stage or [REAL], **done["record"], **trainer.epoch_figures()}
    entry |= {f"val_{name}": value for name, value in found.items()}
    if "progress" in done:
        entry["progress"] = {str(level): value for level, value in done["progress"].items()}
        entry["real_pass_images"] = done["passed"]
    return entry


def measure_progress(trainer: Trainer, epoch: int, done: dict, start: dict | None) -> None:
    """Note in `done` the progress of each level by a short pass over uniform real images (DisCL, Algorithm 2).

    Lines 2 to 6: evaluate the held-out images, train on the real ones, evaluate again.

    Args:
        done: what is done of the epoch.
        start: where the pass was stopped, or None.
    """
    if "before" not in done:
        done["before"] = trainer.look()
    if "passed" not in done:
        places = trainer.real_pass_places(epoch)
        if len(places):
            trainer.train(epoch, places, "real pass", start)
        done["passed"] = len(places)
    after = trainer.look()
    done["progress"] = {level: curricula.progress_of(done["before"][level], after[level]) for level in after}


def save(trainer: Trainer, state: dict) -> None:
    """Write the checkpoint, in the first process; after the last epoch without the optimiser, twice a model's size."""
    if distributed.rank() > 0:
        return
    state.update(model=trainer.model.state_dict(), optimizer=trainer.optimizer.state_dict())
    if state["epoch"] == trainer.args.epochs:
        del state["optimizer"]
    if trainer.average:
        state["average"] = trainer.average.state_dict()
    checkpoints.save_checkpoint(trainer.args.out / "checkpoint.pt", state)


def write_results(trainer: Trainer, state: dict, writer, results: dict, metrics: dict[str, float]) -> None:
    """results.json, history.jsonl, and the end of the TensorBoard log; results.json last: with it a run is complete.

    Args:
        results: what the script itself found, to which the run's length and speed are added.
        metrics: the last epoch's test figures, by TensorBoard tag.
    """
    args = trainer.args
    passed = sum(record.get("real_pass_images", 0) for record in state["history"])
    images = passed + sum(record["images"] for record in state["history"])
    results |= {"images": images, "seconds": state["seconds"], "images_per_second": images / state["seconds"]}
    if passed:
        results["real_pass_images"] = passed  # of `images`: adaptive's passes to measure progress
    lines = "".join(json.dumps(record) + "\n" for record in state["history"])
    files.write_text(args.out / "history.jsonl", lines)
    checkpoints.remove_previous(args.out / "checkpoint.pt")
    with log.decoration("the last figures in TensorBoard"):
        log.log_end(writer, args, metrics)
    files.write_json(args.out / "results.json", results)
