"""Held-out conversations, other tasks, and what their lines say that a reply must hold.

A line may have "checks", each by a name of its own:
    "checks": {"rings": {"kind": "word", "answers": ["999", "112"]},
               "promises": {"kind": "word", "not": ["always here"]},
               "right": {"kind": "number", "answer": 42}}
Nothing that a model wrote is run.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import pydantic

from inspect_lora.adapters import Adapter
from inspect_lora.common import (
    InspectError,
    at_least,
    file_sha256,
    join_limited,
    one_line,
    path_from_here,
    report,
)
from inspect_lora.files import Run, where_it_is_now
from inspect_lora.trainer import (
    ChatFormat,
    Example,
    check_messages,
    encode,
    problems_as_text,
    read_conversations,
)

GENERAL_FILE = Path(__file__).resolve().parent / "general.jsonl"


@dataclass
class HeldOut:
    """The conversations that an adapter is measured on, which it was not trained on."""

    path: str
    sha256: str
    examples: list[Example]  # a reply each
    checked: list[Task]  # the lines that say what a reply must hold


@dataclass
class Task:
    """A prompt that both models reply to."""

    where: str  # file:line
    messages: list[dict[str, str]]  # the user's last message comes last
    checks: dict[str, Check]  # what a reply must hold, by name


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


def read_held_out(options: argparse.Namespace, run: Run | None) -> HeldOut:
    """Return the held-out conversations; a bad line or a bad check is refused by its line."""
    facts = (run and run.record.get("data", {}).get("held_out")) or {}
    path = options.eval_file or (facts and where_it_is_now(facts["file"], run))
    if not path:
        raise InspectError(
            "Held-out conversations are needed, which the adapter was not trained on: give a file "
            'with --eval_file. A line is {"prompt": [...], "completion": [...]}, {"messages": '
            "[...]}, or in the form of ShareGPT or Alpaca."
        )
    replies = run.settings.get("REPLIES", "all") if run else "all"
    examples, problems = read_conversations(path, replies, accepts_thinking=options.enable_thinking)
    if problems:
        raise InspectError(f"{problems_as_text(problems)}\nNothing was measured.")
    checked, bad = [], []
    last = {example.where: example for example in examples}  # of each conversation
    for example in last.values():
        if example.row.get("checks") is not None:
            try:
                checks = read_checks(example.row["checks"])
                checked.append(Task(example.where, example.messages[:-1], checks))
            except ValueError as error:
                bad.append(f"{example.where}: {error}")
    refuse_bad_lines(bad)
    sha256 = file_sha256(Path(path))
    if not options.eval_file and sha256 != facts["sha256"]:
        report("warning", f"{path} has changed since the run, so the losses differ from the run's")
    if run and sha256 == run.record.get("data", {}).get("train", {}).get("sha256"):
        report("warning", f"{path} is what the adapter was trained on, so it is not held out")
    return HeldOut(str(path), sha256, examples, checked)


def encode_held_out(
    held_out: HeldOut, adapter: Adapter, options: argparse.Namespace
) -> list[Example]:
    """Return the held-out examples that fit, with their tokens."""
    fitting, problems = encode(held_out.examples, adapter.chat_format, options.max_seq_len)
    if problems:
        raise InspectError(f"{problems_as_text(problems)}\nNothing was measured.")
    if fitting and not any(is_text_of(one, adapter.chat_format) for one in fitting):
        raise InspectError(
            f"The tokenizer in {adapter.chat_format.tokenizer.name_or_path} turns no reply into "
            "tokens that give its text again: its vocabulary is missing or damaged, such as "
            "tokenizer.json."
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


def read_tasks(path: str) -> list[Task]:
    """Return the tasks of a file such as general.jsonl; a bad line is refused by its number."""
    if not path:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise InspectError(f"--general_file: {path} cannot be read ({error}).") from error
    tasks, bad = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path_from_here(path)}:{number}"
            try:
                tasks.append(task_of(json.loads(line), where))
            except ValueError as error:
                bad.append(f"{where}: {error}")
    refuse_bad_lines(bad)
    return tasks


def tasks_that_render(tasks: list[Task], chat_format: ChatFormat) -> list[Task]:
    """Return the tasks that the chat template takes; Gemma 2's refuses system messages."""
    taken, reason = [], ""
    for task in tasks:
        try:
            chat_format.prompt_ids(task.messages)
            taken.append(task)
        except jinja2.TemplateError as error:
            reason = one_line(error, 60)
    if reason:
        number = len(tasks) - len(taken)
        report("left out", f"{number} of {len(tasks)} other tasks: the template says, {reason}")
    return taken


def task_of(row: Any, where: str) -> Task:
    """Return the task of a line, or raise ValueError."""
    messages = row.get("prompt") if isinstance(row, dict) else None
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") != "user":
        raise ValueError('a line is {"prompt": [messages, the last one of the user]}')
    check_messages([*messages, {"role": "assistant", "content": "a reply"}])
    return Task(where, messages, read_checks(row.get("checks", {})))


def refuse_bad_lines(bad: list[str]) -> None:
    """Name all bad lines at once, before any model is loaded."""
    if bad:
        raise InspectError(f"{join_limited(bad)}\nNothing was measured.")


# ---- What a reply must hold

Phrase = Annotated[str, pydantic.Field(min_length=1)]


class Form(pydantic.BaseModel):
    """What all kinds of checks have in common: a key or a type that is wrong is refused."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class Word(Form):
    """One of the answers occurs, if there are any, and none of "not"."""

    kind: Literal["word"]
    answers: list[Phrase] = []
    wrong: list[Phrase] = pydantic.Field([], alias="not")

    @pydantic.model_validator(mode="after")
    def asks_for_something(self) -> Word:
        """Refuse a check that every reply would pass."""
        if not self.answers and not self.wrong:
            raise ValueError('it needs "answers", "not" or both')
        return self

    def passes(self, reply: str) -> bool:
        """Return whether a reply passes."""
        is_said = not self.answers or any(occurs(answer, reply) for answer in self.answers)
        return is_said and not any(occurs(phrase, reply) for phrase in self.wrong)


class Number(Form):
    """The last number in the reply is the answer."""

    kind: Literal["number"]
    answer: pydantic.FiniteFloat

    def passes(self, reply: str) -> bool:
        """Return whether a reply passes."""
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", without_markdown(reply))
        return bool(numbers) and math.isclose(
            float(numbers[-1].replace(",", "")), self.answer, rel_tol=1e-9, abs_tol=1e-9
        )


class Json(Form):
    """The reply holds one object that has these keys with these values."""

    kind: Literal["json"]
    keys: Annotated[dict[str, Any], pydantic.Field(min_length=1)]

    def passes(self, reply: str) -> bool:
        """Return whether a reply passes."""
        found = json_object_in(reply)
        return found is not None and all(
            key in found and is_same_value(found[key], value) for key, value in self.keys.items()
        )


Check = Annotated[Word | Number | Json, pydantic.Field(discriminator="kind")]
CHECKS = pydantic.TypeAdapter(dict[Phrase, Check])


def read_checks(value: Any) -> dict[str, Check]:
    """Return a line's checks by name, or raise ValueError with a sentence for each that is bad."""
    if value is None:  # as a table writes it that has no checks in this line
        return {}
    try:
        return CHECKS.validate_python(value)
    except pydantic.ValidationError as error:
        said = [
            f"{'.'.join(['checks', *map(str, one['loc'])])}: "
            + one["msg"].removeprefix("Value error, ")
            for one in error.errors()
        ]
        raise ValueError("; ".join(said)) from error


def occurs(phrase: str, reply: str) -> bool:
    """Return whether a phrase occurs in a reply as whole words.

    Capitals and Markdown do not matter, nor whether an apostrophe is straight or curly.
    """
    phrase, reply = (text.replace("\u2019", "'").casefold() for text in (phrase, reply))
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", without_markdown(reply)) is not None


def without_markdown(reply: str) -> str:
    """Return a reply without the marks that make words bold or show them as code."""
    return re.sub(r"[*_`]", "", reply)


def json_object_in(reply: str) -> dict[str, Any] | None:
    """Return the JSON object that a reply holds, perhaps within other text, or None."""
    start, end = reply.find("{"), reply.rfind("}")
    with suppress(ValueError):
        found = json.loads(reply[start : end + 1])
        return found if isinstance(found, dict) else None
    return None


def is_same_value(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal; of texts the letters' case does not matter."""
    if isinstance(one, str) and isinstance(other, str):
        return one.strip().casefold() == other.strip().casefold()
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return isinstance(one, bool) == isinstance(other, bool) and math.isclose(one, other)
    return one == other
