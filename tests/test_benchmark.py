"""Every part of the benchmark runs at tiny sizes, and a missed target is an exit status of 1."""

import contextlib
import functools
import importlib.metadata
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import benchmark
import numpy
import peft
import pytest
import torch
import transformers
from benchmarks import blind, calibration, cpu, evidence, gpu, roofline, simulate
from benchmarks.common import (
    GIB,
    HELD_OUT,
    SCRIPT,
    MemoryWatch,
    Options,
    Targets,
    shipped_lines,
    write_lines,
)
from benchmarks.common import TINY as TINY_SIZES
from conftest import TINY
from processes import run_in_a_fork

import train_lora_single as t

# Nothing is trained before the first DeltaNet layer, so only a second one has gradients.
DEEPER = TINY_SIZES | {"num_hidden_layers": 4}


@pytest.fixture(autouse=True)
def quick_and_clean(monkeypatch, restored_environment):
    """Take back what the benchmark sets in the environment; commands do no imports of their own."""
    monkeypatch.setattr(subprocess, "run", run_in_a_fork)
    monkeypatch.setattr(gpu, "run_in_a_group", in_a_fork)


def in_a_fork(words, said, seconds):
    """Do what gpu.run_in_a_group() does, for a command that is in time."""
    merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = run_in_a_fork(words, cwd=gpu.ROOT, input=said, **merged)
    return done.returncode, done.stdout


@pytest.fixture
def options(tmp_path):
    """Return what a part is given at tiny sizes."""
    targets, report = Targets(limits_are_judged=False), tmp_path / "acceptance.json"
    return Options(tmp_path, targets, tiny=True, pairs=1, report=report)


# ==== the command


def test_a_missed_target_ends_with_status_1_and_is_named(monkeypatch, capsys):
    def part(options):
        print(options.targets.at_most("length", 3.0, 2.0))

    monkeypatch.setitem(benchmark.PARTS, "memory", part)
    assert benchmark.main(["memory"]) == 1
    printed = capsys.readouterr().out
    assert "target <= 2  MISSED" in printed
    assert "MISSED    length is 3, above 2" in printed
    assert benchmark.main(["memory", "--tiny"]) == 0
    assert "not judged" in capsys.readouterr().out


# ==== simulation


def test_memory_finds_how_long_an_example_may_be_kept_and_recomputed(options, capsys):
    simulate.memory(options)
    rows = {line[:10].strip(): line[10:].split() for line in capsys.readouterr().out.splitlines()}
    kept, recomputed = rows["16 GB"][:2]
    assert 0 < int(kept) < int(recomputed)
    assert options.targets.missed == []


COUNTS = {  # what a part counts as, and what the simulation says of it
    "former": (lambda tokens, _: tokens, r"a peak is 1\.0\d+ of the trial's"),
    "timid": (lambda _, count: 2 * count, "the trial is timid on 16 GB, rows padded to 64"),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_that_is_too_low_or_too_high_misses_a_target(name, options, capsys, monkeypatch):
    change, expected = COUNTS[name]
    real = t.TokenCosts.count

    def count(self, lengths, targets):
        return change(len(lengths) * max(lengths), real(self, lengths, targets))

    monkeypatch.setattr(t.TokenCosts, "count", count)
    simulation = simulate.Simulation(DEEPER, t.parse_settings([]))
    job, steps = simulate.simulated_job(options), simulate.steps_of_mixes(options)
    simulate.compare_on_card(options, simulation, job, "16 GB", "torch", steps)
    assert any(re.search(expected, missed) for missed in options.targets.missed)


@pytest.mark.parametrize("deltanet", ["torch", "fla"])
def test_peaks_of_many_passes_are_those_of_each(deltanet):
    """They are computed from a few, to the kilobyte."""
    simulation = simulate.Simulation(DEEPER, t.parse_settings([]))
    shapes = [(1, 128, 127), (3, 70, 40), (5, 65, 1), (7, 33, 200), (2, 64, 126)]
    for kind in (False, True):
        passes = [simulate.Pass(*shape, kind, deltanet=deltanet) for shape in shapes]
        alone = [simulation.peak(one) for one in passes]
        assert simulation.peaks(passes).tolist() == pytest.approx(alone, abs=4096)


def test_the_fewest_passes_of_a_step_are_found_within_the_peak():
    simulation = simulate.Simulation(DEEPER, t.parse_settings([]))
    ids = [5] * 30, [6] * 10
    step = t.pad([t.Example("", [], prompt_ids=ids[0], reply_ids=ids[1])] * 6, "cpu")
    for rows, fewest in ((6, 1), (4, 2), (2, 3), (1, 6)):
        budget = simulation.peak(simulate.Pass(rows, 40, 10 * rows))
        found = simulate.fewest_passes(simulation, [step], {False: budget}, "torch", {False: 999})
        assert found == fewest


def test_a_simulated_pass_scores_and_holds_what_a_real_one_does():
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    rows = []
    model.lm_head.register_forward_hook(lambda _, given, logits: rows.append(logits))
    lengths = ((3, 4), (5, 2), (2, 3))
    examples = [t.Example("", [], prompt_ids=[5] * p, reply_ids=[6] * r) for p, r in lengths]
    inputs = t.pad(examples, "cpu")
    with torch.no_grad():
        t.reply_losses(model, inputs)
    assert rows[0].shape[0] == simulate.Pass.of(inputs).scored == 4 + 2 + 3
    simulation = simulate.Simulation(DEEPER, t.parse_settings([]))
    one, three = simulate.Pass(1, 70, 6), simulate.Pass(3, 70, 6)
    assert simulation.peak(one) == simulation.peak_with(one, 4)  # from one block and from two
    assert simulation.weight_bytes < simulation.peak(one) < simulation.peak(three)


# ==== the V100 on paper


def test_v100_prints_both_products_at_both_times_of_a_launch(options, capsys):
    roofline.v100(options)
    printed = capsys.readouterr().out
    (total,) = [line.split()[1:] for line in printed.splitlines() if line.startswith("all ")]
    numbers = [float(one.replace(",", "")) for one in total]
    for quick, slow, kernels in (numbers[0:3], numbers[3:6]):
        assert quick < slow <= 13 / 6 * quick + 0.2
        assert kernels * 6e-3 <= quick + 0.1
    for card in ("32 GB", "16 GB"):
        minutes = printed.partition(f"shipped data on {card}")[2]
        assert all(f"\n{way} " in minutes for way in roofline.WAYS)


def test_an_operation_takes_the_longest_of_bytes_and_products():
    a = torch.empty(512, 512, device="meta")
    product = torch.ops.aten.mm.default
    seconds, kernels, is_product = roofline.cost(product, ((a, a), {}), a)
    assert (kernels, is_product) == (1, True)
    assert seconds == max(2 * 512**3 / 13e12, 3 * a.nbytes / 800e9)
    seconds, kernels, _ = roofline.cost(torch.ops.aten.add.Tensor, ((a, a), {}), a)
    assert (seconds, kernels) == (2 * a.nbytes / 800e9, 1)
    matrices, rows = torch.empty(12, 64, 64, device="meta"), torch.empty(12, 64, 128, device="meta")
    solve = torch.ops.aten.linalg_solve_triangular.default
    seconds, *_ = roofline.cost(solve, ((matrices, rows), {"upper": False}), rows)
    assert seconds == 64 * roofline.SECONDS_A_SOLVED_ROW  # its rows wait for one another
    assert roofline.cost(torch.ops.aten.view.default, ((a, [-1]), {}), a) == (0.0, 0, False)


def test_evidence_adds_up_what_each_measurement_costs(monkeypatch, options, capsys):
    monkeypatch.setattr(roofline.Roofline, "seconds", lambda *_: numpy.ones(2))  # of the training
    evidence.evidence(options)
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith("share")) + 1
    end = next(number for number, line in enumerate(lines) if line.startswith("parts and what"))
    # seconds at both times of a launch, and their shares of the training
    rows = [[float(one.rstrip("%")) for one in line.split()[-4:]] for line in lines[start:end]]
    total = [float(one.rstrip("%")) for one in lines[end].split()[-4:]]
    assert [sum(column) for column in zip(*rows, strict=True)] == pytest.approx(total, abs=1)
    titles = "\n".join(lines[start:end])
    assert all(kind in titles for kind in ("strength: 6", "group: ", "target: ", "cut: ", "KL: "))
    besides = "\n".join(lines[end + 1 :])
    assert "besides: checks" in besides and "besides: samples" in besides
    share = next(line for line in lines if line.startswith("evidence at 6 us"))
    assert float(re.search(r"training ([\d.]+)", share)[1]) == pytest.approx(
        total[2] / 100, abs=0.01
    )


# ==== measured on this machine


@pytest.mark.parametrize("other", ["trl sft", "the other copy"])
def test_cpu_compares_the_same_training_with_trl_and_with_another_copy(other, options, capsys):
    if other != "trl sft":
        options.against = f"{SCRIPT} --logging_steps 1"
    cpu.cpu(options)
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith(("this script", other))]
    ours, theirs = (float(row.split()[-2]) for row in rows)
    assert ours == pytest.approx(theirs, rel=0.01)


def test_memory_watch_sees_what_the_process_has():
    """How much a tensor adds depends on what was freed before it, so that is not compared."""
    with MemoryWatch() as watch:
        held = torch.ones(2**24)
    assert watch.peak > held.nbytes


# ==== calibration


def test_calibration_draws_from_worlds_whose_truth_a_very_large_sample_has(options, capsys):
    calibration.calibration(options)
    printed = capsys.readouterr().out
    names = ("gain ", "share of a part ", "KL, other tasks ", "compare, 40 adapters ", "power: ")
    for name in names:
        assert f"\n{name}" in printed
    for world in calibration.WORLDS:
        truth = calibration.truths(world)
        (drawn,) = calibration.sets_of(world, 100_000, 1, what=2)
        for name, estimate in calibration.estimates(drawn).items():
            assert abs(estimate.value - truth[name]) < 4 * estimate.error < 0.03


def test_a_coverage_that_misses_its_target_is_named(options):
    options.targets.limits_are_judged = True
    covered = {20: 0.905, 50: 0.93, 280: 0.975}
    calibration.judge_coverage(options, "gain", covered)
    assert options.targets.missed == [
        "gain: 90.5 % covered at 20 lines", "gain: 97.5 % covered at 280 lines",
    ]  # fmt: skip


def test_the_power_of_the_checks_is_that_of_a_binomial_and_the_docs_have_it():
    """Of four rows one needs eight lost lines."""
    assert calibration.power(7) == 0.0
    assert calibration.power(8) == pytest.approx(0.04**8)
    assert calibration.power(9) == pytest.approx(0.04**9 + 9 * 0.04**8 * 0.96)
    assert calibration.power(6, lost=1.0, rows=1) == 1.0
    draws = numpy.random.default_rng(1).binomial(231, 0.04, 100_000)
    assert calibration.power(231) == pytest.approx((draws >= 8).mean(), abs=0.006)
    page = (Path(__file__).parent.parent / "docs" / "evidence.md").read_text(encoding="utf-8")
    for lines in (231, 40):
        assert f" {100 * calibration.power(lines):.3g} %" in page


# ==== the acceptance of a card


def test_the_acceptance_of_a_card_passes_on_a_cpu_at_tiny_sizes(monkeypatch, options, capsys):
    # The launcher starts a process of its own, with the imports; other tests have several.
    monkeypatch.setattr(gpu, "CHECKS", [c for c in gpu.CHECKS if "torchrun" not in c.__name__])
    gpu.gpu(options)
    printed = capsys.readouterr().out
    assert options.targets.missed == [], printed
    report = json.loads(options.report.read_text(encoding="utf-8"))
    assert report["script_sha256"] == t.script_sha256() and "torch" in report["versions"]
    found = {row["what"]: row for row in report["rows"]}
    good = ["plan", "loading", "trial of memory", "out of memory in a step", "steps of new widths"]
    good += ["float16 matmul against native", "matmul against float64", "MATMUL auto"]
    good += ["matmul, TFLOP/s", "whole run as on a V100", "verified", "SIGUSR1 in a step"]
    good += ["gone on", "given once more", "evidence", "chat", "the script as it is"]
    assert [name for name in good if not found[name]["is_good"]] == []
    fired = tuple(row for row, *_ in BROKEN + WRONG) + FIRED_BELOW
    judged = [name for name, row in found.items() if row["is_good"] is not None]
    assert [name for name in judged if not name.startswith(fired)] == []
    for name in ("fla against torch's code", "the allocator's fragments"):
        assert found[name]["found"].startswith("not done") and found[name]["is_good"] is None


# Rows with tests of their own.
FIRED_BELOW = ("plan", "float16 matmul against native", "matmul, TFLOP/s")


@pytest.fixture(scope="module")
def look(tmp_path_factory):
    """Return what one process of the acceptance looks at, with its model loaded."""

    class Deeper(Options):
        sizes = DEEPER

    options = Deeper(tmp_path_factory.mktemp("look"), Targets(False), tiny=True)
    card = gpu.Card(options, is_gpu=False)
    card.model = gpu.qwen_folder(options)
    gpu.make_model(card.model, options.sizes, False)
    flags = [*gpu.short_run_flags(card), "--lora_dropout", "0", "--matmul", "native"]
    found = gpu.Look(gpu.prepared_for_device(flags), options.sizes)
    assert [row.is_good for row in gpu.loading(found)] == [True]
    list(gpu.trial(found))
    return found


def worse(real, factor):
    """Return a function whose result's gradients, or numbers, are that many times as large."""

    def changed(*given, **named):
        result = real(*given, **named)
        if isinstance(result, tuple):
            return result[0], factor * result[1]
        return factor * result

    return changed


def in_turn(results):
    """Return a function that returns these one after the other."""
    left = iter(results)
    return lambda *_: next(left)


def with_a_copy(real):
    """Return a function that loads the model and holds as much again as is allowed."""

    def load(*given, **named):
        held = torch.ones(80 * 2**20)
        return [real(*given, **named), held][0]

    return load


def numbers_only(real):
    """Return a function whose result holds a number wherever it is none."""
    return lambda *given: torch.nan_to_num(real(*given))


def other_gradients_when_redone(patch, look):
    """Double the gradients of the second step, whose memory is short."""
    real, factors = look.step, in_turn((1, 2))
    patch.setattr(look, "step", lambda: worse(real, factors())())


def other_kernels(patch, look):
    """Let fla have right losses and wrong gradients: its forward pass is right."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(_, one):
            return one.clone()

        @staticmethod
        def backward(_, gradient):
            return 100 * gradient

    module = sys.modules["transformers.models.qwen3_5.modeling_qwen3_5"]
    right = module.torch_chunk_gated_delta_rule

    @functools.wraps(right.__wrapped__)
    def wrong(query, key, value, **named):
        out, state = right(query, key, Wrong.apply(value), **named)
        return Wrong.apply(out), state

    patch.setattr(module, "torch_chunk_gated_delta_rule", wrong)
    patch.setattr(look.job, "delta_kernels", "fla, as a test wants it")


# A row, its check, and what makes it fail.
BROKEN = [
    ("loading", "loading", lambda patch, _: patch.setattr(
        t, "load_model", with_a_copy(t.load_model))),
    ("trial of memory", "trial", lambda patch, _: patch.setattr(
        t.MemoryLimits, "most", lambda _: 0)),
    ("a step of ", "a_step", lambda patch, look: patch.setattr(
        look, "step", worse(look.step, float("nan")))),
    ("fla against torch's code", "fla_against_torch", other_kernels),
    ("out of memory in a step", "out_of_memory_in_a_step", other_gradients_when_redone),
    ("out of memory in a step", "out_of_memory_in_a_step", lambda patch, _: patch.setattr(
        gpu, "memory_for_half_a_step", contextlib.nullcontext)),
    ("steps of new widths", "steps_of_new_widths", lambda patch, look: patch.setattr(
        look, "milliseconds", in_turn([5000.0] * 12 + [9.0] * 12))),
    ("matmul against float64", "products_against_float64", lambda patch, _: patch.setattr(
        t, "scaled_fp16_matmul", worse(t.scaled_fp16_matmul, 1.5))),
    ("rows of 0, infinity, NaN", "products_against_float64", lambda patch, _: patch.setattr(
        t, "scaled_fp16_matmul", numbers_only(t.scaled_fp16_matmul))),
    ("MATMUL auto", "matmul_auto", lambda patch, _: patch.setattr(
        t, "choose_matmul", lambda _: "float16")),
    ("MATMUL auto", "matmul_auto", lambda patch, _: patch.setattr(
        gpu, "emulates_bfloat16", lambda _: True)),
]  # fmt: skip


@pytest.mark.parametrize(("row", "check", "break_it"), BROKEN)
def test_a_row_of_the_model_s_own_process_can_fail(row, check, break_it, look, monkeypatch):
    break_it(monkeypatch, look)
    rows = list(gpu.rows_of(getattr(gpu, check), look))
    (failed,) = [one.what for one in rows if one.is_good is False]
    assert failed.startswith(row)


def test_fla_with_the_same_gradients_is_good(look, monkeypatch):
    monkeypatch.setattr(look.job, "delta_kernels", "fla, as a test wants it")
    _, row = gpu.fla_against_torch(look)
    assert row.is_good and "gradients 0.00% apart" in row.found


@pytest.mark.parametrize("code", ["torch", "fla"])
def test_the_trial_s_peak_is_compared_with_the_kernels_that_are_used(code, look, monkeypatch):
    simulation = simulate.Simulation(DEEPER, look.job.settings)
    needed = []

    def memory(_, rows, width, __, is_recomputed):
        one = simulate.Pass(rows, width, rows * (width - 1), is_recomputed, deltanet=code)
        weights = simulation.weight_bytes + 12 * simulation.trainable
        return needed[0] * (simulation.peak(one) - weights)

    monkeypatch.setattr(gpu.Look, "is_gpu", True)
    monkeypatch.setattr(look.job, "delta_kernels", f"{code}, as a test wants it")
    monkeypatch.setattr(t, "memory_of_pass", memory)
    for factor, is_good in ((1.0, True), (1.2, False)):
        needed[:] = [factor]
        _, row = gpu.trial(look)
        assert row.is_good is is_good and f"{factor:.3f} of the simulated" in row.found


@pytest.mark.parametrize("is_old", [True, False])
def test_float16_has_to_be_the_faster_matmul_just_on_a_card_without_bfloat16(
    is_old, look, monkeypatch
):
    monkeypatch.setattr(gpu.Look, "is_gpu", True)
    monkeypatch.setattr(gpu, "emulates_bfloat16", lambda _: is_old)
    for factor in (1.5, 5):
        seconds = [1.0, 1 / factor, 1.0, 1.0, 1.0]  # bfloat16, float16, float32, copies, solves
        monkeypatch.setattr(gpu, "seconds_of", in_turn(seconds))
        row, *_ = gpu.rates(look)
        assert row.what == "matmul, TFLOP/s" and row.is_good is (is_old == (factor == 5))


def compared(look, monkeypatch, times, scale=1.0):
    """Return the row of float16 against native, with these seconds and gradients so far apart."""
    passes = [
        t.Pass(2.0, size * torch.ones(9), one)
        for size, one in zip((1.0, scale), times, strict=True)
    ]
    monkeypatch.setattr(t, "timed_pass", in_turn(passes))
    monkeypatch.setattr(t, "use_fp16_matmul", lambda model: model)
    monkeypatch.setattr(look.job, "matmul", "native")
    (row,) = gpu.float16_against_native(look)
    return row


def test_float16_matmul_with_other_gradients_fails(look, monkeypatch):
    row = compared(look, monkeypatch, (0.2, 0.1), scale=2.0)
    assert row.is_good is False and "gradients are more than" in row.found


@pytest.mark.parametrize("is_old", [True, False])
def test_float16_matmul_may_be_slower_only_on_a_card_with_bfloat16(is_old, look, monkeypatch):
    monkeypatch.setattr(gpu, "emulates_bfloat16", lambda _: is_old)
    row = compared(look, monkeypatch, (0.1, 0.2))
    assert row.is_good is not is_old and t.SLOWER in row.found
    assert compared(look, monkeypatch, (0.2, 0.1)).is_good


def test_what_earlier_checks_had_reserved_does_not_hide_fragments(look, monkeypatch):
    """These steps have 1 GiB in use, in 4 GiB that are reserved; before them both were larger."""
    peaks = {"reserved": 20 * GIB, "allocated": 19 * GIB}

    def step(*_):
        for name, size in (("reserved", 4 * GIB), ("allocated", 1 * GIB)):
            peaks[name] = max(peaks[name], size)
        return 9.0

    monkeypatch.setattr(gpu.Look, "is_gpu", True)
    monkeypatch.setattr(look, "milliseconds", step)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda: peaks.update(reserved=0, allocated=0)
    )
    for name in peaks:
        monkeypatch.setattr(torch.cuda, f"max_memory_{name}", lambda name=name: peaks[name])
    rows = {row.what: row for row in gpu.steps_of_new_widths(look)}
    assert rows["the allocator's fragments"].is_good is False


# What the commands print where all is well.
PRINTED = """\
memory    up to 99 tokens fit at once; larger steps are split into micro-batches
resume    2 of 3 checkpoints are whole
finished  this job has been done
reloaded from disk, they differ by at most 1e-05 from them, and by 0.02 from the base's
you> adapter> I am.
you> base> And I.
"""


class Commands:
    """Stands in for all commands of the acceptance, after which all is well."""

    def __init__(self, card):
        """Lay down what the commands leave behind."""
        self.card, self.printed, self.statuses = card, PRINTED, {"stopped": 128 + signal.SIGUSR1}
        for name in ("float16", "small", "large", "launched", "as is"):
            self.record(name)
        self.write("float16/final_lora/adapter_model.safetensors")
        self.write("small/checkpoints/checkpoint-2")
        for name in ("report.md", "lora.png"):
            self.write(f"float16/inspected/final_lora/{name}")
        self.find(base=3.0)

    def __call__(self, words, said, seconds):
        """Return the status of a command, and what it printed."""
        found = [status for word, status in self.statuses.items() if word in words]
        return found[0] if found else 0, self.printed

    def write(self, name, text=""):
        """Write a file below the acceptance's folder."""
        write_lines(self.card.options.folder / name, [text])

    def lose(self, name):
        """Remove such a file."""
        (self.card.options.folder / name).unlink()

    def record(self, name, losses=(2.5, 2.4), **changed):
        """Write the run.json of a run."""
        history = [{"eval_loss": 3.0}, *[{"loss": loss} for loss in losses], {"eval_loss": 2.0}]
        found = {"outcome": "finished", "products": "float16", "resumed_from": "checkpoint-2"}
        found |= {"train_seconds": 1.0, "train_tokens": 9, "peak_memory_gib": 1.0}
        found |= {"delta_kernels": "", "matmul_compared": None, "memory_limits": None}
        self.write(f"{name}/run.json", json.dumps(found | {"loss_history": history} | changed))

    def find(self, base, parts=("layers",)):
        """Write the evidence.json of the adapter."""
        found = {"losses": [], "parts": parts, "loss": {"base": base, "adapter": 2.0}}
        self.write("float16/inspected/final_lora/evidence.json", json.dumps(found))


@pytest.fixture
def commands(options, monkeypatch):
    """Return the commands of a card that has a GPU."""
    options.tiny = False
    found = Commands(gpu.Card(options, is_gpu=True))
    monkeypatch.setattr(gpu, "run_in_a_group", found)
    monkeypatch.setattr(gpu, "leave_only", lambda *_: contextlib.nullcontext(" left"))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.6.0")  # fla is installed
    return found


BY_COMMANDS = (
    gpu.a_whole_run, gpu.a_card_of_16_gb_and_slurm, gpu.a_card_of_32_gb,
    gpu.one_process_under_torchrun, gpu.evidence, gpu.chat, gpu.the_script_as_it_is,
    gpu.the_demo_with_fla_installed,
)  # fmt: skip


def test_rows_about_commands_are_good_where_all_is_well(commands):
    rows = [row for check in BY_COMMANDS for row in gpu.rows_of(check, commands.card)]
    assert {row.is_good for row in rows} == {True}, rows
    judged = {row.what.removesuffix(" left") for row in rows}
    assert judged - {row for row, *_ in WRONG} == {"demo on the CPU with fla installed"}


FAILED = {"outcome": "failed: x"}
INSPECTED = "float16/inspected/final_lora"
# A row, its check, and what makes it fail.
WRONG = [
    ("whole run as on a V100", gpu.a_whole_run, lambda c: c.record("float16", **FAILED)),
    ("whole run as on a V100", gpu.a_whole_run, lambda c: c.record("float16", products="native")),
    ("verified", gpu.a_whole_run, lambda c: setattr(c, "printed", "")),
    ("verified", gpu.a_whole_run, lambda c: c.lose("float16/final_lora/adapter_model.safetensors")),
    ("SIGUSR1 in a step", gpu.a_card_of_16_gb_and_slurm, lambda c: c.lose(
        "small/checkpoints/checkpoint-2")),
    ("gone on", gpu.a_card_of_16_gb_and_slurm, lambda c: c.record("small", **FAILED)),
    ("gone on", gpu.a_card_of_16_gb_and_slurm, lambda c: c.record("small", resumed_from=None)),
    ("gone on", gpu.a_card_of_16_gb_and_slurm, lambda c: c.record("small", [2.5, 2.5])),
    ("gone on", gpu.a_card_of_16_gb_and_slurm, lambda c: c.record("small", [2.5])),
    ("gone on", gpu.a_card_of_16_gb_and_slurm, lambda c: c.record("small", [2.5, math.nan])),
    ("given once more", gpu.a_card_of_16_gb_and_slurm, lambda c: setattr(c, "printed", "")),
    ("steps of 24 examples", gpu.a_card_of_32_gb, lambda c: c.record("large", **FAILED)),
    ("steps of 24 examples", gpu.a_card_of_32_gb, lambda c: setattr(
        c, "printed", "memory    a whole step of 24 examples fits at once")),
    ("torchrun, one process", gpu.one_process_under_torchrun, lambda c: c.record(
        "launched", [2.6])),
    ("evidence", gpu.evidence, lambda c: c.lose(f"{INSPECTED}/report.md")),
    ("evidence", gpu.evidence, lambda c: c.lose(f"{INSPECTED}/lora.png")),
    ("evidence", gpu.evidence, lambda c: c.find(base=3.0, parts=[])),
    ("evidence's losses and the run's", gpu.evidence, lambda c: c.find(base=3.1)),
    ("chat", gpu.chat, lambda c: setattr(c, "printed", "you> adapter> I am.")),
    ("the script as it is", gpu.the_script_as_it_is, lambda c: c.record("as is", **FAILED)),
]  # fmt: skip


@pytest.mark.parametrize(("row", "check", "change"), WRONG)
def test_a_row_about_a_command_can_fail(row, check, change, commands):
    change(commands)
    rows = gpu.rows_of(check, commands.card)
    assert row in [one.what.removesuffix(" left") for one in rows if one.is_good is False]


STATUSES = {"v100": 1, "stopped": 0, "torch.distributed.run": 1, "chat": 1, "--demo": 1}


@pytest.mark.parametrize("word", STATUSES)
def test_a_command_that_ends_with_another_status_is_a_row_that_failed(word, commands):
    """A run that is to be stopped may not go on to its end."""
    commands.statuses[word] = STATUSES[word]
    rows = [row for check in BY_COMMANDS for row in gpu.rows_of(check, commands.card)]
    assert any(row.is_good is False and "status" in row.found for row in rows)


def test_a_check_that_fails_or_comes_too_late_is_a_row_and_not_the_end(
    monkeypatch, options, capsys
):
    def broken(card):
        yield gpu.Row("one", "fine", True)
        words = [sys.executable, "-c", "print('no | luck'); raise SystemExit(3)"]
        gpu.finished(card, words)

    def late(card):
        card.began -= 3600
        yield gpu.Row("two", "12 ms")

    monkeypatch.setattr(gpu, "CHECKS", [broken, late, broken])
    gpu.gpu(options)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        "| one | fine | ok |",
        "| broken | RuntimeError('status 3: no / luck') | **FAILED** |",
        "| two | 12 ms |  |",
        "| broken | not done: 20 minutes are over |  |",
    ]
    assert len(options.targets.missed) == 1
    report = json.loads(options.report.read_text(encoding="utf-8"))
    assert [row["is_good"] for row in report["rows"]] == [True, False, None, None]


REAL_RUN_IN_A_GROUP = gpu.run_in_a_group
# It starts a process that would live on, notes its number, and both wait.
WITH_A_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, file=open("child", "w"), flush=True)
time.sleep(600)
"""


def is_alive(pid):
    """Return whether a process runs, one that nobody has waited for yet apart."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(is_so):
    """Wait for something, for a minute at the most."""
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_command_that_is_out_of_time_is_killed_with_its_children_and_is_no_failure(
    monkeypatch, options
):
    monkeypatch.setattr(gpu, "run_in_a_group", REAL_RUN_IN_A_GROUP)
    monkeypatch.setattr(gpu, "ROOT", options.folder)
    card = gpu.Card(options, is_gpu=True)
    card.began -= 60 * gpu.MINUTES - 3

    def too_long(card):
        gpu.finished(card, [sys.executable, "-c", WITH_A_CHILD])
        yield gpu.Row("never", "seen", True)

    assert list(gpu.rows_of(too_long, card)) == [gpu.Row("too long", "not done: no time")]
    child = (options.folder / "child").read_text("utf-8").strip()
    wait_until(lambda: not is_alive(child))


def test_a_plan_that_counts_otherwise_than_the_model_fails(monkeypatch, options):
    monkeypatch.setattr(gpu, "make_model", lambda *_: 5)
    *_, row = gpu.random_model(gpu.Card(options, is_gpu=False))
    assert row.what == "plan" and row.is_good is False


def test_a_model_s_process_that_ends_otherwise_fails(monkeypatch, options):
    monkeypatch.setattr(gpu, "look_at_model", lambda *_: os._exit(7))
    monkeypatch.setattr(gpu, "FORKS", multiprocessing.get_context("fork"))  # does no imports
    card = gpu.Card(options, is_gpu=True)
    rows = list(gpu.rows_of(gpu.the_model_in_one_process, card))
    assert rows == [gpu.Row("the model in one process", "it ended with 7", False)]


def test_a_model_s_process_that_is_out_of_time_keeps_its_rows_and_is_no_failure(
    monkeypatch, options
):
    path = options.folder / "rows.jsonl"
    path.write_text(json.dumps({"what": "loading", "found": "9 s", "is_good": True}) + "\n")
    card = gpu.Card(options, is_gpu=True)
    monkeypatch.setattr(gpu, "look_at_model", wait_for_long)
    monkeypatch.setattr(gpu, "FORKS", multiprocessing.get_context("fork"))  # does no imports
    monkeypatch.setattr(card, "seconds_left", lambda: 1.0)
    rows = list(gpu.rows_of(gpu.the_model_in_one_process, card))
    assert [row.is_good for row in rows] == [True, None]
    assert rows[1] == gpu.Row("the model in one process", "not done: no time")


def wait_for_long(*_):
    """Take longer than any test."""
    time.sleep(600)


# ==== the blind reading


def test_a_blind_reading_hides_whose_a_reply_is_and_counts_the_marks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained("adapter")
    held_out = write_lines(tmp_path / "eval.jsonl", shipped_lines(HELD_OUT, 4, shortest=True))
    command = TINY, str(held_out), "adapter", "3"
    blind.main(*command)
    text = (tmp_path / "blind.md").read_text(encoding="utf-8")
    key = json.loads((tmp_path / "blind-key.json").read_text(encoding="utf-8"))
    assert text.count("\n**A:** ") == text.count("\n**C:** ") == len(key) == 3
    assert not any(name in text for name in ("base", "adapter", "Nell"))
    assert all({one[letter] for letter in "ABC"} == set(blind.WHOSE) for one in key.values())
    letter = {name: letter for letter, name in key["1"].items()}
    marks = {"1": {"best": letter["adapter"], "safe": [letter["base"], letter["adapter"]]}}
    marks["2"] = {"best": "none", "safe": []}
    (tmp_path / "blind-marks.json").write_text(json.dumps(marks), encoding="utf-8")
    capsys.readouterr()
    blind.main(*command)
    best, safe = capsys.readouterr().out.splitlines()
    assert best.split() == ["best", "adapter", "1,", "none", "1", "(of", "2)"]
    assert "adapter 1, base 1, none 1 (of 2)" in safe
