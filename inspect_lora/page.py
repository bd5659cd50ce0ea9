"""replies.html: prompts with the replies of several sides, to read side by side or blind."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from inspect_lora.common import hash_of
from inspect_lora.record import Exchange, Prompt, Reply
from inspect_lora.rules import KEYS

TEMPLATE = Path(__file__).with_name("page.html")
PAGE = "replies.html"


@dataclass(frozen=True)
class Side:
    """Whose replies stand on a page."""

    name: str
    detail: str  # such as the name of the base model
    id: str  # of the record, or of the base: a reading says by it which sides were read


@dataclass(frozen=True)
class PagePrompt:
    """A prompt, and what each side replies to it, in the order of the sides."""

    prompt: Prompt
    replies: list[Reply]


def prompts_of(exchanges: list[Exchange]) -> list[PagePrompt]:
    """Return prompts with the replies of base and adapter."""
    return [PagePrompt(each, [each.base, each.adapter]) for each in exchanges]


def rule_in_words(rule: dict[str, Any]) -> str:
    """Return what a rule asks of a reply; the phrases that it must hold come first."""
    values = {key: json.dumps(rule[key], ensure_ascii=False) for key in KEYS if key in rule}
    words = {"any": "has one of", "none": "has none of"}
    asked = [(words.get(key, key.replace("_", " ")), text) for key, text in values.items()]
    return "; ".join(f"{word}: {text.strip('[]')}" for word, text in asked)


def prompt_id(prompt: Prompt) -> str:
    """Return a hash by which a reading names a prompt."""
    return hash_of((prompt.source == "tasks", prompt.messages))


def reply_id(reply: Reply) -> str:
    """Return a hash by which a reading names a reply."""
    return hash_of(reply.text)


def page_of(sides: list[Side], system: str, prompts: list[PagePrompt]) -> str:
    """Return the page of prompts with the replies of sides.

    It loads nothing, and whatever is said is text there. A rule stands once for all its lines.
    """
    rules: dict[str, int] = {}
    entries = []
    for each in prompts:
        prompt = each.prompt
        entry = {field.name: getattr(prompt, field.name) for field in fields(Prompt)}
        entry["id"] = prompt_id(prompt)
        entry["where"] = Path(prompt.where).name
        entry["checks"] = {
            name: rules.setdefault(rule_in_words(rule), len(rules))
            for name, rule in prompt.checks.items()
        }
        entry["replies"] = [vars(reply) | {"id": reply_id(reply)} for reply in each.replies]
        entries.append(entry)
    page = {"sides": sides, "system": system, "rules": list(rules), "prompts": entries}
    data = json.dumps(page, default=vars)  # in ASCII alone
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("PAGE-DATA", data.replace("<", "\\u003c"), 1)
