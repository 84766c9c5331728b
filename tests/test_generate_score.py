"""CLIPScore while drawing: the scores of the files, the best of several drawings, the same images after any kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_generate import contents, rows_of
from test_generate_jobs import draw, failures, few  # noqa: F401  (few is a fixture)

import filter_clipscore
import generate_spectrum
import models
from generation import generator as generators
from generation.job import Job
from generation.plan import choose_prompt
from generation.worklist import Batch
from loaders.base import ASSETS
from loaders.sources import Sources
from runtime import files
from spectrum import folder as spectrum_folder
from spectrum import tables
from spectrum.units import Unit

CLIP = str(ASSETS / "tiny_clip")
HIGH = ["--score", "--threshold", "0.5", "--max-redraws", "3"]  # higher than about half of the images score


@pytest.fixture(scope="module")
def scored(few, tmp_path_factory):  # noqa: F811
    """The small job, drawn with HIGH; and its arguments."""
    out = tmp_path_factory.mktemp("scored") / "s"
    draw(few, out, *HIGH)
    return [*few[0], *HIGH], out


def clip_scores(image: Image.Image, text: str, source: Image.Image) -> tuple[float, float]:
    """Text and image score by open_clip alone."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{CLIP}")
    tokens = open_clip.get_tokenizer(f"local-dir:{CLIP}")([text])
    with torch.inference_mode():
        one, other = (model.eval().encode_image(preprocess(each)[None], normalize=True) for each in (image, source))
        text = model.encode_text(tokens, normalize=True)
    return (one @ text.T).item(), (one @ other.T).item()


def test_scores_are_those_of_the_files_and_the_filter_embeds_nothing_again(scored, road, tmp_path, capsys, monkeypatch):
    out = tmp_path / "s"
    shutil.copytree(scored[1], out)
    rows, sources = rows_of(out), dict(road_sources())
    for name in list(rows)[::7]:
        row = rows[name]
        expected = clip_scores(
            Image.open(out / name), f"a photo of a {row['class_name']}", Image.fromarray(sources[row["source"]])
        )
        assert (row["text_score"], row["image_score"]) == pytest.approx(expected, abs=2e-5)
    with monkeypatch.context() as patched:
        patched.setattr(models, "load_clip", None)  # not even loaded
        assert filter_clipscore.main(["--spectrum", str(out), "--prompts", str(road.prompts)]) == 0
    assert "0 newly scored, 24 scored when they were drawn" in capsys.readouterr().out
    found = tables.read_scores(out / "scores.csv")
    assert {name: (row["text_score"], row["image_score"]) for name, row in rows.items()} == {
        name: (score["text_score"], score["image_score"]) for name, score in found.items()
    }


def road_sources():
    import datasets

    train = datasets.load("digits", 30).train
    return zip(train.sources, train.images, strict=True)


def test_scores_against_other_texts_are_taken_anew(scored, road, tmp_path, capsys):
    out = tmp_path / "s"
    shutil.copytree(scored[1], out)
    prompts = files.read_json(road.prompts)
    for entry in prompts.values():
        entry["score_prompt"] = "a zero in red ink"
    files.write_json(tmp_path / "prompts.json", prompts)
    assert filter_clipscore.main(["--spectrum", str(out), "--prompts", str(tmp_path / "prompts.json")]) == 0
    assert "24 newly scored\n" in capsys.readouterr().out


def test_the_best_of_all_drawings_is_kept_and_no_more_are_made_than_needed(scored, road):
    """Each drawing made here by itself, and scored by open_clip: the row is the first that is enough, or the best."""
    prompts = {int(label): entry for label, entry in files.read_json(road.prompts).items()}
    sources = dict(road_sources())
    generator = generators.Generator(models.load_generator(str(ASSETS / "tiny_sd_noisy"), "cpu"), 4, 3.0)
    kept = []
    for name, row in list(rows_of(scored[1]).items())[::3]:
        unit = Unit(row["source"], row["level"], row["seed"])
        texts, scores, drawings = [], [], []
        for redraw in range(4):
            text = choose_prompt(unit, prompts[row["label"]]["prompts"], redraw)
            picture = {unit.source: Image.fromarray(sources[unit.source])}
            image = generator.draw(Batch(unit.level, (16, 16), None, [unit]), redraw, [text], picture)
            pixels, good, _ = generators.to_host(image)
            assert good.all()
            drawings.append(pixels[0].numpy().astype(int))
            image = Image.fromarray(pixels[0].numpy())
            scores.append(clip_scores(image, f"a photo of a {row['class_name']}", picture[unit.source])[0])
            texts.append(text)
            if scores[-1] >= 0.5:
                break
        assert len(set(texts)) == len(texts)  # each time another prompt
        best = int(np.argmax(scores))
        kept.append(best)
        assert (row["redraws"], row["prompt"]) == (best, texts[best])
        assert row["text_score"] == pytest.approx(scores[best], abs=1e-3)
        assert np.abs(np.asarray(Image.open(scored[1] / name)).astype(int) - drawings[best]).max() <= 1
    assert len(set(kept)) > 1, "no drawing but the first was ever the best: the threshold tests nothing"


def test_a_threshold_that_all_reach_changes_no_image(few, tmp_path):  # noqa: F811
    out = draw(few, tmp_path / "s", "--score", "--threshold", "-1")
    assert contents(out) == contents(few[1])


@pytest.mark.parametrize("more", [[], HIGH])
def test_sources_that_are_kept_in_memory_are_read_once(few, tmp_path, monkeypatch, more):  # noqa: F811
    """Batches of five cut the images of a source in two."""
    read, real = [], Sources.read

    def counted(self, name):
        read.append(name)
        return real(self, name)

    monkeypatch.setattr(Sources, "read", counted)
    draw(few, tmp_path / "s", *more, "--size", "16x16")
    assert sorted(read) == sorted(set(read)) and len(read) == 6


@pytest.mark.slow
def test_shards_and_signals_change_nothing(few, scored, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Stopped after one batch, then finished in three shards: the same bytes, and the same rows."""
    real = generators.to_host

    def to_host(drawn):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(drawn)

    out = tmp_path / "s"
    with monkeypatch.context() as patched:
        patched.setattr(generators, "to_host", to_host)
        draw(few, out, *HIGH, code=75)
    assert len(contents(out)) == 0  # the batch in flight is left where a redraw would begin
    assert "of them with a CLIPScore" not in capsys.readouterr().out
    for shard in ("0/3", "1/3", "2/3"):
        draw(few, out, *HIGH, "--shard", shard)
    assert contents(out) == contents(scored[1])
    rows = {row["file_name"].partition("/")[2]: row for row in spectrum_folder.read_rows(out)}
    for row in spectrum_folder.read_rows(scored[1]):
        name = row["file_name"].partition("/")[2]
        assert {**rows[name], "file_name": ""} == {**row, "file_name": ""}


def test_an_image_lost_from_a_batch_comes_back_the_same(few, scored, tmp_path):  # noqa: F811
    out = tmp_path / "s"
    shutil.copytree(scored[1], out)
    for path in sorted(out.glob("shard-*/*.png"))[::5]:
        path.write_bytes(path.read_bytes()[:60])
    draw(few, out, *HIGH)
    assert contents(out) == contents(scored[1])


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_small_saved_images_are_scored_as_saved(few, tmp_path, image_format):  # noqa: F811
    flags = ["--size", "32x32", "--save-size", "12x12", "--format", image_format]
    out = draw(few, tmp_path / "s", *flags, "--score", "--max-redraws", "0")
    sources = dict(road_sources())
    for name, row in list(rows_of(out).items())[::9]:
        image = Image.open(out / name)
        assert image.size == (12, 12)
        expected = clip_scores(image, f"a photo of a {row['class_name']}", Image.fromarray(sources[row["source"]]))
        assert (row["text_score"], row["image_score"]) == pytest.approx(expected, abs=2e-5)


def test_scoring_belongs_to_the_plan(few, scored, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r"score.threshold is 0.5 there, 0.4 here"):
        generate_spectrum.main([*few[0], *HIGH, "--threshold", "0.4", "--out", str(scored[1])])
    with pytest.raises(ValueError, match=r"score.clip is 'tiny_clip' there, None here"):
        generate_spectrum.main([*few[0], "--out", str(scored[1])])


def test_blank_images_are_redrawn_and_listed_if_they_stay_so(few, tmp_path, monkeypatch):  # noqa: F811
    """One source gives nothing but NaN, another one NaN at first."""
    real = generators.Generator.draw
    sources = [row.source for row in tables.read_hard(Path(few[0][1]))][:2]

    def some_nan(self, batch, redraw, *more):
        images = real(self, batch, redraw, *more).clone()
        for place, unit in enumerate(batch.units):
            if unit.source == sources[0] or (unit.source == sources[1] and redraw == 0):
                images[place] = torch.nan
        return images

    monkeypatch.setattr(generators.Generator, "draw", some_nan)
    out = draw(few, tmp_path / "s", *HIGH, code=1)
    assert {failure["source"] for failure in failures(out)} == {sources[0]} and len(failures(out)) == 4
    rows = list(rows_of(out).values())
    assert len(rows) == 20
    assert all(row["redraws"] > 0 for row in rows if row["source"] == sources[1])


def test_the_check_asks_for_scores(scored, tmp_path):
    out = tmp_path / "s"
    shutil.copytree(scored[1], out)
    path = out / "shard-00000/metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[0]["text_score"]
    rows[1]["image_score"] = 1.5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong = spectrum_folder.check(out)[1]
    assert "row 1: text_score is None" in wrong[0] and "row 2: image_score is 1.5, no cosine" in wrong[1]


def test_a_dry_run_says_that_redraws_come_on_top(few, tmp_path, capsys):  # noqa: F811
    assert generate_spectrum.main([*few[0], *HIGH, "--out", str(tmp_path / "s"), "--dry-run"]) == 0
    assert "images under --threshold 0.5 are drawn up to 3 times again" in capsys.readouterr().out


@given(st.lists(st.text(min_size=1), min_size=1, max_size=8, unique=True), st.integers(0, 5))
def test_redraws_take_every_other_prompt_before_any_comes_again(texts, seed):
    unit = Unit("a", 10, seed)
    first = choose_prompt(unit, texts)
    others = [choose_prompt(unit, texts, number) for number in range(1, len(texts))]
    assert sorted([first, *others]) == sorted(texts)
    if len(texts) > 1:
        assert choose_prompt(unit, texts, len(texts)) == others[0]
    else:
        assert choose_prompt(unit, texts, 1) == first


def test_prompts_are_chosen_among_all():
    assert {choose_prompt(Unit("a", 10, seed), ["p", "q", "r"]) for seed in range(40)} == {"p", "q", "r"}


def test_the_redraw_rule_by_hand():
    """Threshold 0.5, two redraws: a has just that at once, b's second drawing is its best, c's third is enough."""
    scores = {"a": [0.5], "b": [0.1, 0.3, 0.2], "c": [0.4, 0.2, 0.9]}
    drawn = []

    def draw_once(batch, redraw, images):
        drawn.append([unit.source for unit in batch.units])
        count = len(batch.units)
        return torch.full((count, 2, 2, 3), redraw, dtype=torch.uint8), torch.ones(count, dtype=bool), lambda: None

    def score(pictures, labels, sources):
        return [scores[name][len(drawn) - 1] for name in sources], [0.0] * len(sources)

    job = SimpleNamespace(
        args=SimpleNamespace(max_redraws=2, threshold=0.5, format="png"),
        draw_once=draw_once,
        read_sources=lambda batch: {},
        row=lambda unit, redraw, size: {"width": 2, "height": 2, "label": 0, "redraws": redraw},
        scorer=SimpleNamespace(score=score),
        retouch=None,
    )
    pixels, _, _, rows = Job.draw_best(job, Batch(10, (2, 2), None, [Unit(name, 10, 0) for name in "abc"]), {})
    assert drawn == [["a", "b", "c"], ["b", "c"], ["b", "c"]]
    assert [(row["redraws"], row["text_score"]) for row in rows] == [(0, 0.5), (1, 0.3), (2, 0.9)]
    assert pixels[:, 0, 0, 0].tolist() == [0, 1, 2]
