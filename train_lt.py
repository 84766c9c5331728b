"""Step 5a: train a classifier on a long-tailed data set with a generative curriculum.

Each epoch of the curriculum trains on real images and on synthetic images of the levels that the curriculum names; the
epochs after it train on real images alone (DisCL; curricula.py and datasets.stage_mix have the rules).

Reads:  the data set, a filtered spectrum folder (none is needed for --curriculum none; if the default one is not there,
        it is made first)
Writes: OUT/args.json, checkpoint.pt and the one before it, TensorBoard events, history.jsonl, predictions.npz,
        confusion.png, results.json, and subset.csv where a data set was made long-tailed

Killed at any moment, the same command goes on after the last finished epoch, to the same result; SIGTERM and SIGUSR2
are answered by a checkpoint within the epoch and exit code 75. The best epoch is chosen on the validation set; the test
set is looked at once, at the end. `torchrun --nproc-per-node N train_lt.py ...` trains in N processes.

    python train_lt.py --loss bs --curriculum d2s
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import cli
import curricula
import datasets
import distributed
import losses
import optimization
import road
import runs
import spectrum
import tables

DEFAULT_SPECTRUM = Path("runs/spectrum")
DRAWN = ("cifar10_lt", "cifar100_lt", "imagefolder")  # data sets that --imb-ratio draws a part of
SHEET_IMAGES = 32


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "train_lt")
    parser.add_dataset()
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="run folder (default: runs/DATASET_LOSS_CURRICULUM_seedN, with what differs from the data set's defaults)",
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds a run")
    parser.add_argument("--seed", type=cli.whole(0), default=0, metavar="N", help="seed of weights, order and draws")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--workers", type=cli.whole(0), default=4, metavar="N", help="processes that decode large images"
    )
    add_curriculum_flags(parser.add_argument_group("curriculum"))
    add_loss_flags(parser.add_argument_group("loss"))
    add_model_flags(parser.add_argument_group("model and images"))
    add_training_flags(parser.add_argument_group("training"))
    return parser


def add_curriculum_flags(group) -> None:
    group.add_argument(
        "--curriculum",
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
        help="guidance levels to use (default: all of the spectrum)",
    )
    group.add_argument(
        "--level-shares",
        type=cli.number(0),
        nargs="+",
        metavar="SHARE",
        help="time that d2s and s2d give to each level, in ascending order of the levels (default: the same)",
    )
    group.add_argument("--fixed-level", type=cli.level, default=50, metavar="PERCENT", help="the level of fixed")
    group.add_argument(
        "--curriculum-epochs",
        type=cli.whole(0),
        metavar="N",
        help="epochs with synthetic images; those after them are real only",
    )
    group.add_argument(
        "--hard-share",
        type=cli.number(0, 0.99),
        metavar="SHARE",
        help="share of hard classes, real and synthetic, in a curriculum epoch (default: hard classes / all classes)",
    )
    group.add_argument(
        "--balanced",
        action="store_true",
        help="fill every hard class up to one size, instead of drawing from all synthetic images alike",
    )
    group.add_argument(
        "--undersample",
        type=cli.number(0, 1),
        metavar="SHARE",
        help="share of the other real images that a curriculum epoch sees, drawn anew each epoch",
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
        help="real images, drawn uniformly, that adaptive trains on before each look",
    )


def add_loss_flags(group) -> None:
    group.add_argument(
        "--loss",
        choices=losses.LOSSES,
        default="ce",
        help="ce: cross-entropy; bs: Balanced Softmax; focal; ldam: label-distribution-aware margins; la: logit "
        "adjustment",
    )
    group.add_argument(
        "--prior",
        choices=["real", "stage"],
        default="real",
        help="class counts that the losses take: of the real training set, or of the epoch's own images",
    )
    group.add_argument("--focal-gamma", type=cli.number(0), default=2.0, metavar="GAMMA", help="exponent of focal")
    group.add_argument(
        "--ldam-margin", type=cli.number(0), default=0.5, metavar="COSINE", help="ldam's margin of the smallest class"
    )
    group.add_argument(
        "--la-tau", type=cli.number(0), default=1.0, metavar="TAU", help="factor of la's log class shares"
    )
    group.add_argument(
        "--drw", action="store_true", help="deferred re-weighting: classes weighted by their effective number of images"
    )
    group.add_argument(
        "--drw-epoch",
        type=cli.whole(0),
        metavar="N",
        help="epoch from which --drw weights (default: four fifths of --epochs)",
    )
    group.add_argument(
        "--real-weight",
        type=cli.number(0, 1),
        metavar="LAMBDA",
        help="a batch's loss is LAMBDA * that of its real images + (1 - LAMBDA) * that of its synthetic ones "
        "(default: all images weigh the same)",
    )


def add_model_flags(group) -> None:
    group.add_argument(
        "--model",
        metavar="NAME",
        default="resnet32",
        help="classifier: resnet8, 20, 32, 44, 56 for small images, resnet10, 18, 34, 50, 152 for large; timm:NAME",
    )
    group.add_argument("--pretrained", action="store_true", help="start from timm's weights of a timm: model")
    group.add_argument(
        "--init-checkpoint", type=cli.existing_file, metavar="FILE", help="start from these weights of the same model"
    )
    group.add_argument(
        "--image-size", type=cli.whole(8), default=224, metavar="PIXELS", help="side that large images are resized to"
    )
    group.add_argument(
        "--augment",
        choices=["none", "shift", "crop_flip", "resized_crop"],
        default="shift",
        help="shift: by up to 1/8, edges repeated; crop_flip: the same on black, and mirrored; resized_crop: a random "
        "part of a large image, mirrored",
    )
    group.add_argument(
        "--color-jitter",
        type=cli.number(0, 1),
        default=0.0,
        metavar="STRENGTH",
        help="random brightness, contrast and saturation, by a factor of up to 1 +- STRENGTH",
    )
    group.add_argument("--randaugment", action="store_true", help="torchvision's RandAugment of each image")
    group.add_argument(
        "--mix", choices=["none", "cutmix", "mixup"], default="none", help="mix the images of a batch with each other"
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
        "--step-factor", type=cli.number(0, 1), default=0.01, metavar="FACTOR", help="by what steps lowers the rate"
    )
    group.add_argument(
        "--warmup-epochs", type=cli.whole(0), default=0, metavar="N", help="epochs over which the rate rises to --lr"
    )
    group.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast, which GPUs compute faster"
    )
    group.add_argument(
        "--memory-format",
        choices=["contiguous", "channels_last"],
        default="contiguous",
        help="order of a network's values in memory; convolutions are faster with channels_last",
    )
    group.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    group.add_argument(
        "--clip-grad", type=cli.number(0), metavar="NORM", help="longest gradient of a step (default: any length)"
    )
    group.add_argument(
        "--ema",
        type=cli.number(0, 1),
        metavar="DECAY",
        help="evaluate a moving average of the weights, of which each step keeps DECAY (default: the weights)",
    )


def check_flags(args) -> None:
    """Raise UserError where flags do not go together."""
    if args.mix != "none" and args.loss not in losses.MIXABLE:
        raise cli.UserError(f"--mix {args.mix}: --loss {args.loss} takes no mixed labels; expected {losses.MIXABLE}")
    if args.mix != "none" and args.real_weight is not None:
        raise cli.UserError(f"--mix {args.mix}: mixes real with synthetic images; expected no --real-weight")
    if args.mix != "none" and args.drw:
        raise cli.UserError(f"--mix {args.mix}: a mixed image has no one class to weight; expected no --drw")
    if args.drw and args.loss in ("bs", "la"):
        raise cli.UserError(f"--drw: --loss {args.loss} corrects for the class counts itself; expected ce, focal, ldam")
    if args.schedule == "cosine" and args.warmup_epochs >= args.epochs:
        raise cli.UserError(f"--warmup-epochs {args.warmup_epochs}: expected fewer than --epochs {args.epochs}")
    if args.level_shares and args.curriculum not in ("d2s", "s2d"):
        raise cli.UserError(f"--level-shares: --curriculum {args.curriculum} has no stages; expected d2s or s2d")


@dataclass
class Pool:
    """Everything that may be trained on: the real images first, then the synthetic ones by ascending level.

    Attributes:
        images: of all of them (batches.py).
        labels: int64 (N,).
        levels: guidance level in percent, 100 for real images, int (N,).
        held: whether an image is kept out while the curriculum lasts, bool (N,): adaptive looks at it.
        looks: for each level, the places of the held-out images that progress is measured on.
    """

    images: object
    labels: np.ndarray
    levels: np.ndarray
    held: np.ndarray
    looks: dict[int, np.ndarray] = field(default_factory=dict)


def build_pool(args, data: datasets.LongTailed, synthetic: dict[int, datasets.ImageSet], device: str) -> Pool:
    """The pool of a run; for adaptive, some hard images and all synthetic images drawn from them are held out."""
    import batches

    sets = [data.train, *(synthetic[level] for level in sorted(synthetic))]
    labels = np.concatenate([one.labels for one in sets])
    levels = np.repeat([100, *sorted(synthetic)], [len(one) for one in sets])
    pool = Pool(
        batches.build(sets, device, args.image_size, args.workers, args.memory_format, args.randaugment),
        labels,
        levels,
        np.zeros(len(labels), dtype=bool),
    )
    if args.curriculum == "adaptive":
        sources = [source for one in sets for source in one.sources]
        by_level = {level: one.sources for level, one in synthetic.items()}
        label_of = dict(zip(data.train.sources, data.train.labels.tolist(), strict=True))
        chosen = curricula.held_out_sources(by_level, label_of, data.counts, args.progress_images, args.seed)
        pool.held = np.isin(sources, chosen)
        for level in synthetic:
            first = {sources[place]: place for place in np.flatnonzero(pool.held & (levels == level))[::-1]}
            pool.looks[level] = np.array([first[source] for source in chosen])
    return pool


def epoch_data(args, epoch: int, stage: list[int], pool: Pool, is_hard: np.ndarray) -> np.ndarray:
    """The places in the pool of the images that an epoch trains on, before shuffling; `stage` has its levels."""
    real = np.flatnonzero(pool.levels == 100)
    if not stage:
        return real
    real = real[~pool.held[real]]
    candidates = np.flatnonzero(np.isin(pool.levels, stage) & (pool.levels < 100) & ~pool.held)
    share = args.hard_share if args.hard_share is not None else is_hard.mean()
    rng = np.random.default_rng([args.seed, epoch])
    mix = (pool.labels[real], is_hard)
    if args.balanced:
        kept, drawn = datasets.balanced_mix(*mix, pool.labels[candidates], share, args.undersample, rng)
    else:
        kept, drawn = datasets.stage_mix(*mix, len(candidates), share, args.undersample, rng)
    synthetic = candidates[drawn]
    return np.concatenate([real[kept], synthetic[np.argsort(pool.levels[synthetic], kind="stable")]])


class Stopped(Exception):
    """A signal came in the middle of an epoch. `state` is what is needed to go on with its next batch."""

    def __init__(self, state: dict):
        super().__init__()
        self.state = state


@dataclass
class Trainer:
    """What a pass over images needs: the model in its three forms, its optimiser, and the images.

    Attributes:
        model: the module itself, whose weights are saved and looked at.
        step_model: the same module, compiled and wrapped as the flags say.
        average: the moving average of the weights, or None.
    """

    args: object
    data: datasets.LongTailed
    pool: Pool
    model: object
    step_model: object
    average: object
    optimizer: object
    device: str
    signals: runs.StopSignals

    @property
    def evaluated(self):
        """The model whose accuracies are reported."""
        return self.average.module if self.average else self.model

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

        import augmentations

        args, data, device = self.args, self.data, self.device
        classes = len(data.class_names)
        labels = torch.from_numpy(self.pool.labels[places]).to(device)
        synthetic = torch.from_numpy(self.pool.levels[places] < 100).to(device)
        counts = data.counts if args.prior == "real" else np.bincount(self.pool.labels[places], minlength=classes)
        counts = torch.from_numpy(counts).to(device)
        reweighted = args.drw and epoch >= (args.epochs * 4 // 5 if args.drw_epoch is None else args.drw_epoch)
        class_weights = losses.class_balanced_weights(counts).float() if reweighted else None
        mix = augmentations.mixer(args.mix, classes) if args.mix != "none" else None

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
        own = [distributed.share(len(part)) for part in parts]
        images = self.pool.images.training(
            [torch.from_numpy(places)[part[rows]] for part, rows in zip(parts[done:], own[done:], strict=True)],
            [
                torch.arange(begin, begin + len(part))[rows]
                for begin, part, rows in zip(starts[done:], parts[done:], own[done:], strict=False)
            ],
            runs.digest_int("crop", purpose, args.seed, epoch),
        )
        self.step_model.train()
        began = time.monotonic()
        for number, (part, rows, batch) in enumerate(zip(parts[done:], own[done:], images, strict=True), done):
            rate = optimization.learning_rate(args, epoch + number / len(parts), 1 / len(parts))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            part = part.to(device)
            weights = losses.image_weights(labels[part], synthetic[part], class_weights, args.real_weight)
            batch = augmentations.augment(args, batch, generator, len(part), rows)
            batch = augmentations.normalise(batch, data.mean, data.std)
            if args.memory_format == "channels_last":
                batch = batch.contiguous(memory_format=torch.channels_last)
            targets = labels[part][rows]
            if mix:
                batch, targets = mix(batch, targets)
            with torch.autocast(device.split(":")[0], torch.bfloat16, args.precision == "bf16"):
                logits = self.step_model(batch)
            values = losses.per_image(args, logits.float(), targets, counts)
            if rows == slice(None):
                loss = losses.batch_mean(values, weights)
            else:  # gradients are averaged over the processes: their mean is then that of the whole batch
                whole = len(part) if weights is None else weights.sum()
                own_weights = 1 if weights is None else weights[rows]
                loss = distributed.world() * (values * own_weights).sum() / whole
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
                    raise Stopped(state | {"rng": torch.get_rng_state()})
        seconds = time.monotonic() - began
        total = distributed.total(total, device) / distributed.world()
        self.stop_on_bad_loss(total, epoch)
        seen = len(places) - int(starts[done])
        return {
            "loss": total.item() / len(places),
            "lr": rate,
            "images": len(places),
            "synthetic_share": float(synthetic.float().mean()),
            "images_per_second": seen / seconds,
        }

    def stop_on_bad_loss(self, total, epoch: int) -> None:
        """Raise UserError where the sum of an epoch's losses is not finite."""
        if not math.isfinite(total.item()):
            raise cli.UserError(
                f"epoch {epoch}: the loss is not finite; the checkpoint of the epoch before is kept. "
                "Expected a lower --lr"
            )

    def predict(self, store, places: np.ndarray):
        """Logits, float (N, C), of the evaluated model."""
        import evaluation

        distributed.same_buffers(self.evaluated)
        return evaluation.predict(self.evaluated, store, places, self.data, self.device, self.args.precision)

    def look(self) -> dict[int, list[float]]:
        """The true class's probability of each held-out image, by level."""
        import evaluation

        scale = losses.LDAM_SCALE if self.args.loss == "ldam" else 1.0
        return {
            level: evaluation.true_class_probability(
                self.predict(self.pool.images, places), self.pool.labels[places], scale
            ).tolist()
            for level, places in self.pool.looks.items()
        }

    def measure_progress(self, epoch: int, state: dict) -> dict[int, float]:
        """The progress of each level since the last look, after a short pass over uniform real images (DisCL)."""
        args = self.args
        before = state["look"] or self.look()
        real = np.flatnonzero((self.pool.levels == 100) & ~self.pool.held)
        rng = np.random.default_rng([args.seed, epoch, 1])
        if args.real_pass_images:
            self.train(epoch, rng.permutation(real)[: args.real_pass_images], "real pass")
        state["look"] = self.look()
        return {level: curricula.progress_of(before[level], state["look"][level]) for level in before}


def prepare_spectrum(args) -> tuple[list[int], list[int]]:
    """The levels that the curriculum may ask for, and the hard classes; makes the default spectrum if it is missing."""
    if args.spectrum == DEFAULT_SPECTRUM and not (args.spectrum / "scores.csv").exists() and args.dataset == "digits":
        print(f"{args.spectrum}: no finished spectrum there; making it first", flush=True)
        road.make_spectrum(args.spectrum.parent, args.dataset, args.imb_ratio)
    plan = spectrum.read_plan(args.spectrum)
    levels = curricula.needed_levels(args.curriculum, args.levels or plan["levels"], args.fixed_level)
    return levels, plan["hard_classes"]


def finished(args) -> bool:
    """Whether the run that these arguments name is complete."""
    return (run_folder(args) / "results.json").is_file()


def run_folder(args) -> Path:
    """Where a run goes: --out, or a name that its main settings make."""
    return args.out or Path("runs", f"{tables.folder_name(vars(args))}_seed{args.seed}")


def print_gaps(hard_classes: list[int], synthetic: dict[int, datasets.ImageSet], class_names: list[str]) -> None:
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


def write_subset(path: Path, data: datasets.LongTailed) -> None:
    """Which images a long-tailed draw took: split, source, label."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["split", "source", "label"])
    for split in ("train", "val"):
        part = getattr(data, split)
        table.writerows([split, source, label] for source, label in zip(part.sources, part.labels, strict=True))
    runs.write_text(path, text.getvalue())


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_flags(args)
    args.out = run_folder(args)
    data = datasets.load(args.dataset, args.imb_ratio, args.data_root, args.data_seed)
    if args.batch_size > len(data.train):
        raise cli.UserError(f"--batch-size {args.batch_size}: expected at most the {len(data.train)} training images")
    levels, hard_classes, synthetic = [], [], {}
    inputs: dict = {"data": runs.digest_int(*data.train.sources, *data.val.sources, *data.test.sources)}
    if args.curriculum != "none":
        levels, hard_classes = prepare_spectrum(args)
        stage_of(args, 0, levels)
        synthetic = datasets.load_spectrum(args.spectrum, levels, data)
        inputs["spectrum"] = runs.digest_files([args.spectrum / "plan.json", args.spectrum / "scores.csv"])
        print_gaps(hard_classes, synthetic, data.class_names)
    if args.init_checkpoint:
        inputs["init_checkpoint"] = runs.digest_files([args.init_checkpoint])
    main_process = distributed.rank() == 0
    with runs.claim(args.out) if main_process else nullcontext(), runs.StopSignals() as signals:
        if main_process:
            complete = runs.open_run(args.out, args, inputs, args.overwrite)
        else:
            complete = (args.out / "results.json").exists() and not args.overwrite
        if complete:
            print(f"{args.out}: already complete")
            return 0
        if main_process and args.dataset in DRAWN and args.imb_ratio is not None:
            write_subset(args.out / "subset.csv", data)
        trainer, state = prepare(args, data, synthetic, signals)
        code = fit(trainer, state, levels, np.isin(np.arange(len(data.class_names)), hard_classes))
        distributed.stop()
    return code


def prepare(args, data, synthetic: dict, signals: runs.StopSignals) -> tuple[Trainer, dict]:
    """The model, its optimiser and the images on the device, and the run's state: new, or its last checkpoint's."""
    import torch

    import models

    device = distributed.start(models.pick_device(args.device))
    torch.manual_seed(runs.digest_int("weights", args.seed))
    size = data.train.images.shape[1] if data.train.in_memory else args.image_size
    model = models.build_classifier(args.model, len(data.class_names), size, args.pretrained, args.loss == "ldam")
    if args.init_checkpoint:
        models.load_weights(model, args.init_checkpoint)
    model = distributed.synchronised(model.to(device), device)
    if args.memory_format == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    optimizer = optimization.build_optimizer(args, model)
    average = optimization.moving_average(model, args.ema) if args.ema is not None else None

    state = {
        "epoch": 0,
        "history": [],
        "seconds": 0.0,
        "best": {"epoch": -1, "val_overall": -1.0, "model": {}},
        "look": None,
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
    step_model = distributed.wrap(torch.compile(model) if args.compile else model, device)
    pool = build_pool(args, data, synthetic, device)
    return Trainer(args, data, pool, model, step_model, average, optimizer, device, signals), state


def fit(trainer: Trainer, state: dict, levels: list[int], is_hard: np.ndarray) -> int:
    """Train to the end, a checkpoint each epoch, and write the results. Returns the script's exit code."""
    import evaluation

    args, data, signals = trainer.args, trainer.data, trainer.signals
    main_process = distributed.rank() == 0
    writer = open_writer(args.out, state["epoch"]) if main_process else None
    val = build_store(args, data.val, trainer.device)

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
            if partial:
                progress = partial["progress"]
            elif args.curriculum == "adaptive" and epoch < args.curriculum_epochs:
                progress = trainer.measure_progress(epoch, state)
            else:
                progress = None
            stage = stage_of(args, epoch, levels, progress)
            places = epoch_data(args, epoch, stage, trainer.pool, is_hard)
            if main_process and (not state["history"] or state["history"][-1]["levels"] != (stage or [100])):
                writer.add_image("train/images", sheet(trainer, epoch, places), epoch, dataformats="HWC")
            try:
                record = trainer.train(epoch, places, start=partial)
            except Stopped as stop:
                state["partial"] = stop.state | {"progress": progress}
                state["seconds"] += time.monotonic() - began
                save()
                return stopped(f"in epoch {epoch}, after batch {stop.state['batches']}")
            found = evaluation.accuracies(trainer.predict(val, np.arange(len(data.val))), data.val.labels, data.groups)
            if found["overall"] > state["best"]["val_overall"]:
                state["best"] = {
                    "epoch": epoch,
                    "val_overall": found["overall"],
                    "model": {name: value.clone() for name, value in trainer.evaluated.state_dict().items()},
                }
            state["history"].append(
                {
                    "epoch": epoch,
                    "levels": stage or [100],
                    **record,
                    **{f"val_{name}": found[name] for name in ("overall", *data.groups)},
                    **({"progress": {str(level): value for level, value in progress.items()}} if progress else {}),
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
    finish(trainer, state, writer)
    return 0


def build_store(args, part: datasets.ImageSet, device: str):
    """The images of one split, for evaluation."""
    import batches

    return batches.build([part], device, args.image_size, args.workers, args.memory_format)


def open_writer(folder: Path, epoch: int):
    """TensorBoard's writer; what a killed run wrote of this epoch and later ones is taken back."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=epoch)


def sheet(trainer: Trainer, epoch: int, places: np.ndarray) -> np.ndarray:
    """A picture of some of an epoch's training images before augmentation, half of them synthetic if it has any."""
    import figures

    pool, data = trainer.pool, trainer.data
    rng = np.random.default_rng([trainer.args.seed, epoch, 2])
    chosen = rng.permutation(places)
    real, synthetic = (chosen[(pool.levels[chosen] == 100) == kind] for kind in (True, False))
    half = min(len(synthetic), SHEET_IMAGES // 2)
    chosen = np.concatenate([synthetic[:half], real[: SHEET_IMAGES - half]])
    images = [
        image.permute(1, 2, 0).cpu().numpy() for part in pool.images.evaluation(chosen, len(chosen)) for image in part
    ]
    captions = [
        ("real" if pool.levels[place] == 100 else f"level {pool.levels[place]}", data.class_names[pool.labels[place]])
        for place in chosen
    ]
    return figures.sheet(images, captions)


def log(writer, epoch: int, record: dict) -> None:
    """The TensorBoard scalars of an epoch."""
    for name in ("loss", "lr", "images_per_second", "synthetic_share"):
        writer.add_scalar(f"train/{name}", record[name], epoch)
    writer.add_scalar("curriculum/level", np.mean(record["levels"]), epoch)
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


def finish(trainer: Trainer, state: dict, writer) -> None:
    """Test the last and the best-by-validation weights, and write what the run leaves."""
    import evaluation

    args, data = trainer.args, trainer.data
    test, places = build_store(args, data.test, trainer.device), np.arange(len(data.test))
    logits = trainer.predict(test, places)
    last = evaluation.accuracies(logits, data.test.labels, data.groups)
    trainer.evaluated.load_state_dict(state["best"]["model"])
    best = evaluation.accuracies(trainer.predict(test, places), data.test.labels, data.groups)
    if not writer:
        return
    images = sum(record["images"] for record in state["history"])
    results = {
        "last": last | {"epoch": args.epochs - 1},
        "best_by_val": best | {"epoch": state["best"]["epoch"], "val_overall": state["best"]["val_overall"]},
        "train_counts": data.counts.tolist(),
        "class_names": data.class_names,
        "validation": data.note,
        "images": images,
        "seconds": state["seconds"],
        "images_per_second": images / state["seconds"],
    }
    np.savez(args.out / "predictions.npz", logits=logits.numpy(), labels=data.test.labels)
    if len(data.groups["few"]):
        import figures

        counts = evaluation.confusion(logits, data.test.labels)
        figures.draw_confusion(counts, data.groups["few"], data.class_names, args.out / "confusion.png")
        picture = np.asarray(datasets.read_image(args.out / "confusion.png"))
        writer.add_image("test/confusion", picture, args.epochs - 1, dataformats="HWC")
    metrics = {f"test/{name}": last[name] for name in ("overall", *data.groups) if last[name] is not None}
    for name, value in metrics.items():
        writer.add_scalar(name, value, args.epochs - 1)
    log_hparams(writer, args, metrics)
    writer.close()
    runs.write_text(args.out / "history.jsonl", "".join(json.dumps(record) + "\n" for record in state["history"]))
    runs.write_json(args.out / "results.json", results)
    shown = ", ".join(f"{name.removeprefix('test/')} {value:.1f}" for name, value in metrics.items())
    print(f"{args.out}: test accuracy % after the last epoch: {shown}")


if __name__ == "__main__":
    cli.run(main)
