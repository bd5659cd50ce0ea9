"""Several reports beside each other: on the same replies, by the same rules."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from inspect_lora import report
from inspect_lora import statistics as stats
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
from inspect_lora.page import PAGE, PagePrompt, page_of, prompts_of
from inspect_lora.record import FILE, Line, Record, Shift, read_record
from inspect_lora.statistics import Estimate

SCHEMA = 1  # of --json
SAME_BASE = 0.01  # nats per token that the losses of one base may be apart, on average
# What cannot change a result, and what stands in PEFT's configuration, too.
NOT_TOLD = {
    "OUTPUT_DIR", "LOGGING_STEPS", "SAVE_STEPS", "REPORT_TO", "EVAL_FILE", "DEVICE", "MODEL_NAME",
    "LORA_R", "LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGET_MODULES", "base_model_name_or_path",
    "inference_mode", "peft_version", "revision",
}  # fmt: skip
SEEDS = ("SEED", "SFTConfig.seed")


@dataclass
class Run:
    """An adapter that was measured."""

    name: str  # where its record lies
    record: Record
    facts: dict[str, str]  # what it was trained with, if known
    lines: list[Line] = field(default_factory=list)  # that all runs have, in one order

    @property
    def loss(self) -> float:
        """Its loss on the shared lines, in nats per token; the rows are sorted by it."""
        tokens = sum(line.tokens for line in self.lines)
        return sum(line.adapter for line in self.lines) / tokens if tokens else math.inf


@dataclass
class Row:
    """The runs of one setting, which differ in their seed alone; mostly one."""

    runs: list[Run]
    settings: list[str] = field(default_factory=list)  # in which it differs from other rows
    better_than_first: Estimate | None = None  # by how much its loss is below the first row's
    shifts: list[Shift] = field(default_factory=list)  # of the runs with the same other tasks

    @property
    def losses(self) -> list[float]:
        """The loss of each run."""
        return [run.loss for run in self.runs]

    @property
    def is_known(self) -> bool:
        """Whether it is known which of the lines were learned."""
        return all(run.record.learned is not None for run in self.runs)


@dataclass(frozen=True)
class Passed:
    """How many of the prompts, or pairs, that all have are right: the mean of each row's runs."""

    name: str
    count: int
    base: int
    rows: list[float]
    change: Estimate | None  # of two runs, from the first to the second


LeftOut = dict[str, str]  # "name" and "reason" of a report or a check that is not compared


def compare(folders: list[str], output_dir: Path, as_json: bool = False) -> None:
    """Print the tables, and write the page of all adapters."""
    left_out: list[LeftOut] = []
    runs = share_lines(keep_comparable(read_all(folders, left_out), left_out))
    if len(runs) < 2:
        raise InspectError(f"Fewer than two reports to compare in {', '.join(folders)}.")
    rows = rows_of(runs, left_out)
    runs = [run for row in rows for run in row.runs]
    checks, prefers = checks_of(runs, rows, left_out), prefers_of(runs, rows)
    if as_json:
        values = {"replies": len(runs[0].lines), "rows": [row_as_json(row) for row in rows]}
        values |= {"schema": SCHEMA, "checks": checks, "prefers": prefers}
        values |= {"left_out": left_out}
        print(json.dumps(report.as_plain(values), indent=1))
    else:
        print_rows(rows)
        report.show("", table_of_losses(rows))
        report.show("checks", table_of_passed("passed by", "prompts", checks))
        report.show("prefers", table_of_passed("prefers", "pairs", prefers))
    write_page(runs, output_dir / PAGE)


def leave_out(left_out: list[LeftOut], name: str, reason: str) -> None:
    """Say what is not compared, and why, and add it to the list."""
    tell("left out", wrapped(f"{name}: {reason}"))
    left_out.append({"name": name, "reason": reason})


# ---- Which records


def read_all(folders: list[str], left_out: list[LeftOut]) -> list[Run]:
    """Return the finished records in folders and below, of one adapter the newest."""
    runs: list[Run] = []
    for folder in reports_in(folders):
        name = from_here(folder)
        try:
            record = read_record(folder)
        except InspectError as error:
            leave_out(left_out, name, str(error))
        else:
            runs.append(Run(name, record, facts_of(record)))
    runs.sort(key=rank_of)
    newest = {(run.record.id, bool(run.record.lines)): run for run in runs if run.record.finished}
    for run in runs:
        if run not in newest.values():
            reason = "measured again" if run.record.finished else "stopped"
            leave_out(left_out, run.name, reason)
    return list(newest.values())


def reports_in(folders: list[str]) -> list[Path]:
    """Return the folders of all records, or raise InspectError if a folder holds none."""
    paths = {folder: [*Path(folder).rglob(FILE)] for folder in folders}
    if empty := [folder for folder, inside in paths.items() if not inside]:
        raise InspectError(f"Not there, or without an {FILE}: {', '.join(empty)}.")
    return sorted({path.resolve().parent for inside in paths.values() for path in inside})


def rank_of(run: Run) -> tuple[bool, str]:
    """Return what makes a record the one that others are held against: losses, then its date."""
    return bool(run.record.lines), run.record.conditions["measured"]


def keep_comparable(runs: list[Run], left_out: list[LeftOut]) -> list[Run]:
    """Return the runs that can stand beside the newest of those with losses, or of all."""
    runs = sorted(runs, key=rank_of, reverse=True)
    kept: list[Run] = []
    shared: set[str] = set()
    for run in runs:
        ids = {line.id for line in run.record.lines}
        reason = why_not_beside(run.record, runs[0].record)
        if not reason and kept and shared and not shared & ids:
            reason = "no reply in common with all of the others,"
        if reason:
            leave_out(left_out, run.name, f"{reason} than {runs[0].name}")
        else:
            shared = shared & ids if kept else ids
            kept.append(run)
    return kept


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


def share_lines(runs: list[Run]) -> list[Run]:
    """Give all runs the held-out replies that all have; return them, the lowest loss first.

    Without losses they are sorted by name. A reply is known by its tokens, not by its line.
    """
    by_id = [{line.id: line for line in run.record.lines} for run in runs]
    shared = [key for key in by_id[0] if all(key in lines for lines in by_id)] if runs else []
    for run, lines in zip(runs, by_id, strict=True):
        run.lines = [lines[key] for key in shared]
    return sorted(runs, key=lambda run: (run.loss, run.name))


# ---- What differs


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


def rows_of(runs: list[Run], left_out: list[LeftOut]) -> list[Row]:
    """Return a row for each setting, with the settings in which those that are known differ.

    A seed that stands twice in a setting is no second draw: something differs that is not known.
    """
    rows_by_setting: dict[tuple[Any, ...], Row] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for run in runs:
        seeds = str([run.facts.get(key) for key in SEEDS])
        setting = str(sorted((key, run.facts[key]) for key in run.facts if key not in SEEDS))
        seen[setting, seeds] += 1
        key = (setting, seen[setting, seeds]) if "SEED" in run.facts else (run.name,)
        rows_by_setting.setdefault(key, Row([])).runs.append(run)
    rows = sorted(rows_by_setting.values(), key=lambda row: (fmean(row.losses), row.runs[0].name))
    for key in dict.fromkeys(key for run in runs for key in run.facts):
        values = {run.facts[key] for run in runs if key in run.facts}
        constant = key.removeprefix("SFTConfig.").upper()
        is_told = all(run.facts.get(key) == run.facts.get(constant) for run in runs)
        for row in rows if len(values) > 1 and (constant == key or not is_told) else []:
            shown = dict.fromkeys(short(run.facts.get(key, "?"), 40) for run in row.runs)
            row.settings.append(f"{key} {', '.join(shown)}")
    shifts = shifts_of(runs, left_out)
    for row in rows:
        row.shifts = [shifts[run.name] for run in row.runs if run.name in shifts]
        if row.runs[0].lines and row is not rows[0]:
            row.better_than_first = better_than(rows[0], row, len(rows))
    return rows


# ---- Estimates


def better_than(first: Row, row: Row, count: int) -> Estimate:
    """Return by how much a row's loss is lower than the first one's, so it is below 0.

    Of single runs it is the paired difference on the lines; where a setting has several seeds these
    are the unit. The intervals hold together over all pairs of rows (Bonferroni), since the first
    was picked as the best.
    """
    chance = 0.05 / math.comb(count, 2)
    if len(first.runs) > 1 or len(row.runs) > 1:
        return stats.difference_of_seeds(row.losses, first.losses, chance)
    sides = zip(first.runs[0].lines, row.runs[0].lines, strict=True)
    worse = [line.adapter - other.adapter for line, other in sides]
    return stats.per_token(worse, first.runs[0].lines, chance)


def shifts_of(runs: list[Run], left_out: list[LeftOut]) -> dict[str, Shift]:
    """Return the change on other tasks of each run that was measured on the same replies."""
    shifts = {run.name: stats.shifts_of(run.record).get(1) for run in runs}
    replies = next((shift.replies for shift in shifts.values() if shift), None)
    for name, shift in shifts.items():
        if shift and shift.replies != replies:
            reason = "the tasks, or the base's replies to them, are not the same"
            leave_out(left_out, f"KL of {name}", reason)
    return {name: shift for name, shift in shifts.items() if shift and shift.replies == replies}


def checks_of(runs: list[Run], rows: list[Row], left_out: list[LeftOut]) -> list[Passed]:
    """Return for each check how many replies pass, on the prompts that all runs have."""
    verdicts = {run.name: verdicts_of(run.record) for run in runs}
    shared = set.intersection(*map(set, verdicts.values()))
    left = sorted({title for of_run in verdicts.values() for title, _ in of_run.keys() - shared})
    if left:
        reason = "not all have these prompts with the same rule and length"
        leave_out(left_out, some(left, 10), reason)
    checks = []
    for title in sorted({title for title, _ in shared}):
        keys = sorted(key for key in shared if key[0] == title)
        base = [verdicts[runs[0].name][key].base for key in keys]
        passed = {name: [of_run[key].adapter for key in keys] for name, of_run in verdicts.items()}
        checks.append(passed_by(title, rows, base, passed))
    return checks


def verdicts_of(record: Record) -> dict[tuple[str, str], stats.Verdict]:
    """Return the verdicts on both replies, by the check and what must be the same."""
    return {
        (title, as_key(record, verdict.exchange.messages, verdict.rule)): verdict
        for title, asked in stats.verdicts(record).items()
        for verdict in asked
    }


def as_key(record: Record, messages: list[Any], rule: Any = None) -> str:
    """Return what two replies must have in common to be compared."""
    key = [messages, rule, record.max_new_tokens, record.conditions["enable_thinking"]]
    return json.dumps(key, sort_keys=True)


def prefers_of(runs: list[Run], rows: list[Row]) -> list[Passed]:
    """Return on how many of the pairs that all runs have the good reply is preferred."""
    pairs = {run.name: {pair.id: pair for pair in run.record.pairs} for run in runs}
    shared = sorted(set.intersection(*map(set, pairs.values())))
    if not shared:
        return []
    base = [pairs[runs[0].name][key] for key in shared]
    is_right = [pair.base_good > pair.base_bad for pair in base]
    by_sum, corrected = {}, {}
    for name, of_run in pairs.items():
        chosen = [of_run[key] for key in shared]
        by_sum[name] = [pair.adapter_good > pair.adapter_bad for pair in chosen]
        corrected[name] = [stats.is_right_beside_base(pair) for pair in chosen]
    return [
        passed_by("good reply likelier (sum)", rows, is_right, by_sum),
        passed_by("corrected by the base", rows, [False] * len(base), corrected),
    ]


def passed_by(
    name: str, rows: list[Row], base: list[bool], passed: dict[str, list[bool]]
) -> Passed:
    """Return how often something holds, by base and rows; of two runs also how that changes."""
    means = [fmean(sum(passed[run.name]) for run in row.runs) for row in rows]
    change = stats.change_of(*passed.values()).change if len(passed) == 2 else None
    return Passed(name, len(base), sum(base), means, change)


# ---- What is printed


def row_as_json(row: Row) -> dict[str, Any]:
    """Return a row as --json has it."""
    return {
        "runs": [run.name for run in row.runs],
        "settings": row.settings,
        "learned_is_known": row.is_known,
        "losses": row.losses,
        "spread": stats.spread(row.losses),
        "better_than_first": row.better_than_first,
        "kl": [stats.ratio(shift.kl, shift.tokens) for shift in row.shifts],
    }


def print_rows(rows: list[Row]) -> None:
    """Print which adapters the rows are, in what they differ, and what their order tells."""
    for number, row in enumerate(rows, 1):
        say(f"{number}", [*(run.name for run in row.runs), *wrapped(", ".join(row.settings))])
    lines = rows[0].runs[0].lines
    if lines:
        base = stats.per_token([line.base for line in lines], lines).value
        unit = "one run each: this tells which file is better, not which setting"
        if any(len(row.runs) > 1 for row in rows):
            unit = "where a setting has several seeds, these are the unit, and not the lines"
        say("held-out", [
            f"{len(lines)} replies that all have; base {base:.3f}",
            f"{unit}; the intervals hold together",
        ])  # fmt: skip
        if not all(row.is_known for row in rows):
            say("?", "no learned.txt: this adapter may have learned some of the lines")


def table_of_losses(rows: list[Row]) -> report.Table:
    """Return a line for each setting, the best first, without columns that are empty."""
    table = []
    for number, row in enumerate(rows, 1):
        has_several, has_losses = len(row.runs) > 1, bool(row.runs[0].lines)
        kl = [stats.ratio(shift.kl, shift.tokens).value for shift in row.shifts]
        changed = [sum(shift.changed_tokens) / sum(shift.tokens) for shift in row.shifts]
        table.append([
            f"{number}" if row.is_known else f"{number} ?",
            len(row.runs) if any(len(each.runs) > 1 for each in rows) else "",
            f"{fmean(row.losses):.4f}" if has_losses else "",
            f"{stats.spread(row.losses):.4f}" if has_losses and has_several else "",
            report.cell(row.better_than_first, "+"),
            f"{fmean(kl):.3f}" if kl else "",
            report.percent(fmean(changed)) if kl else "",
        ])  # fmt: skip
    head = ["", "runs", "loss", "spread", "better than 1, 95 %", "KL", "other token"]
    return report.without_empty_columns((head, table))


def table_of_passed(name: str, unit: str, counts: list[Passed]) -> report.Table:
    """Return a line for each check or way to prefer: the base and all rows."""
    if not counts:
        return [], []
    table = []
    for row in counts:
        means = [f"{mean:.3g}" for mean in row.rows]
        change = report.points(row.change) if row.change else ""
        table.append([short(row.name, 30), row.count, row.base, *means, change])
    head = [name, unit, "base", *map(str, range(1, len(counts[0].rows) + 1)), "1 to 2, points"]
    return report.without_empty_columns((head, table))


# ---- The page


def write_page(runs: list[Run], path: Path) -> None:
    """Write what the base and all adapters reply to the prompts that all have."""
    prompts = [
        {as_key(run.record, prompt.messages): prompt for prompt in prompts_of(run.record.exchanges)}
        for run in runs
    ]
    shared = [key for key in prompts[0] if all(key in of_run for of_run in prompts)]
    entries = [merged_prompt([of_run[key] for of_run in prompts]) for key in shared]
    path.parent.mkdir(parents=True, exist_ok=True)
    base = runs[0].record.conditions["base"]
    sides = [("base", base), *((run.name, "") for run in runs)]
    write_whole(path, page_of(sides, runs[0].record.system, entries))
    tell("replies", f"{from_here(path)}: {len(entries)} prompts that all replied to")


def merged_prompt(prompts: list[PagePrompt]) -> PagePrompt:
    """Return a prompt with the replies of the base and of all runs, and the checks they share."""
    first = prompts[0]
    checks = {
        name: rule
        for name, rule in first.checks.items()
        if all(prompt.checks.get(name) == rule for prompt in prompts)
    }
    replies = [first.replies[0], *(prompt.replies[1] for prompt in prompts)]
    return replace(first, checks=checks, replies=replies)
