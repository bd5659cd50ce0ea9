"""The command `export`: copies of an adapter from its files alone, or a merged model."""

import argparse
import contextlib
import json
import math
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers

from inspect_lora import adapter_file, model
from inspect_lora.adapter_file import PREFIX, Module, SavedAdapter, read_adapter
from inspect_lora.common import InspectError, one_line, read_json, say, some, wrapped

# What goes along: the tokenizer with its chat template, and where the adapter comes from.
GOES_ALONG = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json")
GOES_ALONG += ("vocab.*", "merges.txt", "*.model", "learned.txt", "run.json")
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROUNDING = 2.0**-8  # of bfloat16, as a share of a matrix
# How far a merged model's logits may be from the adapter's on its base, as a share of what the
# adapter changes: the sum of W and the update is rounded to the type.
MERGED_MAY_DIFFER = {"float32": 0.01, "bfloat16": 0.25}


def run(options: argparse.Namespace) -> None:
    """Write the copy beside its place, verify what was written, and move it there."""
    place, folder = adapter_file.find_adapter(options.adapter), Path(options.folder)
    saved = read_adapter(place)
    base = options.base or adapter_file.base_of(saved)
    refuse(options, saved, base)
    conditions = read_json(adapter_file.report_folder(options.adapter, place) / "evidence.json")
    conditions = conditions.get("conditions", {})
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
            staging = Path(beside) / folder.name
            if options.merge:
                merge(options, saved, staging)
            else:
                write_copy(options, saved, staging)
            staging.rename(folder)
    except OSError as error:
        raise InspectError(
            f"{folder} cannot be written ({one_line(error)}): give a new folder."
        ) from error
    if options.merge:
        say("merged", str(folder))
        say("llama.cpp", commands_for_llama_cpp(folder))
        return
    written = read_adapter(folder)
    say("written", f"{folder}: {len(written.modules)} modules")
    is_applied, names = adapter_file.names_of(written, *adapter_file.base_config(base))
    say("names", wrapped(names))
    if is_applied is not False:
        say("serve", serving_command(written, folder, base, conditions))


def refuse(options: argparse.Namespace, saved: SavedAdapter, base: str) -> None:
    """Raise if what is asked for cannot be written."""
    is_changed = options.scale != 1 or options.rank or options.vllm
    if options.merge:
        if is_changed:
            raise InspectError("--merge takes no --scale, --rank, --vllm: merge what they write.")
        return
    if reasons := [*adapter_file.faults_of(saved), *saved.beyond_lora]:
        raise InspectError(f"{saved.place} is more than A and B, or damaged: {some(reasons)}")
    if not 0 < options.scale <= 10:
        raise InspectError(f"--scale is {options.scale:g}; it must be above 0 and at most 10.")
    if not options.vllm:
        return
    config, reason = adapter_file.base_config(base)
    if not config:
        raise InspectError(
            f"Whether {base or 'the base'} takes images, too, is not known here, so nothing was "
            f"written: --vllm is wrong for a text model. {reason}."
        )
    if "text_config" not in config:
        raise InspectError("--vllm is of no use: the base is a text model, so its names are right.")


def write_copy(options: argparse.Namespace, saved: SavedAdapter, staging: Path) -> None:
    """Write a weaker, smaller or renamed copy, and verify it."""
    # The LoRA of a vision tower is 0 if only text was trained: vLLM need not have it.
    kept = [module for module in saved.modules if not (options.vllm and module.is_zero)]
    modules = [changed(module, options) for module in kept]
    write(staging, saved, modules)
    verify(staging, modules)


# ---- A merged model


def merge(options: argparse.Namespace, saved: SavedAdapter, staging: Path) -> None:
    """Write the base with the adapter in it, and verify that it has the adapter's logits."""
    with contextlib.redirect_stdout(sys.stderr):
        adapter = model.open_adapter(saved, *model.describe_base(options, saved))
    weights, base = adapter.loaded.weights, adapter.base
    ids = torch.tensor([model.prompt_ids(model.PROBE, base)], device=weights.device)
    with torch.no_grad():
        with adapter.at_strength(0):
            before = adapter.model(ids).logits.float()
        wanted = adapter.model(ids).logits.float()
    merged = adapter.model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(staging)
    base.tokenizer.save_pretrained(staging)
    generation = transformers.GenerationConfig(eos_token_id=base.stop_ids)
    generation.save_pretrained(staging)
    del merged, weights
    again = transformers.AutoModelForCausalLM.from_pretrained(
        staging, dtype=adapter.settings.DTYPE, device_map=ids.device, trust_remote_code=False
    )
    with torch.no_grad():
        error = (again(ids).logits.float() - wanted).square().mean().sqrt().item()
    effect = (wanted - before).square().mean().sqrt().item()
    limit = MERGED_MAY_DIFFER[adapter.settings.DTYPE]
    shown = f"{100 * error / effect:.2f} % of what the adapter changes (limit {100 * limit:g} %)"
    if error > limit * effect:
        raise InspectError(
            f"The merged model's logits differ by {shown}, so nothing is left there: "
            "try --dtype float32."
        )
    say("verified", f"read again, its logits differ by {shown}, in {adapter.settings.DTYPE}")


def commands_for_llama_cpp(folder: Path) -> list[str]:
    """Return the commands that convert and serve a merged model, run beside llama.cpp."""
    gguf = f"{folder}.gguf"
    convert = ["python", "llama.cpp/convert_hf_to_gguf.py", str(folder), "--outfile", gguf]
    return [shlex.join(convert), shlex.join(["llama-server", "-m", gguf, "--jinja"])]


# ---- A copy


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
    for module in modules:
        factor = math.sqrt(module.r) if saved.config.get("use_rslora") else module.r
        alpha = round(module.scaling * factor, 9)
        pairs[module.path] = (module.r, int(alpha) if alpha == int(alpha) else alpha)
    (r, alpha), _ = Counter(pairs.values()).most_common(1)[0]
    config = saved.config | {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {path: rank for path, (rank, _) in pairs.items() if rank != r},
        "alpha_pattern": {path: value for path, (_, value) in pairs.items() if value != alpha},
    }
    if pairs.keys() != {module.path for module in saved.modules}:  # they have other names
        config["target_modules"] = sorted({module.target for module in modules})
    return config


def write(folder: Path, saved: SavedAdapter, modules: list[Module]) -> None:
    """Write an adapter in the type of the old one, with what goes along."""
    folder.mkdir()
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(config_of(saved, modules), indent=2), encoding="utf-8")
    kind = TYPES[saved.types[saved.modules[0].names[0]]]
    tensors = {}
    for module in modules:
        for part, values in (("A", module.a), ("B", module.b)):
            tensors[f"{PREFIX}{module.path}.lora_{part}.weight"] = torch.tensor(values, dtype=kind)
    path = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    shutil.copymode(config, path)  # else its owner alone reads it, and a server is another user
    for pattern in GOES_ALONG:
        for file in filter(Path.is_file, saved.place.glob(pattern)):
            shutil.copy2(file, folder)


def verify(folder: Path, modules: list[Module]) -> None:
    """Read the file again: each module must be there, with its scaling and its numbers."""
    written = {module.path: module for module in read_adapter(folder).modules}
    assert written.keys() == {module.path for module in modules}, sorted(written)
    for module in modules:
        new = written[module.path]
        pairs = ((new.a, module.a), (new.b, module.b))
        is_near = all(np.linalg.norm(a - b) <= ROUNDING * np.linalg.norm(b) for a, b in pairs)
        is_scaled = math.isclose(new.scaling, module.scaling, rel_tol=1e-6)
        if not (is_near and new.fits and is_scaled):
            raise InspectError(
                f"{module.path} was not written as asked, so nothing is left there: a float16 file "
                "cannot hold all numbers."
            )


def serving_command(
    written: SavedAdapter, folder: Path, base: str, conditions: dict[str, Any]
) -> str:
    """Return the command for vLLM; conditions are those of the report, if there is one."""
    config, largest = written.config, max(module.r for module in written.modules)
    commit = conditions["commit"] if "base" in conditions else config.get("revision")
    revision = ["--revision", commit] if commit else []
    rank = next((rank for rank in adapter_file.VLLM_RANKS if rank >= largest), largest)
    words = ["vllm", "serve", conditions.get("base") or base or "BASE", *revision, "--enable-lora"]
    words += ["--max-lora-rank", str(rank), "--lora-modules", f"adapter={folder}"]
    trained = read_json(folder / "run.json").get("settings", {})
    template = folder / "chat_template.jinja"  # a server takes the base's, and not this one
    if template.is_file() and (trained.get("CHAT_TEMPLATE") or conditions.get("chat_template")):
        words += ["--chat-template", str(template)]
    kwargs = json.dumps({"enable_thinking": bool(conditions.get("enable_thinking"))})
    return shlex.join([*words, "--default-chat-template-kwargs", kwargs])
