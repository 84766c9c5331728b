"""A page on which a person looks through a spectrum, source beside its levels or domains, and chooses the threshold.

The page holds all rows and scores; the pictures are beside it, a strip of thumbnails for each source, which the browser
loads when the source comes into view. gallery.html, gallery.css and gallery.js make the page; it needs no network.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageOps

from runtime import cli, files
from runtime.cli import UserError

HERE = Path(__file__).resolve().parent
THUMB = 96  # pixels of a thumbnail's side, at most; smaller pictures keep their size
QUALITY = 85  # of the strips' JPEG
WIDEST = 65500  # pixels that a JPEG may have


def write_gallery(
    rows: list[dict],
    scores: dict[str, dict],
    dropped: dict[str, str],
    threshold: float | None,
    read_source: Callable[[list[str]], object],
    read_image: Callable[[str], Image.Image],
    about: str,
    command: str,
    out: Path,
) -> Path:
    """Write OUT/index.html and OUT/strips/.

    Args:
        rows: the images of a spectrum or a set of edits, as in metadata.jsonl, all with a `domain` or none. Edits of
            one level stand under their domains, all other images under their levels.
        scores: text_score, image_score, kept and reason by file name.
        dropped: why an edit filter drops an image, whatever its score, by file name.
        threshold: where the slider starts; None where the images have no scores, which leaves the slider out.
        read_source: sources' names -> an iterator over their RGB images.
        read_image: a row's file_name -> RGB; UserError where it cannot be read, which leaves its tile grey.
        about: a line on what the page shows.
        command: the command that filters, without --threshold.
    """
    column = name_column(rows)
    rows = sorted(rows, key=lambda row: (row["label"], row["source"], row[column], row["seed"]))
    by_source: dict[str, list[dict]] = {}
    for row in rows:
        by_source.setdefault(row["source"], []).append(row)
    # A grey square takes the place of a picture that does not decode: its score says why.
    with cli.progress(len(by_source), "thumbnails", "source") as bar:
        for number, (real, own) in enumerate(zip(read_source(list(by_source)), by_source.values(), strict=True)):
            write_strip(real, own, read_image, out / strip_name(number))
            bar.update(1)
    path = out / "index.html"
    files.write_text(path, fill_page(describe(by_source, scores, dropped, threshold, about, command)))
    return path


def name_column(rows: list[dict]) -> str:
    """What the columns are: `domain` where images have one and all are of one level, else `level`."""
    return "domain" if rows and "domain" in rows[0] and len({row["level"] for row in rows}) == 1 else "level"


def strip_name(number: int) -> str:
    return f"strips/{number:06d}.jpg"


def write_strip(real: Image.Image, rows: list[dict], read_image: Callable, path: Path) -> None:
    """A source's thumbnails side by side, the source first."""
    side = min(THUMB, max(real.size), WIDEST // (1 + len(rows)))
    strip = Image.new("RGB", (side * (1 + len(rows)), side), "grey")
    strip.paste(thumbnail(real, side), (0, 0))
    for place, row in enumerate(rows, 1):
        try:
            strip.paste(thumbnail(read_image(row["file_name"]), side), (side * place, 0))
        except UserError:
            continue
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    strip.save(beside, "JPEG", quality=QUALITY, subsampling=0)
    beside.replace(path)


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """The whole picture in a square of `side` pixels."""
    return ImageOps.pad(image, (side, side), color="grey")


def describe(
    by_source: dict[str, list[dict]],
    scores: dict[str, dict],
    dropped: dict[str, str],
    threshold: float | None,
    about: str,
    command: str,
) -> dict:
    """All that the page's script reads: tables of words, and for the images one list a column."""
    # Number columns, prompts and reasons.
    rows = [row for own in by_source.values() for row in own]
    column = name_column(rows)
    columns = sorted({row[column] for row in rows})
    domains = sorted({row["domain"] for row in rows}) if column == "level" and rows and "domain" in rows[0] else []
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    prompt_of, column_of = {p: k for k, p in enumerate(prompts)}, {c: k for k, c in enumerate(columns)}
    names = {row["label"]: row["class_name"] for row in rows}
    if len(set(names.values())) < len(names):  # names may repeat: tell the classes apart by index
        names = {label: f"{name} ({label})" for label, name in names.items()}
    entries = [scores.get(row["file_name"]) or {} for row in rows]
    finite = [math.isfinite(entry.get("text_score", math.nan)) for entry in entries]
    # Why an image is not kept at any threshold: an edit filter dropped it, or it has no score.
    lost = [
        dropped.get(row["file_name"], "") or ("" if known or threshold is None else entry.get("reason") or "no score")
        for row, entry, known in zip(rows, entries, finite, strict=True)
    ]
    # Put the words into tables, and the images into columns of numbers.
    return {
        "about": about,
        "command": command,
        "threshold": threshold,
        "column_name": column,
        "columns": columns,
        "domains": domains,
        "classes": names,
        "labels": sorted({row["label"] for row in rows}),
        "prompts": prompts,
        "reasons": ["kept", *(["low text score"] if threshold is not None else []), *sorted(set(lost) - {""})],
        "sources": [
            {"name": name, "label": own[0]["label"], "file": strip_name(number), "count": 1 + len(own)}
            for number, (name, own) in enumerate(by_source.items())
        ],
        "images": {
            "source": [number for number, own in enumerate(by_source.values()) for _ in own],
            "place": [place for own in by_source.values() for place in range(1, 1 + len(own))],
            "column": [column_of[row[column]] for row in rows],
            "domain": [domains.index(row["domain"]) for row in rows] if domains else [],
            "seed": [row["seed"] for row in rows],
            "prompt": [prompt_of[row["prompt"]] for row in rows],
            "file": [row["file_name"] for row in rows],
            "text": [entry["text_score"] if known else None for entry, known in zip(entries, finite, strict=True)],
            "image": [entry["image_score"] if known else None for entry, known in zip(entries, finite, strict=True)],
            "kept": [
                not why and (threshold is None or bool(entry.get("kept")))
                for entry, why in zip(entries, lost, strict=True)
            ],
            "lost": lost,
        },
    }


def fill_page(data: dict) -> str:
    """The page's text. `<` is written as an escape in the data, which so cannot end its script element."""
    text = (HERE / "gallery.html").read_text(encoding="utf-8")
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    for mark, part in (
        ("/*CSS*/", (HERE / "gallery.css").read_text(encoding="utf-8")),
        ("/*JS*/", (HERE / "gallery.js").read_text(encoding="utf-8")),
        ("/*DATA*/", content),
    ):
        text = text.replace(mark, part, 1)
    return text
