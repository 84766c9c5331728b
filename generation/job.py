"""The drawing of one shard: batch after batch, redrawn where they are blank or score too low, written as they come."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path

from PIL import Image

from generation.guidance import most_at_once
from generation.plan import DrawPlan
from generation.prefetch import Prefetcher
from generation.sizes import resize
from generation.worklist import Batch
from generation.writer import ImageWriter, as_saved
from runtime import cli, files, runs, signals
from runtime.text import counted
from spectrum.domains import domain_of_prompt
from spectrum.units import Unit

MAX_REDRAWS = 3
# After so many images, a model stops the job if more than half of them were blank or not finite.
TRIAL = 256


class Job:
    """The drawing of one shard.

    Args:
        plan: what there is to draw.
        folder: the shard's folder.
        prefetcher: reads the sources; it may know of some already that they cannot be read.
        scorer: an embeddings.Scorer with --score, else None.
        retouch: changes an image at the size at which it is saved (writer.ImageWriter), or None.
    """

    def __init__(self, plan: DrawPlan, folder: Path, prefetcher: Prefetcher, scorer, retouch=None):
        self.retouch = retouch
        editor = plan.settings.get("editor", "")
        self.most_at_once = most_at_once(plan.args.batch_size, editor, plan.args.text_guidance)
        self.args, self.plan, self.folder, self.prefetcher, self.scorer = plan.args, plan, folder, prefetcher, scorer
        self.saved = self.redraws = self.reached = 0
        self.failed: list[Unit] = []
        self.pixels_at_once = math.inf  # less where a batch did not fit into memory

    def take_generator(self, pipe, stop: signals.StopSignals, adapters=None) -> None:
        """Draw with this pipeline.

        Raises:
            UserError: it cannot draw what the flags ask for.
        """
        self.generator = self.build_generator(pipe, adapters)
        self.generator.stop = stop
        if self.args.compile:
            (pipe.unet if hasattr(pipe, "unet") else pipe.transformer).compile()
        self.scheduler = type(pipe.scheduler).__name__

    def draw(self, todo: list[Batch], done: set[Unit], stop: signals.StopSignals) -> None:
        """Draw batches. What is done of a batch is drawn with it, for the sake of the others, but not saved again.

        A signal ends it at the next denoising step, without the batch in flight.
        """
        from generation.generator import Interrupted

        args = self.args
        total = sum(self.plan.steps_of(batch.level) * len(batch.units) for batch in todo)
        began = time.monotonic()
        with ImageWriter(self.folder, self.retouch) as writer, cli.progress(total, "drawing", "step") as bar:
            for redraw in range(1 if self.scorer else MAX_REDRAWS + 1):
                # Draw all batches, each while the next one's sources are being read.
                for batch, following in itertools.zip_longest(todo, todo[1:]):
                    if stop.received:
                        break
                    try:
                        self.draw_batch(batch, following, redraw, done, writer)
                    except Interrupted:
                        break
                    bar.update(self.plan.steps_of(batch.level) * len(batch.units))
                    self.stop_if_broken(writer)
                writer.drain()
                self.stop_if_broken(writer)
                # Redraw the blank ones, in batches of their own.
                units = [Unit(row["source"], row["level"], row["seed"]) for row in writer.rejected]
                writer.rejected.clear()
                todo = self.plan.make_batches(units)
                if stop.received or not todo:
                    break
            else:
                self.failed = units
        self.saved = writer.saved
        if not stop.received:
            speed = {"steps_per_second": total / (time.monotonic() - began), "batch_size": args.batch_size}
            speed |= {"seconds_waited_for_disk": writer.waited, "environment": runs.environment()}
            files.write_json(self.folder / "speed.json", speed)

    def build_generator(self, pipe, adapters):
        """What draws batches: by strength, or as an editor."""
        from generation.editors import Editor
        from generation.generator import Generator
        from generation.inpainting import Inpainter

        args, settings = self.args, self.plan.settings
        if settings.get("editor"):
            scales = {int(level): scale for level, scale in settings.get("image_guidance", {}).items()}
            return Editor(pipe, args.steps, args.text_guidance, scales, args.cache_mb, adapters)
        if self.plan.masks:
            return Inpainter(pipe, args.steps, args.text_guidance, self.plan.masks, args.cache_mb, adapters)
        by_noise = args.levels_by == "noise"
        return Generator(pipe, args.steps, args.text_guidance, args.pure_noise, args.cache_mb, adapters, by_noise)

    def draw_batch(self, batch: Batch, following: Batch | None, redraw: int, done: set, writer) -> None:
        """Draw a batch, while the sources of the following one are being read."""
        images = self.read_sources(batch)
        if following:  # what this batch reads too will be encoded by then: read again it would stay in memory for good
            here = {unit.source for unit in batch.units}
            ahead = [source for source in self.missing_sources(following) if source not in here]
            self.prefetcher.begin(ahead, following.size)
        batch = batch._replace(units=[unit for unit in batch.units if unit.source not in self.prefetcher.unreadable])
        if done.issuperset(batch.units):
            return
        if self.scorer:
            pixels, good, arrived, rows = self.draw_best(batch, images)
        else:
            pixels, good, arrived = self.draw_once(batch, redraw, images)
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
        images = self.prefetcher.finish(self.missing_sources(batch), batch.size)
        if self.scorer:
            self.scorer.add_sources(self.prefetcher.prepared)
            self.prefetcher.prepared.clear()
        return images

    def prompt(self, unit: Unit, redraw: int) -> str:
        """The prompt of a drawing: another one at each redraw for a better score, the same where it was only blank."""
        return self.plan.prompt_of(unit, redraw if self.scorer else 0)

    def draw_once(self, batch: Batch, redraw: int, images: dict) -> tuple:
        """Draw a batch: what generator.to_host gives of it."""
        import torch

        from generation.generator import to_host

        size, parts = f"{batch.size[0]}x{batch.size[1]}", []
        self.redraws += len(batch.units) if redraw else 0
        while batch.units:
            # Draw as many at once as fit into memory.
            pixels = batch.size[0] * batch.size[1]
            most = int(max(1, min(self.most_at_once, self.pixels_at_once // pixels)))
            padded = pad_size(min(most, len(batch.units)), most) if self.args.compile else 0
            most = min(most, len(batch.units))
            some = batch._replace(units=batch.units[:most])
            if parts:  # the part before may have driven encoded sources out of memory
                images = images | self.read_sources(some)
            texts = [self.prompt(unit, redraw) for unit in some.units]
            try:
                drawn = self.generator.draw(some, redraw, texts, images, padded)
                parts.append(to_host(drawn))
                batch = batch._replace(units=batch.units[most:])
                continue
            except torch.OutOfMemoryError:
                if most == 1:
                    raise cli.UserError(
                        f"--size: one image of {size} does not fit into this device's memory; expected a smaller size"
                    ) from None
            # Halve the batch. Not within the except clause, whose exception holds what has to be freed.
            torch.cuda.empty_cache()
            self.pixels_at_once = most // 2 * pixels
            print(f"{most} images of {size} do not fit into this device's memory: {most // 2} at once", flush=True)
        if len(parts) == 1:
            return parts[0]
        for _, _, arrived in parts:
            arrived()
        pixels, good, _ = zip(*parts, strict=True)
        return torch.cat(pixels), torch.cat(good), lambda: None

    def draw_best(self, batch: Batch, images: dict) -> tuple:
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
            # Draw the images that score too low so far. Sources that the cache has dropped are read again.
            some = batch._replace(units=[batch.units[index] for index in waiting])
            pixels, good, arrived = self.draw_once(some, redraw, self.read_sources(some) if redraw else images)
            arrived()
            # Score what their files will hold.
            rows = [self.row(unit, redraw, batch.size) for unit in some.units]
            sized = (
                resize(Image.fromarray(image.numpy()), (row["width"], row["height"]))
                for image, row in zip(pixels, rows, strict=True)
            )
            if self.retouch:
                sized = (self.retouch(image, row) for image, row in zip(sized, rows, strict=True))
            pictures = [as_saved(image, args.format) for image in sized]
            scores = self.scorer.score(pictures, [row["label"] for row in rows], [unit.source for unit in some.units])
            # Keep the best of each.
            for index, image, fine, row, text, likeness in zip(
                waiting, pixels, good.tolist(), rows, *scores, strict=True
            ):
                fine = fine and math.isfinite(text + likeness)
                score = text if fine else -math.inf
                if redraw == 0 or score > best[index][0]:
                    best[index] = score, image, fine, row | {"text_score": text, "image_score": likeness}
            waiting = [index for index in waiting if best[index][0] < args.threshold]
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
                f"work in {self.plan.settings['dtype']}; expected another --dtype or --generator"
            )

    def row(self, unit: Unit, redraw: int, drawn: tuple[int, int]) -> dict:
        """The row of an image in metadata.jsonl, but for its scores."""
        args, source = self.args, self.plan.hard[unit.source]
        width, height = self.plan.save_size_of(unit.source, drawn)
        prompt = self.prompt(unit, redraw)
        texts = self.plan.prompts[source.label]
        domain = {"domain": domain_of_prompt(texts, prompt)} if texts.get("domains") else {}
        return {
            "file_name": str(Path(unit.file_name).with_suffix(f".{args.format}")),
            "source": unit.source,
            "source_sha256": self.prefetcher.digest(unit.source),
            "label": source.label,
            "class_name": source.class_name,
            "level": unit.level,
            "seed": unit.seed,
            "redraws": redraw,
            "prompt": prompt,
            **domain,
            "text_guidance": args.text_guidance,
            "steps": self.plan.steps_of(unit.level),
            "start_timestep": self.generator.start_timestep(unit.level, drawn),
            "width": width,
            "height": height,
            "generator": self.plan.settings["generator"],
            "revision": self.plan.settings["revision"],
            "scheduler": self.scheduler,
        }

    def report(self) -> int:
        """Say what was drawn, write failures.jsonl where something was not, and give the exit code."""
        failures = [
            {"source": name, "level": None, "seed": None, "reason": why}
            for name, why in sorted(self.prefetcher.unreadable.items())
        ]
        redraws = self.args.max_redraws if self.scorer else MAX_REDRAWS
        failures += [
            unit._asdict() | {"reason": f"blank or not finite, {counted(redraws, 'redraw')}"} for unit in self.failed
        ]
        path = self.folder / "failures.jsonl"
        path.unlink(missing_ok=True)
        reached = f", {self.reached} of them with a CLIPScore of {self.args.threshold:g} or more" if self.scorer else ""
        print(f"{self.args.out}: {counted(self.saved, 'image')} drawn, {counted(self.redraws, 'redraw')}{reached}")
        if not failures:
            return 0
        files.write_text(path, "".join(json.dumps(failure, ensure_ascii=False) + "\n" for failure in failures))
        if self.prefetcher.unreadable:
            print(
                f"{counted(len(self.prefetcher.unreadable), 'source')} cannot be read, the first: "
                f"{failures[0]['reason']}"
            )
        if self.failed:
            print(
                f"{counted(len(self.failed), 'image')} stayed blank or not finite after "
                f"{counted(redraws, 'redraw')}, the first {self.failed[0].source} at level {self.failed[0].level}"
            )
        print(f"{path}: all that could not be drawn")
        return 1


def pad_size(count: int, most: int) -> int:
    """How many images a compiled model draws for `count`: the next power of two, or `most`.

    So it meets few shapes, and draws less than twice what is asked for.
    """
    return min(most, 1 << (count - 1).bit_length())
