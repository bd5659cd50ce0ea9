"""Which matrices are trained, in how many steps, and what TRL is told.

Before any weights are loaded, PEFT puts LoRA into a copy of the model on the meta device. A
misspelt module, such as q_projj, ends the run here; PEFT would ignore it as long as another one
exists. With 1,000 examples the settings as shipped give ceil(1000 / 4) x 3 = 750 steps.
"""

from __future__ import annotations

import difflib
import math
import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import peft
import safetensors.torch
import torch
import transformers
import trl
from peft.tuners.lora import LoraLayer
from torch import nn

from train_lora.base import Base, facts_of_base
from train_lora.console import UserError, join_limited, report
from train_lora.data import Data
from train_lora.files import read_json, short_hash
from train_lora.settings import Settings, examples_per_step

# These change W, so that the adapter fits only this run's copy, or (eva) need data to begin with,
# else PEFT silently uses plain LoRA.
UNSUPPORTED_METHODS = ("pissa", "olora", "loftq", "corda", "lora_ga", "eva")


@dataclass(frozen=True)
class Plan:
    """What will be trained, in how many steps."""

    trained_shapes: dict[str, tuple[int, ...]]  # of LoRA's weights, by name
    all_parameters: int
    lora_table: list[str]  # of the modules that get LoRA
    steps_per_epoch: int
    steps: int


def make_plan(settings: Settings, base: Base, data: Data, lora: peft.LoraConfig) -> Plan:
    """Put LoRA into a model on the meta device; check what it would train, and count."""
    method = str(lora.init_lora_weights).lower()
    if method.startswith(UNSUPPORTED_METHODS) or lora.bias != "none":
        fields = f"init_lora_weights={method!r}, bias={lora.bias!r}"
        raise UserError(f"lora_fields(): {fields} are not supported; remove them.")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(base.config, trust_remote_code=False)
    refuse_unknown_modules(lora, model)
    peft.inject_adapter_in_model(lora, model)
    if getattr(base.config.get_text_config(), "router_aux_loss_coef", 0.0):
        report("warning", "the experts' routers are trained without their auxiliary loss")
    if isinstance(model.get_output_embeddings(), LoraLayer):
        raise UserError(
            "LORA_TARGET_MODULES: the head of the model (lm_head) cannot have LoRA; remove it, or "
            'train it whole with modules_to_save=["lm_head"].'
        )
    if base.config.get_text_config() is not base.config:
        refuse_other_towers(model)
    weights = dict(model.named_parameters())
    count = sum(weight.numel() for weight in weights.values())
    shapes = {name: tuple(w.shape) for name, w in weights.items() if w.requires_grad}
    if settings.START_FROM:
        check_start(settings, base, lora, model)
    table = table_of_modules(model, sum(map(math.prod, shapes.values())), count)
    steps_per_epoch = math.ceil(len(data.examples) / examples_per_step(settings))
    steps = steps_per_epoch * settings.NUM_EPOCHS
    steps = min(steps, settings.MAX_STEPS or steps)
    return Plan(shapes, count, table, steps_per_epoch, steps)


def refuse_unknown_modules(config: peft.LoraConfig, model: nn.Module) -> None:
    """Raise UserError if a name matches no module; PEFT is silent if another name matches."""
    paths = {f".{path}": module for path, module in model.named_modules()}
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)  # the latter in GPT-2
    linear = [path for path, module in paths.items() if isinstance(module, kinds)]
    known = sorted({path.rpartition(".")[2] for path in linear})
    names = {"rank_pattern": [*config.rank_pattern], "alpha_pattern": [*config.alpha_pattern]}
    if not isinstance(config.target_modules, str):
        # Not "all-linear" or a regular expression; PEFT raises if that matches nothing.
        names["LORA_TARGET_MODULES"] = sorted(config.target_modules)
    for where, patterns in names.items():
        missing = []
        for name in patterns:  # the keys of rank_pattern and alpha_pattern are regular expressions
            wanted = re.escape(name) if where == "LORA_TARGET_MODULES" else name
            if not any(re.search(rf"\.(?:{wanted})$", path) for path in paths):
                missing.append(name)
        if missing:
            close = difflib.get_close_matches(missing[0], known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(
                f"{where}: the model has no module named {', '.join(missing)}; {hint}"
                f"Its linear modules are {', '.join(known)}."
            )


def refuse_other_towers(model: transformers.PreTrainedModel) -> None:
    """Raise UserError if a part for images or sound gets LoRA, which no text would train."""
    modules, decoder = dict(model.named_modules()), model.get_decoder()
    text = next((path for path, module in modules.items() if module is decoder and path), "")
    lora = [path for path, module in modules.items() if isinstance(module, LoraLayer)]
    inside = [path for path in lora if path.startswith(text)]
    if outside := [path for path in lora if path not in inside]:
        names = "|".join(dict.fromkeys(path.rpartition(".")[2] for path in inside))
        raise UserError(
            f"LORA_TARGET_MODULES also match {len(outside)} modules outside the text model, such "
            f"as {outside[0]}, which text does not train. In lora_fields() write "
            rf'target_modules=r"{re.escape(text)}\..*\.({names})".'
        )


def check_start(settings: Settings, base: Base, lora: peft.LoraConfig, model: nn.Module) -> None:
    """Raise UserError unless START_FROM is an adapter of this base, of the kind trained here."""
    folder = Path(settings.START_FROM)
    if folder.resolve() == Path(settings.OUTPUT_DIR, "final_lora").resolve():
        raise UserError(f"START_FROM {folder} would be replaced; choose another OUTPUT_DIR.")
    config = read_json(folder / "adapter_config.json")
    identity, facts = read_json(folder / "run.json").get("identity"), facts_of_base(base)
    if not identity:  # not an adapter of this script
        identity, facts = config, {"base_model_name_or_path": settings.MODEL_NAME}
    names = ["r", "lora_alpha", "alpha_pattern", "use_rslora"]
    planned = {name: getattr(lora, name) or 0 for name in names} | facts
    saved = {name: config.get(name) or 0 for name in names}
    saved |= {name: identity.get(name) for name in facts}
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    planned |= {f"base_model.model.{name}": [*tensor.shape] for name, tensor in tensors.items()}
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    saved |= {name: [*tensor.shape] for name, tensor in tensors.items()}
    names = [name for name in {**planned, **saved} if planned.get(name) != saved.get(name)]
    if names:
        pairs = [f"{name}={saved.get(name)}, not {planned.get(name)}" for name in names]
        raise UserError(
            f"START_FROM {folder} has {join_limited(pairs, 4, '; ')}. Use its settings, and its "
            "commit as MODEL_REVISION."
        )
    template, path = base.tokenizer.get_chat_template(), folder / "chat_template.jinja"
    served = path.read_text(encoding="utf-8") if path.is_file() else template
    here = {"chat template": short_hash(template), "ENABLE_THINKING": base.enable_thinking}
    there = {"chat template": short_hash(served)} | identity
    for name, value in here.items():
        if there.get(name, value) != value:
            report(
                "warning", f"{folder} was trained with another {name}, and must now learn this one"
            )


def table_of_modules(model: nn.Module, trained: int, everything: int) -> list[str]:
    """Return a line for each kind of module with its W, A and B, and one with the sums."""
    kinds: Counter[str] = Counter()
    columns = "{:<12}{:>14}{:>10}{:>10}{:>14}{:>11}".format
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            d, k, r = module.out_features, module.in_features, max(module.r.values())
            matrices = f"{d:,}x{k:,}", f"{r}x{k:,}", f"{d:,}x{r}", f"{r * (d + k):,}"
            scale = f"{module.scaling['default']:g}"
            kinds[columns(path.rpartition(".")[2], *matrices, scale)] += 1
    depth = model.config.get_text_config().num_hidden_layers
    lines = [f"{columns('module', 'W (frozen)', 'A', 'B', 'trained each', 'scaled by')}  layers"]
    lines += [f"{kind}{count:>5}/{depth}" for kind, count in kinds.items()]
    percent = f"trainable%: {100 * trained / everything:.4f}"
    return [*lines, f"trainable params: {trained:,} || all params: {everything:,} || {percent}"]


def show_plan(
    settings: Settings, base: Base, data: Data, plan: Plan, training: trl.SFTConfig
) -> None:
    """Print the tokens, an example as the model sees it, and how it will be trained."""
    decode = base.tokenizer.decode
    counts = "{file}: {dialogues:,} dialogues of {replies:,} replies, in {examples:,} examples; "
    counts += "{tokens:,} tokens, of which {targets:,} are targets"
    for facts in data.facts.values():
        report("data", counts.format(**facts) if facts else "nothing is held out")
    example = data.examples[0]
    text, place = "", 0
    for reply in example.replies:
        text += f"{decode(reply.prompt_ids[place:])}>>>{decode(reply.reply_ids)}<<<"
        place = len(reply.input_ids)
    lines = [f"{example.source} as the model sees it; only text between >>> <<< is a target:"]
    for line in text.split("\n"):
        lines += textwrap.wrap(line, 88)
    if len(lines) > 10:
        lines[5:-5] = ["[...]"]
    report("example", "\n".join(lines))
    size = examples_per_step(settings)
    steps = f"{plan.steps:,} steps of {size}, {plan.steps_per_epoch:,} per epoch"
    facts = data.facts["train"]
    if facts["replies"] > facts["examples"]:
        steps += f", of {facts['replies'] / plan.steps_per_epoch:.1f} replies each"
    steps += f"; learning rate {training.learning_rate:g}, {training.lr_scheduler_type.value}, "
    steps += f"weight decay {training.weight_decay:g}"
    report("plan", "\n".join([*plan.lora_table, steps]))
    if plan.steps < 100 and size > 1 and not settings.MAX_STEPS:
        report("few steps", "--gradient_accumulation_steps 1 or a smaller --batch_size gives more")
