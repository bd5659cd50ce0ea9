"""What an adapter's folder holds: its configuration, and modules with A, B and a scaling."""

from __future__ import annotations

import functools
import itertools
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pydantic
import torch

from inspect_lora.common import InspectError, join_limited, one_line, pluralize
from inspect_lora.files import PREFIX, read_adapter_config, read_tensors


@dataclass
class SavedAdapter:
    """What an adapter's folder holds, or would if a loaded one were saved."""

    config: dict[str, Any]  # see read_config()
    tensors: dict[str, torch.Tensor]  # under the names that the file has

    @functools.cached_property
    def modules(self) -> list[Module]:
        """Return its modules in the order of the layers."""
        return modules_of(self.config, self.tensors)

    @property
    def others(self) -> list[str]:
        """Return the names of the tensors that are neither A nor B."""
        return [name for name in self.tensors if not PARTS.match(name)]


def read_adapter(place: Path) -> SavedAdapter:
    """Return what an adapter's folder holds."""
    return SavedAdapter(read_config(place), read_tensors(place))


# ---- Its configuration


Positive = Annotated[float, pydantic.Field(strict=True, gt=0, lt=1e30)]
Rank = Annotated[int, pydantic.Field(strict=True, gt=0)]
Layer = Annotated[int, pydantic.Field(strict=True)]
Names = re.Pattern[str] | list[str]


class Checked(pydantic.BaseModel):
    """What must be so in an adapter_config.json, since it is computed with."""

    r: Rank
    lora_alpha: Positive
    rank_pattern: dict[re.Pattern[str], Rank]
    alpha_pattern: dict[re.Pattern[str], Positive]
    target_modules: Names = []
    exclude_modules: Names = []
    layers_to_transform: Layer | list[Layer] = []
    bias: str = "none"


NEVER_NULL = ("r", "lora_alpha", "bias")  # PEFT does not load them so
DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}


def read_config(place: Path) -> dict[str, Any]:
    """Return adapter_config.json with what an older PEFT left out, and without allowed nulls."""
    saved = read_adapter_config(place)
    given = {key: one for key, one in saved.items() if one is not None or key in NEVER_NULL}
    config = DEFAULTS | given
    try:
        Checked.model_validate(config)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise InspectError(
            f"{place / 'adapter_config.json'} is damaged: {first['loc'][0]}: {first['msg']} "
            f"(it is {one_line(repr(first['input']), 60)})."
        ) from error
    return config


# ---- Its modules


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
    def stack(self) -> str:
        """Return which layers it is in, such as "model.layers", or its own path."""
        found = IN_A_LAYER.match(self.name)
        return found["stack"] if found else self.name

    @property
    def layer(self) -> int | None:
        """Return the number of its layer, or None for what is in no layer."""
        return layer_number(self.name)

    @property
    def in_layer(self) -> str:
        """Return where it is in its layer, such as "self_attn.q_proj"."""
        return IN_A_LAYER.sub("", self.name)

    @property
    def is_of_vision(self) -> bool:
        """Return whether it belongs to the part of a model that reads images."""
        return "vision" in self.name or "visual" in self.name

    @property
    def is_finite(self) -> bool:
        """Return whether all numbers are numbers."""
        return is_finite(self.a) and is_finite(self.b)

    @property
    def is_zero(self) -> bool:
        """Return whether the update is 0, since A or B is; before training B is (or A, rarely)."""
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
        return (self.scaling * strongest_directions(self.a, self.b).sizes).square().tolist()

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


# PEFT's names. Those of a state_dict() have the adapter's name in them, which is mostly "default".
PARTS = re.compile(r"(?P<path>.+)\.lora_(?:embedding_)?(?P<part>[AB])(?:\.default)?(?:\.weight)?$")
# The first number in a path is the layer's; the number of an expert comes later.
IN_A_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d+)\.")


def layer_number(path: str) -> int | None:
    """Return the number of the layer that a module is in, from a path like model.layers.3.mlp."""
    found = IN_A_LAYER.match(path)
    return int(found["layer"]) if found else None


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
            f"adapter_model.safetensors is damaged: of {pluralize(len(damaged), 'module')} A or B "
            f"is missing or is no matrix of numbers ({join_limited(damaged, 3, ', ')}). Save the "
            "adapter anew, or take an earlier checkpoint."
        )
    modules = []
    for path, parts in found.items():
        a, b = tensors[parts["A"]], tensors[parts["B"]]
        r, alpha = rank_and_alpha(config, path)
        experts = max(1, a.shape[0] // r) if config.get("target_parameters") else 1
        names = (parts["A"], parts["B"])
        scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)  # arxiv 2312.03732
        # Of a convolution these have four dimensions; flattened, B A is the same update.
        modules.append(Module(path, a.flatten(1), b.flatten(1), names, r, scaling, experts))
    return sorted(modules, key=lambda one: -1 if one.layer is None else one.layer)


def is_matrix(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has rows and columns of real numbers; a convolution has more."""
    return tensor.dim() >= 2 and tensor.numel() > 0 and tensor.is_floating_point()


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all numbers are numbers, also in float32, which they are computed in."""
    return bool(tensor.float().isfinite().all())


def rank_and_alpha(config: dict[str, Any], path: str) -> tuple[int, float]:
    """Return the rank and the alpha of a module, by the name that it has in the file."""
    r = int(value_by_pattern(config["rank_pattern"], path, config["r"]))
    return r, value_by_pattern(config["alpha_pattern"], path, config["lora_alpha"])


def scaling_in_words(use_rslora: bool) -> str:
    """Return by what B A is multiplied, as a formula."""
    return "alpha / sqrt(r)" if use_rslora else "alpha / r"


def value_by_pattern(pattern: dict[str, float], path: str, default: float) -> float:
    """Return the value of the first key that matches the end of a path, as PEFT looks for it."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


class Directions(NamedTuple):
    """The directions of an update B A = U S V, the strongest first."""

    u: torch.Tensor  # out x rank
    sizes: torch.Tensor  # the singular values
    v: torch.Tensor  # rank x in


def strongest_directions(a: torch.Tensor, b: torch.Tensor, rank: int | None = None) -> Directions:
    """Return the strongest directions of an update B A, in float64; all, if no rank is given.

    With B = Q R and A^T = Q' R' it is B A = Q (R R'^T) Q'^T, so the r x r matrix R R'^T has the
    singular values of B A, and its singular vectors give those of B A. So B A itself, which has the
    size of W, is never formed. No approximation of that rank is closer to B A than these directions
    (Eckart and Young, 1936).
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, sizes, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return Directions(q_b @ u[:, :rank], sizes[:rank], v[:rank] @ q_a.T)


def share_kept(modules: list[Module], rank: int) -> float:
    """Return which share of an update's square its strongest directions make up, on average."""
    return statistics.fmean(
        sum(one.squares[:rank]) / sum(one.squares) for one in modules if one.norm > 0
    )
