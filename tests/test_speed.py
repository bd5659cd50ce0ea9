"""What makes a run fast changes no result: the order of the batches, kept activations, several processes."""

import collections
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from trl import SFTConfig, SFTTrainer

import train_lora_single as t


def cut(folder, **lines):
    """Write the first lines of the shipped files to folder; return the flags that name the new files."""
    flags = []
    for name, number in lines.items():
        text = Path("data", f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(text[:number]), encoding="utf-8")
        flags += [f"--{name}_file", str(folder / f"{name}.jsonl")]
    return flags


def losses(history):
    """Return (step, loss) and (step, eval loss) in order."""
    return [(e["step"], e[key]) for e in history for key in ("loss", "eval_loss") if key in e]


# ---- the batches ----------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path):
    """Return (args, trainer) over 13 training and 20 eval lines, without dropout, before training."""
    flags = ["--demo", "--lora_dropout", "0", "--num_epochs", "2", "--output_dir", str(tmp_path / "output")]
    args = t.parse_args([*flags, *cut(tmp_path, train=13, eval=20)])
    _, tokenizer = t.load_config_and_tokenizer(args)
    rows = [t.encode(t.read_examples(path), tokenizer, 1024) for path in (args.train_file, args.eval_file)]
    trainer = t.build_trainer(args, tokenizer, *rows)
    t.keep_activations(trainer, rows[0], args)
    return args, trainer


def test_the_losses_are_those_of_trl_with_its_defaults(prepared, tiny, tmp_path):
    args, trainer = prepared
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    config = SFTConfig(
        output_dir=str(tmp_path / "trl"), seed=args.seed, num_train_epochs=2, learning_rate=args.learning_rate,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, lr_scheduler_type="cosine",
        bf16=False, use_cpu=True, logging_steps=1, save_strategy="no", report_to="none",
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=t.LORA_TARGET_MODULES, task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    by_trl = SFTTrainer(
        model, config, None, trainer.train_dataset, processing_class=trainer.processing_class, peft_config=lora
    )
    assert by_trl.model.load_state_dict(start, strict=False).unexpected_keys == []
    sampler = trainer._get_train_sampler()
    by_trl._get_train_sampler = lambda dataset=None: sampler
    recomputed = []
    for one in (trainer, by_trl):
        layer = next(m for m in one.model.modules() if isinstance(m, GradientCheckpointingLayer))
        layer.register_forward_hook(lambda module, *_: recomputed.append(module.gradient_checkpointing))
        one.args.eval_strategy, one.args.eval_on_start = "no", False
        one.train()
    assert recomputed == [False] * (len(recomputed) // 2) + [True] * (len(recomputed) // 2)
    ours, theirs = (losses(one.state.log_history) for one in (trainer, by_trl))
    assert len(ours) == 8 and ours == [(step, pytest.approx(loss, abs=1e-3)) for step, loss in theirs]


def test_the_longest_batch_comes_first_and_batches_hold_like_lengths(prepared):
    _, trainer = prepared
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    loader = trainer.get_train_dataloader()
    for epoch in range(3):
        loader.set_epoch(epoch)
        batches = [batch["attention_mask"] for batch in loader]
        assert batches[0].shape == (2, max(lengths))
        assert sum(mask.sum() for mask in batches) == sum(lengths)


def test_evaluation_takes_four_times_the_batch_sorted_by_length(prepared):
    _, trainer = prepared
    masks = [batch["attention_mask"] for batch in trainer.get_eval_dataloader()]
    assert [len(mask) for mask in masks] == [8, 8, 4]
    lengths = torch.cat([mask.sum(1) for mask in masks]).tolist()
    assert lengths == sorted(lengths) and len(set(lengths)) > 10


# ---- two processes --------------------------------------------------------------------------------------------------

STEPS = "4 steps, 2 an epoch: ceil(16 / (2 x 2 x 2)) x 2"


def launch(flags, seen=lambda line, process: None, script="train_lora_single.py"):
    """Run script in two processes; call seen(line, launcher) at each line; return (status, stdout, stderr)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": "."}
    errors = Path(flags[-1], "stderr")
    errors.parent.mkdir(exist_ok=True)
    with errors.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
        lines = []
        for line in process.stdout:
            lines.append(line)
            seen(line, process)
        return process.wait(60), "".join(lines), errors.read_text(encoding="utf-8")


def sections(text):
    """Return how often each section stands in what was printed, by its first word."""
    return collections.Counter(line.split()[0] for line in text.splitlines() if line[:1].isalpha())


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags for a demo on 16 training and 4 eval lines, two epochs, without dropout."""
    flags = ["--demo", "--lora_dropout", "0", "--num_epochs", "2", "--logging_steps", "1", "--num_samples", "1"]
    return [*flags, "--max_new_tokens", "3", *cut(tmp_path_factory.mktemp("data"), train=16, eval=4), "--output_dir"]


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    """Return the losses and the adapter of one process with twice the batches a step."""
    output = tmp_path_factory.mktemp("alone")
    t.main(["--gradient_accumulation_steps", "4", *flags, str(output)])
    history = json.loads((output / "run.json").read_text(encoding="utf-8"))["loss_history"]
    return losses(history), load_file(output / "final_lora" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def interrupted(flags, tmp_path_factory):
    """Return (output, status, stdout, stderr) of two processes of which the second got SIGTERM after step 1."""

    def terminate(line, launcher):
        if "step 1/4" in line:
            workers = psutil.Process(launcher.pid).children(recursive=True)
            next(worker for worker in workers if worker.environ().get("RANK") == "1").send_signal(signal.SIGTERM)

    output = tmp_path_factory.mktemp("two")
    return output, *launch([*flags, str(output)], terminate)


@pytest.fixture(scope="module")
def resumed(interrupted, flags, tmp_path_factory):
    """Return (output, status, stdout, stderr) of the same launch again, on a copy of what the first left."""
    output = tmp_path_factory.mktemp("resumed")
    subprocess.run(["cp", "-a", f"{interrupted[0]}/.", output], check=True)
    return output, *launch([*flags, str(output)])


def test_a_signal_to_one_process_stops_both_after_the_same_step_with_one_checkpoint(interrupted):
    output, status, text, errors = interrupted
    found = sections(text)
    assert status and STEPS in text and "Traceback" not in errors.split("torch/distributed/elastic")[0]
    assert found.pop("data") == 2 and found.pop("train") + found.pop("eval") >= 2
    assert found == dict.fromkeys(["tokens", "example", "plan", "device", "model"], 1)
    (checkpoint,) = (output / "checkpoints").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert 1 <= step <= 3
    message = f"stopped at step {step} of 4; the same command goes on from {output}/checkpoints/checkpoint-{step}"
    assert message in errors and f"{message}\n" in (output / "all_logs.log").read_text(encoding="utf-8")
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} < {path.name for path in checkpoint.iterdir()}
    assert (checkpoint / "complete.json").exists() and not (output / "final_lora").exists()
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["outcome"] == f"interrupted: {message}"


def test_one_process_does_not_go_on_with_what_two_began(interrupted, flags, tmp_path, capsys):
    subprocess.run(["cp", "-a", f"{interrupted[0]}/.", tmp_path], check=True)
    with pytest.raises(SystemExit) as stop:
        t.main([*flags, str(tmp_path)])
    assert stop.value.code == 1
    (row,) = [line.split() for line in capsys.readouterr().err.splitlines() if "PROCESSES" in line]
    assert row == ["PROCESSES", "2", "1"]


def test_the_same_launch_goes_on_and_equals_one_process_with_twice_the_batches_a_step(resumed, alone):
    output, status, text, errors = resumed
    assert status == 0, errors
    found = sections(text)
    assert {found[name] for name in ("plan", "resume", "model", "proof", "samples", "done", "next")} == {1}
    history = json.loads((output / "run.json").read_text(encoding="utf-8"))["loss_history"]
    assert losses(history) == [(step, pytest.approx(loss, abs=1e-4)) for step, loss in alone[0]]
    adapter = load_file(output / "final_lora" / "adapter_model.safetensors")
    assert adapter.keys() == alone[1].keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, alone[1][name], rtol=0, atol=1e-4)


def test_two_processes_leave_what_one_leaves(resumed):
    output, *_ = resumed
    names = {"all_logs.log", "checkpoints", "final_lora", "final_lora_vllm", "loss.png", "run.json", "samples.md"}
    assert {path.name for path in output.iterdir()} == names | {"stderr"}
    kept = sorted((output / "checkpoints").glob("checkpoint-*"))
    assert kept and all((path / f"rng_state_{rank}.pth").exists() for path in kept for rank in (0, 1))


def test_after_a_finished_run_two_processes_start_anew_even_if_the_second_looks_late(resumed, flags, tmp_path):
    subprocess.run(["cp", "-a", f"{resumed[0]}/.", tmp_path / "out"], check=True)
    late = tmp_path / "late.py"
    late.write_text(
        "import os, time\nimport train_lora_single as t\nhashes = t.hashes\n"
        "t.hashes = lambda folder: (hashes(folder), time.sleep(int(os.environ['RANK'])))[0]\nt.main()"
    )
    status, text, errors = launch([*flags, f"{tmp_path}/out"], script=str(late))
    assert status == 0, errors
    found = sections(text)
    assert found["moved"] > 1 and found["done"] == 1 and "resume" not in found


def test_two_processes_refuse_a_bad_line_once_whichever_finds_it_first(flags, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n', encoding="utf-8")
    slow = tmp_path / "slow.py"  # the launcher ends all when the first ends, and only the main process speaks
    slow.write_text(
        "import os, time\ntime.sleep(1 - int(os.environ['RANK']))\nimport train_lora_single as t\nt.main()"
    )
    command = [*flags[:-1], "--train_file", f"{tmp_path}/bad.jsonl", flags[-1], f"{tmp_path}/out"]
    status, text, errors = launch(command, script=str(slow))
    assert status and (text + errors).count(f"{tmp_path}/bad.jsonl:1: messages is []") == 1
