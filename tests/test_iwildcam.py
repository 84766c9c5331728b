"""Camera traps: what is read, the contrastive loss, the heads, the metric, and what a curriculum's epoch holds."""

from __future__ import annotations

import csv
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import check_data
import datasets
import models
import train_iwildcam
from loaders import base, cameratraps, toycam
from runtime.cli import UserError
from training import clip as clip_tuning
from training import evaluation, losses, stores

SMALL = {"train": (0, 3, 96), "val": (6, 1, 20), "test": (8, 2, 40), "id_val": (0, 3, 30), "id_test": (0, 3, 40)}


@pytest.fixture(scope="module")
def traps(tmp_path_factory):
    """A smaller toycam; tests never change it."""
    root = tmp_path_factory.mktemp("traps") / "toycam"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toycam, "SPLITS", SMALL)
        toycam.draw(root)
    return root


# ---------------------------------------------------------------------------------------------------------------------
# the data


def test_toycam_has_the_layout_of_wilds(traps):
    rows = list(csv.DictReader((traps / "metadata.csv").open(encoding="utf-8")))
    assert {"split", "y", "filename", "location_remapped", "sequence_remapped", "datetime"} <= set(rows[0])
    assert len(list((traps / "train").glob("*.jpg"))) == len(rows) == sum(count for *_, count in SMALL.values())
    data = datasets.load("toycam", None, traps)
    assert {name: len(part) for name, part in data.splits.items()} == {name: row[2] for name, row in SMALL.items()}
    cameras = {name: set(places.tolist()) for name, places in data.locations.items()}
    assert cameras["id_val"] == cameras["id_test"] == cameras["train"] == {0, 1, 2}
    assert not (cameras["val"] | cameras["test"]) & cameras["train"]
    image, _ = data.train.read(0)
    assert image.size == (16, 16) and data.train.sources[0] == "train/train_0000.jpg"


def test_toycam_is_drawn_the_same_every_time(traps, tmp_path, monkeypatch):
    monkeypatch.setattr(toycam, "SPLITS", SMALL)
    toycam.draw(tmp_path / "again")
    for path in (traps / "metadata.csv", traps / "train/test_0007.jpg"):
        assert (tmp_path / "again" / path.relative_to(traps)).read_bytes() == path.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_without_a_folder_toycam_is_drawn_where_the_user_is(tmp_path, monkeypatch):
    monkeypatch.setattr(toycam, "SPLITS", SMALL)
    monkeypatch.chdir(tmp_path)
    data = datasets.load("toycam", None)
    assert len(data.train) == 96 and (tmp_path / "runs/toycam/metadata.csv").is_file()


def test_no_picture_of_the_web_is_one_of_the_data_set():
    rng = np.random.default_rng(0)
    web = {toycam.web_picture(rng)[0].tobytes() for _ in range(200)}
    assert len(web) == 200
    assert not web & {toycam.take(0, "train", i)[0].tobytes() for i in range(100)}


def test_the_class_table_is_whole():
    names = cameratraps.class_names()
    assert len(names) == 182 and all(names) and names[0] == "empty"
    rows = list(csv.DictReader((base.ASSETS / "iwildcam_classes.csv").open(encoding="utf-8")))
    assert [int(row["index"]) for row in rows] == list(range(182))
    known = {row["scientific_name"]: row["english_name"] for row in rows}
    assert known["panthera leo"] == "lion" and known["loxodonta africana"] == "african bush elephant"


def write_metadata(root, rows, header="split,y,filename,location_remapped"):
    (root / "train").mkdir(parents=True, exist_ok=True)
    for row in rows:
        path = root / "train" / row.split(",")[2]
        if path.parent.is_dir() and not path.exists():
            Image.new("RGB", (32, 18), (ord(path.stem[-1]) * 40 % 256, 128, 128)).save(path)  # no two alike
    (root / "metadata.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return root


WHOLE = ["train,181,a.jpg,0", "val,5,b.jpg,1", "test,9,c.jpg,2", "id_val,0,d.jpg,0", "id_test,0,e.jpg,0"]


def test_iwildcam_is_read_and_images_without_a_class_are_left_out(tmp_path, capsys):
    root = write_metadata(tmp_path, [*WHOLE, "train,99999,f.jpg,0"])
    data = datasets.load("iwildcam", None, root)
    assert len(data.class_names) == 182 and data.counts[181] == 1 and len(data.train) == 1
    assert check_data.main(["--dataset", "iwildcam", "--data-root", str(root)]) == 1
    said = capsys.readouterr().out
    assert "train: 1 found, 129809 expected" in said and "id_test: 1 found, 8154 expected" in said


def test_a_camera_of_training_in_an_out_of_domain_split_is_a_problem(tmp_path, capsys):
    root = write_metadata(tmp_path, [*WHOLE, "test,9,g.jpg,0"])
    check_data.main(["--dataset", "iwildcam", "--data-root", str(root)])
    assert "1 cameras of test (out of domain) are in train too, the first 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["train,182,a.jpg,0", *WHOLE], None, r"row 2: class 182; expected one below 182, as WILDS v2.0 has them"),
        (WHOLE[:-1], None, "no image in split id_test"),
        (["trans,1,a.jpg,0", *WHOLE], None, "row 2: split 'trans'; expected one of train, val, test, id_val, id_test"),
        (["train,1,../a.jpg,0", *WHOLE], None, "row 2: ../a.jpg: expected a file below train"),
        (["train,lion,a.jpg,0", *WHOLE], None, "row 2: y lion, .*: expected whole numbers"),
        (
            WHOLE,
            "split,category_id,filename,location",
            "no column y, location_remapped; expected WILDS",
        ),
    ],
)
def test_metadata_of_another_version_is_named(tmp_path, rows, header, message):
    root = write_metadata(tmp_path, rows, header or "split,y,filename,location_remapped")
    with pytest.raises(UserError, match=message):
        datasets.load("iwildcam", None, root)


def test_a_partial_download_says_how_many_and_which(traps, tmp_path):
    shutil.copytree(traps, tmp_path / "t")
    for i in range(5):
        (tmp_path / f"t/train/test_000{i}.jpg").unlink()
    with pytest.raises(UserError, match=r"5 of the 40 images of test are not there: train/test_0000.jpg, .* and so on"):
        datasets.load("toycam", None, tmp_path / "t")


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match="expected --data-root"):
        datasets.load("iwildcam", None)
    with pytest.raises(UserError, match="metadata.csv: no such file; expected WILDS's folder"):
        datasets.load("iwildcam", None, tmp_path)
    (tmp_path / "val_trans.csv").write_text("")
    with pytest.raises(UserError, match="this is version 1.0 of WILDS"):
        datasets.load("iwildcam", None, tmp_path)
    with pytest.raises(UserError, match="--imb-ratio 10"):
        datasets.load("iwildcam", 10, tmp_path)


def test_ones_own_camera_traps_have_their_own_class_names(tmp_path, capsys):
    root = write_metadata(tmp_path, [re.sub(r",(181|5|9),", ",1,", row) for row in WHOLE])
    with pytest.raises(UserError, match="class_names.txt: no such file; expected a folder with metadata.csv"):
        datasets.load("cameratraps", None, root)
    (root / "class_names.txt").write_text("empty\n\n", encoding="utf-8")
    with pytest.raises(UserError, match="class_names.txt: expected the name of a class in each line"):
        datasets.load("cameratraps", None, root)
    (root / "class_names.txt").write_text("empty\nlynx\n", encoding="utf-8-sig")  # as Windows' editors write it
    data = datasets.load("cameratraps", None, root)
    assert [data.class_names[label] for label in data.test.labels] == ["lynx"]
    assert data.class_names[0] == "empty" and root / "class_names.txt" in data.files
    assert check_data.main(["--dataset", "cameratraps", "--data-root", str(root)]) == 0
    assert "all as expected" in capsys.readouterr().out  # iWildCam's counts are not theirs
    write_metadata(tmp_path, [*WHOLE[:-1], "id_test,2,e.jpg,0"])
    with pytest.raises(UserError, match="class 181; expected one below 2$"):
        datasets.load("cameratraps", None, root)


# ---------------------------------------------------------------------------------------------------------------------
# loss, heads, metric


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_the_contrastive_loss_is_that_of_the_formula():
    torch.manual_seed(0)
    image, text, scale = unit(6, 8), unit(6, 8), 14.0
    expected = 0.0
    for i in range(6):
        row = np.array([scale * float(image[i] @ text[j]) for j in range(6)])
        column = np.array([scale * float(image[j] @ text[i]) for j in range(6)])
        expected += (np.log(np.exp(row).sum()) - row[i] + np.log(np.exp(column).sum()) - column[i]) / 12
    assert losses.contrastive(image, text, scale).item() == pytest.approx(expected, abs=1e-6)


def test_merged_classes_share_the_target():
    torch.manual_seed(1)
    image, text, labels = unit(4, 8), unit(4, 8), [2, 0, 2, 1]
    expected = 0.0
    for i in range(4):
        same = [j for j in range(4) if labels[j] == labels[i]]
        for one in (image @ text[i], text @ image[i]):
            value = (5.0 * one).numpy()
            expected += sum(np.log(np.exp(value).sum()) - value[j] for j in same) / len(same) / 8
    found = losses.contrastive(image, text, 5.0, torch.tensor(labels))
    assert found.item() == pytest.approx(expected, abs=1e-6)
    apart = losses.contrastive(image, text, 5.0, torch.arange(4))
    assert apart.item() == pytest.approx(losses.contrastive(image, text, 5.0).item(), abs=1e-12)


@pytest.fixture(scope="module")
def tiny():
    clip, _, tokenizer = models.load_clip(cameratraps.TOYCAM_CLIP, "cpu")
    return SimpleNamespace(clip=clip, tokenizer=tokenizer, tuned=clip_tuning.TunedClip(clip))


def test_the_zero_shot_head_is_the_mean_of_the_captions_and_its_logits_are_scaled_cosines(tiny):
    names, templates = ["deer", "bird"], ["a photo of {}.", "{} in the wild."]
    tokens = tiny.tokenizer(clip_tuning.captions_of(names, templates))
    head = clip_tuning.zero_shot_head(tiny.tuned, tokens, 2)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        logits = clip_tuning.Classifier(tiny.tuned, head)(images)
        for label, name in enumerate(names):
            mean = 0
            for template in templates:
                text = tiny.clip.encode_text(tiny.tokenizer([template.replace("{}", name)]))[0]
                mean = mean + text / text.norm()
            mean = mean / mean.norm()
            scale = tiny.clip.logit_scale.exp()
            assert torch.allclose(head[label], scale * mean, atol=1e-5)
            for i in range(3):
                image = tiny.clip.encode_image(images[i : i + 1])[0]
                cosine = (image @ mean) / image.norm()
                assert logits[i, label].item() == pytest.approx((scale * cosine).item(), abs=1e-4)
                assert (logits[i, label] / scale).item() == pytest.approx(cosine.item(), abs=1e-6)


def test_a_linear_head_starts_as_the_zero_shot_one_and_leaves_the_text_tower_out(tiny):
    clip, _, tokenizer = models.load_clip(cameratraps.TOYCAM_CLIP, "cpu")
    tokens = tokenizer(clip_tuning.captions_of(toycam.CLASSES, ["a photo of {}."]))
    head = clip_tuning.zero_shot_head(clip_tuning.TunedClip(clip), tokens, 5)
    tuned, images = clip_tuning.TunedClip(clip, head), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(tuned(images), clip_tuning.Classifier(tuned, head)(images), atol=1e-5)
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert "head.weight" in trained and "clip.visual.conv1.weight" in trained
    assert not any("transformer" in name and "visual" not in name for name in trained)


def test_heads_compute_in_float32_whatever_the_towers_do(tiny):
    head, images = 100 * unit(5, 32).float(), torch.randn(4, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = clip_tuning.Classifier(tiny.tuned, head)(images)
        features = tiny.tuned.image_features(images)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, features @ head.T, atol=1e-4)  # in bfloat16 they are up to 0.2 off


def test_the_linear_probe_finds_the_optimum_of_its_loss():
    torch.manual_seed(0)
    features, labels = torch.nn.functional.normalize(torch.randn(200, 6), dim=1), torch.randint(3, (200,))
    weight, bias = clip_tuning.linear_probe(features, labels, torch.zeros(3, 6))
    from sklearn.linear_model import LogisticRegression

    # scikit-learn minimises the sum of losses + w^2 / (2 C): C = 1 / (N * decay).
    theirs = LogisticRegression(C=1 / (200 * clip_tuning.PROBE_DECAY), max_iter=2000, tol=1e-8).fit(features, labels)
    ours = (features @ weight.T + bias).softmax(1).numpy()
    assert np.abs(ours - theirs.predict_proba(features)).max() < 0.01


def test_weights_between_two_models_by_hand():
    zero = {"w": torch.tensor([0.0, 2.0]), "count": torch.tensor(3)}
    tuned = {"w": torch.tensor([1.0, 6.0]), "count": torch.tensor(9)}
    found = clip_tuning.interpolate(zero, tuned, 0.25)
    assert found["w"].tolist() == [0.25, 3.0] and found["count"] == 9
    assert torch.equal(clip_tuning.interpolate(zero, tuned, 0.0)["w"], zero["w"])
    mask = {"mask": torch.tensor([0.0, -torch.inf])}  # of a text tower: between two infinities lies no number
    assert clip_tuning.interpolate(mask, mask, 0.25)["mask"].tolist() == [0.0, -torch.inf]
    assert torch.equal(clip_tuning.interpolate(zero, tuned, 1.0)["w"], tuned["w"])


def test_macro_f1_is_over_the_classes_that_are_there():
    labels = np.array([0, 0, 0, 1, 1, 4])
    predicted = np.array([0, 0, 2, 1, 0, 1])
    # class 0: 2 of 3 found, 3 taken: F1 2*2/(3+3); class 1: 2*1/(2+2); class 4: 0. Class 2 is not in the truth.
    assert evaluation.macro_f1(predicted, labels) == pytest.approx(100 * (4 / 6 + 2 / 4 + 0) / 3)
    assert evaluation.macro_f1(labels, labels) == 100


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60))
@settings(deadline=None, max_examples=50)
def test_macro_f1_is_that_of_wilds(pairs):
    labels, predicted = np.array(pairs).T
    scores = []
    for label in set(labels.tolist()):
        hits = ((labels == label) & (predicted == label)).sum()
        precision = hits / max(1, (predicted == label).sum())
        recall = hits / (labels == label).sum()
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert evaluation.macro_f1(predicted, labels) == pytest.approx(100 * np.mean(scores))


# ---------------------------------------------------------------------------------------------------------------------
# images


def test_the_crop_of_a_clip_is_that_of_open_clip(tmp_path):
    from open_clip import image_transform

    y, x = np.mgrid[:90, :160]
    Image.fromarray(np.stack([y * 2, x, 100 + y - x / 2], -1).astype(np.uint8)).save(tmp_path / "a.png")
    theirs = image_transform(56, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(Image.open(tmp_path / "a.png"))
    ours = stores.decode(tmp_path / "a.png", 56, None, stores.CLIP_CROP)
    assert np.abs(ours / 255 - theirs.permute(1, 2, 0).numpy()).max() < 2.5 / 255


def test_an_unreadable_image_is_noted_where_asked_and_an_error_elsewhere(traps, tmp_path):
    shutil.copytree(traps, tmp_path / "t")
    paths = sorted((tmp_path / "t/train").glob("*.jpg"))[:4]
    paths[2].write_bytes(b"no image")
    for workers in (0, 2):
        store = stores.Decoded(paths, "cpu", 16, workers, skip_unreadable=True)
        (images,) = store.evaluation(np.arange(4), 4)
        assert images.shape == (4, 3, 16, 16) and images[2].max() == 0 and images[3].max() > 0
        assert list(store.unreadable) == [2] and "not a readable image" in store.unreadable[2]
    with pytest.raises(UserError, match="not a readable image"):
        list(stores.Decoded(paths, "cpu", 16, 0).evaluation(np.arange(4), 4))


@pytest.mark.parametrize(("hard", "others"), [(2, ""), (3, "; the others are left out of the curriculum's epochs")])
def test_hard_images_without_an_accepted_one_are_spoken_of_where_there_are_some(hard, others, capsys):
    synthetic = {50: base.ImageSet([], np.zeros(2, dtype=np.int64), ["a.jpg", "b.jpg"])}
    train_iwildcam.say_hard(SimpleNamespace(per_hard_image=None), hard, [50, 100], synthetic)
    said = f"2 of {hard} hard images have an accepted image of the levels [50, 100]{others}\n"
    assert capsys.readouterr().out == said
