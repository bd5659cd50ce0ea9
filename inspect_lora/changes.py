"""What changed on held-out prompts: checks, pairs and couples, and which changes are clear.

A comparison is clear if its p is below 5 % after Holm's correction for all that was compared: each
check, the pairs of each kind, and the couples of each kind. Nothing else is called clear.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from inspect_lora.intervals import (
    FEWEST_UNITS,
    Change,
    Estimate,
    Measured,
    change_of,
    holm,
    mean_of,
    measured_mean,
    p_of_one_mean,
    share_of,
)
from inspect_lora.record import Couple, Exchange, Pair, Record

ALL, NO_KIND = "(all)", "(no kind)"
FAILURE = 0.1  # of the replies: a check that so many fail is failing
Entry = TypeVar("Entry", Pair, Couple)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A comparison, and whether it is clear."""

    family_p: float | None = None  # after Holm; None: it was not tested

    @property
    def is_clear(self) -> bool:
        """Whether there is a change, judged beside all other comparisons."""
        return self.family_p is not None and self.family_p < 0.05

    @property
    def effect(self) -> Estimate:
        """What is compared with 0."""
        raise NotImplementedError


@dataclass(frozen=True)
class Check(Compared):
    """How many replies of base and adapter pass a rule."""

    name: str
    is_task: bool  # replies to other tasks, and not to held-out prompts
    kinds: tuple[str, ...]  # of the prompts
    passed: Change
    passing: Estimate  # the share of the adapter's replies that pass

    @property
    def title(self) -> str:
        """Its name, which other tasks may share with held-out prompts."""
        return f"tasks: {self.name}" if self.is_task else self.name

    @property
    def still_fails(self) -> bool:
        """Whether the base fails it, too, as often as is called failing, and no less often."""
        return self.passed.before <= min(self.failing_from, self.passed.after)

    @property
    def failing_from(self) -> float:
        """The number of replies that pass, at which and below which a check is failing."""
        return (1 - FAILURE) * self.passed.count

    @property
    def standing(self) -> str:
        """What became of it: "worse" or "improved" if that is clear, "failing" or "unchanged"."""
        if self.is_clear:
            return "improved" if self.passed.change.value > 0 else "worse"
        return "failing" if self.passed.after <= self.failing_from else "unchanged"

    @property
    def effect(self) -> Estimate:
        """The change of the share that passes."""
        return self.passed.change


@dataclass(frozen=True)
class PairGroup(Compared):
    """How far the adapter moved the odds of two replies towards the good one."""

    name: str
    is_kind: bool  # all pairs of a kind, and no sum of kinds, nor those with one reply longer
    pairs: int
    shift: Estimate  # of log p(good) - log p(bad), in nats a pair, from base to adapter
    likelier: Change  # pairs whose good reply has the higher log-probability, as a sum
    likelier_share: Estimate  # of the adapter

    @property
    def effect(self) -> Estimate:
        """The mean shift."""
        return self.shift


@dataclass(frozen=True)
class CoupleGroup(Compared):
    """Whether the replies of lines A and B are told apart by their prompts.

    D = [log p(a|A) - log p(b|A)] - [log p(a|B) - log p(b|B)], in nats a couple, with the reference
    replies a and b: what a reply is liked for after any prompt, and its length, cancel.
    """

    name: str
    couples: int
    base: Estimate
    adapter: Estimate
    change: Estimate
    base_above: Estimate  # the share of couples whose D is above 0; 0 counts half
    adapter_above: Estimate

    @property
    def effect(self) -> Estimate:
        """The change of D."""
        return self.change


def in_one_family(groups: Sequence[Compared]) -> list[Compared]:
    """Return the comparisons with their p after Holm; those on fewer than 20 units have none."""
    tested = [number for number, each in enumerate(groups) if is_tested(each)]
    adjusted = holm([groups[number].effect.p for number in tested])
    chances = dict(zip(tested, adjusted, strict=True))
    return [replace(each, family_p=chances.get(number)) for number, each in enumerate(groups)]


def is_tested(group: Compared) -> bool:
    """Return whether a comparison belongs to the family: enough units, and no sum of others."""
    is_sum = isinstance(group, PairGroup) and not group.is_kind
    return not is_sum and group.effect.units >= FEWEST_UNITS and group.effect.is_bounded


# ---- Checks


def checks_of(record: Record) -> list[Check]:
    """Return how many replies pass each check, by base and adapter, the least passed first."""
    clusters = {line.where: line.cluster for line in record.lines}
    asked: dict[tuple[str, bool], list[Exchange]] = {}
    for exchange in record.exchanges:
        for name in exchange.checks:
            asked.setdefault((name, exchange.source == "tasks"), []).append(exchange)
    checks = [
        check_of(name, is_task, exchanges, clusters) for (name, is_task), exchanges in asked.items()
    ]

    def order(check: Check) -> tuple[bool, bool, float]:
        return check.passed.holds_always, check.is_task, check.passed.after / check.passed.count

    return sorted(checks, key=order)


def check_of(
    name: str, is_task: bool, exchanges: list[Exchange], clusters: dict[str, str]
) -> Check:
    """Return how many of these replies pass a check."""
    of_lines = [clusters.get(exchange.where, exchange.where) for exchange in exchanges]
    before = [exchange.base.passes[name] for exchange in exchanges]
    after = [exchange.adapter.passes[name] for exchange in exchanges]
    return Check(
        name=name,
        is_task=is_task,
        kinds=tuple(dict.fromkeys(exchange.kind or NO_KIND for exchange in exchanges)),
        passed=change_of(before, after, of_lines),
        passing=share_of(after, of_lines),
    )


# ---- Pairs


def pairs_of(pairs: list[Pair]) -> list[PairGroup]:
    """Return the pairs of each kind, then all of them if the kinds agree, and by the longer reply.

    A sum favours the short reply, and its shift the long one: an adapter that makes every token
    likelier moves a pair by the tokens that its good reply has more.
    """
    if not pairs:
        return []
    kinds = by_kind(pairs).items()
    groups = [pair_group(kind, of_kind, is_kind=True) for kind, of_kind in kinds]
    if len(kinds) > 1 and p_of_one_mean([mean_shift(of_kind) for _, of_kind in kinds]) >= 0.05:
        groups.append(pair_group(ALL, pairs))
    longer_good = [pair for pair in pairs if pair.good_tokens > pair.bad_tokens]
    longer_bad = [pair for pair in pairs if pair.good_tokens < pair.bad_tokens]
    for name, of_length in (("good reply longer", longer_good), ("bad reply longer", longer_bad)):
        if of_length:
            groups.append(pair_group(name, of_length))
    return groups


def by_kind(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Return the entries of each kind, by its name in the alphabet."""
    kinds: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.kind):
        kinds.setdefault(entry.kind or NO_KIND, []).append(entry)
    return kinds


def pair_group(name: str, pairs: list[Pair], is_kind: bool = False) -> PairGroup:
    """Return how far these pairs moved, and which replies base and adapter find likelier."""
    clusters = [pair.cluster for pair in pairs]
    base = [is_above(pair.base_good - pair.base_bad) for pair in pairs]
    adapter = [is_above(pair.adapter_good - pair.adapter_bad) for pair in pairs]
    return PairGroup(
        name=name,
        is_kind=is_kind,
        pairs=len(pairs),
        shift=mean_shift(pairs).within(),
        likelier=change_of(base, adapter, clusters),
        likelier_share=share_of(adapter, clusters),
    )


def mean_shift(pairs: list[Pair]) -> Measured:
    """Return the mean shift of pairs with its error."""
    return measured_mean([shift_of(pair) for pair in pairs], [pair.cluster for pair in pairs])


def is_above(number: float) -> float:
    """Return 1 for a number above 0, and 0.5 for 0."""
    return (number > 0) + (number == 0) / 2


def shift_of(pair: Pair) -> float:
    """Return how far the adapter moved the odds to the good reply (DPO's implicit reward)."""
    return (pair.adapter_good - pair.adapter_bad) - (pair.base_good - pair.base_bad)


# ---- Couples


def couples_of(couples: list[Couple]) -> list[CoupleGroup]:
    """Return how well the couples of each kind are told apart."""
    return [couple_group(kind, of_kind) for kind, of_kind in by_kind(couples).items()]


def couple_group(name: str, couples: list[Couple]) -> CoupleGroup:
    """Return D of base and adapter on these couples."""
    clusters = [couple.cluster for couple in couples]
    base = [
        (each.base_own_a - each.base_other_a) - (each.base_other_b - each.base_own_b)
        for each in couples
    ]
    adapter = [
        (each.adapter_own_a - each.adapter_other_a) - (each.adapter_other_b - each.adapter_own_b)
        for each in couples
    ]
    return CoupleGroup(
        name=name,
        couples=len(couples),
        base=mean_of(base, clusters),
        adapter=mean_of(adapter, clusters),
        change=mean_of([now - then for then, now in zip(base, adapter, strict=True)], clusters),
        base_above=share_of([is_above(each) for each in base], clusters),
        adapter_above=share_of([is_above(each) for each in adapter], clusters),
    )
