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
from typing import Any

import peft
import torch
from peft.utils.integrations import dequantize_module_weight

from inspect_lora.adapters import can_scale_and_cut, can_take_apart, lora_layers, rescaled
from inspect_lora.modules import Module, layer_number, strongest_directions
from inspect_lora.scores import (
    FEWEST_LINES,
    UNKNOWN,
    Estimate,
    Losses,
    differences,
    errors_needed,
    is_conclusive,
    losses_of,
    ratio_with_error,
)
from inspect_lora.trainer import Example

STRENGTHS = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0)
# Both are shares of the gain. A clear difference that is smaller than the first is not worth a run.
# If no difference is clear, two losses are the same only if the difference and twice its error
# together are less than the second: otherwise the examples are too few to tell.
WORTH_REPORTING = 0.02
THE_SAME_WITHIN = 0.05
MORE = " (--examples 200 measures more, if the file has more)"


@dataclass
class Part:
    """The adapter, the base model, or a part of the adapter, with what was measured of it."""

    kind: str  # "whole", "base", "strength", "group", "target" or "cut"
    value: float | str  # the strength, the group's name, or the directions that are left
    title: str  # as it is called in the table
    change_model: Callable[[], AbstractContextManager[Any]]  # for a while
    loss: float = math.nan  # in nats a token
    of_gain: Estimate = UNKNOWN  # a share
    against_trained: Estimate = UNKNOWN
    gained: Estimate = UNKNOWN  # over the base
    better_on: int = 0  # examples
    losses: list[float] = field(default_factory=list)  # of each example, in nats a token

    def judge(self, losses: Losses, own: list[float]) -> None:
        """Compare its examples' losses, in nats, with those of the adapter and the base."""
        changes = differences(own, losses.trained)
        gained, gain = differences(losses.base, own), differences(losses.base, losses.trained)
        self.loss = sum(own) / sum(losses.tokens)
        self.of_gain = ratio_with_error(gained, gain, losses.lines)
        self.against_trained = ratio_with_error(changes, losses.tokens, losses.lines)
        self.gained = ratio_with_error(gained, losses.tokens, losses.lines)
        self.better_on = sum(change < 0 for change in changes)
        self.losses = [loss / n for loss, n in zip(own, losses.tokens, strict=True)]

    def verdict(self, comparisons: int = 1) -> str:
        """Return if it is "better" or "worse" than the whole, the "same", or "unclear".

        It was picked among so many parts.
        """
        share = self.of_gain
        is_large = abs(share.value - 1) > WORTH_REPORTING
        if is_large and self.against_trained.is_clear(errors_needed(comparisons)):
            return "better" if self.against_trained.value < 0 else "worse"
        largest = abs(share.value - 1) + 2 * share.error
        return "same" if largest < THE_SAME_WITHIN else "unclear"

    def share(self) -> str:
        """Return its share of the gain in a sentence, without the error."""
        return f"{100 * self.of_gain.value:.0f} %"

    def as_recorded(self) -> dict[str, Any]:
        """Return its row in evidence.json."""
        row = {key: value for key, value in vars(self).items() if key != "change_model"}
        estimates = ("of_gain", "against_trained", "gained")
        return row | {name: asdict(row[name]) for name in estimates}


def measure_parts(model: peft.PeftModel, examples: list[Example], losses: Losses) -> list[Part]:
    """Return the whole adapter, the base and each part, measured on these examples."""
    whole = Part("whole", 1.0, "as trained", nullcontext)
    without = Part("base", 0.0, "base model", model.disable_adapter)
    whole.judge(losses, losses.trained)
    without.judge(losses, losses.base)
    parts = parts_of(model)
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


# ---- What is concluded: at most a sentence each on alpha, the targets and r
#
# What each sentence may claim was tested by training the alternatives; docs/evidence.md shows how.


def of_kind(parts: list[Part], kind: str) -> list[Part]:
    """Return the parts of one kind."""
    return [part for part in parts if part.kind == kind]


def conclusions(parts: list[Part], losses: Losses) -> list[str]:
    """Return what the parts support, measured on the examples that these losses are of."""
    lines = len(set(losses.lines))
    if losses.trained == losses.base:
        return [
            "With the adapter and without it all losses are the same: it changes nothing. Perhaps "
            "it was saved before it was trained, when B is 0."
        ]
    if lines < FEWEST_LINES:
        return [
            f"The held-out lines are too few to tell anything: {lines} measured, "
            f"{FEWEST_LINES} needed{MORE}."
        ]
    if not is_conclusive(losses):
        return [about_no_gain(parts, losses.gain())]
    sentences = [about_alpha(parts), about_targets(parts), about_rank(parts)]
    return [sentence for sentence in sentences if sentence]


def about_no_gain(parts: list[Part], gain: Estimate) -> str:
    """Return the sentence on an adapter that is not clearly better than the base model.

    That the run went too far is said only if the same update, weaker, is clearly better than the
    base: an update that does harm does less of it when it is weaker, and that shows nothing.
    """
    strengths = of_kind(parts, "strength")
    needed = errors_needed(len(strengths))
    weaker = [part for part in strengths if float(part.value) < 1]
    is_too_strong = any(part.gained.value > 0 and part.gained.is_clear(needed) for part in weaker)
    so = "worse" if gain.is_clear() else "not better"
    if is_too_strong:
        return (
            f"The adapter is {so} than the base model, but the same update is better than it when "
            "it is weaker: it is too strong. Try `export --scale`, a shorter training, a lower "
            "learning rate or a smaller alpha. What its parts are worth cannot be said."
        )
    if gain.is_clear():
        return (
            "The adapter is worse than the base model, and no weaker update is clearly better. If "
            "the run's held-out losses rose at the end, it learned its conversations by heart: "
            "publish the best epoch, train fewer, or find more conversations. Else check that the "
            "held-out conversations are of the kind that was trained on, and that tokenizer and "
            "template are the training's."
        )
    return (
        "The adapter is not better than the base model by more than twice the error, so its parts "
        "say nothing. More steps, a higher learning rate or more held-out lines may help."
    )


def best_strength(parts: list[Part]) -> Part | None:
    """Return the strength with the lowest loss, of those that are clearly better if some are."""
    strengths = of_kind(parts, "strength")
    better = [part for part in strengths if part.verdict(len(strengths)) == "better"]
    return min(better or strengths, key=lambda part: part.loss, default=None)


def about_alpha(parts: list[Part]) -> str:
    """Return the sentence on the strength of the update."""
    strengths = of_kind(parts, "strength")
    best = best_strength(parts)
    if not best:
        return ""
    if best.verdict(len(strengths)) != "better":
        largest = max(part.of_gain.value + 2 * part.of_gain.error for part in strengths)
        if largest > 1 + THE_SAME_WITHIN:
            return (
                f"alpha: too few held-out replies to tell whether another strength is better{MORE}."
            )
        return (
            "alpha: no other strength of this update has a clearly lower loss (by over "
            f"{100 * WORTH_REPORTING:.0f} % of the gain)."
        )
    if float(best.value) < 1:
        so, advice = "strong", "a shorter training, a lower learning rate, a smaller alpha"
    else:
        so, advice = "weak", "a longer training, a higher learning rate, a larger alpha"
    return (
        f"alpha: at x {best.value:g} of its strength the same update has a lower loss "
        f"({100 * (best.of_gain.value - 1):.0f} % more of the gain), so it is too {so} for the "
        f"loss. Worth trying next: {advice}, or `export --scale {best.value:g}`."
    )


def about_targets(parts: list[Part]) -> str:
    """Return the sentence on attention, feed-forward, DeltaNet and any other group of targets."""
    groups = of_kind(parts, "group")
    if not groups:
        return ""
    verdicts = {part.value: part.verdict(len(groups)) for part in groups}
    enough = [part for part in groups if verdicts[part.value] in ("same", "better")]
    if enough:
        best = max(enough, key=lambda part: part.of_gain.value)
        return (
            f"targets: the update of {best.value} alone keeps {best.share()} of the "
            f"gain; what the other targets add is less than {100 * THE_SAME_WITHIN:.0f} % of it."
        )
    if "unclear" in verdicts.values():
        return f"targets: too few held-out replies to tell whether one group would do alone{MORE}."
    listed = ", ".join(f"{part.value} keeps {part.share()}" for part in groups)
    return f"targets: each group alone clearly loses some of the gain: {listed}."


def cut_that_is_enough(cuts: list[Part]) -> Part | None:
    """Return the shortest cut that keeps the gain, if one does; the cuts begin with the mildest."""
    verdicts = [part.verdict() for part in cuts]
    enough = None
    for part, verdict in zip(cuts, verdicts, strict=True):
        if verdict not in ("same", "better"):
            break  # a shorter cut that does well is chance
        enough = part
    loses_little = cuts[0].of_gain.value >= 1 - THE_SAME_WITHIN
    if enough is None and verdicts[0] == "worse" and loses_little:
        return cuts[0]  # it loses clearly, but too little to ask for a larger r
    return enough


def about_rank(parts: list[Part]) -> str:
    """Return the sentence on the number of directions that the update needs."""
    cuts = of_kind(parts, "cut")
    if not cuts:
        return ""
    enough = cut_that_is_enough(cuts)
    if enough:
        return (
            f"r: {enough.title}, its strongest, the update keeps {enough.share()} of the "
            "gain, so this adapter needs no more of them. Training with a smaller r is another "
            "run, and may end elsewhere."
        )
    if cuts[0].verdict() == "unclear":
        return f"r: too few held-out replies to tell how many directions are needed{MORE}."
    return (
        f"r: {cuts[0].title}, the update keeps only {cuts[0].share()} of the gain, so it "
        "uses all its directions; whether a larger r gains more, only another run can tell."
    )


def what_is_not_measured(model: peft.PeftModel) -> list[str]:
    """Return a sentence on parts that an adapter of another kind does not have."""
    if not can_take_apart(model):
        return ["More than LoRA was trained, so the adapter is not taken apart."]
    if not can_scale_and_cut(model):
        return ["This LoRA is more than the update scaling x B A, so it is neither scaled nor cut."]
    return []
