"""Reports of `evidence`: one with everything in it, and short ones of a test's own."""

import copy
import json

import peft
import torch
import toys
from by_hand import render
from runs import NOUNS, SYSTEM, command, read_json, run, talk, write_lines

import train_lora_single as script
from inspect_lora.__main__ import main

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


# ---- one report with everything -----------------------------------------------------------------


def make_record(folder):
    """Measure with everything on, into folder; what was measured lies in folder/inputs.

    There are seven kinds of three lines, one of which has two replies; a copy of a line; one line
    that the adapter learned, and one that is too long; rules, tasks and a system message.
    """
    inputs = folder / "inputs"
    train_adapter(inputs / "adapter")
    words = ["--eval_file", write_lines(inputs / "held_out.jsonl", held_out_rows())]
    words += ["--general_file", write_lines(inputs / "tasks.jsonl", TASKS)]
    words += ["--rules", write_rules(inputs / "rules.json", RULES)]
    words += ["--max_seq_len", LIMIT, "--max_new_tokens", NEW_TOKENS, "--output_dir", folder]
    assert run(["evidence", inputs / "adapter", "--device", "cpu", *words], main) == 0


def held_out_rows():
    """Return the lines of the held-out file."""
    rows = [{"kind": kind, "messages": talk(500 + n)} for n, kind in enumerate(KINDS * 3)]
    rows[4]["messages"] = [*rows[4]["messages"], *talk(550)[1:]]
    copied = json.loads(json.dumps(talk(COPIED)).replace(" the ", "  the "))
    rows.append({"kind": "plain", "messages": copied})
    rows.append({"kind": "plain", "messages": talk(LEARNED)})
    rows.append({"kind": "long", "messages": talk(TOO_LONG, 12)})
    rows[0]["checks"] = {"is brief": {"most_words": 1}, "no list": None}
    return rows


def train_adapter(folder, steps=8):
    """Train an adapter of the toy with PEFT and torch alone, on other talks of the same form.

    Its folder says that it learned one of the held-out lines, if with another reply.
    """
    torch.manual_seed(0)
    model = copy.deepcopy(toys.base_model())
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **toys.PLAIN))
    lora = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(lora, lr=1e-2)
    for step in range(steps):
        for number in range(4):
            *asked, reply = talk(4 * step + number)
            prompt = render(toys.tokenizer(), asked, add_generation_prompt=True)
            said = toys.tokenizer()(f"{reply['content']}<|im_end|>").input_ids
            ids = torch.tensor([prompt + said])
            labels = torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder, save_embedding_layers=False)
    say_origin(folder, [talk(LEARNED)[:-1]], system_message=SYSTEM)


# ---- what a test measures itself ----------------------------------------------------------------


def write_rules(path, rules):
    """Write rules; return the path as text."""
    path.write_text(json.dumps(rules), encoding="utf-8")
    return str(path)


def say_origin(folder, learned=None, **record):
    """Write learned.txt and run.json into an adapter's folder, as the script does."""
    if learned is not None:
        hashes = sorted(script.key_of(prompt) for prompt in learned)
        (folder / "learned.txt").write_text("".join(f"{one}\n" for one in hashes), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")


def evidence(capfd, adapter, results, *words):
    """Measure an adapter; return the record as JSON has it, and what was printed."""
    argv = ["evidence", adapter, "--device", "cpu", "--output_dir", results, *words]
    end = command(capfd, argv, main)
    assert end.status == 0, end.err
    return read_json(results / "evidence.json"), end.out


def mean_losses(found):
    """Return the losses of base and adapter of each line, in nats a token."""
    return [[one[whose] / one["tokens"] for one in found["lines"]] for whose in ("base", "adapter")]


def write_talks_with(path, *numbers, **more):
    """Write talks with these numbers as lines of "messages"; return the path as text."""
    return write_lines(path, [{"messages": talk(number), **more} for number in numbers])


def line_numbers(entries):
    """Return the numbers of the lines that losses, exchanges and others were measured on."""
    return [int(one["where"].rpartition(":")[2]) for one in entries]
