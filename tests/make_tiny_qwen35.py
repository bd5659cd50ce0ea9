"""Make tests/tiny-qwen3.5 again: Qwen3.5's architecture in the hub's shape, with random weights.

    python tests/make_tiny_qwen35.py [OUT_DIR]

The folder is what the hub holds for Qwen/Qwen3.5-4B, made small: a checkpoint of
Qwen3_5ForConditionalGeneration (vision tower and text model, one Gated DeltaNet and one
full-attention layer, the real head sizes 128 and 256, tied embeddings), processor files, a BPE
tokenizer with the real special tokens, and a chat template that renders text turns and the think
block as Qwen3.5's does. The weights are random; only the tokenizer was trained, on
data/train.jsonl.
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast, Qwen3_5Config, Qwen3_5ForConditionalGeneration

HERE = Path(__file__).parent
VOCAB_SIZE = 2048
ENDS = ("start", "end")
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONTROL_TOKENS += [
    f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad", "vision") for end in ENDS
]
CONTROL_TOKENS += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
TEXT_NAMES = ("tool_call", "tool_response", "think")
TEXT_TOKENS = [f"<{slash}{name}>" for name in TEXT_NAMES for slash in ("", "/")]
# A number, a word with the character before it, punctuation, or white space: BPE never merges
# across these pieces.
PIECES = r"\p{N}|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
PIECES += r"|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{%- set turn = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set turn.last_user = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set text = message.content | trim %}
    {%- set thought = '' %}
    {%- if message.role == 'assistant' and '</think>' in text %}
        {%- set thought = text.split('</think>')[0].split('<think>')[-1] | trim %}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > turn.last_user %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n<think>\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over the shipped data, special tokens last, as in Qwen's."""
    lines = (HERE.parent / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [message["content"] for row in rows for message in row["prompt"] + row["completion"]]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(CONTROL_TOKENS) - len(TEXT_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    control = [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
    bpe.add_special_tokens(control)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in TEXT_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3_5Config:
    """Qwen3.5-4B's configuration with small widths and real head sizes."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS}
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
        },
        "tie_word_embeddings": True,
        "eos_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [],
    }
    return Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def main() -> None:
    """Write the folder."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "tiny-qwen3.5"
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(make_config(tokenizer)).to(torch.bfloat16)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    pixels = {"longest_edge": 16777216, "shortest_edge": 65536}
    patches = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    for name, key, kind in (
        ("preprocessor", "image_processor_type", "Qwen2VLImageProcessorFast"),
        ("video_preprocessor", "video_processor_type", "Qwen3VLVideoProcessor"),
    ):
        settings = {"size": pixels, **patches, "processor_class": "Qwen3VLProcessor", key: kind}
        text = json.dumps(settings, indent=2) + "\n"
        (out / f"{name}_config.json").write_text(text, encoding="utf-8")
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    counts = f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens"
    print(f"{out}: {counts}, {size:.1f} MB")


if __name__ == "__main__":
    main()
