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

from generation.worklist import Batch, noise_at, steps_at
from runtime.cli import UserError, first_line

# Pipelines that take latents for the image, and what their encode_prompt gives in turn, by the names that their call
# takes it by. All others are called with images and texts.
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
LATENT_PIPELINES = {
    "StableDiffusionImg2ImgPipeline": EMBEDDINGS[:2],
    "StableDiffusionXLImg2ImgPipeline": EMBEDDINGS,
    "StableDiffusion3Img2ImgPipeline": EMBEDDINGS,
    "FluxImg2ImgPipeline": ("prompt_embeds", "pooled_prompt_embeds"),
    "QwenImageImg2ImgPipeline": ("prompt_embeds", "prompt_embeds_mask"),
    "ZImageImg2ImgPipeline": EMBEDDINGS[:2],
}
# What a text is led away from where the pipeline wants one named: Qwen-Image's documentation has a blank.
NO_TEXT = " "
# Pixels that go through the autoencoder at once, at most: 8 images of 512x512. Of twice as many, the encoder's first
# layers in float32 would fill 2 GiB each.
ENCODE_PIXELS = 2**21
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


def is_video(vae) -> bool:
    """Whether an autoencoder takes videos, of which an image is one frame: Qwen-Image's."""
    return "temperal_downsample" in vae.config


def latent_channels(vae) -> int:
    """Channels of an autoencoder's latents."""
    return vae.config.z_dim if is_video(vae) else vae.config.latent_channels


def halvings(config: dict) -> int:
    """How often an autoencoder of this configuration halves the sides of an image."""
    return len(config.get("temperal_downsample", config.get("block_out_channels", [0] * 4)[1:]))


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
        by_noise: a level begins at its own noise (worklist.noise_at), not at the nearest of the generator's steps.
    """

    def __init__(
        self,
        pipe,
        steps: int,
        text_guidance: float,
        pure_noise: bool = False,
        cache_mb: int = 4096,
        adapters=None,
        by_noise: bool = False,
    ):
        self.pipe, self.steps, self.text_guidance, self.pure_noise = pipe, steps, text_guidance, pure_noise
        self.device = pipe.device  # once: diffusers looks through all modules of the pipeline for it, 10 ms each time
        self.cache = Cache(cache_mb)
        self.pixels_at_once = {"encoder": ENCODE_PIXELS, "decoder": ENCODE_PIXELS}  # less where memory was too small
        self.adapter: str | None = None
        self.adapters = adapters
        self.stop = None  # a StopSignals, which is looked at after each denoising step
        self.accepted = inspect.signature(type(pipe).__call__).parameters
        self.flow = hasattr(pipe, "transformer")  # flow matching counts steps and scales latents in its own way
        # A transformer that was distilled takes the guidance as an input, and runs once a step.
        self.distilled = bool(getattr(getattr(pipe, "transformer", None), "config", {}).get("guidance_embeds"))
        self.true_guidance = "true_cfg_scale" in self.accepted and not self.distilled
        self.embeddings = LATENT_PIPELINES.get(type(pipe).__name__, ())
        self.lists = type(pipe).__name__.startswith("ZImage")  # takes a list of texts of any length, not a tensor
        self.by_latents = self.takes_latents()
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
        self.by_noise = by_noise
        if by_noise:
            self.check_schedule()
        self.started: dict[tuple, int] = {}  # the timestep that denoising started at, by level and size
        if self.by_latents:
            self.prepare_vae()

    def takes_latents(self) -> bool:
        """Whether the pipeline can be called with latents and embeddings in place of images and texts."""
        if not self.embeddings:
            return False
        if type(self.pipe).__name__.startswith("Flux") and self.true_guidance and self.text_guidance > 1:
            return False  # FLUX.1 [schnell] with guidance, which only its own call knows how to give
        processor, channels = self.pipe.image_processor, latent_channels(self.pipe.vae)
        if self.lists:  # it knows latents by their channels, but its processor would take them for an image
            processor.register_to_config(vae_latent_channels=channels)
        # A pipeline knows latents by their channels, four where it names no other number: else it would encode them.
        return processor.config.get("vae_latent_channels", 4) == channels

    def prepare_vae(self) -> None:
        """Set the number types of the denoiser's latents and of the autoencoder's two halves."""
        vae, self.dtype = self.pipe.vae, (self.pipe.transformer if self.flow else self.pipe.unet).dtype
        # As the pipelines themselves do, but once: a float16 encoder or decoder of SDXL gives black images. Those of
        # flow matching do not.
        upcast = not self.flow and vae.config.force_upcast
        if upcast and self.dtype != torch.float32:
            vae.encoder.to(torch.float32)
            if vae.quant_conv is not None:
                vae.quant_conv.to(torch.float32)
        if upcast and self.dtype == torch.float16:
            vae.to(torch.float32)
        self.encoder_dtype = next(vae.encoder.parameters()).dtype
        self.decoder_dtype = next(vae.decoder.parameters()).dtype

    def start_timestep(self, level: int, size: tuple[int, int]) -> int:
        """The timestep at which a level's denoising started at a size, -1 where the pipeline does not say."""
        return self.started.get((level, size), -1)

    def check_schedule(self) -> None:
        """Raise UserError where the pipeline cannot be given the steps of levels by noise."""
        name, scheduler = "sigmas" if self.flow else "timesteps", self.pipe.scheduler
        if name not in self.accepted or name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise UserError(
                f"--levels-by noise: {type(self.pipe).__name__} with {type(scheduler).__name__} takes no {name}; "
                "expected --scheduler euler, or another generator"
            )

    def schedule_of(self, level: int) -> dict:
        """The steps of a level as the pipeline's call takes them."""
        if not self.by_noise:
            return {"strength": self.strength_of(steps_at(level, self.steps)), "num_inference_steps": self.steps}
        noise = noise_at(level, self.steps)
        call = {"strength": 1.0, "num_inference_steps": len(noise)}
        if self.flow:  # the scheduler shifts them, as it does its own
            return call | {"sigmas": noise}
        last = self.pipe.scheduler.config.num_train_timesteps
        return call | {"timesteps": [max(0, round(last * share) - 1) for share in noise]}

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
            (one for one in strengths if self.pipe.get_timesteps(self.steps, one, self.device)[1] == run),
            strengths[0],
        )

    def _run(self, level: int, size: tuple[int, int], **call):
        """Call the pipeline, and make sure that it runs the steps that are recorded.

        Raises:
            Interrupted: a signal came.
            UserError: it refuses the call, or ran another number of steps.
        """
        ran = []

        def count(pipe, step, timestep, state: dict) -> dict:
            if not ran and (level, size) not in self.started:
                self.started[level, size] = round(float(timestep))
            ran.append(step)
            if self.stop is not None and self.stop.received:
                raise Interrupted
            return state

        if "callback_on_step_end" in self.accepted:
            call["callback_on_step_end"] = count
        drawn = self.call_pipeline(**call)
        scheduler, run = self.pipe.scheduler, steps_at(level, self.steps, self.by_noise)
        # PNDM, which Stable Diffusion 1.5 and 2.1-base ship with, takes one timestep twice.
        repeated = max(0, len(scheduler.timesteps) - call["num_inference_steps"])
        if ran and len(ran) != run + repeated and getattr(scheduler, "order", 1) == 1:
            raise UserError(
                f"--generator: {type(self.pipe).__name__} ran {len(ran)} denoising steps where {run} were asked for; "
                "expected another --steps or --scheduler"
            )
        return drawn

    def call_pipeline(self, **call):
        """Call the pipeline; what it refuses is one line.

        Raises:
            UserError: it takes no such size, guidance or steps.
        """
        try:
            return self.pipe(**call)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"--generator: {type(self.pipe).__name__} refuses: {first_line(error)}") from error

    def guidance(self, count: int) -> dict:
        """The text guidance as the pipeline takes it, for so many images."""
        if not self.true_guidance:
            return {"guidance_scale": self.text_guidance}
        led = {"negative_prompt": [NO_TEXT] * count} if self.text_guidance > 1 else {}
        return {"true_cfg_scale": self.text_guidance} | led

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
        call = self.schedule_of(batch.level) | {"generator": generators}
        if self.by_latents:
            if not self._is_pure(batch):
                self._encode_sources(batch, images)
            self._encode_texts(texts, batch.adapter)
            guidance = {name: value for name, value in self.guidance(len(units)).items() if name != "negative_prompt"}
            latents = self._run(
                batch.level,
                batch.size,
                image=self._noised_from(batch, generators),
                output_type="latent",
                **call,
                **guidance,
                **self._sides(batch),
                **self._embeddings(texts, batch.adapter),
            ).images
            if hasattr(self.pipe, "_unpack_latents"):  # Flux's, which are rows of patches
                sides = batch.size[1], batch.size[0]
                latents = self.pipe._unpack_latents(latents, *sides, self.pipe.vae_scale_factor)
                latents = latents.flatten(1, 2) if latents.ndim == 5 else latents  # Qwen-Image's have a frame
            drawn = self._decode(latents)
        else:
            for key in self.cache.missing(self._source_keys(batch)):
                self.cache.put(key, (torch.frombuffer(bytearray(images[key[1]].tobytes()), dtype=torch.uint8),))
            pictures = [
                Image.frombytes("RGB", batch.size, self.cache.get(key)[0].numpy().tobytes())
                for key in self._source_keys(batch)
            ]
            call |= self.guidance(len(units)) | self._sides(batch) | self.more_inputs(batch)
            drawn = self._run(batch.level, batch.size, prompt=texts, image=pictures, output_type="pt", **call).images
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
            pixels = pixels.to(self.device, self.encoder_dtype)
            posterior = self.pipe.vae.encode(pixels[:, :, None] if is_video(self.pipe.vae) else pixels).latent_dist
            for key, mean, std in zip(keys, posterior.mean.cpu(), posterior.std.cpu(), strict=True):
                self.cache.put(
                    key, tuple(part.reshape(mean.shape[0], *mean.shape[-2:]).clone() for part in (mean, std))
                )

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
        more = {"do_classifier_free_guidance": True, "prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1}
        if "max_sequence_length" in self.accepted:
            more["max_sequence_length"] = self.accepted["max_sequence_length"].default
        more = {name: value for name, value in more.items() if name in taken}
        for start in range(0, len(missing), ENCODE_TEXTS):
            some = missing[start : start + ENCODE_TEXTS]
            # Z-Image writes into the list that it is given.
            encoded = self.pipe.encode_prompt(prompt=list(some), device=self.device, **more)
            named = list(zip(self.embeddings, encoded, strict=False))
            positive = [part for name, part in named if not name.startswith("negative")]
            if "prompt_embeds_mask" in self.embeddings:  # texts of any length: each keeps its own tokens alone
                hidden, mask = positive
                positive = [hidden] if mask is None else [[h[m.bool()] for h, m in zip(hidden, mask, strict=True)]]
            for place, text in enumerate(some):
                self.cache.put(("text", adapter, text), tuple(part[place].cpu().clone() for part in positive))
            if negative := [part[0].cpu().clone() for name, part in named if name.startswith("negative")]:
                self.cache.put(("negative", adapter), tuple(negative))

    def _embeddings(self, texts: list[str], adapter: str | None) -> dict[str, torch.Tensor]:
        """The texts as keyword arguments of the pipeline's call."""
        positive = [self.cache.get(("text", adapter, text)) for text in texts]
        if "prompt_embeds_mask" in self.embeddings:
            called = self._pad_texts([text for (text,) in positive], "prompt_embeds")
            if self.true_guidance and self.text_guidance > 1:
                self._encode_texts([NO_TEXT], adapter)
                [blank] = self.cache.get(("text", adapter, NO_TEXT))
                called |= self._pad_texts([blank] * len(texts), "negative_prompt_embeds")
            return called
        if self.cache.missing([("negative", adapter)]) and any(name.startswith("negative") for name in self.embeddings):
            self._encode_texts([""], adapter)
        negative = self.cache.get(("negative", adapter)) if ("negative", adapter) in self.cache.entries else ()
        parts = {False: zip(*positive, strict=True), True: ([part] * len(texts) for part in negative)}
        called = {name: next(parts[name.startswith("negative")]) for name in self.embeddings}
        if self.lists:
            return {name: [text.to(self.device) for text in part] for name, part in called.items()}
        return {name: torch.stack(list(part)).to(self.device) for name, part in called.items()}

    def _pad_texts(self, texts: list[torch.Tensor], name: str) -> dict[str, torch.Tensor]:
        """Texts (tokens, width) of several lengths as one tensor, and the mask of the tokens that are theirs."""
        padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        lengths = torch.tensor([len(text) for text in texts])
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        return {name: padded.to(self.device), f"{name}_mask": mask.to(self.device)}

    def _noised_from(self, batch: Batch, generators: list[torch.Generator]) -> torch.Tensor:
        """The latents that the pipeline adds noise to, (N, C, h, w).

        The generators are used in the order in which the pipeline uses one of them for a single image: first the sample
        of the source's latent, then (in the pipeline) the noise that is added to it.
        """
        if self._is_pure(batch):
            # Unit variance before the noise is added makes the start of every scheduler what it is for text to image.
            multiple = 2 ** halvings(self.pipe.vae.config)
            shape = (1, latent_channels(self.pipe.vae), batch.size[1] // multiple, batch.size[0] // multiple)
            drawn = [randn_tensor(shape, generator=one, dtype=self.encoder_dtype) for one in generators]
            return torch.cat(drawn).to(self.device, self.dtype)
        sampled = []
        for key, generator in zip(self._source_keys(batch), generators, strict=True):
            mean, std = self.cache.get(key)
            noise = randn_tensor(mean[None].shape, generator=generator, dtype=mean.dtype)
            sampled.append(mean + std * noise)
        start = torch.cat(sampled).to(self.device)
        config = self.pipe.vae.config
        start = start.to(self.dtype)
        if config.latents_mean is not None and config.latents_std is not None:
            mean, std = self._statistics(start)
            return (start - mean) * config.get("scaling_factor", 1) / std
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
            latents = latents * std / config.get("scaling_factor", 1) + mean
        else:
            latents = latents / config.scaling_factor + (config.shift_factor or 0)
        pixels = latents.shape[-1] * latents.shape[-2] * 4 ** halvings(config)

        def decode(some: slice) -> torch.Tensor:
            part = latents[some].to(self.decoder_dtype)
            if is_video(self.pipe.vae):
                return self.pipe.vae.decode(part[:, :, None], return_dict=False)[0][:, :, 0].float()
            return self.pipe.vae.decode(part, return_dict=False)[0].float()

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
        return pixels.cpu(), good.cpu(), lambda: None
    pixels, good = (tensor.to("cpu", non_blocking=True) for tensor in (pixels, good))
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(drawn.device))  # not that of the first device, which may be another
    return pixels, good, arrived.synchronize


def is_good(images: torch.Tensor) -> torch.Tensor:
    """Whether each image (N, 3, H, W) in [0, 1] is finite and not of one colour: bool (N,)."""
    flat = images.flatten(2)
    finite = flat.isfinite().all(-1).all(-1)
    return finite & ((flat.amax(-1) - flat.amin(-1)).amax(-1) > 1 / 255)
