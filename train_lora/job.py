"""All that a run knows, for the trainer, its callbacks and the records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import peft
import trl

from train_lora.base import Base
from train_lora.command import Session
from train_lora.data import Data
from train_lora.files import Facts
from train_lora.jobs import EarlierWork
from train_lora.plan import Plan
from train_lora.settings import Settings


@dataclass(frozen=True)
class Job:
    """What is decided before the first step; only the session changes during a run."""

    settings: Settings
    base: Base
    data: Data
    lora_config: peft.LoraConfig
    plan: Plan
    identity: Facts  # what a checkpoint must agree with
    training: trl.SFTConfig
    earlier: EarlierWork
    session: Session

    @property
    def output(self) -> Path:
        """The folder for the results."""
        return Path(self.settings.OUTPUT_DIR)

    def measures_at(self, step: int) -> bool:
        """Return whether the held-out loss is measured at a step."""
        every = self.settings.EVAL_STEPS or self.plan.steps_per_epoch
        return bool(self.data.held_out) and (step % every == 0 or step == self.plan.steps)

    @property
    def folder(self) -> Path:
        """The folder for the checkpoints."""
        return self.earlier.folder
