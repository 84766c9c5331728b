"""All steps on an embedded benchmark, in about three minutes on two CPU cores.

    digits          DisCL, long tail: images of the few-shot classes are hard; trains a ResNet-8
    toycam          DisCL, low quality: images whose class a CLIP, zero-shot, finds unlikely are hard; FLYP of that CLIP
    fewshot_digits  DataDream: four real digits a class tune the generator; trains a ResNet-8 on images of the untuned
                    and of the tuned generator, alone and with the real ones
    biased_digits   ALIA: in training the paper's colour gives the digit away, in the test set it does not; captions
                    name the papers, each image is edited toward the other papers; trains a ResNet-8

The generator (a tiny Stable Diffusion) and the CLIP that filters are in assets/. Rows are trained with several seeds;
the table at the end says which differences exceed the noise.

Reads:  nothing but the project and scikit-learn's digits (toycam draws its own data, into runs/toycam)
Writes: OUT/hard.csv, prompts.json, spectrum/, train/ (a run folder each, TensorBoard logs inside), demo.md (the table
        that is printed at the end), and what report.py writes: report.html, table.md, table.csv, table.tex, pictures

    python demo.py
    python demo.py --dataset toycam
    python demo.py --dataset fewshot_digits
    python demo.py --dataset biased_digits
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import multiprocessing
import os
import re
import shlex
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev

from runtime import cli, files, steps
from runtime.device import count_cores

# Rows of the table: loss and curriculum. --prior stage: Balanced Softmax takes the class counts of the epoch's images.
ROWS = {
    "digits": [
        *(("--loss", "ce", "--curriculum", name) for name in ("none", "text_only", "all", "d2s", "s2d")),
        ("--loss", "bs", "--curriculum", "none"),
        *(("--loss", "bs", "--curriculum", name, "--prior", "stage") for name in ("text_only", "all", "d2s")),
    ],
    "toycam": [("--loss", "flyp", "--curriculum", name) for name in ("none", "all", "e2h", "adaptive")],
}
SCRIPTS = {"digits": "train_lt", "toycam": "train_iwildcam"}
# Where each goes without --out: the steps of one refuse the files of another.
FOLDERS = {
    "digits": "runs/demo",
    "toycam": "runs/demo_toycam",
    "fewshot_digits": "runs/demo_fewshot",
    "biased_digits": "runs/demo_biased",
}
# The figures of results.json in the table: key -> heading. The first one is compared between rows.
FIGURES = {
    "digits": {"few": "few-shot", "overall": "all classes"},
    "toycam": {"ood_f1": "macro-F1 OOD", "id_f1": "macro-F1 ID"},
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "demo")
    parser.add_argument("--dataset", choices=list(FOLDERS), default="digits", help="the benchmark")
    parser.add_argument(
        "--out",
        type=cli.new_folder,
        metavar="FOLDER",
        help="where everything goes (default: runs/demo for digits, runs/demo_toycam and so on for the others)",
    )
    parser.add_argument(
        "--train-seeds",
        type=cli.whole(0),
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="seeds that each row of the table is trained with",
    )
    parser.add_argument(
        "--jobs", type=cli.whole(1), default=min(4, count_cores()), metavar="N", help="training runs at a time"
    )
    return parser


def train_once(script: str, arguments: list[str]) -> tuple[int, str]:
    """Run a trainer in this process; its exit code and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = importlib.import_module(script).main(arguments)
        except cli.UserError as error:
            print(error)
            code = 2
    return code, printed.getvalue()


def train_all(script: str, commands: list[list[str]], jobs: int) -> None:
    """Train runs, `jobs` at a time, in processes that each import torch once and compute with one thread.

    Raises:
        UserError: one of them failed; its output is printed.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # spawned processes read it
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool, cli.progress(len(commands), "training", "run") as bar:
        waiting = {pool.submit(train_once, script, command): command for command in commands}
        for done in as_completed(waiting):
            code, printed = done.result()
            if code:
                pool.shutdown(wait=False, cancel_futures=True)
                raise cli.UserError(f"training failed: {script}.py {shlex.join(waiting[done])}\n{printed}")
            bar.update()


def row_name(row: tuple[str, ...]) -> str:
    """A row as the report calls it: CE + d2s, or BS (stage prior) + d2s."""
    flags = dict(zip(row[::2], row[1::2], strict=True))
    name = flags["--loss"].upper() + (f" ({flags['--prior']} prior)" if "--prior" in flags else "")
    curriculum = flags["--curriculum"]
    shown = {"text_only": "text only", "all": "all levels"}.get(curriculum, curriculum)
    return name if curriculum == "none" else f"{name} + {shown}"


def standard_error(values: list[float]) -> float:
    """The standard error of a mean over runs; not a number for one."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def difference(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Mean and standard error of the differences of two rows, run by run with equal seeds."""
    apart = [one - other for one, other in zip(ours, theirs, strict=True)]
    return mean(apart), standard_error(apart)


def write_table(out: Path, dataset: str, results: dict[tuple[str, ...], list[dict]]) -> list[str]:
    """Write and print demo.md, and return a sentence for each comparison of a curriculum.

    Args:
        results: row -> results.json of each seed.
    """
    figures, (first, *_) = FIGURES[dataset], FIGURES[dataset]
    count = len(next(iter(results.values())))
    heading = ["test accuracy, %" if dataset == "digits" else "test, %", *figures.values()]
    heading += [f"{figures[first]} against none", "against all levels"]
    lines = [" | ".join(heading), " | ".join("---" for _ in heading)]
    # A line for each row: its figures, and how far it is from the rows without a curriculum and with all levels.
    sentences = []
    values = {row: [one["last"][first] for one in found] for row, found in results.items()}
    if dataset == "toycam":
        untuned = next(iter(results.values()))[0]["zero_shot"]
        lines.append(" | ".join(["zero-shot", *(f"{untuned[key]:.1f}" for key in figures), "–", "–"]))
    for row, found in results.items():
        cells = [row_name(row)]
        for key in figures:
            numbers = [one["last"][key] for one in found]
            cells.append(f"{mean(numbers):.1f} ({stdev(numbers):.1f})" if count > 1 else f"{numbers[0]:.1f}")
        for other in ("none", "all"):
            against = next(r for r in results if r[1] == row[1] and r[3] == other)
            if against == row or "none" in row:
                cells.append("–")
                continue
            apart, error = difference(values[row], values[against])
            cells.append(f"{apart:+.1f} ± {error:.1f}")
            if "d2s" in row or "e2h" in row or "adaptive" in row:
                verdict = "no clear difference" if not abs(apart) > 2 * error else "above" if apart > 0 else "below"
                sentences.append(
                    f"{row_name(row)} against {row_name(against)}: {apart:+.1f} ± {error:.1f} points, {verdict}."
                )
        lines.append(" | ".join(cells))
    # Write and print them.
    table = "\n".join(f"| {line} |" for line in lines)
    tested = "500 test images" if dataset == "digits" else "400 test images OOD, 300 ID"
    note = (
        f"Mean (standard deviation) over {count} training seeds of one spectrum; {tested}. Differences: mean ± "
        "standard error of the runs' differences, seed by seed; 'above' and 'below' are beyond two of them, which "
        "chance alone passes in about one case of five at three seeds."
    )
    files.write_text(out / "demo.md", f"{table}\n\n{note}\n")
    print(f"\n{table}\n\n{note}\n")
    return sentences


def run_fewshot(args) -> int:
    """DataDream on the embedded digits: tune, generate with and without the adapter, train, print the table."""
    began = time.monotonic()
    data, out = ("--dataset", "fewshot_digits"), args.out
    # Tune the generator, and generate as many images without the adapter and with it.
    tuned, folders = out / "tuned", {"untuned": out / "untuned", "tuned": out / "tuned_spectrum"}
    steps.run("tune_generator.py", *data, "--shots", 4, "--mode", "dset", "--out", tuned)
    inputs = ("--hard", tuned / "shots.csv", "--prompts", tuned / "prompts.json", "--per-class", 24)
    steps.run("generate_spectrum.py", *data, *inputs, "--out", folders["untuned"])
    steps.run("generate_spectrum.py", *data, *inputs, "--tuned", tuned, "--out", folders["tuned"])
    # Measure how far they are from the real images. Every image is kept: DataDream does not filter.
    distances = {}
    for name, folder in folders.items():
        scored = ("--spectrum", folder, "--prompts", tuned / "prompts.json", "--threshold", -1, "--distance")
        steps.run("filter_clipscore.py", *data, *scored)
        found = next(csv.DictReader((folder / "distance.csv").read_text().splitlines()))
        distances[name] = f"{float(found['mmd']):.3f}"
    # Train on real images, on synthetic ones, and on both.
    rows = {"real": ("--images", "real", "--epochs", 120)}
    for name, folder in folders.items():
        rows |= {f"{name} only": ("--images", "synthetic", "--spectrum", folder),
                 f"real + {name}": ("--images", "both", "--spectrum", folder)}  # fmt: skip
    places = {
        (name, seed): out / "train" / f"{name.replace(' + ', '_').replace(' ', '_')}_seed{seed}"
        for name in rows for seed in args.train_seeds
    }  # fmt: skip
    commands = [
        [str(word) for word in (*data, "--shots", 4, *rows[name], "--seed", seed, "--out", place)]
        for (name, seed), place in places.items()
    ]
    train_all("train_fewshot", commands, args.jobs)
    # Write the table.
    lines = ["| test accuracy, % | mean (sd) | distance of the images to real ones (MMD) |", "|---|---|---|"]
    for name in rows:
        values = [files.read_json(places[name, seed] / "results.json")["last"]["overall"] for seed in args.train_seeds]
        spread = f" ({stdev(values):.1f})" if len(values) > 1 else ""
        kind = next((kind for kind in ("untuned", "tuned") if kind in name.split()), "")
        lines.append(f"| {name} | {mean(values):.1f}{spread} | {distances.get(kind, '')} |")
    table = "\n".join(lines)
    files.write_text(out / "demo.md", table + "\n")
    print(f"\n{table}\n\ndone in {time.monotonic() - began:.0f} s; look at {tuned / 'all/samples_before.png'} and "
          f"{tuned / 'all/samples_after.png'}")  # fmt: skip
    return 0


def run_biased(args) -> int:
    """ALIA on the embedded biased digits: captions, domains, edits, filter, and accuracy by group."""
    began = time.monotonic()
    data, out = ("--dataset", "biased_digits"), args.out
    described, hard, prompts, drawn = out / "domains", out / "hard.csv", out / "prompts.json", out / "edits"
    # Describe the domains, and edit every image toward the domains that it is not in.
    steps.run("describe_domains.py", *data, "--out", described)
    steps.run("find_hard.py", *data, "--out", hard)
    domains = ("--from", "domains", "--domains", described / "domains.json")
    steps.run("write_prompts.py", *data, *domains, "--hard", hard, "--out", prompts)
    inputs = ("--hard", hard, "--prompts", prompts, "--each-prompt")
    steps.run("generate_spectrum.py", *data, *inputs, "--skip-own-domain", described / "sources.csv", "--out", drawn)
    # As many images from text alone, of the plain prompt.
    plain, text = out / "prompts_plain.json", out / "text_to_image"
    steps.run("write_prompts.py", *data, "--hard", hard, "--out", plain)
    steps.run("generate_spectrum.py", *data, "--hard", hard, "--prompts", plain, "--per-class", 90, "--out", text)
    # Train on real images; then drop edits by CLIP's rules and by the base model, as ALIA does.
    text_only = ("--curriculum", "all", "--add", "all", "--spectrum", text, "--edit-rules", "none")
    edited = ("--curriculum", "all", "--add", "all", "--spectrum", drawn, "--edit-rules")
    rows = {
        "real": (), "RandAugment": ("--randaugment",), "text to image": text_only, "edits": (*edited, "none"),
        "edits + ALIA's rule": (*edited, "confidence"),
    }  # fmt: skip
    length = ("--epochs", 20, "--curriculum-epochs", 20, "--epoch-images", 600)  # every row takes as many steps
    places, commands = {}, {}
    for name in rows:
        for seed in args.train_seeds:
            places[name, seed] = out / "train" / f"{re.sub('[^a-zA-Z]+', '_', name)}_seed{seed}"
            words = (*data, *rows[name], *length, "--seed", seed, "--out", places[name, seed])
            commands[name, seed] = [str(word) for word in words]
    train_all("train_lt", [words for (name, _), words in commands.items() if name == "real"], args.jobs)
    rules = ("--rules", "class", "domain", "confidence", "--domains", described / "domains.json")
    base = ("--checkpoint", places["real", args.train_seeds[0]])
    steps.run("filter_edits.py", *data, "--spectrum", drawn, "--prompts", prompts, *rules, *base)
    train_all("train_lt", [words for (name, _), words in commands.items() if name != "real"], args.jobs)
    # Write the table.
    figures = {"id": "ID", "ood": "OOD", "balanced": "all groups", "worst_group": "worst group"}
    heading = "test accuracy, %: mean ± standard error" if len(args.train_seeds) > 1 else "test accuracy, %"
    lines = [f"| {heading} | {' | '.join(figures.values())} |", "|---" * (len(figures) + 1) + "|"]
    for name in rows:
        found = [files.read_json(places[name, seed] / "results.json")["last"] for seed in args.train_seeds]
        cells = []
        for key in figures:
            values = [one[key] for one in found]
            cells.append(f"{mean(values):.1f}" + (f" ± {standard_error(values):.1f}" if len(values) > 1 else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    files.write_text(out / "demo.md", table + "\n")
    steps.run("report.py", "--runs", *places.values(), "--spectrum", drawn, "--out", out)
    print(f"\n{table}\n\ndone in {time.monotonic() - began:.0f} s; look at {described / 'domains.png'} (the data "
          f"set's bias), {out / 'spectrum.png'} (edits) and {out / 'report.html'}")  # fmt: skip
    return 0


def check_folder(out: Path, dataset: str) -> None:
    """Raise UserError where a folder has another benchmark's demo, whose files the first steps would replace."""
    for path in sorted(out.glob("*/plan.json")):
        if (other := files.read_object(path).get("dataset")) != dataset:
            raise cli.UserError(f"--out {out}: has the demo of {other}; expected another folder for {dataset}")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if len(set(args.train_seeds)) < len(args.train_seeds):
        raise cli.UserError("--train-seeds: a seed is there twice; expected each once, as its run is the same")
    args.out = args.out or Path(FOLDERS[args.dataset])
    check_folder(args.out, args.dataset)
    if args.dataset == "biased_digits":
        return run_biased(args)
    if args.dataset == "fewshot_digits":
        return run_fewshot(args)
    began = time.monotonic()
    rows, script = ROWS[args.dataset], SCRIPTS[args.dataset]
    # Steps 1 to 4: hard images, prompts, spectrum, filter.
    folder = steps.make_spectrum(args.out, args.dataset, 30 if args.dataset == "digits" else None)
    # Step 5: one run for each row and seed.
    print(f"training {len(rows)} rows with {len(args.train_seeds)} seeds each", flush=True)
    commands, folders = [], {row: [] for row in rows}
    for row in rows:
        for seed in args.train_seeds:
            name = "_".join(word for word in row if not word.startswith("--"))
            place = args.out / "train" / f"{name}_seed{seed}"
            folders[row].append(place)
            flags = ["--dataset", args.dataset, *row, "--seed", seed, "--spectrum", folder, "--out", place]
            commands.append([str(flag) for flag in flags])
    train_all(script, commands, args.jobs)
    # Step 6: the report, and the table that README shows.
    everywhere = [place for places in folders.values() for place in places]
    steps.run("report.py", "--runs", *everywhere, "--spectrum", folder, "--out", args.out)
    results = {row: [files.read_json(place / "results.json") for place in places] for row, places in folders.items()}
    sentences = write_table(args.out, args.dataset, results)
    print("\n".join(sentences))
    print(
        f"done in {time.monotonic() - began:.0f} s; look at {args.out / 'spectrum.png'} (a row a hard image, a column "
        f"a level), {args.out / 'report.html'}, and at the curves with: tensorboard --logdir {args.out / 'train'}"
    )
    return 0


if __name__ == "__main__":
    cli.run(main)
