"""What a start does not do: read what it can tell from a file's header, or has read before."""

from __future__ import annotations

import gc
import hashlib
import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import MagicMock

import diffusers
import numpy as np
import pytest
from PIL import Image

import models
from generation import sizes, worklist
from loaders.base import ImageSet
from loaders.sources import Sources
from runtime import cli, files
from runtime.cli import UserError
from spectrum import tables
from spectrum.units import Unit

TINY = str(Path(models.__file__).parent / "assets/tiny_sd")


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


@pytest.mark.parametrize(("wait", "threads"), [(1e9, False), (-1e9, True)])
def test_threads_look_at_sources_where_files_are_waited_for(tmp_path, monkeypatch, wait, threads):
    monkeypatch.setattr(sizes, "LONG_WAIT", wait)
    monkeypatch.setattr(sizes, "TRIAL", 2)
    names = [f"{number}.png" for number in range(5)]
    for number, name in enumerate(names[:4]):
        Image.new("RGB", (10 + number, 8)).save(tmp_path / name)
    train = ImageSet([tmp_path / name for name in names], np.zeros(5, dtype=np.int64), names)
    sources, seen = Sources(train, tmp_path), set()
    own = sources.size
    monkeypatch.setattr(sources, "size", lambda name: (seen.add(threading.current_thread()), own(name))[1])
    found, unreadable = sizes.read_sizes(names, sources)
    assert list(found.items()) == [(f"{number}.png", (10 + number, 8)) for number in range(4)]
    assert list(unreadable) == ["4.png"] and (seen != {threading.current_thread()}) == threads


@pytest.mark.slow
def test_a_dry_run_imports_no_generators(tmp_path):
    tables.write_hard(
        tmp_path / "hard.csv", [{"source": "index:0", "label": 0, "class_name": "nil", "reason": "few", "score": 1}]
    )
    files.write_json(
        tmp_path / "prompts.json", {"0": {"class_name": "nil", "score_prompt": "a nil", "prompts": ["a nil"]}}
    )
    words = [
        f"--hard={tmp_path}/hard.csv",
        f"--prompts={tmp_path}/prompts.json",
        f"--out={tmp_path}/out",
        "--dry-run",
        "--size=8x8",
    ]
    lines = ["import sys, generate_spectrum", f"generate_spectrum.main({words!r})"]
    lines += ["assert not {'diffusers', 'transformers', 'open_clip'} & set(sys.modules)"]
    root = Path(sizes.__file__).parents[1]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=root, check=True, timeout=120)


def test_a_script_looks_for_garbage_seldom():
    """100,000 objects that stay: Python as it is would look for garbage 140 times and more."""
    before, looked = gc.get_threshold(), []

    def main() -> int:
        gc.callbacks.append(lambda *_: looked.append(1))
        kept = [[] for _ in range(100_000)]
        gc.callbacks.pop()
        return len(kept) - 100_000

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    gc.set_threshold(*before)
    assert caught.value.code == 0 and 2 <= len(looked) <= 2 * 12  # each calls back as it begins and as it ends


def test_families_are_those_that_diffusers_draws_by_strength(monkeypatch):
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
    from diffusers.pipelines.auto_pipeline import AUTO_IMAGE2IMAGE_PIPELINES_MAPPING, AUTO_INPAINT_PIPELINES_MAPPING

    families = {"StableDiffusion": "stable-diffusion", "StableDiffusionXL": "stable-diffusion-xl", "Flux": "flux"}
    families |= {"StableDiffusion3": "stable-diffusion-3", "QwenImage": "qwenimage", "ZImage": "z-image"}
    kinds = [f"{family}{task}Pipeline" for family in families for task in ("", "Img2Img", "Inpaint")]
    assert all(models.FAMILIES.fullmatch(kind) for kind in kinds)
    for kind in ("FluxKontextPipeline", "QwenImageEditPipeline", "StableDiffusionInstructPix2PixPipeline"):
        assert not models.FAMILIES.fullmatch(kind)
    # What is told from the name is what the classes themselves say, and the class that diffusers would choose.
    loaded = []
    monkeypatch.setattr(
        DiffusionPipeline,
        "from_pretrained",
        classmethod(lambda cls, *_, **__: (loaded.append(cls), MagicMock())[1]),
    )
    for auto in (AutoPipelineForImage2Image, AutoPipelineForInpainting):
        monkeypatch.setattr(auto, "from_pretrained", None)
    for kind in kinds:
        monkeypatch.setattr(models, "pipeline_config", lambda *_, kind=kind: {"_class_name": kind})
        parameters = inspect.signature(getattr(diffusers, kind).__call__).parameters
        assert ("image" in parameters) <= ("strength" in parameters) and models.editor_kind(TINY) == ""
        family = families[models.FAMILIES.fullmatch(kind)[1]]
        for masked, mapping in ((False, AUTO_IMAGE2IMAGE_PIPELINES_MAPPING), (True, AUTO_INPAINT_PIPELINES_MAPPING)):
            models.load_generator.__wrapped__(TINY, "cpu", masked=masked)  # conftest.py keeps what was read
            assert loaded.pop() is mapping[family]
