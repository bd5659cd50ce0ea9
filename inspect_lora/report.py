"""Make what is shown from a record: tables, report.md, the picture and replies.html.

`report FOLDER` makes all of it again from FOLDER/evidence.json, in seconds and without the model,
also where the measurement was stopped. Gains, shares and divergences stand with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from inspect_lora import record
from inspect_lora.common import aligned, from_here, say, wrapped, write_whole
from inspect_lora.record import Estimate, Exchange, Line, Part, Record, Shift
from inspect_lora.rules import KEYS

TEMPLATE = Path(__file__).with_name("page.html")
PICTURE, PAGE = "picture.png", "replies.html"
NOT_CLEAR = "~"
LEGEND = [
    "not clear: the interval contains 0 (for a share: 100 %), p >= 0.05, or fewer than 20 lines;",
    "the best of several rows looks better than it is",
]
ABOUT = """\
\\~ marks a row that is not clear: its 95 % interval contains 0 (for a share of the gain, \
100 %), its p is 0.05 or more, or it has fewer than 20 lines. Each row is judged alone: of twenty \
rows without any effect, one looks clear on average, and the best of several looks better than it \
is. The intervals cover only the choice of lines; another seed of the training may change more. \
Losses are in nats a token; a gain above 0 is better. \
"Lower on" counts the replies on which the adapter's loss is lower, "lost" and "won" the lines \
that only the base or only the adapter passes; p says how often chance alone would split these so \
unevenly. "Same" counts the replies that are, word for word, the most frequent one."""
ROWS_SHOWN = 9  # of a table, on the terminal; report.md has all
REPLIES_SHOWN = 8  # in report.md; the page has all
TRAINING = "TRAIN_FILE NUM_EPOCHS MAX_STEPS LEARNING_RATE LORA_R LORA_ALPHA SEED FINAL_LORA"
KINDS_DRAWN = 13  # all of them together is the first
ELSEWHERE = ["KL", "95 % interval", "other token"]  # what cells_of_shift() returns
Table = tuple[list[str], list[list[Any]]]  # a head, and rows of cells


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("folder", metavar="FOLDER", help="a report's folder: evidence.json is read")


def run(options: argparse.Namespace) -> None:
    """Print a report, and write its files anew."""
    found = record.read(Path(options.folder) / record.FILE)
    print_gain(found)
    print_parts(found)
    print_shifts(found)
    print_replies(found)
    write(found)


# ---- Cells


def interval(found: Estimate, factor: float = 1.0, form: str = "+.3f") -> str:
    """Return an interval; its ends are not known where there is one line."""
    if not math.isfinite(found.low):
        return "?"
    return f"{factor * found.low:{form}} to {factor * found.high:{form}}"


def mark(is_clear: bool) -> str:
    """Return what stands beside a number."""
    return "" if is_clear else NOT_CLEAR


def short(name: str, width: int = 20) -> str:
    """Return a name that keeps a table narrow."""
    return name if len(name) <= width else f"{name[: width - 3]}..."


def cells_of_part(found: Record, part: Part | None) -> list[str]:
    """Return a part's loss, and its share of the gain if there is a clear one."""
    if part is None:
        return [""] * 4
    cells = [f"{record.per_token(part.losses, record.lines_of_parts(found)).value:.4f}"]
    if not record.has_shares(found):
        return [*cells, "", "", ""]
    share = record.share_of_gain(found, part)
    cells.append(f"{100 * share.value:.1f} %")
    if share.low == share.high:  # the base's 0 %, and 100 % of the whole adapter
        return [*cells, "", ""]
    return [*cells, interval(share, 100, ".1f"), mark(share.is_clear(1.0))]


def cells_of_shift(shift: Shift | None) -> list[str]:
    """Return the KL divergence on the tasks, and how often another token is the likeliest."""
    if shift is None:
        return [""] * 3
    kl = record.ratio(shift.kl, shift.tokens)
    other = f"{100 * sum(shift.other) / sum(shift.tokens):.1f} %"
    return [f"{kl.value:.4f}", interval(kl, form=".3f"), other]


def cells_of_change(before: list[bool], after: list[bool]) -> list[Any]:
    """Return on how many lines a check is lost and won, p, and the mark."""
    pairs = Counter(zip(before, after, strict=True))
    lost, won = pairs[True, False], pairs[False, True]
    p = record.p_of_change(lost, won)
    is_clear = p < 0.05 and len(before) >= record.FEWEST_LINES
    return [lost, won, f"{p:.3f}" if p >= 0.001 else "<0.001", mark(is_clear)]


# ---- Tables


def groups_of(found: Record) -> dict[str, list[Line]]:
    """Return all held-out replies, and those of each kind if there are several kinds."""
    kinds: dict[str, list[Line]] = {}
    for line in found.lines:
        kinds.setdefault(line.kind or "(no kind)", []).append(line)
    groups = {"(all)": found.lines} if kinds else {}
    return groups | kinds if len(kinds) > 1 else groups


def table_of_gain(groups: dict[str, list[Line]]) -> Table:
    """Return the losses of groups of held-out replies."""
    rows = []
    for kind, lines in groups.items():
        gain = record.gain(lines)
        both = [line.base for line in lines], [line.adapter for line in lines]
        cells = [f"{record.per_token(losses, lines).value:.4f}" for losses in both]
        cells += [f"{gain.value:+.4f}", interval(gain)]
        lower = sum(line.adapter < line.base for line in lines)
        rows.append([short(kind), len(lines), *cells, mark(gain.is_clear()), lower])
    head = ["held-out", "replies", "base", "adapter", "gain", "95 % interval", "", "lower on"]
    return head, rows


def strengths_of(found: Record) -> dict[float, Part]:
    """Return the parts that are the adapter at some strength, from the base's 0 on."""
    parts = {float(one.name[2:]): one for one in found.parts if one.kind == "strength"}
    if parts:
        lines = record.lines_of_parts(found)
        parts[0.0] = Part("strength", "base", [line.base for line in lines])
        parts[1.0] = Part("strength", "as trained", [line.adapter for line in lines])
    return dict(sorted(parts.items()))


def shifts_of(found: Record) -> dict[float, Shift]:
    """Return the changes on other tasks by strength, without the training's system message."""
    return {one.strength: one for one in found.shifts if not one.system}


def table_of_strengths(found: Record) -> Table:
    """Return what each strength keeps of the gain, and how far it moves the model elsewhere."""
    parts, shifts = strengths_of(found), shifts_of(found)
    measured = []
    for strength in sorted(parts.keys() | shifts.keys()):
        name = {0: "base", 1: "as trained"}.get(strength, f"x {strength:g}")
        measured.append((name, parts.get(strength), shifts.get(strength)))
    measured += [("system message", None, shift) for shift in found.shifts if shift.system]
    rows: list[list[Any]] = []
    for name, part, shift in measured:
        kept = cells_of_part(found, part) if parts else []  # prompts without replies have no loss
        rows.append([name, *kept, *(cells_of_shift(shift) if shifts else [])])
    gain = ["loss", "of gain", "95 % interval", ""] if parts else []
    return ["strength", *gain, *(ELSEWHERE if shifts else [])], rows


def table_of_parts(found: Record, *kinds: str) -> Table:
    """Return what parts of these kinds keep of the gain; parts overlap."""
    parts = [part for part in found.parts if part.kind in kinds]
    rows = [[short(part.name, 40), *cells_of_part(found, part)] for part in parts]
    return ["part", "loss", "of gain", "95 % interval", ""], rows


def table_of_updates(found: Record) -> Table:
    """Return how large the updates of each target are beside their weights."""
    rows = []
    for target, sizes in found.updates.items():
        mean = f"{100 * statistics.fmean(sizes):.2f} %"
        rows.append([target, len(sizes), mean, f"{100 * max(sizes):.2f} %"])
    return ["target", "modules", "|update| / |W|, mean", "largest"], rows


def table_of_checks(found: Record) -> Table:
    """Return how many replies pass each check."""
    rows = []
    for title, asked in record.verdicts(found).items():
        before, after = [one.base for one in asked], [one.adapter for one in asked]
        row: list[Any] = [short(title), len(asked)]
        for passed in (before, after):
            share = record.share(sum(passed), len(passed))
            row += [sum(passed), f"{100 * share.low:.0f} to {100 * share.high:.0f} %"]
        rows.append([*row, *cells_of_change(before, after)])
    head = ["check", "lines", "base", "95 %", "adapter", "95 %", "lost", "won", "p", ""]
    return head, rows


def table_of_replies(found: Record) -> Table:
    """Return how many replies ended, are empty, and are the most frequent one; their length."""
    rows = []
    for source in dict.fromkeys(one.source for one in found.exchanges):
        asked = [one for one in found.exchanges if one.source == source]
        cells: list[Any] = []
        for side in ([one.base for one in asked], [one.adapter for one in asked]):
            words = [len(said.text.split()) for said in side]
            ended = sum(said.ended for said in side)
            same = max(Counter(said.text for said in side).values())
            cells += [ended, words.count(0), same, f"{statistics.fmean(words):.0f}"]
        rows.append([source.replace("_", "-"), len(asked), *cells])
    sides = ["base ended", "empty", "same", "words", "adapter ended", "empty", "same", "words"]
    return ["replies", "prompts", *sides], rows


# ---- On the terminal


def show(section: str, table: Table, most: int = ROWS_SHOWN) -> None:
    """Print a table, if it has rows; of more than fit, say how many stand in report.md."""
    head, rows = table
    if not rows:
        return
    lines = aligned(head, rows)
    if len(rows) > most:
        lines[most:] = [f"... {len(rows) - most + 1} more rows in report.md"]
    say(section, lines)


def print_gain(found: Record) -> None:
    """Print the loss of all held-out replies."""
    if found.lines:
        show("gain", table_of_gain({"(all)": found.lines}))


def about_parts(found: Record) -> str:
    """Return on what the parts are measured, and the gain there."""
    gain = record.gain(record.lines_of_parts(found))
    count = f"the {len(found.measured_on)} of {len(found.lines)} replies"
    return f"The gain on {count} that parts are measured on: {gain.value:+.4f} ({interval(gain)})"


def print_parts(found: Record) -> None:
    """Print what groups of targets and cuts keep; strengths stand beside the change elsewhere."""
    if found.parts:
        say("parts", about_parts(found))
        show("", table_of_parts(found, "group", "cut"))


def print_shifts(found: Record) -> None:
    """Print the strengths, and the change on other tasks."""
    show("strength", table_of_strengths(found))


def print_replies(found: Record) -> None:
    """Print the checks, whether replies ended, and what the mark means."""
    show("checks", table_of_checks(found))
    show("replies", table_of_replies(found))
    say(NOT_CLEAR, LEGEND)


def left_out(found: Record) -> str:
    """Return how many lines and tasks were left out, and where the measurement was stopped."""
    learned = "not known (no learned.txt)" if found.learned is None else found.learned
    stopped = "" if found.finished else f"; stopped after: {', '.join(found.seconds)}"
    return (
        f"lines learned: {learned}, too long: {found.too_long}; "
        f"tasks refused by the template: {found.refused}{stopped}"
    )


# ---- Files


def write(found: Record) -> None:
    """Write report.md, the picture and the page beside the record, and say where."""
    draw(found)
    write_whole(found.folder / "report.md", as_markdown(found))
    sides = {"base": found.on["base"], "adapter": found.adapter}
    write_whole(found.folder / PAGE, page_of(sides, found.system, found.exchanges))
    say("left out", wrapped(left_out(found)))
    say("report", [from_here(found.folder / name) for name in ("report.md", PAGE)])


def as_markdown(found: Record) -> str:
    """Return report.md."""
    about = about_parts(found) if found.parts else ""
    row = "The last row is with the training's system message, and on the base's replies to it. "
    row = row if any(one.system for one in found.shifts) else ""
    elsewhere = (
        f"KL(base || adapter), in nats a token, is on the base's own replies to {len(found.tasks)} "
        f"other tasks; other token: how often the most likely token changes. {row}{about}"
    )
    sections = [
        f"# {escaped(found.adapter)} on {escaped(found.on['base'])}",
        ABOUT,
        f"![gain by kind, strengths, parts]({PICTURE})" if found.lines else "",
        section("Held-out replies", table_of_gain(groups_of(found))),
        section("Strength, and change on other tasks", table_of_strengths(found), elsewhere),
        section(
            "Parts", table_of_parts(found, "group", "target", "cut"), f"Parts overlap. {about}"
        ),
        section("Updates", table_of_updates(found)),
        section("Checks", table_of_checks(found), "\n".join(asked_by_checks(found))),
        section("Replies", table_of_replies(found)),
        *map(markdown_of_exchange, shown_exchanges(found)),
        "## What was measured",
        "\n".join(
            f"- {name}: {escaped(str(fact))}"
            for name, fact in facts_of(found).items()
            if fact != ""
        ),
    ]
    return "\n\n".join(part for part in sections if part) + "\n"


def section(title: str, table: Table, about: str = "", level: str = "##") -> str:
    """Return a section of report.md with a table, or "" if there are no rows."""
    head, rows = table
    if not rows:
        return ""
    cells = [[escaped(str(cell)) for cell in row] for row in [head, *rows]]
    cells.insert(1, ["---"] * len(head))
    lines = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    return "\n\n".join(part for part in (f"{level} {title}", about, lines) if part)


def rule_in_words(rule: dict[str, Any]) -> str:
    """Return what a rule asks of a reply; the phrases that it must hold come first."""
    values = {key: json.dumps(rule[key], ensure_ascii=False) for key in KEYS if key in rule}
    words = {"any": "has one of", "none": "has none of"}
    asked = [(words.get(key, key.replace("_", " ")), text) for key, text in values.items()]
    return "; ".join(f"{word}: {text.strip('[]')}" for word, text in asked)


def asked_by_checks(found: Record) -> list[str]:
    """Return what each check asks for, as lines of report.md."""
    said = []
    for title, asked in record.verdicts(found).items():
        rules = Counter(rule_in_words(one.rule) for one in asked)
        rule, count = rules.most_common(1)[0]
        more = f" (on {count} of {len(asked)} lines)" if len(rules) > 1 else ""
        sides = [one.exchange.base for one in asked], [one.exchange.adapter for one in asked]
        cut, own = (sum(not reply.ended for reply in side) for side in sides)
        cuts = f". Cut, and judged as they stand: {cut} of the base, {own} of the adapter"
        said.append(f"- {escaped(title)}: {escaped(short(rule, 300))}{more}{cuts}")
    return said


def facts_of(found: Record) -> dict[str, Any]:
    """Return what the numbers depend on."""
    asked = [one for one in found.exchanges if one.source != "tasks"]
    settings = found.run.get("settings", {})
    trained = {key: settings[key] for key in TRAINING.split() if key in settings}
    lines, own = (Counter(one.kind or "(no kind)" for one in of) for of in (found.lines, asked))
    return found.on | {
        "training": trained or "not known",
        "kinds of held-out replies": dict(lines),
        "kinds of prompts that were asked": dict(own),
        "system message": found.system or "none",
        "left out": left_out(found),
        "replies cut after": f"{found.max_new_tokens} tokens",
        "seconds": found.seconds,
    }


def shown_exchanges(found: Record) -> list[Exchange]:
    """Return some exchanges of each kind."""
    own = [one for one in found.exchanges if one.source != "tasks"]
    own.sort(key=lambda one: one.kind)
    return own[:: math.ceil(len(own) / REPLIES_SHOWN) or 1]


def markdown_of_exchange(one: Exchange) -> str:
    """Return a prompt with both replies, and the reference, side by side."""
    said = [
        (each.text or "(empty)") + ("" if each.ended else " [cut here]")
        for each in (one.base, one.adapter)
    ]
    if one.reference is not None:
        said.append(one.reference)
    asked = [f"> **{turn['role']}**: {escaped(turn['content'])}" for turn in one.messages]
    title = escaped(f"{Path(one.where).name} {one.kind}")
    table = ["base", "adapter", "reference"][: len(said)], [said]
    return section(title, table, "\n>\n".join(asked), "###")


def escaped(text: str) -> str:
    """Return a text so that Markdown shows it as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", text).replace("\n", "<br>")


def page_of(sides: dict[str, str], system: str, exchanges: list[Exchange]) -> str:
    """Return the page of prompts with the replies of two sides, by name what each is.

    It loads nothing, and whatever is said is text there. A rule stands once for all its lines.
    """
    rules: dict[str, int] = {}
    prompts = []
    for one in exchanges:
        checks = {}
        for name, rule in one.checks.items():
            checks[name] = rules.setdefault(rule_in_words(rule), len(rules))
        prompts.append(vars(one) | {"where": Path(one.where).name, "checks": checks})
    page = {"sides": list(sides.items()), "system": system, "rules": list(rules)}
    data = json.dumps(page | {"prompts": prompts}, default=vars)  # in ASCII alone
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("PAGE-DATA", data.replace("<", "\\u003c"), 1)


# ---- The picture


def draw(found: Record) -> None:
    """Draw the gain by kind and, if it is clear, the strengths and what each part keeps."""
    if not found.lines:
        return
    from matplotlib.figure import Figure

    panels = [draw_gain]
    if record.has_shares(found):
        panels += [draw_strengths, draw_parts] if found.shifts else [draw_parts]
    figure = Figure((4.3 * len(panels), 4.5), dpi=120, layout="constrained")
    for number, panel in enumerate(panels, 1):
        panel(figure.add_subplot(1, len(panels), number), found)
    figure.suptitle(f"{found.adapter} on {found.on['base']}", parse_math=False)
    figure.savefig(found.folder / PICTURE)


def draw_rows(axes: Any, rows: dict[str, Estimate], factor: float, beside: float) -> None:
    """Draw estimates from top to bottom with their intervals, in grey if they are not clear."""
    for place, one in enumerate(rows.values()):
        look = {"fmt": "o", "capsize": 3, "color": "C0" if one.is_clear(beside) else "0.6"}
        axes.errorbar(factor * one.value, place, xerr=factor * (one.high - one.value), **look)
    axes.set_yticks(range(len(rows)), [short(name, 24) for name in rows], parse_math=False)
    axes.invert_yaxis()
    axes.axvline(0, color="0.3", linewidth=1)
    axes.axvline(factor * beside, color="0.3", linewidth=1)
    axes.grid(axis="x", alpha=0.3)


def draw_gain(axes: Any, found: Record) -> None:
    """Draw the gain of all replies and of the first kinds."""
    gains = {f"{kind} ({len(own)})": record.gain(own) for kind, own in groups_of(found).items()}
    known = [one for one in gains.items() if math.isfinite(one[1].high)]
    draw_rows(axes, dict(known[:KINDS_DRAWN]), 1, 0)
    axes.set(title="Gain by kind", xlabel="nats a token, 95 % interval; grey: not clear")


def draw_strengths(axes: Any, found: Record) -> None:
    """Draw the share of the gain against the KL divergence, a point for each strength."""
    shifts, xs, ys = shifts_of(found), [], []
    below, beyond = {"xytext": (6, -4), "va": "top"}, {"xytext": (3, 5), "va": "bottom"}
    for strength, part in strengths_of(found).items():
        share, shift = record.share_of_gain(found, part), shifts.get(strength)
        xs.append(record.ratio(shift.kl, shift.tokens).value if shift else 0.0)
        ys.append(100 * share.value)
        axes.errorbar(xs[-1], ys[-1], 100 * (share.high - share.value), color="C0", capsize=3)
        place = below if ys[-1] == max(ys) else beyond  # beside the curve, which rises, then falls
        axes.annotate(f"x {strength:g}", (xs[-1], ys[-1]), textcoords="offset points", **place)
    axes.plot(xs, ys, "o-", color="C0")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.set(title="Strength", xlabel="KL on other tasks, nats a token", ylabel="% of the gain")


def draw_parts(axes: Any, found: Record) -> None:
    """Draw what parts of the update keep of the gain."""
    parts = [part for part in found.parts if part.kind != "strength"]
    draw_rows(axes, {one.name: record.share_of_gain(found, one) for one in parts}, 100, 1)
    axes.set(title="What each part keeps", xlabel="% of the gain, 95 % interval; grey: not clear")
