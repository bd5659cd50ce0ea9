"""The story: one ShareGPT file, a tenth held out, Ctrl-C in epoch 2, the same command again."""

import hashlib
import json
import math
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from conftest import ROOT
from processes import Fork, be_python, run_in_a_fork, write_to
from trainers import (
    ADAPTER,
    Recorder,
    at_step,
    checkpoints,
    command_in,
    files,
    logged,
    on_trainer,
    prepared,
    read_record,
    rows_of,
    run,
    token_loss,
)
from transformers import AutoModelForCausalLM

import train_lora_single as t

SETTINGS = {  # what they edit in the file
    "EVAL_FILE": "10%", "FINAL_LORA": "best", "TRAIN_FILE": "my talks.jsonl", "DEVICE": "cpu",
    "DTYPE": "float32", "NUM_EPOCHS": 2, "LEARNING_RATE": 1e-2,
}  # fmt: skip
LINES, HELD_OUT, STEPS_AN_EPOCH = 60, 20, 10  # at least 20 are held out, also of a few


def write_sharegpt(path):
    """Write the shortest of the shipped conversations in that form, as people have them.

    Some begin with a greeting that answers nobody, and some end with a question without a reply.
    """
    rows = (ROOT / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    lines = []
    for number, text in enumerate(sorted(rows, key=len)[:LINES]):
        row = json.loads(text)
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        turns = [
            {"from": names[message["role"]], "value": message["content"]}
            for message in row["prompt"] + row["completion"]
        ]
        if number % 7 == 0:
            turns.insert(1, {"from": "gpt", "value": "Hello, I am Nell."})
        if number % 9 == 0:
            turns.append({"from": "human", "value": "And then?"})
        lines.append(json.dumps({"id": number, "conversations": turns}, ensure_ascii=False))
    path.write_text("\n".join(lines), encoding="utf-8")
    return lines


@pytest.fixture(scope="module")
def clone(tmp_path_factory, tiny):
    """Return a fresh clone in which the settings are edited, and the lines of its data."""
    folder = tmp_path_factory.mktemp("story") / "clone"
    folder.mkdir()
    text = Path(t.__file__).read_text(encoding="utf-8")
    for name, value in (SETTINGS | {"MODEL_NAME": tiny}).items():
        line = re.compile(rf"(?m)^({name}: .* = )(\"[^\"]*\"|[\d.e-]+)(  #|$)")
        text, count = line.subn(lambda found, value=value: f"{found[1]}{value!r}{found[3]}", text)
        assert count == 1, name
    (folder / "train_lora_single.py").write_text(text, encoding="utf-8")
    if (ROOT / "inspect_lora").is_dir():
        shutil.copytree(ROOT / "inspect_lora", folder / "inspect_lora")
    return folder, write_sharegpt(folder / SETTINGS["TRAIN_FILE"])


def piped_to_tee(folder, prepare=None):
    """Do `python train_lora_single.py | tee log` in a folder; return the status and the log."""
    tee = subprocess.Popen(
        ["tee", "log"], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )

    def be_the_script():
        write_to(folder / "errors")
        os.dup2(tee.stdin.fileno(), 1)
        os.close(tee.stdin.fileno())
        if prepare:
            prepare(tee.pid)
        be_python(["train_lora_single.py"], folder)

    process = Fork(be_the_script)
    tee.stdin.close()
    status = process.end()
    tee.wait()
    errors = (folder / "errors").read_text(encoding="utf-8")
    assert "Traceback" not in errors, errors
    return status, (folder / "log").read_text(encoding="utf-8")


def press_ctrl_c_in_epoch_2(tee):
    """Have the terminal interrupt both in step 13; tee dies first."""

    def interrupt(*_, **__):
        os.kill(tee, signal.SIGINT)
        reader = select.poll()
        reader.register(1, 0)
        while not any(event & select.POLLERR for _, event in reader.poll(10_000)):
            continue
        os.kill(os.getpid(), signal.SIGINT)

    at_step(pytest.MonkeyPatch(), 13, interrupt)


def test_the_story(clone, tmp_path, tiny, monkeypatch):
    folder, lines = clone
    output = folder / "output"

    # They press Ctrl-C in epoch 2. The step is finished and saved, though tee is dead by then.
    status, log = piped_to_tee(folder, press_ctrl_c_in_epoch_2)
    assert status == 130 and "step 10/20" in log and "stopping" not in log
    assert re.search(r"(?m)^held out +20 of the 60 ", log)
    assert checkpoints(output)[-1] == 13 and not (output / "final_lora").exists()

    # The same command goes on.
    status, log = piped_to_tee(folder)
    assert status == 0 and re.search(r"(?m)^resume .*checkpoint-13$", log)
    record = read_record(output)
    assert record["outcome"] == "finished" and record["plan"]["steps"] == 20

    # And again: the job is finished, and nothing is written.
    left = files(output)
    status, again = piped_to_tee(folder)
    assert status == 0 and len(re.findall("(?m)^finished ", again)) == 1
    assert files(output) == left and "step " not in again.partition("\nfinished ")[2]

    # The adapter has the bytes of an uninterrupted run, of the best epoch.
    monkeypatch.chdir(folder)
    recorders = []
    on_trainer(monkeypatch, lambda trainer: recorders.append(Recorder(trainer)))
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name.lower()}", value)]
    flags += ["--model_name", tiny, "--output_dir", tmp_path / "whole"]
    assert run(flags) == 0
    assert (tmp_path / "whole" / ADAPTER).read_bytes() == (output / ADAPTER).read_bytes()
    losses = logged(record["loss_history"], "eval_loss")[1:]
    assert record["published"]["step"] == STEPS_AN_EPOCH * (1 + losses.index(min(losses)))

    # No held-out line was trained on; held_out.jsonl has them as they were.
    held_out = (output / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(held_out) == HELD_OUT and {*held_out} <= {*lines}
    facts = record["data"]["held_out"]
    assert facts["file"] == "output/held_out.jsonl"
    assert facts["sha256"] == hashlib.sha256((output / "held_out.jsonl").read_bytes()).hexdigest()
    job = prepared(flags)
    trained = {tuple(row) for row in rows_of(recorders[0].trained)}
    assert trained == {tuple(example.input_ids) for example in job.examples}
    assert not trained & {tuple(example.input_ids) for example in job.held_out}
    questions = {json.loads(line)["id"]: first_question(line) for line in lines}
    ids = {json.loads(line)["id"] for line in held_out}
    texts = job.chat_format.tokenizer.batch_decode([list(row) for row in trained])
    for number, question in questions.items():
        assert any(f"user\n{question}<|im_end|>" in text for text in texts) == (number not in ids)

    evidence_from_another_folder(folder, log, tmp_path, job)


def first_question(line):
    turns = json.loads(line)["conversations"]
    return next(turn["value"] for turn in turns if turn["from"] == "human").strip()


def evidence_from_another_folder(folder, log, elsewhere, job):
    """Inspect the adapter from another folder; the gain must be what a computation by hand gives.

    Without the package beside the script nothing is measured, and the run has said so.
    """
    if not (folder / "inspect_lora").is_dir():
        assert not re.search("(?m)^ *python ", log) and "inspect_lora" in log
        return
    _, package, *words = command_in(log, "python", "inspect_lora", "evidence")
    assert words == ["evidence", "output/final_lora"]
    words = [str(folder / package), "evidence", str(folder / "output" / "final_lora")]
    less = ["--general_file", "", "--samples", "1", "--max_new_tokens", "3"]
    done = run_in_a_fork([sys.executable, *words, *less], cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    found = json.loads(
        (folder / "output" / "inspected" / "final_lora" / "evidence.json").read_bytes()
    )
    base = AutoModelForCausalLM.from_pretrained(job.settings.MODEL_NAME, dtype="float32").eval()
    before = token_loss(base, job.held_out)
    adapted = peft.PeftModel.from_pretrained(base, folder / "output" / "final_lora").eval()
    gain = before - token_loss(adapted, job.held_out)
    assert math.isfinite(gain) and gain > 0
    assert found["gain"]["value"] == pytest.approx(gain, rel=1e-4)
    assert len(found["losses"]) == len(job.held_out)
