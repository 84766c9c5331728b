"""CLIPScore against a plain computation, thresholds, and what a damaged folder does."""

from __future__ import annotations

import shutil

import pytest
import torch
from PIL import Image

import datasets
import filter_clipscore
import runs
import spectrum
from cli import UserError
from defaults import ASSETS


@pytest.fixture
def copy(road, tmp_path):
    shutil.copytree(road.spectrum, tmp_path / "s")
    return tmp_path / "s"


def run(folder, road, *extra) -> int:
    return filter_clipscore.main(["--spectrum", str(folder), "--prompts", str(road.prompts), *extra])


def test_scores_are_the_cosines_of_a_plain_computation(road):
    """One image and one text at a time, straight through open_clip."""
    import open_clip

    name = f"local-dir:{ASSETS / 'tiny_clip'}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    model.eval()
    tokenizer = open_clip.get_tokenizer(name)
    data = datasets.load("digits", 30)
    scores = spectrum.read_scores(road.spectrum / "scores.csv")
    for row in spectrum.read_rows(road.spectrum)[::20]:
        with torch.no_grad():
            image = model.encode_image(preprocess(Image.open(road.spectrum / row["file_name"]))[None])
            text = model.encode_text(tokenizer([f"a photo of a {row['class_name']}"]))
            pixels = data.train.images[data.train.sources.index(row["source"])]
            source = model.encode_image(preprocess(Image.fromarray(pixels))[None])
        expected = torch.cosine_similarity(image, torch.cat([text, source]))
        found = scores[row["file_name"]]
        assert found["text_score"] == pytest.approx(expected[0].item(), abs=1e-5)
        assert found["image_score"] == pytest.approx(expected[1].item(), abs=1e-5)


def test_images_come_closer_to_their_source_as_the_level_rises(road):
    scores = spectrum.read_scores(road.spectrum / "scores.csv")
    by_level = {level: [] for level in (0, 50, 90)}
    for row in spectrum.read_rows(road.spectrum):
        by_level[row["level"]].append(scores[row["file_name"]]["image_score"])
    means = [sum(values) / len(values) for values in by_level.values()]
    assert means == sorted(means)


def test_another_threshold_scores_nothing_anew(road, copy, capsys):
    before = spectrum.read_scores(copy / "scores.csv")
    assert run(copy, road, "--threshold", "0.5") == 0
    after = spectrum.read_scores(copy / "scores.csv")
    assert "0 newly scored" in capsys.readouterr().out
    for name, row in after.items():
        assert row["text_score"] == before[name]["text_score"]
        assert row["kept"] == (row["text_score"] >= 0.5) and bool(row["reason"]) == (not row["kept"])


def test_another_prompt_scores_everything_anew(road, copy, tmp_path, capsys):
    prompts = runs.read_json(road.prompts)
    prompts["3"]["score_prompt"] = "a three in red ink"
    runs.write_json(tmp_path / "other.json", prompts)
    filter_clipscore.main(["--spectrum", str(copy), "--prompts", str(tmp_path / "other.json")])
    assert "165 newly scored" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(road, copy, capsys):
    scores = (copy / "scores.csv").read_text().splitlines()
    (copy / "scores.csv").write_text("\n".join(scores[:101]) + "\n")
    assert run(copy, road, "--threshold", "0.1") == 0
    assert "65 newly scored" in capsys.readouterr().out
    assert (copy / "scores.csv").read_text() == (road.spectrum / "scores.csv").read_text()


def test_an_unreadable_image_is_marked_and_the_run_goes_on(road, copy, capsys):
    broken = next(copy.glob("shard-*/*.png"))
    broken.write_bytes(b"not an image")
    (copy / "scores.csv").unlink()
    assert run(copy, road) == 1
    row = spectrum.read_scores(copy / "scores.csv")[f"shard-00000/{broken.name}"]
    assert not row["kept"] and row["reason"] == "unreadable"
    assert broken.name in capsys.readouterr().out


def test_a_threshold_is_inclusive():
    assert filter_clipscore.decide(0.3, 0.3) == (True, "")
    assert filter_clipscore.decide(0.2999, 0.3) == (False, "low text score")


def test_bad_input_names_the_flag(road, copy, tmp_path):
    with pytest.raises(UserError, match="--imb-ratio 10.0: .* was made with 30.0"):
        run(copy, road, "--imb-ratio", "10")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no plan.json"):
        run(tmp_path / "empty", road)
    shutil.copy(copy / "plan.json", tmp_path / "empty")
    with pytest.raises(UserError, match="holds no image"):
        run(tmp_path / "empty", road)
    with pytest.raises(UserError, match="--clip"):
        run(copy, road, "--clip", str(tmp_path / "empty"), "--threshold", "0.2")
