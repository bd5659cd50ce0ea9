"""Where in a reply a check found what it looks for, so that a page can mark it."""

from __future__ import annotations

from typing import Any

from inspect_lora.checks import Check, Word, places_of, read_checks

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
        for kind, places in marks_of(check, text).items()
        for start, end in places
    )
    parts, done = [], 0
    for start, end, kind, title in marks:
        if start >= done:
            parts += [(text[done:start], "", ""), (text[start:end], kind, title)]
            done = end
    return [part for part in [*parts, (text[done:], "", "")] if part[0]]


def marks_of(check: Check, text: str) -> dict[str, list[tuple[int, int]]]:
    """Return where a reply has what a check wants ("found"), and what it does not ("wrong")."""
    if isinstance(check, Word):
        answers, before = check.places_of_answers(text)
        return {"found": answers, "wrong": [*before, *places_of(check.wrong, text)]}
    return {"found" if check.passes(text) else "wrong": check.found(text)}
