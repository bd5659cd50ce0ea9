"""Held-out conversations, and other tasks."""

from __future__ import annotations

import argparse
import json
import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from inspect_lora.adapters import Adapter, window_of
from inspect_lora.checks import Check, read_checks
from inspect_lora.common import (
    InspectError,
    Note,
    at_least,
    file_sha256,
    join_limited,
    one_line,
    path_from_here,
    pluralize,
    report_note,
    report_sentence,
)
from inspect_lora.evidence_file import KnownFile
from inspect_lora.files import Run
from inspect_lora.held_out import (
    Learned,
    conversations_sha256,
    facts_of_run,
    find_held_out_file,
    is_what_was_held_out,
    key_of,
    note_copies,
    nothing_known,
    refuse_other_sums,
    without_equals,
    without_learned,
)
from inspect_lora.trainer import (
    TEMPLATE_ERRORS,
    ChatFormat,
    Example,
    Problem,
    check_messages,
    encode,
    entries_of,
    problems_as_text,
    read_conversations,
)

GENERAL_FILE = Path(__file__).resolve().parent / "general.jsonl"


@dataclass
class HeldOut:
    """The conversations that an adapter is measured on, which it was not trained on."""

    path: str
    sha256: str
    conversations_sha256: str  # of the replies that are measured, whatever else their lines hold
    examples: list[Example]  # a reply each
    checked: list[Task]  # the lines that say what a reply must hold
    learned: Learned  # which of the replies stand in the training file, as far as that is known
    learned_says: str  # the same in words
    notes: list[Note]  # what was left out, and what else a reader of the report must know
    # Where the file is not the one that the run held out: what the run's record says of that one,
    # and all replies of this one, to be compared once they have their tokens.
    unproved: tuple[dict[str, Any], list[Example]] | None = None

    @property
    def are_unseen(self) -> bool:
        """Whether the adapter cannot have learned these replies, as far as its run tells."""
        return self.learned != "not known"

    def learned_in_words(self) -> str:
        """Return whether the adapter may have learned some of the replies."""
        return self.learned_says

    def as_known(self) -> KnownFile:
        """Return its file as evidence.json names it."""
        hashes = {"sha256": self.sha256, "conversations_sha256": self.conversations_sha256}
        return KnownFile(file=self.path, **hashes)


@dataclass
class Task:
    """A prompt that both models reply to."""

    where: str  # file:line
    messages: list[dict[str, str]]  # the user's last message comes last
    source: Literal["held_out", "tasks", "prompts"]
    row: dict[str, Any]  # the line as it is in the file
    reference: str | None = None  # the reply that the file has
    checks: dict[str, Check] = field(default_factory=dict)  # what a reply must hold, by name
    rules: dict[str, Any] = field(default_factory=dict)  # the same checks, as the file has them

    @property
    def system_message(self) -> str:
        """The text of the system message, or an empty one."""
        first = self.messages[0]
        return first["content"] if first["role"] == "system" else ""

    def with_system_message(self, text: str) -> Task:
        """Return the prompt with a system message, unless it has one of its own."""
        if not text or self.system_message:
            return self
        return replace(self, messages=[{"role": "system", "content": text}, *self.messages])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name held-out conversations."""
    parser.add_argument(
        "--eval_file",
        help="held-out conversations, which the adapter was not trained on; needed for an adapter "
        "of another trainer, else those of its run",
    )
    parser.add_argument(
        "--max_seq_len",
        type=at_least(1),
        help="leave out what has more tokens; default: no line is too long",
    )


def read_held_out(options: argparse.Namespace, run: Run | None, unknown_run: str = "") -> HeldOut:
    """Return the held-out conversations; a bad line or a bad check is refused by its line.

    Args:
        options: the flags of the command.
        run: the one that the adapter comes from.
        unknown_run: why that is not known though the adapter lies where a run of ours puts one.
    """
    facts, is_its = facts_of_run(run), True
    path = options.eval_file
    if not path and facts:
        path, is_its = find_held_out_file(run, facts)
    if not path:
        reason = f"{unknown_run[:1].upper()}{unknown_run[1:]}. " if unknown_run else ""
        raise InspectError(
            f"{reason}Held-out conversations are needed, which the adapter was not trained on: "
            'give a file with --eval_file. A line is {"prompt": [...], "completion": [...]}, '
            '{"messages": [...]}, or in the form of ShareGPT or Alpaca. Prompts without replies '
            "are given with --prompts."
        )
    replies = run.settings.get("REPLIES", "all") if run else "all"
    in_file, problems = read_conversations(path, replies, accepts_thinking=options.enable_thinking)
    if problems:
        hint = ""
        if are_prompts(path):
            hint = f"\nThese are prompts without replies: give them with --prompts {path}."
        raise InspectError(f"{problems_as_text(problems)}\nNothing was measured.{hint}")
    warn_of_misspelt_checks({example.source: example.row for example in in_file})
    notes: list[Note] = []
    sha256 = file_sha256(Path(path))
    is_its = is_its if not options.eval_file else sha256 == facts.get("sha256")
    is_proved = is_its or (not options.eval_file and is_what_was_held_out(path, in_file, run))
    if run:
        unlearned, learned, says = without_learned(in_file, run, is_proved, notes)
    else:
        unlearned, learned, says = in_file, "not known", nothing_known(unknown_run)
    examples = without_equals(unlearned, notes)
    note_copies(examples, notes)
    if is_proved and not is_its:
        notes.append(("note", f"{path} was changed since the run, but for its conversations"))
    elif options.eval_file and sha256 != facts.get("sha256", sha256):
        notes.append(("note", f"this is not the file that the run held out ({facts['file']})"))
    return HeldOut(
        str(path),
        sha256,
        conversations_sha256(examples),
        examples,
        lines_to_check(in_file, examples),
        learned,
        says,
        notes,
        unproved=None if options.eval_file or is_proved else (facts, in_file),
    )


def lines_to_check(in_file: list[Example], kept: list[Example]) -> list[Task]:
    """Return the lines whose last reply is checked, if that is among those that are kept.

    Raises InspectError, and names the lines, if a check is not as it should be.
    """
    checked: dict[str, Task] = {}
    bad = []
    last = {example.source: example for example in in_file}  # of each conversation
    first = {key_of(one.messages): one for one in kept}
    for example in last.values():
        rules = example.row.get("checks")
        if rules is not None:
            try:
                task = replace(task_of_example(example), checks=read_checks(rules), rules=rules)
                key = key_of(example.messages)
                if key in checked:
                    checked[key] = with_checks_of(checked[key], task)
                elif key in first:
                    # The first of equal ones may be a reply within a longer conversation.
                    is_last = first[key] is last[first[key].source]
                    asked = task_of_example(first[key]) if is_last else task
                    checked[key] = replace(asked, checks=task.checks, rules=task.rules)
            except ValueError as error:
                bad.append(Problem(example.source, str(error)))
    refuse_bad_lines(bad)
    return list(checked.values())


def with_checks_of(task: Task, equal: Task) -> Task:
    """Return a task with the checks of an equal one as well.

    Raises ValueError if one name stands for two checks.
    """
    for name, rule in equal.rules.items():
        if task.rules.get(name, rule) != rule:
            raise ValueError(
                f'this line is {task.where} again, and its check "{name}" is another one than '
                "there: give it another name, or take one of the two out"
            )
    checks, rules = task.checks | equal.checks, task.rules | equal.rules
    return replace(task, checks=checks, rules=rules)


def encode_held_out(
    held_out: HeldOut, adapter: Adapter, options: argparse.Namespace
) -> list[Example]:
    """Return the held-out examples that fit, with their tokens."""
    fitting, problems = encode(held_out.examples, adapter.chat_format, options.max_seq_len)
    if problems:
        raise InspectError(f"{problems_as_text(problems)}\nNothing was measured.")
    if too_long := len(held_out.examples) - len(fitting):  # the script has named them
        text = f"{too_long} of {pluralize(len(held_out.examples), 'held-out reply')}, with over "
        held_out.notes.append(("left out", f"{text}{options.max_seq_len} tokens (--max_seq_len)"))
    if held_out.unproved and adapter.run:
        facts, in_file = held_out.unproved
        encode(in_file, adapter.chat_format, None)
        longest = adapter.run.settings.get("MAX_SEQ_LEN")
        doubt = refuse_other_sums(held_out.path, facts, in_file, longest)
        report_note(held_out.notes, "note", doubt)
    if fitting and not any(is_text_of(one, adapter.chat_format) for one in fitting):
        raise InspectError(
            f"The tokenizer in {adapter.chat_format.tokenizer.name_or_path} turns no reply into "
            "tokens that give its text again: its vocabulary is missing or damaged, such as "
            "tokenizer.json."
        )
    window = window_of(adapter.model)
    long = [one.source for one in fitting if len(one.input_ids) > window]
    if long:
        report_note(
            held_out.notes,
            "warning",
            f"longer than the {window:,} tokens that the model was made for "
            "(max_position_embeddings in its config.json): "
            f"{pluralize(len(long), 'held-out reply')} with its conversation, such as {long[0]}. "
            f"--max_seq_len {window} leaves such out.",
        )
    largest = max(max(example.input_ids) for example in fitting)
    rows = adapter.model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise InspectError(
            f"The tokenizer has tokens up to {largest:,}, but the base model has only {rows:,}: "
            "they do not belong together. Check --base."
        )
    return fitting


def is_text_of(example: Example, chat_format: ChatFormat) -> bool:
    """Return whether the tokens of a reply give its text, but for spaces and capitals."""
    said = chat_format.tokenizer.decode(example.reply_ids), example.messages[-1]["content"]
    back, text = ("".join(unicodedata.normalize("NFKC", one).casefold().split()) for one in said)
    return text in back


def task_of_example(example: Example) -> Task:
    """Return the prompt of a held-out reply; what it is checked for is not looked at."""
    *messages, reference = example.messages
    return Task(example.source, messages, "held_out", example.row, reference["content"])


def group_of(one: Example | Task, group: str) -> str:
    """Return what the line of an example or a task has under the key that groups lines, or ""."""
    value = one.row.get(group)
    return "" if value is None else str(value)


def read_tasks(path: str, notes: list[Note] | None = None) -> list[Task]:
    """Return the tasks of a file such as general.jsonl; a bad line is refused by its number."""
    return read_prompts(path, "tasks", notes) if path else []


PROMPT_RULE = (
    'a line is {"prompt": [messages, the last one of the user]}, {"prompt": "text"} or '
    '{"messages": [...]} that end with the user\'s'
)


def read_prompts(
    path: str, source: Literal["tasks", "prompts"], notes: list[Note] | None = None
) -> list[Task]:
    """Return the prompts of a file; equal ones count once, and bad lines are refused."""
    found: dict[str, Task] = {}
    equal, bad, rows = [], [], {}
    for where, text in entries_of(path, path_from_here(path)).items():
        try:
            rows[where] = read_line(text)
            task = prompt_of(rows[where], where, source)
            key = key_of(task.messages)
            if key in found:
                equal.append(f"{where} is {found[key].where} again")
                found[key] = with_checks_of(found[key], task)
            else:
                found[key] = task
        except ValueError as error:
            bad.append(Problem(where, str(error)))
    refuse_bad_lines(bad)
    if not found:
        raise InspectError(f"{path} holds no prompts; {PROMPT_RULE}.")
    warn_of_misspelt_checks(rows)
    if equal:
        report_note(
            [] if notes is None else notes,
            "left out",
            f"{len(equal)} of {pluralize(len(rows), 'prompt')} in {path_from_here(path)}, since "
            f"equal ones count once: {join_limited(equal, 3, ', ')}.",
        )
    return list(found.values())


def read_line(text: bytes) -> Any:
    """Return what a line of a file of prompts holds, or raise ValueError."""
    try:
        return json.loads(text.decode("utf-8-sig"))  # concatenated files may each begin with a BOM
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"this is no JSON in UTF-8 ({one_line(error, 90)}); {PROMPT_RULE}"
        ) from error


def are_prompts(path: str) -> bool:
    """Return whether each line of a file is a prompt without a reply."""
    try:
        return all(
            prompt_of(read_line(one), "", "prompts") for one in entries_of(path, "").values()
        )
    except ValueError:
        return False


def prompt_of(row: Any, where: str, source: Literal["tasks", "prompts"]) -> Task:
    """Return the prompt of a line, or raise ValueError."""
    given = row if isinstance(row, dict) else {}
    messages = given.get("prompt") or given.get("messages")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "user":
        raise ValueError(PROMPT_RULE)
    *messages, _ = check_messages([*messages, {"role": "assistant", "content": "a reply"}])
    rules = given.get("checks") or {}
    return Task(where, messages, source, given, None, read_checks(rules), rules)


def warn_of_misspelt_checks(rows: dict[str, dict[str, Any]]) -> None:
    """Tell keys that are "checks" but for a letter or two: nothing else would."""
    found: dict[str, list[str]] = {}
    for where, row in rows.items():
        for key, value in row.items():
            if key != "checks" and isinstance(value, dict) and letters_apart(key, "checks") <= 2:
                found.setdefault(key, []).append(where)
    for key, places in found.items():
        report_sentence(
            "warning",
            f"{pluralize(len(places), 'line')} ({join_limited(places, 3, ', ')}) "
            f'{"has" if len(places) == 1 else "have"} the key "{key}", which nothing reads; checks '
            'stand under "checks".',
        )


def letters_apart(one: str, other: str) -> int:
    """Return how many letters must be changed, added or removed to make one word of another."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        before, row = row, [number]
        for place, wanted in enumerate(other):
            row.append(min(before[place + 1] + 1, row[-1] + 1, before[place] + (letter != wanted)))
    return row[-1]


def tasks_that_render(tasks: list[Task], chat_format: ChatFormat, notes: list[Note]) -> list[Task]:
    """Return the tasks that the chat template takes; Gemma 2's refuses system messages."""
    taken, reasons = [], {}
    for task in tasks:
        reason = why_it_is_not_asked(task.messages, chat_format)
        if reason:
            reasons[task.where] = reason
        else:
            taken.append(task)
    if reasons:
        (where, reason), *_ = reasons.items()
        text = f"{len(reasons)} of {len(tasks)} other tasks, such as {where}: {reason}"
        report_note(notes, "left out", text)
    return taken


def refuse_bad_prompts(prompts: list[Task], chat_format: ChatFormat) -> None:
    """Refuse prompts that the chat template does not take, or that hold special tokens."""
    reasons = [(one.where, why_it_is_not_asked(one.messages, chat_format)) for one in prompts]
    refuse_bad_lines([Problem(where, reason) for where, reason in reasons if reason])


def why_it_is_not_asked(messages: list[dict[str, str]], chat_format: ChatFormat) -> str:
    """Return what keeps a prompt from being asked, or ""."""
    said = "\n".join(message["content"] for message in messages)
    for token in chat_format.special_tokens:
        if token in said:
            return f"the text holds {token}, which the tokenizer takes for more than text"
    try:
        chat_format.prompt_ids(messages)
    except TEMPLATE_ERRORS as error:
        return f"the template says, {one_line(error, 60)}"
    return ""


def refuse_bad_lines(bad: list[Problem]) -> None:
    """Name all bad lines at once, before any model is loaded."""
    if bad:
        raise InspectError(f"{problems_as_text(bad)}\nNothing was measured.")
