"""Train a LoRA adapter for Qwen3.5-4B on your conversations, on one GPU.

It is made for Linux; on Windows it runs in WSL.

    python train_lora_single.py              train on data/train.jsonl; write output/final_lora
    python train_lora_single.py --dry_run    check the data and print the plan; needs no GPU
    python train_lora_single.py --demo       the whole job in a minute, on a CPU, with a toy model
    python train_lora_single.py --split my.jsonl             hold out a tenth of your conversations
    python train_lora_single.py --lora_r 16 --num_epochs 2   every setting below is also a flag

A run that was stopped is resumed by the same command. Older results are renamed, not overwritten.
At the end of a run inspect_lora.py, if it lies beside this file, measures what the adapter is
worth. It also talks to an adapter and compares runs: python inspect_lora.py --help.

The sections of this file, with the questions that they answer. The first three are the heart.
To jump to any other, search for its name after four equals signs, such as "==== MEMORY":

    SETTINGS          What can be changed, and how is a setting added?
    THE RUN           What happens, and in which order?
    MODEL AND LORA    The heart: what is trained, by which trainer, and what checks it?
    DATA              Which two forms may a line have, and what is wrong with a line?
    TOKENS            Which tokens of a conversation are learned?
    PLAN              How many weights and steps? What if a target is misspelt?
    TRAINING          How is a step done? What happens on Ctrl-C, at any moment?
    MEMORY            What if a step does not fit in the GPU's memory?
    CHECKPOINTS       When is a run resumed, and when is a checkpoint refused?
    PUBLISHING        Which files does a run leave, and how is the adapter verified?
    FLOAT16 PRODUCTS  What is different on a V100, and who decides it?
    SPLIT             How is a tenth of a file held out?
    COMMAND LINE      How do flags, the log, exit statuses and messages work?
"""

from __future__ import annotations

import argparse
import bisect
import difflib
import errno
import functools
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
import sys
import textwrap
import time
import types
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if sys.version_info < (3, 11):
    raise SystemExit("This script needs Python 3.11 or newer; README.md says how to get it.")
if sys.platform == "win32":
    raise SystemExit("This script needs Linux; on Windows run it in WSL.")


class LazyModule(types.ModuleType):
    """A library that is imported when it is first used, so that bad data is reported at once."""

    def __getattr__(self, name: str) -> Any:
        """Import the library, and return its attribute."""
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:  # for editors and type checkers
    import accelerate
    import datasets
    import peft
    import safetensors.torch as safetensors_torch
    import torch
    import transformers
    import trl
else:
    accelerate, datasets, peft = map(LazyModule, ["accelerate", "datasets", "peft"])
    safetensors_torch, torch = map(LazyModule, ["safetensors.torch", "torch"])
    transformers, trl = map(LazyModule, ["transformers", "trl"])


# ==== SETTINGS: edit them here, or give the flag of the same name, such as --lora_r 16
#
# To add a setting, write one line with its type, such as
#     WEIGHT_DECAY: float = 0.0  # shrinks A and B a little in each step
# and use it, for example in training_config() as weight_decay=settings.WEIGHT_DECAY. Every constant
# with a type gets a flag, a check and a help text, and is recorded in run.json; a checkpoint made
# with another value, or before there was one, is refused. Limits go into check_rules().

# The model.
MODEL_NAME: str = "Qwen/Qwen3.5-4B"  # a chat model on the Hugging Face hub, or a local folder
MODEL_REVISION: str = "main"  # the model's branch, tag or commit on the hub
DTYPE: Literal["bfloat16", "float32"] = "bfloat16"  # the type of the frozen weights
DEVICE: Literal["cuda", "cpu"] = "cuda"  # "cpu" is for small models

# The data. The section DATA shows the two forms that a line may have.
TRAIN_FILE: str = "data/train.jsonl"  # the conversations to learn from
EVAL_FILE: str = "data/eval.jsonl"  # only measured, never trained on; a tenth; "" for none
REPLIES: Literal["all", "last"] = "all"  # of a "messages" line: teach every reply, or only the last
GENERAL_FILE: str = "data/general.jsonl"  # other tasks, to see what else changed; "" for none
MAX_SEQ_LEN: int = 512  # in tokens; longer examples, at most a tenth, are left out, never cut

# LoRA: y = W x + (alpha / r) B A x. W (d x k) is frozen; A (r x k) and B (d x r) are trained.
# If you change r, keep alpha: then the best learning rate hardly changes (README.md, Evidence).
LORA_R: int = 8  # the rank; a rule of thumb: 4 for a narrow task, 8 for a style, 16 for more
LORA_ALPHA: int = 16  # scales the update by alpha / r; usual is 2 r; too large, and the loss jumps
LORA_DROPOUT: float = 0.05  # on the LoRA branch only; makes it harder to learn phrases by heart
LORA_TARGET_MODULES: list[str] = [  # the layers that LoRA is added to, by name
    "q_proj",  # attention: which words the model looks at
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",  # feed-forward: which words it chooses
    "up_proj",
    "down_proj",
]

# Training.
NUM_EPOCHS: int = 3  # passes over the training file; lower it if the held-out loss rises again
MAX_STEPS: int = 0  # stop after this many steps, to try things out; 0 for all epochs
# Only the product of these two counts. How many examples of a step go through the GPU at once is
# found by trying, see MEMORY.
BATCH_SIZE: int = 2  # examples in a step = BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS
GRADIENT_ACCUMULATION_STEPS: int = 2  # the other factor
LEARNING_RATE: float = 2e-4  # the highest rate; lower it if the loss jumps
LR_SCHEDULER_TYPE: Literal[  # the shape of the learning rate after its rise
    "cosine", "linear", "constant_with_warmup"
] = "cosine"
WARMUP_RATIO: float = 0.03  # the share of the steps in which the learning rate rises from 0
SEED: int = 42  # for A's first values, dropout and order; on a CPU, the same run to the byte

# Results.
OUTPUT_DIR: str = "output"  # gets final_lora, samples.md, lora.png, run.json and checkpoints
LOGGING_STEPS: int = 10  # a line is printed every so many steps
SAVE_STEPS: int = 50  # a checkpoint every so many steps: the most that a crash can lose
PUBLISH: Literal["last", "best"] = "last"  # the epoch for final_lora; "best" by held-out loss
REPORT_TO: str = "none"  # also log to "tensorboard", "wandb" or "trackio", if it is installed
EVIDENCE_EXAMPLES: int = 50  # held-out examples that measure the adapter's parts; 0 for none
EVAL_GROUP: str = "kind"  # the key that groups held-out lines in the report; "" for none
NUM_SAMPLES: int = 6  # at least so many held-out prompts, and one of each kind, in samples.md
MAX_NEW_TOKENS: int = 200  # a reply is cut after this many tokens

# Products of matrices.
MATMUL: Literal["auto", "native", "float16"] = "auto"  # see FLOAT16 PRODUCTS; "auto" measures


# ==== THE RUN: the whole job
#
# Each line of run() is a step of the job; the comment after it says which section explains it.


def run(job: Job) -> None:
    """Train and publish one adapter. A Job holds the settings, and what is found on the way."""
    prepare(job)  # DATA, TOKENS, PLAN: everything that comes before the weights
    if job.settings.dry_run:
        nothing = "Nothing was trained. Without --dry_run the same command starts this run."
        report("done", f"{tokens_in_words(job.train, job.settings)}\n{nothing}")
        return
    choose_matmul(job)  # FLOAT16 PRODUCTS: how this GPU multiplies best
    resume_or_begin(job)  # CHECKPOINTS: an earlier run to resume, if there is one
    trainer = build_trainer(job)  # MODEL AND LORA: the weights, with LoRA in them
    check_only_lora_is_trained(trainer.model, job.plan)  # MODEL AND LORA
    find_what_fits(trainer, job)  # MEMORY: how many examples at once
    train(trainer, job)  # TRAINING: all steps, or those that are left
    if not is_main_process():
        return
    adapter = publish(trainer, job)  # PUBLISHING: write, load again, compare, move into place
    measure_worth(adapter, job)  # by inspect_lora.py, if it lies beside this file
    summarize(job)  # PUBLISHING: the verdict, and what to do next


@dataclass
class Job:
    """What a run is given, and what it finds out step by step."""

    settings: argparse.Namespace
    config: transformers.PretrainedConfig | None = None
    chat_format: ChatFormat | None = None  # how conversations become tokens
    train: list[Example] = field(default_factory=list)
    held_out: list[Example] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)  # counts and hashes of the two files
    plan: Plan | None = None
    device_name: str = ""
    # Which products are used, "native" or "float16", and what was measured of both.
    matmul: dict[str, Any] = field(default_factory=lambda: {"used": "native"})
    token_limits: MemoryLimits | None = None
    checkpoint: Path | None = None  # the one to resume from
    started: float = 0.0  # seconds since 1970
    history: list[dict[str, float]] = field(default_factory=list)  # what the trainer logged
    train_seconds: float = 0.0  # of optimizer steps in this process, evaluation apart
    train_tokens: int = 0  # of these steps
    peak_gib: float = 0.0  # GPU memory that torch had in use at the most
    saves_before_stopping: bool = False  # a signal waits until the step is finished and saved
    stop_signal: int = 0  # the signal that asks the run to stop
    published: str = ""  # which epoch became final_lora
    adapter_sha256: dict[str, str] = field(default_factory=dict)  # of the published files
    findings: dict[str, Any] = field(default_factory=dict)  # what inspect_lora.py found

    @property
    def output(self) -> Path:
        """The folder of the results."""
        return Path(self.settings.OUTPUT_DIR)

    def logged(self, key: str) -> dict[int, float]:
        """Return {step: value} of "loss" or "eval_loss"; the eval loss at step 0 is the base's."""
        return logged(self.history, key)


# ==== MODEL AND LORA: the heart
#
# Each target, a matrix W of the model, gets two small matrices beside it, A and B. Only these are
# trained, in float32; W and all else stay frozen. lora_config() says which layers are targets and
# how large A and B are. SFTTrainer puts them into the model. check_only_lora_is_trained() then
# compares all weights that can be trained with the plan: not one more, and not one less.


def lora_config(settings: argparse.Namespace) -> peft.LoraConfig:
    """Return what PEFT is asked for. Any LoraConfig that refuse_unsupported() lets through will do.

    Examples are use_dora=True, or rank_pattern={"down_proj": 16} with alpha_pattern={"down_proj":
    32}, since an update is scaled by its alpha / r. The plan prints what follows.
    """
    return peft.LoraConfig(
        r=settings.LORA_R,  # the rank: A is r x k, B is d x r
        lora_alpha=settings.LORA_ALPHA,  # the update is scaled by alpha / r
        target_modules=settings.LORA_TARGET_MODULES,  # must be names of the model's layers
        lora_dropout=settings.LORA_DROPOUT,  # on LoRA's input only
        bias="none",  # the biases stay frozen
        task_type="CAUSAL_LM",  # the model predicts the next token
    )


def build_trainer(job: Job) -> trl.SFTTrainer:
    """Load the base model and return a trainer whose model has LoRA in it.

    LoRA gets into the model that is trained here, by SFTTrainer's peft_config, and nowhere else. Do
    not also call PEFT's get_peft_model(): LoRA would be added twice, TRL refuses such a model, and
    the check below would stop the run.
    """

    class LoraTrainer(OurTrainerMethods, trl.SFTTrainer):
        """TRL's trainer with a few methods of ours; TRAINING gives the reason for each."""

    model = load_model(job.settings)
    if job.matmul["used"] == "float16":
        model = use_float16_products(model)  # see FLOAT16 PRODUCTS
    trainer = LoraTrainer(
        model=model,
        peft_config=lora_config(job.settings),  # the only injection
        args=training_config(job),
        train_dataset=to_dataset(job.train),  # TRL's collator pads each step
        eval_dataset=to_dataset(job.held_out) if job.held_out else None,
        processing_class=job.chat_format.tokenizer,
    )
    trainer.job, trainer.sampler = job, LikeLengthsSampler(job)
    trainer.add_callback(training_callback(trainer))  # prints, checks, saves and stops
    trainer.remove_callback(transformers.PrinterCallback)  # it would print dictionaries
    return trainer


def check_only_lora_is_trained(model: peft.PeftModel, plan: Plan) -> None:
    """Stop unless exactly the planned weights are trainable, all of them in float32.

    For Qwen3.5-4B and the settings above the trained share is 0.2518 %.
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
    if total != plan.total and shapes == plan.trainable_shapes:
        raise SystemExit(
            f"LoRA is not in place as planned: the model has {total:,} parameters, but "
            f"{plan.total:,} were planned. Is something added to it twice?"
        )
    if shapes != plan.trainable_shapes:
        different = sorted(name for name, _ in shapes.items() ^ plan.trainable_shapes.items())
        raise SystemExit(
            f"LoRA is not in place as planned: {share}, but {plan.trainable:,} were planned. "
            f"The difference is in {join_limited([*dict.fromkeys(different)], 3, ', ')}."
        )
    narrow = [name for name, weight in trainable.items() if weight.dtype != torch.float32]
    if narrow:
        raise SystemExit(
            f"{len(narrow)} trained weights, such as {narrow[0]}, are not in float32 but in "
            f"{trainable[narrow[0]].dtype}, which rounds small steps away. Set DTYPE to float32."
        )
    report("model", f"{share}, in float32; all else is frozen")


def training_config(job: Job) -> trl.SFTConfig:
    """Return what TRL is asked for. Its defaults hold: AdamW without decay, clipping at 1.0."""
    settings = job.settings
    processes = accelerate.PartialState().num_processes
    return trl.SFTConfig(
        output_dir=str(job.output / "checkpoints"),
        seed=settings.SEED,
        num_train_epochs=settings.NUM_EPOCHS,
        max_steps=job.plan.steps,  # this decides, not the epochs
        learning_rate=settings.LEARNING_RATE,
        lr_scheduler_type=settings.LR_SCHEDULER_TYPE,
        # TRL would round a fraction up. With a warm-up the first step has the rate 0, so a run of
        # fewer than 34 steps has none.
        warmup_steps=int(settings.WARMUP_RATIO * job.plan.steps),
        # Our training_step() gets a whole step, and divides it into as few parts as fit in memory.
        per_device_train_batch_size=examples_per_step(settings) // processes,
        gradient_accumulation_steps=1,
        activation_checkpointing=False,  # find_what_fits() decides
        bf16=False,  # no autocast: the weights have their type already
        use_cpu=settings.DEVICE == "cpu",
        dataset_kwargs={"skip_prepare_dataset": True},  # TRL must not render, cut or pack
        eos_token=job.chat_format.tokenizer.eos_token,
        eval_strategy="epoch" if job.held_out else "no",
        eval_on_start=bool(job.held_out) and not job.checkpoint,  # the base model's loss
        save_strategy="epoch",  # and every SAVE_STEPS steps, see TRAINING
        logging_steps=1,  # every loss is checked and recorded
        logging_nan_inf_filter=False,  # a NaN must not be replaced by a mean
        include_num_input_tokens_seen="non_padding",
        router_aux_loss_coef=0.0,  # routers stay frozen, and our loss has no part for them
        report_to=settings.REPORT_TO,
        disable_tqdm=not sys.stderr.isatty(),  # the progress bar is for a terminal
        ddp_find_unused_parameters=False,
    )


def load_model(settings: argparse.Namespace) -> transformers.PreTrainedModel:
    """Load the base model's text part straight onto the device, in DTYPE."""
    from huggingface_hub.errors import HTTPError
    from safetensors import SafetensorError

    device = accelerate.PartialState().device
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            settings.MODEL_NAME,
            revision=settings.MODEL_REVISION,
            dtype=settings.DTYPE,
            device_map={"": device} if device.type == "cuda" else None,  # no copy in main memory
            trust_remote_code=False,
            use_safetensors=True,  # a pickle could run code
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, SafetensorError, HTTPError) as error:
        raise SystemExit(
            f"MODEL_NAME {settings.MODEL_NAME}: the weights cannot be loaded ({one_line(error)}). "
            "Whole safetensors files are needed; run the command again to go on downloading."
        ) from error
    if found["missing_keys"]:  # transformers would train on random numbers in their place
        missing = join_limited(sorted(found["missing_keys"]), 3, ", ")
        raise SystemExit(f"MODEL_NAME {settings.MODEL_NAME}: the files lack the weights {missing}.")
    return model


# ==== DATA: reading the conversations and checking every line
#
# A line is one conversation, in one of two forms:
#     {"prompt": [messages], "completion": [one message]}   teaches the completion alone
#     {"messages": [messages]}                              teaches each reply of the assistant;
#                                                           with REPLIES "last" only the last one
# A message has a "role" and a "content". At most one system message comes first, then user and
# assistant take turns, and a reply comes last. Other keys of the line are ignored, except "tools",
# which is refused, and the held-out lines' EVAL_GROUP.
#
# Every line of both files is checked. All problems are reported together, by file and line (at most
# 20 of them), before torch is imported, and nothing is trained. What only the tokenizer can see is
# checked after that, in TOKENS.


def prepare(job: Job) -> None:
    """Read the data, render it as the model will see it, and print what would be trained.

    This is all that comes before the weights: the sections DATA, TOKENS and PLAN.
    """
    settings = job.settings
    train, held_out = read_both_files(settings)
    warn_of_missing_system_messages(
        settings.TRAIN_FILE, {example.where: example.system_message for example in train}
    )
    warn_of_repeats(train, held_out)
    warn_of_unknown_group(held_out, settings.EVAL_GROUP)
    if not settings.dry_run:
        job.device_name = prepare_device(settings)
    job.config, job.chat_format = load_config_and_tokenizer(settings)
    job.train, job.held_out = encode(job, train, held_out)
    job.data = report_tokens(job)
    show_example(job.train[0], job.chat_format.tokenizer)
    job.plan = make_plan(job)
    check_multi_gpu_split(job)


def read_both_files(settings: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """Return the examples of both files; exit with all that is wrong with any line."""
    train, problems = read_examples(settings.TRAIN_FILE, replies=settings.REPLIES)
    held_out: list[Example] = []
    if settings.EVAL_FILE:
        try:
            held_out, more_problems = read_examples(
                settings.EVAL_FILE, settings.EVAL_GROUP, replies=settings.REPLIES
            )
            problems += more_problems
        except SystemExit as error:  # there is no such file, which is one more problem
            if not problems:
                raise
            problems.append(str(error))
    stop_if_bad(problems)
    return train, held_out


def stop_if_bad(problems: list[str], done: str = "trained") -> None:
    """Exit with the first problems, and their number, if there are any."""
    if problems:
        noun = "problems" if len(problems) > 1 else "problem"
        count = f"The data has {len(problems):,} {noun}, so nothing was {done}."
        raise SystemExit(f"{join_limited(problems)}\n{count}")


@dataclass
class Example:
    """A reply to be learned, and the conversation that leads to it."""

    where: str  # file:line
    messages: list[dict[str, str]]  # up to and including the reply
    eval_group: str = ""  # the line's value of the key EVAL_GROUP
    prompt_ids: list[int] = field(default_factory=list)  # tokens that are only read
    reply_ids: list[int] = field(default_factory=list)  # tokens that are learned, with the end
    keys: list[str] = field(default_factory=list)  # all keys of the line
    is_last: bool = True  # whether no reply follows in its line

    @property
    def input_ids(self) -> list[int]:
        """All tokens, as the model sees them."""
        return self.prompt_ids + self.reply_ids

    @property
    def system_message(self) -> str:
        """The text of the system message, or an empty one."""
        first = self.messages[0]
        return first["content"] if first["role"] == "system" else ""


MESSAGE_RULE = 'a message is {"role": "system", "user" or "assistant", "content": "some text"}'
ORDER_RULE = "write at most one system message, then user and assistant in turn"
SHAREGPT_RULE = (
    'rename "conversations" to "messages", "from" to "role", "value" to "content", and the roles '
    '"human" to "user" and "gpt" to "assistant", or let --split do all this; see README.md'
)
FORM_RULE = (
    'write {"prompt": [messages], "completion": [one message]} or {"messages": [messages]}; '
    "README.md shows both forms"
)


def read_examples(
    path: str,
    group_key: str = "",
    accepts_sharegpt: bool = False,
    accepts_thinking: bool = False,
    replies: str = "all",
) -> tuple[list[Example], list[str]]:
    """Return a file's examples, and a description of every line that is not as it should be.

    Nothing here needs a model or a heavy library. Exits if the file cannot be read or is empty.

    Args:
        path: a JSONL file.
        group_key: the key of a line whose value becomes Example.eval_group.
        accepts_sharegpt: take lines in the ShareGPT form, too; training does not.
        accepts_thinking: take replies with a <think> part, too; training does not.
        replies: "all" or "last", what a line with "messages" teaches.
    """

    def examples_in(text: str, where: str) -> list[Example]:
        row = parse_row(text)
        if accepts_sharegpt:
            row = from_sharegpt(row)
        return examples_of(row, where, group_key, accepts_thinking, replies)

    shown = path_from_here(path)
    lines = read_lines(path)
    if is_json_array(lines):
        advice = (
            "put each object on a line of its own, without the outer [ ] and the commas between, "
            "or let --split do it"
        )
        return [], [f"{shown}: this is one JSON array; {advice}"]
    numbered = {f"{shown}:{number}": line for number, line in enumerate(lines, 1)}
    examples, problems = from_each_line(numbered, examples_in)
    if not examples and not problems:
        raise SystemExit(f"{path} holds no examples; {FORM_RULE}.")
    if not problems:
        report("data", f"{shown}: {len(examples):,} examples")
    return examples, problems


def read_lines(path: str, settings: str = "TRAIN_FILE and EVAL_FILE") -> list[bytes]:
    """Return a file's lines; exit if it cannot be read, naming the settings to check."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise SystemExit(f"{path} is not a file; {settings} must be JSONL files.")
        return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError as error:
        where = "" if Path(path).is_absolute() else f" (in {Path.cwd()})"
        raise SystemExit(f"There is no file {path}{where}; check {settings}.") from error
    except OSError as error:
        raise SystemExit(f"{path} cannot be read ({error.strerror}); check {settings}.") from error


def from_each_line(
    lines: dict[str, bytes], read: Callable[[str, str], list[Any]]
) -> tuple[list[Any], list[str]]:
    """Return all that is read from lines, and what is wrong with each of the others.

    Args:
        lines: {where it is: what it holds}, such as {"my.jsonl:1": b"..."}; blank ones are skipped.
        read: gets a line's text and where it is; raises ValueError with what is wrong with it.
    """
    found: list[Any] = []
    problems: list[str] = []
    for where, line in lines.items():
        try:
            # Concatenated files may each start with a byte order mark.
            text = line.decode("utf-8-sig").strip()
            if text:
                found += read(text, where)
        except UnicodeDecodeError as error:
            problems.append(
                f"{where}: this is not UTF-8 (byte {error.start + 1}); save it as UTF-8"
            )
        except RecursionError:
            problems.append(f"{where}: the JSON is nested too deeply; {FORM_RULE}")
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return found, problems


def is_json_array(lines: list[bytes]) -> bool:
    """Return whether a file looks like one array over several lines, or on one."""
    first = next((line.strip() for line in lines if line.strip()), b"")
    return first == b"[" or first.startswith((b"[{", b"[ {"))


def parse_row(text: str) -> dict[str, Any]:
    """Return a line's JSON object, or raise ValueError."""
    try:
        row = json.loads(text, object_pairs_hook=object_with_unique_keys)
    except json.JSONDecodeError as error:
        hint = ""
        if error.msg == "Expecting ',' delimiter":
            hint = " (often a quotation mark within the text lacks its backslash)"
        raise ValueError(
            f"this is not JSON: {error.msg} at character {error.colno}{hint}"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"this is not an object but {one_line(text, 60)}; {FORM_RULE}")
    return row


def examples_of(
    row: dict[str, Any], where: str, group_key: str, accepts_thinking: bool, replies: str = "all"
) -> list[Example]:
    """Return one example for each reply that a line teaches, or raise ValueError.

    A line with "completion" teaches that one reply; a line with "messages" teaches every reply, or
    the last one.
    """
    if "tools" in row:
        raise ValueError('this script does not train the use of tools; remove the key "tools"')
    messages = conversation_of(row)
    check_messages(messages, accepts_thinking)
    if "completion" in row and len(row["completion"]) != 1:
        raise ValueError(
            f'"completion" holds {len(row["completion"])} messages; write only the last reply '
            'there, and what comes before it in "prompt"'
        )
    places = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    end = places[-1]
    if "completion" in row or replies == "last":
        places = [end]
    eval_group = str(row.get(group_key, "")) if group_key else ""
    check_characters(eval_group, f"value of {one_line(json.dumps(group_key), 40)} (EVAL_GROUP)")
    return [
        Example(where, messages[: place + 1], eval_group, keys=list(row), is_last=place == end)
        for place in places
    ]


SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant"}
SHAREGPT_ROLES |= {"assistant": "assistant", "chatgpt": "assistant", "bing": "assistant"}


def from_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    """Return a line in the ShareGPT form as one with "messages"; any other line as it is.

    ShareGPT names a conversation's messages "conversations", with "from" and "value". A greeting
    before the first question and a question after the last reply are left out, since nobody asks
    for the one or answers the other. What this cannot translate stays as it is, and is refused by
    the checks that follow.
    """
    turns = row.get("conversations")
    if not isinstance(turns, list) or "messages" in row or "prompt" in row:
        return row
    messages = [one_from_sharegpt(turn) if isinstance(turn, dict) else turn for turn in turns]
    messages = from_question_to_reply(messages)
    system = row.get("system")
    if isinstance(system, str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    rest = {key: value for key, value in row.items() if key not in ("conversations", "system")}
    return rest | {"messages": messages}


def one_from_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    """Return a message of the ShareGPT form with "role" and "content"; an unknown role stays."""
    if "from" not in turn or "value" not in turn:
        return turn
    sender = turn["from"]
    role = SHAREGPT_ROLES.get(sender, sender) if isinstance(sender, str) else sender
    return {"role": role, "content": turn["value"]}


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


def object_with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dictionary, or raise ValueError if a key occurs twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            shown = one_line(json.dumps(key), 40)
            raise ValueError(f"the key {shown} occurs twice in one object; remove one")
        found[key] = value
    return found


def conversation_of(row: dict[str, Any]) -> list[Any]:
    """Return all messages of a line, or raise ValueError."""
    found = [key for key in ("messages", "prompt", "completion") if key in row]
    if found not in (["messages"], ["prompt", "completion"]):
        keys = [one_line(json.dumps(key), 40) for key in list(row)[:5]]
        names = " and ".join(found) or ", ".join(keys) or "nothing"
        if "conversations" in row and not found:
            raise ValueError(SHAREGPT_RULE)
        raise ValueError(f"the line has {names}; {FORM_RULE}")
    messages: list[Any] = []
    for key in found:
        if not isinstance(row[key], list) or not row[key]:
            raise ValueError(f'"{key}" is {one_line(json.dumps(row[key]), 60)}; {FORM_RULE}')
        messages += row[key]
    return messages


def check_messages(messages: list[Any], accepts_thinking: bool = False) -> None:
    """Raise ValueError unless the messages form a conversation that ends with a reply."""
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            shown = one_line(json.dumps(message), 60)
            raise ValueError(f"message {number} is {shown}; {MESSAGE_RULE}")
        if unknown := sorted(message.keys() - {"role", "content"}):
            raise ValueError(
                f"message {number} has the key {one_line(json.dumps(unknown[0]), 40)}, which would "
                f"be ignored; {MESSAGE_RULE}"
            )
        if missing := sorted({"role", "content"} - message.keys()):
            raise ValueError(f'message {number} has no "{missing[0]}"; {MESSAGE_RULE}')
        if message["role"] not in ("system", "user", "assistant"):
            shown = one_line(json.dumps(message["role"]), 40)
            raise ValueError(f"the role of message {number} is {shown}; {MESSAGE_RULE}")
        check_content(message["content"], number)
        if message["role"] == "assistant" and not accepts_thinking:
            check_for_thinking(message["content"], number)
    roles = [message["role"] for message in messages]
    if not re.fullmatch("(system )?(user assistant )+", " ".join(roles) + " "):
        raise ValueError(f"the messages are {join_limited(roles, 6, ', ')}; {ORDER_RULE}")


def check_content(content: Any, number: int) -> None:
    """Raise ValueError unless a message's content is text that can be trained on and served."""
    if not isinstance(content, str):
        shown = one_line(json.dumps(content), 60)
        raise ValueError(f"the content of message {number} is {shown}; it must be a text")
    if not content.strip():
        raise ValueError(f"the content of message {number} is empty; write it, or remove the line")
    check_characters(content, f"content of message {number}")


def check_for_thinking(content: str, number: int) -> None:
    """Raise ValueError if a reply holds a <think> tag."""
    if re.search("</?think>", content):
        raise ValueError(
            f"message {number} holds a <think> tag, but the model will answer without thinking; "
            "remove the tag and what is in it"
        )


def check_characters(text: str, what: str) -> None:
    """Raise ValueError if a text holds half a character, which cannot be written or tokenized."""
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(
            rf"the {what} holds half a character (a lone surrogate such as \ud83d); write the "
            "whole character"
        )


def warn_of_missing_system_messages(path: str, system_messages: dict[str, str]) -> None:
    """Warn if some conversations of a file have a system message, and others have none.

    Args:
        path: the file.
        system_messages: {where a conversation is: its system message, or an empty text}.
    """
    without = [where for where, text in system_messages.items() if not text]
    if not without or len(without) == len(system_messages):
        return
    lack = f"have no system message ({without[0]} is one)"
    if len(without) == 1:
        lack = f"has no system message ({without[0]})"
    report(
        "warning",
        wrap_lines(
            f"{len(without):,} of the {len(system_messages):,} conversations in "
            f"{path_from_here(path)} {lack}, and the others have one. The model's chat template "
            "may put one of its own there, which is then trained on. Begin all of them with the "
            "system message that you will serve with, or leave it out of all.",
            90,
        ),
    )


def warn_of_repeats(train: list[Example], held_out: list[Example]) -> None:
    """Print the held-out prompts that are trained on as well."""

    def prompt(example: Example) -> str:
        return json.dumps(example.messages[:-1], sort_keys=True)

    trained: dict[str, str] = {}
    for example in train:
        trained.setdefault(prompt(example), example.where)
    notes: dict[str, None] = {}  # without repeats, in order
    for example in held_out:
        if prompt(example) in trained:
            twin = trained[prompt(example)]
            note = f"{example.where} has the prompt of {twin}, so its reply tests nothing new"
            notes[note] = None
    if notes:
        report("warning", join_limited(list(notes)))


def warn_of_unknown_group(held_out: list[Example], group_key: str) -> None:
    """Warn of an EVAL_GROUP that no held-out line has; "kind" is silent, as it is the default."""
    keys = dict.fromkeys(key for example in held_out for key in example.keys)
    if not held_out or group_key in ("", "kind", *keys):
        return
    others = [key for key in keys if key not in ("messages", "prompt", "completion")]
    shown = [one_line(json.dumps(key), 40) for key in others[:5]]
    there = f"they have {', '.join(shown)}" if shown else "they have no other keys"
    report(
        "warning",
        f"EVAL_GROUP is {json.dumps(group_key)}, a key that no held-out line has; {there}",
    )


# ==== TOKENS: what the model sees, and which part of it is learned
#
# A conversation is rendered by the model's own chat template, as a server renders it. The tokens of
# a reply are learned, with the token that ends its turn; all that comes before is only read. So a
# conversation with three user turns is
#   as "messages"                three examples: each of the three replies is learned once, after
#                                all that was said before it;
#   as "prompt" and "completion" one example: the last reply is learned, and the two replies in the
#                                prompt are only read. So it is as "messages", with REPLIES "last".
# What is wrong with the model's template is said once, of the model, before any line is rendered;
# what is wrong with a line is said of the line.
# An example that is longer than MAX_SEQ_LEN is left out and named; it is never cut. If more than a
# tenth of a file is too long, the run is refused.


@dataclass
class ChatFormat:
    """How a model's conversations become tokens: here, in the chat, and on a server."""

    tokenizer: transformers.PreTrainedTokenizerBase
    end_ids: list[int]  # the tokens at which the model stops
    enable_thinking: bool = False  # the server's command that is printed has it, too

    @functools.cached_property
    def control_tokens(self) -> list[str]:
        """The tokens that no text may hold, such as the one at which the model stops."""
        added = self.tokenizer.added_tokens_decoder.values()  # slow: Gemma has 6,384
        return [str(token) for token in added if token.special]

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens of a conversation that the model is to reply to."""
        return self.ids(messages, add_generation_prompt=True)

    def ids(self, messages: list[dict[str, str]], **how: Any) -> list[int]:
        """Return the tokens of a conversation, as the model's chat template writes it."""
        return self.tokenizer.apply_chat_template(
            messages, enable_thinking=self.enable_thinking, return_dict=False, **how
        )

    def end_names(self) -> str:
        """Return the tokens at which the model stops, by name."""
        return " or ".join(self.tokenizer.convert_ids_to_tokens(self.end_ids))


def load_config_and_tokenizer(
    settings: argparse.Namespace, tokenizer_folder: str = ""
) -> tuple[transformers.PretrainedConfig, ChatFormat]:
    """Return MODEL_NAME's configuration and chat format; turn its branch into a commit.

    Args:
        settings: MODEL_REVISION becomes the commit that was found on the hub.
        tokenizer_folder: where the tokenizer is, if it is not the model's own.
    """
    from huggingface_hub import resolve_revision
    from huggingface_hub.errors import HTTPError, RevisionResolutionError

    name = settings.MODEL_NAME
    try:
        if not Path(name).is_dir():  # transformers alone retries an unknown name for 25 seconds
            commit = resolve_revision(name, revision=settings.MODEL_REVISION)
            settings.MODEL_REVISION = commit.resolved
        chosen = {"revision": settings.MODEL_REVISION, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(name, **chosen)
        where = {"trust_remote_code": False} if tokenizer_folder else chosen
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder or name, **where)
        end_ids = tokens_that_stop(settings, tokenizer)
    except RevisionResolutionError as error:
        raise SystemExit(
            f"The Hugging Face hub cannot be reached, and {name} is not stored on this machine. "
            "Check the network, or give a local folder as MODEL_NAME."
        ) from error
    except (OSError, ValueError, HTTPError) as error:
        raise SystemExit(
            f"MODEL_NAME {name}: there is no such model, or it cannot be reached "
            f"({one_line(error)}). Check the name, the folder or the network."
        ) from error
    if not tokenizer.chat_template or not end_ids:
        raise SystemExit(
            f"MODEL_NAME {name}: its tokenizer has no chat template or no end-of-turn token. "
            "Use a model that was trained to chat, such as Qwen/Qwen3.5-4B."
        )
    if "quantization_config" in config.to_dict():
        raise SystemExit(
            f"MODEL_NAME {name}: this model is quantized, which is not supported. "
            "Use the model that it was made from."
        )
    return config, ChatFormat(tokenizer, end_ids)


def tokens_that_stop(
    settings: argparse.Namespace, tokenizer: transformers.PreTrainedTokenizerBase
) -> list[int]:
    """Return the tokens at which the model stops: the tokenizer's end, and the configuration's.

    Gemma's tokenizer ends with <eos>, but its turns with <end_of_turn>; generation_config.json has
    both.
    """
    ends = [tokenizer.eos_token_id]
    try:
        config = transformers.GenerationConfig.from_pretrained(
            settings.MODEL_NAME, revision=settings.MODEL_REVISION
        )
    except OSError:  # a model need not have one
        config = transformers.GenerationConfig()
    more = config.eos_token_id
    ends += more if isinstance(more, list) else [more]
    return [end for end in dict.fromkeys(ends) if end is not None]


def encode(
    job: Job, train: list[Example], held_out: list[Example]
) -> tuple[list[Example], list[Example]]:
    """Return the examples that fit, with their tokens; exit with all that is wrong in any line."""
    settings = job.settings
    limit = settings.MAX_SEQ_LEN
    check_template(settings.MODEL_NAME, job.chat_format, train + held_out)
    train, problems = encode_file(train, job.chat_format, limit, training=settings)
    held_out, more_problems = encode_file(held_out, job.chat_format, limit)
    if settings.dry_run and more_problems and not problems:  # the dry run ends here
        report("tokens", tokens_in_words(train, settings))
    stop_if_bad(problems + more_problems)
    return train, held_out


# No template should object to this conversation, or to a part of it.
PLAIN_TALK = [
    {"role": "system", "content": "You are a good friend."},
    {"role": "user", "content": "Was it a good day?"},
    {"role": "assistant", "content": "Yes, it was."},
    {"role": "user", "content": "Then sleep well."},
    {"role": "assistant", "content": "Good night."},
]


def check_template(model_name: str, chat_format: ChatFormat, examples: list[Example]) -> None:
    """Exit if the model's template is unfit for conversations of the data's forms.

    Each form that occurs is tried with plain words, so that what goes wrong is the model's fault
    and not a line's.
    """
    is_dated = False
    for talk, where in plain_talks(examples):
        fault = fault_of_template(chat_format, talk, where)
        if fault:
            raise SystemExit(f"MODEL_NAME {model_name}: {fault}")
        is_dated = is_dated or prints_the_day(chat_format, talk)
    if is_dated:
        text = (
            f"the chat template of {model_name} prints the day's date, so tomorrow the tokens will "
            "be others, and a run that is stopped today cannot be resumed then. Finish it today, "
            "or train a local copy of the model in whose chat template a date in quotes stands for "
            "strftime_now(...)."
        )
        report("warning", wrap_lines(text, 90))


def plain_talks(examples: list[Example]) -> list[tuple[list[dict[str, str]], str]]:
    """Return a plain conversation of each form that examples have, and a line that has it.

    A form is whether there is a system message, and whether there are several turns.
    """
    forms: dict[tuple[bool, bool], str] = {}
    for example in examples:
        has_system = example.messages[0]["role"] == "system"
        has_turns = sum(message["role"] == "user" for message in example.messages) > 1
        forms.setdefault((has_system, has_turns), example.where)
    return [
        (PLAIN_TALK[0 if has_system else 1 : 5 if has_turns else 3], where)
        for (has_system, has_turns), where in sorted(forms.items())
    ]


ANOTHER_TEMPLATE = "Use another model, or a local copy of this one with another chat template."
NO_SYSTEM_MESSAGE = (
    "Put its text at the beginning of the first user message, in the data and in use, or use "
    "another model."
)


def fault_of_template(chat_format: ChatFormat, talk: list[dict[str, str]], where: str) -> str:
    """Return what is wrong with how a plain conversation is rendered, or "".

    Args:
        chat_format: the model's.
        talk: the conversation, which ends with a reply.
        where: a line of the data that has its form.
    """
    from jinja2 import TemplateError

    has_system = talk[0]["role"] == "system"
    try:
        prompt, whole = chat_format.prompt_ids(talk[:-1]), chat_format.ids(talk)
    except TemplateError as error:
        if has_system and not fault_of_template(chat_format, talk[1:], where):
            fault = f"its chat template refuses the system message that {where} has"
            return f"{fault} ({one_line(error)}). {NO_SYSTEM_MESSAGE}"
        fault = f"its chat template refuses a plain conversation of the form of {where}"
        return f"{fault} ({one_line(error)}). {ANOTHER_TEMPLATE}"
    for number, message in reversed([*enumerate(talk)]):
        other = {"role": message["role"], "content": "It is raining."}
        if chat_format.ids([*talk[:number], other, *talk[number + 1 :]]) != whole:
            continue
        if message["role"] == "system":
            fault = f"its chat template leaves out the system message that {where} has"
            return f"{fault}. {NO_SYSTEM_MESSAGE}"
        fault = f"its chat template leaves out what the {message['role']} says, as in {where}"
        return f"{fault}; it may want a message in parts, with pictures. {ANOTHER_TEMPLATE}"
    if whole[: len(prompt)] != prompt:
        same = shared_beginning(prompt, whole)
        served, trained = (
            json.dumps(chat_format.tokenizer.decode(ids[same : same + 8]), ensure_ascii=False)
            for ids in (prompt, whole)
        )
        return (
            "its chat template renders a prompt differently once the reply follows, so training "
            f"would not equal serving: in a plain conversation of the form of {where} the prompt "
            f"goes on with {served}, and with the reply it goes on with {trained}. "
            f"{ANOTHER_TEMPLATE}"
        )
    if not set(chat_format.end_ids) & set(whole[len(prompt) :]):
        last = json.dumps(chat_format.tokenizer.decode(whole[-2:]), ensure_ascii=False)
        return (
            f"its chat template does not end a reply with {chat_format.end_names()}, at which the "
            "model stops, so it would not learn to stop: a plain conversation of the form of "
            f"{where} ends with {last}. Use another model, or a local copy of this one with "
            "another chat template, or with the token that ends a reply as eos_token_id in "
            "generation_config.json."
        )
    return ""


def prints_the_day(chat_format: ChatFormat, talk: list[dict[str, str]]) -> bool:
    """Return whether the template asks for the date, as Llama 3.2's does: so it is made to fail."""
    from jinja2 import TemplateError

    template = chat_format.tokenizer.get_chat_template()
    try:
        chat_format.ids(talk, chat_template=template.replace("strftime_now(", "raise_exception("))
    except TemplateError:
        return True
    return False


def shared_beginning(one: list[int], other: list[int]) -> int:
    """Return how many tokens are the same at the beginning of both."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in same)


def encode_file(
    examples: list[Example],
    chat_format: ChatFormat,
    limit: int,
    training: argparse.Namespace | None = None,
) -> tuple[list[Example], list[str]]:
    """Return one file's examples that fit, with their tokens, and what is wrong with the others.

    Too long examples are left out by name. Truncating them instead would drop the end-of-turn
    token, and teach the model not to stop.

    Args:
        examples: all of the file.
        chat_format: how they become tokens.
        limit: the most tokens that an example may have.
        training: the settings, if the file is trained on; what it would cost to keep the examples
            that are too long is then said with their names.
    """
    rendered: list[Example] = []
    fitting: list[Example] = []
    too_long: list[str] = []
    longest = 0
    problems: list[str] = []
    for example in examples:
        try:
            example.prompt_ids, example.reply_ids = render(example.messages, chat_format)
        except ValueError as error:
            problems.append(f"{example.where}: {error}")
            continue
        rendered.append(example)
        longest = max(longest, len(example.input_ids))
        if len(example.input_ids) <= limit:
            fitting.append(example)
        else:
            too_long.append(f"{example.where}: {len(example.input_ids):,} tokens")
    if len(too_long) > len(examples) / 10:
        advice = f"Raise MAX_SEQ_LEN to {longest} to keep them all, or shorten these."
        if training:
            advice = f"{ways_to_keep_enough(rendered, training)}\n{cost_of_length(longest)}"
        problems.append(
            f"{len(too_long):,} of {len(examples):,} examples are longer than MAX_SEQ_LEN "
            f"{limit:,}, more than a tenth of the file, so training would miss too much. {advice}\n"
            f"{join_limited(too_long)}"
        )
    elif too_long:
        cost = f" {cost_of_length(longest)}" if training else ""
        advice = f"longer than MAX_SEQ_LEN {limit:,} and left out; raise it to train on them."
        text = f"{len(too_long):,} of {len(examples):,} examples are {advice}{cost}"
        report("left out", wrap_lines(text, 90))
        report("", join_limited(too_long), join_limited(too_long, len(too_long)))
    return fitting, problems


def ways_to_keep_enough(examples: list[Example], settings: argparse.Namespace) -> str:
    """Return which flags would leave out at most a tenth, or none, and what training then costs.

    Args:
        examples: all of the file, with their tokens.
        settings: those of the training, by which so many are too long.
    """
    columns = "{:<36}{:>10}{:>15}{:>10}".format
    lines = [
        "Shorten these, or give one of the following; the tokens are all that training would then "
        "send through the model:",
        columns("", "left out", "tokens", "steps"),
    ]
    last = [example for example in examples if example.is_last]
    choices = {"": examples}
    if 0 < len(last) < len(examples):
        choices = {"": examples, " --replies last": last}
    for replies, chosen in choices.items():
        lengths = sorted(len(example.input_ids) for example in chosen)
        longest_but_a_tenth = lengths[-1 - len(lengths) // 10]
        needed = [math.ceil(length / 64) * 64 for length in (longest_but_a_tenth, lengths[-1])]
        for limit in sorted({max(length, settings.MAX_SEQ_LEN) for length in needed}):
            kept = [length for length in lengths if length <= limit]
            tokens, steps, _ = cost_in_tokens(kept, settings)
            left_out = f"{len(lengths) - len(kept):,}"
            flags = f"--max_seq_len {limit}{replies}"
            lines.append(columns(flags, left_out, f"{tokens:,}", f"{steps:,}"))
    if len(choices) > 1:
        lines.append("With --replies last the earlier replies are only read, not learned.")
    return "\n".join(lines)


# The longest example of Qwen3.5-4B that a GPU can train on, in tokens: with its activations kept,
# and with them computed twice. From the simulation in tests/benchmarks/simulate.py, with r = 8 and
# every token learned. By it a pass needs about 8 GiB, and for each 1,000 tokens 18 GiB more if the
# activations are kept, or 3 GiB if they are computed twice.
LONGEST_EXAMPLE = {"16 GB": (320, 1968), "32 GB": (1120, 6848)}


def cost_of_length(tokens: int) -> str:
    """Return what an example costs in memory and work with Qwen3.5-4B, as a sentence."""
    sizes_of: dict[str, list[str]] = {}
    for size, (most_kept, most) in LONGEST_EXAMPLE.items():
        verdict = f"it does not fit ({most:,} tokens are the most)"
        if tokens <= most:
            verdict = "it fits with that extra work"
        if tokens <= most_kept:
            verdict = "it fits at full speed"
        sizes_of.setdefault(verdict, []).append(size)
    verdicts = [f"on {' and '.join(sizes)} {verdict}" for verdict, sizes in sizes_of.items()]
    return (
        f"By a simulation of Qwen3.5-4B, an example of {tokens:,} tokens needs "
        f"{8 + 0.018 * tokens:.0f} GiB of GPU memory, or {8 + 0.003 * tokens:.0f} GiB and nearly "
        f"50 % more work: {', '.join(verdicts)}."
    )


def render(messages: list[dict[str, str]], chat_format: ChatFormat) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt and of the reply, or raise ValueError.

    The prompt is rendered as a server renders it before it generates. It must be the beginning of
    the whole conversation; otherwise the model would be trained on a text that it never meets.
    """
    from jinja2 import TemplateError

    text = "\n".join(message["content"] for message in messages)
    for token in chat_format.control_tokens:
        if token in text:
            raise ValueError(f"the text holds the control token {token}; reword or remove it")
    try:
        prompt = chat_format.prompt_ids(messages[:-1])
        whole = chat_format.ids(messages)
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
    reply = whole[len(prompt) :]
    if prompt + reply != whole:
        raise ValueError(
            "the chat template renders the prompt differently once the reply follows, so training "
            "would not equal serving; reword the reply"
        )
    ends = [place for place, token in enumerate(reply) if token in chat_format.end_ids]
    if not ends:
        raise ValueError(
            f"the chat template does not end the reply with {chat_format.end_names()}, so the "
            "model would not learn to stop"
        )
    return prompt, reply[: ends[0] + 1]  # without the newline that follows it


def report_tokens(job: Job) -> dict[str, Any]:
    """Print the lengths of the examples; return counts and hashes of the files."""
    columns = "{:<26}{:>9}{:>8}{:>8}{:>11}{:>20}".format
    lines = [columns("", "examples", "median", "longest", "tokens", "of which learned")]
    facts: dict[str, Any] = {}
    files = {job.settings.TRAIN_FILE: job.train, job.settings.EVAL_FILE: job.held_out}
    for path, examples in files.items():
        if not examples:
            continue
        lengths = [len(example.input_ids) for example in examples]
        tokens = sum(lengths)
        learned = sum(len(example.reply_ids) for example in examples)
        lines.append(
            columns(
                shorten_path(path, 25),
                f"{len(examples):,}",
                f"{statistics.median(lengths):,.0f}",
                f"{max(lengths):,}",
                f"{tokens:,}",
                f"{learned:,} ({learned / tokens:.0%})",
            )
        )
        facts[path] = {
            "examples": len(examples),
            "tokens": tokens,
            "learned_tokens": learned,
            "sha256": file_sha256(Path(path)),
        }
    for path, examples in files.items():
        lines += cost_of_dialogues(path, examples, job.settings)
    report("tokens", "\n".join(lines))
    return facts


def cost_of_dialogues(
    path: str, examples: list[Example], settings: argparse.Namespace
) -> list[str]:
    """Return what the lines with "messages" of a file cost, if it has such lines.

    Each reply is an example of its own, after all that was said before it. So the beginning of a
    dialogue goes through the model once for each reply.
    """
    dialogues: dict[str, list[Example]] = {}
    for example in examples:
        if "messages" in example.keys:
            dialogues.setdefault(example.where, []).append(example)
    if not dialogues:
        return []  # only completions, which the table is enough for
    count = sum(len(replies) for replies in dialogues.values())
    tokens = sum(len(example.input_ids) for example in examples)
    repeated = sum(
        shared_beginning(earlier.input_ids, later.input_ids)
        for replies in dialogues.values()
        for earlier, later in itertools.pairwise(replies)
    )
    is_trained = path == settings.TRAIN_FILE
    each = "each reply" if settings.REPLIES == "all" else "the last reply"
    when = "An epoch" if is_trained else "An evaluation"
    sends = f"{when} sends {tokens:,} tokens through the model"
    if repeated:
        sends += (
            f", and {repeated:,} of them ({repeated / tokens:.0%}) are repeated: beginnings that "
            "an earlier example of the same line has, too"
        )
    sentences = [
        f'{shorten_path(path, 25)} has {counted(len(dialogues), "line")} with "messages", and of '
        f"them {counted(count, 'example')}, one for {each}.",
        f"{sends}.",
    ]
    if is_trained and repeated > tokens / 2:
        sentences += how_to_pay_less(examples)
    return [wrap_lines(" ".join(sentences), 90)]


def how_to_pay_less(examples: list[Example]) -> list[str]:
    """Return what REPLIES "last" would cost, or why it would be refused, in sentences.

    Args:
        examples: those that fit in MAX_SEQ_LEN, of each reply. Of a line whose last reply does not
            fit nothing would be left.
    """
    last = [example for example in examples if example.is_last]
    tokens = sum(len(example.input_ids) for example in last)
    too_long = len({example.where for example in examples}) - len(last)
    too_long_lines = counted(too_long, "line")
    if too_long > (len(last) + too_long) / 10:  # as encode_file() counts
        return [
            "To pay less, cut the dialogues into shorter lines.",
            'REPLIES "last" (--replies last) would need a larger MAX_SEQ_LEN, since the last reply '
            f"of {too_long_lines} ends beyond MAX_SEQ_LEN.",
        ]
    only_read = "in which the earlier replies are only read"
    if too_long:
        verb, whose = ("is", "its") if too_long == 1 else ("are", "their")
        only_read += (
            f"; {too_long_lines} {verb} left out, since {whose} last reply ends beyond MAX_SEQ_LEN"
        )
    return [
        f'To pay less, set REPLIES to "last" (--replies last): {counted(len(last), "example")} '
        f"with {tokens:,} tokens, {only_read}.",
        "Or cut the dialogues into shorter lines.",
    ]


def show_example(example: Example, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Print an example as the model sees it, with the learned part between >>> and <<<."""
    prompt, reply = tokenizer.decode(example.prompt_ids), tokenizer.decode(example.reply_ids)
    lines = [f"{example.where} as the model sees it; only what is in >>> <<< is learned:"]
    for line in f"{prompt}>>>{reply}<<<".split("\n"):
        lines.append(textwrap.fill(line, 90))
    report("example", "\n".join(lines))


def to_dataset(examples: list[Example]) -> datasets.Dataset:
    """Return what SFTTrainer takes as it is; a label of -100 is not learned."""
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
# Before any weights are loaded, PEFT puts LoRA into a skeleton of the model, and what it would
# train is read off there.
#
# A misspelt target, such as q_projj, ends the run here, also with --dry_run. The message names it
# and the names that exist. PEFT alone would ignore it as long as another target exists. Only
# "all-linear" and regular expressions are left to PEFT's own check.
#
# An epoch has ceil(examples / (BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS)) steps. With the settings
# as shipped and 1,000 examples these are 250, so three epochs have 750.


@dataclass
class Plan:
    """What will be trained, as PEFT itself counts it on a skeleton without weights."""

    trainable: int  # parameters
    total: int  # parameters, LoRA's among them
    trainable_shapes: dict[str, tuple[int, ...]]  # of each trained tensor
    steps_per_epoch: int
    steps: int
    frozen_shapes: list[tuple[int, int]]  # the different shapes of the layers' weights
    max_rank: int
    vllm_refuses: str  # why vLLM cannot serve this kind of adapter, or ""


# These start from a changed W, so the adapter would only fit this run's copy of the base model.
CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def make_plan(job: Job) -> Plan:
    """Put LoRA into a skeleton of the model, check and print what it would train."""
    settings = job.settings
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(job.config, trust_remote_code=False)
    frozen = linear_layers(model)
    config = lora_config(settings)
    refuse_unsupported(config)
    refuse_unknown_targets(config, model)
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise SystemExit(f"LoraConfig: PEFT refuses it: {one_line(error)}") from error
    # Asked for anew, since PEFT writes patterns of its own into config for fused experts.
    refuse_unknown_patterns(lora_config(settings), model)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    total = sum(weight.numel() for weight in model.parameters())
    trainable = sum(weight.numel() for weight in trained.values())
    steps, steps_per_epoch = count_steps(len(job.train), settings)
    max_rank = largest_rank(model)
    plan = Plan(
        trainable=trainable,
        total=total,
        trainable_shapes={name: tuple(weight.shape) for name, weight in trained.items()},
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        frozen_shapes=sorted({tuple(layer.weight.shape) for layer in frozen.values()}),
        max_rank=max_rank,
        vllm_refuses=why_vllm_refuses(config, max_rank),
    )
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


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return {path: module} of the linear modules inside the model's layers."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and layer_number(path) is not None
    }


def layer_number(path: str) -> int | None:
    """Return the number of the layer that a module is in, from a path like model.layers.3.mlp."""
    found = re.search(r"\.(\d+)\.", path)
    return int(found[1]) if found else None


def lora_layers(model: torch.nn.Module) -> dict[str, peft.tuners.lora.LoraLayer]:
    """Return {path: module} of the modules that LoRA was added to."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def largest_rank(model: torch.nn.Module) -> int:
    """Return the largest rank of the modules that LoRA was added to, or 0."""
    return max((max(layer.r.values()) for layer in lora_layers(model).values()), default=0)


def is_linear_lora(module: torch.nn.Module) -> bool:
    """Return whether a LoRA module is a matrix W with the update alpha / r B A."""
    return isinstance(module, peft.tuners.lora.Linear) and "default" in module.lora_A


def refuse_unsupported(config: peft.LoraConfig) -> None:
    """Exit if LoraConfig asks for something whose result would not be what it seems."""
    if str(config.task_type).rpartition(".")[2] != "CAUSAL_LM":
        raise SystemExit(
            'LoraConfig: task_type must be "CAUSAL_LM", since a chat model is trained.'
        )
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(CHANGES_THE_BASE):
        raise SystemExit(
            f'LoraConfig: init_lora_weights="{start}" changes the frozen weights, so the saved '
            'adapter would not fit the base model; use True, "gaussian" or "orthogonal".'
        )
    if str(start).lower() == "eva":
        raise SystemExit(
            'LoraConfig: init_lora_weights="eva" needs data before it can begin, which it does not '
            'get here; use True, "gaussian" or "orthogonal".'
        )
    if config.target_modules is None:
        raise SystemExit(
            "LoraConfig: target_modules is missing; name the layers, or write "
            'target_modules="all-linear".'
        )
    if config.bias != "none":  # PEFT's disable_adapter() and unload() keep trained biases
        raise SystemExit(
            f'LoraConfig: bias="{config.bias}" trains biases, which stay changed where the adapter '
            'is switched off, so nothing could be compared with the base model; use "none".'
        )
    if config.layer_replication:
        raise SystemExit(
            "LoraConfig: layer_replication builds another model than the one that is served; "
            "remove it."
        )


def refuse_unknown_targets(config: peft.LoraConfig, model: torch.nn.Module) -> None:
    """Exit if a target matches no module; PEFT is silent as long as another target matches."""
    if not isinstance(config.target_modules, (list, set)):
        return  # "all-linear", or a regular expression; PEFT raises if it matches nothing
    if "lm_head" in config.target_modules:
        raise SystemExit(
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
        raise SystemExit(unknown_targets_message(missing, model))


def unknown_targets_message(missing: list[str], model: torch.nn.Module) -> str:
    """Return which targets the model does not have, and which names its layers have instead."""
    matrices = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)  # the latter in GPT-2
    names: set[str] = set()
    fused: set[str] = set()
    for path, module in model.named_modules():
        if layer_number(f"{path}.") is None:
            continue
        if isinstance(module, matrices):
            names.add(path.rpartition(".")[2])
        if "expert" in path:
            own = module.named_parameters(recurse=False)
            fused |= {name for name, weight in own if weight.dim() == 3}
    close = difflib.get_close_matches(missing[0], sorted(names), 1)
    is_misspelt = bool(close) and len(missing) == 1  # several: the model has other names
    hint = f" Did you mean {close[0]}?" if is_misspelt else ""
    text = (
        f"LORA_TARGET_MODULES: no layer of the model is named {', '.join(missing)}.{hint} The "
        f"layers have {', '.join(sorted(names)) or 'no linear modules'}. For all of these write "
        'target_modules="all-linear" in lora_config().'
    )
    if fused:
        text += (
            f" The experts' {' and '.join(sorted(fused))} are fused and cannot be named; for some "
            'models PEFT takes them with "all-linear", which needs LORA_DROPOUT 0.'
        )
    return text


def refuse_unknown_patterns(config: peft.LoraConfig, model: torch.nn.Module) -> None:
    """Exit if a key of rank_pattern or alpha_pattern matches no layer; PEFT would be silent."""
    paths = list(lora_layers(model))
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            # PEFT matches a key against the end of a path, or against all of it.
            if not any(re.fullmatch(rf"(.*\.)?({key})", path) for path in paths):
                raise SystemExit(
                    f"LoraConfig: {name} has {key!r}, which matches none of the layers that LoRA "
                    f"is added to, such as {paths[0] if paths else 'none'}."
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
    layers = lora_layers(model).values()
    ranks = {layer.r["default"] for layer in layers}
    scalings = {layer.scaling["default"] for layer in layers}
    more = "".join(f", {name}" for name in variants_of(config))
    text = f"r = {config.r}, alpha = {config.lora_alpha} (the update is scaled by "
    text += f"{max(scalings, default=0):g})"
    if len(ranks) > 1 or len(scalings) > 1:
        text = f"r = {range_in_words(ranks)}, updates scaled by {range_in_words(scalings)} "
        text += "(by target, below)"
    lines = [f"LoRA with {text}, dropout {config.lora_dropout:g}{more}"]
    lines += table_of_targets(job, plan, model)
    lines.append(
        f"trainable params: {plan.trainable:,} || all params: {plan.total:,} || "
        f"trainable%: {100 * plan.trainable / plan.total:.4f}"
    )
    lines.append(
        f"a reply ends with {job.chat_format.tokenizer.decode(job.train[0].reply_ids[-1])}"
    )
    text_config = job.config.get_text_config()
    layer_types = text_config.to_dict().get("layer_types") or []
    deltanet = layer_types.count("linear_attention")
    if deltanet:
        lines.append(
            f"{deltanet} of {text_config.num_hidden_layers} layers are Gated DeltaNet, which has "
            "no q_proj, k_proj, v_proj and o_proj:\n"
            f"the other {text_config.num_hidden_layers - deltanet} have them, which is expected"
        )
    lines.append(f"{steps_in_words(job, plan)}: {why_so_many_steps(job, plan)}")
    report("plan", "\n".join(lines))


def range_in_words(numbers: set[float]) -> str:
    """Return one number, or the smallest and the largest of several."""
    return " to ".join(f"{number:g}" for number in sorted({min(numbers), max(numbers)}))


VARIANTS = {"use_rslora": "rsLoRA", "use_dora": "DoRA", "use_qalora": "QALoRA"}


def variants_of(config: peft.LoraConfig) -> list[str]:
    """Return the names of what makes a LoraConfig more than plain LoRA, such as DoRA."""
    return [name for flag, name in VARIANTS.items() if getattr(config, flag)]


def lora_in_words(config: peft.LoraConfig) -> str:
    """Return rank and alpha of a LoraConfig, with the patterns that change them for some layers."""
    words = [f"r = {config.r}", f"alpha = {config.lora_alpha}"]
    words += variants_of(config)
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, name)
        if pattern:
            words.append(f"{name} {pattern}")
    return ", ".join(words)


def steps_in_words(job: Job, plan: Plan) -> str:
    """Return the number of steps, and how many examples they have: an epoch's last may have fewer.

    A file with fewer examples than a step would take is one step.
    """
    count = len(job.train)
    size = min(examples_per_step(job.settings), count)
    all_are_full = count % size == 0 or plan.steps < plan.steps_per_epoch
    steps = "1 step" if plan.steps == 1 else f"{plan.steps:,} steps"
    examples = "1 example" if size == 1 else f"{size:,} examples"
    return f"{steps} of {'' if all_are_full else 'up to '}{examples}"


def cost_in_tokens(lengths: list[int], settings: argparse.Namespace) -> tuple[int, int, bool]:
    """Return how many tokens all steps together have, how many steps, and if that is exact.

    Args:
        lengths: how many tokens each example has.
        settings: by which there are so many steps; if they end within an epoch, a share of its
            tokens is counted.
    """
    steps, steps_per_epoch = count_steps(len(lengths), settings)
    return round(sum(lengths) * steps / steps_per_epoch), steps, steps % steps_per_epoch == 0


def tokens_in_words(examples: list[Example], settings: argparse.Namespace) -> str:
    """Return what training would send through the model, from which its time can be estimated."""
    lengths = [len(example.input_ids) for example in examples]
    tokens, steps, is_exact = cost_in_tokens(lengths, settings)
    about = "" if is_exact else "about "
    return (
        f"Training would send {about}{tokens:,} tokens through the model in "
        f"{counted(steps, 'step')}."
    )


def why_so_many_steps(job: Job, plan: Plan) -> str:
    """Return how the number of steps follows from the examples and the settings."""
    settings, count = job.settings, len(job.train)
    whole = plan.steps_per_epoch * settings.NUM_EPOCHS
    if plan.steps == whole:
        factors = f"{settings.BATCH_SIZE} x {settings.GRADIENT_ACCUMULATION_STEPS}"
        return f"ceil({count:,} / ({factors})) x {settings.NUM_EPOCHS}"
    seen = ""
    if plan.steps < plan.steps_per_epoch:
        seen = f"{plan.steps * examples_per_step(settings):,} of the {count:,} examples; "
    epochs = "1 epoch" if settings.NUM_EPOCHS == 1 else f"{settings.NUM_EPOCHS} epochs"
    verb = "would be" if whole > 1 else "is"
    return f"{seen}cut short by MAX_STEPS ({epochs} {verb} {whole:,})"


def table_of_targets(job: Job, plan: Plan, model: torch.nn.Module) -> list[str]:
    """Return a line for each target: where it is, its W, A and B, and how much of it is trained."""
    depth = job.config.get_text_config().num_hidden_layers
    layers = lora_layers(model)
    paths_of: dict[tuple, list[str]] = {}  # by target, parent module, scaling and shapes
    for path, module in layers.items():
        parent, _, target = path.rpartition(".")
        shapes = [f"{rows:,}x{columns:,}" for rows, columns in lora_shapes(module)]
        scaling = f"{module.scaling['default']:g}"
        row = (target, parent.rpartition(".")[2], scaling, *shapes)
        paths_of.setdefault(row, []).append(path)
    has_scalings = len({row[2] for row in paths_of}) > 1
    width = max([12, *(len(row[0]) + 1 for row in paths_of)])
    columns = f"{{:<{width}}}{{:<18}}{{:>13}}{{:>10}}{{:>10}}{{:>13}}".format
    head = columns("target", "in layers", "W (frozen)", "A", "B", "parameters")
    lines = [head + (f"{'scaled by':>11}" if has_scalings else "")]
    order = in_order_of_settings(sorted({row[0] for row in paths_of}), job.settings)
    for row in sorted(paths_of, key=lambda row: (order.index(row[0]), row)):
        target, parent, scaling, *shapes = row
        paths = tuple(f"{path}." for path in paths_of[row])
        count = sum(
            math.prod(shape)
            for name, shape in plan.trainable_shapes.items()
            if name.startswith(paths)
        )
        line = columns(target, f"{len(paths)}/{depth} {parent}", *shapes, f"{count:,}")
        lines.append(line + (f"{scaling:>11}" if has_scalings else ""))
    covered = tuple(f"{path}." for path in layers)
    for name, shape in plan.trainable_shapes.items():
        if not name.startswith(covered):  # LoraConfig asks for more than LoRA
            lines.append(f"{one_line(name, 60):<{width + 51}}{math.prod(shape):>13,}")
    return lines


def in_order_of_settings(targets: list[str], settings: argparse.Namespace) -> list[str]:
    """Return targets in the order of LORA_TARGET_MODULES, others after them."""
    order = {target: place for place, target in enumerate(settings.LORA_TARGET_MODULES)}
    return sorted(targets, key=lambda target: (order.get(target, len(order)), target))


def lora_shapes(module: torch.nn.Module) -> list[tuple[int, int]]:
    """Return the shapes of W (d, k), A (r, k) and B (d, r) of a LoRA module."""
    d, k, r = module.out_features, module.in_features, max(module.r.values())
    return [(d, k), (r, k), (d, r)]


# ==== TRAINING: the order of the examples, what is printed, saving and stopping
#
# Trainer gives training_step() the examples of one step, which have similar lengths. Their loss is
# the sum of -log(probability) over the learned tokens, divided by the number of these; AdamW then
# changes A and B. A loss or a gradient that is not a finite number ends the run. OurTrainerMethods
# says how the trainer differs from TRL's, and OurTrainingEvents what is printed and saved between
# the steps. Under torchrun several processes, each with a GPU of its own, share each step's
# examples, and the first of them prints and writes.
#
# What Ctrl-C, SIGTERM and SIGHUP do depends on the moment (catch_signals() in COMMAND LINE):
# - While the data is read, the weights are loaded, products or memory are tried, or the base model
#   is evaluated, the run stops at once. There is nothing new to save, and the same command does the
#   same again.
# - Within a step, and while an epoch is evaluated or a checkpoint is written, that step is finished
#   and saved before the run stops. The same command resumes there. A second signal stops at once
#   (not under torchrun), and then the same command resumes from the checkpoint before.
# - While the adapter is verified, the run stops at once, and the same command verifies it again.
#   While it is moved into its place, which takes a moment, a signal waits.
# - While inspect_lora.py measures what it is worth, the run stops at once. final_lora is complete
#   and in place; `python inspect_lora.py evidence` measures it without training.


def train(trainer: trl.SFTTrainer, job: Job) -> None:
    """Train to the end; a signal raises Stopped after the step's checkpoint."""

    class QuietBar(transformers.trainer_callback.ProgressCallback):
        """transformers' progress bar without its dictionaries of losses."""

        def on_log(self, *_: Any, **__: Any) -> None:
            """Do nothing, since OurTrainingEvents prints the losses."""

    if job.checkpoint and step_of(job.checkpoint) >= job.plan.steps:
        # The run was stopped after its last step; Trainer would do one more with MAX_STEPS.
        load_adapter(trainer.model, job.checkpoint)
        return
    if trainer.pop_callback(transformers.trainer_callback.ProgressCallback):
        trainer.add_callback(QuietBar())
    if job.held_out and not job.checkpoint:
        report("train", "the held-out loss of the base model is measured first")
    trainer.train(resume_from_checkpoint=job.checkpoint and str(job.checkpoint))
    accelerate.PartialState().wait_for_everyone()
    job.saves_before_stopping = False


class OurTrainerMethods:
    """The methods in which our trainer differs from trl.SFTTrainer, each with its reason.

    They are merged with SFTTrainer in build_trainer(), since TRL is imported only there.
    """

    job: Job  # build_trainer() sets it, and the sampler
    sampler: LikeLengthsSampler

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Send a whole step through the model, in as few parts as fit in memory.

        The loss is a sum over tokens, so but for dropout and rounding the gradient does not depend
        on the parts.
        """
        model.train()
        parts = split_step(self._prepare_inputs(inputs), self.job.token_limits)
        total = torch.zeros((), device=self.args.device)
        for number, (part, is_recomputed) in enumerate(parts, 1):
            set_recomputation(self.model, is_recomputed)
            is_last = number == len(parts)
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                loss = self.compute_loss(model, part, num_items_in_batch=num_items_in_batch)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the sum of a part's -log(probability) / the number of the step's learned tokens.

        TRL's loss has the same value. This one needs no Triton, which has dropped the V100, and
        multiplies by the model's own head, which may be a float16 one. DDP takes the mean over the
        processes, so the loss is multiplied by their number.
        """
        loss = reply_losses(model, inputs).sum() / num_items_in_batch
        return loss * self.accelerator.num_processes

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return the held-out loss as a mean over tokens; Trainer's depends on the batches."""
        metrics = {"eval_loss": held_out_loss(self.model, self.job, self.state.global_step)}
        self.log(metrics)
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_train_sampler(
        self, train_dataset: datasets.Dataset | None = None
    ) -> LikeLengthsSampler:
        """Return our order; Trainer's group_by_length has no seed, so it could not be resumed."""
        return self.sampler

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the adapter alone; Trainer would add a pickle, and PEFT would contact the hub."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir, save_embedding_layers=False)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Do nothing: TRL's card does not describe the run, and publish() writes one that does."""


def reply_losses(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return -log(probability) of each token but the first, in nats; 0 where it is not learned.

    The result has a row for each example and a column for each token.
    """
    logits = reply_logits(model, inputs)
    labels = inputs["labels"][:, 1:]  # the logits at a position predict the next token
    learned = (labels != -100).nonzero(as_tuple=True)
    losses = torch.zeros(labels.shape, device=logits.device)
    losses[learned] = torch.nn.functional.cross_entropy(
        logits.float(), labels[learned], reduction="none"
    )
    return losses


def reply_logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a row of logits for each learned token of all examples, and none for other tokens.

    With 248,320 tokens in the vocabulary the logits are the largest tensor of all.
    """
    rows, columns = (inputs["labels"][:, 1:] != -100).nonzero(as_tuple=True)

    def keep_learned(_: torch.nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
        """Pass the head only the positions that predict a learned token."""
        return given[0][rows, columns]

    # transformers' logits_to_keep would keep a position in all examples if one of them needs it.
    head = accelerate.utils.extract_model_from_parallel(model).get_output_embeddings()
    hook = head.register_forward_pre_hook(keep_learned)
    try:
        return model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).logits
    finally:
        hook.remove()


def held_out_loss(model: peft.PeftModel, job: Job, step: int) -> float:
    """Return the held-out loss, in nats per learned token; at step 0 that of the base model.

    Several processes share the examples.
    """
    process = accelerate.PartialState()
    share = job.held_out[process.process_index :: process.num_processes]
    # B A is 0 at first, but not with every init_lora_weights.
    with model.disable_adapter() if step == 0 else nullcontext():
        losses = example_losses(model, share, job.token_limits.most(), "held-out loss")
    losses = accelerate.utils.gather_object(losses)
    return sum(losses) / sum(len(example.reply_ids) for example in job.held_out)


def example_losses(
    model: torch.nn.Module, examples: list[Example], tokens_at_once: int, title: str
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
    """
    from tqdm import tqdm

    order = sorted(range(len(examples)), key=lambda number: len(examples[number].input_ids))
    losses = [0.0] * len(examples)
    was_training = model.training
    model.eval()
    with torch.no_grad(), tqdm(total=len(order), desc=title, leave=False, disable=None) as bar:
        while order:
            width = len(examples[order[-1]].input_ids)
            batch = order[-max(1, tokens_at_once // width) :]  # the longest that are left
            inputs = pad([examples[number] for number in batch], model.device)
            try:
                sums = reply_losses(model, inputs).sum(1, dtype=torch.float64).tolist()
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                tokens_at_once = len(batch) // 2 * width
                torch.cuda.empty_cache()
                continue
            for number, loss in zip(batch, sums, strict=True):
                losses[number] = loss
            order = order[: -len(batch)]
            bar.update(len(batch))
    model.train(was_training)
    return losses


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


class LikeLengthsSampler:
    """Gives each step examples of similar lengths, and the steps a random order.

    Similar lengths need little padding. The order depends on the seed, the epoch and the examples'
    lengths alone, so a resumed run sees the examples that it would have seen.
    """

    def __init__(self, job: Job) -> None:
        """Remember the lengths; the epoch is set before each pass."""
        self.lengths = [len(example.input_ids) for example in job.train]
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
        # Sorting within blocks, not over all, gives each epoch other steps: within a quarter of
        # them, and 50 at the most.
        block = size * min(50, math.ceil(len(self.lengths) / size / 4))
        steps: list[list[int]] = []
        for start in range(0, whole, block):
            by_length = sorted(order[start : start + block], key=lambda n: self.lengths[n])
            steps += [by_length[n : n + size] for n in range(0, len(by_length), size)]
        shuffler.shuffle(steps)
        for step in steps:
            yield from step
        yield from rest


def training_callback(trainer: trl.SFTTrainer) -> transformers.TrainerCallback:
    """Return what Trainer calls at the edges of each step."""

    class TrainingCallback(OurTrainingEvents, transformers.TrainerCallback):
        """Does nothing at the events that OurTrainingEvents does not name."""

    return TrainingCallback(trainer)


class OurTrainingEvents:
    """What is printed, checked, saved and stopped at the edges of steps.

    Trainer calls these methods by their names, with its arguments, its state (which step it is)
    and its control (whether to save now).
    """

    def __init__(self, trainer: trl.SFTTrainer) -> None:
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
        self.job.saves_before_stopping = True
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
            f"gradient {logs['grad_norm']:.2f}  rate {logs['learning_rate']:.1e}  "
            f"{job.train_tokens / job.train_seconds:,.0f} tokens/s  {format_time_left(left)}",
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
        """Mark the checkpoint as complete, remove older ones, and stop after a signal."""
        job, step = self.job, state.global_step
        newest = job.output / "checkpoints" / f"checkpoint-{step}"
        accelerate.PartialState().wait_for_everyone()  # each process writes its random state
        if is_main_process():
            write_json(newest / "complete.json", file_hashes(newest))
            remove_old_checkpoints(newest.parent, job.plan, keep_whole=2)
            write_record(job, "running")  # so that a run that is killed has its losses
        if job.settings.DEVICE == "cuda":
            job.peak_gib = torch.cuda.max_memory_allocated() / 2**30
        job.saves_before_stopping = step < job.plan.steps  # nothing is left to save at the end
        if job.stop_signal:
            raise Stopped(
                job.stop_signal,
                f"Stopped after step {step:,} of {job.plan.steps:,}. The same command resumes "
                f"from {newest}.",
            )


def stop_if_not_finite(logs: dict[str, float], step: int) -> None:
    """Exit if a loss or gradient is infinite or NaN: what follows would be worthless."""
    names = {"loss": "loss", "grad_norm": "gradient", "eval_loss": "held-out loss"}
    for key, name in names.items():
        if not math.isfinite(logs.get(key, 0.0)):
            if step == 0:
                raise SystemExit(
                    f"The base model's {name} is {logs[key]}: its weights do not work in this "
                    "type. Set DTYPE to float32, or check the model's files."
                )
            raise SystemExit(
                f"The {name} is {logs[key]} at step {step:,}. Lower LEARNING_RATE; if that does "
                "not help, set DTYPE to float32. Changed settings need a new OUTPUT_DIR."
            )


def format_time_left(seconds: float) -> str:
    """Return seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s left"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min left"
    return f"{seconds / 3600:.1f} h left"


def ends_an_epoch(step: int, plan: Plan) -> bool:
    """Return whether a step is the last one of an epoch, or of the run."""
    return step % plan.steps_per_epoch == 0 or step == plan.steps


# ==== MEMORY: in how many parts a step goes through the model
#
# A step always has BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS examples. What the GPU's memory decides
# is in how many parts they go through the model. But for dropout and rounding the gradient is the
# same, since the loss is a sum over tokens. Before training, find_what_fits() tries how many tokens
# fit at once beside what the optimizer will keep:
# - A step that fits goes through whole. Any other goes through in parts of as many examples as fit.
# - An example that does not fit even alone is recomputed: its activations are not kept for the
#   backward pass but computed again, which takes little memory and nearly 50 % more work. Such
#   examples, too, go through together as long as they fit, and one by one if they do not.
# - Only if the longest training example does not fit even so does the run end, before it trains.
#   The advice is to lower MAX_SEQ_LEN, to take a GPU with more memory, or to stop other programs.
# - If another program takes the memory later, the run ends, and the same command resumes.
# On a CPU nothing is tried, and every step goes through whole.


@dataclass
class MemoryLimits:
    """How many tokens, padding included, may go through the model at once while training."""

    tokens_at_once: int  # with their activations kept for the backward pass
    # With their activations computed again: nearly 50 % more work. It is tried only if the longest
    # example needs it; otherwise this is the number above.
    tokens_at_once_recomputed: int

    def most(self) -> int:
        """Return how many fit at the most; evaluation needs far less memory."""
        return max(self.tokens_at_once, self.tokens_at_once_recomputed)

    def as_recorded(self) -> dict[str, int]:
        """Return the limits under their names in run.json."""
        return {"kept": self.tokens_at_once, "recomputed": self.tokens_at_once_recomputed}


def find_what_fits(trainer: trl.SFTTrainer, job: Job) -> None:
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
        raise SystemExit(
            f"A single example of {longest:,} tokens does not fit in the "
            f"{share * total / 2**30:.1f} GiB of GPU memory that are free; about {most:,} "
            "tokens would. Lower MAX_SEQ_LEN, use a GPU with more memory, or stop other programs "
            "on this GPU."
        )
    job.token_limits = limits
    # CUDA's libraries allocate outside of torch's view, so a little must stay free.
    torch.cuda.set_per_process_memory_fraction(0.97 * share)
    torch.cuda.reset_peak_memory_stats()
    transformers.set_seed(job.settings.SEED)  # the trials drew random numbers
    if limits.tokens_at_once >= whole_step:
        text = f"a whole step of {examples_per_step(job.settings)} examples fits at once"
    elif limits.tokens_at_once == 0:
        text = "every example is computed twice to save memory"
    else:
        text = (
            f"up to {limits.tokens_at_once:,} tokens fit at once; larger steps go through in parts"
        )
        if limits.tokens_at_once < longest:
            text += ", and longer examples\nare computed twice to save memory"
    report("memory", text)


def most_tokens(job: Job) -> tuple[int, int]:
    """Return the tokens of the longest example, and those of a step of nothing but such ones.

    Held-out examples do not count: they are only evaluated, which needs far less memory.
    """
    longest = max(len(example.input_ids) for example in job.train)
    processes = accelerate.PartialState().num_processes
    return longest, longest * max(1, examples_per_step(job.settings) // processes)


def try_what_fits(trainer: trl.SFTTrainer, longest: int, whole_step: int) -> MemoryLimits:
    """Return how many tokens fit; recomputation is tried only if a single example needs it."""
    kept = largest_that_fits(lambda n: pass_fits(trainer, n, longest, False), whole_step)
    if kept >= longest:
        return MemoryLimits(kept, kept)
    recomputed = largest_that_fits(lambda n: pass_fits(trainer, n, longest, True), whole_step)
    if recomputed < longest and pass_fits(trainer, longest, longest, True):
        recomputed = longest  # which lies between two multiples of 16
    return MemoryLimits(kept, recomputed)


def pass_fits(trainer: trl.SFTTrainer, tokens: int, longest: int, is_recomputed: bool) -> bool:
    """Return whether a forward and a backward pass over so many tokens find their memory.

    The trial is at least as hard as any step of so many tokens: its rows are at least as long as
    the longest example, or one row has them all, and every token is learned.
    """
    rows = max(1, tokens // longest)
    width = math.ceil(tokens / rows)
    ids = torch.ones(rows, width, dtype=torch.long, device=trainer.args.device)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    set_recomputation(trainer.model, is_recomputed)
    trainer.model.train()
    try:
        trainer.compute_loss(trainer.model, inputs, num_items_in_batch=tokens).backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        trainer.model.zero_grad()
        torch.cuda.empty_cache()
    return True


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """Return most if it fits, otherwise the largest multiple of 16 that does; 0 if none does."""
    if fits(most):
        return most
    sizes = range(16, most, 16)
    return 16 * bisect.bisect_left(sizes, True, key=lambda size: not fits(size))


def split_step(
    inputs: dict[str, torch.Tensor], limits: MemoryLimits
) -> list[tuple[dict[str, torch.Tensor], bool]]:
    """Divide a padded step into parts that fit, with a flag saying whether each is recomputed.

    A step that fits stays whole. Otherwise the examples that are too long to keep their
    activations go first, and are recomputed. Then come the others. Each part is as wide as its
    longest example, so it has less padding than the step.

    Args:
        inputs: input_ids, attention_mask and labels, each rows x width, padded on the right.
        limits: how many tokens a part may have, its own padding included.
    """
    lengths = inputs["attention_mask"].sum(1).tolist()
    if len(lengths) * max(lengths) <= limits.tokens_at_once:
        return [(inputs, False)]
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    parts = []
    for is_recomputed in (True, False):
        limit = limits.tokens_at_once_recomputed if is_recomputed else limits.tokens_at_once
        left = [
            row for row in longest_first if (lengths[row] > limits.tokens_at_once) == is_recomputed
        ]
        while left:
            width = lengths[left[0]]
            count = max(1, limit // width)
            rows, left = left[:count], left[count:]
            part = {key: value[rows, :width] for key, value in inputs.items()}
            parts.append((part, is_recomputed))
    return parts


def set_recomputation(model: torch.nn.Module, is_recomputed: bool) -> None:
    """Tell the layers whether to keep their activations or to compute them again."""
    for module in model.modules():
        if isinstance(module, transformers.modeling_layers.GradientCheckpointingLayer):
            module.gradient_checkpointing = is_recomputed


# ==== CHECKPOINTS: what an earlier run left behind, resuming, and run.json
#
# A checkpoint is written every SAVE_STEPS steps, at the end of each epoch, and after a signal;
# run.json is written with it. The same command resumes from the newest one whose files are all
# complete; the two newest are kept for that. On a CPU the run then ends with the same bytes as one
# that was never stopped.
#
# A checkpoint is refused if it was made with other settings, another LoraConfig, another model,
# other tokens in one of the files, or the other kind of products (see FLOAT16 PRODUCTS). The
# message is a table of what differs, and nothing is touched. What may change are the settings
# below, and the data files' names and places. Other edits of this script are not compared.
#
# Once final_lora is in place the run is over, and the same command retrains from scratch. As it
# begins, it renames the earlier checkpoints and run.json; as it ends, final_lora, samples.md and
# lora.png.

# These settings may change between stopping and resuming.
MAY_CHANGE_ON_RESUME = {
    "DEVICE", "OUTPUT_DIR", "LOGGING_STEPS", "SAVE_STEPS", "PUBLISH", "REPORT_TO", "EVAL_GROUP",
    "GENERAL_FILE", "EVIDENCE_EXAMPLES", "NUM_SAMPLES", "MAX_NEW_TOKENS",
}  # fmt: skip
# These, too, as long as what follows from them stays: the examples' tokens, the kind of products
# that is in use, and the number of examples in a step.
COMPARED_BY_EFFECT = {
    "TRAIN_FILE", "EVAL_FILE", "REPLIES", "MAX_SEQ_LEN", "MATMUL", "BATCH_SIZE",
    "GRADIENT_ACCUMULATION_STEPS",
}  # fmt: skip


def resume_or_begin(job: Job) -> None:
    """Find this job's newest complete checkpoint; exit if the folder holds another job's."""
    if is_main_process():
        folder = job.output / "checkpoints"
        now = describe_job(job)
        before = read_json(folder / "job.json")
        newest = newest_complete(folder)
        if before and newest:
            refuse_other_job(job, before, now, newest)
            job.checkpoint = newest
            job.findings = findings_of_checkpoints(job.output)
            report("resume", f"going on from {job.checkpoint}")
        else:
            start_fresh(job, now)
    # The processes of a launch must go the same way.
    decided = [job.checkpoint, job.matmul]
    job.checkpoint, job.matmul = accelerate.utils.broadcast_object_list(decided)
    if job.checkpoint:
        state = json.loads((job.checkpoint / "trainer_state.json").read_bytes())
        job.history = state["log_history"]
    job.started = time.time()
    write_record(job, "running")


def findings_of_checkpoints(output: Path) -> dict[str, Any]:
    """Return what inspect_lora.py has written into run.json while the run stood still."""
    record = read_json(output / "run.json") or {}
    keys = ("checkpoint_findings", "earlier_findings")
    return {key: record[key] for key in keys if key in record}


def describe_job(job: Job) -> dict[str, Any]:
    """Return what must be the same for a checkpoint to be resumed: settings, model, data."""
    job_settings = {
        name: getattr(job.settings, name)
        for name in setting_types()
        if name not in MAY_CHANGE_ON_RESUME | COMPARED_BY_EFFECT
    }
    job_settings["LORA_TARGET_MODULES"] = sorted(job.settings.LORA_TARGET_MODULES)
    job_settings["BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS"] = examples_per_step(job.settings)
    config = lora_config(job.settings).to_dict()
    if isinstance(config["target_modules"], (list, set)):  # PEFT makes a set of a list
        config["target_modules"] = sorted(config["target_modules"])
    config.pop("peft_version", None)
    fields = {f"LoraConfig.{key}": as_stable_text(value) for key, value in config.items()}
    contents = {
        "the files of MODEL_NAME": file_fingerprints(Path(job.settings.MODEL_NAME)),
        "the tokens of TRAIN_FILE": [example.input_ids for example in job.train],
        "the tokens of EVAL_FILE": [example.input_ids for example in job.held_out],
    }
    hashes = {
        name: hashlib.sha256(repr(value).encode()).hexdigest()[:12]
        for name, value in contents.items()
    }
    return job_settings | fields | {"the products in use": job.matmul["used"]} | hashes


def as_stable_text(value: Any) -> str:
    """Return value as a text that is the same in each process; a set has no order of its own."""
    return str(sorted(value) if isinstance(value, set) else value)


def refuse_other_job(
    job: Job, before: dict[str, Any], now: dict[str, Any], checkpoint: Path
) -> None:
    """Exit with a table of the differences if a checkpoint was made by another job."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not names:
        return
    rows = []
    for name in names:
        was = f"was {before[name]}" if name in before else "did not exist"
        is_now = f"is now {now[name]}" if name in now else "does not exist now"
        rows.append(f"  {name} {was} and {is_now}")
    raise SystemExit(
        f"{checkpoint} was made with other settings, data or model, so it cannot be resumed:\n"
        + join_limited(rows)
        + "\nSet these back to resume it, choose another OUTPUT_DIR, or move "
        f"{job.output / 'checkpoints'} away."
    )


def start_fresh(job: Job, now: dict[str, Any]) -> None:
    """Rename what an earlier run left, and write down which job the new checkpoints belong to."""
    folder = job.output / "checkpoints"
    is_dangling = folder.is_symlink() and not folder.exists()
    if is_dangling or checkpoints_in(folder):  # of a finished run, or unusable
        rename_old(folder)
    rename_old(job.output / "run.json")
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


def load_adapter(model: peft.PeftModel, checkpoint: Path) -> None:
    """Give the model the adapter's weights of a checkpoint; exit unless they are what was saved."""
    path = checkpoint / "adapter_model.safetensors"
    written = read_json(checkpoint / "complete.json") or {}
    if not path.is_file() or written.get(path.name) != file_sha256(path):
        raise SystemExit(
            f"{path} is not what was saved there, so it is not published. Its folder may be "
            "restored, or another OUTPUT_DIR chosen to train again."
        )
    peft.set_peft_model_state_dict(model, safetensors_torch.load_file(path))
    check_saved_tensors(model, checkpoint)


def newest_complete(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end, or None."""
    for path in reversed(checkpoints_in(folder).values()):
        if is_complete(path):
            return path
    return None


def is_complete(checkpoint: Path) -> bool:
    """Return whether all files of a checkpoint are as they were written."""
    written = read_json(checkpoint / "complete.json")
    return bool(written) and written.items() <= file_hashes(checkpoint).items()


def remove_old_checkpoints(folder: Path, plan: Plan, keep_whole: int) -> None:
    """Keep the newest checkpoints whole; of older ones only the adapter at an epoch's end.

    What cannot be removed is only a warning; it is tried again when the next one is saved.
    """
    saved = checkpoints_in(folder)
    stuck: list[str] = []
    for step in list(saved)[: len(saved) - keep_whole]:
        try:
            remove_checkpoint(saved[step], keep_adapter=ends_an_epoch(step, plan))
        except OSError as error:
            stuck.append(f"{saved[step].name} ({error.strerror or error})")
    if stuck:
        shown = join_limited(stuck, 3, ", ")
        report(
            "warning",
            f"in {folder} old files cannot be removed: {shown}; remove them by hand, but keep an "
            "epoch's adapter_ files",
        )


def remove_checkpoint(checkpoint: Path, keep_adapter: bool) -> None:
    """Remove a checkpoint, or all of its files but the adapter's."""
    if not keep_adapter:
        shutil.rmtree(checkpoint)
        return
    for path in checkpoint.iterdir():
        is_kept = path.name.startswith("adapter_") or path.name == "complete.json"
        if path.is_file() and not is_kept:
            path.unlink()


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


def file_hashes(folder: Path) -> dict[str, str]:
    """Return {name: SHA-256} of a checkpoint's files, but for the list of them itself."""
    return {
        path.name: file_sha256(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != "complete.json"
    }


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_fingerprints(folder: Path) -> list[tuple[str, int, str]]:
    """Return name, size and hash of a local model's files; nothing for a name on the hub.

    Of large files only the first MiB, with safetensors' list of tensors, and the last are read:
    8 GB would take a minute at each start.
    """
    found = []
    if folder.is_dir():
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            with path.open("rb") as file:
                start = file.read(2**20)
                file.seek(max(0, path.stat().st_size - 2**20))
                end = file.read()
            found.append((path.name, path.stat().st_size, hashlib.sha256(start + end).hexdigest()))
    return found


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON file's object, or None if there is none or it is damaged."""
    with suppress(OSError, ValueError):
        value = json.loads(path.read_bytes())
        return value if isinstance(value, dict) else None
    return None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file in such a way that there is never half of it."""
    new = path.with_name(f"{path.name}.new")
    text = json.dumps(without_nan(value), indent=1, allow_nan=False, default=str)
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def without_nan(value: Any) -> Any:
    """Return value with NaN and infinity as texts, since JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


PACKAGES = (
    "torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors",
    "huggingface_hub", "tokenizers", "matplotlib", "filelock", "jinja2", "tqdm",
)  # fmt: skip


def write_record(job: Job, outcome: str) -> None:
    """Write run.json: what was asked for, what was found, and how it ended."""
    if not job.started or not is_main_process():
        return
    record = {
        "outcome": outcome,
        "started": job.started,
        "command": shlex.join(["python", *sys.argv]),
        "working_folder": str(Path.cwd()),
        "script_sha256": file_sha256(Path(__file__)),
        "versions": installed_versions(),
        "settings": {name: getattr(job.settings, name) for name in setting_types()},
        "lora_config": config_as_recorded(lora_config(job.settings)),
        "device": job.device_name,
        "matmul": job.matmul,
        "memory_limits": job.token_limits.as_recorded() if job.token_limits else None,
        "data": job.data,
        "system_message": system_messages(job.train)[0],
        "plan": {key: value for key, value in asdict(job.plan).items() if "shapes" not in key},
        "resumed_from": str(job.checkpoint) if job.checkpoint else None,
        "train_seconds": job.train_seconds,
        "train_tokens": job.train_tokens,
        "peak_memory_gib": job.peak_gib,
        "published": job.published,
        "adapter_sha256": job.adapter_sha256,
        "loss_history": job.history,
    } | job.findings
    try:
        write_json(job.output / "run.json", record)
    except OSError as error:
        report("warning", f"{job.output / 'run.json'} is not written: {error}")


def config_as_recorded(config: peft.LoraConfig) -> dict[str, Any]:
    """Return a whole LoraConfig for run.json, with its sets in a fixed order."""
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }


def logged(history: list[dict[str, float]], key: str) -> dict[int, float]:
    """Return {step: value} of "loss" or "eval_loss"; the eval loss at step 0 is the base's."""
    return {int(entry["step"]): entry[key] for entry in history if key in entry}


@functools.cache  # run.json is written several times in a run
def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


# ==== PUBLISHING: writing the adapter, verifying it, the model card, the last lines
#
# At the end OUTPUT_DIR holds:
#   final_lora/        the adapter in PEFT's form, with tokenizer and model card; verified
#   final_lora_vllm/   the same tensors under the names that vLLM needs, if it needs others
#   samples.md         held-out prompts with the replies before and after training, and
#   lora.png           losses, the size of the updates, and the evidence: both by inspect_lora.py
#   run.json           all settings, versions, hashes, losses and measurements
#   checkpoints/       each epoch's adapter
#   all_logs.log       everything that was printed, with tracebacks
#   .lock              held by the run that writes here
#   NAME.DATE-TIME     what an earlier run left under that name
#
# verify_saved_adapter() is the check. The adapter is written beside its place and loaded again from
# disk onto the bare base model. It is moved into its place only if its tensors are the trained ones
# to the bit, and if on one example's reply its logits are the trained model's and not the base's.
# What an earlier run left is renamed, never overwritten.


def publish(trainer: trl.SFTTrainer, job: Job) -> peft.PeftModel:
    """Write the adapter beside its place, verify it, move it in; return it as loaded from disk."""
    if job.settings.DEVICE == "cuda":
        torch.cuda.empty_cache()
    staging = job.output / ".partial"
    shutil.rmtree(staging, ignore_errors=True)
    step = published_step(job)
    if step != job.plan.steps:
        load_adapter(trainer.model, job.output / "checkpoints" / f"checkpoint-{step}")
    try:
        save_adapter(trainer.model, job, staging)
        example = (job.held_out or job.train)[0]
        adapter = verify_saved_adapter(trainer.model, staging / "final_lora", example)
        with signals_wait():  # between two renames there may be no final_lora
            move_into_place(staging, job)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return adapter


def move_into_place(staging: Path, job: Job) -> None:
    """Move the verified files to where users find them, and mark the run as finished."""
    for name in ("final_lora", "final_lora_vllm", "samples.md", "lora.png"):
        rename_old(job.output / name)
    for new in sorted(staging.iterdir()):
        new.rename(job.output / new.name)
    job.published = published_label(job)
    for folder in ("final_lora", "final_lora_vllm"):
        path = job.output / folder / "adapter_model.safetensors"
        if path.exists():
            job.adapter_sha256[folder] = file_sha256(path)
    (job.output / "checkpoints" / "job.json").unlink(missing_ok=True)  # the next run starts anew
    remove_old_checkpoints(job.output / "checkpoints", job.plan, keep_whole=0)
    write_record(job, "finished")


def published_label(job: Job) -> str:
    """Return the published step as a reader would name it, such as "epoch 2 of 3"."""
    step = published_step(job)
    if step % job.plan.steps_per_epoch:
        return f"step {step:,}"
    return f"epoch {step // job.plan.steps_per_epoch} of {job.settings.NUM_EPOCHS}"


# Where the layers stand in the text model that is trained, and in the hub's wrapper around it.
NAME_IN_TEXT_MODEL, NAME_IN_WRAPPER = ".model.model.", ".model.model.language_model."


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
    tensors = safetensors_torch.load_file(final / "adapter_model.safetensors")
    is_named_so = any(NAME_IN_WRAPPER in name for name in tensors)
    if is_wrapper(job.config) and not job.plan.vllm_refuses and not is_named_so:
        write_adapter_for_vllm(for_vllm, config, tensors, job.config)
    write_model_card(job, final)
    # safetensors files are readable by their owner alone, but the server may be another user.
    for path in folder.glob("*/*.safetensors"):
        shutil.copymode(final / "adapter_config.json", path)


def is_wrapper(config: transformers.PretrainedConfig) -> bool:
    """Return whether a model on the hub wraps the text model that is trained here."""
    return config.get_text_config() is not config


def write_adapter_for_vllm(
    folder: Path,
    adapter_config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    model_config: transformers.PretrainedConfig,
) -> None:
    """Write an adapter under the names that vLLM applies: of a wrapper, if the model has one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", adapter_config)
    if is_wrapper(model_config):
        tensors = {
            name.replace(NAME_IN_TEXT_MODEL, NAME_IN_WRAPPER, 1): tensor
            for name, tensor in tensors.items()
        }
    safetensors_torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def verify_saved_adapter(model: peft.PeftModel, folder: Path, example: Example) -> peft.PeftModel:
    """Load the adapter from disk onto the base model; exit unless it is the trained one.

    The base model is the one in memory, with the trained LoRA taken out.

    The tensors of both files, vLLM's too, must be the trained ones to the bit. On one example's
    reply the logits must be those of the trained model and not those of the base. A GPU may round:
    a tenth of the adapter's effect is allowed.
    """
    check_saved_tensors(model, folder)
    for_vllm = folder.with_name("final_lora_vllm")
    if for_vllm.is_dir():
        check_saved_tensors(model, for_vllm)
    inputs = pad([example], model.device)
    with torch.no_grad():
        wanted = reply_logits(model.eval(), inputs)
        reloaded = peft.PeftModel.from_pretrained(model.unload(), folder).eval()
        error = (reply_logits(reloaded, inputs) - wanted).abs().max().item()
        with reloaded.disable_adapter():
            effect = (reply_logits(reloaded, inputs) - wanted).abs().max().item()
    found = (
        f"loaded again from disk, the adapter's logits differ by at most {error:.2g} from the "
        f"trained\nmodel's, and by {effect:.2g} from the base model's"
    )
    kept = "The checkpoints are still there."
    if error == effect == 0:
        raise SystemExit(
            "Not verified: the adapter changes nothing: with it and without it the model's logits "
            "are the same. LEARNING_RATE is too small or the steps are too few; raise one of them "
            f"and choose another OUTPUT_DIR. {kept}"
        )
    if not (effect > 0 and error <= effect / 10):
        raise SystemExit(
            f"Not verified: {found}. The file is right to the bit, but its effect cannot be told "
            "from rounding, so the adapter is not published: the steps were too few or "
            f"LEARNING_RATE too small, or loading is at fault. {kept}"
        )
    report("verified", found)
    return reloaded


def check_saved_tensors(model: peft.PeftModel, folder: Path) -> None:
    """Exit unless a folder's file holds the model's trained tensors to the bit."""
    trained = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    found = safetensors_torch.load_file(folder / "adapter_model.safetensors")
    saved = {
        name.replace(NAME_IN_WRAPPER, NAME_IN_TEXT_MODEL, 1): tensor
        for name, tensor in found.items()
    }
    wrong = set(trained.keys() ^ saved.keys())
    for name in trained.keys() & saved.keys():
        if not saved[name].equal(trained[name].cpu()):
            wrong.add(name)
    if wrong:
        raise SystemExit(
            f"Not verified: {folder} does not hold what was trained; these tensors differ or are "
            f"not numbers: {join_limited(sorted(wrong), 3, ', ')}. The checkpoints are still there."
        )


def write_model_card(job: Job, folder: Path) -> None:
    """Write folder/README.md in the hub's form, in place of PEFT's empty one."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    settings = job.settings
    losses = losses_before_and_after(job)
    results = []
    if losses:
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type="json",
                dataset_name=Path(settings.EVAL_FILE).name,
                metric_type="loss",
                metric_name="held-out loss, nats per token",
                metric_value=round(losses[1], 4),
            )
        )
    data = ModelCardData(
        base_model=None if Path(settings.MODEL_NAME).is_dir() else settings.MODEL_NAME,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "sft", "trl"],
        model_name=Path(settings.OUTPUT_DIR).resolve().name if results else None,
        eval_results=results or None,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{card_text(job)}")
    new = folder.parent / "README.md.new"  # so that there is never half of it in the folder
    card.save(new)
    new.replace(folder / "README.md")


def losses_before_and_after(job: Job) -> tuple[float, float] | None:
    """Return the held-out loss of the base model and of the published adapter, if measured."""
    losses = job.logged("eval_loss")
    if 0 not in losses or len(losses) < 2:
        return None
    return losses[0], losses[published_step(job)]


def published_step(job: Job) -> int:
    """Return the step whose adapter is published: the last one, or the best epoch's."""
    losses = job.logged("eval_loss")
    losses.pop(0, None)  # the base's
    if job.settings.PUBLISH == "last" or not losses:
        return job.plan.steps
    return min(losses, key=lambda step: losses[step])


def system_messages(examples: list[Example]) -> list[str]:
    """Return the different system messages, the most frequent one first."""
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.system_message] = counts.get(example.system_message, 0) + 1
    return sorted(counts, key=lambda text: -counts[text])


def model_title(settings: argparse.Namespace) -> str:
    """Return the base model's name; of a local folder's path only the last part."""
    folder = Path(settings.MODEL_NAME)
    return folder.resolve().name if folder.is_dir() else settings.MODEL_NAME


def card_text(job: Job) -> str:
    """Return the body of the model card."""
    settings, config = job.settings, lora_config(job.settings)
    targets = config.target_modules
    if not isinstance(targets, str):
        targets = ", ".join(sorted(targets))
    name, commit = model_title(settings), f", commit `{settings.MODEL_REVISION}`"
    base = f'"{name}", revision="{settings.MODEL_REVISION}"'
    if Path(settings.MODEL_NAME).is_dir():
        commit, base = ", a local folder", f'"path/to/{name}"'
    if job.plan.vllm_refuses:
        serving = f"{job.plan.vllm_refuses}; merge this one into its base model instead."
    else:
        serving = (
            "For vLLM use\n`final_lora_vllm` if it lies beside this folder, with "
            f"`--max-lora-rank {vllm_rank(job.plan.max_rank)}`."
        )
    return f"""# A LoRA adapter for {name}

This adapter was trained with `train_lora_single.py`. It changes how the base model replies; it
does not work without the base model.

## Base model

`{name}`{commit}.

## Training

LoRA with {lora_in_words(config)}, dropout {config.lora_dropout:g}, on
{targets}: {job.plan.trainable:,} of {job.plan.total:,} parameters.
{steps_in_words(job, job.plan)}, learning rate
{settings.LEARNING_RATE:g} ({settings.LR_SCHEDULER_TYPE}), seed {settings.SEED}. This is the
adapter of {published_label(job)}.

{card_files(job)}

## Result

{card_result(job)}

## System message

{card_system_message(job)}

## How to use it

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("final_lora")
base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")
model = PeftModel.from_pretrained(base, "final_lora").eval()
```

Render conversations with `enable_thinking=False`, as in training. {serving}

## Limits

The adapter repeats the habits of its training data, mistakes included. Nothing was measured but
what stands above; read its replies before you let anybody rely on them. The base model's licence
holds for the adapter's use too.
"""


def card_files(job: Job) -> str:
    """Return the card's list of data files, with counts and hashes."""
    return "\n".join(
        f"- `{Path(path).name}`: {facts['examples']:,} examples, {facts['learned_tokens']:,} "
        f"learned tokens, SHA-256 `{facts['sha256']}`"
        for path, facts in job.data.items()
    )


def card_result(job: Job) -> str:
    """Return the card's sentences on the held-out loss."""
    losses = losses_before_and_after(job)
    if not losses:
        return "The held-out loss was not measured."
    result = (
        f"On {len(job.held_out):,} held-out examples the loss went from {losses[0]:.4f} to "
        f"{losses[1]:.4f} nats a token"
    )
    if job.settings.PUBLISH == "best":
        result += " (the epoch was chosen by this loss)"
    evidence = job.findings.get("evidence", {})
    if "better" in evidence:
        result += f"; it is lower on {evidence['better']:,} of them"
    return (
        f"{result}. If the held-out file has the same authors as the training file, this says how "
        f"well the adapter imitates them, and no more.{card_evidence(evidence)}"
    )


def card_evidence(evidence: dict[str, Any]) -> str:
    """Return the card's table of what the adapter's parts were worth, if it was measured."""
    if not evidence.get("table"):
        return ""
    table = "\n".join([*evidence["table"], "", *evidence["conclusions"]])
    return (
        '\n\nWhat its parts were worth on these examples ("of the gain" is what is left of the '
        f"improvement over the\nbase model; ± is one standard error):\n\n```\n{table}\n```"
    )


def card_system_message(job: Job) -> str:
    """Return what the card says about the system message to serve with."""
    messages = system_messages(job.train)
    if not messages[0] and len(messages) > 1:
        return "Most often a training conversation has no system message; serve without one."
    said = "There was no system message in the training data; serve without one."
    if messages[0]:
        quotation = quoted(messages[0])
        said = f"The conversations have this system message. Serve with it:\n\n{quotation}"
    if len(messages) > 1:
        said += f"\n\n(This is the most frequent one of {len(messages)} in the training data.)"
    return said


def quoted(text: str) -> str:
    """Return a text as a quotation in Markdown."""
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])


def vllm_rank(max_rank: int) -> int:
    """Return the smallest value of vLLM's --max-lora-rank that is enough."""
    return next(rank for rank in VLLM_RANKS if rank >= max_rank)


# ---- What comes after the adapter is in place: its worth, and the last lines that are printed


@contextmanager
def error_is_a_warning(name: str) -> Iterator[None]:
    """Turn an error into a warning: the adapter is complete and in place, whatever the error is."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a message that would end a command, too
        LOG.info("%s failed", name, exc_info=True)
        reason = str(error) if isinstance(error, SystemExit) else repr(error)
        report("warning", f"{name} failed ({one_line(reason)}); the adapter is complete")


def has_inspector() -> bool:
    """Return whether inspect_lora.py lies beside this file."""
    return (HERE / "inspect_lora.py").is_file()


def inspector() -> types.ModuleType | None:
    """Return inspect_lora.py as a module if it lies beside this file, else None."""
    return importlib.import_module("inspect_lora") if has_inspector() else None


def measure_worth(model: peft.PeftModel, job: Job) -> None:
    """Hand the verified adapter to inspect_lora.py; an error there is only a warning."""
    command = wrap_command(
        ["python", "inspect_lora.py", "evidence", str(job.output / "final_lora")]
    )

    def keep(findings: dict[str, Any]) -> None:
        job.findings |= findings
        write_record(job, "finished")
        write_model_card(job, job.output / "final_lora")

    with error_is_a_warning("evidence"):
        inspect_lora = inspector()
        if inspect_lora is None:
            report(
                "evidence",
                "what the adapter gained was not measured, since inspect_lora.py is not beside "
                f"this script.\nPut it there, and measure it without training:\n{command}",
            )
            return
        subject = inspect_lora.Subject(
            model=model,
            chat_format=job.chat_format,
            held_out=job.held_out,
            settings=job.settings,
            folder=job.output,
            label=job.published,
            system_message=system_messages(job.train)[0],
            tokens_at_once=job.token_limits.most(),
            history=job.history,
        )
        inspect_lora.measure(subject, keep)


@error_is_a_warning("summary")
def summarize(job: Job) -> None:
    """Print a verdict, what was written, and what to do next."""
    lines = [f"{job.output / 'final_lora'} is the adapter of {job.published}"]
    lines += verdict(job)
    minutes = (time.time() - job.started) / 60
    speed = job.train_tokens / max(job.train_seconds, 1e-9)
    spent = f"{minutes:.1f} min in all, {job.train_seconds / 60:.1f} min of training"
    if job.train_seconds:
        spent += f" at {speed:,.0f} tokens/s"
    if job.peak_gib:
        spent += f"; torch used {job.peak_gib:.1f} GiB of the GPU at the most"
    lines.append(spent)
    report("done", "\n".join(lines))
    with error_is_a_warning("comparing with earlier runs"):  # it reads what others left
        inspect_lora = inspector()
        if inspect_lora is not None:
            inspect_lora.compare_with_others(job.output)
    report("next", next_commands(job))


def verdict(job: Job) -> list[str]:
    """Return by how much the held-out loss fell, and whether another epoch was better."""
    before_and_after = losses_before_and_after(job)
    if not before_and_after:
        return []
    base, loss = before_and_after
    fell = f"fell by {base - loss:.4f} nats a token" if loss < base else "did NOT fall"
    lines = [f"the held-out loss {fell}: {base:.4f} -> {loss:.4f}"]
    evidence = job.findings.get("evidence", {})
    if "better" in evidence:
        lines[0] += f", lower on {evidence['better']:,} of {evidence['examples']:,}"
    losses = job.logged("eval_loss")
    losses.pop(0)
    best = min(losses, key=lambda step: losses[step])
    if losses[best] < loss:
        where = job.output / "checkpoints" / f"checkpoint-{best}"
        tools = ""
        if has_inspector():
            tools = (
                "python inspect_lora.py measures it, talks to it and writes it for vLLM (evidence, "
                "chat, for_vllm), and\n"
            )
        lines.append(
            f"it was lowest after epoch {best / job.plan.steps_per_epoch:g} ({losses[best]:.4f}); "
            f"that adapter is in {where};\n{tools}--publish best publishes the best epoch of a run"
        )
    return lines


def next_commands(job: Job) -> str:
    """Return the commands to talk to the adapter and to serve it, or what they lack."""
    adapter = str(job.output / "final_lora")
    chat = wrap_command(["python", "inspect_lora.py", "chat", adapter])
    if not has_inspector():
        adapter = ""
        chat = (
            "inspect_lora.py is not beside this script. There it would talk to the adapter, and\n"
            "ask a server whether it applies it."
        )
    toy = DEMO["MODEL_NAME"]
    if toy == job.settings.MODEL_NAME:  # nobody serves a toy
        return (
            f"{chat}\nThis was a toy: its numbers are real, but it can hardly speak. README.md has "
            'a small real\nmodel under "Start", and the way to a run of your own under "Your data".'
        )
    if job.plan.vllm_refuses:
        return f"{chat}\n({job.plan.vllm_refuses}; merge this one into its base instead)"
    folder = job.output / "final_lora_vllm"
    if not folder.exists():
        folder = job.output / "final_lora"
    return f"{chat}\n{vllm_command(job.settings, folder, job.plan.max_rank, adapter)}"


def vllm_command(settings: argparse.Namespace, folder: Path, max_rank: int, adapter: str) -> str:
    """Return the commands that serve a folder's adapter, and ask the server whether it applies it.

    Args:
        settings: the model's name and revision.
        folder: what the server reads.
        max_rank: the adapter's largest rank.
        adapter: the same adapter as inspect_lora.py takes it, with its run beside it; an empty text
            where there is no inspect_lora.py to ask the server.
    """
    name = name_on_server(folder)
    serve = ["vllm", "serve", settings.MODEL_NAME]
    if not Path(settings.MODEL_NAME).is_dir():
        serve += ["--revision", settings.MODEL_REVISION]
    serve += ["--enable-lora", "--max-lora-rank", str(vllm_rank(max_rank))]
    serve += ["--lora-modules", f"{name}={folder}"]
    serve += ["--default-chat-template-kwargs", '{"enable_thinking": false}']
    note = f"# The server offers the adapter as the model named {name}:"
    if not adapter:
        return "\n".join([note, wrap_command(serve)])
    served = wrap_command(["python", "inspect_lora.py", "served", "http://localhost:8000", adapter])
    question = "# Does it apply the adapter? Ask it while it runs:"
    return "\n".join([note, wrap_command(serve), question, served])


def name_on_server(folder: Path) -> str:
    """Return the name under which a server is to offer an adapter: its output folder's name."""
    name = folder.resolve().parent.name if folder.name.startswith("final_lora") else folder.name
    return re.sub(r"[^\w.-]", "-", name) or "adapter"


def wrap_command(words: list[str], width: int = 86) -> str:
    """Return a command that can be pasted into a shell, on as many lines as it needs.

    A flag and its value stay on one line, however long they are.
    """
    groups: list[str] = []
    for word in words:
        is_value = bool(groups) and groups[-1].startswith("--") and not word.startswith("--")
        if is_value and " " not in groups[-1]:
            groups[-1] += f" {shlex.quote(word)}"
        else:
            groups.append(shlex.quote(word))
    lines = [groups[0]]
    for group in groups[1:]:
        if len(lines[-1]) + 1 + len(group) <= width:
            lines[-1] += f" {group}"
        else:
            lines.append(f"  {group}")
    return " \\\n".join(lines)


# ==== FLOAT16 PRODUCTS: an appendix for GPUs that only emulate bfloat16, such as the V100
#
# Two things are different on a V100 or a T4. First, choose_matmul() decides how the frozen weights
# are multiplied. With MATMUL "auto" it measures bfloat16 and scaled float16 on the GPU at hand, and
# takes float16 only if it is clearly faster and no less exact. With any other MATMUL you decide. A
# resumed run keeps what was decided. Second, prepare_device() keeps transformers from using
# flash-linear-attention on a GPU of a capability below 8.0, where it does not run.
#
# The reason: a V100 multiplies bfloat16 matrices at about 10 TFLOP/s and float16 ones at 95 to 100
# (mlxcel issue 1654, measured on a V100), but training in float16 as usual gives NaN, since its
# largest number is 65,504. Here only the products of frozen weights are computed in float16, and
# each row is scaled into its range first. Norms, attention and DeltaNet stay in DTYPE, LoRA and the
# loss in float32. A weight that the model's own code looks at stays as it is, too: some models cast
# their activations to its type, which float16 would narrow.


def choose_matmul(job: Job) -> None:
    """Decide how the frozen weights are multiplied: as MATMUL says, or as measured here.

    "auto" takes scaled float16 only if, on matrices of the model's own shapes and on this GPU, it
    is clearly faster than DTYPE and no less exact, compared with float32.
    """
    settings = job.settings
    if settings.MATMUL != "auto":
        job.matmul = {"used": settings.MATMUL}
        return
    folder = job.output / "checkpoints"
    before = read_json(folder / "job.json") or {}
    if newest_complete(folder) and "the products in use" in before:
        job.matmul = {"used": before["the products in use"]}  # on any device
        return
    job.matmul = {"used": "native"}
    if settings.DEVICE == "cpu" or settings.DTYPE == "float32":
        return
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    lengths = [len(example.input_ids) for example in job.train]
    row_count = math.ceil(examples_per_step(settings) * statistics.median(lengths))
    shapes = [shape for shape in job.plan.frozen_shapes if min(shape) >= 64]
    if not shapes:
        return  # nothing that use_float16_products() would convert
    dtype = getattr(torch, settings.DTYPE)
    try:
        measured = measure_products(shapes, row_count, dtype, accelerate.PartialState().device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a product that the GPU cannot compute
        report("matmul", f"in {settings.DTYPE}; scaled float16 fails here ({one_line(error)})")
        return
    job.matmul |= measured
    usual, scaled = measured["native"], measured["float16"]
    is_faster = scaled["seconds"] < usual["seconds"] / 1.2
    # Both are rounded to DTYPE in the end. Rounding by way of float16 adds 2.3 % error even with
    # exact sums, so 5 % more counts as no less exact.
    is_as_exact = scaled["error"] <= 1.05 * usual["error"]
    if is_faster and is_as_exact:
        job.matmul["used"] = "float16"
    report(
        "matmul",
        f"{settings.DTYPE}: {usual['tflops']:.1f} TFLOP/s, error {usual['error']:.2%}; scaled "
        f"float16: {scaled['tflops']:.1f} TFLOP/s, error {scaled['error']:.2%}\n"
        f"{'scaled float16' if job.matmul['used'] == 'float16' else settings.DTYPE} is used",
    )


def scaled_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
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


def use_float16_products(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Replace the frozen linear modules by ones that compute with scaled_product()."""
    float16_linear = float16_linear_class()
    dtype = model.dtype
    looked_at = weights_looked_at(model)
    converted, left, asked = 0, [], []
    for path, module in list(model.named_modules()):
        # Small ones, such as DeltaNet's in_proj_a (32 x 2,560), would cost more than they save.
        if type(module) is not torch.nn.Linear or min(module.weight.shape) < 64:
            continue
        if module.weight in looked_at:
            asked.append(path)
            continue
        if not sums_fit(module.weight):
            left.append(path)
            continue
        module.weight.data = module.weight.data.half()
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, float16_linear(module))
        converted += 1
    # The embedding may share its weight with the head, and must still return the model's type.
    model.get_input_embeddings().register_forward_hook(lambda _, __, rows: rows.to(dtype))
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # float32 sums
    text = f"{converted} frozen modules multiply in scaled float16"
    if left:
        text += f"; {len(left)} stay in {dtype}, their sums being too large: "
        text += join_limited(left, 3, ", ")
    if asked:
        text += f"; {len(asked)} stay in {dtype}, the model's code looking at their weights: "
        text += ", ".join(sorted({path.rpartition(".")[2] for path in asked}))
    report("matmul", text)
    return model


def weights_looked_at(model: transformers.PreTrainedModel) -> set[torch.nn.Parameter]:
    """Return the weights that the model's own code looks at, which must keep their type.

    Mamba casts to self.lm_head.weight.dtype and multiplies with self.dt_proj.weight by itself.
    Gemma's embedding scales its rows in the type of its weight, which its head may share.
    """
    classes = {one for module in model.modules() for one in type(module).__mro__}
    code = [
        inspect.getsource(one)
        for one in classes
        if one.__module__.startswith("transformers.models.")
    ]
    names = set(re.findall(r"\bself\.(?:\w+\.)*(\w+)\.weight\b", "\n".join(code)))
    found = {
        module.weight
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in names and isinstance(module, torch.nn.Linear)
    }
    embedding = model.get_input_embeddings()
    if type(embedding) is not torch.nn.Embedding:
        found.add(embedding.weight)
    return found


def float16_linear_class() -> type[torch.nn.Linear]:
    """Return the class of the modules that take over a linear module's frozen weight and bias.

    The classes are inside a function because torch is imported late.
    """

    class ScaledProduct(torch.autograd.Function):
        """rows @ weight.T, with a gradient for rows alone."""

        @staticmethod
        def forward(context: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            context.weight = weight
            return scaled_product(rows, weight.T)

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            return scaled_product(gradient, context.weight), None

    class Float16Linear(torch.nn.Linear):
        """A linear module whose products are scaled ones in float16."""

        def __init__(self, module: torch.nn.Linear) -> None:
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = module.in_features, module.out_features
            self.weight, self.bias = module.weight, module.bias

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            product = ScaledProduct.apply(rows, self.weight)
            return product if self.bias is None else product + self.bias

    return Float16Linear


def sums_fit(weight: torch.Tensor) -> bool:
    """Return whether every sum stays below 65,504, the end of float16, if the inputs are below 2.

    The forward pass adds up a row of weight (d x k), and the backward pass a column.
    """
    columns = torch.zeros(weight.shape[1], device=weight.device)
    largest_row = 0.0
    for part in weight.detach().split(4096):  # a part at a time needs less memory
        sizes = part.float().abs()
        largest_row = max(largest_row, sizes.sum(1).max().item())
        columns += sizes.sum(0)
    return max(largest_row, columns.max().item()) < 65504 / 2


def measure_products(
    shapes: list[tuple[int, int]], row_count: int, dtype: torch.dtype, device: torch.device
) -> dict[str, dict[str, float]]:
    """Return seconds, TFLOP/s and the error against float32 of both kinds of product.

    Args:
        shapes: (d, k) of the weights.
        row_count: how many rows are multiplied. About a hundred of their columns are made a
            hundred times larger than the others, as in trained models.
        dtype: the type of rows and weights.
        device: where to measure.
    """
    generator = torch.Generator(device).manual_seed(0)
    totals = {name: {"seconds": 0.0, "error": 0.0} for name in ("native", "float16")}
    work = sum(2e-12 * row_count * d * k for d, k in shapes)
    for d, k in shapes:
        rows = torch.randn(row_count, k, generator=generator, device=device)
        rows[:, :: max(1, k // 100)] *= 100
        rows = rows.to(dtype)
        weight = (torch.randn(d, k, generator=generator, device=device) / math.sqrt(k)).to(dtype)
        half = weight.half()
        exact = rows.float() @ weight.float().T
        products: dict[str, Callable[[], torch.Tensor]] = {
            "native": lambda rows=rows, weight=weight: rows @ weight.T,
            "float16": lambda rows=rows, half=half: scaled_product(rows, half.T),
        }
        for name, product in products.items():
            error = (product().float() - exact).norm() / exact.norm()
            totals[name]["error"] += error.item() / len(shapes)
            totals[name]["seconds"] += seconds_of(product, device)
    for total in totals.values():
        total["tflops"] = work / total["seconds"]
    return totals


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Return the median time of a call, over five blocks of ten calls, after a warm-up."""
    blocks = []
    for _ in range(6):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(10):
            function()
        synchronize(device)
        blocks.append((time.perf_counter() - began) / 10)
    return statistics.median(blocks[1:])


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ==== SPLIT: --split holds out a tenth of a file's dialogues
#
# Two files are written beside the one that is split, and nothing is overwritten. Lines with the
# same system message and the same first user message are parts of one dialogue, and go to the same
# side. Which dialogues are held out follows from SEED and from how they begin, not from the order
# of the lines. What is in the ShareGPT form is converted, and so is a file that is one JSON array;
# any other line stays as it is, to the letter.
#
# A common opening, such as "hi", must not make one dialogue of half a file. It is a beginning that
# more than a twentieth of the lines share, and 20 different dialogues among them. Lines that share
# one are told apart by what follows: the first reply, then the next user message, and so on. So two
# lines that share more than a common opening are never on both sides. These stay in training: lines
# that end within an opening, and large groups that nothing tells apart, such as repeats.
#
# What still leaks: the opening itself is learned, so a held-out question may be one that is trained
# on; the dry run names such lines. And only beginnings are compared, apart from spaces around each
# message: parts of a dialogue that begin at different places, or nearly equal ones, are not found.

LEAST_HELD_OUT = 20  # dialogues; the mean of fewer says little
LARGEST_SHARE = 1 / 20  # of the lines; what more of them share is not held out, or is an opening
LEAST_WITH_OPENING = 20  # different dialogues; fewer are parts or versions of one


@dataclass
class Line:
    """A line of the file that is split."""

    where: str  # file:line
    text: str  # as it will be written
    texts: tuple[str, ...]  # system message, first user message, first reply, and so on
    is_converted: bool
    is_shortened: bool  # a greeting or a question without a reply is left out
    dialogue: tuple[str, ...] = ()  # as many of the texts as tell it from other dialogues
    may_be_held_out: bool = True


def split_file(settings: argparse.Namespace) -> None:
    """Write the file that --split names as two: the dialogues to train on, and those held out."""
    source = Path(settings.split)
    targets = [source.with_suffix(f".{side}.jsonl") for side in ("train", "eval")]
    lines = read_dialogues(str(source))
    tell_dialogues_apart(lines)
    held_out = choose_held_out(lines, str(source), settings.SEED)
    sides: list[list[Line]] = [[], []]
    for line in lines:
        sides[line.dialogue in held_out].append(line)
    there = [str(target) for target in targets if os.path.lexists(target)]
    if there:
        verb, them = ("is", "it") if len(there) == 1 else ("are", "them")
        raise SystemExit(
            f"{' and '.join(there)} {verb} there already, so nothing was written. Move {them} away."
        )
    for target, side in zip(targets, sides, strict=True):
        write_lines(target, [line.text for line in side])
    report_split(settings, lines, targets, sides)


def read_dialogues(path: str) -> list[Line]:
    """Return the lines of a JSONL file, or the entries of a JSON array; exit if one is bad."""
    shown = path_from_here(path)
    lines = read_lines(path, "--split")
    numbered = {f"{shown}:{number}": line for number, line in enumerate(lines, 1)}
    if is_json_array(lines):
        try:
            entries = json.loads(b"\n".join(lines), object_pairs_hook=object_with_unique_keys)
        except (ValueError, RecursionError) as error:
            raise SystemExit(
                f"{shown}: this is no JSON array ({one_line(error)}), so nothing was written."
            ) from error
        texts = [json.dumps(entry, ensure_ascii=False) for entry in entries]
        numbered = {
            f"{shown}, entry {number}": text.encode(errors="surrogatepass")
            for number, text in enumerate(texts, 1)
        }
    found, problems = from_each_line(numbered, dialogue_in)
    stop_if_bad(problems, "written")
    return found


def dialogue_in(text: str, where: str) -> list[Line]:
    """Return a line with what the split must know of it, or raise ValueError."""
    given = parse_row(text)
    row = from_sharegpt(given)
    (example,) = examples_of(row, where, "", False, "last")
    is_converted, is_shortened = row is not given, False
    if is_converted:
        text = json.dumps(row, ensure_ascii=False)
        check_characters(text, "line")
        asked = [turn for turn in given["conversations"] if turn.get("from") != "system"]
        is_shortened = len(asked) > len(example.messages) - bool(example.system_message)
    texts = [one["content"].strip() for one in example.messages if one["role"] != "system"]
    texts.insert(0, example.system_message.strip())
    return [Line(where, text, tuple(texts), is_converted, is_shortened)]


def tell_dialogues_apart(lines: list[Line]) -> None:
    """Give each line its dialogue, and mark the lines that must not be held out."""
    most = len(lines) * LARGEST_SHARE
    different = without_beginnings({line.texts for line in lines})
    length = 2  # the system message and the first user message
    unsettled = lines
    while unsettled:
        for line in unsettled:
            line.dialogue = line.texts[:length]
        sharing = Counter(line.dialogue for line in unsettled)
        different_sharing = Counter(texts[:length] for texts in different)
        for line in unsettled:
            line.may_be_held_out = sharing[line.dialogue] <= most
        unsettled = [
            line
            for line in unsettled
            if not line.may_be_held_out
            and different_sharing[line.dialogue] >= LEAST_WITH_OPENING
            and len(line.texts) > length
        ]
        length += 1


def without_beginnings(dialogues: set[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the dialogues that are not the beginning of another one."""
    in_order = sorted(dialogues)  # what begins others comes right before one of them
    pairs = itertools.pairwise([*in_order, ()])
    return [one for one, after in pairs if after[: len(one)] != one]


def choose_held_out(lines: list[Line], path: str, seed: int) -> set[tuple[str, ...]]:
    """Return a tenth of the dialogues, and at least 20; exit if there are too few of them."""
    dialogues = {line.dialogue for line in lines}
    least = LEAST_HELD_OUT
    if len(dialogues) < 2 * least:
        raise SystemExit(
            f"{path} has {counted(len(dialogues), 'dialogue')}. Fewer than {2 * least} are not "
            f"split, since fewer than {least} held-out ones would say little. Add more, or move "
            "some into a file of their own by hand. Lines with the same system message and the "
            "same first user message count as one dialogue, unless very many begin with these."
        )

    def lot(dialogue: tuple[str, ...]) -> str:
        return hashlib.sha256(repr((seed, dialogue)).encode()).hexdigest()

    possible = {line.dialogue for line in lines if line.may_be_held_out}
    return set(sorted(possible, key=lot)[: max(least, round(len(dialogues) / 10))])


def write_lines(path: Path, lines: list[str]) -> None:
    """Write a file that does not exist yet."""
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise SystemExit(f"{path} cannot be written ({error.strerror}).") from error


# What training costs follows from these, too, so the command that --split prints has those given.
COST_SETTINGS = ("MODEL_NAME", "MODEL_REVISION", "REPLIES", "MAX_SEQ_LEN")


def report_split(
    settings: argparse.Namespace, lines: list[Line], targets: list[Path], sides: list[list[Line]]
) -> None:
    """Print what was written, and the command that says what training on it would cost."""

    def dialogues(some: list[Line]) -> str:
        count = len({line.dialogue for line in some})
        in_lines = f" in {len(some):,} lines" if count < len(some) else ""
        return counted(count, "dialogue") + in_lines

    shown = [path_from_here(str(path)) for path in (settings.split, *targets)]
    said = [f"{shown[0]}: {dialogues(lines)}"]
    converted = sum(line.is_converted for line in lines)
    if converted:
        said.append(f"{converted:,} were in the ShareGPT form and are converted")
    shortened = sum(line.is_shortened for line in lines)
    if shortened:
        said.append(f"of {shortened:,}, a greeting or a question that has no reply is left out")
    said.append(f"{shown[1]}: {dialogues(sides[0])}, to train on")
    said.append(f"{shown[2]}: {dialogues(sides[1])}, held out; none is on both sides")
    opened = [line for line in sides[1] if len(line.dialogue) > 2]
    if opened:
        opening = json.dumps(one_line(opened[0].texts[1], 40), ensure_ascii=False)
        verb = "has" if len(opened) == 1 else "have"
        text = f"{counted(len(opened), 'held-out line')} {verb} an opening such as {opening} in "
        said.append(wrap_lines(f"{text}common with lines to train on, but not what follows it", 90))
    report("split", "\n".join(said))
    warn_of_few_lines(lines, sides[1])
    warn_of_missing_system_messages(settings.split, {line.where: line.texts[0] for line in lines})
    command = ["python", "train_lora_single.py", "--dry_run"]
    for name in COST_SETTINGS:
        if getattr(settings, name) != globals()[name]:
            command += [f"--{name.lower()}", str(getattr(settings, name))]
    command += ["--train_file", shown[1], "--eval_file", shown[2]]
    report("next", f"what training would cost, without a GPU:\n{wrap_command(command)}")


def warn_of_few_lines(lines: list[Line], held_out: list[Line]) -> None:
    """Say so, and why, if the held-out dialogues have much less than a tenth of the lines."""
    if len(held_out) >= 0.05 * len(lines):
        return
    staying = sum(not line.may_be_held_out for line in lines)
    why = "a tenth of the dialogues are, and these are short of lines; another --seed draws others"
    if len(held_out) >= 0.05 * (len(lines) - staying):
        why = (
            f"{counted(staying, 'line')} stay in training: they repeat one another, or are parts "
            "of one dialogue, and make up more than a twentieth of the file"
        )
    share = f"Only {len(held_out) / len(lines):.1%} of the lines are held out"
    report("warning", wrap_lines(f"{share}, since {why}.", 90))


# ==== COMMAND LINE: flags, the log, the environment, signals, error messages, main()
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
    "GENERAL_FILE": str(HERE / "data" / "general.jsonl"),
    "OUTPUT_DIR": "output/demo",
    "DEVICE": "cpu",
    "DTYPE": "float32",
    "NUM_EPOCHS": 1,
    "MAX_STEPS": 100,
    "LEARNING_RATE": 2e-3,
    "EVIDENCE_EXAMPLES": 20,
}


def setting_types() -> dict[str, Any]:
    """Return {name: type} of the settings: the annotated constants of this file."""
    return typing.get_type_hints(sys.modules[__name__])


def setting_comments() -> dict[str, str]:
    """Return {name: the comment after it}, read from this file."""
    pattern = re.compile(r"^([A-Z][A-Z0-9_]*): .*?  # (.+)$", re.MULTILINE)
    return dict(pattern.findall(Path(__file__).read_text(encoding="utf-8")))


def parse_settings(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the settings as the flags change them, and the modes dry_run and demo.

    Exits with status 2 after a wrong flag, and with 1 if a constant was edited wrongly.
    """
    problems = check_values({name: globals()[name] for name in setting_types()})
    if problems:
        raise SystemExit("\n".join(problems))
    parser = build_parser()
    argv = [with_underscores(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    refuse_former_flags(parser, argv)
    settings, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse_unknown_flags(parser, unknown)
    if settings.split is not None and (settings.demo or settings.dry_run):
        parser.error("--split trains nothing; give it without --demo and --dry_run")
    if settings.demo:
        parser.set_defaults(**DEMO)
        settings = parser.parse_args(argv)
    values = {name: getattr(settings, name) for name in setting_types()}
    problems = check_values(values) or check_rules(settings)
    if problems:
        parser.error("\n".join(problems))
    return settings


SEE_README = """

README.md shows the forms of the data under "Your data", and says how a run resumes under "When
something looks wrong"."""


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with the modes, and with a flag for each setting."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--SETTING VALUE ...] [--dry_run] [--demo] [--split FILE]",
        description=__doc__.partition("\n\nThe sections")[0] + SEE_README,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="check the data, print the plan, and stop"
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        help=f"train a toy model on a CPU: sets {', '.join(DEMO)}, and other flags override it",
    )
    parser.add_argument(
        "--split",
        metavar="FILE",
        help="write FILE's conversations as two files, a tenth of them held out, and stop",
    )
    comments = setting_comments()
    flags = parser.add_argument_group("settings (hyphens will do as well: --lora-r 16)")
    for name, annotation in setting_types().items():
        default = globals()[name]
        shown = " ".join(default) if isinstance(default, list) else default
        help_text = f"{comments.get(name, '')} [{shown}]".strip().replace("%", "%%")
        options: dict[str, Any] = {"dest": name, "default": default, "help": help_text}
        if typing.get_origin(annotation) is Literal:
            options["choices"] = typing.get_args(annotation)
            options["type"] = type(default)
        elif typing.get_origin(annotation) is list:
            options |= {"nargs": "+", "metavar": "NAME"}
        elif annotation is bool:
            options |= {"type": parse_bool, "metavar": "true|false"}
        elif annotation in (int, float):
            metavar = "N" if annotation is int else "X"
            options |= {"type": number_parser(annotation, default), "metavar": metavar}
        else:
            options |= {"type": annotation, "metavar": "TEXT"}
        flags.add_argument(f"--{name.lower()}", **options)
    return parser


def with_underscores(argument: str) -> str:
    """Return a flag like --lora-r=4 as --lora_r=4; anything else as it is."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def number_parser(kind: type, example: float) -> Callable[[str], float]:
    """Return a function that reads an int or a float, or says what a flag must be."""

    def parse(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"it must be {noun}, such as {example}; it is {text!r}"
            ) from None

    return parse


def parse_bool(text: str) -> bool:
    """Return the value of a flag that is true or false."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def refuse_former_flags(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Exit with status 2 where a flag or value of an earlier version is given, naming the new."""
    now = {
        "--chat": "talking to an adapter is now: python inspect_lora.py chat OUTPUT_DIR/final_lora",
        "--compare": "comparing runs is now: python inspect_lora.py compare FOLDER ...",
    }
    for argument in argv:
        if argument.partition("=")[0] in now:
            parser.error(now[argument.partition("=")[0]])
    if "--matmul=dtype" in argv or ("--matmul", "dtype") in itertools.pairwise(argv):
        parser.error('MATMUL "dtype" is now called "native"')


def refuse_unknown_flags(parser: argparse.ArgumentParser, unknown: list[str]) -> None:
    """Exit with status 2, naming the wrong flag and the one that was probably meant."""
    wrong = unknown[0].partition("=")[0]
    known = [f"__{name.lower()}" for name in setting_types()]
    known += ["__demo", "__dry_run", "__split"]
    close = difflib.get_close_matches(wrong.replace("-", "_").lower(), known, 1)
    if close:
        parser.error(f"there is no flag {wrong}; did you mean --{close[0][2:]}?")
    if not wrong.startswith("-"):
        parser.error(f"{wrong} has no flag before it; write --name_of_the_setting {wrong}")
    parser.error(f"there is no flag {wrong}; --help lists them all")


def check_values(values: dict[str, Any]) -> list[str]:
    """Return what is wrong with the types of the settings, one sentence each."""
    problems = []
    for name, annotation in setting_types().items():
        value = values[name]
        if typing.get_origin(annotation) is Literal:
            choices = typing.get_args(annotation)
            is_good = value in choices
            wanted = "one of " + ", ".join(json.dumps(choice) for choice in choices)
        elif annotation == list[str]:
            is_good = isinstance(value, list) and all(
                isinstance(item, str) and item for item in value
            )
            wanted = 'a list of names, such as ["q_proj", "v_proj"]'
        elif annotation is float:
            is_good = type(value) in (int, float) and math.isfinite(value)
            wanted = "a number"
        elif annotation in (int, str, bool):
            is_good = type(value) is annotation
            names = {int: "a whole number", str: 'a text in "quotes"', bool: "True or False"}
            wanted = names[annotation]
        else:
            problems.append(
                f"{name} is annotated as {annotation}; a setting is an int, float, bool, str, "
                "list[str] or Literal[...]."
            )
            continue
        if not is_good:
            problems.append(f"{name} is {value!r}; it must be {wanted}.")
    return problems


def check_rules(settings: argparse.Namespace) -> list[str]:
    """Return what is wrong with the settings' values, one sentence each. Add rules of yours."""
    problems = []

    def require(is_met: bool, name: str, rule: str) -> None:
        if not is_met:
            problems.append(f"{name} is {getattr(settings, name)!r}; {rule}.")

    require(bool(settings.MODEL_NAME), "MODEL_NAME", "give a name on the hub or a folder")
    require(bool(settings.TRAIN_FILE), "TRAIN_FILE", "give a JSONL file")
    require(bool(settings.OUTPUT_DIR), "OUTPUT_DIR", "give a folder, such as output")
    require(bool(settings.LORA_TARGET_MODULES), "LORA_TARGET_MODULES", "name at least one layer")
    require(1 <= settings.LORA_R <= 512, "LORA_R", "the rank must be from 1 to 512")
    require(settings.LORA_ALPHA >= 1, "LORA_ALPHA", "it must be at least 1")
    require(0 <= settings.LORA_DROPOUT < 1, "LORA_DROPOUT", "it must be from 0 to below 1")
    require(0 < settings.LEARNING_RATE < 1, "LEARNING_RATE", "it must be above 0 and below 1")
    require(0 <= settings.WARMUP_RATIO < 1, "WARMUP_RATIO", "it must be from 0 to below 1")
    require(0 <= settings.SEED < 2**32, "SEED", "it must be from 0 to 4,294,967,295")
    at_least_1 = (
        "MAX_SEQ_LEN", "NUM_EPOCHS", "BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS", "LOGGING_STEPS",
        "SAVE_STEPS", "MAX_NEW_TOKENS",
    )  # fmt: skip
    at_least_0 = ("MAX_STEPS", "EVIDENCE_EXAMPLES", "NUM_SAMPLES")
    for name in at_least_1:
        require(getattr(settings, name) >= 1, name, "it must be at least 1")
    for name in at_least_0:
        require(getattr(settings, name) >= 0, name, "it must be 0 or more")
    for name in at_least_1 + at_least_0:
        require(getattr(settings, name) < 2**31, name, "it must be at most 2,147,483,647")
    if is_same_file(settings.EVAL_FILE, settings.TRAIN_FILE):
        problems.append(
            "EVAL_FILE is TRAIN_FILE; the held-out loss would be measured on what was learned. "
            'Give another file, or "" for none.'
        )
    if settings.PUBLISH == "best" and not settings.EVAL_FILE:
        problems.append('PUBLISH is "best", which needs an EVAL_FILE to tell which epoch that is.')
    package = settings.REPORT_TO
    trackers = ("tensorboard", "wandb", "trackio")
    if package not in ("none", *trackers):
        problems.append(f"REPORT_TO is {package!r}; it must be none, {', '.join(trackers)}.")
    elif package != "none" and not is_installed(package):
        problems.append(
            f'REPORT_TO is "{package}", which is not installed; pip install {package}, or choose '
            '"none".'
        )
    return problems


def is_installed(package: str) -> bool:
    """Return whether a package can be imported; a mere folder, such as wandb's runs, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def is_same_file(one: str, other: str) -> bool:
    """Return whether two names are equal, or are names of one file, as a link is."""
    with suppress(OSError, ValueError):  # one of them does not exist
        return os.path.samefile(one, other)
    return one == other


def is_main_process() -> bool:
    """Return whether this is the process that prints, decides and writes."""
    return os.environ.get("RANK", "0") == "0"


def report(section: str, text: str, in_log: str = "") -> None:
    """Print and log text beside the name of its section; the log may get a longer text."""
    if not is_main_process():
        return
    LOG.info(beside(section, in_log or text))
    if "tqdm" in sys.modules:  # a progress bar may be shown below
        sys.modules["tqdm"].tqdm.write(beside(section, text))
        sys.stdout.flush()
    else:
        print(beside(section, text), flush=True)


def beside(section: str, text: str) -> str:
    """Return text with the section's name to the left of its first line."""
    lines = f"{section:<10}{text}".replace("\n", "\n" + " " * 10).split("\n")
    return "\n".join(line.rstrip() for line in lines)


def one_line(value: Any, width: int = 200) -> str:
    """Return value as one line, shortened to width."""
    text = " ".join(str(value).split())
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def wrap_lines(text: str, width: int = 100) -> str:
    """Return text with its long lines broken at spaces, so that a terminal does not cut words.

    A command that wrap_command() has broken already stays as it is.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        if line.endswith(" \\") or (lines and lines[-1].endswith(" \\")):
            lines.append(line)
        else:
            broken = textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
            lines += broken or [""]
    return "\n".join(lines)


def path_from_here(path: str) -> str:
    """Return a path as seen from the working folder if it is below it, otherwise as it is."""
    with suppress(ValueError):
        return str(Path(path).resolve().relative_to(Path.cwd()))
    return path


def shorten_path(path: str, width: int) -> str:
    """Return a path as seen from here; of a long one only the end."""
    path = path_from_here(path)
    return path if len(path) <= width else "..." + path[3 - width :]


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 line" or "1,000 lines"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def join_limited(items: list[str], limit: int = 20, separator: str = "\n") -> str:
    """Join the first items, and say how many more there are."""
    if len(items) <= limit:
        return separator.join(items)
    more = f"... and {len(items) - limit:,} more"
    return separator.join([*items[:limit], more])


def prepare_device(settings: argparse.Namespace) -> str:
    """Return the device's name, or exit and say why there is none that works.

    This comes before the model's code is imported, since the import decides whether it uses
    flash-linear-attention.
    """
    if settings.DEVICE == "cpu":
        accelerate.PartialState(cpu=True)
        report("device", "CPU")
        return "CPU"
    try:
        torch.cuda.init()  # says why there is no GPU
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(no_gpu_message(error)) from error
    accelerate.PartialState()
    device = accelerate.PartialState().device
    major, minor = torch.cuda.get_device_capability(device)
    free, total = torch.cuda.mem_get_info(device)
    name = f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
    if major < 8:
        forbid_gpu_packages()  # flash-linear-attention does not run there, yet would be used
    try:  # a torch without this GPU's kernels says so only when it computes
        ones = torch.ones(8, 8, device=device, dtype=getattr(torch, settings.DTYPE))
        (ones @ ones).sum().item()
    except RuntimeError as error:
        raise SystemExit(
            f"DEVICE cuda: torch {torch.__version__} does not run on {name} "
            f"({one_line(error)}). The versions in requirements.txt run on sm_70 (V100) to sm_120; "
            "if it is one of these, free its memory."
        ) from error
    report("device", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free")
    return name


def no_gpu_message(error: Exception) -> str:
    """Return why torch sees no GPU, as far as it can be told."""
    reason = one_line(error)
    with suppress(OSError):
        version = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
        reason = f"{reason} The driver is: {one_line(version, 90)}"
    if reason.startswith("Found no NVIDIA driver") and "The driver is" not in reason:
        reason = "this machine has no NVIDIA driver"
    hidden = ""
    if USERS_VISIBLE_DEVICES is not None:
        hidden = f" CUDA_VISIBLE_DEVICES is {USERS_VISIBLE_DEVICES!r}."
    return (
        f"DEVICE cuda: torch sees no GPU: {reason.rstrip('.')}.{hidden} An NVIDIA GPU and a "
        "driver of the 525 branch or newer are needed; without one, try --demo, or --device cpu "
        "with a small model."
    )


def forbid_gpu_packages() -> None:
    """Make fla and causal_conv1d unimportable.

    transformers uses them wherever they can be imported, also on a CPU or an older GPU, where
    their Triton kernels crash.
    """
    for name in ("fla", "causal_conv1d"):
        sys.modules[name] = None


def check_multi_gpu_split(job: Job) -> None:
    """Exit if several processes cannot share the examples evenly: some would be seen twice."""
    if job.settings.dry_run or accelerate.PartialState().num_processes == 1:
        return
    processes = accelerate.PartialState().num_processes
    size = examples_per_step(job.settings)
    if size % processes or len(job.train) % size:
        raise SystemExit(
            f"{processes} processes cannot share {len(job.train):,} examples in steps of {size} "
            "evenly, and some would be trained on twice. Choose BATCH_SIZE x "
            f"GRADIENT_ACCUMULATION_STEPS as a multiple of {processes}, and the number of training "
            "examples as a multiple of that."
        )
    job.device_name += f", {processes} processes"
    report("device", f"{processes} processes share the examples of each step")


USERS_VISIBLE_DEVICES = os.environ.get("CUDA_VISIBLE_DEVICES")


def set_environment(settings: argparse.Namespace) -> None:
    """Set what libraries read from the environment, before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    forget = r"ACCELERATE_.*|MPLBACKEND"  # left over from other work, they would change this run
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # no launcher such as torchrun is at work
        forget += "|RANK|LOCAL_RANK|WORLD_SIZE"
        # TRL refuses several visible GPUs without a launcher.
        visible = "0" if USERS_VISIBLE_DEVICES is None else USERS_VISIBLE_DEVICES
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
        # accelerate refuses several RTX 40 cards with an older driver otherwise (peft issue 1927).
        os.environ.setdefault("NCCL_P2P_DISABLE", "1")
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
    if settings.DEVICE == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Threads that busy-wait slowed the demo from 28 s to 245 s beside a busy process.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if settings.DEVICE == "cpu" or settings.dry_run:
        forbid_gpu_packages()
    for name in list(os.environ):
        if re.fullmatch(forget, name):
            del os.environ[name]
    # transformers advises installing fla; README.md says where it helps.
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    # PEFT 0.21 calls a function that transformers 5.24 renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def open_log(output: Path) -> logging.Handler:
    """Make the output folder, and open the log there; another run may still be writing to it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        return logging.FileHandler(
            output / "all_logs.log", encoding="utf-8", errors="backslashreplace"
        )
    except OSError as error:
        raise SystemExit(
            f"OUTPUT_DIR {output} cannot be written ({error.strerror}); choose another folder."
        ) from error


def log_to(log: logging.Handler) -> None:
    """Log what is printed, warnings and tracebacks."""
    logging.basicConfig(handlers=[log, logging.lastResort], format="%(message)s", force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a full disk must not end the run
    LOG.setLevel(logging.INFO)
    LOG.info("\n---- %s %s", time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join(sys.argv))


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock of an output folder; exit if another run writes there."""
    import filelock

    lock = filelock.FileLock(output / ".lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise SystemExit(
            f"OUTPUT_DIR {output} is in use by another run; wait for it, or choose another folder."
        ) from error
    except (OSError, NotImplementedError):  # some network file systems have no locks
        pass
    try:
        yield
    finally:
        lock.release()


class Stopped(KeyboardInterrupt):
    """The run was asked to stop by a signal, and did, as the message says."""

    def __init__(self, number: int, message: str) -> None:
        """Remember the signal."""
        super().__init__(message)
        self.number = number


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def catch_signals(job: Job) -> None:
    """Within a step, finish and save it first; elsewhere, or at a second signal, stop at once."""
    # A launcher passes the terminal's Ctrl-C on to its processes, which have had it already.
    may_repeat = "TORCHELASTIC_RUN_ID" in os.environ

    def on_signal(number: int, _: Any) -> None:
        # A terminal that is closed sends SIGHUP twice, from the shell and from the kernel.
        is_second = job.stop_signal > 0 and number != signal.SIGHUP and not may_repeat
        job.stop_signal = number
        if job.saves_before_stopping and not is_second:
            text = "finishing and saving the current step"
            report("stopping", text + ("" if may_repeat else "; a second signal stops at once"))
            return
        message = "Stopped. The same command goes on from the newest checkpoint, if there is one."
        if job.published:
            final = job.output / "final_lora"
            message = f"Stopped. {final} is complete. The same command would retrain from scratch."
        if job.published and has_inspector():
            command = wrap_command(["python", "inspect_lora.py", "evidence", str(final)])
            message = (
                f"Stopped. {final} is complete. What it is worth was not measured to the end; this "
                "measures it without training (the same command would retrain from scratch):\n"
                f"{command}"
            )
        raise Stopped(number, message)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, on_signal)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Let all signals wait for the end of something short that must not be left half done."""
    waiting: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in waiting:
        signal.raise_signal(number)


def explain(error: BaseException, output: Path) -> tuple[int, str]:
    """Return exit status and message for what ended the run; no message if it is not known."""
    if isinstance(error, SystemExit):
        return 1, str(error)
    if isinstance(error, Stopped):
        return 128 + error.number, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "Stopped."
    if isinstance(error, ModuleNotFoundError) and error.name in PACKAGES:
        return 1, f"The package {error.name} is missing; pip install -r requirements.txt"
    if type(error).__name__ == "OutOfMemoryError":
        return 1, (
            f"The GPU's memory is full ({one_line(error)}). If another program runs there, stop "
            "it, and the same command resumes from the newest checkpoint. Otherwise lower "
            "MAX_SEQ_LEN, so that the longest examples are left out; that is another training, "
            "which needs another OUTPUT_DIR once there is a checkpoint."
        )
    if is_disk_full(error, output):
        return 1, f"The disk of {output} is full. Make room, and give the same command again."
    return 1, ""


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Return whether an error comes from a full disk; torch and safetensors hide its number."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
        return True
    with suppress(OSError):
        torch_writes = "PytorchStreamWriter|inline_container|iostream error"
        writes = type(error).__name__ == "SafetensorError" or re.search(torch_writes, str(error))
        return bool(writes) and shutil.disk_usage(folder).free < 2**20
    return False


def main(argv: list[str] | None = None) -> None:
    """Run the command. Exits with 1 after an error, 2 after a wrong flag, 128 + a signal."""
    settings = parse_settings(argv)
    set_environment(settings)
    job = Job(settings)
    catch_signals(job)
    run_or_explain(job)


def start(job: Job, until_the_end: ExitStack) -> None:
    """Lock the output folder, open the log, say what is special about this run, and do it."""
    if job.settings.split is not None:
        split_file(job.settings)
        return
    if not job.settings.dry_run and is_main_process():
        log = open_log(job.output)
        until_the_end.enter_context(locked(job.output))
        log_to(log)
    toy = DEMO["MODEL_NAME"]
    if job.settings.demo and toy == job.settings.MODEL_NAME:
        text = "a toy that knows a few hundred plain sentences: look at the numbers, and not at"
        report("demo", f"{text}\nwhat it says")
    run(job)


def run_or_explain(job: Job) -> None:
    """Do the job; turn what is known to have gone wrong into a message and an exit status."""
    ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    until_the_end = ExitStack()  # run.json is written last, still under the folder's lock
    try:
        start(job, until_the_end)
    except BaseException as error:
        for number in SIGNALS:  # nothing may interrupt what is left to do
            signal.signal(number, signal.SIG_IGN)
        LOG.info("The run was ended by:", exc_info=True)
        status, message = explain(error, job.output)
        if job.stop_signal and status == 1 and not isinstance(error, SystemExit):
            # A library turned the signal into an error of its own.
            status, message = 128 + job.stop_signal, f"Stopped. ({message or repr(error)})"
        how = "interrupted" if status > 1 else "failed"
        write_record(job, "finished" if job.published else f"{how}: {message or repr(error)}")
        if not message:
            raise
        print(wrap_lines(message), file=sys.stderr)
        raise SystemExit(status) from error
    finally:
        until_the_end.close()
        logging.shutdown()
        for number in SIGNALS:
            if number not in ignored:
                signal.signal(number, signal.SIG_DFL)


class LossyOutput(io.FileIO):
    """Standard output or error whose reader may go away: no print may cost a checkpoint."""

    def write(self, data: Any) -> int:
        """Write data, or drop it."""
        with suppress(OSError):
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


# `uv run train_lora_single.py --demo` reads this and needs no environment made by hand (PEP 723).
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.7,<2.11",
#     "transformers>=5.24,<5.30",
#     "peft>=0.21.2,<0.22",
#     "trl>=1.16,<1.17",
#     "datasets>=5,<6",
#     "accelerate>=1.15,<2",
#     "safetensors>=0.8,<1",
#     "matplotlib>=3.10,<4",
#     "huggingface_hub",
#     "filelock",
#     "tqdm",
#     "jinja2",
# ]
# ///


if __name__ == "__main__":
    # inspect_lora.py imports this module by its name. It must get this one, with its settings, also
    # where this file is a copy under another name.
    sys.modules["train_lora_single"] = sys.modules["__main__"]
    survive_closed_outputs()
    main()
