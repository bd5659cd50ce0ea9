"""compare: ranks reports by held-out loss, with paired errors, and says what it leaves out."""

import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT
from tiny_adapters import command

from inspect_lora.common import pluralize
from inspect_lora.evidence_file import read_evidence

TOKENS = [10, 20, 30, 40]
BASE = [3.0, 3.1, 2.9, 3.0]


SAID = {"text": "Oh.", "tokens": 3, "ended": True}
REPLY = {"where": "eval.jsonl:1", "source": "held_out", "messages": [{"role": "user"}]}
REPLY |= {"max_new_tokens": 9, "base": SAID, "adapter": SAID}


@pytest.fixture
def put(tmp_path):
    """Return a function that writes a report below tmp_path, with these losses of the adapter.

    There are twenty-four lines, or others, and the numbers are repeated for them.
    """

    def write(where, losses=(2.0, 2.0, 2.0, 2.0), base=BASE, lines=range(1, 25), **changes):
        rows = zip(lines, *map(itertools.cycle, (TOKENS, base, losses)), strict=False)
        record = {
            "schema": 1,
            "finished": True,
            "measured": "2026-11-28 12:00:00",
            "adapter": f"output/{where}",
            "adapter_config": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
            "adapter_sha256": "def",
            "base": "someone/model",
            "base_revision": "main",
            "enable_thinking": False,
            "held_out": {"file": "eval.jsonl", "sha256": "abc", "group": "kind"},
            "run": None,
            "losses": [
                {"where": f"eval.jsonl:{line}", "tokens": n, "base": one, "adapter": other}
                for line, n, one, other in rows
            ],
            "elsewhere": None,
            "checks": {},
        }
        path = tmp_path / where / "evidence.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record | changes), encoding="utf-8")
        return path

    return write


@pytest.fixture
def compare(capsys, tmp_path):
    """Return a function that compares what lies below tmp_path, or in other folders."""
    return lambda *folders: command(capsys, "compare", *(folders or [tmp_path]))


def rows_of(end):
    """Return [(loss, difference, folder)] of the table."""
    assert end.status == 0, end.err
    row = r"(?m)^.{10}(\d+\.\d{4}) +(best|\S+ ± \S+(?: =)?) +(?:\d\S+(?: ± \S+)?|-) +\S*/(\S+)$"
    return re.findall(row, end.out)


def error_by_hand(changes, tokens):
    """Return the jackknife's error of a ratio of sums: how it changes without each example."""
    x = np.array(tokens)
    y = np.array(changes) * x
    without = (y.sum() - y) / (x.sum() - x)
    return math.sqrt((len(y) - 1) / len(y) * ((without - y.sum() / x.sum()) ** 2).sum())


def test_reports_are_ranked_with_the_paired_difference_to_the_best(put, compare):
    put("worse", [2.5, 2.4, 2.6, 2.5])
    put("best", [2.0, 2.1, 2.2, 2.3])
    assert "=" not in compare().out
    put("close", [2.1, 2.0, 2.3, 2.3])
    assert "          =: the difference is not shown" in compare().out
    (first, *_), second, third = rows = rows_of(compare())
    assert [row[2] for row in rows] == ["best", "close", "worse"]
    assert float(first) == pytest.approx(np.average([2.0, 2.1, 2.2, 2.3], weights=TOKENS), abs=1e-4)
    error = error_by_hand([0.5, 0.3, 0.4, 0.2] * 6, TOKENS * 6)
    assert third[1] == f"-0.3100 ± {error:.4f}" and second[1].endswith(" =")
    said = compare().said
    base = np.average(BASE, weights=TOKENS)
    assert f"{base:.4f} -" in said and "base model someone/model" in said


def test_the_replies_of_one_line_count_as_one(put, compare):
    put("best", lines=(1, 1, 2, 2))
    put("other", [2.2, 2.4, 2.1, 2.0], lines=(1, 1, 2, 2))
    error = error_by_hand([(10 * 0.2 + 20 * 0.4) / 30, 30 * 0.1 / 70], [30, 70])
    assert rows_of(compare())[1][1].startswith(f"-0.1300 ± {error:.4f}")


@pytest.mark.parametrize(("lines", "equal"), [(19, True), (20, False)])
def test_of_fewer_than_twenty_lines_no_difference_is_clear(put, compare, lines, equal):
    put("best", lines=range(lines))
    put("other", [2.5] * 4, lines=range(lines))
    end = compare()
    assert rows_of(end)[1][1].endswith("=") is equal
    assert (" = " in end.said.partition("output/other")[2]) is equal  # the base's row


def test_the_base_is_compared_with_the_best_of_several(put, compare):
    """Its difference is 2.5 times its error here: clear for one adapter, but not for two."""
    noise = [0.6, -0.3, 0.4, -0.3]  # which add up to 0 over the tokens
    base = [2 + 2.5 * error_by_hand(noise * 6, TOKENS * 6) + one for one in noise]
    put("best", base=base)
    assert "=" not in compare().out
    put("other", [2.5] * 4, base=base)
    assert re.search(r"(?m) = +base model", compare().out)


@pytest.mark.parametrize(
    ("adapters", "errors", "clear"),
    [(2, 2.0, False), (2, 2.2, True), (3, 2.9, False), (3, 3.1, True)],
)
def test_the_more_adapters_the_more_errors_are_clear(put, compare, adapters, errors, clear):
    """The twenty-four lines are twenty effective ones; of three adapters there are three pairs."""
    noise = [0.6, -0.3, 0.4, -0.3]  # which add up to 0 over the tokens
    error = error_by_hand(noise * 6, TOKENS * 6)
    put("best")
    put("other", [2 + errors * error + one for one in noise])
    if adapters == 3:
        put("third", [2.0001] * 4)
    (row,) = [row for row in rows_of(compare()) if row[2] == "other"]
    assert row[1].endswith("=") is not clear


def test_the_error_of_one_line_is_not_known(put, compare):
    put("best", lines=(1, 1, 1, 1))
    put("other", [2.2, 2.4, 2.1, 2.0], lines=(1, 1, 1, 1))
    assert rows_of(compare())[1][1] == "-0.1300 ± ? ="
    assert [pluralize(n, "held-out reply") for n in (1, 2)] == [
        "1 held-out reply",
        "2 held-out replies",
    ]


def test_what_differs_and_what_else_changed_stand_beside_a_report(put, compare):
    config = {"r": 8, "target_modules": ["v_proj", "q_proj"]}
    settings = {"LEARNING_RATE": 2e-4, "OUTPUT_DIR": "a", "LORA_R": 8}
    ours = {"settings": settings, "train_seconds": 90.0}
    put("ours", adapter_config=config, run=ours, checks={"rings": {"lines": 9, "after": 7}})
    other = {"settings": settings | {"LEARNING_RATE": 1e-3}, "train_seconds": 600}
    elsewhere = {"no system message": {"x 1": {"kl": {"value": 0.1234, "error": 0.01}}}}
    put("other", [2.5] * 4, adapter_config=config | {"r": 16}, run=other, elsewhere=elsewhere)
    put("foreign", [2.6] * 4)
    said = compare().said
    assert "adapter output/ours, r 8, LEARNING_RATE 0.0002, minutes 1.5, rings 7/9" in said
    assert "r 16, LEARNING_RATE 0.001, minutes 10.0" in said and "0.123 ± 0.010" in said
    assert "adapter output/foreign, r 8 " in said  # of its training nothing else is known
    assert "target_modules" not in said and "OUTPUT_DIR" not in said and "LORA_R" not in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"held_out": {"file": "b.jsonl", "sha256": "d"}}, "other held-out replies (b.jsonl)"),
        ({"lines": (1, 2, 3, 5)}, "than the newest report, though both are of eval.jsonl: its"),
        ({"base": [3.0, 3.1, 2.9, 3.0011]}, "has other losses than that of the newest report"),
        ({"finished": False}, "the command was stopped"),
        ({"schema": 3}, "damaged, edited, or of another version"),
        ({"losses": [2.0, 2.0, 2.0, float("nan")]}, "damaged, edited"),
        ({"losses": [2.0, 2.0, 2.0, "2.0 or so"]}, "damaged, edited"),
        ({"losses": [2.0, 2.0, 2.0, 1e308]}, "damaged, edited"),
        ({"schema": 2, "held_out": None}, "damaged, edited"),
        ({"schema": 1, "held_out": None}, "damaged, edited"),
        ({"schema": 2, "replies": [REPLY | {"max_new_tokens": None}]}, "damaged, edited"),
        ({"schema": 2, "replies": [REPLY | {"adapter": {"text": "a"}}]}, "damaged, edited"),
        ({"schema": 2, "replies": [REPLY | {"says": {"right": "says"}}]}, "damaged, edited"),
    ],
)
def test_what_is_left_out_is_said_with_its_reason(put, compare, change, said):
    put("newest", measured="2026-11-28 13:00:00")
    put("other", [2.1] * 4)
    put("odd", **change)
    end = compare()
    assert [row[2] for row in rows_of(end)] == ["newest", "other"]
    assert said in end.said and "odd" in end.said.partition("left out 1 report (")[2]


def test_one_array_named_from_two_folders_is_one_file(put, compare, tmp_path):
    """An entry of a JSON array is "FILE, entry 3", and the file is named as it was given."""
    for folder, name in (("a", "eval.json"), ("b", "/data/x:y/eval.json")):
        path = put(folder, held_out={"file": name, "sha256": "abc"})
        record = json.loads(path.read_text(encoding="utf-8"))
        for number, row in enumerate(record["losses"], 1):
            row["where"] = f"{name}, entry {number}"
        record["checked_replies"] = [
            {"where": f"{name}, entry 2", "base_passes": {"rings": True}, "adapter_passes": {}}
        ]
        path.write_text(json.dumps(record), encoding="utf-8")
    assert len(rows_of(compare())) == 2 and "left out" not in compare().said
    read = [read_evidence(tmp_path / folder / "evidence.json") for folder in "ab"]
    assert [one.replies[0].source for one in read] == ["held_out", "held_out"]


def test_conversations_are_compared_and_not_bytes(put, compare):
    """Checks that were added to the held-out file change no loss."""
    facts = {"file": "eval.jsonl", "conversations_sha256": "same"}
    for name, sha256 in (("before", "abc"), ("after", "def")):
        put(name, schema=2, held_out=facts | {"sha256": sha256}, elsewhere=None)
    assert len(rows_of(compare())) == 2
    put("other", schema=2, held_out=facts | {"sha256": "xyz", "conversations_sha256": "another"})
    put("old", held_out={"file": "eval.jsonl", "sha256": "uvw"})  # schema 1 has no such hash
    end = compare()
    assert len(rows_of(end)) == 2 and "2 reports (" in end.said.partition("left out")[2]


@pytest.mark.parametrize("edited", [[], "x", {"x 1": []}, {"x 1": "x"}, {"x 1": {"kl": [1]}}])
def test_an_edited_kl_is_not_shown(put, compare, edited):
    put("one", elsewhere={"no system message": edited})
    put("two", schema=2, replies=[REPLY])
    end = compare()
    assert len(rows_of(end)) == 2 and "left out" not in end.said


def test_what_was_measured_on_other_tasks_is_not_set_side_by_side(put, compare):
    def about(sha256, where):
        kl = {"no system message": {"x 1": {"kl": {"value": 0.25}}}}
        replies = [
            {"where": f"{where}:1", "base_passes": {"sums": True}},
            {"where": "eval.jsonl:2", "base_passes": {"rings": True}},
        ]
        return {
            "general_file": sha256 and {"file": where, "sha256": sha256},
            "elsewhere": kl,
            "checks": {name: {"lines": 9, "after": 7} for name in ("sums", "rings")},
            "checked_replies": replies,
        }

    # The held-out file is named as it was given, and a line as it is seen from there.
    held_out = {"held_out": {"file": "there/../eval.jsonl", "sha256": "abc"}}
    put("newest", measured="2026-11-28 13:00:00", **about("a", "general.jsonl"))
    put("same", [2.1] * 4, **about("a", "elsewhere/general.jsonl"))
    put("other", [2.2] * 4, **about("b", "mine.jsonl"), **held_out)
    put("old", [2.3] * 4, **about(None, "general.jsonl"))
    put("none", [2.4] * 4)
    end = compare()
    assert len(rows_of(end)) == 5 and end.said.count("0.250") == 2
    assert end.said.count("sums 7/9") == 2 and end.said.count("rings 7/9") == 4
    assert "KL and the tasks' checks of 2 reports (" in end.said and "--general_file" in end.said


def test_kl_of_another_number_of_tasks_is_not_set_side_by_side(put, compare):
    def about(tasks):
        kl = {"tasks": tasks, "no system message": {"x 1": {"kl": {"value": 0.25}}}}
        return {"elsewhere": kl, "checks": {"rings": {"lines": 9, "after": 7}}}

    put("newest", measured="2026-11-28 13:00:00", **about(50))
    put("fewer", [2.1] * 4, **about(10))
    put("none", [2.2] * 4)
    end = compare()
    assert end.said.count("0.250") == 1 and end.said.count("rings 7/9") == 2
    assert "left out KL of 1 report (" in end.said and "other tasks of that file" in end.said


@pytest.mark.parametrize(
    ("newest", "other", "are_shown"),
    [
        (
            ["general.jsonl:1", "general.jsonl:3"],
            ["there/general.jsonl:1", "there/general.jsonl:3"],
            2,
        ),
        (["general.jsonl:1", "general.jsonl:3"], ["general.jsonl:1", "general.jsonl:2"], 1),
        (["general.jsonl:1", "general.jsonl:3"], None, 1),
        (None, ["general.jsonl:1", "general.jsonl:3"], 1),
        (None, None, 2),
        ([], None, 1),
        ("edited", ["general.jsonl:1"], 1),
    ],
)
def test_kl_of_other_tasks_of_one_file_is_not_set_side_by_side(
    put, compare, newest, other, are_shown
):
    """A former version chose other ones, and did not say which."""

    def about(measured_on):
        kl = {"tasks": 2, "no system message": {"x 1": {"kl": {"value": 0.25}}}}
        return {"elsewhere": kl if measured_on is None else kl | {"measured_on": measured_on}}

    put("newest", measured="2026-11-28 13:00:00", **about(newest))
    put("other", [2.1] * 4, **about(other))
    end = compare()
    assert len(rows_of(end)) == 2 and end.said.count("0.250") == are_shown
    assert ("other tasks of that file" in end.said) is (are_shown == 1)


RULE = {"kind": "word", "answers": ["999"]}
CHECKED = REPLY | {"messages": [{"role": "user", "content": "help"}]}
CHECKED |= {"rules": {"rings": RULE}, "says": {"rings": "says"}}
CHECKED |= {who: SAID | {"checks": {"rings": True}} for who in ("base", "adapter")}


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({}, True),
        ({"where": "/elsewhere/eval.jsonl:1"}, True),
        ({"rules": {"rings": RULE | {"answers": ["112"]}}}, False),
        ({"where": "eval.jsonl:2"}, False),
        ({"messages": [{"role": "user", "content": "hello"}]}, False),
        ({"max_new_tokens": 10}, False),
        ({"source": "tasks"}, False),
    ],
)
def test_a_check_stands_beside_another_only_if_rules_and_lines_are_the_same(
    put, compare, change, is_same
):
    rows = {name: {"lines": 1, "after": 1} for name in ("rings", "calm")}
    put("old", schema=2, checks=rows, replies=[CHECKED | change])
    put("newest", schema=2, measured="2026-11-28 13:00:00", checks=rows, replies=[CHECKED])
    put("none", [2.1] * 4)
    end = compare()
    assert len(rows_of(end)) == 3 and end.said.count("calm 1/1") == 2
    assert end.said.count("rings 1/1") == (2 if is_same else 1)
    said = 'left out the check "rings" of 1 report ('
    assert (said in end.said and "asked by other rules, or on other lines" in end.said) != is_same


def test_several_such_checks_are_named_in_one_line(put, compare):
    for name, lines in (("old", 9), ("newest", 40)):
        checks = {check: {"lines": lines, "after": 7} for check in ("rings", "calm")}
        put(name, checks=checks, measured=f"20{lines:02}-11-28 13:00:00")
    assert compare().said.count('left out the checks "rings", "calm" of 1 report (') == 1


def test_a_check_on_another_number_of_lines_is_left_out(put, compare):
    """Also where no replies are recorded."""
    put("old", checks={"rings": {"lines": 9, "after": 7}})
    checks = {"rings": {"lines": 40, "after": 30}}
    put("newest", [2.1] * 4, measured="2026-11-28 13:00:00", checks=checks)
    end = compare()
    assert "rings 30/40" in end.said and "rings 7/9" not in end.said
    assert 'the check "rings" of 1 report (' in end.said


def test_reports_of_old_that_do_not_name_their_tasks_are_compared(put, compare):
    elsewhere = {"no system message": {"x 1": {"kl": {"value": 0.25}}}}
    put("one", elsewhere=elsewhere)
    put("other", [2.1] * 4, elsewhere=elsewhere)
    end = compare()
    assert end.said.count("0.250") == 2 and "left out" not in end.said


def test_the_newest_report_says_which_lines_and_which_base_count(put, compare):
    put("old", measured="2026-11-27 12:00:00")
    put("new", measured="2026-11-28 12:00:00", base=[2.0, 2.0, 2.0, 2.0])
    end = compare()
    assert [row[2] for row in rows_of(end)] == ["new"] and "by up to 1.1000 on a reply" in end.said


def test_base_losses_may_differ_by_a_thousandth(put, compare):
    put("one")
    put("other", base=[3.0009, 3.1, 2.9, 3.0])
    assert len(rows_of(compare())) == 2


def test_files_that_are_no_reports_are_told_and_renamed_ones_passed_over(put, compare):
    path = put("one")
    path.rename(path.with_name("evidence.json.2026-11-27-120000"))
    put("two").write_text("{", encoding="utf-8")
    end = compare()
    assert end.status == 1 and "nothing to compare" in end.err and "evidence ADAPTER" in end.err
    assert "1 report" in end.err and "damaged" in end.err and "2026-11-27" not in end.err


def test_a_folder_counts_once_and_must_be_there(put, compare, tmp_path):
    put("one")
    assert len(rows_of(compare(tmp_path, tmp_path / "one"))) == 1
    assert "There is no folder nowhere" in compare("nowhere").err


def test_records_of_both_schemas_are_read(compare, tmp_path):
    """The same adapter was measured on the same lines, by the version before and by this one."""
    for schema in (1, 2):
        (tmp_path / f"schema-{schema}").mkdir()
        record = ROOT / "tests" / f"evidence_schema_{schema}.json"
        shutil.copyfile(record, tmp_path / f"schema-{schema}" / "evidence.json")
    end = compare()
    assert len(rows_of(end)) == 2 and "left out" not in end.said
    assert end.said.count("rings 0/1, does not ring 2/2, right 0/1") == 2
    one, two = (
        read_evidence(tmp_path / f"schema-{schema}" / "evidence.json").replies for schema in (1, 2)
    )
    assert [(reply.where, reply.source) for reply in one] == [
        ("eval.jsonl:1", "held_out"), ("eval.jsonl:2", "held_out"), ("eval.jsonl:3", "held_out"),
        ("tasks.jsonl:1", "tasks"),
    ]  # fmt: skip
    for old, new in zip(one, two, strict=False):
        assert (old.where, old.source) == (new.where, new.source)
        for was, now in ((old.base, new.base), (old.adapter, new.adapter)):
            assert was.ended is None and was.checks == now.checks and was.text == now.text
    samples = two[len(one) :]
    assert [one.max_new_tokens for one in samples] == [5, 5] and samples[0].rules == {}
    assert two[1].rules == {"does not ring": {"kind": "word", "not": ["999"]}}
    assert two[1].says == {"does not ring": 'does not say "999"'}
    assert two[1].reference == "Ring 999 now." and two[1].group == "emergency"


@pytest.mark.parametrize("learned", ["none", "not compared", "not known"])
def test_an_adapter_that_may_have_learned_the_lines_is_named(
    put, compare, learned, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    held_out = {"file": "eval.jsonl", "sha256": "abc", "group": "kind"}
    put("clean", held_out=held_out | {"learned": "none"})
    put("other", held_out=held_out | {"learned": learned})
    said = compare(".").said
    is_told = "(other): it is not known whether the adapter learned some" in said
    assert is_told == (learned == "not known") and "(clean)" not in said
