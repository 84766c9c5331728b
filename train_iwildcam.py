"""Step 5b: fine-tune a CLIP on camera-trap images of low quality, with a generative curriculum.

FLYP: the CLIP's own contrastive loss on (image, caption) pairs, and a zero-shot head rebuilt from the tuned text tower.
In the epochs of the curriculum all accepted synthetic images of the stage's levels replace the hard real images; the
epochs after it train on all real images (DisCL, Algorithm 2).

Reads:  the data set (iwildcam: WILDS's folder; cameratraps: your own in the same layout; toycam is drawn if it is not
        there), a CLIP, a filtered spectrum folder (none is needed for --curriculum none; toycam's default one is made
        first if it is missing)
Writes: OUT/args.json, checkpoint.pt and the one before it, TensorBoard events, history.jsonl, predictions.npz (logits
        and labels of both test sets), per_class.csv, per_location.csv, for adaptive progress.png, clip.safetensors
        (find_hard.py takes it: --clip ARCHITECTURE:FILE), results.json: accuracy and macro-F1 out of domain (OOD: test)
        and in domain (ID: id_test), of the last epoch, of the best by id_val, of WiSE-FT, and of zero-shot

After a kill, the same command resumes after the last finished epoch, to the same result; SIGTERM and SIGUSR2
are answered by a checkpoint within the epoch and exit code 75. `torchrun --nproc-per-node N train_iwildcam.py ...`
trains in N processes, with the loss of the whole batch.

    python train_iwildcam.py --dataset toycam --curriculum adaptive
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import curricula
import datasets
from curricula import REAL
from loaders.base import ImageSet
from reporting import names
from runtime import cli, files
from runtime.signals import StopSignals
from spectrum import folder as spectrum_folder
from spectrum.kept import load_spectrum
from training import additions, distributed, epochs, flags, log, loop, losses, optimization
from training.pool import build_pool, check_files, describe_splits, prepare_spectrum, say_unused_spectrum

LOSSES = ("flyp", "ce", "lpft")
ALPHAS = [i / 10 for i in range(11)]  # of WiSE-FT
UNREADABLE_SHARE = 0.01  # of an epoch's images that may be unreadable: more is a broken download or disk
FIGURES = ("ood_f1", "ood_acc", "id_f1", "id_acc")  # of a test


def curriculum_name(text: str) -> str:
    """The argparse type of a curriculum; e2h (easy to hard) is what low-quality data calls d2s."""
    return "d2s" if text == "e2h" else text


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "train_iwildcam")
    datasets.add_flags(parser, "toycam", datasets.CAMERA_TRAPS)
    flags.add_run_flags(parser)
    group = parser.add_argument_group("curriculum")
    flags.add_curriculum_flags(group, curriculum_name)
    group.add_argument(
        "--per-hard-image",
        type=cli.whole(1),
        metavar="N",
        help="draw at most N synthetic images, anew each epoch, in place of a hard one, and keep the hard images that "
        "have none (default: all accepted images of the epoch's levels in place of all hard images)",
    )
    additions.add_edit_flags(parser.add_argument_group("additions"))
    group = parser.add_argument_group("model and loss")
    group.add_argument(
        "--clip",
        default="ViT-B-16:openai",
        metavar="NAME",
        help="open_clip model: ARCHITECTURE:TAG, ARCHITECTURE:FILE, hf-hub:NAME or folder",
    )
    group.add_argument(
        "--templates",
        nargs="+",
        default=["a photo of {}."],
        metavar="TEXT",
        help="captions, with {} for the class name: each image has one of them, the zero-shot head all",
    )
    group.add_argument(
        "--loss",
        choices=LOSSES,
        default="flyp",
        help="flyp: contrastive; ce: cross-entropy of a linear head that starts as the zero-shot one; lpft: the same "
        "after the head alone was fitted to the untuned CLIP (linear probe, then fine-tuning)",
    )
    group.add_argument(
        "--merge-same-class",
        action="store_true",
        help="flyp: captions of one class are targets of all its images, instead of each image's own alone",
    )
    group.add_argument(
        "--grad-checkpointing",
        action="store_true",
        help="recompute activations to save memory",
    )
    flags.add_training_flags(parser.add_argument_group("training"))
    return parser


def check_flags(args) -> None:
    """Raise UserError where flags do not go together."""
    if any("{}" not in template for template in args.templates):
        raise cli.UserError("--templates: expected texts with {}, where the class name goes")
    if args.merge_same_class and args.loss != "flyp":
        raise cli.UserError(f"--merge-same-class: --loss {args.loss} has no captions; expected flyp")
    additions.check_flags(args)
    flags.check_flags(args)


@dataclass
class Trainer(loop.Trainer):
    """A CLIP's fine-tuning on camera traps.

    Attributes:
        tokens: of every class's captions (clip.captions_of), int (C * T, length), on the device.
        zero_shot: the weights before any training, on the CPU, with the zero-shot head where there is a linear one.
        source_ids: a number for each image of the pool, the same for those of one source, int (N,).
        is_hard: whether an image of the pool is a hard real one or was made from one, bool (N,).
        stores: the images of the splits to evaluate on.
        wanted: with --add, edits of each class in an epoch, int (C,); None for one of every source.
    """

    tokens: object
    zero_shot: dict
    source_ids: np.ndarray
    is_hard: np.ndarray
    stores: dict[str, object]
    wanted: np.ndarray | None = None

    chosen_by = "id_f1"

    def batch_loss(self, batch: loop.Batch):
        """See training.Trainer."""
        import torch

        from training.augmentations import normalise

        # Leave out what cannot be read.
        unreadable = self.pool.images.unreadable
        own = batch.own_places.tolist()
        readable = torch.tensor([place not in unreadable for place in own])
        batch.of.unreadable += [place for place in own if place in unreadable]
        self.stop_on_unreadable(batch.of.unreadable, len(batch.of.places))
        keep = slice(None)
        if distributed.world() > 1 or not readable.all():
            keep = distributed.gathered(readable.float().to(self.device), batch.rows, len(batch)) > 0
        if distributed.world() > 1:  # the first process, which writes the checkpoint, has to know of all
            for place in batch.of.places[batch.numbers[~keep.cpu()].numpy()].tolist():
                unreadable.setdefault(place, "another process could not read it")

        images = normalise(batch.images, self.data.mean, self.data.std)
        if self.args.loss == "flyp":
            return self.contrastive_loss(batch, images, keep)
        return self.head_loss(batch, images, readable, keep)

    def contrastive_loss(self, batch: loop.Batch, images, keep):
        """FLYP's loss of the batch's pairs that `keep` selects; each image has one caption of its class, at random."""
        import torch

        templates, rows = len(self.args.templates), batch.rows
        drawn = torch.randint(templates, (len(batch),), generator=batch.generator)
        captions = batch.labels.cpu() * templates + drawn
        # Many images of a batch share a caption: the text tower reads each once.
        unique, of_image = captions[rows].unique(return_inverse=True)
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, self.args.precision == "bf16"):
            image, text, scale = self.step_model(images, self.tokens[unique.to(self.device)])
            text = text[of_image.to(self.device)]
        image, text = (distributed.gathered(one, rows, len(batch))[keep] for one in (image, text))
        return losses.contrastive(image, text, scale, batch.labels[keep] if self.args.merge_same_class else None)

    def head_loss(self, batch: loop.Batch, images, readable, keep):
        """The cross-entropy of the linear head, over the batch's images that can be read."""
        import torch
        from torch.nn import functional as F

        with torch.autocast(self.device.split(":")[0], torch.bfloat16, self.args.precision == "bf16"):
            logits = self.step_model(images)
        values = F.cross_entropy(logits, batch.labels[batch.rows], reduction="none") * readable.to(self.device)
        # Gradients are averaged over the processes: their mean is then that of the whole batch.
        share = distributed.world() if batch.rows != slice(None) else 1
        return share * values.sum() / (len(batch) if isinstance(keep, slice) else keep.sum())

    def stop_on_unreadable(self, wrong: list[int], images: int) -> None:
        """Raise UserError where those at `wrong`, this process's part of a pass over `images`, are too many."""
        if len(wrong) > max(1, UNREADABLE_SHARE * images / distributed.world()):
            raise cli.UserError(
                f"{len(wrong)} training images cannot be read: more than {UNREADABLE_SHARE:.0%} of the {images} of an "
                f"epoch; the first: {self.pool.images.unreadable[wrong[0]]}"
            )

    def unreadable_files(self) -> list[str]:
        """The training images that this run has found unreadable, in any process."""
        import torch

        store = self.pool.images
        wrong = torch.zeros(len(store.paths))
        wrong[list(store.unreadable)] = 1
        return sorted(
            str(store.paths[place]) for place in distributed.total(wrong, self.device).nonzero()[:, 0].tolist()
        )

    def epoch_places(self, epoch: int, stage: list[int]) -> np.ndarray:
        """See training.Trainer."""
        args, pool = self.args, self.pool
        if args.add and stage:
            return additions.place_additions(args, pool, stage, self.wanted, epoch)
        rng = np.random.default_rng([args.seed, epoch])
        return curricula.replaced_epoch(
            pool.levels, self.source_ids, pool.held, self.is_hard, stage, args.per_hard_image, rng
        )

    def predict(self, store, places: np.ndarray):
        """Logits, float (N, C), of the model with its linear head, or the zero-shot one that its text tower makes."""
        import torch

        from training import clip as clip_tuning
        from training import evaluation

        distributed.same_buffers(self.model)
        weight = None
        if self.args.loss == "flyp":
            with torch.autocast(self.device.split(":")[0], torch.bfloat16, self.args.precision == "bf16"):
                weight = clip_tuning.zero_shot_head(self.model, self.tokens, len(self.data.class_names))
        classifier = clip_tuning.Classifier(self.model, weight)
        return evaluation.predict(
            classifier, store, places, self.data, self.device, self.args.precision, between=self.stop_on_signal
        )

    def figures(self, split: str) -> tuple[dict[str, float], np.ndarray]:
        """Macro-F1 and accuracy on a split in percent, and the logits, float32 (N, C)."""
        from training import evaluation

        labels = getattr(self.data, split).labels
        logits = self.predict(self.stores[split], np.arange(len(labels))).numpy()
        predicted = logits.argmax(1)
        return {"f1": evaluation.macro_f1(predicted, labels), "acc": 100 * float((predicted == labels).mean())}, logits

    def validate(self) -> dict[str, float | None]:
        """Macro-F1 and accuracy in percent on id_val (ID), which epochs are chosen by, and on val (OOD)."""
        found = {"id": self.figures("id_val")[0], "ood": self.figures("val")[0]}
        return {f"{domain}_{name}": value for domain, both in found.items() for name, value in both.items()}

    def test(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Macro-F1 and accuracy in percent on both test sets, and their logits."""
        found, logits = {}, {}
        for domain, split in (("ood", "test"), ("id", "id_test")):
            both, logits[domain] = self.figures(split)
            found |= {f"{domain}_{name}": value for name, value in both.items()}
        return found, logits

    def pictures(self, epoch: int, places: np.ndarray) -> dict[str, np.ndarray]:
        """See training.Trainer: training images, and before the first epoch hard images beside their spectrum."""
        shown = super().pictures(epoch, places)
        if epoch == 0 and self.levels:
            shown["train/spectrum"] = log.spectrum_sheet(self.pool, self.data, self.source_ids, self.levels)
        return shown

    def finish(self, state: dict, writer) -> None:
        """Test the last weights, the best by id_val, WiSE-FT's and the untuned ones, and write what the run leaves."""
        from training import clip as clip_tuning

        # Test each set of weights in turn; the last ones stay.
        tuned = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        zero_shot = {name: value.to(self.device) for name, value in self.zero_shot.items()}
        last, logits = self.test()
        self.model.load_state_dict(state["best"]["model"])
        best, _ = self.test()
        sweep = self.sweep_wise_ft(zero_shot, tuned)
        # The test sets have no say: of equal alphas the larger, nearer to the tuned weights.
        chosen = max(sweep, key=lambda row: (row["id_val_f1"], row["alpha"]))
        self.model.load_state_dict(clip_tuning.interpolate(zero_shot, tuned, chosen["alpha"]))
        wise, _ = self.test()
        self.model.load_state_dict(zero_shot)
        untuned, _ = self.test()
        self.model.load_state_dict(tuned)
        unreadable = self.unreadable_files()
        if not writer:
            return

        # Gather what they came to, and write it.
        results = {
            "last": last | {"epoch": self.args.epochs - 1},
            "best_by_val": best | {"epoch": state["best"]["epoch"], "val_id_f1": state["best"]["figure"]},
            "last_wise_ft": wise | {"alpha": chosen["alpha"], "id_val_f1": chosen["id_val_f1"]},
            "zero_shot": untuned,
            "wise_ft_sweep": sweep,
            "train_counts": self.data.counts.tolist(),
            "class_names": self.data.class_names,
            "validation": self.data.note,
            "unreadable": unreadable,
        }
        self.write(results, logits, state, writer)
        for name, found in (("after the last epoch", last), (f"WiSE-FT, alpha {chosen['alpha']}", wise)):
            print(f"{self.args.out}: {name}: macro-F1 % OOD {found['ood_f1']:.1f}, ID {found['id_f1']:.1f}")
        if unreadable:
            print(f"{len(unreadable)} training images cannot be read and were left out, the first: {unreadable[0]}")

    def sweep_wise_ft(self, zero_shot: dict, tuned: dict) -> list[dict]:
        """Macro-F1 and accuracy on id_val of the weights between two state dicts, for each of ALPHAS."""
        from training import clip as clip_tuning

        sweep = []
        for alpha in ALPHAS:
            self.model.load_state_dict(clip_tuning.interpolate(zero_shot, tuned, alpha))
            found = self.figures("id_val")[0]
            sweep.append({"alpha": alpha} | {f"id_val_{name}": value for name, value in found.items()})
        return sweep

    def write(self, results: dict, logits: dict[str, np.ndarray], state: dict, writer) -> None:
        """The run's files: predictions, tables, figures, the tuned CLIP, and results.json last.

        Args:
            logits: of the last weights on both test sets, by domain, float32 (N, C).
        """
        from training import clip as clip_tuning
        from training import evaluation

        # Write the predictions, the tables and the tuned CLIP.
        args, data = self.args, self.data
        labels = {"ood": data.test.labels, "id": data.id_test.labels}
        results["last"]["per_class"] = evaluation.accuracies(  # of the OOD test set
            logits["ood"].argmax(1), labels["ood"], len(data.class_names), {}
        )["per_class"]
        arrays = {f"{domain}_logits": logits[domain] for domain in labels}
        files.write_arrays(
            args.out / "predictions.npz", **arrays, **{f"{domain}_labels": labels[domain] for domain in labels}
        )
        evaluation.write_tables(args.out, data, {domain: found.argmax(1) for domain, found in logits.items()})
        clip_tuning.save_clip(self.model, args.out / "clip.safetensors")
        # Draw the progress, add the last scalars, and write results.json.
        with log.decoration("progress.png"):
            if args.curriculum == "adaptive":
                from reporting import figures

                figures.draw_progress(state["history"], args.out / "progress.png")
        for row in results["wise_ft_sweep"]:
            writer.add_scalar("wise_ft/id_val_f1", row["id_val_f1"], round(100 * row["alpha"]))
        metrics = {f"test/{name}": results["last"][name] for name in FIGURES}
        metrics |= {f"test_wise_ft/{name}": results["last_wise_ft"][name] for name in FIGURES}
        epochs.write_results(self, state, writer, results, metrics)


def finished(args) -> bool:
    """Whether the run that these arguments name is complete."""
    return (run_folder(args) / "results.json").is_file()


def run_folder(args) -> Path:
    """Where a run goes: --out, or a name that its main settings make."""
    name = names.folder_name(vars(args), datasets.DEFAULTS[args.dataset], "train_iwildcam")
    return args.out or Path("runs", f"{name}_seed{args.seed}")


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_flags(args)
    args.out = run_folder(args)
    args.device = distributed.start(args.device)
    say_unused_spectrum(args, parser)
    data = datasets.load(args.dataset, args.imb_ratio, args.data_root, args.data_seed)
    if args.batch_size > len(data.train):
        raise cli.UserError(f"--batch-size {args.batch_size}: expected at most the {len(data.train)} training images")
    levels, synthetic, hard = [], {}, set()
    sources = [source for part in data.splits.values() for source in part.sources]
    inputs: dict = {"data": files.digest_int(*sources, files.digest_files(data.files))}
    if digest := spectrum_folder.describe_clip(args.clip)["clip_digest"]:
        inputs["clip"] = digest
    if args.curriculum != "none":
        levels, _ = prepare_spectrum(args)
        epochs.stage_of(args, 0, levels)
        drawn = [level for level in levels if level < REAL]
        synthetic = load_spectrum(args.spectrum, drawn, data, rules=args.edit_rules)
        inputs["spectrum"] = files.digest_files(spectrum_folder.decisive_files(args.spectrum))
        hard = {row["source"] for row in spectrum_folder.read_rows(args.spectrum)}
        if args.add:
            args.edits = additions.check_edits(args)
        else:
            say_hard(args, len(hard), levels, synthetic)
    # Of the training images some may be unreadable; the others have no second chance.
    check_files(args, {name: part for name, part in data.splits.items() if name != "train"})
    splits = describe_splits(data.splits, *data.class_names)
    return epochs.run(args, inputs, splits, lambda signals: prepare(args, data, synthetic, levels, hard, signals))


def say_hard(args, hard: int, levels: list[int], synthetic: dict) -> None:
    """Print how many of the `hard` images have an accepted synthetic one, and what becomes of the others."""
    if distributed.rank() == 0:
        some = len({source for one in synthetic.values() for source in one.sources})
        rest = "are left out of the curriculum's epochs" if args.per_hard_image is None else "stay"
        others = f"; the others {rest}" if some < hard else ""
        print(f"{some} of {hard} hard images have an accepted image of the levels {levels}{others}")


def prepare(
    args, data, synthetic: dict, levels: list[int], hard: set[str], signals: StopSignals
) -> tuple[Trainer, dict]:
    """The model, its optimiser and the images, and the run's state: new, or its last checkpoint's.

    Args:
        levels: of the curriculum.
        hard: the sources that the spectrum was made from.
    """
    import torch

    import models
    from runtime.device import check_bfloat16, pick_device
    from training import clip as clip_tuning
    from training import stores

    # Load the CLIP, whose images decide on the size and normalisation.
    device = pick_device(args.device)
    check_bfloat16(args.precision, device)
    torch.manual_seed(files.digest_int("weights", args.seed))
    clip, _, tokenizer = models.load_clip(args.clip, device)
    size, mean, std = clip_tuning.input_of(clip, args.clip)
    data = dataclasses.replace(data, mean=mean, std=std)
    tokens = tokenizer(clip_tuning.captions_of(data.spoken_names, args.templates)).to(device)

    # Build the pool of images.
    def store(sets: list[ImageSet], skip_unreadable: bool = False):
        paths = [path for one in sets for path in one.images]
        return stores.Decoded(paths, device, size, args.workers, crop=stores.CLIP_CROP, skip_unreadable=skip_unreadable)

    pool = build_pool(args, data, synthetic, levels, lambda sets: store(sets, True))
    # Give the CLIP a head, fitted first for lpft.
    model = clip_tuning.TunedClip(distributed.synchronised(clip, device)).to(device)
    if args.loss != "flyp":
        head = clip_tuning.zero_shot_head(model, tokens, len(data.class_names))
        model = clip_tuning.TunedClip(model.clip, head)
    zero_shot = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    if args.grad_checkpointing:
        clip.set_grad_checkpointing(True)
    if args.loss == "lpft" and not (args.out / "checkpoint.pt").exists():

        def stop_on_signal() -> None:
            if distributed.any_of(signals.received is not None, device):
                raise loop.Stopped()

        places = np.flatnonzero((pool.levels == REAL) & ~pool.held)
        model.set_head(*clip_tuning.probe_images(model, pool, places, data, device, args.precision, stop_on_signal))

    # Take up the run's last checkpoint, if there is one.
    optimizer = optimization.build_optimizer(args, model)
    state = epochs.start_or_resume(args, model, optimizer, None, device)
    if (before := state.get("unreadable", {})) and distributed.rank() == 0:
        print(
            f"{args.out}: {len(before)} training images that could not be read in earlier epochs stay left out, also "
            "where they were mended since; --overwrite, to start anew, takes those"
        )
    pool.images.unreadable |= before
    state["unreadable"] = pool.images.unreadable  # the same dictionary, which grows
    step_model = distributed.wrap(torch.compile(model) if args.compile else model, device)
    trainer = Trainer(
        args, data, levels, pool, model, step_model, None, optimizer, device, signals, tokens, zero_shot,
        np.unique(pool.sources, return_inverse=True)[1], np.isin(pool.sources, sorted(hard)),
        {name: store([part]) for name, part in data.splits.items() if name != "train"},
        additions.count_wanted(args, data) if args.add else None,
    )  # fmt: skip
    return trainer, state


if __name__ == "__main__":
    cli.run(main)
