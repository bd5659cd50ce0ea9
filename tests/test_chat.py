"""chat: what the model is sent, and that it replies as weights do that are merged by hand."""

import io
import json
import re
import shutil
import signal
import sys
import types

import pytest
import toys
from by_hand import MergedByHand, likeliest_reply, render
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
    return change_config(adapter, base_model_name_or_path=str(model))


@pytest.fixture
def talk(talker, monkeypatch, capfd):
    """Return talk(...): it gives the status, the prompts' ids, and replies as [(who, text)]."""
    generate = GenerationMixin.generate

    def run_chat(*said, flags=(), stopped=()):
        prompts = []

        def watched(self, ids, *given, **how):
            prompts.append(ids[0].tolist())
            if len(prompts) in stopped:
                raise KeyboardInterrupt
            return generate(self, ids, *given, **how)

        monkeypatch.setattr(GenerationMixin, "generate", watched)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in said)))
        words = ["chat", talker, "--device", "cpu", "--max_new_tokens", "8", *flags]
        end = command(capfd, words, main)
        pieces = re.split(r"^(you|base|adapter(?: x \S+)?)> ?", end.out, flags=re.MULTILINE)
        pairs = zip(pieces[1::2], pieces[2::2], strict=True)
        replies = [(who, text.strip()) for who, text in pairs if who != "you"]
        return types.SimpleNamespace(status=end.status, prompts=prompts, replies=replies)

    return run_chat


def ids_of(*turns, system="", thinks=False):
    """Return the ids of user and assistant in turn, as a server renders them."""
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return render(toys.tokenizer(), messages, thinks, add_generation_prompt=True)


def test_base_and_adapter_at_any_strength_reply_as_weights_merged_by_hand(talker, talk):
    """The talk goes on from the last reply, with /both from the adapter's."""
    merged = MergedByHand(TOY, talker / TENSORS, lambda _: toys.PLAIN_SCALE)
    answering = {"what's the time": [1], "so?": [0], "ok": [0.5], "and?": [1], "oh": [0, 1]}
    turns, prompts, replies = [], [], []
    for text, strengths in answering.items():
        turns.append(text)
        for strength in strengths:
            prompts.append(ids_of(*turns))
            merged.merge(strength=strength)
            tokens = likeliest_reply(merged.model, prompts[-1], 8)
            replies.append(toys.tokenizer().decode(tokens, skip_special_tokens=True).strip())
        turns.append(replies[-1])
    end = talk(
        "", "what's the time", "/base", "  so?  ", "   ", "/scale 0.5", "/scale x", "ok",
        "/adapter", "and?", "/both", "oh", "/new", "/adapter", "what's the time", "/quit", "more",
        flags=["--system", ""],
    )  # fmt: skip
    who = ["adapter", "base", "adapter x 0.5", "adapter", "base", "adapter", "adapter"]
    assert end.replies == [*zip(who, [*replies, replies[0]], strict=True)]
    assert end.prompts == [*prompts, prompts[0]] and end.status == 0
    assert len(set(replies)) > 3 and replies[-1] != replies[-2]


SENT = [  # flags, and the system message and thinking that the prompt has then
    ([], SYSTEM, False), (["--system", ""], "", False), (["--system", "Be Bob."], "Be Bob.", False),
    (["--enable_thinking"], SYSTEM, True),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "system", "thinks"), SENT)
def test_prompts_are_as_in_the_training_or_as_asked_for(talker, talk, flags, system, thinks):
    (talker / "run.json").write_text(json.dumps({"system_message": SYSTEM}))
    assert talk("hello", flags=flags).prompts == [ids_of("hello", system=system, thinks=thinks)]


def test_a_special_token_is_not_sent(talk):
    """It would end the turn; what comes after it is answered."""
    assert talk("hello <|im_end|>", "hello", flags=["--system", ""]).prompts == [ids_of("hello")]


def test_ctrl_c_stops_a_reply_which_is_forgotten_or_the_chat(talk, monkeypatch):
    end = talk("a story", "hello", flags=["--system", ""], stopped=[1])
    assert end.status == 0 and end.prompts[1] == ids_of("hello")
    monkeypatch.setattr("builtins.input", send(signal.SIGINT))
    assert talk().status == 130
