"""Tokens: what is learned is what is served, and only the reply; what is left out or refused."""

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from peft import PeftModel
from trainers import prepared, token_loss
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


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def write(folder, name, *talks):
    """Write a file in which each line is a conversation; return its path."""
    path = folder / name
    path.write_text("\n".join(json.dumps({"messages": messages(*talk)}) for talk in talks))
    return str(path)


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def render(tokenizer, *turns):
    """Return the ids of prompt and reply of a conversation."""
    return t.render(messages(*turns), t.ChatFormat(tokenizer, [tokenizer.eos_token_id]))


@pytest.fixture(params=["own template", "Qwen3.5's template"])
def tokenizer(request, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    if request.param == "Qwen3.5's template":
        tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


@pytest.fixture
def model_with(tiny, tmp_path):
    """Return a function: the path of the tests' model with a part of its template replaced."""

    def change(old, new):
        folder = Path(shutil.copytree(tiny, tmp_path / "model"))
        template = folder / "chat_template.jinja"
        assert old in template.read_text()
        template.write_text(template.read_text().replace(old, new))
        return str(folder)

    return change


@pytest.fixture
def dry_run(tiny, tmp_path, monkeypatch):
    """Return a function that makes a dry run on conversations, in their folder."""

    def run(*talks, held_out=(), flags=()):
        monkeypatch.chdir(tmp_path)
        write(tmp_path, "train.jsonl", *talks)
        files = ["--train_file", "train.jsonl", "--eval_file", ""]
        if held_out:
            write(tmp_path, "eval.jsonl", *held_out)
            files[-1] = "eval.jsonl"
        t.main(["--demo", "--dry_run", "--model_name", tiny, *files, *flags])

    return run


def refusal(capsys, run, *args, **keywords):
    """Return what a run which exits with 1 ends with: one line for each problem, unwrapped."""
    with pytest.raises(SystemExit) as stop:
        run(*args, **keywords)
    assert stop.value.code == 1
    err = capsys.readouterr().err
    return re.sub(r"\n(?!\S+:\d+: |\d+ of |\.\.\. and)", " ", err.strip()).split("\n")


# ---- ids and labels


def test_the_demo_template_renders_as_qwens(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for turns in [TALK[:n] for n in range(2, 8)] + [TALK[1:4]]:
        for thinking in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
            for ask in (True, False):
                options = {"tokenize": False, "add_generation_prompt": ask, **thinking}
                own, theirs = (
                    tokenizer.apply_chat_template(messages(*turns), **options, chat_template=one)
                    for one in (tokenizer.chat_template, QWEN_TEMPLATE)
                )
                assert own == theirs


@pytest.mark.parametrize("end", [3, 5, 7], ids=["one turn", "two turns", "three turns"])
def test_every_turn_is_learned_behind_the_ids_that_are_served(tokenizer, end):
    prompt, reply = render(tokenizer, *TALK[:end])
    served = tokenizer.apply_chat_template(
        messages(*TALK[: end - 1]), add_generation_prompt=True, enable_thinking=False
    )["input_ids"]
    assert prompt == served
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(reply) == TALK[end - 1][1] + "<|im_end|>"
    assert reply[-1] == tokenizer.eos_token_id and reply.count(reply[-1]) == 1


def test_trl_prepares_a_single_turn_the_same_but_for_a_newline(tokenizer, tiny, tmp_path):
    row = {"prompt": messages(SYSTEM, HELLO), "completion": messages(MORNING)}
    row["chat_template_kwargs"] = {"enable_thinking": False}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny),
        args=SFTConfig(tmp_path, max_length=None, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    theirs = trainer.train_dataset[0]
    prompt, reply = render(tokenizer, SYSTEM, HELLO, MORNING)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert theirs["input_ids"] == prompt + reply + newline
    assert theirs["labels"] == [-100] * len(prompt) + reply + newline


def test_the_trainer_gets_each_reply_as_it_was_rendered(tiny, tmp_path):
    talks = [[HELLO, ("assistant", f"Yes {n}.")] for n in range(20)]
    flags = ["--train_file", write(tmp_path, "t", TALK, *talks)]
    flags += ["--eval_file", write(tmp_path, "e", TALK[1:3]), "--output_dir", str(tmp_path / "o")]
    job = t.Job(t.parse_settings(["--demo", "--model_name", tiny, *flags]))
    t.prepare(job)
    trainer = t.build_trainer(job)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    wanted = [TALK[:3], TALK[:5], TALK, *talks]
    found = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    for (ids, labels), talk in zip(found, wanted, strict=True):
        prompt, reply = render(tokenizer, *talk)
        assert ids == prompt + reply and labels == [-100] * len(prompt) + reply
    prompt, reply = render(tokenizer, *TALK[1:3])
    assert [row["input_ids"] for row in trainer.eval_dataset] == [prompt + reply]


@pytest.mark.parametrize("own_end", ["<|endoftext|>", None])
def test_an_end_of_turn_that_generation_config_alone_names_is_learned(
    flags, tiny, tmp_path, capsys, own_end
):
    """As Gemma's: its tokenizer's end is <eos>, but its turns end with <end_of_turn>."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    change_json(folder / "tokenizer_config.json", eos_token=own_end)
    flags = [*flags, "--model_name", str(folder)]
    t.main(flags)
    out = capsys.readouterr().out
    assert "a reply ends with <|im_end|>" in out and "\ndone " in out
    job = prepared(flags)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output" / "final_lora")
    assert tokenizer.eos_token == own_end
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    ends = []
    for example in job.held_out:
        assert example.reply_ids[-1] == end and example.reply_ids.count(end) == 1
        *read, _ = example.input_ids
        ends.append(t.Example("its end alone", [], prompt_ids=read, reply_ids=[end]))
    before = token_loss(base, ends)
    adapted = PeftModel.from_pretrained(base, tmp_path / "output" / "final_lora").eval()
    assert token_loss(adapted, ends) < before - 1

    (folder / "generation_config.json").unlink()  # now nothing tells where a turn ends
    with pytest.raises(SystemExit):
        t.main([*flags, "--dry_run"])
    assert re.search("end-of-turn|not end", capsys.readouterr().err)


# ---- what is refused


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_a_control_token_in_a_text_is_refused_by_name(tokenizer, place, token):
    turns = [SYSTEM, HELLO, MORNING]
    turns[place] = (turns[place][0], f"before {token}user after")
    with pytest.raises(ValueError, match=rf"control token {re.escape(token)}.*remove"):
        render(tokenizer, *turns)


THINKING = "{{- '\\n</think>\\n\\n' }}"
TURN = "{{- text + '<|im_end|>\\n' }}"


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("{%- set turn", "{{ raise_exception('no system') }}{%- set turn", "refuses.*no system"),
        ("{%- set turn", "{{ messages[7].content }}{%- set turn", "refuses"),
        ("{%- set turn", "{% if %}{%- set turn", "refuses"),
        (THINKING, "{{- 'quick</think>' }}", "differently.*not equal serving.*quick"),
        (TURN, "{{- text + '\\n' }}", r"<\|im_end\|>.*not learn to stop"),
    ],
    ids=["raises", "undefined", "no template", "prompt otherwise", "no end of turn"],
)
def test_a_template_that_cannot_serve_is_named_once_with_its_model(
    model_with, dry_run, capsys, old, new, fault
):
    """It is the model's fault, so no line is blamed, however many there are."""
    model = model_with(old, new)
    talks = [TALK[1:3], *[[HELLO, YES]] * 5]
    (said,) = refusal(capsys, dry_run, *talks, flags=["--model_name", model])
    assert re.search(rf"^MODEL_NAME {re.escape(model)}: its chat template .*{fault}", said)
    assert "train.jsonl:1" in said and "train.jsonl:2" not in said and "problem" not in said


ASKED = "if 'Nell' in messages[-1].content"
REFUSE = "{% " + ASKED + " %}{{ raise_exception('no') }}{% endif %}"


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("{%- set turn", REFUSE + "{%- set turn", "refuses this conversation: no"),
        (THINKING, "{{- 'quick</think>' " + ASKED + " else '\\n</think>\\n\\n' }}",
         "differently.*not equal serving"),
        (TURN, "{{- text + ('\\n' if 'Nell' in text else '<|im_end|>\\n') }}",
         r"not end the reply with <\|im_end\|>.*not learn to stop"),
    ],
    ids=["raises", "prompt otherwise", "no end of turn"],
)  # fmt: skip
def test_a_template_that_cannot_serve_some_lines_names_those_alone(
    model_with, dry_run, capsys, old, new, fault
):
    """A plain conversation is rendered as it should be; the name in a text is the trouble."""
    flags = ["--model_name", model_with(old, new)]
    nell = [("user", "Are you Nell?"), NELL]
    talks = [[HELLO, YES], nell, [HELLO, YES], nell]
    said = refusal(capsys, dry_run, *talks, held_out=[nell, [WHO, YES]], flags=flags)
    assert [one.partition(": ")[0] for one in said] == [
        "train.jsonl:2", "train.jsonl:4", "eval.jsonl:1"
    ]  # fmt: skip
    assert all(re.search(fault, one) for one in said) and "has 3 problems" in said[-1]


def test_a_template_that_changes_prompt_and_reply_alike_is_fine(model_with):
    tokenizer = AutoTokenizer.from_pretrained(model_with("trim %}", "trim | upper %}"))
    _, reply = render(tokenizer, HELLO, MORNING)
    assert tokenizer.decode(reply) == "GOOD MORNING.<|im_end|>"


def test_a_template_without_system_messages_is_said_to_be(model_with, dry_run, capsys):
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    model = model_with("{%- set turn", no_system + "{%- set turn")
    flags = ["--model_name", model]
    talks = [[HELLO, YES], [SYSTEM, HELLO, YES], [HELLO, YES], [SYSTEM, HELLO, NELL]]
    (said,) = refusal(capsys, dry_run, *talks, held_out=talks[1:2], flags=flags)
    assert said.startswith(f"MODEL_NAME {model}: its chat template refuses the system message")
    assert "train.jsonl:2" in said and "(no)" in said and "first user message" in said
    dry_run([HELLO, YES], flags=flags)  # it is fit for conversations without one


def test_a_bug_is_not_blamed_on_the_conversation(tokenizer, monkeypatch):
    def bug(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", bug)
    with pytest.raises(ZeroDivisionError):
        render(tokenizer, HELLO, YES)


@pytest.mark.parametrize("lacking", ["template", "end", "full weights", "folder", "config"])
def test_a_model_that_cannot_be_used_is_named_with_the_reason(
    tiny, tmp_path, dry_run, capsys, lacking
):
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    if lacking == "template":
        (folder / "chat_template.jinja").unlink()
    if lacking == "end":
        change_json(folder / "tokenizer_config.json", eos_token=None)
        (folder / "generation_config.json").unlink()
    if lacking == "full weights":
        four_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        change_json(folder / "config.json", quantization_config=four_bits)
    if lacking == "folder":
        shutil.rmtree(folder)
    if lacking == "config":
        (folder / "config.json").write_text("{")
    reason = {"template": "chat template", "end": "end-of-turn", "full weights": "quantized"}
    (said,) = refusal(capsys, dry_run, TALK, flags=["--model_name", str(folder)])
    assert said.startswith(f"MODEL_NAME {folder}: ")
    assert reason.get(lacking, "cannot be reached") in said


def test_a_hub_that_cannot_be_reached_is_told_in_two_sentences(dry_run, capsys):
    (said,) = refusal(capsys, dry_run, TALK, flags=["--model_name", "some-one/a-model"])
    assert "hub cannot be reached, and some-one/a-model is not stored on this machine" in said
    assert "local folder" in said and "(" not in said  # the library's words are in the log


# ---- what is too long


def test_left_out_examples_are_counted_named_and_all_in_the_log(
    tiny, tmp_path, monkeypatch, capsys
):
    def stop(*_, **__):
        raise SystemExit("enough")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", stop)
    monkeypatch.chdir(tmp_path)
    talks = [[HELLO, LONG if n % 10 == 9 else YES] for n in range(250)]
    write(tmp_path, "t", *talks)
    flags = ["--train_file", "t", "--eval_file", "", "--max_seq_len", "64", "--output_dir", "o"]
    with pytest.raises(SystemExit):
        t.main(["--demo", "--model_name", tiny, *flags])
    out, err = capsys.readouterr()
    assert "enough" in err
    numbers = [str(10 * n) for n in range(1, 26)]
    prompt, reply = render(AutoTokenizer.from_pretrained(tiny), HELLO, LONG)
    length = len(prompt + reply)
    assert "left out" in out and "25 of 250" in out and "MAX_SEQ_LEN 64" in out
    assert re.findall(rf"\bt:(\d+): {length} tokens", out) == numbers[:20] and "5 more" in out
    log = Path("o/all_logs.log").read_text(encoding="utf-8")
    assert re.findall(rf"\bt:(\d+): {length} tokens", log) == numbers
    assert re.search(r"\bt +225 ", out)  # the table counts what is left


def test_more_than_a_tenth_too_long_is_refused_with_the_reason(dry_run, capsys):
    def flags(limit):
        return ["--max_seq_len", str(limit)]

    # Ten short ones and one long one: a tenth may be left out, of which 1 of 9 is more.
    dry_run(*[[HELLO, YES]] * 9, [HELLO, LONG], flags=flags(64))
    capsys.readouterr()
    said = refusal(capsys, dry_run, *[[HELLO, YES]] * 8, [HELLO, LONG], flags=flags(64))
    assert "1 of 9" in said[0] and "a tenth" in said[0] and "MAX_SEQ_LEN 64" in said[0]
    length = re.match(r"train\.jsonl:9: (\d+) tokens", said[1])[1]
    keeps_all = -(-int(length) // 64) * 64
    assert re.search(rf"--max_seq_len {keeps_all} +0 ", said[0]) and "--replies" not in said[0]


def test_an_example_of_exactly_the_limit_is_kept_and_never_cut(dry_run, tiny, capsys):
    prompt, reply = render(AutoTokenizer.from_pretrained(tiny), HELLO, LONG)
    length = len(prompt + reply)
    dry_run([HELLO, LONG], flags=["--max_seq_len", str(length)])
    assert re.search(rf"train\.jsonl +1 +{length} +{length} ", capsys.readouterr().out)
    said = refusal(capsys, dry_run, [HELLO, LONG], flags=["--max_seq_len", str(length - 1)])
    assert f"train.jsonl:1: {length} tokens" in said[-1]


def test_a_bad_line_is_named_even_if_too_many_are_too_long(dry_run, capsys):
    bad = [HELLO, ("assistant", "<|im_end|>")]
    flags = ["--max_seq_len", "64"]
    said = " ".join(refusal(capsys, dry_run, [HELLO, LONG], bad, [HELLO, YES], flags=flags))
    assert "train.jsonl:2: " in said and "control token" in said and "a tenth" in said


# ---- what is printed


WIDE = "Guten Tag, Frau M\u00fcller.\n\nA gap. " + 9 * "So long a line. "


def test_the_table_counts_the_tokens_of_each_file(dry_run, tiny, capsys):
    talks = [[("user", WIDE), MORNING], TALK]
    talks += [[("user", "Hello? " * n), NELL] for n in (*range(1, 30), 90)]
    dry_run(*talks, held_out=[[HELLO, YES]])
    out = capsys.readouterr().out
    table = out[out.index("\ntokens ") :].splitlines()[1:4]
    ends = [[m.end() for m in re.finditer(r"\S+(?= |$)", one.split(" (")[0])] for one in table]
    assert ends[1][1:5] == ends[2][1:5] == ends[0][1:5]  # each figure stands under its name
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    rows = [render(tokenizer, *talk) for talk in (*talks, TALK[:3], TALK[:5])]
    lengths = [len(prompt + reply) for prompt, reply in rows]
    learned = sum(len(reply) for _, reply in rows)
    assert round(statistics.median(lengths)) != round(statistics.fmean(lengths))
    figures = [len(rows), round(statistics.median(lengths)), max(lengths), sum(lengths), learned]
    share = f"({learned / sum(lengths):.0%})"
    assert table[1].split() == ["train.jsonl", *(f"{figure:,}" for figure in figures), share]
    assert table[2].split()[:2] == ["eval.jsonl", "1"] and len(set(table[2].split()[2:5])) == 1


def test_the_example_marks_what_is_learned(dry_run, capsys):
    dry_run([("user", WIDE), MORNING], [HELLO, YES])
    out = capsys.readouterr().out
    title, _, example = out[out.index("\nexample ") : out.index("\nplan ")].partition(":\n")
    assert "train.jsonl:1" in title and ">>>" in title and "Yes." not in example
    assert example.count("<|im_start|>") == 2 and "<think>" in example
    assert example.rstrip().endswith(">>>Good morning.<|im_end|><<<")
    assert example.count(">>>") == example.count("<<<") == 1
    assert "Guten Tag, Frau Müller.\n\n" in re.sub("(?m)^ +| +$", "", example)
    assert f"A gap. {WIDE.split('gap. ')[1].strip()}<|im_end|>" in " ".join(example.split())
    assert max(map(len, out.splitlines())) <= 100
