"""What the project leans on: parts of libraries that promise nothing, each tried alone.

If one fails with a newer version, its line in LEANED_ON says what would go wrong without a word.
"""

import copy
import errno
import functools
import importlib
import logging
import os
import resource
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
import trl
from torch import nn
from toys import base_model, tokenizer
from transformers.integrations import hub_kernels
from transformers.modeling_layers import GradientCheckpointingLayer

import train_lora_single as script
from train_lora.delta_rule import DELTA_RULE, fault_of_segments
from train_lora.device import is_out_of_memory
from train_lora.files import is_full_disk

ORDER = [3, 0, 2, 1]


class Recorder(transformers.Trainer):
    """A trainer that says which of its methods are called, with a network of one number."""

    def __init__(self, **options):
        self.called = []
        super().__init__(**options)

    def _get_train_sampler(self, *_, **__):
        return ORDER

    def training_step(self, model, inputs, *_, **__):
        self.called.append(inputs["x"].tolist())
        loss = model(**inputs)["loss"]
        loss.backward()
        return loss.detach()

    def _save(self, output_dir=None, *_, **__):
        Path(output_dir).mkdir()
        Path(output_dir, "ours").touch()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return {"loss": (self.weight * x).sum()}


@functools.cache
def trained():
    """Return a trainer after two steps of two examples, and the names in its last checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Recorder(
            model=Network(),
            args=transformers.TrainingArguments(
                folder, max_steps=2, per_device_train_batch_size=2, save_steps=2, use_cpu=True,
                report_to="none", disable_tqdm=True,
            ),
            train_dataset=[{"x": float(number)} for number in range(4)],
        )  # fmt: skip
        trainer.train()
        names = {path.name for path in Path(folder, "checkpoint-2").iterdir()}
    return trainer, names


def order_is_that_of_the_sampler():
    return [x for batch in trained()[0].called for x in batch] == ORDER


def a_step_is_one_call_with_all_its_examples():
    return [len(batch) for batch in trained()[0].called] == [2, 2]


def checkpoint_has_what_save_writes():
    names = trained()[1]
    return "ours" in names and not {"training_args.bin", "model.safetensors"} & names


def overridden_methods_exist():
    return hasattr(trl.SFTTrainer, "create_model_card") and hasattr(
        transformers.Trainer, "floating_point_ops"
    )


def unknown_templates_are_refused():
    one = copy.deepcopy(tokenizer())
    one.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError):
        trl.get_training_chat_template(one)
    return True


def flag_recomputes_each_layer():
    model = copy.deepcopy(base_model()).train()
    model.activation_checkpointing_enable()
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    calls = []
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(True))
    counts = []
    for is_on in (False, True):
        for layer in layers:
            layer.gradient_checkpointing = is_on
        calls.clear()
        ids = torch.ones(1, 4, dtype=torch.long)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        counts.append(len(calls))
    size = model.config.get_text_config().num_hidden_layers
    return len(layers) == size and counts == [size, 2 * size]


def rule_has_its_name(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    rule = getattr(module, DELTA_RULE)
    return fault_of_segments(getattr(rule, "whole_rule", rule)) == ""


def package_that_is_none_is_not_used():
    """A package of that name is used where it can be imported, so that the trial can fail."""
    kernels = types.SimpleNamespace(chunk_gated_delta_rule=lambda: "fla")
    package = types.ModuleType("fla")
    package.ops = types.SimpleNamespace(gated_delta_rule=kernels)
    used = []
    for module in (package, None):
        with mock.patch.dict(sys.modules, fla=module):
            decorate = hub_kernels.use_kernel_func_from_hub_with_fallback(
                "chunk_gated_delta_rule", "fla"
            )
            used.append(decorate(lambda: "torch")())
    return used == ["fla", "torch"]


def advice_has_its_logger():
    return hub_kernels.logger is logging.getLogger("transformers.integrations.hub_kernels")


def writing_raises_the_version():
    tensor = torch.ones(2)
    before = tensor._version
    tensor.view(2).mul_(2)
    return tensor._version > before


def own_forward_is_called():
    layer = nn.Linear(2, 2)
    layer.forward = lambda rows: "ours"
    return layer(torch.ones(1, 2)) == "ours"


def targets_are_plain_linear():
    names = {*script.LORA_TARGET_MODULES}
    kinds = {
        type(module)
        for path, module in base_model().named_modules()
        if path.rpartition(".")[2] in names
    }
    return kinds == {nn.Linear}


def error_of_memory_is_a_runtime_error():
    error = torch.OutOfMemoryError("")
    return is_out_of_memory(error) and isinstance(error, RuntimeError)


def system_has_these_words():
    """Python and safetensors hand on the system's own."""
    return all(is_full_disk(OSError(os.strerror(one))) for one in (errno.ENOSPC, errno.EDQUOT))


def torch_has_these_words():
    """Where a file grows beyond a limit; a real device is not touched."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with tempfile.TemporaryDirectory() as folder:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        try:
            with pytest.raises(RuntimeError) as caught:
                torch.save(torch.ones(2**20), Path(folder, "optimizer.pt"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return is_full_disk(caught.value)


DISK = "a full disk would end in a traceback that does not say how to go on: is_full_disk()"
RULE = "long rows would take the square of their length: compute_delta_rule_in_segments()"
LEANED_ON = [
    ("Trainer._get_train_sampler", order_is_that_of_the_sampler,
     "examples would come in another order than the records say: MicroBatchedTrainer"),
    ("Trainer.training_step", a_step_is_one_call_with_all_its_examples,
     "a loss would be divided by the targets of a part of its step: MicroBatchedTrainer"),
    ("Trainer._save", checkpoint_has_what_save_writes,
     "checkpoints would have no record, and a pickle: MicroBatchedTrainer"),
    ("create_model_card, floating_point_ops", overridden_methods_exist,
     "each checkpoint would have a card, and each step would be slower: MicroBatchedTrainer"),
    ("get_training_chat_template", unknown_templates_are_refused,
     "a model might be trained in one pass with another model's template: one_pass_template()"),
    ("GradientCheckpointingLayer.gradient_checkpointing", flag_recomputes_each_layer,
     "long examples would not fit in memory: MicroBatchedTrainer.backward_if_it_fits()"),
    *(
        (f"{DELTA_RULE} of {family}", functools.partial(rule_has_its_name, family), RULE)
        for family in ("qwen3_5", "qwen3_5_moe", "qwen3_next")
    ),
    ("sys.modules['fla'] = None", package_that_is_none_is_not_used,
     "kernels with wrong gradients might be used: keep_out()"),
    ("the logger of hub_kernels", advice_has_its_logger,
     "each run would advise packages that it keeps out: main()"),
    ("Tensor._version", writing_raises_the_version,
     "the loss might leave out what comes after the head: last_states()"),
    ("nn.Module.forward", own_forward_is_called,
     "the frozen matrices would be multiplied as before: use_fp16_matmul(), last_states()"),
    ("type(module) is nn.Linear", targets_are_plain_linear,
     "fewer matrices would be multiplied in float16: fp16_modules()"),
    ("torch.OutOfMemoryError", error_of_memory_is_a_runtime_error,
     "a step that does not fit would end the run: backward_if_it_fits()"),
    ("the system's words for a full disk", system_has_these_words, DISK),
    ("torch's words for a full disk", torch_has_these_words, DISK),
]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "holds", "otherwise"), LEANED_ON, ids=[one[0] for one in LEANED_ON]
)
def test_it_is_as_it_was(part, holds, otherwise):
    sentence = f"{part} is no longer what it was: {otherwise}"
    try:
        is_so = holds()
    except Exception as error:
        raise AssertionError(sentence) from error
    assert is_so, sentence
