"""Draws overview.png from evidence.json: what was gained, what it cost, and one prompt."""

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
from inspect_lora.scores import FEWEST_LINES, Estimate

BASE, ADAPTER = "0.72", "#1f6fb4"  # the colours of the two models
LOOK = {"font.size": 12, "axes.titlesize": 14, "axes.titleweight": "bold"}
MOST_ROWS = 4  # that a panel has room for
MOST_LETTERS = 150  # of a text beside the name of who said it
LINE = 0.058  # the height of a line of it, as a share of the panel


class Bar(NamedTuple):
    """A model's bar, from 0 to 1, and the number behind it."""

    length: float
    label: str
    colour: str


class Row(NamedTuple):
    """What a panel shows of one measurement: its name, and a bar for each model."""

    name: str
    bars: list[Bar]


def draw_overview(record: dict[str, Any], path: Path) -> bool:
    """Draw what an evidence.json says in one wide picture; return whether there is anything."""
    gained, lost = gains_of(record), costs_of(record)
    replies = record.get("replies") or []
    if not gained and not lost and not replies:
        return False
    is_checked = bool(record.get("checks"))
    no_gain = (
        "nothing" if is_checked or record.get("loss") else "not measured: prompts have no loss"
    )
    no_cost = "nothing" if is_checked or record.get("loss") else "not measured"
    most = max(len(gained), len(lost), 2)  # so that the bars of both panels have one height
    with matplotlib.rc_context(LOOK):
        figure = Figure((11, 11 / 3), dpi=120)
        left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
        figure.subplots_adjust(0.012, 0.11, 0.988, 0.91, wspace=0.06)
        draw_bars(left, "What was gained", gained or no_gain, most)
        draw_bars(middle, "What it cost", lost or no_cost, most)
        draw_reply(right, reply_to_show(replies))
        figure.text(0.012, 0.04, caption_of(record), fontsize=10.5, parse_math=False)
        figure.savefig(path)
    return True


# ---- What was gained, and what it cost


def gains_of(record: dict[str, Any]) -> list[Row]:
    """Return the held-out loss unless it clearly rose, and the checks that no fewer replies pass.

    A check whose change is clear comes before those where it may be chance.
    """
    rows = [] if loss_rose(record) or not record.get("loss") else [row_of_loss(record)]
    rows += [row_of_check(row) for row in checks_of(record) if len(row["won"]) >= len(row["lost"])]
    return rows[:MOST_ROWS]


def costs_of(record: dict[str, Any]) -> list[Row]:
    """Return the loss if it clearly rose, the change elsewhere, and the checks that fewer pass."""
    rows = [row_of_loss(record)] if loss_rose(record) else []
    changed = ((record.get("elsewhere") or {}).get("no system message") or {}).get("x 1")
    if changed:
        share = changed["other_tokens"]["value"]
        bar = Bar(share, f"{100 * share:.0f} %", ADAPTER)
        rows.append(Row("ordinary tasks: top-1 token differs", [bar]))
    rows += [row_of_check(row) for row in checks_of(record) if len(row["lost"]) > len(row["won"])]
    return rows[:MOST_ROWS]


def loss_rose(record: dict[str, Any]) -> bool:
    """Return whether the held-out loss is there, and is clearly higher than the base's."""
    return bool(record.get("loss")) and record["gain"]["value"] < 0 and is_clear(record)


def is_clear(record: dict[str, Any]) -> bool:
    """Return whether the gain is more than chance, as report.md judges it."""
    lines = {row["where"] for row in record["losses"]}
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
    note = " (lower is better)" if is_clear(record) else ": may be chance"
    if bars[0].label == bars[1].label:
        note = ": no difference"
    return Row(f"loss on unseen replies{note}", bars)


def checks_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of checks with a change, first those where it is more than chance."""
    rows = (record.get("checks") or {}).values()
    changed = [row for row in rows if row["won"] or row["lost"]]
    return sorted(changed, key=lambda row: not row["is_clear"])


def row_of_check(row: dict[str, Any]) -> Row:
    """Return the bars of a row of checks."""
    lines, name = row["lines"], shown(one_line(row["name"], 16))
    title = f"replies that pass “{name}”" if row["is_clear"] else f"pass “{name}”: may be chance"
    passed = ((row["before"], BASE), (row["after"], ADAPTER))
    return Row(title, [Bar(n / lines, f"{n} of {lines}", colour) for n, colour in passed])


def draw_bars(axes: Axes, title: str, rows: list[Row] | str, most: int) -> None:
    """Draw a row's bars below its name, with the numbers behind; or write why there is none."""
    axes.set_title(title, loc="left")
    axes.set_axis_off()
    axes.set(xlim=(0, 1.34), ylim=(-3.0 * most + 0.4, 0.4))
    if isinstance(rows, str):
        axes.text(0, -0.25, rows, fontsize=11, color="0.35")
        return
    for number, row in enumerate(rows):
        top = -3.0 * number
        axes.text(0, top - 0.17, row.name, fontsize=11, parse_math=False)
        for place, bar in enumerate(row.bars):
            middle = top - 0.75 - 0.8 * place
            length = bar.length if math.isfinite(bar.length) else 0.0
            axes.barh(middle, max(length, 0.004), height=0.7, color=bar.colour)
            axes.text(length + 0.03, middle, bar.label, va="center", fontsize=11)


# ---- One prompt


def reply_to_show(replies: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the first held-out prompt, or other prompt, that is one short message, if any is.

    All letters must be in the picture's font, which has none of Chinese, for example.
    """
    fitting = [
        one
        for one in replies
        if one["source"] != "tasks"
        and sum(message["role"] == "user" for message in one["messages"]) == 1
        and len(one["messages"][-1]["content"]) <= MOST_LETTERS
        and all(shown(text) == text for _, text, _ in what_was_said(one))
    ]
    return fitting[0] if fitting else None


def what_was_said(reply: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return who said what, each with its colour."""
    said = [("user", one_line(reply["messages"][-1]["content"], MOST_LETTERS), "0.35")]
    for name, colour in (("base", "0.45"), ("adapter", ADAPTER)):
        text = one_line(reply[name]["text"], MOST_LETTERS)
        said.append((name, text or "(nothing)", colour))
    return said


def draw_reply(axes: Axes, reply: dict[str, Any] | None) -> None:
    """Write one prompt and both replies, line by line, so that they stand beside their names."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    is_unseen = reply is not None and reply["source"] == "held_out"
    axes.set_title("One unseen prompt" if is_unseen else "One prompt", loc="left")
    if reply is None:
        axes.text(0, 0.93, "no short one to show: see replies.html", color="0.35")
        return
    height = 0.93
    for name, text, colour in what_was_said(reply):
        axes.text(0, height, name, fontsize=10.5, color=colour, weight="bold")
        for line in textwrap.wrap(text, 38):
            axes.text(0.18, height, line, fontsize=10.5, parse_math=False)
            height -= LINE
        height -= 0.6 * LINE


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
