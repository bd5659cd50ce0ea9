"""Estimates with intervals: numbers go in and come out, and nothing here knows what an adapter is.

All intervals are about 95 %. Differences are paired: the same lines, with and without. What belongs
to one cluster (copies of a line, the replies of one conversation) counts once. The intervals cover
the choice of lines, and difference_of_seeds() alone what another seed of the training changes. How
often they hold the true value was simulated: docs/evidence.md has the table.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance

FEWEST_UNITS = 20  # with fewer of them nothing is called clear
NORMAL = 1.959964  # what the absolute value of a normal variable exceeds with a chance of 5 %
POWER = 1.43  # (1.96 + 0.84) / 1.96: a true effect of so many half widths is detected in 80 %

Clusters = Sequence[Hashable]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, and how many independent units (lines, or runs) it rests on."""

    value: float
    low: float  # -inf where the interval is not known; high is inf then
    high: float
    units: int

    @property
    def is_bounded(self) -> bool:
        """Whether the interval is known."""
        return math.isfinite(self.low)

    @property
    def is_clear(self) -> bool:
        """Whether there are units enough, and the interval leaves 0 out."""
        return self.units >= FEWEST_UNITS and not self.low <= 0 <= self.high

    @property
    def detectable(self) -> float:
        """The smallest true difference that units like these show as clear with 80 % power."""
        return POWER * (self.high - self.low) / 2


# ---- Means and their differences


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Clusters | None = None,
    chance: float = 0.05,
) -> Estimate:
    """Return sum(numerators) / sum(denominators) with its interval, which misses by this chance.

    Differences of two losses over tokens give the paired difference per token. The standard error
    is the jackknife's: the squared changes of the ratio as each cluster is left out. Long replies
    weigh more than short ones, so Student's t has the degrees of freedom of the effective number
    of clusters (Kish, Survey Sampling, 1965), less one.
    """
    clusters = clusters or range(len(numerators))
    above, below = cluster_sums(numerators, clusters), cluster_sums(denominators, clusters)
    count, total = len(below), sum(below)
    value = sum(above) / total if total else math.nan
    squares = sum(size**2 for size in below)
    if not total or total**2 < 2 * squares:  # fewer than two effective clusters
        return Estimate(value, -math.inf, math.inf, count)
    changes = [
        (top - value * size) / (total - size) for top, size in zip(above, below, strict=True)
    ]
    error = math.sqrt(sum(change**2 for change in changes) * (count - 1) / count)
    margin = student_quantile(chance, total**2 / squares - 1) * error
    return Estimate(value, value - margin, value + margin, count)


def cluster_sums(values: Sequence[float], clusters: Clusters) -> list[float]:
    """Return the sum of the values of each cluster."""
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value
    return list(sums.values())


def effective_number(sizes: Sequence[float], clusters: Clusters) -> float:
    """Return the number of clusters of equal size that weigh as much as these (Kish)."""
    totals = cluster_sums(sizes, clusters)
    return sum(totals) ** 2 / sum(total**2 for total in totals)


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


def difference_of_seeds(
    first: Sequence[float], second: Sequence[float], chance: float = 0.05
) -> Estimate:
    """Return the mean of the second runs less that of the first, with Welch's interval.

    The settings may spread differently, and their seeds are not taken as pairs.
    """
    value, count = fmean(second) - fmean(first), len(first) + len(second)
    if min(len(first), len(second)) < 2:
        return Estimate(value, -math.inf, math.inf, count)
    squares = [variance(runs) / len(runs) for runs in (first, second)]
    if not sum(squares):
        return Estimate(value, value, value, count)
    parts = zip(squares, (first, second), strict=True)
    freedom = sum(squares) ** 2 / sum(square**2 / (len(runs) - 1) for square, runs in parts)
    margin = student_quantile(chance, freedom) * math.sqrt(sum(squares))
    return Estimate(value, value - margin, value + margin, count)


# ---- Shares of lines, and how they change


def proportion(passed: float, count: float) -> Estimate:
    """Return a share with Wilson's 95 % interval, which has a width for none and all, too.

    It holds 95 % on average over all shares, and 84 % at the worst, near none and near all.
    """
    value, weight = passed / count, NORMAL**2 / count
    middle = (value + weight / 2) / (1 + weight)
    margin = math.sqrt(weight * value * (1 - value) + weight**2 / 4) / (1 + weight)
    return Estimate(value, middle - margin, middle + margin, round(count))


def clustered_proportion(holds: Sequence[bool], clusters: Clusters) -> Estimate:
    """Return the share of lines on which something holds, with the design effect of clusters."""
    size = effective_sample_size(holds, clusters)
    share = proportion(size * sum(holds) / len(holds), size)
    return replace(share, units=len(set(clusters)))


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
        squared = count * (2 * share_lost + change * (1 - change))
        distance = won - lost - count * change
        return distance / math.sqrt(squared) if squared > 0 else math.copysign(1e9, distance)

    def end(outside: float) -> float:
        inside = value
        for _ in range(50):
            middle = (inside + outside) / 2
            if abs(score(middle)) < NORMAL:
                inside = middle
            else:
                outside = middle
        return inside

    return Estimate(value, end(-1.0), end(1.0), round(count))


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
    def holds_always(self) -> bool:
        """Whether it holds on all lines, before and after: there is little to tell."""
        return self.before == self.after == self.count


def change_of(
    before: Sequence[bool], after: Sequence[bool], clusters: Clusters | None = None
) -> Change:
    """Return how the lines change on which something holds, with the design effect of clusters."""
    clusters = clusters or range(len(before))
    turned = Counter(zip(before, after, strict=True))
    lost, won = turned[True, False], turned[False, True]
    differences = [now - then for then, now in zip(before, after, strict=True)]
    size = effective_sample_size(differences, clusters)
    weight = size / len(before)
    change = replace(paired_change(weight * lost, weight * won, size), units=len(set(clusters)))
    return Change(len(before), sum(before), sum(after), lost, won, change)


def effective_sample_size(values: Sequence[float], clusters: Clusters) -> float:
    """Return how many independent lines would tell as much about the mean of values as these do.

    Lines of one cluster may be alike. Divided by the design effect (Rao and Scott, Annals of
    Statistics 20 (1992), 1-21): the variance of the mean over clusters, beside that over lines.
    Few clusters do not tell it well, so it is raised as Student's t is above the normal quantile;
    it is at least 1, and at most what it would be if all lines of a cluster were the same.
    """
    count, mean = len(values), fmean(values)
    deviations = [value - mean for value in values]
    least = effective_number([1] * count, clusters)
    total = math.fsum(deviation**2 for deviation in deviations)
    sums = cluster_sums(deviations, clusters)
    if least == count or len(sums) < 2 or not total:
        return least
    between = sum(deviation**2 for deviation in sums) * len(sums) / (len(sums) - 1)
    effect = between / total * (student_quantile(0.05, len(sums) - 1) / NORMAL) ** 2
    return min(count, max(least, count / effect)) if effect else count
