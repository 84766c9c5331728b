"""ALIA, step 1b: caption the training images, and sum up in which domains (settings) they were taken.

--summary count finds the phrases that cover the captions best, without a language model; llm has a language model
describe them in two turns and fills up from count where its answer cannot be used; file checks and takes your own
domains.json. domains.json is meant to be edited by hand; run this again with --summary file to draw it anew.

Reads:  the training set, a captioner, for llm a language model
Writes: OUT/shard-00000/captions.jsonl (source, label, caption), which is appended to after each batch, and
        captions.json (what made them)
        OUT/captions.jsonl, all of them in the data set's order
        OUT/domains.json (prefix, positive and negatives for filter_edits.py, and the domains: name, prompt,
        instruction, share of the captions, examples, source)
        OUT/sources.csv (source, label, domain): the domain that each image has already
        OUT/domains.png: how the classes are spread over the domains, and how many bits the domain tells about the
        class; captions.png, a sheet of images and their captions
        for llm OUT/domains.answers.jsonl, all that the model was asked and answered

After a kill, the same command resumes after the last batch; SIGTERM and SIGUSR2 end it after the batch in
flight, with exit code 75. --shard 0/4 to 3/4 caption a part each; run without --shard afterwards to sum up.

    python describe_domains.py --dataset biased_digits --out runs/domains
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np

import datasets
from runtime import cli, files, runs, signals
from runtime.text import counted
from spectrum import captions as captioning
from spectrum import domains as summary

CAPTIONER = "Salesforce/blip-image-captioning-large"  # the paper's
LEAST_DOMAINS = 3  # a language model's answer with fewer usable ones is filled up from count
EXAMPLES = 3  # captions that domains.json quotes for each domain
SHEET = 32
NEGATIVES = [
    "a photo of an object",
    "a photo of geometric shapes",
    "a photo",
    "an image",
    "a painting",
    "a black image",
]
FIRST_TURN = (
    "Below are captions of images from a data set of {plural}, one a line. Describe the settings in which these "
    "images were taken: objective descriptions of scene, action, camera pose, zoom and other image qualities. Write a "
    'handful of captions, each of one unique setting, one a line, each beginning with "{prefix}".\n\n{captions}'
)
SECOND_TURN = (
    "Rewrite this list so that each caption is agnostic of the type of {superclass}, says the word {superclass} once, "
    "and is a single short sentence. Fewer than {most_plus} captions, which together cover the largest breadth of "
    'concepts. One a line, nothing else, each beginning with "{prefix}".'
)


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "describe_domains")
    datasets.add_flags(parser)
    parser.add_argument(
        "--out", type=cli.new_folder, default=Path("runs/domains"), metavar="FOLDER", help="where everything goes"
    )
    group = parser.add_argument_group("captions")
    group.add_argument(
        "--captioner",
        metavar="NAME",
        help="image-text-to-text model of transformers: hub name or local folder (default: the paper's, BLIP large)",
    )
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a captioner on the hub")
    group.add_argument(
        "--caption-prompt",
        metavar="TEXT",
        help="the question of a chat model, the task token of Florence-2, or the beginning of a caption for BLIP and "
        "GIT (default: a question about the scene, <CAPTION>, nothing)",
    )
    group.add_argument(
        "--max-new-tokens", type=cli.whole(1), default=40, metavar="N", help="longest caption, in tokens"
    )
    group.add_argument("--batch-size", type=cli.whole(1), default=32, metavar="N", help="images captioned at once")
    group.add_argument(
        "--shard", type=cli.shard, default=cli.Shard(0, 1), metavar="I/N", help="which share to caption, from 0/N up"
    )
    cli.add_device_flag(group)
    group = parser.add_argument_group("domains")
    group.add_argument(
        "--summary",
        choices=["count", "llm", "file"],
        default="count",
        help="count: phrases that cover the captions; llm: a language model, in two turns; file: your own --domains",
    )
    group.add_argument("--most", type=cli.whole(1), default=9, metavar="N", help="number of domains, at most")
    group.add_argument(
        "--least-share",
        type=cli.number(0, 1),
        default=0.02,
        metavar="SHARE",
        help="for count: share of the captions that a domain must cover beyond those before it",
    )
    group.add_argument(
        "--agnostic", action="store_true", help="for count: leave out phrases that only one class's captions have"
    )
    group.add_argument(
        "--prefix", default="a photo of a {}", metavar="TEXT", help="how a domain's prompt begins; {} is the class name"
    )
    group.add_argument("--superclass", default="", metavar="WORD", help="a word for all classes, such as bird")
    group.add_argument("--llm", metavar="NAME", help="for llm: text-generation model: hub name or local folder")
    group.add_argument("--sample", type=cli.whole(1), default=200, metavar="N", help="for llm: captions in a question")
    group.add_argument("--tries", type=cli.whole(1), default=3, metavar="N", help="for llm: attempts at a conversation")
    group.add_argument("--llm-tokens", type=cli.whole(1), default=512, metavar="N", help="for llm: longest answer")
    group.add_argument("--seed", type=cli.whole(0), default=0, metavar="N", help="for llm: seed of sample and answers")
    group.add_argument("--domains", type=cli.existing_file, metavar="FILE", help="for file: your domains.json")
    return parser


def check_flags(args) -> None:
    """Raise UserError where flags do not go together."""
    for name, value in (("llm", args.llm), ("file", args.domains)):
        flag = {"llm": "--llm", "file": "--domains"}[name]
        if (args.summary == name) != (value is not None):
            raise cli.UserError(f"--summary {args.summary}: expected {flag} with --summary {name}, and only with it")
    if args.prefix.count("{}") != 1:
        raise cli.UserError(f"--prefix {args.prefix!r}: expected a text with one {{}}, where the class name goes")
    if args.summary == "llm" and not args.superclass.strip():
        raise cli.UserError("--summary llm: expected --superclass, the word that stands for any class, such as bird")


# ---------------------------------------------------------------------------------------------------------------------
# captions


def describe_captioner(args) -> dict:
    """Everything that determines the captions. A local captioner counts by its content, not by its place."""
    local = Path(args.captioner)
    digest = ""
    if local.is_dir():
        paths = [path for path in local.rglob("*") if path.suffix in (".safetensors", ".json", ".txt", ".jinja")]
        digest = files.digest_files(sorted(paths))
    return {
        "dataset": args.dataset,
        "imb_ratio": args.imb_ratio,
        "data_seed": args.data_seed,
        "captioner": local.name if local.is_dir() else args.captioner,
        "captioner_digest": digest,
        "revision": args.revision,
        "caption_prompt": args.caption_prompt,
        "max_new_tokens": args.max_new_tokens,
    }


def caption_shard(args, data, made_by: dict, stop: signals.StopSignals) -> None:
    """Caption this shard's images that have no caption yet, and append each batch; note what makes them."""
    import models
    from runtime.device import pick_device
    from spectrum.embeddings import read_training_images

    folder = args.out / f"shard-{args.shard.index:05d}"
    with runs.claim(folder):
        # Find the images without a caption; unreadable ones are tried again.
        known = read_all(args.out)
        wanted = data.train.sources[args.shard.index :: args.shard.count]
        todo = [
            name for name in wanted if known.get(name, {}).get("caption") is None
        ]  # unreadable ones are tried again
        if not todo:
            return
        label_of = dict(zip(data.train.sources, data.train.labels.tolist(), strict=True))
        loaded = models.load_captioner(args.captioner, pick_device(args.device), args.revision)
        # Not before: a captioner that fails leaves no note. Another shard's has perhaps been written since.
        runs.stop_on_other(args.out / "captions.json", made_by, "delete that folder")
        files.write_json(args.out / "captions.json", made_by)
        captioner = captioning.Captioner(loaded, args.caption_prompt, args.max_new_tokens)
        writer = files.RowWriter(folder, "captions.jsonl")
        with cli.progress(len(todo), "captioning", "image") as bar:
            for start in range(0, len(todo), args.batch_size):
                names = todo[start : start + args.batch_size]
                images = list(read_training_images(data.train, args.data_root)(names))
                fine = [image for image in images if not isinstance(image, str)]
                texts = iter(captioner.caption(fine) if fine else [])
                rows = []
                for name, image in zip(names, images, strict=True):
                    if isinstance(image, str):
                        print(image, flush=True)
                    caption = None if isinstance(image, str) else next(texts)
                    rows.append({"source": name, "label": label_of[name], "caption": caption})
                writer.append(rows)
                bar.update(len(names))
                if stop.received:
                    break
        writer.close()


def read_all(folder: Path) -> dict[str, dict]:
    """The captions of all shards, by source."""
    return captioning.read_captions(sorted(folder.glob("shard-*/captions.jsonl")))


# ---------------------------------------------------------------------------------------------------------------------
# domains


def ask_for_domains(args, captions: list[str], class_names: list[str]) -> list[dict]:
    """A language model's domains, in two turns; conversations are repeated until one gives enough, --tries at most."""
    import models
    from runtime.device import pick_device
    from spectrum import language_model

    model, tokenizer = models.load_language_model(args.llm, pick_device(args.device))
    # Fill in the questions' words.
    unique = sorted(set(captions))
    words = {
        "plural": f"{args.superclass}s",
        "superclass": args.superclass,
        "prefix": summary.general_prefix(args.prefix, args.superclass),
        "most_plus": args.most + 1,
    }
    best: list[dict] = []
    with (args.out / "domains.answers.jsonl").open("a", encoding="utf-8") as raw:
        for attempt in range(args.tries):
            # Ask about a sample of the captions, in two turns.
            rng = random.Random(files.digest_int("captions", args.seed, attempt))
            shown = rng.sample(unique, min(args.sample, len(unique)))
            seed = files.digest_int("domains", args.seed, attempt)
            messages = [{"role": "user", "content": FIRST_TURN.format(captions="\n".join(shown), **words)}]
            for turn in range(2):
                answer = language_model.answer(model, tokenizer, [messages], seed + turn, args.llm_tokens)[0]
                messages.append({"role": "assistant", "content": answer})
                if turn == 0:
                    messages.append({"role": "user", "content": SECOND_TURN.format(**words)})
            # Take the usable domains, and keep the conversation.
            found, refused = summary.read_domain_lines(answer, args.superclass, class_names, args.most, args.prefix)
            row = {"attempt": attempt, "model": args.llm, "messages": messages, "refused": refused}
            raw.write(json.dumps(row, ensure_ascii=False) + "\n")
            raw.flush()
            best = max(best, found, key=len)
            if len(best) >= LEAST_DOMAINS:
                break
    return [summary.complete_domain(entry, args.prefix, f"llm {args.llm}") for entry in best]


def find_domains(args, captions: list[str], labels: list[int], class_names: list[str]) -> dict:
    """The content of domains.json, but for shares and examples."""
    if args.summary == "file":
        return summary.read_domains(args.domains)
    # Ask the language model, and fill up by counting.
    domains = ask_for_domains(args, captions, class_names) if args.summary == "llm" else []
    if len(domains) < LEAST_DOMAINS:
        by_count, attributes = summary.count_domains(
            captions, labels, class_names, args.superclass, args.most, args.least_share, args.agnostic
        )
        for phrase, name in attributes[:SHEET]:
            print(f"only captions of {name} say {phrase!r}{': left out' if args.agnostic else ''}")
        if args.summary == "llm":
            print(
                f"the answers of {args.llm} gave {len(domains)} usable domains: filled up from count, marked "
                "(domains.answers.jsonl has the answers)"
            )
        there = {summary.phrase_key(domain["name"]) for domain in domains}
        by_count = [entry for entry in by_count if summary.phrase_key(entry["name"]) not in there]
        domains += [
            summary.complete_domain(entry, args.prefix, "count") for entry in by_count[: args.most - len(domains)]
        ]
    if not domains:
        raise cli.UserError(
            f"{args.out}: no phrase is common enough in the captions to be a domain; expected a lower --least-share, "
            "or --summary file"
        )
    return {
        "prefix": args.prefix,
        "superclass": args.superclass,
        "positive": summary.general_prefix(args.prefix, args.superclass),
        "negatives": NEGATIVES,
        "domains": domains,
    }


def add_shares(content: dict, captions: list[str]) -> np.ndarray:
    """Give each domain its share of the captions and examples; returns the domain of each caption, -1 for none."""
    names = [domain["name"] for domain in content["domains"]]
    assigned = np.array([summary.assign_domain(caption, names) for caption in captions])
    for place, domain in enumerate(content["domains"]):
        inside = np.flatnonzero(assigned == place)
        domain["share"] = round(len(inside) / len(captions), 4)
        domain["examples"] = [captions[i] for i in inside[:EXAMPLES]]
        if not len(inside):
            print(f"domain {domain['name']!r}: no caption has it; images are edited toward it all the same")
    return assigned


# ---------------------------------------------------------------------------------------------------------------------
# figures


def draw_bias(table: np.ndarray, bits: float, chance: float, class_names: list[str], domains: list[str], path: Path):
    """Shares of each class's images by domain, and how many bits the domain tells about the class."""
    from reporting.figures import new_figure, save_figure

    keep = np.flatnonzero(table.sum(1))
    share = 100 * table[keep] / table[keep].sum(1, keepdims=True)
    figure, axis = new_figure(figsize=(2.5 + 0.9 * table.shape[1], min(20, 1.5 + 0.3 * len(keep))))
    axis.imshow(share, vmin=0, vmax=100, cmap="viridis", aspect="auto", interpolation="nearest")
    if len(keep) <= 40:
        for (i, j), value in np.ndenumerate(share):
            axis.text(
                j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color="black" if value > 60 else "white"
            )
        axis.set_yticks(range(len(keep)), [class_names[label] for label in keep], fontsize=8)
    axis.set_xticks(range(table.shape[1]), [*domains, "none"], rotation=30, ha="right", fontsize=8)
    axis.set_ylabel("class")
    axis.set_title(
        f"share of a class's captions by domain (%)\nthe domain tells {bits:.2f} bits about the class; "
        f"shuffled {chance:.2f}",
        fontsize=9,
    )
    save_figure(figure, path)


def draw_captions(args, data, captions: dict[str, str]) -> None:
    """A sheet of some training images and their captions."""
    from PIL import Image

    from reporting import figures
    from spectrum.embeddings import read_training_images

    names = random.Random(0).sample(sorted(captions), min(SHEET, len(captions)))
    images = read_training_images(data.train, args.data_root)(names)
    shown = [(image, captions[name]) for image, name in zip(images, names, strict=True) if not isinstance(image, str)]
    columns = 4
    figure, axes = figures.new_figure(-(-len(shown) // columns), columns, figsize=(12, 1.6 * -(-len(shown) // columns)))
    for axis in np.ravel(axes):
        axis.axis("off")
    for axis, (image, caption) in zip(np.ravel(axes), shown, strict=False):
        axis.imshow(image.resize((96, 96), Image.Resampling.NEAREST if min(image.size) < 96 else Image.Resampling.BOX))
        axis.set_title("\n".join(caption[i : i + 40] for i in range(0, min(len(caption), 120), 40)), fontsize=7)
    figures.save_figure(figure, args.out / "captions.png")


# ---------------------------------------------------------------------------------------------------------------------


def summarise(args, data, rows: dict[str, dict]) -> None:
    """Write everything that follows from the captions."""
    # Write all captions, and clean them.
    readable = [name for name in data.train.sources if rows[name]["caption"] is not None]
    label_of = dict(zip(data.train.sources, data.train.labels.tolist(), strict=True))
    labels = [label_of[name] for name in readable]
    lines = (json.dumps(rows[name], ensure_ascii=False) + "\n" for name in readable)
    files.write_text(args.out / "captions.jsonl", "".join(lines))
    spoken = [name.replace("_", " ") for name in data.class_names]
    cleaned = [summary.clean_caption(rows[name]["caption"]) for name in readable]
    looping = sum(not text for text in cleaned)
    if looping:
        print(f"{looping} of {len(cleaned)} captions are empty or loop, and are not counted")
    usable = [place for place, text in enumerate(cleaned) if text]
    if not usable:
        raise cli.UserError(f"{args.out}: no caption can be used; expected another --captioner")
    # Find the domains, and assign every image to one.
    content = find_domains(args, [cleaned[i] for i in usable], [labels[i] for i in usable], spoken)
    assigned = add_shares(content, cleaned)
    names = [domain["name"] for domain in content["domains"]]
    files.write_json(args.out / "domains.json", content)
    summary.write_source_domains(
        args.out / "sources.csv",
        (
            {"source": name, "label": label, "domain": names[place] if place >= 0 else ""}
            for name, label, place in zip(readable, labels, assigned, strict=True)
        ),
    )
    # Measure how much the domain tells about the class, and print it.
    table = summary.count_table(np.array(labels), assigned, len(spoken), len(names))
    bits = summary.mutual_information(table)
    chance = summary.shuffled_information(np.array(labels), assigned, len(spoken), len(names))
    print(
        f"{args.out / 'domains.json'}: {counted(len(names), 'domain')} from "
        f"{counted(len(readable), 'caption')} ({args.summary})"
    )
    for domain in content["domains"]:
        print(f"  {domain['share']:6.1%}  {domain['prompt']}   ({domain.get('source', 'file')})")
    print(f"the domain tells {bits:.2f} bits about the class; shuffled captions {chance:.2f}")
    try:  # a figure that cannot be drawn costs no result
        draw_bias(table, bits, chance, spoken, names, args.out / "domains.png")
        draw_captions(args, data, {name: rows[name]["caption"] for name in readable})
    except (OSError, ValueError, RuntimeError) as error:
        print(f"{args.out}: figures not drawn: {cli.first_line(error)}")


def most_shards(args) -> int:
    """How many shards have something to caption: one for each batch."""
    data = datasets.load(args.dataset, args.imb_ratio, args.data_root, args.data_seed)
    return -(-len(data.train) // args.batch_size)


def finished(args) -> bool:
    """Whether every training image was captioned, by whichever shard, and the captions summed up."""
    if not (args.out / "domains.json").is_file():
        return False
    data = datasets.load(args.dataset, args.imb_ratio, args.data_root, args.data_seed)
    return not set(data.train.sources) - read_all(args.out).keys()


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_flags(args)
    args.captioner = args.captioner or CAPTIONER
    if args.summary == "file":
        summary.read_domains(args.domains)  # before hours of captions
    data = datasets.load(args.dataset, args.imb_ratio, args.data_root, args.data_seed)

    # Captions of another model or data set stop it here.
    note, made_by = args.out / "captions.json", describe_captioner(args)
    made_by["sources"] = files.digest_int(*data.train.sources)
    runs.stop_on_other(note, made_by, "delete that folder")

    # Caption what has no caption yet.
    with signals.StopSignals() as stop:
        caption_shard(args, data, made_by, stop)
    rows = read_all(args.out)
    missing = [name for name in data.train.sources if name not in rows]
    if stop.received:
        print(
            f"{args.out}: {stop.received}, {counted(len(missing), 'caption')} missing; run the same command again to "
            "resume"
        )
        return runs.RESUMABLE
    print(f"{args.out}: {len(data.train) - len(missing)} of {len(data.train)} images captioned", flush=True)
    if missing:
        if args.shard.count == 1:
            raise cli.UserError(f"{args.out}: {len(missing)} images have no caption; run the same command again")
        print("run the other shards, and then this command without --shard, for the domains")
        return 0

    # Sum up.
    summarise(args, data, rows)
    unreadable = [name for name, row in rows.items() if row["caption"] is None]
    if unreadable:
        print(f"{counted(len(unreadable), 'image')} cannot be read: no caption; the first: {unreadable[0]}")
    return 1 if unreadable else 0


if __name__ == "__main__":
    cli.run(main)
