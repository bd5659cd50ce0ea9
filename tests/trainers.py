"""What the tests of the trainer share."""

import contextlib
import functools
import importlib.util
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import traceback
from pathlib import Path

import accelerate
import pytest
import torch
import trl
from conftest import default_handlers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

import train_lora_single as t

ADAPTER = "final_lora/adapter_model.safetensors"
# float32 rounds by 6e-8; sums of thousands of terms, in another order, differ by less than this.
ROUNDING = 1e-4


# ---- commands and what they leave ---------------------------------------------------------------


def run(argv):
    """Give the command in this process; return its exit status as Python would."""
    default_handlers()
    try:
        t.main([str(word) for word in argv])
    except SystemExit as stop:
        if isinstance(stop.code, int):
            return stop.code
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # pytest would take it for its own
        traceback.print_exc()
        return -signal.SIGINT
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def refused(capfd, flags, main=t.main):
    """Return what the command says, on one line, as it fails with 1 and no traceback."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in flags])
    text = capfd.readouterr().err
    assert stop.value.code == 1 and text.strip() and "Traceback" not in text
    return " ".join(text.split())


def read_record(output):
    """Return run.json, which must be valid JSON: NaN is no number there."""

    def refuse(word):
        raise AssertionError(f"run.json holds {word}")

    return json.loads((output / "run.json").read_text(encoding="utf-8"), parse_constant=refuse)


def logged(history, key):
    """Return the values of key in a trainer's log, in order."""
    return [entry[key] for entry in history if key in entry]


def files(path):
    """Return the bytes of each file below a folder, but for the log and the lock."""
    return {
        str(one.relative_to(path)): one.read_bytes()
        for one in path.rglob("*")
        if one.is_file() and one.name not in ("all_logs.log", ".lock")
    }


def checkpoints(output):
    """Return the steps of the checkpoints that are there, in order."""
    paths = output.glob("checkpoints/checkpoint-*")
    return sorted(int(path.name.rpartition("-")[2]) for path in paths)


def commands_in(text):
    """Return the words of each command that was printed, however it was broken into lines."""
    whole = re.sub(r" \\\n *", " ", text)
    return list(map(shlex.split, re.findall(r"(?m)^(?:next)? *((?:python|vllm) .*)$", whole)))


def command_in(text, *beginning):
    """Return the words of the one printed command that begins with these."""
    found = [words for words in commands_in(text) if words[: len(beginning)] == [*beginning]]
    assert len(found) == 1, text
    return found[0]


def edited_script(folder, *changes):
    """Return a copy of the script as a module, with each (old, new) text changed once."""
    text = Path(t.__file__).read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "edited_script.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("edited_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["edited_script"] = module  # where the module looks for its own settings
    spec.loader.exec_module(module)
    return module


def changed_model(folder, new, change):
    """Return the path of a copy of a model's folder whose tensors are changed."""
    shutil.copytree(folder, new)
    tensors = load_file(new / "model.safetensors")
    change(tensors)
    save_file(tensors, new / "model.safetensors", {"format": "pt"})
    return str(new)


# ---- something at a chosen moment of a run ------------------------------------------------------


def send(*numbers):
    """Return what sends this process signals, one after the other."""
    return lambda *_, **__: [os.kill(os.getpid(), number) for number in numbers]


def before(patch, owner, name, action, number=1):
    """Do action(*arguments) before call number (from 1) of owner.name."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            action(*args, **kwargs)
        return real(*args, **kwargs)

    patch.setattr(owner, name, call)


def at_step(patch, number, action):
    """Do action within this run's training step number; after a resume they count from 1."""
    before(patch, accelerate.Accelerator, "backward", action, number)


def on_trainer(monkeypatch, change):
    """Have change(trainer) called as soon as TRL has made its trainer and injected LoRA."""
    real = trl.SFTTrainer.__init__

    def init(self, *args, **kwargs):
        real(self, *args, **kwargs)
        change(self)

    monkeypatch.setattr(trl.SFTTrainer, "__init__", init)


# ---- jobs and trainers that have not begun ------------------------------------------------------


def prepared(flags):
    """Return a job as it is before the weights are loaded."""
    job = t.Job(t.parse_settings([str(word) for word in flags]))
    with contextlib.redirect_stdout(io.StringIO()):
        t.prepare(job)
    accelerate.PartialState(cpu=True)
    return job


@functools.cache
def chat_format_of(folder):
    """Return the chat format of a model's folder, of which the tokenizer is needed alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return t.ChatFormat(tokenizer, [tokenizer.eos_token_id])


def made_up(prompt_ids, reply_ids):
    """Return an example of these tokens."""
    return t.Example("made up", [], prompt_ids=prompt_ids, reply_ids=reply_ids)


def give_examples(job, lengths, seed=0):
    """Give a job made-up examples of these lengths, of which the second half is learned."""
    numbers = random.Random(seed)
    job.examples = []
    for length in lengths:
        ids = [numbers.randrange(10, 2000) for _ in range(length)]
        job.examples.append(made_up(ids[: length // 2], ids[length // 2 :]))
    with contextlib.redirect_stdout(io.StringIO()):
        job.plan = t.make_plan(job)


def lora(model):
    """Return LoRA's parameters by their names."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def set_b(model):
    """Give LoRA an effect: B is zero at first, and A has no gradient then."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lora(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)


def is_recomputing(model):
    """Return whether the layers recompute their activations: all of them, or none."""
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    (flag,) = {layer.gradient_checkpointing for layer in layers}
    return flag


LAST: dict[str, torch.Tensor] = {}  # the batch of the last pass; the model is not told the padding
REPLY_LOGITS = t.reply_logits


def noting_reply_logits(model, inputs):
    """Do what the script does, and note the batch."""
    LAST.clear()
    LAST.update(inputs)
    return REPLY_LOGITS(model, inputs)


t.reply_logits = noting_reply_logits


class Recorder(TrainerCallback):
    """What a trainer's model is given in each pass, and what its steps do."""

    def __init__(self, trainer):
        self.model, self.trained, self.evaluated = trainer.model, [], []
        self.gradients, self.rates, self.weights, self.optimizer = [], [], [], None
        self.handles = [
            trainer.model.register_forward_pre_hook(self.before, with_kwargs=True),
            trainer.model.register_forward_hook(self.after, with_kwargs=True),
        ]
        trainer.add_callback(self)

    def stop(self):
        """Record nothing more."""
        for handle in self.handles:
            handle.remove()

    def before(self, model, args, inputs):
        ids = inputs["input_ids"].clone()
        mask = inputs.get("attention_mask", LAST.get("attention_mask")).bool()
        given = {"rows": [row[one].tolist() for row, one in zip(ids, mask, strict=True)]}
        given |= {"size": ids.numel(), "keys": set(inputs), "mask": mask.clone()}
        given["is_recomputed"] = is_recomputing(model)
        (self.trained if model.training else self.evaluated).append(given)

    def after(self, model, args, inputs, output):
        passes = self.trained if model.training else self.evaluated
        if "logits" in output:  # TRL's own loss makes none
            passes[-1]["scored"] = output.logits.shape[0]
        passes[-1]["cached"] = output.get("past_key_values") is not None

    def on_pre_optimizer_step(self, *_, optimizer, **__):
        self.optimizer = optimizer
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.gradients.append({n: p.grad.clone() for n, p in lora(self.model).items()})
        self.weights.append({n: p.detach().clone() for n, p in lora(self.model).items()})


def rows_of(passes):
    """Return all rows of some passes, without their padding, which must be on the right."""
    for one in passes:
        for mask in one["mask"].tolist():
            assert mask == sorted(mask, reverse=True)
    return [row for one in passes for row in one["rows"]]


# ---- losses by other means ----------------------------------------------------------------------


def token_loss(model, examples):
    """Return the mean cross-entropy over the learned tokens, row by row, in float64."""
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            n = len(example.reply_ids)
            logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, -n - 1 : -1]
            targets = torch.tensor(example.reply_ids)
            loss = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
            total, count = total + loss.item(), count + n
    return total / count


def assert_near(gradients, expected, share=ROUNDING):
    """Compare gradients by name, each against the size of its largest element."""
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        largest = expected[name].abs().max().item()
        assert largest > 0, name
        assert (gradient - expected[name]).abs().max().item() <= share * largest, name
