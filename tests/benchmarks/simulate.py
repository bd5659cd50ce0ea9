"""Memory of training at Qwen3.5-4B's sizes: the real code on tensors without values.

memory     the longest example that fits, and the peak of a run, on several cards
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import types
import unittest.mock
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import accelerate
import peft
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks.common import (
    GIB,
    TRAIN,
    Options,
    prepared_job,
    quiet,
    qwen_folder,
    shipped_lines,
    t,
    table,
    write_lines,
)

# The memory that torch sees of the two V100s, and what CUDA itself takes of any card, about.
CARDS = {"32 GB": int(31.74 * GIB), "16 GB": int(15.77 * GIB)}
CUDA = GIB // 2
# Of others: a T4, and an RTX 3090 or 4090.
MORE_CARDS = {"24 GB": int(23.6 * GIB), "T4": int(14.74 * GIB)}
LONG = 8192  # tokens; no longer example is looked for


# ==== the part


def memory(options: Options) -> None:
    """Simulate the script's trial on cards, for examples of any length and for the shipped data."""
    job = simulated_job(options)
    simulation = Simulation(options.sizes, job.settings)
    steps = steps_of_epoch(job)
    longest, whole_step = t.most_tokens(job)
    weights = simulation.weight_bytes / GIB
    print(f"""\
MEMORY    simulated; the weights, LoRA's included, take {weights:.2f} GiB. One example alone, all of
its tokens learned, with its activations kept, or recomputed; and an epoch over the shipped data,
whose longest example has {longest:,} tokens: tokens at once, and the largest peak in GiB""")
    row = table(10, 10, 12, 15, 12, 12, 9)
    print(row("", "kept", "recomputed", "tokens: kept", "recomputed", "whole step", "peak"))
    cards = CARDS | MORE_CARDS
    for card in ["16 GB"] if options.tiny else cards:
        size = cards[card]
        if options.tiny:
            size = tiny_memory(size, simulation, job)
        alone = simulation.longest_examples(job, size, 128 if options.tiny else LONG)
        limits = simulation.limits(job, size)
        counts = [alone.tokens_at_once, alone.tokens_at_once_recomputed]
        counts += [limits.tokens_at_once, limits.tokens_at_once_recomputed, whole_step]
        peak = simulation.largest_peak(passes_of(steps, limits))
        fits = peak < size - CUDA
        options.targets.require(f"memory: an epoch's parts do not fit in {card}", fits)
        print(row(card, *[f"{count:,}" for count in counts], f"{peak / GIB:.1f}"), flush=True)
    row = table(24, 10, 12)
    print("\npeak of one example, 40 % of its tokens learned, in GiB")
    print(row("", "kept", "recomputed"))
    for width in (64,) if options.tiny else (512, 1024, 2048, 4096):
        one = Pass(1, width, round(0.4 * width))
        peaks = [simulation.peak(replace(one, is_recomputed=kind)) for kind in (False, True)]
        print(row(f"{width:,} tokens", *[f"{peak / GIB:.1f}" for peak in peaks]), flush=True)


# ==== an epoch as passes through the model


@dataclass(frozen=True)
class Pass:
    """One pass through the model, and all that its memory and time depend on."""

    rows: int
    width: int  # tokens of a row, padding included
    scored: int  # tokens whose logits are made: those that are learned
    is_recomputed: bool = False
    products: str = "native"  # of the frozen layers

    @classmethod
    def of(cls, inputs: dict[str, torch.Tensor], is_recomputed: bool = False) -> Pass:
        """Return a padded batch as a pass."""
        rows, width = inputs["input_ids"].shape
        learned = inputs["labels"][:, 1:] != -100
        return cls(rows, width, int(learned.sum()), is_recomputed)


def simulated_job(options: Options) -> t.Job:
    """Return the script's job for the shipped data and a model without weights."""
    lines = shipped_lines(TRAIN, 8 if options.tiny else None, shortest=options.tiny)
    path = write_lines(options.folder / "train.jsonl", lines)
    flags = ["--model_name", qwen_folder(options), "--train_file", str(path)]
    if options.tiny:
        flags += ["--eval_file", ""]
    return prepared_job(*flags)


def steps_of_epoch(job: t.Job) -> list[dict[str, torch.Tensor]]:
    """Return the padded steps of the first epoch, in the script's order."""
    order, size = list(t.LikeLengthsSampler(job)), t.examples_per_step(job.settings)
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return [t.pad([job.examples[number] for number in group], "cpu") for group in groups]


def passes_of(steps: list[dict[str, torch.Tensor]], limits: t.MemoryLimits) -> list[Pass]:
    """Return the passes that the script makes of steps."""
    return [Pass.of(*part) for step in steps for part in t.split_step(step, limits)]


def median_width(job: t.Job) -> int:
    """Return the median length of the training examples."""
    return round(statistics.median(len(example.input_ids) for example in job.examples))


def tiny_memory(size: int, simulation: Simulation, job: t.Job) -> int:
    """Return the memory of a card for a tiny model, so little that a step needs several parts."""
    widest, _ = t.most_tokens(job)
    return round(size / (10 * GIB) * simulation.peak(Pass(1, widest, widest - 1))) + CUDA


# ==== the simulation


class Simulation:
    """Qwen3.5 with LoRA on tensors that have a shape and no values.

    One block of layers (three of DeltaNet, one of attention) and two are simulated; the other
    blocks cost the same, to the byte.
    """

    def __init__(self, sizes: dict[str, Any], settings: Any) -> None:
        """Remember the sizes of the text model, and the settings of LoRA."""
        self.sizes, self.settings = sizes, settings
        self.depth: int = sizes["num_hidden_layers"]
        self.block: int = sizes["full_attention_interval"]
        for name in ("model", "peak"):  # both are asked for again and again
            setattr(self, name, functools.cache(getattr(self, name)))

    def model(self, layers: int, products: str = "native") -> peft.PeftModel:
        """Return a model with so many layers, on the device of tensors without values."""
        with torch.device("meta"):
            sizes = self.sizes | {"num_hidden_layers": layers}
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.Qwen3_5TextConfig(**sizes), dtype=torch.bfloat16
            )
            if products == "float16":  # the script looks at the weights' sums; here they are 0
                zero = {"item": lambda _: 0.0, "__bool__": lambda _: True}
                with quiet(), unittest.mock.patch.multiple(torch.Tensor, **zero):
                    t.use_float16_products(model)
            model = peft.get_peft_model(model, t.lora_config(self.settings)).train()
        model.activation_checkpointing_enable()
        return model

    def at_full_depth(self, measure: Callable[[Pass, int], Any], one: Pass | None) -> Any:
        """Return what a pass costs with all layers: each block of them adds the same."""
        first = measure(one, self.block)
        if self.depth == self.block:
            return first
        both = measure(one, 2 * self.block)
        return first + (self.depth // self.block - 1) * (both - first)

    @property
    def trainable(self) -> int:
        """The number of trained parameters."""

        def count(_: Any, layers: int) -> int:
            weights = self.model(layers).parameters()
            return sum(weight.numel() for weight in weights if weight.requires_grad)

        return self.at_full_depth(count, None)

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weights: bfloat16, but LoRA's in float32."""

        def count(_: Any, layers: int) -> int:
            return sum(weight.nbytes for weight in self.model(layers).parameters())

        return self.at_full_depth(count, None)

    def peak(self, one: Pass) -> int:
        """Return the most bytes alive: weights, gradients, AdamW's moments, the pass's own."""
        return self.at_full_depth(self.peak_with, one)

    def peak_with(self, one: Pass, layers: int) -> int:
        """Return the most bytes alive in a pass with so many layers."""
        model = self.model(layers, one.products)
        with torch.device("meta"):
            tensors = [*model.parameters()]
            for weight in [weight for weight in tensors if weight.requires_grad]:
                weight.grad = torch.zeros_like(weight)
                tensors += [weight.grad, torch.zeros_like(weight), torch.zeros_like(weight)]
            return most_alive(tensors, lambda: forward_and_backward(model, one))

    def largest_peak(self, passes: Iterable[Pass]) -> int:
        """Return the largest peak of passes: that of one of the largest, recomputed or not."""
        largest = 0
        for kind in (False, True):
            alike = {one for one in passes if one.is_recomputed is kind}
            by_size = sorted(alike, key=lambda one: (one.rows * one.width, one.scored))
            by_blocks = sorted(alike, key=lambda one: (one.rows * chunks(one.width), one.scored))
            largest = max([largest, *map(self.peak, {*by_size[-2:], *by_blocks[-2:]})])
        return largest

    def limits(self, job: t.Job, size: int, longest: int = 0) -> t.MemoryLimits:
        """Return what the script's own trial finds on a card with so much memory.

        Args:
            job: with its examples.
            size: the card's memory in bytes.
            longest: the tokens of the longest example, if they are not the job's.
        """
        most = (
            (longest, longest * t.examples_per_step(job.settings))
            if longest
            else t.most_tokens(job)
        )
        with (
            self.card(size) as trainer,
            unittest.mock.patch.object(t, "most_tokens", lambda _: most),
        ):
            t.find_what_fits(trainer, job)
        return job.token_limits

    def longest_examples(self, job: t.Job, size: int, longest: int) -> t.MemoryLimits:
        """Return how long a single example may be, kept or recomputed, by the same trial."""
        found: list[t.MemoryLimits] = []
        real = t.try_what_fits

        def try_long_ones(trainer: Any, *_: int) -> t.MemoryLimits:
            found.append(real(trainer, longest, longest))
            return t.MemoryLimits(longest, longest)  # so that the script does not refuse the card

        with (
            self.card(size) as trainer,
            unittest.mock.patch.object(t, "try_what_fits", try_long_ones),
        ):
            t.find_what_fits(trainer, job)
        return found[0]

    @contextlib.contextmanager
    def card(self, size: int) -> Iterator[Any]:
        """Yield a trainer on a GPU with so much memory, where simulated peaks decide what fits."""
        model = self.model(self.block)
        share: list[float] = []

        def loss_or_error(_: Any, inputs: dict[str, torch.Tensor], **__: Any) -> torch.Tensor:
            one = Pass.of(inputs, is_recomputed(model))
            # The gradients and AdamW's moments are not there yet when the script tries.
            if self.peak(one) - 12 * self.trainable > share[-1] * size:
                raise torch.OutOfMemoryError
            return torch.zeros((), requires_grad=True)

        weights = self.weight_bytes
        card = {
            "mem_get_info": lambda: (size - CUDA - weights, size),
            "memory_reserved": lambda: weights,
            "set_per_process_memory_fraction": share.append,
            "reset_peak_memory_stats": lambda: None,
        }
        arguments = types.SimpleNamespace(device="cpu")
        trainer = types.SimpleNamespace(model=model, compute_loss=loss_or_error, args=arguments)
        accelerate.PartialState(cpu=True)
        with unittest.mock.patch.multiple(torch.cuda, **card), quiet():
            yield trainer


def chunks(width: int) -> int:
    """Return the number of DeltaNet's chunks, which are padded to 64 tokens."""
    return math.ceil(width / 64)


def is_recomputed(model: torch.nn.Module) -> bool:
    """Return whether a model's layers compute their activations again."""
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    return layers[0].gradient_checkpointing


def forward_and_backward(model: peft.PeftModel, one: Pass) -> None:
    """Do a pass; one that scores nothing leaves out the vocabulary."""
    t.set_recomputation(model, one.is_recomputed)
    model.disable_input_require_grads()
    base, inputs = model.get_base_model(), inputs_of(one)
    # The math kernel is all that there is for bfloat16 on a V100.
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        if one.scored:
            out = script_loss(base, inputs, one)
        else:
            del inputs["labels"]
            out = base.model(**inputs, use_cache=False).last_hidden_state
        out.sum().backward()


def inputs_of(one: Pass, before: int = 0) -> dict[str, Any]:
    """Return a pass's inputs without values, after so many tokens that a cache holds."""
    ids = torch.empty(one.rows, one.width, dtype=torch.long, device="meta")
    full = ids.new_empty(one.rows, 1, one.width, before + one.width) > 0
    masks = {"linear_attention": None if before else ids, "full_attention": full}
    return {"input_ids": ids, "labels": ids, "attention_mask": masks}


def script_loss(model: torch.nn.Module, inputs: dict[str, Any], one: Pass) -> torch.Tensor:
    """Return the script's loss, where so many tokens are learned as the pass scores."""

    def places(*_: Any, as_tuple: bool) -> tuple[torch.Tensor, ...]:
        return torch.zeros(2, one.scored, dtype=torch.long, device="meta").unbind()

    with unittest.mock.patch.object(torch.Tensor, "nonzero", places):
        return t.reply_losses(model, inputs).sum()


def most_alive(tensors: list[torch.Tensor], run: Callable[[], None]) -> int:
    """Return the most bytes alive in run(), with those of tensors."""

    class Memory(TorchDispatchMode):
        """Counts the bytes of all storages that operations return, until they are freed."""

        now, most = 0, 0

        def __init__(self) -> None:
            super().__init__()
            self.alive: set[int] = set()

        def add(self, storage: Any) -> None:
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.alive.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.drop, key, size).atexit = False

        def drop(self, key: int, size: int) -> None:
            self.alive.discard(key)
            self.now -= size

        def __torch_dispatch__(
            self, function: Any, _: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.add(leaf.untyped_storage())
            return result

    with quiet(), Memory() as counted:
        for tensor in tensors:
            counted.add(tensor.untyped_storage())
        run()
    return counted.most
