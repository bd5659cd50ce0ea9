"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 stop a run; one Stop object tracks how far this has got.

- Stop.ask() notes the signal. Before the first step, while the adapter is verified, and at a
  second signal, it raises Stopped at once.
- From the first step to the last save the step is finished and saved first. An evaluation ends
  between two batches, and is repeated on resuming. At the end of a step, and after an evaluation,
  the processes of a launch agree; RunEvents.on_save() raises Stopped.
- While final_lora is moved into its place, every signal waits; run() raises Stopped at its end.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from train_lora.console import report

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # Slurm may send USR1


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop, and it did."""


def is_stop(error: BaseException) -> bool:
    """Return whether a signal ended the run; a library may raise its own error from Stopped."""
    return Stopped in (type(error), type(error.__context__))


@dataclass
class Stop:
    """How far stopping has got; the head of this room describes it."""

    signal: int = 0  # that asked for it; the exit status is 128 more
    finish_first: str = ""  # "the step" with its save, "the move" of final_lora, or nothing
    is_agreed: bool = False  # all processes stop at the next save

    def ask(self, number: int) -> None:
        """Note a signal; raise Stopped if nothing is to be finished first."""
        # A terminal that is closed sends SIGHUP twice, and a launcher may forward a signal that its
        # process already got from Slurm.
        may_repeat = number == signal.SIGHUP or "TORCHELASTIC_RUN_ID" in os.environ
        is_second = self.signal > 0 and not may_repeat
        self.signal = number
        if self.finish_first == "the move":
            return
        if is_second or not self.finish_first:
            raise Stopped("Stopped. The same command resumes from the newest checkpoint, if any.")
        hint = "" if may_repeat else "; a second signal stops at once"
        report("stopping", f"finishing and saving first{hint}")

    def agree(self) -> None:
        """Stop at the next save, as all processes do; this one may have had no signal."""
        self.is_agreed = True
        self.signal = self.signal or signal.SIGTERM


def end_quietly() -> None:
    """Have Ctrl-C end the imports, which take seconds, without a traceback."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def catch_signals(stop: Stop) -> None:
    """Let signals end the run."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, lambda number, _: stop.ask(number))


def ignore_signals() -> None:
    """Let no signal interrupt what is left to do."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
