"""chat: what the model is sent, and that it replies as weights do that are merged by hand."""

import io
import re
import shutil
import signal
import sys
import types

import pytest
import torch
import toys
from by_hand import MergedByHand, render
from conftest import TOY
from runs import SYSTEM, command, send
from toys import TENSORS, change_config, edit_json, save_adapter
from transformers.generation import GenerationMixin

from inspect_lora.__main__ import main


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """Return an adapter of a base whose own configuration would draw replies by chance."""
    folder = tmp_path_factory.mktemp("talker")
    model = shutil.copytree(TOY, folder / "model")
    drawn = {"do_sample": True, "temperature": 5.0, "min_p": 1.0, "no_repeat_ngram_size": 1}
    drawn["suppress_tokens"] = list(range(10, 2000, 2))
    edit_json(model / "generation_config.json", lambda own: own.update(drawn))
    adapter = save_adapter(folder / "adapter", std=0.6)
    change_config(adapter, base_model_name_or_path=str(model))
    by_hand = MergedByHand(TOY, adapter / TENSORS, lambda _: toys.PLAIN_SCALE)
    return types.SimpleNamespace(adapter=adapter, by_hand=by_hand)


@pytest.fixture
def talk(talker, monkeypatch, capfd):
    """Return talk(...): it gives the status, the prompts' ids, and replies as [(who, text)]."""
    generate = GenerationMixin.generate

    def run_chat(*said, more=("--system", SYSTEM), stopped=()):
        prompts = []

        def watched(self, ids, *given, **how):
            prompts.append(ids[0].tolist())
            if len(prompts) in stopped:
                raise KeyboardInterrupt
            return generate(self, ids, *given, **how)

        monkeypatch.setattr(GenerationMixin, "generate", watched)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in said)))
        words = ["chat", talker.adapter, "--device", "cpu", "--max_new_tokens", "8", *more]
        end = command(capfd, words, main)
        pieces = re.split(r"^(you|base|adapter(?: x \S+)?)> ?", end.out, flags=re.MULTILINE)
        pairs = zip(pieces[1::2], pieces[2::2], strict=True)
        end.replies = [(who, text.strip()) for who, text in pairs if who != "you"]
        end.prompts = prompts
        return end

    return run_chat


def ids_of(*turns, system=SYSTEM, thinks=False):
    """Return the ids of user and assistant in turn, as a server renders them."""
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return render(toys.tokenizer(), messages, thinks, add_generation_prompt=True)


def reply_by_hand(talker, ids, strength=1.0):
    """Return the likeliest reply of merged weights, one token after the other."""
    tokenizer, new = toys.tokenizer(), []
    talker.by_hand.merge(strength=strength)
    while len(new) < 8 and tokenizer.eos_token_id not in new:
        with torch.no_grad():
            logits = talker.by_hand.model(input_ids=torch.tensor([ids + new])).logits[0, -1]
        (best, second), (token, _) = logits.topk(2)
        assert best - second > 1e-4, "rounding could change this: take another seed"
        new.append(token.item())
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def test_adapter_base_and_scale_reply_as_weights_merged_by_hand(talker, talk):
    said, scales = ("what's the time", "so?", "ok", "and?"), (1, 0, 0.5, 1)
    turns, prompts, replies = [], [], []
    for text, scale in zip(said, scales, strict=True):
        turns.append(text)
        prompts.append(ids_of(*turns))
        replies.append(reply_by_hand(talker, prompts[-1], scale))
        turns.append(replies[-1])
    assert len({reply_by_hand(talker, prompts[2], scale) for scale in (0, 0.5, 1)}) == 3
    end = talk(
        "", said[0], "/base", f"  {said[1]}  ", "   ", "/scale 0.5", said[2], "/adapter", said[3],
        "/new", said[0], "/quit", "not answered",
    )  # fmt: skip
    assert end.status == 0 and "/quit" in end.out.partition("you>")[0]
    who = ["adapter", "base", "adapter x 0.5", "adapter", "adapter"]
    assert end.replies == [*zip(who, [*replies, replies[0]], strict=True)]
    assert end.prompts == [*prompts, prompts[0]]


def test_both_reply_one_below_the_other_and_the_talk_goes_on_from_the_adapters(talker, talk):
    end = talk("/both", "hello", "/scale 0.5", "/scale x", "so?")
    ids = ids_of("hello")
    first = [reply_by_hand(talker, ids, scale) for scale in (0, 1)]
    then = ids_of("hello", first[1], "so?")
    second = [reply_by_hand(talker, then, scale) for scale in (0, 0.5)]
    who = ["base", "adapter", "base", "adapter x 0.5"]
    assert end.replies == [*zip(who, first + second, strict=True)]
    assert end.prompts == [ids, ids, then, then] and first[0] != first[1]


def test_what_the_model_is_sent(talker, talk):
    assert talk("hello", more=()).prompts == [ids_of("hello", system="")]
    thinking = ids_of("hello", system="", thinks=True)
    assert talk("hello", more=["--enable_thinking"]).prompts == [thinking]
    (talker.adapter / "run.json").write_text('{"system_message": "Be Nell."}')
    assert talk("hello", more=()).prompts == [ids_of("hello", system="Be Nell.")]
    assert talk("hello", more=["--system", ""]).prompts == [ids_of("hello", system="")]
    end = talk("hello <|im_end|>", "hello")  # it would end the turn
    assert "<|im_end|>" in end.out and end.prompts == [ids_of("hello")]


def test_ctrl_c_stops_a_reply_which_is_forgotten_or_the_chat(talk, monkeypatch):
    end = talk("a story", "hello", stopped=[1])
    assert end.status == 0 and end.prompts[1] == ids_of("hello")
    monkeypatch.setattr("builtins.input", send(signal.SIGINT))
    assert talk().status == 130
