"""When does the order of a curriculum pay? The digits benchmark over caption noise, look gap and filter.

A generator whose captions were wrong for a share of the web draws another class than it is asked for; one that has
never seen the target's look draws another look. The CLIPScore filter drops some wrong images. For each of the
sixteen combinations a spectrum is drawn, what a user can measure before training is measured, and the demo's rows are
trained: cross-entropy and Balanced Softmax without synthetic images, with text-only ones, all levels at once, and in
an order.

Reads:  FOLDER/digits_NOISE/tiny_sd for NOISE 0, 0.2, 0.4 and 0.6, as assets/make_assets.py makes them; the shipped
        CLIP, whose captions were true
Writes: OUT/NOISE_LOOK/ (spectra, run folders), OUT/runs.csv (a row a run), OUT/before.csv (a row a spectrum and level:
        acceptance, agreement, distance), OUT/table.md, OUT/when_the_order_pays.png
Takes:  8 spectra of 1 to 4 minutes on a core, and for each seed 116 runs of about 10 seconds on one; what is there
        already is kept

    python bench/when_the_order_pays.py --generators runs/noise --out runs/when_the_order_pays
"""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import demo
from runtime import cli, files, steps

NOISES = (0, 0.2, 0.4, 0.6)
LOOKS = {"digits": "not seen by the generator", "digits_web": "the generator's own"}
FILTERS = {"filtered": "CLIPScore filter", "unfiltered": "no filter"}
ROWS = {demo.row_name(row): row for row in demo.ROWS["digits"]}  # name -> flags of train_lt.py
COLOURS = {"none": "0.4", "text_only": "tab:purple", "all": "tab:orange", "d2s": "tab:blue", "s2d": "tab:green"}


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "when_the_order_pays")
    parser.add_argument(
        "--generators",
        type=cli.existing_folder,
        required=True,
        metavar="FOLDER",
        help="holds digits_0, digits_0.2, ...",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/when_the_order_pays"), metavar="FOLDER")
    parser.add_argument("--noises", type=float, nargs="+", default=list(NOISES), choices=NOISES, metavar="SHARE")
    parser.add_argument("--looks", nargs="+", default=list(LOOKS), choices=LOOKS, metavar="DATASET")
    parser.add_argument("--train-seeds", type=cli.whole(0), nargs="+", default=[0, 1, 2, 3, 4], metavar="N")
    parser.add_argument("--text-guidance", type=float, default=3.0, metavar="W", help="of all spectra")
    parser.add_argument("--jobs", type=cli.whole(1), default=2, metavar="N", help="spectra and runs at a time")
    return parser


def make_spectra(out: Path, models: Path, look: str, guidance: float) -> dict[str, Path]:
    """The spectrum of one generator and look, filtered and not: two folders with the same images."""
    data = ("--dataset", look, "--imb-ratio", 30)
    hard, prompts = out / "hard.csv", out / "prompts.json"
    made = {name: out / name for name in FILTERS}
    if (made["unfiltered"] / "scores.csv").exists():
        return made
    steps.run("find_hard.py", *data, "--out", hard)
    steps.run("write_prompts.py", "--dataset", look, "--hard", hard, "--out", prompts)
    drawing = ("--generator", models / "tiny_sd", "--text-guidance", guidance)
    files = ("--hard", hard, "--prompts", prompts, "--out", made["filtered"])
    steps.run("generate_spectrum.py", *data, *files, *drawing)
    shutil.rmtree(made["unfiltered"], ignore_errors=True)
    shutil.copytree(made["filtered"], made["unfiltered"])
    for name, threshold in (("filtered", ()), ("unfiltered", ("--threshold", -1))):
        files = ("--spectrum", made[name], "--prompts", prompts, "--distance")
        steps.run("filter_clipscore.py", *data, *files, *threshold)
    return made


def measure(spectrum: Path, judge) -> list[dict]:
    """What is known of a spectrum before training, a row a level.

    agreement is the share of all images that the judge takes for the class that was asked for, agreement_kept of those
    that the filter keeps; accepted is the share that it keeps; mmd2 is the distance of the kept ones to real images.
    """
    import numpy as np
    import torch
    from PIL import Image

    from spectrum import folder as spectrum_folder

    scores = {row["file_name"]: row for row in csv.DictReader((spectrum / "scores.csv").open())}
    distances = {int(row["level"]): row for row in csv.DictReader((spectrum / "distance.csv").open())}
    levels = defaultdict(list)
    for row in spectrum_folder.read_rows(spectrum):
        pixels = np.asarray(Image.open(spectrum / row["file_name"]).convert("RGB"))
        kept = scores[row["file_name"]]["kept"].lower() in ("1", "true")
        levels[row["level"]].append((pixels, row["label"], kept))
    table = []
    for level, images in sorted(levels.items()):
        pixels, labels, kept = (np.array(part) for part in zip(*images, strict=True))
        with torch.no_grad():
            seen = judge(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1).argmax(1).numpy()
        right = seen == labels
        table.append(
            {
                "level": level,
                "images": len(labels),
                "accepted": round(float(kept.mean()), 4),
                "agreement": round(float(right.mean()), 4),
                "agreement_kept": round(float(right[kept].mean()), 4) if kept.any() else "",
                "mmd2": distances[level]["mmd"] if level in distances else "",
            }
        )
    return table


def train_judge():
    """A ResNet-8 that knows the web's scans, upright and slanted, in any colours: no image of the benchmark."""
    import torch
    from torch.nn import functional as F

    import models
    from assets import webs

    torch.manual_seed(0)
    web, judge = webs.Digits(None), models.build_classifier("resnet8", 10)
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=1500)
    for _ in range(1500):
        images, labels = web.any_look(128)
        loss = F.cross_entropy(judge(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    files.write_text(path, text.getvalue())


def curriculum_of(row: str) -> str:
    return ROWS[row][3]


def values_of(table: list[dict], row: str, noise: float, look: str, filtering: str) -> list[float]:
    """Few-shot accuracy of a row, seed by seed. The rows without synthetic images are trained once a look."""
    real = curriculum_of(row) == "none"
    found = [one for one in table if one["row"] == row and one["look"] == look
             and (real or (one["noise"] == noise and one["filter"] == filtering))]  # fmt: skip
    return [one["few"] for one in sorted(found, key=lambda one: one["seed"])]


def draw_figure(path: Path, table: list[dict], looks: list[str], noises: list[float]) -> None:
    """Few-shot accuracy over caption noise: a row of panels a loss, a panel a look and filter.

    Bars are standard errors over seeds.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = [(look, filtering) for look in looks for filtering in FILTERS]
    figure, panels = pyplot.subplots(
        2, len(columns), figsize=(3.4 * len(columns), 6.5), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for line, loss in zip(panels, ("ce", "bs"), strict=True):
        for panel, (look, filtering) in zip(line, columns, strict=True):
            for row in [name for name, flags in ROWS.items() if flags[1] == loss]:
                found = [values_of(table, row, noise, look, filtering) for noise in noises]
                errors = [stdev(one) / len(one) ** 0.5 if len(one) > 1 else 0 for one in found]
                kind = curriculum_of(row)
                panel.errorbar(
                    [100 * noise for noise in noises], [mean(one) for one in found], errors, label=kind,
                    color=COLOURS[kind], linestyle="--" if kind == "none" else "-", marker="o", capsize=3,
                )  # fmt: skip
            panel.set_title(f"{loss.upper()}, look {LOOKS[look]},\n{FILTERS[filtering]}", fontsize=9)
            panel.grid(alpha=0.3)
        line[0].set_ylabel("few-shot test accuracy (%)")
        line[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for panel in panels[-1]:
        panel.set_xlabel("wrong captions of the web (%)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_table(path: Path, table: list[dict], before: list[dict]) -> None:
    """What is known before training, and what training gave, a line for each generator, look and filter.

    Differences of few-shot accuracy are means over seeds ± standard errors.
    """
    compared = [(loss, one, other) for loss in ("ce", "bs") for one, other in
                (("text_only", "none"), ("all", "none"), ("d2s", "all"), ("s2d", "all"))
                if (loss, one) in [(flags[1], flags[3]) for flags in ROWS.values()]]  # fmt: skip
    heading = ["look", "wrong captions", "filter", "judge agrees", "accepted", "MMD²"]
    heading += [f"{loss.upper()}: {one.replace('_', ' ')} − {other}" for loss, one, other in compared]
    lines = [heading, ["---"] * len(heading)]
    for look, noise, filtering in dict.fromkeys((one["look"], one["noise"], one["filter"]) for one in before):
        # Of level 0, the images that the filter keeps; and the distance of level 90's too.
        known = {one["level"]: one for one in before
                 if (one["look"], one["noise"], one["filter"]) == (look, noise, filtering)}  # fmt: skip
        shown = [f"{known[0][key]:.0%}" if known[0][key] != "" else "–" for key in ("agreement_kept", "accepted")]
        shown.append(", ".join(f"{float(known[level]['mmd2'] or 'nan'):.2f}" for level in (0, 90)))
        cells = [LOOKS[look], f"{noise:.0%}", "yes" if filtering == "filtered" else "no", *shown]
        values = {(flags[1], flags[3]): values_of(table, row, noise, look, filtering) for row, flags in ROWS.items()}
        for loss, one, other in compared:
            apart, error = demo.difference(values[loss, one], values[loss, other])
            cells.append(f"{apart:+.1f} ± {error:.1f}")
        lines.append(cells)
    files.write_text(path, "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    # Draw and filter the spectra, and note what can be known before training.
    settings = [(noise, look) for look in args.looks for noise in sorted(args.noises)]
    with ThreadPoolExecutor(args.jobs) as pool:
        judging = pool.submit(train_judge)
        drawing = {
            (noise, look): pool.submit(
                make_spectra, args.out / f"{noise:g}_{look}", args.generators / f"digits_{noise:g}", look,
                args.text_guidance,
            )
            for noise, look in settings
        }  # fmt: skip
        spectra = {setting: drawn.result() for setting, drawn in drawing.items()}
        judge = judging.result()
    before, waiting = [], []
    for (noise, look), made in spectra.items():
        for name, spectrum in made.items():
            setting = {"noise": noise, "look": look, "filter": name}
            before += [setting | level for level in measure(spectrum, judge)]
            first = (noise, name) == (min(args.noises), "filtered")
            waiting += [(setting, spectrum, row) for row in ROWS if first or curriculum_of(row) != "none"]
    write_csv(args.out / "before.csv", before)
    # Train, one seed after the other; finished runs are kept.
    commands, table = [], []
    for seed in args.train_seeds:
        for setting, spectrum, row in waiting:
            place = spectrum.parent / f"{spectrum.name}_{'_'.join(ROWS[row][1::2])}_seed{seed}"
            flags = ["--dataset", setting["look"], *ROWS[row], "--seed", seed, "--spectrum", spectrum, "--out", place]
            commands.append([str(flag) for flag in flags])
            table.append(setting | {"row": row, "seed": seed, "place": place})
    demo.train_all("train_lt", commands, args.jobs)
    # One table of all runs, one of the differences, and the figure.
    for one in table:
        last = files.read_json(one.pop("place") / "results.json")["last"]
        one |= {name: round(last[name], 2) for name in ("few", "overall")}
    write_csv(args.out / "runs.csv", table)
    write_table(args.out / "table.md", table, before)
    draw_figure(args.out / "when_the_order_pays.png", table, args.looks, sorted(args.noises))
    print(f"{args.out}: {len(table)} runs of {len(args.train_seeds)} seeds; look at when_the_order_pays.png")
    return 0


if __name__ == "__main__":
    cli.run(main)
