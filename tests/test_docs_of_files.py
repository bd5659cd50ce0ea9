"""docs/evidence.md names every key of the files that other programs read, and no other keys."""

import json
import re

import pytest
from conftest import ROOT
from on_tiny import copy_of_run, messages_of, read_json, save_adapter, write_lines
from tiny_adapters import command

PAGE = ROOT / "docs" / "evidence.md"
NO = {"kind": "word", "answers": ["no"], "not": ["yes"]}
TASK = {"prompt": "What is 6 times 7?", "checks": {"right": {"kind": "number", "answer": 42}}}

# Whose keys are names of what was measured, and not of the format; "*" stands for such a name.
BY_NAME = ["parts", "updates", "checks", "seconds", "replies.base.checks", "replies.adapter.checks"]
BY_NAME += ["elsewhere.no system message", "elsewhere.the training's", "replies.says"]
# What is written as it was found elsewhere.
OF_OTHERS = ["adapter_config", "run.settings", "replies.rules"]


def paths_of(value, path=""):
    """Return the path of each key in a value, at any depth, such as "parts.*.loss"."""
    if isinstance(value, list):
        return set().union(*(paths_of(one, path) for one in value))
    if not isinstance(value, dict) or path in OF_OTHERS:
        return set()
    found = set()
    for key, inner in value.items():
        below = f"{path}.{'*' if path in BY_NAME else key}".lstrip(".")
        found |= {below} | paths_of(inner, below)
    return found


def part_of_page(begins, ends):
    """Return the part of "What the files hold" between two texts."""
    section = PAGE.read_text(encoding="utf-8").partition("## What the files hold")[2]
    return section.partition(begins)[2].partition(ends)[0]


def named_in_rows(text):
    """Return {key: the names in its row of a table}, for each key that begins a row."""
    found = {}
    for first, rest in re.findall(r"(?m)^\| (`.*?) \| (.*) \|$", text):
        keys = re.findall("`([^`]+)`", first)
        found |= {key: {*keys, *re.findall("`([^`]+)`", rest)} for key in keys}
    return found


def unnamed(paths, rows, everywhere=frozenset()):
    """Return the paths whose last key is not named in the row of their first one."""
    lacking = []
    for path in sorted(paths):
        first, last = path.partition(".")[0], path.rpartition(".")[2]
        if last not in {"*", *everywhere, *rows.get(first, ())}:
            lacking.append(path)
    return lacking


def judge(record):
    """Hold a record against the tables: what it has is named."""
    rows = named_in_rows(part_of_page("`evidence.json`, schema 2", "A row of `replies`"))
    of_replies = named_in_rows(part_of_page("A row of `replies`", "Schema 1 had"))
    estimate = set(re.findall("`([^`]+)`", part_of_page("An estimate has", "\n")))
    paths = paths_of(record)
    below = {path.removeprefix("replies.") for path in paths if path.startswith("replies.")}
    others = {path for path in paths if not path.startswith("replies.")}
    lacking = unnamed(others, rows, estimate)
    lacking += [f"replies.{path}" for path in unnamed(below, of_replies)]
    assert not lacking, (
        "docs/evidence.md, What the files hold: name these keys in the row of the first of them: "
        + ", ".join(lacking)
    )
    too_many = (rows.keys() - record.keys()) | (of_replies.keys() - set(record["replies"][0]))
    assert not too_many, f"docs/evidence.md names keys that evidence.json lacks: {too_many}"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("tasks") / "tasks.jsonl", [TASK])


SHORT_REPLIES = ["--device", "cpu", "--examples", "2", "--max_new_tokens", "3"]


def test_the_docs_name_every_key_of_a_record_of_held_out_lines(
    finished, capsys, no_picture, tmp_path, tasks
):
    output = copy_of_run(finished, tmp_path / "output")
    line = {"id": "a", "kind": "b", "messages": messages_of(("hello", "Oh.")), "checks": {"no": NO}}
    path = write_lines(tmp_path / "eval.jsonl", [line])
    words = ["--eval_file", path, "--general_file", tasks, *SHORT_REPLIES]
    end = command(capsys, "evidence", output / "final_lora", *words)
    assert end.status == 0, end.err
    record = read_json(output / "inspected" / "final_lora" / "evidence.json")
    empty = [key for key, value in record.items() if value in (None, "", [], {})]
    assert empty == ["prompts"]  # so all others were looked at
    assert record["elsewhere"]["the training's"] and record["replies"][0]["base"]["checks"]
    judge(record)


def test_the_docs_name_every_key_of_a_record_of_prompts(capsys, no_picture, tmp_path, tasks):
    adapter = save_adapter(tmp_path / "adapter")
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "hello", "checks": {"no": NO}}])
    words = ["--prompts", path, "--general_file", tasks, *SHORT_REPLIES]
    end = command(capsys, "evidence", adapter, *words, "--output_dir", tmp_path / "found")
    assert end.status == 0, end.err
    record = read_json(tmp_path / "found" / "evidence.json")
    assert record["prompts"] and record["replies"][0]["source"] == "prompts"
    judge(record)


def test_the_docs_name_every_key_of_info_json(capsys, tmp_path):
    end = command(capsys, "info", save_adapter(tmp_path / "adapter"), "--json")
    keys = {path.rpartition(".")[2] for path in paths_of(json.loads(end.out))}
    named = set(re.findall("`([^`]+)`", part_of_page("`info --json` prints", "\n\n")))
    assert {"modules", "norm"} <= keys
    assert named == keys, f"docs/evidence.md, info --json: {named ^ keys} stand in one of them only"


def test_a_key_that_is_not_named_is_found_by_its_place():
    rows = {"checks": {"checks", "p"}, "gain": {"gain", "loss"}}
    record = {"checks": {"a check": {"p": 1, "needed": 2}}, "gain": {"value": 1, "loss": 2}}
    record["new"] = [{"p": 1}]
    assert paths_of(record) == {
        "checks", "checks.*", "checks.*.p", "checks.*.needed", "gain", "gain.value", "gain.loss",
        "new", "new.p",
    }  # fmt: skip
    assert unnamed(paths_of(record), rows, {"value"}) == ["checks.*.needed", "new", "new.p"]
