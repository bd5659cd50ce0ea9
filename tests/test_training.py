"""Model, LoRA and training: what is injected, what is learned from it, and in which order."""

import itertools
import math
import random
import shutil
import statistics

import peft
import pytest
import runs
import torch
import trl
from by_hand import ROUNDING, assert_near, token_loss
from conftest import TOY
from datasets import Dataset
from safetensors.torch import load_file, save_file
from toys import GEMMA4, WEIGHTS, edit_json, model_of, save_adapter
from transformers import AutoModelForCausalLM, TrainerCallback

import train_lora_single as script
from inspect_lora.model import load_weights
from train_lora.console import UserError
from train_lora.trainer import SimilarLengthSampler, fixed_fields


@pytest.fixture(scope="module")
def job(finished):
    """Return the shared run's job, with its tokens and its plan."""
    return runs.prepared(finished.flags)


def record(flags, *changes):
    """Give the command; return the Recorder of its trainer, which was changed before."""
    with pytest.MonkeyPatch.context() as patch:
        recorders = runs.record(patch, *changes)
        assert runs.run(flags) == 0
    return recorders[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the Recorder and the log of a run whose gradients are above and below 1."""
    folder = tmp_path_factory.mktemp("trained")
    recorder = record([*runs.short_flags(folder), "--warmup_ratio", "0.39", "--lora_alpha", "12"])
    return recorder, runs.history(folder / "output")


def at(event, number, action):
    """Return a change of a trainer: action(trainer) at an event, when so many steps are done."""

    def change(trainer):
        def act(self, args, state, control, **_):
            if state.global_step == number:
                action(trainer)

        trainer.add_callback(type("AtStep", (TrainerCallback,), {event: act})())

    return change


def in_layers(model, name):
    return model.get_submodule(f"base_model.model.model.layers.{name}")


def test_the_settings_reach_lora_and_the_trainer(flags):
    values = {"lora_r": 4, "lora_alpha": 12, "lora_dropout": 0.2, "lora_target_modules": "q_proj"}
    values |= {"seed": 7, "learning_rate": 3e-3, "lr_scheduler_type": "linear"}
    values |= {"num_epochs": 5, "batch_size": 3, "warmup_ratio": 0.2}
    more = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    trainer = script.build_trainer(runs.prepared([*flags, *more]))
    got, layers = trainer.args, runs.lora(trainer.model)
    assert (got.seed, got.learning_rate, got.lr_scheduler_type) == (7, 3e-3, "linear")
    assert (got.max_steps, got.warmup_steps) == (15, 3)  # three steps an epoch, 0.2 x 15
    layer = in_layers(trainer.model, "1.self_attn.q_proj")
    assert len(layers) == 2 and layer.lora_A["default"].weight.shape[0] == 4
    assert layer.scaling["default"] == 3 and layer.lora_dropout["default"].p == 0.2
    config = trainer.model.peft_config["default"]
    assert (config.task_type, config.bias) == ("CAUSAL_LM", "none")


SPOILT = {
    "all is trained": (lambda one: one.requires_grad_(True), "embed_tokens"),
    "one A less": (
        lambda one: in_layers(one, "0.mlp.up_proj.lora_A").requires_grad_(False), "up_proj.lora_A",
    ),
    "A in bfloat16": (lambda one: in_layers(one, "0.mlp.up_proj.lora_A").bfloat16(), "float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_any_other_injection_than_planned_is_refused(flags, tmp_path, monkeypatch, capfd, name):
    spoil, key = SPOILT[name]
    runs.on_trainer(monkeypatch, lambda trainer: spoil(trainer.model))
    runs.refused(capfd, flags, key)
    assert runs.read_record(tmp_path / "output")["outcome"].startswith("failed: ")
    assert runs.checkpoints(tmp_path / "output") == []


@pytest.mark.parametrize("target", ["q_proj", "in_proj_qkv"])
def test_an_adapter_in_the_models_folder_is_never_built_on(flags, finished, tmp_path, target):
    """Transformers loads it with the model, without a word, and LoRA is injected over it."""
    folder = shutil.copytree(TOY, tmp_path / "model")
    save_adapter(folder, r=8, lora_alpha=16, target_modules=[target])
    status, final = runs.run([*flags, "--model_name", folder]), tmp_path / "output" / runs.ADAPTER
    if status == 0:
        assert final.read_bytes() == (finished.output / runs.ADAPTER).read_bytes()
    assert final.exists() == (status == 0)


def test_training_changes_lora_and_nothing_else(trained, base):
    recorder, _ = trained
    first, last = recorder.weights[0], recorder.weights[-1]
    assert first.keys() == last.keys()
    for name, weight in last.items():
        assert weight.dtype == torch.float32 and not weight.equal(first[name]), name
        assert first[name].any() == ("lora_A" in name)  # B is zero at first
    groups = recorder.optimizer.param_groups
    sizes = sum(weight.numel() for group in groups for weight in group["params"])
    assert sizes == sum(weight.numel() for weight in first.values())
    frozen = dict(base.named_parameters())
    for name, parameter in recorder.model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if "lora_" not in name:
            assert parameter.equal(frozen.pop(plain)), name
    assert set(frozen) <= {"lm_head.weight"}  # tied
    assert type(recorder.optimizer.optimizer) is torch.optim.AdamW  # in accelerate's wrapper
    for group in groups:
        assert (group["weight_decay"], group["betas"], group["eps"]) == (0, (0.9, 0.999), 1e-8)


def test_the_rate_follows_the_settings_and_gradients_are_clipped_at_one(trained):
    recorder, history = trained
    warm, steps = 3, 8  # 0.39 x 8, rounded down
    falling = [(1 + math.cos(math.pi * n / (steps - warm))) / 2 for n in range(steps - warm)]
    assert recorder.rates == pytest.approx([1e-2 * one for one in [0, 1 / 3, 2 / 3, *falling]])
    norms = runs.logged(history, "grad_norm")
    assert max(norms) > 1 > min(norms)
    for norm, gradients in zip(norms, recorder.gradients, strict=True):
        after = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        assert after == pytest.approx(min(norm, 1), rel=ROUNDING)


@pytest.mark.parametrize("part", ["_load_from_checkpoint", "_load_optimizer_and_scheduler"])
def test_a_checkpoint_that_is_not_loaded_ends_the_run(stopped, tmp_path, monkeypatch, part):
    """Trainer would go on with a new adapter, or with a new optimizer."""
    output = shutil.copytree(stopped.output, tmp_path / "output")
    before = runs.checkpoints(output)
    monkeypatch.setattr(trl.SFTTrainer, part, lambda *_, **__: None)
    assert runs.run([*stopped.flags, "--output_dir", output]) == 1
    assert runs.checkpoints(output) == before
    assert runs.read_record(output)["outcome"].startswith("failed: ")


def test_weights_that_are_not_whole_safetensors_end_the_run(tmp_path):
    """Transformers fills what is missing with random numbers, and only warns."""
    missing = "model.language_model.layers.1.mlp.up_proj.weight"
    folder = shutil.copytree(TOY, tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    torch.save(tensors, folder / "pytorch_model.bin")
    del tensors[missing]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj"):
        load_weights(str(folder), "", "float32", "cpu")
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError):
        load_weights(str(folder), "", "float32", "cpu")


def test_no_code_of_a_model_is_run(flags, tmp_path):
    folder, marker = shutil.copytree(TOY, tmp_path / "model"), tmp_path / "was run"
    (folder / "mine.py").write_text(f"open({str(marker)!r}, 'w')\nTheirs = None\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for name in ("config.json", "tokenizer_config.json"):
        entry = {"auto_map": {one: "mine.Theirs" for one in names}}
        edit_json(folder / name, lambda config, entry=entry: config.update(entry))
    script.build_trainer(runs.prepared([*flags, "--model_name", folder]))
    assert not marker.exists()


def test_the_model_is_given_the_very_examples_once_an_epoch(finished, job):
    """Nothing is rendered again or packed."""
    parts, recorded = (job.data.examples, job.data.held_out), finished.recorded
    train, held_out = ([one.input_ids for one in part] for part in parts)
    assert len(train) == 14 and len(held_out) == 4
    epochs = [[runs.rows_of([one]) for one in recorded.trained[n : n + 4]] for n in (0, 4)]
    assert len(recorded.trained) == 8
    for epoch in epochs:
        assert [len(step) for step in epoch] == [4, 4, 4, 2]
        assert sorted(itertools.chain(*epoch)) == sorted(train)
    assert sorted(map(sorted, epochs[0])) != sorted(map(sorted, epochs[1]))  # other groups
    evaluated = runs.rows_of(recorded.evaluated)
    assert sorted(evaluated[: 3 * len(held_out)]) == sorted(held_out * 3)
    keys = set.union(*(one["keys"] for one in recorded.trained + recorded.evaluated))
    assert not keys & {"position_ids", "cu_seq_lens_q", "seq_idx"}  # of packed rows


def test_nothing_is_cut_at_trls_own_limit(flags):
    """SFTConfig's max_length is 1,024 by default."""
    job = runs.prepared([*flags, "--max_seq_len", "2000"])
    job = runs.give_examples(job, [1500, 9, 20])
    (batch,) = script.build_trainer(job).get_train_dataloader()
    lengths = sorted(batch["attention_mask"].sum(1).tolist())
    assert lengths == [9, 20, 1500] and (batch["labels"] != -100).sum() == 750 + 5 + 10


def steps_of(lengths, seed, epoch):
    """Return the examples of each step of an epoch, by their numbers."""
    settings = runs.settings_of("--seed", str(seed))
    examples = [runs.made_up([1], [2] * (length - 1)) for length in lengths]
    steps_done = epoch * math.ceil(len(lengths) / 4)
    sampler = SimilarLengthSampler(examples, settings, lambda: steps_done)
    order = list(sampler)
    assert len(sampler) == len(lengths) and sorted(order) == [*range(len(lengths))]
    return [order[n : n + 4] for n in range(0, len(lengths), 4)]


MANY_LENGTHS = random.Random(0).choices(range(4, 61), k=401)


def test_the_order_is_that_of_seed_and_epoch():
    """So a run that is resumed sees what it would have seen."""
    first, second = (steps_of(MANY_LENGTHS, 1, epoch) for epoch in (0, 1))
    random.seed(5)  # what was drawn before does not count
    assert steps_of(MANY_LENGTHS, 1, 0) == first != steps_of(MANY_LENGTHS, 2, 0)
    same = {frozenset(step) for step in first} & {frozenset(step) for step in second}
    assert len(same) < 50  # each epoch has other groups


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_step_has_like_lengths_and_an_epoch_does_not_begin_with_the_short_ones(epoch):
    *steps, last = steps_of(MANY_LENGTHS, 1, epoch)
    assert [len(step) for step in steps] == [4] * 100 and len(last) == 1
    found = [[MANY_LENGTHS[number] for number in step] for step in steps]
    spread = statistics.fmean(max(step) - min(step) for step in found)
    assert spread < 3  # by chance it would be about 34
    means = [statistics.fmean(step) for step in found]
    for part in (means, means[:50], means[50:]):
        assert abs(statistics.correlation(range(len(part)), part)) < 0.3


def test_the_losses_are_means_over_the_target_tokens(finished, job, base):
    """At first B is zero, so they are the base's; the last held-out loss is the adapter's."""
    history = runs.history(finished.output)
    assert "eval_loss" in history[0] and history[0]["step"] == 0
    before, *_, last = runs.logged(history, "eval_loss")
    assert before == pytest.approx(token_loss(base, job.data.held_out), rel=ROUNDING)
    rows = finished.recorded.trained[0]["rows"]
    first = [example for example in job.data.examples if example.input_ids in rows]
    assert len({len(one.reply_ids) for one in first}) > 1  # a mean of means would differ
    assert runs.logged(history, "loss")[0] == pytest.approx(token_loss(base, first), rel=ROUNDING)
    assert_the_last_loss_is_the_adapters(finished.output, job)
    assert last < before - 0.1


def assert_the_last_loss_is_the_adapters(output, job):
    """Compare it with PEFT's model, row by row, without dropout; return that model."""
    model = AutoModelForCausalLM.from_pretrained(TOY, dtype="float32")
    model = peft.PeftModel.from_pretrained(model, output / "final_lora").eval()
    last = runs.logged(runs.history(output), "eval_loss")[-1]
    assert last == pytest.approx(token_loss(model, job.data.held_out), rel=ROUNDING)
    return model


def test_dropout_is_on_in_training_and_off_in_evaluation(flags, tmp_path):
    """Nearly all of LoRA's input is dropped, so the training's loss is another one."""
    train_file = flags[flags.index("--train_file") + 1]
    more = ["--lora_dropout", "0.9", "--learning_rate", "1e-9", "--num_epochs", "1"]
    more += ["--eval_file", shutil.copy(train_file, tmp_path / "same.jsonl")]
    recorder = record([*flags, *more], lambda trainer: runs.set_b(trainer.model))
    job = runs.prepared([*flags, *more])
    model = assert_the_last_loss_is_the_adapters(tmp_path / "output", job)
    history = runs.history(tmp_path / "output")
    before, without = runs.logged(history, "eval_loss")
    with model.disable_adapter():  # before the first step it is the base's, whatever B is
        base_loss = token_loss(model, job.data.held_out)
    assert before == pytest.approx(base_loss, rel=ROUNDING) != without
    distances = []
    for rows, loss in zip(recorder.trained, runs.logged(history, "loss"), strict=True):
        examples = [one for one in job.data.examples if one.input_ids in rows["rows"]]
        distances.append(abs(loss - token_loss(model, examples)))
    assert max(distances) > 0.01


def losses_by_trl(job, examples, weights, batch_size, folder):
    """Return the Recorder and the log of TRL's own trainer on these examples in this order."""
    rows = []
    for one in examples:
        labels = [-100] * len(one.prompt_ids) + one.reply_ids
        rows.append({"input_ids": one.input_ids, "labels": labels})
    lora = {"r": 8, "lora_alpha": 16, "target_modules": script.LORA_TARGET_MODULES}
    config = trl.SFTConfig(
        output_dir=str(folder), num_train_epochs=1, learning_rate=1e-9, bf16=False, use_cpu=True,
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=4 // batch_size,
        train_sampling_strategy="sequential", logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    theirs = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(job.settings.MODEL_NAME, dtype="float32"),
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=job.base.tokenizer,
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **lora),
    )
    assert theirs.model.load_state_dict(weights, strict=False).unexpected_keys == []
    recorder = runs.Recorder(theirs)
    theirs.train()
    return recorder, theirs.state.log_history


# With Gemma 4 TRL is not told the number of target tokens, so it is right with whole steps alone.
@pytest.mark.parametrize(("config", "trls_batch"), [(None, 2), (GEMMA4, 4)], ids=["toy", "Gemma 4"])
def test_the_losses_and_gradients_are_those_of_trl(flags, tmp_path, config, trls_batch):
    """On the same rows in the same order, with two examples at once."""

    def prepare(trainer):
        runs.set_b(trainer.model)
        at("on_step_begin", 0, lambda one: setattr(one, "tokens_at_once", 128))(trainer)

    flags = [*flags, "--learning_rate", "1e-9", "--lora_dropout", "0", "--warmup_ratio", "0"]
    flags += ["--num_epochs", "1", "--eval_file", ""]
    if config:
        flags += ["--model_name", model_of(config, tmp_path / "model", has_weights=True)]
    ours, job = record(flags, prepare), runs.prepared(flags)
    assert len(ours.trained) > 6  # of four steps
    examples = {tuple(example.input_ids): example for example in job.data.examples}
    order = [examples[tuple(row)] for row in runs.rows_of(ours.trained)]
    theirs, log = losses_by_trl(job, order, ours.weights[0], trls_batch, tmp_path / "trl")
    assert runs.rows_of(theirs.trained) == [one.input_ids for one in order]
    history = runs.history(tmp_path / "output")
    for key in ("loss", "grad_norm"):
        expected = pytest.approx(runs.logged(log, key), rel=ROUNDING)
        assert runs.logged(history, key) == expected, key
    assert len(ours.gradients) == 4
    for got, expected in zip(ours.gradients, theirs.gradients, strict=True):
        assert_near(got, expected)


def test_it_multiplies_in_bfloat16_and_lora_and_loss_are_in_float32(flags, tmp_path, monkeypatch):
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
    assert runs.run([*flags, "--dtype", "bfloat16", "--max_steps", "1"]) == 0
    assert seen == {(False, one, one) for one in (torch.bfloat16, torch.float32)} and losses
    tensors = load_file(tmp_path / "output" / runs.ADAPTER).values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def spoil_b(trainer):
    name = next(name for name in runs.lora(trainer.model) if "lora_B" in name)
    runs.lora(trainer.model)[name].data[0, 0] = math.nan


def spoil_gradient(trainer):
    parameter = next(p for name, p in runs.lora(trainer.model).items() if "lora_B" in name)
    parameter.register_hook(lambda gradient: gradient * math.inf)


NOT_FINITE = {  # what is spoilt, and the checkpoints that were written before
    "a loss": (at("on_step_begin", 2, spoil_b), []),
    "a gradient": (at("on_step_begin", 5, spoil_gradient), [3, 4]),
    "a held-out loss": (at("on_step_end", 4, spoil_b), [3]),
}


@pytest.mark.parametrize("what", NOT_FINITE)
def test_what_is_not_finite_is_never_saved(flags, tmp_path, monkeypatch, capfd, what):
    spoil, before = NOT_FINITE[what]
    runs.on_trainer(monkeypatch, spoil)
    runs.refused(capfd, flags, "LEARNING_RATE")
    assert runs.checkpoints(tmp_path / "output") == before
    assert not (tmp_path / "output" / "final_lora").exists()
    assert runs.read_record(tmp_path / "output")["outcome"].startswith("failed: ")


FIXED = {  # with other values of these the loss, the steps or the records would be wrong in silence
    "activation_checkpointing", "activation_offloading", "assistant_only_loss", "bf16", "fp16",
    "auto_find_batch_size", "average_tokens_across_devices", "completion_only_loss", "data_seed",
    "dataloader_drop_last", "eval_on_start", "eval_steps", "eval_strategy", "max_length",
    "gradient_accumulation_steps", "gradient_checkpointing", "ignore_data_skip", "max_steps",
    "label_smoothing_factor", "load_best_model_at_end", "logging_nan_inf_filter", "logging_steps",
    "logging_strategy", "loss_type", "num_train_epochs", "packing", "padding_free", "save_steps",
    "per_device_train_batch_size", "router_aux_loss_coef", "save_only_model", "save_strategy",
    "save_total_limit", "shuffle_dataset", "torch_empty_cache_steps", "train_sampling_strategy",
    "use_liger_kernel",
}  # fmt: skip


def test_an_argument_that_would_be_ignored_or_wrong_is_refused(job, monkeypatch):
    """By the dry run already; Python's own error names it."""
    fixed = fixed_fields(job.settings, job.base, job.plan.steps)
    assert FIXED - fixed.keys() == set()
    runs.edit_config(monkeypatch, "training_fields", label_smoothing_factor=0.5)
    with pytest.raises(TypeError, match="label_smoothing_factor"):
        runs.planned(job)
