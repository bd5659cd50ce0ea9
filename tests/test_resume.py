"""Checkpoints, signals, kills, other jobs in the same folder, finished jobs, several processes."""

import argparse
import ast
import os
import re
import resource
import shutil
import signal
import sys
import threading
import types
from dataclasses import replace
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
from tqdm import tqdm

import train_lora_single as script
from train_lora.checkpoints import eval_losses
from train_lora.code import DECIDING, code_of_job
from train_lora.losses import losses_of_replies
from train_lora.trainer import MicroBatchedTrainer

FILE_SIZE = resource.RLIMIT_FSIZE  # the largest that this process may write


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
    real = MicroBatchedTrainer.training_step
    with mock.patch.object(
        MicroBatchedTrainer, "training_step", autospec=True, side_effect=real
    ) as step:
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


def at_evaluation(patch, action):
    """Do action in the first of an evaluation's small batches; no other may follow."""
    real, passes = losses_of_replies, []

    def look(*_):
        assert not passes
        passes.append(None)
        action()

    def in_small_batches(model, examples, _, *more):
        model.register_forward_pre_hook(look)
        return real(model, examples, 64, *more)

    runs.replace_ours(patch, "losses_of_replies", in_small_batches)


def at_verification(patch, action):
    runs.before(patch, peft.PeftModel, "from_pretrained", action)


def at_rename(patch, action):
    """Do action once, before something gets the name final_lora."""
    is_due = lambda _, new: Path(new).name == "final_lora"  # noqa: E731
    runs.before(patch, Path, "rename", action, when=is_due)


LATE = {  # once all steps are done: the signal, and how it is sent
    "in a checkpoint": (signal.SIGUSR1, lambda patch, send: at_saved(patch, 8, send)),
    "in an evaluation": (signal.SIGHUP, at_evaluation),
    "in the verification": (signal.SIGTERM, at_verification),
}


@pytest.mark.parametrize("moment", LATE)
def test_after_a_late_signal_the_same_command_ends_in_the_same_bytes(
    moment, stopped, output, whole, monkeypatch, capfd
):
    number, prepare = LATE[moment]
    argv = into(output, stopped)
    with monkeypatch.context() as patch:
        prepare(patch, runs.send(number))
        end = runs.command(capfd, argv)
    assert end.status == 128 + number and "Traceback" not in end.err
    assert runs.read_record(output)["outcome"].startswith("interrupted: ")
    assert losses(output) == whole[1][: len(losses(output))]
    assert not (output / runs.ADAPTER).exists()
    assert go_on(argv, whole) == 8


def test_a_stop_at_an_epochs_end_leaves_its_evaluation_to_the_next_session(
    finished, whole, tmp_path, monkeypatch
):
    argv = into(tmp_path, finished)
    with monkeypatch.context() as patch:
        runs.at_step(patch, 4, runs.send(signal.SIGTERM))
        assert runs.run(argv) == 143
    assert losses(tmp_path)[-1][:2] == (4, "loss") and runs.checkpoints(tmp_path)[-1] == 4
    assert go_on(argv, whole) == 4


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


def tear_and_die(_, path, **__):
    Path(path).write_bytes(b"PK")
    die()


def in_the_writing_of_run_json(patch):
    """Have the kernel kill this process when a file grows beyond job.json's size."""

    def limit(*_):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(FILE_SIZE, (2000, 2000))

    # This is called once, before both are written.
    runs.before(patch, accelerate.utils, "broadcast_object_list", limit)


KILLS = {  # when, the signal, the outcome that stands there then, and the newest whole checkpoint
    "run.json": (in_the_writing_of_run_json, signal.SIGXFSZ, "interrupted", 7),
    "a checkpoint": (lambda p: at_saved(p, 8, tear_and_die), signal.SIGKILL, "running", 7),
    "final_lora's move": (lambda p: at_rename(p, die), signal.SIGKILL, "running", 8),
}


@pytest.mark.parametrize("moment", KILLS)
def test_however_it_is_killed_it_ends_in_the_same_bytes(moment, stopped, output, whole, tmp_path):
    kill, number, outcome, saved = KILLS[moment]
    argv = into(output, stopped)
    fork = runs.Fork(lambda: runs.be_the_script(argv, tmp_path / "said", kill))
    assert fork.end() == -number
    assert runs.read_record(output)["outcome"].startswith(outcome)
    assert losses(output) == [one for one in whole[1] if one[0] <= saved]
    assert go_on(argv, whole) == saved
    older = {"older.txt": b"of another run"}  # lay in final_lora, and is still there, renamed
    assert older in [runs.files(place) for place in output.glob("final_lora*")]


@pytest.mark.timeout(60)
def test_no_lock_of_a_progress_bar_stops_a_child_or_outlives_it():
    """The child is forked while a thread here holds the lock, and is killed while it holds it."""
    is_held, is_forked = threading.Event(), threading.Event()

    def hold():
        with tqdm.get_lock():
            is_held.set()
            is_forked.wait()

    def be_killed():
        tqdm.get_lock().acquire()
        die()

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    fork = runs.Fork(be_killed)
    is_forked.set()
    assert fork.end() == -signal.SIGKILL
    thread.join()
    tqdm([1], disable=True)  # takes the lock, or waits for it until the test's time is over


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """Change bits of some numbers, in the middle of the file."""
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 65):  # more than zip's filling
        data[place] ^= 1
    path.write_bytes(data)


DAMAGE = [
    ("trainer_state.json", cut), ("adapter_model.safetensors", flip), ("optimizer.pt", flip),
    ("scheduler.pt", cut), ("rng_state.pth", Path.unlink),
]  # fmt: skip


@pytest.mark.parametrize("name, spoil", DAMAGE)
def test_a_checkpoint_that_is_not_whole_is_passed_over(name, spoil, stopped, output, capfd):
    """As after a power cut; neither torch nor safetensors looks at the sums of its files."""
    newest = folder_of(output, 7)
    shutil.copytree(newest, newest.with_name("checkpoint-50-backup"))
    spoil(newest / name)
    assert runs.prepared(into(output, stopped)).earlier.checkpoint == folder_of(output, 6)
    assert str(newest) in capfd.readouterr().out


def test_a_damaged_checkpoint_is_not_one_of_the_newest_two(stopped, output, whole):
    """If it were, the only one to fall back on would be removed."""
    flip(folder_of(output, 7) / "optimizer.pt")
    assert go_on(into(output, stopped), whole) == 6
    assert {6, 8} <= {*runs.checkpoints(output)}


def test_a_damaged_checkpoint_is_written_over(stopped, output, whole, monkeypatch):
    argv = into(output, stopped)
    flip(folder_of(output, 7) / "optimizer.pt")
    with monkeypatch.context() as patch:
        runs.at_step(patch, 1, runs.send(signal.SIGTERM))
        assert runs.run(argv) == 143
    assert go_on(argv, whole) == 7


@pytest.fixture(scope="module")
def job(stopped):
    """Return the shared runs' job, before its weights are loaded."""
    job = runs.prepared(stopped.flags)
    assert runs.job_folders(stopped.output) == [job.folder]
    return job


def folder_of_job(job, base=None, data=None, **settings):
    """Return where a job with another base, data or settings would have its checkpoints."""
    settings = argparse.Namespace(**vars(job.settings) | settings)
    other = {"settings": settings, "base": base or job.base, "data": data or job.data}
    return runs.planned(job, **other).folder


ANOTHER = {
    "MODEL_NAME": "other", "MODEL_REVISION": "other", "DTYPE": "bfloat16", "ENABLE_THINKING": True,
    "LORA_R": 4, "LORA_ALPHA": 8, "LORA_DROPOUT": 0.1, "LORA_TARGET_MODULES": ["q_proj"],
    "NUM_EPOCHS": 3, "MAX_STEPS": 5, "BATCH_SIZE": 3, "GRADIENT_ACCUMULATION_STEPS": 3,
    "LEARNING_RATE": 0.02, "LR_SCHEDULER_TYPE": "linear", "WARMUP_RATIO": 0.2, "SEED": 7,
}  # fmt: skip
THE_SAME = {  # as long as the tokens are the same
    "TRAIN_FILE": "copy", "EVAL_FILE": "copy", "REPLIES": "last", "MAX_SEQ_LEN": 400,
    "LOGGING_STEPS": 2, "SAVE_STEPS": 2, "EVAL_STEPS": 2, "FINAL_LORA": "best",
    "MATMUL": "float16", "USE_FLA": True, "DEVICE": "cuda", "REPORT_TO": "wandb",
}  # fmt: skip


def test_each_setting_is_part_of_the_job_or_may_change():
    """For OUTPUT_DIR see the jobs of all tests here; the other two have tests of their own."""
    apart = {"OUTPUT_DIR", "CHAT_TEMPLATE", "START_FROM"}
    assert ANOTHER.keys() | THE_SAME.keys() | apart == {*runs.SETTINGS}


@pytest.mark.parametrize("name", ANOTHER)
def test_another_value_is_another_job(name, job):
    assert folder_of_job(job, **{name: ANOTHER[name]}) != job.folder


@pytest.mark.parametrize("name", THE_SAME)
def test_another_value_is_the_same_job(name, job):
    assert folder_of_job(job, **{name: THE_SAME[name]}) == job.folder


def test_only_the_number_of_examples_in_a_step_counts(job):
    divided = {"BATCH_SIZE": 1, "GRADIENT_ACCUMULATION_STEPS": 4}
    assert folder_of_job(job, **divided) == job.folder


@pytest.mark.parametrize("name, number", [("LORA_ALPHA", 16), ("LORA_DROPOUT", 0)])
def test_a_whole_number_is_the_same_with_a_point(name, number, job):
    with_point = folder_of_job(job, **{name: float(number)})
    assert folder_of_job(job, **{name: number}) == with_point


@pytest.mark.parametrize(
    "function, fields",
    [("lora_fields", {"use_rslora": True}), ("training_fields", {"weight_decay": 0.1}),
     ("training_fields", {"optim": "sgd"})], ids=str,
)  # fmt: skip
def test_an_edited_field_is_another_job(function, fields, job, monkeypatch):
    runs.edit_config(monkeypatch, function, **fields)
    assert folder_of_job(job) != job.folder


def test_another_chat_template_is_another_job(job):
    tokenizer = types.SimpleNamespace(
        eos_token=job.base.tokenizer.eos_token, get_chat_template=lambda: "another"
    )
    base = replace(job.base, tokenizer=tokenizer)
    assert folder_of_job(job, base) != job.folder


def test_another_token_to_learn_is_another_job(job):
    first, *others = job.data.examples
    changed = replace(first, reply_ids=[first.reply_ids[0] + 1, *first.reply_ids[1:]])
    data = replace(job.data, examples=[changed, *others])
    assert folder_of_job(job, data=data) != job.folder


def test_another_order_of_the_examples_is_another_job(job):
    """A resumed epoch would train some of them twice."""
    first, second, *others = job.data.examples
    data = replace(job.data, examples=[second, first, *others])
    assert folder_of_job(job, data=data) != job.folder


@pytest.fixture
def local(job, tmp_path):
    """Return a copy of the model, and the job on it."""
    folder = shutil.copytree(TOY, tmp_path / "model")
    request = replace(job.base.request, name=str(folder))
    return folder, replace(job, base=replace(job.base, request=request))


def test_a_copy_of_the_model_is_the_same_job(local, job):
    assert folder_of_job(local[1]) == job.folder


def test_a_models_other_configuration_is_another_job(local, job):
    edit_json(local[0] / "config.json", lambda x: x["text_config"].update(rms_norm_eps=1e-5))
    assert folder_of_job(local[1]) != job.folder


def test_weights_that_replace_others_of_the_same_size_are_another_job(local):
    model, job = local
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors, weights, {"format": "pt"})  # whose header has another padding
    first, size = folder_of_job(job), weights.stat().st_size
    for name in tensors:
        if "mlp" in name:
            tensors[name] = 1.01 * tensors[name]
    save_file(tensors, weights, {"format": "pt"})
    assert weights.stat().st_size == size and folder_of_job(job) != first


@pytest.mark.parametrize("ends", ["stopped", "finished"])
def test_another_held_out_file_moves_nothing_until_one_decides(ends, request, tmp_path, capfd):
    """Its losses would stand in one series with those of the former file."""
    run = request.getfixturevalue(ends)
    output = shutil.copytree(run.output, tmp_path / "output")
    left, other = runs.files(output), tmp_path / "other.jsonl"
    other.write_bytes((run.folder / "eval.jsonl").read_bytes().replace(b"number 501?", b"now?"))
    argv = [*into(output, run), "--eval_file", other]
    runs.refused(capfd, argv, str(run.folder / "eval.jsonl"), "OUTPUT_DIR")
    assert runs.files(output) | {"run.json": left["run.json"]} == left
    assert runs.run([*argv, "--dry_run"]) == 0 and runs.files(output) == left


def test_other_lines_to_learn_from_are_told_without_a_hash(stopped, output, tmp_path, capfd):
    other = runs.write_talks(tmp_path / "other.jsonl", range(20))
    words = [*into(output, stopped), "--train_file", other, "--dry_run"]
    end = runs.command(capfd, words)
    assert end.status == 0 and "TRAIN_FILE" in end.out
    assert not re.search(r"\b[0-9a-f]{16}\b", end.out)


def test_an_evaluation_that_a_signal_came_before_is_made_up_for(finished, tmp_path, monkeypatch):
    """Also where EVAL_STEPS was changed meanwhile: the best step might be this one."""
    output = tmp_path / "output"
    argv = [*finished.flags, "--output_dir", output]
    with monkeypatch.context() as patch:
        runs.at_step(patch, 4, runs.send(signal.SIGTERM))  # the last one of the first epoch
        assert runs.run(argv) == 143
    assert [*eval_losses(runs.history(output))] == [0]
    assert runs.run([*argv, "--eval_steps", "3"]) == 0
    losses, expected = (eval_losses(runs.history(one)) for one in (output, finished.output))
    assert [*losses] == [0, 4, 6, 8]
    assert losses[4] == expected[4] and losses[8] == expected[8]


def test_measuring_more_often_is_no_new_job(stopped, output, whole):
    argv = [*into(output, stopped), "--eval_steps", "1", "--final_lora", "best"]
    assert steps_done(argv) == 1
    measured = eval_losses(runs.history(output))
    before = {step: loss for step, key, loss in whole[1] if key == "eval_loss"}
    assert measured == before | {7: measured[7]}
    best = min([4, 7, 8], key=measured.get)
    name = "adapter_model.safetensors"
    assert (folder_of(output, best) / name).read_bytes() == (output / runs.ADAPTER).read_bytes()
    assert (folder_of(output, 8) / name).read_bytes() == whole[0]


LOSS = "TargetLosses.apply(states, targets, head_of(model))"
EDITED_LOSS = (LOSS, f"{LOSS} + 1.0")  # no gradient changes
CHANGES = {  # of a text in the script or in a room, and whether another job's code is executed then
    "a loss": (*EDITED_LOSS, True),
    "a falsy constant": ("label_smoothing_factor=0,", "label_smoothing_factor=None,", True),
    "a field": ('bias="none",', 'bias="all",', True),
    "what is allowed": ("1e-9, 0.5", "1e-9, 0.6", False),
    "a comment": ("\ndef lora_fields(", "\n# A comment of mine.\ndef lora_fields(", False),
    "a docstring": ('    """Return PEFT\'s LoraConfig fields;', '    """Return my fields;', False),
    "a setting": (f"\nLORA_R = {script.LORA_R}", "\nLORA_R = 4", False),
    "a setting's type": ("\nSEED = 42  # for", "\nSEED: int = 43  # for", False),
    "a line's form": ("next_tokens = inputs", "next_tokens   =   inputs", False),
}


def code_with(*changes):
    """Return the hash of the job's code, with each (path, old, new) changed."""
    sources = dict(runs.settings_of().sources)
    for path, old, new in changes:
        assert old != new and old in sources[path]
        sources[path] = sources[path].replace(old, new)
    return code_of_job(sources, runs.SETTINGS)


@pytest.mark.parametrize("change", CHANGES)
def test_other_code_is_what_executes_something_else(change):
    before, after, is_other = CHANGES[change]
    before, after = before.encode(), after.encode()
    (path,) = [path for path, text in runs.settings_of().sources.items() if before in text]
    assert (code_with((path, before, after)) != code_with()) == is_other


OTHER_OPERATOR = {
    "+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "<": ">", ">": "<", "<=": "<", ">=": ">",
    "==": "!=", "!=": "==", "and": "or", "or": "and",
}  # fmt: skip


def an_operator(source):
    """Return a line that computes or decides something, and the same with another operator."""
    lines = source.decode().splitlines()
    found = [getattr(node, "lineno", 0) for node in ast.walk(ast.parse(source))]
    code = [
        lines[number - 1]
        for number in sorted({*found} - {0})
        if lines.count(lines[number - 1]) == 1
    ]
    for line in code:
        for symbol, other in OTHER_OPERATOR.items():
            is_code = line.lstrip().startswith(("return ", "if ")) and lines.count(line) == 1
            if is_code and f" {symbol} " in line:
                return line, line.replace(f" {symbol} ", f" {other} ")
    return None


def a_message(source):
    """Return a text that a source prints or raises, and another one; None if it has none."""
    text = source.decode()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("report", "UserError"):
            segment = ast.get_source_segment(text, node)
            for word in re.findall(r"[a-z]{4,}", segment):
                if text.count(word) == 1:
                    return word, f"other{word}"
    return None


SOURCES = runs.settings_of().sources
MESSAGES = {path: a_message(source) for path, source in SOURCES.items()}


@pytest.mark.parametrize("room", DECIDING)
def test_an_operator_of_a_room_that_decides_counts(room):
    (path,) = [path for path in SOURCES if path.stem == room]
    before, after = an_operator(SOURCES[path])
    assert code_with((path, before.encode(), after.encode())) != code_with()


@pytest.mark.parametrize(
    "path", [path for path in MESSAGES if MESSAGES[path]], ids=lambda path: path.stem
)
def test_no_message_counts(path):
    before, after = MESSAGES[path]
    assert code_with((path, before.encode(), after.encode())) == code_with()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_line_of_another_room_does_not_count(path):
    changed = {**SOURCES, path: SOURCES[path] + b"print(1 + 1)\n"}
    decides = path.stem in (*DECIDING, "train_lora_single")
    assert (code_of_job(changed, runs.SETTINGS) != code_with()) == decides


def test_sources_that_are_edited_while_they_are_imported_end_the_run(flags, tmp_path, capfd):
    """Nobody could say which of both was executed."""
    edited = runs.edited_script(tmp_path)
    settings = runs.settings_of(*flags, script=edited)
    room = tmp_path / "edited" / "train_lora" / "losses.py"
    room.write_text(room.read_text("utf-8") + "\n", "utf-8")
    runs.refused(capfd, [], "losses.py", main=lambda _: edited.main(edited.run, settings), status=1)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("ends", ["stopped", "finished"])
def test_edited_code_moves_nothing_until_one_decides(ends, request, tmp_path, capfd):
    run = request.getfixturevalue(ends)
    output = shutil.copytree(run.output, tmp_path / "output")
    left = runs.files(output)
    edited = runs.command_of(runs.edited_script(tmp_path, EDITED_LOSS))
    end = runs.command(capfd, into(output, run), edited)
    assert end.status == 1 and "OUTPUT_DIR" in end.err and "Traceback" not in end.err
    assert "--edited_code" in end.err
    assert runs.files(output) | {"run.json": left["run.json"]} == left
    again = runs.command(capfd, [*into(output, run), "--edited_code"], edited)
    assert again.status == 0 and (output / runs.ADAPTER).exists()


def test_no_loss_of_other_code_is_compared(stopped, output, whole, tmp_path, capfd):
    """Each loss of the edited code is larger by one."""
    edited = runs.command_of(runs.edited_script(tmp_path, EDITED_LOSS))
    argv = [*into(output, stopped), "--edited_code", "--final_lora", "best"]
    end = runs.command(capfd, argv, edited)
    assert end.status == 0 and "WARNING" not in end.out
    before = {step: loss for step, key, loss in whole[1] if key == "eval_loss"}
    measured = eval_losses(runs.history(output))
    assert measured.keys() == {0, 8}
    assert min(measured[step] - before[step] for step in measured) > 0.5
    assert (output / runs.ADAPTER).read_bytes() == whole[0]
    codes = [session["code"] for session in runs.read_record(output)["sessions"]]
    assert len(codes) == len({*codes}) == 2
    runs.refused(capfd, into(output, stopped), "OUTPUT_DIR")  # nor by the code of before


def test_a_full_disk_is_told_and_recorded(stopped, output, whole, monkeypatch, capfd):
    """torch's own error does not name the disk. What it has torn is removed."""
    argv, save, (soft, hard) = into(output, stopped), torch.save, resource.getrlimit(FILE_SIZE)

    def fill(value, path, **_):
        resource.setrlimit(FILE_SIZE, (2000, hard))
        try:
            save(value, path)
        finally:
            resource.setrlimit(FILE_SIZE, (soft, hard))

    with monkeypatch.context() as patch:
        runs.at_step(patch, 1, runs.send(signal.SIGTERM))  # which is not what ends it
        at_saved(patch, 8, fill)
        runs.refused(capfd, argv, "OUTPUT_DIR", str(output))
    assert runs.read_record(output)["outcome"].startswith("failed: ")
    assert runs.checkpoints(output)[-1] == 7
    assert go_on(argv, whole) == 7


def test_the_hubs_branch_may_move(flags, tmp_path, monkeypatch):
    """The commit that was first taken is written down, and the next jobs there use it, too."""
    folder, commits = tmp_path / "cache" / "models--someone--toy", ["0" * 40, "1" * 40]
    for commit in commits:
        shutil.copytree(TOY, folder / "snapshots" / commit)
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path / "cache"))
    now = types.SimpleNamespace(resolved=commits[0])
    monkeypatch.setattr("huggingface_hub.resolve_revision", lambda *_, **__: now)
    flags = [*flags, "--model_name", "someone/toy", "--max_steps", "2"]
    with monkeypatch.context() as patch:
        runs.at_step(patch, 1, runs.send(signal.SIGINT))
        assert runs.run(flags) == 130
    now.resolved = commits[1]
    assert steps_done(flags) == 1
    config = runs.read_json(tmp_path / "output" / "final_lora" / "adapter_config.json")
    named = (config["base_model_name_or_path"], config["revision"])
    assert named == ("someone/toy", commits[0])
    assert runs.prepared([*flags, "--seed", "7"]).base.commit == commits[0]
    assert runs.prepared([*flags, "--model_revision", "v2"]).base.commit == commits[1]


def test_a_second_run_is_refused_and_an_ignored_signal_ignored(stopped, output, whole, monkeypatch):
    """As nohup has SIGHUP ignored."""
    said = output.with_name("said")
    ignore = lambda _: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731

    def disturb(*_):
        os.kill(os.getpid(), signal.SIGHUP)
        left = runs.files(output), (output / "all_logs.log").read_bytes()
        assert runs.Fork(lambda: runs.be_the_script(into(output, stopped), said)).end() == 1
        assert left == (runs.files(output), (output / "all_logs.log").read_bytes())

    runs.before(monkeypatch, None, "catch_signals", ignore)
    runs.at_step(monkeypatch, 1, disturb)
    assert go_on(into(output, stopped), whole) == 7
    text = said.read_text("utf-8")
    assert str(output) in text and "Traceback" not in text


def test_a_closed_terminal_changes_neither_the_checkpoint_nor_the_status(stopped, output, whole):
    """SIGHUP is sent in a step, and nothing can be written to standard output and error."""
    argv = into(output, stopped)
    prepare = lambda patch: runs.at_step(patch, 1, runs.send(signal.SIGHUP))  # noqa: E731
    assert runs.Fork(lambda: runs.be_the_script(argv, "/dev/full", prepare)).end() == 129
    assert runs.read_record(output)["outcome"].startswith("interrupted: ")
    assert go_on(argv, whole) == 8


def be_the_launcher(folder, argvs):
    """Do what torchrun does, with two processes; each does all commands."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's own name may have no address
    runs.write_to(folder / "launcher said")
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="none", max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork",
        local_addr="localhost", monitor_interval=0.05,
    )  # fmt: skip
    elastic_launch(config, be_a_rank)(folder, argvs)


def be_a_rank(folder, argvs):
    """Be one of the processes; note the statuses. In the last command the second has no memory."""
    accelerate.state.AcceleratorState._reset_state(True)  # of the tests' own process
    rank = os.environ["RANK"]
    runs.write_to(folder / f"rank {rank} said")
    patch, statuses = pytest.MonkeyPatch(), []
    in_small_parts(patch)
    for argv in argvs:
        if rank == "1" and argv is argvs[-1]:
            full = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
            runs.replace_ours(patch, "token_losses", full)
        statuses.append(runs.run(argv))
        (folder / f"statuses {rank}").write_text(" ".join(map(str, statuses)))
    sys.exit(statuses[-1])


def in_small_parts(patch):
    """Have each row of a step be a micro-batch of its own."""
    runs.replace_ours(patch, "CHECKPOINTING_FACTOR", 1)
    runs.replace_ours(
        patch, "find_what_fits", lambda trainer: setattr(trainer, "tokens_at_once", 64)
    )


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Return the folder of what two processes did, and the runs that one has to do the same.

    Each process has two micro-batches a step, of dialogues that are joined.
    """
    folder = tmp_path_factory.mktemp("two processes")
    flags = [*runs.short_flags(folder), "--lora_dropout", "0"]  # each process draws its own
    rows = [{"messages": runs.dialogue(n, 1 + n % 3)} for n in range(8)]
    flags += ["--train_file", runs.write_lines(folder / "dialogues.jsonl", rows)]
    flags += ["--max_steps", "2", "--warmup_ratio", "0", "--chat_template", "one_pass"]
    gemma = model_of(GEMMA4, folder / "gemma", has_weights=True)
    commands = {"toy": flags, "gemma": [*flags, "--model_name", gemma, "--eval_file", ""]}
    argvs = [[*argv, "--output_dir", folder / f"two {name}"] for name, argv in commands.items()]
    runs.Fork(lambda: be_the_launcher(folder, [*argvs, [*flags, "--seed", "7"]])).end()
    return folder, commands


@pytest.mark.parametrize("name", ["toy", "gemma"])
def test_two_processes_learn_what_one_does(name, launched, tmp_path, monkeypatch):
    """Only the order of sums differs. Trainer does not count Gemma 4's targets of both."""
    folder, commands = launched
    in_small_parts(monkeypatch)
    assert runs.run([*commands[name], "--output_dir", tmp_path]) == 0
    found, expected = runs.history(folder / f"two {name}"), runs.history(tmp_path)
    for key in ("loss", "grad_norm", "eval_loss"):
        assert runs.logged(found, key) == pytest.approx(runs.logged(expected, key), rel=1e-3), key


def test_where_one_process_has_no_memory_all_end(launched):
    """In a step one would wait for ever for the gradients of the other."""
    statuses = [(launched[0] / f"statuses {rank}").read_text().split() for rank in range(2)]
    assert [one[:2] for one in statuses] == [["0", "0"]] * 2
    assert all(one[2:] != ["0"] for one in statuses)
