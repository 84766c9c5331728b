"""What no paper has: a generator tuned on few-shot classes draws a spectrum, on which curricula train."""

from __future__ import annotations

import json

import pytest

import filter_clipscore
import find_hard
import generate_spectrum
import train_fewshot
import train_lt
import tune_generator
from reporting import names
from runtime.cli import UserError
from spectrum import folder as spectrum_folder
from spectrum import tables

TUNING = ["--epochs", "2", "--warmup-steps", "1", "--samples", "0", "--rank", "2"]
pytestmark = pytest.mark.usefixtures("blank_figures")
DRAWING = ["--levels", "0", "50", "90", "--seeds", "1", "--steps", "4"]


def results(out) -> tuple[dict, dict, list[dict]]:
    """Arguments, results and history of a run."""
    read = [json.loads((out / name).read_text()) for name in ("args.json", "results.json")]
    return read[0]["args"], read[1], [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_few_shot_classes_of_a_long_tail_tune_the_generator_of_their_spectrum(tmp_path):
    """From find_hard.py to train_lt.py --curriculum d2s, as recipes/imagenet_lt/r10_bs_d2s_tuned.args."""
    hard, tuned, drawn = tmp_path / "hard.csv", tmp_path / "tuned", tmp_path / "spectrum"
    assert find_hard.main(["--few-below", "5", "--out", str(hard)]) == 0
    flags = ["--hard", str(hard), "--mode", "dset", *TUNING, "--out", str(tuned)]
    assert tune_generator.main(["--dataset", "digits", *flags]) == 0
    assert generate_spectrum.main(["--tuned", str(tuned), *DRAWING, "--out", str(drawn)]) == 0
    assert {row["level"] for row in spectrum_folder.read_rows(drawn, decode=False)} == {0, 50, 90}
    assert sorted(row.source for row in tables.read_hard(tuned / "shots.csv")) == sorted(
        row.source for row in tables.read_hard(hard)
    )
    scored = ["--spectrum", str(drawn), "--prompts", str(tuned / "prompts.json"), "--threshold", "-1"]
    assert filter_clipscore.main(scored) == 0
    flags = ["--curriculum", "d2s", "--epochs", "5", "--curriculum-epochs", "4", "--spectrum", str(drawn)]
    out = tmp_path / "run"
    with pytest.raises(UserError, match="--method cls: .* is dset; expected --method dset"):
        train_lt.main([*flags, "--method", "cls", "--out", str(out)])
    assert train_lt.main([*flags, "--out", str(out)]) == 0
    args, found, history = results(out)
    assert args["method"] == "dset" and names.row_name(args) == "CE + dset tuning + d2s"
    assert [row["levels"] for row in history] == [[0], [50], [90], [100], [100]] and 0 <= found["last"]["few"] <= 100


@pytest.mark.slow
def test_few_shots_train_on_a_tuned_spectrum_from_text_to_the_real_images(tmp_path):
    """As recipes/fewshot/cars_dset_d2s.args."""
    data, tuned, drawn = ["--dataset", "fewshot_digits"], tmp_path / "tuned", tmp_path / "spectrum"
    assert tune_generator.main([*data, "--shots", "2", "--mode", "dset", *TUNING, "--out", str(tuned)]) == 0
    assert generate_spectrum.main([*data, "--tuned", str(tuned), *DRAWING, "--out", str(drawn)]) == 0
    flags = [*data, "--shots", "2", "--images", "both", "--curriculum", "d2s", "--spectrum", str(drawn)]
    flags += ["--epochs", "5", "--curriculum-epochs", "4", "--warmup-epochs", "0", "--out", str(tmp_path / "run")]
    assert train_fewshot.main(flags) == 0
    args, found, history = results(tmp_path / "run")
    assert names.row_name(args) == "real + dset synthetic + d2s" and found["train_counts"] == [2] * 10
    assert [row["levels"] for row in history] == [[0], [50], [90], [100], [100]]
    assert [row["synthetic_share"] for row in history] == [0.5, 0.5, 0.5, 0, 0]
