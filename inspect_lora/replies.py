"""Has base and adapter reply, and counts the replies that hold what they must."""

from __future__ import annotations

import gc
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from tqdm import tqdm

from inspect_lora.common import hash_of
from inspect_lora.conversations import Task, group_of
from inspect_lora.scores import draw_numbers
from inspect_lora.trainer import ChatFormat, Example, is_out_of_memory

if TYPE_CHECKING:
    from inspect_lora.base_side import BaseSide

ROWS_AT_ONCE = 64  # replies that are generated together, at most
TOKENS_AT_ONCE = 2**15  # of their prompts and replies, padding included
CHECKED_TOKENS = 80  # a reply that is checked is cut after so many


@dataclass
class Reply:
    """What a model said."""

    text: str
    ended: bool  # by itself, so it was not cut
    ids: list[int]  # its tokens, with the one that ends the turn; none of one that was read again
    tokens: int = 0  # how many there are


def generate(
    model: peft.PeftModel,
    chat_format: ChatFormat,
    prompts: list[list[int]],
    config: transformers.GenerationConfig,
    title: str,
    seed: int | None = None,
) -> list[Reply]:
    """Return the reply to each prompt; on a terminal a bar shows how far it is.

    Many prompts of like lengths go through the model together, since each token costs a pass of its
    own; the longest come first. If the GPU's memory is too small for them, half as many do.

    Args:
        model: with the adapter or without it.
        chat_format: how tokens become text, and where a reply ends.
        prompts: as token ids.
        config: the longest reply, and what ends it.
        title: what is asked.
        seed: draw replies by chance, with the odds that the model gives itself; each reply depends
            on the seed and its prompt alone, and not on the prompts beside it.
    """
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    rows_at_once = ROWS_AT_ONCE
    replies: dict[int, Reply] = {}
    with tqdm(total=len(prompts), desc=title, leave=False, disable=None) as bar:
        while order:
            width = len(prompts[order[0]]) + config.max_new_tokens
            batch = order[: max(1, min(rows_at_once, TOKENS_AT_ONCE // width))]
            chosen = [prompts[number] for number in batch]
            chance = None if seed is None else Chance([seed_of(one, seed) for one in chosen])
            rows = None
            try:
                rows = generate_batch(model, chosen, config, chance=chance)
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
            if rows is None:  # after `except`, whose traceback holds the batch's tensors
                rows_at_once = len(batch) // 2
                gc.collect()
                torch.cuda.empty_cache()
                continue
            for number, row in zip(batch, rows, strict=True):
                replies[number] = reply_of(row, chat_format)
            order = order[len(batch) :]
            bar.update(len(batch))
    return [replies[number] for number in range(len(prompts))]


def greedy(chat_format: ChatFormat, max_new_tokens: int) -> transformers.GenerationConfig:
    """Return how a model replies with always the likeliest token."""
    return transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=chat_format.stop_token_ids,
        pad_token_id=chat_format.stop_token_ids[0],
    )


class Chance(transformers.LogitsProcessor):
    """Has greedy decoding draw tokens with the model's own odds, each row by a seed of its own.

    The likeliest of log(p) - log(E), with E drawn from the exponential distribution, is a token
    drawn with probability p (the Gumbel-max trick).
    """

    def __init__(self, seeds: list[int]) -> None:
        """Keep a seed for each row."""
        self.seeds = seeds
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (rows x vocabulary) with each row's own noise."""
        if not self.generators:
            made = [torch.Generator(scores.device) for _ in self.seeds]
            self.generators = [one.manual_seed(s) for one, s in zip(made, self.seeds, strict=True)]
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log()


def seed_of(prompt: list[int], seed: int) -> int:
    """Return the seed of the reply to a prompt."""
    return int.from_bytes(hashlib.sha256(repr((seed, prompt)).encode()).digest()[:7], "big")


def generate_batch(
    model: peft.PeftModel,
    prompts: list[list[int]],
    config: transformers.GenerationConfig,
    streamer: transformers.TextStreamer | None = None,
    chance: Chance | None = None,
) -> list[list[int]]:
    """Return the new tokens after each prompt, from one batch, padded on the left."""
    width, padding = max(map(len, prompts)), config.pad_token_id
    ids = torch.tensor([[padding] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    noise = transformers.LogitsProcessorList([chance] if chance else [])
    out = model.generate(
        ids, config, attention_mask=mask, streamer=streamer, logits_processor=noise
    )
    return out[:, width:].tolist()


def reply_of(tokens: list[int], chat_format: ChatFormat) -> Reply:
    """Return the reply up to the first token that ends a turn, if there is one."""
    ends = [place for place, token in enumerate(tokens) if token in chat_format.stop_token_ids]
    length = ends[0] if ends else len(tokens)
    text = chat_format.tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()
    ids = tokens[: length + 1]
    return Reply(text, bool(ends), ids, len(ids))


# ---- What both say to the same prompts


@dataclass
class Answered:
    """A prompt, and what base and adapter replied to it."""

    task: Task
    max_new_tokens: int  # after so many a reply was cut
    base: Reply
    adapter: Reply
    prompt_hash: str = ""  # of its tokens

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
            "says": {name: check.rule() for name, check in task.checks.items()},
        }


def as_judged(reply: Reply, task: Task) -> dict[str, Any]:
    """Return a reply as it is in evidence.json, with what each check says of it."""
    passes = {name: check.passes(reply.text) for name, check in task.checks.items()}
    return {"text": reply.text, "ended": reply.ended, "tokens": reply.tokens, "checks": passes}


def ask_both(
    model: peft.PeftModel,
    chat_format: ChatFormat,
    tasks: list[Task],
    max_new_tokens: int,
    title: str,
    before: BaseSide | None = None,
) -> list[Answered]:
    """Have base and adapter reply to each task, with always the likeliest token.

    What the base said before is not asked again.
    """
    prompts = [chat_format.prompt_ids(task.messages) for task in tasks]
    config = greedy(chat_format, max_new_tokens)
    base = before.replies(prompts, max_new_tokens) if before else {}
    unknown = [number for number in range(len(prompts)) if number not in base]
    with model.disable_adapter():
        asked = [prompts[number] for number in unknown]
        said = generate(model, chat_format, asked, config, f"{title}, base")
    base |= dict(zip(unknown, said, strict=True))
    adapter = generate(model, chat_format, prompts, config, f"{title}, adapter")
    return [
        Answered(task, max_new_tokens, base[number], adapter[number], hash_of(prompts[number]))
        for number, task in enumerate(tasks)
    ]


def choose_samples(examples: list[Example] | list[Task], group: str, wanted: int) -> list[Any]:
    """Return one example or prompt of each kind, up to 20, and as many more as are wanted.

    The first of each kind comes into the choice; the others are drawn by a fixed seed.
    """
    first: dict[str, int] = {}
    for number, example in enumerate(examples):
        first.setdefault(group_of(example, group), number)
    chosen = sorted(first.values())[: max(wanted, 20)] if wanted else []
    others = [number for number in range(len(examples)) if number not in chosen]
    chosen += [others[place] for place in draw_numbers(len(others), max(0, wanted - len(chosen)))]
    return [examples[number] for number in sorted(chosen)]
