"""Step 4: the CLIPScore of every synthetic image, and which images are kept.

The text score is the cosine of the image's and its class prompt's CLIP embeddings, the image score that of the image's
and its source's. An image is kept where the text score reaches --threshold (DisCL), or, with --keep-share, where it is
among the best.

Reads:  a spectrum folder, prompts.json, the sources
Writes: SPECTRUM/scores.csv (file_name, text_score, image_score, kept, reason), scores.json (what made it),
        acceptance.png (kept share by class and level)
        with --min-per-class-level: short.csv (classes and levels with too few kept images) and, until --max-rounds,
        top_up.csv, the images that generate_spectrum.py --plan draws next (source, level, seed, prompt)
        with --distance: distance.csv and distance.png (how far each level is from the real images)

Images scored before by the same CLIP, here or by generate_spectrum.py --score, are not scored again, so that another
threshold takes seconds. Killed at any moment, the same command goes on where it was.

    python filter_clipscore.py --spectrum runs/spectrum --prompts runs/prompts.json
"""

from __future__ import annotations

import itertools
import math
import os
import random
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

import datasets
from runtime import cli, runs
from spectrum import folder as spectrum_folder

# Data set and, where it matters, imbalance ratio -> synthetic images (made, kept) that DisCL reports.
PAPER_ACCEPTANCE = {
    ("imagenet_lt", None): (51917, 24141),
    ("cifar100_lt", 50): (2144, 668),
    ("cifar100_lt", 100): (2592, 809),
    ("inat2018", None): (179824, 75234),
    ("iwildcam", None): (197756, 90093),
}
SAVE_SECONDS = 30
SHOWN = 20  # classes that a table lists one by one
DISTANCE_IMAGES = 5000  # a set of more is drawn from at random: the distances need no more, and MMD is quadratic


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
    group = parser.add_argument_group("what is kept")
    rule = group.add_mutually_exclusive_group()
    rule.add_argument("--threshold", type=cli.number(-1, 1), metavar="COSINE", help="keep text scores from here up")
    rule.add_argument(
        "--keep-share",
        type=cli.number(0, 1),
        metavar="SHARE",
        help="instead of --threshold: keep this share of the images, those with the best text scores",
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
        help="plans drawn for --min-per-class-level before it is given up",
    )
    group.add_argument(
        "--distance", action="store_true", help="measure how far each level is from the real images of its classes"
    )
    group = parser.add_argument_group("how")
    group.add_argument(
        "--clip", metavar="NAME", help="open_clip model: ARCHITECTURE:TAG, ARCHITECTURE:FILE, hf-hub:NAME or folder"
    )
    group.add_argument("--batch-size", type=cli.whole(1), default=256, metavar="N", help="images embedded at once")
    group.add_argument(
        "--workers",
        type=cli.whole(0),
        metavar="N",
        help="processes that decode images (default: a core each beside a GPU, 16 at most; none on a CPU)",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# scoring


def score(rows: list[dict], prompts: dict[int, dict], train, clip, args, scores: dict[str, dict], save) -> None:
    """Score `rows` into `scores`, calling `save` every half minute. Each text and each source is embedded once.

    Raises:
        UserError: a source that cannot be read, or a text or source that the CLIP gives no finite embedding.
    """
    from spectrum.embeddings import read_files, read_training_images

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

    files = [row["file_name"] for row in rows]
    saved = time.monotonic()
    with cli.progress(len(rows), "scoring", "image") as bar:
        for places, vectors, wrong in clip.images(files, read_files(args.spectrum)):
            for place in wrong:  # its row says so, and the step ends in an error, after all others are scored
                scores[files[place]] = no_score("unreadable")
            if places:
                text = (vectors * texts[[text_of[rows[place]["label"]] for place in places]]).sum(1).tolist()
                image = (vectors * sources[[source_of[rows[place]["source"]] for place in places]]).sum(1).tolist()
                for place, *pair in zip(places, text, image, strict=True):
                    finite = all(map(math.isfinite, pair))
                    scores[files[place]] = (
                        {"text_score": round(pair[0], 6), "image_score": round(pair[1], 6)}
                        if finite
                        else no_score("score not finite")
                    )
            bar.update(len(places) + len(wrong))
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()


def no_score(reason: str) -> dict:
    """The entry of an image that has no score."""
    return {"text_score": math.nan, "image_score": math.nan, "kept": False, "reason": reason}


# ---------------------------------------------------------------------------------------------------------------------
# what is kept


def decide(
    rows: list[dict],
    scores: dict[str, dict],
    threshold: float | None,
    keep_share: float | None = None,
    per: str = "all",
) -> None:
    """Set `kept` and `reason` of every scored row, in place.

    Args:
        threshold: keep text scores from here up; not looked at where there is a `keep_share`.
        keep_share: keep the best of each group, share times its scored images, rounded up.
        per: what a group is: `class-level`, `level` or `all`.
    """
    groups = defaultdict(list)
    for row in rows:
        entry = scores.get(row["file_name"])
        if entry is None or math.isnan(entry["text_score"]):
            continue
        if keep_share is None:
            entry["kept"] = entry["text_score"] >= threshold
            entry["reason"] = "" if entry["kept"] else "low text score"
        else:
            group = {"class-level": (row["label"], row["level"]), "level": row["level"], "all": None}[per]
            groups[group].append((-entry["text_score"], row["file_name"]))
    for group in groups.values():
        most = math.ceil(keep_share * len(group) - 1e-9)  # the small number keeps 0.1 * 30 at 3
        for place, (_, name) in enumerate(sorted(group)):
            scores[name]["kept"] = place < most
            scores[name]["reason"] = "" if place < most else "outside the kept share"


def count(rows: list[dict], scores: dict[str, dict]) -> tuple[Counter, Counter]:
    """Images made and kept, by (label, level)."""
    made, kept = Counter(), Counter()
    for row in rows:
        key = row["label"], row["level"]
        made[key] += 1
        kept[key] += scores[row["file_name"]]["kept"]
    return made, kept


def acceptance(
    made: Counter, kept: Counter, names: dict[int, str], groups: dict[int, str]
) -> tuple[list[str], list[int], np.ndarray, np.ndarray]:
    """The acceptance table: a row for each class (where they are few), for each class group, and for all.

    Args:
        made: images by (label, level); `kept` likewise.
        names: class name by label.
        groups: many, medium or few, by label.

    Returns:
        The rows' names, the levels, and images made and kept: int (rows, levels).
    """
    levels = sorted({level for _, level in made})
    lines = {names[label]: [label] for label in sorted(names)} if len(names) <= SHOWN else {}
    if len(set(names.values())) < len(names):  # names may repeat: tell the classes apart by index
        lines = {f"{names[label]} ({label})": [label] for label in sorted(names)} if lines else {}
    for group in ("many", "medium", "few"):
        inside = [label for label in names if groups.get(label) == group]
        lines |= {f"all {group}-shot": inside} if inside else {}
    lines["all"] = list(names)
    tables = (
        np.array([[sum(table[label, level] for label in labels) for level in levels] for labels in lines.values()])
        for table in (made, kept)
    )
    return list(lines), levels, *tables


def table_text(names: list[str], levels: list[int], made: np.ndarray, kept: np.ndarray) -> str:
    """The acceptance table as text: kept of made images, and the share over all levels."""
    width = max(len("class"), *(len(name) for name in names))
    lines = ["  ".join(["class".ljust(width), *(f"level {level:>3}".rjust(13) for level in levels), "all levels"])]
    for name, of, some in zip(names, made, kept, strict=True):
        cells = (f"{k}/{m}".rjust(13) for k, m in zip(some, of, strict=True))
        lines.append("  ".join([name.ljust(width), *cells, f"{some.sum() / max(1, of.sum()):10.1%}"]))
    return "\n".join(lines)


def paper_line(dataset: str, imb_ratio: float | None, made: int, kept: int) -> str:
    """Ours beside the acceptance rate that DisCL reports; empty for other data sets."""
    for (name, ratio), (theirs, accepted) in PAPER_ACCEPTANCE.items():
        if name == dataset and ratio in (None, imb_ratio):
            return (
                f"DisCL reports {accepted / theirs:.1%} on this data set ({accepted:,} of {theirs:,}); "
                f"here it is {kept / made:.1%} ({kept:,} of {made:,})"
            )
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# quotas: classes and levels of which too few images are kept, and what to draw more


def find_short(plan: dict, names: dict[int, str], made: Counter, kept: Counter, least: int) -> list[dict]:
    """Each class and level of the plan with fewer than `least` kept images."""
    return [
        {
            "label": label,
            "class_name": names.get(label, ""),
            "level": level,
            "made": made[label, level],
            "kept": kept[label, level],
            "short": least - kept[label, level],
        }
        for label in plan["hard_classes"]
        for level in plan["levels"]
        if kept[label, level] < least
    ]


def plan_top_up(rows: list[dict], prompts: dict[int, dict], short: list[dict], first_seed: int) -> list[dict]:
    """The images to draw so that `short` may be filled: rows with source, level, seed and prompt.

    For each class and level as many as its acceptance so far makes it need, (kept + 1) of (made + 2) being accepted, at
    most ten times what is missing. They are shared among the class's sources; seeds go on above those of the spectrum;
    prompts are those that the class has used least at this level.

    Args:
        first_seed: the seeds that the spectrum's own plan has; new ones are never below.
    """
    sources, used, seeds = defaultdict(dict), defaultdict(Counter), defaultdict(lambda: first_seed)
    for row in rows:
        sources[row["label"]][row["source"]] = None
        used[row["label"], row["level"]][row["prompt"]] += 1
        unit = row["source"], row["level"]
        seeds[unit] = max(seeds[unit], row["seed"] + 1)
    planned = []
    for gap in short:
        label, level = gap["label"], gap["level"]
        if not sources[label]:
            continue
        draws = min(10 * gap["short"], math.ceil(gap["short"] * (gap["made"] + 2) / (gap["kept"] + 1)))
        texts, times = prompts[label]["prompts"], used[label, level]
        for source in itertools.islice(itertools.cycle(sources[label]), draws):
            prompt = min(texts, key=times.__getitem__)  # the first of those that are used least
            times[prompt] += 1
            planned.append({"source": source, "level": level, "seed": seeds[source, level], "prompt": prompt})
            seeds[source, level] += 1
    return planned


def top_up(rows, prompts, plan, names, made, kept, note: dict, args) -> None:
    """List what falls short of --min-per-class-level and write the next plan; counts the rounds in `note`."""
    path, list_path = args.spectrum / "top_up.csv", args.spectrum / "short.csv"
    if path.exists():  # a round is over once the generator has drawn from its plan
        there = {spectrum_folder.Unit(row["source"], row["level"], row["seed"]) for row in rows}
        note["rounds"] += any(unit in there for unit, _ in spectrum_folder.read_top_up(path))
    short = find_short(plan, names, made, kept, args.min_per_class_level)
    spectrum_folder.write_short(list_path, short)
    if not short:
        path.unlink(missing_ok=True)
        print(f"every class has {args.min_per_class_level} kept images or more at every level")
        return
    print(
        f"{list_path}: {len(short)} of {len(plan['hard_classes']) * len(plan['levels'])} classes and levels have fewer "
        f"than {args.min_per_class_level} kept images:"
    )
    for gap in short[:SHOWN]:
        print(f"  {gap['class_name']} ({gap['label']}), level {gap['level']}: {gap['kept']} of {gap['made']} kept")
    if len(short) > SHOWN:
        print(f"  and {len(short) - SHOWN} more")
    planned = plan_top_up(rows, prompts, short, plan.get("seeds", 0))
    if note["rounds"] >= args.max_rounds or not planned:
        path.unlink(missing_ok=True)
        print(
            f"given up after {note['rounds']} rounds (--max-rounds {args.max_rounds}): training gets the images that "
            "these classes have, and no others"
        )
        return
    spectrum_folder.write_top_up(path, planned)
    print(
        f"{path}: {len(planned)} images to draw in round {note['rounds'] + 1} of {args.max_rounds}; run "
        f"generate_spectrum.py with the flags of before and --plan {path}, then this command again"
    )


# ---------------------------------------------------------------------------------------------------------------------
# distance


def draw_some(items: list, most: int, *seed) -> list:
    """At most `most` of the items, in their order, the same ones each time."""
    chosen = random.Random(runs.digest_int(*seed)).sample(range(len(items)), min(most, len(items)))
    return [items[place] for place in sorted(chosen)]


def measure_distances(rows: list[dict], scores: dict[str, dict], train, clip, args) -> list[dict]:
    """MMD and Fréchet distance of each level to the real images of the same classes, in the CLIP's feature space.

    Each level has two rows, one for all images made and one for those kept; a row is left out where there are fewer
    than two images.
    """
    from spectrum import distances
    from spectrum.embeddings import read_files, read_training_images

    labels = {row["label"] for row in rows}
    real = [name for name, label in zip(train.sources, train.labels.tolist(), strict=True) if label in labels]
    real = draw_some(real, DISTANCE_IMAGES, "real")
    vectors, wrong = clip.all_images(real, read_training_images(train, args.data_root), "embedding real images")
    if wrong:
        raise cli.UserError(wrong[min(wrong)])
    vectors = vectors.double().numpy()
    bandwidth, real_moments = distances.median_distance(vectors), distances.moments(vectors)
    table = []
    for level in sorted({row["level"] for row in rows}):
        found = [
            row for row in rows if row["level"] == level and not math.isnan(scores[row["file_name"]]["text_score"])
        ]
        found = draw_some([row["file_name"] for row in found], DISTANCE_IMAGES, "level", level)
        features, _ = clip.all_images(found, read_files(args.spectrum), f"embedding level {level}")
        features = features.double().numpy()
        kept = np.array([scores[name]["kept"] for name in found], bool)
        for what, part in (("made", features), ("kept", features[kept])):
            if len(part) < 2:
                continue
            table.append(
                {
                    "level": level,
                    "images": what,
                    "count": len(part),
                    "real_count": len(real),
                    "mmd": distances.mmd(part, vectors, bandwidth),
                    "frechet": distances.frechet(real_moments, distances.moments(part)),
                    "frechet_floor": distances.frechet_floor(real_moments, len(part)),
                }
            )
    return table


def report_distances(table: list[dict], folder: Path) -> None:
    """Print the distances, and write distance.csv and distance.png."""
    from reporting.figures import COLOURS, new_figure, save_figure

    spectrum_folder.write_distances(folder / "distance.csv", table)
    print("distance to the real images of the same classes, in the CLIP's feature space")
    print("level  images   count     MMD^2  Frechet  its floor")
    for row in table:
        print(
            f"{row['level']:>5}  {row['images']:<6} {row['count']:>7} {row['mmd']:>9.5f} {row['frechet']:>8.4f} "
            f"{row['frechet_floor']:>10.4f}"
        )
    print(
        "MMD^2 is unbiased. The Frechet distance is not: its floor is what as many vectors drawn from the real images' "
        f"own Gaussian get ({table[0]['real_count']} real images); compare rows of like count, or its distance from "
        "the floor"
    )
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


def write_scores(path: Path, rows: list[dict], scores: dict[str, dict]) -> None:
    """scores.csv, in the order of `rows`; those without a score yet are left out."""
    spectrum_folder.write_scores(
        path,
        (
            {
                "file_name": row["file_name"],
                "text_score": f"{entry['text_score']:.6f}",
                "image_score": f"{entry['image_score']:.6f}",
                "kept": int(entry["kept"]),
                "reason": entry["reason"],
            }
            for row in rows
            if (entry := scores.get(row["file_name"]))
        ),
    )


def read_scored(path: Path, note: dict, made_by: dict, rows: list[dict]) -> dict[str, dict]:
    """What scores.csv holds that still counts: scores by the same CLIP against the same text.

    Images without a score are tried again. A table by another CLIP is set aside as scores.previous.csv.
    """
    if not path.exists():
        return {}
    scores = spectrum_folder.read_scores(path)
    for name in ("clip", "clip_digest"):
        if note.get(name) != made_by[name]:
            aside = path.with_name("scores.previous.csv")
            path.replace(aside)
            print(f"{path}: made with {name} {note.get(name)!r}, not {made_by[name]!r}; it is {aside} now")
            return {}
    before, now = note.get("score_prompts", {}), made_by["score_prompts"]
    same = {int(label) for label in now if before.get(label) == now[label]}
    return {
        row["file_name"]: scores[row["file_name"]]
        for row in rows
        if row["label"] in same
        and row["file_name"] in scores
        and not math.isnan(scores[row["file_name"]]["text_score"])
    }


def same_scorer(plan: dict, made_by: dict, prompts: Path) -> bool:
    """Whether the scores that generate_spectrum.py --score took are those that would be taken here."""
    score = plan.get("score") or {}
    same_clip = all(score.get(name) == made_by[name] for name in ("clip", "clip_digest"))
    return same_clip and plan.get("prompts_digest") == runs.digest_files([prompts])


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    plan = spectrum_folder.read_plan(args.spectrum)
    for name in ("dataset", "imb_ratio", "data_seed"):
        if plan[name] != getattr(args, name):
            raise cli.UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: {args.spectrum} was made with {plan[name]}"
            )
    rows = spectrum_folder.read_made(args.spectrum)
    if not rows:
        raise cli.UserError(f"{args.spectrum}: holds no image; run generate_spectrum.py")
    names = {row["label"]: row["class_name"] for row in rows}
    prompts = spectrum_folder.read_prompts(args.prompts, names)
    made_by = spectrum_folder.describe_clip(args.clip)
    made_by["score_prompts"] = {str(label): prompts[label]["score_prompt"] for label in sorted(names)}
    path, note_path = args.spectrum / "scores.csv", args.spectrum / "scores.json"
    note = runs.read_json(note_path) if note_path.exists() else {}
    scores = read_scored(path, note, made_by, rows)
    scored = len(scores)
    if same_scorer(plan, made_by, args.prompts):
        for row in rows:
            if row["file_name"] not in scores and "text_score" in row:
                pair = {name: row[name] for name in spectrum_folder.SCORED_FIELDS}
                scores[row["file_name"]] = pair | {"kept": False, "reason": ""}
    scored = len(scores) - scored
    there = {
        f"{shard.name}/{file.name}" for shard in args.spectrum.glob("shard-*") for file in os.scandir(shard)
    }  # one listing a folder: asking for each of 200,000 files takes minutes on a network disk
    for row in rows:
        if row["file_name"] not in there:
            scores[row["file_name"]] = no_score("missing")
    new = [row for row in rows if row["file_name"] not in scores]

    train = clip = None
    if new or args.distance or "groups" not in note:
        data = datasets.load(args.dataset, args.imb_ratio, args.data_root, args.data_seed)
        train = data.train
        note["groups"] = {
            str(label): group for group, labels in data.groups.items() for label in labels.tolist() if label in names
        }
    rule = {"threshold": args.threshold, "keep_share": args.keep_share}
    if args.keep_share is not None:
        rule |= {"threshold": None, "share_of": args.share_of}
    note = made_by | rule | {"groups": note["groups"], "rounds": note.get("rounds", 0)}

    def save() -> None:
        decide(rows, scores, args.threshold, args.keep_share, args.share_of)
        write_scores(path, rows, scores)
        runs.write_json(note_path, note)

    if new or args.distance:
        import models  # takes seconds: after everything that can be wrong without it
        from runtime.device import pick_device
        from spectrum import embeddings

        device = pick_device(args.device)
        clip = embeddings.Clip(models.load_clip(args.clip, device), device, args.batch_size, args.workers)
    if new:
        score(new, prompts, train, clip, args, scores, save)
    save()

    made, kept = count(rows, scores)
    groups = {int(label): group for label, group in note["groups"].items()}
    table = acceptance(made, kept, names, groups)
    print(table_text(*table))
    from reporting.figures import draw_acceptance

    draw_acceptance(*table, args.spectrum / "acceptance.png")
    by = (
        f"at CLIPScore {args.threshold:g} and up"
        if args.keep_share is None
        else f"as the best {args.keep_share:.1%} of each {args.share_of}".replace("each all", "all")
    )
    total = sum(kept.values())
    print(
        f"{path}: {total} of {len(rows)} images kept ({total / len(rows):.1%}) {by}, {len(new)} newly scored"
        f"{f', {scored} scored when they were drawn' if scored else ''}"
    )
    if line := paper_line(args.dataset, args.imb_ratio, len(rows), total):
        print(line)
    if args.min_per_class_level is not None:
        top_up(rows, prompts, plan, names, made, kept, note, args)
        runs.write_json(note_path, note)
    if args.distance:
        distances = measure_distances(rows, scores, train, clip, args)
        if not distances:
            raise cli.UserError(f"--distance: {args.spectrum} has no level with two readable images")
        report_distances(distances, args.spectrum)

    without = [row["file_name"] for row in rows if math.isnan(scores[row["file_name"]]["text_score"])]
    for name in without[:SHOWN]:
        print(f"{args.spectrum}: {name}: {scores[name]['reason']}")
    if without:
        print(f"{len(without)} images have no score ({path} lists them all); run generate_spectrum.py again")
    return 1 if without else 0


if __name__ == "__main__":
    cli.run(main)
