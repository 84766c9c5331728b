"""Step 3: draw the synthetic-to-real spectrum of each hard image by image-guided diffusion.

Guidance level 100 is the real image and 0 text only: an image of level L is the source, noised to the start step of
strength 1 - L/100 and denoised under a prompt of its class (SDEdit; DisCL).

Reads:  hard.csv, prompts.json, the images that hard.csv names
Writes: OUT/plan.json, OUT/shard-00000/*.png and its metadata.jsonl (a row an image; see spectrum/folder.py)

The noise of an image depends on its source, level and seed alone. After a kill the same command resumes; SIGTERM and
SIGUSR2 end it after the current denoising step, with exit code 75. A folder made with other settings is refused.
Images that cannot be drawn are listed in the shard's failures.jsonl and make the exit code 1.

Several processes share the work by --shard 0/4 to --shard 3/4. No image is drawn twice: a spectrum begun with four
shards may be finished with sixteen. --also-draw adds further images to the plan, permanently: a CSV file with the
columns source,level,seed,prompt; an empty prompt means one of the class's.

With --score, the CLIPScore of each image is computed while it is in memory; filter_clipscore.py then reads no image
again. An image below the threshold is drawn again, with another prompt of its class and other noise, up to
--max-redraws times, and the best is kept (DisCL).

A column mask in hard.csv names a file beside it for each source: white is kept, to the pixel, and the rest is drawn
anew by inpainting (editors draw everything, and the kept part is put back).

Images are drawn at the size of their source, or at --size, each side rounded to a multiple that the generator's
autoencoder needs (8 for all published ones: 480x270 becomes 480x272), and saved as drawn, or at --save-size. For small
images use --size 512x512 --save-size source: generators are poor at small sizes.

    python generate_spectrum.py --hard runs/hard.csv --prompts runs/prompts.json --out runs/spectrum
"""

from __future__ import annotations

import argparse
import math
from contextlib import ExitStack
from pathlib import Path

import datasets
from generation import loras, texts
from generation.guidance import image_guidance_by_level
from generation.job import Job
from generation.known import GENERATORS, UNKNOWN_GENERATOR
from generation.masks import Paster, check_masks
from generation.plan import DrawPlan, check_levels, count_seeds, make_settings, order_planned
from generation.prefetch import Prefetcher
from generation.writer import SAVE_OPTIONS
from loaders.base import DataSet
from loaders.sources import Sources
from runtime import cli, files, runs, signals
from runtime.text import counted, parse_whole
from spectrum import folder as spectrum_folder
from spectrum.tables import Hard, read_hard, read_prompts, stop_on_other_names

HARD, PROMPTS = Path("runs/hard.csv"), Path("runs/prompts.json")  # where neither the flags nor --tuned name them
MOST_SIDE = 16384
MOST_AREA = 2  # sources of more pixels than so many times a generator's native area are drawn at that area


def size(text: str) -> str | tuple[int, int]:
    """The argparse type of a size in pixels: WIDTHxHEIGHT, source or native."""
    if text in ("source", "native"):
        return text
    width, height = (parse_whole(side) for side in text.partition("x")[::2])
    if not width or not height or max(width, height) > MOST_SIDE:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r}: expected WIDTHxHEIGHT in pixels, up to {MOST_SIDE} each, source or native"
        )
    return width, height


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "generate_spectrum")
    datasets.add_flags(parser)
    parser.add_argument("--hard", type=cli.existing_file, default=HARD, metavar="FILE", help="table of find_hard.py")
    parser.add_argument(
        "--prompts",
        type=cli.existing_file,
        default=PROMPTS,
        metavar="FILE",
        help="file of write_prompts.py",
    )
    parser.add_argument(
        "--out", type=cli.new_folder, default=Path("runs/spectrum"), metavar="FOLDER", help="the spectrum folder"
    )
    add_generator_flags(parser.add_argument_group("generator"))
    add_level_flags(parser.add_argument_group("what to draw"))
    add_prompt_flags(parser.add_argument_group("prompts"))
    add_image_flags(parser.add_argument_group("images"))
    add_score_flags(parser.add_argument_group("score while drawing"))
    add_run_flags(parser.add_argument_group("how"))
    add_other_flags(parser.add_argument_group("instead of drawing"))
    parser.accept_old("--plan", "--also-draw")
    parser.accept_old("--check", "--validate")
    return parser


def add_generator_flags(group) -> None:
    group.add_argument("--generator", metavar="NAME", help="image-to-image pipeline: hub name or local folder")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a generator on the hub")
    group.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="number type that the generator runs in; auto is bfloat16 on a GPU and float32 on a CPU",
    )
    group.add_argument(
        "--scheduler",
        choices=["shipped", "ddim", "euler", "dpm++2m"],
        default="shipped",
        help="sampler; shipped is the one that the generator comes with",
    )
    group.add_argument(
        "--lora", type=Path, metavar="PATH", help="LoRA adapter to draw with: .safetensors file, or folder of one"
    )
    group.add_argument(
        "--lora-by-class",
        type=cli.existing_folder,
        metavar="FOLDER",
        help="LoRA adapters of each class: INDEX.safetensors or a folder INDEX for every class of hard.csv",
    )
    group.add_argument(
        "--tuned",
        type=cli.existing_folder,
        metavar="FOLDER",
        help="draw with the adapters of this folder of tune_generator.py, whose shots.csv and prompts.json take the "
        "place of the defaults of --hard and --prompts",
    )
    group.add_argument(
        "--lora-mix",
        type=int,
        choices=[1, 2],
        default=2,
        help="for adapters of tune_generator.py --mode source: 1 draws with a source's own, 2 with the mean of it and "
        "another one of its class",
    )


def add_level_flags(group) -> None:
    group.add_argument(
        "--per-class",
        type=cli.whole(1),
        metavar="N",
        help="draw N images of each class from text alone, shared out among its sources, which only name them; with "
        "--levels 0 and --pure-noise, instead of --seeds",
    )
    group.add_argument(
        "--levels",
        type=cli.level,
        nargs="+",
        metavar="PERCENT",
        help="guidance levels, 0 (text only) to 99 (nearly the source)",
    )
    group.add_argument("--seeds", type=cli.whole(1), metavar="N", help="images of each source and level")
    group.add_argument(
        "--steps",
        type=cli.whole(1),
        metavar="N",
        help="denoising steps at level 0; level L runs the last N * (100 - L) / 100 of them, at least 1",
    )
    group.add_argument(
        "--levels-by",
        choices=["steps", "noise"],
        default="steps",
        help="where level L begins: at the nearest of --steps, or at the very noise of L percent, in as many steps as "
        "keep --steps' length; for models of a few steps, where levels would coincide",
    )
    group.add_argument(
        "--image-guidance",
        type=cli.number(0),
        nargs="+",
        metavar="SCALE",
        help="for InstructPix2Pix, which has no strength: guidance by the image, one scale for each of --levels in the "
        "order typed; higher stays closer to the source",
    )
    group.add_argument("--text-guidance", type=cli.number(0), metavar="SCALE", help="classifier-free guidance scale")
    group.add_argument(
        "--pure-noise",
        action="store_true",
        help="start level 0 from noise alone; else from the source at strength 1, as the paper does, which leaves a "
        "trace of the source's brightness",
    )
    group.add_argument(
        "--also-draw",
        type=cli.existing_file,
        metavar="FILE",
        help="further images, taken into the plan: a CSV file with the columns source,level,seed,prompt",
    )


def add_prompt_flags(group) -> None:
    group.add_argument(
        "--each-prompt",
        action="store_true",
        help="draw every prompt of the class --seeds times, instead of choosing one for each image",
    )
    group.add_argument(
        "--skip-own-domain",
        type=cli.existing_file,
        metavar="FILE",
        help="for --each-prompt: leave out edits toward the domain that a source has already, by sources.csv of "
        "describe_domains.py",
    )
    group.add_argument(
        "--on-long-prompt",
        choices=["cut", "error"],
        default="cut",
        help="prompts with more tokens than the generator reads: cut them (the generator's own way), or stop",
    )


def add_image_flags(group) -> None:
    group.add_argument(
        "--size",
        type=size,
        default="source",
        metavar="WxH",
        help="pixels to draw at: source (the source's size; larger photographs than a known generator can draw well as "
        "native), native (its shape, the area that the generator was made for) or WIDTHxHEIGHT; sides are rounded to "
        "what the generator divides by",
    )
    group.add_argument(
        "--save-size",
        type=size,
        metavar="WxH",
        help="pixels to save at: source (the source's size) or WIDTHxHEIGHT; without it, as drawn",
    )
    group.add_argument(
        "--format", choices=list(SAVE_OPTIONS), default="png", help="of the files; jpg and webp at quality 95"
    )


def add_score_flags(group) -> None:
    group.add_argument(
        "--score",
        action="store_true",
        help="compute the CLIPScore of each image, and redraw images below the threshold; the best of each is kept",
    )
    group.add_argument(
        "--clip",
        metavar="NAME",
        help="for --score: open_clip model, ARCHITECTURE:TAG, ARCHITECTURE:FILE, hf-hub:NAME or folder",
    )
    group.add_argument(
        "--threshold",
        type=cli.number(-1, 1),
        metavar="COSINE",
        help="for --score: redraw images with lower text scores",
    )
    group.add_argument(
        "--max-redraws",
        type=cli.whole(0),
        default=5,
        metavar="N",
        help="for --score: how often an image is drawn again, each time with another prompt of its class",
    )


def add_run_flags(group) -> None:
    group.add_argument(
        "--batch-size",
        type=cli.whole(1),
        default=32,
        metavar="N",
        help="images drawn at once; the images stay the same, up to rounding",
    )
    group.add_argument(
        "--shard",
        type=cli.shard,
        default=cli.Shard(0, 1),
        metavar="I/N",
        help="which share of the work to do, from 0/N up",
    )
    group.add_argument(
        "--cache-mb",
        type=cli.whole(0),
        default=4096,
        metavar="MB",
        help="memory for encoded sources and prompts, which are encoded again where it does not suffice",
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the denoiser; minutes at first, faster on a GPU after that"
    )
    cli.add_device_flag(group)


def add_other_flags(group) -> None:
    group.add_argument(
        "--dry-run", action="store_true", help="print how much there is to draw, in images, steps, hours and bytes"
    )
    group.add_argument(
        "--steps-per-second",
        type=cli.number(1e-6),
        metavar="RATE",
        help="for --dry-run: denoising steps a second, as the progress bar shows; without it, that of the last run",
    )
    group.add_argument("--validate", action="store_true", help="check every row and image of --out, and nothing else")


def check_flags(args, parser) -> None:
    """Raise UserError where a flag was typed that another one leaves without effect."""
    if args.per_class and parser.typed("--levels") and args.levels != [0]:
        raise cli.UserError("--per-class: draws N images of a class at level 0; expected no other --levels")
    if args.per_class and parser.typed("--seeds"):
        raise cli.UserError("--per-class: draws N images of a class; expected no --seeds beside it")
    for flag in ("--clip", "--threshold", "--max-redraws"):
        if parser.typed(flag) and not args.score:
            raise cli.UserError(f"{flag}: expected with --score only")


def complete_flags(args) -> None:
    """Defaults that follow from other flags: the inputs of --tuned, and what --per-class draws."""
    for name, default, file in (("hard", HARD, "shots.csv"), ("prompts", PROMPTS, "prompts.json")):
        if args.tuned and getattr(args, name) is default:  # and not equal to it: the same path may be typed
            setattr(args, name, args.tuned / file)
    if args.per_class:
        args.levels, args.pure_noise = [0], True


def build_scorer(args, prompts: dict[int, dict], hard: dict[str, Hard]):
    """The CLIP that --score names, and the texts of the hard classes."""
    import models
    from runtime.device import pick_device
    from spectrum import embeddings

    device = pick_device(args.device)
    clip = embeddings.Clip(models.load_clip(args.clip, device), device, args.batch_size, workers=0)
    labels = sorted({row.label for row in hard.values()})
    return embeddings.Scorer(clip, {label: prompts[label]["score_prompt"] for label in labels})


def read_inputs(args) -> tuple[dict[str, Hard], dict[int, dict]]:
    """Hard images by source, and prompts by class index."""
    if 100 in args.levels:
        raise cli.UserError("--levels 100: that is the real image; expected levels from 0 to 99")
    if args.save_size == "native":
        raise cli.UserError("--save-size native: expected source or WIDTHxHEIGHT")
    hard = {row.source: row for row in read_hard(args.hard)}
    names = {row.label: row.class_name for row in hard.values()}
    prompts = read_prompts(args.prompts, names)
    stop_on_other_names(args.prompts, prompts, names, args.hard)
    return hard, prompts


def stop_on_other_classes(args, hard: dict[str, Hard], data: DataSet) -> None:
    """Raise UserError where hard.csv gives a training image another class than the data set: training refuses that."""
    for source, label in zip(data.train.sources, data.train.labels.tolist(), strict=True):
        row = hard.get(source)
        if row and (row.label, row.class_name) != (label, data.class_names[label]):
            raise cli.UserError(
                f"{args.hard}: {source} is of class {row.label} ({row.class_name}) there, of {label} "
                f"({data.class_names[label]}) in --dataset {args.dataset}; expected a table of the same data: run "
                "find_hard.py again"
            )


def check_generator(args):
    """What is known of the generator; raises UserError where it cannot be what the flags ask for."""
    import models

    models.check_generator(args.generator)
    known = GENERATORS.get(args.generator, UNKNOWN_GENERATOR)
    if args.size == "native" and known is UNKNOWN_GENERATOR:
        raise cli.UserError(f"--size native: not known for {args.generator}; expected source or WIDTHxHEIGHT")
    if not known.text_guidance[0] <= args.text_guidance <= known.text_guidance[1]:
        print(f"--text-guidance {args.text_guidance:g}: unusual for {args.generator}: {known.note}")
    if args.steps > 4 * known.steps:
        print(f"--steps {args.steps}: unusual for {args.generator}, which is used with {known.steps}")
    return known


def keep_branch(args, settings: dict) -> None:
    """Note the branch in place of the commit where a folder was begun by a version that noted branches."""
    path = args.out / "plan.json"
    if path.exists() and files.read_object(path).get("revision") == (args.revision or "main"):
        settings["revision"] = args.revision or "main"


def stop_on_other_settings(folder: Path, settings: dict) -> None:
    """Raise UserError where a spectrum folder was begun with other settings."""
    if (folder / "plan.json").exists():
        runs.stop_on_difference(folder / "plan.json", spectrum_folder.read_plan(folder), settings, "delete that folder")


def draw(plan: DrawPlan, folder: Path, sources: Sources, weights: dict[str, Path], todo, done, stop) -> int:
    """Load the models, draw the missing images, and return the exit code."""
    import models
    from runtime.device import pick_device

    args = plan.args
    scorer = build_scorer(args, plan.prompts, plan.hard) if args.score and todo else None
    preprocess = scorer.clip.preprocess if scorer else None
    retouch = Paster(plan.masks, sources) if plan.masks else None
    job = Job(plan, folder, Prefetcher(sources, plan.unreadable, preprocess, plan.sizes), scorer, retouch)
    if todo:
        device = pick_device(args.device)
        revision = args.revision if Path(args.generator).is_dir() else plan.settings["revision"]
        pipe = models.load_generator(args.generator, device, revision, args.dtype, args.scheduler, bool(plan.masks))
        adapters = loras.Adapters(pipe, weights) if weights else None
        if "all" in weights:
            adapters.switch("all")
        # Nothing is written before it is known that the generator can draw what is asked for.
        texts.check_length(pipe, plan.texts(), args.generator, args.on_long_prompt)
        job.take_generator(pipe, stop, adapters)
        stop_on_other_settings(args.out, plan.settings)  # another shard's, perhaps written since
        files.write_json(args.out / "plan.json", plan.settings)
        job.draw(todo, done, stop)
    if stop.received:
        print(f"{args.out}: {stop.received} after {counted(job.saved, 'image')}; run the same command again to resume")
        return runs.RESUMABLE
    return job.report()


def finished(args) -> bool:
    """Whether every image of the plan is drawn, by whichever shard; images of --also-draw are not looked for.

    Nor is it looked whether one is damaged, which takes hours for a million: --validate does.
    """
    if args.also_draw or not (args.out / "plan.json").is_file():
        return False
    import models

    complete_flags(args)
    hard = {row.source: row for row in read_hard(args.hard)}
    settings, generator = spectrum_folder.read_plan(args.out), models.describe_generator(args.generator, args.revision)
    prompts = read_prompts(args.prompts, [row.label for row in hard.values()])
    adapters, editor = loras.find_asked(args, hard, generator), models.editor_kind(args.generator, args.revision)
    if settings != make_settings(args, hard, prompts, generator, settings.get("dtype", ""), adapters, editor):
        return False  # the script itself says what differs
    units = set(order_planned(args, settings, hard, prompts))
    return len(spectrum_folder.drawn_units(args.out, units)) == len(units)


def most_shards(args) -> int:
    """How many shards have something to draw: one for each batch, where all sources have one size."""
    complete_flags(args)
    hard = {row.source: row for row in read_hard(args.hard)}
    prompts = read_prompts(args.prompts, [row.label for row in hard.values()]) if args.each_prompt else {}
    units = sum(count_seeds(args, hard, prompts).values())
    return len(set(args.levels)) * -(-units // args.batch_size)


def validate(folder: Path) -> int:
    """Print the errors in a spectrum folder, and return the exit code."""
    count, errors = spectrum_folder.check(folder)
    for line in errors:
        print(line)
    settings = spectrum_folder.read_plan(folder)
    planned = settings["sources"] * len(settings["levels"]) * settings["seeds"]
    if settings.get("per_class"):
        planned = settings["per_class"] * len(settings["hard_classes"])
    planned = settings.get("units", planned)
    print(
        f"{folder}: {counted(count, 'image')} with a row, {planned} in plan.json, {counted(len(errors), 'thing')} wrong"
    )
    return 1 if errors else 0


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.validate:
        return validate(args.out)
    check_flags(args, parser)
    complete_flags(args)
    hard, prompts = read_inputs(args)

    import models  # takes seconds
    from runtime.device import pick_device

    # Gather everything that determines the images, and stop where the folder was begun with other settings.
    known = check_generator(args)
    dtype = models.generator_dtype(args.dtype, pick_device(args.device))
    generator = models.describe_generator(args.generator, args.revision)
    adapters = loras.find_asked(args, hard, generator)
    if parser.typed("--lora-mix") and not any(name.startswith("source_") for name in adapters):
        raise cli.UserError("--lora-mix: mixes adapters of single images; expected --tuned with those of --mode source")
    editor = models.editor_kind(args.generator, args.revision)
    image_guidance_by_level(editor, args.levels, args.image_guidance)
    check_levels(args, editor, hard)
    settings = make_settings(args, hard, prompts, generator, dtype, adapters, editor)
    keep_branch(args, settings)
    stop_on_other_settings(args.out, settings)

    with ExitStack() as stack:
        # Hold this shard, and take further units into the plan.
        stop = stack.enter_context(signals.StopSignals())
        if not args.dry_run:
            folder = stack.enter_context(spectrum_folder.claim(args.out, *args.shard, args.batch_size))
            if args.also_draw:
                spectrum_folder.add_extra(args.out, args.also_draw, hard)
        extra = sorted(args.out.glob("extra-*.csv"))
        if args.dry_run and args.also_draw:
            extra.append(args.also_draw)
        plan = DrawPlan(args, settings, hard, prompts, adapters, extra)

        # Read the sources' sizes, lay out the batches, and find the ones that are not drawn yet.
        data = datasets.load(args.dataset, args.imb_ratio, args.data_root, args.data_seed)
        stop_on_other_classes(args, hard, data)
        sources = Sources(data.train, args.data_root)
        most = MOST_AREA * known.native**2 if args.generator in GENERATORS else math.inf
        plan.read_sizes(sources, known.native, models.latent_multiple(args.generator, args.revision), most)
        todo, done = plan.find_todo()
        plan.stop_on_changed_sources(sources, todo)
        check_masks(plan.masks, sources)
        plan.warn_of_sizes(todo)
        if args.dry_run:
            plan.print_forecast(todo)
            return 0

        return draw(plan, folder, sources, adapters, todo, done, stop)


if __name__ == "__main__":
    cli.run(main)
