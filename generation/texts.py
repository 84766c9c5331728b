"""Which prompts a generator's text encoders cut."""

from __future__ import annotations


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
