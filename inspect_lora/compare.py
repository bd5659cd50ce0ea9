"""Compare adapters of one base that `evidence` has measured, the lowest held-out loss first.

Every evidence.json in the folders and below is read, also under a dated name; the newest report of
an adapter counts. Losses are compared on the held-out replies that all adapters share, checks on
the prompts that all share with the same rule. The intervals against the best adapter have joint
95 % coverage over all pairs (Bonferroni), since it was picked as the best. For two adapters,
replies.html shows both replies to each prompt, side by side or blind.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from inspect_lora import record, report
from inspect_lora.common import InspectError, from_here, say, some, wrapped, write_whole
from inspect_lora.record import Line, Record, Shift

SAME_BASE = 0.01  # nats a token that the losses of one base may be apart, on average
# What cannot change a result, and what stands in PEFT's configuration, too.
NOT_TOLD = (
    "OUTPUT_DIR LOGGING_STEPS SAVE_STEPS REPORT_TO EVAL_FILE DEVICE MODEL_NAME LORA_R LORA_ALPHA "
    "LORA_DROPOUT LORA_TARGET_MODULES base_model_name_or_path inference_mode peft_version revision"
)


@dataclass
class Row:
    """An adapter in the tables."""

    name: str  # where its record lies
    found: Record
    lines: list[Line] = field(default_factory=list)  # that all rows have, in one order
    settings: list[str] = field(default_factory=list)  # in which it differs from other rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="such as output")
    parser.add_argument("--output_dir", default="compared", help="where replies.html goes")


def run(options: argparse.Namespace) -> None:
    """Print the tables, and write the page of two adapters."""
    rows = keep_comparable(read_all(options.folders))
    if len(rows) < 2:
        raise InspectError(
            f"Fewer than two reports to compare in {', '.join(options.folders)}: `evidence "
            "ADAPTER` writes one."
        )
    share_lines(rows)
    find_differences(rows)
    for number, row in enumerate(rows, 1):
        say(f"{number}", [row.name, *wrapped(", ".join(row.settings))])
    if rows[0].found.lines:
        lines = rows[0].lines
        bases = [record.per_token([one.base for one in row.lines], lines).value for row in rows]
        ends = dict.fromkeys(f"{base:.4f}" for base in (min(bases), max(bases)))
        say(
            "held-out",
            f"{len(lines)} replies that all have; base {' to '.join(ends)}; "
            "the intervals of losses have joint 95 % coverage",
        )
        report.show("", table_of_losses(rows), len(rows))
        if any(row.found.learned is None for row in rows):
            say("?", "no learned.txt: this adapter may have learned some of the lines")
    report.show("checks", table_of_checks(rows), 100)
    say(report.NOT_CLEAR, report.LEGEND)
    if len(rows) == 2:
        write_page(*rows, Path(options.output_dir) / report.PAGE)


def leave_out(what: str, reason: str) -> None:
    """Say what is not compared, and why."""
    say("left out", wrapped(f"{what}: {reason}"))


# ---- Which records


def read_all(folders: list[str]) -> list[Row]:
    """Return the finished records in folders and below, of one adapter the newest."""
    paths = {path.resolve() for one in folders for path in Path(one).rglob(f"{record.FILE}*")}
    rows: list[Row] = []
    for path in sorted(paths):
        name = from_here(path.parent if path.name == record.FILE else path)
        try:
            rows.append(Row(name, record.read(path)))
        except InspectError as error:
            leave_out(name, str(error))
    rows.sort(key=rank_of)
    newest = {(row.found.id, bool(row.found.lines)): row for row in rows if row.found.finished}
    for row in rows:
        if row not in newest.values():
            leave_out(row.name, "measured again" if row.found.finished else "stopped")
    return list(newest.values())


def keep_comparable(rows: list[Row]) -> list[Row]:
    """Return the rows that can stand beside the newest of those with losses, or of all."""
    newest = max(rows, key=rank_of, default=None)
    kept = []
    for row in rows:
        if reason := why_not_beside(row.found, newest.found):
            leave_out(row.name, f"{reason} than {newest.name}")
        else:
            kept.append(row)
    return kept


def rank_of(row: Row) -> tuple[bool, str]:
    """Return what makes a record the one that others are held against: losses, then its date."""
    return bool(row.found.lines), row.found.on["measured"]


def why_not_beside(one: Record, newest: Record) -> str:
    """Return what is another one here than in the newest record, or ""."""
    if not newest.lines:
        here, there = (f"{each.on['base']} {each.on['commit']}" for each in (one, newest))
        return "" if here == there else f"another base ({here})"
    there = {line.id: line.base for line in newest.lines}
    shared = [line for line in one.lines if line.id in there]
    if not shared:
        return "other held-out replies, or another rendering of them,"
    apart = statistics.fmean(abs(line.base - there[line.id]) / line.tokens for line in shared)
    return f"another base (its losses are {apart:.3f} nats apart)" if apart > SAME_BASE else ""


def share_lines(rows: list[Row]) -> None:
    """Give all rows the held-out replies that all have, and put the lowest loss first."""
    by_id = [{line.id: line for line in row.found.lines} for row in rows]
    shared = [key for key in by_id[0] if all(key in lines for lines in by_id)]
    for row, lines in zip(rows, by_id, strict=True):
        row.lines = [lines[key] for key in shared]
    rows.sort(key=lambda row: sum(line.adapter for line in row.lines))


def find_differences(rows: list[Row]) -> None:
    """Give each row the settings in which those that are known differ."""
    known = []
    for row in rows:
        run = row.found.run
        facts = {"dtype": row.found.on["dtype"]} | row.found.config | run.get("settings", {})
        facts["training data"] = run.get("data", {}).get("train", {}).get("sha256", "?")[:8]
        known.append({
            key: str(sorted(value) if isinstance(value, list) else value)
            for key, value in facts.items() if key not in NOT_TOLD.split()
        })  # fmt: skip
    for key in dict.fromkeys(key for facts in known for key in facts):
        if len({facts[key] for facts in known if key in facts}) > 1:
            for row, facts in zip(rows, known, strict=True):
                row.settings.append(f"{key} {report.short(facts.get(key, '?'), 40)}")


# ---- Tables


def table_of_losses(rows: list[Row]) -> report.Table:
    """Return a line for each adapter, the best first."""
    best, shifts = rows[0].lines, shifts_of(rows)
    table = []
    for number, row in enumerate(rows, 1):
        own = [line.adapter for line in row.lines]
        worse = [line.adapter - other for line, other in zip(best, own, strict=True)]
        against = record.per_token(worse, best, 0.05 / math.comb(len(rows), 2))
        cells = [f"{against.value:+.4f}", report.interval(against), report.mark(against.is_clear())]
        name = f"{number} ?" if row.found.learned is None else f"{number}"
        table.append([name, f"{record.per_token(own, best).value:.4f}"])
        table[-1] += cells if number > 1 else [""] * 3
        if any(shifts.values()):
            table[-1] += report.cells_of_shift(shifts[row.name])
    elsewhere = report.ELSEWHERE if any(shifts.values()) else []
    return ["", "loss", "better than 1", "95 % interval", "", *elsewhere], table


def shifts_of(rows: list[Row]) -> dict[str, Shift]:
    """Return the change on other tasks of each row that was measured on the same replies."""
    shifts = {row.name: report.shifts_of(row.found).get(1) for row in rows}
    first = next((one for one in shifts.values() if one), None)
    for name, shift in shifts.items():
        if shift and shift.replies != first.replies:
            leave_out(f"KL of {name}", "the tasks, or the base's replies to them, are not the same")
            shifts[name] = None
    return shifts


def table_of_checks(rows: list[Row]) -> report.Table:
    """Return for each check how many replies pass, on the prompts that all rows have."""
    passed = [passed_by(row.found) for row in rows]
    shared = set.intersection(*map(set, passed))
    left = sorted({title for one in passed for title, _ in one.keys() - shared})
    if left:
        leave_out(some(left, 10), "not all have these prompts with the same rule and length")
    table = []
    for title in sorted({title for title, _ in shared}):
        keys = [key for key in shared if key[0] == title]
        results = [[one[key] for key in keys] for one in passed]
        change = report.cells_of_change(*results) if len(rows) == 2 else []
        table.append([report.short(title), len(keys), *map(sum, results), *change])
    more = ["only 1", "only 2", "p", ""] if len(rows) == 2 else []
    return ["passed by", "prompts", *range(1, len(rows) + 1), *more], table


def passed_by(found: Record) -> dict[tuple[str, str], bool]:
    """Return whether the adapter's replies pass, by the check and what must be the same."""
    return {
        (title, as_key(found, one.exchange.messages, one.rule)): one.adapter
        for title, asked in record.verdicts(found).items()
        for one in asked
    }


def as_key(found: Record, messages: list[Any], rule: Any = None) -> str:
    """Return what two replies must have in common to be compared."""
    key = [messages, rule, found.max_new_tokens, found.on["enable_thinking"]]
    return json.dumps(key, sort_keys=True)


def write_page(one: Row, other: Row, path: Path) -> None:
    """Write what two adapters reply to the same prompts."""
    theirs = {as_key(other.found, said.messages): said for said in other.found.exchanges}
    both = []
    for said in one.found.exchanges:
        if match := theirs.get(as_key(one.found, said.messages)):
            checks = said.checks.items()
            alike = {name: rule for name, rule in checks if match.checks.get(name) == rule}
            both.append(replace(said, checks=alike, base=said.adapter, adapter=match.adapter))
    path.parent.mkdir(parents=True, exist_ok=True)
    sides = {row.name: ", ".join(row.settings) for row in (one, other)}
    write_whole(path, report.page_of(sides, one.found.system, both))
    say(
        "replies",
        f"{from_here(path)}: {len(both)} prompts that both replied to, with the same limit",
    )
