"""The parts of a finished adapter: what r, alpha and the targets were worth.

Parts are switched off, scaled or cut; nothing is trained.
A part's share of the gain is (base's loss - part's loss) / (base's loss - adapter's loss), of all
tokens. Parts overlap, so their shares need not add up to 100 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import peft
import torch
from peft.utils.integrations import dequantize_module_weight

from inspect_lora.adapters import can_scale_and_cut, can_take_apart, lora_layers, rescaled
from inspect_lora.modules import Module, layer_number, strongest_directions
from inspect_lora.scores import UNKNOWN, Estimate, Losses, differences, losses_of, ratio_with_error
from inspect_lora.trainer import Example

STRENGTHS = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0)
# Both are shares of the gain. A clear difference that is smaller than the first is not worth a run.
# If no difference is clear, two losses are the same only if the whole 95 % interval of the share is
# within the second: otherwise the examples are too few to tell.
WORTH_REPORTING = 0.02
THE_SAME_WITHIN = 0.05


@dataclass
class Part:
    """The adapter, the base model, or a part of the adapter, with what was measured of it."""

    kind: str  # "whole", "base", "merged", "strength", "group", "target" or "cut"
    value: float | str  # the strength, the group's name, or the directions that are left
    title: str  # as it is called in the table
    change_model: Callable[[], AbstractContextManager[Any]]  # for a while
    loss: float = math.nan  # in nats a token
    of_gain: Estimate = UNKNOWN  # a share
    against_trained: Estimate = UNKNOWN  # above 0 is better, as in all that is shown
    gained: Estimate = UNKNOWN  # over the base
    better_on: int = 0  # examples
    losses: list[float] = field(default_factory=list)  # of each example, in nats a token

    def judge(self, losses: Losses, own: list[float]) -> None:
        """Compare its examples' losses, in nats, with those of the adapter and the base."""
        changes = differences(losses.trained, own)
        gained, gain = differences(losses.base, own), differences(losses.base, losses.trained)
        self.loss = sum(own) / sum(losses.tokens)
        self.of_gain = ratio_with_error(gained, gain, losses.lines)
        self.against_trained = ratio_with_error(changes, losses.tokens, losses.lines)
        self.gained = ratio_with_error(gained, losses.tokens, losses.lines)
        self.better_on = sum(change > 0 for change in changes)
        self.losses = [loss / n for loss, n in zip(own, losses.tokens, strict=True)]

    def verdict(self, comparisons: int = 1) -> str:
        """Return if it is "better" or "worse" than the whole, the "same", or "unclear".

        It was picked among so many parts.
        """
        share = self.of_gain
        is_large = abs(share.value - 1) > WORTH_REPORTING
        if is_large and self.against_trained.is_clear(comparisons):
            return "better" if self.against_trained.value > 0 else "worse"
        largest = abs(share.value - 1) + share.margin(comparisons)
        return "same" if largest < THE_SAME_WITHIN else "unclear"

    def as_recorded(self) -> dict[str, Any]:
        """Return its row in evidence.json."""
        row = {key: value for key, value in vars(self).items() if key != "change_model"}
        estimates = ("of_gain", "against_trained", "gained")
        return row | {name: asdict(row[name]) for name in estimates}


def measure_parts(
    model: peft.PeftModel, examples: list[Example], losses: Losses, file_dtype: torch.dtype
) -> list[Part]:
    """Return the whole adapter, the base and each part, measured on these examples.

    Args:
        model: with the adapter on.
        examples: held-out replies.
        losses: theirs, with the adapter and without it.
        file_dtype: of the base's weights in their file, into which the update would be merged.
    """
    whole = Part("whole", 1.0, "as trained", nullcontext)
    without = Part("base", 0.0, "base model", model.disable_adapter)
    whole.judge(losses, losses.trained)
    without.judge(losses, losses.base)
    parts = [*merged_parts(model, file_dtype), *parts_of(model)]
    for part in parts:
        with part.change_model():
            part.judge(losses, losses_of(model, examples, part.title))
    return [whole, without, *parts]


def parts_of(model: peft.PeftModel) -> list[Part]:
    """Return the parts of an adapter, in the order of the table."""
    layers = lora_layers(model)
    parts: list[Part] = []
    if can_scale_and_cut(model):
        for scale in STRENGTHS:
            parts.append(
                Part("strength", scale, f"update x {scale:g}", lambda s=scale: rescaled(model, s))
            )
    if not can_take_apart(model):
        return parts
    groups = {"group": paths_by_sublayer(layers), "target": paths_by_target(layers)}
    for kind, named in groups.items():
        for name, paths in named.items():
            parts.append(
                Part(kind, name, f"{name} alone", lambda paths=paths: only_these(layers, paths))
            )
    return parts + (cuts_of(layers) if can_scale_and_cut(model) else [])


SUBLAYERS = {"self_attn": "attention", "mlp": "feed-forward", "linear_attn": "DeltaNet"}


def paths_by_sublayer(layers: dict[str, Any]) -> dict[str, set[str]]:
    """Return {"attention": paths, ...} by the module that the targets are in, if several."""
    paths_by: dict[str, set[str]] = {name: set() for name in SUBLAYERS.values()}
    for path in layers:
        # An expert's parent is its number; the module above has a name. lm_head is in no layer.
        *names, parent = [name for name in path.split(".") if not name.isdecimal()]
        if layer_number(path) is not None:
            parent = names[-1]
        paths_by.setdefault(SUBLAYERS.get(parent, parent), set()).add(path)
    found = {name: paths for name, paths in paths_by.items() if paths}
    return found if len(found) > 1 else {}


def paths_by_target(layers: dict[str, Any]) -> dict[str, set[str]]:
    """Return {"q_proj": paths, ...}, if there are several targets."""
    found: dict[str, set[str]] = {}
    for path in layers:
        found.setdefault(path.rpartition(".")[2], set()).add(path)
    return found if len(found) > 1 else {}


@contextmanager
def only_these(layers: dict[str, Any], paths: set[str]) -> Iterator[None]:
    """Switch LoRA off for a while in all layers but those at paths."""
    others = [module for path, module in layers.items() if path not in paths]
    for module in others:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in others:
            module.enable_adapters(True)


def cuts_of(layers: dict[str, Any]) -> list[Part]:
    """Return the cuts to a half, a quarter, ... of each layer's directions, down to one."""
    ranks = {path: module.r["default"] for path, module in layers.items()}
    is_even = len(set(ranks.values())) == 1
    parts: list[Part] = []
    divisor = 2
    while max(ranks.values()) // divisor:
        left = {path: max(1, rank // divisor) for path, rank in ranks.items()}
        most = max(left.values())
        title = f"cut to {most} {'directions' if most > 1 else 'direction'}"
        if not is_even:  # a rank_pattern gave the layers ranks of their own
            title = f"cut to 1/{divisor} of the directions"
        parts.append(Part("cut", most, title, lambda left=left: cut_to(layers, left)))
        divisor *= 2
    return parts


@contextmanager
def cut_to(layers: dict[str, Any], ranks: dict[str, int]) -> Iterator[None]:
    """Cut every update to its strongest directions for a while.

    B is projected on the first columns of U, where B A = U S V, and A is left alone.
    """
    whole = {path: module.lora_B["default"].weight.data for path, module in layers.items()}
    try:
        for path, module in layers.items():
            weight = module.lora_B["default"].weight
            a, b = module.lora_A["default"].weight.data, weight.data
            u = strongest_directions(a, b, ranks[path]).u
            weight.data = (u @ (u.T @ b.double())).to(weight.dtype)
        yield
    finally:
        for path, module in layers.items():
            module.lora_B["default"].weight.data = whole[path]


def merged_parts(model: peft.PeftModel, dtype: torch.dtype) -> list[Part]:
    """Return the update as merge_and_unload would serve it, if it can be computed here."""
    if not can_scale_and_cut(model) or why_it_is_not_merged(model):
        return []
    layers = lora_layers(model)
    title = f"merged, in {str(dtype).removeprefix('torch.')}"
    return [Part("merged", 1.0, title, lambda: merged_into(layers, dtype))]


def why_it_is_not_merged(model: peft.PeftModel) -> str:
    """Return which layer keeps an update that can be scaled and cut from being merged here."""
    embedding = model.get_input_embeddings().weight
    for path, module in lora_layers(model).items():
        base, name = module.get_base_layer(), path.rpartition(".")[2]
        if not base.weight.is_floating_point():
            kind = str(base.weight.dtype).removeprefix("torch.")
            return f"{name} has packed ({kind}) weights"
        if not isinstance(base, torch.nn.Linear):
            return f"{name} is a {type(base).__name__}, no linear layer"
        if base.weight is embedding:
            return (
                f"{name} has its weight in common with the embedding, which merging would change "
                "as well"
            )
    return ""


@contextmanager
def merged_into(layers: dict[str, Any], dtype: torch.dtype) -> Iterator[None]:
    """Have each layer compute for a while with W + scaling x B A, rounded to a type.

    The sum is made anew in each pass, so no second model is needed, and nothing is left merged.
    """
    for module in layers.values():
        module.forward = partial(forward_merged, module, dtype)
    try:
        yield
    finally:
        for module in layers.values():
            del module.forward  # that of its class is seen again


def forward_merged(module: Any, dtype: torch.dtype, rows: torch.Tensor) -> torch.Tensor:
    """Return what a layer with LoRA would if its update were merged into weights of this type."""
    base = module.get_base_layer()
    weight = base.weight.float() + module.get_delta_weight("default").float()
    bias = None if base.bias is None else base.bias.to(rows.dtype)
    return torch.nn.functional.linear(rows, weight.to(dtype).to(rows.dtype), bias)


def measure_updates(model: peft.PeftModel) -> dict[str, list[dict[str, Any]]]:
    """Return for each target one row per layer: the update's size and its number of directions.

    "update" is |scaling x B A| / |W| (Frobenius norms), and "directions" how many of the strongest
    hold 90 % of its square. Of an adapter that is more than A and B there is nothing.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    if not can_scale_and_cut(model):
        return found
    for path, module in lora_layers(model).items():
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        r, scaling = module.r["default"], module.scaling["default"]
        saved = Module(path, a.detach(), b.detach(), ("", ""), r, scaling)
        weight = dequantize_module_weight(module.get_base_layer())  # of 4 bits, perhaps
        size = torch.linalg.vector_norm(weight, dtype=torch.float64).item()
        # The layer is None outside the layers, as for lm_head.
        row = {"layer": saved.layer, "update": saved.norm / size, "directions": saved.directions}
        found.setdefault(saved.target, []).append(row)
    return found
