"""evidence.json: all that was measured of an adapter, and the statistics that are made from it.

The file holds what was counted: the loss of each reply, the divergence on each task, the texts. No
mean is stored, so every table and picture can be made again, or otherwise, without a GPU. All
losses and divergences are sums over the tokens of a reply, in nats.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inspect_lora.common import InspectError, one_line, write_whole

FILE = "evidence.json"
SCHEMA = 3


@dataclass
class Line:
    """A held-out reply, and its losses."""

    id: str  # a hash of its tokens, those of its prompt included
    where: str  # file:line
    cluster: str  # the line that it counts with: replies of one conversation, and copies, are one
    kind: str  # of the line, to group the table
    tokens: int  # of the reply
    base: float
    adapter: float


@dataclass
class Part:
    """The adapter at another strength, or a part of it."""

    kind: str  # "strength", "group", "target" or "cut"
    name: str  # such as "x 0.5", "attention alone", "q_proj alone" or "cut to 4 of 8"
    losses: list[float]  # of the lines that Record.measured_on names, in that order


@dataclass
class Shift:
    """How far the adapter moves the model on other tasks, at some strength."""

    strength: float  # 1 is as trained
    system: bool  # whether the training's system message is given
    kl: list[float]  # KL(base || adapter) over the base's reply to each task
    other: list[int]  # at how many of its tokens another one is the likeliest
    tokens: list[int]  # of the base's reply to each task
    replies: str  # a hash of these replies: adapters can be compared on the same ones alone


@dataclass
class Said:
    """A generated reply."""

    text: str
    tokens: int
    ended: bool  # by itself: it was not cut at Record.max_new_tokens
    passes: dict[str, bool] = field(default_factory=dict)  # by the name of each rule


@dataclass
class Exchange:
    """A prompt, and what base and adapter reply to it."""

    source: str  # "held_out", "prompts" or "tasks"
    where: str  # file:line
    kind: str
    messages: list[dict[str, str]]
    reference: str | None  # the reply of the file
    checks: dict[str, dict[str, Any]]  # the rules for a reply, by name
    base: Said
    adapter: Said


@dataclass
class Probe:
    """A reply that the adapter generated, with its tokens, for a server to score."""

    where: str  # file:line of the prompt
    messages: list[dict[str, str]]  # of the prompt
    prompt_ids: list[int]
    reply_ids: list[int]
    base: float
    adapter: float


@dataclass
class Record:
    """What evidence.json holds."""

    adapter: str  # as it was named on the command line
    id: str  # a hash of its tensors and its configuration
    config: dict[str, Any]  # PEFT's
    run: dict[str, Any]  # run.json of the training, if it lies in the adapter's folder
    on: dict[str, Any] = field(default_factory=dict)  # base, commit, dtype, device, files ...
    system: str = ""  # the system message that prompts get, and the tasks of one shift
    learned: int | None = None  # lines left out since the adapter learned them; None: not known
    too_long: int = 0  # lines left out since they are longer than max_seq_len
    refused: int = 0  # tasks left out since the chat template refuses them
    lines: list[Line] = field(default_factory=list)
    measured_on: list[int] = field(default_factory=list)  # the lines that measure the parts
    parts: list[Part] = field(default_factory=list)
    updates: dict[str, list[float]] = field(default_factory=dict)  # by target: |scaling B A| / |W|
    tasks: list[str] = field(default_factory=list)  # file:line of those that measure the shifts
    shifts: list[Shift] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    max_new_tokens: int = 0  # a reply is cut after so many
    probes: list[Probe] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each measurement
    finished: bool = False
    schema: int = SCHEMA
    folder: Path = Path()  # where the file lies; not stored


def save(record: Record) -> None:
    """Write evidence.json into the record's folder; raise ValueError at NaN and infinity."""
    content = dataclasses.asdict(record)
    del content["folder"]
    write_whole(record.folder / FILE, json.dumps(content, indent=1, allow_nan=False))


def read(path: Path) -> Record:
    """Return the record in a folder, or in a file, which may have another name."""
    if path.is_dir():
        path = path / FILE
    try:
        content = json.loads(path.read_bytes())
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, and {SCHEMA} is read here")
        for name, kind in (("lines", Line), ("parts", Part), ("shifts", Shift), ("probes", Probe)):
            content[name] = [kind(**one) for one in content[name]]
        for one in content["exchanges"]:
            one["base"], one["adapter"] = Said(**one["base"]), Said(**one["adapter"])
        content["exchanges"] = [Exchange(**one) for one in content["exchanges"]]
        return Record(**content, folder=path.parent)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InspectError(f"{path} cannot be read ({one_line(error)}).") from error


# ---- statistics

FEWEST_LINES = 20  # with fewer of them nothing is called clear, and no share is shown


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, and how many independent lines it rests on."""

    value: float
    low: float
    high: float
    lines: int

    def is_clear(self, value: float = 0.0) -> bool:
        """Return whether there are lines enough, and the interval leaves a value out."""
        return self.lines >= FEWEST_LINES and not self.low <= value <= self.high


def ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    clusters: Sequence[str] | None = None,
    chance: float = 0.05,
) -> Estimate:
    """Return sum(numerators) / sum(denominators) with its interval, which misses by this chance.

    Differences of two losses over tokens give the paired difference a token; two differences give
    a share. What belongs to one cluster (copies, the replies of one conversation) is added up
    first and counts once. The standard error is the jackknife's: the squared changes of the ratio
    as each cluster is left out. Long replies weigh more than short ones, so Student's t has the
    degrees of freedom of the effective number of lines (Kish, Survey Sampling, 1965), less one.
    Another seed of the training is not in it.
    """
    sums: dict[str | int, list[float]] = {}
    for number, (above, below) in enumerate(zip(numerators, denominators, strict=True)):
        one = sums.setdefault(clusters[number] if clusters else number, [0.0, 0.0])
        one[0] += above
        one[1] += below
    total = sum(below for _, below in sums.values())
    value = sum(above for above, _ in sums.values()) / total if total else math.nan
    squares = sum(below**2 for _, below in sums.values())
    if not total or total**2 < 2 * squares:  # fewer than two effective lines
        return Estimate(value, -math.inf, math.inf, len(sums))
    changes = ((above - value * below) / (total - below) for above, below in sums.values())
    variance = sum(change**2 for change in changes) * (len(sums) - 1) / len(sums)
    margin = student_quantile(chance, total**2 / squares - 1) * math.sqrt(variance)
    return Estimate(value, value - margin, value + margin, len(sums))


@functools.cache
def student_quantile(chance: float, freedom: float) -> float:
    """Return what the absolute value of Student's t exceeds with this probability.

    With t = sqrt(freedom) sinh(u) the density of u is proportional to cosh(u) ** -freedom. It is
    integrated by Simpson's rule. Newton's steps come from below and never overshoot, since the
    density falls. Right to 1e-6 of the value for 1 to 100,000 degrees of freedom and a chance of
    0.00006 (780 pairs) or more.
    """
    half = math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)
    half = math.exp(half) * math.sqrt(math.pi) / 2  # the integral from 0 to infinity
    u = 0.0
    for _ in range(25):
        heights = [math.cosh(u * k / 200) ** -freedom for k in range(201)]
        inner = 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
        area = (heights[0] + inner + heights[-1]) * u / 600
        u += ((1 - chance) * half - area) / heights[-1]
    return math.sqrt(freedom) * math.sinh(u)


def share(passed: int, count: int) -> Estimate:
    """Return a share with Wilson's 95 % interval, which has a width for none and all, too.

    It holds 95 % on average over all shares, and 84 % at the worst, near none and near all.
    """
    z = 1.959964  # of the normal distribution
    value, weight = passed / count, z**2 / count
    middle = (value + weight / 2) / (1 + weight)
    margin = math.sqrt(weight * value * (1 - value) + weight**2 / 4) / (1 + weight)
    return Estimate(value, middle - margin, middle + margin, count)


def p_of_change(lost: int, won: int) -> float:
    """Return the exact probability of so uneven a change if lost and won are alike (McNemar)."""
    tail = sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2 ** (lost + won))


def per_token(numbers: Sequence[float], lines: list[Line], chance: float = 0.05) -> Estimate:
    """Return the mean over the tokens of lines, such as of their losses or of differences."""
    tokens = [line.tokens for line in lines]
    return ratio(numbers, tokens, [line.cluster for line in lines], chance)


def gain(lines: list[Line]) -> Estimate:
    """Return the base's loss minus the adapter's, in nats a token: above 0 is better."""
    return per_token([line.base - line.adapter for line in lines], lines)


def lines_of_parts(record: Record) -> list[Line]:
    """Return the lines that the parts were measured on."""
    return [record.lines[number] for number in record.measured_on]


def share_of_gain(record: Record, part: Part) -> Estimate:
    """Return which share of the adapter's gain a part has; parts overlap."""
    lines = lines_of_parts(record)
    return ratio(
        [line.base - loss for line, loss in zip(lines, part.losses, strict=True)],
        [line.base - line.adapter for line in lines],
        [line.cluster for line in lines],
    )


def has_shares(record: Record) -> bool:
    """Return whether there is a clear gain to have shares of."""
    found = gain(lines_of_parts(record))
    return bool(record.parts) and found.is_clear() and found.value > 0


@dataclass
class Verdict:
    """What a check says of the two replies to a prompt."""

    exchange: Exchange
    rule: dict[str, Any]
    base: bool
    adapter: bool


def verdicts(record: Record) -> dict[str, list[Verdict]]:
    """Return the verdicts of each check; those on the other tasks have a name of their own."""
    found: dict[str, list[Verdict]] = {}
    for one in record.exchanges:
        for name, rule in one.checks.items():
            title = f"tasks: {name}" if one.source == "tasks" else name
            verdict = Verdict(one, rule, one.base.passes[name], one.adapter.passes[name])
            found.setdefault(title, []).append(verdict)
    return found
