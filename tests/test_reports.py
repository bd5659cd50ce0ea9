"""`report`: what a record becomes on the terminal, in report.md, in the picture and the page."""

import json
import math
import re
import sys
from operator import attrgetter

import pytest
import scipy.stats
from made_records import (
    KINDS,
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
from runs import command

from inspect_lora import findings, picture, report, results, tables
from inspect_lora.__main__ import main
from inspect_lora.intervals import Estimate
from inspect_lora.readings import Reading, preference_of

STAGES = ("lines", "parts", "shifts", "exchanges")
NOTHING = {"lines": [], "pairs": [], "parts": [], "part_lines": [], "shifts": [], "exchanges": []}
BEST = {"settings": {"FINAL_LORA": "best"}, "data": {"held_out": {"sha256": "12ab"}}}


def reported(capsys, stored):
    """Give `report` on a record; return the tables of report.md by their headings."""
    put(stored)
    end = command(capsys, ["report", stored.folder], main)
    assert end.status == 0 and "replies.html" in end.err
    return tables_of(read(stored))


def read(stored):
    return (stored.folder / "report.md").read_text(encoding="utf-8")


def told_of(stored):
    return results.results_of(stored)


def numbers_in(text):
    return re.findall(r"[+-]?\d+\.?\d*", text)


def ends(estimate):
    return estimate.value, estimate.low, estimate.high


def test_a_report_comes_out_the_same_again(capsys, tmp_path, real_picture):
    """A blind reading names prompts and replies of the page."""
    stored, written = made(tmp_path), []
    for _ in range(2):
        reported(capsys, stored)
        written.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert written[0] == written[1] and len(written[0]) == 5
    assert all(written[0][f"{name}.png"].startswith(b"\x89PNG") for name in ("picture", "parts"))


# ---- The first lines


def judged(number, base=None, **passes):
    """Return an exchange in which the adapter passes these checks, and the base all or others."""
    before = dict.fromkeys(passes, True) | (base or {})
    rules = {name: {"most_words": 9} for name in passes}
    return asked(number, checks=rules, base=said("a b", before), adapter=said("c", passes))


def test_the_title_and_findings_count_what_passes_on_both_sides(tmp_path):
    """A check that got worse, one that still fails, one that improved, and one of neither."""
    rows = [
        judged(
            n,
            base={"long": n > 29, "never": False, "odd": n > 0},
            **{"worse": n > 14, "long": n > 2, "never": False, "odd": n > 1},
        )
        for n in range(40)
    ]
    told = told_of(made(tmp_path, exchanges=rows))
    title, lines = findings.title_of(told), findings.findings_of(told)
    assert re.findall(r'"(\w+)"', title) == ["worse", "never", "long"]
    assert " ".join(numbers_in(title)) == "25 40 40 40 0 40 0 40 37 40 10 40"
    assert ("worse" in title, "still" in title, "improved" in title) == (True, True, True)
    p = {check.name: f"{check.family_p:.3f}" for check in told.checks}
    wilson = scipy.stats.binomtest(25, 40).proportion_ci(method="wilson")
    percents = [f"{100 * end:.0f}" for end in (0.625, wilson.low, wilson.high)]
    assert numbers_in(lines["worse"]) == ["25", "40", "40", "40", *percents, "0.001"]
    assert numbers_in(lines["unchanged"]) == ["38", "40", "39", "40", p["odd"]]
    clear = [re.findall("not clear|clear", line) for line in lines.values()]
    assert clear == [["clear"], ["not clear"], ["clear"], ["not clear"], [], []]


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
    title = findings.title_of(told_of(made(tmp_path, **facts)))
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


@pytest.mark.parametrize(("known", "seeds"), [({}, []), ({"SEED": 7}, ["7"])])
def test_the_first_line_has_the_seed_and_the_independent_lines(tmp_path, known, seeds):
    """Sixty replies of thirty conversations."""
    stored = made(tmp_path, known=known, exchanges=[asked(n) for n in range(30)], adapter="x")
    for number, line in enumerate(stored.lines):
        line.cluster = f"talk {number // 2}"
    assert numbers_in(findings.first_line(told_of(stored))) == [*seeds, "60", "30", "30"]


def test_the_intervals_that_are_shown_are_counted(capsys, tmp_path):
    """In report.md itself; nineteen lines have none."""
    rows = [judged(n, many=n > 3) for n in range(30)] + [judged(n, few=True) for n in range(19)]
    pairs = [pair_of(n, (-30, -20), (-20 - n % 3, -20)) for n in range(40)]
    stored = made(tmp_path, exchanges=rows, pairs=pairs)
    reported(capsys, stored)
    shown = len(re.findall(r"\(-?[\d.]+ to -?[\d.]+\) \|", read(stored)))
    told = findings.not_covered(told_of(stored))
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
    assert set(findings.cautions_of(told_of(stored))) == reasons


def test_a_blind_reading_that_was_stopped_lowers_trust(tmp_path):
    reading = Reading("Ann", False, ("base", "adapter"), (preference_of("", [0]),), {})
    told = results.results_of(made(tmp_path), [reading])
    assert "readings" in findings.cautions_of(told)


# ---- Estimates


def test_losses_of_all_replies_and_of_each_kind(tmp_path):
    stored = made(tmp_path, trained_kinds={"emergency": 9, "all": 1})
    for line in stored.lines:
        line.adapter += line.tokens * KINDS.index(line.kind)
    whole, *kinds = told_of(stored).gain
    assert [(row.kind, row.is_trained) for row in kinds] == [
        ("all", True), ("emergency", True), ("everyday", False)
    ]  # fmt: skip
    for row in (whole, *kinds):
        lines = [line for line in stored.lines if row is whole or line.kind == row.kind]
        tokens = sum(line.tokens for line in lines)
        base = sum(line.base for line in lines) / tokens
        adapter = sum(line.adapter for line in lines) / tokens
        expected = (len(lines), *map(pytest.approx, (base, adapter, base - adapter)))
        assert (row.replies, row.base, row.adapter, row.gain.value) == expected


@pytest.fixture
def of_conversations(tmp_path):
    """Return a record of conversations of one kind, its lines that measure parts, and results."""
    stored = made(tmp_path, 120)
    for number, line in enumerate(stored.lines):
        line.cluster = f"conversation {number // 4}"
        line.kind = "one"  # several kinds have another error: tests/test_intervals.py
    return stored, [stored.lines[number] for number in stored.part_lines], told_of(stored)


def test_strengths_and_parts_are_paired_with_the_adapter_as_trained(of_conversations):
    """By the jackknife over conversations, on the lines that measure parts."""
    stored, lines, told = of_conversations
    tokens, clusters = [line.tokens for line in lines], [line.cluster for line in lines]
    effects = {row.name: row for row in (*told.strengths, *told.parts)}
    for part in stored.parts:
        pairs = list(zip(lines, part.losses, strict=True))
        cost = jackknife([loss - line.adapter for line, loss in pairs], tokens, clusters)
        gain = jackknife([line.base - loss for line, loss in pairs], tokens, clusters)
        effect = effects[f"cut to {part.name}" if part.family == "cut" else part.name]
        if part.family != "alone":
            assert ends(effect.cost) == pytest.approx(cost)
        if part.family == "strength":
            assert ends(effect.gain) == pytest.approx(gain)
        if part.family == "alone":
            assert ends(effect.alone) == pytest.approx(gain)
    names = ["attention", "q_proj", "cut to 2 of 8", "cut to 4 of 8"]
    assert [row.name for row in told.parts] == names


def test_other_tasks_are_measured_at_each_strength(of_conversations):
    stored, _, told = of_conversations
    names = ["x 0.5", "x 0.75", "as trained", "x 1.5"]
    assert [row.name for row in told.strengths] == names
    for shift, row in zip(stored.shifts, told.strengths, strict=True):
        for estimate, sums in ((row.kl, shift.kl), (row.changed, shift.changed_tokens)):
            assert ends(estimate) == pytest.approx(jackknife(sums, shift.tokens, range(30)))


def test_the_base_is_measured_as_it_is_served(tmp_path):
    """It loses 0.36 nats a token by the adapter's template, and that is no gain."""
    stored = made(tmp_path, 60)
    for line in stored.lines:
        line.served_base = line.base - 0.36 * line.tokens
    told = told_of(stored)
    tokens = sum(line.tokens for line in stored.lines)
    gain = sum(line.base - line.adapter for line in stored.lines) / tokens - 0.36
    assert told.gain[0].gain.value == pytest.approx(gain)
    assert told.template_effect.value == pytest.approx(0.36)
    lines = [stored.lines[number] for number in stored.part_lines]
    part_gain = sum(line.served_base - line.adapter for line in lines)
    assert told.part_gain.value == pytest.approx(part_gain / sum(line.tokens for line in lines))
    assert told.gain[0].base == pytest.approx(3.64)
    assert told_of(made(tmp_path)).template_effect is None


def test_what_was_drawn_by_kind_is_estimated_as_drawn(tmp_path):
    """The lines of the parts; all held-out lines are no draw, and have the wider interval."""
    stored = made(tmp_path, 120)
    for line in stored.lines:
        line.adapter -= 2 * KINDS.index(line.kind) * line.tokens
    told, errors = told_of(stored), []
    lines = [stored.lines[number] for number in stored.part_lines]
    for group, found in ((lines, told.part_gain), (stored.lines, told.gain[0].gain)):
        gains = [line.base - line.adapter for line in group]
        tokens, kinds = [line.tokens for line in group], [line.kind for line in group]
        value, error = stratified(gains, tokens, kinds)
        assert found.value == pytest.approx(value)
        errors.append((found.high - found.low) / 2 / error)
    assert 1.95 < errors[0] < 2.2 and errors[1] > 3


def test_replies_that_ended_and_empty_ones_are_counted(tmp_path):
    rows = [
        asked(1, base=said(" \n"), adapter=said("one two")),
        asked(2, base=said("a b c d", ended=False), adapter=said("a")),
        asked(3, base=said("one two"), adapter=said("one two")),
        asked(4, base=said("one"), adapter=said("one"), source="tasks"),
    ]
    stored = made(tmp_path, exchanges=[*rows])
    for exchange in stored.exchanges:
        exchange.checks = {}
    base, adapter, *_ = told_of(stored).replies
    counts = [(row.replies, row.ended, row.same, row.empty, row.words) for row in (base, adapter)]
    assert counts == [(3, 2, 1, 1, 2), (3, 3, 2, 0, pytest.approx(5 / 3))]


@pytest.mark.parametrize("facts", [{"count": 60}, {"count": 1}, NOTHING], ids=str)
def test_estimates_are_plain_and_finite(tmp_path, facts):
    """Of one line the ends of an interval are not known: None, as JSON has no infinity."""
    told = results.as_plain(told_of(made(tmp_path, **facts)))
    told = json.loads(json.dumps(told, allow_nan=False))
    for row in told["gain"][:1]:
        assert (row["gain"]["low"] is None) is (facts["count"] == 1)


# ---- Tables


CELLS = {  # of tables, whose rows are those of results: what a column shows
    "checks": {
        "replies": "passed.count", "base": "passed.before", "adapter": "passed.after",
        "lost": "passed.lost", "won": "passed.won", "change, 95 %": "passed.change",
        "p, Holm": "family_p",
    },
    "couples": {
        "number": "couples", "base": "base", "adapter": "adapter", "change, 95 %": "change",
        "base above 0": "base_above", "adapter above 0": "adapter_above", "p, Holm": "family_p",
    },
    "pairs": {
        "number": "pairs", "shift, 95 %": "shift", "base": "likelier.before",
        "adapter": "likelier.after", "p, Holm": "family_p",
    },
    "gain": {"replies": "replies", "base": "base", "adapter": "adapter", "gain, 95 %": "gain"},
    "strengths": {
        "gain, 95 %": "gain", "cost, 95 %": "cost", "other token": "changed", "KL, 95 %": "kl",
    },
    "parts": {"cost, 95 %": "cost", "alone, 95 %": "alone"},
}  # fmt: skip
IN_PERCENT = {"other token", "base above 0", "adapter above 0"}


def pairs_and_couples(count):
    pairs, couples = [], []
    for n in range(count):
        pairs.append(pair_of(n, (-30, -29 - n % 2), (-20 - n % 3, -21), (9 + n // 20, 10)))
        couples.append(couple_of(n, (-20, -20 - n % 2, -24, -23), (-15 - n % 3, -20, -20, -23)))
    return {"pairs": pairs, "couples": couples}


@pytest.mark.parametrize("name", CELLS)
def test_each_column_shows_what_it_says(tmp_path, name):
    rows = [asked(n, before=n < 37, after=n > 4) for n in range(40)]
    told = told_of(made(tmp_path, exchanges=rows, **pairs_and_couples(30)))
    (table,) = [table(told) for table in tables.TABLES if table.__name__ == f"{name}_table"]
    for row, cells in zip(getattr(told, name), table.rows, strict=True):
        for column, field in CELLS[name].items():
            shown, value = numbers_in(str(cells[column])), attrgetter(field)(row)
            expected = ends(value) if isinstance(value, Estimate) else (value,)
            assert len(shown) == (0 if value is None else len(expected)), column
            scale = 100 if column in IN_PERCENT or field == "passed.change" else 1
            for text, number in zip(shown, expected, strict=False):
                last_digit = 10 ** -len(text.partition(".")[2])
                assert float(text) == pytest.approx(scale * number, abs=last_digit), column


@pytest.mark.parametrize("name", ["checks", "pairs"])
def test_of_fewer_than_twenty_lines_no_interval_is_shown(tmp_path, name):
    rows = [asked(n, after=n > 2) for n in range(19)]
    told = told_of(made(tmp_path, exchanges=rows, **pairs_and_couples(19)))
    (table,) = [table for table in tables.tables_of(told) if table.name == name]
    assert {" to " in str(cell) for row in table.rows for cell in row.values()} == {False}
    assert {row["p, Holm"] for row in table.rows} == {""}


def test_perplexities_are_those_of_the_losses(tmp_path):
    told = told_of(made(tmp_path))
    expected = [f"{math.exp(loss):.3g}" for loss in (told.gain[0].base, told.gain[0].adapter)]
    assert numbers_in(tables.gain_table(told).rows[0]["perplexity"]) == expected
    assert numbers_in(findings.loss_line(told))[-2:] == expected


@pytest.mark.parametrize("learned", [None, 7])
def test_what_the_adapter_learned_is_counted_or_not_known(tmp_path, learned):
    """Nothing says 0 where it is not known."""
    left_out = report.provenance_of(made(tmp_path, learned=learned, too_long=5, refused=3))
    numbers = numbers_in(left_out["left out"])
    assert numbers == ([] if learned is None else [str(learned)]) + ["5", "3"]


@pytest.mark.parametrize("missing", [STAGES, STAGES[1:], STAGES[3:], ("lines", "parts")])
def test_a_report_holds_what_was_measured(capsys, tmp_path, missing):
    """A measurement was stopped somewhere, or there were prompts without replies."""
    empty = {name: [] for name in missing} | ({"part_lines": []} if "parts" in missing else {})
    shown = reported(capsys, made(tmp_path, **empty, finished=False))
    of_stages = {"Held-out replies": "lines", "Parts": "parts", "Checks": "exchanges"}
    assert {name for name in of_stages if name in shown} == {
        name for name, stage in of_stages.items() if stage not in missing
    }
    assert ("Strength, and other tasks" in shown) is not {"parts", "shifts"}.issubset(missing)
    assert (tmp_path / "picture.png").exists() is ("lines" not in missing)


# ---- The terminal, the replies


def test_a_table_that_is_too_wide_loses_no_column():
    rows = [{f"column {n}": f"cell {n} of row {row}" for n in range(9)} for row in range(12)]
    lines = tables.as_text(tables.Table("wide", "Wide", rows), 60, 8)
    assert max(map(len, lines)) <= 60
    shown = "\n".join(lines)
    for n in range(9):
        assert f"column {n}" in shown and f"cell {n} of row 7" in shown
    assert "of row 8" not in shown and "4 more" in shown


def test_examples_are_drawn_whatever_the_replies_are(tmp_path):
    rows = [asked(n) for n in range(40)]
    shown = report.examples_of(made(tmp_path, exchanges=rows))
    failing = [asked(n, after=False) for n in range(40)] + [asked(1, source="tasks")]
    others = report.examples_of(made(tmp_path, exchanges=failing[::-1]))
    assert len(shown) == 3 and {one.where for one in shown} == {one.where for one in others}


def test_what_models_say_is_text_in_the_report(capsys, tmp_path, real_picture):
    nasty = "| <script>x</script> `a` **b** [c](d)\n# e\n| --- | &lt; $\\f$ ~~g~~ \\"
    replies = {"base": said(nasty, {nasty: True}), "adapter": said("fine", {nasty: False})}
    exchange = asked(1, **replies, reference=nasty, rejected=nasty, checks={nasty: {}}, kind=nasty)
    exchange.messages[1]["content"] = nasty
    stored = made(tmp_path, exchanges=[exchange], adapter=nasty, system=nasty)
    reported(capsys, stored)
    assert not re.search(r"(?<!\\)<(?!br>)|\n# e|(?<!\\)[`]+[ab]|\*\*b|(?<!\\)\[c", read(stored))
    assert read(stored).count("<br>") >= 3


def test_without_matplotlib_an_older_picture_stays_if_the_record_is_the_same(
    capsys, tmp_path, monkeypatch, real_picture
):
    stored, drawn = made(tmp_path), tmp_path / "picture.png"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    reported(capsys, stored)
    assert "](picture.png)" not in read(stored) and not drawn.exists()
    drawn.write_bytes(b"drawn before")
    reported(capsys, stored)
    assert "](picture.png)" in read(stored) and drawn.exists()
    report.write(stored, told_of(stored))
    assert "](picture.png)" not in read(stored) and not drawn.exists()


# ---- The pictures


def drawn_by(monkeypatch, stored, tmp_path):
    """Return the axes of both pictures."""
    figures = []
    save = lambda figure, _: figures.append(figure)  # noqa: E731
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    picture.draw(told_of(stored), tmp_path / "picture.png", tmp_path / "parts.png")
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
    told, near = told_of(stored), pytest.approx
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
    told = told_of(stored)
    costs = [row.cost.value for row in told.strengths if row.cost]
    assert [x for x, *_ in marks_of(strengths, "s")] == costs and len(costs) == 3
    assert [x for x, *_ in marks_of(parts, "s")] == [row.cost.value for row in told.parts]
