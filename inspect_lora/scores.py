"""Losses of held-out replies, and how sure a difference between two of them is.

± is one standard error over the held-out lines (the replies of one conversation count as one),
paired: both losses are of the same examples (Miller, "Adding Error Bars to Evals", 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from inspect_lora.trainer import Example


def losses_of(model: torch.nn.Module, examples: list[Example], title: str) -> list[float]:
    """Return each example's loss with the model as it is now, in nats, summed over the reply.

    Fewer go through the model together than here if the GPU's memory is too small for them.
    """
    from inspect_lora.trainer import example_losses  # `compare` does without the script

    tokens_at_once = 8 * max(len(example.input_ids) for example in examples)
    return example_losses(model, examples, tokens_at_once, title)


@dataclass
class Losses:
    """The losses that parts are compared with: one number for each measured example."""

    trained: list[float]  # with the whole adapter, in nats, summed over the reply
    base: list[float]  # without it
    tokens: list[int]  # in each reply
    lines: list[str]  # the line of the held-out file that each is of

    def only(self, numbers: list[int]) -> Losses:
        """Return those of some of the examples."""
        lists = (self.trained, self.base, self.tokens, self.lines)
        return Losses(*([one[number] for number in numbers] for one in lists))

    def gain(self) -> Estimate:
        """Return by how much the adapter is better than the base, in nats a token."""
        return ratio_with_error(differences(self.base, self.trained), self.tokens, self.lines)


@dataclass(frozen=True)
class Estimate:
    """A mean over the held-out examples, with its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        """Return it as a difference of losses."""
        return f"{self.value:+.4f} ± {self.error:.4f}".replace("inf", "?")

    def percent(self, digits: int = 1) -> str:
        """Return it as a share."""
        text = f"{100 * self.value:.{digits}f} ± {100 * self.error:.{digits}f} %"
        return text.replace("inf", "?")  # the error of one line is not known

    def is_clear(self, errors: float = 2) -> bool:
        """Return whether it differs from 0 by more than so many times its error."""
        return abs(self.value) > errors * self.error


UNKNOWN = Estimate(math.nan, math.inf)
# With fewer held-out lines nothing is concluded, since the errors themselves are too uncertain.
FEWEST_LINES = 10


def is_conclusive(losses: Losses) -> bool:
    """Return whether there are lines enough, and a clear gain, to say anything of parts."""
    gain = losses.gain()
    return len(set(losses.lines)) >= FEWEST_LINES and gain.is_clear() and gain.value > 0


def ratio_with_error(
    numerators: list[float], denominators: list[float], lines: list[str] | None = None
) -> Estimate:
    """Return sum(numerators) / sum(denominators), with its standard error over the examples.

    The error is that of a ratio estimator by linearization (Cochran, Sampling Techniques, 6.4):
    the residuals are numerator - ratio x denominator. With differences of losses over tokens it is
    the paired difference per token; with two differences it is a share.

    The replies of one line are alike, and counted as independent they would make the error too
    small: so if the line of each example is given, they are added up first, and lines are counted.
    """
    if lines is not None:
        numerators, denominators = sums_by(lines, numerators), sums_by(lines, denominators)
    total = sum(denominators)
    if total == 0:
        return UNKNOWN
    value = sum(numerators) / total
    n = len(numerators)
    squares = sum((a - value * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    error = math.sqrt(squares * n / (n - 1)) / abs(total) if n > 1 else math.inf
    return Estimate(value, error)


def sums_by(keys: list[str], numbers: list[float]) -> list[float]:
    """Return the sum of the numbers of each key, in the order in which the keys first come."""
    sums = dict.fromkeys(keys, 0.0)
    for key, number in zip(keys, numbers, strict=True):
        sums[key] += number
    return list(sums.values())


def differences(ones: list[float], others: list[float]) -> list[float]:
    """Return the first list minus the second one, number by number."""
    return [one - other for one, other in zip(ones, others, strict=True)]


def errors_needed(comparisons: int) -> float:
    """Return how many standard errors make a difference clear.

    The best of six independent parts is better by twice its error in every eighth table by chance
    alone, but by three times its error only once in 120 tables (once in 23 with 10 held-out lines).
    """
    return 2 if comparisons == 1 else 3


def evenly_spread(count: int, wanted: int) -> list[int]:
    """Return at most wanted of the numbers below count, evenly spread."""
    wanted = min(count, wanted)
    return [number * count // wanted for number in range(wanted)]
