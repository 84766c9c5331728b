"""How much work a tuning step is for a GPU, counted without one: kernels, floating-point operations, bytes.

The step is tune_generator.py's own (training/tuner.py), with a generator of bench_tune.py's shapes in bfloat16. Its
tensors have shapes but no values, so that any machine counts any size within a minute. Every operator of torch that
computes something counts as a kernel, but not the gradients' norms, which a GPU takes all at once and a CPU one by one.
Bytes are what the operators read and write, as if no cache kept any.

Writes: a line of JSON for each number of adapters side by side, added to --out

    python bench/count_tuning.py --model sd21 --resolution 512 --batch-size 8 --together 1 4
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count  # noqa: E402

from bench.bench_tune import CONFIGS, build_sd21  # noqa: E402
from bench.timing import note  # noqa: E402
from runtime.cli import whole  # noqa: E402
from training import diffusion, lora, tuner  # noqa: E402

# The counter of torch knows the operators of attention on a GPU only.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}


class Work(TorchDispatchMode):
    """Counts the operators that compute something, by name, and the bytes of their tensors."""

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "aten" and not function.is_view and "vector_norm" not in str(function):
            tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
            self.kernels[str(function)] += 1
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result


def count_step(args, adapters: int) -> dict:
    """Kernels, TFLOP and GB of a step of so many adapters side by side, the most frequent kernels first."""
    side, batch = args.resolution // 8, args.batch_size
    shape = (args.shots, 1, 4, side, side)
    # What chance decides has values, and so does all that a tokenizer makes.
    empty = diffusion.Latents(torch.empty(shape, device="meta"), torch.empty(shape, device="meta"))
    draws = [diffusion.draw_step(0, str(number), 0, batch, empty, 1000) for number in range(adapters)]
    prompts = [[f"a photo of class {number}"] * batch for number in range(adapters)]
    flags = {"grad_checkpointing": args.grad_checkpointing, "parts": ["unet", "text"], "resolution": args.resolution}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        pipe = build_sd21(CONFIGS[args.model], "cpu", torch.bfloat16)
        work = tuner.Tuner(SimpleNamespace(**flags), pipe, None, {}, Path(), None)
        work.layers = lora.add_adapters(pipe, flags["parts"], adapters, args.rank, args.rank)
        optimizer = torch.optim.AdamW(lora.parameters(work.layers), 1e-4, fused=True)
        latents = [diffusion.Latents(torch.empty(shape), torch.empty(shape))] * adapters
        draws = [draw._make(mode.from_tensor(tensor) for tensor in draw) for draw in draws]

        def step() -> None:
            loss, _ = work.loss(latents, draws, prompts)
            optimizer.zero_grad(set_to_none=True)
            loss.view(adapters, -1).mean(1).sum().backward()
            lora.clip_gradients(work.layers, 1.0)
            optimizer.step()

        step()  # the optimiser makes its moments in the first
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops, Work() as counted:
            step()
    return {
        "kernels": sum(counted.kernels.values()),
        "tflop": flops.get_total_flops() / 1e12,
        "gigabytes": counted.bytes / 1e9,
        "most_frequent": dict(counted.kernels.most_common(8)),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(CONFIGS), default="sd21", help="shape of the generator")
    parser.add_argument("--resolution", type=whole(64), default=512, help="side of the images, in pixels")
    parser.add_argument("--shots", type=whole(1), default=16, help="training images a class")
    parser.add_argument("--batch-size", type=whole(1), default=8, help="images of an adapter in a step")
    parser.add_argument("--rank", type=whole(1), default=16, help="of the adapters")
    parser.add_argument("--together", type=whole(1), nargs="+", default=[1, 4], help="adapters side by side")
    parser.add_argument("--grad-checkpointing", action="store_true", help="of tune_generator.py")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/tuning_step.jsonl"), help="where lines are added"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "together")}
    for adapters in args.together:
        note(args.out, settings | {"together": adapters} | count_step(args, adapters))


if __name__ == "__main__":
    main()
