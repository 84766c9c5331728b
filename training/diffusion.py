"""Training a latent diffusion model on a few images: their latents, the draws of a step, its loss, and samples.

torch is imported at the top: a trainer imports this module where it trains.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from PIL import Image

from runtime.cli import UserError
from runtime.files import digest_int
from runtime.signals import StopSignals

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # what a generator may predict
NOISE_LEVELS = 4  # parts of the timesteps by which losses are told apart, from the least noise up


class Latents(NamedTuple):
    """Images as the autoencoder sees them: mean and standard deviation, float32 (images, crops, C, h, w) each."""

    mean: torch.Tensor
    std: torch.Tensor

    @property
    def bytes(self) -> int:
        return self.mean.nbytes + self.std.nbytes


class Draw(NamedTuple):
    """What chance decides in a step of one adapter, on the CPU.

    Attributes:
        images, crops: which latents, int64 (n,).
        sample: normal noise of the latents' own distribution, float (n, C, h, w).
        noise: what the model has to predict, float (n, C, h, w).
        timesteps: int64 (n,).
    """

    images: torch.Tensor
    crops: torch.Tensor
    sample: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor


def place_of(pipe) -> tuple[torch.device, torch.dtype]:
    """Where a generator's UNet is, and its number type; a pipeline's own properties take 10 ms to find either."""
    weight = next(pipe.unet.parameters())
    return weight.device, weight.dtype


def noise_scheduler(pipe):
    """The scheduler that training adds noise by: betas and prediction type of the pipeline's own.

    Never the pipeline's scheduler itself: a sampler without set_timesteps may pair its noise levels with other
    timesteps than training does.

    Raises:
        UserError: the generator was trained with other noise than that of betas (EDM's, flow matching's).
    """
    from diffusers import DDPMScheduler

    kind = pipe.scheduler.config.get("prediction_type")
    if not hasattr(pipe.scheduler, "alphas_cumprod") or kind not in PREDICTIONS:
        raise UserError(
            f"--generator: its scheduler is a {type(pipe.scheduler).__name__} that predicts {kind}; expected a "
            "generator of Stable Diffusion's noise schedule"
        )
    return DDPMScheduler.from_config(pipe.scheduler.config)


def crop_image(image: Image.Image, side: int, generator: torch.Generator, flip: bool) -> Image.Image:
    """An RGB image resized to a shorter side of `side` pixels (bilinear), then a random square of it (DataDream).

    Args:
        flip: mirror half of the crops.
    """
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = (int(torch.randint(length - side + 1, (), generator=generator)) for length in (width, height))
    mirrored = bool(torch.rand((), generator=generator) < 0.5)
    square = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and mirrored else square


@torch.inference_mode()
def encode_images(
    pipe, images: Iterable[Image.Image], names: list[str], side: int, crops: int, flip: bool, seed: int
) -> Latents:
    """`crops` random crops of each image through the autoencoder, once; those of an image follow from its name.

    The encoder works in float32 where its configuration asks for it (SDXL's overflows in float16).
    """
    vae = pipe.vae
    if vae.config.force_upcast:
        vae.to(torch.float32)
    device, dtype = place_of(pipe)[0], next(vae.encoder.parameters()).dtype
    parts = []
    for image, name in zip(images, names, strict=True):
        generator = torch.Generator().manual_seed(digest_int("crop", seed, name))
        squares = [crop_image(image, side, generator, flip) for _ in range(crops)]
        posterior = vae.encode(pipe.image_processor.preprocess(squares).to(device, dtype)).latent_dist
        parts.append((posterior.mean.float(), posterior.std.float()))
    mean, std = (torch.stack(some) for some in zip(*parts, strict=True))
    return Latents(mean, std)


def draw_step(seed: int, name: str, step: int, batch: int, latents: Latents, timesteps: int) -> Draw:
    """The draws of a step, by (seed, name, step) alone: whatever was trained before it or beside it.

    Every image is used equally often: the images are passed through in one random order after another.
    """
    images, crops, *shape = latents.mean.shape
    passes: dict[int, list[int]] = {}
    chosen = []
    for place in range(step * batch, (step + 1) * batch):
        number, offset = divmod(place, images)
        if number not in passes:
            order = torch.Generator().manual_seed(digest_int("order", seed, name, number))
            passes[number] = torch.randperm(images, generator=order).tolist()
        chosen.append(passes[number][offset])
    generator = torch.Generator().manual_seed(digest_int("step", seed, name, step))
    return Draw(
        torch.tensor(chosen),
        torch.randint(crops, (batch,), generator=generator),
        torch.randn(batch, *shape, generator=generator),
        torch.randn(batch, *shape, generator=generator),
        torch.randint(timesteps, (batch,), generator=generator),
    )


def sample_latents(pipe, latents: Latents, draw: Draw) -> torch.Tensor:
    """The latents of a draw as the UNet takes them, float32 (n, C, h, w) on the latents' device."""
    device = latents.mean.device
    places = draw.images.to(device), draw.crops.to(device)
    shift, scale = latent_scale(pipe.vae, device)
    return (latents.mean[places] + latents.std[places] * draw.sample.to(device) - shift) * scale


def latent_scale(vae, device) -> tuple[torch.Tensor, torch.Tensor]:
    """What is taken from an autoencoder's latents, and what they are then multiplied by, before the UNet sees them."""
    config = vae.config
    if getattr(config, "latents_mean", None) is None or getattr(config, "latents_std", None) is None:
        return torch.zeros((), device=device), torch.tensor(config.scaling_factor, device=device)
    both = config.latents_mean, config.latents_std
    mean, std = (torch.tensor(part, device=device).view(1, -1, 1, 1) for part in both)
    return mean, config.scaling_factor / std


def encode_prompts(pipe, prompts: list[list[str]]) -> tuple[torch.Tensor, ...]:
    """Embeddings of the prompts of each adapter's images, with gradients: distinct prompts are read once.

    Args:
        prompts: for each adapter, as many prompts as for the others.

    Returns:
        (N, L, D), and for SDXL the pooled (N, D): all prompts of the first adapter, then those of the next.
    """
    distinct = [list(dict.fromkeys(some)) for some in prompts]
    most = max(map(len, distinct))
    texts = [text for some in distinct for text in some + some[-1:] * (most - len(some))]  # equal parts
    device, _ = place_of(pipe)
    encoded = pipe.encode_prompt(
        prompt=texts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    rows = [
        group * most + some.index(text)
        for group, (some, own) in enumerate(zip(distinct, prompts, strict=True))
        for text in own
    ]
    rows = torch.tensor(rows, device=device)
    return tuple(encoded[place][rows] for place in ((0, 2) if len(encoded) > 2 else (0,)))


def conditions(pipe, embeddings: tuple[torch.Tensor, ...], side: int, negative: bool = False) -> dict:
    """The conditions of a UNet beside the timestep: embeddings, and for SDXL the pooled ones and the images' size.

    Sizes are those of DataDream's images: `side` x `side`, not cropped; the refiner's aesthetic score is 6, and 2.5
    where it is led away from.
    """
    told = {"encoder_hidden_states": embeddings[0]}
    if len(embeddings) > 1:
        size, width = (side, side), embeddings[1].shape[-1]
        pair = pipe._get_add_time_ids(
            size, (0, 0), size, 6.0, 2.5, size, (0, 0), size, embeddings[1].dtype, text_encoder_projection_dim=width
        )
        ids = pair[negative].to(embeddings[1].device).expand(len(embeddings[1]), -1)
        told["added_cond_kwargs"] = {"text_embeds": embeddings[1], "time_ids": ids}
    return told


def denoising_loss(pipe, scheduler, z: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, told: dict):
    """The squared error of each image's prediction: of the noise, or of the velocity where the model predicts that.

    Args:
        z: latents, float (n, C, h, w).
        told: of `conditions`.

    Returns:
        float32 (n,).
    """
    noisy = scheduler.add_noise(z, noise, timesteps)
    predicted = pipe.unet(noisy.to(place_of(pipe)[1]), timesteps, **told).sample
    kind = scheduler.config.prediction_type
    target = {"epsilon": noise, "v_prediction": None, "sample": z}[kind]
    if target is None:
        target = scheduler.get_velocity(z, noise, timesteps)
    return (predicted.float() - target).square().flatten(1).mean(1)


def noise_parts(values: torch.Tensor, timesteps: torch.Tensor, total: int) -> list[float | None]:
    """The mean of `values`, (n,), in each of NOISE_LEVELS equal parts of the timesteps; None where there is none."""
    part = (timesteps * NOISE_LEVELS).div(total, rounding_mode="floor")
    means = [values[part == number] for number in range(NOISE_LEVELS)]
    return [some.mean().item() if len(some) else None for some in means]


@torch.inference_mode()
def draw_samples(
    pipe, prompts: list[list[str]], noise: torch.Tensor, steps: int, guidance: float, side: int, stop: StopSignals
) -> torch.Tensor | None:
    """Images drawn from noise alone, for a sheet: float (N, 3, H, W) in [0, 1] on the CPU; None after a signal.

    The pipeline's own call would put unconditional and conditional images into one batch, which adapters side by side
    cannot tell apart.

    Args:
        prompts: for each adapter, as many as for the others.
        noise: float (N, C, h, w).
    """
    embedded, empty = (encode_prompts(pipe, texts) for texts in (prompts, [[""] * len(some) for some in prompts]))
    if pipe.config.get("force_zeros_for_empty_prompt"):  # SDXL's base model: nothing, and not an empty text
        empty = tuple(map(torch.zeros_like, empty))
    positive, negative = conditions(pipe, embedded, side), conditions(pipe, empty, side, negative=True)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    device, dtype = place_of(pipe)
    scheduler.set_timesteps(steps, device=device)
    z = noise.to(device) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        if stop.received:
            return None
        x = scheduler.scale_model_input(z, timestep).to(dtype)
        toward, away = (pipe.unet(x, timestep, **told).sample.float() for told in (positive, negative))
        z = scheduler.step(away + guidance * (toward - away), timestep, z).prev_sample
    shift, scale = latent_scale(pipe.vae, z.device)
    z, decoder_dtype = z / scale + shift, next(pipe.vae.decoder.parameters()).dtype
    images = [pipe.vae.decode(some.to(decoder_dtype)).sample.float().cpu() for some in z.split(4)]
    return torch.cat(images).div(2).add(0.5).clamp(0, 1)
