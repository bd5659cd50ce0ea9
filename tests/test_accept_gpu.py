"""The card's acceptance: each of its rows is good where all is right, and can fail."""

import json
import math
import signal
import types
from pathlib import Path

import accept_gpu as accept
import pytest
import runs
import torch
from toys import TOY

import train_lora_single as t

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
NARROW = {
    "vocab_size": 3072, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "linear_num_key_heads": 1,
    "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "tie_word_embeddings": True,
}  # fmt: skip
GOOD, BAD = 'ROW ["what", "found", true]\n', 'ROW ["what", "found", false]\n'


@pytest.fixture(scope="module", autouse=True)
def float16_cores():
    """Multiply float16 as tensor cores do, with float32 sums, and do steps that are timed once."""
    product = torch.Tensor.__matmul__

    def multiply(a, b):
        is_half = a.dtype == b.dtype == torch.float16
        return product(a.float(), b.float()).half() if is_half else product(a, b)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__matmul__", multiply)
        patch.setattr(accept, "repeat", lambda step, **_: [bool(step())] * 6)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder with the narrow model and a native gradient, and trainers of both kinds."""
    folder = tmp_path_factory.mktemp("acceptance")
    torch.manual_seed(0)
    list(accept.make_model([], folder, NARROW, "cpu"))
    flags = [*runs.short_flags(folder), "--dtype=bfloat16", f"--model_name={folder}/model"]
    native, float16 = (accept.trainer_for([*flags, f"--matmul={x}"]) for x in ("native", "float16"))
    assert is_good(accept.gradient(native, folder))
    return types.SimpleNamespace(folder=folder, native=native, float16=float16)


@pytest.fixture
def native(made, monkeypatch):
    """Return the trainer with bfloat16's own matmul."""
    monkeypatch.setattr(made.native, "tokens_at_once", 512)
    return made.native


def is_good(rows):
    """Return whether all rows are; there is at least one, and each is judged."""
    found = [row[2] for row in rows]
    assert found and None not in found
    return all(found)


def changed(change):
    """Return what changes each result by a function."""
    return lambda real: lambda *given: change(real(*given))


FLOAT16 = {  # the check, what of the script is changed how, and whether the rows are good then
    "gradients": (accept.gradient, "reply_losses", changed(lambda one: one), True),
    "a loss": (accept.gradient, "reply_losses", changed(lambda one: 1.02 * one), False),
    "NaN": (accept.gradient, "reply_losses", changed(lambda one: math.nan * one), False),
    "nothing goes back": (
        accept.gradient, "scaled_fp16_matmul",
        lambda real: lambda rows, weight: real(rows, weight) * (not weight.is_contiguous()), False,
    ),
    "products": (accept.products, "reply_losses", changed(lambda one: one), True),
    "a scale": (
        accept.products, "scaled_fp16_matmul",
        changed(lambda one: torch.cat([one[..., :-1, :], 2 * one[..., -1:, :]], -2)), False,
    ),
    "a dropped row": (
        accept.products, "scaled_fp16_matmul",
        changed(lambda one: torch.cat([0 * one[..., :1, :], one[..., 1:, :]], -2)), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FLOAT16)
def test_what_is_wrong_in_float16_is_seen(made, monkeypatch, what):
    check, name, change, expected = FLOAT16[what]
    monkeypatch.setattr(t, name, change(getattr(t, name)))
    assert is_good(check(made.float16, made.folder)) == expected


def test_fla_that_is_refused_is_not_judged(native, tmp_path, monkeypatch):
    monkeypatch.setattr(native.job.settings, "USE_FLA", True)
    assert list(accept.gradient(native, tmp_path)) == []


@pytest.fixture
def full(native, gpu):
    """Return the trainer on a made-up GPU with memory for no more than 128 tokens at once."""
    gpu()

    def fail(*_):
        if native.tokens_at_once > 128:
            raise torch.OutOfMemoryError("out of memory")

    handle = native.model.register_forward_pre_hook(fail)
    yield native
    handle.remove()


def test_a_step_that_runs_out_of_memory_or_loses_a_micro_batch(full, tmp_path, monkeypatch):
    assert is_good(accept.out_of_memory(full, tmp_path))
    real = t.micro_batches

    def lose_one(inputs, tokens_at_once, chunk):
        parts = list(real(inputs, tokens_at_once, chunk))
        return parts if tokens_at_once == 64 else parts[:1]

    monkeypatch.setattr(t, "micro_batches", lose_one)
    assert not is_good(accept.out_of_memory(full, tmp_path))


def test_a_step_that_finds_memory_without_end(native, gpu, tmp_path):
    gpu()
    assert not is_good(accept.out_of_memory(native, tmp_path))


@pytest.mark.parametrize("peak, expected", [(14, True), (15, False)])
def test_the_peak_of_steps(native, gpu, tmp_path, monkeypatch, peak, expected):
    gpu(free=16)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak * 2**30)
    assert is_good(accept.memory(native, tmp_path)) == expected


def test_steps_that_need_more_than_was_tried(full, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    assert not is_good(accept.memory(full, tmp_path))


def test_the_bare_command(tmp_path, monkeypatch, capfd):
    train = runs.write_talks(tmp_path / "train.jsonl", range(24))
    held_out = runs.write_talks(tmp_path / "eval.jsonl", range(500, 502))
    flags = [f"--model_name={TOY}", "--device=cpu", "--max_steps=6", "--logging_steps=1"]
    flags += [f"--train_file={train}", f"--eval_file={held_out}"]

    def run(words, stop_at=""):
        with monkeypatch.context() as patch:
            if stop_at:
                runs.at_step(patch, 3, runs.send(signal.SIGTERM))
            end = runs.command(capfd, words[1:])
        assert stop_at in end.out
        return end.status, end.out

    monkeypatch.setattr(accept, "run", run)
    monkeypatch.setattr(accept, "STEPS", 6)
    assert is_good(accept.bare_command(flags, tmp_path))


@pytest.mark.parametrize(
    "fault", ["none", "status", "begun anew", "loss", "steps", "outcome", "adapter"]
)
def test_faults_of_the_bare_command(tmp_path, monkeypatch, fault):
    output = tmp_path / "one"

    def run(words, stop_at=""):
        if stop_at:
            (output / "checkpoints" / "job" / "checkpoint-2").mkdir(parents=True)
            return 1 if fault == "status" else 143, stop_at
        losses = [2.0, 3.0, 2.5, math.nan if fault == "loss" else 2.2]
        history = [{"loss": one} for one in losses[: 3 if fault == "steps" else 4]]
        history += [{"eval_loss": 3.0}, {"eval_loss": 2.0}]
        outcome = "failed" if fault == "outcome" else "finished"
        record = {"outcome": outcome, "loss_history": history, "matmul": "", "peak_gib": 1.0}
        (output / "run.json").write_text(json.dumps(record), encoding="utf-8")
        for name in ["final_lora", "final_lora_vllm"][: 1 if fault == "adapter" else 2]:
            (output / name).mkdir()
            (output / name / "adapter_model.safetensors").touch()
        return 0, "step 1/4" if fault == "begun anew" else "step 3/4"

    monkeypatch.setattr(accept, "run", run)
    monkeypatch.setattr(accept, "STEPS", 4)
    assert is_good(accept.bare_command([], tmp_path)) == (fault == "none")


@pytest.mark.parametrize("status, factor", [(0, 1), (1, 1), (0, 1.1)])
def test_two_processes(tmp_path, monkeypatch, status, factor):
    losses = {"one": [2.0, 3.0], "two": [2.0, 3.0 * factor]}
    monkeypatch.setattr(accept, "run", lambda _: (status, ""))
    monkeypatch.setattr(accept, "left_by_a_run", lambda output: ("", losses[output.name]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert list(accept.two_processes([], tmp_path)) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert is_good(accept.two_processes([], tmp_path)) == (status == 0 and factor == 1)


def test_a_command_is_stopped_at_a_line_and_killed_with_what_it_started_past_its_seconds(tmp_path):
    waits = "import time; print('step 2/4', flush=True); time.sleep(20)"
    assert accept.run(["-c", waits], stop_at="step 2/") == (-signal.SIGTERM, "step 2/4\n")
    path = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(1.6); pathlib.Path({str(path)!r}).touch()"
    words = ["-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"]
    status, _ = accept.run(words, seconds=1)  # it reads as long as anything can write
    assert status == 124 and not path.exists()


def test_the_rows_of_a_check_are_printed(capsys, monkeypatch, tmp_path):
    rows = [("one", "1", True), ("two", "2", False)]
    monkeypatch.setitem(accept.CHECKS, "bare", ([lambda flags, folder: iter(rows)], "", ""))
    accept.do_check("bare", str(tmp_path), "--flag")
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line.removeprefix("ROW ")) for line in lines] == [[*row] for row in rows]


def all_checks(patch, folder, outputs, minutes=0):
    """Return main()'s status and acceptance.json where checks print these."""
    clock = iter(range(0, 10**6, 60 * minutes or 1))
    patch.setattr(accept, "default_timer", lambda: next(clock))
    patch.setattr(accept, "run", lambda words, **_: outputs.get(words[1], (0, "")))
    card = types.SimpleNamespace(stdout="Tesla V100, 7.0")
    patch.setattr(accept.subprocess, "run", lambda *_, **__: card)
    patch.chdir(folder)
    return accept.main(), json.loads(Path("acceptance.json").read_text(encoding="utf-8"))


def test_all_rows_and_the_log_are_in_the_file(tmp_path, monkeypatch):
    outputs = {name: (0, f"log of {name}\n{GOOD}") for name in accept.CHECKS}
    status, report = all_checks(monkeypatch, tmp_path, outputs)
    assert status == 0 and [row[3] for row in report["rows"]] == [True] * len(outputs)
    assert [name for name in outputs if f"log of {name}\n" not in report["log"]] == []
    assert report["cards"] == "Tesla V100, 7.0" and report["packages"]["torch"]
    assert len(report["script_sha256"]) == 64


@pytest.mark.parametrize("output", [(0, BAD), (1, GOOD), (-6, "")])
def test_where_to_look_first(tmp_path, monkeypatch, capsys, output):
    outputs = {"float16": output, "memory": (1, "")}
    status, report = all_checks(monkeypatch, tmp_path, outputs)
    assert status == 1 and next(row[0] for row in report["rows"] if row[3] is False) == "float16"
    said = capsys.readouterr().out.splitlines()[-1]
    assert accept.CHECKS["float16"][2] in said and accept.CHECKS["memory"][2] not in said


def test_what_there_was_no_time_for_is_not_done(tmp_path, monkeypatch):
    outputs = {"model": (0, GOOD), "bare": (0, GOOD), "fla": (137, "")}
    status, report = all_checks(monkeypatch, tmp_path, outputs, minutes=3)
    judged = {row[0]: row[3] for row in report["rows"]}
    assert status == 0 and judged.keys() == accept.CHECKS.keys()
    assert judged["fla"] is None and judged["two"] is None
