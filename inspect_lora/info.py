"""`info`: what an adapter is, from its files alone, in seconds, whatever trainer made it.

Nothing is loaded but the adapter: no base model, no data, no GPU. Problems, which make an adapter
useless or wrong, give the exit status 1; notes, which its user should know, do not.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from inspect_lora.common import as_json, counted, join_limited, read_json, report
from inspect_lora.files import PREFIX, QUANTIZED_NAME, find_adapter, find_run, read_as_named
from inspect_lora.modules import PARTS, Module, modules_of, read_config, singular_values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder, or a name on the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(options: argparse.Namespace) -> None:
    """Print what an adapter is; exit with status 1 if it is useless or wrong."""
    place = find_adapter(options.adapter)
    config = read_config(place)
    tensors = read_as_named(place)
    facts = [measure(module) for module in modules_of(config, tensors)]
    problems = find_problems(facts, tensors)
    notes = [] if problems else find_notes(facts, config, tensors, place)
    if options.json:
        print(as_json(as_object(facts, config, tensors, problems, notes)), flush=True)
    else:
        show(options.adapter, place, facts, config, tensors)
        for section, sentences in (("problem", problems), ("note", notes)):
            for sentence in sentences:
                report(section, textwrap.fill(sentence, 90, break_on_hyphens=False))
        report("next", next_commands(options.adapter, place, bool(problems)))
    if problems:
        raise SystemExit(1)


# ---- What is measured


class Facts:
    """A module and what is measured of its update, scaling x B A."""

    def __init__(self, module: Module, values: list[float]) -> None:
        """Take the update's singular values; there are none where it cannot be measured."""
        self.module = module
        self.squares = [value * value for value in values]
        self.norm = math.sqrt(sum(self.squares)) if values else math.nan
        self.directions = directions_of(self.squares) if values else None

    @property
    def is_measured(self) -> bool:
        """Return whether the update has a size that is not 0."""
        return self.norm > 0


def measure(module: Module) -> Facts:
    """Return the size of a module's update, and how many directions hold most of it."""
    if not module.fits or not module.is_finite or module.experts > 1:
        return Facts(module, [])
    return Facts(module, singular_values(module).tolist())


def directions_of(squares: list[float]) -> int:
    """Return how many of the largest squares add up to 90 % of all, or 0 of an update that is 0."""
    total, sum_so_far = sum(squares), 0.0
    if total == 0:
        return 0
    for count, square in enumerate(squares, 1):
        sum_so_far += square
        if sum_so_far >= 0.9 * total:
            return count
    return len(squares)


def as_object(
    facts: list[Facts],
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    problems: list[str],
    notes: list[str],
) -> dict[str, Any]:
    """Return what --json prints."""
    return {
        "schema": 1,
        "base": config.get("base_model_name_or_path"),
        "r": config["r"],
        "alpha": config["lora_alpha"],
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "modules": [
            {
                "name": one.module.name,
                "target": one.module.target,
                "layer": one.module.layer,
                "r": one.module.r,
                "scaling": one.module.scaling,
                "norm": one.norm,
                "directions": one.directions,
                "is_finite": one.module.is_finite,
                "is_zero": one.module.is_zero,
            }
            for one in facts
        ],
        "problems": problems,
        "notes": notes,
    }


# ---- Problems: what makes an adapter useless or wrong


def find_problems(facts: list[Facts], tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return a sentence for each thing that makes the adapter useless or wrong."""
    if not facts:
        return [
            f"There is nothing of LoRA in the file: no name is like {PREFIX}... .lora_A"
            f".weight; there are {join_limited(list(tensors), 2, ', ')}. Perhaps another library "
            "than PEFT wrote it."
        ]
    problems = []
    unfit = [one.module for one in facts if not one.module.fits]
    if unfit:
        first = unfit[0]
        problems.append(
            f"{counted(len(unfit), 'module')} of {len(facts)} do not fit the configuration, so "
            f"PEFT cannot load them: A of {first.name} has {first.a.shape[0]} rows and B "
            f"{first.b.shape[1]} columns, where adapter_config.json says r = {first.r}. Either r "
            "or rank_pattern was edited, or the two files are of two adapters."
        )
    damaged = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if damaged:
        problems.append(
            f"There is NaN or infinity in {len(damaged)} of the {len(tensors)} tensors "
            f"({join_limited(damaged, 2, ', ')}), so the model's replies will be noise. The "
            "training diverged, as it often does in float16, or the file was damaged. Take an "
            "earlier checkpoint, or train again in bfloat16 or float32, or at a lower rate."
        )
    if all(one.module.is_zero for one in facts) and not others_than_lora(tensors):
        problems.append(
            "Every B is 0, so the adapter changes nothing: LoRA begins so, and this was saved "
            "before it was trained, or the optimizer never had these weights."
        )
    return problems


def others_than_lora(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of what is neither A nor B."""
    return [name for name in tensors if not PARTS.match(name)]


# ---- Notes: what its user should know


def find_notes(
    facts: list[Facts], config: dict[str, Any], tensors: dict[str, torch.Tensor], place: Path
) -> list[str]:
    """Return a sentence for each thing that the adapter's user should know."""
    notes = [
        note_on_unused_targets(facts, config),
        *notes_on_zeros(facts),
        note_on_missing(facts),
        note_on_norms(facts),
        *notes_on_what_is_more(config, tensors),
        note_on_names(facts, config, place),
        note_on_quantized_base(config),
        note_on_rank(facts),
    ]
    return [note for note in notes if note]


def note_on_unused_targets(facts: list[Facts], config: dict[str, Any]) -> str:
    """Return a note on names in target_modules that led to no module; PEFT does not tell."""
    wanted = config.get("target_modules")
    if not isinstance(wanted, list):
        return ""
    names = [f".{one.module.name}" for one in facts]
    unused = [str(one) for one in wanted if not any(name.endswith(f".{one}") for name in names)]
    if not unused:
        return ""
    return (
        f"target_modules names {', '.join(unused)}, but no module of that name was trained: the "
        "base has none, or it is misspelt. PEFT does not say so."
    )


def notes_on_zeros(facts: list[Facts]) -> list[str]:
    """Return notes on modules whose update is 0 though others are not, for each tower or stack."""
    stacks: dict[str, list[Module]] = {}
    for one in facts:
        stacks.setdefault(one.module.place[0], []).append(one.module)
    notes = []
    for stack, modules in stacks.items():
        zeros = [module for module in modules if module.is_zero]
        if len(zeros) == len(modules):
            size = sum(one.a.nbytes + one.b.nbytes for one in zeros) / 1e6
            whose = "the vision tower" if re.search("vis(ual|ion)", stack) else stack
            notes.append(
                f"All {counted(len(zeros), 'module')} of {whose} ({stack}) have B = 0: they were "
                f"never trained and change nothing, but are {size:.1f} MB of the file. A model of "
                "text alone has no place for them."
            )
        elif zeros:
            notes.append(
                f"{len(zeros)} of the {len(modules)} modules in {stack} have B = 0, so they change "
                f"nothing: {join_limited([one.name for one in zeros], 3, ', ')}."
            )
    return notes


def note_on_missing(facts: list[Facts]) -> str:
    """Return a note on layers that lack a target which layers like them have.

    A layer lacks one if its targets are some, but not all, of those that several layers share, and
    layers with so few are rare. That attention stands in every fourth layer alone, as in Qwen3.5,
    is the model's own form.
    """
    lacking = []
    for stack in {one.module.place[0] for one in facts if one.module.layer is not None}:
        targets: dict[int, set[str]] = {}
        for one in facts:
            if one.module.place[0] == stack and one.module.layer is not None:
                targets.setdefault(one.module.layer, set()).add(one.module.place[2])
        counts = Counter(map(frozenset, targets.values()))
        for layer, own in sorted(targets.items()):
            larger = [
                other
                for other, count in counts.items()
                if own < other and count > 1 and RARE * counts[frozenset(own)] <= count
            ]
            if larger:
                missing = sorted(min(larger, key=len) - own)
                lacking.append(f"layer {layer} lacks {join_limited(missing, 3, ', ')}")
    if not lacking:
        return ""
    text = join_limited(lacking, 3, "; ")
    return (
        f"In {counted(len(lacking), 'layer')} a target is missing that its neighbours have: {text}."
    )


RARE = 3  # times as many layers have the target


def note_on_norms(facts: list[Facts]) -> str:
    """Return a note on updates whose size is far from that of the same target in other layers."""
    groups: dict[tuple[str, str], list[Facts]] = {}
    for one in facts:
        if one.is_measured:
            groups.setdefault((one.module.place[0], one.module.target), []).append(one)
    far = []
    for group in groups.values():
        median = statistics.median(one.norm for one in group)
        for one in group if len(group) > 2 else []:
            if not median / 10 <= one.norm <= 10 * median:
                far.append(f"{one.module.name} ({one.norm / median:.2g} times)")
    if not far:
        return ""
    return (
        "Updates whose size is far from that of the same target in the other layers: "
        f"{join_limited(far, 3, ', ')}. Such a layer was damaged, merged or trained otherwise."
    )


def notes_on_what_is_more(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return notes on what the adapter is beyond A and B, and who does not take it."""
    notes = []
    others = others_than_lora(tensors)
    magnitudes = [name for name in others if ".lora_magnitude_vector" in name]
    whole = [name for name in others if ".lora_" not in name and name.startswith(PREFIX)]
    if config.get("use_dora") or magnitudes:
        notes.append(
            "It is DoRA: the length of each of W's columns was trained as well, so B A is not the "
            "whole update. vLLM refuses DoRA; merge it into its base to serve it."
        )
    if whole:
        size = sum(tensors[name].nbytes for name in whole) / 1e6
        notes.append(
            f"Besides LoRA the file holds {counted(len(whole), 'whole tensor')} "
            f"({join_limited([one.removeprefix(PREFIX) for one in whole], 2, ', ')}; "
            f"{size:.1f} MB), which take the place of the base's own. vLLM does not serve such an "
            "adapter; merge it into its base."
        )
    if any(name.endswith("lora_B.bias") for name in others):
        notes.append("Its B has biases (lora_bias), which vLLM refuses.")
    unknown = [name for name in others if not name.startswith(PREFIX) or ".default." in name]
    if unknown:
        notes.append(
            f"{counted(len(unknown), 'tensor')} ({join_limited(unknown, 2, ', ')}) have names that "
            "PEFT does not look for, so it leaves them out."
        )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGES_THE_BASE):
        notes.append(
            f"It began with init_lora_weights = {start}, which changed the base model's own "
            "weights. PEFT changes them again on loading; on the plain base, in other programs, "
            "the adapter is wrong."
        )
    return notes


# Ways to begin that subtract something from the base's weights; "eva" needs data alone.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def note_on_names(facts: list[Facts], config: dict[str, Any], place: Path) -> str:
    """Return a note on programs that look for other names than the tensors have.

    What is said of vLLM, PEFT and llama.cpp was seen with vLLM 0.17 to 0.33, PEFT 0.21 and
    llama.cpp b11434: docs/serving.md.
    """
    in_wrapper = [one.module for one in facts if "language_model." in one.module.name]
    if in_wrapper:
        return (
            f"The tensors are named for the model that also takes images ({in_wrapper[0].name}). "
            "vLLM applies them; PEFT on AutoModelForCausalLM ignores them with no more than a "
            "warning, and so do older llama.cpp converters."
        )
    is_certain = is_wrapper(str(config.get("base_model_name_or_path")))
    if is_certain is False:
        return ""
    beside = place.with_name("final_lora_vllm")
    is_beside = place.name == "final_lora" and beside.is_dir()
    return (
        f"The base {'is' if is_certain else 'seems to be'} a model that also takes images, but the "
        "tensors have the names of its text part alone. vLLM up to 0.32 accepts such an adapter "
        "and ignores it without a word. "
        + (f"Serve {beside}." if is_beside else "Serve what `export ADAPTER FOLDER --vllm` writes.")
    )


# Names of models that wrap a text model, for a base that is not on this machine.
WRAPPER_NAMES = re.compile(
    r"(?i)qwen3[._]?[56]|gemma-?3-(4b|12b|27b)|gemma-?(3n|4)|llama-?4|[-_]vl\b|mistral-small-3\.[1-9]"
)


def is_wrapper(base: str) -> bool | None:
    """Return whether a base model also takes images: True or False if its configuration is here.

    Otherwise None if its name suggests it, else False.
    """
    path: Any = Path(base) / "config.json"
    if not Path(base).is_dir() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(base, "config.json")
    config = read_json(Path(path)) if isinstance(path, (str, Path)) else None
    if config is not None:
        return "text_config" in config
    return None if WRAPPER_NAMES.search(base) else False


def note_on_quantized_base(config: dict[str, Any]) -> str:
    """Return a note on a base that is a quantized copy."""
    base = str(config.get("base_model_name_or_path"))
    if not QUANTIZED_NAME.search(base):
        return ""
    return (
        f"It was trained on {base}, a quantized copy. On the full model "
        f"({QUANTIZED_NAME.sub('', base)}) its replies may differ: measure it on the one that you "
        "serve."
    )


def note_on_rank(facts: list[Facts]) -> str:
    """Return a note on the smallest rank that keeps nearly all of the updates, if it is smaller."""
    measured = [one for one in facts if one.is_measured]
    if not measured or len(measured) < sum(not one.module.is_zero for one in facts):
        return ""
    largest = max(one.module.r for one in measured)
    total = sum(sum(one.squares) for one in measured)
    rank = 1
    while rank < largest:
        kept = sum(sum(one.squares[:rank]) for one in measured) / total
        if kept >= NEARLY_ALL:
            return (
                f"The {rank} strongest of {largest} directions hold {100 * kept:.0f} % of the "
                f"updates (by square). `export --rank {rank}` writes an adapter of these alone; "
                "`evidence` says what it would lose."
            )
        rank *= 2
    return ""


NEARLY_ALL = 0.95


# ---- What is printed


def show(
    name: str,
    place: Path,
    facts: list[Facts],
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Print the adapter's base, rank, scaling and size, and the map of its targets."""
    base = config.get("base_model_name_or_path") or "a base model that it does not name"
    revision = config.get("revision")
    lines = [f"{name}: LoRA for {base}" + (f" ({str(revision)[:12]})" if revision else "")]
    lines.append(scaling_in_words(facts, config))
    types = sorted({str(one.dtype).removeprefix("torch.") for one in tensors.values()})
    numbers = sum(one.numel() for one in tensors.values())
    size = (place / "adapter_model.safetensors").stat().st_size / 1e6
    lines.append(
        f"{numbers:,} numbers in {counted(len(facts), 'module')}, {', '.join(types)}, {size:.1f} MB"
    )
    report("adapter", "\n".join(lines))
    if facts:
        report("targets", "\n".join(map_of_targets(facts)))


def scaling_in_words(facts: list[Facts], config: dict[str, Any]) -> str:
    """Return rank and alpha, and what the updates are multiplied by."""
    text = f"r = {config['r']:g}, alpha = {config['lora_alpha']:g}"
    ranks = {one.module.r for one in facts}
    scalings = {one.module.scaling for one in facts}
    formula = "alpha / r"
    if config.get("use_rslora"):
        text += ", rsLoRA"
        formula = "alpha / sqrt(r)"
    if len(ranks) > 1 or len(scalings) > 1:
        return (
            f"{text}, and others by pattern: ranks {in_range(ranks)}\n"
            f"each update B A is multiplied by {formula} = {in_range(scalings)}"
        )
    text += f": each update B A is multiplied by {formula} = {in_range(scalings)}"
    if config.get("use_rslora"):
        text += f"\n(and not by alpha / r = {config['lora_alpha'] / config['r']:.4g})"
    return text


def in_range(numbers: set[float], to: str = " to ") -> str:
    """Return the least and the greatest of some numbers, or the only one."""
    least, greatest = min(numbers, default=math.nan), max(numbers, default=math.nan)
    return f"{least:.4g}" if least == greatest else f"{least:.4g}{to}{greatest:.4g}"


WIDEST_MAP = 40  # signs
SIGNS = {"#": "an update", ".": "none", "0": "one that is 0", "!": "NaN or infinity"}


def map_of_targets(facts: list[Facts]) -> list[str]:
    """Return the lines of a small map: which target stands in which layer, and how it is there."""
    numbers = [one.module.layer for one in facts if one.module.layer is not None]
    layers = max(numbers, default=0) + 1
    each = math.ceil(layers / WIDEST_MAP)  # layers to a sign
    head = f"layers 0 to {layers - 1}" if numbers else ""
    width = max(math.ceil(layers / each), len(head)) + 1
    columns = f"{{:<18}}{{:<{width}}}{{:>7}}{{:>10}}{{:>8}}{{:>9}}".format
    lines = [columns("", head, "rank", "scaling", "size", "90 % in")]
    several = len({one.module.place[0] for one in facts if one.module.layer is not None}) > 1
    groups: dict[tuple[str, str], list[Facts]] = {}
    for one in facts:
        stack = one.module.place[0] if one.module.layer is not None else ""
        groups.setdefault((stack, one.module.target), []).append(one)
    seen = ""
    for (stack, target), group in groups.items():
        tower = stack.split(".")[-2] if several and "." in stack else ""
        signs = "".join(sign_of(group, range(n, n + each)) for n in range(0, layers, each))
        seen += signs if stack else ""
        measured = [one for one in group if one.is_measured]
        lines.append(
            columns(
                f"{tower} {target}".strip()[-17:],
                signs if stack else "in none",
                in_range({one.module.r for one in group}, "-"),
                in_range({one.module.scaling for one in group}, "-"),
                f"{statistics.median(one.norm for one in measured):.3g}" if measured else "-",
                f"{statistics.fmean(one.directions for one in measured):.1f}" if measured else "-",
            )
        )
    signs = ", ".join(f"{sign} {meaning}" for sign, meaning in SIGNS.items() if sign in seen)
    stand = f" (one sign for {each} layers)" if each > 1 else ""
    legend = (
        f"{signs}{stand}; size: the length of the update, median of the layers; 90 % in: so many "
        "of its r directions hold nine tenths of its square, mean of the layers"
    )
    return lines + textwrap.wrap(legend, 90)


def sign_of(group: list[Facts], layers: range) -> str:
    """Return the sign of a target in some layers: the worst that is the matter with one of them."""
    here = [one.module for one in group if one.module.layer in layers]
    if not here:
        return "."
    if not all(module.is_finite for module in here):
        return "!"
    return "0" if all(module.is_zero for module in here) else "#"


def next_commands(name: str, place: Path, is_useless: bool) -> str:
    """Return what to type next."""
    command = "python -m inspect_lora"
    if is_useless:
        return f"{command} info ANOTHER    such as an earlier checkpoint of the same training"
    held_out = "" if find_run(place) else " --eval_file HELD_OUT.jsonl"
    return (
        f"{command} evidence {name}{held_out}\n"
        "    what it gained on conversations that it was not trained on, and by which part\n"
        f"{command} chat {name}"
    )
