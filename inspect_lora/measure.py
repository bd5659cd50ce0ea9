"""What is measured of an adapter on its base: counts and texts. Nothing is trained, or judged.

Parts of the finished update are switched off, made weaker or stronger, or cut to their strongest
directions. Elsewhere, on tasks that the training was not about, the base replies once, by chance
with a fixed seed, and both models' probabilities are compared on that: the loss on reference
answers would measure style.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from peft.tuners.lora import LoraLayer
from tqdm import tqdm

import train_lora_single as script
from inspect_lora.adapter_file import IN_A_LAYER, name_in_text_model, strongest_directions
from inspect_lora.common import InspectError, hash_of
from inspect_lora.data import Prompt, clusters_of, with_system
from inspect_lora.model import Adapter, generate, text_of
from inspect_lora.record import Exchange, Line, Part, Probe, Said, Shift
from inspect_lora.rules import passes

STRENGTHS = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0)
SUBLAYERS = {"self_attn": "attention", "mlp": "feed-forward", "linear_attn": "DeltaNet"}
TASK_TOKENS = 64  # of the base's reply to another task
TASKS_AT_ONCE = 4  # 64 tokens of each have a quarter of a GiB of logits in Qwen3.5's vocabulary
Layers = dict[str, LoraLayer]  # by path


# ---- Losses


def losses_of(adapter: Adapter, examples: list[script.Example], what: str) -> list[float]:
    """Return the loss of each reply with the model as it is now."""
    losses = script.example_losses(adapter.model, examples)
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
    own = losses_of(adapter, examples, "the adapter")
    with adapter.at(0):
        return losses_of(adapter, examples, "the base model"), own


def measure_lines(adapter: Adapter, examples: list[script.Example], kinds: list[str]) -> list[Line]:
    """Return each held-out reply with its losses."""
    base, own = losses_of_both(adapter, examples)
    rows = zip(examples, clusters_of(examples), kinds, base, own, strict=True)
    return [
        Line(hash_of(one.input_ids), one.source, cluster, kind, len(one.reply_ids), of_base, of_own)
        for one, cluster, kind, of_base, of_own in rows
    ]


# ---- Parts


def measure_parts(adapter: Adapter, examples: list[script.Example]) -> list[Part]:
    """Return each part with its losses on these replies."""
    found = []
    parts = list(parts_of(adapter))
    for kind, name, change in tqdm(parts, desc="parts", leave=False, disable=None):
        with change:
            found.append(Part(kind, name, losses_of(adapter, examples, name)))
    return found


def parts_of(adapter: Adapter) -> Iterator[tuple[str, str, AbstractContextManager[None]]]:
    """Yield the parts of an adapter: kind, name, and what makes it for a while."""
    layers = adapter.layers
    for strength in STRENGTHS:
        yield "strength", f"x {strength:g}", adapter.at(strength)
    for (kind, name), paths in sorted(groups_of(layers).items()):
        if len(paths) < len(layers):
            yield kind, f"{name} alone", only_these(layers, paths)
    largest = max(layer.r["default"] for layer in layers.values())
    divisor = 2
    while largest // divisor:
        ranks = {path: max(1, layer.r["default"] // divisor) for path, layer in layers.items()}
        yield "cut", f"cut to {largest // divisor} of {largest}", cut_to(layers, ranks)
        divisor *= 2


def groups_of(layers: Layers) -> dict[tuple[str, str], set[str]]:
    """Return the paths of the modules of each ("group", sublayer) and ("target", name)."""
    groups: dict[tuple[str, str], set[str]] = {}
    for path in layers:
        names = [name for name in path.split(".") if not name.isdecimal()]  # experts have numbers
        inside = names[-2] if IN_A_LAYER.match(path) else names[-1]  # lm_head is in no layer
        groups.setdefault(("group", SUBLAYERS.get(inside, inside)), set()).add(path)
        groups.setdefault(("target", names[-1]), set()).add(path)
    return groups


@contextmanager
def only_these(layers: Layers, paths: set[str]) -> Iterator[None]:
    """Switch LoRA off for a while in all layers but those at paths."""
    others = [layer for path, layer in layers.items() if path not in paths]
    for layer in others:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in others:
            layer.enable_adapters(True)


@contextmanager
def cut_to(layers: Layers, ranks: dict[str, int]) -> Iterator[None]:
    """Cut every update to its strongest directions for a while.

    B is projected on the first columns of U, where B A = U S V, and A is left alone.
    """
    whole = {path: layer.lora_B["default"].weight.data for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            a, b = (
                one["default"].weight.detach().double().cpu().numpy()
                for one in (layer.lora_A, layer.lora_B)
            )
            u, _, _ = strongest_directions(a, b, ranks[path])
            layer.lora_B["default"].weight.data = torch.from_numpy(u @ (u.T @ b)).to(whole[path])
        yield
    finally:
        for path, layer in layers.items():
            layer.lora_B["default"].weight.data = whole[path]


def measure_updates(adapter: Adapter) -> dict[str, list[float]]:
    """Return by target the size of each update as a share of its weight: |scaling B A| / |W|."""
    norms = {name_in_text_model(one.path): one.norm for one in adapter.saved.modules}
    found: dict[str, list[float]] = {}
    for path, layer in adapter.layers.items():
        size = torch.linalg.vector_norm(layer.get_base_layer().weight, dtype=torch.float64).item()
        share = norms[name_in_text_model(path)] / size
        found.setdefault(path.rpartition(".")[2], []).append(share)
    return found


# ---- Elsewhere


def measure_shifts(adapter: Adapter, tasks: list[Prompt], system: str) -> list[Shift]:
    """Return how far each strength moves the model on these tasks; with a system message, one.

    A task with a system message of its own, such as another persona's, keeps that.
    """
    strengths = sorted((*STRENGTHS, 1.0)) if adapter.is_plain and not system else [1.0]
    examples = replies_of_base(adapter, tasks, system)
    counts = [len(one.reply_ids) for one in examples]
    replies = hash_of([one.input_ids for one in examples])
    shifts = [Shift(one, bool(system), [], [], counts, replies) for one in strengths]
    starts = range(0, len(tasks), TASKS_AT_ONCE)
    for start in tqdm(starts, desc="tasks", leave=False, disable=None):
        batch = examples[start : start + TASKS_AT_ONCE]
        inputs = script.pad(batch, adapter.model.device)
        lengths = [len(one.reply_ids) for one in batch]
        base = log_probabilities(adapter, inputs, 0)
        for shift in shifts:
            moved = log_probabilities(adapter, inputs, shift.strength)
            kl = (base.exp() * (base - moved)).sum(-1, dtype=torch.float64)
            is_other = base.argmax(-1) != moved.argmax(-1)
            shift.kl += [one.sum().item() for one in kl.split(lengths)]
            shift.other += [one.sum().item() for one in is_other.split(lengths)]
    for shift in shifts:
        refuse_nan(shift.kl, f"KL at x {shift.strength:g}")
    return shifts


def replies_of_base(adapter: Adapter, tasks: list[Prompt], system: str) -> list[script.Example]:
    """Return the base's reply to each task, drawn with its own odds."""
    prompts = [adapter.prompt_ids(with_system(one.messages, system)) for one in tasks]
    with adapter.at(0):
        replies = generate(adapter, prompts, TASK_TOKENS, sampled=True)
    rows = zip(tasks, prompts, replies, strict=True)
    return [script.Example(task.where, task.messages, {}, *ids) for task, *ids in rows]


def log_probabilities(
    adapter: Adapter, inputs: dict[str, torch.Tensor], strength: float
) -> torch.Tensor:
    """Return the log-probabilities (tokens x vocabulary) that lead to each token of the replies."""
    with torch.no_grad(), adapter.at(strength):
        return script.reply_logits(adapter.model, inputs).float().log_softmax(-1)


# ---- Replies


def ask_both(
    adapter: Adapter, prompts: list[Prompt], max_new_tokens: int
) -> tuple[list[Exchange], list[script.Example]]:
    """Have base and adapter reply to each prompt, always with the likeliest token.

    Returns what they said, and the adapter's replies with their tokens.
    """
    ids = [adapter.prompt_ids(prompt.messages) for prompt in prompts]
    with adapter.at(0):
        of_base = generate(adapter, ids, max_new_tokens)
    of_adapter = generate(adapter, ids, max_new_tokens)
    exchanges, own = [], []
    for prompt, prompt_ids, base, reply in zip(prompts, ids, of_base, of_adapter, strict=True):
        said = {"base": said_of(adapter, base, prompt), "adapter": said_of(adapter, reply, prompt)}
        exchanges.append(Exchange(**vars(prompt), **said))
        own.append(script.Example(prompt.where, prompt.messages, {}, prompt_ids, reply))
    return exchanges, own


def said_of(adapter: Adapter, tokens: list[int], prompt: Prompt) -> Said:
    """Return a reply with what each rule says of it; thoughts before it are not judged."""
    text = text_of(adapter, tokens)
    ended = tokens[-1] in adapter.job.stop_ids
    judged = text.rpartition("</think>")[2]
    results = {name: passes(rule, judged) for name, rule in prompt.checks.items()}
    return Said(text, len(tokens), ended, results)


def measure_probes(adapter: Adapter, replies: list[script.Example]) -> list[Probe]:
    """Return the adapter's own replies with both losses: a server is asked for the same."""
    base, own = losses_of_both(adapter, replies)
    return [
        Probe(one.source, one.messages, one.prompt_ids, one.reply_ids, of_base, of_own)
        for one, of_base, of_own in zip(replies, base, own, strict=True)
    ]
