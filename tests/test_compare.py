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
from runs import command

from inspect_lora import intervals
from inspect_lora.__main__ import main

WITHOUT_PARTS = {"parts": [], "part_lines": []}


@pytest.fixture
def compare(capsys, tmp_path, monkeypatch):
    """Return a function that compares all records of the test, as a user beside them would."""
    monkeypatch.chdir(tmp_path)

    def compare_them(*folders, status=0):
        end = command(capsys, ["compare", *(folders or ["inspected"])], main)
        assert end.status == status
        left = re.findall(r"^left out.*(?:\n {10}.*)*", end.err, re.MULTILINE)
        # The rows of losses: number, mark, loss, and the rest.
        losses = re.findall(r"^ {10}(\d+)( \?)? +(\d\.\d{4})(.*)$", end.out, re.MULTILINE)
        return losses, left, end.out + end.err

    return compare_them


@pytest.fixture
def make(tmp_path):
    return lambda name, **facts: made(tmp_path / "inspected" / name, **facts)


def page_of(folder):
    """Return what the page of a comparison has."""
    page = (folder / "compared" / "replies.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*)</script>', page)[1])


def without(facts, name):
    return {key: value for key, value in facts.items() if key != name}


def names_of(out):
    return re.findall(r"^\d+ +inspected/(\S+)$", out, re.MULTILINE)


def test_three_adapters_of_one_folder_are_three_rows(compare, make, tmp_path):
    """The records of replaced adapters lie in dated folders."""
    home = tmp_path / "inspected" / "final_lora"
    for number, (rate, gain) in enumerate([(1e-4, 1.0), (3e-4, 1.2), (1e-3, 0.5)]):
        known = {"LEARNING_RATE": rate, "EPOCHS": 3, "lora_dropout": 0.1 * (number == 0)}
        found = make("final_lora", gain=gain, id=str(number), known=known)
        put(found, measured=f"2026-11-3{number}")
        if number < 2:
            home.rename(home.with_name(f"final_lora.{number}"))
    losses, left, out = compare()
    expected = ["final_lora.1", "final_lora.0", "final_lora"]
    assert names_of(out) == expected and len(losses) == 3 and not left
    assert re.findall(r"LEARNING_RATE (\S+),", out) == ["0.0003", "0.0001", "0.001"]
    assert re.findall(r"lora_dropout ([\d.]+)$", out, re.MULTILINE) == ["0.0", "0.1", "0.0"]
    assert "EPOCHS" not in out
    page = page_of(tmp_path)
    assert len(page["sides"]) == 4 and len(page["prompts"][0]["replies"]) == 4


@pytest.mark.parametrize("count", [2, 4])
def test_differences_are_paired_and_the_intervals_hold_together(compare, make, count):
    """The best is picked from all pairs, so each has its share of 5 % (Bonferroni)."""
    found = [make(str(number), gain=1 - number / 4) for number in range(count)]
    for number, one in enumerate(found):
        for place, line in enumerate(one.lines):
            line.adapter += math.sin(place * (number + 1)) * line.tokens
            line.cluster = f"conversation {place // 2}"
        put(one)
    losses, _, out = compare()
    ranked = [found[int(name)].lines for name in names_of(out)]
    tokens = [line.tokens for line in ranked[0]]
    for lines, (number, _, loss, rest) in zip(ranked, losses, strict=True):
        assert loss == f"{sum(line.adapter for line in lines) / sum(tokens):.4f}"
        pairs = zip(ranked[0], lines, strict=True)
        above = [line.adapter - best.adapter for best, line in pairs]
        clusters = [line.cluster for line in lines]
        value, low, high = jackknife(above, tokens, clusters, 0.05 / math.comb(count, 2))
        if number != "1":
            shown = map(float, re.findall(r"[+-]?\d\.\d+", rest)[:3])
            assert [*shown] == pytest.approx([value, low, high], abs=6e-3)


def test_losses_are_compared_on_the_replies_that_all_have(compare, make):
    whole = lines_of(60)
    for name, lines in (("a", whole), ("b", whole[10:]), ("c", whole[:40][::-1])):
        put(make(name, **WITHOUT_PARTS, lines=lines))
    losses, _, out = compare()
    shared = whole[10:40]
    mean = sum(line.adapter for line in shared) / sum(line.tokens for line in shared)
    assert [loss for _, _, loss, _ in losses] == [f"{mean:.4f}"] * 3
    assert re.search(r"^held-out +30 ", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"lines": lines_of(60, base=4.009)}, None),
        ({"lines": lines_of(60, base=4.011)}, "0.011"),
        ({"lines": []}, "held-out"),
        ({"lines": [replace(line, reply=f"{line.reply}'") for line in lines_of(60)]}, "held-out"),
        ({"conditions": {"tokenizer_hash": "another"}}, "tokenizer"),
        ({"finished": False}, "stopped"),
        ({"schema": 2}, "evidence.json"),
        ({"id": "b"}, "again"),
    ],
)
def test_what_cannot_stand_beside_the_newest_is_left_out(capsys, compare, make, facts, reason):
    for name, on, more in (
        ("odd", "2026-11-30", facts),
        ("a", "2026-11-30", {}),
        ("b", "2026-12", {}),
    ):
        found = make(name, **{"id": name, **WITHOUT_PARTS} | without(more, "conditions"))
        put(found, measured=on, dtype=f"for {name}", **more.get("conditions", {}))
    losses, left, out = compare()
    if reason:
        assert len(losses) == 2 and "inspected/odd" in left[0] and reason in left[0]
    assert (len(left), "for odd" in out) == ((1, False) if reason else (0, True))
    told = json.loads(command(capsys, ["compare", "inspected", "--json"], main).out)["left_out"]
    assert [entry["name"] for entry in told] == ["inspected/odd"] * len(left)
    assert all(reason in entry["reason"] for entry in told)


def test_reports_on_prompts_are_compared_by_their_checks(compare, make):
    """Without losses the base is known by its name and commit alone."""
    for name in "ba":
        rows = [asked(n, source="prompts", after=name == "a" or n > 8) for n in range(30)]
        found = put(make(name, **WITHOUT_PARTS, lines=[], exchanges=rows), measured=f"2026 {name}")
    losses, left, out = compare()
    row = r"is brief +30 +30 +30 +21 +-30 \("
    assert re.search(row, out, re.MULTILINE) and losses == left == []
    put(found, base="another/model")
    _, left, out = compare(status=2)
    assert len(left) == out.count("another/model") == 1 and not re.search(row, out, re.MULTILINE)


def test_other_tasks_or_other_replies_to_them_have_no_kl_beside(compare, make):
    for name, gain, replies in (("a", 1.2, "same"), ("b", 1.1, "same"), ("c", 1, "others")):
        put(make(name, gain=gain, shifts=[shift_of(1.0, replies=replies)]))
    losses, (left,), _ = compare()
    assert ["%" in rest for _, _, _, rest in losses] == [True, True, False]
    assert "inspected/c" in left


@pytest.mark.parametrize(
    ("change", "facts", "conditions", "count"),
    [
        ({}, {}, {}, 30),
        ({"rule": {"most_words": 41}}, {}, {}, 29),
        ({"messages": []}, {}, {}, 29),
        ({"source": "tasks"}, {}, {}, 29),
        ({}, {"max_new_tokens": 80}, {}, 0),
        ({}, {}, {"enable_thinking": True}, 0),
    ],
)
def test_checks_are_compared_by_prompt_rule_and_length(
    compare, make, change, facts, conditions, count
):
    rows = [asked(number, after=number != 1) for number in range(30)]
    put(make("a", exchanges=rows))
    put(make("b", **facts, exchanges=[asked(0, **change), *rows[1:]]), **conditions)
    _, left, out = compare()
    shown = re.findall(r"is brief +(\d+) +(\d+) +(\d+) +(\d+) ", out)
    assert shown == ([(str(count), str(count), str(count - 1), str(count - 1))] if count else [])
    assert bool(left) is (count < 30)


def test_a_row_whose_adapter_may_have_learned_the_lines_is_marked(compare, make):
    for name, learned, gain in (("a", 0, 1.3), ("b", None, 1.2), ("c", 4, 1.1)):
        put(make(name, gain=gain, learned=learned))
    losses, _, out = compare()
    assert [mark for _, mark, _, _ in losses] == ["", " ?", ""] and out.count("learned.txt") == 1
    put(make("b", gain=1.2))
    assert "learned.txt" not in compare()[2]


# ---- Settings and their seeds


def seeded(make, rates=(1e-4, 3e-4), seeds=(1, 2, 3), spread=0.02, codes=()):
    """Write runs of several rates and seeds, and return their losses by the rate."""
    losses, draw = {}, np.random.default_rng(4)
    for rate, seed in itertools.product(rates, seeds):
        shift = spread * draw.normal() - 0.3 * rates.index(rate)
        lines = lines_of(40)
        for number, line in enumerate(lines):
            line.adapter += (shift + 0.05 * draw.normal()) * line.tokens
            line.cluster = f"talk {number // 2}"
        known = {"LEARNING_RATE": rate, "SEED": seed}
        known |= {"CODE": codes[rates.index(rate)]} if codes else {}
        put(make(f"{rate}-{seed}", **WITHOUT_PARTS, lines=lines, known=known, shifts=[]))
        losses.setdefault(rate, []).append(lines)
    return losses


def told_by(capsys, tmp_path, monkeypatch):
    """Return what --json has of the records of the test."""
    monkeypatch.chdir(tmp_path)
    return json.loads(command(capsys, ["compare", "inspected", "--json"], main).out)


def per_token(lines):
    return sum(line.adapter for line in lines) / sum(line.tokens for line in lines)


def test_an_interval_between_settings_covers_lines_and_seeds(capsys, make, tmp_path, monkeypatch):
    """By numpy: the jackknife of mean differences by clusters, and the pooled spread of seeds."""
    runs = seeded(make)
    told = told_by(capsys, tmp_path, monkeypatch)
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
    found = other["above_first"]
    assert found["value"] == pytest.approx(value)
    assert (found["low"], found["high"]) == pytest.approx((value - margin, value + margin))


def test_one_run_beside_settings_with_seeds_has_their_spread(capsys, make, tmp_path, monkeypatch):
    """And two seeds that happen to be alike have an interval of the lines, and not of no width."""
    seeded(make, rates=(1e-4, 3e-4), seeds=(1, 2), spread=0.0)
    run = make("single", **WITHOUT_PARTS, shifts=[], known={"LEARNING_RATE": 1e-3, "SEED": 1})
    put(run)
    rows = told_by(capsys, tmp_path, monkeypatch)["rows"]
    widths = [row["above_first"]["high"] - row["above_first"]["low"] for row in rows[1:]]
    assert sorted(len(row["runs"]) for row in rows) == [1, 2, 2] and min(widths) > 0.005


def test_two_seeds_of_one_setting_have_no_change(capsys, make, tmp_path, monkeypatch):
    """A change is between rows; between seeds there is the spread, and the mean of their counts."""
    seeded(make, rates=(1e-4,), seeds=(1, 2))
    known = {"LEARNING_RATE": 1e-4, "SEED": 3}
    rows = [asked(number, after=number > 3) for number in range(30)]
    put(make("third", **WITHOUT_PARTS, exchanges=rows, lines=lines_of(40), known=known, shifts=[]))
    told = told_by(capsys, tmp_path, monkeypatch)
    assert len(told["rows"]) == 1 and told["change"] is None and told["rows"][0]["spread"] > 0
    out = command(capsys, ["compare", "inspected"], main).out
    assert not re.search(r"1 to 2", out) and re.search(
        r"is brief +30 +30 +28.7$", out, re.MULTILINE
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("CODE", "bbbb"), ("CODE", "aaaa, then bbbb"), ("CODE", None), ("CHAT TEMPLATE", "t2"),
        ("modules_to_save", "['lm_head']"), ("SEED", None),
    ],
)  # fmt: skip
def test_no_two_runs_that_differ_in_more_than_their_seed_are_one_row(compare, make, key, value):
    """Also where one lacks what the other has, which is then not known: "?"."""
    whole = {"LEARNING_RATE": 1e-4, "SEED": 1, "CODE": "aaaa", "CHAT TEMPLATE": "t1"}
    other = whole | {"SEED": 2, key: value}
    known = {"a": whole, "b": {name: held for name, held in other.items() if held is not None}}
    for name, facts in known.items():
        put(make(name, **WITHOUT_PARTS, shifts=[], known=facts, gain=1 + (name == "a")))
    losses, _, out = compare()
    assert len(losses) == 2
    values = [whole.get(key, "?"), "?" if value is None else value]
    assert [f"{key} {text}" in out for text in values] == [True, True]


def test_code_that_was_edited_midway_is_told_where_all_runs_have_it(
    capsys, make, tmp_path, monkeypatch
):
    for name in "ab":
        known = {"LEARNING_RATE": 1e-4, "SEED": ord(name), "CODE": "aaaa, then bbbb"}
        put(make(name, **WITHOUT_PARTS, shifts=[], known=known))
    told = told_by(capsys, tmp_path, monkeypatch)
    assert len(told["rows"]) == 1
    sentences = [sentence for sentence in told["conclusion"] if "edited" in sentence]
    assert len(sentences) == 2 and all(f"inspected/{name}" in str(sentences) for name in "ab")


def test_a_seed_that_stands_twice_is_no_second_draw(capsys, make, tmp_path, monkeypatch):
    """Two runs with the same settings and seed differ in something that no record has."""
    for name in "ab":
        known = {"LEARNING_RATE": 1e-4, "SEED": 1}
        put(make(name, **WITHOUT_PARTS, known=known, shifts=[]))
    told = told_by(capsys, tmp_path, monkeypatch)
    assert [len(row["runs"]) for row in told["rows"]] == [1, 1]


@pytest.mark.parametrize(("rates", "end"), [((1e-4, 1e-3), "largest"), ((1e-3, 1e-4), "smallest")])
def test_the_conclusion_says_what_can_be_told_apart(compare, make, rates, end):
    """The last rate is the best; one between is as good; and the best lies at an end."""
    seeded(make, rates=(rates[0], 5e-4, rates[1]), seeds=(1, 2), codes=("11", "22", "33"))
    _, _, out = compare()
    told = " ".join(out.partition("\n1  ")[0].split())
    assert re.search(r"\b1 has a lower loss than rows 2 and 3\b", told)
    assert f"LEARNING_RATE {rates[1]} is the {end}" in told and told.count(" tried") == 1
    assert "3 degrees" in told


def test_settings_that_cannot_be_told_apart_are_said_to_be_so(compare, make):
    for name, rate in (("a", 1e-4), ("b", 3e-4), ("c", 2e-4)):
        lines = lines_of(40)
        for number, line in enumerate(lines):
            line.adapter += (0.1 * math.sin(number * ord(name)) - 0.001 * ord(name)) * line.tokens
        put(make(name, **WITHOUT_PARTS, lines=lines, shifts=[], known={"LEARNING_RATE": rate}))
    told = " ".join(compare()[2].partition("\n1  ")[0].split())
    assert "1 cannot be told from rows 2 and 3" in told and "has a lower" not in told
    assert "LEARNING_RATE" in told or "largest" not in told


# ---- Chat templates


def test_adapters_of_other_templates_are_compared_on_the_same_reply_tokens(
    capsys, make, tmp_path, monkeypatch
):
    """Their prompts have other tokens; the base is that which is served, for both."""
    for name, gain in (("a", 1.2), ("b", 1.0)):
        lines = lines_of(40, gain)
        for line in lines if name == "b" else []:
            line.id, line.served_base = f"{line.id} in b", line.base
            line.base += 0.4 * line.tokens  # the base does not know this template
        found = make(name, **WITHOUT_PARTS, lines=lines, shifts=[])
        put(found, template="t1" if name == "a" else "t2")
    told = told_by(capsys, tmp_path, monkeypatch)
    (first,), (second,) = (row["runs"] for row in told["rows"])
    assert first["gain"][0]["base"] == second["gain"][0]["base"] == pytest.approx(4.0)
    assert second["gain"][0]["replies"] == 40 and not told["left_out"]
    assert told["rows"][1]["above_first"]["value"] == pytest.approx(0.2)
    assert [row["settings"]["chat template, as served"] for row in told["rows"]] == ["t1", "t2"]
    assert told["change"]["template_effect"] is None


def test_records_that_share_no_reply_are_left_out(compare, make):
    """Each two of three overlap, but all three do not: nothing is NaN."""
    whole = lines_of(60)
    for name, lines in (
        ("a", whole[:40]), ("b", whole[20:]), ("c", whole[:20] + whole[40:])
    ):  # fmt: skip
        put(make(name, **WITHOUT_PARTS, lines=lines), measured=f"2026 {name}")
    losses, left, out = compare()
    assert len(losses) == 2 and len(left) == 1 and "nan" not in out.lower()


def test_replies_are_shared_by_their_tokens_and_not_by_their_lines(compare, make):
    """Another file may have the same lines in another order."""
    lines = lines_of(40)
    moved = [
        replace(line, where=other.where, cluster=other.where)
        for line, other in zip(lines, lines[::-1], strict=True)
    ]
    for line in moved:
        line.adapter += 0.1 * line.tokens
    for name, of in (("a", lines), ("b", moved)):
        put(make(name, **WITHOUT_PARTS, lines=of, shifts=[]))
    losses, *_ = compare()
    value, low, high = map(float, re.findall(r"[+-]?\d\.\d+", losses[1][3])[:3])
    assert (value, low, high) == pytest.approx((0.1, 0.1, 0.1), abs=0.006)


def test_a_comparison_of_two_has_the_clusters_of_a_report(capsys, make, tmp_path, monkeypatch):
    """Five lines of each person, all alike: checks, pairs and couples rest on eight."""
    rows, lines = [], lines_of(40)
    for number, line in enumerate(lines):
        line.cluster = f"person {number // 5}"
        rows.append(asked(number, where=line.where))
    for name in "ab":
        turns = [name == "a" and number // 5 < 5 for number in range(40)]
        pairs = [
            pair_of(n, (-30, -25), (-20 - turn, -21 + turn), cluster=f"person {n // 5}")
            for n, turn in enumerate(turns)
        ]
        couples = [
            couple_of(n, (-20, -30, -20, -30), (-15 - turn, -30, -20, -30), cluster=f"p {n // 5}")
            for n, turn in enumerate(turns)
        ]
        told = [
            replace(one, adapter=said(name, {"is brief": not turn}))
            for one, turn in zip(rows, turns, strict=True)
        ]
        facts = {"lines": lines, "exchanges": told, "pairs": pairs, "couples": couples}
        put(make(name, **WITHOUT_PARTS, **facts))
    change = told_by(capsys, tmp_path, monkeypatch)["change"]
    check, pair, couple = change["checks"][0]["passed"], change["pairs"][0], change["couples"][0]
    assert (check["lost"], check["won"]) in ((25, 0), (0, 25)) and abs(
        pair["shift"]["value"]
    ) == 1.25
    units = [each["units"] for each in (check["change"], pair["shift"], couple["change"])]
    assert units == [8, 8, 8] and check["change"]["p"] == 2**-5
    expected = intervals.paired_change(5, 0, 8)
    width = check["change"]["high"] - check["change"]["low"]
    assert width == pytest.approx(expected.high - expected.low)


def test_pairs_and_couples_are_compared_on_those_that_all_have(capsys, make, tmp_path, monkeypatch):
    for name, right in (("a", 25), ("b", 15)):
        pairs = [
            pair_of(n, (-30.0, -29.0), (-20.0, -21.0) if n < right else (-20.0, -10.0))
            for n in range(30 if name == "a" else 40)
        ]
        couples = [couple_of(n, (-9, -9, -9, -9), (-9 + right, -9, -9, -9)) for n in range(right)]
        facts = {"pairs": pairs, "couples": couples, "shifts": [], "gain": 1 + (name == "a")}
        put(make(name, **WITHOUT_PARTS, **facts))
    told = told_by(capsys, tmp_path, monkeypatch)
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
        rows = [asked(number, after=name == "a") for number in numbers]
        for one in rows:
            one.adapter.text = f"{name} to {one.messages[1]['content']}"
            one.checks["other"] = {"most_words": ord(name)}
            one.adapter.passes["other"] = one.base.passes["other"] = True
        put(make(name, gain=gain, exchanges=rows))
    compare()
    page = page_of(tmp_path)
    assert [side["name"] for side in page["sides"]] == ["base", "inspected/a", "inspected/b"]
    replies = [[reply["text"] for reply in prompt["replies"][1:]] for prompt in page["prompts"]]
    assert replies == [[f"a to question {n}", f"b to question {n}"] for n in range(10, 20)]
    for prompt in page["prompts"]:
        assert list(prompt["checks"]) == ["is brief"]
        passes = [reply["passes"]["is brief"] for reply in prompt["replies"]]
        assert passes == [True, True, False]


def test_fewer_than_two_reports_are_an_error_that_names_the_folders(compare, make):
    put(make("a"))
    assert "inspected" in compare(status=2)[2] and "nowhere" in compare("nowhere", status=2)[2]
    assert "a/nowhere" in compare("inspected", "inspected/a/nowhere", status=2)[2]
    assert not compare("inspected", "inspected/a", status=2)[0]  # it is one
