"""What else the adapter changed: how far it moves the model on tasks that it should not touch.

The base model replies to each task once, by chance with a fixed seed. On these replies the
probabilities of both models are compared: at each strength without a system message (what leaks
into other uses), and as trained also with the training's (which includes what was wanted). The loss
on reference answers would measure style: an adapter that learned to be brief would look better
while it forgets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import peft
import torch
from tqdm import tqdm

from inspect_lora.adapters import can_scale_and_cut, rescaled
from inspect_lora.conversations import Task
from inspect_lora.parts import STRENGTHS
from inspect_lora.replies import generate, greedy
from inspect_lora.scores import Estimate, ratio_with_error
from inspect_lora.trainer import ChatFormat, Example, pad, reply_logits

REPLY_TOKENS = 64  # of a reply to a task
SEED = 42  # the same for all adapters, so that two of them are measured on the same replies
ROWS_AT_ONCE = 64  # replies that are scored together
LOGITS_AT_ONCE = 2**26  # a quarter of a GiB in float32; a token has one for each vocabulary entry


@dataclass
class Shift:
    """How far an adapter, at some strength, moves the model: for each task, summed over tokens."""

    kl: list[float] = field(default_factory=list)  # KL(base || adapter), in nats
    other: list[float] = field(default_factory=list)  # places with another likeliest token
    tokens: list[int] = field(default_factory=list)

    def kl_a_token(self) -> Estimate:
        """Return the mean KL of a token, with its error over the tasks."""
        return ratio_with_error(self.kl, self.tokens)

    def other_tokens(self) -> Estimate:
        """Return the share of places where another token would be chosen."""
        return ratio_with_error(self.other, self.tokens)

    def as_recorded(self) -> dict[str, Any]:
        """Return it as it is in evidence.json."""
        return {"kl": asdict(self.kl_a_token()), "other_tokens": asdict(self.other_tokens())}


@dataclass
class Elsewhere:
    """How far the model is moved on other tasks."""

    tasks: list[Task]
    without_system: dict[float, Shift]  # by strength; 1 is as trained
    with_system: Shift | None  # as trained, if the training had a system message

    def as_recorded(self) -> dict[str, Any]:
        """Return it as it is in evidence.json."""
        rows = {f"x {s:g}": shift.as_recorded() for s, shift in self.without_system.items()}
        places = [task.where for task in self.tasks]
        found = {"tasks": len(places), "measured_on": places, "no system message": rows}
        if self.with_system:
            found["the training's"] = {"x 1": self.with_system.as_recorded()}
        return found


def measure_elsewhere(
    model: peft.PeftModel, chat_format: ChatFormat, tasks: list[Task], system_message: str
) -> Elsewhere:
    """Return how far the adapter moves the model on these tasks."""
    strengths = sorted((*STRENGTHS, 1.0)) if can_scale_and_cut(model) else [1.0]
    examples = replies_of_base(model, chat_format, tasks, "")
    shifts = shifts_of(model, examples, strengths)
    with_system = None
    if system_message:
        examples = replies_of_base(model, chat_format, tasks, system_message)
        with_system = shifts_of(model, examples, [1.0])[1.0]
    return Elsewhere(tasks, shifts, with_system)


def replies_of_base(
    model: peft.PeftModel, chat_format: ChatFormat, tasks: list[Task], system_message: str
) -> list[Example]:
    """Return the base model's sampled reply to each task.

    A task with a system message of its own, such as another persona's, keeps that.
    """
    prompts = []
    for task in tasks:
        first = [{"role": "system", "content": system_message}]
        has_none = system_message and task.messages[0]["role"] != "system"
        prompts.append(chat_format.prompt_ids((first if has_none else []) + task.messages))
    with model.disable_adapter():
        config = greedy(chat_format, REPLY_TOKENS)
        replies = generate(model, chat_format, prompts, config, "other tasks, base", SEED)
    return [
        Example(task.where, task.messages, prompt_ids=prompt, reply_ids=reply.ids)
        for task, prompt, reply in zip(tasks, prompts, replies, strict=True)
    ]


def shifts_of(
    model: peft.PeftModel, examples: list[Example], strengths: list[float]
) -> dict[float, Shift]:
    """Return {strength: how far the model moves} on the base's replies; 1 is as trained."""
    shifts = {strength: Shift() for strength in strengths}
    vocabulary = model.get_output_embeddings().weight.shape[0]
    with tqdm(total=len(examples), desc="other tasks", leave=False, disable=None) as bar:
        for batch in batches_of(examples, LOGITS_AT_ONCE // vocabulary):
            inputs = pad(batch, model.device)
            counts = [len(example.reply_ids) for example in batch]
            with torch.no_grad():
                with model.disable_adapter():
                    base = log_probabilities(model, inputs)
                for strength, shift in shifts.items():
                    with nullcontext() if strength == 1 else rescaled(model, strength):
                        moved = log_probabilities(model, inputs)
                    kl = (base.exp() * (base - moved)).sum(-1, dtype=torch.float64)
                    is_other = (base.argmax(-1) != moved.argmax(-1)).double()
                    shift.kl += [part.sum().item() for part in kl.split(counts)]
                    shift.other += [part.sum().item() for part in is_other.split(counts)]
                    shift.tokens += counts
            bar.update(len(batch))
    return shifts


def log_probabilities(model: peft.PeftModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the log-probabilities (tokens x vocabulary) that lead to each token of the replies."""
    return reply_logits(model, inputs).float().log_softmax(-1)


def batches_of(examples: list[Example], tokens: int) -> Iterator[list[Example]]:
    """Yield the examples in order, in batches of few, whose replies have at most so many tokens."""
    batch: list[Example] = []
    for example in examples:
        has_too_many = sum(len(one.reply_ids) for one in [*batch, example]) > tokens
        if batch and (has_too_many or len(batch) == ROWS_AT_ONCE):
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
