"""Recipes, and what tables and run folders call the settings of a run.

A recipe is a file of arguments that opens with five comment lines of this form:

    # ImageNet-LT, ResNet-10: BS + d2s
    # python train_lt.py @recipes/imagenet_lt/r10_bs_d2s.args --seed 0
    # expected: many 52.68, medium 37.68, few 21.36, all 41.33 (DisCL)
    # GPU-hours: 2 (estimate)
    # needs: recipes/imagenet_lt/r10_ce.args with seed 0, recipes/imagenet_lt/filter.args

The first says which table and row a training run of it makes; the third, test figures in percent and where they were
published, or `not published` and why. A file that is only included by others opens as it likes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from loaders.defaults import DEFAULTS
from runtime import cli

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
SEEDS = (0, 1, 2)  # of each recipe of a training run, what a complete table holds
DATASET_NAMES = {
    "cifar10_lt": "CIFAR10-LT",
    "cifar100_lt": "CIFAR100-LT",
    "imagenet_lt": "ImageNet-LT",
    "iwildcam": "iWildCam",
    "inat2018": "iNaturalist 2018",
    "places_lt": "Places-LT",
}
LOSS_NAMES = {"ce": "CE", "bs": "BS", "focal": "focal", "ldam": "LDAM", "la": "LA", "lpft": "LP-FT", "flyp": "FLYP"}
CURRICULUM_NAMES = {"text_only": "text only", "all": "all levels"}
HEADER = re.compile(
    r"# (?P<title>.+)\n# (?P<command>python (?P<script>\w+)\.py .+)\n# expected: (?P<expected>.+)\n"
    r"# GPU-hours: (?P<hours>.+)\n# needs: (?P<needs>.+)\n"
)


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        expected: published test figures in percent by their name in results.json; empty where there are none.
        source: where they were published, or why they were not.
        settings: what the recipe and the data set's defaults set, by flag with underscores.
    """

    path: Path
    title: str
    command: str
    script: str
    expected: dict[str, float]
    source: str
    settings: dict[str, object]


def row_name(args: dict) -> str:
    """What a table calls a run's settings."""
    if "clip" in args and not args.get("lr"):
        return "zero-shot"
    loss = args.get("loss", "ce")
    name = LOSS_NAMES.get(loss, loss)
    curriculum = args.get("curriculum", "none")
    if loss == "bs" and args.get("prior") == "stage":
        name += " (stage prior)"
    if args.get("augment") == "cuda":
        name += " + CUDA"
    if args.get("merge_same_class"):
        name += " (classes merged)"
    if curriculum == "fixed":
        name += f" + level {args.get('fixed_level', 50)}"
    elif curriculum != "none":
        name += f" + {CURRICULUM_NAMES.get(curriculum, curriculum)}"
    elif loss == "ce" and args.get("init_checkpoint"):
        name += ", trained on"
    if args.get("balanced"):
        name += ", balanced fill"
    return name


def table_name(args: dict) -> str:
    """What the table of a run's settings is called: data set, imbalance ratio where it was chosen, model or CLIP."""
    name = DATASET_NAMES.get(args["dataset"], args["dataset"])
    if args.get("imb_ratio") is not None:
        name += f" IR{float(args['imb_ratio']):g}"
    if "clip" in args:
        return f"{name}, {Path(str(args['clip']).removeprefix('hf-hub:').partition(':')[0]).name}"
    return f"{name}, {re.sub(r'^resnet', 'ResNet-', str(args['model']))}"


def folder_name(args: dict, script: str = "train_lt") -> str:
    """The run folder of settings, without the seed: those that differ from the data set's defaults stand in it."""
    shipped = DEFAULTS[args["dataset"]]
    words = [args["dataset"]]
    if args["imb_ratio"] not in (None, shipped.get("data", {}).get("imb_ratio")):
        words.append(f"ir{args['imb_ratio']:g}")
    model = "clip" if "clip" in args else "model"
    if args[model] != shipped[script][model]:
        words.append(re.sub(r"\W", "-", Path(args[model]).name))
    if args.get("init_checkpoint"):
        words.append("init")
    words.append(args["loss"])
    if args.get("prior") == "stage":
        words.append("stage")
    if args.get("augment") == "cuda":
        words.append("cuda")
    if args.get("merge_same_class"):
        words.append("merged")
    if "clip" in args and not args["lr"]:
        words.append("zero-shot")
    words.append(f"fixed{args['fixed_level']}" if args["curriculum"] == "fixed" else args["curriculum"])
    if args.get("balanced"):
        words.append("balanced")
    return "_".join(words)


def read(path: Path) -> Recipe:
    """A recipe of the form above.

    Raises:
        UserError: its header has another form.
    """
    header = HEADER.match(path.read_text(encoding="utf-8"))
    if not header:
        raise cli.UserError(f"{path}: expected a header of five lines: title, command, expected, GPU-hours, needs")
    figures, _, source = header["expected"].removesuffix(")").partition(" (")
    expected = {}
    for name, value in re.findall(r"([\w ]+?) (\d+\.?\d*)(?:, |$)", figures):
        expected[{"all": "overall"}.get(name, name)] = float(value)
    if not expected:
        source = header["expected"]
    words = [word for word, _ in cli.expand_files([f"@{path}"])]
    return Recipe(path, header["title"], header["command"], header["script"], expected, source,
                  settings(words, header["script"]))  # fmt: skip


def settings(words: list[str], script: str) -> dict[str, object]:
    """What a command line of `script` sets, with the data set's defaults where it says nothing, by flag."""
    said: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word[2:].replace("-", "_").partition("=")
            said.pop(flag, None)  # said again, it is the last one
            said[flag] = [value] if equals else []
        else:
            said[list(said)[-1]].append(word)
    shipped = DEFAULTS[said["dataset"][0]]
    return shipped.get("data", {}) | shipped.get(script, {}) | {flag: _value(some) for flag, some in said.items()}


def _value(words: list[str]) -> object:
    values = [_number(word) for word in words]
    return True if not values else values[0] if len(values) == 1 else values


def _number(word: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def read_all(folder: Path = FOLDER) -> list[Recipe]:
    """All recipes below a folder that make rows of tables, in the order of their paths.

    Raises:
        UserError: a header of another form.
    """
    found = [path for path in sorted(folder.rglob("*.args")) if "\n# expected: " in path.read_text(encoding="utf-8")]
    every = [read(path) for path in found]
    return [recipe for recipe in every if recipe.script.startswith("train_")]


def same(value: object, wanted: object) -> bool:
    """Whether an effective argument is what a recipe says: numbers as numbers, one value as a list of one."""
    first, second = ([*some] if isinstance(some, list | tuple) else [some] for some in (value, wanted))
    return len(first) == len(second) and all(
        a == b or (isinstance(a, Path) and str(a) == b) for a, b in zip(first, second, strict=True)
    )
