"""The web of each benchmark: images and captions that its own generator and CLIP learn from (make_assets.py).

A web holds no image that a classifier trains, validates or is tested on. Each has

    class_names, size   names as a caption says them; the images' side in pixels
    forms               the captions' forms
    template            the form that CLIPScore is taken against
    asked               class indices that the finished generator is asked for
    captions()          every caption there can be
    batch(n, form)      float images in [-1, 1], (n, 3, size, size), n captions (each of a random form, or all of
                        `form`), and labels, (n,), on the CPU; what it draws depends on `rng` alone
    pictures(n)         images as `batch` gives, which the autoencoder learns from
    validation()        images and labels that the models do not see
    looks(), see()      prompts with words for a look, and the words that images' looks come to; [] where pixels cannot
                        tell
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import datasets
from loaders import cifar, digits, toycam
from loaders.base import spoken_name

# Of toycam's pictures, 0 to 255: by day the web has 25 and more, by night 5; sharp 37 and more, blurred 21.
NIGHT_CHROMA, SHARP = 15.0, 29.0


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


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

    The loader's validation images stay out, so that choices made on them are made on images that the generator and the
    CLIP have not seen. The web is for ratio 100 alone: with a smaller ratio, training would use images of it.
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
