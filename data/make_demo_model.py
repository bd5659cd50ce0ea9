"""Make data/demo-model again: a toy of Qwen3.5's architecture that speaks a little English.

    python data/make_demo_model.py [OUT_DIR]

The folder is what the hub holds for Qwen/Qwen3.5-4B, made small: a checkpoint of
Qwen3_5ForConditionalGeneration (a vision tower that is never used, three Gated DeltaNet layers
and one full-attention layer, the real head sizes, tied embeddings), processor files, a BPE
tokenizer with the real control tokens, and Qwen3.5's own chat template, as TRL ships it.

The model learns from the users' messages in data/train.jsonl and from nothing else: not from Nell's
replies, and not from data/eval.jsonl. In each pretraining chat a user's message is answered by
another user's message on the same topic, so the base answers in plain English, about something of
its own. What Nell sounds like is left for LoRA to teach. Only the tokenizer has counted the letters
of all messages in that file, Nell's too, so that Nell's words are not in pieces.

It takes minutes on one core. Everything is seeded: the same machine, packages and training file
give the same bytes.
"""

import json
import math
import random
import sys
import time
from collections.abc import Iterator
from importlib.resources import files
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
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3_5Config, Qwen3_5ForConditionalGeneration

HERE = Path(__file__).parent
TRAIN_FILE = HERE / "train.jsonl"

# The model. These sizes make about 2.6 million text parameters.
VOCAB_SIZE = 3072
HIDDEN_SIZE = 192
INTERMEDIATE_SIZE = 448
LAYER_TYPES = ["linear_attention"] * 3 + ["full_attention"]

# Pretraining.
SEED = 0
THREADS = 1  # sums depend on the number of threads, and the bytes on the sums
STEPS = 800
BATCH_SIZE = 8  # chats
PAIRS = (1, 2)  # a chat has one of these numbers of messages and answers
LEARNING_RATE = 3e-3  # the peak
WARMUP_STEPS = 40
WEIGHT_DECAY = 0.1
DROPOUT = 0.1  # of what each layer adds, and of the embeddings: the text is short
LOGGING_STEPS = 25

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

Message = dict[str, str]


def read_messages() -> tuple[Message, list[list[str]], list[str]]:
    """Return the system message, what the users say, by topic, and the text of all messages."""
    system: Message = {}
    topics: dict[str, list[str]] = {}
    texts: list[str] = []
    for line in TRAIN_FILE.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for message in row["prompt"] + row["completion"]:
            texts.append(message["content"])
            if message["role"] == "system":
                system = message
            elif message["role"] == "user":
                topics.setdefault(row["topic"], []).append(message["content"])
    return system, list(topics.values()), texts


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer over the texts, control tokens last, as in Qwen's."""
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
    template = files("trl") / "chat_templates" / "qwen3_5_think.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template.read_text(encoding="utf-8"),
        model_max_length=4096,
    )


def make_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3_5Config:
    """Return Qwen3.5-4B's configuration with small widths and real head sizes."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS}
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": len(LAYER_TYPES),
        "layer_types": LAYER_TYPES,
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
        "out_hidden_size": HIDDEN_SIZE,
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


def make_chats(
    system: Message, topics: list[list[str]], tokenizer: PreTrainedTokenizerFast
) -> list[list[int]]:
    """Return the token ids of chats in which each message occurs once, or twice to make pairs.

    All messages of a chat are users' messages on one topic; every second one is said to be the
    assistant's.
    """
    chats = []
    for topic in topics:
        rest = random.sample(topic, len(topic))
        while rest:
            count = 2 * random.choice(PAIRS)
            said, rest = rest[:count], rest[count:]
            if len(said) % 2:
                said.insert(0, random.choice(topic))
            chat = [system] + [
                {"role": ("user", "assistant")[turn % 2], "content": text}
                for turn, text in enumerate(said)
            ]
            ids = tokenizer.apply_chat_template(chat, enable_thinking=False, return_dict=False)
            chats.append(ids)
    return chats


def make_batch(rows: list[list[int]], end: int, pad: int) -> dict[str, torch.Tensor]:
    """Return the rows side by side; what is learnt begins after the system message's end."""
    width = max(map(len, rows))
    starts = [row.index(end) + 1 for row in rows]
    ids = [row + [pad] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    labels = [
        [-100] * start + row[start:] + [-100] * (width - len(row))
        for start, row in zip(starts, rows, strict=True)
    ]
    names = ("input_ids", "attention_mask", "labels")
    return {name: torch.tensor(x) for name, x in zip(names, (ids, mask, labels), strict=True)}


def batches(
    system: Message, topics: list[list[str]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of chats of about the same length, without end; each pass has other chats."""
    while True:
        chats = sorted(make_chats(system, topics, tokenizer), key=len)
        groups = [chats[i : i + BATCH_SIZE] for i in range(0, len(chats), BATCH_SIZE)]
        for group in random.sample(groups, len(groups)):
            yield make_batch(group, tokenizer.eos_token_id, tokenizer.pad_token_id)


def drop(module: nn.Module, args: tuple, output: object) -> object:
    """Apply dropout to a module's output: a forward hook, for Qwen3.5 has no such dropout."""
    if isinstance(output, tuple):
        return (nn.functional.dropout(output[0], DROPOUT, module.training), *output[1:])
    return nn.functional.dropout(output, DROPOUT, module.training)


def pretrain(
    model: Qwen3_5ForConditionalGeneration, stream: Iterator[dict[str, torch.Tensor]]
) -> float:
    """Train the text model on the stream of batches; return the mean loss of the last steps."""
    text = model.model.language_model
    noisy = [text.embed_tokens]
    for layer in text.layers:
        mixer = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
        noisy += [mixer, layer.mlp]
    hooks = [module.register_forward_hook(drop) for module in noisy]
    model.model.visual.requires_grad_(False)
    learnt = list(text.parameters())
    groups = [
        {"params": [p for p in learnt if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in learnt if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    model.train()
    start, losses = time.time(), []
    for step in range(1, STEPS + 1):
        rate = 0.02 + 0.98 * (1 + math.cos(math.pi * step / STEPS)) / 2
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, step / WARMUP_STEPS) * rate
        loss = model(**next(stream), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % LOGGING_STEPS == 0 or step == STEPS:
            mean = sum(losses[-LOGGING_STEPS:]) / len(losses[-LOGGING_STEPS:])
            seconds = time.time() - start
            print(f"step {step:,}/{STEPS:,}  loss {mean:.3f}  {seconds:.0f} s", flush=True)
    for hook in hooks:
        hook.remove()
    return mean


def write_processors(out: Path) -> None:
    """Write the files that describe images and videos, which serving software asks for."""
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


def main() -> None:
    """Make the tokenizer, pretrain the model and write the folder."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "demo-model"
    start = time.time()
    random.seed(SEED)
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    system, topics, texts = read_messages()
    tokenizer = make_tokenizer(texts)
    model = Qwen3_5ForConditionalGeneration(make_config(tokenizer))
    count = sum(parameter.numel() for parameter in model.model.language_model.parameters())
    said = sum(map(len, topics))
    print(f"{said:,} messages, {len(tokenizer):,} tokens, {count:,} text parameters")
    loss = pretrain(model, batches(system, topics, tokenizer))
    model.to(torch.bfloat16)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_processors(out)
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(f"{out}: {size:.1f} MB, loss {loss:.3f}, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
