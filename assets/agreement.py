"""Whether the finished models do what their prompts ask, and whether the generator learnt time forwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import models
from assets.tokens import tokenize


def training_noise(scheduler):
    """The noise that a denoiser learns: DDPM's, whose amount rises with the timestep.

    A sampler's own `add_noise` must not stand in for it: DPMSolverMultistepScheduler without `set_timesteps` gives
    timestep T the noise of 999 - T, and a denoiser trained so looks right and follows no prompt.
    """
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(scheduler.config)


@torch.no_grad()
def check(web, generator: Path, clip: Path, judge: nn.Module, device: str) -> dict:
    """How far the saved models do what they are asked to, on the validation images (never on train or test)."""
    # Test judge and CLIP on real images.
    real, labels = (one.to(device) for one in web.validation())
    result = {"judge_accuracy_on_real": (judge(real).argmax(1) == labels).float().mean().item()}

    model, _, tokenizer = models.load_clip(str(clip), device)
    names = web.class_names
    text = model.encode_text(tokenizer([web.template.format(name) for name in names]).to(device), normalize=True)
    scores = torch.cat([model.encode_image(part, normalize=True) for part in real.split(500)]) @ text.T
    right = scores[torch.arange(len(labels)), labels]
    result["clip_accuracy_on_real"] = (scores.argmax(1) == labels).float().mean().item()
    quantiles = torch.tensor([0.05, 0.5, 0.95], device=device)
    result["clipscore_of_right_class"] = right.quantile(quantiles).tolist()
    wrong = scores.masked_fill(F.one_hot(labels, len(names)).bool(), -1).max(1).values
    result["clipscore_of_best_wrong_class"] = wrong.quantile(quantiles).tolist()

    # Test images of the generator at level 0.
    pipe = models.load_generator(str(generator), device, dtype="float32")

    def draw(prompts: list[str], guidance: float) -> torch.Tensor:
        """Images in [-1, 1] at level 0."""
        blank = torch.zeros(len(prompts), 3, web.size, web.size)
        settings = {"strength": 1.0, "num_inference_steps": 20, "guidance_scale": guidance, "output_type": "pt"}
        noise = torch.Generator().manual_seed(0)
        return pipe(prompts, image=blank, generator=noise, **settings).images.to(device) * 2 - 1

    asked = torch.tensor(web.asked).repeat(400 // len(web.asked))
    for guidance in (1.0, 2.0, 3.0, 5.0):
        drawn = draw([web.template.format(names[label]) for label in asked], guidance)
        agreement = (judge(drawn).argmax(1).cpu() == asked).float().mean().item()
        result[f"judge_agreement_at_level_0_text_guidance_{guidance:g}"] = agreement
    if web.looks():
        prompts, wanted = zip(*web.looks(), strict=True)
        seen = web.see(draw(list(prompts), 3.0).cpu())
        for word in wanted[0]:
            right = np.mean([one[word] == other[word] for one, other in zip(wanted, seen, strict=True)])
            result[f"{word}_as_asked_at_level_0_text_guidance_3"] = float(right)
    result["loss_by_timestep"] = losses_by_timestep(
        pipe, real[:200], web.template, [names[label] for label in labels[:200]]
    )
    return result


@torch.no_grad()
def losses_by_timestep(pipe, images: torch.Tensor, template: str, names: list[str]) -> dict[str, list[float]]:
    """How well a generator predicts light and heavy noise when it is told the right timestep, and the opposite one.

    A generator that learnt time forwards predicts better when told the truth, at both ends.

    Args:
        images: float (N, 3, H, W) in [-1, 1], on the generator's device; names: of their classes.

    Returns:
        {"light": [told T, told 999 - T], "heavy": the same}: mean squared errors, T = 100 and 899.
    """
    generator = torch.Generator().manual_seed(0)
    scheduler = training_noise(pipe.scheduler)
    latents = pipe.vae.encode(images.to(pipe.vae.dtype)).latent_dist.mean * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    text = pipe.text_encoder(tokenize(pipe.tokenizer, [template.format(name) for name in names]).to(latents.device))[0]
    result = {}
    for name, timestep in (("light", 100), ("heavy", 899)):
        noisy = scheduler.add_noise(latents, noise, torch.full((len(latents),), timestep, device=latents.device))
        result[name] = [
            F.mse_loss(pipe.unet(noisy, told, text).sample.float(), noise.float()).item()
            for told in (timestep, 999 - timestep)
        ]
    return result
