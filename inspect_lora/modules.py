"""The modules that LoRA was added to, as an adapter's files have them: A, B, rank and scaling."""

from __future__ import annotations

import functools
import itertools
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inspect_lora.common import InspectError, counted, join_limited
from inspect_lora.files import PREFIX, is_finite, read_adapter_config


def read_config(place: Path) -> dict[str, Any]:
    """Return adapter_config.json with what an older PEFT left out, and without nulls.

    Its r, alpha and their patterns are what they must be.
    """
    saved = read_adapter_config(place)
    config = DEFAULTS | {key: value for key, value in saved.items() if value is not None}
    ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
    are_numbers = is_rank(config["r"]) and is_number(config["lora_alpha"])
    are_patterns = is_pattern(ranks) and is_pattern(alphas) and all(map(is_rank, ranks.values()))
    if not (are_numbers and are_patterns):
        raise InspectError(
            f"{place / 'adapter_config.json'} is damaged: r, lora_alpha and the values of "
            "rank_pattern and alpha_pattern must be numbers above 0 (ranks whole ones, none "
            "infinite), and the keys of the patterns regular expressions."
        )
    return config


# Ways to begin that take something from the base's weights; "eva" needs data alone.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}


def is_number(value: Any) -> bool:
    """Return whether value is a number above 0, and one that can be divided."""
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_one and 0 < value < LARGEST


LARGEST = 1e30


def is_rank(value: Any) -> bool:
    """Return whether value is a whole number above 0."""
    return is_number(value) and value == int(value)


def is_pattern(value: Any) -> bool:
    """Return whether value gives numbers by regular expressions, as rank_pattern does."""
    if not isinstance(value, dict) or not all(map(is_number, value.values())):
        return False
    try:
        return all(re.compile(key) for key in value)
    except re.error:
        return False


@dataclass
class Module:
    """One A and B of a file, and the scaling that PEFT gives their product."""

    name: str  # the module's path, as the file has it
    a: torch.Tensor  # r x in
    b: torch.Tensor  # out x r
    names: tuple[str, str]  # of the two tensors in the file
    r: int  # as the configuration says
    scaling: float
    experts: int = 1  # that share one A and B, each with r directions (target_parameters of PEFT)

    @property
    def target(self) -> str:
        """Return the last part of the path, such as q_proj."""
        return self.name.rpartition(".")[2]

    @property
    def place(self) -> tuple[str, int | None, str]:
        """Return the path in three parts, such as "model.layers", 7 and "self_attn.q_proj".

        The first number in a path is the layer's; the number of an expert comes later. What is in
        no layer, such as lm_head, has None.
        """
        found = re.fullmatch(r"(.*?)\.(\d+)\.(.+)", self.name)
        return (found[1], int(found[2]), found[3]) if found else (self.name, None, "")

    @property
    def stack(self) -> str:
        """Return which layers it is in, such as "model.layers", or its own path."""
        return self.place[0]

    @property
    def layer(self) -> int | None:
        """Return the number of its layer, or None for what is in no layer."""
        return self.place[1]

    @property
    def in_layer(self) -> str:
        """Return where it is in its layer, such as "self_attn.q_proj"."""
        return self.place[2]

    @property
    def is_finite(self) -> bool:
        """Return whether all numbers are numbers."""
        return is_finite(self.a) and is_finite(self.b)

    @property
    def is_zero(self) -> bool:
        """Return whether the update is 0, since B is (of an embedding A), as before training."""
        return not (self.a.any() and self.b.any())

    @property
    def fits(self) -> bool:
        """Return whether A and B have the rank of the configuration."""
        return self.a.shape[0] == self.b.shape[1] == self.r * self.experts

    @functools.cached_property
    def squares(self) -> list[float]:
        """Return the squares of the singular values of the update scaling x B A, largest first.

        There are none where the update cannot be computed.
        """
        if not self.fits or not self.is_finite or self.experts > 1:
            return []
        return singular_values(self).square().tolist()

    @property
    def norm(self) -> float:
        """Return the length of the update (its Frobenius norm), or NaN if it is not known."""
        return math.sqrt(sum(self.squares)) if self.squares else math.nan

    @property
    def directions(self) -> int | None:
        """Return how many directions hold 90 % of the update's square: 0 of one that is 0."""
        if not self.squares:
            return None
        so_far = itertools.accumulate(self.squares)
        missing = [part for part in so_far if part < 0.9 * sum(self.squares)]
        return len(missing) + 1 if self.norm else 0


PARTS = re.compile(r"(?P<path>.+)\.lora_(?:embedding_)?(?P<part>[AB])(?:\.weight)?$")


def modules_of(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> list[Module]:
    """Return the LoRA modules of a file in the order of its layers.

    Args:
        config: what read_config() returned.
        tensors: the file's, under the names that it has.
    """
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = PARTS.match(name.removeprefix(PREFIX))
        if match and name.startswith(PREFIX):
            found.setdefault(match["path"], {})[match["part"]] = name
    damaged = [
        path
        for path, parts in found.items()
        if len(parts) < 2 or not all(is_matrix(tensors[name]) for name in parts.values())
    ]
    if damaged:
        raise InspectError(
            f"The file is damaged: of {counted(len(damaged), 'module')} A or B is missing or is no "
            f"matrix of numbers ({join_limited(damaged, 3, ', ')})."
        )
    modules = []
    for path, parts in found.items():
        a, b = tensors[parts["A"]], tensors[parts["B"]]
        r, scaling = rank_and_scaling(config, path)
        experts = max(1, a.shape[0] // r) if config.get("target_parameters") else 1
        names = (parts["A"], parts["B"])
        # Of a convolution these have four dimensions; flattened, B A is the same update.
        modules.append(Module(path, a.flatten(1), b.flatten(1), names, r, scaling, experts))
    return sorted(modules, key=lambda one: -1 if one.layer is None else one.layer)


def is_matrix(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has rows and columns of real numbers; a convolution has more."""
    return tensor.dim() >= 2 and tensor.numel() > 0 and tensor.is_floating_point()


def rank_and_scaling(config: dict[str, Any], path: str) -> tuple[int, float]:
    """Return the rank of a module and the factor before its B A, as PEFT computes them.

    The factor is alpha / r, or alpha / sqrt(r) with rsLoRA (arxiv 2312.03732).
    """
    r = int(value_by_pattern(config["rank_pattern"], path, config["r"]))
    alpha = value_by_pattern(config["alpha_pattern"], path, config["lora_alpha"])
    return r, alpha / divisor_of(config)(r)


def divisor_of(config: dict[str, Any]) -> Callable[[float], float]:
    """Return the function of r by which alpha is divided."""
    return math.sqrt if config.get("use_rslora") else float


def value_by_pattern(pattern: dict[str, float], path: str, default: float) -> float:
    """Return the value of the first key that matches the end of a path, as PEFT looks for it."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def singular_values(module: Module) -> torch.Tensor:
    """Return the singular values of the update scaling x B A, the largest first.

    With B = Q R and A^T = Q' R', the r x r matrix R R'^T has those of B A, since multiplying by Q
    and Q' changes no lengths. So B A itself, which has the size of W, is never formed.
    """
    a, b = module.a.double(), module.b.double()
    product = torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
    return torch.linalg.svdvals(module.scaling * product)


def share_kept(modules: list[Module], rank: int) -> float:
    """Return which share of an update's square its strongest directions make up, on average."""
    return statistics.fmean(
        sum(one.squares[:rank]) / sum(one.squares) for one in modules if one.norm > 0
    )
