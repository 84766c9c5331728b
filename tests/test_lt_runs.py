"""Training runs: signals, the adaptive curriculum, several processes, large images, and every loss."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import datasets
import train_lt
from runtime import checkpoints, files, runs, signals
from runtime.cli import UserError
from training import augmentations, distributed, evaluation, losses, stores

SHORT = ["--epochs", "4", "--curriculum-epochs", "3", "--model", "resnet8", "--levels", "0", "50", "90"]
ONE_EPOCH = ["--epochs", "1", "--curriculum-epochs", "0"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("blank_figures")]  # whole runs


def train(road, out, *extra) -> int:
    return train_lt.main(["--spectrum", str(road.spectrum), "--out", str(out), *SHORT, *extra])


def logits_of(folder):
    return np.load(folder / "predictions.npz")["logits"]


def count_steps(monkeypatch, at: int, act) -> list[int]:
    """Call `act` before the `at`-th batch of the process is augmented."""
    from training import augmentations

    steps, augment = [], augmentations.augment

    def counting(*args):
        steps.append(1)
        if len(steps) == at:
            act()
        return augment(*args)

    monkeypatch.setattr(augmentations, "augment", counting)
    return steps


@pytest.mark.parametrize(
    ("number", "extra"),
    [
        pytest.param(
            signal.SIGTERM,
            ["--curriculum", "d2s", "--optimizer", "sgd", "--epochs", "3", "--curriculum-epochs", "2"],
            marks=pytest.mark.slow,
        ),
        (signal.SIGUSR2, ["--curriculum", "adaptive", "--ema", "0.9"]),
        (signal.SIGTERM, ["--model", "timm:test_vit", "--randaugment", "--mix", "mixup"]),
    ],
)
def test_a_signal_in_an_epoch_leaves_a_checkpoint_that_goes_on_to_the_same_end(
    road, tmp_path, monkeypatch, capsys, number, extra
):
    extra = ["--epochs", "2", "--curriculum-epochs", "1", "--levels", "0", "90", *extra]
    train(road, tmp_path / "whole", *extra)
    count_steps(monkeypatch, 20, lambda: os.kill(os.getpid(), number))
    assert train(road, tmp_path / "r", *extra) == runs.RESUMABLE
    assert f"{number.name} came; checkpoint written in epoch" in capsys.readouterr().out
    assert not (tmp_path / "r/results.json").exists()
    partial = checkpoints.load_checkpoint(tmp_path / "r/checkpoint.pt", "cpu")["partial"]
    assert partial["pass"]["batches"] > 0
    assert train(road, tmp_path / "r", *extra) == 0
    assert np.array_equal(logits_of(tmp_path / "whole"), logits_of(tmp_path / "r"))
    histories = [files.read_json_lines(tmp_path / run / "history.jsonl") for run in ("whole", "r")]
    for whole, resumed in zip(*histories, strict=True):
        assert {**whole, "images_per_second": 0} == {**resumed, "images_per_second": 0}


def test_a_signal_while_a_checkpoint_is_written_is_answered_after_it(road, tmp_path, monkeypatch):
    save, written = torch.save, []

    def save_under_fire(state, file):
        os.kill(os.getpid(), signal.SIGTERM)
        save(state, file)
        written.append(state["epoch"])

    monkeypatch.setattr(torch, "save", save_under_fire)
    assert train(road, tmp_path / "r") == runs.RESUMABLE
    assert written == [1]
    assert checkpoints.load_checkpoint(tmp_path / "r/checkpoint.pt", "cpu")["epoch"] == 1


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(road, tmp_path, monkeypatch):
    train(road, tmp_path / "whole")
    save, calls = torch.save, []

    def die_in_the_third(state, file):
        calls.append(1)
        if len(calls) == 3:
            file.write(b"half a checkp")
            raise KeyboardInterrupt
        save(state, file)

    monkeypatch.setattr(torch, "save", die_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        train(road, tmp_path / "r")
    monkeypatch.setattr(torch, "save", save)
    assert checkpoints.load_checkpoint(tmp_path / "r/checkpoint.pt", "cpu")["epoch"] == 2
    train(road, tmp_path / "r")
    assert np.array_equal(logits_of(tmp_path / "whole"), logits_of(tmp_path / "r"))


def test_loading_processes_leave_ctrl_c_to_the_main_process():
    """A terminal sends it to all of them; one that ended first brought a traceback in place of 'interrupted'."""
    held = False
    with pytest.raises(KeyboardInterrupt), signals.hold_signals():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        held = True
    assert held
    worker = multiprocessing.get_context("fork").Process(target=get_ctrl_c)
    worker.start()
    worker.join()
    assert worker.exitcode == 0


def get_ctrl_c() -> None:
    signals.begin_worker()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)


def test_a_spectrum_that_no_curriculum_uses_is_said(road, tmp_path, capsys):
    train(road, tmp_path / "r", *ONE_EPOCH, "--curriculum", "none", "--spectrum", str(road.spectrum))
    assert "not used, as --curriculum none trains on real images alone" in capsys.readouterr().out


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with signals.StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


# ---------------------------------------------------------------------------------------------------------------------
# adaptive


def test_adaptive_trains_on_the_level_of_most_progress_and_never_on_what_it_looks_at(road, tmp_path, monkeypatch):
    passes, pools, train_pass = [], [], train_lt.Trainer.train

    def record(self, epoch, places, purpose="epoch", start=None):
        passes.append((epoch, purpose, places))
        pools.append(self.pool)
        return train_pass(self, epoch, places, purpose, start)

    monkeypatch.setattr(train_lt.Trainer, "train", record)
    flags = ["--levels", "0", "50", "90", "100", "--progress-images", "5", "--real-pass-images", "32"]
    train(road, tmp_path / "r", "--curriculum", "adaptive", *flags)
    history = files.read_json_lines(tmp_path / "r/history.jsonl")
    for entry in history[:3]:
        best = max(entry["progress"], key=lambda level: entry["progress"][level])
        assert entry["levels"] == [int(best)]
    assert history[3]["levels"] == [100] and "progress" not in history[3]
    assert [(epoch, purpose) for epoch, purpose, _ in passes] == [
        (0, "real pass"), (0, "epoch"), (1, "real pass"), (1, "epoch"), (2, "real pass"), (2, "epoch"), (3, "epoch")
    ]  # fmt: skip
    pool = pools[0]
    looked_at = np.concatenate(list(pool.looks.values()))
    assert sorted(pool.looks) == [0, 50, 90, 100] and all(len(places) == 5 for places in pool.looks.values())
    for level, places in pool.looks.items():  # one image of each held-out source, of the level itself
        assert (pool.levels[places] == level).all() and len({pool.sources[place] for place in places}) == 5
    for epoch, purpose, places in passes:
        if epoch < 3:
            assert not set(places.tolist()) & set(looked_at.tolist())
            assert not pool.held[places].any()
        if purpose == "real pass":
            assert (pool.levels[places] == 100).all() and len(places) == len(set(places.tolist())) == 32
    assert len(passes[-1][2]) == 184  # the real-only epoch has all real images
    results = files.read_json(tmp_path / "r/results.json")
    assert [entry.get("real_pass_images") for entry in history] == [32, 32, 32, None]
    assert results["real_pass_images"] == 96 and results["images"] == sum(len(places) for _, _, places in passes)
    assert results["images_per_second"] == pytest.approx(results["images"] / results["seconds"])


def test_progress_is_what_the_real_pass_alone_changed(road, tmp_path, monkeypatch, capsys):
    """Algorithm 2 of DisCL: a stub that learns 0.1 by a real pass and 1 by an epoch has a progress of 0.1 each time."""
    learnt, train_pass = [0.0], train_lt.Trainer.train

    def learn(self, epoch, places, purpose="epoch", start=None):
        learnt[0] += 0.1 if purpose == "real pass" else 1
        return train_pass(self, epoch, places, purpose, start)

    monkeypatch.setattr(train_lt.Trainer, "train", learn)
    monkeypatch.setattr(train_lt.Trainer, "look", lambda self: {level: [learnt[0]] * 5 for level in self.pool.looks})
    train(road, tmp_path / "r", "--curriculum", "adaptive", "--progress-images", "5", "--levels", "0", "90")
    history = files.read_json_lines(tmp_path / "r/history.jsonl")
    for entry in history[:3]:
        assert entry["progress"] == {"0": pytest.approx(0.1), "90": pytest.approx(0.1)} and entry["levels"] == [0]
    # 184 real images, of which 55 are hard.
    said = "5 of 55 hard images held out (--progress-images), and before each epoch a pass over 64 of 179 real images"
    assert said in capsys.readouterr().out


def test_the_real_pass_holds_the_rate_of_the_epoch(road, tmp_path, monkeypatch):
    from training import augmentations

    rates, trainers, train_pass, augment = {}, [], train_lt.Trainer.train, augmentations.augment

    def enter(self, epoch, places, purpose="epoch", start=None):
        trainers.append((self, epoch, purpose))
        return train_pass(self, epoch, places, purpose, start)

    def note_rate(*args):
        trainer, epoch, purpose = trainers[-1]
        rates.setdefault((epoch, purpose), []).append(trainer.optimizer.param_groups[0]["lr"])
        return augment(*args)

    monkeypatch.setattr(train_lt.Trainer, "train", enter)
    monkeypatch.setattr(augmentations, "augment", note_rate)
    train(road, tmp_path / "r", "--curriculum", "adaptive", "--progress-images", "5", "--lr", "0.01")
    # A cosine over four epochs, in the middle of the first two: (1 + cos(pi / 8)) / 2 and (1 + cos(3 pi / 8)) / 2.
    assert rates[0, "real pass"] == [pytest.approx(0.0096194, abs=1e-7)] * 4
    assert rates[1, "real pass"] == [pytest.approx(0.0069134, abs=1e-7)] * 4
    assert rates[0, "epoch"][0] == 0.01 and rates[0, "epoch"][-1] < 0.01


def test_looking_changes_no_weight_and_no_statistics(road, tmp_path, monkeypatch):
    look, states = train_lt.Trainer.look, []

    def compare(self):
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        found = look(self)
        states.append(all(torch.equal(before[name], value) for name, value in self.model.state_dict().items()))
        assert all(0 <= p <= 1 for values in found.values() for p in values)
        return found

    monkeypatch.setattr(train_lt.Trainer, "look", compare)
    train(road, tmp_path / "r", "--curriculum", "adaptive", "--epochs", "3", "--curriculum-epochs", "2")
    assert states == [True] * 4  # before and after the real pass of each of two epochs


# ---------------------------------------------------------------------------------------------------------------------
# losses and flags


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_every_loss_trains(road, tmp_path, loss):
    extra = ["--drw", "--drw-epoch", "2"] if loss in ("ce", "ldam") else []
    assert train(road, tmp_path / "r", "--curriculum", "all", "--loss", loss, "--real-weight", "0.8", *extra) == 0
    history = files.read_json_lines(tmp_path / "r/history.jsonl")
    assert history[-1]["loss"] < history[0]["loss"] or extra


def test_balanced_epochs_fill_every_hard_class_up(road, tmp_path, monkeypatch):
    seen, chosen = [], train_lt.Trainer.epoch_places

    def record(self, epoch, stage):
        places = chosen(self, epoch, stage)
        seen.append(np.bincount(self.pool.labels[places], minlength=10))
        return places

    monkeypatch.setattr(train_lt.Trainer, "epoch_places", record)
    train(
        road,
        tmp_path / "r",
        "--curriculum",
        "cyclic",
        "--fill",
        "balanced",
        "--keep-others",
        "0.3",
        "--hard-share",
        "0.8",
    )
    for sizes in seen[:3]:  # 39 others stay, 39 * 0.8 / 0.2 = 156 hard ones, 22 or 23 of each of seven classes
        assert sizes[:3].sum() == 39 and set(sizes[3:].tolist()) <= {22, 23} and sizes[3:].sum() == 156


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--batch-size", "185"], "--batch-size 185: expected at most the 184 training images"),
        (["--mix", "cutmix", "--loss", "focal"], "--mix cutmix"),
        (["--mix", "mixup", "--real-weight", "0.5"], "--mix mixup"),
        (["--mix", "mixup", "--drw"], "--mix mixup"),
        (["--drw", "--loss", "bs"], "--drw: --loss bs"),
        (["--warmup-epochs", "4"], "--warmup-epochs 4"),
        (["--level-shares", "1", "2"], "--level-shares: --curriculum none"),
        (["--curriculum", "d2s", "--level-shares", "1", "2"], "--level-shares: 2 given"),
        (["--dataset", "cifar10_lt"], "--dataset cifar10_lt: expected --data-root"),
        (["--pretrained"], "--pretrained with --model resnet8"),
    ],
)
def test_bad_flags_are_named(road, tmp_path, extra, message):
    with pytest.raises(UserError, match=message):
        train(road, tmp_path / "r", *extra)
    assert not (tmp_path / "r/results.json").exists()


def test_a_checkpoint_of_another_architecture_is_named_and_one_of_the_same_is_taken(road, tmp_path):
    train(road, tmp_path / "a", *ONE_EPOCH)
    checkpoint = str(tmp_path / "a/checkpoint.pt")
    with pytest.raises(UserError, match="--init-checkpoint .*: weights of another model"):
        train(road, tmp_path / "b", *ONE_EPOCH, "--model", "resnet14", "--init-checkpoint", checkpoint)
    train(road, tmp_path / "c", *ONE_EPOCH, "--init-checkpoint", checkpoint, "--lr", "0")
    # A learning rate of 0 leaves the weights, though not BatchNorm's statistics, as they were.
    states = [checkpoints.load_checkpoint(tmp_path / run / "checkpoint.pt", "cpu")["model"] for run in "ac"]
    assert torch.equal(states[0]["head.weight"], states[1]["head.weight"])


@pytest.mark.parametrize("signalled", [False, True])
def test_a_loss_that_is_not_finite_in_a_later_epoch_keeps_the_checkpoint_before(road, tmp_path, monkeypatch, signalled):
    """Also where a signal comes after it, which would write a checkpoint that no run can resume."""
    per_image, steps = losses.per_image, []

    def spoil(*args):
        steps.append(1)
        if signalled and len(steps) == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return per_image(*args) * (float("nan") if len(steps) > 15 else 1)

    monkeypatch.setattr(losses, "per_image", spoil)
    with pytest.raises(UserError, match="epoch 1: the loss is not finite"):
        train(road, tmp_path / "r")
    state = checkpoints.load_checkpoint(tmp_path / "r/checkpoint.pt", "cpu")
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["model"].values())


def test_the_moving_average_is_that_of_the_weights(road, tmp_path):
    train(road, tmp_path / "r", "--ema", "0")  # keeps nothing: the average is the weights
    state = checkpoints.load_checkpoint(tmp_path / "r/checkpoint.pt", "cpu")
    for name, value in state["model"].items():
        assert torch.equal(value, state["average"][f"module.{name}"])


def test_a_folder_that_another_process_trains_in_is_left_alone(road, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "CLAIM_SECONDS", 1)
    with runs.claim(tmp_path / "r"):
        with pytest.raises(UserError, match="another process is at work there"):
            train(road, tmp_path / "r", *ONE_EPOCH)
    assert train(road, tmp_path / "r", *ONE_EPOCH) == 0


def test_tensorboard_holds_pictures_and_hparams_once(road, tmp_path, drawn):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(road, tmp_path / "r", "--curriculum", "d2s")
    events = EventAccumulator(str(tmp_path / "r"))
    events.Reload()
    assert [event.step for event in events.Images("train/images")] == [0, 1, 2, 3]  # a stage an epoch here
    assert len(events.Images("test/confusion")) == 1 and (tmp_path / "r/confusion.png").is_file()
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert plugin.plugin_name == "hparams"
    assert len(list((tmp_path / "r").glob("events.out.tfevents.*"))) == 1
    assert not [path for path in (tmp_path / "r").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGTERM, runs.RESUMABLE, "SIGTERM came; checkpoint written"),
        (signal.SIGINT, 130, "train_lt.py: interrupted; run the same command again to resume"),
    ],
)
def test_a_signal_to_the_whole_process_group_stops_a_run_and_not_its_loading_processes(
    photographs, tmp_path, number, code, says
):
    """Slurm, timeout and systemd send SIGTERM to all of a job's processes, a terminal SIGINT (Ctrl-C)."""
    command = [sys.executable, str(ROOT / "train_lt.py"), "--dataset", "imagefolder", "--data-root", str(photographs)]
    command += ["--model", "resnet8", "--image-size", "32", "--batch-size", "2", "--epochs", "200", "--device", "cpu"]
    command += ["--workers", "2", "--out", str(tmp_path / "r")]
    running = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 120
    while not (tmp_path / "r/checkpoint.pt").exists():
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(running.pid, number)
    said = running.communicate(timeout=60)[0].decode()
    assert running.returncode == code and says in said and "Traceback" not in said, said


def test_a_curriculum_longer_than_the_training_is_refused(road, tmp_path):
    with pytest.raises(UserError, match="--curriculum-epochs 48: expected at most --epochs 30"):
        train_lt.main(["--spectrum", str(road.spectrum), "--curriculum", "d2s", "--epochs", "30"])
    args = train_lt.build_parser().parse_args(["--epochs", "30", "--curriculum", "none"])
    train_lt.check_flags(args)


def test_a_spectrum_in_which_every_class_is_hard_is_refused(road, tmp_path):
    shutil.copytree(road.spectrum, tmp_path / "s")
    plan = files.read_json(tmp_path / "s/plan.json")
    files.write_json(tmp_path / "s/plan.json", plan | {"hard_classes": list(range(10))})
    with pytest.raises(UserError, match="every class has hard images"):
        train_lt.main(["--spectrum", str(tmp_path / "s"), "--curriculum", "d2s", "--out", str(tmp_path / "r")])


# ---------------------------------------------------------------------------------------------------------------------
# several processes


def train_in_two(tmp_path, flags, stop_at: int = 0) -> list[forks.Done]:
    """The trainer in two processes; the second sends itself a SIGTERM before the batch `stop_at`."""

    def act() -> int:
        if os.environ["RANK"] == "1" and stop_at:
            count_steps(pytest.MonkeyPatch(), stop_at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        try:
            return train_lt.main(flags)
        finally:
            assert not forks.gloo_threads()

    return forks.train_together(act, tmp_path)


def torchrun(tmp_path, flags) -> list[forks.Done]:
    """The documented command, as typed."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "train_lt.py"]
        + flags, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return [forks.Done(done.returncode, done.stdout, done.stderr)]


def test_the_other_process_leaves_with_the_first(tmp_path):
    flags = ["--model", "timm:test_vit", "--device", "cpu", "--epochs", "1", "--curriculum", "none", "--seed"]
    out = ["--out", str(tmp_path / "r")]
    assert train_lt.main([*flags, "1", *out]) == 0
    first, other = train_in_two(tmp_path, [*flags, "2", *out])
    assert first.returncode and other.returncode
    assert "args.seed is 1 there, 2 here" in first.stderr, first.stderr
    assert "the first process has stopped" in other.stderr, other.stderr


def test_more_processes_than_images_evaluate_them(tmp_path):
    """As adaptive's few held-out images on eight GPUs: the processes without one have nothing to do."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    data = SimpleNamespace(class_names=["a", "b", "c"], mean=(0.5,) * 3, std=(0.5,) * 3)
    weight = torch.linspace(-1, 1, 3 * 48).reshape(3, 48)

    def act() -> None:
        distributed.start("cpu")
        store = stores.InMemory(pixels, "cpu", "contiguous")
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3, bias=False))
        model.load_state_dict({"1.weight": weight})
        print(evaluation.predict(model, store, np.arange(2), data, "cpu").tolist())
        distributed.stop()

    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).flatten(1).float().div(127.5).sub(1) @ weight.T
    for done in forks.train_together(act, tmp_path, 3):
        assert done.returncode == 0, done.stderr[-3000:]
        assert np.allclose(json.loads(done.stdout), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("launch", "extra"),
    [(torchrun, ["--batch-size", "16"]), (train_in_two, ["--batch-size", "15", "--real-weight", "0.8"])],
)
def test_two_processes_have_the_loss_curve_of_one(road, tmp_path, launch, extra):
    """A vision transformer, which has no BatchNorm: its statistics would be each process's own on the CPU."""
    flags = ["--spectrum", str(road.spectrum), "--curriculum", "adaptive", "--epochs", "3", "--curriculum-epochs", "2"]
    flags += ["--model", "timm:test_vit", "--device", "cpu", "--loss", "bs", "--optimizer", "sgd", "--lr", "0.01"]
    flags += extra
    assert train_lt.main([*flags, "--out", str(tmp_path / "one")]) == 0
    for done in launch(tmp_path, [*flags, "--out", str(tmp_path / "two")]):
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (files.read_json_lines(tmp_path / name / "history.jsonl") for name in ("one", "two"))
    assert [entry["levels"] for entry in one] == [entry["levels"] for entry in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["images"] == b["images"] and a["val_overall"] == b["val_overall"]
    assert np.allclose(logits_of(tmp_path / "one"), logits_of(tmp_path / "two"), atol=1e-4)


def test_a_signal_to_one_of_two_processes_stops_both_and_they_go_on_together(road, tmp_path):
    flags = ["--spectrum", str(road.spectrum), "--curriculum", "d2s", "--epochs", "4", "--curriculum-epochs", "3"]
    flags += ["--model", "timm:test_vit", "--device", "cpu", "--optimizer", "sgd", "--lr", "0.01", "--batch-size", "8"]
    flags += ["--levels", "0", "50", "90"]
    assert train_lt.main([*flags, "--out", str(tmp_path / "one")]) == 0
    flags += ["--out", str(tmp_path / "two")]
    done = train_in_two(tmp_path, flags, stop_at=28)
    assert [one.returncode for one in done] == [runs.RESUMABLE] * 2, done
    assert "checkpoint written in epoch 1, after batch" in done[0].stdout, done[0].stderr[-3000:]
    assert [one.returncode for one in train_in_two(tmp_path, flags)] == [0, 0]
    one, two = (files.read_json_lines(tmp_path / name / "history.jsonl") for name in ("one", "two"))
    assert [a["loss"] for a in one] == pytest.approx([b["loss"] for b in two], abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# large images


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three classes of JPEGs that differ in colour; sides 60 to 100 pixels."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for part, counts in (("train", (24, 8, 5)), ("test", (4, 4, 4))):
        for label, count in enumerate(counts):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (*rng.integers(60, 100, 2), 3))
                pixels[..., label] += 130
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
    return root


# Runs a trainer in which the second batch's augmentation fails.
FAILING = """
import sys
sys.path.insert(0, {root!r})
import train_lt
from runtime import cli
from training import augmentations
augment, steps = augmentations.augment, []
def fail_in_the_second(*args):
    steps.append(1)
    if len(steps) == 2:
        raise RuntimeError("a bug")
    return augment(*args)
augmentations.augment = fail_in_the_second
cli.run(lambda: train_lt.main(sys.argv[1:]))
"""
LOADED = ["--dataset", "imagefolder", "--model", "resnet8", "--image-size", "32", "--epochs", "3", "--batch-size", "2"]
LOADED += ["--workers", "2", "--device", "cpu"]


def test_a_failing_run_with_loading_processes_ends(photographs, tmp_path):
    """Its workers leave signals to the main process, which waited for them at its end for ever."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT)))
    done = subprocess.run(
        [sys.executable, script, *LOADED, "--data-root", str(photographs), "--out", str(tmp_path / "r")],
        capture_output=True, text=True, check=False, timeout=90, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 1 and "RuntimeError: a bug" in done.stderr.strip().splitlines()[-1], done.stderr[-2000:]


def test_an_image_that_fails_in_a_loading_process_is_named(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / "p")
    image = tmp_path / "p/train/class0/3.jpg"
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])  # its header is whole
    with pytest.raises(UserError, match="train/class0/3.jpg: not a readable image"):
        train_lt.main([*LOADED, "--data-root", str(tmp_path / "p"), "--out", str(tmp_path / "r")])


def test_images_that_cannot_be_used_are_named_together_before_any_training(photographs, tmp_path):
    shutil.copytree(photographs, tmp_path / "p")
    (tmp_path / "p/test/class1/0.jpg").write_bytes(b"no image")
    (tmp_path / "p/train/class0/3.jpg").write_bytes(b"")
    flags = ["--dataset", "imagefolder", "--data-root", str(tmp_path / "p"), "--batch-size", "2"]
    with pytest.raises(
        UserError, match=r"^2 images cannot be used: .*3.jpg \(empty\); test: .*0.jpg \(not a readable image"
    ):
        train_lt.main([*flags, "--out", str(tmp_path / "r")])
    assert not (tmp_path / "r/checkpoint.pt").exists()


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    from runtime import checkpoints

    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(path, {"epoch": 1})

    def fill(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(UserError, match="checkpoint.pt: cannot be written .*No space left"):
        checkpoints.save_checkpoint(path, {"epoch": 2})
    assert checkpoints.load_checkpoint(path, "cpu") == {"epoch": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_signal_in_the_real_pass_or_in_validation_loses_nothing(road, tmp_path, monkeypatch):
    extra = ["--curriculum", "adaptive", "--progress-images", "5", "--epochs", "2", "--curriculum-epochs", "1"]
    train(road, tmp_path / "whole", *extra)
    predict, calls = train_lt.Trainer.predict, []
    # 3 evaluations of held-out images before the real pass and 3 after it, then the validation.
    for name, at in (("a", 6), ("b", 7)):
        calls.clear()
        monkeypatch.setattr(
            train_lt.Trainer, "predict",
            lambda self, store, places, at=at, **kept: stop_at(self, store, places, at, calls, predict, **kept),
        )  # fmt: skip
        assert train(road, tmp_path / name, *extra) == runs.RESUMABLE
        state = checkpoints.load_checkpoint(tmp_path / name / "checkpoint.pt", "cpu")
        assert set(state["partial"]) == {"begun", "before", "passed"} | ({"progress", "record"} if at == 7 else set())
        monkeypatch.setattr(train_lt.Trainer, "predict", predict)
        assert train(road, tmp_path / name, *extra) == 0
        assert np.array_equal(logits_of(tmp_path / "whole"), logits_of(tmp_path / name))


def stop_at(trainer, store, places, at, calls, predict, **kept):
    """Stop before the `at`-th evaluation of the process."""
    calls.append(1)
    if len(calls) == at:
        trainer.signals.received = "SIGTERM"
        trainer.stop_on_signal()
    return predict(trainer, store, places, **kept)


def test_large_images_train_the_same_with_any_number_of_workers_and_after_a_signal(photographs, tmp_path, monkeypatch):
    flags = ["--dataset", "imagefolder", "--data-root", str(photographs), "--model", "resnet8", "--image-size", "32"]
    flags += ["--epochs", "2", "--batch-size", "8", "--lr", "0.01"]
    assert train_lt.main([*flags, "--workers", "0", "--out", str(tmp_path / "a")]) == 0
    count_steps(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train_lt.main([*flags, "--workers", "0", "--out", str(tmp_path / "b")]) == runs.RESUMABLE
    assert train_lt.main([*flags, "--workers", "2", "--out", str(tmp_path / "b")]) == 0
    assert np.array_equal(logits_of(tmp_path / "a"), logits_of(tmp_path / "b"))
    results = files.read_json(tmp_path / "a/results.json")
    assert "held out of the training set" in results["validation"]
    assert results["train_counts"] == [23, 7, 4]


def test_a_large_image_that_does_not_decode_is_one_line(photographs, tmp_path):
    import shutil

    shutil.copytree(photographs, tmp_path / "p")
    flags = ["--dataset", "imagefolder", "--data-root", str(tmp_path / "p"), "--model", "resnet8", "--batch-size", "8"]
    flags += ["--image-size", "32", "--epochs", "1", "--lr", "0.01"]
    assert train_lt.main([*flags, "--workers", "0", "--out", str(tmp_path / "complete")]) == 0
    (tmp_path / "p/train/class1/3.jpg").write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"^1 image cannot be used: train: \S*train/class1/3.jpg \(not a readable image \(.*\)"
    ):
        train_lt.main([*flags, "--workers", "2", "--out", str(tmp_path / "r")])
    # Images are looked at after what is cheaper to check, and not for a complete run.
    words = ["--curriculum", "d2s", "--curriculum-epochs", "1", "--spectrum", str(tmp_path / "none")]
    with pytest.raises(UserError, match="none: no plan.json there"):
        train_lt.main([*flags, *words, "--out", str(tmp_path / "r")])
    flags += ["--workers", "0", "--out", str(tmp_path / "complete")]
    assert train_lt.main(flags) == 0
    with pytest.raises(UserError, match="^1 image cannot be used"):
        train_lt.main([*flags, "--overwrite"])


@pytest.mark.parametrize("augment", augmentations.AUGMENTATIONS)
def test_large_images_are_cropped_at_random_where_the_flag_says_so(photographs, augment):
    train = datasets.load("imagefolder", None, photographs).train
    store = stores.build([train], "cpu", 32, 0, "contiguous", crop=stores.crop_of(augment))
    places = torch.arange(5)
    (trained,), (shown,) = store.training([places], [places], 0), store.evaluation(places.numpy(), 5)
    assert torch.equal(trained, shown) == (augment not in ("resized_crop", "cuda"))


def test_decoding_is_the_centre_crop_of_torchvision(tmp_path):
    from torchvision.transforms import v2

    # Smooth, so that a crop that begins a part of a pixel further on changes it little.
    y, x = np.mgrid[:90, :120]
    Image.fromarray(np.stack([y * 2, x, 100 + y - x / 2], -1).astype(np.uint8)).save(tmp_path / "a.png")
    theirs = v2.Compose([v2.Resize(64), v2.CenterCrop(56)])(Image.open(tmp_path / "a.png"))
    ours = stores.decode(tmp_path / "a.png", 56, None)
    assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= 2


def test_decoding_a_jpeg_at_a_part_of_its_size_changes_little(tmp_path):
    y, x = np.mgrid[:400, :600]
    image = Image.fromarray(np.stack([y / 2, x / 3, (y + x) / 5], -1).astype(np.uint8))
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    for seed in range(5):
        fast, slow = (
            stores.decode(tmp_path / name, 32, np.random.default_rng(seed)).astype(int) for name in ("a.jpg", "a.png")
        )
        assert np.abs(fast - slow).max() <= 6


def test_random_boxes_are_those_of_inception():
    rng = np.random.default_rng(0)
    boxes = np.array([stores.random_box(500, 375, rng) for _ in range(600)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 500 and boxes[:, 3].max() <= 375
    share, ratio = width * height / (500 * 375), width / height
    assert 0.075 < share.min() < 0.11 and share.max() > 0.9 and 0.74 < ratio.min() and ratio.max() < 1.35
    # An image far too long for any of the boxes: its middle, as wide as 4/3 of its height.
    assert stores.random_box(4000, 3, rng) == (1998.0, 0.0, 2002.0, 3.0)


def test_a_cifar_run_writes_its_subset_beside_its_results(tmp_path):
    from test_datasets import small_cifar

    root = small_cifar(tmp_path / "cifar", per_class=6)
    flags = ["--dataset", "cifar10_lt", "--data-root", str(root), "--imb-ratio", "5", "--epochs", "2"]
    flags += ["--batch-size", "8", "--model", "resnet8", "--warmup-epochs", "1"]
    train_lt.main([*flags, "--out", str(tmp_path / "r")])
    rows = (tmp_path / "r/subset.csv").read_text().splitlines()
    data = datasets.load("cifar10_lt", 5, root)
    assert rows[0] == "split,source,label"
    assert [row.split(",")[1] for row in rows if row.startswith("train,")] == data.train.sources
    assert files.read_json(tmp_path / "r/args.json")["args"]["optimizer"] == "sgd"
    with pytest.raises(UserError, match="data is"):  # the same flags on other images
        (next(root.glob("test/*/*.png"))).unlink()
        train_lt.main([*flags, "--out", str(tmp_path / "r")])


def test_a_spectrum_of_another_data_set_is_refused(road, tmp_path):
    from test_datasets import small_cifar

    root = small_cifar(tmp_path / "cifar", per_class=6)
    with pytest.raises(UserError, match="made for --dataset digits; expected a spectrum of cifar10_lt"):
        train(road, tmp_path / "r", "--dataset", "cifar10_lt", "--data-root", str(root), "--imb-ratio", "5",
              "--curriculum", "d2s", "--batch-size", "8")  # fmt: skip


def test_channels_last_and_bf16_are_flags_of_the_same_run(road, tmp_path):
    train(road, tmp_path / "a", "--epochs", "2", "--curriculum-epochs", "0")
    train(road, tmp_path / "b", "--epochs", "2", "--curriculum-epochs", "0", "--memory-format", "channels_last")
    assert np.allclose(logits_of(tmp_path / "a"), logits_of(tmp_path / "b"), atol=0.05)
    train(road, tmp_path / "c", "--epochs", "2", "--curriculum-epochs", "0", "--precision", "bf16", "--clip-grad", "1")
    assert np.isfinite(logits_of(tmp_path / "c")).all()


def test_the_flag_knows_every_augmentation():
    from training import augmentations

    choices = next(action.choices for action in train_lt.build_parser()._actions if action.dest == "augment")
    assert tuple(choices) == augmentations.AUGMENTATIONS
