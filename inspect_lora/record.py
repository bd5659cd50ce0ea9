"""What was found of an adapter, and the evidence.json that holds it: written here, and read again.

Reading needs no large library, so that `compare` answers at once.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from inspect_lora.checks import CheckRow
from inspect_lora.common import file_sha256, read_json
from inspect_lora.scores import FEWEST_LINES, Losses, is_conclusive

if TYPE_CHECKING:
    from inspect_lora.adapters import Adapter
    from inspect_lora.conversations import HeldOut
    from inspect_lora.elsewhere import Elsewhere
    from inspect_lora.parts import Part
    from inspect_lora.replies import Sample
    from inspect_lora.trainer import Example


@dataclass
class Findings:
    """What was measured of an adapter; what is not measured yet, or cannot be, is empty."""

    name: str  # the adapter, as it was named on the command line
    adapter: Adapter
    held_out: HeldOut
    group: str  # the key that groups held-out lines
    system_message: str  # of the training, or ""
    system_is_guessed: bool  # then it is what all held-out lines share
    examples: list[Example]
    general_file: dict[str, str] | None = None  # the file of the other tasks, and its hash
    losses: Losses | None = None  # of all examples
    measured: list[int] = field(default_factory=list)  # the examples that the parts are measured on
    parts: list[Part] = field(default_factory=list)
    updates: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    elsewhere: Elsewhere | None = None
    checks: list[CheckRow] = field(default_factory=list)
    checked_replies: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    conclusions: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # what each measurement took
    is_finished: bool = False

    def mean(self, losses: list[float]) -> float:
        """Return the mean of all examples' losses over their tokens."""
        return sum(losses) / sum(self.losses.tokens)

    def shares_are_meant(self) -> bool:
        """Return whether the gain that parts have shares of is clear."""
        return is_conclusive(self.losses.only(self.measured))

    def lower_on(self) -> int:
        """Return on how many examples the adapter's loss is lower than the base's."""
        return sum(a < b for a, b in zip(self.losses.trained, self.losses.base, strict=True))


def headline(found: Findings) -> str:
    """Return whether the adapter is better than its base, in a few words."""
    gain = found.losses.gain()
    if len(set(found.losses.lines)) < FEWEST_LINES:
        return "too few held-out lines to tell whether it is better than its base"
    if not gain.is_clear():
        return "neither better nor worse, by a clear difference, than its base"
    word = "better" if gain.value > 0 else "worse"
    return f"{abs(gain.value):.3f} nats a token {word} than its base"


# ---- What is written


def as_json_object(found: Findings) -> dict[str, Any]:
    """Return what `compare` and other programs read."""
    adapter = found.adapter
    record: dict[str, Any] = {
        "schema": 1,
        "finished": found.is_finished,
        "measured": time.strftime("%Y-%m-%d %H:%M:%S"),
        "adapter": found.name,
        "adapter_sha256": file_sha256(adapter.place / "adapter_model.safetensors"),
        "adapter_config": read_json(adapter.place / "adapter_config.json"),
        "base": adapter.base,
        "base_revision": adapter.revision,
        "dtype": adapter.dtype,
        "device": adapter.model.device.type,
        "enable_thinking": adapter.chat_format.enable_thinking,
        "system_message": found.system_message,
        "held_out": {
            "file": found.held_out.path,
            "sha256": found.held_out.sha256,
            "group": found.group,
        },
        "general_file": found.general_file,
        "run": None,
        "loss": {
            "base": found.mean(found.losses.base),
            "adapter": found.mean(found.losses.trained),
        },
        "gain": asdict(found.losses.gain()),
        "lower_on": found.lower_on(),
        "losses": rows_of_losses(found),
        "parts": {part.title: part.as_recorded() for part in found.parts},
        "parts_measured_on": [found.examples[number].where for number in found.measured],
        "updates": found.updates,
        "elsewhere": found.elsewhere.as_recorded() if found.elsewhere else None,
        "checks": {row.name: asdict(row) | {"says": row.judgement()} for row in found.checks},
        "checked_replies": found.checked_replies,
        "conclusions": found.conclusions,
        "seconds": found.seconds,
    }
    if adapter.run:
        known = {key: adapter.run.record.get(key) for key in ("settings", "train_seconds")}
        record["run"] = {"path": str(adapter.run.path)} | known
    return record


def rows_of_losses(found: Findings) -> list[dict[str, Any]]:
    """Return a row for each example, in nats a token."""
    numbers = zip(
        found.examples, found.losses.tokens, found.losses.base, found.losses.trained, strict=True
    )
    return [
        {
            "where": example.where,
            "group": group_of(example, found.group),
            "tokens": tokens,
            "base": base / tokens,
            "adapter": trained / tokens,
        }
        for example, tokens, base, trained in numbers
    ]


def group_of(example: Example, group: str) -> str:
    """Return what the example's line has under the key that groups lines, or ""."""
    value = example.row.get(group)
    return "" if value is None else str(value)


# ---- What is read


Number = Annotated[float, pydantic.Field(gt=-1e30, lt=1e30)]  # so that its sums are finite


class Row(pydantic.BaseModel):
    """The losses of a held-out reply, in nats a token."""

    where: str
    tokens: Annotated[int, pydantic.Field(ge=1)]
    base: Number
    adapter: Number


class KnownFile(pydantic.BaseModel):
    """A file that was measured on: that of the held-out replies, or that of the other tasks."""

    file: str
    sha256: str


class Evidence(pydantic.BaseModel):
    """What is read of an evidence.json."""

    schema_: Literal[1] = pydantic.Field(alias="schema")
    finished: bool
    measured: str  # its date and time
    adapter: str
    adapter_sha256: str
    adapter_config: dict[str, Any]
    base: str
    base_revision: str
    enable_thinking: bool
    held_out: KnownFile
    general_file: KnownFile | None = None
    losses: Annotated[list[Row], pydantic.Field(min_length=1)]
    run: dict[str, Any] | None = None
    elsewhere: dict[str, Any] | None = None
    checks: dict[str, dict[str, Any]] = {}
    checked_replies: list[dict[str, Any]] = []
    folder: Path = Path()

    def mean(self, whose: Literal["base", "adapter"]) -> float:
        """Return the mean loss of the base or the adapter, in nats a token."""
        losses = [(row.base if whose == "base" else row.adapter, row.tokens) for row in self.losses]
        return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)

    def tasks_sha256(self) -> str:
        """Return the hash of the file of the other tasks, or "" if it is not known."""
        return self.general_file.sha256 if self.general_file else ""

    def replies(self) -> tuple[str, list[tuple[str, int]]]:
        """Return what tells the held-out replies apart: the file's hash, lines and lengths."""
        rows = [(row.where.rpartition(":")[2], row.tokens) for row in self.losses]
        return self.held_out.sha256, rows


def read_evidence(path: Path) -> Evidence | None:
    """Return what an evidence.json holds, or None if it is damaged or of another version."""
    try:
        return Evidence.model_validate((read_json(path) or {}) | {"folder": path.parent})
    except pydantic.ValidationError:
        return None
