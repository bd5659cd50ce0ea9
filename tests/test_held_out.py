"""By which lines an adapter is judged: what its training held out, and nothing that it learned."""

import json
import shutil
from pathlib import Path

import pytest
from records import SHORT, evidence, line_numbers, say_origin, write_talks_with
from runs import SYSTEM, refused, run, talk, write_lines, write_talks
from toys import edit_json

from inspect_lora.__main__ import main
from inspect_lora.common import file_sha256


@pytest.fixture
def output(adapters, tmp_path):
    """Return the folder of a run that held out a tenth of its file, and is done."""
    output = tmp_path / "output"
    shutil.copytree(adapters["plain"], output / "final_lora")
    path = write_talks_with(output / "held_out.jsonl", 1, 2, 3)
    held_out = {"file": path, "sha256": file_sha256(Path(path))}
    learned = [talk(number)[:-1] for number in (10, 11)]
    say_origin(output / "final_lora", learned, data={"held_out": held_out}, system_message=SYSTEM)
    return output


@pytest.fixture
def measured(capfd, tmp_path):
    def measure(adapter, *words):
        found, said = evidence(capfd, adapter, tmp_path / "results", *SHORT, *words)
        return found | {"printed": said}

    return measure


@pytest.fixture
def not_measured(capfd, output):
    def measure(*keys, more=()):
        argv = ["evidence", output / "final_lora", "--device", "cpu", *SHORT, *more]
        return refused(capfd, argv, *keys, main=main)

    return measure


@pytest.mark.parametrize(
    "place",
    ["final_lora", "checkpoints/1f/checkpoint-8", "final_lora.2026-11-30-101112", "exports/x/half"],
)
def test_it_is_found_in_a_folder_above_the_adapter(output, measured, place):
    """Also of a checkpoint, of what a later run renamed, and after all of it was moved."""
    adapter = output / place
    if place != "final_lora":
        shutil.copytree(output / "final_lora", adapter)
    moved = shutil.move(output, output.with_name("moved"))
    found = measured(Path(moved) / place)
    assert line_numbers(found["lines"]) == [1, 2, 3] and found["learned"] == 0
    assert found["on"]["eval_file"]["file"] == str(Path(moved).resolve() / "held_out.jsonl")


def test_another_file_is_where_run_json_says(output, measured, tmp_path, monkeypatch):
    """As seen from where the training was started, above the adapter."""
    (output / "held_out.jsonl").rename(tmp_path / "mine.jsonl")
    held_out = {"file": "mine.jsonl", "sha256": file_sha256(tmp_path / "mine.jsonl")}
    say_origin(output / "final_lora", data={"held_out": held_out})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert line_numbers(measured(output / "final_lora")["lines"]) == [1, 2, 3]


def test_other_conversations_in_its_place_are_refused_and_no_file_is_guessed(output, not_measured):
    """A later run into the same folder may have learned or held out others."""
    write_talks_with(output / "held_out.jsonl", 1, 2, 4)
    not_measured("held_out.jsonl", "--eval_file")
    say_origin(output / "final_lora", data={"train": {}, "held_out": None})
    not_measured("--eval_file", "--prompts")
    (output / "final_lora" / "run.json").unlink()
    not_measured("--eval_file", "--prompts")


def test_a_whole_run_brings_all_of_it(flags, tmp_path, measured):
    """What a tenth held out is measured, and nothing of it was learned."""
    write_talks(tmp_path / "train.jsonl", range(200))
    assert run([*flags, "--eval_file", "10%", "--max_steps", "1"]) == 0
    shutil.copytree(tmp_path / "output", tmp_path / "moved")
    (tmp_path / "output" / "held_out.jsonl").unlink()  # as if it had been moved
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:  # it grows afterwards
        file.write(json.dumps({"messages": talk(900)}) + "\n")
    found = measured(tmp_path / "moved" / "final_lora")
    assert len(found["lines"]) == 20 and found["learned"] == 0 and found["system"] == SYSTEM
    of_all = measured(tmp_path / "moved" / "final_lora", "--eval_file", tmp_path / "train.jsonl")
    assert len(of_all["lines"]) == 21 and of_all["learned"] == 180


def test_learned_prompts_are_left_out_and_counted(output, measured, not_measured, tmp_path):
    """Also with another reply, another system message, and other spaces; no other word counts."""
    said, *others = (talk(number) for number in (10, 10, 10, 10, 10))
    others[0][-1] = others[0][-1] | {"content": "Somewhere else."}
    others[1][0] = others[1][0] | {"content": "You are somebody else."}
    others[2][1] = others[2][1] | {"content": f"  {others[2][1]['content'].replace(' ', '  ')}\n"}
    others[3][1] = others[3][1] | {"content": others[3][1]["content"].replace("Where", "When")}
    rows = [{"messages": one} for one in [said, *others, talk(1)]]
    path = write_lines(tmp_path / "own.jsonl", rows)
    found = measured(output / "final_lora", "--eval_file", path)
    assert found["learned"] == 4 and line_numbers(found["lines"]) == [5, 6]
    write_talks_with(tmp_path / "own.jsonl", 10, 11)  # nothing is left
    not_measured("own.jsonl", more=["--eval_file", path])


@pytest.mark.parametrize("content", [None, ""])
def test_what_it_learned_may_be_not_known(output, measured, content):
    """It is printed, and no number is put in its place."""
    path = output / "final_lora" / "learned.txt"
    path.unlink() if content is None else path.write_text(content)
    found = measured(output / "final_lora")
    assert found["learned"] is None and len(found["lines"]) == 3
    assert "not known" in found["printed"]


def test_rules_are_about_the_end_of_a_conversation(output, measured, tmp_path):
    """If its last reply was learned, or is too long, an earlier one is not judged instead."""
    longer = [*talk(1), *talk(2)[1:]]
    learned = [*talk(3), *talk(4)[1:]]
    too_long = [*talk(5), *talk(6, 40)[1:]]
    say_origin(output / "final_lora", [learned[:-1]])
    checks = {"any": {"any": ["tea"]}}
    rows = [{"messages": one, "checks": checks} for one in (longer, learned, too_long)]
    words = ["--eval_file", write_lines(tmp_path / "own.jsonl", rows), "--max_seq_len", "120"]
    words += ["--replies", "9", "--max_new_tokens", "1"]
    found = measured(output / "final_lora", *words)
    assert line_numbers(found["lines"]) == [1, 1, 2, 3]
    assert (found["learned"], found["too_long"]) == (1, 1)
    (asked,) = found["exchanges"]
    assert asked["messages"] == longer[:-1] and asked["reference"] == longer[-1]["content"]


def test_long_lines_are_left_out_and_counted(output, measured, tmp_path):
    """However many they are; as in the training, or as asked for."""
    rows = [{"messages": talk(n, 1 if n < 3 else 12)} for n in range(6)]
    words = ["--eval_file", write_lines(tmp_path / "own.jsonl", rows)]
    assert len(measured(output / "final_lora", *words)["lines"]) == 6
    found = measured(output / "final_lora", *words, "--max_seq_len", "80")
    assert (line_numbers(found["lines"]), found["too_long"]) == ([1, 2, 3], 3)
    run_json = output / "final_lora" / "run.json"
    edit_json(run_json, lambda known: known.update(settings={"MAX_SEQ_LEN": 80}))
    assert measured(output / "final_lora", *words)["too_long"] == 3
    assert measured(output / "final_lora", *words, "--max_seq_len", "999")["too_long"] == 0


def test_bad_lines_and_rules_of_no_line_are_named_before_the_base_is_read(tmp_path, not_measured):
    rows = [{"messages": talk(1)[:2]}, {"messages": talk(1)}, {"messages": talk(2), "checks": 5}]
    rows.append({"messages": talk(3), "checks": {"brief": {"most_word": 3}}})
    words = ["--base", "/nowhere", "--eval_file", write_lines(tmp_path / "own.jsonl", rows)]
    end = not_measured("own.jsonl:1", "own.jsonl:3", "own.jsonl:4", "most_word", more=words)
    assert "/nowhere" not in end.err and "own.jsonl:2" not in end.err
    # A rule for a kind that no line has would judge nothing, in silence.
    path = write_talks_with(tmp_path / "own.jsonl", 1, kind="emergency")
    rings = [{"name": "rings", "kinds": ["emergencies"], "any": ["999"]}]
    words = ["--eval_file", path, "--rules", write_lines(tmp_path / "rules.json", [rings])]
    not_measured("emergencies", more=words)
