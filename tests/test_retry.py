"""Errors of a network file system that pass: waited out a few times, then the one line; all others at once."""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import check_data
import datasets
import find_hard
from generation.writer import save_image
from loaders import pictures
from loaders.base import ASSETS, ImageSet, missing_files
from runtime import checkpoints, cli, files, retry, text
from runtime.cli import UserError
from spectrum import edits, tables, vectors
from spectrum import folder as spectrum_folder
from spectrum.units import Unit
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


def make_image(path, colour="red", side=8):
    Image.new("RGB", (side, side), colour).save(path)
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


# ---------------------------------------------------------------------------------------------------------------------
# an error part-way through a file, and files of many images or rows


class Lost(io.FileIO):
    """A file that the disk loses after its first 50 bytes: each further read of this opening fails."""

    def __init__(self, path, error: int):
        super().__init__(path)
        self.error, self.read_already = error, False

    def readinto(self, buffer):
        if self.read_already:
            raise OSError(self.error, os.strerror(self.error), str(self.name))
        self.read_already = True
        return super().readinto(memoryview(buffer)[:50])

    def readall(self):
        return b"".join(iter(lambda: self.read(1 << 16), b""))

    def read(self, size=-1):
        buffer = bytearray(50)
        return self.readall() if size < 0 else bytes(buffer[: self.readinto(buffer)])


@pytest.fixture
def losing(monkeypatch):
    """`lose(name, error, times)` lets the disk lose the next `times` openings of files called so; the pauses."""
    real, failing, pauses = builtins.open, {}, []

    def opened(file, mode="r", *rest, **options):
        name = os.path.basename(os.fspath(file)) if isinstance(file, str | os.PathLike) else ""
        error, left = failing.get(name, (0, 0))
        if not left or "a" in mode or "w" in mode:
            return real(file, mode, *rest, **options)
        failing[name] = error, left - 1
        lost = io.BufferedReader(Lost(file, error), 50)
        return lost if "b" in mode else io.TextIOWrapper(lost, encoding=options.get("encoding"))

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(retry.time, "sleep", pauses.append)

    def lose(name: str, error: int, times: int) -> list[float]:
        failing[name] = error, times
        pauses.clear()
        return pauses

    return lose


def cifar_images(root) -> list[tuple[str, int, bytes]]:
    """Name, label and PNG of two images of each of ten classes, in the splits train and test."""
    return [
        (f"{part}/c{label}/{i}.png", label, make_image(root / "x.png", (label, i, 0), 32).read_bytes())
        for part in ("train", "test")
        for label in range(10)
        for i in range(2)
    ]


def read_cifar(root):
    train = datasets.load("cifar10_lt", 2, root).train
    return train.images.tolist(), train.labels.tolist(), train.sources


def make_zip(folder):
    with zipfile.ZipFile(folder / "c.zip", "w") as archive:
        for name, _, content in cifar_images(folder):
            archive.writestr(name, content)
    return "c.zip", lambda: read_cifar(folder / "c.zip")


def make_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    features = {"info": {"features": {"label": {"names": [f"name {label}" for label in range(10)]}}}}
    (folder / "hf").mkdir()
    for part in ("train", "test"):
        rows = [(label, content) for name, label, content in cifar_images(folder) if name.startswith(part)]
        table = pyarrow.table({"img": [{"bytes": row[1]} for row in rows], "label": [row[0] for row in rows]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        parquet.write_table(table, folder / f"hf/{part}-00000-of-00001.parquet")
    assert datasets.load("cifar10_lt", 2, folder / "hf").class_names[3] == "name 3"
    return "train-00000-of-00001.parquet", lambda: read_cifar(folder / "hf")


def make_rows(folder):
    """A shard of three images and their rows."""
    fields = {"label": 3, "class_name": "cat", "level": 50, "prompt": "a cat", "width": 8, "height": 8}
    (folder / "shard-00000").mkdir()
    rows = [fields | {"source": f"index:{i}", "seed": 0, "file_name": f"{i}.png"} for i in range(3)]
    for row in rows:
        make_image(folder / "shard-00000" / row["file_name"])
    files.RowWriter(folder / "shard-00000").append(rows)


def rows_reader(read):
    return lambda folder: make_rows(folder) or ("metadata.jsonl", lambda: read(folder))


def make_edits(folder):
    columns = {name: ["", ""] for name in edits.COLUMNS}
    edits.write_edits(folder / "edits.csv", columns | {"file_name": ["a.png", "b.png"], "kept": [1, 0]})
    return "edits.csv", lambda: edits.read_edits(folder / "edits.csv")


def make_vectors(folder):
    cache = vectors.VectorCache(folder / "v.npz", 4)
    cache.add(["a", "b"], np.eye(4)[:2])
    cache.save()
    return "v.npz", lambda: {name: v.tolist() for name, v in vectors.VectorCache(folder / "v.npz", 4).vectors.items()}


WANTED = {Unit(f"index:{i}", 50, 0) for i in range(3)}
LONG = {
    "zip": make_zip,
    "parquet": make_parquet,
    "rows": rows_reader(spectrum_folder.read_rows),
    "rows that filters need": rows_reader(spectrum_folder.read_made),
    "rows drawn": rows_reader(lambda folder: spectrum_folder.drawn_units(folder, WANTED)),
    "edits": make_edits,
    "vectors": make_vectors,
}


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("reader", LONG)
def test_a_file_lost_part_way_is_read_again_from_its_beginning(losing, tmp_path, reader, error):
    name, read = LONG[reader](tmp_path)
    expected = read()
    pauses = losing(name, error, 2)
    assert read() == expected and expected
    assert pauses == [0.2, 1.0]


@pytest.mark.parametrize("reader", LONG)
def test_a_file_that_stays_lost_is_one_line(losing, tmp_path, monkeypatch, capsys, reader):
    name, read = LONG[reader](tmp_path)
    pauses = losing(name, errno.EIO, 99)
    with pytest.raises(SystemExit) as end:
        cli.run(read)
    message = capsys.readouterr().err
    assert end.value.code == 2 and pauses == [0.2, 1.0, 4.0]
    assert message.count("\n") == 1 and name in message and "Input/output error" in message


def test_folders_are_listed_again(tmp_path, monkeypatch):
    make_rows(tmp_path)
    real, errors, pauses = os.listdir, [], []
    monkeypatch.setattr(os, "listdir", lambda path: raise_error(errors.pop()) if errors else real(path))
    monkeypatch.setattr(retry.time, "sleep", pauses.append)
    errors[:] = [errno.EIO]
    assert len(spectrum_folder.read_rows(tmp_path)) == 3
    errors[:] = [errno.ESTALE]
    assert missing_files(tmp_path, ["shard-00000/0.png", "shard-00000/9.png"]) == ["shard-00000/9.png"]
    assert pauses == [0.2, 0.2]
    # A folder that cannot be listed is not one without images.
    assert missing_files(tmp_path, ["nowhere/0.png", "shard-00000/0.png/0.png"]) == [
        "nowhere/0.png",
        "shard-00000/0.png/0.png",
    ]
    errors[:] = [errno.EACCES]
    with pytest.raises(UserError, match=r"shard-00000: cannot be listed \(Permission denied\)"):
        missing_files(tmp_path, ["shard-00000/0.png"])
