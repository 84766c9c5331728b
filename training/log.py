"""What a run tells TensorBoard: scalars and pictures of each epoch, and the run's arguments beside its figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from curricula import REAL
from loaders.base import DataSet
from runtime import cli, runs
from training.pool import Pool

SHEET_IMAGES = 32
MOST_SHEETS = 20  # of a run
SHEET_SOURCES = 8  # hard images shown beside their spectrum


def open_writer(folder: Path, epoch: int):
    """TensorBoard's writer; what a killed run wrote of this epoch and later ones is taken back."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=epoch)


def shows_pictures(before: list[list[int]], stage: list[int], epochs: int) -> bool:
    """Whether an epoch's training images are shown: where its levels are others than those shown last.

    A schedule may change its levels each epoch, of which a long run has hundreds: no more than MOST_SHEETS are shown,
    equally many epochs apart at least.

    Args:
        before: the levels of the epochs before.
        stage: those of this epoch.
    """
    apart, last, shown = -(-epochs // MOST_SHEETS), -epochs, None
    for epoch, levels in enumerate([*before, stage]):
        if levels != shown and epoch >= last + apart:
            last, shown = epoch, levels
    return last == len(before)


def sheet(pool: Pool, data: DataSet, seed: int, epoch: int, places: np.ndarray) -> np.ndarray:
    """A picture of some of an epoch's training images before augmentation, half of them synthetic if it has any."""
    from reporting import figures

    rng = np.random.default_rng([seed, epoch, 2])
    chosen = rng.permutation(places)
    real, synthetic = (chosen[(pool.levels[chosen] == REAL) == kind] for kind in (True, False))
    half = min(len(synthetic), SHEET_IMAGES // 2)
    chosen = np.concatenate([synthetic[:half], real[: SHEET_IMAGES - half]])
    return figures.sheet(read_images(pool, chosen), captions_of(pool, data, chosen))


def spectrum_sheet(pool: Pool, data: DataSet, source_ids: np.ndarray, levels: list[int]) -> np.ndarray:
    """Some hard images, each beside one synthetic image of each level: uint8 (height, width, 3).

    Args:
        source_ids: a number for each image of the pool, the same for those of one source, int (N,).
    """
    from reporting import figures

    levels = sorted({*levels, REAL})
    by_level = [set(source_ids[pool.levels == level].tolist()) for level in levels]
    whole = sorted(set.intersection(*by_level))[:SHEET_SOURCES]
    first = {(source_ids[place], pool.levels[place]): place for place in range(len(source_ids) - 1, -1, -1)}
    chosen = np.array([first[source, level] for source in whole for level in levels], dtype=int)
    if not len(chosen):
        return np.full((8, 8, 3), 255, np.uint8)
    return figures.sheet(read_images(pool, chosen), captions_of(pool, data, chosen), len(levels))


def read_images(pool: Pool, places: np.ndarray) -> list[np.ndarray]:
    """The images at some places, before augmentation, uint8 (H, W, 3) each."""
    parts = pool.images.evaluation(places, len(places))
    return [image.permute(1, 2, 0).cpu().numpy() for part in parts for image in part]


def captions_of(pool: Pool, data: DataSet, places: np.ndarray) -> list[tuple[str, str]]:
    """Level and class of the images at some places."""
    levels = ["real" if level == REAL else f"level {level}" for level in pool.levels[places]]
    return list(zip(levels, (data.spoken_names[label] for label in pool.labels[places]), strict=True))


def log_epoch(writer, epoch: int, record: dict) -> None:
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


def log_end(writer, args, metrics: dict[str, float]) -> None:
    """The last epoch's test figures, by TensorBoard tag, and the run's arguments beside them."""
    for name, value in metrics.items():
        writer.add_scalar(name, value, args.epochs - 1)
    log_hparams(writer, args, metrics)
    writer.close()


@contextmanager
def decoration(what: str) -> Iterator[None]:
    """Make a figure or a picture that no result depends on; a failure is only a warning."""
    try:
        yield
    except Exception as error:  # matplotlib, fonts and files fail in as many ways as there are libraries below them
        print(f"warning: {what}: not made ({type(error).__name__}: {cli.first_line(error)})", flush=True)


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
