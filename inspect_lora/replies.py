"""Has base and adapter reply, and counts the replies that hold what they must."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from tqdm import tqdm

from inspect_lora.checks import in_words
from inspect_lora.conversations import Task, group_of
from inspect_lora.scores import evenly_spread
from inspect_lora.trainer import ChatFormat, Example

ROWS_AT_ONCE = 64  # replies that are generated together
CHECKED_TOKENS = 80  # a reply that is checked is cut after so many


@dataclass
class Reply:
    """What a model said."""

    text: str
    ended: bool  # by itself, so it was not cut
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


# ---- What both say to the same prompts


@dataclass
class Answered:
    """A prompt, and what base and adapter replied to it."""

    task: Task
    max_new_tokens: int  # after so many a reply was cut
    base: Reply
    adapter: Reply

    def as_recorded(self, group: str) -> dict[str, Any]:
        """Return it as it is in evidence.json; group is the key that groups lines."""
        task = self.task
        return {
            "where": task.where,
            "id": str(task.row.get("id") or ""),
            "group": group_of(task, group),
            "source": task.source,
            "messages": task.messages,
            "reference": task.reference,
            "max_new_tokens": self.max_new_tokens,
            "base": as_judged(self.base, task),
            "adapter": as_judged(self.adapter, task),
            "rules": task.rules,
            "says": {name: in_words(check) for name, check in task.checks.items()},
        }


def as_judged(reply: Reply, task: Task) -> dict[str, Any]:
    """Return a reply as it is in evidence.json, with what each check says of it."""
    passes = {name: check.passes(reply.text) for name, check in task.checks.items()}
    return {"text": reply.text, "ended": reply.ended, "tokens": len(reply.ids), "checks": passes}


def ask_both(
    model: peft.PeftModel,
    chat_format: ChatFormat,
    tasks: list[Task],
    max_new_tokens: int,
    title: str,
) -> list[Answered]:
    """Have base and adapter reply to each task, with always the likeliest token."""
    prompts = [chat_format.prompt_ids(task.messages) for task in tasks]
    config = greedy(chat_format, max_new_tokens)
    with model.disable_adapter():
        base = generate(model, chat_format, prompts, config, f"{title}, base")
    adapter = generate(model, chat_format, prompts, config, f"{title}, adapter")
    return [
        Answered(task, max_new_tokens, one, other)
        for task, one, other in zip(tasks, base, adapter, strict=True)
    ]


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
