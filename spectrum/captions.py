"""Captions of images by any image-text-to-text model of transformers, and the files that keep them.

Three families of models are told apart by what their processor takes:

    plain  BLIP, BLIP-2, GIT: pixels alone, or with the beginning of the caption
    task   Florence-2: a task token, such as <CAPTION> or <DETAILED_CAPTION>
    chat   SmolVLM, Qwen-VL and all others with a chat template: an image and a question
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from runtime.cli import UserError, first_line, is_out_of_memory
from runtime.device import Fitting
from runtime.retry import read_bytes
from runtime.text import read_csv

QUESTION = (
    "Describe the scene of this photo in one short sentence: the place, the light, the weather, the camera's view. "
    "Do not name the main subject."
)
TASKS = ("florence2", "florence_2")


def family_of(model, processor) -> str:
    """plain, task or chat."""
    if model.config.model_type in TASKS:
        return "task"
    return "chat" if getattr(processor, "chat_template", None) else "plain"


class Captioner:
    """A loaded captioner.

    Args:
        loaded: a model and its processor, of `models.load_captioner`.
        prompt: the question of a chat model, the task token of Florence-2, or the beginning of a plain model's caption;
            None for QUESTION, <CAPTION> and nothing.
        max_new_tokens: longest caption.

    Raises:
        UserError: a prompt that the model's family cannot take.
    """

    def __init__(self, loaded: tuple, prompt: str | None, max_new_tokens: int):
        self.model, self.processor = loaded
        self.family = family_of(self.model, self.processor)
        default = {"plain": "", "task": "<CAPTION>", "chat": QUESTION}[self.family]
        self.prompt = default if prompt is None else prompt
        if self.family == "task" and not self.prompt.startswith("<"):
            raise UserError(f"--caption-prompt {self.prompt!r}: expected a task token of this model, such as <CAPTION>")
        self.max_new_tokens = max_new_tokens
        self.fitting = Fitting()  # images at once
        if hasattr(self.processor, "tokenizer"):
            self.processor.tokenizer.padding_side = "left"  # an answer begins where the longest question ends
        if self.family == "chat":
            content = [{"type": "image"}, {"type": "text", "text": self.prompt}]
            self.text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )

    def caption(self, images: list[Image.Image]) -> list[str]:
        """A greedy caption of each RGB image, whitespace collapsed.

        Raises:
            UserError: the model cannot take the images.
        """
        parts = self.fitting.run(len(images), lambda some: self._caption(images[some]))
        return [text for part in parts for text in part]

    def _caption(self, images: list[Image.Image]) -> list[str]:
        import torch

        count = len(images)
        if self.family == "chat":
            inputs = {"text": [self.text] * count, "images": [[image] for image in images], "padding": True}
        elif self.family == "task" or self.prompt:
            inputs = {"text": [self.prompt] * count, "images": images, "padding": True}
        else:
            inputs = {"images": images}
        try:
            inputs = self.processor(**inputs, return_tensors="pt").to(self.model.device)
            inputs = {
                name: value.to(self.model.dtype) if torch.is_floating_point(value) else value
                for name, value in inputs.items()
            }
            with torch.inference_mode():
                tokens = self.model.generate(
                    **inputs,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.1 if self.family == "chat" else 1.0,
                )
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"--captioner: cannot caption these images: {first_line(error)}") from error
        if self.family == "chat":  # what such a model gives begins with the question
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]


def read_caption_table(path: Path) -> dict[str, str]:
    """The caption of each source: captions.jsonl of describe_domains.py, or a CSV file with columns source, caption.

    Raises:
        UserError: a column is missing, two captions of one source in a CSV file, or a file of another form.
    """
    if path.suffix == ".csv":
        captions: dict[str, str] = {}
        for number, row in read_csv(path, ["source", "caption"]):
            caption = row["caption"].strip()
            if captions.setdefault(row["source"], caption) != caption:
                raise UserError(f"{path} row {number}: {row['source']} has another caption above; expected one of each")
        return captions
    rows = read_captions([path])
    if not rows:
        raise UserError(f"{path}: no captions; expected a .csv with columns source,caption or captions.jsonl")
    return {source: (row["caption"] or "").strip() for source, row in rows.items()}


def read_captions(paths: list[Path]) -> dict[str, dict]:
    """Rows of captions.jsonl files by source (`source`, `label`, `caption`); a line that a kill left half is no row.

    The caption is None where the image could not be read.
    """
    found = {}
    for path in paths:
        for line in read_bytes(path).split(b"\n"):
            try:
                row = json.loads(line.decode())
                found[row["source"]] = {name: row[name] for name in ("source", "label", "caption")}
            except (ValueError, TypeError, KeyError):
                continue
    return found
