"""The files between the steps, steps 1 and 2, command lines and run folders: what is right, and what is refused."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import threading
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from pathlib import Path

import forks
import pytest
from PIL import Image

import find_hard
import generate_spectrum
import write_prompts
from loaders import pictures
from runtime import checkpoints, cli, files, runs
from runtime.cli import UserError
from spectrum import folder as spectrum_folder
from spectrum import tables
from spectrum.units import Unit

HARD_HEADER = "source,label,class_name,reason,score\n"
SCORE_HEADER = "file_name,text_score,image_score,kept,reason\n"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def make_image(path: Path) -> None:
    """An image that does not compress well, so that half of its file is half of the image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (16, 16), bytes(i * i % 251 for i in range(768))).save(path)


def make_spectrum(folder: Path, levels: list[int], kept: str = "") -> Path:
    """A spectrum with one image a level (level7.png and so on); `kept` holds a 0 or 1 for each, or nothing."""
    rows = [{"file_name": f"level{level}.png", "source": "index:1", "label": 3, "level": level} for level in levels]
    for row in rows:
        make_image(folder / "shard-00000" / row["file_name"])
    write(folder / "shard-00000/metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if kept:
        scores = (f"shard-00000/level{level}.png,0.5,0.5,{flag},\n" for level, flag in zip(levels, kept, strict=True))
        write(folder / "scores.csv", SCORE_HEADER + "".join(scores))
    return folder


def names(rows: list[dict]) -> list[str]:
    return [Path(row["file_name"]).name for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# hard.csv, prompts.json, scores.csv, plan.json


def test_hard_images_are_read(tmp_path):
    path = write(tmp_path / "hard.csv", HARD_HEADER + 'index:7,3,three,few,19\n"a,b.png",4,"fo""ur",few,2\n')
    assert tables.read_hard(path) == [
        tables.Hard("index:7", 3, "three"),
        tables.Hard("a,b.png", 4, 'fo"ur'),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "no column source, label, class_name, reason, score"),
        ("source,label,class_name,score\n", "no column reason; expected source,label,class_name,reason,score"),
        (HARD_HEADER, "no hard images"),
        (HARD_HEADER + "a,3,three,few,1\nb,three,three,few,1\n", "row 3: label 'three'"),
        (HARD_HEADER + "a,-1,three,few,1\n", "row 2: label '-1'"),
        (HARD_HEADER + "a,3.0,three,few,1\n", "row 2: label '3.0'"),
        (HARD_HEADER + "a,3,three,few,1\nb,3,three,few,1\na,4,four,few,1\n", "row 4: a is there twice"),
        (HARD_HEADER + "a,3,three\n", "values; expected 5 values"),
        (HARD_HEADER + "a,3,three,few,1,2\n", "values; expected 5 values"),
        (HARD_HEADER.encode() + b"a,3,\xff\xfe,few,1\n", "is not UTF-8"),
    ],
)
def test_bad_hard_csv_is_refused(tmp_path, content, message):
    path = tmp_path / "hard.csv"
    if content is not None:
        write(path, content)
    with pytest.raises(UserError, match=re.escape(f"{path}") + ".*" + re.escape(message)):
        tables.read_hard(path)


def entry(**changes) -> dict:
    return {"3": {"class_name": "three", "score_prompt": "a three", "prompts": ["a three"]} | changes}


def test_prompts_are_read_by_class_index(tmp_path):
    path = write(tmp_path / "prompts.json", json.dumps(entry() | {"4": entry()["3"]}))
    assert tables.read_prompts(path, [3]) == {3: entry()["3"], 4: entry()["3"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        (b"\xff", "is not UTF-8"),
        ("[]", "expected an object"),
        (json.dumps({"three": {}}), "key 'three'"),
        (json.dumps({"3": ["a three"]}), "key '3'"),
        (json.dumps(entry(score_prompt=None)), "class 3: expected texts class_name and score_prompt"),
        (json.dumps(entry(class_name=3)), "class 3: expected texts class_name and score_prompt"),
        (json.dumps(entry(prompts="a three")), "class 3: expected a list"),
        (json.dumps(entry(prompts=["a three", " "])), "class 3: expected a list"),
        (json.dumps(entry(prompts=[3])), "class 3: expected a list"),
        (json.dumps(entry(prompts=[])), "no prompt for class 3, 5;"),
        (json.dumps(entry()), "no prompt for class 5;"),
    ],
)
def test_bad_prompts_are_refused(tmp_path, content, message):
    path = tmp_path / "prompts.json"
    if content is not None:
        write(path, content)
    with pytest.raises(UserError, match=re.escape(f"{path}") + ".*" + re.escape(message)):
        tables.read_prompts(path, [3, 5, 3])


def test_scores_are_read_by_file_name(tmp_path):
    path = tmp_path / "scores.csv"
    scores = {
        "a.png": {"text_score": 0.25, "image_score": -1.0, "kept": True, "reason": ""},
        "b.png": {"text_score": 0.0000004, "image_score": -1.0, "kept": False, "reason": "low, very"},
    }
    tables.write_scores(path, ["b.png", "none.png", "a.png"], scores)
    assert path.read_text() == SCORE_HEADER + 'b.png,0.000000,-1.000000,0,"low, very"\na.png,0.250000,-1.000000,1,\n'
    scores["b.png"]["text_score"] = 0.0
    assert tables.read_scores(path) == scores


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("file_name,kept\n", "no column text_score, image_score, reason"),
        (SCORE_HEADER + "a,0.1,0.1,1,\nb,high,0.1,1,\n", "row 3: expected numbers"),
        (SCORE_HEADER + "a,0.1,,1,\n", "row 2: expected numbers"),
        (SCORE_HEADER + "a,0.1,0.1,True,\n", "row 2: kept is 'True'; expected 0 or 1"),
        (SCORE_HEADER + "a,0.1,0.1,1,\na,0.2,0.1,0,\n", "row 3: a is there twice"),
        (SCORE_HEADER + "a,0.1\n", "values; expected 5 values"),
    ],
)
def test_bad_scores_are_refused(tmp_path, content, message):
    path = tmp_path / "scores.csv"
    if content is not None:
        write(path, content)
    with pytest.raises(UserError, match=re.escape(f"{path}") + ".*" + re.escape(message)):
        tables.read_scores(path)


def test_a_folder_without_a_plan_is_no_spectrum(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no plan.json"):
        spectrum_folder.read_plan(tmp_path)
    write(tmp_path / "plan.json", '{"levels": [0,')
    with pytest.raises(UserError, match="plan.json: not valid JSON"):
        spectrum_folder.read_plan(tmp_path)
    write(tmp_path / "plan.json", '{"levels": [0]}')
    with pytest.raises(UserError, match="plan.json: lacks data_seed, dataset, hard_classes, imb_ratio"):
        spectrum_folder.read_plan(tmp_path)


def test_a_spectrum_of_a_generator_that_learnt_time_backwards_is_refused(tmp_path):
    plan = dict.fromkeys(spectrum_folder.PLAN_KEYS, 0) | {"hard_classes": [], "levels": [0]}
    plan |= {"generator": "tiny_sd", "revision": "356c3b0da59fa41b"}
    write(tmp_path / "plan.json", json.dumps(plan))
    with pytest.raises(UserError, match="noise schedule reversed; expected a spectrum drawn anew"):
        spectrum_folder.read_plan(tmp_path)


def test_tables_are_written_whole_and_leave_nothing_beside_them(tmp_path):
    rows = [{"source": "a", "label": 1, "class_name": "one", "reason": "few", "score": 2}]
    tables.write_hard(tmp_path / "deep/hard.csv", rows)
    assert (tmp_path / "deep/hard.csv").read_text() == HARD_HEADER + "a,1,one,few,2\n"
    with pytest.raises(ValueError):
        tables.write_hard(tmp_path / "deep/hard.csv", [rows[0], {"source": "b"}])
    assert (tmp_path / "deep/hard.csv").read_text() == HARD_HEADER + "a,1,one,few,2\n"


# ---------------------------------------------------------------------------------------------------------------------
# rows of a spectrum


def test_kept_rows_are_those_of_the_levels_asked_for_that_the_filter_keeps(tmp_path):
    make_spectrum(tmp_path, [0, 10, 50, 90], kept="1011")
    assert names(spectrum_folder.kept_rows(tmp_path, [0, 50])) == ["level0.png", "level50.png"]


def test_an_image_without_a_score_is_not_kept(tmp_path):
    make_spectrum(tmp_path, [0, 50], kept="11")
    write(tmp_path / "scores.csv", SCORE_HEADER + "shard-00000/level0.png,0.5,0.5,1,\n")
    assert names(spectrum_folder.kept_rows(tmp_path, [0])) == ["level0.png"]
    with pytest.raises(UserError, match="level 50: .* no accepted image"):
        spectrum_folder.kept_rows(tmp_path, [0, 50])


def test_a_spectrum_that_is_not_filtered_is_refused(tmp_path):
    make_spectrum(tmp_path, [0])
    with pytest.raises(UserError, match=f"{tmp_path}: no scores.csv there; run filter_clipscore.py"):
        spectrum_folder.kept_rows(tmp_path, [0])


@pytest.mark.parametrize(("level", "made"), [(10, 1), (70, 0)])
def test_a_level_with_no_accepted_image_is_an_error(tmp_path, level, made):
    make_spectrum(tmp_path, [0, 10], kept="10")
    with pytest.raises(UserError, match=rf"level {level}: .*no accepted image of it \(of {made} made\)"):
        spectrum_folder.kept_rows(tmp_path, [0, level])


def test_rows_of_all_shards_are_read_in_order(tmp_path):
    for shard in (1, 0):
        make_image(tmp_path / f"shard-0000{shard}/a.png")
        write(tmp_path / f"shard-0000{shard}/metadata.jsonl", '{"file_name": "a.png"}\n')
    assert [row["file_name"] for row in spectrum_folder.read_rows(tmp_path)] == [
        "shard-00000/a.png",
        "shard-00001/a.png",
    ]
    assert spectrum_folder.read_rows(tmp_path / "nowhere") == []


def test_an_image_with_two_rows_counts_once(tmp_path):
    make_spectrum(tmp_path, [0, 0, 50])
    assert names(spectrum_folder.read_rows(tmp_path)) == ["level0.png", "level50.png"]


def test_rows_whose_image_is_missing_or_damaged_are_dropped(tmp_path):
    make_spectrum(tmp_path, [0, 10, 30, 50, 70])
    shard = tmp_path / "shard-00000"
    (shard / "level10.png").unlink()
    whole = (shard / "level30.png").read_bytes()
    (shard / "level30.png").write_bytes(whole[: len(whole) // 2])
    (shard / "level50.png").write_bytes(b"")
    (shard / "level70.png").write_text("not an image")
    assert names(spectrum_folder.read_rows(tmp_path, decode=True)) == ["level0.png"]
    assert names(spectrum_folder.read_rows(tmp_path)) == ["level0.png", "level30.png", "level50.png", "level70.png"]


def test_an_image_cut_anywhere_in_its_pixels_does_not_decode(tmp_path):
    make_image(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    assert pictures.decodes(tmp_path / "whole.png")
    for length in range(len(content) - 24):  # its last 24 bytes hold two checksums and the end mark, but no pixel
        assert not pictures.decodes(write(tmp_path / "cut.png", content[:length])), length


@pytest.mark.parametrize("cut", [1, 20, 30, -2])
def test_a_torn_row_is_no_row_and_does_not_harm_the_next(tmp_path, cut):
    make_spectrum(tmp_path, [0, 10, 50])
    path = tmp_path / "shard-00000/metadata.jsonl"
    first, second, third = path.read_text().splitlines(keepends=True)
    path.write_text(first + second[:cut])
    assert names(spectrum_folder.read_rows(tmp_path)) == ["level0.png"]
    writer = files.RowWriter(tmp_path / "shard-00000")
    writer.append([json.loads(third)])
    writer.close()
    assert names(spectrum_folder.read_rows(tmp_path)) == ["level0.png", "level50.png"]


def test_a_row_torn_within_a_letter_is_no_row_either(tmp_path):
    make_spectrum(tmp_path, [0, 50])
    path = tmp_path / "shard-00000/metadata.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + '{"file_name": "level0.png", "class_name": "ż'.encode()[:-1])
    assert names(spectrum_folder.read_rows(tmp_path)) == ["level0.png", "level50.png"]
    writer = files.RowWriter(tmp_path / "shard-00000")
    make_image(tmp_path / "shard-00000/level90.png")
    writer.append([{"file_name": "level90.png"}])
    writer.close()
    assert names(spectrum_folder.read_rows(tmp_path)) == ["level0.png", "level50.png", "level90.png"]


def test_rows_are_on_the_disk_after_each_batch(tmp_path):
    writer = files.RowWriter(tmp_path / "shard-00000")
    writer.append([{"file_name": "a.png"}, {"file_name": "b.png"}])
    assert len((tmp_path / "shard-00000/metadata.jsonl").read_text().splitlines()) == 2
    writer.close()


@pytest.mark.parametrize("name", ["../secret.png", "../../secret.png", "a/../../secret.png", "{root}/secret.png", ".."])
def test_file_names_that_lead_out_of_the_folder_are_confined_to_it(tmp_path, name):
    folder = tmp_path / "spectrum"
    for place in (tmp_path, folder):
        make_image(place / "secret.png")
    row = json.dumps({"file_name": name.replace("{root}", str(tmp_path))})
    write(folder / "shard-00000/metadata.jsonl", row + "\n")
    assert spectrum_folder.read_rows(folder) == []
    make_image(folder / "shard-00000/secret.png")
    for found in spectrum_folder.read_rows(folder):
        assert found["file_name"] == "shard-00000/secret.png"


# ---------------------------------------------------------------------------------------------------------------------
# work units


def test_the_noise_seed_is_the_same_everywhere_and_for_ever():
    # int.from_bytes(blake2b(b"noise\0index:5\x0050\x000\x000", digest_size=8).digest(), "big") // 2, worked out apart
    assert Unit("index:5", 50, 0).noise_seed() == 8506118488801398691


def test_the_noise_seed_differs_by_source_level_seed_and_redraw():
    seeds = [
        Unit(source, level, seed).noise_seed(redraw)
        for source in ("index:5", "index:50", "b/5.png")
        for level in (0, 5, 50)
        for seed in (0, 5, 50)
        for redraw in (0, 1)
    ]
    assert len(set(seeds)) == 3 * 3 * 3 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_file_name_is_pinned():
    # blake2b(b"index:5", digest_size=6): a finished spectrum must be found again by later versions.
    assert Unit("index:5", 50, 0).file_name == "d91d9e0ca407_level050_seed00.png"


# ---------------------------------------------------------------------------------------------------------------------
# find_hard.py, write_prompts.py


def test_hard_images_of_digits_are_those_of_the_seven_few_shot_classes(tmp_path):
    assert find_hard.main(["--dataset", "digits", "--out", str(tmp_path / "hard.csv")]) == 0
    rows = tables.read_hard(tmp_path / "hard.csv")
    # int(60 * 30^(-k/9)): 60 41 28 19 13 9 6 4 2 2; fewer than 20 have classes 3 to 9.
    assert Counter(row.label for row in rows) == {3: 19, 4: 13, 5: 9, 6: 6, 7: 4, 8: 2, 9: 2}
    assert len(rows) == 55
    assert {row.label: row.class_name for row in rows}[3] == "three"
    scores = [line.split(",")[2:] for line in (tmp_path / "hard.csv").read_text().splitlines()]
    assert ["three", "few", "19"] in scores and ["nine", "few", "2"] in scores


@pytest.mark.parametrize(("few_below", "images"), [("3", 4), ("19", 36), ("20", 55), ("61", 184)])
def test_few_max_is_the_first_count_that_is_not_few(tmp_path, few_below, images):
    find_hard.main(["--few-below", few_below, "--out", str(tmp_path / "hard.csv")])
    assert len(tables.read_hard(tmp_path / "hard.csv")) == images


def test_no_hard_image_is_one_line_and_exit_code_2(tmp_path):
    done = forks.type_command(tmp_path, "find_hard.py", "--few-below", "2", "--out", "hard.csv")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "find_hard.py: error: --few-below 2: no class of digits has fewer images; the smallest has 2\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ratio", ["nan", "0.5", "-30", "x"])
def test_a_bad_imbalance_ratio_names_its_flag(tmp_path, capsys, ratio):
    with pytest.raises((UserError, SystemExit)) as caught:
        find_hard.main(["--imb-ratio", ratio, "--out", str(tmp_path / "hard.csv")])
    assert "--imb-ratio" in str(caught.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_write_prompts_completes_a_file_without_changing_what_is_there(tmp_path):
    hard = write(
        tmp_path / "hard.csv", HARD_HEADER + "index:1,3,three,few,1\nindex:2,5,five,few,1\nindex:3,10,ten,few,1\n"
    )
    mine = {"class_name": "three", "score_prompt": "mine – 3", "prompts": ["one", "two"], "note": "by hand"}
    old = {"class_name": "forty-two", "score_prompt": "old", "prompts": ["old"]}
    out = write(tmp_path / "prompts.json", json.dumps({"42": old, "3": mine}))
    arguments = ["--hard", str(hard), "--out", str(out)]
    assert write_prompts.main(arguments) == 0
    content = json.loads(out.read_text(encoding="utf-8"))
    assert list(content) == ["3", "5", "10", "42"]
    assert content["3"] == mine and content["42"] == old
    assert content["5"]["class_name"] == "five"
    assert content["5"]["score_prompt"] == content["5"]["prompts"][0] == "a photo of a five"
    before = out.read_bytes()
    assert write_prompts.main(arguments) == 0
    assert out.read_bytes() == before


def test_write_prompts_leaves_a_damaged_file_as_it_is(tmp_path):
    hard = write(tmp_path / "hard.csv", HARD_HEADER + "index:1,3,three,few,1\n")
    out = write(tmp_path / "prompts.json", '{"3": {')
    with pytest.raises(UserError, match="prompts.json: not valid JSON"):
        write_prompts.main(["--hard", str(hard), "--out", str(out)])
    assert out.read_text() == '{"3": {'


# ---------------------------------------------------------------------------------------------------------------------
# command lines


def test_an_argument_file_may_hold_comments_quotes_and_several_arguments_a_line(tmp_path):
    path = write(
        tmp_path / "a.args", '# a comment\n\n--dataset digits --few-below 7  # seven\n--out "a folder/hard #1.csv"\n'
    )
    args = find_hard.build_parser().parse_args([f"@{path}"])
    assert (args.dataset, args.few_below, args.out) == ("digits", 7, Path("a folder/hard #1.csv"))
    assert find_hard.build_parser().parse_args([f"@{path}", "--few-below", "9"]).few_below == 9
    assert find_hard.build_parser().parse_args(["--few-max", "9"]).few_below == 9  # the old spelling


def test_defaults_follow_the_data_set_and_give_way_to_what_is_said(tmp_path):
    parse = generate_spectrum.build_parser().parse_args
    assert parse([]).levels == [0, 10, 30, 50, 70, 90]
    assert (parse(["--dataset", "digits"]).imb_ratio, parse(["--dataset=digits"]).seeds) == (30.0, 4)
    path = write(tmp_path / "a.args", "--dataset digits\n--levels 0 99 --imb-ratio 10\n")
    args = parse([f"@{path}"])
    assert (args.levels, args.imb_ratio, args.seeds) == ([0, 99], 10.0, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("--few-below 7 --no-such-flag 1\n", "unrecognized arguments: --no-such-flag 1"),
        ("--few 7\n", "unrecognized arguments: --few 7"),
        ("--few-below many\n", "argument --few-below: 'many': expected a whole number of 1 or more"),
        ("--dataset nothing\n", "argument --dataset: invalid choice: 'nothing'"),
        ("--dataset\n", "argument --dataset: expected one argument"),
        ('--out "runs/hard.csv\n', "a.args"),
        (None, "a.args"),
    ],
)
def test_a_bad_argument_file_is_one_line_and_exit_code_2(tmp_path, capsys, content, message):
    if content is not None:
        write(tmp_path / "a.args", content)
    with pytest.raises(SystemExit) as caught:
        find_hard.build_parser().parse_args([f"@{tmp_path}/a.args"])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("find_hard.py: error: ") and message in error
    assert len(error.splitlines()) == 1


def test_numbers_have_ranges():
    assert (cli.whole(1)("1"), cli.whole(0, 5)("5"), cli.level("0"), cli.level("100")) == (1, 5, 0, 100)
    assert (cli.number(0)("1e-3"), cli.number(-1, 1)("-1")) == (0.001, -1.0)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (cli.whole(1), "0"),
        (cli.whole(1), "1.5"),
        (cli.whole(0), "-1"),
        (cli.whole(0, 5), "6"),
        (cli.level, "101"),
        (cli.level, "0.5"),
        (cli.level, ""),
        (cli.number(0), "-0.1"),
        (cli.number(0), "nan"),
        (cli.number(0), "much"),
        (cli.number(-1, 1), "1.01"),
        (cli.existing_file, "no/such/file"),
        (cli.existing_file, "."),
        (cli.existing_folder, "no/such/folder"),
        (cli.existing_folder, __file__),
    ],
)
def test_arguments_out_of_range_are_named(kind, text):
    with pytest.raises(ArgumentTypeError) as caught:
        kind(text)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (UserError("--levels 100: no"), 2, "error: --levels 100: no"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to resume"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "error: No space left on device; free some space and run the same command again to resume",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 2, "error: runs: Permission denied"),
    ],
)
def test_bad_input_and_ctrl_c_end_in_one_line(capsys, raised, code, message):
    def main():
        raise raised

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    error = capsys.readouterr().err
    assert caught.value.code == code
    assert error.endswith(f": {message}\n") and len(error.splitlines()) == 1


def test_a_disk_that_tensorboard_finds_full_is_one_line_too(capsys, monkeypatch, tmp_path):
    """It writes in a thread, whose traceback says nothing that the main thread does not; other errors keep theirs."""
    from tensorboard.summary.writer import record_writer
    from torch.utils.tensorboard import SummaryWriter

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def main():
        writer = SummaryWriter(str(tmp_path))
        monkeypatch.setattr(record_writer.RecordWriter, "write", fail)
        for step in range(3):
            writer.add_scalar("loss", 1.0, step)
            writer.flush()

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    [line] = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and "error: No space left on device; free some space" in line
    cli.report_thread(threading.ExceptHookArgs((OSError, OSError(errno.EIO, "Input/output error"), None, None)))
    assert "Input/output error" in capsys.readouterr().err


def test_the_exit_code_is_that_of_main():
    for code in (0, 1):
        with pytest.raises(SystemExit) as caught:
            cli.run(lambda code=code: code)
        assert caught.value.code == code


# ---------------------------------------------------------------------------------------------------------------------
# run folders


def test_json_is_written_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "deep/results.json"
    files.write_json(path, {"b": "ż", "a": [1, None]})
    assert path.read_text(encoding="utf-8") == '{\n  "b": "ż",\n  "a": [\n    1,\n    null\n  ]\n}\n'
    with pytest.raises(TypeError):
        files.write_json(path, {"b": object()})
    assert files.read_json(path) == {"b": "ż", "a": [1, None]}
    assert os.listdir(path.parent) == ["results.json"]


@pytest.mark.parametrize("text", ["plain", "a, b", 'a "b"', "a\nb", "a\rb", "", "ż", " a "])
def test_texts_are_written_as_a_csv_writer_writes_them(tmp_path, text):
    rows = [("first.png", "0.250000", "1", ""), (text, "-1.000000", "0", "low"), ("last.png", "nan", "0", text)]
    files.write_texts(tmp_path / "found.csv", ["name", "score", "kept", "reason"], (row for row in rows))
    with (tmp_path / "expected.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("name", "score", "kept", "reason"), *rows])
    assert (tmp_path / "found.csv").read_bytes() == (tmp_path / "expected.csv").read_bytes()


def test_a_reader_of_json_never_sees_half_a_file(tmp_path):
    path = tmp_path / "results.json"
    files.write_json(path, {"old": 1})
    with path.open(encoding="utf-8") as before:  # opened before the write: keeps the old file, whole
        files.write_json(path, {"new": 2})
        assert json.load(before) == {"old": 1}
    assert files.read_json(path) == {"new": 2}


def test_files_have_one_digest_by_content_and_order(tmp_path):
    a, b, c = (write(tmp_path / name, text) for name, text in (("a", "1"), ("b", "23"), ("c", "1")))
    assert files.digest_files([a]) == files.digest_files([c])
    assert len({files.digest_files(paths) for paths in ([a], [b], [a, b], [b, a], [a, c])}) == 5
    ab, empty = write(tmp_path / "ab", "123"), write(tmp_path / "empty", "")
    assert files.digest_files([a, b]) != files.digest_files([ab, empty])


def test_what_differs_is_named_with_both_values(tmp_path):
    path = tmp_path / "args.json"
    found = {"args": {"lr": 0.1, "seed": 0, "levels": [0, 50]}, "inputs": {"spectrum": "aa"}, "old": 1}
    wanted = {"args": {"lr": 0.2, "seed": 0, "levels": (0, 50)}, "inputs": {}, "new": "x"}
    with pytest.raises(UserError) as caught:
        runs.stop_on_difference(path, found, wanted, "--overwrite")
    assert str(caught.value) == (
        f"{path} was written by a run with other settings: args.lr is 0.1 there, 0.2 here; "
        "inputs.spectrum is 'aa' there, None here; new is None there, 'x' here; old is 1 there, None here. "
        "Expected the same, another --out, or --overwrite"
    )


def test_what_is_the_same_is_not_stopped(tmp_path):
    content = {"args": {"levels": [0, 50], "hard_share": None}}
    runs.stop_on_difference(tmp_path / "args.json", content, {"args": {"levels": (0, 50), "hard_share": None}}, "")


def test_a_run_folder_is_new_then_begun_then_complete(tmp_path):
    folder = tmp_path / "run"
    args = Namespace(out=folder, overwrite=False, device="cpu", spectrum=Path("a/b"), seed=0)
    assert runs.open_run(folder, args, {"spectrum": "aa"}, {}, overwrite=False) is False
    written = files.read_json(folder / "args.json")
    assert written["args"] == {"spectrum": "a/b", "seed": 0} and written["inputs"] == {"spectrum": "aa"}
    assert "torch" in written["environment"]["packages"]
    args.device = "cuda"  # another machine may go on
    assert runs.open_run(folder, args, {"spectrum": "aa"}, {}, overwrite=False) is False
    files.write_json(folder / "results.json", {})
    assert runs.open_run(folder, args, {"spectrum": "aa"}, {}, overwrite=False) is True
    with pytest.raises(UserError, match="inputs.spectrum is 'aa' there, 'bb' here"):
        runs.open_run(folder, args, {"spectrum": "bb"}, {}, overwrite=False)
    args.seed = 1
    with pytest.raises(UserError, match="args.seed is 0 there, 1 here"):
        runs.open_run(folder, args, {"spectrum": "aa"}, {}, overwrite=False)


def test_overwrite_begins_a_run_folder_anew(tmp_path):
    args = Namespace(out=tmp_path, overwrite=True, seed=0)
    runs.open_run(tmp_path, args, {}, {}, overwrite=False)
    made = ["checkpoint.pt", "results.json", "predictions.npz", "events.out.tfevents.1.host"]
    for name in [*made, "notes.txt"]:
        write(tmp_path / name, "old")
    args.seed = 1
    assert runs.open_run(tmp_path, args, {}, {}, overwrite=True) is False
    assert sorted(os.listdir(tmp_path)) == ["args.json", "notes.txt"]
    assert files.read_json(tmp_path / "args.json")["args"] == {"seed": 1}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    import torch

    path = tmp_path / "checkpoint.pt"
    state = {"epoch": 3, "model": {"w": torch.arange(4.0)}, "history": [{"loss": 0.5, "levels": [100]}], "name": None}
    checkpoints.save_checkpoint(path, {"epoch": 2})
    checkpoints.save_checkpoint(path, state)
    found = checkpoints.load_checkpoint(path, "cpu")
    assert torch.equal(found["model"].pop("w"), state["model"].pop("w"))
    assert found == state
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.previous.pt", "checkpoint.pt"]


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named(tmp_path, share):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(path, {"epoch": 3, "history": list(range(1000))})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=f"{path}: not a readable checkpoint .*--overwrite"):
        checkpoints.load_checkpoint(path, "cpu")


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_checkpoint_with_code_in_it_is_refused_and_nothing_runs(tmp_path):
    import torch

    path = tmp_path / "checkpoint.pt"
    torch.save({"epoch": 1, "model": Malicious(tmp_path / "executed")}, path)
    with pytest.raises(UserError, match=f"{path}: not a readable checkpoint"):
        checkpoints.load_checkpoint(path, "cpu")
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)  # the trap itself works
    assert (tmp_path / "executed").is_dir()
