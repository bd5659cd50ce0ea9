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
from collections.abc import Hashable, Iterable, Sequence
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
from inspect_lora.intervals import (
    FEWEST_UNITS,
    Change,
    Estimate,
    Measured,
    Spread,
    measured_ratio,
    pooled_spread,
    with_seeds,
)
from inspect_lora.page import PAGE, PagePrompt, Side, page_of, prompts_of
from inspect_lora.readings import Agreement, Reading, agreements_of, read_readings
from inspect_lora.record import FILE, Couple, Exchange, Line, Pair, Record, Shift, read_record
from inspect_lora.results import Results, as_plain, results_of, strengths_of
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
SEED = "SEED"
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
    settings: dict[str, str]  # in which it differs from other rows; "?": not known
    losses: tuple[float, ...]  # of each run, in nats per token
    spread: float  # the standard deviation of the losses; NaN of one run
    above_first: Estimate | None  # its loss minus that of the first row
    kl: Estimate | None  # on other tasks, the mean of its runs
    changed: Estimate | None  # at how many of their tokens another one is the likeliest

    @property
    def learned_is_known(self) -> bool:
        """Whether it is known which of the lines were learned."""
        return all(run.learned is not None for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """All that is printed, and what --json has; the lowest loss comes first."""

    rows: tuple[Row, ...]
    conclusion: tuple[str, ...]  # sentences
    seeds: Spread | None  # pooled over the settings; None: no setting has two seeds
    change: Results | None  # of two rows of one run: the first as the base, the second as adapter
    readings: tuple[Reading, ...]
    agreements: tuple[Agreement, ...]
    left_out: tuple[LeftOut, ...]


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
    unshared = [*without_kl, *unshared_checks(whole, shared), *other_limits(whole)]
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


def change_of_two(rows: tuple[Row, ...], shared: Records) -> Results | None:
    """Return what changes from one row to the other, where there are two of one run each."""
    if [len(row.runs) for row in rows] != [1, 1]:
        return None
    first, second = (shared[row.runs[0].adapter] for row in rows)
    return results_of(in_place_of_base(first, second))


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
    if not newest.lines:
        return "" if here == there else f"it is on another base ({here}) than {name} ({there})."
    losses = {line.reply: as_served(line) / line.tokens for line in newest.lines}
    shared = [line for line in record.lines if line.reply in losses]
    if not shared:
        return (
            f"it has no held-out reply in common with {name}: other lines, or the chat template "
            "ends a reply with another token. Measure both with one --eval_file and --system."
        )
    if any(each.conditions["not_served"] for each in (record, newest)):
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


def other_limits(records: Records) -> list[LeftOut]:
    """Return why no reply is compared where the records have other limits of a reply."""
    limits = {
        name: f"{record.max_new_tokens}{', thinking' * record.conditions['enable_thinking']}"
        for name, record in records.items()
        if record.exchanges
    }
    if len(set(limits.values())) < 2:
        return []
    told = some([f"{name} {limit}" for name, limit in limits.items()], 6)
    return [LeftOut("replies", f"they were cut after other --max_new_tokens: {told}.")]


# ---- Rows: settings and their seeds


def facts_of(record: Record) -> dict[str, str]:
    """Return what may have made a difference; a name that is missing is not known."""
    conditions = record.conditions
    served = {"chat template, as served": conditions["template"], "dtype": conditions["dtype"]}
    return {key: str(value) for key, value in (served | record.known).items()}


def rows_of(records: Records) -> tuple[tuple[Row, ...], Spread | None]:
    """Return a row for each setting, the lowest mean loss first, and the spread of seeds."""
    runs = {name: results_of(record) for name, record in records.items()}
    facts = {name: facts_of(record) for name, record in records.items()}
    groups = [[runs[name] for name in names] for names in grouped(facts)]
    groups.sort(key=lambda group: (fmean(map(loss_of, group)), group[0].adapter))
    chance = 0.05 / math.comb(len(groups), 2) if len(groups) > 1 else 0.05
    spread = pooled_spread([[loss_of(run) for run in group if run.gain] for group in groups])
    means = [mean_of_runs([records[run.adapter] for run in group]) for group in groups]
    told, rows = differing(facts), []
    for group, mean in zip(groups, means, strict=True):
        losses = tuple(loss_of(run) for run in group if run.gain)
        settings = {
            name: ", ".join(dict.fromkeys(facts[run.adapter].get(name, "?") for run in group))
            for name in told
        }
        above = None
        if mean is not means[0] and losses:
            difference = difference_of(means[0], mean)
            if spread:
                difference = with_seeds(difference, (len(groups[0]), len(group)), spread)
            above = difference.within(chance)
        (tasks,) = strengths_of(mean, []) or [None]
        row = Row(
            runs=tuple(group),
            settings=settings,
            losses=losses,
            spread=stdev(losses) if len(losses) > 1 else math.nan,
            above_first=above,
            kl=tasks and tasks.kl,
            changed=tasks and tasks.changed,
        )
        rows.append(row)
    return tuple(rows), spread


def loss_of(run: Results) -> float:
    """Return a run's loss in nats per token."""
    return run.gain[0].adapter if run.gain else math.inf


def grouped(facts: dict[str, dict[str, str]]) -> list[list[str]]:
    """Return the names of the runs of each setting: the same facts, known of all, but the seed.

    A seed that stands twice in a setting is no second draw: something differs that is not known.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    for name, of_run in facts.items():
        setting = tuple(sorted((key, of_run[key]) for key in of_run if key != SEED))
        seen[setting, of_run.get(SEED)] += 1
        key = (setting, seen[setting, of_run.get(SEED)]) if SEED in of_run else (name,)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def differing(facts: dict[str, dict[str, str]]) -> list[str]:
    """Return the facts in which runs differ, or that not all of them are known to have."""
    runs = list(facts.values())
    names = dict.fromkeys(name for of_run in runs for name in of_run)
    return [name for name in names if len({of_run.get(name) for of_run in runs}) > 1]


def mean_of_runs(records: list[Record]) -> Record:
    """Return a record with the mean losses and shifts of runs that differ in their seed."""
    first = records[0]
    lines = [
        replace(same[0], adapter=fmean(line.adapter for line in same))
        for same in zip(*(record.lines for record in records), strict=True)
    ]
    shifts = [record.shifts[0] for record in records if record.shifts]
    return replace(first, lines=lines, shifts=[mean_of_shifts(shifts)] if shifts else [])


def mean_of_shifts(shifts: list[Shift]) -> Shift:
    """Return the mean shift of runs on the same replies."""
    kl = [fmean(same) for same in zip(*(shift.kl for shift in shifts), strict=True)]
    changed = [fmean(same) for same in zip(*(each.changed_tokens for each in shifts), strict=True)]
    return replace(shifts[0], kl=kl, changed_tokens=changed)


# ---- Differences of runs


def difference_of(first: Record, record: Record) -> Measured:
    """Return the loss of a record minus that of the first, with the error of the lines.

    The intervals hold together over all pairs of rows (Bonferroni), since the first was picked as
    the best.
    """
    lines = in_place_of_base(first, record).lines
    excess = [line.adapter - line.base for line in lines]
    tokens, clusters = [line.tokens for line in lines], [line.cluster for line in lines]
    return measured_ratio(excess, tokens, clusters)


def in_place_of_base(first: Record, record: Record) -> Record:
    """Return a record whose base is the adapter of the first one, on what both have."""

    def line(one: Line, other: Line) -> Line:
        return replace(one, base=one.adapter, adapter=other.adapter, served_base=None)

    def pair(one: Pair, other: Pair) -> Pair:
        base = {"base_good": one.adapter_good, "base_bad": one.adapter_bad}
        return replace(other, where=one.where, cluster=one.cluster, **base)

    def couple(one: Couple, other: Couple) -> Couple:
        names = ("own_a", "other_a", "own_b", "other_b")
        base = {f"base_{name}": getattr(one, f"adapter_{name}") for name in names}
        return replace(other, where=one.where, cluster=one.cluster, **base)

    def exchange(one: Exchange, other: Exchange) -> Exchange:
        return replace(one, base=one.adapter, adapter=other.adapter, base_in_template=None)

    return replace(
        record,
        conditions=record.conditions | {"base": first.adapter},
        lines=list(map(line, first.lines, record.lines)),
        pairs=list(map(pair, first.pairs, record.pairs)),
        couples=list(map(couple, first.couples, record.couples)),
        exchanges=list(map(exchange, first.exchanges, record.exchanges)),
        shifts=[],
    )


# ---- The conclusion


def conclusion_of(rows: tuple[Row, ...], spread: Spread | None, records: Records) -> list[str]:
    """Return in sentences what the rows show, and what they cannot."""
    sentences = []
    if rows[0].losses:
        sentences += [*told_apart(rows), what_the_runs_show(rows, spread)]
        sentences += at_an_end(rows)
    templates = {record.conditions["template"] for record in records.values()}
    if len(templates) > 1:
        sentences.append(
            "The adapters have different chat templates: they are compared on the same reply "
            "tokens, each as it would be served."
        )
    for name, record in records.items():
        if ", then " in str(record.known.get("CODE", "")):
            sentences.append(f"The code of {name} was edited while it trained.")
    return sentences


def told_apart(rows: tuple[Row, ...]) -> list[str]:
    """Return which rows are clearly worse than the first, and which cannot be told from it."""
    clear, unclear = [], []
    for place, row in enumerate(rows[1:], 2):
        (clear if is_clear(row.above_first) else unclear).append(str(place))
    sentences = []
    if clear:
        sentences.append(f"1 has a lower loss than {joined(clear)}.")
    if unclear:
        sentences.append(f"1 cannot be told from {joined(unclear)}.")
    return sentences


def is_clear(difference: Estimate) -> bool:
    """Return whether an interval that holds beside all others leaves 0 out."""
    return difference.units >= FEWEST_UNITS and not difference.low <= 0 <= difference.high


def joined(words: list[str]) -> str:
    """Return words as a list in a sentence."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if words[1:] else words[0]


def what_the_runs_show(rows: tuple[Row, ...], spread: Spread | None) -> str:
    """Return what these runs can tell: of files, or of settings, and from which difference on."""
    differences = [row.above_first for row in rows[1:]]
    margins = [(each.high - each.low) / 2 for each in differences if each.is_bounded]
    smallest = (
        f" A difference below about {number(max(margins))} would not show." if margins else ""
    )
    if len(rows) == 1:
        smallest = ""
    if not spread:
        return f"One run each: this tells which file is better, not which setting.{smallest}"
    counts = sorted({len(row.runs) for row in rows})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"With {seeds} seeds a setting, which spread by {number(spread.deviation, places=4)} "
        f"(standard deviation, pooled, {spread.freedom} degrees of freedom), the intervals cover "
        f"lines and seeds.{smallest}"
    )


def at_an_end(rows: tuple[Row, ...]) -> list[str]:
    """Return in which settings the best row has the largest or the smallest value tried."""
    sentences = []
    for name, best in rows[0].settings.items():
        values = [number_in(row.settings[name]) for row in rows]
        if name == SEED or None in values or len(set(values)) < 2:
            continue
        if values[0] in (max(values), min(values)):
            end = "largest" if values[0] == max(values) else "smallest"
            sentences.append(f"{name} {best} is the {end} tried: a better one may lie beyond.")
    return sentences


def number_in(text: str) -> float | None:
    """Return the number that a setting is, if it is one."""
    try:
        return float(text)
    except ValueError:
        return None


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
    for table in (passed_table(comparison), nats_table(comparison), readings_table(comparison)):
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


def passed_table(comparison: Comparison) -> Table:
    """Return how many replies pass each check, and in how many pairs the good one is likelier."""
    change, lines = passed_of(comparison.change), []
    runs = [[passed_of(run) for run in row.runs] for row in comparison.rows]
    for title in titles_of_all(runs):
        passed = runs[0][0][title][0]
        line = {"passed by": short(title, 30), "lines": passed.count, "base": halves(passed.before)}
        for place, of_row in enumerate(runs, 1):
            line[f"{place}"] = f"{fmean(of_run[title][0].after for of_run in of_row):.3g}"
        if title in change:
            line["1 to 2, points"] = points(change[title][0].change)
            line["p, Holm"] = p_value(change[title][1])
        lines.append(line)
    return Table("passed", "", lines)


def titles_of_all(rows: list[list[dict[str, Any]]]) -> list[str]:
    """Return the titles that all runs have; the sum of pairs has none where kinds disagree."""
    first = rows[0][0]
    return [title for title in first if all(title in of_run for row in rows for of_run in row)]


def passed_of(run: Results | None) -> dict[str, tuple[Change, float | None]]:
    """Return what is counted before and after, by title, with the p of checks in their family.

    That of pairs is of their shift in nats.
    """
    if run is None:
        return {}
    passed = {check.title: (check.passed, check.family_p) for check in run.checks}
    pairs = {f"pairs: {row.name.strip('()')}": (row.likelier, None) for row in run.pairs}
    return passed | pairs


def nats_table(comparison: Comparison) -> Table:
    """Return D of couples, and the shift of pairs from the base, which the base cannot have."""
    change, lines = nats_of(comparison.change), []
    runs = [[nats_of(run) for run in row.runs] for row in comparison.rows]
    for title in titles_of_all(runs):
        units, base, *_ = runs[0][0][title]
        line = {"nats": short(title, 30), "number": units, "base": cell(base, "", 1)}
        for place, of_row in enumerate(runs, 1):
            line[f"{place}"] = number(fmean(of_run[title][2].value for of_run in of_row), "", 1)
        if title in change:
            line["1 to 2, 95 %"] = cell(change[title][3], "+", 1)
            line["p, Holm"] = p_value(change[title][4])
        lines.append(line)
    return Table("nats", "", lines)


def nats_of(run: Results | None) -> dict[str, tuple[Any, ...]]:
    """Return number, base, adapter, change and p of couples and of pairs, by title."""
    if run is None:
        return {}
    couples = {
        f"D, couples: {row.name}": (row.couples, row.base, row.adapter, row.change, row.family_p)
        for row in run.couples
    }
    pairs = {
        f"shift, pairs: {row.name.strip('()')}": (
            row.pairs,
            None,
            row.shift,
            row.shift,
            row.family_p,
        )
        for row in run.pairs
    }
    return couples | pairs


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
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page_of(sides, system, prompts))
    tell("replies", f"{from_here(path)}: {len(prompts)} prompts that all replied to")
