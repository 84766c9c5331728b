"""Edits toward domains: every prompt, own domains skipped, and editors without a strength."""

from __future__ import annotations

import io
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_editors
import torch
from PIL import Image
from test_prompts import DOMAINS

import generate_spectrum
import write_prompts
from runtime.cli import UserError
from spectrum import folder as spectrum_folder
from spectrum.domains import write_source_domains
from spectrum.tables import write_hard

DATA = ["--dataset", "biased_digits"]
FAST = ["--levels", "50", "--steps", "4", "--batch-size", "8"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three images of two classes, two domains; the first image's caption has the first domain."""
    import datasets

    folder = tmp_path_factory.mktemp("edits")
    data = datasets.load("biased_digits", None)
    names = [data.train.sources[place] for place in (0, 1, 40)]
    rows = [{"source": name, "label": label, "class_name": ("zero", "one")[label], "reason": "all", "score": 30}
            for name, label in zip(names, (0, 0, 1), strict=True)]  # fmt: skip
    write_hard(folder / "hard.csv", rows)
    (folder / "domains.json").write_text(json.dumps({"domains": DOMAINS}))
    for name, flags in (("prompts", []), ("instructions", ["--instructions"])):
        arguments = ["--from", "domains", "--domains", str(folder / "domains.json"), *flags]
        arguments += ["--hard", str(folder / "hard.csv"), "--out", str(folder / f"{name}.json")]
        assert write_prompts.main([*DATA, *arguments]) == 0
    own = zip(names, ("on snow", "", "at night"), strict=True)
    write_source_domains(
        folder / "sources.csv", [{"source": name, "label": 0, "domain": domain} for name, domain in own]
    )
    return folder


def draw(inputs, out, *flags, prompts="prompts") -> int:
    arguments = ["--hard", inputs / "hard.csv", "--prompts", inputs / f"{prompts}.json", "--out", out, *flags]
    return generate_spectrum.main([*DATA, *FAST, *map(str, arguments)])


def pictures(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("shard-*/*.png")}


def test_each_prompt_is_drawn_and_the_own_domain_is_skipped(inputs, tmp_path):
    out, some = tmp_path / "all", tmp_path / "some"
    assert draw(inputs, out, "--each-prompt", "--seeds", 2) == 0
    rows = spectrum_folder.read_rows(out)
    # 3 sources x 2 domains x 2 seeds; seed = domain x 2 + k
    assert Counter((row["domain"], row["seed"]) for row in rows) == {
        ("on snow", 0): 3, ("on snow", 1): 3, ("at night", 2): 3, ("at night", 3): 3,
    }  # fmt: skip
    assert {row["prompt"] for row in rows if row["domain"] == "on snow"} == {
        "a photo of a zero on snow",
        "a photo of a one on snow",
    }
    assert (
        spectrum_folder.read_plan(out)["units"] == 12 and generate_spectrum.main(["--out", str(out), "--validate"]) == 0
    )

    skip = ["--each-prompt", "--seeds", 2, "--skip-own-domain", inputs / "sources.csv"]
    assert draw(inputs, some, *skip) == 0
    kept = spectrum_folder.read_rows(some)
    assert Counter(row["domain"] for row in kept) == {"on snow": 4, "at night": 4}
    assert all(pictures(out)[name] == content for name, content in pictures(some).items())  # the same images
    assert spectrum_folder.read_plan(some)["units"] == 8


def test_a_class_of_empty_scenes_has_no_domains_and_all_its_prompts_are_drawn(inputs, tmp_path):
    """write_prompts.py gives it prompts of its own, whatever its captions say."""
    prompts = json.loads((inputs / "prompts.json").read_text())
    del prompts["1"]["domains"]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    skip = ["--each-prompt", "--skip-own-domain", inputs / "sources.csv", "--seeds", 1]
    assert draw(inputs, tmp_path / "s", *skip, "--prompts", tmp_path / "prompts.json") == 0
    rows = spectrum_folder.read_rows(tmp_path / "s")
    assert Counter(row.get("domain", "none") for row in rows) == {"on snow": 1, "at night": 2, "none": 2}


def test_skipping_wants_each_prompt_and_the_prompts_own_table(inputs, tmp_path):
    with pytest.raises(UserError, match="--skip-own-domain: expected with --each-prompt only"):
        draw(inputs, tmp_path / "a", "--skip-own-domain", inputs / "sources.csv")
    write_source_domains(tmp_path / "other.csv", [{"source": "x", "label": 0, "domain": "at sea"}])
    with pytest.raises(UserError, match="other.csv: none of its domains is one of"):
        draw(inputs, tmp_path / "b", "--each-prompt", "--skip-own-domain", tmp_path / "other.csv")
    assert not list(tmp_path.glob("*/shard-*/*.png"))


# ---------------------------------------------------------------------------------------------------------------------
# editors


@pytest.fixture(scope="module")
def pix2pix(tmp_path_factory):
    return tiny_editors.save_pix2pix(tmp_path_factory.mktemp("pix2pix") / "tiny")


def three_images(size=(16, 16)):
    """Three sources of noise, a unit of each, and an instruction for each."""
    from spectrum.units import Unit

    rng = np.random.default_rng(0)
    images = {f"s{i}": Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)) for i in range(3)}
    return images, [Unit(name, 50, 0) for name in images], ["on snow", "at night", "on snow"]


@pytest.mark.parametrize("save", [tiny_editors.save_pix2pix, tiny_editors.save_pix2pix_xl], ids=["sd", "sdxl"])
def test_instruct_pix2pix_gives_the_pipelines_own_images_in_any_batch(save, tmp_path):
    import models
    from generation.editors import Editor
    from generation.worklist import Batch

    pipe = models.load_generator(str(save(tmp_path / "tiny")), "cpu")
    assert models.editor_kind(str(tmp_path / "tiny")) == type(pipe).__name__
    copies = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: copies.append(inputs[0].shape[0]))
    images, units, texts = three_images((32, 16))
    batch, sized = Batch(50, (32, 16), None, units), {"width": 32, "height": 16} if "XL" in type(pipe).__name__ else {}
    together = Editor(pipe, 4, 5.0, {50: 1.3}).draw(batch, 0, texts, images)
    assert copies == [9] * 4  # three of each image
    alone = Editor(pipe, 4, 5.0, {50: 1.3})
    for unit, text, drawn in zip(units, texts, together, strict=True):
        plain = pipe(
            text, image=images[unit.source], num_inference_steps=4, guidance_scale=5.0, image_guidance_scale=1.3,
            generator=torch.Generator().manual_seed(unit.noise_seed()), output_type="pt", **sized,
        ).images  # fmt: skip
        assert torch.allclose(drawn, plain[0], atol=2e-4)
        one = alone.draw(Batch(50, (32, 16), None, [unit]), 0, [text], images)
        assert torch.allclose(drawn, one[0], atol=2e-4)
    for text_guidance, image_guidance in ((5.0, 3.0), (9.0, 1.3)):  # both guidances matter
        other = Editor(pipe, 4, text_guidance, {50: image_guidance}).draw(batch, 0, texts, images)
        assert (other - together).abs().max() > 1e-3


@pytest.mark.parametrize("save", [tiny_editors.save_pix2pix, tiny_editors.save_pix2pix_xl], ids=["sd", "sdxl"])
def test_instruct_pix2pix_draws_in_a_gpus_bfloat16_what_it_draws_in_float32(save, tmp_path):
    import models
    from generation.editors import Editor
    from generation.worklist import Batch

    images, units, texts = three_images((32, 16))
    drawn = []
    for dtype in ("float32", "bfloat16"):
        pipe = models.load_generator(str(save(tmp_path / dtype)), "cpu", dtype=dtype)
        editor = Editor(pipe, 4, 5.0, {50: 1.3})
        drawn.append(editor.draw(Batch(50, (32, 16), None, units), 0, texts, images))
        again = editor.draw(Batch(50, (32, 16), None, units), 0, texts, images)
        assert torch.equal(again, drawn[-1])
    apart = (drawn[0] - drawn[1]).abs()
    assert apart.mean() < 0.02 < (drawn[0][0] - drawn[0][1]).abs().mean()


@pytest.mark.parametrize(
    "save", [tiny_editors.save_pix2pix, tiny_editors.save_pix2pix_xl, tiny_editors.save_kontext],
    ids=["sd", "sdxl", "kontext"],
)  # fmt: skip
def test_a_signal_ends_an_edit_after_the_step(save, tmp_path):
    import models
    from generation.editors import Editor
    from generation.generator import Interrupted
    from generation.worklist import Batch

    pipe = models.load_generator(str(save(tmp_path / "tiny")), "cpu")
    images, units, texts = three_images((32, 16))
    editor, passes = Editor(pipe, 4, 3.0, {50: 1.3}), []
    editor.stop = SimpleNamespace(received=None)

    def note(*_) -> None:
        passes.append(1)
        editor.stop.received = "SIGTERM" if len(passes) == 2 else None

    (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).register_forward_pre_hook(note)
    with pytest.raises(Interrupted):
        editor.draw(Batch(50, (32, 16), None, units), 0, texts, images)
    assert len(passes) == 2


def test_flux_kontext_edits_one_image_a_call_at_the_size_asked_for(inputs, tmp_path, capsys):
    import models
    from generation.editors import Editor
    from generation.worklist import Batch

    folder = tiny_editors.save_kontext(tmp_path / "kontext")
    pipe = models.load_generator(str(folder), "cpu")
    assert models.editor_kind(str(folder)) == "FluxKontextPipeline"
    assert models.latent_multiple(str(folder)) == 4  # the autoencoder halves, and latents go in patches of 2x2
    passes = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, named: passes.append((named["hidden_states"].shape[:2], named["guidance"].item())),
        with_kwargs=True,
    )
    images, units, texts = three_images((32, 16))
    batch = Batch(50, (32, 16), None, units)
    drawn = Editor(pipe, 2, 3.0, {}).draw(batch, 0, texts, images)
    # Latents of 16x8 in patches of 2x2: 32 of the noise and 32 of the source; one pass a step, with the guidance in it.
    assert passes == [((1, 64), 3.0)] * 6 and drawn.shape == (3, 3, 16, 32)
    for unit, text, ours in zip(units, texts, drawn, strict=True):
        plain = pipe(
            image=images[unit.source], prompt=text, num_inference_steps=2, guidance_scale=3.0, width=32, height=16,
            max_area=512, _auto_resize=False, generator=torch.Generator().manual_seed(unit.noise_seed()),
            output_type="pt",
        ).images  # fmt: skip
        assert torch.allclose(ours, plain[0], atol=1e-5)
    other = Editor(pipe, 2, 1.0, {}).draw(batch, 0, texts, images)
    assert (other - drawn).abs().max() > 1e-4
    # The whole script, from its folder.
    arguments = ["--generator", folder, "--text-guidance", 3, "--seeds", 1]
    assert draw(inputs, tmp_path / "out", *arguments, prompts="instructions") == 0
    rows = spectrum_folder.read_rows(tmp_path / "out")
    assert len(rows) == 3 and {row["start_timestep"] for row in rows} == {-1}
    with pytest.raises(UserError, match="--levels .*FluxKontextPipeline has no strength; expected one level"):
        draw(inputs, tmp_path / "two", *arguments, "--levels", 30, 70, prompts="instructions")


def test_an_editor_draws_a_spectrum_of_nominal_levels(inputs, pix2pix, tmp_path, capsys):
    flags = ["--generator", pix2pix, "--each-prompt", "--seeds", 1, "--text-guidance", 5]
    for out, extra in (
        (tmp_path / "whole", []),
        (tmp_path / "parts", ["--shard", "0/2"]),
        (tmp_path / "parts", ["--shard", "1/2"]),
    ):
        levels = ["--levels", 70, 30, "--image-guidance", 2.0, 1.2]
        assert draw(inputs, out, *flags, *levels, *extra, prompts="instructions") == 0
    rows = spectrum_folder.read_rows(tmp_path / "whole")
    assert Counter((row["level"], row["steps"]) for row in rows) == {(30, 4): 6, (70, 4): 6}
    assert spectrum_folder.read_plan(tmp_path / "whole")["image_guidance"] == {"30": 1.2, "70": 2.0}
    whole, parts = pictures(tmp_path / "whole"), pictures(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name in whole:
        first, second = (np.asarray(Image.open(io.BytesIO(some[name])), int) for some in (whole, parts))
        assert np.abs(first - second).max() <= 1  # rounding
    capsys.readouterr()
    assert draw(inputs, tmp_path / "dry", *flags, *levels, "--dry-run", prompts="instructions") == 0
    # 12 images of 4 steps on 3 copies; batches of 8 in two copies have the room of 5 in three.
    said = capsys.readouterr().out
    assert "12 images, 2 batches, 48 denoising steps" in said
    assert "on 3 copies of a batch: 144 passes of one image, and 5 images at once need the memory of 15" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--image-guidance: 0 scales for 1 levels; .*has no strength"),
        (["--levels", 30, 70, "--image-guidance", 1.5], "--image-guidance: 1 scales for 2 levels"),
        (["--image-guidance", 0.5], "--image-guidance 0.5: expected 1 or more"),
    ],
)
def test_an_editor_wants_its_image_guidance(inputs, pix2pix, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        draw(inputs, tmp_path / "out", "--generator", pix2pix, *flags)
    assert not (tmp_path / "out").exists()


def test_a_generator_with_a_strength_takes_no_image_guidance(inputs, tmp_path):
    with pytest.raises(UserError, match="--image-guidance: this generator takes none"):
        draw(inputs, tmp_path / "out", "--image-guidance", 1.5)


def test_an_editor_without_strength_or_image_guidance_is_called_an_image_at_a_time(tmp_path):
    from generation.editors import Editor
    from generation.guidance import image_guidance_by_level
    from generation.worklist import Batch
    from spectrum.units import Unit

    class Plain:
        """A pipeline's call as Qwen-Image-Edit has it, which gives the source back, larger."""

        device = torch.device("cpu")
        calls: list = []

        def __call__(self, image, prompt, true_cfg_scale=4.0, negative_prompt=None, num_inference_steps=50,
                     height=None, width=None, generator=None, output_type="pil"):  # fmt: skip
            self.calls.append((prompt, true_cfg_scale, (width, height), generator.initial_seed()))
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
            return type("Out", (), {"images": torch.nn.functional.interpolate(pixels, scale_factor=2)})

    pictures = {name: Image.new("RGB", (8, 8), name) for name in ("red", "blue")}
    units = [Unit(name, 50, 0) for name in pictures]
    drawn = Editor(Plain(), 4, 3.0, {}).draw(
        Batch(50, (8, 8), None, units), 0, ["make it red", "make it blue"], pictures
    )
    assert drawn.shape == (2, 3, 8, 8) and drawn[0].mean((1, 2)).tolist() == [1, 0, 0]
    assert Plain.calls == [
        ("make it red", 3.0, (8, 8), units[0].noise_seed()),
        ("make it blue", 3.0, (8, 8), units[1].noise_seed()),
    ]
    with pytest.raises(UserError, match="--levels .*QwenImageEditPipeline has no strength; expected one level"):
        image_guidance_by_level("QwenImageEditPipeline", [30, 50], None)
