"""Who may import whom: scripts, the doors `datasets` and `models`, and six folders that import downwards only."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterable

import pytest
from conftest import ROOT

# From the lowest up: each folder may import those before it, and itself.
FOLDERS = ("runtime", "loaders", "reporting", "spectrum", "training", "generation")
STRANGERS = {("training", "generation"), ("generation", "training")}
DOORS = {"datasets", "models"}  # only scripts open them: a helper is handed the data set or the model
PURE = {"curricula"}  # anyone may import it
# Arrows (importer, imported) that the rule forbids and that still stand.
NOT_YET: dict[str, set[str]] = {}


def read_modules() -> dict[str, ast.Module]:
    """The project's modules by the name that they are imported by: `cli` in the folder `runtime` is runtime.cli."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return {name: ast.parse(path.read_text(encoding="utf-8")) for path, name in sorted(names.items())}


def imports_of(tree: ast.Module, modules: Iterable[str]) -> set[str]:
    """The project's modules that a module imports, at its top or in a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import relative to the folder"
            members = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules)
            found |= members or {node.module}
    return found & set(modules)


def is_script(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree.body)


def broken(importer: str, imported: str, scripts: set[str]) -> str:
    """What the arrow breaks, or an empty text."""
    folder, other = (
        name.partition(".")[0] if name.partition(".")[0] in FOLDERS else "" for name in (importer, imported)
    )
    if imported in scripts:
        return "no module imports a script"
    if importer in PURE and other != "runtime":
        return f"{importer} is pure"
    if imported in DOORS and importer not in scripts | DOORS:
        return "only scripts open the doors"
    if folder == "runtime" and other != "runtime":
        return "runtime imports nothing of ours"
    if (folder, other) in STRANGERS:
        return f"{folder} and {other} do not know each other"
    if folder and other and FOLDERS.index(other) > FOLDERS.index(folder):
        return f"{folder} lies below {other}"
    return ""


MODULES = read_modules()
SCRIPTS = {name for name, tree in MODULES.items() if "." not in name and is_script(tree)}
ARROWS = {name: imports_of(tree, MODULES) for name, tree in MODULES.items()}


def test_the_root_holds_scripts_the_doors_and_curricula_alone():
    assert {name for name in MODULES if "." not in name} - set(FOLDERS) == SCRIPTS | DOORS | PURE


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downwards(name):
    wrong = {other: broken(name, other, SCRIPTS) for other in ARROWS[name] if broken(name, other, SCRIPTS)}
    assert set(wrong) == NOT_YET.get(name, set()), wrong


def test_no_circle():
    list(graphlib.TopologicalSorter(ARROWS).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_in_one_line_what_lives_there(folder):
    tree = MODULES[folder]
    assert len(tree.body) == 1 and len(ast.get_docstring(tree).splitlines()) == 1


@pytest.mark.parametrize(
    ("importer", "line", "why"),
    [
        ("report", "import demo", "no module imports a script"),
        ("training.loop", "def f():\n    from datasets import load", "only scripts open the doors"),
        ("spectrum.embeddings", "import models", "only scripts open the doors"),
        ("runtime.cli", "from loaders.base import ImageSet", "runtime imports nothing of ours"),
        ("runtime.cli", "import curricula", "runtime imports nothing of ours"),
        ("loaders.base", "from spectrum import folder", "loaders lies below spectrum"),
        ("training.loop", "from generation import writer", "training and generation do not know each other"),
        ("generation.writer", "from training import losses", "generation and training do not know each other"),
        ("curricula", "from training import losses", "curricula is pure"),
        ("training.loop", "import curricula\nfrom spectrum import folder\nfrom training import losses\nimport os", ""),
        ("report", "import datasets\nfrom reporting import tables", ""),
        ("datasets", "from loaders.base import ImageSet", ""),
    ],
)
def test_the_rule_sees_a_forbidden_import(importer, line, why):
    found = imports_of(ast.parse(line), MODULES)
    assert found
    assert {broken(importer, other, SCRIPTS) for other in found} == {why}
