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

import train_lora_single as script
from inspect_lora import adapter_file, model
from inspect_lora.adapter_file import PREFIX, Module, SavedAdapter, read_adapter
from inspect_lora.common import InspectError, one_line, read_json, say, some, wrapped

# What goes along: the tokenizer with its chat template, and where the adapter comes from.
GOES_ALONG = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json")
GOES_ALONG += ("vocab.*", "merges.txt", "*.model", "learned.txt", "run.json")
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROUNDING = 2.0**-8  # of bfloat16, as a share of a matrix
# How far a merged model's logits may be from the adapter's on its base, both in float32: as a share
# of what the adapter changes, and of the logits themselves.
OF_THE_CHANGE, OF_THE_LOGITS = 0.01, 1e-5


def run(options: argparse.Namespace) -> None:
    """Write the copy beside its place, verify what was written, and move it there."""
    place, folder = adapter_file.find_adapter(options.adapter), Path(options.folder)
    saved = read_adapter(place)
    base = options.base or adapter_file.base_of(saved)
    refuse(options, saved, base)
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
        say("serve", serving_command(written, folder, base, options))


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
    """Write the base with the adapter in it.

    It is merged in float32, where its logits must be the adapter's, and then rounded once; what is
    read again must be that to the bit. So the limit need not allow for the rounding, which takes
    much of a small adapter, and how much is told.
    """
    with contextlib.redirect_stdout(sys.stderr):
        settings, base = model.describe_base(options, saved)
        dtype, settings.DTYPE, settings.MATMUL = settings.DTYPE, "float32", "native"
        adapter = model.open_adapter(saved, settings, base)
    ids, before = adapter.loaded.trial
    wanted = model.logits_of(adapter.model, ids)
    effect = (wanted - before).norm().item()
    merged = adapter.model.merge_and_unload(safe_merge=True)
    error = (model.logits_of(merged, ids) - wanted).norm().item()
    if not error <= OF_THE_CHANGE * effect + OF_THE_LOGITS * wanted.norm().item():
        raise InspectError(
            f"The merged model's logits differ by {100 * error / effect:.1f} % of what the adapter "
            "changes, so nothing was written. A head that shares the embedding's weight cannot get "
            "an update of its own."
        )
    write_rounded(merged, base, staging, dtype)
    lost = (model.logits_of(merged, ids) - wanted).norm().item() / effect
    say("verified", [
        "every tensor, read again, is the merged one",
        f"rounding to {dtype} moves the logits by {100 * lost:.1f} % of what the adapter changes",
    ])  # fmt: skip


def write_rounded(
    merged: transformers.PreTrainedModel, base: script.Base, staging: Path, dtype: str
) -> None:
    """Round a model's weights to a type, write it, and verify each tensor that is read again."""
    for parameter in merged.parameters():  # and no buffers, such as the rotary frequencies
        parameter.data = parameter.data.to(getattr(torch, dtype))
    merged.save_pretrained(staging)
    base.tokenizer.save_pretrained(staging)
    transformers.GenerationConfig(eos_token_id=base.stop_ids).save_pretrained(staging)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        staging, dtype=dtype, trust_remote_code=False
    )
    read, written = again.state_dict(), merged.float().state_dict()
    wrong = [name for name, tensor in written.items() if not read[name].to(tensor).equal(tensor)]
    if wrong:
        raise InspectError(f"Read again, {some(wrong)} is another one, so nothing is left there.")


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
    written: SavedAdapter, folder: Path, base: str, options: argparse.Namespace
) -> str:
    """Return the command for vLLM."""
    largest = max(module.r for module in written.modules)
    rank = next((rank for rank in adapter_file.VLLM_RANKS if rank >= largest), largest)
    words = ["vllm", "serve", base or "BASE"]
    of_training = "" if options.base else written.config.get("revision")
    if revision := options.base_revision or of_training:
        words += ["--revision", revision]
    words += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"adapter={folder}"]
    trained = read_json(folder / "run.json").get("settings", {})
    own = str(folder / "chat_template.jinja") if trained.get("CHAT_TEMPLATE") else ""
    if template := options.chat_template or own:  # a server would take the base's
        words += ["--chat-template", template]
    thinks = options.enable_thinking or trained.get("ENABLE_THINKING", False)
    kwargs = json.dumps({"enable_thinking": thinks})
    return shlex.join([*words, "--default-chat-template-kwargs", kwargs])
