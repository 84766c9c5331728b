"""Camera-trap data in WILDS's layout: iWildCam v2.0, one's own, and the tiny stand-in toycam (toycam.py).

`metadata.csv` lists every image: its split, class (`y`), file below `train/` and camera (`location_remapped`). Splits
`train`, `id_val` and `id_test` share their cameras; those of `val` and `test` are out of domain. One's own data has
`class_names.txt` beside it, with the name of class 0 in its first line, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loaders import toycam
from loaders.base import (
    ASSETS,
    CLIP_FILTER,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LARGE,
    REFINER,
    DataSet,
    Entry,
    ImageSet,
    file_set,
    is_below,
    missing_files,
    spelt_as_there,
)
from runtime.text import UserError, parse_whole, read_csv, read_text

SPLITS = ("train", "val", "test", "id_val", "id_test")
LAYOUTS = {
    "iwildcam": "expected WILDS's folder iwildcam_v2.0: metadata.csv and train/*.jpg",
    "cameratraps": "expected a folder with metadata.csv (columns split, y, filename, location_remapped), "
    "class_names.txt (a name a line, in the order of y) and the images below train/",
}
CLASS_NAMES = "class_names.txt"
NO_CLASS = 99999  # what some copies of metadata.csv give images of species that no training image shows: left out
TOYCAM = Path("runs/toycam")
SHOWN = 3  # missing files that are named


@dataclass(frozen=True, kw_only=True)
class CameraTraps(DataSet):
    """A data set of camera traps; `val` and `test` are out of domain (OOD), `id_val` and `id_test` in domain (ID).

    Attributes:
        locations: for each split the camera of each image, int64 (N,).
    """

    id_val: ImageSet
    id_test: ImageSet
    locations: dict[str, np.ndarray]

    @property
    def splits(self) -> dict[str, ImageSet]:
        """Every split by its name in WILDS."""
        return {name: getattr(self, name) for name in SPLITS}


def load(name: str, imb_ratio: None, data_root: Path | None, seed: int) -> CameraTraps:
    """The data set below `data_root`; toycam (default: runs/toycam) is drawn first if it is missing.

    Raises:
        UserError: no such data, or another version of it.
    """
    if name == "toycam":
        root = data_root or TOYCAM
        if not (root / "metadata.csv").is_file():
            root.parent.mkdir(parents=True, exist_ok=True)
            toycam.draw(root)
        return read(name, root, toycam.CLASSES)
    if not data_root.is_dir():
        raise UserError(f"--data-root {data_root}: no such folder; {LAYOUTS[name]}")
    return read(name, data_root, class_names() if name == "iwildcam" else own_class_names(data_root))


def own_class_names(root: Path) -> list[str]:
    """The lines of class_names.txt.

    Raises:
        UserError: no such file, or an empty line.
    """
    path = root / CLASS_NAMES
    text = read_text(path, LAYOUTS["cameratraps"]).replace("\r\n", "\n").removesuffix("\n")
    names = [line.strip() for line in text.split("\n")]
    if not all(names):
        raise UserError(f"{path}: expected the name of a class in each line")
    return names


def class_names() -> list[str]:
    """The English names of iWildCam's 182 classes, by index, as FLYP and WiSE-FT have them; some occur twice."""
    rows = read_csv(ASSETS / "iwildcam_classes.csv", ("english_name", "scientific_name"))
    return [row["english_name"] or row["scientific_name"] for _, row in rows]


def read(name: str, root: Path, classes: list[str]) -> CameraTraps:
    """The data set at `root`.

    Raises:
        UserError: no metadata.csv or another version's, a class that there is not, a split without an image, or images
            that are not there.
    """
    path = root / "metadata.csv"
    older = "this is version 1.0 of WILDS, whose splits differ; " if (root / "val_trans.csv").exists() else ""
    hint = older + LAYOUTS.get(name, LAYOUTS["cameratraps"])
    # Read and check every row.
    found: dict[str, list[tuple[str, int, int]]] = {split: [] for split in SPLITS}
    for number, row in read_csv(path, ("split", "y", "filename", "location_remapped"), hint):
        where = f"{path} row {number}"
        label, camera = parse_whole(row["y"]), parse_whole(row["location_remapped"])
        if label is None or camera is None:
            raise UserError(
                f"{where}: y {row['y']}, location_remapped {row['location_remapped']}: expected whole numbers"
            )
        if label == NO_CLASS:
            continue
        if label >= len(classes):
            older = ", as WILDS v2.0 has them (v1.0 has 186 classes)" if name == "iwildcam" else ""
            raise UserError(f"{where}: class {label}; expected one below {len(classes)}{older}")
        if row["split"] not in found:
            raise UserError(f"{where}: split {row['split']!r}; expected one of {', '.join(SPLITS)}")
        if not is_below(row["filename"]):
            raise UserError(f"{where}: {row['filename']}: expected a file below train")
        found[row["split"]].append((f"train/{row['filename']}", label, camera))
    # Check the splits and their files.
    empty = [split for split, rows in found.items() if not rows]
    if empty:
        raise UserError(f"{path}: no image in split {', '.join(empty)}; expected some in each of {', '.join(SPLITS)}")
    for split, rows in found.items():
        spelt = spelt_as_there(root, [file_name for file_name, _, _ in rows])
        found[split] = rows = [(file_name, *row[1:]) for file_name, row in zip(spelt, rows, strict=True)]
        missing = missing_files(root, [file_name for file_name, _, _ in rows])
        if missing:
            raise UserError(
                f"{path}: {len(missing)} of the {len(rows)} images of {split} are not there: "
                f"{', '.join(missing[:SHOWN])}{' and so on' if len(missing) > SHOWN else ''}; expected a whole download"
            )
    sets = {split: file_set(root, [row[0] for row in rows], [row[1] for row in rows]) for split, rows in found.items()}
    return CameraTraps(
        name=name,
        class_names=classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        note="validation: id_val (in domain) to choose by, val (out of domain) beside it",
        files=[path, root / CLASS_NAMES] if name == "cameratraps" else [path],
        locations={split: np.array([row[2] for row in rows], dtype=np.int64) for split, rows in found.items()},
        **sets,
    )


# FLYP's captions of camera-trap images, which the zero-shot head is built from too.
CAPTIONS = ["a photo of {}.", "{} in the wild."]
TEMPLATE = "a photo of {} in the wild"
TOYCAM_CLIP = str(ASSETS / "toycam_clip")
# FLYP's recipe (Goyal et al., 2023), and the paper's curriculum, prompts and filter.
DEFAULTS: dict[str, dict] = {
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
IWILDCAM_DEFAULTS = DEFAULTS | {
    "generate_spectrum": DEFAULTS["generate_spectrum"] | {"size": (480, 270), "save_size": (480, 270)},
    "train_iwildcam": DEFAULTS["train_iwildcam"]
    | {"progress_images": 2000, "real_pass_images": 30000, "warmup_epochs": 0.986},  # 500 steps
}
TOYCAM_DEFAULTS = {
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
    "train_lt": LARGE | {"image_size": 16, "augment": "crop_flip"},
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
}
# Prompts of the class that shows no animal: "a photo of empty in the wild" means nothing to a public generator.
EMPTY_PROMPTS = {
    "empty": [
        "a photo of an empty scene in the wild",
        "a photo of a landscape without an animal in the wild",
        "a photo of plants and bare ground in the wild",
    ]
}
KNOWN = {"load": load, "templates": [TEMPLATE], "score_prompt": TEMPLATE, "camera_traps": True}
DATASETS = {
    "iwildcam": Entry(
        layout=LAYOUTS["iwildcam"],
        defaults=IWILDCAM_DEFAULTS,
        counts={"train": 129809, "val": 14961, "test": 42791, "id_val": 7314, "id_test": 8154, "classes": 182},
        acceptance={None: (197756, 90093)},
        shared_names=True,
        empty_prompts=EMPTY_PROMPTS,
        **KNOWN,
    ),
    "cameratraps": Entry(layout=LAYOUTS["cameratraps"], defaults=DEFAULTS, empty_prompts=EMPTY_PROMPTS, **KNOWN),
    "toycam": Entry(root="optional", defaults=TOYCAM_DEFAULTS, **KNOWN),
}
