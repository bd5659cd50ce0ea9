"""Interrupted runs: what is saved, how the same command goes on, and what is never mixed or overwritten."""

import errno
import fcntl
import gc
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft.peft_model
import pytest
import torch
import transformers
import trl
from safetensors import SafetensorError, safe_open

import train_lora_single as t

STEPS = 8  # two epochs of four
ADAPTER = "final_lora/adapter_model.safetensors"
RESULTS = ("final_lora", "final_lora_vllm", "samples.md", "loss.png")

# Processes to be killed are forked from one that has done the imports, which take longer than a run.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["trl.trainer.sft_trainer", "transformers.models.qwen3_5.modeling_qwen3_5", "datasets"])


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Write a placeholder for loss.png: drawing would be a good part of a run's time."""
    monkeypatch.setattr(t, "draw_losses", lambda history, path, *_: path.write_bytes(b"new"))


def job(folder, train=13, evaluation=4):
    """Return flags for a demo on the shortest lines of the data, two epochs, a checkpoint every three steps."""
    flags = ["--demo", "--num_epochs", "2", "--logging_steps", "1", "--save_steps", "3", "--num_samples", "1"]
    flags += ["--max_new_tokens", "3"]
    for name, lines in (("train", train), ("eval", evaluation)):
        text = sorted(Path("data", f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True), key=len)
        (folder / f"{name}.jsonl").write_text("".join(text[:lines]), encoding="utf-8")
        flags += [f"--{name}_file", str(folder / f"{name}.jsonl")]
    return flags


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags for 13 training and 4 eval lines, so two epochs of four steps."""
    return job(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    """Return the output of a run that was not interrupted."""
    output = tmp_path_factory.mktemp("whole")
    t.main([*flags, "--output_dir", str(output)])
    gc.freeze()  # each run collects garbage: what the imports made need not be looked through a hundred times
    yield output
    gc.unfreeze()


@pytest.fixture(scope="module")
def whole(finished):
    """Return the adapter's bytes and the losses of a run that was not interrupted."""
    return adapter(finished), losses(finished)


@pytest.fixture(scope="module")
def interrupted(flags, tmp_path_factory):
    """Return the output of a run interrupted at step 7, with checkpoints of the steps 4, 6 and 7."""
    output = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert status([*flags, "--output_dir", str(output)]) == 130
    assert complete(output) == [4, 6, 7]
    return output


@pytest.fixture
def stopped(interrupted, tmp_path):
    """Return a copy of the interrupted run's output, in which an older run's results stand."""
    output = shutil.copytree(interrupted, tmp_path / "output")
    older = [output / ADAPTER, output / "final_lora_vllm" / "adapter_model.safetensors"]
    for path in [*older, output / "samples.md", output / "loss.png"]:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"old")
    return output


def adapter(output):
    """Return the bytes of the adapter in output."""
    return Path(output, ADAPTER).read_bytes()


def record(output):
    """Return what output/run.json holds."""
    return json.loads(Path(output, "run.json").read_text(encoding="utf-8"))


def losses(output):
    """Return (step, loss) and (step, eval loss) of a run, in order."""
    history = record(output)["loss_history"]
    return [(e["step"], e[key]) for e in history for key in ("loss", "eval_loss") if key in e]


def files(folder):
    """Return the bytes of each file in folder, but for the log, to which each run adds."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != "all_logs.log"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def status(argv):
    """Return the status with which the command ends when it fails or is stopped."""
    with pytest.raises(SystemExit) as stop:
        t.main(argv)
    return stop.value.code


def complete(output):
    """Return the steps of the checkpoints in output that are complete."""
    return sorted(int(path.parent.name.split("-")[1]) for path in Path(output).glob("checkpoints/*/complete.json"))


def assert_goes_on(flags, output, whole, capfd, step=None):
    """Run the command; it goes on after step, or starts anew, and ends as the run that was not interrupted."""
    capfd.readouterr()
    t.main([*flags, "--output_dir", str(output)])
    text = capfd.readouterr()
    assert ("resume   from" in text.out) == bool(step) and "Traceback" not in text.err
    assert not step or f"resume   from {output}/checkpoints/checkpoint-{step}, {step} steps are done" in text.out
    assert adapter(output) == whole[0]
    assert losses(output) == whole[1]
    assert record(output)["outcome"] == "finished"
    assert not (output / "partial").exists() and not (output / "checkpoints" / "job.json").exists()


def at_step(monkeypatch, number, action):
    """Do action within training step number (two batches each, but for the last of an epoch)."""
    step, calls = transformers.Trainer.training_step, []

    def training_step(self, *args, **kwargs):
        if self.state.global_step == number - 1 and not calls:
            calls.append(action())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)


def before(monkeypatch, owner, name, action, when=lambda *_, **__: True):
    """Do action(*arguments) before the first call of owner.name for whose arguments when() is true."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        if when(*args, **kwargs) and not calls:
            calls.append(None)
            action(*args)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, staticmethod(call) if isinstance(vars(owner).get(name), staticmethod) else call)


# ---- Ctrl-C and SIGTERM ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "sent"), [*((number, signal.SIGINT) for number in range(1, STEPS + 1)), (5, signal.SIGTERM)]
)
def test_after_a_signal_the_same_command_ends_with_the_same_bytes(
    flags, whole, tmp_path, monkeypatch, capfd, number, sent
):
    with monkeypatch.context() as patch:
        at_step(patch, number, lambda: os.kill(os.getpid(), sent))
        assert status([*flags, "--output_dir", str(tmp_path)]) == 128 + sent
    text = capfd.readouterr().err
    said = f"stopped at step {number} of 8; the same command goes on from {tmp_path}/checkpoints/checkpoint-{number}"
    assert said in text and "Traceback" not in text
    assert not (tmp_path / "final_lora").exists()
    assert complete(tmp_path)[-1] == number
    assert record(tmp_path)["outcome"] == f"interrupted: {said}"
    assert_goes_on(flags, tmp_path, whole, capfd, number)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_data_is_read_leaves_nothing(flags, tmp_path, monkeypatch, capfd, sent):
    before(monkeypatch, t, "parse_line", lambda *_: os.kill(os.getpid(), sent))
    assert status([*flags, "--output_dir", str(tmp_path)]) == 128 + sent
    assert [path.name for path in tmp_path.iterdir()] == ["all_logs.log"]
    assert "stopped" in (text := capfd.readouterr().err) and "Traceback" not in text


def test_ctrl_c_before_the_first_step_leaves_nothing_to_go_on_from(flags, whole, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        before(patch, trl.SFTTrainer, "prediction_step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert status([*flags, "--output_dir", str(tmp_path)]) == 130
    assert "stopped before the first step" in (text := capfd.readouterr().err) and "Traceback" not in text
    assert record(tmp_path)["outcome"].startswith("interrupted: stopped before the first step")
    assert not complete(tmp_path) and not (tmp_path / "final_lora").exists()
    assert_goes_on(flags, tmp_path, whole, capfd)


MOMENTS = {
    "loading": (transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **k: "use_safetensors" in k, 7),
    "the last evaluation": (trl.SFTTrainer, "prediction_step", lambda self, *_, **__: self.state.global_step == 8, 8),
    "the proof": (t, "prove", lambda *_: True, 8),
    "generation": (transformers.GenerationMixin, "generate", lambda *_, **__: True, 8),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_outside_the_steps_loses_nothing(flags, whole, stopped, monkeypatch, capfd, moment):
    owner, name, when, step = MOMENTS[moment]
    with monkeypatch.context() as patch:
        before(patch, owner, name, lambda *_: os.kill(os.getpid(), signal.SIGINT), when)
        assert status([*flags, "--output_dir", str(stopped)]) == 130
    assert "the same command goes on from" in (text := capfd.readouterr().err) and "Traceback" not in text
    assert record(stopped)["outcome"].startswith("interrupted: stopped")
    assert adapter(stopped) == b"old"
    assert complete(stopped)[-1] == step
    assert_goes_on(flags, stopped, whole, capfd, step)


def test_ctrl_c_in_an_epochs_evaluation_stops_after_the_next_step(flags, whole, tmp_path, monkeypatch, capfd):
    def in_it(self, *_, **__):
        return self.state.global_step == 4

    with monkeypatch.context() as patch:
        before(patch, trl.SFTTrainer, "prediction_step", lambda *_: os.kill(os.getpid(), signal.SIGINT), in_it)
        assert status([*flags, "--output_dir", str(tmp_path)]) == 130
    assert complete(tmp_path) == [4, 5]
    assert_goes_on(flags, tmp_path, whole, capfd, 5)


def test_ctrl_c_again_while_run_json_is_written_is_no_traceback(flags, stopped, tmp_path):
    argv = [*flags, "--output_dir", str(stopped)]
    process = FORKS.Process(target=run_interrupted_twice, args=(argv, str(tmp_path / "err")))
    process.start()
    process.join(120)
    assert process.exitcode in (130, -signal.SIGINT)
    assert "Traceback" not in (tmp_path / "err").read_text(encoding="utf-8")
    assert record(stopped)["outcome"]


def run_interrupted_twice(argv, errors):
    """Run argv, with SIGINT while the data is read, or in step 8, and again when run.json is written after it."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    patch = pytest.MonkeyPatch()
    at_step(patch, 8, lambda: os.kill(os.getpid(), signal.SIGINT))
    before(
        patch,
        t,
        "write_record",
        lambda *_: os.kill(os.getpid(), signal.SIGINT),
        lambda _, r: r["outcome"] != "running",
    )
    t.main(argv)


def test_a_second_ctrl_c_stops_at_once_and_the_same_command_goes_on(tmp_path, capfd):
    flags = [*job(tmp_path, train=80), "--eval_file", "", "--save_steps", "1", "--gradient_accumulation_steps", "40"]
    flags, output, errors = [*flags, "--output_dir", str(tmp_path / "output")], tmp_path / "output", tmp_path / "err"

    def wait_for(condition):
        until = time.monotonic() + 120
        while not condition() and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)

    with open(errors, "wb") as err, open(os.devnull, "wb") as null:
        process = subprocess.Popen([sys.executable, "train_lora_single.py", *flags], stdout=null, stderr=err)
    wait_for((output / "checkpoints" / "checkpoint-1" / "complete.json").exists)  # one of two steps of seconds each
    process.send_signal(signal.SIGINT)
    wait_for(lambda: b"stopping" in errors.read_bytes())
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == -signal.SIGINT
    assert "Traceback" not in errors.read_text(encoding="utf-8")
    assert complete(output) == [1]  # step 2 was neither finished nor saved
    t.main(flags)
    assert f"resume   from {output}/checkpoints/checkpoint-1, 1 steps are done" in capfd.readouterr().out
    assert [step for step, _ in losses(output)] == [1, 2]


# ---- killed ---------------------------------------------------------------------------------------------------------


def die(*_, **__):
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_a_step(patch):
    at_step(patch, 8, die)


def in_an_epochs_evaluation(patch):
    before(patch, trl.SFTTrainer, "prediction_step", die, lambda self, *_, **__: self.state.global_step == 8)


def while_the_optimizer_is_written(patch):
    save = torch.save

    def cut(thing, path, *args, **kwargs):
        save(thing, path, *args, **kwargs)
        if str(path).endswith("checkpoint-8/optimizer.pt"):
            os.truncate(path, 1000)
            die()

    patch.setattr(torch, "save", cut)


def while_the_random_state_is_written(patch):
    patch.setattr(transformers.Trainer, "_save_rng_state", die)


def before_complete_json(patch):
    before(patch, Path, "write_text", die, lambda path, *_, **__: path.name == "complete.json")


def while_complete_json_is_written(patch):
    def cut(path, text, *_):
        os.write(os.open(path, os.O_WRONLY | os.O_CREAT), text[:20].encode())
        die()

    before(patch, Path, "write_text", cut, lambda path, *_, **__: path.name.startswith("complete.json"))


def in_the_proof(patch):
    patch.setattr(t, "prove", die)


def in_generation(patch):
    patch.setattr(transformers.GenerationMixin, "generate", die)


def while_an_older_result_is_set_aside(patch):
    before(
        patch, Path, "rename", die, lambda path, *_: path.name == "final_lora_vllm" and path.parent.name != "partial"
    )


def between_two_results(patch):
    moved = []
    before(
        patch, Path, "rename", die, lambda path, *_: path.parent.name == "partial" and (moved.append(1) or moved[1:])
    )


def before_run_json_says_finished(patch):
    before(patch, t, "write_record", die, lambda _, record: record["outcome"] == "finished")


def run_and_die(argv, moment):
    """Run argv in this process, which kills itself at the moment."""
    moment(pytest.MonkeyPatch())
    t.main(argv)


@pytest.mark.parametrize(
    ("moment", "step"),
    [
        (in_a_step, 7),
        (in_an_epochs_evaluation, 7),
        (while_the_optimizer_is_written, 7),
        (while_the_random_state_is_written, 7),
        (before_complete_json, 7),
        (while_complete_json_is_written, 7),
        (in_the_proof, 8),
        (in_generation, 8),
        (while_an_older_result_is_set_aside, 8),
        (between_two_results, 8),
    ],
)
def test_after_sigkill_the_same_command_ends_with_the_same_bytes(flags, whole, stopped, capfd, moment, step):
    process = FORKS.Process(target=run_and_die, args=([*flags, "--output_dir", str(stopped)], moment))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert record(stopped)["outcome"] == "running"
    assert_goes_on(flags, stopped, whole, capfd, step)
    for name in RESULTS:  # what stood there before is under a time stamp
        kept = [*stopped.glob(f"{name}.2*")]
        assert b"old" in [path.read_bytes() for path in kept if path.is_file()] + [
            (path / "adapter_model.safetensors").read_bytes() for path in kept if path.is_dir()
        ]


def test_killed_at_the_very_end_the_results_are_whole(flags, whole, stopped):
    process = FORKS.Process(
        target=run_and_die, args=([*flags, "--output_dir", str(stopped)], before_run_json_says_finished)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert adapter(stopped) == whole[0]
    assert {path.name for path in stopped.iterdir()} >= {*RESULTS} and not (stopped / "partial").exists()


def test_two_runs_into_two_folders_do_not_disturb_each_other(flags, whole, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    processes = [FORKS.Process(target=t.main, args=([*flags, "--output_dir", str(folder)],)) for folder in folders]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [(process.exitcode, adapter(folder)) for process, folder in zip(processes, folders, strict=True)] == [
        (0, whole[0])
    ] * 2


# ---- broken checkpoints ---------------------------------------------------------------------------------------------


NAMES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
NAMES = (*NAMES, "trainer_state.json", "training_args.bin", "tokenizer.json")


@pytest.mark.parametrize("name", [*NAMES, "complete.json"])
def test_a_checkpoint_with_a_file_cut_or_missing_is_passed_over(flags, interrupted, tmp_path, name):
    output = shutil.copytree(interrupted, tmp_path / "output")
    args = t.parse_args([*flags, "--output_dir", str(output)])
    facts = {
        path: {"sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
        for path in (args.train_file, args.eval_file)
    }
    newest = output / "checkpoints" / "checkpoint-7"
    assert t.find_checkpoint(args, facts) == newest
    data = (newest / name).read_bytes()
    for broken in (data[:-1], data[: len(data) // 2], bytes(len(data)), b"", None):
        (newest / name).write_bytes(broken) if broken is not None else (newest / name).unlink()
        assert t.find_checkpoint(args, facts) == newest.with_name("checkpoint-6")
    (newest / name).write_bytes(data)
    assert t.find_checkpoint(args, facts) == newest


@pytest.mark.parametrize(("broken", "step"), [([7], 6), ([6, 7], 4), ([4, 6, 7], None)])
def test_past_broken_checkpoints_it_goes_on_from_the_newest_complete_one(flags, whole, stopped, capfd, broken, step):
    for number, name in zip(broken, ("optimizer.pt", "adapter_model.safetensors", "rng_state.pth"), strict=False):
        os.truncate(stopped / "checkpoints" / f"checkpoint-{number}" / name, 100)
    before = files(stopped / "checkpoints")
    assert_goes_on(flags, stopped, whole, capfd, step)
    if not step:
        (aside,) = stopped.glob("checkpoints.2*")
        assert files(aside) == before


# ---- the same command, resumed or not, gives the same bytes ---------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "number"),
    [(["--dtype", "bfloat16"], 5), (["--eval_file", "", "--lora_dropout", "0.3"], 4), (["--batch_size", "3"], 2)],
)
def test_in_other_settings_too_resumed_equals_uninterrupted(flags, tmp_path, monkeypatch, capfd, change, number):
    flags = [*flags, *change]
    t.main([*flags, "--output_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        at_step(patch, number, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert status([*flags, "--output_dir", str(tmp_path / "cut")]) == 130
    expected = adapter(tmp_path / "whole"), losses(tmp_path / "whole")
    assert_goes_on(flags, tmp_path / "cut", expected, capfd, number)


def test_after_a_finished_run_the_same_command_trains_all_steps_anew(flags, whole, finished, tmp_path, capfd):
    output = shutil.copytree(finished, tmp_path / "output")
    old = files(output)
    assert_goes_on(flags, output, whole, capfd)
    assert record(output)["resumed_from"] is None
    (aside,) = output.glob("checkpoints.2*")
    assert files(aside) == {
        name.removeprefix("checkpoints/"): data for name, data in old.items() if name.startswith("checkpoints/")
    }


def test_resume_never_starts_anew_and_keeps_the_old_checkpoints(flags, whole, stopped, capfd):
    old, log = files(stopped / "checkpoints"), (stopped / "run.json").read_bytes()
    assert_goes_on([*flags, "--resume", "never"], stopped, whole, capfd)
    (aside,), (run,) = stopped.glob("checkpoints.2*"), stopped.glob("run.json.2*")
    assert files(aside) == old and run.read_bytes() == log


# ---- another job ----------------------------------------------------------------------------------------------------

ANOTHER = {
    "LORA_R": 4, "LORA_ALPHA": 32, "LORA_DROPOUT": 0.1, "LORA_TARGET_MODULES": "q_proj", "MAX_SEQ_LEN": 1000,
    "NUM_EPOCHS": 3, "BATCH_SIZE": 1, "GRADIENT_ACCUMULATION_STEPS": 1, "LEARNING_RATE": 0.02,
    "LR_SCHEDULER_TYPE": "linear", "WARMUP_RATIO": 0.1, "SEED": 7, "DTYPE": "bfloat16", "MODEL_REVISION": "v2",
}  # fmt: skip


def assert_refused(flags, changed, output, interrupted, capfd):
    """Run the changed command; it is refused, names what differs with both values and leaves the run as it was."""
    capfd.readouterr()
    assert status([*flags, "--output_dir", str(output)]) == 1
    text = capfd.readouterr().err
    rows = [line.split()[0] for line in text.splitlines() if re.match(r"  [A-Z_]+ ", line)]
    assert rows == [*changed]
    for name, (old, new) in changed.items():
        assert re.search(rf"^  {name} +{re.escape(str(old))} +{re.escape(str(new))}$", text, re.MULTILINE), text
    assert "set these back to go on" in text and "--resume never to start anew" in text and "Traceback" not in text
    assert files(output) == files(interrupted)


@pytest.mark.parametrize("name", ANOTHER)
def test_another_value_is_refused_and_the_interrupted_run_left_as_it_was(flags, interrupted, tmp_path, capfd, name):
    output, old = shutil.copytree(interrupted, tmp_path / "output"), vars(t.parse_args(flags))[name.lower()]
    new = ["q_proj"] if name == "LORA_TARGET_MODULES" else ANOTHER[name]
    change = [f"--{name.lower()}", str(ANOTHER[name])]
    assert_refused([*flags, *change], {name: (old, new)}, output, interrupted, capfd)


def test_another_model_or_data_is_refused_and_the_interrupted_run_left_as_it_was(
    flags, interrupted, tiny, tmp_path, capfd
):
    output, args = shutil.copytree(interrupted, tmp_path / "output"), t.parse_args(flags)
    model = shutil.copytree(tiny, tmp_path / "model")
    changed = {"MODEL_NAME": ("tests/tiny-qwen3.5", model)}
    assert_refused([*flags, "--model_name", str(model)], changed, output, interrupted, capfd)
    for name in ("TRAIN_FILE", "EVAL_FILE"):
        data = bytearray(Path(vars(args)[name.lower()]).read_bytes())
        old, at = hashlib.sha256(data).hexdigest()[:16], data.rindex(b".")
        data[at : at + 1] = b"!"
        (tmp_path / "data.jsonl").write_bytes(data)
        changed = {name: (old, hashlib.sha256(data).hexdigest()[:16])}
        change = [f"--{name.lower()}", str(tmp_path / "data.jsonl")]
        assert_refused([*flags, *change], changed, output, interrupted, capfd)
    assert_refused([*flags, "--eval_file", ""], {"EVAL_FILE": (old, "")}, output, interrupted, capfd)


def test_other_output_settings_and_moved_data_files_are_the_same_job(flags, whole, stopped, tmp_path, capfd):
    args = t.parse_args(flags)
    for name in ("train_file", "eval_file"):
        shutil.copy(vars(args)[name], tmp_path / name)
        flags = [*flags, f"--{name}", str(tmp_path / name)]
    flags = [*flags, "--logging_steps", "5", "--save_steps", "1", "--num_samples", "2", "--max_new_tokens", "1"]
    assert_goes_on(flags, stopped, whole, capfd, 7)


# ---- what checkpoints are kept, and what they hold ------------------------------------------------------------------


def test_the_two_newest_checkpoints_stay_and_one_for_each_epoch(flags, tmp_path, monkeypatch):
    sets, rmtree = [], shutil.rmtree

    def removed(path, *args, **kwargs):
        rmtree(path, *args, **kwargs)
        sets.append((Path(path).name, complete(tmp_path)))

    monkeypatch.setattr(shutil, "rmtree", removed)
    t.main([*flags, "--output_dir", str(tmp_path), "--save_steps", "1"])
    kept = [(1, [2, 3]), (2, [3, 4]), (3, [4, 5]), (5, [4, 6, 7]), (6, [4, 7, 8])]
    assert [(name, left) for name, left in sets if name != "partial"] == [
        (f"checkpoint-{step}", left) for step, left in kept
    ]
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")) == [
        "checkpoint-4", "checkpoint-7", "checkpoint-8"
    ]  # fmt: skip


def test_a_checkpoint_holds_all_it_needs_and_no_base_weights(finished, tiny):
    with safe_open(Path(tiny, "model.safetensors"), "pt") as base:
        largest = max(base.get_tensor(name).nbytes for name in base.keys())  # noqa: SIM118
    for step in (4, 6, 8):
        folder = finished / "checkpoints" / f"checkpoint-{step}"
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt"} <= names
        assert {"rng_state.pth", "trainer_state.json", "complete.json"} <= names
        assert [path.name for path in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
        with safe_open(folder / "adapter_model.safetensors", "pt") as saved:
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
        size = sum(tensor.nbytes for tensor in tensors.values())
        rest = (
            sum(path.stat().st_size for path in folder.iterdir() if not path.name.startswith("tokenizer")) - 3 * size
        )
        assert 0 < rest < largest  # beside the adapter and its two moments there is no room for the base


def test_the_plans_disk_figure_is_enough_for_a_runs_peak(flags, tmp_path, monkeypatch, capfd):
    sizes, rmtree = [], shutil.rmtree

    def used():
        """Return what the output takes without tokenizers, for which the plan allows 25 MB each."""
        return sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file() and "token" not in path.name)

    def remove(*args, **kwargs):
        sizes.append(used())  # the most: an old checkpoint goes when a new one is written
        rmtree(*args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", remove)
    t.main([*flags, "--output_dir", str(tmp_path), "--lora_r", "512", "--save_steps", "1"])
    plan = record(tmp_path)["plan"]
    shown = int(re.search(r"at most ([\d,]+) MB of disk", capfd.readouterr().out)[1].replace(",", ""))
    assert shown == round(plan["disk"] / 1e6)
    tokenizers = 25_000_000 * (2 + 5)
    assert plan["disk"] - tokenizers >= max(*sizes, used()) > 4 * 12 * plan["trainable"]


# ---- a full disk ----------------------------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_safetensors(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_in_torch(thing, path, *_, **__):
    Path(path).write_bytes(b"PK")
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")


def full_after_opening(path, *_, **__):
    path.open("w").close()  # a full disk has room for a name, but for no byte
    full()


def fail_at(patch, owner, name, action, when):
    """Have owner.name do action instead of its work when the arguments are such."""
    real = getattr(owner, name)
    patch.setattr(owner, name, lambda *a, **k: action(*a, **k) if when(*a, **k) else real(*a, **k))


def path_ends_with(name):
    return lambda *args, **_: any(str(one).endswith(name) for one in args)


IN_A_CHECKPOINT = {
    "the adapter": (
        peft.peft_model,
        "safe_save_file",
        full_in_safetensors,
        path_ends_with("adapter_model.safetensors"),
    ),
    "the optimizer": (torch, "save", full_in_torch, path_ends_with("optimizer.pt")),
    "the random state": (torch, "save", full, path_ends_with("rng_state.pth")),
    "complete.json": (Path, "write_text", full_after_opening, path_ends_with("complete.json")),
}


@pytest.mark.parametrize("part", IN_A_CHECKPOINT)
def test_a_disk_full_at_a_checkpoint_is_one_message_and_loses_nothing(flags, whole, stopped, monkeypatch, capfd, part):
    with monkeypatch.context() as patch:
        fail_at(patch, *IN_A_CHECKPOINT[part])
        assert status([*flags, "--output_dir", str(stopped)]) == 1
    text = capfd.readouterr().err
    assert f"OUTPUT_DIR {stopped}: checkpoint 8 could not be written" in text and "Traceback" not in text
    assert "make room" in text
    assert record(stopped)["outcome"].startswith(f"failed: OUTPUT_DIR {stopped}: checkpoint 8 could not be written")
    assert {4, 6, 7} <= {*complete(stopped)} and adapter(stopped) == b"old"
    assert_goes_on(flags, stopped, whole, capfd, 7)


@pytest.mark.parametrize("error", [KeyError("a bug"), RuntimeError("CUDA error: an illegal memory access")])
def test_a_bug_at_a_checkpoint_is_not_called_a_full_disk(flags, stopped, monkeypatch, error):
    def bug(*_, **__):
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error), match=str(error.args[0])):
        fail_at(patch, torch, "save", bug, path_ends_with("optimizer.pt"))
        t.main([*flags, "--output_dir", str(stopped)])
    assert f"failed: {type(error).__name__}" in record(stopped)["outcome"] and {4, 6, 7} <= {*complete(stopped)}


IN_THE_RESULTS = {
    "the adapter": (peft.peft_model, "safe_save_file", full_in_safetensors, path_ends_with("/partial/final_lora/")),
    "the samples": (Path, "write_text", full_after_opening, path_ends_with("samples.md")),
    "the picture": (t, "draw_losses", full, lambda *_: True),
    "the card": (Path, "write_text", full_after_opening, path_ends_with("/final_lora/README.md")),
}


@pytest.fixture(scope="module")
def trained(flags, interrupted, tmp_path_factory):
    """Return the output of a run stopped after its last step, before it wrote results."""
    output = shutil.copytree(interrupted, tmp_path_factory.mktemp("trained") / "output")
    with pytest.MonkeyPatch.context() as patch:
        before(patch, t, "write_results", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert status([*flags, "--output_dir", str(output)]) == 130
    return output


@pytest.mark.parametrize("part", IN_THE_RESULTS)
def test_a_disk_full_at_the_results_is_one_message_and_leaves_the_older_ones(
    flags, whole, trained, finished, tmp_path, monkeypatch, capfd, part
):
    output = shutil.copytree(trained, tmp_path / "output")
    for name in RESULTS:
        (shutil.copytree if (finished / name).is_dir() else shutil.copy)(finished / name, output / name)
    (output / "samples.md").write_text("old")
    old = {name: data for name, data in files(output).items() if name != "run.json"}
    with monkeypatch.context() as patch:
        owner, name, action, when = IN_THE_RESULTS[part]
        fail_at(patch, owner, name, action, (lambda *a, **_: "partial" in str(a)) if part == "the adapter" else when)
        assert status([*flags, "--output_dir", str(output)]) == 1
    text = capfd.readouterr().err
    assert f"OUTPUT_DIR {output}: the results cannot be written" in text and "Traceback" not in text
    assert "No space left on device" in text
    assert record(output)["outcome"].startswith(f"failed: OUTPUT_DIR {output}: the results cannot be written")
    assert {name: data for name, data in files(output).items() if name != "run.json"} == old
    assert not [*output.glob("*.2*")] and not (output / "partial").exists()
    assert_goes_on(flags, output, whole, capfd, 8)


@pytest.fixture
def small_disk(tmp_path):
    """Return a file system of 400 MB on which a test may fill all room; it needs the right to mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=400m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(folder, room):
    """Leave only so many bytes on folder's file system."""
    with open(folder / "room", "wb", 0) as kept, open(folder / "filler", "wb", 0) as filler:
        kept.write(bytes(room))
        for size in (2**22, 1):
            with pytest.raises(OSError, match="No space left"):
                while True:
                    filler.write(bytes(size))
    (folder / "room").unlink()


# None of these bytes is enough for a checkpoint or the results: the adapter takes 125 kB, the tokenizer the same.
@pytest.mark.parametrize("room", [0, 100_000, 200_000, 300_000])
@pytest.mark.parametrize("moment", ["a checkpoint", "the results"])
def test_on_a_disk_that_is_really_full_nothing_is_lost(
    flags, whole, interrupted, small_disk, monkeypatch, capfd, moment, room
):
    output = shutil.copytree(interrupted, small_disk / "output")
    (output / "final_lora").mkdir()
    (output / ADAPTER).write_bytes(b"old")
    with monkeypatch.context() as patch:
        if moment == "a checkpoint":
            at_step(patch, 8, lambda: fill(small_disk, room))
        else:
            before(patch, t, "write_results", lambda *_: fill(small_disk, room))
        assert status([*flags, "--output_dir", str(output)]) == 1
    text = capfd.readouterr().err
    what = "checkpoint 8 could not be written" if moment == "a checkpoint" else "the results cannot be written"
    assert f"OUTPUT_DIR {output}: {what}" in text and "Traceback" not in text
    assert record(output)["outcome"].startswith(f"failed: OUTPUT_DIR {output}: {what}" if room else "running")
    assert adapter(output) == b"old"
    (small_disk / "filler").unlink()
    assert_goes_on(flags, output, whole, capfd, 7 if moment == "a checkpoint" else 8)


# ---- one run at a time ----------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_at_the_start_is_one_message(flags, tmp_path):
    (tmp_path / "all_logs.log").symlink_to("/dev/full")
    assert status([*flags, "--output_dir", str(tmp_path)]).startswith(
        f"OUTPUT_DIR {tmp_path}: No space left on device"
    )


def test_a_second_run_into_the_same_folder_is_refused_at_once(flags, interrupted, tmp_path, monkeypatch):
    output = shutil.copytree(interrupted, tmp_path / "output")
    log, read = output / "all_logs.log", []
    monkeypatch.setattr(t, "read_examples", read.append)
    with open(log, "a", encoding="utf-8") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        text = log.read_bytes()
        said = status([*flags, "--output_dir", str(output)])
    assert said.startswith(f"OUTPUT_DIR {output}: another run writes there")  # a text, so the status is 1
    assert log.read_bytes() == text and files(output) == files(interrupted) and not read
