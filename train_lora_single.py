"""Train a LoRA adapter for Qwen3.5-4B on your conversations, on one GPU.

It is made for Linux; on Windows it runs in WSL.

    python train_lora_single.py              train on data/train.jsonl; write output/final_lora
    python train_lora_single.py --dry_run    check the data and print the plan; needs no GPU
    python train_lora_single.py --demo       the whole job in a minute, on a CPU, with a toy model
    python train_lora_single.py --lora_r 16 --num_epochs 2   every setting below is also a flag

A run that was stopped is resumed by the same command. Older results are renamed, not overwritten.

The sections of this file, with the questions that they answer. The first three are the heart.
To jump to any other, search for its name after four equals signs, such as "==== MEMORY":

    SETTINGS      What can be changed, and how is a setting added?
    THE RUN       What happens, and in which order?
    THE HEART     What is trained, how is a step done, and what checks it?
    DEVICE        Which GPU is used? What if there are several, or none? Which kernels?
    MODEL FILES   Where do the base model, its tokenizer and its chat template come from?
    DATA          Which four formats may a conversation have, and how is a part held out?
    TOKENS        Which tokens of a conversation are targets?
    PLAN          How many weights and steps? What if a target module is misspelt?
    CHECKPOINTS   When is a run resumed, refused, or finished?
    MEMORY        What if a step does not fit in the GPU's memory?
    TRAINING      In which order? What is printed and saved? What happens on Ctrl-C?
    SAVING        Which files does a run leave, and how is the adapter verified?
    RUN.JSON      What is recorded of a run?
    FP16 MATMUL   What is different on a V100?
    COMMAND LINE  How do flags, the log, exit statuses and messages work?
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
#     "pydantic>=2.10,<3",
#     "huggingface_hub",
#     "filelock>=3.30,<5",
#     "tqdm",
#     "jinja2",
# ]
# ///

from __future__ import annotations

import argparse
import bisect
import contextlib
import difflib
import errno
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import time
import typing
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

if sys.version_info < (3, 11):
    raise SystemExit("This script needs Python 3.11 or newer; docs/gpu.md says how to get it.")
if sys.platform == "win32":
    raise SystemExit("This script needs Linux; on Windows run it in WSL.")

# Libraries read these when they are imported.
# Threads that busy-wait slowed a small model on a CPU from 28 s to 245 s beside a busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Batch width varies by step, which fragments GPU memory. (Newer versions of
# torch read PYTORCH_ALLOC_CONF, too.)
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if sys.stderr is None or not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import accelerate
import datasets
import filelock
import huggingface_hub
import jinja2
import peft
import pydantic
import safetensors.torch
import torch
import transformers
import trl
from huggingface_hub.errors import GatedRepoError, HTTPError, RevisionResolutionError
from pydantic import Field
from tqdm import tqdm
from transformers.integrations import get_reporting_integration_callbacks

# The kinds of settings, with their limits.
NonEmptyStr = Annotated[str, Field(min_length=1)]
TargetModules = Annotated[list[NonEmptyStr], Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
CountOrZero = Annotated[int, Field(ge=0, le=2**31 - 1)]
Rank = Annotated[int, Field(ge=1, le=512)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


# ==== SETTINGS: edit them here, or give the flag of the same name, such as --lora_r 16
#
# To add a setting, write one line with its type, such as
#     WEIGHT_DECAY: Share = 0.0  # shrinks A and B a little in each step
# and use it, for example in training_config() as weight_decay=settings.WEIGHT_DECAY. Every constant
# with a type gets a flag, a check and a help text, and is recorded in run.json; a checkpoint made
# with another value, or before the setting existed, is refused.

# The model.
MODEL_NAME: NonEmptyStr = "Qwen/Qwen3.5-4B"  # a chat model on the hub, or a local folder
MODEL_REVISION: NonEmptyStr = "main"  # the model's branch, tag or commit on the hub
DTYPE: Literal["bfloat16", "float32"] = "bfloat16"  # the type of the frozen weights
DEVICE: Literal["cuda", "cpu"] = "cuda"  # "cpu" is for small models

# The data. The section DATA shows the formats that a conversation may have.
TRAIN_FILE: NonEmptyStr = "data/train.jsonl"  # the conversations to learn from
EVAL_FILE: str = "data/eval.jsonl"  # not trained on; "10%" holds out a tenth of TRAIN_FILE; or ""
REPLIES: Literal["all", "last"] = "all"  # which replies of a conversation are targets
MAX_SEQ_LEN: Count = 512  # in tokens; longer examples are left out, and never cut

# LoRA: y = W x + (alpha / r) B A x. W (d x k) is frozen; A (r x k) and B (d x r) are trained.
# If you change r, keep alpha. In one small test the losses of r = 1 to 16 then lay within 0.012
# (docs/evidence.md).
LORA_R: Rank = 8  # rank; change it last: in one small test the losses of 1 to 16 lay within 0.012
LORA_ALPHA: Count = 16  # scales the update by alpha / r; if it is too large, the loss jumps
LORA_DROPOUT: Share = 0.05  # on the LoRA branch only; makes memorizing harder
LORA_TARGET_MODULES: TargetModules = [  # the modules that get LoRA
    "q_proj",  # attention; in Qwen3.5 one layer in four has it, the others have Gated DeltaNet
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",  # feed-forward, in every layer
    "up_proj",
    "down_proj",
]

# Training.
NUM_EPOCHS: Count = 3  # passes over the training file; lower it if the held-out loss rises again
MAX_STEPS: CountOrZero = 0  # stop after this many steps, to try things out; 0 for all epochs
# Only BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS counts: the examples, one for each reply, of a step.
# How many of them go through the GPU at once is found by trying, see MEMORY.
BATCH_SIZE: Count = 2  # examples in a step = BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS
GRADIENT_ACCUMULATION_STEPS: Count = 2  # the other factor
LEARNING_RATE: Rate = 2e-4  # the highest rate; lower it if the loss jumps
LR_SCHEDULER_TYPE: Literal[  # the shape of the learning rate after its rise
    "cosine", "linear", "constant_with_warmup"
] = "cosine"
WARMUP_RATIO: Share = 0.03  # the share of the steps in which the learning rate rises from 0
SEED: Seed = 42  # decides dropout, the order of the examples, and the values that A begins with

# Results.
OUTPUT_DIR: NonEmptyStr = "output"  # gets final_lora, run.json, all_logs.log and checkpoints
LOGGING_STEPS: Count = 10  # a line is printed every so many steps
SAVE_STEPS: Count = 50  # a checkpoint every so many steps; a crash loses the steps since then
FINAL_LORA: Literal["last", "best"] = "last"  # which epoch; "best": lowest held-out loss
REPORT_TO: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # also log there

# How the frozen weights are multiplied.
MATMUL: Literal["auto", "native", "float16"] = "auto"  # for old GPUs, see FP16 MATMUL


# ==== THE RUN: the whole job
#
# Each line of run() and prepare() is a step of the job, and the comment after it names the section
# that explains it.


def run(job: Job) -> None:
    """Train one adapter, verify it, and save it as final_lora."""
    prepare(job)  # everything that comes before the weights
    if job.settings.dry_run:
        report("done", "Nothing was trained. Without --dry_run the same command trains.")
        return
    resume_or_begin(job)  # CHECKPOINTS: an earlier run to resume, if there is one
    if job.is_finished:
        return
    trainer = build_trainer(job)  # THE HEART: the weights, with LoRA in them
    check_only_lora_is_trained(trainer.model, job.plan)  # THE HEART
    find_what_fits(trainer, job)  # MEMORY: how many examples at once
    train(trainer, job)  # TRAINING: all steps, or those that are left
    if is_main_process():
        save_final_lora(trainer, job)  # SAVING: write, load again, compare, move into place
        summarize(job)  # SAVING: what was reached, and what to do next


def prepare(job: Job) -> None:
    """Find the device, check and render the data, and print what would be trained."""
    job.device_name = find_device(job.settings)  # DEVICE
    read_model_files(job)  # MODEL FILES: configuration, tokenizer and chat template
    read_data(job)  # DATA and TOKENS: every line is checked before anything is trained
    job.plan = make_plan(job)  # PLAN: which weights, and how many steps
    refuse_changed_arguments(training_config(job), job)  # PLAN
    refuse_what_is_missing(training_config(job))  # PLAN: packages and the hub
    job.matmul = choose_matmul(job)  # FP16 MATMUL: how a V100 multiplies


@dataclass
class Job:
    """The settings of a run, and what is found out on the way."""

    settings: argparse.Namespace

    # From prepare(): what is to be done.
    device_name: str = ""
    config: transformers.PretrainedConfig | None = None  # the base model's
    chat_format: ChatFormat | None = None  # how conversations become tokens
    examples: list[Example] = field(default_factory=list)  # to learn from
    held_out: list[Example] = field(default_factory=list)
    held_out_content: bytes = b""  # what held_out.jsonl gets, with an EVAL_FILE like "10%"
    data: dict[str, Any] = field(default_factory=dict)  # counts and hashes of the two files
    plan: Plan | None = None
    matmul: str = "native"  # how frozen weights are multiplied; or "float16"
    matmul_compared: dict[str, Any] | None = None  # both kinds on this GPU, with MATMUL "auto"
    delta_kernels: str = ""  # what computes DeltaNet's layers, and why

    # From resume_or_begin(): what an earlier run has done.
    checkpoint: Path | None = None  # the one to resume from
    is_finished: bool = False  # nothing is left to do
    started: float = 0.0  # seconds since 1970

    # From the training.
    token_limits: MemoryLimits | None = None
    history: list[dict[str, float]] = field(default_factory=list)  # what Trainer logged
    train_seconds: float = 0.0  # of optimizer steps in this process, evaluation apart
    train_tokens: int = 0  # of these steps
    peak_gib: float = 0.0  # GPU memory that torch had in use at the most

    # From catch_signals().
    signals_wait: bool = False  # a signal is remembered, and obeyed after the next save
    stop_signal: int = 0  # the signal that asks the run to stop

    # From save_final_lora().
    saved_epoch: dict[str, Any] | None = None  # which epoch became final_lora
    adapter_sha256: dict[str, str] = field(
        default_factory=dict
    )  # of final_lora and final_lora_vllm

    @property
    def output(self) -> Path:
        """The folder of the results."""
        return Path(self.settings.OUTPUT_DIR)

    def logged(self, key: str) -> dict[int, float]:
        """Return {step: value} of "loss" or "eval_loss"; the eval loss at step 0 is the base's."""
        return {int(entry["step"]): entry[key] for entry in self.history if key in entry}


@dataclass
class Plan:
    """What will be trained, as PEFT itself counts it on the meta device, without weights."""

    trainable: int  # parameters
    total: int  # parameters, LoRA's among them
    trainable_shapes: dict[str, tuple[int, ...]]  # of each trained tensor
    steps_per_epoch: int
    steps: int
    max_rank: int
    vllm_refuses: str  # why vLLM cannot serve this kind of adapter, or ""


# ==== THE HEART: LoRA, the trainer, its step and its loss
#
# Each target module, a matrix W of the model, gets two small matrices beside it, A and B. Only
# these are trained, in float32; W and all else stay frozen.
#
# The labels are the target tokens: those of a reply, with the one that ends it. All others have the
# label -100. At position t the model predicts token t + 1. The loss of a step is the sum of
# -log(probability) over its target tokens, divided by their number in the whole step, however many
# micro-batches it goes through the GPU in.
#
# Trainer pads a step's examples, counts their target tokens (num_items_in_batch), calls
# training_step() once, clips the gradient, and lets AdamW change A and B. Three checks guard this:
# check_only_lora_is_trained() before the first step, stop_if_not_finite() at each step (TRAINING),
# and verify_saved_adapter() at the end (SAVING).


def lora_config(settings: argparse.Namespace) -> peft.LoraConfig:
    """Return what PEFT is asked for. Any LoraConfig that refuse_unsupported() lets through will do.

    Examples are use_dora=True, or rank_pattern={"down_proj": 16}. The plan prints the result.
    """
    return peft.LoraConfig(
        r=settings.LORA_R,
        lora_alpha=settings.LORA_ALPHA,
        target_modules=settings.LORA_TARGET_MODULES,
        lora_dropout=settings.LORA_DROPOUT,
        bias="none",  # the biases stay frozen
        task_type="CAUSAL_LM",
    )


def training_config(job: Job) -> trl.SFTConfig:
    """Return what TRL is asked for. Its defaults hold: AdamW without decay, clipping at 1.0.

    Other arguments, such as weight_decay=0.01, may be added. Those on which this script depends are
    refused by name, see PLAN.
    """
    settings = job.settings
    processes = accelerate.PartialState().num_processes
    return trl.SFTConfig(
        output_dir=str(job.output / "checkpoints"),
        run_name=job.output.resolve().name,  # in a tracker
        seed=settings.SEED,
        num_train_epochs=settings.NUM_EPOCHS,
        max_steps=job.plan.steps,  # this decides, not the epochs
        optim="adamw_torch_fused",  # the default from torch 2.8 on, and the same with 2.7
        learning_rate=settings.LEARNING_RATE,
        lr_scheduler_type=settings.LR_SCHEDULER_TYPE,
        # Rounded down: Trainer would round up, and the first step of a warm-up has the rate 0, so a
        # short run would waste it.
        warmup_steps=int(settings.WARMUP_RATIO * job.plan.steps),
        per_device_train_batch_size=examples_per_step(settings) // processes,  # its share of a step
        gradient_accumulation_steps=1,  # training_step() divides a step into micro-batches
        activation_checkpointing=False,  # gradient checkpointing is switched by micro-batch, MEMORY
        bf16=False,  # no autocast: the weights have their type already
        use_cpu=settings.DEVICE == "cpu",
        dataset_kwargs={"skip_prepare_dataset": True},  # TRL must not render or pack
        max_length=None,  # nothing is cut
        eos_token=job.chat_format.tokenizer.eos_token,
        eval_strategy="epoch" if job.held_out else "no",
        eval_on_start=bool(job.held_out) and not job.checkpoint,  # the base model's loss
        save_strategy="epoch",  # and every SAVE_STEPS steps, see TRAINING
        logging_steps=1,  # every loss is checked and recorded
        logging_nan_inf_filter=False,  # a NaN must not be replaced by a mean
        include_num_input_tokens_seen="non_padding",
        router_aux_loss_coef=0.0,  # the routers of a mixture of experts stay frozen
        report_to=settings.REPORT_TO,
        disable_tqdm=True,  # RunEvents prints what is done and how long is left
        ddp_find_unused_parameters=False,
    )


def build_trainer(job: Job) -> LoraTrainer:
    """Load the base model and return a trainer whose model has LoRA in it.

    LoRA is added by SFTTrainer's peft_config alone. Do not also call PEFT's get_peft_model(): TRL
    refuses a model that already has LoRA.
    """
    trainer = new_trainer(job)
    if job.matmul == "float16" and job.settings.MATMUL == "auto":
        reason = try_fp16_matmul(trainer, job)  # see FP16 MATMUL
        if reason:
            take_native_matmul(job, reason)
            del trainer  # there is no room for two models
            gc.collect()
            torch.cuda.empty_cache()
            trainer = new_trainer(job)
    return trainer


def new_trainer(job: Job) -> LoraTrainer:
    """Return a trainer with the weights as the model's files have them, and with new LoRA."""
    settings = job.settings
    device = accelerate.PartialState().device
    model = load_model(settings.MODEL_NAME, settings.MODEL_REVISION, settings.DTYPE, device)
    if settings.MATMUL == "float16":
        model = use_fp16_matmul(model)  # see FP16 MATMUL
    trainer = LoraTrainer(
        job,
        model=model,
        peft_config=lora_config(settings),  # PEFT makes A and B in float32
        args=training_config(job),
        train_dataset=to_dataset(job.examples),  # see TOKENS
        eval_dataset=to_dataset(job.held_out) if job.held_out else None,
        processing_class=job.chat_format.tokenizer,
    )
    trainer.add_callback(RunEvents(trainer))  # prints, checks and stops, see TRAINING
    trainer.remove_callback(transformers.PrinterCallback)  # would print dictionaries
    return trainer


class LoraTrainer(trl.SFTTrainer):
    """TRL's trainer with this script's micro-batches, loss, order of the examples, and saving."""

    def __init__(self, job: Job, **given: Any) -> None:
        """Decide the order of the examples; find the layers that can recompute activations."""
        self.job = job
        self.sampler = LengthGroupedSampler(job)  # see TRAINING
        super().__init__(**given)
        self.recomputing_layers = layers_that_recompute(self.model)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Send the examples of a step through the model, in micro-batches; return their loss.

        Each micro-batch adds its share of the step's mean, so apart from dropout and rounding the
        gradient does not depend on how the step is split. A step that runs out of memory is done
        again in smaller micro-batches, see MEMORY.

        Args:
            model: self.model, or DDP around it.
            inputs: input_ids, attention_mask and labels, each examples x tokens.
            num_items_in_batch: the target tokens of the whole step in all processes, by Trainer.
        """
        if not model.training:
            model.train()
        inputs = self._prepare_inputs(inputs)
        for tries_left in (3, 2, 1, 0):
            micro_batches = split_into_micro_batches(inputs, self.job.token_limits)
            loss, failed = self.go_through(model, micro_batches, num_items_in_batch)
            if failed is None:
                return loss
            make_room(self, failed, tries_left)
        raise AssertionError("make_room() ends the run when no try is left")

    def go_through(
        self,
        model: torch.nn.Module,
        micro_batches: list[tuple[dict[str, torch.Tensor], bool]],
        num_items_in_batch: torch.Tensor | None,
    ) -> tuple[torch.Tensor, OutOfMemory | None]:
        """Send each micro-batch forward and backward; return the loss, and what did not fit."""
        total = torch.zeros((), device=self.args.device)
        for number, (inputs, is_recomputed) in enumerate(micro_batches, 1):
            set_recomputation(self.recomputing_layers, is_recomputed)
            is_last = number == len(micro_batches)  # only then do processes exchange gradients
            try:
                with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                    loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
                    self.accelerator.backward(loss)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.accelerator.num_processes > 1:
                    raise  # the others wait for this one's gradients, so all must end
                return total, OutOfMemory(inputs, is_recomputed, one_line(error))
            total += loss.detach()
        return total, None

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return a micro-batch's sum of -log(probability) / the target tokens of the whole step.

        TRL's own loss has the same value. It is not used, since it computes entropy and accuracy in
        every step as well, and needs Triton on a GPU, and Triton no longer supports the V100.
        """
        loss = reply_losses(model, inputs).sum() / num_items_in_batch
        return loss * self.accelerator.num_processes  # DDP takes the mean over the processes

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the held-out loss as a mean over tokens; Trainer's depends on the batches."""
        metrics = {"eval_loss": held_out_loss(self.model, self.job, self.state.global_step)}
        self.log(metrics)
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(
        self, train_dataset: datasets.Dataset | None = None
    ) -> LengthGroupedSampler:
        """Return our order; Trainer's group_by_length has no seed, so it could not be resumed."""
        return self.sampler

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the adapter alone; Trainer would add training_args.bin, a pickle.

        Only the main process saves. Without the argument PEFT would contact the hub.
        """
        if self.args.should_save:
            self.model.save_pretrained(output_dir, save_embedding_layers=False)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """Return 0: Trainer's estimate of FLOPs cost 5 ms a step on a CPU."""
        return 0

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Do nothing: TRL's card does not describe the run; save_adapter() writes one that does."""


def split_into_micro_batches(
    inputs: dict[str, torch.Tensor], limits: MemoryLimits
) -> list[tuple[dict[str, torch.Tensor], bool]]:
    """Divide a padded step into micro-batches that fit, with a flag: is it recomputed?

    A step that fits stays whole. Otherwise the examples that are too long to keep their
    activations go first, and are recomputed. Then come the others. Each micro-batch is as wide as
    its longest example, so it has less padding than the step.

    Args:
        inputs: input_ids, attention_mask and labels, each examples x tokens, padded on the right.
        limits: how much fits at once, padding included.
    """
    lengths, targets = lengths_and_targets(inputs)
    if limits.fit(lengths, sum(targets), False):
        return [(inputs, False)]
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    micro_batches = []
    for is_recomputed in (True, False):
        left = [
            row
            for row in longest_first
            if limits.fit([lengths[row]], targets[row], False) != is_recomputed
        ]
        while left:
            count = 1
            while count < len(left) and limits.fit(
                [lengths[row] for row in left[: count + 1]],
                sum(targets[row] for row in left[: count + 1]),
                is_recomputed,
            ):
                count += 1
            rows, left = left[:count], left[count:]
            width = lengths[rows[0]]
            micro_batch = {key: value[rows, :width] for key, value in inputs.items()}
            micro_batches.append((micro_batch, is_recomputed))
    return micro_batches


def reply_losses(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return -log(probability) of each target token, in nats, and 0 for all others.

    The result has a row for each example and a column for each token but the first, which nothing
    predicts.
    """
    next_tokens = inputs["labels"][:, 1:]
    positions = target_positions(inputs)
    losses = torch.zeros(next_tokens.shape, device=next_tokens.device)
    losses[positions] = torch.nn.functional.cross_entropy(
        reply_logits(model, inputs).float(), next_tokens[positions], reduction="none"
    )
    return losses


def target_positions(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return rows and columns of the positions that predict a target token: t for token t + 1."""
    return (inputs["labels"][:, 1:] != -100).nonzero(as_tuple=True)


# In these families a token sees only those before it, so padding on the right changes nothing, and
# attention without a mask has faster kernels. Tests compare losses and gradients for each of them.
NEED_NO_MASK = (
    "qwen3_5", "qwen3_5_text", "qwen3", "qwen3_moe", "qwen2", "llama", "mistral", "mixtral", "phi3",
    "gemma2", "gemma3", "gemma3_text",
)  # fmt: skip


def reply_logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a row of logits for each target token, and none for other tokens.

    With 248,320 tokens in the vocabulary the logits are the largest tensor of all. So a hook gives
    the head the target positions alone. A hook, since the call must go through DDP, which is around
    the model; and transformers' own logits_to_keep takes whole columns, which differ from example
    to example.
    """
    positions = target_positions(inputs)

    def keep_targets(_: torch.nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
        """Pass the head only the hidden states at the target positions."""
        return given[0][positions]

    inner = accelerate.utils.extract_model_from_parallel(model)
    given = {"input_ids": inputs["input_ids"], "use_cache": False}
    # Without a mask transformers looks for packed rows, and waits for the GPU to tell it. nonzero()
    # has just waited in target_positions(), so nothing is left to wait for.
    if needs_mask(inner.config):
        given["attention_mask"] = inputs["attention_mask"]
    hook = inner.get_output_embeddings().register_forward_pre_hook(keep_targets)
    try:
        return model(**given).logits
    finally:
        hook.remove()


def needs_mask(config: transformers.PretrainedConfig) -> bool:
    """Return whether a model must be told which tokens are padding on the right."""
    config = config.get_text_config()
    is_causal = not getattr(config, "use_bidirectional_attention", False)  # Gemma's can be set
    return not (is_causal and config.model_type in NEED_NO_MASK)


def check_only_lora_is_trained(model: peft.PeftModel, plan: Plan) -> None:
    """Stop unless exactly the planned weights are trainable, all of them in float32.

    The plan has their names, shapes and number, as PEFT has them in a copy of the model without
    weights. For Qwen3.5-4B and the settings above the trained share is 0.2518 %.
    """
    trainable = {
        name.removeprefix("base_model.model."): weight
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }
    shapes = {name: tuple(weight.shape) for name, weight in trainable.items()}
    count = sum(weight.numel() for weight in trainable.values())
    total = sum(weight.numel() for weight in model.parameters())
    share = f"{count:,} of {total:,} parameters are trained ({count / total:.4%})"
    if shapes != plan.trainable_shapes or total != plan.total:
        different = sorted({name for name, _ in shapes.items() ^ plan.trainable_shapes.items()})
        raise UserError(
            f"LoRA is not in place as planned: {share}, but {plan.trainable:,} of {plan.total:,} "
            f"were planned. The difference is in "
            f"{join_limited(different, 3, ', ') or 'the frozen weights'}."
        )
    narrow = [name for name, weight in trainable.items() if weight.dtype != torch.float32]
    if narrow:
        raise UserError(
            f"{len(narrow)} trained weights, such as {narrow[0]}, are not in float32 but in "
            f"{trainable[narrow[0]].dtype}, which rounds small steps away. Set DTYPE to float32."
        )
    report("model", f"{share}, in float32; the rest is frozen")


# ==== DEVICE: the GPU or the CPU, and several processes
#
# One process uses the first GPU of CUDA_VISIBLE_DEVICES. Under `accelerate launch` each process has
# one of its own, and a step's examples must divide among them.


def find_device(settings: argparse.Namespace) -> str:
    """Return the device's name, or raise UserError if it cannot be used; a dry run needs none."""
    if settings.dry_run:
        forget_other_launches()
        forbid_gpu_packages()
        return ""
    name = prepare_device(settings.DEVICE, settings.DTYPE)
    processes, size = accelerate.PartialState().num_processes, examples_per_step(settings)
    if size % processes:
        raise UserError(
            f"{processes} processes cannot share steps of {size} examples. Choose BATCH_SIZE x "
            f"GRADIENT_ACCUMULATION_STEPS as a multiple of {processes}."
        )
    if processes == 1:
        return name
    report(
        "device",
        f"{processes} processes share the examples of each step; an epoch's last step is filled "
        "up\nwith examples from its beginning",
    )
    return f"{name}, {processes} processes"


def prepare_device(device: str, dtype: str) -> str:
    """Return the device's name, or raise UserError and say why there is none that works.

    This comes before the model's code is imported, since the import decides whether it uses
    flash-linear-attention.

    Args:
        device: "cuda" or "cpu".
        dtype: the type of the weights that it must multiply.
    """
    is_launched = forget_other_launches()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        forbid_gpu_packages()
        accelerate.PartialState(cpu=True)
        report("device", "CPU")
        return "CPU"
    if not is_launched:
        # TRL refuses several visible GPUs without a launcher.
        os.environ["CUDA_VISIBLE_DEVICES"] = ("0" if visible is None else visible).split(",")[0]
    try:
        torch.cuda.init()  # says why there is no GPU
    except (RuntimeError, AssertionError) as error:
        hidden = "" if visible is None else f" CUDA_VISIBLE_DEVICES is {visible!r}."
        raise UserError(
            f"DEVICE cuda: torch sees no GPU ({one_line(error).rstrip('.')}).{hidden} An NVIDIA "
            "GPU and a driver of the 525 branch or newer are needed; without one, try --demo, or "
            "--device cpu with a small model."
        ) from error
    place = accelerate.PartialState().device
    major, minor = torch.cuda.get_device_capability(place)
    free, total = torch.cuda.mem_get_info(place)
    name = f"{torch.cuda.get_device_name(place)}, sm_{major}{minor}"
    # Nothing here tries causal_conv1d's kernels before they are used, as fla's are.
    forbid_gpu_packages(("fla", "causal_conv1d") if major < 8 else ("causal_conv1d",))
    try:  # a torch without this GPU's kernels says so only when it computes
        ones = torch.ones(8, 8, device=place, dtype=getattr(torch, dtype))
        (ones @ ones).sum().item()
    except RuntimeError as error:
        # Drivers of virtual GPUs, and some in WSL, cannot expand segments of memory.
        if re.search("operation not supported|unknown error", str(error)):
            raise UserError(
                f"DEVICE cuda: {name} does not give memory ({one_line(error)}). Its driver may "
                "not support expandable segments: set PYTORCH_CUDA_ALLOC_CONF="
                "expandable_segments:False, and start the command again."
            ) from error
        raise UserError(
            f"DEVICE cuda: torch {torch.__version__} does not run on {name} "
            f"({one_line(error)}). The versions in requirements.txt run on sm_70 (V100) to sm_120; "
            "if it is one of these, free its memory."
        ) from error
    # With a newer cuDNN on LD_LIBRARY_PATH torch would prefer its attention, which plans anew for
    # each width of a step, in about a second (FunASR issue 3704).
    torch.backends.cuda.enable_cudnn_sdp(False)
    text = f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free"
    if visible is None and not is_launched:
        text += freer_gpu(free)
    report("device", text)
    return name


def freer_gpu(free: int) -> str:
    """Return a note if the first GPU is used of several, and which of them has more free memory."""
    command = ["nvidia-smi", "--query-gpu=uuid,name,memory.free", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):  # it need not be there
        return ""
    rows = [line.split(", ") for line in said.stdout.splitlines() if line.count(", ") == 2]
    sizes = {(uuid, name): int(mib) * 2**20 for uuid, name, mib in rows if mib.isdecimal()}
    if len(sizes) < 2:
        return ""
    note = f"\nit is the first of {len(sizes)} GPUs, since CUDA_VISIBLE_DEVICES is not set"
    uuid, name = max(sizes, key=lambda gpu: sizes[gpu])
    if sizes[uuid, name] > free + 2**30:
        note += (
            f";\n{sizes[uuid, name] / 2**30:.1f} GiB are free on another one ({name}): "
            f"CUDA_VISIBLE_DEVICES={uuid} takes it"
        )
    return note


# What `accelerate launch` sets for these; Trainer would shard the model, or expect that it is.
SHARDED_BY = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def forget_other_launches() -> bool:
    """Return whether a launcher has started this process; remove what others left behind.

    These variables of other work, or of a configuration, would change this run. Raises UserError
    if a launcher asks for what this script does not do, instead of doing something else.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ
    for name, method in SHARDED_BY.items():
        if is_launched and os.environ.get(name, "").lower() in ("1", "true", "yes"):
            raise UserError(
                f"The launcher asks for {method} ({name} is set), which this script does not do: "
                "each GPU holds the whole model. Launch it with `accelerate launch --multi_gpu "
                "--num_processes N`, or with torchrun."
            )
    left_over = [name for name in os.environ if name.startswith("ACCELERATE_")]
    if not is_launched:
        left_over += ["RANK", "LOCAL_RANK", "WORLD_SIZE"]
    for name in left_over:
        os.environ.pop(name, None)
    return is_launched


def forbid_gpu_packages(names: tuple[str, ...] = ("fla", "causal_conv1d")) -> None:
    """Make packages unimportable.

    transformers uses them wherever they can be imported, also on a CPU or a GPU of a capability
    below 8.0, where their kernels crash.
    """
    for name in names:
        sys.modules[name] = None


# By then flash-linear-attention must have compiled its kernels and agreed with torch's code. The
# first time Triton compiles a dozen in many variants, which takes minutes; it keeps what it has
# compiled, so a second start gets further. The other processes of a launch wait for ten minutes.
SECONDS_FOR_FLA = 400
# How far fla's values and gradients may be from those of torch's code, as a share of their length.
# That code computes in float32. With its matrices multiplied in bfloat16, as fla has them, all six
# of its results were 0.28 to 0.42 % away (on a CPU, head size 128, 130 to 300 tokens, three seeds);
# fla's own tests allow up to 2 %.
MOST_FLA_APART = 0.02

FLA_IS_MISSING = "is not installed"
FLA_NEEDS_A_NEWER_GPU = "needs a GPU of capability 8.0 or newer"


def choose_delta_kernels(config: transformers.PretrainedConfig, dtype: str) -> str:
    """Return what computes a model's DeltaNet layers on this GPU, and why; "" if it has none.

    transformers decides this when it imports the model's code, which must not have happened yet: it
    takes fla where that can be imported, and torch's code where not. Broken or wrong kernels would
    be taken, or fall back, without a word.

    Args:
        config: the model's.
        dtype: the type of its weights.
    """
    if "linear_attention" not in layer_types(config):
        return ""
    place = accelerate.PartialState().device
    reason = why_not_try_fla(torch.cuda.get_device_capability(place), dtype)
    # The main process tries fla for all, so what it finds must hold for the others' GPUs.
    found = accelerate.utils.gather_object([(reason, torch.cuda.get_device_capability(place))])
    if len(set(found)) > 1:
        reason = "is not used where the GPUs or the packages of the processes differ"
    if not reason:
        reason = why_not_fla(config, place) if is_main_process() else ""
        (reason,) = accelerate.utils.broadcast_object_list([reason])  # all processes take part
    if reason:
        sys.modules["fla"] = None  # now it cannot be imported
        chosen = f"torch's code, since fla {reason}"
    else:
        chosen = f"fla, which agrees with torch's code within {MOST_FLA_APART:.0%} on this GPU"
    if reason == FLA_IS_MISSING:
        report(
            "faster",
            "without flash-linear-attention the DeltaNet layers take longer on this GPU; get it "
            "with\npip install flash-linear-attention",
        )
    elif reason != FLA_NEEDS_A_NEWER_GPU:
        report("kernels", textwrap.fill(f"the DeltaNet layers are computed by {chosen}", 88))
    return chosen


def why_not_try_fla(capability: tuple[int, int], dtype: str) -> str:
    """Return why fla need not be tried with a GPU of this capability, or ""."""
    if capability < (8, 0):
        return FLA_NEEDS_A_NEWER_GPU
    if dtype != "bfloat16":
        return f"is tried only with bfloat16, which its kernels are for, and not with {dtype}"
    is_there = importlib.util.find_spec("fla") is not None
    version, triton = version_of("fla-core"), version_of("triton")
    if capability[0] == 9 and is_there and version < (0, 5):
        # Some gradients are 1 to 5 % wrong, which a comparison might let pass.
        return "below version 0.5 has wrong gradients on Hopper GPUs (fla issue 640)"
    if capability[0] == 9 and version <= (0, 6, 0) and (3, 4) <= triton < (3, 7, 1):
        advice = "" if is_there else ", so installing it would not help"
        installed = ".".join(map(str, triton))
        return f"0.5.0 to 0.6.0 cannot train on a Hopper GPU with Triton {installed}{advice}"
    return "" if is_there else FLA_IS_MISSING


def version_of(package: str) -> tuple[int, ...]:
    """Return up to three numbers of a package's version; () if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return tuple(map(int, re.findall(r"\d+", importlib.metadata.version(package))[:3]))
    return ()


def why_not_fla(config: transformers.PretrainedConfig, place: torch.device) -> str:
    """Return why fla cannot be used for a model's DeltaNet layers on this GPU, or "".

    A process of its own tries it, since a kernel may crash, hang, or spoil the GPU's state.
    """
    code = "from __future__ import annotations\n" + inspect.getsource(compare_fla_with_torch)
    code += "compare_fla_with_torch()"
    text_config = config.get_text_config()
    module = type(text_config).__module__.replace(".configuration_", ".modeling_")
    # Kernels are compiled for a number of heads and for their sizes, so the model's are tried.
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    heads = [getattr(text_config, f"linear_{name}", 0) for name in names]  # 0 if it has others
    given = [module, place, MOST_FLA_APART, SECONDS_FOR_FLA, *heads]
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", code, *map(str, given)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its compilers can be ended with it
    )
    try:
        said, errors = child.communicate(timeout=SECONDS_FOR_FLA)
    except subprocess.TimeoutExpired:
        return f"was not ready after {SECONDS_FOR_FLA} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    found = re.search(r"^fla: (.*)\Z", said.strip(), re.MULTILINE)
    if child.returncode == 0 and found:
        return found[1].removeprefix("good")
    LOG.info(errors)
    return f"ended its trial with status {child.returncode} ({one_line(errors[-150:])})"


def compare_fla_with_torch() -> None:
    """Print "fla: good", or why it is not. This runs in a process of its own, see why_not_fla()."""
    import importlib
    import signal
    import sys

    import torch

    def results(function: typing.Any) -> list[torch.Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        query, key, value, g, beta = leaves
        out, _ = function(query, key, value, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
        (out.float() * weights).sum().backward()
        return [out.detach().float(), *(leaf.grad.float() for leaf in leaves)]

    module, device, limit, seconds, *heads = sys.argv[1:]
    key_heads, value_heads, key_size, value_size = map(int, heads)
    signal.alarm(int(seconds))  # whatever becomes of the process that waits
    try:
        torch.zeros(1, device=device)  # what fails here is not fla's fault
        importlib.import_module("fla")
        kernel = importlib.import_module(module).torch_chunk_gated_delta_rule
        # The decay is in float32, as Qwen3.5 has it. 200 tokens are three chunks of 64 and an
        # incomplete one.
        torch.manual_seed(0)
        keys, values = (1, 200, key_heads, key_size), (1, 200, value_heads)
        sizes = [keys, keys, (*values, value_size), values, values]
        tensors = [torch.randn(size).to(device, torch.bfloat16) for size in sizes]
        tensors[3] = -torch.nn.functional.softplus(tensors[3].float())
        tensors[4] = tensors[4].sigmoid()
        weights = torch.randn(sizes[2]).to(device)
        expected, found = results(kernel.__wrapped__), results(kernel)
        names = ["values", *(f"gradients of {name}" for name in ("q", "k", "v", "g", "beta"))]
        for name, right, its in zip(names, expected, found, strict=True):
            apart = ((its - right).norm() / right.norm()).item()
            if not apart <= float(limit):  # NaN is not, either
                print(f"fla: has {name} that are {apart:.1%} away from those of torch's code")
                return
        if all(map(torch.equal, expected, found)):
            print("fla: is not what transformers takes")
            return
    except Exception as error:  # whatever is wrong with it, it is not used
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if "busy or unavailable" in text:  # so CUDA says it (pytorch issues 3871, 100691)
            print(
                "fla: could not be tried: CUDA admits no second process to this GPU (nvidia-smi -q "
                "-d COMPUTE shows its mode; Exclusive_Process admits one, and Default several)"
            )
        else:
            print("fla: cannot be used:", text)
        return
    print("fla: good")


# ==== MODEL FILES: the base model, its tokenizer and its chat template, from the hub or a folder
#
# What is wrong with them is said before anything is trained. Only safetensors are loaded, and no
# code that a model brings along is run.


def read_model_files(job: Job) -> None:
    """Read all but the weights: which commit it is, the configuration, and the chat format."""
    settings = job.settings
    settings.MODEL_REVISION = commit_of(settings.MODEL_NAME, settings.MODEL_REVISION)
    job.config = load_config(settings.MODEL_NAME, settings.MODEL_REVISION)
    refuse_quantized(settings.MODEL_NAME, job.config)
    job.chat_format = load_chat_format(settings.MODEL_NAME, settings.MODEL_REVISION)
    if settings.DEVICE == "cuda" and not settings.dry_run:
        job.delta_kernels = choose_delta_kernels(job.config, settings.DTYPE)  # see DEVICE


def commit_of(model_name: str, revision: str) -> str:
    """Return the commit of a model's branch or tag on the hub; a folder's revision as it is."""
    if Path(model_name).is_dir():
        return revision
    with model_is_named(model_name):  # transformers alone retries an unknown name for 25 seconds
        return huggingface_hub.resolve_revision(model_name, revision=revision).resolved


def load_config(model_name: str, revision: str) -> transformers.PretrainedConfig:
    """Return a model's configuration, or raise UserError."""
    with model_is_named(model_name):
        return transformers.AutoConfig.from_pretrained(
            model_name, revision=revision, trust_remote_code=False
        )


def refuse_quantized(model_name: str, config: transformers.PretrainedConfig) -> None:
    """Raise UserError if a model is quantized, which is not trained here."""
    if "quantization_config" in config.to_dict():
        raise UserError(
            f"{model_name}: this model is quantized, which is not supported. Use the model that it "
            "was made from."
        )


def load_chat_format(model_name: str, revision: str, tokenizer_folder: str = "") -> ChatFormat:
    """Return how a model's conversations become tokens, or raise UserError.

    Args:
        model_name: a folder, or a name on the hub.
        revision: its commit there.
        tokenizer_folder: an adapter's own tokenizer; training takes the model's.
    """
    chosen = {"revision": revision, "trust_remote_code": False}
    where = {"trust_remote_code": False} if tokenizer_folder else chosen
    with model_is_named(model_name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            tokenizer_folder or model_name, **where
        )
        stop_token_ids = find_stop_token_ids(model_name, revision, tokenizer)
    if not tokenizer.chat_template or not stop_token_ids:
        raise UserError(
            f"{model_name}: its tokenizer has no chat template or no end-of-turn token. Use a "
            "model that was trained to chat, such as Qwen/Qwen3.5-4B."
        )
    return ChatFormat(tokenizer, stop_token_ids)


def find_stop_token_ids(
    model_name: str, revision: str, tokenizer: transformers.PreTrainedTokenizerBase
) -> list[int]:
    """Return the tokens at which the model stops: the tokenizer's end, and the configuration's.

    Gemma's tokenizer ends with <eos>, but its turns with <end_of_turn>; generation_config.json has
    both.
    """
    try:
        config = transformers.GenerationConfig.from_pretrained(model_name, revision=revision)
    except OSError:  # a model need not have one
        config = transformers.GenerationConfig()
    more = config.eos_token_id
    ends = [tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
    return [end for end in dict.fromkeys(ends) if end is not None]


def load_model(
    model_name: str, revision: str, dtype: str, device: torch.device
) -> transformers.PreTrainedModel:
    """Return the base model's text part, loaded straight onto the device.

    Raises UserError if the weights cannot be had, do not fit, or if the files lack some of them.
    """
    full: list[str] = []

    def is_shown(record: logging.LogRecord) -> bool:
        """Note a report that the memory is full, which transformers gives for each weight."""
        if "out of memory" in record.getMessage():
            full.append(record.getMessage())
        return not full

    loader = logging.getLogger("transformers.modeling_utils")
    loader.addFilter(is_shown)
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            model_name,
            revision=revision,
            dtype=dtype,
            device_map={"": device} if device.type == "cuda" else None,  # no copy in main memory
            trust_remote_code=False,
            use_safetensors=True,  # a pickle could run code
            output_loading_info=True,
        )
    except (OSError, RuntimeError, safetensors.SafetensorError, HTTPError) as error:
        if full or is_out_of_memory(error):
            raise UserError(
                f"{model_name}: the weights do not fit in the GPU's free memory. Stop other "
                "programs on this GPU (nvidia-smi lists them), or use one with more memory."
            ) from error
        raise UserError(
            f"{model_name}: the weights cannot be loaded ({one_line(error)}). Whole safetensors "
            "files are needed; run the command again to go on downloading."
        ) from error
    finally:
        loader.removeFilter(is_shown)
    if found["missing_keys"]:  # transformers would go on with random numbers in their place
        missing = join_limited(sorted(found["missing_keys"]), 3, ", ")
        raise UserError(f"{model_name}: the files lack the weights {missing}.")
    return model


@contextlib.contextmanager
def model_is_named(model_name: str) -> Iterator[None]:
    """Turn the errors of loading a model's small files into a message that names the model."""
    try:
        yield
    except RevisionResolutionError as error:
        raise UserError(
            f"The Hugging Face hub cannot be reached, and {model_name} is not stored on this "
            "machine. Check the network, or give a local folder."
        ) from error
    except (OSError, ValueError, HTTPError) as error:
        if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
            raise UserError(
                f"{model_name} is a gated model: accept its licence at "
                f"https://huggingface.co/{model_name}, then log in with `hf auth login`."
            ) from error
        raise UserError(
            f"{model_name}: there is no such model, or it cannot be reached ({one_line(error)}). "
            "Check the name, the folder or the network."
        ) from error


# ==== DATA: reading the conversations, checking every line, and holding a part out
#
# A file holds one conversation a line (JSONL), or all of them in one JSON array. A conversation has
# one of four formats:
#     {"prompt": [messages], "completion": [one message]}     teaches the completion alone
#     {"messages": [messages]}                                teaches each reply of the assistant;
#                                                             with REPLIES "last" only the last one
#     {"conversations": [{"from": "human", "value": ...}]}    ShareGPT: as "messages"
#     {"instruction": ..., "input": ..., "output": ...}       Alpaca: teaches the output
# A message has a "role" and a "content", and no other keys. At most one system message comes first,
# which may also be the line's key "system"; then user and assistant take turns, and a reply comes
# last. "tools" and "functions" are refused. All other keys of a line are ignored, and everywhere
# those whose value is null. Dumps in ShareGPT's format often begin with a greeting of the
# assistant, or end with a question that has no reply. There these are left out and counted; in
# "messages" they are an error.
#
# Every line of both files is checked, and all problems are reported together, equal ones once; then
# nothing is trained. With an EVAL_FILE like "10%" hold_out() chooses the held-out conversations. If
# TRAIN_FILE grows later, others may be chosen: then a new run may learn what an earlier one held
# out, so compare the two on a file of its own.


def read_data(job: Job) -> None:
    """Read, check and render all conversations; raise UserError with what is wrong with any."""
    settings = job.settings
    train, held_out, problems = read_both_files(job)
    chat_format, limit = job.chat_format, settings.MAX_SEQ_LEN
    job.examples, more = encode(train, chat_format, limit, "training examples")
    job.held_out, still_more = encode(held_out, chat_format, limit, "held-out examples")
    # A conversation of several replies would be named for each of them.
    problems = [*dict.fromkeys(problems + more + still_more)]
    if problems:
        raise UserError(
            f"{problems_as_text(problems)}\n"
            f"The data has {pluralize(len(problems), 'problem')}, so nothing was trained."
        )
    warn_of_shipped_eval_file(settings)
    warn_of_missing_system_messages(train)
    warn_of_repeats(job.examples, job.held_out)
    warn_of_the_date(job)
    warn_of_the_window(job)
    job.data = {
        "train": facts_of(
            settings.TRAIN_FILE, job.examples, file_sha256(Path(settings.TRAIN_FILE))
        ),
        "held_out": facts_of_held_out(job),
    }
    report_tokens(job)
    show_example(job.examples[0], job.chat_format.tokenizer)


@dataclass
class Example:
    """A reply to train on, and the conversation that leads to it."""

    source: str  # file:line
    messages: list[dict[str, str]]  # up to and including the reply
    row: dict[str, Any] = field(default_factory=dict)  # the conversation as it is in the file
    prompt_ids: list[int] = field(default_factory=list)  # tokens that are only read
    reply_ids: list[int] = field(
        default_factory=list
    )  # the target tokens, with the one that ends the turn

    @property
    def input_ids(self) -> list[int]:
        """All tokens, as the model sees them."""
        return self.prompt_ids + self.reply_ids

    @property
    def system_message(self) -> str:
        """The text of the system message, or an empty one."""
        first = self.messages[0]
        return first["content"] if first["role"] == "system" else ""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line, or with a file."""

    source: str  # file, or file:line
    text: str


COMPLETION, SHAREGPT, ALPACA = (
    ("prompt", "completion"),
    ("conversations",),
    ("instruction", "output"),
)
DATA_FORMATS = (("messages",), COMPLETION, SHAREGPT, ALPACA)
CONVERSATION_KEYS = {key for keys in DATA_FORMATS for key in keys} | {"system", "input"}
FORMAT_RULE = (
    'write {"prompt": [messages], "completion": [one message]} or {"messages": [messages]}; '
    "docs/data.md shows all four formats"
)
MESSAGE_RULE = 'a message is {"role": "system", "user" or "assistant", "content": "some text"}'


def read_both_files(job: Job) -> tuple[list[Example], list[Example], list[Problem]]:
    """Return the examples to learn, those held out, and what is wrong with any line."""
    settings = job.settings
    train, problems = read_conversations(settings.TRAIN_FILE, settings.REPLIES)
    held_out: list[Example] = []
    percent = held_out_percent(settings.EVAL_FILE)
    if percent and not problems:
        train, held_out = hold_out(train, percent, settings.TRAIN_FILE)
        rows = {example.source: example.row for example in held_out}
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows.values())
        # Half a character becomes the escape that JSON has for it.
        job.held_out_content = text.encode(errors="backslashreplace")
    elif settings.EVAL_FILE and not percent:
        held_out, more = read_conversations(settings.EVAL_FILE, settings.REPLIES)
        problems += more
    return train, held_out, problems


def read_conversations(
    path: str, replies: str = "all", accepts_thinking: bool = False
) -> tuple[list[Example], list[Problem]]:
    """Return a file's examples, and what is wrong with every line that is not as it should be.

    Raises UserError if the file cannot be read, or is empty.

    Args:
        path: a file of one JSON object a line, or of one JSON array.
        replies: "all" or "last", what a conversation with several replies teaches.
        accepts_thinking: take replies with a <think> part, too. Training does not; whoever
            measures an adapter of another trainer may.
    """
    shown = path_from_here(path)
    examples: list[Example] = []
    problems: list[Problem] = []
    shortened = 0
    for source, text in entries_of(path, shown).items():
        try:
            row = parse_row(text)
            data_format, messages = messages_of(
                {key: row[key] for key in row if row[key] is not None}
            )
            if data_format == SHAREGPT:
                answered = from_question_to_reply(messages)
                shortened += len(answered) < len(messages)
                messages = answered
            messages = check_messages(messages, accepts_thinking)
            teaches_one = data_format in (COMPLETION, ALPACA)
            examples += examples_of(messages, source, row, "last" if teaches_one else replies)
        except RecursionError:
            problems.append(Problem(source, f"the JSON is nested too deeply; {FORMAT_RULE}"))
        except ValueError as error:
            problems.append(Problem(source, str(error)))
    if not examples and not problems:
        raise UserError(f"{path} holds no conversations; {FORMAT_RULE}.")
    if not problems:
        conversations = len({example.source for example in examples})
        text = f"{shown}: {pluralize(conversations, 'conversation')}"
        if len(examples) > conversations:
            text += f" with {len(examples):,} replies to learn"
        if shortened:
            text += f"; in {shortened:,} of them a greeting or a question that has no reply\n"
            text += "is left out"
        report("data", text)
    return examples, problems


def entries_of(path: str, shown: str) -> dict[str, bytes]:
    """Return {where it is: its JSON} of each line that is not blank, or of each array entry.

    Args:
        path: the file.
        shown: its name in messages.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path} is not a file.")
    try:
        content = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except FileNotFoundError as error:
        where = "" if Path(path).is_absolute() else f" (in {Path.cwd()})"
        raise UserError(f"There is no file {path}{where}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    if content.lstrip().startswith(b"["):
        return entries_of_array(content, shown)
    lines = enumerate(content.split(b"\n"), 1)
    return {f"{shown}:{number}": line for number, line in lines if line.strip()}


def entries_of_array(content: bytes, shown: str) -> dict[str, bytes]:
    """Return {where it is: its JSON} of each entry of a JSON array, or raise UserError."""
    try:
        rows = json.loads(content.decode(), object_pairs_hook=object_with_unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{shown} begins like a JSON array, but cannot be read as one ({one_line(error)})."
        ) from error
    return {
        f"{shown}, entry {number}": json.dumps(row).encode() for number, row in enumerate(rows, 1)
    }


def parse_row(text: bytes) -> dict[str, Any]:
    """Return a conversation's JSON object, or raise ValueError."""
    try:
        # Concatenated files may each start with a byte order mark.
        row = json.loads(text.decode("utf-8-sig"), object_pairs_hook=object_with_unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"this is not UTF-8 (byte {error.start + 1}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Expecting ',' delimiter":
            hint = " (often a quotation mark within the text lacks its backslash)"
        if not text.lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):  # such as CSV
            hint = f"; {FORMAT_RULE}"
        raise ValueError(
            f"this is not JSON: {error.msg} at character {error.colno}{hint}"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"this is not an object but {shown_value(row)}; {FORMAT_RULE}")
    return row


def object_with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dictionary, or raise ValueError if a key occurs twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown_value(key)} occurs twice in one object; remove one")
        found[key] = value
    return found


def messages_of(row: dict[str, Any]) -> tuple[tuple[str, ...], list[Any]]:
    """Return a conversation's format and its messages, or raise ValueError."""
    for key in ("tools", "functions"):
        if key in row:
            raise ValueError(f'this script does not train the use of tools; remove the key "{key}"')
    found = [keys for keys in DATA_FORMATS if all(key in row for key in keys)]
    if len(found) != 1:
        names = " and ".join(key for keys in found for key in keys)
        names = names or ", ".join(shown_value(key) for key in list(row)[:5]) or "nothing"
        raise ValueError(f"the line has {names}; {FORMAT_RULE}")
    data_format = found[0]
    messages = (
        messages_of_alpaca(row) if data_format == ALPACA else messages_in_lists(row, data_format)
    )
    if data_format == SHAREGPT:
        messages = [message_of_sharegpt(one) for one in messages]
    if row.get("system", "") != "":
        messages.insert(0, {"role": "system", "content": row["system"]})
    return data_format, messages


def messages_in_lists(row: dict[str, Any], data_format: tuple[str, ...]) -> list[Any]:
    """Return the messages that a line has in the lists of its format."""
    messages: list[Any] = []
    for key in data_format:
        if not isinstance(row[key], list) or not row[key]:
            raise ValueError(f'"{key}" is {shown_value(row[key])}; {FORMAT_RULE}')
        messages += row[key]
    if data_format == COMPLETION and len(row["completion"]) != 1:
        raise ValueError(
            f'"completion" holds {len(row["completion"])} messages; write only the last reply '
            'there, and what comes before it in "prompt"'
        )
    return messages


def messages_of_alpaca(row: dict[str, Any]) -> list[Any]:
    """Return the messages of a line in the Alpaca format; its input follows the instruction."""
    if row.get("history"):
        raise ValueError('the key "history" is not understood; write it as "messages"')
    asked = [row["instruction"], row.get("input", "")]
    question: Any = asked  # a list, which the check of the messages refuses
    if all(isinstance(text, str) for text in asked):
        question = "\n".join(asked).strip()
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant",
    "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant",
}  # fmt: skip


def message_of_sharegpt(turn: Any) -> Any:
    """Return a message of the ShareGPT format with "role" and "content"; an unknown role stays."""
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        return turn
    if "role" in turn or "content" in turn:
        return turn  # nobody knows which of them counts, so the check will refuse it
    sender = turn["from"]
    role = SHAREGPT_ROLES.get(sender, sender) if isinstance(sender, str) else sender
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": role, "content": turn["value"], **others}


def from_question_to_reply(messages: list[Any]) -> list[Any]:
    """Return messages without replies that answer nobody, and without questions nobody answers."""
    roles = [message.get("role") if isinstance(message, dict) else "" for message in messages]
    first = 1 if roles[:1] == ["system"] else 0
    begin, end = first, len(roles)
    while begin < end and roles[begin] == "assistant":
        begin += 1
    while begin < end and roles[end - 1] == "user":
        end -= 1
    return messages[:first] + messages[begin:end]


def check_text(text: str) -> str:
    """Return a message's text, or raise ValueError if it is empty or cannot be tokenized."""
    if not text.strip():
        raise ValueError("is empty; write it, or remove the line")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(
            r"holds half a character (a lone surrogate such as \ud83d); write the whole character"
        )
    return text


class Message(pydantic.BaseModel):
    """A message as it must be."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, pydantic.AfterValidator(check_text)]


MESSAGES = pydantic.TypeAdapter(list[Message])


def check_messages(messages: list[Any], accepts_thinking: bool = False) -> list[dict[str, str]]:
    """Return messages that form a conversation which ends with a reply, or raise ValueError."""
    cleaned = [
        {key: value for key, value in message.items() if value is not None}
        if isinstance(message, dict)
        else message
        for message in messages
    ]
    try:
        MESSAGES.validate_python(cleaned)
    except pydantic.ValidationError as error:
        raise ValueError(message_error(error.errors()[0])) from error
    check_order([message["role"] for message in cleaned])
    for number, message in enumerate(cleaned, 1):
        has_thoughts = re.search("</?think>", message["content"])
        if message["role"] == "assistant" and has_thoughts and not accepts_thinking:
            raise ValueError(
                f"message {number} holds a <think> tag, but the model will answer without "
                "thinking; remove the tag and what is in it"
            )
    return cleaned


def message_error(error: Any) -> str:
    """Return what pydantic found wrong with a message, as a sentence that says what to write."""
    number, *key = error["loc"]
    where = f"message {number + 1}" + "".join(f', "{name}"' for name in key)
    if error["type"] == "value_error":
        return f"{where} {error['ctx']['error']}"
    found = "" if error["type"] == "missing" else f", and it is {shown_value(error['input'])}"
    return f"{where}: {error['msg']}{found}; {MESSAGE_RULE}"


def check_order(roles: list[str]) -> None:
    """Raise ValueError unless at most one system message comes first, and then turns are taken."""
    turns = roles[1:] if roles[:1] == ["system"] else roles
    offset = len(roles) - len(turns) + 1
    if "system" in turns:
        place = turns.index("system") + offset
        raise ValueError(f"message {place} is a system message; only the first one may be")
    if not turns or turns == ["assistant"]:
        raise ValueError("there is no question with a reply; write a user's message and its reply")
    if turns[0] == "assistant":
        raise ValueError("a reply comes before the first question; remove it")
    for place, (one, after) in enumerate(itertools.pairwise(turns), offset):
        if one == after:
            raise ValueError(
                f"messages {place} and {place + 1} are both the {one}'s; join them, or write what "
                "is missing between them"
            )
    if turns[-1] == "user":
        raise ValueError(
            "the last message is the user's, so the reply to learn is missing; add it, or remove "
            "that message"
        )


def examples_of(
    messages: list[dict[str, str]], source: str, row: dict[str, Any], replies: str
) -> list[Example]:
    """Return an example for each reply of a conversation, or for the last one alone."""
    places = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if replies == "last":
        places = places[-1:]
    return [Example(source, messages[: place + 1], row) for place in places]


def problems_as_text(problems: list[Problem]) -> str:
    """Return the first problem of each kind, with the first places where the kind occurs.

    Problems that differ only in their numbers and in what they quote are of one kind.
    """
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(re.sub(r'\d+|"[^"]*"', "", problem.text), []).append(problem)
    return join_limited(
        [
            f"{join_limited([one.source for one in kind], 3, ', ')}: {kind[0].text}"
            for kind in kinds.values()
        ]
    )


def shown_value(value: Any) -> str:
    """Return a value of the data as JSON, shortened."""
    return one_line(json.dumps(value, ensure_ascii=False, default=str), 60)


def warn_of_shipped_eval_file(settings: argparse.Namespace) -> None:
    """Warn if a user's own conversations would be judged by the shipped ones."""
    shipped_train, shipped_eval = (HERE / "data" / f"{name}.jsonl" for name in ("train", "eval"))
    is_own = not is_same_file(settings.TRAIN_FILE, str(shipped_train))
    if is_own and is_same_file(settings.EVAL_FILE, str(shipped_eval)):
        report(
            "warning",
            f"EVAL_FILE is still {settings.EVAL_FILE}, the shipped conversations, which may be of "
            'another\nvoice than yours; "10%" would hold out a tenth of TRAIN_FILE',
        )


def warn_of_missing_system_messages(examples: list[Example]) -> None:
    """Warn if some conversations have a system message, and others have none."""
    system_messages = {example.source: example.system_message for example in examples}
    without = [source for source, text in system_messages.items() if not text]
    if without and len(without) < len(system_messages):
        report(
            "warning",
            f"{len(without):,} of {len(system_messages):,} conversations have no system message "
            f"(such as {without[0]}),\nand the others have one. The model's chat template may add "
            "one of its own to these.\nGive every conversation the system message that you will "
            "serve with, or give it to none.",
        )


def warn_of_repeats(train: list[Example], held_out: list[Example]) -> None:
    """Print the held-out prompts that are trained on as well, and how many of the replies are."""
    trained: dict[str, str] = {}
    for example in train:
        trained.setdefault(repr(example.messages[:-1]), example.source)
    notes: list[str] = []
    for example in held_out:
        twin = trained.get(repr(example.messages[:-1]))
        if twin:
            notes.append(
                f"{example.source} has the same prompt as {twin}, so its reply tests nothing new"
            )
    if notes:
        report("warning", join_limited([*dict.fromkeys(notes)]))
    replies = {example.messages[-1]["content"].strip() for example in train}
    known = [one for one in held_out if one.messages[-1]["content"].strip() in replies]
    if 10 * len(known) > len(held_out):
        report(
            "warning",
            f"{len(known):,} of {len(held_out):,} held-out replies also stand in training data, "
            "word for word.\nSo the held-out loss says how well these are remembered.",
        )


def held_out_percent(eval_file: str) -> int:
    """Return the percentage of an EVAL_FILE like "10%", or 0 for the name of a file."""
    found = re.fullmatch(r"(\d+)\s*%", eval_file)
    return int(found[1]) if found else 0


FEWEST_HELD_OUT = 20  # conversations; the mean of fewer says little


def hold_out(
    examples: list[Example], percent: int, path: str
) -> tuple[list[Example], list[Example]]:
    """Return the examples to learn and those held out, so many per cent of the conversations.

    Conversations that begin with the same system message and the same question are versions or
    parts of one, so they go to the same side. Which are held out follows from a hash of how they
    begin, and neither from SEED nor from the order of the lines: runs with other seeds are compared
    on the same ones. A beginning that more than a twentieth of the file shares stays in training.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for source, messages in {example.source: example.messages for example in examples}.items():
        question = next(one["content"] for one in messages if one["role"] == "user")
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        groups.setdefault((system.strip(), question.strip()), []).append(source)
    count = sum(len(places) for places in groups.values())
    wanted = max(FEWEST_HELD_OUT, math.ceil(count * percent / 100))
    held_out: set[str] = set()
    for beginning in sorted(groups, key=number_drawn_for):
        if len(held_out) >= wanted:
            break
        if len(groups[beginning]) <= count / 20:
            held_out.update(groups[beginning])
    if min(len(held_out), count - len(held_out)) < FEWEST_HELD_OUT:
        raise UserError(
            f'EVAL_FILE "{percent}%": of the {pluralize(count, "conversation")} in {path}, '
            f"{len(held_out):,} can be held out, and that leaves {count - len(held_out):,} to "
            f"train on. Each side needs {FEWEST_HELD_OUT}. (Conversations that begin alike stay "
            "together, and stay in training if they are more than a twentieth.) Add more, or set "
            "EVAL_FILE to a file of your own."
        )
    reason = "chosen by a hash of how they begin; they are not trained on"
    if wanted > math.ceil(count * percent / 100):
        reason += f"\n({percent}% would be too few to measure with, so {FEWEST_HELD_OUT} are taken)"
    report("held out", f"{len(held_out):,} of the {count:,} conversations, {reason}")
    return (
        [example for example in examples if example.source not in held_out],
        [example for example in examples if example.source in held_out],
    )


def number_drawn_for(beginning: tuple[str, str]) -> str:
    """Return a number that is drawn for a conversation's beginning, always the same one."""
    return hashlib.sha256(repr(("held out", beginning)).encode(errors="replace")).hexdigest()


# ==== TOKENS: what the model sees, and which tokens are targets
#
# A conversation is rendered by the model's own chat template, as a server renders it. The prompt is
# rendered with the generation prompt and must be the beginning of the whole; what comes after it is
# the reply. So the targets are found by the prompt's length, and not by generation markers in the
# template. They end with the token that ends the turn. With thinking off, Qwen's empty think block
# belongs to the prompt. "messages" with three replies are three examples: each reply is a target
# once, after all that was said before it.
# An example that is longer than MAX_SEQ_LEN is left out and named; it is never cut. If more than a
# tenth of a file is too long, the run is refused.


@dataclass
class ChatFormat:
    """How a model's conversations become tokens: here, in a chat, and on a server."""

    tokenizer: transformers.PreTrainedTokenizerBase
    stop_token_ids: list[int]  # the tokens at which the model stops
    enable_thinking: bool = False  # the server's command that is printed has it, too

    @functools.cached_property
    def special_tokens(self) -> list[str]:
        """The tokens that no text may hold, such as the one at which the model stops."""
        added = self.tokenizer.added_tokens_decoder.values()  # slow: Gemma has 6,384
        return [str(token) for token in added if token.special]

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens of a conversation that the model is to reply to."""
        return self.ids_of(self.text(messages, add_generation_prompt=True))

    def text(self, messages: list[dict[str, str]], **how: Any) -> str:
        """Return a conversation as the model's chat template writes it."""
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, enable_thinking=self.enable_thinking, **how
        )

    def ids_of(self, text: str) -> list[int]:
        """Return the tokens of a text in which the template has put all that is needed."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def stop_token_names(self) -> str:
        """Return the tokens at which the model stops, by name."""
        return " or ".join(self.tokenizer.convert_ids_to_tokens(self.stop_token_ids))


def encode(
    examples: list[Example],
    chat_format: ChatFormat,
    max_seq_len: int | None,
    kind: str = "examples",
) -> tuple[list[Example], list[Problem]]:
    """Return one file's examples that fit, with their tokens, and what is wrong with the others.

    Too long examples are left out by name. Truncating them instead would drop the end-of-turn
    token, and teach the model not to stop.

    Args:
        examples: all of the file.
        chat_format: how they become tokens.
        max_seq_len: the most tokens that an example may have. Training always has a limit.
        kind: what they are called, so that messages on both halves of one file stay two.
    """
    rendered: list[Example] = []
    problems: list[Problem] = []
    for example in tqdm(examples, "rendering", leave=False, disable=None, unit=" examples"):
        try:
            example.prompt_ids, example.reply_ids = render(example.messages, chat_format)
            rendered.append(example)
        except ValueError as error:
            problems.append(Problem(example.source, str(error)))
    lengths = sorted(len(example.input_ids) for example in rendered)
    limit = max_seq_len or max(lengths, default=0)
    too_long = [example for example in rendered if len(example.input_ids) > limit]
    if too_long:
        text = f"{len(too_long):,} of {len(examples):,} {kind} are longer than MAX_SEQ_LEN "
        text += f"{limit:,}; "
        if len(too_long) > len(examples) / 10:
            most_kept = max(limit, lengths[-1 - len(lengths) // 10])
            text += f"{most_kept:,} would keep nine tenths of all, and {lengths[-1]:,} would keep "
            text += "every one"
            problems.append(Problem(too_long[0].source, text))
        else:
            named = [f"{example.source}: {len(example.input_ids):,} tokens" for example in too_long]
            report("left out", f"{text}{lengths[-1]:,} would keep all\n{join_limited(named)}")
    return [example for example in rendered if len(example.input_ids) <= limit], problems


# What a chat template raises: jinja's errors, and Python's at 1 / 0, range(10**9) and 1 + "a".
TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, TypeError)


def render(messages: list[dict[str, str]], chat_format: ChatFormat) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt and of the reply, or raise ValueError.

    The prompt is rendered as a server renders it before it generates. It must be the beginning of
    the whole conversation; otherwise the model would be trained on a text that it never meets.
    """
    said = "\n".join(message["content"] for message in messages)
    for token in chat_format.special_tokens:
        if token in said:
            raise ValueError(f"the text holds the special token {token}; reword or remove it")
    has_system = messages[0]["role"] == "system"
    without = "; without a system message it may do so" if has_system else ""
    try:
        prompt = chat_format.prompt_ids(messages[:-1])
        text = chat_format.text(messages)
    except TEMPLATE_ERRORS as error:
        raise ValueError(
            f"the model's chat template refuses the conversation ({one_line(error)}){without}"
        ) from error
    for message in messages:
        spoken = message["content"].rpartition("</think>")[2]  # thoughts may be left out
        if spoken.strip() not in text:
            raise ValueError(
                f"the model's chat template leaves out what the {message['role']} says, or changes "
                "it; use another model, or a local copy with another chat template"
            )
    whole = chat_format.ids_of(text)
    reply = whole[len(prompt) :]
    if prompt + reply != whole:
        raise ValueError(
            "the model's chat template renders the prompt differently once the reply follows, so "
            "training would not equal serving; use another model, or a local copy with another "
            "chat template"
        )
    ends = [place for place, token in enumerate(reply) if token in chat_format.stop_token_ids]
    if not ends:
        raise ValueError(
            f"the model's chat template does not end the reply with "
            f"{chat_format.stop_token_names()}, so the model would not learn to stop; use "
            "another model, or name the token "
            "that ends a reply as eos_token_id in generation_config.json of a local copy"
        )
    return prompt, reply[: ends[0] + 1]  # without the newline that follows it


def warn_of_the_date(job: Job) -> None:
    """Warn if the chat template asks for the date, as Llama 3.2's does."""
    if "strftime_now(" in job.chat_format.tokenizer.get_chat_template():
        report(
            "warning",
            f"the chat template of {job.settings.MODEL_NAME} prints today's date, so tomorrow's "
            "tokens\nwill differ, and a run that is stopped today cannot be resumed then. Finish "
            "it today, or\ntrain a local copy of the model, with a fixed date in quotes in its "
            "chat template instead\nof strftime_now(...).",
        )


def warn_of_the_window(job: Job) -> None:
    """Warn if examples are, or may be, longer than what the model was made for."""
    window = getattr(job.config.get_text_config(), "max_position_embeddings", None)
    limit = job.settings.MAX_SEQ_LEN
    if not window or limit <= window:
        return
    long = [one for one in job.examples + job.held_out if len(one.input_ids) > window]
    text = (
        f"MAX_SEQ_LEN {limit:,} is more than the {window:,} tokens that the model was made for\n"
        "(max_position_embeddings in its config.json)"
    )
    if long:
        text += f"; of the examples {len(long):,} are longer, such as {long[0].source}"
    report("warning", text)


def facts_of(path: str, examples: list[Example], sha256: str) -> dict[str, Any]:
    """Return what run.json says of a data file: its name, its hash and its counts."""
    return {
        "file": path,
        "sha256": sha256,
        "examples": len(examples),
        "tokens": sum(len(example.input_ids) for example in examples),
        "learned_tokens": sum(len(example.reply_ids) for example in examples),
    }


def facts_of_held_out(job: Job) -> dict[str, Any] | None:
    """Return what run.json says of the held-out file, if there is one."""
    if not job.held_out:
        return None
    if not job.held_out_content:
        path = job.settings.EVAL_FILE
        return facts_of(path, job.held_out, file_sha256(Path(path)))
    sha256 = hashlib.sha256(job.held_out_content).hexdigest()
    return facts_of(str(job.output / "held_out.jsonl"), job.held_out, sha256)


def report_tokens(job: Job) -> None:
    """Print the lengths of the examples, and how many tokens training would send through."""
    columns = "{:<26}{:>9}{:>8}{:>8}{:>11}{:>20}".format
    lines = [columns("", "examples", "median", "longest", "tokens", "of which targets")]
    for facts, examples in (
        (job.data["train"], job.examples),
        (job.data["held_out"], job.held_out),
    ):
        if not examples:
            continue
        lengths = [len(example.input_ids) for example in examples]
        share = facts["learned_tokens"] / facts["tokens"]
        lines.append(
            columns(
                path_from_here(facts["file"]),
                f"{len(examples):,}",
                f"{statistics.median(lengths):,.0f}",
                f"{max(lengths):,}",
                f"{facts['tokens']:,}",
                f"{facts['learned_tokens']:,} ({share:.0%})",
            )
        )
    steps, steps_per_epoch = count_steps(len(job.examples), job.settings)
    tokens = round(job.data["train"]["tokens"] * steps / steps_per_epoch)
    about = "about " if steps % steps_per_epoch else ""
    lines.append(f"all steps together train on {about}{tokens:,} tokens")
    report("tokens", "\n".join(lines))


SHOWN_LINES = 15  # of a long example, at its beginning and at its end


def show_example(example: Example, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Print an example as the model sees it, with the target tokens between >>> and <<<."""
    prompt, reply = tokenizer.decode(example.prompt_ids), tokenizer.decode(example.reply_ids)
    lines = [f"{example.source} as the model sees it; only the text between >>> <<< is a target:"]
    for line in f"{prompt}>>>{reply}<<<".split("\n"):
        lines += textwrap.wrap(line, 90) or [""]
    if len(lines) > 2 * SHOWN_LINES:
        left_out = len(lines) - 2 * SHOWN_LINES
        middle = [f"[{pluralize(left_out, 'line')} left out here]"]
        lines = lines[:SHOWN_LINES] + middle + lines[-SHOWN_LINES:]
    report("example", "\n".join(lines))


def to_dataset(examples: list[Example]) -> datasets.Dataset:
    """Return what SFTTrainer takes as it is; a label of -100 is no target."""
    return datasets.Dataset.from_list(
        [
            {
                "input_ids": example.input_ids,
                "labels": [-100] * len(example.prompt_ids) + example.reply_ids,
            }
            for example in examples
        ]
    )


# ==== PLAN: which matrices are trained, and in how many steps
#
# Before any weights are loaded, PEFT puts LoRA into a copy of the model on the meta device, and
# what it would train is read off there.
#
# A misspelt target, such as q_projj, ends the run here, also with --dry_run. The message names it
# and the names that exist. PEFT alone would ignore it as long as another target exists. Only
# "all-linear" and regular expressions are left to PEFT's own check.
#
# An epoch has ceil(examples / (BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS)) steps. With the settings
# as shipped and 1,000 examples these are 250, so three epochs have 750.


# These start from a changed W, so the adapter would only fit this run's copy of the base model.
CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def make_plan(job: Job) -> Plan:
    """Put LoRA into a model on the meta device; check and print what it would train."""
    settings = job.settings
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(job.config, trust_remote_code=False)
    config = lora_config(settings)
    refuse_unsupported(config)
    refuse_unknown_targets(config, model)
    try:
        with warnings.catch_warnings():
            # PEFT only warns of a pattern's key that matches no layer, and ignores it. (It writes
            # such keys itself where the experts of a mixture are fused.)
            if config.rank_pattern or config.alpha_pattern:
                warnings.filterwarnings("error", "The following .*_pattern keys", RuntimeWarning)
            peft.inject_adapter_in_model(config, model)
    except (ValueError, RuntimeWarning) as error:
        raise UserError(f"LoraConfig: PEFT refuses it: {one_line(error, 2000)}") from error
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    steps, steps_per_epoch = count_steps(len(job.examples), settings)
    max_rank = max((max(layer.r.values()) for layer in lora_layers(model).values()), default=0)
    plan = Plan(
        trainable=sum(weight.numel() for weight in trained.values()),
        total=sum(weight.numel() for weight in model.parameters()),
        trainable_shapes={name: tuple(weight.shape) for name, weight in trained.items()},
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        max_rank=max_rank,
        vllm_refuses=why_vllm_refuses(config, max_rank),
    )
    if not plan.vllm_refuses and is_multimodal(job.config):
        planned = {
            name_in_multimodal_model(f"base_model.model.{name}".replace(".default.", ".")): weight
            for name, weight in trained.items()
        }
        try:
            refuse_patterns_of_paths(config)
            check_names_for_vllm(planned, job.config)
        except UserError as error:
            plan.vllm_refuses = str(error)
    report_plan(job, plan, config, model)
    return plan


def examples_per_step(settings: argparse.Namespace) -> int:
    """Return the number of examples in one optimizer step."""
    return settings.BATCH_SIZE * settings.GRADIENT_ACCUMULATION_STEPS


def count_steps(examples: int, settings: argparse.Namespace) -> tuple[int, int]:
    """Return how many steps so many examples take, in all and in an epoch."""
    steps_per_epoch = math.ceil(examples / examples_per_step(settings))
    steps = steps_per_epoch * settings.NUM_EPOCHS
    if settings.MAX_STEPS:
        steps = min(steps, settings.MAX_STEPS)
    return steps, steps_per_epoch


def lora_layers(model: torch.nn.Module) -> dict[str, peft.tuners.lora.LoraLayer]:
    """Return {path: module} of the modules that LoRA was added to."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def refuse_unsupported(config: peft.LoraConfig) -> None:
    """Raise UserError if LoraConfig asks for something whose result would not be what it seems."""
    start = str(config.init_lora_weights).lower()
    refusals = [
        (
            start.startswith(CHANGES_THE_BASE),
            f'init_lora_weights="{config.init_lora_weights}" changes the frozen weights, so the '
            'saved adapter would not fit the base model; use True, "gaussian" or "orthogonal"',
        ),
        (
            start == "eva",
            'init_lora_weights="eva" needs data before it can begin, which it does not get here; '
            'use True, "gaussian" or "orthogonal"',
        ),
        (
            config.bias != "none",  # PEFT's disable_adapter() and unload() keep trained biases
            f'bias="{config.bias}" trains biases, which stay changed where the adapter is switched '
            'off, so nothing could be compared with the base model; use "none"',
        ),
        (
            bool(config.layer_replication),
            "layer_replication builds another model than the one that is served; remove it",
        ),
    ]
    for applies, reason in refusals:
        if applies:
            raise UserError(f"LoraConfig: {reason}.")


def refuse_unknown_targets(config: peft.LoraConfig, model: torch.nn.Module) -> None:
    """Raise UserError if a target matches no module; PEFT is silent if another one matches."""
    if not isinstance(config.target_modules, (list, set)):
        return  # "all-linear", or a regular expression; PEFT raises if it matches nothing
    if "lm_head" in config.target_modules:
        raise UserError(
            "LORA_TARGET_MODULES: lm_head cannot be a target, since TRL's trainer refuses it. "
            'Remove it, or train the whole head: write modules_to_save=["lm_head"] in '
            "lora_config(), with DTYPE float32."
        )
    paths = [path for path, _ in model.named_modules()]
    missing = [
        target
        for target in sorted(config.target_modules)
        if not any(path == target or path.endswith(f".{target}") for path in paths)
    ]
    if missing:
        raise UserError(unknown_targets_message(missing, model))


def unknown_targets_message(missing: list[str], model: torch.nn.Module) -> str:
    """Return which targets the model does not have, and which names its layers have instead."""
    matrices = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)  # the latter in GPT-2
    names = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, matrices) and re.search(r"\.\d+\.", path)  # in one of the layers
    }
    close = difflib.get_close_matches(missing[0], sorted(names), 1)
    is_misspelt = bool(close) and len(missing) == 1  # several: the model has other names
    hint = f" Did you mean {close[0]}?" if is_misspelt else ""
    return (
        f"LORA_TARGET_MODULES: no layer of the model is named {', '.join(missing)}.{hint} The "
        f"layers have {', '.join(sorted(names)) or 'no linear modules'}. For all of these write "
        'target_modules="all-linear" in lora_config().'
    )


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank may be


def why_vllm_refuses(config: peft.LoraConfig, max_rank: int) -> str:
    """Return why vLLM cannot load this kind of adapter, or ""; from the source of vLLM 0.32."""
    if config.use_dora:
        return "vLLM serves no DoRA adapters"
    if config.modules_to_save or config.trainable_token_indices:
        return "vLLM serves no adapters with fully trained modules"
    if max_rank > max(VLLM_RANKS):
        return f"vLLM serves no adapters of a rank above {max(VLLM_RANKS)}"
    return ""


def report_plan(job: Job, plan: Plan, config: peft.LoraConfig, model: torch.nn.Module) -> None:
    """Print the table of what LoRA is added to, the trainable share, and the steps."""
    lines = [f"LoRA with {lora_in_words(config)}, dropout {config.lora_dropout:g}"]
    lines += table_of_targets(job, plan, model)
    lines.append(
        f"trainable params: {plan.trainable:,} || all params: {plan.total:,} || "
        f"trainable%: {100 * plan.trainable / plan.total:.4f}"
    )
    lines.append(
        f"a reply ends with {job.chat_format.tokenizer.decode(job.examples[0].reply_ids[-1])}"
    )
    depth = job.config.get_text_config().num_hidden_layers
    deltanet = layer_types(job.config).count("linear_attention")
    if deltanet:
        others = pluralize(depth - deltanet, "layer")
        lines.append(
            f"{deltanet} of {depth} layers are Gated DeltaNet and have no q_proj, k_proj, v_proj "
            f"or o_proj.\nAs expected, these targets are in {others} only"
        )
    lines.append(steps_in_words(job, plan))
    report("plan", "\n".join(lines))
    unseen = [path for path in lora_layers(model) if "vision" in path]
    if unseen:
        report(
            "warning",
            f"{len(unseen):,} of these modules, such as {unseen[0]},\nsee pictures alone, so they "
            'learn nothing from text; write\nexclude_modules=".*vision.*" in lora_config()',
        )


def layer_types(config: transformers.PretrainedConfig) -> list[str]:
    """Return the kind of each layer, if the model has several kinds."""
    return config.get_text_config().to_dict().get("layer_types") or []


def lora_in_words(config: peft.LoraConfig) -> str:
    """Return rank and alpha of a LoraConfig, and what makes it more than plain LoRA."""
    words = [f"r = {config.r}, alpha = {config.lora_alpha}"]
    variants = {"use_rslora": "rsLoRA", "use_dora": "DoRA", "use_qalora": "QALoRA"}
    words += [name for flag, name in variants.items() if getattr(config, flag)]
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name):
            words.append(f"{name} {getattr(config, name)}")
    return ", ".join(words)


def steps_in_words(job: Job, plan: Plan) -> str:
    """Return the number of steps, and how it follows from the examples and the settings."""
    settings, count = job.settings, len(job.examples)
    size = min(examples_per_step(settings), count)
    steps = f"{pluralize(plan.steps, 'step')} of {pluralize(size, 'example')}"
    whole = plan.steps_per_epoch * settings.NUM_EPOCHS
    if plan.steps < whole:
        return f"{steps}, limited by MAX_STEPS (the full epochs would take {whole:,})"
    factors = f"{settings.BATCH_SIZE} x {settings.GRADIENT_ACCUMULATION_STEPS}"
    return f"{steps}: ceil({count:,} / ({factors})) x {settings.NUM_EPOCHS}"


def table_of_targets(job: Job, plan: Plan, model: torch.nn.Module) -> list[str]:
    """Return a line for each target: where it is, its W, A and B, and how much of it is trained."""
    depth = job.config.get_text_config().num_hidden_layers
    layers = lora_layers(model)
    paths_of: dict[tuple[str, ...], list[str]] = {}  # by target, parent module, scaling and shapes
    for path, module in layers.items():
        parent, _, target = path.rpartition(".")
        d, k, r = module.out_features, module.in_features, max(module.r.values())
        shapes = [f"{d:,}x{k:,}", f"{r:,}x{k:,}", f"{d:,}x{r:,}"]
        scaling = f"{module.scaling['default']:g}"
        row = (target, parent.rpartition(".")[2], *shapes, scaling)
        paths_of.setdefault(row, []).append(path)
    width = max([12, *(len(row[0]) + 1 for row in paths_of)])
    columns = f"{{:<{width}}}{{:<17}}{{:>12}}{{:>9}}{{:>9}}{{:>12}}{{:>10}}".format
    head = ("target", "in layers", "W (frozen)", "A", "B", "parameters", "scaled by")
    lines = [columns(*head)]
    order = in_order_of_settings(sorted({row[0] for row in paths_of}), job.settings)
    for row in sorted(paths_of, key=lambda row: (order.index(row[0]), row)):
        target, parent, *shapes, scaling = row
        paths = tuple(f"{path}." for path in paths_of[row])
        count = sum(
            math.prod(shape)
            for name, shape in plan.trainable_shapes.items()
            if name.startswith(paths)
        )
        where = f"{len(paths)}/{depth} {parent}"
        lines.append(columns(target, where, *shapes, f"{count:,}", scaling))
    covered = tuple(f"{path}." for path in layers)
    for name, shape in plan.trainable_shapes.items():
        if not name.startswith(covered):  # LoraConfig asks for more than LoRA
            lines.append(f"{one_line(name, 55):<{width + 47}}{math.prod(shape):>12,}")
    return lines


def in_order_of_settings(targets: list[str], settings: argparse.Namespace) -> list[str]:
    """Return targets in the order of LORA_TARGET_MODULES, others after them."""
    order = {target: place for place, target in enumerate(settings.LORA_TARGET_MODULES)}
    return sorted(targets, key=lambda target: (order.get(target, len(order)), target))


def refuse_changed_arguments(config: trl.SFTConfig, job: Job) -> None:
    """Raise UserError if training_config() was edited where this script depends on it.

    Its step and loss would ignore the first of these, and its records would be wrong with the
    others: of the time, of the best epoch, and of what becomes final_lora.
    """
    needed = {
        "gradient_accumulation_steps": 1,  # a step is divided by what fits
        "activation_checkpointing": False,  # found by trying, too
        "torch_compile": False,  # what fits is tried without; rows of all lengths compile anew
        "label_smoothing_factor": 0.0,
        "loss_type": "nll",
        "packing": False,
        "padding_free": False,
        "bf16": False,
        "fp16": False,
        "average_tokens_across_devices": True,
        "auto_find_batch_size": False,
        "dataloader_drop_last": False,
        "max_length": None,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "eval_strategy": "epoch" if job.held_out else "no",
        "save_strategy": "epoch",
        "save_total_limit": None,
        "save_only_model": False,
        "ignore_data_skip": False,
        "load_best_model_at_end": False,
        "fsdp": None,  # each GPU holds the whole model
        "deepspeed": None,
        "accelerator_config": transformers.trainer_pt_utils.AcceleratorConfig(),  # divides examples
    }
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise UserError(
                f"training_config(): {name} must stay {value!r}, since this script's own step, "
                "loss or records depend on it."
            )


def refuse_what_is_missing(config: trl.SFTConfig) -> None:
    """Raise UserError if a tracker, the optimizer or the hub cannot be used.

    Trainer would find out after the weights are loaded and older results are moved aside.
    """
    for name in config.report_to:
        (callback,) = get_reporting_integration_callbacks([name])
        try:
            callback()  # looks for its package
        except (RuntimeError, ImportError) as error:
            raise UserError(f"REPORT_TO {name}: {one_line(error)}") from error
    try:
        transformers.Trainer.get_optimizer_cls_and_kwargs(config)
    except (ImportError, ValueError) as error:
        # Some kinds need the model, too, and say so after they have looked for their package.
        if isinstance(error, ImportError) or "install" in str(error):
            raise UserError(
                f"training_config(): optim {config.optim.value!r} cannot be used: {one_line(error)}"
            ) from error
    if config.push_to_hub:
        try:
            huggingface_hub.whoami(token=config.hub_token)
        except (OSError, ValueError, HTTPError) as error:
            raise UserError(
                f"training_config(): push_to_hub needs the Hugging Face hub, which does not answer "
                f"({one_line(error)}). Log in with `hf auth login`, or remove it."
            ) from error


# ==== CHECKPOINTS: what an earlier run left behind, and resuming
#
# A checkpoint is written every SAVE_STEPS steps, at the end of each epoch, and after a signal;
# run.json is written with it. The two newest are kept, and the best epoch's. The same command
# resumes from the newest whole one: LoRA, AdamW's state, the LR scheduler, the random states, and
# the place in the data, which follows from step and seed. There is no GradScaler. On a CPU the run
# then ends with the same bytes as one that was never stopped.
#
# What an earlier run left is looked at first, then decide() decides, and act_on() does it. A
# newest checkpoint that was not written to its end, or is damaged, is moved aside, and the one
# before it is taken. Checkpoints without a job.json are renamed, and the run begins afresh. What
# cannot be read just now stops the run; nothing starts afresh because of it.
#
# A checkpoint is refused if it was made with other settings, another LoraConfig or SFTConfig,
# another model, other tokens in one of the files, or the other kind of matmul. The message is a
# table of what differs, and nothing is touched. What may change is listed below; other edits of
# this script are not compared.
#
# A job that has finished is finished: the same command says so, and does nothing. With another
# FINAL_LORA it takes that epoch from the checkpoints. If you changed the settings, the data or this
# script since then, the new job renames what the finished one left. If only the model on the hub or
# a library changed, the run is refused. A different job is also refused while the earlier one is
# unfinished.

# These settings may change between stopping and resuming.
MAY_CHANGE_ON_RESUME = {
    "DEVICE", "OUTPUT_DIR", "LOGGING_STEPS", "SAVE_STEPS", "FINAL_LORA", "REPORT_TO",
}  # fmt: skip
# These, too, as long as what follows from them stays: the examples' tokens, the kind of matmul
# that is in use, and the number of examples in a step.
COMPARED_BY_EFFECT = {
    "TRAIN_FILE", "EVAL_FILE", "REPLIES", "MAX_SEQ_LEN", "MATMUL", "BATCH_SIZE",
    "GRADIENT_ACCUMULATION_STEPS",
}  # fmt: skip
# These fields of SFTConfig do not change what is trained: they are of paths, logging, saving,
# evaluation and the device.
NOT_OF_TRAINING = {
    "batch_eval_metrics", "dataloader_num_workers", "dataloader_persistent_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_backend",
    "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters",
    "ddp_static_graph", "ddp_timeout", "debug", "disable_tqdm", "do_eval", "do_predict",
    "do_train", "eval_accumulation_steps", "eval_delay", "eval_do_concat_batches",
    "eval_on_start", "eval_packing", "eval_steps", "eval_strategy", "eval_use_gather_object",
    "greater_is_better", "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision",
    "hub_strategy", "hub_token", "include_for_metrics", "include_num_input_tokens_seen",
    "local_rank", "log_level", "log_level_replica", "log_on_each_node", "logging_first_step",
    "logging_nan_inf_filter", "logging_steps", "logging_strategy", "metric_for_best_model",
    "output_dir", "per_device_eval_batch_size", "prediction_loss_only", "project",
    "push_to_hub", "report_to", "resume_from_checkpoint", "run_name", "save_on_each_node",
    "save_only_model", "save_steps", "save_strategy", "save_total_limit", "skip_memory_metrics",
    "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "use_cpu",
}  # fmt: skip
# These fields only repeat a setting, so a change of it is told once.
GIVEN_BY = {
    "LoraConfig.r": "LORA_R",
    "LoraConfig.lora_alpha": "LORA_ALPHA",
    "LoraConfig.lora_dropout": "LORA_DROPOUT",
    "LoraConfig.target_modules": "LORA_TARGET_MODULES",
    "SFTConfig.seed": "SEED",
    "SFTConfig.num_train_epochs": "NUM_EPOCHS",
    "SFTConfig.max_steps": "MAX_STEPS",
    "SFTConfig.learning_rate": "LEARNING_RATE",
    "SFTConfig.lr_scheduler_type": "LR_SCHEDULER_TYPE",
    "SFTConfig.per_device_train_batch_size": "BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS",
}


@dataclass(frozen=True)
class Saved:
    """A checkpoint folder, and whether training can go on from it."""

    path: Path
    state: Literal["whole", "unfinished", "damaged"]
    fault: str = ""  # what is wrong with it


@dataclass(frozen=True)
class Earlier:
    """What an earlier run left in OUTPUT_DIR: the facts by which decide() decides."""

    differences: list[str] | None  # between its job and this one; None without a job.json
    checkpoints: list[Saved]  # the newest first, down to the first whole one
    is_finished: bool  # run.json says so, and final_lora is unchanged
    is_wanted_epoch: bool  # and it is of the epoch that FINAL_LORA asks for
    may_be_replaced: bool  # the user has changed settings, data or script since then
    job_now: dict[str, Any] = field(default_factory=dict)  # this job, as job.json would have it


Decision = Literal["finished", "fresh", "resume", "refuse another job", "refuse damage"]


def decide(earlier: Earlier) -> Decision:
    """Return what to do with what an earlier run left."""
    states = {saved.state for saved in earlier.checkpoints}
    if earlier.is_finished and earlier.is_wanted_epoch and earlier.differences == []:
        return "finished"  # comes first: then no checkpoint is needed
    if states <= {"unfinished"} or earlier.differences is None:
        return "fresh"
    if earlier.differences:
        may_go = earlier.is_finished and earlier.may_be_replaced
        return "fresh" if may_go else "refuse another job"
    return "resume" if "whole" in states else "refuse damage"


MATMUL_IN_USE = "the products in use"  # a key of job.json


def resume_or_begin(job: Job) -> None:
    """Find out what an earlier run left, and act on it; the processes of a launch go one way."""
    if is_main_process():
        earlier = what_is_there(job)
        act_on(decide(earlier), earlier, job)
    decided = [job.checkpoint, job.history, job.is_finished, job.matmul, time.time()]
    job.checkpoint, job.history, job.is_finished, job.matmul, began = (
        accelerate.utils.broadcast_object_list(decided)
    )
    if not job.is_finished:
        job.started = began
        write_record(job, "running")


# Of a local model's folder; notes that lie beside them change nothing.
FILES_THAT_COUNT = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*",
    "merges.txt",
)  # fmt: skip
FILE_OF_MODEL = "MODEL_NAME's file"  # keys of job.json begin so


def what_is_there(job: Job) -> Earlier:
    """Gather what an earlier run left; raise UserError if that cannot be read, and change no file.

    A disk or a network file system that does not answer now may do so later, so it decides nothing.
    """
    folder = job.output / "checkpoints"
    try:
        before = job_of_checkpoints(folder)
        record = finished_record(job.output)
        saved = checkpoints_down_to_a_whole_one(folder)
        if before and saved:
            keep_matmul(job, before)
        now = describe_job(job)
    except OSError as error:
        raise UserError(
            f"{error.filename or job.output} cannot be read ({error.strerror}). Nothing was "
            "changed; the same command goes on once it can be read."
        ) from error
    job.history = record["loss_history"] if record else []  # tells the best epoch
    return Earlier(
        differences=None
        if before is None
        else what_differs(before, described_as_before(job, before, now)),
        checkpoints=saved,
        is_finished=record is not None,
        is_wanted_epoch=record is not None and record["published"] == epoch_of_final_lora(job),
        may_be_replaced=record is not None and is_meant_to_differ(record, job),
        job_now=now,
    )


def act_on(decision: Decision, earlier: Earlier, job: Job) -> None:
    """Resume, begin, or say that all is done; raise UserError where neither is right.

    Args:
        decision: what decide() said of earlier.
        earlier: what is there.
        job: this job; gets what the training needs to know.
    """
    folder = job.output / "checkpoints"
    faults = [f"{saved.path} {saved.fault}" for saved in earlier.checkpoints if saved.fault]
    if decision == "refuse another job":
        raise UserError(
            f"{earlier.checkpoints[-1].path} was made with other settings, data or model, so it "
            f"cannot be resumed:\n{join_limited(earlier.differences)}\n"
            f"To resume it, restore these. To train anew, choose another OUTPUT_DIR, or move "
            f"{folder} away."
        )
    if decision == "refuse damage":
        raise UserError(
            f"No checkpoint of this job can be resumed:\n{join_limited(faults)}\n"
            f"Restore one, or move {folder} away to train from the beginning."
        )
    if decision == "finished":
        job.is_finished = True
        keep_held_out(job)
        label = epoch_of_final_lora(job)["label"]
        report(
            "finished",
            f"{job.output / 'final_lora'} is the finished adapter of this job ({label})\n"
            f"To train it again, choose another OUTPUT_DIR, or move {folder} away.",
        )
        return
    for fault in faults:
        report("resume", fault)
    if decision == "fresh":
        job.history = []
        keep_held_out(job)
        start_fresh(job, earlier.job_now)
        return
    job.checkpoint = earlier.checkpoints[-1].path
    state = json.loads((job.checkpoint / "trainer_state.json").read_bytes())
    job.history = state["log_history"]
    keep_held_out(job)
    for saved in earlier.checkpoints[:-1]:
        rename_old(saved.path)
    report("resume", f"resuming from {job.checkpoint}")
    tell_of_other_kernels(job)


def keep_matmul(job: Job, before: dict[str, Any]) -> None:
    """With MATMUL "auto" let a job go on with the kind of matmul that its checkpoints have.

    It may have been put back into the queue and be on another GPU now.
    """
    kind = before.get(MATMUL_IN_USE, job.matmul)
    if job.settings.MATMUL != "auto" or kind == job.matmul:
        return
    report(
        "matmul",
        f"the checkpoints were made with {kind} matmul, so the job goes on with it; on this GPU\n"
        f"a new one would take {job.matmul} matmul",
    )
    job.matmul = kind


def tell_of_other_kernels(job: Job) -> None:
    """Say if the DeltaNet layers were computed by other code until now, which is allowed."""
    before = (read_json(job.output / "run.json") or {}).get("delta_kernels", "")
    if before and job.delta_kernels and before.split()[0] != job.delta_kernels.split()[0]:
        report(
            "kernels",
            f"until now they were computed by {before}\nThe two round differently, so the rest may "
            "differ a little from a run that was never stopped.",
        )


def describe_job(job: Job) -> dict[str, Any]:
    """Return what must be the same for a checkpoint to be resumed: settings, model, data."""
    settings = job.settings
    described = {
        name: getattr(settings, name)
        for name in setting_types()
        if name not in MAY_CHANGE_ON_RESUME | COMPARED_BY_EFFECT
    }
    described["LORA_TARGET_MODULES"] = sorted(settings.LORA_TARGET_MODULES)
    described["BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS"] = examples_per_step(settings)
    for key, value in config_as_recorded(lora_config(settings)).items():
        if key != "peft_version":
            described[f"LoraConfig.{key}"] = str(value)
    training = training_config(job).to_dict()
    # What one process gets of a step depends on their number.
    training["per_device_train_batch_size"] *= accelerate.PartialState().num_processes
    for key, value in training.items():
        if key not in NOT_OF_TRAINING:
            described[f"SFTConfig.{key}"] = str(value)
    described[MATMUL_IN_USE] = job.matmul
    files = file_fingerprints(Path(settings.MODEL_NAME), FILES_THAT_COUNT)
    contents = {f"{FILE_OF_MODEL} {facts[0]}": facts for facts in files}
    contents |= {
        "the tokens of TRAIN_FILE": [example.input_ids for example in job.examples],
        "the tokens of EVAL_FILE": [example.input_ids for example in job.held_out],
    }
    return described | {name: short_hash(value) for name, value in contents.items()}


def described_as_before(job: Job, before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return what describe_job() says, with one hash of all the model's files if before has that.

    job.json was written so until 2026-11-28.
    """
    name = "the files of MODEL_NAME"
    if name not in before:
        return now
    others = {key: value for key, value in now.items() if not key.startswith(FILE_OF_MODEL)}
    return others | {name: short_hash(file_fingerprints(Path(job.settings.MODEL_NAME), ("*",)))}


def short_hash(value: Any) -> str:
    """Return the beginning of a hash of what a value is."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def what_differs(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each thing in which a checkpoint's job is another one than this."""
    changes: dict[str, str] = {}
    for name in {**before, **now}:
        if before.get(name) == now.get(name):
            continue
        was = f"was {before[name]}" if name in before else "did not exist"
        is_now = f"is now {now[name]}" if name in now else "does not exist now"
        changes[name] = f"{was} and {is_now}"
    # A field that a setting gives is not told again.
    rows = [
        f"  {name} {change}"
        for name, change in changes.items()
        if name not in GIVEN_BY or changes.get(GIVEN_BY[name]) != change
    ]
    if before.get(MATMUL_IN_USE, now[MATMUL_IN_USE]) != now[MATMUL_IN_USE]:
        kind = before[MATMUL_IN_USE]
        rows.append(f'  (MATMUL "auto" or "{kind}" goes on with {kind} matmul)')
    return rows


def finished_record(output: Path) -> dict[str, Any] | None:
    """Return run.json if it says that the run has finished, and final_lora is what it saved."""
    record = read_json(output / "run.json") or {}
    path = output / "final_lora" / "adapter_model.safetensors"
    if record.get("outcome") != "finished" or not path.is_file():
        return None
    is_the_same = record.get("adapter_sha256", {}).get("final_lora") == file_sha256(path)
    return record if is_the_same else None


def is_meant_to_differ(record: dict[str, Any], job: Job) -> bool:
    """Return whether the user has changed the settings, the data or the script since a run.

    If not, the hub's branch has moved on, a library is another version, or the chat template prints
    the day. That is no reason to train a finished job again.
    """
    of_files = {"TRAIN_FILE", "EVAL_FILE"}  # whose contents are compared below
    for name in setting_types().keys() - MAY_CHANGE_ON_RESUME - {"MODEL_REVISION"} - of_files:
        if record["settings"].get(name) != getattr(job.settings, name):
            return True
    for which, facts in job.data.items():
        if (record["data"].get(which) or {}).get("sha256") != (facts or {}).get("sha256"):
            return True
    return record["script_sha256"] != script_sha256()


def job_of_checkpoints(folder: Path) -> dict[str, Any] | None:
    """Return what job.json says of the job that the checkpoints belong to, or None without one."""
    path = folder / "job.json"
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({one_line(error)}), so nobody knows which job the checkpoints "
            f"belong to. Restore it, choose another OUTPUT_DIR, or move {folder} away."
        ) from error


def checkpoints_down_to_a_whole_one(folder: Path) -> list[Saved]:
    """Return the checkpoints that training could go on from, the newest first, and their faults."""
    found: list[Saved] = []
    for path in reversed(checkpoints_in(folder).values()):
        found.append(examine(path))
        if found[-1].state == "whole":
            break
    return found


def examine(checkpoint: Path) -> Saved:
    """Return whether a checkpoint is whole; an error of the disk stays an OSError.

    Trainer writes trainer_state.json last. Any file may be torn after a power cut.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return Saved(checkpoint, "unfinished", "was not written to its end, and is passed over")
    try:
        safetensors.torch.load((checkpoint / "adapter_model.safetensors").read_bytes())
        random_states = [path.name for path in checkpoint.glob("rng_state*.pth")]
        for name in ("optimizer.pt", "scheduler.pt", *(random_states or ["rng_state.pth"])):
            with zipfile.ZipFile(checkpoint / name) as archive:  # as torch's files are
                if archive.testzip():
                    raise zipfile.BadZipFile(f"{name} is damaged")
    except (FileNotFoundError, EOFError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        fault = f"is damaged ({one_line(error)}), and is passed over"
        return Saved(checkpoint, "damaged", fault)
    return Saved(checkpoint, "whole")


def keep_held_out(job: Job) -> None:
    """Write the conversations that "10%" held out, or raise UserError if others lie there.

    The same conversations may be there with other keys: checks may be added to their lines.
    """
    path = job.output / "held_out.jsonl"
    if not job.held_out_content or (path.exists() and holds_what_was_held_out(path, job)):
        return
    if path.exists():
        if job.is_finished:
            return
        if job.checkpoint:
            raise UserError(
                f"{path} is not what this job held out: it was edited, or TRAIN_FILE was. Set it "
                "back, or choose another OUTPUT_DIR."
            )
        rename_old(path)
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(job.held_out_content)
    new.replace(path)


def holds_what_was_held_out(path: Path, job: Job) -> bool:
    """Return whether a file has the conversations that this job holds out, in their order."""
    try:
        return conversations_in(path.read_bytes()) == conversations_in(job.held_out_content)
    except ValueError:  # this is not what was written
        return False


def conversations_in(content: bytes) -> list[dict[str, Any]]:
    """Return the conversations of a held_out.jsonl, without the keys that training ignores."""
    rows = [parse_row(line) for line in content.split(b"\n") if line.strip()]
    return [{key: row[key] for key in row if key in CONVERSATION_KEYS} for row in rows]


def start_fresh(job: Job, now: dict[str, Any]) -> None:
    """Rename what an earlier run left, and write down which job the new checkpoints belong to."""
    folder = job.output / "checkpoints"
    is_dangling = folder.is_symlink() and not folder.exists()
    if is_dangling or checkpoints_in(folder):  # of a finished run, or unusable
        rename_old(folder)
    rename_old(job.output / "run.json")
    held_out = job.output / "held_out.jsonl"
    if not job.held_out_content and not is_same_file(job.settings.EVAL_FILE, str(held_out)):
        rename_old(held_out)
    folder.mkdir(exist_ok=True)
    write_json(folder / "job.json", now)


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Return {step: path} of the checkpoints in a folder, the oldest first."""
    paths = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal()
    ]
    return {step_of(path): path for path in sorted(paths, key=step_of)}


def step_of(checkpoint: Path) -> int:
    """Return the step of a folder named checkpoint-STEP."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def remove_old_checkpoints(job: Job, newest: int) -> None:
    """Keep the newest checkpoint, the one before it, and that of the epoch with the lowest loss.

    Trainer's own limit would count the base model's loss among the epochs', and remove a folder
    such as checkpoint-50-backup, too.
    """
    saved = checkpoints_in(job.output / "checkpoints")
    until_now = [step for step in saved if step <= newest]  # later ones were not finished
    kept = {*until_now[-2:], best_step(job)}
    for step in until_now:
        if step not in kept:
            shutil.rmtree(saved[step], ignore_errors=True)


def best_step(job: Job) -> int:
    """Return the step of the epoch with the lowest held-out loss; the last one if not measured."""
    losses = job.logged("eval_loss")
    losses.pop(0, None)  # the base's
    return min(losses, key=lambda step: losses[step], default=job.plan.steps)


def load_adapter(model: peft.PeftModel, checkpoint: Path) -> None:
    """Give the model the adapter of a checkpoint; raise UserError unless it is what was saved."""
    path = checkpoint / "adapter_model.safetensors"
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error)}), so it does not become final_lora. Its "
            "folder may be restored, or another OUTPUT_DIR chosen to train again."
        ) from error
    peft.set_peft_model_state_dict(model, tensors)
    check_saved_tensors(model, tensors, checkpoint)


# ==== MEMORY: in how many micro-batches a step goes through the model
#
# A step always has BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS examples. What the GPU's memory decides
# is in how many micro-batches they go through the model. Before training, find_what_fits() tries
# how many tokens fit at once on top of the optimizer's state, and measures what they cost:
# - The trial is the hardest that so many tokens can be: all of them are targets, in rows as long as
#   the longest example. Fewer targets cost less, and so do narrower rows, with less attention. A
#   row that DeltaNet's torch code fills up to a multiple of 64 tokens costs more than its tokens.
#   All this is measured, and a micro-batch is counted as so many tokens of the trial as it costs.
# - A step that fits goes through whole. Any other goes in micro-batches of as many examples as fit.
# - An example that does not fit even alone is recomputed: its activations are not kept for the
#   backward pass but computed again, which takes little memory and nearly 50 % more work. Such
#   examples, too, go through together as long as they fit, and one by one if they do not.
# - Only if the longest training example does not fit even so does the run end, before it trains.
#   The advice is to lower MAX_SEQ_LEN, to take a GPU with more memory, or to stop other programs.
# - If a step runs out of memory all the same, as when another program takes it, the limit becomes
#   three quarters of what did not fit, and the step is done again. Several processes end instead.
# On a CPU nothing is tried, and every step goes through whole.

DELTANET_CHUNK = 64  # tokens: DeltaNet's torch code fills each row up to a multiple of them
TARGET_SHARES = (0.0, 0.25, 0.5, 1.0)  # of a trial's tokens, at which its memory is measured


@dataclass
class TokenCosts:
    """What tokens cost in memory, where one of the trial costs 1.

    The memory of a pass is the most of several moments, such as the loss and the backward pass of a
    layer, and each grows in proportion to tokens, targets and padding. So what lies between two
    measurements costs at most what a straight line between them says.
    """

    # A token of a micro-batch in which none, a quarter, half, and all of the tokens are targets.
    by_target_share: list[float] = field(default_factory=lambda: [1.0] * len(TARGET_SHARES))
    padding: float = 1.0  # a place that fills a row up to a multiple of DELTANET_CHUNK
    narrow: float = 1.0  # a token in rows of narrow_width, all of them targets
    narrow_width: int = 0
    trial_width: int = 1

    def count(self, lengths: list[int], targets: int) -> float:
        """Return as how many tokens of the trial rows of these lengths count, padded to one width.

        Args:
            lengths: of the rows, in tokens.
            targets: how many of all their tokens are targets.
        """
        rows, width = len(lengths), max(lengths)
        share = targets / (rows * max(1, width - 1))  # the first token of a row is no target
        place = max(0, bisect.bisect_left(TARGET_SHARES, share) - 1)
        (low, high), (cost, next_cost) = (
            values[place : place + 2] for values in (TARGET_SHARES, self.by_target_share)
        )
        cost += (share - low) / (high - low) * (next_cost - cost)
        # Attention grows with the square of a row's width. So a row costs at most what a straight
        # line from a narrow one to the trial's says.
        narrower = (self.trial_width - width) / (self.trial_width - self.narrow_width)
        saved = (1 - self.narrow) * min(width, self.narrow_width * narrower)
        return rows * (width * cost - saved + (whole_chunks(width) - width) * self.padding)


@dataclass
class MemoryLimits:
    """How much may go through the model at once while training, in tokens of the trial."""

    tokens_at_once: int  # with their activations kept for the backward pass
    tokens_at_once_recomputed: int  # the same number, unless the longest example needs more
    costs: TokenCosts = field(default_factory=TokenCosts)
    costs_recomputed: TokenCosts = field(default_factory=TokenCosts)
    tokens_evaluated: int = 0  # how many fit while evaluating, once it has run out of memory

    def most(self) -> int:
        """Return how many tokens to evaluate at once; that needs far less memory than training."""
        return self.tokens_evaluated or max(self.tokens_at_once, self.tokens_at_once_recomputed)

    def count(self, lengths: list[int], targets: int, is_recomputed: bool) -> float:
        """Return as how many tokens of the trial rows of these lengths count."""
        costs = self.costs_recomputed if is_recomputed else self.costs
        return costs.count(lengths, targets)

    def fit(self, lengths: list[int], targets: int, is_recomputed: bool) -> bool:
        """Return whether rows of these lengths may go through the model together."""
        limit = self.tokens_at_once_recomputed if is_recomputed else self.tokens_at_once
        # No row was tried that is longer than the trial: attention grows with the square of it.
        return max(lengths) <= limit and self.count(lengths, targets, is_recomputed) <= limit


@dataclass
class OutOfMemory:
    """A micro-batch that did not find its memory."""

    inputs: dict[str, torch.Tensor]
    is_recomputed: bool
    message: str  # torch's


def find_what_fits(trainer: LoraTrainer, job: Job) -> None:
    """Find by trying how many tokens fit in the GPU's memory at once; on a CPU, a whole step."""
    model = trainer.model
    longest, whole_step = most_tokens(job)
    model.activation_checkpointing_enable()
    model.disable_input_require_grads()  # recomputation does not need the embeddings' gradient
    if job.settings.DEVICE == "cpu":
        job.token_limits = MemoryLimits(whole_step, whole_step)
        return
    report("memory", "trying how many examples fit on the GPU at once")
    free, total = torch.cuda.mem_get_info()
    share = (free + torch.cuda.memory_reserved()) / total  # what other programs leave
    # A tenth is left for fragmentation, and room for what AdamW will keep: two float32 numbers for
    # each trained weight.
    states = 8 * job.plan.trainable / total
    torch.cuda.set_per_process_memory_fraction(max(0.0, 0.9 * share - states))
    limits = try_what_fits(trainer, longest, whole_step)
    most = limits.most()
    if most < longest:
        raise UserError(
            f"A single example of {longest:,} tokens does not fit in the "
            f"{share * total / 2**30:.1f} GiB of GPU memory that are free; about {most:,} "
            "tokens would. Lower MAX_SEQ_LEN, use a GPU with more memory, or stop other programs "
            "on this GPU."
        )
    job.token_limits = limits
    # CUDA's libraries allocate outside of torch's view, so a little must stay free.
    torch.cuda.set_per_process_memory_fraction(0.97 * share)
    torch.cuda.reset_peak_memory_stats()
    # The trials drew random numbers. Each process draws dropout of its own for its examples.
    process = accelerate.PartialState().process_index
    transformers.set_seed((job.settings.SEED + process) % 2**32)
    if limits.tokens_at_once >= whole_step:
        text = f"a whole step of {examples_per_step(job.settings)} examples fits at once"
    elif limits.tokens_at_once == 0:
        text = "gradient checkpointing is used for every example, to save memory"
    else:
        text = f"up to {limits.tokens_at_once:,} tokens fit at once; larger steps are split into "
        text += "micro-batches"
        if limits.tokens_at_once < longest:
            text += ",\nand longer examples use gradient checkpointing to save memory"
    report("memory", text)


def most_tokens(job: Job) -> tuple[int, int]:
    """Return the tokens of the longest example, and those of a step of nothing but such ones.

    In the second number each example is filled up to whole chunks of DeltaNet. Held-out examples do
    not count: they are only evaluated, which needs far less memory.
    """
    longest = max(len(example.input_ids) for example in job.examples)
    processes = accelerate.PartialState().num_processes
    examples = min(len(job.examples), examples_per_step(job.settings) // processes)
    return longest, whole_chunks(longest) * examples


def whole_chunks(tokens: int) -> int:
    """Return a number of tokens, rounded up to whole chunks of DeltaNet's torch code."""
    return DELTANET_CHUNK * math.ceil(tokens / DELTANET_CHUNK)


def try_what_fits(trainer: LoraTrainer, longest: int, whole_step: int) -> MemoryLimits:
    """Return how many tokens fit; recomputation is tried only if a single example needs it."""
    kept = largest_that_fits(lambda n: trial_fits(trainer, n, longest, False), whole_step)
    costs = measure_costs(trainer, kept, longest, False)
    if kept >= whole_chunks(longest):
        return MemoryLimits(kept, kept, costs)
    recomputed = largest_that_fits(lambda n: trial_fits(trainer, n, longest, True), whole_step)
    if recomputed < longest and trial_fits(trainer, longest, longest, True):
        recomputed = longest  # which lies between two multiples of 16
    return MemoryLimits(kept, recomputed, costs, measure_costs(trainer, recomputed, longest, True))


def trial_fits(trainer: LoraTrainer, tokens: int, longest: int, is_recomputed: bool) -> bool:
    """Return whether a forward and a backward pass over so many tokens find their memory.

    The trial is at least as hard as any micro-batch that counts as so many tokens.
    """
    rows, width = hardest_shape(tokens, longest)
    return memory_of_pass(trainer, rows, width, 1.0, is_recomputed) is not None


def hardest_shape(tokens: int, longest: int) -> tuple[int, int]:
    """Return the rows and the width of a trial of so many tokens.

    Its rows are at least as long as the longest example, but less than about twice as long, or one
    row has all the tokens. As few places as possible fill rows up to whole chunks.
    """
    most_rows = max(1, tokens // whole_chunks(longest))
    shapes = [(rows, math.ceil(tokens / rows)) for rows in range(most_rows, most_rows // 2, -1)]
    return min(shapes, key=lambda shape: shape[0] * whole_chunks(shape[1]))


def memory_of_pass(
    trainer: LoraTrainer, rows: int, width: int, target_share: float, is_recomputed: bool
) -> int | None:
    """Return how many bytes a forward and a backward pass need at the most; None if too many.

    Args:
        trainer: with the model.
        rows: of the batch.
        width: of each row, in tokens.
        target_share: how many of the tokens are targets; each row has at least one.
        is_recomputed: whether activations are computed again and not kept.
    """
    set_recomputation(trainer.recomputing_layers, is_recomputed)
    trainer.model.train()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        ids = torch.ones(rows, width, dtype=torch.long, device=trainer.args.device)
        labels = ids.clone()
        labels[:, : width - max(1, math.ceil(target_share * (width - 1)))] = -100
        inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        inputs["attention_mask"][1:, -1] = 0  # padding takes memory of its own
        trainer.compute_loss(trainer.model, inputs, num_items_in_batch=rows * width).backward()
        return torch.cuda.max_memory_allocated() - before
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        trainer.model.zero_grad()
        torch.cuda.empty_cache()


def measure_costs(
    trainer: LoraTrainer, tokens: int, longest: int, is_recomputed: bool
) -> TokenCosts:
    """Measure what fewer targets and narrower rows save, and what filling up short rows costs.

    Args:
        trainer: with the model.
        tokens: as many as fit at once.
        longest: the tokens of the longest example.
        is_recomputed: whether activations are computed again and not kept.
    """
    if tokens == 0:
        return TokenCosts()
    rows, width = hardest_shape(tokens, longest)
    found = [memory_of_pass(trainer, rows, width, share, is_recomputed) for share in TARGET_SHARES]
    if None in found or found[-1] <= 0:
        return TokenCosts()
    by_share = [rounded_up(one / found[-1]) for one in found[:-1]] + [1.0]
    each = found[-1] / (rows * width)  # bytes
    costs = TokenCosts(by_share, padding=0.0)
    # A row of a single chunk would not do: only later ones keep the state of the chunk before.
    narrow_width = max(2 * DELTANET_CHUNK, whole_chunks(math.ceil(width / 4)))
    if narrow_width < width:
        count = tokens // narrow_width
        needed = memory_of_pass(trainer, count, narrow_width, 1.0, is_recomputed)
        if needed is not None:
            costs.narrow = rounded_up(needed / (count * narrow_width) / each)
            costs.narrow_width, costs.trial_width = narrow_width, width
    filled = []
    # Rows whose first or second chunk, or the one after a narrow row's, is nearly all filled up.
    # Fewer than in a trial will do, as memory grows in proportion.
    lengths = (2, DELTANET_CHUNK + 1, narrow_width + 1)
    for length, share in itertools.product(lengths, (0, 1)):
        if length > width:
            continue  # no row of that length goes through like this
        count = max(1, 3 * tokens // whole_chunks(length) // 4)
        needed = memory_of_pass(trainer, count, length, share, is_recomputed)
        if needed is None:
            filled.append(1.0)
            break
        beside = needed / each - costs.count([length] * count, count * share * (length - 1))
        filled.append(beside / count / (whole_chunks(length) - length))
    costs.padding = rounded_up(max(filled, default=1.0))
    return costs


def rounded_up(share: float) -> float:
    """Return a share rounded up to thousandths, from 0 to 1."""
    return min(1.0, max(0.0, math.ceil(1000 * share) / 1000))


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """Return most if it fits, otherwise the largest multiple of 16 that does; 0 if none does."""
    if fits(most):
        return most
    sizes = range(16, most, 16)
    return 16 * bisect.bisect_left(sizes, True, key=lambda size: not fits(size))


def lengths_and_targets(inputs: dict[str, torch.Tensor]) -> tuple[list[int], list[int]]:
    """Return how many tokens each row has without its padding, and how many are targets."""
    targets = (inputs["labels"][:, 1:] != -100).sum(1)
    lengths, counts = torch.stack([inputs["attention_mask"].sum(1), targets]).tolist()
    return lengths, counts


def make_room(trainer: LoraTrainer, failed: OutOfMemory, tries_left: int) -> None:
    """Zero the gradients of a step that ran out of memory, and lower the limit for the next try.

    Raises UserError if it cannot be lower, or after three tries.

    The new limit is three quarters of the smaller of the limit and what did not fit, so the
    micro-batch that failed is divided, or its one example is recomputed. It holds for the rest of
    the run.
    """
    limits, (lengths, targets) = trainer.job.token_limits, lengths_and_targets(failed.inputs)
    is_smallest = failed.is_recomputed and len(lengths) == 1
    if is_smallest or tries_left == 0:
        raise UserError(memory_is_full(failed.message))
    trainer.model.zero_grad()
    torch.cuda.empty_cache()
    count = limits.count(lengths, sum(targets), failed.is_recomputed)
    if failed.is_recomputed:
        limits.tokens_at_once_recomputed = int(0.75 * min(limits.tokens_at_once_recomputed, count))
        limit = limits.tokens_at_once_recomputed
    else:
        limits.tokens_at_once = int(0.75 * min(limits.tokens_at_once, count))
        limit = limits.tokens_at_once
    report(
        "memory",
        f"step {trainer.state.global_step + 1:,} ran out of GPU memory; it is repeated with up to\n"
        f"{limit:,} tokens at once, and with new LoRA dropout",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU has no memory left, in the words of torch, cuBLAS, CUDA or Triton."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    words = "CUBLAS_STATUS_ALLOC_FAILED|out of memory"
    return isinstance(error, RuntimeError) and bool(re.search(words, str(error)))


def memory_is_full(error: str) -> str:
    """Return what to tell somebody whose GPU has no memory left within the training."""
    return (
        f"The GPU's memory is full ({error}). Stop other programs on this GPU, or use one with "
        "more memory. Then give the same command again: it resumes from the newest checkpoint, or "
        "starts over if there is none."
    )


def layers_that_recompute(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers that can compute their activations again."""
    kind = transformers.modeling_layers.GradientCheckpointingLayer
    return [module for module in model.modules() if isinstance(module, kind)]


def set_recomputation(layers: list[torch.nn.Module], is_recomputed: bool) -> None:
    """Tell layers whether to keep their activations or to compute them again."""
    for layer in layers:
        layer.gradient_checkpointing = is_recomputed


# ==== TRAINING: the order of the examples, what is printed, saving and stopping
#
# What Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 do depends on the moment:
# - While the data is read, the weights are loaded, memory is tried, or the base model is evaluated,
#   the run stops at once. There is nothing new to save, and the same command does the same again.
# - Within a step, and while an epoch is evaluated or a checkpoint is written, that step is finished
#   and saved before the run stops. The same command resumes there. A second signal stops at once
#   (not under a launcher), and then the same command resumes from the checkpoint before.
# - While the adapter is verified, the run stops at once, and the same command verifies it again.
#   While it is moved into its place, which takes a moment, a signal waits.


def train(trainer: LoraTrainer, job: Job) -> None:
    """Train to the end; a signal raises Stopped after the step's checkpoint."""
    if job.checkpoint and step_of(job.checkpoint) >= job.plan.steps:
        # The run was stopped after its last step; Trainer would do one more with MAX_STEPS.
        load_adapter(trainer.model, job.checkpoint)
        return
    if job.held_out and not job.checkpoint:
        report("train", "measuring the held-out loss of the base model first")
    trainer.train(resume_from_checkpoint=job.checkpoint and str(job.checkpoint))
    accelerate.PartialState().wait_for_everyone()
    job.signals_wait = False


def held_out_loss(model: peft.PeftModel, job: Job, step: int) -> float:
    """Return the held-out loss, in nats per target token; at step 0 that of the base model.

    Several processes share the examples.
    """
    process = accelerate.PartialState()
    share = job.held_out[process.process_index :: process.num_processes]
    # B A is 0 at first, but not with every init_lora_weights.
    with model.disable_adapter() if step == 0 else contextlib.nullcontext():
        losses = example_losses(
            model, share, job.token_limits.most(), "held-out loss", job.token_limits
        )
    losses = accelerate.utils.gather_object(losses)
    return sum(losses) / sum(len(example.reply_ids) for example in job.held_out)


def example_losses(
    model: torch.nn.Module,
    examples: list[Example],
    tokens_at_once: int,
    title: str,
    limits: MemoryLimits | None = None,
) -> list[float]:
    """Return the loss of each example's reply: -log(probability), in nats, summed over tokens.

    The model is in evaluation mode meanwhile, so LoRA's dropout is off, and no gradient is kept.
    On a terminal a progress bar named title is shown.

    Args:
        model: with or without LoRA.
        examples: with their tokens.
        tokens_at_once: how many go through the model together, padding included; at least one
            example does. If the GPU's memory is too small for them, fewer do.
        title: what is measured.
        limits: where to remember that fewer fit, so that the next evaluation begins with as many.
    """
    order = sorted(range(len(examples)), key=lambda number: len(examples[number].input_ids))
    losses = [0.0] * len(examples)
    was_training = model.training
    model.eval()
    with torch.no_grad(), tqdm(total=len(order), desc=title, leave=False, disable=None) as bar:
        while order:
            width = len(examples[order[-1]].input_ids)
            batch = order[-max(1, tokens_at_once // width) :]  # the longest that are left
            sums = losses_if_they_fit(model, [examples[number] for number in batch])
            if sums is None:  # the exception is gone, and with it what it held
                torch.cuda.empty_cache()
                tokens_at_once = len(batch) // 2 * width
                if limits is not None:
                    limits.tokens_evaluated = tokens_at_once
                continue
            for number, loss in zip(batch, sums, strict=True):
                losses[number] = loss
            order = order[: -len(batch)]
            bar.update(len(batch))
    model.train(was_training)
    return losses


def losses_if_they_fit(model: torch.nn.Module, batch: list[Example]) -> list[float] | None:
    """Return the summed loss of each example, or None where fewer at once may find their memory."""
    try:
        inputs = pad(batch, model.device)
        return reply_losses(model, inputs).sum(1, dtype=torch.float64).tolist()
    except RuntimeError as error:
        if not is_out_of_memory(error) or len(batch) == 1:
            raise
        return None


def pad(examples: list[Example], device: torch.device) -> dict[str, torch.Tensor]:
    """Return input_ids, labels and attention_mask of examples, padded on the right."""
    width = max(len(example.input_ids) for example in examples)
    ids, labels, mask = [], [], []
    for example in examples:
        padding = width - len(example.input_ids)
        ids.append(example.input_ids + [0] * padding)
        labels.append([-100] * len(example.prompt_ids) + example.reply_ids + [-100] * padding)
        mask.append([1] * len(example.input_ids) + [0] * padding)
    columns = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {key: torch.tensor(value, device=device) for key, value in columns.items()}


class LengthGroupedSampler:
    """Gives each step examples of similar lengths, and the steps a random order.

    Similar lengths need little padding. The order depends on the seed, the epoch and the examples'
    lengths alone, so a resumed run sees the examples that it would have seen.
    """

    def __init__(self, job: Job) -> None:
        """Remember the lengths; the epoch is set before each pass."""
        self.lengths = [len(example.input_ids) for example in job.examples]
        self.examples_per_step = examples_per_step(job.settings)
        self.seed = job.settings.SEED
        self.epoch = 0

    def __len__(self) -> int:
        """Return the number of examples in an epoch."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield the examples' numbers, one step after the other."""
        size = self.examples_per_step
        shuffler = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        shuffler.shuffle(order)
        whole = len(order) - len(order) % size
        order, rest = order[:whole], order[whole:]  # the incomplete step must come last
        # Sorted within blocks, of a quarter of the epoch and 50 steps at the most, so that each
        # epoch groups the examples differently.
        block = size * min(50, math.ceil(len(self.lengths) / size / 4))
        steps: list[list[int]] = []
        for start in range(0, whole, block):
            by_length = sorted(order[start : start + block], key=lambda n: self.lengths[n])
            steps += [by_length[n : n + size] for n in range(0, len(by_length), size)]
        shuffler.shuffle(steps)
        for step in steps:
            yield from step
        yield from rest


class RunEvents(transformers.TrainerCallback):
    """What is printed, checked, saved and stopped at the edges of steps.

    Trainer calls these methods by their names, with its arguments, its state (which step it is)
    and its control (whether to save now).
    """

    def __init__(self, trainer: LoraTrainer) -> None:
        """Begin without losses to print."""
        self.job, self.sampler = trainer.job, trainer.sampler
        self.accelerator = trainer.accelerator
        self.losses: list[float] = []  # since the last printed line
        self.step_began = 0.0
        self.tokens_before = 0
        self.steps_done = 0  # in this process

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give each epoch its own order, also when it is resumed in the middle."""
        self.sampler.epoch = state.global_step // self.job.plan.steps_per_epoch

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From now on, let a signal wait until the step is finished and saved."""
        self.job.signals_wait = True
        self.step_began = time.monotonic()
        self.tokens_before = state.num_input_tokens_seen

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Stop at a loss that is not a number; print the held-out losses and the training's."""
        self.job.history = state.log_history
        step = state.global_step
        stop_if_not_finite(logs, step)
        if "eval_loss" in logs:
            note = "  (the base model, before training)" if step == 0 else ""
            report("eval", f"epoch {state.epoch or 0:g}  loss {logs['eval_loss']:.4f}{note}")
        if "loss" in logs:
            self.count_step(state, logs)
            if step % self.job.settings.LOGGING_STEPS == 0 or step == state.max_steps:
                self.print_losses(state, logs)

    def count_step(self, state: Any, logs: dict[str, float]) -> None:
        """Add up the time, the tokens and the loss of the step that has just ended."""
        self.job.train_seconds += time.monotonic() - self.step_began
        self.job.train_tokens += state.num_input_tokens_seen - self.tokens_before
        self.steps_done += 1
        self.losses.append(logs["loss"])

    def print_losses(self, state: Any, logs: dict[str, float]) -> None:
        """Print the mean loss since the last line, the speed, and the time that is left."""
        job, step = self.job, state.global_step
        left = job.train_seconds / self.steps_done * (state.max_steps - step)
        report(
            "train",
            f"step {step:,}/{state.max_steps:,}  loss {statistics.fmean(self.losses):.4f}  "
            f"grad_norm {logs['grad_norm']:.2f}  lr {logs['learning_rate']:.1e}  "
            f"{job.train_tokens / job.train_seconds:,.0f} tokens/s  {format_time(left)} left",
        )
        self.losses = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save every SAVE_STEPS steps, or now if any process was sent a signal."""
        job = self.job
        if job.stop_signal:
            self.accelerator.set_trigger()
        if self.accelerator.check_trigger() and not job.stop_signal:  # another process got one
            job.stop_signal = signal.SIGTERM
        is_due = state.global_step % job.settings.SAVE_STEPS == 0 or job.stop_signal > 0
        # The last step of an epoch is saved after its evaluation.
        control.should_save = is_due and not ends_an_epoch(state.global_step, job.plan)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the losses beside the checkpoint that is complete now; stop after a signal."""
        job, step = self.job, state.global_step
        if is_main_process():
            remove_old_checkpoints(job, step)
        if job.settings.DEVICE == "cuda":
            job.peak_gib = torch.cuda.max_memory_allocated() / 2**30
        write_record(job, "running")  # so that a run that is killed has its losses
        job.signals_wait = step < job.plan.steps  # nothing is left to save at the end
        if job.stop_signal:
            newest = job.output / "checkpoints" / f"checkpoint-{step}"
            raise Stopped(
                job.stop_signal,
                f"Stopped after step {step:,} of {job.plan.steps:,}. The same command resumes "
                f"from {newest}.",
            )


def stop_if_not_finite(logs: dict[str, float], step: int) -> None:
    """Raise UserError if a loss or gradient is infinite or NaN: the rest would be worthless."""
    names = {"loss": "loss", "grad_norm": "gradient", "eval_loss": "held-out loss"}
    for key, name in names.items():
        if not math.isfinite(logs.get(key, 0.0)):
            if step == 0:
                raise UserError(
                    f"The base model's {name} is {logs[key]}: its weights do not work in this "
                    "type. Set DTYPE to float32, or check the model's files."
                )
            raise UserError(
                f"The {name} is {logs[key]} at step {step:,}. Lower LEARNING_RATE; if that does "
                "not help, set DTYPE to float32. Changed settings need a new OUTPUT_DIR."
            )


def format_time(seconds: float) -> str:
    """Return seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def ends_an_epoch(step: int, plan: Plan) -> bool:
    """Return whether a step is the last one of an epoch, or of the run."""
    return step % plan.steps_per_epoch == 0 or step == plan.steps


# ==== SAVING: writing the adapter, verifying it, the model card, the last lines
#
# At the end OUTPUT_DIR holds:
#   final_lora/        the adapter in PEFT's format, with tokenizer and model card; verified
#   final_lora_vllm/   the same tensors under the names that vLLM needs, if it needs others
#   run.json           all settings, versions, hashes and losses; write_record() says what each is
#   held_out.jsonl     what was not trained on, with an EVAL_FILE like "10%"
#   checkpoints/       the newest ones, and the best epoch's
#   all_logs.log       everything that was printed, with tracebacks
#   .lock              held by the run that writes here
#   NAME.DATE-TIME     what an earlier run left under that name
#
# The adapter is written beside its place, and moved there only after it was verified. What an
# earlier run left is renamed, never overwritten.


def save_final_lora(trainer: LoraTrainer, job: Job) -> None:
    """Write the adapter beside its place, verify it, and move it in."""
    if job.settings.DEVICE == "cuda":
        torch.cuda.empty_cache()
    staging = job.output / ".partial"
    shutil.rmtree(staging, ignore_errors=True)
    step = epoch_of_final_lora(job)["step"]
    if step != job.plan.steps:
        load_adapter(trainer.model, job.output / "checkpoints" / f"checkpoint-{step}")
    try:
        save_adapter(trainer.model, job, staging)
        verify_saved_adapter(trainer.model, job, staging)
        job.signals_wait = True  # between two renames there may be no final_lora
        move_into_place(staging, job)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def move_into_place(staging: Path, job: Job) -> None:
    """Move the verified files to where users find them, and mark the run as finished."""
    for name in ("final_lora", "final_lora_vllm"):
        rename_old(job.output / name)
    for new in sorted(staging.iterdir()):
        path = new / "adapter_model.safetensors"
        job.adapter_sha256[new.name] = file_sha256(path)
        new.rename(job.output / new.name)
    job.saved_epoch = epoch_of_final_lora(job)
    write_record(job, "finished")


def epoch_of_final_lora(job: Job) -> dict[str, Any]:
    """Return the step whose adapter becomes final_lora, and its name such as "epoch 2 of 3"."""
    step = best_step(job) if job.settings.FINAL_LORA == "best" else job.plan.steps
    label = f"step {step:,}"
    if step % job.plan.steps_per_epoch == 0:
        label = f"epoch {step // job.plan.steps_per_epoch} of {job.settings.NUM_EPOCHS}"
    return {"step": step, "label": label}


def save_adapter(model: peft.PeftModel, job: Job, folder: Path) -> None:
    """Write folder/final_lora, and folder/final_lora_vllm if vLLM needs other names.

    Qwen3.5-4B on the hub wraps the text model that is trained here. Up to version 0.32 vLLM loads
    an adapter with the text model's names without complaint, and serves the base model.
    """
    final, for_vllm = folder / "final_lora", folder / "final_lora_vllm"
    if not Path(job.settings.MODEL_NAME).is_dir():
        model.peft_config["default"].revision = job.settings.MODEL_REVISION
    model.save_pretrained(final, save_embedding_layers=False)
    config = json.loads((final / "adapter_config.json").read_bytes())
    if isinstance(config["target_modules"], list):  # PEFT's is a set, in any order
        config["target_modules"] = in_order_of_settings(config["target_modules"], job.settings)
    write_json(final / "adapter_config.json", config)
    job.chat_format.tokenizer.save_pretrained(final)
    (final / "README.md").write_text(card_text(job), encoding="utf-8")
    tensors = safetensors.torch.load_file(final / "adapter_model.safetensors")
    renamed = {name_in_multimodal_model(name): tensor for name, tensor in tensors.items()}
    if is_multimodal(job.config) and not job.plan.vllm_refuses and renamed.keys() != tensors.keys():
        for_vllm.mkdir()
        shutil.copy(final / "adapter_config.json", for_vllm)
        safetensors.torch.save_file(
            renamed, for_vllm / "adapter_model.safetensors", {"format": "pt"}
        )
    # safetensors files are readable by their owner alone, but the server may be another user.
    for path in folder.glob("*/*.safetensors"):
        shutil.copymode(final / "adapter_config.json", path)


def is_multimodal(config: transformers.PretrainedConfig) -> bool:
    """Return whether a model on the hub wraps the text model that is trained here."""
    return config.get_text_config() is not config


def name_in_multimodal_model(name: str) -> str:
    """Return the name that a tensor of an adapter has in the hub's multimodal model."""
    return name.replace(".model.model.layers.", ".model.model.language_model.layers.", 1)


def refuse_patterns_of_paths(config: peft.LoraConfig) -> None:
    """Raise UserError if a pattern would find nothing among the names that vLLM applies."""
    for key in (*config.rank_pattern, *config.alpha_pattern):
        if "layers" in key:
            raise UserError(f"the pattern {key} is for the names of the text model")


def check_names_for_vllm(
    tensors: dict[str, torch.Tensor], config: transformers.PretrainedConfig
) -> None:
    """Raise UserError unless each tensor of LoRA has its place in the model as the hub has it.

    vLLM looks its modules up under the names of that model. A model on the meta device is asked.

    Args:
        tensors: an adapter's, under the names that they have in its file.
        config: the base model's.
    """
    kind = transformers.AutoModelForCausalLM
    if is_multimodal(config):
        kind = transformers.AutoModelForImageTextToText
    try:
        with torch.device("meta"):
            model = kind.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise UserError(f"the names for vLLM are not known ({one_line(error)})") from error
    places = dict(model.named_modules())
    wrong = []
    for name, tensor in tensors.items():
        path, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
        module = places.get(path)
        if not isinstance(module, torch.nn.Linear):
            wrong.append(name)
            continue
        is_a = matrix.startswith("A.")
        fits = module.in_features if is_a else module.out_features
        if tensor.shape[1 if is_a else 0] != fits:
            wrong.append(name)
    if wrong:
        raise UserError(
            f"{len(wrong):,} of {len(tensors):,} tensors have no place in the model under the "
            f"names that vLLM applies, such as {wrong[0]}"
        )


def verify_saved_adapter(model: peft.PeftModel, job: Job, staging: Path) -> None:
    """Load the adapter from disk onto the base model; raise UserError unless it is the trained one.

    The base model is the one in memory, with the trained LoRA taken out. The tensors of both files
    must be the trained ones to the bit, vLLM's under the names that the plan has found in the hub's
    model. On one example's reply the logits must be those of the trained model and not those of the
    base. A GPU may round: a tenth of the adapter's effect is allowed.
    """
    folder, for_vllm = staging / "final_lora", staging / "final_lora_vllm"
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    check_saved_tensors(model, tensors, folder)
    if for_vllm.is_dir():
        tensors = safetensors.torch.load_file(for_vllm / "adapter_model.safetensors")
        check_saved_tensors(model, tensors, for_vllm, name_in_multimodal_model)
    inputs = pad([(job.held_out or job.examples)[0]], model.device)
    with torch.no_grad():
        wanted = reply_logits(model.eval(), inputs)
        reloaded = peft.PeftModel.from_pretrained(model.unload(), folder).eval()
        error = (reply_logits(reloaded, inputs) - wanted).abs().max().item()
        with reloaded.disable_adapter():
            effect = (reply_logits(reloaded, inputs) - wanted).abs().max().item()
    found = (
        f"reloaded from disk, the adapter's logits differ by at most {error:.2g} from the trained\n"
        f"model's, and by {effect:.2g} from the base model's"
    )
    kept = "The checkpoints are still there."
    if error == effect == 0:
        raise UserError(
            "Not verified: the adapter changes nothing: with it and without it the model's logits "
            "are the same. LEARNING_RATE is too small or the steps are too few; raise one of them "
            f"and choose another OUTPUT_DIR. {kept}"
        )
    if not (effect > 0 and error <= effect / 10):
        raise UserError(
            f"Not verified: {found}. The file is right to the bit, but its effect cannot be told "
            "from rounding, so it does not become final_lora: the steps were too few or "
            f"LEARNING_RATE too small, or loading is at fault. {kept}"
        )
    report("verified", found)


def check_saved_tensors(
    model: peft.PeftModel,
    saved: dict[str, torch.Tensor],
    folder: Path,
    name_there: Callable[[str], str] = str,
) -> None:
    """Raise UserError unless a file's tensors are the model's trained ones, to the bit.

    Args:
        model: with the trained LoRA in it.
        saved: the file's tensors.
        folder: where the file is.
        name_there: returns the name in the file that a tensor must have.
    """
    trained = {
        name_there(name): tensor
        for name, tensor in peft.get_peft_model_state_dict(
            model, save_embedding_layers=False
        ).items()
    }
    wrong = set(trained.keys() ^ saved.keys())
    for name in trained.keys() & saved.keys():
        if not saved[name].equal(trained[name].cpu()):
            wrong.add(name)
    if wrong:
        raise UserError(
            f"Not verified: {folder} does not hold what was trained; these tensors differ or are "
            f"NaN: {join_limited(sorted(wrong), 3, ', ')}. The checkpoints are still there."
        )


def card_text(job: Job) -> str:
    """Return the model card, in the hub's format: base, data, settings, losses, how to load."""
    settings, lora, training = job.settings, lora_config(job.settings), training_config(job)
    is_folder = Path(settings.MODEL_NAME).is_dir()
    data = huggingface_hub.ModelCardData(
        base_model=None if is_folder else settings.MODEL_NAME,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "sft", "trl"],
    )
    # Of a local folder's path only the last name is told.
    base = Path(settings.MODEL_NAME).resolve().name if is_folder else settings.MODEL_NAME
    commit = "" if is_folder else f", commit `{settings.MODEL_REVISION}`"
    revision = "" if is_folder else f', revision="{settings.MODEL_REVISION}"'
    files = [
        f"- `{Path(facts['file']).name}`: {facts['examples']:,} examples, "
        f"{facts['learned_tokens']:,} target tokens, SHA-256 `{facts['sha256']}`"
        for facts in job.data.values()
        if facts
    ]
    losses = losses_before_and_after(job)
    result = "The held-out loss was not measured."
    if losses:
        result = f"The held-out loss went from {losses[0]:.4f} to {losses[1]:.4f} nats a token."
    messages = system_messages(job.examples)
    system = "Most training conversations have no system message; serve without one."
    if messages[0]:
        quotation = "\n".join(f"> {line}" for line in messages[0].splitlines())
        system = f"Serve with the system message of the training:\n\n{quotation}"
    if len(messages) > 1:
        system += f"\n\n(It is the most frequent of {len(messages)} in the training data.)"
    return f"""---
{data.to_yaml()}
---

# A LoRA adapter for {base}

It was trained with `train_lora_single.py`, and does not work without its base model,
`{base}`{commit}.

- LoRA with {lora_in_words(lora)}, dropout {lora.lora_dropout:g}:
  {job.plan.trainable:,} of {job.plan.total:,} parameters
- {steps_in_words(job, job.plan)}; learning rate {training.learning_rate:g}
  ({training.lr_scheduler_type.value}), seed {training.seed}
- this is {epoch_of_final_lora(job)["label"]}
{chr(10).join(files)}

{result} It repeats the habits of its training data, mistakes included: read its replies before you
let anybody rely on them. The base model's licence holds for it, too.

{system}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("final_lora")
base = AutoModelForCausalLM.from_pretrained("{base}"{revision}, dtype="auto")
model = PeftModel.from_pretrained(base, "final_lora").eval()
```

Render conversations with `enable_thinking=False`, as in training.
"""


def losses_before_and_after(job: Job) -> tuple[float, float] | None:
    """Return the held-out loss of the base model and of final_lora, if measured."""
    losses = job.logged("eval_loss")
    if 0 not in losses or len(losses) < 2:
        return None
    return losses[0], losses[epoch_of_final_lora(job)["step"]]


def system_messages(examples: list[Example]) -> list[str]:
    """Return the different system messages, the most frequent one first."""
    counts = Counter(example.system_message for example in examples)
    return [text for text, _ in counts.most_common()]


def summarize(job: Job) -> None:
    """Print what was reached, and the commands that come next."""
    lines = [f"{job.output / 'final_lora'} is the adapter of {job.saved_epoch['label']}"]
    before_and_after = losses_before_and_after(job)
    if before_and_after:
        base, loss = before_and_after
        fell = f"fell by {base - loss:.4f} nats a token" if loss < base else "did NOT fall"
        lines.append(f"the held-out loss {fell}: {base:.4f} -> {loss:.4f}")
        best = best_step(job)
        lowest = job.logged("eval_loss")[best]
        if lowest < loss:
            lines.append(
                f"it was lowest after epoch {best / job.plan.steps_per_epoch:g} ({lowest:.4f}); "
                "to make that adapter final_lora, run the same command with --final_lora best"
            )
    spent = f"{format_time(time.time() - job.started)} in total"
    if job.train_seconds:
        speed = job.train_tokens / job.train_seconds
        spent += f", {format_time(job.train_seconds)} of it training at {speed:,.0f} tokens/s"
    if job.peak_gib:
        spent += f"; torch used at most {job.peak_gib:.1f} GiB of GPU memory"
    report("done", "\n".join([*lines, spent]))
    report("next", "\n".join(next_commands(job)))


def next_commands(job: Job) -> list[str]:
    """Return the commands that measure the adapter and serve it, each with a line before it."""
    final = job.output / "final_lora"
    package = HERE / "inspect_lora"
    is_toy = DEMO["MODEL_NAME"] == job.settings.MODEL_NAME
    lines = ["The package inspect_lora, which measures adapters, is not beside this script."]
    if package.is_dir():
        command = ["python", path_from_here(str(package))]
        lines = ["# Measure what the adapter gained and what else it changed:"]
        if job.settings.DEVICE == "cpu":
            lines.append("# Quicker on a CPU: add --examples 0 --checks 10 --general_file=")
        lines.append(shlex.join([*command, "evidence", str(final)]))
        if not is_toy:
            lines += ["# Talk to it:", shlex.join([*command, "chat", str(final)])]
    if is_toy:  # nobody serves one
        toy = "This was a toy model: its numbers are real, but it can hardly speak. README.md says"
        return [*lines, toy, "how to train a real model, and how to use your own conversations."]
    if job.plan.vllm_refuses:
        return [
            *lines,
            f"vLLM cannot serve it ({job.plan.vllm_refuses}); merge it into its base with "
            "PEFT's merge_and_unload().",
        ]
    for_vllm = job.output / "final_lora_vllm"
    folder = for_vllm if for_vllm.is_dir() else final
    settings, name = job.settings, name_on_server(folder)
    serve = vllm_command(
        settings.MODEL_NAME, settings.MODEL_REVISION, folder, job.plan.max_rank, name
    )
    return [*lines, f"# Serve it as {name}:", serve]


def vllm_command(model_name: str, revision: str, folder: Path, max_rank: int, name: str) -> str:
    """Return the command that serves an adapter as it was trained.

    Args:
        model_name: the base model, a folder or a name on the hub.
        revision: its commit there.
        folder: the adapter, under the names that vLLM applies.
        max_rank: the adapter's largest rank; --max-lora-rank must not be smaller.
        name: under which the server is to offer it.
    """
    command = ["vllm", "serve", model_name]
    if not Path(model_name).is_dir():
        command += ["--revision", revision]
    rank = next(rank for rank in VLLM_RANKS if rank >= max_rank)
    command += ["--enable-lora", "--max-lora-rank", str(rank)]
    command += ["--lora-modules", f"{name}={folder}"]
    command += ["--default-chat-template-kwargs", '{"enable_thinking": false}']
    return shlex.join(command)


def name_on_server(folder: Path) -> str:
    """Return the name under which a server is to offer an adapter: its output folder's name."""
    name = folder.resolve().parent.name if folder.name.startswith("final_lora") else folder.name
    return re.sub(r"[^\w.-]", "-", name) or "adapter"


# ==== RUN.JSON: what is recorded of a run, and how files are written, hashed and renamed
#
# run.json is written when a run begins, with each checkpoint, and at the end. Its outcome says how
# the run ended. A run that stops before it begins, as for a bad line of data, leaves the one that
# is there.


def write_record(job: Job, outcome: str) -> None:
    """Write run.json: what was asked for, what was found, and how it ended."""
    has_failed = outcome.startswith("failed")
    if not job.started or not (is_main_process() or has_failed):
        return
    if outcome != "finished" and another_has_failed(job):
        return
    record = {
        "outcome": outcome,  # "running", "finished", "interrupted: ..." or "failed: ..."
        "started": job.started,  # seconds since 1970
        "ended": None if outcome == "running" else time.time(),
        "command": shlex.join(["python", *sys.argv]),
        "working_folder": str(Path.cwd()),
        "script_sha256": script_sha256(),  # without its SETTINGS
        "versions": installed_versions(),
        "settings": {name: getattr(job.settings, name) for name in setting_types()},
        "lora_config": config_as_recorded(lora_config(job.settings)),  # all of it
        "device": job.device_name,
        "products": job.matmul,  # "native" or "float16"
        "matmul_compared": job.matmul_compared,  # on this GPU: losses, gradients, seconds
        "delta_kernels": job.delta_kernels,  # fla's or torch's, and why
        "memory_limits": asdict(job.token_limits) if job.token_limits else None,  # in tokens
        "plan": {key: value for key, value in asdict(job.plan).items() if "shapes" not in key},
        "data": job.data,  # each file's name, hash and counts
        "system_message": system_messages(job.examples)[0],  # the most frequent one
        "resumed_from": str(job.checkpoint) if job.checkpoint else None,
        "train_seconds": job.train_seconds,  # of this process
        "train_tokens": job.train_tokens,
        "peak_memory_gib": job.peak_gib,
        "published": job.saved_epoch,  # {"step", "label"}
        "adapter_sha256": job.adapter_sha256,  # {folder: hash of adapter_model.safetensors}
        "loss_history": job.history,  # what Trainer logged
    }
    try:
        write_json(job.output / "run.json", record)
    except OSError as error:
        report("warning", f"{job.output / 'run.json'} is not written: {error}")


def another_has_failed(job: Job) -> bool:
    """Return whether another process of this launch has failed and said so in run.json.

    The launcher then stops this one, or its messages to the other fail. Neither is the reason.
    """
    before = read_json(job.output / "run.json") or {}
    return before.get("started") == job.started and before["outcome"].startswith("failed")


def config_as_recorded(config: peft.LoraConfig) -> dict[str, Any]:
    """Return a whole LoraConfig, with its sets in a fixed order."""
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }


@functools.cache  # run.json is written several times in a run
def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are imported here."""
    names = "torch transformers peft trl datasets accelerate safetensors huggingface_hub tokenizers"
    versions = {name: importlib.metadata.version(name) for name in names.split()}
    return {"python": sys.version.split()[0]} | versions


@functools.cache
def script_sha256() -> str:
    """Return the hash of this file without its SETTINGS, which run.json has anyway."""
    text = Path(__file__).read_text(encoding="utf-8")
    before, _, rest = text.partition("\n# ==== SETTINGS")
    _, _, after = rest.partition("\n# ==== THE RUN")
    return hashlib.sha256((before + after).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON file's object, or None if there is none or it is damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        value = json.loads(path.read_bytes())
        return value if isinstance(value, dict) else None
    return None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file in such a way that there is never half of it."""
    # A process that fails may write while the main one does.
    new = path.with_name(f"{path.name}.new" + ("" if is_main_process() else os.environ["RANK"]))
    text = json.dumps(without_nan(value), indent=1, allow_nan=False, default=str)
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def without_nan(value: Any) -> Any:
    """Return value with NaN and infinity as null, since JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def rename_old(path: Path) -> None:
    """Add the time of its last change to the name of what an earlier run left at path, if any."""
    if not os.path.lexists(path):  # a link that leads nowhere is there, too
        return
    when = time.strftime("%Y-%m-%d-%H%M%S", time.localtime(path.lstat().st_mtime))
    aside = path.with_name(f"{path.name}.{when}")
    while os.path.lexists(aside):
        aside = aside.with_name(f"{aside.name}+")
    path.rename(aside)
    report("moved", f"{path} of an earlier run is now {aside}")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_fingerprints(folder: Path, patterns: tuple[str, ...]) -> list[tuple[str, int, str]]:
    """Return name, size and hash of a local model's files; nothing for a name on the hub.

    Of large files only the first MiB, with safetensors' list of tensors, and the last are read:
    8 GB would take a minute at each start.

    Args:
        folder: the model's.
        patterns: of the names of the files that count.
    """
    found = []
    if folder.is_dir():
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            if not any(map(path.match, patterns)):
                continue
            with path.open("rb") as file:
                start = file.read(2**20)
                file.seek(max(0, path.stat().st_size - 2**20))
                end = file.read()
            found.append((path.name, path.stat().st_size, hashlib.sha256(start + end).hexdigest()))
    return found


# ==== FP16 MATMUL: for GPUs that only emulate bfloat16, such as the V100
#
# A V100 multiplies bfloat16 matrices at about 10 TFLOP/s and float16 ones at 95 to 100 (mlxcel
# issue 1654, measured on a V100), but training in float16 as usual gives NaN, since its largest
# number is 65,504. So on a GPU without bfloat16 of its own, and with MATMUL "auto", frozen
# weights are multiplied in float16, each row scaled into its range first. Norms, attention and
# DeltaNet stay in DTYPE, LoRA and the loss in float32.
#
# This was tested on CPUs: tests compare the losses with float32's for the models named below. Other
# models may cast their activations to the type of a weight, which float16 would narrow, so they
# keep DTYPE unless MATMUL says "float16".
#
# With "auto" the GPU itself decides. Before training, a few examples go forward and backward with
# both kinds of matmul. float16 stays if the results agree and if it is faster. If not, the
# weights are loaded anew, since float16 has lost bits of those below 6e-5, and bfloat16 is used. A
# job that is resumed keeps its kind, on another GPU, too; it is refused if float16 is wrong there,
# or runs out of memory.

TESTED_IN_FP16 = ("qwen3_5", "qwen3_5_text", "qwen3", "llama", "gemma3", "gemma3_text")


def choose_matmul(job: Job) -> str:
    """Return how the frozen weights are multiplied: "native", or "float16" where that is faster."""
    settings = job.settings
    if settings.MATMUL != "auto":
        return settings.MATMUL
    if settings.dry_run or settings.DEVICE == "cpu" or settings.DTYPE == "float32":
        return "native"
    # Without the argument torch says yes on a V100 too, which emulates bfloat16.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "native"
    if job.config.model_type in TESTED_IN_FP16:
        return "float16"
    report(
        "matmul",
        f"this GPU only emulates bfloat16, which is slow, and float16 matmul was not tested "
        f'with\nmodels of the type {job.config.model_type}; MATMUL "float16" would use them',
    )
    return "native"


# How far the two kinds of matmul may be apart, as a share, on the same examples.
# The losses of 60 steps of SmolLM2-135M were at most 0.86 % apart.
MOST_LOSS_APART = 0.01
# Either kind gives gradients that err by 2.7 to 5.8 % against float32 (docs/gpu.md), so they may be
# 11.6 % apart. SmolLM2-135M's were 4.2 to 5.4 % apart on a CPU. Those of kernels that compute
# something else are 100 % apart and more.
MOST_GRADIENTS_APART = 0.15
TOKENS_TO_COMPARE = 1024  # recomputed, so many fit wherever training does


@dataclass
class Pass:
    """What a forward and a backward pass gave, and how long they took."""

    loss: float
    gradients: torch.Tensor  # of every B; those of A are 0 at first
    seconds: float


def try_fp16_matmul(trainer: LoraTrainer, job: Job) -> str:
    """Have a model multiply in float16; return why that must not stay on this GPU, or ""."""
    trainer.model.activation_checkpointing_enable()
    trainer.model.disable_input_require_grads()
    set_recomputation(trainer.recomputing_layers, True)
    examples = examples_to_compare(job)
    native = timed_pass_if_it_fits(trainer, examples)
    if native is None:  # the exception is gone, and with it what it held
        torch.cuda.empty_cache()
        examples = examples[:1]
        native = timed_pass(trainer, examples)
    use_fp16_matmul(trainer.model.get_base_model())
    float16 = timed_pass_if_it_fits(trainer, examples)
    transformers.set_seed(job.settings.SEED)  # both drew random numbers
    # All processes must take the same kind.
    reasons = accelerate.utils.gather_object([why_not_fp16(native, float16)])
    reason = min(reasons, key=lambda one: (one == "", one == SLOWER))  # what is wrong comes first
    if reason == SLOWER and job.checkpoint:  # a job that has begun keeps what is right
        reason = ""
    dtype = job.settings.DTYPE
    tried = (
        f"tried on this GPU: {pluralize(len(examples), 'example')} forward and backward took "
        f"{native.seconds:.3f} s in {dtype}"
    )
    job.matmul_compared = {"float16_is_not_used_since": reason}
    if float16 is not None:
        apart = share_apart(native.gradients, float16.gradients)
        tried += (
            f" and\n{float16.seconds:.3f} s in scaled float16; losses {native.loss:.4f} and "
            f"{float16.loss:.4f}, LoRA's gradients {apart:.1%} apart"
        )
        job.matmul_compared |= {
            "seconds": [native.seconds, float16.seconds],  # native, float16
            "loss": [native.loss, float16.loss],
            "gradients_apart": apart,
        }
    used = f"so {dtype} is used, since {reason}" if reason else "so scaled float16 is used"
    report("matmul", f"{tried};\n{used}")
    return reason


SLOWER = "float16 is not faster"


def why_not_fp16(native: Pass, float16: Pass | None) -> str:
    """Return why float16 matmul cannot be used on a GPU, or ""; None did not find its memory."""
    if float16 is None:
        return "float16 matmul ran out of memory"
    for kind in (native, float16):
        if not (math.isfinite(kind.loss) and kind.gradients.isfinite().all()):
            return "a loss or a gradient is not finite"
    if abs(float16.loss - native.loss) > MOST_LOSS_APART * abs(native.loss):
        return f"the losses are more than {MOST_LOSS_APART:.0%} apart"
    if share_apart(native.gradients, float16.gradients) > MOST_GRADIENTS_APART:
        return f"the gradients are more than {MOST_GRADIENTS_APART:.0%} apart"
    if float16.seconds >= native.seconds:
        return SLOWER
    return ""


def share_apart(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the distance of two vectors as a share of the expected one's length."""
    return ((found - expected).norm() / expected.norm()).item()


def examples_to_compare(job: Job) -> list[Example]:
    """Return examples of about the median length, as many as surely fit."""
    by_length = sorted(job.examples, key=lambda example: len(example.input_ids))
    median = len(by_length) // 2
    width = 64 * math.ceil(len(by_length[median].input_ids) / 64)  # as DeltaNet's torch code pads
    count = TOKENS_TO_COMPARE // width
    return by_length[: median + 1][-count:] if count else by_length[:1]


def timed_pass(trainer: LoraTrainer, examples: list[Example]) -> Pass:
    """Send examples forward and backward twice, with the same dropout; the second time counts."""
    model, inputs = trainer.model.train(), pad(examples, trainer.args.device)
    for _ in range(2):  # the first one warms up
        model.zero_grad()
        transformers.set_seed(trainer.args.seed)
        began = time_on(trainer.args.device)
        loss = reply_losses(model, inputs).sum() / len(target_positions(inputs)[0])
        loss.backward()
        seconds = time_on(trainer.args.device) - began
    gradients = [
        weight.grad.flatten() for name, weight in model.named_parameters() if "lora_B" in name
    ]
    found = Pass(loss.item(), torch.cat(gradients), seconds)
    model.zero_grad()
    return found


def timed_pass_if_it_fits(trainer: LoraTrainer, examples: list[Example]) -> Pass | None:
    """Return what timed_pass() does, or None if it runs out of memory."""
    try:
        return timed_pass(trainer, examples)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def time_on(device: torch.device) -> float:
    """Return the time in seconds once a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def take_native_matmul(job: Job, reason: str) -> None:
    """Have a job use native matmul from its beginning; raise UserError if it has begun."""
    if job.checkpoint:
        raise UserError(
            f"{job.checkpoint} was made with float16 matmul, which is not used on this GPU, since "
            f"{reason}. Resume it on another GPU; or --matmul float16 uses it all the same."
        )
    job.matmul = "native"
    if is_main_process():
        write_json(job.output / "checkpoints" / "job.json", describe_job(job))


def scaled_fp16_matmul(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return rows @ weight, multiplied in float16 with float32 sums, in the type of rows.

    Args:
        rows: (... x k), of any floating type.
        weight: (k x d), in float16.

    Each row is divided by the power of two at or below its largest number, which is exact, so
    that its numbers are below 2. Infinity and NaN stay in their rows.
    """
    largest = torch.linalg.vector_norm(rows, math.inf, -1, keepdim=True, dtype=torch.float32)
    # A float32 is a sign, an exponent of 8 bits and a fraction. This mask keeps the exponent and
    # clears the others, which leaves the power of two at or below a positive number.
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    power = power.clamp_(2.0**-120, 2.0**127)  # for rows of nothing but zeros, and for infinity
    small = torch.div(
        rows, power, out=torch.empty(rows.shape, dtype=torch.half, device=rows.device)
    )
    product = small @ weight
    out = torch.empty(product.shape, dtype=rows.dtype, device=rows.device)
    return torch.mul(product, power, out=out)


class ScaledFp16Matmul(torch.autograd.Function):
    """rows @ weight.T, with a gradient for rows alone."""

    @staticmethod
    def forward(context: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply, and keep the weight for the way back."""
        context.weight = weight
        return scaled_fp16_matmul(rows, weight.T)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient for rows, and none for the frozen weight."""
        return scaled_fp16_matmul(gradient, context.weight), None


class Fp16Linear(torch.nn.Linear):
    """A linear module that takes over another one's weight, and multiplies in scaled float16."""

    def __init__(self, module: torch.nn.Linear) -> None:
        """Take over the module's weight, which is in float16 already, and its bias."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = module.in_features, module.out_features
        self.weight, self.bias = module.weight, module.bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows @ weight.T + bias."""
        product = ScaledFp16Matmul.apply(rows, self.weight)
        return product if self.bias is None else product + self.bias


def use_fp16_matmul(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Replace the frozen linear modules by ones that compute with scaled_fp16_matmul()."""
    dtype = model.dtype
    embedding = model.get_input_embeddings()
    # Gemma's embedding scales its rows in the type of its own weight, which its head may share.
    kept = set() if type(embedding) is torch.nn.Embedding else {embedding.weight}
    converted, left = 0, []
    for path, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or ".lora_" in path:
            continue
        # Small ones, such as DeltaNet's in_proj_a (32 x 2,560), would cost more than they save.
        if min(module.weight.shape) < 64:
            continue
        if module.weight in kept or not sums_fit(module.weight):
            left.append(path)
            continue
        module.weight.data = module.weight.data.half()
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Fp16Linear(module))
        converted += 1
    # The embedding may share its weight with the head, and must still return the model's type.
    embedding.register_forward_hook(lambda _, __, rows: rows.to(dtype))
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # float32 sums
    text = f"{converted} frozen modules multiply in scaled float16"
    if left:
        text += f"; {len(left)} stay in {dtype}: {join_limited(left, 3, ', ')}"
    report("matmul", text)
    return model


def sums_fit(weight: torch.Tensor) -> bool:
    """Return whether every sum stays below 65,504, the end of float16, if the inputs are below 2.

    The forward pass adds up a row of weight (d x k), and the backward pass a column.
    """
    columns = torch.zeros(weight.shape[1], device=weight.device)
    largest_row = 0.0
    for rows in weight.detach().split(4096):  # some rows at a time need less memory
        sizes = rows.float().abs()
        largest_row = max(largest_row, sizes.sum(1).max().item())
        columns += sizes.sum(0)
    return max(largest_row, columns.max().item()) < 65504 / 2


# ==== COMMAND LINE: flags, the log, signals, exit statuses, error messages, main()
#
# Each setting is a flag; its name, type and help come from the constant's line. A command ends with
# status 0, with 1 after an error, with 2 after a wrong flag, and with 128 + the signal's number
# after a signal. A mistake that is known is one message: what is wrong, where, and what to do.
# Any other error ends in a traceback. What a training run prints is in all_logs.log, too.

LOG = logging.getLogger("train_lora_single")

# What --demo sets. The toy model was made by data/make_demo_model.py.
HERE = Path(__file__).resolve().parent
DEMO = {
    "MODEL_NAME": str(HERE / "data" / "demo-model"),
    "TRAIN_FILE": str(HERE / "data" / "train.jsonl"),
    "EVAL_FILE": str(HERE / "data" / "eval.jsonl"),
    "OUTPUT_DIR": "output/demo",
    "DEVICE": "cpu",
    "DTYPE": "float32",
    "NUM_EPOCHS": 1,
    "MAX_STEPS": 100,
    "LEARNING_RATE": 2e-3,
}


class UserError(Exception):
    """What the user can put right: one message says what is wrong, where, and what to do."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop by a signal, and did, as the message says."""

    def __init__(self, number: int, message: str) -> None:
        """Remember the signal."""
        super().__init__(message)
        self.number = number


@functools.cache
def setting_types() -> dict[str, Any]:
    """Return {name: type with its limits} of the settings: the annotated constants of this file."""
    return typing.get_type_hints(sys.modules[__name__], include_extras=True)


def parse_settings(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the settings as the flags change them, and the modes dry_run and demo.

    Exits with status 2 after a wrong flag, and with 1 if a constant was edited wrongly.
    """
    parser = build_parser()
    words = sys.argv[1:] if argv is None else argv
    words = [with_underscores(word) for word in words]
    if any(re.fullmatch("--publish(=.*)?", word) for word in words):
        parser.error("--publish is called --final_lora now.")
    given = vars(parser.parse_args(words))
    values = {name: globals()[name] for name in setting_types()}
    problems = check_values(values, is_strict=True)
    if problems:
        raise SystemExit("\n".join(problems))
    modes = {name: given.pop(name) for name in ("dry_run", "demo")}
    if modes["demo"]:
        values |= DEMO
    problems = check_values(given, is_strict=False)
    values |= given
    problems = problems or check_rules(values)
    if problems:
        parser.error("\n".join(problems))
    return argparse.Namespace(**values, **modes)


def with_underscores(word: str) -> str:
    """Return a flag that was typed with hyphens, such as --lora-r, as it is called here."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}"


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with the modes, and with a flag for each setting."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--SETTING VALUE ...] [--dry_run] [--demo]",
        description=__doc__.partition("\n\nThe sections")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given is not in the result
        allow_abbrev=False,
    )
    modes = {
        "--dry_run": "check the data, print the plan, and stop",
        "--demo": f"train a toy model on a CPU: sets {', '.join(DEMO)}; other flags override it",
    }
    for flag, help_text in modes.items():
        parser.add_argument(flag, action="store_true", default=False, help=help_text)
    source = Path(__file__).read_text(encoding="utf-8")
    comments = dict(re.findall(r"^([A-Z][A-Z0-9_]*): .*?  # (.+)$", source, re.MULTILINE))
    flags = parser.add_argument_group("settings")
    for name, hint in setting_types().items():
        default = globals()[name]
        is_list = isinstance(default, list)
        shown = " ".join(map(str, default)) if is_list else default
        help_text = f"{comments.get(name, '')} [{shown}]".replace("%", "%%")
        is_choice = typing.get_origin(hint) is Literal
        flags.add_argument(
            f"--{name.lower()}",
            dest=name,
            nargs="+" if is_list else None,
            metavar="|".join(map(str, typing.get_args(hint))) if is_choice else "VALUE",
            help=help_text,
        )
    return parser


def check_values(values: dict[str, Any], is_strict: bool) -> list[str]:
    """Return what is wrong with settings, a sentence each; the others get their type.

    Args:
        values: {name: value}; a flag's text becomes what its setting's type says.
        is_strict: whether a value must have its type already, as a constant must.
    """
    problems = []
    for name in values:
        hint = setting_types()[name]
        try:
            values[name] = pydantic.TypeAdapter(hint).validate_python(
                values[name], strict=is_strict
            )
        except pydantic.ValidationError as error:
            reason = error.errors()[0]["msg"]
            problems.append(f"{name} is {values[name]!r}: {reason[0].lower()}{reason[1:]}.")
    return problems


def check_rules(values: dict[str, Any]) -> list[str]:
    """Return what is wrong with settings that belong together, a sentence each."""
    problems = []
    eval_file = values["EVAL_FILE"]
    if eval_file.strip().endswith("%") and not 1 <= held_out_percent(eval_file) <= 50:
        problems.append(
            f'EVAL_FILE is {eval_file!r}: a share of TRAIN_FILE is a whole number from "1%" to '
            '"50%".'
        )
    if is_same_file(eval_file, values["TRAIN_FILE"]):
        problems.append(
            "EVAL_FILE is TRAIN_FILE: the held-out loss would be measured on what was trained on. "
            'Give another file, "10%" to hold out a tenth of it, or "" for none.'
        )
    if values["FINAL_LORA"] == "best" and not eval_file:
        problems.append('FINAL_LORA "best" needs an EVAL_FILE, to tell which epoch that is.')
    return problems


def is_same_file(one: str, other: str) -> bool:
    """Return whether two names are equal, or are names of one file, as a link is."""
    with contextlib.suppress(OSError, ValueError):  # one of them does not exist
        return os.path.samefile(one, other)
    return one == other


def is_main_process() -> bool:
    """Return whether this is the process that prints, decides and writes."""
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun or accelerate launch
    return not is_launched or os.environ["RANK"] == "0"


def report(section: str, text: str) -> None:
    """Print and log text beside the name of its section."""
    if not is_main_process():
        return
    lines = f"{section:<10}{text}".replace("\n", "\n" + " " * 10).split("\n")
    text = "\n".join(line.rstrip() for line in lines)
    LOG.info(text)
    tqdm.write(text)  # a progress bar may be shown below
    sys.stdout.flush()


def one_line(value: Any, width: int = 200) -> str:
    """Return value as one line, shortened to width."""
    text = " ".join(str(value).split())
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def path_from_here(path: str) -> str:
    """Return a path as seen from the working folder if it is below it, otherwise as it is."""
    with contextlib.suppress(ValueError):
        return str(Path(path).resolve().relative_to(Path.cwd()))
    return path


def pluralize(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 line" or "1,000 lines"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def join_limited(items: list[str], limit: int = 20, separator: str = "\n") -> str:
    """Join the first items, and say how many more there are."""
    if len(items) <= limit:
        return separator.join(items)
    more = f"... and {len(items) - limit:,} more"
    return separator.join([*items[:limit], more])


def open_log(output: Path) -> logging.Handler:
    """Make the output folder, and open the log there; another run may still be writing to it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        return logging.FileHandler(
            output / "all_logs.log", encoding="utf-8", errors="backslashreplace"
        )
    except OSError as error:
        raise UserError(
            f"OUTPUT_DIR {output} cannot be written ({error.strerror}); choose another folder."
        ) from error


def log_to(log: logging.Handler) -> None:
    """Log what is printed, warnings and tracebacks."""
    logging.basicConfig(handlers=[log, logging.lastResort], format="%(message)s", force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a full disk must not end the run
    LOG.setLevel(logging.INFO)
    LOG.info("\n---- %s %s", time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join(sys.argv))


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock of an output folder; raise UserError if another run writes there."""
    # Without real locks filelock would leave a marker, and one of a killed run would refuse a
    # requeued job for ever.
    lock = filelock.FileLock(output / ".lock", fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise UserError(
            f"OUTPUT_DIR {output} is in use by another run; wait for it, or choose another folder."
        ) from error
    except (OSError, NotImplementedError):  # some network file systems have no locks
        pass
    try:
        yield
    finally:
        lock.release()


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # Slurm may send USR1


def catch_signals(job: Job) -> None:
    """Within a step, finish and save it first; elsewhere, or at a second signal, stop at once."""
    # A launcher may pass a signal on that its process has had already, as Slurm sends it to all.
    may_repeat = "TORCHELASTIC_RUN_ID" in os.environ

    def on_signal(number: int, _: Any) -> None:
        # A terminal that is closed sends SIGHUP twice, from the shell and from the kernel.
        is_second = job.stop_signal > 0 and number != signal.SIGHUP and not may_repeat
        job.stop_signal = number
        if job.signals_wait and not is_second:
            text = "finishing and saving what was begun"
            report("stopping", text + ("" if may_repeat else "; a second signal stops at once"))
            return
        raise Stopped(
            number, "Stopped. The same command resumes from the newest checkpoint, if there is one."
        )

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, on_signal)


def explain(error: BaseException) -> tuple[int, str]:
    """Return exit status and message for what ended the run; no message if it is not known."""
    if isinstance(error, UserError):
        return 1, str(error)
    if isinstance(error, Stopped):
        return 128 + error.number, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "Stopped."
    if is_out_of_memory(error):
        return 1, memory_is_full(one_line(error))
    if is_of_a_full_disk(error):
        return 1, (
            "A file could not be written, because the disk is full, or your quota or a limit on "
            f"the size of files is reached ({one_line(error)}). Make room and give the same "
            "command again: it resumes from the newest checkpoint, if there is one."
        )
    return 1, ""


# The last is how some file systems tell a quota, and what a limit on the size of files gives.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_of_a_full_disk(error: BaseException) -> bool:
    """Return whether an error says that the disk or a quota is full, in any library's words."""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return True
    text = str(error)
    # As safetensors has it; and torch, whose file then ends before the place that it writes to.
    words = "No space left on device|Disk quota exceeded|File too large"
    of_the_system = re.search(words, text)
    return bool(of_the_system) or ("inline_container.cc" in text and "unexpected pos" in text)


def main(argv: list[str] | None = None) -> None:
    """Run the command. Exits with 1 after an error, 2 after a wrong flag, 128 + a signal."""
    settings = parse_settings(argv)
    # transformers advises installing fla; choose_delta_kernels() says where it helps.
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    # PEFT 0.21 calls a function that transformers 5.24 renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    job = Job(settings)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    catch_signals(job)
    try:
        run_or_explain(job)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_or_explain(job: Job) -> None:
    """Do the job; turn what is known to have gone wrong into a message and an exit status."""
    until_the_end = contextlib.ExitStack()  # run.json is written last, still under the lock
    try:
        if not job.settings.dry_run and is_main_process():
            log = open_log(job.output)
            until_the_end.enter_context(locked(job.output))
            log_to(log)
        if DEMO["MODEL_NAME"] == job.settings.MODEL_NAME:
            report("demo", "this is a toy model: look at its numbers, not at its replies")
        run(job)
    except BaseException as error:
        for number in SIGNALS:  # nothing may interrupt what is left to do
            signal.signal(number, signal.SIG_IGN)
        LOG.info("The run was ended by:", exc_info=True)
        status, message = explain(error)
        if job.stop_signal and status == 1 and not isinstance(error, UserError):
            # A library turned the signal into an error of its own.
            status, message = 128 + job.stop_signal, f"Stopped. ({message or repr(error)})"
        how = "interrupted" if status > 1 else "failed"
        write_record(job, "finished" if job.saved_epoch else f"{how}: {message or repr(error)}")
        if not message:
            raise
        print(message, file=sys.stderr)
        raise SystemExit(status) from error
    finally:
        until_the_end.close()
        logging.shutdown()


class LossyOutput(io.FileIO):
    """Standard output or error whose reader may go away: no print may cost a checkpoint."""

    def write(self, data: Any) -> int:
        """Write data, or drop it."""
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def survive_closed_outputs() -> None:
    """Replace standard output and error by ones that never raise."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is not None:  # the shell may have closed it
            raw = LossyOutput(number, "w", closefd=False)
            wrapped = io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True)
            setattr(sys, name, wrapped)
        else:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends


if __name__ == "__main__":
    survive_closed_outputs()
    main()
