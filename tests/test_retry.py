"""Errors of a network file system that pass: waited out a few times, then the one line; all others at once."""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import check_data
import find_hard
from generation.writer import save_image
from loaders import pictures
from loaders.base import ASSETS, ImageSet
from runtime import checkpoints, files, retry, text
from runtime.cli import UserError
from spectrum import tables
from training import stores


@pytest.fixture
def disk(monkeypatch):
    """A disk that fails: `fail(name, error, times)` lets the next `times` opens of files called so fail; the pauses."""
    real, failing, pauses = builtins.open, {}, []

    def opened(file, *rest, **options):
        name = os.path.basename(os.fspath(file)) if isinstance(file, str | os.PathLike) else ""
        error, left = failing.get(name, (0, 0))
        if left:
            failing[name] = error, left - 1
            raise OSError(error, os.strerror(error), str(file))
        return real(file, *rest, **options)

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(retry.time, "sleep", pauses.append)

    def fail(name: str, error: int = errno.EIO, times: int = 2) -> list[float]:
        failing[name] = error, times
        pauses.clear()
        return pauses

    return fail


def make_image(path, colour="red"):
    Image.new("RGB", (8, 8), colour).save(path)
    return path


READERS = {
    "text": lambda path: text.read_text(path),
    "image and digest": lambda path: pictures.read_image_file(path, "x"),
    "synthetic image": pictures.read_image,
    "header": lambda path: pictures.header_error(path) and pytest.fail("not read"),
    "size": lambda path: pictures.image_size(path) or pytest.fail("not read"),
    "trainer": lambda path: stores.decode(path, 8, None),
    "digest": lambda path: files.digest_files([path]),
    "sha256": lambda path: ImageSet([path], np.zeros(1, int), ["a"]).sha256(0),
    "checkpoint": lambda path: checkpoints.load_checkpoint(path, "cpu"),
}


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
@pytest.mark.parametrize("reader", READERS)
def test_reading_is_tried_again_where_the_error_passes(disk, tmp_path, reader, error):
    path = tmp_path / "a.png"
    if reader == "text":
        path.write_text("a")
    elif reader == "checkpoint":
        torch.save({"a": 1}, path)
    else:
        make_image(path)
    pauses = disk("a.png", error, 2)
    READERS[reader](path)
    assert pauses == [0.2, 1.0]


@pytest.mark.parametrize("reader", ["text", "image and digest", "synthetic image", "trainer", "sha256", "checkpoint"])
def test_an_error_that_stays_is_one_line_after_the_last_try(disk, tmp_path, reader):
    path = make_image(tmp_path / "a.png")
    pauses = disk("a.png", errno.EIO, 99)
    with pytest.raises(UserError, match="Input/output error|not a readable checkpoint") as found:
        READERS[reader](path)
    assert pauses == [0.2, 1.0, 4.0] and "\n" not in str(found.value)


@pytest.mark.parametrize("error", [errno.EACCES, errno.ENOSPC, errno.EISDIR])
def test_other_errors_are_not_waited_for(disk, tmp_path, error):
    path = make_image(tmp_path / "a.png")
    pauses = disk("a.png", error, 1)
    with pytest.raises(UserError, match="not a readable image"):
        pictures.read_image_file(path, "x")
    assert pauses == []


WRITERS = {
    "x.json": lambda folder: files.write_json(folder / "x.json", {"a": 1}),
    "x.csv": lambda folder: files.write_csv(folder / "x.csv", ["a"], [{"a": 1}]),
    "x.npz": lambda folder: files.write_arrays(folder / "x.npz", a=np.arange(3)),
    "x.pt": lambda folder: checkpoints.save_checkpoint(folder / "x.pt", {"a": 1}),
    "extra-00000.csv": lambda folder: files.add_numbered(folder, "extra", b"a\n1\n"),
    "metadata.jsonl": lambda folder: files.RowWriter(folder).append([{"a": 1}, {"b": 2}]),
    "p.jsonl": lambda folder: tables.append_probabilities(folder / "p.jsonl", [("a", 0.5), ("b", None)]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_writing_is_tried_again_and_leaves_what_it_leaves_on_a_good_disk(disk, tmp_path, monkeypatch, name):
    good, bad, real = tmp_path / "good", tmp_path / "bad", os.fsync
    for folder in (good, bad):
        folder.mkdir()
    WRITERS[name](good)
    pauses, left = disk(""), [errno.ESTALE, errno.EIO]
    monkeypatch.setattr(os, "fsync", lambda number: real(number) if not left else raise_error(left.pop()))
    WRITERS[name](bad)
    assert pauses == [0.2, 1.0]
    assert {path.name: path.read_bytes() for path in bad.iterdir()} == {
        path.name: path.read_bytes() for path in good.iterdir()
    }


def raise_error(number: int):
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("name", ["x.json", "x.csv", "x.npz", "x.pt"])
def test_a_disk_that_stays_away_costs_no_file_that_is_there(disk, tmp_path, monkeypatch, name):
    WRITERS[name](tmp_path)
    before = (tmp_path / name).read_bytes()
    pauses = disk("")
    monkeypatch.setattr(os, "fsync", lambda number: raise_error(errno.EIO))
    with pytest.raises((OSError, UserError)):
        WRITERS[name](tmp_path)
    assert pauses == [0.2, 1.0, 4.0]
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == before


def test_rows_that_cannot_be_written_whole_are_not_written_in_part(disk, tmp_path, monkeypatch):
    writer = files.RowWriter(tmp_path)
    writer.append([{"a": 1}])
    disk("")
    monkeypatch.setattr(os, "fsync", lambda number: raise_error(errno.ENOSPC))
    with pytest.raises(OSError):
        writer.append([{"b": 2}])
    assert (tmp_path / "metadata.jsonl").read_text() == '{"a": 1}\n'


def test_images_are_saved_at_a_second_try(disk, tmp_path):
    pauses = disk(".a.png.tmp", errno.ETIMEDOUT, 1)
    save_image(Image.new("RGB", (8, 8), "red"), tmp_path / "a.png")
    assert pauses == [0.2] and [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_script_reads_through_a_disk_that_fails_now_and_then(disk, tmp_path, capsys):
    """Every image fails twice at each of two scripts, and counts as readable."""
    names = []
    for split, name in itertools.product(("train", "test"), ("cat", "dog")):
        (tmp_path / "d" / split / name).mkdir(parents=True)
        for number in range(6):
            names.append(f"{name}{split}{number}.png")
            make_image(tmp_path / "d" / split / name / names[-1], (number * 40, len(split), ord(name[0])))
    data = ["--dataset", "imagefolder", "--data-root", str(tmp_path / "d")]
    for name in names:
        disk(name, errno.EIO, 2)
    assert check_data.main(data) == 0 and "all as expected" in capsys.readouterr().out
    for name in names:
        disk(name, errno.ESTALE, 2)
    clip = ["--rule", "confidence", "--clip", str(ASSETS / "tiny_clip"), "--fraction", "1", "--workers", "0"]
    assert find_hard.main([*data, *clip, "--out", str(tmp_path / "h.csv")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "h.probabilities.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and all(row["probability"] is not None for row in rows)
