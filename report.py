"""Step 6: tables and figures from run folders and a spectrum. Nothing in them is typed by hand.

Runs that differ in nothing but the seed make one row: mean and standard deviation over the seeds.

Reads:  run folders of train_lt.py, a spectrum folder
Writes: OUT/table.md, table.csv (test accuracy by group, after the last epoch and at the best by validation),
        curriculum.png (level and validation accuracy by epoch), spectrum.png (rows: hard images; columns: levels),
        acceptance.png (kept share by class and level)

    python report.py --runs runs/digits_* --spectrum runs/spectrum --out runs/report
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from statistics import mean, stdev

import numpy as np

import cli
import datasets
import figures
import runs
import spectrum
from figures import COLOURS, new_figure, save_figure

LOSS_NAMES = {"ce": "CE", "bs": "BS"}
CURRICULUM_NAMES = {"text_only": "text only", "all": "all levels"}
GROUPS = ("many", "medium", "few", "overall")
MARKERS = ("x", "s", "o", "+")


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "report")
    parser.add_argument(
        "--runs",
        type=cli.existing_folder,
        nargs="*",
        default=[],
        metavar="FOLDER",
        help="run folders of train_lt.py; unfinished ones are named and left out",
    )
    parser.add_argument("--spectrum", type=cli.existing_folder, metavar="FOLDER", help="a filtered spectrum folder")
    parser.add_argument(
        "--data-root",
        type=cli.existing_path,
        metavar="FOLDER",
        help="folder of the data set that the spectrum was drawn from; digits and toycam need none",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/report"), metavar="FOLDER", help="where the report goes")
    return parser


def read_runs(folders: list[Path]) -> dict[str, list[dict]]:
    """Finished runs by row name, in the order given; each has `args`, `results`, `history`.

    Raises:
        UserError: two runs of one row and one seed.
    """
    rows: dict[str, list[dict]] = {}
    for folder in folders:
        if not (folder / "results.json").is_file():
            print(f"{folder}: not finished, left out")
            continue
        args = runs.read_json(folder / "args.json")["args"]
        history = runs.read_json_lines(folder / "history.jsonl")
        run = {"folder": folder, "args": args, "results": runs.read_json(folder / "results.json"), "history": history}
        row = rows.setdefault(row_name(args), [])
        for other in row:
            if {**other["args"], "seed": None} != {**args, "seed": None}:
                different = [name for name in args if name != "seed" and other["args"].get(name) != args[name]]
                raise cli.UserError(
                    f"{folder} and {other['folder']} are both '{row_name(args)}', but differ in "
                    f"{', '.join(different)}; expected one setting a row"
                )
            if other["args"]["seed"] == args["seed"]:
                raise cli.UserError(f"{folder} and {other['folder']} are the same run with the same seed")
        row.append(run)
    return rows


def row_name(args: dict) -> str:
    """What the table calls a run's settings."""
    name = LOSS_NAMES.get(args["loss"], args["loss"])
    if args["loss"] == "bs" and args["prior"] == "stage":
        name += " (stage prior)"
    if args["curriculum"] == "fixed":
        return f"{name} + level {args['fixed_level']}"
    if args["curriculum"] != "none":
        name += f" + {CURRICULUM_NAMES.get(args['curriculum'], args['curriculum'])}"
    return name


def summary(values: list[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation (0 for one value) over seeds; None where a group has no class."""
    known = [value for value in values if value is not None]
    return (mean(known), stdev(known) if len(known) > 1 else 0.0) if known else None


def write_tables(rows: dict[str, list[dict]], out: Path) -> str:
    """table.md and table.csv; returns the Markdown."""
    title = {"overall": "all"}
    lines = [
        "| test accuracy, % | " + " | ".join(title.get(group, group) for group in GROUPS) + " | seeds |",
        "|---|" + "---|" * (len(GROUPS) + 1),
    ]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["row", "epoch", "seeds", *(f"{group}_{what}" for group in GROUPS for what in ("mean", "std"))])
    for name, row in rows.items():
        for epoch in ("last", "best_by_val"):
            found = [summary([run["results"][epoch][group] for run in row]) for group in GROUPS]
            table.writerow(
                [
                    name,
                    epoch,
                    len(row),
                    *(f"{value:.2f}" if pair else "" for pair in found for value in pair or (None, None)),
                ]
            )
            if epoch == "last":
                cells = [f"{pair[0]:.1f} ({pair[1]:.1f})" if pair else "–" for pair in found]
                lines.append(f"| {name} | {' | '.join(cells)} | {len(row)} |")
    markdown = "\n".join(lines) + "\n"
    runs.write_text(out / "table.md", markdown)
    runs.write_text(out / "table.csv", text.getvalue())
    return markdown


def draw_curriculum(rows: dict[str, list[dict]], path: Path) -> None:
    """Level, and validation accuracy over all and over few-shot classes, by epoch: mean over the seeds."""
    panels = {"val_overall": "validation accuracy, all classes (%)", "val_few": "validation accuracy, few-shot (%)"}
    figure, (top, *others) = new_figure(3, 1, figsize=(8, 9), sharex=True, height_ratios=(2, 3, 3))
    drawn = {}
    for colour, (name, row) in zip(COLOURS * len(rows), rows.items(), strict=False):
        history = row[0]["history"]
        epochs = [record["epoch"] + 1 for record in history]
        # An epoch that mixes levels has a point for each; rows with the same curriculum share their points.
        points = [(epoch, level) for epoch, record in zip(epochs, history, strict=True) for level in record["levels"]]
        curriculum = row[0]["args"]["curriculum"]
        if curriculum != "none" and points not in drawn.values():
            drawn[name] = points
            top.plot(
                *zip(*points, strict=True),
                MARKERS[len(drawn) % len(MARKERS)],
                color=colour,
                markersize=4,
                label=curriculum,
            )
        for panel, axis in zip(panels, others, strict=True):
            values = np.array([[record[panel] for record in run["history"]] for run in row], dtype=float).mean(0)
            # Few validation images make a jagged line: show it faintly, under its mean over five epochs.
            axis.plot(epochs, values, color=colour, alpha=0.2, linewidth=1)
            smooth = [values[max(0, i - 4) : i + 1].mean() for i in range(len(values))]
            axis.plot(epochs, smooth, color=colour, linewidth=2, label=name)
    top.set_ylabel("guidance level (%)\n100 = real images only")
    top.set_ylim(-5, 105)
    for axis, label in zip(others, panels.values(), strict=True):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    others[-1].set_xlabel("epoch")
    others[0].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    if drawn:
        top.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    top.grid(alpha=0.3)
    save_figure(figure, path)


def draw_spectrum(folder: Path, data_root: Path | None, path: Path, rows_shown: int = 10) -> None:
    """A sheet: a row for each of some hard images, a column for each level and the source; rejected ones framed red."""
    plan = spectrum.read_plan(folder)
    rows = spectrum.read_rows(folder)
    scores = spectrum.read_scores(folder / "scores.csv") if (folder / "scores.csv").exists() else {}
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
    cells = {(row["source"], row["level"]): row for row in rows if row["seed"] == 0}
    train = datasets.load(plan["dataset"], plan["imb_ratio"], data_root, plan["data_seed"]).train
    real = dict(zip(shown, (image for image, _ in datasets.read_sources(shown, train, data_root)), strict=True))

    columns = [*plan["levels"], 100]
    figure, axes = new_figure(len(shown), len(columns), figsize=(len(columns) * 1.05, len(shown) * 1.05), squeeze=False)
    for line, source in zip(axes, shown, strict=True):
        for level, axis in zip(columns, line, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            row = cells.get((source, level))
            if level == 100:
                axis.imshow(real[source])
            elif row:
                axis.imshow(datasets.read_image(folder / row["file_name"]))
                rejected = row["file_name"] in scores and not scores[row["file_name"]]["kept"]
                for spine in axis.spines.values():
                    spine.set(visible=rejected, color="red", linewidth=3)
            else:
                axis.axis("off")
        name = next(row["class_name"] for row in rows if row["source"] == source)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for level, axis in zip(columns, axes[0], strict=True):
        axis.set_title({0: "text only\nlevel 0", 100: "real\n100"}.get(level, f"\n{level}"), fontsize=9)
    figure.text(0.5, 0.085, "red frame: rejected by CLIPScore", ha="center", fontsize=9, color="red")
    save_figure(figure, path)


def draw_acceptance(folder: Path, path: Path) -> None:
    """The kept share of each class and level, with the number kept."""
    rows, scores = spectrum.read_rows(folder), spectrum.read_scores(folder / "scores.csv")
    labels, levels = sorted({row["label"] for row in rows}), sorted({row["level"] for row in rows})
    names = {row["label"]: row["class_name"] for row in rows}
    made, kept = np.zeros((len(labels), len(levels)), int), np.zeros((len(labels), len(levels)), int)
    for row in rows:
        place = labels.index(row["label"]), levels.index(row["level"])
        made[place] += 1
        kept[place] += scores.get(row["file_name"], {}).get("kept", False)
    figures.draw_acceptance([names[label] for label in labels], levels, made, kept, path)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    rows = read_runs(args.runs)
    if not rows and args.spectrum is None:
        raise cli.UserError("nothing to report: expected --runs with a finished run, or --spectrum")
    written = []
    if rows:
        print(write_tables(rows, args.out), end="")
        draw_curriculum(rows, args.out / "curriculum.png")
        written += ["table.md", "table.csv", "curriculum.png"]
    if args.spectrum is not None:
        draw_spectrum(args.spectrum, args.data_root, args.out / "spectrum.png")
        written.append("spectrum.png")
        if (args.spectrum / "scores.csv").exists():
            draw_acceptance(args.spectrum, args.out / "acceptance.png")
            written.append("acceptance.png")
    print(f"{args.out}: {', '.join(written)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
