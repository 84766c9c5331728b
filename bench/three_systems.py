"""DisCL, DataDream and ALIA in one table: the digits benchmark with four spectra of the same hard images.

All spectra have the same sources, levels, seeds, generator, steps, guidance and filter. They differ in two things:

    DisCL       the generator as it is, the data set's own prompts
    DataDream   the generator tuned on the hard images (tune_generator.py), the prompt that it was tuned with
    ALIA        the generator as it is, each class in the domains that captions of the training images name
    combined    the tuned generator, the domain prompts

Each trains a ResNet-8 from level 0 alone (text_only: for a tuned generator DataDream's own way), from all levels at
once, and from diverse to specific (d2s, DisCL's way); every run takes as many steps, over as many images. The tuning
and the spectra are made once, so that the errors are of training alone.

Reads:  the shipped digits, generator, captioner and CLIP
Writes: OUT/three_systems.md (the table), three_systems.png, spectra.png (the same hard images in every spectrum),
        runs.csv (a row a run), before.csv (a row a spectrum and level: kept, agreement with a judge, distance),
        runs.zip (args.json, results.json and history.jsonl of each run)
        WORK/: domains, adapters, spectra and run folders. The same command resumes from what is there

    python bench/three_systems.py --jobs 12 --train-seeds 0 1 2 3 4 --out runs/three_systems
"""

from __future__ import annotations

import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import demo
from bench.when_the_order_pays import measure, train_judge, write_csv
from loaders.base import ASSETS
from runtime import cli, files, steps
from spectrum import folder as spectrum_folder

DATA = ("--dataset", "digits", "--imb-ratio", 30)
GENERATOR = ASSETS / "tiny_sd_noisy"
SYSTEMS = ("DisCL", "DataDream", "ALIA", "combined")
CURRICULA = {"text_only": "text only", "all": "all levels", "d2s": "d2s"}
LOSSES = {"CE": ("--loss", "ce"), "BS": ("--loss", "bs", "--prior", "stage")}
STEPS = ("--epochs", 60, "--curriculum-epochs", 48, "--epoch-images", 184)  # as many images as the training set has
FIGURES = {"few": "few-shot", "overall": "all classes"}
# As fewshot_digits is tuned: the same scans in the same hand, and a generator of the same size.
TUNING = ("--mode", "dset", "--resolution", 16, "--crops", 1, "--batch-size", 40, "--lr", 2e-3, "--warmup-steps", 12,
          "--sample-steps", 10)  # fmt: skip
COLOURS = {"text_only": "#cc79a7", "all": "#e69f00", "d2s": "#0072b2"}


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "three_systems")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/three_systems"), metavar="FOLDER", help="tables and figures"
    )
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="spectra and run folders (default: OUT/work)")
    parser.add_argument(
        "--train-seeds", type=cli.whole(0), nargs="+", default=[0, 1, 2, 3, 4], metavar="N", help="seeds of each row"
    )
    parser.add_argument(
        "--jobs", type=cli.whole(1), default=2, metavar="N", help="training runs at a time, and up to 4 spectra"
    )
    parser.add_argument("--device", default="cpu", help="of captioner, generator and CLIP; training is on the CPU")
    return parser


def make_spectra(work: Path, device: str, jobs: int) -> dict[str, Path]:
    """The four filtered spectra, by system."""
    on = ("--device", device)
    hard, tuned, domains = work / "hard.csv", work / "tuned", work / "domains"
    plain_prompts, domain_prompts = work / "prompts.json", work / "domain_prompts.json"
    # Hard images; DisCL's prompts, ALIA's prompts, DataDream's adapter.
    steps.run("find_hard.py", *DATA, "--out", hard)
    steps.run("write_prompts.py", "--dataset", "digits", "--hard", hard, "--out", plain_prompts)
    steps.run("describe_domains.py", *DATA, "--captioner", ASSETS / "tiny_captioner", "--out", domains, *on)
    source = ("--from", "domains", "--domains", domains / "domains.json")
    steps.run("write_prompts.py", "--dataset", "digits", *source, "--hard", hard, "--out", domain_prompts)
    steps.run("tune_generator.py", *DATA, "--hard", hard, "--generator", GENERATOR, *TUNING, "--out", tuned, *on)
    # Draw, some spectra at a time; all are filtered against the same texts.
    inputs = {
        "DisCL": ("--prompts", plain_prompts),
        "DataDream": ("--prompts", tuned / "prompts.json", "--tuned", tuned),
        "ALIA": ("--prompts", domain_prompts),
        "combined": ("--prompts", domain_prompts, "--tuned", tuned),
    }
    made = {name: work / "spectra" / name for name in SYSTEMS}

    def draw(name: str) -> None:
        drawing = ("--hard", hard, "--generator", GENERATOR, *inputs[name], "--out", made[name], *on)
        steps.run("generate_spectrum.py", *DATA, *drawing)
        filtering = ("--spectrum", made[name], "--prompts", plain_prompts, "--distance", *on)
        steps.run("filter_clipscore.py", *DATA, *filtering)

    with ThreadPoolExecutor(min(jobs, len(SYSTEMS))) as pool:
        list(pool.map(draw, SYSTEMS))
    return made


def list_runs(spectra: dict[str, Path], seeds: list[int], work: Path) -> list[dict]:
    """What to train: the settings of each run, its folder and its command's arguments."""
    waiting = []
    for loss, flags in LOSSES.items():
        rows = [("none", "none"), *((system, curriculum) for system in SYSTEMS for curriculum in CURRICULA)]
        for system, curriculum in rows:
            for seed in seeds:
                place = work / "train" / f"{loss}_{system}_{curriculum}_seed{seed}"
                inputs = () if system == "none" else ("--spectrum", spectra[system])
                words = (*DATA, *flags, "--curriculum", curriculum, *inputs, *STEPS, "--seed", seed)
                command = [str(word) for word in (*words, "--device", "cpu", "--out", place)]
                run = {"loss": loss, "system": system, "curriculum": curriculum, "seed": seed}
                waiting.append(run | {"folder": place, "command": command})
    return waiting


def values_of(table: list[dict], loss: str, system: str, curriculum: str, figure: str) -> list[float]:
    """A row's figure by seed, in the order of the seeds."""
    wanted = {"loss": loss, "system": system, "curriculum": curriculum}
    return [run[figure] for run in table if wanted.items() <= run.items()]


def write_table(path: Path, table: list[dict], before: list[dict], seeds: list[int]) -> None:
    """Write and print the table: means, standard deviations, and differences seed by seed with standard errors."""
    heading = ["test accuracy, %", *FIGURES.values()]
    heading += [f"{word} against {other}" for other in ("none", "DisCL") for word in FIGURES.values()]
    lines = [heading, ["---"] * len(heading)]
    for loss in LOSSES:
        for system in ("none", *SYSTEMS):
            for curriculum in CURRICULA if system != "none" else ("none",):
                own = {figure: values_of(table, loss, system, curriculum, figure) for figure in FIGURES}
                name = loss if system == "none" else f"{loss} + {system}, {CURRICULA[curriculum]}"
                cells = [f"{mean(v):.1f}" + (f" ({stdev(v):.1f})" if len(v) > 1 else "") for v in own.values()]
                for other in (("none", "none"), ("DisCL", curriculum)):
                    for figure, values in own.items():
                        if system in ("none", other[0]):
                            cells.append("–")
                            continue
                        apart, error = demo.difference(values, values_of(table, loss, *other, figure))
                        cells.append(f"{apart:+.1f} ± {error:.1f}")
                lines.append([name, *cells])
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    kept = {
        name: sum(round(row["accepted"] * row["images"]) for row in before if row["system"] == name) for name in SYSTEMS
    }
    made = sum(row["images"] for row in before if row["system"] == SYSTEMS[0])
    text += (
        f"\nMean (standard deviation) over {len(seeds)} training seeds of one spectrum each; 500 test images. "
        "Differences: mean ± standard error of the runs' differences, seed by seed; against DisCL with the same loss "
        f"and curriculum. Each spectrum has {made} images, of which CLIPScore keeps "
        f"{', '.join(f'{count} ({name})' for name, count in kept.items())}.\n"
    )
    files.write_text(path, text)
    print(f"\n{text}")


def draw_figure(path: Path, table: list[dict]) -> None:
    """Few-shot accuracy by system and curriculum, a panel a loss; bars are standard errors of the mean."""
    from reporting.figures import new_figure, save_figure

    figure, panels = new_figure(1, len(LOSSES), figsize=(9, 3.5), sharey=True)
    for panel, loss in zip(panels, LOSSES, strict=True):
        base = values_of(table, loss, "none", "none", "few")
        panel.axhline(mean(base), color="0.4", linestyle="--", label="none")
        if len(base) > 1:
            error = stdev(base) / len(base) ** 0.5
            panel.axhspan(mean(base) - error, mean(base) + error, color="0.4", alpha=0.2, linewidth=0)
        for shift, (curriculum, word) in zip((-0.2, 0, 0.2), CURRICULA.items(), strict=True):
            found = [values_of(table, loss, system, curriculum, "few") for system in SYSTEMS]
            errors = [stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0 for v in found]
            places = [place + shift for place in range(len(SYSTEMS))]
            panel.errorbar(places, [mean(v) for v in found], errors, fmt="o", color=COLOURS[curriculum], capsize=3,
                           label=word)  # fmt: skip
        panel.set_xticks(range(len(SYSTEMS)), SYSTEMS)
        panel.set_title(loss)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("few-shot test accuracy (%)")
    panels[0].legend(fontsize=8)
    save_figure(figure, path)


def draw_spectra(path: Path, spectra: dict[str, Path]) -> None:
    """The first hard image of three classes in every spectrum: a row a spectrum, a column a level; rejected: red."""
    from loaders.pictures import read_image
    from reporting.figures import new_figure, save_figure
    from spectrum.tables import read_scores

    rows = {name: spectrum_folder.read_rows(folder) for name, folder in spectra.items()}
    first = {row["label"]: row["source"] for row in reversed(rows[SYSTEMS[0]])}
    shown = [first[label] for label in sorted(first)[::3]]
    levels = sorted({row["level"] for row in rows[SYSTEMS[0]]})
    figure, axes = new_figure(len(SYSTEMS), len(shown) * len(levels), figsize=(14, 3.6), squeeze=False)
    for name, line in zip(SYSTEMS, axes, strict=True):
        scores = read_scores(spectra[name] / "scores.csv")
        cells = {(row["source"], row["level"]): row["file_name"] for row in rows[name] if row["seed"] == 0}
        for axis, (source, level) in zip(line, [(s, k) for s in shown for k in levels], strict=True):
            axis.imshow(read_image(spectra[name] / cells[source, level]))
            axis.set(xticks=[], yticks=[], title=f"{level}" if name == SYSTEMS[0] else "")
            for spine in axis.spines.values():
                spine.set(visible=not scores[cells[source, level]]["kept"], color="red", linewidth=2)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    work = args.work or args.out / "work"
    os.environ["OMP_NUM_THREADS"] = "1"  # embedded models are fastest with one thread a process
    # Make the spectra, and measure what can be known before training.
    spectra = make_spectra(work, args.device, args.jobs)
    judge = train_judge()
    before = [{"system": name} | row for name, folder in spectra.items() for row in measure(folder, judge)]
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / "before.csv", before)
    draw_spectra(args.out / "spectra.png", spectra)
    # Train; complete runs are skipped.
    waiting = list_runs(spectra, args.train_seeds, work)
    demo.train_all("train_lt", [run["command"] for run in waiting], args.jobs)
    # One row a run, the table, the figure, and what is kept of the runs.
    table = []
    for run in waiting:
        last = files.read_json(run["folder"] / "results.json")["last"]
        settings = {name: run[name] for name in ("loss", "system", "curriculum", "seed")}
        table.append(settings | {name: round(last[name], 2) for name in FIGURES})
    write_csv(args.out / "runs.csv", table)
    with zipfile.ZipFile(args.out / "runs.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for run in waiting:
            for name in ("args.json", "results.json", "history.jsonl"):
                packed.write(run["folder"] / name, f"{run['folder'].name}/{name}")
    write_table(args.out / "three_systems.md", table, before, args.train_seeds)
    draw_figure(args.out / "three_systems.png", table)
    print(f"{args.out}: {len(table)} runs of {len(args.train_seeds)} seeds; look at three_systems.png and spectra.png")
    return 0


if __name__ == "__main__":
    cli.run(main)
