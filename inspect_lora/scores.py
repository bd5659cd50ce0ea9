"""Losses of held-out replies, and how sure a difference between two of them is.

± is one standard error over the held-out lines (the replies of one conversation count as one),
paired: both losses are of the same examples (Miller, "Adding Error Bars to Evals", 2024). It is
about the choice of the lines; what another seed of the training would change is not in it.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass
from statistics import NormalDist
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
    effective_lines: float | None = None  # that it rests on; None if they are very many

    def __str__(self) -> str:
        """Return it as a difference of losses."""
        return f"{self.value:+.4f} ± {self.error:.4f}".replace("inf", "?")

    def without_sign(self) -> str:
        """Return it as a quantity that cannot be below 0."""
        return str(self).removeprefix("+")

    def interval(self) -> str:
        """Return its 95 % interval."""
        margin = self.margin()
        low, high = self.value - margin, self.value + margin
        return f"{low:+.4f} to {high:+.4f}".replace("-inf", "?").replace("+inf", "?")

    def percent(self, digits: int = 1) -> str:
        """Return it as a share."""
        text = f"{100 * self.value:.{digits}f} ± {100 * self.error:.{digits}f} %"
        return text.replace("inf", "?")  # the error of one line is not known

    def margin(self, comparisons: int = 1) -> float:
        """Return half the width of its 95 % interval; so many intervals hold 95 % together."""
        needed = errors_needed(comparisons, self.effective_lines)
        return needed * self.error if math.isfinite(needed) else math.inf

    def is_clear(self, comparisons: int = 1) -> bool:
        """Return whether its 95 % interval leaves out 0, where it was picked among so many."""
        return abs(self.value) > self.margin(comparisons)


def look_equal(one: float, other: float) -> bool:
    """Return whether two losses are the same as they are shown, with four digits."""
    return f"{one:.4f}" == f"{other:.4f}"


UNKNOWN = Estimate(math.nan, math.inf)
# With fewer held-out lines nothing is concluded: they are the fewest for which it was drawn how
# often something is clear though nothing is there (docs/evidence.md).
FEWEST_LINES = 20


def is_conclusive(losses: Losses) -> bool:
    """Return whether there are lines enough, and a clear gain, to say anything of parts."""
    gain = losses.gain()
    return len(set(losses.lines)) >= FEWEST_LINES and gain.is_clear() and gain.value > 0


def ratio_with_error(
    numerators: list[float], denominators: list[float], lines: list[str] | None = None
) -> Estimate:
    """Return sum(numerators) / sum(denominators), with its standard error over the examples.

    The residuals are numerator - ratio x denominator (Cochran, Sampling Techniques, 6.4). Each is
    divided by what is left without its example, so that the error is the jackknife's: a long reply
    draws the ratio towards itself, and the plain error of few lines is too small by that. With
    differences of losses over tokens it is the paired difference per token; with two differences
    it is a share. Since a long line weighs more than a short one, the error is as uncertain as that
    of fewer lines of one length: their effective number (Kish, Survey Sampling, 1965).

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
    effective = total**2 / sum(b**2 for b in denominators)
    if n == 1 or total in denominators:
        return Estimate(value, math.inf, effective)
    pairs = zip(numerators, denominators, strict=True)
    squares = sum(((a - value * b) / (total - b)) ** 2 for a, b in pairs)
    return Estimate(value, math.sqrt(squares * (n - 1) / n), effective)


def sums_by(keys: list[str], numbers: list[float]) -> list[float]:
    """Return the sum of the numbers of each key, in the order in which the keys first come."""
    sums = dict.fromkeys(keys, 0.0)
    for key, number in zip(keys, numbers, strict=True):
        sums[key] += number
    return list(sums.values())


def differences(ones: list[float], others: list[float]) -> list[float]:
    """Return the first list minus the second one, number by number."""
    return [one - other for one, other in zip(ones, others, strict=True)]


def errors_needed(comparisons: int = 1, effective_lines: float | None = None) -> float:
    """Return how many standard errors make a difference clear: fewer than 5 % are so by chance.

    Args:
        comparisons: how many there are, or among how many it was picked. The best of six equal
            parts would be clear in every eighth table otherwise (Bonferroni's bound). It is three
            errors at least, since skewed differences have longer tails than Student's.
        effective_lines: that the error is of. Of few lines the error itself is uncertain, so it is
            Student's quantile: 2.09 errors of 20 lines, 2.01 of 50, 1.97 of 280.

    Measured by `python tests/benchmark.py calib`: docs/evidence.md has the table.
    """
    chance = 0.05 / comparisons / 2  # to either side
    least = 3.0 if comparisons > 1 else 0.0
    if effective_lines is None:
        return max(least, NormalDist().inv_cdf(1 - chance))
    freedom = math.floor(effective_lines + 1e-9) - 1  # ten equal lines may come out as 9.999...
    return max(least, students_quantile(chance, freedom)) if freedom > 0 else math.inf


@functools.cache
def students_quantile(chance: float, freedom: int) -> float:
    """Return what Student's t exceeds with this probability, by halving an interval."""
    low, high = 0.0, 1.0
    while students_tail(high, freedom) > chance:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if students_tail(middle, freedom) > chance:
            low = middle
        else:
            high = middle
    return high


def students_tail(t: float, freedom: int) -> float:
    """Return how probable a value above t is (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    is_odd = freedom % 2 == 1
    term = total = math.cos(angle) if is_odd else 1.0
    for k in range(3 if is_odd else 2, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    within = math.sin(angle) * total
    if is_odd:
        within = 2 / math.pi * (angle + (within if freedom > 1 else 0.0))
    return (1 - within) / 2


SEED = 0  # 42 would draw 50 of the package's tasks without any of one topic; a test counts them


def draw_numbers(count: int, wanted: int) -> list[int]:
    """Return at most wanted of the numbers below count, drawn by a fixed seed, in their order.

    Each adapter gets the same ones. A systematic choice, such as every sixth line, would miss kinds
    of a file whose kinds take turns, as those of the shipped files do.
    """
    return sorted(random.Random(SEED).sample(range(count), min(count, wanted)))
