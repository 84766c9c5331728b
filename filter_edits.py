"""ALIA, step 4b: drop edits that fail, by CLIP and by a model that was trained on the real images.

    semantic    CLIP finds a negative text of domains.json (a painting, a black image) nearer than the positive one
    class       CLIP finds another class nearer than the own one
    domain      CLIP finds another domain nearer than the one asked for
    confidence  the base model (--checkpoint) is surer than a threshold of the predicted class: the edit is too easy
                where it is right, and its class is corrupted where it is wrong

The threshold of a class is the base model's mean probability on the class's real images (confident learning). On images
that it has memorised this is nearly 1, and nothing is dropped: --thresholds folds takes it from K runs of train_lt.py
--leave-out I/K, each asked about the images that it did not train on; val from the validation set; train is ALIA's.

Reads:  a spectrum folder, prompts.json, domains.json, the real images, runs of train_lt.py
Writes: SPECTRUM/edits.csv (file_name, domain, semantic, clip_class, predicted, confidence, threshold, kept, reason,
        dropped_by),
        edits.json (what made it), edits_kept.png (kept share by class and domain), edits_dropped.png (by reason)
        SPECTRUM/edits/*.npz: embeddings and probabilities, kept for the next call; edits/events for TensorBoard
Training takes the images that edits.csv keeps and, where there is a scores.csv of filter_clipscore.py, it keeps too.

    python filter_edits.py --dataset biased_digits --rules semantic class --spectrum runs/alia/spectrum \\
        --prompts runs/alia/prompts.json --domains runs/alia/domains/domains.json
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import datasets
from loaders.base import fold_of
from runtime import cli, files, runs
from spectrum import domains as summary
from spectrum import edit_rules, tables
from spectrum import edits as edits_table
from spectrum import folder as spectrum_folder
from spectrum.flags import add_clip_flag, add_device_flags
from spectrum.kept import images_like
from spectrum.vectors import VectorCache

MOST_REAL = 0.2  # a rule that drops more than this share of the real images is not to be trusted
SHEET = 16  # dropped images of each reason in the sheet


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "filter_edits")
    datasets.add_flags(parser)
    parser.add_argument(
        "--spectrum", type=cli.existing_folder, default=Path("runs/spectrum"), metavar="FOLDER", help="folder of edits"
    )
    parser.add_argument(
        "--prompts",
        type=cli.existing_file,
        default=Path("runs/prompts.json"),
        metavar="FILE",
        help="of write_prompts.py",
    )
    parser.add_argument(
        "--domains", type=cli.existing_file, metavar="FILE", help="domains.json, for semantic and domain"
    )
    group = parser.add_argument_group("what is kept")
    group.add_argument(
        "--rules", nargs="+", choices=edit_rules.RULES, default=["semantic", "confidence"], help="rules in use"
    )
    group.add_argument(
        "--checkpoint", type=cli.existing_folder, nargs="+", metavar="RUN", help="for confidence: runs of train_lt.py"
    )
    group.add_argument(
        "--thresholds",
        choices=["auto", "folds", "val", "train"],
        default="auto",
        help="images that thresholds are computed on; auto: folds where every --checkpoint left a fold out, else val",
    )
    group.add_argument(
        "--judge-class",
        choices=["checkpoint", "clip"],
        default="checkpoint",
        help="for confidence: who decides that a class is corrupted; clip where the base model is biased",
    )
    group.add_argument(
        "--keep-dropped",
        type=cli.number(0, 1),
        default=0.0,
        metavar="SHARE",
        help="share of dropped edits to keep all the same",
    )
    group = parser.add_argument_group("how")
    add_clip_flag(group)
    add_device_flags(group)
    return parser


def check_flags(args) -> None:
    """Raise UserError where flags do not go together."""
    rules = set(args.rules)
    if rules & {"semantic", "domain"} and not args.domains:
        raise cli.UserError(f"--rules {' '.join(args.rules)}: expected --domains, the file of describe_domains.py")
    if ("confidence" in rules) != bool(args.checkpoint):
        raise cli.UserError("--checkpoint: expected with --rules confidence, and only with it")
    if (rules - {"confidence"} or args.judge_class == "clip") and not args.clip:
        raise cli.UserError(f"--rules {' '.join(args.rules)}: expected --clip, such as ViT-L-14:openai, ALIA's")
    if args.judge_class == "clip" and "confidence" not in rules:
        raise cli.UserError("--judge-class clip: expected with --rules confidence")


# ---------------------------------------------------------------------------------------------------------------------
# embeddings and probabilities, cached


def embed(args, data, rows: list[dict], clip, real: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """CLIP embeddings of the edits, float32 (N, D), and of real images, (M, D).

    Raises:
        UserError: one cannot be read.
    """
    from spectrum.embeddings import read_files, read_training_images

    described = spectrum_folder.describe_clip(args.clip)
    digest = f"{files.digest_int(*described.values()):016x}"
    width = clip.texts([""]).shape[1]
    found = []
    for what, names, read in (
        ("edits", [row["file_name"] for row in rows], read_files(args.spectrum)),
        ("real", real, read_training_images(data.train, args.data_root)),
    ):
        cache = VectorCache(args.spectrum / "edits" / f"clip_{what}_{digest}.npz", width)
        todo = cache.missing(names)
        if todo:
            with cli.progress(len(todo), f"embedding {what}", "image") as bar:
                for places, vectors, wrong in clip.images(todo, read):
                    if wrong:
                        raise cli.UserError(wrong[min(wrong)])
                    cache.add([todo[place] for place in places], vectors.numpy())
                    bar.update(len(places))
            cache.save()
        found.append(cache.get(names))
    return found[0], found[1]


def base_probabilities(args, data, run: Path, sets: dict[str, tuple[list[str], object]]) -> dict[str, np.ndarray]:
    """A run's class probabilities of several sets of images: set -> (N, C), cropped as the run crops them.

    Args:
        sets: name -> names that the images are cached under, and the images (ImageSet).
    """
    import models
    from runtime.device import pick_device
    from spectrum import embeddings
    from training import evaluation, losses, stores

    trained = runs.read_arguments(run)
    crop, scale = stores.crop_of(trained["augment"]), losses.softmax_scale(trained["loss"])
    digest = files.digest_files([run / "checkpoint.pt"])
    caches = {
        what: VectorCache(args.spectrum / "edits" / f"base_{what}_{digest}.npz", len(data.class_names)) for what in sets
    }
    device, model = pick_device(args.device), None
    for what, (names, images) in sets.items():
        missing = set(caches[what].missing(names))
        places = np.array([place for place, name in enumerate(names) if name in missing], dtype=int)
        if not len(places):
            continue
        size = data.train.images.shape[1] if data.train.in_memory else trained["image_size"]
        model = model or models.load_trained(run, trained, len(data.class_names), size).to(device)
        data = models.with_own_statistics(data, trained["model"], trained["pretrained"])
        workers = embeddings.default_workers(device) if args.workers is None else args.workers
        store = stores.build([images], device, size, workers, "contiguous", crop=crop)
        with cli.progress(len(places), f"{run.name}: {what}", "image") as bar:
            for start in range(0, len(places), 8 * args.batch_size):
                some = places[start : start + 8 * args.batch_size]
                logits = evaluation.predict(model, store, some, data, device, batch_size=args.batch_size)
                caches[what].add([names[place] for place in some], (logits * scale).softmax(1).numpy())
                bar.update(len(some))
        caches[what].save()
    return {what: caches[what].get(names) for what, (names, _) in sets.items()}


def check_runs(args, data) -> tuple[str, list[tuple[int, int] | None]]:
    """Which images thresholds are taken from, and the fold that each run left out (index, count), or None.

    Raises:
        UserError: a run of other data, or folds that are not whole.
    """
    # Check each run, and note the fold that it left out.
    folds = []
    for run in args.checkpoint:
        if not (run / "checkpoint.pt").is_file():
            raise cli.UserError(f"--checkpoint {run}: no checkpoint.pt there; expected a run of train_lt.py")
        trained = runs.read_arguments(run, "model", "loss", "image_size", "augment", "pretrained")
        for name in ("dataset", "imb_ratio", "data_seed"):
            if trained.get(name) != getattr(args, name):
                raise cli.UserError(
                    f"--checkpoint {run}: was trained with --{name.replace('_', '-')} {trained.get(name)}; expected "
                    f"{getattr(args, name)}, whose classes are judged"
                )
        classes = files.read_json(run / "results.json")["class_names"] if (run / "results.json").is_file() else None
        if classes not in (None, data.class_names):
            raise cli.UserError(
                f"--checkpoint {run}: was trained on {len(classes)} classes, {', '.join(classes[:3])} ...; expected "
                f"the {len(data.class_names)} of {args.dataset}, {', '.join(data.class_names[:3])} ..."
            )
        if trained.get("curriculum", "none") != "none":
            raise cli.UserError(f"--checkpoint {run}: was trained on synthetic images too; expected --curriculum none")
        left = trained.get("leave_out")
        folds.append(tuple(left) if left else None)
    # Choose the images, by whether the folds are whole.
    source = args.thresholds
    whole = None not in folds and sorted(folds) == [(index, len(folds)) for index in range(len(folds))]
    if source == "auto":
        source = "folds" if whole else "val"
    if source == "folds" and not whole:
        raise cli.UserError(
            f"--thresholds folds: {len(folds)} runs left out {folds}; expected K runs of train_lt.py --leave-out 0/K "
            "to K-1/K"
        )
    if source != "folds" and len(args.checkpoint) > 1:
        raise cli.UserError(f"--thresholds {source}: expected one --checkpoint, not {len(args.checkpoint)}")
    return source, folds


def judge_confidence(args, data, rows: list[dict], taken: tuple, judged: np.ndarray | None, note: dict) -> dict:
    """Reasons and columns of the confidence rule, and how many real images it would drop.

    Args:
        taken: of `check_runs`.
    """
    # Evaluate the edits and the real images with every run.
    source, folds = taken
    names = [row["file_name"] for row in rows]
    images = images_like(data.train, args.spectrum, rows)
    sets = {"edits": (names, images), "train": (data.train.sources, data.train)}
    if source == "val":
        sets["val"] = (data.val.sources, data.val)
    found = [base_probabilities(args, data, run, sets) for run in args.checkpoint]
    count = len(folds)

    # Judge each image by the run that did not train on it.
    def by_fold(what: str, sources: list[str]) -> np.ndarray:
        """Of each image the probabilities by the run that did not train on it (or on its source)."""
        if source != "folds":
            return found[0][what]
        run_of = {index: place for place, (index, _) in enumerate(folds)}
        return np.stack([found[run_of[fold_of(name, count)]][what][i] for i, name in enumerate(sources)])

    edits = by_fold("edits", [row["source"] for row in rows])
    real = by_fold("train", data.train.sources)
    # Take the thresholds, apply the rule, and report both.
    reference = (found[0]["val"], data.val.labels) if source == "val" else (real, data.train.labels)
    thresholds = edit_rules.class_thresholds(*reference)
    known = thresholds[thresholds <= 1]
    labels = np.array([row["label"] for row in rows])
    reasons = edit_rules.confidence_rule(edits, labels, thresholds, judged)
    note |= {"thresholds_from": source, "thresholds": thresholds.round(6).tolist()}
    print(f"thresholds from {source}: mean {known.mean():.3f}, lowest {known.min():.3f}, highest {known.max():.3f}")
    if known.mean() > edit_rules.MEMORISED:
        print(
            f"warning: the mean threshold is above {edit_rules.MEMORISED}: the base model has memorised these images, "
            "and hardly any edit will be dropped; expected --thresholds folds or val"
        )
    predicted, of_real = edits.argmax(1), edit_rules.confidence_rule(real, data.train.labels, thresholds)
    return {
        "reasons": reasons,
        # Of a real image only the class can be wrong: that the model knows it says nothing against it.
        "real": np.where(of_real == edit_rules.CORRUPTED, of_real, ""),
        "predicted": [data.class_names[label] for label in predicted],
        "confidence": [f"{value:.6f}" for value in edits.max(1)],
        "threshold": [f"{thresholds[label]:.6f}" for label in predicted],
    }


# ---------------------------------------------------------------------------------------------------------------------
# CLIP's rules


def judge_by_clip(args, data, rows: list[dict], prompts: dict, content: dict | None, domains: list[str]) -> dict:
    """Reasons by rule, columns of edits.csv, and reasons for the real images, of the rules that CLIP decides."""
    import models
    from runtime.device import pick_device
    from spectrum import embeddings

    device = pick_device(args.device)
    clip = embeddings.Clip(models.load_clip(args.clip, device), device, args.batch_size, args.workers)
    edits, real = embed(args, data, rows, clip, data.train.sources)
    labels = np.array([row["label"] for row in rows])
    found: dict = {"reasons": {}, "real": {}}

    # The class that CLIP sees, among those that were edited.
    classes = sorted(prompts)
    texts = clip.texts([prompts[label]["score_prompt"] for label in classes]).numpy()
    place_of = {label: place for place, label in enumerate(classes)}
    own = np.array([place_of[label] for label in labels])
    similar = edits @ texts.T
    found["judged"] = np.array(classes)[edit_rules.best_text(similar)]
    found["clip_class"] = [prompts[label]["class_name"] for label in found["judged"]]
    if "class" in args.rules:
        found["reasons"]["class"] = edit_rules.own_text_rule(similar, own, edit_rules.CLASS)
        known = np.array([place_of.get(label, -1) for label in data.train.labels.tolist()])
        found["real"]["class"] = edit_rules.own_text_rule(real @ texts.T, known, edit_rules.CLASS)

    if "semantic" in args.rules:
        meanings = [content["positive"], *content["negatives"]]
        texts = clip.texts(meanings).numpy()
        found["reasons"]["semantic"] = edit_rules.semantic_rule(edits @ texts.T)
        found["real"]["semantic"] = edit_rules.semantic_rule(real @ texts.T)
        found["semantic"] = [meanings[place] for place in edit_rules.best_text(edits @ texts.T)]

    if "domain" in args.rules:
        names = [domain["name"] for domain in content["domains"]]
        reasons = np.full(len(rows), "", dtype=object)
        for label in sorted(set(labels.tolist())):
            inside = np.flatnonzero(labels == label)
            spoken = prompts[label]["class_name"].replace("_", " ")
            texts = clip.texts([domain["prompt"].replace("{}", spoken) for domain in content["domains"]]).numpy()
            asked = np.array([names.index(domains[i]) if domains[i] in names else -1 for i in inside])
            reasons[inside] = edit_rules.own_text_rule(edits[inside] @ texts.T, asked, edit_rules.DOMAIN)
        found["reasons"]["domain"] = reasons
    return found


# ---------------------------------------------------------------------------------------------------------------------
# reports


def draw(args, rows: list[dict], domains: list[str], reasons: np.ndarray) -> None:
    """edits_kept.png and edits_dropped.png."""
    from PIL import Image

    from loaders.pictures import read_image
    from reporting import figures

    names, classes = list(dict.fromkeys(domains)), sorted({(row["label"], row["class_name"]) for row in rows})
    made, kept = np.zeros((2, len(classes), len(names)), dtype=int)
    for row, domain, reason in zip(rows, domains, reasons, strict=True):
        at = classes.index((row["label"], row["class_name"])), names.index(domain)
        made[at] += 1
        kept[at] += reason == ""
    shown = slice(0, 40)
    figures.draw_acceptance(
        [name for _, name in classes[shown]], names, made[shown], kept[shown], args.spectrum / "edits_kept.png",
        "domain", "edits that are kept",
    )  # fmt: skip
    kinds = sorted(set(reasons.tolist()) - {""})
    images, captions = [], []
    for kind in kinds:
        for place in np.flatnonzero(reasons == kind)[:SHEET]:
            images.append(np.asarray(read_image(args.spectrum / rows[place]["file_name"])))
            captions.append((kind.removeprefix("class "), rows[place]["class_name"]))
    if images:
        Image.fromarray(figures.sheet(images, captions)).save(args.spectrum / "edits_dropped.png")


def read_inputs(args) -> tuple[list[dict], dict[int, dict], dict | None]:
    """A row for each edit, prompts by class index, and domains.json, None without one.

    Raises:
        UserError: another data set's spectrum, one without an image, or a file that lacks what a rule needs.
    """
    _, rows = spectrum_folder.read_spectrum(args)
    content = summary.read_domains(args.domains) if args.domains else None
    if content and "semantic" in args.rules and not (content["positive"].strip() and content["negatives"]):
        raise cli.UserError(f"{args.domains}: --rules semantic needs a text positive and texts negatives")
    names = {row["label"]: row["class_name"] for row in rows}
    prompts = tables.read_prompts(args.prompts, names)
    tables.stop_on_other_names(args.prompts, prompts, names, args.spectrum)
    return rows, prompts, content


def stop_on_unknown_domains(args, rows: list[dict], prompts: dict, content: dict, domains: list[str]) -> None:
    """Raise UserError where edits toward a domain are of none of domains.json: the rule could not judge them."""
    known = {domain["name"] for domain in content["domains"]}
    if not known & set(domains):
        raise cli.UserError(
            f"--domains {args.domains}: none of its domains is one that {args.prompts} names for an edit; expected the "
            "file that these prompts were written from"
        )
    unknown = [
        row["prompt"]
        for row, domain in zip(rows, domains, strict=True)
        if prompts[row["label"]].get("domains") and domain not in known
    ]
    if unknown:
        raise cli.UserError(
            f"--rules domain: {len(unknown)} of {len(rows)} edits are of no domain that both {args.prompts} and "
            f"{args.domains} have, the first {unknown[0]!r}; expected the files that they were drawn with"
        )


def warn_of_bias(rows: list[dict], judged: np.ndarray, reasons: np.ndarray) -> None:
    """Say so where CLIP sees the class asked for in most edits that the base model calls corrupted.

    Args:
        judged: the class that CLIP sees in each edit, int (N,).
        reasons: of the confidence rule, (N,).
    """
    corrupted = reasons == edit_rules.CORRUPTED
    if not corrupted.any():
        return
    agree = (judged == [row["label"] for row in rows])[corrupted].mean()
    if agree > 0.5:
        print(
            f"warning: CLIP sees the class asked for in {agree:.0%} of the edits that the base model calls "
            "corrupted: it may be biased; consider --judge-class clip"
        )


def print_rules(reasons: dict[str, np.ndarray], real: dict[str, np.ndarray]) -> None:
    """What each rule would drop, of the edits and of the real images; warns of a rule that drops the real ones too."""
    for rule, found in reasons.items():
        dropped = f"{np.mean(found != ''):6.1%} of the edits"
        of_real = f", {np.mean(real[rule] != ''):6.1%} of the real images" if rule in real else ""
        print(f"{rule:<10} would drop {dropped}{of_real}")
        if rule in ("semantic", "class") and np.mean(real[rule] != "") > MOST_REAL:
            print(
                f"warning: {rule} would drop real images too: it says little of edits; expected other texts, or --clip"
            )


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_flags(args)
    rows, prompts, content = read_inputs(args)
    domains = [summary.domain_of_prompt(prompts[row["label"]], row["prompt"]) for row in rows]
    if "domain" in args.rules:
        stop_on_unknown_domains(args, rows, prompts, content, domains)
    data = datasets.load(args.dataset, args.imb_ratio, args.data_root, args.data_seed)
    taken = check_runs(args, data) if "confidence" in args.rules else ()
    note: dict = {"rules": args.rules, "judge_class": args.judge_class, "keep_dropped": args.keep_dropped}

    # Apply the rules.
    by_clip: dict = {"reasons": {}, "real": {}}
    if set(args.rules) - {"confidence"} or args.judge_class == "clip":
        by_clip = judge_by_clip(args, data, rows, prompts, content, domains)
        note |= spectrum_folder.describe_clip(args.clip)
    reasons, real = dict(by_clip["reasons"]), dict(by_clip["real"])
    sure: dict = {}
    if "confidence" in args.rules:
        judged = by_clip["judged"] if args.judge_class == "clip" else None
        sure = judge_confidence(args, data, rows, taken, judged, note)
        reasons["confidence"], real["confidence"] = sure["reasons"], sure["real"]
        if args.judge_class == "checkpoint" and "judged" in by_clip:
            warn_of_bias(rows, by_clip["judged"], sure["reasons"])
    print_rules(reasons, real)

    # Decide, and write.
    names = [row["file_name"] for row in rows]
    final = edit_rules.give_back(edit_rules.combine(list(reasons.values())), names, args.keep_dropped)
    dropped_by = [" ".join(rule for rule in reasons if reasons[rule][i]) for i in range(len(rows))]
    edits_table.write_edits(
        args.spectrum / edits_table.EDITS,
        {"file_name": names, "domain": domains, "kept": [int(reason == "") for reason in final], "reason": final}
        | {"dropped_by": dropped_by}
        | {column: found[column] for found in (by_clip, sure) for column in found.keys() & edits_table.FINDINGS},
    )
    files.write_json(args.spectrum / "edits.json", note)

    # Show it.
    print("\n".join(edits_table.format_table(rows, domains, final)))
    print(
        f"{args.spectrum / 'edits.csv'}: {np.sum(final == '')} of {len(rows)} edits kept by {' and '.join(args.rules)}"
    )
    from reporting import events  # TensorBoard takes seconds

    try:  # a figure that cannot be drawn costs no result
        draw(args, rows, domains, final)
        events.log_edits(args.spectrum, domains, final, note.get("thresholds"))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"{args.spectrum}: figures not drawn: {cli.first_line(error)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
