"""Blind readings: files that replies.html saved, held against the replies that were read."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inspect_lora.common import InspectError, one_line
from inspect_lora.intervals import Estimate, proportion, sign_test
from inspect_lora.page import PagePrompt, Side, prompt_id, reply_id

SCHEMA = 1  # of the file
ALIKE, NEITHER = "alike", "neither"


@dataclass(frozen=True)
class Preference:
    """What a reader preferred, of all prompts or of those of a kind."""

    kind: str  # "" for all
    read: int  # prompts
    first: int  # preferences for the first side
    second: int
    alike: int
    neither: int
    share: Estimate | None  # of the preferences that are for the second side; p is of one half


@dataclass(frozen=True)
class Reading:
    """A blind reading of two sides."""

    reader: str
    is_finished: bool  # all prompts that were drawn were read
    sides: tuple[str, str]  # their names
    preferences: tuple[Preference, ...]  # of all prompts first
    choices: dict[str, int | str]  # by the id of each prompt: the side's number, or a word


@dataclass(frozen=True)
class Agreement:
    """Of the prompts on which two readers both preferred a side, on how many it was the same."""

    readers: tuple[str, str]
    prompts: int
    same: Estimate


def read_readings(
    files: Sequence[str], sides: list[Side], prompts: list[PagePrompt]
) -> list[Reading]:
    """Return the readings in files of replies like these.

    Raise InspectError at a file that is none, that is of other replies, or that stands twice.
    """
    readings = [read_reading(Path(file), sides, prompts) for file in files]
    names = Counter(reading.reader for reading in readings)
    taken: Counter[str] = Counter()
    named = []
    for reading in readings:
        taken[reading.reader] += 1
        number = f" {taken[reading.reader]}" if names[reading.reader] > 1 else ""
        named.append(replace(reading, reader=f"{reading.reader}{number}"))
    contents = [(reading.sides, tuple(reading.choices.items())) for reading in readings]
    for (file, content), (other, same) in itertools.combinations(
        zip(files, contents, strict=True), 2
    ):
        if content == same:
            raise InspectError(f"{file} and {other} are the same reading: name it once.")
    return named


def read_reading(path: Path, sides: list[Side], prompts: list[PagePrompt]) -> Reading:
    """Return the reading in a file, or raise InspectError."""
    try:
        content = json.loads(path.read_bytes())
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, and {SCHEMA} is read here")
        one, other = content["sides"]
        choices = {each["prompt"]: checked(each) for each in content["choices"]}
        if len(choices) < len(content["choices"]):
            raise ValueError("a prompt stands twice")
        reader = str(content["reader"]).strip() or "reader"
        is_finished = bool(content["finished"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InspectError(
            f"{path} is no blind reading of replies.html ({one_line(error)})."
        ) from error
    places = {side.id: place for place, side in enumerate(sides)}
    # Of prompts with the same messages the page reads the first.
    asked = {prompt_id(each.prompt): each for each in reversed(prompts)}
    if not (one in places and other in places and choices.keys() <= asked.keys()):
        raise InspectError(f"{path} is of another report: its adapters or prompts are not here.")
    both = places[one], places[other]
    for each in content["choices"]:
        replies = asked[each["prompt"]].replies
        if [reply_id(replies[place]) for place in both] != each["replies"]:
            raise InspectError(f"{path} is of another report: it has other replies.")
    kinds = {name: asked[name].prompt.kind for name in choices}
    return Reading(
        reader=reader,
        is_finished=is_finished,
        sides=(sides[both[0]].name, sides[both[1]].name),
        preferences=preferences_of(choices, kinds),
        choices=choices,
    )


def checked(choice: dict[str, Any]) -> int | str:
    """Return what was chosen, or raise ValueError."""
    if choice["choice"] not in (0, 1, ALIKE, NEITHER):
        raise ValueError(f"a choice is {choice['choice']!r}")
    return choice["choice"]


def preferences_of(choices: dict[str, int | str], kinds: dict[str, str]) -> tuple[Preference, ...]:
    """Return what was preferred on all prompts, and on those of each kind if there are several."""
    rows = [preference_of("", choices.values())]
    names = sorted(set(kinds.values()))
    for kind in names if len(names) > 1 else []:
        of_kind = [choice for name, choice in choices.items() if kinds[name] == kind]
        rows.append(preference_of(kind or "(no kind)", of_kind))
    return tuple(rows)


def preference_of(kind: str, choices: Iterable[int | str]) -> Preference:
    """Return how often each side was preferred."""
    counts = Counter(choices)
    first, second = counts[0], counts[1]
    share = None
    if first + second:
        share = proportion(second, first + second)
        share = replace(share, p=sign_test(first, second))
    return Preference(kind, counts.total(), first, second, counts[ALIKE], counts[NEITHER], share)


def agreements_of(readings: Sequence[Reading]) -> list[Agreement]:
    """Return how far each two readers of the same sides agree."""
    agreements = []
    for one, other in itertools.combinations(readings, 2):
        if set(one.sides) != set(other.sides):
            continue
        both = [
            (one.sides[first], other.sides[second])
            for name, first in one.choices.items()
            if isinstance(first, int) and isinstance(second := other.choices.get(name), int)
        ]
        if both:
            same = proportion(sum(first == second for first, second in both), len(both))
            agreements.append(Agreement((one.reader, other.reader), len(both), same))
    return agreements
