"""`compare`: what several records share, and what is left out."""

import json
import math
import re
from dataclasses import replace

import pytest
import scipy.stats
from made_records import asked, jackknife, lines_of, made, put, shift_of
from runs import command

from inspect_lora.__main__ import main

WITHOUT_PARTS = {"parts": [], "measured_on": []}


@pytest.fixture
def compare(capsys, tmp_path, monkeypatch):
    """Return a function that compares all records of the test, as a user beside them would."""
    monkeypatch.chdir(tmp_path)

    def compare_them(*folders, status=0):
        end = command(capsys, ["compare", *(folders or ["inspected"])], main)
        assert end.status == status
        left = re.findall(r"^left out.*(?:\n {10}.*)*", end.out, re.MULTILINE)
        # The rows of losses: number, mark, loss, and the rest.
        losses = re.findall(r"^ {10}(\d+)( \?)? +(\d\.\d{4})(.*)$", end.out, re.MULTILINE)
        return losses, left, end.out + end.err

    return compare_them


@pytest.fixture
def make(tmp_path):
    return lambda name, **facts: made(tmp_path / "inspected" / name, **facts)


def names_of(out):
    return re.findall(r"^\d+ +inspected/(\S+)$", out, re.MULTILINE)


def test_three_adapters_of_one_folder_are_three_rows(compare, make, tmp_path):
    """The records of replaced adapters lie in dated folders, or under dated names."""
    home = tmp_path / "inspected" / "final_lora"
    for number, (rate, gain) in enumerate([(1e-4, 1.0), (3e-4, 1.2), (1e-3, 0.5)]):
        settings = {"LEARNING_RATE": rate, "EPOCHS": 3, "OUTPUT_DIR": f"run {number}"}
        run = {"settings": settings, "data": {"train": {"sha256": f"{number}abcdefghi"}}}
        targets = ["a", "b"] if number else ["b", "a"]
        config = {"lora_dropout": 0.1 * (number == 0), "target_modules": targets}
        found = make("final_lora", gain=gain, id=str(number), run=run, config=config)
        put(found, measured=f"2026-11-3{number}")
        if number == 0:
            home.rename(home.with_name("final_lora.2026-11-30"))
        if number == 1:
            (home / "evidence.json").rename(home / "evidence.json.2026-11-30")
    losses, left, out = compare()
    expected = ["final_lora/evidence.json.2026-11-30", "final_lora.2026-11-30", "final_lora"]
    assert names_of(out) == expected and len(losses) == 3 and not left
    assert re.findall(r"LEARNING_RATE (\S+),", out) == ["0.0003", "0.0001", "0.001"]
    assert re.findall(r"lora_dropout (\S+),", out) == ["0.0", "0.1", "0.0"]
    assert "1abcdefg" in out and not re.search("OUTPUT_DIR|EPOCHS|target_modules", out)
    assert not (tmp_path / "compared").exists()  # the page is of two


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
            shown = [f"{value:+.4f}", f"{low:+.3f} to {high:+.3f}"]
            assert re.split(" {2,}", rest)[1:3] == shown and ("~" in rest) == (low < 0 < high)


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
def test_what_cannot_stand_beside_the_newest_is_left_out(compare, make, facts, reason):
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


def test_reports_on_prompts_are_compared_by_their_checks(compare, make):
    """Without losses the base is known by its name and commit alone."""
    for name in "ba":
        rows = [asked(n, source="prompts", after=name == "a" or n > 8) for n in range(30)]
        found = put(make(name, **WITHOUT_PARTS, lines=[], exchanges=rows), measured=f"2026 {name}")
    losses, left, out = compare()
    row = rf"is brief +30 +30 +21 +9 +0 +{scipy.stats.binomtest(0, 9).pvalue:.3f}$"
    assert re.search(row, out, re.MULTILINE) and losses == left == []
    put(found, base="another/model")
    _, left, out = compare(status=1)
    assert len(left) == out.count("another/model") == 1 and not re.search(row, out, re.MULTILINE)


def test_other_tasks_or_other_replies_to_them_have_no_kl_beside(compare, make):
    for name, gain, replies in (("a", 1.2, "same"), ("b", 1.1, "same"), ("c", 1, "others")):
        put(make(name, gain=gain, shifts=[shift_of(1.0, replies=replies), shift_of(1.0, True)]))
    losses, (left,), _ = compare()
    assert ["%" in rest for _, _, _, rest in losses] == [True, True, False]
    assert "inspected/c" in left


@pytest.mark.parametrize(
    ("change", "facts", "on", "count"),
    [
        ({}, {}, {}, 30),
        ({"rule": {"most_words": 41}}, {}, {}, 29),
        ({"messages": []}, {}, {}, 29),
        ({"source": "tasks"}, {}, {}, 29),
        ({}, {"max_new_tokens": 80}, {}, 0),
        ({}, {}, {"enable_thinking": True}, 0),
    ],
)
def test_checks_are_compared_by_prompt_rule_and_length(compare, make, change, facts, on, count):
    rows = [asked(number, after=number != 1) for number in range(30)]
    put(make("a", exchanges=rows))
    put(make("b", **facts, exchanges=[asked(0, **change), *rows[1:]]), **on)
    _, left, out = compare()
    shown = re.findall(r"is brief +(\d+) +(\d+) +(\d+) ", out)
    assert shown == ([(str(count), str(count - 1), str(count - 1))] if count else [])
    assert bool(left) is (count < 30)


def test_a_row_whose_adapter_may_have_learned_the_lines_is_marked(compare, make):
    for name, learned, gain in (("a", 0, 1.3), ("b", None, 1.2), ("c", 4, 1.1)):
        put(make(name, gain=gain, learned=learned))
    losses, _, out = compare()
    assert [mark for _, mark, _, _ in losses] == ["", " ?", ""] and out.count("learned.txt") == 1
    put(make("b", gain=1.2))
    assert "learned.txt" not in compare()[2]


def test_the_page_of_two_has_both_replies_and_equal_checks(compare, make, tmp_path):
    for name, numbers, gain in (("a", range(20), 1.2), ("b", range(10, 30), 1.0)):
        rows = [asked(number, after=name == "a") for number in numbers]
        for one in rows:
            one.adapter.text = f"{name} to {one.messages[1]['content']}"
            one.checks["other"] = {"most_words": ord(name)}
            one.adapter.passes["other"] = one.base.passes["other"] = True
        put(make(name, gain=gain, exchanges=rows))
    compare()
    page = (tmp_path / "compared" / "replies.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*)</script>', page)[1])
    assert [name for name, _ in data["sides"]] == ["inspected/a", "inspected/b"]
    replies = [(one["base"]["text"], one["adapter"]["text"]) for one in data["prompts"]]
    assert replies == [(f"a to question {n}", f"b to question {n}") for n in range(10, 20)]
    for one in data["prompts"]:
        assert list(one["checks"]) == ["is brief"]
        assert one["base"]["passes"]["is brief"] and not one["adapter"]["passes"]["is brief"]


def test_fewer_than_two_reports_are_an_error_that_names_the_folders(compare, make):
    put(make("a"))
    assert "inspected" in compare(status=1)[2] and "nowhere" in compare("nowhere", status=1)[2]
    assert not compare("inspected", "inspected/a", status=1)[0]  # it is one
