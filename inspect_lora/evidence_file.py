"""evidence.json, as it is written and as it is read again.

Reading needs no large library, so that `compare` answers at once.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from inspect_lora.common import file_of, file_sha256, place_in_file, read_json
from inspect_lora.files import path_of_adapter

if TYPE_CHECKING:
    from inspect_lora.findings import Findings


# ---- What is written


def as_json_object(found: Findings) -> dict[str, Any]:
    """Return what `compare` and other programs read."""
    adapter = found.adapter
    record: dict[str, Any] = {
        "schema": 2,
        "finished": found.is_finished,
        "measured": time.strftime("%Y-%m-%d %H:%M:%S"),
        "adapter": found.name,
        "adapter_path": path_of_adapter(found.name, adapter.place),
        "adapter_sha256": file_sha256(adapter.place / "adapter_model.safetensors"),
        "adapter_config": read_json(adapter.place / "adapter_config.json"),
        "base": adapter.base,
        "base_revision": adapter.revision,
        "dtype": adapter.dtype,
        "matmul": adapter.matmul,
        "device": adapter.model.device.type,
        "enable_thinking": adapter.chat_format.enable_thinking,
        "system_message": found.system_message,
        "held_out": None,
        "prompts": found.prompts_file,
        "general_file": found.general_file,
        "run": None,
        "loss": None,
        "gain": None,
        "lower_on": None,
        "losses": [],
        "parts": {part.title: part.as_recorded() for part in found.parts},
        "parts_measured_on": [found.examples[number].source for number in found.measured],
        "updates": found.updates,
        "elsewhere": found.elsewhere.as_recorded() if found.elsewhere else None,
        "checks": {row.name: row.as_recorded() for row in found.checks},
        "replies": [one.as_recorded(found.group) for one in found.answered()],
        "base_side": {
            "computed_with": found.base_computed_with,
            "examples": found.tokens_hash,
            "prompts": [one.prompt_hash for one in found.answered()],
        },
        "conclusions": found.conclusions,
        "seconds": found.seconds,
    }
    if found.held_out:
        record["held_out"] = found.held_out.as_known().model_dump() | {
            "group": found.group,
            "learned": found.held_out.learned,
        }
    if found.losses:
        means = map(found.mean, (found.losses.base, found.losses.trained))
        record |= {
            "loss": dict(zip(("base", "adapter"), means, strict=True)),
            "gain": asdict(found.losses.gain()),
            "lower_on": found.lower_on(),
            "losses": rows_of_losses(found),
        }
    if adapter.run:
        known = {key: adapter.run.record.get(key) for key in ("settings", "train_seconds")}
        record["run"] = {"path": str(adapter.run.path)} | known
    return record


def rows_of_losses(found: Findings) -> list[dict[str, Any]]:
    """Return a row for each example, in nats a token."""
    losses = found.losses
    numbers = zip(
        found.examples,
        losses.lines,
        found.groups(),
        losses.tokens,
        losses.base,
        losses.trained,
        strict=True,
    )
    return [
        {
            "where": example.source,
            "line": line,
            "group": group,
            "tokens": tokens,
            "base": base / tokens,
            "adapter": trained / tokens,
        }
        for example, line, group, tokens, base, trained in numbers
    ]


# ---- What is read


Number = Annotated[float, pydantic.Field(gt=-1e30, lt=1e30)]  # so that its sums are finite


class Row(pydantic.BaseModel):
    """The losses of a held-out reply, in nats a token."""

    where: str
    line: str = ""  # that it counts with, if it is known: a copy counts with the first such line
    tokens: Annotated[int, pydantic.Field(ge=1)]
    base: Number
    adapter: Number


class Said(pydantic.BaseModel):
    """A reply that was made; of schema 1 only the text and the checks are known."""

    text: str = ""
    ended: bool | None = None
    tokens: int | None = None
    checks: dict[str, bool] = {}


class Exchange(pydantic.BaseModel):
    """A prompt, and what base and adapter replied to it."""

    where: str
    id: str = ""
    group: str = ""
    source: Literal["held_out", "tasks", "prompts"]
    messages: list[dict[str, str]] = []
    reference: str | None = None
    max_new_tokens: int | None = None
    base: Said
    adapter: Said
    rules: dict[str, Any] = {}
    says: dict[str, str] = {}

    @pydantic.model_validator(mode="after")
    def is_whole(self) -> Exchange:
        """Refuse an edited row that a page could not show; of schema 1 no prompt is known."""
        counted = (self.max_new_tokens, self.base.tokens, self.adapter.tokens)
        if self.messages and (None in counted or self.says.keys() - self.rules.keys()):
            raise ValueError("it has no number of tokens, or no rule of a check")
        return self


class CheckedReply(pydantic.BaseModel):
    """What schema 1 has of a line with checks: the texts, and what each check said."""

    where: str
    base: str = ""
    adapter: str = ""
    base_passes: dict[str, bool] = {}
    adapter_passes: dict[str, bool] = {}

    def as_exchange(self, held_out_file: str) -> Exchange:
        """Return it as schema 2 would have it, as far as it is known."""
        is_held_out = file_of(self.where) == held_out_file
        return Exchange(
            where=self.where,
            source="held_out" if is_held_out else "tasks",
            base=Said(text=self.base, checks=self.base_passes),
            adapter=Said(text=self.adapter, checks=self.adapter_passes),
        )


class KnownFile(pydantic.BaseModel):
    """A file that was measured on: that of the held-out replies, or that of the other tasks."""

    file: str
    sha256: str
    conversations_sha256: str = ""  # schema 1 has none
    learned: str = (
        ""  # of held-out replies, whether the adapter learned them; older files have none
    )


class OfBase(pydantic.BaseModel):
    """What tells whether the base's losses and replies are those of another measurement."""

    computed_with: dict[str, str] = {}
    examples: str = ""  # a hash of the held-out replies' tokens
    prompts: list[str] = []  # one of each prompt's tokens, as "replies" stand


class Evidence(pydantic.BaseModel):
    """What is read of an evidence.json."""

    schema_: Literal[1, 2] = pydantic.Field(alias="schema")
    finished: bool
    measured: str  # its date and time
    adapter: str
    adapter_sha256: str
    adapter_config: dict[str, Any]
    base: str
    base_revision: str
    dtype: str = ""
    enable_thinking: bool
    held_out: KnownFile | None = None
    prompts: KnownFile | None = None
    general_file: KnownFile | None = None
    losses: list[Row] = []
    run: dict[str, Any] | None = None
    elsewhere: dict[str, Any] | None = None
    checks: dict[str, dict[str, Any]] = {}
    replies: list[Exchange] = []
    base_side: OfBase = OfBase()
    checked_replies: list[CheckedReply] = []  # of schema 1, which had no others
    folder: Path = Path()

    @pydantic.model_validator(mode="after")
    def measured_something(self) -> Evidence:
        """Refuse a record without losses, unless it is of prompts alone; complete schema 1."""
        if bool(self.losses) != (self.held_out is not None):
            raise ValueError("it holds no losses, or not the file that they are of")
        if not self.losses and self.prompts is None:
            raise ValueError("it holds no losses, and names no prompts either")
        if self.schema_ == 1:
            file = file_of(self.losses[0].where)
            self.replies = [one.as_exchange(file) for one in self.checked_replies]
        return self

    def mean(self, whose: Literal["base", "adapter"]) -> float:
        """Return the mean loss of the base or the adapter, in nats a token."""
        losses = [(row.base if whose == "base" else row.adapter, row.tokens) for row in self.losses]
        return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)

    def tasks_sha256(self) -> str:
        """Return the hash of the file of the other tasks, or "" if it is not known."""
        return self.general_file.sha256 if self.general_file else ""

    def tasks_measured_on(self) -> tuple[Any, list[str] | None]:
        """Return how many other tasks the KL is of, and their lines; former versions have none."""
        found = self.elsewhere or {}
        places = found.get("measured_on")
        is_known = isinstance(places, list)
        return found.get("tasks"), [place_in_file(str(one)) for one in places] if is_known else None

    def has_the_replies_of(self, other: KnownFile, lengths: list[tuple[str, int]]) -> bool:
        """Return whether these held-out replies were measured, whatever else is in the file.

        Args:
            other: their file.
            lengths: the place and the number of tokens of each.
        """
        own = self.held_out
        is_same_file = own is not None and own.sha256 == other.sha256
        hashes = (own.conversations_sha256 if own else "", other.conversations_sha256)
        return (is_same_file or (hashes[0] == hashes[1] != "")) and self.lengths() == lengths

    def lengths(self) -> list[tuple[str, int]]:
        """Return each held-out reply's place in its file, and its number of tokens."""
        return [(place_in_file(row.where), row.tokens) for row in self.losses]


def records_below(folder: Path) -> list[Path]:
    """Return the records in a folder and below it, but for what a killed command left half done."""
    found = sorted(folder.rglob("evidence.json"))
    return [path for path in found if not path.parent.name.startswith(".")]


def read_evidence(path: Path) -> Evidence | None:
    """Return what an evidence.json holds, or None if it is damaged or of another version."""
    try:
        return Evidence.model_validate((read_json(path) or {}) | {"folder": path.parent})
    except pydantic.ValidationError:
        return None
