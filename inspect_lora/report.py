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
from inspect_lora.statistics import (
    FEWEST_LINES,
    Change,
    Estimate,
    cell,
    interval,
    number,
    percent,
    percents,
    places_of,
    points,
)

Table = tuple[list[str], list[list[Any]]]  # a head, and rows of cells
WIDTH, HEIGHT = 90, 40  # of what is printed: columns beside the section, and lines
CHECKS_TOLD = 3  # among the findings; the table has all
EXCHANGES_SHOWN, OF_A_KIND = 8, 3  # in report.md; the page has all
LONGEST_TEXT = 400  # characters of a reply in report.md
SIDES = ("base", "adapter")
REPLY_COLUMNS = ("ended", "empty", "same", "words")  # what cells_of_replies() returns
TRAINING = "TRAIN_FILE NUM_EPOCHS MAX_STEPS LEARNING_RATE LORA_R LORA_ALPHA SEED FINAL_LORA"
LEGEND = [
    "Losses are in nats per token, and the gain is the base's loss minus the adapter's. Above 0, "
    "these replies became more likely, which in itself helps nobody.",
    "Intervals are about 95 %, for other lines by the same writers in the same mix of kinds; "
    "training with another seed may change more. A change is clear if its interval excludes 0. "
    "Each row is judged alone: of twenty rows without any effect, about one is clear. The best of "
    "several rows, and an adapter whose settings were chosen on these lines, look better than "
    "they are.",
    "Lost and won: replies that pass with the base only, and with the adapter only. Changes of "
    "checks and pairs are in percentage points.",
    "Pairs. Moved: log p(good) - log p(bad) is larger with the adapter than with the base (the "
    "accuracy of DPO's implicit reward). Base and adapter: pairs whose good reply has the higher "
    "log-probability, as a sum over its tokens or as a mean. A tie is counted as not right.",
    "A pair shows which of two replies is likelier, not that the model knows when it is right.",
    "With fewer than twenty lines, changes and pairs have no interval.",
    "Same: replies that are, word for word, the most frequent one.",
    "Cost: how much the loss rises at another strength, without a part, or with fewer directions "
    "of each update. Alone: the gain with all other parts switched off. Parts overlap, so neither "
    "adds up to the whole.",
    "KL(base || adapter), in nats per token, and other token (the most likely token differs) show "
    "how far the model moved on the base's replies to other tasks, not whether it became worse.",
]


def show_all(record: Record, is_old: bool = False) -> None:
    """Print a report, at most 40 lines of 100 columns, and write its files anew; see write()."""
    for section, lines in sections_of(record):
        say(section, lines)
    write(record, is_old)


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
    places = places_of(row.gain)
    text = (
        f"Gain {number(row.gain.value, places, '+')} nats per token (95 % interval "
        f"{interval(row.gain, places)}) on {row.replies} held-out replies: the loss "
        f"{'falls' if row.gain.value > 0 else 'rises'} from {number(row.base, places)} to "
        f"{number(row.adapter, places)}, and is lower on {row.lower_on} of them."
    )
    facts = vars(row) | {"is_clear": row.gain.is_clear()}
    seen = "" if facts["is_clear"] else gain_seen(row.gain)
    return Finding("gain", facts, f"{text} {seen}".strip())


def gain_seen(gain: Estimate) -> str:
    """Return which gain lines like these show, if that is known."""
    seen = stats.smallest_effect_seen(gain)
    shown = f"A true gain of {number(seen, places_of(gain))} would be detected with 80 % power."
    return shown if math.isfinite(seen) else ""


def finding_on_replies(record: Record) -> Finding | None:
    """Return what the replies pass, clear losses and what passes least first, and the pairs."""
    facts: dict[str, Any] = {}
    sentences = []
    changes = {
        title: change
        for title, change in stats.checks(record).items()
        if not title.startswith(stats.TASKS)
    }
    if changes:
        told = [title for title in changes if not changes[title].holds_always]
        told = sorted(told, key=lambda title: not changes[title].is_clear_loss)[:CHECKS_TOLD]
        facts["checks"] = {title: changes[title] for title in told}
        rest = [change for title, change in changes.items() if title not in told]
        sentences.append(checks_in_words(facts["checks"], rest))
    if record.pairs:
        facts["pairs"] = stats.preferences(record.pairs)
        # Kinds that change in opposite ways hide each other in the sum of all pairs.
        facts["changed kinds"] = {}
        for kind, pairs in stats.pairs_by_kind(record.pairs).items():
            change = stats.preferences(pairs).by_sum
            if kind != stats.ALL and change.change.is_clear():
                facts["changed kinds"][kind] = change
        sentences.append(pairs_in_words(facts["pairs"], facts["changed kinds"]))
    return Finding("replies", facts, " ".join(sentences)) if sentences else None


def checks_in_words(told: dict[str, Change], rest: list[Change]) -> str:
    """Return how many replies pass these checks, and the least share that passes another."""
    passed = [
        f"{short(title, 30)} {change.after} of {change.count} (base {change.before})"
        for title, change in told.items()
    ]
    if rest:
        least = math.floor(100 * min(change.after / change.count for change in rest))
        of_base = math.floor(100 * min(change.before / change.count for change in rest))
        replies = "all replies" if least == 100 else f"at least {least} % of replies"
        more = "more " if told else ""
        passed.append(f"{len(rest)} {more}by {replies} (base at least {of_base} %)")
    return f"Checks passed: {', '.join(passed)}."


def pairs_in_words(row: stats.Preferences, changed_kinds: dict[str, Change]) -> str:
    """Return on how many pairs the good reply is preferred, and which kinds clearly change."""
    share = ""
    if row.corrected_share.lines >= FEWEST_LINES:
        share = f" {percents(row.corrected_share)},"
    text = (
        f"In {row.corrected} of {row.pairs} pairs,{share} the adapter moved the odds towards the "
        f"good reply; it finds that reply likelier in {row.by_sum.after} (base "
        f"{row.by_sum.before})."
    )
    kinds = [f"{kind} {points(change.change)} points" for kind, change in changed_kinds.items()]
    return f"{text} Clear changes of the latter: {', '.join(kinds)}." if kinds else text


def finding_on_tasks(record: Record) -> Finding | None:
    """Return what became of other tasks, and which fall so few of them can show."""
    sentences, facts = [], {}
    for title, change in stats.checks(record).items():
        if title.startswith(stats.TASKS):
            facts[title] = change
            sentences.append(
                f"Other {title} {change.after} of the {change.count} with this check (base "
                f"{change.before}), a change of {points(change.change)} points. "
                f"{fall_in_words(change)}"
            )
    if shift := stats.shifts_of(record).get(1.0):
        facts["kl"], facts["changed"] = stats.kl_and_changed(shift)
        sentences.append(
            f"On {len(shift.tokens)} other tasks the most likely token differs at "
            f"{percent(facts['changed'])} of the positions; KL {cell(facts['kl'])} nats per token."
        )
    return Finding("elsewhere", facts, " ".join(sentences)) if sentences else None


def fall_in_words(change: Change) -> str:
    """Return which fall would be seen; often the base passes too few for any."""
    if change.can_show_a_fall:
        return f"A fall of {seen_points(change)} points would be detected with 80 % power."
    return (
        f"They can hardly show a fall: 80 % power needs one of {seen_points(change)} points, and "
        f"the base has only {100 * change.before / change.count:.0f} to lose."
    )


def seen_points(change: Change) -> str:
    """Return the change, in percentage points, that is detected with 80 % power."""
    return f"{100 * stats.smallest_change_seen(change.change.lines):.0f}"


def finding_on_trust(record: Record) -> Finding | None:
    """Return what lowers the trust in these numbers."""
    reasons: dict[str, str] = {}
    if is_chosen_by_these_lines(record):
        reasons["best"] = (
            'the checkpoint was chosen by its loss on these very lines (FINAL_LORA "best"), so the '
            "gain looks larger than it is"
        )
    if record.learned is None:
        reasons["learned"] = (
            "it is not known whether it was trained on some of these lines (no learned.txt)"
        )
    counts = {
        "held-out lines": len({line.cluster for line in record.lines}),
        "pairs": len({pair.cluster for pair in record.pairs}),
    }
    few = [f"{count} {name}" for name, count in counts.items() if 0 < count < FEWEST_LINES]
    if few:
        reasons["few"] = (
            f"{' and '.join(few)} are too few for a conclusion (fewer than {FEWEST_LINES})"
        )
    judged = [exchange for exchange in record.exchanges if exchange.checks]
    cut = [sum(not getattr(exchange, side).ended for exchange in judged) for side in SIDES]
    if any(cut):
        reasons["cut"] = (
            f"{cut[1]} of {len(judged)} judged replies (base {cut[0]}) were cut off after "
            f"{record.max_new_tokens} tokens, and judged as they stand"
        )
    if not record.finished:
        measured = ", ".join(record.seconds) or "nothing"
        reasons["stopped"] = f"the measurement was stopped; it has: {measured}"
    elif not record.lines:
        reasons["prompts"] = "prompts without reference replies have no loss"
    text = f"Caution: {'; '.join(reasons.values())}."
    return Finding("trust", reasons, text) if reasons else None


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
        places = places_of(row.gain)
        losses = [number(row.base, places), number(row.adapter, places)]
        rows.append([name, row.replies, *losses, cell(row.gain, "+", places), row.lower_on])
    return ["held-out", "replies", "base", "adapter", "gain, 95 %", "lower on"], rows


def about_gain(record: Record) -> str:
    """Return how evenly the replies weigh, and what could have been seen."""
    clusters = [line.cluster for line in record.lines]
    tokens = [line.tokens for line in record.lines]
    return (
        f"The {len(tokens)} replies are from {len(set(clusters))} lines without known ties, and "
        f"carry the weight of {stats.effective_number(tokens, clusters):.0f} of equal length; the "
        f"longest has {percent(max(tokens) / sum(tokens))} of the tokens. "
        f"{gain_seen(stats.gain(record.lines))}"
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
    kinds = [exchange.kind for exchange in record.exchanges if exchange.source != "tasks"]
    return (
        f"Prompts: {counted(kinds, sum(record.asked_of.values()))}. With fewer than "
        f"{stats.FEWEST_NET_CHANGES} net changes no interval excludes 0. Seen from: the change, in "
        "points, that is detected with 80 % power if replies change one way only. No check can "
        "fall by more than the base passes, or rise by more than it fails."
    )


def counted(kinds: list[str], whole: int = 0) -> str:
    """Return how many there are, of how many if that is known, and of each kind, most first."""
    counts = Counter(kind or stats.NO_KIND for kind in kinds).most_common()
    total = f"{len(kinds)} of {whole}" if whole else f"{len(kinds)}"
    by_kind = ", ".join(f"{count} {kind}" for kind, count in counts)
    return f"{total} ({by_kind})" if len(counts) > 1 else total


def table_of_preferences(record: Record) -> Table:
    """Return which of two replies base and adapter prefer, by kind and by the longer reply."""
    rows = []
    groups = stats.pairs_by_kind(record.pairs) | stats.pairs_by_length(record.pairs)
    for name, pairs in groups.items():
        row = stats.preferences(pairs)
        share, sums, means = row.corrected_share, row.by_sum, row.by_mean
        moved = f"{row.corrected} of {row.pairs}"
        if share.lines >= FEWEST_LINES:
            moved = percents(share)
        counts = [sums.before, sums.after, sums.lost, sums.won, points(sums.change)]
        rows.append([short(name), row.pairs, moved, *counts, means.before, means.after])
    sums = ["base", "adapter", "lost", "won", "change, 95 %"]
    return ["prefers", "pairs", "moved, 95 %", *sums, "base, mean", "adapter, mean"], rows


def table_of_strengths(record: Record) -> Table:
    """Return what each strength gains, and how far it moves the model elsewhere."""
    rows = []
    for row in stats.strengths(record):
        losses, kls = places_of(row.gain, row.cost), places_of(row.kl, row.kl_change)
        cells = [cell(row.gain, "+", losses), cell(row.cost, "+", losses)]
        cells += [cell(row.kl, "", kls), cell(row.kl_change, "+", kls)]
        rows.append([row.name, *cells, "" if row.changed is None else percent(row.changed)])
    head = ["strength", "gain, 95 %", "cost, 95 %", "KL, 95 %", "change of KL, 95 %", "other token"]
    return without_empty_columns((head, rows))


def without_empty_columns(table: Table) -> Table:
    """Return a table without the columns in which nothing stands."""
    head, rows = table
    kept = [place for place in range(len(head)) if any(row[place] != "" for row in rows)]
    return [head[place] for place in kept], [[row[place] for place in kept] for row in rows]


def about_strengths(record: Record) -> str:
    """Return what strengths are measured on, and what the last row is."""
    sentences = []
    if record.parts:
        lines = stats.lines_of_parts(record)
        kinds = counted([line.kind for line in lines], len(record.lines))
        sentences.append(f"Gain and cost are on held-out replies, drawn by kind: {kinds}.")
    if record.shifts:
        tasks = f"the base's replies to {len(record.tasks)} other tasks"
        sentences.append(f"KL and other token are on {tasks}.")
    return " ".join(sentences)


def about_parts(record: Record) -> str:
    """Return on how many lines the parts are measured, and the gain there."""
    lines = stats.lines_of_parts(record)
    gain = cell(stats.gain(lines), "+")
    return f"Measured on the same {len(lines)} replies, whose gain is {gain}."


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
            cells += [cell(estimate, "+", places_of(row.cost, row.alone)), share]
        rows.append(cells)
    return without_empty_columns(
        (["part", "cost, 95 %", "of gain", "alone, 95 %", "of gain"], rows)
    )


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


def about_replies(record: Record) -> str:
    """Return which replies stand below the table."""
    return (
        f"Below the table stand at most {EXCHANGES_SHOWN} prompts, {OF_A_KIND} of a kind: one "
        "whose reply fails a check, one whose reply passes all, and a third. "
        f"{PAGE} has all prompts."
    )


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
        tell("picture", f"not drawn, since {error.name} is not installed")
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
        section("Replies", record, table_of_replies, about_replies),
        *(markdown_of_exchange(record, exchange) for exchange in shown_exchanges(record)),
        section("Strength, and other tasks", record, table_of_strengths, about_strengths),
        section("Parts", record, table_of_parts, about_parts),
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
    left_out = f"seen in training {learned}, too long {record.too_long}"
    return {
        "training": ", ".join(trained) or "not known",
        "kinds of held-out replies": counted([line.kind for line in record.lines]),
        "system message": record.system or "none",
        "left out": f"{left_out}, refused by the chat template {record.refused}",
        "replies cut off after": f"{record.max_new_tokens} tokens",
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
        cut = "" if reply.ended else f" [cut off after {reply.tokens} tokens]"
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
