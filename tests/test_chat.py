"""The chat: what the model is sent, its commands, a pipe."""

import argparse
import io
import json
import re
import shutil
import sys
import types

import pytest
import torch
from conftest import TINY
from on_tiny import listing, save_adapter
from safetensors.torch import load_file, save_file
from tiny_adapters import TENSORS, change_config, command
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import GenerationMixin

import inspect_lora.chat as chat
from inspect_lora.adapters import open_adapter
from inspect_lora.replies import generate, greedy

SYSTEM = "You are Nell, an older person's companion."
WINDOW = 132  # tokens that the parrot's model can see
SCALE = 16 / 8


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """Return an adapter and its base, whose replies differ from prompt to prompt.

    The model's own configuration would draw replies by chance, and not from all tokens, and its
    window is short.
    """
    folder = tmp_path_factory.mktemp("parrot")
    model = shutil.copytree(TINY, folder / "model")
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "proj" in name and "language_model" in name:
            tensor.mul_(3)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["max_position_embeddings"] = WINDOW
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    path = model / "generation_config.json"
    own = json.loads(path.read_text(encoding="utf-8"))
    own |= {"do_sample": True, "temperature": 5.0, "min_p": 1.0, "no_repeat_ngram_size": 1}
    own |= {"suppress_tokens": list(range(10, 2000, 2))}
    path.write_text(json.dumps(own), encoding="utf-8")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = save_adapter(
        folder / "adapter", std=0.3, r=8, lora_alpha=16, use_rslora=False, target_modules=targets
    )
    change_config(adapter, base_model_name_or_path=str(model))
    return types.SimpleNamespace(
        adapter=adapter,
        base=AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval(),
        tokenizer=AutoTokenizer.from_pretrained(model),
    )


@pytest.fixture
def talk(parrot, monkeypatch, capsys):
    """Return a function that holds a chat with these lines as its standard input.

    It gives the status, the prompts' ids, the replies as [(who, text)], and what was printed. The
    replies whose numbers are in stopped meet a Ctrl-C.
    """
    generate = GenerationMixin.generate

    def run(*said, more=("--system", SYSTEM), stopped=()):
        prompts = []

        def watched(self, ids, *given, **how):
            prompts.append(ids[0].tolist())
            if len(prompts) in stopped:
                raise KeyboardInterrupt
            return generate(self, ids, *given, **how)

        monkeypatch.setattr(GenerationMixin, "generate", watched)
        lines = [line if isinstance(line, bytes) else line.encode() for line in said]
        stdin = io.TextIOWrapper(io.BytesIO(b"".join(line + b"\n" for line in lines)), "utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        end = command(capsys, "chat", parrot.adapter, "--max_new_tokens", "8", *more)
        pieces = re.split(r"^(you|base|adapter(?: x \S+)?)> ?", end.out, flags=re.MULTILINE)
        pairs = [*zip(pieces[1::2], pieces[2::2], strict=True)]
        replies = [(who, text.strip()) for who, text in pairs if who != "you"]
        return types.SimpleNamespace(prompts=prompts, replies=replies, **vars(end))

    return run


def ids_of(tokenizer, *turns, system=SYSTEM):
    """Return the ids of user and assistant in turn, as a server renders them."""
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, tokenize=False
    )
    assert text.endswith("assistant\n<think>\n\n</think>\n\n")
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def reply_by_hand(parrot, ids, scale=1.0):
    """Return the likeliest reply of weights merged by hand, without generate() and its cache."""
    tensors = load_file(parrot.adapter / TENSORS)
    weights = {name: weight.clone() for name, weight in parrot.base.state_dict().items()}
    merged, new = dict(weights), []
    for name in [name for name in tensors if "lora_A" in name]:
        path = name.removeprefix("base_model.model.").replace("lora_A.", "")
        update = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        merged[path] = weights[path] + scale * SCALE * update
    try:
        parrot.base.load_state_dict(merged)
        with torch.no_grad():
            while len(new) < 8 and parrot.tokenizer.eos_token_id not in new:
                logits = parrot.base(input_ids=torch.tensor([ids + new])).logits[0, -1]
                (best, second), (token, _) = logits.topk(2)
                assert best - second > 1e-4, "rounding could change this: take another seed"
                new.append(token.item())
    finally:
        parrot.base.load_state_dict(weights)
    return parrot.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_special_tokens_in_a_message_are_not_sent(talk):
    """They would end the turn, and the model would go on with what the user wrote."""
    found = talk("hello <|im_end|>", "hello")
    assert "Not sent: the text holds <|im_end|>" in found.said
    assert len(found.prompts) == len(found.replies) == 1


def test_what_is_drawn_by_chance_has_the_models_own_odds(parrot):
    flags = {"base": None, "base_revision": None, "dtype": None, "device": "cpu"}
    options = argparse.Namespace(adapter=str(parrot.adapter), enable_thinking=False, **flags)
    opened = open_adapter(options, parrot.adapter, None)
    prompts = [ids_of(parrot.tokenizer, f"what's the time, {n}") for n in range(8)]
    drawn = generate(
        opened.model, opened.chat_format, prompts, greedy(opened.chat_format, 8), "", seed=3
    )
    assert len({one.text for one in drawn}) > 4  # min_p = 1 would leave the likeliest alone
    assert any(token in range(10, 2000, 2) for one in drawn for token in one.ids)


def test_adapter_base_and_scale_reply_as_weights_merged_by_hand(parrot, talk):
    tokenizer, said = parrot.tokenizer, ("what's the time", "so?", "ok", "and?")
    scales, turns, prompts, replies = (1, 0, 0.5, 1), [], [], []
    for text, scale in zip(said, scales, strict=True):
        turns.append(text)
        prompts.append(ids_of(tokenizer, *turns))
        replies.append(reply_by_hand(parrot, prompts[-1], scale))
        turns.append(replies[-1])
    assert len({*replies}) == 4
    end = talk(
        "", said[0], "/base", f"  {said[1]}  ", "   ", "/scale 0.5", said[2], "/adapter", said[3],
        "/new", said[0],
    )  # fmt: skip
    assert end.status == 0
    who = ["adapter", "base", "adapter x 0.5", "adapter", "adapter"]
    assert end.replies == [*zip(who, [*replies, replies[0]], strict=True)]
    assert end.prompts == [*prompts, prompts[0]]


def test_both_reply_one_below_the_other_and_the_talk_goes_on_from_the_adapters(parrot, talk):
    end = talk("/both", "hello", "/adapter", "so?")
    ids = ids_of(parrot.tokenizer, "hello")
    base, adapter = reply_by_hand(parrot, ids, 0), reply_by_hand(parrot, ids)
    assert end.replies[:2] == [("base", base), ("adapter", adapter)] and base != adapter
    assert end.prompts == [ids, ids, ids_of(parrot.tokenizer, "hello", adapter, "so?")]


def test_after_both_another_strength_is_compared_with_the_base(parrot, talk):
    end = talk("/both", "/scale 0.5", "hello")
    ids = ids_of(parrot.tokenizer, "hello")
    half = reply_by_hand(parrot, ids, 0.5)
    assert end.replies == [("base", reply_by_hand(parrot, ids, 0)), ("adapter x 0.5", half)]


@pytest.mark.parametrize("system", ["You are a parrot.", ""])
def test_a_system_message_may_be_given_or_none(parrot, talk, system):
    end = talk("hello", more=["--system", system])
    assert end.prompts == [ids_of(parrot.tokenizer, "hello", system=system)]
    assert f"system message: {system or '(none given)'}\n" in end.out
    end = talk("hello", more=[])
    assert end.prompts == [ids_of(parrot.tokenizer, "hello", system="")]
    assert "system message: (none given); --system gives the training's\n" in end.out


def test_an_adapter_of_ours_is_talked_to_with_its_system_message(
    finished, talk, capsys, monkeypatch
):
    record = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), "utf-8"))
    end = command(capsys, "chat", finished / "final_lora")
    assert end.status == 0 and f"system message: {record['system_message']} " in end.said


def test_an_adapter_that_was_trained_to_think_is_asked_to(parrot, talk):
    end = talk("hello", more=["--enable_thinking"])
    thinking = parrot.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}],
        add_generation_prompt=True, enable_thinking=True, return_dict=False,
    )  # fmt: skip
    assert end.prompts == [thinking] != [ids_of(parrot.tokenizer, "hello", system="")]


@pytest.mark.parametrize("word", ["/quit", "/exit"])
def test_these_words_end_it(talk, word):
    end = talk("hello", word, "not answered")
    assert end.status == 0 and len(end.replies) == 1 and "not answered" not in end.out


def test_help_lists_the_commands_and_an_unknown_one_is_no_message(talk):
    end = talk("/help", "/Base", "/unknown 3", "hello")
    commands = ("/base", "/adapter", "/both", "/scale", "/new", "/help", "/quit", "/exit")
    assert all(command in end.out.partition("/Base")[0] for command in commands)
    assert "/Base is an unknown command" in end.out and "/unknown is an unknown" in end.out
    assert [who for who, _ in end.replies] == ["adapter"] and len(end.prompts) == 1


@pytest.mark.parametrize("wrong", ["", "x", "-1", "10.5", "nan", "inf", "0.5 now", "0,5"])
def test_a_wrong_scale_is_told_and_changes_nothing(wrong, capsys):
    assert chat.read_scale(wrong, [0.25]) == [0.25]
    assert "/scale needs a number from 0" in capsys.readouterr().out


def test_only_plain_lora_has_a_scale(talk, monkeypatch):
    monkeypatch.setattr(chat, "can_scale_and_cut", lambda model: False)
    end = talk("/scale 0.5", "hello")
    assert "/scale is for plain LoRA" in end.out
    assert [who for who, _ in end.replies] == ["adapter"]


def test_a_full_window_drops_the_oldest_turns_and_no_more(parrot, talk):
    """A question and its reply are dropped together, and there is room for the next reply.

    A message that is too long alone is not sent, and the talk goes on from where it was.
    """
    said = [f"{'and ' * [14, 0, 1, 0, 3][n % 5]}day {n}?" for n in range(14)]
    end = talk(*said, " ".join(said), "/new", "hello")
    assert end.status == 0 and len(end.prompts) == 15
    turns, before_last_drop, with_half_a_pair = [], [], []
    for text, (_, reply), ids in zip(said, end.replies[:14], end.prompts[:14], strict=True):
        turns.append(text)
        while len(ids_of(parrot.tokenizer, *turns)) > WINDOW - 8:
            before_last_drop.append(len(ids_of(parrot.tokenizer, *turns)))
            with_half_a_pair.append(len(ids_of(parrot.tokenizer, *turns[1:])))
            del turns[:2]
        assert ids == ids_of(parrot.tokenizer, *turns)
        turns.append(reply)
    # Else a window without room for the reply, or half a pair dropped, would not be seen.
    assert min(before_last_drop) <= WINDOW and min(with_half_a_pair) <= WINDOW - 8
    assert f"takes {WINDOW} tokens: the oldest turns are left out" in end.out
    assert end.out.count("Not sent: ") == 1
    assert end.prompts[14] == ids_of(parrot.tokenizer, "hello")


def test_a_model_that_names_no_window_takes_any_conversation():
    config = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace())
    chat_format = types.SimpleNamespace(prompt_ids=lambda messages: [0] * 10**6)
    adapter = types.SimpleNamespace(
        model=types.SimpleNamespace(config=config), chat_format=chat_format
    )
    assert chat.newest_that_fit(adapter, [], ["hello"], 8) == ["hello"]


def test_a_message_whose_reply_was_stopped_is_forgotten(parrot, talk):
    end = talk("a story", "hello", stopped=[1])
    assert "[stopped]" in end.out and end.prompts[1] == ids_of(parrot.tokenizer, "hello")


def test_half_a_character_does_not_end_the_talk(talk):
    """As a terminal or a file sends it that does not speak UTF-8."""
    end = talk(b"caf\xe9", "hello")
    assert end.status == 0 and [who for who, _ in end.replies] == ["adapter", "adapter"]


def test_the_end_of_input_ends_it_and_nothing_is_written(
    parrot, talk, tmp_path, monkeypatch, capsys
):
    before = listing(parrot.adapter.parent)
    monkeypatch.chdir(tmp_path)
    assert talk("hello", "/scale 2", "hello").status == 0
    assert talk().status == 0 and listing(parrot.adapter.parent) == before
    monkeypatch.setattr(sys, "stdin", None)  # it was closed
    assert command(capsys, "chat", parrot.adapter).status == 0
    assert not [*tmp_path.iterdir()]
