"""Flow-matching generators and editors of today, as tiny models: what is recorded of an image is what was done."""

from __future__ import annotations

import json

import pytest
import tiny_flow
import torch
from PIL import Image

import datasets
import generate_spectrum
import models
from generation import generator as generators
from generation import texts, worklist
from runtime.cli import UserError
from spectrum import folder as spectrum_folder
from spectrum.units import Unit

SIZE = (32, 24)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each tiny model, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("flow"), {}

    def folder(name: str) -> str:
        if name not in made:
            made[name] = str(getattr(tiny_flow, f"save_{name}")(root / name))
        return made[name]

    return folder


@pytest.fixture(scope="module")
def pipes(folders, tmp_path_factory):
    """Each tiny pipeline, loaded as the script loads it."""
    loaded = {}

    def pipe(name: str):
        if name not in loaded:
            built = {"sd3": tiny_flow.build_sd3, "flux": lambda: tiny_flow.build_flux(tmp_path_factory.mktemp("flux"))}
            loaded[name] = built[name]() if name in built else models.load_generator(folders(name), "cpu")
        return loaded[name]

    return pipe


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Two hard digits, noughts, and two prompts for them, of different lengths."""
    folder = tmp_path_factory.mktemp("two")
    rows = [f"{source},0,zero,few,1\n" for source in datasets.load("digits", 30).train.sources[:2]]
    (folder / "hard.csv").write_text("source,label,class_name,reason,score\n" + "".join(rows))
    prompts = {"0": {"class_name": "zero", "score_prompt": "a zero", "prompts": ["a zero", "a zero in red ink"]}}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return ["--hard", str(folder / "hard.csv"), "--prompts", str(folder / "prompts.json")]


def two_images(level: int):
    """A batch of two units, a text for each, of different lengths, and their sources."""
    source = Image.linear_gradient("L").resize(SIZE).convert("RGB")
    units = [Unit(name, level, 0) for name in "ab"]
    return (
        worklist.Batch(level, SIZE, None, units),
        ["a nine", "a much longer four"],
        {
            "a": source,
            "b": source.rotate(180),
        },
    )


@pytest.mark.parametrize(("level", "steps"), [(0, 10), (50, 5), (70, 3), (90, 1)])
@pytest.mark.parametrize("family", ["sd3", "z_image", "qwen_image"])
def test_the_steps_and_the_size_are_the_ones_that_are_recorded(pipes, family, level, steps):
    pipe, calls = pipes(family), []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(0))
    batch, prompts, images = two_images(level)
    drawn = generators.Generator(pipe, steps=10, text_guidance=3.0).draw(batch, 0, prompts, images)
    hook.remove()
    passes = 2 if family == "qwen_image" else 1  # with and without the text, one after the other
    assert (len(calls), drawn.shape) == (steps * passes, (2, 3, 24, 32))
    assert worklist.steps_at(level, 10) == steps


# The sixth of ten timesteps. SD3 counts from 1000 to 1, and shifts by nothing; Z-Image from 1000 to 100, and shifts by
# three: 3s / (1 + 2s) of s = 0.5. Flux and Qwen-Image shift by exp(mu), and mu goes by the number of patches: 48 where
# 256 have 0.5 and 4096 have 1.15.
MU = 0.5 + (48 - 256) * (1.15 - 0.5) / (4096 - 256)
EXPECTED = {
    "sd3": 1000 - 5 * 999 / 9,
    "z_image": 1000 * 3 * 0.5 / 2,
    "qwen_image": 1000 * 2.718281828**MU / (2.718281828**MU + 1),
    "flux": 1000 * 2.718281828**MU / (2.718281828**MU + 1),
}


@pytest.mark.parametrize("level", [0, 50, 90])
@pytest.mark.parametrize("family", ["sd3", "flux", "z_image", "qwen_image"])
def test_by_latents_comes_what_a_plain_call_of_the_pipeline_draws(pipes, family, level, monkeypatch):
    pipe = pipes(family)
    batch, prompts, images = two_images(level)
    fast = generators.Generator(pipe, steps=10, text_guidance=3.0)
    assert fast.by_latents and fast.start_timestep(level, SIZE) == -1  # nobody knows before
    together = fast.draw(batch, 0, list(prompts), images)
    monkeypatch.setattr(generators, "LATENT_PIPELINES", {})
    plain = generators.Generator(pipe, steps=10, text_guidance=3.0)
    for place, (unit, text) in enumerate(zip(batch.units, prompts, strict=True)):
        alone = plain.draw(batch._replace(units=[unit]), 0, [text], images)
        assert (together[place] - alone[0]).abs().max() < 1e-4
        assert alone.std() > 0.01
    assert fast.start_timestep(level, SIZE) == plain.start_timestep(level, SIZE)
    if level == 50:
        assert fast.start_timestep(level, SIZE) == round(EXPECTED[family])


@pytest.mark.parametrize("family", ["sd3", "flux", "z_image", "qwen_image"])
def test_levels_by_noise_begin_at_their_share_of_the_noise(pipes, family, monkeypatch):
    """Level 70 of four steps: two, from a share of 0.3, which is shifted as the family's own steps are."""
    pipe, calls = pipes(family), []
    shift = {"sd3": 1, "z_image": 3}.get(family, 2.718281828**MU)
    batch, prompts, images = two_images(70)
    fast = generators.Generator(pipe, steps=4, text_guidance=3.0, by_noise=True)
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(0))
    together = fast.draw(batch, 0, list(prompts), images)
    hook.remove()
    assert len(calls) == (4 if family == "qwen_image" else 2)  # with and without the text, one after the other
    assert fast.start_timestep(70, SIZE) == round(1000 * shift * 0.3 / (1 + (shift - 1) * 0.3))
    # The pipeline called with images draws the same.
    monkeypatch.setattr(generators, "LATENT_PIPELINES", {})
    plain = generators.Generator(pipe, steps=4, text_guidance=3.0, by_noise=True)
    for place, (unit, text) in enumerate(zip(batch.units, prompts, strict=True)):
        alone = plain.draw(batch._replace(units=[unit]), 0, [text], images)
        assert (together[place] - alone[0]).abs().max() < 1e-4


@pytest.mark.parametrize("by_latents", [True, False])
@pytest.mark.parametrize("family", ["sd3", "flux", "z_image", "qwen_image"])
def test_the_text_and_its_guidance_reach_the_image(pipes, family, by_latents, monkeypatch):
    """Qwen-Image takes no notice of guidance_scale: its guidance has another name, and wants a text to lead from."""
    if not by_latents:
        monkeypatch.setattr(generators, "LATENT_PIPELINES", {})
    batch, prompts, images = two_images(0)

    def draw(scale: float, *texts: str) -> torch.Tensor:
        return generators.Generator(pipes(family), steps=2, text_guidance=scale).draw(batch, 0, list(texts), images)

    base = draw(3.0, *prompts)
    assert (draw(6.0, *prompts) - base).abs().max() > 1e-4
    assert (draw(3.0, "two zebras", "one") - base).abs().max() > 1e-4
    # Without guidance too, as distilled models want it.
    assert (draw(0.0, *prompts) - base).abs().max() > 1e-4


def test_flux_schnell_takes_its_guidance_as_other_models_do(tmp_path):
    """It was not distilled for a guidance, and would draw the same at every scale."""
    pipe = tiny_flow.build_flux(tmp_path, guidance_embeds=False)
    batch, prompts, images = two_images(0)
    fast = generators.Generator(pipe, steps=2, text_guidance=1.0)
    led = generators.Generator(pipe, steps=2, text_guidance=4.0)
    assert fast.by_latents and not led.by_latents
    drawn = [generator.draw(batch, 0, list(prompts), images) for generator in (fast, led)]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["z_image", "qwen_image"])
def test_a_spectrum_of_a_modern_generator(folders, inputs, family, tmp_path):
    command = [*inputs, "--generator", folders(family), "--levels", "50", "90", "--seeds", "1", "--steps", "4"]
    command += ["--size", "30x21", "--text-guidance", "3"]
    assert models.latent_multiple(folders(family)) == 4  # the autoencoder halves, and patches are of 2x2
    assert generate_spectrum.main([*command, "--out", str(tmp_path / "one"), "--batch-size", "1"]) == 0
    assert generate_spectrum.main([*command, "--out", str(tmp_path / "two")]) == 0
    rows = spectrum_folder.read_rows(tmp_path / "two", decode=True)
    assert {(row["level"], row["steps"], row["width"], row["height"]) for row in rows} == {
        (50, 2, 28, 20),
        (90, 1, 28, 20),
    }
    assert len(rows) == 4 and all(0 < row["start_timestep"] < 1000 for row in rows)
    for row in rows:  # whatever the batch, up to rounding
        one, two = (Image.open(tmp_path / name / row["file_name"]) for name in ("one", "two"))
        assert one.size == (28, 20)
        pixels = [torch.tensor(list(image.tobytes())).int() for image in (one, two)]
        assert (pixels[0] - pixels[1]).abs().max() <= 1


@pytest.mark.parametrize(("family", "size"), [("qwen_edit", (32, 24)), ("flux2_klein", (64, 72))])
def test_modern_editors_draw_from_instructions(folders, inputs, family, size, tmp_path, monkeypatch):
    # It looks at the source at a megapixel, whatever is drawn: here at less.
    module = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit.calculate_dimensions"
    monkeypatch.setattr(module, lambda area, ratio: (32, 32, None))
    asked = f"{size[0]}x{size[1]}"
    command = [*inputs, "--generator", folders(family), "--seeds", "1", "--steps", "2", "--size", asked]
    command += ["--text-guidance", "3", "--levels"]
    assert generate_spectrum.main([*command, "50", "--out", str(tmp_path / "s")]) == 0
    rows = spectrum_folder.read_rows(tmp_path / "s", decode=True)
    assert {(row["steps"], row["width"], row["height"]) for row in rows} == {(2, *size)} and len(rows) == 2
    with pytest.raises(UserError, match="has no strength; expected one level"):
        generate_spectrum.main([*command, "50", "70", "--out", str(tmp_path / "t")])


def test_a_distilled_editor_takes_no_guidance(pipes, monkeypatch):
    """FLUX.2 [klein] would draw without, and the record would say otherwise."""
    from generation.editors import Editor

    pipe = pipes("flux2_klein")
    before = pipe.config.is_distilled
    pipe.register_to_config(is_distilled=True)
    try:
        with pytest.raises(UserError, match="--text-guidance 3: Flux2KleinPipeline was distilled and takes none"):
            Editor(pipe, 4, 3.0, {})
        Editor(pipe, 4, 1.0, {})
    finally:
        pipe.register_to_config(is_distilled=before)


def test_what_a_pipeline_refuses_is_one_line(folders, inputs, tmp_path):
    command = [*inputs, "--generator", folders("flux2_klein"), "--seeds", "1", "--steps", "2", "--levels", "50"]
    with pytest.raises(UserError, match="--generator: Flux2KleinPipeline refuses: Image too small"):
        generate_spectrum.main([*command, "--size", "16x16", "--out", str(tmp_path / "s")])


# What each reads, in tokens, here bytes: Z-Image 512 with its template, 3 marks and 16 bytes; Qwen-Image 512 after the
# first 34 of its template, which is 157 bytes and 5 marks long; FLUX.2 as Z-Image.
@pytest.mark.parametrize(
    ("family", "most"), [("z_image", 512 - 19), ("qwen_image", 512 + 34 - 162), ("flux2_klein", 512 - 19)]
)
def test_prompts_are_measured_as_the_pipeline_encodes_them(pipes, family, most):
    pipe, taken = pipes(family), []
    hook = pipe.text_encoder.register_forward_pre_hook(
        lambda _, args, named: taken.append(named["attention_mask"].sum().item()), with_kwargs=True
    )
    short, long = "n" * most, "n" * (most + 1)
    assert texts.find_cut(pipe, [short, long]) == [long]
    # The longest that is not cut fills the encoder, or, of Qwen-Image, what is kept of it.
    encoded = pipe.encode_prompt(prompt=[short], device="cpu", max_sequence_length=512)[0]
    hook.remove()
    assert len(encoded[0]) == 512 and taken[0] == 512 + (34 if family == "qwen_image" else 0)


def test_an_editor_that_cuts_nothing_says_so_of_no_prompt(pipes):
    assert texts.find_cut(pipes("qwen_edit"), ["n" * 2000]) == []
