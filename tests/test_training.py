"""The trainer: injection, rows and order, losses, memory, faults, the environment."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import trl
from datasets import Dataset
from huggingface_hub.errors import HfHubHTTPError
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

import train_lora_single as t

ADAPTER = "final_lora/adapter_model.safetensors"
STILL = ["--learning_rate", "1e-9"]  # an optimizer step moves float32's weights by nothing
# float32 rounds by 6e-8; sums of thousands of terms, in another order, differ by less than this.
ROUNDING = 1e-4


def prepare(flags):
    """Return the job as run() has it before the weights are loaded."""
    args = t.parse_args(flags)
    job = t.Job(args)
    t.check_device(args)
    job.config, job.tokenizer = t.load_config_and_tokenizer(args)
    job.train = t.encode(t.read_examples(args.train_file), job.tokenizer, args.max_seq_len)
    if args.eval_file:
        job.eval = t.encode(t.read_examples(args.eval_file), job.tokenizer, args.max_seq_len)
    job.plan = t.make_plan(args, job.config, len(job.train))
    job.products = t.choose_products(job)
    return job


def lora(model):
    """Return LoRA's parameters by their names."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def set_b(trainer):
    """Give LoRA an effect: B is zero at first, and A has no gradient then."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lora(trainer.model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)


def recomputes(model):
    """Return whether the layers recompute their activations: all of them, or none."""
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    (flag,) = {layer.gradient_checkpointing for layer in layers}
    return flag


class Recorder(TrainerCallback):
    """What a trainer's model is given, and what its steps do."""

    def __init__(self, trainer):
        self.model, self.batches, self.evaluated = trainer.model, [], []
        self.gradients, self.rates, self.weights, self.optimizer = [], [], [], None
        self.compute_loss, self.labels, self.caches = trainer.compute_loss, None, []
        trainer.compute_loss = self.on_loss
        trainer.model.register_forward_hook(self.after_forward)
        trainer.model.register_forward_pre_hook(self.on_forward, with_kwargs=True)
        trainer.add_callback(self)

    def on_loss(self, model, inputs, *args, **kwargs):
        self.labels = inputs["labels"].clone()
        return self.compute_loss(model, inputs, *args, **kwargs)

    def on_forward(self, model, args, inputs):
        assert not args
        batch = {key: inputs[key].clone() for key in ("input_ids", "attention_mask")}
        batch |= {"keys": inputs.keys(), "seen_before": len(self.batches), "labels": self.labels}
        (self.batches if model.training else self.evaluated).append(batch)

    def after_forward(self, model, args, output):
        kept = {key for key, value in output.items() if value is not None}
        self.caches += kept & {"cache", "past_key_values"}  # memory, which training has no use for

    def on_pre_optimizer_step(self, *_, optimizer, **__):
        self.optimizer = optimizer
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.gradients.append({n: p.grad.clone() for n, p in lora(self.model).items()})
        self.weights.append({n: p.detach().clone() for n, p in lora(self.model).items()})


def conversations(batches):
    """Return the (ids, labels) of each row without its padding, which must not be trained."""
    rows = []
    for batch in batches:
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True
        ):
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
            assert set(labels[~mask].tolist()) <= {-100}
            rows.append((ids[mask].tolist(), labels[mask].tolist()))
    return rows


def as_pairs(rows):
    """Return encode()'s rows as (ids, labels)."""
    return [(row["input_ids"], row["labels"]) for row in rows]


def token_loss(model, pairs):
    """Return the mean cross-entropy over the trained tokens, computed by torch in float64."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in pairs:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
            targets = torch.tensor(labels[1:])
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            count += (targets != -100).sum().item()
    return total / count


def batches_loss(model, rows, size=2):
    """Return the mean of the batches' losses, as transformers evaluates: each row weighs alike."""
    rows = sorted(as_pairs(rows), key=lambda pair: len(pair[0]))
    batches = [rows[n : n + size] for n in range(0, len(rows), size)]
    return sum(len(batch) * token_loss(model, batch) for batch in batches) / len(rows)


def logged(history, key):
    """Return the values of key in a trainer's log, in order."""
    return [entry[key] for entry in history if key in entry]


def assert_near(gradients, expected, share=ROUNDING):
    """Compare gradients by name, each against the size of its largest element."""
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        largest = expected[name].abs().max().item()
        assert largest > 0, name
        assert (gradient - expected[name]).abs().max().item() <= share * largest, name


def failing(monkeypatch, capfd, argv, change=lambda trainer: None):
    """Run the command, with change(trainer) before training; return what it says as it fails."""
    build_trainer = t.build_trainer

    def build(job):
        trainer = build_trainer(job)
        change(trainer)
        return trainer

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(t, "build_trainer", build)
        t.main(argv)
    text = capfd.readouterr().err
    assert stop.value.code == 1 and "Traceback" not in text
    output = Path(argv[argv.index("--output_dir") + 1])
    assert not (output / "final_lora").exists()
    outcome = json.loads((output / "run.json").read_text(encoding="utf-8"))["outcome"]
    assert outcome.startswith("failed: ") and text.endswith(outcome[8:] + "\n")
    return outcome[8:]


@pytest.fixture(scope="module")
def flags(lines, tiny, tmp_path_factory):
    """Return flags for two epochs of four steps, which need no certain folder to be run in."""
    return [*lines(tmp_path_factory.mktemp("data")), "--model_name", tiny]


@pytest.fixture(scope="module")
def trained(flags, tiny, tmp_path_factory):
    """Return (job, trainer, recorder) after training on 14 rows, of which one is long."""
    folder = tmp_path_factory.mktemp("trained")
    text = Path(flags[flags.index("--train_file") + 1]).read_text(encoding="utf-8")
    words = "word " * 550  # together more than SFTConfig's max_length, 1,024 by default
    turns = [{"role": role, "content": words} for role in ("user", "assistant")]
    (folder / "train.jsonl").write_text(text + json.dumps({"messages": turns}), encoding="utf-8")
    more = ["--train_file", f"{folder}/train.jsonl", "--max_seq_len", "9999"]
    job = prepare([*flags, *more, "--output_dir", str(folder)])
    assert len(job.train) == 14 and max(len(row["input_ids"]) for row in job.train) > 1100
    trainer = t.build_trainer(job)
    recorder = Recorder(trainer)
    t.fit_memory(trainer, job)
    t.train(trainer, job)
    return job, trainer, recorder


@pytest.fixture(scope="module")
def base(tiny):
    """Return the demo's base model, as it lies on disk."""
    return AutoModelForCausalLM.from_pretrained(tiny, dtype="float32").eval()


# ---- LoRA is injected once, and looked at -------------------------------------------------------


def test_lora_is_injected_by_the_trainer_alone(flags, tmp_path, monkeypatch):
    given, injected, inside = [], [], []
    real_init, real_inject = trl.SFTTrainer.__init__, BaseTuner.inject_adapter

    def init(self, *args, model, peft_config, **kwargs):
        given.append((isinstance(model, peft.PeftModel), [*lora(model)], peft_config.r))
        inside.append(True)
        real_init(self, *args, model=model, peft_config=peft_config, **kwargs)
        inside.pop()

    def inject(*args, **kwargs):
        injected.append(bool(inside))
        return real_inject(*args, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "__init__", init)
    monkeypatch.setattr(BaseTuner, "inject_adapter", inject)
    trainer = t.build_trainer(prepare([*flags, "--output_dir", str(tmp_path)]))
    assert given == [(False, [], 8)] and injected == [True]
    assert [*trainer.model.peft_config] == ["default"] and trainer.model.active_adapter == "default"


def test_the_constants_reach_lora_and_the_trainer(flags, tmp_path):
    values = {"lora_r": 4, "lora_alpha": 12, "lora_dropout": 0.2, "lora_target_modules": "q_proj"}
    values |= {"seed": 7, "learning_rate": 3e-3, "lr_scheduler_type": "linear"}
    values |= {"num_epochs": 5, "batch_size": 3, "gradient_accumulation_steps": 2}
    values |= {"model_revision": "a-branch", "warmup_ratio": 0.2}
    changed = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    job = prepare([*flags, *changed, "--output_dir", str(tmp_path)])
    trainer = t.build_trainer(job)
    got, layers = trainer.args, [*lora(trainer.model)]
    assert (got.seed, got.learning_rate) == (7, 3e-3)
    assert (got.lr_scheduler_type, got.num_train_epochs) == ("linear", 5)
    assert (got.per_device_train_batch_size, got.gradient_accumulation_steps) == (3, 2)
    layer = trainer.model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    assert len(layers) == 2 and layer.lora_A["default"].weight.shape[0] == 4
    assert layer.scaling["default"] == 3 and layer.lora_dropout["default"].p == 0.2
    assert not layer.use_dora["default"] and layer.lora_B["default"].bias is None
    config = trainer.model.peft_config["default"]
    assert (config.task_type, config.bias, config.revision) == ("CAUSAL_LM", "none", "a-branch")
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 12, {"q_proj"})
    # ceil(13 / (3 x 2)) x 5 steps, of which a fifth warms up
    assert got.warmup_steps == 3 and got.output_dir == f"{tmp_path}/checkpoints"


def test_no_product_is_cast_behind_the_models_back(flags, tmp_path, monkeypatch):
    """A bfloat16 model multiplies in bfloat16, LoRA beside it in float32: there is no autocast."""
    seen, linear = set(), torch.nn.functional.linear

    def spy(rows, weight, bias=None):
        seen.add((torch.is_autocast_enabled("cpu"), weight.dtype))
        return linear(rows, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    t.main([*flags, "--dtype", "bfloat16", "--num_epochs", "1", "--output_dir", str(tmp_path)])
    assert seen == {(False, torch.bfloat16), (False, torch.float32)}


def test_an_already_adapted_model_is_refused(flags, adapted, tmp_path, monkeypatch):
    real = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args, **kwargs):
        return adapted, real(*args, **kwargs)[1]

    job = prepare([*flags, "--output_dir", str(tmp_path)])
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="PeftModel"):
        t.build_trainer(job)


@pytest.mark.parametrize("target", ["q_proj", "in_proj_qkv"])
def test_an_adapter_in_the_models_folder_is_never_built_on(
    flags, demo, tiny, tmp_path, monkeypatch, capfd, target
):
    """Transformers loads it with the model, without a word; LoRA is injected over it.

    Where the targets are the same it is replaced; elsewhere it would be trained too.
    """
    folder, output = shutil.copytree(tiny, tmp_path / "model"), tmp_path / "output"
    config = peft.LoraConfig(target_modules=[target], task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    model = peft.get_peft_model(model, config)
    for parameter in lora(model).values():
        parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    argv = [*flags, "--model_name", str(folder), "--output_dir", str(output)]
    if target == "q_proj":
        t.main(argv)
        assert (output / ADAPTER).read_bytes() == (demo[0] / ADAPTER).read_bytes()
    else:
        assert "not injected as planned" in failing(monkeypatch, capfd, argv)
        assert not [*output.glob("checkpoints/checkpoint-*")]


@pytest.fixture
def adapted(flags, tmp_path):
    """Return the demo model with LoRA."""
    return t.build_trainer(prepare([*flags, "--output_dir", str(tmp_path / "adapted")])).model


def plan_of(model, **changes):
    """Return a plan with the model's counts, but for the changes."""
    trainable, total = model.get_nb_trainable_parameters()
    counts = {"trainable": trainable, "total": total} | changes
    return t.Plan(**counts, steps_per_epoch=1, steps=1, largest=(1024, 64))


def test_an_injection_as_planned_passes(adapted, capsys):
    plan = plan_of(adapted)
    assert (plan.trainable, plan.total) == (30_720, 435_396)
    t.check_injection(adapted, plan)
    assert "30,720 of 435,396" in capsys.readouterr().out


def in_layers(model, name):
    return model.get_submodule(f"base_model.model.model.layers.{name}")


@pytest.mark.parametrize(
    ("spoil", "planned", "found"),
    [
        (lambda m: None, {"trainable": 30_721}, "30,720 of 435,396 .* planned were 30,721"),
        (lambda m: None, {"total": 435_397}, "planned were 30,720 of 435,397"),
        (lambda m: m.requires_grad_(False), {}, "0 of 435,396"),
        (lambda m: m.requires_grad_(True), {}, "435,396 of 435,396"),
        (lambda m: in_layers(m, "0.input_layernorm").requires_grad_(True), {}, "input_layernorm"),
        (lambda m: in_layers(m, "0.mlp.up_proj.lora_A").bfloat16(), {}, "lora_A.*torch.bfloat16"),
        (lambda m: in_layers(m, "1.mlp.up_proj.lora_B").half(), {}, "lora_B.*torch.float16"),
        (lambda m: in_layers(m, "0.mlp.up_proj.lora_A").requires_grad_(False), {}, "up_proj"),
    ],
)  # fmt: skip
def test_any_other_injection_is_refused(adapted, spoil, planned, found):
    plan = plan_of(adapted, **planned)
    spoil(adapted)
    with pytest.raises(SystemExit, match=rf"(?s)not injected as planned.*{found}"):
        t.check_injection(adapted, plan)


def test_as_many_others_are_not_taken_for_loras(adapted):
    """The count alone would be right: q_proj's A is frozen, and as much of the base trained."""
    plan, layer = plan_of(adapted), in_layers(adapted, "1.self_attn.q_proj")
    layer.lora_A.requires_grad_(False)
    size = layer.lora_A["default"].weight.numel()
    layer.base_layer.stolen = torch.nn.Parameter(torch.zeros(size))
    plan = plan._replace(total=plan.total + size)
    with pytest.raises(SystemExit, match=r"(?s)30,720 of .*stolen.*q_proj.lora_A"):
        t.check_injection(adapted, plan)


def test_a_fault_of_the_injection_ends_the_command(flags, tmp_path, monkeypatch, capfd):
    argv = [*flags, "--output_dir", str(tmp_path)]
    message = failing(monkeypatch, capfd, argv, lambda trainer: trainer.model.requires_grad_(False))
    assert message.startswith("LoRA is not injected as planned: 0 of 435,396")
    assert not [*tmp_path.glob("checkpoints/checkpoint-*")]


def test_a_save_asks_nobody_whether_the_embeddings_were_resized(lines, tmp_path, monkeypatch):
    job = prepare([*lines(tmp_path), "--output_dir", str(tmp_path / "output")])
    trainer, asked = t.build_trainer(job), []
    trainer.model.peft_config["default"].base_model_name_or_path = "nobody/a-model-of-the-hub"
    monkeypatch.setattr(
        "peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *given: asked.append(given)
    )
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists() and asked == []


def test_training_changes_lora_and_nothing_else(trained, base):
    job, trainer, recorder = trained
    frozen = dict(base.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_" in name:
            assert not parameter.equal(recorder.weights[0][name]), name
        else:
            assert parameter.equal(frozen.pop(plain)), name
    assert set(frozen) <= {"lm_head.weight"}  # tied
    groups = recorder.optimizer.param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == job.plan.trainable
    assert {group["weight_decay"] for group in groups} == {0}


# ---- the rows, their order, the schedule --------------------------------------------------------


def test_the_model_is_given_the_very_rows(trained):
    """Nothing is rendered again, cut (one row is longer than TRL's limit) or packed."""
    job, _, recorder = trained
    assert sorted(conversations(recorder.batches)) == sorted(as_pairs(job.train) * 2)
    assert sorted(conversations(recorder.evaluated)) == sorted(as_pairs(job.eval) * 3)
    keys = {key for batch in recorder.batches + recorder.evaluated for key in batch["keys"]}
    assert not keys & {"position_ids", "cu_seq_lens_q", "seq_idx"}  # of packed rows
    assert recorder.caches == []
    assert logged(job.history, "num_input_tokens_seen")[-1] == job.tokens
    assert job.tokens == 2 * sum(len(row["input_ids"]) for row in job.train)


def test_every_example_is_seen_once_an_epoch_in_an_order_that_changes(trained):
    job, _, recorder = trained
    rows = conversations(recorder.batches)
    epochs = rows[:14], rows[14:]
    assert [sorted(epoch) for epoch in epochs] == [sorted(as_pairs(job.train))] * 2
    assert epochs[0] != epochs[1]
    assert [len(batch["input_ids"]) for batch in recorder.batches] == [2] * 14
    for epoch in epochs:  # memory is short at once, or never
        assert len(epoch[0][0]) == max(len(row["input_ids"]) for row in job.train)


@pytest.fixture(scope="module")
def mixed(lines, tiny, tmp_path_factory):
    """Return a function that makes a trainer on 160 training and 20 eval lines of all lengths."""
    folder = tmp_path_factory.mktemp("mixed")
    flags = [*lines(folder, train=160, evaluation=20), "--model_name", tiny]
    job = prepare([*flags, "--output_dir", str(folder / "output")])

    def make(**changes):
        vars(job.args).update({"seed": 42} | changes)
        return t.build_trainer(job)

    return make


def order(trainer):
    """Return the batches of the first epoch."""
    return [
        {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        for batch in trainer.get_train_dataloader()
    ]


def test_the_order_comes_from_the_seed(mixed):
    first, again, other = (conversations(order(mixed(seed=seed))) for seed in (1, 1, 2))
    assert first == again != other and sorted(first) == sorted(other)


def test_like_lengths_are_together(mixed):
    """A batch of two, padded to the longer, holds less padding than by chance."""
    batches = order(mixed())
    lengths = [len(ids) for ids, _ in conversations(batches)]

    def padding(lengths):
        return sum(abs(a - b) for a, b in zip(lengths[::2], lengths[1::2], strict=True))

    assert sum((batch["attention_mask"] == 0).sum().item() for batch in batches) == padding(lengths)
    by_chance = [padding(random.Random(n).sample(lengths, len(lengths))) for n in range(20)]
    assert padding(lengths) < min(by_chance) / 2
    assert max(map(len, batches[0]["input_ids"])) == max(lengths)


def test_evaluation_is_sorted_by_length_in_batches_that_fit(mixed):
    masks = [batch["attention_mask"] for batch in mixed(batch_size=3).get_eval_dataloader()]
    assert [len(mask) for mask in masks] == [3] * 6 + [2]
    lengths = torch.cat([mask.sum(1) for mask in masks]).tolist()
    assert lengths == sorted(lengths) and len(set(lengths)) > 3


SCHEDULES = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant_with_warmup": lambda done: 1,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_warms_up_and_falls(lines, tmp_path, capsys, name):
    flags = [*lines(tmp_path, train=5, evaluation=0), "--lr_scheduler_type", name]
    flags += ["--batch_size", "1", "--gradient_accumulation_steps", "1", "--warmup_ratio", "0.39"]
    job = prepare([*flags, "--logging_steps", "4", "--output_dir", str(tmp_path)])
    trainer = t.build_trainer(job)
    recorder = Recorder(trainer)
    t.train(trainer, job)
    warm, steps = 3, 10  # 0.39 x 10, rounded down
    shares = [
        n / warm if n < warm else SCHEDULES[name]((n - warm) / (steps - warm)) for n in range(steps)
    ]
    assert recorder.rates == pytest.approx([1e-2 * share for share in shares])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train ")]
    losses = logged(job.history, "loss")
    assert len(losses) == 10 and len(printed) == 2  # LOGGING_STEPS says which are printed
    for step, line in zip((4, 8), printed, strict=True):
        assert f"step {step}/10  loss {losses[step - 1]:.4f}  " in line
        assert f"  learning rate {recorder.rates[step - 1]:.2e}  " in line


def test_gradients_are_clipped_at_one(trained):
    job, _, recorder = trained
    norms = logged(job.history, "grad_norm")
    assert max(norms) > 1
    for norm, gradients in zip(norms, recorder.gradients, strict=True):
        after = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        assert after == pytest.approx(min(norm, 1), rel=ROUNDING)


def test_the_seed_makes_the_first_values_and_b_is_zero(mixed):
    first, again, other = (lora(mixed(seed=seed).model) for seed in (1, 1, 2))
    for name, parameter in first.items():
        assert parameter.equal(again[name]) and parameter.dtype == torch.float32
        assert parameter.equal(other[name]) == ("lora_B" in name)
        assert parameter.any() == ("lora_A" in name)


def test_dropout_is_on_in_training_and_off_in_evaluation(flags, tmp_path):
    job = prepare([*flags, "--lora_dropout", "0.5", "--output_dir", str(tmp_path)])
    trainer = t.build_trainer(job)
    set_b(trainer)
    t.fit_memory(trainer, job)
    modes = []
    trainer.model.register_forward_hook(lambda model, *_: modes.append(model.training))
    (rate,) = {m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout) if m.p}
    batch = trainer.data_collator(job.train[:2])
    losses = {mode: set() for mode in (True, False)}
    for mode in losses:
        trainer.model.train(mode)
        for _ in range(3):
            losses[mode].add(trainer.model(**batch).loss.item())
    assert rate == 0.5 and len(losses[False]) == 1 and len(losses[True]) == 3
    modes.clear()
    t.train(trainer, job)
    assert [mode for n, mode in enumerate(modes) if n == 0 or mode != modes[n - 1]] == [
        False, True, False, True, False
    ]  # fmt: skip
    assert sum(modes) == 2 * 7


# ---- the losses ---------------------------------------------------------------------------------


def test_the_losses_are_those_of_torch_over_the_trained_tokens(trained, base):
    """Before the first step B is zero, so both are the base's; a step has one mean over all."""
    job, _, recorder = trained
    assert "eval_loss" in job.history[0] and job.history[0]["step"] == 0
    assert recorder.evaluated[0]["seen_before"] == 0
    assert logged(job.history, "eval_loss")[0] == pytest.approx(
        batches_loss(base, job.eval), rel=ROUNDING
    )
    assert logged(job.history, "loss")[0] == pytest.approx(
        token_loss(base, conversations(recorder.batches[:2])), rel=ROUNDING
    )


def test_the_last_eval_loss_is_that_of_the_adapter(demo, flags, tiny):
    output, _ = demo
    job = prepare(flags)
    history = json.loads((output / "run.json").read_text(encoding="utf-8"))["loss_history"]
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    model = peft.PeftModel.from_pretrained(base, output / "final_lora").eval()
    assert logged(history, "eval_loss")[-1] == pytest.approx(
        batches_loss(model, job.eval), rel=ROUNDING
    )


def test_the_losses_and_gradients_are_those_of_trl_with_its_defaults(flags, tiny, tmp_path):
    """On the same rows in the same order; TRL has a loss of its own, and recomputes activations."""
    more = [*STILL, "--lora_dropout", "0", "--num_epochs", "1", "--warmup_ratio", "0"]
    job = prepare([*flags, *more, "--eval_file", "", "--output_dir", str(tmp_path)])
    ours = t.build_trainer(job)
    set_b(ours)
    start = {name: p.detach().clone() for name, p in lora(ours.model).items()}
    recorder, recomputed = Recorder(ours), []
    t.fit_memory(ours, job)
    ours.model.register_forward_hook(lambda model, *_: recomputed.append(recomputes(model)))
    t.train(ours, job)

    pairs = conversations(recorder.batches)
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
    config = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), num_train_epochs=1, learning_rate=1e-9, bf16=False,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        train_sampling_strategy="sequential", logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    theirs = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny, dtype="float32"),
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=job.tokenizer,
        peft_config=peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=t.LORA_TARGET_MODULES, task_type="CAUSAL_LM"
        ),
    )
    assert theirs.model.load_state_dict(start, strict=False).unexpected_keys == []
    by_trl = Recorder(theirs)
    theirs.model.register_forward_hook(lambda model, *_: recomputed.append(recomputes(model)))
    theirs.train()
    assert conversations(by_trl.batches) == pairs
    assert recomputed == [False] * 7 + [True] * 7
    for key, trls in [("loss",) * 2, ("grad_norm",) * 2, ("num_input_tokens_seen", "num_tokens")]:
        expected = logged(theirs.state.log_history, trls)
        assert len(expected) == 4
        assert logged(job.history, key)[:4] == pytest.approx(expected, rel=ROUNDING), key
    for got, expected in zip(recorder.gradients, by_trl.gradients, strict=True):
        assert_near(got, expected)


class Products(TorchDispatchMode):
    """Count the rows of the products from or to so many columns: the positions that are scored."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.rows = columns, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "mm" in func.name():
            given = [arg for arg in args if isinstance(arg, torch.Tensor)]
            ends = {result.shape[-1], *(one.shape[-1] for one in given[-2:-1])}
            if self.columns in ends:
                self.rows.append(result.numel() // result.shape[-1])
        return result


def scored(labels):
    """Return how many positions a batch's logits are made for: as many in each of its rows."""
    rows = [{n for n, label in enumerate(row) if label != -100} for row in labels]
    assert 0 not in set.union(*rows)
    return len(rows) * len(set.union(*rows))


@pytest.mark.parametrize("products", ["dtype", "float16"])
def test_only_positions_where_a_token_is_learnt_are_scored(flags, tmp_path, gpu, products):
    """In training, evaluation and where it is tried out whether a batch fits in memory."""
    job = prepare([*flags, "--products", products, "--output_dir", str(tmp_path)])
    trainer, size = t.build_trainer(job), len(job.tokenizer)
    rows = sorted(job.train, key=lambda row: len(row["input_ids"]))
    batch = trainer.data_collator([rows[n] for n in (0, 6, 12)])
    count = scored(batch["labels"].tolist())
    learnt = sum(label != -100 for label in batch["labels"].flatten())
    assert learnt < count < batch["labels"].numel() / 2  # the rows differ, and prompts are long
    with Products(size) as seen:
        trainer.compute_loss(trainer.model, batch).backward()
    assert seen.rows == [count] * 2  # and in the backward pass
    evaluated = [scored(batch["labels"].tolist()) for batch in trainer.get_eval_dataloader()]
    with Products(size) as seen:
        trainer.evaluate()
    assert seen.rows == evaluated and len(evaluated) == 2
    with Products(size) as seen:
        look_for_memory(trainer, job)
    # As if all were learnt: another batch of this size may have longer replies.
    assert seen.rows == [2 * (len(rows[-1]["input_ids"]) - 1)] * 2


# Of three rows' tokens those that are learnt: apart, in two replies, in all but the first.
LEARNT = [{3, 4}, {7, 8, 9, 19}, {*range(1, 12)}]


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("items", [None, 100, torch.tensor(100)], ids=str)
def test_the_loss_is_the_sum_over_learnt_tokens_by_their_number(
    flags, tiny, untied, tmp_path, head, items
):
    """A step counts the learnt tokens of all its batches; an evaluation gives no number."""
    folder = {"tied": tiny, "untied": untied}[head]
    job = prepare([*flags, "--model_name", folder, "--output_dir", str(tmp_path)])
    trainer, numbers = t.build_trainer(job), random.Random(0)
    set_b(trainer)
    trainer.model.eval()
    pairs = []
    for length, learnt in zip((6, 20, 12), LEARNT, strict=True):
        ids = [numbers.randrange(2000) for _ in range(length)]
        pairs.append((ids, [ids[n] if n in learnt else -100 for n in range(length)]))
    for chosen in (pairs, pairs[:2], pairs[:1], pairs[1:]):
        rows = [{"input_ids": ids, "labels": labels} for ids, labels in chosen]
        loss = trainer.compute_loss(
            trainer.model, trainer.data_collator(rows), num_items_in_batch=items
        )
        count = sum(label != -100 for _, labels in chosen for label in labels)
        expected = token_loss(trainer.model, chosen) * (1 if items is None else count / 100)
        assert loss.item() == pytest.approx(expected, rel=ROUNDING)
        assert loss.shape == () and loss.dtype == torch.float32


@pytest.mark.parametrize("products", ["dtype", "float16"])
def test_of_bfloat16s_logits_the_loss_and_its_gradient_are_made_in_float32(
    flags, tmp_path, products
):
    more = ["--dtype", "bfloat16", "--products", products, "--lora_dropout", "0"]
    job = prepare([*flags, *more, "--output_dir", str(tmp_path)])
    trainer, seen = t.build_trainer(job), []
    batch = trainer.data_collator([job.train[0], job.train[1]])

    def keep(model, args, inputs, output):
        output.logits.retain_grad()
        seen.append(output.logits)

    trainer.model.register_forward_hook(keep, with_kwargs=True)
    set_b(trainer)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=1000)
    loss.backward()
    (logits,) = seen
    exact = logits.detach().double().requires_grad_()
    labels = batch["labels"][:, 1:]
    targets = labels[:, (labels != -100).any(0)].flatten()
    expected = torch.nn.functional.cross_entropy(exact.flatten(0, 1), targets, reduction="sum")
    (expected / 1000).backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item() / 1000, rel=1e-5)
    # bfloat16 rounds the gradient once, by at most a 256th.
    error = (logits.grad.double() - exact.grad).abs()
    assert (error <= 1.01 * 2**-8 * exact.grad.abs() + 1e-12).all()


def test_training_with_an_untied_head_learns_and_is_proved(flags, untied, tmp_path):
    t.main([*flags, "--model_name", untied, "--output_dir", str(tmp_path)])
    base = AutoModelForCausalLM.from_pretrained(untied, dtype="float32").eval()
    assert not base.lm_head.weight.equal(base.get_input_embeddings().weight)
    job = prepare([*flags, "--model_name", untied])
    history = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["loss_history"]
    first, *_, last = logged(history, "eval_loss")
    assert first == pytest.approx(batches_loss(base, job.eval), rel=ROUNDING)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "final_lora").eval()
    assert last == pytest.approx(batches_loss(model, job.eval), rel=ROUNDING)
    assert last < first


def test_tokens_a_second_stand_beside_the_loss(demo):
    output, text = demo
    printed = [line for line in text.splitlines() if line.startswith("train ")]
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    rates = [int(line.removesuffix(" tokens/s").split()[-1].replace(",", "")) for line in printed]
    assert len(rates) == 8 and min(rates) > 0
    assert rates[-1] == round(record["tokens"] / record["train_seconds"])
    assert record["tokens"] == logged(record["loss_history"], "num_input_tokens_seen")[-1]


# ---- memory of a simulated GPU: which batches are recomputed, and that it changes nothing ------


@pytest.fixture
def gpu(monkeypatch):
    """Simulate a GPU of 100 bytes, of which others hold 60 and torch 10; return what is allowed."""
    shares = []
    fakes = {"mem_get_info": (30, 100), "memory_reserved": 10, "is_available": False}
    fakes |= {"empty_cache": None, "reset_peak_memory_stats": None}
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    return shares


def give_memory(trainer, kept, recomputed=math.inf):
    """Let a pass over more tokens run out of memory, with activations kept or recomputed."""

    def run_out(model, _, inputs, __):
        if model.training:
            room = recomputed if recomputes(model) else kept
            if inputs["input_ids"].numel() > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    trainer.model.register_forward_hook(run_out, with_kwargs=True)


def look_for_memory(trainer, job):
    """Do what is done before training on a GPU."""
    job.args.device = "cuda"
    t.fit_memory(trainer, job)
    job.args.device = "cpu"


@pytest.fixture(scope="module")
def steps(flags, tmp_path_factory):
    """Return a function that trains with dropout, on a GPU with room for so many tokens.

    It returns (tokens of each batch, passes through a layer, gradients of each step, log).
    """
    output = tmp_path_factory.mktemp("memory")
    more = [*STILL, "--lora_dropout", "0.5", "--num_epochs", "1", "--warmup_ratio", "0"]
    job = prepare([*flags, *more, "--output_dir", str(output)])

    def run(kept=None):
        trainer, passes = t.build_trainer(job), []
        set_b(trainer)
        layer = in_layers(trainer.model, "0.mlp")
        if kept is None:
            t.fit_memory(trainer, job)
        else:
            give_memory(trainer, kept)
            look_for_memory(trainer, job)
            assert not [name for name, p in trainer.model.named_parameters() if p.grad is not None]
        recorder = Recorder(trainer)
        layer.register_forward_pre_hook(lambda *_: passes.append(trainer.model.training))
        t.train(trainer, job)
        batches = [batch["input_ids"].numel() for batch in recorder.batches]
        return batches, sum(passes), recorder.gradients, job.history

    return job, run


@pytest.fixture(scope="module")
def on_a_cpu(steps):
    """Return the batches, gradients and log of a run for which no memory was looked for."""
    batches, passes, *results = steps[1]()
    assert passes == len(batches) == 7  # nothing is recomputed
    return batches, *results


@pytest.mark.parametrize("share", [1, 0.9, 0])
def test_exactly_the_batches_that_do_not_fit_are_recomputed_and_nothing_else_changes(
    steps, on_a_cpu, gpu, capsys, share
):
    """Dropout is part of it: the random state is as if nothing had been tried out."""
    job, run = steps
    lengths = sorted(len(row["input_ids"]) for row in job.train)
    kept = int(share * 2 * lengths[-1])
    batches, passes, gradients, history = run(kept)
    (text,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory ")]
    limit = max([2 * n for n in lengths[1:] if 2 * n <= kept], default=0)
    said = "kept for all batches" if share == 1 else f"kept for batches of up to {limit} tokens"
    assert said in text
    again = [tokens for tokens in batches if tokens > limit]
    assert len(again) in {1: [0], 0.9: range(1, 7), 0: [7]}[share]
    assert batches == on_a_cpu[0] and passes == 7 + len(again)
    assert gpu == [pytest.approx(0.9 * (30 + 10) / 100), 1]
    for key in ("loss", "grad_norm", "num_input_tokens_seen", "eval_loss"):
        assert logged(history, key) == pytest.approx(logged(on_a_cpu[2], key), rel=ROUNDING), key
    for got, expected in zip(gradients, on_a_cpu[1], strict=True):
        assert_near(got, expected)


def random_states():
    """Return the state of each random generator."""
    python, numpy = random.getstate(), np.random.get_state()
    return (
        python,
        [part.tolist() if hasattr(part, "tolist") else part for part in numpy],
        [*torch.get_rng_state().tolist()],
    )


def test_what_is_tried_out_leaves_no_trace(mixed, gpu):
    """The memory runs out in the backward pass, when half of the gradients are there."""
    trainer, tried = mixed(), []
    job = t.Job(t.parse_args(["--demo"]), train=[*trainer.train_dataset])
    before = random_states()
    first = next(iter(lora(trainer.model).values()))  # whose gradient is computed last

    def run_out(gradient):
        tried.append(len([p for p in trainer.model.parameters() if p.grad is not None]))
        if not recomputes(trainer.model):
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = first.register_hook(run_out)
    look_for_memory(trainer, job)
    hook.remove()
    assert len(tried) > 2 and tried[0] > 10
    assert not [n for n, p in trainer.model.named_parameters() if p.grad is not None]
    assert random_states() == before
    # Recomputation as transformers has it would ask a gradient of the embeddings' output.
    assert not trainer.model.get_input_embeddings()(torch.tensor([1])).requires_grad
    assert trainer.state.global_step == 0 and trainer.state.log_history == []


def test_the_limit_is_the_largest_batch_that_fits_and_is_found_in_few_passes(mixed, gpu):
    """The layers ask nothing of the batch but its size, so that many GPUs can be tried."""
    trainer, numbers, tried = mixed(), random.Random(0), []
    weight = next(iter(lora(trainer.model).values()))

    def forward(input_ids, logits_to_keep=(), **_):
        tried.append(input_ids.numel())
        if input_ids.numel() > kept and not recomputes(trainer.model):
            raise torch.OutOfMemoryError
        size = (len(input_ids), len(logits_to_keep), len(trainer.processing_class))
        logits = weight.sum() * torch.ones(1).expand(size)
        return types.SimpleNamespace(logits=logits)

    trainer.model.forward = forward
    for _ in range(60):
        tried.clear()
        lengths = [numbers.randint(1, 300) for _ in range(numbers.randint(1, 60))]
        size = numbers.randint(1, 5)
        # Of a batch's rows the longest counts; the shortest batches are those of the shortest rows.
        possible = [min(size, len(lengths)) * n for n in sorted(lengths)[size - 1 :]]
        possible = possible or [len(lengths) * max(lengths)]
        kept = int(numbers.choice([0, 0.3, 0.7, 1]) * possible[-1]) + numbers.choice([-1, 0])
        rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in lengths]
        job = t.Job(t.parse_args(["--demo", "--batch_size", str(size)]), train=rows)
        kept = max(kept, 0)
        look_for_memory(trainer, job)
        assert tried[0] == possible[-1] and len(tried) <= 3 + math.log2(len(possible) + 1)
        for tokens in {*possible, *lengths}:
            if kept < tokens:
                trainer.model(input_ids=torch.ones(1, tokens))
                assert recomputes(trainer.model)
            elif tokens in possible:
                trainer.model(input_ids=torch.ones(1, tokens))
                assert not recomputes(trainer.model)


def test_a_batch_that_fits_in_neither_way_ends_the_run_before_its_first_step(
    flags, tmp_path, monkeypatch, capfd, gpu
):
    longest = max(len(row["input_ids"]) for row in prepare(flags).train)
    monkeypatch.setattr(t, "check_device", lambda args: "a GPU")
    argv = [*flags, "--device", "cuda", "--products", "dtype", "--output_dir", str(tmp_path)]
    recorders = []

    def change(trainer):
        give_memory(trainer, 100, 2 * longest - 1)
        recorders.append(Recorder(trainer))

    message = failing(monkeypatch, capfd, argv, change)
    assert "out of memory (the longest batch does not fit)" in message
    assert "BATCH_SIZE" in message and "MAX_SEQ_LEN" in message
    assert not recorders[0].rates and not recorders[0].evaluated


def at_step(number, action):
    """Return a change of a trainer: action(trainer) at the beginning of a step."""

    def change(trainer):
        class AtStep(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                if state.global_step == number - 1:
                    action(trainer)

        trainer.add_callback(AtStep())

    return change


def full(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.89 GiB")


def test_out_of_memory_in_a_step_keeps_the_checkpoints(flags, demo, tmp_path, monkeypatch, capfd):
    argv = [*flags, "--output_dir", str(tmp_path)]
    message = failing(monkeypatch, capfd, argv, at_step(7, full))
    assert "out of memory" in message and "1.89 GiB" in message
    assert "BATCH_SIZE" in message and "MAX_SEQ_LEN" in message
    assert (tmp_path / "checkpoints" / "checkpoint-6" / "complete.json").exists()
    # The newest two, and no README.md, which TRL writes of no run.
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"checkpoint-4", "checkpoint-6", "job.json"}
    t.main(argv)
    assert f"resume   from {tmp_path}/checkpoints/checkpoint-6" in capfd.readouterr().out
    assert (tmp_path / ADAPTER).read_bytes() == (demo[0] / ADAPTER).read_bytes()


def test_out_of_memory_while_the_model_moves_to_the_gpu_is_one_message(
    flags, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(torch.nn.Module, "to", full)
    message = failing(monkeypatch, capfd, [*flags, "--output_dir", str(tmp_path)])
    assert "out of memory" in message and "1.89 GiB" in message


# ---- numbers that are not finite ----------------------------------------------------------------


ADVICE = "; lower LEARNING_RATE, set DTYPE to float32, or check the base's weights"


def spoil_b(value):
    """Return what puts value into a weight of LoRA."""

    def spoil(trainer):
        (name, *_) = [name for name in lora(trainer.model) if "lora_B" in name]
        lora(trainer.model)[name].data[0, 0] = value

    return spoil


def spoil_loss(value):
    """Return what has each batch's loss come out as value."""

    def spoil(trainer):
        step = trainer.training_step
        trainer.training_step = lambda *args, **kwargs: step(*args, **kwargs) * value

    return spoil


def spoil_gradient(value):
    """Return what puts value into a gradient of LoRA."""

    def spoil(trainer):
        parameter = next(p for name, p in lora(trainer.model).items() if "lora_B" in name)
        parameter.register_hook(lambda gradient: gradient * value)

    return spoil


def spoil_evaluation(number):
    """Return what spoils LoRA after a step's loss, before the evaluation that follows it."""

    def change(trainer):
        class AtEnd(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step == number:
                    spoil_b(math.nan)(trainer)

        trainer.add_callback(AtEnd())

    return change


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (at_step(3, spoil_b(math.nan)), "loss is nan at step 3"),
        (at_step(1, spoil_loss(math.inf)), "loss is inf at step 1"),
        (at_step(3, spoil_loss(math.inf)), "loss is inf at step 3"),
        (at_step(1, spoil_gradient(math.inf)), "grad_norm is (inf|nan) at step 1"),
        (at_step(6, spoil_gradient(math.nan)), "grad_norm is nan at step 6"),
        (spoil_evaluation(4), "eval_loss is nan at step 4"),
    ],
)
def test_what_is_not_finite_stops_the_run(flags, tmp_path, monkeypatch, capfd, change, found):
    argv = [*flags, "--output_dir", str(tmp_path)]
    message = failing(monkeypatch, capfd, argv, change)
    assert ADVICE in message
    assert re.search(found, message)
    step = int(message.split("at step ")[1].split(";")[0])
    assert not (tmp_path / "checkpoints" / f"checkpoint-{step}").exists()  # nothing spoilt is kept


@pytest.mark.parametrize(
    ("more", "found"), [([], "eval_loss is nan at step 0"), (["--eval_file", ""], "loss is nan")]
)
def test_a_base_that_is_not_finite_is_named_as_the_cause(
    flags, tiny, tmp_path, monkeypatch, capfd, more, found
):
    def spoil(tensors):
        tensors["model.language_model.norm.weight"][0] = math.nan

    folder = changed(tiny, tmp_path / "model", spoil)
    argv = [*flags, "--model_name", folder, *more, "--output_dir", str(tmp_path / "output")]
    message = failing(monkeypatch, capfd, argv)
    assert found in message and ADVICE in message


# ---- the base model's files ---------------------------------------------------------------------


def changed(tiny, folder, change):
    """Return the path of a copy of the demo model whose tensors are changed."""
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


PREFIX = "model.language_model.layers.1."


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda ts: ts.pop(f"{PREFIX}mlp.up_proj.weight"), ["layers.1.mlp.up_proj.weight"]),
        (lambda ts: ts.update({f"{PREFIX}self_attn.q_proj.weight": torch.zeros(1024, 32)}),
         ["no weights (", "mismatch"]),
        (lambda ts: [ts.pop(name) for name in [*ts] if name.startswith(PREFIX)],
         ["layers.1.", "and 8 more"]),
    ],
    ids=["one is missing", "another shape", "a layer is missing"],
)  # fmt: skip
def test_weights_that_lack_tensors_are_refused_by_name(
    flags, tiny, tmp_path, monkeypatch, capfd, change, names
):
    """Transformers fills them with random numbers, and only warns."""
    folder = changed(tiny, tmp_path / "model", change)
    argv = [*flags, "--model_name", folder, "--output_dir", str(tmp_path / "output")]
    message = failing(monkeypatch, capfd, argv)
    assert f"MODEL_NAME {folder}: " in message
    assert [name for name in names if name not in message] == []


def cut_short(folder):
    os.truncate(folder / "model.safetensors", 100_000)


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [cut_short, as_pickle])
def test_weights_that_are_no_whole_safetensors_are_refused(
    flags, tiny, tmp_path, monkeypatch, capfd, spoil
):
    folder = shutil.copytree(tiny, tmp_path / "model")
    spoil(folder)
    argv = [*flags, "--model_name", str(folder), "--output_dir", str(tmp_path / "output")]
    message = failing(monkeypatch, capfd, argv)
    assert f"MODEL_NAME {folder}: no weights" in message and "whole safetensors" in message


HTTP_ERROR = HfHubHTTPError.__mro__[1]  # of the hub's client, whichever library that is


@pytest.mark.parametrize("kind", [HTTP_ERROR, OSError, RuntimeError])
def test_a_dropped_download_is_one_message(flags, tmp_path, monkeypatch, capfd, kind):
    def drop(*_, **__):
        raise kind("peer closed connection")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", drop)
    message = failing(monkeypatch, capfd, [*flags, "--output_dir", str(tmp_path)])
    assert "no weights (peer closed connection)" in message and "run again to go on" in message


QUANTIZED = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


@pytest.mark.parametrize("inside", [False, True], ids=["wrapper", "text model"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_base_is_refused(flags, tiny, tmp_path, name, inside):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (config["text_config"] if inside else config)["quantization_config"] = QUANTIZED[name]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    args = t.parse_args([*flags, "--model_name", str(folder)])
    with pytest.raises(SystemExit, match=r"MODEL_NAME .*model: quantized; use the model"):
        t.load_config_and_tokenizer(args)


# ---- the environment ----------------------------------------------------------------------------


ACCELERATE = {"MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "8", "USE_FSDP": "1"}
ACCELERATE |= {"DYNAMO_BACKEND": "EAGER", "SPLIT_BATCHES": "1", "USE_DEEPSPEED": "1"}
LEFT_OVER = {
    "accelerate's and a launcher's": {f"ACCELERATE_{name}": x for name, x in ACCELERATE.items()}
    | {"LOCAL_RANK": "0", "RANK": "1", "WORLD_SIZE": "2"},
    "no numbers": {"LOCAL_RANK": "abc", "RANK": "abc", "WORLD_SIZE": "abc"},
}


@pytest.mark.parametrize("name", LEFT_OVER)
def test_the_same_command_gives_the_same_bytes_whatever_a_launcher_left(
    flags, demo, tmp_path, name
):
    """Its variables stay in the environment of a shell that configured it for something else.

    Libraries read some at their import; believed, the second of two processes waits for the first.
    """
    argv = [*flags, "--num_samples", "0", "--output_dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "train_lora_single.py", *argv],
        capture_output=True, env=os.environ | LEFT_OVER[name], encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ADAPTER).read_bytes() == (demo[0] / ADAPTER).read_bytes()
