"""What holds for the project as a whole: flags, commands in the documents, imports, and what no file may contain."""

from __future__ import annotations

import ast
import functools
import glob
import importlib
import importlib.util
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from conftest import ROOT

import demo
import find_hard
import write_prompts
from runtime import cli, files
from spectrum import folder as spectrum_folder
from spectrum import tables
from spectrum.units import Unit

FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
# By the name that it is imported by: `cli` in the folder `runtime` is runtime.cli.
TREES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.glob("*.py"))} | {
    f"{folder}.{path.stem}".removesuffix(".__init__"): ast.parse(path.read_text(encoding="utf-8"))
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.py"))
}
TREE_PATHS = {
    name: ROOT / name / "__init__.py" if name in FOLDERS else ROOT / f"{name.replace('.', '/')}.py" for name in TREES
}


def is_script(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree.body)


SCRIPTS = [name for name, tree in TREES.items() if is_script(tree) and "." not in name]
HELPERS = [name for name in TREES if name not in SCRIPTS]
# The steps in the order in which they run, and flags that make them cheap.
STEPS = {
    "find_hard": "",
    "write_prompts": "",
    "generate_spectrum": "--levels 0 50 --seeds 1 --steps 4",
    "filter_clipscore": "--threshold -1",
    "train_lt": "--epochs 4 --curriculum-epochs 3",
    "report": "",
}


@functools.cache
def imported(tree: ast.Module) -> set[str]:
    """The project's modules that are imported anywhere in a module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & set(TREES)
            names |= modules or {node.module}
    return names & set(TREES)


@functools.cache
def reads(tree: ast.Module) -> set[str]:
    """Every NAME of `args.NAME` and `getattr(args, "NAME")` that is read, methods such as args.items() left out."""
    nodes = list(ast.walk(tree))
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    names = {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("args", "self.args")
        and isinstance(node.ctx, ast.Load)
        and id(node) not in called
    }
    for node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and ast.unparse(node.args[0]) == "args":
            names |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
    return names


def commands_in(text: str) -> list[str]:
    """The lines `python SCRIPT.py ...` of a text, with or without `$` or `#` before them."""
    text = text.replace("\\\n", " ")
    return [
        shlex.join(shlex.split(line, comments=True)) for line in re.findall(r"^[\s$#]*(python \w+\.py.*)$", text, re.M)
    ]


def documented_commands() -> list:
    texts = {f"{name}.py": ast.get_docstring(TREES[name]) or "" for name in SCRIPTS}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").rglob("*"))]:
        if path.is_file():
            texts[str(path.relative_to(ROOT))] = path.read_text(encoding="utf-8")
    return [
        pytest.param(command, id=f"{place}: {command}")
        for place, text in texts.items()
        for command in commands_in(text)
    ]


def answer(cwd: Path, *arguments) -> tuple[subprocess.CompletedProcess, float]:
    """Run Python in a folder, with no help from PYTHONPATH: what it did, and the CPU seconds it took itself."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    return done, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


# ---------------------------------------------------------------------------------------------------------------------
# flags


def test_the_demos_go_to_folders_of_their_own(monkeypatch):
    """One after another, as the README has them: the steps refuse a folder that holds another data set's files."""
    folders = []
    monkeypatch.setattr(demo.steps, "make_spectrum", lambda out, *_: folders.append(out) or sys.exit())
    for name in ("run_fewshot", "run_biased"):
        monkeypatch.setattr(demo, name, lambda args: folders.append(args.out) or sys.exit())
    for dataset in ("digits", "toycam", "fewshot_digits", "biased_digits"):
        with pytest.raises(SystemExit):
            demo.main(["--dataset", dataset])
    assert folders[0] == Path("runs/demo") and len(set(folders)) == 4


def test_a_demo_leaves_the_folder_of_another_alone(tmp_path, monkeypatch):
    for name in ("make_spectrum", "run"):  # else a demo that goes on takes minutes to fail here
        monkeypatch.setattr(demo.steps, name, lambda *_: sys.exit())
    (tmp_path / "edits").mkdir()
    (tmp_path / "edits/plan.json").write_text('{"dataset": "biased_digits"}')
    for dataset in ("digits", "toycam", "fewshot_digits"):
        with pytest.raises(cli.UserError, match=f"has the demo of biased_digits; .* another folder for {dataset}"):
            demo.main(["--dataset", dataset, "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["edits"]


def test_every_step_and_the_demo_is_a_script():
    assert set(STEPS) | {"demo"} <= set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_read_is_declared_and_every_flag_declared_is_read(name):
    parser = importlib.import_module(name).build_parser()
    declared = {action.dest for action in parser._actions} - {"help"}
    own = reads(TREES[name])
    direct = imported(TREES[name]) & set(HELPERS)
    further = set().union(*(imported(TREES[helper]) for helper in direct)) & set(HELPERS)
    helpers = set().union(*(reads(TREES[helper]) for helper in direct | further))
    assert own - declared == set(), "read, but not declared"
    assert declared - own - helpers == set(), "declared, but never read"


def test_the_flag_check_sees_what_it_looks_for():
    tree = ast.parse("args.out = args.seed\nprint(getattr(args, 'lr'), args.items(), other.args.no, process.args)")
    assert reads(tree) == {"seed", "lr"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_a_help_and_shows_its_default(name):
    parser = importlib.import_module(name).build_parser()
    defaults = vars(parser.parse_args([]))  # sets the data set's defaults, which the help shows
    shown = "".join(parser.format_help().split())  # no blanks: argparse breaks lines at the hyphens of a path too
    for action in parser._actions:
        assert action.help and action.help.strip(), action.dest
        default = typed = defaults.get(action.dest)
        if type(default) in (list, tuple) and default:
            typed = "x".join(map(str, default)) if isinstance(default, tuple) else shlex.join(map(str, default))
            again = parser.parse_args([action.option_strings[0], *shlex.split(typed)])
            assert getattr(again, action.dest) == default  # what the help shows can be typed
        if default not in (None, False, []):
            assert "".join(f"(default: {typed})".split()) in shown, action.dest


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_answers_within_three_seconds_from_another_folder(name, tmp_path):
    done, seconds = answer(tmp_path, ROOT / f"{name}.py", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {name}.py") and "(default: " in done.stdout
    assert ast.get_docstring(TREES[name]).splitlines()[0] in done.stdout
    assert seconds < 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_bad_argument_is_one_line(name, tmp_path):
    done = forks.type_command(tmp_path, f"{name}.py", "--no-such-flag")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"{name}.py: error: unrecognized arguments: --no-such-flag (see --help)\n"
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# commands in the documents


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_docstring_holds_a_command_of_its_own(name):
    assert any(command.startswith(f"python {name}.py ") for command in commands_in(ast.get_docstring(TREES[name])))


def test_every_recipe_is_used_by_a_command_or_included():
    commands = " ".join(param.values[0] for param in documented_commands())
    paths = list((ROOT / "recipes").rglob("*.args"))
    included = {
        (path.parent / name).resolve()
        for path in paths
        for name in re.findall(r"^@(\S+)$", path.read_text(encoding="utf-8"), re.M)
    }
    recipes = [str(path.relative_to(ROOT)) for path in paths if path.resolve() not in included]
    assert [recipe for recipe in recipes if f"@{recipe}" not in commands] == []


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_parse(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if (ROOT / "recipes").is_dir():
        (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    _, script, *words = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    with cli.paths_unchecked(True):
        module.build_parser().parse_args(words)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def bench_commands() -> list[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    return re.findall(r"^(python (?:bench|assets)/\w+\.py.*)$", text, re.M)


@pytest.mark.parametrize("command", bench_commands())
def test_documented_bench_commands_parse(command, monkeypatch):
    _, script, *words = shlex.split(command, comments=True)
    spec = importlib.util.spec_from_file_location(f"documented_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    with cli.paths_unchecked(True):
        module.build_parser().parse_args(words)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_and_names_of_files_in_the_documents_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text) + re.findall(r"\bsh (recipes/\S+\.sh)", text)
    assert [link for link in links if not ((path.parent / link).exists() or (ROOT / link).exists())] == []


def test_the_readme_is_short_and_every_page_is_in_the_index():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert [path.name for path in PAGES if path.parent.name == "docs" and path.name not in ("README.md",)
            and f"({path.name})" not in index] == []  # fmt: skip


def test_all_folders_are_looked_into():
    """A folder that no __init__.py makes one of ours would be passed by in silence."""
    assert FOLDERS == sorted(["loaders", "spectrum", "generation", "training", "reporting", "runtime"])
    assert {"runtime.cli", "training.losses", "spectrum.folder", "training", "datasets"} <= set(TREES)
    assert imported(ast.parse("from training import losses\nfrom runtime.cli import UserError\nimport os, models")) == {
        "training.losses", "runtime.cli", "models"
    }  # fmt: skip


def test_commands_are_found_in_a_text():
    text = "\n    $ python a.py --x 1  # why\n# python b.py @c.args\n    python d.py --x \\\n        2\nnot python e.py"
    assert commands_in(text) == ["python a.py --x 1", "python b.py @c.args", "python d.py --x 2"]


@pytest.mark.slow
def test_docstring_commands_run_one_after_another(tmp_path):
    for name, cheaper in STEPS.items():
        for command in commands_in(ast.get_docstring(TREES[name])):
            # As typed, and as by a shell, which expands runs/digits_*; but in an empty folder.
            _, script, *words = shlex.split(f"{command} {cheaper}")
            words = [found for word in words for found in sorted(glob.glob(word, root_dir=tmp_path)) or [word]]
            done = forks.type_command(tmp_path, script, *words)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    made = {str(path.relative_to(tmp_path / "runs")) for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    run = "digits_bs_d2s_seed0"
    assert {"hard.csv", "prompts.json", "spectrum/plan.json", "spectrum/scores.csv"} <= made
    assert {f"{run}/args.json", f"{run}/checkpoint.pt", f"{run}/results.json", f"{run}/predictions.npz"} <= made
    assert {f"report/{name}" for name in ("table.md", "table.csv", "curriculum.png", "spectrum.png")} <= made
    assert "report/acceptance.png" in made
    assert "| BS + d2s (--curriculum-epochs 3, --epochs 4) |" in (tmp_path / "runs/report/table.md").read_text(
        encoding="utf-8"
    )
    levels = [row["level"] for row in spectrum_folder.read_rows(tmp_path / "runs/spectrum", decode=True)]
    assert sorted(levels) == [0] * 55 + [50] * 55


# ---------------------------------------------------------------------------------------------------------------------
# imports

# package in requirements.txt -> what to import; of transformers and diffusers the parts that look for other packages
PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "diffusers": "from diffusers import AutoPipelineForImage2Image",
    "transformers": "from transformers import CLIPTextModel, CLIPTokenizer",
    "open_clip_torch": "open_clip",
    "timm": "timm",
    "submitit": "submitit",
    "peft": "peft",
    "numpy": "numpy",
    "pillow": "PIL",
    "tensorboard": "from torch.utils.tensorboard import SummaryWriter",
    "scikit-learn": "sklearn",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
    "safetensors": "safetensors",
    "orjson": "orjson",
}


@pytest.mark.slow
def test_every_dependency_and_module_imports_from_the_root():
    """Our datasets.py and models.py stand where transformers looks for packages of these names."""
    required = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    assert set(required) == set(PACKAGES), "a package that this test does not know"
    lines = [text if text.startswith("from ") else f"import {text}" for text in PACKAGES.values()]
    lines += [f"import {name}" for name in TREES]
    lines += ["from pathlib import Path", "assert Path(datasets.__file__).resolve() == Path('datasets.py').resolve()"]
    done, _ = answer(ROOT, "-c", "\n".join(lines))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_module_imports_from_another_folder_and_does_nothing(tmp_path):
    lines = ["import sys", f"sys.path.insert(0, {str(ROOT)!r})", *(f"import {name}" for name in TREES)]
    done, _ = answer(tmp_path, "-c", "\n".join(lines))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert not list(tmp_path.iterdir())


def test_scripts_import_torch_only_once_they_need_it():
    slow = ("torch", "torchvision", "diffusers", "transformers", "open_clip", "timm", "sklearn", "scipy", "matplotlib")
    lines = ["import sys", *(f"import {name}; {name}.build_parser().format_help()" for name in SCRIPTS)]
    lines += [f"print(*(set({slow!r}) & set(sys.modules)))"]
    done, _ = answer(ROOT, "-c", "\n".join(lines))
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# what no file may contain: (pattern, a line that it must find, a line that it must not find)
FORBIDDEN = [
    (r"\bpickle\b", "import pickle", "allow_unpickled"),
    (r"allow_pickle\s*=\s*True", "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=False)"),
    (r"weights_only\s*=\s*False", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=True)"),
    (r"torch\.load\((?!.*weights_only=True)", "torch.load(path)", "torch.load(path, weights_only=True)"),
    (r"(?<![\w.])hash\(", "seed = hash(name) ^ 1", "file.hash(name)"),
    (r"(?<![\w.])(eval|exec)\(", "x = eval(text)", "model.eval()"),
    (r"(?<![\w.}])/(home|data|scratch|root|Users|mnt|work|checkpoint)\b", 'root = "/data/images"', '"runs/data/x"'),
]


def listed_files() -> list[Path]:
    """Code, launchers and recipes, tests left out: what git knows or would add; without git, what is there."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        names = done.stdout.splitlines()
    else:
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if ".venv" not in path.parts]
    return [
        ROOT / name
        for name in names
        if (ROOT / name).is_file()
        and not name.startswith(("tests/", "runs/"))
        and (name.endswith((".py", ".sh", ".sbatch", ".args")) or name in ("Makefile", ".ci/run"))
    ]


@pytest.mark.parametrize(("pattern", "bad", "good"), FORBIDDEN, ids=[bad for _, bad, _ in FORBIDDEN])
def test_no_file_holds(pattern, bad, good):
    assert re.search(pattern, bad) and not re.search(pattern, good)
    files = listed_files()
    assert {TREE_PATHS[name] for name in TREES} <= set(files)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert found == []


# ---------------------------------------------------------------------------------------------------------------------
# class names

CLASS_NAMES = [
    "missile",
    "missile",  # two ImageNet classes share a name
    "bow/arrow",
    "../../etc/passwd",
    "/absolute",
    'the "quoted" one',
    "it's",
    "a, b; c\td",
    "{}",
    "{name} %s %(x)d",
    "two\nlines",
    "two\r\nlines",
    "a\u2028b\x85c",
    "Łoś, żubr – 狐 🦊",
    " spaces around ",
    "-5",
    "=1+1",
]


@pytest.fixture
def odd_hard(tmp_path) -> Path:
    """hard.csv with one image of each odd class; its sources are as odd as the names."""
    rows = [
        {"source": f"{name}/{label}.png", "label": label, "class_name": name, "reason": "few", "score": 1}
        for label, name in enumerate(CLASS_NAMES)
    ]
    tables.write_hard(tmp_path / "hard.csv", rows)
    return tmp_path / "hard.csv"


def test_odd_class_names_survive_hard_csv(odd_hard):
    found = [(row.source, row.label, row.class_name) for row in tables.read_hard(odd_hard)]
    assert found == [(f"{name}/{label}.png", label, name) for label, name in enumerate(CLASS_NAMES)]


def test_odd_class_names_survive_prompts_json(odd_hard, tmp_path):
    out = tmp_path / "prompts.json"
    assert write_prompts.main(["--dataset", "imagefolder", "--hard", str(odd_hard), "--out", str(out)]) == 0
    prompts = tables.read_prompts(out, range(len(CLASS_NAMES)))
    assert [prompts[label]["class_name"] for label in range(len(CLASS_NAMES))] == CLASS_NAMES
    assert list(json.loads(out.read_text(encoding="utf-8"))) == [str(label) for label in range(len(CLASS_NAMES))]
    for label, name in enumerate(CLASS_NAMES):
        assert prompts[label]["score_prompt"] == "a photo of a " + name
        assert "a 8k real photo: a " + name + " outdoors" in prompts[label]["prompts"]


def test_odd_class_names_survive_metadata(tmp_path):
    from PIL import Image

    (tmp_path / "shard-00000").mkdir()
    rows = []
    for label, name in enumerate(CLASS_NAMES):
        unit = Unit(f"{name}/{label}.png", 50, 0)
        rows.append({"file_name": unit.file_name, "source": unit.source, "label": label, "class_name": name})
        Image.new("RGB", (2, 2)).save(tmp_path / "shard-00000" / unit.file_name)
    writer = files.RowWriter(tmp_path / "shard-00000")
    writer.append(rows)
    writer.close()
    found = spectrum_folder.read_rows(tmp_path, decode=True)
    assert [(row["source"], row["class_name"]) for row in found] == [(row["source"], row["class_name"]) for row in rows]


def test_file_names_are_safe_and_distinct_whatever_the_source():
    sources = [f"{name}/{label}.png" for label, name in enumerate(CLASS_NAMES)] + ["index:1", "index:11", "a/b", "a_b"]
    units = [Unit(source, level, seed) for source in sources for level in (0, 5, 50, 99) for seed in (0, 1, 120)]
    names = [unit.file_name for unit in units]
    assert all(re.fullmatch(r"[A-Za-z0-9_]+\.png", name) for name in names)
    assert len({name.lower() for name in names}) == len(units)


def test_classes_that_share_a_name_stay_two_classes(odd_hard, tmp_path):
    write_prompts.main(["--dataset", "imagefolder", "--hard", str(odd_hard), "--out", str(tmp_path / "prompts.json")])
    prompts = tables.read_prompts(tmp_path / "prompts.json", [0, 1])
    assert prompts[0] == prompts[1] and len(prompts) == len(CLASS_NAMES)


def test_find_hard_writes_what_write_prompts_reads(tmp_path):
    find_hard.main(["--out", str(tmp_path / "hard.csv")])
    write_prompts.main(["--hard", str(tmp_path / "hard.csv"), "--out", str(tmp_path / "prompts.json")])
    assert sorted(tables.read_prompts(tmp_path / "prompts.json", range(3, 10))) == list(range(3, 10))
