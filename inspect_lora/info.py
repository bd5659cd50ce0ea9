"""The command `info`: what an adapter's own files tell. It needs numpy and safetensors alone."""

import argparse
import json
import math
import os
import re
import statistics
import sys
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads that wait would double the time

from inspect_lora import adapter_file
from inspect_lora.adapter_file import Module, SavedAdapter
from inspect_lora.common import InspectError, aligned, one_line, read_json, say, some, wrapped

SCHEMA = 1  # of --json
WIDTH = 90  # of what is printed, in columns
WIDEST_MAP = 32  # signs
LEGEND = [
    "# an update  . none  0 it is 0  ! NaN  size: |update|, the median and the largest",
    "r90: how many of the r directions hold 90 % of the update's squared norm, mean",
]


def run(options: argparse.Namespace) -> int:
    """Print what each adapter is; return the highest status."""
    statuses = []
    for name in options.adapters:
        try:
            statuses.append(describe(name, options))
        except InspectError as error:
            print(error, file=sys.stderr)
            statuses.append(2)
    return max(statuses)


def describe(name: str, options: argparse.Namespace) -> int:
    """Print what an adapter is; return 1 if it is useless or wrong, or not served by --for."""
    saved = adapter_file.read_adapter(adapter_file.find_adapter(name))
    faults = adapter_file.faults_of(saved)
    base, reason = adapter_file.base_config(options.base or adapter_file.base_of(saved))
    is_applied, names = adapter_file.names_of(saved, base, reason)
    if faults and is_applied:  # what is applied is wrong or nothing
        is_applied, names = None, "no verdict on vLLM: mend the FAULT first"
    if options.json:
        print(json.dumps(as_object(saved, faults, is_applied), indent=1))
    else:
        print_sections(name, saved, faults, names)
    if options.server == "vllm" and is_applied is None and not faults:
        raise InspectError(one_line(f"{name}: its names are {names}", 400))
    return int(bool(faults) or (options.server == "vllm" and not is_applied))


def print_sections(name: str, saved: SavedAdapter, faults: list[str], names: str) -> None:
    """Print it on lines of at most WIDTH columns beside the section."""
    config, types = saved.config, sorted(set(saved.types.values()))
    numbers = sum(tensor.size for tensor in saved.tensors.values())
    scaling = "alpha / sqrt(r)" if config.get("use_rslora") else "alpha / r"
    say("adapter", [
        one_line(f"{name}: LoRA for {config.get('base_model_name_or_path')}", WIDTH),
        f"{numbers:,} numbers in {len(saved.modules)} modules, {some(types)}; "
        f"update = {scaling} x B A",
    ])  # fmt: skip
    trained_by = read_json(saved.place / "run.json")
    if trained_by:
        sessions = trained_by.get("sessions") or [{}]
        say("run", one_line(f"{trained_by.get('time')}  {sessions[-1].get('command')}", WIDTH))
    if saved.modules:
        say("targets", [*table_of_targets(saved.modules), *LEGEND])
    for section, text in facts_of(saved).items():
        say(section, one_line(text, WIDTH))
    say("names", wrapped(names))
    for fault in faults:
        say("FAULT", wrapped(one_line(fault, 2 * WIDTH)))


def table_of_targets(modules: list[Module]) -> list[str]:
    """Return a line for each target: in which layers it stands, and how large its updates are."""
    depth = 1 + max((mod.layer for mod in modules if mod.layer is not None), default=0)
    groups: dict[str, list[Module]] = {}
    for module in modules:
        groups.setdefault(re.sub(r"\.\d+\.", ".", module.path), []).append(module)
    each = math.ceil(depth / WIDEST_MAP)  # layers to a sign
    title = f"layers 0 to {depth - 1}" + (f", {each} a sign" if each > 1 else "")
    title = title.ljust(math.ceil(depth / each))
    rows = []
    for path, group in groups.items():
        of = "vision " if re.search("vision|visual", path) else ""
        signs = "".join(sign_of(group, range(n, n + each)) for n in range(0, depth, each))
        signs = signs if group[0].layer is not None else "in none"
        rows.append([f"{of}{group[0].target}", signs.ljust(len(title)), *numbers_of(group)])
    return aligned(["", title, "r", "scaling", "size", "largest", "r90"], rows)


def numbers_of(group: list[Module]) -> list[str]:
    """Return the ranks, scalings, sizes and directions of a target's modules."""
    known = [module for module in group if module.norm]
    norms = [module.norm for module in known] or [math.nan]
    directions = [module.directions_for_90 for module in known] or [math.nan]
    sizes = [f"{size:.3g}" for size in (statistics.median(norms), max(norms))]
    ranges = [span({mod.r for mod in group}), span({mod.scaling for mod in group})]
    return [*ranges, *sizes, f"{statistics.fmean(directions):.1f}"]


def span(numbers: set[float]) -> str:
    """Return the least and the greatest of some numbers, or the only one."""
    return "-".join(f"{number:.3g}" for number in dict.fromkeys((min(numbers), max(numbers))))


def sign_of(group: list[Module], layers: range) -> str:
    """Return the sign of a target in some layers: the worst that is the matter there."""
    modules = [module for module in group if module.layer in layers]
    if not modules:
        return "."
    if any(module.norm is None for module in modules):
        return "!"
    return "0" if all(module.is_zero for module in modules) else "#"


def facts_of(saved: SavedAdapter) -> dict[str, str]:
    """Return what its user should know, each by a word for it."""
    facts = {}
    zeros = [module.path for module in saved.modules if module.is_zero]
    if zeros:
        facts["zero"] = f"{len(zeros)} of {len(saved.modules)} updates are 0: {some(zeros)}"
    wanted = saved.config.get("target_modules")
    wanted = wanted if isinstance(wanted, list) else []  # or a regular expression
    paths = [f".{module.path}" for module in saved.modules]
    unused = [name for name in wanted if not any(path.endswith(f".{name}") for path in paths)]
    if unused:
        facts["unused"] = f"target_modules that led to no module: {some(unused)}"
    if saved.beyond_lora:
        facts["more"] = f"besides A and B: {some(saved.beyond_lora, 6)}"
    return facts


def as_object(saved: SavedAdapter, faults: list[str], is_applied: bool | None) -> dict[str, Any]:
    """Return what --json prints."""
    keys = ("path", "target", "layer", "r", "alpha", "scaling", "norm", "directions_for_90")
    keys += ("is_zero",)
    return {
        "schema": SCHEMA,
        "base": saved.config.get("base_model_name_or_path"),
        "types": sorted(set(saved.types.values())),
        "vllm_0_32_applies": is_applied,
        "modules": [{key: getattr(module, key) for key in keys} for module in saved.modules],
        "facts": facts_of(saved),
        "faults": faults,
    }
