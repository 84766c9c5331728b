"""Train a benchmark's own generator and CLIP from scratch, on images that play the part of the web.

Both are ordinary models in ordinary formats, so that the scripts load them with the code that loads SDXL and ViT-B/32:
a Stable Diffusion image-to-image pipeline and an open_clip model. Both see the benchmark's *web* alone, which holds no
image that a classifier trains, validates or is tested on: it stands for the web-scale data behind a public generator.

    digits       scikit-learn's digits of the web split, in new colours at every step. What is shipped in assets/.
    cifar100_lt  CIFAR-100's training images without those of the subset of ratio 100 (data seed 0) and those that the
                 loader validates on: 37,173 images, of 0 to 475 a class, most of the classes that are few-shot there.
    cifar100_lt_20  the same for the long-tailed set of every fifth class; all images of the other 80 classes are web.
    toycam       clear pictures of its animals, drawn anew, in scenes of any colours. What is shipped in assets/ too.

Reads:  scikit-learn's digits (shipped with the package), or CIFAR-100 as train_lt.py reads it
Writes: OUT/tiny_sd with its agreement.json, OUT/tiny_clip; while it is at work OUT/checkpoint.pt
Takes:  on 2 idle CPU cores about 30 minutes each for digits (6 MB) and toycam (3 MB), 10 for a generator of wrong
        captions that starts from the other; a GPU is hardly faster (28 steps a second: Python's own time), but
        trains several at once; cifar100_lt_gpu is for a GPU alone

A signal (SIGTERM, SIGUSR2), or the end of --minutes, is answered by a checkpoint and exit code 75: the same command
goes on, to the same weights.

    python assets/make_assets.py --out assets
    python assets/make_assets.py --caption-noise 0.6 --sizes digits_noisy --start assets/tiny_sd --out runs/noisy_assets
    python assets/make_assets.py --benchmark toycam --out runs/toycam_assets
    python assets/make_assets.py --benchmark cifar100_lt --data-root cifar100.zip --out runs/cifar100_assets
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import datasets
import models
from loaders import cifar, digits, toycam
from loaders.base import spoken_name
from runtime import checkpoints, cli, files, runs
from runtime.device import pick_device
from runtime.signals import StopSignals

MAX_TOKENS = 16
CHECKPOINT_SECONDS = 300
# Of toycam's pictures, 0 to 255: by day the web has 25 and more, by night 5; sharp 37 and more, blurred 21.
NIGHT_CHROMA, SHARP = 15.0, 29.0


@dataclass(frozen=True)
class Sizes:
    """How large the models of a benchmark are and how long they train; one step is one batch.

    Attributes:
        vae_widths: of the autoencoder, one halving of the image between each two.
        unet_widths: of the denoiser; the last `unet_attends` of them look at the text.
        text_width, text_layers: of the generator's text encoder.
        clip_patch: side of the CLIP's image patches in pixels.
        judge: classifier that tells whether an image is of the class that was asked for.
    """

    latent_channels: int = 4
    vae_widths: tuple[int, ...] = (16, 32)
    vae_steps: int = 3000
    vae_batch: int = 32
    unet_widths: tuple[int, ...] = (48, 96)
    unet_attends: int = 1
    unet_layers: int = 1
    unet_steps: int = 8000
    unet_batch: int = 64
    unet_rate: float = 2e-3
    text_width: int = 64
    text_layers: int = 2
    clip_patch: int = 2
    clip_width: int = 64
    clip_layers: int = 4
    clip_steps: int = 3000
    clip_batch: int = 64
    judge: str = "resnet8"
    judge_steps: int = 800


SIZES = {
    "digits": Sizes(),
    "digits_noisy": Sizes(unet_steps=1200),  # for --start, from the generator of true captions
    "cifar100_lt": Sizes(  # what a CPU does in minutes: too few steps to follow a prompt
        latent_channels=8,
        vae_widths=(16, 32, 64),
        vae_steps=400,
        unet_widths=(64, 128),
        unet_attends=2,
        unet_steps=400,
        text_width=128,
        clip_patch=4,
        clip_width=96,
        clip_layers=3,
        clip_steps=400,
        judge="resnet20",
        judge_steps=200,
    ),
    "cifar100_lt_gpu": Sizes(  # latents of 16x16; minutes of one GPU
        vae_widths=(64, 128),
        vae_steps=3000,
        vae_batch=128,
        unet_widths=(128, 256, 256),
        unet_attends=2,
        unet_steps=15_000,
        unet_batch=512,
        unet_rate=5e-4,
        text_width=256,
        clip_patch=4,
        clip_width=256,
        clip_layers=6,
        clip_steps=3000,
        clip_batch=256,
        judge="resnet32",
        judge_steps=3000,
    ),
    "toycam": Sizes(
        unet_widths=(32, 64),
        unet_batch=128,
        clip_patch=4,
        clip_layers=3,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# The web of each benchmark. Each has
#   class_names, size   names as a caption says them; the images' side in pixels
#   forms               the captions' forms
#   template            the form that CLIPScore is taken against
#   asked               class indices that the finished generator is asked for
#   captions()          every caption there can be
#   batch(n, form)      images in [-1, 1] (n, 3, size, size), n captions (each of a random form, or all of `form`), and
#                       labels (n,), on the CPU; what it draws depends on `rng` alone
#   validation()        images and labels, alike, that the models do not see


class Digits:
    """Each digit of the web split a little turned and shifted, in colours drawn anew.

    Args:
        caption_noise: share of the scans whose captions name another digit, as captions of the web are often wrong.
            Which scans, and which digit instead, is fixed.
    """

    class_names = digits.NAMES
    size = 16
    forms = (
        "a photo of a {digit}",
        "a {digit} in {ink} ink",
        "a photo of a {digit} on {paper} paper",
        "a {digit} in {ink} ink on {paper} paper",
    )
    template = digits.TEMPLATES[0]
    asked = range(10)

    def __init__(self, data_root: Path | None, caption_noise: float = 0.0):
        scans, labels = digits.read_scans()
        web = digits.split_scans()["web"]
        self.masks = torch.from_numpy(np.stack([self.mask(scan) for scan in scans[web]]))[:, None].float() / 255
        self.labels = labels[web]
        noise = np.random.default_rng([1, 0])
        wrong = noise.permutation(len(web)) < round(caption_noise * len(web))
        self.named = np.where(wrong, (self.labels + noise.integers(1, 10, len(web))) % 10, self.labels)
        self.rng = np.random.default_rng(0)

    @staticmethod
    def mask(scan: np.ndarray) -> np.ndarray:
        """How much ink there is, uint8 (16, 16)."""
        return digits.draw_digit(scan, np.full(3, 255.0), np.zeros(3))[..., 0]

    def captions(self) -> list[str]:
        return [
            form.format(digit=digit, ink=ink, paper=paper)
            for form in self.forms
            for digit in self.class_names
            for ink in digits.INKS
            for paper in digits.PAPERS
        ]

    def batch(self, size: int, form: str | None = None) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        chosen = self.rng.integers(len(self.labels), size=size)
        masks = self.move(self.masks[chosen], self.rng.normal(0, 0.08, size), self.rng.normal(1, 0.05, size))
        inks, papers, captions = [], [], []
        for named in self.named[chosen]:
            ink_name, ink, paper_name, paper = digits.draw_colours(self.rng)
            inks.append(ink)
            papers.append(paper)
            caption = form or self.forms[self.rng.integers(len(self.forms))]
            captions.append(caption.format(digit=self.class_names[named], ink=ink_name, paper=paper_name))
        ink, paper = (torch.from_numpy(np.array(c, dtype=np.float32))[..., None, None] / 255 for c in (inks, papers))
        images = (masks * ink + (1 - masks) * paper).clamp(0, 1)
        return images * 2 - 1, captions, torch.from_numpy(self.labels[chosen])

    def move(self, masks: torch.Tensor, angle: np.ndarray, scale: np.ndarray, shear: np.ndarray | float = 0):
        """Masks (n, 1, 16, 16) turned by `angle` (radians), 1/`scale` times as large, sheared, and shifted a little."""
        matrix = np.zeros((len(masks), 2, 3), dtype=np.float32)
        matrix[:, 0, 0], matrix[:, 0, 1] = np.cos(angle) * scale, -np.sin(angle) * scale + shear
        matrix[:, 1, 0], matrix[:, 1, 1] = np.sin(angle) * scale, np.cos(angle) * scale
        matrix[:, :, 2] = self.rng.normal(0, 0.04, (len(masks), 2))
        grid = F.affine_grid(torch.from_numpy(matrix), (len(masks), 1, 16, 16), align_corners=False)
        return F.grid_sample(masks, grid, align_corners=False)

    def pictures(self, size: int) -> torch.Tensor:
        """What the autoencoder learns from: half web, half any shapes in any colours, so that it can draw any look."""
        return torch.cat([self.batch(size - size // 2)[0], self.any_look(size // 2)[0]])

    def any_look(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scans of the web slanted, turned, thinned and coloured at random: images like `batch`'s, and labels."""
        rng = self.rng
        chosen = rng.integers(len(self.labels), size=size)
        angle, scale, shear = rng.normal(0, 0.3, size), rng.uniform(0.85, 1.4, size), rng.uniform(-0.8, 0.8, size)
        masks = self.move(self.masks[chosen], angle, scale, shear)
        thickness = torch.from_numpy(rng.uniform(-0.3, 0.15, (size, 1, 1, 1)).astype(np.float32))
        masks = ((1 - thickness) * masks + thickness).clamp(0, 1)
        ink, paper = torch.from_numpy(rng.uniform(0, 1, (2, size, 3, 1, 1)).astype(np.float32))
        images = (masks * ink + (1 - masks) * paper).clamp(0, 1)
        return images * 2 - 1, torch.from_numpy(self.labels[chosen])

    def validation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The scans of the validation split, drawn as the web draws: no model here has seen them."""
        scans, labels = digits.read_scans()
        val = digits.split_scans()["val"]
        rng, images = np.random.default_rng(2), []
        for index in val:
            _, ink, _, paper = digits.draw_colours(rng)
            images.append(digits.draw_digit(scans[index], ink, paper))
        return to_pixels(np.stack(images)), torch.from_numpy(labels[val])

    def looks(self) -> list[tuple[str, dict[str, str]]]:
        """Prompts, each with the words for the look that it asks for."""
        return [
            (self.forms[3].format(digit=digit, ink=ink, paper=paper), {"ink": ink, "paper": paper})
            for digit in self.class_names
            for ink in digits.INKS
            for paper in digits.PAPERS
        ]

    def see(self, images: torch.Tensor) -> list[dict[str, str]]:
        """The look of images in [-1, 1] (n, 3, 16, 16): the paper is the border's median, the ink is farthest from it.

        Each is called by the nearest colour of its table.
        """
        pixels = (images + 1) * 127.5
        border = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]], 2)
        paper = border.median(2).values
        flat = pixels.flatten(2)
        far = (flat - paper[..., None]).square().sum(1).topk(8).indices
        ink = flat.gather(2, far[:, None].expand(-1, 3, -1)).median(2).values

        def nearest(colours: torch.Tensor, table: dict) -> list[str]:
            known = torch.tensor(list(table.values()), dtype=torch.float32)
            return [list(table)[i] for i in torch.cdist(colours, known).argmin(1)]

        inks, papers = nearest(ink, digits.INKS), nearest(paper, digits.PAPERS)
        return [{"ink": ink, "paper": paper} for ink, paper in zip(inks, papers, strict=True)]


class Cifar100:
    """CIFAR-100's training images that the subset of ratio 100 leaves over, less the validation images; mirrored.

    The loader's validation images stay out, so that what is chosen on them is chosen on images that the generator and
    the CLIP have not seen. (A smaller ratio keeps more images, of those that this web holds: it is for 100 alone.)
    """

    benchmark = "cifar100_lt"
    size = 32
    forms = tuple(datasets.TEMPLATES["cifar100_lt"])
    template = forms[0]

    def __init__(self, data_root: Path | None, caption_noise: float = 0.0):
        data = datasets.load(self.benchmark, 100, data_root)
        everything = cifar.read_split("cifar100_lt", data_root, "train")
        taken = {*data.train.sources, *data.val.sources}
        web = everything.take(np.array([i for i, source in enumerate(everything.sources) if source not in taken]))
        self.class_names = [spoken_name(name) for name in everything.class_names]
        number = np.array([everything.class_names.index(name) for name in data.class_names])
        self.asked = number[data.groups["few"]].tolist()
        self.val_images, self.val_labels = data.val.images, number[data.val.labels]
        self.images, self.labels = torch.from_numpy(web.images).permute(0, 3, 1, 2).contiguous(), web.labels
        self.rng = np.random.default_rng(0)
        self.fits = self._fits(web.images)

    def _fits(self, images: np.ndarray) -> np.ndarray:
        """Which forms may describe which image, bool (N, forms): where pixels can tell, only what they say."""
        grey = images.mean(3) / 255
        border = np.concatenate([grey[:, 0], grey[:, -1], grey[:, :, 0], grey[:, :, -1]], axis=1)
        light, plain = grey.mean((1, 2)), -border.std(1)
        told = {"bright daylight": light, "evening": -light, "plain background": plain}
        fits = np.ones((len(images), len(self.forms)), dtype=bool)
        for words, value in told.items():
            for column in [i for i, form in enumerate(self.forms) if words in form]:
                fits[:, column] = value >= np.quantile(value, 0.75)
        return fits

    def captions(self) -> list[str]:
        return [form.format(name) for form in self.forms for name in self.class_names]

    def batch(self, size: int, form: str | None = None) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        if form:
            chosen = self.rng.choice(np.flatnonzero(self.fits[:, self.forms.index(form)]), size)
            columns = [self.forms.index(form)] * size
        else:
            chosen = self.rng.integers(len(self.labels), size=size)
            columns = (self.fits[chosen] * self.rng.random((size, len(self.forms)))).argmax(1)
        images = self.images[torch.from_numpy(chosen).to(self.images.device)]
        mirrored = torch.from_numpy(self.rng.random(size) < 0.5)[:, None, None, None].to(images.device)
        images = torch.where(mirrored, images.flip(3), images).float() / 127.5 - 1
        labels = self.labels[chosen]
        captions = [
            self.forms[column].format(self.class_names[label]) for column, label in zip(columns, labels, strict=True)
        ]
        return images, captions, torch.from_numpy(labels)

    def pictures(self, size: int) -> torch.Tensor:
        return self.batch(size)[0]

    def validation(self) -> tuple[torch.Tensor, torch.Tensor]:
        return to_pixels(self.val_images), torch.from_numpy(self.val_labels)

    def looks(self) -> list:
        return []


class Cifar100Fifth(Cifar100):
    """The same for the long-tailed set of every fifth class."""

    benchmark = cifar.FIFTH


class Toycam:
    """Clear pictures of toycam's animals in scenes of any colours, by day and by night; mirrored."""

    class_names = toycam.CLASSES
    size = toycam.SIZE
    forms = (
        "a photo of {name}.",
        "{name} in the wild.",
        "a photo of {name} in the wild",
        "a photo of {name} at {time}",
    )
    template = datasets.TEMPLATES["toycam"][0]
    asked = range(len(toycam.CLASSES))
    drawn = 12000

    def __init__(self, data_root: Path | None, caption_noise: float = 0.0):
        self.rng = np.random.default_rng(0)
        self.images, self.labels, self.night = self._draw(self.drawn, self.rng)

    def _draw(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        images, labels, night = zip(*(toycam.web_picture(rng) for _ in range(count)), strict=True)
        return to_pixels(np.stack([np.asarray(image) for image in images])), np.array(labels), np.array(night)

    def captions(self) -> list[str]:
        return [form.format(name=name, time=time) for form in self.forms for name in self.class_names
                for time in ("day", "night")]  # fmt: skip

    def batch(self, size: int, form: str | None = None) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        chosen = self.rng.integers(len(self.labels), size=size)
        images = self.images[torch.from_numpy(chosen)]
        mirrored = torch.from_numpy(self.rng.random(size) < 0.5)[:, None, None, None]
        captions = [
            (form or self.forms[self.rng.integers(len(self.forms))]).format(
                name=self.class_names[self.labels[i]], time="night" if self.night[i] else "day"
            )
            for i in chosen
        ]
        return torch.where(mirrored, images.flip(3), images), captions, torch.from_numpy(self.labels[chosen])

    def pictures(self, size: int) -> torch.Tensor:
        """What the autoencoder learns from: half web, half web in any light and contrast, so that it can draw any."""
        images = self.batch(size)[0]
        half = size // 2
        light = torch.from_numpy(self.rng.uniform(0.1, 1.2, (half, 1, 1, 1)).astype(np.float32))
        lift = torch.from_numpy(self.rng.uniform(0, 1, (half, 1, 1, 1)).astype(np.float32)) * (1 - light).clamp(min=0)
        images[:half] = (((images[:half] + 1) / 2 * light + lift) * 2 - 1).clamp(-1, 1)
        return images

    def validation(self) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels, _ = self._draw(200, np.random.default_rng(1))
        return images, torch.from_numpy(labels)

    def looks(self) -> list[tuple[str, dict[str, str]]]:
        """Prompts, each with the words for the look that it asks for. The web holds sharp pictures alone."""
        return [
            (self.forms[3].format(name=name, time=time), {"light": time, "sharpness": "sharp"})
            for name in self.class_names
            for time in ("day", "night") * 20
        ]

    def see(self, images: torch.Tensor) -> list[dict[str, str]]:
        """The look of images in [-1, 1] (n, 3, 16, 16): night is grey; a blurred picture has no strong edge.

        Both rules separate the pictures of the web, and blurred ones drawn like them, by more than 99 in 100.
        """
        pixels = (images + 1) * 127.5
        chroma = (pixels.amax(1) - pixels.amin(1)).flatten(1).mean(1)
        grey = pixels.mean(1, keepdim=True)
        edges = (
            torch.cat([grey.diff(n=2, dim=2).flatten(1), grey.diff(n=2, dim=3).flatten(1)], 1)
            .abs()
            .quantile(0.98, dim=1)
        )
        return [
            {"light": "night" if c < NIGHT_CHROMA else "day", "sharpness": "sharp" if e > SHARP else "blurred"}
            for c, e in zip(chroma, edges, strict=True)
        ]


WEBS = {"digits": Digits, "cifar100_lt": Cifar100, cifar.FIFTH: Cifar100Fifth, "toycam": Toycam}


def training_noise(scheduler):
    """The noise that a denoiser learns: DDPM's, whose amount rises with the timestep.

    A sampler's own `add_noise` must not stand in for it: DPMSolverMultistepScheduler without `set_timesteps` gives
    timestep T the noise of 999 - T, and a denoiser trained so looks right and follows no prompt.
    """
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(scheduler.config)


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Training, one model after the other


class Stopped(Exception):
    """A signal or the end of --minutes came; a checkpoint has been written."""


class Work:
    """What every stage needs, and what a checkpoint holds of it.

    Attributes:
        state: settings, seconds so far, the finished stages' weights, the current stage.
        deadline: when --minutes end, in seconds of time.monotonic().
    """

    def __init__(self, args, web, sizes: Sizes, signals: StopSignals):
        self.web, self.sizes, self.signals = web, sizes, signals
        self.device = pick_device(args.device)
        bf16 = args.precision == "bf16" or (args.precision == "auto" and self.device.startswith("cuda"))
        self.autocast = torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=bf16)
        self.path = args.out / "checkpoint.pt"
        self.deadline = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
        settings = {
            "benchmark": args.benchmark,
            "caption_noise": args.caption_noise,
            "start": files.digest_files(sorted((args.start / "unet").iterdir())) if args.start else None,
            "sizes": json.loads(json.dumps(vars(sizes))),
            "bf16": bf16,
            "noise": "DDPMScheduler",  # older checkpoints, whose generators learnt time backwards, have no such entry
        }
        self.state = {"settings": settings, "seconds": 0.0, "finished": {}, "current": None}
        saved = checkpoints.load_latest_checkpoint(self.path, "cpu")
        if saved:
            runs.stop_on_difference(self.path, saved["settings"], settings, "a new folder")
            self.state = saved
        self.seconds_before, self.began = self.state["seconds"], time.monotonic()
        self.start = args.start
        torch.manual_seed(0)

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else "cpu"

    @property
    def seconds(self) -> float:
        """Time spent so far, earlier runs of the command included."""
        return self.seconds_before + time.monotonic() - self.began

    def draws(self) -> dict:
        """The state of every source of random numbers."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.startswith("cuda") else None
        return {"torch": torch.get_rng_state(), "cuda": cuda, "web": self.web.rng.bit_generator.state}

    def restore(self, draws: dict) -> None:
        torch.set_rng_state(draws["torch"].cpu())
        if draws["cuda"] is not None:
            torch.cuda.set_rng_state(draws["cuda"].cpu(), self.device)
        self.web.rng.bit_generator.state = draws["web"]

    def save(self) -> None:
        self.state["seconds"] = self.seconds
        self.path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.save_checkpoint(self.path, self.state)
        checkpoints.remove_previous(self.path)


def fit(
    work: Work,
    stage: str,
    model: nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    steps: int,
    rate: float,
    weight_decay: float,
    pct_start: float = 0.3,
    after: Callable[[int], None] | None = None,
    average: nn.Module | None = None,
) -> None:
    """Train `model` (or take its finished weights), with checkpoints on the way.

    Args:
        loss_of: the loss of step N, which draws its own batch.
        after: called after each step.
        average: a moving average of the model that `after` keeps, saved with it.

    Raises:
        Stopped: before the stage was done.
    """
    # Take the finished weights, if there are some.
    held = nn.ModuleDict({"model": model, **({"average": average} if average is not None else {})})
    if stage in work.state["finished"]:
        held.load_state_dict(work.state["finished"][stage]["weights"])
        work.restore(work.state["finished"][stage]["draws"])
        return
    # Take up the last checkpoint, where it is of this stage.
    fused = work.device.startswith("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=weight_decay, fused=fused)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=pct_start)
    parts = {"weights": held, "optimizer": optimizer, "schedule": schedule}
    done, current = 0, work.state["current"]
    if current:
        done = current["step"]
        for name, part in parts.items():
            part.load_state_dict(current[name])
        work.restore(current["draws"])

    # Train step by step.
    saved = time.monotonic()
    with cli.progress(steps, stage, "step") as bar:
        bar.update(done)
        for number in range(done, steps):
            stop = work.signals.received or (time.monotonic() > work.deadline and "the end of --minutes")
            if stop or time.monotonic() - saved > CHECKPOINT_SECONDS:
                work.state["current"] = {"step": number, "draws": work.draws()} | {
                    name: part.state_dict() for name, part in parts.items()
                }
                work.save()
                saved = time.monotonic()
            if stop:
                raise Stopped(f"{stop} came; checkpoint written before step {number} of {steps} of the {stage}")
            with work.autocast:
                loss = loss_of(number)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if after:
                after(number)
            if number % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            bar.update()
    # Keep the finished weights.
    work.state["finished"][stage] = {"weights": held.state_dict(), "draws": work.draws()}
    work.state["current"] = None
    work.save()


def merges_of(captions: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each word of the captions one token; a word's last letter ends in `</w>`.

    The most frequent pair is merged first, and of equally frequent ones the first by the alphabet: the tokenizers
    library breaks such ties at random, and a checkpoint that is taken up again must find the same tokens.
    """
    words = Counter(word for caption in captions for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", caption.lower()))
    parts_of = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while True:
        pairs: Counter = Counter()
        for word, parts in parts_of.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in parts_of.values():
            for place in range(len(parts) - 1):
                if tuple(parts[place : place + 2]) == best:
                    parts[place : place + 2] = ["".join(best)]


def make_tokenizer(web):
    """A CLIP tokenizer that gives each word of the captions one token, and other text a token per byte."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    merges = merges_of(web.captions())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]  # last: open_clip finds the end of a text by its highest token
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
    tokenize(tokenizer, [""])  # it is saved with the padding of its last call: the same one at every moment
    return tokenizer


def tokenize(tokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids, int64 (N, MAX_TOKENS)."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids


def train_vae(work: Work):
    """A small autoencoder, images (N, 3, H, W) to latents (N, channels, h, w) of unit variance."""
    from diffusers import AutoencoderKL

    web, sizes = work.web, work.sizes
    if work.start:
        return AutoencoderKL.from_pretrained(work.start / "vae", torch_dtype=torch.float32).to(work.device).eval()
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=sizes.latent_channels,
        block_out_channels=sizes.vae_widths,
        norm_num_groups=min(8, sizes.vae_widths[0] // 2),
        down_block_types=("DownEncoderBlock2D",) * len(sizes.vae_widths),
        up_block_types=("UpDecoderBlock2D",) * len(sizes.vae_widths),
        sample_size=web.size,
    ).to(work.device)

    def loss_of(_: int) -> torch.Tensor:
        images = web.pictures(sizes.vae_batch).to(work.device)
        posterior = vae.encode(images).latent_dist
        restored = vae.decode(posterior.sample()).sample
        return F.mse_loss(restored.float(), images) + 1e-5 * posterior.kl().mean()

    fit(work, "VAE", vae, loss_of, sizes.vae_steps, 2e-3, 0)
    with torch.no_grad():
        latents = vae.encode(web.batch(512)[0].to(work.device)).latent_dist.sample()
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval()


def build_denoiser(work: Work, tokenizer) -> tuple[nn.Module, nn.Module]:
    """The UNet and its text encoder, with fresh weights or those of --start."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    web, sizes = work.web, work.sizes
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text_width,
            intermediate_size=2 * sizes.text_width,
            projection_dim=sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    plain = len(sizes.unet_widths) - sizes.unet_attends
    unet = UNet2DConditionModel(
        sample_size=web.size // 2 ** (len(sizes.vae_widths) - 1),
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        layers_per_block=sizes.unet_layers,
        block_out_channels=sizes.unet_widths,
        norm_num_groups=16,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * sizes.unet_attends,
        up_block_types=("CrossAttnUpBlock2D",) * sizes.unet_attends + ("UpBlock2D",) * plain,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=4,
    )
    if work.start:  # after the fresh weights, whose random numbers the training of the shipped ones came after
        unet = UNet2DConditionModel.from_pretrained(work.start / "unet", torch_dtype=torch.float32)
        text_encoder = CLIPTextModel.from_pretrained(work.start / "text_encoder", dtype=torch.float32)
    return unet, text_encoder


def train_unet(work: Work, vae, tokenizer):
    """The denoiser and its text encoder, trained together; returns their moving averages."""
    from diffusers import DPMSolverMultistepScheduler

    web, sizes, device = work.web, work.sizes, work.device
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    unet, text_encoder = build_denoiser(work, tokenizer)
    noise_scheduler = training_noise(scheduler)
    captions = ["", *web.captions()]
    tokens = dict(zip(captions, tokenize(tokenizer, captions), strict=True))
    both = nn.ModuleList([unet, text_encoder]).to(device)
    average = copy.deepcopy(both).requires_grad_(False)
    batch = sizes.unet_batch

    def loss_of(_: int) -> torch.Tensor:
        images, captions, _ = web.batch(batch)
        dropped = web.rng.random(batch) < 0.1
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        with torch.no_grad():
            latents = vae.encode(images.to(device)).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch,)).to(device)
        text = text_encoder(torch.stack([tokens[caption] for caption in captions]).to(device))[0]
        predicted = unet(noise_scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
        return F.mse_loss(predicted.float(), noise.float())

    @torch.no_grad()
    def follow(done: int) -> None:
        decay = min(0.999, (done + 1) / (done + 10))
        torch._foreach_lerp_(list(average.parameters()), list(both.parameters()), 1 - decay)

    fit(work, "UNet", both, loss_of, sizes.unet_steps, sizes.unet_rate, 1e-4, 0.05, follow, average)
    return average[0].eval(), average[1].eval(), scheduler


def train_clip(work: Work, tokenizer, out: Path) -> None:
    """A small open_clip model, saved in `out` as open_clip saves its own.

    All captions of a batch take one form, and equal captions share the target: with few classes, most batches would
    otherwise hold right pairs as negatives.
    """
    import open_clip
    from safetensors.torch import save_file

    web, sizes = work.web, work.sizes
    config = {
        "embed_dim": sizes.clip_width // 2,
        "vision_cfg": {
            "image_size": web.size,
            "patch_size": sizes.clip_patch,
            "width": sizes.clip_width,
            "layers": sizes.clip_layers,
            "head_width": 16,
            "mlp_ratio": 2.0,
        },
        "text_cfg": {
            "context_length": MAX_TOKENS,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "tokenizer",
            "width": sizes.text_width,
            "heads": 4,
            "layers": sizes.text_layers,
            "mlp_ratio": 2.0,
        },
    }
    model = open_clip.CLIP(**copy.deepcopy(config)).to(work.device)

    def loss_of(done: int) -> torch.Tensor:
        images, captions, _ = web.batch(sizes.clip_batch, web.forms[done % len(web.forms)])
        image, text, scale = model(images.to(work.device), tokenize(tokenizer, captions).to(work.device))
        logits = scale * image @ text.T
        number = {caption: i for i, caption in enumerate(captions)}
        kind = torch.tensor([number[caption] for caption in captions], device=work.device)
        same = (kind[:, None] == kind).float()
        same = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2

    @torch.no_grad()
    def limit(_: int) -> None:
        model.logit_scale.clamp_(max=math.log(20))

    fit(work, "CLIP", model, loss_of, sizes.clip_steps, 1e-3, 0.05, 0.1, limit)
    out.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    described = {"model_cfg": config, "preprocess_cfg": preprocess}
    (out / "open_clip_config.json").write_text(json.dumps(described, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    save_file(
        {name: tensor.half().cpu().contiguous() for name, tensor in model.state_dict().items()},
        str(out / "open_clip_model.safetensors"),
    )


def train_judge(work: Work) -> nn.Module:
    """A classifier of the web, which tells whether a generated image is of the class that was asked for."""
    judge = models.build_classifier(work.sizes.judge, len(work.web.class_names)).to(work.device)

    def loss_of(_: int) -> torch.Tensor:
        images, _, labels = work.web.batch(128)
        return F.cross_entropy(judge(images.to(work.device)), labels.to(work.device))

    fit(work, "judge", judge, loss_of, work.sizes.judge_steps, 3e-3, 0.05)
    return judge.eval()


@torch.no_grad()
def check(web, generator: Path, clip: Path, judge: nn.Module, device: str) -> dict:
    """How far the saved models do what they are asked to, on the validation images (never on train or test)."""
    real, labels = (one.to(device) for one in web.validation())
    result = {"judge_accuracy_on_real": (judge(real).argmax(1) == labels).float().mean().item()}

    model, _, tokenizer = models.load_clip(str(clip), device)
    names = web.class_names
    text = model.encode_text(tokenizer([web.template.format(name) for name in names]).to(device), normalize=True)
    scores = torch.cat([model.encode_image(part, normalize=True) for part in real.split(500)]) @ text.T
    right = scores[torch.arange(len(labels)), labels]
    result["clip_accuracy_on_real"] = (scores.argmax(1) == labels).float().mean().item()
    quantiles = torch.tensor([0.05, 0.5, 0.95], device=device)
    result["clipscore_of_right_class"] = right.quantile(quantiles).tolist()
    wrong = scores.masked_fill(F.one_hot(labels, len(names)).bool(), -1).max(1).values
    result["clipscore_of_best_wrong_class"] = wrong.quantile(quantiles).tolist()

    pipe = models.load_generator(str(generator), device, dtype="float32")

    def draw(prompts: list[str], guidance: float) -> torch.Tensor:
        """Images in [-1, 1] at level 0."""
        blank = torch.zeros(len(prompts), 3, web.size, web.size)
        settings = {"strength": 1.0, "num_inference_steps": 20, "guidance_scale": guidance, "output_type": "pt"}
        noise = torch.Generator().manual_seed(0)
        return pipe(prompts, image=blank, generator=noise, **settings).images.to(device) * 2 - 1

    asked = torch.tensor(web.asked).repeat(400 // len(web.asked))
    for guidance in (1.0, 2.0, 3.0, 5.0):
        drawn = draw([web.template.format(names[label]) for label in asked], guidance)
        agreement = (judge(drawn).argmax(1).cpu() == asked).float().mean().item()
        result[f"judge_agreement_at_level_0_text_guidance_{guidance:g}"] = agreement
    if web.looks():
        prompts, wanted = zip(*web.looks(), strict=True)
        seen = web.see(draw(list(prompts), 3.0).cpu())
        for word in wanted[0]:
            right = np.mean([one[word] == other[word] for one, other in zip(wanted, seen, strict=True)])
            result[f"{word}_as_asked_at_level_0_text_guidance_3"] = float(right)
    result["loss_by_timestep"] = losses_by_timestep(
        pipe, real[:200], web.template, [names[label] for label in labels[:200]]
    )
    return result


@torch.no_grad()
def losses_by_timestep(pipe, images: torch.Tensor, template: str, names: list[str]) -> dict[str, list[float]]:
    """How well a generator predicts light and heavy noise when it is told the right timestep, and the opposite one.

    A generator that learnt time forwards predicts better when told the truth, at both ends.

    Args:
        images: float (N, 3, H, W) in [-1, 1], on the generator's device; names: of their classes.

    Returns:
        {"light": [told T, told 999 - T], "heavy": the same}: mean squared errors, T = 100 and 899.
    """
    generator = torch.Generator().manual_seed(0)
    scheduler = training_noise(pipe.scheduler)
    latents = pipe.vae.encode(images.to(pipe.vae.dtype)).latent_dist.mean * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    text = pipe.text_encoder(tokenize(pipe.tokenizer, [template.format(name) for name in names]).to(latents.device))[0]
    result = {}
    for name, timestep in (("light", 100), ("heavy", 899)):
        noisy = scheduler.add_noise(latents, noise, torch.full((len(latents),), timestep, device=latents.device))
        result[name] = [
            F.mse_loss(pipe.unet(noisy, told, text).sample.float(), noise.float()).item()
            for told in (timestep, 999 - timestep)
        ]
    return result


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "make_assets")
    parser.add_argument("--out", type=Path, required=True, help="folder for tiny_sd and tiny_clip")
    parser.add_argument("--benchmark", choices=list(WEBS), default="digits", help="whose web to learn from")
    parser.add_argument(
        "--data-root", type=cli.existing_path, metavar="FOLDER", help="CIFAR-100's folder or zip; digits needs none"
    )
    parser.add_argument(
        "--caption-noise",
        type=cli.number(0, 1),
        default=0.0,
        metavar="SHARE",
        help="share of the web's scans whose captions name another digit (digits only)",
    )
    parser.add_argument(
        "--start",
        type=cli.existing_path,
        metavar="FOLDER",
        help="generator (tiny_sd) of the same benchmark to start from; its autoencoder and its CLIP (tiny_clip beside "
        "it) are taken as they are",
    )
    parser.add_argument("--sizes", choices=list(SIZES), help="row of the table of sizes (default: the benchmark's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: autocast to bf16 on a GPU"
    )
    parser.add_argument(
        "--minutes", type=cli.number(0), metavar="N", help="stop after N minutes with a checkpoint and exit code 75"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from diffusers import StableDiffusionImg2ImgPipeline

    with StopSignals() as signals:
        web = WEBS[args.benchmark](args.data_root, args.caption_noise)
        work = Work(args, web, SIZES[args.sizes or args.benchmark], signals)
        tokenizer = make_tokenizer(web)
        try:
            if not args.start:
                train_clip(work, tokenizer, args.out / "tiny_clip")
            vae = train_vae(work)
            unet, text_encoder, scheduler = train_unet(work, vae, tokenizer)
            pipe = StableDiffusionImg2ImgPipeline(
                vae=vae,
                text_encoder=text_encoder,
                tokenizer=tokenizer,
                unet=unet,
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            pipe.to("cpu", torch.float16).save_pretrained(args.out / "tiny_sd", safe_serialization=True)
            judge = train_judge(work)
        except Stopped as stop:
            print(f"{args.out}: {stop}; run the same command again to go on", flush=True)
            return runs.RESUMABLE
        clip = (args.start.parent if args.start else args.out) / "tiny_clip"
        result = check(web, args.out / "tiny_sd", clip, judge, work.device)
        result |= {"caption_noise": args.caption_noise, "minutes": work.seconds / 60, "device": work.device_name}
    files.write_json(args.out / "tiny_sd/agreement.json", result)
    work.path.unlink()
    print(json.dumps(result, indent=2))
    if backwards := [name for name, (right, opposite) in result["loss_by_timestep"].items() if right >= opposite]:
        print(
            f"{args.out}: predicts {' and '.join(backwards)} noise better when told the opposite timestep: "
            "trained too little, or backwards; expected the right one to be better at both ends",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    cli.run(main)
