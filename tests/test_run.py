"""Whole runs on the demo model: what they print and leave, and the guards between injection and final_lora."""

import argparse
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import tqdm
import transformers
import trl.trainer.utils
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3_5ForConditionalGeneration,
    TrainerCallback,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import train_lora_single as t

ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
TOKENIZER_FILES = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
RESULTS = {"final_lora", "final_lora_vllm", "samples.md", "loss.png"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags for a demo on the first 13 training and 4 eval lines, two epochs of four steps."""
    folder, flags = tmp_path_factory.mktemp("data"), ["--demo", "--num_epochs", "2", "--logging_steps", "2"]
    flags += ["--num_samples", "2", "--max_new_tokens", "5"]
    for name, lines in (("train", 13), ("eval", 4)):
        text = Path("data", f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(text[:lines]), encoding="utf-8")
        flags += [f"--{name}_file", str(folder / f"{name}.jsonl")]
    return flags


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """Return the output folder and the stdout of the real command."""
    output = tmp_path_factory.mktemp("run") / "output"
    command = [sys.executable, "train_lora_single.py", *small, "--output_dir", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


@pytest.fixture
def prepared(small, tmp_path):
    """Return (args, tokenizer, config, rows, eval rows) as run() makes them."""
    args = t.parse_args([*small, "--output_dir", str(tmp_path / "output")])
    config, tokenizer = t.load_config_and_tokenizer(args)
    rows = [t.encode(t.read_examples(path), tokenizer, 1024) for path in (args.train_file, args.eval_file)]
    return args, tokenizer, config, *rows


def train(trainer, args, config, rows):
    """Train as run() does and return the record."""
    record = {}
    t.train(trainer, args, t.make_plan(args, config, len(rows)), record)
    return record


@pytest.fixture
def adapted(tiny):
    """Return the demo model with a LoRA that changes it."""
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=t.LORA_TARGET_MODULES, lora_dropout=0.05, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny, dtype="float32"), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_the_output_tells_the_run_in_order(finished):
    output, text = finished
    words = [line.split()[0] for line in text.splitlines() if line[:1].isalpha()]
    story = ["data", "data", "tokens", "example", "plan", "device", "model", "eval", *["train"] * 2]
    assert words == [*story, "eval", *["train"] * 2, "eval", "proof", "samples", "done", "next"]
    assert "8 steps, 4 an epoch: ceil(13 / (2 x 2)) x 2" in text
    assert "step 8/8" in text
    assert "weights are random" in text
    assert f"--max-lora-rank 8 --lora-modules companion={output}/final_lora_vllm \\\n" in text
    assert "2 held-out prompts answered" in text
    assert f"look at    {output}/samples.md, {output}/loss.png, {output}/run.json\n" in text
    assert 0.1 < float(re.search(r"\n +memory +([\d.]+) GiB at the peak of the process\n", text)[1]) < 50
    losses = [line.split()[-1] for line in text.splitlines() if line.startswith("eval ")]
    assert f"eval loss  {' -> '.join(losses)}\n" in text
    assert float(losses[-1]) < float(losses[0])
    lines = [line.replace(str(output), "output") for line in text.splitlines() if "jsonl" not in line]
    assert [line for line in lines if len(line) > 100] == []


def test_the_log_holds_what_was_printed_but_no_progress_bar(finished):
    output, text = finished
    log = (output / "all_logs.log").read_text(encoding="utf-8")
    head, *lines = [line for line in log.splitlines() if line.strip()]
    assert lines == [line for line in text.splitlines() if line.strip()]
    assert re.fullmatch(r"---- [-\d]{10} [:\d]{8} \S+ --demo .*", head) and f"--output_dir {output}" in head


def test_the_log_takes_a_line_in_pieces_and_with_a_carriage_return_but_no_bar():
    screen, log = io.StringIO(), io.StringIO()
    tee = t._Tee(screen, log)
    with tqdm.tqdm(total=2, file=tee, mininterval=0) as outer, tqdm.tqdm(total=2, file=tee, mininterval=0) as inner:
        inner.update()
        outer.update()
        outer.write("between two bars", file=tee)
    print("a", 1, "b\r\nc", file=tee)
    print("the end", file=tee)
    assert "50%" in screen.getvalue()
    lines = [line for line in log.getvalue().split("\n") if line]
    assert lines == ["between two bars", "a 1 b\r", "c", "the end"]


def test_a_run_leaves_exactly_these_files(finished):
    output, _ = finished
    assert {path.name for path in output.iterdir()} == {"all_logs.log", "checkpoints", "run.json"} | RESULTS
    assert {path.name for path in (output / "final_lora").iterdir()} == ADAPTER_FILES | TOKENIZER_FILES
    assert {path.name for path in (output / "final_lora_vllm").iterdir()} == ADAPTER_FILES - {"README.md"}


def test_a_run_takes_no_more_disk_than_its_plan_says(finished):
    output, text = finished
    planned = int(re.search(r"at most ([\d,]+) MB of disk", text)[1].replace(",", "")) * 10**6
    taken = sum(path.stat().st_size for path in output.rglob("*"))
    optimizer = max(path.stat().st_size for path in output.rglob("optimizer.pt"))
    adapter = (output / "final_lora" / "adapter_model.safetensors").stat().st_size
    assert taken < planned
    assert 2 * adapter < 1.1 * optimizer and optimizer < 3 * adapter  # AdamW's two moments


def test_the_adapter_is_float32_and_its_config_says_what_the_constants_say(finished):
    output, text = finished
    config = json.loads((output / "final_lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (8, 16, 0.05, "none")
    assert sorted(config["target_modules"]) == sorted(t.LORA_TARGET_MODULES)
    tensors = load_file(output / "final_lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert f"{sum(tensor.numel() for tensor in tensors.values()):,} of" in text


def test_the_adapted_layer_returns_wx_plus_scale_bax(finished, tiny):
    output, _ = finished
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    weight = base.get_submodule("model.layers.1.self_attn.q_proj").weight.detach().clone()
    tensors = load_file(output / "final_lora" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.model.layers.1.self_attn.q_proj.lora_{m}.weight"] for m in "AB")
    x = torch.randn(3, weight.shape[1])
    layer = PeftModel.from_pretrained(base, output / "final_lora").get_submodule(
        "base_model.model.model.layers.1.self_attn.q_proj"
    )
    by_hand = x @ weight.T + (16 / 8) * (x @ a.T) @ b.T
    torch.testing.assert_close(layer(x), by_hand)
    assert not torch.allclose(by_hand, x @ weight.T)


def test_the_vllm_form_has_the_names_peft_writes_for_the_wrapper(finished, tiny, tmp_path):
    output, _ = finished
    wrapper = Qwen3_5ForConditionalGeneration.from_pretrained(tiny)
    get_peft_model(wrapper, LoraConfig(target_modules=t.LORA_TARGET_MODULES)).save_pretrained(tmp_path)
    plain, vllm = (
        load_file(output / name / "adapter_model.safetensors") for name in ("final_lora", "final_lora_vllm")
    )
    assert vllm.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, vllm[name.replace(".model.model.", ".model.model.language_model.")])


def test_names_that_vllm_applies_as_they_are_get_no_second_form(prepared, tiny):
    args, tokenizer, config, *_ = prepared
    wrapper = Qwen3_5ForConditionalGeneration.from_pretrained(tiny)
    lora = LoraConfig(target_modules=t.LORA_TARGET_MODULES, lora_dropout=0.05, lora_alpha=16, task_type="CAUSAL_LM")
    t.save_adapter(get_peft_model(wrapper, lora), tokenizer, config, Path(args.output_dir), args)
    assert [path.name for path in Path(args.output_dir).iterdir()] == ["final_lora"]


def contents(path):
    """Return the bytes of a file, or of each file in a folder."""
    if path.is_file():
        return path.read_bytes()
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_second_run_moves_what_the_first_left_aside_unchanged(finished, small, tmp_path, capsys):
    output = shutil.copytree(finished[0], tmp_path / "output")
    before = {name: contents(output / name) for name in RESULTS | {"checkpoints", "run.json"}}
    t.main([*small, "--output_dir", str(output), "--seed", "7"])
    text, names = capsys.readouterr().out, {path.name for path in output.iterdir()}
    aside = {name: [path for path in output.iterdir() if path.name.startswith(f"{name}.2")] for name in before}
    assert {name: [*map(contents, paths)] for name, paths in aside.items()} == {n: [b] for n, b in before.items()}
    assert names == {"all_logs.log", *before, *(path.name for paths in aside.values() for path in paths)}
    assert [name for name in before if contents(output / name) == before[name]] == []
    for name, (path,) in aside.items():
        assert f"moved    {output}/{name} of an earlier run to {path}\n" in text
    assert "resume" not in text


def test_the_results_of_the_first_run_are_in_place_until_those_of_the_second_are_proved(
    finished, small, tmp_path, capsys
):
    output = shutil.copytree(finished[0], tmp_path / "output")
    t.main([*small, "--output_dir", str(output), "--num_epochs", "1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:1].isalpha()]
    moved = [re.findall(rf"{output}/(\S+) of an earlier run", line) for line in lines]
    words = [line.split()[0] for line in lines]
    start, end = words.index("model"), words.index("samples")
    assert {name for names in moved[:start] for name in names} == {"checkpoints", "run.json"}
    assert [names for names in moved[start:end] if names] == []
    assert {name for names in moved[end:] for name in names} == RESULTS


def test_without_eval_file_nothing_is_evaluated(small, tmp_path, capsys, monkeypatch):
    ended = []  # the trackers are told, when all is trained
    monkeypatch.setattr(transformers.Trainer, "end", lambda self: ended.append(self.state.global_step))
    t.main([*small, "--output_dir", str(tmp_path / "output"), "--eval_file", "", "--num_epochs", "1"])
    text = capsys.readouterr().out
    assert "eval " not in text.replace("eval loss  not evaluated", "") and ended == [4]
    assert (tmp_path / "output" / "final_lora" / "adapter_model.safetensors").exists()


def test_a_model_that_is_no_wrapper_gets_no_vllm_form_not_even_an_older_one(finished, small, tiny, tmp_path, capsys):
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "plain")
    output = shutil.copytree(finished[0], tmp_path / "output")
    t.main([*small, "--output_dir", str(output), "--num_epochs", "1", "--model_name", str(tmp_path / "plain")])
    assert (output / "final_lora").exists() and not (output / "final_lora_vllm").exists()
    assert f"companion={output}/final_lora \\\n" in capsys.readouterr().out


def test_the_weights_of_the_real_job_are_bfloat16(small, tmp_path, capsys):
    flags = [*small, "--output_dir", str(tmp_path / "output"), "--num_epochs", "1", "--dtype", "bfloat16"]
    t.main(flags)
    tensors = load_file(tmp_path / "output" / "final_lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_one_step_is_a_run_that_learns(small, tmp_path):
    (tmp_path / "one.jsonl").write_text(
        Path("data/train.jsonl").read_text(encoding="utf-8").splitlines()[0], encoding="utf-8"
    )
    t.main(
        [
            *small,
            "--train_file",
            str(tmp_path / "one.jsonl"),
            "--num_epochs",
            "1",
            "--output_dir",
            str(tmp_path / "output"),
        ]
    )
    tensors = load_file(tmp_path / "output" / "final_lora" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


@pytest.fixture
def on_a_gpu(prepared, monkeypatch):
    """Return a function that trains one epoch on a GPU whose memory holds batches of so many tokens.

    One number is for a batch whose activations are kept, the other for one whose are recomputed. The function returns
    what each batch of the training had (tokens, recomputed or not), the logged losses, and each step's gradients.
    """
    args, tokenizer, config, rows, _ = prepared
    args.num_epochs = 1
    for name in ("set_per_process_memory_fraction", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)

    def run(kept, recomputed):
        trainer = t.build_trainer(args, tokenizer, rows, [])
        layers = [module for module in trainer.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        calls, batches, gradients = [], [], []

        def run_out(model, _, inputs, __):
            flags, tokens = {layer.gradient_checkpointing for layer in layers}, inputs["input_ids"].numel()
            assert len(layers) == 2 and len(flags) == 1 and layers[0].training
            batches.append((tokens, *flags))
            if tokens > (recomputed if True in flags else kept):
                raise torch.OutOfMemoryError("CUDA out of memory")

        class Gradients(TrainerCallback):
            def on_pre_optimizer_step(self, *_, model, **__):
                gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

        trainer.model.register_forward_hook(run_out, with_kwargs=True)
        trainer.add_callback(Gradients())
        t.keep_activations(trainer, rows, argparse.Namespace(**vars(args) | {"device": "cuda"}))
        assert [name for name, p in trainer.model.named_parameters() if p.grad is not None] == []
        batches.clear()
        layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        history = train(trainer, args, config, rows)["loss_history"]
        assert len(calls) == len(batches) + sum(again for _, again in batches)
        return batches, [entry for entry in history if "loss" in entry], gradients

    return run


def test_recomputing_activations_of_all_or_of_some_batches_changes_no_loss_and_no_gradient(on_a_gpu, capsys):
    (batches, losses, gradients), *others = [on_a_gpu(kept, 10_000) for kept in (10_000, 0, 400)]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory")]
    assert [again for _, again in others[0][0]] == [True] * len(batches) == [True] * 7
    assert {again for _, again in batches} == {False} and len(losses) == len(gradients) == 4
    for other_batches, other_losses, other_gradients in others:
        assert [tokens for tokens, _ in other_batches] == [tokens for tokens, _ in batches]
        for name in ("step", "loss", "grad_norm", "entropy", "mean_token_accuracy"):
            assert [entry[name] for entry in other_losses] == pytest.approx(
                [entry[name] for entry in losses], rel=1e-6
            )
        for step, other_step in zip(gradients, other_gradients, strict=True):
            torch.testing.assert_close(step, other_step)
    limit = int(re.search(r"up to ([\d,]+) tokens", lines[2])[1].replace(",", ""))
    assert "kept for all" in lines[0] and "recomputed for all" in lines[1] and 300 < limit <= 400
    assert others[1][0] == [(tokens, tokens > limit) for tokens, _ in batches]
    assert {again for _, again in others[1][0]} == {True, False}


def test_the_batches_that_are_tried_out_are_not_counted_as_trained_tokens(on_a_gpu, prepared):
    _, losses, _ = on_a_gpu(10_000, 10_000)
    assert losses[-1]["num_tokens"] == sum(len(row["input_ids"]) for row in prepared[3])


def test_a_batch_that_does_not_fit_even_with_recomputation_is_refused_before_the_first_step(on_a_gpu, prepared):
    longest = 2 * max(len(row["input_ids"]) for row in prepared[3])
    batches, *_ = on_a_gpu(300, longest)
    assert max(batches) == (longest, True)
    with pytest.raises(SystemExit, match=rf"^memory: a batch of {longest} tokens does not fit.*lower BATCH_SIZE"):
        on_a_gpu(300, longest - 1)


def test_each_constant_of_the_training_reaches_the_trainer(prepared):
    args, tokenizer, _, rows, eval_rows = prepared
    values = {"seed": 7, "learning_rate": 3e-3, "lr_scheduler_type": "linear", "save_steps": 3, "num_epochs": 5}
    values |= {"batch_size": 3, "gradient_accumulation_steps": 2, "warmup_ratio": 0.5, "lora_r": 4, "lora_alpha": 4}
    values |= {"lora_dropout": 0.2, "lora_target_modules": ["q_proj"], "model_revision": "v1"}
    vars(args).update(values)
    trainer = t.build_trainer(args, tokenizer, rows, eval_rows)
    got, lora = trainer.args, trainer.model.peft_config["default"]
    assert (got.seed, got.learning_rate, got.lr_scheduler_type, got.save_steps) == (7, 3e-3, "linear", 3)
    assert (got.num_train_epochs, got.per_device_train_batch_size, got.gradient_accumulation_steps) == (5, 3, 2)
    assert got.per_device_eval_batch_size == 12
    assert got.warmup_steps == 7  # half of ceil(13 / 6) x 5, rounded down
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (4, 4, 0.2, {"q_proj"})
    assert lora.revision == "v1"


def test_out_of_memory_names_the_settings_to_change(prepared, monkeypatch):
    args, tokenizer, config, rows, _ = prepared
    trainer = t.build_trainer(args, tokenizer, rows, [])

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trainer, "training_step", full)
    with pytest.raises(SystemExit, match="out of GPU memory at step 0; lower BATCH_SIZE"):
        train(trainer, args, config, rows)


def press(number):
    """Send this process a signal, as Ctrl-C or kill does."""
    os.kill(os.getpid(), number)
    time.sleep(5)
    raise AssertionError("the signal did not end the run")


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda: press(signal.SIGINT), 130),
        (lambda: press(signal.SIGTERM), 143),
        (lambda: fail(KeyboardInterrupt()), 130),
        (lambda: fail(KeyboardInterrupt("with a word")), 130),
        (lambda: fail(ZeroDivisionError("a bug")), None),
    ],
    ids=["Ctrl-C", "kill", "a library's KeyboardInterrupt", "one with a word", "a bug"],
)
def test_what_ends_a_run_stands_in_the_log(small, tmp_path, monkeypatch, capsys, end, status):
    monkeypatch.setattr(t, "warn_of_repeats", lambda *_: end())
    with pytest.raises(SystemExit if status else ZeroDivisionError) as stop:
        t.main([*small, "--output_dir", str(tmp_path)])
    log, printed = (tmp_path / "all_logs.log").read_text(encoding="utf-8"), capsys.readouterr().err
    if status:
        assert stop.value.code == status and "Traceback" not in log + printed
        assert log.splitlines()[-1].startswith("stopped") and log.splitlines()[-1] == printed.splitlines()[-1]
    else:
        assert "Traceback" in log and "ZeroDivisionError: a bug" in log


def test_the_same_seed_gives_the_same_bytes(finished, small, tmp_path):
    t.main([*small, "--output_dir", str(tmp_path / "output")])
    first, second = (path / "final_lora" / "adapter_model.safetensors" for path in (finished[0], tmp_path / "output"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(("flags", "name"), [([], "eval_loss"), (["--eval_file", ""], "loss")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_older_adapter(
    flags, name, small, tiny, finished, tmp_path, capsys
):
    broken, output = shutil.copytree(tiny, tmp_path / "broken"), shutil.copytree(finished[0], tmp_path / "output")
    weights = load_file(broken / "model.safetensors")
    weights["model.language_model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    before = (output / "final_lora" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stop:
        t.main([*small, "--output_dir", str(output), "--model_name", str(broken), *flags])
    assert stop.value.code == 1
    assert f"train: {name} is nan at step" in capsys.readouterr().err
    assert "LEARNING_RATE" in (output / "all_logs.log").read_text(encoding="utf-8").splitlines()[-1]
    assert (output / "final_lora" / "adapter_model.safetensors").read_bytes() == before
    assert {name for name in RESULTS if (output / name).exists()} == RESULTS
    assert [path for name in RESULTS for path in output.glob(f"{name}.*")] == []


def test_a_gradient_that_is_not_finite_stops_the_run(prepared):
    args, tokenizer, config, rows, _ = prepared
    trainer = t.build_trainer(args, tokenizer, rows, [])
    next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(SystemExit, match=r"grad_norm is (nan|inf) at step 1"):
        train(trainer, args, config, rows)


def test_every_example_is_seen_once_an_epoch_in_an_order_that_changes(prepared):
    args, tokenizer, config, rows, _ = prepared
    epochs = []
    for _ in range(2):
        trainer, seen = t.build_trainer(args, tokenizer, rows, []), []
        collate = trainer.data_collator
        trainer.data_collator = lambda batch, collate=collate, seen=seen: seen.extend(batch) or collate(batch)
        train(trainer, args, config, rows)
        order = [next(i for i, row in enumerate(rows) if row["input_ids"] == one["input_ids"]) for one in seen]
        epochs.append([order[:13], order[13:]])
    assert epochs[0] == epochs[1]
    assert [sorted(epoch) for epoch in epochs[0]] == [[*range(13)]] * 2
    assert epochs[0][0] != epochs[0][1]
    assert len(rows[epochs[0][0][0]]["input_ids"]) == max(len(row["input_ids"]) for row in rows)


def test_trl_trains_on_the_very_rows(prepared):
    args, tokenizer, _, rows, eval_rows = prepared
    trainer = t.build_trainer(args, tokenizer, rows, eval_rows)
    assert list(trainer.train_dataset["input_ids"]) == [row["input_ids"] for row in rows]
    assert list(trainer.train_dataset["labels"]) == [row["labels"] for row in rows]
    by_length = sorted(eval_rows, key=lambda row: len(row["input_ids"]))
    assert list(trainer.eval_dataset["input_ids"]) == [row["input_ids"] for row in by_length]
    assert list(trainer.eval_dataset["labels"]) == [row["labels"] for row in by_length]
    assert [len(batch["input_ids"]) for batch in trainer.get_eval_dataloader()] == [4]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    for i, row in enumerate(rows[:3]):
        n = len(row["input_ids"])
        assert batch["labels"][i].tolist() == row["labels"] + [-100] * (batch["labels"].shape[1] - n)
        assert batch["attention_mask"][i].sum() == n
    assert not trainer.args.bf16 and not trainer.args.fp16 and trainer.args.max_length is None


def test_only_trained_positions_are_scored_with_the_vocabulary(prepared, monkeypatch):
    args, tokenizer, _, rows, _ = prepared
    trainer, scored = t.build_trainer(args, tokenizer, rows, []), []
    real = trl.trainer.utils._ChunkedLogProbFunction.apply
    fake = types.SimpleNamespace(apply=lambda hidden, *rest: scored.append(len(hidden)) or real(hidden, *rest))
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", fake)
    trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[i] for i in range(3)]))
    assert scored == [sum(label != -100 for row in rows[:3] for label in row["labels"])]


def test_an_already_adapted_model_is_refused(prepared, adapted, monkeypatch):
    args, tokenizer, _, rows, _ = prepared
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: adapted)
    with pytest.raises(ValueError, match="PeftModel"):
        t.build_trainer(args, tokenizer, rows, [])


def test_a_weights_file_cut_short_is_refused(prepared, tiny, tmp_path):
    args, tokenizer, _, rows, _ = prepared
    args.model_name = str(shutil.copytree(tiny, tmp_path / "cut"))
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=r"MODEL_NAME .*cut: no weights"):
        t.build_trainer(args, tokenizer, rows, [])


def test_weights_that_are_no_safetensors_are_refused(prepared, tiny, tmp_path):
    args, tokenizer, _, rows, _ = prepared
    args.model_name = str(shutil.copytree(tiny, tmp_path / "pickled"))
    weights = load_file(tmp_path / "pickled" / "model.safetensors")
    torch.save(weights, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"MODEL_NAME .*pickled.*safetensors"):
        t.build_trainer(args, tokenizer, rows, [])


def test_an_injection_as_planned_passes(adapted, capsys):
    trainable, total = adapted.get_nb_trainable_parameters()
    t.check_injection(adapted, {"trainable": trainable, "total": total})
    assert f"trainable params: {trainable:,} || all params: {total:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda model: None, "30,720 of 435,396 parameters are trainable, not 30,721 of 435,396"),
        (lambda model: model.get_submodule("base_model.model.model.norm").requires_grad_(True), "model.norm.weight"),
        (lambda model: model.requires_grad_(False), "0 of 435,396"),
        (lambda model: model.requires_grad_(True), "435,396 of 435,396"),
        (
            lambda model: model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.lora_A").bfloat16(),
            "in torch.bfloat16",
        ),
    ],
)
def test_any_other_injection_is_refused(adapted, spoil, found):
    counts = adapted.get_nb_trainable_parameters()
    spoil(adapted)
    plan = {"trainable": counts[0] + (found.startswith("30,720")), "total": counts[1]}
    with pytest.raises(SystemExit, match="nothing is trained") as stop:
        t.check_injection(adapted, plan)
    assert found in stop.value.code


def test_a_saved_config_that_differs_is_refused(prepared, adapted, tmp_path):
    args, tokenizer, config, *_ = prepared
    args.lora_r, args.lora_alpha = 16, 16
    with pytest.raises(SystemExit, match="r is 8, not 16"):
        t.save_adapter(adapted, tokenizer, config, tmp_path / "partial", args)


def test_an_output_dir_that_cannot_be_written_is_one_message(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"OUTPUT_DIR .*file/output: Not a directory"):
        t.main([*small, "--output_dir", str(tmp_path / "file" / "output")])


def test_a_refused_file_touches_no_older_result(finished, small, tmp_path, capsys):
    output = shutil.copytree(finished[0], tmp_path / "output")
    before = (output / "final_lora" / "adapter_model.safetensors").stat().st_mtime_ns
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit) as stop:
        t.main([*small, "--output_dir", str(output), "--train_file", str(tmp_path / "bad.jsonl")])
    assert stop.value.code == 1 and f"{tmp_path}/bad.jsonl:1: " in capsys.readouterr().err
    assert (output / "final_lora" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_the_demo_model_is_the_hubs_shape(tiny):
    config = AutoConfig.from_pretrained(tiny)
    assert config.architectures == ["Qwen3_5ForConditionalGeneration"] and config.get_text_config() is not config
    text = config.text_config
    assert {*text.layer_types} == {"linear_attention", "full_attention"} and text.tie_word_embeddings
    assert (text.head_dim, text.linear_key_head_dim, text.linear_value_head_dim) == (256, 128, 128)
    assert sum(path.stat().st_size for path in Path(tiny).iterdir()) < 8e6
    assert {"preprocessor_config.json", "video_preprocessor_config.json"} <= {
        path.name for path in Path(tiny).iterdir()
    }
