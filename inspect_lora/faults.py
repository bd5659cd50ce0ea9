"""What is wrong with an adapter's files, and what is more in them than LoRA on matrices.

`info`, `evidence` and `export` judge an adapter here, each for its own ends and from one table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch

from inspect_lora.common import join_limited, pluralize
from inspect_lora.files import PREFIX, name_in_text_model, path_in_text_model
from inspect_lora.modules import Module, SavedAdapter, is_finite

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
            f"The shape of {pluralize(len(unfit), 'module')} does not fit the configuration, so "
            f"PEFT cannot load them: A of {unfit[0].name} has {unfit[0].a.shape[0]} rows and B "
            f"{unfit[0].b.shape[1]} columns, where adapter_config.json says r = {unfit[0].r}. "
            "Either r or rank_pattern was edited, or the two files are of two adapters."
        )
    places = Counter(name_in_text_model(name) for name in tensors)
    doubled = [place for place, count in places.items() if count > 1]
    if doubled:
        problems.append(
            f"The file holds {pluralize(len(doubled), 'tensor')} twice, under two names of one "
            f"place ({doubled[0]}): which of them counts depends on the program."
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
            f"The update of {pluralize(len(beyond), 'module')}, such as {beyond[0].name}, is too "
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
# What makes LoRA another kind of it, if it is set. KaSA changes the base's own weights, too; copied
# layers make another base; an activated LoRA works only after tokens that are not sent here.
OTHER_KINDS = ("kasa_config", "velora_config", "monteclora_config", "use_bdlora", "megatron_config")
OTHER_KINDS += ("layer_replication", "alora_invocation_tokens")
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
BOTH = ("measuring", "scaling")


class Extra(NamedTuple):
    """What an adapter is beyond the update scaling x B A on matrices."""

    # "measuring" at all, taking into "parts", or "scaling" (cutting and exporting, too)
    prevents: tuple[str, ...]
    clause: str  # that goes on from "It"


def extras_of(saved: SavedAdapter) -> list[Extra]:
    """Return what an adapter is beyond the update scaling x B A on matrices."""
    return [*extras_in_config(saved.config), *extras_in_names(saved), *extras_on_modules(saved)]


def extras_in_config(config: dict[str, Any]) -> Iterator[Extra]:
    """Yield what the configuration alone tells."""
    start, bias = str(config.get("init_lora_weights")), config.get("bias", "none")
    if start.lower().startswith(CHANGES_THE_BASE):
        yield Extra(
            BOTH,
            f"began with init_lora_weights = {start}, which changed the base model's own weights: "
            "on the plain base, as in other programs, it is wrong. PEFT's save_pretrained makes "
            "plain LoRA of it (path_initial_model_for_weight_conversion)",
        )
    if bias != "none":
        yield Extra(
            BOTH,
            f"trained biases of the base (bias = {bias}), which stay changed where it is switched "
            "off, and which vLLM refuses",
        )
    task = config.get("task_type") or "CAUSAL_LM"
    if task != "CAUSAL_LM":
        yield Extra(("measuring",), f"is for another task than replying ({task})")
    if config.get("use_dora"):
        yield Extra(
            ("scaling",),
            "is DoRA: the length of each row of W was trained as well, so B A is not the whole "
            "update. vLLM refuses DoRA; merge it into its base to serve it",
        )
    if unknown := sorted(config.keys() - KNOWN_KEYS):
        yield Extra(
            (),
            "has keys in adapter_config.json that PEFT 0.21 does not know and leaves out: "
            f"{', '.join(unknown)}",
        )


def extras_in_names(saved: SavedAdapter) -> Iterator[Extra]:
    """Yield what the names of the file's tensors tell, beside the configuration."""
    config, names = saved.config, list(saved.tensors)
    lengths = [name for name in names if ".lora_magnitude_vector" in name]
    biases = [name for name in names if name.endswith(".lora_B.bias")]
    whole = [name for name in names if ".lora_" not in name and name.startswith(PREFIX)]
    known = {*lengths, *biases, *whole}.union(*(one.names for one in saved.modules))
    unknown = [key for key in OTHER_KINDS if config.get(key)]
    unknown += [name for name in names if name not in known]
    if unknown:
        yield Extra(
            BOTH, f"has what is of a kind of LoRA that is not understood here ({listed(unknown)})"
        )
    wanted = len(saved.modules) if config.get("use_dora") else 0
    if len(lengths) < wanted or (lengths and not wanted):
        yield Extra(
            BOTH,
            f"holds lora_magnitude_vector, which DoRA trains, of {len(lengths)} of "
            f"{pluralize(len(saved.modules), 'module')}, and use_dora is {bool(wanted)}: without a "
            "word PEFT leaves out what is too many, and takes the base's own for what is missing",
        )
    if whole:
        megabytes = sum(saved.tensors[name].nbytes for name in whole) / 1e6
        yield Extra(
            ("parts", "scaling"),
            f"holds {pluralize(len(whole), 'whole tensor')} besides LoRA ({listed(whole)}; "
            f"{megabytes:.1f} MB), for the base's own. vLLM does not serve such an adapter; merge "
            "it into its base",
        )
    if biases:
        yield Extra(("scaling",), "has biases of B (lora_bias), which vLLM refuses")
    if any(".default." in name for name in names):
        yield Extra(
            ("scaling",),
            "has the names of a state_dict(), with .default. in them, which PEFT finds only if it "
            "calls the adapter so, and others not at all; write it with save_pretrained()",
        )


def extras_on_modules(saved: SavedAdapter) -> Iterator[Extra]:
    """Yield what is told by the places of the modules and by their shapes."""
    outside = [one for one in saved.modules if is_left_out(saved.config, one)]
    outside = [one.name for one in outside if not one.is_zero]  # others would change nothing
    if outside:
        yield Extra(
            BOTH,
            f"holds {pluralize(len(outside), 'module')} outside target_modules, or in the layers "
            f"or modules that are excluded ({listed(outside)}). PEFT does not apply them, mostly "
            "without a word; other programs do",
        )
    used = [name for one in saved.modules for name in one.names]
    has_others = any("lora_embedding_" in name or saved.tensors[name].dim() > 2 for name in used)
    if has_others or saved.config.get("target_parameters"):
        yield Extra(
            ("scaling",),
            "has LoRA on other things than linear layers: embeddings, convolutions, or experts "
            "that share A or B",
        )


def listed(names: list[str]) -> str:
    """Return the first names in a few words."""
    return join_limited([name.removeprefix(PREFIX) for name in names], 2, ", ")


def reasons_against(action: str, saved: SavedAdapter) -> list[str]:
    """Return what prevents "measuring", taking into "parts" or "scaling", as extras_of() says."""
    return [one.clause for one in extras_of(saved) if action in one.prevents]


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


def is_named(names: str | Collection[str], path: str) -> bool:
    """Return whether a regular expression fits a path, or one of several names is its end."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, path))
    return any(f".{path}".endswith(f".{name}") for name in names)
