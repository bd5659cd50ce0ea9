"""What the base lost and said is taken from an earlier record only if nothing else would come."""

import json
import os
import shutil

import pytest
from conftest import TINY
from on_tiny import SHORT, messages_of, read_json, save_adapter, write_lines
from tiny_adapters import change_config, command

import inspect_lora.base_side as base_side
import inspect_lora.evidence as evidence
import inspect_lora.replies as replies

CHECK = {"right": {"kind": "word", "answers": ["hello"]}}
WORDS = [word for word in SHORT if word != "--checks=0"]
WORDS += ["--samples", "2", "--max_new_tokens", "4"]


@pytest.fixture
def two(tmp_path, monkeypatch, no_picture):
    """Return two adapters of one base, and go where they are."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, tmp_path / "base")
    said = [("hello", "Oh, hello."), ("rain", "Tea?"), ("beans", "Already!")]
    rows = [{"messages": messages_of(one), "checks": CHECK} for one in said]
    write_lines(tmp_path / "held-out.jsonl", rows)
    for name, std in (("one", 0.1), ("other", 0.5)):
        folder = save_adapter(tmp_path / "out" / name, std=std)
        change_config(folder, base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path / "out"


@pytest.fixture
def ask(two, capsys, monkeypatch):
    """Return a function that measures an adapter and tells what the base was asked for."""

    def run(name, *more):
        asked = []
        losses, generate = evidence.losses_of, replies.generate
        again = []

        def watched_losses(model, examples, title):
            asked.extend([title] if title == "base" else [])
            return losses(model, examples, title)

        def watched_again(model, examples, title):
            again.extend(int(one.source.rpartition(":")[2]) for one in examples)
            return losses(model, examples, title)

        def watched_replies(model, chat_format, prompts, config, title, *seed):
            asked.extend([title] * len(prompts) if "base" in title else [])
            return generate(model, chat_format, prompts, config, title, *seed)

        with monkeypatch.context() as patch:
            patch.setattr(evidence, "losses_of", watched_losses)
            patch.setattr(base_side, "losses_of", watched_again)
            patch.setattr(replies, "generate", watched_replies)
            words = ["--eval_file", "held-out.jsonl", *WORDS, *more]
            end = command(capsys, "evidence", f"out/{name}", *words)
        assert end.status == 0, end.err
        found = read_json(two.parent / "inspected" / f"out--{name}" / "evidence.json")
        end.found, end.asked, end.again = found, asked, again
        end.report = (two.parent / "inspected" / f"out--{name}" / "report.md").read_text("utf-8")
        return end

    return run


ALL = ["base", *["checks, base"] * 3, *["samples, base"] * 2]


def of_base(found):
    losses = [row["base"] for row in found["losses"]]
    return losses, [row["base"] for row in found["replies"]], found["loss"]["base"]


def test_a_second_adapter_of_the_same_base_does_not_ask_it_again(ask, two):
    first = ask("one")
    assert first.asked == ALL and "are those in" not in first.said
    second = ask("other")
    assert second.asked == []
    where = "those in inspected/out--one/evidence.json"
    assert f"base its losses are {where}" in second.said
    assert f"base 3 of its 3 replies are {where}" in second.said
    assert f"base 2 of its 2 replies are {where}" in second.said
    losses, said, mean = of_base(first.found)
    assert of_base(second.found) == (pytest.approx(losses), said, pytest.approx(mean))
    shutil.rmtree(two.parent / "inspected")
    alone = ask("other")
    assert alone.asked == ALL
    for name in ("replies", "checks", "lower_on"):
        assert alone.found[name] == second.found[name]
    assert alone.found["gain"] == pytest.approx(second.found["gain"])


def test_other_prompts_and_lengths_are_asked_for(ask, two):
    ask("one", "--checks", "1", "--samples", "0")
    assert ask("other").asked == ALL[2:]  # one of three replies is known, and the losses
    assert ask("other", "--max_new_tokens", "5").asked == ALL[4:]
    rows = [json.loads(line) for line in (two.parent / "held-out.jsonl").open(encoding="utf-8")]
    write_lines(two.parent / "held-out.jsonl", [*rows[:2], {"messages": messages_of(("a", "b"))}])
    assert ask("one").asked == ["base", *["samples, base"] * 2]


@pytest.mark.parametrize("change", ["a file", "type", "versions", "a branch"])
def test_of_another_base_type_or_version_nothing_is_taken(ask, two, monkeypatch, change):
    ask("one")
    more = []
    if change == "a file":
        path = two.parent / "base" / "model.safetensors"
        os.utime(path, ns=(0, 0))
    if change == "type":
        more = ["--dtype", "bfloat16"]
    if change == "versions":
        monkeypatch.setattr("inspect_lora.base_side.script_sha256", lambda: "another")
    if change == "a branch":
        path = two.parent / "inspected" / "out--one" / "evidence.json"
        record = read_json(path)
        record["base_side"]["computed_with"] = {}
        path.write_text(json.dumps(record), encoding="utf-8")
        monkeypatch.setattr("inspect_lora.base_side.how_the_base_computes", lambda _: {})
    end = ask("other", *more)
    assert end.asked == ALL and "are those in" not in end.said


def test_of_a_record_that_lacks_a_row_no_loss_is_taken(ask, two):
    ask("one")
    path = two.parent / "inspected" / "out--one" / "evidence.json"
    record = read_json(path)
    record["losses"].pop()
    path.write_text(json.dumps(record), encoding="utf-8")
    assert ask("other").asked == ["base"]


NINE = [(f"hello {number}", "Oh, hello. " * (1 + number % 4)) for number in range(9)]


def change_loss(two, number, by):
    """Add so much to the base's loss of a reply in the record of the first adapter."""
    path = two.parent / "inspected" / "out--one" / "evidence.json"
    record = read_json(path)
    record["losses"][number]["base"] += by
    path.write_text(json.dumps(record), encoding="utf-8")


def test_three_losses_are_computed_again_and_the_report_says_where_all_come_from(ask, two):
    write_lines(two.parent / "held-out.jsonl", [{"messages": messages_of(one)} for one in NINE])
    first = ask("one", "--samples", "0")
    assert first.again == [] and "\n- losses of the base: measured now\n" in first.report
    losses = [row["base"] for row in first.found["losses"]]
    end = ask("other", "--samples", "0")
    assert end.asked == []
    lowest, highest = losses.index(min(losses)) + 1, losses.index(max(losses)) + 1
    assert end.again == sorted({lowest, 5, highest}) and len(end.again) <= 3
    where = f"inspected/out--one/evidence.json of {first.found['measured']}"
    assert f"- losses of the base: taken from {where}\n" in end.report.replace("\\", "")


@pytest.mark.parametrize(
    ("dtype", "by", "is_used"),
    [("float32", 9e-4, True), ("float32", 1.2e-3, False), ("float32", 5.0, False),
     ("float32", -5.0, False), ("float32", float("nan"), False),
     ("bfloat16", 2e-2, True), ("bfloat16", 0.1, False)],
)  # fmt: skip
def test_a_record_whose_losses_were_edited_is_not_used(ask, two, dtype, by, is_used):
    """Any large edit makes the highest loss or the lowest one; the fifth is looked at anyway."""
    write_lines(two.parent / "held-out.jsonl", [{"messages": messages_of(one)} for one in NINE])
    ask("one", "--dtype", dtype)
    for number in (4, 2):
        if number == 2 and abs(by) != 5:
            continue
        change_loss(two, number, by)
        end = ask("other", "--dtype", dtype)
        assert (end.asked == []) is is_used
        said = "inspected/out--one/evidence.json has the loss "
        is_said = by == by  # what is no number makes the record damaged
        assert (said in end.said) is (not is_used and is_said)
        assert ("so that file is not used" in end.said) is (not is_used and is_said)
        assert ("losses of the base: measured now" in end.report) is not is_used
        shutil.rmtree(two.parent / "inspected" / "out--other")
        change_loss(two, number, -by)
