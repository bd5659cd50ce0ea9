"""Generation: the reply of a model, as it is now, to each prompt."""

from __future__ import annotations

import gc

import torch
import transformers
from tqdm import tqdm

from inspect_lora.model import Adapter
from train_lora.device import is_out_of_memory

ROWS_AT_ONCE = 64  # replies that are generated together, at most
TOKENS_AT_ONCE = 2**15  # of their prompts and replies, padding included
FIRST_TOKENS = 64  # after which a reply is a long one
SEED = 42  # of sampled replies


def generate(
    adapter: Adapter, prompts: list[list[int]], max_new_tokens: int, sampled: bool = False
) -> list[list[int]]:
    """Return the tokens of the reply to each prompt, with the one that ends it, as it is now.

    Each is the likeliest token, or drawn with the model's own odds by a fixed seed. A batch costs
    the same until its last reply ends, so those that are long go on in batches of their own.
    """
    stops = adapter.base.stop_ids
    begun = min(max_new_tokens, FIRST_TOKENS)
    replies = generate_in_batches(adapter, prompts, begun, sampled)
    long = [number for number, reply in enumerate(replies) if reply[-1] not in stops]
    if long and begun < max_new_tokens:
        so_far = [prompts[number] + replies[number] for number in long]
        rest = generate_in_batches(adapter, so_far, max_new_tokens - begun, sampled)
        for number, reply in zip(long, rest, strict=True):
            replies[number] += reply
    return replies


def generate_in_batches(
    adapter: Adapter, prompts: list[list[int]], max_new_tokens: int, sampled: bool
) -> list[list[int]]:
    """Return the reply to each prompt.

    The longest prompts come first, many of like lengths together; half as many if memory runs out.
    """
    stops = adapter.base.stop_ids
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
        if len(prompts) == 1 or not is_out_of_memory(error):
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
    ids = [[config.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
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
    return adapter.base.tokenizer.decode(tokens, skip_special_tokens=True).strip()
