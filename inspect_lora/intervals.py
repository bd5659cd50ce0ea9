"""Estimates with intervals: numbers go in and come out, and nothing here knows what an adapter is.

All intervals are about 95 %. Differences are paired: the same lines, with and without. What belongs
to one cluster (copies of a line, the replies of one conversation) counts once. The intervals cover
the choice of lines, and difference_of_seeds() alone what another seed of the training changes. How
often they hold the true value was simulated: docs/evidence.md has the table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance

FEWEST_UNITS = 20  # with fewer of them nothing is called clear
NORMAL = 1.959964  # what the absolute value of a normal variable exceeds with a chance of 5 %

Clusters = Sequence[Hashable]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, and how many independent units (lines, or runs) it rests on."""

    value: float
    low: float  # -inf where the interval is not known; high is inf then
    high: float
    units: int
    p: float = math.nan  # two-sided, that the true value is 0; NaN where it was not tested

    @property
    def is_bounded(self) -> bool:
        """Whether the interval is known."""
        return math.isfinite(self.low)

    @property
    def is_clear(self) -> bool:
        """Whether there are units enough, and the test rejects 0; of one comparison alone."""
        return self.units >= FEWEST_UNITS and self.p < 0.05


# ---- Means and their differences


@dataclass(frozen=True)
class Measured:
    """A number with its standard error; Student's t with this freedom gives the interval."""

    value: float
    error: float
    freedom: float  # below 1: too few units for an interval
    units: int

    def within(self, chance: float = 0.05) -> Estimate:
        """Return the number with the interval that misses the truth with this chance."""
        if not self.freedom >= 1:
            return Estimate(self.value, -math.inf, math.inf, self.units)
        margin = student_quantile(chance, self.freedom) * self.error
        p = student_p(self.value / self.error, self.freedom) if self.error else 0.0
        p = p if self.value else 1.0
        return Estimate(self.value, self.value - margin, self.value + margin, self.units, p)


def measured_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Clusters | None = None,
    strata: Sequence[str] | None = None,
) -> Measured:
    """Return sum(numerators) / sum(denominators) with its jackknife error.

    Differences of two losses over tokens give the paired difference per token. The freedom is the
    effective number of clusters, since long replies weigh more than short ones (Kish, Survey
    Sampling, 1965), less one for each stratum: a kind of which so many lines were drawn.
    """
    clusters = clusters or range(len(numerators))
    above, below = cluster_sums(numerators, clusters), cluster_sums(denominators, clusters)
    total, squares = sum(below), sum(size**2 for size in below)
    value = sum(above) / total if total else math.nan
    groups = strata_of(clusters, strata) if strata else [range(len(below))]
    freedom = total**2 / squares - len(groups) if total else 0
    error = math.sqrt(jackknife_variance(above, below, groups)) if freedom >= 1 else math.nan
    return Measured(value, error, freedom, len(below))


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Clusters | None = None,
    strata: Sequence[str] | None = None,
) -> Estimate:
    """Return sum(numerators) / sum(denominators) with its 95 % interval."""
    return measured_ratio(numerators, denominators, clusters, strata).within()


def measured_mean(values: Sequence[float], clusters: Clusters | None = None) -> Measured:
    """Return the mean of values with its error, such as of differences in nats."""
    return measured_ratio(values, [1.0] * len(values), clusters)


def mean_of(values: Sequence[float], clusters: Clusters | None = None) -> Estimate:
    """Return the mean of values with its 95 % interval."""
    return measured_mean(values, clusters).within()


def jackknife_variance(
    above: list[float], below: list[float], groups: Sequence[Sequence[int]]
) -> float:
    """Return the variance of sum(above) / sum(below), by leaving out one cluster after the other.

    What is left of its stratum is weighted up to its size. One stratum's changes are squared about
    the ratio itself, those of several about their mean in the stratum: what strata differ in is no
    error, since the draw has so many of each.
    """
    all_above, all_below = sum(above), sum(below)
    value, variance = all_above / all_below, 0.0
    for group in groups:
        count, own_above = len(group), sum(above[number] for number in group)
        own_below, ratios = sum(below[number] for number in group), []
        for number in group:
            weight = count / (count - 1)
            top = all_above - own_above + weight * (own_above - above[number])
            ratios.append(top / (all_below - own_below + weight * (own_below - below[number])))
        centre = value if len(groups) == 1 else fmean(ratios)
        variance += sum((each - centre) ** 2 for each in ratios) * (count - 1) / count
    return variance


def strata_of(clusters: Clusters, strata: Sequence[str]) -> list[list[int]]:
    """Return the numbers of the clusters of each stratum; those that are alone in theirs are one.

    A cluster is of the stratum of its first line.
    """
    stratum_of: dict[Hashable, str] = {}
    for cluster, stratum in zip(clusters, strata, strict=True):
        stratum_of.setdefault(cluster, stratum)
    numbers: dict[str, list[int]] = {}
    for number, stratum in enumerate(stratum_of.values()):
        numbers.setdefault(stratum, []).append(number)
    groups = sorted(numbers.values(), key=len)
    while len(groups) > 1 and len(groups[0]) == 1:
        first, second, *others = groups
        groups = sorted([first + second, *others], key=len)
    return groups


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

    Newton's steps come from below and never overshoot, since the density falls. Right to 1e-6 of
    the value for 1 to 100,000 degrees of freedom and a chance of 0.00006 (780 pairs) or more.
    """
    u = 0.0
    for _ in range(25):
        u += (
            (1 - chance - student_area(u, freedom))
            * student_half(freedom)
            * math.cosh(u) ** freedom
        )
    return math.sqrt(freedom) * math.sinh(u)


def student_p(t: float, freedom: float) -> float:
    """Return the probability that the absolute value of Student's t exceeds that of this one."""
    return max(0.0, 1 - student_area(math.asinh(abs(t) / math.sqrt(freedom)), freedom))


def student_area(u: float, freedom: float) -> float:
    """Return the probability that |t| is below sqrt(freedom) sinh(u).

    The density of u is proportional to cosh(u) ** -freedom; it is integrated by Simpson's rule.
    """
    u = min(u, math.acosh(10 ** (17 / freedom)))  # beyond it nothing is left
    heights = [math.cosh(u * k / 200) ** -freedom for k in range(201)]
    inner = 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    return (heights[0] + inner + heights[-1]) * u / 600 / student_half(freedom)


def student_half(freedom: float) -> float:
    """Return the integral of cosh(u) ** -freedom from 0 to infinity."""
    ratio_of_gammas = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    return ratio_of_gammas * math.sqrt(math.pi) / 2


def with_seeds(lines: Measured, counts: tuple[int, int], spread: Spread) -> Measured:
    """Return a difference of two settings whose error has the lines and the seeds of the training.

    lines: the difference of the mean losses over so many seeds each, with the error of the lines.
    The freedom of the two variances together is Satterthwaite's.
    """
    of_lines = lines.error**2
    of_seeds = spread.variance * (1 / counts[0] + 1 / counts[1])
    both = of_lines + of_seeds
    if not (both and lines.freedom >= 1):
        return lines
    freedom = both**2 / (of_lines**2 / lines.freedom + of_seeds**2 / spread.freedom)
    return Measured(lines.value, math.sqrt(both), freedom, lines.units)


@dataclass(frozen=True)
class Spread:
    """How far runs that differ in their seed alone lie apart, pooled over settings."""

    variance: float
    freedom: int  # of all settings: one less than each has seeds

    @property
    def deviation(self) -> float:
        """The standard deviation."""
        return math.sqrt(self.variance)


def pooled_spread(settings: Sequence[Sequence[float]]) -> Spread | None:
    """Return the spread of seeds, taken to be the same in all settings; None without two seeds."""
    several = [values for values in settings if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    if not freedom:
        return None
    squares = sum(variance(values) * (len(values) - 1) for values in several)
    return Spread(squares / freedom, freedom)


# ---- Tests: when a change is called clear


def sign_test(lost: int, won: int) -> float:
    """Return the two-sided p of the sign test, mid-p: of so many turned units, so few one way.

    Half the chance of the table itself counts (Lancaster 1961). McNemar's mid-p test of paired
    shares rejects a true null in 5 % at most, nearly everywhere (Fagerland, Lydersen and Laake,
    BMC Medical Research Methodology 13 (2013), 91), where the exact test does in 2 or 3 %.
    """
    turned, fewer = lost + won, min(lost, won)
    if lost == won:
        return 1.0
    ways = sum(2 * math.comb(turned, k) for k in range(fewer)) + math.comb(turned, fewer)
    return ways / 2**turned


def holm(chances: Sequence[float]) -> list[float]:
    """Return p values that hold for a family of tests together (Holm 1979)."""
    adjusted, highest = [0.0] * len(chances), 0.0
    for rank, number in enumerate(sorted(range(len(chances)), key=lambda each: chances[each])):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[number]))
        adjusted[number] = highest
    return adjusted


def p_of_one_mean(groups: Sequence[Measured]) -> float:
    """Return the p of Cochran's Q, the chi-square test that groups have one mean in common.

    Groups whose error is not known do not count. Small ones, of ten units, are found to differ
    somewhat too often.
    """
    known = [group for group in groups if group.freedom >= 1]
    if len(known) < 2:
        return 1.0
    weights = [1 / max(group.error, 1e-9) ** 2 for group in known]  # pairs may be all alike
    values = [group.value for group in known]
    mean = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
    square = sum(w * (value - mean) ** 2 for w, value in zip(weights, values, strict=True))
    return chi_square_p(square, len(known) - 1)


def chi_square_p(square: float, freedom: int) -> float:
    """Return the probability that chi-square with this whole freedom exceeds a value."""
    half = square / 2
    p, start = (math.exp(-half), 1.0) if freedom % 2 == 0 else (math.erfc(math.sqrt(half)), 0.5)
    for step in range((freedom - 1) // 2):
        power = start + step
        p += math.exp(power * math.log(half) - half - math.lgamma(power + 1)) if half else 0.0
    return min(1.0, p)


# ---- Shares of lines, and how they change


def proportion(passed: float, count: float) -> Estimate:
    """Return a share with Wilson's 95 % interval, which has a width for none and all, too.

    It holds 95 % on average over all shares, and 84 % at the worst, near none and near all.
    """
    value, weight = passed / count, NORMAL**2 / count
    middle = (value + weight / 2) / (1 + weight)
    margin = math.sqrt(weight * value * (1 - value) + weight**2 / 4) / (1 + weight)
    return Estimate(value, middle - margin, middle + margin, round(count))


def share_of(holds: Sequence[float], clusters: Clusters) -> Estimate:
    """Return the share of lines on which something holds, with the design effect of clusters.

    A tie is 0.5.
    """
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
    """On how many lines something holds before and after, and how the share changes; a tie is half.

    Its p is of the sign test over independent units.
    """

    count: int
    before: float
    after: float
    lost: float  # holds before only
    won: float  # holds after only
    change: Estimate

    @property
    def holds_always(self) -> bool:
        """Whether it holds on all lines, before and after: there is little to tell."""
        return self.before == self.after == self.count


def change_of(
    before: Sequence[float], after: Sequence[float], clusters: Clusters | None = None
) -> Change:
    """Return how the lines change on which something holds, with the design effect of clusters."""
    clusters = clusters or range(len(before))
    differences = [float(now) - float(then) for then, now in zip(before, after, strict=True)]
    lost = -sum(each for each in differences if each < 0)
    won = sum(each for each in differences if each > 0)
    size = effective_sample_size(differences, clusters)
    weight = size / len(before)
    turned = cluster_sums(differences, clusters)
    p = sign_test(sum(each < 0 for each in turned), sum(each > 0 for each in turned))
    change = paired_change(weight * lost, weight * won, size)
    change = replace(change, units=len(turned), p=p)
    return Change(len(before), sum(before), sum(after), lost, won, change)


def effective_sample_size(values: Sequence[float], clusters: Clusters) -> float:
    """Return how many independent lines would tell as much about the mean of values as these do.

    Lines of one cluster may be alike. Divided by the design effect (Rao and Scott, Annals of
    Statistics 20 (1992), 1-21): the variance of the mean over clusters, beside that over lines.
    Few clusters do not tell it well, so it is raised as Student's t is above the normal quantile;
    it is at least 1, and at most what it would be if all lines of a cluster were the same.
    """
    count, middle = len(values), fmean(values)
    deviations = [value - middle for value in values]
    least = effective_number([1] * count, clusters)
    total = math.fsum(deviation**2 for deviation in deviations)
    sums = cluster_sums(deviations, clusters)
    if least == count or len(sums) < 2 or not total:
        return least
    between = sum(deviation**2 for deviation in sums) * len(sums) / (len(sums) - 1)
    effect = between / total * (student_quantile(0.05, len(sums) - 1) / NORMAL) ** 2
    return min(count, max(least, count / effect)) if effect else count
