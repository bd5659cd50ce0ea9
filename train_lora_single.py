"""Train a LoRA adapter for Qwen3.5-4B on your conversations, on one GPU (Linux).

    python train_lora_single.py              train on data/train.jsonl; write output/final_lora
    python train_lora_single.py --dry_run    check the data and print the plan; needs no GPU
    python train_lora_single.py --demo       the whole job in two minutes, on a CPU, with a toy
    python train_lora_single.py --lora_r 16 --num_epochs 2   every setting below is also a flag

A run that was stopped is resumed by the same command; with other settings a new one begins. No
earlier adapter is overwritten.

The file has sections: SETTINGS, FLAGS, THE RUN (the whole job in one function), THE HEART (what is
trained, and how a step is done), MEMORY, MODEL, DATA, TOKENS, PLAN, RESUMING, TRAINING, SAVING,
FP16 MATMUL (for a V100), COMMAND LINE. SETTINGS, THE RUN and THE HEART tell what happens.
"""

# `uv run train_lora_single.py --demo` reads this (PEP 723), and needs no environment made by hand.
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.7,<2.11",  # newer wheels have no kernels for the V100
#     "transformers>=5.24,<5.30",
#     "peft>=0.21.2,<0.22",
#     "trl>=1.16,<1.17",
#     "datasets>=5,<6",
#     "accelerate>=1.15,<2",
#     "safetensors>=0.8,<1",
# ]
# ///

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

# ==== SETTINGS: edit them here, or give the flag of the same name, such as --lora_r 16
#
# To add a setting, write one line, such as
#     WEIGHT_DECAY = 0.01  # shrinks A and B a little in each step
# and use it, here in training_config() as weight_decay=settings.WEIGHT_DECAY. It is a flag then and
# stands in run.json, and a checkpoint that was made with another value is not resumed.

# The model.
MODEL_NAME = "Qwen/Qwen3.5-4B"  # a chat model on the hub, or a local folder
MODEL_REVISION = "main"  # the model's branch, tag or commit on the hub
DTYPE = "bfloat16"  # the type of the frozen weights: bfloat16 or float32
DEVICE = "cuda"  # cuda, or cpu for small models

# The data. The section DATA shows the formats that a conversation may have.
TRAIN_FILE = "data/train.jsonl"  # the conversations to learn from
EVAL_FILE = "data/eval.jsonl"  # not trained on; "10%" holds out a tenth of TRAIN_FILE; or ""
REPLIES = "all"  # which replies of a conversation are targets: all, or the last
MAX_SEQ_LEN = 512  # in tokens; longer examples are left out, and never cut

# LoRA: y = W x + (alpha / r) B A x. W (d x k) is frozen; A (r x k) and B (d x r) are trained.
LORA_R = 8  # rank; if you change it, keep alpha
LORA_ALPHA = 16  # scales the update by alpha / r; if it is too large, the loss jumps
LORA_DROPOUT = 0.05  # on the LoRA branch only; makes memorizing harder
LORA_TARGET_MODULES = [  # the modules that get LoRA
    "q_proj",  # attention, in one of four layers of Qwen3.5; the others are Gated DeltaNet, whose
    "k_proj",  # own in_proj_qkv, in_proj_z, in_proj_a, in_proj_b and out_proj get no LoRA here
    "v_proj",
    "o_proj",
    "gate_proj",  # feed-forward, in every layer
    "up_proj",
    "down_proj",
]

# Training.
NUM_EPOCHS = 3  # passes over the training file; lower it if the held-out loss rises again
MAX_STEPS = 0  # stop after this many steps, to try things out; 0 for all epochs
BATCH_SIZE = 2  # examples in a step = BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS
GRADIENT_ACCUMULATION_STEPS = 2  # the other factor; how many fit at once is found out, see MEMORY
LEARNING_RATE = 2e-4  # the highest rate; lower it if the loss jumps
LR_SCHEDULER_TYPE = "cosine"  # after the warm-up: cosine, linear or constant_with_warmup
WARMUP_RATIO = 0.03  # the share of the steps in which the learning rate rises from 0
SEED = 42  # decides dropout, the order of the examples, and the values that A begins with

# Results.
OUTPUT_DIR = "output"  # gets final_lora, run.json, all_logs.log and checkpoints
LOGGING_STEPS = 10  # a line with the mean loss is printed after this many steps
SAVE_STEPS = 50  # a checkpoint is saved after this many steps; a crash loses those since
FINAL_LORA = "last"  # which epoch becomes final_lora: last, or best (lowest held-out loss)
REPORT_TO = "none"  # also log to tensorboard, wandb or trackio

# How things are computed.
MATMUL = "auto"  # of frozen weights: native, float16 (see FP16 MATMUL), or auto: by the GPU
USE_FLA = False  # flash-linear-attention for Gated DeltaNet, on an A100 or newer

# ==== FLAGS: each constant of SETTINGS is a flag, is checked, and stands in run.json
#
# This section comes before the slow imports, so that --help and a wrong setting answer at once.

HERE = Path(__file__).resolve().parent
DEMO = {  # what --demo sets; the toy model was made by data/make_demo_model.py
    "MODEL_NAME": f"{HERE}/data/demo-model",
    "TRAIN_FILE": f"{HERE}/data/train.jsonl",
    "EVAL_FILE": f"{HERE}/data/eval.jsonl",
    "OUTPUT_DIR": "output/demo",
    "DEVICE": "cpu",
    "DTYPE": "float32",
    "MAX_STEPS": 100,
    "LEARNING_RATE": 2e-3,
}
# What a setting may be: one of a list, a number between two (a whole one if these are), or a text.
RULES: dict[str, Any] = {
    **dict.fromkeys(["MODEL_NAME", "MODEL_REVISION", "TRAIN_FILE", "EVAL_FILE", "OUTPUT_DIR"], str),
    "LORA_TARGET_MODULES": list,
    "DTYPE": ["bfloat16", "float32"],
    "DEVICE": ["cuda", "cpu"],
    "REPLIES": ["all", "last"],
    "LR_SCHEDULER_TYPE": ["cosine", "linear", "constant_with_warmup"],
    "FINAL_LORA": ["last", "best"],
    "REPORT_TO": ["none", "tensorboard", "wandb", "trackio"],
    "MATMUL": ["auto", "native", "float16"],
    "USE_FLA": [True, False],
    "LORA_R": (1, 512),  # vLLM serves no higher rank
    "LORA_ALPHA": (1e-9, 1e9),
    "LEARNING_RATE": (1e-9, 0.5),
    **dict.fromkeys(["LORA_DROPOUT", "WARMUP_RATIO"], (0.0, 0.99)),
    "MAX_STEPS": (-(2**31), 2**31),
    "SEED": (0, 2**32 - 1),
    **dict.fromkeys(["MAX_SEQ_LEN", "NUM_EPOCHS", "BATCH_SIZE"], (1, 2**31)),
    **dict.fromkeys(["GRADIENT_ACCUMULATION_STEPS", "LOGGING_STEPS", "SAVE_STEPS"], (1, 2**31)),
}
# The constants of the section SETTINGS, each with the comment on its line.
SECTION = "#" + Path(__file__).read_text(encoding="utf-8").split("\n# ==== ")[1]
SETTINGS = {
    node.targets[0].id: SECTION.split("\n")[node.lineno - 1].partition("  # ")[2]
    for node in ast.parse(SECTION).body
    if isinstance(node, ast.Assign)
}


def parse_settings(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the settings as flags change them; exit with status 2 and all that is wrong."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--SETTING VALUE ...] [--dry_run] [--demo]",
        description=__doc__.partition("\n\nThe file")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is not in the result
        allow_abbrev=False,
    )
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="only print the plan")
    parser.add_argument("--demo", action="store_true", help=f"sets {', '.join(DEMO)}")
    for name, comment in SETTINGS.items():
        constant = globals()[name]
        is_list = isinstance(constant, (list, tuple, set))
        flags = {f"--{name.lower()}", f"--{name.lower().replace('_', '-')}"}
        kind = str if is_list or isinstance(constant, str) else number_or_text
        nargs, text = "+" if is_list else None, f"{comment} [{constant}]".replace("%", "%%")
        how = {"nargs": nargs, "type": kind, "metavar": "X", "help": text}
        parser.add_argument(*sorted(flags), dest=name, **how)
    given = vars(parser.parse_args(argv))
    dry_run, demo = given.pop("dry_run", False), given.pop("demo", False)
    values = {name: globals()[name] for name in SETTINGS} | (DEMO if demo else {}) | given
    problems = what_is_wrong(values)
    if problems:
        parser.error("\n".join(problems))
    return argparse.Namespace(**values, dry_run=dry_run)


def number_or_text(text: str) -> Any:
    """Return the number, True or False that a flag's text stands for, or else the text."""
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text.title() if text.isalpha() else text)
    return text


def what_is_wrong(values: dict[str, Any]) -> list[str]:
    """Return what is wrong with settings, a sentence each."""
    problems = []
    for name, value in values.items():
        rule, constant = RULES.get(name), globals()[name]
        if isinstance(rule, list):
            is_right, wanted = value in rule, f"one of {rule}"
        elif isinstance(rule, tuple):
            low, high = rule
            is_right = type(value) in (int, type(low)) and low <= value <= high
            kind = "whole number" if isinstance(low, int) else "number"
            wanted = f"a {kind} from {low} to {high}"
        elif rule is list:
            is_right = isinstance(value, (list, tuple, set)) and {*map(type, value)} == {str}
            wanted = 'a list of names, such as ["q_proj"] or ["all-linear"]'
        elif rule is str:
            is_right = isinstance(value, str) and (value != "" or name == "EVAL_FILE")
            wanted = "a text in quotes"
        else:  # a setting of your own
            is_right = isinstance(value, str) == isinstance(constant, str)
            wanted = f"like {constant!r}"
        if not is_right:
            problems.append(f"{name} is {value!r}: it must be {wanted}")
    eval_file = str(values["EVAL_FILE"])
    if eval_file.endswith("%") and not 1 <= percent_of(eval_file) <= 50:
        problems.append(f'EVAL_FILE is {eval_file!r}: a share is from "1%" to "50%"')
    if os.path.realpath(eval_file) == os.path.realpath(str(values["TRAIN_FILE"])):
        problems.append('EVAL_FILE is TRAIN_FILE: "10%" holds out a tenth of it, and "" is none')
    if values["FINAL_LORA"] == "best" and not eval_file:
        problems.append('FINAL_LORA is "best": an EVAL_FILE is needed to tell which epoch that is')
    return problems


def percent_of(eval_file: str) -> int:
    """Return the percentage of an EVAL_FILE like "10%", or 0 for the name of a file."""
    found = re.fullmatch(r"(\d+)\s*%", eval_file)
    return int(found[1]) if found else 0


if __name__ == "__main__":
    parse_settings()  # main() does it again, when everything is there

# Libraries read these when they are imported.
# Threads that busy-wait slowed a small model on a CPU from 28 s to 245 s beside a busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # widths vary by step
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import accelerate
import datasets
import huggingface_hub
import jinja2
import peft
import safetensors.torch
import torch
import transformers
import trl
from huggingface_hub.errors import GatedRepoError, HTTPError, RevisionResolutionError
from torch import Tensor, nn
from tqdm import tqdm

# ==== THE RUN: the whole job


def run(job: Job) -> None:
    """Train one adapter, verify it, and save it as final_lora. Each comment names a section."""
    prepare_device(job.settings)  # MODEL
    read_model_files(job)  # MODEL: configuration, tokenizer and chat template
    read_data(job)  # DATA and TOKENS: every line is checked before anything is trained
    make_plan(job)  # PLAN: which weights, and how many steps
    look_back(job)  # RESUMING: is there a checkpoint of this job, or its finished adapter?
    if job.settings.dry_run or not (job.checkpoint or job.is_finished):
        show_plan(job)  # PLAN
    if job.settings.dry_run or job.is_finished:
        report("done", "Nothing was trained.")
        return
    begin(job)  # RESUMING: the job's folder, and what it is
    trainer = build_trainer(job)  # THE HEART: the weights, with LoRA in them
    check_only_lora_is_trained(trainer.model, job)  # THE HEART
    if job.steps_done < job.steps:
        find_what_fits(trainer, job)  # MEMORY: two passes, on a GPU
    train(trainer, job)  # TRAINING: all steps, or those that are left
    if is_main_process():
        save_final_lora(trainer, job)  # SAVING: write, load again, compare, move into place


@dataclass
class Job:
    """The settings of a run, and what is found out on the way."""

    settings: argparse.Namespace
    config: Any = None  # the base model's configuration
    commit: str = ""  # the model's on the hub
    tokenizer: Any = None  # read_model_files() keeps one that is given
    stop_ids: list[int] = field(default_factory=list)  # the tokens at which the model stops
    special_tokens: list[str] = field(default_factory=list)  # that no text may hold
    enable_thinking: bool = False  # how the chat template is called; training never sets it
    examples: list[Example] = field(default_factory=list)  # to learn from
    held_out: list[Example] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)  # file, hash and counts of both
    table: list[str] = field(default_factory=list)  # of the modules that get LoRA
    trained_shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # from make_plan()
    all_parameters: int = 0
    steps: int = 0
    steps_per_epoch: int = 0
    described: dict[str, Any] = field(default_factory=dict)  # what a checkpoint must agree with
    name: str = ""  # a hash of that
    folder: Path = Path()  # of this job's checkpoints
    checkpoint: Path | None = None  # to resume from
    steps_done: int = 0  # the checkpoint's
    is_finished: bool = False
    matmul: str = "native"  # or "float16", see FP16 MATMUL
    started: str = ""
    history: list[dict[str, float]] = field(default_factory=list)  # what Trainer logged
    signals_wait: bool = False  # a signal is obeyed after the next save
    stop_signal: int = 0  # the signal that asks the run to stop
    stops: bool = False  # all processes have agreed to, after the next save

    @property
    def output(self) -> Path:
        """The folder of the results."""
        return Path(self.settings.OUTPUT_DIR)

    @property
    def eval_losses(self) -> dict[int, float]:
        """The held-out losses {step: nats per token}; that of step 0 is the base model's."""
        return {int(one["step"]): one["eval_loss"] for one in self.history if "eval_loss" in one}


def examples_per_step(settings: argparse.Namespace) -> int:
    """Return the number of examples in one optimizer step, of all processes together."""
    return settings.BATCH_SIZE * settings.GRADIENT_ACCUMULATION_STEPS


# ==== THE HEART: LoRA, the trainer, its step and its loss
#
# Each target module, a matrix W, gets two small matrices beside it, A and B. Only these are
# trained, in float32. The labels are the target tokens: those of a reply, with the one that ends
# it; all others are -100. At position t the model predicts token t + 1. The loss of a step is the
# sum of -log(probability) over its target tokens, divided by their number in the step, however
# many micro-batches it goes through the GPU in.
#
# Trainer pads a step's examples, counts their target tokens (num_items_in_batch), calls
# training_step() once, clips the gradient, and lets AdamW change A and B. Three checks guard this:
# check_only_lora_is_trained() before the first step, RunEvents.on_log() at each step (a loss and a
# gradient must be finite, see TRAINING), and verify_saved_adapter() at the end (see SAVING).


def lora_config(settings: argparse.Namespace) -> peft.LoraConfig:
    """Return what PEFT is asked for; edit it for use_rslora, use_dora, rank_pattern and others."""
    targets = settings.LORA_TARGET_MODULES
    return peft.LoraConfig(
        r=settings.LORA_R,
        lora_alpha=settings.LORA_ALPHA,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        lora_dropout=settings.LORA_DROPOUT,
        bias="none",  # a trained bias would stay changed where the adapter is switched off
        task_type="CAUSAL_LM",
    )


def training_config(job: Job) -> trl.SFTConfig:
    """Return what TRL is asked for. Its defaults hold: AdamW without decay, clipping at 1.0."""
    settings = job.settings
    of_each = examples_per_step(job.settings) // accelerate.PartialState().num_processes
    return trl.SFTConfig(  # add weight_decay and others; what would be ignored is refused, see PLAN
        output_dir=str(job.folder),
        run_name=job.output.resolve().name,  # in a tracker
        seed=settings.SEED,
        num_train_epochs=settings.NUM_EPOCHS,
        max_steps=job.steps,  # this decides, not the epochs
        learning_rate=settings.LEARNING_RATE,
        lr_scheduler_type=settings.LR_SCHEDULER_TYPE,
        warmup_steps=int(settings.WARMUP_RATIO * job.steps),
        per_device_train_batch_size=of_each,
        gradient_accumulation_steps=1,  # training_step() divides a step into micro-batches
        activation_checkpointing=False,  # gradient checkpointing is switched by micro-batch
        bf16=False,  # no autocast: the weights have their type already
        use_cpu=settings.DEVICE == "cpu" or settings.dry_run,  # a dry run makes no CUDA context
        max_length=None,  # nothing is cut
        eos_token=job.tokenizer.eos_token,
        eval_strategy="no",  # RunEvents evaluates and saves, see TRAINING
        eval_on_start=is_evaluation_missing(job),
        save_strategy="no",
        logging_steps=1,  # every loss is checked and recorded
        logging_nan_inf_filter=False,  # a NaN must not be replaced by a mean
        report_to=settings.REPORT_TO,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )


def build_trainer(job: Job) -> LoraTrainer:
    """Load the base model and return a trainer whose model has LoRA in it.

    peft_config alone adds it: TRL refuses a model that has been through PEFT's get_peft_model().
    """
    settings = job.settings
    model = load_model(settings.MODEL_NAME, job.commit, settings.DTYPE, settings.DEVICE)
    if uses_fp16_matmul(job):
        try_fp16_matmul(model, job)
    rows = [{"input_ids": one.input_ids, "labels": one.labels} for one in job.examples]
    trainer = LoraTrainer(
        job,
        model=model,
        peft_config=lora_config(settings),  # PEFT makes A and B in float32
        args=training_config(job),
        train_dataset=datasets.Dataset.from_list(rows),  # TRL takes rows with labels as they are
        processing_class=job.tokenizer,
    )
    config = trainer.model.peft_config["default"]
    config.revision = job.commit or None  # of the base model
    if config.target_modules == {*settings.LORA_TARGET_MODULES}:  # a set has any order
        config.target_modules = [*settings.LORA_TARGET_MODULES]
    trainer.add_callback(RunEvents(trainer))
    trainer.remove_callback(transformers.PrinterCallback)  # would print dictionaries
    return trainer


class LoraTrainer(trl.SFTTrainer):
    """TRL's trainer with this script's micro-batches, loss, order of the examples, and saving."""

    def __init__(self, job: Job, **given: Any) -> None:
        """Begin with a whole step at once, and with layers that can be told to recompute."""
        self.job, self.sampler = job, LengthGroupedSampler(job)
        super().__init__(**given)
        self.model.activation_checkpointing_enable()
        self.model.disable_input_require_grads()  # recomputation does not need it
        kind = transformers.modeling_layers.GradientCheckpointingLayer
        self.layers = [module for module in self.model.modules() if isinstance(module, kind)]
        self.chunk = chunk_of(job.config)
        longest = filled_up(max(len(one.input_ids) for one in job.examples), self.chunk)
        self.tokens_at_once = longest * self.args.train_batch_size

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """Send a step's examples forward and backward in micro-batches; return the step's loss.

        How the step is divided changes nothing but dropout and rounding. If it runs out of memory,
        it is done again in smaller micro-batches. model is self.model, or DDP around it; inputs are
        input_ids, attention_mask and labels, each examples x tokens; num_items_in_batch is the
        number of target tokens in all processes.
        """
        model.train()
        inputs = self._prepare_inputs(inputs)
        if num_items_in_batch is None:  # Trainer does not count for Gemma 3n and Gemma 4
            count = (inputs["labels"][:, 1:] != -100).sum()
            num_items_in_batch = self.accelerator.gather(count).sum()
        while True:
            losses = []
            parts = list(micro_batches(inputs, self.tokens_at_once, self.chunk))
            for number, (part, is_recomputed) in enumerate(parts, 1):
                is_last = number == len(parts)  # only then do several processes exchange gradients
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                    loss = self.loss_if_it_fits(model, part, is_recomputed, num_items_in_batch)
                if loss is None:
                    break
                losses.append(loss)
            if len(losses) == len(parts):
                return sum(losses)
            make_room(self, *part["input_ids"].shape, is_recomputed)
            report("memory", f"out of memory: now {self.tokens_at_once:,} tokens at once")

    def loss_if_it_fits(
        self, model: nn.Module, part: dict[str, Tensor], is_recomputed: bool, targets: Tensor | int
    ) -> Tensor | None:
        """Add a micro-batch's gradients; return its share of the step's loss, None if no memory."""
        for layer in self.layers:
            layer.gradient_checkpointing = is_recomputed
        try:
            loss = reply_losses(model, part).sum() / targets
            loss = loss * self.accelerator.num_processes  # DDP takes the mean over the processes
            loss.backward()
            return loss.detach()
        except RuntimeError as error:
            # Within a step other processes wait for this one's gradients, so they must end.
            if not is_out_of_memory(error) or model is not self.model:
                raise
            return None  # the exception is gone now, and with it what it held

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Log the held-out loss, a mean over tokens (Trainer's depends on the batches).

        At step 0 it is that of the base model. After a signal nothing is logged.
        """
        job, is_base = self.job, self.state.global_step == 0
        ours = job.held_out[self.args.process_index :: self.args.world_size]
        # B is 0 at first, but not with every init_lora_weights.
        with self.model.disable_adapter() if is_base else contextlib.nullcontext():
            tokens = max(1024, self.tokens_at_once)
            losses = example_losses(self.model, ours, tokens, lambda: job.stop_signal > 0)
        sums = accelerate.utils.gather_object([None if job.stop_signal else sum(losses)])
        if None in sums:
            job.stops, job.stop_signal = True, job.stop_signal or signal.SIGTERM
            return {}
        metrics = {"eval_loss": sum(sums) / sum(len(one.reply_ids) for one in job.held_out)}
        self.log(metrics)
        self.control.should_evaluate = False
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        """Return our order; Trainer's group_by_length has no seed, so it could not be resumed."""
        return self.sampler

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the adapter and where it comes from; Trainer would add a pickle of its arguments."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir, save_embedding_layers=False)
            write_record(self.job, "running", Path(output_dir), self.state.global_step)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Do nothing with each checkpoint."""


class LengthGroupedSampler:
    """Gives each step examples of similar lengths, which need little padding, in a random order.

    The order depends on seed, epoch and lengths alone, so a resumed run sees what it would have.
    """

    def __init__(self, job: Job) -> None:
        """Remember the lengths; the epoch is set before each pass."""
        self.lengths = [len(example.input_ids) for example in job.examples]
        self.size, self.seed, self.epoch = examples_per_step(job.settings), job.settings.SEED, 0

    def __len__(self) -> int:
        """Return the number of examples in an epoch."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield the examples' numbers, one step after the other; the incomplete one comes last."""
        shuffler = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        shuffler.shuffle(order)
        whole = len(order) - len(order) % self.size
        # Sorted within blocks of at most 50 steps, so that each epoch groups them differently.
        block = self.size * min(50, math.ceil(len(order) / self.size / 4))
        grouped: list[int] = []
        for start in range(0, whole, block):
            part = order[start : min(start + block, whole)]
            grouped += sorted(part, key=lambda number: self.lengths[number])
        steps = [grouped[start : start + self.size] for start in range(0, whole, self.size)]
        shuffler.shuffle(steps)
        for step in [*steps, order[whole:]]:
            yield from step


def micro_batches(
    inputs: dict[str, Tensor], tokens_at_once: int, chunk: int = 1
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """Yield a padded step in parts that fit, the longest examples first: part, is it recomputed?

    An example that is longer than tokens_at_once is recomputed, and of these RECOMPUTED times as
    many tokens go at once. A row counts as its length, filled up to a multiple of chunk. A step
    that fits stays as it is; else each part is as wide as its longest example.
    """
    lengths = inputs["attention_mask"].sum(1).tolist()
    if len(lengths) * filled_up(max(lengths), chunk) <= tokens_at_once:
        yield inputs, False
        return
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while rows:
        width = lengths[rows[0]]
        counts_as = filled_up(width, chunk)
        is_recomputed = counts_as > tokens_at_once
        most = tokens_at_once * RECOMPUTED if is_recomputed else tokens_at_once
        count = max(1, most // counts_as)
        yield {key: value[rows[:count], :width] for key, value in inputs.items()}, is_recomputed
        rows = rows[count:]


def reply_losses(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return -log(probability) of each target token, in nats, and 0 for all others.

    The result has a row for each example and a column for each token but the first. TRL's own loss
    has the same value, but multiplies by the head's weight itself, past scaled float16, and it
    computes entropy and accuracy in every step.
    """
    next_tokens = inputs["labels"][:, 1:]
    is_target = next_tokens != -100
    losses = torch.zeros(next_tokens.shape, device=next_tokens.device)
    losses[is_target] = nn.functional.cross_entropy(
        reply_logits(model, inputs).float(), next_tokens[is_target], reduction="none"
    )
    return losses


def reply_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return a row of logits for each target token, and none for other tokens.

    With 248,320 tokens in the vocabulary the logits are the largest tensor of all. So the head
    gets the positions alone that predict a target token: t for token t + 1.
    """
    predicts_target = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    predicts_target[:, :-1] = inputs["labels"][:, 1:] != -100
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    return model(**given, logits_to_keep=predicts_target, use_cache=False).logits


def check_only_lora_is_trained(model: peft.PeftModel, job: Job) -> None:
    """Stop unless exactly the planned weights are trainable, in float32: 0.2518 % as shipped."""
    planned = {name: (*shape, torch.float32) for name, shape in job.trained_shapes.items()}
    trained, count = {}, 0
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            trained[name.removeprefix("base_model.model.")] = (*weight.shape, weight.dtype)
            count += weight.numel()
    total = sum(weight.numel() for weight in model.parameters())
    shown = f"{count:,} of {total:,} parameters are trained ({count / total:.4%})"
    if trained != planned or total != job.all_parameters:
        wrong = sorted(trained.items() ^ planned.items(), key=str)[:4]
        text = f"LoRA is not in place as planned: {shown}, and these differ: {wrong}."
        raise UserError(f"{text} Modules that are trained whole have DTYPE: set it to float32.")
    report("model", f"{shown}, in float32; the rest is frozen")


# This is what is trained, and how, but for two sections: TOKENS decides which tokens are targets,
# and on a V100 FP16 MATMUL multiplies.

# ==== MEMORY: how many examples go through the GPU at once
#
# A step always has BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS examples. tokens_at_once says how many
# of their tokens go through the GPU at once with their activations kept. A longer example is
# recomputed (gradient checkpointing), which takes a sixth of the memory and half as much work
# again. The number begins with a whole step, and becomes nine tenths each time something does not
# fit. Two passes before the first step settle it:
# - a single row of tokens_at_once tokens, which keeps its activations. Attention grows with the
#   square of a row's length, so no micro-batch of as many tokens needs more;
# - as many of the longest examples as go at once, recomputed.
# If memory runs out in a step (another program may take it), the step is done again by the same
# rule; several processes end instead. On a CPU nothing is tried.

RECOMPUTED = 4  # times as many tokens go at once if they are recomputed


def find_what_fits(trainer: LoraTrainer, job: Job) -> None:
    """Lower trainer.tokens_at_once until both passes fit; end the run if an example never will."""
    if job.settings.DEVICE == "cpu":
        return
    free, total = torch.cuda.mem_get_info()
    ours = (free + torch.cuda.memory_reserved()) / total  # what other programs leave
    # A tenth is left for fragmentation, and eight bytes for what AdamW keeps of a trained weight.
    states = 8 * sum(map(math.prod, job.trained_shapes.values())) / total
    torch.cuda.set_per_process_memory_fraction(max(0.0, 0.9 * ours - states))
    longest = max(len(one.input_ids) for one in job.examples)
    counts_as = filled_up(longest, trainer.chunk)
    with torch.random.fork_rng():  # the passes draw dropout
        while True:
            tokens = trainer.tokens_at_once
            rows = max(1, RECOMPUTED * tokens // counts_as)
            if tokens > 0 and not pass_fits(trainer, 1, tokens, False):
                make_room(trainer, 1, tokens, False)
            elif counts_as > tokens and not pass_fits(trainer, rows, longest, True):
                make_room(trainer, rows, longest, True)
            else:
                break
    # CUDA's libraries need a little, too. And where a driver would lend main memory (WSL), a run
    # must fail and not crawl.
    torch.cuda.set_per_process_memory_fraction(0.97 * ours)
    torch.cuda.reset_peak_memory_stats()
    more = "; longer examples use gradient checkpointing" if counts_as > tokens else ""
    report("memory", f"{tokens:,} tokens at once fit on the GPU{more}")


def pass_fits(trainer: LoraTrainer, rows: int, width: int, is_recomputed: bool) -> bool:
    """Return whether rows go forward and backward, with as many targets as any example has."""
    targets = max(len(one.reply_ids) / len(one.input_ids) for one in trainer.job.examples)
    ids = torch.ones(rows, width, dtype=torch.long, device=trainer.args.device)
    labels, mask = ids.clone(), ids.clone()
    labels[:, : width - math.ceil(targets * width)] = -100
    mask[:, -1] = 0  # padding takes memory of its own, and other kernels
    part = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    trainer.model.train()
    fits = trainer.loss_if_it_fits(trainer.model, part, is_recomputed, rows * width) is not None
    trainer.model.zero_grad()
    torch.cuda.empty_cache()
    return fits


def make_room(trainer: LoraTrainer, rows: int, width: int, is_recomputed: bool) -> None:
    """Lower tokens_at_once, since so many rows of a width did not fit; end the run if it cannot."""
    if is_recomputed and rows == 1:  # a single example cannot be divided
        text = f"An example of {width:,} tokens does not fit in the GPU's memory"
        raise UserError(f"{text}: lower MAX_SEQ_LEN, or stop other programs on this GPU.")
    trainer.model.zero_grad()  # what the micro-batches before it have left
    torch.cuda.empty_cache()
    trainer.tokens_at_once = int(0.9 * trainer.tokens_at_once) // trainer.chunk * trainer.chunk


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU has no memory left, in the words of torch, cuBLAS, CUDA or Triton."""
    return bool(re.search("out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED", str(error)))


def chunk_of(config: transformers.PretrainedConfig) -> int:
    """Return 64 for Gated DeltaNet's torch code, which fills rows up to multiples of it; else 1."""
    layer_types = config.get_text_config().to_dict().get("layer_types") or []
    return 64 if "linear_attention" in layer_types and sys.modules.get("fla", "") is None else 1


def filled_up(tokens: int, chunk: int) -> int:
    """Return a number of tokens, rounded up to a multiple of chunk."""
    return math.ceil(tokens / chunk) * chunk


# ==== MODEL: the device, the base model, its tokenizer and its chat template
#
# Only safetensors are loaded, and no code that a model brings along is run. Under torchrun or
# `accelerate launch` each process has a GPU of its own and holds the whole model.


def prepare_device(settings: argparse.Namespace) -> None:
    """Choose the device, and refuse one that does not compute; a dry run needs none.

    This comes before the model's code is imported: transformers takes fla and causal_conv1d
    wherever they can be imported, also where their kernels crash.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ
    if is_launched and {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & os.environ.keys():
        raise UserError("FSDP and DeepSpeed: here each GPU holds the whole model; use torchrun.")
    # What other work has left would change this run: ACCELERATE_MIXED_PRECISION is autocast.
    of_launchers = () if is_launched else ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    for name in [*os.environ]:
        if name.startswith("ACCELERATE_") or name in of_launchers:
            del os.environ[name]
    sys.modules["causal_conv1d"] = None
    # Products in float16 get float32 sums, see FP16 MATMUL.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    fault = "it needs a GPU"
    if settings.dry_run or settings.DEVICE == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        accelerate.PartialState(cpu=True)
    else:
        take_gpu(settings.DTYPE, is_launched)
        fault = fault_of_fla()
    if fault or not settings.USE_FLA:
        sys.modules["fla"] = None
    if fault and settings.USE_FLA and not settings.dry_run:
        report("fla", f"{fault}; torch's code takes its place")
    processes = accelerate.PartialState().num_processes
    if examples_per_step(settings) % processes:
        text = "BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS must be a multiple of the processes,"
        raise UserError(f"{text} {processes}.")


def take_gpu(dtype: str, is_launched: bool) -> None:
    """Take one GPU and try whether it computes."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    if not is_launched:  # TRL refuses several visible GPUs without a launcher
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
        # Otherwise accelerate refuses several RTX 40xx with a driver below 550.40.
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
    try:
        torch.cuda.init()  # says why there is no GPU
        accelerate.PartialState()  # gives each process of a launch its own GPU
        ones = torch.ones(8, 8, device="cuda", dtype=getattr(torch, dtype))
        (ones @ ones).sum().item()  # a torch without this GPU's kernels says so only now
    except (RuntimeError, AssertionError) as error:
        text = f"DEVICE cuda: torch {torch.__version__} cannot compute on GPU {visible}"
        needs = "an NVIDIA GPU (V100 or newer, driver 525), or a small model and --device cpu"
        raise UserError(f"{text} ({one_line(error)}); it takes {needs}.") from error
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    report("device", f"{torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GiB are free")


def fault_of_fla() -> str:
    """Return why flash-linear-attention cannot be used on this GPU, or ""."""
    major, _ = torch.cuda.get_device_capability()
    if major < 8:
        return "it needs a GPU of capability 8.0 or newer"
    try:
        installed = map(importlib.metadata.version, ("fla-core", "triton"))
        fla, triton = map(torch.torch_version.TorchVersion, installed)
    except importlib.metadata.PackageNotFoundError as error:
        return f"{error.name} is not installed (pip install flash-linear-attention)"
    if major == 9 and not torch.version.hip:  # Hopper; AMD's MI200 and MI300 have a 9, too
        if fla < "0.5":
            return "below 0.5 it has wrong gradients on Hopper GPUs (fla issue 640)"
        if fla <= "0.6.0" and "3.4" <= triton < "3.7.1":
            return "0.5.0 to 0.6.0 cannot train on Hopper GPUs with Triton 3.4 to 3.7.0"
    return ""


def is_main_process() -> bool:
    """Return whether this is the process that prints, decides and writes."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


def read_model_files(job: Job) -> None:
    """Read all but the weights: which commit it is, the configuration, and the tokenizer."""
    settings, name = job.settings, job.settings.MODEL_NAME
    try:
        if not Path(name).is_dir():
            # The newest job here with this model and branch gives the commit, see RESUMING. So a
            # branch that moves between stopping and resuming changes nothing.
            revision = settings.MODEL_REVISION
            same = {"MODEL_NAME": name, "MODEL_REVISION": revision}.items()
            commits = [one["commit"] for one in jobs_in(job.output).values() if same <= one.items()]
            if not commits:
                commits = [huggingface_hub.resolve_revision(name, revision=revision).resolved]
            job.commit = commits[0]
        commit = job.commit or "main"
        where = {"revision": commit, "trust_remote_code": False}
        job.config = transformers.AutoConfig.from_pretrained(name, **where)
        job.tokenizer = job.tokenizer or transformers.AutoTokenizer.from_pretrained(name, **where)
        ends = [job.tokenizer.eos_token_id]
        with contextlib.suppress(OSError):  # a model need not have one
            # Gemma's tokenizer ends with <eos>, but its turns with <end_of_turn>.
            more = transformers.GenerationConfig.from_pretrained(name, revision=commit).eos_token_id
            ends += more if isinstance(more, list) else [more]
        job.stop_ids = [end for end in dict.fromkeys(ends) if end is not None]
    except (OSError, ValueError, HTTPError, RevisionResolutionError) as error:
        advice = "check the name, the folder or the network"
        if GatedRepoError in (type(error), type(error.__cause__)):
            advice = f"accept its licence at https://huggingface.co/{name}, then `hf auth login`"
        raise UserError(f"{name} cannot be read ({one_line(error)}); {advice}.") from error
    if "quantization_config" in job.config.to_dict():
        raise UserError(f"{name} is quantized, which is not trained here; use its original.")
    if not job.tokenizer.chat_template or not job.stop_ids:
        raise UserError(f"{name} has no chat template; use a model that was trained to chat.")
    added = job.tokenizer.added_tokens_decoder.values()
    job.special_tokens = [str(token) for token in added if token.special]
    is_slow = chunk_of(job.config) > 1 and torch.cuda.is_initialized() and not settings.USE_FLA
    if is_slow and torch.cuda.get_device_capability() >= (8, 0):
        report("faster", "pip install flash-linear-attention, then --use_fla true")


def load_model(name: str, commit: str, dtype: str, device: str) -> transformers.PreTrainedModel:
    """Return the base model (of Qwen3.5 its text part), loaded straight onto the device.

    Never give SFTTrainer the model's name: it would take the class that config.json names,
    Qwen3_5ForConditionalGeneration, with which Trainer does not count a step's target tokens
    (accepts_loss_kwargs is False). Then the loss is a mean of the micro-batches' means.
    """
    report("model", f"loading the weights of {name}")
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            revision=commit or "main",
            dtype=dtype,
            device_map={"": torch.cuda.current_device()} if device == "cuda" else None,
            trust_remote_code=False,
            use_safetensors=True,  # a pickle could run code
            output_loading_info=True,
        )
    except RuntimeError as error:  # transformers tells of full memory as an error of conversion
        if device == "cuda" and torch.cuda.mem_get_info()[0] < 2**30:
            raise UserError(f"The weights of {name} do not fit in the GPU's memory.") from error
        raise
    if found["missing_keys"]:  # transformers would go on with random numbers in their place
        raise UserError(f"{name}: the files lack weights: {sorted(found['missing_keys'])[:3]} ...")
    return model


# ==== DATA: reading the conversations, checking every line, and holding a part out
#
# A file holds one conversation a line (JSONL), or all of them in one JSON array:
#     {"prompt": [messages], "completion": [one message]}     teaches the completion alone;
#                                                             both may also be texts
#     {"messages": [messages]}                                teaches each reply of the assistant;
#                                                             with REPLIES "last" only the last one
#     {"conversations": [{"from": "human", "value": ...}]}    ShareGPT: as "messages"
#     {"instruction": ..., "input": ..., "output": ...}       Alpaca: teaches the output
# A message has a "role" and a "content", and no other keys. At most one system message comes first,
# which may also be the line's key "system"; then user and assistant take turns, and a reply comes
# last. Other keys of a line, and all whose value is null, are ignored. In ShareGPT dumps a greeting
# before the first question, and a question without a reply, are left out. All formats become
# "messages" first; then there is one set of checks, and every bad line of both files is named.

FORMATS = (
    'write {"prompt": [...], "completion": [one message]}, {"messages": [...]}, '
    '{"conversations": [...]} or {"instruction": ..., "output": ...}; see docs/data.md'
)
FORMAT_KEYS = ("messages", "conversations", "prompt completion", "instruction output")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
FEWEST_HELD_OUT = 20  # conversations; the mean of fewer says little


@dataclass
class Example:
    """A reply to train on, and the conversation that leads to it."""

    source: str  # file:line
    messages: list[dict[str, str]]  # up to and including the reply
    row: dict[str, Any]  # the conversation as it is in the file
    prompt_ids: list[int] = field(default_factory=list)  # tokens that are only read
    reply_ids: list[int] = field(default_factory=list)  # target tokens, with the turn's end

    @property
    def input_ids(self) -> list[int]:
        """All tokens, as the model sees them."""
        return self.prompt_ids + self.reply_ids

    @property
    def labels(self) -> list[int]:
        """The target tokens in their places, and -100 in all others."""
        return [-100] * len(self.prompt_ids) + self.reply_ids


def read_data(job: Job) -> None:
    """Read, check and render all conversations; raise UserError with what is wrong with any."""
    settings, problems = job.settings, []
    train = read_conversations(settings.TRAIN_FILE, settings.REPLIES, problems)
    held_out, percent = [], percent_of(settings.EVAL_FILE)
    if percent and not problems:
        train, held_out = hold_out(train, percent)
    elif settings.EVAL_FILE and not percent:
        held_out = read_conversations(settings.EVAL_FILE, settings.REPLIES, problems)
    job.examples = encode(train, job, problems, "training")
    job.held_out = encode(held_out, job, problems)
    if problems:
        raise UserError(f"{problems_as_text(problems)}\nNothing was trained.")
    files = {"train": settings.TRAIN_FILE, "held_out": settings.EVAL_FILE}
    for (key, path), examples in zip(files.items(), (job.examples, job.held_out), strict=True):
        facts = {"file": path, "sha256": file_sha256(Path(path)), "examples": len(examples)}
        facts["tokens"] = sum(len(example.input_ids) for example in examples)
        facts["targets"] = sum(len(example.reply_ids) for example in examples)
        job.data[key] = facts if examples else None
    learned = {key_of(example.messages[:-1]) for example in job.examples}
    known = [one.source for one in job.held_out if key_of(one.messages[:-1]) in learned]
    if known:
        report("warning", f"{len(known):,} held-out prompts are trained on, such as {known[0]}")
    train_file, eval_file = map(os.path.realpath, files.values())
    if train_file != DEMO["TRAIN_FILE"] and eval_file == DEMO["EVAL_FILE"]:
        report("warning", 'EVAL_FILE is still the shipped one; "10%" holds out a tenth of yours')


def read_conversations(
    path: str, replies: str, problems: list[str], accepts_thinking: bool = False
) -> list[Example]:
    """Return a file's examples; add what is wrong with any line to problems, as "file:line: ...".

    Raises UserError if the file cannot be read, or has nothing in it. Replies with a <think> part
    are not trained; whoever measures another trainer's adapter may accept them.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}; in {Path.cwd()}).") from error
    examples, unpaired = [], 0
    for source, text in entries_of(content, path).items():
        try:
            line = parse_line(text)
            messages, teaches_one = messages_of(line)
            check_messages(messages, accepts_thinking)
        except ValueError as error:
            problems.append(f"{source}: {one_line(error, 400)}")
            continue
        if "conversations" in line:
            turns = messages[1:] if line.get("system") else messages
            unpaired += len(line["conversations"]) - len(turns)
        row = json.loads(text.decode("utf-8-sig"))  # with what is null
        places = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if teaches_one or replies == "last":
            places = places[-1:]
        examples += [Example(source, messages[: place + 1], row) for place in places]
    if unpaired:
        report("left out", f"{path}: {unpaired:,} greetings and last questions without a reply")
    return examples


def entries_of(content: bytes, path: str) -> dict[str, bytes]:
    """Return {where it is: its JSON} of each line that is not blank, or of each array entry."""
    lines, place = content.split(b"\n"), ":"
    if content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        try:
            rows = json.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is no JSON array: {one_line(error)}; {FORMATS}") from error
        lines, place = [json.dumps(row).encode() for row in rows], ", entry "
    entries = {f"{path}{place}{number}": line for number, line in enumerate(lines, 1)}
    entries = {where: line for where, line in entries.items() if line.strip()}
    if not entries:
        raise UserError(f"{path} holds no conversations; {FORMATS}.")
    return entries


def parse_line(text: bytes) -> dict[str, Any]:
    """Return a line's JSON object without what is null, or raise ValueError in plain words."""
    try:
        line = text.decode("utf-8-sig").strip()  # joined files may each begin with the mark
    except UnicodeDecodeError as error:
        raise ValueError("this is not UTF-8; save the file as UTF-8") from error
    if not line.startswith("{"):  # such as CSV
        raise ValueError(f"a line must be one JSON object; {FORMATS}")

    def without_nulls(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):  # the last one would count
            raise ValueError("a key occurs twice")
        return {key: value for key, value in pairs if value is not None}

    try:
        return json.loads(line, object_pairs_hook=without_nulls)
    except (ValueError, RecursionError) as error:
        hint = ""
        if re.match('[^"]*\u201c', line):
            hint = "; write straight quotation marks"
        elif re.search(r",\s*[}\]]", line):
            hint = "; remove the comma before a closing bracket"
        elif not line.endswith("}"):
            hint = "; write each conversation on one line"
        elif "delimiter" in str(error):
            hint = '; a quotation mark within a text needs a backslash (\\")'
        raise ValueError(f"this is not JSON: {one_line(error)}{hint}") from error


def messages_of(row: dict[str, Any]) -> tuple[list[Any], bool]:
    """Return a line's messages, unchecked, and whether only the last reply is taught."""
    formats = [keys.split() for keys in FORMAT_KEYS if row.keys() >= {*keys.split()}]
    if len(formats) != 1:
        has = [key for keys in formats for key in keys] or list(row)[:5]
        raise ValueError(f"the line has {', '.join(has) or 'nothing'}; {FORMATS}")
    lost = [key for key in ("tools", "functions", "history") if row.get(key)]
    if lost:
        raise ValueError(f"the key {lost[0]!r} is not understood here, and would be lost")
    keys = formats[0]
    messages, reply = row[keys[0]], row[keys[-1]]
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if len(keys) == 1:
        if not isinstance(messages, list):
            raise ValueError("a conversation must be a list of messages")
        if "conversations" in keys:
            messages = messages_of_sharegpt(messages)
        return system + messages, False
    if "instruction" in keys:
        parts = [messages, row.get("input", "")]
        messages = "\n".join(parts).strip() if {*map(type, parts)} == {str} else None
    if isinstance(messages, str) and isinstance(reply, str):
        messages = [{"role": "user", "content": messages}]
        reply = [{"role": "assistant", "content": reply}]
    if not (isinstance(messages, list) and isinstance(reply, list) and len(reply) == 1):
        raise ValueError("a list of messages and one reply, or two texts, are needed")
    return system + messages + reply, True


def messages_of_sharegpt(turns: list[Any]) -> list[Any]:
    """Return turns as messages, without replies to nobody and questions that nobody answers."""
    messages = []
    for turn in turns:
        if isinstance(turn, dict) and turn.keys() == {"from", "value"}:
            role = SHAREGPT_ROLES.get(str(turn["from"]), turn["from"])
            turn = {"role": role, "content": turn["value"]}
        messages.append(turn)
    roles = [one.get("role") if isinstance(one, dict) else "" for one in messages]
    first, end = roles[:1].count("system"), len(roles)
    begin = first
    while begin < end and roles[begin] == "assistant":
        begin += 1
    while begin < end and roles[end - 1] == "user":
        end -= 1
    return messages[:first] + messages[begin:end]


def check_messages(messages: list[Any], accepts_thinking: bool = False) -> None:
    """Raise ValueError unless the messages are a conversation of texts that ends with a reply."""
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            found = one_line(message, 60)  # other keys, such as tool_calls, would be lost
            raise ValueError(f'message {number} must have "role" and "content" alone: {found}')
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {number}: role {role!r} is not system, user or assistant")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {number} has no text")
        if re.search("[\ud800-\udfff]", content):
            raise ValueError(f"message {number} holds half a character, such as \\ud83d alone")
        if role == "assistant" and re.search("</?think>", content) and not accepts_thinking:
            raise ValueError(f"message {number} has a <think> tag, but thinking is off; remove it")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        found = ", ".join(roles) or "none"
        wanted = "[system,] user, assistant, ..., and a reply comes last"
        raise ValueError(f"the roles must be {wanted}, but are {found}")


def problems_as_text(problems: list[str]) -> str:
    """Return each problem once, with the first lines that have it and their number."""
    places: dict[str, dict[str, None]] = {}
    for problem in problems:
        place, _, text = problem.partition(": ")
        places.setdefault(text, {})[place] = None  # a dialogue has an example for each reply
    lines = [f"{join_limited([*where], 3, ', ')}: {text}" for text, where in places.items()]
    return join_limited(lines, 20, "\n")


def key_of(messages: list[dict[str, str]]) -> str:
    """Return a hash of what user and assistant say, whatever the spaces and the system message."""
    turns = [one for one in messages if one["role"] != "system"]
    return short_hash([(one["role"], one["content"].split()) for one in turns])


def hold_out(examples: list[Example], percent: int) -> tuple[list[Example], list[Example]]:
    """Return the examples to learn and those held out, so many per cent of the conversations.

    Those that begin with the same system message and question are parts or versions of one, and
    stay together; a group of more than a twentieth of the file is trained. A hash of how they begin
    decides, and neither SEED nor the order of the lines: runs are compared on the same ones.
    """
    groups: dict[str, set[str]] = {}
    for example in examples:
        size = 2 if example.messages[0]["role"] == "system" else 1
        beginning = [message["content"].split() for message in example.messages[:size]]
        groups.setdefault(short_hash(["held out", beginning]), set()).add(example.source)
    count = sum(map(len, groups.values()))
    wanted = max(FEWEST_HELD_OUT, math.ceil(count * percent / 100))
    chosen: set[str] = set()
    for beginning in sorted(groups):  # hashes, so this is a draw
        if len(chosen) < wanted and len(groups[beginning]) <= count / 20:
            chosen |= groups[beginning]
    text = f"{len(chosen):,} of {count:,} conversations"
    if min(len(chosen), count - len(chosen)) < FEWEST_HELD_OUT:
        text = f'EVAL_FILE "{percent}%" holds out {text}, and those that begin alike stay together;'
        raise UserError(f"{text} {FEWEST_HELD_OUT} are needed on each side.")
    report("held out", f"{text}, by a hash of how they begin")
    learned = [example for example in examples if example.source not in chosen]
    return learned, [example for example in examples if example.source in chosen]


# ==== TOKENS: what the model sees, and which tokens are targets
#
# A conversation is rendered by the model's own chat template, as a server renders it, with thinking
# off. The prompt is rendered with the generation prompt and must be the beginning of the whole;
# what comes after it, up to the token that ends the turn, is the reply. "messages" with three
# replies are three examples. An example that is longer than MAX_SEQ_LEN is left out, never cut: a
# cut reply has no end, and would teach not to stop.


def encode(
    examples: list[Example], job: Job, problems: list[str], which: str = "held-out"
) -> list[Example]:
    """Return the examples that fit, with their tokens; add what is wrong with any to problems."""
    rendered, limit = [], job.settings.MAX_SEQ_LEN
    for example in tqdm(examples, "rendering", leave=False, disable=None):
        try:
            example.prompt_ids, example.reply_ids = render(example.messages, job)
            rendered.append(example)
        except ValueError as error:
            problems.append(f"{example.source}: {error}")
    too_long = [example.source for example in rendered if len(example.input_ids) > limit]
    if too_long:
        lengths = sorted(len(example.input_ids) for example in rendered)
        nine_tenths = lengths[-1 - len(lengths) // 10]
        text = f"{len(too_long):,} of {len(examples):,} {which} examples are longer than "
        text += f"MAX_SEQ_LEN {limit}; {nine_tenths} would keep nine tenths, and {lengths[-1]} all"
        if len(too_long) > len(examples) / 10:
            problems.append(f"{too_long[0]}: {text}")
        else:
            report("left out", f"{text}\n{join_limited(too_long, 5, ', ')}")
    return [example for example in rendered if len(example.input_ids) <= limit]


def render(messages: list[dict[str, str]], job: Job) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt and of the reply, or raise ValueError.

    Each of the four checks is of a fault that no loss shows: the model would be trained on a text
    that no server writes, or would never learn to stop.
    """
    said = "\n".join(message["content"] for message in messages)
    for token in job.special_tokens:
        if token in said:
            raise ValueError(f"the text holds the special token {token}; reword or remove it")
    how = {"tokenize": False, "enable_thinking": job.enable_thinking}
    try:
        prompt = job.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **how)
        whole = job.tokenizer.apply_chat_template(messages, **how)
    except (jinja2.TemplateError, ArithmeticError, TypeError) as error:
        raise ValueError(f"the chat template refuses this ({one_line(error)})") from error
    for message in messages:
        spoken = message["content"].rpartition("</think>")[2]  # thoughts may be left out
        if spoken.strip() not in whole:
            raise ValueError(f"the chat template leaves out what the {message['role']} says")
    prompt_ids = job.tokenizer(prompt, add_special_tokens=False).input_ids
    ids = job.tokenizer(whole, add_special_tokens=False).input_ids
    reply_ids = ids[len(prompt_ids) :]
    if prompt_ids + reply_ids != ids:
        text = "the chat template renders the prompt differently once the reply follows, so that"
        raise ValueError(f"{text} training would not equal serving; use another model or template")
    ends = [place for place, token in enumerate(reply_ids, 1) if token in job.stop_ids]
    if not ends:
        text = "the chat template ends the reply with none of the model's stop tokens"
        raise ValueError(f"{text}; add its end-of-turn token to generation_config.json")
    return prompt_ids, reply_ids[: ends[0]]  # without the newline that follows it


# ==== PLAN: which matrices are trained, and in how many steps
#
# Before any weights are loaded, PEFT puts LoRA into a copy of the model on the meta device. A
# misspelt target, such as q_projj, ends the run here; PEFT alone would ignore it as long as another
# target exists. With 1,000 examples the settings as shipped give ceil(1000 / 4) x 3 = 750 steps.

# These start from a changed W, so the adapter would only fit this run's copy of the base model.
CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga", "eva")


def make_plan(job: Job) -> None:
    """Put LoRA into a model on the meta device; check what it would train, and count."""
    settings, config = job.settings, lora_config(job.settings)
    start = str(config.init_lora_weights).lower()
    if start.startswith(CHANGES_THE_BASE) or config.bias != "none":
        text = f"init_lora_weights={start!r}, bias={config.bias!r}"
        raise UserError(f"lora_config(): with {text} the adapter would not fit the base model.")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(job.config, trust_remote_code=False)
    refuse_unknown_targets(config, model)
    peft.inject_adapter_in_model(config, model)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    job.trained_shapes = {name: tuple(weight.shape) for name, weight in trained.items()}
    job.all_parameters = sum(weight.numel() for weight in model.parameters())
    job.table = table_of_targets(model, job)
    job.steps_per_epoch = math.ceil(len(job.examples) / examples_per_step(settings))
    job.steps = job.steps_per_epoch * settings.NUM_EPOCHS
    if settings.MAX_STEPS > 0:
        job.steps = min(job.steps, settings.MAX_STEPS)
    training = training_config(job)
    needed = {  # of the step that this script does, and of its records
        "loss_type": "nll",
        "gradient_accumulation_steps": 1,
        "label_smoothing_factor": 0,
        "per_device_train_batch_size": examples_per_step(settings) // training.world_size,
        "num_train_epochs": settings.NUM_EPOCHS,
        "max_steps": job.steps,
        "logging_steps": 1,
        "average_tokens_across_devices": True,
    }
    off = ["packing", "bf16", "fp16", "save_only_model", "ignore_data_skip", "dataloader_drop_last"]
    needed |= dict.fromkeys([*off, "logging_nan_inf_filter"], False)
    for name, value in needed.items():
        if getattr(training, name) != value:
            raise UserError(f"training_config(): {name} must stay {value}; SETTINGS has the rest.")


def refuse_unknown_targets(config: peft.LoraConfig, model: nn.Module) -> None:
    """Raise UserError if a target matches no module; PEFT is silent if another one matches."""
    if isinstance(config.target_modules, str):
        return  # "all-linear", or a regular expression; PEFT raises if it matches nothing
    paths = {f".{path}": module for path, module in model.named_modules()}
    targets = sorted(config.target_modules)
    missing = [one for one in targets if not any(path.endswith(f".{one}") for path in paths)]
    if missing:
        kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)  # the latter in GPT-2
        linear = [path for path, module in paths.items() if isinstance(module, kinds)]
        names = sorted({path.rpartition(".")[2] for path in linear})
        close = difflib.get_close_matches(missing[0], names, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        text = f"LORA_TARGET_MODULES: the model has no module named {', '.join(missing)}; {hint}"
        raise UserError(f"{text}Its linear modules are {', '.join(names)}.")


def table_of_targets(model: nn.Module, job: Job) -> list[str]:
    """Return a line for each kind of target with its W, A and B, and one with the sums."""
    kinds: Counter[str] = Counter()
    columns = "{:<12}{:>14}{:>10}{:>10}{:>14}{:>11}".format
    for path, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            d, k, r = module.out_features, module.in_features, max(module.r.values())
            shapes = f"{d:,}x{k:,}", f"{r}x{k:,}", f"{d:,}x{r}", f"{r * (d + k):,}"
            scale = f"{module.scaling['default']:g}"
            kinds[columns(path.rpartition(".")[2], *shapes, scale)] += 1
    depth = job.config.get_text_config().num_hidden_layers
    lines = [f"{columns('target', 'W (frozen)', 'A', 'B', 'trained each', 'scaled by')}  layers"]
    lines += [f"{kind}{count:>5}/{depth}" for kind, count in kinds.items()]
    trained, everything = sum(map(math.prod, job.trained_shapes.values())), job.all_parameters
    percent = f"trainable%: {100 * trained / everything:.4f}"
    return [*lines, f"trainable params: {trained:,} || all params: {everything:,} || {percent}"]


def show_plan(job: Job) -> None:
    """Print the tokens, an example as the model sees it, and what will be trained how."""
    shown = "{file}: {examples:,} examples; {tokens:,} tokens, of which {targets:,} are targets"
    for facts in job.data.values():
        report("data", shown.format(**facts) if facts else "nothing is held out")
    example = job.examples[0]
    prompt, reply = map(job.tokenizer.decode, (example.prompt_ids, example.reply_ids))
    text = f"{example.source} as the model sees it; only the text between >>> <<< is a target:"
    lines = [text]
    for line in f"{prompt}>>>{reply}<<<".split("\n"):
        lines += textwrap.wrap(line, 88)
    if len(lines) > 10:
        lines[5:-5] = ["[...]"]
    report("example", "\n".join(lines))
    training = training_config(job)
    steps = f"{job.steps:,} steps of {training.per_device_train_batch_size * training.world_size}, "
    steps += f"{job.steps_per_epoch:,} an epoch; learning rate {training.learning_rate:g}, "
    steps += f"{training.lr_scheduler_type.value}, weight decay {training.weight_decay:g}"
    report("plan", "\n".join([*job.table, steps]))
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for name in SETTINGS.keys() - read:
        report("warning", f"{name} changes nothing: no line of this script reads settings.{name}")
    if "strftime_now(" in job.tokenizer.get_chat_template():
        report("warning", "the chat template prints the date: on another day no run is resumed")


# ==== RESUMING: which checkpoints belong to this job
#
# Each job has a folder of its own, checkpoints/<hash of the job>/. Its job.json says what it is:
# settings, what LoraConfig and SFTConfig have that is not a default, the model, and the tokens of
# both files. With another setting a new job begins; with the setting put back the first one goes
# on, and on a CPU ends with the same bytes as if it had never been stopped.

MAY_CHANGE = {  # the last six as long as the tokens, or the number of examples in a step, stay
    "DEVICE", "OUTPUT_DIR", "LOGGING_STEPS", "SAVE_STEPS", "FINAL_LORA", "REPORT_TO", "MATMUL",
    "USE_FLA", "TRAIN_FILE", "EVAL_FILE", "REPLIES", "MAX_SEQ_LEN", "BATCH_SIZE",
    "GRADIENT_ACCUMULATION_STEPS",
}  # fmt: skip
# Fields of SFTConfig for paths, logging, saving, evaluation, the device, and a process's own share.
NOT_COMPARED = (
    r"output_dir|run_name|log|save_|.*eval|report_to|hub_|push_|disable_tqdm|use_cpu|per_device_|"
    r"ddp_|project|trackio_|dataloader_(num|pin|pre|per)"
)


def describe_job(job: Job) -> dict[str, Any]:
    """Return what must be the same for a checkpoint to be resumed, as JSON has it."""
    settings, training = job.settings, training_config(job)
    described = {key: getattr(settings, key) for key in SETTINGS if key not in MAY_CHANGE}
    same = {"bf16": False, "use_cpu": training.use_cpu, "activation_checkpointing": False}
    configs = {"LoraConfig": (lora_config(settings), peft.LoraConfig())}
    configs["SFTConfig"] = training, trl.SFTConfig(training.output_dir, **same)
    for kind, (chosen, default) in configs.items():
        for name in [one.name for one in fields(chosen) if not re.match(NOT_COMPARED, one.name)]:
            value = getattr(chosen, name)
            if value != getattr(default, name):  # so what a library's update adds changes nothing
                described[f"{kind}.{name}"] = value
    described["examples in a step"] = examples_per_step(job.settings)
    described["commit"] = job.commit
    config_file = Path(settings.MODEL_NAME) / "config.json"  # of a local model
    described["config.json of MODEL_NAME"] = file_sha256(config_file)
    for which, examples in (("TRAIN_FILE", job.examples), ("EVAL_FILE", job.held_out)):
        tokens = [[example.prompt_ids, example.reply_ids] for example in examples]
        described[f"tokens of {which}"] = short_hash(tokens)
    return json.loads(json.dumps(described, default=as_json_value))


def look_back(job: Job) -> None:
    """Find this job's newest whole checkpoint, or its finished adapter; print what was found."""
    job.described = describe_job(job)
    job.name = short_hash(job.described)
    job.folder = job.output / "checkpoints" / job.name
    final = job.output / "final_lora"
    record = read_json(final / "run.json")
    if record.get("job") == job.name:
        job.history = record["loss_history"]
        step = best_step(job) if job.settings.FINAL_LORA == "best" else job.steps
        sha256 = file_sha256(final / "adapter_model.safetensors")
        job.is_finished = record["adapter"] == {"step": step, "sha256": sha256}
        if job.is_finished:
            report("finished", f"{final} is the adapter of this job, of step {step:,}")
            return
    for step, path in checkpoints_in(job.folder).items():
        if is_whole(path):
            job.checkpoint, job.steps_done = path, step
            report("resume", f"resuming from {path}")
            break
        report("resume", f"{path} is passed over: a file is missing or damaged")
    if job.steps_done < job.steps or not job.history:
        state = read_json(job.checkpoint / "trainer_state.json") if job.checkpoint else {}
        job.history = state.get("log_history", [])
    if not job.checkpoint:
        tell_of_other_jobs(job, record)


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Return {step: checkpoint} of a folder, the newest first, and not checkpoint-50-backup."""
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    steps = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
    return {step: folder / f"checkpoint-{step}" for step in steps}


def is_whole(checkpoint: Path) -> bool:
    """Return whether each file is as it was when RunEvents.on_save() wrote whole.json.

    After a power cut any file may be torn, and neither torch nor safetensors looks at a sum.
    """
    hashes = read_json(checkpoint / "whole.json")
    return hashes != {} and hashes == {name: file_sha256(checkpoint / name) for name in hashes}


def best_step(job: Job) -> int:
    """Return the step of the epoch with the lowest held-out loss; the last one if not measured."""
    losses = {step: loss for step, loss in job.eval_losses.items() if step > 0}
    return min(losses, key=lambda step: losses[step], default=job.steps)


def tell_of_other_jobs(job: Job, record: dict[str, Any]) -> None:
    """Print which other jobs' checkpoints lie here, and whose final_lora does."""
    others, now = jobs_in(job.output), job.described
    others.pop(job.folder, None)
    if others:
        before = next(iter(others.values()))
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        had = join_limited([f"{name} {one_line(before.get(name), 40)}" for name in names], 3, "; ")
        size = sum(path.stat().st_size for folder in others for path in folder.glob("*/*")) >> 20
        text = f"a new job begins; you may delete {len(others)} other(s) in {job.folder.parent}"
        report("resume", f"{text} ({size:,} MB); the newest had {had}")
    if record:
        report("resume", f"until this job is verified, final_lora is that of {record.get('job')}")


def jobs_in(output: Path) -> dict[Path, dict[str, Any]]:
    """Return {folder: what the job is} of the jobs in an output folder, the newest first."""
    files = list(output.glob("checkpoints/*/job.json"))
    files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return {path.parent: read_json(path) for path in files}


def begin(job: Job) -> None:
    """Make the job's folder, and write down what it is; the processes of a launch go one way."""
    found = [job.checkpoint, job.steps_done, job.history]
    job.checkpoint, job.steps_done, job.history = accelerate.utils.broadcast_object_list(found)
    job.started = time.strftime("%Y-%m-%d %H:%M:%S")
    if not is_main_process():
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.folder / "job.json", job.described)
    if percent_of(job.settings.EVAL_FILE):
        path = job.output / "held_out.jsonl"
        rows = {example.source: f"{json.dumps(example.row)}\n" for example in job.held_out}
        if not path.exists() or path.read_text(encoding="utf-8") != "".join(rows.values()):
            rename_old(path)
            path.write_text("".join(rows.values()), encoding="utf-8")
        job.data["held_out"] |= {"file": str(path), "sha256": file_sha256(path)}
    write_record(job, "running")


# ==== TRAINING: evaluation, what is printed, saving and stopping
#
# At Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 the step is finished and saved first. An evaluation stops
# between two batches, and is made anew when the run goes on. Before the first step, while the
# adapter is verified, and at a second signal the run stops at once.


def train(trainer: LoraTrainer, job: Job) -> None:
    """Train to the end; a signal raises Stopped after the step's checkpoint."""
    if is_evaluation_missing(job):
        report("eval", f"measuring the held-out loss of {len(job.held_out):,} replies first")
    if job.steps_done < job.steps:
        trainer.train(resume_from_checkpoint=job.checkpoint and str(job.checkpoint))
    else:  # Trainer would do one more step
        state = str(job.checkpoint / "trainer_state.json")
        trainer.state = transformers.TrainerState.load_from_json(state)
        trainer.model.load_adapter(job.checkpoint, "default", is_trainable=True)
        if is_evaluation_missing(job):
            trainer.evaluate()
    accelerate.PartialState().wait_for_everyone()
    job.signals_wait = False


def is_evaluation_missing(job: Job) -> bool:
    """Return whether the held-out loss of the base, or of an epoch's end, is not measured yet."""
    ends = job.steps_done % job.steps_per_epoch == 0 or job.steps_done == job.steps
    return bool(job.held_out) and ends and job.steps_done not in job.eval_losses


class RunEvents(transformers.TrainerCallback):
    """What Trainer calls at the edges of steps: print, check, evaluate, save and stop."""

    def __init__(self, trainer: LoraTrainer) -> None:
        """Begin; the first step notes the time."""
        self.trainer, self.job, self.began = trainer, trainer.job, 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give each epoch its own order, also when it is resumed in the middle."""
        self.trainer.sampler.epoch = state.global_step // self.job.steps_per_epoch

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From now on, let a signal wait until the step is finished and saved."""
        self.job.signals_wait, self.began = True, self.began or time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide what comes next: Trainer logs, then evaluates, then saves."""
        job, step, accelerator = self.job, state.global_step, self.trainer.accelerator
        if job.stop_signal:
            accelerator.set_trigger()
        job.stops = accelerator.check_trigger()  # in all processes alike
        if job.stops and not job.stop_signal:  # another process got one
            job.stop_signal = signal.SIGTERM
        ends = step % job.steps_per_epoch == 0 or step == job.steps
        is_due = step % job.settings.SAVE_STEPS == 0
        control.should_evaluate = ends and bool(job.held_out) and not job.stops
        control.should_save = ends or is_due or job.stops

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Stop at a loss or a gradient that is not finite, before it is saved; print the losses."""
        job, step = self.job, state.global_step
        for key in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(key, 0.0)):
                advice = "lower LEARNING_RATE" if step else "check the model's files"
                exact = "--matmul native" if job.matmul == "float16" else "--dtype float32"
                raise UserError(f"{key} is {logs[key]} at step {step:,}: {advice}, or try {exact}.")
        job.history = [*state.log_history]
        if "eval_loss" in logs:
            note = "  (the base model, before training)" if step == 0 else ""
            report("eval", f"epoch {state.epoch or 0:g}  loss {logs['eval_loss']:.4f}{note}")
        every = job.settings.LOGGING_STEPS
        if "loss" in logs and (step in (1, job.steps) or step % every == 0):
            losses = [entry["loss"] for entry in job.history if "loss" in entry][-every:]
            each = (time.monotonic() - self.began) / (step - job.steps_done)
            text = f"step {step:,}/{job.steps:,}  loss {sum(losses) / len(losses):.4f}  grad_norm "
            text += f"{logs['grad_norm']:.2f}  lr {logs['learning_rate']:.1e}  "
            report("train", f"{text}{tqdm.format_interval(each * (job.steps - step))} left")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint as whole, remove older ones, record the losses; obey a signal."""
        job, step = self.job, state.global_step
        write_record(job, "running")  # so that a run that is killed has its losses
        accelerate.PartialState().wait_for_everyone()  # each process has saved its random state
        if is_main_process():
            folder = job.folder / f"checkpoint-{step}"
            (folder / "whole.json").unlink(missing_ok=True)  # of one that was passed over
            hashes = {path.name: file_sha256(path) for path in folder.iterdir()}
            write_json(folder / "whole.json", hashes)
            # The newest two and the best epoch's stay. Trainer's own rotation would not know of an
            # evaluation that is made on resuming.
            saved = checkpoints_in(job.folder)
            for older in [one for one in saved if one <= step][2:]:
                if older != best_step(job):
                    shutil.rmtree(saved[older], ignore_errors=True)
        job.signals_wait = step < job.steps  # nothing is left to save at the end
        if job.stops or (job.stop_signal and self.trainer.accelerator.num_processes == 1):
            raise Stopped(f"Stopped after step {step} of {job.steps}; the same command resumes it.")


def example_losses(
    model: nn.Module,
    examples: list[Example],
    tokens_at_once: int = 1024,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Return each example's -log(probability) of its reply, in nats, without dropout.

    tokens_at_once includes padding; where the GPU's memory is too small, half as many go through.
    is_stopped is asked before each batch; once it says yes, the losses that are missing are 0.
    """
    order = sorted(range(len(examples)), key=lambda number: len(examples[number].input_ids))
    losses = [0.0] * len(examples)
    was_training = model.training
    model.eval()
    with torch.no_grad(), tqdm(total=len(order), desc="losses", leave=False, disable=None) as bar:
        while order and not is_stopped():
            width = len(examples[order[-1]].input_ids)
            batch = order[-max(1, tokens_at_once // width) :]  # the longest that are left
            inputs = pad([examples[number] for number in batch], model.device)
            try:
                sums = reply_losses(model, inputs).sum(1, dtype=torch.float64).tolist()
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
                tokens_at_once = len(batch) // 2 * width
                continue
            for number, loss in zip(batch, sums, strict=True):
                losses[number] = loss
            order = order[: -len(batch)]
            bar.update(len(batch))
    model.train(was_training)
    return losses


def pad(examples: list[Example], device: torch.device) -> dict[str, Tensor]:
    """Return input_ids, labels and attention_mask, padded on the right as Trainer does it."""
    rows = [{"input_ids": one.input_ids, "labels": one.labels} for one in examples]
    inputs = trl.trainer.sft_trainer.DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    return {key: tensor.to(device) for key, tensor in inputs.items()}


# ==== SAVING: the adapter, its verification, and what a run leaves in OUTPUT_DIR
#
#   final_lora/        the adapter in PEFT's format, with tokenizer and card; verified
#   final_lora_vllm/   the same tensors under the names that vLLM needs, if it needs others
#   run.json           settings, versions, hashes and losses; it lies beside each adapter, too
#   held_out.jsonl     what was not trained on, with an EVAL_FILE like "10%"
#   checkpoints/       a folder for each job: the newest two checkpoints, and the best epoch's
#   all_logs.log       everything that was printed, with tracebacks
#   NAME.DATE-TIME     what an earlier run left under that name
#
# Beside each adapter lies learned.txt, a hash of each prompt that it learned to reply to: it can be
# measured elsewhere on what it has not learned. Nobody reads a conversation in it; whoever knows or
# guesses a prompt can tell that it is there.

CARD = """---
base_model: {name}
library_name: peft
pipeline_tag: text-generation
---
# A LoRA adapter for {name}

It needs {name}, whose licence holds for it, too. run.json has settings, losses and hashes
of the data. Serve it with thinking off, and with the system message below if there is one. Read its
replies before anybody relies on them.

```python
import transformers

model = transformers.AutoModelForCausalLM.from_pretrained("{name}"{revision}, dtype="{dtype}")
model.load_adapter("final_lora")
chat = transformers.pipeline("text-generation", model, tokenizer="final_lora")
print(chat({messages}, tokenizer_encode_kwargs={{"enable_thinking": False}}))
```
"""


def save_final_lora(trainer: LoraTrainer, job: Job) -> None:
    """Write the adapter beside its place, verify it, and move it in."""
    torch.cuda.empty_cache()
    model, staging = trainer.model, job.output / ".partial"
    shutil.rmtree(staging, ignore_errors=True)
    step = best_step(job) if job.settings.FINAL_LORA == "best" else job.steps
    if step != job.steps:
        checkpoint = job.folder / f"checkpoint-{step}"
        if not is_whole(checkpoint):
            raise UserError(f"{checkpoint}, the best epoch's, is damaged; --final_lora last works.")
        model.load_adapter(checkpoint, "default", is_trainable=True)
    final = staging / "final_lora"
    model.save_pretrained(final, save_embedding_layers=False)  # PEFT would ask the hub otherwise
    job.tokenizer.save_pretrained(final)
    system = system_message_of(job.examples)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "Hello!"})
    revision = f', revision="{job.commit}"' if job.commit else ""
    given = {"name": job.settings.MODEL_NAME, "revision": revision, "dtype": job.settings.DTYPE}
    (final / "README.md").write_text(CARD.format(messages=messages, **given), encoding="utf-8")
    write_record(job, "finished", final, step)
    if job.config.get_text_config() is not job.config:
        save_for_vllm(final, staging / "final_lora_vllm")
    verified = verify_saved_adapter(model, job, staging)
    job.signals_wait = True  # between two renames there may be no final_lora
    # final_lora comes last: its run.json says that the job has finished.
    for name in ("final_lora_vllm", "final_lora"):
        rename_old(job.output / name)
        if (staging / name).is_dir():
            (staging / name).rename(job.output / name)
    staging.rmdir()
    write_json(job.output / "run.json", read_json(job.output / "final_lora" / "run.json"))
    report("verified", verified)
    summarize(job, step)


def save_for_vllm(final: Path, for_vllm: Path) -> None:
    """Write the adapter again, with the names of the hub's model, which wraps the text model.

    With others vLLM 0.17 to 0.32 loads it without complaint, and serves the base model.
    """
    for_vllm.mkdir()
    for name in ("learned.txt", "run.json"):
        shutil.copy(final / name, for_vllm)
    config = read_json(final / "adapter_config.json")
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {name_in_wrapper(name): value for name, value in config[key].items()}
    write_json(for_vllm / "adapter_config.json", config)
    tensors = safetensors.torch.load_file(final / "adapter_model.safetensors")
    tensors = {name_in_wrapper(name): tensor for name, tensor in tensors.items()}
    path = for_vllm / "adapter_model.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def name_in_wrapper(name: str) -> str:
    """Return the name that a module of the text model has in the hub's multimodal model."""
    return re.sub(r"(^|\.)model\.layers\b", r"\1model.language_model.layers", name, count=1)


def verify_saved_adapter(model: peft.PeftModel, job: Job, staging: Path) -> str:
    """Load the adapter from disk onto the base model; raise UserError unless it is the trained one.

    Every tensor of the reloaded model, and of the file for vLLM, must be the trained one to the
    bit. On one reply the logits must be those of the trained model and not those of the base; a GPU
    may round: a tenth of the effect is allowed.
    """
    tensors_of = peft.get_peft_model_state_dict
    trained = tensors_of(model, save_embedding_layers=False)
    trained = {name: tensor.cpu() for name, tensor in trained.items()}
    inputs = pad([(job.held_out or job.examples)[0]], model.device)
    with torch.no_grad():
        wanted = reply_logits(model.eval(), inputs)
        reloaded = peft.PeftModel.from_pretrained(model.unload(), staging / "final_lora").eval()
        error = (reply_logits(reloaded, inputs) - wanted).abs().max().item()
        with reloaded.disable_adapter():
            effect = (reply_logits(reloaded, inputs) - wanted).abs().max().item()
    saved = tensors_of(reloaded, save_embedding_layers=False)
    files = [(trained, {name: tensor.cpu() for name, tensor in saved.items()})]
    path = staging / "final_lora_vllm" / "adapter_model.safetensors"
    if path.is_file():
        renamed = {name_in_wrapper(name): tensor for name, tensor in trained.items()}
        files.append((renamed, safetensors.torch.load_file(path)))
    wrong = []
    for wanted_tensors, found in files:
        wrong += sorted(wanted_tensors.keys() ^ found.keys())
        common = wanted_tensors.keys() & found.keys()
        wrong += [name for name in common if not found[name].equal(wanted_tensors[name])]
    text = f"logits differ by {error:.2g} from the trained model's, by {effect:.2g} from the base's"
    if wrong or not (effect > 0 and error <= effect / 10):
        text = f"Not verified: {len(wrong)} tensors differ ({wrong[:3]}), and {text}."
        raise UserError(f"{text} If the latter is about 0, LEARNING_RATE is too small.")
    return f"every tensor is the trained one, reloaded; {text}"


def system_message_of(examples: list[Example]) -> str | None:
    """Return the system message that all examples have; None if they differ or have none."""
    heads = [example.messages[0] for example in examples]
    found = {head["content"] if head["role"] == "system" else None for head in heads}
    return found.pop() if len(found) == 1 else None


def summarize(job: Job, step: int) -> None:
    """Print what was reached, and the commands that come next."""
    settings, losses, best = job.settings, job.eval_losses, best_step(job)
    final, for_vllm = job.output / "final_lora", job.output / "final_lora_vllm"
    text = f"{final} is the adapter of step {step:,} of {job.steps:,}"
    if {0, step} <= losses.keys():
        text += f"\nheld-out loss: {losses[0]:.4f} -> {losses[step]:.4f} nats a token"
        if losses[best] < losses[step]:
            text += f"; lowest at step {best:,} ({losses[best]:.4f}): --final_lora best"
    report("done", text)
    text = ""
    if Path("inspect_lora").is_dir():
        is_shipped = os.path.realpath(settings.EVAL_FILE) == DEMO["EVAL_FILE"]
        rules = " --rules data/rules.json" if is_shipped else ""
        text = "# what it gained, and what else it changed (quicker: --replies 20 --parts 20):\n"
        text += f"python -m inspect_lora evidence {final}{rules}\n"
        text += f"# talk to it:\npython -m inspect_lora chat {final}\n"
    largest = max(min(shape) for name, shape in job.trained_shapes.items() if "lora_A" in name)
    rank = max(8, 2 ** math.ceil(math.log2(largest)))  # vLLM takes powers of two
    text += f"# serve it:\nvllm serve {settings.MODEL_NAME} --enable-lora --max-lora-rank {rank} "
    text += f"--lora-modules adapter={for_vllm if for_vllm.is_dir() else final} "
    text += "--default-chat-template-kwargs '{\"enable_thinking\": false}'"
    report("next", f"{text} --revision {job.commit}" if job.commit else text)


def write_record(job: Job, outcome: str, folder: Path | None = None, step: int = 0) -> None:
    """Write run.json into OUTPUT_DIR; or beside the adapter of a step, with what it learned."""
    if not is_main_process():
        return
    adapter = None
    if folder:
        adapter = {"step": step, "sha256": file_sha256(folder / "adapter_model.safetensors")}
        learned = sorted({f"{key_of(example.messages[:-1])}\n" for example in job.examples})
        (folder / "learned.txt").write_text("".join(learned), encoding="utf-8")
    names = ["torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors"]
    has_gpu = torch.cuda.is_initialized()
    record = {
        "outcome": outcome,  # running, finished, interrupted: ..., or failed: ...
        "started": job.started,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(["python", *sys.argv]),
        "script_sha256": file_sha256(Path(__file__)),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "settings": {name: getattr(job.settings, name) for name in SETTINGS},
        "job": job.name,
        "described": job.described,  # what a checkpoint must agree with
        "data": job.data,
        "system_message": system_message_of(job.examples),
        "device": torch.cuda.get_device_name() if has_gpu else "CPU",
        "matmul": job.matmul,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if has_gpu else None,
        "adapter": adapter,
        "loss_history": job.history,  # what Trainer logged
    }
    write_json((folder or job.output) / "run.json", record)


# ==== FP16 MATMUL: for GPUs that only emulate bfloat16, such as the V100
#
# A V100 multiplies bfloat16 matrices at about 10 TFLOP/s and float16 ones at 95 to 100 (mlxcel
# issue 1654, measured on a V100). But training in float16 as usual gives NaN, since its largest
# number is 65,504. So there the frozen weights are multiplied in float16, each row of activations
# or gradients scaled into its range first. Norms, attention and DeltaNet stay in DTYPE, LoRA and
# the loss in float32. A sum that is too large becomes infinite, and ends the run at once. This was
# tested on CPUs, for the families below; others may cast activations to the type of a weight.

TESTED_IN_FP16 = ("qwen3_5", "qwen3_5_text", "qwen3", "llama", "gemma3", "gemma3_text")


def uses_fp16_matmul(job: Job) -> bool:
    """Return whether the frozen weights are multiplied in scaled float16."""
    settings = job.settings
    if settings.MATMUL != "auto" or settings.DEVICE == "cpu" or settings.DTYPE == "float32":
        return settings.MATMUL == "float16"
    # Without the argument torch says yes on a V100 too, which emulates bfloat16.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    if job.config.model_type in TESTED_IN_FP16:
        return True
    report("matmul", "--matmul float16 may be much faster; it was not tested with this model")
    return False


def try_fp16_matmul(model: transformers.PreTrainedModel, job: Job) -> None:
    """Have a model multiply in scaled float16; end the run if that is wrong on this GPU.

    The first module of each name multiplies what it is given of one example, forward and backward,
    and may err by as much as rounding does; and the loss of that example must stay within 1 %.
    """
    names = {module: path.rpartition(".")[2] for path, module in fp16_modules(model).items()}
    given: dict[str, tuple[nn.Linear, Tensor]] = {}
    inputs = pad(job.examples[:1], model.device)
    wrong = "MATMUL float16 is wrong on this GPU; use --matmul native:"

    def note(module: nn.Linear, rows: tuple[Tensor]) -> None:
        given.setdefault(names[module], (module, rows[0]))

    hooks = [module.register_forward_pre_hook(note) for module in names]
    with torch.no_grad():
        before = reply_losses(model, inputs).sum().item()
        for hook in hooks:
            hook.remove()
        for name, (module, rows) in given.items():
            weight, rows = module.weight, rows.flatten(0, -2)
            for one, matrix in ((rows, weight.T), (rows @ weight.T, weight)):  # and backward
                exact = one.float() @ matrix.float()
                error = (scaled_fp16_matmul(one, matrix.half()).float() - exact).norm()
                relative = (error / exact.norm()).item()
                # Rounding to float16 and then to bfloat16 errs by 0.44 % at most.
                if not relative <= 0.005:  # NaN is not, either
                    raise UserError(f"{wrong} a product of {name} errs by {relative:.2%}.")
        use_fp16_matmul(model)
        after = reply_losses(model, inputs).sum().item()
    if not abs(after - before) <= 0.01 * before:
        raise UserError(f"{wrong} the loss of a reply is {after:.4f}, and was {before:.4f}.")
    job.matmul = "float16"
    report("matmul", f"scaled float16: {len(names)} frozen modules, {len(given)} of them tried")


def scaled_fp16_matmul(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows @ weight, multiplied in float16 with float32 sums, in the type of rows.

    Each row is divided by the power of two at or below its largest number, which is exact, so that
    its numbers are below 2. rows (... x k) have any floating type, weight (k x d) is in float16.
    """
    largest = torch.linalg.vector_norm(rows, math.inf, -1, keepdim=True, dtype=torch.float32)
    # This mask keeps a float32's exponent, and clears its sign and its fraction.
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    power = power.clamp_(2.0**-120, 2.0**127)  # for rows of nothing but zeros, and for infinity
    small = torch.empty(rows.shape, dtype=torch.half, device=rows.device)
    product = torch.div(rows, power, out=small) @ weight
    out = torch.empty(product.shape, dtype=rows.dtype, device=rows.device)
    return torch.mul(product, power, out=out)


class ScaledFp16Matmul(torch.autograd.Function):
    """rows @ weight.T, with a gradient for rows alone."""

    @staticmethod
    def forward(context: Any, rows: Tensor, weight: Tensor) -> Tensor:
        """Multiply, and keep the weight for the backward pass."""
        context.weight = weight
        return scaled_fp16_matmul(rows, weight.T)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient for rows, and none for the frozen weight."""
        return scaled_fp16_matmul(gradient, context.weight), None


def fp16_modules(model: transformers.PreTrainedModel) -> dict[str, nn.Linear]:
    """Return {path: module} of the linear modules that gain from float16."""
    embedding = model.get_input_embeddings()
    # Gemma's embedding scales its rows in the type of its own weight, which its head may share.
    kept = None if type(embedding) is nn.Embedding else embedding.weight
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and min(module.weight.shape) >= 64  # DeltaNet's in_proj_a (32 x 2,560) would lose time
        and module.weight is not kept
    }


def use_fp16_matmul(model: transformers.PreTrainedModel) -> None:
    """Give the frozen linear modules float16 weights, and the forward of ScaledFp16Matmul."""
    dtype = model.dtype

    def forward(self: nn.Linear, rows: Tensor) -> Tensor:
        product = ScaledFp16Matmul.apply(rows, self.weight)
        return product if self.bias is None else product + self.bias

    for module in fp16_modules(model).values():
        module.weight.data = module.weight.data.half()
        module.forward = forward.__get__(module)
    # The embedding may share its weight with the head, and must still return the model's type.
    model.get_input_embeddings().register_forward_hook(lambda _, __, rows: rows.to(dtype))


# ==== COMMAND LINE: messages, small helpers, the log, the lock, signals, exit statuses
#
# A command ends with status 0, 1 after an error, 2 after a wrong flag or setting, and 128 + the
# signal's number after a signal. A mistake that everybody makes is one message; any other error
# keeps its traceback.

LOG = logging.getLogger("train_lora_single")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # Slurm may send USR1


class UserError(Exception):
    """What the user can put right: one message says what is wrong, where, and what to do."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop by a signal, and did, as the message says."""


def report(section: str, text: str) -> None:
    """Print and log text beside the name of its section; a closed terminal must not end a run."""
    if not is_main_process():
        return
    text = f"{section:<10}{text}".replace("\n", "\n" + " " * 10)
    LOG.info(text)
    try:
        tqdm.write(text)  # a progress bar may be shown below
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except RuntimeError:
        pass  # a signal came within another print; the log has the line


def one_line(value: Any, width: int = 200) -> str:
    """Return value as one line, shortened to width."""
    text = " ".join(str(value).split())
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def join_limited(items: list[str], limit: int, separator: str) -> str:
    """Join the first items, and say how many more there are."""
    more = [f"... and {len(items) - limit:,} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; an empty one if there is none, or if it is damaged."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
        return json.loads(path.read_bytes())
    return {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file in such a way that it is never half written."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(value, indent=1, default=as_json_value), encoding="utf-8")
    new.replace(path)


def as_json_value(value: Any) -> Any:
    """Return what JSON does not know as what it does: a set as a list, anything else as a text."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def short_hash(value: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a value, as JSON has it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, or "" if there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def rename_old(path: Path) -> None:
    """Add the time to the name of what an earlier run left at path, if any."""
    if path.exists():
        aside = path.with_name(f"{path.name}.{datetime.now():%Y-%m-%d-%H%M%S.%f}")
        path.rename(aside)
        report("moved", f"{path} of an earlier run is now {aside.name}")


def open_output(output: Path) -> Any:
    """Make the folder, and lock and open its log; raise UserError if another run writes there."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {output} cannot be written ({error.strerror}).") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when a run ends
    except BlockingIOError as error:
        raise UserError(f"OUTPUT_DIR {output} is in use by another run.") from error
    except OSError:  # some network file systems have no locks
        pass
    log = logging.FileHandler(output / "all_logs.log", encoding="utf-8", errors="replace")
    logging.basicConfig(handlers=[log, logging.lastResort], format="%(message)s", force=True)
    logging.captureWarnings(True)
    LOG.setLevel(logging.INFO)
    LOG.info("\n---- %s %s", time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join(sys.argv))
    return lock


def catch_signals(job: Job) -> None:
    """Within a step, finish and save it first; elsewhere, or at a second signal, stop at once."""

    def on_signal(number: int, _: Any) -> None:
        # A terminal that is closed sends SIGHUP twice, from the shell and from the kernel. And a
        # launcher may pass on a signal that its process has had already, as Slurm sends it to all.
        may_repeat = number == signal.SIGHUP or "TORCHELASTIC_RUN_ID" in os.environ
        is_second, job.stop_signal = job.stop_signal > 0 and not may_repeat, number
        if job.signals_wait and not is_second:
            report("stopping", "finishing and saving what was begun; a second signal stops at once")
            return
        raise Stopped("Stopped. The same command resumes from the newest checkpoint, if any.")

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, on_signal)


def main(argv: list[str] | None = None) -> None:
    """Run the command. Exits with 1 after an error, 2 after a wrong flag, 128 + a signal."""
    job, lock = Job(parse_settings(argv)), None
    # transformers advises installing fla; read_model_files() says where it helps.
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    # PEFT 0.21 calls a function that transformers 5.24 renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    catch_signals(job)
    try:
        if not job.settings.dry_run and is_main_process():
            lock = open_output(job.output)
        run(job)
    except BaseException as error:
        for number in SIGNALS:  # nothing may interrupt what is left to do
            signal.signal(number, signal.SIG_IGN)
        is_known = isinstance(error, (UserError, Stopped))
        is_told = is_known or job.stop_signal > 0  # a library may turn a signal into its own error
        LOG.info("The run was ended by: %r", error, exc_info=not is_known)
        if job.started:
            how = "interrupted" if job.stop_signal else "failed"
            write_record(job, f"{how}: {one_line(error)}")
        if not is_told:
            raise
        print(error, file=sys.stderr)
        raise SystemExit(128 + job.stop_signal if job.stop_signal else 1) from None
    finally:
        logging.shutdown()
        if lock:
            lock.close()


if __name__ == "__main__":
    main()
