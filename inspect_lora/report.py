"""What is shown of a record: the findings first, then tables, on the terminal and in report.md.

All of it is made from evidence.json, in seconds and without the model, also where the measurement
was stopped. A number stands with its 95 % interval, and without a sentence of judgement.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from inspect_lora import statistics as stats
from inspect_lora.common import aligned, from_here, one_line, say, short, tell, wrapped, write_whole
from inspect_lora.page import PAGE, page_of, prompts_of
from inspect_lora.picture import PICTURE, draw
from inspect_lora.record import Exchange, Record, Reply
from inspect_lora.statistics import FEWEST_LINES, Change, Estimate

Table = tuple[list[str], list[list[Any]]]  # a head, and rows of cells
WIDTH, HEIGHT = 90, 40  # of what is printed: columns beside the section, and lines
CHECKS_TOLD = 3  # among the findings; the table has all
EXCHANGES_SHOWN, OF_A_KIND = 8, 3  # in report.md; the page has all
LONGEST_TEXT = 400  # characters of a reply in report.md
SIDES = ("base", "adapter")
REPLY_COLUMNS = ("ended", "empty", "same", "words")  # what cells_of_replies() returns
TRAINING = "TRAIN_FILE NUM_EPOCHS MAX_STEPS LEARNING_RATE LORA_R LORA_ALPHA SEED FINAL_LORA"
LEGEND = [
    "Losses are in nats a token; gain: the base's loss minus the adapter's. Above 0 these replies "
    "became likelier, which helps nobody by itself.",
    "Intervals are about 95 %, for other lines of the same writers in the same mix of kinds; "
    "another seed of the training may change more. Of twenty rows without any effect about one has "
    "an interval that leaves 0 out. The best of several rows, and an adapter whose settings were "
    "chosen by these lines, look better than they are.",
    "Lost, won: what passes with the base only, with the adapter only. Changes of checks and pairs "
    "are in percentage points.",
    "Cost: the rise of the loss at another strength, without a part, or with fewer directions; "
    "alone: the gain with all other parts switched off. Parts overlap.",
    "KL(base || adapter), in nats a token, and other token (where the likeliest one changes) say "
    "how far the model moved on the base's replies to other tasks, not that it became worse.",
    "Pairs, moved: log p(good) - log p(bad) is larger than the base's (the accuracy of DPO's "
    "implicit reward). Base, adapter: the good reply has more log-probability in all, or a token "
    "(mean). A tie is not right. Fewer than twenty pairs have no interval.",
    "Same: the replies that are, word for word, the most frequent one.",
]


def show_all(record: Record, is_old: bool = False) -> None:
    """Print a report, at most 40 lines of 100 columns, and write its files anew; see write()."""
    for section, lines in sections_of(record):
        say(section, lines)
    write(record, is_old)


# ---- Numbers


def decimals(half_width: float) -> int:
    """Return after how many decimals a number is rounded: two, or more if it is known better."""
    if not 0 < half_width < math.inf:
        return 2
    return min(4, max(2, math.ceil(-math.log10(half_width))))


def number(value: float, half_width: float = 0.0, sign: str = "") -> str:
    """Return a number, such as 3.82; with the sign "+", +0.80."""
    text = f"{value:{sign}.{decimals(half_width)}f}"
    return text if text.strip("+-0.") else text.lstrip("+-")  # no -0.00


def interval(estimate: Estimate) -> str:
    """Return an interval; its ends are not known where it rests on one line."""
    if not math.isfinite(estimate.low):
        return "?"
    half_width = (estimate.high - estimate.low) / 2
    return " to ".join(number(end, half_width) for end in (estimate.low, estimate.high))


def cell(estimate: Estimate | None, sign: str = "") -> str:
    """Return a number with its interval, such as +0.80 (0.75 to 0.86)."""
    if estimate is None:
        return ""
    half_width = (estimate.high - estimate.low) / 2
    return f"{number(estimate.value, half_width, sign)} ({interval(estimate)})"


def points(change: Estimate) -> str:
    """Return a change in percentage points with its interval, such as +20 (9 to 35)."""
    value, low, high = (round(100 * end) for end in (change.value, change.low, change.high))
    return f"{value:+d} ({low} to {high})" if value else f"0 ({low} to {high})"


def percent(value: float) -> str:
    """Return a share in whole per cents."""
    return f"{round(100 * value)} %"  # an integer has no -0


# ---- The findings


@dataclass(frozen=True)
class Finding:
    """A line that a report begins with: what it tells, and with which numbers."""

    name: str  # "gain", "replies", "elsewhere" or "trust"
    facts: dict[str, Any]
    text: str


def findings(record: Record) -> list[Finding]:
    """Return at most four lines: the gain, checks and pairs, other tasks, and what to mistrust."""
    made = (finding_on_gain, finding_on_replies, finding_on_tasks, finding_on_trust)
    return [finding for finding_on in made if (finding := finding_on(record))]


def finding_on_gain(record: Record) -> Finding | None:
    """Return what became of the loss; where that is not clear, what could have been seen."""
    if not record.lines:
        return None
    row = stats.gains(record)[0]
    text = (
        f"Gain {number(row.gain.value, row.gain.high - row.gain.value, '+')} nats a token (95 % "
        f"interval {interval(row.gain)}) on {row.replies} held-out replies: the loss "
        f"{'falls' if row.gain.value > 0 else 'rises'} from {row.base:.2f} to {row.adapter:.2f}, "
        f"and is lower on {row.lower_on}."
    )
    facts = vars(row) | {"is_clear": row.gain.is_clear()}
    seen = "" if facts["is_clear"] else seen_in_words(row.gain)
    return Finding("gain", facts, f"{text} {seen}".strip())


def seen_in_words(gain: Estimate) -> str:
    """Return which gain lines like these show, if that is known."""
    seen = stats.smallest_effect_seen(gain)
    shown = f"A gain of {number(seen, seen)} would be seen in 80 % of draws of such lines."
    return shown if math.isfinite(seen) else ""


def finding_on_replies(record: Record) -> Finding | None:
    """Return what the replies pass, clear losses and what passes least first, and the pairs."""
    changes = {
        title: change
        for title, change in stats.checks(record).items()
        if not title.startswith(stats.TASKS)
    }
    order = sorted(changes, key=lambda title: changes[title].after / changes[title].count)
    order.sort(key=lambda title: not changes[title].is_clear_loss)
    facts: dict[str, Any] = {"checks": {title: changes[title] for title in order[:CHECKS_TOLD]}}
    sentences = []
    if order:
        counts = [
            f"{short(title, 30)} {in_words(change)}" for title, change in facts["checks"].items()
        ]
        rest = [changes[title].after / changes[title].count for title in order[CHECKS_TOLD:]]
        least = math.floor(100 * min(rest, default=0))
        share = "all lines" if least == 100 else f"at least {least} % of the lines"
        remaining = f"; {len(rest)} more on {share}" if rest else ""
        sentences.append(f"Checks passed: {', '.join(counts)}{remaining}.")
    if record.pairs:
        facts["pairs"] = stats.preferences(record.pairs)
        # Kinds that change in opposite ways hide each other in the sum of all pairs.
        changes_by_kind = {
            kind: stats.preferences(pairs).by_sum
            for kind, pairs in stats.pairs_by_kind(record.pairs).items()
            if kind != stats.ALL
        }
        facts["changed kinds"] = {
            kind: change for kind, change in changes_by_kind.items() if change.change.is_clear()
        }
        sentences.append(pairs_in_words(facts["pairs"]))
        if facts["changed kinds"]:
            shown = [
                f"{kind} {points(change.change)} points"
                for kind, change in facts["changed kinds"].items()
            ]
            sentences.append(f"By kind: {', '.join(shown)}.")
    return Finding("replies", facts, " ".join(sentences)) if sentences else None


def in_words(change: Change) -> str:
    """Return how many replies pass, and how many of the base's."""
    return f"{change.after} of {change.count} (base {change.before})"


def pairs_in_words(row: stats.Preferences) -> str:
    """Return on how many pairs the good reply is preferred; of fewer than twenty no interval."""
    share = row.corrected_share
    ends = f" ({percent(share.value)}, {100 * share.low:.0f} to {100 * share.high:.0f})"
    return (
        f"Of {row.pairs} pairs the adapter moved towards the good reply in {row.corrected}"
        f"{ends if share.lines >= FEWEST_LINES else ''}, and finds it likelier in "
        f"{row.by_sum.after} (base {row.by_sum.before})."
    )


def finding_on_tasks(record: Record) -> Finding | None:
    """Return what became of other tasks, and what so few of them can tell."""
    sentences, facts = [], {}
    for title, change in stats.checks(record).items():
        if title.startswith(stats.TASKS):
            facts[title] = change
            sentences.append(
                f"Other {title} {in_words(change)}, {points(change.change)} points; in 80 % of "
                f"draws so few show a change of {seen_points(change)} points or more."
            )
    whole = [row for row in stats.strengths(record) if row.strength == 1 and row.kl]
    if whole:
        facts |= {"kl": whole[0].kl, "changed": whole[0].changed}
        sentences.append(
            f"On other tasks the likeliest token changes at {percent(whole[0].changed)} of the "
            f"positions (KL {number(whole[0].kl.value)}, {interval(whole[0].kl)})."
        )
    return Finding("elsewhere", facts, " ".join(sentences)) if sentences else None


def seen_points(change: Change) -> str:
    """Return the change, in percentage points, that so many lines show in 80 % of draws."""
    return f"{100 * stats.smallest_change_seen(change.change.lines):.0f}"


def finding_on_trust(record: Record) -> Finding | None:
    """Return what lowers the trust in these numbers."""
    reasons: dict[str, str] = {}
    if is_chosen_by_these_lines(record):
        reasons["best"] = (
            'the checkpoint was chosen by the loss on these lines (FINAL_LORA "best"), so the gain '
            "looks larger than it is"
        )
    if record.learned is None:
        reasons["learned"] = "whether it learned some of these lines is not known (no learned.txt)"
    counts = {
        "held-out lines": len({line.cluster for line in record.lines}),
        "pairs": len({pair.cluster for pair in record.pairs}),
    }
    few = [f"{count} {name}" for name, count in counts.items() if 0 < count < FEWEST_LINES]
    if few:
        reasons["few"] = f"{' and '.join(few)} are fewer than {FEWEST_LINES}: no verdict"
    judged = [exchange for exchange in record.exchanges if exchange.checks]
    cut = [sum(not getattr(exchange, side).ended for exchange in judged) for side in SIDES]
    if any(cut):
        reasons["cut"] = (
            f"{cut[1]} of {len(judged)} judged replies (base {cut[0]}) were cut after "
            f"{record.max_new_tokens} tokens, and are judged as they stand"
        )
    if not record.finished:
        reasons["stopped"] = f"it was stopped after: {', '.join(record.seconds) or 'nothing'}"
    elif not record.lines:
        reasons["prompts"] = "prompts without replies have no loss"
    return Finding("trust", reasons, f"Mind: {'; '.join(reasons.values())}.") if reasons else None


def is_chosen_by_these_lines(record: Record) -> bool:
    """Return whether the training kept the checkpoint that has the lowest loss on these lines."""
    held_out = record.run.get("data", {}).get("held_out") or {}
    measured = record.conditions.get("eval_file") or {}
    is_best = record.run.get("settings", {}).get("FINAL_LORA") == "best"
    return is_best and held_out.get("sha256") == measured.get("sha256")


def estimates(record: Record) -> dict[str, Any]:
    """Return all that a report tells, as JSON has it; an end of an interval may be null."""
    values = {
        "adapter": record.adapter,
        "base": record.conditions["base"],
        "finished": record.finished,
        "findings": findings(record),
        "gain": stats.gains(record),
        "checks": stats.checks(record),
        "prefers": {
            name: stats.preferences(pairs)
            for group_by in (stats.pairs_by_kind, stats.pairs_by_length)
            for name, pairs in group_by(record.pairs).items()
        },
        "strengths": stats.strengths(record),
        "parts": stats.part_effects(record),
    }
    return as_plain(values)


def as_plain(value: Any) -> Any:
    """Return dataclasses as dictionaries, and numbers that are not finite as None."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: as_plain(held) for name, held in value.items()}
    if isinstance(value, list):
        return [as_plain(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- Tables


def table_of_gain(record: Record) -> Table:
    """Return the losses of all held-out replies, and of each kind."""
    rows = []
    for row in stats.gains(record):
        name = short(row.kind) + (" (not trained)" if row.is_trained is False else "")
        losses = [f"{row.base:.2f}", f"{row.adapter:.2f}"]
        rows.append([name, row.replies, *losses, cell(row.gain, "+"), row.lower_on])
    return ["held-out", "replies", "base", "adapter", "gain, 95 %", "lower on"], rows


def about_gain(record: Record) -> str:
    """Return how evenly the replies weigh, and what could have been seen."""
    clusters = [line.cluster for line in record.lines]
    tokens = [line.tokens for line in record.lines]
    return (
        f"The {len(tokens)} replies are of {len(set(clusters))} independent lines, and weigh as "
        f"{stats.effective_number(tokens, clusters):.0f} of equal length would; the longest has "
        f"{percent(max(tokens) / sum(tokens))} of the tokens. "
        f"{seen_in_words(stats.gain(record.lines))}"
    )


def table_of_checks(record: Record) -> Table:
    """Return how many replies pass each check, how that changes, and what could be seen."""
    rows = []
    for title, row in stats.checks(record).items():
        flips = [row.lost, row.won, points(row.change), seen_points(row)]
        rows.append([short(title, 30), row.count, row.before, row.after, *flips])
    head = ["check", "lines", "base", "adapter", "lost", "won", "change, 95 %", "seen from"]
    return head, rows


def about_checks(record: Record) -> str:
    """Return which prompts were asked, and what could have been seen at all."""
    asked = counted([each.kind for each in record.exchanges if each.source != "tasks"])
    whole = sum(record.asked_of.values())
    return (
        f"Asked: {asked}{f', of {whole} prompts' if whole else ''}. Fewer than "
        f"{stats.FEWEST_NET_CHANGES} net changes cannot be clear here. If lines turn one "
        'way only, 80 % of draws of so many show a change of the points under "seen from".'
    )


def counted(kinds: list[str]) -> str:
    """Return how many there are of each kind, the most first."""
    counts = Counter(kind or stats.NO_KIND for kind in kinds).most_common()
    return f"{len(kinds)}" + (
        f" ({', '.join(f'{count} {kind}' for kind, count in counts)})" if len(counts) > 1 else ""
    )


def table_of_preferences(record: Record) -> Table:
    """Return which of two replies base and adapter prefer, by kind and by the longer reply."""
    rows = []
    groups = stats.pairs_by_kind(record.pairs) | stats.pairs_by_length(record.pairs)
    for name, pairs in groups.items():
        row = stats.preferences(pairs)
        share, sums, means = row.corrected_share, row.by_sum, row.by_mean
        moved, change = f"{row.corrected} of {row.pairs}", f"{sums.won - sums.lost:+d}"
        if share.lines >= FEWEST_LINES:
            moved = f"{percent(share.value)} ({100 * share.low:.0f} to {100 * share.high:.0f})"
            change = points(sums.change)
        counts = [sums.before, sums.after, sums.lost, sums.won, change]
        rows.append([short(name), row.pairs, moved, *counts, means.before, means.after])
    sums = ["base", "adapter", "lost", "won", "change, 95 %"]
    return ["prefers", "pairs", "moved, 95 %", *sums, "base, mean", "adapter, mean"], rows


def table_of_strengths(record: Record) -> Table:
    """Return what each strength gains, and how far it moves the model elsewhere."""
    strengths = stats.strengths(record)
    rows = [
        [
            row.name,
            cell(row.gain, "+"),
            cell(row.cost, "+"),
            cell(row.kl),
            cell(row.kl_change, "+"),
            "" if row.changed is None else percent(row.changed),
        ]
        for row in strengths
    ]
    head = ["strength", "gain, 95 %", "cost, 95 %", "KL, 95 %", "change of KL, 95 %", "other token"]
    return without_empty_columns((head, rows))


def without_empty_columns(table: Table) -> Table:
    """Return a table without the columns in which nothing stands."""
    head, rows = table
    kept = [place for place in range(len(head)) if any(row[place] != "" for row in rows)]
    return [head[place] for place in kept], [[row[place] for place in kept] for row in rows]


def about_strengths(record: Record) -> str:
    """Return what strengths are measured on, and what the last row is."""
    parts = f"{about_parts(record)} " if record.parts else ""
    tasks = f"KL and other token are on the base's replies to {len(record.tasks)} other tasks. "
    system = "The last row has the training's system message, and other replies."
    has_system = any(shift.system for shift in record.shifts)
    return parts + (tasks if record.shifts else "") + (system if has_system else "")


def about_parts(record: Record) -> str:
    """Return on which lines the parts are measured, and the gain there."""
    lines = stats.lines_of_parts(record)
    kinds = counted([line.kind for line in lines])
    gain = cell(stats.gain(lines), "+")
    return f"Measured on {kinds} of {len(record.lines)} replies, where the gain is {gain}."


def table_of_parts(record: Record) -> Table:
    """Return what each part costs if it is removed, and what it gains alone.

    Per cents of the gain stand there only if its lower end is above half of it.
    """
    whole = stats.gain_for_shares(record)
    rows = []
    for row in stats.part_effects(record):
        cells = [short(row.name, 30)]
        for estimate in (row.cost, row.alone):
            share = percent(estimate.value / whole) if estimate and whole else ""
            cells += [cell(estimate, "+"), share]
        rows.append(cells)
    return without_empty_columns(
        (["part", "cost, 95 %", "of gain", "alone, 95 %", "of gain"], rows)
    )


def table_of_updates(record: Record) -> Table:
    """Return how large the updates of each target are beside their weights."""
    rows = []
    for target, sizes in record.updates.items():
        mean, largest = (f"{100 * size:.1f} %" for size in (fmean(sizes), max(sizes)))
        rows.append([target, len(sizes), mean, largest])
    return ["target", "modules", "|update| / |W|, mean", "largest"], rows


def table_of_replies(record: Record) -> Table:
    """Return how many replies ended, are empty or the most frequent one, and their length."""
    rows = []
    for source in dict.fromkeys(exchange.source for exchange in record.exchanges):
        asked = [exchange for exchange in record.exchanges if exchange.source == source]
        row: list[Any] = [source.replace("_", "-"), len(asked)]
        for side in SIDES:
            row += cells_of_replies([getattr(exchange, side) for exchange in asked])
        rows.append(row)
    names = [f"{side} {column}" for side in SIDES for column in REPLY_COLUMNS]
    return without_empty_columns((["replies", "prompts", *names], rows))


def cells_of_replies(replies: list[Reply]) -> list[Any]:
    """Return how these replies are; the words of cut ones are a lower bound."""
    words = [len(reply.text.split()) for reply in replies]
    ended = sum(reply.ended for reply in replies)
    same = max(Counter(reply.text for reply in replies).values())
    length = f"{fmean(words):.0f}" if ended == len(replies) else f"at least {fmean(words):.0f}"
    return [ended, words.count(0) or "", same, length]


# ---- On the terminal


def sections_of(record: Record) -> list[tuple[str, list[str]]]:
    """Return what is printed: the findings, and of each table its part of the room that is left."""
    lines = [line for finding in findings(record) for line in wrapped(finding.text, WIDTH)]
    tables = {
        "gain": table_of_gain(record),
        "checks": table_of_checks(record),
        "prefers": table_of_preferences(record),
        "strength": table_of_strengths(record),
        "parts": table_of_parts(record),
    }
    sections = [("found", lines)]
    for left, (name, table) in zip(range(len(tables), 0, -1), tables.items(), strict=True):
        room = HEIGHT - sum(len(lines) for _, lines in sections)
        sections.append((name, lines_of(table, room // left)))
    return [(name, lines) for name, lines in sections if lines]


def lines_of(table: Table, most: int) -> list[str]:
    """Return a table as at most so many lines, without the last columns if it is too wide."""
    head, rows = table
    if not rows:
        return []
    while max(map(len, aligned(head, rows))) > WIDTH:
        head, rows = head[:-1], [row[:-1] for row in rows]
    lines = aligned(head, rows)
    if len(lines) > most:
        lines[most - 1 :] = [f"... {len(lines) - most + 1} more rows in report.md"]
    return lines


def show(section: str, table: Table, most: int = 100) -> None:
    """Print a table, if it has rows."""
    if lines := lines_of(table, most):
        say(section, lines)


# ---- Files


def write(record: Record, is_old: bool = False) -> None:
    """Write report.md, the picture and the page beside the record, and say where.

    Without matplotlib the picture that is there stays if the record is old, that is, unchanged.
    """
    try:
        draw(record)
    except ModuleNotFoundError as error:
        if not is_old:
            (record.folder / PICTURE).unlink(missing_ok=True)
        tell("picture", f"is not drawn, since {error.name} is not installed")
    write_whole(record.folder / "report.md", as_markdown(record))
    sides = [("base", record.conditions["base"]), ("adapter", record.adapter)]
    write_whole(record.folder / PAGE, page_of(sides, record.system, prompts_of(record.exchanges)))
    tell("report", [from_here(record.folder / name) for name in ("report.md", PAGE)])


def as_markdown(record: Record) -> str:
    """Return report.md."""
    first = "\n".join(f"- {escaped(finding.text)}" for finding in findings(record))
    sections = [
        f"# {escaped(record.adapter)} on {escaped(record.conditions['base'])}",
        first,
        f"![What {escaped(record.adapter)} does and does not do]({PICTURE})"
        if (record.folder / PICTURE).exists()
        else "",
        section("Checks", record, table_of_checks, about_checks),
        section("Pairs", record, table_of_preferences),
        section("Held-out replies", record, table_of_gain, about_gain),
        section("Strength, and other tasks", record, table_of_strengths, about_strengths),
        section("Parts", record, table_of_parts, about_parts),
        section("Updates", record, table_of_updates),
        section("Replies", record, table_of_replies),
        *(markdown_of_exchange(record, exchange) for exchange in shown_exchanges(record)),
        "## What was measured",
        "\n".join(f"- {name}: {escaped(fact)}" for name, fact in facts_of(record).items() if fact),
        "## How to read it",
        "\n".join(f"- {escaped(sentence)}" for sentence in LEGEND),
    ]
    return "\n\n".join(part for part in sections if part) + "\n"


def section(
    title: str,
    record: Record,
    table_of: Callable[[Record], Table],
    about: Callable[[Record], str] | None = None,
) -> str:
    """Return a section of report.md with a table, or "" if there are no rows."""
    head, rows = table_of(record)
    if not rows:
        return ""
    lines = [[escaped(str(cell)) for cell in row] for row in [head, *rows]]
    lines.insert(1, ["---", *["--:"] * (len(head) - 1)])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    above = [f"## {title}", escaped(about(record))] if about else [f"## {title}"]
    return "\n\n".join([*above, text])


def facts_of(record: Record) -> dict[str, str]:
    """Return what the numbers depend on."""
    conditions, settings = record.conditions, record.run.get("settings", {})
    trained = [f"{key} {settings[key]}" for key in TRAINING.split() if key in settings]
    files = {
        name.replace("_", " "): f"{fact['file']} (SHA-256 {fact['sha256'][:8]})"
        for name, fact in conditions.items()
        if isinstance(fact, dict) and "sha256" in fact
    }
    plain = {name: str(fact) for name, fact in conditions.items() if not isinstance(fact, dict)}
    learned = "not known" if record.learned is None else record.learned
    return {
        "training": ", ".join(trained) or "not known",
        "kinds of held-out replies": counted([line.kind for line in record.lines]),
        "system message": record.system or "none",
        "left out": f"learned {learned}, too long {record.too_long}, refused {record.refused}",
        "replies cut after": f"{record.max_new_tokens} tokens",
        **files,
        **plain,
    }


def shown_exchanges(record: Record) -> list[Exchange]:
    """Return at most eight exchanges, three of a kind: those that fail a check and those that pass.

    The kinds take turns, the one whose replies fail most often first: a reply that fails, one that
    passes, and a third. Within a kind the order is that of the file.
    """
    by_kind: dict[str, list[Exchange]] = {}
    for exchange in record.exchanges:
        if exchange.source != "tasks":
            by_kind.setdefault(exchange.kind, []).append(exchange)
    shown: list[tuple[int, float, Exchange]] = []  # with its turn, and how often its kind passes
    for exchanges in by_kind.values():
        failing = [exchange for exchange in exchanges if fails(exchange)]
        passing = [exchange for exchange in exchanges if not fails(exchange)]
        turns = [*failing[:1], *passing[:1], *failing[1:], *passing[1:]][:OF_A_KIND]
        passed = len(passing) / len(exchanges)
        shown += [(turn, passed, exchange) for turn, exchange in enumerate(turns)]
    shown = sorted(shown, key=lambda entry: entry[:2])[:EXCHANGES_SHOWN]
    return [exchange for *_, exchange in sorted(shown, key=lambda entry: (entry[1], entry[2].kind))]


def fails(exchange: Exchange) -> bool:
    """Return whether the adapter's reply fails a check."""
    return not all(exchange.adapter.passes.values())


def markdown_of_exchange(record: Record, exchange: Exchange) -> str:
    """Return the end of a prompt with both replies and the reference, and what they pass."""
    texts = {}
    for side in SIDES:
        reply = getattr(exchange, side)
        signs = [f"{'✓' if passed else '✗'} {name}" for name, passed in reply.passes.items()]
        text = one_line(reply.text, LONGEST_TEXT) or "(empty)"
        cut = "" if reply.ended else f" [cut after {reply.tokens} tokens]"
        texts[": ".join([side, *([", ".join(signs)] if signs else [])])] = text + cut
    texts |= {"reference": exchange.reference, "the bad one of the pair": exchange.rejected}
    lines = [f"- *{escaped(name)}*: {escaped(text)}" for name, text in texts.items() if text]
    messages = [turn for turn in exchange.messages if turn["content"] != record.system]
    earlier = f"({len(messages) - 1} earlier messages) " if len(messages) > 1 else ""
    where = escaped(f"{Path(exchange.where).name} {exchange.kind}".strip())
    asked = f"> {earlier}{escaped(messages[-1]['content'])}"
    return "\n\n".join([f"### {where}", asked, "\n".join(lines)])


def escaped(text: str) -> str:
    """Return a text so that Markdown shows it as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", text).replace("\n", "<br>")
