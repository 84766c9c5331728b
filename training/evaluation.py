"""Evaluating a model without changing it: logits, accuracies by group of classes, confusions, tables of test sets."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from loaders.base import DataSet
from runtime import files
from training import distributed
from training.augmentations import normalise


def predict(
    model,
    store,
    places: np.ndarray,
    data,
    device: str,
    precision: str = "fp32",
    batch_size: int = 512,
    augmentation: tuple[np.ndarray, int] | None = None,
    keep: Callable | None = None,
    width: int | None = None,
    between: Callable[[], None] | None = None,
):
    """Logits, float (N, C), or what `keep` makes of them, (N, width), on the CPU. Leaves the model in evaluation mode.

    Several processes share the work, and each has the whole result.

    Args:
        model: not wrapped: each process evaluates images of its own.
        store: the images (training/stores.py); the model sees the ones at `places`, int (N,).
        data: the data set, for its channels' mean and standard deviation and the number of classes.
        augmentation: show it training images, augmented at these strengths, int (N,), by draws from this seed.
        keep: reduces a batch's logits, (n, C), to (n, `width`), where all of them would take too much memory.
        width: numbers that each image gives, where that is not a logit for each class.
        between: called after each batch; what it raises ends the evaluation.
    """
    model.eval()
    # Take this process's share of the images.
    mine = np.arange(distributed.rank(), len(places), distributed.world())
    logits = torch.zeros(len(places), width or len(data.class_names))
    if augmentation is None:
        batches = store.evaluation(places[mine], batch_size)
    else:
        split = (torch.from_numpy(some).split(batch_size) for some in (places[mine], mine, augmentation[0][mine]))
        chosen, keys, strengths = split
        batches = store.training(chosen, keys, augmentation[1], strengths)
    # Evaluate it batch by batch, and gather the shares.
    done = 0
    together = len(places) // distributed.world() // batch_size  # batches that every process has
    with (
        closing(batches),
        torch.inference_mode(),
        torch.autocast(device.split(":")[0], torch.bfloat16, precision == "bf16"),
    ):
        for number, images in enumerate(batches):
            found = forward(model, store, images, data, keep)
            logits[mine[done : done + len(found)]] = found
            done += len(found)
            if between and number < together:
                between()
    return distributed.total(logits, device).cpu()


def forward(model, store, images: torch.Tensor, data, keep: Callable | None = None) -> torch.Tensor:
    """The logits of a batch, float (n, C) on the CPU, or what `keep` makes of them; in parts that fit into memory."""

    def score(some: slice) -> torch.Tensor:
        found = model(normalise(images[some], data.mean, data.std)).float()
        return (keep(found).float() if keep else found).cpu()

    return torch.cat(store.fitting.run(len(images), score))


def top_class(logits: torch.Tensor) -> torch.Tensor:
    """The class of the largest logit, (n, 1): what `predict` may keep of thousands of classes."""
    return logits.cpu().argmax(1, keepdim=True)


def accuracies(predicted: np.ndarray, labels: np.ndarray, classes: int, groups: dict[str, np.ndarray]) -> dict:
    """Accuracy in percent: overall, of each group of classes, and per class; None where there is no such image.

    Args:
        predicted, labels: class of each image, int (N,).
        classes: how many there are.
    """
    count = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[predicted == labels], minlength=classes)

    def share(chosen: np.ndarray) -> float | None:
        total = int(count[chosen].sum())
        return 100 * int(right[chosen].sum()) / total if total else None

    return {
        "overall": share(np.arange(classes)),
        **{name: share(chosen) for name, chosen in groups.items()},
        "per_class": [share(np.array([label])) for label in range(classes)],
    }


def macro_accuracy(per_class: list[float | None]) -> float:
    """The mean of the classes' accuracies, in percent; classes without an image (None) are left out.

    Rounded to nine places: on a balanced set it equals the overall accuracy, and equal epochs must stay equal.
    """
    return round(float(np.mean([share for share in per_class if share is not None])), 9)


def true_class_probability(logits, labels: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """The softmax probability of each image's own class, in [0, 1], (N,).

    Args:
        scale: what logits are multiplied by first: LDAM's, where they are cosines.
    """
    return (logits * scale).softmax(1).numpy()[np.arange(len(labels)), labels]


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The mean F1 score over the classes that are present in `labels`, in percent, as WILDS defines iWildCam's metric.

    Args:
        predicted, labels: class of each image, int (N,).
    """
    from sklearn.metrics import f1_score

    return 100 * float(f1_score(labels, predicted, average="macro", labels=np.unique(labels), zero_division=0))


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int, rows: np.ndarray) -> np.ndarray:
    """How many images of some classes, `rows` (R,), were taken for each class (columns), int (R, C)."""
    row_of = np.full(classes, -1)
    row_of[rows] = np.arange(len(rows))
    row = row_of[labels]
    cells = (row * classes + predicted)[row >= 0]
    return np.bincount(cells, minlength=len(rows) * classes).reshape(len(rows), classes)


def write_tables(folder: Path, data: DataSet, predicted: dict[str, np.ndarray]) -> None:
    """Write per_class.csv and per_location.csv of camera traps' two test sets: images, accuracy and F1 in percent.

    Args:
        predicted: class of each image of `test` ("ood") and of `id_test` ("id"), int (N,).
    """
    by_class, by_location = io.StringIO(), io.StringIO()
    class_table, location_table = (csv.writer(text, lineterminator="\n") for text in (by_class, by_location))
    class_table.writerow(["domain", "label", "class_name", "train_images", "images", "accuracy", "f1"])
    location_table.writerow(["domain", "location", "images", "accuracy", "macro_f1"])
    for domain, split in (("ood", "test"), ("id", "id_test")):
        labels, found = getattr(data, split).labels, predicted[domain]
        for label in np.unique(labels):
            of_class, taken = labels == label, found == label
            right = (of_class & taken).sum()
            row = [data.counts[label], of_class.sum(), f"{100 * right / of_class.sum():.2f}"]
            f1 = 200 * right / (of_class.sum() + taken.sum())
            class_table.writerow([domain, label, data.class_names[label], *row, f"{f1:.2f}"])
        for location in np.unique(data.locations[split]):
            here = data.locations[split] == location
            row = [here.sum(), f"{100 * (found[here] == labels[here]).mean():.2f}"]
            location_table.writerow([domain, location, *row, f"{macro_f1(found[here], labels[here]):.2f}"])
    files.write_text(folder / "per_class.csv", by_class.getvalue())
    files.write_text(folder / "per_location.csv", by_location.getvalue())
