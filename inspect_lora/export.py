"""Write a weaker, a smaller or a renamed copy of an adapter, from its files alone.

--scale multiplies every update, by lora_alpha alone: the tensors stay as they are. --rank keeps the
strongest directions of every update. --vllm writes the names of a model for images and text, such
as Qwen3.5: vLLM up to 0.32 accepts those of its text model, and ignores them without a word.
"""

import argparse
import json
import math
import shlex
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from inspect_lora import adapter_file, info
from inspect_lora.adapter_file import PREFIX, Module, SavedAdapter, read_adapter
from inspect_lora.common import InspectError, at_least, one_line, read_json, say, some, wrapped

# What goes along: the tokenizer with its chat template, and where the adapter comes from.
GOES_ALONG = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json")
GOES_ALONG += ("vocab.*", "merges.txt", "*.model", "learned.txt", "run.json")
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROUNDING = 2.0**-8  # of bfloat16, as a share of a matrix
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder, or a name on the hub")
    parser.add_argument("folder", metavar="FOLDER", help="a new folder to write into")
    parser.add_argument("--scale", type=float, default=1.0, help="of every update, such as 0.75")
    parser.add_argument("--rank", type=at_least(1), help="directions to keep of every update")
    parser.add_argument("--vllm", action="store_true", help="write the names that vLLM applies")


def run(options: argparse.Namespace) -> None:
    """Write the copy beside its place, verify what was written, and move it there."""
    place, folder = adapter_file.find_adapter(options.adapter), Path(options.folder)
    saved = read_adapter(place)
    refuse(options, saved)
    # The LoRA of a vision tower is 0 if only text was trained: vLLM need not have it.
    given = [one for one in saved.modules if not (options.vllm and one.is_zero)]
    modules = [changed(module, options) for module in given]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
            staging = Path(beside) / folder.name
            write(staging, saved, modules)
            verify(staging, modules)
            staging.rename(folder)
    except OSError as error:
        raise InspectError(
            f"{folder} cannot be written ({one_line(error)}): give a new folder."
        ) from error
    written = read_adapter(folder)
    say("written", f"{folder}: {len(modules)} modules")
    is_applied, why = info.names_of(written)
    say("names", wrapped(why))
    report = read_json(adapter_file.report_folder(options.adapter, place) / "evidence.json")
    if is_applied is not False:
        say("serve", serving_command(written, folder, report.get("on", {})))


def refuse(options: argparse.Namespace, saved: SavedAdapter) -> None:
    """Raise if what is asked for cannot be written."""
    if reasons := [*adapter_file.faults_of(saved), *saved.more]:
        raise InspectError(f"{saved.place} is more than A and B, or damaged: {some(reasons)}")
    if not 0 < options.scale <= 10:
        raise InspectError(f"--scale is {options.scale:g}; it must be above 0 and at most 10.")
    base = adapter_file.base_config(saved)
    if options.vllm and base and "text_config" not in base:
        raise InspectError("--vllm is of no use: the base is a text model, so its names are right.")


def changed(module: Module, options: argparse.Namespace) -> Module:
    """Return a module at another strength, with its strongest directions alone, or renamed."""
    module = replace(module, scaling=options.scale * module.scaling)
    if options.rank and options.rank < module.r:
        u, sizes, v = adapter_file.strongest_directions(module.a, module.b, options.rank)
        a, b = np.sqrt(sizes)[:, None] * v, u * np.sqrt(sizes)
        module = replace(module, a=a, b=b, r=len(sizes))
    if options.vllm:
        path = adapter_file.name_in_text_model(module.path)
        path = path.replace("model.layers.", "model.language_model.layers.", 1)
        module = replace(module, path=path)
    return module


def config_of(saved: SavedAdapter, modules: list[Module]) -> dict[str, Any]:
    """Return the configuration that gives each module its rank and scaling, some by patterns."""
    pairs = {}
    for one in modules:
        factor = math.sqrt(one.r) if saved.config.get("use_rslora") else one.r
        alpha = round(one.scaling * factor, 9)
        pairs[one.path] = (one.r, int(alpha) if alpha == int(alpha) else alpha)
    (r, alpha), _ = Counter(pairs.values()).most_common(1)[0]
    config = saved.config | {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {path: own for path, (own, _) in pairs.items() if own != r},
        "alpha_pattern": {path: own for path, (_, own) in pairs.items() if own != alpha},
    }
    if pairs.keys() != {one.path for one in saved.modules}:  # they have other names
        config["target_modules"] = sorted({one.target for one in modules})
    return config


def write(folder: Path, saved: SavedAdapter, modules: list[Module]) -> None:
    """Write an adapter in the type of the old one, with what goes along."""
    folder.mkdir()
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(config_of(saved, modules), indent=2), encoding="utf-8")
    kind = TYPES[saved.types[saved.modules[0].names[0]]]
    tensors = {}
    for one in modules:
        for part, values in (("A", one.a), ("B", one.b)):
            tensors[f"{PREFIX}{one.path}.lora_{part}.weight"] = torch.tensor(values, dtype=kind)
    path = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    shutil.copymode(config, path)  # else its owner alone reads it, and a server is another user
    for pattern in GOES_ALONG:
        for file in filter(Path.is_file, saved.place.glob(pattern)):
            shutil.copy2(file, folder)


def verify(folder: Path, modules: list[Module]) -> None:
    """Read the file again: each module must be there, with its scaling and its numbers."""
    found = {one.path: one for one in read_adapter(folder).modules}
    for one in modules:
        new = found.pop(one.path)
        pairs = ((new.a, one.a), (new.b, one.b))
        is_near = all(np.linalg.norm(a - b) <= ROUNDING * np.linalg.norm(b) for a, b in pairs)
        if not (is_near and new.fits and math.isclose(new.scaling, one.scaling, rel_tol=1e-6)):
            raise InspectError(
                f"{one.path} was not written as asked, so nothing is left there: a float16 file "
                "cannot hold all numbers."
            )
    assert not found, f"{sorted(found)} are too many"


def serving_command(written: SavedAdapter, folder: Path, on: dict[str, Any]) -> str:
    """Return the command for vLLM; on is what the report was measured on, if there is one."""
    config, largest = written.config, max(module.r for module in written.modules)
    base = on.get("base") or adapter_file.base_of(written) or "BASE"
    commit = on["commit"] if "base" in on else config.get("revision")
    revision = ["--revision", commit] if commit else []
    rank = next((rank for rank in VLLM_RANKS if rank >= largest), largest)
    words = ["vllm", "serve", base, *revision, "--enable-lora"]
    words += ["--max-lora-rank", str(rank), "--lora-modules", f"adapter={folder}"]
    kwargs = json.dumps({"enable_thinking": bool(on.get("enable_thinking"))})
    return shlex.join([*words, "--default-chat-template-kwargs", kwargs])
