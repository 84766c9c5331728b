"""What there is to draw: the units of a spectrum, and the prompt, size and LoRA adapter of each."""

from __future__ import annotations

import math
import random
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from generation import worklist
from generation.guidance import copies_each_step, image_guidance_by_level, most_at_once
from generation.masks import find_masks
from generation.sizes import draw_size, read_sizes
from generation.worklist import Batch, steps_at
from generation.writer import BYTES_PER_PIXEL
from loaders.sources import Sources
from runtime import files
from runtime.cli import UserError
from runtime.files import digest_int
from runtime.text import counted
from spectrum import domains, tables
from spectrum.folder import describe_clip, done_units, freeze_sizes, read_frozen_sizes, read_source_digests
from spectrum.units import Unit, short_name

MIXED = 8  # seeds of a source whose adapter is mixed with one and the same other


def check_levels(args, editor: str, hard: dict[str, tables.Hard]) -> None:
    """Raise UserError where the levels cannot be drawn as --levels-by says.

    Args:
        editor: class of the pipeline where it is an editor, else empty.
    """
    if args.levels_by == "noise" and (editor or find_masks(args.hard, hard)):
        what = f"{editor} has no strength" if editor else "inpainting begins at the generator's own steps"
        raise UserError(f"--levels-by noise: {what}; expected --levels-by steps")
    if not editor and args.levels_by == "steps":
        worklist.check_steps(args.levels, args.steps)


def make_settings(
    args,
    hard: dict[str, tables.Hard],
    prompts: dict[int, dict],
    generator: dict,
    dtype: str,
    loras: dict[str, Path],
    editor: str = "",
) -> dict:
    """The content of plan.json: everything that determines the images.

    Args:
        args: of the command line.
        hard: hard images by source.
        prompts: of the classes, by class index.
        generator: its name and revision, as models.describe_generator gives them.
        dtype: the number type that it runs in.
        loras: adapter files by name.
        editor: class of the pipeline where it is an editor (models.editor_kind), else empty.
    """
    score = None
    if args.score:
        score = describe_clip(args.clip) | {"threshold": args.threshold, "max_redraws": args.max_redraws}
    settings = {
        "dataset": args.dataset,
        "imb_ratio": args.imb_ratio,
        "data_seed": args.data_seed,
        "sources": len(hard),
        "hard_classes": sorted({row.label for row in hard.values()}),
        "hard_digest": files.digest_files([args.hard]),
        "prompts_digest": files.digest_files([args.prompts]),
        "levels": sorted(set(args.levels)),
        "seeds": args.seeds,
        **({"per_class": args.per_class} if args.per_class else {}),
        "steps": args.steps,
        "text_guidance": args.text_guidance,
        **generator,
        "dtype": dtype,
        "loras": {name: files.digest_files([path]) for name, path in loras.items()},
        "scheduler": args.scheduler,
        "pure_noise": args.pure_noise,
        "size": args.size if isinstance(args.size, str) else list(args.size),
        "save_size": list(args.save_size) if isinstance(args.save_size, tuple) else args.save_size,
        "format": args.format,
        "score": score,
    }
    return settings | optional_settings(args, settings, hard, prompts, loras, editor)


def optional_settings(
    args, settings: dict, hard: dict[str, tables.Hard], prompts: dict[int, dict], loras: dict[str, Path], editor: str
) -> dict:
    """The entries of plan.json that only some flags or inputs add: without them a plan stays as it was."""
    added: dict = {}
    if masks := find_masks(args.hard, hard):
        added["masks"] = files.digest_files([masks[source] for source in sorted(masks)])
    if any(name.startswith("source_") for name in loras):
        added["lora_mix"] = args.lora_mix
    if args.each_prompt:
        added |= {"each_prompt": True, "seeds": max(count_seeds(args, hard, prompts).values())}
        added["units"] = sum(1 for _ in order_planned(args, settings, hard, prompts))
    if args.skip_own_domain:
        added["skip_own_domain"] = files.digest_files([args.skip_own_domain])
    if args.levels_by == "noise":
        added["levels_by"] = "noise"
    if editor:
        added["editor"] = editor
    if args.image_guidance:
        scales = image_guidance_by_level(editor, args.levels, args.image_guidance)
        added["image_guidance"] = {str(level): scale for level, scale in scales.items()}
    return added


def count_seeds(args, hard: dict[str, tables.Hard], prompts: dict[int, dict]) -> dict[str, int]:
    """How many images of a level each source has: --seeds (of each prompt with --each-prompt), or its share of its
    class's --per-class."""
    if args.each_prompt:
        return {source: args.seeds * len(prompts[row.label]["prompts"]) for source, row in hard.items()}
    if not args.per_class:
        return dict.fromkeys(hard, args.seeds)
    seeds = {}
    by_class = Counter(row.label for row in hard.values())
    before: Counter = Counter()
    for source, row in hard.items():
        share, rest = divmod(args.per_class, by_class[row.label])
        seeds[source] = share + (before[row.label] < rest)
        before[row.label] += 1
    return seeds


def read_own_domains(args, hard: dict[str, tables.Hard], prompts: dict[int, dict]) -> dict[str, str]:
    """The domain that each source has already, by --skip-own-domain; empty where none is skipped.

    Raises:
        UserError: without --each-prompt, or where the table's domains are not those of the prompts.
    """
    if not args.skip_own_domain:
        return {}
    if not args.each_prompt:
        raise UserError("--skip-own-domain: expected with --each-prompt only")
    own = domains.read_source_domains(args.skip_own_domain)
    asked = {name for row in hard.values() for name in prompts[row.label].get("domains", [])}
    if not asked & set(own.values()):
        raise UserError(
            f"--skip-own-domain {args.skip_own_domain}: none of its domains is one of {args.prompts}; expected the "
            "sources.csv that belongs to these prompts (write_prompts.py --from domains)"
        )
    return {source: own.get(source, "") for source in hard}


def is_planned(unit: Unit, args, texts: dict, own_domain: str) -> bool:
    """Whether a unit is to be drawn: with --skip-own-domain not toward the domain that its source has already.

    Args:
        texts: its class in prompts.json; one of empty scenes has no domains.
    """
    if not own_domain or not texts.get("domains"):
        return True
    return texts["domains"][unit.seed // args.seeds] != own_domain


def order_planned(
    args, settings: dict, hard: dict[str, tables.Hard], prompts: dict[int, dict], among: Collection[str] | None = None
) -> Iterator[Unit]:
    """Every unit of a plan, in its order, or those of the sources `among` all."""
    own = read_own_domains(args, hard, prompts)
    seeds = {name: count for name, count in count_seeds(args, hard, prompts).items() if among is None or name in among}
    units = worklist.order_units(seeds, settings["levels"])
    if not own:
        yield from units
        return
    for unit in units:
        if is_planned(unit, args, prompts[hard[unit.source].label], own.get(unit.source, "")):
            yield unit


def choose_prompt(unit: Unit, texts: list[str], another: int = 0) -> str:
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


class DrawPlan:
    """The units of a spectrum, and what each is drawn from.

    Args:
        args: of the command line.
        settings: of `make_settings`.
        hard: hard images by source.
        prompts: of the classes, by class index.
        adapters: names of the LoRA adapters.
        extra: files of further units.

    Attributes:
        masks: mask files by source (generation/masks.py).
        frozen: the sources whose sizes were noted together, with their width and height; empty where no size matters.
        seeds: how many images of a level each source has.
        sizes: the sources' own width and height, where they matter.
        unreadable: why, for each source that cannot be opened.
        native: side in pixels of the images that the generator was made for.
        multiple: what the sides of its images must divide by.
        most: pixels from which up sources are drawn at the native area, unless --size names a size.

    Raises:
        UserError: further units that are none, or that ask for another prompt than the plan's.
    """

    def __init__(
        self,
        args,
        settings: dict,
        hard: dict[str, tables.Hard],
        prompts: dict[int, dict],
        adapters: Collection[str] = (),
        extra: Iterable[Path] = (),
    ):
        self.args, self.settings, self.hard, self.prompts, self.adapters = args, settings, hard, prompts, adapters
        self.masks = find_masks(args.hard, hard)
        self.seeds = count_seeds(args, hard, prompts)
        self.by_class: dict[int, list[str]] = {}  # the adapters that the sources of a class would have
        for source, row in hard.items():
            self.by_class.setdefault(row.label, []).append(f"source_{short_name(source)}")
        self.asked: dict[Unit, str] = {}
        self.extra = [self._leave_out_planned(units) for units in tables.read_extra(extra, hard)]
        for units in self.extra:
            self.asked |= units
        self.frozen: list[dict[str, tuple[int, int]]] = []
        self.sizes: dict[str, tuple[int, int]] = {}
        self.unreadable: dict[str, str] = {}
        self.native, self.multiple, self.most = 0, 1, math.inf

    def read_sizes(self, sources: Sources, native: int, multiple: int, most: float = math.inf) -> None:
        """Look at the sources, where their sizes matter, and note these for all processes.

        Raises:
            UserError: not one of them can be opened, or one belongs to another data set.
        """
        self.native, self.multiple, self.most = native, multiple, most
        if "source" not in (self.args.size, self.args.save_size) and self.args.size != "native":
            return
        while True:
            # Take the sizes that an earlier process noted, and look at the sources that it could not open.
            self.frozen = read_frozen_sizes(self.args.out)
            self.sizes = {name: size for sizes in self.frozen for name, size in sizes.items() if name in self.hard}
            missing = [name for name in self.hard if name not in self.sizes]
            if not missing:
                return
            found, self.unreadable = read_sizes(missing, sources, must=not self.sizes)
            if not found:
                return
            # Note the new ones for all processes, unless another one has just done so.
            if self.args.dry_run or freeze_sizes(self.args.out, found):
                self.sizes |= found
                self.frozen.append(found)
                return

    def prompt_of(self, unit: Unit, redraw: int = 0) -> str:
        """The prompt of a unit at a redraw, 0 for its first drawing."""
        texts = self.prompts[self.hard[unit.source].label]["prompts"]
        if self.args.each_prompt and unit.seed < self.seeds[unit.source]:
            return texts[unit.seed // self.args.seeds]
        return self.asked.get(unit) or choose_prompt(unit, texts, redraw)

    def steps_of(self, level: int) -> int:
        """Denoising steps of a level; editors run all of them."""
        if self.settings.get("editor"):
            return self.args.steps
        return steps_at(level, self.args.steps, self.args.levels_by == "noise")

    def draw_size_of(self, source: str) -> tuple[int, int]:
        """Width and height at which a source is drawn."""
        return draw_size(self.sizes.get(source, (0, 0)), self.args.size, self.native, self.multiple, self.most)

    def save_size_of(self, source: str, drawn: tuple[int, int]) -> tuple[int, int]:
        """Width and height at which an image of a source is saved, drawn at `drawn`."""
        asked = self.args.save_size
        return {None: drawn, "source": self.sizes.get(source)}.get(asked, asked)

    def adapter_of(self, unit: Unit) -> str | None:
        """The LoRA adapter that a unit is drawn with, None where all have the same.

        Adapters of single sources are mixed, `source_A+source_B` (LoFT): the source's own with that of another one of
        its class, the same for MIXED seeds.
        """
        if not self.adapters:
            return None
        label, own = self.hard[unit.source].label, f"source_{short_name(unit.source)}"
        if own not in self.adapters:
            name = f"class_{label}"
            return name if name in self.adapters else None
        others = [name for name in self.by_class[label] if name != own]
        if self.settings["lora_mix"] == 1 or not others:
            return own
        return f"{own}+{others[digest_int('mix', unit.source, unit.seed // MIXED) % len(others)]}"

    def make_batches(self, units) -> list[Batch]:
        """Units in batches of one level, size and adapter."""
        return worklist.make_batches(units, self.draw_size_of, self.args.batch_size, self.adapter_of)

    def share(self) -> list[Batch]:
        """The batches of this process's shard.

        Each noted list of sources and each file of further units is shared out separately, so that units added while
        processes are at work move no unit from one process to another.
        """
        groups = self.frozen or [dict.fromkeys(self.hard)]
        lists = [order_planned(self.args, self.settings, self.hard, self.prompts, group) for group in groups]
        lists += [sorted(unit for unit in units if unit.source in group) for units in self.extra for group in groups]
        shard, mine = self.args.shard, []
        for units in lists:
            mine += worklist.share_out(self.make_batches(units), self.steps_of, shard.count)[shard.index]
        return mine

    def texts(self) -> list[str]:
        """Every prompt that an image may be drawn from, in alphabetical order."""
        of_classes = {text for row in self.hard.values() for text in self.prompts[row.label]["prompts"]}
        return sorted(of_classes | {text for text in self.asked.values() if text})

    def find_todo(self) -> tuple[list[Batch], set[Unit]]:
        """The batches of this shard in which an image is missing, and the units that are drawn; prints how many."""
        args, mine = self.args, self.share()
        many = f"{counted(args.per_class, 'image')} a class" if args.per_class else counted(args.seeds, "seed")
        many += " of each prompt" if args.each_prompt else ""
        wanted = {unit for batch in mine for unit in batch.units}
        done = done_units(args.out, wanted, delete=not args.dry_run)
        print(
            f"{args.out}: {counted(len(wanted), 'image')} ({counted(len(self.hard), 'source')}, levels "
            f"{self.settings['levels']}, {many}{f', shard {args.shard}' if args.shard.count > 1 else ''}), "
            f"{len(done)} done, {len(wanted) - len(done)} to draw",
            flush=True,
        )
        return [batch for batch in mine if not done.issuperset(batch.units)], done

    def stop_on_changed_sources(self, sources: Sources, todo: list[Batch]) -> None:
        """Raise UserError where a source of these batches has changed since images were drawn from it."""
        names = {unit.source for batch in todo for unit in batch.units}
        before = read_source_digests(self.args.out, names)

        def differs(name: str) -> bool:
            try:
                return sources.sha256(name) != before[name]
            except UserError:  # it cannot be read: found again, and listed, when its turn comes
                return False

        with ThreadPoolExecutor(8) as pool:
            changed = [name for name, other in zip(before, pool.map(differs, before), strict=True) if other]
        if changed:
            raise UserError(
                f"{self.args.out}: {len(changed)} sources have changed since images were drawn from them, the first "
                f"{changed[0]}; expected the same --data-root and files, or another --out"
            )

    def warn_of_sizes(self, todo: list[Batch]) -> None:
        """Say where sources are drawn smaller than they are, or images much smaller than a known generator draws."""
        if math.isinf(self.most):  # an unknown generator
            return
        args, native = self.args, self.native
        large = sum(width * height > self.most for width, height in self.sizes.values()) if args.size == "source" else 0
        if large:
            print(
                f"--size source: {large} sources are larger than {args.generator} draws well, and are drawn in their "
                f"shape at its native area, {native}x{native}; --save-size source saves them at their own size"
            )
        width, height = min((batch.size for batch in todo), default=(native, native))
        if min(width, height) < native / 4:
            print(
                f"--size: some images will be drawn at {width}x{height}, but {args.generator} was made for "
                f"{native}x{native}; consider --size {native}x{native} --save-size source"
            )

    def _leave_out_planned(self, units: dict[Unit, str]) -> dict[Unit, str]:
        """Further units without those of the plan itself, which may have no other prompt."""
        further = {}
        for unit, prompt in units.items():
            if unit.level not in self.settings["levels"] or unit.seed >= self.seeds[unit.source]:
                further[unit] = prompt
            elif prompt and prompt != self.prompt_of(unit):
                raise UserError(
                    f"--also-draw: {unit.source} at level {unit.level}, seed {unit.seed}, is in the plan with the "
                    f"prompt {self.prompt_of(unit)!r}; expected a seed of {self.seeds[unit.source]} or more for "
                    "another prompt"
                )
        return further

    def print_forecast(self, todo: list[Batch]) -> None:
        """Print what drawing these batches takes, in images, steps, hours and bytes."""
        args = self.args
        # Count images and denoising steps.
        count = sum(len(batch.units) for batch in todo)
        steps = sum(self.steps_of(batch.level) * len(batch.units) for batch in todo)
        by_level = Counter()
        for batch in todo:
            by_level[batch.level] += len(batch.units)
        for level, number in sorted(by_level.items()):
            print(f"  level {level:>2}: {counted(number, 'image')} of {counted(self.steps_of(level), 'step')}")
        # Estimate the hours from the last run's rate.
        speeds = [files.read_json(path) for path in args.out.glob("shard-*/speed.json")]
        rate = args.steps_per_second or max((speed["steps_per_second"] for speed in speeds), default=None)
        hours = "time unknown: no run here yet to go by, and no --steps-per-second"
        if rate:
            hours = f"{steps / rate / 3600:.2f} hours at {rate:.4g} steps a second"
        # Estimate the bytes from images that are there, else from their pixels.
        sample = [path.stat().st_size for path in list(args.out.glob(f"shard-*/*.{args.format}"))[:1000]]
        pixels = sum(math.prod(self.save_size_of(unit.source, batch.size)) for batch in todo for unit in batch.units)
        gigabytes = (sum(sample) / len(sample) * count if sample else pixels * BYTES_PER_PIXEL[args.format]) / 1e9
        place = next(folder for folder in [args.out.resolve(), *args.out.resolve().parents] if folder.exists())
        print(
            f"  {counted(count, 'image')}, {counted(len(todo), 'batch', 'batches')}, {steps} denoising steps: {hours}; "
            f"about {gigabytes:.3g} GB of "
            f"{shutil.disk_usage(place).free / 1e9:.4g} GB free"
        )
        if self.settings.get("image_guidance"):
            editor = self.settings["editor"]
            copies = copies_each_step(editor, args.text_guidance)
            at_once = most_at_once(args.batch_size, editor, args.text_guidance)
            print(
                f"  each step runs the UNet on {copies} copies of a batch: {copies * steps} passes of one image, and "
                f"{at_once} images at once need the memory of {copies * at_once}"
            )
        if args.score:
            print(
                f"  besides: images under --threshold {args.threshold:g} are drawn up to {args.max_redraws} times again"
            )
