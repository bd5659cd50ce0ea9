"""Model, LoRA and training: what is injected, learned, printed and refused, and in which order."""

import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import types
from pathlib import Path

import peft
import pytest
import torch
import transformers
import trl
from conftest import handlers_restored, write_short_data
from datasets import Dataset
from huggingface_hub.errors import HfHubHTTPError
from processes import run_in_a_fork
from safetensors.torch import load_file
from trainers import (
    ADAPTER,
    ROUNDING,
    Recorder,
    assert_near,
    changed_model,
    checkpoints,
    edited_script,
    logged,
    lora,
    made_up,
    on_trainer,
    prepared,
    read_record,
    refused,
    rows_of,
    run,
    set_b,
    token_loss,
)
from transformers import AutoModelForCausalLM, TrainerCallback

import train_lora_single as t

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return the flags of a short run whose data stays for the whole module."""
    return write_short_data(tmp_path_factory.mktemp("data"))


def record(flags, *changes):
    """Give the command; return the Recorder of its trainer, which was changed before."""
    recorders = []

    def watch(trainer):
        for change in changes:
            change(trainer)
        recorders.append(Recorder(trainer))

    with pytest.MonkeyPatch.context() as patch, handlers_restored():
        on_trainer(patch, watch)
        assert run(flags) == 0
    return recorders[0]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Return what two epochs on 14 examples did, of which one is longer than TRL's limit."""
    folder = tmp_path_factory.mktemp("trained")
    words = "word " * 550  # SFTConfig's max_length is 1,024 by default
    turns = [{"role": role, "content": words} for role in ("user", "assistant")]
    text = Path(data[data.index("--train_file") + 1]).read_text(encoding="utf-8")
    (folder / "train.jsonl").write_text(text + json.dumps({"messages": turns}), encoding="utf-8")
    flags = [*data, "--train_file", f"{folder}/train.jsonl", "--max_seq_len", "9999"]
    flags += ["--logging_steps", "3", "--warmup_ratio", "0.39", "--output_dir", f"{folder}/output"]
    recorder, job = record(flags), prepared(flags)
    assert len(job.examples) == 14 and max(len(one.input_ids) for one in job.examples) > 1100
    return types.SimpleNamespace(
        output=folder / "output",
        record=read_record(folder / "output"),
        log=(folder / "output" / "all_logs.log").read_text(encoding="utf-8"),
        recorder=recorder,
        train=job.examples,
        held_out=job.held_out,
    )


@pytest.fixture(scope="module")
def base(tiny):
    """Return the tests' model, as it lies on disk."""
    return AutoModelForCausalLM.from_pretrained(tiny, dtype="float32").eval()


# ---- LoRA is injected once, and looked at -------------------------------------------------------


def test_the_settings_reach_lora_and_the_trainer(data, tmp_path):
    values = {"lora_r": 4, "lora_alpha": 12, "lora_dropout": 0.2, "lora_target_modules": "q_proj"}
    values |= {"seed": 7, "learning_rate": 3e-3, "lr_scheduler_type": "linear"}
    values |= {"num_epochs": 5, "batch_size": 3, "warmup_ratio": 0.2}
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    trainer = t.build_trainer(prepared([*data, *flags, "--output_dir", str(tmp_path / "mine")]))
    got, layers = trainer.args, lora(trainer.model)
    assert (got.seed, got.learning_rate, got.lr_scheduler_type) == (7, 3e-3, "linear")
    assert (got.num_train_epochs, got.max_steps, got.warmup_steps) == (5, 15, 3)
    assert got.per_device_train_batch_size * got.gradient_accumulation_steps == 6
    assert got.run_name == "mine"  # in a tracker; otherwise it would be a path, or nothing
    layer = trainer.model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    assert len(layers) == 2 and layer.lora_A["default"].weight.shape[0] == 4
    assert layer.scaling["default"] == 3 and layer.lora_dropout["default"].p == 0.2
    config = trainer.model.peft_config["default"]
    assert (config.task_type, config.bias) == ("CAUSAL_LM", "none")


def inject_before(patch, inject):
    """Have a model changed before SFTTrainer gets it, as an edited build_trainer() might."""
    real = trl.SFTTrainer.__init__

    def init(self, *args, model, peft_config, **kwargs):
        real(self, *args, model=inject(peft_config, model), peft_config=peft_config, **kwargs)

    patch.setattr(trl.SFTTrainer, "__init__", init)


def inject_into(config, model):
    peft.inject_adapter_in_model(config, model, adapter_name="first")
    return model


TWICE = {
    "get_peft_model": lambda config, model: peft.get_peft_model(model, config),
    "inject_adapter_in_model": inject_into,
}


@pytest.mark.parametrize("how", TWICE)
def test_a_script_that_is_edited_to_inject_twice_is_refused(flags, tmp_path, monkeypatch, how):
    inject_before(monkeypatch, TWICE[how])
    assert run(flags) == 1
    assert read_record(tmp_path / "output")["outcome"].startswith("failed: ")
    assert checkpoints(tmp_path / "output") == []


def in_layers(model, name):
    return model.get_submodule(f"base_model.model.model.layers.{name}")


def freeze_one_and_train_as_much_of_the_base(model):
    layer = in_layers(model, "1.self_attn.q_proj")
    layer.lora_A.requires_grad_(False)
    size = layer.lora_A["default"].weight.numel()
    layer.base_layer.stolen = torch.nn.Parameter(torch.zeros(size))


def frozen(size):
    return torch.nn.Parameter(torch.zeros(size), requires_grad=False)


SPOILT = {
    "nothing is trained": (lambda one: one.requires_grad_(False), "0 of 435,396"),
    "all is trained": (lambda one: one.requires_grad_(True), "435,396 of 435,396"),
    "a norm besides": (
        lambda one: in_layers(one, "0.input_layernorm").requires_grad_(True), "input_layernorm",
    ),
    "one A less": (
        lambda one: in_layers(one, "0.mlp.up_proj.lora_A").requires_grad_(False), "up_proj.lora_A",
    ),
    "the count alone is right": (freeze_one_and_train_as_much_of_the_base, "stolen"),
    "a frozen weight besides": (
        lambda one: one.register_parameter("odd", frozen(7)), "of 435,403 parameters",
    ),
    "A in bfloat16": (lambda one: in_layers(one, "0.mlp.up_proj.lora_A").bfloat16(), "float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_any_other_injection_than_planned_is_refused(flags, tmp_path, monkeypatch, capfd, name):
    spoil, found = SPOILT[name]
    on_trainer(monkeypatch, lambda trainer: spoil(trainer.model))
    assert found in refused(capfd, flags)
    assert read_record(tmp_path / "output")["outcome"].startswith("failed: ")
    assert checkpoints(tmp_path / "output") == []


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
    set_b(model)
    model.save_pretrained(folder)
    flags = [*flags, "--model_name", str(folder)]
    if target == "q_proj":
        t.main(flags)
        assert (tmp_path / "output" / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()
    else:
        assert "in_proj_qkv" in refused(capfd, flags)


def test_training_changes_lora_and_nothing_else(trained, base):
    frozen, recorder = dict(base.named_parameters()), trained.recorder
    first, last = recorder.weights[0], recorder.weights[-1]
    assert first.keys() == last.keys()
    for name, weight in last.items():
        assert weight.dtype == torch.float32 and not weight.equal(first[name]), name
        assert first[name].any() == ("lora_A" in name)  # B is zero at first
    groups = recorder.optimizer.param_groups
    sizes = sum(p.numel() for group in groups for p in group["params"])
    assert sizes == trained.record["plan"]["trainable"]
    for name, parameter in recorder.model.named_parameters():  # LoRA was taken out to verify it
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_" not in name:
            assert parameter.equal(frozen.pop(plain)), name
    assert set(frozen) <= {"lm_head.weight"}  # tied


def test_the_optimizer_is_adamw_without_decay_clipped_at_one(trained):
    optimizer = trained.recorder.optimizer
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer  # accelerate's wrapper
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["weight_decay"], group["betas"], group["eps"]) == (0, (0.9, 0.999), 1e-8)
    norms = logged(trained.record["loss_history"], "grad_norm")
    assert max(norms) > 1 > min(norms)
    for norm, gradients in zip(norms, trained.recorder.gradients, strict=True):
        after = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        assert after == pytest.approx(min(norm, 1), rel=ROUNDING)


def test_the_rate_rises_over_whole_steps_and_falls_as_a_cosine(trained):
    warm, steps = 3, 8  # 0.39 x 8, rounded down
    falling = [(1 + math.cos(math.pi * n / (steps - warm))) / 2 for n in range(steps - warm)]
    expected = [1e-2 * share for share in [0, 1 / 3, 2 / 3, *falling]]
    assert trained.recorder.rates == pytest.approx(expected)


# ---- the base model's files ---------------------------------------------------------------------


def test_on_a_gpu_the_weights_go_straight_to_it(tiny, monkeypatch):
    given = {}

    class Loaded(Exception):
        """Nothing of the GPU is needed beyond this."""

    def from_pretrained(*_, **options):
        given.update(options)
        raise Loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    for name in ("cpu", "cuda:0"):
        device = torch.device(name)
        with pytest.raises(Loaded):
            t.load_model(tiny, "main", "bfloat16", device)
        assert given["device_map"] == ({"": device} if name == "cuda:0" else None)
        assert given["use_safetensors"] is True and given["trust_remote_code"] is False
        assert given["dtype"] in ("bfloat16", torch.bfloat16)


LAYER = "model.language_model.layers.1."


def spoilt_tensors(change):
    """Return what changes the tensors of a model's folder."""

    def spoil(folder):
        shutil.move(changed_model(folder, folder / "new", change), folder.with_name("new"))
        shutil.copy(folder.with_name("new") / "model.safetensors", folder)

    return spoil


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BAD_FILES = {
    "a tensor is missing": (
        spoilt_tensors(lambda tensors: tensors.pop(f"{LAYER}mlp.up_proj.weight")),
        "layers.1.mlp.up_proj",
    ),
    "a shape is another": (
        spoilt_tensors(
            lambda tensors: tensors.update({f"{LAYER}self_attn.q_proj.weight": torch.ones(9, 9)})
        ),
        "",
    ),
    "it is cut short": (lambda folder: os.truncate(folder / "model.safetensors", 100_000), ""),
    "it is a pickle": (as_pickle, "safetensors"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_weights_that_are_not_whole_safetensors_are_refused(tiny, tmp_path, what):
    """Transformers fills what is missing with random numbers, and only warns."""
    spoil, word = BAD_FILES[what]
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    spoil(folder)
    with pytest.raises(t.UserError, match=re.escape(str(folder))) as error:
        t.load_model(str(folder), "main", "float32", CPU)
    assert word in str(error.value)


@pytest.mark.parametrize("kind", [OSError, HfHubHTTPError.__mro__[1]])
def test_a_download_that_breaks_off_is_one_message(tiny, monkeypatch, kind):
    """The second is an error of the hub's client, whichever library that is."""

    def drop(*_, **__):
        raise kind("peer closed connection")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", drop)
    with pytest.raises(t.UserError, match=r"peer closed connection.*again"):
        t.load_model(tiny, "main", "float32", CPU)


@pytest.mark.parametrize("where", ["core_model_loading._materialize_copy", "modeling_utils.init"])
def test_weights_that_do_not_fit_on_the_gpu_are_one_message(tiny, monkeypatch, capfd, where):
    """Transformers turns this into a report of all weights and an error of conversion."""

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96 MiB")

    if where.startswith("core"):
        monkeypatch.setattr(transformers.core_model_loading, "_materialize_copy", fail)
    else:
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(t.UserError, match=r"do not fit in the GPU's free memory.*nvidia-smi"):
        t.load_model(tiny, "main", "float32", CPU)
    assert "CONVERSION" not in "".join(capfd.readouterr())


def test_no_step_counts_the_weights(trained, monkeypatch, tmp_path, data):
    def refuse(*_, **__):
        raise AssertionError("this takes 5 ms a step")

    monkeypatch.setattr(transformers.Trainer, "floating_point_ops", refuse)
    assert run([*data, "--max_steps", "2", "--output_dir", tmp_path / "output"]) == 0


# ---- the examples and their order ---------------------------------------------------------------


def ids_of(examples):
    return [example.input_ids for example in examples]


def test_the_model_is_given_the_very_examples_once_an_epoch(trained):
    """Nothing is rendered again, cut (one example is longer than TRL's limit) or packed."""
    train, held_out, recorder = ids_of(trained.train), ids_of(trained.held_out), trained.recorder
    epochs = [[rows_of([one]) for one in recorder.trained[n : n + 4]] for n in (0, 4)]
    for epoch in epochs:
        assert [len(step) for step in epoch] == [4, 4, 4, 2]
        assert sorted(itertools.chain(*epoch)) == sorted(train)
    assert sorted(map(sorted, epochs[0])) != sorted(map(sorted, epochs[1]))  # other groups
    evaluated = rows_of(recorder.evaluated)
    assert sorted(evaluated[:-1]) == sorted(held_out * 3)  # the last pass verifies one example
    passes = recorder.trained + recorder.evaluated
    keys = set.union(*(one["keys"] for one in passes))
    assert not keys & {"position_ids", "cu_seq_lens_q", "seq_idx"}  # of packed rows
    assert not any(one["cached"] for one in passes)  # memory that training has no use for
    tokens = 2 * sum(map(len, train))
    assert trained.record["train_tokens"] == tokens == trained.record["data"]["train"]["tokens"] * 2


@pytest.fixture(scope="module")
def sampled(data):
    """Return a function that gives the steps of an epoch on 401 examples of all lengths."""
    numbers, job = random.Random(0), types.SimpleNamespace(settings=t.parse_settings(data))
    lengths = [numbers.randint(4, 60) for _ in range(401)]
    job.examples = [made_up([1], [2] * (length - 1)) for length in lengths]

    def steps_of(seed=42, epoch=0):
        job.settings.SEED = seed
        sampler = t.LengthGroupedSampler(job)
        sampler.epoch = epoch
        random.seed(99)  # what was drawn before does not count
        order = list(sampler)
        assert len(sampler) == len(order) == 401
        return [order[n : n + 4] for n in range(0, 401, 4)]

    return steps_of, lengths


def test_like_lengths_are_together_and_the_steps_are_shuffled(sampled):
    steps_of, lengths = sampled
    for epoch in (0, 1):
        steps = steps_of(epoch=epoch)
        assert sorted(itertools.chain(*steps)) == [*range(401)]
        assert [len(step) for step in steps] == [4] * 100 + [1]  # the incomplete one is last
        found = [[lengths[number] for number in step] for step in steps[:-1]]
        spread = statistics.fmean(max(step) - min(step) for step in found)
        assert spread < 3  # by chance it would be about 34
        # Nor does the length rise or fall within the epoch, or within a part of it.
        means = [statistics.fmean(step) for step in found]
        for part in (means, means[:50], means[50:]):
            assert abs(statistics.correlation(range(len(part)), part)) < 0.3


def test_the_order_comes_from_the_seed_and_the_epoch_alone(sampled):
    """So a run that is resumed sees what it would have seen."""
    steps_of, _ = sampled
    first, second = steps_of(1, 0), steps_of(1, 1)
    assert steps_of(1, 0) == first and steps_of(1, 1) == second and steps_of(2, 0) != first
    same = {frozenset(step) for step in first} & {frozenset(step) for step in second}
    assert len(same) < 50  # each epoch has other groups


# ---- losses, and what is printed ----------------------------------------------------------------


def test_the_losses_are_means_over_the_learned_tokens(trained, base, tiny):
    """At first B is zero, so they are the base's; the last held-out loss is the adapter's."""
    history = trained.record["loss_history"]
    assert "eval_loss" in history[0] and history[0]["step"] == 0
    before, *_, last = logged(history, "eval_loss")
    assert before == pytest.approx(token_loss(base, trained.held_out), rel=ROUNDING)
    rows = trained.recorder.trained[0]["rows"]
    first = [example for example in trained.train if example.input_ids in rows]
    assert logged(history, "loss")[0] == pytest.approx(token_loss(base, first), rel=ROUNDING)
    # Without dropout, which is on in training.
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    model = peft.PeftModel.from_pretrained(model, trained.output / "final_lora").eval()
    assert last == pytest.approx(token_loss(model, trained.held_out), rel=ROUNDING)
    assert last < before - 0.1


# Small models of the families that are not told where the padding is. Windows are shorter than the
# rows, and experts are chosen for each token.
FAMILIES = {
    "qwen3_5": "", "qwen3_5_text": "Qwen3_5Text", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe",
    "qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "phi3": "Phi3",
    "gemma2": "Gemma2", "gemma3_text": "Gemma3Text",
}  # fmt: skip
WINDOWS = {"sliding_window": 8, "use_sliding_window": True, "sliding_window_pattern": 2}


def family(name, tiny, **more):
    """Return a small model with random weights of a family, in float32."""
    if not FAMILIES[name]:
        return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    sizes |= {"pad_token_id": 0, "initializer_range": 0.2} | WINDOWS | more
    sizes |= {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 48}
    sizes |= {"num_experts_per_tok": 2}
    torch.manual_seed(0)
    config = getattr(transformers, f"{FAMILIES[name]}Config")(**sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def pass_over(model, inputs):
    """Return the loss of each token, and the gradients."""
    model.zero_grad()
    losses = t.reply_losses(model, inputs)
    losses.sum().backward()
    return losses.detach(), {
        name: weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


@pytest.fixture
def padded():
    """Return a batch of three lengths that is padded on the right, and a second one otherwise."""
    numbers = random.Random(0)
    ids = [[numbers.randrange(10, 300) for _ in range(length)] for length in (40, 23, 9)]
    one = t.pad([made_up(row[:4], row[4:]) for row in ids], "cpu")
    other = {key: value.clone() for key, value in one.items()}
    is_padding = one["attention_mask"] == 0
    other["input_ids"][is_padding] = torch.arange(int(is_padding.sum())) % 290 + 3
    return one, other


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_mask_padding_changes_no_loss_and_no_gradient(name, tiny, padded, monkeypatch):
    """Whatever its tokens are; with the mask all is the same but for rounding."""
    model = family(name, tiny).train()
    given = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: given.append(set(kwargs)), with_kwargs=True
    )
    (losses, gradients), (its_losses, its_gradients) = (pass_over(model, one) for one in padded)
    assert given == [{"input_ids", "use_cache"}] * 2 and losses.max() > 1
    assert gradients.keys() == its_gradients.keys()
    # An expert multiplies padding's rows together with others', which rounds otherwise.
    allowed = 1e-6 if name in ("qwen3_moe", "mixtral") else 0
    torch.testing.assert_close(losses, its_losses, rtol=allowed, atol=allowed)
    for key, gradient in gradients.items():
        assert (gradient - its_gradients[key]).norm() <= allowed * gradient.norm(), key
    monkeypatch.setattr(t, "NEED_NO_MASK", ())
    losses, masked = pass_over(model, padded[0])
    hook.remove()
    assert "attention_mask" in given[-1]
    torch.testing.assert_close(losses, its_losses, rtol=1e-5, atol=1e-5)
    whole = torch.cat([one.flatten() for one in masked.values()])
    found = torch.cat([one.flatten() for one in gradients.values()])
    assert (found - whole).norm() <= 1e-5 * whole.norm()


def test_a_model_that_sees_what_follows_and_any_other_family_get_the_mask(tiny, padded):
    bidirectional = family("gemma3_text", tiny, use_bidirectional_attention=True)
    gpt2 = AutoModelForCausalLM.from_config(
        transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=300)
    )
    for model in (bidirectional, gpt2):
        (losses, _), (its_losses, _) = (pass_over(model.eval(), one) for one in padded)
        assert losses.max() > 1
        torch.testing.assert_close(losses, its_losses)


def test_dropout_is_on_in_training_and_off_in_evaluation(data, tmp_path):
    """Nearly all of LoRA's input is dropped, so the training's loss is another one."""
    more = ["--lora_dropout", "0.9", "--learning_rate", "1e-9", "--num_epochs", "1"]
    more += ["--eval_file", data[data.index("--train_file") + 1], "--train_file"]
    more += [str(shutil.copy(data[data.index("--train_file") + 1], tmp_path / "same.jsonl"))]
    recorder = record(
        [*data, *more, "--output_dir", str(tmp_path)], lambda trainer: set_b(trainer.model)
    )
    history = read_record(tmp_path)["loss_history"]
    with_dropout, (before, without) = logged(history, "loss"), logged(history, "eval_loss")
    job = prepared([*data, *more, "--output_dir", str(tmp_path)])
    model = AutoModelForCausalLM.from_pretrained(job.settings.MODEL_NAME, dtype="float32")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "final_lora").eval()
    assert without == pytest.approx(token_loss(model, job.held_out), rel=ROUNDING)
    with model.disable_adapter():  # before the first step it is the base's, whatever B is
        base_loss = token_loss(model, job.held_out)
    assert before == pytest.approx(base_loss, rel=ROUNDING) != without
    distances = []
    for rows, loss in zip(recorder.trained, with_dropout, strict=True):
        examples = [one for one in job.examples if one.input_ids in rows["rows"]]
        distances.append(abs(loss - token_loss(model, examples)))
    assert max(distances) > 0.01


def test_a_line_has_the_mean_loss_since_the_last_and_the_speed(trained):
    history = trained.record["loss_history"]
    losses, rates = logged(history, "loss"), logged(history, "learning_rate")
    lines = re.findall(r"(?m)^train +step.*", trained.log)
    since = [losses[:3], losses[3:6], losses[6:]]
    for line, step, part in zip(lines, (3, 6, 8), since, strict=True):
        assert f"step {step}/8 " in line and f"loss {statistics.fmean(part):.4f} " in line
        assert f"lr {rates[step - 1]:.1e} " in line and line.endswith(" left")
    *_, speed = re.findall(r"([\d,]+) tokens/s  0 s left", trained.log)
    speed = float(speed.replace(",", ""))
    expected = trained.record["train_tokens"] / trained.record["train_seconds"]
    assert speed == pytest.approx(expected, abs=0.5)
    evals = re.findall(r"(?m)^eval .* loss ([0-9.]+)(.*)", trained.log)
    notes = ["  (the base model, before training)", "", ""]
    losses = [f"{loss:.4f}" for loss in logged(history, "eval_loss")]
    assert evals == list(zip(losses, notes, strict=True))


def test_the_losses_and_gradients_are_those_of_trl(data, tiny, tmp_path):
    """On the same rows in the same order, as TRL is by default: two passes of two a step."""
    more = ["--learning_rate", "1e-9", "--lora_dropout", "0", "--warmup_ratio", "0"]
    more += ["--num_epochs", "1", "--eval_file", "", "--output_dir", str(tmp_path)]
    ours = record([*data, *more], lambda trainer: set_b(trainer.model))
    job = prepared([*data, *more])
    examples = {tuple(example.input_ids): example for example in job.examples}
    order = [examples[tuple(row)] for row in rows_of(ours.trained)]
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
    assert theirs.model.load_state_dict(ours.weights[0], strict=False).unexpected_keys == []
    by_trl = Recorder(theirs)
    theirs.train()
    assert rows_of(by_trl.trained) == ids_of(order)
    assert len(by_trl.trained) == 7 and len(ours.trained) == 4
    steps = [entry for entry in read_record(tmp_path)["loss_history"] if "loss" in entry]
    for key, trls in [("loss",) * 2, ("grad_norm",) * 2, ("num_input_tokens_seen", "num_tokens")]:
        expected = logged(theirs.state.log_history, trls)
        assert len(expected) == 4
        assert logged(steps, key) == pytest.approx(expected, rel=ROUNDING), key
    for got, expected in zip(ours.gradients, by_trl.gradients, strict=True):
        assert_near(got, expected)


def test_a_bfloat16_model_multiplies_in_bfloat16_and_lora_and_loss_are_in_float32(
    flags, tmp_path, monkeypatch
):
    """There is no autocast, which would narrow LoRA's products."""
    seen, losses, linear = set(), [], torch.nn.functional.linear
    cross_entropy = torch.nn.functional.cross_entropy

    def spy(rows, weight, bias=None):
        seen.add((torch.is_autocast_enabled("cpu"), rows.dtype, weight.dtype))
        return linear(rows, weight, bias)

    def spy_on_the_loss(logits, *given, **how):
        losses.append(cross_entropy(logits, *given, **how))
        assert logits.dtype == losses[-1].dtype == torch.float32
        return losses[-1]

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy_on_the_loss)
    t.main([*flags, "--dtype", "bfloat16", "--max_steps", "1"])
    assert seen == {(False, one, one) for one in (torch.bfloat16, torch.float32)} and losses
    assert {x.dtype for x in load_file(tmp_path / "output" / ADAPTER).values()} == {torch.float32}


def test_a_head_of_its_own_is_learned_with_and_proved(flags, untied, tmp_path):
    flags = [*flags, "--model_name", untied, "--max_steps", "4"]
    t.main(flags)
    model = AutoModelForCausalLM.from_pretrained(untied, dtype="float32").eval()
    assert not model.lm_head.weight.equal(model.get_input_embeddings().weight)
    held_out = prepared(flags).held_out
    first, last = logged(read_record(tmp_path / "output")["loss_history"], "eval_loss")
    assert first == pytest.approx(token_loss(model, held_out), rel=ROUNDING)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "output" / "final_lora").eval()
    assert last == pytest.approx(token_loss(model, held_out), rel=ROUNDING)
    assert last < first


# ---- numbers that are not finite ----------------------------------------------------------------


def at(number, action, event="on_step_begin"):
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
    "loss is nan at step 3": at(2, spoil_b),
    "gradient is (inf|nan) at step 6": at(5, spoil_gradient),
    "held-out loss is nan at step 4": at(4, spoil_b, "on_step_end"),
}


@pytest.mark.parametrize("found", NOT_FINITE)
def test_what_is_not_finite_stops_the_run(flags, tmp_path, monkeypatch, capfd, found):
    on_trainer(monkeypatch, NOT_FINITE[found])
    message = refused(capfd, flags)
    assert re.search(found, message) and "LEARNING_RATE" in message and "float32" in message
    output, step = tmp_path / "output", int(re.search(r"at step (\d+)", message)[1])
    # Nothing spoilt is kept.
    assert checkpoints(output) == [n for n in (3, 4) if n < step]
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

    Believed, the second of two processes waits for the first, and neither logs nor locks.
    """
    left = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    left |= {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "1"}
    left |= {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8", "ACCELERATE_DYNAMO_BACKEND": "EAGER"}
    forget = "import accelerate.state as s; s.AcceleratorState._reset_state(True)"
    done = run_in_a_fork(
        [sys.executable, "train_lora_single.py", *flags],
        cwd=Path.cwd(),
        env=os.environ | left,
        first=forget,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output" / ADAPTER).read_bytes() == (finished / ADAPTER).read_bytes()
    dry = run_in_a_fork(
        [sys.executable, "train_lora_single.py", *flags, "--dry_run"],
        cwd=Path.cwd(),
        env=os.environ | left,
        first=forget,
    )
    assert dry.returncode == 0, dry.stderr
    assert "\ndone " in (tmp_path / "output" / "all_logs.log").read_text(encoding="utf-8")
    # What libraries say does not reach the console: neither warnings nor dictionaries of losses.
    assert "Warning" not in done.stdout + done.stderr and "{'" not in done.stdout


@pytest.mark.parametrize("mode", [[], ["--dry_run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("variable", "method"),
    [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")],
)
def test_a_launcher_that_asks_to_shard_the_model_is_refused(
    flags, tmp_path, monkeypatch, capfd, variable, method, mode
):
    for name, value in {variable: "true", "TORCHELASTIC_RUN_ID": "x", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    text = refused(capfd, [*flags, *mode])
    assert f"The launcher asks for {method} ({variable} is set)" in text
    assert "accelerate launch --multi_gpu" in text
    assert not [*(tmp_path / "output").glob("*/*")]


@pytest.mark.parametrize(
    "argument",
    [
        "label_smoothing_factor=0.5",
        'loss_type="dft"',
        "gradient_accumulation_steps=2",
        "logging_steps=5",
        "save_total_limit=1",
        "average_tokens_across_devices=False",
        "load_best_model_at_end=True",
        "save_only_model=True",
        "torch_compile=True",
        "max_length=256",
        'eval_strategy="no"',
        'fsdp="full_shard"',
        'accelerator_config={"split_batches": True}',
    ],
)
def test_an_argument_on_which_the_script_depends_is_refused(argument, tmp_path, capfd):
    """By the dry run already, and before the weights are loaded."""
    name = argument.partition("=")[0]
    source = Path(t.__file__).read_text(encoding="utf-8")
    place = "        ddp_find_unused_parameters=False,"
    edits = [(place, f"{place}\n        {argument},")]
    edits += [(line, "") for line in re.findall(rf"(?m)^        {name}=.*\n", source)]
    script = edited_script(tmp_path, *edits)
    flags = [*write_short_data(tmp_path), "--output_dir", str(tmp_path / "output"), "--dry_run"]
    with handlers_restored(), pytest.raises(SystemExit):
        script.main(flags)
    said = capfd.readouterr().err
    assert f"{name} must stay" in said and "training_config()" in said
