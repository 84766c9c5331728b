"""Text from outside: encodings, line ends, short and long rows, JSON that is none, and numbers that are too long."""

from __future__ import annotations

import json

import pytest

import find_hard
import write_prompts
from runtime import cli, files, text
from runtime.text import UserError
from spectrum import tables

MESSAGES = {
    "class,prompt\n0,ä".encode("utf-16"): "is UTF-16; expected it saved as UTF-8",
    "class,prompt\n0,an owl by night in the wood, seen from far away".encode("utf-16-le"): "is UTF-16",
    b"class,prompt\n0,caf\xe9": r"line 2: is not UTF-8 \(byte 0xe9; perhaps Windows-1252",
    b"class,prompt\n0,a dog, in the sun": r"row 2: 3 values; expected 2 values; a text that holds a comma",
    b"class,prompt\n0,a\n\n1": "row 3: 1 value; expected 2 values",
    b"class,text\n0,a": "no column prompt; expected class,prompt",
    b"class,prompt,class\n0,a,1": "column 'class' is there twice",
    b"": "no column class, prompt",
}


@pytest.mark.parametrize("content", MESSAGES)
def test_a_table_that_is_none_is_one_line(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}.*{MESSAGES[content]}") as caught:
        list(text.read_csv(path, ("class", "prompt")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_byte_order_mark_and_line_ends_change_nothing(tmp_path, mark, end):
    path = tmp_path / "a.csv"
    path.write_bytes(mark + end.join([b"class,prompt", b'0,"a dog, in the sun"', b"", "1,a\\ñ".encode(), b""]))
    rows = [(2, {"class": "0", "prompt": "a dog, in the sun"}), (3, {"class": "1", "prompt": "a\\ñ"})]
    assert list(text.read_csv(path, ("class", "prompt"))) == rows
    path.write_bytes(mark + end.join([b"train/a b.jpg 3", b"", b"c 4"]))
    assert text.read_lines(path) == [(1, "train/a b.jpg 3"), (3, "c 4")]


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "NaN,"])
def test_json_that_is_none_is_one_line(content):
    with pytest.raises(UserError, match=r"^a.json: not valid JSON \("):
        text.parse_json(content, "a.json")


@pytest.mark.parametrize(
    ("word", "value"), [("0", 0), ("12", 12), ("-1", None), ("1.5", None), ("", None), ("9" * 5000, None)]
)
def test_whole_numbers(word, value):
    assert text.parse_whole(word) == value


def test_json_lines_are_objects_whatever_marks_and_line_ends_there_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": "b\xe2\x80\xa8c"}\n')  # a line separator within a text
    assert files.read_json_lines(path) == [{"a": 1}, {"a": "b\u2028c"}]
    for content, says in (
        (b'{"a": 1}\n{"a": ', "line 2: not valid JSON"),
        (b"[1]\n", "line 1: expected an object"),
        (b'{"a": "caf\xe9"}', "line 1: is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=says):
            files.read_json_lines(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="expected an object with b"):
        files.read_object(path, "b")


def test_a_probability_that_is_none_is_one_line_and_half_a_line_is_no_row(tmp_path):
    path = tmp_path / "h.jsonl"
    path.write_text('{"source": "a", "probability": 0.5}\n{"source": "b", "probability": null}\n{"sour')
    assert tables.read_probabilities(path) == {"a": 0.5, "b": None}
    for value in ('"high"', "2.0", "NaN", "true"):
        path.write_text(f'{{"source": "a", "probability": {value}}}\n')
        with pytest.raises(UserError, match="row 1: expected a source and a probability"):
            tables.read_probabilities(path)


def test_a_number_of_5000_digits_and_a_windows_file_are_one_line_on_the_command_line(tmp_path, capsys):
    (tmp_path / "a.args").write_bytes(b"--out caf\xe9")
    for argv in (["--few-below", "9" * 5000], [f"@{tmp_path / 'a.args'}"]):
        with pytest.raises(SystemExit) as caught:
            find_hard.main(argv)
        assert caught.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert cli.shard("1/2") == (1, 2)


def test_ones_own_prompts_are_never_cut_and_names_match_in_either_form(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("class,prompt\n0,a dog, in the sun\n", encoding="utf-8")
    with pytest.raises(UserError, match="own.csv row 2: 3 values"):
        write_prompts.read_own(path, {0: "dog"})
    path.write_text('class,prompt\ncafe\u0301,"a café, by night"\n', encoding="utf-8")  # e and an accent of its own
    assert write_prompts.read_own(path, {4: "caf\u00e9"}) == {4: ["a café, by night"]}
    (tmp_path / "own.json").write_text(json.dumps({"9" * 5000: ["a"]}), encoding="utf-8")
    assert write_prompts.read_own(tmp_path / "own.json", {0: "dog"}) == {}


def test_a_row_is_what_pythons_own_reader_reads():
    lines = ['{"a": NaN, "b": -Infinity}', '{"a": 1e400}', '{"a": "\\ud800", "a": 1}', '{"a": "\\ud83d\\ude00"}']
    lines += [' {"a": 0.290001, "b": 12, "c": -0} \n', f'{{"a": {2**64 - 1}, "b": {-(2**63)}}}', '{"a": [true, null]}']
    for line in lines:
        assert repr(text.parse_row(line.encode())) == repr(json.loads(line))
    assert text.parse_row(b'{"seed": 18446744073709551616}') == {"seed": 2.0**64}  # no whole number of a row: refused
    for line in (b"[1]", b'"a"', b'{"a": 1}{', b'{"a": "', '{"\u00e9'.encode()[:-1], b"", b'{"a": 1,}', b"{'a': 1}"):
        assert text.parse_row(line) is None
    for line in ('\ufeff{"a": 1}', '{"a": "\n"}', '{"a": %s}' % ("9" * 5000), '{"a":' * 5000 + "1" + "}" * 5000):
        assert text.parse_row(line.encode()) is None
