"""The statistics against scipy, numpy, other formulas, and what they promise of draws."""

import functools
import itertools
import math
import random

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from made_records import jackknife, pair_of

from inspect_lora import intervals as statistics
from inspect_lora import results, tables
from inspect_lora.intervals import Estimate

FREEDOMS = (1, 1.01, 1.3, 1.9, 2, 2.5, 3, 7.7, 19, 49.2, 279, 3333.3, 1e5)
CHANCES = (0.5, 0.05, 0.05 / 3, 0.05 / 45, 0.05 / 780)  # of one comparison, of three, 45 and 780


def test_students_quantile():
    for freedom, chance in itertools.product(FREEDOMS, CHANCES):
        expected = scipy.stats.t.ppf(1 - chance / 2, freedom)
        assert statistics.student_quantile(chance, freedom) == pytest.approx(expected, rel=1e-6)


def test_wilsons_interval():
    pairs = [(passed, count) for count in (1, 2, 14, 40, 280) for passed in range(count + 1)]
    for passed, count in pairs:
        estimate = statistics.proportion(passed, count)
        expected = scipy.stats.binomtest(passed, count).proportion_ci(method="wilson")
        assert (estimate.low, estimate.high) == pytest.approx(
            (expected.low, expected.high), abs=1e-7
        )
        assert estimate.value == passed / count


@pytest.mark.parametrize("chance", [0.05, 0.05 / 45])
def test_a_ratio_is_the_jackknifes_over_clusters(chance):
    draw = random.Random(1)
    clusters = [f"line {number // 3}" for number in range(90)]
    below = [draw.randint(3, 90) for _ in clusters]
    above = [count * draw.gauss(0.5, 0.4) for count in below]
    estimate = statistics.ratio(above, below, clusters, chance)
    expected = jackknife(above, below, clusters, chance)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx(expected, rel=1e-6)
    assert estimate.units == 30
    alone = statistics.ratio(above, below)
    assert alone.units == 90
    assert alone.high - alone.low != pytest.approx(estimate.high - estimate.low)


@pytest.mark.parametrize(
    ("below", "clusters"),
    [([5.0], None), ([5.0, 3.0], ["a", "a"]), ([9.0, 1.0], None), ([1.0, -1.0], None), ([], None)],
)
def test_what_rests_on_one_line_has_no_interval(below, clusters):
    estimate = statistics.ratio([1.0] * len(below), below, clusters)
    assert estimate.low == -math.inf and estimate.high == math.inf and not estimate.is_clear


def test_of_fewer_than_twenty_lines_nothing_is_clear():
    assert Estimate(1.0, 0.5, 1.5, 20).is_clear
    assert not Estimate(1.0, 0.5, 1.5, 19).is_clear
    assert not Estimate(1.0, -0.1, 2.1, 100).is_clear


# ---- As text


def test_a_change_of_few_lines_has_no_interval():
    few, enough = (Estimate(0.25, 0.1, 0.4, lines) for lines in (19, 20))
    assert tables.points(few) == "+25" and tables.points(enough) == "+25 (10 to 40)"


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
        change = statistics.paired_change(lost, won, count)
        assert -1 < change.low <= change.value <= change.high < 1
        assert change.value == (won - lost) / count
        scores = [likeliest_score(end, lost, won, count) for end in (change.low, change.high)]
        assert scores == pytest.approx([1.96, -1.96], abs=2e-3)
        mirrored = statistics.paired_change(won, lost, count)
        assert (mirrored.low, mirrored.high) == pytest.approx((-change.high, -change.low), abs=1e-9)


@pytest.mark.parametrize(("lost", "won", "count"), [(0, 9, 9), (9, 0, 9), (0, 0, 5)])
def test_a_paired_change_of_all_lines_or_of_none(lost, won, count):
    change = statistics.paired_change(lost, won, count)
    assert -1 <= change.low <= change.value <= change.high <= 1
    assert change.high - change.low > 0.1


@pytest.mark.parametrize("count", [20, 40, 100])
@pytest.mark.parametrize(
    ("lost", "won"), [(0.01, 0.01), (0.1, 0.1), (0, 0.3), (0, 0.05), (0.25, 0.05), (0.45, 0.45)]
)
def test_a_paired_change_holds_the_truth_in_95_of_100_draws(count, lost, won):
    """The chance of each table is that of its draws: nothing is simulated."""
    tables, lows, highs = all_changes(count)
    chances = scipy.stats.multinomial.pmf(tables, count, (lost, won, 1 - lost - won))
    is_held = (lows - 1e-9 <= won - lost) & (won - lost <= highs + 1e-9)
    assert 0.93 <= chances[is_held].sum() <= 1


@functools.cache
def all_changes(count):
    """Return each table of lost, won and unchanged lines, with the ends of its interval."""
    tables = [
        (lost, won, count - lost - won)
        for lost, won in itertools.product(range(count + 1), repeat=2)
        if lost + won <= count
    ]
    changes = [statistics.paired_change(lost, won, count) for lost, won, _ in tables]
    lows, highs = zip(*((change.low, change.high) for change in changes), strict=True)
    return np.array(tables), np.array(lows), np.array(highs)


def test_counts_of_a_change_and_its_clusters():
    before, after = [True] * 30 + [False] * 10, [True] * 25 + [False] * 7 + [True] * 8
    alone = statistics.change_of(before, after)
    assert (alone.count, alone.before, alone.after, alone.lost, alone.won) == (40, 30, 33, 5, 8)
    assert alone.change == statistics.paired_change(5, 8, 40)
    twice = statistics.change_of(before * 2, after * 2, [str(n) for n in range(40)] * 2)
    assert (twice.count, twice.lost, twice.change.units) == (80, 10, 40)
    assert twice.change.low == pytest.approx(alone.change.low)
    assert twice.change.high == pytest.approx(alone.change.high)
    uneven = statistics.effective_number([1] * 9, list("aaaabbcde"))
    assert uneven == pytest.approx(81 / (16 + 4 + 1 + 1 + 1))


def test_lines_of_a_cluster_count_as_their_likeness_tells():
    """The design effect from the clusters' means, by numpy; its bounds are none and all alike."""
    draw = np.random.default_rng(5)
    clusters = np.repeat(np.arange(30), 4)
    values = draw.random(120) < draw.beta(0.9, 2.1, 30)[clusters]
    means = values.reshape(30, 4).mean(1)
    effect = means.var(ddof=1) / 30 / (values.var() / 120)
    effect *= (scipy.stats.t.ppf(0.975, 29) / scipy.stats.norm.ppf(0.975)) ** 2
    count = statistics.effective_sample_size(values.tolist(), [str(c) for c in clusters])
    assert count == pytest.approx(120 / effect, rel=1e-6) and 30 < count < 120
    names = [str(c) for c in clusters]
    assert statistics.effective_sample_size((clusters % 2).tolist(), names) == 30
    assert statistics.effective_sample_size([0, 0, 1, 1] * 30, names) == 120
    assert statistics.effective_sample_size([0, 1] * 60, [str(n) for n in range(120)]) == 120
    assert statistics.effective_sample_size([1] * 120, names) == 30


@pytest.mark.parametrize("count", [20, 40, 100])
def test_shares_and_changes_of_clusters_hold_the_truth(count):
    """Five lines of each, with a correlation of 0.4: without clusters about 76 % hold it."""
    draw, held = np.random.default_rng(count), np.zeros(3)
    clusters = np.repeat(np.arange(count // 5), 5)
    names = [str(c) for c in clusters]
    for _ in range(400):
        odds = [draw.beta(1.5 * p, 1.5 * (1 - p), count // 5)[clusters] for p in (0.3, 0.3, 0.9)]
        before, wins, stays = (draw.random(count) < odd for odd in odds)
        after = np.where(before, stays, wins)
        independent = statistics.effective_sample_size(before.tolist(), names)
        share = statistics.proportion(independent * before.mean(), independent)
        joined = statistics.change_of(before.tolist(), after.tolist(), names).change
        alone = statistics.change_of(before.tolist(), after.tolist()).change
        held += [share.low <= 0.3 <= share.high, joined.low <= 0.18 <= joined.high,
                 alone.low <= 0.18 <= alone.high]  # fmt: skip
    assert held[:2].min() >= 0.93 * 400 and held[2] < 0.88 * 400


def test_a_difference_of_the_smallest_size_is_seen_in_80_of_100_draws():
    draw = np.random.default_rng(1)
    samples = draw.normal(0, 1, (2000, 100))
    margins = scipy.stats.t.ppf(0.975, 99) * samples.std(1, ddof=1) / 10
    effect = Estimate(0, -float(margins.mean()), margins.mean(), 9).detectable
    seen = np.mean(samples.mean(1) + effect > margins)
    assert 0.77 < seen < 0.83


# ---- Seeds


def test_two_settings_differ_by_welchs_interval():
    first, second = [3.012, 3.034, 3.001], [2.9, 3.1, 2.95, 3.0, 2.8]
    for chance in (0.05, 0.01):
        estimate = statistics.difference_of_seeds(first, second, chance)
        test = scipy.stats.ttest_ind(second, first, equal_var=False)
        expected = test.confidence_interval(1 - chance)
        assert (estimate.low, estimate.high) == pytest.approx(tuple(expected), rel=1e-6)
    assert statistics.difference_of_seeds([3.0], second).low == -math.inf
    assert True
    assert statistics.difference_of_seeds([3.0, 3.0], [2.0, 2.0]).high == -1


# ---- Pairs


def test_preferences_are_those_of_a_count_by_hand():
    """A tie is not right, and a long reply is likelier by its mean alone."""
    pairs = [
        pair_of(1, (-20, -30), (-25, -24)),  # lost; away from the good one
        pair_of(2, (-30, -20), (-24, -25)),  # won; towards it
        pair_of(3, (-30, -20), (-24, -20), (20, 10)),  # wrong by sum, right by mean; towards it
        pair_of(4, (-20, -20), (-20, -20)),  # ties
    ]
    result = results.pairs_of(pairs)[0]
    assert (result.pairs, result.moved) == (4, 2)
    by_sum = result.likelier
    assert (by_sum.before, by_sum.after, by_sum.lost, by_sum.won) == (1, 1, 1, 1)
    assert [g.name for g in results.pairs_of(pairs)] == ["(all)", "good reply longer"]


def test_preferences_against_an_outside_computation():
    draw = np.random.default_rng(3)
    tokens = draw.integers(5, 60, (90, 2))
    scores = -draw.gamma(20, 2, (90, 4))  # base good, base bad, adapter good, adapter bad
    pairs = [
        pair_of(n, row[:2], row[2:], sizes, "ab"[n % 2], f"line {n // 3}")
        for n, (row, sizes) in enumerate(zip(scores.tolist(), tokens.tolist(), strict=True))
    ]
    result = results.pairs_of(pairs)[0]
    margins = np.stack([scores[:, 0] - scores[:, 1], scores[:, 2] - scores[:, 3]])
    right = margins > 0
    assert [result.likelier.before, result.likelier.after] == right.sum(1).tolist()
    assert result.likelier.lost == (right[0] & ~right[1]).sum()
    assert result.likelier.won == (right[1] & ~right[0]).sum()
    corrected = (margins[1] - margins[0] > 0).sum()
    assert result.moved == corrected
    independent = statistics.effective_sample_size(
        (margins[1] - margins[0] > 0).tolist(), [pair.cluster for pair in pairs]
    )
    share = statistics.proportion(independent * corrected / 90, independent)
    assert result.moved_share.low == pytest.approx(share.low)
    assert result.moved_share.high == pytest.approx(share.high)
    assert 30 <= independent <= 90 and result.moved_share.units == 30
    groups = {g.name: g.pairs for g in results.pairs_of(pairs)}
    assert groups["a"] == groups["b"] == 45
    assert groups["good reply longer"] == (tokens[:, 0] > tokens[:, 1]).sum()
    assert groups["bad reply longer"] == (tokens[:, 0] < tokens[:, 1]).sum()
