"""`report`: what a record becomes on the terminal, in report.md, in the picture and the page."""

import json
import math
import os
import re
import subprocess
import sys

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
from inspect_lora.readings import Reading, preference_of

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


def judged(number, base=None, **passes):
    """Return an exchange in which the adapter passes these checks, and the base all or others."""
    before = dict.fromkeys(passes, True) | (base or {})
    rules = {name: {"most_words": 9} for name in passes}
    return asked(number, checks=rules, base=said("a b", before), adapter=said("c", passes))


def test_the_title_and_findings_count_failures_of_both_sides(tmp_path):
    """A check that got worse, one that still fails, one that improved, and one of neither."""
    rows = [
        judged(
            n,
            base={"long": n > 29, "never": False, "odd": n > 0},
            **{"worse": n > 14, "long": n > 2, "never": False, "odd": n > 1},
        )
        for n in range(40)
    ]
    told = results.results_of(made(tmp_path, exchanges=rows))
    title, lines = findings.title_of(told), findings.findings_of(told)
    assert re.findall(r'"(\w+)"', title) == ["worse", "never", "long"]
    assert " ".join(numbers_in(title)) == "15 40 0 40 40 40 40 40 3 40 30 40"
    assert ("worse" in title, "still" in title, "improved" in title) == (True, True, True)
    p = {check.name: f"{check.family_p:.3f}" for check in told.checks}
    wilson = scipy.stats.binomtest(15, 40).proportion_ci(method="wilson")
    ends = [f"{100 * end:.0f}" for end in (wilson.low, wilson.high)]
    assert numbers_in(lines["worse"]) == ["15", "40", "0", "40", "38", *ends, "0.001"]
    assert numbers_in(lines["unchanged"]) == ["2", "40", "1", "40", p["odd"]]
    clear = {about: re.findall("not clear|clear", line) for about, line in lines.items()}
    assert clear == {
        "worse": ["clear"],
        "failing": ["not clear"],
        "improved": ["clear"],
        "unchanged": ["not clear"],
        "loss": [],
        "tasks": [],
    }


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"gain": 1.0, "exchanges": []}, ["4.000 to 3."]),
        ({"gain": -1.0, "exchanges": []}, ["4.000 to 5."]),
        ({"gain": 0.0, "exchanges": []}, ["4.000", "may"]),
        ({}, ["No check"]),
        (NOTHING, ["output/final_lora"]),
    ],
)
def test_without_a_check_to_tell_the_title_is_of_the_loss(tmp_path, facts, words):
    title = findings.title_of(results.results_of(made(tmp_path, **facts)))
    assert all(word in title for word in words) and ("may" in title) is ("may" in words)


def test_there_are_at_most_nine_findings_and_they_have_an_order(tmp_path):
    """Six checks of each standing, and everything else was measured."""
    words, rows = ("worse", "never", "improved", "same"), []
    names = [f"{word} {number}" for word in words for number in range(6)]
    for n in range(60):
        passes = {name: name[0] in "is" and n > 0 for name in names}
        base = {name: name[0] == "w" or (name[0] == "s" and n > 1) for name in passes}
        rows.append(judged(n, base=base, **passes))
    rows += [asked(n, source="tasks", name="right", after=n > 8) for n in range(22)]
    pairs = [pair_of(n, (-30, -20), (-20 - n % 3, -20), kind=f"kind {n % 6}") for n in range(180)]
    couples = [couple_of(n, (-20, -30, -20, -30), (-15 - n % 3, -30, -20, -30)) for n in range(30)]
    stored = made(tmp_path, exchanges=rows, pairs=pairs, couples=couples)
    reading = Reading("Ann", True, ("base", "adapter"), (preference_of("", [0, 1, 1]),), {})
    told = findings.findings_of(results.results_of(stored, [reading]))
    order = ["worse", "failing", "improved", "readings", "couples", "pairs", "unchanged"]
    assert list(told) == [*order, "loss", "tasks"]
    more = [about for about, text in told.items() if "2 more" in text]
    assert more == ["worse", "failing", "improved", "pairs", "unchanged"]
    row = results.results_of(stored).gain[0]
    perplexities = [f"{math.exp(row.base):.3g}", f"{math.exp(row.adapter):.3g}"]
    assert numbers_in(told["loss"])[-2:] == perplexities


@pytest.mark.parametrize("kinds", ["aa", "ab"])
@pytest.mark.parametrize("shift", [0, 9])
def test_the_sum_of_pairs_stands_in_findings_and_table_or_in_neither(
    capsys, tmp_path, kinds, shift
):
    """It is no comparison of the family, so it has no verdict but that it was not tested."""
    pairs = [
        pair_of(
            n, (-30, -25), (-29 - n % 3 + shift * (kinds[n % 2] == "b"), -25), kind=kinds[n % 2]
        )
        for n in range(80)
    ]
    stored = made(tmp_path, pairs=pairs)
    names = [row[0] for row in reported(capsys, stored)["Pairs"]]
    told = found(stored)["pairs"]
    has_sum = kinds == "ab" and not shift
    assert ("(all)" in names, "together" in told, "not tested" in told) == (has_sum,) * 3


@pytest.mark.parametrize("seed", [None, 7])
def test_the_first_line_has_the_seed_and_the_lines(capsys, tmp_path, seed):
    """Sixty replies of thirty conversations."""
    known = {} if seed is None else {"SEED": seed}
    stored = made(tmp_path, known=known, exchanges=[asked(n) for n in range(30)])
    for number, line in enumerate(stored.lines):
        line.cluster = f"talk {number // 2}"
    reported(capsys, stored)
    line = read(stored).splitlines()[2]
    seeds = [] if seed is None else ["7"]
    assert numbers_in(line) == [*seeds, "60", "30", "30"] and "greedy" in line


def test_the_intervals_that_are_shown_are_counted(capsys, tmp_path):
    """In report.md itself; nineteen lines have none."""
    rows = [judged(n, many=n > 3) for n in range(30)] + [judged(n, few=True) for n in range(19)]
    stored = made(tmp_path, exchanges=rows, pairs=pairs_with(9, 40))
    reported(capsys, stored)
    tables_shown = [line for line in read(stored).splitlines() if line.startswith("|")]
    shown = sum(len(re.findall(r"\(-?[\d.]+ to -?[\d.]+\) \|", line)) for line in tables_shown)
    told = findings.not_covered(results.results_of(stored))
    assert f"{shown} intervals" in told and "4 of them" in told  # of KL, at each strength


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, set()),
        ({"learned": None}, {"learned"}),
        ({"run": BEST}, {"chosen"}),
        ({"run": BEST | {"data": {"held_out": {"sha256": "of another file"}}}}, set()),
        ({"run": BEST | {"data": {"held_out": None}}}, set()),
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
    assert list(gains) == ["(all)", "all", "emergency", "everyday (not trained)"]
    assert [*gains.values()][1:] == sorted([*gains.values()][1:], reverse=True)


def ends_of(cell):
    """Return a number and the ends of its interval, of a cell such as +0.80 (0.75 to 0.86)."""
    return [float(text) for text in re.findall(r"[+-]?\d+\.?\d*", cell)[:3]]


@pytest.fixture
def parts_shown(capsys, tmp_path):
    """Return a record of conversations of one kind, with its tables of strengths and parts."""
    stored = made(tmp_path, 120)
    for number, line in enumerate(stored.lines):
        line.cluster = f"conversation {number // 4}"
        line.kind = "one"  # several kinds have another error: tests/test_intervals.py
    return stored, reported(capsys, stored)


def test_strengths_and_parts_are_paired_with_the_adapter_as_trained(parts_shown):
    """By the jackknife over conversations, on the lines that measure parts."""
    stored, shown = parts_shown
    lines = [stored.lines[number] for number in stored.part_lines]
    tokens, clusters = [line.tokens for line in lines], [line.cluster for line in lines]
    head, *strengths = shown[HEADINGS[2]]
    of_strengths = {row[0]: dict(zip(head, row, strict=True)) for row in strengths}
    head, *rows = shown["Parts"]
    of_parts = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    for part in stored.parts:
        pairs = list(zip(lines, part.losses, strict=True))
        cost = jackknife([loss - line.adapter for line, loss in pairs], tokens, clusters)
        gain = jackknife([line.base - loss for line, loss in pairs], tokens, clusters)
        if part.family == "strength":
            row = of_strengths[part.name]
            assert ends_of(row["cost, 95 %"]) == pytest.approx(cost, abs=0.006)
            assert ends_of(row["gain, 95 %"]) == pytest.approx(gain, abs=0.006)
            continue
        name = f"cut to {part.name}" if part.family == "cut" else part.name
        column, expected = ("alone", gain) if part.family == "alone" else ("cost", cost)
        assert ends_of(of_parts[name][f"{column}, 95 %"]) == pytest.approx(expected, abs=0.006)
    assert list(of_parts) == ["attention", "q_proj", "cut to 2 of 8", "cut to 4 of 8"]


def test_other_tasks_are_measured_at_each_strength(parts_shown):
    stored, shown = parts_shown
    head, *rows = shown[HEADINGS[2]]
    assert [row[0] for row in rows] == ["x 0.5", "x 0.75", "as trained", "x 1.5"]
    for shift, row in zip(stored.shifts, rows, strict=True):
        cells = dict(zip(head, row, strict=True))
        tokens = shift.tokens
        assert ends_of(cells["KL, 95 %"]) == pytest.approx(
            jackknife(shift.kl, tokens, range(30)), abs=0.006
        )
        shares = [100 * end for end in jackknife(shift.changed_tokens, tokens, range(30))]
        assert ends_of(cells["other token"]) == pytest.approx(shares, abs=0.51)


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


def test_a_check_has_counts_and_the_interval_of_its_change(capsys, tmp_path):
    """The first lines are lost, the last are won, and both pass those between."""
    count, lost, won = 40, 5, 3
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


def test_a_table_of_pairs_has_their_counts_and_no_interval_of_few(capsys, tmp_path):
    pairs = [
        pair_of(n, (-30, -25), (-20 - n % 3, -21), (9 + (n % 4 > 0), 10), KINDS[n % 3])
        for n in range(60)
    ]
    head, *rows = reported(capsys, made(tmp_path, pairs=pairs))["Pairs"]
    shown = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    assert list(shown) == [*KINDS, "bad reply longer"]
    # The margins of "all" are 1, those of "emergency" 0, those of "everyday" -1.
    for kind, right in zip(KINDS, ("20", "10", "0"), strict=True):
        assert [shown[kind][key] for key in ("number", "base", "adapter")] == ["20", "0", right]
        assert shown[kind]["p, Holm"] and "(" in shown[kind]["shift, 95 %"]
    few = shown["bad reply longer"]
    assert few["number"] == "15" and not few["p, Holm"] and "(" not in few["shift, 95 %"]


def test_replies_that_ended_and_empty_ones_are_counted(capsys, tmp_path):
    rows = [
        asked(1, base=said(" \n"), adapter=said("one two"), checks={}),
        asked(2, base=said("a b c d", ended=False), adapter=said("a"), checks={}),
        asked(3, base=said("one two"), adapter=said("one two"), checks={}),
        asked(4, base=said("one"), adapter=said("one"), checks={}, source="tasks"),
    ]
    head, *rows = reported(capsys, made(tmp_path, exchanges=rows))["Replies"]
    base, adapter, *_ = (dict(zip(head, row, strict=True)) for row in rows)
    counts = {"prompts": "33", "ended": "23", "same": "12", "empty": "10"}
    assert {name: base[name] + adapter[name] for name in counts} == counts
    assert adapter["words"] == "2"
    assert base["words"] != "2" and "2" in base["words"]  # a lower bound


def test_nothing_that_was_not_measured_is_told(capsys, tmp_path):
    """Of one line there is no interval, and a rule's phrases stand on the page alone."""
    rule = {"any": ["999", "112"], "none": ["wait|see"], "most_questions": 1}
    stored = made(tmp_path, 1, exchanges=[asked(n, rule=rule, name="rings") for n in range(3)])
    (row,) = reported(capsys, stored)["Held-out replies"][1:]
    assert "?" in row[4]
    text, page = read(stored), read(stored, "replies.html")
    assert "112" in page and "112" not in text and SYSTEM in text
    assert all(word in text for word in ("someone/model", "abc", "12ab", "float32", "rings"))


@pytest.mark.parametrize("learned", [None, 7])
def test_what_the_adapter_learned_is_counted_or_not_known(capsys, tmp_path, learned):
    """Nothing says 0 where it is not known."""
    stored = put(made(tmp_path, learned=learned, too_long=5, refused=3))
    reported(capsys, stored)
    (line,) = [line for line in read(stored).splitlines() if "left out" in line]
    assert re.findall(r"\d+", line) == ([] if learned is None else [str(learned)]) + ["5", "3"]


@pytest.mark.parametrize("missing", [STAGES, STAGES[1:], STAGES[3:], ("lines", "parts")])
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


def test_the_terminal_gets_eight_rows_of_a_table_at_100_columns(capsys, tmp_path):
    names = [f"a check with a rather long name, {number}" for number in range(12)]
    passes = dict.fromkeys(names, True)
    rules = {name: {"most_words": 9} for name in names}
    rows = [
        asked(n, checks=rules, base=said("a", passes), adapter=said("b", passes)) for n in range(30)
    ]
    pairs = [pair_of(n, (-9, -8), (-7, -8), kind=f"kind {n % 9}") for n in range(60)]
    stored = put(made(tmp_path, exchanges=rows, pairs=pairs))
    for number, line in enumerate(stored.lines):
        line.kind = f"a kind with a rather long name, {number % 20}"
    put(stored)
    printed = command(capsys, ["report", tmp_path], main).out.splitlines()
    assert max(map(len, printed)) <= 100
    assert len([line for line in printed if "a kind with" in line]) == 7  # and that of all kinds
    sections = {line.split()[0] for line in printed if line and not line.startswith(" ")}
    assert sections == {"found", "gain", "checks", "replies", "strength", "parts", "pairs"}


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


@pytest.mark.parametrize("facts", [{"count": 60}, {"count": 1}, NOTHING], ids=str)
def test_estimates_are_plain_and_finite(tmp_path, facts):
    """Of one line the ends of an interval are not known: None, as JSON has no infinity."""
    told = json.loads(json.dumps(plain(made(tmp_path, **facts)), allow_nan=False))
    for row in told["gain"][:1]:
        assert (row["gain"]["low"] is None) is (facts["count"] == 1)


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


def marks_of(axes, marker):
    """Return the places of marks, from above, whether each is filled, and whether it is faded."""
    lines = [line for line in axes.lines if line.get_marker() == marker]
    lines.sort(key=lambda line: line.get_ydata()[0])
    return [
        (float(line.get_xdata()[0]), line.get_markerfacecolor() != "white", line.get_alpha() < 1)
        for line in lines
    ]


def test_the_picture_has_rates_and_changes_failures_first(tmp_path, monkeypatch, real_picture):
    """A circle is filled if the change is clear after Holm, and faded if it has under 20 lines."""
    rows = [judged(n, most=n > 4, few=n > 30, all=True) for n in range(40)]
    rows += [judged(n, under=n > 0) for n in range(19)]
    pairs = [pair_of(n, (-30, -20), (-20 - n % 3, -21), kind=KINDS[n % 2]) for n in range(40)]
    stored = made(tmp_path, exchanges=rows, pairs=pairs)
    (rates, changes, likelier, shifts, gains), _ = drawn_by(monkeypatch, stored, tmp_path)
    told, near = results.results_of(stored), pytest.approx
    assert marks_of(rates, "D") == [
        (near(22.5), True, False), (near(87.5), True, False), (near(1800 / 19), True, True)
    ]  # fmt: skip
    base = [line for line in rates.lines if line.get_color() == picture.BASE]
    assert [line.get_xdata()[0] for line in base] == [100] * 3
    assert marks_of(changes, "o") == [
        (near(-77.5), True, False), (near(-12.5), False, False), (near(-100 / 19), False, True)
    ]  # fmt: skip
    kinds = [group for group in told.pairs if group.is_kind]
    assert marks_of(shifts, "o") == [(each.shift.value, each.is_clear, False) for each in kinds]
    shares = [100 * group.likelier.after / group.pairs for group in kinds]
    assert [x for x, *_ in marks_of(likelier, "D")] == near(shares)
    assert [x for x, *_ in marks_of(gains, "s")] == [row.gain.value for row in told.gain]


def test_strengths_and_parts_have_a_picture_of_their_own(tmp_path, monkeypatch, real_picture):
    stored = made(tmp_path)
    _, (strengths, parts) = drawn_by(monkeypatch, stored, tmp_path)
    told = results.results_of(stored)
    costs = [row.cost.value for row in told.strengths if row.cost]
    assert [x for x, *_ in marks_of(strengths, "s")] == costs and len(costs) == 3
    assert [x for x, *_ in marks_of(parts, "s")] == [row.cost.value for row in told.parts]
