"""What is trained on equals what is served: ids, labels, lengths, and the demo model's chat template."""

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
    return {"where": where, "prompt": messages(*turns[:-1]), "reply": messages(turns[-1])[0]}


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
    pairs, _ = t.parse_line(json.dumps({"messages": messages(*TALK)}))
    rows = t.encode([{"where": "f:1", "prompt": p, "reply": r} for p, r in pairs], tokenizer, 512)
    assert len(rows) == 3
    for row, end in zip(rows, (2, 4, 6), strict=True):
        served = tokenizer.apply_chat_template(
            messages(*TALK[:end]), add_generation_prompt=True, enable_thinking=False, return_dict=True
        )["input_ids"]
        assert row["input_ids"][: row["labels"].count(-100)] == served


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


def test_no_examples_encode_to_none(tokenizer):
    assert t.encode([], tokenizer, 512) == []


def test_the_report_counts_tokens_and_marks_what_is_trained(tokenizer, capsys):
    rows = t.encode([example(*TALK[:n]) for n in (3, 5, 7)], tokenizer, 512)
    t.report_tokens({"train.jsonl": rows}, tokenizer)
    text = capsys.readouterr().out
    lengths = sorted(len(row["input_ids"]) for row in rows)
    trained = sum(len(row["input_ids"]) - row["labels"].count(-100) for row in rows)
    figures = ["train.jsonl", 3, lengths[0], lengths[1], lengths[2], lengths[2], sum(lengths), trained]
    assert " ".join(map(str, figures)) in re.sub(" +", " ", text)
    assert ">>>Good morning.<|im_end|><<<" in text
    assert max(map(len, text.splitlines())) <= 100
