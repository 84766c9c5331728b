"""Tiny flow-matching generators and editors with fresh weights, made from configs: Z-Image, Qwen-Image and others.

Their tokenizer, of Qwen's kind, has the 256 bytes and the marks that their templates use.
"""

from __future__ import annotations

from pathlib import Path

import torch

import models
from loaders.base import ASSETS

SD = str(ASSETS / "tiny_sd")
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
MARKS += ["<|video_pad|>", "<think>", "</think>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer():
    """A tokenizer of Qwen's kind without merges: a token a byte."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocabulary = {symbol: place for place, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=4096)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def flow_scheduler(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def build_sd3():
    """A Stable Diffusion 3 in small, made for squares of 64 pixels: it counts steps otherwise, and takes a size."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Img2ImgPipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = models.load_generator(SD, "cpu").tokenizer
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, max_position_embeddings=tokenizer.model_max_length,
    )  # fmt: skip
    encoders = [CLIPTextModelWithProjection(config).eval() for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=64,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, shift_factor=0.1,
    )  # fmt: skip
    pipe = StableDiffusion3Img2ImgPipeline(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.eval(),
        text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_flux(folder: Path, guidance_embeds: bool = True):
    """FLUX.1 in small: packed latents, text guidance as an input, timesteps that hang on the size."""
    import tiny_editors
    from diffusers import FluxImg2ImgPipeline, FluxKontextPipeline

    parts = FluxKontextPipeline.from_pretrained(tiny_editors.save_kontext(folder, guidance_embeds)).components
    pipe = FluxImg2ImgPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def qwen3_config(tokenizer, layers: int):
    """The text encoder of Z-Image and of FLUX.2 [klein]."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip


def save_z_image(folder: Path) -> Path:
    """Z-Image: a language model's text, lists of latents, guidance that adds to one."""
    from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text = qwen3_config(tokenizer, layers=2)
    transformer = ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[512, 64, 64],
    )  # fmt: skip
    for parameter in transformer.parameters():
        if parameter.dim() == 2:  # fresh ones begin with zeros, under which no text and no noise matters
            torch.nn.init.normal_(parameter, std=0.1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, latent_channels=16,
        up_block_types=("UpDecoderBlock2D",) * 2, shift_factor=0.1, scaling_factor=0.36, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    ZImagePipeline(
        scheduler=flow_scheduler(shift=3.0), vae=vae, text_encoder=Qwen3Model(text), tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def qwen_parts(tokenizer) -> dict:
    """What Qwen-Image and its editor have in common."""
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    ids = dict(zip(MARKS, tokenizer.convert_tokens_to_ids(MARKS), strict=True))
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
        "rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "window_size": 56, "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.1] * 4,
        latents_std=[0.9, 1.1, 1.2, 0.8],
    )  # fmt: skip
    return {
        "scheduler": flow_scheduler(shift=1.0, use_dynamic_shifting=True), "vae": vae, "tokenizer": tokenizer,
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config), "transformer": transformer,
    }  # fmt: skip


def save_qwen_image(folder: Path) -> Path:
    """Qwen-Image: an autoencoder of videos, packed latents, texts of any length under a mask, true guidance."""
    from diffusers import QwenImagePipeline

    QwenImagePipeline(**qwen_parts(build_tokenizer())).save_pretrained(folder)
    return folder


def save_qwen_edit(folder: Path) -> Path:
    """Qwen-Image-Edit: the text encoder sees the source too."""
    from diffusers import QwenImageEditPipeline
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = build_tokenizer()
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    processor = Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor())
    QwenImageEditPipeline(**qwen_parts(tokenizer), processor=processor).save_pretrained(folder)
    return folder


def save_flux2_klein(folder: Path) -> Path:
    """FLUX.2 [klein]: packed latents, reference images beside the noise, no strength."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text = qwen3_config(tokenizer, layers=28)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    Flux2KleinPipeline(
        scheduler=flow_scheduler(shift=3.0, use_dynamic_shifting=True), vae=vae, text_encoder=Qwen3ForCausalLM(text),
        tokenizer=tokenizer, transformer=transformer,
    ).save_pretrained(folder)  # fmt: skip
    return folder
