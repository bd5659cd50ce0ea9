"""What an adapter is measured on: held-out conversations, prompts without replies, other tasks.

The adapter's folder says what it may not be measured on: learned.txt has a hash of each prompt that
it learned to reply to, and run.json the SHA-256 of the file that its training held out.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import train_lora_single as script
from inspect_lora.common import InspectError, hash_of, say, some
from inspect_lora.record import Prompt
from inspect_lora.rules import Rule, rules_for

MOST_ASKED = {"cpu": 100, "cuda": 200}  # held-out prompts that both models reply to
Turns = list[dict[str, str]]


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
        named = {rule["name"]: rule["kinds"] for rule in self.rules if "kinds" in rule}
        unknown = {name: wanted for name, wanted in named.items() if kinds.isdisjoint(wanted)}
        return [f'the rule "{name}": no line has the kind {of}' for name, of in unknown.items()]


# ---- What the adapter's folder says


def read_learned(place: Path, train_file: str | None, thinks: bool) -> set[str] | None:
    """Return the hashes of the prompts that an adapter learned, or None if that is not known.

    train_file names what another trainer taught it.
    """
    path, learned = place / "learned.txt", set()
    if path.is_file():
        learned |= set(path.read_text(encoding="utf-8").split())
    if train_file:
        problems: list[str] = []
        taught = script.read_conversations(train_file, "all", problems, thinks, takes_pairs=True)
        learned |= {script.prompt_hash(conversation.messages[:-1]) for conversation in taught}
        if problems:
            say("warning", f"{len(problems)} lines of --train_file are not understood, so their "
                f"prompts are not known as learned: {some(problems, 1)}")  # fmt: skip
    return learned or None


def count_trained_kinds(
    place: Path, run: dict[str, Any], train_file: str | None, kinds: Kinds
) -> dict[str, int] | None:
    """Return how many lines of each kind a training had, or None if that is not known."""
    trained = run.get("data", {}).get("train") or {}
    paths = [Path(train_file)] if train_file else seen_from(place, str(trained.get("file") or ""))
    for path in filter(Path.is_file, paths):
        if train_file or script.file_sha256(path) == trained.get("sha256"):
            counts: Counter[str] = Counter()
            for entry in script.entries_of(path.read_bytes(), str(path)).values():
                with contextlib.suppress(ValueError):
                    counts[kinds.of(script.parse_line(entry))] += 1
            return dict(counts) if any(counts) else None  # no line has the key
    return None


def file_held_out(place: Path, run: dict[str, Any]) -> str:
    """Return the file that a training held out, known by its SHA-256, or ask for one.

    With an EVAL_FILE like "10%" it lies in a folder above the adapter. Any other file is where
    run.json says, as seen from the working folder or from a folder above the adapter.
    """
    held_out = run.get("data", {}).get("held_out") or {}
    named = str(held_out.get("file") or "")
    for name in ("held_out.jsonl", named):
        for path in seen_from(place, name):
            if path.is_file() and script.file_sha256(path) == held_out.get("sha256"):
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


def read_held_out(
    path: str, replies: str, thinks: bool, kinds: Kinds, system: str
) -> tuple[list[script.Conversation], list[script.Conversation]]:
    """Return the replies of a file, all or the last of each conversation, and a pair's bad ones."""
    problems: list[str] = []
    conversations = [
        replace(conversation, messages=with_system(conversation.messages, system))
        for conversation in script.read_conversations(
            path, replies, problems, thinks, takes_pairs=True
        )
    ]
    rejected = []
    last = {conversation.source: conversation for conversation in conversations}
    for source, conversation in last.items():
        try:
            kinds.checks(conversation.row)
            if conversation.row.get("rejected") is not None:
                rejected.append(with_rejected(conversation, thinks))
        except (InspectError, ValueError) as error:
            problems.append(f"{source}: {error}")
    rows = [conversation.row for conversation in last.values()]
    refuse(problems or kinds.unused(rows))
    return conversations, rejected


def with_rejected(conversation: script.Conversation, thinks: bool) -> script.Conversation:
    """Return a conversation with the line's bad reply at its end."""
    bad = conversation.row["rejected"]
    if isinstance(bad, str):
        bad = [{"role": "assistant", "content": bad}]
    if not isinstance(bad, list) or len(bad) != 1:
        raise ValueError('"rejected" must be a text, or a list of one message')
    *asked, good = conversation.messages
    messages = [*asked, *bad]
    try:
        script.check_messages(messages, thinks)
    except ValueError as error:
        raise ValueError(f'"rejected": {error}') from error
    if bad[0]["content"].split() == good["content"].split():
        raise ValueError('"rejected" is the good reply')
    return replace(conversation, messages=messages)


def refuse(problems: list[str]) -> None:
    """Raise InspectError with what is wrong with any line, if anything is."""
    if problems:
        raise InspectError(f"{script.problems_as_text(problems)}\nNothing was measured.")


def prompts_of(
    examples: list[script.Example],
    lengths: dict[str, int],
    rejected: dict[str, script.Example],
    kinds: Kinds,
) -> list[Prompt]:
    """Return the prompts of the replies that end their conversation, each prompt once.

    A line's checks are about the end of its conversation. Lines with one prompt join their checks.
    """
    prompts: dict[str, Prompt] = {}
    for example in examples:
        if len(example.messages) == lengths[example.source]:
            *messages, reply = example.messages
            kind = kinds.of(example.row)
            prompt = Prompt("held_out", example.source, kind, messages, reply["content"])
            prompt.checks = kinds.checks(example.row)
            if example.source in rejected:
                prompt.rejected = rejected[example.source].messages[-1]["content"]
            add_once(prompts, prompt)
    return list(prompts.values())


def add_once(prompts: dict[str, Prompt], prompt: Prompt) -> None:
    """Add a prompt, or give its checks to the one with the same messages."""
    first = prompts.setdefault(repr(prompt.messages), prompt)
    first.checks = prompt.checks | first.checks


def clusters_of(
    conversations: Sequence[script.Conversation], key: str | None = None
) -> dict[str, str]:
    """Return for each line, by file:line, the line that it counts with.

    Copies of a line, lines whose prompt begins with the prompt of another one, and those that have
    the same value of a key are one: their losses are not independent, so a dialogue that is stored
    as one line a reply must not narrow an interval.
    """
    clusters = {conversation.source: conversation.source for conversation in conversations}

    def join(source: str, earlier: str) -> None:
        left = clusters[source]
        if left != clusters[earlier]:
            joined = [line for line, cluster in clusters.items() if cluster == left]
            clusters.update(dict.fromkeys(joined, clusters[earlier]))

    asked_by: dict[str, str] = {}
    for conversation in conversations:
        prompt = script.prompt_hash(conversation.messages[:-1])
        join(conversation.source, asked_by.setdefault(prompt, conversation.source))
        value = conversation.row.get(key) if key else None
        if value is not None:
            same = asked_by.setdefault(f"{key}: {value}", conversation.source)
            join(conversation.source, same)
    for conversation in conversations:
        for place, message in enumerate(conversation.messages[:-1]):
            if message["role"] == "user":
                prompt = script.prompt_hash(conversation.messages[: place + 1])
                join(conversation.source, asked_by.get(prompt, conversation.source))
    return clusters


# ---- Prompts without replies


def read_prompts(path: str, source: str, kinds: Kinds) -> list[Prompt]:
    """Return the prompts of a file, each once."""
    prompts: dict[str, Prompt] = {}
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
            add_once(prompts, prompt)
        except (InspectError, ValueError) as error:
            problems.append(f"{where}: {error}")
    refuse(problems or kinds.unused(rows) or ([] if prompts else [f"{path}: no prompts"]))
    return list(prompts.values())


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


@dataclass
class Drawable:
    """What may be drawn: its messages decide by a hash, its kind has a share of the draw."""

    messages: Turns
    kind: str
    cluster: str


def draw(items: Sequence[Drawable], wanted: int, of_file: Counter[str]) -> list[int]:
    """Return the places of at most wanted items, in their order.

    Each kind has the share that it has in the file (of_file counts it), so the draw says what the
    whole would. Within a kind a hash of each item decides: where one is left out as learned, the
    others are still drawn, and each adapter gets the same lines of a file. No second item of a
    cluster comes before the first ones of all others.
    """
    hashes = [hash_of(item.messages) for item in items]
    drawn: list[int] = []
    for kind, count in shares_of(wanted, of_file).items():
        places = [place for place, item in enumerate(items) if item.kind == kind]
        seen: Counter[str] = Counter()
        ranks = {}
        for place in sorted(places, key=lambda place: hashes[place]):
            ranks[place] = (seen[items[place].cluster], hashes[place])
            seen[items[place].cluster] += 1
        drawn += sorted(ranks, key=lambda place: ranks[place])[:count]
    return sorted(drawn)


def shares_of(wanted: int, sizes: Counter[str]) -> dict[str, int]:
    """Return how many of each kind are drawn: in proportion, by the largest remainders."""
    total = sizes.total()
    if wanted >= total:
        return dict(sizes)
    exact = {kind: wanted * size / total for kind, size in sizes.items()}
    shares = {kind: math.floor(number) for kind, number in exact.items()}
    order = sorted(exact, key=lambda kind: (shares[kind] - exact[kind], kind))
    for kind in order[: wanted - sum(shares.values())]:
        shares[kind] += 1
    return shares


def draw_prompts(prompts: list[Prompt], wanted: int) -> list[int]:
    """Return the places of at most wanted prompts, in their order."""
    items = [Drawable(prompt.messages, prompt.kind, prompt.where) for prompt in prompts]
    return draw(items, wanted, Counter(prompt.kind for prompt in prompts))


def choose(prompts: list[Prompt], wanted: int | None, device: str) -> list[Prompt]:
    """Return the held-out prompts that both models reply to.

    Lines with a rule that asks for something, such as the number to ring, come first: all of them,
    or as many as are wanted. The others are drawn, up to what is wanted in all.
    """
    asking, rest = [], []
    for prompt in prompts:
        asks = any("any" in rule for rule in prompt.checks.values())
        (asking if asks else rest).append(prompt)
    if wanted is None:
        wanted = max(MOST_ASKED[device], len(asking))
    chosen = [asking[place] for place in draw_prompts(asking, wanted)]
    chosen += [rest[place] for place in draw_prompts(rest, wanted - len(chosen))]
    return sorted(chosen, key=prompts.index)
