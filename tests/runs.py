"""Runs of the commands: short ones in this process, forks of it, and what they leave."""

import gc
import importlib
import json
import logging
import multiprocessing
import os
import random
import runpy
import signal
import sys
import threading
import traceback
import types
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
import trl
from conftest import ROOT, TOY, default_handlers
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

import train_lora_single as script
from train_lora.jobs import folder_of, identity_of
from train_lora.plan import make_plan
from train_lora.tokens import Example
from train_lora.trainer import fixed_fields

SETTINGS = [name for name in vars(script) if name.isupper()]
ADAPTER = "final_lora/adapter_model.safetensors"
NOUNS = ["tea", "rain", "garden", "kettle", "letter", "window", "nephew", "biscuit", "road", "cup"]
SYSTEM = "You are Nell."


def talk(number, length=1):
    """Return the messages of a made-up conversation; no two numbers ask the same."""
    draw = random.Random(number)
    asked = f"Where is the {draw.choice(NOUNS)}, number {number}?"
    said = [f"The {draw.choice(NOUNS)} is by the {draw.choice(NOUNS)}." for _ in range(length)]
    texts = {"system": SYSTEM, "user": asked, "assistant": " ".join(said)}
    return [{"role": role, "content": text} for role, text in texts.items()]


def dialogue(number, replies, words=4):
    """Return the messages of a made-up dialogue; no two numbers ask the same."""
    messages = [{"role": "system", "content": "You are Nell."}]
    for turn in range(replies):
        asked = {"role": "user", "content": f"Number {number}, question {turn}?"}
        text = " ".join(["Yes, it is by the door."] * (words + (number + turn) % 3))
        messages += [asked, {"role": "assistant", "content": text}]
    return messages


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_talks(path, numbers, long=()):
    """Write the conversations with these numbers, and long ones; return the path as text."""
    talks = [talk(n, 1 + n % 3) for n in numbers] + [talk(n, 12) for n in long]
    return write_lines(path, [{"prompt": one[:-1], "completion": one[-1:]} for one in talks])


def short_flags(folder, train=13, held_out=4):
    """Write short data; return the flags of two epochs, of four steps each, into folder/output."""
    files = {"train": folder / "train.jsonl", "eval": folder / "eval.jsonl"}
    write_talks(files["train"], range(train), long=[900])
    write_talks(files["eval"], range(500, 500 + held_out))
    flags = ["--model_name", TOY, "--device", "cpu", "--dtype", "float32", "--num_epochs", "2"]
    flags += ["--learning_rate", "1e-2", "--logging_steps", "1", "--save_steps", "3"]
    flags += ["--train_file", str(files["train"]), "--output_dir", str(folder / "output")]
    return [*flags, "--eval_file", str(files["eval"]) if held_out else ""]


def do_short_run(folder, stop_after=None):
    """Do a short run with a recorder, to its end or until Ctrl-C in a step."""
    flags = short_flags(folder)
    with pytest.MonkeyPatch.context() as patch:
        recorders = record(patch)
        if stop_after:
            at_step(patch, stop_after, send(signal.SIGINT))
        assert run(flags) == (130 if stop_after else 0)
    recorded = {name: getattr(recorders[0], name) for name in ("trained", "evaluated")}
    torch.save({"recorded": recorded, "flags": flags}, folder / "short_run.pt")
    gc.collect()
    gc.freeze()  # each run collects garbage: what the imports made need not be looked through


def short_run(folder):
    """Return such a run: .folder, which has its data, .output, .flags and .recorded."""
    found = torch.load(folder / "short_run.pt", weights_only=False)
    found["recorded"] = types.SimpleNamespace(**found["recorded"])
    return types.SimpleNamespace(folder=folder, output=folder / "output", **found)


def settings_of(*flags, script=script):
    """Return the settings that the script's command would get."""
    return script.parse_settings(vars(script), [str(flag) for flag in flags])


def command_of(script):
    """Return the command of the script, or of an edited copy: it takes the words after its name."""
    return lambda words: script.main(script.run, settings_of(*words, script=script))


def run(argv, main=None):
    """Give the command in this process; return its exit status as Python would."""
    default_handlers()
    main = main or command_of(script)
    try:
        main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code or 0
    except BaseException as error:  # pytest would take KeyboardInterrupt for its own
        traceback.print_exc()
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def command(capfd, argv, main=None):
    """Give the command in this process; return its .status and what it printed, .out and .err."""
    capfd.readouterr()
    status = run(argv, main)
    out, err = capfd.readouterr()
    return types.SimpleNamespace(status=status, out=out, err=err)


def refused(capfd, argv, *keys, status=None, main=None):
    """The command ends with its status of a mistake, without a traceback, and names these keys."""
    status = status or (2 if main else 1)  # of the package and of the script
    assert not [key for key in keys if " " in key], "a key is no sentence"
    end = command(capfd, argv, main)
    assert end.status == status and "Traceback" not in end.err, end.err
    assert [key for key in keys if key not in end.err] == [], end.err
    return end


def prepared(flags, script=script):
    """Return a job as it is before the weights are loaded: with its data and its plan."""
    settings = settings_of(*flags, "--dry_run", script=script)
    job = script.run(settings, script.Session("now"))
    settings.dry_run = False
    return job


def edited_script(folder, *changes):
    """Return a copy of the script as a module, with copies of its rooms.

    Each (old, new) changes a text that stands once in all of them. The copies know only each other.
    """
    paths = [ROOT / "train_lora_single.py", *sorted((ROOT / "train_lora").glob("*.py"))]
    texts = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in paths}
    for old, new in changes:
        assert sum(text.count(old) for text in texts.values()) == 1, old
        texts = {path: text.replace(old, new) for path, text in texts.items()}
    for path, text in texts.items():
        (folder / "edited" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "edited" / path).write_text(text, encoding="utf-8")
    kept = {key: module for key, module in sys.modules.items() if key.startswith("train_lora")}
    for key in kept:
        del sys.modules[key]
    sys.path.insert(0, str(folder / "edited"))
    try:
        return importlib.import_module("train_lora_single")
    finally:
        sys.path.remove(str(folder / "edited"))
        for key in [key for key in sys.modules if key.startswith("train_lora")]:
            del sys.modules[key]
        sys.modules.update(kept)


def edit_config(patch, function, **fields):
    """Have the script's lora_fields() or training_fields() return other fields."""
    real = getattr(script, function)
    patch.setattr(script, function, lambda *given: real(*given) | fields)


def read_json(path):
    """Return a JSON file's value, which must be valid JSON: NaN is no number there."""
    text = Path(path).read_text(encoding="utf-8")
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{path} holds {word}"))


def read_record(output):
    return read_json(output / "run.json")


def history(output):
    """Return what Trainer logged in a run into this folder."""
    return read_record(output)["loss_history"]


def logged(history, key):
    return [entry[key] for entry in history if key in entry]


def files(path):
    """Return the bytes of each file below a folder, but for the log and the lock."""
    found = [one for one in sorted(path.rglob("*")) if one.is_file()]
    kept = [one for one in found if one.name not in ("all_logs.log", ".lock")]
    return {str(one.relative_to(path)): one.read_bytes() for one in kept}


def job_folders(output):
    """Return the folders of the jobs that have checkpoints, the newest last."""
    folders = [path.parent for path in output.glob("checkpoints/*/job.json")]
    return sorted(folders, key=lambda folder: (folder / "job.json").stat().st_mtime_ns)


def checkpoints(output):
    """Return the steps of the checkpoints of all jobs, in order."""
    paths = output.glob("checkpoints/*/checkpoint-*")
    return sorted(int(path.name.rpartition("-")[2]) for path in paths)


def send(*numbers):
    """Return what sends this process signals, one after the other."""
    return lambda *_, **__: [os.kill(os.getpid(), number) for number in numbers]


def ours_with(name):
    """Return our modules that have a name: `from room import name` copies it."""
    packages = ("train_lora_single", "train_lora", "inspect_lora", "accept_gpu")
    ours = [module for key, module in sys.modules.items() if key.partition(".")[0] in packages]
    return [module for module in ours if name in vars(module)]


def replace_ours(patch, name, value):
    """Give a name of ours another value, wherever it has been imported."""
    modules = ours_with(name)
    assert modules, name
    for module in modules:
        patch.setattr(module, name, value)


def before(patch, owner, name, action, number=1, when=lambda *_, **__: True):
    """Do action(*arguments) before the call of that number (from 1) of owner.name.

    With owner None it is a function of ours, wherever it has been imported.
    """
    real, calls = getattr(owner or ours_with(name)[0], name), []

    def call(*args, **kwargs):
        if when(*args, **kwargs):
            calls.append(None)
            if len(calls) == number:
                action(*args, **kwargs)
        return real(*args, **kwargs)

    if owner:
        patch.setattr(owner, name, call)
    else:
        replace_ours(patch, name, call)


def at_step(patch, number, action):
    """Do action within this process's training step number; after a resume they count from 1."""
    handler = transformers.trainer_callback.CallbackHandler
    before(patch, handler, "on_pre_optimizer_step", action, number)


def on_trainer(patch, change):
    """Have change(trainer) called as soon as TRL has made its trainer and injected LoRA."""
    real = trl.SFTTrainer.__init__

    def init(self, *args, **kwargs):
        real(self, *args, **kwargs)
        change(self)

    patch.setattr(trl.SFTTrainer, "__init__", init)


def record(patch, *changes):
    """Return a list that gets the Recorder of each trainer, which is changed before."""
    recorders = []
    for change in changes:
        on_trainer(patch, change)
    on_trainer(patch, lambda trainer: recorders.append(Recorder(trainer)))
    return recorders


def made_up(prompt_ids, reply_ids):
    return Example("made up", [], {}, prompt_ids=prompt_ids, reply_ids=reply_ids)


def planned(job, **other):
    """Return a job with other settings, base or data, and with what follows from them."""
    job = replace(job, **other)
    lora, inputs = script.lora_fields(job.settings), (job.settings, job.base, job.data)
    plan = make_plan(*inputs, peft.LoraConfig(**lora))
    chosen = script.training_fields(job.settings, plan.steps)
    identity = identity_of(*inputs, LoraConfig=lora, SFTConfig=chosen)
    fixed = fixed_fields(job.settings, job.base, plan.steps)
    earlier = replace(job.earlier, folder=folder_of(job.settings, identity))
    training = trl.SFTConfig(output_dir=str(earlier.folder), **chosen, **fixed)
    return replace(job, plan=plan, identity=identity, earlier=earlier, training=training)


def give_examples(job, lengths, seed=0):
    """Give a job made-up examples of these lengths, whose second halves are targets."""
    numbers, examples = random.Random(seed), []
    for length in lengths:
        ids = [numbers.randrange(10, 2000) for _ in range(length)]
        examples.append(made_up(ids[: length // 2], ids[length // 2 :]))
    return planned(job, data=replace(job.data, examples=examples))


def lora(model):
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


class Recorder(transformers.TrainerCallback):
    """What a trainer's model is given in each pass, and what its steps do."""

    def __init__(self, trainer):
        self.model, self.optimizer = trainer.model, None
        self.trained, self.evaluated = [], []  # passes: rows, size, mask, keys, is_recomputed
        self.gradients, self.rates, self.weights = [], [], []  # before each step of the optimizer
        handle = trainer.model.register_forward_pre_hook(self.before, with_kwargs=True)
        trainer.add_callback(self)
        self.stop = lambda: (handle.remove(), trainer.remove_callback(self))

    def before(self, model, args, inputs):
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        given = {"rows": [row[one].tolist() for row, one in zip(ids, mask, strict=True)]}
        given |= {"size": ids.numel(), "keys": set(inputs), "mask": mask.clone()}
        given["is_recomputed"] = is_recomputing(model)
        (self.trained if model.training else self.evaluated).append(given)

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


# ---- forks of this process, which has done the slow imports -------------------------------------

OUR_OWN = {"train_lora_single", "train_lora", "inspect_lora", "conftest", "runs", "toys", "by_hand"}


class Fork(multiprocessing.get_context("fork").Process):
    """A child of this process that does something, begun at once."""

    def __init__(self, be):
        super().__init__()
        self.be = be
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of pytest-xdist's own thread
            self.start()

    def run(self):
        os.setsid()  # a terminal's signals are not for it
        tqdm.set_lock(threading.RLock())  # a thread that is not here may hold the parent's
        logging.root.handlers.clear()  # whose files are the parent's
        default_handlers()
        try:
            self.be()
        finally:
            for name in ("stdout", "stderr"):
                try:
                    getattr(sys, name).flush()
                except OSError:  # its reader is gone; Process would end with 1 for it
                    setattr(sys, name, None)

    def end(self, seconds=120):
        """Wait for it, and return its exit status; the signal's number below 0 if one ended it."""
        try:
            self.join(seconds)
            hangs = self.exitcode is None
        finally:  # of a test whose own time is over, too
            self.kill()
        assert not hangs
        return self.exitcode


def write_to(path):
    """Let standard output and error of this child go to a file, by streams of its own."""
    for number in (1, 2):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def be_python(script, *argv, folder=ROOT):
    """Do what `python SCRIPT ARGV` does in a folder, as if nothing of ours had been imported."""
    os.chdir(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] in OUR_OWN]:
        del sys.modules[name]
    # The script's own folder comes first, and those of the tests are not on its path.
    others = [one for one in sys.path if Path(one or ".").resolve() not in (ROOT, ROOT / "tests")]
    sys.argv, sys.path[:] = [script, *map(str, argv)], [os.getcwd(), *others]
    runpy.run_path(script, run_name="__main__")


def be_the_script(argv, said, prepare=None):
    """Be the command: run the script's file as Python does, with its output in the file said."""
    write_to(said)
    if prepare:
        prepare(pytest.MonkeyPatch())
    be_python("train_lora_single.py", *argv)
