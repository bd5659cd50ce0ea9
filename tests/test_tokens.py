"""Tokens: what is learned is what is served, and only the reply; what is left out or refused."""

import io
import json
import re
import shutil
import statistics
import sys
from pathlib import Path

import huggingface_hub
import pytest
import transformers
import trl
from conftest import TINY
from datasets import Dataset
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import train_lora_single as t

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def messages(*texts, system=""):
    """Return a conversation of these texts, said by user and assistant in turn."""
    said = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *said] if system else said


HELLO = messages("Hello?", "Yes.")
LONG = messages("Hello?", "Yes. " * 50)
TALK = messages(
    "Hello?", "Good morning.", "Who are you?  ", "Nell.\n\nA program.", system="You are Nell."
)


@pytest.fixture(autouse=True)
def in_a_folder(in_the_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, *talks):
    Path(name).write_text("".join(json.dumps({"messages": one}) + "\n" for one in talks))


def dry_run(*flags):
    t.main(["--dry_run", "--model_name", TINY, "--train_file", "t", "--eval_file", "", *flags])


def refusal(capsys, *flags):
    """Return the lines of what a dry run is refused with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        dry_run(*flags)
    assert stop.value.code == 1
    return capsys.readouterr().err.splitlines()


def model_with(*changes, **files):
    """Return the folder of the tests' model, without weights, its template or files changed."""
    shutil.copytree(TINY, "model", ignore=shutil.ignore_patterns("*.safetensors"))
    path = Path("model/chat_template.jinja")
    template = path.read_text()
    for old, new in changes:
        assert old in template
        template = template.replace(old, new)
    path.write_text(template)
    for name, values in files.items():
        path = Path(f"model/{name}.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return "model"


# ---- tokens and labels --------------------------------------------------------------------------

QWEN_TEMPLATE = (TEMPLATES / "qwen3_5_think.jinja").read_text()


@pytest.fixture(params=["own template", "Qwen3.5's template"])
def tokenizer(request):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    if request.param == "Qwen3.5's template":
        tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def render(tokenizer, said):
    """Return the tokens of prompt and reply."""
    return t.render(said, t.ChatFormat(tokenizer, [tokenizer.eos_token_id]))


@pytest.mark.parametrize("said", [TALK[:3], TALK, HELLO], ids=["system", "turns", "plain"])
def test_the_reply_is_learned_behind_the_tokens_that_are_served(tokenizer, said):
    prompt, reply = render(tokenizer, said)
    served = tokenizer.apply_chat_template(
        said[:-1], add_generation_prompt=True, enable_thinking=False
    )["input_ids"]
    whole = tokenizer.apply_chat_template(said, enable_thinking=False)["input_ids"]
    newline = tokenizer("\n")["input_ids"]
    assert prompt == served and prompt + reply + newline == whole
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(reply) == said[-1]["content"] + "<|im_end|>"


def test_trl_prepares_a_turn_the_same_but_for_the_newline(tokenizer, tmp_path):
    row = {"prompt": TALK[:2], "completion": TALK[2:3]}
    row["chat_template_kwargs"] = {"enable_thinking": False}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(TINY),
        args=SFTConfig(tmp_path, max_length=None, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    theirs = trainer.train_dataset[0]
    prompt, reply = render(tokenizer, TALK[:3])
    newline = tokenizer("\n")["input_ids"]
    assert theirs["input_ids"] == prompt + reply + newline
    assert theirs["labels"] == [-100] * len(prompt) + reply + newline
    (row,) = t.to_dataset([t.Example("", [], prompt_ids=prompt, reply_ids=reply)])
    assert row == {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}


def test_the_tests_template_renders_as_qwens():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for said in (TALK[:2], TALK[:3], TALK[:4], TALK, HELLO):
        for options in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
            own, theirs = (
                tokenizer.apply_chat_template(said, tokenize=False, chat_template=one, **options)
                for one in (tokenizer.chat_template, QWEN_TEMPLATE)
            )
            assert own == theirs


# ---- other families -----------------------------------------------------------------------------

LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PHI = ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
GEMMA = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"]
QWEN = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
DEEPSEEK = [f"<\uff5c{name}\uff5c>" for name in ("User", "Assistant", "end\u2581of\u2581sentence")]
COHERE = ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"]
COHERE += ["<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"]
GPT_OSS = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"]
GLM = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"]
VISION = ["<|im_start|>", "<end_of_utterance>", "<image>"]
NOT_SERVED = ["renders the prompt differently", "another"]

# Of each template in TRL's wheel: the model's special tokens, the tokenizer's end, those that
# generation_config.json names, and how a reply ends, or the words of the refusal.
FAMILIES = {
    "llama3": (LLAMA, "<|eot_id|>", [], "<|eot_id|>"),
    "llama3_1": (LLAMA, "<|eot_id|>", [], "<|eot_id|>"),
    "llama3_2": (LLAMA, "<|eot_id|>", [], "<|eot_id|>"),
    "phi3_5": (PHI, "<|endoftext|>", ["<|end|>", "<|endoftext|>"], "<|end|>"),
    "gemma3": (GEMMA, "<eos>", ["<eos>", "<end_of_turn>"], "<end_of_turn>"),
    "qwen2_5": (QWEN, "<|im_end|>", [], "<|im_end|>"),
    "qwen3": (QWEN, "<|im_end|>", [], "<|im_end|>"),
    "qwen3_instruct_2507": (QWEN, "<|im_end|>", [], "<|im_end|>"),
    "qwen3_5_nothink": (QWEN, "<|im_end|>", [], "<|im_end|>"),
    "cohere": (COHERE, "<|END_OF_TURN_TOKEN|>", [], "<|END_OF_TURN_TOKEN|>"),
    "cohere2": (COHERE, "<|END_OF_TURN_TOKEN|>", [], "<|END_OF_TURN_TOKEN|>"),
    "lfm2": (QWEN, "<|im_end|>", [], "<|im_end|>"),
    "gptoss": (GPT_OSS, "<|return|>", [], "<|return|>"),
    "gemma": (GEMMA, "<eos>", ["<end_of_turn>"], ["refuses", "without a system message"]),
    "glm4moe": (GLM, "<|endoftext|>", ["<|user|>"], ["does not end", "<|endoftext|> or <|user|>"]),
    "deepseekv3": (DEEPSEEK, DEEPSEEK[2], [], NOT_SERVED),
    "deepseek_r1_distill": (DEEPSEEK, DEEPSEEK[2], [], NOT_SERVED),
    "smolvlm": (VISION, "<end_of_utterance>", [], ["leaves out what the"]),
    "idefics3": (VISION, "<end_of_utterance>", [], ["leaves out what the"]),
    "llava_next": (VISION, "<end_of_utterance>", [], ["refuses"]),
}


def chat_format_of(family, **more):
    """Return the format of a model with a family's template and a tokenizer of single bytes."""
    tokens, end, ends, _ = FAMILIES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in tokens])
    # Many tokenizers begin each text with a token that the template writes, too.
    first = (tokens[0], inner.token_to_id(tokens[0]))
    inner.post_processor = processors.TemplateProcessing(
        single=f"{first[0]} $A", special_tokens=[first]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        chat_template=(TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8"),
        bos_token=tokens[0],
        eos_token=end,
        pad_token=tokens[0],
    )
    tokenizer.save_pretrained("other")
    ids = tokenizer.convert_tokens_to_ids(ends)
    Path("other/generation_config.json").write_text(json.dumps({"eos_token_id": ids or None}))
    return t.load_chat_format("other", "main", **more)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_template_is_served_as_it_is_trained_or_refused(family):
    end = FAMILIES[family][3]
    chat_format = chat_format_of(family)
    tokenizer = chat_format.tokenizer
    (example,), _ = read(TALK[:3])
    fitting, problems = t.encode([example], chat_format, None)
    if isinstance(end, list):
        (problem,) = problems
        assert not fitting and problem.source == example.source
        assert [part for part in [*end, "template"] if part not in problem.text] == []
        return
    assert fitting == [example] and not problems
    served = tokenizer.apply_chat_template(
        TALK[:2], add_generation_prompt=True, enable_thinking=False
    )["input_ids"]
    assert example.prompt_ids == served
    reply = tokenizer.decode(example.reply_ids)
    assert re.search(f"Good morning\\.(<.END_RESPONSE.>)?{re.escape(end)}$", reply)
    assert example.reply_ids.count(example.reply_ids[-1]) == 1


def read(*talks):
    write("one", *talks)
    return t.read_conversations("one", replies="last")


def test_without_its_system_message_a_conversation_is_taken_where_the_template_wants_none():
    (example,), _ = read(HELLO)
    (fitting,), problems = t.encode([example], chat_format_of("gemma"), None)
    assert not problems
    assert fitting.reply_ids[-1] == chat_format_of("gemma").stop_token_ids[1]


# ---- what a template may not do -----------------------------------------------------------------

TURN = "{{- text + '<|im_end|>\\n' }}"
THINKING = "{{- '\\n</think>\\n\\n' }}"
BEGIN = "{%- set turn"
IF_NELL = "{% if 'Nell' in messages[-1].content %}"
FAULTS = {
    "raises": ((BEGIN, IF_NELL + "{{ raise_exception('not this') }}{% endif %}" + BEGIN),
               ["refuses", "not this"]),
    "undefined": ((BEGIN, IF_NELL + "{{ messages[7].content }}{% endif %}" + BEGIN), ["refuses"]),
    "divides by 0": ((BEGIN, IF_NELL + "{{ 1 / 0 }}{% endif %}" + BEGIN), ["refuses", "by zero"]),
    "overflows": ((BEGIN, IF_NELL + "{% for i in range(10**9) %}{% endfor %}{% endif %}" + BEGIN),
                  ["refuses", "Range too big"]),
    "adds text to 1": ((BEGIN, IF_NELL + "{{ 1 + 'a' }}{% endif %}" + BEGIN), ["unsupported"]),
    "drops it": ((TURN, IF_NELL + "{{- '<|im_end|>\\n' }}{% else %}" + TURN + "{% endif %}"),
                 ["leaves out what the user says"]),
    "changes it": ((TURN, "{{- text | replace('Nell', 'Bob') + '<|im_end|>\\n' }}"),
                   ["what the user says", "changes"]),
    "no prefix": ((THINKING, IF_NELL + "{{- 'quick</think>' }}{% else %}" + THINKING
                   + "{% endif %}"), ["prompt differently", "not equal serving"]),
    "no end": ((TURN, "{{- text + ('\\n' if 'Nell' in text else '<|im_end|>\\n') }}"),
               ["does not end the reply with <|im_end|>", "learn to stop"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_template_does_to_some_lines_is_one_sentence_with_their_number(name, capsys):
    change, parts = FAULTS[name]
    nell = messages("Are you Nell?", "Nell.")
    write("t", HELLO, *[nell] * 5, HELLO)
    write("e", nell)
    (said, last) = refusal(capsys, "--model_name", model_with(change), "--eval_file", "e")
    assert said.startswith("t:2, t:3, t:4, ... and 3 more: the model's chat template ")
    assert [part for part in parts if part not in said] == []
    assert "without a system message" not in said and "6 problems" in last
    write("t", HELLO)
    dry_run("--model_name", "model")


def test_a_template_that_is_none_is_refused_as_one(capsys):
    write("t", HELLO)
    said = refusal(capsys, "--model_name", model_with((BEGIN, "{% if %}" + BEGIN)))
    assert said[0].startswith("t:1: the model's chat template refuses")


def test_an_error_of_another_kind_is_not_blamed_on_the_conversation(monkeypatch):
    def bug(*_, **__):
        raise AttributeError

    write("t", HELLO)
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "apply_chat_template", bug)
    with pytest.raises(AttributeError):
        dry_run()


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_a_control_token_in_a_text_is_refused_by_name(tokenizer, place, token):
    said = [dict(one) for one in TALK[:3]]
    said[place]["content"] = f"before {token}user after"
    with pytest.raises(ValueError, match=rf"special token {re.escape(token)}.*remove"):
        render(tokenizer, said)


def test_white_space_around_a_text_and_thoughts_may_be_left_out(tokenizer):
    said = messages(" Hello?\n", "<think>\nHm.\n</think>\n\nFirst.", "And?", " Second. ")
    prompt, reply = render(tokenizer, said)
    assert "Hm." not in tokenizer.decode(prompt) and "First." in tokenizer.decode(prompt)
    assert tokenizer.decode(reply).strip() == "Second.<|im_end|>"


@pytest.mark.parametrize("dated", [True, False])
def test_a_template_that_prints_the_day_is_warned_of(dated, capsys):
    """As Llama 3.2's does: tomorrow the tokens will be others."""
    date = '{%- if strftime_now is defined %}{{ strftime_now("%d %b %Y") }}{% endif %}\n'
    write("t", HELLO)
    dry_run("--model_name", model_with((BEGIN, date * dated + BEGIN)))
    found = re.findall(r"(?m)^warning .*date", capsys.readouterr().out)
    assert len(found) == dated


# ---- models that cannot be used -----------------------------------------------------------------


def test_an_end_that_generation_config_alone_names_is_learned(capsys):
    write("t", HELLO)
    ends = {"tokenizer_config": {"eos_token": "<|endoftext|>"}}
    dry_run("--model_name", model_with(**ends))
    assert "a reply ends with <|im_end|>" in capsys.readouterr().out
    Path("model/generation_config.json").unlink()  # now nothing tells where a turn ends
    said = refusal(capsys, "--model_name", "model")
    assert "does not end" in said[0] and "generation_config.json" in said[0]


LACKING = {
    "template": "chat template",
    "end": "end-of-turn",
    "full weights": "quantized",
    "configuration": "no such model",
    "folder": "not stored on this machine",
}


@pytest.mark.parametrize("lacking", LACKING)
def test_a_model_that_cannot_be_used_is_named_with_the_reason(lacking, capsys):
    write("t", HELLO)
    folder = Path(model_with())
    if lacking == "template":
        (folder / "chat_template.jinja").unlink()
    elif lacking == "end":
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
        (folder / "generation_config.json").unlink()
    elif lacking == "full weights":
        path = folder / "config.json"
        four_bits = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
        path.write_text(json.dumps(json.loads(path.read_text()) | four_bits))
    elif lacking == "configuration":
        (folder / "config.json").write_text("{")
    else:
        shutil.rmtree(folder)
    (said,) = refusal(capsys, "--model_name", "model")
    assert "model" in said and LACKING[lacking] in said


def test_a_model_of_the_hub_that_is_not_here_is_one_message_at_once(capsys):
    write("t", HELLO)
    (said,) = refusal(capsys, "--model_name", "some-one/a-model")
    assert "cannot be reached, and some-one/a-model is not stored" in said and "folder" in said


@pytest.mark.parametrize("place", ["commit", "file"])
def test_a_gated_model_is_told_with_its_licence_and_the_login(place, capsys, monkeypatch):
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    gated = GatedRepoError("403 Client Error", response=response)

    def refuse(*_, **__):
        if place == "file":  # as transformers wraps it
            raise OSError("You are trying to access a gated repo.") from gated
        raise gated

    if place == "file":
        answer = huggingface_hub.ResolvedRevision(resolved="0" * 40, initial="main")
        monkeypatch.setattr(huggingface_hub, "resolve_revision", lambda *_, **__: answer)
        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    else:
        monkeypatch.setattr(huggingface_hub, "resolve_revision", refuse)
    write("t", HELLO)
    (said,) = refusal(capsys, "--model_name", "meta/some-llama")
    assert "https://huggingface.co/meta/some-llama" in said and "hf auth login" in said


# ---- what is too long ---------------------------------------------------------------------------


def lengths_of(*talks):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return [sum(map(len, render(tokenizer, one))) for one in talks]


def test_up_to_a_tenth_that_is_too_long_is_left_out_by_name(capsys):
    write("t", *[LONG if n % 10 == 9 else HELLO for n in range(250)])
    dry_run("--max_seq_len", "64")
    out = capsys.readouterr().out
    (length,) = lengths_of(LONG)
    named = re.findall(rf"\bt:(\d+): {length} tokens", out)
    assert named == [str(10 * n) for n in range(1, 21)] and "5 more" in out
    assert re.search(r"(?m)^left out +25 of 250 ", out) and re.search(r"(?m)^ +t +225 ", out)


def test_more_than_a_tenth_is_refused_with_the_limits_that_would_do(capsys):
    talks = [HELLO] * 17 + [messages("Hello?", "Yes. " * n) for n in (30, 40, 50)]
    write("t", *talks)
    said = refusal(capsys, "--max_seq_len", "64")
    assert len(said) == 2 and said[0].startswith("t:18: 3 of 20 ")
    nine_tenths, everything = re.findall(r"([\d,]+) would keep (?:nine|every)", said[0])
    for limit, kept in ((nine_tenths, 18), (everything, 20)):
        dry_run("--max_seq_len", limit)
        assert re.search(rf"(?m)^ +t +{kept} ", capsys.readouterr().out)
        less = str(int(limit) - 1)
        if kept == 18:
            refusal(capsys, "--max_seq_len", less)
    # An exact tenth may go, and the other file is counted by itself.
    write("e", *[HELLO] * 9, LONG)
    write("t", HELLO)
    dry_run("--eval_file", "e", "--max_seq_len", "64")
    write("e", *[HELLO] * 8, LONG)
    assert "1 of 9" in refusal(capsys, "--eval_file", "e", "--max_seq_len", "64")[0]
    # Both files are named with the limits that each needs, and not the first one's alone.
    write("t", *talks)
    longest = [HELLO] * 8 + [messages("Hello?", "Yes. " * 60)]
    write("e", *longest)
    said = refusal(capsys, "--eval_file", "e", "--max_seq_len", "64")
    assert said[0].startswith("t:18: 3 of 20 training")
    assert said[0].endswith(f" {everything} would keep every one")
    assert said[1].startswith("e:9: 1 of 9 held-out")
    (longer,) = lengths_of(longest[-1])
    assert longer > int(everything) and said[1].endswith(f" {longer:,} would keep every one")


def test_a_long_example_is_shown_without_its_middle(capsys):
    lines = "\n".join(f"Line {n}." for n in range(100))
    write("t", messages("Hello?", lines, "Go on.", "The last word."))
    dry_run("--max_seq_len", "4096", "--replies", "last")
    shown = capsys.readouterr().out.partition("\nexample ")[2]
    assert "Hello?" in shown and ">>>The last word." in shown
    assert "Line 50." not in shown and re.search(r"\[\d+ lines left out here\]", shown)
    assert len(shown.splitlines()) < 60
    write("t", TALK)
    dry_run()
    assert "left out here" not in capsys.readouterr().out


def test_an_example_of_exactly_the_limit_stays_whole(capsys):
    (length,) = lengths_of(LONG)
    write("t", LONG)
    dry_run("--max_seq_len", str(length))
    assert re.search(rf"(?m)^ +t +1 +{length} +{length} +{length} ", capsys.readouterr().out)
    assert "1 of 1" in refusal(capsys, "--max_seq_len", str(length - 1))[0]


# ---- what is printed ----------------------------------------------------------------------------


def test_the_table_counts_the_tokens_of_each_file_and_of_all_steps(capsys):
    talks = [TALK, *[messages("Hello? " * n, "Nell.") for n in (*range(1, 30), 60)]]
    write("t", *talks)
    write("e", HELLO)
    dry_run("--eval_file", "e")
    out = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    rows = [render(tokenizer, one) for one in (TALK[:3], *talks)]
    lengths = [len(prompt + reply) for prompt, reply in rows]
    learned = sum(len(reply) for _, reply in rows)
    figures = [len(rows), round(statistics.median(lengths)), max(lengths), sum(lengths), learned]
    share = rf"\({learned / sum(lengths):.0%}\)"
    row = " +".join(["t", *(f"{one:,}" for one in figures)])
    assert round(statistics.median(lengths)) != round(statistics.fmean(lengths))
    assert re.search(rf"(?m)^ +{row} {share}$", out)
    assert re.search(r"(?m)^ +e +1 +(\d+) +\1 +\1 ", out)
    assert f"all steps together train on {3 * sum(lengths):,} tokens" in out
    dry_run("--max_steps", "4")  # of 8 in an epoch
    assert f"train on about {round(sum(lengths) / 2):,} tokens" in capsys.readouterr().out


def test_the_first_example_is_shown_with_what_is_learned(capsys):
    wide = "Guten Tag, Frau Müller.\n\n" + 9 * "So long a line. "
    write("t", messages(wide, "Good morning."), HELLO)
    dry_run()
    out = capsys.readouterr().out
    shown = out[out.index("\nexample ") : out.index("\nplan ")]
    assert "t:1 " in shown and shown.rstrip().endswith(">>>Good morning.<|im_end|><<<")
    assert " ".join(wide.split()) in " ".join(shown.split()) and "Yes." not in shown
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_runs_on_a_terminal_while_lines_are_rendered(is_terminal, monkeypatch):
    errors = io.StringIO()
    errors.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", errors)
    write("t", *[HELLO] * 30)
    dry_run()
    assert bool(re.search(r"rendering: .*/30", errors.getvalue())) == is_terminal
    assert is_terminal or errors.getvalue() == ""


@pytest.mark.parametrize("limit", ["4096", "4097"])
@pytest.mark.parametrize("words", [10, 5000])
def test_what_is_beyond_the_models_window_is_told(limit, words, capsys):
    """The tests' model has 4,096 positions."""
    write("t", messages("word " * words, "Yes."), *[HELLO] * 20)
    dry_run("--max_seq_len", "9999" if words > 10 and limit == "4097" else limit)
    said = " ".join(capsys.readouterr().out.split())
    is_beyond = limit == "4097"
    assert ("is more than the 4,096 tokens that the model was made for" in said) == is_beyond
    assert ("of the examples 1 are longer, such as t:1" in said) == (is_beyond and words > 10)
