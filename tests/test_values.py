"""What trainers and evaluation compute, against values worked out independently: each noticed a fault put in on purpose
(tests/mutants.py)."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import train_iwildcam
import train_lt
from loaders import base, cifar
from runtime import checkpoints, files
from runtime.cli import UserError
from runtime.device import check_bfloat16
from training import augmentations, distributed, evaluation, flags, loop, optimization, stores
from training.networks import CifarResNet

# ---------------------------------------------------------------------------------------------------------------------
# images


def test_the_channels_statistics_are_the_published_ones():
    assert cifar.STATISTICS["cifar100_lt"] == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    assert cifar.STATISTICS["cifar10_lt"] == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert (base.IMAGENET_MEAN, base.IMAGENET_STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_images_are_reduced_with_antialiasing(tmp_path):
    """Stripes are grey once reduced to a quarter; without antialiasing only the two black pixels of four are read."""
    stripes = np.tile(np.array([255, 0, 0, 255], np.uint8), 32)
    Image.fromarray(np.repeat(np.tile(stripes, (128, 1))[..., None], 3, 2)).save(tmp_path / "a.png")
    pixels = stores.decode(tmp_path / "a.png", 28, None)
    assert pixels[:, 2:-2].min() > 110 and pixels[:, 2:-2].max() < 145


def test_colour_jitter_is_part_of_the_augmentation():
    images = torch.full((32, 3, 8, 8), 100, dtype=torch.uint8)
    both = [SimpleNamespace(augment="none", color_jitter=strength) for strength in (0, 0.4)]
    plain, jittered = (
        augmentations.augment(args, images, augmentations.draw(args, 8, 32, torch.Generator().manual_seed(0)))
        for args in both
    )
    assert torch.equal(plain, images)
    values = jittered.float().mean((1, 2, 3))
    assert 55 < values.min() < 80 and 120 < values.max() <= 140.1  # grey stays grey: brightness by 0.6 to 1.4


# ---------------------------------------------------------------------------------------------------------------------
# steps


def test_the_optimiser_takes_its_flags():
    args = SimpleNamespace(lr=0.1, momentum=0.8, weight_decay=0.25)
    for name in optimization.OPTIMIZERS:
        args.optimizer = name
        optimizer = optimization.build_optimizer(args, torch.nn.Linear(2, 2))
        (group,) = optimizer.param_groups
        assert group["lr"] == 0.1 and group["weight_decay"] == 0.25 and len(group["params"]) == 2
        assert group.get("momentum", 0.8) == 0.8


def test_a_step_is_the_clipped_gradient_times_the_rate():
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    trainer = SimpleNamespace(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 9.0), average=None,
        batch_loss=lambda batch: (model.weight * torch.tensor([[30.0, 40.0]])).sum(),
    )  # fmt: skip
    # A gradient of (30, 40), norm 50, shortened to 5 is (3, 4).
    for clip, expected in ((5.0, [-0.3, -0.4]), (None, [-3.0, -4.0])):
        trainer.args = SimpleNamespace(clip_grad=clip)
        torch.nn.init.zeros_(model.weight)
        optimization.set_rate(trainer.optimizer, 0.1)
        loop.Trainer.update(trainer, None)
        assert model.weight[0].tolist() == pytest.approx(expected, rel=1e-4)


def test_the_prior_and_the_time_of_re_weighting():
    data = SimpleNamespace(counts=np.array([8, 2]), class_names=["a", "b"])
    trainer = SimpleNamespace(
        data=data, device="cpu", args=SimpleNamespace(prior="real"), pool=SimpleNamespace(labels=np.array([0, 1, 1, 1]))
    )
    trainer.counts_of = lambda this: train_lt.Trainer.counts_of(trainer, this)
    this = loop.Pass(0, "epoch", np.arange(4), torch.tensor([0, 1, 1, 1]), torch.tensor([False] * 4))
    assert train_lt.Trainer.class_counts(trainer, this).tolist() == [8, 2]
    trainer.args.prior = "stage"
    assert train_lt.Trainer.class_counts(trainer, this).tolist() == [1, 3]

    def weighted(drw_epoch, epochs=10):
        trainer.args = SimpleNamespace(drw=True, drw_epoch=drw_epoch, epochs=epochs, class_weights="none")
        counts = torch.tensor([8, 2])
        passes = [dataclasses.replace(this, epoch=epoch) for epoch in range(epochs)]
        return [train_lt.Trainer.class_weights(trainer, one, counts) is not None for one in passes]

    assert weighted(3) == [False] * 3 + [True] * 7
    assert weighted(None) == [False] * 8 + [True] * 2  # four fifths
    trainer.args.drw = False
    assert train_lt.Trainer.class_weights(trainer, dataclasses.replace(this, epoch=9), torch.tensor([8, 2])) is None


def test_flyp_draws_each_of_the_captions():
    """Two templates: the captions of class c are 2c and 2c + 1."""
    asked = []

    def step_model(images, tokens):
        asked.extend(tokens[:, 0].tolist())
        return torch.ones(len(images), 2), torch.ones(len(tokens), 2), torch.tensor(1.0)

    trainer = SimpleNamespace(
        args=SimpleNamespace(templates=["{}", "a {}"], precision="fp32", merge_same_class=False),
        device="cpu", tokens=torch.arange(6)[:, None], step_model=step_model,
    )  # fmt: skip
    labels = torch.tensor([1] * 32)
    this = loop.Pass(0, "epoch", np.arange(32), labels, labels < 0)
    batch = loop.Batch(this, torch.arange(32), slice(None), None, labels, labels < 0, torch.Generator().manual_seed(0))
    train_iwildcam.Trainer.contrastive_loss(trainer, batch, torch.zeros(32, 1), slice(None))
    assert sorted(asked) == [2, 3]


def test_batch_norm_is_shared_between_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = CifarResNet(8, 3)
    assert not any(isinstance(m, torch.nn.SyncBatchNorm) for m in distributed.synchronised(model, "cpu").modules())
    shared = distributed.synchronised(model, "cuda:0")
    assert sum(isinstance(m, torch.nn.SyncBatchNorm) for m in shared.modules()) == 7
    assert not any(type(m) is torch.nn.BatchNorm2d for m in shared.modules())


def test_small_networks_start_by_their_inputs():
    """Kaiming's fan_in: a 3x3 convolution of 64 channels has a deviation of sqrt(2 / (9 * 64))."""
    torch.manual_seed(0)
    model = CifarResNet(32, 10)
    first = [block.conv1.weight for block in model.blocks if block.stride == 2]
    for weight in first:  # 16 -> 32 and 32 -> 64: fan_in and fan_out differ
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * weight.shape[1])), rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


def test_groups_at_their_bounds():
    counts = np.array([101, 100, 20, 19])
    labels = np.repeat(np.arange(4), counts)
    images = base.ImageSet(np.zeros((len(labels), 1, 1, 3), np.uint8), labels, [str(i) for i in range(len(labels))])
    data = base.DataSet("x", list("abcd"), images, images, images)
    assert {name: group.tolist() for name, group in data.groups.items()} == {"many": [0], "medium": [1, 2], "few": [3]}


def test_macro_accuracy_is_the_mean_of_the_classes():
    assert evaluation.macro_accuracy([100.0, 0.0, None, 50.0]) == 50.0
    # 90 of 90 of one class, 0 of 10 of another: 90 % overall, 50 % by class.
    found = evaluation.accuracies(np.zeros(100, int), np.array([0] * 90 + [1] * 10), 2, {})
    assert found["overall"] == 90 and evaluation.macro_accuracy(found["per_class"]) == 50


def test_the_averaged_weights_are_evaluated_and_epochs_chosen_on_the_validation_set(tmp_path):
    out = tmp_path / "r"
    assert train_lt.main(["--epochs", "2", "--curriculum", "none", "--ema", "0.5", "--out", str(out)]) == 0
    data = datasets.load("digits", 30)
    state = checkpoints.load_checkpoint(out / "checkpoint.pt", "cpu")

    def logits(weights: dict, images: np.ndarray):
        model = CifarResNet(8, 10).eval()
        model.load_state_dict(weights)
        with torch.inference_mode():
            return model(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)

    averaged = {name.removeprefix("module."): value for name, value in state["average"].items() if name != "n_averaged"}
    found = torch.from_numpy(np.load(out / "predictions.npz")["logits"])
    assert torch.allclose(logits(averaged, data.test.images), found, atol=1e-3)
    assert not torch.allclose(logits(state["model"], data.test.images), found, atol=1e-2)
    # The figures that epochs are chosen by: of the validation set, each class counting alike, and the best of them.
    assert train_lt.Trainer.chosen_by == "macro"
    predicted = logits(averaged, data.val.images).argmax(1).numpy()
    shares = [100 * (predicted[data.val.labels == label] == label).mean() for label in np.unique(data.val.labels)]
    history = files.read_json_lines(out / "history.jsonl")
    assert history[-1]["val_macro"] == pytest.approx(np.mean(shares))
    assert files.read_json(out / "results.json")["best_by_val"]["val_macro"] == max(row["val_macro"] for row in history)


# ---------------------------------------------------------------------------------------------------------------------
# flags that make no sense


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--ema", "1"], "--ema 1: an average that never moves"),
        (["--curriculum", "d2s", "--curriculum-epochs", "0"], "--curriculum-epochs 0: --curriculum d2s has no epoch"),
    ],
)
def test_flags_that_make_no_sense_are_refused(typed, message):
    with pytest.raises(UserError, match=message):
        train_lt.check_flags(train_lt.build_parser().parse_args(typed))
    assert flags.check_flags(train_lt.build_parser().parse_args(["--curriculum-epochs", "0"])) is None


def test_older_spellings_are_accepted_and_not_shown(capsys):
    parse = train_lt.build_parser().parse_args
    assert parse(["--undersample", "0.25", "--balanced"]) == parse(["--keep-others", "0.25", "--fill", "balanced"])
    assert (parse([]).fill, parse([]).keep_others) == ("uniform", 0.43)
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert "--keep-others" in shown and "--undersample" not in shown and "--balanced" not in shown


def test_bfloat16_is_refused_where_the_card_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for capability, refused in (((7, 5), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        check_bfloat16("fp32", "cuda:0")
        check_bfloat16("bf16", "cpu")
        with pytest.raises(UserError, match="Tesla T4 has no bfloat16") if refused else nullcontext():
            check_bfloat16("bf16", "cuda:0")


@pytest.mark.parametrize(
    ("error", "processes", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            1,
            "out of memory .*expected a smaller",
        ),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "out of memory"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), 2, "another process of this run"),
    ],
)
def test_errors_of_memory_and_of_other_processes_are_one_line(monkeypatch, error, processes, message):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(UserError, match=message) as found, distributed.plain_errors():
        raise error
    assert "\n" not in str(found.value)


def test_other_errors_are_left_as_they_are(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="a bug"), distributed.plain_errors():
        raise RuntimeError("a bug")
