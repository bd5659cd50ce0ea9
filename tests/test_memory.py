"""Memory of the GPU, simulated on the CPU: which batches recompute activations, and that this changes nothing."""

import json
import math
import random
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers.modeling_layers import GradientCheckpointingLayer

import train_lora_single as t

STEPS = 8  # two epochs of four


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags for 13 training lines of all lengths, two epochs of four steps, a checkpoint every three."""
    folder = tmp_path_factory.mktemp("data")
    lines = sorted(Path("data/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True), key=len)
    (folder / "train.jsonl").write_text("".join(lines[::80]), encoding="utf-8")
    flags = ["--demo", "--num_epochs", "2", "--save_steps", "3", "--eval_file", "", "--logging_steps", "1"]
    return [*flags, "--train_file", str(folder / "train.jsonl")]


@pytest.fixture(scope="module")
def rows(flags):
    """Return the encoded training rows, from the shortest to the longest."""
    args = t.parse_args(flags)
    _, tokenizer = t.load_config_and_tokenizer(args)
    encoded = t.encode(t.read_examples(args.train_file), tokenizer, args.max_seq_len)
    return sorted(encoded, key=lambda row: len(row["input_ids"]))


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Record the share of the memory that is allowed; no GPU is asked for anything."""
    shares = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    return shares


def recomputing(model):
    """Return whether the model's layers recompute their activations: all of them, or none."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    (flag,) = {layer.gradient_checkpointing for layer in layers}
    return flag


def give_memory(trainer, kept, recomputed=math.inf):
    """Let a pass over more tokens run out of memory, as a GPU would, with activations kept or recomputed."""

    def run_out(model, _, inputs, __):
        if model.training and inputs["input_ids"].numel() > (recomputed if recomputing(model) else kept):
            raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.model.register_forward_hook(run_out, with_kwargs=True)


def run_on_a_gpu(monkeypatch, argv, kept, recomputed=math.inf):
    """Run the command on a GPU of that memory; return (tokens, passes through the layers) of each batch trained."""
    keep_activations, step, batches = t.keep_activations, transformers.Trainer.training_step, []

    def on_a_gpu(trainer, rows, args):
        give_memory(trainer, kept, recomputed)
        args.device = "cuda"
        keep_activations(trainer, rows, args)
        args.device = "cpu"
        layers = [module for module in trainer.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        assert len(layers) == 2
        for layer in layers:
            layer.mlp.register_forward_pre_hook(lambda *_: passes.append(1))

    def training_step(self, model, inputs, *args, **kwargs):
        passes.clear()
        tokens = inputs["input_ids"].numel()
        loss = step(self, model, inputs, *args, **kwargs)
        batches.append((tokens, len(passes) / 2))
        return loss

    passes = []
    with monkeypatch.context() as patch:
        patch.setattr(t, "keep_activations", on_a_gpu)
        patch.setattr(transformers.Trainer, "training_step", training_step)
        patch.setattr(t, "draw_losses", lambda history, path, *_: path.write_bytes(b""))
        t.main(argv)
    return batches


def results(output):
    """Return the adapter's bytes and what run.json says of each step."""
    history = json.loads((output / "run.json").read_text(encoding="utf-8"))["loss_history"]
    return (output / "final_lora" / "adapter_model.safetensors").read_bytes(), [e for e in history if "loss" in e]


@pytest.fixture(scope="module")
def with_room(flags, tmp_path_factory):
    """Return (output folder, batches, what was printed) of a run on a GPU that all batches fit."""
    output, patch = tmp_path_factory.mktemp("room"), pytest.MonkeyPatch()
    for name in ("set_per_process_memory_fraction", "empty_cache", "reset_peak_memory_stats"):
        patch.setattr(torch.cuda, name, lambda *_: None)
    batches = run_on_a_gpu(patch, [*flags, "--output_dir", str(output)], math.inf)
    patch.undo()
    return output, batches, (output / "all_logs.log").read_text(encoding="utf-8")


def test_with_room_for_all_batches_no_layer_is_ever_recomputed(with_room):
    _, batches, text = with_room
    assert [passes for _, passes in batches] == [1] * 14
    assert "memory   activations are kept for all batches" in text


@pytest.mark.parametrize("share", [0, 0.5])
def test_exactly_the_batches_that_do_not_fit_are_recomputed_and_nothing_else_changes(
    flags, rows, with_room, tmp_path, monkeypatch, gpu, share
):
    kept = int(share * 2 * len(rows[-1]["input_ids"]))
    batches = run_on_a_gpu(monkeypatch, [*flags, "--output_dir", str(tmp_path)], kept)
    text = (tmp_path / "all_logs.log").read_text(encoding="utf-8")
    if kept:
        limit = max(2 * len(row["input_ids"]) for row in rows[1:] if 2 * len(row["input_ids"]) <= kept)
        assert f"memory   activations are kept for batches of up to {limit:,} tokens, else recomputed" in text
        assert {passes for _, passes in batches} == {1, 2}
    else:
        limit = 0
        assert "memory   activations are recomputed for all batches" in text
    assert batches == [(tokens, 2 if tokens > limit else 1) for tokens, _ in with_room[1]]
    assert gpu == [0.9, 1.0]
    (_, steps), (_, expected) = results(tmp_path), results(with_room[0])
    assert len(steps) == STEPS
    for step, other in zip(steps, expected, strict=True):
        assert step == pytest.approx(other, abs=1e-6)
    ours, theirs = (load_file(f / "final_lora" / "adapter_model.safetensors") for f in (tmp_path, with_room[0]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_trying_batches_out_changes_no_byte_of_the_adapter(flags, with_room, tmp_path, monkeypatch):
    monkeypatch.setattr(t, "draw_losses", lambda history, path, *_: path.write_bytes(b""))
    t.main([*flags, "--output_dir", str(tmp_path)])
    assert "memory   activations" not in (tmp_path / "all_logs.log").read_text(encoding="utf-8")
    assert results(tmp_path)[0] == results(with_room[0])[0]
    assert results(tmp_path)[1] == results(with_room[0])[1]


def test_a_batch_that_fits_in_neither_way_ends_the_run_before_its_first_step(
    flags, rows, tmp_path, monkeypatch, capfd
):
    longest = 2 * len(rows[-1]["input_ids"])
    with pytest.raises(SystemExit) as stop:
        run_on_a_gpu(monkeypatch, [*flags, "--output_dir", str(tmp_path)], 100, longest - 1)
    text = capfd.readouterr().err
    assert stop.value.code == 1 and "Traceback" not in text
    assert f"memory: a batch of {longest:,} tokens does not fit this GPU; lower BATCH_SIZE" in text
    assert "MAX_SEQ_LEN" in text and not (tmp_path / "final_lora").exists()
    assert "failed: memory:" in json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["outcome"]


def test_out_of_memory_in_training_all_the_same_keeps_the_checkpoints_and_goes_on(
    flags, with_room, tmp_path, monkeypatch, capfd
):
    step, argv = transformers.Trainer.training_step, [*flags, "--output_dir", str(tmp_path)]

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(transformers.Trainer, "training_step", training_step)
        run_on_a_gpu(patch, argv, math.inf)
    text = capfd.readouterr().err
    assert stop.value.code == 1 and "Traceback" not in text
    assert "train: out of GPU memory at step 6; lower BATCH_SIZE" in text
    assert "failed: train: out of" in json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["outcome"]
    batches = run_on_a_gpu(monkeypatch, argv, math.inf)
    assert f"resume   from {tmp_path}/checkpoints/checkpoint-6, 6 steps are done" in capfd.readouterr().out
    assert len(batches) == 3 and results(tmp_path)[0] == results(with_room[0])[0]


@pytest.fixture
def trainer(flags, rows, tmp_path):
    """Return (args for a GPU, a function that makes a trainer whose LoRA has an effect)."""
    args = t.parse_args([*flags, "--output_dir", str(tmp_path)])
    _, tokenizer = t.load_config_and_tokenizer(args)

    def make():
        trainer, generator = t.build_trainer(args, tokenizer, rows, []), torch.Generator().manual_seed(0)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=generator)
        return trainer

    args.device = "cuda"
    return args, make


def test_losses_and_gradients_are_equal_with_and_without_recomputation(trainer, rows):
    args, make = trainer
    results = []
    for kept in (math.inf, 0):
        one = make()
        give_memory(one, kept)
        t.keep_activations(one, rows, args)
        inputs = one.data_collator([{key: row[key] for key in ("input_ids", "labels")} for row in rows[-2:]])
        loss = one.compute_loss(one.model, inputs)
        assert recomputing(one.model) == (kept == 0)
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in one.model.named_parameters() if p.requires_grad}))
    (loss, gradients), (other_loss, other_gradients) = results
    assert loss == pytest.approx(other_loss, abs=1e-6) and len(gradients) == 20
    assert all(gradient.any() for gradient in gradients.values())
    torch.testing.assert_close(gradients, other_gradients, rtol=0, atol=1e-6)


def test_what_was_tried_out_leaves_no_gradient_no_metric_and_the_seeds_random_state(trainer, rows, gpu, monkeypatch):
    """The memory runs out in the backward pass, when half of the gradients are there."""
    args, make = trainer
    one, tried = make(), []
    name, first = next((n, p) for n, p in one.model.named_parameters() if p.requires_grad)
    assert ".layers.0." in name  # the last whose gradient is computed

    def run_out(gradient):
        tried.append(len([p for p in one.model.parameters() if p.grad is not None]))
        if not recomputing(one.model):
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = first.register_hook(run_out)
    # Another process, for which it fits, would wait for this one.
    monkeypatch.setattr(type(one.accelerator), "gather_for_metrics", lambda *_: pytest.fail("gathers"))
    t.keep_activations(one, rows, args)
    hook.remove()
    assert len(tried) > 2 and tried[0] > 10
    assert [n for n, p in one.model.named_parameters() if p.grad is not None and p.grad.any()] == []
    assert not any(one._metrics["train"].values()) and one._total_train_tokens == one.state.global_step == 0
    assert gpu == [0.9, 1.0]
    drawn = torch.rand(3).tolist(), random.random(), np.random.rand()
    transformers.set_seed(args.seed)
    assert drawn == (torch.rand(3).tolist(), random.random(), np.random.rand())


class Layer(GradientCheckpointingLayer):
    def _gradient_checkpointing_func(self, forward, x):
        return forward(x)

    def forward(self, x):
        return x


class Model(torch.nn.Module):
    """As much of a model as keep_activations() looks at."""

    def __init__(self):
        super().__init__()
        self.layer, self.weight = Layer(), torch.nn.Parameter(torch.ones(()))
        self.activation_checkpointing_enable = self.disable_input_require_grads = lambda: None

    def forward(self, input_ids, fused_lm_head=False):
        return types.SimpleNamespace(loss=self.weight * self.layer(input_ids).sum())


@settings(deadline=None, max_examples=100)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60), size=st.integers(1, 5), share=st.floats(0, 1.1))
def test_the_limit_is_the_largest_batch_that_fits_and_is_found_in_few_passes(lengths, size, share):
    rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in lengths]
    fakes, tried = {"empty_cache": lambda: None, "reset_peak_memory_stats": lambda: None}, []
    possible = [min(size, len(lengths)) * n for n in sorted(lengths)[min(size, len(lengths)) - 1 :]]
    kept = int(share * possible[-1])

    def run_out(model, _, inputs, __):
        tried.append(inputs["input_ids"].numel())
        if tried[-1] > kept and not model.layer.gradient_checkpointing:
            raise torch.OutOfMemoryError

    def collate(batch):
        return {"input_ids": torch.ones(len(batch), max(len(row["input_ids"]) for row in batch))}

    trainer = types.SimpleNamespace(model=Model(), data_collator=collate, _prepare_inputs=lambda inputs: inputs)
    hook = trainer.model.register_forward_hook(run_out, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        t.keep_activations(trainer, rows, types.SimpleNamespace(device="cuda", batch_size=size, seed=1))
    hook.remove()
    fits = [tokens for tokens in possible if tokens <= kept]
    limit = math.inf if len(fits) == len(possible) else max(fits, default=0)
    for tokens in {*possible, *lengths}:
        trainer.model(input_ids=torch.ones(1, tokens))
        assert trainer.model.layer.gradient_checkpointing == (tokens > limit)
    assert tried[0] == possible[-1] and len(tried) <= 3 + math.log2(len(possible) + 1)
