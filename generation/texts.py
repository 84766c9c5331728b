"""Which prompts a generator's text encoders cut."""

from __future__ import annotations

import inspect
import math

from runtime.cli import UserError


def find_cut(pipe, texts: list[str]) -> list[str]:
    """Those of the texts that are longer, in tokens, than every one of a pipeline's text encoders reads."""
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    tokenizers = [part for part in (getattr(pipe, name, None) for name in names) if part is not None]
    if not tokenizers or not texts:
        return []
    cut = set(texts)
    for tokenizer in tokenizers:
        wrapped, most = [wrap_text(pipe, tokenizer, text) for text in texts], read_tokens(pipe, tokenizer)
        tokens = tokenizer(wrapped, truncation=False, verbose=False).input_ids
        cut &= {text for text, own in zip(texts, tokens, strict=True) if len(own) > most}
    return [text for text in texts if text in cut]


def wrap_text(pipe, tokenizer, text: str) -> str:
    """A text in the template that a pipeline puts it into, whose tokens count too."""
    if hasattr(pipe, "prompt_template_encode"):  # Qwen-Image
        return pipe.prompt_template_encode.format(text)
    if getattr(tokenizer, "chat_template", None):  # Z-Image, FLUX.2
        thinking = "Klein" not in type(pipe).__name__
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
    return text


def read_tokens(pipe, tokenizer) -> float:
    """How many tokens of a text, in its template, a pipeline reads."""
    most = getattr(tokenizer, "model_max_length", math.inf)
    asked = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    if asked is None or getattr(pipe, "processor", None) is not None:  # Qwen-Image-Edit cuts nothing
        return most
    return min(most, asked.default + getattr(pipe, "prompt_template_encode_start_idx", 0))


def check_length(pipe, texts: list[str], generator: str, on_long_prompt: str) -> None:
    """Print how many prompts a generator cuts.

    Args:
        generator: its name, for the message.
        on_long_prompt: of --on-long-prompt: `cut` or `error`.

    Raises:
        UserError: it cuts one, and `on_long_prompt` is `error`.
    """
    cut = find_cut(pipe, texts)
    if not cut:
        return
    found = f"{len(cut)} of {len(texts)} prompts are longer than {generator} reads"
    if on_long_prompt == "error":
        raise UserError(f"--prompts: {found}, the first {cut[0]!r}; expected shorter ones, or --on-long-prompt cut")
    print(f"{found}, and are cut, the first {cut[0]!r}", flush=True)
