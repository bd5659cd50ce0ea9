"""The division of a step into parts that fit into the memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from train_lora.delta_rule import round_up

Batch = dict[str, Tensor]  # input_ids, labels and attention_mask (rows x tokens)

CHECKPOINTING_FACTOR = 4  # how many times the tokens go at once with checkpointing


class DoesNotFit(Exception):
    """A micro-batch has too many rows or tokens for the memory: rows, width."""


def micro_batches(inputs: Batch, tokens_at_once: int, chunk: int = 1) -> Iterator[Batch]:
    """Yield a padded step in parts that fit, the longest examples first.

    A step that fits is not divided. Otherwise each part is as wide as its longest example, and
    lengths count as rounded up to a multiple of chunk. With gradient checkpointing,
    CHECKPOINTING_FACTOR times as many tokens go at once.
    """
    lengths = inputs["attention_mask"].sum(1).tolist()
    if len(lengths) * round_up(max(lengths), chunk) <= tokens_at_once:
        yield inputs
        return
    numbers = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    while numbers:
        width = lengths[numbers[0]]
        padded_length, most = round_up(width, chunk), tokens_at_once
        if padded_length > tokens_at_once:
            most *= CHECKPOINTING_FACTOR
        count = max(1, most // padded_length)
        yield {key: value[numbers[:count], :width] for key, value in inputs.items()}
        numbers = numbers[count:]


def collate(rows: list[dict[str, list[int]]]) -> Batch:
    """Return input_ids, labels and attention_mask (rows x tokens), padded on the right."""

    def padded(lists: list[list[int]], value: int) -> Tensor:
        tensors = [torch.tensor(one) for one in lists]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": padded(ids, 0),
        "labels": padded([row["labels"] for row in rows], -100),
        "attention_mask": padded([[1] * len(one) for one in ids], 0),
    }
