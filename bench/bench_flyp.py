"""How fast FLYP's training steps are, against a loop as public code writes it. Both run in turn, in one process.

Ours is train_iwildcam.py's pass: images decoded ahead by workers at the size that is needed, each caption of a batch
read once by the text tower, bf16 autocast on a GPU. The plain loop decodes with Pillow and open_clip's transform in the
loop itself, reads a caption for each image, and computes in fp32; a second one decodes in as many workers as ours.

Reads:  nothing: 480x270 JPEGs are drawn from noise, and the weights are random (or a CLIP's: --clip)
Writes: a line of JSON to --out

    python bench/bench_flyp.py --clip assets/toycam_clip --batch-size 32 --workers 0
    python bench/bench_flyp.py --architecture ViT-B-16-quickgelu --batch-size 256 --workers 16
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageFilter
from timing import compare

import models
import train_iwildcam
from loaders import cameratraps
from runtime import cli
from runtime.device import pick_device
from runtime.runs import environment
from runtime.signals import StopSignals
from training import losses


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "bench/bench_flyp")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--architecture", metavar="NAME", help="open_clip architecture, with random weights")
    model.add_argument(
        "--clip", default=cameratraps.TOYCAM_CLIP, metavar="NAME", help="or a CLIP as load_clip takes it"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--batch-size", type=cli.whole(2), default=256, metavar="N", help="images in a step")
    parser.add_argument("--steps", type=cli.whole(2), default=8, metavar="N", help="steps of one measurement")
    parser.add_argument("--rounds", type=cli.whole(1), default=3, metavar="N", help="measurements; the median counts")
    parser.add_argument("--workers", type=cli.whole(0), default=4, metavar="N", help="processes that decode, of ours")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/flyp.jsonl"), metavar="FILE", help="where the line is added"
    )
    return parser


def draw_data(root: Path, images: int) -> cameratraps.CameraTraps:
    """Noise with the detail of photographs as iWildCam; classes as unevenly shared as there: class k has ~ 1/(k+1)."""
    rng = np.random.default_rng(0)
    (root / "train").mkdir()
    shares = 1 / np.arange(1, 183)
    rows = ["split,y,filename,location_remapped"]
    for i, label in enumerate(rng.choice(182, images + 4, p=shares / shares.sum())):
        noise = Image.fromarray(rng.integers(0, 256, (68, 120, 3), dtype=np.uint8)).resize((480, 270))
        noise.filter(ImageFilter.GaussianBlur(1)).save(root / f"train/{i}.jpg", quality=90)
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


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    import torch
    from open_clip import image_transform

    device = pick_device(args.device)
    cuda = device.startswith("cuda")
    images = args.batch_size * args.steps
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        root.mkdir()
        data = draw_data(root, images)
        clip = random_clip(args.architecture, Path(folder)) if args.architecture else args.clip
        flags = [
            "--dataset",
            "iwildcam",
            "--data-root",
            str(root),
            "--clip",
            clip,
            "--batch-size",
            str(args.batch_size),
        ]
        flags += ["--device", device, "--workers", str(args.workers), "--precision", "bf16" if cuda else "fp32"]
        own = train_iwildcam.build_parser().parse_args([*flags, "--out", f"{folder}/no_such_run"])
        trainer, _ = train_iwildcam.prepare(own, data, {}, StopSignals())
        places = np.arange(images)
        model, _, tokenizer = models.load_clip(clip, device)
        visual = model.visual
        size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
        transform = image_transform(size, is_train=True, mean=visual.image_mean, std=visual.image_std)
        captions = [
            own.templates[i % len(own.templates)].replace("{}", data.class_names[label])
            for i, label in enumerate(data.train.labels)
        ]
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.2)

        class Plain(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return images

            def __getitem__(self, index: int):
                with Image.open(data.train.images[index]) as image:
                    return transform(image.convert("RGB")), captions[index]

        def plain(workers: int):
            loader = torch.utils.data.DataLoader(
                Plain(), args.batch_size, shuffle=True, num_workers=workers, pin_memory=cuda
            )

            def run() -> None:
                model.train()
                for pixels, texts in loader:
                    image, text, scale = model(pixels.to(device, non_blocking=True), tokenizer(texts).to(device))
                    loss = losses.contrastive(image, text, scale)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    loss.item()

            return run

        def ours() -> None:
            trainer.train(0, places)

        row = {"part": "flyp", "model": args.architecture or args.clip, "batch_size": args.batch_size}
        row |= compare(ours, plain(0), images, args.rounds)
        if args.workers:
            beside = compare(ours, plain(args.workers), images, args.rounds)
            row |= {"theirs_with_workers": beside["theirs"], "ratio_with_workers": beside["ratio"]}
        distinct = np.mean([len(set(captions[i : i + args.batch_size])) for i in range(0, images, args.batch_size)])
    machine = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()}-core CPU"
    row = {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}
    row |= {"captions_a_batch": round(float(distinct), 1), "machine": machine, "processor": platform.machine()}
    row |= {"workers": args.workers, "steps": args.steps}
    print(json.dumps(row))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row | {"environment": environment()}) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
