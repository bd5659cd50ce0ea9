"""Draws overview.png from evidence.json: held-out lines, other tasks, and some prompts."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inspect_lora.common import one_line
from inspect_lora.scores import FEWEST_LINES, Estimate, look_equal

BASE, ADAPTER = "0.72", "#1f6fb4"  # the colours of the two models
LOOK = {"font.size": 12, "axes.titlesize": 14, "axes.titleweight": "bold"}
MOST_ROWS = 4  # that a panel has room for
NOTE = 0.4  # the height of a line of a note, in rows
PALE = 0.4  # how strong the bars of a row are that is not clear
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
    is_clear: bool = True


def draw_overview(record: dict[str, Any], path: Path) -> bool:
    """Draw what an evidence.json says in one wide picture; return whether there is anything."""
    own, tasks = rows_of_own(record), rows_of_tasks(record)
    replies = record.get("replies") or []
    if not own and not tasks and not replies:
        return False
    notes = note_below(own, note_on_own(record)), note_below(tasks, note_on_tasks(record))
    # So that the bars of both panels have one height.
    most = max(
        2.0,
        *(
            min(len(rows), MOST_ROWS) + NOTE * len(note.splitlines())
            for rows, note in zip((own, tasks), notes, strict=True)
        ),
    )
    with matplotlib.rc_context(LOOK):
        figure = Figure((11, 11 / 3), dpi=120)
        left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
        figure.subplots_adjust(0.012, 0.11, 0.988, 0.91, wspace=0.06)
        draw_bars(left, title_of_own(record), own[:MOST_ROWS], notes[0], most)
        draw_bars(middle, "On other tasks", tasks[:MOST_ROWS], notes[1], most)
        draw_replies(right, replies_to_show(replies), are_unseen(record))
        figure.text(0.012, 0.04, caption_of(record), fontsize=10.5, parse_math=False)
        figure.savefig(path)
    return True


# ---- On held-out lines or prompts, and on other tasks


def title_of_own(record: dict[str, Any]) -> str:
    """Return whose the lines are that the left panel is of."""
    if not record.get("loss"):
        return "On the prompts"
    return "On held-out lines" if are_unseen(record) else "On the given lines"


def rows_of_own(record: dict[str, Any]) -> list[Row]:
    """Return the loss of the held-out lines, if there are any, and the checks of these lines."""
    rows = [row_of_loss(record)] if record.get("loss") else []
    return clear_first(rows + [row_of_check(row) for row in checks_of(record, are_tasks=False)])


def rows_of_tasks(record: dict[str, Any]) -> list[Row]:
    """Return how often the top-1 token differs on the other tasks, and their checks."""
    rows = []
    if changed := elsewhere_of(record):
        share = changed["other_tokens"]["value"]
        bar = Bar(share, f"{100 * share:.0f} %", ADAPTER)
        rows.append(Row("top-1 token differs from the base's", [bar]))
    return clear_first(rows + [row_of_check(row) for row in checks_of(record, are_tasks=True)])


def clear_first(rows: list[Row]) -> list[Row]:
    """Return rows in their order, those that are clear before the others."""
    return sorted(rows, key=lambda row: not row.is_clear)


def checks_of(record: dict[str, Any], are_tasks: bool) -> list[dict[str, Any]]:
    """Return the rows of the checks of the other tasks, or of all others, by their p."""
    rows = (record.get("checks") or {}).values()
    chosen = [row for row in rows if (row.get("source") == "tasks") is are_tasks]
    return sorted(chosen, key=lambda row: row["p"])


def elsewhere_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return how far the adapter as trained moves the model on other tasks, if it was measured."""
    return ((record.get("elsewhere") or {}).get("no system message") or {}).get("x 1") or {}


def note_on_own(record: dict[str, Any]) -> str:
    """Return that prompts have no loss where no check stands there either."""
    has_rows = record.get("loss") or checks_of(record, are_tasks=False)
    return "" if has_rows else "not measured: prompts have no loss,\nand these have no checks"


def note_on_tasks(record: dict[str, Any]) -> str:
    """Return what was not measured on other tasks."""
    if elsewhere_of(record):
        return ""
    return "top-1 token: not measured" if checks_of(record, are_tasks=True) else "not measured"


def note_below(rows: list[Row], note: str) -> str:
    """Return a note, and before it how many rows there is no room for."""
    more = len(rows) - MOST_ROWS
    return "\n".join(filter(None, [f"and {more} more: report.md" if more > 0 else "", note]))


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
    is_sure = is_clear(record)
    note = " (lower is better)" if is_sure else ": change not shown"
    if look_equal(base, adapter):
        note = ": no difference"
    which = "unseen" if are_unseen(record) else "given"
    return Row(f"loss on {which} replies{note}", bars, is_sure)


def are_unseen(record: dict[str, Any]) -> bool:
    """Return whether the adapter is known not to have learned the replies that it is judged by."""
    return (record.get("held_out") or {}).get("learned", "not known") != "not known"


def row_of_check(row: dict[str, Any]) -> Row:
    """Return the bars of a row of checks; the panel's title says whose the lines are."""
    lines = row["lines"]
    own_name = row["name"].removeprefix("tasks ") if row.get("source") == "tasks" else row["name"]
    name = shown(one_line(own_name, 14))
    change = "change not shown" if row["won"] or row["lost"] else "the same lines"
    title = f"replies that pass “{name}”" if row["is_clear"] else f"pass “{name}”: {change}"
    passed = ((row["before"], BASE), (row["after"], ADAPTER))
    bars = [Bar(n / lines, f"{n} of {lines}", colour) for n, colour in passed]
    return Row(title, bars, row["is_clear"])


def draw_bars(axes: Axes, title: str, rows: list[Row], note: str, most: float) -> None:
    """Draw a row's bars below its name, with the numbers behind; write a note below them.

    The bars of a row that is not clear are pale.
    """
    axes.set_title(title, loc="left")
    axes.set_axis_off()
    axes.set(xlim=(0, 1.34), ylim=(-3.0 * most + 0.4, 0.4))
    for number, row in enumerate(rows):
        top = -3.0 * number
        axes.text(0, top - 0.17, row.name, fontsize=11, parse_math=False)
        for place, bar in enumerate(row.bars):
            middle = top - 0.75 - 0.8 * place
            length = bar.length if math.isfinite(bar.length) else 0.0
            strength = 1.0 if row.is_clear else PALE
            axes.barh(middle, max(length, 0.004), 0.7, color=bar.colour, alpha=strength)
            axes.text(length + 0.03, middle, bar.label, va="center", fontsize=11)
    if note:
        top = -3.0 * len(rows) + 0.25
        axes.text(0, top, note, fontsize=11, color="0.35", va="top", linespacing=1.5)


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
