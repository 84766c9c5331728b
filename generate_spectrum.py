"""Step 3: draw the synthetic-to-real spectrum of each hard image by image-guided diffusion.

Guidance level 100 is the real image and 0 text only: an image of level L is the source, noised to the start step of
strength 1 - L/100 and denoised under a prompt of its class (SDEdit; DisCL).

Reads:  hard.csv, prompts.json, the images that hard.csv names
Writes: OUT/plan.json, OUT/shard-00000/*.png and its metadata.jsonl (a row an image; see spectrum.py)

The noise of an image depends on its source, level and seed alone. Killed at any moment, the same command goes on where
it was. A folder that was begun with other settings is left alone.

    python generate_spectrum.py --hard runs/hard.csv --prompts runs/prompts.json --out runs/spectrum
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import cli
import datasets
import runs
import spectrum

MAX_REDRAWS = 3


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "generate_spectrum")
    parser.add_dataset()
    parser.add_argument(
        "--data-root",
        type=cli.existing_folder,
        metavar="FOLDER",
        help="folder that the sources of hard.csv are relative to, where they are files",
    )
    parser.add_argument(
        "--hard", type=cli.existing_file, default=Path("runs/hard.csv"), metavar="FILE", help="table of find_hard.py"
    )
    parser.add_argument(
        "--prompts",
        type=cli.existing_file,
        default=Path("runs/prompts.json"),
        metavar="FILE",
        help="file of write_prompts.py",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/spectrum"), metavar="FOLDER", help="the spectrum folder")
    group = parser.add_argument_group("what to draw")
    group.add_argument("--generator", metavar="NAME", help="image-to-image pipeline: hub name or local folder")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a generator on the hub")
    group.add_argument(
        "--levels",
        type=cli.level,
        nargs="+",
        metavar="PERCENT",
        help="guidance levels, 0 (text only) to 99 (nearly the source)",
    )
    group.add_argument("--seeds", type=cli.whole(1), metavar="N", help="images of each source and level")
    group.add_argument(
        "--steps",
        type=cli.whole(1),
        metavar="N",
        help="denoising steps at level 0; level L runs the last N * (100 - L) / 100 of them, at least 1",
    )
    group.add_argument("--text-guidance", type=cli.number(0), metavar="SCALE", help="classifier-free guidance scale")
    group = parser.add_argument_group("how")
    group.add_argument(
        "--batch-size",
        type=cli.whole(1),
        default=32,
        metavar="N",
        help="images drawn at once; the images stay the same, up to rounding",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def make_plan(args, hard: list[spectrum.Hard]) -> dict:
    """Everything that determines the images."""
    local = Path(args.generator)
    if local.is_dir():  # a folder may move or be trained again: its content is what counts
        files = sorted(path for path in local.rglob("*") if path.suffix in (".safetensors", ".json", ".txt"))
        revision = runs.digest_files(files)
    else:
        revision = args.revision or "main"
    return {
        "dataset": args.dataset,
        "imb_ratio": args.imb_ratio,
        "sources": len(hard),
        "hard_classes": sorted({row.label for row in hard}),
        "hard_digest": runs.digest_files([args.hard]),
        "prompts_digest": runs.digest_files([args.prompts]),
        "levels": sorted(set(args.levels)),
        "seeds": args.seeds,
        "steps": args.steps,
        "text_guidance": args.text_guidance,
        "generator": local.name if local.is_dir() else args.generator,
        "revision": revision,
    }


def steps_at(level: int, steps: int) -> int:
    """Denoising steps that a level runs: round(steps * (100 - level) / 100), at least 1."""
    return max(1, (2 * steps * (100 - level) + 100) // 200)  # whole numbers: int(50 * (1 - 0.9)) would be 4


def encode_prompts(pipe, texts: list[str]) -> dict[str, dict]:
    """Text embeddings of each distinct prompt, as the keyword arguments of the pipeline's call, on the CPU."""
    import torch

    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    encoded = {}
    with torch.inference_mode():
        for text in dict.fromkeys(texts):
            embeddings = pipe.encode_prompt(
                prompt=text, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=True
            )
            encoded[text] = {name: value.cpu() for name, value in zip(names, embeddings, strict=False)}
    return encoded


def encode_source(pipe, image) -> tuple:
    """Mean and standard deviation of a source's latent, float (1, C, h, w) each, on the CPU.

    Sides are rounded down to what the autoencoder divides by.
    """
    import torch

    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    width, height = (max(factor, side // factor * factor) for side in image.size)
    with torch.inference_mode():
        pixels = pipe.image_processor.preprocess(image, height=height, width=width)
        posterior = pipe.vae.encode(pixels.to(pipe.device, pipe.vae.dtype)).latent_dist
    return posterior.mean.cpu(), posterior.std.cpu()


def draw(pipe, units: list[spectrum.Unit], redraw: int, latents: dict, texts: list[dict], args):
    """Draw units of one level and one size in one batch: float (N, 3, H, W) in [0, 1], on the CPU.

    Noise comes from a CPU generator for each unit, in the order in which the pipeline itself would draw it for one
    image: first the sample of the source's latent, then the noise that is added to it.
    """
    import torch
    from diffusers.utils.torch_utils import randn_tensor

    generators = [torch.Generator().manual_seed(unit.noise_seed(redraw)) for unit in units]
    with torch.inference_mode():
        sampled = [
            mean + std * randn_tensor(mean.shape, generator=generator, dtype=mean.dtype)
            for (mean, std), generator in (
                (latents[unit.source], generator) for unit, generator in zip(units, generators, strict=True)
            )
        ]
        start = torch.cat(sampled).to(pipe.device) * pipe.vae.config.scaling_factor
        embeddings = {name: torch.cat([text[name] for text in texts]).to(pipe.device) for name in texts[0]}
        # The half step keeps int(steps * strength), which the pipeline computes, from falling one short.
        run = steps_at(units[0].level, args.steps)
        strength = min(1.0, (run + 0.5) / args.steps)
        return (
            pipe(
                image=start,
                strength=strength,
                num_inference_steps=args.steps,
                guidance_scale=args.text_guidance,
                generator=generators,
                output_type="pt",
                **embeddings,
            )
            .images.float()
            .cpu()
        )


def is_good(image) -> bool:
    """Whether an image (3, H, W) in [0, 1] is finite and not of one colour."""
    return bool(image.isfinite().all()) and float(image.amax((1, 2)).sub(image.amin((1, 2))).max()) > 1 / 255


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if 100 in args.levels:
        raise cli.UserError("--levels 100: that is the real image; expected levels from 0 to 99")
    hard = spectrum.read_hard(args.hard)
    prompts = spectrum.read_prompts(args.prompts, [row.label for row in hard])
    plan = make_plan(args, hard)
    if (args.out / "plan.json").exists():
        runs.stop_on_difference(args.out / "plan.json", spectrum.read_plan(args.out), plan, "delete that folder")

    by_source = {row.source: row for row in hard}
    units = [
        spectrum.Unit(row.source, level, seed) for level in plan["levels"] for row in hard for seed in range(args.seeds)
    ]
    done = {
        spectrum.Unit(row["source"], row["level"], row["seed"]) for row in spectrum.read_rows(args.out, decode=True)
    }
    todo = [unit for unit in units if unit not in done]
    total_steps = sum(steps_at(unit.level, args.steps) for unit in todo)
    print(
        f"{args.out}: {len(units)} images ({len(hard)} sources, levels {plan['levels']}, {args.seeds} seeds), "
        f"{len(units) - len(todo)} done, {len(todo)} to draw in {total_steps} denoising steps",
        flush=True,
    )
    if not todo:
        return 0

    train = datasets.load(args.dataset, args.imb_ratio).train
    names = list(dict.fromkeys(unit.source for unit in todo))
    images = dict(zip(names, datasets.read_sources(names, train, args.data_root), strict=True))
    from models import load_generator, pick_device  # takes seconds: after everything that can be wrong without it

    pipe = load_generator(args.generator, pick_device(args.device), args.revision)
    runs.write_json(args.out / "plan.json", plan)
    latents = {name: encode_source(pipe, image) for name, (image, _) in images.items()}
    chosen = {
        unit: random.Random(unit.noise_seed()).choice(prompts[by_source[unit.source].label]["prompts"]) for unit in todo
    }
    encoded = encode_prompts(pipe, list(chosen.values()))
    pipe.scheduler.set_timesteps(args.steps)
    timesteps = pipe.scheduler.timesteps[:: pipe.scheduler.order].tolist()

    shard = args.out / "shard-00000"
    for unfinished in shard.glob(".*.tmp"):  # what a killed run was writing
        unfinished.unlink()
    writer = spectrum.RowWriter(shard)
    queue = sorted(todo, key=lambda unit: (unit.level, latents[unit.source][0].shape))  # stable: the plan's order
    redraws = dict.fromkeys(queue, 0)
    failed = []

    def kind(unit: spectrum.Unit) -> tuple:
        """What the units of one batch have in common."""
        return unit.level, redraws[unit], latents[unit.source][0].shape

    with cli.progress(total_steps, "drawing", "step") as bar:
        while queue:
            (level, redraw, _), group = next(itertools.groupby(queue[: args.batch_size], kind))
            batch = list(group)
            queue = queue[len(batch) :]
            drawn = draw(pipe, batch, redraw, latents, [encoded[chosen[unit]] for unit in batch], args)
            rows = []
            for unit, image in zip(batch, drawn, strict=True):
                if not is_good(image):
                    redraws[unit] += 1
                    (queue if redraws[unit] <= MAX_REDRAWS else failed).append(unit)
                    continue
                save_image(image, shard / unit.file_name)
                run = steps_at(unit.level, args.steps)
                source = by_source[unit.source]
                rows.append(
                    {
                        "file_name": unit.file_name,
                        "source": unit.source,
                        "source_sha256": images[unit.source][1],
                        "label": source.label,
                        "class_name": source.class_name,
                        "level": unit.level,
                        "seed": unit.seed,
                        "redraws": redraws[unit],
                        "prompt": chosen[unit],
                        "text_guidance": args.text_guidance,
                        "steps": run,
                        "start_timestep": int(timesteps[args.steps - run]),
                        "width": image.shape[2],
                        "height": image.shape[1],
                        "generator": plan["generator"],
                        "revision": plan["revision"],
                        "scheduler": type(pipe.scheduler).__name__,
                    }
                )
            writer.append(rows)
            bar.update(len(rows) * steps_at(level, args.steps))
    writer.close()
    print(f"{args.out}: {len(units) - len(failed)} images, {sum(redraws.values())} redraws")
    if failed:
        print(
            f"{args.out}: {len(failed)} images stayed blank or not finite after {MAX_REDRAWS} redraws, the first "
            f"{failed[0].source} at level {failed[0].level}"
        )
        return 1
    return 0


def save_image(image, path: Path) -> None:
    """Save an image (3, H, W) in [0, 1] as PNG under its final name, whole or not at all."""
    from PIL import Image

    beside = path.with_name(f".{path.name}.tmp")
    Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy()).save(beside, format="PNG")
    beside.replace(path)


if __name__ == "__main__":
    cli.run(main)
