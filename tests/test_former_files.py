"""Files that former versions wrote are read as they are: run.json, held_out.jsonl, schema 1.

`compare` is tested with schema 1 in test_compare.py.
"""

import argparse
import hashlib
import json

import pytest
from conftest import ROOT, TINY
from on_tiny import (
    SHORT,
    change_record,
    know_again,
    messages_of,
    read_json,
    save_adapter,
    write_lines,
)
from test_served import Imitation, running
from tiny_adapters import TENSORS, command

from inspect_lora.common import file_sha256
from inspect_lora.conversations import read_held_out
from inspect_lora.files import find_run

FORMER = ROOT / "tests" / "job_2026_11_28"  # its run.json, and a copy of the data
# What the version of 2026-11-28 recorded of the fifty lines below with EVAL_FILE "10%".
TRAIN_SHA256 = "78de119caa3c3d537824add605fc79c5075a4a5401e7b25ccf6068117a7c040a"
HELD_OUT_SHA256 = "325b0d3830b8eb727cd3bdfa4219556d8d8611466f0730f4ae96dc22f8f4fbf6"
FIFTY = [{"messages": messages_of((f"question {n}", f"Réply {n}."))} for n in range(50)]


@pytest.fixture
def former(tmp_path, monkeypatch):
    """Return the output folder of a run of the version of 2026-11-28, and go above it."""
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "output"
    save_adapter(output / "final_lora")
    text = (FORMER / "run.json").read_text(encoding="utf-8").replace('"MODEL"', json.dumps(TINY))
    (output / "run.json").write_text(text, encoding="utf-8")
    know_again(output)
    change_record(output, working_folder=str(tmp_path))
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_bytes((FORMER / f"{name}.jsonl").read_bytes())
    return output


def test_a_former_run_brings_its_held_out_file_and_what_it_learned(former, capsys, no_picture):
    settings = read_json(former / "run.json")["settings"]
    assert "PUBLISH" in settings and "FINAL_LORA" not in settings
    end = command(capsys, "evidence", former / "final_lora", *SHORT)
    assert end.status == 0, end.err
    found = read_json(former / "inspected" / "final_lora" / "evidence.json")
    assert found["held_out"]["file"] == "eval.jsonl" and found["held_out"]["learned"] == "none"
    assert found["system_message"].startswith("You are Nell") and len(found["losses"]) == 4
    end = command(capsys, "evidence", former / "final_lora", *SHORT, "--eval_file", "train.jsonl")
    assert end.status == 1 and "13 of 13 held-out replies stand in train.jsonl" in end.err


@pytest.fixture
def per_cent(former):
    """Make it one with EVAL_FILE "10%" of fifty lines."""
    path = former.parent / "train.jsonl"
    write_lines(path, FIFTY)
    assert file_sha256(path) == TRAIN_SHA256
    record = read_json(former / "run.json")
    facts = {"file": "output/held_out.jsonl", "sha256": HELD_OUT_SHA256}
    record["data"]["train"]["sha256"] = TRAIN_SHA256
    record["data"]["held_out"] |= facts
    change_record(former, data=record["data"], settings=record["settings"] | {"EVAL_FILE": "10%"})
    return former


def test_what_a_former_run_held_out_is_known_by_its_hash_and_its_conversations(per_cent):
    """The former version chose the same lines and wrote the same bytes, so checks may be added."""
    run = find_run(per_cent / "final_lora")
    options = argparse.Namespace(eval_file="train.jsonl", enable_thinking=False)
    kept = read_held_out(options, run)
    rows = [one.row for one in kept.examples]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert len(rows) == 20 and hashlib.sha256(text.encode()).hexdigest() == HELD_OUT_SHA256
    options.eval_file = None
    path = per_cent / "held_out.jsonl"
    path.write_text(text, encoding="utf-8")
    own = read_held_out(options, run)
    assert own.sha256 == HELD_OUT_SHA256 and own.notes == [] and len(own.examples) == 20
    write_lines(path, [row | {"checks": {"a": {"kind": "word", "not": ["b"]}}} for row in rows])
    edited = read_held_out(options, run)
    assert len(edited.checked) == 20 and edited.unproved is None and edited.learned == "none"
    assert edited.conversations_sha256 == own.conversations_sha256


@pytest.mark.parametrize("edit", ["", "\n"])
def test_served_takes_the_losses_of_schema_1_of_the_very_same_file_alone(
    tmp_path, monkeypatch, capsys, edit
):
    monkeypatch.chdir(tmp_path)
    adapter = save_adapter(tmp_path / "adapter")
    said = [("hello", "Oh, hello."), ("he fell", "Ring 999 now."), ("beans are up", "Already!")]
    write_lines(tmp_path / "eval.jsonl", [{"messages": messages_of(one)} for one in said])
    record = read_json(ROOT / "tests" / "evidence_schema_1.json")
    assert record["schema"] == 1 and "conversations_sha256" not in record["held_out"]
    record |= {"adapter_sha256": file_sha256(adapter / TENSORS), "base": TINY}
    record["held_out"]["sha256"] = file_sha256(tmp_path / "eval.jsonl")
    path = tmp_path / "inspected" / "adapter" / "evidence.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record), encoding="utf-8")
    with (tmp_path / "eval.jsonl").open("a", encoding="utf-8") as file:
        file.write(edit)
    with running(Imitation(path, tmp_path / "eval.jsonl")) as url:
        end = command(capsys, "served", url, "adapter")
    if edit:
        assert "measured just now" in end.said
    else:
        assert end.status == 0 and "are those in inspected/adapter/evidence.json" in end.said
        assert "The server applies the adapter under the name companion." in end.said
