"""What a record tells: each estimate of a report, computed once.

results_of(record) is the only way from counts to estimates. Tables, findings, the picture and
`compare` read its value, and `report --json` prints it as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from inspect_lora.intervals import (
    FEWEST_UNITS,
    Change,
    Estimate,
    change_of,
    clustered_proportion,
    effective_number,
    ratio,
)
from inspect_lora.record import Exchange, Line, Pair, Record, Reply, Shift

ALL, NO_KIND = "(all)", "(no kind)"
SIDES = ("base", "adapter")


@dataclass(frozen=True)
class KindGain:
    """The losses of all held-out replies, or of those of a kind, in nats per token."""

    kind: str
    is_trained: bool | None  # whether the training file has lines of this kind; None: not known
    replies: int
    base: float
    adapter: float
    gain: Estimate  # the base's loss minus the adapter's: above 0 is better
    lower_on: int  # replies on which the adapter's loss is the lower one


@dataclass(frozen=True)
class Check:
    """How many replies of base and adapter pass a rule."""

    name: str
    is_task: bool  # replies to other tasks, and not to held-out prompts
    passed: Change

    @property
    def title(self) -> str:
        """Its name, which other tasks may share with held-out prompts."""
        return f"tasks: {self.name}" if self.is_task else self.name


@dataclass(frozen=True)
class PairGroup:
    """Which of two replies base and adapter find likelier; a tie is not right."""

    name: str
    is_kind: bool  # the pairs of a kind, and not all, nor those with one reply longer
    pairs: int
    likelier: Change  # pairs whose good reply has the higher log-probability, as a sum
    moved: int  # pairs in which log p(good) - log p(bad) is larger with the adapter than the base
    moved_share: Estimate


@dataclass(frozen=True)
class ReplyStatistics:
    """How the replies of one side are; the words of those that were cut are a lower bound."""

    source: str
    side: str
    replies: int
    ended: int  # by themselves
    empty: int
    same: int  # word for word the most frequent one
    words: float  # the mean


@dataclass(frozen=True)
class Strength:
    """The adapter at a strength: 1 is as trained. The differences to that are paired."""

    name: str
    strength: float
    gain: Estimate | None
    cost: Estimate | None  # its loss minus that of the adapter as trained
    kl: Estimate | None  # on other tasks, in nats per token
    kl_change: Estimate | None  # its KL minus that of the adapter as trained
    changed: float | None  # the share of tokens at which another one is the likeliest


@dataclass(frozen=True)
class PartEffect:
    """What a part does: the loss rises by `cost` without it; it gains `alone` by itself."""

    name: str
    is_cut: bool  # to fewer directions of every update
    cost: Estimate | None
    cost_share: float | None  # of the gain, if that is sure enough
    alone: Estimate | None
    alone_share: float | None


@dataclass(frozen=True)
class Results:
    """All that a report tells of a record."""

    adapter: str
    base: str
    finished: bool
    steps: tuple[str, ...]  # the measurements that were made
    learned: int | None  # held-out lines left out since the adapter learned them; None: not known
    is_chosen: bool  # by the loss on these very lines, among the checkpoints of its training
    gain: tuple[KindGain, ...]  # of all held-out replies first
    effective: float | None  # held-out lines of equal size that would weigh as much
    longest: float | None  # the share of the held-out tokens that the longest reply has
    asked: dict[str, int]  # prompts by kind, without the other tasks
    askable: int  # prompts that might have been asked
    judged: int  # replies of each side that a rule judged
    cut: dict[str, int]  # judged replies of each side that had been cut
    max_new_tokens: int  # where they are cut
    checks: tuple[Check, ...]  # the least passed first, and last what all replies of both pass
    pairs: tuple[PairGroup, ...]  # all pairs first
    replies: tuple[ReplyStatistics, ...]
    tasks: int  # other tasks that measure the KL
    part_kinds: dict[str, int]  # held-out replies by kind that measure strengths and parts
    part_gain: Estimate | None  # of the adapter as trained, on those replies
    strengths: tuple[Strength, ...]
    parts: tuple[PartEffect, ...]  # the dearest first, then the cuts

    @property
    def passed(self) -> dict[str, Change]:
        """What is counted before and after, by title: checks, all pairs and those of each kind."""
        pairs = [group for group in self.pairs if group.is_kind or group.name == ALL]
        return {check.title: check.passed for check in self.checks} | {
            f"pairs: {group.name.strip('()')}": group.likelier for group in pairs
        }


def results_of(record: Record) -> Results:
    """Return what a record tells."""
    part_lines = [record.lines[number] for number in record.part_lines]
    tokens = [line.tokens for line in record.lines]
    clusters = [line.cluster for line in record.lines]
    held_out = [exchange for exchange in record.exchanges if exchange.source != "tasks"]
    judged = [exchange for exchange in record.exchanges if exchange.checks]
    return Results(
        adapter=record.adapter,
        base=record.conditions["base"],
        finished=record.finished,
        steps=tuple(record.seconds),
        learned=record.learned,
        is_chosen=is_chosen_by_these_lines(record),
        gain=gains_of(record.lines, record.trained_kinds),
        effective=effective_number(tokens, clusters) if tokens else None,
        longest=max(tokens) / sum(tokens) if tokens else None,
        asked=kinds_of(held_out),
        askable=sum(record.asked_of.values()),
        judged=len(judged),
        cut={side: sum(not getattr(each, side).ended for each in judged) for side in SIDES},
        max_new_tokens=record.max_new_tokens,
        checks=checks_of(record),
        pairs=pairs_of(record.pairs),
        replies=replies_of(record.exchanges),
        tasks=len(record.tasks),
        part_kinds=kinds_of(part_lines),
        part_gain=gain_of(part_lines) if record.parts else None,
        strengths=strengths_of(record, part_lines),
        parts=parts_of(record, part_lines),
    )


def as_plain(results: Any) -> dict[str, Any]:
    """Return results as JSON has them; a number that is not finite is None."""

    def plain(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: None if is_infinite(value) else value for name, value in fields}

    def is_infinite(value: Any) -> bool:
        return isinstance(value, float) and not math.isfinite(value)

    return dataclasses.asdict(results, dict_factory=plain)


def kinds_of(items: Iterable[Any]) -> dict[str, int]:
    """Return how many lines or prompts are of each kind, the most frequent first."""
    return dict(Counter(item.kind or NO_KIND for item in items).most_common())


def is_chosen_by_these_lines(record: Record) -> bool:
    """Return whether the training kept the checkpoint that has the lowest loss on these lines."""
    held_out = record.run.get("data", {}).get("held_out") or {}
    measured = record.conditions.get("eval_file") or {}
    is_best = record.run.get("settings", {}).get("FINAL_LORA") == "best"
    return is_best and held_out.get("sha256") == measured.get("sha256")


# ---- Losses


def per_token(sums: Sequence[float], lines: list[Line], chance: float = 0.05) -> Estimate:
    """Return the mean over the tokens of lines, such as of their losses or of differences."""
    tokens, clusters = [line.tokens for line in lines], [line.cluster for line in lines]
    return ratio(sums, tokens, clusters, chance)


def gain_of(lines: list[Line], chance: float = 0.05) -> Estimate:
    """Return the base's loss minus the adapter's."""
    return per_token([line.base - line.adapter for line in lines], lines, chance)


def gains_of(lines: list[Line], trained: dict[str, int] | None) -> tuple[KindGain, ...]:
    """Return the gain on all held-out replies, then that of each kind, the largest first."""
    by_kind: dict[str, list[Line]] = {}
    for line in lines:
        by_kind.setdefault(line.kind, []).append(line)
    rows = [
        kind_gain(kind or NO_KIND, None if trained is None else kind in trained, of_kind)
        for kind, of_kind in by_kind.items()
    ]
    rows.sort(key=lambda row: -row.gain.value)
    return (kind_gain(ALL, None, lines), *(rows if len(rows) > 1 else [])) if lines else ()


def kind_gain(name: str, is_trained: bool | None, lines: list[Line]) -> KindGain:
    """Return the losses of these lines."""
    tokens = sum(line.tokens for line in lines)
    return KindGain(
        kind=name,
        is_trained=is_trained,
        replies=len(lines),
        base=sum(line.base for line in lines) / tokens,
        adapter=sum(line.adapter for line in lines) / tokens,
        gain=gain_of(lines),
        lower_on=sum(line.adapter < line.base for line in lines),
    )


# ---- Checks and replies


def checks_of(record: Record) -> tuple[Check, ...]:
    """Return how many replies pass each check, by base and adapter."""
    clusters = {line.where: line.cluster for line in record.lines}
    asked: dict[tuple[str, bool], list[Exchange]] = {}
    for exchange in record.exchanges:
        for name in exchange.checks:
            asked.setdefault((name, exchange.source == "tasks"), []).append(exchange)
    checks = [
        Check(
            name,
            is_task,
            change_of(
                [exchange.base.passes[name] for exchange in exchanges],
                [exchange.adapter.passes[name] for exchange in exchanges],
                [clusters.get(exchange.where, exchange.where) for exchange in exchanges],
            ),
        )
        for (name, is_task), exchanges in asked.items()
    ]

    def order(check: Check) -> tuple[bool, bool, float]:
        return check.passed.holds_always, check.is_task, check.passed.after / check.passed.count

    return tuple(sorted(checks, key=order))


def replies_of(exchanges: list[Exchange]) -> tuple[ReplyStatistics, ...]:
    """Return how the replies of both sides are, to each source of prompts."""
    rows = []
    for source in dict.fromkeys(exchange.source for exchange in exchanges):
        for side in SIDES:
            replies = [getattr(each, side) for each in exchanges if each.source == source]
            rows.append(reply_statistics(source, side, replies))
    return tuple(rows)


def reply_statistics(source: str, side: str, replies: list[Reply]) -> ReplyStatistics:
    """Return how these replies are."""
    words = [len(reply.text.split()) for reply in replies]
    return ReplyStatistics(
        source=source,
        side=side,
        replies=len(replies),
        ended=sum(reply.ended for reply in replies),
        empty=words.count(0),
        same=max(Counter(reply.text for reply in replies).values()),
        words=fmean(words),
    )


# ---- Pairs


def pairs_of(pairs: list[Pair]) -> tuple[PairGroup, ...]:
    """Return all pairs, those of each kind if there are several, and by which reply is longer."""
    kinds = sorted({pair.kind for pair in pairs})
    groups = [pair_group(ALL, pairs)]
    for kind in kinds if len(kinds) > 1 else []:
        groups.append(pair_group(kind or NO_KIND, [p for p in pairs if p.kind == kind], True))
    longer_good = [pair for pair in pairs if pair.good_tokens > pair.bad_tokens]
    longer_bad = [pair for pair in pairs if pair.good_tokens < pair.bad_tokens]
    groups.append(pair_group("good reply longer", longer_good))
    groups.append(pair_group("bad reply longer", longer_bad))
    return tuple(group for group in groups if group)


def pair_group(name: str, pairs: list[Pair], is_kind: bool = False) -> PairGroup | None:
    """Return which replies base and adapter find likelier; None if there are no pairs."""
    if not pairs:
        return None
    clusters = [pair.cluster for pair in pairs]
    base = [pair.base_good > pair.base_bad for pair in pairs]
    adapter = [is_right(pair) for pair in pairs]
    moved = [has_moved(pair) for pair in pairs]
    return PairGroup(
        name=name,
        is_kind=is_kind,
        pairs=len(pairs),
        likelier=change_of(base, adapter, clusters),
        moved=sum(moved),
        moved_share=clustered_proportion(moved, clusters),
    )


def is_right(pair: Pair) -> bool:
    """Return whether the adapter finds the good reply likelier."""
    return pair.adapter_good > pair.adapter_bad


def has_moved(pair: Pair) -> bool:
    """Return whether the adapter moved the odds to the good reply (DPO's implicit reward)."""
    return pair.adapter_good - pair.adapter_bad > pair.base_good - pair.base_bad


# ---- Strengths, parts, other tasks


def gain_at(losses: list[float], lines: list[Line]) -> Estimate:
    """Return the base's loss minus these losses of the same lines."""
    return per_token([line.base - loss for line, loss in zip(lines, losses, strict=True)], lines)


def cost_at(losses: list[float], lines: list[Line]) -> Estimate:
    """Return these losses minus those of the adapter as trained, on the same lines."""
    return per_token([loss - line.adapter for line, loss in zip(lines, losses, strict=True)], lines)


def strengths_of(record: Record, lines: list[Line]) -> tuple[Strength, ...]:
    """Return the strengths in their order."""
    losses = {
        float(part.name.removeprefix("x ")): part.losses
        for part in record.parts
        if part.family == "strength"
    }
    if losses:
        losses[1.0] = [line.adapter for line in lines]
    shifts = {shift.strength: shift for shift in record.shifts}
    return tuple(
        strength_of(strength, losses.get(strength), lines, shifts.get(strength), shifts.get(1.0))
        for strength in sorted(losses.keys() | shifts.keys())
    )


def strength_of(
    strength: float,
    losses: list[float] | None,
    lines: list[Line],
    shift: Shift | None,
    trained: Shift | None,
) -> Strength:
    """Return what is gained at a strength, and how far the model moves on other tasks."""
    is_whole = strength == 1
    kl_change = None
    if shift and not is_whole:
        changes = [own - whole for own, whole in zip(shift.kl, trained.kl, strict=True)]
        kl_change = ratio(changes, shift.tokens)
    return Strength(
        name="as trained" if is_whole else f"x {strength:g}",
        strength=strength,
        gain=gain_at(losses, lines) if losses else None,
        cost=cost_at(losses, lines) if losses and not is_whole else None,
        kl=ratio(shift.kl, shift.tokens) if shift else None,
        kl_change=kl_change,
        changed=sum(shift.changed_tokens) / sum(shift.tokens) if shift else None,
    )


def parts_of(record: Record, lines: list[Line]) -> tuple[PartEffect, ...]:
    """Return what each part costs if it is removed, and gains alone."""
    costs: dict[str, Estimate] = {}
    alone: dict[str, Estimate] = {}
    for part in record.parts:
        if part.family == "alone":
            alone[part.name] = gain_at(part.losses, lines)
        elif part.family != "strength":
            name = f"cut to {part.name}" if part.family == "cut" else part.name
            costs[name] = cost_at(part.losses, lines)
    whole = sure_gain(lines) if record.parts else None
    effects = [
        PartEffect(
            name=name,
            is_cut=name.startswith("cut to "),
            cost=costs.get(name),
            cost_share=share(costs.get(name), whole),
            alone=alone.get(name),
            alone_share=share(alone.get(name), whole),
        )
        for name in costs | alone
    ]
    effects.sort(key=lambda row: (row.is_cut, -row.cost.value if row.cost else 0))
    return tuple(effects)


def sure_gain(lines: list[Line]) -> float | None:
    """Return the gain that parts have a share of, or None if it is not sure enough.

    Its lower end must be above half of it. So shares of small gains are rarely shown; they are not
    right for that: where a true gain of 0.1 to 0.3 nats was lucky enough to pass this rule (in up
    to 43 % of simulated draws), the intervals of shares held the truth in 39 to 89 %.
    """
    whole = gain_of(lines)
    is_sure = whole.units >= FEWEST_UNITS and whole.low > whole.value / 2 > 0
    return whole.value if is_sure else None


def share(estimate: Estimate | None, whole: float | None) -> float | None:
    """Return what share of the whole gain this is, if both are known."""
    return estimate.value / whole if estimate and whole else None
