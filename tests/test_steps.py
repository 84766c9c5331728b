"""A training step on images in memory never makes the host wait for the device, and is what it was.

The device here is torch's `meta`, whose tensors have no values: reading one fails, and so does an operation whose
result's shape hangs on values; what is copied from the CPU is counted.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_lt
from loaders.base import DataSet, ImageSet
from runtime.cli import UserError
from runtime.signals import StopSignals
from training import graphs, loop, optimization

CLASSES, SIDE, BATCH = 5, 16, 8


class Copies(TorchDispatchMode):
    """Counts the tensors that are copied between the CPU and the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, result)) if isinstance(value, torch.Tensor)]
        # A scalar of the CPU goes along with its kernel.
        if len({value.device.type for value in tensors if value.ndim or value.device.type != "cpu"}) > 1:
            self.found.append(str(function))
        return result


class Constants(TorchFunctionMode):
    """Counts the tensors that are made of Python's numbers, which a GPU waits for as for any copy."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.tensor, torch.as_tensor):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def make_trainer(tmp_path, *flags, images: int = 4 * BATCH, device: str = "cpu"):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (images, SIDE, SIDE, 3), dtype=np.uint8), np.arange(images) % CLASSES
    part = ImageSet(pixels, labels, [f"index:{i}" for i in range(images)])
    data = DataSet("steps", [str(label) for label in range(CLASSES)], part, part, part, (0.5,) * 3, (0.2,) * 3)
    common = ["--dataset", "digits", "--model", "resnet8", "--epochs", "2", "--warmup-epochs", "0"]
    common += ["--batch-size", str(BATCH), "--curriculum", "none", "--device", device, "--out", str(tmp_path / "none")]
    args = train_lt.build_parser().parse_args([*common, *flags])
    train_lt.check_flags(args)
    return train_lt.prepare(args, data, {}, [], [], StopSignals())[0]


VARIANTS = [
    "--loss bs --augment shift",
    "--loss ldam --drw --drw-epoch 0 --augment crop_flip --ema 0.9",
    "--loss la --prior stage --color-jitter 0.4 --augment none --clip-grad 1",
    "--loss focal --augment resized_crop --memory-format channels_last",
    "--class-weights inverse --real-weight 0.3",
]


@pytest.mark.parametrize("flags", VARIANTS)
def test_no_step_waits_for_the_device(flags, tmp_path, monkeypatch):
    # On `meta` there is no autocast and no fused optimiser; the sum of the losses is read later, as on a GPU.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(optimization, "build_optimizer", lambda args, model: torch.optim.SGD(model.parameters(), 0.1))
    monkeypatch.setattr(loop, "read_later", lambda value: lambda: 0.0)
    trainer = make_trainer(tmp_path, *flags.split(), device="meta")
    found, steps, update = [], [], trainer.update
    monkeypatch.setattr(trainer, "update", lambda batch: (steps.append(len(batch)), update(batch))[1])
    for batches in (2, 2, 4):
        steps.clear()
        with Copies() as copied, Constants() as made, pytest.raises(RuntimeError, match="item"):  # at the pass's end
            trainer.train(0, np.arange(batches * BATCH))
        assert steps == [BATCH] * batches
        found.append([*copied.found, *made.found])
    # The first pass makes the constants, and each copies what it needs.
    assert 0 < len(found[1]) <= len(found[0])
    assert len(found[1]) == len(found[2])


class FakeGraph:
    """A recording on the CPU: what was recorded is called again, on the tensors that it was recorded with."""

    def __init__(self):
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.owner.loss.copy_(self.owner.trainer.plain_update(self.owner.batch))


def fake_cuda(monkeypatch, trainer, fails: bool = False) -> list[FakeGraph]:
    """Stand-ins for torch.cuda's graphs on the CPU. Returns the graphs that are made."""
    made = []

    @contextmanager
    def record(graph, stream, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"  # the thread that pins batches meanwhile asks CUDA for memory
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        graph.owner = trainer.step_graph
        made.append(graph)
        trainer.update = lambda batch: torch.zeros((), dtype=torch.float64)  # recorded, not done
        yield
        trainer.update = trainer.plain_update

    stream = SimpleNamespace(wait_stream=lambda other: None)
    trainer.plain_update = trainer.update
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    trainer.step_graph = graphs.StepGraph(trainer)
    return made


# Six batches and an odd one; class weights from the second epoch on.
GRAPH_FLAGS = "--loss ldam --drw --drw-epoch 1 --augment crop_flip --color-jitter 0.2 --ema 0.9"


def test_steps_of_a_graph_are_plain_steps(tmp_path, monkeypatch):
    """As far as a CPU can tell: each batch's tensors reach the recorded ones, and a new kind of batch is recorded."""
    count = 6 * BATCH + 3
    plain, graphed = (
        make_trainer(tmp_path, *GRAPH_FLAGS.split(), "--optimizer", "sgd", images=count) for _ in range(2)
    )
    made = fake_cuda(monkeypatch, graphed)
    for epoch in range(2):
        found = [trainer.train(epoch, np.arange(count)) for trainer in (plain, graphed)]
        assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)
    assert [graph.replays for graph in made] == [3, 3]  # of six batches in each epoch three are plain
    for name in ("model", "average"):
        first, second = (getattr(trainer, name).state_dict() for trainer in (plain, graphed))
        for key, value in first.items():
            assert torch.allclose(value.double(), second[key].double(), atol=1e-6), key


def test_a_recording_that_fails_leaves_plain_steps(tmp_path, monkeypatch, capsys):
    plain, graphed = (make_trainer(tmp_path, images=6 * BATCH) for _ in range(2))
    fake_cuda(monkeypatch, graphed, fails=True)
    found = [trainer.train(0, np.arange(6 * BATCH))["loss"] for trainer in (plain, graphed)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    line = "no CUDA graph of a step (operation not permitted when stream is capturing); "
    assert capsys.readouterr().out.count(line) == 1


def test_no_graph_where_none_can_be(tmp_path):
    assert make_trainer(tmp_path).step_graph is None
    for flags in ("--mix mixup --loss ce", ""):
        with pytest.raises(UserError, match="--cuda-graph on: "):
            make_trainer(tmp_path, "--cuda-graph", "on", *flags.split())


@pytest.mark.parametrize("name", optimization.OPTIMIZERS)
def test_a_checkpoint_does_not_tell_where_the_learning_rate_lay(name):
    args = SimpleNamespace(lr=0.1, momentum=0.8, weight_decay=0.0, optimizer=name)
    plain, moved = (optimization.build_optimizer(args, torch.nn.Linear(2, 2)) for _ in range(2))
    optimization.move_rate(moved, "cpu")
    for optimizer in (plain, moved):
        optimization.set_rate(optimizer, 0.25)
    assert float(moved.param_groups[0]["lr"]) == 0.25
    assert optimization.state_of(plain) == optimization.state_of(moved)
