"""What a line says that its reply must hold, and how many replies of base and adapter hold it.

A line may have "checks", each by a name of its own:
    "checks": {"rings": {"kind": "word", "answers": ["999", "112"]},
               "promises": {"kind": "word", "not": ["always here"]},
               "right": {"kind": "number", "answer": 42}}
Nothing that a model wrote is run.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic

from inspect_lora.common import counted

Phrase = Annotated[str, pydantic.Field(pattern=r"[^*_`]")]  # more than marks of Markdown


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
    """The last number in the reply is the answer.

    In "10-15" the minus is no sign; a comma is one of thousands only before exactly three digits.
    """

    kind: Literal["number"]
    answer: pydantic.FiniteFloat

    def passes(self, reply: str) -> bool:
        """Return whether a reply passes."""
        text = without_markdown(reply).replace("\u2212", "-")
        numbers = re.findall(r"(?:(?<!\w)-)?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?", text)
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
    texts = [without_markdown(text).replace("\u2019", "'").casefold() for text in (phrase, reply)]
    return re.search(rf"(?<!\w){re.escape(texts[0])}(?!\w)", texts[1]) is not None


def without_markdown(text: str) -> str:
    """Return a text without the marks that make words bold or show them as code."""
    return re.sub(r"[*_`]", "", text)


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


def in_words(check: Check) -> str:
    """Return what a check asks of a reply, as a sentence without its subject and full stop."""
    match check:
        case Number():
            return f"the last number is {check.answer:g}"
        case Json():
            wanted = ", ".join(f"{key}: {json.dumps(value)}" for key, value in check.keys.items())
            return f"holds a JSON object with {wanted}"
    said = f"says {quoted(check.answers)}" if check.answers else ""
    unsaid = f"does not say {quoted(check.wrong)}" if check.wrong else ""
    return " and ".join(one for one in (said, unsaid) if one)


def quoted(phrases: list[str]) -> str:
    """Return phrases in quotes, with "or" before the last one."""
    *others, last = [f'"{one}"' for one in phrases]
    return f"{', '.join(others)} or {last}" if others else last


# ---- A row for each name

FEWEST_TO_LOSE = 6  # of five lost and none won, p is 0.06


@dataclass
class CheckRow:
    """How often base and adapter passed the checks of one name."""

    name: str
    lines: int
    before: int  # replies of the base that pass
    after: int  # replies of the adapter that pass
    lost: list[str]  # lines that only the base passes
    won: list[str]  # lines that only the adapter passes
    p: float  # of so uneven a change by chance
    is_clear: bool  # less than 5 % over all rows together
    can_be_clear: bool  # whether that needs no more lines than there are

    def judgement(self) -> str:
        """Return what the row shows; none shows that nothing was lost."""
        lost, won = len(self.lost), len(self.won)
        if self.is_clear:
            verb = "fewer" if lost > won else "more"
            return f"{verb} pass now, by more than chance ({p_in_words(self.p)})"
        said = f"may be chance ({p_in_words(self.p)})" if lost or won else "the same lines pass"
        if not self.can_be_clear:
            return f"{said}; too few lines to show anything"
        if self.before < FEWEST_TO_LOSE:
            return f"{said}; too few pass for a loss to show"
        return said

    def sentence(self) -> str:
        """Return the row as a sentence."""
        return (
            f"{self.name}: of {counted(self.lines, 'line')} the base passes {self.before} and the "
            f"adapter {self.after}: {self.judgement()}."
        )


def rows_of_checks(replies: list[dict[str, Any]]) -> list[CheckRow]:
    """Return a row for each name, in the order in which they first come.

    Args:
        replies: as they are in evidence.json.
    """
    names = list(dict.fromkeys(name for reply in replies for name in reply["base"]["checks"]))
    rows = []
    for name in names:
        asked = [reply for reply in replies if name in reply["base"]["checks"]]
        before = {one["where"] for one in asked if one["base"]["checks"][name]}
        after = {one["where"] for one in asked if one["adapter"]["checks"][name]}
        lost = [one["where"] for one in asked if one["where"] in before - after]
        won = [one["where"] for one in asked if one["where"] in after - before]
        p = mcnemar(len(lost), len(won))
        needed = 0.05 / len(names)  # one of twenty rows would look so by chance
        clear = p < needed, mcnemar(len(asked), 0) < needed
        rows.append(CheckRow(name, len(asked), len(before), len(after), lost, won, p, *clear))
    return rows


def mcnemar(lost: int, won: int) -> float:
    """Return the exact two-sided probability of so uneven a change by chance (McNemar, 1947)."""
    changed, fewer = lost + won, min(lost, won)
    tail = sum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed
    return min(1.0, 2 * tail)


def p_in_words(p: float) -> str:
    """Return a probability for a reader, to whom 0.000 would say that it cannot be."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
