"""How many examples go through the GPU at once.

A step has BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS examples, the last step of an epoch the rest.
tokens_at_once of their tokens go through the GPU at once, activations kept. A longer example uses
gradient checkpointing, which takes a sixth of the memory and half again the work. Trial passes
before the first step find the number, which is at most that of a whole step:
- one row of tokens_at_once tokens, activations kept (several if the model has fewer positions, as
  GPT-2 may); by bisection, to a tenth. As attention grows with the square of the length,
  one long row is the worst case for that many tokens;
- with checkpointing, the longest example, then two, three, ... rows, as wide as so many can be.
If memory runs out in a step, it is done again with nine tenths of the number; several processes
stop instead. On a CPU nothing is tried.
"""

from __future__ import annotations

import math
import time

import torch

from train_lora.console import LOG, report
from train_lora.device import free_memory
from train_lora.environment import IS_WSL
from train_lora.losses import MOST_TARGETS, needs_logits
from train_lora.micro_batches import CHECKPOINTING_FACTOR, DoesNotFit
from train_lora.trainer import MicroBatchedTrainer


def find_what_fits(trainer: MicroBatchedTrainer) -> None:
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
                trainer.lower_tokens_at_once(rows, width)
            else:
                rows += 1
    # CUDA's libraries need the rest. A driver that spills into main memory (WSL) must fail.
    torch.cuda.set_per_process_memory_fraction(for_steps * usable)
    torch.cuda.reset_peak_memory_stats()
    report("memory", f"{trainer.tokens_at_once:,} tokens fit; longer rows use checkpointing")


def most_tokens_that_fit(trainer: MicroBatchedTrainer) -> int:
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


def trial_fits(trainer: MicroBatchedTrainer, rows: int, width: int) -> bool:
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
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    trainer.model.train()
    torch.cuda.reset_peak_memory_stats()
    began, fits = time.monotonic(), True
    try:
        trainer.backward_if_it_fits(trainer.model, batch, rows * width)
    except DoesNotFit:
        fits = False
    kind = "recomputed" if trainer.needs_checkpointing(width) else "kept"
    gib = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    text = f"{rows} x {width} tokens, {kind}, {targets} targets each: {'fits' if fits else 'full'}"
    peak = f"at most {gib[0]:.2f} GiB allocated and {gib[1]:.2f} reserved"
    LOG.info("memory    %s, %s, %.2f s", text, peak, time.monotonic() - began)
    free_memory(trainer.model)
    return fits
