"""Make data/demo-model again: a toy of Qwen3.5's architecture that speaks a little English.

    python data/make_demo_model.py [OUT_DIR]

The folder is what the hub holds for Qwen/Qwen3.5-4B, made small: a checkpoint of
Qwen3_5ForConditionalGeneration (a vision tower that is never used, three Gated DeltaNet layers
and one full-attention layer, the real head sizes, tied embeddings), processor files, a BPE
tokenizer with the real control tokens, and Qwen3.5's own chat template, as TRL ships it.

Tokenizer and model learn from the users' messages in data/train.jsonl and from nothing else: not
from Nell's replies, and not from data/eval.jsonl. In each pretraining chat a user's message is
answered by another user's message that shares words with it, so the base answers in plain
English, about something of its own. What Nell sounds like is left for LoRA to teach.

It takes minutes on two cores. Everything is seeded: the same machine, packages and training file
give the same bytes.
"""

import json
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
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

# The model. These sizes make about 2.5 million text parameters.
VOCAB_SIZE = 2048
HIDDEN_SIZE = 192
INTERMEDIATE_SIZE = 512
LAYER_TYPES = ["linear_attention"] * 3 + ["full_attention"]
FORGETTING = [0.02, 0.2]  # what a DeltaNet layer's two heads lose at a token, at first

# Pretraining.
SEED = 0
THREADS = 2  # sums depend on the number of threads, and the bytes on the sums
STEPS = 1600
BATCH_SIZE = 4  # chats
KIN = 4  # a message is answered by one of so many that share words with it
ANSWER_WORDS = 7  # different ones, at least, in an answer
ANSWERS = (1, 2, 4)  # in a chat: one of these numbers
POOL = 100  # batches that are put together by length at once
LEARNING_RATE = 3e-3  # the peak
WARMUP_STEPS = 40
WEIGHT_DECAY = 0.1
DROPOUT = 0.05  # of what each layer adds, and of the embeddings: the text is short
LOGGING_STEPS = 50

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


def read_messages() -> tuple[Message, list[str]]:
    """Return the system message and what the users say; the replies are not read."""
    system, said = {}, {}
    for line in TRAIN_FILE.read_text(encoding="utf-8").splitlines():
        for message in json.loads(line)["prompt"]:
            if message["role"] == "system":
                system = message
            elif message["role"] == "user":
                said[message["content"]] = True  # a dictionary keeps the order, without repeats
    return system, list(said)


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
        "initializer_range": 0.05,
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


def find_kin(said: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Return for each message the messages that share most of its rarer words: any, and long ones.

    A shared word counts for more the rarer it is, and in a shorter message.
    """
    bags = [set(re.findall(r"[a-z']+", text.lower())) for text in said]
    spread = Counter(word for bag in bags for word in bag)
    column = {word: i for i, word in enumerate(sorted(spread))}
    table = torch.zeros(len(said), len(column))
    for row, bag in enumerate(bags):
        for word in bag:
            table[row, column[word]] = math.log(len(said) / spread[word])
    lengths = torch.tensor([float(len(bag)) for bag in bags])
    alike = (table @ table.T) / (lengths + 8).sqrt()
    alike.fill_diagonal_(-1)
    kin = alike.topk(KIN, dim=1).indices.tolist()
    alike[:, lengths < ANSWER_WORDS] = -1
    return kin, alike.topk(KIN, dim=1).indices.tolist()


def make_chats(
    system: Message, said: list[str], tokenizer: PreTrainedTokenizerFast
) -> Iterator[list[int]]:
    """Yield the token ids of chats, without end; each message ends one before any ends a second.

    All messages of a chat are users' messages, every second one said to be the assistant's, and
    each shares words with the next: so an answer has something to do with what it answers. What
    has only a few words is no answer.
    """
    kin, long_kin = find_kin(said)
    lasts = sorted({i for row in long_kin for i in row})
    while True:
        for last in random.sample(lasts, len(lasts)):
            chosen = [last]
            for turn in range(2 * random.choice(ANSWERS) - 1):
                chosen.append(random.choice((long_kin if turn % 2 else kin)[chosen[-1]]))
            chat = [system] + [
                {"role": ("user", "assistant")[turn % 2], "content": said[i]}
                for turn, i in enumerate(reversed(chosen))
            ]
            yield tokenizer.apply_chat_template(chat, enable_thinking=False, return_dict=False)


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
    system: Message, said: list[str], tokenizer: PreTrainedTokenizerFast
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of chats of about the same length, without end."""
    chats = make_chats(system, said, tokenizer)
    while True:
        pool = sorted(islice(chats, POOL * BATCH_SIZE), key=len)
        for i in random.sample(range(POOL), POOL):
            group = pool[i * BATCH_SIZE : (i + 1) * BATCH_SIZE]
            yield make_batch(group, tokenizer.eos_token_id, tokenizer.pad_token_id)


def drop(module: nn.Module, args: tuple, output: object) -> object:
    """Apply dropout to a module's output: a forward hook, for Qwen3.5 has no such dropout."""
    if isinstance(output, tuple):
        return (nn.functional.dropout(output[0], DROPOUT, module.training), *output[1:])
    return nn.functional.dropout(output, DROPOUT, module.training)


def remember(model: Qwen3_5ForConditionalGeneration) -> None:
    """Let the DeltaNet layers' heads forget slowly; as they are made, one token takes all away."""
    for layer in model.model.language_model.layers:
        if hasattr(layer, "linear_attn"):
            nn.init.constant_(layer.linear_attn.A_log, 0.0)
            layer.linear_attn.dt_bias.data = torch.tensor(FORGETTING).expm1().log()


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
    system, said = read_messages()
    tokenizer = make_tokenizer([system["content"], *said])
    model = Qwen3_5ForConditionalGeneration(make_config(tokenizer))
    remember(model)
    count = sum(parameter.numel() for parameter in model.model.language_model.parameters())
    print(f"{len(said):,} messages, {len(tokenizer):,} tokens, {count:,} text parameters")
    loss = pretrain(model, batches(system, said, tokenizer))
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
