"""Step 2: text prompts for each class that has hard images.

--from template takes the data set's own phrasings; scenes writes descriptions offline, from a grammar; llm has any
text-generation model of transformers write them; file takes yours; domains puts each class into the domains of
describe_domains.py (ALIA). Descriptions by scenes and llm have 15 words or more and are put into the paper's frame, "a
8k real photo: {}" (DisCL).

Reads:  hard.csv
Writes: prompts.json: for each class index its name, the text that CLIPScore compares with, and the prompts that the
        generator draws from. Classes that the file already holds are left as they are.
        with --from llm: beside it prompts.answers.jsonl, all questions and answers

    python write_prompts.py --dataset digits --hard runs/hard.csv --out runs/prompts.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import datasets
from loaders.base import spoken_name
from runtime import cli, files, text
from spectrum import domains as summary
from spectrum import scenes, tables
from spectrum.language_model import ask

MOST_WORDS = 50  # CLIP reads 77 tokens
QUESTION = (
    "Write {count} different descriptions of photographs that show {article} {name}. Give one description a line, "
    "numbered, and nothing else. Each has 15 to 30 words and contains the words '{name}'. Vary the place, the light, "
    "the weather, the view and what is going on."
)


def build_parser() -> cli.Parser:
    parser = cli.Parser(__doc__, "write_prompts")
    parser.add_argument(
        "--dataset",
        default="digits",
        choices=sorted(datasets.TABLE),
        metavar="NAME",
        help="data set, whose templates are taken: %(choices)s",
    )
    parser.add_argument(
        "--hard", type=cli.existing_file, default=Path("runs/hard.csv"), metavar="FILE", help="table of find_hard.py"
    )
    parser.add_argument(
        "--from",
        dest="source",
        choices=["template", "scenes", "llm", "file", "domains"],
        default="template",
        help="template: the data set's own phrasings, with the class name in them; scenes: an offline grammar; "
        "llm: a language model; file: your own prompts; domains: the data set's domains (ALIA)",
    )
    parser.accept_old("--source", "--from")
    parser.add_argument(
        "--score-prompt",
        metavar="TEXT",
        help="text that CLIPScore compares with, with {} for the class name (default: the data set's; DisCL's is "
        "'a photo of {}')",
    )
    parser.add_argument(
        "--out", type=cli.new_file, default=Path("runs/prompts.json"), metavar="FILE", help="the file to write"
    )
    group = parser.add_argument_group("scenes and llm")
    group.add_argument("--count", type=cli.whole(1), default=10, metavar="N", help="prompts of each class")
    group.add_argument(
        "--frame", default="a 8k real photo: {}", metavar="TEXT", help="text around each description, which replaces {}"
    )
    group.add_argument("--llm", metavar="NAME", help="text-generation model: hub name or local folder")
    group.add_argument("--tries", type=cli.whole(1), default=3, metavar="N", help="attempts per class")
    group.add_argument("--batch-size", type=cli.whole(1), default=16, metavar="N", help="classes per question batch")
    group.add_argument("--max-new-tokens", type=cli.whole(1), default=800, metavar="N", help="longest answer")
    group.add_argument("--seed", type=cli.whole(0), default=0, metavar="N", help="seed of the model's answers")
    cli.add_device_flag(group)
    group = parser.add_argument_group("file")
    group.add_argument(
        "--file",
        type=cli.existing_file,
        metavar="FILE",
        help="CSV with columns class and prompt, or JSON with a list of prompts for each class; a class is an index or "
        "a name",
    )
    group = parser.add_argument_group("domains")
    group.add_argument("--domains", type=cli.existing_file, metavar="FILE", help="domains.json of describe_domains.py")
    group.add_argument(
        "--instructions", action="store_true", help="take the domains' instructions, for editors that want one"
    )
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# llm


def read_answer(text: str, class_name: str) -> list[str]:
    """The descriptions in a model's answer that can be used: one a line, numbers, bullets and quotes taken off.

    Kept are those of 15 to 50 words that name the class (in any case, at word borders), each once.
    """
    named = re.compile(rf"(?<!\w){re.escape(' '.join(class_name.split()))}(?!\w)", re.IGNORECASE)
    found: dict[str, str] = {}
    for line in text.splitlines():
        line = re.sub(r"^\s*(?:\d+\s*[.):]|[-*•])\s*", "", line)
        line = " ".join(line.strip().strip("\"'“”*").split())
        if scenes.LEAST_WORDS <= len(line.split()) <= MOST_WORDS and named.search(line):
            found.setdefault(line.casefold().rstrip("."), line)
    return list(found.values())


def write_by_llm(labels: list[int], names: dict[int, str], args) -> Iterator[tuple[int, list[str], int]]:
    """Have the model describe each class, ask again for missing descriptions, and fill up from `scenes`.

    Yields:
        A class's index, its descriptions, and how many of them, the last ones, are from `scenes`.
    """
    from models import load_language_model
    from runtime.device import pick_device

    model, tokenizer = load_language_model(args.llm, pick_device(args.device))
    answers = args.out.with_suffix(".answers.jsonl")
    answers.parent.mkdir(parents=True, exist_ok=True)
    with cli.progress(len(labels), "asking", "class") as bar, answers.open("a", encoding="utf-8") as raw:
        for start in range(0, len(labels), args.batch_size):
            batch = labels[start : start + args.batch_size]
            found: dict[int, dict[str, str]] = {label: {} for label in batch}
            for attempt in range(args.tries):
                # Ask about the classes that have too few descriptions.
                open_labels = [label for label in batch if len(found[label]) < args.count]
                if not open_labels:
                    break
                questions = [
                    QUESTION.format(count=args.count - len(found[label]), article=article(names[label]), name=name)
                    for label in open_labels
                    for name in [" ".join(names[label].split())]
                ]
                seed = files.digest_int("llm", args.seed, open_labels[0], attempt)
                texts = ask(model, tokenizer, questions, seed, args.max_new_tokens)
                # Take the descriptions that can be used, and keep every answer.
                for label, question, text in zip(open_labels, questions, texts, strict=True):
                    for line in read_answer(text, names[label])[: args.count - len(found[label])]:
                        found[label].setdefault(line.casefold().rstrip("."), line)
                    row = {"label": label, "attempt": attempt, "model": args.llm, "question": question, "answer": text}
                    raw.write(json.dumps(row, ensure_ascii=False) + "\n")
                raw.flush()
            for label in batch:
                filled = scenes.describe(names[label], args.count - len(found[label]))
                yield label, [*found[label].values(), *filled], len(filled)
            bar.update(len(batch))


def article(name: str) -> str:
    """a or an, by the first letter."""
    return "an" if name.strip()[0].lower() in "aeiou" else "a"


# ---------------------------------------------------------------------------------------------------------------------
# file


def read_own(path: Path, names: dict[int, str]) -> dict[int, list[str]]:
    """The user's prompts by class index; classes that have no hard images are left out.

    Raises:
        UserError: neither CSV nor JSON as described, an empty prompt, or a name that two classes share.
    """
    if path.suffix == ".json":
        content = files.read_json(path)
        if not isinstance(content, dict) or not all(isinstance(prompts, list) for prompts in content.values()):
            raise cli.UserError(f"{path}: expected an object with a list of prompts for each class")
        pairs = [(f"class {key!r}", key, prompt) for key, prompts in content.items() for prompt in prompts]
    else:
        rows = list(text.read_csv(path, ("class", "prompt"), "expected columns class and prompt"))
        if not rows:
            raise cli.UserError(f"{path}: expected columns class and prompt, and at least one row")
        pairs = [(f"row {number}", row["class"], row["prompt"]) for number, row in rows]
    by_name: dict[str, list[int]] = {}
    for label, name in names.items():
        by_name.setdefault(text.same_form(name), []).append(label)
    prompts: dict[int, list[str]] = {}
    for place, key, prompt in pairs:
        if not isinstance(prompt, str) or not prompt.strip():
            raise cli.UserError(f"{path} {place}: the prompt is empty or no text; expected a text")
        labels = by_name.get(text.same_form(key), [text.parse_whole(key)])
        if len(labels) > 1:
            raise cli.UserError(f"{path} {place}: classes {labels} are all called {key!r}; expected a class index")
        for label in labels:
            if label in names and prompt not in prompts.setdefault(label, []):
                prompts[label].append(prompt)
    return prompts


# ---------------------------------------------------------------------------------------------------------------------


def check_flags(args) -> None:
    """Raise UserError where flags do not go together."""
    if args.instructions and args.source != "domains":
        raise cli.UserError("--instructions: expected with --from domains only")
    for source in ("llm", "file", "domains"):
        if (args.source == source) != (getattr(args, source) is not None):
            raise cli.UserError(f"--from {args.source}: expected --{source} with --from {source}, and only with it")
    if args.frame.count("{}") != 1:
        raise cli.UserError(f"--frame {args.frame!r}: expected a text with one {{}}, where the description goes")
    if args.score_prompt is not None and args.score_prompt.count("{}") != 1:
        raise cli.UserError(f"--score-prompt {args.score_prompt!r}: expected a text with one {{}}, for the class name")


def check_sources(args, hard: list[tables.Hard]) -> None:
    """Raise UserError where hard.csv names files and --dataset, perhaps by default, has its images in the project."""
    source = next((row.source for row in hard if not row.source.startswith("index:")), None)
    if source is not None and datasets.TABLE[args.dataset].root == "unused":
        raise cli.UserError(
            f"--dataset {args.dataset}: {args.hard} names image files, the first {source}, which {args.dataset} has "
            "not; expected the --dataset that find_hard.py was given"
        )


def check_names(args, names: dict[int, str], prompts: dict[int, dict]) -> None:
    """Raise UserError where classes are called otherwise in the prompts that exist, or are called by numbers."""
    tables.stop_on_other_names(args.out, prompts, names, args.hard, ", or another --out")
    names_file = datasets.TABLE[args.dataset].names_file
    if names_file and any(name.isdecimal() for name in names.values()):
        raise cli.UserError(
            f"{args.hard}: the classes are called by numbers ({next(iter(names.values()))} ...); expected "
            f"{names_file} in --data-root, and find_hard.py run again"
        )


def write(args, labels: list[int], names: dict[int, str]) -> Iterator[tuple[int, dict]]:
    """The prompts of some classes, from what --from says.

    Yields:
        A class's index, and its `prompts` and their `source`, with what else prompts.json notes of them.

    Raises:
        UserError: a class without a prompt in --file.
    """
    # One branch for each value of --from.
    spoken = {label: spoken_name(names[label]) for label in labels}
    if args.source == "template":
        for label in labels:
            texts = [template.replace("{}", spoken[label]) for template in datasets.TEMPLATES[args.dataset]]
            yield label, {"prompts": texts, "source": "template"}
    elif args.source == "scenes":
        for label in labels:
            described = scenes.describe(spoken[label], args.count)
            yield label, {"prompts": [args.frame.replace("{}", text) for text in described], "source": "scenes"}
    elif args.source == "llm" and labels:
        for label, described, filled in write_by_llm(labels, spoken, args):
            texts = [args.frame.replace("{}", text) for text in described]
            from_scenes = texts[len(texts) - filled :]
            yield label, {"prompts": texts, "source": f"llm {args.llm}", "filled_from_scenes": from_scenes}
    elif args.source == "domains":
        domains = summary.read_domains(args.domains)["domains"]
        form = "instruction" if args.instructions else "prompt"
        for label in labels:
            texts = [domain[form].replace("{}", spoken[label]) for domain in domains]
            of_texts = [domain["name"] for domain in domains]
            yield label, {"prompts": texts, "source": f"domains {args.domains.name}", "domains": of_texts}
    elif args.source == "file":
        own = read_own(args.file, names)
        missing = [label for label in labels if label not in own]
        if missing:
            others = text.counted(len(missing) - 1, "other")
            raise cli.UserError(
                f"{args.file}: no prompt for class {missing[0]} ({names[missing[0]]})"
                f"{f' and {others}' if len(missing) > 1 else ''}; expected one or more for each class"
            )
        for label in labels:
            yield label, {"prompts": own[label], "source": f"file {args.file.name}"}


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_flags(args)
    # Find the classes without prompts.
    hard = tables.read_hard(args.hard)
    check_sources(args, hard)
    names = {row.label: row.class_name for row in hard}
    prompts = tables.read_prompts(args.out, []) if args.out.exists() else {}
    check_names(args, names, prompts)
    new = sorted(label for label in names if not prompts.get(label, {}).get("prompts"))

    # Write them; classes that show nothing have prompts of their own.
    def save() -> None:
        files.write_json(args.out, {str(label): prompts[label] for label in sorted(prompts)})

    def add(label: int, found: dict, score_prompt: str) -> None:
        prompts[label] = {"class_name": names[label], "score_prompt": score_prompt} | found

    known = datasets.TABLE[args.dataset]
    score_prompt = args.score_prompt or known.score_prompt
    empty = {} if args.source == "file" else known.empty_prompts
    for label in new:
        if own := empty.get(spoken_name(names[label])):
            add(label, {"prompts": own, "source": "empty scenes"}, own[0])
    for label, found in write(args, [label for label in new if spoken_name(names[label]) not in empty], names):
        before = prompts.get(label, {}).get("score_prompt")
        add(label, found, before or score_prompt.replace("{}", spoken_name(names[label])))
        if args.source == "llm":  # a class takes seconds
            save()
    save()

    # Report how many are new, kept, and filled up.
    print(
        f"{args.out}: prompts for {text.counted(len(prompts), 'class', 'classes')}, {len(new)} of them new, "
        f"from {args.source}"
    )
    kept = len(names) - len(new)
    if kept:
        print(f"{kept} classes had prompts there and keep them; for other prompts take another --out")
    filled = {label: len(prompts[label].get("filled_from_scenes", [])) for label in new}
    if any(filled.values()):
        short = [label for label in new if filled[label]]
        print(
            f"{sum(filled.values())} prompts of {len(short)} classes are from scenes, as {args.tries} answers had too "
            f"few that could be used; the first class is {names[short[0]]}. They are marked filled_from_scenes"
        )
    return 0


if __name__ == "__main__":
    cli.run(main)
