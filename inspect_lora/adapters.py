"""Opens any PEFT LoRA adapter on its base model, or says why it cannot be measured.

- The base model is what adapter_config.json names, or --base. A copy that bitsandbytes quantized is
  loaded as that where bitsandbytes is installed; any other quantized copy is refused.
- The tokenizer and the chat template are the adapter's own, if it has them, else the base's.
- Tensors under the names of a model for images and text find their places in its text part.
- Every tensor of the file must have its place in the model. PEFT only warns, and the adapter's gain
  would read 0. What switching the adapter off would not undo is refused: the "base" would be wrong.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from inspect_lora.common import (
    InspectError,
    join_limited,
    one_line,
    pluralize,
    read_json,
    report,
    shorten_path,
)
from inspect_lora.faults import problems_of, reasons_against
from inspect_lora.files import (
    KEY_MAPPING,
    PREFIX,
    QUANTIZED_NAME,
    Run,
    can_load_quantized,
    find_base,
    name_in_text_model,
    path_in_text_model,
    read_adapter_config,
)
from inspect_lora.modules import SavedAdapter, rank_and_alpha, read_adapter
from inspect_lora.trainer import (
    TEMPLATE_ERRORS,
    TESTED_IN_FP16,
    ChatFormat,
    Example,
    UserError,
    choose_delta_kernels,
    commit_of,
    encode,
    example_losses,
    is_out_of_memory,
    load_chat_format,
    load_config,
    load_model,
    prepare_device,
    script_sha256,
    use_fp16_matmul,
)


@dataclass
class Adapter:
    """An adapter on its base model."""

    place: Path  # the folder of its files
    run: Run | None  # of train_lora_single.py, if it comes from one
    model: peft.PeftModel
    chat_format: ChatFormat
    base: str  # the base model's folder or its name on the hub
    revision: str  # its commit, if it is on the hub
    dtype: str
    file_dtype: torch.dtype  # of the base's weights in their file
    matmul: str = "native"  # or "float16", on a GPU that only emulates bfloat16
    delta_kernels: str = ""  # what computes DeltaNet's layers on a GPU, and why


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the adapter, and the flags of every command that loads it onto its base."""
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder, or a name on the hub")
    parser.add_argument(
        "--base", help="the base model, if the adapter names none or a quantized copy"
    )
    parser.add_argument("--base_revision", help="its branch, tag or commit on the hub")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the base's weights")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: the GPU, if there is one that works"
    )
    parser.add_argument(
        "--enable_thinking",
        action="store_true",
        help="render prompts with enable_thinking, for an adapter that was trained so",
    )


def add_system_argument(parser: argparse.ArgumentParser) -> None:
    """Add --system, which `evidence` has as well."""
    parser.add_argument("--system", help="the system message; default: that of the training")


def system_message_of(options: argparse.Namespace, trained_by: Run | None) -> str:
    """Return the system message of the training: --system, else the run's, else none."""
    if options.system is not None:
        return options.system
    return trained_by.record.get("system_message", "") if trained_by else ""


def refuse_system_message(system: str, chat_format: ChatFormat) -> None:
    """Refuse a system message that the chat template does not take, such as Gemma 2's."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "hello"}]
    try:
        chat_format.prompt_ids(messages[0 if system else 1 :])
    except TEMPLATE_ERRORS as error:
        raise InspectError(
            f"The base model's chat template refuses a system message ({one_line(error)}). Leave "
            'it out with --system "".'
        ) from error


def open_adapter(options: argparse.Namespace, place: Path, run: Run | None) -> Adapter:
    """Load the base model with the adapter on top of it, each of its tensors in its place."""
    saved = read_adapter(place)
    refuse_unmeasurable(saved, place)
    config = fitted_config(lora_config_of(place), saved)
    base, revision = base_of(options, place, run)
    if not options.base and not Path(base).is_dir():
        refuse_quantized_name(base)
    with errors_name_the_base(base):
        revision = commit_of(base, revision)
        base_config = load_config(base, revision)
    refuse_other_quantization(base, base_config)
    device, dtype = choose_device_and_dtype(options, base_config, run)
    delta_kernels = ""
    if device.type == "cuda":  # before the model's code is imported
        delta_kernels = choose_delta_kernels(base_config, dtype)
    with errors_name_the_base(base):
        chat_format = chat_format_of(options, place, base, revision)
        model = load_model(base, revision, dtype, device)
    # generate() would take from the model's own what it is not told, such as min_p.
    model.generation_config = transformers.GenerationConfig()
    file_dtype = base_config.get_text_config().dtype or base_config.dtype or model.dtype
    matmul = "native"
    if run and run.record.get("products") == "float16" and device.type == "cuda":
        model, matmul = use_fp16_matmul(model), "float16"  # as it was trained
    elif emulates_bfloat16(device, dtype) and base_config.model_type in TESTED_IN_FP16:
        reload = functools.partial(load_model, base, revision, dtype, device)
        model, matmul = with_float16_matmuls(model, chat_format, reload)
    model = put_adapter_on(model, config, saved, place)
    lora = model.peft_config["default"]
    by_pattern = " (others by pattern)" if lora.rank_pattern or lora.alpha_pattern else ""
    modules = pluralize(len(lora_layers(model)), "module")
    report(
        "adapter",
        f"{shorten_path(options.adapter, 88)}, on {device.type}\nr = {lora.r}, alpha = "
        f"{lora.lora_alpha}{by_pattern} on {modules} of {shorten_path(base, 40)}, {dtype}",
    )
    if run and run.record.get("script_sha256") not in (None, script_sha256()):
        report("", "It was trained by another version of train_lora_single.py than the one here.")
    return Adapter(
        place, run, model, chat_format, base, revision, dtype, file_dtype, matmul, delta_kernels
    )


@contextmanager
def errors_name_the_base(base: str) -> Iterator[None]:
    """Add to a message of the script by which flag another base model is named."""
    try:
        yield
    except UserError as error:
        raise InspectError(
            f"{error}\n(The adapter's base model is {base}; if that is a "
            "folder, give with --base where it is now.)"
        ) from error
    except ValueError as error:  # transformers' word on a model that is no language model
        raise InspectError(
            f"The base model {base} cannot be loaded as a language model ({one_line(error, 150)}); "
            "see --base."
        ) from error


# ---- Which base model, device and type, and what renders the conversations


def base_of(options: argparse.Namespace, place: Path, run: Run | None) -> tuple[str, str]:
    """Return the name and the revision of the adapter's base model, or say that it is needed."""
    if options.base:
        return options.base, options.base_revision or "main"
    saved = read_adapter_config(place)
    recorded = str(saved.get("base_model_name_or_path") or "")
    revision = options.base_revision or saved.get("revision")
    if not recorded:
        raise InspectError(f"{place} does not name its base model; give it with --base.")
    found = find_base(saved, place, run, revision)
    if not found:
        raise InspectError(
            f"The adapter's base model {recorded} is not there. Give the folder that it is in now, "
            "or its name on the hub, with --base."
        )
    return found, "main" if Path(found).is_dir() else revision or "main"


def how_base_was_given(options: argparse.Namespace, place: Path) -> str:
    """Return that --base names another base than the adapter does, or "" if it does not."""
    recorded = str(read_adapter_config(place).get("base_model_name_or_path") or "")
    if not options.base or options.base == recorded:
        return ""
    one, other = Path(options.base), Path(recorded)
    if recorded and one.is_dir() and other.is_dir() and one.samefile(other):
        return ""
    return f"given by --base; adapter_config.json names {recorded or 'none'}"


def refuse_quantized_name(base: str) -> None:
    """Refuse a copy that cannot be loaded here, known by its name on the hub."""
    plain = QUANTIZED_NAME.sub("", base)
    if plain != base and not can_load_quantized("bnb" in base.lower()):
        raise InspectError(quantized_message(base, plain))


def quantized_message(base: str, plain: str) -> str:
    """Return what can be done about a base that is a quantized copy and cannot be loaded."""
    by_package = ""
    if "bnb" in base.lower() or "4bit" in base.lower():
        by_package = (
            "\nOr install the package that made the copy, and give the same command again: pip "
            "install bitsandbytes. The losses are then those of the copy."
        )
    return (
        f"The adapter was trained on {base}, a quantized copy, which cannot be loaded here. Give "
        f"the model that it was made from with --base, such as --base {plain}; the losses are then "
        f"measured on that one.{by_package}"
    )


def refuse_other_quantization(base: str, config: transformers.PretrainedConfig) -> None:
    """Refuse a quantized base that transformers would load otherwise, or with a traceback."""
    how = config.to_dict().get("quantization_config")
    if not how:
        return
    if not can_load_quantized(how.get("quant_method") == "bitsandbytes"):
        raise InspectError(quantized_message(base, QUANTIZED_NAME.sub("", base)))


def choose_device_and_dtype(
    options: argparse.Namespace, base_config: transformers.PretrainedConfig, run: Run | None
) -> tuple[torch.device, str]:
    """Return where the model goes and in which type: as it was trained, as far as is known.

    An adapter of another trainer is measured in its base's own type on a GPU; on a CPU in float32,
    which every processor computes, and most of them faster.
    """
    device = options.device or ("cuda" if sees_a_gpu() else "cpu")
    dtype = options.dtype or (run and run.settings.get("DTYPE"))
    if not dtype and device == "cuda":
        dtype = "float32" if base_config.get_text_config().dtype == torch.float32 else "bfloat16"
    dtype = dtype or "float32"
    try:
        prepare_device(device, dtype)
    except UserError as error:
        reason = str(error).partition(". ")[0]  # what follows is advice for training
        raise InspectError(
            f"On {device} it cannot be measured ({reason}). --device cpu needs no GPU."
        ) from error
    return torch.device(device), dtype


def sees_a_gpu() -> bool:
    """Return whether there is a GPU; of several only the first is used, as prepare_device() has it.

    torch counts them once, when it is first asked, so the choice must be made before that.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    return torch.cuda.is_available()


def emulates_bfloat16(device: torch.device, dtype: str) -> bool:
    """Return whether a GPU only emulates the type, as a V100 does, at a tenth of its speed."""
    if device.type != "cuda" or dtype != "bfloat16":
        return False
    return not torch.cuda.is_bf16_supported(including_emulation=False)


MAY_LOSE = 0.01  # of a reply's loss, by float16 matmuls


def with_float16_matmuls(
    model: transformers.PreTrainedModel,
    chat_format: ChatFormat,
    reload: Callable[[], transformers.PreTrainedModel],
) -> tuple[transformers.PreTrainedModel, str]:
    """Return the model with fast matmuls if a reply's loss stays what it is, and "float16".

    Else the weights are loaded anew, since float16 has lost bits of them, and it is "native".
    """
    before = loss_of_a_reply(model, chat_format)
    model = use_fp16_matmul(model)
    after = loss_of_a_reply(model, chat_format)
    if abs(after - before) <= MAY_LOSE * before:  # NaN is not
        return model, "float16"
    report("matmul", f"in float16 a reply's loss is {after:.3f} and not {before:.3f}: not used")
    return reload(), "native"


def loss_of_a_reply(model: transformers.PreTrainedModel, chat_format: ChatFormat) -> float:
    """Return the loss of one reply, in nats."""
    texts = ["Where does the river Severn end?", "It ends in the Bristol Channel, after 220 miles."]
    roles = ("user", "assistant")
    messages = [{"role": one, "content": text} for one, text in zip(roles, texts, strict=True)]
    (example,), _ = encode([Example("made up", messages)], chat_format, None)
    (loss,) = example_losses(model, [example], len(example.input_ids), "matmul")
    return loss


def chat_format_of(
    options: argparse.Namespace, place: Path, base: str, revision: str
) -> ChatFormat:
    """Return how conversations are rendered: by the adapter's own tokenizer, or by the base's."""
    path = place / "tokenizer_config.json"
    if path.is_file() and not read_json(path):
        raise InspectError(
            f"{path} is damaged, so it is not known how the adapter's prompts are written. Copy it "
            "again, or remove it: then the base's tokenizer and chat template are taken."
        )
    chat_format = load_chat_format(base, revision, str(place) if has_own_template(place) else "")
    chat_format.enable_thinking = options.enable_thinking
    return chat_format


def has_own_template(place: Path) -> bool:
    """Return whether an adapter's folder holds a tokenizer with a chat template."""
    config = read_json(place / "tokenizer_config.json") or {}
    has_template = (place / "chat_template.jinja").is_file() or bool(config.get("chat_template"))
    return bool(config) and has_template


def whose_template(adapter: Adapter) -> str:
    """Return whose chat template renders the conversations, for both models."""
    if not has_own_template(adapter.place):
        return "the base's"
    try:
        of_base = load_chat_format(adapter.base, adapter.revision).tokenizer.chat_template
    except UserError:
        return "the adapter's own; the base has none, or it cannot be read"
    if adapter.chat_format.tokenizer.chat_template == of_base:
        return "the adapter's own, the same as the base's"
    return "the adapter's own, which differs from the base's; both models were measured under it"


# ---- The adapter's configuration and its tensors

WHOLE = 2000  # letters of PEFT's messages, which say at their end what to do


def refuse_unmeasurable(saved: SavedAdapter, place: Path) -> None:
    """Refuse an adapter that is useless or wrong, or cannot be compared with its base model."""
    if problems := problems_of(saved):
        raise InspectError("\n".join([f"{place} is not measured.", *problems]))
    if reasons := reasons_against("measuring", saved):
        raise InspectError(f"{place} cannot be measured: it {'. It '.join(reasons)}.")


def lora_config_of(place: Path) -> peft.LoraConfig:
    """Return the adapter's LoraConfig, unless PEFT does not know it."""
    try:
        return peft.LoraConfig.from_pretrained(place)
    except (TypeError, ValueError, OSError) as error:
        raise InspectError(
            f"{place / 'adapter_config.json'}: PEFT cannot read it ({one_line(error, WHOLE)})."
        ) from error


def fitted_config(config: peft.LoraConfig, saved: SavedAdapter) -> peft.LoraConfig:
    """Return the config for measuring: each module of the file has its path in the text model.

    The names of the configuration may be those of a model for images and text. In the text model
    PEFT would not find them, and take the common rank and alpha. What a list names besides is kept,
    so that PEFT says which modules are missing in the file.
    """
    if not config.target_parameters:  # whose names are not those of modules
        modules = {path_in_text_model(one.name): one.name for one in saved.modules}
        if isinstance(config.target_modules, str):
            config.target_modules = config.exclude_modules = None
        config.target_modules = sorted({*modules, *(config.target_modules or ())})
        config.rank_pattern, config.alpha_pattern = {}, {}
        for path, name in modules.items():
            r, alpha = rank_and_alpha(saved.config, name)
            if r != config.r:
                config.rank_pattern[f"^{re.escape(path)}"] = r
            if alpha != config.lora_alpha:
                config.alpha_pattern[f"^{re.escape(path)}"] = alpha
    config.inference_mode = True
    config.init_lora_weights = True  # B = 0: a module without tensors in the file changes nothing
    return config


def put_adapter_on(
    base: transformers.PreTrainedModel, config: peft.LoraConfig, saved: SavedAdapter, place: Path
) -> peft.PeftModel:
    """Return the base model with the adapter's tensors in it, each of them in its place."""
    try:
        with warnings.catch_warnings():
            # What PEFT only warns of, such as keys without a place, is judged below.
            warnings.simplefilter("ignore")
            model = peft.PeftModel(base, config)
            refuse_changes_of_base(model, saved, place)
            landed = model.load_adapter(
                place, "default", key_mapping=KEY_MAPPING, torch_device=str(model.device)
            )
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        is_key = isinstance(error, KeyError)
        reason = f"the file lacks {error}" if is_key else one_line(error, WHOLE)
        raise InspectError(
            f"The adapter in {place} does not fit the base model ({reason}). Check --base, and "
            "whether adapter_config.json is this adapter's."
        ) from error
    judge_landing(saved, landed.missing_keys, landed.unexpected_keys, place)
    return model


def refuse_changes_of_base(model: peft.PeftModel, saved: SavedAdapter, place: Path) -> None:
    """Refuse tensors that PEFT would load into the base model itself.

    They would stay there where the adapter is switched off, so the base would be another model. A
    file often holds a copy of the base's own embedding, which PEFT saves along: that one changes
    nothing.
    """
    of_base = model.state_dict()
    others = [name for name in saved.others if ".lora_" not in name]
    places = {name_in_text_model(name): saved.tensors[name] for name in others}
    changing = [
        name
        for name in places.keys() & of_base.keys()
        if not places[name].to(of_base[name]).equal(of_base[name])
    ]
    if changing:
        raise InspectError(
            f"{place} holds tensors that replace the base model's own: "
            f"{join_limited(sorted(changing), 3, ', ')}. Switching the adapter off would not undo "
            "them, so nothing could be compared with the base model. To be measured, such a "
            "module must be saved as a part of the adapter: train it by modules_to_save or "
            "trainable_token_indices."
        )


def judge_landing(
    saved: SavedAdapter, missing: list[str], unexpected: list[str], place: Path
) -> None:
    """Refuse an adapter of which a tensor found no place, unless its update is 0.

    Unsloth may put LoRA into the vision tower, too. If only text was trained, B is 0 there still.
    """
    zeros = {path_in_text_model(one.name) for one in saved.modules if one.is_zero}
    lost = {name: path_of(name) for name in unexpected}
    changing = [name for name, path in lost.items() if path not in zeros]
    of_vision = {path_in_text_model(one.name) for one in saved.modules if one.is_of_vision}
    if changing and all(lost[name] in of_vision for name in changing):
        raise InspectError(
            f"LoRA of the vision tower was trained in {place} ({lost[changing[0]]} and others), "
            "but only the text part of the base model is loaded here, so the adapter cannot be "
            "measured as a whole. Train the language layers alone (in Unsloth: "
            "finetune_vision_layers = False)."
        )
    if changing:
        raise InspectError(
            f"{len(changing):,} of the {len(saved.tensors):,} tensors in {place} find no place in "
            "the base model, so it would not be the adapter that is measured: "
            f"{join_limited(changing, 3, ', ')}. Check --base."
        )
    if missing:
        named = sorted({path_of(name) for name in missing})
        report(
            "left out",
            f"the file has no tensors for {pluralize(len(named), 'module')} of the targets, such "
            f"as\n{named[0]}; it is left as the base has it",
        )
    if lost:
        report(
            "left out",
            f"{pluralize(len(set(lost.values())), 'module')} of the file have no place in the text "
            f"model, such as\n{min(lost.values())};\ntheir update is 0, so they change nothing",
        )


def path_of(name: str) -> str:
    """Return the path in the text model of the module that a tensor of LoRA is of."""
    return path_in_text_model(name.partition(".lora_")[0].removeprefix(PREFIX))


# ---- What an opened adapter consists of


def lora_layers(model: torch.nn.Module) -> dict[str, peft.tuners.lora.LoraLayer]:
    """Return {path: module} of the modules that LoRA was added to."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def window_of(model: torch.nn.Module) -> float:
    """Return how many tokens a model was made for, or infinity if it does not say."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or math.inf


def as_saved(model: peft.PeftModel) -> SavedAdapter:
    """Return what the files of a loaded adapter would hold."""
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return SavedAdapter(model.peft_config["default"].to_dict(), tensors)


def can_take_apart(model: peft.PeftModel) -> bool:
    """Return whether the adapter is LoRA alone: no fully trained modules or tokens."""
    return not reasons_against("parts", as_saved(model))


def can_scale_and_cut(model: peft.PeftModel) -> bool:
    """Return whether every update is scaling x B A on a linear layer, without bias or DoRA."""
    return not reasons_against("scaling", as_saved(model))


def rescaled(model: peft.PeftModel, scale: float) -> AbstractContextManager[Any]:
    """Multiply the finished adapter's update by scale for a while."""
    return peft.helpers.rescale_adapter_scale(model, scale)
