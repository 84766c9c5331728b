"""Hard images by a model's confidence: against a plain computation, resumed, and what is refused."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import draw_toycam
from torchvision.transforms.v2 import functional

import datasets
import filter_edits
import find_hard
import models
import train_lt
from loaders.base import ASSETS
from models import build_classifier
from runtime import files
from runtime.cli import UserError
from spectrum import embeddings, tables
from spectrum import folder as spectrum_folder

CLIP = ["--rule", "confidence", "--clip", str(ASSETS / "tiny_clip")]
pytestmark = pytest.mark.usefixtures("blank_figures")


def hard_rows(path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def clip_probabilities() -> np.ndarray:
    """The true class's probability of each training image, one at a time, straight through open_clip."""
    import open_clip

    name = f"local-dir:{ASSETS / 'tiny_clip'}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    model.eval()
    tokenizer, data = open_clip.get_tokenizer(name), datasets.load("digits", 30)
    with torch.no_grad():
        texts = model.encode_text(tokenizer([f"a photo of a {name}" for name in data.class_names]), normalize=True)
        found = []
        for pixels, label in zip(data.train.images, data.train.labels, strict=True):
            image = model.encode_image(preprocess(Image.fromarray(pixels))[None], normalize=True)
            found.append((model.logit_scale.exp() * image @ texts.T).softmax(1)[0, label].item())
    return np.array(found)


def test_a_clips_lowest_tenth_is_hard(clip_probabilities, tmp_path, capsys, drawn):
    out = tmp_path / "hard.csv"
    assert find_hard.main([*CLIP, "--out", str(out)]) == 0
    data = datasets.load("digits", 30)
    lowest = sorted(np.argsort(clip_probabilities, kind="stable")[:19].tolist())  # ceil(18.4) of 184
    rows = hard_rows(out)
    assert [row["source"] for row in rows] == [data.train.sources[place] for place in lowest]
    assert [float(row["score"]) for row in rows] == pytest.approx(clip_probabilities[lowest], abs=1e-5)
    assert {row["reason"] for row in rows} == {"confidence"}
    assert len(np.unique(np.asarray(Image.open(tmp_path / "hard.png")))) > 10
    assert "19 hard images of 184" in capsys.readouterr().out
    assert len(tables.read_hard(out)) == 19


def test_a_few_shot_class_is_one_of_the_tables_few(tmp_path, capsys):
    """Images held out for validation count: 20 make a medium class, though 19 of them are trained on."""
    for name, number in (("big", 40), ("medium", 20), ("few", 19)):
        for part, images in (("train", number), ("test", 1)):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", (8, 8), "grey").save(folder / f"{i}.png")
    data = ["--dataset", "imagefolder", "--data-root", str(tmp_path / "data")]
    assert find_hard.main([*data, "--out", str(tmp_path / "hard.csv")]) == 0
    rows = hard_rows(tmp_path / "hard.csv")
    assert {(row["class_name"], row["score"]) for row in rows} == {("few", "19")} and len(rows) == 18
    groups = datasets.load("imagefolder", None, tmp_path / "data").groups
    assert groups["few"].tolist() == [1] and groups["medium"].tolist() == [0, 2]


@pytest.mark.parametrize("dataset", ["digits", "toycam"])
def test_rule_all_takes_every_training_image_once(tmp_path, dataset):
    out = tmp_path / "hard.csv"
    root = draw_toycam(tmp_path / "toycam", 24, 6) if dataset == "toycam" else None
    flags = ["--data-root", str(root)] if root else []
    assert find_hard.main(["--dataset", dataset, *flags, "--rule", "all", "--out", str(out)]) == 0
    data, rows = datasets.load(dataset, None if root else 30, root), hard_rows(out)
    assert [row["source"] for row in rows] == data.train.sources
    assert [int(row["label"]) for row in rows] == data.train.labels.tolist()
    assert {row["reason"] for row in rows} == {"all"} and {row["score"] for row in rows} <= {
        str(count) for count in data.counts
    }


def test_a_threshold_is_exclusive(clip_probabilities, tmp_path):
    out = tmp_path / "hard.csv"
    assert find_hard.main([*CLIP, "--threshold", "0.99", "--out", str(out)]) == 0
    assert len(hard_rows(out)) == (clip_probabilities < 0.99).sum()


def test_the_lowest_are_chosen_by_hand():
    scores = np.array([0.5, 0.1, np.nan, 0.3, 0.1, 0.9])
    assert find_hard.find_unlikely(scores, 0.4, None) == [1, 4]  # 2 of the five that have one
    assert find_hard.find_unlikely(scores, 0.41, None) == [1, 3, 4]  # ceil(2.05)
    assert find_hard.find_unlikely(scores, 0.2, None) == [1]  # a tie goes to the earlier
    assert find_hard.find_unlikely(scores, 0.2, 0.3) == [1, 4]
    assert find_hard.find_unlikely(scores, 0.2, 0.0) == []
    assert find_hard.find_unlikely(np.full(30, 0.5), 0.1, None) == [0, 1, 2]


def test_a_killed_run_goes_on_and_another_model_is_refused(tmp_path, capsys):
    out, sidecar = tmp_path / "hard.csv", tmp_path / "hard.probabilities.jsonl"
    assert find_hard.main([*CLIP, "--out", str(out)]) == 0
    whole = out.read_bytes()
    lines = sidecar.read_bytes().splitlines(keepends=True)
    sidecar.write_bytes(b"".join(lines[:100]) + lines[100][:20])  # half a row
    capsys.readouterr()
    assert find_hard.main([*CLIP, "--out", str(out)]) == 0
    assert "84 newly scored" in capsys.readouterr().out and out.read_bytes() == whole
    assert len(tables.read_probabilities(sidecar)) == 184
    with pytest.raises(UserError, match="templates is .*Expected the same.*or delete"):
        find_hard.main([*CLIP, "--templates", "a {} in blue ink", "--out", str(out)])


def test_weights_trained_again_in_the_same_file_are_another_model(tmp_path, monkeypatch):
    """As a run's clip.safetensors is named; the same weights elsewhere are the same model."""
    shipped, load = ASSETS / "tiny_clip", models.load_clip
    monkeypatch.setattr(models, "load_clip", lambda name, device: load(str(shipped), device))
    (tmp_path / "moved").mkdir()
    for folder in (tmp_path, tmp_path / "moved"):
        (folder / "clip.safetensors").write_bytes(b"weights")
    flags = ["--rule", "confidence", "--out", str(tmp_path / "hard.csv"), "--clip"]
    clips = [f"tiny:{folder / 'clip.safetensors'}" for folder in (tmp_path, tmp_path / "moved")]
    assert find_hard.main([*flags, clips[0]]) == 0
    (tmp_path / "clip.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match="model_digest is .*Expected the same.*or delete"):
        find_hard.main([*flags, clips[0]])
    assert find_hard.main([*flags, clips[1]]) == 0
    described = [spectrum_folder.describe_clip(clip) for clip in clips]  # as the other steps have it
    assert {one["clip"] for one in described} == {"tiny:clip.safetensors"}
    assert described[0]["clip_digest"] != described[1]["clip_digest"]


def test_a_run_of_train_lt_gives_the_probabilities(tmp_path):
    folder, out = tmp_path / "run", tmp_path / "hard.csv"
    assert train_lt.main(["--out", str(folder), "--epochs", "1", "--curriculum-epochs", "0"]) == 0
    arguments = ["--rule", "confidence", "--checkpoint", str(folder), "--fraction", "1", "--out", str(out)]
    assert find_hard.main(arguments) == 0
    data = datasets.load("digits", 30)
    model = build_classifier("resnet8", 10).eval()
    model.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["model"])
    with torch.no_grad():
        pixels = torch.from_numpy(data.train.images).permute(0, 3, 1, 2).float() / 127.5 - 1
        expected = model(pixels).softmax(1)[torch.arange(184), data.train.labels]
    found = [float(row["score"]) for row in hard_rows(out)]
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
    with pytest.raises(UserError, match="--checkpoint .*trained with --imb-ratio 30.0; expected 10"):
        find_hard.main([*arguments[:-1], str(tmp_path / "new.csv"), "--imb-ratio", "10"])
    args = files.read_json(folder / "args.json")
    args["args"]["model"] = "resnet14"
    files.write_json(folder / "args.json", args)
    with pytest.raises(UserError, match="checkpoint.pt: does not fit the model resnet14"):
        find_hard.main([*arguments[:-1], str(tmp_path / "other.csv")])
    (folder / "checkpoint.pt").unlink()
    with pytest.raises(UserError, match="checkpoint.pt"):
        find_hard.main([*arguments[:-1], str(tmp_path / "third.csv")])


def test_a_run_gives_the_probabilities_of_its_averaged_weights_and_ldams_scale(tmp_path):
    folder, out = tmp_path / "run", tmp_path / "hard.csv"
    flags = ["--epochs", "1", "--curriculum", "none", "--loss", "ldam", "--ema", "0.5"]
    assert train_lt.main(["--out", str(folder), *flags]) == 0
    arguments = ["--rule", "confidence", "--checkpoint", str(folder), "--fraction", "1", "--out", str(out)]
    assert find_hard.main(arguments) == 0
    data = datasets.load("digits", 30)
    model = build_classifier("resnet8", 10, cosine_head=True).eval()
    average = torch.load(folder / "checkpoint.pt", weights_only=True)["average"]
    del average["n_averaged"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in average.items()})
    with torch.no_grad():
        cosines = model(torch.from_numpy(data.train.images).permute(0, 3, 1, 2).float() / 127.5 - 1)
    expected = (30 * cosines).softmax(1)[torch.arange(184), data.train.labels]
    assert [float(row["score"]) for row in hard_rows(out)] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_run_judges_images_as_it_evaluates_them(tmp_path):
    """Whole where it was trained on whole ones, by averaged weights, at LDAM's scale; in filter_edits.py too."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 1), ("test", 1)):
        for label in range(2):
            folder = tmp_path / "data" / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):  # wide ones, whose ends differ from their middle
                pixels = np.concatenate([rng.integers(0, 256, (16, 16, 3)) // (1 + shade) for shade in range(3)], 1)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    data_flags = ["--dataset", "imagefolder", "--data-root", str(tmp_path / "data")]
    flags = ["--epochs", "1", "--curriculum", "none", "--model", "resnet8", "--image-size", "16", "--batch-size", "4"]
    flags += ["--augment", "resize", "--loss", "ldam", "--ema", "0.5", "--device", "cpu", "--workers", "0"]
    run, out = tmp_path / "run", tmp_path / "hard.csv"
    assert train_lt.main([*data_flags, *flags, "--out", str(run)]) == 0

    data = datasets.load("imagefolder", None, tmp_path / "data")
    model = build_classifier("resnet8", 2, cosine_head=True).eval()
    average = torch.load(run / "checkpoint.pt", weights_only=True)["average"]
    del average["n_averaged"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in average.items()})
    images = torch.stack([functional.pil_to_tensor(Image.open(path)) for path in data.train.images])
    squeezed = functional.resize(images, [16, 16], antialias=True).float() / 255
    with torch.no_grad():
        cosines = model(functional.normalize(squeezed, list(data.mean), list(data.std)))
    expected = (30 * cosines).softmax(1)

    arguments = [*data_flags, "--rule", "confidence", "--checkpoint", str(run), "--fraction", "1", "--out", str(out)]
    assert find_hard.main(arguments) == 0
    own = expected[torch.arange(12), data.train.labels].tolist()
    assert [float(row["score"]) for row in hard_rows(out)] == pytest.approx(own, abs=1e-4)
    args = SimpleNamespace(spectrum=tmp_path, device="cpu", workers=0, batch_size=4)
    sets = {"train": (data.train.sources, data.train)}
    found = filter_edits.base_probabilities(args, data, run, sets)["train"]
    assert np.allclose(found, expected, atol=1e-4)


def test_an_unreadable_training_image_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    def read(names):
        for name in names:
            yield f"source {name}: not a readable image" if name == first else Image.new("RGB", (16, 16))

    first = datasets.load("digits", 30).train.sources[0]
    monkeypatch.setattr(embeddings, "read_training_images", lambda train, data_root: read)
    assert find_hard.main([*CLIP, "--fraction", "1", "--out", str(tmp_path / "hard.csv")]) == 1
    assert len(hard_rows(tmp_path / "hard.csv")) == 183
    assert f"{first}: unreadable, left out" in capsys.readouterr().out
    lines = (tmp_path / "hard.probabilities.jsonl").read_text().splitlines()
    assert {"source": first, "probability": None} in map(json.loads, lines)


def test_reading_training_images_goes_on_after_a_bad_one(tmp_path):
    for name in ("a", "c", "d"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"not an image")
    read = embeddings.read_training_images(datasets.load("digits", 30).train.take(np.array([0])), tmp_path)
    found = list(read(["a.png", "b.png", "c.png", "d.png"]))
    assert [isinstance(image, str) for image in found] == [False, True, True, False]
    assert "no such file" in found[1] and "c.png: not a readable image" in found[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "confidence"], "--rule confidence: expected --checkpoint or --clip"),
        (["--clip", "x:y"], "--clip: expected with --rule confidence only, not with --rule few"),
        (["--rule", "all", "--checkpoint", "."], "--checkpoint: expected with --rule confidence only"),
        ([*CLIP, "--templates", "a photo"], "--templates: expected texts with {}"),
        ([*CLIP, "--threshold", "0"], "--threshold 0.0: no image of digits is hard; the lowest"),
    ],
)
def test_bad_input_names_the_flag(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        find_hard.main([*arguments, "--out", str(tmp_path / "hard.csv")])
    assert not (tmp_path / "hard.csv").exists()
