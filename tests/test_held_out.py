"""By which lines an adapter is judged: its run's own, none that it learned, and each once."""

import argparse
import json

import pytest
from conftest import ROOT, write_short_data
from on_tiny import (
    SHORT,
    change_record,
    copy_of_run,
    measure,
    messages_of,
    read_json,
    save_adapter,
    write_held_out,
    write_lines,
)
from tiny_adapters import command
from trainers import prepared
from trainers import run as train

from inspect_lora import held_out
from inspect_lora.common import InspectError, file_sha256
from inspect_lora.conversations import read_held_out, read_prompts
from inspect_lora.files import Run, find_run
from inspect_lora.held_out import lines_that_count
from inspect_lora.trainer import Example


@pytest.fixture
def ours(finished, tmp_path, no_picture):
    """Return a copy of a finished run's output folder that wrote what it held out itself.

    Its held-out file is held_out.jsonl there, as with EVAL_FILE "10%".
    """
    output = copy_of_run(finished, tmp_path / "output")
    facts = read_json(output / "run.json")["data"]
    text = (ROOT / facts["held_out"]["file"]).read_text(encoding="utf-8")
    (output / "held_out.jsonl").write_text(text, encoding="utf-8")
    facts["held_out"]["file"] = str(output / "held_out.jsonl")
    change_record(output, data=facts)
    return output


@pytest.fixture
def evidence(ours, capsys):
    """Return a function that measures that run's adapter and returns what was said and found."""

    def run(*more):
        end = command(capsys, "evidence", ours / "final_lora", *SHORT, *more)
        path = ours / "inspected" / "final_lora" / "evidence.json"
        end.found = read_json(path) if end.status == 0 else None
        return end

    return run


def trained_lines(ours):
    path = read_json(ours / "run.json")["data"]["train"]["file"]
    return (ROOT / path).read_text(encoding="utf-8").splitlines(keepends=True)


def lines_of(found):
    return [int(row["where"].rpartition(":")[2]) for row in found["losses"]]


def fact(report, name):
    return [line for line in report.splitlines() if line.startswith(f"- {name}: ")]


# ==== The run's own file


def test_the_file_of_the_run_itself_is_taken_though_a_later_run_renamed_it(ours, evidence):
    """A later run into the same folder puts its own there, which holds lines that this learned."""
    own = ours / "held_out.jsonl.2026-11-28-101112"
    (ours / "held_out.jsonl").rename(own)
    (ours / "held_out.jsonl").write_text("".join(trained_lines(ours)[:4]), encoding="utf-8")
    end = evidence()
    assert end.status == 0, end.err
    assert end.found["held_out"]["file"] == str(own) and len(end.found["losses"]) == 4
    assert end.found["held_out"]["sha256"] == file_sha256(own)
    assert "warning" not in end.said and "left out" not in end.said


def test_where_it_is_nowhere_a_file_is_asked_for(ours, evidence, tmp_path):
    (ours / "held_out.jsonl").unlink()
    end = evidence()
    assert end.status == 1 and "held_out.jsonl, and no *.jsonl file beside" in end.err
    assert "with --eval_file" in end.err
    path = write_held_out(tmp_path / "own.jsonl")
    assert len(evidence("--eval_file", path).found["losses"]) == 5


@pytest.mark.parametrize(
    ("name", "is_found"),
    [
        ("what-was-held-out.jsonl", True), ("kept.jsonl.old", True),
        ("kept.json", False), ("deeper/held_out.jsonl", False),
    ],
)  # fmt: skip
def test_it_is_found_by_its_hash_whatever_its_name(ours, evidence, name, is_found):
    (ours / "deeper").mkdir()
    own = (ours / "held_out.jsonl").rename(ours / name)
    write_held_out(ours / "another.jsonl")
    end = evidence()
    assert (end.status == 0) is is_found, end.err
    if is_found:
        assert end.found["held_out"]["file"] == str(own) and len(end.found["losses"]) == 4


def test_no_large_file_is_hashed_in_search_of_it(ours, monkeypatch):
    record = read_json(ours / "run.json")
    run, facts = Run(ours / "run.json", record), record["data"]["held_out"]
    size = (ours / "held_out.jsonl").stat().st_size
    monkeypatch.setattr(held_out, "LARGEST_SEARCHED", size - 1)
    assert held_out.find_held_out_file(run, facts)[1]  # it is where it was
    own = (ours / "held_out.jsonl").rename(ours / "kept.jsonl")
    monkeypatch.setattr(held_out, "LARGEST_SEARCHED", size)
    assert held_out.find_held_out_file(run, facts) == (str(own), True)
    monkeypatch.setattr(held_out, "LARGEST_SEARCHED", size - 1)
    with pytest.raises(InspectError, match=r"no .*jsonl file beside"):
        held_out.find_held_out_file(run, facts)


def test_one_that_may_not_be_read_is_told(ours, evidence, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied")

    read = held_out.file_sha256
    own = ours / "held_out.jsonl"
    monkeypatch.setattr(
        held_out, "file_sha256", lambda path: (refuse if path == own else read)(path)
    )
    bytes_of = type(own).read_bytes
    monkeypatch.setattr(
        type(own), "read_bytes", lambda path: (refuse if path == own else bytes_of)(path)
    )
    end = evidence()
    assert end.status == 1 and "held_out.jsonl" in end.err and "Permission denied" in end.err


def test_other_conversations_in_its_place_are_refused(ours, evidence):
    write_held_out(ours / "held_out.jsonl", [("rain", "Tea, then?")])
    end = evidence()
    assert end.status == 1 and "held_out.jsonl is not what the run held out" in end.err
    assert "with --eval_file" in end.err and not (ours / "inspected" / "final_lora").exists()


def test_checks_may_be_added_to_its_lines(ours, evidence):
    """It is told that they cannot be compared with what was held out, and losses are the same."""
    before = evidence()
    note = "It has as many replies and tokens as the run held out; whether they are the same"
    assert note not in before.said
    before = before.found
    rows = [json.loads(line) for line in (ours / "held_out.jsonl").open(encoding="utf-8")]
    for row in rows:
        row["checks"] = {"rings": {"kind": "word", "answers": ["999"]}}
    write_lines(ours / "held_out.jsonl", rows)
    end = evidence("--checks", "2")
    assert end.status == 0 and "warning" not in end.said, end.err
    report = (ours / "inspected" / "final_lora" / "report.md").read_text(encoding="utf-8")
    assert note in end.said and len(fact(report, "note")) == 1
    assert note in fact(report, "note")[0] and end.found["held_out"]["learned"] == "none"
    assert end.found["checks"]["rings"]["lines"] == 2
    assert end.found["losses"] == before["losses"]
    assert end.found["held_out"]["sha256"] != before["held_out"]["sha256"]
    hashes = [one["held_out"]["conversations_sha256"] for one in (end.found, before)]
    assert hashes[0] == hashes[1]


# ==== What the adapter learned


def test_lines_of_the_training_file_are_named_and_left_out(ours, evidence, tmp_path):
    rows = [{"messages": messages_of(("who rang?", "Nobody yet."))}]
    rows += [json.loads(line) for line in trained_lines(ours)[2:4]]
    path = write_lines(tmp_path / "mixed.jsonl", rows)
    end = evidence("--eval_file", path)
    assert end.status == 0 and lines_of(end.found) == [1]
    assert "left out 2 of 3 held-out replies stand in" in end.said
    assert "on which the adapter was trained: " in end.said
    assert f"{path}:2" in end.said.replace(" ", "") and "mixed.jsonl:3" in end.said


def test_lines_of_the_training_file_are_known_without_their_system_message(
    ours, evidence, tmp_path
):
    rows = [json.loads(line) for line in trained_lines(ours)[2:6]]
    rows = [{"messages": row["prompt"] + row["completion"]} for row in rows]
    assert all(row["messages"][0]["role"] == "system" for row in rows)
    for row in rows[:2]:
        del row["messages"][0]
    rows[2]["messages"][-1]["content"] += "\n"
    rows[3]["messages"][-1]["content"] += " Yes."  # another reply
    end = evidence("--eval_file", write_lines(tmp_path / "mixed.jsonl", rows))
    assert end.status == 0 and lines_of(end.found) == [4]
    assert "left out 3 of 4 held-out replies stand in" in end.said


def test_of_the_training_file_itself_nothing_is_left(ours, evidence):
    path = read_json(ours / "run.json")["data"]["train"]["file"]
    end = evidence("--eval_file", path)
    assert end.status == 1 and "was trained, so none is left" in end.err
    assert "with --eval_file" in end.err


@pytest.fixture
def changeable(ours, tmp_path):
    """Return the run's training file, copied to where a test may change it."""
    facts = read_json(ours / "run.json")["data"]
    path = tmp_path / "learned.jsonl"
    path.write_text("".join(trained_lines(ours)), encoding="utf-8")
    facts["train"]["file"] = str(path)
    change_record(ours, data=facts)
    return path


UNKNOWN = "so it is not known whether it learned"


def test_of_a_training_file_that_changed_its_lines_are_left_out_as_well(
    ours, evidence, changeable, tmp_path
):
    """The line that was added counts as learned, and the one that was removed is not known."""
    was = trained_lines(ours)
    added = {"messages": messages_of(("one more", "Yes."))}
    changeable.write_text("".join(was[1:]) + json.dumps(added) + "\n", encoding="utf-8")
    rows = [*map(json.loads, was), added, {"messages": messages_of(("who rang?", "Nobody."))}]
    end = evidence("--eval_file", write_lines(tmp_path / "mixed.jsonl", rows))
    assert end.status == 0 and lines_of(end.found) == [1, 15]
    assert "left out 13 of 15 held-out replies stand in" in end.said
    assert "more. It has changed since the run, and lines that were added count as l" in end.said
    doubt = f"has changed since the run, {UNKNOWN} others"
    assert end.said.count(doubt) == 1 and end.found["held_out"]["learned"] == "not known"
    report = (ours / "inspected" / "final_lora" / "report.md").read_text(encoding="utf-8")
    (_, said) = fact(report, "learned lines")
    assert said.endswith("has changed since the run: it may have learned others")
    assert doubt in report and "13 of 15 held-out replies stand in" in report


def test_of_a_training_file_that_only_grew_nothing_is_left(ours, evidence, changeable):
    with changeable.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": messages_of(("one more", "Yes."))}) + "\n")
    end = evidence("--eval_file", changeable)
    assert end.status == 1 and "14 of 14 held-out replies stand in" in end.err
    assert "so none is left. It has changed since the run, and lines that were added" in end.err
    assert "with --eval_file" in end.err


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "is not there any more"), ("", "cannot be read any more"),
        ('{"prompt": 5}\n', "has 1 line that cannot be read"),
    ],
)  # fmt: skip
def test_a_training_file_that_tells_nothing_is_told(
    ours, evidence, changeable, tmp_path, content, fault
):
    assert evidence().found["held_out"]["learned"] == "none"
    changeable.unlink() if content is None else changeable.write_text(content, encoding="utf-8")
    end = evidence()
    assert end.status == 0 and len(end.found["losses"]) == 4 and UNKNOWN not in end.said
    assert end.found["held_out"]["learned"] == "not compared"
    report = (ours / "inspected" / "final_lora" / "report.md").read_text(encoding="utf-8")
    assert f"the run held these replies out; its training file {fault}" in report
    end = evidence("--eval_file", ours / "held_out.jsonl")  # the same, if it is named
    assert end.status == 0 and end.found["held_out"]["learned"] == "not compared"
    end = evidence("--eval_file", write_held_out(tmp_path / "own.jsonl"))
    assert end.status == 0 and f"{fault}, {UNKNOWN} some of these replies" in end.said
    assert end.found["held_out"]["learned"] == "not known"


# ==== A run that held out some per cent of its training file


@pytest.fixture
def split(ours, tmp_path):
    """Make that run one with EVAL_FILE "10%" of fifty lines, of which twenty were held out."""
    rows = [{"messages": messages_of((f"question {n}", f"Reply {n}."))} for n in range(50)]
    train = tmp_path / "fifty.jsonl"
    write_lines(train, rows)
    job = prepared([*write_short_data(tmp_path), "--train_file", train, "--eval_file", "10%",
                    "--output_dir", ours])  # fmt: skip
    (ours / "held_out.jsonl").write_bytes(job.held_out_content)
    facts = read_json(ours / "run.json")
    change_record(ours, data=job.data, settings=facts["settings"] | {"EVAL_FILE": "10%"})
    return train


def test_what_a_percentage_held_out_of_the_training_file_was_not_learned(ours, evidence, split):
    """Its lines stand in TRAIN_FILE, and were not trained on."""
    end = evidence()
    assert end.status == 0 and len(end.found["losses"]) == 20, end.err
    assert "left out" not in end.said and "note" not in end.said
    end = evidence("--eval_file", split)
    assert len(end.found["losses"]) == 20 and "30 of 50 held-out replies stand in" in end.said


def rows_in(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def with_checks(path):
    checks = {"rings": {"kind": "word", "answers": ["999"]}}
    write_lines(path, [row | {"checks": checks} for row in rows_in(path)])


def test_checks_may_be_added_to_what_a_percentage_held_out(ours, evidence, split):
    """It is held out of TRAIN_FILE again, so the conversations themselves are compared."""
    with_checks(ours / "held_out.jsonl")
    end = evidence("--checks", "1")
    assert end.status == 0 and len(end.found["losses"]) == 20, end.err
    assert "note" not in end.said and end.found["checks"]["rings"]["lines"] == 1


def test_learned_lines_of_the_same_sums_are_refused(ours, evidence, split):
    """Two questions of two digits have as many tokens: three sums do not tell them apart."""
    path = ours / "held_out.jsonl"
    own, all_of_them = rows_in(path), rows_in(split)
    learned = [row for row in all_of_them if row not in own]
    number = next(n for n, row in enumerate(own) if len(str(row)) == len(str(learned[-1])))
    write_lines(path, [*own[:number], learned[-1], *own[number + 1 :]])
    end = evidence()
    assert end.status == 1 and "1 other reply stands there now" in end.err
    assert "and 1 of 20 replies is missing" in end.err and "with --eval_file" in end.err
    write_lines(path, own[1:])
    assert "0 other replies stand there now, and 1 of 20" in evidence().err


def test_where_the_training_file_grew_what_is_held_out_now_is_not_all_taken(
    ours, evidence, split, tmp_path
):
    """Ten times the lines: 10 % of them are more than were held out, and many were learned."""
    own = rows_in(ours / "held_out.jsonl")
    more = [{"messages": messages_of((f"other {n}", f"Reply {n}."))} for n in range(450)]
    learned = [row for row in rows_in(split) if row not in own]
    write_lines(split, [*rows_in(split), *more])
    end = evidence()  # by its bytes it is what was held out
    assert len(end.found["losses"]) == 20 and UNKNOWN not in end.said
    mixed = write_lines(tmp_path / "mixed.jsonl", [*learned, *own])
    end = evidence("--eval_file", mixed)
    assert lines_of(end.found) == [*range(31, 51)]
    assert f"has changed since the run, {UNKNOWN} others" in end.said


# ==== Which run an adapter comes from


def test_a_checkpoint_that_a_later_run_renamed_is_known_by_its_losses(
    ours, evidence, capsys, tmp_path
):
    """The script renames checkpoints and run.json, each with the time of its own last change."""
    flags = [*write_short_data(tmp_path), "--output_dir", ours, "--learning_rate", "2e-2"]
    assert train([*flags, "--max_steps", "3"]) == 0
    (older,) = ours.glob("checkpoints.*/checkpoint-8")
    (record,) = ours.glob("run.json.*")
    assert find_run(older).path == record
    assert find_run(ours / "checkpoints" / "checkpoint-3").path == ours / "run.json"
    assert command(capsys, "evidence", older, *SHORT).status == 0
    # The newest run may have a checkpoint-8, too, and each has a report of its own.
    (report,) = ours.glob("inspected/*/report.md")
    assert report.parent.name == f"{older.parent.name}--checkpoint-8"
    record.unlink()
    assert find_run(older) is None
    words = ["evidence", older, *SHORT, "--output_dir", tmp_path / "found"]
    end = command(capsys, *words)
    reason = "belongs to this checkpoint"
    assert end.status == 1 and reason in end.err and "with --eval_file" in end.err
    end = command(capsys, *words, "--eval_file", write_held_out(tmp_path / "own.jsonl"))
    assert end.status == 0 and end.said.count(f"{reason}: it may have learned some") == 1
    assert f"{reason}: it may" in (tmp_path / "found" / "report.md").read_text(encoding="utf-8")


def test_an_adapter_beside_a_run_that_did_not_write_it_is_told(ours, capsys, tmp_path):
    save_adapter(ours / "another")
    own = write_held_out(tmp_path / "own.jsonl")
    words = [*SHORT, "--eval_file", own, "--output_dir", tmp_path / "found"]
    end = command(capsys, "evidence", ours / "another", *words)
    assert end.status == 0 and "holds the hash of this adapter: it may have" in end.said
    apart = save_adapter(tmp_path / "apart" / "checkpoints" / "another")
    # A file of another program that has this name
    record = json.dumps({"settings": {}, "data": "train.csv"})
    (tmp_path / "apart" / "run.json").write_text(record, encoding="utf-8")
    end = command(capsys, "evidence", apart, *words[:-1], tmp_path / "b")
    assert end.status == 0 and "since the adapter's training file was not at hand" in end.said


# ==== Equal lines


def test_equal_lines_count_once_and_are_told(capsys, no_picture, tmp_path):
    said = [("rain", "Tea?"), ("hello", "Oh, hello."), ("hello", "Oh, hello."), ("rain", "No.")]
    path = write_held_out(tmp_path / "eval.jsonl", [*said, said[0]])
    run = measure(capsys, save_adapter(tmp_path / "adapter"), path, *SHORT)
    assert lines_of(run.found) == [1, 2, 4]
    assert "left out 2 of 5 held-out replies, since equal ones count once: " in run.said
    assert "eval.jsonl:2 again" in run.said and "eval.jsonl:1 again" in run.said
    thirty = write_held_out(tmp_path / "thirty.jsonl", said[1:2] * 30)
    run = measure(capsys, tmp_path / "adapter", thirty, *SHORT)
    assert "± ?" in run.out and "clearly" not in run.said


RINGS = {"rings": {"kind": "word", "answers": ["999"]}}
BRIEF = {"brief": {"kind": "word", "not": ["cheese"]}}


def lines_with(*checks):
    return [{"messages": messages_of(("a", "b")), **({"checks": one} if one else {})}
            for one in checks]  # fmt: skip


@pytest.mark.parametrize(
    ("checks", "rules"),
    [
        ([None, RINGS], RINGS), ([RINGS, None], RINGS), ([RINGS, BRIEF], RINGS | BRIEF),
        ([None, RINGS, RINGS | BRIEF], RINGS | BRIEF), ([None, None], None),
    ],
)  # fmt: skip
def test_the_checks_of_equal_lines_are_joined(tmp_path, checks, rules):
    path = write_lines(tmp_path / "eval.jsonl", lines_with(*checks))
    options = argparse.Namespace(eval_file=path, enable_thinking=False)
    checked = read_held_out(options, None).checked
    assert [one.rules for one in checked] == ([rules] if rules else [])
    assert all(one.where.endswith(":1") and one.checks.keys() == rules.keys() for one in checked)
    prompts = [{"prompt": "a", **{k: v for k, v in row.items() if k == "checks"}}
               for row in lines_with(*checks)]  # fmt: skip
    (prompt,) = read_prompts(write_lines(tmp_path / "prompts.jsonl", prompts), "prompts")
    assert prompt.rules == (rules or {}) and prompt.checks.keys() == prompt.rules.keys()


def test_equal_lines_whose_checks_disagree_are_refused(tmp_path):
    other = {"rings": {"kind": "word", "answers": ["112"]}}
    path = write_lines(tmp_path / "eval.jsonl", lines_with(RINGS, other))
    options = argparse.Namespace(eval_file=path, enable_thinking=False)
    with pytest.raises(InspectError, match='1 again, and its check "rings" is another'):
        read_held_out(options, None)
    rows = [{"prompt": "a", "checks": one} for one in (RINGS, other)]
    path = write_lines(tmp_path / "prompts.jsonl", rows)
    with pytest.raises(InspectError, match='1 again, and its check "rings"'):
        read_prompts(path, "prompts")


def test_checks_of_a_line_that_equals_a_part_of_another_are_asked(tmp_path):
    """The first of the equal replies stands in the middle of a conversation with checks."""
    rows = [{"messages": messages_of(("a", "b", "c", "d")), "checks": BRIEF}]
    path = write_lines(tmp_path / "eval.jsonl", [*rows, *lines_with(RINGS)])
    found = read_held_out(argparse.Namespace(eval_file=path, enable_thinking=False), None)
    assert len(found.examples) == 2
    asked = [(one.where.rpartition(":")[2], one.rules, one.reference) for one in found.checked]
    assert asked == [("1", BRIEF, "d"), ("2", RINGS, "b")]


def test_copies_that_differ_by_spaces_or_the_system_message_count_once_in_the_error(
    capsys, no_picture, tmp_path
):
    """They stay, with their own losses, but ± counts them with the line that they are copies of."""
    said = [("rain", "Tea, then?"), ("hello", "Oh, hello."), ("who rang?", "Nobody yet.")]
    once = [{"messages": messages_of(one)} for one in said]
    system = {"role": "system", "content": "You are Nell."}
    spaced = [{"messages": messages_of((f"{asked} ", reply))} for asked, reply in said]
    other = [{"messages": [system, *one["messages"]]} for one in once]
    adapter = save_adapter(tmp_path / "adapter")
    plain = measure(capsys, adapter, write_lines(tmp_path / "once.jsonl", once), *SHORT)
    path = write_lines(tmp_path / "copies.jsonl", once + spaced + other)
    copied = measure(capsys, adapter, path, *SHORT)
    assert lines_of(copied.found) == [*range(1, 10)] and "left out" not in copied.said
    assert [row["line"].rpartition(":")[2] for row in copied.found["losses"]] == [*"123" * 3]
    assert "the loss of 9 held-out replies of 3 lines is" in copied.said
    assert copied.found["gain"]["effective_lines"] <= 3
    assert (
        copied.said.count("note 6 of 9 held-out replies: copies of other lines but for spaces or")
        == 1
    )
    assert "- note: 6 of 9 held-out replies: copies of other lines but" in copied.report
    assert "copies of other" not in plain.said and "of 3 lines" not in plain.said


def test_another_word_or_another_turn_before_it_is_no_copy():
    def example(place, *said):
        return Example(f"a:{place}", messages_of(said))

    found = lines_that_count(
        [
            example(1, "rain", "Tea?"),
            example(1, "rain", "Tea?", "no", "A biscuit?"),
            example(2, "rain ", " Tea?"),
            example(3, "rain", "Tea!"),
            example(4, "snow", "Tea?"),
            example(5, "rain", "Tea?", "no\n", "A  biscuit?"),
        ]
    )
    assert found == ["a:1", "a:1", "a:1", "a:3", "a:4", "a:1"]


# ==== What the report says of it


def test_the_report_says_whether_the_adapter_may_have_learned_the_lines(
    ours, evidence, tmp_path, capsys, no_picture
):
    report = ours / "inspected" / "final_lora" / "report.md"

    def said():
        lines = fact(report.read_text(encoding="utf-8"), "learned lines")
        return [line.removeprefix("- learned lines: ") for line in lines]

    end = evidence()
    assert end.found["held_out"]["learned"] == "none" and "note" not in end.said
    assert said() == ["none of these replies stands in the run's training file"]
    path = write_held_out(tmp_path / "own.jsonl")
    end = evidence("--eval_file", path)
    assert end.found["held_out"]["learned"] == "none"
    assert "- note: this is not the file that the run held out (" in report.read_text("utf-8")
    facts = read_json(ours / "run.json")["data"]
    facts["train"]["sha256"] = "of another"
    change_record(ours, data=facts)
    end = evidence()
    assert end.found["held_out"]["learned"] == "not compared" and "note" not in end.said
    begins = "the run held these replies out; its training file has changed since the run. None of"
    assert said()[0].startswith(begins)
    end = evidence("--eval_file", path)
    assert end.found["held_out"]["learned"] == "not known"
    assert end.said.count("it is not known whether it learned some of these replies") == 1
    assert len(said()) == 2  # at the top, too
    foreign = measure(capsys, save_adapter(tmp_path / "adapter"), path, *SHORT)
    unknown = "learned lines: not known, since the adapter's training file was not at hand: it may"
    assert foreign.out.count("note      learned lines: not known, since") == 1
    assert unknown in foreign.said and foreign.report.count(unknown) == 2
    assert unknown in foreign.report.split("In the tables")[0]
    assert foreign.found["held_out"]["learned"] == "not known"


def test_what_was_left_out_stands_in_the_report(ours, evidence, tmp_path):
    rows = [json.loads(line) for line in trained_lines(ours)[2:4]]
    said = [(f"question {number}", "Nobody yet.") for number in range(20)]
    rows += [{"messages": messages_of(one)} for one in (*said, said[0])]
    rows += [{"messages": messages_of(("a", "long reply " * 50))}]
    path = write_lines(tmp_path / "mixed.jsonl", rows)
    end = evidence("--eval_file", path, "--max_seq_len", "90")
    assert end.status == 0 and len(end.found["losses"]) == 20, end.err
    report = (ours / "inspected" / "final_lora" / "report.md").read_text(encoding="utf-8")
    learned, equal, long = fact(report.split("## What was measured")[1], "left out")
    assert "left out: 2 of 24 held-out replies stand in " in learned
    assert "left out: 1 of 22 held-out replies, since equal ones count once: " in equal
    assert long == "- left out: 1 of 21 held-out replies, with over 90 tokens (--max\\_seq\\_len)"
    evidence()
    assert fact((ours / "inspected" / "final_lora" / "report.md").read_text("utf-8"), "left") == []
