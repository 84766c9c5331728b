"""Step 3: draw the synthetic-to-real spectrum of each hard image by image-guided diffusion.

Guidance level 100 is the real image and 0 text only: an image of level L is the source, noised to the start step of
strength 1 - L/100 and denoised under a prompt of its class (SDEdit; DisCL).

Reads:  hard.csv, prompts.json, the images that hard.csv names
Writes: OUT/plan.json, OUT/shard-00000/*.png and its metadata.jsonl (a row an image; see spectrum/folder.py)

The noise of an image depends on its source, level and seed alone. Killed at any moment, the same command goes on where
it was; SIGTERM and SIGUSR2 end it after the batch in flight, with exit code 75. A folder that was begun with other
settings is left alone. Images that cannot be drawn are listed in the shard's failures.jsonl and make the exit code 1.

Several processes share the work by --shard 0/4 to --shard 3/4; what one has drawn none draws again, so that a spectrum
begun with four shards may be finished with sixteen. --plan takes further images into the plan, for good: a CSV file
with the columns source,level,seed,prompt, whose prompt may be empty (then one of the class's, as everywhere).

With --score, CLIPScore is taken of the images while they are still in memory, as filter_clipscore.py would take it of
their files, which then reads no image again. An image under the threshold is drawn again, with another prompt of its
class and other noise, up to --max-redraws times, and the best is kept (DisCL).

Sources are drawn at their own size unless --size says otherwise, each side rounded to the nearest multiple of what the
generator's autoencoder divides by (8 for all published ones: 480x270 becomes 480x272), and saved as drawn unless
--save-size says otherwise. Small images want --size 512x512 --save-size source: generators are poor at small sizes.

    python generate_spectrum.py --hard runs/hard.csv --prompts runs/prompts.json --out runs/spectrum
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from PIL import Image

import datasets
from generation import loras as lora_files
from generation import worklist
from generation.worklist import Batch, steps_at
from generation.writer import BYTES_PER_PIXEL, SAVE_OPTIONS, ImageWriter, Reader, Sources, draw_size, resize
from runtime import cli, runs
from spectrum import folder as spectrum_folder

MAX_REDRAWS = 3
# A model that does not work is noticed after so many images, of which more than half were blank or not finite.
TRIAL = 256


def size(text: str) -> str | tuple[int, int]:
    """The argparse type of a size in pixels: WIDTHxHEIGHT, source or native."""
    width, _, height = text.partition("x")
    if text in ("source", "native"):
        return text
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected WIDTHxHEIGHT in pixels, source or native")
    return int(width), int(height)


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "generate_spectrum")
    datasets.add_flags(parser)
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
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="number type that the generator runs in; auto is bfloat16 on a GPU and float32 on a CPU",
    )
    group.add_argument(
        "--scheduler",
        choices=["shipped", "ddim", "euler", "dpm++2m"],
        default="shipped",
        help="sampler; shipped is the one that the generator comes with",
    )
    group.add_argument(
        "--lora", type=Path, metavar="PATH", help="LoRA adapter to draw with: .safetensors file, or folder of one"
    )
    group.add_argument(
        "--lora-by-class",
        type=cli.existing_folder,
        metavar="FOLDER",
        help="LoRA adapters of each class: INDEX.safetensors or a folder INDEX for every class of hard.csv",
    )
    group.add_argument(
        "--tuned",
        type=cli.existing_folder,
        metavar="FOLDER",
        help="draw with the adapters of this folder of tune_generator.py, whose shots.csv and prompts.json take the "
        "place of the defaults of --hard and --prompts",
    )
    group.add_argument(
        "--per-class",
        type=cli.whole(1),
        metavar="N",
        help="draw N images of each class from text alone, shared out among its sources, which only name them; with "
        "--levels 0 and --pure-noise, instead of --seeds",
    )
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
    group.add_argument(
        "--pure-noise",
        action="store_true",
        help="start level 0 from noise alone; else from the source at strength 1, as the paper does, which leaves a "
        "trace of the source's brightness",
    )
    group.add_argument(
        "--plan",
        type=cli.existing_file,
        metavar="FILE",
        help="further images, taken into the plan: a CSV file with the columns source,level,seed,prompt",
    )
    group = parser.add_argument_group("images")
    group.add_argument(
        "--size",
        type=size,
        default="source",
        metavar="WxH",
        help="pixels to draw at: source (the source's size), native (its shape, the area that the generator was made "
        "for) or WIDTHxHEIGHT; sides are rounded to what the generator divides by",
    )
    group.add_argument(
        "--save-size",
        type=size,
        metavar="WxH",
        help="pixels to save at: source (the source's size) or WIDTHxHEIGHT; without it, as drawn",
    )
    group.add_argument(
        "--format", choices=list(SAVE_OPTIONS), default="png", help="of the files; jpg and webp at quality 95"
    )
    group = parser.add_argument_group("score while drawing")
    group.add_argument(
        "--score",
        action="store_true",
        help="take the CLIPScore of each image, and draw those under the threshold again; the best of each is kept",
    )
    group.add_argument(
        "--clip",
        metavar="NAME",
        help="for --score: open_clip model, ARCHITECTURE:TAG, ARCHITECTURE:FILE, hf-hub:NAME or folder",
    )
    group.add_argument(
        "--threshold", type=cli.number(-1, 1), metavar="COSINE", help="for --score: text scores from here up are enough"
    )
    group.add_argument(
        "--max-redraws",
        type=cli.whole(0),
        default=5,
        metavar="N",
        help="for --score: how often an image is drawn again, each time with another prompt of its class",
    )
    group = parser.add_argument_group("how")
    group.add_argument(
        "--batch-size",
        type=cli.whole(1),
        default=32,
        metavar="N",
        help="images drawn at once; the images stay the same, up to rounding",
    )
    group.add_argument(
        "--shard",
        type=cli.shard,
        default=cli.Shard(0, 1),
        metavar="I/N",
        help="which share of the work to do, from 0/N up",
    )
    group.add_argument(
        "--cache-mb",
        type=cli.whole(0),
        default=4096,
        metavar="MB",
        help="memory for encoded sources and prompts, which are encoded again where it does not suffice",
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the UNet; minutes at first, faster on a GPU after that"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group = parser.add_argument_group("instead of drawing")
    group.add_argument(
        "--dry-run", action="store_true", help="print what there is to draw, in images, steps, hours and bytes"
    )
    group.add_argument(
        "--steps-per-second",
        type=cli.number(1e-6),
        metavar="RATE",
        help="for --dry-run: denoising steps a second, as the progress bar shows; without it, that of the last run",
    )
    group.add_argument("--check", action="store_true", help="check every row and image of --out, and nothing else")
    return parser


def make_plan(args, hard: list[spectrum_folder.Hard], dtype: str, loras: dict[str, Path]) -> dict:
    """Everything that determines the images."""
    score = None
    if args.score:
        rule = {"threshold": args.threshold, "max_redraws": args.max_redraws}
        score = spectrum_folder.describe_clip(args.clip) | rule
    local = Path(args.generator)
    if local.is_dir():  # a folder may move or be trained again: its content is what counts
        files = sorted(path for path in local.rglob("*") if path.suffix in (".safetensors", ".json", ".txt"))
        revision = runs.digest_files(files)
    else:
        revision = args.revision or "main"
    return {
        "dataset": args.dataset,
        "imb_ratio": args.imb_ratio,
        "data_seed": args.data_seed,
        "sources": len(hard),
        "hard_classes": sorted({row.label for row in hard}),
        "hard_digest": runs.digest_files([args.hard]),
        "prompts_digest": runs.digest_files([args.prompts]),
        "levels": sorted(set(args.levels)),
        "seeds": args.seeds,
        **({"per_class": args.per_class} if args.per_class else {}),
        "steps": args.steps,
        "text_guidance": args.text_guidance,
        "generator": local.name if local.is_dir() else args.generator,
        "revision": revision,
        "dtype": dtype,
        "loras": {name: runs.digest_files([path]) for name, path in loras.items()},
        "scheduler": args.scheduler,
        "pure_noise": args.pure_noise,
        "size": args.size if isinstance(args.size, str) else list(args.size),
        "save_size": list(args.save_size) if isinstance(args.save_size, tuple) else args.save_size,
        "format": args.format,
        "score": score,
    }


def choose_prompt(unit: spectrum_folder.Unit, texts: list[str], another: int = 0) -> str:
    """The prompt of a unit, by its digest.

    Args:
        another: from 1 up, the others one after another instead, and then from the first of them again.
    """
    rng = random.Random(unit.noise_seed())
    first = rng.choice(texts)
    others = [text for text in texts if text != first]
    if not another or not others:
        return first
    rng.shuffle(others)
    return others[(another - 1) % len(others)]


def read_sizes(names: list[str], sources: Sources) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Width and height of each source, and for those that cannot be opened why not."""

    def look(name: str) -> tuple[int, int] | str:
        try:
            return sources.size(name)
        except cli.UserError as error:
            if name not in sources.places and name.startswith("index:"):
                raise  # other data than hard.csv was made from: all of it is wrong, not this image
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(names, pool.map(look, names), strict=True))
    sizes = {name: size for name, size in found.items() if not isinstance(size, str)}
    unreadable = {name: why for name, why in found.items() if isinstance(why, str)}
    if not sizes:
        raise cli.UserError(next(iter(unreadable.values())))
    return sizes, unreadable


def plan_batches(
    args, plan: dict, seeds: dict[str, int], extra: list[dict], names: list[str], size_of, adapter_of
) -> list[Batch]:
    """The batches of this process's shard; `seeds` has the images of a level by source.

    The plan and each file of further units are shared out one after another: a file that is added while processes are
    at work then takes nothing from one of them to give it to another.
    """
    readable = set(names)
    lists = [worklist.order_units({name: seeds[name] for name in names}, plan["levels"])]
    lists += [sorted(unit for unit in units if unit.source in readable) for units in extra]
    mine = []
    for units in lists:
        batches = worklist.make_batches(units, size_of, args.batch_size, adapter_of)
        mine += worklist.share_out(batches, args.steps, args.shard.count)[args.shard.index]
    return mine


def leave_out_planned(extra: list[dict], plan: dict, seeds: dict[str, int], prompt_of) -> list[dict]:
    """Further units without those that the plan holds itself.

    Raises:
        UserError: one of these is to have another prompt than the plan's.
    """
    kept = []
    for units in extra:
        kept.append({})
        for unit, prompt in units.items():
            if unit.level not in plan["levels"] or unit.seed >= seeds[unit.source]:
                kept[-1][unit] = prompt
            elif prompt and prompt != prompt_of(unit):
                raise cli.UserError(
                    f"--plan: {unit.source} at level {unit.level}, seed {unit.seed}, is in the plan with the prompt "
                    f"{prompt_of(unit)!r}; expected a seed of {seeds[unit.source]} or more for another prompt"
                )
    return kept


def print_forecast(args, todo: list[Batch], sizes: dict[str, tuple[int, int]]) -> None:
    """What drawing these batches takes; `sizes` has the sources' own width and height."""
    count = sum(len(batch.units) for batch in todo)
    steps = sum(steps_at(batch.level, args.steps) * len(batch.units) for batch in todo)
    by_level = Counter()
    for batch in todo:
        by_level[batch.level] += len(batch.units)
    for level, number in sorted(by_level.items()):
        print(f"  level {level:>2}: {number} images of {steps_at(level, args.steps)} steps")
    speeds = [runs.read_json(path) for path in args.out.glob("shard-*/speed.json")]
    rate = args.steps_per_second or max((speed["steps_per_second"] for speed in speeds), default=None)
    hours = f"{steps / rate / 3600:.2f} hours at {rate:.4g} steps a second" if rate else (
        "time unknown: no run here yet to go by, and no --steps-per-second"
    )  # fmt: skip
    pixels = sum(len(batch.units) * batch.size[0] * batch.size[1] for batch in todo)
    sample = [path.stat().st_size for path in list(args.out.glob(f"shard-*/*.{args.format}"))[:1000]]
    if isinstance(args.save_size, tuple):
        pixels = count * args.save_size[0] * args.save_size[1]
    elif args.save_size == "source":
        pixels = sum(math.prod(sizes[unit.source]) for batch in todo for unit in batch.units)
    gigabytes = (sum(sample) / len(sample) * count if sample else pixels * BYTES_PER_PIXEL[args.format]) / 1e9
    place = next(folder for folder in [args.out.resolve(), *args.out.resolve().parents] if folder.exists())
    print(
        f"  {count} images, {len(todo)} batches, {steps} denoising steps: {hours}; about {gigabytes:.3g} GB of "
        f"{shutil.disk_usage(place).free / 1e9:.4g} GB free"
    )
    if args.score:
        print(f"  besides: images under --threshold {args.threshold:g} are drawn up to {args.max_redraws} times again")


class Job:
    """The drawing of one shard.

    Args:
        args: of the command line.
        plan: what determines the images.
        folder: the shard's folder.
        hard: hard images by source.
        prompt_of: the prompt of a unit at a redraw, 0 for its first drawing.
        size_of: width and height at which a source is drawn.
        adapter_of: name of the LoRA adapter that a source is drawn with, None where all have the same.
        sizes: the sources' own width and height, where they matter.
        reader: reads the sources; it may know of some already that they cannot be read.
        scorer: an embeddings.Scorer with --score, else None.
    """

    def __init__(
        self, args, plan: dict, folder: Path, hard: dict, prompt_of, size_of, adapter_of, sizes, reader, scorer
    ):
        self.args, self.plan, self.folder, self.hard, self.sizes = args, plan, folder, hard, sizes
        self.prompt_of, self.size_of, self.adapter_of, self.reader = prompt_of, size_of, adapter_of, reader
        self.scorer = scorer
        self.saved = self.redraws = self.reached = 0
        self.failed: list[spectrum_folder.Unit] = []
        self.at_once: dict[tuple[int, int], int] = {}  # of a size, set where a batch did not fit into memory

    def draw(
        self, pipe, todo: list[Batch], done: set[spectrum_folder.Unit], stop: runs.StopSignals, adapters=None
    ) -> None:
        """Draw batches. What is done of a batch is drawn with it, for the sake of the others, but not saved again."""
        from generation.generator import Generator

        args = self.args
        self.generator = Generator(pipe, args.steps, args.text_guidance, args.pure_noise, args.cache_mb, adapters)
        if args.compile:
            pipe.unet.compile()
        self.scheduler = type(pipe.scheduler).__name__
        total = sum(steps_at(batch.level, args.steps) * len(batch.units) for batch in todo)
        began = time.monotonic()
        with ImageWriter(self.folder) as writer, cli.progress(total, "drawing", "step") as bar:
            for redraw in range(1 if self.scorer else MAX_REDRAWS + 1):
                for batch, following in itertools.zip_longest(todo, todo[1:]):
                    if stop.received:
                        break
                    self.draw_batch(batch, following, redraw, done, writer)
                    bar.update(steps_at(batch.level, args.steps) * len(batch.units))
                    self.stop_if_broken(writer)
                writer.drain()
                self.stop_if_broken(writer)
                units = [spectrum_folder.Unit(row["source"], row["level"], row["seed"]) for row in writer.rejected]
                writer.rejected.clear()
                todo = worklist.make_batches(units, self.size_of, args.batch_size, self.adapter_of)
                if stop.received or not todo:
                    break
            else:
                self.failed = units
        self.saved = writer.saved
        if not stop.received:
            speed = {"steps_per_second": total / (time.monotonic() - began), "batch_size": args.batch_size}
            runs.write_json(self.folder / "speed.json", speed | {"seconds_waited_for_disk": writer.waited})

    def draw_batch(self, batch: Batch, following: Batch | None, redraw: int, done: set, writer) -> None:
        """Draw a batch, while the sources of the following one are being read."""
        found = self.read_sources(batch)
        if following:  # what this batch reads too will be encoded by then: read again it would stay in memory for good
            here = {unit.source for unit in batch.units}
            ahead = [source for source in self.missing_sources(following) if source not in here]
            self.reader.begin(ahead, following.size)
        batch = batch._replace(units=[unit for unit in batch.units if unit.source not in self.reader.unreadable])
        if done.issuperset(batch.units):
            return
        if self.scorer:
            pixels, good, arrived, rows = self.draw_best(batch, found)
        else:
            pixels, good, arrived = self.draw_once(batch, redraw, found)
            rows = [self.row(unit, redraw, batch.size) for unit in batch.units]
        todo = [None if unit in done else row for unit, row in zip(batch.units, rows, strict=True)]
        if self.scorer:
            self.reached += sum(row is not None and row["text_score"] >= self.args.threshold for row in todo)
        writer.put(pixels, good, arrived, todo)

    def missing_sources(self, batch: Batch) -> list[str]:
        """The sources of a batch whose images are needed: by the generator, or by the scorer."""
        wanted = self.generator.missing_sources(batch)
        if self.scorer:
            wanted = list(dict.fromkeys(wanted + self.scorer.missing(unit.source for unit in batch.units)))
        return wanted

    def read_sources(self, batch: Batch) -> dict:
        """The images of a batch's sources that are needed, but for the unreadable ones. The scorer gets its own."""
        found = self.reader.finish(self.missing_sources(batch), batch.size)
        if self.scorer:
            self.scorer.add_sources(self.reader.prepared)
            self.reader.prepared.clear()
        return found

    def prompt(self, unit: spectrum_folder.Unit, redraw: int) -> str:
        """The prompt of a drawing: another one at each redraw for a better score, the same where it was only blank."""
        return self.prompt_of(unit, redraw if self.scorer else 0)

    def draw_once(self, batch: Batch, redraw: int, found: dict) -> tuple:
        """Draw a batch: what generator.to_host gives of it."""
        import torch

        from generation.generator import to_host

        size, parts = f"{batch.size[0]}x{batch.size[1]}", []
        self.redraws += len(batch.units) if redraw else 0
        while batch.units:
            most = self.at_once.get(batch.size, self.args.batch_size)
            if not self.args.compile:
                most = min(most, len(batch.units))
            some = batch._replace(units=batch.units[:most])
            if parts:  # the part before may have driven encoded sources out of memory
                found = found | self.read_sources(some)
            texts = [self.prompt(unit, redraw) for unit in some.units]
            try:
                drawn = self.generator.draw(some, redraw, texts, found, most if self.args.compile else 0)
                parts.append(to_host(drawn))
                batch = batch._replace(units=batch.units[most:])
                continue
            except torch.OutOfMemoryError:
                if most == 1:
                    raise cli.UserError(
                        f"--size: one image of {size} does not fit into this device's memory; expected a smaller size"
                    ) from None
            # Not within the except clause, whose exception holds what has to be freed.
            torch.cuda.empty_cache()
            self.at_once[batch.size] = most // 2
            print(f"{most} images of {size} do not fit into this device's memory: {most // 2} at once", flush=True)
        if len(parts) == 1:
            return parts[0]
        for _, _, arrived in parts:
            arrived()
        pixels, good, _ = zip(*parts, strict=True)
        return torch.cat(pixels), torch.cat(good), lambda: None

    def draw_best(self, batch: Batch, found: dict) -> tuple:
        """Draw a batch, and those of its images that are under the threshold again and again; the best of each (DisCL).

        The redraws of a batch follow from its own images alone, so that neither a kill nor the number of shards changes
        them.

        Returns:
            As `generator.to_host`, and the images' rows.
        """
        import torch

        args, waiting = self.args, list(range(len(batch.units)))
        best: list[tuple] = [(-math.inf,)] * len(waiting)
        for redraw in range(args.max_redraws + 1):
            some = batch._replace(units=[batch.units[place] for place in waiting])
            # Encoded sources that the bound on memory has driven out since are read again.
            pixels, good, arrived = self.draw_once(some, redraw, self.read_sources(some) if redraw else found)
            arrived()
            rows = [self.row(unit, redraw, batch.size) for unit in some.units]
            pictures = [
                resize(Image.fromarray(one.numpy()), (row["width"], row["height"]))
                for one, row in zip(pixels, rows, strict=True)
            ]
            scores = self.scorer.score(pictures, [row["label"] for row in rows], [unit.source for unit in some.units])
            for place, one, fine, row, text, image in zip(waiting, pixels, good.tolist(), rows, *scores, strict=True):
                fine = fine and math.isfinite(text + image)
                score = text if fine else -math.inf
                if redraw == 0 or score > best[place][0]:
                    best[place] = score, one, fine, row | {"text_score": text, "image_score": image}
            waiting = [place for place in waiting if best[place][0] < args.threshold]
            if not waiting:
                break
        _, pixels, good, rows = zip(*best, strict=True)
        return torch.stack(pixels), torch.tensor(good), arrived, list(rows)

    def stop_if_broken(self, writer: ImageWriter) -> None:
        """Raise UserError where most of what was drawn is not good, before a day is spent on it."""
        rejected = len(writer.rejected)
        if writer.seen >= TRIAL and rejected > writer.seen / 2:
            raise cli.UserError(
                f"{rejected} of the first {writer.seen} images are blank or not finite: {self.args.generator} does not "
                f"work in {self.plan['dtype']}; expected another --dtype or --generator"
            )

    def row(self, unit: spectrum_folder.Unit, redraw: int, drawn: tuple[int, int]) -> dict:
        """The row of an image in metadata.jsonl, but for its scores."""
        args, source = self.args, self.hard[unit.source]
        width, height = {None: drawn, "source": self.sizes.get(unit.source)}.get(args.save_size, args.save_size)
        return {
            "file_name": str(Path(unit.file_name).with_suffix(f".{args.format}")),
            "source": unit.source,
            "source_sha256": self.reader.digest(unit.source),
            "label": source.label,
            "class_name": source.class_name,
            "level": unit.level,
            "seed": unit.seed,
            "redraws": redraw,
            "prompt": self.prompt(unit, redraw),
            "text_guidance": args.text_guidance,
            "steps": steps_at(unit.level, args.steps),
            "start_timestep": self.generator.start_timestep(unit.level),
            "width": width,
            "height": height,
            "generator": self.plan["generator"],
            "revision": self.plan["revision"],
            "scheduler": self.scheduler,
        }

    def report(self) -> int:
        """Say what was drawn, write failures.jsonl where something was not, and give the exit code."""
        failures = [
            {"source": name, "level": None, "seed": None, "reason": why}
            for name, why in sorted(self.reader.unreadable.items())
        ]
        redraws = self.args.max_redraws if self.scorer else MAX_REDRAWS
        failures += [unit._asdict() | {"reason": f"blank or not finite, {redraws} redraws"} for unit in self.failed]
        path = self.folder / "failures.jsonl"
        path.unlink(missing_ok=True)
        reached = f", {self.reached} of them with a CLIPScore of {self.args.threshold:g} or more" if self.scorer else ""
        print(f"{self.args.out}: {self.saved} images drawn, {self.redraws} redraws{reached}")
        if not failures:
            return 0
        runs.write_text(path, "".join(json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures))
        if self.reader.unreadable:
            print(f"{len(self.reader.unreadable)} sources cannot be read, the first: {failures[0]['reason']}")
        if self.failed:
            print(
                f"{len(self.failed)} images stayed blank or not finite after {redraws} redraws, the first "
                f"{self.failed[0].source} at level {self.failed[0].level}"
            )
        print(f"{path}: all that could not be drawn")
        return 1


def find_loras(args, hard: list[spectrum_folder.Hard]) -> dict[str, Path]:
    """The adapter files that the arguments name, by adapter: `all`, or `class_3` and so on."""
    given = [name for name in ("lora", "lora_by_class", "tuned") if getattr(args, name)]
    if len(given) > 1:
        raise cli.UserError("--lora, --lora-by-class and --tuned: expected one of them")
    if not given:
        return {}
    labels = sorted({row.label for row in hard})
    if not args.tuned:
        by_class = labels if args.lora_by_class else None
        return lora_files.find_loras(args.lora or args.lora_by_class, by_class, f"--{given[0].replace('_', '-')}")
    import models

    names = {row.label: row.class_name for row in hard}
    return lora_files.find_tuned(args.tuned, names, models.describe_generator(args.generator, args.revision))[0]


def complete_flags(args) -> None:
    """Defaults that follow from other flags: the inputs of --tuned, and what --per-class draws."""
    defaults = build_parser()
    for name, file in (("hard", "shots.csv"), ("prompts", "prompts.json")):
        if args.tuned and getattr(args, name) == defaults.get_default(name):
            setattr(args, name, args.tuned / file)
    if args.per_class:
        args.levels, args.pure_noise = [0], True


def seeds_of(args, hard: list[spectrum_folder.Hard]) -> dict[str, int]:
    """How many images of a level each source has: --seeds, or its share of its class's --per-class."""
    if not args.per_class:
        return dict.fromkeys((row.source for row in hard), args.seeds)
    found = {}
    by_class = Counter(row.label for row in hard)
    before: Counter = Counter()
    for row in hard:
        share, rest = divmod(args.per_class, by_class[row.label])
        found[row.source] = share + (before[row.label] < rest)
        before[row.label] += 1
    return found


def build_scorer(args, prompts: dict[int, dict], hard: dict[str, spectrum_folder.Hard]):
    """The CLIP that --score names, and the texts of the hard classes."""
    import models
    from runtime.device import pick_device
    from spectrum import embeddings

    device = pick_device(args.device)
    clip = embeddings.Clip(models.load_clip(args.clip, device), device, args.batch_size, workers=0)
    labels = sorted({row.label for row in hard.values()})
    return embeddings.Scorer(clip, {label: prompts[label]["score_prompt"] for label in labels})


def finished(args) -> bool:
    """Whether every image of the plan is drawn, by whichever shard; further images of a --plan are not looked for.

    Nor is it looked whether one is damaged, which takes hours for a million: --check does.
    """
    if args.plan or not (args.out / "plan.json").is_file():
        return False
    complete_flags(args)
    hard = spectrum_folder.read_hard(args.hard)
    plan = spectrum_folder.read_plan(args.out)
    if plan != make_plan(args, hard, plan.get("dtype", ""), find_loras(args, hard)):
        return False  # the script itself says what differs
    units = set(worklist.order_units(seeds_of(args, hard), plan["levels"]))
    return len(spectrum_folder.drawn_units(args.out, units)) == len(units)


def most_shards(args) -> int:
    """How many shards have something to draw: one for each batch, where all sources have one size."""
    complete_flags(args)
    units = sum(seeds_of(args, spectrum_folder.read_hard(args.hard)).values())
    return len(set(args.levels)) * -(-units // args.batch_size)


def print_check(folder: Path) -> int:
    """Print what is wrong with a spectrum folder."""
    count, wrong = spectrum_folder.check(folder)
    for line in wrong:
        print(line)
    plan = spectrum_folder.read_plan(folder)
    planned = plan["sources"] * len(plan["levels"]) * plan["seeds"]
    if plan.get("per_class"):
        planned = plan["per_class"] * len(plan["hard_classes"])
    print(f"{folder}: {count} images with a row, {planned} in plan.json, {len(wrong)} things wrong")
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.check:
        return print_check(args.out)
    complete_flags(args)
    if 100 in args.levels:
        raise cli.UserError("--levels 100: that is the real image; expected levels from 0 to 99")
    if args.save_size == "native":
        raise cli.UserError("--save-size native: expected source or WIDTHxHEIGHT")
    hard = {row.source: row for row in spectrum_folder.read_hard(args.hard)}
    prompts = spectrum_folder.read_prompts(args.prompts, [row.label for row in hard.values()])

    import models
    from runtime.device import pick_device  # takes seconds

    device = pick_device(args.device)
    models.check_generator(args.generator)
    known = models.GENERATORS.get(args.generator, models.UNKNOWN_GENERATOR)
    if args.size == "native" and known is models.UNKNOWN_GENERATOR:
        raise cli.UserError(f"--size native: not known for {args.generator}; expected source or WIDTHxHEIGHT")
    if not known.text_guidance[0] <= args.text_guidance <= known.text_guidance[1]:
        print(f"--text-guidance {args.text_guidance:g}: unusual for {args.generator}: {known.note}")
    loras = find_loras(args, list(hard.values()))
    plan = make_plan(args, list(hard.values()), models.generator_dtype(args.dtype, device), loras)
    if (args.out / "plan.json").exists():
        runs.stop_on_difference(args.out / "plan.json", spectrum_folder.read_plan(args.out), plan, "delete that folder")

    with ExitStack() as stack:
        stop = stack.enter_context(runs.StopSignals())
        if not args.dry_run:
            folder = stack.enter_context(spectrum_folder.claim(args.out, *args.shard, args.batch_size))
            if args.plan:
                spectrum_folder.add_extra(args.out, args.plan, hard)
        paths = sorted(args.out.glob("extra-*.csv"))
        if args.dry_run and args.plan:
            paths.append(args.plan)

        def prompt_of(unit: spectrum_folder.Unit, redraw: int = 0) -> str:
            return asked.get(unit) or choose_prompt(unit, prompts[hard[unit.source].label]["prompts"], redraw)

        asked: dict[spectrum_folder.Unit, str] = {}
        seeds = seeds_of(args, list(hard.values()))
        extra = leave_out_planned(spectrum_folder.read_extra(paths, hard), plan, seeds, prompt_of)
        for units in extra:
            asked |= units

        sources = Sources(
            datasets.load(args.dataset, args.imb_ratio, args.data_root, args.data_seed).train, args.data_root
        )
        sizes, unreadable = {}, {}
        if "source" in (args.size, args.save_size) or args.size == "native":
            sizes, unreadable = read_sizes(list(hard), sources)
        multiple = models.latent_multiple(args.generator, args.revision)

        def size_of(source: str) -> tuple[int, int]:
            return draw_size(sizes.get(source, (0, 0)), args.size, known.native, multiple)

        def adapter_of(source: str) -> str | None:
            name = f"class_{hard[source].label}"
            return name if name in loras else None

        readable = [name for name in hard if name not in unreadable]
        mine = plan_batches(args, plan, seeds, extra, readable, size_of, adapter_of)
        wanted = {unit for batch in mine for unit in batch.units}
        done = spectrum_folder.done_units(args.out, wanted, delete=not args.dry_run)
        many = f"{args.per_class} images a class" if args.per_class else f"{args.seeds} seeds"
        todo = [batch for batch in mine if not done.issuperset(batch.units)]
        print(
            f"{args.out}: {len(wanted)} images ({len(hard)} sources, levels {plan['levels']}, {many}"
            f"{f', shard {args.shard}' if args.shard.count > 1 else ''}), {len(done)} done, "
            f"{len(wanted) - len(done)} to draw",
            flush=True,
        )
        smallest = min((batch.size for batch in todo), default=(known.native, known.native))
        if args.generator in models.GENERATORS and min(smallest) < known.native / 4:
            print(
                f"--size: some images will be drawn at {smallest[0]}x{smallest[1]}, but {args.generator} was made for "
                f"{known.native}x{known.native}; consider --size {known.native}x{known.native} --save-size source"
            )
        if args.dry_run:
            print_forecast(args, todo, sizes)
            return 0
        scorer = build_scorer(args, prompts, hard) if args.score and todo else None
        reader = Reader(sources, unreadable, scorer.clip.preprocess if scorer else None)
        job = Job(args, plan, folder, hard, prompt_of, size_of, adapter_of, sizes, reader, scorer)
        if todo:
            pipe = models.load_generator(args.generator, device, args.revision, args.dtype, args.scheduler)
            adapters = lora_files.Adapters(pipe, loras) if loras else None
            if "all" in loras:
                adapters.switch("all")
            if (args.out / "plan.json").exists():  # another shard's, perhaps written since
                runs.stop_on_difference(
                    args.out / "plan.json", spectrum_folder.read_plan(args.out), plan, "delete that folder"
                )
            runs.write_json(args.out / "plan.json", plan)
            job.draw(pipe, todo, done, stop, adapters)
        if stop.received:
            print(f"{args.out}: {stop.received} after {job.saved} images; run the same command again to go on")
            return runs.RESUMABLE
        return job.report()


if __name__ == "__main__":
    cli.run(main)
