"""Step 4: the CLIPScore of every synthetic image, and which images are kept.

The text score is the cosine of the image's and its class prompt's CLIP embeddings, the image score that of the image's
and its source's. An image is kept if its text score reaches --threshold (DisCL), or, with --keep-share, if it is among
the best.

Reads:  a spectrum folder, prompts.json, the sources
Writes: SPECTRUM/scores.csv (file_name, text_score, image_score, kept, reason), scores.json (what made it),
        acceptance.png (kept share by class and level)
        with --min-per-class-level: short.csv (classes and levels with too few kept images) and, until --max-rounds,
        top_up.csv, the images that generate_spectrum.py --also-draw draws next (source, level, seed, prompt)
        with --distance: distance.csv and distance.png (how far each level is from the real images)

Scores are cached: changing the threshold recomputes no embeddings, and images scored by generate_spectrum.py --score
with the same CLIP are not scored again. Killed at any moment, the same command resumes.

    python filter_clipscore.py --spectrum runs/spectrum --prompts runs/prompts.json
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import datasets
from runtime import cli, files
from runtime.text import counted
from spectrum import acceptance, distances, quotas, tables
from spectrum import folder as spectrum_folder
from spectrum.acceptance import SHOWN, no_score
from spectrum.flags import add_clip_flag, add_device_flags
from spectrum.units import SCORED_FIELDS, Unit

PREVIOUS = "scores.previous.csv"  # the scores of another CLIP
SAVE_SECONDS = 30  # between two saves while images are scored; more where a save, which writes all rows, takes long
SAVE_PAUSE = 20  # times what the save before took, at least: a twentieth of the time at most, however many rows


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "filter_clipscore")
    datasets.add_flags(parser)
    parser.add_argument(
        "--spectrum",
        type=cli.existing_folder,
        default=Path("runs/spectrum"),
        metavar="FOLDER",
        help="folder of generate_spectrum.py",
    )
    parser.add_argument(
        "--prompts",
        type=cli.existing_file,
        default=Path("runs/prompts.json"),
        metavar="FILE",
        help="file of write_prompts.py",
    )
    add_rule_flags(parser.add_argument_group("what is kept"))
    group = parser.add_argument_group("how")
    add_clip_flag(group)
    add_device_flags(group)
    return parser


def add_rule_flags(group) -> None:
    rule = group.add_mutually_exclusive_group()
    rule.add_argument("--threshold", type=cli.number(-1, 1), metavar="COSINE", help="keep text scores from here up")
    rule.add_argument(
        "--keep-share",
        type=cli.number(0, 1),
        metavar="SHARE",
        help="instead of --threshold: keep this share of the images, by the best text scores",
    )
    group.add_argument(
        "--share-of",
        choices=["class-level", "level", "all"],
        default="class-level",
        help="what --keep-share is a share of: each class at each level, each level, or the whole spectrum",
    )
    group.add_argument(
        "--min-per-class-level",
        type=cli.whole(1),
        metavar="N",
        help="list each class and level with fewer kept images, and write a plan to draw more of them",
    )
    group.add_argument(
        "--max-rounds",
        type=cli.whole(0),
        default=3,
        metavar="N",
        help="rounds of further images for --min-per-class-level, at most",
    )
    group.add_argument(
        "--distance", action="store_true", help="measure how far each level is from the real images of its classes"
    )


# ---------------------------------------------------------------------------------------------------------------------
# scores


def score_images(rows: list[dict], prompts: dict[int, dict], train, clip, args, scores: dict[str, dict], save) -> None:
    """Score `rows` into `scores`, calling `save` now and then. Each text and each source is embedded once.

    Raises:
        UserError: a source that cannot be read, or a text or source that the CLIP gives no finite embedding.
    """
    from spectrum.embeddings import read_files, read_training_images

    # Embed the texts and the sources.
    labels = sorted({row["label"] for row in rows})
    texts = clip.texts([prompts[label]["score_prompt"] for label in labels])
    names = list(dict.fromkeys(row["source"] for row in rows))
    sources, wrong = clip.all_images(names, read_training_images(train, args.data_root), "embedding sources")
    if wrong:
        raise cli.UserError(wrong[min(wrong)])
    for what, vectors in (("a text", texts), ("a source", sources)):
        if not vectors.isfinite().all():
            raise cli.UserError(
                f"--clip {args.clip}: gives {what} an embedding that is not finite; expected another checkpoint"
            )
    text_of = {label: i for i, label in enumerate(labels)}
    source_of = {name: i for i, name in enumerate(names)}

    # Score the images in the order in which they come.
    drawn = [row["file_name"] for row in rows]
    saved, pause = time.monotonic(), SAVE_SECONDS
    with cli.progress(len(rows), "scoring", "image") as bar:
        for places, vectors, wrong in clip.images(drawn, read_files(args.spectrum)):
            for place in wrong:  # its row says so, and the step ends in an error, after all others are scored
                scores[drawn[place]] = no_score("unreadable")
            if places:
                text = (vectors * texts[[text_of[rows[place]["label"]] for place in places]]).sum(1).tolist()
                image = (vectors * sources[[source_of[rows[place]["source"]] for place in places]]).sum(1).tolist()
                for place, *pair in zip(places, text, image, strict=True):
                    finite = all(map(math.isfinite, pair))
                    scores[drawn[place]] = (
                        {"text_score": round(pair[0], 6), "image_score": round(pair[1], 6)}
                        if finite
                        else no_score("score not finite")
                    )
            bar.update(len(places) + len(wrong))
            if time.monotonic() - saved > pause:
                began = time.monotonic()
                save()
                saved = time.monotonic()
                pause = max(SAVE_SECONDS, SAVE_PAUSE * (saved - began))


def read_scored(path: Path, note: dict, made_by: dict, rows: list[dict]) -> dict[str, dict]:
    """The scores of scores.csv that are still valid: by the same CLIP against the same text.

    Images without a score are scored again, and all where another CLIP made the table.
    """
    if not path.exists():
        return {}
    scores = tables.read_scores(path)
    if different := other_clip(note, made_by):
        name = different[0]
        print(
            f"{path}: made with {name} {note.get(name)!r}, not {made_by[name]!r}; all images are scored anew, "
            f"and it becomes {path.with_name(PREVIOUS)}"
        )
        return {}
    before, now = note.get("score_prompts", {}), made_by["score_prompts"]
    same = {int(label) for label in now if before.get(label) == now[label]}
    valid = {}
    for row in rows:
        entry = scores.get(row["file_name"])
        if entry and row["label"] in same and not math.isnan(entry["text_score"]):
            valid[row["file_name"]] = entry
    return valid


def other_clip(note: dict, made_by: dict) -> list[str]:
    """Which of a CLIP's name and digest differ between the note of a scores.csv and now."""
    return [name for name in ("clip", "clip_digest") if note.get(name) != made_by[name]]


def read_note(path: Path) -> dict:
    """scores.json: what made scores.csv, the groups of the classes, and the rounds of top-up; empty where none is.

    Raises:
        UserError: not as this script writes it.
    """
    note = files.read_object(path) if path.exists() else {}
    for name, kind in (("score_prompts", dict), ("groups", dict), ("rounds", int)):
        if not isinstance(note.get(name, kind()), kind):
            raise cli.UserError(
                f"{path}: {name} is {note[name]!r:.40}; expected it as this script writes it, or no file"
            )
    return note


def same_scorer(plan: dict, made_by: dict, prompts: Path) -> bool:
    """Whether generate_spectrum.py --score used the same CLIP and texts as this command."""
    score = plan.get("score") or {}
    same_clip = all(score.get(name) == made_by[name] for name in ("clip", "clip_digest"))
    return same_clip and plan.get("prompts_digest") == files.digest_files([prompts])


def gather_scores(rows: list[dict], settings: dict, note: dict, made_by: dict, args) -> tuple[dict[str, dict], int]:
    """The scores that exist already, and how many of them were computed when the images were drawn.

    An image whose file is missing has an entry that says so.
    """
    # Take over scores.csv, and the scores that generate_spectrum.py --score took.
    scores = read_scored(args.spectrum / "scores.csv", note, made_by, rows)
    before = len(scores)
    if same_scorer(settings, made_by, args.prompts):
        for row in rows:
            if row["file_name"] not in scores and "text_score" in row:
                pair = {name: row[name] for name in SCORED_FIELDS}
                scores[row["file_name"]] = pair | {"kept": False, "reason": ""}
    drawn = len(scores) - before
    # Mark the images that are gone. One listing a folder: asking for each file takes minutes on a network disk.
    there = spectrum_folder.image_names(args.spectrum)
    for row in rows:
        if row["file_name"] not in there:
            scores[row["file_name"]] = no_score("missing")
    return scores, drawn


# ---------------------------------------------------------------------------------------------------------------------
# quotas


def plan_top_up(rows, prompts, settings, names, made, kept, note: dict, args) -> None:
    """List what falls short of --min-per-class-level and write the next plan; counts the rounds in `note`."""
    # Count the rounds: a round is over once the generator has drawn from its plan.
    path, list_path = args.spectrum / "top_up.csv", args.spectrum / "short.csv"
    if path.exists():
        there = {Unit(row["source"], row["level"], row["seed"]) for row in rows}
        note["rounds"] += any(unit in there for unit, _ in tables.read_top_up(path))
    # List the classes and levels that fall short.
    short = quotas.find_short(settings, names, made, kept, args.min_per_class_level)
    tables.write_short(list_path, short)
    if not short:
        path.unlink(missing_ok=True)
        print(f"every class has {args.min_per_class_level} kept images or more at every level")
        return
    print(
        f"{list_path}: {len(short)} of {len(settings['hard_classes']) * len(settings['levels'])} classes and levels "
        f"have fewer than {args.min_per_class_level} kept images:"
    )
    for gap in short[:SHOWN]:
        print(f"  {gap['class_name']} ({gap['label']}), level {gap['level']}: {gap['kept']} of {gap['made']} kept")
    if len(short) > SHOWN:
        print(f"  and {len(short) - SHOWN} more")
    # Plan further images, until the last round.
    planned = quotas.plan_top_up(rows, prompts, short, settings.get("seeds", 0))
    if note["rounds"] >= args.max_rounds or not planned:
        path.unlink(missing_ok=True)
        print(
            f"given up after {note['rounds']} rounds (--max-rounds {args.max_rounds}): training uses the images that "
            "these classes have"
        )
        return
    tables.write_top_up(path, planned)
    print(
        f"{path}: {counted(len(planned), 'image')} to draw in round {note['rounds'] + 1} of {args.max_rounds}; run "
        f"generate_spectrum.py with the flags of before and --also-draw {path}, then this command again"
    )


# ---------------------------------------------------------------------------------------------------------------------
# distance


def report_distances(table: list[dict], folder: Path) -> None:
    """Print the distances, and write distance.csv and distance.png."""
    from reporting.figures import COLOURS, new_figure, save_figure

    # Print and write the table.
    if not table:
        raise cli.UserError(f"--distance: {folder} has no level with two readable images")
    tables.write_distances(folder / "distance.csv", table)
    print("distance to the real images of the same classes, in the CLIP's feature space")
    print("level  images   count     MMD^2  Frechet  its floor")
    for row in table:
        print(
            f"{row['level']:>5}  {row['images']:<6} {row['count']:>7} {row['mmd']:>9.5f} {row['frechet']:>8.4f} "
            f"{row['frechet_floor']:>10.4f}"
        )
    print(
        "MMD^2 is unbiased. The Frechet distance is not: its floor is the mean distance of equally large samples from "
        f"a Gaussian fitted to the {table[0]['real_count']} real images; compare rows of like count, or the height "
        "above the floor"
    )
    # Draw a line for all images made and one for those kept, each beside its floor.
    figure, axes = new_figure(1, 2, figsize=(9, 3.5))
    for name, title, axis in zip(("mmd", "frechet"), ("MMD², Gaussian kernel", "Fréchet distance"), axes, strict=True):
        for colour, what in zip(COLOURS, ("made", "kept"), strict=False):
            line = [row for row in table if row["images"] == what]
            axis.plot([row["level"] for row in line], [row[name] for row in line], "o-", color=colour, label=what)
            if name == "frechet":
                floor = [row["frechet_floor"] for row in line]
                axis.plot([row["level"] for row in line], floor, ":", color=colour, label=f"floor for {what}")
        axis.set(xlabel="guidance level (%)", title=title, ylim=(min(0, axis.get_ylim()[0]), None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle("distance of synthetic to real images", fontsize=10)
    save_figure(figure, folder / "distance.png")


# ---------------------------------------------------------------------------------------------------------------------


def load_clip(args):
    """The CLIP, ready to embed."""
    import models  # takes seconds
    from runtime.device import pick_device
    from spectrum import embeddings

    device = pick_device(args.device)
    return embeddings.Clip(models.load_clip(args.clip, device), device, args.batch_size, args.workers)


def report_kept(
    rows: list[dict], names: dict[int, str], groups: dict[int, str], made, kept, new: int, drawn: int, args
):
    """Print how many images are kept, beside the paper's share, and draw acceptance.png."""
    from reporting.figures import draw_acceptance

    table = acceptance.tabulate(made, kept, names, groups)
    print(acceptance.format_table(*table))
    draw_acceptance(*table, args.spectrum / "acceptance.png")
    by = f"at CLIPScore {args.threshold:g} and up"
    if args.keep_share is not None:
        by = f"as the best {args.keep_share:.1%} of each {args.share_of}".replace("each all", "all")
    total = sum(kept.values())
    print(
        f"{args.spectrum / 'scores.csv'}: {total} of {len(rows)} images kept ({total / len(rows):.1%}) {by}, "
        f"{new} newly scored{f', {drawn} scored when they were drawn' if drawn else ''}"
    )
    published = datasets.TABLE[args.dataset].acceptance.get(args.imb_ratio)
    if line := acceptance.paper_line(published, len(rows), total):
        print(line)


def report_missing(rows: list[dict], scores: dict[str, dict], args) -> int:
    """Name images without a score, and give the exit code."""
    without = [row["file_name"] for row in rows if math.isnan(scores[row["file_name"]]["text_score"])]
    for name in without[:SHOWN]:
        print(f"{args.spectrum}: {name}: {scores[name]['reason']}")
    if without:
        print(
            f"{len(without)} images have no score ({args.spectrum / 'scores.csv'} lists them all); run "
            "generate_spectrum.py again"
        )
    return 1 if without else 0


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if parser.typed("--share-of") and args.keep_share is None:
        raise cli.UserError("--share-of: expected with --keep-share only")
    # Read the spectrum, and the scores that there are already.
    settings, rows = spectrum_folder.read_spectrum(args)
    prompts = tables.read_prompts(args.prompts, {row["label"] for row in rows})
    names = {row["label"]: row["class_name"] for row in rows}
    tables.stop_on_other_names(args.prompts, prompts, names, args.spectrum)
    files.remove_unfinished(args.spectrum, "scores.")
    made_by = spectrum_folder.describe_clip(args.clip)
    made_by["score_prompts"] = {str(label): prompts[label]["score_prompt"] for label in sorted(names)}
    note_path = args.spectrum / "scores.json"
    note = read_note(note_path)
    scores, drawn = gather_scores(rows, settings, note, made_by, args)
    new = [row for row in rows if row["file_name"] not in scores]

    # Load the data set if it is needed, and note the settings behind scores.csv.
    train = clip = None
    if new or args.distance or "groups" not in note:
        data = datasets.load(args.dataset, args.imb_ratio, args.data_root, args.data_seed)
        train, groups = data.train, data.groups
        note["groups"] = {str(label): group for group in groups for label in groups[group].tolist() if label in names}
    rule = {"threshold": args.threshold, "keep_share": args.keep_share}
    if args.keep_share is not None:
        rule |= {"threshold": None, "share_of": args.share_of}
    note = made_by | rule | {"groups": note["groups"], "rounds": note.get("rounds", 0)}
    note["typed"] = {"clip": args.clip, "prompts": str(args.prompts)}  # what the gallery's command repeats

    # Score the new images, and decide which are kept.
    def save() -> None:
        acceptance.decide_kept(rows, scores, args.threshold, args.keep_share, args.share_of)
        # Another CLIP's table is set aside, and only now: a CLIP that cannot be loaded costs no scores.
        path = args.spectrum / "scores.csv"
        if path.exists() and other_clip(read_note(note_path), made_by):
            path.replace(path.with_name(PREVIOUS))
        tables.write_scores(path, (row["file_name"] for row in rows), scores)
        files.write_json(note_path, note)

    if new or args.distance:
        clip = load_clip(args)
    if new:
        score_images(new, prompts, train, clip, args, scores, save)
    save()

    # Report acceptance, plan further images for missed quotas, and measure distances.
    made, kept = acceptance.count_kept(rows, scores)
    groups = {int(label): group for label, group in note["groups"].items()}
    report_kept(rows, names, groups, made, kept, len(new), drawn, args)
    if args.min_per_class_level is not None:
        plan_top_up(rows, prompts, settings, names, made, kept, note, args)
        files.write_json(note_path, note)
    if args.distance:
        report_distances(
            distances.measure_levels(rows, scores, train, args.data_root, clip, args.spectrum), args.spectrum
        )
    return report_missing(rows, scores, args)


if __name__ == "__main__":
    cli.run(main)
