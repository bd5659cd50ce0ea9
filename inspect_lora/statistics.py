"""Estimates with intervals, made from what evidence.json counts, and how they are written.

All intervals are about 95 %. Differences are paired: the same lines, with and without. What belongs
to one cluster (copies of a line, the replies of one conversation) counts once. The intervals cover
the choice of lines, and difference_of_seeds() alone what another seed of the training changes. How
often they hold the true value was simulated: docs/evidence.md has the table.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from inspect_lora.record import Exchange, Line, Pair, Part, Record, Shift

ALL, NO_KIND = "(all)", "(no kind)"
TASKS = "tasks: "  # what the names of checks on other tasks begin with
FEWEST_LINES = 20  # with fewer of them nothing is called clear
FEWEST_NET_CHANGES = 4  # lines that turn one way, and none the other: 4 / sqrt(4) is above 1.96
NORMAL = 1.959964  # what the absolute value of a normal variable exceeds with a chance of 5 %
POWER = 1.43  # (1.96 + 0.84) / 1.96: a true effect of so many half widths is seen in 80 %


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, and how many independent lines (or runs) it rests on."""

    value: float
    low: float
    high: float
    lines: int

    def is_clear(self) -> bool:
        """Return whether there are lines enough, and the interval leaves 0 out."""
        return self.lines >= FEWEST_LINES and not self.low <= 0 <= self.high


# ---- As text


def places_of(*estimates: Estimate | None, fewest: int = 2) -> int:
    """Return how many decimals the numbers of a row get: so few, or up to two more."""
    known = [estimate for estimate in estimates if estimate and math.isfinite(estimate.low)]
    for places in (fewest, fewest + 1):
        if not any(needs_more_than(places, estimate) for estimate in known):
            return places
    return fewest + 2


def needs_more_than(places: int, estimate: Estimate) -> bool:
    """Return whether so many decimals hide an interval's width, or on which side of 0 it ends."""
    half_width = (estimate.high - estimate.low) / 2
    reads_as_zero = any(end and not round(end, places) for end in (estimate.low, estimate.high))
    return reads_as_zero or 0 < half_width < 10**-places


def number(value: float, places: int = 2, sign: str = "") -> str:
    """Return a number, such as 3.82; with the sign "+", +0.80."""
    text = f"{value:{sign}.{places}f}"
    return text if text.strip("+-0.") else text.lstrip("+-")  # no -0.00


def interval(estimate: Estimate, places: int = 2) -> str:
    """Return an interval; its ends are not known where it rests on one line."""
    if not math.isfinite(estimate.low):
        return "?"
    return " to ".join(number(end, places) for end in (estimate.low, estimate.high))


def cell(estimate: Estimate | None, sign: str = "", places: int | None = None) -> str:
    """Return a number with its interval, such as +0.80 (0.75 to 0.86)."""
    if estimate is None:
        return ""
    places = places_of(estimate) if places is None else places
    return f"{number(estimate.value, places, sign)} ({interval(estimate, places)})"


def points(change: Estimate) -> str:
    """Return a change in percentage points, such as +20 (9 to 35); of few lines no interval."""
    ends = (100 * end for end in (change.value, change.low, change.high))
    scaled = Estimate(*ends, change.lines)
    if change.lines < FEWEST_LINES:
        return number(scaled.value, 0, "+")
    return cell(scaled, "+", places_of(scaled, fewest=0))


def percent(value: float) -> str:
    """Return a share in whole per cents."""
    return f"{round(100 * value)} %"  # an integer has no -0


def percents(share: Estimate) -> str:
    """Return a share with its interval, such as 55 % (46 to 64)."""
    return f"{percent(share.value)} ({100 * share.low:.0f} to {100 * share.high:.0f})"


# ---- Means and their differences


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Sequence[str] | None = None,
    chance: float = 0.05,
) -> Estimate:
    """Return sum(numerators) / sum(denominators) with its interval, which misses by this chance.

    Differences of two losses over tokens give the paired difference a token; two differences give
    a share. What belongs to one cluster is added up first and counts once. The standard error is
    the jackknife's: the squared changes of the ratio as each cluster is left out. Long replies
    weigh more than short ones, so Student's t has the degrees of freedom of the effective number
    of lines (Kish, Survey Sampling, 1965), less one.
    """
    sums: dict[str | int, list[float]] = {}
    for number, (above, below) in enumerate(zip(numerators, denominators, strict=True)):
        cluster_sums = sums.setdefault(clusters[number] if clusters else number, [0.0, 0.0])
        cluster_sums[0] += above
        cluster_sums[1] += below
    total = sum(below for _, below in sums.values())
    value = sum(above for above, _ in sums.values()) / total if total else math.nan
    squares = sum(below**2 for _, below in sums.values())
    if not total or total**2 < 2 * squares:  # fewer than two effective lines
        return Estimate(value, -math.inf, math.inf, len(sums))
    changes = ((above - value * below) / (total - below) for above, below in sums.values())
    variance = sum(change**2 for change in changes) * (len(sums) - 1) / len(sums)
    margin = student_quantile(chance, total**2 / squares - 1) * math.sqrt(variance)
    return Estimate(value, value - margin, value + margin, len(sums))


def effective_number(sizes: Sequence[float], clusters: Sequence[str]) -> float:
    """Return the number of clusters of equal size that weigh as much as these (Kish)."""
    totals: Counter[str] = Counter()
    for cluster, size in zip(clusters, sizes, strict=True):
        totals[cluster] += size
    return sum(totals.values()) ** 2 / sum(total**2 for total in totals.values())


@functools.cache
def student_quantile(chance: float, freedom: float) -> float:
    """Return what the absolute value of Student's t exceeds with this probability.

    With t = sqrt(freedom) sinh(u) the density of u is proportional to cosh(u) ** -freedom. It is
    integrated by Simpson's rule. Newton's steps come from below and never overshoot, since the
    density falls. Right to 1e-6 of the value for 1 to 100,000 degrees of freedom and a chance of
    0.00006 (780 pairs) or more.
    """
    half = math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)
    half = math.exp(half) * math.sqrt(math.pi) / 2  # the integral from 0 to infinity
    u = 0.0
    for _ in range(25):
        heights = [math.cosh(u * k / 200) ** -freedom for k in range(201)]
        inner = 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
        area = (heights[0] + inner + heights[-1]) * u / 600
        u += ((1 - chance) * half - area) / heights[-1]
    return math.sqrt(freedom) * math.sinh(u)


def smallest_effect_seen(estimate: Estimate) -> float:
    """Return the true difference that lines like these would show as clear in 80 % of draws."""
    return POWER * (estimate.high - estimate.low) / 2


# ---- Seeds of the training as the unit


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation of runs; of one run it is not known (NaN)."""
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def difference_of_seeds(
    first: Sequence[float], second: Sequence[float], chance: float = 0.05
) -> Estimate:
    """Return the mean of the second runs less that of the first, with Welch's interval.

    The settings may spread differently, and their seeds are not taken as pairs.
    """
    count = len(first) + len(second)
    value = math.fsum(second) / len(second) - math.fsum(first) / len(first)
    if min(len(first), len(second)) < 2:
        return Estimate(value, -math.inf, math.inf, count)
    shares = [spread(values) ** 2 / len(values) for values in (first, second)]
    variance = sum(shares)
    if variance == 0:
        return Estimate(value, value, value, count)
    parts = zip(shares, (first, second), strict=True)
    freedom = variance**2 / sum(square**2 / (len(values) - 1) for square, values in parts)
    margin = student_quantile(chance, freedom) * math.sqrt(variance)
    return Estimate(value, value - margin, value + margin, count)


# ---- Shares of lines, and how they change


def share(passed: float, count: float) -> Estimate:
    """Return a share with Wilson's 95 % interval, which has a width for none and all, too.

    It holds 95 % on average over all shares, and 84 % at the worst, near none and near all.
    """
    value, weight = passed / count, NORMAL**2 / count
    middle = (value + weight / 2) / (1 + weight)
    margin = math.sqrt(weight * value * (1 - value) + weight**2 / 4) / (1 + weight)
    return Estimate(value, middle - margin, middle + margin, round(count))


def paired_change(lost: float, won: float, count: float) -> Estimate:
    """Return the share that passes after a change less that before it, with its 95 % interval.

    lost, won: how many of count lines pass before only, and after only. The interval has each true
    change that the score test does not reject (Tango, Statistics in Medicine 17 (1998), 891-908).
    On a grid of 210 truths it held 92.8 % and more at 20, 40 and 100 lines, 95 to 97 % on average;
    Newcombe's method 10 held 88.4 % where most lines stay and the others all turn one way.
    """
    value = (won - lost) / count

    def score(change: float) -> float:
        # The likeliest share of lost lines, if the true change were this, gives the variance.
        linear = (2 * count - won + lost) * change - won - lost
        root = math.sqrt(max(0.0, linear**2 + 8 * count * lost * change * (1 - change)))
        share_lost = (root - linear) / (4 * count)
        variance = count * (2 * share_lost + change * (1 - change))
        distance = won - lost - count * change
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(1e9, distance)

    def end(inside: float, outside: float) -> float:
        for _ in range(50):
            middle = (inside + outside) / 2
            if abs(score(middle)) < NORMAL:
                inside = middle
            else:
                outside = middle
        return inside

    return Estimate(value, end(value, -1.0), end(value, 1.0), round(count))


@dataclass(frozen=True)
class Change:
    """On how many lines something holds before and after, and how the share changes."""

    count: int
    before: int
    after: int
    lost: int  # holds before only
    won: int  # holds after only
    change: Estimate

    @property
    def is_clear_loss(self) -> bool:
        """Return whether fewer lines pass, and the interval leaves 0 out."""
        return self.change.is_clear() and self.change.value < 0

    @property
    def can_show_a_fall(self) -> bool:
        """Return whether it holds often enough before for a fall to be detected with 80 % power."""
        return self.before / self.count >= smallest_change_seen(self.change.lines)

    @property
    def holds_always(self) -> bool:
        """Return whether it holds on all lines, before and after: there is little to tell."""
        return self.before == self.after == self.count


def independent_lines(values: Sequence[float], clusters: Sequence[str]) -> float:
    """Return how many independent lines would tell as much about the mean of values as these do.

    Lines of one cluster may be alike. Divided by the design effect (Rao and Scott, Annals of
    Statistics 20 (1992), 1-21): the variance of the mean over clusters, beside that over lines.
    Few clusters do not tell it well, so it is raised as Student's t is above the normal quantile;
    it is at least 1, and at most what it would be if all lines of a cluster were the same.
    """
    count, sizes = len(values), Counter(clusters)
    least = effective_number([1] * count, clusters)
    mean = math.fsum(values) / count
    total = math.fsum((value - mean) ** 2 for value in values)
    if least == count or len(sizes) < 2 or not total:
        return least
    sums: Counter[str] = Counter()
    for cluster, value in zip(clusters, values, strict=True):
        sums[cluster] += value - mean
    between = sum(deviation**2 for deviation in sums.values()) * len(sizes) / (len(sizes) - 1)
    effect = between / total * (student_quantile(0.05, len(sizes) - 1) / NORMAL) ** 2
    return min(count, max(least, count / effect)) if effect else count


def change_of(
    before: Sequence[bool], after: Sequence[bool], clusters: Sequence[str] | None = None
) -> Change:
    """Return how the lines change on which something holds."""
    turned = Counter(zip(before, after, strict=True))
    lost, won = turned[True, False], turned[False, True]
    clusters = clusters or [str(number) for number in range(len(before))]
    differences = [now - then for then, now in zip(before, after, strict=True)]
    independent = independent_lines(differences, clusters)
    weight = independent / len(before)
    change = paired_change(weight * lost, weight * won, independent)
    change = replace(change, lines=len(set(clusters)))
    return Change(len(before), sum(before), sum(after), lost, won, change)


@functools.cache
def smallest_change_seen(count: int) -> float:
    """Return which share of lines, turning one way only, is seen with 80 % power."""
    for per_mille in range(1, 1000):
        turning = per_mille / 1000
        missed = sum(
            math.comb(count, turned) * turning**turned * (1 - turning) ** (count - turned)
            for turned in range(min(FEWEST_NET_CHANGES, count + 1))
        )
        if missed <= 0.2:
            return turning
    return 1.0


# ---- Of a record: losses


def per_token(numbers: Sequence[float], lines: list[Line], chance: float = 0.05) -> Estimate:
    """Return the mean over the tokens of lines, such as of their losses or of differences."""
    tokens = [line.tokens for line in lines]
    return ratio(numbers, tokens, [line.cluster for line in lines], chance)


def gain(lines: list[Line]) -> Estimate:
    """Return the base's loss minus the adapter's, in nats per token: above 0 is better."""
    return per_token([line.base - line.adapter for line in lines], lines)


def lines_of_parts(record: Record) -> list[Line]:
    """Return the lines that the parts were measured on."""
    return [record.lines[number] for number in record.part_lines]


def loss_beside_whole(record: Record, part: Part) -> Estimate:
    """Return a part's loss minus the adapter's, in nats per token: what leaving it out costs."""
    lines = lines_of_parts(record)
    costs = [loss - line.adapter for line, loss in zip(lines, part.losses, strict=True)]
    return per_token(costs, lines)


def gain_of_part(record: Record, part: Part) -> Estimate:
    """Return the base's loss minus that of a part, in nats per token."""
    lines = lines_of_parts(record)
    gains = [line.base - loss for line, loss in zip(lines, part.losses, strict=True)]
    return per_token(gains, lines)


def gain_for_shares(record: Record) -> float | None:
    """Return the gain that parts have per cents of, or None if it is not sure enough.

    Its lower end must be above half of it. So shares of small gains are rarely shown; they are not
    right for that: where a true gain of 0.1 to 0.3 nats was lucky enough to pass this rule (in up
    to 43 % of simulated draws), the intervals of shares held the truth in 39 to 89 %.
    """
    whole = gain(lines_of_parts(record)) if record.parts else None
    is_sure = whole and whole.lines >= FEWEST_LINES and whole.low > whole.value / 2 > 0
    return whole.value if is_sure else None


@dataclass(frozen=True)
class KindGain:
    """The losses of all held-out replies, or of those of a kind, in nats per token."""

    kind: str
    is_trained: bool | None  # whether the training file has lines of this kind; None: not known
    replies: int
    base: float
    adapter: float
    gain: Estimate
    lower_on: int  # replies on which the adapter's loss is the lower one


def gains(record: Record) -> list[KindGain]:
    """Return the gain on all held-out replies, then that of each kind, the largest first."""
    by_kind: dict[str, list[Line]] = {}
    for line in record.lines:
        by_kind.setdefault(line.kind, []).append(line)
    rows = [gain_of_kind(record, kind, lines) for kind, lines in by_kind.items()]
    rows = sorted(rows, key=lambda row: -row.gain.value) if len(rows) > 1 else []
    return [gain_of_kind(record, ALL, record.lines), *rows] if record.lines else []


def gain_of_kind(record: Record, kind: str, lines: list[Line]) -> KindGain:
    """Return the losses of these lines."""
    is_known = kind != ALL and record.trained_kinds is not None
    tokens = sum(line.tokens for line in lines)
    return KindGain(
        kind=kind or NO_KIND,
        is_trained=kind in record.trained_kinds if is_known else None,
        replies=len(lines),
        base=sum(line.base for line in lines) / tokens,
        adapter=sum(line.adapter for line in lines) / tokens,
        gain=gain(lines),
        lower_on=sum(line.adapter < line.base for line in lines),
    )


# ---- Of a record: strengths, parts, other tasks


@dataclass(frozen=True)
class Strength:
    """The adapter at a strength: 1 is as trained. The differences to that are paired."""

    name: str
    strength: float
    gain: Estimate | None
    cost: Estimate | None  # its loss minus that of the adapter as trained
    kl: Estimate | None  # on other tasks, in nats per token
    changed: float | None  # the share of tokens at which another one is the likeliest
    kl_change: Estimate | None  # its KL minus that of the adapter as trained


def strengths(record: Record) -> list[Strength]:
    """Return the strengths in their order."""
    parts = {float(part.name[2:]): part for part in record.parts if part.family == "strength"}
    if parts:
        parts[1.0] = Part("strength", "x 1", [line.adapter for line in lines_of_parts(record)])
    shifts = shifts_of(record)
    rows = []
    for strength in sorted(parts.keys() | shifts.keys()):
        part, shift = parts.get(strength), shifts.get(strength)
        is_whole = strength == 1
        rows.append(
            Strength(
                "as trained" if is_whole else f"x {strength:g}",
                strength,
                gain_of_part(record, part) if part else None,
                loss_beside_whole(record, part) if part and not is_whole else None,
                *kl_and_changed(shift),
                kl_change(shifts[1.0], shift) if shift and not is_whole else None,
            )
        )
    return rows


def shifts_of(record: Record) -> dict[float, Shift]:
    """Return the changes on other tasks by strength."""
    return {shift.strength: shift for shift in record.shifts}


def kl_and_changed(shift: Shift | None) -> tuple[Estimate | None, float | None]:
    """Return the KL in nats per token, and the share of tokens at which the likeliest changes."""
    if shift is None:
        return None, None
    return ratio(shift.kl, shift.tokens), sum(shift.changed_tokens) / sum(shift.tokens)


def kl_change(first: Shift, second: Shift) -> Estimate:
    """Return the second KL minus the first on the same replies, in nats per token."""
    changes = [after - before for before, after in zip(first.kl, second.kl, strict=True)]
    return ratio(changes, first.tokens)


@dataclass(frozen=True)
class PartEffect:
    """What a part does: the loss rises by `cost` without it; it gains `alone` by itself."""

    name: str
    is_cut: bool  # to fewer directions of every update
    cost: Estimate | None
    alone: Estimate | None


def part_effects(record: Record) -> list[PartEffect]:
    """Return the parts, the dearest first, and then the adapter cut to fewer directions."""
    costs, gains_alone = {}, {}
    for part in record.parts:
        if part.family == "alone":
            gains_alone[part.name] = gain_of_part(record, part)
        elif part.family != "strength":
            name = f"cut to {part.name}" if part.family == "cut" else part.name
            costs[name] = loss_beside_whole(record, part)
    effects = [
        PartEffect(name, name.startswith("cut to "), costs.get(name), gains_alone.get(name))
        for name in costs | gains_alone
    ]
    effects.sort(key=lambda row: (row.is_cut, -row.cost.value if row.cost else 0))
    return effects


# ---- Of a record: checks


@dataclass
class Verdict:
    """What a check says of the two replies to a prompt."""

    exchange: Exchange
    rule: dict[str, Any]
    base: bool
    adapter: bool


def verdicts(record: Record) -> dict[str, list[Verdict]]:
    """Return the verdicts of each check; those on the other tasks have a name of their own."""
    by_title: dict[str, list[Verdict]] = {}
    for exchange in record.exchanges:
        for name, rule in exchange.checks.items():
            title = f"{TASKS}{name}" if exchange.source == "tasks" else name
            passes = exchange.base.passes[name], exchange.adapter.passes[name]
            by_title.setdefault(title, []).append(Verdict(exchange, rule, *passes))
    return by_title


def checks(record: Record) -> dict[str, Change]:
    """Return how many replies pass each check, by base and adapter.

    The least passed comes first, then the other tasks, and last what all replies of both pass.
    """
    changes = {title: change_of_check(record, asked) for title, asked in verdicts(record).items()}

    def order(title: str) -> tuple[bool, bool, float]:
        change = changes[title]
        return change.holds_always, title.startswith(TASKS), change.after / change.count

    return {title: changes[title] for title in sorted(changes, key=order)}


def change_of_check(record: Record, asked: list[Verdict]) -> Change:
    """Return how many replies pass a check, by base and adapter."""
    known = {line.where: line.cluster for line in record.lines}
    clusters = [known.get(verdict.exchange.where, verdict.exchange.where) for verdict in asked]
    before, after = [verdict.base for verdict in asked], [verdict.adapter for verdict in asked]
    return change_of(before, after, clusters)


# ---- Of a record: pairs


@dataclass(frozen=True)
class Preferences:
    """On how many pairs the good reply is the likelier one; a tie is not right.

    corrected is the accuracy of DPO's implicit reward: the adapter's log-probability of the good
    reply less that of the bad one, minus the same of the base.
    """

    pairs: int
    by_sum: Change  # of log-probabilities, from base to adapter
    by_mean: Change  # over the tokens of each reply
    corrected: int
    corrected_share: Estimate


def preferences(pairs: list[Pair]) -> Preferences:
    """Return which replies base and adapter prefer, over all of these pairs."""
    clusters = [pair.cluster for pair in pairs]
    sums = [
        (pair.base_good > pair.base_bad, pair.adapter_good > pair.adapter_bad) for pair in pairs
    ]
    means = []
    for pair in pairs:
        good, bad = pair.good_tokens, pair.bad_tokens
        base = pair.base_good / good > pair.base_bad / bad
        means.append((base, pair.adapter_good / good > pair.adapter_bad / bad))
    corrected = [is_right_beside_base(pair) for pair in pairs]
    independent = independent_lines(corrected, clusters)
    corrected_share = share(independent * sum(corrected) / len(pairs), independent)
    return Preferences(
        len(pairs),
        change_of(*zip(*sums, strict=True), clusters),
        change_of(*zip(*means, strict=True), clusters),
        sum(corrected),
        replace(corrected_share, lines=len(set(clusters))),
    )


def is_right_beside_base(pair: Pair) -> bool:
    """Return whether the adapter moved towards the good reply, beside what the base gives it."""
    return pair.adapter_good - pair.adapter_bad > pair.base_good - pair.base_bad


def pairs_by_kind(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Return all pairs, and those of each kind if there are several."""
    groups: dict[str, list[Pair]] = {ALL: pairs} if pairs else {}
    kinds = sorted({pair.kind for pair in pairs})
    for kind in kinds if len(kinds) > 1 else []:
        groups[kind or NO_KIND] = [pair for pair in pairs if pair.kind == kind]
    return groups


def pairs_by_length(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Return pairs by which reply has more tokens: a longer one has less probability."""
    groups = {
        "good reply longer": [pair for pair in pairs if pair.good_tokens > pair.bad_tokens],
        "bad reply longer": [pair for pair in pairs if pair.good_tokens < pair.bad_tokens],
        "of one length": [pair for pair in pairs if pair.good_tokens == pair.bad_tokens],
    }
    return {name: group for name, group in groups.items() if group}
