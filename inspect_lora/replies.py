"""Has base and adapter reply, and counts the replies that hold what they must."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from tqdm import tqdm

from inspect_lora.common import counted
from inspect_lora.conversations import Task
from inspect_lora.scores import evenly_spread, mcnemar, p_in_words
from inspect_lora.trainer import ChatFormat, Example

ROWS_AT_ONCE = 64  # replies that are generated together
CHECKED_TOKENS = 80  # a reply that is checked is cut after so many
FEWEST_TO_LOSE = 6  # of five lost and none won, p is 0.06


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
        num_beams=1,
        repetition_penalty=1.0,  # the model's own configuration may have another
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


@dataclass
class CheckRow:
    """How often base and adapter passed the checks of one name."""

    name: str
    lines: int
    before: int  # replies of the base that pass
    after: int  # replies of the adapter that pass
    lost: list[str]  # lines that only the base passes
    won: list[str]  # lines that only the adapter passes
    p: float  # of so uneven a change by chance
    is_clear: bool  # less than 5 % over all rows together
    can_be_clear: bool  # whether that needs no more lines than there are

    def judgement(self) -> str:
        """Return what the row shows; none shows that nothing was lost."""
        lost, won = len(self.lost), len(self.won)
        if self.is_clear:
            verb = "fewer" if lost > won else "more"
            return f"{verb} pass now, by more than chance ({p_in_words(self.p)})"
        said = f"may be chance ({p_in_words(self.p)})" if lost or won else "the same lines pass"
        if not self.can_be_clear:
            return f"{said}; too few lines to show anything"
        if self.before < FEWEST_TO_LOSE:
            return f"{said}; too few pass for a loss to show"
        return said

    def sentence(self) -> str:
        """Return the row as a sentence."""
        return (
            f"{self.name}: of {counted(self.lines, 'line')} the base passes {self.before} and the "
            f"adapter {self.after}: {self.judgement()}."
        )


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


def rows_of_checks(replies: list[dict[str, Any]]) -> list[CheckRow]:
    """Return a row for each name, in the order in which they first come."""
    names = list(dict.fromkeys(name for reply in replies for name in reply["base_passes"]))
    rows = []
    for name in names:
        asked = [reply for reply in replies if name in reply["base_passes"]]
        before = {one["where"] for one in asked if one["base_passes"][name]}
        after = {one["where"] for one in asked if one["adapter_passes"][name]}
        lost = [one["where"] for one in asked if one["where"] in before - after]
        won = [one["where"] for one in asked if one["where"] in after - before]
        p = mcnemar(len(lost), len(won))
        needed = 0.05 / len(names)  # one of twenty rows would look so by chance
        clear = p < needed, mcnemar(len(asked), 0) < needed
        rows.append(CheckRow(name, len(asked), len(before), len(after), lost, won, p, *clear))
    return rows


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


def about_endings(samples: list[Sample], max_new_tokens: int) -> str:
    """Return the sentence on replies of the adapter that did not end, or ""."""
    base, adapter = (
        sum(not reply.stopped for reply in replies)
        for replies in zip(*((one.base, one.adapter) for one in samples), strict=True)
    )
    if not adapter:
        return ""
    return (
        f"replies: {adapter} of {len(samples)} of the adapter's replies did not end within "
        f"{max_new_tokens} tokens (of the base's, {base})."
    )


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


def group_of(example: Example, group: str) -> str:
    """Return what the example's line has under the key that groups lines, or ""."""
    value = example.row.get(group)
    return "" if value is None else str(value)
