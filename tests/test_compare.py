"""`compare`: what several records share, and what is left out."""

import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from made_records import asked, jackknife, lines_of, made, pair_of, put, shift_of
from runs import command

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


def names_of(out):
    return re.findall(r"^\d+ +inspected/(\S+)$", out, re.MULTILINE)


def test_three_adapters_of_one_folder_are_three_rows(compare, make, tmp_path):
    """The records of replaced adapters lie in dated folders."""
    home = tmp_path / "inspected" / "final_lora"
    for number, (rate, gain) in enumerate([(1e-4, 1.0), (3e-4, 1.2), (1e-3, 0.5)]):
        settings = {"LEARNING_RATE": rate, "EPOCHS": 3, "OUTPUT_DIR": f"run {number}"}
        run = {"settings": settings, "data": {"train": {"sha256": f"{number}abcdefghi"}}}
        targets = ["a", "b"] if number else ["b", "a"]
        config = {"lora_dropout": 0.1 * (number == 0), "target_modules": targets}
        found = make("final_lora", gain=gain, id=str(number), run=run, config=config)
        put(found, measured=f"2026-11-3{number}")
        if number < 2:
            home.rename(home.with_name(f"final_lora.{number}"))
    losses, left, out = compare()
    expected = ["final_lora.1", "final_lora.0", "final_lora"]
    assert names_of(out) == expected and len(losses) == 3 and not left
    assert re.findall(r"LEARNING_RATE (\S+),", out) == ["0.0003", "0.0001", "0.001"]
    assert re.findall(r"lora_dropout (\S+),", out) == ["0.0", "0.1", "0.0"]
    assert "1abcdefg" in out and not re.search("OUTPUT_DIR|EPOCHS|target_modules", out)
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
        better = [best.adapter - line.adapter for best, line in pairs]
        clusters = [line.cluster for line in lines]
        value, low, high = jackknife(better, tokens, clusters, 0.05 / math.comb(count, 2))
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
        ({"lines": [replace(line, id=f"{line.id}'") for line in lines_of(60)]}, "held-out"),
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
        put(make(name, **{"id": name, **WITHOUT_PARTS, **more}), measured=on, dtype=f"for {name}")
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


def seeded(make, rates=(1e-4, 3e-4), seeds=(1, 2, 3), spread=0.02):
    """Write runs of several rates and seeds, and return the loss that each should be told with."""
    losses = {}
    for rate, seed in itertools.product(rates, seeds):
        shift = spread * (seed - 2) + (0.3 if rate == rates[0] else 0)
        lines = lines_of(40)
        for line in lines:
            line.adapter += shift * line.tokens
        run = {"settings": {"LEARNING_RATE": rate, "SEED": seed, "OUTPUT_DIR": f"{rate} {seed}"}}
        put(make(f"{rate}-{seed}", **WITHOUT_PARTS, lines=lines, run=run, shifts=[]))
        tokens = sum(line.tokens for line in lines)
        losses.setdefault(rate, []).append(sum(line.adapter for line in lines) / tokens)
    return losses


def test_runs_that_differ_in_their_seed_alone_are_one_row(capsys, make, tmp_path, monkeypatch):
    """The seeds are the unit: the lines, however many, do not narrow the interval."""
    monkeypatch.chdir(tmp_path)
    losses = seeded(make)
    told = json.loads(command(capsys, ["compare", "inspected", "--json"], main).out)
    best, other = told["rows"]
    assert [sorted(row["losses"]) for row in told["rows"]] == [
        pytest.approx(sorted(losses[rate])) for rate in (3e-4, 1e-4)
    ]
    assert best["spread"] == pytest.approx(np.std(losses[3e-4], ddof=1))
    test = scipy.stats.ttest_ind(losses[3e-4], losses[1e-4], equal_var=False)
    low, high = test.confidence_interval(0.95)
    found = other["better_than_first"]
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert "SEED" in str(best["settings"]) and all("3" in text for text in best["settings"])
    put(make("another-3e-4", **WITHOUT_PARTS, run={}, shifts=[]))  # its settings are not known
    out = command(capsys, ["compare", "inspected", "--json"], main).out
    assert [len(row["runs"]) for row in json.loads(out)["rows"]] == [3, 1, 3]


def test_a_seed_that_stands_twice_is_no_second_draw(capsys, make, tmp_path, monkeypatch):
    """Two runs with the same settings and seed differ in something that no record has."""
    monkeypatch.chdir(tmp_path)
    run = {"settings": {"LEARNING_RATE": 1e-4, "SEED": 1}}
    for name in "ab":
        put(make(name, **WITHOUT_PARTS, run=run, shifts=[]))
    told = json.loads(command(capsys, ["compare", "inspected", "--json"], main).out)
    assert [len(row["runs"]) for row in told["rows"]] == [1, 1]


def test_edited_fields_of_sftconfig_are_differences(compare, make):
    """Also one that takes the place of a constant; a constant that passed on its value is none."""
    for name, fields in (("a", {"weight_decay": 0.3, "learning_rate": 1e-5}), ("b", {})):
        identity = {"SFTConfig.weight_decay": 0.0, "SFTConfig.learning_rate": 1e-4}
        identity |= {f"SFTConfig.{key}": value for key, value in fields.items()}
        run = {"settings": {"LEARNING_RATE": 1e-4}, "identity": identity}
        put(make(name, **WITHOUT_PARTS, run=run))
    out = compare()[2]
    assert "SFTConfig.weight_decay 0.3" in out and "SFTConfig.weight_decay 0.0" in out
    assert "SFTConfig.learning_rate 1e-05" in out and " LEARNING_RATE" not in out


def test_without_losses_adapters_stand_in_the_order_of_their_names(compare, make):
    for name, date in (("b", "2026-11"), ("a", "2026-10"), ("c", "2026-12")):
        rows = [asked(n, source="prompts") for n in range(3)]
        put(make(name, **WITHOUT_PARTS, lines=[], exchanges=rows), measured=date)
    assert names_of(compare()[2]) == ["a", "b", "c"]


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
    """Another file may have the same lines in another order: N39 of the review."""
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
    assert (value, low, high) == pytest.approx((-0.1, -0.1, -0.1), abs=0.006)


def test_pairs_are_compared_on_those_that_all_have(capsys, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, right in (("a", 25), ("b", 15)):
        pairs = [
            pair_of(n, (-30.0, -29.0), (-20.0, -21.0) if n < right else (-20.0, -10.0))
            for n in range(30 if name == "a" else 40)
        ]
        put(make(name, **WITHOUT_PARTS, pairs=pairs, shifts=[], gain=1 + (name == "a")))
    told = json.loads(command(capsys, ["compare", "inspected", "--json"], main).out)
    pairs = [row["runs"][0]["pairs"][0] for row in told["rows"]]
    assert [
        (one["pairs"], one["likelier"]["before"], one["likelier"]["after"]) for one in pairs
    ] == [(30, 0, 25), (30, 0, 15)]
    assert [one["moved"] for one in pairs] == [25, 15]
    for change in (told["change"]["pairs"][0]["likelier"]["change"], told["moved_change"]):
        assert change["value"] == pytest.approx(-1 / 3)


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
