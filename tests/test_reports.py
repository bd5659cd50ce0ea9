"""`report`: what a record becomes on the terminal, in report.md, in the picture and the page."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from conftest import ROOT
from made_records import KINDS, SYSTEM, asked, jackknife, made, put, said, tables_of
from runs import command, refused

from inspect_lora.__main__ import main

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
HEADINGS = ("Updates", "Held-out replies", "Parts", "Strength, and change on other tasks", "Checks")


def reported(capsys, found):
    put(found)
    end = command(capsys, ["report", found.folder], main)
    assert (end.status, end.err) == (0, "")
    return tables_of(read(found))


def read(found, name="report.md"):
    return (found.folder / name).read_text(encoding="utf-8")


def test_a_report_needs_no_model_and_comes_out_the_same_again(capsys, tmp_path, real_picture):
    found = put(made(tmp_path / "report"))
    put(made(tmp_path / "other"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", ALONE]
    subprocess.run(program, check=True, timeout=120, cwd=tmp_path, env=environment)
    whole = {path.name: path.read_bytes() for path in found.folder.iterdir()}
    assert len(whole) == 4 and (tmp_path / "compared").is_dir()
    assert whole["picture.png"].startswith(b"\x89PNG")
    reported(capsys, found)
    assert whole == {path.name: path.read_bytes() for path in found.folder.iterdir()}


def test_losses_of_all_replies_and_of_each_kind(capsys, tmp_path):
    found = made(tmp_path)
    _, *rows = reported(capsys, found)["Held-out replies"]
    assert [row[0] for row in rows] == ["(all)", *KINDS]
    for name, *cells in rows:
        lines = [line for line in found.lines if name in ("(all)", line.kind)]
        tokens = sum(line.tokens for line in lines)
        base = sum(line.base for line in lines) / tokens
        own = sum(line.adapter for line in lines) / tokens
        assert cells[:4] == [str(len(lines)), f"{base:.4f}", f"{own:.4f}", f"{base - own:+.4f}"]
        assert cells[5:] == ["", str(sum(line.adapter < line.base for line in lines))]


def test_strengths_parts_and_updates(capsys, tmp_path):
    found = made(tmp_path, 120)
    for number, line in enumerate(found.lines):
        line.cluster = f"conversation {number // 4}"
    tables = reported(capsys, found)
    rows = tables[HEADINGS[3]][1:]
    lines = [found.lines[number] for number in found.measured_on]
    tokens, whole = sum(line.tokens for line in lines), [r.base - r.adapter for r in lines]
    clusters = [line.cluster for line in lines]
    assert [row[0] for row in rows[:2]] == ["base", "x 0.25"] and len(rows) == 9
    shown = {row[0]: row for row in [*rows, *tables["Parts"][1:]]}
    for part in found.parts:
        kept = [line.base - loss for line, loss in zip(lines, part.losses, strict=True)]
        share, low, high = (100 * one for one in jackknife(kept, whole, clusters))
        cells = [f"{sum(part.losses) / tokens:.4f}", f"{share:.1f} %", f"{low:.1f} to {high:.1f}"]
        assert shown[part.name][1:5] == [*cells, "~" if low < 100 < high else ""]
    for shift, row in zip(found.shifts, rows[1:], strict=True):
        kl, low, high = jackknife(shift.kl, shift.tokens, range(30))
        other = sum(shift.other) / sum(shift.tokens)
        assert row[5:] == [f"{kl:.4f}", f"{low:.3f} to {high:.3f}", f"{100 * other:.1f} %"]
    updates = [row[2:] for row in tables["Updates"][1:]]
    assert updates == [["2.50 %", "3.00 %"], ["3.00 %", "5.00 %"]]


@pytest.mark.parametrize(
    ("count", "lost", "won", "is_clear"),
    [(40, 9, 0, True), (40, 5, 0, False), (40, 9, 4, False), (19, 9, 0, False), (40, 20, 0, True)],
)
def test_a_check_has_counts_intervals_and_p(capsys, tmp_path, count, lost, won, is_clear):
    """The first lines are lost, the last are won, and both pass those between."""
    rows = [asked(n, before=n < count - won, after=n >= lost) for n in range(count)]
    _, row = reported(capsys, made(tmp_path, exchanges=rows))["Checks"]
    cells = ["is brief", str(count)]
    for passed in (count - won, count - lost):
        found = scipy.stats.binomtest(passed, count).proportion_ci(method="wilson")
        cells += [str(passed), f"{100 * found.low:.0f} to {100 * found.high:.0f} %"]
    p = scipy.stats.binomtest(lost, lost + won).pvalue
    shown = f"{p:.3f}" if p >= 0.001 else "<0.001"
    assert row == [*cells, str(lost), str(won), shown, "" if is_clear else "~"]


def test_replies_that_ended_and_empty_ones_are_counted(capsys, tmp_path):
    rows = [
        asked(1, base=said(" \n"), adapter=said("one two"), checks={}),
        asked(2, base=said("a b c d", ended=False), adapter=said(""), checks={}),
        asked(3, base=said("one two"), adapter=said("one two"), checks={}),
        asked(4, base=said("one"), adapter=said("one"), checks={}, source="tasks"),
    ]
    rows = reported(capsys, made(tmp_path, exchanges=rows))["Replies"][1:]
    assert [" ".join(row[1:]) for row in rows] == ["3 2 1 1 2 3 1 2 1", "1 1 0 1 1 1 0 1 1"]


@pytest.mark.parametrize(("count", "gain"), [(38, 1.0), (60, 0.0), (60, -1.0), (1, 1.0)])
def test_no_share_without_a_clear_gain(capsys, tmp_path, count, gain):
    """Half of the lines measure the parts, and a third is of one kind."""
    tables = reported(capsys, made(tmp_path, count, gain))
    rows = [*tables["Parts"][1:], *tables[HEADINGS[3]][1:]]
    assert all(row[2:5] == ["", "", ""] for row in rows)
    rows = {row[0]: row for row in tables["Held-out replies"][1:]}
    assert rows["(all)"][6] == ("~" if gain == 0 or count == 1 else "")
    assert count == 1 or rows["all"][6] == ("" if gain == -1 else "~")
    assert (rows["(all)"][5] == "?") is (count == 1)


def test_the_report_names_kinds_checks_with_their_rules_and_the_system_message(capsys, tmp_path):
    rule = {"any": ["999", "112"], "none": ["wait|see"], "most_questions": 1}
    rows = [asked(n, rule=rule if n < 20 else {"any": ["000"]}, name="rings") for n in range(30)]
    found = made(tmp_path, exchanges=rows)
    reported(capsys, found)
    text, page = read(found), read(found, "replies.html")
    for word in ("999", "112", "wait", "most questions: 1", "rings", SYSTEM, *KINDS):
        assert word in text and word in page
    assert re.search(r"\b20\b.*\b30\b", text) and page.count("000") == 1  # a rule stands there once
    assert all(word in text for word in ("someone/model", "abc", "12ab", "float32"))


@pytest.mark.parametrize("learned", [None, 0, 7])
def test_what_the_adapter_learned_is_counted_or_not_known(capsys, tmp_path, learned):
    """Nothing says 0 where it is not known."""
    found = put(made(tmp_path, learned=learned, too_long=5, refused=3))
    for text in (command(capsys, ["report", tmp_path], main).out, read(found)):
        (line,) = [one for one in text.splitlines() if "left out" in one]
        assert re.findall(r"\d+", line) == ([] if learned is None else [str(learned)]) + ["5", "3"]
        assert ("learned.txt" in line) is (learned is None)


@pytest.mark.parametrize("missing", [*(STAGES[n:] for n in range(6)), ("lines", "parts")])
def test_a_report_holds_what_was_measured(capsys, tmp_path, missing):
    """A measurement was stopped somewhere, or there were prompts without replies."""
    empty = {name: {} if name == "updates" else [] for name in missing}
    empty |= {"measured_on": []} if "parts" in missing else {}
    measured = [name for name in STAGES if name not in missing]
    found = made(tmp_path, **empty, finished=False, seconds=dict.fromkeys(measured, 1.0))
    expected = {HEADINGS[STAGES.index(name)] for name in measured}
    expected |= {HEADINGS[3]} if "parts" in measured else set()
    tables = reported(capsys, found)
    assert set(tables) & set(HEADINGS) == expected
    columns = list(zip(*tables.get(HEADINGS[3], []), strict=True))
    assert all(any(column[1:]) for column in columns if column[0])
    assert (tmp_path / "picture.png").exists() is ("lines" in measured)
    assert all(name in read(found) for name in measured)


def test_what_models_say_is_text_in_the_report(capsys, tmp_path, real_picture):
    nasty = "| <script>x</script> `a` **b** [c](d)\n# e\n| --- | &lt; $\\f$ ~~g~~ \\"
    one = asked(1, base=said(nasty), adapter=said("fine"), reference=nasty, checks={}, kind=nasty)
    one.messages[1]["content"] = nasty
    found = made(tmp_path, exchanges=[one], adapter=nasty, system=nasty)
    (rows,) = [rows for rows in reported(capsys, found).values() if rows[0][-1] == "reference"]
    assert len(rows) == 2 and rows[1][1] == "fine"
    assert not re.search(r"(?<!\\)<(?!br>)|\n# e|(?<!\\)[`*]+[ab]", read(found))


def test_the_picture_shows_what_the_tables_have(capsys, tmp_path, monkeypatch, real_picture):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, _: figures.append(self))
    tables = reported(capsys, made(tmp_path))

    def xs(axes):
        points = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
        return [float(one[0]) for one in points if len(one) == 1]

    def numbers(rows, column):
        return [float(row[column].rstrip(" %") or 0) for row in rows]

    gains, strengths, parts = figures[0].axes
    assert xs(gains) == pytest.approx(numbers(tables["Held-out replies"][1:], 4), abs=1e-4)
    assert np.sort(xs(parts)) == pytest.approx(np.sort(numbers(tables["Parts"][1:], 2)), abs=0.1)
    (curve,) = [line for line in strengths.lines if len(line.get_xdata()) > 2]
    rows = tables[HEADINGS[3]][1:-1]
    assert curve.get_xdata() == pytest.approx(numbers(rows, 5), abs=1e-4)
    assert curve.get_ydata() == pytest.approx(numbers(rows, 2), abs=0.1)


@pytest.mark.parametrize("content", ["{", '{"schema": 2}', '{"schema": 3}', "[]"])
def test_a_folder_without_a_record_is_named(capsys, tmp_path, content):
    (tmp_path / "evidence.json").write_text(content)
    assert refused(capsys, ["report", tmp_path], f"{tmp_path}/evidence.json", main=main).out == ""
