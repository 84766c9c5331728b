"""How fast training is, against loops as public code writes them. Both sides of a ratio run in turn, in one process.

    cifar     ResNet-32 on 32x32 images in batches of 128: train_lt.py's pass over images on the device, against the
              loop of LDAM-DRW and BagofTricks-LT as their code is described: PIL transforms of torchvision in a
              DataLoader, fp32, SGD, loss and top-1 and top-5 accuracy read in each step
    v2        the same against torchvision's v2 transforms on whole uint8 tensors in a DataLoader
    plain     the same without a CUDA graph (on a GPU): what the graph is worth
    compile   cifar with --compile; on a GPU, ours with --compile against ours without, both as a CUDA graph
    together  several such runs at once, each in a process of its own, on one device: images a second of all
    loader    500x375 JPEGs, decoded, cropped at random to 224 and put into batches: training/stores.py, whose batches
              are bytes that the device flips and normalises, against torchvision's ImageFolder with its PIL transforms;
              as many worker processes on each side. A second line includes that work of the device, a third jitter
    timm      the same up to normalised batches, against timm's create_loader, which collates bytes and normalises them
              on the device too; a second line with jitter
    ffcv      the same up to bytes that are flipped, and up to normalised batches, against FFCV's loader, where that is
              installed (it is not in requirements-dev.txt: it builds with OpenCV and libturbojpeg); its file holds
              the images at --jpeg-side

Augmentations are drawn differently on each side, so that results are compared without any: of cifar the losses and
logits after two equal steps on the same batches (at a rate of 0.01: at 0.1 on noise, rounding grows tenfold a step), of
the loaders the pixels of test images.

On a GPU ours is bf16 in channels_last; the peers' loops are fp32, as theirs are, with TF32 convolutions.

Reads:  nothing: images are drawn from noise
Writes: a line of JSON to --out for each part, as soon as it is measured

    python bench/bench_train.py --parts cifar loader
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageFilter
from timing import compare, note, rate

import models
import train_lt
from loaders import cifar
from loaders.base import IMAGENET_MEAN, IMAGENET_STD, DataSet, ImageSet
from runtime import cli
from runtime.device import pick_device
from runtime.signals import StopSignals
from training import stores

MEAN, STD = cifar.STATISTICS["cifar100_lt"]
PARTS = ("cifar", "v2", "plain", "compile", "together", "loader", "timm", "ffcv")
# Of each part that reads JPEGs: whether the device's work is included, and the jitter.
LOADERS = {
    "loader": [(False, 0.0), (True, 0.0), (True, 0.4)],
    "timm": [(True, 0.0), (True, 0.4)],
    "ffcv": [(False, 0.0), (True, 0.0)],
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "bench/bench_train")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "one"], default=["cifar", "loader"], help="what runs")
    cli.add_device_flag(parser)
    parser.add_argument(
        "--steps", type=cli.whole(2), metavar="N", help="steps of one measurement (default: 300 on a GPU, 12 on a CPU)"
    )
    parser.add_argument("--rounds", type=cli.whole(1), default=3, metavar="N", help="measurements; the median counts")
    parser.add_argument("--workers", type=cli.whole(0), default=2, metavar="N", help="processes that load images")
    parser.add_argument("--jpegs", type=cli.whole(8), default=256, metavar="N", help="JPEGs that the loaders read")
    parser.add_argument(
        "--jpeg-side",
        type=cli.whole(8),
        default=500,
        metavar="PIXELS",
        help="their longer side, 4/3 of the other",
    )
    parser.add_argument("--repeat", type=cli.whole(1), default=1, metavar="N", help="how often they read each")
    parser.add_argument("--runs", type=cli.whole(1), default=4, metavar="N", help="runs at once, of part together")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/train.jsonl"), metavar="FILE", help="where lines are added"
    )
    return parser


def draw_images(count: int) -> DataSet:
    """Noise as CIFAR-100: `count` images for training, validation and test alike."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 100, count)
    part = ImageSet(pixels, labels, [f"index:{i}" for i in range(count)])
    return DataSet("bench", [str(i) for i in range(100)], part, part, part, mean=MEAN, std=STD)


def make_ours(args, device: str, *flags: str):
    """A pass of train_lt.py over the images, as a function."""
    data = draw_images(128 * args.steps)
    flags = ["--dataset", "cifar100_lt", "--epochs", "2", "--warmup-epochs", "0", "--device", device, *flags]
    flags += ["--curriculum", "none", "--out", "no_such_run"]
    if device.startswith("cuda"):
        flags += ["--precision", "bf16", "--memory-format", "channels_last"]
    own = train_lt.build_parser().parse_args(flags)
    trainer, _ = train_lt.prepare(own, data, {}, [], [], StopSignals())

    def run() -> dict:
        return trainer.train(0, np.arange(len(data.train)))

    run.trainer = trainer
    return run


def make_theirs(args, device: str, v2: bool):
    """An epoch of the peers' loop, as a function."""
    import torch
    from torch import nn
    from torchvision import transforms
    from torchvision.transforms import v2 as t

    data = draw_images(128 * args.steps).train
    pil = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    tensor = [t.RandomCrop(32, padding=4), t.RandomHorizontalFlip(), t.ToDtype(torch.float32, scale=True)]
    transform = t.Compose([*tensor, t.Normalize(MEAN, STD)])
    if not v2:
        transform = transforms.Compose([*pil, transforms.Normalize(MEAN, STD)])

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, index: int):
            pixels = data.images[index]
            image = torch.from_numpy(pixels).permute(2, 0, 1) if v2 else Image.fromarray(pixels)
            return transform(image), int(data.labels[index])

    loader = torch.utils.data.DataLoader(
        Images(), 128, shuffle=True, num_workers=args.workers, pin_memory=device != "cpu",
        persistent_workers=args.workers > 0 and device != "cpu",  # a CPU's seconds are counted when they end
    )  # fmt: skip
    model = models.build_classifier("resnet32", 100).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    criterion = nn.CrossEntropyLoss()
    torch.backends.cudnn.benchmark = True

    def run() -> None:
        model.train()
        for images, targets in loader:
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            output = model(images)
            loss = criterion(output, targets)
            right = output.detach().topk(5)[1].eq(targets[:, None])
            [loss.item(), right[:, :1].sum().item(), right.sum().item()]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def bench_cifar(args, device: str, *flags: str, v2: bool = False) -> dict:
    """Training steps of ResNet-32 in batches of 128, ours with further flags."""
    found = compare(make_ours(args, device, *flags), make_theirs(args, device, v2), 128 * args.steps, args.rounds)
    return found if v2 else found | compare_steps(device, *flags)


def compare_steps(device: str, *flags: str, steps: int = 2) -> dict:
    """How far ours and a plain loop are apart after equal steps on the same batches, which are not augmented."""
    import torch
    from torch.nn import functional as F

    run = make_ours(argparse.Namespace(steps=steps), device, "--augment", "none", "--lr", "0.01", *flags)
    trainer, data = run.trainer, run.trainer.data.train
    trainer.order = lambda places, generator: torch.arange(len(places))
    model, group = copy.deepcopy(trainer.model), trainer.optimizer.param_groups[0]
    flags = {name: group[name] for name in ("lr", "momentum", "weight_decay")}
    optimizer, losses = torch.optim.SGD(model.parameters(), **flags), []
    ours = run()["loss"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    images = ((torch.from_numpy(data.images).permute(0, 3, 1, 2) / 255 - mean) / std).to(device)
    model.train()
    for number, some in enumerate(torch.arange(len(data)).split(128)):
        optimizer.param_groups[0]["lr"] = trainer.rate(0, "epoch", number, steps)
        losses.append(F.cross_entropy(model(images[some]), torch.from_numpy(data.labels)[some].to(device)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    with torch.inference_mode():
        logits = [one.eval()(images) for one in (trainer.model, model)]
    return {
        "largest_difference_of_losses": abs(ours - statistics.mean(loss.item() for loss in losses)),
        "largest_difference_of_logits": (logits[0] - logits[1]).abs().max().item(),
    }


def bench_graph(args, device: str) -> dict:
    """Ours with a CUDA graph, against ours without, and the loss that both come to."""
    sides = [make_ours(args, device, "--cuda-graph", kind) for kind in ("on", "off")]
    found = compare(*sides, 128 * args.steps, args.rounds)
    found |= {"graph_failed": sides[0].trainer.step_graph.failed}
    return found | {f"loss_{name}": side()["loss"] for name, side in zip(("graph", "plain"), sides, strict=True)}


def bench_compiled(args, device: str) -> dict:
    """Ours with --compile, against ours without."""
    return compare(make_ours(args, device, "--compile"), make_ours(args, device), 128 * args.steps, args.rounds)


def bench_one(args, device: str) -> dict:
    """Ours alone."""
    return rate(make_ours(args, device), 128 * args.steps, args.rounds)


def bench_together(args, device: str) -> dict:
    """Several processes that train at once; each is measured while the others work."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder, f"{number}.jsonl") for number in range(args.runs)]
        command = [sys.executable, __file__, "--parts", "one", "--device", device, "--steps", str(args.steps)]
        command += ["--rounds", str(4 * args.rounds), "--out"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        running = [subprocess.Popen([*command, out], env=environment, stdout=subprocess.DEVNULL) for out in outs]
        failed = sum(process.wait() != 0 for process in running)
        found = [json.loads(out.read_text(encoding="utf-8"))["ours"] for out in outs if out.exists()]
    return {"runs": args.runs, "failed": failed, "ours": sum(found), "slowest": min(found), "fastest": max(found)}


def draw_jpegs(folder: Path, count: int, side: int = 500) -> list[Path]:
    """JPEGs of noise at the scale of a photograph's detail: of 500 pixels they have about the size of ImageNet's."""
    rng = np.random.default_rng(0)
    (folder / "class").mkdir()
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8)).resize((500, 375))
        noise = noise.filter(ImageFilter.GaussianBlur(1)).resize((side, side * 3 // 4), Image.Resampling.LANCZOS)
        noise.save(folder / f"class/{i:04d}.jpg", quality=92)
    return sorted((folder / "class").iterdir())


def bench_loader(args, device: str, root: Path, peer: str, prepare: bool, jitter: float) -> dict:
    """Reading of JPEGs alone; with `prepare` up to batches that a network can take."""
    import torch

    from training import augmentations

    paths = sorted((root / "class").iterdir()) * args.repeat
    store = stores.Decoded(paths, device, 224, args.workers)
    own = train_lt.build_parser().parse_args(["--augment", "resized_crop", "--color-jitter", str(jitter)])
    make = {"loader": make_folder_loader, "timm": make_timm_loader, "ffcv": make_ffcv_loader}[peer]
    plain = make(args, device, root, prepare, jitter)

    def ours() -> None:
        places = torch.randperm(len(paths)).split(64)
        generator = torch.Generator().manual_seed(0)
        draws = [augmentations.draw(own, 224, len(part), generator, True) for part in places]
        for images, drawn in zip(store.training(places, places, 0), draws, strict=True):
            if prepare:
                drawn = {name: value.to(device) for name, value in drawn.items()}
                augmentations.normalise(augmentations.augment(own, images, drawn), IMAGENET_MEAN, IMAGENET_STD)

    def theirs() -> None:
        for images, _ in plain:
            images.to(device, non_blocking=True)

    size = statistics.mean(path.stat().st_size for path in paths)
    found = compare(ours, theirs, len(paths), args.rounds) | compare_pixels(store, root)
    found |= {"jpeg_side": args.jpeg_side, "jpeg_bytes": round(size)}
    return found | {"device_work": prepare, "color_jitter": jitter}


def make_folder_loader(args, device: str, root: Path, prepare: bool, jitter: float):
    """torchvision's ImageFolder in a DataLoader; its workers normalise, whether asked for or not."""
    import torch
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    steps += [transforms.ColorJitter(jitter, jitter, jitter)] if jitter else []
    steps += [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    images = ImageFolder(root, transforms.Compose(steps))
    images.samples *= args.repeat
    return torch.utils.data.DataLoader(images, 64, shuffle=True, num_workers=args.workers, pin_memory=device != "cpu")


def make_timm_loader(args, device: str, root: Path, prepare: bool, jitter: float):
    """timm's loader with its defaults, but for the jitter and a last batch that may be smaller."""
    import torch
    from timm.data import create_loader
    from torchvision.datasets import ImageFolder

    images = ImageFolder(root)
    images.samples *= args.repeat
    return create_loader(
        images, (3, 224, 224), 64, is_training=True, color_jitter=jitter or None, num_workers=args.workers,
        device=torch.device(device), pin_memory=device != "cpu", persistent_workers=False,
    )  # fmt: skip


def make_ffcv_loader(args, device: str, root: Path, prepare: bool, jitter: float):
    """FFCV's loader, of a file of the same images; its threads flip, and normalise where asked for."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    path, images = root / "images.beton", ImageFolder(root)
    field = RGBImageField(write_mode="jpg", max_resolution=args.jpeg_side, jpeg_quality=92)
    DatasetWriter(str(path), {"image": field, "label": IntField()}, num_workers=1).from_indexed_dataset(images)
    steps = [RandomResizedCropRGBImageDecoder((224, 224)), RandomHorizontalFlip()]
    if prepare:
        mean, std = (np.array(values) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD))
        steps.append(NormalizeImage(mean, std, np.float32))
    return Loader(
        str(path), batch_size=64, num_workers=max(1, args.workers), order=OrderOption.RANDOM, os_cache=True,
        indices=np.tile(np.arange(len(images)), args.repeat), drop_last=False,
        pipelines={"image": [*steps, ToTensor(), ToTorchImage()], "label": [IntDecoder(), ToTensor()]},
    )  # fmt: skip


def compare_pixels(store, root: Path) -> dict:
    """How far test images of ours are from ImageFolder's with the same central part resized to 224, of 255; of 64."""
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import functional

    with Image.open(next((root / "class").iterdir())) as image:
        left, top, right, bottom = map(round, stores.centre_box(*image.size, store.crop.zoom))
    part = (top, left, bottom - top, right - left)
    folder_set = ImageFolder(
        root, lambda image: functional.pil_to_tensor(functional.resized_crop(image, *part, (224,) * 2))
    )
    count = min(64, len(folder_set))
    theirs = torch.stack([folder_set[place][0] for place in range(count)]).int()
    ours = torch.cat(list(store.evaluation(np.arange(count), count))).cpu().int()
    apart = (ours - theirs).abs()
    return {
        "largest_difference_of_pixels": apart.max().item(),
        "mean_difference_of_pixels": apart.float().mean().item(),
    }


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    import torch

    device = pick_device(args.device)
    cuda = device.startswith("cuda")
    args.steps = args.steps or (300 if cuda else 12)
    machine = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()}-core CPU"
    simple = {
        "cifar": lambda: bench_cifar(args, device),
        "v2": lambda: bench_cifar(args, device, v2=True),
        "plain": lambda: bench_graph(args, device),
        "compile": lambda: bench_compiled(args, device) if cuda else bench_cifar(args, device, "--compile"),
        "one": lambda: bench_one(args, device),
        "together": lambda: bench_together(args, device),
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        work = [(part, simple[part]) for part in args.parts if part in simple]
        peers = [part for part in args.parts if part in LOADERS]
        if peers:
            draw_jpegs(root, args.jpegs, args.jpeg_side)
        for peer in peers:
            for case in LOADERS[peer]:
                work.append((peer, lambda peer=peer, case=case: bench_loader(args, device, root, peer, *case)))
        # One part that fails costs no other its result.
        failed = 0
        for part, measure in work:
            began = time.monotonic()
            try:
                found = measure()
            except Exception as error:
                failed += 1
                found = {"error": cli.first_line(error)}
            row = {"part": part, **found, "machine": machine, "processor": platform.machine()}
            row |= {"threads": torch.get_num_threads(), "workers": args.workers, "steps": args.steps}
            note(args.out, row | {"seconds": time.monotonic() - began})
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
