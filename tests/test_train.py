"""Training: exact resumption, evaluation without side effects, and what it refuses."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
from conftest import ROOT

import datasets
import models
import train_lt
from runtime import checkpoints, files, steps
from runtime.cli import UserError
from spectrum import folder as spectrum_folder
from spectrum import tables
from training import augmentations, evaluation, log, optimization, stores

SHORT = ["--epochs", "4", "--curriculum-epochs", "3", "--model", "resnet8", "--levels", "0", "50", "90"]
D2S = ["--curriculum", "d2s"]
pytestmark = pytest.mark.usefixtures("blank_figures")


def train(road, out, *extra) -> int:
    return train_lt.main(["--spectrum", str(road.spectrum), "--out", str(out), *SHORT, *extra])


@pytest.fixture(scope="module")
def finished(road, tmp_path_factory):
    """A finished run from synthetic to real images; tests that change it copy it first."""
    out = tmp_path_factory.mktemp("finished") / "r"
    assert train(road, out, *D2S) == 0
    return out


@pytest.fixture(scope="module")
def before_the_end(road, tmp_path_factory):
    """A run as before its last moment: two checkpoints and no results.json; and what it is to predict."""
    out = tmp_path_factory.mktemp("before") / "r"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "remove_previous", lambda *_: None)
        train(road, out)
    (out / "results.json").unlink()
    return out, np.load(out / "predictions.npz")["logits"]


def test_the_same_command_gives_the_same_numbers(road, finished, tmp_path):
    for name, more in (("again", []), ("other", ["--seed", "1"])):
        assert train(road, tmp_path / name, *D2S, *more) == 0
    a, b, c = (np.load(out / "predictions.npz")["logits"] for out in (finished, tmp_path / "again", tmp_path / "other"))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


class Interrupted(Exception):
    pass


def interrupt(*_, **__):
    raise Interrupted


@pytest.mark.parametrize("curriculum", [pytest.param("none", marks=pytest.mark.slow), "d2s", "random"])
def test_interrupted_and_resumed_equals_uninterrupted(road, finished, tmp_path, monkeypatch, curriculum):
    whole = finished if curriculum == "d2s" else tmp_path / "whole"
    flags = ["--curriculum", curriculum]
    if curriculum != "d2s":
        flags += ["--epochs", "3", "--curriculum-epochs", "2"]
    train(road, whole, *flags)
    log_epoch, calls = log.log_epoch, []

    def stop_in_the_third_epoch(*args):
        calls.append(args)
        if len(calls) == 3:
            raise Interrupted
        log_epoch(*args)

    monkeypatch.setattr(log, "log_epoch", stop_in_the_third_epoch)
    with pytest.raises(Interrupted):
        train(road, tmp_path / "resumed", *flags)
    assert not (tmp_path / "resumed/results.json").exists()
    monkeypatch.setattr(log, "log_epoch", log_epoch)
    train(road, tmp_path / "resumed", *flags)
    for name in ("model", "best"):
        states = [checkpoints.load_checkpoint(run / "checkpoint.pt", "cpu") for run in (whole, tmp_path / "resumed")]
        states = [state["model"] if name == "model" else state["best"]["model"] for state in states]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    results = [files.read_json(run / "results.json") for run in (whole, tmp_path / "resumed")]
    assert all(results[0][name] == results[1][name] for name in ("last", "best_by_val", "images"))


def test_a_finished_run_is_skipped_and_overwrite_starts_anew(road, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "r")
    written = (tmp_path / "r/results.json").stat().st_mtime_ns
    assert train(road, tmp_path / "r", *D2S) == 0
    assert "already complete" in capsys.readouterr().out
    assert (tmp_path / "r/results.json").stat().st_mtime_ns == written
    train(road, tmp_path / "r", *D2S, "--overwrite")
    assert (tmp_path / "r/results.json").stat().st_mtime_ns > written


def test_evaluation_changes_nothing():
    torch.manual_seed(0)
    model = models.build_classifier("resnet8", 10).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = datasets.load("digits", 30)
    store = stores.build([data.val], "cpu", 16, 0, "contiguous")
    whole = evaluation.predict(model, store, np.arange(9), data, "cpu")
    parts = evaluation.predict(model, store, np.arange(9), data, "cpu", batch_size=4)
    assert torch.allclose(whole, parts, atol=1e-5) and len(whole.unique(dim=0)) == 9
    kept = evaluation.predict(model, store, np.arange(9), data, "cpu", batch_size=4, keep=evaluation.top_class, width=1)
    assert kept[:, 0].tolist() == whole.argmax(1).tolist()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_accuracies_by_hand():
    predicted = np.array([0, 0, 1, 2, 0, 1])
    labels = np.array([0, 0, 0, 1, 1, 1])
    groups = {"many": np.array([0]), "medium": np.array([], dtype=int), "few": np.array([1, 2])}
    found = evaluation.accuracies(predicted, labels, 3, groups)
    assert found["overall"] == 50 and found["many"] == pytest.approx(200 / 3) and found["medium"] is None
    assert found["few"] == pytest.approx(100 / 3)
    assert found["per_class"] == [pytest.approx(200 / 3), pytest.approx(100 / 3), None]


def test_what_some_classes_are_taken_for_by_hand():
    predicted, labels = np.array([0, 2, 1, 2, 2]), np.array([0, 0, 1, 3, 3])
    assert evaluation.confusion(predicted, labels, 4, np.array([0, 3])).tolist() == [[1, 0, 1, 0], [0, 0, 2, 0]]


@pytest.mark.parametrize("kind", ["shift", "crop_flip"])
def test_augmentation_shifts_each_image_by_at_most_an_eighth(kind):
    images = torch.full((64, 3, 16, 16), 9, dtype=torch.uint8)
    images[:, :, 8, 7] = 255
    args = SimpleNamespace(augment=kind, color_jitter=0)
    draws = augmentations.draw(args, 16, 64, torch.Generator().manual_seed(0))
    shifted = augmentations.augment(args, images, draws)
    assert shifted.shape == images.shape and shifted.dtype == torch.uint8 and shifted.max() == 255
    places = [(image[0] == 255).nonzero()[0].tolist() for image in shifted]
    assert {y for y, _ in places} == {6, 7, 8, 9, 10}
    # Mirrored, column 7 is column 8: with crop_flip one more column can be met.
    assert {x for _, x in places} == ({5, 6, 7, 8, 9} if kind == "shift" else {5, 6, 7, 8, 9, 10})
    assert shifted.min() == (9 if kind == "shift" else 0)


def test_shifted_pixels_are_those_of_padding_and_cropping():
    from torch.nn import functional as F

    images = torch.randint(1, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    top, left = torch.randint(5, (2, 5), generator=torch.Generator().manual_seed(0))
    for edge, mode in ((True, "replicate"), (False, "constant")):
        shifts = augmentations.draw_shifts(16, 5, torch.Generator().manual_seed(0))
        shifted = augmentations.shift(images, shifts, None, edge)
        padded = F.pad(images.float(), (2, 2, 2, 2), mode=mode)
        for i in range(5):
            assert torch.equal(shifted[i].float(), padded[i, :, top[i] : top[i] + 16, left[i] : left[i] + 16])


@pytest.mark.parametrize("kind", ["shift", "crop_flip", "resized_crop"])
def test_a_process_augments_its_share_as_one_process_would(kind):
    images = torch.randint(256, (7, 3, 16, 16), dtype=torch.uint8)
    args = SimpleNamespace(augment=kind, color_jitter=0.4)
    draws = augmentations.draw(args, 16, 7, torch.Generator().manual_seed(3))
    whole = augmentations.augment(args, images, draws)
    for rank in range(2):
        rows = slice(rank, None, 2)
        assert torch.equal(augmentations.augment(args, images[rows], draws, rows), whole[rows])


def test_color_jitter_agrees_with_torchvision():
    from torchvision.transforms.v2 import functional as V

    images = torch.randint(256, (4, 3, 8, 8)).float()
    factors = 1 + 0.4 * (2 * torch.rand(3, 4, generator=torch.Generator().manual_seed(5)) - 1)
    args = SimpleNamespace(augment="none", color_jitter=0.4)
    draws = augmentations.draw(args, 8, 4, torch.Generator().manual_seed(5))
    found = augmentations.augment(args, images, draws)
    for i in range(4):
        expected = V.adjust_brightness(images[i] / 255, factors[0, i].item())
        expected = V.adjust_contrast(expected, factors[1, i].item())
        expected = V.adjust_saturation(expected, factors[2, i].item())
        assert torch.allclose(found[i] / 255, expected, atol=2e-3)


def test_randaugment_is_torchvisions_by_a_seed_of_its_own_and_leaves_all_generators_alone(monkeypatch):
    """A GPU's too, which draws a step's dropout: in a loading process there is none to be changed."""
    from torchvision.transforms import v2

    image = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
    before = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "manual_seed_all", interrupt)
        found = [stores.randaugmented(image, 5, number) for number in range(3)]
    assert torch.equal(before, torch.get_rng_state())
    for number, one in enumerate(found):
        torch.manual_seed((5 + number * 0x9E3779B97F4A7C15) % 2**63)
        assert torch.equal(one, v2.RandAugment()(image))


def test_normalising_takes_out_mean_and_deviation():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(augmentations.normalise(images, (0.5,) * 3, (0.5,) * 3), images.float() / 127.5 - 1)
    found = augmentations.normalise(images, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert torch.allclose(found[:, 2], (images[:, 2] / 255 - 0.3) / 0.6, atol=1e-5)


def rates(schedule, epochs, **flags):
    args = SimpleNamespace(lr=2.0, schedule=schedule, epochs=200, warmup_epochs=0, step_epochs=[160, 180])
    vars(args).update(step_factor=0.01, **flags)
    return [optimization.learning_rate(args, epoch, 0.25) for epoch in epochs]


def test_a_step_of_the_rate_that_is_never_reached_is_said(capsys):
    words = ["--dataset", "cifar100_lt", "--imb-ratio", "100", "--curriculum", "none"]
    for more, said in (
        (["--epochs", "170"], "--step-epochs 180: not within --epochs 170; the rate is not lowered there\n"),
        (["--epochs", "200"], ""),
        (["--epochs", "170", "--schedule", "cosine"], ""),
    ):
        train_lt.check_flags(train_lt.build_parser().parse_args([*words, *more]))
        assert capsys.readouterr().out == said


def test_learning_rates_by_hand():
    assert rates("cosine", [0, 100, 200]) == pytest.approx([2, 1, 0])
    # Five epochs of warm-up: the first of four steps is at 0.25 / 5. Then a cosine over the 195 epochs left.
    assert rates("cosine", [0, 2.5, 5, 102.5], warmup_epochs=5) == pytest.approx([0.1, 1.1, 2, 1])
    # CIFAR-LT's common schedule: 5 epochs of warm-up, a hundredth at 160 and again at 180.
    assert rates("steps", [0, 5, 159.9, 160, 179.9, 180], warmup_epochs=5) == pytest.approx(
        [0.1, 2, 2, 0.02, 0.02, 0.0002]
    )


def test_an_epochs_images_follow_the_curriculum(road, tmp_path, capsys):
    """7 of 10 classes are hard: 39 of the 129 other images stay, 39 * 0.7 / 0.3 = 91 hard ones, 55 of them real."""
    flags = ["--levels", "0", "90", "100", "--keep-others", "0.3"]
    train(road, tmp_path / "r", "--curriculum", "d2s", *flags)
    assert "schedule: 1 epoch of level 0, 1 of level 90, 1 of level 100, then 1 of all real" in capsys.readouterr().out
    history = files.read_json_lines(tmp_path / "r/history.jsonl")
    assert [record["levels"] for record in history] == [[0], [90], [100], [100]]
    assert [record["images"] for record in history] == [39 + 91] * 3 + [184]
    assert [record["synthetic_share"] for record in history] == [pytest.approx(36 / 130)] * 2 + [0, 0]


def test_tensorboard_holds_every_epoch(road, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(road, tmp_path / "r", "--curriculum", "s2d")
    events = EventAccumulator(str(tmp_path / "r"))
    events.Reload()
    assert [event.value for event in events.Scalars("curriculum/level")] == [90, 50, 0, 100]
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]
    assert {"val/overall", "val/few", "test/few", "train/lr"} <= set(events.Tags()["scalars"])


def test_results_hold_both_epochs_and_predictions_agree(finished):
    results = files.read_json(finished / "results.json")
    predictions = np.load(finished / "predictions.npz", allow_pickle=False)
    assert predictions["logits"].shape == (500, 10)
    right = predictions["logits"].argmax(1) == predictions["labels"]
    assert results["last"]["overall"] == pytest.approx(100 * right.mean())
    assert results["last"]["few"] == pytest.approx(100 * right[predictions["labels"] >= 3].mean())
    assert results["best_by_val"]["epoch"] in range(4)


def test_a_spectrum_made_for_other_data_is_refused(road, tmp_path):
    with pytest.raises(UserError, match="made for other data"):
        train(road, tmp_path / "r", "--curriculum", "d2s", "--imb-ratio", "60")


def test_a_level_without_an_accepted_image_is_named(road, tmp_path):
    shutil.copytree(road.spectrum, tmp_path / "s")
    scores = tables.read_scores(tmp_path / "s/scores.csv")
    scores = {name: score | {"kept": "level050" not in name} for name, score in scores.items()}
    tables.write_scores(tmp_path / "s/scores.csv", scores, scores)
    with pytest.raises(
        UserError, match="level 50: .* no accepted image of it .*expected --levels, or --fixed-level, of"
    ):
        train_lt.main(["--spectrum", str(tmp_path / "s"), "--out", str(tmp_path / "r"), *SHORT, "--curriculum", "d2s"])


def test_a_class_without_an_accepted_image_at_a_level_is_named(road, tmp_path, monkeypatch, capsys):
    shutil.copytree(road.spectrum, tmp_path / "s")
    rows = {row["file_name"]: row for row in spectrum_folder.read_rows(tmp_path / "s")}
    scores = tables.read_scores(tmp_path / "s/scores.csv")
    for name, score in scores.items():
        score["kept"] = (rows[name]["label"], rows[name]["level"]) != (9, 50)
    tables.write_scores(tmp_path / "s/scores.csv", scores, scores)
    monkeypatch.setattr(train_lt.Trainer, "train", interrupt)
    with pytest.raises(Interrupted):
        train_lt.main(["--spectrum", str(tmp_path / "s"), "--out", str(tmp_path / "r"), *SHORT, "--curriculum", "d2s"])
    said = capsys.readouterr().out
    assert "1 of 21 hard classes and levels have no accepted image, the first nine at level 50" in said


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--curriculum", "d2s", "--levels", "20"], "level 20: .* no accepted image"),
        (["--curriculum", "fixed", "--fixed-level", "30"], "level 30: .* no accepted image"),
        (["--curriculum", "d2s", "--curriculum-epochs", "2"], "--curriculum-epochs 2"),
        (["--curriculum", "d2s", "--spectrum", "/no/such"], "/no/such"),
        (["--model", "vgg"], "--model vgg"),
        (["--device", "cuda:9"], "--device cuda:9"),
    ],
)
def test_bad_input_names_the_flag(road, tmp_path, extra, message):
    with pytest.raises(UserError, match=message):
        train(road, tmp_path / "r", *extra)


def test_a_folder_with_another_run_is_left_alone(road, finished):
    with pytest.raises(UserError, match=r"loss is 'ce' there, 'bs' here"):
        train(road, finished, *D2S, "--loss", "bs")


def test_of_a_truncated_checkpoint_the_previous_one_is_used_to_the_same_end(road, before_the_end, tmp_path, capsys):
    folder, logits = before_the_end
    shutil.copytree(folder, tmp_path / "r")
    checkpoint = tmp_path / "r/checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    train(road, tmp_path / "r")
    said = capsys.readouterr().out
    assert "checkpoint.pt: not a readable checkpoint" in said and "resuming after epoch 3 of 4" in said
    assert np.array_equal(logits, np.load(tmp_path / "r/predictions.npz")["logits"])


def test_a_finished_run_keeps_its_weights_alone(road, tmp_path):
    short = ["--epochs", "2", "--curriculum-epochs", "0", "--ema", "0.9"]
    train(road, tmp_path / "r", *short)
    assert not (tmp_path / "r/checkpoint.previous.pt").exists()
    state = checkpoints.load_checkpoint(tmp_path / "r/checkpoint.pt", "cpu")
    assert {"model", "average", "best", "history"} <= set(state) and "optimizer" not in state
    # A kill between the two last writings: the run only has its tests to do.
    results = files.read_json(tmp_path / "r/results.json")
    (tmp_path / "r/results.json").unlink()
    assert train(road, tmp_path / "r", *short) == 0
    assert files.read_json(tmp_path / "r/results.json") == results


def test_checkpoint_every_writes_so_many(road, tmp_path, monkeypatch):
    written, save = [], checkpoints.save_checkpoint
    monkeypatch.setattr(
        checkpoints, "save_checkpoint", lambda path, state: (written.append(state["epoch"]), save(path, state))
    )
    train(road, tmp_path / "r", "--checkpoint-every", "3")
    assert written == [3, 4]


def test_two_truncated_checkpoints_are_named(road, before_the_end, tmp_path):
    shutil.copytree(before_the_end[0], tmp_path / "r")
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / "r" / name).write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="checkpoint.previous.pt: not a readable checkpoint"):
        train(road, tmp_path / "r")


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(road, tmp_path):
    with pytest.raises(UserError, match="the loss is not finite"):
        train(road, tmp_path / "r", "--lr", "1e30")


@pytest.mark.slow
def test_without_a_spectrum_the_default_one_is_made_first(tmp_path, monkeypatch, capsys):
    cheaper = {"generate_spectrum.py": "--levels 0 50 --seeds 1 --steps 4", "filter_clipscore.py": "--threshold 0.1"}

    def run(command: list[str], check: bool) -> forks.Done:
        python, script, *words = command
        assert python == sys.executable
        script = str(Path(script).relative_to(ROOT))
        return forks.type_command(tmp_path, script, *words, *cheaper.get(script, "").split())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "subprocess", SimpleNamespace(run=run))
    assert train_lt.main(["--loss", "bs", "--curriculum", "d2s"]) == 0
    assert "no finished spectrum there; making it first" in capsys.readouterr().out
    assert {path.name for path in Path("runs").iterdir()} >= {
        "hard.csv", "prompts.json", "spectrum", "digits_bs_d2s_seed0"
    }  # fmt: skip
    assert list(Path("runs/digits_bs_d2s_seed0").glob("events.out.tfevents.*"))
    results = files.read_json(Path("runs/digits_bs_d2s_seed0/results.json"))
    # Ten classes: a net that learned nothing is right in 10 % of the cases.
    assert results["last"]["overall"] > 60
    assert datasets.load("digits", 30).counts.tolist() == results["train_counts"]


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([0] * 5 + [50] * 5, [0, 5]),  # stages
        ([0] * 12 + [50] * 12 + [100] * 176, [0, 12, 24]),
        (list(range(200)), list(range(0, 200, 10))),  # other levels each epoch: 20 of 200
        ([0] * 3 + [50] * 197, [0, 10]),  # ten epochs apart at least
        ([0] * 3 + [50] * 3 + [0] * 194, [0]),
    ],
)
def test_pictures_are_shown_where_levels_change_and_twenty_times_at_most(drawn, levels, expected):
    from training.log import shows_pictures

    stages = [[level] for level in levels]
    shown = [epoch for epoch in range(len(stages)) if shows_pictures(stages[:epoch], stages[epoch], len(stages))]
    assert shown == expected
