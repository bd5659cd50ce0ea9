"""Model, LoRA and training: what is injected, learned, printed, refused, and in which order."""

import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time

import peft
import pytest
import torch
import trl
from datasets import Dataset
from huggingface_hub.errors import HfHubHTTPError
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file
from trainers import (
    ADAPTER,
    ROUNDING,
    Recorder,
    assert_near,
    changed_model,
    give_examples,
    inputs_of,
    logged,
    lora,
    on_trainer,
    prepared,
    read_record,
    refused,
    rows_of,
    set_b,
    token_loss,
)
from transformers import AutoModelForCausalLM, TrainerCallback

import train_lora_single as t


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return the flags of a short run whose data stays for the whole module."""
    from conftest import write_short_data

    return write_short_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Return (job, trainer, recorder) after two epochs on 14 examples, of which one is long."""
    folder = tmp_path_factory.mktemp("trained")
    words = "word " * 550  # together more than SFTConfig's max_length, 1,024 by default
    turns = [{"role": role, "content": words} for role in ("user", "assistant")]
    with open(data[data.index("--train_file") + 1], encoding="utf-8") as short:
        text = short.read() + json.dumps({"messages": turns})
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    more = ["--train_file", f"{folder}/train.jsonl", "--max_seq_len", "9999"]
    job = prepared([*data, *more, "--output_dir", str(folder)])
    assert len(job.train) == 14 and max(len(one.input_ids) for one in job.train) > 1100
    trainer = t.build_trainer(job)
    recorder = Recorder(trainer)
    t.find_what_fits(trainer, job)
    t.train(trainer, job)
    return job, trainer, recorder


@pytest.fixture(scope="module")
def base(tiny):
    """Return the tests' model, as it lies on disk."""
    return AutoModelForCausalLM.from_pretrained(tiny, dtype="float32").eval()


@pytest.fixture(scope="module")
def mixed(data, tmp_path_factory):
    """Return a function that makes a trainer on 401 made-up examples of all lengths."""
    job = prepared([*data, "--output_dir", str(tmp_path_factory.mktemp("mixed"))])
    numbers = random.Random(0)
    give_examples(job, [numbers.randint(4, 60) for _ in range(401)])

    def make(seed=42):
        job.settings.SEED = seed
        return t.build_trainer(job)

    return make


# ---- LoRA is injected once, and looked at -------------------------------------------------------


def test_lora_is_injected_by_sfttrainer_alone(data, tmp_path, monkeypatch):
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

    job = prepared([*data, "--output_dir", str(tmp_path)])
    monkeypatch.setattr(trl.SFTTrainer, "__init__", init)
    monkeypatch.setattr(BaseTuner, "inject_adapter", inject)
    trainer = t.build_trainer(job)
    assert given == [(False, [], 8)] and injected == [True]
    assert [*trainer.model.peft_config] == ["default"]


def test_the_settings_reach_lora_and_the_trainer(data, tmp_path):
    values = {"lora_r": 4, "lora_alpha": 12, "lora_dropout": 0.2, "lora_target_modules": "q_proj"}
    values |= {"seed": 7, "learning_rate": 3e-3, "lr_scheduler_type": "linear"}
    values |= {"num_epochs": 5, "batch_size": 3, "warmup_ratio": 0.2}
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    trainer = t.build_trainer(prepared([*data, *flags, "--output_dir", str(tmp_path)]))
    got, layers = trainer.args, lora(trainer.model)
    assert (got.seed, got.learning_rate, got.lr_scheduler_type) == (7, 3e-3, "linear")
    assert (got.num_train_epochs, got.max_steps, got.warmup_steps) == (5, 15, 3)
    assert got.per_device_train_batch_size * got.gradient_accumulation_steps == 6
    assert got.output_dir == f"{tmp_path}/checkpoints"
    layer = trainer.model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    assert len(layers) == 2 and layer.lora_A["default"].weight.shape[0] == 4
    assert layer.scaling["default"] == 3 and layer.lora_dropout["default"].p == 0.2
    config = trainer.model.peft_config["default"]
    assert (config.task_type, config.bias) == ("CAUSAL_LM", "none")


def in_layers(trainer, name):
    return trainer.model.get_submodule(f"base_model.model.model.layers.{name}")


def freeze_one_and_train_as_much_of_the_base(trainer):
    layer = in_layers(trainer, "1.self_attn.q_proj")
    layer.lora_A.requires_grad_(False)
    size = layer.lora_A["default"].weight.numel()
    layer.base_layer.stolen = torch.nn.Parameter(torch.zeros(size))


def frozen(size):
    return torch.nn.Parameter(torch.zeros(size), requires_grad=False)


SPOILT = {
    "nothing is trained": (lambda one: one.model.requires_grad_(False), "0 of 435,396"),
    "all is trained": (lambda one: one.model.requires_grad_(True), "435,396 of 435,396"),
    "a norm besides": (
        lambda one: in_layers(one, "0.input_layernorm").requires_grad_(True), "input_layernorm",
    ),
    "one A less": (
        lambda one: in_layers(one, "0.mlp.up_proj.lora_A").requires_grad_(False), "up_proj.lora_A",
    ),
    "the count alone is right": (freeze_one_and_train_as_much_of_the_base, "stolen"),
    "a frozen weight besides": (
        lambda one: one.model.register_parameter("odd", frozen(7)), "has 435,403 parameters",
    ),
    "A in bfloat16": (lambda one: in_layers(one, "0.mlp.up_proj.lora_A").bfloat16(), "bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_any_other_injection_than_planned_is_refused(flags, tmp_path, monkeypatch, capfd, name):
    spoil, found = SPOILT[name]
    on_trainer(monkeypatch, spoil)
    message = refused(capfd, flags)
    planned = ("30,720 were planned", "435,396 were planned", "float32")
    assert found in message and any(one in message for one in planned)
    assert read_record(tmp_path / "output")["outcome"].startswith("failed: ")
    assert not [*tmp_path.glob("output/checkpoints/checkpoint-*")]


@pytest.mark.parametrize("target", ["q_proj", "in_proj_qkv"])
def test_an_adapter_in_the_models_folder_is_never_built_on(
    flags, finished, tiny, tmp_path, capfd, target
):
    """Transformers loads it with the model, without a word; LoRA is injected over it.

    Where the targets are the same it is replaced; elsewhere it would be trained too.
    """
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = peft.LoraConfig(target_modules=[target], task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    model = peft.get_peft_model(model, config)
    for parameter in lora(model).values():
        parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    flags = [*flags, "--model_name", str(folder)]
    if target == "q_proj":
        t.main(flags)
        assert (tmp_path / "output" / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()
    else:
        assert "in_proj_qkv" in refused(capfd, flags)


def test_no_product_is_cast_behind_the_models_back(flags, monkeypatch):
    """A bfloat16 model multiplies in bfloat16, LoRA beside it in float32: there is no autocast."""
    seen, linear = set(), torch.nn.functional.linear

    def spy(rows, weight, bias=None):
        seen.add((torch.is_autocast_enabled("cpu"), rows.dtype, weight.dtype))
        return linear(rows, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    t.main([*flags, "--dtype", "bfloat16", "--max_steps", "1"])
    assert seen == {(False, one, one) for one in (torch.bfloat16, torch.float32)}


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


def test_the_optimizer_is_adamw_without_decay_clipped_at_one(trained):
    job, _, recorder = trained
    optimizer = recorder.optimizer
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer  # accelerate's wrapper
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["weight_decay"], group["betas"], group["eps"]) == (0, (0.9, 0.999), 1e-8)
    norms = logged(job.history, "grad_norm")
    assert max(norms) > 1 > min(norms)
    for norm, gradients in zip(norms, recorder.gradients, strict=True):
        after = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        assert after == pytest.approx(min(norm, 1), rel=ROUNDING)


def test_the_seed_makes_the_first_values_and_b_is_zero(mixed):
    first, again, other = (lora(mixed(seed).model) for seed in (1, 1, 2))
    for name, parameter in first.items():
        assert parameter.equal(again[name]) and parameter.dtype == torch.float32
        assert parameter.equal(other[name]) == ("lora_B" in name)
        assert parameter.any() == ("lora_A" in name)


def test_dropout_is_on_in_training_and_off_in_evaluation(trained):
    """The modes of the passes are those of Recorder: training, or not."""
    job, trainer, recorder = trained
    rates = {one.p for one in trainer.model.modules() if isinstance(one, torch.nn.Dropout)}
    assert rates == {0.05}
    batch = {"input_ids": torch.tensor([job.train[0].input_ids])}
    outputs = []
    with torch.no_grad():
        for mode in (True, True, False, False):
            outputs.append(trainer.model.base_model.train(mode)(**batch).logits)
    trainer.model.eval()
    assert not outputs[0].equal(outputs[1]) and outputs[2].equal(outputs[3])
    assert len(recorder.trained) == 8 and len(recorder.evaluated) == 3


# ---- the base model's files ---------------------------------------------------------------------


def test_on_a_gpu_the_weights_go_straight_to_it(data, tmp_path, monkeypatch):
    import accelerate

    given = {}

    class Loaded(Exception):
        """Nothing of the GPU is needed beyond this."""

    def from_pretrained(*_, **options):
        given.update(options)
        raise Loaded

    job = prepared([*data, "--output_dir", str(tmp_path)])
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    for device in ("cpu", "cuda:0"):
        monkeypatch.setattr(accelerate.PartialState(), "device", torch.device(device))
        with pytest.raises(Loaded):
            t.build_trainer(job)
        on_gpu = device.startswith("cuda")
        assert given["device_map"] == ({"": torch.device(device)} if on_gpu else None)
        assert given["use_safetensors"] is True and given["trust_remote_code"] is False
        assert given["dtype"] in ("float32", torch.float32)


LAYER = "model.language_model.layers.1."
LACKING = {
    "one tensor": (lambda ts: ts.pop(f"{LAYER}mlp.up_proj.weight"), ["layers.1.mlp.up_proj"]),
    "a layer": (
        lambda ts: [ts.pop(name) for name in [*ts] if name.startswith(LAYER)],
        ["layers.1.", "more"],
    ),
    "its shape": (
        lambda ts: ts.update({f"{LAYER}self_attn.q_proj.weight": torch.zeros(1024, 32)}),
        ["MODEL_NAME"],
    ),
}


@pytest.mark.parametrize("name", LACKING)
def test_weights_that_lack_tensors_are_refused(flags, tiny, tmp_path, capfd, name):
    """Transformers fills them with random numbers, and only warns."""
    change, words = LACKING[name]
    folder = changed_model(tiny, tmp_path / "model", change)
    message = refused(capfd, [*flags, "--model_name", folder])
    assert f"MODEL_NAME {folder}" in message
    assert [word for word in words if word not in message] == []


def cut_short(folder):
    os.truncate(folder / "model.safetensors", 100_000)


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [cut_short, as_pickle])
def test_weights_that_are_no_whole_safetensors_are_refused(flags, tiny, tmp_path, capfd, spoil):
    folder = shutil.copytree(tiny, tmp_path / "model")
    spoil(folder)
    message = refused(capfd, [*flags, "--model_name", str(folder)])
    assert f"MODEL_NAME {folder}" in message and "safetensors" in message


HTTP_ERROR = HfHubHTTPError.__mro__[1]  # of the hub's client, whichever library that is


@pytest.mark.parametrize("kind", [OSError, HTTP_ERROR])
def test_a_download_that_breaks_off_is_one_message(flags, monkeypatch, capfd, kind):

    def drop(*_, **__):
        raise kind("peer closed connection")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", drop)
    message = refused(capfd, flags)
    assert "peer closed connection" in message and "again" in message


# ---- the examples and their order ---------------------------------------------------------------


def ids_of(examples):
    return [example.input_ids for example in examples]


def test_the_model_is_given_the_very_examples(trained):
    """Nothing is rendered again, cut (one example is longer than TRL's limit) or packed."""
    job, _, recorder = trained
    assert sorted(rows_of(recorder.trained)) == sorted(ids_of(job.train) * 2)
    assert sorted(rows_of(recorder.evaluated)) == sorted(ids_of(job.held_out) * 3)
    passes = recorder.trained + recorder.evaluated
    keys = set.union(*(one["keys"] for one in passes))
    assert not keys & {"position_ids", "cu_seq_lens_q", "seq_idx"}  # of packed rows
    assert not any(one["cached"] for one in passes)  # memory that training has no use for
    tokens = 2 * sum(map(len, ids_of(job.train)))
    assert logged(job.history, "num_input_tokens_seen")[-1] == job.train_tokens == tokens


def test_every_example_is_seen_once_an_epoch_in_other_groups(trained):
    job, _, recorder = trained
    epochs = [[rows_of([one]) for one in recorder.trained[n : n + 4]] for n in (0, 4)]
    for epoch in epochs:
        assert [len(group) for group in epoch] == [4, 4, 4, 2]
        assert sorted(itertools.chain(*epoch)) == sorted(ids_of(job.train))
    first, second = ([sorted(group) for group in epoch] for epoch in epochs)
    assert sorted(first) != sorted(second)  # not the same groups in another order


@pytest.mark.parametrize("count", [16, 80, 200])
def test_also_a_small_file_gives_other_groups_in_each_epoch(data, tmp_path, count):
    """Sorting all examples by length would make the same groups each time."""
    job = prepared([*data, "--output_dir", str(tmp_path)])
    numbers = random.Random(0)
    give_examples(job, [numbers.randint(4, 60) for _ in range(count)])
    sampler, groups = t.LikeLengthsSampler(job), []
    for sampler.epoch in (0, 1):
        order = list(sampler)
        assert sorted(order) == list(range(count))
        groups.append({frozenset(order[n : n + 4]) for n in range(0, count, 4)})
    assert len(groups[0] & groups[1]) < count / 4 / 2


def lengths_of_steps(trainer, epoch=0):
    """Return the lengths of each step's examples, as the trainer deals them out in an epoch."""
    trainer.state.global_step = epoch * trainer.args.max_steps // 2
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    return [batch["attention_mask"].sum(1).tolist() for batch in trainer.get_train_dataloader()]


def test_like_lengths_are_together_and_the_steps_are_shuffled(mixed):
    trainer = mixed()
    all_lengths = sorted(map(len, trainer.train_dataset["input_ids"]))
    for epoch in (0, 1):
        steps = lengths_of_steps(trainer, epoch)
        assert sorted(itertools.chain(*steps)) == all_lengths
        assert [len(step) for step in steps] == [4] * 100 + [1]
        spread = statistics.fmean(max(step) - min(step) for step in steps[:-1])
        assert spread < 3  # by chance it would be about 34
        # Nor does the length rise or fall within the epoch, or within a part of it.
        means = [statistics.fmean(step) for step in steps[:-1]]
        for part in (means, means[:50], means[50:]):
            assert abs(statistics.correlation(range(len(part)), part)) < 0.3
        assert len({len(set(step)) for step in steps}) > 1


def test_the_order_comes_from_the_seed_and_the_epoch(mixed):
    """So a run that is resumed sees what it would have seen, whatever was drawn before."""
    first = lengths_of_steps(mixed(1))
    trainer = mixed(1)
    torch.manual_seed(99)
    random.seed(99)
    second = lengths_of_steps(trainer, 1)
    assert lengths_of_steps(trainer, 0) == first != second
    assert lengths_of_steps(trainer, 1) == second
    assert lengths_of_steps(mixed(2)) != first


# ---- rate, losses, what is printed --------------------------------------------------------------


SCHEDULES = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant_with_warmup": lambda done: 1,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_warms_up_and_falls(flags, monkeypatch, name):
    recorders = []
    on_trainer(monkeypatch, lambda trainer: recorders.append(Recorder(trainer)))
    flags = [*flags, "--lr_scheduler_type", name, "--warmup_ratio", "0.39", "--eval_file", ""]
    flags += ["--batch_size", "1", "--gradient_accumulation_steps", "1", "--max_steps", "10"]
    t.main(flags)
    warm, steps = 3, 10  # 0.39 x 10, rounded down
    shares = [
        n / warm if n < warm else SCHEDULES[name]((n - warm) / (steps - warm)) for n in range(steps)
    ]
    assert recorders[0].rates == pytest.approx([1e-2 * share for share in shares])


def test_a_line_has_the_mean_loss_since_the_last_and_the_time_left(
    flags, monkeypatch, tmp_path, capsys
):
    """A training pass takes 2,000 seconds here, an evaluation 9,999, which do not count."""
    now = [0.0]

    def watch(trainer):
        def pass_time(model, *_):
            now[0] += 2000 if model.training else 9999

        trainer.model.register_forward_pre_hook(pass_time)

    on_trainer(monkeypatch, watch)
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now[0])
        t.main([*flags, "--logging_steps", "3"])
    text, record = capsys.readouterr().out, read_record(tmp_path / "output")
    steps = [entry for entry in record["loss_history"] if "loss" in entry]
    losses, rates = logged(steps, "loss"), logged(steps, "learning_rate")
    assert len(losses) == 8 and record["train_seconds"] == 16_000
    lines = [line for line in text.splitlines() if re.match(r"train +step", line)]
    expected = [(3, losses[:3], " 2.8 h left"), (6, losses[3:6], " 67 min left")]
    expected.append((8, losses[6:], " 0 s left"))
    assert len(lines) == 3
    for line, (step, since, left) in zip(lines, expected, strict=True):
        assert f"step {step}/8 " in line and line.endswith(left)
        assert f"loss {statistics.fmean(since):.4f} " in line
        assert f"rate {rates[step - 1]:.1e} " in line
    evals = re.findall(r"^eval .* loss ([0-9.]+)", text, re.MULTILINE)
    assert evals == [f"{loss:.4f}" for loss in logged(record["loss_history"], "eval_loss")]


def test_tokens_a_second_are_those_of_training(finished):
    record = read_record(finished)
    text = (finished / "all_logs.log").read_text(encoding="utf-8")
    (last,) = re.findall(r"step 8/8 .* ([\d,]+) tokens/s", text)
    assert int(last.replace(",", "")) == round(record["train_tokens"] / record["train_seconds"])
    assert record["train_tokens"] == logged(record["loss_history"], "num_input_tokens_seen")[-1]


def test_max_steps_ends_the_run_and_its_schedule(flags, tmp_path, capsys):
    t.main([*flags, "--max_steps", "3", "--warmup_ratio", "0"])
    record = read_record(tmp_path / "output")
    rates = logged(record["loss_history"], "learning_rate")
    assert rates == pytest.approx([1e-2 * SCHEDULES["cosine"](n / 3) for n in range(3)])
    evals = [entry["step"] for entry in record["loss_history"] if "eval_loss" in entry]
    assert evals == [0, 3] and record["plan"]["steps"] == 3
    text = capsys.readouterr().out
    assert "step 3/3 " in text and "step 3" in record["published"]
    assert (tmp_path / "output" / ADAPTER).exists()


def test_the_losses_are_means_over_the_learned_tokens(trained, base, finished, tiny):
    """At first B is zero, so they are the base's; the last held-out loss is the adapter's."""
    job, _, recorder = trained
    assert "eval_loss" in job.history[0] and job.history[0]["step"] == 0
    assert logged(job.history, "eval_loss")[0] == pytest.approx(
        token_loss(base, job.held_out), rel=ROUNDING
    )
    first = [example for example in job.train if example.input_ids in recorder.trained[0]["rows"]]
    assert logged(job.history, "loss")[0] == pytest.approx(token_loss(base, first), rel=ROUNDING)
    history = read_record(finished)["loss_history"]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    model = peft.PeftModel.from_pretrained(model, finished / "final_lora").eval()
    last = token_loss(model, job.held_out)
    assert logged(history, "eval_loss")[-1] == pytest.approx(last, rel=ROUNDING)
    assert last < logged(history, "eval_loss")[0] - 0.1


def test_the_losses_and_gradients_are_those_of_trl(data, tiny, tmp_path):
    """On the same rows in the same order, as TRL is by default: two passes of two a step."""
    more = ["--learning_rate", "1e-9", "--lora_dropout", "0", "--warmup_ratio", "0"]
    more += ["--num_epochs", "1", "--eval_file", "", "--output_dir", str(tmp_path)]
    job = prepared([*data, *more])
    ours = t.build_trainer(job)
    set_b(ours.model)
    start = {name: p.detach().clone() for name, p in lora(ours.model).items()}
    recorder = Recorder(ours)
    t.find_what_fits(ours, job)
    t.train(ours, job)

    examples = {tuple(example.input_ids): example for example in job.train}
    order = [examples[tuple(row)] for row in rows_of(recorder.trained)]
    rows = [
        {"input_ids": one.input_ids, "labels": [-100] * len(one.prompt_ids) + one.reply_ids}
        for one in order
    ]
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
        processing_class=job.chat_format.tokenizer,
        peft_config=peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=t.LORA_TARGET_MODULES, task_type="CAUSAL_LM"
        ),
    )
    assert theirs.model.load_state_dict(start, strict=False).unexpected_keys == []
    by_trl = Recorder(theirs)
    theirs.train()
    assert rows_of(by_trl.trained) == ids_of(order)
    assert [one["is_recomputed"] for one in by_trl.trained] == [True] * 7
    assert [one["is_recomputed"] for one in recorder.trained] == [False] * 4
    steps = [entry for entry in job.history if "loss" in entry]
    for key, trls in [("loss",) * 2, ("grad_norm",) * 2, ("num_input_tokens_seen", "num_tokens")]:
        expected = logged(theirs.state.log_history, trls)
        assert len(expected) == 4
        assert logged(steps, key) == pytest.approx(expected, rel=ROUNDING), key
    for got, expected in zip(recorder.gradients, by_trl.gradients, strict=True):
        assert_near(got, expected)


def test_of_bfloat16s_logits_the_loss_is_made_in_float32(data, tmp_path):
    more = ["--dtype", "bfloat16", "--lora_dropout", "0", "--output_dir", str(tmp_path)]
    job = prepared([*data, *more])
    trainer, seen = t.build_trainer(job), []
    batch = inputs_of(trainer, job.train[:2])

    def keep(model, args, inputs, output):
        output.logits.retain_grad()
        seen.append(output.logits)

    trainer.model.register_forward_hook(keep, with_kwargs=True)
    set_b(trainer.model)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=1000)
    loss.backward()
    (logits,) = seen
    exact = logits.detach().double().requires_grad_()
    labels = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(exact, labels[labels != -100], reduction="sum")
    (expected / 1000).backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item() / 1000, rel=1e-5)
    # bfloat16 rounds the gradient once, by at most a 256th.
    error = (logits.grad.double() - exact.grad).abs()
    assert (error <= 1.01 * 2**-8 * exact.grad.abs() + 1e-12).all()


def test_a_head_of_its_own_is_learned_with_and_proved(flags, untied, tmp_path):
    t.main([*flags, "--model_name", untied])
    model = AutoModelForCausalLM.from_pretrained(untied, dtype="float32").eval()
    assert not model.lm_head.weight.equal(model.get_input_embeddings().weight)
    held_out = prepared([*flags, "--model_name", untied]).held_out
    history = read_record(tmp_path / "output")["loss_history"]
    first, *_, last = logged(history, "eval_loss")
    assert first == pytest.approx(token_loss(model, held_out), rel=ROUNDING)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "output" / "final_lora").eval()
    assert last == pytest.approx(token_loss(model, held_out), rel=ROUNDING)
    assert last < first


def test_a_save_asks_no_hub_about_the_embeddings(data, tmp_path, monkeypatch):
    trainer, asked = t.build_trainer(prepared([*data, "--output_dir", str(tmp_path)])), []
    trainer.model.peft_config["default"].base_model_name_or_path = "nobody/a-model-of-the-hub"
    monkeypatch.setattr(
        "peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *given: asked.append(given)
    )
    trainer.save_model(str(tmp_path / "saved"))
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert "adapter_model.safetensors" in files and "training_args.bin" not in files
    assert asked == []


# ---- numbers that are not finite ----------------------------------------------------------------


def at_step(number, action, event="on_step_begin"):
    """Return a change of a trainer: action(trainer) at the beginning of a step, or at its end."""

    def change(trainer):
        def act(self, args, state, control, **_):
            if state.global_step == number:
                action(trainer)

        trainer.add_callback(type("AtStep", (TrainerCallback,), {event: act})())

    return change


def spoil_b(trainer):
    name = next(name for name in lora(trainer.model) if "lora_B" in name)
    lora(trainer.model)[name].data[0, 0] = math.nan


def spoil_gradient(trainer):
    parameter = next(p for name, p in lora(trainer.model).items() if "lora_B" in name)
    parameter.register_hook(lambda gradient: gradient * math.inf)


NOT_FINITE = {
    "loss is nan at step 3": at_step(2, spoil_b),
    "gradient is (inf|nan) at step 1": at_step(0, spoil_gradient),
    "gradient is (inf|nan) at step 6": at_step(5, spoil_gradient),
    "held-out loss is nan at step 4": at_step(4, spoil_b, "on_step_end"),
}


@pytest.mark.parametrize("found", NOT_FINITE)
def test_what_is_not_finite_stops_the_run(flags, tmp_path, monkeypatch, capfd, found):
    on_trainer(monkeypatch, NOT_FINITE[found])
    message = refused(capfd, flags)
    assert re.search(found, message) and "LEARNING_RATE" in message and "float32" in message
    output, step = tmp_path / "output", int(re.search(r"at step (\d+)", message)[1])
    assert not (output / "checkpoints" / f"checkpoint-{step}").exists()  # nothing spoilt is kept
    assert (output / "checkpoints" / "checkpoint-3").exists() == (step > 3)
    assert not (output / "final_lora").exists()
    assert re.search(found, read_record(output)["outcome"])


@pytest.mark.parametrize("held_out", [True, False], ids=["with a held-out file", "without"])
def test_a_base_model_that_is_not_finite_is_refused(flags, tiny, tmp_path, capfd, held_out):
    def spoil(tensors):
        tensors["model.language_model.norm.weight"][0] = math.nan

    flags = [*flags, "--model_name", changed_model(tiny, tmp_path / "model", spoil)]
    message = refused(capfd, flags if held_out else [*flags, "--eval_file", ""])
    assert "loss is nan" in message and "float32" in message
    assert ("base model" in message) == held_out
    assert read_record(tmp_path / "output")["outcome"].startswith("failed: ")


# ---- the environment ----------------------------------------------------------------------------


def test_what_a_launcher_left_behind_changes_nothing(flags, finished, tmp_path):
    """Its variables stay in the environment of a shell that configured it for something else.

    Libraries read some at their import; believed, the second of two processes waits for the first.
    """
    left = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    left |= {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "1"}
    left |= {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8", "ACCELERATE_DYNAMO_BACKEND": "EAGER"}
    done = subprocess.run(
        [sys.executable, "train_lora_single.py", *flags, "--num_samples", "0"],
        capture_output=True,
        env=os.environ | left,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output" / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()
    # What libraries say does not reach the console: neither warnings nor dictionaries of losses.
    text = done.stdout + done.stderr
    assert "Warning" not in text and "{'" not in text and done.stderr == ""
