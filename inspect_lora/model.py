"""Opens an adapter on its base model, and has both reply.

Every tensor of the file must find its place, and switching the adapter off must give the base back:
PEFT only warns of the first and says nothing of the second, and each number would be wrong.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tqdm import tqdm

import train_lora_single as script
from inspect_lora import adapter_file
from inspect_lora.adapter_file import SavedAdapter, base_of, faults_of, name_in_text_model
from inspect_lora.common import InspectError, one_line, read_json, say, some

ROWS_AT_ONCE = 64  # replies that are generated together, at most
TOKENS_AT_ONCE = 2**15  # of their prompts and replies, padding included
SEED = 42  # of sampled replies
PROBE = [{"role": "user", "content": "Does the Severn end in the Bristol Channel after 220 miles?"}]


@dataclass
class Adapter:
    """An adapter on its base model."""

    saved: SavedAdapter
    model: peft.PeftModel
    job: script.Job  # the base's name, commit and type; tokenizer and stop ids

    @property
    def is_plain(self) -> bool:
        """Whether each update is scaling x B A on a linear layer, so it has strengths and parts."""
        return not self.saved.more

    @property
    def layers(self) -> dict[str, peft.tuners.lora.LoraLayer]:
        """The modules that have LoRA, by their path."""
        kind = peft.tuners.lora.LoraLayer
        return {path: one for path, one in self.model.named_modules() if isinstance(one, kind)}

    def at(self, strength: float) -> AbstractContextManager[Any]:
        """Give the adapter another strength for a while; 0 is the base, 1 as trained."""
        if strength == 1:
            return nullcontext()
        if strength == 0:
            return self.model.disable_adapter()
        return peft.helpers.rescale_adapter_scale(self.model, strength)

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Return a prompt's tokens as in training, or raise ValueError if it cannot be rendered."""
        thoughts = "<think>\nI think.\n</think>\n\n" if self.job.enable_thinking else ""
        reply = {"role": "assistant", "content": f"{thoughts}A reply."}
        return script.render([*messages, reply], self.job)[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the adapter, and the flags of the commands that load it onto its base."""
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder, or a name on the hub")
    parser.add_argument("--base", help="the base model, if it is not what the adapter names")
    parser.add_argument("--base_revision", help="its branch, tag or commit on the hub")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the training's")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--system", help="system message; default: that of the training")
    parser.add_argument("--enable_thinking", action="store_true", help="if it was trained to think")


# ---- Opening


def open_adapter(options: argparse.Namespace, saved: SavedAdapter) -> Adapter:
    """Load the base model with the adapter on it, or raise InspectError if it is not measurable."""
    if faults := faults_of(saved):
        raise InspectError("\n".join([f"{saved.place} is not measured:", *faults]))
    job = script.Job(settings_of(options, saved))
    job.enable_thinking = options.enable_thinking
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    script.prepare_device(job.settings)
    job.tokenizer = own_tokenizer(saved.place)
    base = load_base(job)
    if script.uses_fp16_matmul(job):
        script.use_fp16_matmul(base)  # as in training
        job.matmul = "float16"
    model = put_on_and_compare(base, saved, job.tokenizer)
    settings = job.settings
    say("adapter", f"{saved.place} on {settings.MODEL_NAME}, {settings.DTYPE}, {settings.DEVICE}")
    return Adapter(saved, model, job)


def settings_of(options: argparse.Namespace, saved: SavedAdapter) -> argparse.Namespace:
    """Return the script's settings: those of the training, as far as they are known."""
    trained = read_json(saved.place / "run.json").get("settings", {})
    by_default = {name: getattr(script, name) for name in script.SETTINGS}
    settings = argparse.Namespace(**by_default | trained, dry_run=False)
    settings.DEVICE = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    is_on_gpu = settings.DEVICE == "cuda"
    known = options.dtype or trained.get("DTYPE")
    settings.DTYPE = known or ("bfloat16" if is_on_gpu else "float32")
    settings.MODEL_NAME = options.base or base_of(saved)
    revision = "main" if options.base else saved.config.get("revision", "main")
    settings.MODEL_REVISION = options.base_revision or revision
    settings.MATMUL = settings.MATMUL if is_on_gpu else "native"
    settings.MAX_SEQ_LEN = 10**9  # lines are left out here, however many they are
    settings.OUTPUT_DIR = os.devnull  # where no earlier job names a commit
    if not settings.MODEL_NAME:
        raise InspectError(f"{saved.place} does not name its base model; give it with --base.")
    return settings


def load_base(job: script.Job) -> transformers.PreTrainedModel:
    """Load the base model, and its tokenizer unless the adapter has its own; return the model."""
    settings = job.settings
    try:
        script.read_model_files(job)
        base = script.load_model(settings.MODEL_NAME, job.commit, settings.DTYPE, settings.DEVICE)
    except script.UserError as error:
        original = adapter_file.original_of(settings.MODEL_NAME)
        named = f", {original}" if original != settings.MODEL_NAME else ""
        raise InspectError(
            f"{error}\nThis is about the adapter's base. Give --base: where it is now, or the "
            f"original of a quantized base{named}."
        ) from error
    base.generation_config = transformers.GenerationConfig()  # else its own min_p and such count
    return base.eval()


def own_tokenizer(place: Path) -> transformers.PreTrainedTokenizerBase | None:
    """Return the adapter's own tokenizer if it has one with a chat template."""
    if not (place / "tokenizer_config.json").is_file():
        return None
    own = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    return own if own.chat_template else None


def put_on_and_compare(
    base: transformers.PreTrainedModel,
    saved: SavedAdapter,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> peft.PeftModel:
    """Put the adapter on; raise InspectError unless it has an effect that switching off undoes.

    Both are tried on a chat, since of an embedding perhaps only the tokens between the turns, such
    as <|im_start|>, were trained.
    """
    how = {"add_generation_prompt": True, "return_dict": False, "return_tensors": "pt"}
    probe = tokenizer.apply_chat_template(PROBE, **how).to(base.device)
    with torch.no_grad():
        before = base(probe).logits
        model = put_on(base, saved).eval()
        with model.disable_adapter():
            after = model(probe).logits
        effect = (model(probe).logits - after).abs().max().item()
    if effect == 0:  # as of an activated LoRA, which waits for tokens that are not sent here
        raise InspectError(f"{saved.place} changes nothing: the logits are those of the base.")
    if (after - before).abs().max().item() > effect / 100:
        raise InspectError(
            f"{saved.place} changes the base model's own weights, such as by biases or a copied "
            "embedding. Switching it off does not undo that, so there is no base to compare with."
        )
    return model


def put_on(base: transformers.PreTrainedModel, saved: SavedAdapter) -> peft.PeftModel:
    """Return the base model with the adapter's tensors in it, each of them in its place."""
    config = peft.LoraConfig.from_pretrained(saved.place)
    is_wrapper = any(name.endswith("language_model.layers") for name, _ in base.named_modules())
    mapping = adapter_file.TO_WRAPPER if is_wrapper else adapter_file.TO_TEXT_MODEL
    if not config.target_parameters:
        # The names of the configuration may be those of another class than the base's. PEFT would
        # not find them, and take the common alpha in silence.
        modules = {adapter_file.renamed(one.path, mapping): one for one in saved.modules}
        config.target_modules, config.exclude_modules = sorted(modules), None
        keys = {f"^{re.escape(path)}": one for path, one in modules.items()}
        config.rank_pattern = {key: one.r for key, one in keys.items()}
        config.alpha_pattern = {key: one.alpha for key, one in keys.items()}
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
    zeros = {name_in_text_model(one.path) for one in saved.modules if one.is_zero}
    lost = [key for key in lost if name_in_text_model(key.partition(".lora_")[0]) not in zeros]
    if lost:
        raise InspectError(
            f"{len(lost)} tensors of {saved.place} find no place in the base, or are missing: "
            f"{some(lost)}. Of Qwen3.5 the text model alone is loaded, without its vision tower."
        )


# ---- Replies


def generate(
    adapter: Adapter, prompts: list[list[int]], max_new_tokens: int, sampled: bool = False
) -> list[list[int]]:
    """Return the tokens of the reply to each prompt, with the one that ends it, as it is now.

    Each is the likeliest token, or drawn with the model's own odds by a fixed seed. The longest
    prompts come first, many of like lengths together; half as many if memory runs out.
    """
    stops = adapter.job.stop_ids
    config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampled,
        top_k=0 if sampled else None,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    rows_at_once = ROWS_AT_ONCE
    replies: dict[int, list[int]] = {}
    with tqdm(total=len(prompts), desc="replies", leave=False, disable=None) as bar:
        while order:
            width = len(prompts[order[0]]) + max_new_tokens
            batch = order[: max(1, min(rows_at_once, TOKENS_AT_ONCE // width))]
            rows = rows_if_they_fit(adapter, [prompts[number] for number in batch], config)
            if rows is None:
                rows_at_once = len(batch) // 2
                continue
            ended = [up_to_its_end(row, stops) for row in rows]
            replies |= dict(zip(batch, ended, strict=True))
            order = order[len(batch) :]
            bar.update(len(batch))
    return [replies[number] for number in range(len(prompts))]


def rows_if_they_fit(
    adapter: Adapter, prompts: list[list[int]], config: transformers.GenerationConfig
) -> list[list[int]] | None:
    """Return the new tokens after each prompt, or None if there is no memory for several."""
    torch.manual_seed(SEED)
    try:
        return new_tokens(adapter, prompts, config)
    except RuntimeError as error:
        if len(prompts) == 1 or not script.is_out_of_memory(error):
            raise
    gc.collect()  # after `except`, whose traceback holds the tensors of the batch
    torch.cuda.empty_cache()
    return None


def new_tokens(
    adapter: Adapter,
    prompts: list[list[int]],
    config: transformers.GenerationConfig,
    streamer: transformers.TextStreamer | None = None,
) -> list[list[int]]:
    """Return the new tokens after each prompt, from one batch, padded on the left."""
    width, device = max(map(len, prompts)), adapter.model.device
    ids = [[config.pad_token_id] * (width - len(one)) + one for one in prompts]
    mask = [[0] * (width - len(one)) + [1] * len(one) for one in prompts]
    out = adapter.model.generate(
        torch.tensor(ids, device=device),
        config,
        attention_mask=torch.tensor(mask, device=device),
        streamer=streamer,
    )
    return out[:, width:].tolist()


def up_to_its_end(tokens: list[int], stops: list[int]) -> list[int]:
    """Return a reply's tokens up to the first that ends it: in a batch, padding follows."""
    ends = [place for place, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0] + 1] if ends else tokens


def text_of(adapter: Adapter, tokens: list[int]) -> str:
    """Return a reply's text without the token that ends it."""
    return adapter.job.tokenizer.decode(tokens, skip_special_tokens=True).strip()
