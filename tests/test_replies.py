"""What base and adapter reply: each prompt as if alone, until it ends, judged by its rules."""

import copy
import dataclasses
import json
import random

import peft
import pytest
import torch
import toys
from by_hand import render
from conftest import TOY
from records import NEW_TOKENS, evidence, planned
from runs import NOUNS, read_json, refused, talk, write_lines

from inspect_lora import measures, replies, rules, sampling
from inspect_lora.__main__ import main
from inspect_lora.plan import Asked
from inspect_lora.record import Prompt


@pytest.fixture(scope="module")
def prompts():
    """Return prompts of made-up tokens: to most words the toy says the same."""
    draw = random.Random(1)
    return [[draw.randrange(100, 3000) for _ in range(length)] for length in (5, 9, 9, 14)]


def said_alone(network, ids, count):
    """Return a greedy reply to one prompt, token by token, without generate()."""
    said = []
    while len(said) < count:
        with torch.no_grad():
            said.append(network(input_ids=torch.tensor([ids + said])).logits[0, -1].argmax().item())
        if toys.tokenizer().decode(said[-1:]) == "<|im_end|>":
            break
    return said


@pytest.fixture
def exchanges(record):
    return read_json(record / "evidence.json")["exchanges"]


def test_base_and_adapter_say_what_they_would_alone(record, exchanges):
    """By PEFT and argmax, one prompt at a time; and whether each ended by itself."""
    tokenizer, folder = toys.tokenizer(), record / "inputs" / "adapter"
    network = peft.PeftModel.from_pretrained(copy.deepcopy(toys.base_model()), folder).eval()
    ends = []
    for one in exchanges[::3]:
        ids = render(tokenizer, one["messages"], add_generation_prompt=True)
        with network.disable_adapter():
            base = said_alone(network, ids, NEW_TOKENS)
        for whose, said in (("base", base), ("adapter", said_alone(network, ids, NEW_TOKENS))):
            text = tokenizer.decode(said, skip_special_tokens=True).strip()
            assert (one[whose]["text"], one[whose]["tokens"]) == (text, len(said))
            assert one[whose]["ended"] is (tokenizer.decode(said[-1:]) == "<|im_end|>")
            ends.append(one[whose]["ended"])
    assert {*ends} == {True, False}


def test_each_prompt_is_asked_as_it_stands_in_its_line(record, exchanges):
    """With the reply of the file beside it; other tasks without the system message."""
    rows = (record / "inputs" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    for one in exchanges:
        number = int(one["where"].rpartition(":")[2])
        if one["source"] == "held_out":
            messages = json.loads(rows[number - 1])["messages"]
            assert (one["messages"], one["reference"]) == (messages[:-1], messages[-1]["content"])
        else:
            heads = [message["content"] for message in one["messages"][:-1]]
            assert heads == (["You are a pirate."] if number == 2 else [])


def test_replies_do_not_depend_on_the_batch(opened, prompts, monkeypatch):
    whole = [said_alone(opened.model, one, 12) for one in prompts]
    assert len({tuple(one) for one in whole}) == 4
    assert replies.generate(opened, prompts, 12) == whole
    assert replies.generate(opened, prompts[::-1], 12) == whole[::-1]
    monkeypatch.setattr(replies, "ROWS_AT_ONCE", 1)
    assert replies.generate(opened, prompts, 12) == whole


def test_long_replies_go_on_and_others_do_not(opened, prompts, monkeypatch):
    whole = [said_alone(opened.model, one, 12) for one in prompts]
    stops = [*opened.base.stop_ids, whole[0][2]]
    ended = [replies.up_to_its_end(reply, stops) for reply in whole]
    base = dataclasses.replace(opened.base, stop_ids=stops)
    batches, real = [], replies.new_tokens

    def run(adapter, some, *how):
        batches.append(len(some))
        return real(adapter, some, *how)

    monkeypatch.setattr(replies, "new_tokens", run)
    monkeypatch.setattr(replies, "FIRST_TOKENS", 5)
    assert replies.generate(dataclasses.replace(opened, base=base), prompts, 12) == ended
    assert batches == [4, sum(len(reply) > 5 for reply in ended)] and batches[1] in {1, 2, 3}


def test_half_as_many_go_together_where_memory_runs_out(opened, prompts, monkeypatch):
    expected, batches, real = replies.generate(opened, prompts, 6), [], replies.new_tokens

    def run(adapter, some, *how):
        batches.append(len(some))
        if len(some) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(adapter, some, *how)

    monkeypatch.setattr(replies, "new_tokens", run)
    assert replies.generate(opened, prompts, 6) == expected
    assert batches == [4, 2, 1, 1, 1, 1]


def test_a_reply_ends_where_the_adapters_own_tokenizer_ends(capfd, plain, tmp_path, tokenizer):
    """As where a model that could not chat was taught another end of a turn."""
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "rain"}])
    words = ["--prompts", prompts, "--general_file", "", "--max_new_tokens", "5"]
    before, _ = evidence(capfd, plain, tmp_path / "before", *words)
    (probe,) = before["probes"]
    tokenizer.__class__.from_pretrained(TOY).save_pretrained(plain)
    token = tokenizer.convert_ids_to_tokens(probe["reply_ids"][2])
    toys.edit_json(plain / "tokenizer_config.json", lambda config: config.update(eos_token=token))
    found, _ = evidence(capfd, plain, tmp_path / "results", *words)
    length = probe["reply_ids"].index(probe["reply_ids"][2]) + 1
    assert found["probes"][0]["reply_ids"] == probe["reply_ids"][:length]
    assert found["exchanges"][0]["adapter"]["ended"]


def test_a_reply_is_judged_by_the_rules_of_its_line(exchanges):
    """The shared rules of its kind, and its own checks, of which null switches one off."""
    for one in exchanges:
        names = {"is brief", "no list"}
        if one["where"].endswith("held_out.jsonl:1"):
            names = {"is brief"}
            assert one["checks"]["is brief"] == {"most_words": 1}
        elif one["source"] == "tasks":
            names = {"right"} if one["where"].endswith(":1") else set()
        elif one["kind"] == "emergency":
            names |= {"says where"}
            assert one["checks"]["says where"] == {"any": NOUNS}
        assert one["checks"].keys() == names
        for whose in ("base", "adapter"):
            text, passes = one[whose]["text"], one[whose]["passes"]
            assert passes == {name: rules.passes(one["checks"][name], text) for name in names}
    verdicts = {one["adapter"]["passes"].get("is brief") for one in exchanges}
    assert verdicts >= {True, False}


CUT = [  # the end of the prompt, the reply, and what is judged of it
    ("", "<think>\nOne two three.\n</think>\n\nTea, then?", "Tea, then?"),
    ("", "<think>\nOne two three", ""), ("<think>\n", "One two three", ""),
    ("<think>\n", "One\n</think>\n\nTea, then?", "Tea, then?"), ("", "Tea, then?", "Tea, then?"),
    ("", "<think>\n\n</think>\n\nTea", "Tea"), ("<think>\n\n</think>\n\n", "Tea", "Tea"),
]  # fmt: skip


@pytest.mark.parametrize(("end", "said", "answer"), CUT)
def test_thoughts_that_were_cut_short_are_no_answer(opened, end, said, answer):
    """Also where the chat template has opened them in the prompt."""
    words = max(1, len(answer.split()))
    checks = {"says": {"any": [answer or "One"]}, "short": {"most_words": words}}
    encode = opened.base.tokenizer
    asked = Asked(Prompt("prompts", "p:1", "", [], checks=checks), encode("Hm?\n" + end).input_ids)
    judged = measures.judged(opened, asked, encode(said).input_ids)
    assert judged.passes == {"says": bool(answer), "short": True} and judged.text == said.strip()


@pytest.mark.parametrize("name", ["eval_file", "prompts"])
def test_two_rules_for_one_prompt_are_refused(capfd, adapters, tmp_path, name):
    """It is asked once, so one of the rules would be left out in silence."""
    asked = {"messages": talk(1)} if name == "eval_file" else {"prompt": talk(1)[:-1]}
    checks = [{"short": {"most_words": 3}}, {"short": {"most_words": 3}, "tea": {"any": ["tea"]}}]
    rows = [asked | {"checks": each} for each in (*checks, {"short": {"most_words": 4}})]
    words = ["evidence", adapters["plain"], "--device", "cpu", f"--{name}"]
    words += [write_lines(tmp_path / "own.jsonl", rows), "--general_file", ""]
    end = refused(capfd, words, "own.jsonl:3", "own.jsonl:1", "short", main=main)
    assert "own.jsonl:2" not in end.err


def test_lines_with_one_prompt_are_asked_once_with_all_their_checks(adapters, tmp_path):
    other = [*talk(1)[:-1], {"role": "assistant", "content": "Nowhere."}]
    rows = [
        {"messages": talk(1), "checks": {"short": {"most_words": 3}}},
        {"messages": other, "checks": {"tea": {"any": ["tea"]}}},
    ]
    plan = planned(adapters["plain"], "--eval_file", write_lines(tmp_path / "own.jsonl", rows))
    (asked,) = plan.asked
    assert asked.prompt.checks == rows[0]["checks"] | rows[1]["checks"]
    assert asked.prompt.reference == talk(1)[-1]["content"] and len(plan.held_out) == 2


def asked_of(adapter, *words):
    """Return the numbers of the lines that both models are to reply to."""
    asked = planned(adapter, "--general_file", "", *words).asked
    return [int(each.prompt.where.rpartition(":")[2]) for each in asked]


def test_on_a_cpu_some_are_drawn_and_all_that_ask_for_a_phrase(adapters, tmp_path):
    """The same ones each time; the fewest lines of emergencies must not be missed by chance."""
    kinds = ["emergency" if n % 4 == 0 else "plain" for n in range(130)]
    rows = [{"messages": talk(n), "kind": kind} for n, kind in enumerate(kinds)]
    rings = [{"name": "rings", "kinds": ["emergency"], "any": ["999"]}]
    words = [adapters["plain"], "--eval_file", write_lines(tmp_path / "own.jsonl", rows)]
    words += ["--rules", write_lines(tmp_path / "rules.json", [rings])]
    emergencies = {number + 1 for number, kind in enumerate(kinds) if kind == "emergency"}
    asked = asked_of(*words)
    assert asked == asked_of(*words) == sorted(asked)
    assert len(set(asked)) == 100 and emergencies < set(asked)
    few, more = (set(asked_of(*words, "--replies", count)) for count in (20, 40))
    assert len(few) == 20 and few < emergencies and len(more) == 40 and emergencies < more


def test_of_prompts_alone_all_are_asked(adapters, tmp_path):
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"number {n}"} for n in range(130)])
    assert asked_of(adapters["plain"], "--prompts", path) == list(range(1, 131))


def test_on_a_gpu_two_hundred_held_out_prompts_are_asked():
    prompts = [Prompt("held_out", f"a:{n}", "ab"[n % 3 == 0], talk(n)) for n in range(300)]
    for device, count in (("cpu", 100), ("cuda", 200)):
        chosen = [prompts[n] for n in sampling.choose(prompts, None, device)]
        assert len(chosen) == count
        share = sum(prompt.kind == "b" for prompt in chosen) / count
        assert share == pytest.approx(1 / 3, abs=0.01)
