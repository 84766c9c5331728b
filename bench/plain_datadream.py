"""DataDream's two steps for one class as its published description has them: the other side of bench_tune.py.

A process a class and step. Nothing is computed ahead: in each training step images are read, resized, cropped and
encoded, and every prompt of the batch goes through the text encoder. Order, crops, noise and start are those of
tune_generator.py, drawn before the clock runs, so that both sides make the same adapters and images.

Reads:  a generator's folder, a tuning folder of tune_generator.py (its shots.csv, prompts.json and settings)
Writes: OUT/LABEL/: the adapter in diffusers' format; OUT/LABEL/*.png, one an image of the spectrum folder;
        OUT/LABEL/STEP.json: seconds in the loop and before it

    python bench/plain_datadream.py tune --label 0 --generator GENERATOR --tuned runs/tuned --data-root IMAGES --out OUT
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

BEGAN = time.perf_counter()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from runtime import files  # noqa: E402
from spectrum import tables  # noqa: E402
from spectrum.units import Unit  # noqa: E402

DRAW_AT_ONCE = 10  # DataDream's batch of generation


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["tune", "generate"], help="what to do")
    parser.add_argument("--label", type=int, required=True, help="the class")
    parser.add_argument("--generator", required=True, help="folder of a Stable Diffusion pipeline")
    parser.add_argument("--tuned", type=Path, required=True, help="folder of tune_generator.py")
    parser.add_argument("--spectrum", type=Path, help="for generate: folder of generate_spectrum.py --per-class")
    parser.add_argument("--data-root", type=Path, required=True, help="folder that sources are relative to")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, required=True, help="where adapters and images go")
    return parser


def load(args, plan: dict):
    """The text-to-image pipeline, frozen, in the number type of the plan."""
    from diffusers import AutoPipelineForText2Image

    pipe = AutoPipelineForText2Image.from_pretrained(
        args.generator, dtype=getattr(torch, plan["dtype"]), safety_checker=None, requires_safety_checker=False
    ).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    return pipe


def square(path: Path, side: int, box: tuple[int, int, int, int]) -> torch.Tensor:
    """A crop of an image, float (3, side, side) in [-1, 1]."""
    from torchvision.transforms.functional import to_tensor

    image = Image.open(path).convert("RGB")
    scale = side / min(image.size)
    image = image.resize(tuple(max(side, round(length * scale)) for length in image.size), Image.Resampling.BILINEAR)
    return to_tensor(image.crop(box)) * 2 - 1


def crop_boxes(path: Path, name: str, plan: dict) -> list[tuple[int, int, int, int]]:
    """The crops that tune_generator.py takes of an image."""
    side = plan["resolution"]
    with Image.open(path) as image:
        scale = side / min(image.size)
        width, height = (max(side, round(length * scale)) for length in image.size)
    generator = torch.Generator().manual_seed(files.digest_int("crop", plan["seed"], name))
    boxes = []
    for _ in range(plan["crops"]):
        left, top = (int(torch.randint(length - side + 1, (), generator=generator)) for length in (width, height))
        torch.rand((), generator=generator)  # whether it would be mirrored
        boxes.append((left, top, left + side, top + side))
    return boxes


def draw_steps(plan: dict, label: int, images: int, steps: int, batch: int) -> list:
    """What chance decides in each step: see training/diffusion.py."""
    from training import diffusion

    shape = (images, plan["crops"], 4, plan["resolution"] // 8, plan["resolution"] // 8)
    empty = torch.empty(shape, device="meta")
    return [
        diffusion.draw_step(plan["seed"], str(label), step, batch, diffusion.Latents(empty, empty), 1000)
        for step in range(steps)
    ]


def start_adapters(modules: list, seed: int, rank: int) -> None:
    """A of each layer as tune_generator.py starts it; B is zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        for name, weight in module.named_parameters():
            if "lora_A" in name:
                weight.data.copy_(torch.randn(weight.shape[::-1], generator=generator).div(rank).T)


def tune(args, plan: dict, pipe) -> tuple[int, float]:
    """Tune an adapter on the class's images: steps, and seconds of their loop."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig, get_peft_model_state_dict

    from training.lora import TEXT_TARGETS, UNET_TARGETS
    from training.tuner import batch_and_steps, rate_at

    # Put fresh adapters into UNet and text encoder.
    for module, targets in ((pipe.unet, UNET_TARGETS), (pipe.text_encoder, TEXT_TARGETS)):
        config = {"r": plan["rank"], "lora_alpha": plan["alpha"], "target_modules": list(targets)}
        module.add_adapter(LoraConfig(**config))
    modules = [pipe.unet, pipe.text_encoder]
    cast_training_params(modules, torch.float32)
    start_adapters(modules, files.digest_int("adapter", plan["seed"], str(args.label)), plan["rank"])
    trained = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, plan["lr"], weight_decay=plan["weight_decay"])
    noises = DDPMScheduler.from_config(pipe.scheduler.config)
    # Draw what chance decides.
    names = [row.source for row in tables.read_hard(args.tuned / "shots.csv") if row.label == args.label]
    paths = [args.data_root / name for name in names]
    boxes = [crop_boxes(path, name, plan) for path, name in zip(paths, names, strict=True)]
    batch, steps = batch_and_steps(argparse.Namespace(**plan), len(names))
    draws = draw_steps(plan, args.label, len(names), steps, batch)
    prompt = tables.read_prompts(args.tuned / "prompts.json", [args.label])[args.label]["prompts"][0]
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps, plan["warmup_steps"]))
    # Train.
    dtype = pipe.unet.dtype
    began = time.perf_counter()
    for draw in draws:
        pixels = torch.stack(
            [square(paths[i], plan["resolution"], boxes[i][k]) for i, k in zip(*map(list, draw[:2]), strict=True)]
        )
        posterior = pipe.vae.encode(pixels.to(args.device, dtype)).latent_dist
        z = (posterior.mean.float() + posterior.std.float() * draw.sample.to(args.device)) * 0.18215
        ids = pipe.tokenizer(
            [prompt] * batch, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        noise, timesteps = draw.noise.to(args.device), draw.timesteps.to(args.device)
        with torch.autocast(args.device, torch.bfloat16, dtype == torch.bfloat16):
            told = pipe.text_encoder(ids.input_ids.to(args.device))[0]
            predicted = pipe.unet(noises.add_noise(z, noise, timesteps).to(dtype), timesteps, told).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, plan["clip_grad"])
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    loss.item()  # waits for the device
    seconds = time.perf_counter() - began
    # Save as diffusers does.
    layers = [get_peft_model_state_dict(module) for module in modules]
    StableDiffusionPipeline.save_lora_weights(
        args.out / str(args.label), unet_lora_layers=layers[0], text_encoder_lora_layers=layers[1]
    )
    return steps, seconds


def generate(args, plan: dict, pipe) -> tuple[int, float]:
    """Generate the images of a spectrum's class with its adapter: denoising steps, and seconds of their loop."""
    pipe.load_lora_weights(args.tuned / str(args.label))
    rows = [json.loads(line) for path in sorted(args.spectrum.glob("shard-*/metadata.jsonl")) for line in path.open()]
    rows = [row for row in rows if row["label"] == args.label]
    dtype, shape = pipe.unet.dtype, (1, 4, rows[0]["height"] // 8, rows[0]["width"] // 8)
    starts = []
    pipe.scheduler.set_timesteps(rows[0]["steps"])
    for row in rows:
        generator = torch.Generator().manual_seed(Unit(row["source"], row["level"], row["seed"]).noise_seed())
        first, added = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
        starts.append(pipe.scheduler.add_noise(first, added, pipe.scheduler.timesteps[:1]))
    began = time.perf_counter()
    for place in range(0, len(rows), DRAW_AT_ONCE):
        some = rows[place : place + DRAW_AT_ONCE]
        drawn = pipe(
            [row["prompt"] for row in some],
            height=some[0]["height"],
            width=some[0]["width"],
            num_inference_steps=some[0]["steps"],
            guidance_scale=some[0]["text_guidance"],
            latents=torch.cat(starts[place : place + DRAW_AT_ONCE]).to(args.device),
        ).images
        for row, image in zip(some, drawn, strict=True):
            image.save(args.out / str(args.label) / Path(row["file_name"]).name)
    return sum(row["steps"] for row in rows), time.perf_counter() - began


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    plan = files.read_json(args.tuned / "plan.json")
    pipe = load(args, plan)
    (args.out / str(args.label)).mkdir(parents=True, exist_ok=True)
    steps, seconds = {"tune": tune, "generate": generate}[args.step](args, plan, pipe)
    before = time.perf_counter() - BEGAN - seconds
    files.write_json(
        args.out / str(args.label) / f"{args.step}.json",
        {"steps": steps, "seconds": seconds, "seconds_before": before},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
