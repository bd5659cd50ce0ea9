"""Settings side by side: their rows, how far they differ beside their seeds, and what that shows.

Two runs are compared as base and adapter are: by the results of a record in which the first run
stands in the place of the base. So clusters, pairing and intervals are those of a report.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from inspect_lora.intervals import (
    FEWEST_UNITS,
    Estimate,
    Measured,
    Spread,
    measured_ratio,
    pooled_spread,
    with_seeds,
)
from inspect_lora.readings import Agreement, Reading
from inspect_lora.record import Couple, Exchange, Line, Pair, Record, Shift
from inspect_lora.results import Results, results_of, strengths_of
from inspect_lora.tables import number

SEED = "SEED"
Records = dict[str, Record]  # by where they lie


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


def change_of_two(rows: tuple[Row, ...], shared: Records) -> Results | None:
    """Return what changes from one row to the other, where there are two of one run each."""
    if [len(row.runs) for row in rows] != [1, 1]:
        return None
    first, second = (shared[row.runs[0].adapter] for row in rows)
    return results_of(in_place_of_base(first, second))


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
        sentences += at_an_end(rows, records) if spread else []
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
    if any(row.above_first.units < FEWEST_UNITS for row in rows[1:]):
        return [f"No row is judged: fewer than {FEWEST_UNITS} independent lines."]
    clear, unclear = [], []
    for place, row in enumerate(rows[1:], 2):
        (clear if is_clear(row.above_first) else unclear).append(str(place))
    sentences = []
    if clear:
        sentences.append(f"Row 1 has a lower loss than {rows_named(clear)}.")
    if unclear:
        sentences.append(f"Row 1 cannot be told from {rows_named(unclear)}.")
    return sentences


def rows_named(places: list[str]) -> str:
    """Return "row 2" or "rows 2 and 3"."""
    return f"row{'s' if len(places) > 1 else ''} {joined(places)}"


def is_clear(difference: Estimate) -> bool:
    """Return whether an interval that holds beside all others leaves 0 out."""
    return not difference.low <= 0 <= difference.high


def joined(words: list[str]) -> str:
    """Return words as a list in a sentence."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if words[1:] else words[0]


def what_the_runs_show(rows: tuple[Row, ...], spread: Spread | None) -> str:
    """Return what these runs can tell: of files, or of settings, and from which difference on."""
    smallest = smallest_that_shows(rows)
    if not spread:
        return f"One run each: this tells which file is better, not which setting.{smallest}"
    counts = sorted({len(row.runs) for row in rows})
    seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"With {seeds} seeds a setting, which spread by {number(spread.deviation, places=4)} "
        f"(standard deviation, pooled, {spread.freedom} degrees of freedom), the intervals cover "
        f"lines and seeds.{smallest}"
    )


def smallest_that_shows(rows: tuple[Row, ...]) -> str:
    """Return which differences from the first row are too small to be told, as a sentence."""
    differences = [row.above_first for row in rows[1:] if row.above_first.is_bounded]
    margins = sorted((each.high - each.low) / 2 for each in differences)
    if not margins or margins[-1] == 0:
        return ""
    least, most = margins[0], margins[-1]
    if most < 1.2 * least:
        return f" A difference below about {number(most)} would not show."
    range_of_margins = f"{number(least)} to {number(most)}, depending on the row,"
    return f" A difference below about {range_of_margins} would not show."


def at_an_end(rows: tuple[Row, ...], records: Records) -> list[str]:
    """Return in which settings the best row has the largest or the smallest value tried."""
    sentences = []
    for name in rows[0].settings:
        values = [records[row.runs[0].adapter].known.get(name) for row in rows]
        is_number = all(type(value) in (int, float) for value in values)  # a hash is none
        if name == SEED or not is_number or len(set(values)) < 2:
            continue
        if values[0] in (max(values), min(values)):
            end = "largest" if values[0] == max(values) else "smallest"
            sentences.append(f"{name} {values[0]} is the {end} tried: a better one may lie beyond.")
    return sentences
