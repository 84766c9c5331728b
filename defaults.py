"""What the scripts' flags are when the user gives none, for each data set. `--help` shows the chosen data set's."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).resolve().parent / "assets"

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
        },
        "filter_clipscore": {"clip": str(ASSETS / "tiny_clip"), "threshold": 0.3},
        "train_lt": {
            "model": "resnet8",
            "epochs": 72,
            "curriculum_epochs": 60,
            "undersample": 0.43,  # makes a curriculum epoch (184 images) as long as a real one
            "batch_size": 16,
            "lr": 3e-3,
            "weight_decay": 0.05,
        },
    },
}
