"""What an adapter is measured on: held-out conversations, prompts without replies, other tasks.

The adapter's folder says what it may not be measured on: learned.txt has a hash of each prompt that
it learned to reply to, and run.json the SHA-256 of the file that its training held out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import train_lora_single as script
from inspect_lora.common import InspectError, file_sha256, hash_of
from inspect_lora.rules import Rule, rules_for

GENERAL_FILE = Path(__file__).with_name("general.jsonl")
MOST_ON_A_CPU = 100  # held-out prompts that both models reply to


@dataclass
class Prompt:
    """What both models reply to."""

    source: str  # "held_out", "prompts" or "tasks"
    where: str  # file:line
    kind: str
    messages: list[dict[str, str]]
    reference: str | None = None  # the reply of the file
    checks: dict[str, Rule] = field(default_factory=dict)


@dataclass
class Kinds:
    """How lines are grouped, and the rules of --rules, which are for lines by their "kind"."""

    key: str  # of a line, by which the tables group
    rules: list[Rule]

    def of(self, row: dict[str, Any]) -> str:
        """Return what groups a line, or ""."""
        return str(row.get(self.key) or "")

    def checks(self, row: dict[str, Any]) -> dict[str, Rule]:
        """Return the rules for a reply to a line; raise InspectError if one is wrong."""
        return rules_for(row, str(row.get("kind") or ""), self.rules)

    def unused(self, rows: Iterable[dict[str, Any]]) -> list[str]:
        """Return what is wrong with rules for kinds that no line has: nobody would miss them."""
        kinds = {row.get("kind") for row in rows}
        named = {one["name"]: one["kinds"] for one in self.rules if "kinds" in one}
        unknown = {name: ours for name, ours in named.items() if kinds.isdisjoint(ours)}
        return [f'the rule "{name}": no line has the kind {ours}' for name, ours in unknown.items()]


# ---- What the adapter's folder says


def read_learned(place: Path) -> set[str] | None:
    """Return the hashes of the prompts that an adapter learned, or None if that is not known."""
    path = place / "learned.txt"
    return set(path.read_text(encoding="utf-8").split()) or None if path.is_file() else None


def file_held_out(place: Path, run: dict[str, Any]) -> str:
    """Return the file that a training held out, known by its SHA-256, or ask for one.

    With an EVAL_FILE like "10%" it lies in a folder above the adapter. Any other file is where
    run.json says, as seen from the working folder or from a folder above the adapter.
    """
    held_out = run.get("data", {}).get("held_out") or {}
    named = str(held_out.get("file") or "")
    for name in ("held_out.jsonl", named):
        for path in seen_from(place, name):
            if path.is_file() and file_sha256(path) == held_out.get("sha256"):
                return str(path)
    changed = f"{named} is not there, or has changed since the training held it out. "
    raise InspectError(
        f"{changed if named else ''}Give conversations that the adapter was not trained on with "
        "--eval_file, or prompts without replies with --prompts."
    )


def seen_from(place: Path, name: str) -> list[Path]:
    """Return where a relative path may lead: the working folder comes first."""
    return [Path(name), *(folder / name for folder in place.resolve().parents)]


# ---- Held-out conversations


def read_held_out(path: str, replies: str, thinks: bool, kinds: Kinds) -> list[script.Example]:
    """Return the replies of a file, all or the last of each conversation, without tokens."""
    problems: list[str] = []
    examples = script.read_conversations(path, replies, problems, thinks)
    rows = {one.source: one.row for one in examples}
    for source, row in rows.items():
        try:
            kinds.checks(row)
        except InspectError as error:
            problems.append(f"{source}: {error}")
    refuse(problems or kinds.unused(rows.values()))
    return examples


def refuse(problems: list[str]) -> None:
    """Raise InspectError with what is wrong with any line, if anything is."""
    if problems:
        raise InspectError(f"{script.problems_as_text(problems)}\nNothing was measured.")


def prompts_of(
    examples: list[script.Example], lengths: dict[str, int], kinds: Kinds
) -> list[Prompt]:
    """Return the prompts of the replies that end their conversation, each prompt once.

    A line's checks are about the end of its conversation. Lines with one prompt join their checks.
    """
    found: dict[str, Prompt] = {}
    for one in examples:
        if len(one.messages) == lengths[one.source]:
            *messages, reply = one.messages
            prompt = Prompt("held_out", one.source, kinds.of(one.row), messages, reply["content"])
            prompt.checks = kinds.checks(one.row)
            add_once(found, prompt)
    return list(found.values())


def add_once(found: dict[str, Prompt], prompt: Prompt) -> None:
    """Add a prompt, or give its checks to the one with the same messages."""
    first = found.setdefault(repr(prompt.messages), prompt)
    first.checks = prompt.checks | first.checks


def clusters_of(examples: list[script.Example]) -> list[str]:
    """Return the line that each reply counts with, so that a copy does not narrow an interval."""
    first: dict[str, str] = {}
    return [first.setdefault(script.key_of(one.messages), one.source) for one in examples]


# ---- Prompts without replies


def read_prompts(path: str, source: str, kinds: Kinds) -> list[Prompt]:
    """Return the prompts of a file, each once."""
    found: dict[str, Prompt] = {}
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InspectError(f"{path} cannot be read ({error.strerror}).") from error
    for where, text in script.entries_of(content, path).items():
        try:
            row = script.parse_line(text)
            rows.append(row)
            prompt = Prompt(source, where, kinds.of(row), messages_of(row))
            prompt.checks = kinds.checks(row)
            add_once(found, prompt)
        except (InspectError, ValueError) as error:
            problems.append(f"{where}: {error}")
    refuse(problems or kinds.unused(rows) or ([] if found else [f"{path}: no prompts"]))
    return list(found.values())


def messages_of(row: dict[str, Any]) -> list[dict[str, str]]:
    """Return a prompt's messages, or raise ValueError if they do not ask for a reply."""
    messages = row.get("prompt")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list):
        raise ValueError('a line is {"prompt": [messages, the last one of the user] or "text"}')
    script.check_messages([*messages, {"role": "assistant", "content": "a reply"}])
    return messages


def with_system(messages: list[dict[str, str]], system: str) -> list[dict[str, str]]:
    """Return the messages with a system message first, unless they have one of their own."""
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


# ---- What is drawn


def draw(items: list[Prompt] | list[script.Example], wanted: int) -> list[int]:
    """Return the places of at most wanted items, by their messages, in their order.

    A hash of each decides, so where one is left out as learned the others are still drawn: each
    adapter gets the same lines of a file.
    """
    hashes = {place: hash_of(one.messages) for place, one in enumerate(items)}
    return sorted(sorted(hashes, key=lambda place: hashes[place])[:wanted])


def choose(prompts: list[Prompt], wanted: int | None) -> list[Prompt]:
    """Return the held-out prompts that both models reply to on a CPU.

    Lines with a rule that asks for something, such as the number to ring, come first: all of them,
    or as many as are wanted. The others are drawn, up to what is wanted in all.
    """
    asking, others = [], []
    for one in prompts:
        asks = any("any" in rule for rule in one.checks.values())
        (asking if asks else others).append(one)
    if wanted is None:
        wanted = max(MOST_ON_A_CPU, len(asking))
    chosen = [asking[place] for place in draw(asking, wanted)]
    chosen += [others[place] for place in draw(others, wanted - len(chosen))]
    return sorted(chosen, key=prompts.index)
