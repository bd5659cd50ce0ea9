"""Say what an adapter is, from its own files, whatever trainer made it.

It needs numpy and safetensors alone. The status is 1 if something makes the adapter useless or
wrong, such as NaN.
"""

import argparse
import json
import math
import re
import statistics
from typing import Any

from inspect_lora import adapter_file
from inspect_lora.adapter_file import Module, SavedAdapter
from inspect_lora.common import aligned, from_here, one_line, read_json, say, some, wrapped

MOST_LINES, WIDTH = 20, 90  # of what is printed: lines, and the width of each
WIDEST_MAP = 32  # signs
# Bases for images and text to which vLLM 0.32 does not apply the names of their text models, and
# what it refuses to load; both by its source.
IGNORED_BY_VLLM = ("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "gemma3")
REFUSED_BY_VLLM = {"use_dora", "lora_bias", "bias", "modules_to_save", "alora_invocation_tokens"}
LEGEND = [
    "# an update  . none  0 it is 0  ! NaN  size: |update|, the median and the largest",
    "r90: how many of the r directions hold 90 % of the update's squared norm, mean",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder, or a name on the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(options: argparse.Namespace) -> None:
    """Print what an adapter is; exit with status 1 if it is useless or wrong."""
    saved = adapter_file.read_adapter(adapter_file.find_adapter(options.adapter))
    faults = adapter_file.faults_of(saved)
    if options.json:
        print(json.dumps(as_object(saved, faults), indent=1))
    else:
        print_sections(options.adapter, saved, faults)
    if faults:
        raise SystemExit(1)


def print_sections(name: str, saved: SavedAdapter, faults: list[str]) -> None:
    """Print it on at most MOST_LINES lines; of very many targets the last ones are left out."""
    config, types = saved.config, sorted(set(saved.types.values()))
    numbers = sum(one.size for one in saved.tensors.values())
    scaling = "alpha / sqrt(r)" if config.get("use_rslora") else "alpha / r"
    say("adapter", [
        one_line(f"{name}: LoRA for {config.get('base_model_name_or_path')}", WIDTH),
        f"{numbers:,} numbers in {len(saved.modules)} modules, {some(types)}; "
        f"update = {scaling} x B A",
    ])  # fmt: skip
    trained_by = read_json(saved.place / "run.json")
    if trained_by:
        say("run", one_line(f"{trained_by.get('time')}  {trained_by.get('command')}", WIDTH))
    more = [(key, [one_line(text, WIDTH)]) for key, text in facts_of(saved).items()]
    more.append(("names", wrapped(names_of(saved)[1])))
    more += [("FAULT", wrapped(one_line(fault, 2 * WIDTH))) for fault in faults]
    if saved.modules:
        others = 3 + len(LEGEND) + sum(len(lines) for _, lines in more)
        say("targets", [*table_of_targets(saved.modules, max(3, MOST_LINES - others)), *LEGEND])
    for section, lines in more:
        say(section, lines)


def table_of_targets(modules: list[Module], most_lines: int) -> list[str]:
    """Return a line for each target: in which layers it stands, and how large its updates are."""
    depth = 1 + max((one.layer for one in modules if one.layer is not None), default=0)
    groups: dict[str, list[Module]] = {}
    for one in modules:
        groups.setdefault(re.sub(r"\.\d+\.", ".", one.path), []).append(one)
    each = math.ceil(depth / WIDEST_MAP)  # layers to a sign
    title = f"layers 0 to {depth - 1}" + (f", {each} a sign" if each > 1 else "")
    title = title.ljust(math.ceil(depth / each))
    rows = []
    for path, group in groups.items():
        of = "vision " if re.search("vision|visual", path) else ""
        signs = "".join(sign_of(group, range(n, n + each)) for n in range(0, depth, each))
        signs = signs if group[0].layer is not None else "in none"
        rows.append([f"{of}{group[0].target}", signs.ljust(len(title)), *numbers_of(group)])
    lines = aligned(["", title, "r", "scaling", "size", "largest", "r90"], rows)
    if len(lines) > most_lines:
        lines[most_lines - 1 :] = [f"and {len(lines) - most_lines + 1} targets more: --json"]
    return lines


def numbers_of(group: list[Module]) -> list[str]:
    """Return the ranks, scalings, sizes and directions of a target's modules."""
    known = [one for one in group if one.norm]
    norms = [one.norm for one in known] or [math.nan]
    directions = [one.directions for one in known] or [math.nan]
    sizes = [f"{size:.3g}" for size in (statistics.median(norms), max(norms))]
    ranges = [span({one.r for one in group}), span({one.scaling for one in group})]
    return [*ranges, *sizes, f"{statistics.fmean(directions):.1f}"]


def span(numbers: set[float]) -> str:
    """Return the least and the greatest of some numbers, or the only one."""
    return "-".join(f"{number:.3g}" for number in dict.fromkeys((min(numbers), max(numbers))))


def sign_of(group: list[Module], layers: range) -> str:
    """Return the sign of a target in some layers: the worst that is the matter there."""
    here = [one for one in group if one.layer in layers]
    if not here:
        return "."
    if any(one.norm is None for one in here):
        return "!"
    return "0" if all(one.is_zero for one in here) else "#"


def facts_of(saved: SavedAdapter) -> dict[str, str]:
    """Return what its user should know, each by a word for it."""
    facts = {}
    zeros = [one.path for one in saved.modules if one.is_zero]
    if zeros:
        facts["zero"] = f"{len(zeros)} of {len(saved.modules)} updates are 0: {some(zeros)}"
    wanted = saved.config.get("target_modules")
    wanted = wanted if isinstance(wanted, list) else []  # or a regular expression
    paths = [f".{one.path}" for one in saved.modules]
    unused = [name for name in wanted if not any(path.endswith(f".{name}") for path in paths)]
    if unused:
        facts["unused"] = f"target_modules that led to no module: {some(unused)}"
    if saved.more:
        facts["more"] = f"besides A and B: {some(saved.more, 6)}"
    return facts


def names_of(saved: SavedAdapter) -> tuple[bool | None, str]:
    """Return whether vLLM up to 0.32 applies tensors of such names, None if not known, and why."""
    base = adapter_file.base_config(saved)
    is_text_model = bool(base) and "text_config" not in base
    if refused := REFUSED_BY_VLLM.intersection(saved.more):
        return False, f"vLLM refuses {some(sorted(refused))}: merge the adapter into its base"
    if any("language_model." in one.path for one in saved.modules):
        ours = "those of a model for images and text"
        if is_text_model:
            return False, f"{ours}, but the base is a text model: vLLM ignores them without a word"
        condition = "" if base else " if the base is such a model"
        return True if base else None, f"{ours}: vLLM applies them{condition}"
    if is_text_model:
        return True, "those of a text model, as the base is: vLLM applies them"
    if base and base.get("model_type") not in IGNORED_BY_VLLM:
        return None, "those of a text model; whether vLLM applies them to this base, `served` tells"
    images = "The base takes images, too:" if base else "If the base takes images, too (Qwen3.5),"
    beside = saved.place.resolve().with_name("final_lora_vllm")
    serve = from_here(beside) if beside.is_dir() else "what `export --vllm` writes"
    ignored = f"{images} vLLM up to 0.32 ignores them without a word; serve {serve}"
    return False if base else None, f"those of a text model. {ignored}"


def as_object(saved: SavedAdapter, faults: list[str]) -> dict[str, Any]:
    """Return what --json prints."""
    keys = ("path", "target", "layer", "r", "alpha", "scaling", "norm", "directions", "is_zero")
    return {
        "base": saved.config.get("base_model_name_or_path"),
        "types": sorted(set(saved.types.values())),
        "vllm_0_32_applies": names_of(saved)[0],
        "modules": [{key: getattr(one, key) for key in keys} for one in saved.modules],
        "facts": facts_of(saved),
        "faults": faults,
    }
