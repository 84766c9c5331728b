"""DataDream, step 1: tune a text-to-image generator on a few real images a class, by LoRA.

Adapters of rank 16 on every attention projection of UNet and text encoders learn the few images under the prompt that
generation will use. `--mode cls` makes one adapter a class, from its own images; `--mode dset` one for all classes;
`--mode source` one an image, of which generation mixes two (LoFT). With --captions an image's prompt also holds its
caption, and generation draws with those of all images at random (BOB).

Reads:  the data set (--shots K a class, or the images of --hard), a generator
Writes: OUT/plan.json, shots.csv (a hard.csv) and prompts.json, which generate_spectrum.py --tuned OUT takes,
        OUT/LABEL/pytorch_lora_weights.safetensors (dset: OUT/all/), which diffusers loads, and beside it history.jsonl,
        TensorBoard events (loss by noise level, held-out loss at fixed noise) and sheets of samples before and after

After a kill, the same command resumes; SIGTERM and SIGUSR2 end it within a step, with exit code 75. Several
processes share the classes by --shard 0/4 to --shard 3/4. --together G tunes G class adapters side by side, each as
if alone, which fills a GPU that the few images of one class do not.

    python tune_generator.py --dataset fewshot_digits --shots 4 --mode dset --out runs/tuned
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import datasets
from curricula import places_by_label
from generation import texts
from generation.known import GENERATORS
from loaders import fewshot
from loaders.base import stop_on_unreadable
from runtime import cli, files, runs
from runtime.signals import StopSignals
from runtime.text import counted
from spectrum import tables
from spectrum.captions import read_caption_table
from spectrum.units import short_name

HELD_OUT = {"cls": 8, "dset": 64, "source": 8}  # validation images that the held-out loss is taken on
MOST_CAPTIONS = 64  # that generation draws a class with


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "tune_generator")
    datasets.add_flags(parser, "fewshot_digits")
    datasets.add_shot_flags(parser)
    parser.add_argument(
        "--out", type=cli.new_folder, default=Path("runs/tuned"), metavar="FOLDER", help="where the adapters go"
    )
    parser.add_argument(
        "--hard", type=cli.existing_file, metavar="FILE", help="tune on the images of this table of find_hard.py alone"
    )
    add_adapter_flags(parser.add_argument_group("generator and adapters"))
    add_training_flags(parser.add_argument_group("training"))
    group = parser.add_argument_group("how")
    group.add_argument(
        "--shard",
        type=cli.shard,
        default=cli.Shard(0, 1),
        metavar="I/N",
        help="which share of the classes, from 0/N",
    )
    cli.add_device_flag(group)
    group.add_argument(
        "--dry-run", action="store_true", help="print how much there is to tune, in adapters, steps, hours and bytes"
    )
    group.add_argument(
        "--steps-per-second", type=cli.number(1e-6), metavar="RATE",
        help="for --dry-run: steps of one adapter a second; without it, that of the last run",
    )  # fmt: skip
    return parser


def add_adapter_flags(group) -> None:
    group.add_argument("--generator", metavar="NAME", help="Stable Diffusion pipeline: hub name or local folder")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a generator on the hub")
    group.add_argument(
        "--mode",
        choices=["cls", "dset", "source"],
        default="cls",
        help="one adapter a class, one for all, or one an image",
    )
    group.add_argument(
        "--captions", type=cli.existing_file, metavar="FILE",
        help="what each training image shows beside its class: captions.jsonl of describe_domains.py, or a CSV file "
        "with the columns source,caption",
    )  # fmt: skip
    group.add_argument(
        "--template", metavar="TEXT", help="the prompt, with {} for the class name (default: the data set's own)"
    )
    group.add_argument(
        "--parts",
        choices=["unet", "text"],
        nargs="+",
        default=["unet", "text"],
        help="parts with adapters",
    )
    group.add_argument("--rank", type=cli.whole(1), default=16, metavar="N", help="rank of the adapters")
    group.add_argument(
        "--alpha", type=cli.number(0), metavar="A", help="adapters' scale times rank (default: the rank, scale 1)"
    )
    group.add_argument(
        "--resolution", type=cli.whole(8), default=512, metavar="PIXELS", help="side of the square training images"
    )
    group.add_argument(
        "--crops", type=cli.whole(1), default=8, metavar="N",
        help="random crops of each image, encoded once before training",
    )  # fmt: skip
    group.add_argument("--flip", action="store_true", help="mirror half of the crops")
    group.add_argument(
        "--samples", type=cli.whole(0), default=8, metavar="N", help="images on a sheet before and after; 0: no sheet"
    )
    group.add_argument("--sample-steps", type=cli.whole(1), default=30, metavar="N", help="denoising steps of samples")
    group.add_argument(
        "--text-guidance", type=cli.number(0), default=2.0, metavar="SCALE", help="classifier-free guidance of samples"
    )


def add_training_flags(group) -> None:
    group.add_argument("--batch-size", type=cli.whole(1), default=8, metavar="N", help="images of an adapter in a step")
    group.add_argument("--epochs", type=cli.whole(1), default=200, metavar="N", help="how often each image is used")
    group.add_argument("--lr", type=cli.number(0), default=1e-4, metavar="RATE", help="peak learning rate")
    group.add_argument(
        "--warmup-steps", type=cli.whole(0), default=100, metavar="N",
        help="steps over which the rate rises to --lr, before a cosine to 0",
    )  # fmt: skip
    group.add_argument("--weight-decay", type=cli.number(0), default=0.01, metavar="RATE", help="AdamW's weight decay")
    group.add_argument(
        "--clip-grad", type=cli.number(0), default=1.0, metavar="NORM", help="clip each adapter's gradient to this norm"
    )
    group.add_argument("--seed", type=cli.whole(0), default=0, metavar="N", help="seed of weights, order and noise")
    group.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="number type of the frozen generator (adapters stay float32); auto: bfloat16 on a GPU that has it, else "
        "float32",
    )  # fmt: skip
    group.add_argument(
        "--together", type=cli.whole(1), default=1, metavar="G",
        help="class adapters tuned side by side, on a GPU 4 for instance; halved where they do not fit into memory",
    )  # fmt: skip
    group.add_argument(
        "--grad-checkpointing",
        action="store_true",
        help="recompute activations to save memory",
    )
    group.add_argument("--compile", action="store_true", help="compile the UNet; minutes at first, faster after that")


def find_units(args, data) -> list:
    """The adapters of a run: one for each class that has training images, for each image, or one called `all`."""
    from training.tuner import Unit

    prompts, told = class_prompts(args, data), image_prompts(args, data)

    def unit(name: str, places: np.ndarray, val: np.ndarray) -> Unit:
        held = data.val.labels[val]
        return Unit(name, places, [told[place] for place in places], val, [prompts[label] for label in held])

    def some(val: np.ndarray) -> np.ndarray:
        ranked = sorted(val.tolist(), key=lambda place: files.digest_int("held-out", data.val.sources[place]))
        return np.array(ranked[: HELD_OUT[args.mode]], dtype=int)

    labels = np.unique(data.train.labels).tolist()
    if args.mode == "dset":
        return [unit("all", np.arange(len(data.train)), some(np.flatnonzero(np.isin(data.val.labels, labels))))]
    held = [some(places) for places in places_by_label(data.val.labels, len(data.class_names))]
    if args.mode == "source":
        return [
            unit(short_name(source), np.array([place]), held[label])
            for place, (source, label) in enumerate(zip(data.train.sources, data.train.labels.tolist(), strict=True))
        ]
    places = places_by_label(data.train.labels, len(data.class_names))
    return [unit(str(label), places[label], held[label]) for label in labels]


def class_prompts(args, data) -> list[str]:
    """The prompt of each class."""
    return [args.template.replace("{}", name) for name in data.spoken_names]


def image_prompts(args, data) -> list[str]:
    """The prompt of each training image: its class's, and its caption with --captions.

    Raises:
        UserError: an image has no caption.
    """
    prompts = [class_prompts(args, data)[label] for label in data.train.labels.tolist()]
    if not args.captions:
        return prompts
    captions = read_caption_table(args.captions)
    missing = next((source for source in data.train.sources if not captions.get(source)), None)
    if missing is not None:
        raise cli.UserError(f"--captions {args.captions}: none for {missing}; expected one for each training image")
    return [f"{text}, {captions[source]}" for text, source in zip(prompts, data.train.sources, strict=True)]


def make_plan(args, data, dtype: str) -> dict:
    """Everything that determines the adapters. --together changes them by rounding alone."""
    import models

    named = ("dataset", "imb_ratio", "data_seed", "shots", "shot_seed", "mode", "template", "parts", "rank", "alpha",
             "resolution", "crops", "flip", "batch_size", "epochs", "lr", "warmup_steps", "weight_decay", "clip_grad",
             "seed")  # fmt: skip
    plan = {name: getattr(args, name) for name in named}
    plan |= models.describe_generator(args.generator, args.revision)
    plan |= {"dtype": dtype, "parts": sorted(set(args.parts)), "shots_digest": fewshot.shots_digest(data.train)}
    if args.captions:
        plan["captions"] = files.digest_files([args.captions])
    labels = np.unique(data.train.labels).tolist()
    return json.loads(json.dumps(plan | {"class_names": {label: data.class_names[label] for label in labels}}))


def choose_images(args, data):
    """The data set with the training images to tune on: those of --hard, or all."""
    if not args.hard:
        return data
    places = {source: place for place, source in enumerate(data.train.sources)}
    rows = tables.read_hard(args.hard)
    unknown = next((row.source for row in rows if row.source not in places), None)
    if unknown is not None:
        raise cli.UserError(
            f"--hard {args.hard}: source {unknown}: not a training image of {data.name} with these flags"
        )
    chosen = np.array([places[row.source] for row in rows])
    return dataclasses.replace(data, train=data.train.take(chosen))


def check_flags(args, data) -> None:
    """Raise UserError where flags do not go together, or two classes have one name."""
    from training.tuner import batch_and_steps

    if "{}" not in args.template:
        raise cli.UserError(f"--template {args.template!r}: expected a text with {{}}, where the class name goes")
    counts = {"cls": data.counts[data.counts > 0].tolist(), "dset": [len(data.train)], "source": [1]}[args.mode]
    fewest = min(batch_and_steps(args, count)[1] for count in counts)
    if args.warmup_steps >= fewest:
        raise cli.UserError(f"--warmup-steps {args.warmup_steps}: expected fewer than the {fewest} steps of an adapter")
    for flag, value in (("--lr", args.lr), ("--alpha", args.alpha), ("--clip-grad", args.clip_grad)):
        if value == 0:
            raise cli.UserError(f"{flag} 0: the adapters would change nothing; expected more than 0")
    names = [data.spoken_names[label] for label in np.flatnonzero(data.counts)]
    read = [name.lower() for name in names]  # as the tokenizers of CLIP do
    doubled = next((name for name, text in zip(names, read, strict=True) if read.count(text) > 1), None)
    if doubled is not None:
        raise cli.UserError(
            f"{data.name}: two classes are called {doubled}: one prompt for both, capital letters or not; expected two "
            "names"
        )


def write_inputs(args, data) -> None:
    """What generation takes: the images as a hard.csv, and the prompts of each class."""
    rows = [
        {"source": source, "label": int(label), "class_name": data.class_names[label], "reason": "shot", "score": ""}
        for source, label in zip(data.train.sources, data.train.labels, strict=True)
    ]
    tables.write_hard(args.out / "shots.csv", rows)
    prompts, plain = {}, class_prompts(args, data)
    # Captions of every class: an image's background is not to tell its class.
    told = zip(image_prompts(args, data), data.train.labels.tolist(), strict=True) if args.captions else ()
    captions = list(dict.fromkeys(text.removeprefix(plain[label]) for text, label in told)) or [""]
    for label in np.flatnonzero(data.counts).tolist():
        some = sorted(captions, key=lambda caption: files.digest_int("caption", args.seed, label, caption))
        listed = [plain[label] + caption for caption in some[:MOST_CAPTIONS]]
        prompts[label] = {"class_name": data.class_names[label], "score_prompt": plain[label], "prompts": listed}
    files.write_json(args.out / "prompts.json", prompts)


def print_forecast(args, groups: list) -> None:
    """What tuning these groups takes."""
    from training import lora
    from training.tuner import batch_and_steps

    steps = sum(batch_and_steps(args, len(unit.places))[1] for group in groups for unit in group)
    adapters = sum(map(len, groups))
    size = 4 * sum(lora.count_weights(args.generator, args.revision, args.parts, args.rank).values())
    speeds = [files.read_json(path) for path in args.out.glob("shard-*/speed.json")]
    rate = args.steps_per_second or max((speed["steps_per_second"] for speed in speeds), default=None)
    hours = f"{steps / rate / 3600:.2f} hours at {rate:.4g} steps a second" if rate else (
        "time unknown: no run here yet to go by, and no --steps-per-second"
    )  # fmt: skip
    place = next(folder for folder in [args.out.resolve(), *args.out.resolve().parents] if folder.exists())
    print(
        f"  {adapters} adapters of {size / 1e6:.3g} MB, {steps} steps: {hours}; {adapters * size / 1e9:.3g} GB of "
        f"{shutil.disk_usage(place).free / 1e9:.4g} GB free"
    )


def check_generator(args) -> None:
    """Raise UserError where the generator has no UNet of Stable Diffusion's kind to tune."""
    import models

    models.check_generator(args.generator)
    kind = models.pipeline_config(args.generator, args.revision)["_class_name"]
    if not re.fullmatch("StableDiffusion(XL)?(Img2Img)?Pipeline", kind):
        raise cli.UserError(
            f"--generator {args.generator}: is a {kind}; expected a Stable Diffusion or SDXL pipeline, whose UNet and "
            "text encoders are tuned"
        )
    known = GENERATORS.get(args.generator)
    if known and args.resolution != known.native:
        print(f"--resolution {args.resolution}: unusual for {args.generator}, which was trained at {known.native}")


def is_tuned(out: Path, name: str) -> bool:
    """Whether an adapter is complete."""
    return (out / name / "pytorch_lora_weights.safetensors").is_file()


def load_data(args):
    """The data set, with the images to tune on as its training set; and the defaults that follow from other flags."""
    if args.shots is None and args.hard is None:
        raise cli.UserError("--shots or --hard: expected one of them, the few images of each class to tune on")
    args.alpha = args.rank if args.alpha is None else args.alpha
    args.generator = args.generator or datasets.DEFAULTS[args.dataset].get("generate_spectrum", {}).get("generator")
    if not args.generator:
        raise cli.UserError("--generator: expected a Stable Diffusion pipeline, by hub name or local folder")
    args.template = args.template or datasets.TEMPLATES[args.dataset][0]
    return choose_images(args, datasets.load_shots(args))


def finished(args) -> bool:
    """Whether every adapter is tuned, by whichever shard."""
    return (args.out / "plan.json").is_file() and all(
        is_tuned(args.out, unit.name) for unit in find_units(args, load_data(args))
    )


def most_shards(args) -> int:
    """How many shards have something to tune: one for each group of adapters."""
    from training.tuner import group_units

    return len(group_units(find_units(args, load_data(args)), args.together))


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    # Check everything that needs no model.
    data = load_data(args)
    check_flags(args, data)

    import models  # takes seconds
    from runtime.device import pick_device
    from training import tuner

    device = pick_device(args.device)
    check_generator(args)
    units = find_units(args, data)
    groups = tuner.group_units(units, args.together)
    mine = groups[args.shard.index :: args.shard.count]
    todo = [group for group in mine if not all(is_tuned(args.out, unit.name) for unit in group)]
    count = sum(map(len, mine))
    left = sum(not is_tuned(args.out, unit.name) for group in todo for unit in group)
    print(
        f"{args.out}: {counted(count, 'adapter')} of {counted(len(data.train), 'image')}, "
        f"{count - left} done, {left} to tune",
        flush=True,
    )
    if args.dry_run:
        print_forecast(args, todo)
        return 0

    # Stop where the folder has another plan, or images cannot be used.
    dtype = models.generator_dtype(args.dtype, device)
    dtype = "float32" if dtype == "float16" else dtype  # a card without bfloat16: float16 would need scaled losses
    plan = make_plan(args, data, dtype)
    runs.stop_on_other(args.out / "plan.json", plan, "delete that folder")
    if todo:
        held = np.unique(np.concatenate([unit.val for group in todo for unit in group]))
        stop_on_unreadable({"train": data.train, "val": data.val.take(held)})
    folder = args.out / f"shard-{args.shard.index:05d}"
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        stack.enter_context(runs.claim(folder))
        write_inputs(args, data)
        if not todo:
            return 0

        # Write the plan once the generator is loaded: one that fails leaves none that another would be refused by.
        pipe = models.load_generator(args.generator, device, args.revision, dtype)
        work = tuner.Tuner(args, pipe, data, plan, folder, stop)
        texts.check_length(pipe, sorted({text for unit in units for text in unit.prompts}), args.generator, "cut")
        # Another shard's plan has perhaps been written since.
        runs.stop_on_other(args.out / "plan.json", plan, "delete that folder")
        files.write_json(args.out / "plan.json", plan)

        # Tune group after group.
        began = time.monotonic()
        total = sum(tuner.batch_and_steps(args, len(unit.places))[1] for group in todo for unit in group)
        with cli.progress(total, "tuning", "step") as bar:
            for group in todo:
                work.tune(group, bar)
        if stop.received:
            print(
                f"{args.out}: {stop.received} after {counted(work.saved, 'adapter')}; run the same command again to "
                "resume"
            )
            return runs.RESUMABLE
        speed = {"steps_per_second": work.steps / (time.monotonic() - began), "environment": runs.environment()}
        files.write_json(folder / "speed.json", speed)
    print(f"{args.out}: {counted(work.saved, 'adapter')} tuned")
    for name, why in work.failed.items():
        print(f"{name}: not tuned: {why}; expected a lower --lr")
    return 1 if work.failed else 0


if __name__ == "__main__":
    cli.run(main)
