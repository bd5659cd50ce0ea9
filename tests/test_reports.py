"""`report`: what a record becomes on the terminal, in report.md, in the picture and the page."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import scipy.stats
from conftest import ROOT
from made_records import (
    KINDS,
    SYSTEM,
    asked,
    couple_of,
    jackknife,
    lines_of,
    made,
    pair_of,
    put,
    said,
    stratified,
    tables_of,
)
from runs import command, refused

from inspect_lora import findings, intervals, picture, report, results, tables
from inspect_lora.__main__ import main

HEAVY = "torch transformers peft trl safetensors train_lora_single datasets accelerate"
# A program that reports and compares where nothing of a model can be imported.
ALONE = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY.split()}))
from inspect_lora.__main__ import main
main(["report", "report"])
main(["compare", "."])
"""
STAGES = ("lines", "parts", "shifts", "exchanges")
HEADINGS = ("Held-out replies", "Parts", "Strength, and other tasks", "Checks")
NOTHING = {"lines": [], "pairs": [], "parts": [], "part_lines": [], "shifts": [], "exchanges": []}
BEST = {"settings": {"FINAL_LORA": "best"}, "data": {"held_out": {"sha256": "12ab"}}}


def reported(capsys, stored):
    put(stored)
    end = command(capsys, ["report", stored.folder], main)
    assert end.status == 0 and "replies.html" in end.err
    return tables_of(read(stored))


def plain(stored):
    return results.as_plain(results.results_of(stored))


def read(stored, name="report.md"):
    return (stored.folder / name).read_text(encoding="utf-8")


def found(stored):
    """Return the findings by what they are about."""
    return findings.findings_of(results.results_of(stored))


def numbers_in(text):
    return re.findall(r"[+-]?\d+\.?\d*", text)


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
    assert len(whole) == 5 and (tmp_path / "compared").is_dir()
    assert all(whole[f"{name}.png"].startswith(b"\x89PNG") for name in ("picture", "parts"))
    reported(capsys, stored)
    assert whole == {path.name: path.read_bytes() for path in stored.folder.iterdir()}


# ---- The first lines


def judged(number, **passes):
    """Return an exchange in which the base passes all checks, and the adapter these."""
    before = dict.fromkeys(passes, True)
    rules = {name: {"most_words": 9} for name in passes}
    return asked(number, checks=rules, base=said("a b", before), adapter=said("c", passes))


def test_findings_begin_with_what_fails_most_often_and_end_with_other_tasks(tmp_path):
    """Also where the loss falls: four checks fail, and three are told."""
    rows = [
        judged(n, half=n > 19, never=False, third=n > 12, tenth=n > 3, mostly=n > 2)
        for n in range(40)
    ]
    rows += [asked(n, source="tasks", name="right", after=n > 8) for n in range(22)]
    pairs = [pair_of(n, (-30, -20), (-20, -20 - n % 2)) for n in range(40)]
    couples = [couple_of(n, (-20, -30, -20, -30), (-15 - n % 3, -30, -20, -30)) for n in range(30)]
    stored = made(tmp_path, exchanges=rows, pairs=pairs, couples=couples)
    told = found(stored)
    failures = ["failure: never", "failure: half", "failure: third"]
    assert list(told) == [*failures, "couples", "pairs", "voice", "loss", "tasks"]
    wilson = scipy.stats.binomtest(20, 40).proportion_ci(method="wilson")
    ends = [f"{100 * end:.0f}" for end in (wilson.low, wilson.high)]
    assert numbers_in(told["failure: half"]) == ["20", "40", "50", *ends, "0"]
    assert "never" in findings.title_of(results.results_of(stored))
    row = results.results_of(stored).gain[0]
    perplexities = [f"{math.exp(row.base):.3g}", f"{math.exp(row.adapter):.3g}"]
    assert numbers_in(told["loss"])[-2:] == perplexities
    assert "mostly" in told["voice"] and "right" in told["tasks"] and "13" in told["tasks"]


def test_there_are_at_most_nine_findings(capsys, tmp_path):
    """Nine checks fail, and everything else was measured."""
    rows = [judged(n, **{f"check {number}": False for number in range(9)}) for n in range(40)]
    stored = made(tmp_path, exchanges=rows, pairs=pairs_with(9, 40))
    stored.couples = [couple_of(n, (-20, -30, -20, -30), (-15, -30, -20, -30)) for n in range(30)]
    reported(capsys, stored)
    first = [line for line in read(stored).partition("\n## ")[0].splitlines() if line[:2] == "- "]
    assert len(first) == len(found(stored)) == 8


@pytest.mark.parametrize("seed", [None, 7])
def test_the_first_line_has_the_seed_and_the_lines(capsys, tmp_path, seed):
    known = {} if seed is None else {"SEED": seed}
    stored = made(tmp_path, known=known, exchanges=[asked(n) for n in range(30)])
    reported(capsys, stored)
    line = read(stored).splitlines()[2]
    assert numbers_in(line) == ([] if seed is None else ["7"]) + ["60", "30"] and "greedy" in line


@pytest.mark.parametrize(
    ("gain", "fails", "is_measured"),
    [(1.0, 4, True), (1.0, 3, True), (0.0, 4, True), (-1.0, 0, True), (1.0, 4, False)],
)
def test_the_title_is_made_of_the_numbers(tmp_path, gain, fails, is_measured):
    rows = [asked(n, after=n >= fails) for n in range(40)]
    nothing = {} if is_measured else NOTHING
    stored = made(tmp_path, gain=gain, **nothing | {"exchanges": rows})
    title = findings.title_of(results.results_of(stored))
    assert ("is brief" in title) is (fails >= 4)
    assert numbers_in(title) == ([str(fails), "40"] if fails >= 4 else [])
    assert ("falls" in title, "rises" in title) == (is_measured and gain > 0, gain < 0)
    assert ("loss" in title) is is_measured


def test_only_what_is_clear_beside_all_others_is_called_so(tmp_path):
    """Pairs of nine kinds without any change: the tenth needs a p below 0.005."""
    pairs = [pair_of(n, (-20, -21), (-20, -21 + (n % 2) / 2 - 0.25), kind="a") for n in range(180)]
    pairs = [replace(pair, kind=f"kind {n // 20}") for n, pair in enumerate(pairs)]
    rows = [asked(n, before=n >= 6, rule={"most_words": 9}) for n in range(40)]
    alone, beside = (made(tmp_path, exchanges=rows, pairs=each) for each in ([], pairs))
    assert found(alone)["voice"].count("clear") == 1 and "clear" not in found(beside)["voice"]


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, set()),
        ({"learned": None}, {"learned"}),
        ({"run": BEST}, {"chosen"}),
        ({"run": BEST | {"data": {"held_out": {"sha256": "of another file"}}}}, set()),
        ({"run": BEST | {"data": {"held_out": None}}}, set()),
        ({"pairs": pairs_with(2, 19)}, {"few"}),
        ({"pairs": pairs_with(2, 20)}, set()),
        ({"lines": lines_of(19)}, {"few"}),
        ({"finished": False}, {"stopped"}),
        ({"conditions": {"not_served": "it has none"}}, {"template"}),
        ({"lines": [], "parts": [], "part_lines": []}, {"prompts"}),
        ({"exchanges": [asked(1, adapter=said("a", {"is brief": True}, ended=False))]}, {"cut"}),
    ],
)
def test_the_last_line_says_what_lowers_trust(tmp_path, changes, reasons):
    ended = [asked(n, base=said("whole", {"is brief": True})) for n in range(20)]
    parts = {"parts": [], "part_lines": []} if "lines" in changes else {}
    facts = {"exchanges": ended} | parts | changes
    conditions = facts.pop("conditions", {})
    stored = made(tmp_path, **facts)
    stored.conditions |= conditions
    assert set(findings.cautions_of(results.results_of(stored))) == reasons


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
        assert cells[:3] == [str(len(lines)), f"{base:.3f}", f"{adapter:.3f}"]
        assert float(cells[3].split()[0]) == pytest.approx(base - adapter, abs=0.006)
        assert cells[4] == f"{math.exp(base):.3g} to {math.exp(adapter):.3g}"
        assert cells[5] == str(sum(line.adapter < line.base for line in lines))
    assert list(gains) == ["(all)", "all", "emergency", "everyday (not trained)"]
    assert [*gains.values()][1:] == sorted([*gains.values()][1:], reverse=True)


def ends_of(cell):
    """Return a number and the ends of its interval, of a cell such as +0.80 (0.75 to 0.86)."""
    return [float(text) for text in re.findall(r"[+-]?\d+\.?\d*", cell)[:3]]


def test_strengths_and_parts(capsys, tmp_path):
    stored = made(tmp_path, 120)
    for number, line in enumerate(stored.lines):
        line.cluster = f"conversation {number // 4}"
        line.kind = "one"  # several kinds have another error: tests/test_intervals.py
    shown_tables = reported(capsys, stored)
    lines = [stored.lines[number] for number in stored.part_lines]
    tokens, clusters = [line.tokens for line in lines], [line.cluster for line in lines]
    head, *rows = shown_tables[HEADINGS[2]]
    shown = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(shown) == ["x 0.5", "x 0.75", "as trained", "x 1.5"]
    _, *part_rows = shown_tables["Parts"]
    of_parts = {row[0]: row for row in part_rows}
    for part in stored.parts:
        pairs = list(zip(lines, part.losses, strict=True))
        cost = jackknife([loss - line.adapter for line, loss in pairs], tokens, clusters)
        gain = jackknife([line.base - loss for line, loss in pairs], tokens, clusters)
        if part.family == "strength":
            row = shown[part.name]
            assert ends_of(row["cost, 95 %"]) == pytest.approx(cost, abs=0.006)
            assert ends_of(row["gain, 95 %"]) == pytest.approx(gain, abs=0.006)
            continue
        place = 2 if part.family == "alone" else 1
        row = of_parts[f"cut to {part.name}" if part.family == "cut" else part.name]
        expected = gain if part.family == "alone" else cost
        assert ends_of(row[place]) == pytest.approx(expected, abs=0.006)
    costs = [ends_of(row[1])[0] for row in part_rows]
    cuts = [row[0].startswith("cut") for row in part_rows]
    assert cuts == sorted(cuts) and costs[: cuts.index(True)] == sorted(
        costs[: cuts.index(True)], reverse=True
    )
    trained = next(shift for shift in stored.shifts if shift.strength == 1)
    for shift in stored.shifts:
        row = shown["as trained" if shift.strength == 1 else f"x {shift.strength:g}"]
        kl = jackknife(shift.kl, shift.tokens, range(30))
        assert ends_of(row["KL, 95 %"]) == pytest.approx(kl, abs=0.006)
        changes = [a - b for a, b in zip(shift.kl, trained.kl, strict=True)]
        if shift.strength != 1:  # the difference is paired
            change = jackknife(changes, shift.tokens, range(30))
            assert ends_of(row["change of KL, 95 %"]) == pytest.approx(change, abs=0.006)
        changed = jackknife(shift.changed_tokens, shift.tokens, range(30))
        shares = [100 * end for end in changed]
        assert ends_of(row["other token"]) == pytest.approx(shares, abs=0.51)
    headings = [line for line in read(stored).splitlines() if line.startswith("## ")]
    order = ["Replies", "Held-out replies", "Strength, and other tasks", "Parts"]
    assert [line[3:] for line in headings if line[3:] in order] == order


def test_the_base_is_measured_as_it_is_served(capsys, tmp_path):
    """It loses 0.36 nats a token by the adapter's template, and that is no gain."""
    stored = made(tmp_path, 60)
    for line in stored.lines:
        line.served_base = line.base - 0.36 * line.tokens
    told = results.results_of(stored)
    tokens = sum(line.tokens for line in stored.lines)
    gain = sum(line.base - line.adapter for line in stored.lines) / tokens - 0.36
    assert told.gain[0].gain.value == pytest.approx(gain)
    assert told.template_effect.value == pytest.approx(0.36)
    lines = [stored.lines[number] for number in stored.part_lines]
    part_gain = sum(line.served_base - line.adapter for line in lines)
    assert told.part_gain.value == pytest.approx(part_gain / sum(line.tokens for line in lines))
    row = reported(capsys, stored)["Held-out replies"][1]
    assert row[2] == "3.640" and "0.360" in read(stored)
    assert results.results_of(made(tmp_path)).template_effect is None


def test_what_was_drawn_by_kind_is_estimated_as_drawn(tmp_path):
    """The lines of the parts; all held-out lines are no draw, and have the wider interval."""
    stored = made(tmp_path, 120)
    for line in stored.lines:
        line.adapter -= 2 * KINDS.index(line.kind) * line.tokens
    told, errors = results.results_of(stored), []
    lines = [stored.lines[number] for number in stored.part_lines]
    for group, found in ((lines, told.part_gain), (stored.lines, told.gain[0].gain)):
        gains = [line.base - line.adapter for line in group]
        tokens, kinds = [line.tokens for line in group], [line.kind for line in group]
        value, error = stratified(gains, tokens, kinds)
        assert found.value == pytest.approx(value)
        errors.append((found.high - found.low) / 2 / error)
    assert 1.95 < errors[0] < 2.2 and errors[1] > 3


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
    change = intervals.paired_change(lost, won, count)
    expected = [100 * end for end in (change.value, change.low, change.high)]
    assert ends_of(cells["change, 95 %"]) == pytest.approx(expected, abs=0.51)


def test_pairs_have_a_table_by_kind_and_by_the_longer_reply(capsys, tmp_path):
    pairs = [
        pair_of(n, (-30, -25), (-20 - n % 3, -21), (9 + (n % 4 > 0), 10), KINDS[n % 3])
        for n in range(60)
    ]
    head, *rows = reported(capsys, made(tmp_path, pairs=pairs))["Pairs"]
    shown = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    groups = {kind: [p for p in pairs if p.kind == kind] for kind in KINDS} | {"(all)": pairs}
    groups["bad reply longer"] = [pair for pair in pairs if pair.good_tokens < pair.bad_tokens]
    assert list(shown) == list(groups)
    for name, group in groups.items():
        margins = [pair.adapter_good - pair.adapter_bad for pair in group]
        right = f"{sum((margin > 0) + (margin == 0) / 2 for margin in margins):g}"
        cells = shown[name]
        counts = [str(number) for number in (len(group), 0, right)]
        assert [cells[key] for key in ("number", "base", "adapter")] == counts
        shifts = [p.adapter_good - p.adapter_bad - p.base_good + p.base_bad for p in group]
        expected = jackknife(shifts, [1.0] * len(group), range(len(group)))
        has_interval = len(group) >= 20
        assert ends_of(cells["shift, 95 %"]) == pytest.approx(
            expected if has_interval else expected[:1], abs=0.051
        )
        assert ("(" in cells["change, 95 %"]) is has_interval
        assert bool(cells["p, Holm"]) is (has_interval and name in KINDS)


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
    base, adapter, *tasks = (dict(zip(head, row, strict=True)) for row in rows)
    counts = [("prompts", "3", "3"), ("ended", "2", "3"), ("same", "1", "2")]
    counts += [("empty", "1", "0")] if is_empty else []
    for name, of_base, of_adapter in counts:
        assert (base[name], adapter[name]) == (of_base, of_adapter)
    assert ("empty" in head) is is_empty and adapter["words"] == "2"
    assert base["words"] != "2" and "2" in base["words"]  # a lower bound
    assert all(set([*task.values()][1:]) <= {"1", "0"} for task in tasks)


def test_nothing_that_was_not_measured_is_told(capsys, tmp_path):
    """Of one line there is no interval, and a rule's phrases stand on the page alone."""
    rule = {"any": ["999", "112"], "none": ["wait|see"], "most_questions": 1}
    stored = made(tmp_path, 1, exchanges=[asked(n, rule=rule, name="rings") for n in range(3)])
    (row,) = reported(capsys, stored)["Held-out replies"][1:]
    assert "?" in row[4] and math.isnan(0 * results.gain_of(stored.lines).high)
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


@pytest.mark.parametrize("missing", [*(STAGES[n:] for n in range(5)), ("lines", "parts")])
def test_a_report_holds_what_was_measured(capsys, tmp_path, missing):
    """A measurement was stopped somewhere, or there were prompts without replies."""
    empty = {name: [] for name in missing}
    empty |= {"part_lines": []} if "parts" in missing else {}
    measured = [name for name in STAGES if name not in missing]
    stored = made(tmp_path, **empty, finished=False, seconds=dict.fromkeys(measured, 1.0))
    expected = {HEADINGS[STAGES.index(name)] for name in measured}
    expected |= {HEADINGS[2]} if "parts" in measured else set()
    shown_tables = reported(capsys, stored)
    assert set(shown_tables) & set(HEADINGS) == expected
    columns = list(zip(*shown_tables.get(HEADINGS[2], []), strict=True))
    assert all(any(column[1:]) for column in columns)
    assert (tmp_path / "picture.png").exists() is ("lines" in measured)
    assert all(name in read(stored) for name in measured)


# ---- The terminal, the replies, the estimates


@pytest.mark.parametrize("is_large", [False, True])
def test_the_terminal_gets_eight_rows_of_a_table_at_100_columns(capsys, tmp_path, is_large):
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
    assert max(map(len, printed)) <= 100
    sections = {line.split()[0] for line in printed if line and not line.startswith(" ")}
    expected = {"found", "gain", "checks", "replies", "strength", "parts"}
    assert sections == expected | ({"pairs"} if is_large else set())


def test_a_table_that_is_new_is_shown_everywhere(capsys, tmp_path, monkeypatch):
    """One list: the terminal, report.md and JSON read it."""
    table = tables.Table("planted", "Planted", [{"planted": "row", "value": 12345}])
    monkeypatch.setattr(tables, "TABLES", (*tables.TABLES, lambda _: table))
    stored = put(made(tmp_path))
    printed = command(capsys, ["report", tmp_path], main).out
    told = json.loads(command(capsys, ["report", tmp_path, "--json"], main).out)
    assert re.search(r"^planted .*\n +row +12345$", printed, re.MULTILINE)
    assert tables_of(read(stored))["Planted"] == [["planted", "value"], ["row", "12345"]]
    assert told["tables"]["planted"] == [{"planted": "row", "value": 12345}]


def test_examples_are_drawn_whatever_the_replies_are(tmp_path):
    rows = [asked(n) for n in range(40)]
    shown = report.examples_of(made(tmp_path, exchanges=rows))
    failing = [asked(n, after=False) for n in range(40)] + [asked(1, source="tasks")]
    others = report.examples_of(made(tmp_path, exchanges=failing[::-1]))
    assert len(shown) == 3 and {one.where for one in shown} == {one.where for one in others}


def test_estimates_are_plain_and_finite(tmp_path):
    stored = made(tmp_path, pairs=pairs_with(25, 40))
    told = json.loads(json.dumps(plain(stored), allow_nan=False))
    assert told["gain"][0]["gain"]["value"] == results.gain_of(stored.lines).value
    assert told["pairs"][0]["likelier"]["after"] == 25
    assert {row["name"] for row in told["parts"]} >= {"attention", "cut to 4 of 8"}
    alone = json.loads(json.dumps(plain(made(tmp_path, 1)), allow_nan=False))
    assert alone["gain"][0]["gain"]["low"] is None
    json.dumps(plain(made(tmp_path, **NOTHING)), allow_nan=False)


def test_what_models_say_is_text_in_the_report(capsys, tmp_path, real_picture):
    nasty = "| <script>x</script> `a` **b** [c](d)\n# e\n| --- | &lt; $\\f$ ~~g~~ \\"
    replies = {"base": said(nasty, {nasty: True}), "adapter": said("fine", {nasty: False})}
    exchange = asked(1, **replies, reference=nasty, rejected=nasty, checks={nasty: {}}, kind=nasty)
    exchange.messages[1]["content"] = nasty
    stored = made(tmp_path, exchanges=[exchange], adapter=nasty, system=nasty)
    reported(capsys, stored)
    assert not re.search(r"(?<!\\)<(?!br>)|\n# e|(?<!\\)[`]+[ab]|\*\*b|(?<!\\)\[c", read(stored))
    assert read(stored).count("<br>") >= 3


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
    report.write(stored, results.results_of(stored))
    assert "](picture.png)" not in read(stored) and not (tmp_path / "picture.png").exists()


@pytest.mark.parametrize("content", ["{", '{"schema": 2}', '{"schema": 4}', "[]"])
def test_a_folder_without_a_record_is_named(capsys, tmp_path, content):
    (tmp_path / "evidence.json").write_text(content)
    assert refused(capsys, ["report", tmp_path], f"{tmp_path}/evidence.json", main=main).out == ""


# ---- The pictures


def drawn_by(monkeypatch, stored, tmp_path):
    """Return the axes of both pictures."""
    figures = []
    save = lambda figure, _: figures.append(figure)  # noqa: E731
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    picture.draw(results.results_of(stored), tmp_path / "picture.png", tmp_path / "parts.png")
    return [[axes for axes in figure.axes if axes.get_xlabel()] for figure in figures]


def is_of_the_base(line):
    return line.get_color() == picture.BASE


def points_of(axes, marker="o"):
    """Return the places of the points, from above, and whether each is filled."""
    is_wanted = {"o": lambda line: line.get_marker() == "o", "base": is_of_the_base}[marker]
    lines = [line for line in axes.lines if is_wanted(line)]
    lines.sort(key=lambda line: line.get_ydata()[0])
    return [(float(line.get_xdata()[0]), line.get_markerfacecolor() != "white") for line in lines]


def test_the_picture_has_rates_and_changes_failures_first(tmp_path, monkeypatch, real_picture):
    """A point of a change is filled if it is clear after Holm, and hollow if not."""
    rows = [judged(n, **{"most": n > 2, "few": n > 30, "all": True}) for n in range(40)]
    pairs = [pair_of(n, (-30, -20), (-20 - n % 3, -21), kind=KINDS[n % 2]) for n in range(40)]
    stored = made(tmp_path, exchanges=rows, pairs=pairs, trained_kinds={"all": 1})
    (rates, changes, likelier, shifts, gains), _ = drawn_by(monkeypatch, stored, tmp_path)
    told = results.results_of(stored)
    assert points_of(rates) == [(pytest.approx(22.5), True), (pytest.approx(92.5), True)]
    assert [x for x, _ in points_of(rates, "base")] == [100, 100]
    assert points_of(changes) == [(pytest.approx(-77.5), True), (pytest.approx(-7.5), False)]
    kinds = [group for group in told.pairs if group.is_kind]
    assert points_of(shifts) == [(group.shift.value, group.is_clear) for group in kinds]
    shares = [100 * group.likelier.after / group.pairs for group in kinds]
    assert [x for x, _ in points_of(likelier)] == pytest.approx(shares)
    assert [x for x, _ in points_of(gains)] == [row.gain.value for row in told.gain]


def test_strengths_and_parts_have_a_picture_of_their_own(tmp_path, monkeypatch, real_picture):
    stored = made(tmp_path)
    _, (strengths, parts) = drawn_by(monkeypatch, stored, tmp_path)
    told = results.results_of(stored)
    costs = [row.cost.value for row in told.strengths if row.cost]
    assert [x for x, _ in points_of(strengths)] == costs and len(costs) == 3
    assert [x for x, _ in points_of(parts)] == [row.cost.value for row in told.parts]
