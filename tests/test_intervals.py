"""The intervals and tests against scipy, numpy and other formulas."""

import itertools
import math
import random

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from made_records import jackknife, stratified

from inspect_lora import intervals
from inspect_lora.intervals import Estimate, Measured, Spread

FREEDOMS = (1, 1.01, 1.9, 2, 3, 7.7, 49.2, 3333.3, 1e5)
CHANCES = (0.5, 0.05, 0.05 / 780)  # also of 780 comparisons


@pytest.mark.parametrize("freedom", FREEDOMS)
@pytest.mark.parametrize("chance", CHANCES)
def test_students_quantile(freedom, chance):
    expected = scipy.stats.t.ppf(1 - chance / 2, freedom)
    assert intervals.student_quantile(chance, freedom) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("passed", "count"), [(0, 1), (1, 1), (1, 2), (0, 14), (3, 14), (39, 40), (40, 40), (99, 280)]
)
def test_wilsons_interval(passed, count):
    share = intervals.proportion(passed, count)
    expected = scipy.stats.binomtest(passed, count).proportion_ci(method="wilson")
    assert (share.low, share.high) == pytest.approx((expected.low, expected.high), abs=1e-7)
    assert share.value == passed / count


@pytest.mark.parametrize("chance", [0.05, 0.05 / 45])
def test_a_ratio_is_the_jackknifes_over_clusters(chance):
    draw = random.Random(1)
    clusters = [f"line {number // 3}" for number in range(90)]
    below = [draw.randint(3, 90) for _ in clusters]
    above = [count * draw.gauss(0.5, 0.4) for count in below]
    estimate = intervals.measured_ratio(above, below, clusters).within(chance)
    expected = jackknife(above, below, clusters, chance)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx(expected, rel=1e-6)
    assert estimate.units == 30
    alone = intervals.ratio(above, below)
    assert alone.units == 90
    assert alone.high - alone.low != pytest.approx(estimate.high - estimate.low)


@pytest.mark.parametrize(
    ("below", "clusters"),
    [([5.0], None), ([5.0, 3.0], ["a", "a"]), ([9.0, 1.0], None), ([1.0, -1.0], None), ([], None)],
)
def test_what_rests_on_one_line_has_no_interval(below, clusters):
    estimate = intervals.ratio([1.0] * len(below), below, clusters)
    assert estimate.low == -math.inf and estimate.high == math.inf and not estimate.is_clear


def test_of_fewer_than_twenty_lines_nothing_is_clear():
    assert Estimate(1.0, 0.5, 1.5, 20, 0.049).is_clear
    assert not Estimate(1.0, 0.5, 1.5, 19, 0.049).is_clear
    assert not Estimate(1.0, 0.5, 1.5, 100, 0.051).is_clear
    assert not Estimate(1.0, 0.5, 1.5, 100).is_clear  # not tested


@pytest.mark.parametrize("freedom", [1, 1.3, 39.2, 3000])
@pytest.mark.parametrize("t", [0.0, 0.1, -2, 9, 1e9])
def test_students_p(freedom, t):
    expected = 2 * scipy.stats.t.sf(abs(t), freedom)
    assert intervals.student_p(t, freedom) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.2, 0.4])
def test_a_p_and_its_interval_say_the_same(shift):
    draw = random.Random(3)
    values = [draw.gauss(shift, 1) for _ in range(40)]
    p = intervals.mean_of(values).p
    assert p == pytest.approx(scipy.stats.ttest_1samp(values, 0).pvalue, abs=1e-7)
    for chance in (0.5, 0.05, 0.001):
        wide = intervals.measured_ratio(values, [1.0] * 40).within(chance)
        assert (wide.p < chance) is not (wide.low <= 0 <= wide.high)


# ---- Strata


def test_lines_that_were_drawn_by_kind_are_estimated_as_drawn():
    """What kinds differ in is no error."""
    draw = np.random.default_rng(7)
    kinds, truths = [f"{n % 4}" for n in range(80)], [0.0, 1.0, 2.0, 5.0]
    values = [truths[n % 4] + draw.normal(0, 0.5) for n in range(80)]
    drawn = intervals.measured_ratio(values, [1.0] * 80, None, kinds)
    value, error = stratified(values, [1.0] * 80, kinds)
    assert (drawn.value, drawn.error) == pytest.approx((value, error), rel=0.02)
    assert drawn.freedom == 76
    assert intervals.measured_ratio(values, [1.0] * 80).error > 2 * drawn.error


def test_a_stratum_of_one_cluster_is_joined_with_another():
    """Alone it would have no error, or none that is known."""
    values, kinds = [1.0, 1.0, 2.0, 2.0, 9.0], ["a", "a", "b", "b", "c"]
    assert intervals.strata_of(range(5), kinds) in ([[4, 0, 1], [2, 3]], [[2, 3], [4, 0, 1]])
    assert intervals.measured_ratio(values, [1.0] * 5, None, kinds).error > 1
    # Two replies of a cluster are of the stratum of the first.
    assert [*map(sorted, intervals.strata_of(list("xxyyzz"), list("abaabb")))] == [[0, 1, 2]]


# ---- Tests


def test_the_sign_test_is_mid_p():
    assert intervals.sign_test(0, 0) == intervals.sign_test(600, 600) == 1
    for lost, won in itertools.product(range(12), repeat=2):
        if lost != won:
            table = scipy.stats.binom(lost + won, 0.5)
            fewer = min(lost, won)
            expected = 2 * (table.cdf(fewer) - table.pmf(fewer) / 2)
            assert intervals.sign_test(lost, won) == pytest.approx(expected, rel=1e-9)
    assert 0 < intervals.sign_test(900, 1100) < 1e-4


def test_holm_is_that_of_a_count_by_hand():
    assert intervals.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert intervals.holm([0.5, 0.9]) == [1.0, 1.0] and intervals.holm([]) == []


def test_groups_with_one_mean_in_common():
    """Cochran's Q, against scipy's chi-square; a group whose error is not known does not count."""
    groups = [Measured(1.0, 0.9, 39, 40), Measured(-3.9, 1.5, 39, 40), Measured(-1.1, 1.35, 39, 40)]
    values = np.array([group.value for group in groups])
    weights = np.array([group.error for group in groups]) ** -2.0
    q = (weights * (values - np.average(values, weights=weights)) ** 2).sum()
    p = scipy.stats.chi2.sf(q, 2)
    assert intervals.p_of_one_mean(groups) == pytest.approx(p) and p < 0.05
    alone = Measured(99.0, math.nan, 0, 1)
    assert intervals.p_of_one_mean([*groups, alone]) == pytest.approx(p)
    assert intervals.p_of_one_mean([groups[0], alone]) == 1
    alike = [Measured(2.0, 0.0, 39, 40), Measured(2.0, 0.0, 39, 40)]
    assert intervals.p_of_one_mean(alike) == 1
    assert intervals.p_of_one_mean([*alike, Measured(2.1, 0.0, 39, 40)]) < 1e-9


@pytest.mark.parametrize("freedom", range(1, 9))
def test_chi_square(freedom):
    for square in (0.0, 0.3, 2, 40):
        expected = scipy.stats.chi2.sf(square, freedom)
        assert intervals.chi_square_p(square, freedom) == pytest.approx(expected, abs=1e-12)


# ---- Paired changes


def likeliest_score(change, lost, won, count):
    """Return the score of a true change; the share of lost lines is sought by its likelihood."""
    rest = count - lost - won
    log, limit = scipy.special.xlogy, min(1, (1 - change) / 2)

    def unlikely(share):
        numbers = (lost, share), (won, share + change), (rest, 1 - 2 * share - change)
        return -sum(log(number, max(0, chance)) for number, chance in numbers)

    bounds = (max(0, -change), limit)
    share = scipy.optimize.minimize_scalar(
        unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}
    ).x
    return (won - lost - count * change) / math.sqrt(count * (2 * share + change - change**2))


def test_a_paired_change_ends_where_the_score_test_rejects():
    for lost, won, rest in itertools.product((0, 1, 4, 17), (0, 1, 4, 17), (3, 20, 90)):
        count = lost + won + rest
        change = intervals.paired_change(lost, won, count)
        assert -1 < change.low <= change.value <= change.high < 1
        assert change.value == (won - lost) / count
        scores = [likeliest_score(end, lost, won, count) for end in (change.low, change.high)]
        assert scores == pytest.approx([1.96, -1.96], abs=2e-3)
        mirrored = intervals.paired_change(won, lost, count)
        assert (mirrored.low, mirrored.high) == pytest.approx((-change.high, -change.low), abs=1e-9)


def test_counts_of_a_change_and_its_clusters():
    before, after = [True] * 30 + [False] * 10, [True] * 25 + [False] * 7 + [True] * 8
    alone = intervals.change_of(before, after)
    assert (alone.count, alone.before, alone.after, alone.lost, alone.won) == (40, 30, 33, 5, 8)
    expected = intervals.paired_change(5, 8, 40)
    assert (alone.change.low, alone.change.high) == (expected.low, expected.high)
    twice = intervals.change_of(before * 2, after * 2, [str(n) for n in range(40)] * 2)
    assert (twice.count, twice.lost, twice.change.units) == (80, 10, 40)
    assert twice.change.low == pytest.approx(alone.change.low)
    assert twice.change.high == pytest.approx(alone.change.high)
    uneven = intervals.effective_number([1] * 9, list("aaaabbcde"))
    assert uneven == pytest.approx(81 / (16 + 4 + 1 + 1 + 1))


def test_lines_of_a_cluster_count_as_their_likeness_tells():
    """The design effect from the clusters' means, by numpy; its bounds are none and all alike."""
    draw = np.random.default_rng(5)
    clusters = np.repeat(np.arange(30), 4)
    values = draw.random(120) < draw.beta(0.9, 2.1, 30)[clusters]
    means = values.reshape(30, 4).mean(1)
    effect = means.var(ddof=1) / 30 / (values.var() / 120)
    effect *= (scipy.stats.t.ppf(0.975, 29) / scipy.stats.norm.ppf(0.975)) ** 2
    count = intervals.effective_sample_size(values.tolist(), [str(c) for c in clusters])
    assert count == pytest.approx(120 / effect, rel=1e-6) and 30 < count < 120
    names = [str(c) for c in clusters]
    share, expected = intervals.share_of(values.tolist(), names), values.mean()
    alone = intervals.proportion(count * expected, count)
    assert (share.value, share.units) == (pytest.approx(expected), 30)
    assert (share.low, share.high) == pytest.approx((alone.low, alone.high))
    assert intervals.effective_sample_size((clusters % 2).tolist(), names) == 30
    assert intervals.effective_sample_size([0, 0, 1, 1] * 30, names) == 120
    assert intervals.effective_sample_size([0, 1] * 60, [str(n) for n in range(120)]) == 120
    assert intervals.effective_sample_size([1] * 120, names) == 30


def test_ties_are_half():
    change = intervals.change_of([0, 0.5, 1, 1], [0.5, 0.5, 0, 1])
    assert (change.before, change.after, change.lost, change.won) == (2.5, 2, 1, 0.5)
    assert change.change.p == 1  # one cluster up, one down
    assert intervals.share_of([0.5] * 40, range(40)).value == 0.5


def test_a_cluster_turns_one_way_and_once():
    """Five replies of one conversation are no five changes."""
    before, after = [True] * 5 + [True, False] * 10, [False] * 5 + [True, False] * 10
    alone = intervals.change_of(before, after).change
    joined = intervals.change_of(before, after, ["talk"] * 5 + list(range(20))).change
    assert alone.p == intervals.sign_test(5, 0) < 0.05 < joined.p == intervals.sign_test(1, 0)


# ---- Seeds


def test_the_spread_of_seeds_is_pooled_over_settings():
    settings = [[3.0, 3.1, 2.9], [4.0, 4.3], [5.0]]
    spread = intervals.pooled_spread(settings)
    squares = 2 * np.var(settings[0], ddof=1) + np.var(settings[1], ddof=1)
    assert spread.freedom == 3 and spread.variance == pytest.approx(squares / 3)
    assert intervals.pooled_spread([[1.0], [2.0]]) is None


def test_a_difference_of_settings_has_the_error_of_lines_and_of_seeds():
    lines, spread = Measured(0.05, 0.012, 80.0, 90), Spread(0.0004, 3)
    both = intervals.with_seeds(lines, (2, 1), spread)
    of_seeds = 0.0004 * 1.5
    assert both.error == pytest.approx(math.sqrt(0.012**2 + of_seeds))
    freedom = both.error**4 / (0.012**4 / 80 + of_seeds**2 / 3)
    assert both.freedom == pytest.approx(freedom) and (both.value, both.units) == (0.05, 90)
    assert intervals.with_seeds(lines, (2, 2), Spread(0.0, 3)).error == pytest.approx(0.012)
