"""Recipes: files of arguments, each with the table and row that it makes and the published figures of that row.

A recipe opens with five comment lines of this form:

    # ImageNet-LT, ResNet-10: BS + d2s
    # python train_lt.py @recipes/imagenet_lt/r10_bs_d2s.args --seed 0
    # expected: many 52.68, medium 37.68, few 21.36, all 41.33 (DisCL v4, Table 1)
    # GPU-hours: 2 (estimate)
    # needs: recipes/imagenet_lt/r10_ce.args with seed 0, recipes/imagenet_lt/filter.args

The first says which table and row a training run of it makes; the third, test figures in percent and in which version
and table of a paper they were published, or `not published` and why. A file that others include opens as it likes.

`published.csv` beside them has the rows that were published and that no recipe trains.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runtime import cli

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
SEEDS = (0, 1, 2)  # of each recipe of a training run, what a complete table holds
HEADER = re.compile(
    r"# (?P<title>.+)\n# (?P<command>python (?P<script>\w+)\.py .+)\n# expected: (?P<expected>.+)\n"
    r"# GPU-hours: (?P<hours>.+)\n# needs: (?P<needs>.+)\n"
)


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        expected: published test figures in percent by their name in results.json; empty where there are none.
        source: version and table of the paper that published them, or why there are none.
        args: every argument that the command comes to, defaults included, as args.json would hold it; empty unless
            `read` was told how to work them out.
    """

    path: Path
    title: str
    command: str
    script: str
    expected: dict[str, float]
    source: str
    args: dict[str, object]

    @property
    def file(self) -> str:
        """The recipe as its command names it."""
        return re.search(r"@(\S+)", self.command)[1]


@dataclass(frozen=True)
class Published:
    """A row that was published and that no recipe trains."""

    table: str
    row: str
    expected: dict[str, float]
    source: str


def read(path: Path, effective: Callable[[str, list[str]], dict] | None = None) -> Recipe:
    """A recipe of the form above.

    Args:
        effective: all arguments of a script's command line.

    Raises:
        UserError: its header has another form, its text is not UTF-8, or the script refuses its arguments.
    """
    try:
        header = HEADER.match(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise cli.UserError(f"{path}: not UTF-8 ({error})") from None
    if not header or "@" not in header["command"]:
        raise cli.UserError(f"{path}: expected a header of five lines: title, command, expected, GPU-hours, needs")
    expected, source = read_figures(header["expected"])
    args = effective(header["script"], [f"@{path}"]) if effective else {}
    return Recipe(path, header["title"], header["command"], header["script"], expected, source, args)


def read_figures(text: str) -> tuple[dict[str, float], str]:
    """`many 52.68, all 41.33 (SOURCE)` as figures and their source; no figures where the text holds none."""
    figures, _, source = text.removesuffix(")").partition(" (")
    expected = {}
    for name, value in re.findall(r"([\w ]+?) (\d+\.?\d*)(?:, |$)", figures):
        expected[{"all": "overall"}.get(name, name)] = float(value)
    return (expected, source) if expected else ({}, text)


def read_all(effective: Callable[[str, list[str]], dict], folder: Path = FOLDER) -> tuple[list[Recipe], list[str]]:
    """All recipes below a folder that make rows of tables, in the order of their paths.

    Returns:
        The recipes, and a line for each file that is no readable recipe: one of a user's own stops nothing.
    """
    found, complaints = [], []
    for path in sorted(folder.rglob("*.args")):
        try:
            if b"\n# expected: " in path.read_bytes() and read(path).script.startswith("train_"):
                found.append(read(path, effective))
        except (cli.UserError, OSError) as error:
            complaints.append(f"recipe passed over: {error}")
    return found, complaints


def read_published(path: Path = FOLDER / "published.csv") -> list[Published]:
    """The rows of published.csv (columns table, row, figures, source); none where there is no such file.

    Raises:
        UserError: a line of another form.
    """
    if not path.is_file():
        return []
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, line in enumerate(csv.DictReader(file), 2):
            expected, _ = read_figures(line.get("figures") or "")
            if not (line.get("table") and line.get("row") and line.get("source") and expected):
                raise cli.UserError(
                    f"{path}, line {number}: expected table, row, figures such as 'all 37.20' and source"
                )
            rows.append(Published(line["table"], line["row"], expected, line["source"]))
    return rows
