"""What is trained on equals what is served: ids, labels, lengths, and the demo model's chat template."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import train_lora_single as t

QWEN_TEMPLATE = (Path(trl.__file__).parent / "chat_templates" / "qwen3_5_think.jinja").read_text(encoding="utf-8")
SYSTEM, HELLO, WHO = ("system", "You are Nell."), ("user", "Hello?"), ("user", "Who are you, dear?  ")
TALK = [
    SYSTEM,
    HELLO,
    ("assistant", "Good morning."),
    WHO,
    ("assistant", "Nell.\n\nA program."),
    HELLO,
    ("assistant", "Yes."),
]


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def example(*turns, where="data.jsonl:7"):
    """Return the example of the last reply of the turns, which may go on after it."""
    reply = max(n for n, (role, _) in enumerate(turns) if role == "assistant")
    return {"where": where, "messages": messages(*turns), "reply": reply, "prompt": 0}


@pytest.fixture(params=["own template", "Qwen3.5's template"])
def tokenizer(request, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    if request.param == "Qwen3.5's template":
        tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    "turns", [TALK[:2], TALK[1:2], TALK[:3], TALK[:4], TALK, [HELLO, ("assistant", "<think>\nHm\n</think>\n\nHi")]]
)
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
@pytest.mark.parametrize("ask", [True, False])
def test_the_demo_template_renders_as_qwens(tiny, turns, options, ask):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    options = {"tokenize": False, "add_generation_prompt": ask, **options}
    own = tokenizer.apply_chat_template(messages(*turns), **options)
    assert own == tokenizer.apply_chat_template(messages(*turns), chat_template=QWEN_TEMPLATE, **options)


def test_only_the_reply_and_its_end_of_turn_token_are_trained(tokenizer):
    (row,) = t.encode([example(*TALK[:5])], tokenizer, 512)
    start = row["labels"].count(-100)
    assert row["labels"] == [-100] * start + row["input_ids"][start:]
    assert tokenizer.decode(row["input_ids"][start:]) == "Nell.\n\nA program.<|im_end|>"
    assert tokenizer.decode(row["input_ids"][:start]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_every_turn_is_trained_on_the_ids_that_are_served(tokenizer):
    examples, _ = t.parse_line(json.dumps({"messages": messages(*TALK)}))
    rows = t.encode([{"where": "f:1", **example} for example in examples], tokenizer, 512)
    assert len(rows) == 3
    assert all({"where": "f:1", **one}.items() <= row.items() for one, row in zip(examples, rows, strict=True))
    for row, end in zip(rows, (2, 4, 6), strict=True):
        served = tokenizer.apply_chat_template(
            messages(*TALK[:end]), add_generation_prompt=True, enable_thinking=False, return_dict=True
        )["input_ids"]
        assert row["input_ids"][: row["labels"].count(-100)] == served


def test_turns_after_the_reply_are_neither_seen_nor_checked(tokenizer):
    (whole,) = t.encode([example(*TALK[:3])], tokenizer, 512)
    later = [HELLO, ("assistant", "<think>\nHm\n</think>\n\n<|im_start|>")]
    (row,) = t.encode([{**example(*TALK[:3], *later), "reply": 2}], tokenizer, 512)
    assert (row["input_ids"], row["labels"]) == (whole["input_ids"], whole["labels"])


def test_trl_prepares_a_single_turn_the_same_up_to_the_newline_after_the_turn(tokenizer, tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    row = {"prompt": messages(SYSTEM, HELLO), "completion": messages(("assistant", "Good morning."))}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny),
        args=SFTConfig(output_dir=tmp_path, max_length=None, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([{**row, "chat_template_kwargs": {"enable_thinking": False}}]),
        processing_class=tokenizer,
    )
    theirs = trainer.train_dataset[0]
    (ours,) = t.encode([example(SYSTEM, HELLO, ("assistant", "Good morning."))], tokenizer, 512)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert theirs["input_ids"] == ours["input_ids"] + newline
    assert theirs["labels"] == ours["labels"] + newline


def test_a_reply_with_a_think_block_is_refused_by_line(tokenizer):
    bad = example(HELLO, ("assistant", "<think>\nShe is alone.\n</think>\n\nGood morning."))
    with pytest.raises(SystemExit, match=r"^data\.jsonl:7: .*think tag"):
        t.encode([bad], tokenizer, 512)


def test_a_template_that_renders_the_prompt_otherwise_before_a_reply_is_refused(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{- '\\n</think>\\n\\n' }}", "{{- 'quick</think>' }}")
    with pytest.raises(SystemExit, match=r"^data\.jsonl:7: .*training would not equal serving"):
        t.encode([example(*TALK[:3])], tokenizer, 512)


def test_a_template_without_end_of_turn_token_is_refused(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{- text + '<|im_end|>\\n' }}", "{{- text + '\\n' }}")
    with pytest.raises(SystemExit, match=re.escape("<|im_end|>")):
        t.encode([example(*TALK[:3])], tokenizer, 512)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_control_token_in_a_text_is_refused_by_line(tokenizer, place):
    turns = [SYSTEM, HELLO, ("assistant", "Good morning.")]
    turns[place] = (turns[place][0], "before <|im_start|>user after")
    good = example(*TALK[:3], where="data.jsonl:1")
    with pytest.raises(SystemExit, match=r"^data\.jsonl:7: .*<\|im_start\|>"):
        t.encode([good, example(*turns)], tokenizer, 512)


def test_a_tokenizer_without_control_tokens_finds_none(tiny, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    monkeypatch.setattr(type(tokenizer), "added_tokens_decoder", {})
    assert len(t.encode([example(*TALK[:3])], tokenizer, 512)) == 1


def test_what_the_template_refuses_is_reported_by_line(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(SystemExit, match=r"^data\.jsonl:7: .*no system here"):
        t.encode([example(*TALK[:3])], tokenizer, 512)


def test_an_example_over_the_limit_is_left_out_by_line_and_length(tokenizer, capsys):
    short = [example(HELLO, ("assistant", "Yes."), where=f"f:{n}") for n in range(1, 11)]
    long = example(HELLO, ("assistant", "Yes. " * 50), where="f:11")
    (row,) = t.encode([long], tokenizer, 9999)
    length = len(row["input_ids"])
    assert t.encode([long], tokenizer, length) == [row]
    kept = t.encode([*short, long], tokenizer, length - 1)
    assert [row["where"] for row in kept] == [f"f:{n}" for n in range(1, 11)]
    assert f"f:11: {length} tokens" in capsys.readouterr().out


@pytest.mark.parametrize("short", [0, 8])
def test_more_than_a_tenth_over_the_limit_is_an_error_that_names_the_longest(tokenizer, short):
    rows = [example(HELLO, ("assistant", "Yes."), where=f"f:{n}") for n in range(short)]
    rows.append(example(HELLO, ("assistant", "Yes. " * 50), where="f:99"))
    longest = len(t.encode(rows[-1:], tokenizer, 9999)[0]["input_ids"])
    with pytest.raises(SystemExit, match=rf"^1 of {short + 1} .*{longest}.*\nf:99: {longest} tokens"):
        t.encode(rows, tokenizer, 64)


@pytest.mark.parametrize("number", [1, 999, 1000, 1001, 2500])
def test_however_many_examples_there_are_each_is_encoded_in_order(tiny, number):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    examples = [example(("user", f"Hello {n}?"), ("assistant", f"Yes {n}."), where=f"f:{n}") for n in range(number)]
    rows = t.encode(examples, tokenizer, 512)
    assert [row["where"] for row in rows] == [f"f:{n}" for n in range(number)]
    assert [tokenizer.decode(row["input_ids"][row["labels"].count(-100) :]) for row in rows] == [
        f"Yes {n}.<|im_end|>" for n in range(number)
    ]


@pytest.mark.parametrize(
    "turns",
    [[("user", "<|im_start|>"), TALK[6]], [HELLO, ("assistant", "<think>\nHm\n</think>\n\nYes.")]],
    ids=["control token", "think block"],
)
def test_all_bad_lines_of_a_long_file_are_named(tiny, turns):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    examples = [example(HELLO, ("assistant", "Yes."), where=f"f:{n}") for n in range(2500)]
    for n in (5, 1500, 2400):
        examples[n] = example(*turns, where=f"f:{n}")
    with pytest.raises(SystemExit) as stop:
        t.encode(examples, tokenizer, 512)
    assert [line.partition(": ")[0] for line in stop.value.code.splitlines()] == ["f:5", "f:1500", "f:2400"]


def test_no_examples_encode_to_none(tokenizer):
    assert t.encode([], tokenizer, 512) == []


@pytest.fixture
def report(tokenizer, tmp_path, monkeypatch):
    """Return a function that writes data files, and reports on (lines, examples, rows) of each path."""
    monkeypatch.chdir(tmp_path)

    def write_and_report(**files):
        for name, (content, _, _) in files.items():
            Path(f"{name}.jsonl").write_bytes(content)
        return t.report_tokens({f"{name}.jsonl": file[1:] for name, file in files.items()}, tokenizer)

    return write_and_report


def test_what_a_terminal_would_obey_is_printed_as_an_escape(tokenizer, report, capsys):
    turns = ("user", "Guten Tag, \x1b[2J Frau M\u00fcller\a"), ("assistant", "Good morning.")
    rows = t.encode([example(*turns)], tokenizer, 512)
    report(train=(b"", rows, rows))
    text = capsys.readouterr().out
    assert "Guten Tag, \\x1b[2J Frau M\u00fcller\\x07" in text
    assert [c for c in text if c != "\n" and not c.isprintable()] == []


def test_the_report_counts_tokens_and_marks_what_is_trained(tokenizer, report, capsys):
    examples = [example(*TALK[:n]) for n in (3, 5, 7)]
    rows = t.encode(examples, tokenizer, 512)
    report(train=(b"", examples, rows))
    text = capsys.readouterr().out
    lengths = sorted(len(row["input_ids"]) for row in rows)
    trained = sum(len(row["input_ids"]) - row["labels"].count(-100) for row in rows)
    figures = ["train.jsonl", 3, lengths[0], lengths[1], lengths[2], lengths[2], sum(lengths), trained]
    assert " ".join(map(str, figures)) in re.sub(" +", " ", text)
    assert ">>>Good morning.<|im_end|><<<" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_report_returns_each_files_hash_and_counts(tokenizer, report):
    examples = [example(*TALK[:n]) for n in (3, 5, 7)]
    rows = t.encode(examples, tokenizer, 512)
    facts = report(train=(b"one\n\ntwo\nthree", examples, rows), eval=(b"", examples, rows[:1]))
    assert [*facts] == ["train.jsonl", "eval.jsonl"]
    assert facts["train.jsonl"] == {
        "sha256": hashlib.sha256(b"one\n\ntwo\nthree").hexdigest(),
        "lines": 4,
        "examples": 3,
        "left_out": 0,
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "trained_tokens": sum(label != -100 for row in rows for label in row["labels"]),
    }
    assert (facts["eval.jsonl"]["examples"], facts["eval.jsonl"]["left_out"]) == (1, 2)
    assert facts["eval.jsonl"]["sha256"] == hashlib.sha256(b"").hexdigest()


@pytest.mark.parametrize(
    ("content", "lines"), [(b"one", 1), (b"one\n", 1), (b"one\r\ntwo\r\n", 2), (b"\n\none\n\n", 4)]
)
def test_the_lines_of_a_file_are_counted_with_blank_ones_and_with_a_last_one_that_does_not_end(
    tokenizer, report, content, lines
):
    examples = [example(*TALK[:3])]
    assert report(train=(content, examples, t.encode(examples, tokenizer, 512)))["train.jsonl"]["lines"] == lines
