"""Reports of `evidence`: one with everything in it, and short ones of a test's own."""

import argparse
import copy
import json

import peft
import torch
import toys
from by_hand import render
from runs import NOUNS, SYSTEM, command, read_json, run, talk, write_lines

from inspect_lora import model
from inspect_lora.__main__ import evidence_flags, main, model_flags
from inspect_lora.adapter import read_adapter
from inspect_lora.evidence import plan_of
from train_lora.conversations import prompt_hash

KINDS = ["plain", "emergency", "pressure", "everyday", "long", "new_topic", "false_alarm"]
LEARNED, TOO_LONG, COPIED = 600, 601, 500  # numbers of talks
LIMIT = 120  # tokens of the longest line that is measured
NEW_TOKENS = 8
TASKS = [
    {"topic": "sums", "prompt": "What is 2 + 3?", "checks": {"right": {"any": ["5"]}}},
    {"topic": "persona", "prompt": [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "Who is it?"},
    ]},
    {"topic": "facts", "prompt": "Where does the rain come from?"},
]  # fmt: skip
RULES = [
    {"name": "is brief", "most_words": 7},
    {"name": "says where", "kinds": ["emergency"], "any": NOUNS},
    {"name": "no list", "none": ["\n- ", "**"]},
]
SHORT = ["--general_file", "", "--replies", "0", "--parts", "0"]  # nothing but the losses


def make_record(folder):
    """Measure with everything on, into folder; what was measured lies in folder/inputs."""
    inputs = folder / "inputs"
    train_adapter(inputs / "adapter")
    # Seven kinds of three lines; a copy, one that was learned, and one that is too long.
    rows = [{"kind": kind, "messages": talk(500 + n)} for n, kind in enumerate(KINDS * 3)]
    rows[0]["checks"] = {"is brief": {"most_words": 1}, "no list": None}
    rows[4]["messages"] = [*rows[4]["messages"], *talk(550)[1:]]  # two replies
    copied = json.loads(json.dumps(talk(COPIED)).replace(" the ", "  the "))
    others = [("plain", copied), ("plain", talk(LEARNED)), ("long", talk(TOO_LONG, 12))]
    rows += [{"kind": kind, "messages": messages} for kind, messages in others]
    words = ["--eval_file", write_lines(inputs / "held_out.jsonl", rows)]
    words += ["--general_file", write_lines(inputs / "tasks.jsonl", TASKS)]
    words += ["--rules", write_lines(inputs / "rules.json", [RULES]), "--parts", 6]
    words += ["--max_seq_len", LIMIT, "--max_new_tokens", NEW_TOKENS, "--output_dir", folder]
    assert run(["evidence", inputs / "adapter", "--device", "cpu", *words], main) == 0


def train_adapter(folder, steps=8):
    """Train an adapter with PEFT and torch alone; it says that it learned a held-out line."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **toys.PLAIN)
    network = peft.get_peft_model(copy.deepcopy(toys.base_model()), config)
    lora = [one for one in network.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(lora, lr=1e-2)
    for step in range(steps):
        for number in range(4):
            *asked, reply = talk(4 * step + number)
            prompt = render(toys.tokenizer(), asked, add_generation_prompt=True)
            said = toys.tokenizer()(f"{reply['content']}<|im_end|>").input_ids
            ids = torch.tensor([prompt + said])
            labels = torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
            network(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(folder, save_embedding_layers=False)
    say_origin(folder, [talk(LEARNED)[:-1]], system_message=SYSTEM)


def open_one(folder):
    """Return an adapter of the toy, made in this folder, on its base."""
    toys.save_adapter(folder, std=0.2)
    parser = argparse.ArgumentParser()
    model_flags(parser)
    arguments = parser.parse_args(["--device", "cpu"])
    saved = read_adapter(folder)
    return model.open_adapter(saved, model.describe_base(arguments, saved))


def say_origin(folder, learned=None, **record):
    """Write learned.txt and run.json into an adapter's folder, as the script does."""
    if learned is not None:
        hashes = sorted(prompt_hash(prompt) for prompt in learned)
        (folder / "learned.txt").write_text("".join(f"{one}\n" for one in hashes), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")


def done(capfd, *words):
    """Give a command of the package, which succeeds; return what it printed."""
    end = command(capfd, words, main)
    assert end.status == 0, end.err
    return end.out


def evidence(capfd, adapter, results, *words):
    """Measure an adapter; return the record as JSON has it, and what was printed."""
    out = done(capfd, "evidence", adapter, "--device", "cpu", "--output_dir", results, *words)
    return read_json(results / "evidence.json"), out


def planned(adapter, *words):
    """Return what `evidence` would measure, as it is before any weights are loaded."""
    parser = argparse.ArgumentParser()
    evidence_flags(parser)
    words = [str(word) for word in (adapter, "--device", "cpu", *words)]
    return plan_of(words[0], parser.parse_args(words))


def mean_losses(found):
    """Return the losses of base and adapter of each line, in nats per token."""
    return [[one[whose] / one["tokens"] for one in found["lines"]] for whose in ("base", "adapter")]


def write_talks_with(path, *numbers, **more):
    """Write talks with these numbers as lines of "messages"; return the path as text."""
    return write_lines(path, [{"messages": talk(number), **more} for number in numbers])


def line_numbers(entries):
    """Return the numbers of the lines that losses, exchanges and others were measured on."""
    return [int(one["where"].rpartition(":")[2]) for one in entries]
