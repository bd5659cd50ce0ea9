"""Blind readings as files: what `report` and `compare` take from them, and what they refuse."""

import json
import re

import pytest
import scipy.stats
from made_records import asked, made, put, said, tables_of
from runs import command, refused

from inspect_lora.__main__ import main


def page_data(path):
    """Return the JSON in a page."""
    return json.loads(re.search(r'id="data">(.*)</script>', path.read_text(encoding="utf-8"))[1])


def read_blind(page, choices, path, sides=("base", "adapter"), **changes):
    """Write the reading that the page would save: a choice for each of its first prompts."""
    data = page_data(page)
    names = [side["name"] for side in data["sides"]]
    places = [names.index(name) for name in sides]
    rows = [
        {
            "prompt": prompt["id"],
            "replies": [prompt["replies"][place]["id"] for place in places],
            "first": number % 2,
            "choice": choice,
        }
        for number, (prompt, choice) in enumerate(zip(data["prompts"], choices, strict=False))
    ]
    ids = [data["sides"][place]["id"] for place in places]
    content = {"schema": 1, "reader": "Ann", "finished": True, "sides": ids, "choices": rows}
    path.write_text(json.dumps(content | changes), encoding="utf-8")
    return path


@pytest.fixture
def report(capsys, tmp_path):
    """Return the folder of a report of thirty prompts."""
    put(made(tmp_path / "report", exchanges=[asked(number) for number in range(30)]))
    assert command(capsys, ["report", tmp_path / "report"], main).status == 0
    return tmp_path / "report"


CHOICES = [1] * 16 + [0] * 6 + ["alike"] * 5 + ["neither"] * 3


def test_a_report_has_the_share_its_interval_and_the_test(capsys, report, tmp_path):
    file = read_blind(report / "replies.html", CHOICES, tmp_path / "ann.json")
    words = ["report", report, "--reading", file]
    (reading,) = json.loads(command(capsys, [*words, "--json"], main).out)["readings"]
    whole, *kinds = reading["preferences"]
    counts = [whole[name] for name in ("read", "first", "second", "alike", "neither")]
    assert counts == [30, 6, 16, 5, 3] and reading["reader"] == "Ann" and reading["is_finished"]
    wilson = scipy.stats.binomtest(16, 22).proportion_ci(method="wilson")
    share = whole["share"]
    assert (share["value"], share["low"], share["high"]) == pytest.approx((16 / 22, *wilson))
    coin = scipy.stats.binom(22, 0.5)
    assert share["p"] == pytest.approx(2 * coin.cdf(6) - coin.pmf(6))
    for row, first in zip(kinds, (0, 1, 2), strict=True):  # each is of every third prompt
        of_kind = CHOICES[first::3]
        counts = [row[name] for name in ("read", "first", "second")]
        assert counts == [10, of_kind.count(0), of_kind.count(1)], row["kind"]
    assert command(capsys, words, main).status == 0
    text = (report / "report.md").read_text(encoding="utf-8")
    assert tables_of(text)["Blind readings"][1][:6] == ["Ann", "30", "6", "16", "5", "3"]
    assert "16 of 22" in text.partition("\n## ")[0]


def test_two_readers_agree_on_what_both_preferred(capsys, report, tmp_path):
    """The other one has the sides in the other order, and the same name."""
    page = report / "replies.html"
    one = read_blind(page, CHOICES, tmp_path / "one.json")
    other = [0] * 12 + [1] * 18  # the adapter twelve times, then the base
    two = read_blind(page, other, tmp_path / "two.json", sides=("adapter", "base"))
    words = ["report", report, "--json", "--reading", one, two]
    told = json.loads(command(capsys, words, main).out)
    assert len({reading["reader"] for reading in told["readings"]}) == 2
    (agreement,) = told["agreements"]
    assert agreement["prompts"] == 22 and agreement["same"]["value"] == pytest.approx(18 / 22)


def other_replies():
    rows = [asked(number) for number in range(30)]
    rows[3].adapter = said("something else", {"is brief": True})
    return rows


OTHERS = {  # reports whose readings are of other replies
    "another adapter": {"id": "another"},
    "other prompts": {"exchanges": [asked(number) for number in range(40, 70)]},
    "something else said": {"exchanges": other_replies()},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_reading_of_other_replies_is_refused(capsys, report, tmp_path, name):
    rows = [asked(number) for number in range(30)]
    facts = {"id": f"id of {report}", "exchanges": rows} | OTHERS[name]
    put(made(tmp_path / "other", **facts))
    assert command(capsys, ["report", tmp_path / "other"], main).status == 0
    file = read_blind(tmp_path / "other" / "replies.html", CHOICES, tmp_path / "x.json")
    refused(capsys, ["report", report, "--reading", file], "x.json", main=main)


def test_what_stands_twice_is_refused(capsys, report, tmp_path):
    file = read_blind(report / "replies.html", CHOICES, tmp_path / "own.json")
    words = ["report", report, "--reading", file]
    refused(capsys, [*words, file], "own.json", main=main)
    assert command(capsys, words, main).status == 0
    reading = json.loads(file.read_text())
    reading["choices"].append(reading["choices"][0] | {"choice": "alike"})
    file.write_text(json.dumps(reading))
    refused(capsys, words, "own.json", main=main)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"schema": 2}', '{"schema": 1, "sides": ["base"]}']
)
def test_a_file_that_is_no_reading_is_refused(capsys, report, tmp_path, content):
    (tmp_path / "odd.json").write_text(content)
    refused(capsys, ["report", report, "--reading", tmp_path / "odd.json"], "odd.json", main=main)


def test_compare_shows_which_of_two_adapters_was_preferred(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        rows = [
            asked(number, adapter=said(f"{name} {number}", {"is brief": True}))
            for number in range(30)
        ]
        put(made(tmp_path / "inspected" / name, exchanges=rows, gain=1 + (name == "a")))
    words = ["compare", "inspected"]
    assert command(capsys, words, main).status == 0
    sides = ("inspected/b", "inspected/a")
    page = tmp_path / "compared" / "replies.html"
    file = read_blind(page, CHOICES, tmp_path / "ann.json", sides)
    told = json.loads(command(capsys, [*words, "--json", "--reading", file], main).out)
    (reading,) = told["readings"]
    assert reading["sides"] == list(sides)
    assert [reading["preferences"][0][name] for name in ("first", "second")] == [6, 16]
    out = command(capsys, [*words, "--reading", file], main).out
    assert re.search(r"^readings .*inspected/b .*inspected/a ", out, re.MULTILINE)
    refused(capsys, ["report", "inspected/a", "--reading", file], "ann.json", main=main)
