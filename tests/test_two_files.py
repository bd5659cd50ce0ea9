"""The trainer without inspect_lora.py, and copies of it under another name."""

import json
import os
import re
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest
from conftest import BY_INSPECTOR, HAS_INSPECTOR, write_short_data
from processes import run_in_a_fork
from safetensors.torch import load_file
from trainers import command_in, commands_in, read_record

import train_lora_single as t

ORIGINAL, INSPECTOR = Path(t.__file__), Path(t.__file__).with_name("inspect_lora.py")
RESULTS = {"final_lora", "final_lora_vllm", "checkpoints", "run.json", "all_logs.log", ".lock"}
MISSING = (
    "inspect_lora.py is not beside this script. There it would talk to the adapter, and ask a "
)
MISSING += "server whether it applies it."
STOP_IN_STEP_5 = """
import accelerate, itertools, os, signal
calls, backward = itertools.count(1), accelerate.Accelerator.backward
def stop_once(*args, **kwargs):
    if next(calls) == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    return backward(*args, **kwargs)
accelerate.Accelerator.backward = stop_once
"""


@pytest.fixture
def give(tmp_path):
    """Return a function that gives `python NAME FLAGS` in a folder with short data of its own."""
    write_short_data(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / "data" / f"{name}.jsonl")

    def command(*words, **how):
        return run_in_a_fork([sys.executable, *words], cwd=tmp_path, **how)

    return command


def short_run(tiny, *more):
    """Return the flags of a run whose other settings are those of the file."""
    flags = ["--model_name", tiny, "--device", "cpu", "--dtype", "float32", "--num_epochs", "2"]
    flags += ["--learning_rate", "1e-2", "--logging_steps", "1", "--evidence_examples", "3"]
    return [*flags, "--num_samples", "1", "--max_new_tokens", "3", "--general_file", "", *more]


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_without_inspect_lora_it_trains_resumes_verifies_and_publishes(give, tiny, tmp_path):
    """And says in one sentence how to measure; who does as it says has what was missing."""
    shutil.copy(ORIGINAL, tmp_path)
    argv = ["train_lora_single.py", *short_run(tiny)]
    done = give(*argv, first=STOP_IN_STEP_5)
    assert done.returncode == 143 and "after step 5 of 8" in " ".join(done.stderr.split())
    done = give(*argv)
    output = tmp_path / "output"
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr
    assert re.search(r"(?m)^resume .*checkpoint-5$", done.stdout)
    assert re.search("(?m)^verified ", done.stdout) and re.search("(?m)^done ", done.stdout)
    assert not re.search("(?m)^warning ", done.stdout)
    assert names_in(output) == RESULTS and read_record(output)["outcome"] == "finished"
    (said,) = re.findall(r"(?m)^evidence +(.*(?:\n {10}.*)*)", done.stdout)
    said = " ".join(said.split())
    assert "was not measured, since inspect_lora.py is not beside this script. Put it there" in said
    advice = "python inspect_lora.py evidence output/final_lora"
    assert said.endswith(f"measure it without training: {advice}")
    following = done.stdout[done.stdout.index("\nnext ") :]
    assert [words[:2] for words in commands_in(following)] == [["vllm", "serve"]]
    assert MISSING in " ".join(following.split())
    without_paths = following.replace(tiny, "model")  # a path is not broken, however long it is
    assert max(map(len, without_paths.splitlines())) <= 100

    if not HAS_INSPECTOR:
        return
    before = (output / "final_lora" / "adapter_model.safetensors").read_bytes()
    shutil.copy(INSPECTOR, tmp_path)
    done = give(*advice.split()[1:])
    assert done.returncode == 0, done.stderr
    assert names_in(output) == RESULTS | {*BY_INSPECTOR}
    evidence = read_record(output)["evidence"]
    assert evidence["examples"] == 4 and evidence["adapter"] < evidence["base"] - 0.1
    assert (output / "final_lora" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("is_beside", [True, False])
def test_the_last_lines_name_only_what_is_there(tmp_path, monkeypatch, is_beside):
    """Also of the toy, which nobody serves, and of what vLLM cannot serve."""
    monkeypatch.setattr(t, "HERE", tmp_path)
    if is_beside:
        (tmp_path / "inspect_lora.py").touch()
    for flags, refusal in ((["--demo"], ""), ([], "vLLM cannot serve it")):
        job = t.Job(t.parse_settings(flags))
        job.plan = types.SimpleNamespace(steps=8, steps_per_epoch=4, vllm_refuses=refusal)
        said = " ".join(t.next_commands(job).split())
        assert ("python inspect_lora.py chat" in said) == is_beside
        assert (MISSING in said) != is_beside and refusal in said and "vllm serve" not in said
        job.history = [{"step": step, "eval_loss": loss} for step, loss in ((0, 5), (4, 2), (8, 3))]
        said = " ".join(" ".join(t.verdict(job)).split())
        assert "lowest after epoch 1 (2.0000)" in said and "--publish best publishes" in said
        assert ("inspect_lora.py measures it" in said) == is_beside


@pytest.mark.parametrize("is_beside", [True, False])
def test_what_is_said_of_a_stop_after_publishing_names_only_what_is_there(
    tmp_path, monkeypatch, is_beside
):
    monkeypatch.setattr(t, "HERE", tmp_path)
    if is_beside:
        (tmp_path / "inspect_lora.py").touch()
    job = t.Job(t.parse_settings([]))
    job.published = "epoch 2 of 2"
    t.catch_signals(job)
    with pytest.raises(t.Stopped, match=r"Stopped\. output/final_lora is complete\.") as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    said = str(stop.value)
    assert "retrain from scratch" in said
    assert ("python inspect_lora.py evidence output/final_lora" in said) == is_beside


@pytest.mark.parametrize(
    "beside", [["train_lora_single.py", "inspect_lora.py"], ["inspect_lora.py"]]
)
def test_an_edited_copy_under_another_name_trains_and_measures_with_its_edits(
    give, tiny, tmp_path, beside
):
    """Its rank, and all else that is edited in it, hold for the evidence too."""
    for name in beside:
        if HAS_INSPECTOR or name != INSPECTOR.name:
            shutil.copy(ORIGINAL.with_name(name), tmp_path)
    text = ORIGINAL.read_text(encoding="utf-8")
    for old, new in (("LORA_R: int = 8 ", "LORA_R: int = 6 "), ("{section:<10}", "{section:<12}")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "my run.py").write_text(text, encoding="utf-8")
    done = give("my run.py", *short_run(tiny, "--max_steps", "2"))
    assert done.returncode == 0, done.stderr
    assert not re.search("(?m)^warning ", done.stdout)
    output = tmp_path / "output"
    record = read_record(output)
    assert names_in(output) == RESULTS | {*BY_INSPECTOR}
    assert record["settings"]["LORA_R"] == record["lora_config"]["r"] == 6
    tensors = load_file(output / "final_lora" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {6}
    assert json.loads((output / "final_lora" / "adapter_config.json").read_text())["r"] == 6
    # What is edited in the copy holds for what inspect_lora.py prints as well.
    by_inspector = ("learned", "samples") if HAS_INSPECTOR else ()
    for section in ("plan", "train", "verified", *by_inspector, "done"):
        assert re.search(rf"(?m)^{section:<12}\S", done.stdout), section
    if not HAS_INSPECTOR:
        return
    assert "cut to 3 directions" in done.stdout and "cut to 4 directions" not in done.stdout
    assert command_in(done.stdout, "python", "inspect_lora.py", "chat")[3:] == ["output/final_lora"]
