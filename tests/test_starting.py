"""What a start does not do: read what it can tell from a file's header, or has read before."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest
from PIL import Image

from generation import worklist
from loaders.base import ImageSet
from loaders.sources import Sources
from runtime import files
from runtime.cli import UserError
from spectrum.units import Unit


def test_a_sources_size_is_read_from_the_head_of_its_file(tmp_path):
    Image.effect_noise((48, 32), 90).convert("RGB").save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])  # its pixels are not all there
    train = ImageSet([tmp_path / "a.jpg", tmp_path / "b.jpg"], np.zeros(2, dtype=np.int64), ["a.jpg", "b.jpg"])
    for sources in (Sources(train, tmp_path), Sources(train.take(np.array([], dtype=int)), tmp_path)):
        assert sources.size("a.jpg") == (48, 32)
        with pytest.raises(UserError, match="b.jpg: no such file"):
            sources.size("b.jpg")
    memory = ImageSet(np.zeros((1, 6, 9, 3), dtype=np.uint8), np.zeros(1, dtype=np.int64), ["index:0"])
    assert Sources(memory, None).size("index:0") == (9, 6)


def test_a_folders_digest_is_kept_until_a_file_changes(tmp_path, monkeypatch):
    paths = [tmp_path / "a" / "weights.safetensors", tmp_path / "config.json"]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_text(path.name)
    first = files.digest_folder(tmp_path, paths)
    assert first == files.digest_files(paths)
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: (read.append(file.name), digest(file, kind))[1])
    assert files.digest_folder(tmp_path, paths) == first and not read
    # Other content of the same size; then only the time of change is another.
    paths[1].write_text("gifnoc.json")
    changed = files.digest_folder(tmp_path, paths)
    assert changed != first and read == [str(paths[1])]
    os.utime(paths[0], ns=(0, 0))
    assert files.digest_folder(tmp_path, paths) == changed and len(read) == 2
    (tmp_path / ".digests").write_text("[]")
    assert files.digest_folder(tmp_path, paths) == changed


def test_a_source_is_asked_for_its_size_once():
    asked = []
    units = [Unit(name, level, seed) for level in (0, 50) for name in "ab" for seed in range(3)]
    batches = worklist.make_batches(units, lambda name: asked.append(name) or (8, 8), 4)
    assert asked == ["a", "b"]
    assert [(batch.level, len(batch.units)) for batch in batches] == [(0, 4), (50, 4), (0, 2), (50, 2)]
