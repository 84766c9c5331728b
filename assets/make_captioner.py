"""Train the tiny captioner that `describe_domains.py --dataset biased_digits` takes: a BLIP of 213,000 weights.

It learns from the web of digits (webs.py), which holds no image that a classifier trains, validates or is tested
on, to say `a three in blue ink on yellow paper`.

Reads:  scikit-learn's digits
Writes: OUT/config.json, model.safetensors, the processor's and the tokenizer's files, under 1 MB
Takes:  a minute of CPU time. It then names ink and paper rightly always, the digit one time in three

    python assets/make_captioner.py --out assets/tiny_captioner
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from assets import webs
from runtime import cli

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LONGEST = 24  # tokens
BATCH = 64


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "make_captioner")
    parser.add_argument("--out", type=cli.new_folder, required=True, metavar="FOLDER", help="where the captioner goes")
    parser.add_argument("--steps", type=cli.whole(1), default=1200, metavar="N", help="batches of 64 images")
    return parser


def build_processor(captions: list[str], folder: Path):
    """A BLIP processor whose vocabulary is the words of `captions`."""
    from transformers import BertTokenizer, BlipImageProcessor, BlipProcessor

    words = sorted({word for caption in captions for word in caption.split()})
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *words])}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=LONGEST)
    size = {"height": webs.Digits.size, "width": webs.Digits.size}
    images = BlipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return BlipProcessor(images, tokenizer)


def build_model(words: int):
    """A BLIP of two text and three vision layers, 64 wide, with fresh weights."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {
        "vocab_size": words,
        "hidden_size": 64,
        "encoder_hidden_size": 64,
        "intermediate_size": 128,
        "projection_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LONGEST,
        "pad_token_id": SPECIAL.index("[PAD]"),
        "bos_token_id": SPECIAL.index("[CLS]"),
        "sep_token_id": SPECIAL.index("[SEP]"),
        "eos_token_id": SPECIAL.index("[SEP]"),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    vision = {
        "image_size": webs.Digits.size,
        "patch_size": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=64, image_text_hidden_size=64)
    return BlipForConditionalGeneration(config)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    web = webs.Digits(None)
    form = web.forms[3]
    processor = build_processor(web.captions(), args.out)
    model = build_model(len(processor.tokenizer)).train()

    # Train.
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    with cli.progress(args.steps, "training", "step") as bar:
        for _ in range(args.steps):
            images, captions, _ = web.batch(BATCH, form)
            tokens = processor.tokenizer(captions, return_tensors="pt", padding=True).input_ids
            loss = model(pixel_values=images, input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()

    # Save, and say how often it is right on scans of the validation split.
    model.eval().half().save_pretrained(args.out)
    processor.save_pretrained(args.out)
    model.float()
    images, labels = web.validation()
    with torch.inference_mode():
        tokens = model.generate(pixel_values=images, max_new_tokens=16)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    right = sum(web.class_names[label] in text.split() for label, text in zip(labels.tolist(), texts, strict=True))
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(
        f"{args.out}: {size / 1e6:.2f} MB; names the digit in {right} of {len(labels)} validation images: {texts[0]!r}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
