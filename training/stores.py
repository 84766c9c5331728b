"""The images of batches: small ones live on the device, large ones are decoded by workers at the size that is needed.

Both kinds give uint8 batches (n, 3, H, W) on the device, and both depend on the seed and the images' places alone, not
on how many workers there are.
"""

from __future__ import annotations

import io
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg

from loaders import pictures
from loaders.base import ImageSet
from runtime.cli import UserError
from runtime.device import Fitting
from runtime.retry import read_bytes
from runtime.signals import begin_worker, hold_signals
from training.class_augmentation import augmented


@dataclass(frozen=True)
class Crop:
    """How image files are cropped and resized.

    Attributes:
        least_area: of a random crop, as a share of the image's.
        zoom: of a test image, the shorter side over the side of the centre crop.
        filter: bilinear or bicubic.
        whole: take the whole image always, squeezed to a square, as ALIA does.
        random: crop training images at random; else all as test images.
    """

    least_area: float = 0.08
    zoom: float = 256 / 224
    filter: str = "bilinear"
    whole: bool = False
    random: bool = True


# Images that a worker decodes at a time for a GPU: all workers share a pass's first batch, and hold less in memory.
# On a CPU putting a batch together would take a tenth of the time of decoding it.
PART = 32
IMAGENET_CROP = Crop()
CENTRE_CROP = Crop(random=False)
WHOLE = Crop(whole=True)
CLIP_CROP = Crop(least_area=0.9, zoom=1.0, filter="bicubic")  # open_clip's, which FLYP takes


def crop_of(augment: str) -> Crop:
    """How train_lt.py crops image files with this --augment, also where it evaluates."""
    if augment == "resize":
        return WHOLE
    return IMAGENET_CROP if augment in ("resized_crop", "cuda") else CENTRE_CROP


def build(
    sets: list[ImageSet],
    device: str,
    image_size: int,
    workers: int,
    memory_format: str,
    randaugment: bool = False,
    crop: Crop = IMAGENET_CROP,
):
    """The images of several sets, one after another, as one store of images (InMemory or Decoded)."""
    if sets[0].in_memory:
        return InMemory(np.concatenate([one.images for one in sets]), device, memory_format, randaugment)
    return Decoded([path for one in sets for path in one.images], device, image_size, workers, randaugment, crop)


class InMemory:
    """Images that live on the device as uint8.

    Args:
        images: uint8 (N, H, W, 3).
        memory_format: channels_last or contiguous: their order in memory, which should be the network's.
    """

    def __init__(self, images: np.ndarray, device: str, memory_format: str, randaugment: bool = False):
        self.fitting = Fitting()  # how many a model is shown at once in an evaluation
        images = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)
        self.images = images if memory_format == "channels_last" else images.contiguous()
        self.randaugment, self.side = randaugment, min(images.shape[2:])

    def training(
        self,
        batches: list[torch.Tensor],
        keys: list[torch.Tensor],
        seed: int,
        strengths: list[torch.Tensor] | None = None,
    ) -> Iterator[torch.Tensor]:
        """Batches of the images at the given places, int64 (n,) each.

        Args:
            keys: number the images of an epoch.
            strengths: at which each is augmented (training/class_augmentation.py); None: not at all.
        """
        everything = torch.cat(batches).to(self.images.device)  # one copy for the pass
        for at, (places, numbers) in enumerate(zip(everything.split([*map(len, batches)]), keys, strict=True)):
            images = self.images[places]
            if self.randaugment:
                pairs = zip(images, numbers.tolist(), strict=True)
                images = torch.stack([randaugmented(image, seed, number, self.randaugment) for image, number in pairs])
            if strengths is not None:
                rows = zip(images, strengths[at].tolist(), numbers.tolist(), strict=True)
                images = torch.stack([augmented(image, strength, seed, number) for image, strength, number in rows])
            yield images

    def evaluation(self, places: np.ndarray, batch_size: int) -> Iterator[torch.Tensor]:
        """Batches of the images at `places`, int (n,), in that order; none where there are no places."""
        chosen = torch.from_numpy(places).to(self.images.device)
        for start in range(0, len(places), batch_size):  # split() gives an empty batch of no places
            yield self.images[chosen[start : start + batch_size]]


class Decoded:
    """Image files, decoded, cropped and resized by worker processes, in time for their batch.

    Args:
        skip_unreadable: yield a black image where one does not decode, and note it, instead of raising UserError.

    Attributes:
        part: images that a worker decodes at a time; None for a batch.
        unreadable: with `skip_unreadable`, place -> error, of the images read so far.
    """

    def __init__(
        self,
        paths: list[Path],
        device: str,
        image_size: int,
        workers: int,
        randaugment: bool = False,
        crop: Crop = IMAGENET_CROP,
        skip_unreadable: bool = False,
    ):
        self.fitting = Fitting()
        self.paths, self.device, self.image_size, self.workers = paths, device, image_size, workers
        # Workers are forks, and copy the memory of each Path that they look at: theirs are one array of bytes.
        self.packed = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self.randaugment, self.crop, self.skip_unreadable = randaugment, crop, skip_unreadable
        self.side = image_size
        self.part = PART if str(device).startswith("cuda") else None
        self.unreadable: dict[int, str] = {}

    def training(
        self,
        batches: list[torch.Tensor],
        keys: list[torch.Tensor],
        seed: int,
        strengths: list[torch.Tensor] | None = None,
    ) -> Iterator[torch.Tensor]:
        """As InMemory's; an image's random crop is drawn from the seed and the image's number in the epoch."""
        strengths = strengths or [torch.zeros_like(places) for places in batches]
        jobs = (
            [
                (place, (seed, number), strength)
                for place, number, strength in zip(*map(torch.Tensor.tolist, row), strict=True)
            ]
            for row in zip(batches, keys, strengths, strict=True)
        )
        yield from self._load(jobs)

    def evaluation(self, places: np.ndarray, batch_size: int) -> Iterator[torch.Tensor]:
        """As InMemory's; each image is the centre crop."""
        jobs = (
            [(place, None, 0) for place in places[start : start + batch_size].tolist()]
            for start in range(0, len(places), batch_size)
        )
        yield from self._load(jobs)

    def _load(self, jobs: Iterable[list[tuple]]) -> Iterator[torch.Tensor]:
        pinned = str(self.device).startswith("cuda")
        parts_of: deque[int] = deque()  # of the batches that workers were given

        def parts() -> Iterator[list[tuple]]:
            for job in jobs:
                most = self.part or len(job)
                parts_of.append(-(-len(job) // most))
                yield from (job[start : start + most] for start in range(0, len(job), most))

        loader = torch.utils.data.DataLoader(
            _Files(self),
            batch_sampler=parts(),
            num_workers=self.workers,
            collate_fn=_stack,
            generator=torch.Generator(),  # its draws are not the training's
            worker_init_fn=begin_worker,
            pin_memory=pinned,
            prefetch_factor=(8 if self.part else 4) if self.workers else None,
        )
        with hold_signals():
            batches = iter(loader)
        try:
            ready = []
            for images, wrong in batches:
                self.unreadable |= wrong
                ready.append(images.to(self.device, non_blocking=pinned))
                if len(ready) == parts_of[0]:
                    parts_of.popleft()
                    yield (torch.cat(ready) if len(ready) > 1 else ready[0]).permute(0, 3, 1, 2)
                    ready = []
        except UserError as error:  # a worker's comes with its traceback
            last_line = str(error).strip().splitlines()[-1]
            raise UserError(last_line.removeprefix(f"{UserError.__module__}.UserError: ")) from None
        finally:  # however it ends: an error's traceback would keep the workers as long as somebody holds it
            if self.workers:
                batches._shutdown_workers()


class _Files(torch.utils.data.Dataset):
    def __init__(self, store: Decoded):
        self.packed, self.image_size, self.randaugment = store.packed, store.image_size, store.randaugment
        self.crop, self.skip_unreadable = store.crop, store.skip_unreadable

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, job: tuple[int, tuple[int, int] | None, int]) -> tuple[np.ndarray, dict[int, str]]:
        place, key, strength = job
        rng = None if key is None else np.random.default_rng(key)
        try:
            pixels = decode(Path(os.fsdecode(self.packed[place])), self.image_size, rng, self.crop)
        except UserError as error:
            if not self.skip_unreadable:
                raise
            return np.zeros((self.image_size, self.image_size, 3), dtype=np.uint8), {place: str(error)}
        if key is not None and (self.randaugment or strength):
            image = torch.from_numpy(pixels).permute(2, 0, 1)
            image = randaugmented(image, *key, self.randaugment) if self.randaugment else image
            seed, number = key  # the crop's draws; those of the operations must not follow from them
            pixels = augmented(image, strength, seed + 1, number).permute(1, 2, 0).numpy()
        return pixels, {}


def _stack(items: list[tuple[np.ndarray, dict[int, str]]]) -> tuple[torch.Tensor, dict[int, str]]:
    images, wrong = zip(*items, strict=True)
    return torch.from_numpy(np.stack(images)), {place: error for one in wrong for place, error in one.items()}


def randaugmented(image: torch.Tensor, seed: int, number: int, kind: bool | str = True) -> torch.Tensor:
    """torchvision's RandAugment of one image uint8 (3, H, W), by draws of its own.

    Args:
        kind: True, or `datadream`: colour jitter, grey, blur and solarisation too, as in DataDream's own training.
    """
    from torchvision.transforms import v2

    steps = [v2.RandAugment()]
    if kind == "datadream":
        blur = v2.GaussianBlur(max(3, image.shape[-1] // 20 * 2 + 1), (0.1, 2.0))
        steps += [v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), v2.RandomGrayscale(0.2)]
        steps += [v2.RandomApply([blur], 0.2), v2.RandomSolarize(128, 0.2)]
    with torch.random.fork_rng(devices=[]):
        # Of the CPU's generator alone: torch.manual_seed would seed a GPU's too, whose state is not put back.
        torch.default_generator.manual_seed((seed + number * 0x9E3779B97F4A7C15) % 2**63)
        for step in steps:
            image = step(image)
    return image


def random_box(
    width: int, height: int, rng: np.random.Generator, least_area: float = IMAGENET_CROP.least_area
) -> tuple[float, float, float, float]:
    """The crop of RandomResizedCrop (Inception): `least_area` to all of it, aspect ratio 3/4 to 4/3; in pixels."""
    for _ in range(10):
        area = width * height * rng.uniform(least_area, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # What torchvision falls back to: as much of the image as the aspect ratios allow, from its centre.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def centre_box(width: int, height: int, zoom: float) -> tuple[float, float, float, float]:
    """The part of an image that is left by resizing its shorter side to `zoom` times that of a central crop."""
    side = min(width, height) / zoom
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def decode(path: Path, size: int, rng: np.random.Generator | None, crop: Crop = IMAGENET_CROP) -> np.ndarray:
    """An image file, cropped (at random, or the centre without `rng`) and resized: uint8 (size, size, 3).

    A JPEG is decoded at a half, a quarter or an eighth where that still holds every pixel that is needed.

    Raises:
        UserError: it does not decode.
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: not a readable image ({error.strerror})") from None
    with pictures.open_image(io.BytesIO(content), str(path)) as image:
        (width, height), stored = pictures.upright_size(image), image.size
        if crop.whole:
            box = 0, 0, width, height
        elif rng is None or not crop.random:
            box = centre_box(width, height, crop.zoom)
        else:
            box = random_box(width, height, rng, crop.least_area)
        needed = size / min(box[2] - box[0], box[3] - box[1])
        image.draft("RGB", (math.ceil(stored[0] * needed), math.ceil(stored[1] * needed)))
        whole = image.size == stored and pictures.orientation_of(image) == 1
        if image.format == "JPEG" and image.mode == "RGB" and whole:
            # torchvision's decoder is a little faster than Pillow's, but has no draft mode and does not turn.
            pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
        else:
            pixels = torch.from_numpy(np.array(pictures.to_rgb(image))).permute(2, 0, 1)
    x, y = pixels.shape[2] / width, pixels.shape[1] / height
    left, top, right, bottom = round(box[0] * x), round(box[1] * y), round(box[2] * x), round(box[3] * y)
    part = pixels[None, :, top : max(top + 1, bottom), left : max(left + 1, right)]
    # On whole bytes torch's filter takes a third of the time of Pillow's, and gives the same to within one grey value.
    return F.interpolate(part, (size, size), mode=crop.filter, antialias=True)[0].permute(1, 2, 0).numpy()
