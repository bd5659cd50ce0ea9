"""The statistics against scipy and numpy."""

import itertools
import math
import random

import pytest
import scipy.stats
from made_records import jackknife

from inspect_lora import record
from inspect_lora.record import Estimate

FREEDOMS = (1, 1.01, 1.3, 1.9, 2, 2.5, 3, 7.7, 19, 49.2, 279, 3333.3, 1e5)
CHANCES = (0.5, 0.05, 0.05 / 3, 0.05 / 45, 0.05 / 780)  # of one comparison, of three, 45 and 780


def test_students_quantile():
    for freedom, chance in itertools.product(FREEDOMS, CHANCES):
        expected = scipy.stats.t.ppf(1 - chance / 2, freedom)
        assert record.student_quantile(chance, freedom) == pytest.approx(expected, rel=1e-6)


def test_wilsons_interval():
    pairs = [(passed, count) for count in (1, 2, 14, 40, 280) for passed in range(count + 1)]
    for passed, count in pairs:
        found = record.share(passed, count)
        expected = scipy.stats.binomtest(passed, count).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-7)
        assert found.value == passed / count


def test_mcnemars_exact_test():
    pairs = [*itertools.product(range(25), repeat=2), (300, 250), (0, 280)]
    for lost, won in pairs[1:]:
        expected = scipy.stats.binomtest(lost, lost + won).pvalue
        assert record.p_of_change(lost, won) == pytest.approx(expected, rel=1e-9)
    assert record.p_of_change(0, 0) == 1


@pytest.mark.parametrize("chance", [0.05, 0.05 / 45])
def test_a_ratio_is_the_jackknifes_over_clusters(chance):
    draw = random.Random(1)
    clusters = [f"line {number // 3}" for number in range(90)]
    below = [draw.randint(3, 90) for _ in clusters]
    above = [count * draw.gauss(0.5, 0.4) for count in below]
    found = record.ratio(above, below, clusters, chance)
    expected = jackknife(above, below, clusters, chance)
    assert (found.value, found.low, found.high) == pytest.approx(expected, rel=1e-6)
    assert found.lines == 30
    alone = record.ratio(above, below)
    assert alone.lines == 90 and alone.high - alone.low != pytest.approx(found.high - found.low)


@pytest.mark.parametrize(
    ("below", "clusters"),
    [([5.0], None), ([5.0, 3.0], ["a", "a"]), ([9.0, 1.0], None), ([1.0, -1.0], None), ([], None)],
)
def test_what_rests_on_one_line_has_no_interval(below, clusters):
    found = record.ratio([1.0] * len(below), below, clusters)
    assert found.low == -math.inf and found.high == math.inf and not found.is_clear()


def test_of_fewer_than_twenty_lines_nothing_is_clear():
    assert Estimate(1.0, 0.5, 1.5, 20).is_clear()
    assert not Estimate(1.0, 0.5, 1.5, 19).is_clear()
    assert not Estimate(1.0, -0.1, 2.1, 100).is_clear()
    assert Estimate(0.9, 0.8, 0.95, 20).is_clear(1)
    assert not Estimate(0.97, 0.9, 1.04, 100).is_clear(1)
