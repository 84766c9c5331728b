"""How fast FLYP's training steps are, against a loop as public code writes it. Both run in turn, in one process.

Ours is train_iwildcam.py's pass: images decoded at the size that is needed, each caption of a batch read once by the
text tower, bf16 autocast on a GPU. Theirs is FLYP's step as its code describes it, over open_clip: Pillow and
open_clip's transform in a DataLoader of as many workers, a caption read for each image, fp32, the loss read each step.
Random crops are drawn differently on each side: losses and features are compared after two steps of ours and of a plain
loop on the batches that ours was given.

Reads:  nothing: 480x270 JPEGs are drawn from noise, and the weights are random (or a CLIP's: --clip)
Writes: a line of JSON to --out

    python bench/bench_flyp.py --clip assets/toycam_clip --batch-size 32 --workers 0
    python bench/bench_flyp.py --architecture ViT-B-16-quickgelu --batch-size 256 --workers 16
"""

from __future__ import annotations

import copy
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageFilter
from timing import compare, note

import models
import train_iwildcam
from loaders import cameratraps
from runtime import cli
from runtime.device import pick_device
from runtime.signals import StopSignals
from training import losses


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "bench/bench_flyp")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--architecture", metavar="NAME", help="open_clip architecture, with random weights")
    model.add_argument(
        "--clip", default=cameratraps.TOYCAM_CLIP, metavar="NAME", help="or a CLIP as load_clip takes it"
    )
    cli.add_device_flag(parser)
    parser.add_argument("--batch-size", type=cli.whole(2), default=256, metavar="N", help="images in a step")
    parser.add_argument("--steps", type=cli.whole(2), default=8, metavar="N", help="steps of one measurement")
    parser.add_argument(
        "--jpegs", type=cli.whole(1), metavar="N", help="images to draw, read in turn (default: each once)"
    )
    parser.add_argument("--rounds", type=cli.whole(1), default=3, metavar="N", help="measurements; the median counts")
    parser.add_argument(
        "--workers", type=cli.whole(0), default=4, metavar="N", help="processes that decode, on each side"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/flyp.jsonl"), metavar="FILE", help="where the line is added"
    )
    return parser


def draw_data(root: Path, images: int) -> cameratraps.CameraTraps:
    """Noise with the detail of photographs as iWildCam; classes as unevenly shared as there: class k has ~ 1/(k+1)."""

    def draw(i: int) -> None:
        pixels = np.random.default_rng(i).integers(0, 256, (68, 120, 3), dtype=np.uint8)
        noise = Image.fromarray(pixels).resize((480, 270))
        noise.filter(ImageFilter.GaussianBlur(1)).save(root / f"train/{i}.jpg", quality=90)

    (root / "train").mkdir()
    with ThreadPoolExecutor() as pool:
        list(pool.map(draw, range(images + 4)))
    shares = 1 / np.arange(1, 183)
    rows = ["split,y,filename,location_remapped"]
    for i, label in enumerate(np.random.default_rng(0).choice(182, images + 4, p=shares / shares.sum())):
        split = "train" if i < images else cameratraps.SPLITS[1 + i - images]
        rows.append(f"{split},{label},{i}.jpg,{i}")
    (root / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return cameratraps.load("iwildcam", None, root, 0)


def random_clip(architecture: str, folder: Path) -> str:
    """A CLIP with random weights in a file; what load_clip takes."""
    import open_clip
    from safetensors.torch import save_file

    model = open_clip.create_model(architecture)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "clip.safetensors")
    return f"{architecture}:{folder / 'clip.safetensors'}"


def make_ours(args, data, order: np.ndarray, clip: str, device: str, *more):
    """A pass of train_iwildcam.py over the images in their order, as a function, the run's flags, and its trainer."""
    flags = ["--dataset", "iwildcam", "--clip", clip, "--batch-size", args.batch_size, "--device", device]
    flags += ["--workers", args.workers, "--precision", "bf16" if device.startswith("cuda") else "fp32"]
    flags += ["--curriculum", "none", "--out", "no_such_run", *more]
    own = train_iwildcam.build_parser().parse_args([str(flag) for flag in flags])
    trainer, _ = train_iwildcam.prepare(own, data, {}, [], set(), StopSignals())
    return lambda: trainer.train(0, order), own, trainer


def compare_steps(args, data, order: np.ndarray, clip: str, device: str) -> dict:
    """How far ours and a plain loop are apart after two steps on the same images and captions."""
    import torch

    from training.augmentations import normalise

    run, _, trainer = make_ours(args, data, order[: 2 * args.batch_size], clip, device, "--templates", "a photo of {}.")
    model, step, given = copy.deepcopy(trainer.model.clip), trainer.step, []

    def keep(batch, rate: float):
        given.append((normalise(batch.images, trainer.data.mean, trainer.data.std), batch.labels.clone(), rate))
        return step(batch, rate)

    trainer.step, decay = keep, trainer.optimizer.param_groups[0]["weight_decay"]
    optimizer, theirs = torch.optim.AdamW(model.parameters(), weight_decay=decay), []
    ours = run()["loss"]
    for pixels, labels, rate in given:
        optimizer.param_groups[0]["lr"] = rate
        theirs.append(losses.contrastive(*model(pixels, trainer.tokens[labels])[:3]))
        optimizer.zero_grad()
        theirs[-1].backward()
        optimizer.step()
    with torch.inference_mode():
        features = [torch.nn.functional.normalize(one.encode_image(given[0][0])) for one in (trainer.model.clip, model)]
    return {
        "largest_difference_of_losses": abs(ours - float(np.mean([loss.item() for loss in theirs]))),
        "largest_difference_of_features": (features[0] - features[1]).abs().max().item(),
    }


def make_theirs(args, data, order: np.ndarray, clip: str, device: str, captions: list[str]):
    """An epoch of FLYP's loop, as a function; `captions` are of the images in their order."""
    import torch
    from open_clip import image_transform

    model, _, tokenizer = models.load_clip(clip, device)
    visual = model.visual
    size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
    transform = image_transform(size, is_train=True, mean=visual.image_mean, std=visual.image_std)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.2)

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(captions)

        def __getitem__(self, index: int):
            with Image.open(data.train.images[order[index]]) as image:
                return transform(image.convert("RGB")), tokenizer(captions[index])[0]

    loader = torch.utils.data.DataLoader(
        Images(), args.batch_size, shuffle=True, num_workers=args.workers, pin_memory=device != "cpu"
    )

    def run() -> None:
        model.train()
        for pixels, texts in loader:
            pixels, texts = pixels.to(device, non_blocking=True), texts.to(device, non_blocking=True)
            loss = losses.contrastive(*model(pixels, texts)[:3])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return run


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    import torch

    device = pick_device(args.device)
    images = args.batch_size * args.steps
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        root.mkdir()
        data = draw_data(root, args.jpegs or images)
        order = np.resize(np.arange(len(data.train)), images)
        clip = random_clip(args.architecture, Path(folder)) if args.architecture else args.clip
        ours, own, _ = make_ours(args, data, order, clip, device)
        captions = [
            own.templates[i % len(own.templates)].replace("{}", data.class_names[label])
            for i, label in enumerate(data.train.labels[order])
        ]
        found = compare(ours, make_theirs(args, data, order, clip, device, captions), images, args.rounds)
        found |= compare_steps(args, data, order, clip, device)
    distinct = np.mean([len(set(captions[i : i + args.batch_size])) for i in range(0, images, args.batch_size)])
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()}-core CPU"
    row = {"part": "flyp", "model": args.architecture or args.clip, "batch_size": args.batch_size, **found}
    row |= {"captions_a_batch": float(distinct), "machine": machine, "processor": platform.machine()}
    note(args.out, row | {"workers": args.workers, "steps": args.steps})
    return 0


if __name__ == "__main__":
    cli.run(main)
