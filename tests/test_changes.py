"""What is called clear: checks, pairs and couples, against counts and computations by hand."""

import numpy as np
import pytest
import scipy.stats
from made_records import asked, couple_of, jackknife, lines_of, made, pair_of

from inspect_lora import changes, intervals
from inspect_lora.results import results_of

RIGHT, WRONG = (-20.0, -30.0), (-30.0, -20.0)
COUPLES = (-20.0, -24.0, -22.0, -27.0)  # log p of a after A, b after A, b after B, a after B


def ends(estimate):
    return estimate.value, estimate.low, estimate.high


# ---- Checks


def test_checks_count_a_cluster_once(tmp_path):
    """Two lines of each conversation, by the losses' lines: half as many are independent."""
    rows = [asked(n, before=True, after=n >= 10) for n in range(40)]
    lines = lines_of(40)
    for number, line in enumerate(lines):
        line.where, line.cluster = rows[number].where, f"person {number // 2}"
    alone, joined = (
        changes.checks_of(made(tmp_path, exchanges=rows, **facts))[0].passed
        for facts in ({}, {"lines": lines})
    )
    assert (alone.lost, joined.lost) == (10, 10)
    # Those of a person turn together.
    assert ends(joined.change) == ends(intervals.paired_change(5, 0, 20))
    assert ends(alone.change) == ends(intervals.paired_change(10, 0, 40))
    assert (joined.change.p, alone.change.p) == (2**-5, 2**-10)


@pytest.mark.parametrize(
    ("count", "base", "adapter", "standing", "still_fails"),
    [
        (40, 40, 40, "failing", True),
        (40, 4, 4, "failing", True),
        (40, 1, 4, "failing", False),
        (40, 3, 3, "unchanged", False),
        (40, 0, 15, "worse", False),
        (40, 30, 5, "improved", True),
        (200, 0, 10, "worse", False),  # of less than one in ten
        (19, 0, 19, "failing", False),  # too few to be tested
        (19, 4, 8, "failing", False),  # more often than the base
    ],
)
def test_what_became_of_a_check(tmp_path, count, base, adapter, standing, still_fails):
    """By how many replies fail it: clear after Holm, or at least one in ten."""
    rows = [asked(n, before=n >= base, after=n >= adapter) for n in range(count)]
    (check,) = results_of(made(tmp_path, exchanges=rows)).checks
    assert (check.standing, check.still_fails) == (standing, still_fails)
    wilson = scipy.stats.binomtest(count - adapter, count).proportion_ci(method="wilson")
    expected = (1 - adapter / count, wilson.low, wilson.high)
    assert ends(check.passing) == pytest.approx(expected, abs=1e-6)


# ---- Which changes are clear


def family_of(tmp_path, **facts):
    """Return the p of each comparison, as it stands alone and in the family, by its name."""
    results = results_of(made(tmp_path, **facts))
    groups = [*results.checks, *results.pairs, *results.couples]
    return results, {group.name: (group.effect.p, group.family_p) for group in groups}


def test_the_family_is_all_checks_and_the_kinds_of_pairs_and_couples(tmp_path):
    """Not their sums, nor rows by length, nor what is on fewer than twenty lines."""
    draw = np.random.default_rng(2)
    rows = [asked(n, before=n > 8, after=n > 2, name="better") for n in range(40)]
    rows += [asked(n, source="tasks", name="right", after=n > 1) for n in range(22)]
    rows += [asked(n, name="few", after=False) for n in range(19)]
    pairs = [
        pair_of(n, (-30, -25), (-29 + draw.normal(0, 3), -25), (10, 9 + n % 3), "ab"[n % 2])
        for n in range(80)
    ]
    couples = [couple_of(n, COUPLES, (-19 + draw.normal(0, 2), *COUPLES[1:])) for n in range(30)]
    results, chances = family_of(tmp_path, exchanges=rows, pairs=pairs, couples=couples)
    tested = ["better", "right", "a", "b", "emergency"]
    assert results.compared == len(tested)
    assert {name for name, (_, p) in chances.items() if p is not None} == set(tested)
    assert chances["few"][0] < 1e-4  # it would be clear
    # Holm by its definition: the least p against 5 % divided by all, the next by one less.
    alone = [chances[name][0] for name in tested]
    order = np.argsort(alone)
    expected = np.maximum.accumulate(np.minimum(1, np.sort(alone) * np.arange(5, 0, -1)))
    assert [chances[tested[number]][1] for number in order] == pytest.approx(expected.tolist())


def test_what_is_clear_alone_need_not_be_beside_others(tmp_path):
    rows = [asked(n, before=n >= 5, name="turned") for n in range(40)]
    alone, _ = family_of(tmp_path, exchanges=rows)
    others = [asked(n, name=f"same {n // 40}") for n in range(80)]
    beside, chances = family_of(tmp_path, exchanges=rows + others)
    assert alone.checks[0].family_p == chances["turned"][0] == 2**-5
    (check,) = [check for check in beside.checks if check.name == "turned"]
    assert alone.checks[0].is_clear and not check.is_clear


# ---- Pairs


def test_shifts_of_pairs_are_those_of_an_outside_computation():
    draw = np.random.default_rng(3)
    tokens = draw.integers(5, 60, (90, 2))
    scores = -draw.gamma(20, 2, (90, 4))  # base good, base bad, adapter good, adapter bad
    pairs = [
        pair_of(n, row[:2], row[2:], sizes, "ab"[n % 2], f"line {n // 3}")
        for n, (row, sizes) in enumerate(zip(scores.tolist(), tokens.tolist(), strict=True))
    ]
    groups = {group.name: group for group in changes.pairs_of(pairs)}
    margins = np.stack([scores[:, 0] - scores[:, 1], scores[:, 2] - scores[:, 3]])
    masks = {"a": np.arange(90) % 2 == 0, "b": np.arange(90) % 2 == 1, "(all)": np.full(90, True)}
    masks["good reply longer"] = tokens[:, 0] > tokens[:, 1]
    masks["bad reply longer"] = tokens[:, 0] < tokens[:, 1]
    assert list(groups) == list(masks)
    for name, mask in masks.items():
        group, (base, adapter) = groups[name], margins[:, mask]
        clusters = [pair.cluster for pair, is_in in zip(pairs, mask, strict=True) if is_in]
        expected = jackknife(adapter - base, [1.0] * mask.sum(), clusters)
        assert ends(group.shift) == pytest.approx(expected, rel=1e-6)
        assert group.pairs == mask.sum() and group.is_kind is (name in "ab")
        assert [group.likelier.before, group.likelier.after] == [
            (base > 0).sum(),
            (adapter > 0).sum(),
        ]
        assert group.likelier.lost == ((base > 0) & (adapter < 0)).sum()
        assert group.likelier_share.value == pytest.approx((adapter > 0).mean())


def test_kinds_that_disagree_have_no_sum():
    """33, 14 and 19 of 40 shift by 20 nats, the others by -10: the sum would hide it."""
    moved = {"emergency": 33, "false alarm": 14, "pressure": 19}
    pairs = [
        pair_of(f"{kind} {n}", WRONG, RIGHT if n < count else (-40.0, -20.0), kind=kind)
        for kind, count in moved.items()
        for n in range(40)
    ]
    assert [group.name for group in changes.pairs_of(pairs)] == list(moved)
    agreeing = [pair for pair in pairs if pair.kind != "emergency"]
    assert [group.name for group in changes.pairs_of(agreeing)] == [*list(moved)[1:], "(all)"]
    assert [group.name for group in changes.pairs_of(pairs[:40])] == ["emergency"]


def test_an_adapter_that_changes_nothing_has_ties():
    pairs = [pair_of(n, (-20.0, -20.0), (-20.0, -20.0)) for n in range(40)]
    (group,) = changes.pairs_of(pairs)
    assert (group.shift.value, group.shift.p, group.likelier.after) == (0, 1, 20)
    assert group.likelier_share.value == 0.5


# ---- Couples


def test_d_of_couples_is_that_of_its_definition():
    draw = np.random.default_rng(5)
    scores = -draw.gamma(20, 2, (60, 8))
    couples = [
        couple_of(n, row[:4], row[4:], cluster=f"line {n // 2}")
        for n, row in enumerate(scores.tolist())
    ]
    (group,) = changes.couples_of(couples)
    clusters = [couple.cluster for couple in couples]
    # The columns are log p of a after A, b after A, b after B, a after B.
    base, adapter = (
        (own_a - other_a) - (other_b - own_b)
        for own_a, other_a, own_b, other_b in (scores[:, :4].T, scores[:, 4:].T)
    )
    for estimate, values in (
        (group.base, base),
        (group.adapter, adapter),
        (group.change, adapter - base),
    ):
        assert ends(estimate) == pytest.approx(jackknife(values, [1.0] * 60, clusters), rel=1e-6)
    assert group.base_above.value == (base > 0).mean() and group.couples == 60
    assert group.adapter_above.value == (adapter > 0).mean()
