"""Draws overview.png from evidence.json: what was gained, what it cost, and one prompt."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inspect_lora.common import one_line
from inspect_lora.scores import FEWEST_LINES, Estimate

BASE, ADAPTER = "0.72", "#1f6fb4"  # the colours of the two models
LOOK = {"font.size": 12, "axes.titlesize": 14, "axes.titleweight": "bold"}
MOST_ROWS = 4  # that a panel has room for


class Bars(NamedTuple):
    """What a panel shows of base and adapter: two bars, from 0 to 1, and the numbers behind."""

    name: str
    base: float
    adapter: float
    base_label: str
    adapter_label: str


def draw_overview(record: dict[str, Any], path: Path) -> bool:
    """Draw what an evidence.json says in one wide picture; return whether there is anything."""
    gained, lost = gains_of(record), costs_of(record)
    reply = reply_to_show(record.get("replies", []))
    if not gained and not lost and reply is None:
        return False
    with matplotlib.rc_context(LOOK):
        figure = Figure((11, 11 / 3), dpi=120, layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
        draw_bars(left, "What was gained", gained, "nothing that is clear")
        draw_bars(middle, "What it cost", lost, "nothing that is clear")
        draw_reply(right, reply)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        figure.supxlabel(caption_of(record), fontsize=10.5, parse_math=False)
        figure.savefig(path)
    return True


def gains_of(record: dict[str, Any]) -> list[Bars]:
    """Return the held-out loss unless it rose, and the checks that clearly more replies pass."""
    loss = record.get("loss")
    rows = [bars_of_loss(record)] if loss and loss["adapter"] <= loss["base"] else []
    rows += [bars_of(row) for row in checks_of(record) if len(row["won"]) > len(row["lost"])]
    return rows[:MOST_ROWS]


def costs_of(record: dict[str, Any]) -> list[Bars]:
    """Return the loss if it rose, the checks that clearly fewer pass, and the change elsewhere."""
    loss = record.get("loss")
    rows = [bars_of_loss(record)] if loss and loss["adapter"] > loss["base"] else []
    rows += [bars_of(row) for row in checks_of(record) if len(row["lost"]) > len(row["won"])]
    changed = ((record.get("elsewhere") or {}).get("no system message") or {}).get("x 1")
    if changed:
        share = changed["other_tokens"]["value"]
        title = "other tasks: first choice is another token"
        rows.append(Bars(title, 0.0, share, "0 %", f"{100 * share:.0f} %"))
    return rows[:MOST_ROWS]


def bars_of_loss(record: dict[str, Any]) -> Bars:
    """Return the bars of the held-out loss, the larger one as long as there is room."""
    base, adapter = record["loss"]["base"], record["loss"]["adapter"]
    largest, gain = max(base, adapter), record["gain"]
    lines = {row["where"] for row in record["losses"]}
    is_clear = len(lines) >= FEWEST_LINES and Estimate(**gain).is_clear()
    title = "loss on unseen replies" + ("" if is_clear else ", no clear difference")
    return Bars(title, base / largest, adapter / largest, f"{base:.3f}", f"{adapter:.3f}")


def checks_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of checks whose change is more than chance."""
    return [row for row in (record.get("checks") or {}).values() if row["is_clear"]]


def bars_of(row: dict[str, Any]) -> Bars:
    """Return the bars of a row of checks."""
    lines = row["lines"]
    return Bars(
        f"replies that pass “{one_line(row['name'], 24)}”",
        row["before"] / lines,
        row["after"] / lines,
        f"{row['before']} of {lines}",
        f"{row['after']} of {lines}",
    )


def reply_to_show(replies: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the first held-out prompt, or other prompt, that is one short message, if any is."""
    fitting = [
        one
        for one in replies
        if one["source"] != "tasks"
        and sum(message["role"] == "user" for message in one["messages"]) == 1
        and len(one["messages"][-1]["content"]) <= 160
    ]
    return fitting[0] if fitting else None


def draw_bars(axes: Axes, title: str, rows: list[Bars], otherwise: str) -> None:
    """Draw two bars for each row, its name above and the numbers behind."""
    axes.set_title(title, loc="left")
    axes.set_axis_off()
    axes.set(xlim=(0, 1.34), ylim=(-3.0 * max(len(rows), 2) + 0.4, 0.4))
    if not rows:
        axes.text(0, -0.6, otherwise, color="0.35")
    for number, row in enumerate(rows):
        top = -3.0 * number
        axes.text(0, top - 0.25, row.name, fontsize=11, parse_math=False)
        both = ((row.base, row.base_label, BASE), (row.adapter, row.adapter_label, ADAPTER))
        for place, (length, label, colour) in enumerate(both):
            middle = top - 0.75 - 0.8 * place
            length = length if math.isfinite(length) else 0.0
            axes.barh(middle, max(length, 0.004), height=0.7, color=colour)
            axes.text(length + 0.03, middle, label, va="center", fontsize=11)


def draw_reply(axes: Axes, reply: dict[str, Any] | None) -> None:
    """Write one prompt and both replies."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_title("One prompt", loc="left")
    if reply is None:
        axes.text(0, 0.9, "no short one was replied to", color="0.35")
        return
    texts = (
        ("user", reply["messages"][-1]["content"], "0.35"),
        ("base", reply["base"]["text"], "0.45"),
        ("adapter", reply["adapter"]["text"], ADAPTER),
    )
    height = 0.99
    for name, text, colour in texts:
        lines = textwrap.wrap(one_line(text, 170), 41) or ["(nothing)"]
        axes.text(0, height, name, va="top", fontsize=10.5, color=colour, weight="bold")
        axes.text(0.2, height, "\n".join(lines), va="top", fontsize=10.5, parse_math=False)
        height -= 0.075 * len(lines) + 0.05


def caption_of(record: dict[str, Any]) -> str:
    """Return which model and adapter the picture is of."""
    config = record.get("adapter_config") or {}
    base = one_line(str(record.get("base", "")).rpartition("/")[2], 40)
    facts = [f"LoRA (r = {config.get('r')}, alpha = {config.get('lora_alpha')}) on {base}"]
    if record.get("losses"):
        count = len(record["losses"])
        facts.append(f"loss in nats a token, lower on {record['lower_on']} of {count} replies")
    facts.append("grey: base, blue: adapter")
    return "; ".join(facts)
