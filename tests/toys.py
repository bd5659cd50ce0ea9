"""Models of a few thousand weights, and adapters that PEFT alone makes."""

import copy
import functools
import json
import shutil
from pathlib import Path

import peft
import torch
import transformers
from conftest import TOY
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS = "model.safetensors"
PREFIX = "base_model.model."  # of each name in an adapter's file


def edit_json(path, change):
    """Let change(value) edit a JSON file."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def make_untied(folder):
    shutil.copytree(TOY, folder, dirs_exist_ok=True)
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].flip(0)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].contiguous()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    edit_json(folder / "config.json", lambda config: config.update(
        tie_word_embeddings=False,
        text_config=config["text_config"] | {"tie_word_embeddings": False},
    ))  # fmt: skip


@functools.cache
def base_model(dtype="float32", folder=TOY):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY)


SIZES = {
    "vocab_size": 3072, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
GEMMA4 = transformers.Gemma4Config(  # without a tower for pictures, in which PEFT knows no q_proj
    text_config=SIZES | {"vocab_size_per_layer_input": 3072, "hidden_size_per_layer_input": 8}
)


def family(kind, **more):
    """Return the configuration of another architecture, such as "Llama", with small sizes."""
    return getattr(transformers, f"{kind}Config")(**SIZES | more)


def wrapper(kind, **text):
    """Return the configuration of a model that sees pictures, too, such as "Gemma3"."""
    config = getattr(transformers, f"{kind}Config")
    return config(text_config=SIZES | text, vision_config=VISION_SIZES)


def model_of(config, folder, has_weights=False):
    """Write a model with this configuration and the toy's tokenizer; return the folder's path."""
    shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns(WEIGHTS), dirs_exist_ok=True)
    config.save_pretrained(folder)
    if has_weights:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder)
        shutil.copy(Path(TOY) / "generation_config.json", folder)
    return str(folder)


PLAIN = {
    "r": 4, "lora_alpha": 8,
    "target_modules": ["q_proj", "o_proj", "in_proj_qkv", "out_proj", "up_proj", "down_proj"],
}  # fmt: skip
PLAIN_SCALE = 8 / 4
KINDS = {
    "plain": {},
    "rslora": {
        "use_rslora": True, "rank_pattern": {"out_proj": 6, "down_proj": 1},
        "alpha_pattern": {"out_proj": 3},
    },
    "dora": {"use_dora": True},
    "whole": {"modules_to_save": ["norm"]},  # a module that is trained whole
    "wrapper": {},  # with the names that the multimodal model gives its modules
}  # fmt: skip


def save_kind(folder, kind):
    """Make an adapter of a kind in KINDS; return its folder."""
    save_adapter(folder, **KINDS[kind])
    if kind == "wrapper":
        change_tensors(folder, lambda own: renamed(own, ".layers", ".language_model.layers"))
    return folder


def save_adapter(folder, model=None, std=0.05, **config):
    """Make an adapter with PEFT alone, with a B by chance, and save it as PEFT does."""
    model = copy.deepcopy(model or base_model())  # loading one draws numbers, too
    torch.manual_seed(4)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **(PLAIN | config)))
    for name, weight in model.named_parameters():
        if "lora_B" in name or (weight.requires_grad and "lora_" not in name):
            weight.data += std * torch.randn_like(weight)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def layers_of(model):
    """Return the modules with LoRA, by their path."""
    named = model.base_model.model.named_modules()
    return {path: one for path, one in named if isinstance(one, peft.tuners.lora.LoraLayer)}


def renamed(tensors, old, new):
    return {name.replace(old, new, 1): one for name, one in tensors.items()}


def change_tensors(folder, change):
    """Let change(tensors) edit an adapter's file, or return others; return the folder."""
    tensors = load_file(folder / TENSORS)
    tensors = {name: one.clone() for name, one in (change(tensors) or tensors).items()}
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    return folder


def change_config(folder, **values):
    """Change entries of adapter_config.json; return the folder."""
    edit_json(folder / CONFIG, lambda config: config.update(values))
    return folder


def pretend_gpu(patch, stack, capability=(7, 0), free=16, total=16):
    """Have torch say that there is a GPU with so many GiB; the CPU does what it is asked for."""

    def on_the_cpu(value):
        is_device = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
        return "cpu" if is_device else value

    class OnTheCpu(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = {key: on_the_cpu(value) for key, value in (kwargs or {}).items()}
            return function(*map(on_the_cpu, args), **kwargs)

    stack.enter_context(OnTheCpu())
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0,
        "get_device_capability": capability, "get_device_name": "A made-up GPU",
        "mem_get_info": (free * 2**30, total * 2**30), "empty_cache": None, "synchronize": None,
        "is_bf16_supported": capability >= (8, 0), "set_per_process_memory_fraction": None,
        "memory_allocated": 0, "max_memory_allocated": 2**30, "init": None,
        "reset_peak_memory_stats": None,
    }  # fmt: skip
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
