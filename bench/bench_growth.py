"""What each step costs as the work grows: CPU seconds and memory of whole commands, from 10^4 to 10^6 images and more.

    plan      generate_spectrum.py --dry-run: 4 levels and 5 seeds of each source, small JPEGs that link to one file
    start     shard 0 of 64 of it up to its first batch, the generator (assets/tiny_sd) loaded
    filter    filter_clipscore.py, another threshold on scored images
    score     the same before any is scored, with a CLIP that costs nothing: all but decoding and embedding
    gallery   report.py --spectrum --gallery: the sheets, and the page with a thumbnail of each image (512x512)
    report    report.py --runs: tables of 20 rows and 5 seeds, of 65 epochs each
    epoch     train_lt.py on iNaturalist 2018's shape (437,513 images of 8,142 classes, 75,234 synthetic images)
              up to the first step of an epoch of d2s and of one after it, without an image file: validation set, pool,
              mix, order, batches
    evaluate  an evaluation of as many logits as its test set has (an image in 18 of training's), and what is written

Each runs in a process of its own; interpreter and imports are part of its figures. --units are images, of `report`
runs, of `epoch` and `evaluate` training images.

Reads:  nothing
Writes: a line of JSON to --out for each: CPU seconds, and the memory that was most; with --figure only the figure

    python bench/bench_growth.py --parts plan filter --units 10000 100000
    python bench/bench_growth.py --figure docs/growth.png
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_rethreshold import make_spectrum, source_name
from PIL import Image
from timing import note

from runtime import cli, files
from spectrum import tables

ROOT = Path(__file__).resolve().parents[1]
LEVELS, SEEDS, CLASSES = (0, 30, 50, 70), 5, 100
INAT = {"train": 437_513, "test": 24_426, "classes": 8142, "kept": 75_234}
TABLE_RUNS, RUN_SEEDS, EPOCHS = 100, 5, 65
# Commands that end where they would compute, or that compute nothing.
INSIDE = "import sys; sys.path[:0] = [{root!r}, {bench!r}]; import bench_growth; from runtime import cli; "
INSIDE += "cli.run(lambda: bench_growth.{call})"


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "bench/bench_growth")
    parser.add_argument(
        "--units", type=cli.whole(10), nargs="+", default=[10_000, 100_000], metavar="N", help="images, or runs"
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=["plan", "start"], help="what runs")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw what --out holds, and measure nothing")
    parser.add_argument(
        "--out", type=Path, default=Path("bench/results/growth.jsonl"), metavar="FILE", help="where lines are added"
    )
    return parser


def inside(call: str) -> list:
    """The command that calls a function of this file in a process of its own."""
    return ["-c", INSIDE.format(root=str(ROOT), bench=str(ROOT / "bench"), call=call)]


# ---------------------------------------------------------------------------------------------------------------------
# what is measured: each makes its inputs in a folder, and gives the command


def plan(folder: Path, units: int) -> list:
    return [ROOT / "generate_spectrum.py", *make_inputs(folder, units), "--dry-run", "--out", folder / "plan"]


def start(folder: Path, units: int) -> list:
    words = [*make_inputs(folder, units), "--shard", "0/64", "--out", str(folder / "start")]
    return inside(f"start_shard({words!r})")


def start_shard(words: list[str]) -> None:
    """generate_spectrum.py up to where it would draw its first batch."""
    import generate_spectrum
    from generation import job

    job.Job.draw_batch = lambda self, *_: sys.exit(0)
    generate_spectrum.main(words)


def make_inputs(folder: Path, units: int) -> list[str]:
    """A folder of sources, hard.csv and prompts.json: the arguments that name them."""
    names = [f"train/{number % CLASSES:03d}/{number:07d}.jpg" for number in range(units // (len(LEVELS) * SEEDS))]
    others = [f"{split}/{label:03d}/0.jpg" for split in ("val", "test") for label in range(CLASSES)]
    link_images(folder, [*names, *others], (48, 32))
    tables.write_hard(
        folder / "hard.csv",
        (
            {"source": name, "label": n % CLASSES, "class_name": f"{n % CLASSES:03d}", "reason": "few", "score": 1}
            for n, name in enumerate(names)
        ),
    )
    texts = [f"a photo of it, number {number}" for number in range(5)]
    prompts = {
        str(label): {"class_name": f"{label:03d}", "score_prompt": "x", "prompts": texts} for label in range(CLASSES)
    }
    files.write_json(folder / "prompts.json", prompts)
    inputs = ["--dataset", "imagefolder", "--data-root", folder, "--hard", folder / "hard.csv"]
    inputs += ["--prompts", folder / "prompts.json", "--generator", ROOT / "assets/tiny_sd", "--device", "cpu"]
    inputs += ["--steps", 20, "--seeds", SEEDS, "--levels", *LEVELS, "--size", "source"]
    return [str(word) for word in inputs]


def link_images(folder: Path, names: list[str], size: tuple[int, int]) -> Path:
    """Images below a folder that are links to one, which it gives."""
    first = folder / "first.jpg"
    Image.linear_gradient("L").convert("RGB").resize(size).save(first)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(first)
    return first


def filter_again(folder: Path, units: int) -> list:
    make_spectrum(folder / "spectrum", units)
    words = ["--spectrum", folder / "spectrum", "--prompts", folder / "spectrum/prompts.json", "--threshold", "0.3"]
    return [ROOT / "filter_clipscore.py", *words]


def score(folder: Path, units: int) -> list:
    words = [str(word) for word in filter_again(folder, units)[1:]]
    for name in ("scores.csv", "scores.json"):
        (folder / "spectrum" / name).unlink()
    return inside(f"score_for_nothing({words!r})")


class FreeClip:
    """Gives random embeddings, in batches, and reads no image: spectrum.embeddings.Clip, less what takes a model."""

    def texts(self, texts: list[str]):
        import torch

        return torch.nn.functional.normalize(torch.randn(len(texts), 512), dim=1)

    def all_images(self, names: list[str], *_):
        return self.texts(names), {}

    def images(self, names: list[str], _):
        for begin in range(0, len(names), 256):
            places = list(range(begin, min(begin + 256, len(names))))
            yield places, self.texts(places), {}


def score_for_nothing(words: list[str]) -> None:
    """filter_clipscore.py with a CLIP that costs nothing."""
    import filter_clipscore

    filter_clipscore.load_clip = lambda args: FreeClip()
    filter_clipscore.main(words)


def gallery(folder: Path, units: int) -> list:
    sources = -(-units // 32)  # of 4 levels and 8 seeds
    splits = [f"{split}/n{label:08d}/0.JPEG" for split in ("val", "test") for label in range(min(136, sources))]
    image = link_images(folder, [*map(source_name, range(sources)), *splits], (512, 512))
    make_spectrum(folder / "spectrum", units, "imagefolder", image)
    words = ["--spectrum", folder / "spectrum", "--data-root", folder, "--gallery", "--out", folder / "report"]
    return [ROOT / "report.py", *words]


def report(folder: Path, units: int) -> list:
    """A run of train_lt.py, copied under other flags, seeds and figures."""
    import numpy as np

    words = ["--curriculum", "none", "--epochs", 2, "--device", "cpu", "--out", folder / "first"]
    subprocess.run([sys.executable, ROOT / "train_lt.py", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    first = {name: files.read_json(folder / "first" / f"{name}.json") for name in ("args", "results")}
    line = files.read_json_lines(folder / "first/history.jsonl")[0]
    for number in range(units):
        table, row, seed = number // TABLE_RUNS, number % TABLE_RUNS // RUN_SEEDS, number % RUN_SEEDS
        own = {"seed": seed, "lr": 0.1 + row / 1000, "imb_ratio": 20.0 + table, "epochs": EPOCHS}
        rng = np.random.default_rng(number)
        noise = {name: rng.normal(50, 5, EPOCHS) for name in line if name.startswith("val_")}
        history = [line | {"epoch": e} | {name: values[e] for name, values in noise.items()} for e in range(EPOCHS)]
        last = first["results"]["last"] | {"overall": float(rng.normal(50, 5))}
        run = folder / f"runs/{number:05d}"
        files.write_json(run / "args.json", first["args"] | {"args": first["args"]["args"] | own})
        files.write_json(run / "results.json", first["results"] | {"last": last})
        files.write_text(run / "history.jsonl", "".join(json.dumps(entry) + "\n" for entry in history))
    return [ROOT / "report.py", "--runs", folder / "runs", "--out", folder / "report"]


def epoch(folder: Path, units: int) -> list:
    return inside(f"set_up_epochs({str(folder)!r}, {units})")


def make_inat(root: Path, images: int):
    """iNaturalist 2018's shape in a number of training images, without files: the data set, and synthetic images."""
    import numpy as np

    from loaders.base import ImageSet, file_set, with_validation

    rng, classes, levels = np.random.default_rng(0), INAT["classes"], (0, 10, 30, 50)
    shares = 500 ** (-np.arange(classes) / (classes - 1))  # from 1,000 images of a class to 2 there
    drawn = rng.choice(classes, images - 2 * classes, p=shares / shares.sum())
    labels = np.concatenate([np.repeat(np.arange(classes), 2), drawn])
    names = [f"train_val2018/Plantae/{label}/{n:032x}.jpg" for n, label in enumerate(labels.tolist())]
    test = rng.integers(0, classes, images * INAT["test"] // INAT["train"])
    tested = [f"train_val2018/Aves/{label}/{n:032x}.jpg" for n, label in enumerate(test.tolist())]
    class_names = [f"species {label}" for label in range(classes)]
    train, test = file_set(root, names, labels), file_set(root, tested, test)
    data = with_validation("inat2018", class_names, train, test, 0, [])
    # Synthetic images of the few-shot classes, a quarter of them at each level.
    hard = np.flatnonzero(np.isin(data.train.labels, data.groups["few"]))
    synthetic = {}
    for level in levels:
        chosen = rng.choice(hard, images * INAT["kept"] // INAT["train"] // len(levels))
        paths = [root / f"spectrum/shard-00000/{n:012x}_level{level:03d}_seed00.png" for n in range(len(chosen))]
        sources = [data.train.sources[place] for place in chosen.tolist()]
        synthetic[level] = ImageSet(paths, data.train.labels[chosen], sources)
    return data, synthetic


def prepare_inat(root: Path, images: int):
    """A trainer of train_lt.py for `make_inat`, its levels and its run's state, and CPU seconds of both."""
    import train_lt
    from curricula import REAL
    from runtime.signals import StopSignals

    words = ["--dataset", "inat2018", "--data-root", root, "--curriculum", "d2s", "--device", "cpu", "--workers", "2"]
    with cli.paths_unchecked(True):
        args = train_lt.build_parser().parse_args([*map(str, words), "--out", str(root / "run")])
    began = time.process_time()
    data, synthetic = make_inat(root, images)
    spent = {"data": time.process_time() - began}
    levels, hard = [*synthetic, REAL], data.groups["few"].tolist()
    trainer, state = train_lt.prepare(args, data, synthetic, levels, hard, StopSignals())
    return trainer, state, spent | {"prepare": time.process_time() - began - spent["data"]}


def set_up_epochs(root: str, images: int) -> None:
    """What train_lt.py does up to the first step of two epochs: of d2s's first level, and after the curriculum."""
    from training import epochs

    trainer, _, spent = prepare_inat(Path(root), images)
    trainer.pool.images.skip_unreadable = True  # there is no file

    class Begun(Exception):
        pass

    def stop(*_):
        raise Begun

    trainer.step = stop
    for number in (0, trainer.args.curriculum_epochs):
        began = time.process_time()
        places = trainer.epoch_places(number, epochs.stage_of(trainer.args, number, trainer.levels))
        try:
            trainer.train(number, places)
        except Begun:
            spent[f"epoch_{number}"] = time.process_time() - began
    print(json.dumps({f"{name}_cpu_seconds": round(value, 2) for name, value in spent.items()}))


def evaluate(folder: Path, units: int) -> list:
    return inside(f"evaluate_for_nothing({str(folder)!r}, {units})")


class FreeStore:
    """Black images of a pixel, in batches: training/stores.py, less what reads."""

    def __init__(self):
        from runtime.device import Fitting

        self.fitting = Fitting()

    def evaluation(self, places, batch_size: int):
        import torch

        yield from (torch.zeros(len(part), 3, 1, 1) for part in torch.from_numpy(places).split(batch_size))


def evaluate_for_nothing(root: str, images: int) -> None:
    """train_lt.py's validation and the end of a run, with a model that costs nothing."""
    import torch

    import train_lt
    from training import log

    train_lt.build_store = lambda *_: FreeStore()
    trainer, state, _ = prepare_inat(Path(root), images)
    logits = torch.randn(512, INAT["classes"])
    trainer.model.forward = lambda images: logits[: len(images)]
    began = time.process_time()
    figure = trainer.validate()["macro"]
    spent = {"validate_cpu_seconds": round(time.process_time() - began, 2)}
    state |= {"best": {"epoch": 0, "figure": figure, "model": trainer.model.state_dict()}, "seconds": 1.0}
    state["history"] = [{"epoch": 0, "images": images}]
    began = time.process_time()
    trainer.finish(state, log.open_writer(Path(root) / "run", 0))
    print(json.dumps(spent | {"finish_cpu_seconds": round(time.process_time() - began, 2)}))


PARTS = {
    "plan": plan, "start": start, "filter": filter_again, "score": score, "gallery": gallery, "report": report,
    "epoch": epoch, "evaluate": evaluate,
}  # fmt: skip


def measure(command: list) -> dict:
    """CPU seconds, seconds by the clock and largest memory of a command, and the figures that it prints last."""
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    said = child.stdout.read()
    _, code, usage = os.wait4(child.pid, 0)
    found = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "seconds": time.perf_counter() - began}
    found |= {"peak_memory_mb": usage.ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)}
    last = said.strip().splitlines()[-1] if said.strip() else ""
    found |= json.loads(last) if last.startswith("{") else {}
    if code or "warning:" in said:  # a figure that was not drawn
        found |= {"error": said[-300:], "code": os.waitstatus_to_exitcode(code)}
    return found


def draw_figure(records: list[dict], path: Path) -> None:
    """CPU seconds and memory of each part by its units, both axes logarithmic, from the last record of each point."""
    import math

    from matplotlib import ticker

    from reporting import figures

    points = {(row["part"], row["units"]): row for row in records if "error" not in row}
    lines = {part: sorted(units for one, units in points if one == part) for part in PARTS}
    lines = {part: units for part, units in lines.items() if units}
    styles = figures.style_of(list(lines))
    figure, axes = figures.new_figure(1, 2, figsize=(11, 4.8))
    for axis, name, title in zip(
        axes, ("cpu_seconds", "peak_memory_mb"), ("CPU seconds of one busy core", "memory (MB)"), strict=True
    ):
        axis.set(xscale="log", yscale="log", title=title, xlabel="images (report: runs; epoch, evaluate: for training)")
        labels = []
        for part, units in lines.items():
            values = [points[part, one][name] for one in units]
            axis.plot(units, values, marker="o", markersize=4, **styles[part])
            labels.append((values[-1], units[-1], part))
        # The name of a line stands at its end; names that would cover each other are moved apart.
        low, high = axis.get_ylim()
        gap, below = math.log(high / low) / 18, {}
        for value, end, part in sorted(labels):
            near = round(math.log10(end))
            place = below[near] = max(math.log(value), below.get(near, -math.inf) + gap)
            axis.annotate(
                part, (end, math.exp(place)), (6, 0), textcoords="offset points", va="center", fontsize=8,
                color=styles[part]["color"],
            )  # fmt: skip
        axis.set_xlim(right=axis.get_xlim()[1] * 8)
        axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.grid(alpha=0.3)
    figures.save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.figure:
        draw_figure(files.read_json_lines(args.out), args.figure)
        return 0
    # One part that fails costs no other its result.
    failed = 0
    for units in args.units:
        for part in args.parts:
            with tempfile.TemporaryDirectory() as name:
                try:
                    found = measure(PARTS[part](Path(name), units))
                except Exception as error:  # its inputs could not be made
                    found = {"error": cli.first_line(error)}
            failed += "error" in found
            note(args.out, {"part": part, "units": units, **found})
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
