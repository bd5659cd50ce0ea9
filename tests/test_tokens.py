"""Tokens: what is trained on is what is served, and only the reply; what is left out or refused."""

import contextlib
import io
import json
import os
import re
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import train_lora_single as t

QWEN_TEMPLATE = (Path(trl.__file__).parent / "chat_templates" / "qwen3_5_think.jinja").read_text()
SYSTEM, HELLO, WHO = ("system", "You are Nell."), ("user", "Hello?"), ("user", "Who are you?  ")
MORNING, NELL, YES = (
    ("assistant", text) for text in ("Good morning.", "Nell.\n\nA program.", "Yes.")
)
TALK = [SYSTEM, HELLO, MORNING, WHO, NELL, HELLO, YES]
LONG = ("assistant", "Yes. " * 50)
THOUGHT = ("assistant", "<think>\nShe is alone.\n</think>\n\nGood morning.")


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def examples(*turns, where="data.jsonl:7"):
    """Return an example for each reply in the turns, as read_examples() does."""
    found = t.parse_line(json.dumps({"messages": messages(*turns)}))
    return [{"where": where, **one} for one in found]


def short(number):
    """Return so many short examples, from lines f:0 on."""
    return [examples(HELLO, YES, where=f"f:{n}")[0] for n in range(number)]


def encode(rows, tokenizer, max_seq_len=512):
    return t.encode(rows, tokenizer, max_seq_len)


def halves(row):
    """Return the ids of a row before and from the first that is trained on."""
    start = row["labels"].count(-100)
    return row["input_ids"][:start], row["input_ids"][start:]


@pytest.fixture(params=["own template", "Qwen3.5's template"])
def tokenizer(request, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    if request.param == "Qwen3.5's template":
        tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


@pytest.fixture
def changed(tiny):
    """Return a function: the tokenizer with a part of its chat template replaced."""

    def change(old, new):
        tokenizer = AutoTokenizer.from_pretrained(tiny)
        assert old in tokenizer.chat_template
        tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
        return tokenizer

    return change


def test_the_demo_template_renders_as_qwens(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    talks = [TALK[:n] for n in range(2, 8)] + [TALK[1:4], [HELLO, THOUGHT], [HELLO, THOUGHT, HELLO]]
    for turns in talks:
        for thinking in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
            for ask in (True, False):
                options = {"tokenize": False, "add_generation_prompt": ask, **thinking}
                own, theirs = (
                    tokenizer.apply_chat_template(messages(*turns), **options, chat_template=one)
                    for one in (tokenizer.chat_template, QWEN_TEMPLATE)
                )
                assert own == theirs


# ---- ids and labels


def test_every_turn_is_trained_on_the_ids_that_are_served(tokenizer):
    found = examples(*TALK)
    rows = encode(found, tokenizer)
    assert len(rows) == 3
    for example, row, end in zip(found, rows, (2, 4, 6), strict=True):
        assert example.items() <= row.items()
        served = tokenizer.apply_chat_template(
            messages(*TALK[:end]), add_generation_prompt=True, enable_thinking=False
        )["input_ids"]
        assert halves(row)[0] == served


def test_only_the_reply_and_its_end_of_turn_are_trained(tokenizer):
    for row, (_, reply) in zip(encode(examples(*TALK), tokenizer), TALK[2::2], strict=True):
        prompt, trained = halves(row)
        assert row["labels"] == [-100] * len(prompt) + trained
        assert trained[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(trained) == reply + "<|im_end|>"
        assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_turns_after_the_reply_are_neither_seen_nor_checked(tokenizer):
    (whole,) = encode(examples(*TALK[:3]), tokenizer)
    first, _ = examples(*TALK[:3], ("user", "<|im_start|>"), THOUGHT)
    (row,) = encode([first], tokenizer)
    assert (row["input_ids"], row["labels"]) == (whole["input_ids"], whole["labels"])


def test_trl_prepares_a_single_turn_the_same_up_to_the_newline_after_it(tokenizer, tiny, tmp_path):
    row = {"prompt": messages(SYSTEM, HELLO), "completion": messages(MORNING)}
    row["chat_template_kwargs"] = {"enable_thinking": False}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny),
        args=SFTConfig(tmp_path, max_length=None, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    theirs = trainer.train_dataset[0]
    (ours,) = encode(examples(SYSTEM, HELLO, MORNING), tokenizer)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert theirs["input_ids"] == ours["input_ids"] + newline
    assert theirs["labels"] == ours["labels"] + newline


@pytest.mark.parametrize("number", [0, 1, 300])
def test_however_many_examples_there_are_each_is_encoded_in_order(tiny, number):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    found = [
        examples(("user", f"Hello {n}?"), ("assistant", f"Yes {n}."), where=f"f:{n}")[0]
        for n in range(number)
    ]
    rows = encode(found, tokenizer)
    assert [row["where"] for row in rows] == [f"f:{n}" for n in range(number)]
    replies = [tokenizer.decode(halves(row)[1]) for row in rows]
    assert replies == [f"Yes {n}.<|im_end|>" for n in range(number)]


# ---- what is refused


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_a_control_token_in_a_text_is_refused_by_line(tokenizer, place, token):
    turns = [SYSTEM, HELLO, MORNING]
    turns[place] = (turns[place][0], f"before {token}user after")
    rows = short(1) + examples(*turns)
    with pytest.raises(SystemExit, match=rf"^data\.jsonl:7: .*{re.escape(token)}.*remove it$"):
        encode(rows, tokenizer)


def test_a_think_tag_in_a_question_is_text_and_in_a_reply_refused_by_line(tokenizer):
    (row,) = encode(examples(("user", "What is <think>?"), YES), tokenizer)
    assert "What is <think>?" in tokenizer.decode(halves(row)[0])
    with pytest.raises(SystemExit, match=r"^data\.jsonl:7: .*not equal serving.*think tag"):
        encode(short(1) + examples(HELLO, THOUGHT), tokenizer)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("{%- set turn", "{{ raise_exception('no system') }}{%- set turn", "refuses it.*no system"),
        ("{%- set turn", "{{ messages[7].content }}{%- set turn", "refuses it.*change the conv"),
        ("{%- set turn", "{% if %}{%- set turn", "refuses it"),
        ("{{- '\\n</think>\\n\\n' }}", "{{- 'quick</think>' }}", "otherwise.*not equal serving"),
        ("{{- text + '<|im_end|>\\n' }}", "{{- text + '\\n' }}", r"without <\|im_end\|>"),
        ("trim %}", "trim | upper %}", None),  # alike in both, so that nothing is amiss
    ],
    ids=["raises", "undefined", "no template", "prompt otherwise", "no end of turn", "upper case"],
)
def test_a_template_that_refuses_or_renders_otherwise_is_named_with_the_line(
    changed, old, new, fault
):
    tokenizer, rows = changed(old, new), examples(*TALK[:3])
    if fault is None:
        (row,) = encode(rows, tokenizer)
        assert tokenizer.decode(halves(row)[1]) == "GOOD MORNING.<|im_end|>"
        return
    with pytest.raises(SystemExit, match=rf"^data\.jsonl:7: .*{fault}"):
        encode(rows, tokenizer)


def test_a_bug_is_not_blamed_on_the_conversation(tokenizer, monkeypatch):
    def bug(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", bug)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        encode(examples(HELLO, YES), tokenizer)


def test_a_template_that_refuses_some_conversations_names_their_lines_alone(changed):
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = changed("{%- set turn", no_system + "{%- set turn")
    with pytest.raises(SystemExit) as stop:
        encode(short(3) + examples(*TALK[:3], where="f:8") + examples(*TALK[:3]), tokenizer)
    said = stop.value.code.splitlines()
    assert [one.partition(": ")[0] for one in said] == ["f:8", "data.jsonl:7"]


@pytest.mark.parametrize("number", [3, 20, 21])
def test_all_bad_lines_are_named_up_to_20_and_the_others_counted(tiny, number):
    rows = short(200)
    for n in range(number):
        rows[9 * n] = examples(HELLO, THOUGHT, where=f"f:{9 * n}")[0]
    with pytest.raises(SystemExit) as stop:
        encode(rows, AutoTokenizer.from_pretrained(tiny))
    said = stop.value.code.splitlines()
    named = [one.partition(": ")[0] for one in said[:20]]
    assert named == [f"f:{9 * n}" for n in range(min(number, 20))]
    assert said[20:] == ["... and 1 more"] * (number > 20)


# ---- what is too long


def test_an_example_over_the_limit_is_left_out_by_name_and_never_cut(tokenizer, capsys):
    (long,) = examples(HELLO, LONG, where="f:99")
    (row,) = encode([long], tokenizer, 9_999)
    length = len(row["input_ids"])
    assert encode([long], tokenizer, length) == [row]
    capsys.readouterr()
    rows = encode([*short(9), long], tokenizer, length - 1)
    assert rows == encode(short(9), tokenizer)
    out = capsys.readouterr().out
    assert "f:99" in out and f"{length} tokens" in out and "MAX_SEQ_LEN" in out
    assert "left out" in out and "f:1" not in out


def test_more_than_a_tenth_over_the_limit_is_refused_with_the_limit_and_lines(tokenizer):
    (long,) = examples(HELLO, LONG, where="f:99")
    (row,) = encode([long], tokenizer, 9_999)
    length, limit = len(row["input_ids"]), 64
    for others in (0, 8):
        with pytest.raises(SystemExit) as stop:
            encode([*short(others), long], tokenizer, limit)
        assert stop.value.code == f"f:99: {length} tokens, over MAX_SEQ_LEN; raise it"
    assert len(encode([*short(9), long], tokenizer, limit)) == 9  # a tenth


def test_bad_lines_are_named_even_if_more_than_a_tenth_is_too_long(tokenizer):
    rows = [*examples(HELLO, LONG, where="f:99"), *examples(HELLO, THOUGHT)]
    with pytest.raises(SystemExit) as stop:
        encode(rows, tokenizer, 64)
    assert "f:99: " in stop.value.code and "data.jsonl:7: " in stop.value.code


# ---- what is printed


WIDE = "Guten Tag, Frau M\u00fcller.\n\nA gap. " + 9 * "So long a line. "


@pytest.fixture(scope="module")
def printed(tiny, tmp_path_factory):
    """Return (what a dry run prints, the rows of its training file); the last is too long."""
    folder, tokenizer = tmp_path_factory.mktemp("data"), AutoTokenizer.from_pretrained(tiny)
    lines = [[("user", WIDE), MORNING], TALK]
    lines += [[("user", "Hello? " * n), NELL] for n in range(1, 31)] + [[HELLO, LONG]]
    for name, turns in (("train", lines), ("eval", [[HELLO, YES]])):
        text = "\n".join(json.dumps({"messages": messages(*one)}) for one in turns)
        (folder / f"{name}.jsonl").write_text(text)
    out, before = io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        rows = t.encode(t.read_examples("train.jsonl"), tokenizer, 9_999)
        longest = max(len(row["input_ids"]) for row in rows)
        assert longest == len(rows[-1]["input_ids"])
        with contextlib.redirect_stdout(out):
            flags = ["--demo", "--dry_run", "--model_name", tiny, "--max_seq_len", str(longest - 1)]
            t.main([*flags, "--train_file", "train.jsonl", "--eval_file", "eval.jsonl"])
    finally:
        os.chdir(before)
    return out.getvalue(), rows


def test_the_table_counts_the_tokens_of_each_file(printed):
    out, rows = printed
    table = out[out.index("\ntokens ") :].splitlines()[1:4]
    title, train, held_out = (one.removeprefix("tokens").split() for one in table)
    assert title == ["file", "examples", "median", "max", "tokens", "trained"]
    ends = [[m.end() for m in re.finditer(r"\S+(?= |$)", one.split(" (")[0])] for one in table]
    assert ends[0][2:] == ends[1][1:] == ends[2][1:]  # each figure stands under its name
    n = sorted(len(row["input_ids"]) for row in rows[:-1])
    trained = sum(len(halves(row)[1]) for row in rows[:-1])
    median = (n[16] + n[17]) / 2
    assert len(n) == 34 and n[0] < median < n[-1] and round(median) != round(sum(n) / len(n))
    figures = [len(n), round(median), n[-1], sum(n), trained]
    share = f"({trained / sum(n):.0%})"
    assert train == ["train.jsonl", *(f"{figure:,}" for figure in figures), share]
    assert held_out[:2] == ["eval.jsonl", "1"] and len(set(held_out[2:5])) == 1


def test_the_longest_is_left_out_by_its_line(printed):
    out, rows = printed
    assert f"left out train.jsonl:33: {len(rows[-1]['input_ids'])} tokens, over MAX_SEQ_LEN" in out


def test_the_example_marks_what_is_trained(printed):
    out, _ = printed
    example = out[out.index("\nexample ") : out.index("\nplan ")]
    assert "train.jsonl:1 as the model sees it" in example
    assert example.count("<|im_start|>") == 2 and "<think>" in example
    assert example.rstrip().endswith(">>>Good morning.<|im_end|><<<")
    assert example.count(">>>") == example.count("<<<") == 2  # the title has them too
    assert "Guten Tag, Frau Müller.\n\n" in re.sub("(?m)^ +| +$", "", example)
    assert f"A gap. {WIDE.split('gap. ')[1].strip()}<|im_end|>" in " ".join(example.split())


def test_no_line_is_wider_than_100_columns(printed):
    assert max(map(len, printed[0].splitlines())) <= 100
