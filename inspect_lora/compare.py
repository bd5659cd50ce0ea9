"""Several reports side by side: on the same replies, by the same rules.

Each record is cut down to what all of them have, and results_of() gives the numbers of each run;
comparison.py makes rows of them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from inspect_lora.common import (
    InspectError,
    from_here,
    say,
    short,
    some,
    tell,
    wrapped,
    write_whole,
)
from inspect_lora.comparison import (
    Comparison,
    LeftOut,
    Records,
    Row,
    change_of_two,
    conclusion_of,
    rows_of,
)
from inspect_lora.page import PAGE, PagePrompt, Side, page_of, prompts_of
from inspect_lora.readings import agreements_of, read_readings
from inspect_lora.record import FILE, Exchange, Line, Record, read_record
from inspect_lora.results import Results, as_plain
from inspect_lora.tables import (
    Table,
    as_text,
    cell,
    halves,
    number,
    p_value,
    percents,
    points,
    readings_table,
)

SCHEMA = 3  # of --json
WIDTH = 90
SAME_BASE = 0.01  # nats per token that the losses of one base may be apart, on average
Entry = TypeVar("Entry")


def run(options: argparse.Namespace) -> None:
    """Compare the adapters of a command line."""
    compare(options.folders, Path(options.output_dir), options.json, options.reading)


def compare(
    folders: list[str], output_dir: Path, as_json: bool = False, readings: Sequence[str] = ()
) -> None:
    """Print the tables, and write the page of all adapters."""
    records, unread = read_all(folders)
    newest, older = newest_of(records)
    whole, apart = comparable(newest)
    tell_left_out([*unread, *older, *apart])
    if len(whole) < 2:
        raise InspectError(f"Fewer than two reports to compare in {', '.join(folders)}.")
    shared, without_kl = with_the_same_tasks(shared_of(whole))
    unshared = [*without_kl, *unshared_checks(whole, shared)]
    tell_left_out(unshared)
    rows, spread = rows_of(shared)
    names = [run.adapter for row in rows for run in row.runs]
    sides, prompts = sides_of(shared, names), prompts_of_all([shared[name] for name in names])
    read = tuple(read_readings(readings, sides, prompts))
    comparison = Comparison(
        rows=rows,
        conclusion=tuple(conclusion_of(rows, spread, shared)),
        seeds=spread,
        change=change_of_two(rows, shared),
        readings=read,
        agreements=tuple(agreements_of(read)),
        left_out=(*unread, *older, *apart, *unshared),
    )
    if as_json:
        print(json.dumps({"schema": SCHEMA} | as_plain(comparison), indent=1))
    else:
        show(comparison)
    write_page(sides, prompts, shared[names[0]].system, output_dir / PAGE)


def tell_left_out(left_out: list[LeftOut]) -> None:
    """Say what is not compared, and why."""
    for each in left_out:
        tell("left out", wrapped(f"{each.name}: {each.reason}"))


# ---- Which records


def read_all(folders: list[str]) -> tuple[Records, list[LeftOut]]:
    """Return the records in folders and below; raise InspectError if a folder holds none."""
    paths = {folder: [*Path(folder).rglob(FILE)] for folder in folders}
    if empty := [folder for folder, inside in paths.items() if not inside]:
        raise InspectError(f"Not there, or without an {FILE}: {', '.join(empty)}.")
    records, unread = {}, []
    for folder in sorted({path.resolve().parent for inside in paths.values() for path in inside}):
        try:
            records[from_here(folder)] = read_record(folder)
        except InspectError as error:
            unread.append(LeftOut(from_here(folder), str(error)))
    return records, unread


def newest_of(records: Records) -> tuple[Records, list[LeftOut]]:
    """Return the finished records, of one adapter the newest; the newest with losses first."""
    rank = {name: (bool(one.lines), one.conditions["measured"]) for name, one in records.items()}
    newest: dict[tuple[str, bool], str] = {}
    older = []
    for name in sorted(records, key=rank.get, reverse=True):
        record = records[name]
        if not record.finished:
            older.append(LeftOut(name, "stopped"))
        elif newest.setdefault((record.id, bool(record.lines)), name) != name:
            older.append(LeftOut(name, "measured again"))
    return {name: records[name] for name in newest.values()}, older


def comparable(records: Records) -> tuple[Records, list[LeftOut]]:
    """Return the records that can stand beside the first one."""
    kept: Records = {}
    apart = []
    shared: set[str] = set()
    for name, record in records.items():
        first = next(iter(records))
        replies = {line.reply for line in record.lines}
        reason = why_not_beside(record, records[first], first)
        if not reason and kept and shared and not shared & replies:
            reason = "it has no held-out reply in common with all of the others."
        if reason:
            apart.append(LeftOut(name, reason))
        else:
            shared = shared & replies if kept else replies
            kept[name] = record
    return kept, apart


def why_not_beside(record: Record, newest: Record, name: str) -> str:
    """Return why a record cannot stand beside the newest one, which has this name, or ""."""
    here, there = (
        f"{each.conditions['base']} {each.conditions['commit']}" for each in (record, newest)
    )
    if record.conditions["tokenizer_hash"] != newest.conditions["tokenizer_hash"]:
        return f"it has another tokenizer than {name}, so the losses per token differ."
    losses = {line.reply: as_served(line) / line.tokens for line in newest.lines}
    shared = [line for line in record.lines if line.reply in losses]
    if newest.lines and not shared:
        return (
            f"it has no held-out reply in common with {name}: other lines, or the chat template "
            "ends a reply with another token. Measure both with one --eval_file and --system."
        )
    is_served = not any(each.conditions["not_served"] for each in (record, newest))
    if not (shared and is_served):  # then its losses do not tell the base
        return "" if here == there else f"it is on another base ({here}) than {name} ({there})."
    apart = fmean(abs(as_served(line) / line.tokens - losses[line.reply]) for line in shared)
    if apart > SAME_BASE:
        return f"it is on another base than {name}: its losses are {apart:.3f} nats apart."
    return ""


def as_served(line: Line) -> float:
    """Return the loss of the base by its own chat template."""
    return line.base if line.served_base is None else line.served_base


# ---- What they share


def shared_of(records: Records) -> Records:
    """Return the records with the lines, pairs and prompts alone that all have, in one order.

    A reply is known by its tokens and by what was said before it, whatever the chat template. The
    lowest loss comes first; without losses the names give the order.
    """
    each = list(records.values())
    lines = in_common([{line.reply: line for line in record.lines} for record in each])
    pairs = in_common([{pair.reply: pair for pair in record.pairs} for record in each])
    couples = in_common([{each.reply: each for each in record.couples} for record in each])
    exchanges = in_common([exchanges_by_key(record) for record in each])
    exchanges = [with_the_same_rules(same) for same in zip(*exchanges, strict=True)]
    shared = {}
    for place, (name, record) in enumerate(records.items()):
        shared[name] = replace(
            record,
            adapter=name,
            lines=lines[place],
            pairs=pairs[place],
            couples=couples[place],
            exchanges=[same[place] for same in exchanges],
            parts=[],
            part_lines=[],
            shifts=[shift for shift in record.shifts if shift.strength == 1],
        )
    losses = {name: sum(line.adapter for line in one.lines) for name, one in shared.items()}
    return {name: shared[name] for name in sorted(shared, key=lambda name: (losses[name], name))}


def in_common(groups: list[dict[Hashable, Entry]]) -> list[list[Entry]]:
    """Return what all groups have, in the order of the first one."""
    keys = [key for key in groups[0] if all(key in group for group in groups)]
    return [[group[key] for key in keys] for group in groups]


def exchanges_by_key(record: Record) -> dict[Hashable, Exchange]:
    """Return the exchanges by what two replies must have in common to be compared."""
    limits = record.max_new_tokens, record.conditions["enable_thinking"]
    return {
        (json.dumps(each.messages, sort_keys=True), each.source == "tasks", *limits): each
        for each in record.exchanges
    }


def with_the_same_rules(exchanges: tuple[Exchange, ...]) -> list[Exchange]:
    """Return the exchanges on one prompt with the checks alone whose rule is the same in all."""
    checks = {
        name: rule
        for name, rule in exchanges[0].checks.items()
        if all(exchange.checks.get(name) == rule for exchange in exchanges)
    }
    return [replace(exchange, checks=checks) for exchange in exchanges]


def with_the_same_tasks(records: Records) -> tuple[Records, list[LeftOut]]:
    """Return the records, those with other tasks than the first without their KL."""
    replies = next((shift.replies for one in records.values() for shift in one.shifts), None)
    others = [
        name for name, one in records.items() if one.shifts and one.shifts[0].replies != replies
    ]
    reason = "the tasks, or the base's replies to them, are not the same"
    kept = {
        name: replace(one, shifts=[]) if name in others else one for name, one in records.items()
    }
    return kept, [LeftOut(f"KL of {name}", reason) for name in others]


def unshared_checks(whole: Records, shared: Records) -> list[LeftOut]:
    """Return the checks that some record has on prompts which not all have."""

    def asked(record: Record) -> Counter[str]:
        return Counter(
            f"tasks: {name}" if exchange.source == "tasks" else name
            for exchange in record.exchanges
            for name in exchange.checks
        )

    names = {title for name, one in whole.items() for title in asked(one) - asked(shared[name])}
    reason = "not all have these prompts with the same rule and length"
    return [LeftOut(some(sorted(names), 10), reason)] if names else []


# ---- What is printed


def show(comparison: Comparison) -> None:
    """Print which adapters the rows are, in what they differ, and the tables."""
    rows = comparison.rows
    if comparison.conclusion:
        say("found", wrapped(" ".join(comparison.conclusion), WIDTH))
    for place, row in enumerate(rows, 1):
        settings = ", ".join(f"{name} {short(text, 40)}" for name, text in row.settings.items())
        say(f"{place}", [*(run.adapter for run in row.runs), *wrapped(settings)])
    for gain in rows[0].runs[0].gain[:1]:
        replies = f"{gain.replies} replies that all have; base {number(gain.base)}"
        say("held-out", [replies, "the intervals hold together (Bonferroni)"])
        if not all(row.learned_is_known for row in rows):
            say("?", "no learned.txt: this adapter may have learned some of the lines")
    say("", as_text(losses_table(rows), WIDTH))
    tables = [
        quantities_table("passed by", comparison, passed_of),
        quantities_table("nats", comparison, nats_of),
        readings_table(comparison),
    ]
    for table in tables:
        if table.rows:
            say(table.name, as_text(table, WIDTH))


def losses_table(rows: tuple[Row, ...]) -> Table:
    """Return a line for each setting, the best first."""
    has_seeds, lines = any(len(row.runs) > 1 for row in rows), []
    for place, row in enumerate(rows, 1):
        is_marked = row.losses and not row.learned_is_known
        line = {
            "": f"{place} ?" if is_marked else f"{place}",
            "runs": len(row.runs) if has_seeds else "",
            "loss": number(fmean(row.losses), places=4) if row.losses else "",
            "spread": number(row.spread, places=4) if len(row.losses) > 1 else "",
            "above 1, 95 %": cell(row.above_first, "+"),
            "KL, 95 %": cell(row.kl),
            "other token": percents(row.changed),
        }
        lines.append(line)
    return Table("", "", lines)


@dataclass(frozen=True)
class Quantity:
    """What one run has of a check, a couple or a pair; the texts are those of a report."""

    lines: int
    base: str
    adapter: float
    change: str
    p: float | None  # of the change, after Holm


def quantities_table(
    name: str, comparison: Comparison, quantities_of: Callable[[Results], dict[str, Quantity]]
) -> Table:
    """Return a line for each quantity that all runs have, with the mean of each row's runs."""
    change = quantities_of(comparison.change) if comparison.change else {}
    rows = [[quantities_of(run) for run in row.runs] for row in comparison.rows]
    lines = []
    for title, quantity in rows[0][0].items():
        if not all(title in of_run for of_row in rows for of_run in of_row):
            continue
        line = {"": short(title, 30), "lines": quantity.lines, "base": quantity.base}
        for place, of_row in enumerate(rows, 1):
            mean = fmean(of_run[title].adapter for of_run in of_row)
            line[f"{place}"] = number(mean, places=1).removesuffix(".0")
        if title in change:
            line["1 to 2, 95 %"] = change[title].change
            line["p, Holm"] = p_value(change[title].p)
        lines.append(line)
    return Table(name, "", lines)


def passed_of(run: Results) -> dict[str, Quantity]:
    """Return how many replies pass each check; a change is in points."""
    quantities = {}
    for check in run.checks:
        passed, change = check.passed, points(check.passed.change)
        base = halves(passed.before)
        quantities[check.title] = Quantity(passed.count, base, passed.after, change, check.family_p)
    return quantities


def nats_of(run: Results) -> dict[str, Quantity]:
    """Return D of couples, and the shift of pairs from the base, which the base cannot have."""
    quantities = {}
    for row in run.couples:
        base, change = cell(row.base, "", 1), cell(row.change, "+", 1)
        quantities[f"D, couples: {row.name}"] = Quantity(
            row.couples, base, row.adapter.value, change, row.family_p
        )
    for row in run.pairs:
        quantities[f"shift, pairs: {row.name.strip('()')}"] = Quantity(
            row.pairs, "", row.shift.value, cell(row.shift, "+", 1), row.family_p
        )
    return quantities


# ---- The page


def sides_of(records: Records, names: list[str]) -> list[Side]:
    """Return whose replies the page has: the base's, and those of each adapter."""
    base = Side("base", records[names[0]].conditions["base"], "base")
    return [base, *(Side(name, "", records[name].id) for name in names)]


def prompts_of_all(records: Iterable[Record]) -> list[PagePrompt]:
    """Return the prompts that all have, with the replies of the base and of each adapter."""
    prompts = [prompts_of(record.exchanges) for record in records]
    return [
        replace(same[0], replies=[same[0].replies[0], *(prompt.replies[1] for prompt in same)])
        for same in zip(*prompts, strict=True)
    ]


def write_page(sides: list[Side], prompts: list[PagePrompt], system: str, path: Path) -> None:
    """Write what the base and all adapters reply to the prompts that all have."""
    if not prompts:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page_of(sides, system, prompts))
    tell("replies", f"{from_here(path)}: {len(prompts)} prompts that all replied to")
