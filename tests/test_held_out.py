"""By which lines an adapter is judged: its run's own, none that it learned, and each once."""

import json

import pytest
from conftest import ROOT
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

from inspect_lora.common import file_sha256
from inspect_lora.files import Run
from inspect_lora.held_out import lines_that_count, replies_learned_by
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
    assert end.status == 1 and "held_out.jsonl, and nothing beside" in end.err
    assert "with --eval_file" in end.err
    path = write_held_out(tmp_path / "own.jsonl")
    assert len(evidence("--eval_file", path).found["losses"]) == 5


def test_other_conversations_in_its_place_are_refused(ours, evidence):
    write_held_out(ours / "held_out.jsonl", [("rain", "Tea, then?")])
    end = evidence()
    assert end.status == 1 and "held_out.jsonl is not what the run held out" in end.err
    assert "with --eval_file" in end.err and not (ours / "inspected" / "final_lora").exists()


def test_checks_may_be_added_to_its_lines(ours, evidence):
    """Conversations are compared, and not bytes: nothing is warned of, and losses are the same."""
    before = evidence().found
    rows = [json.loads(line) for line in (ours / "held_out.jsonl").open(encoding="utf-8")]
    for row in rows:
        row["checks"] = {"rings": {"kind": "word", "answers": ["999"]}}
    write_lines(ours / "held_out.jsonl", rows)
    end = evidence("--checks", "2")
    assert end.status == 0 and "warning" not in end.said, end.err
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


def test_a_training_file_that_is_not_the_runs_any_more_is_told(ours, evidence, tmp_path):
    facts = read_json(ours / "run.json")["data"]
    facts["train"]["sha256"] = "of another"
    change_record(ours, data=facts)
    end = evidence("--eval_file", ROOT / facts["train"]["file"])
    assert end.status == 0 and len(end.found["losses"]) == 13
    said = "so it is not known whether it learned some of these replies"
    assert said in end.said and said not in evidence().said


def test_what_a_percentage_held_out_of_the_training_file_was_not_learned(ours, tmp_path):
    """Its lines stand in TRAIN_FILE, and were not trained on."""
    rows = [{"messages": messages_of((f"question {n}", f"Reply {n}."))} for n in range(50)]
    path = write_lines(tmp_path / "train.jsonl", rows)
    record = read_json(ours / "run.json")
    record["settings"]["EVAL_FILE"] = "10%"
    record["data"]["train"] |= {"file": path, "sha256": file_sha256(tmp_path / "train.jsonl")}
    _, learned = replies_learned_by(Run(ours / "run.json", record))
    assert len(learned) == 30  # of 50 at least 20 are held out
    record["settings"]["EVAL_FILE"] = ""
    _, all_of_them = replies_learned_by(Run(ours / "run.json", record))
    assert len(all_of_them) == 50 and learned < all_of_them


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


def fact(report, name):
    return [line for line in report.splitlines() if line.startswith(f"- {name}: ")]


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
    assert said()[0].startswith("the run held these replies out; they were not compared with its")
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
