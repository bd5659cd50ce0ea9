"""Tell what a LoRA adapter is worth: what it gained, which part of it does the work, what it says.

It takes any PEFT LoRA adapter, from a folder or from the Hugging Face hub: one that
train_lora_single.py made, or TRL, Unsloth, axolotl or PEFT alone. Nothing is trained, and nothing
is written into the adapter's folder.

    python inspect_lora.py evidence output/final_lora    what it gained; what each part is worth
    python inspect_lora.py evidence someone/adapter --eval_file my.jsonl    of another trainer
    python inspect_lora.py chat output/final_lora        talk to it
    python inspect_lora.py compare output/ranks          which of the runs in this folder is better?
    python inspect_lora.py compare output/inspected      or which adapter that evidence measured?
    python inspect_lora.py for_vllm ADAPTER FOLDER       write it under the names that vLLM applies
    python inspect_lora.py served http://localhost:8000 output/final_lora    does a server apply it?

What may be concluded is about this adapter and these held-out conversations: whether its update is
too strong or too weak, what each group of targets contributes, how many directions the update uses.
What may not be concluded is what another run would reach. Training with a smaller r, another alpha
or fewer targets is another run, which may end elsewhere: train it, and compare. Nor does a lower
loss say that the replies are good: read samples.md.

This file needs train_lora_single.py beside it. Its sections; to jump to one, search for its name
after four equals signs:

    COMMANDS          What does each command do, and where does it write?
    ADAPTERS          How is an adapter opened, its base found, and what is refused?
    EVIDENCE          How is the worth of a part measured, and what is concluded from it?
    ELSEWHERE         How far did training move the model on tasks that it should not touch?
    PICTURE           What is drawn?
    SAMPLES AND CHAT  How does the adapter reply?
    COMPARING         Which run or adapter is better, and is the difference more than chance?
    SERVING           How does a server get the adapter, and does a running one apply it?
    COMMAND LINE      How do flags and messages work?
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import math
import os
import re
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import train_lora_single as trainer
from train_lora_single import join_limited, one_line, report

if TYPE_CHECKING:  # for editors and type checkers
    import accelerate
    import peft
    import safetensors.torch as safetensors_torch
    import torch
    import transformers
else:  # imported when first used, so that a wrong flag or a bad line is reported at once
    accelerate, peft, torch = trainer.accelerate, trainer.peft, trainer.torch
    safetensors_torch, transformers = trainer.safetensors_torch, trainer.transformers


# ==== COMMANDS: each function is what one command does


def evidence(options: argparse.Namespace) -> None:
    """Measure an adapter on held-out conversations, and show what it and its parts are worth."""
    place = find_adapter(options.adapter)
    run = find_run(place)
    settings = settings_for(options, run)
    held_out = read_held_out(settings, run, options)
    check_tasks(options, settings)  # bad ones are reported before the model is loaded
    # Measured otherwise than in the run, it is no part of run.json, which compare and served read.
    is_as_in_run = options.eval_file is None and options.base is None
    run_to_write = run if is_as_in_run else None
    folder = folder_for_results(options, place, run_to_write)
    adapter = open_adapter(options, place, run, settings)
    examples = encode_held_out(held_out, adapter, settings)
    subject = Subject(
        adapter.model,
        adapter.chat_format,
        examples,
        settings,
        folder,
        adapter.label,
        system_message=system_message_of(options, run),
        tokens_at_once=tokens_to_begin_with(examples),
        history=run.record.get("loss_history", []) if run else [],
    )
    findings: dict[str, Any] = {
        "adapter": str(options.adapter),
        "base": settings.MODEL_NAME,
        "measured": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    try:
        measure(subject, findings.update)
    finally:  # also what was found before Ctrl-C
        path = keep_findings(findings, folder, place, run_to_write)
    if "evidence" not in findings:
        raise SystemExit(f"The evidence was not measured; what else was found is in {path}.")
    report("done", f"what was found is in {path}")


def chat(options: argparse.Namespace) -> None:
    """Talk to an adapter, or answer each line of a pipe; nothing is written."""
    place = find_adapter(options.adapter)
    run = find_run(place)
    settings = settings_for(options, run)
    adapter = open_adapter(options, place, run, settings)
    system = system_message_of(options, run)
    report("chat", f"system message: {system or '(none)'}\ntype a message, or /help")
    talk(adapter.model, adapter.chat_format, system, settings.MAX_NEW_TOKENS)


def compare(options: argparse.Namespace) -> None:
    """Print the finished runs and measured adapters in some folders, from the best to the worst."""
    compare_runs(options.folders)


def for_vllm(options: argparse.Namespace) -> None:
    """Write a copy of an adapter under the names that vLLM applies, checked on a skeleton."""
    place = find_adapter(options.adapter)
    run = find_run(place)
    settings = settings_for(options, run)
    write_for_vllm(place, Path(options.folder), options, settings)


def served(options: argparse.Namespace) -> None:
    """Ask a running server whether it applies an adapter; the status is 0 only if it does."""
    place = find_adapter(options.adapter)
    run = find_run(place)
    settings = settings_for(options, run)
    server = find_server(options, place)
    asked, chat_format = choose_replies(options, place, run, settings, server.window)
    rendering = check_rendering(server, asked, chat_format, options.chat_template_kwargs)
    generation = check_generation(server, asked)
    ask_for_losses(server, asked)
    losses = judge_losses(server, asked, options)
    problems = [one for one in (losses or generation, rendering) if one]
    if problems and not losses:
        problems.insert(0, f"The server applies the adapter as {server.adapter}, but:")
    if problems:
        raise SystemExit("\n".join(problems))
    report(
        "applied",
        f"the server applies the adapter under the name {server.adapter}\n"
        "Ask it for the model of that name, with the system message of the training.",
    )


# ==== ADAPTERS: opening any PEFT LoRA adapter on its base model
#
# An adapter of train_lora_single.py is known by the run.json beside it: its held-out file, its
# settings and its system message are the defaults. Any other adapter is what its own files say:
# - The base model is what adapter_config.json names, or --base. A quantized base is not taken.
# - The tokenizer and the chat template are the adapter's own, if it has them, else the base's.
# - Tensors under the names of a wrapper around the text model are renamed.
# - Every tensor of the file must be found in the model afterwards, or the command ends. PEFT only
#   warns, and the adapter's gain would read 0.
# - Held-out conversations are asked for; they may be in the ShareGPT form.
# Only safetensors files are read: an adapter_model.bin is a pickle, which could run code.


@dataclass
class Run:
    """The run of train_lora_single.py that an adapter comes from."""

    path: Path  # its run.json
    record: dict[str, Any]  # what is in it
    is_published: bool  # whether the adapter is the one that the run published


@dataclass
class Adapter:
    """An adapter on its base model."""

    model: peft.PeftModel
    chat_format: trainer.ChatFormat
    label: str  # which one it is, such as "epoch 2 of 3", for headings


def find_adapter(name: str) -> Path:
    """Return the folder of an adapter's files, from a folder or the hub; exit if it has none."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            raise SystemExit(
                f"There is no adapter {name}: give the folder that holds adapter_config.json, or a "
                "name on the hub such as someone/adapter."
            )
        folder = download_adapter(name)
    if not (folder / "adapter_config.json").is_file():
        inner = [path.parent for path in sorted(folder.glob("*/adapter_config.json"))]
        hint = f" Did you mean {inner[0]}?" if inner else ""
        if (folder / "config.json").is_file():
            hint = " It looks like a whole model; an adapter is saved by PEFT's save_pretrained()."
        raise SystemExit(f"{name} is no adapter: it holds no adapter_config.json.{hint}")
    if not (folder / "adapter_model.safetensors").is_file():
        if (folder / "adapter_model.bin").is_file():
            raise SystemExit(
                f"{name} holds adapter_model.bin, a pickle that could run code when it is opened. "
                "If you trust where it comes from, convert it in that folder:\npython -c "
                "'import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in "
                'torch.load("adapter_model.bin", map_location="cpu", weights_only=True).items()}, '
                '"adapter_model.safetensors")\''
            )
        raise SystemExit(f"{name} holds no adapter_model.safetensors, so its weights are missing.")
    return folder


def download_adapter(name: str) -> Path:
    """Return the folder of an adapter of the hub on this machine; exit if it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    wanted = ["adapter_*", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(
            snapshot_download(name, allow_patterns=wanted, ignore_patterns=["checkpoint-*"])
        )
    except LocalEntryNotFoundError as error:
        raise SystemExit(
            f"The Hugging Face hub cannot be reached, and {name} is not stored on this machine. "
            "Check the network, or give a local folder."
        ) from error
    except (OSError, HfHubHTTPError, HTTPError) as error:
        raise SystemExit(
            f"There is no folder {name}, and no adapter of this name on the hub, or it cannot be "
            f"reached ({one_line(error)})."
        ) from error


def find_run(folder: Path) -> Run | None:
    """Return the run that an adapter comes from, or None for one of another trainer.

    A published adapter is known by its hash, which run.json holds, wherever the run's other results
    have been moved to beside it; a checkpoint by its place.
    """
    folder = folder.resolve()
    is_checkpoint = folder.parent.name == "checkpoints"
    output = folder.parent.parent if is_checkpoint else folder.parent
    sha256 = trainer.file_sha256(folder / "adapter_model.safetensors")
    for path in sorted(output.glob("run.json*")):
        record = trainer.read_json(path) or {}
        if not isinstance(record.get("settings"), dict):
            continue
        if is_checkpoint and path.name == "run.json":
            return Run(path, record, is_published=False)
        hashes = record.get("adapter_sha256")
        if isinstance(hashes, dict) and sha256 in hashes.values():
            return Run(path, record, is_published=True)
    return None


def settings_for(options: argparse.Namespace, run: Run | None) -> argparse.Namespace:
    """Return the trainer's settings for this adapter: its constants, the run's, then the flags."""
    known = trainer.setting_types()
    values = {name: getattr(trainer, name) for name in known}
    values["EVAL_FILE"] = ""  # the shipped conversations say nothing about a foreign adapter
    if run:
        values |= {name: value for name, value in run.record["settings"].items() if name in known}
        for name in ("EVAL_FILE", "GENERAL_FILE", "MODEL_NAME"):
            values[name] = str(where_it_is_now(values[name], run))
    given = {name.upper(): value for name, value in vars(options).items() if value is not None}
    values |= {
        name: value for name, value in given.items() if name in known and name != "OUTPUT_DIR"
    }
    if problems := trainer.check_values(values):
        raise SystemExit("\n".join(problems))
    for name, least in SMALLEST_NUMBERS.items():
        if values[name] < least:
            raise SystemExit(f"--{name.lower()} is {values[name]}; it must be at least {least}.")
    return argparse.Namespace(**values, dry_run=False)


SMALLEST_NUMBERS = {"MAX_SEQ_LEN": 1, "MAX_NEW_TOKENS": 1, "EVIDENCE_EXAMPLES": 0, "NUM_SAMPLES": 0}


def where_it_is_now(name: str, run: Run) -> str:
    """Return a run's file or folder as it is found from here, if it was named from elsewhere."""
    there = Path(run.record.get("working_folder", "")) / name
    is_from_elsewhere = name and not Path(name).exists() and there.exists()
    return str(there) if is_from_elsewhere else name


def folder_for_results(options: argparse.Namespace, place: Path, run: Run | None) -> Path:
    """Return where samples.md and lora.png go: beside a published adapter, else a new folder."""
    if options.output_dir:
        folder = Path(options.output_dir)
    elif run and run.is_published:
        folder = run.path.parent
    else:
        name = options.adapter
        if Path(name).is_dir():
            names = [part for part in place.resolve().parts[-3:] if part != "checkpoints"]
            name = "/".join(names[-2:])  # many an adapter's folder is called final_lora
        folder = Path("output") / "inspected" / name.replace("/", "--")
    if place.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise SystemExit(
            f"The results would go into {folder}, but nothing is written into the adapter's own "
            "folder or below it; choose another one with --output_dir."
        )
    return folder


def keep_findings(findings: dict[str, Any], folder: Path, place: Path, run: Run | None) -> Path:
    """Write what was found: into run.json for an adapter of ours, else into the results' folder.

    What an earlier measurement found is kept.
    """
    if run is not None:
        try:
            with trainer.locked(run.path.parent):
                add_to_record(findings, place, run)
            return run.path
        except (SystemExit, OSError) as error:  # a run is at work there, or it cannot be written
            report("warning", f"{run.path} is left as it is: {one_line(error)}")
    path = folder / "evidence.json"
    trainer.rename_old(path)
    saved = trainer.read_json(place / "adapter_config.json")  # for compare; a run.json has its own
    trainer.write_json(path, findings | {"adapter_config": saved})
    return path


def add_to_record(findings: dict[str, Any], place: Path, run: Run) -> None:
    """Write what was found into run.json; what stood in its place stays there, under its date."""
    record = trainer.read_json(run.path) or run.record
    earlier = record.get("earlier_findings") or {}
    if run.is_published:
        keys = ("learned", "evidence", "elsewhere", "answers", "samples", "measured")
        before = {key: record.pop(key) for key in keys if record.get(key)}
        if before:
            earlier[before.pop("measured", "at the end of the run")] = before
        record |= {key: findings[key] for key in keys if key in findings}
    else:
        name, found = place.resolve().name, record.setdefault("checkpoint_findings", {})
        if name in found:
            earlier[f"{name}, {found[name]['measured']}"] = found[name]
        found[name] = findings
    if earlier:
        record["earlier_findings"] = earlier
    trainer.write_json(run.path, record)


def read_held_out(
    settings: argparse.Namespace, run: Run | None, options: argparse.Namespace
) -> list[trainer.Example]:
    """Return the held-out conversations; exit if there are none, or a line is bad."""
    if not settings.EVAL_FILE:
        raise SystemExit(
            "Held-out conversations are needed, which the adapter was not trained on: give a JSONL "
            "file with --eval_file. README.md shows the forms that a line may have."
        )
    examples, problems = trainer.read_examples(
        settings.EVAL_FILE,
        settings.EVAL_GROUP,
        replies=settings.REPLIES,
        accepts_sharegpt=True,
        accepts_thinking=options.enable_thinking,
    )
    if problems:
        raise SystemExit(f"{join_limited(problems)}\nNothing was measured.")
    if run and not options.eval_file:
        warn_of_changed_file(settings.EVAL_FILE, run)
    return examples


def warn_of_changed_file(path: str, run: Run) -> None:
    """Say so if the held-out file is no longer what the run measured."""
    facts = run.record.get("data", {}).get(run.record["settings"].get("EVAL_FILE"), {})
    if facts and facts.get("sha256") != trainer.file_sha256(Path(path)):
        report("warning", f"{path} has changed since the run, so the losses differ from the run's")


def encode_held_out(
    examples: list[trainer.Example], adapter: Adapter, settings: argparse.Namespace
) -> list[trainer.Example]:
    """Return the held-out examples that fit, with their tokens; exit if one cannot be rendered."""
    fitting, problems = trainer.encode_file(examples, adapter.chat_format, settings.MAX_SEQ_LEN)
    if problems:
        fault = fault_of_template(adapter.chat_format, examples)
        said = f"{settings.MODEL_NAME}: {fault}" if fault else join_limited(problems)
        raise SystemExit(f"{said}\nNothing was measured.")
    largest = max(max(example.input_ids) for example in fitting)
    rows = adapter.model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise SystemExit(
            f"The tokenizer has tokens up to {largest:,}, but the base model has only {rows:,}: "
            "they do not belong together. Check --base."
        )
    return fitting


def fault_of_template(chat_format: trainer.ChatFormat, examples: list[trainer.Example]) -> str:
    """Return why even plain conversations cannot be rendered, to say it once and not of each line.

    It is asked only once lines have failed: what the trainer would refuse may be measured.
    """
    if chat_format.enable_thinking:
        return ""  # plain conversations hold no thoughts
    for talk, where in trainer.plain_talks(examples):
        fault = trainer.fault_of_template(chat_format, talk, where)
        if fault:
            return fault
    return ""


def open_adapter(
    options: argparse.Namespace, place: Path, run: Run | None, settings: argparse.Namespace
) -> Adapter:
    """Load the base model with the adapter on top; exit unless every tensor found its place."""
    saved = read_adapter_config(place)
    name_the_base(options, settings, saved, place, run)
    trainer.set_environment(settings)
    trainer.prepare_device(settings)
    config = lora_config_of(place)
    settings_of_base = argparse.Namespace(**vars(settings))
    chat_format = load_chat_format(settings_of_base, place, options)
    base = trainer.load_model(settings_of_base).to(accelerate.PartialState().device)
    if run and run.record.get("matmul", {}).get("used") == "float16" and settings.DEVICE == "cuda":
        base = trainer.use_float16_products(base)  # as it was trained
    model = put_adapter_on(base, config, place)
    label = label_of(place, run)
    report("adapter", f"{options.adapter}: {describe(model)}\nbase model: {settings.MODEL_NAME}")
    return Adapter(model, chat_format, label)


def system_message_of(options: argparse.Namespace, run: Run | None) -> str:
    """Return the system message of the training: --system, else the run's, else none."""
    if options.system is not None:
        return options.system
    return run.record.get("system_message", "") if run else ""


def label_of(place: Path, run: Run | None) -> str:
    """Return which adapter it is, for headings: a run's epoch, or the folder's name."""
    if run and run.is_published:
        return run.record.get("published") or place.resolve().name
    return place.resolve().name


def describe(model: peft.PeftModel) -> str:
    """Return an adapter's rank, alpha and number of layers in one line."""
    config = model.peft_config["default"]
    count = len(trainer.lora_layers(model))
    patterns = " (and others by pattern)" if config.rank_pattern or config.alpha_pattern else ""
    return f"LoRA with r = {config.r}, alpha = {config.lora_alpha}{patterns} on {count} modules"


def read_adapter_config(place: Path) -> dict[str, Any]:
    """Return adapter_config.json; exit if it is damaged or of another kind than LoRA."""
    saved = trainer.read_json(place / "adapter_config.json")
    if not saved or "peft_type" not in saved:
        raise SystemExit(f"{place / 'adapter_config.json'} is damaged, or was not written by PEFT.")
    if saved["peft_type"] != "LORA":
        raise SystemExit(
            f"{place} is an adapter of the kind {saved['peft_type']}; only LORA is understood here."
        )
    return saved


def lora_config_of(place: Path) -> peft.LoraConfig:
    """Return the adapter's LoraConfig; exit if PEFT does not know it or it cannot be measured."""
    try:
        config = peft.LoraConfig.from_pretrained(place)
    except (TypeError, ValueError, OSError) as error:
        raise SystemExit(
            f"{place / 'adapter_config.json'}: PEFT cannot read it ({one_line(error)})."
        ) from error
    if reason := why_not_measured(config):
        raise SystemExit(f"{place} cannot be measured: {reason}.")
    return config


def why_not_measured(config: peft.LoraConfig) -> str:
    """Return why the base model and parts of such an adapter cannot be told apart, or ""."""
    start = str(config.init_lora_weights).lower()
    if start.startswith(trainer.CHANGES_THE_BASE) and start != "eva":  # which needs data alone
        return (
            f'it was begun with init_lora_weights="{config.init_lora_weights}", which changes the '
            "base model, so the two cannot be compared; save it as plain LoRA first (PEFT's "
            "save_pretrained has path_initial_model_for_weight_conversion for that)"
        )
    if config.bias != "none":
        return (
            f'it trained biases (bias="{config.bias}"), which stay changed where the adapter is '
            "switched off, so nothing can be compared with the base model"
        )
    if config.layer_replication:
        return "layer_replication builds another model than its base"
    if config.alora_invocation_tokens:
        return "an activated LoRA works only after its invocation tokens, which are not sent here"
    return ""


# The end of the name of a quantized copy, as other trainers record it.
QUANTIZED_NAME = re.compile(
    r"(?i)[-_.](?:unsloth-)?(?:bnb-)?(?:[2-8]bit|int[48]|bnb|gptq|awq|gguf|exl2|"
    r"(?:mx|nv)?(?:fp|nf)[48]|w[48]a(?:8|16))(?:[-_.][^/]*)?$"
)


def name_the_base(
    options: argparse.Namespace,
    settings: argparse.Namespace,
    saved: dict[str, Any],
    place: Path,
    run: Run | None,
) -> None:
    """Set MODEL_NAME to the adapter's base model, or exit and ask for it."""
    if options.base:
        settings.MODEL_NAME, settings.MODEL_REVISION = options.base, options.base_revision or "main"
        return
    if options.base_revision:
        saved = saved | {"revision": options.base_revision}
    recorded = str(saved.get("base_model_name_or_path") or "")
    if not recorded:
        raise SystemExit(f"{place} does not name its base model; give it with --base.")
    if QUANTIZED_NAME.search(recorded):
        plain = QUANTIZED_NAME.sub("", recorded)
        raise SystemExit(
            f"The adapter was trained on {recorded}, a quantized copy, which is not loaded here. "
            f"Give the model that it was made from with --base, such as --base {plain}; the losses "
            "are then measured on that one."
        )
    looks_like_hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", recorded)
    if not Path(recorded).is_dir() and run and not saved.get("revision"):
        recorded = where_it_is_now(recorded, run)
    if (
        not Path(recorded).is_dir()
        and not saved.get("revision")
        and (run or not looks_like_hub_name)
    ):
        raise SystemExit(
            f"The adapter's base model {recorded} is not there. Give the folder that it is in now, "
            "or its name on the hub, with --base."
        )
    settings.MODEL_NAME, settings.MODEL_REVISION = recorded, saved.get("revision") or "main"


def load_chat_format(
    settings: argparse.Namespace, place: Path, options: argparse.Namespace
) -> trainer.ChatFormat:
    """Return how conversations are rendered: by the adapter's own tokenizer, or by the base's."""
    folder = str(place) if has_chat_template(place) else ""
    _, chat_format = load_config_and_tokenizer(settings, folder)
    chat_format.enable_thinking = options.enable_thinking
    whose = "the adapter's own" if has_chat_template(place) else "those of the base model"
    report("tokens", f"tokenizer and chat template: {whose}")
    return chat_format


def load_config_and_tokenizer(
    settings: argparse.Namespace, tokenizer_folder: str = ""
) -> tuple[transformers.PretrainedConfig, trainer.ChatFormat]:
    """Do what the trainer does; where that fails, say by which flag the base model is given."""
    try:
        return trainer.load_config_and_tokenizer(settings, tokenizer_folder)
    except SystemExit as error:
        raise SystemExit(f"{error} (MODEL_NAME is the base model; see --base.)") from error


def has_chat_template(place: Path) -> bool:
    """Return whether an adapter's folder has a whole tokenizer with a chat template."""
    config = trainer.read_json(place / "tokenizer_config.json")
    if config is None:
        return False
    return (place / "chat_template.jinja").is_file() or bool(config.get("chat_template"))


# Where other libraries put the text model's layers in their wrapper around it.
WRAPPERS = (
    (trainer.NAME_IN_WRAPPER, trainer.NAME_IN_TEXT_MODEL),
    ("base_model.model.language_model.model.", "base_model.model.model."),
)


def name_in_text_model(name: str) -> str:
    """Return a tensor's name as it is in the text model alone."""
    for in_wrapper, in_text_model in WRAPPERS:
        name = name.replace(in_wrapper, in_text_model, 1)
    return name


def read_tensors(place: Path) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors under the text model's names; exit if the file is damaged."""
    from safetensors import SafetensorError

    path = place / "adapter_model.safetensors"
    try:
        tensors = safetensors_torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"{path} cannot be read ({one_line(error)}).") from error
    if not tensors:
        raise SystemExit(f"{path} holds no tensors, so the adapter changes nothing.")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        place_of_it = name_in_text_model(name)
        if place_of_it in found:
            raise SystemExit(f"{path} holds two tensors for one place, {place_of_it}.")
        found[place_of_it] = tensor
    return found


def put_adapter_on(
    base: transformers.PreTrainedModel, config: peft.LoraConfig, place: Path
) -> peft.PeftModel:
    """Return the base model with the adapter's tensors in it, each of them checked."""
    tensors = read_tensors(place)
    config = fitted_config(config, tensors)
    config.inference_mode = True
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        safetensors_torch.save_file(tensors, Path(folder) / "adapter_model.safetensors")
        try:
            model = peft.PeftModel.from_pretrained(base, folder).eval()
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise SystemExit(
                f"The adapter in {place} does not fit the base model ({one_line(error)}). Check "
                "--base."
            ) from error
    check_all_landed(model, tensors, place)
    return model


def fitted_config(config: peft.LoraConfig, tensors: dict[str, torch.Tensor]) -> peft.LoraConfig:
    """Return the config with the names of the text model, where it may have a wrapper's.

    A regular expression that was written for a wrapper, as Unsloth does, finds nothing in the text
    model: the modules that the file has tensors for are named instead. Ranks and alphas by pattern
    would not be found either, and PEFT would only warn, and take the common ones.
    """
    for pattern in (config.rank_pattern, config.alpha_pattern):
        renamed = {re.sub(r"language_model\\?\.", "", key): one for key, one in pattern.items()}
        pattern.clear()
        pattern.update(renamed)
    if isinstance(config.target_modules, str):
        with_a = [name for name in tensors if ".lora_A." in name]
        paths = [name.removeprefix("base_model.model.").partition(".lora_A.")[0] for name in with_a]
        config.target_modules = sorted(set(paths))
        config.exclude_modules = None
    return config


def changes_nothing(name: str, tensors: dict[str, torch.Tensor]) -> bool:
    """Return whether a tensor is LoRA's A or B of an update B A that is 0, since B is.

    Unsloth may put LoRA into the vision tower, too, which stays as it was if only text is trained.
    """
    b = tensors.get(name.replace(".lora_A.", ".lora_B."))
    return ".lora_" in name and b is not None and not b.any()


def check_all_landed(model: peft.PeftModel, tensors: dict[str, torch.Tensor], place: Path) -> None:
    """Exit unless every tensor of the file is in the model, with its numbers."""
    found = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    others = model.state_dict()
    lost = []
    for name, tensor in tensors.items():
        landed = found.get(name, others.get(name))
        if landed is None or not landed.cpu().to(tensor.dtype).equal(tensor):
            lost.append(name)
    without_effect = [name for name in lost if changes_nothing(name, tensors)]
    lost = [name for name in lost if name not in without_effect]
    if without_effect:
        report(
            "left out",
            f"{len(without_effect):,} tensors have no place in the text model, such as "
            f"{without_effect[0]};\ntheir B is 0, so they change nothing",
        )
    if lost:
        raise SystemExit(
            f"{len(lost):,} of the {len(tensors):,} tensors in {place} find no place in the base "
            f"model, so it would not be the adapter that is measured: {join_limited(lost, 3, ', ')}"
            ". Check --base."
        )


# ==== EVIDENCE: what r, alpha and the targets were worth
#
# Parts of the finished adapter are switched off, scaled or cut; nothing is trained.
#   of the gain         (base's loss - part's loss) / (base's loss - adapter's loss), of all tokens.
#                       Parts overlap, so their shares need not add up to 100 %.
#   against as trained  the part's loss minus the whole adapter's, per token; + is worse
#   lower on            on how many examples the loss is lower than with the whole adapter
# ± is one standard error over the held-out lines (the replies of one conversation count as one),
# paired: both losses are of the same examples (Miller, "Adding Error Bars to Evals", 2024).
# Nothing is concluded from fewer than 10 lines, or if the gain is not above twice its error. A part
# is "better" or "worse" than the whole from 2 % of the gain and two errors on, three where it was
# picked among several; the "same" if its share and two errors lie within 5 %; else "unclear".


@dataclass
class Subject:
    """An adapter, and what it is measured with."""

    model: peft.PeftModel
    chat_format: trainer.ChatFormat
    held_out: list[trainer.Example]
    settings: argparse.Namespace
    folder: Path  # gets samples.md and lora.png
    label: str  # which adapter it is, such as "epoch 2 of 3"
    system_message: str  # of the training, or ""
    tokens_at_once: int  # how many go through the model together
    history: list[dict[str, float]]  # what the trainer logged, for the picture; may be empty


def measure(subject: Subject, keep: Callable[[dict[str, Any]], None]) -> None:
    """Measure and show what the adapter learned, and hand each part of the findings to keep().

    An error in one part is a warning, so that it costs neither the others nor a run.
    """
    findings: dict[str, Any] = {}
    measured = min(subject.settings.EVIDENCE_EXAMPLES, len(subject.held_out))
    if measured:
        report(
            "measuring",
            f"the adapter's parts on {measured} held-out examples, and its change on other tasks; "
            "nothing\nis trained, and EVIDENCE_EXAMPLES 0 leaves it out",
        )
    steps: dict[str, Callable[[Subject, dict[str, Any]], dict[str, Any]]] = {
        "learned": show_update_sizes,
        "evidence": measure_evidence,
        "elsewhere": measure_elsewhere,
        "answers": compare_answers,
        "samples": write_samples,
        "picture": draw_picture,
    }
    for name, step in steps.items():
        with trainer.error_is_a_warning(name):
            findings |= step(subject, findings)
        keep(findings)


def can_take_apart(model: peft.PeftModel) -> bool:
    """Return whether the adapter is LoRA alone: no fully trained modules or tokens."""
    names = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return all(".lora_" in name for name in names)


def can_scale_and_cut(model: peft.PeftModel) -> bool:
    """Return whether every update is alpha / r B A on a linear layer, without bias or DoRA."""
    names = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    is_a_or_b = re.compile(r"\.lora_[AB]\.weight$").search
    layers = trainer.lora_layers(model).values()
    return all(map(is_a_or_b, names)) and all(map(trainer.is_linear_lora, layers))


def show_update_sizes(subject: Subject, _: dict[str, Any]) -> dict[str, Any]:
    """Print how large the update of each target is against its W; return every layer's."""
    if not can_scale_and_cut(subject.model):
        report(
            "learned", "the size of the updates is only measured for plain LoRA on linear layers"
        )
        return {}
    updates = measure_updates(subject.model)
    sizes = {
        target: 100 * statistics.fmean(row["update"] for row in rows)
        for target, rows in updates.items()
    }
    smallest, largest = min(sizes, key=sizes.get), max(sizes, key=sizes.get)
    text = (
        f"the update alpha / r B A has {sizes[smallest]:,.2f} % ({smallest}) to "
        f"{sizes[largest]:,.2f} % ({largest}) of the size of W,\non average over the layers"
    )
    in_layers = [row for row in updates[largest] if row["layer"] is not None]  # lm_head is in none
    if len(in_layers) > 1:
        rows = sorted(in_layers, key=lambda row: -row["update"])
        top = ", ".join(str(row["layer"]) for row in rows[:3])
        text += f"; {largest}'s is largest in layers {top}"
    report("learned", text)
    return {"learned": updates}


def measure_updates(model: peft.PeftModel) -> dict[str, list[dict[str, float]]]:
    """Return for each target one row per layer: the update's size and its number of directions.

    With B = Q R and A^T = Q' R', the r x r matrix R R'^T has the singular values of B A, because
    multiplying by Q and Q' changes no lengths. "update" is |alpha / r B A| / |W| (Frobenius norms),
    and "directions" how many of the strongest hold 90 % of its square.
    """
    found: dict[str, list[dict[str, float]]] = {}
    for path, module in trainer.lora_layers(model).items():
        a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
        product = torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
        energy = torch.linalg.svdvals(module.scaling["default"] * product).square()
        total = energy.sum().item()
        weight = module.get_base_layer().weight
        size = torch.linalg.vector_norm(weight, dtype=torch.float64).item()
        before_90_percent = int((energy.cumsum(0) < 0.9 * total).sum())
        row = {
            "layer": trainer.layer_number(path),  # None outside the layers, as for lm_head
            "update": math.sqrt(total) / size,
            "directions": before_90_percent + 1 if total else 0,
        }
        found.setdefault(path.rpartition(".")[2], []).append(row)
    return found


@dataclass
class Estimate:
    """A mean over the held-out examples, with its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        """Return it as a difference of losses."""
        return f"{self.value:+.4f} ± {self.error:.4f}"

    def is_clear(self, errors: float = 2) -> bool:
        """Return whether it differs from 0 by more than so many times its error."""
        return abs(self.value) > errors * self.error


def ratio_with_error(
    numerators: list[float], denominators: list[float], lines: list[str] | None = None
) -> Estimate:
    """Return sum(numerators) / sum(denominators), with its standard error over the examples.

    The error is that of a ratio estimator by linearization (Cochran, Sampling Techniques, 6.4):
    the residuals are numerator - ratio x denominator. With differences of losses over tokens it is
    the paired difference per token; with two differences it is a share.

    Args:
        lines: the line that each example is of. A line in the form "messages" makes an example of
            each reply, and replies of one conversation are alike: counted as independent, they
            would make the error too small. So they are added up first, and lines are counted.
    """
    if lines is not None:
        numerators, denominators = sums_by(lines, numerators), sums_by(lines, denominators)
    total = sum(denominators)
    if total == 0:
        return Estimate(math.nan, math.inf)
    value = sum(numerators) / total
    n = len(numerators)
    squares = sum((a - value * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    error = math.sqrt(squares * n / (n - 1)) / abs(total) if n > 1 else math.inf
    return Estimate(value, error)


def sums_by(keys: list[str], numbers: list[float]) -> list[float]:
    """Return the sum of the numbers of each key, in the order in which the keys first come."""
    sums = dict.fromkeys(keys, 0.0)
    for key, number in zip(keys, numbers, strict=True):
        sums[key] += number
    return list(sums.values())


def differences(ones: list[float], others: list[float]) -> list[float]:
    """Return the first list minus the second one, number by number."""
    return [one - other for one, other in zip(ones, others, strict=True)]


def measure_evidence(subject: Subject, _: dict[str, Any]) -> dict[str, Any]:
    """Measure base, adapter and the adapter's parts on held-out examples, and print them."""
    if not subject.held_out:
        report("evidence", "not measured: there is no EVAL_FILE")
        return {}
    began = time.monotonic()
    examples = subject.held_out
    tokens = [len(example.reply_ids) for example in examples]
    adapter = losses_of(subject, examples, "adapter")
    with subject.model.disable_adapter():
        base = losses_of(subject, examples, "base")
    better = sum(a < b for a, b in zip(adapter, base, strict=True))
    found: dict[str, Any] = {
        "base": sum(base) / sum(tokens),
        "adapter": sum(adapter) / sum(tokens),
        "eval_file": subject.settings.EVAL_FILE,
        "eval_sha256": sha256_if_there(Path(subject.settings.EVAL_FILE)),
        "examples": len(examples),
        "better": better,
        "losses": [
            {"where": e.where, "group": e.eval_group, "tokens": n, "base": b / n, "adapter": a / n}
            for e, n, b, a in zip(examples, tokens, base, adapter, strict=True)
        ],
    }
    if subject.settings.EVIDENCE_EXAMPLES:
        chosen = evenly_spread(len(examples), subject.settings.EVIDENCE_EXAMPLES)
        found |= show_parts(subject, chosen, base, adapter)
        seconds = time.monotonic() - began
        report(
            "",
            f"of {len(chosen)} held-out examples, evenly spread, in {seconds:.0f} s; ± is one "
            "standard error\n"
            '(the loss is in nats a token of the replies; "lower on" counts examples with a '
            "lower one)\n"
            f"on all {len(examples)} the base model has {found['base']:.4f}, the adapter "
            f"{found['adapter']:.4f}",
        )
    show_kinds(found["losses"], subject.settings.EVAL_GROUP)
    return {"evidence": found}


def sha256_if_there(path: Path) -> str:
    """Return a file's hash, or "" if it was moved since it was read, hours ago perhaps."""
    with suppress(OSError):
        return trainer.file_sha256(path)
    return ""


def losses_of(subject: Subject, examples: list[trainer.Example], title: str) -> list[float]:
    """Return each example's loss with the model as it is now, in nats, summed over the reply."""
    return trainer.example_losses(subject.model, examples, subject.tokens_at_once, title)


def tokens_to_begin_with(examples: list[trainer.Example]) -> int:
    """Return how many tokens are tried at once; fewer follow if the GPU's memory is too small."""
    return 8 * max(len(example.input_ids) for example in examples)


def evenly_spread(count: int, wanted: int) -> list[int]:
    """Return at most wanted of the numbers below count, evenly spread."""
    wanted = min(count, wanted)
    return [number * count // wanted for number in range(wanted)]


# ---- The parts of an adapter


@dataclass
class Part:
    """The adapter, the base model, or a part of the adapter, with what was measured of it."""

    kind: str  # "whole", "base", "strength", "group", "target", "layers" or "cut"
    value: float | str  # the strength, the group's name, or the directions that are left
    title: str  # as it is called in the table
    change_model: Callable[[], contextlib.AbstractContextManager]  # for a while
    loss: float = math.nan  # in nats a token
    of_gain: Estimate = field(default_factory=lambda: Estimate(math.nan, math.inf))  # a share
    against_trained: Estimate = field(default_factory=lambda: Estimate(math.nan, math.inf))
    gained: Estimate = field(default_factory=lambda: Estimate(math.nan, math.inf))  # over the base
    better_on: int = 0  # examples
    losses: list[float] = field(default_factory=list)  # of each example, in nats a token

    def judge(self, losses: ExampleLosses, own: list[float]) -> None:
        """Compare its examples' losses, in nats, with those of the adapter and the base."""
        changes = differences(own, losses.trained)
        gained, gain = differences(losses.base, own), differences(losses.base, losses.trained)
        self.loss = sum(own) / sum(losses.tokens)
        self.of_gain = ratio_with_error(gained, gain, losses.lines)
        self.against_trained = ratio_with_error(changes, losses.tokens, losses.lines)
        self.gained = ratio_with_error(gained, losses.tokens, losses.lines)
        self.better_on = sum(change < 0 for change in changes)
        self.losses = [loss / n for loss, n in zip(own, losses.tokens, strict=True)]

    def verdict(self, comparisons: int = 1) -> str:
        """Return whether it is "better" or "worse" than as trained, the "same", or "unclear".

        Args:
            comparisons: among how many parts this one was picked.
        """
        share = self.of_gain
        is_large = abs(share.value - 1) > WORTH_REPORTING
        if is_large and self.against_trained.is_clear(errors_needed(comparisons)):
            return "better" if self.against_trained.value < 0 else "worse"
        largest = abs(share.value - 1) + 2 * share.error
        return "same" if largest < THE_SAME_WITHIN else "unclear"

    def as_recorded(self) -> dict[str, Any]:
        """Return its row in run.json."""
        row = {key: value for key, value in vars(self).items() if key != "change_model"}
        estimates = ("of_gain", "against_trained", "gained")
        return row | {name: asdict(row[name]) for name in estimates}


@dataclass
class ExampleLosses:
    """The losses that parts are compared with: one number for each measured example."""

    trained: list[float]  # with the whole adapter, in nats, summed over the reply
    base: list[float]  # without it
    tokens: list[float]  # in each reply
    lines: list[str]  # the line of the held-out file that each is of


# Both are shares of the gain. A clear difference that is smaller than the first is not worth a run.
# If no difference is clear, two losses are called the same only if the difference and twice its
# error together are less than the second: otherwise the examples are too few to tell.
WORTH_REPORTING = 0.02
THE_SAME_WITHIN = 0.05
# With fewer held-out lines nothing is concluded, since the errors themselves are too uncertain.
FEWEST_LINES = 10


def errors_needed(comparisons: int) -> float:
    """Return how many standard errors make a difference clear.

    The best of six parts is better by twice its error in every eighth table by chance alone, but by
    three times its error only once in 120 tables (once in 23 with no more than FEWEST_LINES), if
    they are independent. So three are asked for wherever a part was picked among several.
    """
    return 2 if comparisons == 1 else 3


def show_parts(
    subject: Subject, chosen: list[int], base: list[float], adapter: list[float]
) -> dict[str, Any]:
    """Measure the adapter's parts on the chosen examples; print the table and what it supports."""
    examples = [subject.held_out[number] for number in chosen]
    losses = ExampleLosses(
        trained=[adapter[number] for number in chosen],
        base=[base[number] for number in chosen],
        tokens=[float(len(example.reply_ids)) for example in examples],
        lines=[example.where for example in examples],
    )
    whole = Part("whole", 1.0, "as trained", nullcontext)
    without = Part("base", 0.0, "base model", subject.model.disable_adapter)
    whole.judge(losses, losses.trained)
    without.judge(losses, losses.base)
    parts = [whole, without]
    for part in parts_of(subject.model):
        with part.change_model():
            part.judge(losses, losses_of(subject, examples, part.title))
        parts.append(part)
    gain = ratio_with_error(differences(losses.base, losses.trained), losses.tokens, losses.lines)
    table = table_of_parts(parts)
    after_epochs = trainer.logged(subject.history, "eval_loss")
    sentences = conclusions(parts, gain, len(set(losses.lines)), after_epochs)
    sentences += what_is_not_measured(subject.model)
    report("evidence", "\n".join(table))
    for sentence in sentences:
        report("", textwrap.fill(sentence, 90, subsequent_indent="  "))
    return {
        "parts": {part.title: part.as_recorded() for part in parts},
        "where": losses.lines,
        "table": table,
        "conclusions": sentences,
        "is_conclusive": is_conclusive(gain, len(set(losses.lines))),
    }


def what_is_not_measured(model: peft.PeftModel) -> list[str]:
    """Return a sentence on parts that an adapter of another kind does not have."""
    if not can_take_apart(model):
        return ["More than LoRA was trained, so the adapter is not taken apart."]
    if not can_scale_and_cut(model):
        return ["This LoRA is more than the update alpha / r B A, so it is neither scaled nor cut."]
    return []


def table_of_parts(parts: list[Part]) -> list[str]:
    """Return the lines of the evidence's table; the section's opening explains its columns."""
    columns = "{:<31}{:>9}{:>17}{:>22}{:>11}".format
    lines = [columns("", "loss", "of the gain", "against as trained", "lower on")]
    loss_of = {part.kind: part.loss for part in parts}
    has_gain = loss_of["whole"] < loss_of["base"]  # else there is nothing to have a share of
    for part in parts:
        if part.kind == "target":
            continue  # one line below says what each of them keeps
        cells = ["", "", ""]
        if part.kind != "whole":
            of_gain = f"{100 * part.of_gain.value:.1f} ± {100 * part.of_gain.error:.1f} %"
            if part.kind == "base":
                of_gain = "0%"
            if not has_gain:
                of_gain = "-"
            better_on = f"{part.better_on}/{len(part.losses)}"
            cells = [of_gain, str(part.against_trained), better_on]
        lines.append(columns(part.title, f"{part.loss:.4f}", *cells))
    targets = sorted(of_kind(parts, "target"), key=lambda part: -part.of_gain.value)
    if targets and has_gain:
        shares = ", ".join(f"{part.value} {part.of_gain.value:.0%}" for part in targets)
        text = f"each target alone, of the gain (they need not add up to 100%): {shares}"
        lines += textwrap.wrap(text, 90, subsequent_indent="  ")
    return lines


STRENGTHS = (0.25, 0.5, 0.75, 1.25, 1.5, 2.0)


def parts_of(model: peft.PeftModel) -> list[Part]:
    """Return the parts of an adapter, in the order of the table."""
    layers = trainer.lora_layers(model)
    parts: list[Part] = []
    if can_scale_and_cut(model):
        for scale in STRENGTHS:
            parts.append(
                Part("strength", scale, f"update x {scale:g}", lambda s=scale: rescaled(model, s))
            )
    if not can_take_apart(model):
        return parts
    groups = {
        "group": paths_by_sublayer(layers),
        "target": paths_by_target(layers),
        "layers": thirds_of_layers(layers),
    }
    for kind, named in groups.items():
        for name, paths in named.items():
            parts.append(
                Part(kind, name, f"{name} alone", lambda paths=paths: only_these(layers, paths))
            )
    return parts + (cuts_of(layers) if can_scale_and_cut(model) else [])


def rescaled(model: peft.PeftModel, scale: float) -> contextlib.AbstractContextManager:
    """Multiply the finished adapter's update by scale for a while."""
    return peft.helpers.rescale_adapter_scale(model, scale)


SUBLAYERS = {"self_attn": "attention", "mlp": "feed-forward", "linear_attn": "DeltaNet"}


def paths_by_sublayer(layers: dict[str, Any]) -> dict[str, set[str]]:
    """Return {"attention": paths, ...} by the module that the targets are in, if several."""
    paths_by: dict[str, set[str]] = {name: set() for name in SUBLAYERS.values()}
    for path in layers:
        # An expert's parent is its number; the module above has a name. lm_head is in no layer.
        *names, parent = [name for name in path.split(".") if not name.isdecimal()]
        if trainer.layer_number(path) is not None:
            parent = names[-1]
        paths_by.setdefault(SUBLAYERS.get(parent, parent), set()).add(path)
    found = {name: paths for name, paths in paths_by.items() if paths}
    return found if len(found) > 1 else {}


def paths_by_target(layers: dict[str, Any]) -> dict[str, set[str]]:
    """Return {"q_proj": paths, ...}, if there are several targets."""
    found: dict[str, set[str]] = {}
    for path in layers:
        found.setdefault(path.rpartition(".")[2], set()).add(path)
    return found if len(found) > 1 else {}


def thirds_of_layers(layers: dict[str, Any]) -> dict[str, set[str]]:
    """Return {"layers 0 to 9": paths, ...} for the first, middle and last third of the layers."""
    numbers = sorted({trainer.layer_number(path) for path in layers} - {None})
    if len(numbers) < 3:
        return {}
    thirds: dict[str, set[str]] = {}
    for third in range(3):
        part = numbers[third * len(numbers) // 3 : (third + 1) * len(numbers) // 3]
        name = f"layers {part[0]} to {part[-1]}" if len(part) > 1 else f"layer {part[0]}"
        thirds[name] = {path for path in layers if trainer.layer_number(path) in part}
    return thirds


@contextmanager
def only_these(layers: dict[str, Any], paths: set[str]) -> Iterator[None]:
    """Switch LoRA off for a while in all layers but those at paths."""
    others = [module for path, module in layers.items() if path not in paths]
    for module in others:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in others:
            module.enable_adapters(True)


def cuts_of(layers: dict[str, Any]) -> list[Part]:
    """Return the cuts to a half, a quarter, ... of each layer's directions, down to one."""
    ranks = {path: module.r["default"] for path, module in layers.items()}
    is_even = len(set(ranks.values())) == 1
    parts: list[Part] = []
    divisor = 2
    while max(ranks.values()) // divisor:
        left = {path: max(1, rank // divisor) for path, rank in ranks.items()}
        most = max(left.values())
        title = f"cut to {most} {'directions' if most > 1 else 'direction'}"
        if not is_even:  # a rank_pattern gave the layers ranks of their own
            title = f"cut to 1/{divisor} of the directions"
        parts.append(Part("cut", most, title, lambda left=left: cut_to(layers, left)))
        divisor *= 2
    return parts


@contextmanager
def cut_to(layers: dict[str, Any], ranks: dict[str, int]) -> Iterator[None]:
    """Cut every update to its strongest directions for a while.

    B A = U S V^T. Projecting B on the first columns of U gives the best approximation of B A of
    that rank (Eckart and Young, 1936), and leaves A alone. B A itself is never formed.
    """
    whole = {path: module.lora_B["default"].weight.data for path, module in layers.items()}
    try:
        for path, module in layers.items():
            weight = module.lora_B["default"].weight
            b, a = weight.data.double(), module.lora_A["default"].weight.data.double()
            q, triangle = torch.linalg.qr(b)  # B = Q R
            u = q @ torch.linalg.svd(triangle @ a, full_matrices=False).U[:, : ranks[path]]
            weight.data = (u @ (u.T @ b)).to(weight.dtype)
        yield
    finally:
        for path, module in layers.items():
            module.lora_B["default"].weight.data = whole[path]


# ---- What is concluded


def conclusions(
    parts: list[Part], gain: Estimate, lines: int, after_epochs: dict[int, float] | None = None
) -> list[str]:
    """Return what the table supports, at most a sentence each on alpha, the targets and r.

    A difference is named only if it is clear (see errors_needed) and larger than WORTH_REPORTING.
    What each sentence may claim was tested by training the alternatives; README.md shows how.

    Args:
        parts: the rows of the table.
        gain: by how much the adapter is better than the base, in nats a token.
        lines: the number of lines in the held-out file that the measured examples come from.
        after_epochs: {step: held-out loss} of the run, with the base model's at step 0, if known.
    """
    if lines < FEWEST_LINES:
        return [
            f"The held-out lines are too few to tell anything: {lines} measured, "
            f"{FEWEST_LINES} needed."
        ]
    if not (gain.is_clear() and gain.value > 0):
        return [about_no_gain(parts, gain, after_epochs or {})]
    sentences = [about_alpha(parts), about_targets(parts), about_rank(parts)]
    return [sentence for sentence in sentences if sentence]


def is_conclusive(gain: Estimate, lines: int) -> bool:
    """Return whether there are lines enough, and a clear gain, to say anything of parts."""
    return lines >= FEWEST_LINES and gain.is_clear() and gain.value > 0


def of_kind(parts: list[Part], kind: str) -> list[Part]:
    """Return the parts of one kind."""
    return [part for part in parts if part.kind == kind]


def about_no_gain(parts: list[Part], gain: Estimate, after_epochs: dict[int, float]) -> str:
    """Return the sentence on an adapter that is not clearly better than the base model.

    That the run went too far is said only if the same update, weaker, is clearly better than the
    base: an update that does harm does less of it when it is weaker, and that shows nothing. That
    it was trained for too long is said only if the run's own losses show it.
    """
    if gain.value == gain.error == 0:
        return (
            "With the adapter and without it all losses are the same: it changes nothing. Perhaps "
            "it was saved before it was trained, when B is 0."
        )
    strengths = of_kind(parts, "strength")
    needed = errors_needed(len(strengths))
    weaker = [part for part in strengths if float(part.value) < 1]
    is_too_strong = any(part.gained.value > 0 and part.gained.is_clear(needed) for part in weaker)
    so = "worse" if gain.is_clear() else "not better"
    if is_too_strong:
        return (
            f"The adapter is {so} than the base model, but the same update is better than it when "
            "it is weaker: the run went too far. Try fewer epochs, a lower LEARNING_RATE or a "
            "smaller LORA_ALPHA. What its parts are worth cannot be said."
        )
    best = min(after_epochs, key=lambda step: after_epochs[step], default=0)
    if gain.is_clear() and 0 < best < max(after_epochs):
        return (
            f"The adapter is worse than the base model. The held-out loss was lowest after step "
            f"{best} ({after_epochs[best]:.4f}) and rose since: it was trained for too long, and "
            'perhaps learned the conversations by heart. Publish the best epoch (PUBLISH "best"), '
            "train fewer epochs, or find more conversations."
        )
    if gain.is_clear():
        return (
            "The adapter is worse than the base model, and the table does not show why: no weaker "
            "update is clearly better than the base. Check that the held-out conversations are of "
            "the kind that was trained on, and that tokenizer and template are the training's."
        )
    return (
        "The adapter is not better than the base model by more than twice the error, so its parts "
        "say nothing. More steps, a higher LEARNING_RATE or more held-out lines may help."
    )


def about_alpha(parts: list[Part]) -> str:
    """Return the sentence on the strength of the update."""
    strengths = of_kind(parts, "strength")
    if not strengths:
        return ""
    better = [part for part in strengths if part.verdict(len(strengths)) == "better"]
    largest = max(part.of_gain.value + 2 * part.of_gain.error for part in strengths)
    if not better and largest > 1 + THE_SAME_WITHIN:
        return "alpha: too few held-out examples to tell whether another strength is better."
    if not better:
        return (
            "alpha: keep it; for the loss, no other strength is clearly better by over "
            f"{WORTH_REPORTING:.0%} of the gain."
        )
    best = min(better, key=lambda part: part.loss)
    gained = f"{100 * (best.of_gain.value - 1):.0f} % more of the gain"
    if float(best.value) < 1:
        return (
            f"alpha: at x {best.value:g} of its strength the same update has a lower loss "
            f"({gained}), so the run went too far. Worth trying next: fewer epochs, a lower "
            "LEARNING_RATE or a smaller LORA_ALPHA."
        )
    return (
        f"alpha: at x {best.value:g} of its strength the same update has a lower loss ({gained}), "
        "so the run stopped short. Worth trying next: more epochs, a higher LEARNING_RATE or a "
        "larger LORA_ALPHA."
    )


def about_targets(parts: list[Part]) -> str:
    """Return the sentence on attention, feed-forward, DeltaNet and any other group of targets."""
    groups = of_kind(parts, "group")
    if not groups:
        return ""
    verdicts = {part.value: part.verdict(len(groups)) for part in groups}
    enough = [part for part in groups if verdicts[part.value] in ("same", "better")]
    if enough:
        best = max(enough, key=lambda part: part.of_gain.value)
        share = f"{best.of_gain.value:.0%} of the gain"
        if verdicts[best.value] == "better":
            return (
                f"targets: the update of {best.value} alone has {share}, so in this adapter the "
                "other targets do harm."
            )
        return (
            f"targets: the update of {best.value} alone keeps {share}; what the other targets add "
            f"is less than {THE_SAME_WITHIN:.0%} of it."
        )
    if "unclear" in verdicts.values():
        return "targets: too few held-out examples to tell whether one group would do alone."
    listed = ", ".join(f"{part.value} {part.of_gain.value:.0%}" for part in groups)
    return f"targets: no group alone keeps the whole gain, by a clear difference: {listed}."


def about_rank(parts: list[Part]) -> str:
    """Return the sentence on the number of directions that the update needs."""
    cuts = of_kind(parts, "cut")  # the mildest first
    if not cuts:
        return ""
    verdicts = [part.verdict() for part in cuts]
    enough: list[Part] = []
    for part, verdict in zip(cuts, verdicts, strict=True):
        if verdict not in ("same", "better"):
            break  # a shorter cut that does well is chance
        enough.append(part)
    half = cuts[0].of_gain.value
    if not enough and verdicts[0] == "worse" and half >= 1 - THE_SAME_WITHIN:
        enough = [cuts[0]]  # it loses clearly, but too little to ask for a larger r
    if enough:
        return (
            f"r: {enough[-1].title}, its strongest, the update keeps "
            f"{enough[-1].of_gain.value:.0%} of the gain, so this adapter needs no more of them. "
            "Training with a smaller r is another run, and may end elsewhere."
        )
    if verdicts[0] == "unclear":
        return "r: too few held-out examples to tell how many directions are needed."
    return (
        f"r: {cuts[0].title}, the update keeps only {half:.0%} of the gain, so it uses all its "
        "directions; whether a larger LORA_R gains more, only another run can tell."
    )


def show_kinds(losses: list[dict[str, Any]], eval_group: str) -> None:
    """Print the loss before and after by the lines' EVAL_GROUP, and the three worst examples."""
    rows_of: dict[str, list[dict[str, Any]]] = {}
    for row in losses:
        rows_of.setdefault(row["group"], []).append(row)
    if eval_group and (len(rows_of) > 1 or "" not in rows_of):
        report("kinds", join_limited(table_of_kinds(eval_group, rows_of), 40))
    worst = sorted(losses, key=lambda row: row["base"] - row["adapter"])[:3]
    shown = [f"{row['where']} ({row['adapter'] - row['base']:+.2f})" for row in worst]
    report("worst", "where the loss fell least, or rose:\n" + "\n".join(shown))


def table_of_kinds(title: str, rows_of: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return a line for each kind of held-out line, the most frequent one first."""
    columns = "{:<20}{:>9}{:>9}{:>9}{:>22}{:>12}".format
    lines = [columns(title, "examples", "base", "adapter", "difference", "lower on")]
    for kind, rows in sorted(rows_of.items(), key=lambda item: -len(item[1])):
        tokens = [row["tokens"] for row in rows]
        before = sum(row["base"] * row["tokens"] for row in rows) / sum(tokens)
        changes = [(row["adapter"] - row["base"]) * row["tokens"] for row in rows]
        change = ratio_with_error(changes, tokens, [row["where"] for row in rows])
        lower = sum(one < 0 for one in changes)
        lines.append(
            columns(
                one_line(kind or "(none)", 19),
                len(rows),
                f"{before:.4f}",
                f"{before + change.value:.4f}",
                str(change) if change.error < math.inf else f"{change.value:+.4f}",
                f"{lower}/{len(rows)}",
            )
        )
    return lines


# ==== ELSEWHERE: what else the adapter changed
#
# An adapter that learned a style may also have moved the model where it should not. The tasks of
# GENERAL_FILE are ordinary ones, such as sums, translations and lists. Two things are measured:
# - How far the model moved. The base model replies to each task once (sampled with a fixed seed, at
#   most 64 tokens). On these replies, "KL" is the mean over tokens of KL(base || adapter), in nats,
#   exact from both models' probabilities, and "other token" the share of places where the adapter
#   would choose another token. At each strength without a system message (what leaks into other
#   uses), and as trained also with the training's (which includes what was wanted). The loss on
#   reference answers would measure style: an adapter that learned to be brief would look better
#   while it forgets.
# - What was forgotten. Some of the tasks have an answer that a program can check. Base and adapter
#   answer them (greedily, without a system message), and the right ones are counted; McNemar's
#   exact test says whether the difference may be chance. Nothing that a model wrote is ever run.


@dataclass
class Task:
    """A task of GENERAL_FILE."""

    where: str  # file:line
    messages: list[dict[str, str]]  # user and assistant in turn; a user's comes last
    check: dict[str, Any] | None  # how an answer is checked, see is_right()


TASK_RULE = (
    'a line is {"prompt": [messages without a system message, the last one of the user]}, with '
    'or without a "check"'
)
CHECK_RULE = (
    'a "check" is {"kind": "number", "answer": 42}, {"kind": "word", "answers": ["Paris"]}, '
    '{"kind": "choice", "options": ["yes", "no"], "answer": "no"} or {"kind": "json", "keys": '
    '{"name": "Ada"}}'
)
REPLY_TOKENS = 64  # of a reply to a task
ROWS_AT_ONCE = 64  # replies that are generated or scored together
LOGITS_AT_ONCE = 2**26  # a quarter of a GiB in float32; a token has one for each vocabulary entry


def check_tasks(options: argparse.Namespace, settings: argparse.Namespace) -> None:
    """Exit if a task is bad, or if --general_file names no file."""
    if options.general_file and not Path(options.general_file).is_file():
        raise SystemExit(f"--general_file: there is no file {options.general_file}.")
    read_tasks(settings.GENERAL_FILE)


def read_tasks(path: str) -> list[Task]:
    """Return the tasks of a file; exit if a line is bad. There are none if there is no file."""
    if not path or not Path(path).exists():
        return []
    tasks, problems = [], []
    shown = trainer.path_from_here(path)
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{shown}:{number}"
        try:
            tasks.append(task_of(trainer.parse_row(line), where))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise SystemExit(f"{join_limited(problems)}\nGENERAL_FILE cannot be used.")
    return tasks


def task_of(row: dict[str, Any], where: str) -> Task:
    """Return the task of a line, or raise ValueError."""
    messages = row.get("prompt")
    if not isinstance(messages, list) or not messages:
        raise ValueError(TASK_RULE)
    reply = {"role": "assistant", "content": "a reply"}
    trainer.check_messages([*messages, reply])
    if messages[0]["role"] == "system":
        raise ValueError(TASK_RULE)
    check = row.get("check")
    if check is not None and not is_a_check(check):
        raise ValueError(CHECK_RULE)
    return Task(where, messages, check)


def is_a_check(check: Any) -> bool:
    """Return whether a "check" has the form that its kind needs."""
    if not isinstance(check, dict):
        return False
    answer = check.get("answer")
    if check.get("kind") == "number":
        return isinstance(answer, (int, float)) and not isinstance(answer, bool)
    if check.get("kind") == "word":
        return is_list_of_texts(check.get("answers")) and is_list_of_texts(check.get("not", ["-"]))
    if check.get("kind") == "choice":
        return is_list_of_texts(check.get("options")) and answer in check["options"]
    return check.get("kind") == "json" and isinstance(check.get("keys"), dict)


def is_list_of_texts(value: Any) -> bool:
    """Return whether value is a list of one text or more."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def is_right(reply: str, check: dict[str, Any]) -> bool:
    """Return whether a reply passes the check of its task.

    number: the last number in the reply is the answer. word: one of the answers occurs, and none
    of "not". choice: exactly one of the options occurs, and it is the answer. json: the reply holds
    one object that has these keys with these values. Letters' case and Markdown do not matter.
    """
    text = re.sub(r"[*_`]", "", reply)
    if check["kind"] == "number":
        numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
        return bool(numbers) and math.isclose(
            float(numbers[-1].replace(",", "")), check["answer"], rel_tol=1e-9, abs_tol=1e-9
        )
    if check["kind"] == "word":
        is_said = any(occurs(answer, text) for answer in check["answers"])
        return is_said and not any(occurs(wrong, text) for wrong in check.get("not", []))
    if check["kind"] == "choice":
        said = [option for option in check["options"] if occurs(option, text)]
        return said == [check["answer"]]
    found = json_object_in(reply)
    return found is not None and all(
        key in found and is_same_value(found[key], value) for key, value in check["keys"].items()
    )


def occurs(phrase: str, text: str) -> bool:
    """Return whether a phrase occurs in a text as whole words, in any case of letters."""
    pattern = rf"(?<!\w){re.escape(phrase.casefold())}(?!\w)"
    return re.search(pattern, text.casefold()) is not None


def json_object_in(reply: str) -> dict[str, Any] | None:
    """Return the JSON object that a reply holds, perhaps within other text, or None."""
    start, end = reply.find("{"), reply.rfind("}")
    with suppress(ValueError):
        found = json.loads(reply[start : end + 1])
        return found if isinstance(found, dict) else None
    return None


def is_same_value(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal; of texts the letters' case does not matter."""
    if isinstance(one, str) and isinstance(other, str):
        return one.strip().casefold() == other.strip().casefold()
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return isinstance(one, bool) == isinstance(other, bool) and math.isclose(one, other)
    return one == other


def measure_elsewhere(subject: Subject, findings: dict[str, Any]) -> dict[str, Any]:
    """Measure and print how far the adapter moves the model on other tasks."""
    tasks = read_tasks(subject.settings.GENERAL_FILE)
    if not tasks:
        report("elsewhere", "not measured: there is no GENERAL_FILE with other tasks")
        return {}
    if not subject.settings.EVIDENCE_EXAMPLES:
        return {}
    tasks = [tasks[n] for n in evenly_spread(len(tasks), subject.settings.EVIDENCE_EXAMPLES)]
    began = time.monotonic()
    examples, replies = replies_of_base(subject, tasks, "")
    shifts = shifts_of(subject.model, examples, strengths_of(subject.model))
    found: dict[str, Any] = {"tasks": len(tasks)}
    found["no system message"] = {f"x {s:g}": shift.as_recorded() for s, shift in shifts.items()}
    found["no system message"]["replies"] = replies
    table = table_of_shifts(shifts)
    if subject.system_message:
        examples, replies = replies_of_base(subject, tasks, subject.system_message)
        shift = shifts_of(subject.model, examples, [1.0])[1.0]
        found["the training's"] = {"x 1": shift.as_recorded(), "replies": replies}
        table += [row_of_shift("as trained, system message", shift)]
    report("elsewhere", "\n".join(table))
    parts = findings.get("evidence", {}).get("parts", {})
    sentences = [about_change(shifts[1.0])]
    if findings.get("evidence", {}).get("is_conclusive"):
        sentences.append(about_strength(parts, shifts))
    found["conclusions"] = [sentence for sentence in sentences if sentence]
    for sentence in found["conclusions"]:
        report("", textwrap.fill(sentence, 90, subsequent_indent="  "))
    report(
        "",
        f"measured on the base model's replies to {len(tasks)} tasks, in "
        f"{time.monotonic() - began:.0f} s",
    )
    found["table"] = table
    return {"elsewhere": found}


def replies_of_base(
    subject: Subject, tasks: list[Task], system: str
) -> tuple[list[trainer.Example], list[str]]:
    """Return the base model's sampled reply to each task, as examples and as texts."""
    first = [{"role": "system", "content": system}] if system else []
    prompts = [subject.chat_format.prompt_ids(first + task.messages) for task in tasks]
    with subject.model.disable_adapter(), torch.random.fork_rng():
        torch.manual_seed(subject.settings.SEED)
        replies = generate(
            subject.model, subject.chat_format, prompts, REPLY_TOKENS, is_sampled=True
        )
    examples = [
        trainer.Example(task.where, task.messages, "", prompt, reply.ids)
        for task, prompt, reply in zip(tasks, prompts, replies, strict=True)
    ]
    return examples, [reply.text for reply in replies]


@dataclass
class Shift:
    """How far an adapter, at some strength, moves the model: for each task, summed over tokens."""

    kl: list[float] = field(default_factory=list)  # KL(base || adapter), in nats
    other: list[float] = field(default_factory=list)  # places with another likeliest token
    tokens: list[float] = field(default_factory=list)

    def kl_a_token(self) -> Estimate:
        """Return the mean KL of a token, with its error over the tasks."""
        return ratio_with_error(self.kl, self.tokens)

    def other_tokens(self) -> Estimate:
        """Return the share of places where another token would be chosen."""
        return ratio_with_error(self.other, self.tokens)

    def as_recorded(self) -> dict[str, Any]:
        """Return it as it is in run.json."""
        return {"kl": asdict(self.kl_a_token()), "other_tokens": asdict(self.other_tokens())}


def strengths_of(model: peft.PeftModel) -> list[float]:
    """Return the strengths at which the adapter can be put on; 1 is as trained."""
    return sorted((*STRENGTHS, 1.0)) if can_scale_and_cut(model) else [1.0]


def shifts_of(
    model: peft.PeftModel, examples: list[trainer.Example], strengths: list[float]
) -> dict[float, Shift]:
    """Return {strength: how far the model moves} on the base's replies; 1 is as trained."""
    shifts = {strength: Shift() for strength in strengths}
    vocabulary = model.get_output_embeddings().weight.shape[0]
    for batch in batches_of(examples, LOGITS_AT_ONCE // vocabulary):
        inputs = trainer.pad(batch, model.device)
        counts = [len(example.reply_ids) for example in batch]
        with torch.no_grad():
            with model.disable_adapter():
                base = log_probabilities(model, inputs)
            for strength, shift in shifts.items():
                with nullcontext() if strength == 1 else rescaled(model, strength):
                    moved = log_probabilities(model, inputs)
                kl = (base.exp() * (base - moved)).sum(-1, dtype=torch.float64)
                is_other = (base.argmax(-1) != moved.argmax(-1)).double()
                shift.kl += [part.sum().item() for part in kl.split(counts)]
                shift.other += [part.sum().item() for part in is_other.split(counts)]
                shift.tokens += [float(count) for count in counts]
    return shifts


def log_probabilities(model: peft.PeftModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the log-probabilities (tokens x vocabulary) that lead to each token of the replies."""
    return trainer.reply_logits(model, inputs).float().log_softmax(-1)


def batches_of(examples: list[trainer.Example], tokens: int) -> Iterator[list[trainer.Example]]:
    """Yield the examples in order, in batches of few, whose replies have at most so many tokens."""
    batch: list[trainer.Example] = []
    for example in examples:
        has_too_many = sum(len(one.reply_ids) for one in [*batch, example]) > tokens
        if batch and (has_too_many or len(batch) == ROWS_AT_ONCE):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def table_of_shifts(shifts: dict[float, Shift]) -> list[str]:
    """Return the lines of the table: a row for each strength, without a system message."""
    lines = [f"{'':<31}{'KL, nats a token':>20}{'other top token':>20}"]
    for strength, shift in shifts.items():
        name = "as trained" if strength == 1 else f"update x {strength:g}"
        lines.append(row_of_shift(name, shift))
    return lines


def row_of_shift(name: str, shift: Shift) -> str:
    """Return a row of the table."""
    kl, other = shift.kl_a_token(), shift.other_tokens()
    share = f"{100 * other.value:.1f} ± {100 * other.error:.1f} %"
    return f"{name:<31}{f'{kl.value:.4f} ± {kl.error:.4f}':>20}{share:>20}"


def about_change(shift: Shift) -> str:
    """Return the sentence on how far the adapter moves the model where it should not."""
    kl, other = shift.kl_a_token(), shift.other_tokens()
    return (
        f"change: on other tasks the likeliest token is another one at {100 * other.value:.1f} % "
        f"of the places (KL(base || adapter) is {kl.value:.4f} nats a token; 0 is no change). It "
        "says how far the model was moved, not that anything got worse: with the same gain, prefer "
        "the run that moves it less."
    )


def about_strength(parts: dict[str, dict[str, Any]], shifts: dict[float, Shift]) -> str:
    """Return the sentence on a weaker update that keeps the gain and moves the model less.

    It names the weakest strength whose gain is the same as the whole's, or better, and whose KL is
    clearly smaller.
    """
    for strength in sorted(shifts):
        row = parts.get(f"update x {strength:g}")
        if strength >= 1 or row is None:
            continue
        share = Estimate(**row["of_gain"])
        keeps = share.value - 2 * share.error > 1 - THE_SAME_WITHIN
        moved = ratio_with_error(shifts[strength].kl, shifts[1.0].kl)
        less = Estimate(1 - moved.value, moved.error)
        if keeps and less.value > WORTH_REPORTING and less.is_clear(errors_needed(len(shifts))):
            return (
                f"strength: at x {strength:g} the update keeps {share.value:.0%} of the gain and "
                f"moves the model only {moved.value:.2f} times as far elsewhere. inspect_lora.py "
                f"for_vllm ADAPTER FOLDER --scale {strength:g} writes that adapter."
            )
    return ""


def compare_answers(subject: Subject, _: dict[str, Any]) -> dict[str, Any]:
    """Count and print the right answers of base and adapter to the tasks that can be checked."""
    tasks = [task for task in read_tasks(subject.settings.GENERAL_FILE) if task.check]
    if not tasks or not subject.settings.EVIDENCE_EXAMPLES:
        return {}
    prompts = [subject.chat_format.prompt_ids(task.messages) for task in tasks]
    with subject.model.disable_adapter():
        base = generate(subject.model, subject.chat_format, prompts, REPLY_TOKENS)
    adapter = generate(subject.model, subject.chat_format, prompts, REPLY_TOKENS)
    rows = [
        {
            "where": task.where,
            "base": one.text,
            "adapter": other.text,
            "base_is_right": is_right(one.text, task.check),
            "adapter_is_right": is_right(other.text, task.check),
        }
        for task, one, other in zip(tasks, base, adapter, strict=True)
    ]
    lost = [row["where"] for row in rows if row["base_is_right"] and not row["adapter_is_right"]]
    won = [row["where"] for row in rows if row["adapter_is_right"] and not row["base_is_right"]]
    before = sum(row["base_is_right"] for row in rows)
    after = sum(row["adapter_is_right"] for row in rows)
    p = mcnemar(len(lost), len(won))
    text = about_answers(before, after, len(lost), len(won), len(tasks), p)
    report("answers", textwrap.fill(text, 90))
    if lost:
        report("", textwrap.fill(f"no longer right: {join_limited(lost, 10, ', ')}", 90))
    found = {"tasks": len(tasks), "base": before, "adapter": after, "lost": lost, "won": won}
    return {"answers": found | {"p": p, "conclusion": text, "replies": rows}}


def mcnemar(lost: int, won: int) -> float:
    """Return the exact two-sided probability of so uneven a change by chance (McNemar, 1947)."""
    changed, fewer = lost + won, min(lost, won)
    tail = sum(math.comb(changed, k) for k in range(fewer + 1)) / 2**changed
    return min(1.0, 2 * tail)


def about_answers(before: int, after: int, lost: int, won: int, count: int, p: float) -> str:
    """Return the sentence on right answers before and after; none says that nothing was lost."""
    text = f"of {count} tasks with a checkable answer the base model got {before} right, the "
    text += f"adapter {after}: {lost} lost, {won} gained. "
    if p < 0.05:
        verb = "fails more of" if lost > won else "answers more of"
        return text + f"That is more than chance (p = {p:.3f}): the adapter {verb} such tasks."
    fewest = next(n for n in range(1, 60) if mcnemar(n, 0) < 0.05)
    if before < fewest:
        return (
            f"{text}The base model is right too seldom for this to show that something was "
            f"forgotten: fewer than {fewest} lost answers cannot be told from chance."
        )
    return (
        f"{text}That may be chance (p = {p:.2f}), and it does not show that nothing was lost: "
        f"fewer than {fewest} lost answers cannot be told from chance."
    )


# ==== PICTURE: lora.png shows the losses, the size of each update, and the evidence


def draw_picture(subject: Subject, findings: dict[str, Any]) -> dict[str, Any]:
    """Draw lora.png from what was found; nothing is drawn if nothing was."""
    from matplotlib.figure import Figure

    updates = findings.get("learned", {})
    parts = findings.get("evidence", {}).get("parts", {})
    rows: list[list[str]] = []
    if subject.history:
        rows.append(["losses", "losses"])
    if updates:
        rows.append(["updates", "updates"])
    if parts:
        rows.append(["strengths", "parts"])
    shifts = findings.get("elsewhere", {}).get("no system message", {})
    if parts and shifts:
        rows.append(["trade", "trade"])
    if not rows:
        return {}
    figure = Figure((11, 1 + 3.2 * len(rows)), dpi=120, layout="constrained")
    panels = figure.subplot_mosaic(rows)
    config = subject.model.peft_config["default"]
    title = trainer.model_title(subject.settings)
    figure.suptitle(
        f"{title}, r = {config.r}, alpha = {config.lora_alpha}, {subject.label}", parse_math=False
    )
    if subject.history:
        draw_losses(panels["losses"], subject.history)
    if updates:
        targets = trainer.in_order_of_settings(list(updates), subject.settings)
        draw_updates(panels["updates"], subject.model.config, updates, targets)
    if parts:
        draw_strengths(panels["strengths"], list(parts.values()))
        draw_parts(panels["parts"], list(parts.values()))
    if parts and shifts:
        draw_gain_and_change(panels["trade"], list(parts.values()), shifts)
    path = subject.folder / "lora.png"
    trainer.rename_old(path)
    figure.savefig(path)
    report("picture", str(path))
    return {}


def draw_losses(axes: Any, history: list[dict[str, float]]) -> None:
    """Draw each step's loss thinly, their running mean boldly, and the held-out losses."""
    losses = trainer.logged(history, "loss")
    steps, values = list(losses), list(losses.values())
    # The mean is over a thirtieth of a long run, and over up to ten steps of a short one.
    width = max(1, len(values) // 30, min(10, len(values) // 4))
    means = [statistics.fmean(values[max(0, n - width) : n]) for n in range(1, len(values) + 1)]
    axes.plot(steps, values, color="0.75", linewidth=0.7, label="training, each step")
    if width > 1:
        label = f"training, mean of {width} steps"
        axes.plot(steps, means, color="C0", linewidth=2, label=label)
    evals = trainer.logged(history, "eval_loss")
    if evals:
        look = {"color": "black", "markeredgecolor": "white", "markersize": 9, "zorder": 5}
        axes.plot(list(evals), list(evals.values()), "o--", linewidth=0.8, label="held-out", **look)
    for step, loss in evals.items():
        axes.annotate(
            f"{loss:.3f}",
            (step, loss),
            (0, 10),
            textcoords="offset points",
            ha="center",
            zorder=6,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    axes.margins(y=0.15)
    axes.set(xlabel="step", ylabel="loss, nats per token", title="Loss")
    axes.legend()


def draw_updates(
    axes: Any,
    config: transformers.PretrainedConfig,
    updates: dict[str, list[dict[str, float]]],
    targets: list[str],
) -> None:
    """Draw the size of each module's update against its W, layers across and targets down."""
    text_config = config.get_text_config()
    layer_types = text_config.to_dict().get("layer_types") or []
    depth = text_config.num_hidden_layers
    sizes = [[math.nan] * depth for _ in targets]
    for number, target in enumerate(targets):
        for row in updates[target]:
            if row["layer"] is not None:
                sizes[number][row["layer"]] = 100 * row["update"]
    image = axes.imshow(sizes, aspect="auto", vmin=0, cmap="viridis")
    axes.patch.set(hatch="xx", edgecolor="silver")  # shows through where there is no module
    axes.figure.colorbar(image, ax=axes, label="size of the update, % of W")
    marks = [str(number) for number in range(depth)]
    for number, layer_type in enumerate(layer_types):
        if layer_type == "linear_attention":
            marks[number] += "\nD"
    axes.set_xticks(range(depth), marks, fontsize=7)
    axes.set_yticks(range(len(sizes)), targets)
    note = " (D: Gated DeltaNet)" if "linear_attention" in layer_types else ""
    axes.set_xlabel(f"layer{note}; hatched: no such module, or not trained")
    axes.set_title("Where the model was changed")


def draw_strengths(axes: Any, parts: list[dict[str, Any]]) -> None:
    """Draw the held-out loss against the strength of the update."""
    drawn = [part for part in parts if part["kind"] in ("base", "strength", "whole")]
    drawn.sort(key=lambda part: part["value"])
    errors = [2 * part["against_trained"]["error"] for part in drawn]
    strengths, losses = [part["value"] for part in drawn], [part["loss"] for part in drawn]
    axes.errorbar(strengths, losses, errors, marker="o", capsize=3)
    axes.axvline(1, color="0.6", linestyle="--", linewidth=1)
    axes.set(
        xlabel="strength of the update (0: base, 1: as trained)\n"
        "bars: twice the error of the difference to 1",
        ylabel="held-out loss, nats per token",
        title="At another strength",
    )


def draw_parts(axes: Any, parts: list[dict[str, Any]]) -> None:
    """Draw what each part keeps of the gain over the base model."""
    drawn = [part for part in parts if part["kind"] not in ("base", "strength", "whole")]
    values = [100 * part["of_gain"]["value"] for part in drawn]
    errors = [200 * part["of_gain"]["error"] for part in drawn]
    titles = [part["title"] for part in drawn]
    axes.barh(titles, values, xerr=errors, color="0.6", error_kw={"capsize": 3})
    axes.axvline(100, color="0.3", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set(
        xlabel="% of the gain over the base model (bars: twice the error)", title="Which part?"
    )


def draw_gain_and_change(
    axes: Any, parts: list[dict[str, Any]], shifts: dict[str, dict[str, Any]]
) -> None:
    """Draw a point for each strength: its gain over the base against its change elsewhere."""
    drawn = [part for part in parts if part["kind"] in ("base", "strength", "whole")]
    drawn.sort(key=lambda part: part["value"])
    points = []
    for part in drawn:
        shift = shifts.get(f"x {part['value']:g}")
        if part["kind"] == "base":
            points.append((0.0, 0.0, 0.0, "base"))
        elif shift is not None:
            name = "as trained" if part["kind"] == "whole" else f"x {part['value']:g}"
            gain = part["of_gain"]
            points.append((shift["kl"]["value"], 100 * gain["value"], 200 * gain["error"], name))
    axes.errorbar(
        [point[0] for point in points],
        [point[1] for point in points],
        [point[2] for point in points],
        marker="o",
        capsize=3,
    )
    for kl, gain, _, name in points:
        axes.annotate(name, (kl, gain), (6, -12), textcoords="offset points", fontsize=8)
    axes.axhline(100, color="0.6", linestyle="--", linewidth=1)
    axes.set(
        xlabel="change on other tasks, without a system message: KL(base || adapter) a token",
        ylabel="% of the gain",
        title="What is gained, and what else is changed, at each strength",
    )


# ==== SAMPLES AND CHAT: how the adapter replies
#
# samples.md shows held-out prompts with the replies of base and adapter. In the chat, the
# conversation begins with the system message of the training data (or --system), and nothing is
# written. A pipe works too: each of its lines is answered. Replies are greedy in both: always the
# likeliest token.


def write_samples(subject: Subject, _: dict[str, Any]) -> dict[str, Any]:
    """Write samples.md: held-out prompts with the base's, adapter's and reference reply."""
    settings = subject.settings
    if not settings.NUM_SAMPLES or not subject.held_out:
        return {}
    chosen = choose_samples(subject.held_out, settings.NUM_SAMPLES)
    prompts = [example.prompt_ids for example in chosen]
    report("samples", f"the base model and the adapter answer {len(chosen)} held-out prompts")
    model, limit = subject.model, settings.MAX_NEW_TOKENS
    with model.disable_adapter():
        base = generate(model, subject.chat_format, prompts, limit)
    adapter = generate(model, subject.chat_format, prompts, limit)
    lines = [
        f"# Replies of {trainer.model_title(settings)} before and after training",
        "",
        f"The same held-out prompts, {subject.label}, always the likeliest token (greedy).",
    ]
    for number, example in enumerate(chosen):
        lines += ["", f"## {example.where} {example.eval_group}".rstrip()]
        for message in example.messages[:-1]:
            lines += ["", f"**{message['role']}**", "", trainer.quoted(message["content"])]
        lines += ["", "**base model**", "", base[number].quoted()]
        lines += ["", "**adapter**", "", adapter[number].quoted()]
        reference = trainer.quoted(example.messages[-1]["content"])
        lines += ["", "**reference reply**", "", reference]
    path = subject.folder / "samples.md"
    trainer.rename_old(path)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    habits = {"base": habits_of(base), "adapter": habits_of(adapter)}
    columns = "{:<14}{:>20}{:>12}{:>12}{:>24}".format
    head = ("", "ended on their own", "different", "mean words", "repeated word triples")
    table = [columns(*head)]
    for name, found in habits.items():
        counts = [f"{found[what]} of {len(chosen)}" for what in ("stopped", "different")]
        table.append(columns(name, *counts, f"{found['words']:.0f}", f"{found['repeated']:.0%}"))
    report("", "\n".join([*table, str(path)]))
    return {"samples": habits}


def choose_samples(held_out: list[trainer.Example], wanted: int) -> list[trainer.Example]:
    """Return one held-out example of each kind, up to 20, and as many more as are wanted."""
    first: dict[str, int] = {}
    for number, example in enumerate(held_out):
        first.setdefault(example.eval_group, number)
    chosen = sorted(first.values())[: max(wanted, 20)]
    for number in evenly_spread(len(held_out), wanted):
        if len(chosen) < wanted and number not in chosen:
            chosen.append(number)
    return [held_out[number] for number in sorted(chosen)]


@dataclass
class Reply:
    """What a model said."""

    text: str
    stopped: bool  # whether it ended on its own, and was not cut
    ids: list[int]  # its tokens, with the one that ends the turn

    def quoted(self) -> str:
        """Return it as a quotation in Markdown, marked if it was cut."""
        return trainer.quoted(self.text if self.stopped else f"{self.text} [cut here]")


def generate(
    model: peft.PeftModel,
    chat_format: trainer.ChatFormat,
    prompts: list[list[int]],
    max_new_tokens: int,
    streamer: transformers.TextStreamer | None = None,
    is_sampled: bool = False,
) -> list[Reply]:
    """Return the reply to each prompt, given as token ids: greedy, or drawn by chance.

    Many prompts go through the model together, since each token costs a pass of its own.
    """
    replies: list[Reply] = []
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        batch = prompts[start : start + ROWS_AT_ONCE]
        for row in generate_batch(model, chat_format, batch, max_new_tokens, streamer, is_sampled):
            tokens, stopped = before_the_end(row, chat_format.end_ids)
            text = chat_format.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            end = row[len(tokens) : len(tokens) + 1]  # nothing, if the reply was cut
            replies.append(Reply(text, stopped, tokens + end))
    return replies


def generate_batch(
    model: peft.PeftModel,
    chat_format: trainer.ChatFormat,
    prompts: list[list[int]],
    max_new_tokens: int,
    streamer: transformers.TextStreamer | None,
    is_sampled: bool,
) -> list[list[int]]:
    """Return the new tokens after each prompt, from one batch, padded on the left."""
    ends, width = chat_format.end_ids, max(map(len, prompts))
    ids = torch.tensor([[ends[0]] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    config = transformers.GenerationConfig(
        do_sample=is_sampled,
        num_beams=1,
        repetition_penalty=1.0,  # the model's own configuration may have another
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    if is_sampled:
        config.temperature, config.top_k, config.top_p = 1.0, 0, 1.0  # the model's own odds
    out = model.generate(ids, config, attention_mask=mask, streamer=streamer)
    return out[:, width:].tolist()


def before_the_end(tokens: list[int], ends: list[int]) -> tuple[list[int], bool]:
    """Return the tokens before the first one that ends a turn, and whether there is one."""
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[:place], True
    return tokens, False


def habits_of(replies: list[Reply]) -> dict[str, float]:
    """Return how many replies ended on their own or differ, their words, how they repeat."""
    texts = [reply.text.lower().split() for reply in replies]
    triples = [list(zip(words, words[1:], words[2:])) for words in texts]  # noqa: B905
    count = sum(map(len, triples))
    different = sum(len(set(one)) for one in triples)
    return {
        "stopped": sum(reply.stopped for reply in replies),
        "different": len({reply.text for reply in replies}),
        "words": statistics.fmean(map(len, texts)),
        "repeated": 1 - different / count if count else 0.0,
    }


CHAT_HELP = """/base and /adapter  choose who answers
/scale 0.5          answer with the adapter at another strength; 1 is as trained
/new                forget what was said
/help               show this
/quit               end (also /exit, Ctrl-D, or Ctrl-C)"""


def talk(
    model: peft.PeftModel, chat_format: trainer.ChatFormat, system: str, max_new_tokens: int
) -> None:
    """Read lines and answer them, until the input ends."""
    with suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and history at the prompt
    if sys.stdin is None:
        raise SystemExit("chat: standard input is closed, so nothing can be typed.")
    with suppress(AttributeError):  # a replaced input, as in a notebook
        sys.stdin.reconfigure(errors="replace")
    messages = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, str]] = []
    scale = 1.0
    while True:
        try:
            said = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(flush=True)
            return
        if not sys.stdin.isatty():
            print(said)  # the terminal did not show it
        word, _, rest = said.partition(" ")
        if word in ("/quit", "/exit"):
            return
        if word == "/new":
            turns = []
        elif word in ("/base", "/adapter"):
            scale = 0.0 if word == "/base" else 1.0
        elif word == "/scale" and not can_scale_and_cut(model):
            print("/scale is for plain LoRA; this adapter is more than alpha / r B A")
        elif word == "/scale":
            scale = parse_scale(rest, scale)
        elif word.startswith("/"):
            print(CHAT_HELP if word == "/help" else f"{word} is an unknown command\n{CHAT_HELP}")
        elif said:
            turns.append({"role": "user", "content": said})
            try:
                text = say(model, chat_format, messages, turns, scale, max_new_tokens)
                turns.append({"role": "assistant", "content": text})
            except KeyboardInterrupt:
                print(" [stopped]", flush=True)
                turns.pop()


def parse_scale(text: str, before: float) -> float:
    """Return the number after /scale, or say what is wrong with it and keep the old one."""
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 0 <= scale <= 10:
        print(f"/scale needs a number from 0 (the base model) to 10, such as /scale {before:g}")
        return before
    return scale


def say(
    model: peft.PeftModel,
    chat_format: trainer.ChatFormat,
    messages: list[dict[str, str]],
    turns: list[dict[str, str]],
    scale: float,
    max_new_tokens: int,
) -> str:
    """Print the reply to the conversation as it is generated, and return it.

    The oldest turns are dropped when the model's window is full.
    """
    window = model.config.get_text_config().max_position_embeddings - max_new_tokens
    ids = chat_format.prompt_ids(messages + turns)
    while len(ids) > window and len(turns) > 2:
        del turns[:2]
        ids = chat_format.prompt_ids(messages + turns)
    name = {0.0: "base", 1.0: "adapter"}.get(scale, f"adapter x {scale:g}")
    print(f"{name}> ", end="", flush=True)
    streamer = transformers.TextStreamer(
        chat_format.tokenizer, skip_prompt=True, skip_special_tokens=True
    )
    state = model.disable_adapter() if scale == 0 else rescaled(model, scale)
    with state:
        return generate(model, chat_format, [ids], max_new_tokens, streamer)[0].text


# ==== COMPARING: which run or adapter is better, and whether the difference means anything
#
# The finished runs in some folders are ranked by the held-out loss of what they published, and with
# them the adapters that `evidence` measured, by their evidence.json. Only those with the same
# held-out examples as the newest one are compared, and on the same base model. A "=" after a row
# says that its difference to the best one is within twice its standard error (three times among
# several rows), so it may be chance of the held-out lines. What another SEED would change is not in
# it: train a close winner with two seeds. A run ends with this table, of runs alone and whatever
# their base, if there are other finished runs in or below its own folder.
#
# The base model is known by its own loss on each example; an adapter's file does not tell the dtype
# it was measured in. Runs that record the same MODEL_NAME and DTYPE need no such check. In bfloat16
# it would fail: rounding depends on how many examples go through the model together, which differs
# between runs (with SmolLM2-135M it moved the loss of an example by up to 0.018). `evidence` always
# takes the same number, so what it has measured agrees.

SAME_BASE = 1e-3  # base losses of an example, in nats per token, may differ by so much

# What every run.json has; "evidence" comes when it has been measured.
RUN_KEYS = {"started", "settings", "data", "train_seconds", "resumed_from"}


def all_runs(folders: list[str]) -> dict[Path, dict[str, Any]]:
    """Return the run.json files in the folders and below them."""
    paths = [path for folder in folders for path in sorted(Path(folder).rglob("run.json*"))]
    return {path.resolve(): trainer.read_json(path) or {} for path in paths}


def finished_runs(folders: list[str]) -> dict[Path, dict[str, Any]]:
    """Return those of finished runs with held-out losses, which can be compared."""
    runs = {}
    for path, run in all_runs(folders).items():
        if run.get("outcome") == "finished" and has_losses(run):
            runs[path] = run
    return runs


def has_losses(run: dict[str, Any]) -> bool:
    """Return whether a run.json is whole and holds what is compared."""
    if not run.keys() >= {*RUN_KEYS, "evidence"}:
        return False
    if not all(isinstance(run[key], dict) for key in ("settings", "data", "evidence")):
        return False
    if not isinstance(run["settings"].get("EVAL_FILE"), str):
        return False
    if not all(isinstance(facts, dict) for facts in run["data"].values()):
        return False
    losses = run["evidence"].get("losses")
    if not losses or not isinstance(losses, list) or not all(map(is_row_of_losses, losses)):
        return False
    numbers = (run["evidence"].get("adapter"), run["started"], run["train_seconds"])
    return all(isinstance(number, (int, float)) for number in numbers)


def is_row_of_losses(row: Any) -> bool:
    """Return whether an example's row holds what is compared."""
    if not isinstance(row, dict) or not isinstance(row.get("where"), str):
        return False
    return all(isinstance(row.get(key), (int, float)) for key in ("tokens", "base", "adapter"))


def all_inspected(folders: list[str]) -> dict[Path, dict[str, Any]]:
    """Return the evidence.json files in the folders and below them, also renamed ones."""
    paths = [path for folder in folders for path in sorted(Path(folder).rglob("evidence.json*"))]
    return {
        path.resolve(): trainer.read_json(path) or {}
        for path in paths
        if path.name == "evidence.json" or path.name.startswith("evidence.json.")
    }


def measured_adapters(inspected: dict[Path, dict[str, Any]]) -> dict[Path, dict[str, Any]]:
    """Return those whose evidence is whole, each in the form of a run with "inspected" added."""
    return {path: as_a_run(found) for path, found in inspected.items() if is_measured(found)}


def is_measured(found: dict[str, Any]) -> bool:
    """Return whether an evidence.json is whole and holds what is compared."""
    if not all(isinstance(found.get(key), str) for key in ("adapter", "base")):
        return False
    if time_measured(found) is None or not isinstance(found.get("evidence"), dict):
        return False
    losses = found["evidence"].get("losses")
    if not losses or not isinstance(losses, list) or not all(map(is_row_of_losses, losses)):
        return False
    return isinstance(found["evidence"].get("adapter"), (int, float))


def time_measured(found: dict[str, Any]) -> float | None:
    """Return when an adapter was measured, as a run's "started", or None if it is not known."""
    with suppress(ValueError, TypeError, OverflowError):
        return time.mktime(time.strptime(found.get("measured"), "%Y-%m-%d %H:%M:%S"))
    return None


def as_a_run(found: dict[str, Any]) -> dict[str, Any]:
    """Return a whole evidence.json in the form of a run.json, with what is known."""
    config = found.get("adapter_config")
    config = config if isinstance(config, dict) else {}
    config = {key: in_order(value) for key, value in config.items() if key not in NOT_OF_TRAINING}
    settings = {name: config[key] for key, name in LORA_SETTINGS.items() if key in config}
    return {
        "inspected": found["adapter"],
        "started": time_measured(found),
        "train_seconds": None,
        "resumed_from": None,
        "settings": {"MODEL_NAME": found["base"]} | settings,
        "lora_config": config,
        "evidence": found["evidence"],
        "elsewhere": found.get("elsewhere"),
        "answers": found.get("answers"),
    }


def in_order(value: Any) -> Any:
    """Return a list in the order of its texts: PEFT writes sets, such as the targets, in any."""
    return sorted(value, key=str) if isinstance(value, list) else value


def compare_with_others(output: Path) -> None:
    """Print the table of runs if the run in output is one of several that have finished."""
    runs = finished_runs([str(output)])
    if len(runs) > 1 and (output / "run.json").resolve() in runs:
        show_ranked(*on_the_same_examples(runs))


def compare_runs(folders: list[str]) -> None:
    """Print the runs and measured adapters from the best to the worst, as far as they are alike."""
    for folder in folders:
        if not Path(folder).is_dir():
            raise SystemExit(f"compare: there is no folder {folder}.")
    inspected = all_inspected(folders)
    measured = measured_adapters(inspected)
    without = [found for path, found in inspected.items() if path not in measured]
    runs = finished_runs(folders) | measured
    if not runs:
        where = ", ".join(folders)
        finished = [run for run in all_runs(folders).values() if run.get("outcome") == "finished"]
        if finished or without:
            reasons = [why_no_losses(finished), why_no_evidence(without)]
            raise SystemExit(
                f"compare: no finished run or measured adapter in {where} has held-out losses to "
                f"compare: {'; '.join(filter(None, reasons))}."
            )
        raise SystemExit(
            f"compare: no run in {where} has finished, and there is no evidence.json, which "
            "`python inspect_lora.py evidence ADAPTER` writes for an adapter of another trainer."
        )
    same, left_out = on_the_same_examples(runs)
    same, on_other_bases = on_the_same_base(same)
    left_out += on_other_bases
    if without:
        left_out.append(f"left out: {why_no_evidence(without)}")
    show_ranked(same, left_out)


def newest_of(runs: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """Return the run that started last, or the adapter that was measured last."""
    return max(runs.values(), key=lambda run: run["started"])


def on_the_same_examples(
    runs: dict[Path, dict[str, Any]],
) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """Return those on the newest one's held-out examples, and a sentence about the others."""
    wanted = held_out_identity(newest_of(runs))
    same = {path: run for path, run in runs.items() if held_out_identity(run) == wanted}
    others = [run for path, run in runs.items() if path not in same]
    if not others:
        return same, []
    verb = "are" if len(others) > 1 else "is"
    return same, [f"{counted_kinds(others)} on other held-out examples {verb} left out"]


def on_the_same_base(
    runs: dict[Path, dict[str, Any]],
) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """Return those with the newest one's losses of the base model, and a sentence on the others."""
    newest = newest_of(runs)
    others = [run for run in runs.values() if not is_on_the_same_base(run, newest)]
    same = {path: run for path, run in runs.items() if is_on_the_same_base(run, newest)}
    if not others:
        return same, []
    verb = "are" if len(others) > 1 else "is"
    models = sorted({str(run["settings"].get("MODEL_NAME")) for run in others})
    largest = max(difference_of_bases(run, newest) for run in others)
    return same, [
        f"{counted_kinds(others)} {verb} left out, since the base model there "
        f"({', '.join(models)}) has other losses than that of the newest one "
        f"({newest['settings'].get('MODEL_NAME')}), by up to {largest:.4f} on an example, and a "
        "loss on another base model or dtype says nothing about the adapter: measure each by "
        "`evidence`, also a run's adapter, with the same --base and --dtype"
    ]


def is_on_the_same_base(run: dict[str, Any], newest: dict[str, Any]) -> bool:
    """Return whether two runs record the same base model and dtype, or its losses are the same."""
    if "inspected" not in run and "inspected" not in newest:
        ones, others = run["settings"], newest["settings"]
        if all(ones.get(name) == others.get(name) for name in ("MODEL_NAME", "DTYPE")):
            return True
    return run is newest or difference_of_bases(run, newest) <= SAME_BASE


def difference_of_bases(run: dict[str, Any], newest: dict[str, Any]) -> float:
    """Return the largest difference between base losses on an example, in nats per token."""
    pairs = zip(run["evidence"]["losses"], newest["evidence"]["losses"], strict=True)
    return max(abs(one["base"] - other["base"]) for one, other in pairs)


def counted_kinds(runs: list[dict[str, Any]]) -> str:
    """Return how many runs and how many adapters these are, in words."""
    adapters = sum("inspected" in run for run in runs)
    counts = {"run": len(runs) - adapters, "adapter": adapters}
    return " and ".join(trainer.counted(count, noun) for noun, count in counts.items() if count)


def show_ranked(same: dict[Path, dict[str, Any]], left_out: list[str]) -> None:
    """Print the table, and under it what its marks mean and what is left out."""
    ranked = dict(sorted(same.items(), key=lambda item: item[1]["evidence"]["adapter"]))
    head, *rows = table_of_runs(ranked, what_differs(list(same.values())))
    lines = [head, join_limited(rows, 60)]
    if len(ranked) > 1:
        lines.append("=: the difference to the best may be chance; another SEED may change more")
    if any(run["resumed_from"] for run in ranked.values()):
        lines.append("+: the run was resumed, and took this long after that")
    for sentence in left_out:
        first, *more = trainer.wrap_lines(sentence, 88).split("\n")
        lines += [first, *("  " + line for line in more)]
    has_adapters = any("inspected" in run for run in ranked.values())
    report("adapters" if has_adapters else "runs", "\n".join(lines))


# What these say is in the table already, or cannot change a result.
NOT_COMPARED = {"OUTPUT_DIR", "LOGGING_STEPS", "SAVE_STEPS", "REPORT_TO", "NUM_SAMPLES"}
NOT_COMPARED |= {"MAX_NEW_TOKENS", "EVIDENCE_EXAMPLES", "EVAL_GROUP"}
# What adapter_config.json has beyond what was trained.
NOT_OF_TRAINING = {"inference_mode", "auto_mapping", "peft_version"}
# The settings that are LoraConfig's own fields.
LORA_SETTINGS = {"r": "LORA_R", "lora_alpha": "LORA_ALPHA", "lora_dropout": "LORA_DROPOUT"}
LORA_SETTINGS |= {"target_modules": "LORA_TARGET_MODULES"}


def asked_for(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings, and what its LoraConfig has beyond them, by name."""
    config = run.get("lora_config")
    config = config if isinstance(config, dict) else {}
    in_settings = {*LORA_SETTINGS, "base_model_name_or_path"}
    more = {f"LoraConfig.{key}": value for key, value in config.items() if key not in in_settings}
    return {k: v for k, v in run["settings"].items() if k not in NOT_COMPARED} | more


def what_differs(runs: list[dict[str, Any]]) -> list[str]:
    """Return the names of the settings, and of LoraConfig's fields, in which the runs differ.

    Of a measured adapter only some are known; with one among them, what is known is compared.
    """
    asked = [asked_for(run) for run in runs]
    names = dict.fromkeys(name for one in asked for name in one)
    if any("inspected" in run for run in runs):
        known = {name: [in_order(one[name]) for one in asked if name in one] for name in names}
        return [name for name, (first, *more) in known.items() if any(one != first for one in more)]
    return [name for name in names if len({str(one.get(name)) for one in asked}) > 1]


def why_no_losses(finished: list[dict[str, Any]]) -> str:
    """Return for what reasons finished runs have no held-out losses, and how many for each."""
    counts: dict[str, int] = {}
    for run in finished:
        settings, evidence = run.get("settings"), run.get("evidence", {})
        is_whole = run.keys() >= RUN_KEYS and isinstance(settings, dict)
        if not is_whole or not isinstance(evidence, dict) or evidence.get("losses"):
            reason = "the run.json of {} is damaged, edited or of another version"
        elif not settings.get("EVAL_FILE"):
            reason = "{} had no held-out file (EVAL_FILE)"
        else:
            reason = (
                "the held-out losses of {} were not measured, since the run was stopped before or "
                "an error prevented it (its all_logs.log tells); python inspect_lora.py evidence "
                "FOLDER/final_lora measures them"
            )
        counts[reason] = counts.get(reason, 0) + 1
    return "; ".join(reason.format(count) for reason, count in counts.items())


def why_no_evidence(inspected: list[dict[str, Any]]) -> str:
    """Return for what reasons files evidence.json hold nothing to compare, and how many each."""
    stopped = sum("evidence" not in found and "adapter" in found for found in inspected)
    damaged = len(inspected) - stopped
    reasons = []
    if damaged:
        reasons.append(
            f"the evidence.json of {damaged} is damaged, edited or of another version, or its "
            "losses are no numbers"
        )
    if stopped:
        reasons.append(
            f"the held-out losses of {trainer.counted(stopped, 'adapter')} were not measured, "
            "since the command was stopped before or an error prevented it; python "
            "inspect_lora.py evidence ADAPTER measures them"
        )
    return "; ".join(reasons)


def table_of_runs(ranked: dict[Path, dict[str, Any]], differing: list[str]) -> list[str]:
    """Return the lines of the table of runs, the best first, with the settings that differ."""
    columns = "{:>9}  {:<22}{:>8}  {}".format
    adapters = ["inspected" in run for run in ranked.values()]
    noun = "adapter" if all(adapters) else "run or adapter" if any(adapters) else "run"
    lines = [columns("held-out", "against the best", "minutes", f"{noun}, and what differs")]
    best = next(iter(ranked.values()))
    tokens = [row["tokens"] for row in best["evidence"]["losses"]]
    where = [row["where"] for row in best["evidence"]["losses"]]
    for path, run in ranked.items():
        minutes = "-"  # not known of an adapter that another trainer made
        if "inspected" not in run:
            minutes = f"{run['train_seconds'] / 60:.1f}" + ("+" if run["resumed_from"] else "")
        difference = "best"
        if run is not best:
            pairs = zip(run["evidence"]["losses"], best["evidence"]["losses"], strict=True)
            changes = [(a["adapter"] - b["adapter"]) * a["tokens"] for a, b in pairs]
            change = ratio_with_error(changes, tokens, where)
            is_clear = change.is_clear(errors_needed(len(ranked) - 1))
            difference = str(change) + ("" if is_clear else " =")
        loss = f"{run['evidence']['adapter']:.4f}"
        lines.append(columns(loss, difference, minutes, trainer.shorten_path(str(path), 55)))
        asked = asked_for(run)
        changed = []
        if "inspected" in run:
            changed.append(f"adapter {trainer.shorten_path(run['inspected'], 36)}")
        names = [name for name in differing if name in asked or "inspected" not in run]
        changed += [f"{name} {one_line(str(asked.get(name)), 40)}" for name in names]
        changed += change_in_words(run)
        lines += [" " * 43 + line for line in textwrap.wrap(", ".join(changed), 45)]
    return lines


def change_in_words(run: dict[str, Any]) -> list[str]:
    """Return how far a run moved the model on other tasks, and its right answers, if measured."""
    words = []
    elsewhere, answers = run.get("elsewhere"), run.get("answers")
    if isinstance(elsewhere, dict):
        with suppress(KeyError, TypeError):
            kl = elsewhere["no system message"]["x 1"]["kl"]
            words.append(f"KL elsewhere {kl['value']:.4f} ± {kl['error']:.4f}")
    if isinstance(answers, dict):
        with suppress(KeyError, TypeError):
            words.append(f"{answers['adapter']} of {answers['tasks']} answers right")
    return words


def held_out_identity(run: dict[str, Any]) -> tuple[str, list[tuple[str, int]]]:
    """Return what identifies a run's held-out examples: the file's hash, lines and lengths."""
    rows = run["evidence"]["losses"]
    lines = [(row["where"].rpartition(":")[2], row["tokens"]) for row in rows]
    return run["evidence"].get("eval_sha256", ""), lines


# ==== SERVING: giving a server the adapter under the names that it applies, and asking it


def write_for_vllm(
    place: Path, folder: Path, options: argparse.Namespace, settings: argparse.Namespace
) -> None:
    """Write a copy of an adapter into a new folder, under the names that vLLM applies.

    Every tensor must have a place in the base model's skeleton, so no weights are loaded.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"{folder} is not empty; give a new folder, since nothing is overwritten.")
    saved = read_adapter_config(place)
    name_the_base(options, settings, saved, place, find_run(place))
    settings.DEVICE = "cpu"  # nothing is computed
    trainer.set_environment(settings)
    config = lora_config_of(place)
    tensors = read_tensors(place)
    model_config, _ = load_config_and_tokenizer(settings)
    max_rank = check_on_skeleton(model_config, fitted_config(config, tensors), tensors, place)
    if reason := trainer.why_vllm_refuses(config, max_rank):
        raise SystemExit(f"{place}: {reason}; merge the adapter into its base model instead.")
    if options.scale != 1:
        tensors = scaled_tensors(tensors, options.scale)
    saved["base_model_name_or_path"] = settings.MODEL_NAME
    if not isinstance(saved.get("target_modules"), list):
        saved["target_modules"] = sorted({name.split(".")[-3] for name in tensors})
        saved["exclude_modules"] = None
    trainer.write_adapter_for_vllm(folder, saved, tensors, model_config)
    written = read_tensors(folder)
    if any(not written[name].equal(tensor) for name, tensor in tensors.items()):
        raise SystemExit(f"{folder} does not hold the adapter's tensors; is the disk full?")
    command = trainer.vllm_command(settings, folder, max_rank, options.adapter)
    strength = "" if options.scale == 1 else f", at {options.scale:g} of its strength"
    text = f"{folder}: {len(tensors):,} tensors{strength}, each with a place in the base model"
    report("written", text)
    report("next", command)


def scaled_tensors(tensors: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors with every B multiplied by scale, and so every update B A."""
    if not 0 < scale <= 10:
        raise SystemExit(f"--scale is {scale:g}; it must be above 0 and at most 10.")
    others = [name for name in tensors if ".lora_A." not in name and ".lora_B.weight" not in name]
    if others:
        raise SystemExit(
            f"This adapter is more than A and B ({one_line(others[0])}), so it cannot be scaled."
        )
    return {
        name: tensor * scale if ".lora_B." in name else tensor for name, tensor in tensors.items()
    }


def check_on_skeleton(
    model_config: transformers.PretrainedConfig,
    config: peft.LoraConfig,
    tensors: dict[str, torch.Tensor],
    place: Path,
) -> int:
    """Return the largest rank; exit unless the tensors are those that PEFT would expect."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
        try:
            model = peft.PeftModel(model, config)
        except ValueError as error:
            raise SystemExit(f"{place} does not fit its base model ({one_line(error)}).") from error
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    wrong = [name for name, t in tensors.items() if shapes.get(name) != tuple(t.shape)]
    if wrong:
        raise SystemExit(
            f"{len(wrong):,} of the {len(tensors):,} tensors in {place} have no place in the base "
            f"model, so a server would ignore them: {join_limited(wrong, 3, ', ')}. Check --base."
        )
    return max((max(layer.r.values()) for layer in trainer.lora_layers(model).values()), default=0)


# ---- Does a running server apply the adapter?
#
# A server can accept an adapter and ignore it without a word. So the server itself scores held-out
# replies, under the adapter's name and under its base's, and what the adapter changes there is held
# against what it changes here. Two numbers say how the two agree:
#   slope  of the server's changes on those here: 1 where the adapter is applied, 0 where it is
#          ignored. It cannot tell alone, since an adapter of three times the strength makes some
#          replies better and some worse, and its slope may be anything.
#   apart  how far the server's changes are from those here, as a share of them: near 0 % only
#          where the adapter is applied.
# The token ids are sent, so the server's chat template has no say in it; how it renders the prompts
# is asked for separately. A server takes the beginning of a prompt from its cache when it replies,
# but not when it scores: so one reply is compared with the server's own scoring of it.

REPLIES_TO_SCORE = 12
FEWEST_REPLIES = 3
TOKENS_TO_GENERATE = 32
# Shares of the adapter's effect: what two right computations may be apart, at least and at most; in
# between it is twice what the base model's losses here and there are apart. With the demo's adapter
# and vLLM 0.32 in bfloat16 it is 0.002. At 1.1 times the strength it is 0.02 or more, at 1.25 times
# 0.06 (slope 1.00), at twice 0.42 (slope 0.66), at three times 0.97 (slope 0.19), at half 0.36 and
# with attention alone 0.89. A small module that is left out goes unseen (0.009 without q_proj).
MAY_BE_APART = 0.03
MAY_BE_APART_AT_MOST = 0.3
# Nats a token between the probabilities of a reply's tokens as generated and as scored: 0.001 to
# 0.009 were seen where all was right, 0.04 to 0.07 with a stale cache (vLLM 0.32 for CPUs).
# It is stale only if it is also so many times as much as for the base, of which nothing is stale.
STALE_FROM = 0.02
TIMES_THE_BASE = 4
OTHER_BASE_FROM = 0.1  # nats a token; bfloat16 against float32 is 0.002 with the demo's model


@dataclass
class Server:
    """A running server, and what it calls the adapter and its base model."""

    url: str  # without /v1
    adapter: str = ""
    base: str = ""
    folder: str = ""  # where it says that it has the adapter from
    window: float = math.inf  # tokens that a prompt and its reply may have together


@dataclass
class Asked:
    """What the server was asked about one held-out reply, and its answers; losses are in nats."""

    example: trainer.Example
    base_here: float
    adapter_here: float
    base_there: float = math.nan
    adapter_there: float = math.nan
    adapter_again: float = math.nan  # the same question a second time

    @property
    def here(self) -> float:
        """By how much the adapter changes the loss of the reply here."""
        return self.adapter_here - self.base_here

    @property
    def there(self) -> float:
        """By how much the adapter's name changes it on the server."""
        return self.adapter_there - self.base_there


@dataclass
class Agreement:
    """How well what the adapter changes on the server agrees with what it changes here.

    Sizes are root mean squares over the replies.
    """

    slope: Estimate
    size: float  # of the changes here, in nats a reply
    noise: float  # what the base's losses there and here are apart, in nats a reply
    apart: float  # what the changes there and here are apart, as a share of the size
    effect: float  # the changes there, as a share of the size

    def verdict(self) -> str:
        """Return whether the adapter is "applied", "ignored", "weak" (cannot tell), or "other"."""
        noise = self.noise / self.size if self.size else math.inf
        allowed = min(max(MAY_BE_APART, 2 * noise), MAY_BE_APART_AT_MOST)
        if self.apart <= allowed:
            return "applied"
        if noise > 1:
            return "weak"
        if self.effect <= allowed:
            return "ignored"
        return "weak" if 2 * noise > MAY_BE_APART_AT_MOST else "other"


def find_server(options: argparse.Namespace, place: Path) -> Server:
    """Return the server and its names for adapter and base; exit if it does not offer them."""
    server = Server(re.sub(r"(/v1)?/*$", "", options.url.strip()))
    models = ask(server, "/v1/models").get("data")
    if not isinstance(models, list) or not all(isinstance(one, dict) for one in models):
        raise SystemExit(f"{server.url}/v1/models does not list models: is it an OpenAI server?")
    offered = {str(one.get("id")): one for one in models}
    server.adapter = options.name or name_of_adapter(offered, options, place)
    found = offered.get(server.adapter)
    if found is None:
        raise SystemExit(
            f"The server does not offer {server.adapter}; it offers {', '.join(offered) or 'none'}."
            " Give one of these with --name, or start the server with --lora-modules "
            f"{server.adapter}=FOLDER."
        )
    server.base = str(found.get("parent") or "")
    if server.base not in offered:
        raise SystemExit(
            f"The server offers {server.adapter} as a model of its own, and not as an adapter of "
            "another, so there is no base model to compare it with. Give the adapter's name with "
            f"--name; it offers {', '.join(offered)}."
        )
    server.folder = str(found.get("root") or "")
    windows = [one.get("max_model_len") for one in (found, offered[server.base])]
    server.window = min([n for n in windows if isinstance(n, int)], default=math.inf)
    report("server", f"{server.url} offers {server.adapter}, an adapter of {server.base}")
    return server


def name_of_adapter(
    offered: dict[str, dict[str, Any]], options: argparse.Namespace, place: Path
) -> str:
    """Return the name under which a server offers the adapter; exit if that is not clear."""
    adapters = {name: one for name, one in offered.items() if one.get("parent")}
    if not adapters:
        raise SystemExit(
            f"The server offers no adapter, only {', '.join(offered) or 'nothing'}. Start it with "
            "--enable-lora --lora-modules "
            f"{trainer.name_on_server(place)}={folder_to_serve(place)}."
        )
    if len(adapters) == 1:
        return next(iter(adapters))
    names = {options.adapter, trainer.name_on_server(place)}
    folders = {place, folder_to_serve(place)}
    roots = {options.adapter, *map(str, folders), *(str(one.resolve()) for one in folders)}
    ours = [name for name, one in adapters.items() if one.get("root") in roots or name in names]
    if len(ours) != 1:
        raise SystemExit(
            f"The server offers several adapters: {', '.join(adapters)}. Say with --name which of "
            "them is asked."
        )
    return ours[0]


def folder_to_serve(place: Path) -> Path:
    """Return the folder for a server: the one under vLLM's names, if a run wrote it beside."""
    renamed = place.with_name("final_lora_vllm")
    return renamed if place.name == "final_lora" and renamed.is_dir() else place


def choose_replies(
    options: argparse.Namespace,
    place: Path,
    run: Run | None,
    settings: argparse.Namespace,
    window: float,
) -> tuple[list[Asked], trainer.ChatFormat]:
    """Return some held-out replies with their losses here, and how prompts are rendered.

    The losses are those in run.json, so that nothing is loaded or computed. If it has none for this
    file and these tokens, they are measured.
    """
    held_out = read_held_out(settings, run, options)
    if run and (recorded := with_losses_in_run(options, place, run)):
        name_the_base(options, settings, read_adapter_config(place), place, run)
        trainer.set_environment(settings)
        chat_format = load_chat_format(settings, place, options)
        held_out, _ = trainer.encode_file(held_out, chat_format, settings.MAX_SEQ_LEN)
        lines = [(one.where.rpartition(":")[2], len(one.reply_ids)) for one in held_out]
        if held_out_identity(recorded) == (trainer.file_sha256(Path(settings.EVAL_FILE)), lines):
            report("here", f"the losses with and without the adapter are those in {run.path}")
            rows = recorded["evidence"]["losses"]
            chosen = spread_over(held_out, window)
            return [as_recorded(held_out[n], rows[n]) for n in chosen], chat_format
    adapter = open_adapter(options, place, run, settings)
    held_out = encode_held_out(held_out, adapter, settings)
    examples = [held_out[n] for n in spread_over(held_out, window)]
    at_once = tokens_to_begin_with(examples)
    with_it = trainer.example_losses(adapter.model, examples, at_once, "adapter")
    with adapter.model.disable_adapter():
        without = trainer.example_losses(adapter.model, examples, at_once, "base")
    report("here", "the losses with and without the adapter were measured just now")
    return list(map(Asked, examples, without, with_it)), adapter.chat_format


def with_losses_in_run(options: argparse.Namespace, place: Path, run: Run) -> dict[str, Any]:
    """Return run.json with the losses of this adapter, or nothing if others are asked for."""
    if options.base or options.enable_thinking:
        return {}
    record = run.record
    if not run.is_published:
        findings = record.get("checkpoint_findings", {}).get(place.resolve().name, {})
        record = record | {"evidence": findings.get("evidence", {})}
    if not has_losses(record) or not all("base" in row for row in record["evidence"]["losses"]):
        return {}
    return record


def as_recorded(example: trainer.Example, row: dict[str, Any]) -> Asked:
    """Return a reply with its losses in run.json, which are in nats a token there."""
    return Asked(example, row["tokens"] * row["base"], row["tokens"] * row["adapter"])


def spread_over(examples: list[trainer.Example], window: float) -> list[int]:
    """Return the numbers of the replies to score, evenly spread over those that the server takes.

    The one with the longest prompt is among them: of that one most comes from the server's cache.
    A server generates at least one token, even if it is only asked for scores.
    """
    fitting = [n for n, one in enumerate(examples) if len(one.input_ids) < window]
    if len(fitting) < FEWEST_REPLIES:
        limit = f" in the {window:,.0f} tokens that it takes" if math.isfinite(window) else ""
        raise SystemExit(
            f"The server can score {len(fitting)} of the {len(examples)} held-out replies{limit}, "
            f"and {FEWEST_REPLIES} are needed.\nGive more with --eval_file, or start the server "
            "with a larger --max-model-len."
        )
    longest = max(fitting, key=lambda n: len(examples[n].prompt_ids))
    spread = [fitting[n] for n in evenly_spread(len(fitting), REPLIES_TO_SCORE - 1)]
    return sorted({*spread, longest})


def ask(
    server: Server, path: str, body: dict[str, Any] | None = None, advice: str = ""
) -> dict[str, Any]:
    """Return the server's answer to one request; exit if it cannot be had, and give the advice."""
    status, answer = send(server, path, body)
    address = f"{server.url}{path}"
    if status in (401, 403):
        raise SystemExit(
            f"{address}: the server asks for a key ({status}: {answer}).\nSet the environment "
            "variable VLLM_API_KEY or OPENAI_API_KEY to the key that it was started with."
        )
    if status == 404 and body is None:
        raise SystemExit(f"{address}: there is no such page ({status}).\n{GIVE_THE_ADDRESS}")
    if status != 200:
        raise SystemExit(f"{address}: the server answers {status}: {answer}\n{advice}".strip())
    if not isinstance(answer, dict):
        raise SystemExit(
            f"{address}: the answer is no object in JSON: {answer}\n{GIVE_THE_ADDRESS}"
        )
    return answer


GIVE_THE_ADDRESS = "Give the address of an OpenAI-compatible server, such as http://localhost:8000."


def send(
    server: Server, path: str, body: dict[str, Any] | None
) -> tuple[int, dict[str, Any] | str]:
    """Return the status of a request and its answer: an object, or what else it says in one line.

    The key of the environment is always sent, since a server may ask for it on some paths only.
    Each request has a connection of its own, so that a balancer may choose another replica.
    """
    try:
        import httpx2 as httpx  # huggingface_hub brings it, from its version 2 on
    except ModuleNotFoundError:
        import httpx

    key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
    try:
        response = httpx.request(
            "GET" if body is None else "POST",
            f"{server.url}{path}",
            json=body,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(300, connect=10),  # in seconds
        )
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
        raise SystemExit(
            f"{server.url} is no address ({one_line(error)}).\n{GIVE_THE_ADDRESS}"
        ) from error
    except httpx.HTTPError as error:
        reason = one_line(error) or type(error).__name__
        raise SystemExit(
            f"{server.url}{path} cannot be reached ({reason}).\nIs the server running, and has it "
            "finished loading? Give the address that it prints."
        ) from error
    try:
        answer = response.json()
    except ValueError:
        answer = response.text
    if response.status_code == 200:
        return 200, answer if isinstance(answer, dict) else one_line(answer, 100)
    if isinstance(answer, dict):  # an error: vLLM's is {"error": {"message": ...}}
        answer = answer.get("error", answer)
    if isinstance(answer, dict):
        answer = answer.get("message", answer)
    return response.status_code, one_line(answer)


# ---- What the server's scores say


CANNOT_SCORE = (
    "So replies cannot be scored (prompt_logprobs of /v1/completions). vLLM can do it: ask it "
    "itself, without a gateway before it."
)


def score(server: Server, name: str, prompt: list[int], reply: list[int]) -> list[float]:
    """Return the log-probability of each of the reply's tokens, as the server computes it."""
    body = {"model": name, "prompt": prompt + reply, "max_tokens": 1, "temperature": 0}
    answer = ask(server, "/v1/completions", body | {"prompt_logprobs": 0}, CANNOT_SCORE)
    try:
        rows = answer["choices"][0]["prompt_logprobs"][len(prompt) :]
        pairs = zip(rows, reply, strict=True)
        found = [float(row[str(token)]["logprob"]) for row, token in pairs]
    except (KeyError, IndexError, TypeError, ValueError):
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise SystemExit(
            f"{server.url}/v1/completions: as {name} the server gives no probability for each "
            f"token of a prompt.\n{CANNOT_SCORE}"
        )
    return found


def ask_for_losses(server: Server, asked: list[Asked]) -> None:
    """Have the server score each reply: once as the base, and twice as the adapter.

    The two questions follow each other, so that of two replicas that take turns each gets one.
    """
    from tqdm import tqdm

    for one in tqdm(asked, desc="scoring", leave=False, disable=None):
        prompt, reply = one.example.prompt_ids, one.example.reply_ids
        one.base_there = -sum(score(server, server.base, prompt, reply))
        one.adapter_there = -sum(score(server, server.adapter, prompt, reply))
        one.adapter_again = -sum(score(server, server.adapter, prompt, reply))


def root_mean_square(numbers: list[float]) -> float:
    """Return the square root of the mean of the squares."""
    return math.sqrt(statistics.fmean(number * number for number in numbers))


def agreement_of(asked: list[Asked]) -> Agreement:
    """Return how well the adapter's changes on the server agree with those here."""
    here, there = [one.here for one in asked], [one.there for one in asked]
    size = root_mean_square(here)
    noise = root_mean_square([one.base_there - one.base_here for one in asked])
    if size == 0:
        return Agreement(Estimate(math.nan, math.inf), 0.0, noise, math.inf, math.inf)
    squares = sum(x * x for x in here)
    slope = sum(x * y for x, y in zip(here, there, strict=True)) / squares
    left = sum((y - slope * x) ** 2 for x, y in zip(here, there, strict=True))
    return Agreement(
        Estimate(slope, math.sqrt(left / (len(asked) - 1) / squares)),
        size,
        noise,
        apart=root_mean_square(differences(there, here)) / size,
        effect=root_mean_square(there) / size,
    )


def judge_losses(server: Server, asked: list[Asked], options: argparse.Namespace) -> str:
    """Print how the losses there and here agree; return what is wrong and what to do, or ""."""
    found = agreement_of(asked)
    tokens = sum(len(one.example.reply_ids) for one in asked)
    base_here = sum(one.base_here for one in asked) / tokens
    base_there = sum(one.base_there for one in asked) / tokens
    here = sum(one.here for one in asked) / tokens
    there = sum(one.there for one in asked) / tokens
    slope = f"slope {found.slope.value:.3f} ± {found.slope.error:.3f}"
    apart = f"single replies differ by {100 * found.apart:.1f} %"
    lines = [
        "loss, nats a token      here   on the server",
        f"base model           {base_here:7.4f}   {base_there:13.4f}",
        f"adapter - base       {here:+7.4f}   {there:+13.4f}",
    ]
    if found.size:
        lines.append(f"{slope} (1: applied, 0: ignored); {apart}")
    report("scored", "\n".join(lines))
    if problem := two_answers(asked, found):
        return problem
    verdict = found.verdict()
    if verdict == "applied":
        return ""
    whence = f" It has {server.adapter} from {server.folder}." if server.folder else ""
    if verdict == "ignored":
        better = folder_to_serve(Path(options.adapter))
        folder = f"the folder {better}"
        if better == Path(options.adapter):
            folder = f"what `python inspect_lora.py for_vllm {options.adapter} FOLDER` writes"
        return (
            "The base answers under the adapter's name: the server gives the replies the same "
            f"losses as {server.adapter} and as {server.base} ({slope}), so it ignores the adapter."
            "\n"
            f"Give the server {folder}, or use a newer version of the server.{whence}"
        )
    doubt = ""
    if abs(base_there - base_here) > OTHER_BASE_FROM:
        doubt = (
            f" But first see whether it has the same base model, unquantized: its loss is "
            f"{base_here:.4f} here and {base_there:.4f} there."
        )
    if verdict == "weak":
        return (
            "The effect is too weak to tell whether the adapter is applied: it changes the loss of "
            f"a reply by {found.size:.2f} nats here, and the base model's losses here and there "
            f"are {found.noise:.2f} nats apart.\nGive longer held-out replies, or "
            f"some on which the adapter changes more, with --eval_file.{doubt}"
        )
    return (
        f"The adapter is applied with another scaling or in part, or it is another adapter: "
        f"{slope}, and {apart}.\nCompare r, lora_alpha and use_rslora in the adapter_config.json "
        f"that the server reads with those in {options.adapter}, and look in its log for modules "
        f"that it leaves out.{whence}{doubt}"
    )


def two_answers(asked: list[Asked], found: Agreement) -> str:
    """Return that the server answered the same question in two ways, and what to do, or ""."""
    gaps = [abs(one.adapter_again - one.adapter_there) for one in asked]
    limit = max(0.2 * found.size, 2 * found.noise)
    unlike = sum(gap > limit for gap in gaps)
    if not unlike:
        return ""
    return (
        f"The server's answers differ: asked twice, it gave {unlike} of {len(asked)} replies "
        f"losses that are up to {max(gaps):.2f} nats apart, as where several servers stand behind "
        "one address and not all have this adapter.\nAsk each of them by its own address, and "
        "give the adapter to all."
    )


# ---- How the server renders prompts, and whether it replies as it scores


def check_rendering(
    server: Server, asked: list[Asked], chat_format: trainer.ChatFormat, kwargs: dict[str, Any]
) -> str:
    """Print whether the server writes prompts as in training; return what is wrong, or "".

    Args:
        kwargs: the chat_template_kwargs that a client sends; without any it is the server's
            defaults that count.
    """
    how = f"with {json.dumps(kwargs)}" if kwargs else "by its defaults"
    unlike: list[tuple[trainer.Example, list[int]]] = []
    for one in asked:
        tokens, reason = rendered_by(server, one.example, kwargs)
        if reason:
            report("rendered", f"not checked, since {reason}")
            return ""
        if tokens != one.example.prompt_ids:
            unlike.append((one.example, tokens))
    if not unlike:
        report("rendered", f"{how} the server writes all {len(asked)} prompts as in training")
        return ""
    example, tokens = unlike[0]
    trained, there = where_they_part(example.prompt_ids, tokens, chat_format)
    report(
        "rendered",
        f"{how} the server writes {len(unlike)} of {len(asked)} prompts otherwise\n"
        f"{example.where} in training:    {trained}\n"
        f"{example.where} on the server:  {there}",
    )
    wanted = {"enable_thinking": chat_format.enable_thinking}
    tokens, _ = rendered_by(server, example, kwargs | wanted)
    advice = "Give the server the chat template of the training, with --chat-template."
    if tokens == example.prompt_ids:
        text = json.dumps(wanted)
        advice = (
            f"Start the server with --default-chat-template-kwargs '{text}', or let each client "
            f'send "chat_template_kwargs": {text}.'
        )
    return (
        f"The prompt is rendered otherwise than in training, {how}: {there} instead of {trained}, "
        f"so the adapter is asked what it was not trained on.\n{advice}"
    )


def rendered_by(
    server: Server, example: trainer.Example, kwargs: dict[str, Any]
) -> tuple[list[int], str]:
    """Return the tokens of a prompt as the server writes it, and "", or why they cannot be had."""
    body = {
        "model": server.adapter,
        "messages": example.messages[:-1],
        "add_generation_prompt": True,
    }
    if kwargs:
        body["chat_template_kwargs"] = kwargs
    status, answer = send(server, "/tokenize", body)
    if status in (401, 403, 404, 405):
        return [], f"/tokenize is closed ({status})"
    if status != 200 or not isinstance(answer, dict):
        return [], f"/tokenize answers {status}: {answer}"
    tokens = answer.get("tokens")
    return (tokens, "") if tokens else ([], "/tokenize does not take messages")


def where_they_part(
    trained: list[int], served: list[int], chat_format: trainer.ChatFormat
) -> tuple[str, str]:
    """Return the two texts around the first token in which they differ, as Python writes them."""
    pairs = zip(trained, served, strict=False)
    shorter = min(len(trained), len(served))
    first = next((n for n, (one, other) in enumerate(pairs) if one != other), shorter)
    around = slice(max(0, first - 6), first + 6)
    decode = chat_format.tokenizer.decode
    return repr(decode(trained[around])), repr(decode(served[around]))


def check_generation(server: Server, asked: list[Asked]) -> str:
    """Print whether the server replies as it scores; return what is wrong and what to do, or "".

    This comes before the scoring, which may put fresh tokens into the server's cache.
    """
    prompts = [one.example.prompt_ids for one in asked]
    fitting = [one for one in prompts if len(one) + TOKENS_TO_GENERATE < server.window]
    if not fitting:
        report("replied", "not compared with its scores, since no prompt leaves room for a reply")
        return ""
    prompt = max(fitting, key=len)
    gaps = []
    for name in (server.base, server.adapter):
        tokens, generated = generated_by(server, name, prompt)
        if not tokens:
            report("replied", "not compared with its scores, since it gives no tokens of a reply")
            return ""
        scored = score(server, name, prompt, tokens)
        gaps.append(statistics.fmean(map(abs, differences(generated, scored))))
    base_gap, gap = gaps
    report(
        "replied",
        f"a reply's tokens are {gap:.4f} nats from the server's own scores (base: {base_gap:.4f})",
    )
    if gap <= max(STALE_FROM, TIMES_THE_BASE * base_gap):
        return ""
    return (
        f"Replies under the name {server.adapter} are stale: the probabilities of their tokens are "
        f"{gap:.3f} nats from those that the server itself gives them (as {server.base} "
        f"{base_gap:.3f}), as where an adapter was loaded anew under its name and the cache still "
        "holds prompts that the old one read.\nLoad it from another folder or under another name, "
        "or restart the server."
    )


def generated_by(server: Server, name: str, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Return a greedy reply's tokens and their log-probabilities, or nothing if they are not told.

    vLLM tells them since return_token_ids was added to it.
    """
    body = {
        "model": name,
        "prompt": prompt,
        "max_tokens": TOKENS_TO_GENERATE,
        "temperature": 0,
        "repetition_penalty": 1.0,  # the model's own configuration may have another
        "ignore_eos": True,  # more tokens tell more
        "logprobs": 0,
        "return_token_ids": True,
    }
    answer = ask(server, "/v1/completions", body, CANNOT_REPLY)
    try:
        choice = answer["choices"][0]
        tokens, numbers = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        pairs = list(zip(tokens, map(float, numbers), strict=True))
    except (KeyError, IndexError, TypeError, ValueError):
        return [], []
    return [token for token, _ in pairs], [number for _, number in pairs]


CANNOT_REPLY = (
    "So it was not asked whether it applies the adapter. Its log may say more; the request is one "
    "that vLLM answers."
)


# ==== COMMAND LINE: flags and messages
#
# A command ends with status 0, with 1 after an error, with 2 after a wrong flag, and with 130 after
# Ctrl-C. A mistake that is known is one message; any other error ends in a traceback.

COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], str]] = {
    "evidence": (evidence, "measure what an adapter gained, and what its parts are worth"),
    "chat": (chat, "talk to an adapter, or answer each line of a pipe"),
    "compare": (compare, "compare finished runs, and adapters that evidence has measured"),
    "for_vllm": (for_vllm, "write an adapter under the names that vLLM applies"),
    "served": (served, "ask a running server whether it applies an adapter"),
}


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with a subcommand for each command."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\nThis file needs")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == "compare":
            command.add_argument(
                "folders",
                nargs="+",
                metavar="FOLDER",
                help="folders with runs, or with what evidence found: it writes into "
                "output/inspected/NAME unless --output_dir says otherwise",
            )
            continue
        if name == "served":
            command.add_argument("url", metavar="URL", help="such as http://localhost:8000")
        command.add_argument(
            "adapter", metavar="ADAPTER", help="an adapter's folder, or its name on the hub"
        )
        if name == "for_vllm":
            command.add_argument("folder", metavar="FOLDER", help="a new folder to write into")
        add_flags(command, name)
    return parser


def add_flags(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the flags of a command that opens an adapter.

    What is not given is what the adapter's run had, or the constant in train_lora_single.py.
    """
    number = trainer.number_parser(int, 100)
    parser.add_argument(
        "--base", help="the base model, if adapter_config.json names none, or a quantized one"
    )
    parser.add_argument("--base_revision", help="its branch, tag or commit on the hub")
    if command == "for_vllm":
        parser.add_argument(
            "--scale",
            type=trainer.number_parser(float, 0.75),
            default=1.0,
            help="write the adapter at this strength; 1 is as trained",
        )
        return
    parser.add_argument("--device", choices=("cuda", "cpu"), help='"cpu" is for small models')
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the base's weights")
    parser.add_argument(
        "--enable_thinking",
        action="store_true",
        help="render prompts with enable_thinking, for an adapter that was trained so",
    )
    if command != "served":
        parser.add_argument(
            "--max_new_tokens", type=number, help="a reply is cut after so many tokens"
        )
        parser.add_argument("--system", help="the system message; default: that of the run")
    if command == "chat":
        return
    parser.add_argument(
        "--eval_file",
        help="held-out conversations, a JSONL file; needed for an adapter of another trainer, else "
        "that of its run",
    )
    parser.add_argument(
        "--max_seq_len", type=number, help="in tokens; longer examples are left out"
    )
    if command == "served":
        parser.add_argument("--name", help="what the server calls the adapter; default: found out")
        parser.add_argument(
            "--chat_template_kwargs",
            type=as_object,
            default={},
            metavar="JSON",
            help="what clients send under this name, if not the server's defaults",
        )
        return
    parser.add_argument("--eval_group", help="the key that groups its lines in the report")
    parser.add_argument(
        "--evidence_examples", type=number, help="examples that measure the parts; 0 for none"
    )
    parser.add_argument(
        "--general_file",
        help="other tasks, to see what else changed, in the form of data/general.jsonl, which is "
        'the default; "" for none',
    )
    parser.add_argument("--num_samples", type=number, help="at least so many prompts in samples.md")
    parser.add_argument(
        "--output_dir",
        help="gets samples.md, lora.png and, for an adapter of another trainer, evidence.json; "
        "default: the run's folder, or output/inspected/NAME",
    )


def as_object(text: str) -> dict[str, Any]:
    """Return a flag's value as an object, or say what the flag must be."""
    with suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise argparse.ArgumentTypeError(
        f"it must be an object in JSON, such as '{{\"enable_thinking\": false}}'; it is {text!r}"
    )


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Return the command and its flags; exits with status 2 after a wrong one."""
    parser = build_parser()
    argv = [trainer.with_underscores(one) for one in (sys.argv[1:] if argv is None else argv)]
    if not argv:
        parser.print_help()
        raise SystemExit(2)
    if argv[0] not in COMMANDS and not argv[0].startswith("-"):
        close = difflib.get_close_matches(argv[0], COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        parser.error(f"there is no command {argv[0]}; {hint}")
    options = parser.parse_args(argv)
    if options.command is None:
        parser.error(f"name a command: {', '.join(COMMANDS)}")
    return options


def main(argv: list[str] | None = None) -> None:
    """Do one command. Exits with 1 after an error, 2 after a wrong flag, 130 after Ctrl-C."""
    options = parse_options(argv)
    command, _ = COMMANDS[options.command]
    try:
        command(options)
    except BaseException as error:
        status, message = trainer.explain(error, Path())
        if not message:
            raise
        print(trainer.wrap_lines(message), file=sys.stderr)
        raise SystemExit(status) from error


# `uv run inspect_lora.py evidence ...` reads this and needs no environment made by hand (PEP 723).
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.7,<2.11",
#     "transformers>=5.24,<5.30",
#     "peft>=0.21.2,<0.22",
#     "trl>=1.16,<1.17",
#     "datasets>=5,<6",
#     "accelerate>=1.15,<2",
#     "safetensors>=0.8,<1",
#     "matplotlib>=3.10,<4",
#     "huggingface_hub",
#     "filelock",
#     "tqdm",
#     "jinja2",
# ]
# ///


if __name__ == "__main__":
    trainer.survive_closed_outputs()
    main()
