"""The three systems in one another: domain prompts in a spectrum, a spectrum's edits filtered, a tuned generator, hard
images alone. Each road is run from its inputs to a trained model."""

from __future__ import annotations

import csv
import shutil
from collections import Counter

import numpy as np
import pytest
from test_generate_tuned import tune
from test_prompts import DOMAINS

import datasets
import filter_edits
import find_hard
import generate_spectrum
import train_lt
import write_prompts
from loaders.base import ASSETS
from runtime import files
from spectrum import folder as spectrum_folder
from spectrum.tables import read_hard

BIASED = ["--dataset", "biased_digits"]
CLIP = str(ASSETS / "tiny_clip")


def call(script, *flags) -> None:
    assert script.main([str(flag) for flag in flags]) == 0


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """Every tenth training image of biased_digits, its prompts in two domains, and the domains."""
    root = tmp_path_factory.mktemp("hard")
    call(find_hard, *BIASED, "--out", root / "hard.csv")
    lines = (root / "hard.csv").read_text().splitlines(keepends=True)
    (root / "hard.csv").write_text("".join(lines[:1] + lines[1::10]))
    files.write_json(root / "domains.json", {"domains": DOMAINS})
    domains = ["--source", "domains", "--domains", root / "domains.json"]
    call(write_prompts, *BIASED, *domains, "--hard", root / "hard.csv", "--out", root / "prompts.json")
    return root


def edit(root, out, *flags) -> list[dict]:
    inputs = ["--hard", root / "hard.csv", "--prompts", root / "prompts.json", "--each-prompt", "--seeds", 1]
    call(generate_spectrum, *BIASED, *inputs, "--steps", 4, "--out", out, *flags)
    return spectrum_folder.read_rows(out)


def train(spectrum, out, *flags) -> tuple[dict, list[dict]]:
    short = ["--epochs", 5, "--batch-size", 64, "--spectrum", spectrum]
    call(train_lt, *BIASED, *short, *flags, "--out", out)
    return files.read_json(out / "args.json")["args"], files.read_json_lines(out / "history.jsonl")


@pytest.mark.slow
def test_domain_prompts_inside_a_spectrum_are_filtered_and_trained_in_its_order(hard, tmp_path):
    rows = edit(hard, tmp_path / "spectrum", "--levels", 10, 30, 50, 70)
    assert Counter((row["level"], row["domain"]) for row in rows) == {
        (level, domain["name"]): 30 for level in (10, 30, 50, 70) for domain in DOMAINS
    }
    rules = ["--rules", "class", "--clip", CLIP, "--prompts", hard / "prompts.json"]
    call(filter_edits, *BIASED, *rules, "--spectrum", tmp_path / "spectrum")
    flags = ["--curriculum", "d2s", "--levels", 10, 30, 50, 70, "--curriculum-epochs", 4, "--add", "all"]
    args, history = train(tmp_path / "spectrum", tmp_path / "run", *flags)
    assert [record["levels"] for record in history] == [[10], [30], [50], [70], [100]]
    assert args["edits"] == "domains"
    for record in history[:4]:  # all real images, and one accepted edit of each source at the stage's level
        kept = spectrum_folder.kept_rows(tmp_path / "spectrum", record["levels"])
        assert record["images"] == 300 + len({row["source"] for row in kept})
    assert history[4]["images"] == 300


@pytest.mark.slow
def test_a_long_tailed_spectrum_is_filtered_by_the_rules_of_edits(road, tmp_path):
    """DisCL's spectrum of few-shot digits: scores.csv and edits.csv both hold."""
    spectrum = shutil.copytree(road.spectrum, tmp_path / "spectrum")
    before = {row["file_name"] for row in spectrum_folder.kept_rows(spectrum, [0, 50, 90])}
    call(filter_edits, "--dataset", "digits", "--rules", "class", "--clip", CLIP, "--prompts", road.prompts,
         "--spectrum", spectrum)  # fmt: skip
    after = {row["file_name"] for row in spectrum_folder.kept_rows(spectrum, [0, 50, 90])}
    with (spectrum / "edits.csv").open() as file:
        by_class = {row["file_name"] for row in csv.DictReader(file) if row["kept"] == "1"}
    assert after == before & by_class and 0 < len(after) < len(before)
    flags = ["--epochs", 4, "--curriculum-epochs", 3, "--curriculum", "d2s", "--levels", 0, 50, 90]
    call(train_lt, "--dataset", "digits", *flags, "--spectrum", spectrum, "--out", tmp_path / "run")
    share = [record["synthetic_share"] for record in files.read_json_lines(tmp_path / "run/history.jsonl")]
    assert all(value > 0 for value in share[:3]) and share[3] == 0


@pytest.mark.slow
def test_a_tuned_generator_edits_toward_domains(tmp_path):
    """DataDream's adapter draws ALIA's edits of the images that it was tuned on."""
    data = ["--dataset", "fewshot_digits"]
    tuned = tune(tmp_path / "tuned", "dset")
    files.write_json(tmp_path / "domains.json", {"domains": DOMAINS})
    domains = ["--source", "domains", "--domains", tmp_path / "domains.json"]
    call(write_prompts, *data, *domains, "--hard", tuned / "shots.csv", "--out", tmp_path / "prompts.json")
    flags = ["--prompts", tmp_path / "prompts.json", "--levels", 50, "--each-prompt", "--seeds", 1, "--steps", 4]
    for name, adapter in (("with", ["--tuned", tuned]), ("without", ["--hard", tuned / "shots.csv"])):
        call(generate_spectrum, *data, *adapter, *flags, "--out", tmp_path / name)
    rows = spectrum_folder.read_rows(tmp_path / "with")
    assert Counter(row["domain"] for row in rows) == {domain["name"]: 6 for domain in DOMAINS}
    assert any(
        (tmp_path / "with" / row["file_name"]).read_bytes() != (tmp_path / "without" / row["file_name"]).read_bytes()
        for row in rows
    )
    for name in ("with", "without"):
        call(filter_edits, *data, "--rules", "class", "--clip", CLIP, "--prompts", tmp_path / "prompts.json",
             "--spectrum", tmp_path / name, "--keep-dropped", 1)  # fmt: skip
    assert len(spectrum_folder.kept_rows(tmp_path / "with", [50])) == len(rows)


@pytest.mark.slow
def test_hard_images_alone_are_edited(hard, tmp_path):
    """The tenth of the training images that a base model finds least likely: the ones on other classes' papers."""
    call(train_lt, *BIASED, "--epochs", 6, "--curriculum-epochs", 0, "--leave-out", "0/2", "--out", tmp_path / "base")
    flags = ["--rule", "confidence", "--checkpoint", tmp_path / "base", "--fraction", 0.1]
    call(find_hard, *BIASED, *flags, "--out", tmp_path / "hard.csv")
    chosen = {row.source for row in read_hard(tmp_path / "hard.csv")}
    train_set = datasets.load("biased_digits", None).train
    biased = train_set.domains == train_set.labels % 4
    hard_places = np.array([source in chosen for source in train_set.sources])
    assert len(chosen) == 30 and (~biased)[hard_places].mean() > 3 * (~biased).mean()
    domains = ["--source", "domains", "--domains", hard / "domains.json"]
    call(write_prompts, *BIASED, *domains, "--hard", tmp_path / "hard.csv", "--out", tmp_path / "prompts.json")
    rows = edit(tmp_path, tmp_path / "edits", "--levels", 50)
    assert {row["source"] for row in rows} == chosen and len(rows) == 60
    flags = ["--curriculum", "all", "--add", "all", "--edit-rules", "none", "--curriculum-epochs", 5]
    _, history = train(tmp_path / "edits", tmp_path / "run", *flags)
    assert [record["images"] for record in history] == [330] * 5
