"""Generation with tuned adapters: N images a class from text alone, one adapter in memory, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import datasets
import generate_spectrum
import models
import tune_generator
from generation import loras
from loaders import digits
from loaders.base import ASSETS
from runtime.cli import UserError
from spectrum import folder as spectrum_folder
from spectrum import tables
from spectrum.units import Unit, short_name
from training import lora

pytestmark = pytest.mark.slow
LABELS = (2, 3, 4)
TINY = str(ASSETS / "tiny_sd")
FILE = "pytorch_lora_weights.safetensors"


def tune(out: Path, mode: str, *more) -> Path:
    train = datasets.load("fewshot_digits", None).train
    places = [int(place) for label in LABELS for place in np.flatnonzero(train.labels == label)[:2]]
    rows = [
        {
            "source": train.sources[place],
            "label": label,
            "class_name": digits.NAMES[label],
            "reason": "few",
            "score": "",
        }
        for place, label in zip(places, train.labels[places].tolist(), strict=True)
    ]
    tables.write_hard(out / "few.csv", rows)
    flags = ["--dataset", "fewshot_digits", "--hard", str(out / "few.csv"), "--mode", mode, "--epochs", "8"]
    flags += ["--warmup-steps", "1", "--samples", "0", "--rank", "2", "--lr", "0.02", "--together", "3"]
    assert tune_generator.main([*flags, "--out", str(out), *map(str, more)]) == 0
    return out


def generate(out: Path, tuned: Path, *more) -> int:
    flags = ["--dataset", "fewshot_digits", "--tuned", str(tuned), "--steps", "3", "--out", str(out)]
    return generate_spectrum.main([*flags, *map(str, more)])


@pytest.fixture(scope="module")
def cls(tmp_path_factory):
    return tune(tmp_path_factory.mktemp("cls"), "cls")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, cls):
    out = tmp_path_factory.mktemp("drawn")
    assert generate(out, cls, "--per-class", 3) == 0
    return out


def rows_of(folder: Path) -> list[dict]:
    return spectrum_folder.read_rows(folder, decode=True)


def test_each_class_has_its_images_shared_out_among_its_sources(drawn):
    rows = rows_of(drawn)
    assert np.bincount([row["label"] for row in rows]).tolist() == [0, 0, 3, 3, 3]
    assert {row["level"] for row in rows} == {0}
    for label in LABELS:
        own = sorted((row["source"], row["seed"]) for row in rows if row["label"] == label)
        assert sorted(seed for _, seed in own) == [0, 0, 1] and len({source for source, _ in own}) == 2
        assert {row["prompt"] for row in rows if row["label"] == label} == {f"a photo of a {digits.NAMES[label]}"}
    assert generate_spectrum.main(["--out", str(drawn), "--validate"]) == 0


def test_an_image_is_what_plain_diffusers_draws_with_that_adapter(drawn, cls):
    """Text to image from the unit's own noise, the class's adapter loaded by diffusers itself."""
    from diffusers import AutoPipelineForText2Image

    for label in (2, 4):
        row = next(row for row in rows_of(drawn) if row["label"] == label)
        pipe = AutoPipelineForText2Image.from_pipe(models.load_generator(TINY, "cpu"))
        pipe.load_lora_weights(cls / str(label))
        generator = torch.Generator().manual_seed(Unit(row["source"], row["level"], row["seed"]).noise_seed())
        # image-to-image draws the sample of a source's latent first, and then what is added; both are of variance one
        first, added = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
        pipe.scheduler.set_timesteps(3)
        noisy = pipe.scheduler.add_noise(first, added, pipe.scheduler.timesteps[:1])
        image = pipe(row["prompt"], num_inference_steps=3, guidance_scale=2.0, height=16, width=16, latents=noisy,
                     output_type="np").images[0]  # fmt: skip
        saved = np.asarray(Image.open(drawn / row["file_name"]))
        assert np.abs(image * 255 - saved).max() <= 1


def test_no_source_is_read_where_only_text_guides(cls, tmp_path, monkeypatch):
    from loaders.base import ImageSet

    def read(self, place):
        raise AssertionError("a source was read")

    monkeypatch.setattr(ImageSet, "read", read)
    assert generate(tmp_path, cls, "--per-class", 1) == 0
    assert len(rows_of(tmp_path)) == 3


def test_the_share_of_a_process_and_the_batch_size_change_no_image(drawn, cls, tmp_path):
    for shard in ("0/2", "1/2"):
        assert generate(tmp_path, cls, "--per-class", 3, "--shard", shard, "--batch-size", 2) == 0
    for row in rows_of(tmp_path):
        (other,) = [one for one in rows_of(drawn) if Path(one["file_name"]).name == Path(row["file_name"]).name]
        pair = [np.asarray(Image.open(folder / one["file_name"])).astype(int)
                for folder, one in ((tmp_path, row), (drawn, other))]  # fmt: skip
        assert np.abs(pair[0] - pair[1]).max() <= 1


def test_one_adapter_is_in_memory_whatever_the_number_of_classes(cls):
    pipe = models.load_generator(TINY, "cpu")
    adapters = loras.Adapters(pipe, loras.find_loras(cls, list(LABELS)))
    for label in (3, 4):
        adapters.switch(f"class_{label}")
    layer = next(module for module in pipe.unet.modules() if hasattr(module, "lora_A"))
    assert list(layer.lora_A) == [loras.RESIDENT]
    copied = adapters._look()
    other = models.load_generator(TINY, "cpu")
    alone = loras.Adapters(other, loras.find_loras(cls, [4]))
    alone.switch("class_4")
    assert all(torch.equal(one, two) for one, two in zip(copied, alone._look(), strict=True))


def test_levels_of_a_tuned_spectrum_are_drawn_with_the_adapter_too(tmp_path):
    tuned = tune(tmp_path / "dset", "dset")
    assert generate(tmp_path / "s", tuned, "--levels", "0", "50", "--seeds", "1") == 0
    assert len(rows_of(tmp_path / "s")) == 12
    plan = spectrum_folder.read_plan(tmp_path / "s")
    assert list(plan["loras"]) == ["all"]


def rewrite(path: Path, notes: dict, keep=lambda name: True) -> None:
    """An adapter with other metadata, or fewer layers."""
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata() | notes
    save_file({name: value for name, value in load_file(path).items() if keep(name)}, path, metadata)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: rewrite(f / "3" / FILE, {"base_revision": "other", "base": "sdxl"}), "an adapter of sdxl"),
        (lambda f: rewrite(f / "3" / FILE, {"lora_adapter_metadata": '{"unet.r": 4}'}), "of rank .4.; expected rank 2"),
        (lambda f: rewrite(f / "3" / FILE, {}, lambda name: name.startswith("unet")), "no layer of the text half"),
        (lambda f: (f / "3" / FILE).write_bytes(b"half"), "not a readable adapter"),
        (lambda f: shutil.rmtree(f / "3"), "--tuned .*: no adapter for class 3"),
        (lambda f: change_plan(f, "revision", "0"), "tuned for the generator tiny_sd .0., not tiny_sd"),
        (lambda f: change_plan(f, "class_names", {"2": "two"}), "class 3 is None there, 'three' here"),
    ],
)
def test_a_wrong_adapter_is_one_line_before_anything_is_drawn(cls, tmp_path, spoil, message):
    copy = tmp_path / "tuned"
    shutil.copytree(cls, copy)
    spoil(copy)
    with pytest.raises(UserError, match=message) as error:
        generate(tmp_path / "s", copy, "--per-class", 1)
    assert "\n" not in str(error.value) and not (tmp_path / "s" / "plan.json").exists()


def change_plan(folder: Path, name: str, value) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {name: value}))


def test_an_adapter_whose_text_half_does_nothing_is_refused(cls, tmp_path):
    weights = load_file(cls / "4" / FILE)
    weights = {name: value * (not name.startswith("text")) for name, value in weights.items()}
    lora.save_adapter(tmp_path / "4.safetensors", weights, 2, 2, {})
    adapters = loras.Adapters(models.load_generator(TINY, "cpu"), loras.find_loras(tmp_path, [4]))
    with pytest.raises(UserError, match="changes nothing that the generator draws"):
        adapters.switch("class_4")


# ---------------------------------------------------------------------------------------------------------------------
# an adapter an image, and captions in the prompts


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An adapter for each of six images."""
    return tune(tmp_path_factory.mktemp("source"), "source")


def test_an_image_is_drawn_with_the_mean_of_two_adapters_as_diffusers_mixes_them(source, tmp_path):
    """Its source's own and that of the class's other image (LoFT)."""
    from diffusers import AutoPipelineForText2Image

    assert generate(tmp_path, source, "--per-class", 2) == 0
    row = next(row for row in rows_of(tmp_path) if row["label"] == 3)
    names = [short_name(one.source) for one in tables.read_hard(source / "shots.csv") if one.label == 3]
    assert len(names) == 2 and spectrum_folder.read_plan(tmp_path)["lora_mix"] == 2
    pipe = AutoPipelineForText2Image.from_pipe(models.load_generator(TINY, "cpu"))
    for name in names:
        pipe.load_lora_weights(source / name, adapter_name=name)

    def distance(shares: list[float]) -> float:
        pipe.set_adapters(names, shares)
        generator = torch.Generator().manual_seed(Unit(row["source"], row["level"], row["seed"]).noise_seed())
        first, added = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
        pipe.scheduler.set_timesteps(3)
        noisy = pipe.scheduler.add_noise(first, added, pipe.scheduler.timesteps[:1])
        image = pipe(row["prompt"], num_inference_steps=3, guidance_scale=2.0, height=16, width=16, latents=noisy,
                     output_type="np").images[0]  # fmt: skip
        return np.abs(image * 255 - np.asarray(Image.open(tmp_path / row["file_name"]))).max()

    assert distance([0.5, 0.5]) <= 1 and distance([1.0, 0.0]) > 1
    with pytest.raises(UserError, match="lora_mix is 2 there, 1 here"):
        generate(tmp_path, source, "--per-class", 2, "--lora-mix", 1)


def test_a_lora_of_another_width_is_one_line_that_names_a_layer(cls, tmp_path):
    """As one of Stable Diffusion 1.5 given to 2.1 is. In a process of its own, for what diffusers logs is sought."""
    weights = load_file(cls / "3" / FILE)
    wide = {key: weight.repeat(1, 2) if "lora_A" in key else weight for key, weight in weights.items()}
    save_file(wide, tmp_path / "wide.safetensors")
    script = Path(generate_spectrum.__file__)
    flags = ["--dataset", "fewshot_digits", "--hard", cls / "shots.csv", "--prompts", cls / "prompts.json", "--lora",
             tmp_path / "wide.safetensors", "--generator", TINY, "--steps", "3", "--out", tmp_path / "out"]  # fmt: skip
    run = subprocess.run([sys.executable, str(script), *map(str, flags)], capture_output=True, text=True)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and "Loading" not in run.stdout
    assert "not a LoRA of this generator: size mismatch for" in run.stderr and "[2, 192]" in run.stderr


def test_mixing_adapters_of_classes_is_refused(cls, tmp_path):
    with pytest.raises(UserError, match="--lora-mix: mixes adapters of single images; expected --tuned with"):
        generate(tmp_path, cls, "--per-class", 2, "--lora-mix", 1)


def test_inputs_that_are_typed_are_taken_where_they_have_the_default_names_too(cls, tmp_path, monkeypatch):
    """runs/hard.csv is where find_hard.py writes: typed beside --tuned, the folder's shots.csv took its place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    rows = [row for row in tables.read_hard(cls / "shots.csv") if row.label == 3]
    names = {"label": 3, "class_name": digits.NAMES[3], "reason": "few", "score": ""}
    tables.write_hard(Path("runs/hard.csv"), [{"source": row.source} | names for row in rows])
    shutil.copyfile(cls / "prompts.json", "runs/prompts.json")
    typed = ["--hard", "runs/hard.csv", "--prompts", "runs/prompts.json"]
    assert generate(tmp_path / "out", cls, *typed, "--levels", 0, "--seeds", 1) == 0
    assert {row["source"] for row in rows_of(tmp_path / "out")} == {row.source for row in rows}


def test_a_source_without_an_adapter_is_one_line(source, tmp_path):
    rows = [{"source": "index:1", "label": 2, "class_name": "two", "reason": "", "score": ""}]
    tables.write_hard(tmp_path / "hard.csv", rows)
    with pytest.raises(UserError, match="no adapter for source index:1; expected --hard .*/shots.csv"):
        generate(tmp_path / "s", source, "--per-class", 1, "--hard", tmp_path / "hard.csv")


def test_mixed_adapters_count_for_alpha_over_rank_each():
    """Ranks 1 and 2, alphas 2 and 1: the mean of 2 * b a and 0.5 * b a, by hand."""
    a, b = [torch.tensor([[1.0, 2.0]]), torch.eye(2)], [torch.tensor([[3.0], [4.0]]), 2 * torch.eye(2)]
    parts = [
        (
            {"unet.x.lora_A.weight": one, "unet.x.lora_B.weight": two},
            json.dumps({"unet.r": r, "unet.lora_alpha": alpha}),
        )
        for one, two, r, alpha in zip(a, b, (1, 2), (2, 1), strict=True)
    ]
    mixed = loras.mix_adapters(parts)
    total = mixed["unet.x.lora_B.weight"] @ mixed["unet.x.lora_A.weight"]
    torch.testing.assert_close(total, torch.tensor([[3.5, 6.0], [4.0, 8.5]]))


def test_captions_stand_in_the_prompts_of_tuning_and_are_drawn_at_random_in_generation(tmp_path):
    train = datasets.load("fewshot_digits", None).train
    (tmp_path / "captions.csv").write_text(
        "source,caption\n" + "".join(f"{source},on paper {i % 2}\n" for i, source in enumerate(train.sources))
    )
    tuned = tune(tmp_path / "tuned", "cls", "--captions", tmp_path / "captions.csv")
    with safe_open(tuned / "3" / FILE, "pt") as file:
        prompts = file.metadata()["prompt"].split(" | ")
    texts = {f"a photo of a three, on paper {i}" for i in (0, 1)}
    assert set(prompts) <= texts and prompts
    listed = tables.read_prompts(tuned / "prompts.json", [3])[3]
    assert set(listed["prompts"]) == texts and listed["score_prompt"] == "a photo of a three"
    assert generate(tmp_path / "s", tuned, "--per-class", 8) == 0
    assert {row["prompt"] for row in rows_of(tmp_path / "s") if row["label"] == 3} == texts
    (tmp_path / "captions.csv").write_text(f"source,caption\n{train.sources[0]},on paper\n")
    with pytest.raises(UserError, match=r"--captions .*: none for index:\d+; expected one for each training image"):
        tune(tmp_path / "other", "cls", "--captions", tmp_path / "captions.csv")
