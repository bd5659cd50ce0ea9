"""The base model: its commit, configuration, tokenizer, chat template and weights.

Only safetensors are loaded, and no model's own code is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
import trl
from huggingface_hub.errors import GatedRepoError, HTTPError, RevisionResolutionError

from train_lora.console import UserError, one_line, report
from train_lora.device import is_out_of_memory
from train_lora.files import Facts, file_sha256


@dataclass(frozen=True)
class BaseRequest:
    """Which base model is wanted, and how it is to be called and computed."""

    name: str  # on the hub, or a local folder
    revision: str  # its branch, tag or commit
    chat_template: str  # "" for the model's own, one_pass, or a file
    enable_thinking: bool
    dtype: str
    device: str
    matmul: str  # native, float16 or auto
    commit: str = ""  # if an earlier job has fixed it


@dataclass(frozen=True)
class Base:
    """What is known of the base model before its weights are loaded."""

    request: BaseRequest
    config: transformers.PretrainedConfig
    commit: str  # on the hub; "" for a local folder
    tokenizer: transformers.PreTrainedTokenizerBase  # with its chat template
    stop_ids: list[int]  # the tokens at which the model stops
    special_tokens: list[str]  # no message may contain these
    enable_thinking: bool  # how the chat template is called


def read_base(request: BaseRequest, tokenizer: Any = None) -> Base:
    """Read all but the weights: commit, configuration, and tokenizer if none is given."""
    name, template = request.name, request.chat_template
    try:
        commit = commit_of(request)
        revision = commit or "main"
        options = {"revision": revision, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(name, **options)
        tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(name, **options)
        ends = [tokenizer.eos_token_id]
        with contextlib.suppress(OSError):  # not every model has one
            # Gemma's tokenizer ends with <eos>, but its turns with <end_of_turn>.
            generation = transformers.GenerationConfig.from_pretrained(name, revision=revision)
            end = generation.eos_token_id
            ends += end if isinstance(end, list) else [end]
    except (OSError, ValueError, HTTPError, RevisionResolutionError) as error:
        advice = "check the name, the folder or the network"
        if GatedRepoError in (type(error), type(error.__cause__)):
            advice = f"accept its licence at https://huggingface.co/{name}, then `hf auth login`"
        raise UserError(f"{name} cannot be read ({one_line(error)}); {advice}.") from error
    stop_ids = [token for token in dict.fromkeys(ends) if token is not None]
    if "quantization_config" in config.to_dict():
        raise UserError(f"{name} is quantized, which is unsupported; use the original.")
    if template == "one_pass":
        tokenizer.chat_template = one_pass_template(tokenizer)
    elif template:
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    if not tokenizer.chat_template:
        raise UserError(
            f"CHAT_TEMPLATE {template!r} gives no chat template for {name}; use another one, such "
            'as a file, or "" for the model\'s own.'
        )
    if not stop_ids:
        raise UserError(f"{name} names no stop token; add eos_token_id to generation_config.json.")
    if commit:
        report("model", f"{name}, commit {commit}; --model_revision changes it")
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return Base(request, config, commit, tokenizer, stop_ids, special, request.enable_thinking)


def one_pass_template(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """Return the chat template with which TRL trains this model, or "" if TRL knows none."""
    try:
        template = trl.get_training_chat_template(tokenizer)
        template = template or tokenizer.get_chat_template()  # None: the model's own will do
    except ValueError:  # TRL does not know the model's own template
        return ""
    # These tags mark what TRL would train on; no server knows them.
    return re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)


def commit_of(request: BaseRequest) -> str:
    """Return the model's commit on the hub, or "" for a local folder."""
    if Path(request.name).is_dir():
        return ""
    if request.commit:
        return request.commit
    return huggingface_hub.resolve_revision(request.name, revision=request.revision).resolved


def facts_of_base(base: Base) -> Facts:
    """Return the hub's commit, and hashes of local files; weights are sampled at 1,000 places."""
    folder, weights = Path(base.request.name), hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            for place in range(0, size, max(1, size // 1000)):
                file.seek(place)
                weights.update(file.read(64))
    return {
        "commit": base.commit,
        "config.json of MODEL_NAME": file_sha256(folder / "config.json"),
        "weights of MODEL_NAME": weights.hexdigest(),
    }


def loading_options(commit: str, device: str) -> Facts:
    """Return from_pretrained()'s options for a base: no code is run that comes from the hub."""
    return {
        "revision": commit or "main",
        "device_map": {"": torch.cuda.current_device()} if device == "cuda" else None,
        "trust_remote_code": False,
        "use_safetensors": True,  # a pickle could run code
        "use_kernels": False,  # so could kernels, which transformers 5.25 takes from the hub
        "output_loading_info": True,  # for check_loaded()
    }


@contextlib.contextmanager
def loading_explained(name: str, device: str) -> Iterator[None]:
    """Raise UserError if a model's weights cannot be loaded within."""
    report("model", f"loading the weights of {name}")
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The weights of {name} cannot be read ({one_line(error)}). Only safetensors files "
            "are, as a pickle (.bin) could run code."
        ) from error
    except RuntimeError as error:  # transformers may report full memory as a conversion error
        is_full = device == "cuda" and torch.cuda.mem_get_info()[0] < 2**30
        if is_full or is_out_of_memory(error):
            raise UserError(f"{name} is too large for the GPU's free memory.") from error
        raise


def check_loaded(name: str, info: Facts) -> None:
    """Raise UserError if weights are missing, which transformers would fill at random."""
    if info["missing_keys"]:
        raise UserError(f"{name}: weights are missing: {sorted(info['missing_keys'])[:3]} ...")
