"""A training step as one CUDA graph: recorded once, then started by one call instead of by some hundreds.

On a GPU a small network is bound by the host, which takes longer to ask for a kernel than the GPU takes to run it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from runtime.cli import UserError, first_line
from training import distributed, optimization
from training.loop import Batch

WARM_UP = 3  # plain steps before the recording: optimiser states are made, convolution algorithms chosen


def build_graph(trainer) -> StepGraph | None:
    """What takes a trainer's steps as its --cuda-graph says; None for plain steps.

    Raises:
        UserError: --cuda-graph on, without a GPU or with several processes.
    """
    wish, mix = trainer.args.cuda_graph, trainer.args.mix
    possible = trainer.device.startswith("cuda") and distributed.world() == 1
    if wish == "on" and not possible:
        raise UserError("--cuda-graph on: expected a GPU and a single process, or auto")
    return StepGraph(trainer) if wish != "off" and possible and mix == "none" else None


class StepGraph:
    """Takes steps as `trainer.update` does: batches of --batch-size images by the graph, a last smaller one without.

    The first steps are plain ones, and so is every step where the recording fails, which one printed line says. The
    weights that come out are those of plain steps. Where the batches' tensors change in kind or shape (class weights
    from an epoch on), a new graph is recorded.
    """

    def __init__(self, trainer):
        if torch.device(trainer.device).index is not None:
            torch.cuda.set_device(trainer.device)
        self.trainer, self.stream = trainer, torch.cuda.Stream(trainer.device)
        self.layout: list | None = None  # of the batches that `graph` takes
        self.warm, self.failed = 0, False
        self.graph, self.batch, self.loss = None, None, None
        optimization.move_rate(trainer.optimizer, trainer.device)
        torch.backends.cudnn.benchmark = True  # the shapes of a graph are fixed

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Move the weights by one batch. Returns its loss, float64, which the next call overwrites."""
        if self.failed or len(batch) != self.trainer.args.batch_size:
            return self.trainer.update(batch)
        layout = [(name, value.shape, value.dtype) for name, value in tensors_of(batch).items()]
        if layout != self.layout:
            self.layout, self.warm, self.graph = layout, 0, None
        if self.warm < WARM_UP:
            self.warm += 1
            return self.step_aside(batch)
        if self.graph is None and not self.record(batch):
            return self.trainer.update(batch)
        given = tensors_of(batch)
        for name, value in tensors_of(self.batch).items():
            value.copy_(given[name])
        self.graph.replay()
        return self.loss

    def step_aside(self, batch: Batch) -> torch.Tensor:
        """A plain step on a stream of its own, as must precede a recording."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            loss = self.trainer.update(batch)
        current.wait_stream(self.stream)
        return loss

    def record(self, batch: Batch) -> bool:
        """Record the graph of a step, which moves nothing yet. Returns False, and says why, where that fails."""
        optimizer, current = self.trainer.optimizer, torch.cuda.current_stream()
        self.batch = replace(
            batch,
            images=batch.images.clone(),
            labels=batch.labels.clone(),
            synthetic=batch.synthetic.clone(),
            draws={name: value.clone() for name, value in batch.draws.items()},
            constants={name: value.clone() for name, value in batch.constants.items()},
        )
        optimizer.zero_grad(set_to_none=True)  # the graph's gradients are to lie in its own memory
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread alone: another pins the next batches meanwhile, which would end the recording and the run.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.loss = self.trainer.update(self.batch)
        except RuntimeError as error:
            torch.cuda.set_stream(current)
            optimizer.zero_grad(set_to_none=True)
            self.failed, self.batch, self.loss = True, None, None
            print(f"no CUDA graph of a step ({first_line(error)}); steps are taken one kernel at a time", flush=True)
            return False
        self.graph = graph
        return True


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    """Everything on the device that a step reads of its batch, by name."""
    own = {"images": batch.images, "labels": batch.labels, "synthetic": batch.synthetic}
    return own | {f"draws {name}": value for name, value in batch.draws.items()} | batch.constants
