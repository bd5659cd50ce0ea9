"""Replies for a blind reading: the base, the base with three examples, and the adapter.

    python -m benchmarks.blind BASE EVAL_FILE ADAPTER [COUNT]     (in the folder tests)

COUNT held-out prompts (40) are drawn by seed. Each gets three greedy replies of at most 80 tokens:
of the base model, of the base model with three training conversations before the prompt (what one
would do instead of training), and of the adapter. blind.md has them in a random order, and
blind-key.json says which is whose. Once a reader has written {"1": {"best": "B", ...}, ...} into
blind-marks.json, the same command prints the counts instead: a letter, or a list of letters, for
each prompt and question. Run on a CPU in float32.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

from benchmarks.common import TRAIN, t
from inspect_lora import adapters, conversations, files, replies

LETTERS = "ABC"
WHOSE = ("base", "base with three examples", "adapter")
TOKENS = 80


def main(base: str, eval_file: str, adapter: str, count: str = "40") -> None:
    """Write the replies, or count the marks if there are any."""
    marks = Path("blind-marks.json")
    if marks.is_file():
        count_marks(json.loads(marks.read_text(encoding="utf-8")))
        return
    options = options_for(base, eval_file, adapter)
    opened = adapters.open_adapter(options, files.find_adapter(adapter), None)
    examples = conversations.read_held_out(options, None).examples
    numbers = random.Random(42)
    chosen = [examples[n] for n in sorted(numbers.sample(range(len(examples)), int(count)))]
    talks = [example.messages[:-1] for example in chosen]
    shown = three_examples(numbers)
    told = [talk[:1] + shown + talk[1:] for talk in talks]
    said = {}
    for name, prompts in zip(WHOSE, (talks, told, talks), strict=True):
        ids = [opened.chat_format.prompt_ids(prompt) for prompt in prompts]
        config = replies.greedy(opened.chat_format, TOKENS)
        with nullcontext() if name == "adapter" else opened.model.disable_adapter():
            said[name] = replies.generate(opened.model, opened.chat_format, ids, config, name)
    lines, key = ["# Which reply is the better companion's?"], {}
    for place, (example, talk) in enumerate(zip(chosen, talks, strict=True), 1):
        order = random.Random(place).sample(WHOSE, len(WHOSE))
        key[str(place)] = {"where": example.source, "kind": replies.group_of(example, "kind")}
        key[str(place)] |= dict(zip(LETTERS, order, strict=True))
        lines += ["", f"## {place}"]
        lines += [f"**{one['role']}:** {one['content']}" for one in talk if one["role"] != "system"]
        for letter, name in zip(LETTERS, order, strict=True):
            reply = said[name][place - 1]
            text = reply.text if reply.ended else f"{reply.text} [cut here]"
            lines += ["", f"**{letter}:** {text}"]
    Path("blind.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    Path("blind-key.json").write_text(json.dumps(key, indent=1), encoding="utf-8")


def options_for(base: str, eval_file: str, adapter: str) -> argparse.Namespace:
    """Return what the package's commands would be given."""
    parser = argparse.ArgumentParser()
    adapters.add_arguments(parser)
    conversations.add_arguments(parser)
    words = [adapter, "--base", base, "--eval_file", eval_file]
    return parser.parse_args([*words, "--device", "cpu", "--dtype", "float32"])


def three_examples(numbers: random.Random) -> list[dict[str, str]]:
    """Return the messages of three training conversations of one question and one reply."""
    examples, _ = t.read_conversations(str(TRAIN))
    short = [one.messages[-2:] for one in examples if len(one.messages) == 3]
    return [message for talk in numbers.sample(short, 3) for message in talk]


def count_marks(marks: dict[str, dict[str, str | list[str]]]) -> None:
    """Print how often each of the three got each mark."""
    key = json.loads(Path("blind-key.json").read_text(encoding="utf-8"))
    counts: dict[str, Counter] = {}
    for place, answers in marks.items():
        for question, letters in answers.items():
            listed = [letters] if isinstance(letters, str) else letters or ["none"]
            names = [key[place].get(letter, letter) for letter in listed]
            counts.setdefault(question, Counter()).update(names)
    for question, found in counts.items():
        shown = ", ".join(f"{name} {found[name]}" for name in sorted(found))
        print(f"{question:<14}{shown} (of {len(marks)})")


if __name__ == "__main__":
    main(*sys.argv[1:])
