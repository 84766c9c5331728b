"""What every trainer does: its flags, passes over images, the epochs around them, checkpoints, logs and results.

A script names its own loss and metrics in a subclass of `Trainer`; the loop over steps, the checkpoints, the signals,
the curriculum and the logs are here.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import curricula
from curricula import REAL
from loaders.base import ImageSet, LongTailed
from runtime import cli, runs, steps
from spectrum import folder as spectrum_folder
from training import distributed, optimization

DEFAULT_SPECTRUM = Path("runs/spectrum")
# Embedded data sets and their default spectrum, which is made first where it is missing.
EMBEDDED = {"digits": DEFAULT_SPECTRUM, "toycam": Path("runs/toycam_road/spectrum")}
SHEET_IMAGES = 32


def add_run_flags(parser) -> None:
    """Where a run goes and what it runs on."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="run folder (default: below runs/, with a name that the settings make)",
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds a run")
    parser.add_argument("--seed", type=cli.whole(0), default=0, metavar="N", help="seed of weights, order and draws")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--workers", type=cli.whole(0), default=4, metavar="N", help="processes that decode large images"
    )


def add_curriculum_flags(group, spelling: Callable[[str], str] = str) -> None:
    """The flags of a curriculum; `spelling` gives the name in curricula.py of what is typed."""
    group.add_argument(
        "--curriculum",
        type=spelling,
        choices=curricula.CURRICULA,
        default="none",
        help="which guidance levels each epoch trains on; d2s goes from diverse to specific, s2d back, cyclic up and "
        "down; adaptive takes the level on which the model makes most progress",
    )
    group.add_argument(
        "--spectrum",
        type=Path,
        default=DEFAULT_SPECTRUM,
        metavar="FOLDER",
        help="filtered folder of generate_spectrum.py",
    )
    group.add_argument(
        "--levels",
        type=cli.level,
        nargs="+",
        metavar="PERCENT",
        help="guidance levels to use; 100, the real image, is a stage of d2s, s2d, random, cyclic and all and a "
        "candidate of adaptive (default: all of the spectrum, and 100)",
    )
    group.add_argument(
        "--level-shares",
        type=cli.number(0),
        nargs="+",
        metavar="SHARE",
        help="time that d2s and s2d give to each level, in ascending order of the levels (default: equal shares)",
    )
    group.add_argument("--fixed-level", type=cli.level, default=50, metavar="PERCENT", help="the level of fixed")
    group.add_argument(
        "--curriculum-epochs",
        type=cli.whole(0),
        metavar="N",
        help="epochs of the curriculum; those after them have all real images",
    )
    group.add_argument(
        "--progress-images",
        type=cli.whole(1),
        default=100,
        metavar="N",
        help="hard images that adaptive keeps out of its training, to measure progress on",
    )
    group.add_argument(
        "--real-pass-images",
        type=cli.whole(0),
        default=5000,
        metavar="N",
        help="real images, drawn uniformly, that adaptive trains on before each epoch, to measure progress",
    )


def add_training_flags(group) -> None:
    group.add_argument("--epochs", type=cli.whole(1), metavar="N", default=80, help="epochs, curriculum included")
    group.add_argument("--batch-size", type=cli.whole(1), metavar="N", default=128, help="images in a step")
    group.add_argument("--optimizer", choices=optimization.OPTIMIZERS, default="adamw", help="how weights are updated")
    group.add_argument("--lr", type=cli.number(0), metavar="RATE", default=1e-3, help="learning rate at its highest")
    group.add_argument("--momentum", type=cli.number(0, 1), default=0.9, metavar="SHARE", help="momentum of sgd")
    group.add_argument("--weight-decay", type=cli.number(0), metavar="RATE", default=0.0, help="weight decay")
    group.add_argument(
        "--schedule",
        choices=optimization.SCHEDULES,
        default="cosine",
        help="learning rate: a cosine to 0, or lowered at --step-epochs",
    )
    group.add_argument(
        "--step-epochs",
        type=cli.whole(0),
        nargs="+",
        default=[160, 180],
        metavar="N",
        help="epochs from which steps lowers the rate",
    )
    group.add_argument(
        "--step-factor",
        type=cli.number(0, 1),
        default=0.01,
        metavar="FACTOR",
        help="what steps multiplies the rate by at each of --step-epochs",
    )
    group.add_argument(
        "--warmup-epochs", type=cli.number(0), default=0, metavar="N", help="epochs over which the rate rises to --lr"
    )
    group.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast, which GPUs compute faster"
    )
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    group.add_argument(
        "--clip-grad", type=cli.number(0), metavar="NORM", help="shorten a step's gradient to NORM (default: leave it)"
    )


def check_flags(args) -> None:
    """Raise UserError where flags that all trainers have do not go together."""
    if args.schedule == "cosine" and args.warmup_epochs >= args.epochs:
        raise cli.UserError(f"--warmup-epochs {args.warmup_epochs:g}: expected fewer than --epochs {args.epochs}")
    if args.curriculum != "none" and args.curriculum_epochs > args.epochs:
        raise cli.UserError(f"--curriculum-epochs {args.curriculum_epochs}: expected at most --epochs {args.epochs}")
    if args.level_shares and args.curriculum not in ("d2s", "s2d"):
        raise cli.UserError(f"--level-shares: --curriculum {args.curriculum} has no stages; expected d2s or s2d")


@dataclass
class Pool:
    """Everything that may be trained on: the real images first, then the synthetic ones by ascending level.

    Attributes:
        images: of all of them (training/stores.py).
        labels: int64 (N,).
        levels: guidance level in percent, 100 for real images, int (N,).
        sources: N names: each image's own, or that of the real image that a synthetic one was drawn from.
        held: whether an image is kept out while the curriculum lasts, bool (N,): adaptive looks at it.
        looks: for each level, the places of the held-out images that progress is measured on.
    """

    images: object
    labels: np.ndarray
    levels: np.ndarray
    sources: list[str]
    held: np.ndarray
    looks: dict[int, np.ndarray] = field(default_factory=dict)


def build_pool(
    args,
    data: LongTailed,
    synthetic: dict[int, ImageSet],
    levels: list[int],
    store: Callable[[list[ImageSet]], object],
) -> Pool:
    """The pool of a run; for adaptive, some hard images and all synthetic images drawn from them are held out.

    Args:
        levels: of the curriculum; REAL may be one of them.
        store: makes one store of images (training/stores.py) of several sets.
    """
    sets = [data.train, *(synthetic[level] for level in sorted(synthetic))]
    labels = np.concatenate([one.labels for one in sets])
    level_of = np.repeat([REAL, *sorted(synthetic)], [len(one) for one in sets])
    sources = [source for one in sets for source in one.sources]
    pool = Pool(store(sets), labels, level_of, sources, np.zeros(len(labels), dtype=bool))
    if args.curriculum == "adaptive":
        by_level = {level: one.sources for level, one in synthetic.items()}
        labels_by_source = dict(zip(data.train.sources, data.train.labels.tolist(), strict=True))
        chosen = curricula.held_out_sources(by_level, labels_by_source, data.counts, args.progress_images, args.seed)
        pool.held = np.isin(sources, chosen)
        for level in levels:
            first = {sources[place]: place for place in np.flatnonzero(pool.held & (pool.levels == level))[::-1]}
            pool.looks[level] = np.array([first[source] for source in chosen])
    return pool


class Stopped(Exception):
    """A signal came in the middle of an epoch. `state` is what is needed to go on with its next batch."""

    def __init__(self, state: dict):
        super().__init__()
        self.state = state


@dataclass
class Trainer:
    """What a pass over images needs: the model in its three forms, its optimiser, and the images.

    A script subclasses it and defines `pass_loss`, `epoch_places`, `predict`, `validate` and `finish`.

    Attributes:
        levels: the levels that the curriculum may ask for.
        model: the module itself, whose weights are saved and looked at.
        step_model: the same module, compiled and wrapped as the flags say.
        average: the moving average of the weights, or None.
    """

    args: object
    data: LongTailed
    levels: list[int]
    pool: Pool
    model: object
    step_model: object
    average: object
    optimizer: object
    device: str
    signals: runs.StopSignals

    chosen_by = "macro"  # the figure of `validate` that the best epoch is chosen by
    softmax_scale = 1.0  # what logits are multiplied by to give probabilities

    @property
    def evaluated(self):
        """The model whose accuracies are reported."""
        return self.average.module if self.average else self.model

    def pass_loss(self, epoch: int, places: np.ndarray) -> Callable:
        """What gives the loss of each batch of a pass over `places`.

        Returns:
            A function of (part, rows, images, generator): where the batch's images stand in `places`, int64 (n,); which
            rows of the batch are this process's; those images, uint8 (m, 3, H, W), on the device; the generator of
            augmentation. It gives a scalar whose gradient, averaged over the processes, is the whole batch's.
        """
        raise NotImplementedError

    def epoch_places(self, epoch: int, stage: list[int]) -> np.ndarray:
        """The places in the pool of the images that an epoch trains on, before shuffling; `stage` has its levels."""
        raise NotImplementedError

    def predict(self, store, places: np.ndarray):
        """Logits, float (N, C), of the evaluated model."""
        raise NotImplementedError

    def validate(self) -> dict[str, float | None]:
        """The figures on the validation set, by name."""
        raise NotImplementedError

    def finish(self, state: dict, writer) -> None:
        """Test the last and the best-by-validation weights, and write what the run leaves; `writer` in one process."""
        raise NotImplementedError

    def begin_epoch(self, epoch: int, state: dict) -> None:
        """What is done before an epoch; what it changes is kept in `state`, for a run that goes on within the epoch."""

    def strengths(self, epoch: int, places: np.ndarray, purpose: str) -> np.ndarray | None:
        """At which strength each image of a pass is augmented (class_augmentation.py), int (N,); None: not at all."""
        return None

    def epoch_figures(self) -> dict[str, float]:
        """Further figures of an epoch for its history, by name; those called cuda_NAME are logged."""
        return {}

    def pictures(self, epoch: int, places: np.ndarray) -> dict[str, np.ndarray]:
        """What TensorBoard shows where a stage begins: tag -> picture, uint8 (H, W, 3)."""
        return {"train/images": sheet(self, epoch, places)}

    def train(self, epoch: int, places: np.ndarray, purpose: str = "epoch", start: dict | None = None) -> dict:
        """One pass over the images at `places`; every draw depends on the seed, the epoch and the purpose alone.

        Args:
            purpose: `epoch`, or `real pass` for adaptive's pass before a look.
            start: state of a pass that was Stopped, to go on with.

        Raises:
            Stopped: a signal came.
            UserError: the loss is not finite.
        """
        import torch

        args, device = self.args, self.device
        loss_of = self.pass_loss(epoch, places)

        torch.manual_seed(runs.digest_int(purpose, args.seed, epoch))
        name = "augment" if purpose == "epoch" else f"augment {purpose}"
        generator = torch.Generator().manual_seed(runs.digest_int(name, args.seed, epoch))
        order = torch.randperm(len(places), generator=generator)
        parts = list(order.split(args.batch_size))
        if len(parts) > 1 and len(parts[-1]) == 1:  # BatchNorm has no statistics of one image
            parts[-2:] = [torch.cat(parts[-2:])]
        starts = np.cumsum([0, *map(len, parts)])
        done, total = 0, torch.zeros((), dtype=torch.float64, device=device)
        if start:
            done, total = start["batches"], start["total"].to(device)
            generator.set_state(start["generator"].cpu())
            torch.set_rng_state(start["rng"].cpu())
            if device != "cpu" and "device_rng" in start:
                torch.cuda.set_rng_state(start["device_rng"].cpu(), device)
        own = [distributed.share(len(part)) for part in parts]
        strengths = self.strengths(epoch, places, purpose)
        images = self.pool.images.training(
            [torch.from_numpy(places)[part[rows]] for part, rows in zip(parts[done:], own[done:], strict=True)],
            [
                torch.arange(begin, begin + len(part))[rows]
                for begin, part, rows in zip(starts[done:], parts[done:], own[done:], strict=False)
            ],
            runs.digest_int("crop", purpose, args.seed, epoch),
            strengths
            if strengths is None
            else [torch.from_numpy(strengths)[part[rows]] for part, rows in zip(parts[done:], own[done:], strict=True)],
        )
        self.step_model.train()
        began = time.monotonic()
        for number, (part, rows, batch) in enumerate(zip(parts[done:], own[done:], images, strict=True), done):
            if purpose == "real pass":  # one rate, that of the middle of the epoch which it comes before
                rate = optimization.learning_rate(args, epoch + 0.5)
            else:
                rate = optimization.learning_rate(args, epoch + number / len(parts), 1 / len(parts))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of(part, rows, batch, generator)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if args.clip_grad is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.clip_grad)
            self.optimizer.step()
            if self.average:
                self.average.update_parameters(self.model)
            total += loss.detach().double() * len(part)
            if number % 50 == 0:
                self.stop_on_bad_loss(total, epoch)
            last = number + 1 == len(parts)
            if purpose == "epoch" and not last and (distributed.world() == 1 or number % 10 == 0):
                if distributed.any_of(self.signals.received is not None, device):
                    total = distributed.total(total, device) / distributed.world()
                    state = {"batches": number + 1, "total": total, "generator": generator.get_state()}
                    if device != "cpu":
                        state["device_rng"] = torch.cuda.get_rng_state(device)
                    raise Stopped(state | {"rng": torch.get_rng_state()})
        seconds = time.monotonic() - began
        total = distributed.total(total, device) / distributed.world()
        self.stop_on_bad_loss(total, epoch)
        seen = len(places) - int(starts[done])
        return {
            "loss": total.item() / len(places),
            "lr": rate,
            "images": len(places),
            "synthetic_share": float((self.pool.levels[places] < REAL).mean()),
            "images_per_second": seen / seconds,
        }

    def stop_on_bad_loss(self, total, epoch: int) -> None:
        """Raise UserError where the sum of an epoch's losses is not finite."""
        if not math.isfinite(total.item()):
            raise cli.UserError(
                f"epoch {epoch}: the loss is not finite; the checkpoint of the epoch before is kept. "
                "Expected a lower --lr"
            )

    def look(self) -> dict[int, list[float]]:
        """The true class's probability of each held-out image, by level."""
        from training import evaluation

        return {
            level: evaluation.true_class_probability(
                self.predict(self.pool.images, places), self.pool.labels[places], self.softmax_scale
            ).tolist()
            for level, places in self.pool.looks.items()
        }

    def measure_progress(self, epoch: int) -> tuple[dict[int, float], int]:
        """The progress of each level by a short pass over uniform real images (DisCL, Algorithm 2, lines 2 to 6).

        Returns:
            Level -> progress, and how many images the pass had.
        """
        args = self.args
        before = self.look()
        real = np.flatnonzero((self.pool.levels == REAL) & ~self.pool.held)
        rng = np.random.default_rng([args.seed, epoch, 1])
        places = rng.permutation(real)[: args.real_pass_images]
        if len(places):
            self.train(epoch, places, "real pass")
        after = self.look()
        return {level: curricula.progress_of(before[level], after[level]) for level in before}, len(places)


def prepare_spectrum(args) -> tuple[list[int], list[int]]:
    """The levels that the curriculum may ask for, and the hard classes; makes the default spectrum if it is missing."""
    with distributed.first_process_first(args.device):
        if args.spectrum == EMBEDDED.get(args.dataset) and not (args.spectrum / "scores.csv").exists():
            print(f"{args.spectrum}: no finished spectrum there; making it first", flush=True)
            steps.make_spectrum(args.spectrum.parent, args.dataset, args.imb_ratio)
    plan = spectrum_folder.read_plan(args.spectrum)
    levels = curricula.needed_levels(args.curriculum, args.levels or [*plan["levels"], REAL], args.fixed_level)
    if distributed.rank() == 0:
        schedule = curricula.describe_schedule(
            args.curriculum, args.epochs, args.curriculum_epochs, levels, args.fixed_level, args.level_shares
        )
        print(f"schedule: {schedule}", flush=True)
    return levels, plan["hard_classes"]


def print_gaps(hard_classes: list[int], synthetic: dict[int, ImageSet], class_names: list[str]) -> None:
    """Say which hard classes the filter left without an image at a level, and what training does there."""
    gaps = [(label, level) for level in sorted(synthetic) for label in hard_classes
            if label not in synthetic[level].labels]  # fmt: skip
    if gaps and distributed.rank() == 0:
        print(
            f"{len(gaps)} of {len(hard_classes) * len(synthetic)} hard classes and levels have no accepted image, the "
            f"first {class_names[gaps[0][0]]} at level {gaps[0][1]}: there a class has its real images alone; "
            "filter_clipscore.py --min-per-class-level plans more of them"
        )


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


def run(args, inputs: dict, begin: Callable[[runs.StopSignals], tuple[Trainer, dict]]) -> int:
    """Train in the run folder `args.out`, or say that it is complete. Returns the script's exit code.

    Args:
        inputs: digests of what is trained on.
        begin: gives the trainer, and the run's state (`start_or_resume`).
    """
    main_process = distributed.rank() == 0
    with ExitStack() as stack, runs.StopSignals() as signals:
        with distributed.first_process_first(args.device):
            if main_process:
                stack.enter_context(runs.claim(args.out))
                complete = runs.open_run(args.out, args, inputs, args.overwrite)
            else:
                complete = (args.out / "results.json").exists()
        if complete and main_process:
            print(f"{args.out}: already complete")
        code = 0 if complete else fit(*begin(signals))
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
    saved = runs.load_latest_checkpoint(args.out / "checkpoint.pt", device)
    if saved:
        state = saved
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average:
            average.load_state_dict(state["average"])
        if distributed.rank() == 0:
            print(f"{args.out}: going on after epoch {state['epoch']} of {args.epochs}", flush=True)
    return state


def fit(trainer: Trainer, state: dict) -> int:
    """Train to the end, a checkpoint each epoch, and write the results. Returns the script's exit code."""
    args, signals = trainer.args, trainer.signals
    main_process = distributed.rank() == 0
    writer = open_writer(args.out, state["epoch"]) if main_process else None

    def save() -> None:
        state.update(model=trainer.model.state_dict(), optimizer=trainer.optimizer.state_dict())
        if trainer.average:
            state["average"] = trainer.average.state_dict()
        if main_process:
            runs.save_checkpoint(args.out / "checkpoint.pt", state)

    def stopped(where: str) -> int:
        if main_process:
            writer.close()
            print(
                f"{args.out}: {signals.received or 'a signal'} came; checkpoint written {where}; "
                "run the same command again to go on",
                flush=True,
            )
        return runs.RESUMABLE

    with cli.progress(args.epochs, args.out.name, "epoch") as bar:
        bar.update(state["epoch"])
        for epoch in range(state["epoch"], args.epochs):
            began = time.monotonic()
            partial, state["partial"] = state["partial"], None
            if not partial:
                trainer.begin_epoch(epoch, state)
            if partial:
                progress, passed = partial["progress"], partial["real_pass_images"]
            elif args.curriculum == "adaptive" and epoch < args.curriculum_epochs:
                progress, passed = trainer.measure_progress(epoch)
            else:
                progress, passed = None, 0
            stage = stage_of(args, epoch, trainer.levels, progress)
            places = trainer.epoch_places(epoch, stage)
            if main_process and (not state["history"] or state["history"][-1]["levels"] != (stage or [REAL])):
                for tag, picture in trainer.pictures(epoch, places).items():
                    writer.add_image(tag, picture, epoch, dataformats="HWC")
            try:
                record = trainer.train(epoch, places, start=partial)
            except Stopped as stop:
                state["partial"] = stop.state | {"progress": progress, "real_pass_images": passed}
                state["seconds"] += time.monotonic() - began
                save()
                return stopped(f"in epoch {epoch}, after batch {stop.state['batches']}")
            found = trainer.validate()
            if found[trainer.chosen_by] > state["best"]["figure"]:
                state["best"] = {
                    "epoch": epoch,
                    "figure": found[trainer.chosen_by],
                    "model": {name: value.clone() for name, value in trainer.evaluated.state_dict().items()},
                }
            state["history"].append(
                {
                    "epoch": epoch,
                    "levels": stage or [REAL],
                    **record,
                    **trainer.epoch_figures(),
                    **{f"val_{name}": value for name, value in found.items()},
                    **({"progress": {str(level): value for level, value in progress.items()}} if progress else {}),
                    **({"real_pass_images": passed} if passed else {}),
                }
            )
            state["seconds"] += time.monotonic() - began
            if main_process:
                log(writer, epoch, state["history"][-1])
            state["epoch"] = epoch + 1
            save()
            bar.update()
            if epoch + 1 < args.epochs and distributed.any_of(signals.received is not None, trainer.device):
                return stopped(f"after epoch {epoch}")
    trainer.finish(state, writer)
    return 0


def write_results(trainer: Trainer, state: dict, writer, results: dict, metrics: dict[str, float]) -> None:
    """results.json, history.jsonl, and the end of the TensorBoard log; results.json last: with it a run is complete.

    Args:
        results: what the script itself found, to which the run's length and speed are added.
        metrics: the last epoch's test figures, by TensorBoard tag.
    """
    args = trainer.args
    for name, value in metrics.items():
        writer.add_scalar(name, value, args.epochs - 1)
    log_hparams(writer, args, metrics)
    writer.close()
    passed = sum(record.get("real_pass_images", 0) for record in state["history"])
    images = passed + sum(record["images"] for record in state["history"])
    results |= {"images": images, "seconds": state["seconds"], "images_per_second": images / state["seconds"]}
    if passed:
        results["real_pass_images"] = passed  # of `images`: adaptive's passes to measure progress
    runs.write_text(args.out / "history.jsonl", "".join(json.dumps(record) + "\n" for record in state["history"]))
    runs.write_json(args.out / "results.json", results)


def open_writer(folder: Path, epoch: int):
    """TensorBoard's writer; what a killed run wrote of this epoch and later ones is taken back."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=epoch)


def sheet(trainer: Trainer, epoch: int, places: np.ndarray) -> np.ndarray:
    """A picture of some of an epoch's training images before augmentation, half of them synthetic if it has any."""
    from reporting import figures

    pool, data = trainer.pool, trainer.data
    rng = np.random.default_rng([trainer.args.seed, epoch, 2])
    chosen = rng.permutation(places)
    real, synthetic = (chosen[(pool.levels[chosen] == REAL) == kind] for kind in (True, False))
    half = min(len(synthetic), SHEET_IMAGES // 2)
    chosen = np.concatenate([synthetic[:half], real[: SHEET_IMAGES - half]])
    images = [
        image.permute(1, 2, 0).cpu().numpy() for part in pool.images.evaluation(chosen, len(chosen)) for image in part
    ]
    captions = [
        ("real" if pool.levels[place] == REAL else f"level {pool.levels[place]}", data.class_names[pool.labels[place]])
        for place in chosen
    ]
    return figures.sheet(images, captions)


def log(writer, epoch: int, record: dict) -> None:
    """The TensorBoard scalars of an epoch."""
    for name in ("loss", "lr", "images_per_second", "synthetic_share"):
        writer.add_scalar(f"train/{name}", record[name], epoch)
    writer.add_scalar("curriculum/level", np.mean(record["levels"]), epoch)
    for name, value in record.items():
        if name.startswith("cuda_"):
            writer.add_scalar(f"cuda/{name[5:]}", value, epoch)
    for level, value in record.get("progress", {}).items():
        writer.add_scalar(f"curriculum/progress_level{level}", value, epoch)
    for name, value in record.items():
        if name.startswith("val_") and value is not None:
            writer.add_scalar(f"val/{name[4:]}", value, epoch)
    writer.flush()  # before the checkpoint: a resumed run writes no epoch twice, and misses none


def log_hparams(writer, args, metrics: dict[str, float]) -> None:
    """The run's arguments and final figures for TensorBoard's HPARAMS tab: once, in the run's own events."""
    from torch.utils.tensorboard.summary import hparams

    values = {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for name, value in sorted(vars(args).items())
        if name not in runs.FREE
    }
    for summary in hparams(values, metrics):
        writer.file_writer.add_summary(summary)
