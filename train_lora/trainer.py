"""TRL's trainer, whose step is divided until it fits into the memory.

Each module that gets LoRA, a matrix W, has two small matrices beside it, A and B. Only these are
trained, in float32. Trainer hands all examples of a step to training_step(), clips the gradient,
and lets AdamW change A and B. Three checks guard this: check_only_lora_is_trained() before the
first step, RunEvents.on_log() at each step (loss and gradient must be finite), and
verify_saved_adapter() at the end.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
import trl
from torch import Tensor, nn

from train_lora.base import Base
from train_lora.console import LOG, UserError, one_line, report
from train_lora.delta_rule import chunk_of, round_up
from train_lora.device import free_memory, is_out_of_memory
from train_lora.files import Facts
from train_lora.fp16_matmul import try_fp16_matmul, uses_fp16_matmul
from train_lora.job import Job
from train_lora.losses import (
    last_states,
    losses_of_replies,
    needs_logits,
    token_losses,
    with_few_targets,
)
from train_lora.micro_batches import Batch, DoesNotFit, micro_batches
from train_lora.plan import Plan
from train_lora.record import write_record
from train_lora.settings import Settings, examples_per_step
from train_lora.tokens import Example


class MicroBatchedTrainer(trl.SFTTrainer):
    """TRL's trainer with its own micro-batches, loss, order of the examples, and saving."""

    model: peft.PeftModel  # once TRL has put LoRA into it
    args: trl.SFTConfig

    def __init__(self, job: Job, **arguments: Any) -> None:
        """Prepare for a whole step at once, and for layers that can use checkpointing."""
        self.job = job
        steps_done = lambda: self.state.global_step  # noqa: E731
        self.sampler = SimilarLengthSampler(job.data.examples, job.settings, steps_done)
        self.micro_batches_of_step = 0  # of the one that was done last
        super().__init__(**arguments)
        self.model.activation_checkpointing_enable()
        self.model.disable_input_require_grads()  # recomputation does not need it
        kind = transformers.modeling_layers.GradientCheckpointingLayer
        self.layers = [module for module in self.model.modules() if isinstance(module, kind)]
        self.chunk = chunk_of(job.base.config)
        longest = max(len(example.input_ids) for example in job.data.examples)
        self.tokens_at_once = round_up(longest, self.chunk) * self.args.train_batch_size

    def training_step(self, model: nn.Module, inputs: Batch, *_: Any) -> Tensor:
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
                return self.backward_in_micro_batches(model, inputs, targets)
            except DoesNotFit as error:
                rows, width = error.args
            self.lower_tokens_at_once(rows, width)
            report("memory", f"out of memory: now {self.tokens_at_once:,} tokens at once")

    def backward_in_micro_batches(self, model: nn.Module, inputs: Batch, targets: Tensor) -> Tensor:
        """Add a step's gradients, and return its loss; raise DoesNotFit."""
        loss = torch.zeros((), device=self.args.device)
        batches = list(micro_batches(inputs, self.tokens_at_once, self.chunk))
        if needs_logits(model):
            batches = [batch for wide in batches for batch in with_few_targets(wide)]
        self.micro_batches_of_step = len(batches)
        for batch in batches:
            is_last = batch is batches[-1]  # only then do processes exchange gradients
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                loss += self.backward_if_it_fits(model, batch, targets)
        return loss

    def lower_tokens_at_once(self, rows: int, width: int) -> None:
        """Lower tokens_at_once after rows x width did not fit; raise UserError for a single row."""
        if rows == 1 and self.needs_checkpointing(width):  # a single example cannot be divided
            raise UserError(
                f"An example of {width:,} tokens does not fit in the GPU's memory: lower "
                "MAX_SEQ_LEN, or stop other programs on this GPU."
            )
        free_memory(self.model)
        self.tokens_at_once = int(0.9 * self.tokens_at_once) // self.chunk * self.chunk

    def needs_checkpointing(self, width: int) -> bool:
        """Return whether a row of this width is too long to keep its activations."""
        return round_up(width, self.chunk) > self.tokens_at_once

    def backward_if_it_fits(self, model: nn.Module, batch: Batch, targets: Tensor | int) -> Tensor:
        """Add a micro-batch's gradients, and return its share of the loss; raise DoesNotFit."""
        for layer in self.layers:
            layer.gradient_checkpointing = self.needs_checkpointing(batch["input_ids"].shape[1])
        try:
            loss = token_losses(model, batch).sum() / targets
            loss = loss * self.accelerator.num_processes  # DDP takes the mean over the processes
            loss.backward()
            return loss.detach()
        except RuntimeError as error:
            # Several processes must stop: the others would wait for this one's gradients.
            has_others = model is not self.model  # DDP is around it
            if has_others or not is_out_of_memory(error):
                raise
            LOG.info("memory    %s", one_line(error, 300))
        raise DoesNotFit(*batch["input_ids"].shape)  # torch's error and its tensors are gone

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

    def floating_point_ops(self, inputs: Batch) -> int:
        """Return 0; Trainer would walk through all modules at each step."""
        return 0

    def _get_train_sampler(self, train_dataset: Any = None) -> SimilarLengthSampler:
        """Return our order. Trainer's group_by_length has no seed, so it could not be resumed."""
        return self.sampler

    def _save(self, output_dir: str, state_dict: dict | None = None) -> None:
        """Save the adapter and its record; Trainer would add a pickle of its arguments."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir, save_embedding_layers=False)
            write_record(self.job, "running", Path(output_dir), self.state.global_step)

    def create_model_card(self, *_, **__) -> None:
        """Write none; TRL writes one per checkpoint."""


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
        activation_checkpointing=False,  # switched for each micro-batch, see memory.py
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
        router_aux_loss_coef=0.0,  # token_losses() has no such part, make_plan() says so
        **dict.fromkeys(["assistant_only_loss", "auto_find_batch_size", "eval_on_start"], False),
        **dict.fromkeys(["load_best_model_at_end", "use_liger_kernel"], False),
        **dict.fromkeys(["completion_only_loss", "data_seed", "eval_steps"], None),
        **dict.fromkeys(["save_total_limit", "torch_empty_cache_steps"], None),
        eval_strategy="no",  # RunEvents evaluates and saves, see events.py
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


def prepare_base(model: transformers.PreTrainedModel, job: Job) -> None:
    """Choose how a base's frozen weights are multiplied, and how its loss is computed."""
    if uses_fp16_matmul(job.base.request, job.base.config):
        try_fp16_matmul(model, job.data.examples)
        job.session.matmul = "float16"
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    with torch.no_grad():  # before any step, so that needs_logits() knows
        last_states(model, {"input_ids": ids, "labels": ids, "attention_mask": ids})


def complete_lora(trainer: MicroBatchedTrainer) -> None:
    """Complete LoRA's configuration, take the weights of START_FROM, and check what is trained."""
    job, settings = trainer.job, trainer.job.settings
    config = trainer.model.peft_config["default"]
    config.revision = job.base.commit or None  # of the base model
    if config.target_modules == {*settings.LORA_TARGET_MODULES}:  # a set's order varies
        config.target_modules = [*settings.LORA_TARGET_MODULES]
    if settings.START_FROM and not job.earlier.checkpoint:
        trainer.model.load_adapter(settings.START_FROM, "default", is_trainable=True)
        report("start", f"training begins with A and B of {settings.START_FROM}")
    check_only_lora_is_trained(trainer.model, job.plan)


class SimilarLengthSampler:
    """Gives each step examples of similar lengths, which need little padding, in a random order.

    The order depends only on seed, epoch, lengths and step size, so a resumed run keeps it.
    """

    def __init__(
        self, examples: list[Example], settings: Settings, steps_done: Callable[[], int]
    ) -> None:
        """Remember the lengths; steps_done() tells the epoch when a pass begins or is resumed."""
        self.lengths = [len(example.input_ids) for example in examples]
        self.size, self.seed = examples_per_step(settings), settings.SEED
        self.steps_done = steps_done

    def __len__(self) -> int:
        """Return the number of examples in an epoch."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield the examples' numbers, the incomplete step last (torchrun fills it with others)."""
        epoch = self.steps_done() // math.ceil(len(self.lengths) / self.size)
        shuffler = random.Random(f"{self.seed} {epoch}")
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
