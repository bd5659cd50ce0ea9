"""Which replies may judge an adapter: those that its run held out, and none that it learned."""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from inspect_lora.common import (
    InspectError,
    Note,
    file_sha256,
    join_limited,
    path_from_here,
    pluralize,
    report_note,
)
from inspect_lora.files import Run, where_it_is_now
from inspect_lora.trainer import Example, Job, UserError, held_out_percent, read_both_files

Learned = Literal["none", "not compared", "not known"]
GIVE_A_FILE = "Give conversations that the adapter was not trained on with --eval_file."
LARGEST_SEARCHED = 10**9  # bytes; larger files are not hashed in search of the held-out one


# ---- The run's own file


def facts_of_run(run: Run | None) -> dict[str, Any]:
    """Return what a run's record says of its held-out file; nothing if it had none."""
    return (run and run.record.get("data", {}).get("held_out")) or {}


def find_held_out_file(run: Run, facts: dict[str, Any]) -> tuple[str, bool]:
    """Return a run's held-out file, and whether its hash is the one in the run's record.

    A later run into the same folder renames the file of an earlier one (held_out.jsonl.DATE) and
    puts its own there, of which the earlier run may have learned some lines. A user may give it
    any name, so all such files beside the record are hashed.

    Raises InspectError if there is none.
    """
    name = where_it_is_now(facts["file"], run)
    with contextlib.suppress(OSError):  # reading it tells why it cannot be read
        if Path(name).is_file() and file_sha256(Path(name)) == facts["sha256"]:
            return name, True
    renamed = Path(name).parent.glob(f"{glob.escape(Path(name).name)}.*")
    for path in sorted({*renamed, *run.path.parent.glob("*.jsonl*")}):
        with contextlib.suppress(OSError):  # one that may not be read is passed over
            is_searched = path.is_file() and path.stat().st_size <= LARGEST_SEARCHED
            if is_searched and file_sha256(path) == facts["sha256"]:
                return str(path), True
    if Path(name).is_file():
        return name, False
    raise InspectError(
        f"What the run held out is not there: {facts['file']}, and no *.jsonl file beside "
        f"{run.path} has its SHA-256 ({facts['sha256'][:12]}...). {GIVE_A_FILE}"
    )


def refuse_other_sums(
    path: str, facts: dict[str, Any], examples: list[Example], max_seq_len: int | None
) -> str:
    """Refuse a file that is not the run's own, unless as much stands there: with checks added.

    Of the conversations the run's record has the number of replies, of tokens and of those that
    count, so other ones of the same sums pass. Returned is the sentence that tells this.

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
    return (
        f"{path_from_here(path)} was edited since the run. It has as many replies and tokens as "
        "the run held out; whether they are the same conversations is not known."
    )


def is_what_was_held_out(path: str, examples: list[Example], run: Run) -> bool:
    """Return whether a file holds the conversations that a run held out, whatever else is in it.

    They are held out of TRAIN_FILE again; False if that does not give what the run held out.

    Raises InspectError if it does, and others stand in the file, or some are missing.
    """
    split = split_again(run)
    if not split or not split.is_of_the_run:
        return False
    there = Counter(key_of(one.messages) for one in examples)
    then = Counter(key_of(one.messages) for one in split.held_out)
    others, missing = (there - then).total(), (then - there).total()
    if others or missing:
        text = f"{pluralize(others, 'other reply')} stand" + ("s" if others == 1 else "")
        raise InspectError(
            f"{path} is not what the run held out: {text} there now, and {missing:,} of "
            f"{pluralize(len(split.held_out), 'reply')} {'is' if missing == 1 else 'are'} missing. "
            f"Set it back. {GIVE_A_FILE}"
        )
    return True


# ---- What the run learned


@dataclass
class Split:
    """What a run's training file gives now: what is learned, and what N % hold out of it."""

    learned: list[Example]
    held_out: list[Example]
    is_of_the_run: bool  # the run held out just this
    problems: int  # lines that cannot be read


def split_again(run: Run) -> Split | None:
    """Return what a run's training file gives now, by the script's own rules.

    None if the file is not there, or none of it can be read, or it cannot be divided.
    """
    facts = run.record.get("data", {}).get("train") or {}
    eval_file = str(run.settings.get("EVAL_FILE") or "")
    percent = eval_file if held_out_percent(eval_file) else ""
    path = where_it_is_now(facts.get("file", ""), run)
    for wanted in dict.fromkeys((percent, "")):  # a file that became too short is not divided
        job = job_of(run, path, wanted)
        with contextlib.suppress(UserError):  # an older script may have had other rules
            learned, held_out, problems = read_silently(job)
            sha256 = hashlib.sha256(job.held_out_content).hexdigest()
            is_of_the_run = bool(held_out) and sha256 == facts_of_run(run).get("sha256")
            return Split(learned, held_out, is_of_the_run, len(problems))
    return None


def job_of(run: Run, train_file: str, eval_file: str) -> Job:
    """Return what the script's own reading of files needs to know."""
    replies = run.settings.get("REPLIES", "all")
    return Job(argparse.Namespace(TRAIN_FILE=train_file, EVAL_FILE=eval_file, REPLIES=replies))


def read_silently(job: Job) -> tuple[list[Example], list[Example], list[Any]]:
    """Return what read_both_files() does, and print nothing: the run has told what it read."""
    with contextlib.redirect_stdout(io.StringIO()):
        return read_both_files(job)


@dataclass
class LearnedReplies:
    """What a run learned, as far as it can be known now."""

    path: str  # its training file
    said: set[str] = field(default_factory=set)  # what was said up to each reply, see said_in()
    fault: str = ""  # why it may be more or others
    has_changed: bool = False  # the file, since the run


def replies_learned_by(run: Run) -> LearnedReplies:
    """Return what a run's training file holds now, but for what the run held out of it.

    Of a file that was changed since the run it is the best that is known: a line that was added
    counts as learned.
    """
    facts = run.record.get("data", {}).get("train") or {}
    path = where_it_is_now(facts.get("file", ""), run)
    if not Path(path).is_file():
        return LearnedReplies(path or "the training file", fault="is not there any more")
    split = split_again(run)
    if not split:
        return LearnedReplies(path, fault="cannot be read any more")
    learned = {said_in(one.messages) for one in split.learned}
    percent = held_out_percent(str(run.settings.get("EVAL_FILE") or ""))
    if percent and not split.is_of_the_run:
        # Of a longer file more is held out, of which the run learned some.
        drawn = {said_in(one.messages) for one in split.held_out}
        learned = (learned | drawn) - known_held_out(run, drawn)
    has_changed = file_sha256(Path(path)) != facts.get("sha256")
    fault = "has changed since the run" if has_changed else ""
    if split.problems:
        fault = f"has {pluralize(split.problems, 'line')} that cannot be read"
    return LearnedReplies(path, learned, fault, has_changed)


def known_held_out(run: Run, drawn: set[str]) -> set[str]:
    """Return what was said in those conversations that a run with N % surely did not learn.

    Args:
        run: the run, whose training file was changed since.
        drawn: what was said in those that N % would hold out of that file now.
    """
    facts = facts_of_run(run)
    if not facts:
        return set()
    with contextlib.suppress(InspectError, UserError):
        path, is_its = find_held_out_file(run, facts)
        there, _, _ = read_silently(job_of(run, path, ""))
        said = {said_in(one.messages) for one in there}
        return said if is_its else said & drawn  # an edited one may hold others
    return set()


def nothing_known(unknown_run: str) -> str:
    """Return what is told of an adapter without a run, and why, if it lies like one of a run."""
    reason = unknown_run or "the adapter's training file was not at hand"
    return f"not known, since {reason}: it may have learned some of these replies"


def without_learned(
    examples: list[Example], run: Run, is_proved: bool, notes: list[Note]
) -> tuple[list[Example], Learned, str]:
    """Return the replies that do not stand in the run's training file, and whether that is known.

    Args:
        examples: all replies in a file.
        run: the one that the adapter comes from.
        is_proved: whether these are what that run held out.
        notes: gets a sentence that names the others.
    """
    learned = replies_learned_by(run)
    path, fault = path_from_here(learned.path), learned.fault
    known = [one for one in examples if said_in(one.messages) in learned.said]
    added = ""
    if learned.has_changed:
        added = " It has changed since the run, and lines that were added count as learned."
    if known:
        named = join_limited(list(dict.fromkeys(one.source for one in known)), 10, ", ")
        text = (
            f"{len(known)} of {pluralize(len(examples), 'held-out reply')} stand in {path}, on "
            "which the adapter was trained"
        )
        if len(known) == len(examples):
            raise InspectError(f"{text}, so none is left.{added} {GIVE_A_FILE}")
        report_note(notes, "left out", f"{text}: {named}.{added}")
    kept = [one for one in examples if said_in(one.messages) not in learned.said]
    if not fault:
        return kept, "none", "none of these replies stands in the run's training file"
    if is_proved and run.holds_out_lines:
        return kept, "none", "the run held these replies out of its training file"
    if is_proved:
        compared = " None of them stands in it as it is now." if learned.said else ""
        says = f"the run held these replies out; its training file {fault}.{compared}"
        return kept, "not compared", says.rstrip(".")
    rest = "others" if known else "some of these replies"
    report_note(
        notes,
        "note",
        f"{path}, on which the adapter was trained, {fault}, so it is not known whether it "
        f"learned {rest}.",
    )
    return kept, "not known", f"not known, since {path} {fault}: it may have learned {rest}"


# ---- Equal ones


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
