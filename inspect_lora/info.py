"""Say what an adapter is, from its own files, in seconds, whatever trainer made it.

No base model is loaded, and no data is needed. Problems are what makes an adapter useless or wrong:
the exit status is then 1. Notes are what its user should know: the status stays 0.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

from inspect_lora.common import (
    as_json,
    join_limited,
    pluralize,
    read_json,
    report,
    report_sentence,
    this_program,
)
from inspect_lora.faults import extras_of, is_named, problems_of, reasons_against, what_is_zero
from inspect_lora.files import (
    QUANTIZED_NAME,
    can_load_quantized,
    find_adapter,
    find_base,
    find_run,
    folder_to_serve,
    is_hub_name,
)
from inspect_lora.modules import Module, SavedAdapter, read_adapter, scaling_in_words, share_kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder, or a name on the hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(options: argparse.Namespace) -> None:
    """Print what an adapter is; exit with status 1 if it is useless or wrong."""
    place = find_adapter(options.adapter)
    saved = read_adapter(place)
    problems = problems_of(saved)
    notes = [] if problems else find_notes(place, saved)
    if options.json:
        print(as_json(as_object(saved, problems, notes)), flush=True)
    else:
        report("adapter", "\n".join(facts_of(options.adapter, saved)))
        if saved.modules:
            report("targets", "\n".join(map_of_targets(saved.modules)))
        if not problems and not reasons_against("measuring", saved):
            report_sentence("sound", what_is_sound(saved.modules))
        for section, sentences in (("problem", problems), ("note", notes)):
            for sentence in sentences:
                report_sentence(section, sentence)
        report("next", next_commands(options.adapter, place, saved.config, bool(problems)))
    if problems:
        raise SystemExit(1)


def as_object(saved: SavedAdapter, problems: list[str], notes: list[str]) -> dict[str, Any]:
    """Return what --json prints."""
    names = ["name", "target", "layer", "r", "scaling", "norm", "directions"]
    names += ["is_finite", "is_zero"]
    rows = [dict(zip(names, attrgetter(*names)(one), strict=True)) for one in saved.modules]
    return {
        "schema": 1,
        "base": saved.config.get("base_model_name_or_path"),
        "r": saved.config["r"],
        "alpha": saved.config["lora_alpha"],
        "parameters": sum(tensor.numel() for tensor in saved.tensors.values()),
        "modules": rows,
        "problems": problems,
        "notes": notes,
    }


# ---- Notes: what its user should know


def find_notes(place: Path, saved: SavedAdapter) -> list[str]:
    """Return a sentence for each thing that the adapter's user should know."""
    notes = [
        about_unused_targets(saved),
        *about_zeros(saved.modules),
        about_vision(saved.modules),
        about_missing_targets(saved.modules),
        about_sizes(saved.modules),
        *(f"It {one.clause}." for one in extras_of(saved)),
        about_names(place, saved),
        about_quantized_base(saved.config),
        about_smaller_rank(saved.modules),
    ]
    return [note for note in notes if note]


def grouped(modules: list[Module], key: Callable[[Module], Any]) -> dict[Any, list[Module]]:
    """Return the modules by what key() gives of them."""
    groups: dict[Any, list[Module]] = {}
    for module in modules:
        groups.setdefault(key(module), []).append(module)
    return groups


def about_unused_targets(saved: SavedAdapter) -> str:
    """Return a note on names in target_modules that led to no module; PEFT does not tell."""
    wanted = saved.config.get("target_modules")
    wanted = wanted if isinstance(wanted, list) else []  # or a regular expression
    unused = [one for one in wanted if not any(is_named([one], m.name) for m in saved.modules)]
    excluded = saved.config.get("exclude_modules") or []
    unused = [one for one in unused if not is_excluded(one, excluded)]
    if not unused:
        return ""
    return (
        f"target_modules names {', '.join(unused)}, but no module of that name was trained: the "
        "base has none, or it is misspelt. PEFT does not say so."
    )


def is_excluded(target: str, excluded: str | list[str]) -> bool:
    """Return whether exclude_modules names a target: as a whole name, not as a part of another.

    Of an expression it cannot be told, since no path of such a module is known: there the name is
    looked for, perhaps behind a backslash and a letter.
    """
    if isinstance(excluded, str):
        return bool(re.search(rf"(?:(?<!\w)|(?<=\\\w)){re.escape(target)}(?!\w)", excluded))
    return any(is_named([target], one) or is_named([one], target) for one in excluded)


def about_zeros(modules: list[Module]) -> list[str]:
    """Return notes on modules whose update is 0 though others are not."""
    notes = []
    for stack, members in grouped(modules, lambda one: one.stack).items():
        zeros = [one for one in members if one.is_zero]
        if zeros and len(zeros) == len(members):
            size = sum(one.a.nbytes + one.b.nbytes for one in zeros) / 1e6
            notes.append(
                f"{stack} has {what_is_zero(zeros)} = 0 everywhere: it was never trained and "
                f"changes nothing, but takes {size:.1f} MB of the file. (A model of text alone has "
                "no place for a vision tower.)"
            )
        elif zeros:
            notes.append(
                f"{len(zeros)} of the {len(members)} modules in {stack} change nothing, since "
                f"their {what_is_zero(zeros)} is 0: "
                f"{join_limited([one.name for one in zeros], 3, ', ')}."
            )
    return notes


def about_vision(modules: list[Module]) -> str:
    """Return a note on LoRA of a vision tower that was trained."""
    trained = [one.name for one in modules if one.is_of_vision and not one.is_zero]
    if not trained:
        return ""
    return (
        f"LoRA of the vision tower was trained, too: {pluralize(len(trained), 'module')}, such as "
        f"{trained[0]}. `evidence` and `chat` load the text model alone, so they refuse it."
    )


# So many times as many layers must have a target for the others to lack it.
LACKING_FROM = 3


def about_missing_targets(modules: list[Module]) -> str:
    """Return a note on layers that lack a target which layers like them have.

    A layer lacks one if its targets are some, but not all, of those that several layers share, and
    layers with so few are rare. That attention stands in every fourth layer alone, as in Qwen3.5,
    is the model's own form.
    """
    lacking = []
    in_layers = [one for one in modules if one.layer is not None]
    for members in grouped(in_layers, lambda one: one.stack).values():
        by_layer = grouped(members, lambda one: one.layer)
        targets = {n: frozenset(one.in_layer for one in some) for n, some in by_layer.items()}
        counts = Counter(targets.values())
        for number, own in targets.items():
            least = max(2, LACKING_FROM * counts[own])
            larger = [other for other in counts if own < other and counts[other] >= least]
            if larger:
                missing = sorted(min(larger, key=len) - own)
                lacking.append(f"layer {number} has no {join_limited(missing, 3, ', ')}")
    if not lacking:
        return ""
    return f"Some layers lack what their neighbours have: {join_limited(lacking, 3, '; ')}."


def about_sizes(modules: list[Module]) -> str:
    """Return a note on updates whose size is far from that of the same target in other layers."""
    far = []
    known = [one for one in modules if one.norm > 0]
    for group in grouped(known, lambda one: (one.stack, one.target)).values():
        median = statistics.median(one.norm for one in group)
        for one in group:
            if len(group) > 2 and not median / 10 <= one.norm <= 10 * median:
                far.append(f"{one.name} ({one.norm / median:.2g} times)")
    if not far:
        return ""
    return (
        "The size of some updates is far from that of the same target in the other layers: "
        f"{join_limited(far, 3, ', ')}. Were they damaged, merged, or trained otherwise?"
    )


def about_names(place: Path, saved: SavedAdapter) -> str:
    """Return a note on programs that look for other names than the tensors have.

    It was seen with vLLM 0.17 to 0.33, PEFT 0.21 and llama.cpp b11434.
    """
    in_multimodal = [one.name for one in saved.modules if "language_model." in one.name]
    if in_multimodal:
        return (
            f"The tensors are named for the model that also takes images ({in_multimodal[0]}). "
            "vLLM applies them; PEFT on AutoModelForCausalLM ignores them with no more than a "
            "warning, and older llama.cpp converters refuse or ignore them."
        )
    is_certain = takes_images(str(saved.config.get("base_model_name_or_path")))
    if is_certain is False:
        return ""
    serve = "Serve what `export ADAPTER FOLDER --vllm` writes."
    if folder_to_serve(place) != place:
        serve = f"Serve {folder_to_serve(place)}."
    return (
        f"The base {'is' if is_certain else 'seems to be'} a model that also takes images, but the "
        "tensors have the names of its text part alone. vLLM up to 0.32 accepts such an adapter "
        f"and ignores it without a word. {serve}"
    )


# Models that wrap a text model, known by their names if the base is not on this machine.
WRAPPER_NAMES = re.compile(
    r"(?i)qwen3[._]?[56]|gemma-?3-(4b|12b|27b)|gemma-?(3n|4)|llama-?4|-vl\b|mistral-small-3\.[1-9]"
)


def takes_images(base: str) -> bool | None:
    """Return whether a base wraps a text model in one for images, or None if only its name says so.

    Its configuration is asked, if that is a folder's or stored on this machine.
    """
    path: Any = Path(base) / "config.json"
    if not os.path.isdir(base) and is_hub_name(base):
        from huggingface_hub import try_to_load_from_cache

        with suppress(ValueError):  # the hub has no such name
            path = try_to_load_from_cache(base, "config.json")
    config = read_json(Path(path)) if isinstance(path, (str, Path)) else None
    if config is not None:
        return "text_config" in config
    return None if WRAPPER_NAMES.search(base) else False


def about_quantized_base(config: dict[str, Any]) -> str:
    """Return a note on a base that is a quantized copy."""
    base = str(config.get("base_model_name_or_path"))
    plain = QUANTIZED_NAME.sub("", base)
    if plain == base:
        return ""
    return (
        f"It was trained on {base}, a quantized copy. On the full model ({plain}) its replies may "
        "differ: measure it on the one that you serve."
    )


NEARLY_ALL = 0.95


def about_smaller_rank(modules: list[Module]) -> str:
    """Return a note on the smallest rank that keeps nearly all of the updates, if there is one."""
    largest = max((one.r for one in modules if one.norm > 0), default=1)
    ranks = [2**n for n in range(10) if 2**n < largest]
    enough = [rank for rank in ranks if share_kept(modules, rank) >= NEARLY_ALL]
    if not enough:
        return ""
    kept = 100 * share_kept(modules, enough[0])
    return (
        f"Of {largest} directions the strongest {enough[0]} make up {kept:.0f} % of an update, on "
        f"average (by square). `export --rank {enough[0]}` writes an adapter of these alone; "
        "`evidence` says what it would lose."
    )


# ---- What is printed


def facts_of(name: str, saved: SavedAdapter) -> list[str]:
    """Return lines on the adapter's base, rank, scaling and size."""
    config, tensors = saved.config, saved.tensors.values()
    base = config.get("base_model_name_or_path") or "a base model that it does not name"
    revision = f" ({str(config['revision'])[:12]})" if config.get("revision") else ""
    types = sorted({str(one.dtype).removeprefix("torch.") for one in tensors})
    size = sum(one.nbytes for one in tensors) / 1e6
    return [
        f"{name}: LoRA for {base}{revision}",
        *scaling_of(saved),
        f"{sum(one.numel() for one in tensors):,} numbers in "
        f"{pluralize(len(saved.modules), 'module')}, {', '.join(types)}, {size:.1f} MB",
    ]


def scaling_of(saved: SavedAdapter) -> list[str]:
    """Return lines on rank and alpha, and on what the updates are multiplied by."""
    config = saved.config
    r, alpha, is_rslora = config["r"], config["lora_alpha"], bool(config.get("use_rslora"))
    ranks, scalings = ({getattr(m, name) for m in saved.modules} for name in ("r", "scaling"))
    several = len(ranks) > 1 or len(scalings) > 1
    by_pattern = f", and others by pattern (ranks {in_range(ranks, ' to ')})" if several else ""
    more = f", since it is rsLoRA (alpha / r = {alpha / r:.4g})" if is_rslora else ""
    return [
        f"r = {r:g}, alpha = {alpha:g}{by_pattern}",
        f"each update B A is multiplied by {scaling_in_words(is_rslora)} = "
        f"{in_range(scalings, ' to ')}{more}",
    ]


def in_range(numbers: set[float], to: str) -> str:
    """Return the least and the greatest of some numbers, or the only one."""
    least, greatest = min(numbers, default=math.nan), max(numbers, default=math.nan)
    return f"{least:.4g}" if least == greatest else f"{least:.4g}{to}{greatest:.4g}"


WIDEST_MAP = 36  # signs
SIGNS = {"#": "an update", ".": "none", "0": "one that is 0", "!": "NaN or infinity"}


def map_of_targets(modules: list[Module]) -> list[str]:
    """Return a small map: which target stands in which layer, and how large its updates are."""
    layers = 1 + max((one.layer for one in modules if one.layer is not None), default=0)
    each = math.ceil(layers / WIDEST_MAP)  # layers to a sign
    head = f"layers 0 to {layers - 1}"
    width = max(math.ceil(layers / each), len(head)) + 1
    columns = f"{{:<17}} {{:<{width}}}{{:>6}}{{:>9}}{{:>8}}{{:>11}}".format
    lines = [columns("", head, "rank", "scaling", "size", "directions")]
    several = len({one.stack for one in modules if one.layer is not None}) > 1
    seen = ""
    for stack, members in grouped(modules, lambda one: one.stack).items():
        is_in_layers = members[0].layer is not None
        lines += [f"{stack}:"] if several and is_in_layers else []
        for target, group in grouped(members, lambda one: one.target).items():
            signs = "in none"
            if is_in_layers:
                signs = "".join(sign_of(group, range(n, n + each)) for n in range(0, layers, each))
                seen += signs
            lines.append(columns(target, signs, *numbers_of(group)))
    signs = ", ".join(f"{sign} {meaning}" for sign, meaning in SIGNS.items() if sign in seen)
    stand = f" (one sign for {each} layers)" if each > 1 else ""
    legend = (
        f"{signs}{stand}; size: Frobenius norm of the update scaling x B A, median of "
        "the layers (`evidence` compares it with W); directions: how many of the r hold 90 % of "
        "the update (by square), mean of the layers"
    )
    return lines + textwrap.wrap(legend, 90)


def numbers_of(group: list[Module]) -> tuple[str, str, str, str]:
    """Return the ranks, scalings, norms and directions of a target's modules."""
    ranks, scalings = {one.r for one in group}, {one.scaling for one in group}
    known = [one for one in group if one.norm > 0]
    norm = f"{statistics.median(one.norm for one in known):.3g}" if known else "-"
    directions = f"{statistics.fmean(one.directions for one in known):.1f}" if known else "-"
    return in_range(ranks, "-"), in_range(scalings, "-"), norm, directions


def sign_of(group: list[Module], layers: range) -> str:
    """Return the sign of a target in some layers: the worst that is the matter with one of them."""
    here = [one for one in group if one.layer in layers]
    if not here:
        return "."
    if not all(one.is_finite for one in here):
        return "!"
    return "0" if all(one.is_zero for one in here) else "#"


def what_is_sound(modules: list[Module]) -> str:
    """Return a sentence on an adapter without problems; a note may tell which updates are 0."""
    checked = ["every matrix is finite", "all shapes fit"]
    if not any(one.is_zero for one in modules):
        checked.insert(1, "none that should be trained is 0")
    return f"Nothing wrong was found in the file: {', '.join(checked)}."


def base_to_give(base: str) -> str:
    """Return the flag for the base that `evidence` would ask for, if it would refuse this one."""
    if not base:
        return " --base BASE"
    if not os.path.isdir(base):
        plain = QUANTIZED_NAME.sub("", base)
        is_refused = plain != base and not can_load_quantized("bnb" in base.lower())
        return f" --base {shlex.quote(plain)}" if is_refused else ""
    how = (read_json(Path(base) / "config.json") or {}).get("quantization_config")
    by = how.get("quant_method") if isinstance(how, dict) else None
    is_refused = how and not can_load_quantized(by == "bitsandbytes")
    return " --base FULL_PRECISION_BASE" if is_refused else ""


def next_commands(name: str, place: Path, config: dict[str, Any], is_useless: bool) -> str:
    """Return what to type next."""
    if is_useless:
        return f"{this_program()} info ANOTHER    such as an earlier checkpoint of this training"
    run = find_run(place)
    flags = "" if run else " --eval_file HELD_OUT.jsonl"
    flags += base_to_give(find_base(config, place, run, config.get("revision")))
    return (
        "# What did it gain on conversations that it was not trained on, and by which part?\n"
        f"{this_program()} evidence {shlex.quote(name)}{flags}"
    )
