"""How fast training is, against loops as public code writes them. Both sides of a ratio run in turn, in one process.

    cifar   ResNet-32 on 32x32 images in batches of 128: train_lt.py's pass over images on the device, against
            PIL transforms in a DataLoader and a plain fp32 loop
    loader  500x375 JPEGs, decoded, cropped at random to 224 and put into batches: training/stores.py, whose batches are
            bytes that the device flips and normalises, against torchvision's ImageFolder with its PIL transforms; the
            same number of worker processes on each side. A second line includes that work of the device, a third jitter

Reads:  nothing: images are drawn from noise
Writes: a line of JSON to --out for each part

    python bench/bench_train.py --parts cifar loader
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageFilter
from timing import compare

import models
import train_lt
from loaders import cifar
from loaders.base import IMAGENET_MEAN, IMAGENET_STD, DataSet, ImageSet
from runtime import cli
from runtime.device import pick_device
from runtime.runs import environment
from runtime.signals import StopSignals
from training import stores

MEAN, STD = cifar.STATISTICS["cifar100_lt"]


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "bench/bench_train")
    parser.add_argument(
        "--parts", nargs="+", choices=["cifar", "loader"], default=["cifar", "loader"], help="what runs"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--steps", type=cli.whole(2), default=12, metavar="N", help="steps of one measurement")
    parser.add_argument("--rounds", type=cli.whole(1), default=3, metavar="N", help="measurements; the median counts")
    parser.add_argument("--workers", type=cli.whole(0), default=2, metavar="N", help="processes that load images")
    parser.add_argument("--jpegs", type=cli.whole(8), default=256, metavar="N", help="JPEGs that the loaders read")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/train.jsonl"), metavar="FILE", help="where lines are added"
    )
    return parser


def bench_cifar(args, device: str) -> dict:
    """Training steps of ResNet-32 in batches of 128."""
    import torch
    from torch import nn
    from torchvision import transforms

    flags = ["--dataset", "cifar100_lt", "--epochs", "2", "--warmup-epochs", "0", "--out", "no_such_run"]
    if device.startswith("cuda"):
        flags += ["--precision", "bf16"]
    own = train_lt.build_parser().parse_args(flags)
    count = own.batch_size * args.steps
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 100, count)
    part = ImageSet(pixels, labels, [f"index:{i}" for i in range(count)])
    data = DataSet("bench", [str(i) for i in range(100)], part, part, part, mean=MEAN, std=STD)
    trainer, _ = train_lt.prepare(own, data, {}, [], StopSignals())

    class Plain(torch.utils.data.Dataset):
        transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int):
            return self.transform(Image.fromarray(pixels[index])), int(labels[index])

    loader = torch.utils.data.DataLoader(
        Plain(), 128, shuffle=True, num_workers=args.workers, pin_memory=device != "cpu"
    )
    model = models.build_classifier("resnet32", 100).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    criterion = nn.CrossEntropyLoss()

    def ours() -> None:
        trainer.train(0, np.arange(count))

    def theirs() -> None:
        model.train()
        for images, targets in loader:
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            loss = criterion(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return compare(ours, theirs, count, args.rounds)


def bench_loader(args, device: str, prepare: bool, jitter: float) -> dict:
    """Reading of JPEGs alone; with `prepare` up to batches that a network can take."""
    import torch
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    from training import augmentations

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "class").mkdir()
        rng = np.random.default_rng(0)
        for i in range(args.jpegs):
            # Noise at the scale of a photograph's detail: these files have about the size of ImageNet's.
            noise = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8)).resize((500, 375))
            noise.filter(ImageFilter.GaussianBlur(1)).save(root / f"class/{i:04d}.jpg", quality=92)
        steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
        steps += [transforms.ColorJitter(jitter, jitter, jitter)] if jitter else []
        steps += [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        folder_set = ImageFolder(root, transforms.Compose(steps))
        plain = torch.utils.data.DataLoader(
            folder_set, 64, shuffle=True, num_workers=args.workers, pin_memory=device != "cpu"
        )
        paths = sorted((root / "class").iterdir())
        store = stores.Decoded(paths, device, 224, args.workers)
        flags = ["--augment", "resized_crop", "--color-jitter", str(jitter)]
        own = train_lt.build_parser().parse_args(flags)

        def ours() -> None:
            places = torch.randperm(len(paths)).split(64)
            generator = torch.Generator().manual_seed(0)
            for images in store.training(places, places, 0):
                if prepare:
                    images = augmentations.augment(own, images, generator, len(images))
                    augmentations.normalise(images, IMAGENET_MEAN, IMAGENET_STD)

        def theirs() -> None:
            for images, _ in plain:
                images.to(device, non_blocking=True)

        size = statistics.mean(path.stat().st_size for path in paths)
        found = compare(ours, theirs, len(paths), args.rounds)
        return found | {"jpeg_bytes": round(size), "device_work": prepare, "color_jitter": jitter}


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    import torch

    device = pick_device(args.device)
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()}-core CPU"
    found = []
    if "cifar" in args.parts:
        found.append({"part": "cifar", **bench_cifar(args, device)})
    if "loader" in args.parts:
        cases = ((False, 0.0), (True, 0.0), (True, 0.4))
        found += [{"part": "loader", **bench_loader(args, device, *case)} for case in cases]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a", encoding="utf-8") as file:
        for row in found:
            row = {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}
            row |= {"machine": machine, "processor": platform.machine(), "workers": args.workers, "steps": args.steps}
            line = json.dumps(row | {"environment": environment()})
            print(json.dumps(row))
            file.write(line + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)
