"""Draws overview.png from evidence.json: what was gained, what else changed, some prompts."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inspect_lora.checks import title_of_row
from inspect_lora.common import one_line
from inspect_lora.scores import FEWEST_LINES, Estimate, look_equal

BASE, ADAPTER = "0.72", "#1f6fb4"  # the colours of the two models
LOOK = {"font.size": 12, "axes.titlesize": 14, "axes.titleweight": "bold"}
MOST_ROWS = 4  # that a panel has room for
MOST_LETTERS = 150  # of a prompt, which is shown whole
MOST_OF_REPLY = 110
COLUMNS = 40  # of a text beside the name of who said it
LINE = 0.054  # the height of a line of it, as a share of the panel
MOST_LINES = 16.5  # that the panel has room for
BETWEEN_TEXTS, BETWEEN_PROMPTS = 0.3, 1.0  # in lines


class Bar(NamedTuple):
    """A model's bar, from 0 to 1, and the number behind it."""

    length: float
    label: str
    colour: str


class Said(NamedTuple):
    """What somebody said, in lines, with the colour of the name."""

    name: str
    lines: list[str]
    colour: str


class Row(NamedTuple):
    """What a panel shows of one measurement: its name, and a bar for each model."""

    name: str
    bars: list[Bar]


def draw_overview(record: dict[str, Any], path: Path) -> bool:
    """Draw what an evidence.json says in one wide picture; return whether there is anything."""
    gained, changed = gains_of(record), changes_of(record)
    replies = record.get("replies") or []
    if not gained and not changed and not replies:
        return False
    no_gain, note = note_on_gains(record, gained), note_on_changes(record)
    # So that the bars of both panels have one height; a note takes the room of a row.
    rows_left = len(gained) + 1 if gained and no_gain else len(gained)
    rows_right = len(changed) + 1 if note else len(changed)
    most = max(rows_left, rows_right, 2)
    with matplotlib.rc_context(LOOK):
        figure = Figure((11, 11 / 3), dpi=120)
        left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
        figure.subplots_adjust(0.012, 0.11, 0.988, 0.91, wspace=0.06)
        draw_bars(left, "What was gained", gained, no_gain, most)
        draw_bars(middle, "What else changed", changed, note, most)
        draw_replies(right, replies_to_show(replies), are_unseen(record))
        figure.text(0.012, 0.04, caption_of(record), fontsize=10.5, parse_math=False)
        figure.savefig(path)
    return True


# ---- What was gained, and what else changed


def gains_of(record: dict[str, Any]) -> list[Row]:
    """Return the held-out loss unless it clearly rose, and the checks that no fewer replies pass.

    A check whose change is clear comes before those where it is not shown.
    """
    rows = [] if loss_rose(record) or not record.get("loss") else [row_of_loss(record)]
    rows += [row_of_check(row) for row in checks_of(record) if len(row["won"]) >= len(row["lost"])]
    return rows[:MOST_ROWS]


def changes_of(record: dict[str, Any]) -> list[Row]:
    """Return the loss if it clearly rose, the change elsewhere, and the checks that fewer pass."""
    rows = [row_of_loss(record)] if loss_rose(record) else []
    if changed := elsewhere_of(record):
        share = changed["other_tokens"]["value"]
        bar = Bar(share, f"{100 * share:.0f} %", ADAPTER)
        rows.append(Row("other tasks: top-1 token differs", [bar]))
    rows += [row_of_check(row) for row in checks_of(record) if len(row["lost"]) > len(row["won"])]
    return rows[:MOST_ROWS]


def elsewhere_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return how far the adapter as trained moves the model on other tasks, if it was measured."""
    return ((record.get("elsewhere") or {}).get("no system message") or {}).get("x 1") or {}


def note_on_gains(record: dict[str, Any], gained: list[Row]) -> str:
    """Return what to say below the bars: of prompts no loss is known, so "nothing" would be false.

    It is not said where a check of the user's own prompts was won; the other tasks' are no gain.
    """
    if record.get("loss"):
        return "" if gained else "nothing"
    own = [row for row in checks_of(record) if row.get("source") != "tasks"]
    is_won = any(len(row["won"]) > len(row["lost"]) for row in own)
    return "" if is_won else "not measured: prompts have no loss"


def note_on_changes(record: dict[str, Any]) -> str:
    """Return which changes were not measured, or that no check shows one, below the bars."""
    checks = (record.get("checks") or {}).values()
    is_worse = any(len(row["lost"]) > len(row["won"]) for row in checks)
    if elsewhere_of(record):
        return ""
    if not checks:
        return "other tasks and checks: not measured"
    return "other tasks: not measured" + ("" if is_worse else "\nno check is passed less often")


def loss_rose(record: dict[str, Any]) -> bool:
    """Return whether the held-out loss is there, and is clearly higher than the base's."""
    return bool(record.get("loss")) and record["gain"]["value"] < 0 and is_clear(record)


def is_clear(record: dict[str, Any]) -> bool:
    """Return whether the gain is clear, as report.md judges it."""
    lines = {row.get("line", row["where"]) for row in record["losses"]}
    gain = record["gain"]
    if gain["value"] is None or gain["error"] is None:  # as JSON has a number that is none
        return False
    return len(lines) >= FEWEST_LINES and Estimate(**gain).is_clear()


def row_of_loss(record: dict[str, Any]) -> Row:
    """Return the bars of the held-out loss, the larger one as long as there is room."""
    base, adapter = record["loss"]["base"], record["loss"]["adapter"]
    largest = max(base, adapter)
    bars = [
        Bar(loss / largest, f"{loss:.4f}", colour)
        for loss, colour in ((base, BASE), (adapter, ADAPTER))
    ]
    note = " (lower is better)" if is_clear(record) else ": not shown"
    if look_equal(base, adapter):
        note = ": no difference"
    which = "unseen" if are_unseen(record) else "the given"
    return Row(f"loss on {which} replies{note}", bars)


def are_unseen(record: dict[str, Any]) -> bool:
    """Return whether the adapter is known not to have learned the replies that it is judged by."""
    return (record.get("held_out") or {}).get("learned", "not known") != "not known"


def checks_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of checks with a change, first those where it is clear."""
    rows = (record.get("checks") or {}).values()
    changed = [row for row in rows if row["won"] or row["lost"]]
    return sorted(changed, key=lambda row: not row["is_clear"])


def row_of_check(row: dict[str, Any]) -> Row:
    """Return the bars of a row of checks."""
    lines = row["lines"]
    name = shown(one_line(title_of_row(row["name"], row.get("source", "")), 16))
    title = f"replies that pass “{name}”" if row["is_clear"] else f"pass “{name}”: not shown"
    passed = ((row["before"], BASE), (row["after"], ADAPTER))
    return Row(title, [Bar(n / lines, f"{n} of {lines}", colour) for n, colour in passed])


def draw_bars(axes: Axes, title: str, rows: list[Row], note: str, most: int) -> None:
    """Draw a row's bars below its name, with the numbers behind; write a note below them."""
    axes.set_title(title, loc="left")
    axes.set_axis_off()
    axes.set(xlim=(0, 1.34), ylim=(-3.0 * most + 0.4, 0.4))
    if note:
        top = -3.0 * len(rows) + 0.25
        axes.text(0, top, note, fontsize=11, color="0.35", va="top", linespacing=1.5)
    for number, row in enumerate(rows):
        top = -3.0 * number
        axes.text(0, top - 0.17, row.name, fontsize=11, parse_math=False)
        for place, bar in enumerate(row.bars):
            middle = top - 0.75 - 0.8 * place
            length = bar.length if math.isfinite(bar.length) else 0.0
            axes.barh(middle, max(length, 0.004), height=0.7, color=bar.colour)
            axes.text(length + 0.03, middle, bar.label, va="center", fontsize=11)


# ---- Some prompts


def replies_to_show(replies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first held-out prompts, or other prompts, that the panel has room for.

    Each is one short message, and all letters must be in the picture's font, which has none of
    Chinese, for example.
    """
    fitting, room = [], MOST_LINES
    for one in replies:
        is_short = (
            one["source"] != "tasks"
            and sum(message["role"] == "user" for message in one["messages"]) == 1
            and len(one["messages"][-1]["content"]) <= MOST_LETTERS
        )
        if is_short and height_of(one) <= room and is_in_font(one):
            fitting.append(one)
            room -= height_of(one) + BETWEEN_PROMPTS
    return fitting


def what_was_said(reply: dict[str, Any]) -> list[Said]:
    """Return who said what: the user, the base and the adapter."""
    asked = one_line(reply["messages"][-1]["content"], MOST_LETTERS)
    said = [Said("user", textwrap.wrap(asked, COLUMNS), "0.35")]
    for name, colour in (("base", "0.45"), ("adapter", ADAPTER)):
        text = one_line(reply[name]["text"], MOST_OF_REPLY) or "(nothing)"
        said.append(Said(name, textwrap.wrap(text, COLUMNS), colour))
    return said


def height_of(reply: dict[str, Any]) -> float:
    """Return how many lines a prompt and its replies take."""
    texts = what_was_said(reply)
    return sum(len(one.lines) for one in texts) + BETWEEN_TEXTS * (len(texts) - 1)


def is_in_font(reply: dict[str, Any]) -> bool:
    """Return whether the picture's font has all letters of a prompt and its replies."""
    return all(shown(line) == line for one in what_was_said(reply) for line in one.lines)


def draw_replies(axes: Axes, replies: list[dict[str, Any]], are_new: bool) -> None:
    """Write prompts and both replies, line by line, so that they stand beside their names."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    are_held_out = replies and all(one["source"] == "held_out" for one in replies)
    title = "Unseen prompts" if are_new else "Given prompts"
    axes.set_title(title if are_held_out else "Prompts", loc="left")
    if not replies:
        axes.text(0, 0.93, "no short one to show: see replies.html", color="0.35")
    height = 0.92
    for reply in replies:
        for one in what_was_said(reply):
            axes.text(0, height, one.name, fontsize=10, color=one.colour, weight="bold")
            for line in one.lines:
                axes.text(0.17, height, line, fontsize=10, parse_math=False)
                height -= LINE
            height -= BETWEEN_TEXTS * LINE
        height -= (BETWEEN_PROMPTS - BETWEEN_TEXTS) * LINE


def shown(text: str) -> str:
    """Return a text with a box in place of each letter that the picture's font lacks."""
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    return "".join(one if font.get_char_index(ord(one)) else "□" for one in text)


def caption_of(record: dict[str, Any]) -> str:
    """Return which model and adapter the picture is of."""
    config = record.get("adapter_config") or {}
    base = shown(one_line(str(record.get("base", "")).rstrip("/").rpartition("/")[2], 40))
    facts = [f"LoRA (r = {config.get('r')}, alpha = {config.get('lora_alpha')}) on {base}"]
    if record.get("losses"):
        count = len(record["losses"])
        facts.append(f"loss in nats a token, lower on {record['lower_on']} of {count} replies")
    facts.append("grey: base, blue: adapter")
    return "; ".join(facts)
