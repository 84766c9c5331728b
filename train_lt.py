"""Step 5a: train a classifier on a long-tailed data set with a generative curriculum.

Each epoch of the curriculum trains on a share of the real images and on synthetic images of the levels that the
curriculum names; the epochs after it train on all real images (DisCL; curricula.py has the rules).

Reads:  the data set, a filtered spectrum folder (none is needed for --curriculum none; digits' default one is made
        first if it is missing)
Writes: OUT/args.json, checkpoint.pt and the one before it, TensorBoard events, history.jsonl, predictions.npz,
        confusion.png (of up to 1,000 classes), results.json, and subset.csv where a data set was made long-tailed

After a kill, the same command resumes after the last finished epoch, to the same result; SIGTERM and SIGUSR2
are answered by a checkpoint within the epoch and exit code 75. The best epoch is chosen by the mean of the classes'
accuracies on the validation set; the test set is evaluated once, at the end. `torchrun --nproc-per-node N train_lt.py
...` trains in N processes.

    python train_lt.py --loss bs --curriculum d2s
"""

from __future__ import annotations

import argparse
import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import curricula
import datasets
from curricula import REAL
from loaders.base import DataSet, ImageSet
from loaders.pictures import read_image
from reporting import names
from runtime import cli, files
from runtime.signals import StopSignals
from spectrum import folder as spectrum_folder
from spectrum.kept import load_spectrum
from training import additions, distributed, epochs, flags, log, loop, losses, optimization
from training.pool import (
    build_pool,
    check_files,
    describe_splits,
    method_of,
    prepare_spectrum,
    print_gaps,
    say_unused_spectrum,
)

# Data sets that --imb-ratio draws a part of.
DRAWN = ("cifar10_lt", "cifar100_lt", "cifar100_lt_20", "cifar100_lt_20_plus_web", "imagefolder")
MOST_CONFUSED = 1000  # classes that confusion.png is drawn for: of more, columns are narrower than a pixel


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "train_lt")
    datasets.add_flags(parser)
    flags.add_run_flags(parser)
    add_curriculum_flags(parser.add_argument_group("curriculum"))
    group = parser.add_argument_group("additions")
    additions.add_edit_flags(group)
    additions.add_real_flags(group)
    flags.add_loss_flags(parser.add_argument_group("loss"))
    flags.add_model_flags(parser.add_argument_group("model and images"))
    add_training_flags(parser.add_argument_group("training"))
    return parser


def add_curriculum_flags(group) -> None:
    flags.add_curriculum_flags(group)
    flags.add_method_flag(group)
    group.add_argument(
        "--hard-share",
        type=cli.number(0, 0.99),
        metavar="SHARE",
        help="share of hard classes in a curriculum epoch's images, real and synthetic (default: the share "
        "that hard classes are of all classes)",
    )
    group.add_argument(
        "--fill",
        choices=["uniform", "balanced"],
        default="uniform",
        help="draw from all images of the stage's levels alike, or fill every hard class up to one size",
    )
    group.add_argument(
        "--keep-others",
        type=cli.number(0, 1),
        metavar="SHARE",
        help="share of the real images of other classes that a curriculum epoch keeps, drawn anew each epoch",
    )
    # Spellings of older versions, accepted and not shown.
    old = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    group.add_argument("--balanced", action="store_const", const="balanced", dest="fill", **old)
    group.add_argument("--undersample", type=cli.number(0, 1), dest="keep_others", **old)


def add_training_flags(group) -> None:
    flags.add_training_flags(group)
    group.add_argument(
        "--memory-format",
        choices=["contiguous", "channels_last"],
        default="contiguous",
        help="order of a network's values in memory; convolutions are faster with channels_last",
    )
    group.add_argument(
        "--cuda-graph",
        choices=["auto", "on", "off"],
        default="auto",
        help="take a step as one CUDA graph; auto: on one GPU, without --mix",
    )
    group.add_argument(
        "--ema",
        type=cli.number(0, 1),
        metavar="DECAY",
        help="evaluate a moving average of the weights that keeps DECAY of itself at each step (default: no average)",
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
    if args.class_weights != "none" and (args.drw or args.loss != "ce" or args.mix != "none"):
        raise cli.UserError("--class-weights inverse: expected --loss ce, without --drw and --mix")
    if args.leave_out and args.curriculum != "none":
        raise cli.UserError("--leave-out: expected --curriculum none, a base model for filter_edits.py")
    if args.cuda_graph == "on" and args.mix != "none":
        raise cli.UserError(f"--cuda-graph on: --mix {args.mix} draws anew in each step; expected auto or off")
    if args.ema == 1:
        raise cli.UserError("--ema 1: an average that never moves; expected less than 1, such as 0.999")
    additions.check_flags(args)
    flags.check_flags(args)


@dataclass
class Trainer(loop.Trainer):
    """A classifier's training on a long-tailed data set.

    Attributes:
        is_hard: whether a class is hard, bool (C,).
        val: the validation images (training/stores.py).
        learned: the level of learning of each class, int (C,), which --augment cuda goes by; None without it.
        wanted: with --add, edits of each class in an epoch, int (C,); None for one of every source.
    """

    is_hard: np.ndarray
    val: object
    learned: np.ndarray | None = None
    wanted: np.ndarray | None = None

    def __post_init__(self):
        self.softmax_scale = losses.softmax_scale(self.args.loss)

    def batch_loss(self, batch: loop.Batch):
        """See training.Trainer."""
        import torch

        from training import augmentations

        args, data, rows = self.args, self.data, batch.rows
        counts = batch.constants["counts"]
        weights = losses.image_weights(
            batch.labels, batch.synthetic, batch.constants.get("class_weights"), args.real_weight
        )

        # Augment the images, and mix them with each other.
        images = augmentations.augment(args, batch.images, batch.draws, rows)
        images = augmentations.normalise(images, data.mean, data.std)
        if args.memory_format == "channels_last":
            images = images.contiguous(memory_format=torch.channels_last)
        targets = batch.labels[rows]
        if args.mix != "none":
            images, targets = augmentations.mixer(args.mix, len(data.class_names))(images, targets)

        # The loss of each, and of all.
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, args.precision == "bf16"):
            logits = self.step_model(images)
        values = losses.per_image(args, logits.float(), targets, counts)
        if rows == slice(None):
            return losses.batch_mean(values, weights)
        # Gradients are averaged over the processes: their mean is then that of the whole batch.
        whole = len(batch) if weights is None else weights.sum()
        return distributed.world() * (values * (1 if weights is None else weights[rows])).sum() / whole

    def draw(self, count: int, generator) -> dict:
        """See training.Trainer."""
        from training import augmentations

        return augmentations.draw(self.args, self.pool.images.side, count, generator, not self.data.train.in_memory)

    def constants(self, this: loop.Pass) -> dict:
        """See training.Trainer: the class counts, and the classes' weights where they have any."""
        counts = self.class_counts(this)
        weights = self.class_weights(this, counts)
        return {"counts": counts} | ({} if weights is None else {"class_weights": weights})

    def class_counts(self, this: loop.Pass):
        """The class counts that the losses take, (C,), on the device: of the real training set or of the pass."""
        import torch

        counts = self.counts_of(this) if self.args.prior == "stage" else self.data.counts
        return torch.from_numpy(counts).to(self.device)

    def counts_of(self, this: loop.Pass) -> np.ndarray:
        """The images of each class in a pass, int (C,)."""
        return np.bincount(self.pool.labels[this.places], minlength=len(self.data.class_names))

    def class_weights(self, this: loop.Pass, counts):
        """The weights of the classes, float (C,): of deferred re-weighting from its epoch on, or --class-weights."""
        import torch

        args, epoch = self.args, this.epoch
        if args.class_weights == "inverse":
            return losses.inverse_weights(torch.from_numpy(self.counts_of(this)).to(self.device))
        start = args.epochs * 4 // 5 if args.drw_epoch is None else args.drw_epoch
        return losses.class_balanced_weights(counts).float() if args.drw and epoch >= start else None

    def begin_epoch(self, epoch: int, state: dict) -> None:
        """See training.Trainer: with --augment cuda, try the model on each class and move its level of learning."""
        if self.learned is None:
            return
        from training import class_augmentation, evaluation

        args, pool, classes = self.args, self.pool, len(self.data.class_names)
        real = np.flatnonzero((pool.levels == REAL) & ~pool.held)
        chosen, strengths = class_augmentation.trial(
            pool.labels[real], self.learned, np.random.default_rng([args.seed, epoch, 3])
        )
        seed = files.digest_int("trial", args.seed, epoch)
        distributed.same_buffers(self.model)
        predicted = evaluation.predict(
            self.model, pool.images, real[chosen], self.data, self.device, args.precision,
            augmentation=(strengths, seed), keep=lambda logits: logits.argmax(1, keepdim=True), width=1,
            between=self.stop_on_signal,
        )  # fmt: skip
        labels = pool.labels[real][chosen]
        right, tried = (
            class_augmentation.counted(labels, strengths, rows, classes)
            for rows in (predicted[:, 0].numpy() == labels, np.ones(len(labels), dtype=bool))
        )
        self.learned = class_augmentation.updated(self.learned, right, tried)
        state["learned"] = self.learned.tolist()

    def strengths(self, epoch: int, places: np.ndarray, purpose: str) -> np.ndarray | None:
        """See training.Trainer."""
        if self.learned is None:
            return None
        from training import class_augmentation

        rng = np.random.default_rng(files.digest_int("strengths", purpose, self.args.seed, epoch))
        return class_augmentation.epoch_strengths(self.pool.labels[places], self.learned, rng)

    def epoch_figures(self) -> dict[str, float]:
        """The mean level of learning, over all classes and over each group."""
        if self.learned is None:
            return {}
        groups = {"overall": slice(None)} | {name: own for name, own in self.data.groups.items() if len(own)}
        return {f"cuda_{name}": float(self.learned[own].mean()) for name, own in groups.items()}

    def epoch_places(self, epoch: int, stage: list[int]) -> np.ndarray:
        """See training.Trainer."""
        args = self.args
        places = self.mixed_places(epoch, stage)
        if args.epoch_images:
            places = curricula.repeat_to(places, args.epoch_images, np.random.default_rng([args.seed, epoch, 4]))
        return places

    def mixed_places(self, epoch: int, stage: list[int]) -> np.ndarray:
        """The real and the synthetic images of an epoch: by --add, or as the curriculum mixes them."""
        args, pool = self.args, self.pool
        if args.add and stage:
            return additions.place_additions(args, pool, stage, self.wanted, epoch)
        share = args.hard_share if args.hard_share is not None else self.is_hard.mean()
        rng = np.random.default_rng([args.seed, epoch])
        return curricula.long_tail_epoch(
            pool.levels,
            pool.labels,
            pool.held,
            self.is_hard,
            stage,
            share,
            args.keep_others,
            args.fill == "balanced",
            rng,
        )

    def predict(self, store, places: np.ndarray, **kept):
        """Logits, float (N, C), of the evaluated model, or what is kept of them (`evaluation.predict`)."""
        from training import evaluation

        distributed.same_buffers(self.evaluated)
        return evaluation.predict(
            self.evaluated, store, places, self.data, self.device, self.args.precision, between=self.stop_on_signal,
            **kept,
        )  # fmt: skip

    def predict_classes(self, store, images: int) -> np.ndarray:
        """The class of each of the first images of a store, int (N,): the logits of iNaturalist's take gigabytes."""
        from training import evaluation

        kept = self.predict(store, np.arange(images), keep=evaluation.top_class, width=1)
        return kept[:, 0].numpy().astype(np.int64)

    def validate(self) -> dict[str, float | None]:
        """Accuracies in percent: overall, of each group of classes, and the mean over classes (macro), which epochs are
        chosen by: a validation set held out of a long-tailed one is long-tailed too."""
        from training import evaluation

        val, groups = self.data.val, self.data.groups
        predicted = self.predict_classes(self.val, len(val))
        found = evaluation.accuracies(predicted, val.labels, len(self.data.class_names), groups)
        figures = {name: found[name] for name in ("overall", *groups)}
        by_domain = additions.group_figures(self.data, val, predicted)
        figures |= {name: by_domain[name] for name in ("id", "ood", "balanced", "worst_group") if name in by_domain}
        return figures | {"macro": evaluation.macro_accuracy(found["per_class"])}

    def finish(self, state: dict, writer) -> None:
        """Test the last and the best-by-validation weights, and write what the run leaves."""
        args, data = self.args, self.data
        test = build_store(args, [data.test], self.device)
        logits = self.predict(test, np.arange(len(data.test)))
        predicted = logits.argmax(1).numpy()
        last = additions.test_figures(data, predicted)
        self.evaluated.load_state_dict(state["best"]["model"])
        best = additions.test_figures(data, self.predict_classes(test, len(data.test)))
        if not writer:
            return
        results = {
            "last": last | {"epoch": args.epochs - 1},
            "best_by_val": best | {"epoch": state["best"]["epoch"], "val_macro": state["best"]["figure"]},
            "train_counts": data.counts.tolist(),
            "class_names": data.class_names,
            "validation": data.note,
            **({"domain_names": data.domain_names} if "per_group" in last else {}),
        }
        additions.say_untested_groups(data, last)
        files.write_arrays(args.out / "predictions.npz", logits=logits.numpy(), labels=data.test.labels)
        if len(data.groups["few"]) and len(data.class_names) <= MOST_CONFUSED:
            with log.decoration("confusion.png"):
                self.show_confusion(predicted, writer)
        named = ("overall", *data.groups, "macro_f1", "id", "ood", "balanced", "worst_group")
        metrics = {f"test/{name}": last[name] for name in named if last.get(name) is not None}
        epochs.write_results(self, state, writer, results, metrics)
        shown = ", ".join(f"{name.removeprefix('test/')} {value:.1f}" for name, value in metrics.items())
        print(f"{args.out}: test accuracy % after the last epoch: {shown}")

    def show_confusion(self, predicted: np.ndarray, writer) -> None:
        """confusion.png, which TensorBoard shows too: what the few-shot classes' test images are taken for."""
        from reporting import figures
        from training import evaluation

        path = self.args.out / "confusion.png"
        few, names = self.data.groups["few"], self.data.class_names
        counts = evaluation.confusion(predicted, self.data.test.labels, len(names), few)
        figures.draw_confusion(counts, few, names, path)
        writer.add_image("test/confusion", np.asarray(read_image(path)), self.args.epochs - 1, dataformats="HWC")


def finished(args) -> bool:
    """Whether the run that these arguments name is complete."""
    return (run_folder(args) / "results.json").is_file()


def run_folder(args) -> Path:
    """Where a run goes: --out, or a name that its main settings make."""
    name = names.folder_name(vars(args), datasets.DEFAULTS[args.dataset], "train_lt")
    return args.out or Path("runs", f"{name}_seed{args.seed}")


def write_subset(path: Path, data: DataSet) -> None:
    """Which images a long-tailed draw took: split, source, label."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["split", "source", "label"])
    for split in ("train", "val"):
        part = getattr(data, split)
        table.writerows([split, source, label] for source, label in zip(part.sources, part.labels, strict=True))
    files.write_text(path, text.getvalue())


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_flags(args)
    args.out = run_folder(args)
    args.device = distributed.start(args.device)
    say_unused_spectrum(args, parser)
    import models  # takes seconds

    models.check_classifier(args.model, args.pretrained)
    # Load the data set.
    data = datasets.load(args.dataset, args.imb_ratio, args.data_root, args.data_seed)
    if args.extra_real or args.leave_out:
        data = additions.choose_training_images(args, data)
    wanted = additions.count_wanted(args, data) if args.add else None
    if args.augment == "resized_crop" and data.train.in_memory:
        raise cli.UserError(
            f"--augment resized_crop: crops image files, and {args.dataset} has small images; expected crop_flip or "
            "shift"
        )
    if args.batch_size > len(data.train):
        raise cli.UserError(f"--batch-size {args.batch_size}: expected at most the {len(data.train)} training images")
    # Load the spectrum, and digest all inputs.
    levels, hard_classes, synthetic = [], [], {}
    inputs: dict = {"data": files.digest_int(*data.train.sources, *data.val.sources, *data.test.sources)}
    splits = describe_splits({"train": data.train, "val": data.val, "test": data.test}, len(data.class_names))
    if args.curriculum != "none":
        levels, hard_classes = prepare_spectrum(args)
        method = method_of(args)
        args.method = None if method == "untuned" else method  # as runs and recipes without the flag have it
        if len(hard_classes) == len(data.class_names) and not args.add:
            raise cli.UserError(
                f"{args.spectrum}: every class has hard images, so that a stage has no others to mix them with; "
                "expected --add, a spectrum of some classes (find_hard.py --rule few), or train_iwildcam.py, which "
                "replaces hard images"
            )
        epochs.stage_of(args, 0, levels)
        drawn = [level for level in levels if level < REAL]
        synthetic = load_spectrum(args.spectrum, drawn, data, rules=args.edit_rules)
        if args.add:
            args.edits = additions.check_edits(args)
        inputs["spectrum"] = files.digest_files(spectrum_folder.decisive_files(args.spectrum))
        print_gaps(args, hard_classes, synthetic, data.class_names)
    if args.init_checkpoint:
        inputs["init_checkpoint"] = files.digest_files([args.init_checkpoint])
    check_files(args, data.splits)

    # Train.
    def begin(signals: StopSignals) -> tuple[Trainer, dict]:
        if distributed.rank() == 0 and args.dataset in DRAWN and args.imb_ratio is not None:
            write_subset(args.out / "subset.csv", data)
        trainer, state = prepare(args, data, synthetic, levels, hard_classes, signals)
        trainer.wanted = wanted
        return trainer, state

    return epochs.run(args, inputs, splits, begin)


def prepare(
    args, data: DataSet, synthetic: dict, levels: list[int], hard_classes: list[int], signals: StopSignals
) -> tuple[Trainer, dict]:
    """The model, its optimiser and the images on the device, and the run's state: new, or its last checkpoint's."""
    import torch

    import models
    from runtime.device import check_bfloat16, pick_device
    from training.graphs import build_graph

    device = pick_device(args.device)
    check_bfloat16(args.precision, device)
    torch.manual_seed(files.digest_int("weights", args.seed))
    # Build the model.
    size = data.train.images.shape[1] if data.train.in_memory else args.image_size
    model = models.build_classifier(args.model, len(data.class_names), size, args.pretrained, args.loss == "ldam")
    data = models.with_own_statistics(data, args.model, args.pretrained)
    if args.init_checkpoint:
        models.load_weights(model, args.init_checkpoint)
    model = distributed.synchronised(model.to(device), device)
    if args.memory_format == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    optimizer = optimization.build_optimizer(args, model)
    average = optimization.moving_average(model, args.ema) if args.ema is not None else None

    state = epochs.start_or_resume(args, model, optimizer, average, device)
    step_model = distributed.wrap(torch.compile(model) if args.compile else model, device)
    # Build the pool of real and synthetic images.
    pool = build_pool(args, data, synthetic, levels, lambda sets: build_store(args, sets, device, args.randaugment))
    is_hard = np.isin(np.arange(len(data.class_names)), hard_classes)
    trainer = Trainer(
        args, data, levels, pool, model, step_model, average, optimizer, device, signals, is_hard,
        build_store(args, [data.val], device),
        np.array(state.setdefault("learned", [0] * len(data.class_names))) if args.augment == "cuda" else None,
    )  # fmt: skip
    trainer.step_graph = build_graph(trainer)
    return trainer, state


def build_store(args, sets: list[ImageSet], device: str, randaugment: bool = False):
    """The images of some sets as one store (training/stores.py)."""
    from training import stores

    crop = stores.crop_of(args.augment)
    return stores.build(sets, device, args.image_size, args.workers, args.memory_format, randaugment, crop)


if __name__ == "__main__":
    cli.run(main)
