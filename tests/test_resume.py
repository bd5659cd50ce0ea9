"""Sections 8, 10 and 12: signals, checkpoints, going on, and what an earlier run left."""

import errno
import fcntl
import gc
import hashlib
import importlib.metadata
import json
import logging
import math
import multiprocessing
import os
import pickle
import pty
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import huggingface_hub.constants
import matplotlib.figure
import peft.peft_model
import pytest
import safetensors.torch
import torch
import transformers
import trl
from conftest import draw_nothing, handlers_restored
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import train_lora_single as t

STEPS = 8  # two epochs of four, with a checkpoint every three steps
ADAPTER = "final_lora/adapter_model.safetensors"
RESULTS = ("final_lora", "final_lora_vllm", "samples.md", "lora.png")
EPOCH_FILES = {"adapter_config.json", "adapter_model.safetensors"}

# Processes to be killed are forked from one that has done the imports, which take 6 s.
FORKS = multiprocessing.get_context("forkserver")
MODEL_CODE = "transformers.models.qwen3_5.modeling_qwen3_5"
FORKS.set_forkserver_preload(["pytest", "matplotlib.figure", "trl.trainer.sft_trainer", MODEL_CODE])


# ==== What the tests share


@pytest.fixture(scope="module")
def flags(lines, tmp_path_factory):
    """Return flags for 13 training and 4 eval lines."""
    return lines(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(demo):
    """Return the adapter's bytes and the losses of the run that was not interrupted."""
    return adapter(demo[0]), losses(demo[0])


@pytest.fixture(scope="module")
def interrupted(flags, whole, tmp_path_factory):
    """Return the output of a run stopped after step 7, with whole checkpoints of 6 and 7."""
    output = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 7, send(signal.SIGINT))
        assert status(command(flags, output)) == 130
    assert complete(output) == [6, 7]
    return output


@pytest.fixture
def stopped(interrupted, tmp_path):
    """Return a copy of the interrupted run, in which an earlier run's results stand."""
    output = shutil.copytree(interrupted, tmp_path / "output")
    put_old_results(output)
    return output


def put_old_results(output):
    for name in (ADAPTER, "final_lora_vllm/adapter_model.safetensors", "samples.md", "lora.png"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(b"old")


def old_results(output):
    """Return which results of the earlier run are in output, in place or under a time stamp."""

    def is_old(path):
        path = path / "adapter_model.safetensors" if path.is_dir() else path
        return path.exists() and path.read_bytes() == b"old"

    places = {name: [output / name, *output.glob(f"{name}.[0-9]*")] for name in RESULTS}
    return [name for name, paths in places.items() if any(map(is_old, paths))]


def command(flags, output, *more):
    return [*flags, "--output_dir", str(output), *map(str, more)]


def status(argv):
    """Return the status with which the command ends when it fails or is stopped."""
    with handlers_restored(), pytest.raises(SystemExit) as stop:
        t.main(argv)
    return stop.value.code


def adapter(output):
    return Path(output, ADAPTER).read_bytes()


def record(output):
    """Return what run.json holds."""
    return json.loads(Path(output, "run.json").read_text("utf-8"))


def losses(output):
    """Return (step, loss) and (step, eval loss) of a run, in order."""
    history = record(output)["loss_history"]
    return [(e["step"], e[key]) for e in history for key in ("loss", "eval_loss") if key in e]


def files(folder):
    """Return the bytes of each file in folder, but for the log, to which each run adds."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if path.name != "all_logs.log"
    }


def complete(output):
    """Return the steps of the checkpoints that say they are complete."""
    found = Path(output).glob("checkpoints/*/complete.json")
    return sorted(int(path.parent.name.split("-")[1]) for path in found)


def go_on(argv, whole, capfd):
    """Run the command to its end, which must be that of the run that was not interrupted.

    Return the step of the checkpoint that it went on from, or None if it began anew.
    """
    output = Path(argv[argv.index("--output_dir") + 1])
    capfd.readouterr()
    t.main(argv)
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err
    assert adapter(output) == whole[0] and losses(output) == whole[1]
    assert record(output)["outcome"] == "finished"
    assert {*RESULTS, "run.json", "checkpoints"} <= {path.name for path in output.iterdir()}
    assert not [*output.rglob("*.new")] and not (output / ".partial").exists()
    found = re.search(r"^resume +from \S*/checkpoint-(\d+)\b", printed.out, re.MULTILINE)
    assert record(output)["resumed_from"] == (
        str(output / "checkpoints" / f"checkpoint-{found[1]}") if found else None
    )
    return int(found[1]) if found else None


def send(*numbers):
    """Return what sends this process signals, one after the other."""
    return lambda *_, **__: [os.kill(os.getpid(), number) for number in numbers]


def at_step(patch, number, action):
    """Do action within training step number."""

    def is_it(self, *_, **__):
        return self.state.global_step == number - 1

    before(patch, transformers.Trainer, "training_step", action, is_it)


def before(patch, owner, name, action, when=lambda *_, **__: True):
    """Do action(*arguments) before the first call of owner.name for which when() is true."""
    real, done = getattr(owner, name), []

    def call(*args, **kwargs):
        if not done and when(*args, **kwargs):
            done.append(None)
            action(*args)
        return real(*args, **kwargs)

    is_static = isinstance(vars(owner).get(name), staticmethod)
    patch.setattr(owner, name, staticmethod(call) if is_static else call)


# An audit hook stays for ever, so there is one, which calls these with (event, path, other path).
ON_CHANGE = []
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def audit(event, args):
    if not ON_CHANGE or event not in CHANGES:
        return
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    actions = ON_CHANGE[:]
    ON_CHANGE.clear()  # what an action changes is no change of the run's
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
    """Do action before the change number (from 1) of a path, or new path, that holds part."""
    left = [number]

    def see(found, path, other):
        if found == event and part in (other if event == "os.rename" else path):
            left[0] -= 1
            if left[0] == 0:
                action()

    watch_changes(see)


@pytest.fixture(autouse=True)
def no_watchers():
    yield
    ON_CHANGE.clear()


def fork(argv, action, said, environment=(), as_command=False):
    """Start the command in a process of its own, which does action(patch) first."""
    args = (argv, action, str(said), dict(environment), as_command)
    process = FORKS.Process(target=in_a_fork, args=args)
    process.start()
    return process


def in_a_fork(argv, action, said, environment, as_command):
    os.environ.update(environment)
    gc.freeze()
    for number in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    patch = pytest.MonkeyPatch()
    draw_nothing(patch)
    ACTIONS[action](patch)
    if as_command:
        sys.argv = ["train_lora_single.py", *argv]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        t.main(argv)


def ended(process):
    process.join(120)
    hangs = process.exitcode is None
    if hangs:
        process.kill()
    assert not hangs
    return process.exitcode


# ==== Signals


@pytest.mark.parametrize(
    ("number", "sent"),
    [(number, signal.SIGINT) for number in range(1, STEPS + 1)]
    + [(5, signal.SIGTERM), (6, signal.SIGHUP)],
)
def test_after_a_signal_the_same_command_ends_with_the_same_bytes(
    flags, whole, tmp_path, monkeypatch, capfd, number, sent
):
    with monkeypatch.context() as patch:
        at_step(patch, number, send(sent))
        assert status(command(flags, tmp_path)) == 128 + sent
    printed = capfd.readouterr()
    place = f"{tmp_path}/checkpoints/checkpoint-{number}"
    said = f"stopped at step {number} of 8; the same command goes on from {place}"
    assert said in printed.err and "Traceback" not in printed.err
    assert "stopping " in printed.out  # at once, for the step may take long
    assert record(tmp_path)["outcome"] == f"interrupted: {said}"
    assert complete(tmp_path)[-1] == number and not (tmp_path / "final_lora").exists()
    steps = [step for step, _ in losses(tmp_path)]
    assert steps[-1] == number
    assert go_on(command(flags, tmp_path), whole, capfd) == number


def test_a_signal_that_was_ignored_before_stays_so(flags, whole, tmp_path, monkeypatch, capfd):
    """As SIGHUP is under nohup, and SIGINT in a shell's background."""
    ignored = (signal.SIGHUP, signal.SIGINT)
    handlers = [signal.signal(one, signal.SIG_IGN) for one in ignored]
    try:
        at_step(monkeypatch, 2, send(*ignored))
        assert go_on(command(flags, tmp_path), whole, capfd) is None
    finally:
        for one, handler in zip(ignored, handlers, strict=True):
            signal.signal(one, handler)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_data_is_read_leaves_nothing(flags, tmp_path, monkeypatch, capfd, sent):
    before(monkeypatch, t, "parse_line", send(sent))
    assert status(command(flags, tmp_path)) == 128 + sent
    assert [path.name for path in tmp_path.iterdir()] == ["all_logs.log"]
    said = capfd.readouterr().err
    assert "stopped" in said and "Traceback" not in said


EVALUATION = (trl.SFTTrainer, "prediction_step")
GENERATION = (transformers.GenerationMixin, "generate")
LOADING = (transformers.AutoModelForCausalLM, "from_pretrained")


def evaluates(step):
    return lambda self, *_, **__: self.state.global_step == step


def always(*_, **__):
    return True


FIRST = {
    "the weights are loaded": (LOADING, lambda *_, **kwargs: "use_safetensors" in kwargs),
    "the base is evaluated": (EVALUATION, evaluates(0)),
}


@pytest.mark.parametrize("moment", FIRST)
def test_a_signal_before_the_first_step_leaves_nothing_to_go_on_from(
    flags, whole, tmp_path, monkeypatch, capfd, moment
):
    where, when = FIRST[moment]
    with monkeypatch.context() as patch:
        before(patch, *where, send(signal.SIGINT), when)
        assert status(command(flags, tmp_path)) == 130
    said = capfd.readouterr().err
    assert "stopped" in said and "Traceback" not in said
    assert record(tmp_path)["outcome"].startswith("interrupted: stopped")
    assert not complete(tmp_path) and not (tmp_path / "final_lora").exists()
    assert go_on(command(flags, tmp_path), whole, capfd) is None


LATER = {  # where, when, the checkpoints then
    "the weights are loaded": (*FIRST["the weights are loaded"], [6, 7]),
    "the last evaluation": (EVALUATION, evaluates(8), [7, 8]),
    "the proof": ((t, "prove"), always, [7, 8]),
}


@pytest.mark.parametrize("moment", LATER)
def test_a_signal_outside_the_steps_loses_nothing(
    flags, whole, stopped, monkeypatch, capfd, moment
):
    where, when, there = LATER[moment]
    with monkeypatch.context() as patch:
        before(patch, *where, send(signal.SIGTERM), when)
        assert status(command(flags, stopped)) == 143
    said = capfd.readouterr().err
    assert "the same command goes on from" in said and "Traceback" not in said
    assert record(stopped)["outcome"].startswith("interrupted: stopped")
    assert adapter(stopped) == b"old" and complete(stopped) == there
    assert go_on(command(flags, stopped), whole, capfd) == there[-1]
    assert old_results(stopped) == [*RESULTS]


def test_a_signal_in_an_epochs_evaluation_stops_when_its_checkpoint_is_saved(
    flags, whole, tmp_path, monkeypatch, capfd
):
    with monkeypatch.context() as patch:
        before(patch, *EVALUATION, send(signal.SIGINT), evaluates(4))
        assert status(command(flags, tmp_path)) == 130
    assert complete(tmp_path) == [3, 4]
    assert go_on(command(flags, tmp_path), whole, capfd) == 4


def test_a_signal_while_samples_are_written_keeps_the_proved_adapter(
    flags, whole, stopped, monkeypatch, capfd
):
    with monkeypatch.context() as patch:
        before(patch, *GENERATION, send(signal.SIGINT))
        assert status(command(flags, stopped)) == 130
    said = capfd.readouterr().err
    assert adapter(stopped) == whole[0] and "Traceback" not in said
    assert f"stopped; {stopped}/final_lora is whole; the same command starts anew" in said
    assert record(stopped)["outcome"] == "finished"  # the rest can be done without
    step = go_on(command(flags, stopped), whole, capfd)
    assert old_results(stopped) == [*RESULTS]
    assert step == 8 or "goes on" not in said, "it said so, and trained all anew"


def test_a_second_signal_in_a_step_stops_at_once(flags, whole, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        at_step(patch, 6, send(signal.SIGTERM, signal.SIGINT))
        assert status(command(flags, tmp_path)) == 130
    said = capfd.readouterr().err
    assert "stopped" in said and "Traceback" not in said
    assert record(tmp_path)["outcome"].startswith("interrupted: stopped")
    assert losses(tmp_path) == [one for one in whole[1] if one[0] <= 5]
    assert complete(tmp_path) == [3, 4]  # step 6 was neither finished nor saved
    assert go_on(command(flags, tmp_path), whole, capfd) == 4


def torch_save(patch, end, action):
    """Do action(path) when torch has written the file whose path ends so."""
    save = torch.save

    def call(thing, path, *args, **kwargs):
        save(thing, path, *args, **kwargs)
        if str(path).endswith(end):
            action(path)

    patch.setattr(torch, "save", call)


def test_a_second_signal_while_the_checkpoint_is_written_costs_only_that_one(
    flags, whole, tmp_path, monkeypatch, capfd
):
    def cut(path):
        os.truncate(path, 1000)
        send(signal.SIGINT)()

    with monkeypatch.context() as patch:
        at_step(patch, 5, send(signal.SIGINT))
        torch_save(patch, "checkpoint-5/optimizer.pt", cut)
        assert status(command(flags, tmp_path)) == 130
    assert (tmp_path / "checkpoints" / "checkpoint-5").exists()
    assert record(tmp_path)["outcome"].startswith("interrupted: stopped")
    assert go_on(command(flags, tmp_path), whole, capfd) == 4


def test_a_signal_while_the_end_is_recorded_changes_nothing(flags, tmp_path, monkeypatch, capfd):
    sent = []
    at_step(monkeypatch, 3, send(signal.SIGINT))
    # The first time it is written is the start.
    at_change("os.rename", "/run.json", lambda: sent.append(send(signal.SIGINT)()), number=2)
    assert status(command(flags, tmp_path)) == 130 and sent
    assert record(tmp_path)["outcome"].startswith("interrupted: stopped at step 3 of 8")
    assert "Traceback" not in capfd.readouterr().err


# ==== Killed


def die(*_, **__):
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def cut_and_die(path):
    os.truncate(path, 1000)
    die()


def at(*change):
    """Return what dies before such a change of a file."""
    return lambda _: at_change(*change[:2], die, *change[2:])


KILLED = {  # what the process does to itself, and the step that is gone on from
    "in a step": (lambda patch: at_step(patch, 8, die), 7),
    "in an evaluation": (lambda patch: before(patch, *EVALUATION, die, evaluates(8)), 7),
    "while optimizer.pt is written": (
        lambda patch: torch_save(patch, "checkpoint-8/optimizer.pt", cut_and_die),
        7,
    ),
    "before complete.json": (at("open", "checkpoint-8/complete.json"), 7),
    "within complete.json": (at("os.rename", "checkpoint-8/complete.json"), 7),
    "while an older checkpoint is removed": (at("os.remove", "optimizer.pt"), 8),
    "in the proof": (lambda patch: patch.setattr(t, "prove", die), 8),
    "while older results are set aside": (at("os.rename", "/samples.md.2"), 8),
    "between two renames": (at("os.rename", "output/final_lora", 4), 8),  # two are set aside
    "in generation": (lambda patch: before(patch, *GENERATION, die), None),
}
ACTIONS = {moment: action for moment, (action, _) in KILLED.items()}


@pytest.mark.parametrize("moment", KILLED)
def test_after_sigkill_the_same_command_ends_with_the_same_bytes(
    flags, whole, stopped, tmp_path, capfd, moment
):
    process = fork(command(flags, stopped), moment, tmp_path / "said")
    assert ended(process) == -signal.SIGKILL, (tmp_path / "said").read_text("utf-8")
    assert old_results(stopped) == [*RESULTS]
    step = KILLED[moment][1]
    assert record(stopped)["outcome"] == ("finished" if step is None else "running")
    if step is None:  # it is proved and in place
        assert adapter(stopped) == whole[0]
    assert go_on(command(flags, stopped), whole, capfd) == step
    assert old_results(stopped) == [*RESULTS]


def prepare(flags, output, *more, **changes):
    """Return the Job that run() would have when it looks for a checkpoint."""
    args = t.parse_args(command(flags, output, *more))
    vars(args).update(changes)
    config, tokenizer = t.load_config_and_tokenizer(args)
    paths = [path for path in (args.train_file, args.eval_file) if path]
    rows = [t.encode(t.read_examples(path), tokenizer, args.max_seq_len) for path in paths]
    job = t.Job(args, config, tokenizer, *rows)
    job.plan = t.make_plan(args, config, len(job.train))
    job.products = t.choose_products(job)
    return job


def test_whenever_it_is_killed_there_is_enough_left(flags, whole, tmp_path, monkeypatch, capfd):
    """A copy of the folder before each change of a file is what a kill would leave there.

    It is also all that the run takes on the disk.
    """
    output, copy = tmp_path / "output", tmp_path / "copy"
    put_old_results(output)
    (output / "run.json").write_text('"old"')
    (output / "checkpoints" / "checkpoint-99").mkdir(parents=True)
    (output / "checkpoints" / "checkpoint-99" / "adapter_model.safetensors").write_bytes(b"old")
    argv = command(flags, output, "--save_steps", 1)
    job, begun, seen, sizes, steps = prepare(flags, copy), [0], set(), [], []
    disk = 4 * job.plan.trainable * (11 + job.args.num_epochs)  # beside 125 MB of tokenizers
    capfd.readouterr()
    real = transformers.Trainer.training_step

    def training_step(self, *args, **kwargs):
        begun[0] = self.state.global_step
        return real(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)

    def look(*_):
        paths = sorted(path for path in output.rglob("*") if path.is_file())
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        if hash((*stats,)) in seen:
            return
        seen.add(hash((*stats,)))
        sizes.append(sum(size for path, size, _ in stats if "token" not in path))
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(output, copy)
        assert old_results(copy) == [*RESULTS]
        assert [*copy.glob("checkpoints*/checkpoint-99")]
        assert '"old"' in [path.read_text("utf-8") for path in copy.glob("run.json*")]
        if (copy / "run.json").exists():
            record(copy)
        for name in ("final_lora", "final_lora_vllm"):
            place = copy / name / "adapter_model.safetensors"
            if place.parent.exists() and place.read_bytes() != b"old":
                assert len(load_file(place)) == 20  # whole
        if (copy / "checkpoints" / "job.json").exists():
            found = t.find_checkpoint(job)
            steps.append(int(found.name.split("-")[1]) if found else 0)
            assert steps[-1] >= begun[0]  # of step n only the step itself is lost
        else:
            assert steps == [] or adapter(copy) == whole[0]

    def safely(*args):
        try:
            look(*args)
        except Exception as error:  # the run would take it for its own
            faults.append(error)

    faults = []
    watch_changes(safely)
    t.main(argv)
    ON_CHANGE.clear()
    look()
    assert faults == []
    assert adapter(output) == whole[0]
    assert len(seen) > 50 and steps == sorted(steps) and {*steps} == {*range(9)}
    assert disk / 2 < max(sizes) <= disk


def test_a_run_into_another_folder_disturbs_nothing_and_one_into_the_same_is_refused(
    flags, whole, tmp_path, monkeypatch, capfd
):
    """Both start while this one is in its second step."""
    same, other, others = tmp_path / "same", tmp_path / "other", []

    def start_others(*_):
        before = files(same), (same / "all_logs.log").read_bytes()
        second = fork(command(flags, same), "nothing", tmp_path / "said")
        others.append(fork(command(flags, other), "nothing", tmp_path / "other said"))
        assert ended(second) == 1
        assert before == (files(same), (same / "all_logs.log").read_bytes())

    at_step(monkeypatch, 2, start_others)
    assert go_on(command(flags, same), whole, capfd) is None
    said = (tmp_path / "said").read_text("utf-8")
    assert f"OUTPUT_DIR {same}: another run writes there" in said and "Traceback" not in said
    assert "data " not in said  # it was refused before anything was read
    assert ended(others[0]) == 0 and adapter(other) == whole[0]


ACTIONS["nothing"] = lambda patch: None


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_where_files_cannot_be_locked_a_run_goes_on(flags, tmp_path, monkeypatch, capfd, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    at_step(monkeypatch, 1, send(signal.SIGINT))  # it trains
    assert status(command(flags, tmp_path)) == 130
    assert "checkpoint-1" in capfd.readouterr().err


# ==== Checkpoints: which are kept, what they hold, which are passed over


def test_of_a_finished_run_only_each_epochs_adapter_stays(demo):
    folder = demo[0] / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"checkpoint-4", "checkpoint-8"}
    for checkpoint in folder.iterdir():
        assert {path.name for path in checkpoint.iterdir()} == EPOCH_FILES
    last = load_file(folder / "checkpoint-8" / "adapter_model.safetensors")
    final = load_file(demo[0] / ADAPTER)
    assert last.keys() == final.keys() and all(final[name].equal(last[name]) for name in final)


def test_each_epochs_adapter_gives_that_epochs_eval_loss(lines, tmp_path, tiny):
    """With one held-out example: of several the trainer takes the mean over batches."""
    argv, output = lines(tmp_path, evaluation=1), tmp_path / "output"
    t.main(command(argv, output))
    (row,) = prepare(argv, output).eval
    labels = torch.tensor(row["labels"])[1:]
    for step, expected in [(e["step"], e["eval_loss"]) for e in evaluations(output)]:
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
        if step:
            model = PeftModel.from_pretrained(model, output / f"checkpoints/checkpoint-{step}")
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits.double()
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels)
        # Of float32 sums over 64 to 512 numbers a few units in the seventh place are lost.
        assert expected == pytest.approx(loss.item(), rel=1e-5)


def evaluations(output):
    return [entry for entry in record(output)["loss_history"] if "eval_loss" in entry]


def test_a_checkpoint_holds_what_going_on_needs_and_no_base_weights(interrupted, tiny):
    folder = interrupted / "checkpoints"
    names = {path.name for path in folder.iterdir()}
    assert names == {"job.json", "checkpoint-4", "checkpoint-6", "checkpoint-7"}
    assert {path.name for path in (folder / "checkpoint-4").iterdir()} == EPOCH_FILES
    needed = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    for step in (6, 7):
        assert needed | EPOCH_FILES < {p.name for p in (folder / f"checkpoint-{step}").iterdir()}
        tensors = load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors")
        assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
        base = max(x.nbytes for x in load_file(Path(tiny, "model.safetensors")).values())
        size = sum(tensor.nbytes for tensor in tensors.values())
        paths = [p for p in (folder / f"checkpoint-{step}").iterdir() if "token" not in p.name]
        rest = sum(path.stat().st_size for path in paths) - 3 * size
        assert 0 < rest < base  # beside the adapter and its two moments there is no room for it


CHECKPOINT_FILES = """adapter_config.json adapter_model.safetensors optimizer.pt scheduler.pt
rng_state.pth trainer_state.json tokenizer.json complete.json"""


@pytest.mark.parametrize("name", CHECKPOINT_FILES.split())
def test_a_checkpoint_with_a_file_cut_zeroed_or_missing_is_passed_over(
    flags, interrupted, tmp_path, name
):
    output = shutil.copytree(interrupted, tmp_path / "output")
    newest, job = output / "checkpoints" / "checkpoint-7", prepare(flags, output)
    data = (newest / name).read_bytes()
    for broken in (data[:-1], data[: len(data) // 2], bytes(len(data)), b"", b"\xff", b"1", None):
        if broken is None:
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(broken)
        assert t.find_checkpoint(job) == newest.with_name("checkpoint-6")
    (newest / name).write_bytes(data)
    assert t.find_checkpoint(job) == newest


def cut(output, *steps):
    for step, name in zip(steps, ("optimizer.pt", "trainer_state.json"), strict=False):
        os.truncate(output / "checkpoints" / f"checkpoint-{step}" / name, 100)


def test_past_a_broken_checkpoint_it_goes_on_from_the_one_before(flags, whole, stopped, capfd):
    cut(stopped, 7)
    assert go_on(command(flags, stopped), whole, capfd) == 6


def test_folders_in_a_checkpoint_and_in_the_models_folder_are_left_alone(
    flags, whole, tmp_path, tiny, monkeypatch, capfd
):
    """As `hf download --local-dir` leaves .cache beside the model's files."""
    model, output = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "output"
    (model / ".cache" / "huggingface").mkdir(parents=True)
    argv = command(flags, output, "--model_name", model)
    with monkeypatch.context() as patch:
        at_step(patch, 5, send(signal.SIGINT))
        assert status(argv) == 130
    (model / ".cache" / "huggingface" / "lock").write_text("", "utf-8")
    notes = [output / f"checkpoints/checkpoint-{step}/mine/notes" for step in (4, 5)]
    for path in notes:
        path.parent.mkdir()
        path.write_text("precious", "utf-8")
    assert go_on(argv, whole, capfd) == 5
    assert notes[0].read_text("utf-8") == "precious"  # the other goes with its checkpoint


def all_broken(output):
    cut(output, 7, 6)


def job_is(text):
    return lambda output: (output / "checkpoints" / "job.json").write_bytes(text)


NOTHING_TO_GO_ON_FROM = {
    "all are broken": all_broken,
    "job.json is cut": job_is(b'{"MODEL_NAME": "tests/ti'),
    "job.json is empty": job_is(b""),
    "job.json is zeroed": job_is(bytes(500)),
    "job.json is missing": lambda output: (output / "checkpoints" / "job.json").unlink(),
}


@pytest.mark.parametrize("what", NOTHING_TO_GO_ON_FROM)
def test_where_nothing_can_be_gone_on_from_it_starts_anew_and_keeps_what_was_there(
    flags, whole, stopped, capfd, what
):
    NOTHING_TO_GO_ON_FROM[what](stopped)
    old, run = files(stopped / "checkpoints"), (stopped / "run.json").read_bytes()
    if what in ("all are broken", "job.json is cut"):  # a whole run, and for the others its start
        assert go_on(command(flags, stopped), whole, capfd) is None
        assert old_results(stopped) == [*RESULTS]
    else:
        assert t.find_checkpoint(prepare(flags, stopped)) is None
    (aside,), (run_aside,) = stopped.glob("checkpoints.2*"), stopped.glob("run.json.2*")
    assert files(aside) == old and run_aside.read_bytes() == run


def test_another_job_may_start_once_the_checkpoints_are_moved_away(flags, whole, stopped, capfd):
    """Which costs nothing: moved back, they are gone on from."""
    folder, away = stopped / "checkpoints", stopped / "mine"
    old, argv = files(folder), command(flags, stopped, "--seed", 7)
    assert refused(argv, stopped, capfd).keys() == {"SEED"}
    folder.rename(away)
    t.main(argv)
    assert record(stopped)["resumed_from"] is None and record(stopped)["outcome"] == "finished"
    assert adapter(stopped) not in (b"old", whole[0]) and files(away) == old
    assert old_results(stopped) == [*RESULTS] and [*stopped.glob("run.json.2*")]
    shutil.rmtree(folder)
    away.rename(folder)
    assert go_on(command(flags, stopped), whole, capfd) == 7


def test_what_a_user_keeps_beside_the_checkpoints_is_left_alone(flags, whole, stopped, capfd):
    folder = stopped / "checkpoints"
    shutil.copytree(folder / "checkpoint-7", folder / "checkpoint-11-backup")
    shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-best")
    (folder / "checkpoint-").mkdir()
    (folder / "checkpoint-notes.txt").write_text("mine")
    names = ("checkpoint-11-backup", "checkpoint-best", "checkpoint-notes.txt")
    mine = {name: data for name, data in files(folder).items() if name.startswith(names)}
    assert len(mine) > 20
    argv = command(flags, stopped, "--save_steps", 1)
    assert go_on(argv, whole, capfd) == 7
    assert {name: data for name, data in files(folder).items() if name.startswith(names)} == mine
    assert (folder / "checkpoint-").is_dir()


class Payload:
    """What makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "training_args.bin"])
def test_code_in_a_checkpoint_is_not_run(flags, stopped, tmp_path, name):
    marker, folder = tmp_path / "marker", stopped / "checkpoints" / "checkpoint-7"
    torch.save(Payload(marker), folder / name)
    hashes = json.loads((folder / "complete.json").read_text("utf-8"))
    hashes[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "complete.json").write_text(json.dumps(hashes))
    data = (folder / name).read_bytes()
    if name == "training_args.bin":  # nobody reads it
        t.main(command(flags, stopped))
        assert record(stopped)["resumed_from"] == str(folder)
    else:
        with pytest.raises((SystemExit, pickle.UnpicklingError), match="eights"):
            t.main(command(flags, stopped))
    assert not marker.exists()
    (tmp_path / "armed").write_bytes(data)
    torch.load(tmp_path / "armed", weights_only=False)
    assert marker.exists()  # it was a loaded gun


# ==== Another job

ANOTHER = {
    "MODEL_NAME": "a copy", "MODEL_REVISION": "v2", "DTYPE": "bfloat16", "MAX_SEQ_LEN": 1000,
    "LORA_R": 4, "LORA_ALPHA": 32, "LORA_DROPOUT": 0.1, "LORA_TARGET_MODULES": "q_proj",
    "NUM_EPOCHS": 3, "BATCH_SIZE": 1, "GRADIENT_ACCUMULATION_STEPS": 1, "LEARNING_RATE": 0.02,
    "WARMUP_RATIO": 0.1, "SEED": 7, "LR_SCHEDULER_TYPE": "linear",
}  # fmt: skip


def refused(argv, output, capfd):
    """Run the command, which is refused and leaves all; return {what differs: (then, now)}."""
    before = files(output)
    capfd.readouterr()
    assert status(argv) == 1
    said = capfd.readouterr().err
    assert files(output) == before and "Traceback" not in said
    assert f"OUTPUT_DIR {output} holds checkpoint-" in said
    assert "checkpoint-7" in said
    assert "set these back to go on, or choose another OUTPUT_DIR" in said
    rows = re.findall(r"^  (\S.*?) was (.+), is (.+)$", said, re.MULTILINE)
    return {name: (then, now) for name, then, now in rows}


@pytest.mark.parametrize("name", ANOTHER)
def test_another_value_is_refused_by_name(flags, interrupted, tiny, tmp_path, capfd, name):
    output = shutil.copytree(interrupted, tmp_path / "output")
    assert ANOTHER.keys() == t.JOB_RULES.keys()
    then, new = vars(t.parse_args(flags))[name.lower()], ANOTHER[name]
    if name == "MODEL_NAME":
        new = shutil.copytree(tiny, tmp_path / "copy")
    found = refused(command(flags, output, f"--{name.lower()}", new), output, capfd)
    assert found.keys() == {name}
    if name == "LORA_TARGET_MODULES":
        assert str(found[name]).count("q_proj") == 2 and "down_proj" in found[name][0]
    else:
        assert found[name] == (str(then), str(new))


def test_all_that_differs_is_named_at_once(flags, interrupted, tmp_path, capfd):
    output = shutil.copytree(interrupted, tmp_path / "output")
    argv = command(flags, output, "--lora_r", 4, "--seed", 7, "--eval_file", "")
    found = refused(argv, output, capfd)
    assert found["LORA_R"] == ("8", "4") and found["SEED"] == ("42", "7")
    assert len(found) == 3 and any("EVAL_FILE" in name for name in found)


@pytest.mark.parametrize("name", ["train", "eval"])
def test_another_word_in_the_data_is_refused(flags, interrupted, tmp_path, capfd, name):
    output = shutil.copytree(interrupted, tmp_path / "output")
    path = Path(vars(t.parse_args(flags))[f"{name}_file"])
    data = path.read_bytes()
    at = data.rindex(b".")  # in the last line's reply
    (tmp_path / "other.jsonl").write_bytes(data[:at] + b"!" + data[at + 1 :])
    argv = command(flags, output, f"--{name}_file", tmp_path / "other.jsonl")
    (found,) = refused(argv, output, capfd)
    assert f"{name.upper()}_FILE" in found


def scale_weights(model):
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name: tensor * 1.5 for name, tensor in tensors.items()},
        model / "model.safetensors",
        {"format": "pt"},
    )


def change_template(model):
    with (model / "chat_template.jinja").open("a") as file:
        file.write("{# changed #}")  # what it renders is the same


def change_config(model):
    config = json.loads((model / "config.json").read_text("utf-8"))
    config["text_config"]["rms_norm_eps"] = 1e-5
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("edit", [scale_weights, change_template, change_config])
def test_an_edited_model_folder_is_refused(flags, tiny, tmp_path, monkeypatch, capfd, edit):
    model, output = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "output"
    argv = command(flags, output, "--model_name", model, "--num_epochs", 1)
    with monkeypatch.context() as patch:
        at_step(patch, 1, send(signal.SIGINT))
        assert status(argv) == 130
    assert t.find_checkpoint(prepare(argv, output)).name == "checkpoint-1"
    edit(model)
    with pytest.raises(SystemExit, match=r"another job(.|\n)*MODEL_NAME's files was \w+, is \w+"):
        t.find_checkpoint(prepare(argv, output))
    assert status(argv) == 1 and complete(output) == [1]


def test_other_products_are_refused(flags, interrupted, tmp_path, capfd):
    """Whose roundings differ; PRODUCTS itself may change, as from "auto" to what it chose."""
    output = shutil.copytree(interrupted, tmp_path / "output")
    found = refused(command(flags, output, "--products", "float16"), output, capfd)
    assert found == {"PRODUCTS": ("dtype", "float16")}


def moved_data(folder, flags):
    args = t.parse_args(flags)
    for name in ("train_file", "eval_file"):
        shutil.copy(vars(args)[name], folder / f"moved {name}")


SAME_JOB = {
    "DEVICE": "cuda", "PRODUCTS": "dtype", "TRAIN_FILE": "moved train_file",
    "EVAL_FILE": "moved eval_file", "OUTPUT_DIR": None, "LOGGING_STEPS": 5, "SAVE_STEPS": 1,
    "PUBLISH": "best", "NUM_SAMPLES": 2, "MAX_NEW_TOKENS": 1,
}  # fmt: skip


def test_other_output_settings_and_moved_files_are_the_same_job(
    flags, whole, stopped, tmp_path, capfd
):
    """The output folder is moved too: it is a copy."""
    assert SAME_JOB.keys() == t.RULES.keys() - t.JOB_RULES.keys()
    moved_data(tmp_path, flags)
    new = {name.lower(): value for name, value in SAME_JOB.items() if value}
    new |= {name: str(tmp_path / new[name]) for name in ("train_file", "eval_file")}
    checkpoint = stopped / "checkpoints" / "checkpoint-7"
    assert t.find_checkpoint(prepare(flags, stopped, **new)) == checkpoint
    more = [word for name in new if name != "device" for word in (f"--{name}", new[name])]
    assert go_on(command(flags, stopped, *more), whole, capfd) == 7


# ==== What an earlier run left


def test_a_second_run_moves_all_of_the_first_aside_unchanged(flags, demo, tmp_path, capfd):
    """With the same time on all that is moved, so that names collide, as two runs in a second."""
    output, kept = shutil.copytree(demo[0], tmp_path / "output"), []
    names, when = [*RESULTS, "checkpoints", "run.json"], time.time() - 1000
    for seed in (7, 8):
        kept.append({name: contents(output / name) for name in names})
        for name in names:
            os.utime(output / name, (when, when))
        t.main(command(flags, output, "--seed", seed, "--num_epochs", 1))
        assert "resume" not in capfd.readouterr().out
        for name in names:
            left = [contents(path) for path in output.glob(f"{name}.[0-9]*")]
            assert len(left) == len(kept) and all(one[name] in left for one in kept)
        assert contents(output / "final_lora") not in [one["final_lora"] for one in kept]
    expected = {"all_logs.log", *names}
    assert {path.name.partition(".2")[0] for path in output.iterdir()} == expected


def contents(path):
    return files(path) if path.is_dir() else path.read_bytes()


def test_a_run_that_is_refused_or_has_not_proved_its_adapter_touches_no_older_result(
    flags, demo, tmp_path, monkeypatch
):
    output = shutil.copytree(demo[0], tmp_path / "output")
    before = {name: contents(output / name) for name in RESULTS}
    everything = files(output)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    assert status(command(flags, output, "--train_file", tmp_path / "bad.jsonl")) == 1
    assert files(output) == everything

    def fail(*_):
        raise SystemExit("proof: it does not work")

    monkeypatch.setattr(t, "prove", fail)
    assert status(command(flags, output, "--num_epochs", 1)) == 1
    assert {name: contents(output / name) for name in RESULTS} == before
    assert [name for name in RESULTS if [*output.glob(f"{name}.*")]] == []
    assert not (output / ".partial").exists()
    assert record(output)["outcome"] == "failed: proof: it does not work"


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_writes_only_into_its_output_and_asks_nobody(
    flags, stopped, tmp_path, monkeypatch, resumed
):
    """Neither does it write down a secret of the environment. It may use caches."""
    asked, secret, output = [], "s3cr3t-0f-the-user", stopped if resumed else tmp_path / "new"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, secret)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # What the command sets before it imports anything is too late here.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, lambda *args, **_: asked.append(args) or 1 / 0)
    allowed = [output, *map(Path, (os.devnull, huggingface_hub.constants.HF_HOME))]
    allowed += [Path.home() / ".cache", Path.home() / ".config"]
    written = set()

    def see(event, path, _):
        if event == "open" and not path.isdigit():
            written.add(Path(path).absolute())

    watch_changes(see)
    t.main(command(flags, output))
    ON_CHANGE.clear()
    assert output / "all_logs.log" in written and asked == []
    assert [p for p in written if not any(p.is_relative_to(one) for one in allowed)] == []
    data = files(output)
    assert len(data) > 10 and any(b"tests/tiny-qwen3.5" in one for one in data.values())
    assert [name for name, one in data.items() if secret.encode() in one] == []


# ==== A full disk


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_safetensors(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


def full_in_tokenizers(*_, **__):
    raise Exception("No space left on device (os error 28)")


def full_in_torch(_, path, *__, **___):
    Path(path).write_bytes(b"PK")
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


def fail_at(patch, owner, name, action, part):
    """Have owner.name do action instead of its work for a path that holds part."""
    real = getattr(owner, name)

    def call(*args, **kwargs):
        is_it = any(part in str(arg) for arg in args)
        return (action if is_it else real)(*args, **kwargs)

    patch.setattr(owner, name, call)


def full_at(*parts):
    """Have the disk be full for every file whose path holds one of parts."""

    def see(event, path, _):
        if event == "open" and any(part in path for part in parts):
            full()

    watch_changes(see)


PEFT, TORCH = (peft.peft_model, "safe_save_file"), (torch, "save")
TOKENIZER = (transformers.PreTrainedTokenizerBase, "save_pretrained")
FULL = {  # (how the disk is found to be full, the step that is gone on from)
    "a checkpoint's adapter": (lambda p: fail_at(p, *PEFT, full_in_safetensors, "point-8"), 7),
    "its tokenizer": (lambda p: fail_at(p, *TOKENIZER, full_in_tokenizers, "point-8"), 7),
    "its optimizer": (lambda p: fail_at(p, *TORCH, full_in_torch, "optimizer.pt"), 7),
    "its random state": (lambda p: fail_at(p, *TORCH, full, "rng_state.pth"), 7),
    "trainer_state.json": (lambda _: full_at("trainer_state.json"), 7),
    "complete.json": (lambda _: full_at("complete.json"), 7),
    "complete.json and run.json": (lambda _: full_at("complete.json", "run.json"), 7),
    "final_lora": (lambda p: fail_at(p, *PEFT, full_in_safetensors, "/final_lora"), 8),
    "its config": (lambda _: full_at("final_lora/adapter_config.json"), 8),
    "its model card, PEFT's": (lambda _: full_at("final_lora/README.md"), 8),
    "final_lora's tokenizer": (
        lambda p: fail_at(p, *TOKENIZER, full_in_tokenizers, "/final_lora"),
        8,
    ),
    "final_lora_vllm": (
        lambda p: fail_at(p, safetensors.torch, "save_file", full_in_safetensors, "_vllm"),
        8,
    ),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_is_one_message_and_the_same_command_goes_on(
    flags, whole, stopped, monkeypatch, capfd, what
):
    make_full, step = FULL[what]
    with monkeypatch.context() as patch:
        make_full(patch)
        assert status(command(flags, stopped)) == 1
    ON_CHANGE.clear()
    said = capfd.readouterr().err
    assert said.count("could not be written") == 1 and "make room" in said
    assert "Traceback" not in said
    if "run.json" in what:
        assert record(stopped)["outcome"].startswith("interrupted")  # the last that was written
    else:
        assert record(stopped)["outcome"].startswith("failed: a file could not be written")
    for name in RESULTS:  # in place
        assert old_results(stopped) == [*RESULTS] and not [*stopped.glob(f"{name}.2*")]
    assert go_on(command(flags, stopped), whole, capfd) == step
    assert old_results(stopped) == [*RESULTS]


EXTRAS = {  # those that fail together, and how
    ("samples.md",): lambda _: full_at("/samples.md"),
    ("lora.png", "run.json"): lambda patch: [
        patch.setattr(matplotlib.figure.Figure, "savefig", full),
        full_at("run.json"),
    ],
}


@pytest.mark.parametrize("names", EXTRAS)
def test_a_disk_that_is_full_once_the_adapter_is_in_place_is_a_warning(
    flags, whole, tmp_path, monkeypatch, capfd, names
):
    output = tmp_path / "output"
    EXTRAS[names](monkeypatch)
    t.main(command(flags, output))
    printed = capfd.readouterr()
    for name in names:
        assert re.search(rf"^warning +\S*{name} is not written", printed.out, re.MULTILINE)
    assert "Traceback" not in printed.err and adapter(output) == whole[0]
    others = {"samples.md", "lora.png", "run.json"} - {*names}
    assert all((output / name).stat().st_size for name in others)
    if "run.json" in others:
        assert record(output)["outcome"] == "finished"


ACTIONS["full for job.json"] = lambda _: full_at("job.json")


def test_a_disk_that_is_full_at_the_start_is_one_message(flags, tmp_path, capfd):
    output, said = tmp_path / "output", tmp_path / "said"
    output.mkdir()
    (output / "all_logs.log").symlink_to("/dev/full")  # takes no byte of the log
    assert ended(fork(command(flags, output), "full for job.json", said)) == 1
    text = said.read_text("utf-8")
    assert text.count("could not be written") == 1 and "Traceback" not in text
    assert status(command(flags, said / "output")) == 1
    assert f"OUTPUT_DIR {said}/output ([Errno 20] Not a directory: " in capfd.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """Return a file system of 8 MB that a test may fill; it needs the right to mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(folder, room):
    """Leave only so many bytes on folder's file system."""
    (folder / "room").write_bytes(bytes(room))
    with open(folder / "filler", "wb", 0) as filler:
        for size in (2**16, 2**12, 1):
            with pytest.raises(OSError, match="No space left"):
                while True:
                    filler.write(bytes(size))
    (folder / "room").unlink()


# The adapter takes 125 kB, the tokenizer as much, the optimizer 250 kB: each is cut once.
@pytest.mark.parametrize(
    ("moment", "room"),
    [("step", 0), ("step", 200_000), ("step", 400_000), ("proof", 0), ("results", 200_000)],
)
def test_on_a_disk_that_is_really_full_nothing_is_lost(
    flags, whole, interrupted, small_disk, monkeypatch, capfd, moment, room
):
    output = shutil.copytree(interrupted, small_disk / "output")
    put_old_results(output)
    with monkeypatch.context() as patch:
        if moment == "step":
            at_step(patch, 8, lambda *_: fill(small_disk, room))
        elif moment == "results":
            before(patch, t, "publish", lambda *_: fill(small_disk, room))
        else:
            before(patch, t, "prove", lambda *_: [fill(small_disk, room), send(signal.SIGINT)()])
        assert status(command(flags, output)) == (130 if moment == "proof" else 1)
    said = capfd.readouterr().err
    assert "Traceback" not in said
    if moment != "proof":
        assert said.count("could not be written") == 1 and "make room" in said
    # What was cut may have taken the room for a new run.json: then the last one stands.
    ends = ("running", "interrupted" if moment == "proof" else "failed")
    assert record(output)["outcome"].startswith(ends) and adapter(output) == b"old"
    (small_disk / "filler").unlink()
    logging.shutdown()  # the log too, and its lock with it, could not be closed before
    assert go_on(command(flags, output), whole, capfd) == (7 if moment == "step" else 8)


# ==== Outputs that go away


def to_a_pipe(_):
    """Send stdout and stderr to a pipe; return the reader's end."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)
    return reader


def dev_full(patch):
    for number in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    at_step(patch, 5, send(signal.SIGINT))


def head_has_gone(patch):
    os.close(to_a_pipe(patch))


def tee_dies_before_ctrl_c(patch):
    reader = to_a_pipe(patch)
    at_step(patch, 5, lambda *_: [os.close(reader), send(signal.SIGINT)()])


def terminal_goes_away(patch):
    reader, writer = pty.openpty()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(writer)
    at_step(patch, 5, lambda *_: [os.close(reader), send(signal.SIGHUP)()])


OUTPUTS = {
    "/dev/full": (dev_full, 130), "| head": (head_has_gone, 0),
    "| tee": (tee_dies_before_ctrl_c, 130), "a dropped ssh": (terminal_goes_away, 129),
}  # fmt: skip
ACTIONS |= {name: action for name, (action, _) in OUTPUTS.items()}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_goes_away_costs_nothing(flags, whole, tmp_path, capfd, name):
    """The script's own lines at its end are run, in a process that has done the imports."""
    output, expected = tmp_path / "output", OUTPUTS[name][1]
    process = fork(command(flags, output), name, tmp_path / "said", as_command=True)
    assert ended(process) == expected, (output / "all_logs.log").read_text("utf-8")
    assert (tmp_path / "said").read_text("utf-8") == ""
    if expected:
        assert record(output)["outcome"].startswith("interrupted: stopped at step 5 of 8")
        assert complete(output)[-1] == 5
    else:
        assert record(output)["outcome"] == "finished" and adapter(output) == whole[0]
    if name == "| tee":
        assert go_on(command(flags, output), whole, capfd) == 5


@pytest.mark.parametrize("words", [">&-", "2>&-", ">&- 2>&-", "> /dev/full 2>&1", "2>&1 | head -1"])
def test_a_refused_command_with_a_closed_or_full_output_is_no_traceback(flags, tmp_path, words):
    argv = command(flags, tmp_path / "output", "--eval_file", tmp_path / "none.jsonl")
    line = shlex.join([sys.executable, "train_lora_single.py", *argv])
    shell = ["bash", "-c", f"{line} {words}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(shell, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    if words == ">&-":
        assert done.stderr.startswith(f"{tmp_path}/none.jsonl: not a file; ")
    assert "none.jsonl: not a file" in (tmp_path / "output" / "all_logs.log").read_text("utf-8")


def test_the_real_command_without_outputs_goes_to_its_end(flags, whole, tmp_path):
    """Python has no sys.stdout and sys.stderr then, and the log may be file number 1."""
    line = shlex.join([sys.executable, "train_lora_single.py", *command(flags, tmp_path)])
    done = subprocess.run(["bash", "-c", f"{line} <&- >&- 2>&-"], timeout=300)
    log = (tmp_path / "all_logs.log").read_text("utf-8")
    assert done.returncode == 0 and "Traceback" not in log, log
    assert record(tmp_path)["outcome"] == "finished"
    assert (adapter(tmp_path), losses(tmp_path)) == whole


def test_ctrl_c_of_the_real_command_whose_tee_dies_first(lines, tmp_path):
    output, log = tmp_path / "output", tmp_path / "log"
    argv = command(lines(tmp_path), output, "--num_epochs", 1000, "--save_steps", 100_000)
    run = subprocess.Popen(
        [sys.executable, "train_lora_single.py", *argv],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    tee = subprocess.Popen(["tee", str(log)], stdin=run.stdout, stdout=subprocess.DEVNULL)
    run.stdout.close()
    until = time.monotonic() + 120
    while not log.exists() or b"step 2/" not in log.read_bytes():
        assert run.poll() is None and time.monotonic() < until, log.read_text("utf-8")
        time.sleep(0.05)
    tee.send_signal(signal.SIGINT)
    tee.wait()
    run.send_signal(signal.SIGINT)
    assert run.wait(120) == 130 and b"Traceback" not in log.read_bytes()
    step = int(re.search(r"interrupted: stopped at step (\d+)", record(output)["outcome"])[1])
    assert complete(output)[-1] == step == losses(output)[-1][0]


# ==== run.json and the log


def test_run_json_says_running_then_finished_and_what_was_run(flags, demo, tmp_path, monkeypatch):
    early = []
    at_step(monkeypatch, 2, lambda *_: early.append(record(tmp_path)))
    t.main(command(flags, tmp_path, "--lora_alpha", 4))
    (early,), late = early, record(tmp_path)
    assert (early["outcome"], late["outcome"]) == ("running", "finished")
    args = vars(t.parse_args(command(flags, tmp_path, "--lora_alpha", 4)))
    for one in (early, late):
        assert one["constants"] == {name: args[name.lower()] for name in t.RULES}
        assert {"torch", "transformers", "peft", "trl"} < one["versions"].keys()
        for name, version in one["versions"].items():
            assert version == importlib.metadata.version(name)
        assert one["products"] == {"used": "dtype"} and one["device"] == "CPU"
        assert one["resumed_from"] is None and one["plan"]["steps"] == 8
        for name in ("train_file", "eval_file"):
            data = Path(args[name]).read_bytes()
            assert one["data"][args[name]]["sha256"] == hashlib.sha256(data).hexdigest()
    steps = [step for step, _ in losses(tmp_path)]
    assert steps == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    log = (tmp_path / "all_logs.log").read_text("utf-8")
    printed = [(int(a), b) for a, b in re.findall(r"step (\d)/8  loss (\S+)", log)]
    trained = [e for e in late["loss_history"] if "loss" in e]
    assert printed == [(e["step"], f"{e['loss']:.4f}") for e in trained] and len(printed) == 8
    assert re.findall(r"epoch \d  loss (\S+)", log) == [
        f"{e['eval_loss']:.4f}" for e in evaluations(tmp_path)
    ]


def test_of_two_versions_of_a_package_the_one_that_is_imported_is_recorded(
    flags, tmp_path, monkeypatch
):
    """As of those that setuptools brings along, and puts at the end of the path."""
    info = tmp_path / "more" / "packaging-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: packaging\nVersion: 0.1\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(info.parent)])
    at_step(monkeypatch, 1, send(signal.SIGINT))
    assert status(command(flags, tmp_path / "output")) == 130
    version = importlib.metadata.version("packaging")
    assert record(tmp_path / "output")["versions"]["packaging"] == version != "0.1"


def test_a_loss_that_is_no_number_is_in_run_json(flags, tmp_path, tiny, capfd):
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    next(x for name, x in tensors.items() if name.endswith("norm.weight"))[0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert status(command(flags, tmp_path / "output", "--model_name", model)) == 1
    assert "eval_loss is nan" in capfd.readouterr().err
    assert record(tmp_path / "output")["outcome"].startswith("failed: train: eval_loss is nan")
    (loss,) = [e["eval_loss"] for e in evaluations(tmp_path / "output")]
    assert math.isnan(loss)


def test_a_bug_is_a_traceback_in_the_log_too_and_the_same_command_goes_on(
    flags, whole, tmp_path, monkeypatch, capfd
):
    def bug(*_):
        warnings.warn("a library's warning", UserWarning, stacklevel=2)
        logging.getLogger("a.library").warning("a word of it")
        raise ZeroDivisionError("a bug")

    logging.captureWarnings(False)  # else True does nothing: an earlier run has set it
    with monkeypatch.context() as patch:
        at_step(patch, 6, bug)
        with pytest.raises(ZeroDivisionError, match="a bug"):  # python prints it, and exits with 1
            t.main(command(flags, tmp_path))
    printed, log = capfd.readouterr(), (tmp_path / "all_logs.log").read_text("utf-8")
    assert "a file could not be written" not in printed.err
    assert record(tmp_path)["outcome"] == "failed: ZeroDivisionError('a bug')"
    assert losses(tmp_path) == [one for one in whole[1] if one[0] <= 5]
    for text in ("UserWarning: a library's warning", "a word of it"):
        assert text in printed.err and text in log
    assert "Traceback (most recent call last)" in log and "\nZeroDivisionError: a bug\n" in log
    assert printed.out.strip() in log
    assert go_on(command(flags, tmp_path), whole, capfd) == 4
    log = (tmp_path / "all_logs.log").read_text("utf-8")
    assert log.startswith("\n---- 2") and log.count("\n---- 2") == 2 and "a bug" in log


@pytest.mark.parametrize(
    "error",
    [KeyError("a bug"), RuntimeError("CUDA error: an illegal memory access"), ValueError("28")],
)
def test_a_bug_while_a_checkpoint_is_written_is_not_called_a_full_disk(
    flags, stopped, monkeypatch, capfd, error
):
    def bug(*_, **__):
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error), match=str(error.args[0])):
        fail_at(patch, *TORCH, bug, "optimizer.pt")
        t.main(command(flags, stopped))
    assert record(stopped)["outcome"].startswith(f"failed: {type(error).__name__}")
    assert "could not be written" not in capfd.readouterr().err
    assert complete(stopped) == [6, 7]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), KeyboardInterrupt("a word")])
def test_a_librarys_own_keyboard_interrupt_is_one_message(flags, tmp_path, monkeypatch, error):
    def stop(*_):
        raise error

    at_step(monkeypatch, 2, stop)
    assert status(command(flags, tmp_path)) == 130
    assert record(tmp_path)["outcome"].startswith("interrupted: stopped")


@pytest.mark.parametrize(
    "other", [None, RecursionError("maximum recursion depth exceeded"), OSError("cut off")]
)
def test_a_signal_that_a_library_swallows_or_turns_into_another_error_still_counts(
    flags, tmp_path, monkeypatch, capfd, other
):
    load = t.load_config_and_tokenizer

    def in_an_import(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            if other:
                raise other from None
        return load(args)

    monkeypatch.setattr(t, "load_config_and_tokenizer", in_an_import)
    assert status(command(flags, tmp_path)) == 143
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err
    assert ("stopped at step 1 of 8" in printed.err) == (other is None)
    assert "stopped" in printed.err and str(other or "") in printed.err


def test_where_a_signal_ends_an_epoch_nothing_is_evaluated(flags, tmp_path, monkeypatch):
    at_step(monkeypatch, 2, lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    assert status(command(flags, tmp_path)) == 130
    history = record(tmp_path)["loss_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0]


def test_a_user_s_own_folders_in_the_output_are_left_alone(flags, tmp_path):
    for name in ("partial", "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("precious", encoding="utf-8")
    t.main(command(flags, tmp_path))
    assert [(tmp_path / n / "thesis.txt").read_text() for n in ("partial", "mine")] == [
        "precious",
        "precious",
    ]


def test_checkpoints_that_a_user_removes_do_not_cost_the_adapter(flags, tmp_path, monkeypatch):
    prove = t.prove

    def and_remove(*given):
        shutil.rmtree(tmp_path / "checkpoints")
        return prove(*given)

    monkeypatch.setattr(t, "prove", and_remove)
    t.main(command(flags, tmp_path))
    assert record(tmp_path)["outcome"] == "finished" and (tmp_path / ADAPTER).exists()


# ==== Several processes


LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}  # the machine's own name may have no address


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(argv, folder, *actions):
    """Run the command in processes that do actions first; return their statuses and words."""
    always = LOOPBACK | {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": str(len(actions))}
    always |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    said = [folder / f"said {rank}" for rank in range(len(actions))]
    processes = []
    for rank, action in enumerate(actions):
        said[rank].unlink(missing_ok=True)
        environment = always | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(fork(argv, action, said[rank], environment))
    ends = [ended(process) for process in processes]
    return ends, [path.read_text("utf-8") for path in said]


ACTIONS["tell what is changed"] = lambda _: watch_changes(
    lambda event, path, other: print("changed", path)
)


@pytest.fixture(scope="module")
def even(lines, tmp_path_factory):
    """Return flags for 16 rows, which are four batches an epoch for each of two processes."""
    return lines(tmp_path_factory.mktemp("even"), train=16)


@pytest.fixture(scope="module")
def whole_of_two(even, tmp_path_factory):
    """Return the output of two processes that were not interrupted, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    argv = command(even, folder / "output")
    ends, said = launch(argv, folder, "nothing", "tell what is changed")
    assert ends == [0, 0], said
    return folder / "output", said


def test_two_processes_learn_what_one_does(even, tmp_path):
    flags = [*even, "--lora_dropout", "0", "--num_samples", "0"]
    ends, said = launch(command(flags, tmp_path / "two"), tmp_path, "nothing", "nothing")
    assert ends == [0, 0], said
    t.main(command(flags, tmp_path / "one"))
    two, one = record(tmp_path / "two"), record(tmp_path / "one")
    assert two["plan"] == one["plan"] and two["tokens"] == one["tokens"]
    # Before the first step's end the weights are the same: only the order of sums differs.
    for key, place in (("eval_loss", 0), ("loss", 1), ("grad_norm", 1)):
        assert two["loss_history"][place][key] == pytest.approx(
            one["loss_history"][place][key], rel=1e-5
        )
    found, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert [step for step, _ in found] == [step for step, _ in expected]
    # Another order of the rows changes a step's loss by more.
    steps = [loss for step, loss in expected if step]
    assert [loss for _, loss in found] == pytest.approx([x for _, x in expected], abs=2e-3)
    assert max(steps) - min(steps) > 0.02


def test_the_first_process_alone_speaks_and_writes(whole_of_two):
    output, said = whole_of_two
    words = {line.split(" ")[0] for line in said[1].splitlines()}
    assert words <= {"[Gloo]", "", "Loading", "changed"} and "\ndone " in said[0]
    changed = re.findall(rf"^changed {re.escape(str(output))}/(.*)$", said[1], re.MULTILINE)
    assert changed and {Path(path).name for path in changed} <= {
        "rng_state_1.pth", "checkpoints", *(f"checkpoint-{step}" for step in (3, 4, 6, 8))
    }  # fmt: skip
    assert record(output)["outcome"] == "finished"
    assert record(output)["device"] == "CPU, 2 processes" and "\ndevice   CPU, 2 pro" in said[0]
    names = {path.name for path in output.iterdir()}
    assert names == {*RESULTS, "run.json", "checkpoints", "all_logs.log"}
    kept = [path for path in (output / "checkpoints").rglob("*") if path.is_file()]
    assert {path.name for path in kept} == EPOCH_FILES and len(kept) == 4


def slow_and_stopped(patch):
    """Write each random state late, and get a signal in step 5, as often as a launcher may."""
    save = transformers.Trainer._save_rng_state
    late = lambda *given: (time.sleep(0.3), save(*given))  # noqa: E731
    patch.setattr(transformers.Trainer, "_save_rng_state", late)
    at_step(patch, 5, send(signal.SIGTERM, signal.SIGTERM))


ACTIONS["slow, and SIGTERM in step 5"] = slow_and_stopped


@pytest.fixture(scope="module")
def interrupted_two(even, tmp_path_factory):
    """Return the output of two processes, the second of which got a signal in step 5."""
    folder = tmp_path_factory.mktemp("stopped")
    argv = command(even, folder / "output")
    ends, said = launch(argv, folder, "nothing", "slow, and SIGTERM in step 5")
    assert ends == [143, 143], said
    message = f"stopped at step 5 of 8; the same command goes on from {folder}/output/checkpoints"
    assert message in said[0] and message in said[1]
    return folder / "output"


def test_a_signal_to_one_of_two_stops_both_and_the_same_launch_ends_with_the_same_bytes(
    interrupted_two, whole_of_two, even, tmp_path
):
    output = shutil.copytree(interrupted_two, tmp_path / "output")
    assert complete(output)[-1] == 5
    assert record(output)["outcome"].startswith("interrupted: stopped at step 5 of 8")
    for path in output.glob("checkpoints/*/complete.json"):
        assert {"rng_state_0.pth", "rng_state_1.pth"} < json.loads(path.read_text()).keys()
    ends, said = launch(command(even, output), tmp_path, "nothing", "nothing")
    assert ends == [0, 0] and record(output)["resumed_from"].endswith("checkpoint-5"), said
    assert adapter(output) == adapter(whole_of_two[0]) and losses(output) == losses(whole_of_two[0])


def test_one_process_may_go_on_where_two_were_stopped(interrupted_two, even, tmp_path):
    output = shutil.copytree(interrupted_two, tmp_path / "output")
    t.main(command(even, output))
    assert record(output)["outcome"] == "finished"
    assert record(output)["resumed_from"].endswith("checkpoint-5")
    assert len(losses(output)) == len(losses(interrupted_two)) + 3 + 1  # steps, the last epoch


@pytest.mark.parametrize(
    ("train", "evaluation", "accumulated"), [(16, 4, 3), (13, 4, 2), (14, 4, 2), (16, 3, 2)]
)
def test_what_processes_cannot_share_evenly_is_refused_and_nothing_is_moved(
    lines, tmp_path, train, evaluation, accumulated
):
    """Accelerate would learn some rows twice, and count some twice in an eval loss."""
    flags, output = lines(tmp_path, train=train, evaluation=evaluation), tmp_path / "output"
    put_old_results(output)
    before = files(output)
    argv = command(flags, output, "--gradient_accumulation_steps", accumulated)
    ends, said = launch(argv, tmp_path, "nothing", "nothing")
    rule = "GRADIENT_ACCUMULATION_STEPS a multiple of 2, training examples of 4"
    for text in said:
        assert text.splitlines()[-1] == f"2 processes: make {rule}, held-out ones of 2"
    assert ends == [1, 1] and files(output) == before


def test_held_out_batches_need_not_be_as_many_as_the_processes(lines, tmp_path):
    """Six rows are three batches: what comes twice is not counted."""
    flags = [*lines(tmp_path, train=4, evaluation=6), "--lora_dropout", "0", "--num_samples", "0"]
    ends, said = launch(command(flags, tmp_path / "two"), tmp_path, "nothing", "nothing")
    assert ends == [0, 0], said
    t.main(command(flags, tmp_path / "one"))
    found, expected = (record(tmp_path / name)["loss_history"] for name in ("two", "one"))
    assert found[0]["eval_loss"] == pytest.approx(expected[0]["eval_loss"], rel=1e-5)


def test_accelerate_launch_gives_the_same_bytes_and_its_settings_change_nothing(
    even, whole_of_two, tmp_path
):
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += [
        "--main_process_port",
        free_port(),
        "--num_machines",
        "1",
        "--mixed_precision",
        "bf16",
        "--dynamo_backend",
        "eager",
    ]
    argv = [*launcher, "train_lora_single.py", *command(even, tmp_path, "--num_samples", 0)]
    environment = os.environ | LOOPBACK
    done = subprocess.run(
        [sys.executable, *argv], capture_output=True, env=environment, timeout=180
    )
    assert done.returncode == 0, done.stderr.decode()
    assert adapter(tmp_path) == adapter(whole_of_two[0])
