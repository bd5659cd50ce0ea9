"""replies.html: the replies of two sides, to be read side by side or blind, in any browser.

One file that loads nothing: page.html is the template, and what is said goes into it as JSON. Which
side is on the left is drawn in the page, at the start of a blind reading; so the same replies give
the same file, and a reading that was begun is still there if the file is written again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import unicodedata
from pathlib import Path
from typing import Any

from inspect_lora.common import one_line, path_from_here, report
from inspect_lora.marks import parts_of

TEMPLATE = Path(__file__).with_name("page.html")
# What could end the script element, a line of JavaScript or the text's direction, or is no UTF-8.
UNSAFE = re.compile("[<>&\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
REMOTE = {"SSH_CONNECTION", "SLURM_JOB_ID"}  # in the environment of a session on another computer
Replies = list[dict[str, Any]]  # as they are in evidence.json


def page_of_evidence(adapter: str, base: str, replies: Replies) -> str:
    """Return the page of a base and its adapter, or "" if they replied to nothing."""
    rows = by_prompt(replies).values()
    pairs = [(row, row["base"], row["adapter"]) for row in rows]
    limits = [(row["max_new_tokens"], row["max_new_tokens"]) for row in rows]
    sides = [("base", base), ("adapter", adapter)]
    return as_html(adapter, sides, pairs, limits) if pairs else ""


def page_of_two(names: list[str], details: list[str], first: Replies, second: Replies) -> str:
    """Return the page of two adapters, or "" if there is no prompt that both replied to."""
    others = by_prompt(second)
    both = [(row, others[prompt]) for prompt, row in by_prompt(first).items() if prompt in others]
    pairs = [
        (row | {"says": says_of_both(row, other)}, row["adapter"], other["adapter"])
        for row, other in both
    ]
    limits = [(row["max_new_tokens"], other["max_new_tokens"]) for row, other in both]
    sides = list(zip(names, details, strict=True))
    return as_html(" and ".join(names), sides, pairs, limits) if both else ""


def report_page(path: Path, prompts: int = 0) -> None:
    """Say where a page is, and in a remote session how to fetch it.

    Args:
        path: of the page.
        prompts: how many there are if no reply to them is known, so that only a reader can judge.
    """
    what_to_do = "Open it in any browser; it needs no network."
    if prompts:
        number = "40" if prompts > 40 else "all"
        what_to_do += f'\nNow judge the replies there: choose "Blind reading", and read {number}.'
    else:
        what_to_do += " Read the replies blind, or side by side."
    lines = [path_from_here(path), what_to_do]
    if REMOTE & os.environ.keys():
        fetch = shlex.quote(f"CLUSTER:{path.resolve()}")
        lines += ["From a cluster, copy it to your own computer first:", f"scp {fetch} ."]
    report("replies", "\n".join(lines))


def by_prompt(replies: Replies) -> dict[str, dict[str, Any]]:
    """Return the replies by their prompt; of one with a check and a sample the first, the check's.

    Of a record of schema 1 no prompt is known.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in replies:
        if row["messages"]:
            found.setdefault(json.dumps(row["messages"]), row)
    return found


def says_of_both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, str]:
    """Return the checks in words that both records made, and by the same rule."""
    rules = other["rules"]
    return {
        name: says for name, says in one["says"].items() if rules.get(name) == one["rules"][name]
    }


def as_html(
    title: str,
    sides: list[tuple[str, str]],
    pairs: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]],
    limits: list[tuple[int, int]],
) -> str:
    """Return the page of prompts with two replies each, and after how many tokens each was cut."""
    prompts = [
        {key: row[key] for key in ("id", "group", "source", "messages", "reference")}
        | {"where": Path(row["where"]).name}
        | {"checks": row["says"]}  # by name, in words
        | {"replies": [as_shown(one, row, min(limit)) for one in said]}
        for (row, *said), limit in zip(pairs, limits, strict=True)
    ]
    data = {
        "title": visible(title),
        "sides": [{"name": visible(name), "detail": visible(more)} for name, more in sides],
        "cut_alike": about_limits(limits),
        "prompts": prompts,
    }
    data["id"] = hashlib.sha256(as_safe_json(data).encode()).hexdigest()[:16]
    page = TEMPLATE.read_text(encoding="utf-8")
    for name, tag in (("STYLE", "style"), ("SCRIPT", "script")):
        inner = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        page = page.replace(f"{name}-HASH", f"sha256-{digest}", 1)
    return page.replace("PAGE-DATA", as_safe_json(data), 1)


def as_safe_json(value: Any) -> str:
    """Return value as JSON that is text wherever it stands in a page, and that UTF-8 can hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def visible(name: str) -> str:
    """Return a name as one line, without characters that would not be seen or turn the text."""
    seen = [one for one in one_line(name, 80) if unicodedata.category(one) not in ("Cc", "Cf")]
    return "".join(seen)


def about_limits(limits: list[tuple[int, int]]) -> str:
    """Return the sentence on where replies are cut."""
    where = sorted({min(limit) for limit in limits})
    tokens = f"{' or '.join(map(str, where))} tokens"
    if all(one == other for one, other in limits):
        return f"Both replies to a prompt were cut at the same length: {tokens}."
    return (
        f"Both replies to a prompt are cut at the same length: {tokens}. One that was allowed "
        "more is cut at the end of a word, after about as many."
    )


def as_shown(said: dict[str, Any], row: dict[str, Any], limit: int) -> dict[str, Any]:
    """Return a reply as the page has it; where limit is below its own, also as it is read blind."""
    shown = {key: said[key] for key in ("ended", "tokens", "checks")}
    shown["parts"] = parts_of(said["text"], row["rules"], row["says"])
    if said["tokens"] > limit:
        shown["blind"] = {
            "text": cut_at_word(said["text"], limit / said["tokens"]),
            "ended": False,
            "tokens": limit,
        }
    return shown


def cut_at_word(text: str, share: float) -> str:
    """Return about this share of a text, up to the end of a word; tokens are not in the file."""
    return re.match(r"(?s)(.*\S)(?=\s)|", text[: round(len(text) * share) + 1])[0]
