"""Checkpoints, signals, locks, full disks, outputs that go away, and several processes."""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import pty
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import types
from functools import lru_cache
from pathlib import Path

import accelerate
import filelock
import peft
import pytest
import safetensors.torch
import torch
import transformers
from conftest import BY_INSPECTOR, default_handlers, needs_inspector, write_short_data
from processes import FORKS
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from trainers import command_in

import train_lora_single as t

STEPS = 8  # two epochs of four, with a checkpoint every three steps
RESULTS = ("final_lora", "final_lora_vllm", *BY_INSPECTOR)
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
KEPT_FILES = ADAPTER_FILES | {"complete.json"}  # of an epoch that is not the newest


# ==== What the tests share


@pytest.fixture(autouse=True)
def without_picture(no_picture):
    """Draw nothing in any test of this file."""


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Return the flags of a short run without samples; each test adds an --output_dir."""
    return [*write_short_data(tmp_path_factory.mktemp("data")), "--num_samples", "0"]


@pytest.fixture(scope="module")
def whole(finished):
    """Return the adapter's bytes and the losses of a run that nothing interrupted."""
    return adapter(finished), losses(finished)


@pytest.fixture(scope="module")
def interrupted(flags, whole, tmp_path_factory):
    """Return the output of a run stopped after step 7, with whole checkpoints of 6 and 7."""
    output = tmp_path_factory.mktemp("interrupted") / "output"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 7, send(signal.SIGINT))
        assert run(command(flags, output)) == 130
    assert complete(output) == [6, 7]
    return output


@pytest.fixture
def stopped(interrupted, tmp_path):
    """Return a copy of the interrupted run, in which an earlier run's results stand."""
    output = shutil.copytree(interrupted, tmp_path / "output")
    put_old_results(output)
    return output


def command(flags, output, *more):
    """Return the flags of a run into output; later ones override earlier ones."""
    return [*flags, "--output_dir", str(output), *map(str, more)]


def run(argv):
    """Give the command in this process; return its exit status."""
    default_handlers()
    try:
        t.main(argv)
    except SystemExit as stop:
        if isinstance(stop.code, int):
            return stop.code
        print(stop.code, file=sys.stderr)  # as Python does
        return 1
    except KeyboardInterrupt:  # pytest would take it for its own
        traceback.print_exc()
        return -signal.SIGINT
    return 0


def go_on(argv, whole, capfd):
    """Give the command, which must end as the run that nothing interrupted.

    Return the step of the checkpoint that it resumed from, or None if it began anew.
    """
    output = Path(argv[argv.index("--output_dir") + 1])
    capfd.readouterr()
    assert run(argv) == 0, capfd.readouterr().err
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err
    assert adapter(output) == whole[0]
    assert losses(output) == whole[1]
    assert record(output)["outcome"] == "finished"
    assert not [*output.rglob("*.new")] and not (output / ".partial").exists()
    resumed_from = record(output)["resumed_from"]
    assert bool(re.search("^resume ", printed.out, re.MULTILINE)) == bool(resumed_from)
    return int(resumed_from.rpartition("-")[2]) if resumed_from else None


def flat(text):
    """Return text on one line: messages are broken where they reach the width of a terminal."""
    return " ".join(text.split())


def adapter(output):
    """Return the bytes of the published adapter."""
    return (output / "final_lora" / "adapter_model.safetensors").read_bytes()


def record(output):
    """Return what run.json holds."""
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def losses(output):
    """Return (step, loss) of all training and held-out losses, in order."""
    history = record(output)["loss_history"]
    return [(e["step"], e[key]) for e in history for key in ("loss", "eval_loss") if key in e]


def files(path):
    """Return the bytes of a file, or of each file in a folder; not of the log and the lock."""
    if path.is_file():
        return path.read_bytes()
    return {
        str(one.relative_to(path)): one.read_bytes()
        for one in path.rglob("*")
        if one.is_file() and one.name not in ("all_logs.log", ".lock")
    }


def complete(output):
    """Return the steps of the checkpoints that have all the files that they say they have."""
    steps = []
    for path in output.glob("checkpoints/*/complete.json"):
        names = json.loads(path.read_text("utf-8")).keys()
        if names <= {one.name for one in path.parent.iterdir()}:
            steps.append(int(path.parent.name.rpartition("-")[2]))
    return sorted(steps)


def put_old_results(output):
    """Put results of an earlier run into output."""
    for name in RESULTS:
        path = output / name
        if "final" in name:
            path /= "adapter_model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"old")


def has_old_results(output):
    """Return whether they are all still there, in place or renamed."""

    def is_old(path):
        path = path / "adapter_model.safetensors" if path.is_dir() else path
        return path.exists() and path.read_bytes() == b"old"

    return all(
        any(is_old(path) for path in [output / name, *output.glob(f"{name}.2*")])
        for name in RESULTS
    )


def prepared(flags, output, *more):
    """Return the Job as it is when the run looks for a checkpoint."""
    job = t.Job(t.parse_settings(command(flags, output, *more)))
    t.prepare(job)
    return job


def found_by(job):
    """Return the name of the checkpoint that would be resumed, or None."""
    job.checkpoint = None
    t.resume_or_begin(job)
    return job.checkpoint and job.checkpoint.name


# ==== Doing something at a chosen moment


def send(*numbers):
    """Return what sends this process signals, one after the other."""
    return lambda *_, **__: [os.kill(os.getpid(), number) for number in numbers]


def die(*_, **__):
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(patch, owner, name, action, number=1):
    """Do action(*arguments) before call number (from 1) of owner.name."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            action(*args, **kwargs)
        return real(*args, **kwargs)

    patch.setattr(owner, name, call)


def at_step(patch, number, action):
    """Do action within this run's training step number; after a resume they count from 1."""
    before(patch, accelerate.Accelerator, "backward", action, number)


def at_saved(patch, part, action):
    """Do action(path) when torch has written the file whose path holds part."""
    real = torch.save

    def save(thing, path, *args, **kwargs):
        real(thing, path, *args, **kwargs)
        if part in str(path):
            action(path)

    patch.setattr(torch, "save", save)


def at_generation(patch, action):
    """Do action before the samples' replies are generated."""
    before(patch, transformers.GenerationMixin, "generate", action)


# An audit hook stays for ever, so there is one, which calls these with (event, path, other path).
ON_CHANGE = []
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def audit(event, args):
    """Tell the watchers of a change; what they change themselves is none of the run's."""
    if not ON_CHANGE or event not in CHANGES:
        return
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    actions = ON_CHANGE[:]
    ON_CHANGE.clear()
    try:
        for action in actions:
            action(event, *(str(arg) for arg in args[:2]))
    finally:
        ON_CHANGE[:] = actions


def watch_changes(action):
    """Call action(event, path, other path) before each change of a file, wherever it is."""
    if not getattr(sys, "is_audited", False):
        sys.addaudithook(audit)
        sys.is_audited = True
    ON_CHANGE.append(action)


def at_change(event, part, action, number=1):
    """Do action before change number (from 1) of a path, or a new name, that holds part."""
    seen = []

    def see(found, path, other):
        if found == event and part in (other if event == "os.rename" else path):
            seen.append(path)
            if len(seen) == number:
                action()

    watch_changes(see)


@pytest.fixture(autouse=True)
def no_watchers():
    yield
    ON_CHANGE.clear()


ACTIONS = {"nothing": lambda patch: None}  # name: what a forked process does first


def fork(argv, action, said, environment=()):
    """Start the real command in a process of its own, which does ACTIONS[action](patch) first."""
    process = FORKS.Process(target=in_a_fork, args=(argv, action, str(said), dict(environment)))
    process.start()
    return process


def in_a_fork(argv, action, said, environment):
    """Be the command: run the script's file as Python does, with its output in the file said."""
    os.environ.update(environment)
    os.setpgrp()
    for number in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    patch = pytest.MonkeyPatch()
    patch.setattr("matplotlib.figure.Figure.savefig", lambda _, path: Path(path).write_bytes(b"x"))
    ACTIONS[action](patch)
    sys.argv = ["train_lora_single.py", *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


def ended(process, seconds=120):
    """Wait for a process, and return its exit status."""
    process.join(seconds)
    hangs = process.exitcode is None
    if hangs:
        process.kill()
        process.join()
    assert not hangs
    return process.exitcode


# ==== Signals

WITHIN = {  # moment: (what happens then, the step that is finished and saved)
    "SIGINT in step 2": (lambda p: at_step(p, 2, send(signal.SIGINT)), 2),
    "SIGTERM while epoch 1 is evaluated": (
        lambda p: before(p, t, "example_losses", send(signal.SIGTERM), 2), 4
    ),
    "SIGHUP while a checkpoint is written": (
        lambda p: at_saved(p, "checkpoint-6/optimizer.pt", send(signal.SIGHUP)), 6
    ),
    "SIGTERM in the last step": (lambda p: at_step(p, 8, send(signal.SIGTERM)), 8),
}  # fmt: skip


@pytest.mark.parametrize("moment", WITHIN)
def test_after_a_signal_the_same_command_ends_in_the_same_bytes(
    flags, whole, tmp_path, monkeypatch, capfd, moment
):
    action, step = WITHIN[moment]
    number = signal.Signals[moment.split()[0]]
    with monkeypatch.context() as patch:
        action(patch)
        assert run(command(flags, tmp_path)) == 128 + number
    printed = capfd.readouterr()
    assert re.search("^stopping .*second signal", printed.out, re.MULTILINE)  # at once
    said = flat(printed.err)
    assert f"after step {step} of 8" in said and f"checkpoint-{step}" in said
    assert "Traceback" not in said
    assert record(tmp_path)["outcome"].startswith(f"interrupted: Stopped after step {step} of 8")
    assert complete(tmp_path)[-1] == step == losses(tmp_path)[-1][0]
    assert not (tmp_path / "final_lora").exists()
    assert go_on(command(flags, tmp_path), whole, capfd) == step


EARLY = {
    "while the log is opened": lambda p: at_change("open", "all_logs.log", send(signal.SIGINT)),
    "while the data is read": lambda p: before(p, t, "read_examples", send(signal.SIGINT)),
    "while the weights are loaded": lambda p: before(
        p, transformers.AutoModelForCausalLM, "from_pretrained", send(signal.SIGINT)
    ),
    "while the base is evaluated": lambda p: before(
        p, t, "example_losses", send(signal.SIGINT)
    ),
}  # fmt: skip


@pytest.mark.parametrize("moment", EARLY)
def test_a_signal_before_the_first_step_stops_at_once(flags, tmp_path, monkeypatch, capfd, moment):
    EARLY[moment](monkeypatch)
    assert run(command(flags, tmp_path)) == 130
    said = flat(capfd.readouterr().err)
    assert said.count("Stopped.") == 1 and "Traceback" not in said
    assert not complete(tmp_path) and not (tmp_path / "final_lora").exists()
    if (tmp_path / "run.json").exists():
        assert record(tmp_path)["outcome"].startswith("interrupted: Stopped.")
        assert not [step for step, _ in losses(tmp_path) if step]


def test_a_signal_before_the_adapter_is_in_place_loses_nothing(
    flags, whole, stopped, monkeypatch, capfd
):
    with monkeypatch.context() as patch:
        before(patch, peft.PeftModel, "from_pretrained", send(signal.SIGTERM))  # in the check
        assert run(command(flags, stopped)) == 143
    said = flat(capfd.readouterr().err)
    assert "same command goes on" in said and "Traceback" not in said
    assert record(stopped)["outcome"].startswith("interrupted: Stopped.")
    assert adapter(stopped) == b"old" and complete(stopped) == [7, 8]
    assert not (stopped / ".partial").exists()
    assert go_on(command(flags, stopped), whole, capfd) == 8
    assert has_old_results(stopped)


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]])
@pytest.mark.parametrize("event", ["os.rename", "os.remove"])
def test_a_signal_while_the_adapter_is_moved_into_place_waits_until_it_is(
    flags, whole, stopped, monkeypatch, capfd, event, numbers
):
    """Between two renames there is no final_lora; then job.json, with which the run ends, goes."""
    part, number = {"os.rename": ("output/final_lora", 3), "os.remove": ("job.json", 1)}[event]
    moments = []

    def strike():
        moments.append((stopped / "final_lora").exists())
        send(*numbers)()

    at_change(event, part, strike, number)
    assert run(command(flags, stopped)) == 128 + numbers[0]
    assert moments == [event == "os.remove"]
    said = flat(capfd.readouterr().err)
    assert f"{stopped}/final_lora is complete" in said and "Traceback" not in said
    assert adapter(stopped) == whole[0] and has_old_results(stopped)
    assert record(stopped)["outcome"] == "finished" and not (stopped / ".partial").exists()
    assert found_by(prepared(flags, stopped)) is None  # so the next command trains anew


AFTERWARDS = {
    "evidence": lambda p: before(p, t, "example_losses", send(signal.SIGINT), 2),
    "samples": lambda p: at_generation(p, send(signal.SIGINT)),
}


@needs_inspector
@pytest.mark.parametrize("what", AFTERWARDS)
def test_a_signal_in_the_extras_leaves_a_whole_adapter(
    flags, whole, stopped, monkeypatch, capfd, what
):
    AFTERWARDS[what](monkeypatch)
    assert run(command(flags, stopped, "--num_samples", 1)) == 130
    said = capfd.readouterr().err
    assert f"{stopped}/final_lora is complete" in flat(said) and "Traceback" not in said
    command_in(said, "python", "inspect_lora.py", "evidence", f"{stopped}/final_lora")
    assert adapter(stopped) == whole[0] and has_old_results(stopped)
    assert record(stopped)["outcome"] == "finished"  # the rest can be done without
    assert found_by(prepared(flags, stopped)) is None  # so the next command trains anew


@needs_inspector
@pytest.mark.parametrize(
    "name", ["o", "a folder whose name has blanks in it, and many of them " * 3]
)
def test_the_command_that_ctrl_c_in_the_evidence_prints_measures_the_adapter(
    flags, whole, interrupted, tmp_path, monkeypatch, capfd, name
):
    """Whatever the folder is called, it can be pasted; nothing is trained."""
    import inspect_lora

    output = shutil.copytree(interrupted, tmp_path / name)
    with monkeypatch.context() as patch:
        AFTERWARDS["evidence"](patch)
        assert run(command(flags, output, "--evidence_examples", 2)) == 130
    said = capfd.readouterr().err
    assert "retrain from scratch" in flat(said) and not record(output).get("evidence")
    words = command_in(said, "python", "inspect_lora.py", "evidence", f"{output}/final_lora")
    inspect_lora.main(words[2:])
    assert record(output)["evidence"]["examples"] == 4 and adapter(output) == whole[0]


def test_a_second_signal_in_a_step_stops_at_once(flags, whole, tmp_path, monkeypatch, capfd):
    at_step(monkeypatch, 6, send(signal.SIGTERM, signal.SIGINT))
    assert run(command(flags, tmp_path)) == 130
    said = flat(capfd.readouterr().err)
    assert said.count("Stopped.") == 1 and "Traceback" not in said
    assert record(tmp_path)["outcome"].startswith("interrupted: Stopped.")
    assert complete(tmp_path) == [3, 4]  # step 6 was neither finished nor saved
    assert losses(tmp_path) == [one for one in whole[1] if one[0] <= 5]


def test_a_second_signal_while_a_checkpoint_is_written_costs_only_that(
    flags, whole, tmp_path, monkeypatch, capfd
):
    def cut(path):
        os.truncate(path, 1000)
        send(signal.SIGINT)()

    with monkeypatch.context() as patch:
        at_step(patch, 5, send(signal.SIGINT))
        at_saved(patch, "checkpoint-5/optimizer.pt", cut)
        assert run(command(flags, tmp_path)) == 130
    assert (tmp_path / "checkpoints" / "checkpoint-5").exists()
    assert go_on(command(flags, tmp_path), whole, capfd) == 4


def test_a_signal_while_the_end_is_recorded_changes_nothing(flags, tmp_path, monkeypatch, capfd):
    sent = []
    at_step(monkeypatch, 1, send(signal.SIGINT))
    # The first time it is written is the start, the second the checkpoint.
    at_change("os.rename", "/run.json", lambda: sent.append(send(signal.SIGINT)()), number=3)
    assert run(command(flags, tmp_path)) == 130 and sent
    assert record(tmp_path)["outcome"].startswith("interrupted: Stopped after step 1 of 8")
    assert "Traceback" not in capfd.readouterr().err


def test_the_folder_stays_locked_until_the_end_is_recorded(flags, tmp_path, monkeypatch):
    found = []

    def try_to_lock():
        lock = filelock.FileLock(tmp_path / ".lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            found.append("locked")
        else:
            lock.release()
            found.append("free")

    at_step(monkeypatch, 1, send(signal.SIGINT))
    for number in (1, 2, 3):  # the start, the checkpoint, the end
        at_change("os.rename", "/run.json", try_to_lock, number)
    assert run(command(flags, tmp_path)) == 130
    try_to_lock()
    assert found == ["locked", "locked", "locked", "free"]


def test_a_signal_that_was_ignored_stays_ignored(flags, whole, tmp_path, monkeypatch):
    """As SIGHUP is under nohup, and SIGINT in a shell's background, to the very end."""
    ignored = (signal.SIGHUP, signal.SIGINT)
    at_step(monkeypatch, 2, send(*ignored))
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    t.main(command(flags, tmp_path))
    assert adapter(tmp_path) == whole[0]
    assert [signal.getsignal(number) for number in ignored] == [signal.SIG_IGN, signal.SIG_IGN]


@pytest.mark.parametrize("other", [None, OSError("cut off")])
def test_a_signal_that_a_library_swallows_or_turns_into_an_error_counts(
    flags, tmp_path, monkeypatch, capfd, other
):
    def swallow(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            if other:
                raise other from None

    before(monkeypatch, transformers.AutoModelForCausalLM, "from_config", swallow)
    assert run(command(flags, tmp_path)) == 143
    said = flat(capfd.readouterr().err)
    assert "Stopped" in said and "Traceback" not in said
    assert ("after step 1 of 8" in said) == (other is None)


# ==== Killed


def cut_and_die(path):
    os.truncate(path, 1000)
    die()


KILLED = {  # what the process does to itself, and the step that is resumed from
    "in a step": (lambda p: at_step(p, 1, die), 7),
    "while optimizer.pt is written": (lambda p: at_saved(p, "-8/optimizer.pt", cut_and_die), 7),
    "between two renames": (lambda _: at_change("os.rename", "output/final_lora", die, 4), 8),
    "in the evidence": (lambda p: before(p, torch.linalg, "svdvals", die), None),
}
ACTIONS |= {moment: action for moment, (action, _) in KILLED.items()}
ACTIONS["is killed in step 6"] = lambda patch: at_step(patch, 6, die)


@pytest.mark.parametrize(
    "moment", [*list(KILLED)[:-1], pytest.param("in the evidence", marks=needs_inspector)]
)
def test_after_sigkill_the_same_command_ends_in_the_same_bytes(
    flags, whole, stopped, tmp_path, capfd, moment
):
    process = fork(command(flags, stopped), moment, tmp_path / "said")
    assert ended(process) == -signal.SIGKILL, (tmp_path / "said").read_text("utf-8")
    assert has_old_results(stopped)
    step = KILLED[moment][1]
    if step is None:  # the adapter is checked and in place, so the next command trains anew
        assert adapter(stopped) == whole[0] and record(stopped)["outcome"] == "finished"
        assert found_by(prepared(flags, stopped)) is None
    else:
        assert record(stopped)["outcome"] == "running"
        # The losses up to the newest checkpoint are there, those before the resume among them.
        assert losses(stopped) == [one for one in whole[1] if one[0] <= step]
        assert go_on(command(flags, stopped), whole, capfd) == step
        assert has_old_results(stopped)


def test_after_sigkill_run_json_has_the_losses_up_to_the_checkpoint(flags, whole, tmp_path):
    process = fork(command(flags, tmp_path), "is killed in step 6", tmp_path / "said")
    assert ended(process) == -signal.SIGKILL, (tmp_path / "said").read_text("utf-8")
    assert record(tmp_path)["outcome"] == "running" and complete(tmp_path) == [3, 4]
    assert losses(tmp_path) == [one for one in whole[1] if one[0] <= 4]


def test_whenever_it_is_killed_there_is_enough_left(flags, whole, tmp_path, monkeypatch, capfd):
    """A copy of the folder before each change of a file is what a kill would leave there."""
    output, copy = tmp_path / "output", tmp_path / "copy"
    put_old_results(output)
    (output / "run.json").write_text('"old"')
    (output / "checkpoints" / "checkpoint-99").mkdir(parents=True)
    (output / "checkpoints" / "checkpoint-99" / "adapter_model.safetensors").write_bytes(b"old")
    cached = lru_cache(importlib.metadata.version)  # run.json is written again and again
    monkeypatch.setattr(importlib.metadata, "version", cached)
    job = prepared(flags, copy)
    seen, steps, faults = set(), [0], []

    def look():
        paths = sorted(path for path in output.rglob("*") if path.is_file())
        state = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
        if state in seen:
            return
        seen.add(state)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(output, copy)
        assert has_old_results(copy)
        assert [*copy.glob("checkpoints*/checkpoint-99")]
        assert '"old"' in [path.read_text("utf-8") for path in copy.glob("run.json*")]
        for name in ("final_lora", "final_lora_vllm"):
            place = copy / name / "adapter_model.safetensors"
            if place.parent.exists() and place.read_bytes() != b"old":
                assert len(load_file(place)) == 20  # whole
        if not (copy / "checkpoints" / "job.json").exists():  # not begun yet, or published
            assert steps == [0] or adapter(copy) == whole[0]
            return
        found = found_by(job)
        steps.append(int(found.rpartition("-")[2]) if found else 0)

    def look_safely(event, path, _):
        try:
            # Opened for writing, they would be empty for a while; a rename is at once.
            assert event != "open" or Path(path).name not in ("run.json", "complete.json")
            look()
        except BaseException:  # the run would take it for its own
            faults.append(traceback.format_exc())

    watch_changes(look_safely)
    t.main(command(flags, output))
    ON_CHANGE.clear()
    look()
    assert faults == []
    assert len(seen) > 40
    assert steps == sorted(steps) and {*steps} == {0, 3, 4, 6, 8}  # none is lost once it is there


# ==== Checkpoints: which are kept, what they hold, which are passed over


def test_checkpoints_hold_what_resuming_needs_and_older_ones_less(interrupted, finished, tiny):
    folder = interrupted / "checkpoints"
    names = {path.name for path in folder.iterdir()}
    assert names == {"job.json", "checkpoint-4", "checkpoint-6", "checkpoint-7"}
    assert {path.name for path in (folder / "checkpoint-4").iterdir()} == KEPT_FILES
    needed = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    for step in (6, 7):
        assert needed | ADAPTER_FILES < {p.name for p in (folder / f"checkpoint-{step}").iterdir()}
        tensors = load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors")
        assert all(re.search(r"\.lora_[AB]\.weight$", name) for name in tensors)  # no base weights
    # Of a finished run each epoch's adapter stays.
    kept = {str(p.relative_to(finished)) for p in finished.glob("checkpoints/**/*") if p.is_file()}
    assert kept == {f"checkpoints/checkpoint-{n}/{name}" for n in (4, 8) for name in KEPT_FILES}


def test_old_checkpoints_that_cannot_be_removed_are_one_warning_each_time(
    flags, tmp_path, monkeypatch, capsys
):
    """As on a network's file system, where a file that is open elsewhere cannot be removed."""
    rmtree, unlink = shutil.rmtree, Path.unlink

    def stuck_folder(path, *given, **how):
        if Path(path).name == "checkpoint-3":
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        rmtree(path, *given, **how)

    def stuck_file(path, *given, **how):
        if path.parent.name == "checkpoint-4" and path.name == "optimizer.pt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        unlink(path, *given, **how)

    monkeypatch.setattr(shutil, "rmtree", stuck_folder)
    monkeypatch.setattr(Path, "unlink", stuck_file)
    output = tmp_path / "output"
    assert run(command(flags, output)) == 0
    out = capsys.readouterr().out
    said = [line for line in out.splitlines() if line.startswith("warning ")]
    assert [re.findall(r"checkpoint-\d", line) for line in said] == [["checkpoint-3"]] + [
        ["checkpoint-3", "checkpoint-4"]
    ] * 2
    assert all(f"{output}/checkpoints" in line and "by hand" in line for line in said)
    assert "Directory not empty" in said[0] and "Permission denied" in said[1]
    assert json.loads((output / "run.json").read_bytes())["outcome"] == "finished"
    left = {path.name for path in (output / "checkpoints").iterdir()}
    assert left == {"checkpoint-3", "checkpoint-4", "checkpoint-8"}  # 6 is removed all the same


CHECKPOINT_FILES = """adapter_config.json adapter_model.safetensors optimizer.pt scheduler.pt
rng_state.pth trainer_state.json complete.json"""


def test_a_checkpoint_with_a_broken_file_is_passed_over(flags, interrupted, tmp_path, capfd):
    output = shutil.copytree(interrupted, tmp_path / "output")
    newest, job = output / "checkpoints" / "checkpoint-7", prepared(flags, output)
    assert found_by(job) == "checkpoint-7"
    for name in CHECKPOINT_FILES.split():
        data = (newest / name).read_bytes()
        for broken in (data[:-1], bytes(len(data)), b"", None):
            if broken is None:
                (newest / name).unlink()
            else:
                (newest / name).write_bytes(broken)
            assert found_by(job) == "checkpoint-6", (name, broken and broken[:9])
        (newest / name).write_bytes(data)
    assert found_by(job) == "checkpoint-7"


def break_all(output):
    for step in (6, 7):
        (output / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"")


NOTHING_TO_RESUME = {
    "all are broken": break_all,
    "job.json is cut": lambda o: (o / "checkpoints" / "job.json").write_bytes(b'{"MODEL_NA'),
    "job.json is missing": lambda o: (o / "checkpoints" / "job.json").unlink(),
}


@pytest.mark.parametrize("what", NOTHING_TO_RESUME)
def test_checkpoints_that_cannot_be_resumed_are_renamed(flags, stopped, what):
    NOTHING_TO_RESUME[what](stopped)
    old, run_before = files(stopped / "checkpoints"), files(stopped / "run.json")
    assert found_by(prepared(flags, stopped)) is None
    (renamed,), (run_renamed,) = stopped.glob("checkpoints.2*"), stopped.glob("run.json.2*")
    assert files(renamed) == old and files(run_renamed) == run_before
    assert {path.name for path in (stopped / "checkpoints").iterdir()} == {"job.json"}


def test_what_a_user_keeps_among_the_checkpoints_is_left_alone(flags, whole, stopped, capfd):
    folder = stopped / "checkpoints"
    shutil.copytree(folder / "checkpoint-7", folder / "checkpoint-11-backup")
    (folder / "checkpoint-notes.txt").write_text("mine")
    (folder / "checkpoint-4" / "mine").mkdir()
    (folder / "checkpoint-4" / "mine" / "notes").write_text("precious")
    mine = {name: data for name, data in files(folder).items() if re.search("backup|notes", name)}
    assert go_on(command(flags, stopped, "--save_steps", 1), whole, capfd) == 7
    assert mine.items() <= files(folder).items() and len(mine) > 8


class Payload:
    """What makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_is_not_run(flags, stopped, tmp_path, name):
    marker, folder = tmp_path / "marker", stopped / "checkpoints" / "checkpoint-7"
    torch.save(Payload(marker), folder / name)
    hashes = json.loads((folder / "complete.json").read_text("utf-8"))
    hashes[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "complete.json").write_text(json.dumps(hashes))
    with pytest.raises(Exception, match=r"[Ww]eights"):
        t.main(command(flags, stopped))
    assert record(stopped)["resumed_from"] == str(folder) and not marker.exists()
    torch.load(folder / name, weights_only=False)
    assert marker.exists()  # it was a loaded gun


# ==== Another job


def refused(job):
    """Return {what differs: (then, now)} of a job that is refused."""
    with pytest.raises(SystemExit) as stop:
        found_by(job)
    said = str(stop.value)
    assert "checkpoint-7 was made with other" in flat(said) and "another OUTPUT_DIR" in flat(said)
    rows = re.findall(r"(?m)^  (\S.*) was (.*) and is now (.*)$", said)
    return {name: (then, now) for name, then, now in rows}


def other_value(value):
    """Return another value of a setting's type."""
    if isinstance(value, list):
        return value[1:]
    return f"{value}x" if isinstance(value, str) else value + 1


STEP_SIZE = ("BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS")


def test_every_setting_must_stay_but_for_those_that_may_change(flags, interrupted, tmp_path):
    job = prepared(flags, shutil.copytree(interrupted, tmp_path / "output"))
    names = [name for name in vars(job.settings) if name.isupper()]
    may_change = t.MAY_CHANGE_ON_RESUME | t.COMPARED_BY_EFFECT
    assert len(names) > 25 and {*names} > may_change
    for name in names:
        if name in ("OUTPUT_DIR", "DEVICE", "TRAIN_FILE", "EVAL_FILE"):
            continue  # the next test gives them
        value = getattr(job.settings, name)
        setattr(job.settings, name, other_value(value))
        if name in STEP_SIZE:  # of which only the product must stay
            assert refused(job) == {" x ".join(STEP_SIZE): ("4", "6")}
        elif name in may_change:
            assert found_by(job) == "checkpoint-7", name
        else:
            found = refused(job)
            pair = found.pop(name)
            if not isinstance(value, list):  # whose order does not matter
                assert pair == (str(value), str(other_value(value)))
            of_config = {name for name in found if name.startswith("LoraConfig.")}
            assert found.keys() - of_config <= {"the files of MODEL_NAME"}
        setattr(job.settings, name, value)
    job.matmul = {"used": "float16"}
    assert refused(job) == {"the products in use": ("native", "float16")}


def test_moved_files_and_other_output_settings_are_the_same_job(
    flags, whole, stopped, tmp_path, capfd
):
    """The output folder is moved too: it is a copy."""
    settings = t.parse_settings(flags)
    shutil.copy(settings.TRAIN_FILE, tmp_path / "train moved")
    shutil.copy(settings.EVAL_FILE, tmp_path / "eval moved")
    moved = ["--train_file", tmp_path / "train moved", "--eval_file", tmp_path / "eval moved"]
    more = ["--save_steps", 1, "--logging_steps", 5, "--matmul", "native", "--eval_group", "kind"]
    assert go_on(command(flags, stopped, *moved, *more), whole, capfd) == 7


@pytest.mark.parametrize("factors", [(4, 1), (1, 4)])
def test_another_way_to_the_same_size_of_a_step_is_the_same_job(
    flags, whole, stopped, capfd, factors
):
    step = zip(("--batch_size", "--gradient_accumulation_steps"), factors, strict=True)
    assert (
        go_on(command(flags, stopped, *(word for pair in step for word in pair)), whole, capfd) == 7
    )


@needs_inspector
def test_what_was_measured_of_a_checkpoint_stays_when_the_run_goes_on(flags, whole, stopped, capfd):
    """And it goes with the old run.json when the next run begins anew."""
    import inspect_lora

    place = stopped / "checkpoints" / "checkpoint-7"
    for when in ("on Monday", "on Tuesday"):
        found = inspect_lora.find_run(place)
        inspect_lora.add_to_record({"evidence": {"adapter": 1.5}, "measured": when}, place, found)
    measured = {key: record(stopped)[key] for key in ("checkpoint_findings", "earlier_findings")}
    assert list(measured["earlier_findings"]) == ["checkpoint-7, on Monday"]
    assert found_by(prepared(flags, stopped)) == "checkpoint-7"
    assert measured.items() <= record(stopped).items() and record(stopped)["outcome"] == "running"
    assert go_on(command(flags, stopped), whole, capfd) == 7
    assert measured.items() <= record(stopped).items()
    assert found_by(prepared(flags, stopped)) is None
    assert not measured.keys() & record(stopped).keys()
    (renamed,) = stopped.glob("run.json.2*")
    assert measured.items() <= json.loads(renamed.read_text(encoding="utf-8")).items()


def test_all_that_differs_is_named_at_once_and_nothing_is_touched(flags, stopped, capfd):
    before_it = files(stopped)
    assert run(command(flags, stopped, "--lora_r", 4, "--seed", 7, "--eval_file", "")) == 1
    said = flat(capfd.readouterr().err)
    assert "Traceback" not in said
    for part in (
        "LORA_R was 8 and is now 4",
        "SEED was 42 and is now 7",
        "the tokens of EVAL_FILE",
    ):
        assert part in said
    assert files(stopped) == before_it


def test_a_setting_that_is_new_is_said_to_be(flags, stopped, capfd):
    """What it did before there was a setting for it, nobody can tell."""
    path = stopped / "checkpoints" / "job.json"
    job = json.loads(path.read_text())
    del job["WARMUP_RATIO"]
    path.write_text(json.dumps(job | {"GONE": 3}))
    assert run(command(flags, stopped)) == 1
    said = flat(capfd.readouterr().err)
    assert "WARMUP_RATIO did not exist and is now 0.03" in said and "None" not in said
    assert "GONE was 3 and does not exist now" in said


def test_another_limit_that_leaves_out_no_example_is_the_same_job(flags, whole, stopped, capfd):
    assert go_on(command(flags, stopped, "--max_seq_len", 4000), whole, capfd) == 7


def test_an_edited_lora_config_is_another_job(flags, interrupted, tmp_path, monkeypatch):
    job = prepared(flags, shutil.copytree(interrupted, tmp_path / "output"))
    real = t.lora_config

    def edited(settings):
        config = real(settings)
        config.use_rslora = True
        return config

    monkeypatch.setattr(t, "lora_config", edited)
    assert refused(job) == {"LoraConfig.use_rslora": ("False", "True")}


def adopt(interrupted, job):
    """Make the interrupted run's checkpoint one of this job."""
    job.output.mkdir()
    assert found_by(job) is None  # it writes down which job it is
    name = "checkpoints/checkpoint-7"
    shutil.copytree(interrupted / name, job.output / name)
    assert found_by(job) == "checkpoint-7"


def test_the_order_of_a_set_in_lora_config_does_not_matter(
    flags, interrupted, tmp_path, monkeypatch
):
    """PEFT makes sets of some lists, whose order is another one in every process."""
    names = [f"layer_{number}" for number in range(1000)]
    pair = next([a, b] for a in names for b in names if [*{a, b}] != [*{b, a}])
    job = prepared(flags, tmp_path / "output")
    real = t.lora_config

    def exclude(some):
        def edited(settings):
            config = real(settings)
            config.exclude_modules = {*some}
            return config

        monkeypatch.setattr(t, "lora_config", edited)

    exclude(pair)
    adopt(interrupted, job)
    exclude(pair[::-1])
    assert found_by(job) == "checkpoint-7"


@pytest.mark.parametrize("name", ["train", "eval"])
def test_another_word_in_the_data_is_another_job(flags, interrupted, tmp_path, name):
    output = shutil.copytree(interrupted, tmp_path / "output")
    data = Path(getattr(t.parse_settings(flags), f"{name.upper()}_FILE")).read_bytes()
    at = data.rindex(b".")  # in the last line's reply
    (tmp_path / "other.jsonl").write_bytes(data[:at] + b"!" + data[at + 1 :])
    job = prepared(flags, output, f"--{name}_file", tmp_path / "other.jsonl")
    assert refused(job).keys() == {f"the tokens of {name.upper()}_FILE"}


def scale_weights(model):
    tensors = load_file(model / "model.safetensors")
    larger = {name: tensor * 1.5 for name, tensor in tensors.items()}
    save_file(larger, model / "model.safetensors", {"format": "pt"})


def change_config(model):
    config = json.loads((model / "config.json").read_text("utf-8"))
    config["text_config"]["rms_norm_eps"] = 1e-5
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("edit", [scale_weights, change_config])
def test_an_edited_model_folder_is_another_job(flags, interrupted, tiny, tmp_path, edit):
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / ".cache").mkdir()  # `hf download --local-dir` leaves one
    job = prepared(flags, tmp_path / "output", "--model_name", model)
    adopt(interrupted, job)
    edit(model)
    assert refused(job).keys() == {"the files of MODEL_NAME"}


# ==== What an earlier run left, and other runs


def test_later_runs_rename_all_that_earlier_ones_left(flags, finished, tmp_path):
    """With the same time on all of it, so that the new names collide."""
    output, kept = shutil.copytree(finished, tmp_path / "output"), []
    names, when = [*RESULTS, "checkpoints", "run.json"], time.time() - 1000
    for seed in (7, 8):
        kept.append({name: files(output / name) for name in names})
        for name in names:
            os.utime(output / name, (when, when))
        more = ("--seed", seed, "--num_epochs", 1, "--num_samples", 1)
        assert run(command(flags, output, *more)) == 0
        assert record(output)["resumed_from"] is None
        for name in names:
            left = [files(path) for path in output.glob(f"{name}.2*")]
            assert len(left) == len(kept) and all(one[name] in left for one in kept)
        assert files(output / "final_lora") not in [one["final_lora"] for one in kept]
    there = {path.name.partition(".2")[0] for path in output.iterdir()}
    assert there == {"all_logs.log", ".lock", *names}


def test_a_run_that_is_refused_touches_nothing(flags, stopped, tmp_path, capfd):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    before_it = files(stopped)
    assert run(command(flags, stopped, "--train_file", tmp_path / "bad.jsonl")) == 1
    assert run(command(flags, stopped, "--model_name", tmp_path / "none")) == 1
    assert run(command(flags, stopped, "--lora_target_modules", "none")) == 1
    assert files(stopped) == before_it and "Traceback" not in capfd.readouterr().err


def test_a_users_own_folders_in_the_output_are_left_alone(flags, tmp_path):
    for name in ("partial", "final_lora.mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("precious", encoding="utf-8")
    assert run(command(flags, tmp_path, "--max_steps", 1)) == 0
    for name in ("partial", "final_lora.mine"):
        assert (tmp_path / name / "thesis.txt").read_text() == "precious"


def test_a_second_run_into_the_same_folder_is_refused_at_once(
    flags, whole, tmp_path, monkeypatch, capfd
):
    output, said = tmp_path / "output", tmp_path / "said"

    def start_another(*_):
        before_it = files(output), (output / "all_logs.log").read_bytes()
        assert ended(fork(command(flags, output), "nothing", said)) == 1
        assert before_it == (files(output), (output / "all_logs.log").read_bytes())

    at_step(monkeypatch, 2, start_another)
    assert go_on(command(flags, output), whole, capfd) is None
    text = said.read_text("utf-8")
    assert f"{output} is in use by another run" in flat(text) and "Traceback" not in text
    assert not re.search("^data ", text, re.MULTILINE)  # refused before anything was read


def test_where_files_cannot_be_locked_a_run_goes_on(flags, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    assert run(command(flags, tmp_path, "--max_steps", 1)) == 0


# ==== A full disk


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_safetensors(*_, **__):
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


def full_in_torch(_, path, *__, **___):
    """As torch 2.10 does; only what is free on the disk tells it from a bug."""
    Path(path).write_bytes(b"PK")
    raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")


def nothing_is_free(patch):
    """Have a disk without a free byte."""
    patch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(total=1, used=1, free=0))


def fail_at(patch, owner, name, action, part):
    """Have owner.name do action instead of its work for a path that holds part."""
    real = getattr(owner, name)

    def call(*args, **kwargs):
        is_it = any(part in str(arg) for arg in args)
        return (action if is_it else real)(*args, **kwargs)

    patch.setattr(owner, name, call)


def full_at(*parts):
    """Have the disk be full for every file that is opened whose path holds one of parts."""

    def see(event, path, _):
        if event == "open" and any(part in path for part in parts):
            full()

    watch_changes(see)


FULL = {  # how the disk is found to be full, and the step that is resumed from
    "a checkpoint's adapter": (
        lambda p: fail_at(p, peft.peft_model, "safe_save_file", full_in_safetensors, "point-8"), 7
    ),
    "its optimizer": (
        lambda p: [nothing_is_free(p), fail_at(p, torch, "save", full_in_torch, "optimizer.pt")], 7
    ),
    "complete.json and run.json": (lambda _: full_at("complete.json", "run.json"), 7),
    "final_lora": (lambda _: full_at("final_lora/adapter_config.json"), 8),
    "final_lora_vllm": (
        lambda p: fail_at(p, safetensors.torch, "save_file", full_in_safetensors, "_vllm"), 8
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_is_one_message_and_the_same_command_goes_on(
    flags, whole, stopped, monkeypatch, capfd, what
):
    make_full, step = FULL[what]
    with monkeypatch.context() as patch:
        make_full(patch)
        assert run(command(flags, stopped)) == 1
    ON_CHANGE.clear()
    said = flat(capfd.readouterr().err)
    assert said.count(f"disk of {stopped} is full") == 1 and "Make room" in said
    assert "Traceback" not in said
    ends = "interrupted" if "run.json" in what else "failed: The disk"  # the last one written
    assert record(stopped)["outcome"].startswith(ends)
    assert adapter(stopped) == b"old" and not [*stopped.glob("final_lora.2*")]
    assert go_on(command(flags, stopped), whole, capfd) == step
    assert has_old_results(stopped)


ACTIONS["a full disk at the start"] = lambda _: full_at("job.json")


def test_a_disk_that_is_full_at_the_start_is_one_message(flags, tmp_path):
    output, said = tmp_path / "output", tmp_path / "said"
    output.mkdir()
    (output / "all_logs.log").symlink_to("/dev/full")  # takes no byte of the log
    assert ended(fork(command(flags, output), "a full disk at the start", said)) == 1
    text = said.read_text("utf-8")
    assert flat(text).count("is full. Make room") == 1 and "Traceback" not in text


@pytest.fixture
def small_disk(tmp_path):
    """Return a file system of 8 MB that a test may fill; it needs the right to mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield tmp_path
    (tmp_path / "filler").unlink(missing_ok=True)
    logging.shutdown()  # closes the log, which needs room
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(folder, room):
    """Leave only so many bytes on folder's file system."""
    (folder / "room").write_bytes(bytes(room))
    with open(folder / "filler", "wb", 0) as filler:
        for size in (2**16, 2**12, 1):
            with contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(size))
    (folder / "room").unlink()


# The adapter takes 125 kB, the tokenizer as much, the optimizer 250 kB: each is cut once.
@pytest.mark.parametrize(("moment", "room"), [("step", 0), ("step", 400_000), ("end", 0)])
def test_on_a_disk_that_is_really_full_nothing_is_lost(
    flags, whole, interrupted, small_disk, monkeypatch, capfd, moment, room
):
    output = shutil.copytree(interrupted, small_disk / "output")
    put_old_results(output)
    with monkeypatch.context() as patch:
        if moment == "step":
            at_step(patch, 1, lambda *_: fill(small_disk, room))
        else:
            before(patch, t, "publish", lambda *_: fill(small_disk, room))
        assert run(command(flags, output)) == 1
    said = flat(capfd.readouterr().err)
    assert "Traceback" not in said and said.count("is full. Make room") == 1
    # What was cut may have taken the room for a new run.json: then the last one stands.
    assert record(output)["outcome"].startswith(("running", "failed"))
    assert adapter(output) == b"old"
    (small_disk / "filler").unlink()
    logging.shutdown()  # the log could not be closed before
    assert go_on(command(flags, output), whole, capfd) == (7 if moment == "step" else 8)


# ==== Outputs that go away


def to_a_pipe():
    """Send stdout and stderr to a pipe; return the reader's end."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)
    return reader


def dev_full(_):
    for number in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def tee_dies_before_ctrl_c(patch):
    reader = to_a_pipe()
    at_step(patch, 1, lambda *_: [os.close(reader), send(signal.SIGINT)()])


def terminal_goes_away(patch):
    reader, writer = pty.openpty()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)
    # Both the shell and the kernel send the signal.
    hang_up = send(signal.SIGHUP)
    at_step(patch, 1, lambda *_: [os.close(reader), hang_up(), time.sleep(0.02), hang_up()])


def closed(_):
    """Have no standard files at all, as after <&- >&- 2>&-."""
    for number in (0, 1, 2):
        os.close(number)
    sys.stdin = sys.stdout = sys.stderr = None


OUTPUTS = {
    "to /dev/full": (dev_full, 0), "to a tee that dies": (tee_dies_before_ctrl_c, 130),
    "to a terminal that goes": (terminal_goes_away, 129), "closed": (closed, 0),
}  # fmt: skip
ACTIONS |= {name: action for name, (action, _) in OUTPUTS.items()}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_goes_away_costs_nothing(flags, whole, stopped, tmp_path, name):
    status = OUTPUTS[name][1]
    process = fork(command(flags, stopped), name, tmp_path / "said")
    assert ended(process) == status, (stopped / "all_logs.log").read_text("utf-8")
    if status:
        assert record(stopped)["outcome"].startswith("interrupted: Stopped after step 8 of 8")
        assert complete(stopped) == [7, 8]
    else:
        assert record(stopped)["outcome"] == "finished" and adapter(stopped) == whole[0]


@pytest.mark.parametrize("words", [">&-", ">&- 2>&-", "> /dev/full 2>&1", "2>&1 | true"])
def test_a_refused_command_with_a_closed_or_full_output_is_no_traceback(flags, tmp_path, words):
    argv = command(flags, tmp_path / "output", "--eval_file", tmp_path / "none.jsonl")
    line = shlex.join([sys.executable, "train_lora_single.py", *argv])
    shell = ["bash", "-c", f"{line} {words}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(shell, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert ("none.jsonl" in done.stderr) == (words == ">&-")
    log = (tmp_path / "output" / "all_logs.log").read_text("utf-8")
    assert "There is no file" in flat(log)


# ==== Errors that are not known


UNKNOWN = {  # mode: (its flags, where the error comes from)
    "training": ([], accelerate.Accelerator, "backward"),
    "dry run": (["--dry_run"], transformers.AutoConfig, "from_pretrained"),
    "chat": ([], peft.PeftModel, "from_pretrained"),
}
BUGS = [ZeroDivisionError("a bug"), PermissionError(errno.EACCES, "not yours"), Exception("28")]


@pytest.mark.parametrize(
    "mode", ["training", "dry run", pytest.param("chat", marks=needs_inspector)]
)
def test_an_unknown_error_is_a_traceback_whatever_the_mode(
    flags, finished, tmp_path, monkeypatch, capfd, mode
):
    more, owner, name = UNKNOWN[mode]
    output = tmp_path / "output"
    for bug in BUGS if mode == "training" else BUGS[:1]:
        with monkeypatch.context() as patch:

            def fail(*_, bug=bug, **__):
                raise bug

            before(patch, owner, name, fail)
            with pytest.raises(type(bug)) as raised:  # Python prints it, and exits with 1
                if mode == "chat":
                    import inspect_lora

                    inspect_lora.main(["chat", str(finished / "final_lora")])
                else:
                    t.main(command(flags, output, *more))
        assert raised.value is bug
        assert "Make room" not in capfd.readouterr().err
        if mode == "training":
            assert record(output)["outcome"] == f"failed: {bug!r}"
            log = (output / "all_logs.log").read_text("utf-8")
            assert "Traceback (most recent call last)" in log and str(bug) in log


def test_a_librarys_own_keyboard_interrupt_is_one_message(flags, tmp_path, monkeypatch, capfd):
    def stop(*_, **__):
        raise KeyboardInterrupt("a word")

    before(monkeypatch, transformers.AutoConfig, "from_pretrained", stop)
    assert run(command(flags, tmp_path)) == 130
    said = flat(capfd.readouterr().err)
    assert "Stopped" in said and "Traceback" not in said


# ==== Several processes, started as torchrun starts them


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """Return flags for 16 examples, which are four steps an epoch for two processes, too.

    Without dropout, whose random numbers each process draws for itself.
    """
    flags = write_short_data(tmp_path_factory.mktemp("even"), train=16)
    return [*flags, "--num_samples", "0", "--lora_dropout", "0"]


def launch(argv, folder, *actions):
    """Run the command in as many processes as actions; return their statuses and what they said.

    The launcher is torch's own, as behind torchrun, but its processes are forks.
    """
    for path in folder.glob("rank*"):
        path.unlink()
    process = FORKS.Process(target=be_the_launcher, args=(argv, str(folder), actions))
    process.start()
    ended(process)
    ranks = range(len(actions))
    statuses = [int((folder / f"rank {rank} status").read_text()) for rank in ranks]
    return statuses, [(folder / f"rank {rank} said").read_text("utf-8") for rank in ranks]


def be_the_launcher(argv, folder, actions):
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.setpgrp()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name may have no address
    os.dup2(os.open(f"{folder}/launcher said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=len(actions), run_id="none", max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
        local_addr="localhost", monitor_interval=0.05,
    )  # fmt: skip
    elastic_launch(config, be_a_rank)(argv, folder, actions)


def be_a_rank(argv, folder, actions):
    """Be one of the processes; note the exit status, which the launcher keeps for itself."""
    rank = int(os.environ["RANK"])
    status = 0
    try:
        in_a_fork(argv, actions[rank], f"{folder}/rank {rank} said", {})
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        raise
    except BaseException:
        status = 99
        raise
    finally:
        Path(f"{folder}/rank {rank} status").write_text(str(status))


ACTIONS["tell what is changed"] = lambda _: watch_changes(
    lambda event, path, other: print("changed", path, flush=True)
)


@pytest.fixture(scope="module")
def two(even, tmp_path_factory):
    """Return the output of two processes that nothing interrupted, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    argv = command(even, folder / "output")
    statuses, said = launch(argv, folder, "nothing", "tell what is changed")
    assert statuses == [0, 0], said
    return folder / "output", said


def test_two_processes_learn_what_one_does(even, two, tmp_path):
    assert run(command(even, tmp_path)) == 0
    found, expected = record(two[0]), record(tmp_path)
    assert found["plan"] == expected["plan"]
    # Before the first step's end the weights are the same: only the order of sums differs.
    for key, place in (("eval_loss", 0), ("loss", 1), ("grad_norm", 1)):
        value = expected["loss_history"][place][key]
        assert found["loss_history"][place][key] == pytest.approx(value, rel=1e-5)
    assert [step for step, _ in losses(two[0])] == [step for step, _ in losses(tmp_path)]
    values = [loss for _, loss in losses(tmp_path)]
    assert [loss for _, loss in losses(two[0])] == pytest.approx(values, abs=2e-3)
    assert found["train_tokens"] == expected["train_tokens"]


def test_the_first_process_alone_prints_and_writes(two):
    output, said = two
    assert re.search("^done ", said[0], re.MULTILINE) and "2 processes" in said[0]
    changed = re.findall(rf"^changed {re.escape(str(output))}/(.*)$", said[1], re.MULTILINE)
    assert changed and {Path(path).name for path in changed} <= {
        "rng_state_1.pth", "checkpoints", *(f"checkpoint-{step}" for step in (3, 4, 6, 8))
    }  # fmt: skip
    sections = "demo data tokens example plan device model memory train eval verified done next"
    words = {line.split(" ")[0] for line in said[1].splitlines() if "Gloo" not in line}
    assert not words & {*sections.split()}
    assert record(output)["device"] == "CPU, 2 processes"
    kept = {path.name for path in (output / "checkpoints").rglob("*") if path.is_file()}
    assert kept == KEPT_FILES


def one_is_stopped_twice(patch):
    """Write each random state late, and get a signal as often as a launcher may pass it on."""
    real = torch.save

    def save(thing, path, *args, **kwargs):
        time.sleep(0.3 * ("rng_state" in str(path)))
        real(thing, path, *args, **kwargs)

    patch.setattr(torch, "save", save)
    at_step(patch, 3, send(signal.SIGTERM, signal.SIGTERM))


ACTIONS["is stopped in step 3"] = one_is_stopped_twice
ACTIONS["has the launcher stopped"] = lambda patch: at_step(
    patch, 2, lambda *_, **__: os.kill(os.getppid(), signal.SIGTERM)
)


def test_a_signal_to_either_stops_both_and_the_same_launch_goes_on(even, two, tmp_path):
    output = tmp_path / "output"
    argv = command(even, output)
    statuses, said = launch(argv, tmp_path, "nothing", "is stopped in step 3")
    assert statuses == [143, 143], said
    assert "after step 3 of 8" in flat(said[0])
    assert "Traceback" not in said[0] + said[1] and "second signal" not in said[0] + said[1]
    written = json.loads((output / "checkpoints/checkpoint-3/complete.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} < written.keys()

    # Other flags are refused by both, at once.
    statuses, said = launch([*argv, "--seed", "7"], tmp_path, "nothing", "nothing")
    assert 0 not in statuses and "SEED was 42 and is now 7" in flat("\n".join(said))
    assert "Traceback" not in said[0] + said[1]

    statuses, said = launch(argv, tmp_path, "has the launcher stopped", "nothing")
    assert statuses == [143, 143], said
    assert re.search("^stopping ", said[0], re.MULTILINE) and "second signal" not in said[0]
    assert record(output)["outcome"].startswith("interrupted: Stopped after step ")
    assert complete(output)[-1] >= 5
    statuses, said = launch(argv, tmp_path, "nothing", "nothing")
    assert statuses == [0, 0], said
    assert adapter(output) == adapter(two[0]) and losses(output) == losses(two[0])


@pytest.mark.parametrize(("train", "step"), [(16, 3), (14, 4)])
def test_what_processes_cannot_share_evenly_is_refused(tmp_path, train, step):
    """Some examples would be learned twice."""
    output = tmp_path / "output"
    put_old_results(output)
    before_it = files(output)
    flags = [*write_short_data(tmp_path, train=train), "--num_samples", "0", "--batch_size", "1"]
    argv = command(flags, output, "--gradient_accumulation_steps", step)
    statuses, said = launch(argv, tmp_path, "nothing", "nothing")
    assert set(statuses) in ({1}, {1, 143}), said  # the launcher stops who is not yet gone,
    reason = flat("\n".join(said))  # so that only one of them may have come to say why
    assert "2 processes cannot share" in reason and "multiple of 2" in reason
    assert "Traceback" not in said[0] + said[1]
    assert files(output) == before_it
