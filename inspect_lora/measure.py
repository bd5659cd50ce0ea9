"""What is measured of an adapter on its base: counts and texts. Nothing is trained, or judged.

Parts of the finished update are switched off, made weaker or stronger, or cut to their strongest
directions. Elsewhere, on tasks that the training was not about, the base replies once, by chance
with a fixed seed, and both models' probabilities are compared on that: the loss on reference
answers would measure style.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from tqdm import tqdm

import train_lora_single as script
from inspect_lora.adapter_file import IN_A_LAYER, name_in_text_model, strongest_directions
from inspect_lora.common import InspectError, hash_of
from inspect_lora.data import Prompt, with_system
from inspect_lora.model import Adapter, prompt_ids
from inspect_lora.record import Exchange, Line, Pair, Part, Probe, Reply, Shift
from inspect_lora.replies import generate, text_of
from inspect_lora.rules import passes

STRENGTHS = (0.5, 0.75, 1.5)
SUBLAYERS = {"self_attn": "attention", "mlp": "feed-forward", "linear_attn": "DeltaNet"}
TASK_TOKENS = 64  # of the base's reply to another task
TASKS_AT_ONCE = 4  # 64 tokens of each have a quarter of a GiB of logits in Qwen3.5's vocabulary
Layers = dict[str, LoraLayer]  # by path


# ---- Losses


def losses_of(adapter: Adapter, examples: list[script.Example], what: str) -> list[float]:
    """Return the loss of each reply with the model as it is now.

    The replies of a dialogue go through it as one row where that is exact.
    """
    rows = script.losses_of_replies(adapter.model, script.join_replies(examples))
    losses = [loss for row in rows for loss in row]
    refuse_nan(losses, what)
    return losses


def refuse_nan(numbers: list[float], what: str) -> None:
    """Raise InspectError if a loss or a divergence is no number: each sum would be none."""
    bad = sum(not math.isfinite(number) for number in numbers)
    if bad:
        raise InspectError(
            f"{what}: NaN or infinity for {bad} of {len(numbers)} replies. Try --dtype float32; if "
            "it stays so, the training diverged, or it is another base."
        )


def losses_of_both(
    adapter: Adapter, examples: list[script.Example]
) -> tuple[list[float], list[float]]:
    """Return the losses of each reply by the base and by the adapter."""
    keys = [("loss", example.prompt_ids, example.reply_ids) for example in examples]
    of_base = adapter.measured_of_base(
        keys, examples, lambda unknown: losses_of(adapter, unknown, "the base model")
    )
    return of_base, losses_of(adapter, examples, "the adapter")


def measure_lines(
    adapter: Adapter, examples: list[script.Example], clusters: dict[str, str], kinds: list[str]
) -> list[Line]:
    """Return each held-out reply with its losses."""
    losses = losses_of_both(adapter, examples)
    return [
        Line(
            hash_of(example.input_ids),
            example.source,
            clusters[example.source],
            kind,
            len(example.reply_ids),
            of_base,
            of_adapter,
        )
        for example, kind, of_base, of_adapter in zip(examples, kinds, *losses, strict=True)
    ]


def measure_pairs(
    adapter: Adapter, good_lines: dict[str, Line], rejected: dict[str, script.Example]
) -> list[Pair]:
    """Return each good reply with the bad one: how likely both models find the two."""
    losses = losses_of_both(adapter, list(rejected.values()))
    pairs = []
    for (source, bad), of_base, of_adapter in zip(rejected.items(), *losses, strict=True):
        good = good_lines[source]
        tokens = (good.tokens, len(bad.reply_ids))
        pair_id = hash_of((good.id, bad.input_ids))
        likelihoods = (-good.base, -of_base, -good.adapter, -of_adapter)
        pairs.append(Pair(pair_id, source, good.cluster, good.kind, *tokens, *likelihoods))
    return pairs


# ---- Parts


def measure_parts(adapter: Adapter, examples: list[script.Example]) -> list[Part]:
    """Return each part with its losses on these replies."""
    parts = []
    losses_by_off: dict[frozenset[str], list[float]] = {}
    for family, name, off, change in tqdm(
        list(parts_of(adapter)), "parts", leave=False, disable=None
    ):
        losses = losses_by_off.get(off)  # of two sublayers one removed is the other one alone
        if losses is None:
            with change:
                losses = losses_of(adapter, examples, f"{family} {name}")
        if off:
            losses_by_off[off] = losses
        parts.append(Part(family, name, losses))
    return parts


def parts_of(
    adapter: Adapter,
) -> Iterator[tuple[str, str, frozenset[str], AbstractContextManager[Any]]]:
    """Yield family and name of each part, the paths that are off, and what makes it for a while."""
    for strength in STRENGTHS:
        yield "strength", f"x {strength:g}", frozenset(), adapter.at_strength(strength)
    layers = adapter.layers
    everything = frozenset(layers)
    groups = {name: paths for name, paths in groups_of(layers).items() if paths < everything}
    for name, paths in groups.items():
        yield "removed", name, paths, switched_off(layers, paths)
    for name, paths in groups.items():
        yield "alone", name, everything - paths, switched_off(layers, everything - paths)
    largest = max(layer.r["default"] for layer in layers.values())
    divisor = 2
    while largest // divisor:
        ranks = {path: max(1, layer.r["default"] // divisor) for path, layer in layers.items()}
        yield "cut", f"{largest // divisor} of {largest}", frozenset(), cut_to(layers, ranks)
        divisor *= 2


def groups_of(paths: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return the modules of each sublayer, and then of each target, by its name."""
    sublayers: dict[str, set[str]] = {}
    targets: dict[str, set[str]] = {}
    for path in paths:
        names = [name for name in path.split(".") if not name.isdecimal()]  # experts have numbers
        inside = names[-2] if IN_A_LAYER.match(path) else names[-1]  # lm_head is in no layer
        sublayers.setdefault(SUBLAYERS.get(inside, inside), set()).add(path)
        targets.setdefault(names[-1], set()).add(path)
    groups = sorted(sublayers.items()) + sorted(targets.items())
    return {name: frozenset(members) for name, members in groups}


@contextmanager
def switched_off(layers: Layers, paths: Iterable[str]) -> Iterator[None]:
    """Switch LoRA off for a while in the layers at paths."""
    for path in paths:
        layers[path].enable_adapters(False)
    try:
        yield
    finally:
        for path in paths:
            layers[path].enable_adapters(True)


@contextmanager
def cut_to(layers: Layers, ranks: dict[str, int]) -> Iterator[None]:
    """Cut every update to its strongest directions for a while.

    B is projected on the first columns of U, where B A = U S V, and A is left alone.
    """
    whole = {path: layer.lora_B["default"].weight.data for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            a, b = (
                matrices["default"].weight.detach().double().cpu().numpy()
                for matrices in (layer.lora_A, layer.lora_B)
            )
            u, _, _ = strongest_directions(a, b, ranks[path])
            layer.lora_B["default"].weight.data = torch.from_numpy(u @ (u.T @ b)).to(whole[path])
        yield
    finally:
        for path, layer in layers.items():
            layer.lora_B["default"].weight.data = whole[path]


def measure_updates(adapter: Adapter) -> dict[str, list[float]]:
    """Return by target the size of each update as a share of its weight: |scaling B A| / |W|."""
    norms = {name_in_text_model(module.path): module.norm for module in adapter.saved.modules}
    shares: dict[str, list[float]] = {}
    for path, layer in adapter.layers.items():
        size = torch.linalg.vector_norm(layer.get_base_layer().weight, dtype=torch.float64).item()
        share = norms[name_in_text_model(path)] / size
        shares.setdefault(path.rpartition(".")[2], []).append(share)
    return shares


# ---- Elsewhere


def measure_shifts(adapter: Adapter, tasks: list[Prompt], system: str) -> list[Shift]:
    """Return how far each strength moves the model on these tasks; with a system message, one.

    A task with a system message of its own, such as another persona's, keeps that.
    """
    strengths = sorted((*STRENGTHS, 1.0)) if adapter.is_plain and not system else [1.0]
    examples = replies_of_base(adapter, tasks, system)
    counts = [len(example.reply_ids) for example in examples]
    replies = hash_of([example.input_ids for example in examples])
    shifts = [Shift(strength, bool(system), [], [], counts, replies) for strength in strengths]
    starts = range(0, len(tasks), TASKS_AT_ONCE)
    for start in tqdm(starts, desc="tasks", leave=False, disable=None):
        batch = examples[start : start + TASKS_AT_ONCE]
        inputs = script.pad(batch, adapter.model.device)
        lengths = [len(example.reply_ids) for example in batch]
        base = log_probabilities(adapter, inputs, 0)
        for shift in shifts:
            moved = log_probabilities(adapter, inputs, shift.strength)
            kl = (base.exp() * (base - moved)).sum(-1, dtype=torch.float64)
            is_changed = base.argmax(-1) != moved.argmax(-1)
            shift.kl += [of_task.sum().item() for of_task in kl.split(lengths)]
            shift.changed_tokens += [of_task.sum().item() for of_task in is_changed.split(lengths)]
    for shift in shifts:
        refuse_nan(shift.kl, f"KL at x {shift.strength:g}")
    return shifts


def replies_of_base(adapter: Adapter, tasks: list[Prompt], system: str) -> list[script.Example]:
    """Return the base's reply to each task, drawn with its own odds."""
    prompts = [prompt_ids(with_system(task.messages, system), adapter.base) for task in tasks]
    (replies,) = adapter.measured_of_base(
        [("drawn", prompts)],  # a draw depends on all of its prompts
        [prompts],
        lambda unknown: [generate(adapter, each, TASK_TOKENS, sampled=True) for each in unknown],
    )
    rows = zip(tasks, prompts, replies, strict=True)
    return [script.Example(task.where, task.messages, {}, *ids) for task, *ids in rows]


def log_probabilities(
    adapter: Adapter, inputs: dict[str, torch.Tensor], strength: float
) -> torch.Tensor:
    """Return the log-probabilities (tokens x vocabulary) that lead to each token of the replies."""
    with torch.no_grad(), adapter.at_strength(strength):
        return script.reply_logits(adapter.model, inputs).float().log_softmax(-1)


# ---- Replies


def ask_both(
    adapter: Adapter, prompts: list[Prompt], max_new_tokens: int
) -> tuple[list[Exchange], list[script.Example]]:
    """Have base and adapter reply to each prompt, always with the likeliest token.

    Returns what they said, and the adapter's replies with their tokens.
    """
    ids = [prompt_ids(prompt.messages, adapter.base) for prompt in prompts]
    keys = [("reply", prompt, max_new_tokens) for prompt in ids]
    of_base = adapter.measured_of_base(
        keys, ids, lambda unknown: generate(adapter, unknown, max_new_tokens)
    )
    replies = generate(adapter, ids, max_new_tokens)
    exchanges, of_adapter = [], []
    for prompt, asked, base, reply in zip(prompts, ids, of_base, replies, strict=True):
        sides = {"base": base, "adapter": reply}
        judged = {name: judged_reply(adapter, tokens, prompt) for name, tokens in sides.items()}
        exchanges.append(Exchange(**vars(prompt), **judged))
        of_adapter.append(script.Example(prompt.where, prompt.messages, {}, asked, reply))
    return exchanges, of_adapter


def judged_reply(adapter: Adapter, tokens: list[int], prompt: Prompt) -> Reply:
    """Return a reply with what each rule says of it; thoughts before it are not judged."""
    text = text_of(adapter, tokens)
    ended = tokens[-1] in adapter.base.stop_ids
    judged = text.rpartition("</think>")[2]
    results = {name: passes(rule, judged) for name, rule in prompt.checks.items()}
    return Reply(text, len(tokens), ended, results)


def measure_probes(adapter: Adapter, replies: list[script.Example]) -> list[Probe]:
    """Return the adapter's own replies with both losses: a server is asked for the same."""
    losses = losses_of_both(adapter, replies)
    return [
        Probe(reply.source, reply.messages, reply.prompt_ids, reply.reply_ids, *of_both)
        for reply, *of_both in zip(replies, *losses, strict=True)
    ]
