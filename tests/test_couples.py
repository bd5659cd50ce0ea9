"""Couples of held-out lines: how likely each reply is after the prompt of its counterpart."""

import pytest
from by_hand import ROUNDING, losses_of_peft
from records import SHORT, evidence, line_numbers, say_origin
from runs import refused, talk, write_lines

from inspect_lora.__main__ import main


def line(name, number, counterpart=None, length=1, **more):
    """Return a line with an id, that may name another one."""
    named = {} if counterpart is None else {"counterpart": counterpart}
    return {"id": name, "messages": talk(number, length), "kind": f"kind {name}"} | named | more


@pytest.fixture
def measured(capfd, plain, tmp_path):
    def measure(rows, *words):
        path = write_lines(tmp_path / "own.jsonl", rows)
        return evidence(capfd, plain, tmp_path / "results", "--eval_file", path, *SHORT, *words)[0]

    return measure


def exchanged(asked, replied):
    return [*asked["messages"][:-1], replied["messages"][-1]]


def test_each_reply_is_as_likely_after_both_prompts_as_peft_alone_has_it(measured, plain):
    """The counterpart may come before or after, of any kind, and be named by a number."""
    rows = [line("a", 1, 7), line("x", 2), line(7, 3, length=3), line("c", 4, "x", length=2)]
    couples = measured(rows)["couples"]
    assert [(each["where"][-1], each["counterpart"][-1]) for each in couples] == [
        ("1", "3"), ("4", "2")
    ]  # fmt: skip
    assert [each["kind"] for each in couples] == ["kind a", "kind c"]
    for couple, (a, b) in zip(couples, ((rows[0], rows[2]), (rows[3], rows[1])), strict=True):
        conversations = {
            "own_a": a["messages"], "other_a": exchanged(a, b),
            "own_b": b["messages"], "other_b": exchanged(b, a),
        }  # fmt: skip
        sides = losses_of_peft(plain, conversations.values())
        for side, means in zip(("base", "adapter"), sides, strict=True):
            for name, mean in zip(conversations, means, strict=True):
                tokens = couple["tokens_a" if name in ("own_a", "other_b") else "tokens_b"]
                near = pytest.approx(-mean * tokens, abs=ROUNDING * tokens)
                assert couple[f"{side}_{name}"] == near, name
    assert len({each["id"] for each in couples}) == len({each["reply"] for each in couples}) == 2


def test_two_that_name_each_other_are_one_couple(measured):
    found = measured([line("a", 1, "b"), line("b", 2, "a"), line("c", 3)])
    assert line_numbers(found["couples"]) == [1] and found["couples_left_out"] == {}


def test_couples_that_share_a_line_count_as_one(measured):
    """Also where the shared line is a copy; and so do the lines of a couple."""
    copy = {"id": "copy", "messages": talk(2)}
    rows = [line("a", 1, "b"), line("b", 2), line("c", 3, "copy"), copy]
    rows += [line("d", 4, "e"), line("e", 5)]
    found = measured(rows)
    clusters = [couple["cluster"] for couple in found["couples"]]
    assert clusters[0] == clusters[1] != clusters[2]
    of_lines = [each["cluster"] for each in found["lines"]]
    assert len(set(of_lines[:4])) == len(set(of_lines[4:])) == 1 and len(set(of_lines)) == 2


def test_what_cannot_be_measured_is_left_out_and_counted(measured, plain):
    say_origin(plain, [talk(600)[:-1]])
    rows = [
        line("not there", 1, "nobody"), line("learned", 2, "b"), line("b", 600),
        line("too long", 3, "c"), line("c", 4, length=12), line("the same words", 5, "d"),
        line("d", 6, messages=[*talk(6)[:-1], talk(5)[-1]]), line("e", 7, "f"), line("f", 8),
    ]  # fmt: skip
    found = measured(rows, "--max_seq_len", 100)
    assert line_numbers(found["couples"]) == [8]
    reasons = ("not there", "learned", "too long", "the same words")
    assert found["couples_left_out"] == dict.fromkeys(reasons, 1)


def test_a_reply_that_is_too_long_after_the_other_prompt_is_left_out(measured):
    """Each line fits, and the long reply after the long prompt does not."""
    rows = [line("a", 1, "b", messages=[*talk(1, 9), *talk(2)[1:]]), line("b", 3, length=9)]
    assert measured(rows, "--max_seq_len", 400)["couples"]
    found = measured(rows, "--max_seq_len", 190)
    assert len(found["lines"]) == 3 and found["too_long"] == 0
    assert (found["couples"], found["couples_left_out"]) == ([], {"too long": 1})


def test_an_id_that_two_lines_have_is_no_counterpart(capfd, plain, tmp_path):
    rows = [line("a", 1, "b"), line("b", 2), line("b", 3)]
    path = write_lines(tmp_path / "own.jsonl", rows)
    argv = ["evidence", plain, "--device", "cpu", "--eval_file", path, *SHORT]
    refused(capfd, argv, "own.jsonl:1", "counterpart", main=main)
