"""toycam: a tiny stand-in for iWildCam, drawn into a folder of WILDS's layout (`metadata.csv`, `train/*.jpg`).

16x16 scenes of four animals, and of none, seen by camera traps. A trap has its own background and light, and its own
share of each animal; the out-of-domain splits come from other traps, in snow, dark forest and red earth, more often at
night. Four in ten images are of low quality: dark, blurred, or with the animal cut off by the frame. Which they are
is in metadata.csv (`quality`).

The tiny generator and CLIP for it know the same animals from a *web* of clear pictures, drawn anew and in other scenes
(assets/make_assets.py).
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from runtime import files

CLASSES = ["empty", "deer", "boar", "bird", "snake"]
SIZE = 16  # pixels
SCALE = 8  # scenes are drawn this much larger and averaged down, for smooth edges
LOW_QUALITY = 0.4  # share of the images
WEB_NIGHT = 0.3  # share of the web's pictures that are taken at night
SEED = 20241101
# split -> (first trap, traps, images)
SPLITS = {"train": (0, 6, 480), "val": (6, 2, 150), "test": (8, 4, 400), "id_val": (0, 6, 150), "id_test": (0, 6, 300)}
COLUMNS = ("split", "y", "filename", "location_remapped", "sequence_remapped", "datetime", "quality")
# Ground and backdrop (RGB, 0 to 255) of the traps by where they stand; those of OTHER are never in domain.
HOME = [((150, 162, 92), (104, 140, 96)), ((182, 162, 112), (128, 150, 110)), ((150, 160, 146), (172, 186, 192))]
OTHER = [((214, 218, 226), (150, 166, 184)), ((78, 84, 52), (44, 66, 44)), ((128, 84, 62), (96, 72, 80))]
COATS = [(124, 84, 48), (88, 66, 52), (60, 52, 48), (146, 112, 72), (104, 100, 96)]


def draw_scene(
    rng: np.random.Generator, ground: np.ndarray, backdrop: np.ndarray, horizon: float, trunks: np.ndarray
) -> Image.Image:
    """A place without an animal, SCALE times its size.

    Args:
        ground, backdrop: RGB, 0 to 255.
        horizon: height of the ground's edge, in [0, 1] from above.
        trunks: (n, 3): place, width (both in [0, 1]) and brightness of each tree.
    """
    side = SIZE * SCALE
    pixels = np.empty((side, side, 3))
    edge = int(horizon * side)
    pixels[:edge], pixels[edge:] = backdrop, ground
    rough = rng.normal(0, 6, (SIZE, SIZE, 1)).repeat(SCALE, 0).repeat(SCALE, 1)
    image = Image.fromarray(np.clip(pixels + rough, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for place, width, brightness in trunks:
        left = int(place * side)
        draw.rectangle((left, 0, left + int(width * side), edge + side // 12), fill=(int(40 + 40 * brightness),) * 3)
    return image


def draw_animal(image: Image.Image, name: str, rng: np.random.Generator, cut: bool) -> None:
    """Draw an animal into a scene: of random size, coat and place, facing either way; with `cut` half out of view."""
    if name == "empty":
        return
    side = SIZE * SCALE
    # Choose size, place and coat.
    size = side * rng.uniform(0.42, 0.62)
    x = side * (rng.choice([-0.02, 1.02]) if cut else rng.uniform(0.35, 0.65))
    y = side * rng.uniform(0.62, 0.78)  # of the feet
    facing = rng.choice([-1, 1])
    coat = np.clip(np.array(COATS[rng.integers(len(COATS))]) + rng.normal(0, 10, 3), 0, 255)
    coat, dark = tuple(coat.astype(int)), tuple((coat * 0.55).astype(int))
    draw = ImageDraw.Draw(image)

    def at(u: float, v: float) -> tuple[float, float]:
        """A point of the animal: u from tail (-1) to head (1), v from the feet (0) up, in units of half its size."""
        return x + facing * u * size / 2, y - v * size / 2

    def oval(u: float, v: float, width: float, height: float, fill: tuple) -> None:
        (left, top), (right, bottom) = (
            at(u - facing * width / 2, v + height / 2),
            at(u + facing * width / 2, v - height / 2),
        )
        draw.ellipse((left, top, right, bottom), fill=fill)

    def line(points: list[tuple[float, float]], width: float, fill: tuple) -> None:
        draw.line([at(*point) for point in points], fill=fill, width=max(1, int(width * size / 2)), joint="curve")

    # Draw it, part by part.
    if name == "deer":
        for u in (-0.5, -0.35, 0.3, 0.45):
            line([(u, 0.8), (u, 0)], 0.11, dark)
        oval(-0.03, 0.9, 1.25, 0.5, coat)
        line([(0.5, 1.0), (0.75, 1.55)], 0.24, coat)
        oval(0.85, 1.62, 0.42, 0.24, coat)
        line([(0.72, 1.7), (0.6, 2.15), (0.85, 2.3)], 0.08, dark)
        line([(0.72, 1.7), (0.9, 2.1)], 0.08, dark)
    elif name == "boar":
        for u in (-0.5, -0.25, 0.25, 0.5):
            line([(u, 0.35), (u, 0)], 0.16, dark)
        oval(-0.1, 0.72, 1.6, 0.95, coat)
        oval(0.75, 0.6, 0.75, 0.5, coat)
        oval(1.08, 0.5, 0.2, 0.24, dark)
    elif name == "bird":
        line([(-0.05, 0.4), (-0.05, 0)], 0.09, dark)
        line([(0.15, 0.4), (0.15, 0)], 0.09, dark)
        oval(0.0, 0.75, 0.85, 0.7, coat)
        oval(0.4, 1.3, 0.42, 0.42, coat)
        line([(0.55, 1.3), (0.85, 1.22)], 0.12, (226, 170, 40))
        line([(-0.35, 0.85), (-0.85, 1.05)], 0.22, dark)
    else:  # snake
        bends = np.linspace(-1.2, 1.2, 25)
        swing = rng.uniform(0, 2 * np.pi)
        line([(u, 0.35 + 0.28 * np.sin(4.5 * u + swing)) for u in bends], 0.2, coat)
        oval(1.25, 0.35 + 0.28 * np.sin(4.5 * 1.2 + swing), 0.36, 0.28, dark)


def lower(image: Image.Image, quality: str, night: bool, rng: np.random.Generator) -> Image.Image:
    """A scene as a trap takes it, SIZE x SIZE: at night without colour; `dark` and `blurred` where the quality is."""
    if quality == "blurred":
        image = image.filter(ImageFilter.GaussianBlur(SCALE * rng.uniform(1.0, 1.6)))
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float64)
    if night:  # infrared: grey, and darker away from the lamp
        y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) - 0.5
        pixels = pixels.mean(2, keepdims=True).repeat(3, 2) * (0.95 - 0.9 * (x**2 + y**2))[..., None]
    if quality == "dark":
        pixels = pixels * rng.uniform(0.2, 0.4)
    noise = rng.normal(0, 8 if quality == "dark" else 3, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def trap(number: int) -> dict:
    """What is the same in all images of a trap: its scene, its share of night, and its share of each class."""
    rng = np.random.default_rng([SEED, number])
    palette = HOME if number < SPLITS["val"][0] else OTHER
    ground, backdrop = (np.array(c) + rng.normal(0, 8, 3) for c in palette[number % len(palette)])
    trunks = np.column_stack([rng.uniform(0, 1, 3), rng.uniform(0.05, 0.12, 3), rng.uniform(0, 1, 3)])
    return {
        "scene": (ground, backdrop, rng.uniform(0.3, 0.5), trunks[: rng.integers(4)]),
        "night": rng.uniform(0.2, 0.5) if palette is HOME else rng.uniform(0.4, 0.8),
        "shares": rng.dirichlet([1.2] * len(CLASSES)),
    }


def take(number: int, split: str, image: int) -> tuple[Image.Image, int, str]:
    """The `image`-th picture of trap `number` in a split: 16x16, its class, and its quality."""
    rng = np.random.default_rng([SEED, number, list(SPLITS).index(split), image])
    here = trap(number)
    label = int(rng.choice(len(CLASSES), p=here["shares"]))
    kinds = ["dark", "blurred"] + (["cut off"] if label else [])
    quality = str(rng.choice(kinds)) if rng.random() < LOW_QUALITY else "good"
    scene = draw_scene(rng, *here["scene"])
    draw_animal(scene, CLASSES[label], rng, quality == "cut off")
    return lower(scene, quality, rng.random() < here["night"], rng), label, quality


def web_picture(rng: np.random.Generator) -> tuple[Image.Image, int, bool]:
    """A clear picture as the web has them, in a scene of any colours: 16x16, its class, and whether it is by night."""
    label = int(rng.integers(len(CLASSES)))
    ground, backdrop = rng.uniform(60, 220, 3), rng.uniform(40, 230, 3)
    trunks = np.column_stack([rng.uniform(0, 1, 3), rng.uniform(0.05, 0.12, 3), rng.uniform(0, 1, 3)])
    scene = draw_scene(rng, ground, backdrop, rng.uniform(0.3, 0.5), trunks[: rng.integers(4)])
    draw_animal(scene, CLASSES[label], rng, False)
    night = bool(rng.random() < WEB_NIGHT)
    return lower(scene, "good", night, rng), label, night


def draw(root: Path) -> None:
    """Draw the data set into a new folder, which appears whole or not at all."""
    beside = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    (beside / "train").mkdir(parents=True)
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    number = 0
    for split, (first, traps, images) in SPLITS.items():
        for i in range(images):
            place = first + i % traps
            picture, label, quality = take(place, split, i)
            name = f"{split}_{i:04d}.jpg"
            picture.save(beside / "train" / name, quality=95, subsampling=0)
            moment = f"2024-{1 + i % 12:02d}-{1 + i % 28:02d} {i % 24:02d}:00:00.000"
            row = (split, label, name, place, number, moment, quality)
            table.writerow(dict(zip(COLUMNS, row, strict=True)))
            number += 1
    files.write_text(beside / "metadata.csv", text.getvalue())
    try:
        beside.rename(root)
    except OSError:  # another process was first: its pictures are the same
        if not (root / "metadata.csv").is_file():
            raise
        shutil.rmtree(beside)
