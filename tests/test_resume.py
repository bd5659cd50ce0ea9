"""Checkpoints, signals, locks, full disks, outputs that go away, and several processes."""

import contextlib
import errno
import fcntl
import importlib.metadata
import io
import json
import logging
import os
import pty
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import filelock
import peft
import pytest
import safetensors.torch
import torch
import transformers
from conftest import ROOT, TINY, handlers_restored, write_short_data
from processes import Fork, write_to
from safetensors import SafetensorError
from safetensors.torch import load_file
from trainers import (
    ADAPTER,
    at_step,
    before,
    changed_model,
    checkpoints,
    files,
    logged,
    on_trainer,
    prepared,
    read_record,
    run,
    send,
)

import train_lora_single as t

STEPS = 8  # two epochs of four, with a checkpoint every three steps
RESULTS = ("final_lora", "final_lora_vllm")


# ==== What the tests share


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Return the flags of a short run; each test adds an --output_dir."""
    return write_short_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(finished):
    """Return the adapter's bytes and the losses of a run that nothing interrupted."""
    return (finished / ADAPTER).read_bytes(), losses(finished)


@pytest.fixture(scope="module")
def interrupted(flags, tmp_path_factory):
    """Return the output of a run that was stopped after step 7."""
    output = tmp_path_factory.mktemp("interrupted") / "output"
    with pytest.MonkeyPatch.context() as patch, handlers_restored():
        at_step(patch, 7, send(signal.SIGINT))
        assert run(command(flags, output)) == 130
    assert checkpoints(output) == [4, 6, 7]
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


def go_on(argv, whole, capfd):
    """Give the command, which must end as the run that nothing interrupted.

    Return the step of the checkpoint that it resumed from, or None if it began anew.
    """
    output = Path(argv[argv.index("--output_dir") + 1])
    capfd.readouterr()
    assert run(argv) == 0, capfd.readouterr().err
    assert "Traceback" not in capfd.readouterr().err
    assert (output / ADAPTER).read_bytes() == whole[0]
    assert losses(output) == whole[1]
    assert read_record(output)["outcome"] == "finished"
    assert not [*output.rglob("*.new")] and not (output / ".partial").exists()
    resumed_from = read_record(output)["resumed_from"]
    return int(resumed_from.rpartition("-")[2]) if resumed_from else None


def losses(output):
    """Return (step, loss) of all training and held-out losses, in order."""
    history = read_record(output)["loss_history"]
    return [(e["step"], e[key]) for e in history for key in ("loss", "eval_loss") if key in e]


def put_old_results(output):
    """Put results of an earlier run into output."""
    for name in RESULTS:
        (output / name).mkdir(parents=True)
        (output / name / "adapter_model.safetensors").write_bytes(b"old")


def has_old_results(output):
    """Return whether they are all still there, in place or renamed."""
    places = [[output / name, *output.glob(f"{name}.2*")] for name in RESULTS]
    return all(
        any(files(place) == {"adapter_model.safetensors": b"old"} for place in some)
        for some in places
    )


def job_found(job):
    """Return the name of the checkpoint that the job would resume, or None."""
    job.checkpoint = None
    t.resume_or_begin(job)
    return job.checkpoint and job.checkpoint.name


# ==== Doing something at a chosen moment


def die(*_, **__):
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_saved(patch, part, action):
    """Do action(path) when torch has written the file whose path holds part."""
    real = torch.save

    def save(thing, path, *args, **kwargs):
        real(thing, path, *args, **kwargs)
        if part in str(path):
            action(path)

    patch.setattr(torch, "save", save)


def at_evaluation(patch, action):
    """Do action in the first pass of an evaluation, before or after which there is training."""
    done = []

    def watch(trainer):
        def look(model, *_):
            if not model.training and not done:
                done.append(True)
                action()

        trainer.model.register_forward_pre_hook(look)

    on_trainer(patch, watch)


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


def at_rename(new, action, number=1):
    """Do action before rename number (from 1) of something to a name that ends with new."""
    seen = []

    def see(event, path, other):
        if event == "os.rename" and other.endswith(new):
            seen.append(path)
            if len(seen) == number:
                action()

    watch_changes(see)


@pytest.fixture(autouse=True)
def no_watchers():
    yield
    ON_CHANGE.clear()


def fork(argv, said, prepare=None):
    """Start the real command in a process of its own, which does prepare(patch) first."""
    return Fork(lambda: be_the_script(argv, said, prepare))


def be_the_script(argv, said, prepare=None):
    """Be the command: run the script's file as Python does, with its output in the file said."""
    write_to(said)
    if prepare:
        prepare(pytest.MonkeyPatch())
    sys.argv = ["train_lora_single.py", *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


# ==== Signals, one after the other in one run

STOPS = [  # what happens, and the newest step that is saved then
    ("SIGINT in step 2", lambda p: at_step(p, 2, send(signal.SIGINT)), 2),
    ("SIGTERM while an epoch is evaluated", lambda p: at_evaluation(p, send(signal.SIGTERM)), 4),
    (
        "SIGHUP while a checkpoint is written",
        lambda p: at_saved(p, "checkpoint-6/optimizer.pt", send(signal.SIGHUP)),
        6,
    ),
    ("SIGUSR1 in step 7", lambda p: at_step(p, 1, send(signal.SIGUSR1)), 7),
    ("SIGTERM in the last step", lambda p: at_step(p, 1, send(signal.SIGTERM)), 8),
]


def test_however_often_a_signal_stops_it_the_run_ends_in_the_same_bytes(
    flags, whole, tmp_path, monkeypatch, capfd
):
    argv = command(flags, tmp_path)
    for what, action, step in STOPS:
        with monkeypatch.context() as patch:
            action(patch)
            assert run(argv) == 128 + signal.Signals[what.split()[0]], what
        printed = capfd.readouterr()
        assert re.search("(?m)^stopping ", printed.out), what  # said at once
        assert f"after step {step} of 8" in printed.err and "Traceback" not in printed.err, what
        assert read_record(tmp_path)["outcome"].startswith("interrupted: "), what
        assert checkpoints(tmp_path)[-1] == step == losses(tmp_path)[-1][0], what
        assert not (tmp_path / "final_lora").exists(), what

    put_old_results(tmp_path)
    with monkeypatch.context() as patch:  # while it is verified
        before(patch, peft.PeftModel, "from_pretrained", send(signal.SIGTERM))
        assert run(argv) == 143
    assert "Traceback" not in capfd.readouterr().err
    assert files(tmp_path / "final_lora") == {"adapter_model.safetensors": b"old"}
    assert not (tmp_path / ".partial").exists()

    moments = []

    def strike():
        moments.append((tmp_path / "final_lora").exists())
        send(signal.SIGTERM)()

    at_rename("/final_lora", strike)  # while it is moved into its place
    assert go_on(argv, whole, capfd) == 8
    assert moments == [False] and has_old_results(tmp_path)


EARLY = {
    "while the tokenizer is loaded": lambda p: before(
        p, transformers.AutoTokenizer, "from_pretrained", send(signal.SIGINT)
    ),
    "while the weights are loaded": lambda p: before(
        p, transformers.AutoModelForCausalLM, "from_pretrained", send(signal.SIGINT)
    ),
    "while the base is evaluated": lambda p: at_evaluation(p, send(signal.SIGINT)),
}


@pytest.mark.parametrize("moment", EARLY)
def test_a_signal_before_the_first_step_stops_at_once(flags, tmp_path, monkeypatch, capfd, moment):
    EARLY[moment](monkeypatch)
    assert run(command(flags, tmp_path)) == 130
    said = capfd.readouterr().err
    assert said.count("Stopped.") == 1 and "Traceback" not in said
    assert not checkpoints(tmp_path) and not (tmp_path / "final_lora").exists()


def test_a_second_signal_stops_at_once_and_costs_only_what_was_begun(
    flags, whole, tmp_path, monkeypatch, capfd
):
    argv = command(flags, tmp_path)
    with monkeypatch.context() as patch:  # in a step
        at_step(patch, 5, send(signal.SIGTERM, signal.SIGINT))
        assert run(argv) == 130
    said = capfd.readouterr().err
    assert said.count("Stopped.") == 1 and "Traceback" not in said
    assert read_record(tmp_path)["outcome"].startswith("interrupted: Stopped.")
    assert checkpoints(tmp_path) == [3, 4]  # step 5 was neither finished nor saved

    def cut(path):
        os.truncate(path, 1000)
        send(signal.SIGINT)()

    with monkeypatch.context() as patch:  # while a checkpoint is written
        at_step(patch, 1, send(signal.SIGINT))
        at_saved(patch, "checkpoint-5/optimizer.pt", cut)
        assert run(argv) == 130
    assert checkpoints(tmp_path) == [3, 4, 5]
    assert go_on(argv, whole, capfd) == 4


def test_a_signal_while_the_end_is_recorded_changes_nothing_and_the_lock_is_held_until_then(
    flags, tmp_path, monkeypatch, capfd
):
    found = []

    def look():
        send(signal.SIGINT)()
        try:
            with filelock.FileLock(tmp_path / ".lock", blocking=False):
                found.append("free")
        except filelock.Timeout:
            found.append("locked")

    at_step(monkeypatch, 1, send(signal.SIGINT))
    at_rename("/run.json", look, number=3)  # the start, the checkpoint, the end
    assert run(command(flags, tmp_path)) == 130
    assert found == ["locked"] and "Traceback" not in capfd.readouterr().err
    assert read_record(tmp_path)["outcome"].startswith("interrupted: Stopped after step 1 of 8")
    look_again = filelock.FileLock(tmp_path / ".lock", blocking=False)
    look_again.acquire()
    look_again.release()


def test_a_signal_that_was_ignored_stays_ignored(flags, interrupted, tmp_path, whole, monkeypatch):
    """As SIGHUP is under nohup, and SIGINT in a shell's background, to the very end."""
    output = shutil.copytree(interrupted, tmp_path / "output")
    ignored = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
    at_step(monkeypatch, 1, send(*ignored))
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    t.main(command(flags, output))
    assert (output / ADAPTER).read_bytes() == whole[0]
    assert {signal.getsignal(number) for number in ignored} == {signal.SIG_IGN}


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
    said = capfd.readouterr().err
    assert "Stopped" in said and "Traceback" not in said
    assert ("after step 1 of 8" in said) == (other is None)


# ==== Killed


def cut_and_die(path):
    os.truncate(path, 1000)
    die()


def test_however_it_is_killed_the_same_command_ends_in_the_same_bytes(
    flags, whole, stopped, tmp_path, capfd
):
    argv, said = command(flags, stopped), tmp_path / "said"
    kills = [  # and the step up to which the losses are recorded then
        (lambda p: at_step(p, 1, die), 7),
        (lambda p: at_saved(p, "checkpoint-8/optimizer.pt", cut_and_die), 7),
        (lambda p: at_rename("/final_lora", die), 8),  # where final_lora is missing for a moment
    ]
    for kill, step in kills:
        assert fork(argv, said, kill).end() == -signal.SIGKILL, said.read_text("utf-8")
        assert has_old_results(stopped)
        record = read_record(stopped)
        assert record["outcome"] == "running"
        assert losses(stopped) == [one for one in whole[1] if one[0] <= step]
    assert "checkpoint-8 was not written to its end" in said.read_text("utf-8")
    assert not (stopped / "final_lora").exists()
    assert go_on(argv, whole, capfd) == 8
    assert has_old_results(stopped)


def test_whenever_it_is_killed_there_is_enough_left(flags, whole, tmp_path, capfd):
    """What is in the folder before each change of a file is what a kill would leave there."""
    output = tmp_path / "output"
    put_old_results(output)
    (output / "run.json").write_text('"old"')
    (output / "checkpoints" / "checkpoint-99").mkdir(parents=True)
    (output / "checkpoints" / "checkpoint-99" / "mine").write_bytes(b"old")
    seen, steps, faults = set(), [0], []

    def look():
        paths = sorted(path for path in output.rglob("*") if path.is_file())
        state = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
        if state in seen:
            return
        seen.add(state)
        assert has_old_results(output)
        assert [*output.glob("checkpoints*/checkpoint-99/mine")]
        assert '"old"' in [path.read_text("utf-8") for path in output.glob("run.json*")]
        for name in RESULTS:
            place = output / name / "adapter_model.safetensors"
            if place.exists() and place.read_bytes() != b"old":
                assert len(load_file(place)) == 20  # whole
        done = 0
        for step in checkpoints(output):
            folder = output / "checkpoints" / f"checkpoint-{step}"
            with contextlib.suppress(OSError, ValueError):
                json.loads((folder / "trainer_state.json").read_bytes())
                load_file(folder / "adapter_model.safetensors")
                torch.load(folder / "optimizer.pt", weights_only=True)
                assert json.loads((output / "checkpoints" / "job.json").read_bytes())
                done = step
        steps.append(done)

    def look_safely(event, path, _):
        try:
            # Opened for writing it would be empty for a while; a rename is at once.
            assert event != "open" or Path(path).name not in ("run.json", "job.json")
            look()
        except BaseException:  # the run would take it for its own
            faults.append(traceback.format_exc())

    watch_changes(look_safely)
    assert run(command(flags, output)) == 0
    ON_CHANGE.clear()
    look()
    assert faults == []
    assert len(seen) > 40
    # A checkpoint that is there is never lost, but for a newer one.
    assert steps == sorted(steps) and {*steps} == {0, 3, 4, 6, 8}


# ==== Checkpoints: which are kept, what they hold, which are passed over


def test_checkpoints_hold_what_resuming_needs_and_nothing_else(interrupted, finished):
    assert checkpoints(finished) == [6, 8]  # the two newest, and the best epoch's, which is 8
    needed = {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"}
    needed |= {"rng_state.pth", "trainer_state.json"}
    for step in (4, 6, 7):
        folder = interrupted / "checkpoints" / f"checkpoint-{step}"
        names = {path.name for path in folder.iterdir()}
        assert needed <= names and "training_args.bin" not in names  # a pickle that runs code
        tensors = load_file(folder / "adapter_model.safetensors")
        assert all(re.search(r"\.lora_[AB]\.weight$", name) for name in tensors)  # no base weights


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("spoil", [cut, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_checkpoint_that_was_not_finished_is_named_and_passed_over(
    flags, whole, stopped, capfd, spoil
):
    """Trainer writes trainer_state.json last."""
    newest = stopped / "checkpoints" / "checkpoint-7"
    spoil(newest / "trainer_state.json")
    assert job_found(prepared(command(flags, stopped))) == "checkpoint-6"
    assert f"{newest} was not written to its end" in capfd.readouterr().out
    assert go_on(command(flags, stopped), whole, capfd) == 6


def damage(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :])


BROKEN = [
    ("adapter_model.safetensors", cut), ("optimizer.pt", cut), ("scheduler.pt", Path.unlink),
    ("optimizer.pt", damage),
    ("rng_state.pth", cut), ("rng_state.pth", Path.unlink),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil"), BROKEN)
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_it_is_taken(
    flags, whole, stopped, capfd, name, spoil
):
    """As after a power cut; a job that a cluster starts again would fail for ever otherwise."""
    newest = stopped / "checkpoints" / "checkpoint-7"
    spoil(newest / name)
    left = files(newest)
    job = prepared(command(flags, stopped))
    assert job_found(job) == "checkpoint-6"
    said = " ".join(capfd.readouterr().out.split())
    assert f"{newest} is damaged (" in said and f"{newest} of an earlier run is now" in said
    (aside,) = newest.parent.glob("checkpoint-7.2*")
    assert files(aside) == left and not newest.exists()
    assert go_on(command(flags, stopped), whole, capfd) == 6


def test_if_every_checkpoint_is_damaged_nothing_starts_afresh(flags, stopped, capfd):
    for path in (stopped / "checkpoints").glob("checkpoint-*"):
        cut(path / "optimizer.pt")
    left = files(stopped)
    assert run(command(flags, stopped)) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "No checkpoint of this job can be resumed" in said and "checkpoint-4 is damaged" in said
    assert "to train from the beginning" in said and "Traceback" not in said
    assert files(stopped) == left


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize(
    "name", ["checkpoints/job.json", "run.json", "checkpoints/checkpoint-7/optimizer.pt"]
)
def test_what_cannot_be_read_just_now_stops_the_run_and_starts_nothing_afresh(
    flags, stopped, monkeypatch, capfd, name, code
):
    """A network file system may answer again in a minute."""
    path, left = stopped / name, files(stopped)
    opened = io.open

    def fail(file, *args, **kwargs):
        if isinstance(file, (str, Path)) and Path(file) == path:
            raise OSError(code, os.strerror(code), str(file))
        return opened(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", fail)
        patch.setattr("builtins.open", fail)
        assert run(command(flags, stopped)) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert f"{path} cannot be read ({os.strerror(code)})" in said and "Traceback" not in said
    assert files(stopped) == left


def test_a_finished_job_needs_no_checkpoint_to_be_finished(flags, finished, tmp_path, capfd):
    output = shutil.copytree(finished, tmp_path / "output")
    for path in (output / "checkpoints").glob("checkpoint-*/optimizer.pt"):
        cut(path)
    left = files(output)
    assert run(command(flags, output)) == 0
    assert "is the finished adapter of this job" in capfd.readouterr().out
    assert files(output) == left


PATH = Path("checkpoint-7")
WHOLE, TORN, CUT = (t.Saved(PATH, state) for state in ("whole", "damaged", "unfinished"))
DECISIONS = [
    # differences, checkpoints, is_finished, is_wanted_epoch, may_be_replaced
    (None, [], False, False, False, "fresh"),
    (None, [WHOLE], False, False, False, "fresh"),
    ([], [], False, False, False, "fresh"),
    ([], [CUT], False, False, False, "fresh"),
    ([], [WHOLE], False, False, False, "resume"),
    ([], [CUT, TORN, WHOLE], False, False, False, "resume"),
    ([], [WHOLE], True, False, False, "resume"),  # to save another epoch
    ([], [WHOLE], True, False, True, "resume"),
    ([], [TORN], False, False, False, "refuse damage"),
    ([], [CUT, TORN], False, False, False, "refuse damage"),
    ([], [WHOLE], True, True, False, "finished"),
    ([], [TORN], True, True, True, "finished"),
    ([], [], True, True, False, "finished"),
    (["r"], [WHOLE], False, False, False, "refuse another job"),
    (["r"], [WHOLE], True, True, False, "refuse another job"),
    (["r"], [TORN], True, False, False, "refuse another job"),
    (["r"], [WHOLE], True, True, True, "fresh"),
    (["r"], [], False, False, False, "fresh"),
    (["r"], [CUT], False, False, False, "fresh"),
]


@pytest.mark.parametrize("row", DECISIONS, ids=str)
def test_what_an_earlier_run_left_decides_what_is_done(row):
    *facts, decision = row
    assert t.decide(t.Earlier(*facts)) == decision


def test_unfinished_checkpoints_do_not_push_out_a_finished_one(
    flags, whole, stopped, monkeypatch, capfd
):
    """A power cut may leave several."""
    folder = stopped / "checkpoints"
    for step in (6, 7):
        cut(folder / f"checkpoint-{step}" / "trainer_state.json")
    with monkeypatch.context() as patch:
        at_step(patch, 1, send(signal.SIGTERM))
        assert run(command(flags, stopped)) == 143
    assert "checkpoint-5" in capfd.readouterr().err
    assert go_on(command(flags, stopped), whole, capfd) == 5


NOTHING_TO_RESUME = {
    "none was finished": lambda folder: [cut(p) for p in folder.glob("*/trainer_state.json")],
    "job.json is missing": lambda folder: (folder / "job.json").unlink(),
}


@pytest.mark.parametrize("what", NOTHING_TO_RESUME)
def test_checkpoints_that_cannot_be_resumed_are_renamed(flags, stopped, what):
    NOTHING_TO_RESUME[what](stopped / "checkpoints")
    old, run_before = files(stopped / "checkpoints"), (stopped / "run.json").read_bytes()
    assert job_found(prepared(command(flags, stopped))) is None
    (renamed,), (run_renamed,) = stopped.glob("checkpoints.2*"), stopped.glob("run.json.2*")
    assert files(renamed) == old and run_renamed.read_bytes() == run_before
    assert {path.name for path in (stopped / "checkpoints").iterdir()} == {"job.json"}


def test_a_damaged_job_json_stops_the_run(flags, stopped, capfd):
    """Which job the checkpoints belong to is not known, and they may be the work of a week."""
    (stopped / "checkpoints" / "job.json").write_bytes(b'{"MODEL_NA')
    left = files(stopped)
    assert run(command(flags, stopped)) == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "job.json is damaged" in said and "Restore it" in said and "Traceback" not in said
    assert files(stopped) == left


def test_what_a_user_keeps_in_the_output_is_left_alone(flags, whole, stopped, capfd):
    folder = stopped / "checkpoints"
    shutil.copytree(folder / "checkpoint-7", folder / "checkpoint-7-backup")
    os.utime(folder / "checkpoint-7-backup", (1, 1))  # as `cp -a` keeps a time
    (folder / "checkpoint-notes.txt").write_text("mine")
    for name in ("partial", "final_lora.mine"):
        (stopped / name).mkdir()
        (stopped / name / "notes.txt").write_text("mine", encoding="utf-8")
    mine = {name: data for name, data in files(stopped).items() if re.search("back|notes", name)}
    assert go_on(command(flags, stopped), whole, capfd) == 7
    assert mine.items() <= files(stopped).items() and len(mine) > 8


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
    assert run(command(flags, stopped)) == 1
    assert not marker.exists()
    torch.load(folder / name, weights_only=False)
    assert marker.exists()  # it was a loaded gun


# ==== Another job


def differences(job):
    """Return {what differs: (then, now)} of a job that is refused."""
    with pytest.raises(t.UserError) as error:
        job_found(job)
    said = str(error.value)
    assert "checkpoint-7 was made with other" in said and "another OUTPUT_DIR" in said
    rows = re.findall(r"(?m)^  (\S.*) was (.*) and is now (.*)$", said)
    return {name: (then, now) for name, then, now in rows}


def other_value(value):
    """Return another value of a setting's type."""
    if isinstance(value, list):
        return value[1:]
    return f"{value}x" if isinstance(value, str) else value + 1


STEP_SIZE = ("BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS")
MAY_CHANGE = {"LOGGING_STEPS", "SAVE_STEPS", "FINAL_LORA", "REPORT_TO"}
# What they are in a resumed run follows from its tokens, or from the products in use.
BY_EFFECT = {"REPLIES", "MAX_SEQ_LEN", "MATMUL"}
OF_A_RUN = {"OUTPUT_DIR", "DEVICE", "TRAIN_FILE", "EVAL_FILE"}  # other tests give them


def test_every_setting_must_stay_but_for_those_that_may_change(flags, interrupted, tmp_path):
    job = prepared(command(flags, shutil.copytree(interrupted, tmp_path / "output")))
    names = {name for name in vars(job.settings) if name.isupper()} - OF_A_RUN
    assert len(names) > 18
    for name in names:
        value = getattr(job.settings, name)
        setattr(job.settings, name, other_value(value))
        if name == "REPORT_TO":
            job.settings.REPORT_TO = "tensorboard"
        if name == "LR_SCHEDULER_TYPE":
            job.settings.LR_SCHEDULER_TYPE = "linear"
        if name in STEP_SIZE:  # of which only the product must stay
            assert " x ".join(STEP_SIZE) in differences(job)
        elif name in MAY_CHANGE | BY_EFFECT:
            assert job_found(job) == "checkpoint-7", name
        else:
            found = differences(job)
            pair = found[name]
            if not isinstance(value, list):  # whose order does not matter
                assert pair == (str(value), str(getattr(job.settings, name)))
            others = {one for one in found if one.isupper()} - {name}
            assert not others, others
        setattr(job.settings, name, value)
    job.settings.MATMUL = job.matmul = "float16"
    assert differences(job) == {"the products in use": ("native", "float16")}


def test_what_may_change_leaves_the_bytes_as_they_were(flags, whole, stopped, tmp_path, capfd):
    """The data is moved, the output folder too, and a step is divided otherwise."""
    settings = t.parse_settings(flags)
    shutil.copy(settings.TRAIN_FILE, tmp_path / "train moved")
    shutil.copy(settings.EVAL_FILE, tmp_path / "eval moved")
    moved = ["--train_file", tmp_path / "train moved", "--eval_file", tmp_path / "eval moved"]
    more = ["--save_steps", 1, "--logging_steps", 5, "--matmul", "native", "--max_seq_len", 4000]
    more += ["--batch_size", 4, "--gradient_accumulation_steps", 1]
    assert go_on(command(flags, stopped, *moved, *more), whole, capfd) == 7


def edited(patch, name, **values):
    """Have a function of the script return a configuration with these values."""
    real = getattr(t, name)

    def change(given):
        config = real(given)
        for key, value in values.items():
            setattr(config, key, value)
        return config

    patch.setattr(t, name, change)


EDITS = {  # of the script, and what the table says of it
    "lora_config": [({"use_rslora": True}, {"LoraConfig.use_rslora": ("False", "True")})],
    "training_config": [
        ({"weight_decay": 0.1}, {"SFTConfig.weight_decay": ("0.0", "0.1")}),
        ({"optim": "sgd"}, {"SFTConfig.optim": ("adamw_torch_fused", "sgd")}),
        ({"max_grad_norm": 0.5}, {"SFTConfig.max_grad_norm": ("1.0", "0.5")}),
        ({"dataloader_drop_last": True}, {"SFTConfig.dataloader_drop_last": ("False", "True")}),
        ({"per_device_train_batch_size": 1}, None),
        ({"neftune_noise_alpha": 5.0}, {"SFTConfig.neftune_noise_alpha": ("None", "5.0")}),
    ],
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_configuration_is_another_job(flags, interrupted, tmp_path, monkeypatch, name):
    job = prepared(command(flags, shutil.copytree(interrupted, tmp_path / "output")))
    for values, expected in EDITS[name]:
        with monkeypatch.context() as patch:
            edited(patch, name, **values)
            found = differences(job)
        assert expected is None or found == expected, values
    harmless = {"run_name": "x", "eval_accumulation_steps": 7, "dataloader_num_workers": 2}
    edited(monkeypatch, "training_config", **harmless)
    assert job_found(job) == "checkpoint-7"


@pytest.mark.parametrize("name", ["train", "eval"])
def test_another_word_in_the_data_is_another_job(flags, interrupted, tmp_path, name):
    output = shutil.copytree(interrupted, tmp_path / "output")
    data = Path(getattr(t.parse_settings(flags), f"{name.upper()}_FILE")).read_bytes()
    at = data.rindex(b".")  # in the last line's reply
    (tmp_path / "other.jsonl").write_bytes(data[:at] + b"!" + data[at + 1 :])
    job = prepared(command(flags, output, f"--{name}_file", tmp_path / "other.jsonl"))
    assert differences(job).keys() == {f"the tokens of {name.upper()}_FILE"}


def scale_weights(model):
    changed_model(
        model, model / "new", lambda tensors: [x.mul_(1.5) for x in tensors.values() if x.dim() > 1]
    )
    (model / "new" / "model.safetensors").replace(model / "model.safetensors")


def change_config(model):
    config = json.loads((model / "config.json").read_text("utf-8"))
    config["text_config"]["rms_norm_eps"] = 1e-5
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("edit", "name"), [(scale_weights, "model.safetensors"), (change_config, "config.json")]
)
def test_a_replaced_model_folder_is_another_job(flags, interrupted, tiny, tmp_path, edit, name):
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / ".cache").mkdir()  # `hf download --local-dir` leaves one
    job = prepared(command(flags, tmp_path / "output", "--model_name", model))
    job.output.mkdir()
    assert job_found(job) is None  # it writes down which job it is
    saved = "checkpoints/checkpoint-7"
    shutil.copytree(interrupted / saved, job.output / saved)
    assert job_found(job) == "checkpoint-7"
    (model / "NOTES.txt").write_text("a note that changes nothing")
    assert job_found(job) == "checkpoint-7"
    edit(model)
    assert differences(job).keys() == {f"MODEL_NAME's file {name}"}


def test_all_that_differs_is_named_at_once_and_nothing_is_touched(flags, stopped, tmp_path, capfd):
    left = files(stopped)
    assert run(command(flags, stopped, "--lora_r", 4, "--seed", 7, "--eval_file", "")) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    for part in ("LORA_R was 8 and is now 4", "SEED was 42 and is now 7", "tokens of EVAL_FILE"):
        assert part in said
    assert said.count("was 42 and is now 7") == 1  # and not for SFTConfig.seed again
    (tmp_path / "bad.jsonl").write_text("{}\n")
    assert run(command(flags, stopped, "--train_file", tmp_path / "bad.jsonl")) == 1
    assert run(command(flags, stopped, "--model_name", tmp_path / "none")) == 1
    assert run(command(flags, stopped, "--lora_target_modules", "none")) == 1
    assert files(stopped) == left and "Traceback" not in capfd.readouterr().err


def test_two_settings_that_change_alike_are_both_named(flags, stopped, capfd):
    assert run(command(flags, stopped, "--lora_r", 16, "--num_epochs", 4)) == 1
    said = capfd.readouterr().err
    assert "  LORA_R was 8 and is now 16\n" in said
    assert "  SFTConfig.max_steps was 8 and is now 16\n" in said
    assert "LoraConfig.r " not in said


def test_fields_of_sftconfig_that_may_change_exist_and_all_others_are_compared(flags, tmp_path):
    job = prepared(command(flags, tmp_path / "output"))
    fields = t.training_config(job).to_dict().keys()
    compared = {name.removeprefix("SFTConfig.") for name in t.describe_job(job)}
    assert fields >= t.NOT_OF_TRAINING
    assert fields - compared == t.NOT_OF_TRAINING
    assert {"learning_rate", "weight_decay", "seed", "optim", "max_grad_norm"} <= compared


def test_a_setting_that_is_new_is_said_to_be(flags, stopped, capfd):
    """What it did before there was a setting for it, nobody can tell."""
    path = stopped / "checkpoints" / "job.json"
    job = json.loads(path.read_text())
    del job["WARMUP_RATIO"]
    path.write_text(json.dumps(job | {"GONE": 3}))
    assert run(command(flags, stopped)) == 1
    said = capfd.readouterr().err
    assert "WARMUP_RATIO did not exist and is now 0.03" in said
    assert "GONE was 3 and does not exist now" in said


# ==== A job that has finished


def states(output):
    """Return all files with what would show a new writing of them."""
    return {
        str(path): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in output.rglob("*")
        if path.name not in ("all_logs.log", ".lock", output.name)
    }


@pytest.mark.parametrize("eval_file", ["a file", "50%"])
def test_a_finished_job_is_one_line_and_nothing_is_written(flags, tmp_path, capfd, eval_file):
    flags = command(flags, tmp_path / "output", "--max_steps", 1)
    if eval_file == "50%":
        write_short_data(tmp_path, train=60)
        flags += ["--train_file", str(tmp_path / "train.jsonl"), "--eval_file", "50%"]
    assert run(flags) == 0
    left, bytes_left = states(tmp_path / "output"), files(tmp_path / "output")
    assert ("held_out.jsonl" in bytes_left) == (eval_file == "50%")
    capfd.readouterr()
    assert run(flags) == 0
    printed = capfd.readouterr().out
    assert len(re.findall("(?m)^finished ", printed)) == 1
    assert not re.search("(?m)^(train|verified|moved|done|resume) ", printed)
    assert files(tmp_path / "output") == bytes_left
    assert states(tmp_path / "output") == left


@pytest.mark.parametrize("what", ["is deleted", "is changed"])
def test_a_job_whose_adapter_is_gone_publishes_it_again(
    flags, whole, finished, tmp_path, capfd, what
):
    output = shutil.copytree(finished, tmp_path / "output")
    if what == "is deleted":
        shutil.rmtree(output / "final_lora")
    else:
        (output / ADAPTER).write_bytes(b"old")
    assert go_on(command(flags, output), whole, capfd) == 8
    assert [path.read_bytes() for path in output.glob("final_lora.2*/*.safetensors")] == (
        [b"old"] if what == "is changed" else []
    )


@pytest.mark.parametrize(
    ("name", "before"),
    [("MODEL_REVISION", "older"), ("the tokens of TRAIN_FILE", "of yesterday"), ("NEW", "1")],
)
def test_a_finished_job_is_not_trained_again_unless_the_user_changed_something(
    flags, finished, tmp_path, capfd, name, before
):
    """The hub's branch, a date in the chat template or a library may change by themselves."""
    output = shutil.copytree(finished, tmp_path / "output")
    path = output / "checkpoints" / "job.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: before}))
    left = files(output)
    assert run(command(flags, output, "--final_lora", "best")) == 1
    assert f"{name} was {before} and " in capfd.readouterr().err
    assert files(output) == left


@pytest.mark.parametrize("stop", [False, True])
def test_checks_may_be_added_to_what_was_held_out(flags, tmp_path, capfd, monkeypatch, stop):
    """The conversations are compared, and not the bytes of the file."""
    write_short_data(tmp_path, train=60)
    argv = command(flags, tmp_path / "output", "--train_file", tmp_path / "train.jsonl")
    argv += ["--eval_file", "50%"]
    with monkeypatch.context() as patch, handlers_restored():
        if stop:
            at_step(patch, 2, send(signal.SIGINT))
        run(argv)
    path = tmp_path / "output" / "held_out.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if stop:  # other conversations are refused
        (other := list(rows))[0] = {"messages": [*rows[0]["prompt"], *rows[1]["completion"]]}
        path.write_text("".join(f"{json.dumps(row)}\n" for row in other))
        capfd.readouterr()
        assert run(argv) == 1
        assert f"{path} is not what this job held out" in capfd.readouterr().err
    checks = {"hello": {"kind": "word", "answers": ["hello"]}}
    edited = "".join(f"{json.dumps(row | {'checks': checks})}\n" for row in rows)
    path.write_text(edited)
    capfd.readouterr()
    assert run(argv) == 0
    assert ("resuming from" if stop else "is the finished adapter") in capfd.readouterr().out
    assert path.read_text() == edited and not [*path.parent.glob("held_out.jsonl.2*")]


def test_an_empty_folder_of_checkpoints_is_no_obstacle(flags, tmp_path):
    (tmp_path / "output" / "checkpoints").mkdir(parents=True)
    assert run(command(flags, tmp_path / "output", "--max_steps", 1)) == 0
    assert not [*(tmp_path / "output").glob("checkpoints.*")]
    assert checkpoints(tmp_path / "output") == [1]


def test_what_was_held_out_before_does_not_lie_beside_another_jobs_results(flags, tmp_path):
    output = tmp_path / "output"
    write_short_data(tmp_path, train=60)
    flags = command(flags, output, "--max_steps", 1, "--train_file", tmp_path / "train.jsonl")
    assert run([*flags, "--eval_file", "50%"]) == 0
    kept = (output / "held_out.jsonl").read_bytes()
    assert run([*flags, "--eval_file", ""]) == 0
    (aside,) = output.glob("held_out.jsonl*")
    assert aside.name != "held_out.jsonl" and aside.read_bytes() == kept
    # One that is read again stays where it is.
    aside.rename(output / "held_out.jsonl")
    assert run([*flags, "--eval_file", output / "held_out.jsonl"]) == 0
    assert (output / "held_out.jsonl").read_bytes() == kept


def test_another_job_renames_all_that_a_finished_one_left(flags, finished, tmp_path):
    """Twice, and with the same time on all of it, so that the new names collide."""
    output, kept = shutil.copytree(finished, tmp_path / "output"), []
    names, when = [*RESULTS, "checkpoints", "run.json"], time.time() - 1000

    def found(path):
        return path.read_bytes() if path.is_file() else files(path)

    for seed in (7, 8):
        kept.append({name: found(output / name) for name in names})
        for name in names:
            os.utime(output / name, (when, when))
        assert run(command(flags, output, "--seed", seed, "--max_steps", 1)) == 0
        assert read_record(output)["resumed_from"] is None
        for name in names:
            left = [found(path) for path in output.glob(f"{name}.2*")]
            assert len(left) == len(kept) and all(one[name] in left for one in kept)
    there = {path.name.partition(".2")[0] for path in output.iterdir()}
    assert there == {"all_logs.log", ".lock", *names}


# ==== What the version of 2026-11-28 left

FORMER = ROOT / "tests" / "job_2026_11_28"  # its job.json and run.json, and a copy of the data


def put_former(name, folder, **changes):
    """Put a file of the former version into folder, as if it had been written for this model."""
    text = (FORMER / name).read_text("utf-8").replace('"MODEL"', json.dumps(TINY))
    (folder / name).write_text(json.dumps(json.loads(text) | changes), "utf-8")


@pytest.fixture
def former_flags(tmp_path):
    """Return the flags of the job that it did; with other packages it would be another one."""
    versions = json.loads((FORMER / "run.json").read_text("utf-8"))["versions"]
    if any(importlib.metadata.version(one) != versions[one] for one in ("peft", "transformers")):
        pytest.skip("LoraConfig and SFTConfig have other fields in other versions")
    files = ["--train_file", FORMER / "train.jsonl", "--eval_file", FORMER / "eval.jsonl"]
    return command([*write_short_data(tmp_path), *files], tmp_path / "output")


def test_a_job_that_the_former_version_finished_is_finished(former_flags, tmp_path, capfd):
    output = tmp_path / "output"
    assert run(former_flags) == 0
    hashes = read_record(output)["adapter_sha256"]
    put_former("job.json", output / "checkpoints")
    put_former("run.json", output, adapter_sha256=hashes)
    left = files(output)
    capfd.readouterr()
    assert run(former_flags) == 0
    assert "is the finished adapter of this job" in capfd.readouterr().out and files(output) == left


def test_a_job_that_the_former_version_began_is_resumed(former_flags, tmp_path, capfd):
    output = tmp_path / "output"
    with pytest.MonkeyPatch.context() as patch, handlers_restored():
        at_step(patch, 5, send(signal.SIGTERM))
        assert run(former_flags) == 143
    put_former("job.json", output / "checkpoints")
    put_former("run.json", output, outcome="interrupted: Stopped after step 5 of 8.")
    capfd.readouterr()
    assert run(former_flags) == 0
    assert "resuming from" in capfd.readouterr().out
    found = losses(output)
    expected = json.loads((FORMER / "run.json").read_text("utf-8"))["loss_history"]
    former = [(e["step"], e[key]) for e in expected for key in ("loss", "eval_loss") if key in e]
    # It gave the model an attention mask, which rounds otherwise.
    assert [step for step, _ in found] == [step for step, _ in former]
    values = [[value for _, value in one] for one in (found, former)]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


# ==== Other runs in the same folder


def test_a_second_run_into_the_same_folder_is_refused_at_once(
    flags, stopped, tmp_path, monkeypatch, whole, capfd
):
    said = tmp_path / "said"

    def start_another(*_):
        left = files(stopped), (stopped / "all_logs.log").read_bytes()
        assert fork(command(flags, stopped), said).end() == 1
        assert left == (files(stopped), (stopped / "all_logs.log").read_bytes())

    at_step(monkeypatch, 1, start_another)
    assert go_on(command(flags, stopped), whole, capfd) == 7
    text = said.read_text("utf-8")
    assert f"{stopped} is in use by another run" in text and "Traceback" not in text
    assert not re.search("^data ", text, re.MULTILINE)  # refused before anything was read


def test_where_files_cannot_be_locked_a_run_goes_on(flags, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    assert run(command(flags, tmp_path, "--max_steps", 1)) == 0


def test_without_flock_no_marker_is_left_that_would_refuse_a_requeued_job(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    with t.locked(tmp_path):  # as in a run that is killed now
        assert all(path.read_bytes() == b"" for path in tmp_path.iterdir())
        with t.locked(tmp_path):
            pass


# ==== A full disk


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def too_large(*_, **__):
    """As a quota is told by some file systems, and a limit on the size of files."""
    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def too_large_in_safetensors(*_, **__):
    raise SafetensorError("I/O error: File too large (os error 27)")


def full_in_safetensors(*_, **__):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def full_in_torch(_, path, *__, **___):
    """As torch 2.10 does."""
    Path(path).write_bytes(b"PK")
    raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")


def fail_at(patch, owner, name, action, part):
    """Have owner.name do action instead of its work for a path that holds part."""
    real = getattr(owner, name)

    def call(*args, **kwargs):
        is_it = any(part in str(arg) for arg in args)
        return (action if is_it else real)(*args, **kwargs)

    patch.setattr(owner, name, call)


def full_at(part, action=full):
    """Have the disk be full for every file that is opened whose path holds part."""

    def see(event, path, _):
        if event == "open" and part in path:
            action()

    watch_changes(see)


FULL = {  # how the disk is found to be full, and the step that is resumed from
    "a checkpoint's adapter": (
        lambda p: fail_at(p, peft.peft_model, "safe_save_file", full_in_safetensors, "point-8"), 7
    ),
    "its optimizer": (lambda p: fail_at(p, torch, "save", full_in_torch, "optimizer.pt"), 7),
    "its trainer_state.json": (lambda _: full_at("trainer_state.json", too_large), 7),
    "final_lora": (lambda _: full_at("final_lora/adapter_config.json"), 8),
    "final_lora_vllm": (
        lambda p: fail_at(p, safetensors.torch, "save_file", too_large_in_safetensors, "_vllm"), 8
    ),
}  # fmt: skip


def test_a_full_disk_loses_nothing(flags, whole, stopped, monkeypatch, capfd):
    for what, (make_full, step) in FULL.items():
        with monkeypatch.context() as patch:
            make_full(patch)
            assert run(command(flags, stopped)) == 1, what
        ON_CHANGE.clear()
        assert read_record(stopped)["outcome"].startswith("failed: A file could not be"), what
        said = capfd.readouterr()
        assert "the disk is full, or your quota" in said.err and "Make room" in said.err
        assert "Traceback" not in said.err
        assert files(stopped / "final_lora") == {"adapter_model.safetensors": b"old"}, what
        assert not [*stopped.glob("final_lora.2*")] and not (stopped / ".partial").exists()
        assert read_record(stopped)["resumed_from"].endswith("-7" if step == 7 else ("-7", "-8"))
    assert go_on(command(flags, stopped), whole, capfd) == 8
    assert has_old_results(stopped)


def test_a_run_json_that_cannot_be_written_costs_no_checkpoint(flags, whole, stopped, capfd):
    full_at("run.json")
    assert run(command(flags, stopped)) == 0
    ON_CHANGE.clear()
    assert (stopped / ADAPTER).read_bytes() == whole[0] and has_old_results(stopped)
    assert "run.json is not written" in capfd.readouterr().out


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
@pytest.mark.parametrize(("moment", "room"), [("step", 0), ("step", 300_000), ("end", 0)])
def test_on_a_disk_that_is_really_full_nothing_is_lost(
    flags, whole, interrupted, small_disk, monkeypatch, capfd, moment, room
):
    output = shutil.copytree(interrupted, small_disk / "output")
    put_old_results(output)
    with monkeypatch.context() as patch:
        if moment == "step":
            at_step(patch, 1, lambda *_: fill(small_disk, room))
        else:
            before(patch, peft.PeftModel, "from_pretrained", lambda *_, **__: fill(small_disk, 0))
        status = run(command(flags, output))
    (small_disk / "filler").unlink()
    logging.shutdown()  # the log could not be closed before
    if moment == "end":  # renaming takes no room, so the adapter may get into its place
        assert has_old_results(output)
    else:
        assert status == 1
        assert read_record(output)["outcome"].startswith(("running", "failed"))
        assert files(output / "final_lora") == {"adapter_model.safetensors": b"old"}
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


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_goes_away_costs_nothing(flags, whole, stopped, tmp_path, capfd, name):
    prepare, status = OUTPUTS[name]
    process = fork(command(flags, stopped), tmp_path / "said", prepare)
    assert process.end() == status, (stopped / "all_logs.log").read_text("utf-8")
    if status:
        assert read_record(stopped)["outcome"].startswith("interrupted: Stopped after step 8 of 8")
        assert checkpoints(stopped)[-1] == 8
    else:
        assert read_record(stopped)["outcome"] == "finished"
        assert (stopped / ADAPTER).read_bytes() == whole[0]


def test_a_refused_command_with_a_full_output_is_no_traceback(flags, tmp_path):
    argv = command(flags, tmp_path / "output", "--eval_file", tmp_path / "none.jsonl")
    assert fork(argv, tmp_path / "said", dev_full).end() == 1
    log = (tmp_path / "output" / "all_logs.log").read_text("utf-8")
    assert "There is no file" in log


# ==== Errors that are not known


@pytest.mark.parametrize("bug", [ZeroDivisionError("a bug"), PermissionError(13, "not yours")])
def test_an_unknown_error_is_a_traceback_on_the_screen_and_in_the_log(
    flags, tmp_path, monkeypatch, bug
):
    def fail(*_, **__):
        raise bug

    at_step(monkeypatch, 1, fail)
    with pytest.raises(type(bug)) as raised:  # Python prints it, and exits with 1
        t.main(command(flags, tmp_path))
    assert raised.value is bug
    assert read_record(tmp_path)["outcome"] == f"failed: {bug!r}"
    log = (tmp_path / "all_logs.log").read_text("utf-8")
    assert "Traceback (most recent call last)" in log and str(bug) in log


# ==== Several processes, started as torchrun starts them


def launch(argv, folder, *prepares):
    """Run the command in so many processes; return their statuses and what they said.

    The launcher is torch's own, as behind torchrun, but its processes are forks.
    """
    for path in folder.glob("rank*"):
        path.unlink()

    def be_the_launcher():
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name may have no address
        write_to(folder / "launcher said")
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=len(prepares), run_id="none", max_restarts=0,
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
            local_addr="localhost", monitor_interval=0.05,
        )  # fmt: skip
        elastic_launch(config, be_a_rank)(argv, folder, prepares)

    Fork(be_the_launcher).end()
    ranks = range(len(prepares))
    notes = [folder / f"rank {rank} status" for rank in ranks]
    statuses = [int(one.read_text() or -1) if one.exists() else -1 for one in notes]
    return statuses, [(folder / f"rank {rank} said").read_text("utf-8") for rank in ranks]


def be_a_rank(argv, folder, prepares):
    """Be one of the processes; note the exit status, which the launcher keeps for itself."""
    import accelerate

    accelerate.state.AcceleratorState._reset_state(True)  # of the tests' own process
    rank, status = int(os.environ["RANK"]), 0
    try:
        be_the_script(argv, folder / f"rank {rank} said", prepares[rank])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        raise
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        status = 99
        raise
    finally:
        (folder / f"rank {rank} status").write_text(str(status))


def tell_what_is_changed(_):
    watch_changes(lambda event, path, other: print("changed", path, flush=True))


def is_stopped_twice(patch):
    """Write each random state late, and get a signal as often as a launcher may pass it on."""
    at_saved(patch, "rng_state", lambda _: time.sleep(0.3))
    at_step(patch, 7, send(signal.SIGTERM, signal.SIGTERM))


def test_two_processes_learn_what_one_does(tmp_path, capfd):
    """Of 13 examples, so that the last step of each epoch has to be filled up."""
    output, alone = tmp_path / "output", tmp_path / "alone"
    flags = [*write_short_data(tmp_path), "--lora_dropout", "0"]  # each draws its own
    argv = command(flags, output)
    # A signal to either stops both, after the same step.
    statuses, said = launch(argv, tmp_path, None, is_stopped_twice)
    assert statuses == [143, 143], said
    assert "after step 7 of 8" in said[0] and "second signal" not in said[0]
    assert "Traceback" not in said[0] + said[1]
    assert "filled up" in said[0]
    newest = output / "checkpoints" / "checkpoint-7"
    assert {"rng_state_0.pth", "rng_state_1.pth"} < {path.name for path in newest.iterdir()}

    # The same launch goes on; the first process alone prints, and all but alone writes.
    statuses, said = launch(argv, tmp_path, None, tell_what_is_changed)
    assert statuses == [0, 0], said
    assert re.search("(?m)^done ", said[0]) and "2 processes" in said[0]
    changed = re.findall(rf"(?m)^changed {re.escape(str(output))}/(.*)$", said[1])
    assert {Path(path).name for path in changed} <= {
        "rng_state_1.pth", "checkpoints", "checkpoint-8",
    }  # fmt: skip
    sections = {"data", "tokens", "plan", "device", "model", "train", "eval", "verified", "done"}
    assert not {line.split(" ")[0] for line in said[1].splitlines()} & sections

    assert run(command(flags, alone)) == 0
    found, expected = read_record(output), read_record(alone)
    assert found["plan"] == expected["plan"] and found["device"] == "CPU, 2 processes"
    assert [step for step, _ in losses(output)] == [step for step, _ in losses(alone)]
    # Only the order of sums differs, up to the step that is filled up.
    for key in ("loss", "grad_norm"):
        pairs = [logged(one["loss_history"], key)[:3] for one in (found, expected)]
        assert pairs[0] == pytest.approx(pairs[1], rel=1e-3), key
    evals = [logged(one["loss_history"], "eval_loss") for one in (found, expected)]
    assert evals[0][0] == pytest.approx(evals[1][0], rel=1e-6)
    assert evals[0] == pytest.approx(evals[1], abs=0.05)


def test_of_several_processes_the_one_that_failed_says_why(tmp_path):
    """It ends all, and what the main one meets then is not written over its reason."""
    output = tmp_path / "output"
    argv = command(write_short_data(tmp_path), output)

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def runs_out_of_memory(patch):
        at_step(patch, 5, fail)

    statuses, said = launch(argv, tmp_path, None, runs_out_of_memory)
    assert statuses[1] == 1, said  # the other may be stopped while it notes its own
    assert "memory is full" in said[1] and "Traceback" not in said[1]
    outcome = read_record(output)["outcome"]
    assert outcome.startswith("failed: ") and "memory is full" in outcome
    assert not [*output.glob("*.new*")]
    statuses, said = launch(argv, tmp_path, None, None)
    assert statuses == [0, 0] and "resuming from" in said[0]
    assert read_record(output)["outcome"] == "finished"


SIGNALS_TO_HANDLE = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr",
    "localhost", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
    "--signals-to-handle", SIGNALS_TO_HANDLE,
]  # fmt: skip


def processes_that_name(word):
    """Return the commands of the processes that run now and have this word in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_text("utf-8").replace("\0", " ")
            found += [line] if word in line else []
    return found


def test_torchrun_passes_usr1_on_and_the_same_launch_ends_in_the_same_bytes(tmp_path):
    """As under Slurm: torchrun ends with 1, so the job's file looks at run.json for what to do."""
    output, whole = tmp_path / "stopped", tmp_path / "whole"
    flags = [*write_short_data(tmp_path), "--num_epochs", "4"]  # 16 steps
    argv = command(flags, output)
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    launcher = subprocess.Popen(
        [*TORCHRUN, "train_lora_single.py", *argv],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    log, end = output / "all_logs.log", time.monotonic() + 120
    while not (log.is_file() and "step 2/16" in log.read_text("utf-8")):
        assert time.monotonic() < end and launcher.poll() is None
        time.sleep(0.02)
    launcher.send_signal(signal.SIGUSR1)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 1 and "SignalException" in errors
    assert processes_that_name(str(output)) == []
    step = checkpoints(output)[-1]
    outcome = read_record(output)["outcome"]
    assert 2 <= step < 16 and outcome.startswith(f"interrupted: Stopped after step {step} of 16")

    page = Path("docs/gpu.md").read_text("utf-8")
    (condition,) = re.findall(r'(?m)^    (grep .* "\$output/run.json"); then', page)
    assert SIGNALS_TO_HANDLE in page
    condition = condition.replace("$output", str(output))
    assert subprocess.run(["bash", "-c", condition]).returncode == 0

    for folder in (output, whole):
        statuses, said = launch(command(flags, folder), tmp_path, None, None)
        assert statuses == [0, 0], said
        assert ("resuming from" in said[0]) == (folder == output)
    assert subprocess.run(["bash", "-c", condition]).returncode == 1
    assert (output / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    assert losses(output) == losses(whole)


def test_a_step_that_processes_cannot_share_is_refused(flags, tmp_path):
    output = tmp_path / "output"
    put_old_results(output)
    left = files(output)
    argv = command(flags, output, "--batch_size", 1, "--gradient_accumulation_steps", 3)
    statuses, said = launch(argv, tmp_path, None, None)
    assert set(statuses) in ({1}, {1, 143}), said  # the launcher stops who is not yet gone
    reason = " ".join("\n".join(said).split())
    assert "2 processes cannot share" in reason and "multiple of 2" in reason
    assert "Traceback" not in said[0] + said[1]
    assert files(output) == left
