"""CLIPScore filtering against the plain loop, on a ViT-B/32 with random weights.

The plain loop scores one image at a time and embeds its source and its text again each time. Ours is
filter_clipscore.score_images: each text and each source once, images in batches, decoded by worker processes. Both get
the same images, in turn; neither time holds the loading of the model. The decode rate alone is measured too: it is the
limit where the model is faster.

Writes: OUT, a JSON with the medians of both rates in images a second, the largest difference between the scores, and
        the machine

    python bench/bench_filter.py --images 256 --plain-images 64 --size 256 --out bench/results/filter_cpu.json
    python bench/bench_filter.py --images 20000 --plain-images 500 --batch-size 512 --out bench/results/filter_cuda.json
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timing import compare, rate

import datasets
import filter_clipscore
from loaders import digits
from runtime import cli, files, runs

PER_SOURCE = 16  # 4 levels x 4 seeds


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "bench_filter")
    parser.add_argument("--images", type=cli.whole(1), default=48, metavar="N", help="synthetic images")
    parser.add_argument(
        "--plain-images", type=cli.whole(1), metavar="N", help="how many of them the plain loop scores (default: all)"
    )
    parser.add_argument("--size", type=cli.whole(32), default=512, metavar="PIXELS", help="side of an image")
    parser.add_argument("--batch-size", type=cli.whole(1), default=256, metavar="N", help="images embedded at once")
    parser.add_argument(
        "--workers", type=cli.whole(0), metavar="N", help="processes that decode (default: the script's)"
    )
    parser.add_argument("--rounds", type=cli.whole(1), default=3, metavar="N", help="measurements; the median counts")
    cli.add_device_flag(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/filter_cpu.json"), metavar="FILE", help="the file to write"
    )
    return parser


def save_model(folder: Path) -> str:
    """A CLIP of ViT-B/32's size with random weights, as a local folder."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir()
    files.write_json(
        folder / "open_clip_config.json", {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": {}}
    )
    save_file(open_clip.create_model("ViT-B-32").state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


def make_images(folder: Path, count: int, size: int) -> list[dict]:
    """Synthetic PNGs and source JPEGs with some structure in them, and their rows."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "shard-00000").mkdir(parents=True)
    rows = []
    for number in range(count):
        source = f"{number // PER_SOURCE:06d}.jpg"
        for path, is_new in (
            (folder / f"shard-00000/{number:06d}.png", True),
            (folder / source, not number % PER_SOURCE),
        ):
            if is_new:
                coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).resize((size, size), 3)
                fine = rng.integers(-8, 9, (size, size, 3))
                Image.fromarray(np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8)).save(path)
        rows.append(
            {"file_name": f"shard-00000/{number:06d}.png", "source": source, "label": number // PER_SOURCE % 10}
        )
    return rows


def plain_loop(rows: list[dict], folder: Path, prompts: dict, clip) -> dict[str, tuple[float, float]]:
    """Text and image score of each row, one image, one source and one text at a time."""
    import torch
    from PIL import Image

    from spectrum.embeddings import autocast

    scores = {}
    for row in rows:
        with torch.inference_mode(), autocast(clip.device):
            made, source = (
                clip.model.encode_image(
                    clip.preprocess(Image.open(folder / name).convert("RGB"))[None].to(clip.device)
                ).float()
                for name in (row["file_name"], row["source"])
            )
            text = clip.model.encode_text(
                clip.tokenizer([prompts[row["label"]]["score_prompt"]]).to(clip.device)
            ).float()
        scores[row["file_name"]] = tuple(torch.cosine_similarity(made, torch.cat([text, source])).tolist())
    return scores


def measure(args, rows: list[dict], folder: Path, prompts: dict[int, dict], clip) -> dict:
    """Score the images both ways, and decode them alone: rates, and the largest difference of two scores."""
    from spectrum import embeddings

    train, some, found = datasets.load("digits", 30).train, rows[: args.plain_images], {}

    def ours() -> None:
        found["ours"] = {}
        arguments = Namespace(clip="random", spectrum=folder, data_root=folder)
        filter_clipscore.score_images(rows, prompts, train, clip, arguments, found["ours"], save=lambda: None)

    def theirs() -> None:
        found["theirs"] = plain_loop(some, folder, prompts, clip)

    rates = compare(ours, theirs, len(rows), args.rounds, len(some))
    # Time the decoding alone, and compare the scores.
    read = embeddings.read_files(folder)

    def decode() -> None:
        names = [row["file_name"] for row in rows]
        sum(1 for _ in embeddings.batches(names, read, clip.preprocess, args.batch_size, clip.workers, "cpu"))

    difference = max(
        abs(one - found["ours"][name][key])
        for name, pair in found["theirs"].items()
        for one, key in zip(pair, ("text_score", "image_score"), strict=True)
    )
    return rates | {
        "decode_only": rate(decode, len(rows), args.rounds)["ours"],
        "load_average": round(os.getloadavg()[0], 1),
        "largest_difference": difference,
    }


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    import torch

    import models
    from runtime.device import pick_device
    from spectrum import embeddings

    # Make a CLIP and images, and score them both ways.
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "spectrum"
        loaded = models.load_clip(save_model(Path(scratch) / "clip"), device)
        clip = embeddings.Clip(loaded, device, args.batch_size, args.workers)
        rows = make_images(folder, args.images, args.size)
        prompts = {label: {"score_prompt": f"a photo of a {name}"} for label, name in enumerate(digits.NAMES)}
        figures = measure(args, rows, folder, prompts, clip)
    # Write the result, and stop where the scores differ.
    result = {
        "images": len(rows),
        "plain_images": len(rows[: args.plain_images]),
        "size": args.size,
        "batch_size": args.batch_size,
        "workers": clip.workers,
        "device": torch.cuda.get_device_name() if clip.device.startswith("cuda") else f"{platform.machine()} CPU",
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        **figures,
        "environment": runs.environment(),
    }
    files.write_json(args.out, result)
    print(json.dumps({name: value for name, value in result.items() if name != "environment"}, indent=2))
    # bf16 rounds otherwise in another batch size.
    most = 1e-4 if clip.device == "cpu" else 1e-2
    if figures["largest_difference"] > most:
        raise cli.UserError(f"the scores differ by {figures['largest_difference']:.1e}; expected {most:g} at most")
    return 0


if __name__ == "__main__":
    cli.run(main)
