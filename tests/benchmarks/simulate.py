"""Memory of training at Qwen3.5-4B's sizes: the real code on tensors without values.

memory     the longest example that fits, and the peak of a run, on several cards
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import random
import statistics
import types
import unittest.mock
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import accelerate
import numpy
import peft
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3_5 import modeling_qwen3_5

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
# An A100 of either size, or an H100, as messages of torch give their memory; fla is used there.
NEWER_CARDS = {"40 GB": int(39.38 * GIB), "80 GB": int(79.10 * GIB)}
LONG = 8192  # tokens; no longer example is looked for
QUICK_CHUNKS = 23  # up to so many a row, the peaks of many passes are computed from a few


# ==== the part


def memory(options: Options) -> None:
    """Simulate the script's trial on cards, for examples of any length and for the shipped data."""
    job = simulated_job(options)
    # Nothing before the first DeltaNet layer is trained, so its activations are not kept.
    sizes = options.sizes | ({"num_hidden_layers": 4} if options.tiny else {})
    simulation = Simulation(sizes, job.settings)
    steps = steps_of_epoch(job)
    longest, whole_step = t.most_tokens(job)
    weights = simulation.weight_bytes / GIB
    print(f"""\
MEMORY    simulated; the allocator and CUDA's libraries are not in it. The weights, LoRA's included,
take {weights:.2f} GiB. One example alone, all of its tokens targets, with its activations kept, or
recomputed; and an epoch over the shipped data, whose longest example has {longest:,} tokens: tokens
at once, and the largest peak in GiB""")
    row = table(12, 10, 12, 15, 12, 12, 9)
    print(row("", "kept", "recomputed", "tokens: kept", "recomputed", "whole step", "peak"))
    cards = [(card, size, "torch") for card, size in (CARDS | MORE_CARDS).items()]
    cards += [(f"{card}, fla", size, "fla") for card, size in NEWER_CARDS.items()]
    if options.tiny:
        cards = [("16 GB", tiny_memory(CARDS["16 GB"], simulation, longest), "torch")]
    for card, size, deltanet in cards:
        alone = simulation.longest_examples(job, size, 256 if options.tiny else LONG, deltanet)
        limits = simulation.limits(job, size, deltanet=deltanet)
        counts = [alone.tokens_at_once, alone.tokens_at_once_recomputed]
        counts += [limits.tokens_at_once, limits.tokens_at_once_recomputed, whole_step]
        peak = simulation.largest_peak(passes_of(steps, limits, deltanet))
        fits = peak < size - CUDA
        options.targets.require(f"memory: an epoch's parts do not fit in {card}", fits)
        print(row(card, *[f"{count:,}" for count in counts], f"{peak / GIB:.1f}"), flush=True)
    row = table(24, 10, 12)
    print("\npeak of one example, 40 % of its tokens targets, in GiB")
    print(row("", "kept", "recomputed"))
    widths = (64,) if options.tiny else (512, 1024, 2048, 4096)
    for width, deltanet in itertools.product(widths, ("torch", "fla")):
        one = Pass(1, width, round(0.4 * width), deltanet=deltanet)
        peaks = [simulation.peak(replace(one, is_recomputed=kind)) for kind in (False, True)]
        name = f"{width:,} tokens, {deltanet}"
        print(row(name, *[f"{peak / GIB:.1f}" for peak in peaks]), flush=True)
    compare_with_trials(options, simulation, job)


# ==== steps of every kind against the trial


@dataclass(frozen=True)
class Mix:
    """A kind of examples, how many a step has, and how many of their tokens are targets."""

    kind: str  # of KINDS
    examples: int
    targets: str  # "all" or "a third"

    def lengths(self, count: int) -> list[int]:
        """Return made-up lengths of so many examples."""
        drawn = random.Random(f"{self.kind} {self.examples}")
        found = []
        for _ in range(count):
            middle, least, most = LENGTHS_OF[drawn.choice(KINDS[self.kind])]
            length = round(min(max(drawn.lognormvariate(math.log(middle), 0.5), least), most))
            nearest = min(CHUNKS, key=lambda one, length=length: abs(one - chunks(length)))
            found.append(64 * (nearest - 1) + (length - 1) % 64 + 1)
        return found

    def steps(self, count: int) -> list[Any]:
        """Return so many padded steps, in the script's order."""
        job = types.SimpleNamespace(
            examples=[], settings=t.parse_settings(["--batch_size", str(self.examples)])
        )
        job.settings.GRADIENT_ACCUMULATION_STEPS = 1
        for length in self.lengths(count * self.examples):
            reply = length - 1 if self.targets == "all" else length // 3
            ids = [5] * (length - reply), [6] * reply
            job.examples.append(t.Example("", [], prompt_ids=ids[0], reply_ids=ids[1]))
        return steps_of_epoch(job)


LENGTHS_OF = {"tiny": (40, 16, 120), "short": (75, 16, 190), "long": (400, 150, 960)}
KINDS = {  # which of these lengths they have: the middle, the least, the most
    "tiny chats": ("tiny",),
    "short chats": ("short",),
    "long dialogues": ("long",),
    "both mixed": ("short", "long"),
}
MIXES = [Mix(*one) for one in itertools.product([*KINDS][1:], (4, 16, 64), ("all", "a third"))]
# Each number of chunks takes a simulation of its own, so not all of them occur.
CHUNKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15)
STEPS = 10_000  # of all mixes together
ALLOWED = {"peak": 1.0, "timid": 0.9, "micro-batches": 1.05}


def compare_with_trials(options: Options, simulation: Simulation, job: t.Job) -> None:
    """Compare the peaks of many steps with the trial's, and their parts with the fewest possible.

    The largest peak of a mix may not be above the trial's, and in one mix of each card it must come
    near, or the trial is timid.
    """
    steps = steps_of_mixes(options)
    count = sum(map(len, steps.values()))
    print(f"""
{count:,} seeded steps: the largest peak of their parts over the trial's, and over what the trial
adds to the weights; and passes, over the fewest that a search finds within its memory""")
    print(COMPARED("", "peak", "added", "passes", "kept", "recomputed"))
    cards = ("16 GB",) if options.tiny else ("16 GB", "24 GB", "32 GB")
    for card, deltanet in itertools.product(cards, ("torch", "fla")):
        compare_on_card(options, simulation, job, card, deltanet, steps)


COMPARED = table(52, 9, 9, 9, 10, 12)


def steps_of_mixes(options: Options) -> dict[Mix, list[dict[str, torch.Tensor]]]:
    """Return the steps of all mixes; for tiny sizes a few of one."""
    mixes = [Mix("tiny chats", 64, "all")] if options.tiny else MIXES
    return {mix: mix.steps(4 if options.tiny else math.ceil(STEPS / len(mixes))) for mix in mixes}


def compare_on_card(
    options: Options,
    simulation: Simulation,
    job: t.Job,
    card: str,
    deltanet: str,
    steps: dict[Mix, list[dict[str, torch.Tensor]]],
) -> None:
    """Print how the steps of each mix, and those of the shipped data, compare on a card."""
    name = f"{card}, {'rows padded to 64' if deltanet == 'torch' else 'fla'}"
    highest = 0.0
    for mix, of_mix in steps.items():
        mixed = types.SimpleNamespace(settings=job.settings, plan=job.plan)
        longest = max(int(step["attention_mask"].sum(1).max()) for step in of_mix)
        size = (CARDS | MORE_CARDS)[card]
        if options.tiny:
            size = tiny_memory(size, simulation, longest)
        most = longest, t.whole_chunks(longest) * mix.examples
        found = against_trial(simulation, mixed, most, size, deltanet, of_mix)
        show(options, f"{name}, {mix.kind}, {mix.examples}, {mix.targets}", found)
        highest = max(highest, found.peak)
    options.targets.require(
        f"memory: the trial is timid on {name}: {highest:.3f}", highest >= ALLOWED["timid"]
    )
    if not options.tiny:
        most, of_epoch = t.most_tokens(job), steps_of_epoch(job)
        found = against_trial(simulation, job, most, size, deltanet, of_epoch)
        show(options, f"{name}, the shipped data", found)


@dataclass
class Against:
    """How steps compare with the trial."""

    peak: float  # the largest over the trial's
    added: float  # the same without what is there before the pass
    passes: float  # over the fewest
    limits: t.MemoryLimits


def show(options: Options, name: str, found: Against) -> None:
    """Print a comparison, and note what it misses."""
    limits = found.limits
    shown = [f"{one:.4f}" for one in (found.peak, found.added, found.passes)]
    shown += [f"{one:,}" for one in (limits.tokens_at_once, limits.tokens_at_once_recomputed)]
    print(COMPARED(name, *shown), flush=True)
    options.targets.require(
        f"memory: {name}: a peak is {found.peak:.4f} of the trial's", found.peak <= ALLOWED["peak"]
    )
    options.targets.at_most(f"memory: passes, {name}", found.passes, ALLOWED["micro-batches"])


def against_trial(
    simulation: Simulation,
    job: Any,
    most: tuple[int, int],
    size: int,
    deltanet: str,
    steps: list[dict[str, torch.Tensor]],
) -> Against:
    """Compare steps with the trial on a card of so many bytes."""
    with (
        simulation.card(size, deltanet) as trainer,
        unittest.mock.patch.object(t, "most_tokens", lambda _: most),
        unittest.mock.patch.object(t, "examples_per_step", lambda _: len(steps[0]["input_ids"])),
    ):
        t.find_what_fits(trainer, job)
    limits = job.token_limits
    budgets = {}
    tried = {False: limits.tokens_at_once}
    if limits.tokens_at_once < t.whole_chunks(most[0]):  # so recomputation was tried, too
        tried[True] = limits.tokens_at_once_recomputed
    for kind, tokens in tried.items():
        if tokens:
            rows, width = t.hardest_shape(tokens, most[0])
            trial = Pass(rows, width, rows * (width - 1), kind, deltanet=deltanet)
            budgets[kind] = simulation.quick_peak(trial)
    passes = passes_of(steps, limits, deltanet)
    alike = [*{*passes}]
    peaks = simulation.peaks(alike)
    before = simulation.weight_bytes + 12 * simulation.trainable
    # Without a trial of its own recomputation has the limit of kept activations.
    allowed = [budgets.get(one.is_recomputed, budgets.get(False)) for one in alike]
    over = [
        (peak / budget, (peak - before) / (budget - before))
        for budget, peak in zip(allowed, peaks, strict=True)
    ]
    most = {False: 2 * limits.tokens_at_once, True: 2 * limits.tokens_at_once_recomputed}
    fewest = fewest_passes(simulation, steps, budgets, deltanet, most)
    return Against(*map(max, zip(*over, strict=True)), len(passes) / fewest, limits)


def fewest_passes(
    simulation: Simulation,
    steps: list[dict[str, torch.Tensor]],
    budgets: dict[bool, float],
    deltanet: str,
    most: dict[bool, int],
) -> int:
    """Return the fewest passes in which steps go through the model within the trial's peaks.

    Examples are recomputed only if they do not fit alone. Of all divisions the best one is taken in
    which each pass has neighbours in length, and no more than most tokens, by kind of pass.
    """
    total = 0
    left: list[list[tuple[int, int]]] = []  # of each step, the rows that go through together
    for step in steps:
        lengths, targets = t.lengths_and_targets(step)
        left.append(sorted(zip(lengths, targets, strict=True), reverse=True))
    for is_recomputed, budget in sorted(budgets.items()):
        wanted = {
            as_pass(rows[start:end], is_recomputed, deltanet)
            for rows in left
            for start, end in neighbours(rows, most[is_recomputed])
        }
        alike = [*wanted]
        peaks = simulation.peaks(alike) if alike else numpy.zeros(0)
        fit = {one for one, peak in zip(alike, peaks, strict=True) if peak <= budget}
        too_long = []
        for rows in left:
            alone = [as_pass([row], is_recomputed, deltanet) in fit for row in rows]
            if is_recomputed or True not in budgets:
                alone = [True] * len(rows)
            fitting = [row for row, fits in zip(rows, alone, strict=True) if fits]
            too_long.append([row for row, fits in zip(rows, alone, strict=True) if not fits])
            total += fewest_of(fitting, fit, is_recomputed, deltanet)
        left = too_long
    return total


def neighbours(rows: list[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """Yield where groups of neighbours with at most so many tokens begin and end."""
    for start, (width, _) in enumerate(rows):
        for end in range(start + 1, min(len(rows), start + most // width) + 1):
            yield start, end


def as_pass(rows: list[tuple[int, int]], is_recomputed: bool, deltanet: str) -> Pass:
    """Return rows, each of so many tokens and targets, as a pass; the longest comes first."""
    targets = sum(targets for _, targets in rows)
    return Pass(len(rows), rows[0][0], targets, is_recomputed, deltanet=deltanet)


def fewest_of(
    rows: list[tuple[int, int]], fit: set[Pass], is_recomputed: bool, deltanet: str
) -> int:
    """Return the fewest passes of rows that are ordered by length; each may go alone."""
    best = [0]
    for end in range(1, len(rows) + 1):
        starts = [
            start
            for start in range(end)
            if end - start == 1 or as_pass(rows[start:end], is_recomputed, deltanet) in fit
        ]
        best.append(1 + min(best[start] for start in starts))
    return best[-1]


# ==== an epoch as passes through the model


@dataclass(frozen=True)
class Pass:
    """One pass through the model, and all that its memory and time depend on."""

    rows: int
    width: int  # tokens of a row, padding included
    scored: int  # tokens whose logits are made: those that are learned
    is_recomputed: bool = False
    products: str = "native"  # of the frozen layers
    deltanet: str = "torch"  # whose code: transformers' own, or "fla" as FlaLike

    @classmethod
    def of(
        cls, inputs: dict[str, torch.Tensor], is_recomputed: bool = False, deltanet: str = "torch"
    ) -> Pass:
        """Return a padded batch as a pass."""
        rows, width = inputs["input_ids"].shape
        learned = inputs["labels"][:, 1:] != -100
        return cls(rows, width, int(learned.sum()), is_recomputed, deltanet=deltanet)


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
    order, size = list(t.LengthGroupedSampler(job)), t.examples_per_step(job.settings)
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    return [t.pad([job.examples[number] for number in group], "cpu") for group in groups]


def passes_of(
    steps: list[dict[str, torch.Tensor]], limits: t.MemoryLimits, deltanet: str = "torch"
) -> list[Pass]:
    """Return the passes that the script makes of steps."""
    return [
        Pass.of(*part, deltanet)
        for step in steps
        for part in t.split_into_micro_batches(step, limits)
    ]


def median_width(job: t.Job) -> int:
    """Return the median length of the training examples."""
    return round(statistics.median(len(example.input_ids) for example in job.examples))


def tiny_memory(size: int, simulation: Simulation, longest: int) -> int:
    """Return the memory of a card for a tiny model, so little that a step needs several parts."""
    widest = t.whole_chunks(longest)
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
        for name in ("model", "peak", "moments"):  # they are asked for again and again
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
                    t.use_fp16_matmul(model)
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
        return max(self.bytes_alive(one, layers))

    def bytes_alive(self, one: Pass, layers: int) -> list[int]:
        """Return the bytes alive after each operation of a pass with so many layers."""
        model = self.model(layers, one.products)
        with torch.device("meta"):
            tensors = [*model.parameters()]
            for weight in [weight for weight in tensors if weight.requires_grad]:
                weight.grad = torch.zeros_like(weight)
                tensors += [weight.grad, torch.zeros_like(weight), torch.zeros_like(weight)]
            return bytes_alive(tensors, lambda: forward_and_backward(model, one))

    def quick_peak(self, one: Pass) -> float:
        """Return a pass's peak by the quicker way."""
        is_short = chunks(one.width) <= QUICK_CHUNKS or one.deltanet == "fla"
        return self.peaks([one])[0] if is_short else self.peak(one)

    def peaks(self, passes: list[Pass]) -> numpy.ndarray:
        """Return the peaks of many passes, computed from a few that are simulated.

        Passes of rows that fill as many chunks do the same operations, and after each of them the
        bytes alive are a sum of terms(), each times a constant. So a few passes give the constants,
        and these the peak of any other one. With fla's code the chunks do not matter.
        """
        found = numpy.zeros(len(passes))
        kinds = [
            (chunks(one.width) if one.deltanet == "torch" else 0, one.is_recomputed)
            for one in passes
        ]
        for kind in sorted({*kinds}):
            places = numpy.array([place for place, one in enumerate(kinds) if one == kind])
            for some in numpy.array_split(places, math.ceil(len(places) / 20_000)):
                sizes = numpy.array([terms(passes[place]) for place in some], dtype=float)

                def most(_: Any, layers: int, kind: Any = kind, sizes: Any = sizes) -> Any:
                    return (sizes @ self.moments(*kind, layers)).max(1)

                found[some] = self.at_full_depth(most, None)
        return found

    def moments(self, count: int, is_recomputed: bool, layers: int) -> numpy.ndarray:
        """Return for terms() x moments of a pass what each term adds to the bytes alive then.

        Args:
            count: the chunks of a row, or 0 for fla's code.
            is_recomputed: whether activations are computed again and not kept.
            layers: of the model.
        """
        width = 64 * count - 60 if count else 68
        shapes = [(2, width, 20), (3, width, 20), (2, width + 20, 20), (2, width + 40, 20)]
        shapes += [(2, width, 6), (2, width + 120, 20)][: 1 if count else 2]
        code = "torch" if count else "fla"
        passes = [Pass(*shape, is_recomputed, deltanet=code) for shape in shapes]
        sizes = numpy.array([terms(one)[: len(shapes)] for one in passes], dtype=float)
        alive = numpy.array([self.bytes_alive(one, layers) for one in passes], dtype=float)
        found = numpy.unique(numpy.linalg.solve(sizes, alive).round(3), axis=1)
        # A moment at which no term adds more than at another one is never the peak.
        is_below = (found[:, :, None] <= found[:, None, :]).all(0)
        numpy.fill_diagonal(is_below, False)
        largest = found[:, ~is_below.any(1)]
        return numpy.pad(largest, ((0, 6 - len(shapes)), (0, 0)))

    def largest_peak(self, passes: Iterable[Pass]) -> int:
        """Return the largest peak of passes."""
        alike = [*{*passes}]
        return self.peak(alike[int(self.peaks(alike).argmax())])

    def limits(
        self, job: t.Job, size: int, longest: int = 0, deltanet: str = "torch"
    ) -> t.MemoryLimits:
        """Return what the script's own trial finds on a card with so much memory.

        Args:
            job: with its examples.
            size: the card's memory in bytes.
            longest: the tokens of the longest example, if they are not the job's.
            deltanet: whose code computes DeltaNet.
        """
        most = (
            (longest, t.whole_chunks(longest) * t.examples_per_step(job.settings))
            if longest
            else t.most_tokens(job)
        )
        with (
            self.card(size, deltanet) as trainer,
            unittest.mock.patch.object(t, "most_tokens", lambda _: most),
        ):
            t.find_what_fits(trainer, job)
        return job.token_limits

    def longest_examples(
        self, job: t.Job, size: int, longest: int, deltanet: str = "torch"
    ) -> t.MemoryLimits:
        """Return how long a single example may be, kept or recomputed, by the same trial."""
        found: list[t.MemoryLimits] = []
        real = t.try_what_fits

        def try_long_ones(trainer: Any, *_: int) -> t.MemoryLimits:
            found.append(real(trainer, longest, longest))
            return t.MemoryLimits(longest, longest)  # so that the script does not refuse the card

        with (
            self.card(size, deltanet) as trainer,
            unittest.mock.patch.object(t, "try_what_fits", try_long_ones),
        ):
            t.find_what_fits(trainer, job)
        return found[0]

    @contextlib.contextmanager
    def card(self, size: int, deltanet: str = "torch") -> Iterator[Any]:
        """Yield a trainer on a GPU with so much memory, where simulated peaks decide what fits."""
        model = self.model(self.block)
        share: list[float] = []
        used: list[int] = []
        weights = self.weight_bytes
        vocabulary = self.sizes["vocab_size"]

        def loss_or_error(_: Any, inputs: dict[str, torch.Tensor], **__: Any) -> torch.Tensor:
            one = Pass.of(inputs, is_recomputed(model), deltanet)
            room = share[-1] * size
            # The logits alone, in bfloat16 and twice in float32, may be too much for it.
            if weights + 10 * vocabulary * one.scored > room:
                raise torch.OutOfMemoryError
            # The gradients and AdamW's moments are not there yet when the script tries.
            used.append(self.quick_peak(one) - 12 * self.trainable)
            if used[-1] > room:
                raise torch.OutOfMemoryError
            return torch.zeros((), requires_grad=True)

        card = {
            "mem_get_info": lambda: (size - CUDA - weights, size),
            "memory_reserved": lambda: weights,
            "memory_allocated": lambda: weights,
            "max_memory_allocated": lambda: used[-1],
            "set_per_process_memory_fraction": share.append,
            "reset_peak_memory_stats": lambda: None,
        }
        arguments = types.SimpleNamespace(device="cpu")
        layers = t.layers_that_recompute(model)
        trainer = types.SimpleNamespace(
            model=model, compute_loss=loss_or_error, args=arguments, recomputing_layers=layers
        )
        accelerate.PartialState(cpu=True)
        with unittest.mock.patch.multiple(torch.cuda, **card), quiet():
            yield trainer


def terms(one: Pass) -> tuple[int, ...]:
    """Return what the bytes alive in a pass are made of: constants, rows, tokens, targets, ..."""
    rows, width = one.rows, one.width
    return 1, rows, rows * width, rows * width**2, one.scored, rows * chunks(width)


def chunks(width: int) -> int:
    """Return the number of DeltaNet's chunks, which are padded to 64 tokens."""
    return math.ceil(width / 64)


def is_recomputed(model: torch.nn.Module) -> bool:
    """Return whether a model's layers compute their activations again."""
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    return layers[0].gradient_checkpointing


def forward_and_backward(model: peft.PeftModel, one: Pass) -> None:
    """Do a pass; one that scores nothing leaves out the vocabulary."""
    t.set_recomputation(t.layers_that_recompute(model), one.is_recomputed)
    model.disable_input_require_grads()
    base, inputs = model.get_base_model(), inputs_of(one)
    name = "torch_chunk_gated_delta_rule"
    rule = fla_like if one.deltanet == "fla" else getattr(modeling_qwen3_5, name)
    deltanet = unittest.mock.patch.object(modeling_qwen3_5, name, rule)
    # The math kernel is all that there is for bfloat16 on a V100.
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), deltanet, nothing_is_packed():
        if one.scored:
            out = script_loss(base, inputs, one)
        else:
            del inputs["labels"], inputs["attention_mask"]
            out = base.model(**inputs, use_cache=False).last_hidden_state
        out.sum().backward()


def nothing_is_packed() -> contextlib.AbstractContextManager:
    """Keep transformers from looking for packed rows, by values, where there is no mask."""
    masks = transformers.masking_utils
    return unittest.mock.patch.object(masks, "find_packed_sequence_indices", lambda _: None)


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


def bytes_alive(tensors: list[torch.Tensor], run: Callable[[], None]) -> list[int]:
    """Return the bytes alive after each operation of run(), with those of tensors."""

    class Memory(TorchDispatchMode):
        """Counts the bytes of all storages that operations return, until they are freed."""

        def __init__(self) -> None:
            super().__init__()
            self.now = 0
            self.alive: set[int] = set()
            self.found: list[int] = []

        def add(self, storage: Any) -> None:
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.alive.add(key)
                self.now += size
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
            self.found.append(self.now)
            return result

    with quiet(), Memory() as counted:
        for tensor in tensors:
            counted.add(tensor.untyped_storage())
        run()
    return counted.found


class FlaLike(torch.autograd.Function):
    """What fla's code for DeltaNet keeps and needs, in bytes alone, by fla-core 0.6.0's source.

    It allocates what ChunkGatedDeltaRuleFunction in fla/ops/gated_delta_rule/chunk.py and what that
    calls do, in their order; names with an underscore only keep something alive as long as they do.
    That Python code, run on tensors without values and without Triton's kernels, had the same peaks
    at Qwen3.5-4B's sizes to the byte (0.5.2 as well). Everything has the inputs' type, the state at
    each chunk of 64 tokens too; decays and norms are float32. No row is padded, and no query or key
    is repeated for the values that share it. Not counted is what Triton takes to tune a kernel.
    """

    @staticmethod
    def forward(context: Any, *given: torch.Tensor) -> torch.Tensor:
        """Keep the inputs, queries and keys normalised, their norms, and each chunk's matrix."""
        _query, _key, value, decay, beta = [one.contiguous() for one in given]
        query, key = torch.empty_like(_query), torch.empty_like(_key)
        norms = [one.new_empty(one.shape[:-1], dtype=torch.float32) for one in (query, key)]
        decay = torch.empty_like(decay, dtype=torch.float32)
        system = key.new_zeros(*beta.shape, 64)
        _work = FlaLike.rows_and_states(key, value)
        context.save_for_backward(query, key, value, decay, beta, system, *norms)
        return torch.empty_like(value)

    @staticmethod
    def rows_and_states(key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        """Return w, u, the state at each chunk, and the new values."""
        batch, tokens, heads, size = value.shape
        width = key.shape[-1]
        states = key.new_empty(batch, chunks(tokens), heads, width, size)
        rows = key.new_empty(batch, tokens, heads, width), torch.empty_like(value)
        return [*rows, states, torch.empty_like(value)]

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute rows and states again, and from the last chunk to the first the gradients."""
        query, key, value, decay, beta, *_ = context.saved_tensors
        gradient = gradient.contiguous()
        w, _u, states, _new = FlaLike.rows_and_states(key, value)
        of_new = torch.empty_like(gradient)
        _of_states, of_new = torch.empty_like(states), torch.empty_like(of_new)
        of_query, of_key = torch.empty_like(w), torch.empty_like(w)
        of_decay, _of_w = torch.empty_like(decay), torch.empty_like(w)
        of_query = FlaLike.of_shared(of_query, query)
        of_key = FlaLike.of_shared(of_key, key)
        more = torch.empty_like(w)
        of_value, _more, of_beta = [torch.empty_like(one) for one in (value, decay, beta)]
        more = FlaLike.of_shared(more, key)
        del w, _u, states, _new, of_new, _of_states, _of_w, more
        of_query = torch.empty_like(query)  # before they were normalised
        of_key = torch.empty_like(key)
        return of_query, of_key, of_value, of_decay, of_beta

    @staticmethod
    def of_shared(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return the gradient of queries or keys, summed over the values that share them."""
        return gradient.view(*like.shape[:3], -1, like.shape[-1]).sum(3)


def fla_like(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Stand in for transformers' DeltaNet where fla computes it."""
    return FlaLike.apply(query, key, value, g, beta), None
