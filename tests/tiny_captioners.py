"""Tiny captioners of the three families with fresh weights, made from configs."""

from __future__ import annotations

from pathlib import Path

WORDS = "<pad> <unk> <s> </s> <mask> a photo of on paper red blue what is this scene user assistant the".split()


def build_tokenizer(extra: list[str], **named):
    """A word-level tokenizer; `extra` are special tokens, of which some are `named`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate([*WORDS, *extra])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        mask_token="<mask>", additional_special_tokens=extra, model_max_length=64,
        extra_special_tokens=named or None,
    )  # fmt: skip


def save_git(folder: Path) -> Path:
    """GIT, of the plain family."""
    from transformers import CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GitConfig(
        vision_config=small | {"image_size": 16, "patch_size": 8}, vocab_size=len(WORDS), bos_token_id=2,
        eos_token_id=3, pad_token_id=0, max_position_embeddings=64, **small,
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    GitForCausalLM(config).save_pretrained(folder)
    GitProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size), build_tokenizer([])).save_pretrained(
        folder
    )
    return folder


def save_qwen(folder: Path) -> Path:
    """Qwen2-VL, of the chat family."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor, Qwen2VLProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    extra = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = build_tokenizer(extra, image_token=extra[2], video_token=extra[3])
    ids = dict(zip(("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id"),
                   tokenizer.convert_tokens_to_ids(extra), strict=True))  # fmt: skip
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        **ids,
    )  # fmt: skip
    template = (
        "{% for message in messages %}user {% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "<|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "assistant"
    )
    sizes = {"patch_size": 4, "min_pixels": 64, "max_pixels": 1024}
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    Qwen2VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=template
    ).save_pretrained(folder)
    return folder


def save_florence(folder: Path) -> Path:
    """Florence-2, of the task family."""
    from transformers import CLIPImageProcessor, Florence2Config, Florence2ForConditionalGeneration, Florence2Processor

    tokenizer = build_tokenizer(["<image>"], image_token="<image>")
    config = Florence2Config(
        text_config={
            "model_type": "bart", "vocab_size": len(tokenizer), "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
            "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "decoder_start_token_id": 2,
            "forced_eos_token_id": 3, "max_position_embeddings": 128,
        },
        vision_config={
            "embed_dim": [8, 8, 16, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 2], "num_groups": [1, 1, 1, 2],
            "window_size": 2, "projection_dim": 32,
        },
        image_token_id=len(WORDS),
    )  # fmt: skip
    Florence2ForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=5)
    Florence2Processor(images, tokenizer, num_additional_image_tokens=1).save_pretrained(folder)
    return folder
