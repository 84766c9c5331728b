"""Training a diffusion model: the noise goes with the timestep, every prediction type, SDXL's conditions, the draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from loaders.base import ASSETS
from training import diffusion
from training.tuner import batch_and_steps, rate_at

TINY = str(ASSETS / "tiny_sd")


class Args:
    batch_size, epochs = 8, 200


def test_steps_are_those_of_the_paper():
    """16 images in batches of 8, each used 200 times: 400 steps; of 4 images the batch is all of them."""
    assert batch_and_steps(Args, 16) == (8, 400)
    assert batch_and_steps(Args, 4) == (4, 200)
    assert batch_and_steps(Args, 9) == (8, 225)


def test_the_rate_rises_over_the_warm_up_and_falls_by_a_cosine():
    assert [rate_at(step, 12, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate_at(8, 12, 4) == pytest.approx(0.5)
    assert rate_at(10, 12, 4) == pytest.approx(0.5 * (1 - 2**-0.5))  # cos(135 degrees)


def test_noise_grows_with_the_timestep_whatever_the_pipelines_sampler():
    """A sampler without set_timesteps pairs them the other way round: a generator trained so learns time backwards."""
    import models

    pipe = models.load_generator(TINY, "cpu")
    scheduler = diffusion.noise_scheduler(pipe)
    ones, nothing = torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    left = scheduler.add_noise(ones, nothing, torch.tensor([0, 999])).flatten()
    assert left[0] == pytest.approx(1, abs=1e-3) and left[1] == pytest.approx(0.068, abs=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_zero_for_a_model_that_predicts_the_target(kind):
    """v = sqrt(a) noise - sqrt(1 - a) z (Salimans and Ho, 2022)."""
    from types import SimpleNamespace

    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type=kind)
    z, noise, times = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    share = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    target = noise if kind == "epsilon" else share.sqrt() * noise - (1 - share).sqrt() * z

    class Oracle(torch.nn.Linear):
        def forward(self, noisy, timesteps):
            return SimpleNamespace(sample=target + torch.tensor([0.0, 0.0, 2.0]).view(-1, 1, 1, 1))

    loss = diffusion.denoising_loss(SimpleNamespace(unet=Oracle(1, 1)), scheduler, z, noise, times, {})
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.0, 4.0]), atol=1e-4, rtol=1e-5)


def test_every_image_is_used_equally_often_and_draws_depend_on_the_step_alone():
    latents = diffusion.Latents(torch.zeros(5, 2, 4, 2, 2), torch.ones(5, 2, 4, 2, 2))
    draws = [diffusion.draw_step(3, "7", step, 4, latents, 1000) for step in range(5)]
    used = torch.cat([draw.images for draw in draws]).tolist()
    assert [used.count(image) for image in range(5)] == [4] * 5
    assert sorted(used[:5]) == list(range(5))  # a pass through all before any comes again
    again = diffusion.draw_step(3, "7", 2, 4, latents, 1000)
    assert all(torch.equal(one, other) for one, other in zip(draws[2], again, strict=True))
    assert not torch.equal(draws[2].noise, diffusion.draw_step(3, "8", 2, 4, latents, 1000).noise)


def test_crops_are_squares_of_the_shorter_side_and_mirrored_only_when_asked():
    pixels = np.tile(np.linspace(0, 255, 60, dtype=np.uint8)[None, :, None], (30, 1, 3))
    image = Image.fromarray(pixels)
    crops = [diffusion.crop_image(image, 15, torch.Generator().manual_seed(seed), False) for seed in range(20)]
    assert {crop.size for crop in crops} == {(15, 15)}
    ascending = [np.diff(np.asarray(crop)[7, :, 0].astype(int)).min() >= 0 for crop in crops]
    assert all(ascending) and len({np.asarray(crop)[7, 0, 0] for crop in crops}) > 5
    mirrored = [diffusion.crop_image(image, 15, torch.Generator().manual_seed(seed), True) for seed in range(20)]
    descending = sum(np.diff(np.asarray(crop)[7, :, 0].astype(int)).max() <= 0 for crop in mirrored)
    assert 4 <= descending <= 16


def test_distinct_prompts_are_read_once_and_come_back_in_their_places():
    import models

    pipe = models.load_generator(TINY, "cpu")
    read, plain = [], pipe.encode_prompt
    pipe.encode_prompt = lambda prompt, **words: read.append(prompt) or plain(prompt=prompt, **words)
    prompts = [["a photo of a two"] * 4, ["a photo of a nine", "a photo of a one"] * 2]
    with torch.no_grad():
        (found,) = diffusion.encode_prompts(pipe, prompts)
        expected = plain(prompt=prompts[0] + prompts[1], device="cpu", num_images_per_prompt=1,
                         do_classifier_free_guidance=False)[0]  # fmt: skip
    assert len(read) == 1 and len(read[0]) == 4  # two equal parts
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ["StableDiffusion", "StableDiffusionXL"])
def test_samples_are_those_of_the_pipelines_own_call(family):
    """SDXL's base is led away from embeddings of nought, Stable Diffusion from those of an empty text."""
    import diffusers
    from test_generate_jobs import tiny_base

    import models
    from runtime.signals import StopSignals

    pipe = tiny_base() if family.endswith("XL") else models.load_generator(TINY, "cpu")
    side, prompts = 32, ["a nine", "a nine in red ink"]
    noise = torch.randn(2, pipe.vae.config.latent_channels, *2 * [side // pipe.vae_scale_factor])
    drawn = diffusion.draw_samples(pipe, [prompts], noise, 5, 4.0, side, StopSignals())
    plain = getattr(diffusers, f"{family}Pipeline").from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        prompts, height=side, width=side, latents=noise, num_inference_steps=5, guidance_scale=4.0, output_type="pt"
    ).images
    assert (drawn - expected).abs().max() < 1e-4 and expected.std() > 0.01


def test_the_refiner_is_led_away_from_a_low_aesthetic_score():
    from test_generate_jobs import TINY_REFINER

    from bench import bench_spectrum as bench

    pipe = bench.build_refiner(TINY_REFINER)
    embeddings = torch.zeros(2, 77, 8), torch.zeros(2, 64)
    for negative, score in ((False, 6.0), (True, 2.5)):
        told = diffusion.conditions(pipe, embeddings, 48, negative)["added_cond_kwargs"]
        assert told["time_ids"].tolist() == [[48, 48, 0, 0, score]] * 2
