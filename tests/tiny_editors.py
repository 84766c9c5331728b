"""Tiny editors and inpainting models with fresh weights, made from configs beside the embedded generator's parts."""

from __future__ import annotations

from pathlib import Path

import torch

import models
from loaders.base import ASSETS

SD = str(ASSETS / "tiny_sd")


def wide_unet(pipe, channels: int):
    """The embedded generator's UNet, smaller, with more input channels and fresh weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    small = {"in_channels": channels, "block_out_channels": [16, 32], "norm_num_groups": 8}
    return UNet2DConditionModel.from_config(dict(pipe.unet.config) | small)


def save_pix2pix(folder: Path) -> Path:
    """InstructPix2Pix: a UNet of eight input channels, the noisy latents and the source's."""
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline

    pipe = models.load_generator(SD, "cpu")
    StableDiffusionInstructPix2PixPipeline(
        vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=wide_unet(pipe, 8),
        scheduler=EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_pix2pix_xl(folder: Path) -> Path:
    """SDXL's InstructPix2Pix: two text encoders, and conditions on sizes."""
    from diffusers import (
        EulerAncestralDiscreteScheduler,
        StableDiffusionXLInstructPix2PixPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    pipe = models.load_generator(SD, "cpu")
    torch.manual_seed(0)
    text = dict(pipe.text_encoder.config.to_dict())
    second = CLIPTextModelWithProjection(CLIPTextConfig(**text | {"projection_dim": 32})).eval()
    own = {
        "in_channels": 8, "block_out_channels": [16, 32], "norm_num_groups": 8, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8,
        "cross_attention_dim": 2 * text["hidden_size"],
    }  # fmt: skip
    StableDiffusionXLInstructPix2PixPipeline(
        vae=pipe.vae, text_encoder=pipe.text_encoder, text_encoder_2=second, tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer, unet=UNet2DConditionModel.from_config(dict(pipe.unet.config) | own),
        scheduler=EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config), add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_inpainter(folder: Path) -> Path:
    """Stable Diffusion for inpainting: a UNet of nine input channels, with the mask and the masked source."""
    from diffusers import StableDiffusionInpaintPipeline

    pipe = models.load_generator(SD, "cpu")
    StableDiffusionInpaintPipeline(
        vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=wide_unet(pipe, 9),
        scheduler=pipe.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_kontext(folder: Path, guidance_embeds: bool = True) -> Path:
    """Flux Kontext: a transformer over packed latents of noise and source; the text's guidance is an input of it."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxKontextPipeline,
        FluxTransformer2DModel,
    )
    from transformers import T5Config, T5EncoderModel

    pipe = models.load_generator(SD, "cpu")
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=len(pipe.tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKL.from_config(dict(pipe.vae.config) | {"shift_factor": 0.1}),
        text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=pipe.tokenizer,
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=4 * pipe.vae.config.latent_channels, num_layers=1, num_single_layers=1,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
            pooled_projection_dim=pipe.text_encoder.config.hidden_size, guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 4, 8),
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder
