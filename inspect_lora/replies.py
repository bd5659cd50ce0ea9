"""Has base and adapter reply, and counts the replies that hold what they must."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from tqdm import tqdm

from inspect_lora.checks import CheckRow, rows_of_checks
from inspect_lora.conversations import Task, group_of
from inspect_lora.scores import evenly_spread
from inspect_lora.trainer import ChatFormat, Example

ROWS_AT_ONCE = 64  # replies that are generated together
CHECKED_TOKENS = 80  # a reply that is checked is cut after so many


@dataclass
class Reply:
    """What a model said."""

    text: str
    stopped: bool  # whether it ended on its own, and was not cut
    ids: list[int]  # its tokens, with the one that ends the turn


def generate(
    model: peft.PeftModel,
    chat_format: ChatFormat,
    prompts: list[list[int]],
    config: transformers.GenerationConfig,
    title: str,
) -> list[Reply]:
    """Return the reply to each prompt, given as token ids; on a terminal a bar shows how far it is.

    Many prompts go through the model together, since each token costs a pass of its own.
    """
    replies: list[Reply] = []
    with tqdm(total=len(prompts), desc=title, leave=False, disable=None) as bar:
        for start in range(0, len(prompts), ROWS_AT_ONCE):
            batch = prompts[start : start + ROWS_AT_ONCE]
            for row in generate_batch(model, batch, config):
                replies.append(reply_of(row, chat_format))
            bar.update(len(batch))
    return replies


def greedy(chat_format: ChatFormat, max_new_tokens: int) -> transformers.GenerationConfig:
    """Return how a model replies with always the likeliest token."""
    return transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=chat_format.end_ids,
        pad_token_id=chat_format.end_ids[0],
    )


def by_chance(chat_format: ChatFormat, max_new_tokens: int) -> transformers.GenerationConfig:
    """Return how a model replies with the odds that it gives itself."""
    config = greedy(chat_format, max_new_tokens)
    config.do_sample = True
    config.temperature, config.top_k, config.top_p = 1.0, 0, 1.0
    return config


def generate_batch(
    model: peft.PeftModel,
    prompts: list[list[int]],
    config: transformers.GenerationConfig,
    streamer: transformers.TextStreamer | None = None,
) -> list[list[int]]:
    """Return the new tokens after each prompt, from one batch, padded on the left."""
    width, padding = max(map(len, prompts)), config.pad_token_id
    ids = torch.tensor([[padding] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    out = model.generate(ids, config, attention_mask=mask, streamer=streamer)
    return out[:, width:].tolist()


def reply_of(tokens: list[int], chat_format: ChatFormat) -> Reply:
    """Return the reply up to the first token that ends a turn, if there is one."""
    ends = [place for place, token in enumerate(tokens) if token in chat_format.end_ids]
    length = ends[0] if ends else len(tokens)
    text = chat_format.tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()
    return Reply(text, bool(ends), tokens[: length + 1])


# ---- Checks: what was forgotten, and what was learned besides the voice


def ask_checked(
    model: peft.PeftModel, chat_format: ChatFormat, tasks: list[Task]
) -> tuple[list[CheckRow], list[dict[str, Any]]]:
    """Have base and adapter reply to each task; return a row for each name, and the replies."""
    prompts = [chat_format.prompt_ids(task.messages) for task in tasks]
    config = greedy(chat_format, CHECKED_TOKENS)
    with model.disable_adapter():
        base = generate(model, chat_format, prompts, config, "checks, base")
    adapter = generate(model, chat_format, prompts, config, "checks, adapter")
    replies = [
        {
            "where": task.where,
            "base": one.text,
            "adapter": other.text,
            "base_passes": {name: check.passes(one.text) for name, check in task.checks.items()},
            "adapter_passes": {
                name: check.passes(other.text) for name, check in task.checks.items()
            },
        }
        for task, one, other in zip(tasks, base, adapter, strict=True)
    ]
    return rows_of_checks(replies), replies


# ---- Samples: held-out prompts with the replies of both


@dataclass
class Sample:
    """A held-out prompt, and what was replied to it."""

    example: Example  # its last message is the reference reply
    base: Reply
    adapter: Reply


def take_samples(
    model: peft.PeftModel, chat_format: ChatFormat, chosen: list[Example], max_new_tokens: int
) -> list[Sample]:
    """Have base and adapter reply to held-out prompts."""
    prompts = [example.prompt_ids for example in chosen]
    config = greedy(chat_format, max_new_tokens)
    with model.disable_adapter():
        base = generate(model, chat_format, prompts, config, "samples, base")
    adapter = generate(model, chat_format, prompts, config, "samples, adapter")
    return list(map(Sample, chosen, base, adapter))


def choose_samples(examples: list[Example], group: str, wanted: int) -> list[Example]:
    """Return one held-out example of each kind, up to 20, and as many more as are wanted."""
    first: dict[str, int] = {}
    for number, example in enumerate(examples):
        first.setdefault(group_of(example, group), number)
    chosen = sorted(first.values())[: max(wanted, 20)] if wanted else []
    for number in evenly_spread(len(examples), wanted):
        if len(chosen) < wanted and number not in chosen:
            chosen.append(number)
    return [examples[number] for number in sorted(chosen)]
