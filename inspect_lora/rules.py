r"""Rules that a reply passes or fails.

A rule has at least one of these keys:
    any             the reply must hold one of these phrases
    none            the reply must hold none of these phrases
    most_words      the reply has at most this many words
    most_questions  the reply has at most this many question marks ("??" is one)
Rules stand in a line's "checks", {"name": rule}, or once for many lines in a JSON file, a list of
{"name": "...", "kinds": ["..."], and those keys}; without "kinds" such a rule is for all lines.

Rules find words, not meaning. A phrase is found as whole words ("999" is not in 1999, 999,000,
0.999 or 0800 111 999), in upper or lower case, with curly or straight apostrophes. A space stands
for any spaces, line breaks or hyphens. Everything else is taken as it stands ("**", "\n- ").
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from inspect_lora.common import InspectError

Rule = dict[str, Any]
LISTS, NUMBERS = ("any", "none"), ("most_words", "most_questions")
KEYS = (*LISTS, *NUMBERS)
ALIKE = str.maketrans("\u2018\u2019\u02bc\u2010\u2011", "'''--")
# No spaces say where a word ends in Thai to Tibetan, Burmese, Khmer, and from CJK to Hangul.
LETTER = r"[^\W\u0e00-\u109f\u1780-\u17ff\u2e80-\ud7ff]"


def problem_of(rule: Any) -> str:
    """Return what is wrong with a rule, or ""; with a misspelt key every reply would pass."""
    if not isinstance(rule, dict) or not rule:
        return f"a rule is an object with one or more of {', '.join(KEYS)}, not {rule!r}"
    for key, value in rule.items():
        if key not in KEYS:
            return f'"{key}" is not one of {", ".join(KEYS)}'
        if key in LISTS and not is_list_of_texts(value):
            return f'"{key}" must be a list of phrases, not {value!r}'
        if key in NUMBERS and (type(value) is not int or value < 0):  # True is an int, too
            return f'"{key}" must be a whole number, 0 or more, not {value!r}'
    return ""


def is_list_of_texts(value: Any) -> bool:
    """Return whether a value is a list of one or more texts, none of them empty."""
    return isinstance(value, list) and value != [] and all(type(x) is str and x for x in value)


def passes(rule: Rule, reply: str) -> bool:
    """Return whether a reply passes a rule. An empty reply holds nothing that "any" asks for."""
    questions = len(re.findall(r"[?\uff1f\u061f]+", reply))
    return (
        ("any" not in rule or any(holds(reply, phrase) for phrase in rule["any"]))
        and not any(holds(reply, phrase) for phrase in rule.get("none", ()))
        and len(reply.split()) <= rule.get("most_words", len(reply))
        and questions <= rule.get("most_questions", questions)
    )


def holds(reply: str, phrase: str) -> bool:
    """Return whether a reply holds a phrase; emphasis in the reply does not part its words."""
    if not re.search("[*_`]", phrase):
        reply = re.sub("[*_`]", "", reply)
    return bool(pattern_of(phrase).search(reply.translate(ALIKE)))


def pattern_of(phrase: str) -> re.Pattern[str]:
    """Return the pattern of a phrase. "can" is not in "can't", and 85 not in 1,085 or 85.5.

    Telephone numbers are written with spaces or hyphens, so 999 is not in 0800 111 999 either.
    """
    pattern = r"[\s-]+".join(map(re.escape, re.split(" +", phrase.translate(ALIKE))))
    if re.match(LETTER, phrase[0]):
        pattern = rf"(?<!{LETTER})(?<!\d[.,])" + pattern
    if phrase[0].isdigit():
        pattern = r"(?<!\d{3}[ \u00a0-])" + pattern
    if re.match(LETTER, phrase[-1]):
        pattern += rf"(?!{LETTER}|'t\b|[.,]\d)"
    return re.compile(pattern, re.IGNORECASE)


def read_rules(path: str | Path) -> list[Rule]:
    """Return the rules of a file, or raise InspectError with what is wrong, and in which rule."""
    try:
        rules = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InspectError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise InspectError(f'{path} must be a list of rules: [{{"name": "...", "none": ["..."]}}]')
    names = [rule.get("name") for rule in rules]
    for number, (name, rule) in enumerate(zip(names, rules, strict=True), 1):
        problem = problem_of({key: rule[key] for key in rule if key not in ("name", "kinds")})
        if not (isinstance(name, str) and name.strip()) or names.count(name) > 1:
            problem = f'"name" must be a text that no other rule has, not {name!r}'
        if "kinds" in rule and not is_list_of_texts(rule["kinds"]):
            problem = f'"kinds" must be a list of kinds of lines, not {rule["kinds"]!r}'
        if problem:
            raise InspectError(f"{path}: rule {number}: {problem}")
    return rules


def rules_for(row: dict[str, Any], kind: str, shared: list[Rule]) -> dict[str, Rule]:
    """Return the rules of a line by name: the shared ones of its kind, and its own "checks".

    A check takes the place of the shared rule of its name; one that is null switches it off. A
    wrong check raises InspectError; the caller adds the file and the line.
    """
    of_kind = {
        rule["name"]: {key: rule[key] for key in KEYS if key in rule}
        for rule in shared
        if kind in rule.get("kinds", [kind])
    }
    checks = row.get("checks") or {}
    if not isinstance(checks, dict):
        raise InspectError(f'"checks" must be an object of rules by name, not {checks!r}')
    for name, check in checks.items():
        if check is not None and (problem := problem_of(check)):
            raise InspectError(f'the check "{name}": {problem}')
    return {name: rule for name, rule in (of_kind | checks).items() if rule is not None}
