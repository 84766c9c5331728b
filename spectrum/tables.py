"""Tables between the steps: hard.csv, prompts.json, scores.csv, further units, and what the filter finds short.

Classes go by index; their names are for prompts and people. Levels are whole percents, 0 (text only) to 100 (the real
image).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from runtime.cli import UserError
from runtime.files import read_json, without_garbage_collection, write_csv, write_texts
from runtime.retry import append_bytes, read_bytes
from runtime.text import MALFORMED, parse_whole, read_columns, read_csv
from spectrum.units import Unit

SHORT_COLUMNS = ["label", "class_name", "level", "made", "kept", "short"]
DISTANCE_COLUMNS = ["level", "images", "count", "real_count", "mmd", "frechet", "frechet_floor"]
HARD_COLUMNS = ["source", "label", "class_name", "reason", "score"]
EXTRA_COLUMNS = ["source", "level", "seed", "prompt"]
SCORE_COLUMNS = ["file_name", "text_score", "image_score", "kept", "reason"]


@dataclass(frozen=True)
class Hard:
    """A hard training image: a row of hard.csv.

    Attributes:
        mask: file of what stays as it is when it is edited, from the optional column of that name; empty for none.
    """

    source: str
    label: int
    class_name: str
    mask: str = ""


def write_hard(path: Path, rows: Iterable[dict]) -> None:
    """Write hard.csv from dictionaries with HARD_COLUMNS."""
    write_csv(path, HARD_COLUMNS, rows)


def read_hard(path: Path) -> list[Hard]:
    """The hard images of hard.csv.

    Raises:
        UserError: no rows, a column missing, a label that is no whole number, a class without a name, an image named
            twice.
    """
    rows, seen, names = [], set(), {}
    for number, row in read_csv(path, HARD_COLUMNS):
        label = parse_whole(row["label"])
        if label is None:
            raise UserError(f"{path} row {number}: label {row['label'][:40]!r}: expected a class index")
        if not row["class_name"].strip():
            raise UserError(f"{path} row {number}: the class name of class {row['label']} is empty; expected a name")
        if names.setdefault(row["label"], row["class_name"]) != row["class_name"]:
            raise UserError(
                f"{path} row {number}: class {row['label']} is {row['class_name']!r} here, "
                f"{names[row['label']]!r} above; expected one name a class"
            )
        if row["source"] in seen:
            raise UserError(f"{path} row {number}: {row['source']} is there twice; expected each image once")
        seen.add(row["source"])
        rows.append(Hard(row["source"], label, row["class_name"], row.get("mask", "")))
    if not rows:
        raise UserError(f"{path}: no hard images; expected at least one row")
    return rows


def append_probabilities(path: Path, rows: Iterable[tuple[str, float | None]]) -> None:
    """Append (source, probability in [0, 1], None where the image cannot be read) to JSON lines, and to the disk."""
    with path.open("ab+", buffering=0) as file:
        end = b""
        if file.tell():
            file.seek(-1, os.SEEK_END)
            end = b"" if file.read(1) == b"\n" else b"\n"  # a killed run left half a line, which no row may join
        lines = (json.dumps({"source": source, "probability": value}, ensure_ascii=False) for source, value in rows)
        append_bytes(file, end + "".join(f"{line}\n" for line in lines).encode())


def read_probabilities(path: Path) -> dict[str, float | None]:
    """What `append_probabilities` wrote, by source; a later row replaces an earlier one, half a line is no row.

    Raises:
        UserError: a row whose probability is none.
    """
    found = {}
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        try:
            row = json.loads(line.decode())
            source, value = row["source"], row["probability"]
        except MALFORMED:
            continue
        if not isinstance(source, str) or not (value is None or (type(value) is float and 0 <= value <= 1)):
            raise UserError(f"{path} row {number}: expected a source and a probability from 0 to 1, or null")
        found[source] = value
    return found


def read_prompts(path: Path, labels: Iterable[int]) -> dict[int, dict]:
    """prompts.json by class index; each class has `class_name`, `score_prompt` and a list `prompts`.

    Raises:
        UserError: not as described, or one of `labels` has no prompt.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object with a class index for each key")
    prompts = {}
    for key, entry in content.items():
        if parse_whole(key) is None or not isinstance(entry, dict):
            raise UserError(f"{path} key {key!r}: expected a class index and an object")
        if not isinstance(entry.get("score_prompt"), str) or not isinstance(entry.get("class_name"), str):
            raise UserError(f"{path} class {key}: expected texts class_name and score_prompt")
        if not entry["class_name"].strip() or not entry["score_prompt"].strip():
            raise UserError(f"{path} class {key}: class_name or score_prompt is empty; expected texts")
        texts = entry.get("prompts")
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"{path} class {key}: expected a list prompts of texts that are not empty")
        domains = entry.get("domains", texts)
        if not isinstance(domains, list) or not all(isinstance(name, str) for name in domains):
            raise UserError(f"{path} class {key}: expected a list domains of names")
        if len(domains) != len(texts):
            raise UserError(
                f"{path} class {key}: {len(domains)} domains for {len(texts)} prompts; expected one for each"
            )
        prompts[int(key)] = entry
    missing = sorted(label for label in set(labels) if not prompts.get(label, {}).get("prompts"))
    if missing:
        raise UserError(
            f"{path}: no prompt for class {', '.join(map(str, missing[:5]))}"
            f"{' and others' if len(missing) > 5 else ''}; run write_prompts.py"
        )
    return prompts


def stop_on_other_names(
    path: Path, prompts: dict[int, dict], names: dict[int, str], where: Path, more: str = ""
) -> None:
    """Raise UserError where prompts.json calls a class otherwise than `where` does: it is another data set's.

    Args:
        names: class names of `where` by index.
        more: what else is expected.
    """
    for label in names.keys() & prompts.keys():
        if prompts[label]["class_name"] != names[label]:
            raise UserError(
                f"{path} class {label} is {prompts[label]['class_name']!r} there, {names[label]!r} in {where}; "
                f"expected prompts of the same data set{more}"
            )


def _read_unit(path: Path, number: int, row: dict[str, str]) -> Unit:
    level, seed = parse_whole(row["level"]), parse_whole(row["seed"])
    if level is None or level > 99 or seed is None:
        raise UserError(f"{path} row {number}: expected a level from 0 to 99 and a seed of 0 or more, whole numbers")
    return Unit(row["source"], level, seed)


def read_extra(paths: Iterable[Path], known: Collection[str]) -> list[dict[Unit, str]]:
    """Further work units, with the columns EXTRA_COLUMNS: a dictionary for each file.

    It holds each unit's prompt, empty where the file gives none. A unit that an earlier file names is left out.

    Args:
        known: the sources that there are.

    Raises:
        UserError: a source that is not known, a level or seed that is none, a unit with two different prompts.
    """
    extra: list[dict[Unit, str]] = []
    before: dict[Unit, str] = {}
    for path in paths:
        extra.append({})
        for number, row in read_csv(path, EXTRA_COLUMNS[:3]):
            if row["source"] not in known:
                raise UserError(f"{path} row {number}: source {row['source']!r}: expected one of hard.csv")
            unit, prompt = _read_unit(path, number, row), row.get("prompt", "")
            if unit not in before:
                before[unit] = extra[-1][unit] = prompt
            elif before[unit] != prompt:
                raise UserError(
                    f"{path} row {number}: {unit.source} at level {unit.level}, seed {unit.seed}, is there before with "
                    f"the prompt {before[unit]!r}; expected another seed for another prompt"
                )
    return extra


def write_top_up(path: Path, rows: Iterable[dict]) -> None:
    """Write a plan of images to draw from dictionaries with EXTRA_COLUMNS."""
    write_csv(path, EXTRA_COLUMNS, rows)


def read_top_up(path: Path) -> list[tuple[Unit, str]]:
    """The images that a plan with EXTRA_COLUMNS asks for, each with its prompt.

    Raises:
        UserError: a column missing, a level or seed that is no whole number, or an image asked for twice.
    """
    asked: dict[Unit, str] = {}
    for number, row in read_csv(path, EXTRA_COLUMNS):
        unit = _read_unit(path, number, row)
        if unit in asked:
            raise UserError(f"{path} row {number}: the same image is asked for above; expected each once")
        asked[unit] = row["prompt"]
    return list(asked.items())


def write_short(path: Path, rows: Iterable[dict]) -> None:
    """Write short.csv from dictionaries with SHORT_COLUMNS."""
    write_csv(path, SHORT_COLUMNS, rows)


def write_distances(path: Path, rows: Iterable[dict]) -> None:
    """Write distance.csv from dictionaries with DISTANCE_COLUMNS."""
    write_csv(path, DISTANCE_COLUMNS, rows)


def write_scores(path: Path, names: Iterable[str], scores: dict[str, dict]) -> None:
    """Write scores.csv of these files, in their order, from what `read_scores` gives; those without are left out."""
    write_texts(
        path,
        SCORE_COLUMNS,
        (
            (name, f"{entry['text_score']:.6f}", f"{entry['image_score']:.6f}", "01"[entry["kept"]], entry["reason"])
            for name in names
            if (entry := scores.get(name))
        ),
    )


@without_garbage_collection()
def read_scores(path: Path) -> dict[str, dict]:
    """scores.csv by file name: floats `text_score` and `image_score`, bool `kept`, str `reason`.

    Raises:
        UserError: missing, a value that is no score, a kept image without a score, or a file named twice.
    """
    scores: dict[str, dict] = {}
    for number, (name, text, image, kept, reason) in read_columns(path, SCORE_COLUMNS):
        if name in scores:
            raise UserError(f"{path} row {number}: {name} is there twice; expected one row a file")
        try:
            text, image = float(text), float(image)
        except ValueError:
            raise UserError(f"{path} row {number}: expected numbers in text_score and image_score") from None
        if kept not in ("0", "1"):
            raise UserError(f"{path} row {number}: kept is {kept!r}; expected 0 or 1")
        if not math.isfinite(text + image) and (kept == "1" or not reason):
            raise UserError(
                f"{path} row {number}: the score of {name} is not finite; expected a number, or kept 0 and a reason"
            )
        scores[name] = {"text_score": text, "image_score": image, "kept": kept == "1", "reason": sys.intern(reason)}
    return scores
