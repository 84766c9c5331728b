"""Drawing under masks: what a mask keeps stays to the pixel, the rest is the inpainting pipeline's own image."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
import tiny_editors
import torch
from PIL import Image

import datasets
import generate_spectrum
import models
import write_prompts
from generation.inpainting import Inpainter
from generation.worklist import Batch
from runtime.cli import UserError
from spectrum import folder as spectrum_folder
from spectrum.units import Unit

DATA = ["--dataset", "biased_digits"]
KEPT = np.zeros((16, 16), bool)
KEPT[3:12, 5:9] = True


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three digits; the mask of two keeps a rectangle, the third has none."""
    root = tmp_path_factory.mktemp("masks")
    data = datasets.load("biased_digits", None)
    (root / "masks").mkdir()
    Image.fromarray(np.where(KEPT, 200, 60).astype(np.uint8)).save(root / "masks/a.png")
    with (root / "hard.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["source", "label", "class_name", "reason", "score", "mask"])
        for place, mask in ((0, "masks/a.png"), (1, "masks/a.png"), (2, "")):
            table.writerow([data.train.sources[place], 0, "zero", "all", 30, mask])
    assert write_prompts.main([*DATA, "--hard", str(root / "hard.csv"), "--out", str(root / "prompts.json")]) == 0
    return root, data.train


def draw(root, out, *flags) -> int:
    arguments = ["--hard", root / "hard.csv", "--prompts", root / "prompts.json", "--out", out, "--seeds", 1]
    arguments += ["--levels", 20, "--steps", 5, *flags]
    return generate_spectrum.main([*DATA, *map(str, arguments)])


def pictures(folder) -> dict[str, np.ndarray]:
    rows = {row["source"]: row["file_name"] for row in spectrum_folder.read_rows(folder)}
    return {source: np.asarray(Image.open(folder / name)) for source, name in rows.items()}


@pytest.mark.parametrize("kind", ["any", "trained", "editor"])
def test_what_the_mask_keeps_stays_to_the_pixel(kind, inputs, tmp_path):
    """By a generator that was made for inpainting, by one that was not, and by an editor."""
    root, train = inputs
    flags = []
    if kind == "trained":
        flags = ["--generator", tiny_editors.save_inpainter(tmp_path / "tiny")]
    elif kind == "editor":
        flags = ["--generator", tiny_editors.save_pix2pix(tmp_path / "tiny"), "--image-guidance", 1.5]
    assert draw(root, tmp_path / "out", *flags) == 0
    found = pictures(tmp_path / "out")
    for place in (0, 1):
        image, source = found[train.sources[place]], train.images[place]
        assert (image[KEPT] == source[KEPT]).all()
        assert np.abs(image[~KEPT].astype(int) - source[~KEPT]).mean() > 3
    assert (found[train.sources[2]][KEPT] != train.images[2][KEPT]).mean() > 0.5  # no mask: all of it is drawn anew
    assert draw(root, tmp_path / "one", *flags, "--batch-size", 1) == 0
    for source, image in pictures(tmp_path / "one").items():
        assert np.abs(image.astype(int) - found[source]).max() <= 1  # rounding


def test_the_rest_is_the_pipelines_own_image(inputs, tmp_path):
    root, train = inputs
    pipe = models.load_generator(str(tiny_editors.save_inpainter(tmp_path / "tiny")), "cpu", masked=True)
    units = [Unit(train.sources[place], 20, 0) for place in (0, 2)]
    images = {unit.source: Image.fromarray(train.images[place]) for unit, place in zip(units, (0, 2), strict=True)}
    inpainter = Inpainter(pipe, 5, 4.0, {units[0].source: root / "masks/a.png"})
    drawn = inpainter.draw(Batch(20, (16, 16), None, units), 0, ["a nine", "a zero"], images)
    for unit, text, region, ours in zip(units, ("a nine", "a zero"), (~KEPT, ~KEPT | KEPT), drawn, strict=True):
        plain = pipe(
            text, image=images[unit.source], mask_image=Image.fromarray(np.where(region, 255, 0).astype(np.uint8)),
            strength=0.81, num_inference_steps=5, guidance_scale=4.0, width=16, height=16, output_type="pt",
            generator=torch.Generator().manual_seed(unit.noise_seed()),
        ).images  # fmt: skip
        assert torch.allclose(ours, plain[0], atol=2e-4)


def test_other_masks_are_another_spectrum(inputs, tmp_path):
    root = shutil.copytree(inputs[0], tmp_path / "root")
    assert draw(root, tmp_path / "out") == 0
    Image.fromarray(np.where(KEPT.T, 255, 0).astype(np.uint8)).save(root / "masks/a.png")
    with pytest.raises(UserError, match="masks"):
        draw(root, tmp_path / "out")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("masks/none.png", "hard.csv: mask 'masks/none.png' of .*: expected a file below"),
        ("../a.png", "hard.csv: mask '../a.png' of .*: expected a file below"),
        ("masks/wide.png", "wide.png: is 20x16; expected 16x16, the size of"),
        ("hard.csv", "mask of .*: not a readable image"),
    ],
)
def test_bad_masks_are_named_before_anything_is_drawn(inputs, tmp_path, mask, message):
    root = shutil.copytree(inputs[0], tmp_path / "root")
    Image.new("L", (20, 16)).save(root / "masks/wide.png")
    text = (root / "hard.csv").read_text()
    (root / "hard.csv").write_text(text.replace("masks/a.png", mask, 1))
    with pytest.raises(UserError, match=message):
        draw(root, tmp_path / "out")
    assert not list((tmp_path / "out").glob("shard-*/*.png"))


def test_a_generator_for_inpainting_wants_masks(inputs, tmp_path):
    root = shutil.copytree(inputs[0], tmp_path / "root")
    text = (root / "hard.csv").read_text()
    (root / "hard.csv").write_text(text.replace("masks/a.png", ""))
    with pytest.raises(
        UserError, match="its UNet takes 9 channels, as one for inpainting does; expected a column mask"
    ):
        draw(root, tmp_path / "out", "--generator", tiny_editors.save_inpainter(tmp_path / "tiny"))
