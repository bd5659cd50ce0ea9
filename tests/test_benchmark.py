"""Every part of the benchmark runs at tiny sizes, and a missed target is an exit status of 1."""

import json
import math
import re
import subprocess
import time

import benchmark
import peft
import pytest
import torch
import transformers
from benchmarks import behaviour, blind, evidence, measure, precision, roofline, simulate
from benchmarks.common import HELD_OUT, ROOT, TRAIN, Options, Targets, shipped_lines
from benchmarks.common import TINY as TINY_SIZES
from conftest import TINY, needs_inspector
from processes import run_in_a_fork

import train_lora_single as t


@pytest.fixture(autouse=True)
def quick_and_clean(monkeypatch, restored_environment):
    """Take back what the benchmark sets in the environment; commands do no imports of their own."""
    monkeypatch.setattr(subprocess, "run", run_in_a_fork)


@pytest.fixture
def options(tmp_path):
    """Return what a part is given at tiny sizes."""
    return Options(tmp_path, Targets(limits_are_judged=False), tiny=True, pairs=1)


def example_of(prompt, reply):
    """Return an example with so many tokens to read and to learn."""
    example = t.Example("here:1", [])
    example.prompt_ids, example.reply_ids = [5] * prompt, [6] * reply
    return example


# ==== the command


def test_a_missed_target_ends_with_status_1_and_is_named(monkeypatch, capsys):
    def part(options):
        print(options.targets.at_most("length", 3.0, 2.0))

    monkeypatch.setitem(benchmark.PARTS, "memory", part)
    assert benchmark.main(["memory"]) == 1
    printed = capsys.readouterr().out
    assert "target <= 2  MISSED" in printed
    assert "MISSED    length is 3, above 2" in printed


def test_met_targets_and_tiny_sizes_end_with_status_0(monkeypatch, capsys):
    def part(options):
        print(options.targets.at_most("length", 3.0, 2.0 if options.tiny else 3.0))

    monkeypatch.setitem(benchmark.PARTS, "memory", part)
    assert benchmark.main(["memory"]) == 0
    assert benchmark.main(["memory", "--tiny"]) == 0
    assert "not judged" in capsys.readouterr().out


def test_an_unknown_part_and_no_part_are_refused(capsys):
    for arguments in (["cut"], []):
        with pytest.raises(SystemExit) as error:
            benchmark.main(arguments)
        assert error.value.code == 2
    assert "v100" in capsys.readouterr().err


# ==== simulation


def test_flops_compares_both_cards_with_the_floor(options, capsys):
    simulate.flops(options)
    rows = {line[:33].strip(): line[33:].split() for line in capsys.readouterr().out.splitlines()}
    assert float(rows["the floor: one by one"][1]) == 1
    ours = [float(rows[f"this script, {card}"][1]) for card in simulate.CARDS]
    recomputed = float(rows["this script, all recomputed"][1])
    assert 1 <= max(ours) < recomputed < float(rows["TRL's defaults"][1])
    passes = [int(rows[f"this script, {card}"][4]) for card in simulate.CARDS]
    assert passes[0] < passes[1]  # the smaller card needs more parts
    assert options.targets.missed == []


def test_memory_prints_less_where_activations_are_recomputed(options, capsys):
    simulate.memory(options)
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("4 x 96 tokens"))
    kept, recomputed = map(float, row.split()[-2:])
    assert recomputed < kept
    limits = next(line for line in printed.splitlines() if line.startswith("16 GB"))
    assert int(limits.split()[2]) <= int(limits.split()[3])


def test_as_many_tokens_are_scored_as_the_simulation_counts():
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    rows = []
    model.lm_head.register_forward_hook(lambda _, given, logits: rows.append(logits))
    inputs = t.pad([example_of(3, 4), example_of(5, 2), example_of(2, 3)], "cpu")
    with torch.no_grad():
        t.reply_losses(model, inputs)
    assert rows[0].shape[0] == simulate.Pass.of(inputs).scored == 4 + 2 + 3


def test_the_work_of_a_pass_is_that_of_the_real_products():
    settings = t.parse_settings(["--lora_target_modules", "q_proj"])
    simulation = simulate.Simulation(TINY_SIZES, settings)
    one = simulate.Pass(2, 70, 6)
    head = simulation.flops(one) - simulation.flops(simulate.Pass(2, 70, 0))
    # Forward, and backward for the hidden states; the words' own gradient is not computed.
    assert head == 2 * 2 * 6 * TINY_SIZES["vocab_size"] * TINY_SIZES["hidden_size"]


def test_what_a_pass_costs_with_all_layers_follows_from_two_blocks():
    sizes = TINY_SIZES | {"num_hidden_layers": 6}
    simulation = simulate.Simulation(sizes, t.parse_settings([]))
    one = simulate.Pass(2, 70, 6)
    assert (
        simulation.flops(one) == simulation.flops_with(one, 6) > 2 * simulation.flops_with(one, 2)
    )
    assert simulation.peak(one) == simulation.peak_with(one, 6)


def test_the_peak_of_two_rows_is_more_than_that_of_one_by_its_activations():
    simulation = simulate.Simulation(TINY_SIZES, t.parse_settings([]))
    peaks = [simulation.peak(simulate.Pass(rows, 70, 0)) for rows in (1, 2, 3)]
    assert simulation.weight_bytes < peaks[0]
    assert math.isclose(peaks[2] - peaks[1], peaks[1] - peaks[0], rel_tol=0.01)


# ==== the V100 on paper


def test_v100_prints_every_way_at_both_times_of_a_launch(options, capsys):
    roofline.v100(options)
    printed = capsys.readouterr().out
    totals = [line.split()[1:] for line in printed.splitlines() if line.startswith("all ")]
    assert len(totals) == 1
    for total in totals:
        numbers = [float(one.replace(",", "")) for one in total]
        for quick, slow, kernels in (numbers[0:3], numbers[3:6], numbers[6:9]):
            assert quick < slow <= 13 / 6 * quick + 0.2
            assert kernels * 6e-3 <= quick + 0.1
    assert "Not counted: the optimizer" in printed
    for card in ("32 GB", "16 GB"):
        minutes = printed.partition(f"shipped data on {card}")[2]
        assert all(f"\n{way} " in minutes for way in ("bf16", "fp16", "TRL"))


def test_an_operation_takes_the_longest_of_bytes_and_products():
    a = torch.empty(512, 512, device="meta")
    product = torch.ops.aten.mm.default
    seconds, kernels, is_product = roofline.cost(product, ((a, a), {}), a)
    assert (kernels, is_product) == (1, True)
    assert seconds == max(2 * 512**3 / 13e12, 3 * a.nbytes / 800e9)
    seconds, kernels, _ = roofline.cost(torch.ops.aten.add.Tensor, ((a, a), {}), a)
    assert (seconds, kernels) == (2 * a.nbytes / 800e9, 1)
    assert roofline.cost(torch.ops.aten.view.default, ((a, [-1]), {}), a) == (0.0, 0, False)


# ==== the evidence on paper


@needs_inspector
def test_evidence_adds_up_what_each_measurement_costs(options, capsys):
    evidence.evidence(options)
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith("share")) + 1
    end = next(number for number, line in enumerate(lines) if line.startswith("all "))
    # seconds at both times of a launch, and their shares of the training
    rows = [[float(one.rstrip("%")) for one in line.split()[-4:]] for line in lines[start:end]]
    total = [float(one.rstrip("%")) for one in lines[end].split()[-4:]]
    assert [sum(column) for column in zip(*rows, strict=True)] == pytest.approx(total, abs=1)
    assert all(0 <= quick <= slow for quick, slow, *_ in rows)
    titles = "\n".join(lines[start:end])
    kinds = ("strength: 6 parts", "group: ", "target: ", "cut: ", "KL: ", "answers")
    assert all(kind in titles for kind in kinds)
    assert any("samples" in line for line in lines[end + 1 :])  # not counted: they may end sooner
    share = next(line for line in lines if line.startswith("evidence at 6 us"))
    assert float(re.search(r"training ([\d.]+)", share)[1]) == pytest.approx(
        total[2] / 100, abs=0.01
    )


def test_evidence_says_that_it_needs_the_other_file(options, monkeypatch):
    monkeypatch.setattr(evidence, "inspector", None)
    with pytest.raises(SystemExit, match=r"inspect_lora\.py must lie beside train_lora_single"):
        evidence.evidence(options)


def test_a_pass_with_the_adapter_costs_more_than_one_of_the_base():
    simulation = simulate.Simulation(TINY_SIZES, t.parse_settings([]))
    base, adapter = (evidence.loss(simulation, simulate.Pass(2, 70, 6), on) for on in (False, True))
    assert (base < adapter).all()


def test_passes_of_losses_are_those_of_the_trainer():
    examples = [example_of(3, 4), example_of(5, 2), example_of(2, 3)]
    found = evidence.passes_of_losses(examples, 14)
    assert found == [simulate.Pass(2, 7, 6), simulate.Pass(1, 5, 3)]


# ==== measured on this machine


def test_cpu_compares_the_same_training_with_trl(options, capsys, monkeypatch):
    # The forks are children of another process, so that their processors' time is not known here.
    monkeypatch.setattr(measure, "processor_seconds", time.perf_counter)
    measure.cpu(options)
    printed = capsys.readouterr().out
    losses = [
        float(line.split()[-2])
        for line in printed.splitlines()
        if line.startswith(("this ", "trl "))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert "ratio" in printed


def test_refuse_names_the_bad_line(options, capsys):
    measure.refuse(options)
    printed = capsys.readouterr().out
    named = re.search(r"the line is named +([\d.]+)", printed)
    ended = re.search(r"the end.* ([\d.]+)\n", printed)
    assert 0 < float(named[1]) < float(ended[1])


def test_startup_times_each_function(options, capsys):
    measure.startup(options)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*measure.FUNCTIONS, "imports", "the command"))


def test_scale_reads_as_many_lines_as_it_says(options, capsys):
    measure.scale(options)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows if row[0].isdecimal()] == ["20", "40"]


def test_loading_reads_a_checkpoint_that_is_a_hole(options, capsys):
    measure.loading(options)
    printed = capsys.readouterr().out
    assert "855,812 parameters" in printed
    file = options.folder / "qwen" / "model.safetensors"
    assert file.stat().st_blocks * 512 < file.stat().st_size / 10
    assert "copies of the model" in printed


def test_words_gives_the_loss_that_readme_compares_the_demo_with(options, capsys):
    measure.words(options)
    loss = float(capsys.readouterr().out.split()[-1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data" / "demo-model")
    counts = torch.ones(len(tokenizer), dtype=torch.float64)
    learned = {}
    for path in (TRAIN, HELD_OUT):
        replies = [json.loads(line)["completion"][0]["content"] for line in shipped_lines(path)]
        learned[path] = torch.cat([torch.tensor(tokenizer.encode(one)) for one in replies])
    ends = torch.tensor([tokenizer.eos_token_id] * len(shipped_lines(TRAIN)))
    counts += torch.bincount(torch.cat([learned[TRAIN], ends]), minlength=len(counts))
    learned[HELD_OUT] = torch.cat([learned[HELD_OUT], ends[: len(shipped_lines(HELD_OUT))]])
    expected = -(counts / counts.sum()).log()[learned[HELD_OUT]].mean()
    assert loss == pytest.approx(float(expected), abs=0.01)
    assert f"would have {loss:.2f}." in (ROOT / "README.md").read_text(encoding="utf-8")


def test_memory_watch_sees_what_is_allocated_meanwhile():
    with measure.MemoryWatch() as before:
        pass
    with measure.MemoryWatch() as watch:
        held = torch.ones(2**24)
    assert held.nbytes * 0.9 < watch.peaks["own"] - before.peaks["own"] < held.nbytes * 1.5


# ==== precision


def test_precision_prints_three_seeds_their_mean_and_spread(options, capsys):
    precision.precision(options)
    printed = capsys.readouterr().out
    for way in precision.WAYS:
        rows = [line for line in printed.splitlines() if line.startswith(way.name)]
        assert len(rows) == 2  # two models
        for row in rows:
            *each, mean, spread, _ = row.removeprefix(way.name).split()
            numbers = [float(one.rstrip("%")) for one in (*each, mean, spread)]
            assert len(each) == len(precision.SEEDS)
            assert min(numbers[:3]) <= numbers[3] <= max(numbers[:3])
            assert 0 < numbers[4] < numbers[3] < 5
    assert options.targets.missed == []  # "auto" takes float16 where it is faster


def test_products_compares_the_losses_of_both_runs(options, capsys):
    precision.products(options)
    printed = capsys.readouterr().out
    assert "4 steps" in printed
    rows = [line.split()[2:] for line in printed.splitlines() if " products  " in line]
    dtype, float16 = ([float(one) for one in row] for row in rows)
    assert dtype == pytest.approx(float16, rel=0.01)
    assert options.targets.missed == []


# ==== what an adapter says


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """Return the folder of an adapter with random weights; results go into tmp_path."""
    monkeypatch.chdir(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "run" / "final_lora")
    return str(tmp_path / "run" / "final_lora")


def few_held_out(path, count):
    lines = (t.HERE / "data" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    short = sorted(lines, key=len)[:count]
    path.write_text("\n".join(short) + "\n", encoding="utf-8")
    return str(path)


@needs_inspector
def test_a_blind_reading_hides_whose_a_reply_is_and_counts_the_marks(adapter, tmp_path, capsys):
    command = TINY, few_held_out(tmp_path / "eval.jsonl", 4), adapter, "3"
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


@needs_inspector
def test_the_behaviour_of_base_and_adapter_is_counted_by_kind(adapter, tmp_path, capsys):
    behaviour.main(TINY, few_held_out(tmp_path / "eval.jsonl", 3), adapter)
    out = capsys.readouterr().out
    totals = [line.split() for line in out.splitlines() if line.startswith("all ")]
    assert [row[1] for row in totals] == ["3", "3"] and totals[0][2] != totals[1][2]
    assert totals[0][3:] == ["-"] * 3 and totals[1][-1] == "3"  # the base gives no replies
    found = json.loads((tmp_path / "behaviour-eval-run.json").read_text(encoding="utf-8"))
    losses = [sum(row["loss"] for row in rows) for rows in found.values()]
    tokens = sum(row["tokens"] for row in found["base"])
    assert totals[0][2] == f"{losses[0] / tokens:.4f}"
