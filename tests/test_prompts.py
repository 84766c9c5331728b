"""Prompts: the grammar, a language model's answers, and the user's own file."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import write_prompts
from runtime.cli import UserError
from spectrum import domains as summary
from spectrum import scenes, tables

FOX = [
    f"A red fox {doing} {where} while thin mist rises slowly from the valley far behind it at dawn"
    for doing, where in [
        ("rests", "on a rock"),
        ("runs", "through the snow"),
        ("drinks", "at a river"),
        ("looks", "up"),
    ]
]


@pytest.fixture
def hard(tmp_path):
    rows = [(0, "fox"), (4, "bow/arrow"), (7, "fox")]
    path = tmp_path / "hard.csv"
    tables.write_hard(
        path,
        [
            {"source": f"index:{label}", "label": label, "class_name": name, "reason": "few", "score": 1}
            for label, name in rows
        ],
    )
    return path


def run(hard, *arguments) -> dict:
    out = hard.with_name("prompts.json")
    assert write_prompts.main(["--hard", str(hard), "--out", str(out), *map(str, arguments)]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# scenes


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1).filter(str.strip), st.integers(10, 40))
def test_any_class_name_has_different_long_descriptions(name, count):
    found = scenes.describe(name, count)
    assert len(set(found)) == count
    assert all(len(text.split()) >= 15 and " ".join(name.split()) in text for text in found)
    assert found[:10] == scenes.describe(name, 10)


def test_ten_descriptions_share_no_phrase():
    found = scenes.describe("owl", 10)
    for slot in scenes.SLOTS:
        used = [phrase for text in found for phrase in slot if f" {phrase}" in text]
        assert len(set(used)) == 10


def test_descriptions_are_pinned():
    """The grammar may grow only with the knowledge that prompts.json changes."""
    assert scenes.describe("owl", 1) == [
        "an owl resting quietly on a rocky shore, under a bright midday sun, on a still and humid day, "
        "photographed from above"
    ]
    assert scenes.describe("owl", 1) != scenes.describe("cat", 1)


def test_scenes_stand_in_the_papers_frame(hard):
    content = run(hard, "--from", "scenes")
    assert content["4"]["prompts"] == [f"a 8k real photo: {text}" for text in scenes.describe("bow/arrow", 10)]
    assert content["4"]["score_prompt"] == "a photo of a bow/arrow" and content["4"]["source"] == "scenes"
    assert content["0"]["prompts"] == content["7"]["prompts"]


def test_clipscore_compares_with_the_text_asked_for(hard):
    content = run(hard, "--score-prompt", "a drawing of {}.")
    assert content["4"]["score_prompt"] == "a drawing of bow/arrow."
    # A class that has prompts keeps its text.
    assert run(hard, "--score-prompt", "another {}")["4"]["score_prompt"] == "a drawing of bow/arrow."


def test_from_has_its_old_spelling_too_and_does_not_show_it():
    parser = write_prompts.build_parser()
    assert parser.parse_args(["--source", "scenes"]) == parser.parse_args(["--from", "scenes"])
    assert "--source" not in parser.format_help() and "--from {" in parser.format_help()


# ---------------------------------------------------------------------------------------------------------------------
# llm


def test_an_answer_is_read_line_by_line():
    answer = "\n".join(
        [
            "Here are the descriptions you asked for, each of a fox, in a place of its own, as you wished:",
            f"1. {FOX[0]}.",
            f'2) "{FOX[1]}"',
            f"- {FOX[0].upper()}",  # the first one again
            "3. A fox in the snow.",  # too short
            f"4. {FOX[2].replace('fox', 'foxglove')}",  # another word
            f"* {FOX[3]}",
            "5. " + "fox " * 51,  # too long
            "",
        ]
    )
    found = write_prompts.read_answer(answer, "fox")
    assert found[1:] == [f"{FOX[0]}.", FOX[1], FOX[3]]  # the preamble has 18 words and names the class
    assert found[0].startswith("Here are")


def save_llm(folder, lines: list[str], chat: bool = False):
    """A causal language model with fixed weights, which answers anything by `lines`, one token each, and ends."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<unk>", "<end>", *(f"{number}. {line}\n" for number, line in enumerate(lines, 1))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    if chat:
        fast.chat_template = "{% for message in messages %}user said {{ message['content'] }}{% endfor %} answer"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(words),
            n_positions=512,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=1,
            eos_token_id=1,
            tie_word_embeddings=False,
        )
    )
    if lines:
        with torch.no_grad():  # no attention, no position: the next token follows from the last one alone
            for parameter in model.transformer.h.parameters():
                parameter.zero_()
            model.transformer.wpe.weight.zero_()
            directions = torch.linalg.qr(torch.randn(16, 16))[0][: len(words)]
            model.transformer.wte.weight.copy_(directions)
            follows = [2, 1, *range(3, len(words)), 1]  # <unk> -> the first line -> the second -> ... -> <end>
            model.lm_head.weight.zero_()
            for word, following in enumerate(follows):
                model.lm_head.weight[following] += 20 * (directions[word] - directions[word].mean())
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chat", [False, True])
def test_a_language_models_answers_are_used_and_the_rest_is_filled_and_marked(hard, tmp_path, capsys, chat):
    llm = save_llm(tmp_path / "llm", FOX, chat)
    content = run(hard, "--from", "llm", "--llm", llm, "--count", 5, "--tries", 2, "--max-new-tokens", 8)
    fox, arrow = content["0"], content["4"]
    framed = [f"a 8k real photo: {text}" for text in FOX]
    filled = [f"a 8k real photo: {text}" for text in scenes.describe("fox", 1)]
    assert fox["prompts"] == framed + filled and fox["filled_from_scenes"] == filled
    # The answer never names the other class: all five are from the grammar.
    assert arrow["filled_from_scenes"] == arrow["prompts"] and len(arrow["prompts"]) == 5
    raw = [json.loads(line) for line in (tmp_path / "prompts.answers.jsonl").read_text().splitlines()]
    assert [(row["label"], row["attempt"]) for row in raw] == [(0, 0), (4, 0), (7, 0), (0, 1), (4, 1), (7, 1)]
    assert "Write 5 different" in raw[0]["question"] and "Write 1 different" in raw[3]["question"]
    assert raw[0]["answer"].count("\n") == 4 and "7 prompts of 3 classes are from scenes" in capsys.readouterr().out


def test_a_model_with_random_weights_leaves_a_whole_file(hard, tmp_path):
    llm = save_llm(tmp_path / "llm", [])
    content = run(hard, "--from", "llm", "--llm", llm, "--tries", 2, "--max-new-tokens", 4)
    assert content["0"]["prompts"] == [f"a 8k real photo: {text}" for text in scenes.describe("fox", 10)]
    assert tables.read_prompts(tmp_path / "prompts.json", [0, 4, 7])


def test_classes_that_are_done_are_not_asked_for_again(hard, tmp_path, monkeypatch):
    llm = save_llm(tmp_path / "llm", FOX)
    arguments = ["--from", "llm", "--llm", llm, "--count", 4, "--tries", 1, "--max-new-tokens", 8]
    whole = run(hard, *arguments, "--batch-size", 1)
    out = tmp_path / "prompts.json"
    out.unlink()
    ask, calls = write_prompts.ask, []

    def killed(model, tokenizer, questions, *rest):
        if calls:
            raise KeyboardInterrupt
        calls.append(questions)
        return ask(model, tokenizer, questions, *rest)

    monkeypatch.setattr(write_prompts, "ask", killed)
    with pytest.raises(KeyboardInterrupt):
        run(hard, *arguments, "--batch-size", 1)
    assert list(json.loads(out.read_text())) == ["0"]
    monkeypatch.setattr(write_prompts, "ask", ask)
    assert run(hard, *arguments, "--batch-size", 1) == whole


def test_a_missing_language_model_is_named(hard, tmp_path):
    with pytest.raises(UserError, match="--llm .*nowhere"):
        write_prompts.main(
            [
                "--hard",
                str(hard),
                "--out",
                str(tmp_path / "p.json"),
                "--from",
                "llm",
                "--llm",
                str(tmp_path / "nowhere"),
            ]
        )


# ---------------------------------------------------------------------------------------------------------------------
# file


def test_own_prompts_by_index_and_by_name(hard, tmp_path):
    (tmp_path / "own.csv").write_text(
        "class,prompt\n0,a fox\n7,a statue\n0,a fox at night\nbow/arrow,an archer\n99,x\n"
    )
    content = run(hard, "--from", "file", "--file", tmp_path / "own.csv")
    assert [content[label]["prompts"] for label in "047"] == [["a fox", "a fox at night"], ["an archer"], ["a statue"]]
    (tmp_path / "prompts.json").unlink()
    (tmp_path / "own.json").write_text(json.dumps({"0": ["a"], "bow/arrow": ["b", "c"], "7": ["d"]}))
    content = run(hard, "--from", "file", "--file", tmp_path / "own.json")
    assert [content[label]["prompts"] for label in "047"] == [["a"], ["b", "c"], ["d"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.csv", "class,prompt\n0,a\n", r"no prompt for class 4 \(bow/arrow\) and 1 other;"),
        ("own.csv", "class,prompt\n0,\n", "own.csv row 2: the prompt is empty"),
        ("own.csv", "class,prompt\nfox,a\n", r"row 2: classes \[0, 7\] are all called 'fox'; expected a class index"),
        ("own.csv", "name,text\n0,a\n", "expected columns class and prompt"),
        ("own.json", '{"0": "a"}', "expected an object with a list of prompts"),
        ("own.json", '{"0": [1]}', "class '0': the prompt is empty or no text"),
        ("own.json", "{", "not valid JSON"),
    ],
)
def test_bad_files_are_named(hard, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    out = tmp_path / "prompts.json"
    with pytest.raises(UserError, match=message):
        write_prompts.main(["--hard", str(hard), "--out", str(out), "--from", "file", "--file", str(tmp_path / name)])
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "llm"], "--from llm: expected --llm"),
        (["--from", "scenes", "--llm", "x"], "--from scenes: expected --llm"),
        (["--frame", "no slot"], "--frame 'no slot': expected a text with one {}"),
        (["--score-prompt", "no slot"], "--score-prompt 'no slot': expected a text with one {}"),
    ],
)
def test_bad_input_names_the_flag(hard, arguments, message):
    with pytest.raises(UserError, match=message):
        run(hard, *arguments)


def test_an_existing_file_is_completed(hard, tmp_path):
    mine = {"class_name": "fox", "score_prompt": "mine", "prompts": ["mine"]}
    (tmp_path / "prompts.json").write_text(json.dumps({"0": mine}))
    content = run(hard, "--from", "scenes")
    assert content["0"] == mine and len(content["4"]["prompts"]) == 10
    assert SimpleNamespace(**content["7"]).class_name == "fox"


# ---------------------------------------------------------------------------------------------------------------------
# domains

DOMAINS = [
    {"name": "on snow", "prompt": "a photo of a {} on snow", "instruction": "put the {} on snow"},
    {"name": "at night", "prompt": "a dark photo of a {}", "instruction": "make it night"},
]


def test_every_class_is_put_into_every_domain(hard, tmp_path):
    path = tmp_path / "domains.json"
    path.write_text(json.dumps({"domains": DOMAINS}))
    content = run(hard, "--from", "domains", "--domains", path)
    assert content["4"]["prompts"] == ["a photo of a bow/arrow on snow", "a dark photo of a bow/arrow"]
    assert all(entry["domains"] == ["on snow", "at night"] for entry in content.values())
    read = tables.read_prompts(tmp_path / "prompts.json", [0, 4, 7])
    assert summary.domain_of_prompt(read[4], "a dark photo of a bow/arrow") == "at night"
    assert (
        summary.domain_of_prompt(read[4], "another") == "" and summary.domain_of_prompt({"prompts": ["x"]}, "x") == ""
    )
    (tmp_path / "prompts.json").unlink()
    content = run(hard, "--from", "domains", "--domains", path, "--instructions")
    assert content["0"]["prompts"] == ["put the fox on snow", "make it night"]
    content["0"]["domains"].pop()
    (tmp_path / "prompts.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="class 0: 1 domains for 2 prompts; expected one for each"):
        tables.read_prompts(tmp_path / "prompts.json", [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from", "domains"], "--from domains: expected --domains"),
        (["--instructions"], "--instructions: expected with --from domains only"),
    ],
)
def test_domain_flags_go_together(hard, arguments, message):
    with pytest.raises(UserError, match=message):
        write_prompts.main(["--hard", str(hard), "--out", str(hard.with_name("p.json")), *arguments])


def test_a_class_of_empty_images_has_prompts_of_its_own_and_numbers_for_names_stop(tmp_path):
    rows = [{"source": f"index:{i}", "label": i, "class_name": name, "reason": "x", "score": 0}
            for i, name in enumerate(["empty", "red_fox"])]  # fmt: skip
    tables.write_hard(tmp_path / "hard.csv", rows)
    for source in ("template", "scenes"):
        out = tmp_path / f"{source}.json"
        assert write_prompts.main(["--dataset", "iwildcam", "--hard", str(tmp_path / "hard.csv"), "--out", str(out),
                                   "--from", source]) == 0  # fmt: skip
        content = json.loads(out.read_text())
        assert content["0"]["score_prompt"] == "a photo of an empty scene in the wild"
        assert not any("of empty" in text or "an empty resting" in text for text in content["0"]["prompts"])
        assert content["1"]["score_prompt"] == "a photo of red fox in the wild" and len(content["0"]["prompts"]) == 3
    tables.write_hard(tmp_path / "hard.csv", [rows[0] | {"class_name": "0042"}])
    with pytest.raises(UserError, match=r"called by numbers \(0042 ...\); expected categories.json in --data-root"):
        write_prompts.main(
            ["--dataset", "inat2018", "--hard", str(tmp_path / "hard.csv"), "--out", str(tmp_path / "o")]
        )
