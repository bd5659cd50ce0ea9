"""All that a run knows, for the trainer, its callbacks and the records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from train_lora.base import Base
from train_lora.command import Session
from train_lora.data import Data
from train_lora.jobs import EarlierWork
from train_lora.plan import Plan
from train_lora.settings import Settings


@dataclass(frozen=True)
class Job:
    """All of these together, for the trainer, its callbacks and the records."""

    settings: Settings
    base: Base
    data: Data
    plan: Plan
    earlier: EarlierWork
    session: Session

    @property
    def output(self) -> Path:
        """The folder for the results."""
        return Path(self.settings.OUTPUT_DIR)
