"""The card's acceptance: each of its rows is good where all is right, and can fail."""

import itertools
import json
import math
import signal
import types
from pathlib import Path

import accept_gpu as accept
import pytest
import runs
import torch
import transformers
from toys import TOY

from inspect_lora.model import load_weights
from train_lora.micro_batches import micro_batches

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
        patch.setattr(accept, "LONG", 200)
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


FLOAT16 = {  # what of the script is changed how, and whether the rows are good then
    "nothing": ("token_losses", changed(lambda losses: losses), True),
    "a loss": ("token_losses", changed(lambda losses: 1.02 * losses), False),
    "NaN": ("token_losses", changed(lambda losses: math.nan * losses), False),
    "nothing goes back": (
        "scaled_fp16_matmul",
        lambda real: lambda rows, weight: real(rows, weight) * (not weight.is_contiguous()), False,
    ),
    "a scale": (
        "scaled_fp16_matmul",
        changed(lambda rows: torch.cat([rows[..., :-1, :], 2 * rows[..., -1:, :]], -2)), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FLOAT16)
def test_what_is_wrong_in_float16_is_seen(made, monkeypatch, what):
    name, change, expected = FLOAT16[what]
    runs.replace_ours(monkeypatch, name, change(getattr(runs.ours_with(name)[0], name)))
    assert is_good(accept.gradient(made.float16, made.folder)) == expected


def test_recomputation_that_differs_is_seen(made, tmp_path, monkeypatch):
    """As where a recomputed layer draws another dropout, or runs another kernel."""
    monkeypatch.setattr(made.float16, "tokens_at_once", 512)
    is_recomputed = lambda: made.float16.tokens_at_once == 64  # noqa: E731
    for layer in made.float16.layers:
        err = lambda _, __, rows: rows * (1.2 if is_recomputed() else 1)  # noqa: E731
        monkeypatch.setattr(layer.mlp, "_forward_hooks", {0: err})
    assert False in [row[2] for row in accept.gradient(made.float16, tmp_path)]


def test_fla_that_cannot_be_used_is_known_before_anything_is_loaded(flags, monkeypatch, capsys):
    refuse = lambda *_, **__: pytest.fail("the weights were loaded")  # noqa: E731
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    accept.do_check("fla", "folder", *flags)
    assert "ROW" not in capsys.readouterr().out


@pytest.mark.parametrize("matmul", ["native", "float16"])
def test_the_demo_as_on_the_cpu(flags, monkeypatch, matmul):
    monkeypatch.setattr(accept, "DEMO", TOY)
    own_type = ["--dtype=bfloat16", f"--matmul={matmul}"]
    assert is_good(accept.compare_with_cpu([*flags, *own_type], Path()))


BROKEN = {  # where torch computes it, its share of error, and whether bfloat16's row is good then
    "convolution": (torch.nn.functional, "conv1d", 0.01, True),
    "triangular solve": (torch.linalg, "solve_triangular", 0.02, True),
    "SDPA": (torch.nn.functional, "scaled_dot_product_attention", 0.03, True),
    "norm": (torch, "rsqrt", 0.01, True),
    "norm, by far": (torch, "rsqrt", 0.1, False),
}


@pytest.mark.parametrize("kernel", BROKEN)
def test_a_kernel_that_errs_on_the_card_is_seen(flags, monkeypatch, kernel):
    """The CPU is the card here: what is computed once a second model is loaded is the card's."""
    module, name, share, is_good_in_bfloat16 = BROKEN[kernel]
    compute, load, loaded = getattr(module, name), load_weights, []
    chance = torch.Generator().manual_seed(0)

    def err(*arguments, **options):
        result = compute(*arguments, **options)
        if len(loaded) < 2:
            return result
        factors = 1 + share * torch.randn(result.shape, generator=chance)
        return result * factors.to(result.dtype)

    monkeypatch.setattr(accept, "DEMO", TOY)
    runs.replace_ours(
        monkeypatch, "load_weights", lambda *words: loaded.append(words) or load(*words)
    )
    monkeypatch.setattr(module, name, err)
    rows = accept.compare_with_cpu([*flags, "--dtype=bfloat16"], Path())
    assert [row[2] for row in rows] == [False, is_good_in_bfloat16]


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


def test_a_step_that_runs_out_of_memory(full, tmp_path):
    assert is_good(accept.out_of_memory(full, tmp_path))


def test_a_step_that_loses_a_micro_batch_when_memory_runs_out(full, tmp_path, monkeypatch):
    real = micro_batches

    def lose_one(inputs, tokens_at_once, chunk):
        parts = list(real(inputs, tokens_at_once, chunk))
        return parts if tokens_at_once == 64 else parts[:1]

    runs.replace_ours(monkeypatch, "micro_batches", lose_one)
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
    train = runs.write_talks(tmp_path / "train.jsonl", range(16))
    flags = [f"--model_name={TOY}", "--device=cpu", "--max_steps=4", "--logging_steps=1"]
    flags += [f"--train_file={train}", f"--eval_file={train}"]

    def run(words, stop_at=""):
        with monkeypatch.context() as patch:
            if stop_at:
                runs.at_step(patch, 2, runs.send(signal.SIGTERM))
            end = runs.command(capfd, words[1:])
        assert stop_at in end.out
        return end.status, end.out

    monkeypatch.setattr(accept, "run", run)
    monkeypatch.setattr(accept, "STEPS", 4)
    assert is_good(accept.bare_command(flags, tmp_path))


@pytest.mark.parametrize(
    "fault", ["none", "status", "begun anew", "loss", "steps", "outcome", "adapter"]
)
def test_faults_of_the_bare_command(tmp_path, monkeypatch, fault):
    output = tmp_path / "bare"

    def run(words, stop_at=""):
        if stop_at:
            (output / "checkpoints" / "job" / "checkpoint-2").mkdir(parents=True)
            return 1 if fault == "status" else 143, stop_at
        losses = [2.0, 3.0, 2.5, math.nan if fault == "loss" else 2.2]
        history = [{"loss": one} for one in losses[: 3 if fault == "steps" else 4]]
        history += [{"eval_loss": 3.0}, {"eval_loss": 2.0}]
        outcome = "failed" if fault == "outcome" else "finished"
        sessions = [{"matmul": "native", "peak_gib": 1.0}]
        record = {"outcome": outcome, "loss_history": history, "sessions": sessions}
        (output / "run.json").write_text(json.dumps(record), encoding="utf-8")
        for name in ["final_lora", "final_lora_vllm"][: 1 if fault == "adapter" else 2]:
            (output / name).mkdir()
            (output / name / "adapter_model.safetensors").touch()
        return 0, "step 1/4" if fault == "begun anew" else "step 3/4"

    monkeypatch.setattr(accept, "run", run)
    monkeypatch.setattr(accept, "STEPS", 4)
    assert is_good(accept.bare_command([], tmp_path)) == (fault == "none")


@pytest.mark.parametrize("key, factor", [("loss", 1), ("loss", 1.1), ("grad_norm", 0.9)])
def test_two_processes(tmp_path, monkeypatch, key, factor):
    """Both do the same step, without dropout."""

    def run(words):
        assert "--lora_dropout=0" in words
        output = Path(words[-1].partition("--output_dir=")[2])
        entry = {"loss": 2.0, "grad_norm": 3.0}
        entry[key] *= factor if "--nproc-per-node=2" in words else 1
        output.mkdir()
        (output / "run.json").write_text(json.dumps({"loss_history": [entry]}), encoding="utf-8")

    monkeypatch.setattr(accept, "run", run)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert list(accept.two_processes([], tmp_path)) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert is_good(accept.two_processes([], tmp_path)) == (factor == 1)


def test_the_rows_of_a_check_are_printed(capsys, monkeypatch, tmp_path):
    row = ["what", "found", False]
    monkeypatch.setitem(accept.CHECKS, "bare", ([lambda flags, folder: iter([row])], "", ""))
    accept.do_check("bare", str(tmp_path), "--flag")
    assert json.loads(capsys.readouterr().out.removeprefix("ROW ")) == row


def all_checks(patch, folder, outputs, times=(0.0,)):
    """Return main()'s status and acceptance.json where checks print these, and begin at times."""
    clock = itertools.chain([0.0], times, itertools.repeat(times[-1]))
    patch.setattr(accept, "default_timer", lambda: next(clock))
    patch.setattr(accept, "run", lambda words, **_: outputs.get(words[1], (0, "")))
    patch.setenv("PATH", str(folder))  # where nvidia-smi may be
    patch.chdir(folder)
    return accept.main(), json.loads(Path("acceptance.json").read_text(encoding="utf-8"))


def test_all_rows_and_the_log_are_in_the_file(tmp_path, monkeypatch):
    outputs = {name: (0, f"log of {name}\n{GOOD}") for name in accept.CHECKS}
    query = tmp_path / "nvidia-smi"
    query.write_text("#!/bin/sh\necho Tesla V100, 7.0\n")
    query.chmod(0o755)
    status, report = all_checks(monkeypatch, tmp_path, outputs)
    assert status == 0 and [row[3] for row in report["rows"]] == [True] * len(outputs)
    assert [name for name in outputs if f"log of {name}\n" not in report["log"]] == []
    assert report["cards"] == "Tesla V100, 7.0\n" and report["packages"]["torch"]


@pytest.mark.parametrize("output", [(0, BAD), (1, GOOD), (-6, ""), (-9, "")])
def test_where_to_look_first(tmp_path, monkeypatch, capsys, output):
    outputs = {"float16": output, "memory": (1, "")}
    status, report = all_checks(monkeypatch, tmp_path, outputs)
    assert status == 1 and next(row[0] for row in report["rows"] if row[3] is False) == "float16"
    last = capsys.readouterr().out.splitlines()[-1]
    assert accept.CHECKS["float16"][2] in last and accept.CHECKS["memory"][2] not in last


def test_what_there_was_no_time_for_is_not_done(tmp_path, monkeypatch):
    """It may end by the signal, by being killed, or never begin; an error is a fault even late."""
    outputs = {"native": (124, GOOD), "float16": (137, ""), "memory": (1, ""), "two": (0, BAD)}
    times = [0.0, 90.0, 200.0, 400.0, 500.0, accept.SECONDS - 0.4, accept.SECONDS]
    status, report = all_checks(monkeypatch, tmp_path, outputs, times)
    judged = {name: [row[3] for row in report["rows"] if row[0] == name] for name in accept.CHECKS}
    assert status == 1 and judged["native"] == [True, None] and judged["memory"] == [False]
    assert judged["float16"] == judged["fla"] == judged["two"] == [None]
