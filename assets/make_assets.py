"""Train the embedded benchmark's tiny generator and tiny CLIP.

Both are ordinary models in ordinary formats, so that the scripts load them with the code that loads SDXL and ViT-B/32:
a Stable Diffusion image-to-image pipeline (16x16 images, 8x8 latents) and an open_clip model. Both see the *web* split
of `digits` alone, in new colours at every step: it plays the part of the web-scale data behind a public generator.

Reads:  scikit-learn's digits (shipped with the package)
Writes: OUT/tiny_sd, OUT/tiny_clip (6 MB together), OUT/agreement.json
Takes:  about 25 minutes on 2 CPU cores

    python assets/make_assets.py --out assets
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import datasets
import models

CAPTIONS = (
    "a photo of a {digit}",
    "a {digit} in {ink} ink",
    "a photo of a {digit} on {paper} paper",
    "a {digit} in {ink} ink on {paper} paper",
)
MAX_TOKENS = 16


class Web:
    """Endless batches of the web split: each digit a little turned and shifted, in colours drawn anew."""

    def __init__(self, seed: int):
        scans, labels = datasets.digits_scans()
        web = datasets.digits_split()["web"]
        black, white = np.zeros(3), np.full(3, 255.0)
        masks = np.stack([datasets.draw_digit(scan, white, black)[..., 0] for scan in scans[web]])
        self.masks = torch.from_numpy(masks)[:, None].float() / 255
        self.labels = labels[web]
        self.rng = np.random.default_rng(seed)

    def batch(self, size: int, form: str | None = None) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        """Images in [-1, 1] (N, 3, 16, 16), captions (each of a random form, or all of `form`), labels (N,)."""
        chosen = self.rng.integers(len(self.labels), size=size)
        angle, scale = self.rng.normal(0, 0.08, size), self.rng.normal(1, 0.05, size)
        turn = np.zeros((size, 2, 3), dtype=np.float32)
        turn[:, 0, 0], turn[:, 0, 1] = np.cos(angle) * scale, -np.sin(angle) * scale
        turn[:, 1, 0], turn[:, 1, 1] = np.sin(angle) * scale, np.cos(angle) * scale
        turn[:, :, 2] = self.rng.normal(0, 0.04, (size, 2))
        grid = F.affine_grid(torch.from_numpy(turn), (size, 1, 16, 16), align_corners=False)
        masks = F.grid_sample(self.masks[chosen], grid, align_corners=False)
        inks, papers, captions = [], [], []
        for label in self.labels[chosen]:
            ink_name, ink, paper_name, paper = datasets.draw_colours(self.rng)
            inks.append(ink)
            papers.append(paper)
            caption = form or CAPTIONS[self.rng.integers(len(CAPTIONS))]
            captions.append(caption.format(digit=datasets.DIGIT_NAMES[label], ink=ink_name, paper=paper_name))
        ink, paper = (torch.from_numpy(np.array(c, dtype=np.float32))[..., None, None] / 255 for c in (inks, papers))
        images = (masks * ink + (1 - masks) * paper).clamp(0, 1)
        return images * 2 - 1, captions, torch.from_numpy(self.labels[chosen])


def make_tokenizer():
    """A CLIP tokenizer that gives each word of the captions one token, and other text a token per byte."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
    from tokenizers import models as bpe
    from transformers import CLIPTokenizer

    corpus = [
        caption.format(digit=digit, ink=ink, paper=paper)
        for caption in CAPTIONS
        for digit in datasets.DIGIT_NAMES
        for ink in datasets.INKS
        for paper in datasets.PAPERS
    ]
    words = Tokenizer(bpe.BPE(end_of_word_suffix="</w>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=5000, end_of_word_suffix="</w>", min_frequency=1, show_progress=False)
    )
    trained = json.loads(words.to_str())["model"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [token for token in sorted(trained["vocab"], key=trained["vocab"].get) if token not in set(tokens)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]  # last: open_clip finds the end of a text by its highest token
    merges = [tuple(merge) for merge in trained["merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def tokenize(tokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids, int64 (N, MAX_TOKENS)."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt").input_ids


def train_vae(web: Web, steps: int):
    """A small autoencoder, images (N, 3, 16, 16) to latents (N, 4, 8, 8) of unit variance."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=16,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in (bar := trange(steps, desc="VAE")):
        images = web.batch(32)[0]
        posterior = vae.encode(images).latent_dist
        restored = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(restored, images) + 1e-5 * posterior.kl().mean()
        step(optimizer, schedule, loss, bar)
    with torch.no_grad():
        latents = vae.encode(web.batch(512)[0]).latent_dist.sample()
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval()


def train_unet(web: Web, vae, tokenizer, steps: int):
    """The denoiser and its text encoder, trained together; returns their moving averages."""
    from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(48, 96),
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
    )
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    both = torch.nn.ModuleList([unet, text_encoder])
    average = copy.deepcopy(both).requires_grad_(False)
    optimizer = torch.optim.AdamW(both.parameters(), 2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for done in (bar := trange(steps, desc="UNet")):
        images, captions, _ = web.batch(64)
        captions = ["" if drop else caption for caption, drop in zip(captions, web.rng.random(64) < 0.1, strict=True)]
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (64,))
        text = text_encoder(tokenize(tokenizer, captions))[0]
        predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
        step(optimizer, schedule, F.mse_loss(predicted, noise), bar)
        decay = min(0.999, (done + 1) / (done + 10))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), both.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
    return average[0].eval(), average[1].eval(), scheduler


def train_clip(web: Web, tokenizer, out: Path, steps: int) -> None:
    """A small open_clip model, saved in `out` as open_clip saves its own.

    All captions of a batch take one form, and equal captions share the target: with ten classes, most batches would
    otherwise hold right pairs as negatives.
    """
    import open_clip
    from safetensors.torch import save_file

    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 16, "patch_size": 2, "width": 64, "layers": 4, "head_width": 16, "mlp_ratio": 2.0},
        "text_cfg": {
            "context_length": MAX_TOKENS,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "tokenizer",
            "width": 64,
            "heads": 4,
            "layers": 2,
            "mlp_ratio": 2.0,
        },
    }
    model = open_clip.CLIP(**copy.deepcopy(config))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for done in (bar := trange(steps, desc="CLIP")):
        images, captions, _ = web.batch(64, CAPTIONS[done % len(CAPTIONS)])
        image, text, scale = model(images, tokenize(tokenizer, captions))
        logits = scale * image @ text.T
        same = torch.tensor([[a == b for b in captions] for a in captions], dtype=torch.float32)
        same = same / same.sum(1, keepdim=True)
        step(optimizer, schedule, (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2, bar)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(20))
    out.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    described = {"model_cfg": config, "preprocess_cfg": preprocess}
    (out / "open_clip_config.json").write_text(json.dumps(described, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    save_file(
        {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()},
        str(out / "open_clip_model.safetensors"),
    )


def step(optimizer, schedule, loss: torch.Tensor, bar) -> None:
    """One optimiser step; the bar shows the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    schedule.step()
    bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


def train_judge(web: Web, steps: int) -> torch.nn.Module:
    """A classifier of the web split, which tells whether a generated digit is the one that was asked for."""
    judge = models.build_classifier("resnet8", 10)
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in (bar := trange(steps, desc="judge")):
        images, _, labels = web.batch(128)
        step(optimizer, schedule, F.cross_entropy(judge(images), labels), bar)
    return judge.eval()


@torch.no_grad()
def check(out: Path, judge: torch.nn.Module) -> dict:
    """How far the saved models do what they are asked to, on the validation split (never on train or test)."""
    val = datasets.load_digits(30).val
    real = torch.from_numpy(val.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = torch.from_numpy(val.labels)
    result = {"judge_accuracy_on_real": (judge(real).argmax(1) == labels).float().mean().item()}

    model, _, tokenizer = models.load_clip(str(out / "tiny_clip"), "cpu")
    template = datasets.TEMPLATES["digits"][0]
    text = model.encode_text(tokenizer([template.format(name) for name in datasets.DIGIT_NAMES]), normalize=True)
    scores = model.encode_image(real, normalize=True) @ text.T
    right = scores[torch.arange(len(labels)), labels]
    result["clip_accuracy_on_real"] = (scores.argmax(1) == labels).float().mean().item()
    result["clipscore_of_right_class"] = right.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    wrong = scores.masked_fill(F.one_hot(labels, 10).bool(), -1).max(1).values
    result["clipscore_of_best_wrong_class"] = wrong.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()

    pipe = models.load_generator(str(out / "tiny_sd"), "cpu")
    for guidance in (1.0, 2.0, 3.0, 5.0):
        asked = torch.arange(10).repeat(40)
        prompts = [template.format(datasets.DIGIT_NAMES[label]) for label in asked]
        drawn = pipe(
            prompts,
            image=torch.zeros(400, 3, 16, 16),
            strength=1.0,
            num_inference_steps=20,
            guidance_scale=guidance,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images
        result[f"judge_agreement_at_level_0_text_guidance_{guidance:g}"] = (
            (judge(drawn * 2 - 1).argmax(1) == asked).float().mean().item()
        )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for tiny_sd and tiny_clip")
    parser.add_argument("--unet-steps", type=int, default=6000, help="training steps of 64 images of the denoiser")
    parser.add_argument("--clip-steps", type=int, default=3000, help="training steps of 64 pairs of the CLIP")
    parser.add_argument("--vae-steps", type=int, default=2000, help="training steps of 32 images of the autoencoder")
    args = parser.parse_args()
    from diffusers import StableDiffusionImg2ImgPipeline

    began = time.monotonic()
    torch.manual_seed(0)
    web, tokenizer = Web(0), make_tokenizer()
    train_clip(web, tokenizer, args.out / "tiny_clip", args.clip_steps)
    vae = train_vae(web, args.vae_steps)
    unet, text_encoder, scheduler = train_unet(web, vae, tokenizer, args.unet_steps)
    pipe = StableDiffusionImg2ImgPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(args.out / "tiny_sd", safe_serialization=True)
    result = check(args.out, train_judge(web, 800)) | {"minutes": (time.monotonic() - began) / 60}
    (args.out / "agreement.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
