"""Tuning a generator's adapters on a few images: groups of them side by side, resumable to the last bit on a CPU.

Every draw follows from (seed, adapter, step): adapters tuned before or beside another do not change it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from loaders.base import DataSet, ImageSet
from reporting import figures
from runtime import checkpoints, cli, files
from runtime.signals import StopSignals
from training import diffusion, lora

FILE = "pytorch_lora_weights.safetensors"
CHECKPOINT_STEPS = 100  # a kill costs so many steps at most
LOOKS = 10  # how often in a tuning the held-out loss is taken


class Unit(NamedTuple):
    """One adapter to tune: its folder's name, the places of its images in train and val, and their prompts."""

    name: str
    places: np.ndarray
    prompts: list[str]
    val: np.ndarray
    val_prompts: list[str]


def group_units(units: list[Unit], together: int) -> list[list[Unit]]:
    """Units in groups that are tuned side by side: of as many images each, so that all have the same steps."""
    groups = []
    for images in sorted({len(unit.places) for unit in units}):
        same = [unit for unit in units if len(unit.places) == images]
        groups += [same[start : start + together] for start in range(0, len(same), together)]
    return groups


def batch_and_steps(args, images: int) -> tuple[int, int]:
    """Images in a step, and steps: each of the images is used --epochs times."""
    batch = min(args.batch_size, images)
    return batch, math.ceil(args.epochs * images / batch)


def rate_at(step: int, steps: int, warmup: int) -> float:
    """What the learning rate is multiplied by in a step, from 0 up: a line to 1 over the warm-up, a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


class Stopped(Exception):
    """A signal came while images were being encoded: there is nothing to save."""


class Tuner:
    """Tunes groups of adapters with one loaded generator.

    Args:
        args: of tune_generator.py.
        pipe: the generator, a pipeline of diffusers; its own weights are frozen.
        plan: what determines the adapters, for their metadata.
        folder: the shard's, for checkpoints; adapters go beside it.
        stop: signals that end the run.
    """

    def __init__(self, args, pipe, data: DataSet, plan: dict, folder: Path, stop: StopSignals):
        self.args, self.pipe, self.data, self.plan, self.folder, self.stop = args, pipe, data, plan, folder, stop
        for module in (pipe.unet, pipe.vae, *lora.text_encoders(pipe).values()):
            module.requires_grad_(False).eval()
        if args.grad_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        self.scheduler = diffusion.noise_scheduler(pipe)
        self.timesteps = self.scheduler.config.num_train_timesteps
        self.failed: dict[str, str] = {}  # adapter -> why there is none
        self.saved = self.steps = 0  # adapters and their steps, of this process
        self.writers: dict = {}
        self.groups = 0  # adapters that the pipeline has now

    def tune(self, units: list[Unit], bar) -> None:
        """Tune a group; where it does not fit into memory, its halves one after the other."""
        done = all((self.folder.parent / unit.name / FILE).is_file() for unit in units)  # a half, in an earlier process
        if self.stop.received or done:
            return
        try:
            self.tune_group(units, bar)
            return
        except torch.OutOfMemoryError:
            if len(units) == 1:
                raise cli.UserError(
                    f"--batch-size {self.args.batch_size}: one adapter does not fit into this device's memory; "
                    "expected --grad-checkpointing, a smaller batch or --resolution"
                ) from None
        torch.cuda.empty_cache()
        half = len(units) // 2
        print(f"--together {len(units)}: does not fit into this device's memory; {half} at once", flush=True)
        self.tune(units[:half], bar)
        self.tune(units[half:], bar)

    def tune_group(self, units: list[Unit], bar) -> None:
        """Tune a group from its start or its checkpoint to the end, or to a signal."""
        batch, steps = batch_and_steps(self.args, len(units[0].places))
        try:
            state = self.begin(units)
        except Stopped:
            return
        bar.update(state["step"] * len(units))
        if state["step"] == 0:
            self.draw_sheets(units, "before")
        while not self.stop.received and state["step"] < steps and len(state["failed"]) < len(units):
            if state["step"] % max(1, steps // LOOKS) == 0:
                self.look(units, state)
            rate = self.args.lr * rate_at(state["step"], steps, self.args.warmup_steps)
            self.step(units, state, batch, rate)
            self.steps += len(units)
            bar.update(len(units))
            if state["step"] % CHECKPOINT_STEPS == 0:
                self.save_checkpoint(units, state)
        if not self.stop.received:
            self.draw_sheets(units, "after")
        if self.stop.received:
            self.save_checkpoint(units, state)
            self.close()
            return
        self.look(units, state)
        self.close()
        self.finish(units, state)

    def begin(self, units: list[Unit]) -> dict:
        """Adapters and their optimiser, fresh or from the checkpoint, and the group's latents. Returns its state."""
        args, count = self.args, len(units)
        # Make fresh adapters and their optimiser, and encode the images.
        if self.groups != count:  # else the layers of the group before serve again, and a compiled UNet stays compiled
            self.layers = lora.add_adapters(self.pipe, args.parts, count, args.rank, args.alpha)
            self.groups = count
            if args.compile:
                self.pipe.unet.compile()
        lora.start_adapters(self.layers, [files.digest_int("adapter", args.seed, unit.name) for unit in units])
        self.optimizer = torch.optim.AdamW(
            lora.parameters(self.layers), args.lr, weight_decay=args.weight_decay, fused=True
        )
        self.latents = [self.encode(self.data.train, unit.places, args.crops) for unit in units]
        held = min(len(unit.val) for unit in units)  # the parts of a batch are equal
        self.held = [self.encode(self.data.val, unit.val[:held], 1) for unit in units] if held else []
        state = {
            "units": [unit.name for unit in units],
            "step": 0,
            "looked": 0,
            "sums": torch.zeros(count, 2, diffusion.NOISE_LEVELS, dtype=torch.float64),
            "norms": torch.zeros(count),
            "rows": {unit.name: [] for unit in units},
            "failed": {},
        }
        # Take up the group's last checkpoint.
        saved = checkpoints.load_latest_checkpoint(self.folder / "checkpoint.pt", str(self.pipe.device))
        if saved and saved["units"] == state["units"]:
            state = {name: saved[name] for name in state}
            for name, layer in self.layers.items():
                layer.load_state_dict(saved["weights"][name], strict=False)
            self.optimizer.load_state_dict(saved["optimizer"])
            print(f"{', '.join(state['units'])}: resuming after step {state['step']}", flush=True)
        state["sums"], state["norms"] = state["sums"].cpu(), state["norms"].cpu()
        self.open_writers(units, state["step"])
        return state

    def step(self, units: list[Unit], state: dict, batch: int, rate: float) -> None:
        """One step of every adapter, each on images of its own."""
        args, count = self.args, len(units)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, timesteps = self.step_loss(units, state["step"], batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.view(count, -1).mean(1).sum().backward()
        state["norms"] += lora.clip_gradients(self.layers, args.clip_grad).cpu()
        self.optimizer.step()
        state["step"] += 1
        losses = loss.detach().cpu().double().view(count, -1)
        parts = (timesteps.cpu() * diffusion.NOISE_LEVELS).div(self.timesteps, rounding_mode="floor").view(count, -1)
        state["sums"][:, 0].scatter_add_(1, parts, losses)
        state["sums"][:, 1].scatter_add_(1, parts, torch.ones_like(losses))
        for unit, finite in zip(units, losses.isfinite().all(1).tolist(), strict=True):
            if not finite and unit.name not in state["failed"]:
                state["failed"][unit.name] = f"the loss of step {state['step'] - 1} is not finite"
                others = ", the others go on" if count > 1 else ""
                print(f"{unit.name}: {state['failed'][unit.name]}; it stops{others}", flush=True)

    def encode(self, images: ImageSet, places: np.ndarray, crops: int) -> diffusion.Latents:
        """Latents of the images at `places` of a set, which are read one by one.

        Raises:
            Stopped: a signal came.
        """

        def pictures() -> Iterator[Image.Image]:
            for place in places:
                if self.stop.received:
                    raise Stopped
                yield images.read(int(place))[0]

        names = [images.sources[place] for place in places]
        args = self.args
        return diffusion.encode_images(self.pipe, pictures(), names, args.resolution, crops, args.flip, args.seed)

    def embed(self, prompts: list[list[str]]) -> dict:
        """The UNet's conditions for each adapter's prompts, equally many; without text adapters no gradient flows."""
        with nullcontext() if "text" in self.args.parts else torch.no_grad():
            embeddings = diffusion.encode_prompts(self.pipe, prompts)
        return diffusion.conditions(self.pipe, embeddings, self.args.resolution)

    def autocast(self):
        """bfloat16 where the generator is: adapters stay float32, and are computed with in the generator's type."""
        device, dtype = diffusion.place_of(self.pipe)
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def loss(self, latents: list, draws: list[diffusion.Draw], prompts: list[list[str]]) -> tuple:
        """The loss of each image of the adapters' draws, float32 (N,), and its timestep."""
        z = torch.cat([diffusion.sample_latents(self.pipe, *pair) for pair in zip(latents, draws, strict=True)])
        noise, timesteps = (
            torch.cat([getattr(draw, name) for draw in draws]).to(z.device) for name in ("noise", "timesteps")
        )
        with self.autocast():
            told = self.embed(prompts)
            return diffusion.denoising_loss(self.pipe, self.scheduler, z, noise, timesteps, told), timesteps

    def step_loss(self, units: list[Unit], step: int, batch: int) -> tuple:
        """As `loss`, of a training step."""
        draws = [
            diffusion.draw_step(self.args.seed, unit.name, step, batch, latents, self.timesteps)
            for unit, latents in zip(units, self.latents, strict=True)
        ]
        prompts = [
            [unit.prompts[place] for place in draw.images.tolist()] for unit, draw in zip(units, draws, strict=True)
        ]
        return self.loss(self.latents, draws, prompts)

    @torch.no_grad()
    def held_out_losses(self, units: list[Unit]) -> list[float | None]:
        """The loss on validation images, at noise and timesteps that are always the same; None where there are none."""
        if not self.held:
            return [None] * len(units)
        count, draws = len(self.held[0].mean), []
        spread = ((torch.arange(count) + 0.5) * self.timesteps / count).long()
        for unit, latents in zip(units, self.held, strict=True):
            draw = diffusion.draw_step(0, f"held-out {unit.name}", 0, count, latents, self.timesteps)
            draws.append(
                draw._replace(images=torch.arange(count), sample=torch.zeros_like(draw.sample), timesteps=spread)
            )
        loss, _ = self.loss(self.held, draws, [unit.val_prompts[:count] for unit in units])
        return loss.view(len(units), -1).mean(1).tolist()

    def look(self, units: list[Unit], state: dict) -> None:
        """Note the losses since the last look, by noise level, and the held-out loss."""
        held, since = self.held_out_losses(units), state["step"] - state["looked"]
        for group, unit in enumerate(units):
            sums, counts = state["sums"][group]
            row = {"step": state["step"], "held_out": held[group]}
            if since:
                by_noise = [
                    (total / count).item() if count else None for total, count in zip(sums, counts, strict=True)
                ]
                row |= {"loss": (sums.sum() / counts.sum()).item(), "loss_by_noise": by_noise}
                row |= {"gradient_norm": (state["norms"][group] / since).item()}
                row |= {"lr": self.optimizer.param_groups[0]["lr"]}
            state["rows"][unit.name].append(row)
            self.log(unit.name, row)
        state["sums"].zero_()
        state["norms"].zero_()
        state["looked"] = state["step"]

    def save_checkpoint(self, units: list[Unit], state: dict) -> None:
        """Everything that the group's next step needs; no draw has a state of its own."""
        weights = {name: {"a": layer.a.data, "b": layer.b.data} for name, layer in self.layers.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        content = state | {"weights": weights, "optimizer": self.optimizer.state_dict()}
        checkpoints.save_checkpoint(self.folder / "checkpoint.pt", content)

    def draw_sheets(self, units: list[Unit], when: str) -> None:
        """A sheet of samples of each adapter, always from the same noise; none after a signal. A sheet that fails costs
        nothing else."""
        args = self.args
        if not args.samples:
            return
        per = args.samples
        prompts = [(list(dict.fromkeys(unit.prompts)) * per)[:per] for unit in units]
        shape = self.latents[0].mean.shape[2:]
        noise = [
            torch.randn(per, *shape, generator=torch.Generator().manual_seed(files.digest_int("samples", unit.name)))
            for unit in units
        ]
        try:
            with self.autocast():
                drawn = diffusion.draw_samples(
                    self.pipe,
                    prompts,
                    torch.cat(noise),
                    args.sample_steps,
                    args.text_guidance,
                    args.resolution,
                    self.stop,
                )
            if drawn is None:
                return
            pixels = drawn.nan_to_num().mul(255).round().byte().permute(0, 2, 3, 1).numpy()
            for group, unit in enumerate(units):
                own = pixels[group * per : (group + 1) * per]
                sheet = figures.sheet(list(own), [(when, text[-12:]) for text in prompts[group]])
                Image.fromarray(sheet).save(self.folder.parent / unit.name / f"samples_{when}.png")
                step = 0 if when == "before" else batch_and_steps(args, len(unit.places))[1]
                self.writers[unit.name].add_image("samples", sheet, step, dataformats="HWC")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            print(f"no sheet of samples {when} tuning: {type(error).__name__}: {error}", flush=True)

    def finish(self, units: list[Unit], state: dict) -> None:
        """Write each adapter, its history and its log; the adapter's own file last: with it the adapter is complete."""
        args = self.args
        for group, unit in enumerate(units):
            folder = self.folder.parent / unit.name
            weights = lora.adapter_weights(self.layers, group)
            if unit.name not in state["failed"] and not all(w.isfinite().all() for w in weights.values()):
                state["failed"][unit.name] = "its weights are not finite"
            if unit.name in state["failed"]:
                self.failed[unit.name] = state["failed"][unit.name]
                continue
            rows = state["rows"][unit.name]
            files.write_text(folder / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            notes = {
                "mode": args.mode,
                "prompt": " | ".join(dict.fromkeys(unit.prompts)),
                "steps": str(state["step"]),
                "seed": str(args.seed),
                "base": self.plan["generator"],
                "base_revision": self.plan["revision"],
                "shots": self.plan["shots_digest"],
            }
            lora.save_adapter(folder / FILE, weights, args.rank, args.alpha, notes)
            self.saved += 1
        for path in (self.folder / "checkpoint.pt", checkpoints.previous_checkpoint(self.folder / "checkpoint.pt")):
            path.unlink(missing_ok=True)

    def open_writers(self, units: list[Unit], step: int) -> None:
        """TensorBoard logs, one for each adapter; what a killed run wrote of this step and later ones is taken back."""
        from torch.utils.tensorboard import SummaryWriter

        self.writers = {
            unit.name: SummaryWriter(str(self.folder.parent / unit.name), purge_step=step) for unit in units
        }

    def log(self, name: str, row: dict) -> None:
        """The TensorBoard scalars of a look."""
        writer = self.writers[name]
        for figure in ("loss", "held_out", "gradient_norm", "lr"):
            if row.get(figure) is not None:
                writer.add_scalar(f"tuning/{figure}", row[figure], row["step"])
        for part, value in enumerate(row.get("loss_by_noise", [])):
            if value is not None:
                writer.add_scalar(f"tuning/loss_noise_{part + 1}_of_{diffusion.NOISE_LEVELS}", value, row["step"])
        writer.flush()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers = {}
