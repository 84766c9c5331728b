"""Drawing whole batches of work units with a loaded pipeline: each text and each source is encoded once.

The images are those of a plain call of the pipeline for one image with `Unit.noise_seed` as the generator's seed. The
denoising loop is the pipeline's own, with SDXL's size and aesthetic-score conditioning. The encoding before it and the
decoding after it are done here, once instead of at each call.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from generation.worklist import Batch, steps_at
from runtime.cli import UserError

# Pipelines that take latents for the image, and what their encode_prompt gives in turn, by the names that their call
# takes it by. All others are called with images and texts.
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
LATENT_PIPELINES = {
    "StableDiffusionImg2ImgPipeline": EMBEDDINGS[:2],
    "StableDiffusionXLImg2ImgPipeline": EMBEDDINGS,
    "StableDiffusion3Img2ImgPipeline": EMBEDDINGS,
    "FluxImg2ImgPipeline": ("prompt_embeds", "pooled_prompt_embeds"),
}
ENCODE_PIXELS = 2**22  # pixels that go through the autoencoder at once, at most: 16 images of 512x512
ENCODE_TEXTS = 64  # texts that go through the text encoders at once


class Cache:
    """What was encoded, on the CPU, within a bound: the entries that were not used for longest leave first."""

    def __init__(self, megabytes: int):
        self.limit, self.bytes = megabytes * 2**20, 0
        self.entries: OrderedDict = OrderedDict()

    def missing(self, keys: list) -> list:
        """The keys without an entry, each once; the other keys count as used."""
        for key in keys:
            if key in self.entries:
                self.entries.move_to_end(key)
        return [key for key in dict.fromkeys(keys) if key not in self.entries]

    def put(self, key, tensors: tuple[torch.Tensor, ...]) -> None:
        """Add an entry of tensors that hold no more than they show."""
        self.bytes += _bytes(tensors) - _bytes(self.entries.get(key, ()))
        self.entries[key] = tensors

    def get(self, key) -> tuple[torch.Tensor, ...]:
        """An entry that `missing` did not name."""
        return self.entries[key]

    def shrink(self) -> None:
        """Drop entries until the bound holds again."""
        while self.bytes > self.limit and self.entries:
            self.bytes -= _bytes(self.entries.popitem(last=False)[1])


def _bytes(tensors: tuple[torch.Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class Interrupted(Exception):
    """A signal came while a batch was being drawn: nothing of it is kept, and the same command draws it again."""


class Generator:
    """A pipeline, and what it has encoded.

    Args:
        pipe: of `models.load_generator`.
        steps: denoising steps at level 0.
        text_guidance: classifier-free guidance scale.
        pure_noise: at level 0, start from noise alone; otherwise from the noised source, where strength 1 leaves a
            trace (its brightness, mostly).
        cache_mb: memory in MiB for encoded sources and texts.
        adapters: a loras.Adapters, where batches name adapters.
    """

    def __init__(
        self, pipe, steps: int, text_guidance: float, pure_noise: bool = False, cache_mb: int = 4096, adapters=None
    ):
        self.pipe, self.steps, self.text_guidance, self.pure_noise = pipe, steps, text_guidance, pure_noise
        self.cache = Cache(cache_mb)
        self.pixels_at_once = {"encoder": ENCODE_PIXELS, "decoder": ENCODE_PIXELS}  # less where memory was too small
        self.adapter: str | None = None
        self.adapters = adapters
        self.stop = None  # a StopSignals, which is looked at after each denoising step
        self.accepted = inspect.signature(type(pipe).__call__).parameters
        self.flow = hasattr(pipe, "transformer")  # flow matching counts steps and scales latents in its own way
        # A pipeline knows latents by their channels, four where it names no other number: else it would encode them.
        known = getattr(getattr(pipe, "image_processor", None), "config", {}).get("vae_latent_channels", 4)
        self.embeddings = LATENT_PIPELINES.get(type(pipe).__name__, ())
        self.by_latents = bool(self.embeddings) and pipe.vae.config.latent_channels == known
        if type(self) is Generator and "strength" not in self.accepted:
            raise UserError(
                f"--generator: {type(pipe).__name__} has no strength, by which levels are drawn; expected an "
                "image-to-image pipeline that has one"
            )
        if self.by_latents and not self.flow and pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
            raise UserError(
                f"--generator: its UNet takes {pipe.unet.config.in_channels} channels, as one for inpainting does; "
                "expected a column mask in --hard, or a generator for image-to-image"
            )
        if pure_noise and (self.flow or not self.by_latents):
            raise UserError(
                f"--pure-noise: not possible with {type(pipe).__name__} as this generator has it; expected a Stable "
                "Diffusion pipeline for image-to-image, with latents of four channels"
            )
        self.timesteps: list[float] = []
        if self.by_latents:
            self.prepare_vae()
            if not pipe.scheduler.config.get("use_dynamic_shifting"):  # by which they hang on the image's size
                pipe.scheduler.set_timesteps(steps)
                self.timesteps = pipe.scheduler.timesteps[:: pipe.scheduler.order].tolist()

    def prepare_vae(self) -> None:
        """Set the number types of the denoiser's latents and of the autoencoder's two halves."""
        vae, self.dtype = self.pipe.vae, (self.pipe.transformer if self.flow else self.pipe.unet).dtype
        # As the pipelines themselves do, but once: a float16 encoder or decoder of SDXL gives black images. Those of
        # flow matching do not.
        upcast = vae.config.force_upcast and not self.flow
        if upcast and self.dtype != torch.float32:
            vae.encoder.to(torch.float32)
            if vae.quant_conv is not None:
                vae.quant_conv.to(torch.float32)
        if upcast and self.dtype == torch.float16:
            vae.to(torch.float32)
        self.encoder_dtype = next(vae.encoder.parameters()).dtype
        self.decoder_dtype = next(vae.decoder.parameters()).dtype

    def start_timestep(self, level: int) -> int:
        """The timestep that a level's denoising starts at, -1 where only the pipeline itself knows."""
        return int(self.timesteps[self.steps - steps_at(level, self.steps)]) if self.timesteps else -1

    def strength_of(self, run: int) -> float:
        """The strength at which the pipeline runs so many of its steps."""
        if run == self.steps:
            return 1.0
        # Most run int(steps * strength) steps: half a step more keeps that from falling one short.
        strengths = [(run + 0.5) / self.steps, (run - 0.5) / self.steps]
        if (self.by_latents and not self.flow) or not hasattr(self.pipe, "get_timesteps"):
            return strengths[0]
        # SD3, Flux, Qwen-Image and Z-Image leave out int(steps - steps * strength): half a step less is right there.
        return next(
            (one for one in strengths if self.pipe.get_timesteps(self.steps, one, self.pipe.device)[1] == run),
            strengths[0],
        )

    def _run(self, run: int, **call):
        """Call the pipeline, and make sure that it runs the steps that are recorded.

        Raises:
            Interrupted: a signal came.
            UserError: it ran another number of steps.
        """
        ran = []

        def count(pipe, step, timestep, state: dict) -> dict:
            ran.append(step)
            if self.stop is not None and self.stop.received:
                raise Interrupted
            return state

        if "callback_on_step_end" in self.accepted:
            call["callback_on_step_end"] = count
        drawn = self.pipe(**call)
        scheduler = self.pipe.scheduler
        # PNDM, which Stable Diffusion 1.5 and 2.1-base ship with, takes one timestep twice.
        repeated = max(0, len(scheduler.timesteps) - self.steps)
        if ran and len(ran) != run + repeated and getattr(scheduler, "order", 1) == 1:
            raise UserError(
                f"--generator: {type(self.pipe).__name__} ran {len(ran)} denoising steps where {run} were asked for; "
                "expected another --steps or --scheduler"
            )
        return drawn

    def more_inputs(self, batch: Batch) -> dict:
        """What else a call of the pipeline takes for a batch."""
        return {}

    def missing_sources(self, batch: Batch) -> list[str]:
        """The sources of a batch whose images `draw` has to be given."""
        return [] if self._is_pure(batch) else [name for _, name, _ in self.cache.missing(self._source_keys(batch))]

    def _source_keys(self, batch: Batch) -> list[tuple]:
        return [("source", unit.source, batch.size) for unit in batch.units]

    @torch.inference_mode()
    def draw(
        self, batch: Batch, redraw: int, texts: list[str], images: dict[str, Image.Image], pad_to: int = 0
    ) -> torch.Tensor:
        """Draw a batch: float (N, 3, H, W) in [0, 1], on the device.

        Args:
            redraw: how often the batch's units were drawn before.
            texts: a prompt for each unit.
            images: RGB images of the sources that `missing_sources` names, in the batch's size.
            pad_to: draw at least so many images and throw the surplus away, so that all batches have one shape.
        """
        # Fill up the batch, and load its adapter.
        surplus = max(0, pad_to - len(batch.units))
        units, texts = batch.units + batch.units[-1:] * surplus, texts + texts[-1:] * surplus
        batch = batch._replace(units=units)
        if batch.adapter != self.adapter:
            self.adapters.switch(batch.adapter)
            self.adapter = batch.adapter
        # Draw from latents and embeddings where the pipeline takes them, else from images and texts.
        generators = [torch.Generator().manual_seed(unit.noise_seed(redraw)) for unit in units]
        run = steps_at(batch.level, self.steps)
        call = {
            "strength": self.strength_of(run),
            "num_inference_steps": self.steps,
            "guidance_scale": self.text_guidance,
            "generator": generators,
        }
        if self.by_latents:
            if not self._is_pure(batch):
                self._encode_sources(batch, images)
            self._encode_texts(texts, batch.adapter)
            latents = self._run(
                run,
                image=self._noised_from(batch, generators),
                output_type="latent",
                **call,
                **self._sides(batch),
                **self._embeddings(texts, batch.adapter),
            ).images
            if hasattr(self.pipe, "_unpack_latents"):  # Flux's, which are rows of patches
                sides = batch.size[1], batch.size[0]
                latents = self.pipe._unpack_latents(latents, *sides, self.pipe.vae_scale_factor)
            drawn = self._decode(latents)
        else:
            for key in self.cache.missing(self._source_keys(batch)):
                self.cache.put(key, (torch.frombuffer(bytearray(images[key[1]].tobytes()), dtype=torch.uint8),))
            pictures = [
                Image.frombytes("RGB", batch.size, self.cache.get(key)[0].numpy().tobytes())
                for key in self._source_keys(batch)
            ]
            call |= self._sides(batch) | self.more_inputs(batch)
            drawn = self._run(run, prompt=texts, image=pictures, output_type="pt", **call).images
        if drawn.shape[-2:] != (batch.size[1], batch.size[0]):
            raise UserError(
                f"--size: {type(self.pipe).__name__} drew {drawn.shape[-1]}x{drawn.shape[-2]}, not "
                f"{batch.size[0]}x{batch.size[1]}; expected a size that this generator can draw"
            )
        self.cache.shrink()
        return drawn[: len(units) - surplus].float()

    def _sides(self, batch: Batch) -> dict[str, int]:
        """A batch's width and height for pipelines that take them: some draw the model's own square without."""
        return {name: side for name, side in zip(("width", "height"), batch.size, strict=True) if name in self.accepted}

    def _encode_sources(self, batch: Batch, images: dict[str, Image.Image]) -> None:
        """Keep mean and standard deviation of each source's latent, (C, h, w) each, in the encoder's type."""
        missing = self.cache.missing(self._source_keys(batch))

        def encode(some: slice) -> None:
            keys = missing[some]
            pixels = self.pipe.image_processor.preprocess([images[key[1]] for key in keys])
            posterior = self.pipe.vae.encode(pixels.to(self.pipe.device, self.encoder_dtype)).latent_dist
            for key, mean, std in zip(keys, posterior.mean.cpu(), posterior.std.cpu(), strict=True):
                self.cache.put(key, (mean.clone(), std.clone()))

        self._in_parts("encoder", len(missing), batch.size[0] * batch.size[1], encode)

    def _in_parts(self, half: str, count: int, pixels: int, run: Callable) -> list:
        """What a half of the autoencoder gives of `count` images of so many pixels, as many at once as fit into memory.

        What fits is found out by halving, and is kept in pixels, so that images of other sizes go by it too. Nothing
        that is done already is done again.
        """
        found, start = [], 0
        while start < count:
            most = min(count - start, max(1, self.pixels_at_once[half] // pixels))
            try:
                found.append(run(slice(start, start + most)))
                start += most
                continue
            except torch.OutOfMemoryError:
                if most == 1:
                    raise
            # Not within the except clause, whose exception holds what has to be freed.
            torch.cuda.empty_cache()
            self.pixels_at_once[half] = most // 2 * pixels
        return found

    def _encode_texts(self, texts: list[str], adapter: str | None) -> None:
        """Keep the embeddings of each text, and of the empty text that guidance leads away from."""
        missing = [key[2] for key in self.cache.missing([("text", adapter, text) for text in texts])]
        taken = inspect.signature(self.pipe.encode_prompt).parameters
        # Those of several encoders want a text for each, and take the first for all where the others have none.
        more = {"do_classifier_free_guidance": True, "prompt_2": None, "prompt_3": None}
        more = {name: value for name, value in more.items() if name in taken}
        for start in range(0, len(missing), ENCODE_TEXTS):
            some = missing[start : start + ENCODE_TEXTS]
            encoded = self.pipe.encode_prompt(prompt=some, device=self.pipe.device, num_images_per_prompt=1, **more)
            named = list(zip(self.embeddings, encoded, strict=False))
            positive = [tensor.cpu() for name, tensor in named if not name.startswith("negative")]
            negative = [tensor[0].cpu().clone() for name, tensor in named if name.startswith("negative")]
            for place, text in enumerate(some):
                self.cache.put(("text", adapter, text), tuple(tensor[place].clone() for tensor in positive))
            self.cache.put(("negative", adapter), tuple(negative))

    def _embeddings(self, texts: list[str], adapter: str | None) -> dict[str, torch.Tensor]:
        """The texts as keyword arguments of the pipeline's call."""
        positive = map(torch.stack, zip(*(self.cache.get(("text", adapter, t)) for t in texts), strict=True))
        if self.cache.missing([("negative", adapter)]):
            self._encode_texts([""], adapter)
        negative = (part.expand(len(texts), *part.shape).contiguous() for part in self.cache.get(("negative", adapter)))
        return {
            name: next(negative if name.startswith("negative") else positive).to(self.pipe.device)
            for name in self.embeddings
        }

    def _noised_from(self, batch: Batch, generators: list[torch.Generator]) -> torch.Tensor:
        """The latents that the pipeline adds noise to, (N, C, h, w).

        The generators are used in the order in which the pipeline uses one of them for a single image: first the sample
        of the source's latent, then (in the pipeline) the noise that is added to it.
        """
        if self._is_pure(batch):
            # Unit variance before the noise is added makes the start of every scheduler what it is for text to image.
            multiple = 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
            shape = (1, self.pipe.vae.config.latent_channels, batch.size[1] // multiple, batch.size[0] // multiple)
            drawn = [randn_tensor(shape, generator=one, dtype=self.encoder_dtype) for one in generators]
            return torch.cat(drawn).to(self.pipe.device, self.dtype)
        sampled = []
        for key, generator in zip(self._source_keys(batch), generators, strict=True):
            mean, std = self.cache.get(key)
            noise = randn_tensor(mean[None].shape, generator=generator, dtype=mean.dtype)
            sampled.append(mean + std * noise)
        start = torch.cat(sampled).to(self.pipe.device)
        config = self.pipe.vae.config
        start = start.to(self.dtype)
        if config.latents_mean is not None and config.latents_std is not None:
            mean, std = self._statistics(start)
            return (start - mean) * config.scaling_factor / std
        return (start - config.shift_factor if config.shift_factor else start) * config.scaling_factor

    def _is_pure(self, batch: Batch) -> bool:
        return self.pure_noise and batch.level == 0

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.pipe.vae.config
        return tuple(
            torch.tensor(part).view(1, -1, 1, 1).to(like) for part in (config.latents_mean, config.latents_std)
        )

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (N, C, h, w) as images (N, 3, H, W) in [0, 1]."""
        config = self.pipe.vae.config
        if config.latents_mean is not None and config.latents_std is not None:
            mean, std = self._statistics(latents)
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor + (config.shift_factor or 0)
        pixels = latents.shape[-1] * latents.shape[-2] * 4 ** (len(config.block_out_channels) - 1)

        def decode(some: slice) -> torch.Tensor:
            return self.pipe.vae.decode(latents[some].to(self.decoder_dtype), return_dict=False)[0].float()

        decoded = self._in_parts("decoder", len(latents), pixels, decode)
        return torch.cat(decoded).div(2).add(0.5).clamp(0, 1)


@torch.inference_mode()
def to_host(drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
    """Images (N, 3, H, W) in [0, 1] on their way to the CPU, while the device goes on.

    Returns:
        uint8 (N, H, W, 3), bool (N,): whether each image is good, and a function that waits until both have arrived.
    """
    good = is_good(drawn)
    pixels = drawn.nan_to_num().mul(255).round().byte().permute(0, 2, 3, 1).contiguous()
    if not drawn.is_cuda:
        return pixels, good, lambda: None
    pixels, good = (tensor.to("cpu", non_blocking=True) for tensor in (pixels, good))
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(drawn.device))  # not that of the first device, which may be another
    return pixels, good, arrived.synchronize


def is_good(images: torch.Tensor) -> torch.Tensor:
    """Whether each image (N, 3, H, W) in [0, 1] is finite and not of one colour: bool (N,)."""
    flat = images.flatten(2)
    finite = flat.isfinite().all(-1).all(-1)
    return finite & ((flat.amax(-1) - flat.amin(-1)).amax(-1) > 1 / 255)
