"""Train a LoRA adapter for Qwen3.5-4B on your conversations, on one GPU (Linux).

    python train_lora_single.py              train on data/train.jsonl; write output/final_lora
    python train_lora_single.py --dry_run    check the data and print the plan; needs no GPU
    python train_lora_single.py --demo       the whole job with a toy model: two minutes on a CPU
    python train_lora_single.py --lora_r 16 --num_epochs 2   every setting below is also a flag

The same command resumes a run that was stopped; settings that change what is trained begin a new
one. No earlier adapter is overwritten.

The file has the settings and, in run(), the whole job. What each step does stands in a room of
train_lora/, whose __init__.py lists them.
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

from typing import Any

from train_lora import environment, stopping
from train_lora.settings import Settings, parse_settings

# ==== SETTINGS: edit them here, or give the flag of the same name, such as --lora_r 16
#
# To add a setting, write one line, such as
#     WEIGHT_DECAY = 0.01  # shrinks A and B a little at each step
# and use it, here in training_fields() as weight_decay=settings.WEIGHT_DECAY. It becomes a flag and
# is recorded in run.json. A new value is a new job, so no earlier checkpoint is resumed. To have
# wrong values refused, add its bounds to ALLOWED_VALUES in train_lora/settings.py.

# The model.
MODEL_NAME = "Qwen/Qwen3.5-4B"  # a chat model on the hub, or a local folder
MODEL_REVISION = "main"  # the model's branch, tag or commit on the hub
CHAT_TEMPLATE = ""  # "" for the model's own, one_pass (see train_lora/tokens.py), or a file
DTYPE = "bfloat16"  # the type of the frozen weights: bfloat16 or float32
DEVICE = "cuda"  # cuda, or cpu for small models

# The data. train_lora/conversations.py shows the formats that a conversation may have.
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
# matters: how many fit into the GPU's memory at once is found out (see train_lora/memory.py).
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
MATMUL = "auto"  # for the frozen weights: native, float16 (for a V100), or auto (by GPU)
USE_FLA = False  # flash-linear-attention's kernels for Gated DeltaNet: faster on an A100 or 4090


def lora_fields(settings: Settings) -> dict[str, Any]:
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


def training_fields(settings: Settings, steps: int) -> dict[str, Any]:
    """Return the SFTConfig fields you may edit; you may add weight_decay, optim and others.

    The rest keep TRL's defaults (AdamW, gradients clipped at 1.0) or fixed_fields().
    """
    return dict(
        learning_rate=settings.LEARNING_RATE,
        lr_scheduler_type=settings.LR_SCHEDULER_TYPE,
        warmup_steps=int(settings.WARMUP_RATIO * steps),
        seed=settings.SEED,
    )


if __name__ == "__main__":  # before the slow imports, so that --help and mistakes answer at once
    SETTINGS = parse_settings(globals())
    environment.prepare()
    stopping.end_quietly()

import accelerate
import datasets
import peft
import transformers
import trl

from train_lora.base import check_loaded, loading_explained, loading_options, read_base
from train_lora.command import Session, main
from train_lora.console import report
from train_lora.data import read_data
from train_lora.delta_rule import compute_delta_rule_in_segments
from train_lora.device import prepare_device
from train_lora.events import RunEvents, load_last_step
from train_lora.job import Job
from train_lora.jobs import find_earlier_work, identity_of, request_of
from train_lora.memory import find_what_fits
from train_lora.micro_batches import collate
from train_lora.plan import make_plan, show_plan
from train_lora.record import recorded
from train_lora.saving import restore_results, save_final_lora
from train_lora.settings import tell_of_unused_settings
from train_lora.tokens import rows_of
from train_lora.trainer import MicroBatchedTrainer, complete_lora, fixed_fields, prepare_base


def run(settings: Settings, session: Session) -> Job:
    """Train one adapter, verify it, and save it as final_lora."""
    job = plan_job(settings, session)  # what is trained, before the weights are loaded
    earlier = job.earlier
    if settings.dry_run or not (earlier.checkpoint or earlier.is_finished):
        show_plan(settings, job.base, job.data, job.plan, job.training)
    if earlier.is_finished and not settings.dry_run:
        restore_results(job)
    if settings.dry_run or earlier.is_finished:
        report("done", "Nothing was trained.")
        return job
    with recorded(job):  # run.json says what the job is, and how this session ends
        trainer = build_trainer(job)  # the model with LoRA in it
        checkpoint = earlier.checkpoint
        if checkpoint and earlier.checkpoint_step == job.plan.steps:
            load_last_step(trainer, checkpoint)
        else:
            find_what_fits(trainer)  # trial passes, on a GPU
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        save_final_lora(trainer)  # write, load again, compare, move into place
    return job


def plan_job(settings: Settings, session: Session) -> Job:
    """Read and check everything but the weights, and find what earlier sessions left."""
    prepare_device(settings)
    base = read_base(request_of(settings))  # its configuration, tokenizer and chat template
    data = read_data(settings, base)  # every line is checked
    lora, lora_config = lora_fields(settings), peft.LoraConfig(**lora_fields(settings))
    plan = make_plan(settings, base, data, lora_config)  # which matrices, and how many steps
    chosen = training_fields(settings, plan.steps)
    identity = identity_of(settings, base, data, LoraConfig=lora, SFTConfig=chosen)
    earlier = find_earlier_work(settings, identity, plan.steps)  # a checkpoint, or final_lora?
    [earlier] = accelerate.utils.broadcast_object_list([earlier])  # the same in all processes
    training = trl.SFTConfig(
        output_dir=str(earlier.folder),
        **chosen,
        **fixed_fields(settings, base, plan.steps),  # what the rooms rely on
    )
    tell_of_unused_settings(settings)
    return Job(settings, base, data, lora_config, plan, identity, training, earlier, session)


def build_trainer(job: Job) -> LoraTrainer:
    """Load the base model, and return a trainer whose model has LoRA in it."""
    settings, base = job.settings, job.base
    with loading_explained(settings.MODEL_NAME, settings.DEVICE):
        # Of Qwen3.5 this is the text part. SFTTrainer, given the model's name, would also load the
        # vision part, and the modules would have other names.
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            settings.MODEL_NAME,
            dtype=settings.DTYPE,  # bfloat16 as shipped
            **loading_options(base.commit, settings.DEVICE),
        )
    check_loaded(settings.MODEL_NAME, info)
    compute_delta_rule_in_segments(model)  # Qwen3.5's Gated DeltaNet, in linear time
    prepare_base(model, job)  # scaled float16 on a V100, and a loss without all logits
    trainer = LoraTrainer(
        job,
        model=model,
        peft_config=job.lora_config,  # LoRA enters the model here alone; A and B are float32
        args=job.training,
        train_dataset=datasets.Dataset.from_list(rows_of(job.data.examples)),
        data_collator=collate,
        processing_class=base.tokenizer,
    )
    complete_lora(trainer)  # exactly the planned weights are trained: 0.2518 % as shipped
    trainer.add_callback(RunEvents(trainer))  # prints, checks, evaluates, saves and stops
    trainer.remove_callback(transformers.PrinterCallback)  # would print dictionaries
    return trainer


class LoraTrainer(MicroBatchedTrainer, trl.SFTTrainer):
    """TRL's trainer, whose steps are divided into micro-batches that fit into the memory.

    For another loss see token_losses() in train_lora/losses.py, and for another step
    train_lora/trainer.py; another optimizer is a field of SFTConfig, see training_fields().
    """


if __name__ == "__main__":
    main(run, SETTINGS)
