"""Opens an adapter on its base model.

Every tensor of the file must find its place, and switching the adapter off must give the base back:
PEFT only warns of the first and says nothing of the second, and each number would be wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import train_lora_single as script
from inspect_lora import adapter_file
from inspect_lora.adapter_file import SavedAdapter, base_of, faults_of, name_in_text_model
from inspect_lora.common import InspectError, hash_of, one_line, read_json, say, some

PROBE = [{"role": "user", "content": "Does the Severn end in the Bristol Channel after 220 miles?"}]


@dataclass
class LoadedBase:
    """The weights of a base model, and what was measured of it, for all adapters it gets."""

    identity: tuple[str, ...]  # name, commit, type, device and matmul
    matmul: str
    weights: transformers.PreTrainedModel | None = None
    known: dict[str, Any] = field(default_factory=dict)  # losses and replies, by a hash
    trial: tuple[torch.Tensor, torch.Tensor] | None = None  # tokens, and the logits they gave


@dataclass
class Adapter:
    """An adapter on its base model."""

    saved: SavedAdapter
    model: peft.PeftModel
    settings: argparse.Namespace  # the base's name and type
    base: script.Base  # its commit, tokenizer and stop ids
    loaded: LoadedBase

    @property
    def is_plain(self) -> bool:
        """Whether each update is scaling x B A on a linear layer, so it has strengths and parts."""
        return not self.saved.beyond_lora

    @property
    def layers(self) -> dict[str, peft.tuners.lora.LoraLayer]:
        """The modules that have LoRA, by their path."""
        kind = peft.tuners.lora.LoraLayer
        return {path: mod for path, mod in self.model.named_modules() if isinstance(mod, kind)}

    def at_strength(self, strength: float) -> AbstractContextManager[Any]:
        """Give the adapter another strength for a while; 0 is the base, 1 as trained."""
        if strength == 1:
            return nullcontext()
        if strength == 0:
            return self.model.disable_adapter()
        return peft.helpers.rescale_adapter_scale(self.model, strength)

    def measured_of_base(
        self, keys: list[Any], items: list[Any], measure: Callable[[list[Any]], list[Any]]
    ) -> list[Any]:
        """Return what measure() gives for each item with the adapter off.

        What is known by its key, since another adapter has asked for it, is not measured again.
        """
        names, known = [hash_of(key) for key in keys], self.loaded.known
        items_by_name = dict(zip(names, items, strict=True))
        unknown = {name: item for name, item in items_by_name.items() if name not in known}
        with self.at_strength(0):
            known |= dict(zip(unknown, measure([*unknown.values()]), strict=True))
        return [known[name] for name in names]


# ---- Opening


def describe_base(
    options: argparse.Namespace, saved: SavedAdapter
) -> tuple[argparse.Namespace, script.Base]:
    """Return the script's settings, and all of the base but its weights.

    Raises InspectError if the adapter is not measurable, or the base is not there.
    """
    if faults := faults_of(saved):
        raise InspectError("\n".join([f"{saved.place} is not measured:", *faults]))
    tokenizer = own_tokenizer(saved.place)
    settings = settings_of(options, saved, tokenizer is not None)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    script.prepare_device(settings)
    try:
        return settings, script.read_base(settings, tokenizer)
    except script.UserError as error:
        original = adapter_file.original_of(settings.MODEL_NAME)
        named = f", {original}" if original != settings.MODEL_NAME else ""
        raise InspectError(
            f"{error}\nThis is about the base of {saved.place}. Give --base: where it is now, or "
            f"the original of a quantized base{named}."
        ) from error


def settings_of(
    options: argparse.Namespace, saved: SavedAdapter, has_template: bool
) -> argparse.Namespace:
    """Return the script's settings: those of the training, as far as they are known."""
    trained = read_json(saved.place / "run.json").get("settings", {})
    by_default = {name: getattr(script, name) for name in script.SETTINGS}
    settings = argparse.Namespace(**by_default | trained, dry_run=False)
    # Asked so, the driver is not started, which reads CUDA_VISIBLE_DEVICES only once.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    settings.DEVICE = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    is_on_gpu = settings.DEVICE == "cuda"
    known = options.dtype or trained.get("DTYPE")
    settings.DTYPE = known or ("bfloat16" if is_on_gpu else "float32")
    settings.MODEL_NAME = options.base or base_of(saved)
    revision = "main" if options.base else saved.config.get("revision", "main")
    settings.MODEL_REVISION = options.base_revision or revision
    settings.MATMUL = settings.MATMUL if is_on_gpu else "native"
    settings.ENABLE_THINKING = options.enable_thinking or trained.get("ENABLE_THINKING", False)
    of_training = "" if has_template else trained.get("CHAT_TEMPLATE", "")
    settings.CHAT_TEMPLATE = options.chat_template or of_training
    settings.OUTPUT_DIR = os.devnull  # where no earlier job names a commit
    if not settings.MODEL_NAME:
        raise InspectError(f"{saved.place} does not name its base model; give it with --base.")
    return settings


def prompt_ids(messages: list[dict[str, str]], base: script.Base) -> list[int]:
    """Return a prompt's tokens as in training, or raise ValueError if it cannot be rendered."""
    thoughts = "<think>\nI think.\n</think>\n\n" if base.enable_thinking else ""
    reply = {"role": "assistant", "content": f"{thoughts}A reply."}
    return script.render([*messages, reply], base)[0]


def open_adapter(
    saved: SavedAdapter,
    settings: argparse.Namespace,
    base: script.Base,
    before: Adapter | None = None,
) -> Adapter:
    """Load the base model with the adapter on it.

    before is an adapter that was measured: if it has the same base, that is not loaded again.
    """
    loaded = load_base(settings, base, before)
    model = attach_and_compare(loaded, saved, base.tokenizer)
    say("adapter", f"{saved.place} on {settings.MODEL_NAME}, {settings.DTYPE}, {settings.DEVICE}")
    return Adapter(saved, model, settings, base, loaded)


def load_base(
    settings: argparse.Namespace, base: script.Base, before: Adapter | None
) -> LoadedBase:
    """Return the base model with its weights.

    They are taken over from the adapter before, unless that had another base or has changed it, as
    PEFT leaves a module there that was trained whole.
    """
    uses_fp16 = script.uses_fp16_matmul(settings, base.config)
    matmul = "float16" if uses_fp16 else "native"
    identity = (settings.MODEL_NAME, base.commit, settings.DTYPE, settings.DEVICE, matmul)
    loaded = before.loaded if before and before.loaded.identity == identity else None
    if loaded:
        loaded.weights = before.model.unload().eval()
        if is_unchanged(loaded):
            return loaded
        loaded.weights = None
    if before:
        del before.model, before.loaded  # there may be no memory for two
    weights = script.load_model(settings.MODEL_NAME, base.commit, settings.DTYPE, settings.DEVICE)
    if uses_fp16:
        script.use_fp16_matmul(weights)  # as in training
    weights.generation_config = transformers.GenerationConfig()  # else its own min_p and such count
    loaded = loaded or LoadedBase(identity, matmul)
    loaded.weights = weights.eval()
    return loaded


def is_unchanged(loaded: LoadedBase) -> bool:
    """Return whether a base gives the logits of its first trial, now that an adapter is off it."""
    probe, logits = loaded.trial
    return logits_of(loaded.weights, probe).equal(logits)


def logits_of(network: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return a model's logits, in its own type."""
    with torch.no_grad():
        return network(ids).logits


def own_tokenizer(place: Path) -> transformers.PreTrainedTokenizerBase | None:
    """Return the adapter's own tokenizer if it has one with a chat template."""
    if not (place / "tokenizer_config.json").is_file():
        return None
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    return tokenizer if tokenizer.chat_template else None


def attach_and_compare(
    loaded: LoadedBase, saved: SavedAdapter, tokenizer: transformers.PreTrainedTokenizerBase
) -> peft.PeftModel:
    """Attach the adapter; raise InspectError unless it has an effect that switching off undoes.

    Both are tried on a chat, since of an embedding perhaps only the tokens between the turns, such
    as <|im_start|>, were trained.
    """
    form = {"add_generation_prompt": True, "return_dict": False, "return_tensors": "pt"}
    probe = tokenizer.apply_chat_template(PROBE, **form).to(loaded.weights.device)
    before = logits_of(loaded.weights, probe)
    loaded.trial = loaded.trial or (probe, before)
    model = attach(loaded.weights, saved).eval()
    with model.disable_adapter():
        after = logits_of(model, probe)
    effect = (logits_of(model, probe) - after).abs().max().item()
    if effect == 0:  # as of an activated LoRA, which waits for tokens that are not sent here
        raise InspectError(f"{saved.place} changes nothing: the logits are those of the base.")
    if (after - before).abs().max().item() > effect / 100:
        raise InspectError(
            f"{saved.place} changes the base model's own weights, such as by biases or a copied "
            "embedding. Switching it off does not undo that, so there is no base to compare with."
        )
    return model


def attach(base: transformers.PreTrainedModel, saved: SavedAdapter) -> peft.PeftModel:
    """Return the base model with the adapter's tensors in it, each of them in its place."""
    config = peft.LoraConfig.from_pretrained(saved.place)
    is_wrapper = any(name.endswith("language_model.layers") for name, _ in base.named_modules())
    mapping = adapter_file.TO_WRAPPER if is_wrapper else adapter_file.TO_TEXT_MODEL
    if not config.target_parameters:
        # The names of the configuration may be those of another class than the base's. PEFT would
        # not find them, and take the common alpha in silence.
        modules = {adapter_file.renamed(mod.path, mapping): mod for mod in saved.modules}
        config.target_modules, config.exclude_modules = sorted(modules), None
        keys = {f"^{re.escape(path)}": module for path, module in modules.items()}
        config.rank_pattern = {key: module.r for key, module in keys.items()}
        config.alpha_pattern = {key: module.alpha for key, module in keys.items()}
    config.inference_mode = config.init_lora_weights = True  # B = 0 until it is loaded
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys without a place, which are refused below
            model = peft.PeftModel(base, config)
            landed = model.load_adapter(
                saved.place, "default", key_mapping=mapping, torch_device=str(base.device)
            )
    except (KeyError, RuntimeError, ValueError) as error:
        raise InspectError(
            f"{saved.place} does not fit its base: {one_line(error, 400)}"
        ) from error
    refuse_lost_tensors(saved, [*landed.missing_keys, *landed.unexpected_keys])
    return model


def refuse_lost_tensors(saved: SavedAdapter, lost: list[str]) -> None:
    """Raise InspectError if a tensor has no place, unless its update is 0.

    Unsloth may put LoRA into the vision tower, where B is 0 still if only text was trained.
    """
    zeros = {name_in_text_model(mod.path) for mod in saved.modules if mod.is_zero}
    lost = [key for key in lost if name_in_text_model(key.partition(".lora_")[0]) not in zeros]
    if lost:
        raise InspectError(
            f"{len(lost)} tensors of {saved.place} find no place in the base, or are missing: "
            f"{some(lost)}. Of Qwen3.5 the text model alone is loaded, without its vision tower."
        )
