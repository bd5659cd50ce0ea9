"""Checkpoints, signals, kills, other jobs in the same folder, finished jobs, several processes."""

import contextlib
import errno
import logging
import os
import re
import resource
import shutil
import signal
import sys
import time
import types
from dataclasses import make_dataclass
from pathlib import Path
from unittest import mock

import accelerate
import peft
import pytest
import runs
import torch
from conftest import TOY
from safetensors.torch import load_file, save_file
from toys import GEMMA4, edit_json, model_of

import train_lora_single as t


def losses(output):
    """Return (step, key, loss) of all training and held-out losses, in order."""
    history = runs.history(output)
    return [(e["step"], key, e[key]) for e in history for key in ("loss", "eval_loss") if key in e]


@pytest.fixture(scope="module")
def whole(finished):
    """Return the adapter's bytes and the losses of a run that nothing interrupted."""
    return (finished.output / runs.ADAPTER).read_bytes(), losses(finished.output)


@pytest.fixture
def output(stopped, tmp_path):
    """Return a copy of what the run left that was stopped after step 7."""
    return shutil.copytree(stopped.output, tmp_path / "output")


def into(output, run):
    """Return the command of a shared run, into this folder."""
    return [*run.flags, "--output_dir", output]


def steps_done(argv):
    """Give the command, which must succeed; return how many steps it trains."""
    real = t.LoraTrainer.training_step
    with mock.patch.object(t.LoraTrainer, "training_step", autospec=True, side_effect=real) as step:
        assert runs.run(argv) == 0
    return step.call_count


def go_on(argv, whole):
    """End as the run that nothing interrupted; return the step that was resumed from."""
    done, output = steps_done(argv), Path(argv[-1])
    assert (output / runs.ADAPTER).read_bytes() == whole[0]
    assert losses(output) == whole[1]
    assert runs.read_record(output)["outcome"] == "finished"
    assert not [*output.rglob("*.new")] and not (output / ".partial").exists()
    return 8 - done


def folder_of(output, step):
    """Return the folder of a checkpoint."""
    (path,) = output.glob(f"checkpoints/*/checkpoint-{step}")
    return path


def die(*_, **__):
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_saved(patch, step, action):
    """Do action(thing, path) before torch writes the optimizer's state of a step."""
    is_due = lambda _, path, **__: str(path).endswith(f"-{step}/optimizer.pt")  # noqa: E731
    runs.before(patch, torch, "save", action, when=is_due)


def at_evaluation(patch, step, action):
    """Do action in the first pass of the evaluation after a step; return a list of its passes."""
    passes = []

    def watch(trainer):
        def look(model, *_):
            if not model.training and trainer.state.global_step == step:
                passes.append(None)
                if len(passes) == 1:
                    action()

        trainer.model.register_forward_pre_hook(look)

    runs.on_trainer(patch, watch)
    return passes


def at_rename(patch, action):
    """Do action once, before something gets the name final_lora."""
    is_due = lambda _, new: Path(new).name == "final_lora"  # noqa: E731
    runs.before(patch, Path, "rename", action, when=is_due)


STOPS = [  # what happens, and the newest step that is saved then
    ("SIGINT in step 2", lambda p: runs.at_step(p, 2, runs.send(signal.SIGINT)), 2),
    ("SIGTERM in an epoch's last step", lambda p: runs.at_step(p, 2, runs.send(signal.SIGTERM)), 4),
    ("SIGHUP in what was left out", lambda p: at_evaluation(p, 4, runs.send(signal.SIGHUP)), 4),
    ("SIGUSR1 in a checkpoint", lambda p: at_saved(p, 6, runs.send(signal.SIGUSR1)), 6),
]


def test_after_signals_it_ends_in_the_same_bytes(finished, whole, tmp_path, monkeypatch, capfd):
    argv = into(tmp_path, finished)
    for what, action, step in STOPS:
        with monkeypatch.context() as patch:
            action(patch)
            end = runs.command(capfd, argv)
        assert end.status == 128 + signal.Signals[what.split()[0]], (what, end.err)
        assert "Traceback" not in end.err, what
        assert runs.read_record(tmp_path)["outcome"].startswith("interrupted: "), what
        assert runs.checkpoints(tmp_path)[-1] == step, what
        assert [entry for entry in whole[1] if entry in losses(tmp_path)] == losses(tmp_path)
        assert not (tmp_path / "final_lora").exists(), what
    with monkeypatch.context() as patch:  # while it is verified
        runs.before(patch, peft.PeftModel, "from_pretrained", runs.send(signal.SIGTERM))
        assert runs.run(argv) == 143
    assert not (tmp_path / "final_lora").exists()
    assert go_on(argv, whole) == 8


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM)], ids=len)
def test_signals_in_the_move_of_final_lora_leave_it_whole(
    numbers, finished, stopped, output, whole, monkeypatch
):
    """An older final_lora has been renamed by then."""
    shutil.rmtree(output / "final_lora")
    shutil.copytree(finished.output / "final_lora", output / "final_lora")
    (output / runs.ADAPTER).write_bytes(b"old")
    with monkeypatch.context() as patch:
        at_rename(patch, runs.send(*numbers))
        assert runs.run(into(output, stopped)) == 143
    assert (output / runs.ADAPTER).read_bytes() == whole[0]
    assert runs.read_record(output)["outcome"] == "finished"
    left = runs.files(output)
    assert runs.run(into(output, stopped)) == 0 and runs.files(output) == left


def test_an_evaluation_stops_between_two_batches_and_is_made_up_for(tmp_path, monkeypatch):
    """A queue may kill the run half a minute later, so the step is saved before."""
    flags = [*runs.short_flags(tmp_path, train=3, held_out=40), "--num_epochs", "1"]
    output = tmp_path / "output"
    with monkeypatch.context() as patch:
        passes = at_evaluation(patch, 1, runs.send(signal.SIGTERM))
        assert runs.run(flags) == 143
    assert len(passes) == 1 and runs.checkpoints(output) == [1]
    assert [step for step, key, _ in losses(output) if key == "eval_loss"] == [0]
    assert steps_done(flags) == 0
    assert [step for step, key, _ in losses(output) if key == "eval_loss"] == [0, 1]


interrupt = runs.send(signal.SIGINT)
EARLY = {
    "while the weights are loaded": lambda p: runs.before(p, t, "load_model", interrupt),
    "while the base is evaluated": lambda p: at_evaluation(p, 0, interrupt),
    "twice": lambda p: runs.at_step(p, 1, runs.send(signal.SIGTERM, signal.SIGINT)),
}


@pytest.mark.parametrize("moment", EARLY)
def test_elsewhere_a_signal_stops_at_once(flags, tmp_path, monkeypatch, capfd, moment):
    EARLY[moment](monkeypatch)
    end = runs.command(capfd, flags)
    assert end.status == 130 and "Traceback" not in end.err
    assert runs.read_record(tmp_path / "output")["outcome"].startswith("interrupted: ")
    assert runs.checkpoints(tmp_path / "output") == [] == [*tmp_path.glob("output/final_lora")]


def tear_and_die(_, path, **__):
    Path(path).write_bytes(b"PK")
    die()


def in_the_writing(place):
    """Return what has the kernel kill this process when a file grows to so many bytes."""

    def limit(*_):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (place, place))

    # This is called once, before job.json and then run.json, which is longer, are written.
    return lambda patch: runs.before(patch, accelerate.utils, "broadcast_object_list", limit)


KILLS = {  # when, and whether the checkpoint of step 8 is whole then
    "in a step": (lambda p: runs.at_step(p, 1, die), False),
    "in the writing of job.json": (in_the_writing(300), False),
    "in the writing of run.json": (in_the_writing(2000), False),
    "in an evaluation": (lambda p: at_evaluation(p, 8, die), False),
    "in the writing of a checkpoint": (lambda p: at_saved(p, 8, tear_and_die), False),
    "where final_lora is missing for a moment": (lambda p: at_rename(p, die), True),
}


def test_however_it_is_killed_it_ends_in_the_same_bytes(stopped, output, whole, tmp_path):
    argv, said = into(output, stopped), tmp_path / "said"
    (description,) = output.glob("checkpoints/*/job.json")
    described = description.read_bytes()
    for what, (kill, is_saved) in KILLS.items():
        end = runs.Fork(lambda kill=kill: runs.be_the_script(argv, said, kill)).end()
        assert -end == (signal.SIGXFSZ if ".json" in what else signal.SIGKILL), (what, end)
        assert description.read_bytes() == described, what
        assert runs.read_record(output)["outcome"] == "running", what
        assert losses(output) == [one for one in whole[1] if one[0] <= (8 if is_saved else 7)]
    assert go_on(argv, whole) == 8
    older = {"older.txt": b"of another run"}  # lay in final_lora, and is still there, renamed
    assert older in [runs.files(place) for place in output.glob("final_lora*")]


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """Change bits of some numbers, in the middle of the file."""
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 65):  # more than zip's filling
        data[place] ^= 1
    path.write_bytes(data)


DAMAGE = [
    ("trainer_state.json", cut), ("adapter_model.safetensors", flip), ("optimizer.pt", cut),
    ("optimizer.pt", flip), ("optimizer.pt", Path.unlink), ("scheduler.pt", Path.unlink),
    ("rng_state.pth", flip), ("rng_state.pth", Path.unlink), ("trainer_state.json", Path.unlink),
]  # fmt: skip


def test_a_checkpoint_that_is_not_whole_is_passed_over(stopped, output, whole, monkeypatch, capfd):
    """As after a power cut; neither torch nor safetensors looks at the sums of its files."""
    argv, newest = into(output, stopped), folder_of(output, 7)
    backup = shutil.copytree(newest, newest.with_name("checkpoint-50-backup"))
    for name, spoil in DAMAGE:
        capfd.readouterr()
        spoil(newest / name)
        assert runs.prepared(argv).earlier.checkpoint == folder_of(output, 6), (name, spoil)
        assert str(newest) in capfd.readouterr().out
        shutil.rmtree(newest)
        shutil.copytree(backup, newest)
    assert runs.prepared(argv).earlier.checkpoint == newest
    for step in (6, 7):
        flip(folder_of(output, step) / "optimizer.pt")
    # These do not push out the next one, and one that is written over them is whole.
    for step, done in ((5, 1), (7, 2)):
        with monkeypatch.context() as patch:
            runs.at_step(patch, done, runs.send(signal.SIGTERM))
            assert runs.run(argv) == 143
        assert runs.prepared(argv).earlier.checkpoint == folder_of(output, step)
    assert go_on(argv, whole) == 7 and backup.exists()


def job_of(argv):
    """Return the name of the job that a command would do, which is its checkpoints' folder."""
    return runs.prepared(argv).plan.folder.name


ANOTHER = {
    "MODEL_NAME": None, "DTYPE": "bfloat16", "LORA_R": 4, "LORA_ALPHA": 8, "LORA_DROPOUT": 0.1,
    "LORA_TARGET_MODULES": "q_proj", "NUM_EPOCHS": 3, "MAX_STEPS": 5, "BATCH_SIZE": 3,
    "GRADIENT_ACCUMULATION_STEPS": 3, "LEARNING_RATE": 0.02, "LR_SCHEDULER_TYPE": "linear",
    "WARMUP_RATIO": 0.2, "SEED": 7, "MODEL_REVISION": "other",
}  # fmt: skip
THE_SAME = {
    "LOGGING_STEPS": 2, "SAVE_STEPS": 2, "EVAL_STEPS": 2, "FINAL_LORA": "best", "MATMUL": "native",
    "USE_FLA": "true", "REPLIES": "last", "MAX_SEQ_LEN": 400, "TRAIN_FILE": None, "EVAL_FILE": None,
}  # fmt: skip
EDITS = [  # of the script, each of which does another job
    ("lora_fields", {"use_rslora": True}),
    ("training_fields", {"weight_decay": 0.1}),
    ("training_fields", {"max_grad_norm": 0.5}),
    ("training_fields", {"optim": "sgd"}),
    ("training_fields", {"neftune_noise_alpha": 5.0}),
]


@pytest.fixture(scope="module")
def job(stopped):
    """Return the name of the shared runs' job."""
    (folder,) = runs.job_folders(stopped.output)
    assert job_of(stopped.flags) == folder.name
    return folder.name


def test_a_job_is_its_settings_but_for_those_that_may_change(stopped, job, tmp_path):
    more = {"START_FROM", "ENABLE_THINKING", "CHAT_TEMPLATE"}  # each with a test of its own
    assert {*ANOTHER, *THE_SAME, "DEVICE", "OUTPUT_DIR", "REPORT_TO"} | more == {*t.SETTINGS}
    moved = {"MODEL_NAME": shutil.copytree(TOY, tmp_path / "model")}
    for name in ("TRAIN_FILE", "EVAL_FILE"):
        path = stopped.flags[stopped.flags.index(f"--{name.lower()}") + 1]
        moved[name] = shutil.copy(path, tmp_path / name)

    def flags_of(**values):
        values = {name: moved.get(name, value) for name, value in values.items()}
        return [word for name, value in values.items() for word in (f"--{name.lower()}", value)]

    for name, value in ANOTHER.items():
        assert job_of([*stopped.flags, *flags_of(**{name: value})]) != job, name
    fewer = [*stopped.flags, *flags_of(MAX_STEPS=2)]
    assert job_of([*fewer, *flags_of(BATCH_SIZE=3)]) != job_of(fewer)
    divided = {"BATCH_SIZE": 1, "GRADIENT_ACCUMULATION_STEPS": 4}
    assert job_of([*stopped.flags, *flags_of(**THE_SAME, **divided)]) == job


@pytest.mark.parametrize("flag, number", [("--lora_alpha", "16"), ("--lora_dropout", "0")])
def test_a_whole_number_is_the_same_with_a_point(flag, number, stopped):
    flags = [*stopped.flags, flag]
    assert job_of([*flags, number]) == job_of([*flags, f"{number}.0"])


def test_a_finished_record_may_lack_a_setting(finished, tmp_path):
    """One's own, that was added since and changes nothing of what is trained."""
    output = shutil.copytree(finished.output, tmp_path / "output")
    edit_json(output / "final_lora" / "run.json", lambda run: run["settings"].pop("SAVE_STEPS"))
    assert runs.run([*into(output, finished), "--save_steps", "3"]) == 0


def test_a_damaged_checkpoint_is_not_one_of_the_newest_two(finished, tmp_path):
    """If it were, the only one to fall back on would be removed."""
    argv = [*into(tmp_path, finished), "--save_steps", "100"]

    def stop_at(step):
        with pytest.MonkeyPatch.context() as patch:
            runs.at_step(patch, step, runs.send(signal.SIGTERM))
            assert runs.run(argv) == 143

    stop_at(2)
    stop_at(1)
    assert runs.checkpoints(tmp_path) == [2, 3]
    (damaged,) = tmp_path.glob("checkpoints/*/checkpoint-3/optimizer.pt")
    damaged.write_bytes(b"torn")
    stop_at(2)  # after step 4
    assert {2, 4} <= {*runs.checkpoints(tmp_path)}


def test_the_order_of_the_conversations_is_the_jobs(stopped, job, tmp_path):
    """A resumed epoch would train some of them twice."""
    lines = (stopped.folder / "train.jsonl").read_bytes().splitlines(keepends=True)
    assert lines[3] != lines[4]
    lines[3:5] = lines[4], lines[3]
    (tmp_path / "other.jsonl").write_bytes(b"".join(lines))
    assert job_of([*stopped.flags, "--train_file", tmp_path / "other.jsonl"]) != job


def test_a_local_model_is_its_configuration_and_its_weights(stopped, tmp_path):
    """They may be replaced in place, by files of the same size."""
    model = shutil.copytree(TOY, tmp_path / "model")
    argv = [*stopped.flags, "--model_name", model]
    first, config, weights = job_of(argv), model / "config.json", model / "model.safetensors"
    edit_json(config, lambda values: values["text_config"].update(rms_norm_eps=1e-5))
    assert job_of(argv) != first
    shutil.copy(Path(TOY) / "config.json", config)
    assert job_of(argv) == first
    tensors = load_file(weights)
    save_file(tensors, weights, {"format": "pt"})  # whose header has another padding
    first, size = job_of(argv), weights.stat().st_size
    for name in tensors:
        if "mlp" in name:
            tensors[name] = 1.01 * tensors[name]
    save_file(tensors, weights, {"format": "pt"})
    assert weights.stat().st_size == size
    assert job_of(argv) != first


def test_what_the_identity_holds(stopped, job):
    """Whatever is in neither list of fields cannot be edited, or is a default of a library."""
    identity = runs.prepared(stopped.flags).plan.identity
    lora = {"r", "lora_alpha", "target_modules", "lora_dropout", "bias", "task_type"}
    training = {"learning_rate", "lr_scheduler_type", "warmup_steps", "seed"}
    expected = {f"LoraConfig.{name}" for name in lora} | {f"SFTConfig.{name}" for name in training}
    expected |= {"ENABLE_THINKING", *ANOTHER} - {"BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS"}
    expected |= {"examples in a step", "commit", "chat template", "adapter of START_FROM"}
    expected |= {f"{what} of MODEL_NAME" for what in ("config.json", "weights")}
    assert identity.keys() == expected | {"tokens of TRAIN_FILE", "tokens of EVAL_FILE", "code"}


def other_word(stopped, folder, name):
    """Write a shared run's file with another character in its last reply; return the path."""
    data = (stopped.folder / f"{name}.jsonl").read_bytes()
    at = data.rindex(b".")
    (folder / "other.jsonl").write_bytes(data[:at] + b"!" + data[at + 1 :])
    return folder / "other.jsonl"


def test_another_word_to_learn_is_another_job(stopped, job, tmp_path):
    assert job_of([*stopped.flags, "--train_file", other_word(stopped, tmp_path, "train")]) != job


@pytest.mark.parametrize("function, fields", EDITS, ids=str)
def test_an_edited_field_is_another_job(stopped, job, monkeypatch, function, fields):
    runs.edit_config(monkeypatch, function, **fields)
    assert job_of(stopped.flags) != job


@pytest.mark.parametrize("ends", ["stopped", "finished"])
def test_another_held_out_file_moves_nothing_until_one_decides(
    ends, request, tmp_path, capfd, monkeypatch
):
    """Its losses would stand in one series with those of the former file."""
    run = request.getfixturevalue(ends)
    output = shutil.copytree(run.output, tmp_path / "output")
    left = runs.files(output)
    argv = [*into(output, run), "--eval_file", other_word(run, tmp_path, "eval")]
    runs.refused(capfd, argv, str(run.folder / "eval.jsonl"), "OUTPUT_DIR")
    assert runs.files(output) | {"run.json": left["run.json"]} == left
    assert runs.run([*argv, "--dry_run"]) == 0 and runs.files(output) == left


@pytest.mark.parametrize("every", [1, 3])
def test_measuring_more_often_is_no_new_job(every, stopped, output, whole):
    argv = [*into(output, stopped), "--eval_steps", every, "--final_lora", "best"]
    assert steps_done(argv) == 1
    measured = t.eval_losses(runs.history(output))
    assert measured.keys() == {0, 4, 8} | ({7} if every == 1 else set())
    assert {key: measured[key] for key in (0, 4, 8)} == {
        step: loss for step, key, loss in whole[1] if key == "eval_loss"
    }
    best = min(list(measured)[1:], key=measured.get)
    (checkpoint,) = output.glob(f"checkpoints/*/checkpoint-{best}")
    assert (checkpoint / "adapter_model.safetensors").read_bytes() == (
        output / runs.ADAPTER
    ).read_bytes()
    (last,) = output.glob("checkpoints/*/checkpoint-8")
    assert (last / "adapter_model.safetensors").read_bytes() == whole[0]


LOSS = "TargetLosses.apply(states, targets, head_of(model))"
EDITED_LOSS = (LOSS, f"{LOSS} + 1.0")  # no gradient changes
CODE = Path(t.__file__).read_text("utf-8")
SAME_CODE = {
    "a comment": ("\ndef lora_fields(", "\n# A comment of mine.\ndef lora_fields("),
    "a docstring": ('    """Return PEFT\'s LoraConfig fields;', '    """Return my fields;'),
    "a setting": (f"\nLORA_R = {t.LORA_R}", "\nLORA_R = 4"),
    "a setting's type": ("\nSEED = 42  # for", "\nSEED: int = 43  # for"),
    "a line's form": ("next_tokens = inputs", "next_tokens   =   inputs"),
}


@pytest.mark.parametrize("change", SAME_CODE.values(), ids=SAME_CODE)
def test_what_is_not_executed_is_no_other_code(change):
    edited = CODE.replace(*change)
    assert edited != CODE and t.hash_of_code(edited.encode()) == t.hash_of_code(CODE.encode())


@pytest.mark.parametrize(
    "change",
    [
        EDITED_LOSS, ("DEMO = {", "OMED = {"), ("1e-9, 0.5", "1e-9, 0.6"),
        ("label_smoothing_factor=0,", "label_smoothing_factor=None,"),
        ("logging_nan_inf_filter=False,", "logging_nan_inf_filter='',"),
    ],
)  # fmt: skip
def test_what_is_executed_is_other_code(change):
    edited = CODE.replace(*change)
    assert edited != CODE and t.hash_of_code(edited.encode()) != t.hash_of_code(CODE.encode())


@pytest.mark.parametrize("ends", ["stopped", "finished"])
def test_edited_code_moves_nothing_until_one_decides(ends, request, tmp_path, capfd):
    run = request.getfixturevalue(ends)
    output = shutil.copytree(run.output, tmp_path / "output")
    left = runs.files(output)
    edited = runs.edited_script(tmp_path, EDITED_LOSS).main
    end = runs.command(capfd, into(output, run), edited)
    assert end.status == 1 and "OUTPUT_DIR" in end.err and "Traceback" not in end.err
    assert ("--edited_code" in end.err) == (ends == "stopped")
    assert runs.files(output) | {"run.json": left["run.json"]} == left
    again = runs.command(capfd, [*into(output, run), "--edited_code"], edited)
    assert again.status == (0 if ends == "stopped" else 1)


def test_no_loss_of_other_code_is_compared(stopped, output, whole, tmp_path, capfd):
    """Each loss of the edited code is larger by one."""
    edited = runs.edited_script(tmp_path, EDITED_LOSS).main
    argv = [*into(output, stopped), "--edited_code", "--final_lora", "best"]
    end = runs.command(capfd, argv, edited)
    assert end.status == 0 and "WARNING" not in end.out
    before = {step: loss for step, key, loss in whole[1] if key == "eval_loss"}
    measured = t.eval_losses(runs.history(output))
    assert measured.keys() == {0, 8}
    assert min(measured[step] - before[step] for step in measured) > 0.5
    assert (output / runs.ADAPTER).read_bytes() == whole[0]
    codes = [session["code"] for session in runs.read_record(output)["sessions"]]
    assert len(codes) == len({*codes}) == 2
    runs.refused(capfd, into(output, stopped), "OUTPUT_DIR")  # nor by the code of before


def test_a_field_that_an_update_of_a_library_adds_is_no_other_job(stopped, job, monkeypatch):
    for owner, name in ((t.trl, "SFTConfig"), (t.peft, "LoraConfig")):
        newer = make_dataclass(name, [("shiny", int, 3)], bases=(getattr(owner, name),))
        monkeypatch.setattr(owner, name, newer)
    assert job_of(stopped.flags) == job


def disk_is_full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


write_nowhere = torch.save  # before a test replaces it
FULL = {  # the kernel's error, and torch's own, which does not name the disk
    "an OSError": disk_is_full,
    "torch's error": lambda value, *_, **__: write_nowhere(value, "/dev/full"),
}


@pytest.mark.parametrize("fill", FULL.values(), ids=FULL)
def test_a_full_disk_is_told_and_recorded(fill, stopped, output, whole, monkeypatch, capfd):
    """What was torn makes room for the record, and the same command goes on."""
    argv, real = into(output, stopped), t.write_json

    def write(path, value):
        places = output.glob("checkpoints/*/checkpoint-*")
        torn = [place for place in places if not (place / "sha256.json").exists()]
        if path.name == "run.json" and path.parent == output and torn:
            disk_is_full()
        real(path, value)

    with monkeypatch.context() as patch:
        runs.at_step(patch, 1, runs.send(signal.SIGTERM))  # which is not what ends it
        at_saved(patch, 8, fill)
        patch.setattr(t, "write_json", write)
        runs.refused(capfd, argv, "OUTPUT_DIR", str(output))
    assert runs.read_record(output)["outcome"].startswith("failed: ")
    assert go_on(argv, whole) == 7


def test_a_disk_without_any_room_is_told_all_the_same(stopped, output, monkeypatch, capfd):
    """Not even the record and the log can be written."""

    def fill(*_, **__):
        monkeypatch.setattr(t, "write_json", disk_is_full)
        monkeypatch.setattr(logging.FileHandler, "emit", failing_emit)
        disk_is_full()

    def failing_emit(handler, line):
        try:
            disk_is_full()
        except OSError:
            handler.handleError(line)

    at_saved(monkeypatch, 8, fill)
    runs.refused(capfd, into(output, stopped), "OUTPUT_DIR", str(output))


def test_the_hubs_branch_may_move(flags, tmp_path, monkeypatch):
    """The commit that was first taken is written down, and the next jobs there use it, too."""
    commits, now = ["0" * 40, "1" * 40], ["0" * 40]
    folder = tmp_path / "cache" / "models--someone--toy"
    for commit in commits:
        shutil.copytree(TOY, folder / "snapshots" / commit)
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "cache"))
    other = "2" * 40
    shutil.copytree(TOY, folder / "snapshots" / other)

    def resolve(_, revision):
        return types.SimpleNamespace(resolved=other if revision == "v2" else now[0])

    monkeypatch.setattr("huggingface_hub.resolve_revision", resolve)
    flags = [*flags, "--model_name", "someone/toy", "--max_steps", "2"]
    with monkeypatch.context() as patch:
        runs.at_step(patch, 1, runs.send(signal.SIGINT))
        assert runs.run(flags) == 130
    now[:] = commits[1:]
    assert steps_done(flags) == 1
    config = runs.read_json(tmp_path / "output" / "final_lora" / "adapter_config.json")
    named = (config["base_model_name_or_path"], config["revision"])
    assert named == ("someone/toy", commits[0])
    assert runs.prepared([*flags, "--seed", "7"]).base.commit == commits[0]
    assert runs.prepared([*flags, "--model_revision", "v2"]).base.commit == other
    assert runs.prepared([*flags, "--output_dir", tmp_path / "elsewhere"]).base.commit == commits[1]


def test_a_second_run_is_refused_and_an_ignored_signal_ignored(stopped, output, whole, monkeypatch):
    """As nohup has SIGHUP ignored."""
    said = output.with_name("said")
    ignore = lambda _: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731

    def disturb(*_):
        os.kill(os.getpid(), signal.SIGHUP)
        left = runs.files(output), (output / "all_logs.log").read_bytes()
        assert runs.Fork(lambda: runs.be_the_script(into(output, stopped), said)).end() == 1
        assert left == (runs.files(output), (output / "all_logs.log").read_bytes())

    runs.before(monkeypatch, t, "catch_signals", ignore)
    runs.at_step(monkeypatch, 1, disturb)
    assert go_on(into(output, stopped), whole) == 7
    text = said.read_text("utf-8")
    assert str(output) in text and "Traceback" not in text


def test_a_closed_terminal_changes_neither_the_checkpoint_nor_the_status(stopped, output, whole):
    """SIGHUP is sent in a step, and nothing can be written to the terminal any more."""
    argv, (master, slave) = into(output, stopped), os.openpty()

    def wait_for_the_end(*_):
        os.write(2, b"close it now")
        with contextlib.suppress(OSError):
            while os.write(2, b"."):
                time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGHUP)

    def be_in_the_terminal():
        os.close(master)
        try:
            prepare = lambda patch: runs.at_step(patch, 1, wait_for_the_end)  # noqa: E731
            runs.be_the_script(argv, os.ttyname(slave), prepare)
        finally:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115

    fork, said = runs.Fork(be_in_the_terminal), b""
    os.close(slave)
    while b"close it now" not in said:
        said += os.read(master, 4096)
    os.close(master)
    assert fork.end() == 128 + signal.SIGHUP
    assert runs.read_record(output)["outcome"].startswith("interrupted: ")
    assert go_on(argv, whole) == 8


def launch(folder, *runs_to_do):
    """Do each (argv, prepare(patch, rank)) in two forks by torchrun; return both statuses."""

    def be_the_launcher():
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name may have no address
        runs.write_to(folder / "launcher said")
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="none", max_restarts=0,
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
            local_addr="localhost", monitor_interval=0.05,
        )  # fmt: skip
        elastic_launch(config, be_a_rank)(folder, runs_to_do)

    runs.Fork(be_the_launcher).end()
    return [(folder / f"statuses {rank}").read_text().split() for rank in range(2)]


def be_a_rank(folder, runs_to_do):
    """Be one of the processes; note the exit statuses, which the launcher keeps for itself."""
    accelerate.state.AcceleratorState._reset_state(True)  # of the tests' own process
    rank = int(os.environ["RANK"])
    runs.write_to(folder / f"rank {rank} said")
    for argv, prepare in runs_to_do:
        with pytest.MonkeyPatch.context() as patch:
            prepare(patch, rank)
            status = runs.run(argv)
        with (folder / f"statuses {rank}").open("a") as file:
            file.write(f"{status}\n")
    sys.exit(status)


def in_small_parts(patch):
    """Have each row of a step be a micro-batch of its own."""
    patch.setattr(t, "CHECKPOINTING_FACTOR", 1)
    patch.setattr(t, "find_what_fits", lambda trainer: setattr(trainer, "tokens_at_once", 64))


def test_two_processes_learn_what_one_does_and_end_where_one_has_no_memory(tmp_path):
    """In a step one process would wait for ever for the gradients of the other.

    Each has two micro-batches a step, of dialogues that are joined. Of Gemma 4's target tokens
    Trainer does not count those of both.
    """
    output, alone = tmp_path / "output", tmp_path / "alone"
    rows = [{"messages": runs.dialogue(n, 1 + n % 3)} for n in range(14)]
    runs.short_flags(tmp_path)
    train_file = runs.write_lines(tmp_path / "dialogues.jsonl", rows)
    flags = [*runs.short_flags(tmp_path), "--lora_dropout", "0"]  # each process draws its own
    flags += ["--num_epochs", "1", "--train_file", train_file, "--chat_template", "one_pass"]
    other = [*flags, "--eval_file", "", "--max_steps", "1", "--output_dir", tmp_path / "other"]
    gemma = [*flags, "--eval_file", "", "--warmup_ratio", "0", "--max_steps", "2"]
    gemma += ["--model_name", model_of(GEMMA4, tmp_path / "gemma", has_weights=True)]

    def note_the_trial(patch, rank):
        in_small_parts(patch)
        runs.before(patch, t, "find_what_fits", lambda *_: (tmp_path / f"tried {rank}").touch())

    def run_out(patch, rank):
        if rank == 1:
            full = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
            runs.before(patch, t, "token_losses", full)

    statuses = launch(
        tmp_path,
        ([*flags, "--output_dir", output], note_the_trial),
        ([*gemma, "--output_dir", tmp_path / "two"], lambda patch, _: in_small_parts(patch)),
        (other, run_out),
    )
    assert all(one[:2] == ["0", "0"] and one[2:] != ["0"] for one in statuses), statuses
    assert (tmp_path / "tried 0").exists() and (tmp_path / "tried 1").exists()
    with pytest.MonkeyPatch.context() as patch:
        in_small_parts(patch)
        recorders = runs.record(patch)
        assert runs.run([*flags, "--output_dir", alone]) == 0
        assert len(recorders[0].trained) == 14  # a row each
        assert runs.run([*gemma, "--output_dir", tmp_path / "one"]) == 0
    found, expected = (runs.history(tmp_path / name) for name in ("two", "one"))
    for key in ("loss", "grad_norm"):
        assert runs.logged(found, key) == pytest.approx(runs.logged(expected, key), rel=1e-3), key
    found, expected = (runs.history(one) for one in (output, alone))
    # Only the order of sums differs, up to the last step, which is filled up with more examples.
    for key in ("loss", "grad_norm"):
        ours, theirs = runs.logged(found, key), runs.logged(expected, key)
        assert len(ours) == 4 and ours[:3] == pytest.approx(theirs[:3], rel=1e-3), key
    evals = [runs.logged(one, "eval_loss") for one in (found, expected)]
    assert evals[0][0] == pytest.approx(evals[1][0], rel=1e-6)
    assert evals[0] == pytest.approx(evals[1], abs=0.05)
    said = (tmp_path / "rank 1 said").read_text("utf-8")
    assert not re.search("(?m)^(train|eval|done) ", said)  # one process prints
