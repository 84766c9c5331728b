"""The tokenizer of a benchmark's generator and CLIP."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import torch

MAX_TOKENS = 16


def merges_of(captions: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each word of the captions one token; a word's last letter ends in `</w>`.

    The most frequent pair is merged first, and of equally frequent ones the first by the alphabet: the tokenizers
    library breaks such ties at random, and a checkpoint that is taken up again must find the same tokens.
    """
    words = Counter(word for caption in captions for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", caption.lower()))
    parts_of = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges = []
    while True:
        pairs: Counter = Counter()
        for word, parts in parts_of.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in parts_of.values():
            for place in range(len(parts) - 1):
                if tuple(parts[place : place + 2]) == best:
                    parts[place : place + 2] = ["".join(best)]


def make_tokenizer(web):
    """A CLIP tokenizer that gives each word of the captions one token, and other text a token per byte."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    merges = merges_of(web.captions())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]  # last: open_clip finds the end of a text by its highest token
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
    tokenize(tokenizer, [""])  # it is saved with the padding of its last call: the same one at every moment
    return tokenizer


def tokenize(tokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids, int64 (N, MAX_TOKENS)."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids


class TokenTable:
    """Token ids of texts known beforehand, on a device: to tokenize each batch takes longer than a GPU's training step.

    Args:
        texts: all that will be asked for.
    """

    def __init__(self, tokenizer, texts: list[str], device: torch.device | str):
        self.rows = {text: row for row, text in enumerate(texts)}
        self.tokens = tokenize(tokenizer, texts).to(device)

    def of(self, texts: list[str]) -> torch.Tensor:
        """As `tokenize` gives them, on the device; KeyError for a text that the table lacks."""
        return self.tokens[torch.tensor([self.rows[text] for text in texts], device=self.tokens.device)]
