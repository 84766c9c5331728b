"""The files of a spectrum: hard.csv, prompts.json, the spectrum folder and scores.csv, read, checked and joined.

A spectrum folder holds plan.json (everything that determines the images) and a folder for each shard: images and a
metadata.jsonl with one row an image, as the Hugging Face imagefolder loader reads it. Levels are whole percents, 0
(text only) to 100 (the real image). Classes go by index; their names are for prompts and people.

Beside plan.json there may be extra-00000.csv and so on: further work units, with the columns source, level, seed and
prompt (empty: one of the class's prompts, as in the plan). A shard's failures.jsonl lists what its last run could not
draw, and why.
"""

from __future__ import annotations

import csv
import fcntl
import gc
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from runtime.cli import UserError
from runtime.runs import digest_files, digest_int, read_json

SHORT_COLUMNS = ["label", "class_name", "level", "made", "kept", "short"]
DISTANCE_COLUMNS = ["level", "images", "count", "real_count", "mmd", "frechet", "frechet_floor"]
HARD_COLUMNS = ["source", "label", "class_name", "reason", "score"]
EXTRA_COLUMNS = ["source", "level", "seed", "prompt"]
SCORE_COLUMNS = ["file_name", "text_score", "image_score", "kept", "reason"]
IMAGE_SUFFIXES = (".png", ".jpg", ".webp")
PLAN_KEYS = {"dataset", "imb_ratio", "data_seed", "hard_classes", "levels"}
ROW_FIELDS = {
    "file_name": str,
    "source": str,
    "source_sha256": str,
    "label": int,
    "class_name": str,
    "level": int,
    "seed": int,
    "redraws": int,
    "prompt": str,
    "text_guidance": float,
    "steps": int,
    "start_timestep": int,
    "width": int,
    "height": int,
    "generator": str,
    "revision": str,
    "scheduler": str,
}
SCORED_FIELDS = {"text_score": float, "image_score": float}  # what a spectrum drawn with --score has besides


@dataclass(frozen=True)
class Hard:
    """A hard training image: a row of hard.csv."""

    source: str
    label: int
    class_name: str


class Unit(NamedTuple):
    """A work unit: one image to draw. Its noise depends on these three and on nothing else."""

    source: str
    level: int
    seed: int

    def noise_seed(self, redraw: int = 0) -> int:
        """The seed of the unit's noise; each redraw has another."""
        return digest_int("noise", self.source, self.level, self.seed, redraw)

    @property
    def file_name(self) -> str:
        """A name that holds no part of the source's, which may be no safe file name."""
        source = hashlib.blake2b(self.source.encode(), digest_size=6).hexdigest()
        return f"{source}_level{self.level:03d}_seed{self.seed:02d}.png"


def write_hard(path: Path, rows: Iterable[dict]) -> None:
    """Write hard.csv from dictionaries with HARD_COLUMNS."""
    _write_csv(path, HARD_COLUMNS, rows)


def read_hard(path: Path) -> list[Hard]:
    """The hard images of hard.csv.

    Raises:
        UserError: no rows, a column missing, a label that is no whole number, a class without a name, an image named
            twice.
    """
    rows, seen, names = [], set(), {}
    for number, row in _read_csv(path, HARD_COLUMNS):
        if not row["label"].isdecimal():
            raise UserError(f"{path} row {number}: label {row['label']!r}: expected a class index")
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
        rows.append(Hard(row["source"], int(row["label"]), row["class_name"]))
    if not rows:
        raise UserError(f"{path}: no hard images; expected at least one row")
    return rows


def append_probabilities(path: Path, rows: Iterable[tuple[str, float | None]]) -> None:
    """Append (source, probability in [0, 1], None where the image cannot be read) to JSON lines, and to the disk."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a killed run left half a line: end it, so that the next row does not join it
                file.write(b"\n")
        for source, value in rows:
            row = {"source": source, "probability": value}
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_probabilities(path: Path) -> dict[str, float | None]:
    """What `append_probabilities` wrote, by source; a later row replaces an earlier one, half a line is no row."""
    found = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line.decode())
            found[row["source"]] = row["probability"]
        except (ValueError, TypeError, KeyError):
            continue
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
        if not key.isdecimal() or not isinstance(entry, dict):
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


# Revisions of the generators that older versions of this project shipped, which had learnt time backwards.
BACKWARDS = {"356c3b0da59fa41b", "d8b5d0b9974076ee"}


def read_plan(folder: Path) -> dict:
    """plan.json of a spectrum folder.

    Raises:
        UserError: there is none, or its images are those of a generator that had learnt time backwards.
    """
    if not (folder / "plan.json").is_file():
        raise UserError(f"{folder}: no plan.json there; expected a spectrum folder made by generate_spectrum.py")
    plan = read_json(folder / "plan.json")
    missing = PLAN_KEYS - set(plan) if isinstance(plan, dict) else PLAN_KEYS
    if missing:
        raise UserError(f"{folder / 'plan.json'}: lacks {', '.join(sorted(missing))}; expected a plan of this version")
    if plan.get("revision") in BACKWARDS:
        raise UserError(
            f"{folder}: drawn with the {plan['generator']} of an older version of this project, which had been trained "
            "with the noise schedule reversed; expected a spectrum drawn anew"
        )
    return plan


def describe_clip(name: str) -> dict[str, str]:
    """What tells one CLIP's scores from another's: `clip`, its name, and `clip_digest`, of the files of a folder.

    A folder may move or be trained again: its content counts, not its place.
    """
    folder = Path(name)
    if not folder.is_dir():
        return {"clip": name, "clip_digest": ""}
    return {
        "clip": folder.name,
        "clip_digest": digest_files(sorted(path for path in folder.glob("*") if path.is_file())),
    }


def read_rows(folder: Path, decode: bool = False) -> list[dict]:
    """The rows of all shards; `file_name` is relative to `folder`.

    A row whose image is missing (or, with `decode`, damaged) is no row, nor is a line that a kill left unfinished.
    """
    rows, seen, there = [], set(), _image_names(folder)
    for _, _, row in _read_lines(folder):
        if row and row["file_name"] in there and row["file_name"] not in seen:
            if not (decode and not decodes(folder / row["file_name"])):
                seen.add(row["file_name"])
                rows.append(row)
    return rows


def _image_names(folder: Path) -> set[str]:
    """The files of all shards, relative to `folder`: a network disk lists a shard sooner than it finds each file."""
    return {f"{shard.name}/{name}" for shard in folder.glob("shard-*/") for name in os.listdir(shard)}


def _read_lines(folder: Path) -> Iterator[tuple[Path, int, dict | None]]:
    """Every line of every metadata.jsonl: its file, number, and row, with `file_name` relative to `folder`.

    The row is None where the line is none.
    """
    for path in sorted(folder.glob("shard-*/metadata.jsonl")):
        with path.open("rb") as file:  # bytes, for a name may hold other line ends
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line.decode())
                except ValueError:  # half a line, which may end within a letter
                    row = None
                if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                    yield path, number, None
                else:
                    name = f"{path.parent.name}/{Path(row['file_name']).name}"
                    yield path, number, row | {"file_name": name}


def drawn_units(folder: Path, wanted: Collection[Unit]) -> dict[Unit, str]:
    """Those of the wanted units that any shard has drawn, and the image of each; not looked into: `done_units` does."""
    found, there = {}, _image_names(folder)
    for _, _, row in _read_lines(folder):
        unit = Unit(row.get("source"), row.get("level"), row.get("seed")) if row else None
        if unit in wanted and row["file_name"] in there:
            found[unit] = row["file_name"]
    return found


def done_units(folder: Path, wanted: Collection[Unit], delete: bool = True) -> set[Unit]:
    """Those of the wanted units whose images any shard has drawn and that decode; with `delete` damaged ones go."""
    found = drawn_units(folder, wanted)
    with ThreadPoolExecutor() as pool:
        whole = list(pool.map(lambda name: decodes(folder / name), found.values()))
    for name, fine in zip(found.values(), whole, strict=True):
        if delete and not fine:  # its row is then no row, in whichever shard it stands
            (folder / name).unlink(missing_ok=True)
    return {unit for unit, fine in zip(found, whole, strict=True) if fine}


def decodes(path: Path) -> bool:
    """Whether an image file is whole."""
    return image_size(path) is not None


def image_size(path: Path) -> tuple[int, int] | None:
    """Width and height of an image file that is whole, else None."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.size
    except (OSError, ValueError, SyntaxError):
        return None


@contextmanager
def claim(folder: Path, shard: int, shards: int, batch_size: int) -> Iterator[Path]:
    """Hold a shard of a spectrum folder, so that no other process draws the same images, and give its folder.

    The number of shards and the batch size, which decide who draws what, may change from run to run, but not while
    another process is at work.

    Raises:
        UserError: another process holds this shard, or one of another number of shards or another batch size.
    """
    place = folder / f"shard-{shard:05d}"
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("a") as own, (folder / ".shards").open("a+") as common:
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--shard {shard}/{shards}: another process is drawing {place}; wait for it, or take another shard"
            ) from None
        try:
            fcntl.flock(common, fcntl.LOCK_EX | fcntl.LOCK_NB)
            common.truncate(0)
            common.write(f"{shards} shards and batches of {batch_size}")
            common.flush()
        except BlockingIOError:  # others are at work
            pass
        fcntl.flock(common, fcntl.LOCK_SH)
        common.seek(0)
        at_work = common.read()
        if at_work != f"{shards} shards and batches of {batch_size}":
            raise UserError(
                f"--shard {shard}/{shards}, --batch-size {batch_size}: {folder} is being drawn in {at_work}; expected "
                "the same, or to wait until those processes have ended"
            )
        try:
            yield place
        finally:
            if not (folder / "plan.json").exists():  # ended before it began: leave nothing behind
                (place / ".lock").unlink()
                if not any(place.iterdir()):
                    place.rmdir()
                if [path.name for path in folder.iterdir()] == [".shards"]:
                    (folder / ".shards").unlink()
                    folder.rmdir()


def add_extra(folder: Path, path: Path, known: Collection[str]) -> None:
    """Take the work units of a CSV file into a spectrum's folder, once. It is checked first.

    Raises:
        UserError: as `read_extra`.
    """
    read_extra([path], known)
    there = sorted(folder.glob("extra-*.csv"))
    if any(other.read_bytes() == path.read_bytes() for other in there):
        return
    beside = folder / f".extra.{os.getpid()}.tmp"
    beside.write_bytes(path.read_bytes())
    for number in range(len(there), 100_000):
        try:
            os.link(beside, folder / f"extra-{number:05d}.csv")  # fails where another process has just taken it
            break
        except FileExistsError:
            if (folder / f"extra-{number:05d}.csv").read_bytes() == path.read_bytes():
                break
    beside.unlink()


def _read_unit(path: Path, number: int, row: dict[str, str]) -> Unit:
    if not row["level"].isdecimal() or int(row["level"]) > 99 or not row["seed"].isdecimal():
        raise UserError(f"{path} row {number}: expected a level from 0 to 99 and a seed of 0 or more, whole numbers")
    return Unit(row["source"], int(row["level"]), int(row["seed"]))


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
        for number, row in _read_csv(path, EXTRA_COLUMNS[:3]):
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


def check(folder: Path) -> tuple[int, list[str]]:
    """Validate a spectrum folder: plan.json, every row of every metadata.jsonl, and every image.

    Returns:
        How many images are right, and a line for each thing that is wrong. Half a line that a kill left, and the row of
        an image that is gone, are not wrong: such images are only not drawn yet.

    Raises:
        UserError: the folder is no spectrum.
    """
    plan, wrong = read_plan(folder), []
    fields = ROW_FIELDS | (SCORED_FIELDS if plan.get("score") else {})
    rows: dict[str, dict] = {}
    units: dict[Unit, str] = {}
    for path, number, row in _read_lines(folder):
        if row is None or not (folder / row["file_name"]).is_file():
            continue
        name = row["file_name"]
        bad = [f"{field} is {row.get(field)!r}" for field, kind in fields.items() if type(row.get(field)) is not kind]
        bad += [
            f"{field} is {row[field]}, no cosine"
            for field in fields.keys() & SCORED_FIELDS
            if not bad and not -1.001 <= row[field] <= 1.001
        ]
        if bad:
            wrong.append(f"{path} row {number}: {', '.join(bad)}")
            continue
        unit = Unit(row["source"], row["level"], row["seed"])
        if rows.setdefault(name, row) != row:
            wrong.append(f"{path} row {number}: {name} has another row, which differs")
        elif units.setdefault(unit, name) != name:
            wrong.append(f"{path} row {number}: {name} is the same work unit as {units[unit]}")
        if Path(name).stem != Path(unit.file_name).stem:
            wrong.append(f"{path} row {number}: {name} should be called {unit.file_name}")
        if not 0 <= row["level"] <= 99 or row["label"] not in plan["hard_classes"]:
            wrong.append(f"{path} row {number}: level {row['level']} of class {row['label']} is not in the plan")
        wrong += [
            f"{path} row {number}: {field} is {row[field]!r}, the plan has {plan[field]!r}"
            for field in ("generator", "revision", "text_guidance")
            if field in plan and row[field] != plan[field]
        ]
    with ThreadPoolExecutor() as pool:
        sizes = pool.map(lambda name: image_size(folder / name), rows)
        for (name, row), size in zip(rows.items(), sizes, strict=True):
            if size is None:
                wrong.append(f"{folder / name}: does not decode")
            elif size != (row["width"], row["height"]):
                wrong.append(f"{folder / name}: is {size[0]}x{size[1]}, its row has {row['width']}x{row['height']}")
    for path in sorted(folder.glob("shard-*/*")):
        if path.suffix in IMAGE_SUFFIXES and f"{path.parent.name}/{path.name}" not in rows:
            wrong.append(f"{path}: has no row")
    return len(rows), wrong


class RowWriter:
    """Appends rows to a shard's metadata.jsonl, each batch flushed to the disk before the next is begun."""

    def __init__(self, shard: Path, name: str = "metadata.jsonl"):
        shard.mkdir(parents=True, exist_ok=True)
        path = shard / name
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self.file = path.open("a", encoding="utf-8")
        if torn:  # a killed run left half a line: end it, so that the next row does not join it
            self.file.write("\n")

    def append(self, rows: Iterable[dict]) -> None:
        """Write rows, whose images must already stand under their final names."""
        for row in rows:
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


@contextmanager
def _without_garbage_collection():
    """For what reads 100,000s of rows that all stay: looking for garbage among them takes a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@_without_garbage_collection()
def read_made(folder: Path) -> list[dict]:
    """What CLIPScore filtering needs of every row of all shards, also of those whose image is gone.

    Each has `file_name` (relative to `folder`), `source`, `label`, `class_name`, `level`, `seed` and `prompt`; one that
    was scored when it was drawn has `text_score` and `image_score` too. A file with two rows counts once, as in
    `read_rows`; a line that a kill left unfinished is no row.

    Raises:
        UserError: a row lacks one of these, or two rows of one file disagree on them.
    """
    fields = ("source", "label", "class_name", "level", "seed", "prompt")
    values_of, kinds = itemgetter(*fields), [ROW_FIELDS[field] for field in fields]
    made: dict[str, dict] = {}
    decoder = json.JSONDecoder()
    for shard in sorted(folder.glob("shard-*/metadata.jsonl")):
        for number, line in enumerate(shard.read_bytes().split(b"\n"), 1):  # as in read_rows
            try:
                line = line.decode()
                row, end = decoder.raw_decode(line)  # twice as fast as json.loads
            except ValueError:
                continue
            if end != len(line.rstrip()) or not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                continue
            name = f"{shard.parent.name}/{os.path.basename(row['file_name'])}"
            try:
                source, label, class_name, level, seed, prompt = values = values_of(row)
            except KeyError as error:
                raise UserError(
                    f"{shard} row {number}: has no {error.args[0]}; expected a spectrum of this version"
                ) from None
            if list(map(type, values)) != kinds:
                wrong = next(field for field, kind in zip(fields, kinds, strict=True) if type(row[field]) is not kind)
                raise UserError(
                    f"{shard} row {number}: {wrong} is {row[wrong]!r}; expected a {ROW_FIELDS[wrong].__name__}, as in "
                    "a spectrum of this version"
                )
            first = made.get(name)
            if first is None:
                made[name] = {
                    "file_name": name,
                    "source": sys.intern(source),  # 200,000 rows share few sources, names and prompts
                    "label": label,
                    "class_name": sys.intern(class_name),
                    "level": level,
                    "seed": seed,
                    "prompt": sys.intern(prompt),
                }
                if "text_score" in row:
                    made[name] |= {field: _score(shard, number, row, field) for field in SCORED_FIELDS}
            elif any(first[field] != row[field] for field in ("source", "label", "level", "seed")):
                raise UserError(
                    f"{shard} row {number}: {row['file_name']} has another row, of another source, class, level or "
                    "seed; expected one row a file"
                )
    return list(made.values())


def _score(path: Path, number: int, row: dict, field: str) -> float:
    if type(row.get(field)) is not float or not math.isfinite(row[field]):
        raise UserError(f"{path} row {number}: {field} is {row.get(field)!r}; expected a number")
    return row[field]


def write_top_up(path: Path, rows: Iterable[dict]) -> None:
    """Write a plan of images to draw from dictionaries with EXTRA_COLUMNS."""
    _write_csv(path, EXTRA_COLUMNS, rows)


def read_top_up(path: Path) -> list[tuple[Unit, str]]:
    """The images that a plan with EXTRA_COLUMNS asks for, each with its prompt.

    Raises:
        UserError: a column missing, a level or seed that is no whole number, or an image asked for twice.
    """
    asked: dict[Unit, str] = {}
    for number, row in _read_csv(path, EXTRA_COLUMNS):
        unit = _read_unit(path, number, row)
        if unit in asked:
            raise UserError(f"{path} row {number}: the same image is asked for above; expected each once")
        asked[unit] = row["prompt"]
    return list(asked.items())


def write_short(path: Path, rows: Iterable[dict]) -> None:
    """Write short.csv from dictionaries with SHORT_COLUMNS."""
    _write_csv(path, SHORT_COLUMNS, rows)


def write_distances(path: Path, rows: Iterable[dict]) -> None:
    """Write distance.csv from dictionaries with DISTANCE_COLUMNS."""
    _write_csv(path, DISTANCE_COLUMNS, rows)


def write_scores(path: Path, rows: Iterable[dict]) -> None:
    """Write scores.csv from dictionaries with SCORE_COLUMNS."""
    _write_csv(path, SCORE_COLUMNS, rows)


@_without_garbage_collection()
def read_scores(path: Path) -> dict[str, dict]:
    """scores.csv by file name: floats `text_score` and `image_score`, bool `kept`, str `reason`.

    Raises:
        UserError: missing, a value that is no score, a kept image without a score, or a file named twice.
    """
    scores: dict[str, dict] = {}
    for number, row in _read_csv(path, SCORE_COLUMNS):
        name, kept, reason = row["file_name"], row["kept"], row["reason"]
        if name in scores:
            raise UserError(f"{path} row {number}: {name} is there twice; expected one row a file")
        try:
            text, image = float(row["text_score"]), float(row["image_score"])
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


def kept_rows(folder: Path, levels: Iterable[int]) -> list[dict]:
    """The rows of a filtered spectrum that training may use: those of `levels` that scores.csv keeps.

    Raises:
        UserError: not filtered yet, or a level without one kept image.
    """
    if not (folder / "scores.csv").is_file():
        raise UserError(f"{folder}: no scores.csv there; run filter_clipscore.py --spectrum {folder}")
    scores = read_scores(folder / "scores.csv")
    wanted = set(levels)
    made, rows = Counter(), []
    for row in read_rows(folder):
        made[row["level"]] += 1
        if row["level"] in wanted and scores.get(row["file_name"], {}).get("kept"):
            rows.append(row)
    for level in sorted(wanted - {row["level"] for row in rows}):
        raise UserError(
            f"--levels {level}: {folder} has no accepted image of this level (of {made[level]} made); "
            f"expected levels with accepted images, of {sorted(made)}"
        )
    return rows


def _write_csv(path: Path, columns: list[str], rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"{path}: a row has {sorted(row)}; expected {columns}")
            writer.writerow([row[column] for column in columns])
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _read_csv(path: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with their line's number in the table (the header is row 1)."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file ({error})") from None
    found = rows[0] if rows else []
    missing = [column for column in columns if column not in found]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}; expected {','.join(columns)}")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(found):
            raise UserError(f"{path} row {number}: expected {len(found)} values")
        yield number, dict(zip(found, row))  # noqa: B905  (as long as each other; strict costs a third more)
