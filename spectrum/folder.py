"""The spectrum folder: plan.json, its shards of images and rows, read, checked and joined with scores.csv.

A spectrum folder holds plan.json (everything that determines the images) and a folder for each shard: images and a
metadata.jsonl with one row an image, as the Hugging Face imagefolder loader reads it.

Beside plan.json there may be extra-00000.csv and so on: further work units, with the columns source, level, seed and
prompt (empty: one of the class's prompts, as in the plan); and sizes-00000.csv and so on: width and height of the
sources, by which every process lays out its batches, whatever it can read itself. A shard's failures.jsonl lists what
its last run could not draw, and why.
"""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path

from loaders.pictures import decodes, image_size
from runtime.cli import UserError
from runtime.files import (
    add_numbered,
    digest_files,
    read_json,
    remove_unfinished,
    take_lock,
    without_garbage_collection,
)
from runtime.retry import read_bytes, retry
from runtime.text import parse_row, parse_whole, read_csv
from spectrum.edits import EDITS, kept_edits
from spectrum.tables import read_extra, read_scores
from spectrum.units import ROW_FIELDS, SCORED_FIELDS, Unit

SIZE_COLUMNS = ["source", "width", "height"]
IMAGE_SUFFIXES = (".png", ".jpg", ".webp")
PLAN_KEYS = {"dataset", "imb_ratio", "data_seed", "hard_classes", "levels"}
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
    for name in ("hard_classes", "levels"):
        if not isinstance(plan[name], list) or not all(type(value) is int for value in plan[name]):
            raise UserError(f"{folder / 'plan.json'}: {name} is {plan[name]!r:.40}; expected a list of whole numbers")
    if plan.get("revision") in BACKWARDS:
        raise UserError(
            f"{folder}: drawn with the {plan['generator']} of an older version of this project, which had been trained "
            "with the noise schedule reversed; expected a spectrum drawn anew"
        )
    return plan


def describe_clip(name: str) -> dict[str, str]:
    """The identity of a CLIP: `clip`, its name, and `clip_digest`, a digest of its files where they are named.

    They may move or be trained again: their content counts, not their place.
    """
    folder, (architecture, _, weights) = Path(name), name.partition(":")
    if folder.is_dir():
        files = sorted(path for path in folder.glob("*") if path.is_file())
        return {"clip": folder.name, "clip_digest": digest_files(files)}
    if weights and Path(weights).is_file():
        return {"clip": f"{architecture}:{Path(weights).name}", "clip_digest": digest_files([Path(weights)])}
    return {"clip": name, "clip_digest": ""}


def read_rows(folder: Path, decode: bool = False) -> list[dict]:
    """The rows of all shards; `file_name` is relative to `folder`.

    Rows whose image is missing (or, with `decode`, damaged) and lines that a kill left unfinished are left out. A unit
    that is in two shards counts once.
    """
    rows, seen, there = [], set(), image_names(folder)
    for _, _, row in _read_lines(folder):
        if row and row["file_name"] in there and _unit_key(row) not in seen:
            if not (decode and not decodes(folder / row["file_name"])):
                seen.add(_unit_key(row))
                rows.append(row)
    return rows


def _unit_key(row: dict) -> tuple | str:
    """The key of an image: its unit, which may be in two shards, or else its file."""
    unit = row.get("source"), row.get("level"), row.get("seed")
    return row["file_name"] if None in unit else unit


def image_names(folder: Path) -> set[str]:
    """The files of all shards, relative to `folder`: a network disk lists a shard sooner than it finds each file."""
    there = set()
    for shard in folder.glob("shard-*/"):
        beginning = f"{shard.name}/"
        there.update([beginning + name for name in retry(partial(os.listdir, shard))])
    return there


def _read_lines(folder: Path) -> Iterator[tuple[Path, int, dict | None]]:
    """Every line of every metadata.jsonl: its file, number, and row, with `file_name` relative to `folder`.

    The row is None where the line is none.
    """
    for path in sorted(folder.glob("shard-*/metadata.jsonl")):
        beginning = f"{path.parent.name}/"
        for number, line in enumerate(io.BytesIO(read_bytes(path)), 1):  # bytes, for a name may hold other line ends
            row = parse_row(line)
            if row is None or not isinstance(row.get("file_name"), str):
                yield path, number, None
            else:
                row["file_name"] = beginning + row["file_name"].rpartition("/")[2]
                yield path, number, row


def drawn_units(folder: Path, wanted: Collection[Unit]) -> dict[Unit, str]:
    """The wanted units that any shard has drawn, and the image of each, which is not decoded (`done_units` does)."""
    found, there = {}, image_names(folder)
    for _, _, row in _read_lines(folder):
        unit = Unit(row.get("source"), row.get("level"), row.get("seed")) if row else None
        if unit in wanted and row["file_name"] in there:
            found[unit] = row["file_name"]
    return found


def done_units(folder: Path, wanted: Collection[Unit], delete: bool = True) -> set[Unit]:
    """The wanted units whose image exists in a shard and decodes; with `delete`, damaged images are deleted."""
    found = drawn_units(folder, wanted)
    with ThreadPoolExecutor() as pool:
        whole = list(pool.map(lambda name: decodes(folder / name), found.values()))
    for name, fine in zip(found.values(), whole, strict=True):
        if delete and not fine:  # without its image the row no longer counts, in any shard
            (folder / name).unlink(missing_ok=True)
    return {unit for unit, fine in zip(found, whole, strict=True) if fine}


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
        # Hold the shard.
        try:
            take_lock(own)
        except BlockingIOError:
            raise UserError(
                f"--shard {shard}/{shards}: another process is drawing {place}; wait for it, or take another shard"
            ) from None
        remove_unfinished(place)
        # The first process notes how the work is shared out; the others compare.
        try:
            take_lock(common)
            remove_unfinished(folder)
            common.truncate(0)
            common.write(f"{shards} shards and batches of {batch_size}")
            common.flush()
        except BlockingIOError:  # others are at work
            pass
        take_lock(common, shared=True, wait=True)
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
                left = list(folder.iterdir())
                if all(path.name == ".shards" or path.match("sizes-*.csv") for path in left):
                    for path in left:
                        path.unlink()
                    folder.rmdir()


def add_extra(folder: Path, path: Path, known: Collection[str]) -> None:
    """Take the work units of a CSV file into a spectrum's folder, once. It is checked first.

    Raises:
        UserError: as `read_extra`.
    """
    read_extra([path], known)
    while not add_numbered(folder, "extra", read_bytes(path)):
        pass  # another process has just taken the number


def freeze_sizes(folder: Path, sizes: dict[str, tuple[int, int]]) -> bool:
    """Note width and height of sources, by which all processes from now on lay out their batches.

    Returns:
        False where another process has noted sizes at the same time: nothing is noted then.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SIZE_COLUMNS)
    writer.writerows((source, *size) for source, size in sizes.items())
    return add_numbered(folder, "sizes", text.getvalue().encode())


def read_frozen_sizes(folder: Path) -> list[dict[str, tuple[int, int]]]:
    """The sizes that `freeze_sizes` noted: width and height by source, a dictionary for each time.

    Raises:
        UserError: a size that is no pair of whole numbers.
    """
    frozen = []
    for path in sorted(folder.glob("sizes-*.csv")):
        frozen.append({})
        for number, row in read_csv(path, SIZE_COLUMNS):
            width, height = parse_whole(row["width"]), parse_whole(row["height"])
            if not width or not height:
                raise UserError(f"{path} row {number}: expected a width and a height in pixels")
            frozen[-1][row["source"]] = width, height
    return frozen


def read_source_digests(folder: Path, sources: Collection[str]) -> dict[str, str]:
    """The sha256 of each source that has images in the folder, as it was when they were drawn."""
    there = image_names(folder)
    return {
        row["source"]: row["source_sha256"]
        for _, _, row in _read_lines(folder)
        if row and row.get("source") in sources and row["file_name"] in there and "source_sha256" in row
    }


def check(folder: Path) -> tuple[int, list[str]]:
    """Validate a spectrum folder: plan.json, every row of every metadata.jsonl, and every image.

    Returns:
        How many images are right, and a line for each error. A line that a kill cut short, and the row of a missing
        image, are no errors: such images are only not drawn yet.

    Raises:
        UserError: the folder is no spectrum.
    """
    # Check every row by itself, and against the others.
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
    # Decode every image, and look for images without a row.
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
    return len(units), wrong


@without_garbage_collection()
def read_made(folder: Path) -> list[dict]:
    """The fields of every row of all shards that filters need, also where the image is missing.

    Each has `file_name` (relative to `folder`), `source`, `label`, `class_name`, `level`, `seed` and `prompt`; one that
    was scored when it was drawn has `text_score` and `image_score` too. A file with two rows counts once, as in
    `read_rows`; a line that a kill left unfinished is no row.

    Raises:
        UserError: a row lacks one of these, has a level that is none, or two rows of one file disagree on them.
    """
    fields = ("source", "label", "class_name", "level", "seed", "prompt")
    values_of, kinds, intern = itemgetter(*fields), [ROW_FIELDS[field] for field in fields], sys.intern
    made: dict[str, dict] = {}
    for shard in sorted(folder.glob("shard-*/metadata.jsonl")):
        beginning = f"{shard.parent.name}/"
        for number, line in enumerate(io.BytesIO(read_bytes(shard)), 1):
            # Read the line, unless it is none, as read_rows does.
            row = parse_row(line)
            if row is None or not isinstance(row.get("file_name"), str):
                continue
            # Check its fields.
            name = beginning + row["file_name"].rpartition("/")[2]
            try:
                source, label, class_name, level, seed, prompt = values = values_of(row)
            except KeyError as error:
                raise UserError(
                    f"{shard} row {number}: has no {error.args[0]}; expected a spectrum of this version"
                ) from None
            if list(map(type, values)) != kinds:
                wrong = next(field for field in fields if type(row[field]) is not ROW_FIELDS[field])
                raise UserError(
                    f"{shard} row {number}: {wrong} is {row[wrong]!r}; expected a {ROW_FIELDS[wrong].__name__}, "
                    "as in a spectrum of this version"
                )
            if not 0 <= level <= 99:
                raise UserError(f"{shard} row {number}: level is {level}; expected one from 0 to 99")
            # Keep one row a file.
            own = {
                "file_name": name,
                "source": intern(source),  # 200,000 rows share few sources, names and prompts
                "label": label,
                "class_name": intern(class_name),
                "level": level,
                "seed": seed,
                "prompt": intern(prompt),
            }
            first = made.setdefault(name, own)
            if first is own:
                if "text_score" in row:
                    own |= {field: _score(shard, number, row, field) for field in SCORED_FIELDS}
            elif any(first[field] != own[field] for field in ("source", "label", "level", "seed")):
                raise UserError(
                    f"{shard} row {number}: {row['file_name']} has another row, of another source, class, level or "
                    "seed; expected one row a file"
                )
    return _one_row_a_unit(folder, made.values())


def _one_row_a_unit(folder: Path, rows: Iterable[dict]) -> list[dict]:
    """The rows, less the second one of each unit that is in two shards; the one whose image exists stays."""
    units, there = {}, None
    for row in rows:
        unit = row["source"], row["level"], row["seed"]
        first = units.setdefault(unit, row)
        if first is not row:
            there = image_names(folder) if there is None else there
            if first["file_name"] not in there and row["file_name"] in there:
                units[unit] = row
    return list(units.values())


def read_spectrum(args) -> tuple[dict, list[dict]]:
    """plan.json and a row for each image (`read_made`) of the spectrum that a filter's flags name.

    Raises:
        UserError: a spectrum of other data than the flags say, or one without an image.
    """
    plan = read_plan(args.spectrum)
    for name in ("dataset", "imb_ratio", "data_seed"):
        if plan[name] != getattr(args, name):
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: {args.spectrum} was made with {plan[name]}"
            )
    rows = read_made(args.spectrum)
    if not rows:
        raise UserError(f"{args.spectrum}: holds no image; run generate_spectrum.py")
    return plan, rows


def _score(path: Path, number: int, row: dict, field: str) -> float:
    if type(row.get(field)) is not float or not math.isfinite(row[field]):
        raise UserError(f"{path} row {number}: {field} is {row.get(field)!r}; expected a number")
    return row[field]


def kept_rows(folder: Path, levels: Iterable[int], filtered: bool = True, rules: list[str] | None = None) -> list[dict]:
    """The rows of a spectrum that training may use: those of `levels` that scores.csv and edits.csv keep.

    Args:
        filtered: False takes all rows where neither is there.
        rules: rules of filter_edits.py to apply, or `none`; None for all that edits.csv was made by.

    Raises:
        UserError: neither is there, a rule that edits.csv was not made by, or a level has no kept image.
    """
    edits = kept_edits(folder, rules)
    scored = (folder / "scores.csv").is_file()
    if filtered and not scored and edits is None and rules is None:
        raise UserError(
            f"{folder}: no scores.csv there; run filter_clipscore.py --spectrum {folder}, or filter_edits.py"
        )
    scores = read_scores(folder / "scores.csv") if scored else {}
    wanted = set(levels)
    made, rows = Counter(), []
    for row in read_rows(folder):
        made[row["level"]] += 1
        by_score = not scored or scores.get(row["file_name"], {}).get("kept")
        by_rules = edits is None or row["file_name"] in edits
        if row["level"] in wanted and by_score and by_rules:
            rows.append(row)
    for level in sorted(wanted - {row["level"] for row in rows}):
        raise UserError(
            f"level {level}: {folder} has no accepted image of it (of {made[level]} made); expected --levels, or "
            f"--fixed-level, of those with accepted images among {sorted(made)}"
        )
    return rows


def decisive_files(folder: Path) -> list[Path]:
    """The files of a filtered spectrum that decide which images training uses, for digests."""
    files = [folder / name for name in ("plan.json", "scores.csv", EDITS)]
    return [file for file in files if file.is_file()]
