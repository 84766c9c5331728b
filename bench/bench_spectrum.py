"""How fast generate_spectrum.py draws, against the plain loop, in one run on one model.

The plain loop calls the pipeline once for each image and level, which encodes text and source anew, and saves the
image before it goes on. Both draw the same images: same model, settings, seeds and sources. Weights are random, for
speed does not depend on them; the configuration of `refiner` is that published for the SDXL refiner 1.0 (2.26 billion
weights in the UNet), `small` has its shape in small. On a GPU the UNet's floating-point rate is set beside that of a
large bfloat16 matrix product, timed in the same run.

Writes a JSON file of what was measured, with --out.

    python bench/bench_spectrum.py --model small --size 64x64 --sources 16 --steps 20
    python bench/bench_spectrum.py --model refiner --size 480x270 --sources 32 --plain-sources 2 --steps 50  # on a GPU
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import generate_spectrum  # noqa: E402
import models  # noqa: E402
from generation import generator as generators  # noqa: E402
from generation.sizes import round_size  # noqa: E402
from generation.worklist import steps_at  # noqa: E402
from runtime import files  # noqa: E402
from runtime.device import pick_device  # noqa: E402
from spectrum import folder as spectrum_folder  # noqa: E402
from spectrum import tables  # noqa: E402
from spectrum.units import Unit  # noqa: E402

# Published with stabilityai/stable-diffusion-xl-refiner-1.0. Of its text encoders it has the second alone.
REFINER = {
    "unet": {
        "sample_size": 128,
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": (6, 12, 24, 24),
        "transformer_layers_per_block": 4,
        "cross_attention_dim": 1280,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,  # 1280 of the text and 5 * 256 of sizes and aesthetic score
    },
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
    "text": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "projection_dim": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
    },
}
SMALL = {
    "unet": REFINER["unet"]
    | {
        "sample_size": 8,
        "block_out_channels": (32, 64, 96, 96),
        "attention_head_dim": (2, 4, 6, 6),
        "transformer_layers_per_block": 1,
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 64 + 5 * 16,
        "norm_num_groups": 16,
    },
    "vae": {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "sample_size": 64, "norm_num_groups": 8},
    "text": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "projection_dim": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "vocab_size": 580,  # of the tiny tokenizer
        "bos_token_id": 578,
        "eos_token_id": 579,
        "pad_token_id": 579,
    },
}
NAME = "stabilityai/stable-diffusion-xl-refiner-1.0"  # nothing is loaded by it here
CONFIGS = {"refiner": REFINER, "small": SMALL}


def build_refiner(config: dict, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """An image-to-image pipeline of the refiner's shape with random weights, the same ones each time."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLImg2ImgPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        unet = UNet2DConditionModel(
            in_channels=4, out_channels=4, addition_embed_type="text_time", use_linear_projection=True, **config["unet"]
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            scaling_factor=0.13025,
            force_upcast=True,
            **config["vae"],
        )
        text = CLIPTextModelWithProjection(CLIPTextConfig(hidden_act="gelu", **config["text"]))
    torch.set_default_dtype(before)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    pipe = StableDiffusionXLImg2ImgPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=text.eval(),
        tokenizer=None,
        # The words do not matter here, only their number: any text is padded to 77 tokens.
        tokenizer_2=CLIPTokenizer.from_pretrained(ROOT / "assets/tiny_sd/tokenizer", model_max_length=77),
        unet=unet.eval(),
        scheduler=scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


class UnetTimer:
    """Seconds spent in a UNet while entered, and how often it was called."""

    def __init__(self, unet):
        self.unet, self.calls, self.marks = unet, 0, []

    def mark(self) -> object:
        if not next(self.unet.parameters()).is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> UnetTimer:
        def before(*_):
            self.calls += 1
            self.marks.append([self.mark()])

        def after(*_):
            self.marks[-1].append(self.mark())

        self.hooks = [self.unet.register_forward_pre_hook(before), self.unet.register_forward_hook(after)]
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = sum(
            end - start if isinstance(start, float) else start.elapsed_time(end) / 1000 for start, end in self.marks
        )


def make_inputs(folder: Path, sources: int, size: tuple[int, int]) -> tuple[list[str], list[str]]:
    """A folder of random images, hard.csv and prompts.json: names of the images, and arguments that name the files."""
    rng = np.random.default_rng(0)
    names = [f"train/{number % 10}/{number:04d}.png" for number in range(sources)]
    others = [f"{split}/{label}/0.png" for split in ("val", "test") for label in range(min(sources, 10))]
    for name in (*names, *others):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 16, 3), dtype=np.uint8))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / name)
    tables.write_hard(
        folder / "hard.csv",
        (
            {"source": name, "label": n % 10, "class_name": str(n % 10), "reason": "few", "score": 1}
            for n, name in enumerate(names)
        ),
    )
    prompts = {
        str(label): {
            "class_name": str(label),
            "score_prompt": "x",
            "prompts": [f"a 8k real photo: number {label} by day", f"a 8k real photo: number {label} at night"],
        }
        for label in range(10)
    }
    files.write_json(folder / "prompts.json", prompts)
    inputs = ["--dataset", "imagefolder", "--data-root", folder]
    inputs += ["--hard", folder / "hard.csv", "--prompts", folder / "prompts.json"]
    return names, [str(word) for word in inputs]


def plain_loop(pipe, rows: list[dict], folder: Path, size: tuple[int, int], steps: int, scale: float) -> tuple:
    """One call of the pipeline an image: seconds for all of them, and the images as float (3, H, W) in [0, 1]."""
    drawn = []
    (folder / "plain").mkdir()
    began = time.perf_counter()
    for number, row in enumerate(rows):
        unit = Unit(row["source"], row["level"], row["seed"])
        image = Image.open(folder / unit.source).convert("RGB").resize(size, Image.Resampling.LANCZOS)
        image = pipe(
            row["prompt"],
            image=image,
            strength=min(1.0, (steps_at(unit.level, steps) + 0.5) / steps),
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(unit.noise_seed()),
            output_type="pt",
        ).images[0]
        drawn.append(image.float().cpu())
        pixels = drawn[-1].mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "plain" / f"{number}.png")
    return time.perf_counter() - began, drawn


def unet_flops(pipe, size: tuple[int, int]) -> int:
    """Floating-point operations of one denoising step of one image under classifier-free guidance."""
    from torch.utils.flop_counter import FlopCounterMode

    width, height = size[0] // 8, size[1] // 8
    config, like = pipe.unet.config, {"device": pipe.device, "dtype": pipe.unet.dtype}
    pooled = pipe.text_encoder_2.config.projection_dim
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        pipe.unet(
            torch.zeros(2, 4, height, width, **like),
            500,
            encoder_hidden_states=torch.zeros(2, 77, config.cross_attention_dim, **like),
            added_cond_kwargs={
                "text_embeds": torch.zeros(2, pooled, **like),
                "time_ids": torch.zeros(2, 5, **like),
            },
        )
    return counter.get_total_flops()


def matmul_rate(device: str, side: int = 8192, repeats: int = 50) -> float:
    """Floating-point operations a second of a large bfloat16 matrix product."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        a @ b
    torch.cuda.synchronize()
    return 2 * side**3 * repeats / (time.perf_counter() - began)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(CONFIGS), default="small", help="shape of the generator")
    parser.add_argument("--size", type=generate_spectrum.size, default=(64, 64), help="WxH of the sources, in pixels")
    parser.add_argument("--sources", type=int, default=16, help="source images")
    parser.add_argument("--plain-sources", type=int, help="how many of them the plain loop draws too (default: all)")
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 10, 30, 50, 70, 90], help="guidance levels")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps at level 0")
    parser.add_argument("--text-guidance", type=float, default=10.0, help="classifier-free guidance scale")
    parser.add_argument("--batch-size", type=int, default=32, help="of generate_spectrum.py")
    parser.add_argument("--compile", action="store_true", help="of generate_spectrum.py")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--machine", default="", help="how the results are to name the machine (default: the GPU's name)"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def main(argv: list[str] | None = None) -> dict:
    import diffusers

    args = build_parser().parse_args(argv)
    diffusers.utils.logging.set_verbosity_error()
    device = pick_device(args.device)
    dtype = models.generator_dtype("auto", device)
    pipe = build_refiner(CONFIGS[args.model], device, models.DTYPES[dtype])
    drawn_size = round_size(args.size, 8)
    floats: list[torch.Tensor] = []
    real_to_host, real_load = generators.to_host, models.load_generator

    def to_host(drawn: torch.Tensor) -> tuple:
        floats.extend(drawn)
        return real_to_host(drawn)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names, inputs = make_inputs(folder, args.sources, args.size)
        command = [*inputs, "--generator", NAME, "--steps", args.steps, "--seeds", 1, "--device", device]
        command += ["--batch-size", args.batch_size, "--text-guidance", args.text_guidance, "--levels", *args.levels]
        command += ["--compile"] if args.compile else []
        command = [str(word) for word in command]
        try:
            models.load_generator, generators.to_host = (lambda *_: pipe), to_host
            generate_spectrum.main([*command, "--out", str(folder / "warm"), "--levels", str(max(args.levels))])
            floats.clear()
            began = time.perf_counter()
            with UnetTimer(pipe.unet) as timer:
                code = generate_spectrum.main([*command, "--out", str(folder / "ours")])
            ours = time.perf_counter() - began
            assert code == 0
        finally:
            models.load_generator, generators.to_host = real_load, real_to_host
        count, wrong = spectrum_folder.check(folder / "ours")
        assert not wrong and count == len(floats), wrong

        # Rows are written in the order in which the images were drawn.
        rows = [json.loads(line) for line in (folder / "ours/shard-00000/metadata.jsonl").open(encoding="utf-8")]
        some = set(names[: args.plain_sources or args.sources])
        chosen = [place for place, row in enumerate(rows) if row["source"] in some]
        # A decoder whose encoder ran apart from it is still the pipeline's own, in one type again.
        pipe.vae.to(models.DTYPES[dtype])
        plain, images = plain_loop(
            pipe, [rows[place] for place in chosen], folder, drawn_size, args.steps, args.text_guidance
        )
    difference = max(
        float((floats[place].cpu() - image).abs().max()) for place, image in zip(chosen, images, strict=True)
    )
    image_steps = sum(steps_at(row["level"], args.steps) for row in rows)
    result = {
        "machine": args.machine or (torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": args.model,
        "unet_weights": sum(weight.numel() for weight in pipe.unet.parameters()),
        "dtype": dtype,
        "size": list(drawn_size),
        "steps": args.steps,
        "levels": args.levels,
        "batch_size": args.batch_size,
        "compile": args.compile,
        "plain_images_per_second": len(chosen) / plain,
        "images_per_second": len(rows) / ours,
        "ratio": (len(rows) / ours) / (len(chosen) / plain),
        "seconds_a_spectrum": ours / args.sources,
        "largest_difference": difference,
        "unet_share_of_wall_time": timer.seconds / ours,
        "unet_gflops_a_step": unet_flops(pipe, drawn_size) / 1e9,
    }
    if device.startswith("cuda"):
        rate = result["unet_gflops_a_step"] * 1e9 * image_steps / timer.seconds
        matmul = matmul_rate(device)
        result |= {"unet_tflops": rate / 1e12, "matmul_tflops": matmul / 1e12, "share_of_matmul_rate": rate / matmul}
        result["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps(result, indent=2))
    if args.out:
        files.write_json(args.out, result)
    return result


if __name__ == "__main__":
    main()
