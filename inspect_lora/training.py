"""How an adapter was trained, as far as its files tell: one name for each setting.

What is missing here is not known. Names of train_lora_single.py and TRL are in capitals, those of
PEFT's configuration are not.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import trl

from inspect_lora.adapter import NOT_PLAIN, SavedAdapter, name_in_text_model
from inspect_lora.common import hash_of

# What PEFT's configuration decides, and PEFT's values where a file does not name them.
OF_PEFT: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "rank_pattern": None,
    "alpha_pattern": None,
    "use_rslora": False,
    "bias": "none",
    "init_lora_weights": True,
    **dict.fromkeys(NOT_PLAIN),
}
# Of TRL's configuration; run.json names those that training_fields() sets.
OF_TRL = ("weight_decay", "max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon")
OF_TRL += ("label_smoothing_factor", "neftune_noise_alpha")
# What cannot change a result, or is known better by another name here.
NOT_TOLD = {
    "OUTPUT_DIR", "LOGGING_STEPS", "SAVE_STEPS", "REPORT_TO", "EVAL_FILE", "DEVICE", "MODEL_NAME",
    "MODEL_REVISION", "TRAIN_FILE", "START_FROM", "CHAT_TEMPLATE", "BATCH_SIZE",
    "GRADIENT_ACCUMULATION_STEPS", "LORA_R", "LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGET_MODULES",
}  # fmt: skip
CODE = "code"  # of run.json's identity: a hash of what the script executes, without its settings


def known_settings(saved: SavedAdapter) -> dict[str, Any]:
    """Return what may have made an adapter what it is: settings by their names."""
    return of_peft(saved) | (of_script(saved.training) if saved.training.get("settings") else {})


def of_peft(saved: SavedAdapter) -> dict[str, Any]:
    """Return what PEFT's configuration decides.

    Targets are those that have tensors, however the configuration spells them.
    """
    known = {key: saved.config.get(key, default) for key, default in OF_PEFT.items()}
    known = {k: None if v is False or v in ({}, []) else v for k, v in known.items()}
    modules = [module for module in saved.modules if not module.is_zero]
    paths = sorted(name_in_text_model(module.path) for module in modules)
    known["target_modules"] = ", ".join(sorted({module.target for module in modules}))
    known["modules"] = f"{len(paths)} ({hash_of(paths)[:6]})"
    return known


def of_script(training: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run of train_lora_single.py, the values that were used."""
    identity, settings = training.get("identity", {}), training["settings"]
    known = trl_defaults(training) | {k: v for k, v in settings.items() if k not in NOT_TOLD}
    if settings.get("FINAL_LORA") == "last":  # else it decides among which steps the best one is
        known.pop("EVAL_STEPS", None)
    for key, value in identity.items():
        if key.startswith("SFTConfig."):
            known[key.removeprefix("SFTConfig.").upper()] = value
    train = training.get("data", {}).get("train") or {}
    known |= {
        "TRAIN_FILE": f"{Path(train.get('file', '?')).name} {train.get('sha256', '?')[:8]}",
        "START_FROM": identity.get("adapter of START_FROM", "?")[:8] or None,
        "EXAMPLES IN A STEP": identity.get("examples in a step"),
        "CHAT TEMPLATE": identity.get("chat template"),
    }
    codes = [session.get(CODE) for session in training.get("sessions", [])]
    codes = [code[:8] for code in dict.fromkeys([*codes, identity.get(CODE)]) if code]
    return known | ({"CODE": ", then ".join(codes)} if codes else {})


def trl_defaults(training: dict[str, Any]) -> dict[str, Any]:
    """Return TRL's values of what a run did not set; {} if it had another version of TRL."""
    sessions = training.get("sessions") or [{}]
    versions = {session.get("versions", {}).get("trl") for session in sessions}
    if versions != {importlib.metadata.version("trl")}:
        return {}
    defaults = {each.name: each.default for each in dataclasses.fields(trl.SFTConfig)}
    return {name.upper(): defaults[name] for name in OF_TRL}
