"""Several reports side by side: on the same replies, by the same rules.

Each record is cut down to what all of them have, and results_of() gives the numbers of each run.
Two runs are compared as base and adapter are: by the results of a record in which the first run
stands in the place of the base. So clusters, pairing and intervals are those of a report.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeVar

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
from inspect_lora.intervals import Estimate, change_of, difference_of_seeds
from inspect_lora.page import PAGE, Side, page_of, prompts_of
from inspect_lora.record import FILE, Exchange, Line, Pair, Record, read_record
from inspect_lora.results import Results, as_plain, gain_of, has_moved, results_of
from inspect_lora.tables import Table, as_text, cell, number, percent, points

SCHEMA = 2  # of --json
WIDTH = 90
SAME_BASE = 0.01  # nats per token that the losses of one base may be apart, on average
# What cannot change a result, and what stands in PEFT's configuration, too.
NOT_TOLD = {
    "OUTPUT_DIR", "LOGGING_STEPS", "SAVE_STEPS", "REPORT_TO", "EVAL_FILE", "DEVICE", "MODEL_NAME",
    "LORA_R", "LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGET_MODULES", "base_model_name_or_path",
    "inference_mode", "peft_version", "revision",
}  # fmt: skip
SEEDS = ("SEED", "SFTConfig.seed")
Records = dict[str, Record]  # by where they lie
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class LeftOut:
    """A report or a check that is not compared."""

    name: str
    reason: str


@dataclass(frozen=True)
class Row:
    """The runs of one setting, which differ in their seed alone; mostly one."""

    runs: tuple[Results, ...]  # each on what all have; its adapter is where its report lies
    settings: tuple[str, ...]  # in which it differs from other rows
    losses: tuple[float, ...]  # of each run, in nats per token
    spread: float  # the standard deviation of the losses; NaN of one run
    better_than_first: Estimate | None  # the first row's loss minus this one: below 0

    @property
    def learned_is_known(self) -> bool:
        """Whether it is known which of the lines were learned."""
        return all(run.learned is not None for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """All that is printed, and what --json has; the lowest loss comes first."""

    rows: tuple[Row, ...]
    change: Results | None  # of two rows of one run: the first as the base, the second as adapter
    moved_change: Estimate | None  # of the share of pairs that each of these two moved
    left_out: tuple[LeftOut, ...]


def run(options: argparse.Namespace) -> None:
    """Compare the adapters of a command line."""
    compare(options.folders, Path(options.output_dir), options.json)


def compare(folders: list[str], output_dir: Path, as_json: bool = False) -> None:
    """Print the tables, and write the page of all adapters."""
    records, unread = read_all(folders)
    newest, older = newest_of(records)
    whole, apart = comparable(newest)
    tell_left_out([*unread, *older, *apart])
    if len(whole) < 2:
        raise InspectError(f"Fewer than two reports to compare in {', '.join(folders)}.")
    shared, without_kl = with_the_same_tasks(shared_of(whole))
    without_kl += unshared_checks(whole, shared)
    tell_left_out(without_kl)
    rows = rows_of(shared)
    names = [run.adapter for row in rows for run in row.runs]
    is_of_two_runs = len(rows) == len(names) == 2
    changes = changes_of(*(shared[name] for name in names)) if is_of_two_runs else (None, None)
    comparison = Comparison(rows, *changes, (*unread, *older, *apart, *without_kl))
    if as_json:
        print(json.dumps({"schema": SCHEMA} | as_plain(comparison), indent=1))
    else:
        show(comparison)
    write_page({name: shared[name] for name in names}, output_dir / PAGE)


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
        ids = {line.id for line in record.lines}
        reason = why_not_beside(record, records[first])
        if not reason and kept and shared and not shared & ids:
            reason = "no reply in common with all of the others,"
        if reason:
            apart.append(LeftOut(name, f"{reason} than {first}"))
        else:
            shared = shared & ids if kept else ids
            kept[name] = record
    return kept, apart


def why_not_beside(record: Record, newest: Record) -> str:
    """Return what is another one here than in the newest record, or ""."""
    if not newest.lines:
        base, other = (
            f"{each.conditions['base']} {each.conditions['commit']}" for each in (record, newest)
        )
        return "" if base == other else f"another base ({base})"
    losses = {line.id: line.base for line in newest.lines}
    shared = [line for line in record.lines if line.id in losses]
    if not shared:
        return "other held-out replies, or another rendering of them,"
    apart = fmean(abs(line.base - losses[line.id]) / line.tokens for line in shared)
    return f"another base (its losses are {apart:.3f} nats apart)" if apart > SAME_BASE else ""


# ---- What they share


def shared_of(records: Records) -> Records:
    """Return the records with the lines, pairs and prompts alone that all have, in one order.

    A reply is known by its tokens, not by its line. The lowest loss comes first; without losses
    the names give the order.
    """
    each = list(records.values())
    lines = in_common([{line.id: line for line in record.lines} for record in each])
    pairs = in_common([{pair.id: pair for pair in record.pairs} for record in each])
    exchanges = in_common([exchanges_by_key(record) for record in each])
    exchanges = [with_the_same_rules(same) for same in zip(*exchanges, strict=True)]
    shared = {}
    for place, (name, record) in enumerate(records.items()):
        shared[name] = replace(
            record,
            adapter=name,
            lines=lines[place],
            pairs=pairs[place],
            exchanges=[same[place] for same in exchanges],
            parts=[],
            part_lines=[],
            shifts=[s for s in record.shifts if s.strength == 1],
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
        (
            json.dumps(exchange.messages, sort_keys=True),
            exchange.source == "tasks",
            *limits,
        ): exchange
        for exchange in record.exchanges
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


# ---- Rows: settings and their seeds


def facts_of(record: Record) -> dict[str, str]:
    """Return what may have made a difference: settings, PEFT's configuration, the data."""
    facts = {"dtype": record.conditions["dtype"]} | record.config | record.run.get("settings", {})
    identity = record.run.get("identity", {})
    facts |= {key: value for key, value in identity.items() if key.startswith("SFTConfig.")}
    facts["training data"] = record.run.get("data", {}).get("train", {}).get("sha256", "?")[:8]
    return {
        key: str(sorted(value) if isinstance(value, list) else value)
        for key, value in facts.items()
        if key not in NOT_TOLD
    }


def rows_of(records: Records) -> tuple[Row, ...]:
    """Return a row for each setting, the lowest mean loss first."""
    runs = {name: results_of(record) for name, record in records.items()}
    facts = {name: facts_of(record) for name, record in records.items()}
    groups = [[runs[name] for name in names] for names in grouped(facts)]
    groups.sort(key=lambda group: (fmean(map(loss_of, group)), group[0].adapter))
    chance = 0.05 / math.comb(len(groups), 2) if len(groups) > 1 else 0.05
    told, rows = differing(facts), []
    for group in groups:
        settings = []
        for name in told:
            values = dict.fromkeys(short(facts[run.adapter].get(name, "?"), 40) for run in group)
            settings.append(f"{name} {', '.join(values)}")
        losses = tuple(loss_of(run) for run in group if run.gain)
        row = Row(
            runs=tuple(group),
            settings=tuple(settings),
            losses=losses,
            spread=stdev(losses) if len(losses) > 1 else math.nan,
            better_than_first=better_than(groups[0], group, records, chance),
        )
        rows.append(row)
    return tuple(rows)


def loss_of(run: Results) -> float:
    """Return a run's loss in nats per token."""
    return run.gain[0].adapter if run.gain else math.inf


def grouped(facts: dict[str, dict[str, str]]) -> list[list[str]]:
    """Return the names of the runs of each setting.

    A seed that stands twice in a setting is no second draw: something differs that is not known.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for name, of_run in facts.items():
        seeds = str([of_run.get(key) for key in SEEDS])
        setting = str(sorted((key, of_run[key]) for key in of_run if key not in SEEDS))
        seen[setting, seeds] += 1
        key = (setting, seen[setting, seeds]) if "SEED" in of_run else (name,)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def differing(facts: dict[str, dict[str, str]]) -> list[str]:
    """Return the facts in which runs differ, without those that only pass a constant on."""
    runs, names = list(facts.values()), []
    for name in dict.fromkeys(name for of_run in runs for name in of_run):
        values = {of_run[name] for of_run in runs if name in of_run}
        constant = name.removeprefix("SFTConfig.").upper()
        is_told = all(of_run.get(name) == of_run.get(constant) for of_run in runs)
        if len(values) > 1 and (constant == name or not is_told):
            names.append(name)
    return names


# ---- Differences of runs


def better_than(
    first: list[Results], group: list[Results], records: Records, chance: float
) -> Estimate | None:
    """Return by how much the group's loss is lower than the first one's, so it is below 0.

    Of single runs it is the paired difference on the lines; where a setting has several seeds these
    are the unit. The intervals hold together over all pairs of rows (Bonferroni), since the first
    was picked as the best.
    """
    if group is first or not first[0].gain:
        return None
    if len(first) > 1 or len(group) > 1:
        return difference_of_seeds([*map(loss_of, group)], [*map(loss_of, first)], chance)
    both = in_place_of_base(records[first[0].adapter], records[group[0].adapter])
    return gain_of(both.lines, chance)


def changes_of(first: Record, second: Record) -> tuple[Results, Estimate | None]:
    """Return what changes from one run to another, and how the share of moved pairs does."""
    moved = [[has_moved(pair) for pair in record.pairs] for record in (first, second)]
    clusters = [pair.cluster for pair in first.pairs]
    change = change_of(*moved, clusters).change if clusters else None
    return results_of(in_place_of_base(first, second)), change


def in_place_of_base(first: Record, record: Record) -> Record:
    """Return a record whose base is the adapter of the first one, on what both have."""

    def line(one: Line, other: Line) -> Line:
        return replace(one, base=one.adapter, adapter=other.adapter)

    def pair(one: Pair, other: Pair) -> Pair:
        base = {"base_good": one.adapter_good, "base_bad": one.adapter_bad}
        return replace(other, cluster=one.cluster, **base)

    def exchange(one: Exchange, other: Exchange) -> Exchange:
        return replace(one, base=one.adapter, adapter=other.adapter)

    return replace(
        record,
        conditions=record.conditions | {"base": first.adapter},
        lines=list(map(line, first.lines, record.lines)),
        pairs=list(map(pair, first.pairs, record.pairs)),
        exchanges=list(map(exchange, first.exchanges, record.exchanges)),
        shifts=[],
    )


# ---- What is printed


def show(comparison: Comparison) -> None:
    """Print which adapters the rows are, in what they differ, and the tables."""
    rows = comparison.rows
    for place, row in enumerate(rows, 1):
        say(f"{place}", [*(run.adapter for run in row.runs), *wrapped(", ".join(row.settings))])
    for gain in rows[0].runs[0].gain[:1]:
        unit = "one run each: this tells which file is better, not which setting"
        if any(len(row.runs) > 1 for row in rows):
            unit = "where a setting has several seeds, these are the unit, and not the lines"
        replies = f"{gain.replies} replies that all have; base {number(gain.base)}"
        say("held-out", [replies, f"{unit}; the intervals hold together"])
        if not all(row.learned_is_known for row in rows):
            say("?", "no learned.txt: this adapter may have learned some of the lines")
    say("", as_text(losses_table(rows), WIDTH))
    if rows[0].runs[0].passed:
        say("passed", as_text(passed_table(comparison), WIDTH))


def losses_table(rows: tuple[Row, ...]) -> Table:
    """Return a line for each setting, the best first."""
    has_seeds, lines = any(len(row.runs) > 1 for row in rows), []
    for place, row in enumerate(rows, 1):
        tasks = [strength for run in row.runs for strength in run.strengths]
        line = {
            "": f"{place}" if row.learned_is_known else f"{place} ?",
            "runs": len(row.runs) if has_seeds else "",
            "loss": number(fmean(row.losses), places=4) if row.losses else "",
            "spread": number(row.spread, places=4) if len(row.losses) > 1 else "",
            "better than 1, 95 %": cell(row.better_than_first, "+"),
            "KL": number(fmean(one.kl.value for one in tasks)) if tasks else "",
            "other token": percent(fmean(one.changed for one in tasks)) if tasks else "",
        }
        lines.append(line)
    return Table("", "", lines)


def passed_table(comparison: Comparison) -> Table:
    """Return how many replies pass each check, and how many pairs are right: base and rows."""
    change, lines = comparison.change, []
    for title, passed in comparison.rows[0].runs[0].passed.items():
        line = {"passed by": short(title, 30), "lines": passed.count, "base": passed.before}
        for place, row in enumerate(comparison.rows, 1):
            line[f"{place}"] = f"{fmean(run.passed[title].after for run in row.runs):.3g}"
        line["1 to 2, points"] = points(change.passed[title].change) if change else ""
        lines.append(line)
    if comparison.rows[0].runs[0].pairs:
        lines.append(moved_line(comparison))
    return Table("", "", lines)


def moved_line(comparison: Comparison) -> dict[str, Any]:
    """Return how many pairs each row moved to the good reply; a base moves none."""
    pairs = comparison.rows[0].runs[0].pairs[0].pairs
    line = {"passed by": "pairs: moved to the good reply", "lines": pairs, "base": ""}
    for place, row in enumerate(comparison.rows, 1):
        line[f"{place}"] = f"{fmean(run.pairs[0].moved for run in row.runs):.3g}"
    change = comparison.moved_change
    return line | {"1 to 2, points": points(change) if change else ""}


# ---- The page


def write_page(records: Records, path: Path) -> None:
    """Write what the base and all adapters reply to the prompts that all have."""
    prompts = [prompts_of(record.exchanges) for record in records.values()]
    entries = [
        replace(same[0], replies=[same[0].replies[0], *(prompt.replies[1] for prompt in same)])
        for same in zip(*prompts, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    first = next(iter(records.values()))
    sides = [Side("base", first.conditions["base"], "base")]
    sides += [Side(name, "", record.id) for name, record in records.items()]
    write_whole(path, page_of(sides, first.system, entries))
    tell("replies", f"{from_here(path)}: {len(entries)} prompts that all replied to")
