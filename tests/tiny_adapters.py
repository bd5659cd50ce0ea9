"""Small adapters for the tests of the package: made by PEFT on a model of eight tiny layers."""

import copy
import functools
import json
import shutil
import types

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from inspect_lora.__main__ import main

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]}


@functools.cache
def llama():
    """Return the base model; nobody changes it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 8, "vocab_size": 60}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def save_adapter(folder, model=None, std=0.1, **config):
    """Make an adapter with PEFT alone, with a B by chance, and save it as PEFT does."""
    torch.manual_seed(4)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **(PLAIN | config))
    model = peft.get_peft_model(copy.deepcopy(model or llama()), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name or (weight.requires_grad and "lora_" not in name):
            weight.data += std * torch.randn_like(weight)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def change_tensors(folder, change):
    """Let change(tensors) edit an adapter's file; return the folder."""
    tensors = load_file(folder / TENSORS)
    tensors = change(tensors) or tensors
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    return folder


def change_config(folder, **values):
    """Change entries of adapter_config.json; return the folder."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | values), encoding="utf-8")
    return folder


def copied(folder, new):
    """Return a copy of an adapter's folder, to be changed."""
    return shutil.copytree(folder, new)


def command(capsys, *words):
    """Do a command of the package; return its status and what it printed."""
    capsys.readouterr()
    status = 0
    try:
        main([str(word) for word in words])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    said = " ".join((out + err).split())
    return types.SimpleNamespace(status=status, out=out, err=" ".join(err.split()), said=said)
