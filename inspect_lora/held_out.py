"""Which replies may judge an adapter: those that its run held out, and none that it learned."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path
from typing import Any, Literal

from inspect_lora.common import (
    InspectError,
    Note,
    file_sha256,
    join_limited,
    pluralize,
    report_note,
)
from inspect_lora.files import Run, where_it_is_now
from inspect_lora.trainer import Example, UserError, held_out_percent, hold_out, read_conversations

Learned = Literal["none", "not compared", "not known"]
LEARNED_IN_WORDS: dict[Learned, str] = {
    "none": "none of these replies stands in the run's training file",
    "not compared": "the run held these replies out; they were not compared with its training "
    "file, which is not there any more or was changed",
    "not known": "not known, since the adapter's training file was not at hand: it may have "
    "learned some of these replies",
}
GIVE_A_FILE = "Give conversations that the adapter was not trained on with --eval_file."


def facts_of_run(run: Run | None) -> dict[str, Any]:
    """Return what a run's record says of its held-out file; nothing if it had none."""
    return (run and run.record.get("data", {}).get("held_out")) or {}


def find_held_out_file(run: Run, facts: dict[str, Any]) -> tuple[str, bool]:
    """Return a run's held-out file, and whether its hash is the one in the run's record.

    A later run into the same folder renames the file of an earlier one (held_out.jsonl.DATE) and
    puts its own there, of which the earlier run may have learned some lines.

    Raises InspectError if there is none.
    """
    name = where_it_is_now(facts["file"], run)
    folders = {Path(name).parent, run.path.parent}
    renamed = sorted(
        path
        for folder in folders
        if folder.is_dir()
        for path in folder.iterdir()
        if path.name.startswith(f"{Path(name).name}.")
    )
    for path in (Path(name), *renamed):
        if path.is_file() and file_sha256(path) == facts["sha256"]:
            return (name if path == Path(name) else str(path)), True
    if Path(name).is_file():
        return name, False
    raise InspectError(
        f"What the run held out is not there: {facts['file']}, and nothing beside {run.path} has "
        f"its SHA-256 ({facts['sha256'][:12]}...). {GIVE_A_FILE}"
    )


def refuse_other_conversations(
    path: str, facts: dict[str, Any], examples: list[Example], max_seq_len: int | None
) -> None:
    """Refuse a file that is not the run's own, unless its conversations are: with checks added.

    Of these the run's record has the number of replies, of tokens and of those that count.

    Args:
        path: the file.
        facts: what the run's record says of its held-out file.
        examples: all replies in the file, with their tokens.
        max_seq_len: the most tokens that a reply of the run could have with its conversation.
    """
    lengths = [(len(one.input_ids), len(one.reply_ids)) for one in examples]
    kept = [pair for pair in lengths if pair[0] <= (max_seq_len or pair[0])]
    found = (len(kept), sum(all_ids for all_ids, _ in kept), sum(reply for _, reply in kept))
    recorded = tuple(facts.get(key) for key in ("examples", "tokens", "learned_tokens"))
    if found != recorded:
        raise InspectError(
            f"{path} is not what the run held out: other conversations stand there now, and the "
            f"adapter may have learned some of them. {GIVE_A_FILE}"
        )


def without_learned(
    examples: list[Example], run: Run, is_its: bool, notes: list[Note]
) -> tuple[list[Example], Learned]:
    """Return the replies that do not stand in the run's training file, and whether that is known.

    Args:
        examples: all replies in a file.
        run: the one that the adapter comes from.
        is_its: whether that run held the file out.
        notes: gets a sentence that names the others.
    """
    path, learned = replies_learned_by(run)
    if not learned and not is_its:
        report_note(
            notes,
            "note",
            f"{path or 'The file'}, on which the adapter was trained, is not there any more or was "
            "changed, so it is not known whether it learned some of these replies.",
        )
    if not learned:
        return examples, "not compared" if is_its else "not known"
    known = [one for one in examples if said_in(one.messages) in learned]
    if not known:
        return examples, "none"
    named = join_limited(list(dict.fromkeys(one.source for one in known)), 10, ", ")
    text = f"{len(known)} of {pluralize(len(examples), 'held-out reply')} stand in {path}"
    if len(known) == len(examples):
        raise InspectError(
            f"{text}, on which the adapter was trained, so none is left. {GIVE_A_FILE}"
        )
    report_note(notes, "left out", f"{text}, on which the adapter was trained: {named}.")
    return [one for one in examples if said_in(one.messages) not in learned], "none"


def replies_learned_by(run: Run) -> tuple[str, set[str]]:
    """Return a run's training file and what was said up to each reply that was trained on.

    There are none if the file is not there any more, or is not what it was.
    """
    facts = run.record.get("data", {}).get("train") or {}
    path = where_it_is_now(facts.get("file", ""), run)
    if not Path(path).is_file() or file_sha256(Path(path)) != facts.get("sha256"):
        return path, set()
    percent = held_out_percent(str(run.settings.get("EVAL_FILE") or ""))
    with contextlib.redirect_stdout(io.StringIO()):  # the run has told what is in its file
        try:
            examples, _ = read_conversations(path, run.settings.get("REPLIES", "all"))
            if percent:
                examples, _ = hold_out(examples, percent, path)
        except UserError:  # by another version's rules
            return path, set()
    return path, {said_in(one.messages) for one in examples}


def said_in(messages: list[dict[str, str]]) -> str:
    """Return what is equal of two conversations if users and replies say the same words.

    A reply was learned also if its line has another system message, or other spaces.
    """
    turns = [one for one in messages if one["role"] != "system"]
    return json.dumps([(one["role"], one["content"].split()) for one in turns])


def without_equals(examples: list[Example], notes: list[Note]) -> list[Example]:
    """Return the replies without those that stand in the file before, which are named."""
    first: dict[str, Example] = {}
    for one in examples:
        first.setdefault(key_of(one.messages), one)
    kept = list(first.values())
    if len(kept) < len(examples):
        equal = [one for one in examples if one is not first[key_of(one.messages)]]
        named = [f"{one.source} is {first[key_of(one.messages)].source} again" for one in equal]
        report_note(
            notes,
            "left out",
            f"{len(equal)} of {pluralize(len(examples), 'held-out reply')}, since equal ones count "
            f"once: {join_limited(named, 3, ', ')}.",
        )
    return kept


def lines_that_count(examples: list[Example]) -> list[str]:
    """Return the line that each reply counts with, so that a copy does not narrow ±.

    That is its own line, unless the same was said in a line before it, but for spaces and the
    system message.
    """
    first: dict[str, str] = {}
    return [first.setdefault(said_in(one.messages), one.source) for one in examples]


def note_copies(examples: list[Example], notes: list[Note]) -> None:
    """Name replies that are copies of others but for spaces or the system message."""
    pairs = zip(examples, lines_that_count(examples), strict=True)
    named = [f"{one.source} is {line}" for one, line in pairs if line != one.source]
    if named:
        report_note(
            notes,
            "note",
            f"{len(named)} of {pluralize(len(examples), 'held-out reply')}: copies of other lines "
            "but for spaces or the system message. ± counts each with the line that it is a copy "
            f"of: {join_limited(named, 3, ', ')}.",
        )


def key_of(messages: list[dict[str, str]]) -> str:
    """Return what is equal of two conversations only if all roles and texts are."""
    return json.dumps([(one["role"], one["content"]) for one in messages])


def conversations_sha256(examples: list[Example]) -> str:
    """Return a hash of conversations, in their order, whatever else their lines hold."""
    keys = "\n".join(key_of(one.messages) for one in examples)
    return hashlib.sha256(keys.encode(errors="surrogatepass")).hexdigest()
