"""How fast tune_generator.py and generate_spectrum.py --per-class are, against DataDream's published way.

That way (plain_datadream.py) starts a process a class and step, and computes nothing ahead; ours tunes all classes in
one process and generates for all in another. Both make the same adapters and images: same start, order, crops, noise
and prompts. Weights of the generator are random, for speed does not depend on them; `sd21` has the configuration
published for Stable Diffusion 2.1-base (866 million weights in the UNet), `small` the same shape with an eighth of its
widths.

Both sides run in turn, --rounds times: a figure is the median of a side's rounds, a ratio that of the rounds' ratios.
Rates are those within the loops, of training steps and of images; seconds a class are all of a process's, start and
loading included, by the clock and of the CPU, which other work disturbs less. `published_length` is a class of 400
steps and 500 images of 50 steps at these rates.

Writes a JSON file of what was measured, with --out, after each round anew.

    python bench/bench_tune.py
    python bench/bench_tune.py --model sd21 --resolution 512 --shots 16 --batch-size 8 --epochs 20 --steps 50  # GPU
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from bench.timing import medians, spent  # noqa: E402
from runtime import files  # noqa: E402
from runtime.cli import UserError, whole  # noqa: E402
from runtime.device import pick_device  # noqa: E402

# Published with Stable Diffusion 2.1-base.
SD21 = {
    "unet": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 768},
    "text": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "projection_dim": 512,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "vocab_size": 49408,
    },
}
SMALL = {
    "unet": SD21["unet"] | {"block_out_channels": (40, 80, 160, 160), "cross_attention_dim": 128, "norm_num_groups": 8},
    "vae": SD21["vae"] | {"block_out_channels": (16, 32, 64, 64), "norm_num_groups": 8},
    "text": SD21["text"]
    | {"hidden_size": 128, "intermediate_size": 512, "projection_dim": 64}
    | {"vocab_size": 580, "bos_token_id": 578, "eos_token_id": 579, "pad_token_id": 579},  # of the tiny tokenizer
}
CONFIGS = {"small": SMALL, "sd21": SD21}
PUBLISHED = {"steps": 400, "images": 500, "denoising": 50}  # of a class of 16 images


def build_sd21(config: dict, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """A text-to-image pipeline of Stable Diffusion 2.1-base's shape with random weights, the same ones each time."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        unet = UNet2DConditionModel(**config["unet"])
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            **config["vae"],
        )
        text = CLIPTextModel(CLIPTextConfig(hidden_act="gelu", max_position_embeddings=77, **config["text"]))
    torch.set_default_dtype(before)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        # The words do not matter here, only their number: any text is padded to 77 tokens.
        tokenizer=CLIPTokenizer.from_pretrained(ROOT / "assets/tiny_sd/tokenizer", model_max_length=77),
        unet=unet,
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            skip_prk_steps=True,
            set_alpha_to_one=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_images(root: Path, classes: int, shots: int) -> None:
    """An image folder of photographs' size: `shots` training images a class, one to validate on and one to test on."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        for part, count in (("train", shots), ("val", 1), ("test", 1)):
            folder = root / part / f"class {label}"
            folder.mkdir(parents=True)
            for number in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
                coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=95)


def run(script: str, *words) -> np.ndarray:
    """Run a script in a process of its own: its seconds by the clock, and its CPU seconds."""
    began = np.array(spent())
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{script} failed\n{done.stdout}\n{done.stderr}")
    return np.array(spent()) - began


def loop_seconds(tuned: Path, labels: range) -> float:
    """Seconds in the training loop of tune_generator.py: from its first held-out loss to its last, of each group."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spans = set()
    for label in labels:
        seen = EventAccumulator(str(tuned / str(label))).Reload().Scalars("tuning/held_out")
        spans.add((round(seen[0].wall_time, 1), round(seen[-1].wall_time, 1)))  # adapters side by side share one
    return sum(end - begin for begin, end in spans)


def compare_adapters(ours: Path, theirs: Path, labels: range) -> float:
    """The largest distance of two adapters' B, which starts at zero, relative to its size."""
    from safetensors.torch import load_file

    apart = []
    for label in labels:
        both = [load_file(folder / str(label) / "pytorch_lora_weights.safetensors") for folder in (ours, theirs)]
        # transformers 5 leaves `text_model.` out of the names, older versions need it.
        both = [{key.replace(".text_model.", "."): weight for key, weight in w.items()} for w in both]
        assert both[0].keys() == both[1].keys() and both[0]
        first, second = (torch.cat([w[key].flatten() for key in sorted(w) if "lora_B" in key]) for w in both)
        apart.append(float((first - second).norm() / first.norm()))
    return max(apart)


def compare_images(spectrum: Path, theirs: Path) -> float:
    """The largest difference of a pixel, of 255."""
    rows = [json.loads(line) for line in (spectrum / "shard-00000/metadata.jsonl").open()]
    apart = []
    for row in rows:
        pair = [spectrum / "shard-00000" / row["file_name"], theirs / str(row["label"]) / Path(row["file_name"]).name]
        first, second = (np.asarray(Image.open(path)).astype(int) for path in pair)
        apart.append(float(np.abs(first - second).max()))
    return max(apart)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(CONFIGS), default="small", help="shape of the generator")
    parser.add_argument("--resolution", type=int, default=128, help="side of the images, in pixels")
    parser.add_argument("--classes", type=int, default=4, help="classes, an adapter each")
    parser.add_argument("--shots", type=int, default=4, help="training images a class")
    parser.add_argument("--batch-size", type=int, default=4, help="images in a training step")
    parser.add_argument("--epochs", type=int, default=30, help="times that each image is used")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--together", type=int, default=1, help="of tune_generator.py")
    parser.add_argument("--per-class", type=int, default=20, help="images generated a class")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps of an image")
    parser.add_argument("--compile", action="store_true", help="of both scripts")
    parser.add_argument("--rounds", type=whole(1), default=3, help="measurements; the median counts")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--machine", default="", help="how the results are to name the machine (default: the GPU)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def run_ours(args, inputs: Path, folder: Path, device: str) -> dict:
    """Seconds of tuning all classes and of generating for all, in all and in their loops."""
    data = ["--dataset", "imagefolder", "--data-root", inputs / "images", "--generator", inputs / "generator"]
    data += ["--device", device]
    data += ["--compile"] if args.compile else []
    tuning = ["--shots", args.shots, "--batch-size", args.batch_size, "--epochs", args.epochs, "--rank", args.rank]
    tuning += ["--resolution", args.resolution, "--together", args.together, "--warmup-steps", 1, "--samples", 0]
    tuned, spectrum, side = folder / "tuned", folder / "spectrum", args.resolution
    drawing = ["--tuned", tuned, "--per-class", args.per_class, "--steps", args.steps, "--size", f"{side}x{side}"]
    result = {"tuning": run("tune_generator.py", *data, *tuning, "--out", tuned)}
    result["tuning_loop"] = loop_seconds(tuned, range(args.classes))
    drawing += ["--text-guidance", 2, "--out", spectrum]
    result["generation"] = run("generate_spectrum.py", *data, *drawing)
    speed = files.read_json(spectrum / "shard-00000/speed.json")
    return result | {"generation_loop": args.classes * args.per_class * args.steps / speed["steps_per_second"]}


def run_plain(args, inputs: Path, folder: Path, device: str) -> dict:
    """The same, with a process a class and step. It generates with our adapters, so that images can be compared."""
    words = ["--generator", inputs / "generator", "--tuned", folder / "tuned", "--spectrum", folder / "spectrum"]
    words += ["--data-root", inputs / "images", "--device", device, "--out", folder / "plain"]
    result = {}
    for name, step in (("tuning", "tune"), ("generation", "generate")):
        labels = range(args.classes)
        result[name] = sum(run("bench/plain_datadream.py", step, "--label", label, *words) for label in labels)
        found = [files.read_json(folder / "plain" / str(label) / f"{step}.json") for label in labels]
        result[f"{name}_loop"] = sum(one["seconds"] for one in found)
    return result


def main(argv: list[str] | None = None) -> dict:
    import models

    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    if device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    dtype = models.generator_dtype("auto", device)
    with tempfile.TemporaryDirectory() as name:
        inputs = Path(name)
        make_images(inputs / "images", args.classes, args.shots)
        pipe = build_sd21(CONFIGS[args.model], device, models.DTYPES[dtype])
        weights = sum(weight.numel() for weight in pipe.unet.parameters())
        pipe.save_pretrained(inputs / "generator")
        del pipe
        if device != "cpu":
            torch.cuda.empty_cache()
        result = {
            "machine": args.machine or (torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"),
            "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "unet_weights": weights,
            "dtype": dtype,
            **{name: value for name, value in vars(args).items() if name not in ("out", "machine", "device")},
        }
        # Both sides in turn; each round is noted as soon as it has ended.
        rounds: list[list[dict]] = []
        for number in range(args.rounds):
            folder = inputs / f"round-{number}"
            rounds.append([])
            for side in (run_ours, run_plain):
                rounds[-1].append(figures(args, side(args, inputs, folder, device)))
                print(side.__name__, json.dumps(rounds[-1][-1]), flush=True)  # should the other side fail
            result |= compare_rounds(rounds)
            result["largest_difference_of_adapters"] = compare_adapters(
                folder / "tuned", folder / "plain", range(args.classes)
            )
            result["largest_difference_of_pixels"] = compare_images(folder / "spectrum", folder / "plain")
            print(json.dumps(result, indent=2), flush=True)
            if args.out:
                files.write_json(args.out, result)
    return result


def figures(args, side: dict) -> dict[str, float]:
    """Rates and seconds of a side: of its loops, of a class, and of a class of the published length."""
    steps = -(-args.epochs * args.shots // min(args.batch_size, args.shots)) * args.classes
    images = args.per_class * args.classes
    found = {
        "tuning_steps_per_second": steps / side["tuning_loop"],
        "generation_images_per_second": images / side["generation_loop"],
    }
    for what in ("tuning", "generation"):
        for name, value in zip(("seconds", "cpu_seconds"), side[what], strict=True):
            found[f"{what}_{name}_a_class"] = float(value) / args.classes
    return found | {"published_length_seconds_a_class": published_seconds(args, side, steps, images)}


def compare_rounds(rounds: list[list[dict]]) -> dict[str, dict]:
    """Medians of each figure, of how many times better ours is, and what both sides had in each round."""
    found = {}
    for name in rounds[0][0]:
        pairs = [[ours[name], theirs[name]] for ours, theirs in rounds]
        found[name] = medians(*zip(*pairs, strict=True), lower=name.endswith("a_class")) | {"rounds": pairs}
    return found


def published_seconds(args, side: dict, steps: int, images: int) -> float:
    """Seconds a class of the published length: what is outside the loops as measured, the loops by their rates."""
    outside = sum(float(side[name][0]) - side[f"{name}_loop"] for name in ("tuning", "generation")) / args.classes
    step = side["tuning_loop"] / steps
    image = side["generation_loop"] / images * PUBLISHED["denoising"] / args.steps
    return outside + PUBLISHED["steps"] * step + PUBLISHED["images"] * image


if __name__ == "__main__":
    main()
