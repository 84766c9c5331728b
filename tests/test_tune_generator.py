"""Tuning a generator: the same adapters after any stop, whatever the shards, and beside others; what ends it early."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from pathlib import Path

import diffusers
import pytest
import tiny_editors
import tiny_flow
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small_data import draw_cats_and_dogs

import datasets
import models
import train_fewshot
import tune_generator
from loaders import digits
from loaders.base import ASSETS, ImageSet
from runtime.cli import UserError
from spectrum import tables
from training import clip, diffusion, tuner

pytestmark = pytest.mark.slow
LABELS = (2, 3, 4, 5)
SHORT = ["--dataset", "fewshot_digits", "--shots", "2", "--batch-size", "2", "--epochs", "4", "--warmup-steps", "2",
         "--samples", "0", "--rank", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def tune(tmp_path_factory):
    """The script on two images each of four classes, with further arguments."""
    hard = tmp_path_factory.mktemp("hard") / "hard.csv"
    train = datasets.load_shots(tune_generator.build_parser().parse_args(SHORT)).train
    rows = [
        {"source": source, "label": label, "class_name": digits.NAMES[label], "reason": "few", "score": ""}
        for source, label in zip(train.sources, train.labels.tolist(), strict=True)
        if label in LABELS
    ]
    tables.write_hard(hard, rows)

    def run(out: Path, *more) -> int:
        return tune_generator.main([*SHORT, "--hard", str(hard), "--out", str(out), *map(str, more)])

    return run


@pytest.mark.parametrize(("mode", "count"), [("cls", 10), ("source", 20)])
def test_an_adapter_sees_its_own_classes_images_alone(mode, count):
    args = tune_generator.build_parser().parse_args([*SHORT, "--mode", mode, "--template", "a {}"])
    data = datasets.load_shots(args)
    units = tune_generator.find_units(args, data)
    assert sorted(place for unit in units for place in unit.places) == list(range(20)) and len(units) == count
    for unit in units:
        (label,) = {int(label) for label in data.train.labels[unit.places]}
        assert mode == "source" or unit.name == str(label)
        assert len(unit.val) and set(data.val.labels[unit.val]) == {label}


def test_prompts_say_a_class_with_blanks_as_every_other_step_does(tmp_path, monkeypatch):
    """CoOp's files write `apple_pie`, and write_prompts.py's prompts, which generation may take, say `apple pie`."""
    args = tune_generator.build_parser().parse_args(
        [*SHORT, "--template", "a food photo of a {}", "--out", str(tmp_path)]
    )
    data = datasets.load_shots(args)
    data = dataclasses.replace(data, class_names=["apple_pie", *data.class_names[1:]])
    assert tune_generator.find_units(args, data)[0].prompts == ["a food photo of a apple pie"] * 2
    tune_generator.write_inputs(args, data)
    written = json.loads((tmp_path / "prompts.json").read_text())["0"]
    assert written["prompts"] == ["a food photo of a apple pie"] and written["class_name"] == "apple_pie"
    same = dataclasses.replace(data, class_names=["apple_pie", "apple pie", *data.class_names[2:]])
    with pytest.raises(UserError, match="two classes are called apple pie"):
        tune_generator.check_flags(args, same)
    # The classifier is told the same.
    flags = ["--dataset", "fewshot_digits", "--shots", "2", "--images", "real", "--template", "a food photo of a {}"]
    told = []
    monkeypatch.setattr(clip, "captions_of", lambda names, templates: told.extend(names) or ["a"] * len(names))
    train_fewshot.build_clip(train_fewshot.build_parser().parse_args(flags), data, "cpu")
    assert told[0] == "apple pie"


def adapters(out: Path) -> dict[str, bytes]:
    """Every adapter and history of a folder, by name."""
    names = (tuner.FILE, "history.jsonl")
    return {str(path.relative_to(out)): path.read_bytes() for name in names for path in out.glob(f"*/{name}")}


def distance(one: Path, other: Path) -> float:
    """How far two adapters' B, which start at zero, are apart, relative to the first. (AdamW magnifies rounding.)"""
    first, second = (
        torch.cat(
            [weight.flatten() for name, weight in sorted(load_file(folder / tuner.FILE).items()) if "lora_B" in name]
        )
        for folder in (one, other)
    )
    return float((first - second).norm() / first.norm())


def stop_after(monkeypatch, steps: int) -> None:
    """As if SIGTERM came after so many steps of this process."""
    plain, done = tuner.Tuner.step, []

    def step(self, *args):
        plain(self, *args)
        done.append(1)
        if len(done) == steps:
            self.stop.received = "SIGTERM"

    monkeypatch.setattr(tuner.Tuner, "step", step)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tune):
    """Four class adapters, tuned one after another in one process."""
    out = tmp_path_factory.mktemp("tuned")
    assert tune(out) == 0
    return out


def test_every_class_has_an_adapter_that_says_what_it_is(tuned):
    assert {path.parent.name for path in tuned.glob(f"*/{tuner.FILE}")} == {*"2345"}
    with safe_open(tuned / "3" / tuner.FILE, "pt") as file:
        notes = file.metadata()
    assert notes["prompt"] == "a photo of a three" and notes["steps"] == "4" and notes["base"] == "tiny_sd"
    weights = load_file(tuned / "3" / tuner.FILE)
    assert all(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_B" in name)  # every layer learnt
    assert {name.split(".")[0] for name in weights} == {"unet", "text_encoder"}
    [told] = [json.loads(path.read_text())["environment"] for path in tuned.glob("shard-*/speed.json")]
    assert torch.__version__.startswith(told["packages"]["torch"])
    rows = [json.loads(line) for line in (tuned / "3" / "history.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 0 and rows[-1]["step"] == 4 and rows[-1]["held_out"] < rows[0]["held_out"]


def test_generation_finds_its_images_and_prompts_beside_the_adapters(tuned):
    hard = tables.read_hard(tuned / "shots.csv")
    assert sorted(row.label for row in hard) == sorted(LABELS * 2)
    assert tables.read_prompts(tuned / "prompts.json", LABELS)[5]["prompts"] == ["a photo of a five"]
    assert len(json.loads((tuned / "plan.json").read_text())["class_names"]) == 4


def test_a_generator_that_does_not_load_leaves_no_plan(tune, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("--generator: no such thing")

    with monkeypatch.context() as patch:
        patch.setattr(models, "load_generator", fail)
        with pytest.raises(UserError, match="no such thing"):
            tune(tmp_path)
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("kind", ["flow", "editor", "edm"])
def test_what_has_no_unet_of_stable_diffusion_is_refused_before_a_plan_is_written(tune, tmp_path, kind):
    """Flow matching and editors by their configuration; a model of other noise (Playground's EDM) once it is loaded."""
    folder = tmp_path / "generator"
    if kind == "edm":
        pipe = models.load_generator(str(ASSETS / "tiny_sd"), "cpu")
        pipe.scheduler = diffusers.EDMDPMSolverMultistepScheduler()
        pipe.save_pretrained(folder)
    else:
        tiny_flow.build_sd3().save_pretrained(folder) if kind == "flow" else tiny_editors.save_pix2pix(folder)
    with pytest.raises(UserError, match="expected a (Stable Diffusion or SDXL pipeline|generator of Stable)") as error:
        tune(tmp_path / "out", "--generator", folder)
    assert "\n" not in str(error.value) and not (tmp_path / "out/plan.json").exists()


@pytest.mark.parametrize(("side", "said"), [(512, True), (1024, False)])
def test_an_unusual_resolution_of_a_known_generator_is_said(monkeypatch, capsys, side, said):
    name = "stabilityai/stable-diffusion-xl-base-1.0"
    monkeypatch.setattr(models, "check_generator", lambda name: None)
    monkeypatch.setattr(models, "pipeline_config", lambda *_: {"_class_name": "StableDiffusionXLPipeline"})
    tune_generator.check_generator(argparse.Namespace(generator=name, revision=None, resolution=side))
    assert (f"unusual for {name}, which was trained at 1024" in capsys.readouterr().out) == said


def test_a_card_without_bfloat16_tunes_in_float32(tune, tuned, tmp_path, monkeypatch):
    """Adapters are float32, and float16 would need its losses scaled."""
    monkeypatch.setattr(models, "generator_dtype", lambda dtype, device: "float16" if dtype == "auto" else dtype)
    assert tune(tmp_path) == 0 and adapters(tmp_path) == adapters(tuned)
    assert json.loads((tmp_path / "plan.json").read_text())["dtype"] == "float32"


def test_a_stopped_run_resumes_to_the_same_bytes(tune, tuned, tmp_path, monkeypatch):
    for steps in (1, 8):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            assert tune(tmp_path) == 75
    assert tune(tmp_path) == 0
    assert adapters(tmp_path) == adapters(tuned)


def test_a_signal_ends_a_sheet_of_samples_too(tune, tuned, tmp_path, monkeypatch):
    plain = tuner.Tuner.draw_sheets
    for ended in ("before", "after"):

        def draw_sheets(self, units, when, ended=ended):
            if when == ended:
                self.stop.received = "SIGTERM"
            plain(self, units, when)

        with monkeypatch.context() as patch:
            patch.setattr(tuner.Tuner, "draw_sheets", draw_sheets)
            assert tune(tmp_path, "--samples", 1, "--sample-steps", 2) == 75
        assert not list(tmp_path.glob(f"*/samples_{ended}.png")) and not list(tmp_path.glob(f"*/{tuner.FILE}"))
    assert tune(tmp_path, "--samples", 1, "--sample-steps", 2) == 0
    assert len(list(tmp_path.glob("*/samples_*.png"))) == 8
    assert adapters(tmp_path) == adapters(tuned)


def test_images_are_read_as_they_are_encoded_and_a_signal_ends_it(tune, tuned, tmp_path, monkeypatch):
    """The autoencoder takes seconds an image on a CPU, and all images of a large data set do not fit into memory."""
    plain, told = diffusion.crop_image, []

    def crop_image(*args):
        told.append("crop")
        tuners[0].stop.received = "SIGTERM"
        return plain(*args)

    tuners, begin, read = [], tuner.Tuner.begin, ImageSet.read
    with monkeypatch.context() as patch:
        patch.setattr(tuner.Tuner, "begin", lambda self, units: tuners.append(self) or begin(self, units))
        patch.setattr(diffusion, "crop_image", crop_image)
        patch.setattr(ImageSet, "read", lambda self, place: told.append("read") or read(self, place))
        assert tune(tmp_path, "--crops", 8) == 75
    assert told == ["read"] + ["crop"] * 8 and not list(tmp_path.glob("*/checkpoint.pt"))
    assert tune(tmp_path, "--crops", 8) == 0 and adapters(tmp_path) == adapters(tuned)


def test_shards_share_the_classes_and_change_nothing(tune, tuned, tmp_path):
    assert tune(tmp_path, "--shard", "1/3") == 0
    assert len(list(tmp_path.glob(f"*/{tuner.FILE}"))) == 1
    assert tune(tmp_path, "--shard", "0/2") == 0 and tune(tmp_path, "--shard", "1/2") == 0
    assert adapters(tmp_path) == adapters(tuned)


def test_adapters_tuned_side_by_side_are_those_of_one_at_a_time(tune, tuned, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert tune(tmp_path, "--together", 4) == 75
    assert tune(tmp_path, "--together", 4) == 0
    for label in LABELS:
        assert distance(tuned / str(label), tmp_path / str(label)) < 0.01
    assert distance(tuned / "3", tmp_path / "2") > 0.5


def test_what_does_not_fit_into_memory_is_halved(tune, tuned, tmp_path, monkeypatch, capsys):
    plain = tuner.Tuner.tune_group

    def tune_group(self, units, bar):
        if len(units) > 1:
            raise torch.OutOfMemoryError
        plain(self, units, bar)

    monkeypatch.setattr(tuner.Tuner, "tune_group", tune_group)
    assert tune(tmp_path, "--together", 4) == 0
    assert adapters(tmp_path) == adapters(tuned)
    assert "--together 4: does not fit into this device's memory; 2 at once" in capsys.readouterr().out


def test_a_class_whose_loss_is_not_finite_stops_and_the_others_go_on(tune, tuned, tmp_path, monkeypatch, capsys):
    plain = tuner.Tuner.step_loss

    def step_loss(self, units, step, batch):
        loss, times = plain(self, units, step, batch)
        bad = [float("nan") if unit.name == "5" and step > 1 else 1.0 for unit in units]
        return loss * torch.tensor(bad).repeat_interleave(batch), times

    monkeypatch.setattr(tuner.Tuner, "step_loss", step_loss)
    assert tune(tmp_path, "--together", 2) == 1
    assert {path.parent.name for path in tmp_path.glob(f"*/{tuner.FILE}")} == {*"234"}
    assert "5: not tuned: the loss of step 2 is not finite" in capsys.readouterr().out
    assert distance(tuned / "4", tmp_path / "4") < 0.01  # its neighbour in the batch


def test_one_adapter_for_all_learns_every_class_and_shows_itself(tune, tmp_path):
    assert tune(tmp_path, "--mode", "dset", "--samples", 2, "--sample-steps", 1, "--lr", 0.01) == 0
    with safe_open(tmp_path / "all" / tuner.FILE, "pt") as file:
        assert file.metadata()["mode"] == "dset" and file.metadata()["prompt"].count("|") == 3
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "all")).Reload()
    assert {"tuning/loss", "tuning/held_out", "tuning/loss_noise_1_of_4"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["samples"]
    sheets = [(tmp_path / "all" / f"samples_{when}.png").read_bytes() for when in ("before", "after")]
    assert sheets[0] != sheets[1]


def test_dry_run_writes_nothing_and_says_steps_hours_and_bytes(tune, tmp_path, capsys):
    assert tune(tmp_path / "none", "--dry-run", "--steps-per-second", 0.5) == 0
    shown = capsys.readouterr().out
    assert "4 adapters of" in shown and "16 steps: 0.01 hours at 0.5 steps a second" in shown
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shots", "70"], "--shots 70: class zero"),
        (["--template", "a digit"], "--template 'a digit': expected a text with {}"),
        (["--warmup-steps", "4"], "--warmup-steps 4: expected fewer than the 4 steps"),
        (["--generator", "/nowhere/sd"], "--generator /nowhere/sd: expected a folder"),
        (["--imb-ratio", "10"], "fewshot_digits has its own class counts"),
    ],
)
def test_bad_input_is_one_line(tune, flags, message, tmp_path):
    with pytest.raises(UserError, match=".") as error:
        tune(tmp_path, *flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_images_that_cannot_be_used_are_named_before_anything_is_tuned(tmp_path):
    root = draw_cats_and_dogs(tmp_path / "data", 4, 16, "png")
    flags = ["--dataset", "imagefolder", "--data-root", root, "--generator", ASSETS / "tiny_sd", "--epochs", "2"]
    flags += ["--shots", "4", "--warmup-steps", "0", "--samples", "0", "--rank", "2", "--resolution", "16"]
    (root / "train/dog/1.png").write_bytes(b"")
    (root / "val/dog/0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="2 images cannot be used: .*train/dog/1.png.*val/dog/0.png"):
        tune_generator.main([*map(str, flags), "--out", str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*/pytorch_lora*"))


def test_captions_that_the_text_encoder_cuts_are_counted(tune, tmp_path, capsys):
    captions = tmp_path / "captions.csv"
    sources = datasets.load_shots(tune_generator.build_parser().parse_args(SHORT)).train.sources
    rows = [f"{source},{'on paper ' * (99 if i == 4 else 1)}" for i, source in enumerate(sources)]
    captions.write_text("\n".join(["source,caption", *rows]))
    assert tune(tmp_path / "out", "--captions", captions) == 0
    assert "1 of 5 prompts are longer than" in capsys.readouterr().out


def test_two_classes_of_one_name_are_refused(tune, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "NAMES", ["zero", "one", "crane", "crane", *digits.NAMES[4:]])
    with pytest.raises(UserError, match="two classes are called crane"):
        tune(tmp_path)


def test_two_classes_that_differ_in_capital_letters_alone_are_refused(tune, tmp_path, monkeypatch):
    """The tokenizer of Stable Diffusion reads both as one prompt."""
    pipe = models.load_generator(tune_generator.build_parser().parse_args(SHORT).generator, "cpu")
    assert pipe.tokenizer("a photo of a Three").input_ids == pipe.tokenizer("a photo of a three").input_ids
    monkeypatch.setattr(digits, "NAMES", ["zero", "one", "Three", "three", *digits.NAMES[4:]])
    with pytest.raises(UserError, match="two classes are called Three: one prompt for both, capital letters or not"):
        tune(tmp_path)


@pytest.mark.parametrize("flag", ["--lr", "--alpha", "--clip-grad"])
def test_a_flag_with_which_nothing_is_learnt_is_refused(tune, tmp_path, flag):
    """Generation stops at such an adapter, which is after the hours of tuning."""
    with pytest.raises(UserError, match=f"{flag} 0: the adapters would change nothing; expected more than 0"):
        tune(tmp_path, flag, 0)
    assert not (tmp_path / "plan.json").exists()


def test_a_class_with_fewer_images_than_shots_is_counted_in_the_singular(tmp_path):
    for part, count in (("train/a", 1), ("train/b", 3), ("test/a", 1), ("test/b", 1), ("val/a", 1)):
        (tmp_path / part).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / part / f"{number}.png")
    flags = ["--dataset", "imagefolder", "--data-root", str(tmp_path), "--shots", "2"]
    with pytest.raises(UserError, match=r"--shots 2: class a \(0\) has 1 training image; expected at most that"):
        datasets.load_shots(tune_generator.build_parser().parse_args(flags))


def test_two_captions_of_one_image_are_refused(tune, tmp_path):
    sources = datasets.load_shots(tune_generator.build_parser().parse_args(SHORT)).train.sources
    captions = tmp_path / "captions.csv"
    rows = [f"{source},on paper" for source in sources]
    captions.write_text("\n".join(["source,caption", *rows, f"{sources[0]},in the snow"]))
    expected = f"row {len(rows) + 2}: {sources[0]} has another caption above; expected one of each"
    with pytest.raises(UserError, match=expected):
        tune(tmp_path / "out", "--captions", captions)


def test_activations_computed_twice_change_nothing(tune, tuned, tmp_path, monkeypatch):
    from diffusers import UNet2DConditionModel

    asked, plain = [], UNet2DConditionModel.enable_gradient_checkpointing
    monkeypatch.setattr(UNet2DConditionModel, "enable_gradient_checkpointing", lambda self: asked.append(plain(self)))
    assert tune(tmp_path, "--grad-checkpointing") == 0
    assert asked and all(distance(tuned / str(label), tmp_path / str(label)) < 1e-4 for label in LABELS)


def test_a_compiled_generator_learns_the_same_and_is_compiled_once_for_all_classes(tune, tuned, tmp_path, monkeypatch):
    """Traced and run as graphs of forward and backward; their kernels are torch's own, which take a minute here."""
    from torch._dynamo.utils import counters

    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert tune(tmp_path, "--compile") == 0
    assert all(distance(tuned / str(label), tmp_path / str(label)) < 0.01 for label in LABELS)
    assert 0 < counters["stats"]["unique_graphs"] <= 4  # training and evaluation, of two batch sizes at most


def test_a_folder_of_other_settings_is_left_alone(tune, tuned):
    with pytest.raises(UserError, match="rank is 2 there, 3 here"):
        tune(tuned, "--rank", 3)
