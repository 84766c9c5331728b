"""Domains: what a data set's captions say besides the class, and domains.json, which holds them (ALIA).

A domain is a setting in which images of any class may be shown, such as `on yellow paper`: a prompt with a slot for the
class, an instruction for editors that take one, and the share of the captions that describe it.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from runtime.cli import UserError
from runtime.files import read_json, write_text
from runtime.text import read_csv

DOMAIN_KEYS = ("name", "prompt", "instruction")
SOURCE_COLUMNS = ["source", "label", "domain"]
# Text in DALL-E-like glyphs makes BLIP-large invent words such as "arafed": 92 % of the Planes captions hold one.
NON_WORDS = re.compile(r"\b(araf\w*|unk)\b")
MOST_REPEATS = 3  # a caption with a word more often than this is a loop of the decoder
ARTICLES = {"a", "an", "the", "some", "its", "his", "her", "their", "there", "is", "are"}
PREPOSITIONS = {
    "above", "across", "against", "along", "among", "around", "at", "behind", "below", "beside", "between", "by",
    "down", "during", "from", "in", "inside", "into", "near", "next", "of", "off", "on", "onto", "outside", "over",
    "through", "to", "toward", "towards", "under", "up", "while", "with", "without",
}  # fmt: skip
MEDIUM = {"photo", "photograph", "picture", "image", "view", "close", "closeup", "shot"}  # say how, not where
NOT_VERBS = {"building", "clearing", "evening", "morning", "nothing", "something", "string", "spring", "thing", "wing"}
CLASS_SLOT = "{}"


# ---------------------------------------------------------------------------------------------------------------------
# captions to phrases


def clean_caption(text: str) -> str:
    """A caption in lower case without non-words and without a repeated end; empty where a word still loops."""
    text = NON_WORDS.sub(" ", " ".join(text.lower().split()))
    words = re.sub(r"[^\w\s{}/'-]", " ", text).split()
    for length in (1, 2, 3):  # "on a branch on a branch on a branch" -> "on a branch"
        while len(words) >= 2 * length and words[-length:] == words[-2 * length : -length]:
            del words[-length:]
    content = [word for word in words if word not in ARTICLES | PREPOSITIONS]
    looping = content and Counter(content).most_common(1)[0][1] > MOST_REPEATS
    return "" if looping else " ".join(words)


def name_pattern(names: list[str]) -> re.Pattern:
    """What finds any of these names in a text, as whole words, also in the plural, with an article before it."""
    by_length = sorted({" ".join(name.lower().split()) for name in names}, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:(?:a|an|the)\s+)?(?:{'|'.join(map(re.escape, by_length))})(?:s|es)?(?!\w)")


def split_phrases(caption: str, names: re.Pattern) -> list[str]:
    """The phrases of a cleaned caption that do not speak of the class: cut before prepositions and words in -ing.

    Args:
        names: of `name_pattern`, the classes' names and the superclass.
    """
    phrases, current = [], []
    for word in names.sub(f" {CLASS_SLOT} ", caption).split():
        verb = word.endswith("ing") and len(word) > 5 and word not in NOT_VERBS
        # "flying over water" is one phrase; "flying", and then where, would be two.
        begins = verb or (word in PREPOSITIONS and not (current and current[-1].endswith("ing")))
        if begins and current:
            phrases.append(current)
            current = []
        current.append(word)
    found = []
    for words in [*phrases, current]:
        content = [word for word in words if word not in ARTICLES | PREPOSITIONS | MEDIUM | {"and", "or"}]
        if content and CLASS_SLOT not in words:
            while words and words[-1] in ARTICLES | {"and", "or"}:
                words = words[:-1]
            found.append(" ".join(words))
    return found


def phrase_key(phrase: str) -> str:
    """What two phrases have in common that differ in their articles alone."""
    return " ".join(word for word in phrase.lower().split() if word not in ARTICLES)


# ---------------------------------------------------------------------------------------------------------------------
# phrases to domains


def count_domains(
    captions: list[str],
    labels: list[int],
    class_names: list[str],
    superclass: str,
    most: int = 9,
    least_share: float = 0.02,
    agnostic: bool = False,
) -> tuple[list[dict], list[tuple[str, str]]]:
    """Domains by counting: the phrases that together cover the most captions, the one that adds most first.

    Args:
        captions: cleaned, N.
        labels: class of each caption, N.
        superclass: a word for all classes, such as `bird`; empty for none.
        most: domains at most.
        least_share: share of all captions that a domain must cover beyond those before it.
        agnostic: leave out the phrases that only one class has.

    Returns:
        Dictionaries of name (as most captions write it) and share of the captions; and the phrases that one class
        alone has, as (phrase, class name).
    """
    # Collect the phrases and the captions that have them.
    names = name_pattern([*class_names, *([superclass] if superclass else [])])
    written: dict[str, Counter] = {}
    holders: dict[str, set[int]] = {}
    for place, caption in enumerate(captions):
        for phrase in split_phrases(caption, names):
            key = phrase_key(phrase)
            written.setdefault(key, Counter())[phrase] += 1
            holders.setdefault(key, set()).add(place)
    # Set phrases apart that only one class has.
    several = len(set(labels)) > 1
    attributes = {
        key: class_names[labels[min(places)]]
        for key, places in holders.items()
        if several and len(places) > 1 and len({labels[place] for place in places}) == 1
    }
    pool = {key: places for key, places in holders.items() if not (agnostic and key in attributes)}
    # Take the phrase that covers most further captions, again and again.
    chosen, covered = [], set()
    while pool and len(chosen) < most:
        key = min(pool, key=lambda key: (-len(pool[key] - covered), -len(pool[key]), key))
        gain = len(pool[key] - covered)
        if not gain or gain < least_share * len(captions):
            break
        covered |= pool.pop(key)
        chosen.append(key)
    domains = [
        {"name": written[key].most_common(1)[0][0], "share": len(holders[key]) / len(captions)} for key in chosen
    ]
    return domains, sorted((written[key].most_common(1)[0][0], name) for key, name in attributes.items())


def complete_domain(entry: dict, prefix: str, source: str) -> dict:
    """A domain of domains.json from its name: prompt = prefix + name, instruction = `put the {} ` + name."""
    prompt = entry.get("prompt") or f"{prefix} {entry['name']}"
    instruction = entry.get("instruction") or f"put the {CLASS_SLOT} {entry['name']}"
    return {"name": entry["name"], "prompt": prompt, "instruction": instruction, "source": source}


def assign_domain(caption: str, names: list[str]) -> int:
    """The domain that a cleaned caption describes, by its place in `names`; -1 for none.

    A domain whose whole phrase is in the caption comes first, the longest of several; else the one with the largest
    share of its content words in the caption, if that is more than half of them.
    """
    key = f" {phrase_key(caption)} "
    whole = [place for place, name in enumerate(names) if f" {phrase_key(name)} " in key]
    if whole:
        return max(whole, key=lambda place: (len(names[place]), -place))
    words = set(caption.split())
    shares = []
    for name in names:
        own = set(phrase_key(name).split()) - PREPOSITIONS
        shares.append(len(own & words) / len(own) if own else 0.0)
    best = int(np.argmax(shares)) if shares else -1
    return best if shares and shares[best] > 0.5 else -1


# ---------------------------------------------------------------------------------------------------------------------
# a language model's answer


def class_phrase(superclass: str) -> str:
    """A pattern for how a prefix says the class, without its article: `{}`, or `{} bird` of `a photo of a {} bird`."""
    return rf"\{{\}}(?: {re.escape(superclass)}(?!\w))?" if superclass else r"\{\}"


def general_prefix(prefix: str, superclass: str) -> str:
    """How a prompt of no class in particular begins: `a photo of a bird` for `a photo of a {} bird`."""
    word = superclass or "thing"
    text = re.sub(class_phrase(superclass), word, prefix, count=1, flags=re.IGNORECASE)
    return re.sub(rf"\ban? (?={re.escape(word)})", "an " if word[0].lower() in "aeiou" else "a ", text)


def read_domain_lines(
    text: str, superclass: str, class_names: list[str], most: int, prefix: str = f"a {CLASS_SLOT}"
) -> tuple[list[dict], list[str]]:
    """The usable domains in a language model's answer, a line each, and why each other line is not.

    A line is used where it names the superclass once, no class, is no near copy of one above, and has 4 to 30 words.
    Its prompt says the class as the prefix does: `an animal` becomes `a {}`, or `a {} bird` of `a photo of a {} bird`.
    """
    superclass = " ".join(superclass.lower().split())
    article, noun = re.search(rf"(\ban? )?({class_phrase(superclass)})", prefix, re.IGNORECASE).groups()
    other_names = [name for name in class_names if name.lower() not in superclass]
    classes = name_pattern(other_names) if other_names else None
    slot = re.compile(rf"(?<!\w){re.escape(superclass)}(?!\w)", re.IGNORECASE)
    found, refused = [], []
    for raw in text.splitlines():
        line = re.sub(r"^\s*(?:\d+\s*[.):]|[-*•])\s*", "", raw).strip().strip("\"'“”*,").rstrip(".")
        line = " ".join(line.split())
        if not line:
            continue
        words = set(line.lower().split()) - ARTICLES
        if not 4 <= len(line.split()) <= 30:
            refused.append(f"{line[:60]!r}: not 4 to 30 words")
        elif len(slot.findall(line)) != 1:
            refused.append(f"{line[:60]!r}: does not say {superclass!r} once")
        elif classes and classes.search(line.lower()):
            refused.append(f"{line[:60]!r}: names a class")
        elif "{" in line or "}" in line:
            refused.append(f"{line[:60]!r}: holds a brace")
        elif any(len(words & other) / len(words | other) > 0.8 for other in (entry["words"] for entry in found)):
            refused.append(f"{line[:60]!r}: nearly a copy of one above")
        elif len(found) == most:
            refused.append(f"{line[:60]!r}: more than {most}")
        else:
            before, after = slot.split(line, maxsplit=1)
            name = after.strip() or before.strip()
            if name in (entry["name"] for entry in found):
                name = " ".join(f"{before}{after}".split())
            before = re.sub(r"\ban? $", article, before) if article else before
            found.append({"name": name, "prompt": f"{before}{noun}{after}", "words": words})
    return [{"name": entry["name"], "prompt": entry["prompt"]} for entry in found], refused


# ---------------------------------------------------------------------------------------------------------------------
# domains.json


def read_domains(path: Path) -> dict:
    """domains.json: `positive` (text), `negatives` (texts) and `domains`, each with name, prompt and instruction.

    Raises:
        UserError: not as described; a prompt without its one slot; two domains of one name.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("domains"), list):
        raise UserError(f"{path}: expected an object with a list domains")
    names = set()
    for number, domain in enumerate(content["domains"], 1):
        if not isinstance(domain, dict):
            raise UserError(f"{path} domain {number}: expected an object with {', '.join(DOMAIN_KEYS)}")
        for key in DOMAIN_KEYS:
            if not isinstance(domain.get(key), str) or not domain[key].strip():
                raise UserError(f"{path} domain {number}: {key} is {domain.get(key)!r}; expected a text")
        for key in ("prompt", "instruction"):
            slots = domain[key].count(CLASS_SLOT)
            if slots > 1 or (key == "prompt" and not slots):
                raise UserError(
                    f"{path} domain {number}: {key} {domain[key]!r} has {slots} slots {CLASS_SLOT}; expected one, "
                    "where the class name goes"
                )
        if domain["name"] in names:
            raise UserError(f"{path} domain {number}: {domain['name']!r} is there twice; expected each name once")
        names.add(domain["name"])
    if not names:
        raise UserError(f"{path}: no domain in it; expected one or more")
    negatives = content.setdefault("negatives", [])
    if not isinstance(content.setdefault("positive", ""), str):
        raise UserError(f"{path}: positive is {content['positive']!r}; expected a text")
    if not isinstance(negatives, list) or not all(isinstance(text, str) and text.strip() for text in negatives):
        raise UserError(f"{path}: expected a list negatives of texts")
    return content


def domain_of_prompt(entry: dict, prompt: str) -> str:
    """The domain that a prompt of prompts.json asks for, empty where it has none.

    Args:
        entry: a class of prompts.json, with `prompts` and perhaps `domains`, a name for each.
    """
    pairs = zip(entry["prompts"], entry.get("domains", []), strict=False)
    return next((name for text, name in pairs if text == prompt), "")


# ---------------------------------------------------------------------------------------------------------------------
# sources.csv: the domain that each training image has already


def write_source_domains(path: Path, rows: Iterable[dict]) -> None:
    """Write sources.csv from dictionaries with SOURCE_COLUMNS; the domain is empty where the caption has none."""
    text = io.StringIO()
    table = csv.DictWriter(text, SOURCE_COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def read_source_domains(path: Path) -> dict[str, str]:
    """The domain of each source, empty for none, by sources.csv.

    Raises:
        UserError: missing, not such a table, or a source that is there twice.
    """
    rows = list(read_csv(path, SOURCE_COLUMNS))
    if not rows:
        raise UserError(f"{path}: expected the columns {','.join(SOURCE_COLUMNS)}, and at least one row")
    found: dict[str, str] = {}
    for number, row in rows:
        if row["source"] in found:
            raise UserError(f"{path} row {number}: {row['source']} is there twice; expected each image once")
        found[row["source"]] = row["domain"]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# the data set's bias


def count_table(labels: np.ndarray, domains: np.ndarray, classes: int, count: int) -> np.ndarray:
    """Images of each class (rows) in each domain (columns, the last for none, -1): int (classes, count + 1)."""
    columns = np.where(domains < 0, count, domains)
    return np.bincount(labels * (count + 1) + columns, minlength=classes * (count + 1)).reshape(classes, count + 1)


def mutual_information(table: np.ndarray) -> float:
    """What the domain tells about the class, in bits: sum p(c, d) log2(p(c, d) / (p(c) p(d))) of a table of counts."""
    joint = table / table.sum()
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / expected[there])).sum())


def shuffled_information(
    labels: np.ndarray, domains: np.ndarray, classes: int, count: int, shuffles: int = 20
) -> float:
    """The mean mutual information, in bits, of domains shuffled among the images: what chance alone gives."""
    rng = np.random.default_rng(0)
    tables = (count_table(labels, rng.permutation(domains), classes, count) for _ in range(shuffles))
    return math.fsum(mutual_information(table) for table in tables) / shuffles
