"""Captions and domains: phrases and bits worked out by hand, three families of captioners, resuming, refusals."""

from __future__ import annotations

import json
import shutil
from math import log2

import numpy as np
import pytest
import tiny_captioners
from PIL import Image
from test_prompts import save_llm

import datasets
import describe_domains
from loaders.base import ASSETS
from runtime.cli import UserError
from spectrum import domains as summary

DATA = ["--dataset", "biased_digits"]
pytestmark = pytest.mark.usefixtures("blank_figures")


# ---------------------------------------------------------------------------------------------------------------------
# phrases and domains


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("Arafed  bird on a branch", "bird on a branch"),
        ("a bird on a branch on a branch on a branch", "a bird on a branch"),
        ("benz benz benz", "benz"),
        ("a benz and benz or benz by benz", ""),
        ("there is a bird, flying.", "there is a bird flying"),
    ],
)
def test_captions_are_cleaned(caption, cleaned):
    assert summary.clean_caption(caption) == cleaned


def test_phrases_leave_out_the_class_and_how_the_picture_was_taken():
    names = summary.name_pattern(["gull", "california gull", "bird"])
    split = summary.split_phrases
    assert split("a photo of a california gull in blue ink on the yellow paper", names) == [
        "in blue ink",
        "on the yellow paper",
    ]
    assert split("there are two birds flying over the water with mountains", names) == [
        "flying over the water",
        "with mountains",
    ]
    assert split("a close up of a gull", names) == [] and split("a building", names) == ["a building"]
    assert summary.phrase_key("on the branch") == summary.phrase_key("on a branch") == "on branch"


CAPTIONS = (
    ["a gull on a beach at night"] * 3 + ["an owl on the beach"] * 2 + ["an owl in a forest at night"] * 4 + ["a gull"]
)
LABELS = [0] * 3 + [1] * 6 + [0]


def test_the_phrases_that_add_most_come_first():
    """night covers 7 of 10; the beach then adds 2, the forest nothing."""
    found, attributes = summary.count_domains(CAPTIONS, LABELS, ["gull", "owl"], "bird")
    assert found == [{"name": "at night", "share": 0.7}, {"name": "on a beach", "share": 0.5}]
    assert attributes == [("in a forest", "owl")]
    assert [entry["name"] for entry in summary.count_domains(CAPTIONS, LABELS, ["gull", "owl"], "", most=1)[0]] == [
        "at night"
    ]
    assert len(summary.count_domains(CAPTIONS, LABELS, ["gull", "owl"], "", least_share=0.3)[0]) == 1
    only = [place for place, label in enumerate(LABELS) if label]
    kept, attributes = summary.count_domains([CAPTIONS[i] for i in only], [1] * 6, ["gull", "owl"], "", agnostic=True)
    assert attributes == [] and len(kept) == 2  # with one class there are no attributes of one


def test_a_phrase_of_one_class_is_left_out_where_agnostic():
    captions = ["a gull by a rock"] * 5 + ["a gull in snow", "an owl in snow"]
    labels = [0] * 6 + [1]
    assert len(summary.count_domains(captions, labels, ["gull", "owl"], "")[0]) == 2
    assert [one["name"] for one in summary.count_domains(captions, labels, ["gull", "owl"], "", agnostic=True)[0]] == [
        "in snow"
    ]


def test_a_caption_goes_to_the_longest_domain_it_holds_else_to_the_most_alike():
    names = ["on paper", "on yellow paper", "near a large lake"]
    assign = summary.assign_domain
    assert assign("a three in ink on yellow paper", names) == 1 and assign("a three on the paper", names) == 0
    assert assign("a lake that is large", names) == 2 and assign("a lake", names) == -1 and assign("a cat", names) == -1


def test_mutual_information_by_hand():
    assert summary.mutual_information(np.array([[3, 0], [0, 3]])) == pytest.approx(1)
    assert summary.mutual_information(np.array([[2, 2], [1, 1]])) == pytest.approx(0)
    # p = 1/2, 1/4, 0, 1/4; rows 3/4, 1/4; columns 1/2, 1/2
    expected = 0.5 * log2(0.5 / 0.375) + 0.25 * log2(0.25 / 0.375) + 0.25 * log2(0.25 / 0.125)
    assert summary.mutual_information(np.array([[2, 1], [0, 1]])) == pytest.approx(expected)
    labels, domains = np.array([0, 0, 1, 1]), np.array([0, -1, 1, 1])
    assert summary.count_table(labels, domains, 2, 2).tolist() == [[1, 0, 1], [0, 2, 0]]


def test_an_answer_is_checked_line_by_line():
    answer = """Here are the captions:
1. "a photo of a bird perched on a branch."
2. a photo of a bird perched on the branch
- a photo of a gull on a beach
* a photo of a bird that looks at another bird
a photo of a bird swimming in a lake at dusk
a photo of a bird in a {} forest
a photo of a bird at night"""
    found, refused = summary.read_domain_lines(answer, "bird", ["gull"], most=2)
    assert [entry["prompt"] for entry in found] == [
        "a photo of a {} perched on a branch",
        "a photo of a {} swimming in a lake at dusk",
    ]
    assert [line.rpartition(": ")[2] for line in refused] == [
        "does not say 'bird' once",
        "nearly a copy of one above",
        "does not say 'bird' once",
        "does not say 'bird' once",
        "holds a brace",
        "more than 2",
    ]
    assert "names a class" in summary.read_domain_lines("a bird like a gull at sea", "bird", ["gull"], 2)[1][0]


@pytest.mark.parametrize(
    ("dataset", "general", "line", "prompt"),
    [
        ("cub", "a photo of a bird", "a photo of a bird flying over water", "a photo of a {} bird flying over water"),
        ("waterbirds", "a photo of a bird", "a photo of a bird on a branch", "a photo of a {} on a branch"),
        ("planes", "a photo of an airplane", "a photo of an airplane on grass", "a photo of an {} airplane on grass"),
        (
            "iwildcam7", "a camera trap photo of an animal",
            "a camera trap photo of an animal near a lake", "a camera trap photo of a {} near a lake",
        ),
    ],
)  # fmt: skip
def test_the_superclass_is_said_once_and_gives_its_place_to_the_class(dataset, general, line, prompt, tmp_path):
    args = describe_domains.build_parser().parse_args(["--dataset", dataset, "--data-root", str(tmp_path)])
    assert summary.general_prefix(args.prefix, args.superclass) == general
    found, _ = summary.read_domain_lines(line, args.superclass, ["Ivory Gull", "zebras"], 9, args.prefix)
    assert [entry["prompt"] for entry in found] == [prompt]


def test_two_lines_that_end_alike_are_two_domains(tmp_path):
    """domains.json may hold a name once: with two the steps after it would refuse the file."""
    answer = "a photo of a bird on a branch\na blurry black and white photo of a bird on a branch"
    found, _ = summary.read_domain_lines(answer, "bird", ["gull"], most=9)
    domains = [summary.complete_domain(entry, "a photo of a {}", "llm") for entry in found]
    assert [domain["name"] for domain in domains] == ["on a branch", "a blurry black and white photo of a on a branch"]
    (tmp_path / "domains.json").write_text(json.dumps({"domains": domains}))
    assert len(summary.read_domains(tmp_path / "domains.json")["domains"]) == 2


def test_a_prefix_may_be_without_an_article_and_without_a_superclass():
    assert summary.general_prefix("photo: {}", "bird") == "photo: bird"
    assert summary.general_prefix("a photo of a {}", "") == "a photo of a thing"
    found, _ = summary.read_domain_lines("photo: a bird on snow at night", "bird", [], 9, "photo: {}")
    assert found == [{"name": "on snow at night", "prompt": "photo: a {} on snow at night"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an object with a list domains"),
        ({"domains": []}, "no domain in it"),
        ({"domains": [{"name": "x", "prompt": "a bird at night", "instruction": "make it night"}]}, "has 0 slots {}"),
        ({"domains": [{"name": "x", "prompt": "a {} and {}", "instruction": "make it night"}]}, "has 2 slots {}"),
        ({"domains": [{"name": "", "prompt": "a {}", "instruction": "i"}]}, "name is ''; expected a text"),
        ({"domains": [{"name": "x", "prompt": "a {}", "instruction": "i"}] * 2}, "'x' is there twice"),
        ({"domains": [{"name": "x", "prompt": "a {}", "instruction": "i"}], "negatives": [""]}, "list negatives"),
    ],
)
def test_a_bad_domains_file_is_named_before_anything_is_captioned(tmp_path, content, message):
    path = tmp_path / "domains.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        describe_domains.main([*DATA, "--summary", "file", "--domains", str(path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# captioners


@pytest.mark.parametrize("save", [tiny_captioners.save_git, tiny_captioners.save_qwen, tiny_captioners.save_florence])
def test_each_family_captions_a_batch_as_it_does_one_image(tmp_path, save):
    import torch

    import models
    from spectrum.captions import Captioner

    torch.manual_seed(0)
    loaded = models.load_captioner(str(save(tmp_path / "model")), "cpu")
    captioner = Captioner(loaded, None, 5)
    assert captioner.family == {"save_git": "plain", "save_qwen": "chat", "save_florence": "task"}[save.__name__]
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(3)]
    found = captioner.caption(images)
    assert len(found) == 3 and found == [captioner.caption([image])[0] for image in images]
    assert not any("<" in text or "assistant" == text.split()[:1] for text in found)
    if captioner.family == "task":
        with pytest.raises(UserError, match="--caption-prompt 'what': expected a task token"):
            Captioner(loaded, "what", 5)


# ---------------------------------------------------------------------------------------------------------------------
# the script


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    out = tmp_path_factory.mktemp("domains") / "out"
    assert describe_domains.main([*DATA, "--out", str(out)]) == 0
    return out


def test_the_embedded_captioner_finds_the_papers(described):
    content, data = json.loads((described / "domains.json").read_text()), datasets.load("biased_digits", None)
    assert {domain["name"] for domain in content["domains"]} == {f"on {paper} paper" for paper in data.domain_names}
    assert all(domain["prompt"] == f"a photo of a {{}} {domain['name']}" for domain in content["domains"])
    own = summary.read_source_domains(described / "sources.csv")
    expected = [f"on {data.domain_names[place]} paper" for place in data.train.domains]
    assert np.mean([own[source] == name for source, name in zip(data.train.sources, expected, strict=True)]) > 0.98
    shares = [domain["share"] for domain in content["domains"]]
    assert sum(shares) == pytest.approx(1, abs=0.03) and shares == sorted(shares, reverse=True)
    for name in ("domains.png", "captions.png"):  # drawn before any test's figures are blank
        assert len(np.unique(np.asarray(Image.open(described / name)))) > 10


def test_a_killed_run_and_shards_give_the_same_files(described, tmp_path, capsys):
    whole = {
        path.name: path.read_bytes() for path in described.glob("*.*") if path.suffix in (".json", ".jsonl", ".csv")
    }
    out = tmp_path / "out"
    shutil.copytree(described, out)
    for name in ("domains.json", "captions.jsonl", "sources.csv"):
        (out / name).unlink()
    rows = (out / "shard-00000/captions.jsonl").read_bytes().splitlines(keepends=True)
    (out / "shard-00000/captions.jsonl").write_bytes(b"".join(rows[:149]) + rows[149][:30])  # half a row
    assert describe_domains.main([*DATA, "--out", str(out), "--shard", "1/2"]) == 0
    assert "run the other shards" in capsys.readouterr().out and not (out / "domains.json").exists()
    assert describe_domains.main([*DATA, "--out", str(out)]) == 0
    assert {path.name: path.read_bytes() for path in out.glob("*.*") if path.name in whole} == whole


def test_a_changed_file_is_summed_up_and_an_empty_domain_is_named(described, tmp_path, capsys):
    out, own = tmp_path / "out", tmp_path / "own.json"
    shutil.copytree(described, out)
    content = json.loads((out / "domains.json").read_text())
    content["domains"] = content["domains"][:1] + [
        {"name": "at sea", "prompt": "a {} at sea", "instruction": "put it to sea"}
    ]
    own.write_text(json.dumps(content))
    assert describe_domains.main([*DATA, "--out", str(out), "--summary", "file", "--domains", str(own)]) == 0
    assert "domain 'at sea': no caption has it" in capsys.readouterr().out
    found = json.loads((out / "domains.json").read_text())["domains"]
    assert [domain["share"] > 0 for domain in found] == [True, False]


def test_a_language_models_domains_are_taken_and_nonsense_is_filled_up(described, tmp_path, capsys):
    lines = [
        "a photo of a digit on old brown paper",
        "a photo of a digit in a dark room",
        "a photo of a digit far away",
    ]
    for name, answer, sources in (("good", lines, ["llm"] * 3), ("bad", ["no idea", "a three at sea"], ["count"] * 4)):
        out, llm = tmp_path / name, save_llm(tmp_path / f"{name}_llm", answer, chat=True)
        shutil.copytree(described, out)
        arguments = ["--summary", "llm", "--llm", str(llm), "--llm-tokens", "8", "--tries", "1", "--sample", "5"]
        assert describe_domains.main([*DATA, "--out", str(out), *arguments]) == 0
        found = json.loads((out / "domains.json").read_text())["domains"]
        assert [domain["source"].split()[0] for domain in found] == sources
        row = json.loads((out / "domains.answers.jsonl").read_text())
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 2
    assert (
        found[0]["name"].endswith("paper") and "gave 0 usable domains: filled up from count" in capsys.readouterr().out
    )


def test_captions_of_another_model_or_data_set_stop_it(described, tmp_path):
    with pytest.raises(UserError, match="captioner is 'tiny_captioner' there, 'other' here"):
        other = tmp_path / "other"
        shutil.copytree(ASSETS / "tiny_captioner", other)
        describe_domains.main([*DATA, "--captioner", str(other), "--out", str(described)])
    with pytest.raises(UserError, match="dataset is 'biased_digits' there, 'digits' here"):
        describe_domains.main(["--captioner", str(ASSETS / "tiny_captioner"), "--out", str(described)])


def test_a_captioner_that_cannot_be_loaded_leaves_nothing_that_refuses_the_next(tmp_path):
    with pytest.raises(UserError, match="expected a folder"):
        describe_domains.main([*DATA, "--captioner", "/nowhere/at/all", "--out", str(tmp_path)])
    assert not (tmp_path / "captions.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--summary", "llm"], "--summary llm: expected --llm"),
        (["--llm", "x"], "--summary count: expected --llm with --summary llm"),
        (["--prefix", "a photo"], "--prefix 'a photo': expected a text with one {}"),
        (["--captioner", "/nowhere/at/all"], "--captioner /nowhere/at/all: expected a folder"),
    ],
)
def test_bad_flags_are_named(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        describe_domains.main([*DATA, "--out", str(tmp_path / "out"), *arguments])
