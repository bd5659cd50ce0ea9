"""`report`: what a record becomes on the terminal, in report.md, in the picture and the page."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT
from made_records import (
    KINDS,
    SYSTEM,
    asked,
    jackknife,
    lines_of,
    made,
    pair_of,
    put,
    said,
    tables_of,
)
from runs import command, refused

from inspect_lora import picture, report, statistics
from inspect_lora import record as records
from inspect_lora.__main__ import main
from inspect_lora.record import Part

HEAVY = "torch transformers peft trl scipy safetensors train_lora_single datasets accelerate"
# A program that reports and compares where nothing of a model can be imported.
ALONE = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY.split()}))
from inspect_lora.__main__ import main
main(["report", "report"])
main(["compare", "."])
"""
STAGES = ("updates", "lines", "parts", "shifts", "exchanges")
HEADINGS = ("Updates", "Held-out replies", "Parts", "Strength, and other tasks", "Checks")
NOTHING = {"lines": [], "pairs": [], "parts": [], "part_lines": [], "shifts": [], "exchanges": []}
BEST = {"settings": {"FINAL_LORA": "best"}, "data": {"held_out": {"sha256": "12ab"}}}


def reported(capsys, stored):
    put(stored)
    end = command(capsys, ["report", stored.folder], main)
    assert end.status == 0 and "replies.html" in end.err
    return tables_of(read(stored))


def read(stored, name="report.md"):
    return (stored.folder / name).read_text(encoding="utf-8")


def facts_of(stored):
    """Return what the first lines tell, by their names."""
    told = report.findings(stored)
    assert len(told) <= 4 and all(finding.text for finding in told)
    return {finding.name: finding.facts for finding in told}


def pairs_with(right, count):
    """Return pairs of which so many are right by sum and moved; the base had none right."""
    good, bad = (-20.0, -30.0), (-30.0, -20.0)
    return [pair_of(number, bad, good if number < right else bad) for number in range(count)]


def test_a_report_needs_no_model_and_comes_out_the_same_again(capsys, tmp_path, real_picture):
    stored = put(made(tmp_path / "report"))
    put(made(tmp_path / "other"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", ALONE]
    subprocess.run(program, check=True, timeout=120, cwd=tmp_path, env=environment)
    whole = {path.name: path.read_bytes() for path in stored.folder.iterdir()}
    assert len(whole) == 4 and (tmp_path / "compared").is_dir()
    assert whole["picture.png"].startswith(b"\x89PNG")
    reported(capsys, stored)
    assert whole == {path.name: path.read_bytes() for path in stored.folder.iterdir()}


# ---- The first lines


@pytest.mark.parametrize(
    ("gain", "count", "is_clear"),
    [(1.0, 60, True), (0.0, 60, False), (-1.0, 60, True), (1.0, 19, False), (1.0, 1, False)],
)
def test_the_first_line_is_the_gain_and_whether_it_is_clear(tmp_path, gain, count, is_clear):
    stored = made(tmp_path, count, gain)
    facts = facts_of(stored)
    assert facts["gain"]["is_clear"] is is_clear and facts["gain"]["replies"] == count
    value, low, high = (getattr(facts["gain"]["gain"], name) for name in ("value", "low", "high"))
    losses = [(line.base, line.adapter, line.tokens) for line in stored.lines]
    base, adapter, tokens = (sum(column) for column in zip(*losses, strict=True))
    assert value == pytest.approx((base - adapter) / tokens)
    assert facts["gain"]["lower_on"] == sum(adapter < base for base, adapter, _ in losses)
    assert count == 1 or (low < 0 < high) is (gain == 0)
    assert ("few" in facts.get("trust", {})) is (count < 20)
    text = report.findings(stored)[0].text
    assert f"{value:.2f}".lstrip("-") in text and ("80 %" in text) is (not is_clear and count > 1)


def test_the_line_on_replies_begins_with_clear_losses_and_the_least_passed(tmp_path):
    """Of five checks, one is lost on ten lines; three are told, and the pairs."""
    rows = []
    for number in range(40):
        passes = {"all pass": True, "half": number < 20, "most": number < 30, "few": number < 2}
        after = passes | {"lost": number >= 10}
        rules = {name: {"most_words": 9} for name in after}
        replies = said("a", passes | {"lost": True}), said("b", after)
        rows.append(asked(number, checks=rules, base=replies[0], adapter=replies[1]))
    stored = made(tmp_path, exchanges=rows, pairs=pairs_with(25, 40))
    facts = facts_of(stored)["replies"]
    assert list(facts["checks"]) == ["lost", "few", "half"]
    change = facts["checks"]["lost"]
    assert (change.count, change.before, change.after, change.lost) == (40, 40, 30, 10)
    row = facts["pairs"]
    assert (row.pairs, row.corrected, row.by_sum.before, row.by_sum.after) == (40, 25, 0, 25)


def test_what_both_always_pass_is_told_last(capsys, tmp_path):
    """Checks: least passed first, then other tasks, then what nothing can be told of."""
    rows = []
    for number in range(40):
        before = {"always": True, "never": False, "mostly": True, "brief": number < 30}
        after = before | {"mostly": number < 39, "brief": number < 20}
        rules = {name: {"most_words": 9} for name in before}
        replies = {"base": said("a", before), "adapter": said("b", after)}
        rows.append(asked(number, checks=rules, **replies))
        rows.append(asked(number, source="tasks", name="right", after=number < 39))
    stored = made(tmp_path, exchanges=rows)
    assert list(facts_of(stored)["replies"]["checks"]) == ["brief", "never", "mostly"]
    titles = [row[0] for row in reported(capsys, stored)["Checks"][1:]]
    assert titles == ["never", "brief", "mostly", "tasks: right", "always"]
    only_full = made(tmp_path, exchanges=[asked(number) for number in range(40)])
    assert facts_of(only_full)["replies"]["checks"] == {}


@pytest.mark.parametrize(("before", "can_fall"), [(5, False), (12, True)])
def test_the_line_on_other_tasks_has_their_answers_and_the_divergence(tmp_path, before, can_fall):
    rows = [
        asked(n, source="tasks", name="right", before=n < before, after=n < 3) for n in range(24)
    ]
    stored = made(tmp_path, exchanges=rows)
    facts = facts_of(stored)["elsewhere"]
    change = facts["tasks: right"]
    assert (change.before, change.after, change.count) == (before, 3, 24)
    assert change.can_show_a_fall is can_fall
    shift = next(s for s in stored.shifts if s.strength == 1 and not s.system)
    assert facts["kl"].value == pytest.approx(sum(shift.kl) / sum(shift.tokens))
    assert facts["changed"] == sum(shift.changed_tokens) / sum(shift.tokens)
    assert list(facts_of(made(tmp_path, **NOTHING))) == ["trust"]


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, set()),
        ({"learned": None}, {"learned"}),
        ({"run": BEST}, {"best"}),
        ({"run": BEST | {"data": {"held_out": {"sha256": "of another file"}}}}, set()),
        ({"run": BEST | {"data": {"held_out": None}}}, set()),
        ({"pairs": pairs_with(2, 19)}, {"few"}),
        ({"pairs": pairs_with(2, 20)}, set()),
        ({"lines": lines_of(19)}, {"few"}),
        ({"finished": False}, {"stopped"}),
        ({"lines": [], "parts": [], "part_lines": []}, {"prompts"}),
        ({"exchanges": [asked(1, adapter=said("a", {"is brief": True}, ended=False))]}, {"cut"}),
    ],
)
def test_the_last_line_says_what_lowers_trust(tmp_path, changes, reasons):
    ended = [asked(n, base=said("whole", {"is brief": True})) for n in range(20)]
    parts = {"parts": [], "part_lines": []} if "lines" in changes else {}
    stored = made(tmp_path, **{"exchanges": ended} | parts | changes)
    assert set(facts_of(stored).get("trust", {})) == reasons


def test_the_first_lines_of_a_real_record(capsys, record, tmp_path):
    """The record is of a toy that was trained and measured; numbers are counted from its file."""
    stored = records.read_record(record)
    content = json.loads((record / "evidence.json").read_text())
    facts, lines = facts_of(stored), content["lines"]
    tokens = sum(line["tokens"] for line in lines)
    gain = sum(line["base"] - line["adapter"] for line in lines) / tokens
    assert facts["gain"]["gain"].value == pytest.approx(gain)
    for name, change in facts["replies"]["checks"].items():
        asked_for = [each for each in content["exchanges"] if each["source"] != "tasks"]
        passes = [each["adapter"]["passes"].get(name) for each in asked_for]
        assert change.after == passes.count(True)
        assert change.count == passes.count(True) + passes.count(False)
    stored.folder = tmp_path
    reported(capsys, stored)
    first = [line for line in read(stored).splitlines() if line.startswith("- ")][: len(facts)]
    assert [report.escaped(finding.text) for finding in report.findings(stored)] == [
        line[2:] for line in first
    ]


# ---- Tables


def test_losses_of_all_replies_and_of_each_kind(capsys, tmp_path):
    stored = made(tmp_path, trained_kinds={"emergency": 9, "all": 1})
    for line in stored.lines:
        line.adapter += line.tokens * KINDS.index(line.kind)
    _, *rows = reported(capsys, stored)["Held-out replies"]
    gains = {}
    for name, *cells in rows:
        kind = name.partition(" (not")[0]
        lines = [line for line in stored.lines if kind in ("(all)", line.kind)]
        tokens = sum(line.tokens for line in lines)
        base = sum(line.base for line in lines) / tokens
        adapter = sum(line.adapter for line in lines) / tokens
        gains[name] = base - adapter
        assert cells[:3] == [str(len(lines)), f"{base:.2f}", f"{adapter:.2f}"]
        assert float(cells[3].split()[0]) == pytest.approx(base - adapter, abs=0.006)
        assert cells[4] == str(sum(line.adapter < line.base for line in lines))
    assert list(gains) == ["(all)", "all", "emergency", "everyday (not trained)"]
    assert [*gains.values()][1:] == sorted([*gains.values()][1:], reverse=True)


def ends_of(cell):
    """Return a number and the ends of its interval, of a cell such as +0.80 (0.75 to 0.86)."""
    return [float(text) for text in re.findall(r"[+-]?\d+\.?\d*", cell)[:3]]


def test_strengths_parts_and_updates(capsys, tmp_path):
    stored = made(tmp_path, 120)
    for number, line in enumerate(stored.lines):
        line.cluster = f"conversation {number // 4}"
    tables = reported(capsys, stored)
    lines = [stored.lines[number] for number in stored.part_lines]
    tokens, clusters = [line.tokens for line in lines], [line.cluster for line in lines]
    head, *rows = tables[HEADINGS[3]]
    shown = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(shown) == ["x 0.5", "x 0.75", "as trained", "x 1.5", "system message"]
    _, *part_rows = tables["Parts"]
    of_parts = {row[0]: row for row in part_rows}
    whole = sum(line.base - line.adapter for line in lines) / sum(tokens)
    for part in stored.parts:
        pairs = list(zip(lines, part.losses, strict=True))
        cost = jackknife([loss - line.adapter for line, loss in pairs], tokens, clusters)
        gain = jackknife([line.base - loss for line, loss in pairs], tokens, clusters)
        if part.family == "strength":
            row = shown[part.name]
            assert ends_of(row["cost, 95 %"]) == pytest.approx(cost, abs=0.006)
            assert ends_of(row["gain, 95 %"]) == pytest.approx(gain, abs=0.006)
            continue
        place = 3 if part.family == "alone" else 1
        row = of_parts[f"cut to {part.name}" if part.family == "cut" else part.name]
        expected = gain if part.family == "alone" else cost
        assert ends_of(row[place]) == pytest.approx(expected, abs=0.006)
        assert row[place + 1] == f"{100 * expected[0] / whole:.0f} %"
    costs = [ends_of(row[1])[0] for row in part_rows]
    cuts = [row[0].startswith("cut") for row in part_rows]
    assert cuts == sorted(cuts) and costs[: cuts.index(True)] == sorted(
        costs[: cuts.index(True)], reverse=True
    )
    trained = next(s for s in stored.shifts if s.strength == 1 and not s.system)
    for shift in stored.shifts:
        names = {1.0: "system message" if shift.system else "as trained"}
        row = shown[names.get(shift.strength, f"x {shift.strength:g}")]
        kl = jackknife(shift.kl, shift.tokens, range(30))
        assert ends_of(row["KL, 95 %"]) == pytest.approx(kl, abs=0.006)
        changes = [a - b for a, b in zip(shift.kl, trained.kl, strict=True)]
        if shift.strength != 1:  # the difference is paired
            change = jackknife(changes, shift.tokens, range(30))
            assert ends_of(row["change of KL, 95 %"]) == pytest.approx(change, abs=0.006)
        changed = sum(shift.changed_tokens) / sum(shift.tokens)
        assert row["other token"] == f"{100 * changed:.0f} %"
    headings = [line for line in read(stored).splitlines() if line.startswith("## ")]
    order = ["Held-out replies", "Replies", "Strength, and other tasks", "Parts", "Updates"]
    assert [line[3:] for line in headings if line[3:] in order] == order
    updates = [row[2:] for row in tables["Updates"][1:]]
    assert updates == [["2.5 %", "3.0 %"], ["3.0 %", "5.0 %"]]


def test_all_cells_of_a_row_have_as_many_decimals(capsys, tmp_path):
    """What "k_proj" costs ends closer to 0 than two decimals show."""
    stored = made(tmp_path)
    lines = statistics.lines_of_parts(stored)
    costs = [line.tokens * (0.004 if number % 2 else -0.002) for number, line in enumerate(lines)]
    losses = [line.adapter + cost for line, cost in zip(lines, costs, strict=True)]
    alone = [line.base - 0.1 * line.tokens * (number % 3) for number, line in enumerate(lines)]
    stored.parts += [Part("removed", "k_proj", losses), Part("alone", "k_proj", alone)]
    decimals = {}
    for row in reported(capsys, stored)["Parts"][1:]:
        decimals[row[0]] = {len(places) for places in re.findall(r"\d\.(\d+)", " ".join(row))}
    assert decimals["k_proj"] in ({3}, {4})
    assert all(len(places) == 1 for places in decimals.values()) and decimals["attention"] == {2}


@pytest.mark.parametrize(("gain", "has"), [(1.0, True), (0.25, False), (0.0, False), (-1.0, False)])
def test_per_cents_of_a_gain_that_is_sure(capsys, tmp_path, gain, has):
    """Its lower end is above half of it; at 0.25 it is clear, and no more than that."""
    stored = made(tmp_path, 60, gain)
    whole = statistics.gain(statistics.lines_of_parts(stored))
    assert gain != 0.25 or 0 < whole.low < whole.value / 2
    head, *rows = reported(capsys, stored)["Parts"]
    assert ("of gain" in head) is has and len(rows) == 4
    assert any("%" in cell for row in rows for cell in row) is has


@pytest.mark.parametrize(("count", "lost", "won"), [(40, 9, 0), (40, 5, 3), (24, 4, 2), (57, 1, 0)])
def test_a_check_has_counts_and_the_interval_of_its_change(capsys, tmp_path, count, lost, won):
    """The first lines are lost, the last are won, and both pass those between."""
    rows = [asked(n, before=n < count - won, after=n >= lost) for n in range(count)]
    stored = made(tmp_path, exchanges=rows)
    head, row = reported(capsys, stored)["Checks"]
    cells = dict(zip(head, row, strict=True))
    assert [cells[name] for name in ("lines", "base", "adapter", "lost", "won")] == [
        str(number) for number in (count, count - won, count - lost, lost, won)
    ]
    change = statistics.paired_change(lost, won, count)
    expected = [100 * end for end in (change.value, change.low, change.high)]
    assert ends_of(cells["change, 95 %"]) == pytest.approx(expected, abs=0.51)
    power = scipy.stats.binom.sf(3, count, float(cells["seen from"]) / 100)
    assert power == pytest.approx(0.8, abs=0.04)


def test_checks_count_a_cluster_once(tmp_path):
    """Two lines of each conversation, by the losses' lines: half as many are independent."""
    rows = [asked(n, before=True, after=n >= 10) for n in range(40)]
    lines = lines_of(40)
    for number, line in enumerate(lines):
        line.where, line.cluster = rows[number].where, f"person {number // 2}"
    alone, joined = (
        statistics.checks(made(tmp_path, exchanges=rows, **facts))["is brief"]
        for facts in ({}, {"lines": lines})
    )
    assert (alone.lost, joined.lost) == (10, 10)
    assert joined.change == statistics.paired_change(5, 0, 20)  # those of a person turn together
    assert alone.change == statistics.paired_change(10, 0, 40)


def test_kinds_of_pairs_that_change_in_opposite_ways_are_told_first(tmp_path):
    """In the sum of all pairs they hide each other."""
    right, wrong = (-20.0, -30.0), (-30.0, -20.0)
    changes = [(wrong, right)] * 20 + [(right, wrong)] * 20 + [(wrong, wrong)] * 20
    kinds = ["emergency", "false_alarm", "pressure"]
    pairs = [pair_of(number, *change) for number, change in enumerate(changes)]
    pairs = [replace(pair, kind=kinds[number // 20]) for number, pair in enumerate(pairs)]
    told = facts_of(made(tmp_path, pairs=pairs))["replies"]["changed kinds"]
    counts = {kind: (change.lost, change.won) for kind, change in told.items()}
    assert counts == {"emergency": (0, 20), "false_alarm": (20, 0)}


def test_pairs_have_a_table_by_kind_and_by_the_longer_reply(capsys, tmp_path):
    pairs = [
        pair_of(n, (-30, -25), (-20 - n % 3, -21), (9 + (n % 4 > 0), 10), KINDS[n % 3])
        for n in range(60)
    ]
    head, *rows = reported(capsys, made(tmp_path, pairs=pairs))["Pairs"]
    shown = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    groups = {"(all)": pairs} | {kind: [p for p in pairs if p.kind == kind] for kind in KINDS}
    groups["bad reply longer"] = [pair for pair in pairs if pair.good_tokens < pair.bad_tokens]
    groups["of one length"] = [pair for pair in pairs if pair.good_tokens == pair.bad_tokens]
    assert list(shown) == list(groups)
    for name, group in groups.items():
        right = sum(pair.adapter_good > pair.adapter_bad for pair in group)
        cells = shown[name]
        assert [cells[key] for key in ("pairs", "base", "adapter", "lost", "won")] == [
            str(number) for number in (len(group), 0, right, 0, right)
        ]
        if len(group) < 20:
            assert "%" not in cells["moved, 95 %"] and "(" not in cells["change, 95 %"]
            continue
        gained = [p.adapter_good - p.adapter_bad - p.base_good + p.base_bad for p in group]
        moved = sum(margin > 0 for margin in gained)
        wilson = scipy.stats.binomtest(moved, len(group)).proportion_ci(method="wilson")
        expected = [100 * end for end in (moved / len(group), wilson.low, wilson.high)]
        assert ends_of(cells["moved, 95 %"]) == pytest.approx(expected, abs=0.51)


@pytest.mark.parametrize("is_empty", [False, True])
def test_replies_that_ended_and_empty_ones_are_counted(capsys, tmp_path, is_empty):
    """There is no column of empty replies if none is empty."""
    rows = [
        asked(1, base=said(" \n" if is_empty else "a"), adapter=said("one two"), checks={}),
        asked(2, base=said("a b c d", ended=False), adapter=said("a"), checks={}),
        asked(3, base=said("one two"), adapter=said("one two"), checks={}),
        asked(4, base=said("one"), adapter=said("one"), checks={}, source="tasks"),
    ]
    head, *rows = reported(capsys, made(tmp_path, exchanges=rows))["Replies"]
    held_out, tasks = (dict(zip(head, row, strict=True)) for row in rows)
    counts = {"prompts": "3", "base ended": "2", "base same": "1", "adapter ended": "3"}
    counts |= {"adapter same": "2", "adapter words": "2"}
    counts |= {"base empty": "1"} if is_empty else {}
    assert {name: held_out[name] for name in counts} == counts
    assert ("base empty" in head) is is_empty and "adapter empty" not in head
    assert held_out["base words"] != "2" and "2" in held_out["base words"]  # a lower bound
    assert set(tasks.values()) <= {"tasks", "1", ""}


def test_nothing_that_was_not_measured_is_told(capsys, tmp_path):
    """Of one line there is no interval, and a rule's phrases stand on the page alone."""
    rule = {"any": ["999", "112"], "none": ["wait|see"], "most_questions": 1}
    stored = made(tmp_path, 1, exchanges=[asked(n, rule=rule, name="rings") for n in range(3)])
    (row,) = reported(capsys, stored)["Held-out replies"][1:]
    assert "?" in row[4] and math.isnan(0 * statistics.gain(stored.lines).high)
    text, page = read(stored), read(stored, "replies.html")
    assert "112" in page and "112" not in text and SYSTEM in text
    assert all(word in text for word in ("someone/model", "abc", "12ab", "float32", "rings"))


@pytest.mark.parametrize("learned", [None, 0, 7])
def test_what_the_adapter_learned_is_counted_or_not_known(capsys, tmp_path, learned):
    """Nothing says 0 where it is not known."""
    stored = put(made(tmp_path, learned=learned, too_long=5, refused=3))
    reported(capsys, stored)
    (line,) = [line for line in read(stored).splitlines() if "left out" in line]
    assert re.findall(r"\d+", line) == ([] if learned is None else [str(learned)]) + ["5", "3"]


@pytest.mark.parametrize("missing", [*(STAGES[n:] for n in range(6)), ("lines", "parts")])
def test_a_report_holds_what_was_measured(capsys, tmp_path, missing):
    """A measurement was stopped somewhere, or there were prompts without replies."""
    empty = {name: {} if name == "updates" else [] for name in missing}
    empty |= {"part_lines": []} if "parts" in missing else {}
    measured = [name for name in STAGES if name not in missing]
    stored = made(tmp_path, **empty, finished=False, seconds=dict.fromkeys(measured, 1.0))
    expected = {HEADINGS[STAGES.index(name)] for name in measured}
    expected |= {HEADINGS[3]} if "parts" in measured else set()
    tables = reported(capsys, stored)
    assert set(tables) & set(HEADINGS) == expected
    columns = list(zip(*tables.get(HEADINGS[3], []), strict=True))
    assert all(any(column[1:]) for column in columns)
    assert (tmp_path / "picture.png").exists() is bool({"lines", "exchanges"} & set(measured))
    assert all(name in read(stored) for name in measured)


# ---- The terminal, the replies, the estimates


@pytest.mark.parametrize("is_large", [False, True])
def test_the_terminal_gets_at_most_40_lines_of_100_columns(capsys, tmp_path, is_large):
    changes = {"learned": None, "run": BEST, "finished": False}
    if is_large:
        names = [f"a check with a rather long name, {number}" for number in range(12)]
        passes = dict.fromkeys(names, True)
        replies = {"base": said("a", passes), "adapter": said("b", passes, ended=False)}
        rules = {name: {"most_words": 9} for name in names}
        rows = [asked(n, checks=rules, **replies) for n in range(30)]
        rows += [asked(n, source="tasks", name="right") for n in range(30)]
        pairs = [
            pair_of(n, (-9, -8), (-7, -8), (5, 5 + n % 3 - 1), f"kind {n % 9}") for n in range(60)
        ]
        changes |= {"exchanges": rows, "pairs": pairs}
    stored = put(made(tmp_path, **changes))
    if is_large:
        for number, line in enumerate(stored.lines):
            line.kind = f"a kind with a rather long name, {number % 20}"
        put(stored)
    printed = command(capsys, ["report", tmp_path], main).out.splitlines()
    assert len(printed) <= 40 and max(map(len, printed)) <= 100
    sections = {line.split()[0] for line in printed if not line.startswith(" ")}
    expected = {"found", "gain", "checks", "strength", "parts"}
    assert sections == expected | ({"prefers"} if is_large else set())


def test_at_most_eight_replies_three_of_a_kind_good_and_bad_ones(capsys, tmp_path):
    """One kind of twelve fails often; another one has a failure late, and the third has none."""
    rows = []
    for number in range(36):
        kind, place = KINDS[number % 3], number // 3
        fails = (kind == "emergency" and place % 2 == 0) or (kind == "all" and place == 9)
        rows.append(asked(number, after=not fails))
    shown = report.shown_exchanges(made(tmp_path, exchanges=rows))
    assert len(shown) == 8 and len({exchange.where for exchange in shown}) == 8
    for kind in KINDS:
        results = [
            exchange.adapter.passes["is brief"] for exchange in shown if exchange.kind == kind
        ]
        assert 2 <= len(results) <= 3 and True in results
        assert (False in results) is (kind != "everyday")
    stored = made(tmp_path, exchanges=rows[:2])
    assert len(report.shown_exchanges(stored)) == 2


def test_estimates_are_plain_and_finite(tmp_path):
    stored = made(tmp_path, pairs=pairs_with(25, 40))
    told = json.loads(json.dumps(report.estimates(stored), allow_nan=False))
    assert told["gain"][0]["gain"]["value"] == statistics.gain(stored.lines).value
    assert told["prefers"]["(all)"]["corrected"] == 25
    assert [finding["name"] for finding in told["findings"]] == [
        finding.name for finding in report.findings(stored)
    ]
    assert {row["name"] for row in told["parts"]} >= {"attention", "cut to 4 of 8"}
    alone = json.loads(json.dumps(report.estimates(made(tmp_path, 1)), allow_nan=False))
    assert alone["gain"][0]["gain"]["low"] is None
    json.dumps(report.estimates(made(tmp_path, **NOTHING)), allow_nan=False)


def test_what_models_say_is_text_in_the_report(capsys, tmp_path, real_picture):
    nasty = "| <script>x</script> `a` **b** [c](d)\n# e\n| --- | &lt; $\\f$ ~~g~~ \\"
    replies = {"base": said(nasty, {nasty: True}), "adapter": said("fine", {nasty: False})}
    exchange = asked(1, **replies, reference=nasty, rejected=nasty, checks={nasty: {}}, kind=nasty)
    exchange.messages[1]["content"] = nasty
    stored = made(tmp_path, exchanges=[exchange], adapter=nasty, system=nasty)
    reported(capsys, stored)
    assert not re.search(r"(?<!\\)<(?!br>)|\n# e|(?<!\\)[`]+[ab]|\*\*b|(?<!\\)\[c", read(stored))
    assert read(stored).count("<br>") >= 3


def test_the_picture_shows_what_the_tables_have(capsys, tmp_path, monkeypatch, real_picture):
    figures = []

    def save(figure, path):
        figures.append(figure)
        path.write_bytes(b"")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    rows = [asked(n, after=n % 3 > 0) for n in range(30)]
    stored = made(tmp_path, pairs=pairs_with(25, 40), exchanges=rows, trained_kinds={"all": 1})
    reported(capsys, stored)
    changes, gains, strengths, costs = figures[0].axes

    def points(axes):
        lines = [line for line in axes.lines if line.get_marker() in ("o", "D")]
        points = [(line.get_xdata(), line.get_ydata()) for line in lines]
        return [(float(xs[0]), float(ys[0])) for xs, ys in points if len(xs) == 1]

    kinds = statistics.gains(stored)
    assert [x for x, _ in points(gains)] == [row.gain.value for row in kinds]
    hollow = [
        line.get_markerfacecolor() == "white" for line in gains.lines if line.get_marker() in "oD"
    ]
    assert hollow == [row.is_trained is False for row in kinds]
    effects = statistics.part_effects(stored)
    assert [x for x, _ in points(costs)] == [row.cost.value for row in effects]
    expected = [(row.kl.value, row.gain.value) for row in statistics.strengths(stored) if row.gain]
    assert points(strengths) == [(0, 0), *expected]
    passed = [100 * n / 30 for n in (30, 20)]
    assert [x for x, _ in points(changes)] == pytest.approx([*passed, 0, 62.5])
    assert figures[0].get_size_inches()[0] * figures[0].dpi == 1200
    # The interval of a change is a text: drawn, it could be taken for that of the adapter's share.
    texts = [text.get_text() for text in changes.texts]
    for change in (
        statistics.checks(stored)["is brief"],
        statistics.preferences(stored.pairs).by_sum,
    ):
        counts = [str(count) for count in (change.before, change.after, change.count)]
        assert counts in [re.findall(r"\d+", text) for text in texts]
        assert statistics.points(change.change) in texts
    shares = [
        share for line in changes.lines for share in line.get_xdata() if len(line.get_xdata()) > 1
    ]
    assert set(shares) <= {0, 1, *(x for x, _ in points(changes))}  # 0 and 1 are of the rule


def test_no_name_of_a_strength_lies_on_an_error_bar(tmp_path, monkeypatch, real_picture):
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, _: figures.append(figure)
    )
    picture.draw(made(tmp_path))
    figures[0].canvas.draw()
    (axes,) = [axes for axes in figures[0].axes if axes.get_ylabel()]
    names = [text.get_window_extent() for text in axes.texts]
    bars = [bar for container in axes.containers for bar in container.lines[2]]
    ends = [axes.transData.transform(path.vertices) for bar in bars for path in bar.get_paths()]
    assert len(ends) == 8 and len(names) == 5
    for x, y in np.concatenate([np.linspace(*of_bar, 300) for of_bar in ends]):
        assert not any(name.contains(x, y) for name in names)
    assert not any(first.overlaps(other) for first, other in itertools.combinations(names, 2))


def test_without_matplotlib_there_is_no_picture(capsys, tmp_path, monkeypatch):
    """An older one stays where the record is the same, and not beside a record that changed."""
    stored = put(made(tmp_path))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    end = command(capsys, ["report", tmp_path], main)
    assert end.status == 0 and "matplotlib" in end.err
    assert "](picture.png)" not in read(stored) and not (tmp_path / "picture.png").exists()
    (tmp_path / "picture.png").write_bytes(b"drawn before")
    end = command(capsys, ["report", tmp_path], main)
    assert end.status == 0 and "](picture.png)" in read(stored)
    assert (tmp_path / "picture.png").read_bytes() == b"drawn before"
    report.write(stored)
    assert "](picture.png)" not in read(stored) and not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("content", ["{", '{"schema": 2}', '{"schema": 4}', "[]"])
def test_a_folder_without_a_record_is_named(capsys, tmp_path, content):
    (tmp_path / "evidence.json").write_text(content)
    assert refused(capsys, ["report", tmp_path], f"{tmp_path}/evidence.json", main=main).out == ""
