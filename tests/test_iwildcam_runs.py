"""Fine-tuning runs on camera traps: the curricula, resumption, several processes, and what a run leaves."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
from conftest import ROOT, draw_blank
from test_iwildcam import SMALL

import curricula
import datasets
import filter_clipscore
import find_hard
import generate_spectrum
import models
import train_iwildcam
import write_prompts
from loaders import cameratraps, toycam
from runtime import checkpoints, files, runs, signals
from runtime.cli import UserError
from spectrum import folder as spectrum_folder
from training import evaluation, log, loop, losses

SHORT = ["--epochs", "3", "--curriculum-epochs", "2", "--progress-images", "4", "--real-pass-images", "32"]
SHORT += ["--batch-size", "16", "--device", "cpu"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("blank_figures")]  # whole runs


@pytest.fixture(autouse=True)
def few_alphas(monkeypatch):
    """Each is a look at all validation images."""
    monkeypatch.setattr(train_iwildcam, "ALPHAS", [0.0, 0.5, 1.0])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A smaller toycam and a filtered spectrum of its hardest images, made by the scripts; tests never change them."""
    folder = tmp_path_factory.mktemp("small")
    root, hard, prompts, spectrum = (folder / name for name in ("toycam", "hard.csv", "prompts.json", "spectrum"))
    data = ["--dataset", "toycam", "--data-root", str(root)]
    inputs = ["--hard", str(hard), "--prompts", str(prompts), "--out", str(spectrum)]
    scored = ["--spectrum", str(spectrum), "--prompts", str(prompts), "--threshold", "0"]
    with pytest.MonkeyPatch.context() as patch:
        draw_blank(patch)
        patch.setattr(toycam, "SPLITS", SMALL)
        toycam.draw(root)
        assert find_hard.main([*data, "--out", str(hard), "--fraction", "0.15"]) == 0
        assert write_prompts.main(["--dataset", "toycam", "--hard", str(hard), "--out", str(prompts)]) == 0
        assert generate_spectrum.main([*data, *inputs, "--levels", "50", "90", "--seeds", "2", "--steps", "4"]) == 0
        assert filter_clipscore.main([*data, *scored]) == 0
    return SimpleNamespace(root=root, data=data, hard=hard, spectrum=spectrum)


def train(small, out, *extra) -> int:
    return train_iwildcam.main(
        ["--data-root", str(small.root), "--spectrum", str(small.spectrum), "--out", str(out), *SHORT, *extra]
    )


def kept_sources(small) -> dict[int, list[str]]:
    """The source of each accepted image, by level."""
    rows = spectrum_folder.kept_rows(small.spectrum, [50, 90])
    return {level: sorted(row["source"] for row in rows if row["level"] == level) for level in (50, 90)}


def logits_of(folder):
    return np.load(folder / "predictions.npz")["ood_logits"]


def history_of(folder):
    return [row | {"images_per_second": 0} for row in files.read_json_lines(folder / "history.jsonl")]


def count_steps(monkeypatch, at: int, act) -> None:
    """Call `act` before the loss of the `at`-th batch of the process."""
    steps, contrastive = [], losses.contrastive

    def counting(*args):
        steps.append(1)
        if len(steps) == at:
            act()
        return contrastive(*args)

    monkeypatch.setattr(losses, "contrastive", counting)


# ---------------------------------------------------------------------------------------------------------------------
# results


def test_ones_own_camera_traps_train_as_toycam_does(small, tmp_path):
    shutil.copytree(small.root, tmp_path / "own")
    (tmp_path / "own/class_names.txt").write_text("\n".join(toycam.CLASSES), encoding="utf-8")
    same = ["--clip", cameratraps.TOYCAM_CLIP, "--precision", "fp32", "--lr", "3e-4", "--workers", "0"]
    same += ["--epochs", "1", "--warmup-epochs", "0"]
    assert train(small, tmp_path / "toycam", *same) == 0
    own = ["--dataset", "cameratraps", "--data-root", str(tmp_path / "own"), *same]
    assert train(small, tmp_path / "cameratraps", *own) == 0
    assert np.array_equal(logits_of(tmp_path / "toycam"), logits_of(tmp_path / "cameratraps"))


def test_a_run_leaves_what_it_says_and_its_figures_agree(small, tmp_path):
    assert train(small, tmp_path / "r") == 0
    results = files.read_json(tmp_path / "r/results.json")
    found = np.load(tmp_path / "r/predictions.npz", allow_pickle=False)
    for domain, images in (("ood", 40), ("id", 40)):
        logits, labels = found[f"{domain}_logits"], found[f"{domain}_labels"]
        assert logits.shape == (images, 5)
        assert results["last"][f"{domain}_f1"] == pytest.approx(evaluation.macro_f1(logits.argmax(1), labels))
        assert results["last"][f"{domain}_acc"] == pytest.approx(100 * (logits.argmax(1) == labels).mean())
        rows = [row for row in csv.DictReader((tmp_path / "r/per_class.csv").open()) if row["domain"] == domain]
        assert [int(row["label"]) for row in rows] == sorted(set(labels.tolist()))  # classes that the split has
        mean = np.mean([float(row["f1"]) for row in rows])
        assert mean == pytest.approx(results["last"][f"{domain}_f1"], abs=0.01)
        places = [row for row in csv.DictReader((tmp_path / "r/per_location.csv").open()) if row["domain"] == domain]
        right = sum(int(row["images"]) * float(row["accuracy"]) for row in places)
        assert right / images == pytest.approx(results["last"][f"{domain}_acc"], abs=0.02)
    history = files.read_json_lines(tmp_path / "r/history.jsonl")
    best = max(history, key=lambda row: row["val_id_f1"])
    assert results["best_by_val"]["epoch"] == best["epoch"] and history[-1]["val_ood_f1"] > 0
    # WiSE-FT is chosen on id_val; its ends are the untuned and the tuned model.
    sweep = results["wise_ft_sweep"]
    assert [row["alpha"] for row in sweep] == train_iwildcam.ALPHAS
    assert sweep[-1]["id_val_f1"] == pytest.approx(history[-1]["val_id_f1"])
    top = max(row["id_val_f1"] for row in sweep)
    assert results["last_wise_ft"]["id_val_f1"] == top
    assert results["last_wise_ft"]["alpha"] == max(row["alpha"] for row in sweep if row["id_val_f1"] == top)
    assert {f"{domain}_{name}" for domain in ("ood", "id") for name in ("f1", "acc")} <= set(results["zero_shot"])
    assert train_iwildcam.finished(train_iwildcam.build_parser().parse_args(["--out", str(tmp_path / "r")]))


def test_flyp_adds_edits_to_all_real_images(small, tmp_path):
    """ALIA inside FLYP: none of the real images is replaced, and each source gives one edit an epoch."""
    flags = ["--curriculum", "all", "--levels", "50", "90", "--epochs", "2", "--curriculum-epochs", "1"]
    flags += ["--warmup-epochs", "0"]
    assert train(small, tmp_path / "all", *flags, "--add", "all") == 0
    assert train(small, tmp_path / "seven", *flags, "--add", "7", "--edits", "user") == 0
    real = SMALL["train"][2]
    of = {name: files.read_json_lines(tmp_path / name / "history.jsonl") for name in ("all", "seven")}
    sources = set().union(*kept_sources(small).values())
    assert [record["images"] for record in of["all"]] == [real + len(sources), real]
    # Seven are shared out by the classes' counts; a class with fewer edited sources gives what it has.
    train_set = datasets.load("toycam", None, small.root).train
    asked = curricula.addition_counts("7", train_set.labels, 5)
    class_of = dict(zip(train_set.sources, train_set.labels, strict=True))
    there = np.bincount([class_of[source] for source in sources], minlength=5)
    assert [record["images"] for record in of["seven"]] == [real + np.minimum(asked, there).sum(), real]
    assert files.read_json(tmp_path / "all/args.json")["args"]["edits"] == "user"
    with pytest.raises(UserError, match="--edits domains: .* is user"):
        train(small, tmp_path / "other", *flags, "--add", "all", "--edits", "domains")


def test_the_tuned_weights_are_read_back_by_find_hard(small, tmp_path):
    train(small, tmp_path / "r", "--epochs", "1", "--warmup-epochs", "0")
    shutil.copytree(cameratraps.TOYCAM_CLIP, tmp_path / "clip")
    (tmp_path / "clip/open_clip_model.safetensors").unlink()
    shutil.copy(tmp_path / "r/clip.safetensors", tmp_path / "clip/open_clip_model.safetensors")
    clip, _, _ = models.load_clip(str(tmp_path / "clip"), "cpu")
    state = checkpoints.load_checkpoint(tmp_path / "r/checkpoint.pt", "cpu")["model"]
    assert all(torch.equal(value, state[f"clip.{name}"]) for name, value in clip.state_dict().items())


def test_tensorboard_names_both_domains_and_shows_the_spectrum(small, tmp_path, drawn):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(small, tmp_path / "r", "--curriculum", "adaptive", "--epochs", "2", "--curriculum-epochs", "1")
    events = EventAccumulator(str(tmp_path / "r"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"val/id_f1", "val/ood_f1", "test/ood_f1", "test/id_acc", "test_wise_ft/ood_f1"} <= scalars
    assert {"curriculum/progress_level50", "curriculum/progress_level90", "wise_ft/id_val_f1"} <= scalars
    assert len(events.Images("train/spectrum")) == 1
    assert (tmp_path / "r/progress.png").is_file()


@pytest.mark.parametrize("loss", ["ce", pytest.param("lpft", marks=pytest.mark.slow)])
def test_a_linear_head_trains(small, tmp_path, loss):
    train(small, tmp_path / "r", "--loss", loss, "--lr", "1e-3")
    history = files.read_json_lines(tmp_path / "r/history.jsonl")
    assert history[-1]["loss"] < history[0]["loss"]
    state = checkpoints.load_checkpoint(tmp_path / "r/checkpoint.pt", "cpu")["model"]
    original = models.load_clip(cameratraps.TOYCAM_CLIP, "cpu")[0].state_dict()
    assert torch.equal(state["clip.text_projection"], original["text_projection"])
    assert not torch.equal(state["clip.visual.conv1.weight"], original["visual.conv1.weight"])


def test_gradient_checkpointing_changes_nothing(small, tmp_path):
    for name, extra in (("a", []), ("b", ["--grad-checkpointing"])):
        train(small, tmp_path / name, "--epochs", "1", "--warmup-epochs", "0", *extra)
    assert np.allclose(logits_of(tmp_path / "a"), logits_of(tmp_path / "b"), atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# curricula


def test_easy_to_hard_goes_up_the_levels_and_ends_on_real_images(small, tmp_path, monkeypatch):
    passes, train_pass = [], train_iwildcam.Trainer.train

    def record(self, epoch, places, purpose="epoch", start=None):
        passes.append((self.pool, places))
        return train_pass(self, epoch, places, purpose, start)

    monkeypatch.setattr(train_iwildcam.Trainer, "train", record)
    train(small, tmp_path / "r", "--curriculum", "e2h", "--epochs", "4", "--curriculum-epochs", "3")
    history = files.read_json_lines(tmp_path / "r/history.jsonl")
    assert [row["levels"] for row in history] == [[50], [90], [100], [100]]
    kept = kept_sources(small)
    assert [row["images"] for row in history] == [96 - 15 + len(kept[50]), 96 - 15 + len(kept[90]), 96, 96]
    assert files.read_json(tmp_path / "r/args.json")["args"]["curriculum"] == "d2s"
    hard = {row["source"] for row in csv.DictReader(small.hard.open())}
    for row, (pool, places) in zip(history, passes, strict=True):
        synthetic = [pool.sources[place] for place in places if pool.levels[place] < 100]
        real = {pool.sources[place] for place in places if pool.levels[place] == 100}
        assert row["synthetic_share"] == len(synthetic) / len(places)
        assert sorted(synthetic) == kept.get(row["levels"][0], [])
        assert len(real - hard) == 81 and (hard <= real if row["levels"] == [100] else not hard & real)


def test_one_image_a_hard_image_keeps_an_epochs_length(small, tmp_path):
    train(small, tmp_path / "r", "--curriculum", "e2h", "--levels", "50", "90", "--per-hard-image", "1")
    history = files.read_json_lines(tmp_path / "r/history.jsonl")
    assert [row["images"] for row in history] == [96] * 3
    kept = kept_sources(small)
    assert [row["synthetic_share"] for row in history] == [len(set(kept[50])) / 96, len(set(kept[90])) / 96, 0]


def test_adaptive_trains_on_the_level_of_most_progress_and_never_on_what_it_looks_at(small, tmp_path, monkeypatch):
    passes, train_pass = [], train_iwildcam.Trainer.train

    def record(self, epoch, places, purpose="epoch", start=None):
        passes.append((self.pool, purpose, places))
        return train_pass(self, epoch, places, purpose, start)

    monkeypatch.setattr(train_iwildcam.Trainer, "train", record)
    train(small, tmp_path / "r", "--curriculum", "adaptive")
    history = files.read_json_lines(tmp_path / "r/history.jsonl")
    for row in history[:2]:
        assert row["levels"] == [int(max(row["progress"], key=lambda level: row["progress"][level]))]
    assert set(history[0]["progress"]) == {"50", "90", "100"}
    assert history[2]["levels"] == [100] and history[2]["images"] == 96
    pool = passes[0][0]
    held = {pool.sources[place] for places in pool.looks.values() for place in places}
    assert len(held) == 4
    # The 81 images that are not hard, and all that were made of the 11 hard ones left, or these themselves.
    stages = {level: len([source for source in kept if source not in held])
              for level, kept in kept_sources(small).items()} | {100: 11}  # fmt: skip
    assert all(row["images"] == 81 + stages[row["levels"][0]] for row in history[:2])
    for _, purpose, places in passes[:-1]:
        assert not held & {pool.sources[place] for place in places}
        assert purpose == "epoch" or (len(places) == 32 and (pool.levels[places] == 100).all())


@pytest.mark.parametrize("curriculum", ["adaptive", pytest.param("random", marks=pytest.mark.slow)])
def test_a_signal_leaves_a_checkpoint_that_goes_on_to_the_same_end(small, tmp_path, monkeypatch, curriculum):
    flags = ["--curriculum", curriculum, "--epochs", "2"]
    train(small, tmp_path / "whole", *flags)
    count_steps(monkeypatch, 13, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(small, tmp_path / "r", *flags) == runs.RESUMABLE
    state = checkpoints.load_checkpoint(tmp_path / "r/checkpoint.pt", "cpu")
    partial = state["partial"]
    assert partial["pass"]["batches"] > 0 and ("progress" in partial) == (curriculum == "adaptive")
    assert train(small, tmp_path / "r", *flags) == 0
    assert np.array_equal(logits_of(tmp_path / "whole"), logits_of(tmp_path / "r"))
    assert history_of(tmp_path / "whole") == history_of(tmp_path / "r")


def test_a_kill_between_epochs_goes_on_to_the_same_end(small, tmp_path, monkeypatch):
    train(small, tmp_path / "whole", "--loss", "lpft")
    log_epoch, calls = log.log_epoch, []

    def die_in_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        log_epoch(*args)

    monkeypatch.setattr(log, "log_epoch", die_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(small, tmp_path / "r", "--loss", "lpft")
    monkeypatch.setattr(log, "log_epoch", log_epoch)
    train(small, tmp_path / "r", "--loss", "lpft")
    assert np.array_equal(logits_of(tmp_path / "whole"), logits_of(tmp_path / "r"))


# ---------------------------------------------------------------------------------------------------------------------
# bad input


def broken(small, folder, count: int):
    """A copy of the data set with `count` training images that are none; they are not of the hardest."""
    hard = {row["source"] for row in csv.DictReader(small.hard.open())}
    shutil.copytree(small.root, folder)
    for path in [path for path in sorted((folder / "train").glob("train_*")) if f"train/{path.name}" not in hard][
        :count
    ]:
        path.write_bytes(b"no image")
    return folder


def test_an_unreadable_training_image_is_left_out_and_counted(small, tmp_path, capsys, monkeypatch):
    root = broken(small, tmp_path / "t", 1)
    sizes, contrastive = [], losses.contrastive
    monkeypatch.setattr(
        losses, "contrastive", lambda image, *rest: (sizes.append(len(image)), contrastive(image, *rest))[1]
    )
    assert train(small, tmp_path / "r", "--data-root", str(root), "--epochs", "2") == 0
    assert sum(sizes) == 2 * 95
    (wrong,) = files.read_json(tmp_path / "r/results.json")["unreadable"]
    assert wrong.startswith(str(root / "train/train_"))
    assert "1 training images cannot be read and were left out" in capsys.readouterr().out


def test_unreadable_images_count_against_the_pass_that_they_are_in(small, tmp_path, monkeypatch):
    args = train_iwildcam.build_parser().parse_args(["--data-root", str(small.root), "--out", str(tmp_path / "r")])
    with signals.StopSignals() as stop:
        trainer, state = train_iwildcam.prepare(args, datasets.load("toycam", None, small.root), {}, [], set(), stop)
    trainer.pool.images.unreadable.update({place: f"image {place}" for place in (3, 50, 51, 52)})
    assert state["unreadable"] == trainer.pool.images.unreadable  # a checkpoint has them
    monkeypatch.setattr(losses, "contrastive", lambda *_: None)
    rng = torch.Generator().manual_seed(0)

    def step(places, numbers):
        labels = torch.from_numpy(trainer.pool.labels[places])
        whole = loop.Pass(0, "epoch", places, labels, labels < 0)
        images = torch.zeros(len(numbers), 3, 16, 16)
        trainer.batch_loss(loop.Batch(whole, numbers, slice(None), images, labels, labels < 0, rng))

    step(np.arange(50), torch.arange(50))  # one of 50: the first is always let pass
    with pytest.raises(UserError, match="3 training images cannot be read: .* of the 46 .*; the first: image 50"):
        step(np.arange(50, 96), torch.arange(46))


def test_images_are_normalised_by_the_clips_own_statistics(small, tmp_path, monkeypatch):
    load = models.load_clip

    def load_other(*args):
        found = load(*args)
        found[0].visual.image_mean, found[0].visual.image_std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
        return found

    monkeypatch.setattr(models, "load_clip", load_other)
    args = train_iwildcam.build_parser().parse_args(["--data-root", str(small.root), "--out", str(tmp_path / "r")])
    with signals.StopSignals() as stop:
        data = datasets.load("toycam", None, small.root)
        trainer, _ = train_iwildcam.prepare(args, data, {}, [], set(), stop)
    assert (trainer.data.mean, trainer.data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("loss", ["flyp", "ce"])
def test_too_many_unreadable_images_end_the_run(small, tmp_path, loss):
    root = broken(small, tmp_path / "t", 4)
    with pytest.raises(UserError, match="2 training images cannot be read: more than 1% of the 96"):
        train(small, tmp_path / "r", "--data-root", str(root), "--batch-size", "1", "--loss", loss)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--templates", "a photo"], "--templates: expected texts with {}"),
        (["--merge-same-class", "--loss", "ce"], "--merge-same-class: --loss ce has no captions"),
        (["--batch-size", "97"], "--batch-size 97: expected at most the 96 training images"),
        (["--clip", "/no/such"], "--clip /no/such: .*expected a folder"),
        (["--curriculum", "e2h", "--levels", "30"], "level 30: .* no accepted image"),
        (["--level-shares", "1", "2"], "--level-shares: --curriculum none"),
    ],
)
def test_bad_flags_are_named(small, tmp_path, extra, message):
    with pytest.raises(UserError, match=message):
        train(small, tmp_path / "r", *extra)
    assert not (tmp_path / "r/results.json").exists()


def test_a_clip_checkpoint_of_another_architecture_is_named(small, tmp_path):
    shutil.copytree(cameratraps.TOYCAM_CLIP, tmp_path / "clip")
    config = tmp_path / "clip/open_clip_config.json"
    content = files.read_json(config)
    content["model_cfg"]["vision_cfg"]["layers"] += 1
    files.write_json(config, content)
    with pytest.raises(UserError, match="its checkpoint does not match its architecture"):
        train(small, tmp_path / "r", "--clip", str(tmp_path / "clip"))


def test_a_run_does_not_resume_from_other_clip_weights_under_the_same_name(small, tmp_path):
    shutil.copytree(cameratraps.TOYCAM_CLIP, tmp_path / "clip")
    flags = ["--clip", str(tmp_path / "clip"), "--curriculum", "none", "--epochs", "1", "--warmup-epochs", "0"]
    assert train(small, tmp_path / "r", *flags) == 0
    (tmp_path / "clip/README.md").write_text("trained again")
    with pytest.raises(UserError, match="inputs.clip"):
        train(small, tmp_path / "r", *flags)


# ---------------------------------------------------------------------------------------------------------------------
# several processes

GRADIENTS = """
import glob, pathlib, sys
sys.path.insert(0, {root!r})
import torch
from training import distributed, losses
distributed.start("cpu")
torch.manual_seed(0)
images, texts = torch.randn(7, 5), torch.randn(7, 5)
model = torch.nn.Linear(5, 4)
scale = torch.nn.Parameter(torch.tensor(2.0))
both = torch.nn.ModuleDict({{"model": model}})
both.register_parameter("scale", scale)
class Features(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.both = both
    def forward(self, a, b):
        unit = torch.nn.functional.normalize
        return unit(self.both["model"](a), dim=1), unit(self.both["model"](b), dim=1), self.both.scale.exp()
def compute():
    rows = distributed.share(7)
    wrapped = distributed.wrap(Features(), "cpu")
    image, text, scaled = wrapped(images[rows], texts[rows])
    image, text = (distributed.gathered(one, rows, 7) for one in (image, text))
    loss = losses.contrastive(image, text, scaled)
    loss.backward()
    if distributed.rank() == 0:
        torch.save([loss.detach(), model.weight.grad, model.bias.grad, scale.grad], sys.argv[1])
compute()  # what holds the group is gone before it is left
distributed.stop()
threads = [pathlib.Path(path).read_text() for path in glob.glob("/proc/self/task/*/comm")]
assert not [name for name in threads if "gloo" in name], threads  # at exit they can abort the process
"""


def test_the_gradient_of_two_processes_is_that_of_the_whole_batch(tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS.format(root=str(ROOT)))
    done = forks.type_command(tmp_path, script, tmp_path / "1.pt")
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
        + [tmp_path / "2.pt"], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(tmp_path / f"{processes}.pt", weights_only=True) for processes in (1, 2)]
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, atol=1e-6) and one.abs().max() > 0


@pytest.mark.parametrize("loss", ["flyp", "ce"])
def test_two_processes_have_the_loss_curve_of_one(small, tmp_path, loss):
    flags = ["--data-root", str(broken(small, tmp_path / "t", 1)), "--spectrum", str(small.spectrum), *SHORT]
    flags += ["--loss", loss, "--optimizer", "sgd", "--lr", "0.01", "--batch-size", "15", "--curriculum", "adaptive"]
    assert train_iwildcam.main([*flags, "--out", str(tmp_path / "one")]) == 0
    two = [*flags, "--out", str(tmp_path / "two")]
    for done in forks.train_together(lambda: train_iwildcam.main(two), tmp_path):
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (files.read_json_lines(tmp_path / name / "history.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["levels"] == b["levels"] and a["images"] == b["images"] and a["val_id_f1"] == b["val_id_f1"]
    assert np.allclose(logits_of(tmp_path / "one"), logits_of(tmp_path / "two"), atol=1e-3)


def test_a_checkpoint_has_the_images_that_any_process_could_not_read(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train_iwildcam, "UNREADABLE_SHARE", 0.1)
    flags = ["--data-root", str(broken(small, tmp_path / "t", 4)), "--spectrum", str(small.spectrum), *SHORT]
    flags += ["--curriculum", "none", "--epochs", "1", "--warmup-epochs", "0", "--batch-size", "15"]
    flags += ["--out", str(tmp_path / "r")]
    for done in forks.train_together(lambda: train_iwildcam.main(flags), tmp_path):
        assert done.returncode == 0, done.stderr[-3000:]
    noted = checkpoints.load_checkpoint(tmp_path / "r/checkpoint.pt", "cpu")["unreadable"]
    assert len(noted) == len(files.read_json(tmp_path / "r/results.json")["unreadable"]) == 4
