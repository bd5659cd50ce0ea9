"""What a record tells: each estimate of a report, computed once.

results_of(record) is the only way from counts to estimates. Tables, findings, the picture and
`compare` read its value, and `report --json` prints it as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from inspect_lora.changes import (
    ALL,
    NO_KIND,
    Check,
    CoupleGroup,
    PairGroup,
    checks_of,
    couples_of,
    in_one_family,
    pairs_of,
)
from inspect_lora.intervals import Estimate, effective_number, ratio
from inspect_lora.readings import Agreement, Reading, agreements_of
from inspect_lora.record import Exchange, Line, Record, Reply, Shift

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
    changed: Estimate | None  # the share of tokens at which another one is the likeliest


@dataclass(frozen=True)
class PartEffect:
    """What a part does: the loss rises by `cost` without it; it gains `alone` by itself."""

    name: str
    is_cut: bool  # to fewer directions of every update
    cost: Estimate | None
    alone: Estimate | None


@dataclass(frozen=True)
class Results:
    """All that a report tells of a record."""

    adapter: str
    base: str
    finished: bool
    steps: tuple[str, ...]  # the measurements that were made
    seed: str | None  # of the training; None: not known
    learned: int | None  # held-out lines left out since the adapter learned them; None: not known
    is_chosen: bool  # by the loss on these very lines, among the checkpoints of its training
    gain: tuple[KindGain, ...]  # of all held-out replies first
    template_effect: Estimate | None  # the base's loss by the adapter's template, less by its own
    not_served: str  # why the base was not measured by its own chat template; "": it was
    effective: float | None  # held-out lines of equal size that would weigh as much
    asked: dict[str, int]  # prompts by kind, without the other tasks
    askable: dict[str, int]  # prompts that might have been asked
    judged: int  # replies of each side that a rule judged
    judged_tasks: int  # those of them to other tasks
    cut: dict[str, int]  # judged replies of each side that had been cut
    max_new_tokens: int  # where they are cut
    checks: tuple[Check, ...]  # the least passed first, and last what all replies of both pass
    pairs: tuple[PairGroup, ...]  # each kind, the sum if the kinds agree, then by length
    couples: tuple[CoupleGroup, ...]  # of each kind
    couples_left_out: dict[str, int]  # by the reason
    compared: int  # comparisons that are judged together, by Holm
    replies: tuple[ReplyStatistics, ...]
    readings: tuple[Reading, ...]  # blind ones
    agreements: tuple[Agreement, ...]  # of each two readers
    tasks: int  # other tasks that measure the KL
    part_kinds: dict[str, int]  # held-out replies by kind that measure strengths and parts
    part_gain: Estimate | None  # of the adapter as trained, on those replies
    strengths: tuple[Strength, ...]
    parts: tuple[PartEffect, ...]  # the dearest first, then the cuts


def results_of(record: Record, readings: Sequence[Reading] = ()) -> Results:
    """Return what a record tells, and blind readings of its replies."""
    lines = beside_the_base_as_served(record.lines)
    part_lines = [lines[number] for number in record.part_lines]
    tokens, clusters = [line.tokens for line in lines], [line.cluster for line in lines]
    held_out = [exchange for exchange in record.exchanges if exchange.source != "tasks"]
    judged = [exchange for exchange in record.exchanges if exchange.checks]
    checks, pairs, couples = checks_of(record), pairs_of(record.pairs), couples_of(record.couples)
    family = in_one_family([*checks, *pairs, *couples])
    seed = record.known.get("SEED")
    return Results(
        adapter=record.adapter,
        base=record.conditions["base"],
        finished=record.finished,
        steps=tuple(record.seconds),
        seed=None if seed is None else str(seed),
        learned=record.learned,
        is_chosen=is_chosen_by_these_lines(record),
        gain=gains_of(lines, record.trained_kinds),
        template_effect=template_effect_of(record.lines),
        not_served=record.conditions["not_served"],
        effective=effective_number(tokens, clusters) if tokens else None,
        asked=kinds_of(held_out),
        askable={kind or NO_KIND: count for kind, count in record.asked_of.items()},
        judged=len(judged),
        judged_tasks=sum(exchange.source == "tasks" for exchange in judged),
        cut={side: sum(not getattr(each, side).ended for each in judged) for side in SIDES},
        max_new_tokens=record.max_new_tokens,
        checks=tuple(each for each in family if isinstance(each, Check)),
        pairs=tuple(each for each in family if isinstance(each, PairGroup)),
        couples=tuple(each for each in family if isinstance(each, CoupleGroup)),
        couples_left_out=record.couples_left_out,
        compared=sum(each.family_p is not None for each in family),
        replies=replies_of(record.exchanges),
        readings=tuple(readings),
        agreements=tuple(agreements_of(readings)),
        tasks=len(record.tasks),
        part_kinds=kinds_of(part_lines),
        part_gain=gain_at(adapter_losses(part_lines), part_lines) if record.parts else None,
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


def beside_the_base_as_served(lines: list[Line]) -> list[Line]:
    """Return the lines with the losses of the base by its own chat template, where that differs.

    A base that meets a template for the first time loses by it, and that is no gain of training.
    """
    return [
        line if line.served_base is None else replace(line, base=line.served_base) for line in lines
    ]


def template_effect_of(lines: list[Line]) -> Estimate | None:
    """Return how much the base loses by the adapter's template; None if it is its own."""
    if not lines or lines[0].served_base is None:
        return None
    return per_token([line.base - line.served_base for line in lines], lines)


def per_token(sums: Sequence[float], lines: list[Line], is_drawn: bool = False) -> Estimate:
    """Return the mean over the tokens of lines, such as of their losses or of differences.

    Lines that were drawn by kind are estimated as drawn: what kinds differ in is no error.
    """
    tokens, clusters = [line.tokens for line in lines], [line.cluster for line in lines]
    return ratio(sums, tokens, clusters, [line.kind for line in lines] if is_drawn else None)


def gains_of(lines: list[Line], trained: dict[str, int] | None) -> tuple[KindGain, ...]:
    """Return the gain on all held-out replies, then that of each kind, as the file has them."""
    by_kind: dict[str, list[Line]] = {}
    for line in lines:
        by_kind.setdefault(line.kind, []).append(line)
    rows = [
        kind_gain(kind or NO_KIND, None if trained is None else kind in trained, of_kind)
        for kind, of_kind in by_kind.items()
    ]
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
        gain=per_token([line.base - line.adapter for line in lines], lines),
    )


# ---- Replies


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


# ---- Strengths, parts, other tasks


def adapter_losses(lines: list[Line]) -> list[float]:
    """Return the losses of the adapter as trained."""
    return [line.adapter for line in lines]


def gain_at(losses: list[float], lines: list[Line]) -> Estimate:
    """Return the base's loss minus these losses of lines that were drawn by kind."""
    gains = [line.base - loss for line, loss in zip(lines, losses, strict=True)]
    return per_token(gains, lines, is_drawn=True)


def cost_at(losses: list[float], lines: list[Line]) -> Estimate:
    """Return these losses minus those of the adapter as trained, on the same lines."""
    costs = [loss - line.adapter for line, loss in zip(lines, losses, strict=True)]
    return per_token(costs, lines, is_drawn=True)


def strengths_of(record: Record, lines: list[Line]) -> tuple[Strength, ...]:
    """Return the strengths in their order."""
    losses = {
        float(part.name.removeprefix("x ")): part.losses
        for part in record.parts
        if part.family == "strength"
    }
    if losses:
        losses[1.0] = adapter_losses(lines)
    shifts = {shift.strength: shift for shift in record.shifts}
    return tuple(
        strength_of(strength, losses.get(strength), lines, shifts.get(strength))
        for strength in sorted(losses.keys() | shifts.keys())
    )


def strength_of(
    strength: float, losses: list[float] | None, lines: list[Line], shift: Shift | None
) -> Strength:
    """Return what is gained at a strength, and how far the model moves on other tasks."""
    is_whole = strength == 1
    return Strength(
        name="as trained" if is_whole else f"x {strength:g}",
        strength=strength,
        gain=gain_at(losses, lines) if losses else None,
        cost=cost_at(losses, lines) if losses and not is_whole else None,
        kl=ratio(shift.kl, shift.tokens) if shift else None,
        changed=ratio(shift.changed_tokens, shift.tokens) if shift else None,
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
    effects = [
        PartEffect(
            name=name,
            is_cut=name.startswith("cut to "),
            cost=costs.get(name),
            alone=alone.get(name),
        )
        for name in costs | alone
    ]
    effects.sort(key=lambda row: (row.is_cut, -row.cost.value if row.cost else 0))
    return tuple(effects)
