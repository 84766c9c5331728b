"""CLIPScore against a plain computation, thresholds, and what a damaged folder does."""

from __future__ import annotations

import csv
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import datasets
import filter_clipscore
from loaders.base import ASSETS
from runtime import files
from runtime.cli import UserError
from spectrum import acceptance, quotas, tables
from spectrum import folder as spectrum_folder

pytestmark = pytest.mark.usefixtures("blank_figures")


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
    scores = tables.read_scores(road.spectrum / "scores.csv")
    for row in spectrum_folder.read_rows(road.spectrum)[::20]:
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
    scores = tables.read_scores(road.spectrum / "scores.csv")
    by_level = {level: [] for level in (0, 50, 90)}
    for row in spectrum_folder.read_rows(road.spectrum):
        by_level[row["level"]].append(scores[row["file_name"]]["image_score"])
    means = [sum(values) / len(values) for values in by_level.values()]
    assert means == sorted(means)


def test_another_threshold_scores_nothing_anew(road, copy, capsys):
    before = tables.read_scores(copy / "scores.csv")
    assert run(copy, road, "--threshold", "0.5") == 0
    after = tables.read_scores(copy / "scores.csv")
    assert "0 newly scored" in capsys.readouterr().out
    for name, row in after.items():
        assert row["text_score"] == before[name]["text_score"]
        assert row["kept"] == (row["text_score"] >= 0.5) and bool(row["reason"]) == (not row["kept"])


def test_another_prompt_scores_its_class_anew(road, copy, tmp_path, capsys):
    prompts = files.read_json(road.prompts)
    prompts["3"]["score_prompt"] = "a three in red ink"
    files.write_json(tmp_path / "other.json", prompts)
    filter_clipscore.main(["--spectrum", str(copy), "--prompts", str(tmp_path / "other.json")])
    assert "57 newly scored" in capsys.readouterr().out  # 19 sources, three levels


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
    row = tables.read_scores(copy / "scores.csv")[f"shard-00000/{broken.name}"]
    assert not row["kept"] and row["reason"] == "unreadable"
    assert broken.name in capsys.readouterr().out


def test_an_image_that_vanished_is_marked_and_the_run_goes_on(road, copy, capsys):
    gone = next(copy.glob("shard-*/*.png"))
    gone.unlink()
    assert run(copy, road, "--threshold", "0.1") == 1
    scores = tables.read_scores(copy / "scores.csv")
    row = scores[f"shard-00000/{gone.name}"]
    assert not row["kept"] and row["reason"] == "missing" and math.isnan(row["text_score"])
    assert len(scores) == 165 and sum(score["reason"] == "missing" for score in scores.values()) == 1
    assert f"{gone.name}: missing" in capsys.readouterr().out


def test_worker_processes_change_no_score(road, copy):
    broken = next(copy.glob("shard-*/*.png"))
    broken.write_bytes(b"not an image")
    (copy / "scores.csv").unlink()
    assert run(copy, road, "--threshold", "0.1", "--workers", "2", "--batch-size", "7") == 1
    found, expected = (tables.read_scores(folder / "scores.csv") for folder in (copy, road.spectrum))
    assert found.pop(f"shard-00000/{broken.name}")["reason"] == "unreadable"
    for name, row in found.items():
        assert row["text_score"] == pytest.approx(expected[name]["text_score"], abs=2e-6)
        assert row["image_score"] == pytest.approx(expected[name]["image_score"], abs=2e-6)


def test_scores_by_another_clip_are_set_aside(road, copy, tmp_path, capsys):
    shutil.copytree(ASSETS / "tiny_clip", tmp_path / "other")
    (tmp_path / "other/note.txt").write_text("another digest")
    before = (copy / "scores.csv").read_bytes()
    assert run(copy, road, "--clip", str(tmp_path / "other")) == 0
    assert (copy / "scores.previous.csv").read_bytes() == before
    assert "165 newly scored" in capsys.readouterr().out


def test_a_clip_that_cannot_be_loaded_costs_no_scores(road, copy, tmp_path):
    (tmp_path / "empty").mkdir()
    before = (copy / "scores.csv").read_bytes()
    with pytest.raises(UserError, match="--clip .*empty: expected a folder"):
        run(copy, road, "--clip", str(tmp_path / "empty"))
    assert (copy / "scores.csv").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# what is kept, by hand


def made_rows(**texts) -> tuple[list[dict], dict[str, dict]]:
    """Rows and scores: name=(label, level, text score)."""
    rows = [
        {
            "file_name": name,
            "source": f"s{label}{index % 2}",
            "label": label,
            "class_name": f"class {label}",
            "level": level,
            "seed": index // 2,
            "prompt": "p0",
        }
        for index, (name, (label, level, _)) in enumerate(texts.items())
    ]
    return rows, {name: {"text_score": text, "image_score": 0.5} for name, (*_, text) in texts.items()}


def kept(scores: dict[str, dict]) -> str:
    return "".join(sorted(name for name, entry in scores.items() if entry.get("kept")))


def test_a_threshold_is_inclusive():
    rows, scores = made_rows(a=(1, 0, 0.3), b=(1, 0, 0.2999), c=(2, 50, 0.9))
    acceptance.decide_kept(rows, scores, 0.3)
    assert kept(scores) == "ac"
    assert [scores[name]["reason"] for name in "abc"] == ["", "low text score", ""]


@pytest.mark.parametrize(
    ("share", "per", "expected"),
    [
        # class 1 level 0: a b c; class 1 level 50: d; class 2 level 0: e f. Best first: f d a c b e
        (0.5, "class-level", "acdf"),  # ceil(1.5) = 2 of three, 1 of one, 1 of two
        (0.5, "level", "acdf"),  # level 0: 3 of f a c b e; level 50: d
        (0.5, "all", "adf"),
        (0.34, "all", "adf"),  # ceil(2.04)
        (1 / 3, "all", "df"),
        (0.0, "all", ""),
        (1.0, "class-level", "abcdef"),
    ],
)
def test_a_share_keeps_the_best_of_each_group(share, per, expected):
    rows, scores = made_rows(a=(1, 0, 0.3), b=(1, 0, 0.1), c=(1, 0, 0.2), d=(1, 50, 0.4), e=(2, 0, 0.05), f=(2, 0, 0.5))
    acceptance.decide_kept(rows, scores, 0.3, share, per)
    assert kept(scores) == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40), st.floats(0, 1))
def test_a_share_keeps_its_number_and_none_better_is_left_out(texts, share):
    rows, scores = made_rows(**{f"n{i:02d}": (1, 0, text) for i, text in enumerate(texts)})
    acceptance.decide_kept(rows, scores, None, share, "class-level")
    inside = [entry["text_score"] for entry in scores.values() if entry["kept"]]
    outside = [entry["text_score"] for entry in scores.values() if not entry["kept"]]
    assert share * len(texts) - 1e-6 <= len(inside) < share * len(texts) + 1
    assert not inside or not outside or min(inside) >= max(outside)


def test_a_share_keeps_7_of_100_though_0_07_times_100_is_more_than_7_in_floats():
    rows, scores = made_rows(**{f"n{i:02d}": (1, 0, i / 100) for i in range(100)})
    acceptance.decide_kept(rows, scores, None, 0.07, "class-level")
    assert sorted(name for name, entry in scores.items() if entry["kept"]) == [f"n{i}" for i in range(93, 100)]


def test_images_without_a_score_are_never_kept():
    rows, scores = made_rows(a=(1, 0, 0.3), b=(1, 0, 0.1))
    scores["b"] = acceptance.no_score("unreadable")
    acceptance.decide_kept(rows, scores, None, 1.0, "all")
    assert kept(scores) == "a" and scores["b"]["reason"] == "unreadable"


def test_the_acceptance_table_by_hand():
    rows, scores = made_rows(
        a=(1, 0, 0.3), b=(1, 0, 0.1), c=(1, 50, 0.4), d=(2, 0, 0.05), e=(2, 50, 0.5), f=(3, 50, 0.2)
    )
    acceptance.decide_kept(rows, scores, 0.3)
    names = {row["label"]: row["class_name"] for row in rows}
    counted = acceptance.count_kept(rows, scores)
    groups = {1: "few", 2: "few", 3: "medium"}
    table = acceptance.tabulate(*counted, names, groups)
    assert table[0] == ["class 1", "class 2", "class 3", "all medium-shot", "all few-shot", "all"]
    assert table[1] == [0, 50]
    assert table[2].tolist() == [[2, 1], [1, 1], [0, 1], [0, 1], [3, 2], [3, 3]]
    assert table[3].tolist() == [[1, 1], [0, 1], [0, 0], [0, 0], [1, 2], [1, 2]]
    assert acceptance.tabulate(*counted, names, groups, 3)[0] == table[0]
    assert acceptance.tabulate(*counted, names, groups, 2)[0] == table[0][3:]  # of more classes the groups alone
    lines = acceptance.format_table(*table).splitlines()
    assert lines[1].split() == ["class", "1", "1/2", "1/1", "66.7%"]  # 2 of 3 images
    last = lines[-1].split()
    assert last == ["all", "1/3", "2/3", "50.0%"]


def test_the_papers_rate_stands_beside_ours():
    line = acceptance.paper_line(datasets.TABLE["imagenet_lt"].acceptance[None], 1000, 400)
    assert "46.5% on this data set (24,141 of 51,917)" in line and "40.0% (400 of 1,000)" in line
    # v4, Table 5: 324 hard images x 8 at ratio 100, 268 x 8 at 50.
    assert datasets.TABLE["cifar100_lt"].acceptance == {100: (324 * 8, 809), 50: (268 * 8, 668)}
    assert acceptance.paper_line(None, 10, 1) == ""


# ---------------------------------------------------------------------------------------------------------------------
# quotas


def test_a_top_up_plan_by_hand():
    """Class 1, level 50: two sources with seeds 0 and 1 each, 1 of 4 kept, 3 wanted: 2 / (2 / 6) = 6 more to draw."""
    rows, scores = made_rows(a=(1, 50, 0.4), b=(1, 50, 0.1), c=(1, 50, 0.1), d=(1, 50, 0.1))
    for row, prompt in zip(rows, ("p0", "p0", "p1", "p1"), strict=True):
        row["prompt"] = prompt
    acceptance.decide_kept(rows, scores, 0.3)
    made, counted = acceptance.count_kept(rows, scores)
    plan = {"hard_classes": [1], "levels": [0, 50]}
    short = quotas.find_short(plan, {1: "class 1"}, made, counted, 3)
    assert [(gap["level"], gap["made"], gap["kept"], gap["short"]) for gap in short] == [(0, 0, 0, 3), (50, 4, 1, 2)]
    enough = quotas.find_short(plan, {1: "class 1"}, made, counted, 1)  # level 50 has its one image
    assert [(gap["level"], gap["short"]) for gap in enough] == [(0, 1)]
    prompts = {1: {"prompts": ["p0", "p1", "p2", "p3"]}}
    found = quotas.plan_top_up(rows, prompts, short[1:], first_seed=2)
    assert [tuple(row.values()) for row in found] == [
        ("s10", 50, 2, "p2"),
        ("s11", 50, 2, "p3"),
        ("s10", 50, 3, "p2"),
        ("s11", 50, 3, "p3"),
        ("s10", 50, 4, "p0"),
        ("s11", 50, 4, "p1"),
    ]
    # Nothing was drawn at level 0: half is taken to be accepted, and seeds begin where the plan's own end.
    first = quotas.plan_top_up(rows, prompts, short[:1], first_seed=2)
    assert [(row["level"], row["seed"]) for row in first] == [(0, 2), (0, 2), (0, 3), (0, 3), (0, 4), (0, 4)]
    # 3 wanted where 1 of 3 was kept: 3 / (2 / 5) = 7.5, rounded up.
    gap = {"label": 1, "level": 50, "made": 3, "kept": 1, "short": 3}
    assert len(quotas.plan_top_up(rows, prompts, [gap], first_seed=2)) == 8


def test_a_class_that_nearly_always_fails_gets_at_most_ten_times_what_is_missing():
    rows, _ = made_rows(**{f"n{i:03d}": (1, 50, 0.1) for i in range(100)})
    short = [{"label": 1, "level": 50, "made": 100, "kept": 0, "short": 4}]
    assert len(quotas.plan_top_up(rows, {1: {"prompts": ["p"]}}, short, 0)) == 40


def test_rounds_are_counted_once_drawn_and_given_up_at_the_limit(road, copy, capsys):
    quota = ("--threshold", "0.9", "--min-per-class-level", "2", "--max-rounds", "1")
    assert run(copy, road, *quota) == 0
    asked = tables.read_top_up(copy / "top_up.csv")
    there = {(row["source"], row["level"], row["seed"]) for row in spectrum_folder.read_rows(copy)}
    assert asked and not {(unit.source, unit.level, unit.seed) for unit, _ in asked} & there
    assert "in round 1 of 1" in capsys.readouterr().out
    plan = (copy / "top_up.csv").read_bytes()
    assert run(copy, road, *quota) == 0  # nothing was drawn since: the same round, the same plan
    assert (copy / "top_up.csv").read_bytes() == plan and files.read_json(copy / "scores.json")["rounds"] == 0

    unit, prompt = asked[0]  # as the generator would draw it
    row = next(row for row in spectrum_folder.read_rows(copy) if row["source"] == unit.source)
    Image.new("RGB", (16, 16), "red").save(copy / "shard-00000" / unit.file_name)
    writer = files.RowWriter(copy / "shard-00000")
    writer.append([row | {"file_name": unit.file_name, "level": unit.level, "seed": unit.seed, "prompt": prompt}])
    writer.close()
    capsys.readouterr()
    assert run(copy, road, *quota) == 0
    assert "given up after 1 rounds" in capsys.readouterr().out
    assert not (copy / "top_up.csv").exists() and files.read_json(copy / "scores.json")["rounds"] == 1
    short = (copy / "short.csv").read_text().splitlines()
    assert short[0] == "label,class_name,level,made,kept,short" and len(short) > 1


def test_a_quota_that_is_reached_leaves_no_plan(road, copy, capsys):
    assert run(copy, road, "--threshold", "-1", "--min-per-class-level", "2") == 0
    assert "2 kept images or more at every level" in capsys.readouterr().out
    assert not (copy / "top_up.csv").exists()
    assert len((copy / "short.csv").read_text().splitlines()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# distance


def test_the_distance_to_the_real_images_falls_as_the_level_rises(road, copy, capsys, drawn):
    assert run(copy, road, "--threshold", "0.1", "--distance") == 0
    with (copy / "distance.csv").open() as file:
        rows = list(csv.DictReader(file))
    made = {int(row["level"]): row for row in rows if row["images"] == "made"}
    assert list(made) == [0, 50, 90] and {row["count"] for row in made.values()} == {"55"}
    for name in ("mmd", "frechet"):
        assert float(made[0][name]) > float(made[50][name]) > float(made[90][name])
    for name in ("distance.png", "acceptance.png"):
        assert len(np.unique(np.asarray(Image.open(copy / name)))) > 10
    assert "0 newly scored" in capsys.readouterr().out


def test_a_real_image_that_cannot_be_read_is_left_out_of_the_distances(road, copy, capsys, monkeypatch):
    from spectrum import embeddings

    def all_but_one(train, data_root):
        read = read_all(train, data_root)
        return lambda names: ("x.jpg: is truncated" if name == broken else next(read([name])) for name in names)

    read_all = embeddings.read_training_images
    broken = spectrum_folder.read_rows(copy)[0]["source"]
    monkeypatch.setattr(embeddings, "read_training_images", all_but_one)
    assert run(copy, road, "--threshold", "0.1", "--distance") == 0
    with (copy / "distance.csv").open() as file:
        counted = {int(row["real_count"]) for row in csv.DictReader(file)}
    assert f"1 of {max(counted) + 1} real images cannot be read and are left out, the first: x.jpg: is truncated" in (
        capsys.readouterr().out
    )


# ---------------------------------------------------------------------------------------------------------------------
# bad input


def test_a_clip_whose_checkpoint_is_another_architectures_is_named(road, copy, tmp_path):
    shutil.copytree(ASSETS / "tiny_clip", tmp_path / "wide")
    config = files.read_json(tmp_path / "wide/open_clip_config.json")
    config["model_cfg"]["vision_cfg"]["width"] = 80
    files.write_json(tmp_path / "wide/open_clip_config.json", config)
    (copy / "scores.csv").unlink()
    with pytest.raises(UserError, match="--clip .*wide: its checkpoint does not match its architecture: .*"):
        run(copy, road, "--clip", str(tmp_path / "wide"))


def test_a_clip_that_gives_nan_is_named(road, copy, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(ASSETS / "tiny_clip", tmp_path / "nan")
    weights = load_file(tmp_path / "nan/open_clip_model.safetensors")
    weights["text_projection"][0, 0] = torch.nan
    save_file(weights, tmp_path / "nan/open_clip_model.safetensors")
    before = (copy / "scores.csv").read_bytes()
    with pytest.raises(UserError, match="gives a text an embedding that is not finite"):
        run(copy, road, "--clip", str(tmp_path / "nan"))
    assert (copy / "scores.csv").read_bytes() == before


def test_nan_scores_and_two_rows_for_one_file_are_named(road, copy):
    path = copy / "scores.csv"
    lines = path.read_text().splitlines()
    name = lines[1].split(",")[0]
    path.write_text("\n".join([lines[0], f"{name},nan,0.5,1,", *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=f"scores.csv row 2: the score of {name} is not finite"):
        run(copy, road)
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(UserError, match=f"scores.csv row 167: {name} is there twice"):
        run(copy, road)
    path.write_text("\n".join(lines) + "\n")
    table = copy / "shard-00000/metadata.jsonl"
    row = json.loads(table.read_text().splitlines()[0])
    with table.open("a") as file:
        file.write(json.dumps(row | {"seed": 7}) + "\n")
    with pytest.raises(UserError, match="metadata.jsonl row 166: .* has another row"):
        run(copy, road)


def test_a_spectrum_of_another_version_is_named(road, copy):
    table = copy / "shard-00000/metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    table.write_text("".join(json.dumps(row | {"level": row["level"] / 100}) + "\n" for row in rows))
    with pytest.raises(UserError, match="metadata.jsonl row 1: level is .*; expected a int, as in a spectrum of this"):
        run(copy, road)
    table.write_text("".join(json.dumps({key: row[key] for key in row if key != "label"}) + "\n" for row in rows))
    with pytest.raises(UserError, match="metadata.jsonl row 1: has no label; expected a spectrum of this version"):
        run(copy, road)
    table.write_text("".join(json.dumps(row | {"level": -1}) + "\n" for row in rows))
    with pytest.raises(UserError, match="metadata.jsonl row 1: level is -1; expected one from 0 to 99"):
        run(copy, road)


def test_a_missing_source_is_named_before_anything_is_scored(road, copy):
    table = copy / "shard-00000/metadata.jsonl"
    table.write_text(table.read_text().replace('"source": "index:', '"source": "index:9'))
    (copy / "scores.csv").unlink()
    with pytest.raises(UserError, match="source index:9.*: not a training image of this data set"):
        run(copy, road)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_class_name_is_named(road, tmp_path, name):
    (tmp_path / "hard.csv").write_text(f"source,label,class_name,reason,score\na,3,{name},few,1\n")
    with pytest.raises(UserError, match="hard.csv row 2: the class name of class 3 is empty"):
        tables.read_hard(tmp_path / "hard.csv")
    files.write_json(tmp_path / "p.json", {"3": {"class_name": name, "score_prompt": "a", "prompts": ["a"]}})
    with pytest.raises(UserError, match="p.json class 3: class_name or score_prompt is empty"):
        tables.read_prompts(tmp_path / "p.json", [3])


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


@pytest.mark.parametrize(("takes", "saves"), [(0, 33), (6, 9)])
def test_saves_take_a_twentieth_of_the_time_at_most(takes, saves, monkeypatch):
    """A hundred batches of 10.5 s: saves come after three, and after twelve where the last one took 6 s."""
    now, saved = [0.0], []

    class Clip:
        def texts(self, texts):
            return torch.eye(2)[[0] * len(texts)]

        def all_images(self, names, *_):
            return self.texts(names), {}

        def images(self, names, _):
            for place in range(len(names)):
                now[0] += 10.5
                yield [place], self.texts([""]), {}

    def save() -> None:
        saved.append(now[0])
        now[0] += takes

    monkeypatch.setattr(filter_clipscore.time, "monotonic", lambda: now[0])
    rows = [{"label": 0, "source": "s", "file_name": str(number)} for number in range(100)]
    args, scores = SimpleNamespace(data_root=None, spectrum="x"), {}
    filter_clipscore.score_images(rows, {0: {"score_prompt": "p"}}, None, Clip(), args, scores, save)
    assert len(scores) == 100 and scores["7"]["text_score"] == 1.0
    assert len(saved) == saves
