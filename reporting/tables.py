"""Tables of results: what run folders hold, beside what recipes expect, as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import curricula
from reporting import recipes
from reporting.recipes import Recipe
from runtime import runs
from runtime.cli import UserError

# Figures of results.json in a table's order; others follow in their own order. WE is WiSE-FT's weight ensembling.
FIGURES = ("many", "medium", "few", "overall", "ood_f1", "id_f1", "ood_f1_we", "id_f1_we", "ood_acc", "id_acc")
NAMES = {
    "overall": "all",
    "ood_f1": "OOD macro-F1",
    "id_f1": "ID macro-F1",
    "ood_f1_we": "OOD macro-F1 with WE",
    "id_f1_we": "ID macro-F1 with WE",
    "ood_acc": "OOD accuracy",
    "id_acc": "ID accuracy",
}
ZERO_SHOT = "zero-shot"  # the row of a CLIP that is not tuned, which every run of it has tested
NOT_FIGURES = ("epoch", "per_class")
SHOWN = 3  # folders that a line names
MAY_DIFFER = ("seed", "spectrum", "init_checkpoint")  # between the runs of a row, and a run and its recipe


@dataclass
class Row:
    """The runs of one row, by ascending seed; `recipe` is the one that asks for them, if any does."""

    name: str
    runs: list[dict]
    recipe: Recipe | None = None

    @property
    def args(self) -> dict:
        return self.runs[0]["args"]


@dataclass
class Table:
    """A table: its rows by name, and the recipes whose rows it would hold."""

    name: str
    rows: dict[str, Row] = field(default_factory=dict)
    recipes: dict[str, Recipe] = field(default_factory=dict)

    @property
    def figures(self) -> list[str]:
        """The names of the test figures that its runs have."""
        found = [
            name
            for row in self.rows.values()
            for name, value in row.runs[0]["results"]["last"].items()
            if name not in NOT_FIGURES and isinstance(value, int | float | None)
        ]
        return sorted(dict.fromkeys(found), key=lambda name: FIGURES.index(name) if name in FIGURES else len(FIGURES))


def run_folders(given: list[Path]) -> list[Path]:
    """The run folders among and below those given, in their order; what is empty or unfinished is named."""
    found = []
    for folder in given:
        below = sorted(path.parent for path in folder.rglob("args.json"))
        if not below:
            print(f"{folder}: not finished, left out (it holds no run)")
        for one in below:
            if (one / "results.json").is_file():
                found.append(one)
            else:
                print(f"{one}: not finished, left out")
    return list(dict.fromkeys(found))


def read_run(folder: Path) -> dict:
    """A finished run: `folder`, `args`, `commit`, `results`, and `history`, which is empty where none was kept."""
    content = runs.read_json(folder / "args.json")
    history = folder / "history.jsonl"
    results = runs.read_json(folder / "results.json")
    if "last_wise_ft" in results:
        results["last"] |= {f"{name}_we": results["last_wise_ft"][name] for name in ("ood_f1", "id_f1")}
    return {
        "folder": folder,
        "args": content["args"],
        "commit": content.get("environment", {}).get("commit"),
        "results": results,
        "history": runs.read_json_lines(history) if history.is_file() else [],
    }


def read(folders: list[Path], wanted: list[Recipe]) -> list[Table]:
    """The tables that run folders make, with the recipes that belong to them; rows in the tables' own order.

    Raises:
        UserError: two runs of one row that have the same seed, or differ in more than the seed.
    """
    found: dict[str, Table] = {}
    for folder in folders:
        run = read_run(folder)
        args = run["args"]
        table = found.setdefault(recipes.table_name(args), Table(recipes.table_name(args)))
        row = table.rows.setdefault(recipes.row_name(args), Row(recipes.row_name(args), []))
        for other in row.runs:
            different = [
                name
                for name in sorted(args.keys() | other["args"].keys())
                if name not in MAY_DIFFER and args.get(name) != other["args"].get(name)
            ]
            if different:
                raise UserError(
                    f"{folder} and {other['folder']} are both '{row.name}', but differ in {', '.join(different)}; "
                    "expected one setting a row"
                )
            if args["seed"] == other["args"]["seed"]:
                raise UserError(
                    f"{folder} and {other['folder']} are the same run with the same seed; expected one of them"
                )
        row.runs.append(run)
    for table in found.values():
        add_zero_shot(table)
    for recipe in wanted:
        table = found.get(recipes.table_name(recipe.settings))
        if table:
            table.recipes[recipes.row_name(recipe.settings)] = recipe
    for table in found.values():
        for row in table.rows.values():
            row.runs.sort(key=lambda run: run["args"]["seed"])
            row.recipe = table.recipes.get(row.name)
        table.rows = dict(sorted(table.rows.items(), key=lambda item: row_order(item[1].args)))
    return list(found.values())


def add_zero_shot(table: Table) -> None:
    """Give a table of CLIPs the row of the untuned one: its figures of one run of each seed, which hold them."""
    by_seed = {run["args"]["seed"]: run for row in table.rows.values() for run in row.runs}
    tested = [run for run in by_seed.values() if "zero_shot" in run["results"]]
    if tested and ZERO_SHOT not in table.rows:
        untuned = [
            run | {"args": run["args"] | {"lr": 0.0, "curriculum": "none"}, "history": [],
                   "results": {"last": run["results"]["zero_shot"]}}
            for run in tested
        ]  # fmt: skip
        table.rows[ZERO_SHOT] = Row(ZERO_SHOT, untuned)


def row_order(args: dict) -> tuple:
    """What rows are sorted by: the loss, then the curriculum, then what is special."""

    def place(names: tuple[str, ...], name: str | None) -> int:
        return names.index(name) if name in names else len(names)

    return (
        recipes.row_name(args) != ZERO_SHOT,
        place(tuple(recipes.LOSS_NAMES), args.get("loss", "ce")),
        args.get("prior") == "stage",
        place(curricula.CURRICULA, args.get("curriculum", "none")),
        bool(args.get("init_checkpoint")) and args.get("curriculum") == "none",
        args.get("augment") == "cuda",
        args.get("fixed_level", 0),
        bool(args.get("balanced")),
        recipes.row_name(args),
    )


def summary(values: list[float | None]) -> tuple[float, float | None] | None:
    """Mean and standard deviation over seeds, the latter None for one seed; None where a group has no class."""
    known = [value for value in values if value is not None]
    return (mean(known), stdev(known) if len(known) > 1 else None) if known else None


def results_of(row: Row, figure: str, epoch: str = "last") -> tuple[float, float | None] | None:
    return summary([run["results"].get(epoch, {}).get(figure) for run in row.runs])


def heading(table: Table) -> list[str]:
    """The words above a table's columns; those of what was published only where something was."""
    words = ["test accuracy, %" if "overall" in table.figures else "test, %"]
    words += [NAMES.get(name, name) for name in table.figures] + ["seeds"]
    return words + (["published", "difference"] if published(table) else [])


def published(table: Table) -> bool:
    return any(row.recipe and row.recipe.expected for row in table.rows.values())


def cells(table: Table, row: Row) -> list[str]:
    """A row as text: its name, mean (standard deviation) of each figure, seeds, what was published, the difference."""
    pairs = {name: results_of(row, name) for name in table.figures}
    words = [row.name]
    for pair in pairs.values():
        spread = f" ({pair[1]:.1f})" if pair and pair[1] is not None else ""
        words.append(f"{pair[0]:.1f}{spread}" if pair else "–")
    words.append(str(len(row.runs)))
    if published(table):
        expected = row.recipe.expected if row.recipe else {}
        shown = [f"{NAMES.get(name, name)} {value:g}" for name, value in expected.items()]
        differences = [
            f"{NAMES.get(name, name)} " + f"{pairs[name][0] - value:+.1f}".replace("-", "−")
            for name, value in expected.items()
            if pairs.get(name)
        ]
        words += [", ".join(shown) or "–", ", ".join(differences) or "–"]
    return words


def notes(table: Table) -> list[str]:
    """What a reader has to know of a table: other settings than the recipes', mixed code, missing rows and seeds."""
    lines = []
    for row in table.rows.values():
        if row.recipe and row.name != ZERO_SHOT:
            different = [
                f"--{flag.replace('_', '-')} {shown(row.args.get(flag))} (recipe: {shown(value)})"
                for flag, value in row.recipe.settings.items()
                if flag in row.args and flag not in MAY_DIFFER and not recipes.same(row.args[flag], value)
            ]
            if different:
                lines.append(f"{row.name} was not run as {place(row.recipe)} says: {', '.join(different)}")
    by_commit: dict[str, list[str]] = {}
    for row in table.rows.values():
        for run in row.runs:
            if run["commit"]:
                by_commit.setdefault(run["commit"], []).append(str(run["folder"]))
    if len(by_commit) > 1:
        parts = [
            f"{commit} made {', '.join(folders[:SHOWN])}"
            + (f" and {len(folders) - SHOWN} more" if len(folders) > SHOWN else "")
            for commit, folders in by_commit.items()
        ]
        lines.append(f"Mixed code versions, comparable only if nothing between them matters: {'; '.join(parts)}")
    waiting = missing(table)
    some = [f"{name} (seed {', '.join(map(str, waiting[name][1]))})" for name in waiting if name in table.rows]
    none = [name for name in waiting if name not in table.rows]
    if some:
        lines.append(f"Missing seeds: {'; '.join(some)}")
    if none:
        lines.append(f"Missing rows: {'; '.join(none)}")
    return lines


def missing(table: Table) -> dict[str, tuple[Recipe, list[int]]]:
    """Rows that recipes ask for, with the recipe and the seeds of which there is no run."""
    found = {}
    for name, recipe in table.recipes.items():
        there = {run["args"]["seed"] for run in table.rows[name].runs} if name in table.rows else set()
        seeds = [seed for seed in recipes.SEEDS if seed not in there]
        if seeds:
            found[name] = recipe, seeds
    return dict(sorted(found.items(), key=lambda item: row_order(item[1][0].settings)))


def place(recipe: Recipe) -> str:
    return re.search(r"@(\S+)", recipe.command)[1]


def shown(value: object) -> str:
    """A flag's value as it would be typed."""
    words = value if isinstance(value, list | tuple) else [value]
    return " ".join(f"{word:g}" if isinstance(word, int | float) and word is not True else str(word) for word in words)


def markdown(found: list[Table]) -> str:
    """The tables as Markdown; each has a heading where there are several."""
    parts = []
    for table in found:
        words = heading(table)
        lines = [f"### {table.name}", ""] if len(found) > 1 else []
        lines += ["| " + " | ".join(words) + " |", "|---" * len(words) + "|"]
        lines += ["| " + " | ".join(cells(table, row)) + " |" for row in table.rows.values()]
        lines += [text for note in notes(table) for text in ("", note)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def latex(found: list[Table]) -> str:
    """The tables as LaTeX (booktabs)."""

    def line(words: list[str]) -> str:
        escaped = [re.sub(r"([%&_#$])", r"\\\1", word).replace("–", "--").replace("−", "$-$") for word in words]
        return " & ".join(escaped) + r" \\"

    parts = []
    for table in found:
        words = heading(table)
        body = [line(cells(table, row)) for row in table.rows.values()]
        parts.append(
            "\n".join(
                [f"% {table.name}; needs \\usepackage{{booktabs}}", rf"\begin{{tabular}}{{l{'r' * (len(words) - 1)}}}",
                 r"\toprule", line(words), r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
            )
            + "\n"
        )  # fmt: skip
    return "\n".join(parts)


def long_csv(found: list[Table]) -> str:
    """All figures of all tables, one a line, after the last epoch and at the best by validation; 2 decimals."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["table", "row", "epoch", "seeds", "figure", "mean", "std", "published", "difference", "source"])
    for table in found:
        for row in table.rows.values():
            for epoch in ("last", "best_by_val"):
                for name in table.figures:
                    pair = results_of(row, name, epoch)
                    expected = row.recipe.expected.get(name) if row.recipe and epoch == "last" else None
                    out.writerow(
                        [
                            table.name,
                            row.name,
                            epoch,
                            len(row.runs),
                            NAMES.get(name, name),
                            f"{pair[0]:.2f}" if pair else "",
                            f"{pair[1]:.2f}" if pair and pair[1] is not None else "",
                            f"{expected:.2f}" if expected is not None else "",
                            f"{pair[0] - expected:+.2f}" if pair and expected is not None else "",
                            row.recipe.source if expected is not None else "",
                        ]
                    )
    return text.getvalue()
