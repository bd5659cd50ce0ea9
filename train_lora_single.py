"""Train a LoRA adapter for Qwen3.5-4B on your conversations, on one GPU (Linux).

    python train_lora_single.py              train on data/train.jsonl; write output/final_lora
    python train_lora_single.py --dry_run    check the data and print the plan; needs no GPU
    python train_lora_single.py --demo       the whole job with a toy model: two minutes on a CPU
    python train_lora_single.py --lora_r 16 --num_epochs 2   every setting below is also a flag

The same command resumes a run that was stopped; settings that change what is trained begin a new
one. No earlier adapter is overwritten.

The file has sections: SETTINGS, THE RUN (the whole job in one function), FLAGS, THE HEART (what is
trained, and how a step is done), MEMORY, MODEL, DATA, TOKENS, PLAN, RESUMING, TRAINING, SAVING,
FP16 MATMUL (for a V100), COMMAND LINE. Read SETTINGS, THE RUN and THE HEART first. The package
inspect_lora uses some of these functions.
"""

# `uv run train_lora_single.py --demo` reads this (PEP 723) and makes the environment itself. The
# versions are those of requirements.txt; `.ci/lock.py` writes both.
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "accelerate==1.16.0",
#     "datasets==5.2.0",
#     "huggingface_hub==2.4.0",
#     "jinja2==3.1.6",
#     "peft==0.21.2",
#     "safetensors==0.8.0",
#     "torch==2.10.0",  # newer wheels have no kernels for the V100
#     "tqdm==4.70.1",
#     "transformers==5.25.0",
#     "trl==1.16.0",
# ]
# ///

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import fcntl
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
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
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

# ==== SETTINGS: edit them here, or give the flag of the same name, such as --lora_r 16
#
# To add a setting, write one line, such as
#     WEIGHT_DECAY = 0.01  # shrinks A and B a little at each step
# and use it, here in training_fields() as weight_decay=settings.WEIGHT_DECAY. It becomes a flag and
# is recorded in run.json. A new value is a new job, so no earlier checkpoint is resumed.

# The model.
MODEL_NAME = "Qwen/Qwen3.5-4B"  # a chat model on the hub, or a local folder
MODEL_REVISION = "main"  # the model's branch, tag or commit on the hub
CHAT_TEMPLATE = ""  # "" for the model's own, one_pass (see TOKENS), or a file
DTYPE = "bfloat16"  # the type of the frozen weights: bfloat16 or float32
DEVICE = "cuda"  # cuda, or cpu for small models

# The data. The section DATA shows the formats that a conversation may have.
TRAIN_FILE = "data/train.jsonl"  # the conversations to learn from
EVAL_FILE = "data/eval.jsonl"  # held out; "10%" takes a tenth of TRAIN_FILE; "" for none
REPLIES = "all"  # which replies of a conversation are targets: all, or the last
ENABLE_THINKING = False  # True: each target begins with its thoughts, <think>...</think>
MAX_SEQ_LEN = 512  # in tokens; longer examples are left out, not cut; more than a tenth is an error

# LoRA: y = W x + (alpha / r) B A x. W (d x k) is frozen; A (r x k) and B (d x r) are trained.
LORA_R = 8  # rank; with alpha kept, the same learning rate often suits
LORA_ALPHA = 16  # scales the update by alpha / r; if it is too large, the loss jumps
LORA_DROPOUT = 0.05  # on the LoRA branch only; makes memorizing harder
LORA_TARGET_MODULES = [  # the modules that get LoRA, or only "all-linear"
    # Attention, in every fourth layer of Qwen3.5; the others are Gated DeltaNet, whose in_proj_qkv,
    # in_proj_z, in_proj_a, in_proj_b and out_proj get none (docs/gpu.md).
    "q_proj", "k_proj", "v_proj", "o_proj",
    "gate_proj", "up_proj", "down_proj",  # feed-forward, in every layer
]  # fmt: skip
START_FROM = ""  # an adapter's folder to start from; same base model, modules, r and alpha

# Training.
NUM_EPOCHS = 3  # passes over the training file; lower it if the held-out loss rises again
MAX_STEPS = 0  # stop after this many steps, to try things out; 0: after all epochs
# A step has BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS replies, or joined dialogues. Only the product
# matters: how many fit into the GPU's memory at once is found out (see MEMORY).
BATCH_SIZE = 2  # how many examples a step has; a smaller number saves no memory
GRADIENT_ACCUMULATION_STEPS = 2  # times this number; it saves no memory, either
LEARNING_RATE = 2e-4  # the peak; lower it if the loss jumps
LR_SCHEDULER_TYPE = "cosine"  # after the warm-up: cosine, linear or constant_with_warmup
WARMUP_RATIO = 0.03  # the share of the steps in which the learning rate rises from 0
SEED = 42  # for the order of the examples, dropout, and the initial A

# Results.
OUTPUT_DIR = "output"  # gets final_lora, run.json, all_logs.log and checkpoints
LOGGING_STEPS = 10  # how often, in steps, the mean loss is printed
SAVE_STEPS = 50  # how often, in steps, a checkpoint is saved; a crash loses the rest
EVAL_STEPS = 0  # steps between held-out losses (also measured at start and end); 0: each epoch
FINAL_LORA = "last"  # which step's adapter becomes final_lora: last, or best (lowest held-out loss)
REPORT_TO = "none"  # also log to tensorboard, wandb or trackio

# How things are computed.
MATMUL = "auto"  # for the frozen weights: native, float16 (see FP16 MATMUL), or auto (by GPU)
USE_FLA = False  # flash-linear-attention's kernels for Gated DeltaNet: faster on an A100 or 4090

SETTINGS = [name for name in [*globals()] if name.isupper()]  # the constants above


def lora_fields(settings: Settings) -> Facts:
    """Return PEFT's LoraConfig fields; you may add use_rslora, use_dora, rank_pattern, others."""
    modules = settings.LORA_TARGET_MODULES
    return dict(
        r=settings.LORA_R,
        lora_alpha=settings.LORA_ALPHA,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        lora_dropout=settings.LORA_DROPOUT,
        bias="none",  # a trained bias would stay in the base when the adapter is switched off
        task_type="CAUSAL_LM",
    )


def training_fields(settings: Settings, steps: int) -> Facts:
    """Return the SFTConfig fields you may edit; you may add weight_decay, optim and others.

    The rest keep TRL's defaults (AdamW, gradients clipped at 1.0) or fixed_fields().
    """
    return dict(
        learning_rate=settings.LEARNING_RATE,
        lr_scheduler_type=settings.LR_SCHEDULER_TYPE,
        warmup_steps=int(settings.WARMUP_RATIO * steps),
        seed=settings.SEED,
    )


def fixed_fields(settings: Settings, base: Base, steps: int) -> Facts:
    """Return the fields of SFTConfig that the step, the loss and the records rely on."""
    processes = accelerate.PartialState().num_processes
    return dict(
        max_steps=steps,  # this decides, not the epochs
        num_train_epochs=settings.NUM_EPOCHS,
        # A whole step arrives in one call of training_step(), which divides it into micro-batches.
        per_device_train_batch_size=examples_per_step(settings) // processes,
        gradient_accumulation_steps=1,
        average_tokens_across_devices=True,
        activation_checkpointing=False,  # switched for each micro-batch, see MEMORY
        gradient_checkpointing=False,  # its old name
        bf16=False,  # no autocast: the weights have their type already
        fp16=False,
        use_cpu=settings.DEVICE == "cpu" or settings.dry_run,  # a dry run makes no CUDA context
        loss_type="nll",
        label_smoothing_factor=0,
        eos_token=base.tokenizer.eos_token,
        dataset_kwargs={"skip_prepare_dataset": True},  # the tokens are used as is
        max_length=None,  # nothing is cut
        train_sampling_strategy="sequential",  # SimilarLengthSampler decides
        dataloader_drop_last=False,
        dataloader_pin_memory=False,  # a step's tokens are few, and under WSL it may fail (8447)
        **dict.fromkeys(["packing", "padding_free", "shuffle_dataset"], False),
        # These are ignored or unwanted:
        activation_offloading=False,
        router_aux_loss_coef=0.0,  # token_losses() has no such part, see make_plan()
        **dict.fromkeys(["assistant_only_loss", "auto_find_batch_size", "eval_on_start"], False),
        **dict.fromkeys(["load_best_model_at_end", "use_liger_kernel"], False),
        **dict.fromkeys(["completion_only_loss", "data_seed", "eval_steps"], None),
        **dict.fromkeys(["save_total_limit", "torch_empty_cache_steps"], None),
        eval_strategy="no",  # RunEvents evaluates and saves, see TRAINING
        save_strategy="no",
        save_steps=500,
        save_only_model=False,
        ignore_data_skip=False,
        logging_strategy="steps",
        logging_steps=1,  # every loss is checked and recorded
        logging_nan_inf_filter=False,  # a NaN must not be replaced by a mean
        report_to=settings.REPORT_TO,
        run_name=Path(settings.OUTPUT_DIR).resolve().name,  # in a tracker
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )


# ==== THE RUN: the whole job, and the values that its sections hand on

Settings = argparse.Namespace  # the constants, as flags change them
Messages = list[dict[str, str]]  # a conversation; each has a role and a content
History = list[dict[str, float]]  # what Trainer logged
Facts = dict[str, Any]  # values by name, such as those of a JSON file


def run(settings: Settings, session: Session) -> Job:
    """Train one adapter, verify it, and save it as final_lora. The comments name sections."""
    prepare_device(settings)  # MODEL
    base = read_base(request_of(settings))  # MODEL: configuration, tokenizer and chat template
    data = read_data(settings, base)  # DATA, TOKENS: every line is checked before training
    plan = make_plan(settings, base, data)  # PLAN: which weights, how many steps, what TRL is told
    earlier = find_earlier_work(settings, plan)  # RESUMING: a checkpoint, or its finished adapter?
    [earlier] = accelerate.utils.broadcast_object_list([earlier])  # the same in all processes
    job = Job(settings, base, data, plan, earlier, session)
    tell_of_unused_settings()  # PLAN
    if settings.dry_run or not (earlier.checkpoint or earlier.is_finished):
        show_plan(job)  # PLAN
    if settings.dry_run or earlier.is_finished:
        if is_main_process() and not settings.dry_run:
            restore_results(job)  # SAVING
        report("done", "Nothing was trained.")
        return job
    with recorded(job):  # RESUMING: what the job is, and how this session ends
        trainer = build_trainer(job)  # THE HEART: the weights, with LoRA in them
        check_only_lora_is_trained(trainer.model, plan)  # THE HEART
        if earlier.checkpoint_step < plan.steps:
            find_what_fits(trainer)  # MEMORY: trial passes, on a GPU
        train(trainer)  # TRAINING: all steps, or those that are left
        if is_main_process():
            save_final_lora(trainer)  # SAVING: write, load again, compare, move into place
    if session.stop.signal:  # it came while final_lora was moved
        raise Stopped("Stopped; final_lora was finished first.")
    return job


@dataclass(frozen=True)
class BaseRequest:
    """Which base model is wanted, and how it is to be called and computed."""

    name: str  # on the hub, or a local folder
    revision: str  # its branch, tag or commit
    chat_template: str  # "" for the model's own, one_pass, or a file
    enable_thinking: bool
    dtype: str
    device: str
    matmul: str  # native, float16 or auto
    commit: str = ""  # if an earlier job has fixed it


@dataclass(frozen=True)
class Base:
    """What is known of the base model before its weights are loaded."""

    request: BaseRequest
    config: ModelConfig
    commit: str  # on the hub; "" for a local folder
    tokenizer: transformers.PreTrainedTokenizerBase  # with its chat template
    stop_ids: list[int]  # the tokens at which the model stops
    special_tokens: list[str]  # no message may contain these
    enable_thinking: bool  # how the chat template is called


@dataclass(frozen=True)
class Conversation:
    """A dialogue up to and including a trained reply."""

    source: str  # file:line
    messages: Messages  # the last one is the reply
    row: Facts  # the line as it is in the file


@dataclass(frozen=True)
class Example(Conversation):
    """The same in tokens, which go through the model as one row."""

    prompt_ids: list[int]  # tokens before the reply; targets only in earlier replies
    reply_ids: list[int]  # target tokens, with the turn's end
    earlier_replies: tuple[Example, ...] = ()  # in the prompt, and also trained

    @property
    def replies(self) -> tuple[Example, ...]:
        """All replies that this row trains, each as an example of its own."""
        return (*self.earlier_replies, replace(self, earlier_replies=()))

    @property
    def input_ids(self) -> list[int]:
        """All tokens, as the model sees them."""
        return self.prompt_ids + self.reply_ids

    @property
    def labels(self) -> list[int]:
        """The target tokens in their places, and -100 everywhere else."""
        labels: list[int] = []
        for reply in self.replies:
            labels += [-100] * (len(reply.prompt_ids) - len(labels)) + reply.reply_ids
        return labels

    @property
    def targets(self) -> int:
        """The number of target tokens."""
        return sum(len(reply.reply_ids) for reply in self.replies)


@dataclass(frozen=True)
class Data:
    """The examples, and what the records say about them."""

    examples: list[Example]  # to learn from
    held_out: list[Example]
    facts: Facts  # file, hash and counts of both
    held_out_lines: str  # the conversations that an EVAL_FILE like "10%" holds out, as JSONL


@dataclass(frozen=True)
class Plan:
    """What will be trained, in how many steps."""

    trained_shapes: dict[str, tuple[int, ...]]  # of LoRA's weights, by name
    all_parameters: int
    lora_table: list[str]  # of the modules that get LoRA
    steps_per_epoch: int
    steps: int
    training: trl.SFTConfig
    identity: Facts  # what a checkpoint must agree with
    folder: Path  # of this job's checkpoints; its name is a hash of the identity


@dataclass(frozen=True)
class EarlierWork:
    """What earlier sessions of this job left."""

    checkpoint: Path | None  # to resume from
    checkpoint_step: int
    loss_history: History
    sessions: list[Facts]  # that led to the checkpoint
    is_finished: bool = False
    is_of_other_code: bool = False  # continued under --edited_code


@dataclass
class Session:
    """One run of the command. Unlike the values above, it changes during the run."""

    started: str
    matmul: str = "native"  # or "float16", see FP16 MATMUL
    loss_history: History = field(default_factory=list)  # from the job's first step
    stop: Stop = field(default_factory=lambda: Stop())  # see TRAINING


@dataclass(frozen=True)
class Job:
    """All of these together, for the trainer, its callbacks and the records."""

    settings: Settings
    base: Base
    data: Data
    plan: Plan
    earlier: EarlierWork
    session: Session

    @property
    def output(self) -> Path:
        """The folder for the results."""
        return Path(self.settings.OUTPUT_DIR)


class UserError(Exception):
    """A user's mistake: the message says what is wrong, where, and what to do."""


# ==== FLAGS: each constant of SETTINGS is a flag, is checked, and is recorded in run.json
#
# This section comes before the slow imports, so that --help and errors in settings appear at once.

SCRIPT = Path(__file__).read_bytes()  # read at the start; editing it later is harmless
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
ALSO_CALLED = {"--lr": "--learning_rate", "--rank": "--lora_r"}  # by those who know TRL or PEFT
MAY_BE_EMPTY = ("CHAT_TEMPLATE", "EVAL_FILE", "START_FROM")
PATHS = ("MODEL_NAME", "TRAIN_FILE", "OUTPUT_DIR", *MAY_BE_EMPTY)
# A type, a list of choices, a range of whole numbers, or the smallest and the largest number.
ALLOWED_VALUES: Facts = {
    **dict.fromkeys(["MODEL_REVISION", *PATHS], str),
    "LORA_TARGET_MODULES": list,
    "DTYPE": ["bfloat16", "float32"],
    "DEVICE": ["cuda", "cpu"],
    "REPLIES": ["all", "last"],
    "LR_SCHEDULER_TYPE": ["cosine", "linear", "constant_with_warmup"],
    "FINAL_LORA": ["last", "best"],
    "REPORT_TO": ["none", "tensorboard", "wandb", "trackio"],
    "MATMUL": ["auto", "native", "float16"],
    "ENABLE_THINKING": [False, True],
    "USE_FLA": [False, True],
    **dict.fromkeys(["MAX_SEQ_LEN", "NUM_EPOCHS", "BATCH_SIZE", "SAVE_STEPS"], range(1, 2**31)),
    **dict.fromkeys(["GRADIENT_ACCUMULATION_STEPS", "LOGGING_STEPS"], range(1, 2**31)),
    **dict.fromkeys(["MAX_STEPS", "EVAL_STEPS"], range(2**31)),
    "LORA_R": range(1, 513),  # vLLM serves no higher rank
    "SEED": range(2**32),
    "LORA_ALPHA": (1e-9, 1e9),
    "LEARNING_RATE": (1e-9, 0.5),
    **dict.fromkeys(["LORA_DROPOUT", "WARMUP_RATIO"], (0.0, 0.99)),
}


def parse_settings(argv: list[str] | None = None) -> Settings:
    """Return the settings as flags change them; exit with status 2 and list every fault."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--SETTING VALUE ...] [--dry_run] [--demo]",
        description=__doc__.partition("\n\nThe file")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # flags not given are absent
        allow_abbrev=False,
    )
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="only print the plan")
    parser.add_argument("--demo", action="store_true", help=f"sets {', '.join(DEMO)}")
    resume_help = "resume a run although this file's code has been edited since"
    parser.add_argument("--edited_code", "--edited-code", action="store_true", help=resume_help)
    values = {name: globals()[name] for name in SETTINGS}
    comments = dict(re.findall(r"(?m)^([A-Z_\d]+)(?:: .+?)? = .*?  # (.+)$", SCRIPT.decode()))
    for name, constant in values.items():
        parser.add_argument(
            *sorted({f"--{name.lower()}", f"--{name.lower().replace('_', '-')}"}),
            dest=name,
            nargs="+" if isinstance(constant, list) else None,
            type=str if isinstance(constant, str) else number_or_text,
            metavar="X",
            help=f"{comments.get(name, '')} [{constant}]".replace("%", "%%"),
        )
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        word, options = unknown[0].partition("=")[0], [f"--{name.lower()}" for name in SETTINGS]
        close = difflib.get_close_matches(ALSO_CALLED.get(word, word), options, 1, 0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    flags = vars(known)
    switches = {name: flags.pop(name, False) for name in ("dry_run", "edited_code")}
    values |= (DEMO if flags.pop("demo", False) else {}) | flags
    if problems := what_is_wrong(values):
        parser.error("\n".join(problems))
    values |= {name: os.path.expanduser(values[name]) for name in PATHS}
    return argparse.Namespace(**values, **switches)


def number_or_text(text: str) -> Any:
    """Return the number, True or False that a flag's text stands for, or else the text."""
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text.title() if text.isalpha() else text)
    return text


def what_is_wrong(values: Facts) -> list[str]:
    """Return one sentence for each wrong setting."""
    problems = []
    for name, value in values.items():
        rule, constant = ALLOWED_VALUES.get(name), globals()[name]
        if isinstance(rule, list):
            is_right, wanted = repr(value) in map(repr, rule), f"one of {rule}"  # 1 is not True
        elif isinstance(rule, range):
            is_right = type(value) is int and value in rule
            wanted = f"a whole number from {rule[0]} to {rule[-1]}"
        elif isinstance(rule, tuple):
            is_right = type(value) in (int, float) and rule[0] <= value <= rule[1]
            wanted = f"a number from {rule[0]} to {rule[1]}"
        elif rule is list:
            is_right = isinstance(value, list) and {*map(type, value)} == {str}
            wanted = 'a list of names, such as ["q_proj"] or ["all-linear"]'
        elif rule is str:
            is_right = isinstance(value, str) and (value != "" or name in MAY_BE_EMPTY)
            wanted = 'a file, a percentage like "10%", or ""' if name == "EVAL_FILE" else "text"
        else:  # a setting of your own
            is_right = constant is None or kind_of(value) == kind_of(constant)
            wanted = f"like {constant!r}"
        if name == "DEVICE":
            wanted += "; the environment variable CUDA_VISIBLE_DEVICES=1 selects the second GPU"
        if not is_right:
            problems.append(f"{name} is {value!r}: it must be {wanted}")
    eval_file = str(values["EVAL_FILE"])
    if eval_file.endswith("%") and not 1 <= percent_of(eval_file) <= 50:
        problems.append(f'EVAL_FILE is {eval_file!r}: it must be from "1%" to "50%"')
    for name, file in (("CHAT_TEMPLATE", ""), ("START_FROM", "adapter_model.safetensors")):
        path = Path(str(values[name])).expanduser() / file
        is_word = values[name] == "" or (name, values[name]) == ("CHAT_TEMPLATE", "one_pass")
        if not is_word and not path.is_file():
            problems.append(f"{name} is {values[name]!r}: there is no file {path}")
    if values["FINAL_LORA"] == "best" and not eval_file:
        problems.append('FINAL_LORA is "best": EVAL_FILE is needed to find that step')
    return problems


def kind_of(value: Any) -> type:
    """Return the type of a value; all numbers are of one kind."""
    return float if type(value) is int else type(value)


def percent_of(eval_file: str) -> int:
    """Return the percentage of an EVAL_FILE like "10%", or 0 for the name of a file."""
    percentage = re.fullmatch(r"(\d+)\s*%", eval_file)
    return int(percentage[1]) if percentage else 0


if __name__ == "__main__":
    SETTINGS_OF_COMMAND = parse_settings()  # for main(), after the imports
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports prints no traceback

# Libraries read these when they are imported.
# Busy-waiting threads slowed a small CPU model from 28 s to 245 s beside another process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# TRL refuses several visible GPUs without a launcher. PEFT imports bitsandbytes where it is
# installed, which starts the driver with those that are visible by then.
if "TORCHELASTIC_RUN_ID" not in os.environ:
    FIRST_GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = FIRST_GPU
# Micro-batch widths vary, which fragments memory. Under WSL this may fail (pytorch 192330).
IS_WSL = "microsoft" in os.uname().release.lower()
if not IS_WSL and "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["USE_HUB_KERNELS"] = "NO"  # transformers 5.25 runs kernels of the hub unasked
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

ModelConfig = transformers.PretrainedConfig
Model = transformers.PreTrainedModel
Tensors = dict[str, Tensor]  # by name

# ==== THE HEART: LoRA, the trainer, its step and its loss
#
# Each module that gets LoRA, a matrix W, has two small matrices beside it, A and B. Only these are
# trained, in float32. The target tokens are those of a reply and the one that ends its turn. At
# position t the model predicts token t + 1, so a row looks like this (see also TOKENS):
#
#     input_ids    <user>  How?    <end>   <bot>   Like    this    <end>
#     labels       -100    -100    -100    -100    Like    this    <end>
#     predicted                            Like    this    <end>
#
# The loss of a step is the sum of -log(probability) over its target tokens, divided by how many
# there are; into how many micro-batches the step is split does not matter.
#
# Trainer hands all examples of a step to training_step(), clips the gradient, and lets AdamW change
# A and B. Three checks guard this: check_only_lora_is_trained() before the first step,
# RunEvents.on_log() at each step (loss and gradient must be finite), and verify_saved_adapter() at
# the end.


def build_trainer(job: Job) -> LoraTrainer:
    """Load the base model and return a trainer whose model has LoRA in it.

    Only peft_config may add it: TRL refuses a model that has been through PEFT's get_peft_model().
    """
    settings, base = job.settings, job.base
    model = load_model(settings.MODEL_NAME, base.commit, settings.DTYPE, settings.DEVICE)
    if uses_fp16_matmul(base.request, base.config):
        try_fp16_matmul(model, job.data.examples)
        job.session.matmul = "float16"
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    with torch.no_grad():  # before any step, so that needs_logits() knows
        last_states(model, {"input_ids": ids, "labels": ids, "attention_mask": ids})
    trainer = LoraTrainer(
        job,
        model=model,
        peft_config=peft.LoraConfig(**lora_fields(settings)),  # PEFT makes A and B in float32
        args=job.plan.training,
        train_dataset=datasets.Dataset.from_list(rows_of(job.data.examples)),
        data_collator=collate,
        processing_class=base.tokenizer,
    )
    config = trainer.model.peft_config["default"]
    config.revision = base.commit or None  # of the base model
    if config.target_modules == {*settings.LORA_TARGET_MODULES}:  # a set's order varies
        config.target_modules = [*settings.LORA_TARGET_MODULES]
    if settings.START_FROM and not job.earlier.checkpoint:
        trainer.model.load_adapter(settings.START_FROM, "default", is_trainable=True)
        report("start", f"training begins with A and B of {settings.START_FROM}")
    trainer.add_callback(RunEvents(trainer))
    trainer.remove_callback(transformers.PrinterCallback)  # would print dictionaries
    return trainer


class LoraTrainer(trl.SFTTrainer):
    """TRL's trainer with this script's micro-batches, loss, order of the examples, and saving."""

    def __init__(self, job: Job, **arguments: Any) -> None:
        """Prepare for a whole step at once, and for layers that can use checkpointing."""
        self.job, self.sampler = job, SimilarLengthSampler(job.data.examples, job.settings)
        self.parts_of_step = 0  # micro-batches of the step that was done last
        super().__init__(**arguments)
        self.model.activation_checkpointing_enable()
        self.model.disable_input_require_grads()  # recomputation does not need it
        kind = transformers.modeling_layers.GradientCheckpointingLayer
        self.layers = [module for module in self.model.modules() if isinstance(module, kind)]
        self.chunk = chunk_of(job.base.config)
        longest = max(len(example.input_ids) for example in job.data.examples)
        self.tokens_at_once = round_up(longest, self.chunk) * self.args.train_batch_size

    def training_step(self, model: nn.Module, inputs: Tensors, *_: Any) -> Tensor:
        """Send a step's examples forward and backward in micro-batches; return the step's loss.

        The division changes only dropout and rounding. If memory runs out, the step is done again
        in smaller ones. model is self.model, or DDP around it; inputs are input_ids, attention_mask
        and labels (examples x tokens). Trainer's own count of targets, which it also hands over,
        is not used: for Gemma 3n and Gemma 4 it makes none.
        """
        model.train()
        inputs = {key: tensor.to(self.args.device) for key, tensor in inputs.items()}
        count = (inputs["labels"][:, 1:] != -100).sum()
        targets = self.accelerator.gather(count).sum()  # of all processes
        while True:
            try:
                return self.backward_in_parts(model, inputs, targets)
            except DoesNotFit as error:
                rows, width = error.args
            lower_tokens_at_once(self, rows, width)
            report("memory", f"out of memory: now {self.tokens_at_once:,} tokens at once")

    def backward_in_parts(self, model: nn.Module, inputs: Tensors, targets: Tensor) -> Tensor:
        """Add a step's gradients, and return its loss; raise DoesNotFit."""
        loss = torch.zeros((), device=self.args.device)
        parts = list(micro_batches(inputs, self.tokens_at_once, self.chunk))
        if needs_logits(model):
            parts = [piece for part in parts for piece in pieces_with_few_targets(part)]
        self.parts_of_step = len(parts)
        for part in parts:
            is_last = part is parts[-1]  # only then do processes exchange gradients
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                loss += self.backward_if_it_fits(model, part, targets)
        return loss

    def needs_checkpointing(self, width: int) -> bool:
        """Return whether a row of this width is too long to keep its activations."""
        return round_up(width, self.chunk) > self.tokens_at_once

    def backward_if_it_fits(self, model: nn.Module, part: Tensors, targets: Tensor | int) -> Tensor:
        """Add a micro-batch's gradients, and return its share of the loss; raise DoesNotFit."""
        for layer in self.layers:
            layer.gradient_checkpointing = self.needs_checkpointing(part["input_ids"].shape[1])
        try:
            loss = token_losses(model, part).sum() / targets
            loss = loss * self.accelerator.num_processes  # DDP takes the mean over the processes
            loss.backward()
            return loss.detach()
        except RuntimeError as error:
            # Several processes must stop: the others would wait for this one's gradients.
            has_others = model is not self.model  # DDP is around it
            if has_others or not is_out_of_memory(error):
                raise
            LOG.info("memory    %s", one_line(error, 300))
        raise DoesNotFit(*part["input_ids"].shape)  # torch's error and its tensors are gone

    def evaluate(self, *_, **__) -> dict[str, float]:
        """Log the held-out loss, a mean over tokens (Trainer's depends on the batches).

        At step 0 the base model is measured. After a signal nothing is logged.
        """
        held_out, stop = self.job.data.held_out, self.job.session.stop
        shard = held_out[self.args.process_index :: self.args.world_size]
        is_base = self.state.global_step == 0
        names = ["eval_loss"]
        if is_base and self.job.settings.START_FROM and not self.job.earlier.checkpoint:
            names = ["start_loss", "eval_loss"]  # of the adapter that training starts from
        metrics = {}
        for name in names:
            is_off = is_base and name == "eval_loss"
            with self.model.disable_adapter() if is_off else contextlib.nullcontext():
                tokens = max(1024, self.tokens_at_once)
                losses = losses_of_replies(self.model, shard, tokens, lambda: stop.signal > 0)
            nats = None if stop.signal else sum(map(sum, losses))
            sums = accelerate.utils.gather_object([nats])
            if None in sums:
                stop.agree()
                return {}
            metrics[name] = sum(sums) / sum(example.targets for example in held_out)
        self.log(metrics)
        self.control.should_evaluate = False
        return metrics

    def floating_point_ops(self, inputs: Tensors) -> int:
        """Return 0; Trainer would walk through all modules at each step."""
        return 0

    def _get_train_sampler(self, train_dataset: Any = None) -> SimilarLengthSampler:
        """Return our order. Trainer's group_by_length has no seed, so it could not be resumed."""
        return self.sampler

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the adapter and its record; Trainer would add a pickle of its arguments."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir, save_embedding_layers=False)
            write_record(self.job, "running", Path(output_dir), self.state.global_step)

    def create_model_card(self, *_, **__) -> None:
        """Write none; TRL writes one per checkpoint."""


class DoesNotFit(Exception):
    """A micro-batch has too many rows or tokens for the memory: rows, width."""


class SimilarLengthSampler:
    """Gives each step examples of similar lengths, which need little padding, in a random order.

    The order depends only on seed, epoch, lengths and step size, so a resumed run keeps it.
    """

    def __init__(self, examples: list[Example], settings: Settings) -> None:
        """Remember the lengths; the epoch is set before each pass."""
        self.lengths = [len(example.input_ids) for example in examples]
        self.size, self.seed, self.epoch = examples_per_step(settings), settings.SEED, 0

    def __len__(self) -> int:
        """Return the number of examples in an epoch."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield the examples' numbers, the incomplete step last (torchrun fills it with others)."""
        shuffler = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        shuffler.shuffle(order)
        whole = len(order) - len(order) % self.size
        # Sorted within blocks of at most 50 steps, so that each epoch groups them differently.
        block = self.size * min(50, math.ceil(len(order) / self.size / 4))
        grouped: list[int] = []
        for begin in range(0, whole, block):
            part = order[begin : min(begin + block, whole)]
            grouped += sorted(part, key=lambda number: self.lengths[number])
        steps = [grouped[begin : begin + self.size] for begin in range(0, whole, self.size)]
        shuffler.shuffle(steps)
        for step in [*steps, order[whole:]]:
            yield from step


def micro_batches(inputs: Tensors, tokens_at_once: int, chunk: int = 1) -> Iterator[Tensors]:
    """Yield a padded step in parts that fit, the longest examples first.

    A step that fits is not divided. Otherwise each part is as wide as its longest example, and
    lengths count as rounded up to a multiple of chunk. With gradient checkpointing,
    CHECKPOINTING_FACTOR times as many tokens go at once.
    """
    lengths = inputs["attention_mask"].sum(1).tolist()
    if len(lengths) * round_up(max(lengths), chunk) <= tokens_at_once:
        yield inputs
        return
    numbers = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    while numbers:
        width = lengths[numbers[0]]
        padded_length, most = round_up(width, chunk), tokens_at_once
        if padded_length > tokens_at_once:
            most *= CHECKPOINTING_FACTOR
        count = max(1, most // padded_length)
        yield {key: value[numbers[:count], :width] for key, value in inputs.items()}
        numbers = numbers[count:]


MOST_TARGETS = 512  # of a row at once, where the loss needs their logits, see needs_logits()


def pieces_with_few_targets(part: Tensors) -> Iterator[Tensors]:
    """Yield a micro-batch once for each MOST_TARGETS targets of its rows.

    The sum of the losses stays the same. What comes before these targets is computed again.
    """
    targets_so_far = (part["labels"] != -100).cumsum(1)
    most = int(targets_so_far.max())
    if most <= MOST_TARGETS:
        yield part
        return
    for first in range(0, most, MOST_TARGETS):
        is_kept = (targets_so_far > first) & (targets_so_far <= first + MOST_TARGETS)
        labels = part["labels"].masked_fill(~is_kept, -100)
        width = labels.shape[1]
        if len(labels) == 1:  # of several rows, so many tokens fit with checkpointing alone
            width = int((labels[0] != -100).nonzero().max()) + 1
        yield {key: value[:, :width] for key, value in {**part, "labels": labels}.items()}


def token_losses(model: nn.Module, inputs: Tensors) -> Tensor:
    """Return -log(probability) of each target token, in nats, and 0 for all others.

    The result has a row for each example and a column for each token but the first. TRL's own loss
    has the same value, but bypasses scaled float16 in the head.
    """
    next_tokens = inputs["labels"][:, 1:]
    is_target = next_tokens != -100
    targets, states = next_tokens[is_target], last_states(model, inputs)
    losses = torch.zeros(next_tokens.shape, device=next_tokens.device)
    if states is None:
        logits = reply_logits(model, inputs).float()
        losses[is_target] = nn.functional.cross_entropy(logits, targets, reduction="none")
    else:
        losses[is_target] = TargetLosses.apply(states, targets, head_of(model))
    return losses


def reply_logits(model: nn.Module, inputs: Tensors) -> Tensor:
    """Return a row of logits for each target token, and none for other tokens.

    With 248,320 tokens in the vocabulary the logits are the largest tensor of all. So the head
    gets only the positions that predict a target token: t for token t + 1. logits_to_keep, usually
    a number, may also be a mask (examples x tokens); the rows it keeps follow one another.
    """
    predicts_target = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    predicts_target[:, :-1] = inputs["labels"][:, 1:] != -100
    return model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        logits_to_keep=predicts_target,
        use_cache=False,
    ).logits


# Heads whose output is not what their model returns: Gemma caps it, Granite divides it. Once this
# was seen, the model is not asked again.
HEADS_WITH_MORE_AFTER_THEM: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def head_of(model: nn.Module) -> nn.Module | None:
    """Return the module that makes logits of the last states, also where DDP wraps the model."""
    is_wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    return (model.module if is_wrapped else model).get_output_embeddings()


def needs_logits(model: nn.Module) -> bool:
    """Return whether the loss needs all logits at once: see last_states(), which finds out."""
    head = head_of(model)
    if head is None or head in HEADS_WITH_MORE_AFTER_THEM:
        return True
    is_trained = any(weight.requires_grad for weight in head.parameters())
    return is_trained and torch.is_grad_enabled()


def last_states(model: nn.Module, inputs: Tensors) -> Tensor | None:
    """Return what the head would get for each target token; None if the loss needs the logits.

    The model runs with a head that returns what it gets. Where the model does not return this very
    tensor as logits, or changes it, more comes after the head, which the loss must not leave out:
    each pass is checked. A head that is trained needs the logits for its own gradient.
    """
    if needs_logits(model):
        return None
    head, given = head_of(model), []

    def forward(states: Tensor) -> Tensor:
        given.append((states, states._version))  # writing into a tensor raises its version
        return states

    own_forward = vars(head).get("forward")  # as use_fp16_matmul() sets it
    head.forward = forward
    try:
        returned = reply_logits(model, inputs)
    finally:
        del head.forward
        if own_forward is not None:
            head.forward = own_forward
    if len(given) == 1 and returned is given[0][0] and returned._version == given[0][1]:
        return returned
    HEADS_WITH_MORE_AFTER_THEM.add(head)
    return None


LOGITS_AT_ONCE = 2**25  # in memory: those of 135 targets of Qwen3.5, with their gradients 0.5 GB


class TargetLosses(torch.autograd.Function):
    """The loss of each target from its last state (targets x width).

    It depends on no other target's state. So its gradient is computed at once, a few targets at a
    time, and no logits are kept for the backward pass.
    """

    @staticmethod
    def forward(context: Any, states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
        """Compute losses and, if states need them, gradients."""
        needs_gradient = context.needs_input_grad[0]
        at_once = max(1, LOGITS_AT_ONCE // len(next(head.parameters())))
        losses, gradients = [], []
        for part, ids in zip(states.split(at_once), targets.split(at_once), strict=True):
            with torch.set_grad_enabled(needs_gradient):
                part = part.detach().requires_grad_(needs_gradient)
                # Not head(part): hooks of the head have run already, in last_states().
                logits = head.forward(part).float()
                loss = nn.functional.cross_entropy(logits, ids, reduction="none")
                gradients += torch.autograd.grad(loss.sum(), part) if needs_gradient else []
            losses.append(loss.detach())
        context.gradient = torch.cat(gradients) if needs_gradient else None
        return torch.cat(losses)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Multiply in float32: 1 / targets must not be rounded to bfloat16 first."""
        product = context.gradient.float() * gradient[:, None]
        return product.to(context.gradient.dtype), None, None


def losses_of_replies(
    model: nn.Module,
    examples: list[Example],
    tokens_at_once: int = 1024,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[list[float]]:
    """Return -log(probability) of each reply, by example, in nats, without dropout.

    tokens_at_once includes padding; it is halved when memory runs out.
    is_stopped is called before each batch; once it is true, the remaining losses are 0.
    """
    order = sorted(range(len(examples)), key=lambda number: len(examples[number].input_ids))
    losses = [[0.0] * len(example.replies) for example in examples]
    was_training = model.training
    model.eval()
    with torch.no_grad(), tqdm(total=len(order), desc="losses", leave=False, disable=None) as bar:
        while order and not is_stopped():
            width = len(examples[order[-1]].input_ids)
            batch = order[-max(1, tokens_at_once // width) :]  # the longest remaining
            inputs = pad([examples[number] for number in batch], model.device)
            try:
                by_token = torch.zeros(len(batch), width - 1, dtype=torch.double)
                pieces = pieces_with_few_targets(inputs) if needs_logits(model) else [inputs]
                for piece in pieces:
                    token_loss = token_losses(model, piece).double().cpu()
                    by_token[:, : token_loss.shape[1]] += token_loss
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    source = examples[batch[0]].source
                    raise UserError(
                        f"{source}: {width:,} tokens do not fit in the GPU's memory; lower "
                        "MAX_SEQ_LEN."
                    ) from error
                tokens_at_once = len(batch) // 2 * width
                continue
            for number, token_loss in zip(batch, by_token, strict=True):
                losses[number] = [  # a reply's first token is predicted by its prompt's last one
                    token_loss[len(reply.prompt_ids) - 1 : len(reply.input_ids) - 1].sum().item()
                    for reply in examples[number].replies
                ]
            order = order[: -len(batch)]
            bar.update(len(batch))
    model.train(was_training)
    return losses


def pad(examples: list[Example], device: torch.device) -> Tensors:
    """Return the tensors of collate() on a device."""
    return {key: tensor.to(device) for key, tensor in collate(rows_of(examples)).items()}


def collate(rows: list[dict[str, list[int]]]) -> Tensors:
    """Return input_ids, labels and attention_mask (rows x tokens), padded on the right."""

    def padded(lists: list[list[int]], value: int) -> Tensor:
        tensors = [torch.tensor(one) for one in lists]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": padded(ids, 0),
        "labels": padded([row["labels"] for row in rows], -100),
        "attention_mask": padded([[1] * len(one) for one in ids], 0),
    }


def rows_of(examples: list[Example]) -> list[dict[str, list[int]]]:
    """Return examples in the form that TRL takes."""
    return [{"input_ids": example.input_ids, "labels": example.labels} for example in examples]


def check_only_lora_is_trained(model: peft.PeftModel, plan: Plan) -> None:
    """Raise UserError unless exactly the planned weights train, in float32: 0.2518 % as shipped."""
    planned = {name: (*shape, torch.float32) for name, shape in plan.trained_shapes.items()}
    trained = {
        name.removeprefix("base_model.model."): (*weight.shape, weight.dtype)
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    count = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    counts = f"{count:,} of {total:,} parameters are trained ({count / total:.4%})"
    if trained != planned or total != plan.all_parameters:
        differences = sorted(trained.items() ^ planned.items(), key=str)[:4]
        raise UserError(
            f"LoRA is not in place as planned: {counts}, and these differ: {differences}. "
            "Fully trained modules need DTYPE float32."
        )
    report("model", f"{counts}, in float32; the rest is frozen")


# ==== MEMORY: how many examples go through the GPU at once
#
# A step has BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS examples, the last step of an epoch the rest.
# tokens_at_once of their tokens go through the GPU at once, activations kept. A longer example uses
# gradient checkpointing, which takes a sixth of the memory and half again the work. Trial passes
# before the first step find the number, which is at most that of a whole step:
# - one row of tokens_at_once tokens, activations kept (several if the model has fewer positions, as
#   GPT-2 may); by bisection, to a tenth. As attention grows with the square of the length,
#   one long row is the worst case for that many tokens;
# - with checkpointing, the longest example, then two, three, ... rows, as wide as so many can be.
# If memory runs out in a step, it is done again with nine tenths of the number; several processes
# stop instead. On a CPU nothing is tried.

CHECKPOINTING_FACTOR = 4  # how many times the tokens go at once with checkpointing


def find_what_fits(trainer: LoraTrainer) -> None:
    """Lower trainer.tokens_at_once until trial passes fit; raise UserError if an example cannot."""
    job = trainer.job
    if job.settings.DEVICE == "cpu":
        return
    free, total = torch.cuda.mem_get_info()
    usable = (free + torch.cuda.memory_reserved()) / total  # what other programs leave
    # This leaves a tenth for fragmentation, and eight bytes per trained weight for AdamW. Under WSL
    # the memory ends about 2 GB before what the driver calls free (WSL 41176).
    for_trials, for_steps = (0.85, 0.9) if IS_WSL else (0.9, 0.97)
    states = 8 * sum(map(math.prod, job.plan.trained_shapes.values())) / total
    torch.cuda.set_per_process_memory_fraction(max(0.0, for_trials * usable - states))
    longest = max(len(example.input_ids) for example in job.data.examples)
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # the passes draw dropout
        trainer.tokens_at_once = most_tokens_that_fit(trainer)
        rows = 1
        while rows <= trainer.args.train_batch_size:
            tokens = CHECKPOINTING_FACTOR * trainer.tokens_at_once // rows
            width = longest if rows == 1 else min(longest, tokens // trainer.chunk * trainer.chunk)
            if trainer.needs_checkpointing(width) and not trial_fits(trainer, rows, width):
                lower_tokens_at_once(trainer, rows, width)
            else:
                rows += 1
    # CUDA's libraries need the rest. A driver that spills into main memory (WSL) must fail.
    torch.cuda.set_per_process_memory_fraction(for_steps * usable)
    torch.cuda.reset_peak_memory_stats()
    report("memory", f"{trainer.tokens_at_once:,} tokens fit; longer rows use checkpointing")


def most_tokens_that_fit(trainer: LoraTrainer) -> int:
    """Return how many tokens fit in a pass that keeps its activations; 0 if not even one chunk."""
    config, tokens = trainer.job.base.config.get_text_config(), trainer.tokens_at_once
    positions = getattr(config, "max_position_embeddings", tokens)  # some models have no limit
    fitting, too_many = 0, 0
    while True:
        trainer.tokens_at_once = tokens
        rows = math.ceil(tokens / positions)
        if trial_fits(trainer, rows, tokens // rows):
            fitting = tokens
        else:
            too_many = tokens
        if too_many - fitting <= max(trainer.chunk, too_many // 10):
            return fitting
        tokens = (fitting + too_many) // 2 // trainer.chunk * trainer.chunk


def trial_fits(trainer: LoraTrainer, rows: int, width: int) -> bool:
    """Return whether rows go forward and backward, with at least as many targets as examples have.

    A row that keeps its activations stands for all examples of a micro-batch.
    """
    examples = trainer.job.data.examples
    ratio = max(example.targets / len(example.input_ids) for example in examples)
    largest = max(example.targets for example in examples)
    if needs_logits(trainer.model):
        largest = min(largest, MOST_TARGETS)
    if not trainer.needs_checkpointing(width):
        largest *= trainer.args.train_batch_size
    targets = min(largest, math.ceil(ratio * width))
    ids = torch.ones(rows, width, dtype=torch.long, device=trainer.args.device)
    labels, mask = ids.clone(), ids.clone()
    labels[:, : width - targets] = -100
    mask[:, -1] = 0  # padding takes extra memory and other kernels
    part = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    trainer.model.train()
    torch.cuda.reset_peak_memory_stats()
    began, fits = time.monotonic(), True
    try:
        trainer.backward_if_it_fits(trainer.model, part, rows * width)
    except DoesNotFit:
        fits = False
    kind = "recomputed" if trainer.needs_checkpointing(width) else "kept"
    gib = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    text = f"{rows} x {width} tokens, {kind}, {targets} targets each: {'fits' if fits else 'full'}"
    peak = f"at most {gib[0]:.2f} GiB allocated and {gib[1]:.2f} reserved"
    LOG.info("memory    %s, %s, %.2f s", text, peak, time.monotonic() - began)
    free_memory(trainer.model)
    return fits


def lower_tokens_at_once(trainer: LoraTrainer, rows: int, width: int) -> None:
    """Lower tokens_at_once after rows x width did not fit; raise UserError for a single row."""
    if rows == 1 and trainer.needs_checkpointing(width):  # a single example cannot be divided
        raise UserError(
            f"An example of {width:,} tokens does not fit in the GPU's memory: lower MAX_SEQ_LEN, "
            "or stop other programs on this GPU."
        )
    free_memory(trainer.model)
    trainer.tokens_at_once = int(0.9 * trainer.tokens_at_once) // trainer.chunk * trainer.chunk


def free_memory(model: nn.Module) -> None:
    """Drop what a pass has left: gradients, and what torch keeps of the GPU's memory."""
    model.zero_grad()
    if torch.cuda.is_initialized():
        gc.collect()
        time.sleep(0.1)  # autograd's thread may hold a failed pass's tensors this long
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether this is the error of torch, cuBLAS, cuDNN or Triton when memory is full."""
    words = "out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
    # On a MIG slice torch fails while it asks who holds the memory (pytorch 112377, 197312).
    words += "|NVML_SUCCESS == r"
    words += "|device not ready" if IS_WSL else ""
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search(words, str(error)))


def chunk_of(config: ModelConfig) -> int:
    """Return 64 for Gated DeltaNet's torch code, which pads rows to multiples of 64; else 1."""
    layer_types = config.get_text_config().to_dict().get("layer_types") or []
    return 64 if "linear_attention" in layer_types and is_kept_out("fla") else 1


def round_up(tokens: int, chunk: int) -> int:
    """Return a number of tokens, rounded up to a multiple of chunk."""
    return math.ceil(tokens / chunk) * chunk


# ==== MODEL: the device, the base model, its tokenizer and its chat template
#
# Only safetensors are loaded, and no model's own code is run. Under torchrun or
# `accelerate launch` each process has a GPU of its own and holds the whole model.


def prepare_device(settings: Settings) -> None:
    """Choose the device; a dry run needs none. Refuse a step that the processes cannot share."""
    use_fla = settings.USE_FLA and not settings.dry_run
    choose_device("cpu" if settings.dry_run else settings.DEVICE, settings.DTYPE, use_fla)
    processes = accelerate.PartialState().num_processes
    if examples_per_step(settings) % processes:
        size = "BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS"
        raise UserError(f"{size} must be divisible by the {processes} processes.")


def choose_device(device: str, dtype: str, use_fla: bool) -> None:
    """Choose the device, and refuse one that does not work.

    This comes before the model's code is imported: transformers uses fla and causal_conv1d
    wherever they import, even if their kernels crash.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ
    if is_launched and {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & os.environ.keys():
        raise UserError("FSDP and DeepSpeed are not supported; use plain torchrun.")
    # Leftover variables would change this run: ACCELERATE_MIXED_PRECISION enables autocast.
    of_launchers = () if is_launched else ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    for name in [*os.environ]:
        if name.startswith("ACCELERATE_") or name in of_launchers:
            del os.environ[name]
    keep_out("causal_conv1d")
    # float16 products are summed in float32, see FP16 MATMUL.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers ask for TF32
    # torch 2.9 prefers it on an H100, where it reads past its inputs (pytorch 169849, 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    fault = "it needs a GPU"
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        accelerate.PartialState(cpu=True)
    else:
        check_gpu(dtype, is_launched)
        fault = fault_of_fla()
    if fault or not use_fla:
        keep_out("fla")
    if fault and use_fla:
        report("fla", f"{fault}; torch's code takes its place")


def keep_out(package: str) -> None:
    """Have every import of a package fail, as if it were not installed."""
    sys.modules[package] = None


def is_kept_out(package: str) -> bool:
    """Return whether keep_out() was called for a package."""
    return package in sys.modules and sys.modules[package] is None


def check_gpu(dtype: str, is_launched: bool) -> None:
    """Choose one GPU, and try a matmul."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    try:
        torch.cuda.init()  # says why there is no GPU
        accelerate.PartialState()  # gives each process of a launch its own GPU
        ones = torch.ones(8, 8, device="cuda", dtype=getattr(torch, dtype))
        (ones @ ones).sum().item()  # a torch without this GPU's kernels says so only now
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"DEVICE cuda: torch {torch.__version__} cannot use GPU {visible} ({one_line(error)}). "
            "It takes an NVIDIA GPU, V100 or newer (a V100 with driver 525 to 580, others with 525 "
            "or newer), or a small model and --device cpu. If there is one, the environment "
            "variable PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False may help."
        ) from error
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    report("device", f"{torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GiB are free")


def fault_of_fla() -> str:
    """Return why flash-linear-attention cannot be used on this GPU, or ""."""
    # On Hopper gradients were wrong below 0.5 (fla issue 640), and up to 0.6.0 it cannot train with
    # Triton 3.4 to 3.7.0; on Blackwell vLLM's copies were silently wrong (vllm issue 36414).
    if torch.cuda.get_device_capability()[0] != 8:
        return "it is used only on GPUs of capability 8.0 to 8.9"
    if importlib.util.find_spec("fla") is None:
        return "it is not installed (pip install flash-linear-attention)"
    return ""


def is_main_process() -> bool:
    """Return whether this is the process that prints, decides and writes."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


def request_of(settings: Settings) -> BaseRequest:
    """Return which base the settings ask for.

    The newest job here with this model and revision fixes the commit, even if the branch has moved.
    """
    wanted, commit = (settings.MODEL_NAME, settings.MODEL_REVISION), ""
    for identity in jobs_in(Path(settings.OUTPUT_DIR)).values():
        if (identity.get("MODEL_NAME"), identity.get("MODEL_REVISION")) == wanted:
            commit = commit or identity["commit"]
    how = (settings.CHAT_TEMPLATE, settings.ENABLE_THINKING, settings.DTYPE, settings.DEVICE)
    return BaseRequest(*wanted, *how, settings.MATMUL, commit)


def read_base(request: BaseRequest, tokenizer: Any = None) -> Base:
    """Read all but the weights: commit, configuration, and tokenizer if none is given."""
    name, template = request.name, request.chat_template
    try:
        commit = commit_of(request)
        revision = commit or "main"
        options = {"revision": revision, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(name, **options)
        tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(name, **options)
        ends = [tokenizer.eos_token_id]
        with contextlib.suppress(OSError):  # not every model has one
            # Gemma's tokenizer ends with <eos>, but its turns with <end_of_turn>.
            generation = transformers.GenerationConfig.from_pretrained(name, revision=revision)
            end = generation.eos_token_id
            ends += end if isinstance(end, list) else [end]
    except (OSError, ValueError, HTTPError, RevisionResolutionError) as error:
        advice = "check the name, the folder or the network"
        if GatedRepoError in (type(error), type(error.__cause__)):
            advice = f"accept its licence at https://huggingface.co/{name}, then `hf auth login`"
        raise UserError(f"{name} cannot be read ({one_line(error)}); {advice}.") from error
    stop_ids = [token for token in dict.fromkeys(ends) if token is not None]
    if "quantization_config" in config.to_dict():
        raise UserError(f"{name} is quantized, which is unsupported; use the original.")
    if template == "one_pass":
        tokenizer.chat_template = one_pass_template(tokenizer)
    elif template:
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise UserError(
            f"CHAT_TEMPLATE {template!r} gives no chat template for {name}; use another one, such "
            'as a file, or "" for the model\'s own.'
        )
    if not stop_ids:
        raise UserError(f"{name} names no stop token; add eos_token_id to generation_config.json.")
    if commit:
        report("model", f"{name}, commit {commit}; --model_revision changes it")
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return Base(request, config, commit, tokenizer, stop_ids, special, request.enable_thinking)


def one_pass_template(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """Return the chat template with which TRL trains this model, or "" if TRL knows none."""
    try:
        template = trl.get_training_chat_template(tokenizer)
        template = template or tokenizer.get_chat_template()  # None: the model's own will do
    except ValueError:  # TRL does not know the model's own template
        return ""
    # These tags mark what TRL would train on; no server knows them.
    return re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)


def commit_of(request: BaseRequest) -> str:
    """Return the model's commit on the hub, or "" for a local folder."""
    if Path(request.name).is_dir():
        return ""
    if request.commit:
        return request.commit
    return huggingface_hub.resolve_revision(request.name, revision=request.revision).resolved


def load_model(name: str, commit: str, dtype: str, device: str) -> Model:
    """Return the base model (for Qwen3.5, the text part), loaded straight onto the device.

    Never give SFTTrainer the model's name: it would take Qwen3_5ForConditionalGeneration, the class
    in config.json, whose vision part would be loaded, too, and whose modules have other names.
    """
    report("model", f"loading the weights of {name}")
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            revision=commit or "main",
            dtype=dtype,
            device_map={"": torch.cuda.current_device()} if device == "cuda" else None,
            trust_remote_code=False,
            use_safetensors=True,  # a pickle could run code
            use_kernels=False,  # so could kernels, which transformers 5.25 takes from the hub
            output_loading_info=True,
        )
    except OSError as error:
        raise UserError(
            f"The weights of {name} cannot be read ({one_line(error)}). Only safetensors files "
            "are, as a pickle (.bin) could run code."
        ) from error
    except RuntimeError as error:  # transformers may report full memory as a conversion error
        is_full = device == "cuda" and torch.cuda.mem_get_info()[0] < 2**30
        if is_full or is_out_of_memory(error):
            raise UserError(f"{name} is too large for the GPU's free memory.") from error
        raise
    if info["missing_keys"]:  # transformers would fill them with random numbers
        raise UserError(f"{name}: weights are missing: {sorted(info['missing_keys'])[:3]} ...")
    compute_delta_rule_in_pieces(model)
    return model


DELTA_RULE = "torch_chunk_gated_delta_rule"  # transformers' torch code for Gated DeltaNet
TOKENS_OF_A_PIECE = 512  # a multiple of the rule's own chunks of 64


@dataclass(frozen=True)
class DeltaRuleInPieces:
    """The same rule, called on a few hundred tokens of a row at a time, with its state handed on.

    In the rule's loop over chunks each select and each write copies a gradient as large as its
    whole row, so the backward pass takes the square of the length. In pieces it is linear: on a
    CPU 6,144 tokens took 5.5 s in place of 48 s. Outputs and gradients are the same to the bit; in
    float32 to rounding, where a row is no multiple of 64 tokens.
    """

    whole_rule: Callable
    tokens: int

    def __call__(
        self,
        *rows: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        **options,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute as the rule does, called as in a layer's forward(): rows are query, key, value.

        They have the shape (batch, tokens, heads, width), g and beta (batch, tokens, heads).
        """
        rule = functools.partial(self.whole_rule, **options)
        if g.shape[1] <= self.tokens:
            wanted = {"initial_state": initial_state, "output_final_state": output_final_state}
            return rule(*rows, g=g, beta=beta, **wanted)
        outputs, state = [], initial_state
        pieces = [x.split(self.tokens, 1) for x in (*rows, g, beta)]
        for *piece, decay, strength in zip(*pieces, strict=True):
            output, state = rule(
                *piece, g=decay, beta=strength, initial_state=state, output_final_state=True
            )
            outputs.append(output)
        return torch.cat(outputs, 1), state if output_final_state else None


def fault_of_pieces(whole_rule: Callable) -> str:
    """Return why a rule is not to be computed in pieces, or "": both ways are tried on 130 tokens.

    A release of transformers may change the function, and a state that is handed on wrongly would
    spoil the gradients of long rows without an error.
    """
    draw = torch.Generator().manual_seed(0)
    sizes = [(2, 16), (2, 16), (2, 8), (2,), (2,)]  # heads and their width
    query, key, value, decay, strength = (torch.randn(1, 130, *x, generator=draw) for x in sizes)
    inputs = [query, key, value, -0.1 * decay.exp(), strength.sigmoid()]
    inputs = [x.requires_grad_() for x in inputs]
    results = []
    for rule in (whole_rule, DeltaRuleInPieces(whole_rule, 64)):
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        try:
            output, state = rule(*inputs[:3], g=inputs[3], beta=inputs[4], **options)
            loss = output.square().sum() + state.square().sum()
            results.append([output, state, *torch.autograd.grad(loss, inputs)])
        except Exception as error:  # whatever it is, whole rows are still computed
            return f"cannot be tried in pieces ({type(error).__name__}: {one_line(error)})"
    names = ["outputs", "state", *["gradients"] * len(inputs)]
    for name, whole, in_pieces in zip(names, *results, strict=True):
        if not torch.dist(whole, in_pieces) <= 1e-5 * whole.norm():  # NaN is not, either
            return f"has other {name} in pieces"
    return ""


def compute_delta_rule_in_pieces(model: Model) -> None:
    """Have the model's Gated DeltaNet layers compute in pieces, unless fla's kernels do it."""
    if chunk_of(model.config) == 1:
        return
    module = sys.modules[type(model).__module__]
    function = getattr(module, DELTA_RULE, None)  # a layer's forward() calls it by this name
    if function is None:
        what = f"{type(model).__name__} has linear attention, but no {DELTA_RULE}"
        report("deltanet", f"{what}: whole rows are computed, and long ones may take long")
        return
    whole_rule = getattr(function, "whole_rule", function)  # in place since an earlier model
    if fault := fault_of_pieces(whole_rule):
        what = f"{DELTA_RULE} of transformers {transformers.__version__} {fault}"
        ways = "The transformers of requirements.txt has one that is computed in pieces"
        report("deltanet", f"{what}: whole rows are computed, and long ones take longer. {ways}")
        return
    setattr(module, DELTA_RULE, DeltaRuleInPieces(whole_rule, TOKENS_OF_A_PIECE))
    # fault_of_fla() says why other GPUs have no choice.
    if torch.cuda.is_initialized() and torch.cuda.get_device_capability()[0] == 8:
        ways = "flash-linear-attention may be faster: install it, and give --use_fla true"
        report("deltanet", f"Gated DeltaNet runs torch's code; {ways}")
    LOG.info("deltanet  %s is called on %d tokens at a time", DELTA_RULE, TOKENS_OF_A_PIECE)


# ==== DATA: reading the conversations, checking every line, and holding a part out
#
# A file holds one conversation per line (JSONL), or all in one JSON array:
#     {"prompt": [messages], "completion": [one message]}     teaches the completion (or 2 strings)
#     {"messages": [messages]}                                teaches each reply; see REPLIES
#     {"conversations": [{"from": "human", "value": ...}]}    ShareGPT: as "messages"
#     {"instruction": ..., "input": ..., "output": ...}       Alpaca: teaches the output
# A message has a "role" and a "content", and no other keys. One system message may come first or be
# the line's key "system"; then user and assistant take turns, and a reply comes last. Other keys of
# a line are counted and ignored, but LOST_KEYS are refused. In ShareGPT dumps a greeting before the
# first question and a question at the end are left out. All formats become "messages" first; then
# there is one set of checks, and every bad line is named.

FORMATS = (
    'write {"prompt": [...], "completion": [one message]}, {"messages": [...]}, '
    '{"conversations": [...]} or {"instruction": ..., "output": ...}; see docs/data.md'
)
FORMAT_KEYS = ("messages", "conversations", "prompt completion", "instruction output")
# Keys of other tools and of the shipped lines, which are not reported as ignored.
KNOWN_KEYS = {"system", "id", "kind", "topic", "country", "checks", "counterpart", "rejected"}
# These change the prompt, or belong to it.
LOST_KEYS = ("tools", "functions", "history", "system_prompt", "context")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
THOUGHTS = re.compile(r"\s*<think>.*?</think>\s*\S", re.DOTALL)  # and one character after
FEWEST_HELD_OUT = 20  # conversations; the mean over fewer says little
SHIPPED = {  # SHA-256 of the files in data/
    "train": "e1d64a0d673c503a3be15ab5c96ba63c06ba359329ddaf01784a211f2b875349",
    "held_out": "6c3a85a4497c83c65040d1567df2143fab4a1215b2039808c0f7728b3106f1b7",
}


def read_data(settings: Settings, base: Base) -> Data:
    """Read, check and render all conversations; raise UserError with every fault."""
    problems: list[str] = []

    def read(path: str) -> list[Conversation]:
        return read_conversations(path, settings.REPLIES, problems, settings.ENABLE_THINKING)

    to_learn, to_hold_out, lines = read(settings.TRAIN_FILE), [], ""
    eval_file, percent = settings.EVAL_FILE, percent_of(settings.EVAL_FILE)
    if percent and not problems:
        to_learn, to_hold_out = hold_out(to_learn, percent)
        rows = {conversation.source: conversation.row for conversation in to_hold_out}
        lines = "".join(f"{json.dumps(row)}\n" for row in rows.values())
        eval_file = str(Path(settings.OUTPUT_DIR, "held_out.jsonl"))
    elif eval_file and not percent:
        to_hold_out = read(eval_file)
    examples = encode(to_learn, base, settings.MAX_SEQ_LEN, problems, "training")
    held_out = encode(to_hold_out, base, settings.MAX_SEQ_LEN, problems)
    if problems:
        raise UserError(f"{problems_as_text(problems)}\nNothing was trained.")
    learned = learned_hashes(examples, settings)
    leaked = [reply.source for reply in held_out if prompt_hash(reply.messages[:-1]) in learned]
    if leaked:
        report("warning", f"{len(leaked):,} held-out prompts are trained on, such as {leaked[0]}")
    check_joining(examples, base, settings)
    examples, held_out = join_replies(examples), join_replies(held_out)
    facts = {
        "train": facts_of(settings.TRAIN_FILE, examples),
        "held_out": facts_of(eval_file, held_out, lines) if held_out else None,
    }
    shipped = [name for name in facts if facts[name] and facts[name]["sha256"] == SHIPPED[name]]
    if shipped == ["held_out"]:
        report("warning", 'EVAL_FILE is still the shipped one; "10%" holds out a tenth of yours')
    return Data(examples, held_out, facts, lines)


def check_joining(replies: list[Example], base: Base, settings: Settings) -> None:
    """Print the cost if the chat template keeps a dialogue's replies from sharing a row."""
    lengths = {reply.source: len(reply.input_ids) for reply in replies}  # to the last reply
    needed = sum(lengths.values())
    tokens = sum(len(example.input_ids) for example in join_replies(replies))
    if tokens <= 1.5 * needed:
        return
    if settings.CHAT_TEMPLATE == "one_pass":
        raise UserError(
            f"CHAT_TEMPLATE one_pass joins too few replies of {settings.MODEL_NAME}: "
            f"{tokens / needed:.1f} times the dialogues' tokens remain."
        )
    may_join = one_pass_template(base.tokenizer) not in ("", base.tokenizer.get_chat_template())
    advice = "; --chat_template one_pass trains a dialogue in one pass" if may_join else ""
    cost = f"{tokens / needed:.1f} times the tokens: {tokens:,} in place of {needed:,}"
    report("slower", f"{cost}, as the chat template changes earlier replies{advice}")


def learned_hashes(examples: list[Example], settings: Settings) -> set[str]:
    """Return the hashes of the prompts that an adapter has learned to reply to."""
    replies = [reply for example in examples for reply in example.replies]
    hashes = {prompt_hash(reply.messages[:-1]) for reply in replies}
    path = Path(settings.START_FROM, "learned.txt")
    if settings.START_FROM and path.is_file():
        hashes |= {*path.read_text(encoding="utf-8").split()}
    return hashes


def facts_of(path: str, examples: list[Example], lines: str = "") -> Facts:
    """Return what the records say about a file, which may not exist yet."""
    return {
        "file": path,
        "path": str(Path(path).resolve()),
        "sha256": hashlib.sha256(lines.encode()).hexdigest() if lines else file_sha256(Path(path)),
        "dialogues": len({example.source for example in examples}),
        "examples": len(examples),
        "replies": sum(len(example.replies) for example in examples),
        "tokens": sum(len(example.input_ids) for example in examples),
        "targets": sum(example.targets for example in examples),
    }


def read_conversations(
    path: str, replies: str, problems: list[str], thinking: bool = False, takes_pairs: bool = False
) -> list[Conversation]:
    """Return a conversation for each reply that a file teaches.

    What is wrong with a line is added to problems, as "file:line: ...". Raises UserError for a file
    that cannot be read. With thinking each reply must have its thoughts; with takes_pairs "chosen"
    is read as "completion".
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}; in {Path.cwd()}).") from error
    conversations, unpaired, ignored = [], 0, Counter()
    for source, entry in entries_of(content, path).items():
        try:
            line = parse_line(entry)
            if takes_pairs and "chosen" in line and "completion" not in line:
                line["completion"] = line.pop("chosen")
            messages, teaches_one, left_out = messages_of(line)
            check_messages(messages, thinking)
            places = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
            if teaches_one or replies == "last":
                places = places[-1:]
            for place in places if thinking else []:
                if not THOUGHTS.match(messages[place]["content"]):
                    raise ValueError(f"message {place + 1} must begin with <think>...</think>")
        except ValueError as error:
            problems.append(f"{source}: {one_line(error, 400)}")
            continue
        unpaired += left_out
        ignored.update(line.keys() - KNOWN_KEYS)
        row = json.loads(entry.decode("utf-8-sig"))  # with its nulls
        conversations += [Conversation(source, messages[: place + 1], row) for place in places]
    if unpaired:
        report("left out", f"{path}: {unpaired:,} greetings and last questions without a reply")
    counts = Counter(short_hash(each.messages) for each in conversations)
    if copies := sum(counts.values()) - len(counts):
        report("data", f"{path}: {copies:,} replies are copies of an earlier one with its prompt")
    if ignored:
        keys = [f"{key!r} in {count:,}" for key, count in ignored.most_common()]
        report("ignored", f"{path}: these keys: {join_limited(keys, 5, ', ')}")
    return conversations


def entries_of(content: bytes, path: str) -> dict[str, bytes]:
    """Return {place: JSON} for each nonblank line or array entry."""
    lines, place = content.split(b"\n"), ":"
    if re.match(rb"\[|{\s*\n", content.removeprefix(b"\xef\xbb\xbf").lstrip()):
        try:
            rows = json.loads(content.decode("utf-8-sig"), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON: {one_line(error)}; {FORMATS}") from error
        if not isinstance(rows, list):
            keys = ", ".join(rows)
            raise UserError(f"{path} is one JSON object ({keys}); save only its list; {FORMATS}.")
        lines, place = [json.dumps(row).encode() for row in rows], ", entry "
    entries = {f"{path}{place}{number}": line for number, line in enumerate(lines, 1)}
    entries = {where: line for where, line in entries.items() if line.strip()}
    if not entries:
        raise UserError(f"{path} holds no conversations; {FORMATS}.")
    return entries


def unique_keys(pairs: list[tuple[str, Any]]) -> Facts:
    """Return a JSON object; raise ValueError if a key occurs twice."""
    if len(dict(pairs)) < len(pairs):  # json keeps the last
        raise ValueError(f"a key occurs twice: {', '.join(key for key, _ in pairs)}")
    return dict(pairs)


def parse_line(text: bytes) -> Facts:
    """Return a line's JSON object without its nulls; raise ValueError in plain words."""
    try:
        line = text.decode("utf-8-sig").strip()  # concatenated files may hold several BOMs
    except UnicodeDecodeError as error:
        raise ValueError("this is not UTF-8; save the file as UTF-8") from error
    if not line.startswith("{"):  # such as CSV
        raise ValueError(f"a line must be one JSON object; {FORMATS}")

    def without_nulls(pairs: list[tuple[str, Any]]) -> Facts:
        return {key: value for key, value in unique_keys(pairs).items() if value is not None}

    try:
        return json.loads(line, object_pairs_hook=without_nulls)
    except (ValueError, RecursionError) as error:
        hint = "" if line.endswith("}") else "; write each conversation on one line"
        raise ValueError(f"this is not JSON: {one_line(error)}{hint}") from error


def messages_of(row: Facts) -> tuple[list[Any], bool, int]:
    """Return a line's unchecked messages, whether it teaches one reply, and how many it drops."""
    if "chosen" in row:
        raise ValueError('rename "chosen" to "completion"; nothing is trained on "rejected"')
    formats = [keys.split() for keys in FORMAT_KEYS if row.keys() >= {*keys.split()}]
    if len(formats) != 1:
        present = [key for keys in formats for key in keys] or list(row)[:5]
        raise ValueError(f"the line has {', '.join(present) or 'nothing'}; {FORMATS}")
    lost = [key for key in LOST_KEYS if row.get(key)]
    if lost:
        raise ValueError(f"the key {lost[0]!r} is not supported, and would be lost")
    keys = formats[0]
    messages, reply = row[keys[0]], row[keys[-1]]
    for key in keys:  # what is left in the line was not read
        del row[key]
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if len(keys) == 1:
        if not isinstance(messages, list):
            raise ValueError("a conversation must be a list of messages")
        left_out = 0
        if "conversations" in keys:
            messages, left_out = messages_of_sharegpt(messages)
        return system + messages, False, left_out
    if "instruction" in keys:
        parts = [messages, row.pop("input", "")]
        messages = "\n".join(parts).strip() if {*map(type, parts)} == {str} else None
    if isinstance(messages, str) and isinstance(reply, str):
        messages = [{"role": "user", "content": messages}]
        reply = [{"role": "assistant", "content": reply}]
    if not (isinstance(messages, list) and isinstance(reply, list) and len(reply) == 1):
        raise ValueError("give a list of messages and one reply, or two strings")
    return system + messages + reply, True, 0


def messages_of_sharegpt(turns: list[Any]) -> tuple[list[Any], int]:
    """Return turns as messages; also how many greetings and unanswered questions were dropped."""
    messages = []
    for turn in turns:
        if isinstance(turn, dict) and turn.keys() >= {"from", "value"}:
            speaker, value = turn.pop("from"), turn.pop("value")
            role = SHAREGPT_ROLES.get(str(speaker), speaker)
            turn = {**turn, "role": role, "content": value}
        messages.append(turn)
    roles = [message.get("role") if isinstance(message, dict) else "" for message in messages]
    left_out, begin = 0, roles[:1].count("system")
    for end, role in ((begin, "assistant"), (-1, "user")):
        while len(roles) > begin and roles[end] == role:
            del roles[end], messages[end]
            left_out += 1
    return messages, left_out


def check_messages(messages: list[Any], thinking: bool = False) -> None:
    """Raise ValueError unless the messages are a conversation that ends with a reply."""
    for number, message in enumerate(messages, 1):
        keys = {*message} if isinstance(message, dict) else set()
        if "role" in keys and (unread := sorted(keys - {"role", "content"})):  # such as tool_calls
            raise ValueError(f"message {number} has the key {unread[0]!r}, which is not supported")
        if not keys >= {"role", "content"}:
            raise ValueError(f'message {number} lacks "role" or "content": {one_line(message, 60)}')
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {number}: role {role!r} is not system, user or assistant")
        if not isinstance(content, str) or not content.strip():
            given = one_line(repr(content), 60)
            raise ValueError(f"message {number}: content must be text, but is {given}")
        if re.search("[\ud800-\udfff]", content):
            raise ValueError(f"message {number} has half a character, such as a lone \\ud83d")
        if role == "assistant" and re.search("</?think>", content) and not thinking:
            raise ValueError(f"message {number} has a <think> tag, but thinking is off; remove it")
    turns = [message["role"] for message in messages]
    if turns[:1] == ["system"]:
        del turns[0]
    wanted = "the roles must be [system,] user, assistant, ..., with a reply at the end"
    if not turns:
        raise ValueError(f"{wanted}, but there are no messages")
    for role, next_role in zip(["assistant", *turns], turns, strict=False):
        if role == next_role or next_role == "system":
            after = f"after one of {role}" if turns[0] == "user" else "first"
            raise ValueError(f"{wanted}, but a message of {next_role} comes {after}")
    if turns[-1] == "user":
        raise ValueError("the last message is the user's; remove it, or add the reply")


def problems_as_text(problems: list[str]) -> str:
    """Return each problem once, with the first lines that have it and how many more there are."""
    places: dict[str, list[str]] = defaultdict(list)
    for problem in dict.fromkeys(problems):  # each reply of a dialogue may have the same one
        place, _, text = problem.partition(": ")
        places[text].append(place)
    lines = [f"{join_limited(where, 3, ', ')}: {text}" for text, where in places.items()]
    return join_limited(lines, 20, "\n")


def prompt_hash(messages: Messages) -> str:
    """Return a hash of what user and assistant say, ignoring spaces and the system message."""
    turns = [message for message in messages if message["role"] != "system"]
    return short_hash([(turn["role"], turn["content"].split()) for turn in turns])


def hold_out(
    conversations: list[Conversation], percent: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Return what is trained on, and what is held out: this percentage of conversations.

    Those that begin alike stay together; a group of more than a twentieth of the file is never held
    out. A hash of their beginnings decides, regardless of SEED and order.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for conversation in conversations:
        size = 2 if conversation.messages[0]["role"] == "system" else 1
        beginning = [message["content"].split() for message in conversation.messages[:size]]
        groups[short_hash(["held out", beginning])].add(conversation.source)
    count = sum(map(len, groups.values()))
    wanted = max(FEWEST_HELD_OUT, math.ceil(count * percent / 100))
    chosen: set[str] = set()
    for beginning in sorted(groups):  # hashes, so the order is random
        if len(chosen) < wanted and len(groups[beginning]) <= count / 20:
            chosen |= groups[beginning]
    held_out = f"{len(chosen):,} of {count:,} conversations"
    if min(len(chosen), count - len(chosen)) < FEWEST_HELD_OUT:
        raise UserError(
            f'EVAL_FILE "{percent}%" holds out {held_out} (those that begin alike stay together); '
            f"{FEWEST_HELD_OUT} are needed on each side."
        )
    report("held out", f"{held_out} (at least {FEWEST_HELD_OUT}), by a hash of how they begin")
    train = [conversation for conversation in conversations if conversation.source not in chosen]
    return train, [conversation for conversation in conversations if conversation.source in chosen]


# ==== TOKENS: what the model sees, and which tokens are targets
#
# A conversation is rendered by the model's chat template, as a server renders it. The whole must
# begin with the prompt, generation prompt included; what follows, up to the token that ends the
# turn, is the reply. Examples longer than MAX_SEQ_LEN are left out, never cut (without its end a
# reply would teach the model not to stop); if more than a tenth are too long, the run ends.
#
# One row trains several replies of a dialogue where each prompt begins with the tokens before it.
# With Qwen3.5's own template none does, as earlier replies lose their think block. CHAT_TEMPLATE
# "one_pass" is the one that TRL keeps for training such models; the server must also use it.


def encode(
    conversations: list[Conversation],
    base: Base,
    most_tokens: int,
    problems: list[str],
    which: str = "held-out",
) -> list[Example]:
    """Return an example for each conversation that fits; add what is wrong to problems."""
    examples = []
    for conversation in tqdm(conversations, "rendering", leave=False, disable=None):
        try:
            prompt_ids, reply_ids = render(conversation.messages, base)
        except ValueError as error:
            problems.append(f"{conversation.source}: {error}")
        else:
            fields = vars(conversation) | {"prompt_ids": prompt_ids, "reply_ids": reply_ids}
            examples.append(Example(**fields))
    too_long = [example.source for example in examples if len(example.input_ids) > most_tokens]
    if too_long:
        lengths = sorted(len(example.input_ids) for example in examples)
        nine_tenths = lengths[-1 - len(lengths) // 10]
        problem = (
            f"{len(too_long):,} of {len(conversations):,} {which} examples are longer than "
            f"MAX_SEQ_LEN {most_tokens}; {nine_tenths} keeps nine tenths, and {lengths[-1]} all"
        )
        if len(too_long) > len(conversations) / 10:
            problems.append(f"{too_long[0]}: {problem}")
        else:
            report("left out", f"{problem}\n{join_limited([*dict.fromkeys(too_long)], 5, ', ')}")
    return [example for example in examples if len(example.input_ids) <= most_tokens]


def render(messages: Messages, base: Base) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt and of the reply, or raise ValueError.

    No loss shows these faults: text that no server would render, or a reply without its end.
    """
    contents = "\n".join(message["content"] for message in messages)
    for token in base.special_tokens:
        if token in contents:
            raise ValueError(f"the text contains the special token {token}; reword or remove it")
    apply, thinking = base.tokenizer.apply_chat_template, base.enable_thinking
    options = {"tokenize": False, "enable_thinking": thinking}
    try:
        prompt = apply(messages[:-1], add_generation_prompt=True, **options)
        whole = apply(messages, **options)
    except (jinja2.TemplateError, ArithmeticError, TypeError) as error:
        raise ValueError(f"the chat template refuses this ({one_line(error)})") from error
    for message in messages:
        thoughts, _, spoken = message["content"].rpartition("</think>")
        is_trained = thinking and message is messages[-1]  # earlier thoughts may be left out
        needed = [spoken, thoughts.partition("<think>")[2] if is_trained else ""]
        if not all(part.strip() in whole for part in needed):
            raise ValueError(f"the chat template leaves out what the {message['role']} says")
    prompt_ids = base.tokenizer(prompt, add_special_tokens=False).input_ids
    ids = base.tokenizer(whole, add_special_tokens=False).input_ids
    reply_ids = ids[len(prompt_ids) :]
    if prompt_ids + reply_ids != ids:
        raise ValueError(
            "the chat template renders the prompt differently once the reply follows, so training "
            "would differ from serving; use another model, or CHAT_TEMPLATE"
        )
    ends = [place for place, token in enumerate(reply_ids, 1) if token in base.stop_ids]
    if not ends:
        raise ValueError(
            "the chat template does not end the reply with a stop token; add its end-of-turn token "
            "to generation_config.json"
        )
    return prompt_ids, reply_ids[: ends[0]]  # without the newline that follows it


def join_replies(replies: list[Example]) -> list[Example]:
    """Return examples in which one row trains several replies of a dialogue, where that is exact.

    It is exact if a prompt begins with the very tokens of the example before it: as no token
    depends on a later one, losses and gradients are those of the replies one by one.
    """
    joined: list[Example] = []
    for reply in replies:
        if joined and joined[-1].source == reply.source:
            continues = reply.prompt_ids[: len(joined[-1].input_ids)] == joined[-1].input_ids
            if continues:
                reply = replace(reply, earlier_replies=joined.pop().replies)
        joined.append(reply)
    return joined


# ==== PLAN: which matrices are trained, in how many steps, what TRL is told, and what is a new job
#
# Before any weights are loaded, PEFT puts LoRA into a copy of the model on the meta device. A
# misspelt module, such as q_projj, ends the run here; PEFT would ignore it as long as another one
# exists. With 1,000 examples the settings as shipped give ceil(1000 / 4) x 3 = 750 steps.

# These change W, so that the adapter fits only this run's copy, or (eva) need data to begin with,
# else PEFT silently uses plain LoRA.
UNSUPPORTED_METHODS = ("pissa", "olora", "loftq", "corda", "lora_ga", "eva")
MAY_CHANGE = {  # within a job, if the tokens and the examples per step stay the same
    "DEVICE", "OUTPUT_DIR", "LOGGING_STEPS", "SAVE_STEPS", "EVAL_STEPS", "FINAL_LORA", "REPORT_TO",
    "MATMUL", "USE_FLA", "TRAIN_FILE", "EVAL_FILE", "REPLIES", "MAX_SEQ_LEN", "BATCH_SIZE",
    "GRADIENT_ACCUMULATION_STEPS", "CHAT_TEMPLATE", "START_FROM",
}  # fmt: skip
# Where a job with steps behind it differs in one of these alone, the run ends and lists the
# choices, since losses of before and after could not be compared.
HELD_OUT = "tokens of EVAL_FILE"
CODE = "code"


def make_plan(settings: Settings, base: Base, data: Data) -> Plan:
    """Put LoRA into a model on the meta device; check what it would train, and count."""
    lora = peft.LoraConfig(**lora_fields(settings))
    method = str(lora.init_lora_weights).lower()
    if method.startswith(UNSUPPORTED_METHODS) or lora.bias != "none":
        fields = f"init_lora_weights={method!r}, bias={lora.bias!r}"
        raise UserError(f"lora_fields(): {fields} are not supported; remove them.")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(base.config, trust_remote_code=False)
    refuse_unknown_modules(lora, model)
    peft.inject_adapter_in_model(lora, model)
    if getattr(base.config.get_text_config(), "router_aux_loss_coef", 0.0):
        report("warning", "the experts' routers are trained without their auxiliary loss")
    if isinstance(model.get_output_embeddings(), peft.tuners.lora.LoraLayer):
        raise UserError(
            "LORA_TARGET_MODULES: the head of the model (lm_head) cannot have LoRA; remove it, or "
            'train it whole with modules_to_save=["lm_head"].'
        )
    weights = dict(model.named_parameters())
    count = sum(weight.numel() for weight in weights.values())
    shapes = {name: tuple(w.shape) for name, w in weights.items() if w.requires_grad}
    if settings.START_FROM:
        check_start(settings, base, lora, model)
    table = table_of_modules(model, sum(map(math.prod, shapes.values())), count)
    steps_per_epoch = math.ceil(len(data.examples) / examples_per_step(settings))
    steps = steps_per_epoch * settings.NUM_EPOCHS
    steps = min(steps, settings.MAX_STEPS or steps)
    editable, fixed = training_fields(settings, steps), fixed_fields(settings, base, steps)
    identity = identity_of(settings, base, data, editable)
    trained = {name: value for name, value in identity.items() if name not in (HELD_OUT, CODE)}
    folder = Path(settings.OUTPUT_DIR, "checkpoints", short_hash(trained))
    try:
        training = trl.SFTConfig(output_dir=str(folder), **editable, **fixed)
    except TypeError as error:  # a field that does not exist, or is in both
        raise UserError(f"training_fields(): {error}; see fixed_fields() and SETTINGS.") from error
    return Plan(shapes, count, table, steps_per_epoch, steps, training, identity, folder)


def refuse_unknown_modules(config: peft.LoraConfig, model: nn.Module) -> None:
    """Raise UserError if a name matches no module; PEFT is silent if another name matches."""
    paths = {f".{path}": module for path, module in model.named_modules()}
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)  # the latter in GPT-2
    linear = [path for path, module in paths.items() if isinstance(module, kinds)]
    known = sorted({path.rpartition(".")[2] for path in linear})
    names = {"rank_pattern": [*config.rank_pattern], "alpha_pattern": [*config.alpha_pattern]}
    if not isinstance(config.target_modules, str):
        # Not "all-linear" or a regular expression; PEFT raises if that matches nothing.
        names["LORA_TARGET_MODULES"] = sorted(config.target_modules)
    for where, patterns in names.items():
        missing = []
        for name in patterns:  # the keys of rank_pattern and alpha_pattern are regular expressions
            wanted = re.escape(name) if where == "LORA_TARGET_MODULES" else name
            if not any(re.search(rf"\.(?:{wanted})$", path) for path in paths):
                missing.append(name)
        if missing:
            close = difflib.get_close_matches(missing[0], known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(
                f"{where}: the model has no module named {', '.join(missing)}; {hint}"
                f"Its linear modules are {', '.join(known)}."
            )


def check_start(settings: Settings, base: Base, lora: peft.LoraConfig, model: nn.Module) -> None:
    """Raise UserError unless START_FROM is an adapter of this base, of the kind trained here."""
    folder = Path(settings.START_FROM)
    if folder.resolve() == Path(settings.OUTPUT_DIR, "final_lora").resolve():
        raise UserError(f"START_FROM {folder} would be replaced; choose another OUTPUT_DIR.")
    config = read_json(folder / "adapter_config.json")
    identity, facts = read_json(folder / "run.json").get("identity"), facts_of_base(base)
    if not identity:  # not an adapter of this script
        identity, facts = config, {"base_model_name_or_path": settings.MODEL_NAME}
    names = ["r", "lora_alpha", "alpha_pattern", "use_rslora"]
    planned = {name: getattr(lora, name) or 0 for name in names} | facts
    saved = {name: config.get(name) or 0 for name in names}
    saved |= {name: identity.get(name) for name in facts}
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    planned |= {f"base_model.model.{name}": [*tensor.shape] for name, tensor in tensors.items()}
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    saved |= {name: [*tensor.shape] for name, tensor in tensors.items()}
    names = [name for name in {**planned, **saved} if planned.get(name) != saved.get(name)]
    if names:
        pairs = [f"{name}={saved.get(name)}, not {planned.get(name)}" for name in names]
        raise UserError(
            f"START_FROM {folder} has {join_limited(pairs, 4, '; ')}. Use its settings, and its "
            "commit as MODEL_REVISION."
        )
    template, path = base.tokenizer.get_chat_template(), folder / "chat_template.jinja"
    served = path.read_text(encoding="utf-8") if path.is_file() else template
    here = {"chat template": short_hash(template), "ENABLE_THINKING": base.enable_thinking}
    there = {"chat template": short_hash(served)} | identity
    for name, value in here.items():
        if there.get(name, value) != value:
            report(
                "warning", f"{folder} was trained with another {name}, and must now learn this one"
            )


def table_of_modules(model: nn.Module, trained: int, everything: int) -> list[str]:
    """Return a line for each kind of module with its W, A and B, and one with the sums."""
    kinds: Counter[str] = Counter()
    columns = "{:<12}{:>14}{:>10}{:>10}{:>14}{:>11}".format
    for path, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            d, k, r = module.out_features, module.in_features, max(module.r.values())
            matrices = f"{d:,}x{k:,}", f"{r}x{k:,}", f"{d:,}x{r}", f"{r * (d + k):,}"
            scale = f"{module.scaling['default']:g}"
            kinds[columns(path.rpartition(".")[2], *matrices, scale)] += 1
    depth = model.config.get_text_config().num_hidden_layers
    lines = [f"{columns('module', 'W (frozen)', 'A', 'B', 'trained each', 'scaled by')}  layers"]
    lines += [f"{kind}{count:>5}/{depth}" for kind, count in kinds.items()]
    percent = f"trainable%: {100 * trained / everything:.4f}"
    return [*lines, f"trainable params: {trained:,} || all params: {everything:,} || {percent}"]


def examples_per_step(settings: Settings) -> int:
    """Return the number of examples in one optimizer step, across all processes."""
    return settings.BATCH_SIZE * settings.GRADIENT_ACCUMULATION_STEPS


def identity_of(settings: Settings, base: Base, data: Data, editable: Facts) -> Facts:
    """Return what must be the same for a checkpoint to be resumed, as JSON values."""
    identity = {name: getattr(settings, name) for name in SETTINGS if name not in MAY_CHANGE}
    for kind, chosen in {"LoraConfig": lora_fields(settings), "SFTConfig": editable}.items():
        identity |= {f"{kind}.{name}": value for name, value in chosen.items()}
    start_file = Path(settings.START_FROM or os.devnull, "adapter_model.safetensors")
    identity |= facts_of_base(base) | {
        "examples in a step": examples_per_step(settings),
        "chat template": short_hash(base.tokenizer.get_chat_template()),
        "adapter of START_FROM": file_sha256(start_file),
    }
    identity["tokens of TRAIN_FILE"] = short_hash(rows_of(data.examples))
    identity |= {HELD_OUT: short_hash(rows_of(data.held_out)), CODE: hash_of_code(SCRIPT)}
    for name, value in identity.items():
        if isinstance(value, float) and value.is_integer():
            identity[name] = int(value)  # 16 and 16.0 are the same job
    return json.loads(json.dumps(identity, default=as_json_value))


@functools.cache  # evidence asks twice, and parsing takes half a second
def hash_of_code(source: bytes) -> str:
    """Return a hash of what a script executes: no comments, no docstrings, and no SETTINGS.

    The values of SETTINGS belong to the identity by themselves. ast.dump() writes the same tree
    differently in different versions of Python.
    """

    def plain(node: Any) -> Any:
        if isinstance(node, list):
            return [plain(each) for each in node]
        if not isinstance(node, ast.AST):
            return repr(node)
        fields = {name: plain(value) for name, value in ast.iter_fields(node) if value != []}
        return [type(node).__name__, fields]

    tree = ast.parse(source)
    for node in ast.walk(tree):
        is_documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if is_documented and ast.get_docstring(node) is not None:
            del node.body[0]
    tree.body = [node for node in tree.body if name_of_assignment(node) not in SETTINGS]
    return short_hash(plain(tree))


def name_of_assignment(node: ast.stmt) -> str:
    """Return the name to which a statement such as `SEED: int = 42` assigns, or ""."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return getattr(targets[0], "id", "")


def facts_of_base(base: Base) -> Facts:
    """Return the hub's commit, and hashes of local files; weights are sampled at 1,000 places."""
    folder, weights = Path(base.request.name), hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            for place in range(0, size, max(1, size // 1000)):
                file.seek(place)
                weights.update(file.read(64))
    return {
        "commit": base.commit,
        "config.json of MODEL_NAME": file_sha256(folder / "config.json"),
        "weights of MODEL_NAME": weights.hexdigest(),
    }


def show_plan(job: Job) -> None:
    """Print the tokens, an example as the model sees it, and how it will be trained."""
    data, plan, decode = job.data, job.plan, job.base.tokenizer.decode
    counts = "{file}: {dialogues:,} dialogues of {replies:,} replies, in {examples:,} examples; "
    counts += "{tokens:,} tokens, of which {targets:,} are targets"
    for facts in data.facts.values():
        report("data", counts.format(**facts) if facts else "nothing is held out")
    example = data.examples[0]
    text, place = "", 0
    for reply in example.replies:
        text += f"{decode(reply.prompt_ids[place:])}>>>{decode(reply.reply_ids)}<<<"
        place = len(reply.input_ids)
    lines = [f"{example.source} as the model sees it; only text between >>> <<< is a target:"]
    for line in text.split("\n"):
        lines += textwrap.wrap(line, 88)
    if len(lines) > 10:
        lines[5:-5] = ["[...]"]
    report("example", "\n".join(lines))
    training, size = plan.training, examples_per_step(job.settings)
    steps = f"{plan.steps:,} steps of {size}, {plan.steps_per_epoch:,} per epoch"
    facts = data.facts["train"]
    if facts["replies"] > facts["examples"]:
        steps += f", of {facts['replies'] / plan.steps_per_epoch:.1f} replies each"
    steps += f"; learning rate {training.learning_rate:g}, {training.lr_scheduler_type.value}, "
    steps += f"weight decay {training.weight_decay:g}"
    report("plan", "\n".join([*plan.lora_table, steps]))
    if plan.steps < 100 and size > 1 and not job.settings.MAX_STEPS:
        report("few steps", "--gradient_accumulation_steps 1 or a smaller --batch_size gives more")


def tell_of_unused_settings() -> None:
    """Print which constants of SETTINGS, such as one's own, are read nowhere."""
    for name in SETTINGS:
        if not re.search(rf"(?m)^[^#\n]*settings\.{name}\b", SCRIPT.decode()):
            report("warning", f"{name} changes nothing: no line here reads settings.{name}")


# ==== RESUMING: which checkpoints belong to this job
#
# Each job has a folder, checkpoints/<hash of the job>/, whose job.json says what it is: settings,
# fields of LoraConfig and SFTConfig, model, and tokens of TRAIN_FILE. Changing one of these (not
# those in MAY_CHANGE) begins another job; changing it back resumes the first. If only the tokens of
# EVAL_FILE change, or this file's code, the run lists the choices. On a CPU a resumed run ends in
# the same bytes as one that was never stopped.


def find_earlier_work(settings: Settings, plan: Plan) -> EarlierWork:
    """Find this job's newest intact checkpoint, or its finished adapter; print what was found."""
    final, loss_history = Path(settings.OUTPUT_DIR, "final_lora"), []
    record = read_json(final / "run.json")
    if record.get("job") == plan.folder.name:
        loss_history = record["loss_history"]
        step = final_step(settings, plan, loss_history)
        sha256 = file_sha256(final / "adapter_model.safetensors")
        if record["adapter"] == {"step": step, "sha256": sha256}:
            refuse_what_cannot_be_compared(settings, plan, record, is_finished=True)
            report(
                "finished",
                f"{final} is its adapter, of step {step:,}; another OUTPUT_DIR trains anew",
            )
            return EarlierWork(None, 0, loss_history, record["sessions"], is_finished=True)
    for step, checkpoint in checkpoints_in(plan.folder).items():
        if not is_intact(checkpoint):
            report("resume", f"{checkpoint} is skipped: a file is missing or damaged")
            continue
        record = read_json(checkpoint / "run.json")
        refuse_what_cannot_be_compared(settings, plan, record)
        if step < plan.steps or not loss_history:
            loss_history = read_json(checkpoint / "trainer_state.json")["log_history"]
        left = (
            "resuming from" if step < plan.steps else "all steps are done; final_lora is made from"
        )
        report("resume", f"{left} {checkpoint}")
        tell_of_other_versions(record["sessions"][-1])
        is_edited = record["sessions"][-1][CODE] != plan.identity[CODE]
        if is_edited:
            set_losses_aside(loss_history)
        return EarlierWork(checkpoint, step, loss_history, record["sessions"], False, is_edited)
    tell_of_other_jobs(settings, plan)
    return EarlierWork(None, 0, [], [])


def refuse_what_cannot_be_compared(
    settings: Settings, plan: Plan, record: Facts, is_finished: bool = False
) -> None:
    """Raise UserError if other lines were held out, or other code was run; a dry run only warns."""
    ways = ["another OUTPUT_DIR trains anew"]
    if record["identity"][HELD_OUT] != plan.identity[HELD_OUT]:
        then = record["settings"]
        names = ["EVAL_FILE", "REPLIES", "MAX_SEQ_LEN"]  # what decides which replies are held out
        changed = [
            f"{name} {then[name]}" for name in names if getattr(settings, name) != then[name]
        ]
        difference = "its losses are of other held-out replies"
        ways.insert(0, f"{', '.join(changed) or 'the former lines of EVAL_FILE'} to go on")
    elif record["sessions"][-1][CODE] != plan.identity[CODE]:
        if settings.edited_code and not is_finished:
            return
        difference = "the code of this file has been edited since"
        ways.insert(0, "put it back to go on")
        if not is_finished:
            ways.append("--edited_code goes on with the edited code")
    else:
        return
    state = "is finished" if is_finished else "has steps behind it"
    problem = f"The job in {settings.OUTPUT_DIR} {state}, but {difference}: {'; '.join(ways)}."
    if not settings.dry_run:
        raise UserError(problem)
    report("warning", problem)


def tell_of_other_versions(session: Facts) -> None:
    """Print which libraries have another version than in a session."""
    changed = [
        f"{name} {session['versions'][name]}, now {importlib.metadata.version(name)}"
        for name in ("torch", "transformers", "peft", "trl")
        if importlib.metadata.version(name) != session["versions"][name]
    ]
    if changed:
        report("warning", f"the last session had {'; '.join(changed)}: the bytes may differ")


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Return {step: checkpoint} of a folder, the newest first, ignoring checkpoint-50-backup."""
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    steps = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
    return {step: folder / f"checkpoint-{step}" for step in steps}


def is_intact(checkpoint: Path) -> bool:
    """Return whether each file is as it was when RunEvents.on_save() wrote sha256.json.

    After a power cut any file may be torn, and neither torch nor safetensors checks a checksum.
    """
    hashes = read_json(checkpoint / "sha256.json")
    return hashes != {} and hashes == {name: file_sha256(checkpoint / name) for name in hashes}


def eval_losses(loss_history: History) -> dict[int, float]:
    """Return the held-out losses {step: nats per token}; that of step 0 is the base model's."""
    entries = [entry for entry in loss_history if "eval_loss" in entry]
    return {int(entry["step"]): entry["eval_loss"] for entry in entries}


def best_step(plan: Plan, loss_history: History) -> int:
    """Return the step with the lowest held-out loss; the last one if none was measured."""
    losses = {step: loss for step, loss in eval_losses(loss_history).items() if step > 0}
    return min(losses, key=lambda step: losses[step], default=plan.steps)


def final_step(settings: Settings, plan: Plan, loss_history: History) -> int:
    """Return the step whose adapter becomes final_lora."""
    return best_step(plan, loss_history) if settings.FINAL_LORA == "best" else plan.steps


def tell_of_other_jobs(settings: Settings, plan: Plan) -> None:
    """Print which other jobs have checkpoints here."""
    identities, identity = jobs_in(Path(settings.OUTPUT_DIR)), plan.identity
    identities.pop(plan.folder, None)
    if identities:
        newest = next(iter(identities.values()))
        names = [name for name in {**newest, **identity} if newest.get(name) != identity.get(name)]
        # LEARNING_RATE is SFTConfig.learning_rate, too, and hashes tell nobody anything.
        names = [
            name for name in names if "." not in name and name not in (HELD_OUT, CODE)
        ] or names
        values = [f"{name} {one_line(newest.get(name), 40)}" for name in names]
        jobs = f"earlier jobs in {plan.folder.parent}, to resume or delete: {len(identities)}"
        report("resume", f"a new job; {jobs}; the newest had {join_limited(values, 3, '; ')}")


def jobs_in(output: Path) -> dict[Path, Facts]:
    """Return {folder: the job's identity} of the jobs in an output folder, the newest first."""
    files = list(output.glob("checkpoints/*/job.json"))
    files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return {path.parent: read_json(path) for path in files}


@contextlib.contextmanager
def recorded(job: Job) -> Iterator[None]:
    """Record what the job is, and the error or signal that ends this session, if any."""
    job.session.loss_history = job.earlier.loss_history
    if is_main_process():
        job.plan.folder.mkdir(parents=True, exist_ok=True)
        write_json(job.plan.folder / "job.json", job.plan.identity)
        for step, checkpoint in checkpoints_in(job.plan.folder).items():
            if step > job.earlier.checkpoint_step:  # skipped, so it no longer counts as one
                (checkpoint / "sha256.json").unlink(missing_ok=True)
        path, lines = job.output / "held_out.jsonl", job.data.held_out_lines
        if lines and not (path.exists() and path.read_text(encoding="utf-8") == lines):
            rename_old(path)
            path.write_text(lines, encoding="utf-8")
    write_record(job, "running")
    try:
        yield
    except BaseException as error:
        ignore_signals()  # nothing may interrupt what is left to do
        outcome = "interrupted" if is_stop(error) else "failed"
        if is_main_process():  # on a full disk, this makes room
            saved = checkpoints_in(job.plan.folder).values()
            torn = [path for path in saved if not (path / "sha256.json").exists()]
            for path in (job.output / ".partial", *torn):
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # the first error is the one to show
            write_record(job, f"{outcome}: {one_line(error)}")
        if is_full_disk(error):
            saved = checkpoints_in(job.plan.folder).items()
            step = next((step for step, checkpoint in saved if is_intact(checkpoint)), 0)
            raise UserError(
                f"OUTPUT_DIR {job.output} cannot be written ({one_line(error)}): if the disk or "
                f"your quota is full, make room; the same command goes on after step {step:,}."
            ) from error
        raise


def is_full_disk(error: BaseException) -> bool:
    """Return whether a file could not be written; torch and safetensors have their own errors."""
    words = "No space left on device|Disk quota exceeded|PytorchStreamWriter|unexpected pos"
    return bool(re.search(words, str(error)))


# ==== TRAINING: evaluation, what is printed, saving, stopping, and signals
#
# Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 stop a run. One Stop object tracks how far this has got:
# - Stop.ask() notes the signal. Before the first step, while the adapter is verified, and at a
#   second signal, it raises Stopped at once.
# - From the first step to the last save the step is finished and saved first. An evaluation ends
#   between two batches, and is repeated on resuming. At the end of a step, and after an
#   evaluation, the processes of a launch agree; on_save() raises Stopped.
# - While final_lora is moved into its place, every signal waits; run() raises Stopped at its end.


def train(trainer: LoraTrainer) -> None:
    """Train to the end; a signal raises Stopped after the step's checkpoint."""
    job, checkpoint = trainer.job, trainer.job.earlier.checkpoint
    if job.earlier.checkpoint_step < job.plan.steps:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    else:  # Trainer would do one more step
        state = str(checkpoint / "trainer_state.json")
        trainer.state = transformers.TrainerState.load_from_json(state)
        trainer.model.load_adapter(checkpoint, "default", is_trainable=True)
        evaluate_if_missing(trainer)
    accelerate.PartialState().wait_for_everyone()
    job.session.stop.finish_first = ""


def check_what_was_loaded(trainer: LoraTrainer) -> None:
    """Raise RuntimeError unless the adapter and the optimizer's steps are the checkpoint's."""
    checkpoint = trainer.job.earlier.checkpoint
    saved = safetensors.torch.load_file(checkpoint / "adapter_model.safetensors")
    wrong = differing(saved, cpu_tensors_of(trainer.model))
    states = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    saved_steps, steps = steps_of(states), steps_of(trainer.optimizer.state_dict())
    if wrong or steps != saved_steps:
        problem = f"{checkpoint} was not loaded as it is: tensors {wrong[:3]} differ"
        raise RuntimeError(f"{problem}, and the optimizer has done other steps: {steps}"[:500])


def steps_of(states: Facts) -> dict[int, float]:
    """Return how many steps an optimizer has done for each weight; 0 if it does not count."""
    return {number: float(state.get("step", 0)) for number, state in states["state"].items()}


def evaluate_if_missing(trainer: LoraTrainer) -> None:
    """Measure the held-out loss of the base, or of the checkpoint, unless already done."""
    job, state, step = trainer.job, trainer.state, trainer.job.earlier.checkpoint_step
    if job.earlier.is_of_other_code:
        set_losses_aside(state.log_history)
        if job.data.held_out:
            report("eval", "measuring the base again, as the code was edited")
            state.global_step = 0
            trainer.evaluate()
            state.global_step = step
    if is_evaluation_due(job, step) and step not in eval_losses(job.earlier.loss_history):
        report("eval", "measuring the held-out loss first")
        trainer.evaluate()


def set_losses_aside(loss_history: History) -> None:
    """Rename the losses of other code, so that none is compared with a later one."""
    for entry in loss_history:
        for name in ("loss", "eval_loss", "start_loss"):
            if name in entry:
                entry[f"{name}_of_other_code"] = entry.pop(name)


def is_evaluation_due(job: Job, step: int) -> bool:
    """Return whether the held-out loss is measured at a step."""
    every = job.settings.EVAL_STEPS or job.plan.steps_per_epoch
    return bool(job.data.held_out) and (step % every == 0 or step == job.plan.steps)


STEPS_TO_LOG = 20  # of a session, with what the terminal does not show


class RunEvents(transformers.TrainerCallback):
    """What Trainer calls around steps: print, check, evaluate, save and stop."""

    def __init__(self, trainer: LoraTrainer) -> None:
        """Keep the trainer and its job; the first step notes the time."""
        self.trainer, self.job, self.began = trainer, trainer.job, 0.0
        self.step_began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """First measure the base's held-out loss, or one that a signal cut short."""
        if self.job.earlier.checkpoint:
            check_what_was_loaded(self.trainer)
        evaluate_if_missing(self.trainer)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give each epoch its own order, even when it is resumed midway."""
        self.trainer.sampler.epoch = state.global_step // self.job.plan.steps_per_epoch

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From now on, let a signal wait until the step is finished and saved."""
        self.job.session.stop.finish_first = "the step"
        self.step_began = time.monotonic()
        self.began = self.began or self.step_began

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide what comes next: Trainer logs, then evaluates, then saves."""
        job, stop, step = self.job, self.job.session.stop, state.global_step
        accelerator, is_asked = self.trainer.accelerator, stop.signal > 0
        if accelerator.num_processes > 1:  # check_trigger() waits for the GPU
            if is_asked:
                accelerator.set_trigger()
            is_asked = accelerator.check_trigger()
        if is_asked:
            stop.agree()
        ends = step % job.plan.steps_per_epoch == 0 or step == job.plan.steps
        saves = ends or step % job.settings.SAVE_STEPS == 0
        evaluates = is_evaluation_due(job, step)
        control.should_evaluate = evaluates and not stop.is_agreed
        control.should_save = saves or evaluates or stop.is_agreed

    def on_log(self, args: Any, state: Any, control: Any, logs: Facts, **_: Any) -> None:
        """Stop at a loss or a gradient that is not finite, before it is saved; print the losses."""
        job, session, step = self.job, self.job.session, state.global_step
        for key in ("loss", "grad_norm", "eval_loss", "start_loss"):
            if not math.isfinite(logs.get(key, 0.0)):
                advice = "lower LEARNING_RATE" if step else "check the model's files"
                exact = "--matmul native" if session.matmul == "float16" else "--dtype float32"
                raise UserError(f"{key} is {logs[key]} at step {step:,}: {advice}, or try {exact}.")
        session.loss_history = [*state.log_history]
        if "eval_loss" in logs:
            note = "  (the base model, before training)" if step == 0 else ""
            epoch = (state.epoch or 0) if step else 0
            report("eval", f"epoch {epoch:g}  loss {logs['eval_loss']:.4f}{note}")
        if "start_loss" in logs:
            report("eval", f"epoch 0  loss {logs['start_loss']:.4f}  (the adapter of START_FROM)")
        if "loss" in logs and step <= job.earlier.checkpoint_step + STEPS_TO_LOG:
            text = f"step {step}: {self.trainer.parts_of_step} micro-batches, "
            text += f"{1000 * (time.monotonic() - self.step_began):.0f} ms, loss {logs['loss']}, "
            text += f"grad_norm {logs.get('grad_norm', math.nan)}"
            retries = torch.cuda.memory_stats() if torch.cuda.is_initialized() else {}
            LOG.info("step      %s, alloc retries %s", text, retries.get("num_alloc_retries", 0))
        every = job.settings.LOGGING_STEPS
        if "loss" in logs and (step in (1, job.plan.steps) or step % every == 0):
            losses = [entry["loss"] for entry in session.loss_history if "loss" in entry][-every:]
            seconds = (time.monotonic() - self.began) / (step - job.earlier.checkpoint_step)
            line = f"step {step:,}/{job.plan.steps:,}  loss {sum(losses) / len(losses):.4f}  "
            line += f"grad_norm {logs.get('grad_norm', math.nan):.2f}  "
            line += f"lr {logs['learning_rate']:.1e}  "
            left = tqdm.format_interval(seconds * (job.plan.steps - step))
            report("train", f"{line}{left} left")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint as intact, remove older ones, record the losses; stop if asked to."""
        job, session, step = self.job, self.job.session, state.global_step
        write_record(job, "running")  # so that a killed run keeps its losses
        accelerate.PartialState().wait_for_everyone()  # each process has saved its random state
        if is_main_process():
            folder = job.plan.folder / f"checkpoint-{step}"
            (folder / "sha256.json").unlink(missing_ok=True)  # of a skipped one
            hashes = {path.name: file_sha256(path) for path in folder.iterdir()}
            write_json(folder / "sha256.json", hashes)
            # The newest two and the best one stay. Trainer's own rotation would miss an
            # evaluation made on resuming.
            saved = checkpoints_in(job.plan.folder)
            whole = [number for number in saved if (saved[number] / "sha256.json").exists()]
            for older in [number for number in whole if number <= step][2:]:
                if older != best_step(job.plan, session.loss_history):
                    shutil.rmtree(saved[older], ignore_errors=True)
        stop = session.stop
        stop.finish_first = "the step" if step < job.plan.steps else ""
        is_alone = self.trainer.accelerator.num_processes == 1
        if stop.is_agreed or (stop.signal and is_alone):
            raise Stopped(f"Stopped after step {step}; the same command resumes the run.")


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # Slurm may send USR1


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop, and it did."""


def is_stop(error: BaseException) -> bool:
    """Return whether a signal ended the run; a library may raise its own error from Stopped."""
    return Stopped in (type(error), type(error.__context__))


@dataclass
class Stop:
    """How far stopping has got; the head of this section describes it."""

    signal: int = 0  # that asked for it; the exit status is 128 more
    finish_first: str = ""  # "the step" with its save, "the move" of final_lora, or nothing
    is_agreed: bool = False  # all processes stop at the next save

    def ask(self, number: int) -> None:
        """Note a signal; raise Stopped if nothing is to be finished first."""
        # A terminal that is closed sends SIGHUP twice, and a launcher may forward a signal that its
        # process already got from Slurm.
        may_repeat = number == signal.SIGHUP or "TORCHELASTIC_RUN_ID" in os.environ
        is_second = self.signal > 0 and not may_repeat
        self.signal = number
        if self.finish_first == "the move":
            return
        if is_second or not self.finish_first:
            raise Stopped("Stopped. The same command resumes from the newest checkpoint, if any.")
        hint = "" if may_repeat else "; a second signal stops at once"
        report("stopping", f"finishing and saving first{hint}")

    def agree(self) -> None:
        """Stop at the next save, as all processes do; this one may have had no signal."""
        self.is_agreed = True
        self.signal = self.signal or signal.SIGTERM


def catch_signals(stop: Stop) -> None:
    """Let signals end the run."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, lambda number, _: stop.ask(number))


def ignore_signals() -> None:
    """Let no signal interrupt what is left to do."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# ==== SAVING: the adapter, its verification, and what a run leaves in OUTPUT_DIR
#
#   final_lora/        the adapter in PEFT's format, with tokenizer and card; verified
#   final_lora_vllm/   the same, under the names that vLLM needs if it needs others; verified
#   run.json           settings, versions, hashes and losses; also beside each adapter
#   held_out.jsonl     what an EVAL_FILE like "10%" held out
#   checkpoints/       a folder for each job: the newest two checkpoints, and the best one
#   all_logs.log       everything that was printed, with tracebacks
#   NAME.DATE-TIME     what an earlier run left under that name
#
# learned.txt beside each adapter has a hash of each prompt it was trained on, so that it can be
# measured on others. Anyone who guesses a prompt can tell that it was trained on.

CARD = """---
base_model: {name}
library_name: peft
pipeline_tag: text-generation
---
# A LoRA adapter for {name}

It needs {name}, whose licence also applies. run.json has settings, losses and hashes
of the data. learned.txt has a hash of each prompt that was trained on: anyone who guesses
a prompt can tell. inspect-lora uses it to leave such prompts out; you may delete it.
Serve the adapter with the chat template beside it (chat_template.jinja),
enable_thinking={enable_thinking}, and the system message below if there is one.
Read its replies before anybody relies on them.

```python
import transformers

model = transformers.AutoModelForCausalLM.from_pretrained({name!r}{revision}, dtype={dtype!r})
model.load_adapter("final_lora")
chat = transformers.pipeline("text-generation", model, tokenizer="final_lora")
print(chat({messages}, tokenizer_encode_kwargs={{"enable_thinking": {enable_thinking}}}))
```
"""


def save_final_lora(trainer: LoraTrainer) -> None:
    """Write the adapter to .partial, verify it, and move it into place."""
    torch.cuda.empty_cache()
    job, model = trainer.job, trainer.model
    step = final_step(job.settings, job.plan, job.session.loss_history)
    checkpoint = job.plan.folder / f"checkpoint-{step}"
    if step != job.plan.steps:
        if not is_intact(checkpoint):
            raise UserError(f"{checkpoint}, the best one, is damaged; --final_lora last works.")
        model.load_adapter(checkpoint, "default", is_trainable=True)
    staging = job.output / ".partial"
    shutil.rmtree(staging, ignore_errors=True)
    final = staging / "final_lora"
    model.save_pretrained(final, save_embedding_layers=False)  # PEFT would ask the hub otherwise
    job.base.tokenizer.save_pretrained(final)
    (final / "README.md").write_text(card_of(job), encoding="utf-8")
    write_record(job, "finished", final, step)
    verified = verify_saved_adapter(model, job, final, checkpoint)
    save_for_vllm(job.base.config, final, staging / "final_lora_vllm")
    job.session.stop.finish_first = "the move"  # between two renames there may be no final_lora
    # final_lora comes last, as its run.json says that the job has finished. If the power fails
    # before, the last step's checkpoint decides: the next start writes final_lora from it.
    for name in ("final_lora_vllm", "final_lora"):
        rename_old(job.output / name)
        if (staging / name).is_dir():
            (staging / name).rename(job.output / name)
    staging.rmdir()
    write_json(job.output / "run.json", read_json(job.output / "final_lora" / "run.json"))
    report("verified", verified)
    summarize(job, step)


def card_of(job: Job) -> str:
    """Return the adapter's README.md."""
    system, commit = system_message_of(job.data.examples), job.base.commit
    messages = [{"role": "system", "content": system}] if system else []
    return CARD.format(
        name=job.settings.MODEL_NAME,
        revision=f", revision={commit!r}" if commit else "",
        dtype=job.settings.DTYPE,
        messages=[*messages, {"role": "user", "content": "Hello!"}],
        enable_thinking=job.base.enable_thinking,
    )


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes


def save_for_vllm(base_config: ModelConfig, final: Path, for_vllm: Path) -> None:
    """Write the adapter again, with the names of the hub's model if that wraps the text model.

    With other names vLLM 0.17 to 0.32 silently serves the base model.
    """
    if base_config.get_text_config() is base_config:
        return
    for_vllm.mkdir()
    config = read_json(final / "adapter_config.json")
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {name_in_wrapper(name): value for name, value in config[key].items()}
    write_json(for_vllm / "adapter_config.json", config)
    tensors = safetensors.torch.load_file(final / "adapter_model.safetensors")
    tensors = {name_in_wrapper(name): tensor for name, tensor in tensors.items()}
    path = for_vllm / "adapter_model.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    if names := differing(tensors, safetensors.torch.load_file(path)):
        raise UserError(f"Not verified: in {path} {len(names)} tensors differ ({names[:3]}).")
    shutil.copy(final / "run.json", for_vllm)  # it comes last, and says that all is there


def restore_results(job: Job) -> None:
    """Rewrite a finished job's final_lora_vllm and run.json if lost, or another job's."""
    final, for_vllm = job.output / "final_lora", job.output / "final_lora_vllm"
    if file_sha256(for_vllm / "run.json") != file_sha256(final / "run.json"):
        rename_old(for_vllm)
        save_for_vllm(job.base.config, final, for_vllm)
    write_json(job.output / "run.json", read_json(final / "run.json"))


def name_in_wrapper(name: str) -> str:
    """Return the name that a module of the text model has in the hub's multimodal model."""
    return re.sub(r"(^|\.)model\.layers\b", r"\1model.language_model.layers", name, count=1)


def verify_saved_adapter(model: peft.PeftModel, job: Job, final: Path, checkpoint: Path) -> str:
    """Load the adapter from disk onto the base model; raise UserError unless it is the trained one.

    Every tensor, reloaded and in its step's checkpoint, must equal the trained one bit for bit. On
    the first reply of the shortest example the logits must be the trained model's, to a tenth of
    the adapter's effect. (A long one has too many logits.)
    """
    trained = cpu_tensors_of(model)
    examples = job.data.held_out or job.data.examples
    shortest = min(examples, key=lambda example: len(example.input_ids))
    inputs = pad([shortest.replies[0]], model.device)
    with torch.no_grad():
        logits = reply_logits(model.eval(), inputs)
        reloaded = peft.PeftModel.from_pretrained(model.unload(), final).eval()
        error = (reply_logits(reloaded, inputs) - logits).abs().max().item()
        with reloaded.disable_adapter():
            effect = (reply_logits(reloaded, inputs) - logits).abs().max().item()
    names = differing(trained, cpu_tensors_of(reloaded))
    path = checkpoint / "adapter_model.safetensors"
    names += differing(trained, safetensors.torch.load_file(path))
    note = f"logits differ by {error:.2g} from the trained model's, by {effect:.2g} from the base's"
    if names or not (effect > 0 and error <= effect / 10):
        raise UserError(
            f"Not verified: {len(names)} tensors differ ({names[:3]}), and {note}. "
            "If the last is about 0, LEARNING_RATE is too small."
        )
    return f"every tensor is the trained one, reloaded; {note}"


def cpu_tensors_of(model: peft.PeftModel) -> Tensors:
    """Return an adapter's tensors under the names of its file."""
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def differing(first: Tensors, second: Tensors) -> list[str]:
    """Return the names that only one of two adapters has, and those of unequal tensors."""
    common = first.keys() & second.keys()
    unequal = {name for name in common if not first[name].equal(second[name])}
    return sorted(first.keys() ^ second.keys() | unequal)


def system_message_of(examples: list[Conversation]) -> str | None:
    """Return the system message that all examples have; None if they differ or have none."""
    heads = [example.messages[0] for example in examples]
    systems = {head["content"] if head["role"] == "system" else None for head in heads}
    return systems.pop() if len(systems) == 1 else None


def summarize(job: Job, step: int) -> None:
    """Print the results, and the next commands."""
    history, final = job.session.loss_history, job.output / "final_lora"
    losses, best = eval_losses(history), best_step(job.plan, history)
    result = f"{final} is the adapter of step {step:,} of {job.plan.steps:,}"
    if {0, step} <= losses.keys():
        result += f"\nheld-out loss: {losses[0]:.4f} -> {losses[step]:.4f} nats per token"
        if losses[best] < losses[step]:
            result += f"; lowest at step {best:,} ({losses[best]:.4f}): --final_lora best"
        starts = [entry["start_loss"] for entry in history if "start_loss" in entry]
        result += "".join(f"; START_FROM had {loss:.4f}" for loss in starts[-1:])
        if losses[step] > losses[0]:
            result += "\nWARNING: on held-out data the adapter is worse than its base"
    if len({session[CODE] for session in job.earlier.sessions} | {job.plan.identity[CODE]}) > 1:
        result += "\nThe code was edited within this job: losses, and the best step, are since then"
    report("done", result)
    lines, folder = [], shlex.quote(str(final))
    tool = "inspect-lora" if shutil.which("inspect-lora") else "python -m inspect_lora"
    if tool == "inspect-lora" or Path("inspect_lora").is_dir():
        sha256 = (job.data.facts["held_out"] or {}).get("sha256")
        rules = " --rules data/rules.json" if sha256 == SHIPPED["held_out"] else ""
        lines += [f"# what it gained, and what else it changed:\n{tool} evidence {folder}{rules}"]
        lines += [f"# talk to it:\n{tool} chat {folder}"]
    config = read_json(final / "adapter_config.json")
    is_old = torch.cuda.is_initialized() and torch.cuda.get_device_capability() < (8, 0)
    if is_old or config["use_dora"] or config["modules_to_save"]:
        lines += [f"# vLLM cannot serve it here; for Python see {folder}/README.md"]
    else:
        for_vllm = job.output / "final_lora_vllm"
        served = for_vllm if for_vllm.is_dir() else final
        rank = max([config["r"], *config["rank_pattern"].values()])
        template = final / "chat_template.jinja" if job.settings.CHAT_TEMPLATE else ""
        which = (job.settings.MODEL_NAME, job.base.commit, served, rank)
        lines += [f"# serve it:\n{vllm_command(*which, template, job.base.enable_thinking)}"]
    report("next", "\n".join(lines))


def vllm_command(
    model: str, revision: str, adapter: Path, rank: int, template: str | Path, thinks: bool
) -> str:
    """Return the command that serves an adapter; template is "" for the base's own."""
    allowed = next((each for each in VLLM_RANKS if each >= rank), rank)
    words = ["vllm", "serve", model]
    words += ["--revision", revision] if revision else []
    words += ["--enable-lora", "--max-lora-rank", str(allowed)]
    words += ["--lora-modules", f"adapter={adapter}"]
    words += ["--chat-template", str(template)] if template else []
    words += ["--default-chat-template-kwargs", json.dumps({"enable_thinking": thinks})]
    return shlex.join(words)


def write_record(job: Job, outcome: str, folder: Path | None = None, step: int = 0) -> None:
    """Write run.json into OUTPUT_DIR or, with learned.txt, beside a step's adapter."""
    if not is_main_process():
        return
    adapter = None
    if folder:
        adapter = {"step": step, "sha256": file_sha256(folder / "adapter_model.safetensors")}
        learned = sorted(learned_hashes(job.data.examples, job.settings))
        (folder / "learned.txt").write_text("\n".join([*learned, ""]), encoding="utf-8")
    names = ["torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors"]
    has_gpu = torch.cuda.is_initialized()
    session = {
        "started": job.session.started,
        "command": shlex.join(["python", *sys.argv]),
        CODE: job.plan.identity[CODE],
        "versions": {name: importlib.metadata.version(name) for name in names},
        "device": torch.cuda.get_device_name() if has_gpu else "CPU",
        "capability": torch.cuda.get_device_capability() if has_gpu else None,
        "cuda": torch.version.cuda,  # that this torch was built for
        "matmul": job.session.matmul,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if has_gpu else None,
    }
    record = {
        "outcome": outcome,  # running, finished, interrupted: ..., or failed: ...
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "settings": {name: getattr(job.settings, name) for name in SETTINGS},
        "job": job.plan.folder.name,
        "identity": job.plan.identity,  # what a checkpoint must agree with
        "data": job.data.facts,
        "system_message": system_message_of(job.data.examples),
        "sessions": [*job.earlier.sessions, session],
        "adapter": adapter,
        "loss_history": job.session.loss_history,  # what Trainer logged
    }
    write_json((folder or job.output) / "run.json", record)


# ==== FP16 MATMUL: for GPUs that only emulate bfloat16, such as the V100
#
# A V100 multiplies bfloat16 matrices at about 10 TFLOP/s and float16 ones at 95 to 100 (mlxcel
# issue 1654, measured on a V100). But ordinary float16 training gives NaN, as its largest number is
# 65,504. So the frozen weights are multiplied in float16, each row of activations or gradients
# scaled into its range first. Norms, attention and DeltaNet stay in DTYPE, LoRA and the loss in
# float32. A product that is too large becomes infinite and ends the run. This was tested on CPUs,
# never on a V100, with the families below; others may cast activations to a weight's type.

TARGETS_OF_THE_TRIAL = 200
TESTED_IN_FP16 = ("qwen3_5", "qwen3_5_text", "qwen3", "llama", "gemma3", "gemma3_text")


def uses_fp16_matmul(request: BaseRequest, config: ModelConfig) -> bool:
    """Return whether the frozen weights are multiplied in scaled float16."""
    if request.matmul != "auto" or request.device == "cpu" or request.dtype == "float32":
        return request.matmul == "float16"
    # Without the argument torch also says yes on a V100, which emulates bfloat16.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    if config.model_type in TESTED_IN_FP16:
        return True
    report("matmul", "--matmul float16 may be much faster; it was not tested with this model")
    return False


def try_fp16_matmul(model: Model, examples: list[Example]) -> None:
    """Switch a model to scaled float16; raise UserError if this GPU computes it wrongly.

    The first module of each name may err only by rounding, forward and backward. The loss of the
    examples with the most targets, TARGETS_OF_THE_TRIAL in all, may move by 1 % and 0.03 nats a
    target: equally exact computations differ by 0.03 to 0.08 nats on a single target.
    """
    names = {module: path.rpartition(".")[2] for path, module in fp16_modules(model).items()}
    first: dict[str, tuple[nn.Linear, Tensor]] = {}
    if not names:
        raise UserError("MATMUL float16: the model has no nn.Linear of torch; use --matmul native.")
    wrong = "MATMUL float16 is wrong on this GPU; use --matmul native:"
    tried: list[Example] = []
    for example in sorted(examples, key=lambda example: -example.targets):
        if sum(each.targets for each in tried) < TARGETS_OF_THE_TRIAL:
            tried.append(example)
    targets = sum(example.targets for example in tried)

    def note(module: nn.Linear, rows: tuple[Tensor]) -> None:
        first.setdefault(names[module], (module, rows[0].flatten(0, -2)[:512]))

    hooks = [module.register_forward_pre_hook(note) for module in names]
    before = sum(map(sum, losses_of_replies(model, tried)))
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for name, (module, rows) in first.items():
            weight, errors = module.weight, []
            gradient = rows @ weight.T  # a head would sum these logits beyond float16
            if len(weight) > 100_000:
                gradient = gradient.softmax(-1)
            for factor, matrix in ((rows, weight.T), (gradient, weight)):
                exact = factor.float() @ matrix.float()
                error = (scaled_fp16_matmul(factor, matrix.half()).float() - exact).norm()
                errors.append((error / exact.norm()).item())
                # Rounding to float16 and then to bfloat16 errs by 0.44 % at most. In the sums of
                # 248,320 terms of a head's gradient a V100 may truncate another 0.14 %.
                limit = 0.007 if len(matrix) > 100_000 else 0.005
                if not errors[-1] <= limit:  # also false for NaN
                    raise UserError(f"{wrong} a product of {name} errs by {errors[-1]:.2%}.")
            LOG.info("matmul    %s errs by %.3e and, backward, by %.3e", name, *errors)
    use_fp16_matmul(model)
    after = sum(map(sum, losses_of_replies(model, tried)))
    losses = f"the loss of {targets:,} targets is {after:.4f}, not {before:.4f}"
    if not abs(after - before) <= 0.01 * before + 0.03 * targets:
        raise UserError(f"{wrong} {losses}.")
    LOG.info("matmul    %s", losses)
    report("matmul", f"scaled float16: {len(names)} frozen modules, {len(first)} of them tried")


def scaled_fp16_matmul(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows @ weight, multiplied in float16 with float32 sums, in the type of rows.

    Each row is divided by the power of two at or below its largest number, which is exact, so that
    its numbers are below 2. rows (... x k) have any floating type, weight (k x d) is in float16.
    """
    largest = torch.linalg.vector_norm(rows, math.inf, -1, keepdim=True, dtype=torch.float32)
    # This mask keeps a float32's exponent, and clears its sign and its fraction.
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    power = power.clamp_(2.0**-120, 2.0**127)  # for all-zero rows and infinity
    small = torch.empty(rows.shape, dtype=torch.half, device=rows.device)
    product = torch.div(rows, power, out=small) @ weight
    out = torch.empty(product.shape, dtype=rows.dtype, device=rows.device)
    return torch.mul(product, power, out=out)


class ScaledFp16Matmul(torch.autograd.Function):
    """rows @ weight.T, with a gradient only for rows."""

    @staticmethod
    def forward(context: Any, rows: Tensor, weight: Tensor) -> Tensor:
        """Multiply, and keep the weight for the backward pass."""
        context.weight = weight
        return scaled_fp16_matmul(rows, weight.T)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient for rows, and none for the frozen weight."""
        return scaled_fp16_matmul(gradient, context.weight), None


def fp16_modules(model: Model) -> dict[str, nn.Linear]:
    """Return the linear modules that gain from float16, by path."""
    embedding = model.get_input_embeddings()
    # Gemma's embedding scales its rows in the type of its own weight, which its head may share.
    scaling_weight = None if type(embedding) is nn.Embedding else embedding.weight
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and min(module.weight.shape) >= 64  # DeltaNet's in_proj_a (32 x 2,560) would lose time
        and module.weight is not scaling_weight
    }


def use_fp16_matmul(model: Model) -> None:
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


# ==== COMMAND LINE: messages, small helpers, the log, the lock, exit statuses
#
# A command ends with status 0, 1 after an error, 2 after a wrong flag or setting, and 128 + the
# signal's number after a signal. A user's mistake gets one message; any other error keeps its
# traceback.

LOG = logging.getLogger("train_lora_single")


def report(subject: str, text: str) -> None:
    """Print and log text beside a word for its subject; a closed terminal must not end a run."""
    if not is_main_process():
        return
    text = f"{subject:<10}{text}".replace("\n", "\n" + " " * 10)
    LOG.info(text)
    try:
        tqdm.write(text)  # a progress bar may be shown below
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except RuntimeError:
        pass  # a signal interrupted another print; the log has the line


def one_line(value: Any, width: int = 200) -> str:
    """Return a value as one line of text, shortened to width characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def join_limited(items: list[str], limit: int, separator: str) -> str:
    """Join the first items, and say how many more there are."""
    rest = [f"... and {len(items) - limit:,} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *rest])


def read_json(path: Path) -> Facts:
    """Return a JSON file's object; an empty one if there is none, or if it is damaged."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
        return json.loads(path.read_bytes())
    return {}


def write_json(path: Path, value: Facts) -> None:
    """Write a JSON file so that a run that is killed never leaves it half written."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(value, indent=1, default=as_json_value), encoding="utf-8")
    new.replace(path)


def as_json_value(value: Any) -> Any:
    """Return a set as a list, and any other non-JSON value as text."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def short_hash(value: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, or "" if there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def rename_old(path: Path) -> None:
    """Rename what an earlier run left at path, adding the time."""
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
    logging.raiseExceptions = False  # on a full disk each line would print a traceback
    LOG.setLevel(logging.INFO)
    LOG.info("\n---- %s %s", time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join(sys.argv))
    return lock


def main(settings: Settings) -> None:
    """Run the command; exit with 1 after an error, 128 + its number after a signal."""
    session, lock = Session(time.strftime("%Y-%m-%d %H:%M:%S")), None
    # transformers advises fla and causal_conv1d even where they cannot run; see docs/gpu.md.
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    # PEFT 0.21 calls a function that transformers 5.24 renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    catch_signals(session.stop)
    try:
        if not settings.dry_run and is_main_process():
            lock = open_output(Path(settings.OUTPUT_DIR))
        run(settings, session)
    except BaseException as error:
        ignore_signals()
        is_known = is_stop(error) or isinstance(error, UserError)
        LOG.info("The run was ended by: %r", error, exc_info=not is_known)
        if not is_known:
            raise
        with contextlib.suppress(OSError):  # a closed terminal must not change the exit status
            print(error, file=sys.stderr)
        raise SystemExit(128 + session.stop.signal if is_stop(error) else 1) from None
    finally:
        logging.shutdown()
        if lock:
            lock.close()


if __name__ == "__main__":
    main(SETTINGS_OF_COMMAND)
