"""Train a benchmark's own generator and CLIP from scratch, on images that play the part of the web.

Both are ordinary models in ordinary formats, so that the scripts load them with the code that loads SDXL and ViT-B/32:
a Stable Diffusion image-to-image pipeline and an open_clip model. Both see the benchmark's *web* alone, which holds no
image that a classifier trains, validates or is tested on (webs.py): it stands for the web-scale data behind a public
generator.

    digits       scikit-learn's digits of the web split, in new colours at every step; its models are in assets/
    cifar100_lt  CIFAR-100's training images that the subset of ratio 100 leaves over: 37,173
    cifar100_lt_20  the same for the long-tailed set of every fifth class; all images of the other 80 classes are web
    toycam       clear pictures of its animals in scenes of any colours; its models are in assets/ too

Reads:  scikit-learn's digits (shipped with the package), or CIFAR-100 as train_lt.py reads it
Writes: OUT/tiny_sd with its agreement.json, OUT/tiny_clip; while it is at work OUT/checkpoint.pt
Takes:  on 2 idle CPU cores about 30 minutes each for digits (6 MB) and toycam (3 MB), 10 for a generator of wrong
        captions that starts from the other; a GPU is hardly faster (28 steps a second: Python's own time), but
        trains several at once; cifar100_lt_gpu is for a GPU alone

A signal (SIGTERM, SIGUSR2), or the end of --minutes, is answered by a checkpoint and exit code 75: the same command
resumes, to the same weights.

    python assets/make_assets.py --out assets
    python assets/make_assets.py --caption-noise 0.6 --sizes digits_noisy --start assets/tiny_sd --out runs/noisy_assets
    python assets/make_assets.py --benchmark toycam --out runs/toycam_assets
    python assets/make_assets.py --benchmark cifar100_lt --data-root cifar100.zip --out runs/cifar100_assets
"""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
from assets.agreement import check, training_noise
from assets.stages import Stopped, Work, fit
from assets.tokens import MAX_TOKENS, TokenTable, make_tokenizer
from assets.webs import WEBS
from runtime import cli, files, runs
from runtime.signals import StopSignals


@dataclass(frozen=True)
class Sizes:
    """How large the models of a benchmark are and how long they train; one step is one batch.

    Attributes:
        vae_widths: of the autoencoder, one halving of the image between each two.
        decoder_steps: after the denoiser, to sharpen what the decoder draws.
        unet_widths: of the denoiser; the last `unet_attends` of them attend to the text.
        text_width, text_layers: of the generator's text encoder.
        clip_patch: side of the CLIP's image patches in pixels.
        judge: classifier that checks whether a generated image shows the class of its prompt.
    """

    latent_channels: int = 4
    vae_widths: tuple[int, ...] = (16, 32)
    vae_steps: int = 3000
    vae_batch: int = 32
    decoder_steps: int = 0
    unet_widths: tuple[int, ...] = (48, 96)
    unet_attends: int = 1
    unet_layers: int = 1
    unet_steps: int = 8000
    unet_batch: int = 64
    unet_rate: float = 2e-3
    text_width: int = 64
    text_layers: int = 2
    clip_patch: int = 2
    clip_width: int = 64
    clip_layers: int = 4
    clip_steps: int = 3000
    clip_batch: int = 64
    judge: str = "resnet8"
    judge_steps: int = 800


SIZES = {
    "digits": Sizes(),
    "digits_noisy": Sizes(unet_steps=1200),  # for --start, from the generator of true captions
    "cifar100_lt": Sizes(  # what a CPU does in minutes: too few steps to follow a prompt
        latent_channels=8,
        vae_widths=(16, 32, 64),
        vae_steps=400,
        unet_widths=(64, 128),
        unet_attends=2,
        unet_steps=400,
        text_width=128,
        clip_patch=4,
        clip_width=96,
        clip_layers=3,
        clip_steps=400,
        judge="resnet20",
        judge_steps=200,
    ),
    "cifar100_lt_gpu": Sizes(  # latents of 16x16; minutes of one GPU
        vae_widths=(64, 128),
        vae_steps=3000,
        vae_batch=128,
        unet_widths=(128, 256, 256),
        unet_attends=2,
        unet_steps=15_000,
        unet_batch=512,
        unet_rate=5e-4,
        text_width=256,
        clip_patch=4,
        clip_width=256,
        clip_layers=6,
        clip_steps=3000,
        clip_batch=256,
        judge="resnet32",
        judge_steps=3000,
    ),
    "toycam": Sizes(
        decoder_steps=3000,
        unet_widths=(32, 64),
        unet_batch=128,
        clip_patch=4,
        clip_layers=3,
    ),
}


def train_vae(work: Work):
    """A small autoencoder, images (N, 3, H, W) to latents (N, channels, h, w) of unit variance."""
    from diffusers import AutoencoderKL

    web, sizes = work.web, work.sizes
    if work.start:
        return AutoencoderKL.from_pretrained(work.start / "vae", torch_dtype=torch.float32).to(work.device).eval()
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=sizes.latent_channels,
        block_out_channels=sizes.vae_widths,
        norm_num_groups=min(8, sizes.vae_widths[0] // 2),
        down_block_types=("DownEncoderBlock2D",) * len(sizes.vae_widths),
        up_block_types=("UpDecoderBlock2D",) * len(sizes.vae_widths),
        sample_size=web.size,
    ).to(work.device)

    def draw(_: int) -> tuple[torch.Tensor]:
        return (web.pictures(sizes.vae_batch).to(work.device),)

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        posterior = vae.encode(images).latent_dist
        restored = vae.decode(posterior.sample()).sample
        return F.mse_loss(restored.float(), images) + 1e-5 * posterior.kl().mean()

    fit(work, "VAE", vae, draw, loss_of, sizes.vae_steps, 2e-3, 0)
    with torch.no_grad():
        latents = vae.encode(web.batch(512)[0].to(work.device)).latent_dist.sample()
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval()


def train_decoder(work: Work, vae) -> None:
    """Sharpen the autoencoder's decoder; the latents, and so the denoiser, stay as they are.

    Squared errors alone blur what the latents leave open. The strength of the second differences, averaged over 3x3
    pixels, is compared besides: how strong edges are, and not where between two pixels they lie.
    """
    if not work.sizes.decoder_steps:
        return
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder])

    def draw(_: int) -> tuple[torch.Tensor]:
        return (work.web.pictures(2 * work.sizes.vae_batch).to(work.device),)

    def edges(images: torch.Tensor, dim: int) -> torch.Tensor:
        return F.avg_pool2d(images.diff(n=2, dim=dim).abs(), 3, 1)

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample()
        restored = vae.decode(latents).sample.float()
        apart = sum(F.l1_loss(edges(restored, dim), edges(images, dim)) for dim in (2, 3))
        return F.mse_loss(restored, images) + 0.15 * apart

    fit(work, "decoder", decoder, draw, loss_of, work.sizes.decoder_steps, 2e-3, 0, 0.05)


def build_denoiser(work: Work, tokenizer) -> tuple[nn.Module, nn.Module]:
    """The UNet and its text encoder, with fresh weights or those of --start."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    web, sizes = work.web, work.sizes
    # Build the text encoder, and the UNet whose inner blocks attend to it.
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text_width,
            intermediate_size=2 * sizes.text_width,
            projection_dim=sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    plain = len(sizes.unet_widths) - sizes.unet_attends
    unet = UNet2DConditionModel(
        sample_size=web.size // 2 ** (len(sizes.vae_widths) - 1),
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        layers_per_block=sizes.unet_layers,
        block_out_channels=sizes.unet_widths,
        norm_num_groups=16,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * sizes.unet_attends,
        up_block_types=("CrossAttnUpBlock2D",) * sizes.unet_attends + ("UpBlock2D",) * plain,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=4,
    )
    if work.start:  # after the fresh weights, whose random numbers the training of the shipped ones came after
        unet = UNet2DConditionModel.from_pretrained(work.start / "unet", torch_dtype=torch.float32)
        text_encoder = CLIPTextModel.from_pretrained(work.start / "text_encoder", dtype=torch.float32)
    return unet, text_encoder


def train_unet(work: Work, vae, tokenizer):
    """The denoiser and its text encoder, trained together; returns their moving averages."""
    from diffusers import DPMSolverMultistepScheduler

    web, sizes, device = work.web, work.sizes, work.device
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    unet, text_encoder = build_denoiser(work, tokenizer)
    # Prepare the texts' tokens and the moving average.
    noise_scheduler = training_noise(scheduler)
    tokens = TokenTable(tokenizer, ["", *web.captions()], device)
    both = nn.ModuleList([unet, text_encoder]).to(device)
    average = copy.deepcopy(both).requires_grad_(False)
    batch = sizes.unet_batch

    def draw(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, captions, _ = web.batch(batch)
        dropped = web.rng.random(batch) < 0.1
        texts = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        return images.to(device), tokens.of(texts)

    def loss_of(images: torch.Tensor, text_tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch,), device=device)
        text = text_encoder(text_tokens)[0]
        predicted = unet(noise_scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
        return F.mse_loss(predicted.float(), noise.float())

    @torch.no_grad()
    def follow(done: int) -> None:
        decay = min(0.999, (done + 1) / (done + 10))
        torch._foreach_lerp_(list(average.parameters()), list(both.parameters()), 1 - decay)

    fit(work, "UNet", both, draw, loss_of, sizes.unet_steps, sizes.unet_rate, 1e-4, 0.05, follow, average)
    return average[0].eval(), average[1].eval(), scheduler


def clip_config(sizes: Sizes, side: int, words: int) -> dict:
    """open_clip's configuration of a CLIP for images of `side` pixels and a tokenizer of `words` tokens."""
    return {
        "embed_dim": sizes.clip_width // 2,
        "vision_cfg": {
            "image_size": side,
            "patch_size": sizes.clip_patch,
            "width": sizes.clip_width,
            "layers": sizes.clip_layers,
            "head_width": 16,
            "mlp_ratio": 2.0,
        },
        "text_cfg": {
            "context_length": MAX_TOKENS,
            "vocab_size": words,
            "hf_tokenizer_name": "tokenizer",
            "width": sizes.text_width,
            "heads": 4,
            "layers": sizes.text_layers,
            "mlp_ratio": 2.0,
        },
    }


def train_clip(work: Work, tokenizer, out: Path) -> None:
    """A small open_clip model, saved in `out` as open_clip saves its own.

    All captions of a batch take one form, and equal captions share the target: with few classes, most batches would
    otherwise hold right pairs as negatives.
    """
    import open_clip
    from safetensors.torch import save_file

    web, sizes = work.web, work.sizes
    config = clip_config(sizes, web.size, len(tokenizer))
    tokens = TokenTable(tokenizer, web.captions(), work.device)
    # Train it.
    model = open_clip.CLIP(**copy.deepcopy(config)).to(work.device)

    def draw(done: int) -> tuple[torch.Tensor, ...]:
        images, captions, _ = web.batch(sizes.clip_batch, web.forms[done % len(web.forms)])
        number = {caption: i for i, caption in enumerate(captions)}
        kind = torch.tensor([number[caption] for caption in captions])
        return images.to(work.device), tokens.of(captions), kind.to(work.device)

    def loss_of(images: torch.Tensor, text_tokens: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        image, text, scale = model(images, text_tokens)
        logits = scale * image @ text.T
        same = (kind[:, None] == kind).float()
        same = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2

    @torch.no_grad()
    def limit(_: int) -> None:
        model.logit_scale.clamp_(max=math.log(20))

    fit(work, "CLIP", model, draw, loss_of, sizes.clip_steps, 1e-3, 0.05, 0.1, limit)

    # Save it as open_clip does.
    out.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    described = {"model_cfg": config, "preprocess_cfg": preprocess}
    (out / "open_clip_config.json").write_text(json.dumps(described, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    save_file(
        {name: tensor.half().cpu().contiguous() for name, tensor in model.state_dict().items()},
        str(out / "open_clip_model.safetensors"),
    )


def train_judge(work: Work) -> nn.Module:
    """A classifier of the web, which tells whether a generated image is of the class that was asked for."""
    judge = models.build_classifier(work.sizes.judge, len(work.web.class_names)).to(work.device)

    def draw(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, _, labels = work.web.batch(128)
        return images.to(work.device), labels.to(work.device)

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(judge(images), labels)

    fit(work, "judge", judge, draw, loss_of, work.sizes.judge_steps, 3e-3, 0.05)
    return judge.eval()


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "make_assets")
    parser.add_argument("--out", type=cli.new_folder, required=True, help="folder for tiny_sd and tiny_clip")
    parser.add_argument("--benchmark", choices=list(WEBS), default="digits", help="whose web to learn from")
    parser.add_argument(
        "--data-root", type=cli.existing_path, metavar="FOLDER", help="CIFAR-100's folder or zip; digits needs none"
    )
    parser.add_argument(
        "--caption-noise",
        type=cli.number(0, 1),
        default=0.0,
        metavar="SHARE",
        help="share of the web's scans whose captions name another digit (digits only)",
    )
    parser.add_argument(
        "--start",
        type=cli.existing_path,
        metavar="FOLDER",
        help="generator (tiny_sd) of the same benchmark to start from; its autoencoder and its CLIP (tiny_clip beside "
        "it) are taken as they are",
    )
    parser.add_argument("--sizes", choices=list(SIZES), help="row of the table of sizes (default: the benchmark's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: autocast to bf16 on a GPU"
    )
    parser.add_argument(
        "--minutes", type=cli.number(0), metavar="N", help="stop after N minutes with a checkpoint and exit code 75"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from diffusers import StableDiffusionImg2ImgPipeline

    # Train the CLIP, the autoencoder, the denoiser and the judge.
    with StopSignals() as signals:
        web = WEBS[args.benchmark](args.data_root, args.caption_noise)
        work = Work(args, web, SIZES[args.sizes or args.benchmark], signals)
        tokenizer = make_tokenizer(web)
        try:
            if not args.start:
                train_clip(work, tokenizer, args.out / "tiny_clip")
            vae = train_vae(work)
            unet, text_encoder, scheduler = train_unet(work, vae, tokenizer)
            train_decoder(work, vae)
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
            pipe.to("cpu", torch.float16).save_pretrained(args.out / "tiny_sd", safe_serialization=True)
            judge = train_judge(work)
        except Stopped as stop:
            print(f"{args.out}: {stop}; run the same command again to resume", flush=True)
            return runs.RESUMABLE
        # Check the finished models.
        clip = (args.start.parent if args.start else args.out) / "tiny_clip"
        result = check(web, args.out / "tiny_sd", clip, judge, work.device)
        result |= {"caption_noise": args.caption_noise, "minutes": work.seconds / 60, "device": work.device_name}
    files.write_json(args.out / "tiny_sd/agreement.json", result)
    work.path.unlink()
    print(json.dumps(result, indent=2))
    if backwards := [name for name, (right, opposite) in result["loss_by_timestep"].items() if right >= opposite]:
        print(
            f"{args.out}: predicts {' and '.join(backwards)} noise better when told the opposite timestep: "
            "trained too little, or backwards; expected the right one to be better at both ends",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    cli.run(main)
