"""Step 6: tables, figures and one page from run folders and a spectrum. Nothing in them is typed by hand.

Runs that differ in nothing but the seed make one row: mean and standard deviation over seeds. Rows of one data set,
imbalance ratio and model make one table. The recipes (recipes/) say what was published and which rows and seeds are
missing; a run counts as a recipe's row only if every flag that changes a result has the recipe's value.

Reads:  run folders of the trainers, or what was kept of them (args.json, results.json, perhaps history.jsonl), a
        spectrum folder, the recipes
Writes: OUT/report.html (all of it on one page that needs no other file), table.md, table.tex, table.csv (test figures
        after the last epoch, and in table.csv also at the best by validation); for each table curriculum.png (level and
        validation accuracy by epoch), groups.png, synthetic.png, frequency.png, gain.png, cuda.png; spectrum.png (rows:
        hard images; columns: levels), acceptance.png (kept share by class and level), distance.png,
        edits_kept.png; for data with groups domains.png (accuracy by class and domain)
        with --gallery: OUT/gallery/index.html and its thumbnails, to look through the spectrum and choose the threshold

    python report.py --runs runs/digits_* --spectrum runs/spectrum --out runs/report
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path

import datasets
from loaders.pictures import read_image
from loaders.sources import read_sources
from reporting import figures, gallery, names, overview, page, recipes, render, tables
from reporting.curves import comparative_figures
from runtime import cli, files, runs
from spectrum import acceptance, edits
from spectrum import folder as spectrum_folder
from spectrum.acceptance import no_score
from spectrum.edits import EDITS, read_edits
from spectrum.tables import read_scores

TRAINERS = ("train_lt", "train_iwildcam", "train_fewshot")  # the scripts whose runs make tables
MOST_CLASSES = 150  # that a figure shows one by one: thousands would make it taller than an image can be
INTRODUCTION = (
    "Every number is from a run's own test figures after its last epoch: mean and, in brackets, standard deviation "
    "over seeds. Many-, medium- and few-shot are classes with more than 100, with 20 to 100 and with fewer than 20 "
    "images in the long-tailed training set (on digits many begins above 30). Published figures are those that "
    "recipes/ quotes; differences are in points."
)


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "report")
    parser.add_argument(
        "--runs",
        type=cli.existing_folder,
        nargs="*",
        default=[],
        metavar="FOLDER",
        help="run folders, or folders that hold some; unfinished ones are named and left out",
    )
    parser.add_argument("--spectrum", type=cli.existing_folder, metavar="FOLDER", help="a filtered spectrum folder")
    parser.add_argument(
        "--data-root",
        type=cli.existing_path,
        metavar="FOLDER",
        help="folder of the data set that the spectrum was drawn from; digits and toycam need none (default: "
        "$DISCL_DATA/DATASET, where that variable is set)",
    )
    parser.add_argument(
        "--gallery",
        action="store_true",
        help="write OUT/gallery/index.html, on which a person looks through --spectrum and chooses the threshold; "
        "edits stand under their domains, with the reasons of filter_edits.py",
    )
    parser.add_argument(
        "--out", type=cli.new_folder, default=Path("runs/report"), metavar="FOLDER", help="where the report goes"
    )
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# figures


def draw_table(table: tables.Table, out: Path, prefix: str) -> list[tuple[Path, str]]:
    """The figures that a table's runs allow: files and what they show."""
    drawn = []
    for name, caption, draw, *args in comparative_figures([row for row in table.rows.values() if row.runs]):
        path = out / f"{prefix}{name}.png"
        drawn += decorate(path.name, lambda: draw(*args, path) or [(path, caption)])  # noqa: B023  (called at once)
    return drawn


def draw_spectrum(folder: Path, data_root: Path | None, path: Path, rows_shown: int = 10) -> None:
    """A sheet: a row for each of some hard images, a column for each level (of edits: each domain) and the source;
    rejected ones are framed red, and for edits with the reason below."""
    plan = spectrum_folder.read_plan(folder)
    rows = spectrum_folder.read_rows(folder)
    scores = read_scores(folder / "scores.csv") if (folder / "scores.csv").exists() else {}
    edits = read_edits(folder / EDITS) if (folder / EDITS).exists() else {}
    dropped = {name: "" for name, row in scores.items() if not row["kept"]}
    dropped |= {name: row["reason"] for name, row in edits.items() if row["kept"] == "0"}
    by_label: dict[int, list[str]] = {}
    for source, label in {row["source"]: row["label"] for row in rows}.items():
        by_label.setdefault(label, []).append(source)
    # One image of each class in turn, until the sheet is full.
    shown = [
        by_label[label][i]
        for i in range(max(map(len, by_label.values())))
        for label in sorted(by_label)
        if i < len(by_label[label])
    ][:rows_shown]
    shown.sort(key=lambda source: next(row["label"] for row in rows if row["source"] == source))
    domains = sorted({row["domain"] for row in rows if row.get("domain")})
    if domains:
        cells = {(row["source"], row.get("domain")): row for row in rows if row["level"] == plan["levels"][0]}
    else:
        cells = {(row["source"], row["level"]): row for row in rows if row["seed"] == 0}
    train = datasets.load(plan["dataset"], plan["imb_ratio"], data_root, plan["data_seed"]).train
    real = dict(zip(shown, (image for image, _ in read_sources(shown, train, data_root)), strict=True))

    columns = [*(domains or plan["levels"]), 100]
    figure, axes = figures.new_figure(
        len(shown), len(columns), figsize=(len(columns) * 1.05, len(shown) * 1.05), squeeze=False
    )
    for line, source in zip(axes, shown, strict=True):
        for level, axis in zip(columns, line, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            row = cells.get((source, level))
            if level == 100:
                axis.imshow(real[source])
            elif row:
                axis.imshow(read_image(folder / row["file_name"]))
                for spine in axis.spines.values():
                    spine.set(visible=row["file_name"] in dropped, color="red", linewidth=3)
                axis.set_xlabel(dropped.get(row["file_name"], ""), fontsize=7, color="red", labelpad=1)
            else:
                axis.set_frame_on(False)  # axis("off") would hide the class name of the row too
        name = next(row["class_name"] for row in rows if row["source"] == source)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for level, axis in zip(columns, axes[0], strict=True):
        named = {0: "text only\nlevel 0", 100: "real\n100"}.get(level, f"\n{level}")
        axis.set_title(textwrap.fill(level, 14) if level in domains else named, fontsize=7 if domains else 9)
    rejected = "red frame: rejected" + ("" if domains else " by CLIPScore")
    figure.text(0.5, 0.085, rejected, ha="center", fontsize=9, color="red")
    figures.save_figure(figure, path)


def draw_spectrum_figures(folder: Path, data_root: Path | None, out: Path) -> list[tuple[Path, str]]:
    """The figures of a spectrum folder: files and what they show."""
    root = data_root or datasets.default_data_root(spectrum_folder.read_plan(folder)["dataset"])
    path, caption = out / "spectrum.png", "Each row ends at the real image, level 100."
    drawn = decorate(path.name, lambda: draw_spectrum(folder, root, path) or [(path, caption)])
    if (folder / "scores.csv").exists():
        kept, shown = out / "acceptance.png", "How many synthetic images CLIPScore keeps, by class and guidance level."
        drawn += decorate(kept.name, lambda: draw_acceptance(folder, kept) or [(kept, shown)])
    for name, caption in (
        ("distance.png", "How far the synthetic images of each level are from the real ones."),
        ("edits_kept.png", "How many edits the rules keep, by class and domain."),
        ("edits_dropped.png", "Some of the edits that the rules drop, by reason."),
    ):
        if (folder / name).exists():
            copy = out / name
            drawn += decorate(name, lambda copy=copy, caption=caption: copy_figure(folder, copy) or [(copy, caption)])
    return drawn


def copy_figure(folder: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / copy.name, copy)


def draw_acceptance(folder: Path, path: Path) -> None:
    """The kept share of each class, group of classes and level, with the number kept."""
    rows, scores = spectrum_folder.read_rows(folder), read_scores(folder / "scores.csv")
    scores = {row["file_name"]: scores.get(row["file_name"], {"kept": False}) for row in rows}
    note = files.read_object(folder / "scores.json") if (folder / "scores.json").is_file() else {}
    names = {row["label"]: row["class_name"] for row in rows}
    groups = {int(label): group for label, group in note.get("groups", {}).items()}
    table = acceptance.tabulate(*acceptance.count_kept(rows, scores), names, groups, MOST_CLASSES)
    figures.draw_acceptance(*table, path)


def draw_gallery(folder: Path, data_root: Path | None, out: Path) -> Path:
    """The page on which a person looks through a filtered spectrum or a set of edits; its index.html."""
    plan = spectrum_folder.read_plan(folder)
    rows = spectrum_folder.read_made(folder)  # as filter_clipscore.py counts: also those whose image is gone
    about, command = f"{folder}: {len(rows):,} images of {plan['dataset']}.", ""
    scores, dropped, threshold = {}, {}, None
    # Note the domain that each image was drawn toward.
    named = spectrum_folder.read_rows(folder)
    domains = {row["file_name"]: row["domain"] for row in named if row.get("domain")}
    rows = [row | {"domain": domains.get(row["file_name"], "none")} for row in rows] if domains else rows
    # Gather what each filter keeps.
    if (folder / edits.EDITS).is_file():
        found = edits.read_edits(folder / edits.EDITS)
        dropped = {name: entry["reason"] for name, entry in found.items() if entry["kept"] == "0"}
        about += f" edits.csv drops {len(dropped):,} of them."
        # Training leaves out what was drawn since.
        dropped |= {row["file_name"]: "not in edits.csv" for row in rows if row["file_name"] not in found}
    if (folder / "scores.json").is_file():
        note = files.read_object(folder / "scores.json", "clip", "threshold", "keep_share")
        scores = read_scores(folder / "scores.csv")
        kept, threshold = sum(entry["kept"] for entry in scores.values()), note["threshold"]
        rule = f"--threshold {threshold:g}" if threshold is not None else f"--keep-share {note['keep_share']:g}"
        if threshold is None:  # a kept share has none: begin at the lowest score that it kept
            threshold = min((entry["text_score"] for entry in scores.values() if entry["kept"]), default=0.0)
        about += f" scores.csv keeps {kept:,} ({rule}), scored by the CLIP {note['clip']}."
        about += "" if note["threshold"] is not None else " The slider begins at the lowest score kept."
        command = filter_command(folder, data_root, plan, note)
        # An image that is gone has no score for the filter either.
        there = spectrum_folder.image_names(folder)
        scores |= {row["file_name"]: no_score("missing") for row in rows if row["file_name"] not in there}
    # Load the sources, and write the page.
    root = data_root or datasets.default_data_root(plan["dataset"])
    train = datasets.load(plan["dataset"], plan["imb_ratio"], root, plan["data_seed"]).train
    return gallery.write_gallery(
        rows,
        scores,
        dropped,
        threshold,
        lambda names: (image for image, _ in read_sources(names, train, root)),
        lambda name: read_image(folder / name),
        about,
        command,
        out / "gallery",
    )


def filter_command(folder: Path, data_root: Path | None, plan: dict, note: dict) -> str:
    """The filter's command for this spectrum, without its threshold."""
    words = ["python", "filter_clipscore.py", "--dataset", plan["dataset"], "--spectrum", str(folder)]
    if plan["imb_ratio"] is not None:
        words += ["--imb-ratio", f"{plan['imb_ratio']:g}"]
    words += ["--data-seed", str(plan["data_seed"])]
    words += ["--data-root", str(data_root)] if data_root else []
    words += [word for name, value in note.get("typed", {}).items() for word in (f"--{name}", value)]
    return shlex.join(words)


# ---------------------------------------------------------------------------------------------------------------------
# the page


def table_section(table: tables.Table, drawn: list[tuple[Path, str]]) -> list[str]:
    """A table's part of the page."""
    body = [page.table(render.heading(table), [render.cells(table, row) for row in table.rows.values()])]
    body += [page.note(text) for text in render.notes(table)]
    commands = [row.recipe.command for row in table.rows.values() if row.recipe]
    if commands:
        body.append(page.commands("Commands of these rows", commands))
    waiting = [
        recipe.command.replace("--seed 0", f"--seed {seed}")
        for recipe, seeds in tables.missing(table).values()
        for seed in seeds
    ]
    if waiting:
        body.append(page.commands("Commands of missing runs", waiting))
    return [*body, page.figures(drawn)]


def effective_arguments(script: str, words: list[str]) -> dict:
    """All arguments that a trainer's command line comes to, defaults included, as its args.json would hold them.

    Raises:
        UserError: no trainer, or its parser refuses the arguments.
    """
    if script not in TRAINERS or not Path(__file__).with_name(f"{script}.py").is_file():
        raise cli.UserError(f"{' '.join(words)}: a command of {script}.py; expected one of {', '.join(TRAINERS)}")
    said = io.StringIO()
    try:
        with cli.paths_unchecked(True), contextlib.redirect_stderr(said):
            parsed = importlib.import_module(script).build_parser().parse_args(words)
    except SystemExit:
        raise cli.UserError(said.getvalue().strip().splitlines()[-1]) from None
    return json.loads(json.dumps(runs.effective_arguments(parsed)))


def decorate(what: str, draw: Callable[[], list[tuple[Path, str]]]) -> list[tuple[Path, str]]:
    """The figures that `draw` makes; one that fails costs a warning, not the tables that are written already."""
    try:
        return draw()
    except Exception as error:  # whatever a font, a picture or a plotting library raises
        place = traceback.extract_tb(error.__traceback__)[-1]
        print(f"warning: {what}: not drawn: {cli.first_line(error)} ({Path(place.filename).name}:{place.lineno})")
        return []


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.gallery and args.spectrum is None:
        raise cli.UserError("--gallery: expected the --spectrum to look through")
    if args.gallery and not any((args.spectrum / name).is_file() for name in ("scores.json", edits.EDITS)):
        raise cli.UserError(
            f"--gallery: {args.spectrum} has neither scores.json nor {edits.EDITS}; expected a filtered spectrum folder"
        )
    if args.gallery and (args.spectrum / "scores.json").is_file():
        files.read_object(args.spectrum / "scores.json", "clip")
    # Gather what recipes ask for and what was run.
    wanted, complaints = recipes.read_all(effective_arguments)
    print("".join(f"{line}\n" for line in complaints), end="")
    found = tables.read(tables.run_folders(args.runs), wanted, effective_arguments, recipes.read_published())
    if not found and args.spectrum is None:
        raise cli.UserError("nothing to report: expected --runs with a finished run, or --spectrum")
    # Write the tables before any figure.
    written, sections = [], []
    if found:
        text = render.markdown(found)
        print(text, end="")
        for name, content in (
            ("table.md", text), ("table.tex", render.latex(found)), ("table.csv", render.long_csv(found))
        ):  # fmt: skip
            files.write_text(args.out / name, content)
            written.append(name)
    sections += [(one.name, [page.table(one.heading, one.rows)]) for one in overview.build(found)]
    # Draw the figures of each table and of the spectrum.
    for table in found:
        prefix = "" if len(found) == 1 else re.sub(r"\W+", "_", table.name).lower() + "_"
        drawn = draw_table(table, args.out, prefix)
        written += [path.name for path, _ in drawn]
        sections.append((table.name, table_section(table, drawn)))
    if args.spectrum is not None:
        drawn = draw_spectrum_figures(args.spectrum, args.data_root, args.out)
        written += [path.name for path, _ in drawn]
        sections.append(("The spectrum", [page.figures(drawn)]))
    # Put all of it on one page.
    begun = {names.table_name(row.args) for table in found for row in table.rows.values() if row.runs}
    waiting = sorted({names.table_name(recipe.args) for recipe in wanted} - begun)
    if found and waiting:
        sections.append(
            ("Not begun", [page.note(f"Tables of recipes that no run belongs to yet: {', '.join(waiting)}.")])
        )
    paragraphs = [*(render.findings(table) for table in found), *([INTRODUCTION] if found else [])]
    page.write(args.out / "report.html", "Diffusion Curriculum: results", paragraphs, sections)
    print(f"{args.out}: {', '.join(['report.html', *written])}", flush=True)
    # Make the gallery last: it takes longest, and nothing else needs it. It was asked for: a failure ends the script.
    if args.gallery:
        print(draw_gallery(args.spectrum, args.data_root, args.out))
    return 0


if __name__ == "__main__":
    cli.run(main)
