"""Work and memory of training at Qwen3.5-4B's sizes: the real code on tensors without values.

flops      work of an epoch against the least possible, on cards of 32 and 16 GB, and TRL's
memory     the peak of a step, and how many tokens the script's trial lets through on a card
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
import statistics
import types
import unittest.mock
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

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
    with_lora,
    write_lines,
)

# The memory that torch sees of the two V100s, and what CUDA itself takes of it, about.
CARDS = {"32 GB": int(31.74 * GIB), "16 GB": int(15.77 * GIB)}
CUDA = GIB // 2
# What the version before this one needed: batches of two, by the same simulation.
BEFORE = {"32 GB": 1.014, "16 GB": 1.159}


# ==== the parts


def flops(options: Options) -> None:
    """Simulate an epoch over the training file, on two cards, and as TRL would do it."""
    job = simulated_job(options)
    simulation = Simulation(options.sizes, job.settings)
    steps = steps_of_epoch(job)
    alone = [Pass.of(t.pad([example], "cpu")) for example in job.train]
    tokens = sum(one.rows * one.width for one in alone)
    floor = simulation.work(alone)
    print(
        f"FLOPS     one epoch over the shipped data, {len(job.train):,} examples, {tokens:,} "
        f"tokens,\n          Qwen3.5's architecture with {simulation.depth} layers, simulated"
    )
    row = table(33, 8, 9, 9, 12, 9, 10, 26)
    heads = ("", "PFLOP", "x floor", "padding", "recomputed", "passes", "peak GiB", "")
    print(row(*heads))

    def show(name: str, passes: list[Pass], target: str = "") -> None:
        work = simulation.work(passes)
        padding = 1 - tokens / sum(one.rows * one.width for one in passes)
        recomputed = sum(one.is_recomputed for one in passes)
        cells = [f"{work / 1e15:.3g}", f"{work / floor:.3f}", f"{padding:.1%}", f"{recomputed:,}"]
        peak = simulation.largest_peak(passes) / GIB
        print(row(name, *cells, f"{len(passes):,}", f"{peak:.1f}", target), flush=True)

    show("the floor: one by one", alone)
    for card, memory in CARDS.items():
        if options.tiny:
            memory = tiny_memory(memory, simulation, job)
        limits = simulation.limits(job, memory)
        passes = passes_of(steps, limits)
        ratio = simulation.work(passes) / floor
        target = options.targets.at_most(f"flops: {card}, x floor", ratio, BEFORE[card])
        show(f"this script, {card}", passes, target)
        left = memory - CUDA - simulation.largest_peak(passes)
        options.targets.require(f"flops: an epoch's parts do not fit in {card}", left > 0)
    show(f"passes of {job.settings.BATCH_SIZE}, all kept", halves_of(steps, job))
    show(
        "this script, all recomputed", [replace(Pass.of(one), is_recomputed=True) for one in steps]
    )
    show("TRL's defaults", trl_passes(job))
    print("""\
FLOPs of matrix products, convolutions and triangular solutions, forward and backward, in the real
modeling code. In how many parts a step goes through, the script's own trial and split_step()
decide, by simulated peaks within the memory that CUDA leaves (it is assumed to take 0.5 GiB). The
peaks hold weights, gradients, AdamW's moments and logits, but not memory in pieces. TRL's:
random batches of 2, all recomputed, the embeddings' gradient computed, tokens scored by Triton's
kernels, and weights in bfloat16 like the others (float32 is its default).""")


def memory(options: Options) -> None:
    """Simulate the peaks of passes of the greatest length, and the script's trial on cards."""
    job = simulated_job(options)
    simulation = Simulation(options.sizes, job.settings)
    width = job.settings.MAX_SEQ_LEN
    learned = round(width * 200 / 512)  # of each row; the target is about 400 of 2 x 512
    print(f"MEMORY    peak of a pass with rows of {width} tokens, {learned} of each learned, GiB")
    row = table(33, 12, 12)
    print(row("", "kept", "recomputed"))
    for rows in (1, 2, 4):
        one = Pass(rows, width, rows * learned)
        peaks = [simulation.peak(replace(one, is_recomputed=kind)) for kind in (False, True)]
        print(row(f"{rows} x {width} tokens", *[f"{peak / GIB:.2f}" for peak in peaks]))
        if rows == 2:
            limit = options.targets.at_most("memory: 2 rows recomputed", peaks[1] / GIB, 9.5)
    print(f"2 rows recomputed: {limit}")
    weights = simulation.weight_bytes / GIB
    print(f"of which the weights, LoRA's included, {weights:.2f}")
    loss = simulation.peak_of_loss(Pass(2, width, 2 * learned)) / GIB
    print(f"the loss alone, 2 rows: {loss:.2f}")
    print("\nWhat the script's trial finds, for the shipped data, all tokens of a trial learned:")
    row = table(33, 12, 12, 16)
    print(row("tokens at once", "kept", "recomputed", "longest step"))
    _, most = t.most_tokens(job)
    for card, size in CARDS.items():
        if options.tiny:
            size = tiny_memory(size, simulation, job)
        limits = simulation.limits(job, size)
        counts = limits.tokens_at_once, limits.tokens_at_once_recomputed, most
        print(row(card, *(f"{count:,}" for count in counts)))


# ==== an epoch as passes through the model


@dataclass(frozen=True)
class Pass:
    """One pass through the model, and all that its work, memory and time depend on."""

    rows: int
    width: int  # tokens of a row, padding included
    scored: int  # tokens whose logits are made: those that are learned
    is_recomputed: bool = False
    is_trl: bool = False  # as TRL does it: the embeddings' gradient is computed, Triton's loss
    products: str = "native"  # of the frozen layers

    @classmethod
    def of(cls, inputs: dict[str, Any], is_recomputed: bool = False, is_trl: bool = False) -> Pass:
        """Return a padded batch as a pass."""
        rows, width = inputs["input_ids"].shape
        learned = inputs["labels"][:, 1:] != -100
        return cls(rows, width, int(learned.sum()), is_recomputed, is_trl)


def simulated_job(options: Options) -> t.Job:
    """Return the script's job for the shipped data and a model without weights."""
    lines = shipped_lines(TRAIN, 8 if options.tiny else None, shortest=options.tiny)
    path = write_lines(options.folder / "train.jsonl", lines)
    flags = ["--model_name", qwen_folder(options), "--train_file", str(path)]
    if options.tiny:
        flags += ["--eval_file", "", "--max_seq_len", "96"]
    return prepared_job(*flags)


def steps_of_epoch(job: t.Job) -> list[dict[str, Any]]:
    """Return the padded steps of the first epoch, in the script's order."""
    order, size = list(t.LikeLengthsSampler(job)), t.examples_per_step(job.settings)
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return [t.pad([job.train[number] for number in group], "cpu") for group in groups]


def passes_of(steps: list[dict[str, Any]], limits: t.MemoryLimits) -> list[Pass]:
    """Return the passes that the script makes of steps."""
    return [Pass.of(*part) for step in steps for part in t.split_step(step, limits)]


def halves_of(steps: list[dict[str, Any]], job: t.Job) -> list[Pass]:
    """Return the passes of BATCH_SIZE rows that an earlier version made of steps."""
    rows = job.settings.BATCH_SIZE
    passes = []
    for step in steps:
        for start in range(0, len(step["labels"]), rows):
            part = {key: value[start : start + rows] for key, value in step.items()}
            width = int(part["attention_mask"].sum(1).max())
            passes.append(Pass.of({key: value[:, :width] for key, value in part.items()}))
    return passes


def trl_passes(job: t.Job) -> list[Pass]:
    """Return an epoch's passes as TRL's defaults make them: random batches, all recomputed."""
    examples, size = list(job.train), job.settings.BATCH_SIZE
    random.Random(job.settings.SEED).shuffle(examples)
    batches = [examples[start : start + size] for start in range(0, len(examples), size)]
    return [Pass.of(t.pad(batch, "cpu"), is_recomputed=True, is_trl=True) for batch in batches]


def tiny_memory(memory: int, simulation: Simulation, job: t.Job) -> int:
    """Return the memory of a card for a tiny model, so little that a step needs several parts."""
    widest, _ = t.most_tokens(job)
    return round(memory / (10 * GIB) * simulation.peak(Pass(1, widest, widest - 1))) + CUDA


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
        for name in ("model", "flops", "peak", "formula"):  # all are asked for again and again
            setattr(self, name, functools.cache(getattr(self, name)))

    def model(self, layers: int, products: str = "native", is_trl: bool = False) -> tuple[Any, Any]:
        """Return a model with so many layers, and the context in which it computes.

        Meta tensors are quickest, but have no autocast, which TRL uses: fake tensors are for that.
        """
        import torch
        import transformers
        from torch._subclasses.fake_tensor import FakeTensorMode

        with torch.device("meta"):
            sizes = self.sizes | {"num_hidden_layers": layers}
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.Qwen3_5TextConfig(**sizes), dtype=torch.bfloat16
            )
            if products == "float16":  # the script looks at the weights' sums; here they are 0
                zero = {"item": lambda _: 0.0, "__bool__": lambda _: True}
                with quiet(), unittest.mock.patch.multiple(torch.Tensor, **zero):
                    t.use_float16_products(model)
            model = with_lora(model, self.settings)
        mode: Any = torch.device("meta")
        if is_trl:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            with mode:
                model.to_empty(device="cpu").get_base_model().tie_weights()
        model.activation_checkpointing_enable()
        return model, mode

    def model_of(self, one: Pass, layers: int) -> tuple[Any, Any]:
        """Return the model that a pass goes through, and its context."""
        return self.model(layers, one.products, one.is_trl)

    def at_full_depth(self, measure: Callable[[Pass, int], Any], one: Pass) -> Any:
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
            weights = self.model(layers)[0].parameters()
            return sum(weight.numel() for weight in weights if weight.requires_grad)

        return self.at_full_depth(count, None)

    @property
    def weight_bytes(self) -> int:
        """The bytes of all weights: bfloat16, but LoRA's in float32."""

        def count(_: Any, layers: int) -> int:
            return sum(weight.nbytes for weight in self.model(layers)[0].parameters())

        return self.at_full_depth(count, None)

    def flops(self, one: Pass) -> int:
        """Return the FLOPs of a pass: matrix products, convolutions, triangular solutions."""
        return self.at_full_depth(self.flops_with, one)

    def flops_with(self, one: Pass, layers: int) -> int:
        """Return the FLOPs of a pass with so many layers."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        solve = {torch.ops.aten.linalg_solve_triangular: triangular_flops}
        # TRL's loss asks for the device's autocast, the layers alone do not.
        is_trl = one.is_trl and one.scored > 0
        model, mode = self.model(layers, one.products, is_trl)
        with quiet(), mode, FlopCounterMode(display=False, custom_mapping=solve) as counter:
            forward_and_backward(model, one)
        return counter.get_total_flops()

    def work(self, passes: list[Pass]) -> float:
        """Return the FLOPs of many passes; those of the layers by a formula in the width."""
        return sum(
            one.rows * self.work_of_row(one) + self.work_of_score(one.is_trl) * one.scored
            for one in passes
        )

    def work_of_row(self, one: Pass) -> float:
        """Return the FLOPs of a row in the layers, without the vocabulary."""
        like = Pass(1, 0, 0, one.is_recomputed, one.is_trl)
        return float(self.formula(like).dot(terms(one.width)))

    def formula(self, like: Pass) -> Any:
        """Return the factors of terms(), found at four widths and checked at a fifth."""
        import numpy

        known = {width: self.flops(replace(like, width=width)) for width in (20, 70, 150, 230)}
        found = numpy.linalg.solve([terms(width) for width in known], list(known.values()))
        check = self.flops(replace(like, rows=2, width=330))
        assert math.isclose(2 * found.dot(terms(330)), check, rel_tol=1e-6)
        return found

    def work_of_score(self, is_trl: bool) -> float:
        """Return the FLOPs of a scored position: its products with the vocabulary."""
        one = Pass(1, 70, 50, is_trl=is_trl)
        return (self.flops(one) - self.flops(replace(one, scored=0))) / one.scored

    def peak(self, one: Pass) -> int:
        """Return the most bytes alive: weights, gradients, AdamW's moments, the pass's own."""
        return self.at_full_depth(self.peak_with, one)

    def peak_with(self, one: Pass, layers: int) -> int:
        """Return the most bytes alive in a pass with so many layers."""
        import torch

        model, mode = self.model_of(one, layers)
        with mode:
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

    def peak_of_loss(self, one: Pass) -> int:
        """Return the most bytes alive for the loss alone, forward and backward."""
        import torch

        with self.model(self.block)[1]:
            size = self.sizes["vocab_size"], self.sizes["hidden_size"]
            weight = torch.empty(size, dtype=torch.bfloat16)
            shape = one.rows, one.width, size[1]
            hidden = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)

            class OnlyHead(torch.nn.Module):
                """A model whose layers have done their work already."""

                def __init__(self) -> None:
                    super().__init__()
                    self.head = torch.nn.Linear(*reversed(size), bias=False, dtype=weight.dtype)
                    self.head.weight = torch.nn.Parameter(weight, requires_grad=False)

                def get_output_embeddings(self) -> torch.nn.Module:
                    return self.head

                def forward(self, **_: Any) -> types.SimpleNamespace:
                    return types.SimpleNamespace(logits=self.head(hidden))

            model = OnlyHead()
            labels = torch.empty(one.rows, one.width, dtype=torch.long)
            inputs = {"input_ids": labels, "labels": labels, "attention_mask": labels}
            most = most_alive([hidden, weight], lambda: script_loss(model, inputs, one).backward())
            return most - hidden.nbytes - weight.nbytes

    def limits(self, job: t.Job, memory: int) -> t.MemoryLimits:
        """Return what the script's own trial finds where simulated peaks decide what fits."""
        import accelerate
        import torch

        model, _ = self.model(self.block)
        share: list[float] = []

        def loss_or_error(_: Any, inputs: dict[str, Any], **__: Any) -> Any:
            one = Pass.of(inputs, is_recomputed(model))
            # The gradients and AdamW's moments are not there yet when the script tries.
            if self.peak(one) - 12 * self.trainable > share[-1] * memory:
                raise torch.OutOfMemoryError
            return torch.zeros((), requires_grad=True)

        weights = self.weight_bytes
        card = {
            "mem_get_info": lambda: (memory - CUDA - weights, memory),
            "memory_reserved": lambda: weights,
            "set_per_process_memory_fraction": share.append,
            "reset_peak_memory_stats": lambda: None,
        }
        arguments = types.SimpleNamespace(device="cpu")
        trainer = types.SimpleNamespace(model=model, compute_loss=loss_or_error, args=arguments)
        accelerate.PartialState(cpu=True)
        job.settings.DEVICE = "cuda"
        with unittest.mock.patch.multiple(torch.cuda, **card), quiet():
            t.find_what_fits(trainer, job)
        return job.token_limits


def triangular_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of solving a triangular system."""
    return math.prod(b) * a[-1]


def chunks(width: int) -> int:
    """Return the number of DeltaNet's chunks, which are padded to 64 tokens."""
    return math.ceil(width / 64)


def terms(width: int) -> list[int]:
    """Return what the work of a row is a sum of."""
    return [1, width, width**2, chunks(width)]


def is_recomputed(model: Any) -> bool:
    """Return whether a model's layers compute their activations again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    return layers[0].gradient_checkpointing


def forward_and_backward(model: Any, one: Pass, autocast: bool = False) -> None:
    """Do a pass; one that scores nothing leaves out the vocabulary."""
    import torch
    import trl.kernels.chunked_logprob as kernels
    from torch.nn.attention import SDPBackend, sdpa_kernel

    t.set_recomputation(model, one.is_recomputed)
    model.disable_input_require_grads()  # first, as it undoes only the last call of the other
    if one.is_trl:
        model.enable_input_require_grads()
    ids = torch.empty(one.rows, one.width, dtype=torch.long)
    full = ids.new_empty(one.rows, 1, one.width, one.width) > 0
    masks = {"linear_attention": ids, "full_attention": full}
    inputs = {"input_ids": ids, "attention_mask": masks}
    base = model.get_base_model()
    # TRL's folds are Triton's on a GPU, which need no other memory.
    folds = dict.fromkeys(("_forward_tile", "_backward_tile"), lambda *_, **__: None)
    # A GPU adds the product in place, without float32 copies of tile and weights.
    folds["_addmm_fp32"] = lambda total, a, b: total.add_(torch.mm(a, b))
    with contextlib.ExitStack() as stack:
        # The math kernel is all that there is for bfloat16 on a V100.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(unittest.mock.patch.multiple(kernels, **folds))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if one.scored and not one.is_trl:
                out = script_loss(base, inputs | {"labels": ids}, one)
            else:
                out = base.model(**inputs, use_cache=False).last_hidden_state
            if one.scored and one.is_trl:
                out = trl_loss(out, base.get_output_embeddings().weight, one)
        out.sum().backward()


def script_loss(model: Any, inputs: dict[str, Any], one: Pass) -> Any:
    """Return the script's loss, where so many tokens are learned as the pass scores."""
    import torch

    def places(*_: Any, as_tuple: bool) -> Any:
        return torch.zeros(2, one.scored, dtype=torch.long).unbind()

    with unittest.mock.patch.object(torch.Tensor, "nonzero", places):
        return t.reply_losses(model, inputs).sum()


def trl_loss(hidden: Any, weight: Any, one: Pass) -> Any:
    """Return the loss of a pass's learned tokens, as TRL's model computes it on a GPU."""
    import trl.kernels.chunked_logprob as kernels

    rows = hidden.flatten(0, 1)[: one.scored].clone()
    rest = (None, rows[:, 0].long(), 1, 32768, None, 1, ("log_probs", "entropy", "is_top1"))
    return -kernels.ChunkedLogProbFunction.apply(rows, weight, *rest)[0].sum()


def most_alive(tensors: list[Any], run: Callable[[], None]) -> int:
    """Return the most bytes alive in run(), with those of tensors."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

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


def median_width(job: t.Job) -> int:
    """Return the median length of the training examples."""
    return round(statistics.median(len(example.input_ids) for example in job.train))
