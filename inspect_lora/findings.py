"""What was found of an adapter so far, as it is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from inspect_lora.checks import CheckRow
from inspect_lora.common import pluralize
from inspect_lora.conversations import group_of
from inspect_lora.scores import FEWEST_LINES, Losses, is_conclusive, look_equal

if TYPE_CHECKING:
    from inspect_lora.adapters import Adapter
    from inspect_lora.common import Note
    from inspect_lora.conversations import HeldOut
    from inspect_lora.elsewhere import Elsewhere
    from inspect_lora.parts import Part
    from inspect_lora.replies import Answered
    from inspect_lora.trainer import Example


@dataclass
class Findings:
    """What was measured of an adapter; what is not measured yet, or cannot be, is empty."""

    name: str  # the adapter, as it was named on the command line
    adapter: Adapter
    held_out: HeldOut | None  # or prompts alone, of which no reply is known
    group: str  # the key that groups held-out lines
    system_message: str  # of the training, or ""
    system_is_guessed: bool  # then it is what all lines share, if they share one
    examples: list[Example]
    template: str = ""  # whose chat template renders the conversations
    notes: list[Note] = field(default_factory=list)  # on the data: what was left out, and others
    base_note: str = ""  # how it comes that another base is measured than the adapter names
    systems: set[str] = field(default_factory=set)  # of the lines as they are in their file
    general_file: dict[str, str] | None = None  # the file of the other tasks, and its hash
    prompts_file: dict[str, str] | None = None
    losses: Losses | None = None  # of all examples
    measured: list[int] = field(default_factory=list)  # the examples that the parts are measured on
    parts: list[Part] = field(default_factory=list)
    updates: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    elsewhere: Elsewhere | None = None
    checks: list[CheckRow] = field(default_factory=list)
    checked: list[Answered] = field(default_factory=list)  # held-out lines and tasks with checks
    judged: list[Answered] = field(default_factory=list)  # these and prompts: what the rows count
    prompted: list[Answered] = field(default_factory=list)  # all prompts without a known reply
    samples: list[Answered] = field(default_factory=list)  # what report.md shows
    base_computed_with: dict[str, str] = field(default_factory=dict)
    tokens_hash: str = ""  # of all examples
    losses_of_base: str = "measured now"  # or the earlier record that they were taken from
    conclusions: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # what each measurement took
    is_finished: bool = False
    is_written: bool = False  # the whole report has taken its place

    def mean(self, losses: list[float]) -> float:
        """Return the mean of all examples' losses over their tokens."""
        return sum(losses) / sum(self.losses.tokens)

    def shares_are_meant(self) -> bool:
        """Return whether there is a clear gain, also on the replies that measure the parts."""
        if not self.losses:
            return False
        gain = self.losses.gain()
        is_better = gain.is_clear() and gain.value > 0
        return is_better and is_conclusive(self.losses.only(self.measured))

    @property
    def are_unseen(self) -> bool:
        """Whether there are held-out replies that the adapter is known not to have learned."""
        return self.held_out is not None and self.held_out.are_unseen

    def groups(self) -> list[str]:
        """Return the kind of each example's line."""
        return [group_of(example, self.group) for example in self.examples]

    def answered(self) -> list[Answered]:
        """Return every prompt that both replied to, with the replies."""
        return [*self.prompted, *self.checked, *([] if self.prompted else self.samples)]

    def lower_on(self) -> int:
        """Return on how many examples the adapter's loss is lower than the base's."""
        return sum(a < b for a, b in zip(self.losses.trained, self.losses.base, strict=True))


def headline(found: Findings) -> str:
    """Return whether the adapter is better than its base, in a few words."""
    if not found.losses:
        prompts = pluralize(len(found.prompted), "prompt")
        return f"its replies to {prompts}, beside its base's"
    gain = found.losses.gain()
    if len(set(found.losses.lines)) < FEWEST_LINES:
        return "too few held-out lines to tell whether it is better than its base"
    if look_equal(found.mean(found.losses.base), found.mean(found.losses.trained)):
        return "no difference from its base that shows at four digits"
    if not gain.is_clear():
        return "neither better nor worse, by a clear difference, than its base"
    word = "better" if gain.value > 0 else "worse"
    size = f"{abs(gain.value):.3f}" if abs(gain.value) >= 0.001 else "less than 0.001"
    return f"{size} nats a token {word} than its base"
