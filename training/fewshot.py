"""Training on few images: what an epoch and a batch hold, the loss of two kinds of images, WiSE-FT, and the results."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from curricula import REAL
from loaders import fewshot
from loaders.base import DataSet
from runtime import files
from training import distributed, epochs, loop, losses

ALPHAS = [i / 10 for i in range(11)]  # of WiSE-FT


def few_shot_epoch(images: str, levels: np.ndarray, held: np.ndarray, stage: list[int], rng) -> np.ndarray:
    """The places in a pool that an epoch trains on: real ones first, then as many synthetic ones of the stage's levels.

    Real images are repeated, all of them before any again, to the number of the synthetic ones (DataDream).

    Args:
        images: real, synthetic or both.
        levels: of each image of the pool, int (N,); a real image's level is REAL.
        held: images that an adaptive curriculum keeps out, bool (N,).
    """
    real = np.flatnonzero((levels == REAL) & ~(held & bool(stage)))
    synthetic = np.flatnonzero(np.isin(levels, stage) & (levels < REAL) & ~held)
    if images == "real" or not len(synthetic):
        return real
    if images == "synthetic":
        return synthetic
    rounds = -(-len(synthetic) // len(real))
    repeated = np.concatenate([rng.permutation(real) for _ in range(rounds)])[: len(synthetic)]
    return np.concatenate([repeated, synthetic])


def half_and_half(first: int, total: int, generator):
    """An order of `total` images in which real ones, the `first` so many, and others take turns: int64 (total,).

    Any batch of an even number holds as many of one kind as of the other; without two equal kinds it is any order.
    """
    import torch

    if 2 * first != total:
        return torch.randperm(total, generator=generator)
    real = torch.randperm(first, generator=generator)
    return torch.stack([real, first + torch.randperm(first, generator=generator)], 1).flatten()


@dataclass
class Trainer(loop.Trainer):
    """A classifier's training on few images.

    Attributes:
        tokens: of every class's prompt, int (C, length), on the device; None without a CLIP.
        zero_shot: a CLIP's weights before training, on the CPU.
        adapters: its lora.LoraAttention layers.
        stores: the images of val and test (training/stores.py).
    """

    tokens: object
    zero_shot: dict
    adapters: list
    stores: dict[str, object]

    chosen_by = "overall"

    def batch_loss(self, batch: loop.Batch):
        """See loop.Trainer."""
        import torch
        from torch.nn import functional as F

        from training import augmentations

        args, data, rows = self.args, self.data, batch.rows
        weights = losses.image_weights(batch.labels, batch.synthetic, None, args.real_weight)
        images = batch.images
        if args.augment == "shift" or (args.augment != "none" and data.train.in_memory):
            shifts = augmentations.draw_shifts(self.pool.images.side, len(batch), batch.generator)
            images = augmentations.shift(images, shifts[:, rows].to(self.device), None, edge=True)
        elif args.augment != "none":
            mirrored = augmentations.draw_mirrored(len(batch), batch.generator)
            images = augmentations.flip(images, mirrored[rows].to(self.device))
        images = augmentations.normalise(images, data.mean, data.std)
        targets, classes = batch.labels[rows], len(data.class_names)
        if args.mix != "none" and torch.rand((), generator=batch.generator) < args.mix_share:
            kinds = ["cutmix", "mixup"] if args.mix == "both" else [args.mix]
            kind = kinds[int(torch.randint(len(kinds), (), generator=batch.generator))]
            mixer = augmentations.mixer(kind, classes)
            images, targets = mix_kinds(mixer, images, targets, batch.synthetic[rows], classes)
        with torch.autocast(self.device.split(":")[0], torch.bfloat16, args.precision == "bf16"):
            logits = self.logits(images)
        values = F.cross_entropy(logits.float(), targets, reduction="none")
        if rows == slice(None):
            return losses.batch_mean(values, weights)
        # Gradients are averaged over the processes: their mean is then that of the whole batch.
        return distributed.world() * (values * weights[rows]).sum() / weights.sum()

    def logits(self, images):
        """Logits, float (n, C), of the model in training; a CLIP's text tower reads every class's prompt anew."""
        from torch.nn import functional as F

        if self.tokens is None or self.args.tune == "probe":
            return self.step_model(images)
        image, text, scale = self.step_model(images, self.tokens)
        return self.model.logits(image, scale.detach() * F.normalize(text, dim=-1))

    def epoch_places(self, epoch: int, stage: list[int]) -> np.ndarray:
        """See loop.Trainer."""
        rng = np.random.default_rng([self.args.seed, epoch])
        return few_shot_epoch(self.args.images, self.pool.levels, self.pool.held, stage, rng)

    def order(self, places: np.ndarray, generator):
        """See loop.Trainer: real and synthetic images take turns."""
        return half_and_half(int((self.pool.levels[places] == REAL).sum()), len(places), generator)

    def predict(self, store, places: np.ndarray):
        """Logits, float (N, C), of the evaluated model."""
        import torch

        from training import clip, evaluation

        distributed.same_buffers(self.model)
        model = self.model
        if self.tokens is not None:
            weight = None
            if self.args.tune != "probe":
                with torch.autocast(self.device.split(":")[0], torch.bfloat16, self.args.precision == "bf16"):
                    weight = clip.zero_shot_head(self.model, self.tokens, len(self.data.class_names))
            model = clip.Classifier(self.model, weight)
        return evaluation.predict(model, store, places, self.data, self.device, self.args.precision)

    def figures(self, split: str) -> tuple[dict, np.ndarray]:
        """Accuracies in percent on a split, overall and per class, and the logits, float32 (N, C)."""
        from training import evaluation

        labels = getattr(self.data, split).labels
        logits = self.predict(self.stores[split], np.arange(len(labels)))
        classes = len(self.data.class_names)
        return evaluation.accuracies(logits.argmax(1).numpy(), labels, classes, {}), logits.numpy()

    def validate(self) -> dict[str, float | None]:
        """Accuracy in percent on the validation set."""
        return {"overall": self.figures("val")[0]["overall"]}

    def take_weights(self, tuned: dict, alpha: float) -> None:
        """WiSE-FT's weights: (1 - alpha) * zero-shot + alpha * tuned."""
        from training import clip

        if self.adapters:  # the adapters are all that differs
            self.model.load_state_dict(tuned)
            for layer in self.adapters:
                layer.strength = alpha
        else:
            before = {name: value.to(self.device) for name, value in self.zero_shot.items()}
            self.model.load_state_dict(clip.interpolate(before, tuned, alpha))

    def ensemble(self) -> dict[str, dict]:
        """Test accuracies of WiSE-FT, its alpha chosen on validation (of equals the larger), and of zero-shot."""
        tuned = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        sweep = []
        for alpha in ALPHAS:
            self.take_weights(tuned, alpha)
            sweep.append({"alpha": alpha, "val_overall": self.validate()["overall"]})
        chosen = max(sweep, key=lambda row: (row["val_overall"], row["alpha"]))
        self.take_weights(tuned, chosen["alpha"])
        wise = self.figures("test")[0] | chosen
        self.take_weights(tuned, 0.0)
        zero_shot = self.figures("test")[0]
        self.take_weights(tuned, 1.0)
        return {"last_wise_ft": wise, "zero_shot": zero_shot, "wise_ft_sweep": sweep}

    def finish(self, state: dict, writer) -> None:
        """Test the last and the best-by-validation weights, WiSE-FT's and zero-shot, and write what the run leaves."""
        args, data = self.args, self.data
        last, logits = self.figures("test")
        ensembles = self.ensemble() if self.tokens is not None else {}
        self.model.load_state_dict(state["best"]["model"])
        best, _ = self.figures("test")
        if not writer:
            return
        results = {
            "last": last | {"epoch": args.epochs - 1},
            "best_by_val": best | {"epoch": state["best"]["epoch"], "val_overall": state["best"]["figure"]},
            **ensembles,
            "train_counts": data.counts.tolist(),
            "class_names": data.class_names,
            "validation": data.note,
            "shots_digest": fewshot.shots_digest(data.train),
        }
        files.write_arrays(args.out / "predictions.npz", logits=logits, labels=data.test.labels)
        write_shots(args.out / "shots.csv", data)
        metrics = {"test/overall": last["overall"]}
        if ensembles:
            metrics["test_wise_ft/overall"] = ensembles["last_wise_ft"]["overall"]
        epochs.write_results(self, state, writer, results, metrics)
        shown = f"; zero-shot {ensembles['zero_shot']['overall']:.1f}" if ensembles else ""
        print(f"{args.out}: test accuracy % after the last epoch: {last['overall']:.1f}{shown}")


def mix_kinds(mixer, images, targets, synthetic, classes: int) -> tuple:
    """Images of a batch mixed with others of their own kind, and label shares, float (n, C).

    Args:
        synthetic: bool (n,).
    """
    from torch.nn import functional as F

    images, shares = images.clone(), F.one_hot(targets, classes).float()
    for kind in (synthetic, ~synthetic):
        if kind.sum() > 1:
            images[kind], shares[kind] = mixer(images[kind], targets[kind])
    return images, shares


def write_shots(path: Path, data: DataSet) -> None:
    """The training images that were drawn: source, label, class name."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["source", "label", "class_name"])
    for source, label in zip(data.train.sources, data.train.labels.tolist(), strict=True):
        table.writerow([source, label, data.class_names[label]])
    files.write_text(path, text.getvalue())
