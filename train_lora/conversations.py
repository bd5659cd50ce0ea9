"""Reading conversations, checking every line, and holding a part out.

A file holds one conversation per line (JSONL), or all in one JSON array:
    {"prompt": [messages], "completion": [one message]}     teaches the completion (or 2 strings)
    {"messages": [messages]}                                teaches each reply; see REPLIES
    {"conversations": [{"from": "human", "value": ...}]}    ShareGPT: as "messages"
    {"instruction": ..., "input": ..., "output": ...}       Alpaca: teaches the output
A message has a "role" and a "content", and no other keys. One system message may come first or be
the line's key "system"; then user and assistant take turns, and a reply comes last. Other keys of
a line are counted and ignored, but LOST_KEYS are refused. In ShareGPT dumps a greeting before the
first question and a question at the end are left out. All formats become "messages" first; then
there is one set of checks, and every bad line is named.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_lora.console import UserError, join_limited, one_line, report
from train_lora.files import Facts, short_hash

Messages = list[dict[str, str]]  # a conversation; each has a role and a content
FORMATS = (
    'write {"prompt": [...], "completion": [one message]}, {"messages": [...]}, '
    '{"conversations": [...]} or {"instruction": ..., "output": ...}; see docs/data.md'
)
FORMAT_KEYS = ("messages", "conversations", "prompt completion", "instruction output")
# Keys of other tools and of the shipped lines, which are not reported as ignored.
KNOWN_KEYS = {"system", "id", "kind", "topic", "country", "checks", "counterpart", "rejected"}
# These change the prompt, or belong to it.
LOST_KEYS = ("tools", "functions", "history", "system_prompt", "context")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
THOUGHTS = re.compile(r"\s*<think>.*?</think>\s*\S", re.DOTALL)  # and one character after
FEWEST_HELD_OUT = 20  # conversations; the mean over fewer says little
SHIPPED = {  # SHA-256 of the files in data/
    "train": "e1d64a0d673c503a3be15ab5c96ba63c06ba359329ddaf01784a211f2b875349",
    "held_out": "6c3a85a4497c83c65040d1567df2143fab4a1215b2039808c0f7728b3106f1b7",
}


@dataclass(frozen=True)
class Conversation:
    """A dialogue up to and including a trained reply."""

    source: str  # file:line
    messages: Messages  # the last one is the reply
    row: Facts  # the line as it is in the file


def read_conversations(
    path: str, replies: str, problems: list[str], thinking: bool = False, takes_pairs: bool = False
) -> list[Conversation]:
    """Return a conversation for each reply that a file teaches.

    What is wrong with a line is added to problems, as "file:line: ...". Raises UserError for a file
    that cannot be read. With thinking each reply must have its thoughts; with takes_pairs "chosen"
    is read as "completion".
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}; in {Path.cwd()}).") from error
    conversations, unpaired = [], 0
    ignored: Counter[str] = Counter()
    for source, entry in entries_of(content, path).items():
        try:
            line = parse_line(entry)
            if takes_pairs and "chosen" in line and "completion" not in line:
                line["completion"] = line.pop("chosen")
            messages, teaches_one, left_out = messages_of(line)
            check_messages(messages, thinking)
            places = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
            if teaches_one or replies == "last":
                places = places[-1:]
            for place in places if thinking else []:
                if not THOUGHTS.match(messages[place]["content"]):
                    raise ValueError(f"message {place + 1} must begin with <think>...</think>")
        except ValueError as error:
            problems.append(f"{source}: {one_line(error, 400)}")
            continue
        unpaired += left_out
        ignored.update(line.keys() - KNOWN_KEYS)
        row = json.loads(entry.decode("utf-8-sig"))  # with its nulls
        conversations += [Conversation(source, messages[: place + 1], row) for place in places]
    if unpaired:
        report("left out", f"{path}: {unpaired:,} greetings and last questions without a reply")
    counts = Counter(short_hash(each.messages) for each in conversations)
    if copies := sum(counts.values()) - len(counts):
        report("data", f"{path}: {copies:,} replies are copies of an earlier one with its prompt")
    if ignored:
        keys = [f"{key!r} in {count:,}" for key, count in ignored.most_common()]
        report("ignored", f"{path}: these keys: {join_limited(keys, 5, ', ')}")
    return conversations


def entries_of(content: bytes, path: str) -> dict[str, bytes]:
    """Return {place: JSON} for each nonblank line or array entry."""
    lines, place = content.split(b"\n"), ":"
    if re.match(rb"\[|{\s*\n", content.removeprefix(b"\xef\xbb\xbf").lstrip()):
        try:
            rows = json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON: {one_line(error)}; {FORMATS}") from error
        if not isinstance(rows, list):
            keys = ", ".join(rows)
            raise UserError(f"{path} is one JSON object ({keys}); save only its list; {FORMATS}.")
        lines, place = [json.dumps(row).encode() for row in rows], ", entry "
    entries = {f"{path}{place}{number}": line for number, line in enumerate(lines, 1)}
    entries = {where: line for where, line in entries.items() if line.strip()}
    if not entries:
        raise UserError(f"{path} holds no conversations; {FORMATS}.")
    return entries


def unique_keys(pairs: list[tuple[str, Any]]) -> Facts:
    """Return a JSON object; raise ValueError if a key occurs twice."""
    if len(dict(pairs)) < len(pairs):  # json keeps the last
        raise ValueError(f"a key occurs twice: {', '.join(key for key, _ in pairs)}")
    return dict(pairs)


def parse_line(text: bytes) -> Facts:
    """Return a line's JSON object without its nulls; raise ValueError in plain words."""
    try:
        line = text.decode("utf-8-sig").strip()  # concatenated files may hold several BOMs
    except UnicodeDecodeError as error:
        raise ValueError("this is not UTF-8; save the file as UTF-8") from error
    if not line.startswith("{"):  # such as CSV
        raise ValueError(f"a line must be one JSON object; {FORMATS}")

    def without_nulls(pairs: list[tuple[str, Any]]) -> Facts:
        return {key: value for key, value in unique_keys(pairs).items() if value is not None}

    try:
        return json.loads(line, object_pairs_hook=without_nulls)
    except (ValueError, RecursionError) as error:
        hint = "" if line.endswith("}") else "; write each conversation on one line"
        raise ValueError(f"this is not JSON: {one_line(error)}{hint}") from error


def messages_of(row: Facts) -> tuple[list[Any], bool, int]:
    """Return a line's unchecked messages, whether it teaches one reply, and how many it drops."""
    if "chosen" in row:
        raise ValueError('rename "chosen" to "completion"; nothing is trained on "rejected"')
    formats = [keys.split() for keys in FORMAT_KEYS if row.keys() >= {*keys.split()}]
    if len(formats) != 1:
        present = [key for keys in formats for key in keys] or list(row)[:5]
        raise ValueError(f"the line has {', '.join(present) or 'nothing'}; {FORMATS}")
    lost = [key for key in LOST_KEYS if row.get(key)]
    if lost:
        raise ValueError(f"the key {lost[0]!r} is not supported, and would be lost")
    keys = formats[0]
    messages, reply = row[keys[0]], row[keys[-1]]
    for key in keys:  # what is left in the line was not read
        del row[key]
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if len(keys) == 1:
        if not isinstance(messages, list):
            raise ValueError("a conversation must be a list of messages")
        left_out = 0
        if "conversations" in keys:
            messages, left_out = messages_of_sharegpt(messages)
        return system + messages, False, left_out
    if "instruction" in keys:
        parts = [messages, row.pop("input", "")]
        messages = "\n".join(parts).strip() if {*map(type, parts)} == {str} else None
    if isinstance(messages, str) and isinstance(reply, str):
        messages = [{"role": "user", "content": messages}]
        reply = [{"role": "assistant", "content": reply}]
    if not (isinstance(messages, list) and isinstance(reply, list) and len(reply) == 1):
        raise ValueError("give a list of messages and one reply, or two strings")
    return system + messages + reply, True, 0


def messages_of_sharegpt(turns: list[Any]) -> tuple[list[Any], int]:
    """Return turns as messages; also how many greetings and unanswered questions were dropped."""
    messages = []
    for turn in turns:
        if isinstance(turn, dict) and turn.keys() >= {"from", "value"}:
            speaker, value = turn.pop("from"), turn.pop("value")
            role = SHAREGPT_ROLES.get(str(speaker), speaker)
            turn = {**turn, "role": role, "content": value}
        messages.append(turn)
    roles = [message.get("role") if isinstance(message, dict) else "" for message in messages]
    left_out, begin = 0, roles[:1].count("system")
    for end, role in ((begin, "assistant"), (-1, "user")):
        while len(roles) > begin and roles[end] == role:
            del roles[end], messages[end]
            left_out += 1
    return messages, left_out


def check_messages(messages: list[Any], thinking: bool = False) -> None:
    """Raise ValueError unless the messages are a conversation that ends with a reply."""
    for number, message in enumerate(messages, 1):
        keys = {*message} if isinstance(message, dict) else set()
        if "role" in keys and (unread := sorted(keys - {"role", "content"})):  # such as tool_calls
            raise ValueError(f"message {number} has the key {unread[0]!r}, which is not supported")
        if not keys >= {"role", "content"}:
            raise ValueError(f'message {number} lacks "role" or "content": {one_line(message, 60)}')
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {number}: role {role!r} is not system, user or assistant")
        if not isinstance(content, str) or not content.strip():
            given = one_line(repr(content), 60)
            raise ValueError(f"message {number}: content must be text, but is {given}")
        if re.search("[\ud800-\udfff]", content):
            raise ValueError(f"message {number} has half a character, such as a lone \\ud83d")
        if role == "assistant" and re.search("</?think>", content) and not thinking:
            raise ValueError(f"message {number} has a <think> tag, but thinking is off; remove it")
    turns = [message["role"] for message in messages]
    if turns[:1] == ["system"]:
        del turns[0]
    wanted = "the roles must be [system,] user, assistant, ..., with a reply at the end"
    if not turns:
        raise ValueError(f"{wanted}, but there are no messages")
    for role, next_role in zip(["assistant", *turns], turns, strict=False):
        if role == next_role or next_role == "system":
            after = f"after one of {role}" if turns[0] == "user" else "first"
            raise ValueError(f"{wanted}, but a message of {next_role} comes {after}")
    if turns[-1] == "user":
        raise ValueError("the last message is the user's; remove it, or add the reply")


def problems_as_text(problems: list[str]) -> str:
    """Return each problem once, with the first lines that have it and how many more there are."""
    places: dict[str, list[str]] = defaultdict(list)
    for problem in dict.fromkeys(problems):  # each reply of a dialogue may have the same one
        place, _, text = problem.partition(": ")
        places[text].append(place)
    lines = [f"{join_limited(where, 3, ', ')}: {text}" for text, where in places.items()]
    return join_limited(lines, 20, "\n")


def prompt_hash(messages: Messages) -> str:
    """Return a hash of what user and assistant say, ignoring spaces and the system message."""
    turns = [message for message in messages if message["role"] != "system"]
    return short_hash([(turn["role"], turn["content"].split()) for turn in turns])


def hold_out(
    conversations: list[Conversation], percent: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Return what is trained on, and what is held out: this percentage of conversations.

    Those that begin alike stay together; a group of more than a twentieth of the file is never held
    out. A hash of their beginnings decides, regardless of SEED and order.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for conversation in conversations:
        size = 2 if conversation.messages[0]["role"] == "system" else 1
        words = [message["content"].split() for message in conversation.messages[:size]]
        groups[short_hash(["held out", words])].add(conversation.source)
    count = sum(map(len, groups.values()))
    wanted = max(FEWEST_HELD_OUT, math.ceil(count * percent / 100))
    chosen: set[str] = set()
    for beginning in sorted(groups):  # hashes, so the order is random
        if len(chosen) < wanted and len(groups[beginning]) <= count / 20:
            chosen |= groups[beginning]
    held_out = f"{len(chosen):,} of {count:,} conversations"
    if min(len(chosen), count - len(chosen)) < FEWEST_HELD_OUT:
        raise UserError(
            f'EVAL_FILE "{percent}%" holds out {held_out} (those that begin alike stay together); '
            f"{FEWEST_HELD_OUT} are needed on each side."
        )
    report("held out", f"{held_out} (at least {FEWEST_HELD_OUT}), by a hash of how they begin")
    train = [conversation for conversation in conversations if conversation.source not in chosen]
    return train, [conversation for conversation in conversations if conversation.source in chosen]


def system_message_of(examples: Sequence[Conversation]) -> str | None:
    """Return the system message that all examples have; None if they differ or have none."""
    heads = [example.messages[0] for example in examples]
    systems = {head["content"] if head["role"] == "system" else None for head in heads}
    return systems.pop() if len(systems) == 1 else None
