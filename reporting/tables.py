"""Tables of results: the rows that run folders make, and the recipes and published rows that belong to them.

Runs make one row where all that changes a result is the same but the seed: every flag, the data, the spectrum, the
start model. A row is its recipe's only where every flag has the recipe's value.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import curricula
from reporting.names import (
    EDIT_NAMES,
    LOSS_NAMES,
    MIX_NAMES,
    ZERO_SHOT,
    figure_order,
    is_balanced,
    row_name,
    table_name,
)
from reporting.recipes import SEEDS, Published, Recipe
from runtime import files
from runtime.cli import UserError
from runtime.text import counted

NOT_FIGURES = ("epoch", "per_class")
INPUT_NAMES = {"init_checkpoint": "start model"}  # what a row's name calls an input that differs
SHOWN = 3  # flags that a row's name says; a note has all of them
# Flags that never change a result (or only its rounding), and those whose content `inputs` of args.json compares.
NEVER = {"seed", "shot_seed", "spectrum", "init_checkpoint", "out", "overwrite", "device", "workers", "data_root",
         "compile", "memory_format", "grad_checkpointing", "checkpoint_every", "help"}  # fmt: skip
NAMED = {
    "dataset",
    "imb_ratio",
    "model",
    "loss",
    "curriculum",
    "balanced",
    "fill",
}  # what a row's and table's names say
RENAMED = {"undersample": "keep_others"}  # flags of older runs
# Flags that are read only with a curriculum, with one of the values of another flag, ...
OF_CURRICULUM = {"levels", "level_shares", "curriculum_epochs", "hard_share", "balanced", "fill", "undersample",
                 "keep_others", "per_hard_image", "real_weight"}  # fmt: skip
READ_WITH = {
    "fixed_level": ("curriculum", ("fixed",)),
    "progress_images": ("curriculum", ("adaptive",)),
    "real_pass_images": ("curriculum", ("adaptive",)),
    "focal_gamma": ("loss", ("focal",)),
    "ldam_margin": ("loss", ("ldam",)),
    "la_tau": ("loss", ("la",)),
    "prior": ("loss", ("bs", "la", "ldam")),
    "drw_epoch": ("drw", (True,)),
    "momentum": ("optimizer", ("sgd",)),
    "template": ("model", ("clip",)),
    "step_epochs": ("schedule", ("steps",)),
    "step_factor": ("schedule", ("steps",)),
}


@dataclass
class Row:
    """The runs of one row, by ascending seed.

    Attributes:
        base: what the settings are called; `name` adds what differs from the recipe or the data set's defaults.
        settings: what changes the result, by flag.
        differences: flag -> (this row's value, the recipe's or default one).
        recipe: the recipe whose flags these runs have.
        like: the recipe of that name, also where the runs have other flags.
        published: figures of a row that no recipe trains.
    """

    name: str
    runs: list[dict]
    base: str = ""
    settings: dict = field(default_factory=dict)
    differences: dict[str, tuple] = field(default_factory=dict)
    recipe: Recipe | None = None
    like: Recipe | None = None
    published: Published | None = None

    @property
    def args(self) -> dict:
        return self.runs[0]["args"] if self.runs else {}

    @property
    def expected(self) -> dict[str, float]:
        known = self.recipe or self.published
        return known.expected if known else {}


@dataclass
class Table:
    """A table: its rows by name, the recipes whose rows it would hold, and what a reader has to know."""

    name: str
    rows: dict[str, Row] = field(default_factory=dict)
    recipes: list[Recipe] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def figures(self) -> list[str]:
        """The names of the test figures that its runs have."""
        found = [
            name
            for row in self.rows.values()
            if row.runs
            for name, value in row.runs[0]["results"]["last"].items()
            if name not in NOT_FIGURES and isinstance(value, int | float | None)
        ]
        if "worst_group" in found:  # their groups are classes in domains, not classes by size
            found = [name for name in found if name not in ("many", "medium", "few")]
        return sorted(dict.fromkeys(found), key=figure_order)


# ---------------------------------------------------------------------------------------------------------------------
# run folders


def run_folders(given: list[Path]) -> list[Path]:
    """The run folders among and below those given, in their order; empty and unfinished ones are named."""
    found = []
    for folder in given:
        below = sorted(path.parent for path in folder.rglob("args.json"))
        if not below:
            print(f"{folder}: not finished, left out (it holds no run)")
        for run in below:
            if (run / "results.json").is_file():
                found.append(run)
            else:
                print(f"{run}: not finished, left out")
    return list(dict.fromkeys(found))


def read_runs(folders: list[Path]) -> list[dict]:
    """The runs of some folders; one that is damaged, or was written in another form, is named and left out."""
    found = []
    for folder in folders:
        try:
            found.append(read_run(folder))
        except (UserError, OSError) as error:
            print(f"{folder}: left out: {error}")
    return found


def read_run(folder: Path) -> dict:
    """A finished run: `folder`, `args`, `inputs`, `commit`, `results`, and `history`, empty where none was kept.

    Raises:
        UserError: a file is damaged or has another form than the trainers write today.
    """
    content, results = (files.read_json(folder / name) for name in ("args.json", "results.json"))
    history = folder / "history.jsonl"
    try:
        records = files.read_json_lines(history) if history.is_file() else []
    except ValueError as error:
        raise UserError(f"{history}: not valid JSON lines ({error})") from None
    args = content.get("args") if isinstance(content, dict) else None
    expect(isinstance(args, dict) and isinstance(args.get("dataset"), str), folder / "args.json", "args with a dataset")
    expect("clip" in args or "model" in args, folder / "args.json", "a model or a clip among args")
    expect(isinstance(args.get("seed"), int), folder / "args.json", "a whole number as seed")
    expect(
        isinstance(results, dict) and isinstance(results.get("last"), dict), folder / "results.json", "figures 'last'"
    )
    expect(
        all(isinstance(record, dict) and isinstance(record.get("levels"), list) for record in records)
        and all("epoch" in record for record in records),
        history,
        "an epoch and its levels in each line",
    )
    if isinstance(ensembled := results.get("last_wise_ft"), dict):
        results["last"] |= {f"{name}_we": ensembled[name] for name in ("ood_f1", "id_f1") if name in ensembled}
    return {
        "folder": folder,
        "args": args,
        "inputs": content.get("inputs") or {},
        "commit": (content.get("environment") or {}).get("commit"),
        "results": results,
        "history": records,
    }


def expect(holds: bool, path: Path, what: str) -> None:
    if not holds:
        raise UserError(f"{path}: expected {what}; damaged, or written by an older version of this code")


# ---------------------------------------------------------------------------------------------------------------------
# rows


def read(
    folders: list[Path],
    wanted: list[Recipe],
    effective: Callable[[str, list[str]], dict],
    published: list[Published] = (),
) -> list[Table]:
    """The tables that run folders make, with the recipes and published rows that belong to them.

    Args:
        effective: all arguments that a command line of a trainer comes to, as args.json would hold them.

    Raises:
        UserError: two runs of one row have the same seed and different results.
    """
    found: list[Table] = []
    for name, some in split_by_data(read_runs(folders)).items():
        table = Table(name)
        title = table_name(some[0]["args"])
        # Recipes belong to the data set; where its runs used several versions of the images, each table lists them.
        table.recipes = [recipe for recipe in wanted if table_name(recipe.args) == title]
        rows = group_runs(some, table.recipes, effective)
        if common := name_rows(rows):
            table.remarks.append(f"Rows without a recipe were run with {', '.join(common)}")
        table.rows = {row.name: row for row in rows}
        add_zero_shot(table)
        for entry in published:
            if entry.table == title:
                table.rows.setdefault(entry.row, Row(entry.row, [], entry.row, published=entry))
        table.rows = dict(sorted(table.rows.items(), key=lambda item: row_order(item[1])))
        found.append(table)
    return found


def split_by_data(found: list[dict]) -> dict[str, list[dict]]:
    """Runs by table: those of one data set, ratio and model whose images are the same."""
    by_data: dict[str, dict[object, list[dict]]] = {}
    for run in found:
        by_data.setdefault(table_name(run["args"]), {}).setdefault(compared_inputs(run).get("data"), []).append(run)
    tables = {}
    for name, versions in by_data.items():
        for data, some in versions.items():
            known = "not recorded" if data is None else str(data)[:8]
            tables[name if len(versions) == 1 else f"{name} (data {known})"] = some
    return tables


def compared_inputs(run: dict) -> dict:
    """The digests that all runs of a row share. Few-shot draws, which a row averages over, have images of their own."""
    return {} if run["args"].get("shots") else run["inputs"]


def group_runs(found: list[dict], wanted: list[Recipe], effective: Callable[[str, list[str]], dict]) -> list[Row]:
    """Runs of one table as rows; `name_rows` gives them names."""
    groups: dict[str, Row] = {}
    of_draw: dict[str, list[dict]] = {}  # the different inputs of one few-shot draw, which are not averaged
    for run in found:
        args = run["args"]
        script = "train_fewshot" if "shots" in args else "train_iwildcam" if "clip" in args else "train_lt"
        ratio = [] if args.get("imb_ratio") is None else ["--imb-ratio", f"{args['imb_ratio']:g}"]
        try:
            defaults = effective(script, ["--dataset", args["dataset"], *ratio])
        except UserError as error:
            print(f"{run['folder']}: left out: {error}")
            continue
        base = row_name(args)
        like, differences = nearest_recipe(args, defaults, [one for one in wanted if row_name(one.args) == base])
        settings = changing(defaults | args)
        drawn = json.dumps([base, settings, args.get("shot_seed")], sort_keys=True, default=str)
        versions = of_draw.setdefault(drawn, []) if args.get("shots") else [run["inputs"]]
        if run["inputs"] not in versions:
            versions.append(run["inputs"])
        version = versions.index(run["inputs"])
        key = json.dumps([base, as_numbers(settings), compared_inputs(run), version], sort_keys=True, default=str)
        row = groups.setdefault(key, Row(base, [], base, settings, differences, None if differences else like, like))
        add_run(row, run)
    for row in groups.values():
        row.runs.sort(key=draw_and_seed)
    return list(groups.values())


def as_numbers(settings: dict) -> dict:
    """Settings with whole numbers as such: older code noted 5 epochs of warm-up where this notes 5.0."""
    return {
        flag: int(value) if isinstance(value, float) and value.is_integer() else value
        for flag, value in settings.items()
    }


def draw_and_seed(run: dict) -> tuple[int, int]:
    return run["args"].get("shot_seed") or 0, run["args"]["seed"]


def add_run(row: Row, run: dict) -> None:
    """Put a run into its row; an exact copy counts once.

    Raises:
        UserError: the row has another run of that seed, with other results.
    """
    for other in row.runs:
        if draw_and_seed(other) == draw_and_seed(run):
            if other["results"]["last"] != run["results"]["last"]:
                raise UserError(
                    f"{run['folder']} and {other['folder']} are the same run with the same seed, but have other "
                    "results; expected one of them"
                )
            print(f"{run['folder']}: left out, the same run as {other['folder']}")
            return
    row.runs.append(run)


def changing(args: dict, read_by: dict | None = None) -> dict:
    """The flags that change a run's result: the ones that it reads, which `read_by` (default: `args`) decides."""
    args = {RENAMED.get(flag, flag): value for flag, value in args.items()}
    decides = args if read_by is None else read_by
    unread = {flag for flag, (other, values) in READ_WITH.items() if decides.get(other) not in values}
    if decides.get("curriculum", "none") == "none":
        unread |= OF_CURRICULUM
    return {flag: value for flag, value in args.items() if flag not in unread | NEVER}


def nearest_recipe(args: dict, defaults: dict, wanted: list[Recipe]) -> tuple[Recipe | None, dict[str, tuple]]:
    """The recipe that a run is nearest to, and flag -> (the run's value, the recipe's); without one, the defaults'.

    A flag that the run did not record, because its code had none, counts as left at its default.
    """

    def differences(base: dict) -> dict[str, tuple]:
        run, other = (changing(defaults | some, defaults | args) for some in (args, base))
        different = {
            flag: (run.get(flag), other.get(flag))
            for flag in sorted(run.keys() | other.keys())
            if flag not in NAMED and not same(run.get(flag), other.get(flag))
        }
        if bool(args.get("init_checkpoint")) != bool(base.get("init_checkpoint")) and base is not defaults:
            different["init_checkpoint"] = (args.get("init_checkpoint"), base.get("init_checkpoint"))
        return different

    options = [(recipe, differences(recipe.args)) for recipe in wanted]
    if not options:
        return None, differences(defaults)
    return min(options, key=lambda option: len(option[1]))


def same(value: object, wanted: object) -> bool:
    """Whether two values of a flag are the same: numbers as numbers, unset as false, one value as a list of one."""
    first, second = ([*some] if isinstance(some, list | tuple) else [some or None] for some in (value, wanted))
    return first == second


def name_rows(rows: list[Row]) -> list[str]:
    """Give rows distinct names, which say how they differ: in flags, in the spectrum, in the start model.

    Returns:
        What all rows without a recipe have in common against the data set's defaults, as it would be typed.
    """
    own = [row for row in rows if row.like is None]
    # What all rows without a recipe that read a flag share is the table's remark, not each row's name.
    common: dict[str, str] = {}
    for flag, value in {flag: pair[0] for row in own for flag, pair in row.differences.items()}.items():
        reading = [row for row in own if flag in row.settings]
        if len(reading) > 1 and all(same(row.differences.get(flag, ((),))[0], value) for row in reading):
            common[flag] = "" if names_say(flag, reading[0].args) else typed(flag, value)
    for row in rows:
        special = [flag for flag in row.differences if not names_say(flag, row.args)]
        if row.like is None:
            special = [flag for flag in special if flag not in common]
        words = [typed(flag, row.differences[flag][0]) for flag in special]
        shown = words if len(words) <= SHOWN else [*words[:SHOWN], f"{counted(len(words) - SHOWN, 'flag')} more"]
        row.name = row.base + (f" ({', '.join(shown)})" if shown else "")
    for what in sorted({what for row in rows for what in compared_inputs(row.runs[0])} - {"data"}):
        for name in dict.fromkeys(row.name for row in rows):
            sharing = [row for row in rows if row.name == name]
            digests = {str(row.runs[0]["inputs"].get(what)) for row in sharing}
            if len(digests) > 1:
                for row in sharing:
                    digest = str(row.runs[0]["inputs"].get(what) or "not recorded")[:8]
                    row.name += f", {INPUT_NAMES.get(what, what)} {digest}"
    for name in dict.fromkeys(row.name for row in rows):
        for number, row in enumerate([row for row in rows if row.name == name][1:], 2):
            row.name += f", {number}"
    return [words for _, words in sorted(common.items()) if words]


def names_say(flag: str, args: dict) -> bool:
    """Whether a row's name already says what a flag is."""
    return (
        flag
        in ("fixed_level", "merge_same_class", "balanced", "fill", "edits", "edit_rules", "randaugment", "extra_real")
        or flag == "method"
        or (flag in ("images", "shots") and "images" in args)
        or (flag == "add" and args.get("add") == "all")
        or (flag == "curriculum_epochs" and (args.get("add") or "images" in args) and args[flag] == args.get("epochs"))
        or (flag == "mix" and args.get("mix") in MIX_NAMES)
        or (flag == "prior" and args.get("loss") == "bs")
        or (flag == "augment" and args.get("augment") == "cuda")
        or (flag == "lr" and not args.get("lr"))
    )


def typed(flag: str, value: object) -> str:
    """A flag as it would be typed; `--no-FLAG` where it was left out."""
    name = flag.replace("_", "-")
    if value is None or value is False:
        return f"no --{name}"
    if value is True:
        return f"--{name}"
    words = value if isinstance(value, list | tuple) else [value]
    return f"--{name} " + " ".join(f"{word:g}" if isinstance(word, int | float) else str(word) for word in words)


def add_zero_shot(table: Table) -> None:
    """Give a table of CLIPs the row of the untuned one: its figures of one run of each seed, which hold them."""
    by_seed = {run["args"]["seed"]: run for row in table.rows.values() for run in row.runs}
    tested = [run for run in by_seed.values() if isinstance(run["results"].get("zero_shot"), dict)]
    if tested and ZERO_SHOT not in table.rows:
        untuned = [
            run | {"args": run["args"] | {"lr": 0.0, "curriculum": "none"}, "history": [],
                   "results": {"last": run["results"]["zero_shot"]}}
            for run in sorted(tested, key=lambda run: run["args"]["seed"])
        ]  # fmt: skip
        recipe = next((recipe for recipe in table.recipes if row_name(recipe.args) == ZERO_SHOT), None)
        table.rows[ZERO_SHOT] = Row(ZERO_SHOT, untuned, ZERO_SHOT, recipe=recipe, like=recipe)


def row_order(row: Row) -> tuple:
    """The sort key of rows: the loss, then the curriculum, then other differences; published rows last."""

    def place(names: tuple[str, ...], name: str | None) -> int:
        return names.index(name) if name in names else len(names)

    args = row.args
    return (
        not row.runs,
        row.base != ZERO_SHOT,
        place(tuple(LOSS_NAMES), args.get("loss", "ce")),
        args.get("prior") == "stage",
        bool(args.get("extra_real")),
        place(tuple(curricula.CURRICULA), args.get("curriculum", "none")),
        place(tuple(EDIT_NAMES), args.get("edits")),
        len(set(args.get("edit_rules") or ("all", "of", "them")) - {"none"}),
        bool(args.get("init_checkpoint")) and args.get("curriculum") == "none",
        args.get("augment") == "cuda",
        args.get("fixed_level", 0),
        is_balanced(args),
        row.name,
    )


def missing(table: Table) -> dict[str, tuple[Recipe, list[int]]]:
    """Rows of recipes that lack runs, with the recipe and the missing seeds."""
    found = {}
    for recipe in table.recipes:
        there = {run["args"]["seed"] for row in table.rows.values() if row.recipe is recipe for run in row.runs}
        seeds = [seed for seed in SEEDS if seed not in there]
        if seeds:
            found[row_name(recipe.args)] = recipe, seeds
    order = {name: row_order(Row(name, [{"args": recipe.args}], name)) for name, (recipe, _) in found.items()}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))
