"""Dialogues: one row trains all replies where that is exact, and each reply its own elsewhere."""

import shutil
from pathlib import Path

import pytest
import runs
import torch
import trl
from by_hand import ROUNDING, token_loss
from conftest import TOY
from toys import base_model, family, model_of

import train_lora_single as script
from train_lora.base import read_base
from train_lora.conversations import prompt_hash, read_conversations
from train_lora.jobs import request_of
from train_lora.losses import losses_of_replies
from train_lora.tokens import Example, encode, join_replies, pad

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = (TEMPLATES / "qwen2_5.jinja").read_text(encoding="utf-8")  # without think blocks
ONE_PASS = ["--chat_template", "one_pass"]
SYSTEM = {"role": "system", "content": "You are Nell."}


def write(path, lengths, first=0):
    """Write dialogues with so many replies each as JSONL; return the path as text."""
    rows = [{"messages": runs.dialogue(first + n, count)} for n, count in enumerate(lengths)]
    return runs.write_lines(path, rows)


def flags_for(folder, train, *more, model=TOY):
    """Return the flags of a short run on dialogues of so many replies, into folder/output."""
    flags = ["--model_name", model, "--device", "cpu", "--dtype", "float32"]
    flags += ["--max_seq_len", "4096"]
    flags += ["--train_file", write(folder / "train.jsonl", train), "--eval_file", ""]
    flags += ["--learning_rate", "1e-2", "--logging_steps", "1", "--output_dir", folder / "output"]
    return [*flags, *more]


def model_with_chatml(kind, folder):
    """Return the folder of a small model whose template adds no think block."""
    config = family(kind, tie_word_embeddings=True, **WIDE.get(kind, {}))
    path = model_of(config, folder, has_weights=True)
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return path


WIDE = {"Gemma3Text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}}
KINDS = {"Llama": [], "Gemma3Text": [], "Qwen3_5": ONE_PASS}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_of_joined_replies_are_those_of_single_ones(kind, tmp_path):
    """Also where the joined rows go through in parts, and are recomputed."""
    folder = TOY if kind == "Qwen3_5" else model_with_chatml(kind, tmp_path / "model")
    flags = flags_for(tmp_path, [3, 1, 4, 2], *KINDS[kind], "--lora_dropout", "0", model=folder)
    job = runs.prepared(flags)
    joined = job.data.examples
    assert [len(example.replies) for example in joined] == [3, 1, 4, 2]
    problems = []
    conversations = read_conversations(job.settings.TRAIN_FILE, "all", problems)
    single = encode(conversations, job.base, 4096, problems)
    assert len(single) == 10 and not problems and not any(one.earlier_replies for one in single)
    trainer = script.build_trainer(job)
    runs.set_b(trainer.model)
    expected = one_step(trainer, single, 10_000)
    assert expected[0] == pytest.approx(token_loss(trainer.model.eval(), joined), rel=ROUNDING)
    longest = max(len(example.input_ids) for example in joined)
    for tokens in (10_000, longest + 64, longest // 2):
        loss, gradient = one_step(trainer, joined, tokens)
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert (gradient - expected[1]).norm() <= 1e-5 * expected[1].norm()
    losses = losses_of_replies(trainer.model, joined, 500)
    assert [len(one) for one in losses] == [3, 1, 4, 2]
    model = trainer.model.eval()
    alone = [token_loss(model, [reply]) * len(reply.reply_ids) for reply in single]
    assert [loss for one in losses for loss in one] == pytest.approx(alone, rel=ROUNDING)


def one_step(trainer, examples, tokens_at_once):
    """Do a step on these examples; return its loss, and its gradient as one vector."""
    trainer.tokens_at_once = tokens_at_once
    inputs = pad(examples, "cpu")
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, inputs).item()
    return loss, torch.cat([p.grad.flatten() for p in runs.lora(trainer.model).values()])


def test_each_target_is_trained_once_at_its_place(tmp_path):
    """Against the template's own rendering of the whole dialogue."""
    job = runs.prepared(flags_for(tmp_path, [3], *ONE_PASS))
    (example,) = job.data.examples
    tokenizer = job.base.tokenizer
    options = {"tokenize": False, "enable_thinking": False}
    whole = tokenizer.apply_chat_template(runs.dialogue(0, 3), **options).removesuffix("\n")
    assert example.input_ids == tokenizer(whole)["input_ids"]
    said = [message["content"] for message in runs.dialogue(0, 3) if message["role"] == "assistant"]
    targets = [label for label in example.labels if label != -100]
    assert tokenizer.decode(targets) == "".join(f"{text}<|im_end|>" for text in said)
    pairs = zip(example.input_ids, example.labels, strict=True)
    assert all(label in (token, -100) for token, label in pairs)
    assert example.targets == len(targets)


def test_with_qwen35s_own_template_each_reply_is_an_example(tmp_path, capfd):
    """An earlier reply loses its think block there. The way out is named where it joins."""
    flags = flags_for(tmp_path, [5, 5])
    examples = runs.prepared(flags).data.examples
    assert [len(example.replies) for example in examples] == [1] * 10
    assert "--chat_template one_pass" in capfd.readouterr().out
    assert len(runs.prepared([*flags, *ONE_PASS]).data.examples) == 2
    assert "--chat_template" not in capfd.readouterr().out


def test_a_template_file_is_taken_as_it_is(tmp_path):
    plain = tmp_path / "plain.jinja"
    plain.write_text(CHATML, encoding="utf-8")
    flags = flags_for(tmp_path, [5, 5], "--chat_template", plain)
    job = runs.prepared(flags)
    assert job.base.tokenizer.chat_template == CHATML and len(job.data.examples) == 2


def test_one_pass_is_refused_where_trl_knows_none(tmp_path, capfd):
    """TRL knows a template by its text, so for another one it has nothing to offer."""
    model = shutil.copytree(TOY, tmp_path / "model")
    path = model / "chat_template.jinja"
    path.write_text("{%- set mine = 1 %}" + path.read_text(encoding="utf-8"), encoding="utf-8")
    flags = flags_for(tmp_path, [5, 5], model=str(model))
    runs.refused(capfd, [*flags, *ONE_PASS], "CHAT_TEMPLATE", "one_pass", str(model))
    assert "--chat_template" not in runs.command(capfd, [*flags, "--dry_run"]).out


def test_one_pass_is_the_models_own_template_where_that_joins(tmp_path, monkeypatch):
    monkeypatch.setattr(trl, "get_training_chat_template", lambda _: None)
    model = model_with_chatml("Llama", tmp_path / "model")
    job = runs.prepared(flags_for(tmp_path, [5, 5], *ONE_PASS, model=model))
    assert job.base.tokenizer.chat_template == CHATML and len(job.data.examples) == 2


WEATHER = {"name": "weather", "description": "d", "parameters": {"type": "object"}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Leeds"}}}
ASKED = {"role": "user", "content": "Will it rain?"}
IN_PARTS = {"role": "user", "content": [{"type": "text", "text": "Will it rain?"}]}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
REPLIED = {"role": "assistant", "content": "<think>\nClouds.\n</think>\n\nIt will."}


@pytest.fixture(scope="module")
def templates():
    """Return tokenizers with one_pass and with the model's own template."""
    found = []
    for more in (ONE_PASS, []):
        settings = runs.settings_of("--model_name", TOY, "--dry_run", *more)
        found.append(read_base(request_of(settings)).tokenizer)
    return found


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("prompts", [True, False])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": WEATHER}]])
@pytest.mark.parametrize("talk", [
    [ASKED], [SYSTEM, IN_PARTS], [SYSTEM, ASKED, REPLIED],
    [ASKED, CALLED, {"role": "tool", "content": "wet"}, REPLIED],
])  # fmt: skip
def test_a_first_turn_is_rendered_by_one_pass_as_by_the_models_own(
    templates, talk, tools, prompts, thinks
):
    options = {"add_generation_prompt": prompts, "enable_thinking": thinks, "tools": tools}
    options |= {"tokenize": False}
    one_pass, own = (each.apply_chat_template(talk, **options) for each in templates)
    assert one_pass == own


def test_one_pass_has_no_tags_that_no_server_knows(templates):
    one_pass, own = (tokenizer.chat_template for tokenizer in templates)
    assert one_pass != own and "generation " not in one_pass


def made_up(prompt_ids, reply_ids, source="t:1"):
    return Example(source, [], {}, prompt_ids, reply_ids)


FIRST = made_up([1, 2], [3, 4])
APART = {
    "another tokenization of the same text": made_up([1, 2, 34, 5], [6]),
    "a history without the reply's end": made_up([1, 2, 3, 5], [6]),
    "another dialogue": made_up([1, 2, 3, 4, 5], [6], source="t:2"),
    "a shorter prompt": made_up([1, 2, 3], [6]),
}


def test_the_next_tokens_of_the_same_dialogue_are_joined():
    second = made_up([1, 2, 3, 4, 5], [6])
    (joined,) = join_replies([FIRST, second])
    assert joined.replies == (FIRST, second)
    assert joined.input_ids == [1, 2, 3, 4, 5, 6] and joined.labels == [-100, -100, 3, 4, -100, 6]


@pytest.mark.parametrize("what", APART)
def test_other_tokens_are_not_joined(what):
    assert join_replies([FIRST, APART[what]]) == [FIRST, APART[what]]


def test_what_is_too_long_is_left_out_and_the_rest_is_joined(tmp_path):
    """The last reply of the longest dialogue is."""
    flags = flags_for(tmp_path, [6, *[5] * 4], *ONE_PASS)
    whole = runs.prepared(flags).data.examples
    assert [len(example.replies) for example in whole] == [6, 5, 5, 5, 5]
    limit = len(whole[0].input_ids) - 1
    shorter = runs.prepared([*flags, "--max_seq_len", limit]).data.examples
    assert [len(example.replies) for example in shorter] == [5, 5, 5, 5, 5]
    assert shorter[0].replies == whole[0].replies[:5]


def test_a_run_on_dialogues_teaches_each_reply_once_an_epoch(tmp_path, monkeypatch):
    """learned.txt has each reply's prompt, and the held-out loss is that of all replies."""
    path = write(tmp_path / "eval.jsonl", [2, 3], first=50)
    more = ["--num_epochs", "2", "--eval_file", path]
    flags = flags_for(tmp_path, [1, 2, 3, 1, 2, 3], *ONE_PASS, *more)
    whole, recorders = tmp_path / "output", runs.record(monkeypatch)
    assert runs.run(flags) == 0
    data, counts = runs.prepared(flags).data, runs.read_record(whole)["data"]["train"]
    assert (counts["dialogues"], counts["examples"], counts["replies"]) == (6, 6, 12)
    dialogues = [runs.dialogue(number, 1 + number % 3) for number in range(6)]
    prompts = [talk[:end] for talk in dialogues for end in range(2, len(talk), 2)]
    learned = (whole / "final_lora" / "learned.txt").read_text().split()
    assert learned == sorted({prompt_hash(prompt) for prompt in prompts})
    rows = sorted(runs.rows_of(recorders[0].trained))
    assert rows == sorted(2 * [example.input_ids for example in data.examples])
    before = runs.logged(runs.history(whole), "eval_loss")[0]
    assert before == pytest.approx(token_loss(base_model(), data.held_out), rel=ROUNDING)


def test_another_template_is_another_job_and_the_same_is_not(tmp_path):
    flags = flags_for(tmp_path, [1, 1])  # of one reply each, so the tokens are the same
    own = runs.prepared(flags)
    one_pass = runs.prepared([*flags, *ONE_PASS])
    assert own.data.examples[0].input_ids == one_pass.data.examples[0].input_ids
    assert own.folder != one_pass.folder
    copy = tmp_path / "copy.jinja"
    copy.write_text(one_pass.base.tokenizer.chat_template, encoding="utf-8")
    assert runs.prepared([*flags, "--chat_template", copy]).folder == one_pass.folder
