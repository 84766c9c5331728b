"""Few-shot training: halves of a batch, lambda, mixing within a kind, what tuning changes, resume, the grid."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import cut_few_shot_tests

import datasets
import generate_spectrum
import train_fewshot
from loaders.base import ASSETS
from reporting import names
from runtime.cli import UserError
from spectrum import edits, tables
from spectrum import folder as spectrum_folder
from training import clip, fewshot, losses

SHORT = ["--dataset", "fewshot_digits", "--shots", "2", "--epochs", "2", "--batch-size", "8", "--warmup-epochs", "0"]


@pytest.fixture(autouse=True)
def few_tests(monkeypatch):
    cut_few_shot_tests(monkeypatch, 100)


def train(out: Path, *more) -> dict:
    assert train_fewshot.main([*SHORT, "--out", str(out), *map(str, more)]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def spectrum(tmp_path_factory):
    """Three synthetic images a class, drawn in one step from text alone, not filtered."""
    folder = tmp_path_factory.mktemp("fewshot")
    train = datasets.load_shots(train_fewshot.build_parser().parse_args(SHORT)).train
    classes = datasets.load("fewshot_digits", None).class_names
    rows = [
        {"source": source, "label": label, "class_name": classes[label], "reason": "", "score": ""}
        for source, label in zip(train.sources, train.labels.tolist(), strict=True)
    ]
    tables.write_hard(folder / "shots.csv", rows)
    texts = {label: f"a photo of a {name}" for label, name in enumerate(classes)}
    prompts = {
        label: {"class_name": classes[label], "score_prompt": text, "prompts": [text]} for label, text in texts.items()
    }
    (folder / "prompts.json").write_text(json.dumps(prompts))
    flags = ["--dataset", "fewshot_digits", "--hard", str(folder / "shots.csv"), "--per-class", "3", "--steps", "1"]
    flags += ["--prompts", str(folder / "prompts.json"), "--out", str(folder / "s")]
    assert generate_spectrum.main(flags) == 0
    return folder / "s"


LEVELS = np.array([100, 100, 0, 0, 0, 0, 0, 50])
NOT_HELD = np.zeros(8, dtype=bool)


def test_an_epoch_repeats_real_images_to_the_number_of_the_synthetic_ones():
    rng = np.random.default_rng(0)
    places = fewshot.few_shot_epoch("both", LEVELS, NOT_HELD, [0, 100], rng)
    assert places[5:].tolist() == [2, 3, 4, 5, 6]
    assert sorted(places[:5].tolist()) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])  # all before any again
    assert fewshot.few_shot_epoch("synthetic", LEVELS, NOT_HELD, [0, 50], rng).tolist() == [2, 3, 4, 5, 6, 7]
    assert fewshot.few_shot_epoch("real", LEVELS, NOT_HELD, [0], rng).tolist() == [0, 1]
    assert fewshot.few_shot_epoch("both", LEVELS, NOT_HELD, [], rng).tolist() == [0, 1]  # after a curriculum


def test_every_batch_is_half_real_and_half_synthetic():
    order = fewshot.half_and_half(50, 100, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(100))
    for batch in order.split(8):
        assert int((batch < 50).sum()) * 2 == len(batch)
    assert sorted(fewshot.half_and_half(3, 10, torch.Generator()).tolist()) == list(range(10))


def test_lambda_weighs_the_halves_means():
    """0.8 * mean(1, 3) + 0.2 * mean(10, 20, 30) = 1.6 + 4."""
    synthetic = torch.tensor([False, True, False, True, True])
    values = torch.tensor([1.0, 10.0, 3.0, 20.0, 30.0])
    weights = losses.image_weights(torch.zeros(5, dtype=torch.long), synthetic, None, 0.8)
    assert losses.batch_mean(values, weights).item() == pytest.approx(5.6)


def test_images_are_mixed_with_others_of_their_own_kind_alone():
    from training.augmentations import mixer

    torch.manual_seed(0)
    synthetic = torch.tensor([False, True] * 8)
    images = torch.where(synthetic, 1.0, -1.0).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    labels = torch.arange(16)
    mixed, shares = fewshot.mix_kinds(mixer("mixup", 16), images, labels, synthetic, 16)
    torch.testing.assert_close(mixed, images)  # kinds are of one value each: a mix across them would differ
    assert (shares.sum(1) - 1).abs().max() < 1e-5 and (shares.count_nonzero(1) > 1).any()
    assert shares[synthetic][:, ::2].sum() == 0 and shares[~synthetic][:, 1::2].sum() == 0


@pytest.mark.parametrize("images", ["real", "synthetic", "both"])
def test_a_classifier_is_trained_on_the_images_that_are_asked_for(spectrum, tmp_path, images):
    found = train(tmp_path, "--images", images, "--spectrum", spectrum, "--mix", "both")
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert history[0]["images"] == {"real": 20, "synthetic": 30, "both": 60}[images]
    assert history[0]["synthetic_share"] == {"real": 0, "synthetic": 1, "both": 0.5}[images]
    assert history[0]["levels"] == {"real": [100], "synthetic": [0], "both": [0, 100]}[images]
    assert found["train_counts"] == [2] * 10 and "zero_shot" not in found
    assert (tmp_path / "shots.csv").read_text().count("\n") == 21
    row = names.row_name(json.loads((tmp_path / "args.json").read_text())["args"])
    assert row == {"real": "real", "synthetic": "untuned synthetic", "both": "real + untuned synthetic"}[images]


@pytest.mark.parametrize("tune", ["lora", "probe", "full"])
def test_a_clip_changes_where_it_is_tuned(tmp_path, tune, monkeypatch):
    import models

    loaded = []
    plain = models.load_clip
    monkeypatch.setattr(fewshot, "ALPHAS", [0.0, 0.5, 1.0])  # a look at all validation images for each
    monkeypatch.setattr(models, "load_clip", lambda *args: loaded.append(plain(*args)) or loaded[-1])
    before = {name: value.clone() for name, value in plain(str(ASSETS / "tiny_clip"), "cpu")[0].state_dict().items()}
    found = train(tmp_path, "--images", "real", "--model", "clip", "--tune", tune, "--lr", "0.01")
    assert 0 <= found["zero_shot"]["overall"] <= 100 and len(found["wise_ft_sweep"]) == 3
    after = loaded[0][0].state_dict()
    moved = {name for name, value in before.items() if name in after and not torch.equal(value, after[name])}
    if tune == "full":
        assert {name.split(".")[0] for name in moved} >= {"visual", "transformer"} and "logit_scale" not in moved
    else:
        assert not moved
    changed = {name for name, value in after.items() if ".b." in name and value.abs().sum() > 0}
    if tune == "lora":
        assert {name.rpartition(".")[2] for name in changed} == {"q", "v"}
        assert {name.split(".")[0] for name in changed} == {"visual", "transformer"}


def test_a_frozen_tower_keeps_its_batchnorm_statistics():
    """That of a CLIP with a ResNet under a probe, or under adapters on the text tower alone."""
    frozen, trained = torch.nn.BatchNorm1d(4).requires_grad_(False), torch.nn.BatchNorm1d(4)
    tuned = clip.TunedClip(torch.nn.ModuleDict({"visual": frozen, "transformer": trained}))
    for _ in range(2):
        tuned.train()
        assert trained.training and not frozen.training
        tuned.eval()
        assert not trained.training


def test_wise_ft_of_strength_zero_is_zero_shot_and_no_training_changes_nothing(tmp_path):
    found = train(tmp_path, "--images", "real", "--model", "clip", "--lr", "0", "--lora-dropout", "0")
    assert found["last"]["overall"] == found["zero_shot"]["overall"] == found["last_wise_ft"]["overall"]
    sweep = {row["val_overall"] for row in found["wise_ft_sweep"]}
    assert len(sweep) == 1 and len(found["wise_ft_sweep"]) == 11


@pytest.mark.parametrize("model", ["resnet8", pytest.param("clip", marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_same_weights(spectrum, tmp_path, monkeypatch, model):
    flags = ["--images", "both", "--spectrum", spectrum, "--model", model, "--lr", "0.01", "--mix", "both"]
    whole = train(tmp_path / "whole", *flags)
    plain, batches = fewshot.Trainer.batch_loss, []

    def batch_loss(self, batch):
        batches.append(batch.of.epoch)
        if batches.count(1) == 2:
            self.signals.received = "SIGTERM"
        return plain(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(fewshot.Trainer, "batch_loss", batch_loss)
        assert train_fewshot.main([*SHORT, "--out", str(tmp_path / "cut"), *map(str, flags)]) == 75
    found = train(tmp_path / "cut", *flags)
    assert found["last"] == whole["last"] and found.get("wise_ft_sweep") == whole.get("wise_ft_sweep")
    logits = [np.load(tmp_path / name / "predictions.npz")["logits"] for name in ("whole", "cut")]
    assert np.array_equal(*logits)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "backend"), [("clip", "aot_eager"), ("resnet8", "inductor")])
def test_a_compiled_model_learns_the_same(tmp_path, monkeypatch, model, backend):
    """The larger one without kernels of torch's making, which take most of a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    flags = ["--images", "real", "--model", model, "--lr", "0.003", "--lora-dropout", "0"]
    logits = []
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        train(tmp_path / name, *flags, *more)
        logits.append(np.load(tmp_path / name / "predictions.npz")["logits"])
    assert np.abs(logits[0] - logits[1]).max() < 1e-2


def test_the_grid_takes_the_setting_that_is_best_on_validation(tmp_path):
    found = train(tmp_path, "--images", "real", "--grid", "lr=0,0.003", "--epochs", "12")
    rows = {row["lr"]: row["val_overall"] for row in found["grid"]}
    assert len(rows) == 2 and found["best_by_val"]["val_overall"] == max(rows.values())
    assert json.loads((tmp_path / "args.json").read_text())["args"]["lr"] == max(rows, key=rows.get)
    assert train(tmp_path, "--images", "real", "--grid", "lr=0,0.003", "--epochs", "12") == found  # nothing is redone


def test_a_longer_run_of_the_grid_has_synthetic_images_to_its_end(spectrum, tmp_path):
    flags = ["--images", "synthetic", "--model", "resnet8", "--spectrum", spectrum, "--grid", "epochs=1,4"]
    train(tmp_path, *flags)
    for epochs in (1, 4):
        rows = (tmp_path / f"grid/epochs-{epochs}/history.jsonl").read_text().splitlines()
        assert [json.loads(row)["synthetic_share"] for row in rows] == [1.0] * epochs
        assert json.loads((tmp_path / f"grid/epochs-{epochs}/args.json").read_text())["args"]["method"] == "untuned"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--warmup-epochs", "1", "--grid", "epochs=2,1"], "--warmup-epochs 1: expected fewer than --epochs 1"),
        (["--curriculum", "s2d", "--levels", "0", "100", "--grid", "epochs=2,1"], "--curriculum-epochs 1: expected at"),
    ],
)
def test_every_setting_of_the_grid_is_checked_before_the_first_is_trained(spectrum, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path, "--model", "resnet8", "--spectrum", spectrum, *flags)
    assert not (tmp_path / "grid").exists()


def test_a_run_whose_edits_were_filtered_since_is_another(spectrum, tmp_path):
    shutil.copytree(spectrum, tmp_path / "s")
    flags = ["--images", "both", "--model", "resnet8", "--spectrum", tmp_path / "s"]
    names = [row["file_name"] for row in spectrum_folder.read_rows(tmp_path / "s")]
    for kept in (names[:20], names[10:]):
        columns = {"file_name": names, "kept": [int(name in kept) for name in names]}
        edits.write_edits(tmp_path / "s/edits.csv", columns)
        if kept == names[:20]:
            train(tmp_path / "run", *flags)
    with pytest.raises(UserError, match="inputs.spectrum"):
        train(tmp_path / "run", *flags)


def test_a_run_with_another_clip_under_the_same_name_is_another(tmp_path):
    shutil.copytree(ASSETS / "tiny_clip", tmp_path / "clip")
    flags = ["--images", "real", "--model", "clip", "--clip", tmp_path / "clip", "--epochs", "1"]
    train(tmp_path / "run", *flags)
    (tmp_path / "clip/README.md").write_text("trained again")
    with pytest.raises(UserError, match="inputs.clip"):
        train(tmp_path / "run", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "both", "--batch-size", "7"], "--batch-size 7: expected an even number"),
        (["--images", "both", "--curriculum", "none"], "--curriculum none: --images both has synthetic images"),
        (["--images", "synthetic", "--curriculum", "d2s"], "--curriculum d2s: ends with real images"),
        (["--images", "synthetic", "--curriculum-epochs", "1"], "--curriculum-epochs 1: the epochs after it have"),
        (["--images", "both", "--spectrum", "SPECTRUM", "--levels", "100"], "--images both: no level below 100"),
        (["--template", "digit"], "--template 'digit': expected a text with {}"),
        (["--shots", "99", "--images", "real"], "--shots 99: class zero"),
        (["--images", "both", "--spectrum", "SPECTRUM", "--method", "cls"], "--method cls: "),
        (["--images", "both", "--spectrum", "/nowhere"], "/nowhere: no plan.json there"),
        (["--images", "real", "--model", "clip", "--clip", "/nowhere/clip"], "--clip /nowhere/clip: cannot be loaded"),
    ],
)
def test_bad_input_is_one_line(spectrum, tmp_path, flags, message):
    flags = [str(spectrum) if flag == "SPECTRUM" else flag for flag in flags]
    with pytest.raises(UserError) as error:
        train_fewshot.main([*SHORT, "--out", str(tmp_path), *flags])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_grid_of_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        train_fewshot.build_parser().parse_args(["--grid", "seed=1,2"])
    assert "expected FLAG=A,B,... with FLAG of lr, weight-decay" in capsys.readouterr().err
