"""The story that must work, from the first Ctrl-C to the evidence; and the first afternoon."""

import ast
import hashlib
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import runs
from by_hand import token_loss
from conftest import ROOT, TOY
from transformers import AutoModelForCausalLM

import train_lora_single as script
from train_lora.conversations import prompt_hash

SETTINGS = {  # what they type over the lines of the file
    "EVAL_FILE": "10%", "FINAL_LORA": "best", "TRAIN_FILE": "my talks.jsonl", "DEVICE": "cpu",
    "DTYPE": "float32", "NUM_EPOCHS": 2, "LEARNING_RATE": 1e-2, "MODEL_NAME": TOY,
}  # fmt: skip
LINES, HELD_OUT, STEPS_AN_EPOCH = 40, 20, 5  # at least 20 are held out, also of a few


def write_sharegpt(path):
    """Write conversations, some with a greeting or a last question, and return the lines."""
    lines = []
    for number in range(LINES):
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        turns = [{"from": names[one["role"]], "value": one["content"]} for one in runs.talk(number)]
        if number % 7 == 0:
            turns.insert(1, {"from": "gpt", "value": "Hello, I am Nell."})
        if number % 9 == 0:
            turns.append({"from": "human", "value": "And then?"})
        lines.append(json.dumps({"id": number, "conversations": turns}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return lines


def edited_text():
    """Return the script's text with each of SETTINGS typed over the line of its constant."""
    lines = Path(script.__file__).read_text(encoding="utf-8").splitlines()
    for node in ast.parse("\n".join(lines)).body:
        name = getattr(node.targets[0], "id", "") if isinstance(node, ast.Assign) else ""
        if name in SETTINGS:
            lines[node.lineno - 1] = f"{name} = {SETTINGS[name]!r}"
    return "\n".join(lines)


def piped_to_tee(folder):
    """Do `python train_lora_single.py | tee log` in a folder; return the status.

    In step 7, of epoch 2, the terminal's Ctrl-C interrupts both, and tee dies first.
    """
    tee = subprocess.Popen(
        ["tee", "log"], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )

    def interrupt(*_, **__):
        os.kill(tee.pid, signal.SIGINT)
        reader = select.poll()
        reader.register(1, 0)
        while not any(event & select.POLLERR for _, event in reader.poll(10_000)):
            continue
        os.kill(os.getpid(), signal.SIGINT)

    def be_the_script():
        runs.write_to(folder / "errors")
        os.dup2(tee.stdin.fileno(), 1)
        os.close(tee.stdin.fileno())
        runs.at_step(pytest.MonkeyPatch(), 7, interrupt)
        runs.be_python("train_lora_single.py", folder=folder)

    process = runs.Fork(be_the_script)
    tee.stdin.close()
    status = process.end()
    tee.wait()
    return status


# Each path opened for writing, made, moved or removed, and each connection is written to a list.
SPY = """
import os, runpy, sys
spied = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
def whole(path, folder=-1):
    folder = os.readlink(f"/proc/self/fd/{folder}") if folder != -1 else "."
    return os.path.abspath(os.path.join(folder, os.fsdecode(path)))
def spy(event, args):
    paths = []
    if event == "open" and isinstance(args[0], (str, bytes)):
        by_flags = args[1] is None and isinstance(args[2], int) and args[2] & WRITES
        paths = [whole(args[0])] if by_flags or set("wax+") & set(args[1] or "") else []
    elif event == "os.rename":
        paths = [whole(args[0], args[2]), whole(args[1], args[3])]
    elif event in ("os.mkdir", "os.remove", "os.rmdir"):
        paths = [whole(args[0], args[-1])]
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        os.write(spied, f"network {args}\\n".encode())
    for path in paths:
        os.write(spied, f"write {path}\\n".encode())
sys.addaudithook(spy)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SECRET = "s3cr3t-0f-the-user"
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MY_PASSWORD")
UNSET = ("HF_HUB_OFFLINE", "PYTHONPATH", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TOY_MODEL")


def spied_on(folder, elsewhere):
    """Do the command as a user with secrets; return its output after a look at what it touched."""
    caches = [elsewhere / name for name in ("home", "cache", "tmp")]
    for path in caches:
        path.mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in UNSET}
    environment |= dict(zip(("HOME", "HF_HOME", "TMPDIR"), map(str, caches), strict=True))
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"} | dict.fromkeys(SECRETS, SECRET)
    done = subprocess.run(
        [sys.executable, "-c", SPY, str(elsewhere / "spied"), "train_lora_single.py"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spied = (elsewhere / "spied").read_text(encoding="utf-8").splitlines()
    written = {Path(line.partition(" ")[2]) for line in spied if line.startswith("write ")}
    allowed = (folder / "output", Path("/dev"), *caches)
    assert len(written) > 10
    assert [path for path in written if not any(map(path.is_relative_to, allowed))] == []
    assert [line for line in spied if line.startswith("network ")] == []
    found = [path for path in (folder / "output").rglob("*") if path.is_file()]
    assert [path for path in found if SECRET.encode() in path.read_bytes()] == []
    assert len(found) > 10 and SECRET not in done.stdout + done.stderr
    return done.stdout


def test_the_story(tmp_path, monkeypatch):
    folder, output = tmp_path / "clone", tmp_path / "clone" / "output"
    folder.mkdir()
    (folder / "train_lora_single.py").write_text(edited_text(), encoding="utf-8")
    shutil.copytree(runs.ROOT / "train_lora", folder / "train_lora")
    lines = write_sharegpt(folder / SETTINGS["TRAIN_FILE"])
    # They press Ctrl-C in epoch 2. The step is finished and saved, though tee is dead by then.
    assert piped_to_tee(folder) == 130
    assert runs.checkpoints(output)[-1] == 7 and not (output / "final_lora").exists()
    assert runs.read_record(output)["outcome"].startswith("interrupted: ")
    # The same command goes on, asks nobody, and writes nothing elsewhere.
    assert "checkpoint-7" in spied_on(folder, tmp_path)
    record = runs.read_record(output)
    assert record["outcome"] == "finished" == runs.read_record(output / "final_lora")["outcome"]
    # The adapter has the bytes of an uninterrupted run, of the best epoch.
    monkeypatch.chdir(folder)
    recorders = runs.record(monkeypatch)
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name.lower()}", value)]
    flags += ["--output_dir", tmp_path / "whole"]
    assert runs.run(flags) == 0
    assert (tmp_path / "whole" / runs.ADAPTER).read_bytes() == (output / runs.ADAPTER).read_bytes()
    # And again: the job is finished, and no file changes.
    left = runs.files(tmp_path / "whole")
    assert runs.run(flags) == 0 and runs.files(tmp_path / "whole") == left
    losses = runs.logged(record["loss_history"], "eval_loss")[1:]
    assert record["adapter"]["step"] == STEPS_AN_EPOCH * (1 + losses.index(min(losses)))
    # No held-out line was trained on; held_out.jsonl has them as they were.
    held_out = (output / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(one) for one in held_out]
    assert rows == [row for row in map(json.loads, lines) if row in rows]
    facts = record["data"]["held_out"]
    assert facts["examples"] == HELD_OUT == len(held_out)
    assert facts["sha256"] == hashlib.sha256((output / "held_out.jsonl").read_bytes()).hexdigest()
    job = runs.prepared(flags)
    learned = (output / "final_lora" / "learned.txt").read_text(encoding="utf-8").split()
    assert learned == sorted({prompt_hash(one.messages[:-1]) for one in job.data.examples})
    assert not {prompt_hash(one.messages[:-1]) for one in job.data.held_out} & {*learned}
    trained = {tuple(row) for row in runs.rows_of(recorders[0].trained)}
    assert trained == {tuple(example.input_ids) for example in job.data.examples}
    ids = {row["id"] for row in rows}
    texts = job.base.tokenizer.batch_decode([list(row) for row in trained])
    for number in range(LINES):
        asked = f"number {number}?<|im_end|>"
        assert any(asked in text for text in texts) == (number not in ids)
    if (ROOT / "inspect_lora").is_dir():
        look_at_the_evidence(output, job)


def look_at_the_evidence(output, job):
    """Inspect the adapter; the gain must be the one by hand."""
    from inspect_lora.__main__ import main

    less = ["--general_file", "", "--replies", "0", "--parts", "0", "--device", "cpu"]
    assert runs.run(["evidence", output / "final_lora", *less], main) == 0
    found = runs.read_json(output / "inspected" / "final_lora" / "evidence.json")
    base = AutoModelForCausalLM.from_pretrained(TOY, dtype="float32").eval()
    before = token_loss(base, job.data.held_out)
    adapted = peft.PeftModel.from_pretrained(base, output / "final_lora").eval()
    gain = before - token_loss(adapted, job.data.held_out)
    assert math.isfinite(gain) and gain > 0 and len(found["lines"]) == len(job.data.held_out)
    tokens = sum(line["tokens"] for line in found["lines"])
    measured = sum(line["base"] - line["adapter"] for line in found["lines"]) / tokens
    assert measured == pytest.approx(gain, rel=1e-4)


def test_the_first_afternoon(finished, tmp_path, monkeypatch, capfd):
    """Start, Ctrl-C, edit a constant: another job begins. Put it back: the first one goes on."""
    output, recorders = tmp_path / "output", runs.record(monkeypatch)
    flags = [*finished.flags, "--output_dir", output]
    with pytest.MonkeyPatch.context() as patch:
        runs.at_step(patch, 3, runs.send(signal.SIGINT))
        assert runs.run(flags) == 130
    (first,) = runs.job_folders(output)
    assert runs.checkpoints(output) == [3]
    kept = runs.files(first)
    changes = [(f"\nLORA_R = {script.LORA_R}", "\nLORA_R = 4")]
    edited = runs.command_of(runs.edited_script(tmp_path, *changes))
    end = runs.command(capfd, flags, edited)
    assert end.status == 0 and "LORA_R" in end.out  # what the other job has otherwise
    assert len(runs.rows_of(recorders[1].trained)) == 28 and len(runs.job_folders(output)) == 2
    assert runs.read_json(output / "final_lora" / "adapter_config.json")["r"] == 4
    assert runs.files(first) == kept
    assert runs.run(flags) == 0
    assert len(runs.rows_of(recorders[2].trained)) == 28 - 12
    assert (output / runs.ADAPTER).read_bytes() == (finished.output / runs.ADAPTER).read_bytes()
    (older,) = output.glob("final_lora.*")
    assert runs.read_json(older / "adapter_config.json")["r"] == 4
    with pytest.MonkeyPatch.context() as patch:
        runs.at_step(patch, 1, runs.send(signal.SIGINT))
        assert runs.run([*flags, "--seed", "8"]) == 130
    left = runs.files(output) | {"run.json": (output / "final_lora" / "run.json").read_bytes()}
    assert runs.run(flags) == 0 and runs.files(output) == left and len(recorders) == 4
    # It stays finished, whatever was begun since; and the adapter is made again if it is damaged.
    (output / runs.ADAPTER).write_bytes(b"old")
    assert runs.run(flags) == 0 and recorders[4].trained == []
    assert (output / runs.ADAPTER).read_bytes() == (finished.output / runs.ADAPTER).read_bytes()
    assert b"old" in [path.read_bytes() for path in output.glob("final_lora.*/*.safetensors")]
