"""Which prompts a generator's text encoders cut."""

from __future__ import annotations

from runtime.cli import UserError


def find_cut(pipe, texts: list[str]) -> list[str]:
    """Those of the texts that are longer, in tokens, than every one of a pipeline's text encoders reads."""
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    tokenizers = [part for part in (getattr(pipe, name, None) for name in names) if part is not None]
    if not tokenizers or not texts:
        return []
    cut = set(texts)
    for tokenizer in tokenizers:
        tokens = tokenizer(texts, truncation=False, verbose=False).input_ids
        cut &= {text for text, own in zip(texts, tokens, strict=True) if len(own) > tokenizer.model_max_length}
    return [text for text in texts if text in cut]


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
