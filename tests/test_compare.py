"""`compare`: what several records share, and what is left out."""

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from made_records import asked, couple_of, jackknife, lines_of, made, pair_of, put, said, shift_of
from runs import command, refused

from inspect_lora import intervals
from inspect_lora.__main__ import main


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Return make(name, ...): a record without parts beside the others; some on is changed."""
    monkeypatch.chdir(tmp_path)

    def make_one(name, on=None, **facts):
        facts = {"parts": [], "part_lines": []} | facts
        return put(made(tmp_path / "inspected" / name, **facts), **(on or {}))

    return make_one


@pytest.fixture
def compare(capsys):
    """Return compare(): what --json has of all records of the test."""
    return lambda: json.loads(command(capsys, ["compare", "inspected", "--json"], main).out)


@pytest.fixture
def printed(capsys):
    return lambda: command(capsys, ["compare", "inspected"], main).out


def names_of(told):
    """Return the names of the first run of each row."""
    return [row["runs"][0]["adapter"].removeprefix("inspected/") for row in told["rows"]]


def losses_of(told):
    return [loss for row in told["rows"] for loss in row["losses"]]


def left_out_of(told):
    return [each["name"] for each in told["left_out"]]


def ends(estimate):
    return estimate["value"], estimate["low"], estimate["high"]


def per_token(lines):
    return sum(line.adapter for line in lines) / sum(line.tokens for line in lines)


def page_of(folder):
    """Return what the page of a comparison has."""
    page = (folder / "compared" / "replies.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*)</script>', page)[1])


def test_three_adapters_of_one_folder_are_three_rows(compare, make, tmp_path):
    """The records of replaced adapters lie in dated folders."""
    home = tmp_path / "inspected" / "final_lora"
    for number, (rate, gain) in enumerate([(1e-4, 1.0), (3e-4, 1.2), (1e-3, 0.5)]):
        known = {"LEARNING_RATE": rate, "EPOCHS": 3, "lora_dropout": 0.1 * (number == 0)}
        make("final_lora", {"measured": f"2026-11-3{number}"}, gain=gain, id=f"{number}",
             known=known)  # fmt: skip
        if number < 2:
            home.rename(home.with_name(f"final_lora.{number}"))
    told = compare()
    assert names_of(told) == ["final_lora.1", "final_lora.0", "final_lora"]
    settings = [tuple(row["settings"].items()) for row in told["rows"]]
    assert settings == [
        (("LEARNING_RATE", rate), ("lora_dropout", dropout))
        for rate, dropout in (("0.0003", "0.0"), ("0.0001", "0.1"), ("0.001", "0.0"))
    ]
    page = page_of(tmp_path)
    assert len(page["sides"]) == 4 and len(page["prompts"][0]["replies"]) == 4


@pytest.mark.parametrize("count", [2, 4])
def test_differences_are_paired_and_the_intervals_hold_together(compare, make, count):
    """The best is picked from all pairs, so each has its share of 5 % (Bonferroni)."""
    lines_by_name = {}
    for number in range(count):
        lines = lines_by_name[f"{number}"] = lines_of(60, 1 - number / 4)
        for place, line in enumerate(lines):
            line.adapter += math.sin(place * (number + 1)) * line.tokens
            line.cluster = f"conversation {place // 2}"
        make(f"{number}", lines=lines)
    told = compare()
    best, *others = ranked = [lines_by_name[name] for name in names_of(told)]
    assert losses_of(told) == pytest.approx([per_token(lines) for lines in ranked])
    assert losses_of(told) == sorted(losses_of(told))
    for row, lines in zip(told["rows"][1:], others, strict=True):
        above = [line.adapter - other.adapter for other, line in zip(best, lines, strict=True)]
        tokens, clusters = [line.tokens for line in lines], [line.cluster for line in lines]
        expected = jackknife(above, tokens, clusters, 0.05 / math.comb(count, 2))
        assert ends(row["above_first"]) == pytest.approx(expected)


def test_the_table_of_losses_shows_what_json_has(compare, printed, make):
    for name, gain in (("a", 1.2), ("b", 1.0)):
        make(name, gain=gain, shifts=[shift_of(1.0)])
    row = compare()["rows"][1]
    (line,) = re.findall(r"^ {10}2 .*$", printed(), re.MULTILINE)
    place, *shown, token, low, high = map(float, re.findall(r"[+-]?\d+\.?\d*", line))
    expected = [row["losses"][0], *ends(row["above_first"]), *ends(row["kl"])]
    assert place == 2 and shown == pytest.approx(expected, abs=1e-3)
    percents = [100 * each for each in ends(row["changed"])]
    assert [token, low, high] == pytest.approx(percents, abs=0.51)


def test_losses_are_compared_on_the_replies_that_all_have(compare, make):
    whole = lines_of(60)
    for name, lines in (("a", whole), ("b", whole[10:]), ("c", whole[:40][::-1])):
        make(name, lines=lines)
    told = compare()
    assert losses_of(told) == pytest.approx([per_token(whole[10:40])] * 3)
    assert told["rows"][0]["runs"][0]["gain"][0]["replies"] == 30


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"lines": lines_of(60, base=4.009)}, None),
        ({"lines": lines_of(60, base=4.011)}, "0.011"),
        ({"lines": []}, "held-out"),
        ({"lines": [replace(line, reply=f"{line.reply}'") for line in lines_of(60)]}, "held-out"),
        ({"on": {"tokenizer_hash": "another"}}, "tokenizer"),
        ({"finished": False}, "stopped"),
        ({"schema": 2}, "evidence.json"),
        ({"id": "b"}, "again"),
    ],
)
def test_what_cannot_stand_beside_the_newest_is_left_out(compare, make, facts, reason):
    make("odd", **{"id": "odd"} | facts)
    make("a", id="a")
    make("b", {"measured": "2026-12"}, id="b")
    left_out = compare()["left_out"]
    assert [each["name"] for each in left_out] == (["inspected/odd"] if reason else [])
    assert all(reason in each["reason"] for each in left_out)


def test_reports_on_prompts_are_compared_by_their_checks(capsys, compare, make):
    """Without losses the base is known by its name and commit alone."""
    for name in "ba":
        rows = [asked(n, source="prompts", after=name == "a" or n > 8) for n in range(30)]
        make(name, {"measured": f"2026 {name}"}, lines=[], exchanges=rows)
    told = compare()
    passed = told["change"]["checks"][0]["passed"]
    assert (passed["before"], passed["after"]) == (30, 21)
    assert not told["left_out"] and not losses_of(told)
    make("a", {"base": "another/model"}, lines=[], exchanges=rows)
    refused(capsys, ["compare", "inspected"], "another/model", main=main)


def test_other_tasks_or_other_replies_to_them_have_no_kl_beside(compare, make):
    for name, gain, replies in (("a", 1.2, "same"), ("b", 1.1, "same"), ("c", 1, "others")):
        make(name, gain=gain, shifts=[shift_of(1.0, replies=replies)])
    told = compare()
    assert [row["kl"] is None for row in told["rows"]] == [False, False, True]
    assert left_out_of(told) == ["KL of inspected/c"]


@pytest.mark.parametrize(
    ("change", "facts", "count"),
    [
        ({}, {}, 30),
        ({"rule": {"most_words": 41}}, {}, 29),
        ({"messages": []}, {}, 29),
        ({"source": "tasks"}, {}, 29),
        ({}, {"max_new_tokens": 80}, 0),
        ({}, {"on": {"enable_thinking": True}}, 0),
    ],
)
def test_checks_are_compared_by_prompt_rule_and_length(compare, make, change, facts, count):
    rows = [asked(number, after=number != 1) for number in range(30)]
    make("a", exchanges=rows)
    make("b", exchanges=[asked(0, **change), *rows[1:]], **facts)
    told = compare()
    for row in told["rows"]:
        counts = [(each["passed"]["count"], each["passed"]["after"])
                  for each in row["runs"][0]["checks"]]  # fmt: skip
        assert counts == ([(count, count - 1)] if count else [])
    assert bool(told["left_out"]) is (count < 30)


def test_a_row_whose_adapter_may_have_learned_the_lines_is_marked(printed, make):
    for name, learned, gain in (("a", 0, 1.3), ("b", None, 1.2), ("c", 4, 1.1)):
        make(name, gain=gain, learned=learned)
    assert re.findall(r"^ {10}(\d \?|\d) ", printed(), re.MULTILINE) == ["1", "2 ?", "3"]


# ---- Settings and their seeds


def seeded(make, rates=(1e-4, 3e-4), seeds=(1, 2, 3), spread=0.02):
    """Write runs of several rates and seeds; return the lines of each rate's runs."""
    lines_by_rate, draw = {}, np.random.default_rng(4)
    for rate, seed in itertools.product(rates, seeds):
        shift = spread * draw.normal() - 0.3 * rates.index(rate)
        lines = lines_of(40)
        for number, line in enumerate(lines):
            line.adapter += (shift + 0.05 * draw.normal()) * line.tokens
            line.cluster = f"talk {number // 2}"
        known = {"LEARNING_RATE": rate, "SEED": seed, "CODE": f"{100 * rates.index(rate)}"}
        make(f"{rate}-{seed}", lines=lines, known=known, shifts=[])
        lines_by_rate.setdefault(rate, []).append(lines)
    return lines_by_rate


def test_an_interval_between_settings_covers_lines_and_seeds(compare, make):
    """By numpy: the jackknife of mean differences by clusters, and the pooled spread of seeds."""
    runs = seeded(make)
    told = compare()
    best, other = told["rows"]
    means = {rate: [per_token(lines) for lines in of_rate] for rate, of_rate in runs.items()}
    assert sorted(best["losses"]) == pytest.approx(sorted(means[3e-4]))
    assert best["spread"] == pytest.approx(np.std(means[3e-4], ddof=1))
    variance = np.mean([np.var(each, ddof=1) for each in means.values()])
    assert told["seeds"] == {"variance": pytest.approx(variance), "freedom": 4}
    adapters = {r: np.mean([[x.adapter for x in run] for run in runs[r]], axis=0) for r in runs}
    tokens = np.array([line.tokens for line in runs[1e-4][0]], float)
    clusters = np.array([line.cluster for line in runs[1e-4][0]])
    excess, names = adapters[1e-4] - adapters[3e-4], sorted(set(clusters))
    left = [excess[clusters != n].sum() / tokens[clusters != n].sum() for n in names]
    value = excess.sum() / tokens.sum()
    of_lines = (len(names) - 1) / len(names) * ((np.array(left) - value) ** 2).sum()
    sizes = np.array([tokens[clusters == name].sum() for name in names])
    freedom = sizes.sum() ** 2 / (sizes**2).sum() - 1
    both = of_lines + variance * 2 / 3
    joint = both**2 / (of_lines**2 / freedom + (variance * 2 / 3) ** 2 / 4)
    margin = scipy.stats.t.ppf(0.975, joint) * math.sqrt(both)
    expected = (value, value - margin, value + margin)
    assert ends(other["above_first"]) == pytest.approx(expected)


def test_one_run_beside_settings_with_seeds_has_their_spread(compare, make):
    """And two seeds that happen to be alike have an interval of the lines, and not of no width."""
    seeded(make, seeds=(1, 2), spread=0.0)
    make("single", shifts=[], known={"LEARNING_RATE": 1e-3, "SEED": 1})
    rows = compare()["rows"]
    widths = [row["above_first"]["high"] - row["above_first"]["low"] for row in rows[1:]]
    assert sorted(len(row["runs"]) for row in rows) == [1, 2, 2] and min(widths) > 0.005


def test_seeds_of_one_setting_have_a_spread_and_no_change(compare, printed, make):
    """A change is between rows; of checks they have the mean of their counts."""
    for seed, passed in ((1, 30), (2, 30), (3, 26)):
        rows = [asked(number, after=number < passed) for number in range(30)]
        known = {"LEARNING_RATE": 1e-4, "SEED": seed}
        make(f"{seed}", exchanges=rows, known=known, gain=seed, shifts=[])
    told = compare()
    (row,) = told["rows"]
    assert row["spread"] > 0 and told["change"] is None
    assert re.search(r"is brief +30 +30 +28.7$", printed(), re.MULTILINE)


def test_kl_of_a_setting_is_the_mean_of_its_seeds(compare, make):
    shifts = [replace(shift_of(size), strength=1.0) for size in (0.5, 1.5)]
    for seed, shift in enumerate(shifts):
        make(f"{seed}", shifts=[shift], known={"SEED": seed})
    (row,) = compare()["rows"]
    for name, field in (("kl", "kl"), ("changed", "changed_tokens")):
        sums = np.mean([getattr(shift, field) for shift in shifts], axis=0)
        expected = jackknife(sums, shifts[0].tokens, range(30))
        assert ends(row[name]) == pytest.approx(expected), name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("CODE", "bbbb"), ("CODE", "aaaa, then bbbb"), ("CODE", None), ("CHAT TEMPLATE", "t2"),
        ("modules_to_save", "['lm_head']"), ("SEED", None),
        ("SEED", 1),  # one that stands twice is no second draw: no record tells what differs
    ],
)  # fmt: skip
def test_no_two_runs_that_differ_in_more_than_their_seed_are_one_row(compare, make, key, value):
    """Also where one lacks what the other has, which is then not known: "?"."""
    whole = {"LEARNING_RATE": 1e-4, "SEED": 1, "CODE": "aaaa", "CHAT TEMPLATE": "t1"}
    other = whole | {"SEED": 2, key: value}
    make("a", shifts=[], known=whole, gain=2)
    make("b", shifts=[], known={name: fact for name, fact in other.items() if fact is not None})
    rows = compare()["rows"]
    assert [len(row["runs"]) for row in rows] == [1, 1]
    if whole.get(key) != value:
        values = [str(whole.get(key, "?")), "?" if value is None else str(value)]
        assert [row["settings"][key] for row in rows] == values


def test_code_that_was_edited_midway_is_told_where_all_runs_have_it(compare, make):
    for name in "ab":
        known = {"LEARNING_RATE": 1e-4, "SEED": ord(name), "CODE": "aaaa, then bbbb"}
        make(name, shifts=[], known=known)
    told = compare()
    assert len(told["rows"]) == 1
    assert len([sentence for sentence in told["conclusion"] if "edited" in sentence]) == 2


@pytest.mark.parametrize(("rates", "end"), [((1e-4, 1e-3), "largest"), ((1e-3, 1e-4), "smallest")])
def test_the_conclusion_says_what_can_be_told_apart(compare, make, rates, end):
    """The last rate is the best, and lies at an end; of a code there is none."""
    seeded(make, rates=(rates[0], 5e-4, rates[1]), seeds=(1, 2))
    told = " ".join(compare()["conclusion"])
    assert "1 has a lower loss than rows 2 and 3" in told and "cannot be told" not in told
    assert f"LEARNING_RATE {rates[1]} is the {end}" in told and told.count(" tried") == 1
    assert "3 degrees" in told


def test_settings_that_cannot_be_told_apart_are_said_to_be_so(compare, make):
    """Seeds differ by more than they do."""
    seeded(make, rates=(1e-4, 3e-4, 2e-4), seeds=(1, 2), spread=5.0)
    told = " ".join(compare()["conclusion"])
    assert "1 cannot be told from rows 2 and 3" in told and "has a lower" not in told


@pytest.mark.parametrize(("lines", "is_judged"), [(19, False), (20, True)])
def test_fewer_than_twenty_lines_judge_no_row(compare, make, lines, is_judged):
    for name, gain in (("a", 1.0), ("b", 2.0)):
        make(name, count=lines, gain=gain, shifts=[])
    told = " ".join(compare()["conclusion"])
    assert ("has a lower loss" in told, "No row is judged" in told) == (is_judged, not is_judged)
    assert "cannot be told" not in told


# ---- What is shared


def test_adapters_of_other_templates_are_compared_on_the_same_reply_tokens(compare, make):
    """Their prompts have other tokens; the base is that which is served, for both."""
    for name, gain, template in (("a", 1.2, "t1"), ("b", 1.0, "t2")):
        lines = lines_of(40, gain)
        for line in lines if name == "b" else []:
            line.id, line.served_base = f"{line.id} in b", line.base
            line.base += 0.4 * line.tokens  # the base does not know this template
        make(name, {"template": template}, lines=lines, shifts=[])
    told = compare()
    (first,), (second,) = (row["runs"] for row in told["rows"])
    assert first["gain"][0]["base"] == second["gain"][0]["base"] == pytest.approx(4.0)
    assert second["gain"][0]["replies"] == 40 and not told["left_out"]
    assert told["rows"][1]["above_first"]["value"] == pytest.approx(0.2)
    assert [row["settings"]["chat template, as served"] for row in told["rows"]] == ["t1", "t2"]
    assert told["change"]["template_effect"] is None


def test_records_that_share_no_reply_are_left_out(compare, make):
    """Each two of three overlap, but all three do not: nothing is NaN."""
    whole = lines_of(60)
    for name, lines in (("a", whole[:40]), ("b", whole[20:]), ("c", whole[:20] + whole[40:])):
        make(name, {"measured": f"2026 {name}"}, lines=lines)
    told = compare()
    assert len(losses_of(told)) == 2 and len(told["left_out"]) == 1
    assert told["rows"][1]["above_first"]["units"] == 20


def test_replies_are_shared_by_their_tokens_and_not_by_their_lines(compare, make):
    """Another file may have the same lines in another order."""
    lines = lines_of(40)
    moved = [
        replace(line, where=other.where, cluster=other.where, adapter=line.adapter + line.tokens)
        for line, other in zip(lines, lines[::-1], strict=True)
    ]
    make("a", lines=lines, shifts=[])
    make("b", lines=moved, shifts=[])
    assert ends(compare()["rows"][1]["above_first"]) == pytest.approx((1, 1, 1))


def test_a_comparison_of_two_has_the_clusters_of_a_report(compare, make):
    """Five lines of each person, all alike: checks, pairs and couples rest on eight."""
    people = [f"person {number // 5}" for number in range(40)]
    lines = [replace(line, cluster=who) for line, who in zip(lines_of(40), people, strict=True)]
    for name in "ab":
        rows, pairs, couples = [], [], []
        for n, who in enumerate(people):
            turn = name == "a" and n < 25
            rows.append(asked(n, where=lines[n].where, after=not turn))
            after = (-20 - turn, -21 + turn)
            pairs.append(pair_of(n, (-30, -25), after, cluster=who))
            after = (-15 - turn, -30, -20, -30)
            couples.append(couple_of(n, (-20, -30, -20, -30), after, cluster=who))
        make(name, lines=lines, exchanges=rows, pairs=pairs, couples=couples)
    change = compare()["change"]
    check, pair, couple = change["checks"][0]["passed"], change["pairs"][0], change["couples"][0]
    assert {check["lost"], check["won"]} == {0, 25} and abs(pair["shift"]["value"]) == 1.25
    units = [each["units"] for each in (check["change"], pair["shift"], couple["change"])]
    assert units == [8, 8, 8] and check["change"]["p"] == 2**-5
    expected = intervals.paired_change(5, 0, 8)
    width = check["change"]["high"] - check["change"]["low"]
    assert width == pytest.approx(expected.high - expected.low)


def test_pairs_and_couples_are_compared_on_those_that_all_have(compare, make):
    for name, right, count in (("a", 25, 30), ("b", 15, 40)):
        after = [(-20.0, -21.0) if n < right else (-20.0, -10.0) for n in range(count)]
        pairs = [pair_of(n, (-30.0, -29.0), moved) for n, moved in enumerate(after)]
        couples = [couple_of(n, (-9, -9, -9, -9), (-9 + right, -9, -9, -9)) for n in range(right)]
        make(name, pairs=pairs, couples=couples, shifts=[], gain=1 + (name == "a"))
    told = compare()
    pairs = [row["runs"][0]["pairs"][0] for row in told["rows"]]
    counts = [(one["pairs"], one["likelier"]["before"], one["likelier"]["after"]) for one in pairs]
    assert counts == [(30, 0, 25), (30, 0, 15)]
    change = told["change"]["pairs"][0]
    assert change["likelier"]["change"]["value"] == pytest.approx(-1 / 3)
    # Ten pairs of thirty have a margin of -10 in place of 1.
    assert change["shift"]["value"] == pytest.approx(-11 / 3)
    couple = told["change"]["couples"][0]
    assert (couple["couples"], couple["base"]["value"], couple["change"]["value"]) == (15, 25, -10)


def test_the_page_of_two_has_both_replies_and_equal_checks(compare, make, tmp_path):
    for name, numbers, gain in (("a", range(20), 1.2), ("b", range(10, 30), 1.0)):
        rows = []
        for number in numbers:
            passes = {"is brief": name == "a", "other": True}
            one = asked(number, adapter=said(f"{name} to {number}", passes))
            one.checks["other"], one.base.passes["other"] = {"most_words": ord(name)}, True
            rows.append(one)
        make(name, gain=gain, exchanges=rows)
    compare()
    page = page_of(tmp_path)
    assert [side["name"] for side in page["sides"]] == ["base", "inspected/a", "inspected/b"]
    replies = [[reply["text"] for reply in prompt["replies"][1:]] for prompt in page["prompts"]]
    assert replies == [[f"a to {n}", f"b to {n}"] for n in range(10, 20)]
    for prompt in page["prompts"]:
        passes = [reply["passes"]["is brief"] for reply in prompt["replies"]]
        assert list(prompt["checks"]) == ["is brief"] and passes == [True, True, False]
