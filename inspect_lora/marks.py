"""Where in a reply a check found what it looks for, so that a page can mark it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from inspect_lora.checks import Check, Json, Number, Word, json_object_in, read_checks

Part = tuple[str, str, str]  # a text, its mark ("found", "wrong" or ""), and of which check it is


def parts_of(text: str, rules: dict[str, Any], says: dict[str, str]) -> list[Part]:
    """Return a reply in parts, some of them marked; of two marks that overlap the first counts.

    Args:
        rules: the checks as they are in the file, by name.
        says: the same in words.
    """
    try:
        checks = read_checks(rules)
    except ValueError:  # of a newer version: its result is known, but not where it was found
        checks = {}
    marks = sorted(
        (start, end, kind, f"{name}: {says.get(name, '')}")
        for name, check in checks.items()
        for start, end, kind in places_of(check, text)
    )
    parts, done = [], 0
    for start, end, kind, title in marks:
        if start >= done:
            parts += [(text[done:start], "", ""), (text[start:end], kind, title)]
            done = end
    return [part for part in [*parts, (text[done:], "", "")] if part[0]]


def places_of(check: Check, text: str) -> Iterator[tuple[int, int, str]]:
    """Yield where a reply has what a check wants ("found"), and what it does not want ("wrong")."""
    kind = "found" if check.passes(text) else "wrong"
    match check:
        case Word():
            for phrase in check.answers:
                yield from ((*place, "found") for place in places_of_phrase(phrase, text))
            for phrase in check.wrong:
                yield from ((*place, "wrong") for place in places_of_phrase(phrase, text))
        case Number():
            yield from ((*place, kind) for place in places_of_numbers(text)[-1:])
        case Json():
            if json_object_in(text) is not None:
                yield text.find("{"), text.rfind("}") + 1, kind


def places_of_phrase(phrase: str, text: str) -> list[tuple[int, int]]:
    """Return where checks.occurs finds a phrase."""
    wanted, _ = as_compared(phrase)
    return places(rf"(?<!\w){re.escape(wanted)}(?!\w)", text)


def places_of_numbers(text: str) -> list[tuple[int, int]]:
    """Return where checks.Number finds numbers."""
    return places(r"(?:(?<!\w)[-\u2212])?\d+(?:,\d{3}(?!\d))*(?:\.\d+)?", text)


def places(pattern: str, text: str) -> list[tuple[int, int]]:
    """Return where a pattern is in a text as checks compare it, in places of the text itself."""
    compared, at = as_compared(text)
    return [
        (at[found.start()], at[found.end() - 1] + 1) for found in re.finditer(pattern, compared)
    ]


def as_compared(text: str) -> tuple[str, list[int]]:
    """Return a text without capitals and Markdown, and the place in text of each character.

    A letter may become two, such as the German sharp s.
    """
    folded = [
        (letter, place)
        for place, one in enumerate(text)
        if one not in "*_`"
        for letter in one.replace("\u2019", "'").casefold()
    ]
    return "".join(letter for letter, _ in folded), [place for _, place in folded]
