"""What an adapter's folder holds: modules with A, B and a scaling; what is wrong, what is more.

`info`, `evidence` and `export` judge an adapter here, each for its own ends and from one table.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pydantic
import torch

from inspect_lora.common import InspectError, counted, join_limited, one_line
from inspect_lora.files import PREFIX, name_in_text_model, read_adapter_config, read_tensors


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
            f"The file is damaged: of {counted(len(damaged), 'module')} A or B is missing or is no "
            f"matrix of numbers ({join_limited(damaged, 3, ', ')})."
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


# ---- What is wrong with it


def problems_of(saved: SavedAdapter) -> list[str]:
    """Return a sentence for each thing that makes an adapter useless or wrong."""
    modules, tensors = saved.modules, saved.tensors
    if not modules:
        return [
            f"There is nothing of LoRA in the file: no name is like {PREFIX}... .lora_A.weight; "
            f"there are {join_limited(list(tensors), 2, ', ')}. Perhaps another library than PEFT "
            "wrote it."
        ]
    problems = []
    unfit = [one for one in modules if not one.fits]
    if unfit:
        problems.append(
            f"The shape of {counted(len(unfit), 'module')} does not fit the configuration, so PEFT "
            f"cannot load them: A of {unfit[0].name} has {unfit[0].a.shape[0]} rows and B "
            f"{unfit[0].b.shape[1]} columns, where adapter_config.json says r = {unfit[0].r}. "
            "Either r or rank_pattern was edited, or the two files are of two adapters."
        )
    places = Counter(name_in_text_model(name) for name in tensors)
    doubled = [place for place, count in places.items() if count > 1]
    if doubled:
        problems.append(
            f"The file holds {counted(len(doubled), 'tensor')} twice, under two names of one place "
            f"({doubled[0]}): which of them counts depends on the program."
        )
    damaged = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if damaged:
        problems.append(
            f"There is NaN or infinity in {len(damaged)} of the {len(tensors)} tensors "
            f"({join_limited(damaged, 2, ', ')}), so the model's replies will be noise. The "
            "training diverged, as it often does in float16, or the file was damaged. Take an "
            "earlier checkpoint, or train again in bfloat16 or float32, or at a lower rate."
        )
    limits = torch.finfo(torch.float32)
    beyond = [m for m in modules if not m.is_zero and (m.norm < limits.tiny or m.norm > limits.max)]
    if beyond:
        problems.append(
            f"The update of {counted(len(beyond), 'module')}, such as {beyond[0].name}, is too "
            f"{'large' if beyond[0].norm > 1 else 'small'} to be computed in float32: its size is "
            f"{beyond[0].norm:.2g}. The file or lora_alpha was damaged."
        )
    if all(one.is_zero for one in modules) and not saved.others:
        problems.append(
            f"Every {what_is_zero(modules)} is 0, so the adapter changes nothing. LoRA begins with "
            "B = 0 (of an embedding A = 0): it was saved before it was trained, or the optimizer "
            "never had these weights."
        )
    return problems


def what_is_zero(modules: list[Module]) -> str:
    """Return "A", "B" or "A or B": what is 0 in modules whose updates are 0."""
    zeros = [part for part in "ab" if not any(getattr(one, part).any() for one in modules)]
    return zeros[-1].upper() if zeros else "A or B"


# ---- What is more than the update scaling x B A on matrices

# Ways to begin that take something from the base's weights; "eva" needs data alone.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What makes LoRA another kind of it, if it is set: KaSA changes the base's own weights, too.
OTHER_KINDS = ("kasa_config", "velora_config", "monteclora_config", "use_bdlora", "megatron_config")
KNOWN_KEYS = {
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping",
    "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "kasa_config",
    "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters",
    "task_type", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "use_rslora",
    "velora_config",
}  # fmt: skip


def extras_of(saved: SavedAdapter) -> list[tuple[tuple[str, ...], str]]:
    """Return what an adapter is beyond the update scaling x B A on matrices.

    Returns:
        Of each thing what it prevents, and a clause that goes on from "It". It may prevent
        "measuring" at all, taking into "parts", and "scaling" (cutting and exporting, too).
    """
    config, names = saved.config, list(saved.tensors)
    start, bias = str(config.get("init_lora_weights")), config.get("bias", "none")
    task, is_dora = config.get("task_type") or "CAUSAL_LM", bool(config.get("use_dora"))
    lengths = [name for name in names if ".lora_magnitude_vector" in name]
    biases = [name for name in names if name.endswith(".lora_B.bias")]
    whole = [name for name in names if ".lora_" not in name and name.startswith(PREFIX)]
    megabytes = sum(saved.tensors[name].nbytes for name in whole) / 1e6
    known = {*lengths, *biases, *whole}.union(*(one.names for one in saved.modules))
    unknown = [key for key in OTHER_KINDS if config.get(key)]
    unknown += [name for name in names if name not in known]
    tokens = config.get("trainable_token_indices")
    has_tokens = any("trainable_tokens" in name for name in names)
    outside = [one for one in saved.modules if is_left_out(config, one)]
    outside = [one.name for one in outside if not one.is_zero]  # others would change nothing
    are_matrices = all(saved.tensors[name].dim() == 2 for m in saved.modules for name in m.names)
    has_embeddings = any("lora_embedding_" in name for name in names)
    is_elsewhere = has_embeddings or bool(config.get("target_parameters"))
    rows = [
        (
            ("measuring", "scaling"),
            start.lower().startswith(CHANGES_THE_BASE),
            f"began with init_lora_weights = {start}, which changed the base model's own weights: "
            "on the plain base, as in other programs, it is wrong. PEFT's save_pretrained makes "
            "plain LoRA of it (path_initial_model_for_weight_conversion)",
        ),
        (
            ("measuring", "scaling"),
            bias != "none",
            f"trained biases of the base (bias = {bias}), which stay changed where it is switched "
            "off, and which vLLM refuses",
        ),
        (
            ("measuring", "scaling"),
            bool(lengths) and not is_dora,
            "holds lora_magnitude_vector, as DoRA does, but use_dora is not set, so PEFT leaves "
            "these out without a word",
        ),
        (
            ("measuring", "scaling"),
            bool(unknown),
            f"has what is of a kind of LoRA that is not understood here ({listed(unknown)})",
        ),
        (
            ("measuring", "scaling"),
            bool(tokens) and not has_tokens,
            "trained single tokens (trainable_token_indices), but its file does not hold them, so "
            "PEFT cannot load it",
        ),
        (
            (),
            not config.keys() <= KNOWN_KEYS,
            "has keys in adapter_config.json that PEFT 0.21 does not know and leaves out: "
            f"{', '.join(sorted(config.keys() - KNOWN_KEYS))}",
        ),
        (
            ("measuring", "scaling"),
            bool(outside),
            f"holds {counted(len(outside), 'module')} outside target_modules, or in the layers or "
            f"modules that are excluded ({listed(outside)}). PEFT does not apply them, mostly "
            "without a word; other programs do",
        ),
        (("measuring",), task != "CAUSAL_LM", f"is for another task than replying ({task})"),
        (
            ("measuring",),
            bool(config.get("layer_replication")),
            "repeats layers (layer_replication), so it needs another model than its base",
        ),
        (
            ("measuring",),
            bool(config.get("alora_invocation_tokens")),
            "is an activated LoRA, which works only after its invocation tokens, and none are sent "
            "here",
        ),
        (
            ("measuring",),
            is_dora and len(lengths) < len(saved.modules),
            f"is DoRA of {counted(len(saved.modules), 'module')}, but its file holds "
            f"lora_magnitude_vector of {len(lengths)}: PEFT takes the base's own lengths instead",
        ),
        (
            ("parts", "scaling"),
            bool(whole),
            f"holds {counted(len(whole), 'whole tensor')} besides LoRA ({listed(whole)}; "
            f"{megabytes:.1f} MB), for the base's own. vLLM does not serve such an adapter; merge "
            "it into its base",
        ),
        (
            ("scaling",),
            is_dora,
            "is DoRA: the length of each row of W was trained as well, so B A is not the whole "
            "update. vLLM refuses DoRA; merge it into its base to serve it",
        ),
        (("scaling",), bool(biases), "has biases of B (lora_bias), which vLLM refuses"),
        (
            ("scaling",),
            is_elsewhere or not are_matrices,
            "has LoRA on other things than linear layers: embeddings, convolutions, or experts "
            "that share A or B",
        ),
        (
            ("scaling",),
            any(".default." in name for name in names),
            "has the names of a state_dict(), with .default. in them, which PEFT finds only if it "
            "calls the adapter so, and others not at all; write it with save_pretrained()",
        ),
    ]
    return [(prevents, clause) for prevents, is_so, clause in rows if is_so]


def listed(names: list[str]) -> str:
    """Return the first names in a few words."""
    return join_limited([name.removeprefix(PREFIX) for name in names], 2, ", ")


def reasons_against(action: str, saved: SavedAdapter) -> list[str]:
    """Return what prevents "measuring", taking into "parts" or "scaling", as extras_of() says."""
    return [what for prevents, what in extras_of(saved) if action in prevents]


def is_left_out(config: dict[str, Any], module: Module) -> bool:
    """Return whether PEFT puts no LoRA on a module (its check_target_module_exists).

    The names may be those of the file or those of the text model; PEFT is called for either.
    """
    wanted, layers = config.get("target_modules"), config.get("layers_to_transform")
    paths = (module.name, path_in_text_model(module.name))
    if any(is_named(config.get("exclude_modules") or [], path) for path in paths):
        return True
    if not wanted or wanted == "all-linear" or config.get("target_parameters"):
        return False  # as far as can be known without the model
    layers = [layers] if isinstance(layers, int) else layers
    is_by_name = not isinstance(wanted, str) and not any(path in wanted for path in paths)
    if is_by_name and layers and module.layer not in layers:
        return True
    return not any(is_named(wanted, path) for path in paths)


def path_in_text_model(name: str) -> str:
    """Return a module's path where the text model is loaded alone."""
    return name_in_text_model(PREFIX + name).removeprefix(PREFIX)


def is_named(names: str | Collection[str], path: str) -> bool:
    """Return whether a regular expression fits a path, or one of several names is its end."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, path))
    return any(f".{path}".endswith(f".{name}") for name in names)
