"""evidence.json: all that was measured of an adapter.

The file holds what was counted: the loss of each reply, the divergence on each task, the texts. No
mean is stored, so every table and picture can be made again, or otherwise, without a GPU. All
losses and divergences are sums over the tokens of a reply, in nats.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inspect_lora.common import InspectError, one_line, write_whole

FILE = "evidence.json"
SCHEMA = 4


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
class Pair:
    """A good and a bad reply to one prompt: which of them is likelier, before and after?

    The four numbers are sums of log-probabilities over a reply's tokens, with the one that ends it.
    """

    id: str  # a hash of the tokens of the prompt and of both replies
    where: str  # file:line
    cluster: str  # as that of a Line
    kind: str
    good_tokens: int
    bad_tokens: int
    base_good: float
    base_bad: float
    adapter_good: float
    adapter_bad: float


@dataclass
class Part:
    """The adapter at another strength, or with parts of it switched off.

    A part is all modules of a sublayer ("attention") or of a target ("q_proj"). "removed" has all
    others on, "alone" has all others off; "cut" has the strongest directions of every update.
    """

    family: str  # "strength", "removed", "alone" or "cut"
    name: str  # "x 0.5"; "attention" or "q_proj"; "4 of 8"
    losses: list[float]  # of the lines that Record.part_lines names, in that order


@dataclass
class Shift:
    """How far the adapter moves the model on other tasks, at some strength."""

    strength: float  # 1 is as trained
    system: bool  # whether the training's system message is given
    kl: list[float]  # KL(base || adapter) over the base's reply to each task
    changed_tokens: list[int]  # at how many of its tokens another one is the likeliest
    tokens: list[int]  # of the base's reply to each task
    replies: str  # a hash of these replies: adapters can be compared on the same ones alone


@dataclass
class Reply:
    """A generated reply."""

    text: str
    tokens: int
    ended: bool  # by itself: it was not cut at Record.max_new_tokens
    passes: dict[str, bool] = field(default_factory=dict)  # by the name of each rule


@dataclass
class Prompt:
    """What a model replies to."""

    source: str  # "held_out", "prompts" or "tasks"
    where: str  # file:line
    kind: str
    messages: list[dict[str, str]]
    reference: str | None = None  # the reply of the file
    rejected: str | None = None  # the bad reply of a pair
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)  # a reply's rules, by name


@dataclass(kw_only=True)
class Exchange(Prompt):
    """A prompt, and what base and adapter reply to it."""

    base: Reply
    adapter: Reply


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
    request: str = ""  # a hash of the adapter, of the flags and of the files that they name
    conditions: dict[str, Any] = field(default_factory=dict)  # base, commit, dtype, files ...
    system: str = ""  # the system message that prompts get, and the tasks of one shift
    learned: int | None = None  # lines left out since the adapter learned them; None: not known
    too_long: int = 0  # lines left out since they are longer than max_seq_len
    refused: int = 0  # tasks left out since the chat template refuses them
    # How many lines of each kind the training file has; None: it is not known.
    trained_kinds: dict[str, int] | None = None
    lines: list[Line] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    part_lines: list[int] = field(default_factory=list)  # the lines that measure the parts
    parts: list[Part] = field(default_factory=list)
    updates: dict[str, list[float]] = field(default_factory=dict)  # by target: |scaling B A| / |W|
    tasks: list[str] = field(default_factory=list)  # file:line of those that measure the shifts
    shifts: list[Shift] = field(default_factory=list)
    asked_of: dict[str, int] = field(default_factory=dict)  # prompts of each kind, asked or not
    exchanges: list[Exchange] = field(default_factory=list)
    max_new_tokens: int = 0  # a reply is cut after so many
    probes: list[Probe] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each measurement
    finished: bool = False
    schema: int = SCHEMA
    folder: Path = Path()  # where the file lies; not stored


def save_record(record: Record) -> None:
    """Write evidence.json into the record's folder; raise ValueError at NaN and infinity."""
    content = dataclasses.asdict(record)
    del content["folder"]
    write_whole(record.folder / FILE, json.dumps(content, indent=1, allow_nan=False))


def read_record(folder: Path) -> Record:
    """Return the record in a folder; raise InspectError if there is none, or another schema's."""
    path = folder / FILE
    try:
        content = json.loads(path.read_bytes())
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, and {SCHEMA} is read here")
        kinds = {"lines": Line, "pairs": Pair, "parts": Part, "shifts": Shift, "probes": Probe}
        for name, kind in (kinds | {"exchanges": Exchange}).items():
            content[name] = [kind(**entry) for entry in content[name]]
        for exchange in content["exchanges"]:
            exchange.base, exchange.adapter = Reply(**exchange.base), Reply(**exchange.adapter)
        return Record(**content, folder=folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InspectError(f"{path} cannot be read ({one_line(error)}).") from error
