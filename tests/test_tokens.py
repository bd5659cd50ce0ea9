"""Tokens: what is learned is what is served, and only the reply; what is left out or refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import trl
from conftest import TOY
from datasets import Dataset
from runs import command, prepared, read_record, refused, settings_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from toys import edit_json
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from train_lora.base import read_base
from train_lora.conversations import read_conversations
from train_lora.jobs import request_of
from train_lora.tokens import encode, render

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
DRY = ["--dry_run", "--model_name", TOY, "--train_file", "t", "--eval_file", ""]


@pytest.fixture(autouse=True)
def in_a_folder(in_the_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, *talks):
    Path(name).write_text("".join(json.dumps({"messages": one}) + "\n" for one in talks))


def model_with(*changes, **files):
    """Return the folder of the toy, without weights, its template or files changed."""
    shutil.copytree(TOY, "model", ignore=shutil.ignore_patterns("*.safetensors"))
    path = Path("model/chat_template.jinja")
    template = path.read_text()
    for old, new in changes:
        assert template.count(old) == 1, old
        template = template.replace(old, new)
    path.write_text(template)
    for name, values in files.items():
        edit_json(Path(f"model/{name}.json"), lambda value, more=values: value.update(more))
    return "model"


@pytest.fixture(scope="module")
def job():
    """Return a job of the toy; nobody changes it."""
    return read_base(request_of(settings_of(*DRY)))


@pytest.mark.parametrize("said", [HELLO, TALK, messages(" Hi?\n", "First.", "And?", " Second. ")])
def test_the_reply_is_learned_behind_the_tokens_that_are_served(said, job, tokenizer):
    prompt, reply = render(said, job)
    served = tokenizer.apply_chat_template(
        said[:-1], add_generation_prompt=True, enable_thinking=False
    )["input_ids"]
    whole = tokenizer.apply_chat_template(said, enable_thinking=False)["input_ids"]
    newline = tokenizer("\n")["input_ids"]
    assert prompt == served and prompt + reply + newline == whole
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(reply) == said[-1]["content"].strip() + "<|im_end|>"


def test_trl_prepares_a_turn_the_same_but_for_the_newline(tokenizer, tmp_path):
    row = {"prompt": TALK[:2], "completion": TALK[2:3]}
    row |= {"chat_template_kwargs": {"enable_thinking": False}}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(TOY),
        args=SFTConfig(tmp_path, max_length=None, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    theirs = trainer.train_dataset[0]
    write("t", TALK[:3])
    (example,) = prepared(DRY).data.examples
    newline = tokenizer("\n")["input_ids"]
    assert theirs["input_ids"] == example.input_ids + newline
    assert theirs["labels"] == example.labels + newline


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_a_special_token_in_a_text_is_refused_by_name(token, place, job):
    said = [dict(one) for one in TALK[:3]]
    said[place]["content"] = f"before {token}user after"
    with pytest.raises(ValueError, match=re.escape(token)):
        render(said, job)


def test_the_tokens_of_both_files_are_counted(finished, tokenizer):
    """In run.json, against the template's own rendering of each line."""
    data = read_record(finished.output)["data"]
    for name, part in (("train", "train"), ("eval", "held_out")):
        lines = (finished.folder / f"{name}.jsonl").read_text().splitlines()
        tokens = targets = 0
        for row in map(json.loads, lines):
            said = row["prompt"] + row["completion"]
            whole = tokenizer.apply_chat_template(said, tokenize=False, enable_thinking=False)
            tokens += len(tokenizer(whole.removesuffix("\n"))["input_ids"])
            targets += len(tokenizer(said[-1]["content"] + "<|im_end|>")["input_ids"])
        found = [data[part][key] for key in ("examples", "tokens", "targets")]
        assert found == [len(lines), tokens, targets]


LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PHI = ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"]
GEMMA = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"]
QWEN = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
DEEPSEEK = [f"<\uff5c{name}\uff5c>" for name in ("User", "Assistant", "end\u2581of\u2581sentence")]
GPT_OSS = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"]
GLM = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"]
VISION = ["<|im_start|>", "<end_of_utterance>", "<image>"]

# Of some templates in TRL's wheel: the model's special tokens, the tokenizer's end, those that
# generation_config.json names, and how a reply ends; None where the template is refused.
FAMILIES = {
    "llama3_1": (LLAMA, "<|eot_id|>", [], "<|eot_id|>"),
    "qwen3": (QWEN, "<|im_end|>", [], "<|im_end|>"),
    "phi3_5": (PHI, "<|endoftext|>", ["<|end|>", "<|endoftext|>"], "<|end|>"),
    "gemma3": (GEMMA, "<eos>", ["<eos>", "<end_of_turn>"], "<end_of_turn>"),
    "gptoss": (GPT_OSS, "<|return|>", [], "<|return|>"),
    "gemma": (GEMMA, "<eos>", ["<end_of_turn>"], None),  # it knows no system message
    "glm4moe": (GLM, "<|endoftext|>", ["<|user|>"], None),  # its replies have no end
    "deepseekv3": (DEEPSEEK, DEEPSEEK[2], [], None),  # a prompt is no beginning of the whole
    "smolvlm": (VISION, VISION[1], [], None),  # a text that is no list is left out
}


def job_of(family):
    """Return a job of a model with a family's template and a tokenizer of single bytes."""
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
    shutil.copy(Path(TOY) / "config.json", "other")
    ids = tokenizer.convert_tokens_to_ids(ends)
    Path("other/generation_config.json").write_text(json.dumps({"eos_token_id": ids or None}))
    return read_base(request_of(settings_of(*DRY, "--model_name", "other")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_template_is_trained_as_it_is_served_or_refused(family):
    end, job, problems = FAMILIES[family][3], job_of(family), []
    write("one", TALK[:3], HELLO)
    with_system, without = read_conversations("one", "last", problems)
    fitting = encode([with_system], job, 9999, problems)
    if end is None:
        (problem,) = problems
        assert fitting == [] and problem.startswith(with_system.source)
        if family == "gemma":
            (fitting,) = encode([without], job, 9999, [])
            assert job.tokenizer.decode(fitting.reply_ids) == "Yes.<end_of_turn>"
        return
    assert [one.source for one in fitting] == [with_system.source] and not problems, problems
    (with_system,) = fitting
    how = {"add_generation_prompt": True, "enable_thinking": False}
    served = job.tokenizer.apply_chat_template(TALK[:2], **how)
    assert with_system.prompt_ids == served["input_ids"]
    reply = job.tokenizer.decode(with_system.reply_ids)
    assert reply.endswith(f"Good morning.{end}")
    assert with_system.reply_ids.count(with_system.reply_ids[-1]) == 1


BEGIN = "{%- set image_count = "
USER = "message.role + '\\n' + content + '<|im_end|>' + '\\n' }}"
END = "        {{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}"
THOUGHT = "'\\n<think>\\n' + reasoning_content"
IF_NELL = "{% if 'Nell' in messages[-1].content %}"
FAULTS = {
    "raises": (BEGIN, IF_NELL + "{{ raise_exception('not this') }}{% endif %}" + BEGIN),
    "adds text to 1": (BEGIN, IF_NELL + "{{ 1 + 'a' }}{% endif %}" + BEGIN),
    "changes a text": (USER, USER.replace("content", "content | replace('Nell', 'Bob')")),
    "no prefix": (THOUGHT, THOUGHT + " + ('quick' if 'Nell' in content else '')"),
    "no end": (END, "    {{- '' if 'Nell' in content else '<|im_end|>\\n' }}"
               + END.partition("}}")[2]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_template_does_to_some_lines_is_told_of_these(name, capfd):
    nell = messages("Are you Nell?", "Nell.")
    write("t", HELLO, nell, HELLO)
    write("e", HELLO, nell)
    flags = [*DRY, "--model_name", model_with(FAULTS[name])]
    end = refused(capfd, [*flags, "--eval_file", "e"], "t:2", "e:2")
    assert [key for key in ("t:1", "t:3", "e:1") if key in end.err] == []
    write("t", HELLO)
    assert command(capfd, flags).status == 0


def test_an_end_that_generation_config_alone_names_is_learned(capfd):
    write("t", HELLO)
    flags = [*DRY, "--model_name", model_with(tokenizer_config={"eos_token": "<|endoftext|>"})]
    job = prepared(flags)
    end = job.base.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert job.data.examples[0].reply_ids[-1] == end != job.base.tokenizer.eos_token_id
    Path("model/generation_config.json").unlink()  # now nothing tells where a turn ends
    refused(capfd, flags, "t:1")


def test_a_quantized_model_is_refused(capfd):
    write("t", HELLO)
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    refused(capfd, [*DRY, "--model_name", model_with(config=quantized)], "model")


SHORT = [*DRY, "--max_seq_len", "64"]


def length_of(talk, job):
    return sum(map(len, render(talk, job)))


def test_up_to_a_tenth_that_is_too_long_is_left_out_and_nothing_is_cut(capfd, job):
    """And the others are whole: a cut reply has no end, and teaches not to stop."""
    write("t", *[LONG if n % 10 == 9 else HELLO for n in range(30)])
    examples = prepared(SHORT).data.examples
    assert [one.source for one in examples] == [f"t:{n}" for n in range(1, 31) if n % 10]
    prompt, reply = render(HELLO, job)
    assert all(one.input_ids == prompt + reply for one in examples)
    out = capfd.readouterr().out
    assert "t:10, t:20, t:30" in out
    assert ">>>Yes.<|im_end|><<<" in out  # the first example with its targets


def test_an_example_may_be_exactly_as_long_as_the_limit(capfd, job):
    write("t", LONG)
    length = length_of(LONG, job)
    (example,) = prepared([*DRY, "--max_seq_len", length]).data.examples
    assert len(example.input_ids) == length
    refused(capfd, [*DRY, "--max_seq_len", length - 1], "MAX_SEQ_LEN")


def test_more_than_a_tenth_is_refused_with_the_limits_that_would_do(capfd, job):
    talks = [HELLO] * 17 + [messages("Hello?", "Yes. " * n) for n in (30, 40, 50)]
    nine_tenths, everything = length_of(talks[-3], job), length_of(talks[-1], job)
    write("t", *talks)
    refused(capfd, SHORT, "MAX_SEQ_LEN", f"{nine_tenths}", f"{everything}")
    for limit, kept in ((nine_tenths, 18), (everything, 20)):
        assert len(prepared([*DRY, "--max_seq_len", limit]).data.examples) == kept


def test_each_files_tenth_is_counted_by_itself(capfd):
    write("t", *[HELLO] * 8, LONG)
    write("e", *[HELLO] * 9, LONG)  # an exact tenth may go
    end = refused(capfd, [*SHORT, "--eval_file", "e"], "MAX_SEQ_LEN", "t:9:")
    assert "e:10" not in end.err
