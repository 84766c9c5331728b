"""A run of a trainer: its folder, its epochs and their curriculum, its signals, checkpoints and results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack

import curricula
from curricula import REAL
from runtime import checkpoints, cli, files, runs
from runtime.signals import StopSignals
from training import distributed, log, optimization
from training.loop import Stopped, Trainer


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


def run(args, inputs: dict, splits: dict[str, str], begin: Callable[[StopSignals], tuple[Trainer, dict]]) -> int:
    """Train in the run folder `args.out`, or say that it is complete. Returns the script's exit code.

    Args:
        inputs: digests of what is trained on.
        splits: of pool.describe_splits.
        begin: gives the trainer, and the run's state (`start_or_resume`).
    """
    main_process = distributed.rank() == 0
    with ExitStack() as stack, StopSignals() as signals, distributed.plain_errors():
        with distributed.first_process_first(args.device):
            if main_process:
                stack.enter_context(runs.claim(args.out))
                complete = runs.open_run(args.out, args, inputs, splits, args.overwrite)
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
        try:
            state = {name: saved.pop(name) for name in state} | saved
            model.load_state_dict(state["model"])
            if "optimizer" in state:  # a run that has only its tests to do is saved without
                optimizer.load_state_dict(state["optimizer"])
            if average:
                average.load_state_dict(state["average"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise cli.UserError(
                f"{args.out / 'checkpoint.pt'}: of another trainer or model ({cli.first_line(error)}); delete it, or "
                "pass --overwrite, to start anew"
            ) from None
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
        before = [entry["levels"] for entry in state["history"]]
        if writer and log.shows_pictures(before, stage or [REAL], args.epochs):
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
    state.update(model=trainer.model.state_dict(), optimizer=optimization.state_of(trainer.optimizer))
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
