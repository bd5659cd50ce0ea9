"""What the model sees, and which tokens are targets.

A conversation is rendered by the model's chat template, as a server renders it. The whole must
begin with the prompt, generation prompt included; what follows, up to the token that ends the
turn, is the reply. Examples longer than MAX_SEQ_LEN are left out, never cut (without its end a
reply would teach the model not to stop); if more than a tenth are too long, the run ends.

The target tokens are those of a reply and the one that ends its turn. At position t the model
predicts token t + 1, so a row looks like this:

    input_ids    <user>  How?    <end>   <bot>   Like    this    <end>
    labels       -100    -100    -100    -100    Like    this    <end>
    predicted                            Like    this    <end>

One row trains several replies of a dialogue where each prompt begins with the tokens before it.
With Qwen3.5's own template none does, as earlier replies lose their think block. CHAT_TEMPLATE
"one_pass" is the one that TRL keeps for training such models; the server must also use it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jinja2
import torch
from tqdm import tqdm

from train_lora.base import Base
from train_lora.console import join_limited, one_line, report
from train_lora.conversations import Conversation, Messages
from train_lora.micro_batches import Batch, collate


@dataclass(frozen=True)
class Example(Conversation):
    """The same in tokens, which go through the model as one row."""

    prompt_ids: list[int]  # tokens before the reply; targets only in earlier replies
    reply_ids: list[int]  # target tokens, with the turn's end
    earlier_replies: tuple[Example, ...] = ()  # in the prompt, and also trained

    @property
    def replies(self) -> tuple[Example, ...]:
        """All replies that this row trains, each as an example of its own."""
        return (*self.earlier_replies, replace(self, earlier_replies=()))

    @property
    def input_ids(self) -> list[int]:
        """All tokens, as the model sees them."""
        return self.prompt_ids + self.reply_ids

    @property
    def labels(self) -> list[int]:
        """The target tokens in their places, and -100 everywhere else."""
        labels: list[int] = []
        for reply in self.replies:
            labels += [-100] * (len(reply.prompt_ids) - len(labels)) + reply.reply_ids
        return labels

    @property
    def targets(self) -> int:
        """The number of target tokens."""
        return sum(len(reply.reply_ids) for reply in self.replies)


def encode(
    conversations: list[Conversation],
    base: Base,
    most_tokens: int,
    problems: list[str],
    which: str = "held-out",
) -> list[Example]:
    """Return an example for each conversation that fits; add what is wrong to problems."""
    examples = []
    for conversation in tqdm(conversations, "rendering", leave=False, disable=None):
        try:
            prompt_ids, reply_ids = render(conversation.messages, base)
        except ValueError as error:
            problems.append(f"{conversation.source}: {error}")
        else:
            fields = vars(conversation) | {"prompt_ids": prompt_ids, "reply_ids": reply_ids}
            examples.append(Example(**fields))
    too_long = [example.source for example in examples if len(example.input_ids) > most_tokens]
    if too_long:
        lengths = sorted(len(example.input_ids) for example in examples)
        nine_tenths = lengths[-1 - len(lengths) // 10]
        problem = (
            f"{len(too_long):,} of {len(conversations):,} {which} examples are longer than "
            f"MAX_SEQ_LEN {most_tokens}; {nine_tenths} keeps nine tenths, and {lengths[-1]} all"
        )
        if len(too_long) > len(conversations) / 10:
            problems.append(f"{too_long[0]}: {problem}")
        else:
            report("left out", f"{problem}\n{join_limited([*dict.fromkeys(too_long)], 5, ', ')}")
    return [example for example in examples if len(example.input_ids) <= most_tokens]


def render(messages: Messages, base: Base) -> tuple[list[int], list[int]]:
    """Return the token ids of the prompt and of the reply, or raise ValueError.

    No loss shows these faults: text that no server would render, or a reply without its end.
    """
    contents = "\n".join(message["content"] for message in messages)
    for token in base.special_tokens:
        if token in contents:
            raise ValueError(f"the text contains the special token {token}; reword or remove it")
    apply, thinking = base.tokenizer.apply_chat_template, base.enable_thinking
    options = {"tokenize": False, "enable_thinking": thinking}
    try:
        prompt = apply(messages[:-1], add_generation_prompt=True, **options)
        whole = apply(messages, **options)
    except (jinja2.TemplateError, ArithmeticError, TypeError) as error:
        raise ValueError(f"the chat template refuses this ({one_line(error)})") from error
    for message in messages:
        thoughts, _, spoken = message["content"].rpartition("</think>")
        is_trained = thinking and message is messages[-1]  # earlier thoughts may be left out
        needed = [spoken, thoughts.partition("<think>")[2] if is_trained else ""]
        if not all(part.strip() in whole for part in needed):
            raise ValueError(f"the chat template leaves out what the {message['role']} says")
    prompt_ids = base.tokenizer(prompt, add_special_tokens=False).input_ids
    ids = base.tokenizer(whole, add_special_tokens=False).input_ids
    reply_ids = ids[len(prompt_ids) :]
    if prompt_ids + reply_ids != ids:
        raise ValueError(
            "the chat template renders the prompt differently once the reply follows, so training "
            "would differ from serving; use another model, or CHAT_TEMPLATE"
        )
    ends = [place for place, token in enumerate(reply_ids, 1) if token in base.stop_ids]
    if not ends:
        raise ValueError(
            "the chat template does not end the reply with a stop token; add its end-of-turn token "
            "to generation_config.json"
        )
    return prompt_ids, reply_ids[: ends[0]]  # without the newline that follows it


def join_replies(replies: list[Example]) -> list[Example]:
    """Return examples in which one row trains several replies of a dialogue, where that is exact.

    It is exact if a prompt begins with the very tokens of the example before it: as no token
    depends on a later one, losses and gradients are those of the replies one by one.
    """
    joined: list[Example] = []
    for reply in replies:
        if joined and joined[-1].source == reply.source:
            continues = reply.prompt_ids[: len(joined[-1].input_ids)] == joined[-1].input_ids
            if continues:
                reply = replace(reply, earlier_replies=joined.pop().replies)
        joined.append(reply)
    return joined


def rows_of(examples: list[Example]) -> list[dict[str, list[int]]]:
    """Return examples in the form that TRL takes."""
    return [{"input_ids": example.input_ids, "labels": example.labels} for example in examples]


def pad(examples: list[Example], device: torch.device) -> Batch:
    """Return the tensors of collate() on a device."""
    return {key: tensor.to(device) for key, tensor in collate(rows_of(examples)).items()}
