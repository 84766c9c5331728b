"""When does the order of a curriculum pay? The digits benchmark over caption noise, look gap and filter.

A generator whose captions were wrong for a share of the web draws another class than it is asked for; one that has
never seen the target's look draws another look. The CLIPScore filter drops some of what is wrong. For each of the
sixteen combinations a spectrum is drawn, what a user can measure before training is measured, and cross-entropy is
trained without synthetic images, with text-only ones, all levels at once, and both orders.

Reads:  FOLDER/digits_NOISE/tiny_sd for NOISE 0, 0.2, 0.4 and 0.6, as assets/make_assets.py makes them; the shipped
        CLIP, whose captions were true
Writes: OUT/NOISE_LOOK_FILTER/ (spectrum, run folders), OUT/runs.csv (a row a run), OUT/before.csv (a row a spectrum and
        level: acceptance, agreement, distance), OUT/when_the_order_pays.png

    python bench/when_the_order_pays.py --generators runs/noise --out runs/when_the_order_pays
"""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import demo
from runtime import cli, files, steps

NOISES = (0, 0.2, 0.4, 0.6)
LOOKS = {"digits": "a look that the generator has not seen", "digits_web": "the generator's own look"}
FILTERS = {"filtered": "CLIPScore filter", "unfiltered": "no filter"}
CURRICULA = ("none", "text_only", "all", "d2s", "s2d")
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
    parser.add_argument("--train-seeds", type=cli.whole(0), nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--text-guidance", type=float, default=3.0, metavar="W", help="of all spectra")
    parser.add_argument("--jobs", type=cli.whole(1), default=2, metavar="N", help="training runs at a time")
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
    from assets import make_assets

    torch.manual_seed(0)
    web, judge = make_assets.Digits(None), models.build_classifier("resnet8", 10)
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


def draw_figure(path: Path, table: list[dict], looks: list[str], noises: list[float]) -> None:
    """Few-shot accuracy over caption noise, a panel for each look and filter; bars are standard errors over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(looks), 2, figsize=(9, 3.5 * len(looks)), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for panel, (look, filtering) in zip(panels.flat, [(a, b) for a in looks for b in FILTERS], strict=True):
        for curriculum in CURRICULA:
            points = []
            for noise in noises:
                found = [
                    row["few"]
                    for row in table
                    if row["look"] == look and row["curriculum"] == curriculum
                    and (curriculum == "none" or (row["filter"] == filtering and row["noise"] == noise))
                ]  # fmt: skip
                points.append((mean(found), stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0))
            style = "--" if curriculum == "none" else "-"
            panel.errorbar(
                [100 * noise for noise in noises], [p[0] for p in points], [p[1] for p in points], label=curriculum,
                color=COLOURS[curriculum], linestyle=style, marker="o", capsize=3,
            )  # fmt: skip
        panel.set_title(f"{LOOKS[look]}, {FILTERS[filtering]}", fontsize=9)
        panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("wrong captions of the web (%)")
    for panel in panels[:, 0]:
        panel.set_ylabel("few-shot test accuracy (%)")
    panels[0, 0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    # Draw and filter the spectra, and note what can be known before training.
    judge, before, waiting = train_judge(), [], []
    for look in args.looks:
        for noise in sorted(args.noises):
            models = args.generators / f"digits_{noise:g}"
            spectra = make_spectra(args.out / f"{noise:g}_{look}", models, look, args.text_guidance)
            for name, spectrum in spectra.items():
                setting = {"noise": noise, "look": look, "filter": name}
                before += [setting | row for row in measure(spectrum, judge)]
                wanted = CURRICULA if (noise, name) == (min(args.noises), "filtered") else CURRICULA[1:]
                waiting += [(setting, spectrum, c, seed) for c in wanted for seed in args.train_seeds]
    write_csv(args.out / "before.csv", before)
    # Train; what is there already is kept.
    commands, folders = [], []
    for setting, spectrum, curriculum, seed in waiting:
        folders.append(spectrum.parent / f"{spectrum.name}_{curriculum}_seed{seed}")
        flags = ["--dataset", setting["look"], "--loss", "ce", "--curriculum", curriculum, "--seed", seed]
        commands.append([str(flag) for flag in [*flags, "--spectrum", spectrum, "--out", folders[-1]]])
    demo.train_all("train_lt", commands, args.jobs)
    # One table of all runs, and the figure.
    table = []
    for (setting, _, curriculum, seed), place in zip(waiting, folders, strict=True):
        last = files.read_json(place / "results.json")["last"]
        figures = {name: round(last[name], 2) for name in ("few", "overall")}
        table.append(setting | {"curriculum": curriculum, "seed": seed} | figures)
    write_csv(args.out / "runs.csv", table)
    draw_figure(args.out / "when_the_order_pays.png", table, args.looks, sorted(args.noises))
    print(f"{args.out}: {len(table)} runs of {len(args.train_seeds)} seeds; look at when_the_order_pays.png")
    return 0


if __name__ == "__main__":
    cli.run(main)
