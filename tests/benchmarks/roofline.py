"""A V100 on paper, op by op: v100 prints milliseconds and kernels of a step, and minutes of a run.

Each operation takes the longest of its launches, its bytes and its FLOPs, at the rates below.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import unittest.mock
from collections.abc import Iterator
from typing import Any

import numpy
import torch
import torch.nn.modules.module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.common import Options, quiet, t, table
from benchmarks.simulate import (
    CARDS,
    Pass,
    Simulation,
    chunks,
    forward_and_backward,
    median_width,
    passes_of,
    simulated_job,
    steps_of_epoch,
)

BYTES_A_SECOND = 800e9  # of the data sheet's 900; assumed
LAUNCHES_AT = (6e-6, 13e-6)  # seconds a kernel: the usual one, and what this code was seen to need
# A small triangular matrix is solved row by row, and each row waits for the one before. A V100's
# time for that was not found anywhere; with 2 us a batch of 64 x 64 takes 0.13 ms. Assumed.
SECONDS_A_SOLVED_ROW = 2e-6
FLOPS_A_SECOND = {"bfloat16": 9.6e12, "float32": 13e12, "float16": 80e12}
WAYS = {"bf16": "native", "fp16": "float16"}  # kinds of products, by their names in the tables
# A step of this many learned tokens of so many is what the targets are about, in milliseconds.
MEDIAN, LEARNED, OF = 129, 111, 258
LENGTHS = (128, 256, 512, 1024, 1536)  # of examples, for the last table
LONG = (2048, 4096, 6144)  # of examples that go alone, and are recomputed
TARGETS = {6e-6: 350, 13e-6: 394}

# By name: what no kernel does, what one operation launches beyond one, what is written but not
# read, and what reads of its input no more than it writes.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NO_KERNEL |= {"_unsafe_view", "_local_scalar_dense"}
LAUNCHES = {"slice_backward": 2, "select_backward": 2, "constant_pad_nd": 2}
LAUNCHES |= {"linalg_solve_triangular": 2, "_safe_softmax": 4}
WRITES = {"copy_", "fill_", "zero_", "bernoulli_"}
PICKS = {"embedding", "gather", "index", "index_select"}
KINDS = [
    "frozen layers: products", "frozen layers: scaling, sums", "LoRA: products", "LoRA: casts",
    "LoRA: dropout, scale, add", "attention", "DeltaNet", "norms, activations, residuals",
    "casts of these three", "loss", "embedding, positions, masks",
]  # fmt: skip


# ==== the part


def v100(options: Options) -> None:
    """Print the roofline of a step of median length, and what it says of all epochs."""
    job = simulated_job(options)
    roofline = Roofline(Simulation(options.sizes, job.settings))
    steps = steps_of_epoch(job)
    size = t.examples_per_step(job.settings)
    print(f"""\
V100      a step of {size} examples, forward and backward, ON PAPER: measured nowhere
Each operation takes the longest of its launches ({and_list(LAUNCHES_AT, 1e6)} us a kernel: usual
for PyTorch; what Python, autograd and PEFT were seen to need), its bytes at \
{BYTES_A_SECOND / 1e9:.0f} GB/s (of the data
sheet's 900; assumed), and its FLOPs at {and_list(FLOPS_A_SECOND.values(), 1e-12)} TFLOP/s for \
bfloat16, float32 and float16 (mlxcel
issue 1654: cuBLAS on a V100 has 9.6, 14 and 95 to 100); a triangular solve at least \
{SECONDS_A_SOLVED_ROW * 1e6:g} us
for each row of its matrix (assumed). bf16: with bfloat16 products, fp16: with
scaled float16 ones; both in one pass that keeps its activations, as fits in 32 GB. Views cost
nothing. Not counted: the optimizer, clipping, copies between host and GPU, memory management,
evaluation, the trials at the start, and any wait for Python beyond the launches.""")
    share = job.data["train"]["learned_tokens"] / job.data["train"]["tokens"]
    shown = {MEDIAN: LEARNED / OF} | ({} if options.tiny else {median_width(job): share})
    for width, learned_share in shown.items():
        show_step(roofline, width, learned_share, options)
    limits = t.MemoryLimits(*[t.most_tokens(job)[1]] * 2)
    for card, memory in CARDS.items():
        if not options.tiny:
            limits = roofline.simulation.limits(job, memory)
        show_minutes(roofline, job, passes_of(steps, limits), card)
    if not options.tiny:
        show_lengths(roofline, job)


def show_step(roofline: Roofline, width: int, learned_share: float, options: Options) -> None:
    """Print the table of a step whose rows are so wide, and check the targets at 129 tokens."""
    size = t.examples_per_step(roofline.simulation.settings)
    learned = round(size * width * learned_share)
    costs = {
        name: roofline.costs(Pass(size, width, learned, products=products))
        for name, products in WAYS.items()
    }
    print(
        f"\n{size} x {width} tokens, {learned} of them learned; ms at so many microseconds a launch"
    )
    row = table(32, *[9, 9, 9] * len(costs))
    heads = [(f"{name} {LAUNCHES_AT[0] * 1e6:g}", f"{LAUNCHES_AT[1] * 1e6:g}") for name in costs]
    print(row("", *itertools.chain(*[(*head, "kernels") for head in heads])))
    for number, kind in enumerate([*KINDS, "all"]):
        cells = []
        for found in costs.values():
            *seconds, kernels = found.sum(0) if kind == "all" else found[number]
            cells += [f"{1000 * one:.1f}" for one in seconds] + [f"{kernels:,.0f}"]
        print(row(kind, *cells))
    for number, launch in enumerate(LAUNCHES_AT):
        bf16, fp16 = (1000 * found.sum(0)[number] for found in costs.values())
        text = f"fp16 at {launch * 1e6:g} us: {fp16:.0f} ms, {fp16 / bf16:.3f} of bf16's"
        if width == MEDIAN:
            name = f"v100: milliseconds at {launch * 1e6:g} us"
            text += "   " + options.targets.at_most(name, fp16, TARGETS[launch])
        print(text, flush=True)


def show_minutes(roofline: Roofline, job: t.Job, passes: list[Pass], card: str) -> None:
    """Print the minutes of all epochs on a card, and of a million tokens."""
    epochs, tokens = job.settings.NUM_EPOCHS, job.data["train"]["tokens"]
    sizes = ", ".join(
        f"{sum(one.rows == rows for one in passes)} of {rows} rows"
        for rows in sorted({one.rows for one in passes}, reverse=True)
    )
    print(f"\n{epochs} epochs over the shipped data on {card}; an epoch has passes: {sizes}")
    row = table(10, 9, 9, 22, 9)
    launches = [f"{launch * 1e6:g} us" for launch in LAUNCHES_AT]
    print(row("minutes", *launches, f"a million: {launches[0]}", launches[1]))
    for name, products in WAYS.items():
        seconds = sum(
            roofline.seconds(dataclasses.replace(one, products=products)) for one in passes
        )
        cells = [*(epochs * seconds / 60), *(seconds / 60 * 1e6 / tokens)]
        print(row(name, *[f"{one:.1f}" for one in cells]), flush=True)


def show_lengths(roofline: Roofline, job: t.Job) -> None:
    """Print the minutes of a million tokens where all examples have the same length."""
    size = t.examples_per_step(job.settings)
    print("\nminutes of a million tokens with scaled float16 products, 40 % of them learned")
    row = table(22, *[9, 9, 19] * len(CARDS))
    heads = [
        (f"{card}: {LAUNCHES_AT[0] * 1e6:g}", f"{LAUNCHES_AT[1] * 1e6:g} us") for card in CARDS
    ]
    print(row("", *itertools.chain(*[(*head, "passes of a step") for head in heads])))
    for width in LENGTHS:
        labels = torch.full((size, width), 0)
        labels[:, : round(0.6 * width)] = -100
        step = {"input_ids": labels, "labels": labels, "attention_mask": torch.ones_like(labels)}
        cells = []
        for memory in CARDS.values():
            passes = passes_of([step], roofline.simulation.limits(job, memory, longest=width))
            half = [dataclasses.replace(one, products="float16") for one in passes]
            seconds = sum(map(roofline.seconds, half))
            cells += [f"{one:.1f}" for one in seconds / 60 * 1e6 / (size * width)]
            how = "recomputed" if passes[0].is_recomputed else "kept"
            cells.append(f"{len(passes)}, {how}")
        print(row(f"examples of {width:,}", *cells), flush=True)
    print("\nthe same where each example goes alone and is recomputed, as on 32 GB")
    for width in LONG:
        one = Pass(1, width, round(0.4 * width), is_recomputed=True, products="float16")
        cells = [f"{minutes:.1f}" for minutes in roofline.seconds(one) / 60 * 1e6 / width]
        print(row(f"examples of {width:,}", *cells, *[""] * (3 * len(CARDS) - 2)), flush=True)


def and_list(numbers: Any, factor: float) -> str:
    """Return numbers as a person would list them, each times a factor."""
    *others, last = [f"{number * factor:g}" for number in numbers]
    return f"{', '.join(others)} and {last}"


# ==== what a pass costs


class Roofline:
    """What passes of a simulated model cost on a V100."""

    def __init__(self, simulation: Simulation) -> None:
        """Remember the simulation; what was asked for once is not computed again."""
        self.simulation = simulation
        for name in ("costs", "costs_with", "seconds_of_loss"):
            setattr(self, name, functools.cache(getattr(self, name)))

    def costs(self, one: Pass) -> Any:
        """Return kinds x (seconds for each time of a launch, kernels) of a pass."""
        return self.simulation.at_full_depth(self.costs_with, one)

    def costs_with(self, one: Pass, layers: int) -> Any:
        """Return what a pass costs with so many layers."""
        model = self.simulation.model(layers, one.products)
        model.zero_grad()  # each parameter takes its gradient as it is, whatever was done before
        with counting(model) as found, quiet():
            forward_and_backward(model, one)
        return found

    def seconds_of_loss(self, one: Pass) -> Any:
        """Return the seconds of the loss alone, which the number of layers does not change."""
        block = self.simulation.block
        without = dataclasses.replace(one, scored=0)
        return (self.costs_with(one, block) - self.costs_with(without, block))[:, :-1].sum(0)

    def seconds(self, one: Pass) -> Any:
        """Return the seconds of a pass for each time of a launch.

        Between the ends of DeltaNet's chunks of 64 tokens, and between numbers of scored positions,
        the time is taken to be linear.
        """
        last = 64 * chunks(one.width)
        layers = [
            self.costs(dataclasses.replace(one, width=end, scored=0))[:, :-1].sum(0)
            for end in (last - 63, last)
        ]
        share = (one.width - (last - 63)) / 63
        known = [one.rows * positions for positions in (8, 32, 128, 512)]
        few, many = next(
            pair
            for pair in itertools.pairwise(known)
            if one.scored <= pair[1] or pair[1] == known[-1]
        )
        like = dataclasses.replace(one, width=512)
        losses = [self.seconds_of_loss(dataclasses.replace(like, scored=n)) for n in (few, many)]
        part = (one.scored - few) / (many - few)
        return (
            (1 - share) * layers[0] + share * layers[1] + (1 - part) * losses[0] + part * losses[1]
        )


def cost(function: Any, arguments: tuple[Any, Any], result: Any) -> tuple[float, int, bool]:
    """Return seconds without launches, kernels, and whether it is a product, of one operation."""

    def unique(tree: Any) -> list[Any]:
        found = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
        return [*found.values()]

    packet = function.overloadpacket
    name = packet.__name__
    if function.namespace != "aten" or function.is_view or name in NO_KERNEL:
        return 0.0, 0, False
    read, written, flops, waits = unique(arguments), unique(result), 0, 0.0
    dtype = str(read[0].dtype).removeprefix("torch.") if read else ""
    if packet in flop_registry:
        flops = flop_registry[packet](*arguments[0], **arguments[1], out_val=result)
    elif name == "linalg_solve_triangular":
        a, b = arguments[0][:2]
        flops = b.numel() * a.shape[-1]
        waits = a.shape[-1] * SECONDS_A_SOLVED_ROW
    if name in WRITES or function._overloadname == "out":
        read = [tensor for tensor in read if not any(tensor is other for other in written)]
    moved = 2 * sum(map(size_of, written)) if name in PICKS else sum(map(size_of, read + written))
    seconds = max(moved / BYTES_A_SECOND, waits)
    if flops:
        seconds = max(seconds, flops / FLOPS_A_SECOND[dtype])
    return seconds, LAUNCHES.get(name, 1), flops > 0


def size_of(tensor: Any) -> int:
    """Return a tensor's bytes; what is expanded is there only once."""
    numbers = zip(tensor.shape, tensor.stride(), strict=True)
    size = tensor.itemsize
    for length, stride in numbers:
        size *= length if stride else 1
    return size


# ==== whose an operation is


@contextlib.contextmanager
def counting(model: Any) -> Iterator[Any]:
    """Yield an array of kinds x (seconds for each time of a launch, kernels), filled within.

    Whose an operation is, the module says in which it is done, and in the backward pass the mark
    that the forward one has left on the node of the graph.
    """
    whose, inside = sources(model), []
    found = numpy.zeros((len(KINDS), len(LAUNCHES_AT) + 1))

    def mark(tree: Any) -> None:
        leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        nodes = [leaf.grad_fn for leaf in leaves]
        while nodes:
            node = nodes.pop()
            if node is not None and "source" not in node.metadata:
                node.metadata["source"] = inside[-1] if inside else "loss"
                nodes += [other for other, _ in node.next_functions]

    class Marks(TorchFunctionMode):
        """Marks the nodes of the graph with the module that made them."""

        def __torch_function__(
            self, function: Any, _: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            mark(result)
            return result

    class Costs(TorchDispatchMode):
        """Adds up what operations cost."""

        def __torch_dispatch__(
            self, function: Any, _: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            seconds, kernels, is_product = cost(function, (args, kwargs or {}), result)
            if kernels:
                node = torch._C._current_autograd_node()
                source = inside[-1] if inside else node.metadata["source"] if node else "loss"
                kind = kind_of(source, function.overloadpacket.__name__, is_product)
                times = [max(kernels * launch, seconds) for launch in LAUNCHES_AT]
                found[KINDS.index(kind)] += (*times, kernels)
            return result

    def enter(module: Any, _: Any) -> None:
        inside.append(whose.get(module, inside[-1] if inside else "loss"))

    def leave(_: Any, __: Any, result: Any) -> None:
        mark(result)
        inside.pop()

    def drop_out(rows: Any, share: float, training: bool, inplace: bool) -> Any:
        if not training:
            return rows
        return torch.native_dropout(rows, share, training)[0]  # of a GPU: one kernel

    with contextlib.ExitStack() as stack:
        entered = hooks.register_module_forward_pre_hook(enter)
        # Recomputation ends by an exception: always_call.
        left = hooks.register_module_forward_hook(leave, always_call=True)
        for handle in (entered, left):
            stack.callback(handle.remove)
        stack.enter_context(unittest.mock.patch("torch.nn.functional.dropout", drop_out))
        stack.enter_context(Costs())
        stack.enter_context(Marks())
        yield found
    assert not inside


def sources(model: Any) -> dict[Any, str]:
    """Return what the operations that each module does itself are counted as."""
    found = {}
    for name, module in model.named_modules():
        kind = "embedding, positions, masks"
        if "lora_" in name or hasattr(module, "lora_A"):
            kind = "LoRA"
        elif isinstance(module, torch.nn.Linear):
            kind = "frozen layers"
        elif ".layers." in name or name.endswith(".norm"):
            kind = "norms, activations, residuals"
            if "Norm" not in type(module).__name__:
                places = {".linear_attn": "DeltaNet", ".self_attn": "attention"}
                kind = next((places[place] for place in places if place in name), kind)
        found[module] = kind
    return found


def kind_of(source: str, name: str, is_product: bool) -> str:
    """Return the kind of an operation by whose it is and what it is."""
    if name == "_to_copy" and source not in ("loss", "embedding, positions, masks"):
        if source == "frozen layers":
            return "frozen layers: scaling, sums"
        return "LoRA: casts" if source == "LoRA" else "casts of these three"
    if source in ("frozen layers", "LoRA"):
        other = {"frozen layers": "scaling, sums", "LoRA": "dropout, scale, add"}[source]
        return f"{source}: {'products' if is_product else other}"
    return source
