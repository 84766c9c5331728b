"""Fixtures that several test files share. No test needs the network."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("DISCL_DATA", None)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for forks of this process too: they have no threads of their own
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
gc.set_threshold(20_000, 20, 20)  # looking for garbage among the libraries' half a million objects took 7 % of all time

# The smallest spectrum that every step accepts: 55 sources x 3 levels x 1 seed, four denoising steps.
SMALL = ["--levels", "0", "50", "90", "--seeds", "1", "--steps", "4"]


@pytest.fixture(scope="session", autouse=True)
def embedded_images_are_drawn_once():
    """Drawing their images takes as long as training on them; tests and scripts change none."""
    import datasets
    from loaders import digits

    def keep(load):
        kept = functools.cache(lambda names, *args: load(*args))
        return lambda *args: kept(tuple(digits.NAMES), *args)

    with pytest.MonkeyPatch.context() as patch:
        for name, entry in datasets.TABLE.items():
            if entry.root == "unused":
                patch.setitem(datasets.TABLE, name, dataclasses.replace(entry, load=keep(entry.load)))
        yield


@pytest.fixture(scope="session", autouse=True)
def shipped_generators_are_read_once():
    """Reading one from its files takes longer than copying what was read, and as long as many a test draws with it."""
    import models
    from loaders.base import ASSETS

    load = models.load_generator
    read = functools.cache(load)

    @functools.wraps(load)
    def load_copy(name_or_path, *args, **options):
        if Path(name_or_path).parent != ASSETS:
            return load(name_or_path, *args, **options)
        return copy.deepcopy(read(name_or_path, *args, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_generator", load_copy)
        yield


def draw_blank(patch: pytest.MonkeyPatch) -> None:
    """Figures are blank, and TensorBoard is shown no pictures: in a short run both take longer than its training."""
    from PIL import Image

    import train_lt
    from reporting import figures
    from training import log

    def save_blank(figure, path: Path) -> None:
        from matplotlib import pyplot

        pyplot.close(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (600, 200), "white").save(path)

    patch.setattr(figures, "save_figure", save_blank)
    patch.setattr(train_lt.Trainer, "show_confusion", lambda *_: None)
    patch.setattr(log, "shows_pictures", lambda *_: False)


@pytest.fixture
def drawn():
    """Requested by tests that look at figures: in their files the others draw them blank (`blank_figures`)."""


@pytest.fixture
def blank_figures(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        draw_blank(monkeypatch)


@pytest.fixture(scope="session")
def road(tmp_path_factory):
    """hard.csv, prompts.json and a filtered small spectrum, made by the scripts; tests never change it."""
    import filter_clipscore
    import find_hard
    import generate_spectrum
    import write_prompts

    folder = tmp_path_factory.mktemp("road")
    hard, prompts, spectrum = folder / "hard.csv", folder / "prompts.json", folder / "spectrum"
    assert find_hard.main(["--out", str(hard)]) == 0
    assert write_prompts.main(["--hard", str(hard), "--out", str(prompts)]) == 0
    inputs = ["--hard", str(hard), "--prompts", str(prompts)]
    assert generate_spectrum.main([*inputs, "--out", str(spectrum), *SMALL]) == 0
    # Four steps make poor digits: the threshold is low, so that every level keeps some.
    assert filter_clipscore.main(["--spectrum", str(spectrum), "--prompts", str(prompts), "--threshold", "0.1"]) == 0
    return SimpleNamespace(folder=folder, hard=hard, prompts=prompts, spectrum=spectrum, inputs=inputs)
