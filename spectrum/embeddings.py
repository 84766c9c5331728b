"""CLIP embeddings of many images and texts: decoded in worker processes, embedded in large batches.

torch is imported at the top: scripts import this module where they embed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from loaders.base import ImageSet
from loaders.pictures import read_image
from loaders.sources import read_sources
from runtime import cli
from runtime.cli import UserError
from runtime.device import Fitting, count_cores
from runtime.signals import begin_worker, hold_signals

# What yields, for each name, its RGB image, or a line that says why there is none.
Reader = Callable[[list[str]], Iterator[Image.Image | str]]
MOST_WORKERS = 16
# Embeddings of sources that a Scorer keeps, 8 MB of them: twice as many as a spectrum's work list draws from at a time.
KEPT_SOURCES = 4096


def read_files(folder: Path) -> Reader:
    """The reader of synthetic images, whose names are relative to `folder`."""

    def read(names: list[str]) -> Iterator[Image.Image | str]:
        for name in names:
            try:
                yield read_image(folder / name)
            except UserError as error:
                yield str(error)

    return read


def read_training_images(train: ImageSet, data_root: Path | None) -> Reader:
    """The reader of real images, named as in hard.csv. One that is missing or damaged does not end it."""

    def read(names: list[str]) -> Iterator[Image.Image | str]:
        while names:
            done = 0
            try:
                for image, _ in read_sources(names, train, data_root):
                    done += 1
                    yield image
            except UserError as error:
                done += 1
                yield str(error)
            names = names[done:]

    return read


class Decoded(IterableDataset):
    """(place in `names`, image as `prepare` makes it or the line that says why there is none), split over workers."""

    def __init__(self, names: list[str], read: Reader, prepare: Callable):
        self.names, self.read, self.prepare = names, read, prepare

    def __iter__(self):
        worker = get_worker_info()
        places = range(worker.id, len(self.names), worker.num_workers) if worker else range(len(self.names))
        for place, image in zip(places, self.read([self.names[place] for place in places]), strict=True):
            yield place, image if isinstance(image, str) else self.prepare(image)


def batches(
    names: list[str], read: Reader, prepare: Callable, batch_size: int, workers: int, device: str
) -> Iterator[tuple[list[int], torch.Tensor | None, dict[int, str]]]:
    """Images in batches, in no promised order where there is more than one worker.

    Args:
        prepare: PIL image to a tensor of one shape.
        workers: processes that decode; 0 decodes in this one.

    Yields:
        Places in `names` (n), their tensors (n, ...) on `device` (None where n is 0), and place -> error.
    """
    cuda = device.startswith("cuda")

    def collate(items: list[tuple]) -> tuple:
        good = [(place, image) for place, image in items if not isinstance(image, str)]
        stack = torch.stack([image for _, image in good]) if good else None
        if cuda and stack is not None and stack.is_floating_point():
            stack = stack.bfloat16()  # what autocast makes of it anyway, in half the shared memory
        return [place for place, _ in good], stack, {place: image for place, image in items if isinstance(image, str)}

    loader = DataLoader(
        Decoded(names, read, prepare),
        batch_size=batch_size,
        num_workers=min(workers, len(names)),
        collate_fn=collate,
        pin_memory=cuda,
        worker_init_fn=begin_worker,
    )
    with hold_signals():
        batches = iter(loader)
    for places, stack, wrong in batches:
        yield places, None if stack is None else stack.to(device, non_blocking=cuda), wrong


class Clip:
    """A CLIP, and how it embeds: bf16 autocast on CUDA, vectors of unit length back on the CPU.

    Args:
        loaded: a model, what prepares an image for it, and its tokenizer, as `models.load_clip` gives them.
        device: where the model is.
        batch_size: images embedded at once.
        workers: processes that decode; None for a core each beside a GPU and none on a CPU.
    """

    def __init__(self, loaded: tuple, device: str, batch_size: int, workers: int | None):
        self.device, self.batch_size = device, batch_size
        self.workers = default_workers(self.device) if workers is None else workers
        self.model, self.preprocess, self.tokenizer = loaded
        self.fitting = Fitting()  # images at once

    def texts(self, texts: list[str], batch_size: int = 256) -> torch.Tensor:
        """Embeddings of texts: float32 (N, D)."""
        parts = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(texts[start : start + batch_size]).to(self.device)
            with torch.inference_mode(), autocast(self.device):
                parts.append(F.normalize(self.model.encode_text(tokens).float(), dim=-1).cpu())
        return torch.cat(parts)

    def images(self, names: list[str], read: Reader) -> Iterator[tuple[list[int], torch.Tensor, dict[int, str]]]:
        """Embeddings of images, in batches.

        Yields:
            Places in `names` (n), float32 (n, D), and, for images that cannot be read, place -> error.
        """
        for places, pixels, wrong in batches(names, read, self.preprocess, self.batch_size, self.workers, self.device):
            yield places, torch.empty(0, 0) if pixels is None else self.vectors(pixels), wrong

    def vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings float32 (n, D) of images as `preprocess` makes them, (n, 3, H, W) on the device."""

        def embed(some: slice) -> torch.Tensor:
            with torch.inference_mode(), autocast(self.device):
                return F.normalize(self.model.encode_image(pixels[some]).float(), dim=-1).cpu()

        return torch.cat(self.fitting.run(len(pixels), embed))

    def all_images(self, names: list[str], read: Reader, what: str) -> tuple[torch.Tensor, dict[int, str]]:
        """Embeddings of all images at once, under a progress bar called `what`.

        Returns:
            float32 (N, D), NaN where there is no image, and place -> error.
        """
        gathered, wrong = torch.full((len(names), self.texts([""]).shape[1]), torch.nan), {}
        with cli.progress(len(names), what, "image") as bar:
            for places, vectors, errors in self.images(names, read):
                wrong |= errors
                if places:
                    gathered[places] = vectors
                bar.update(len(places) + len(errors))
        return gathered, wrong


class Scorer:
    """CLIPScores of images in memory, the same ones that filter_clipscore.py gives their files.

    Args:
        clip: what embeds.
        score_prompts: the text that the images of a class are scored against, by class index.

    Raises:
        UserError: the CLIP gives a text no finite embedding.
    """

    def __init__(self, clip: Clip, score_prompts: dict[int, str]):
        self.clip = clip
        self.texts = dict(zip(score_prompts, clip.texts(list(score_prompts.values())), strict=True))
        if not all(vector.isfinite().all() for vector in self.texts.values()):
            raise UserError("--clip: gives a text an embedding that is not finite; expected another checkpoint")
        self.sources: dict[str, torch.Tensor] = {}
        self.pool = ThreadPoolExecutor(min(8, count_cores()))

    def missing(self, sources: Collection[str]) -> list[str]:
        """Those of the sources whose embedding is not there, each once."""
        return [source for source in dict.fromkeys(sources) if source not in self.sources]

    def add_sources(self, prepared: dict[str, torch.Tensor]) -> None:
        """Embed sources, each as the CLIP's `preprocess` makes it, float (3, H, W); of many the oldest are dropped."""
        if prepared:
            vectors = self.clip.vectors(torch.stack(list(prepared.values())).to(self.clip.device))
            self.sources |= dict(zip(prepared, vectors, strict=True))
            for source in list(self.sources)[: max(0, len(self.sources) - max(KEPT_SOURCES, len(prepared)))]:
                del self.sources[source]

    def score(
        self, images: list[Image.Image], labels: list[int], sources: list[str]
    ) -> tuple[list[float], list[float]]:
        """Text and image score of each image, cosines in [-1, 1] to six digits; -inf where one is not finite."""
        pixels = torch.stack(list(self.pool.map(self.clip.preprocess, images))).to(self.clip.device)
        vectors = self.clip.vectors(pixels)
        to_text = (vectors * torch.stack([self.texts[label] for label in labels])).sum(1)
        to_source = (vectors * torch.stack([self.sources[source] for source in sources])).sum(1)
        return tuple(
            [round(value, 6) if math.isfinite(value) else -math.inf for value in scores.tolist()]
            for scores in (to_text, to_source)
        )


def autocast(device: str):
    """bf16 on CUDA, nothing elsewhere."""
    return torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda"))


def default_workers(device: str) -> int:
    """Processes that decode: none on a CPU, where they would take its cores from the model; else a core each."""
    return min(MOST_WORKERS, count_cores()) if device.startswith("cuda") else 0
