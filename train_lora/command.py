"""The command: its log, its lock and its exit statuses.

It ends with status 0, 1 after an error, 2 after a wrong flag or setting, and 128 + the signal's
number after a signal. A user's mistake gets one message; any other error keeps its traceback.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train_lora.checkpoints import History
from train_lora.code import refuse_edited
from train_lora.console import LOG, UserError, is_main_process
from train_lora.settings import Settings
from train_lora.stopping import Stop, Stopped, catch_signals, ignore_signals, is_stop


@dataclass
class Session:
    """One run of the command, and what changes during it."""

    started: str
    matmul: str = "native"  # or "float16", see fp16_matmul
    loss_history: History = field(default_factory=list)  # from the job's first step
    stop: Stop = field(default_factory=Stop)


def main(run: Callable[[Settings, Session], Any], settings: Settings) -> None:
    """Call run(settings, session); exit with 1 after an error, 128 + its number after a signal."""
    session, lock = Session(time.strftime("%Y-%m-%d %H:%M:%S")), None
    # transformers advises fla and causal_conv1d even where they cannot run; see docs/gpu.md.
    logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    # PEFT 0.21 calls a function that transformers 5.24 renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    catch_signals(session.stop)
    try:
        refuse_edited(settings.sources)  # all rooms have been imported
        if not settings.dry_run and is_main_process():
            lock = open_output(Path(settings.OUTPUT_DIR))
        run(settings, session)
        if session.stop.signal:  # it came while final_lora was moved
            raise Stopped("Stopped; final_lora was finished first.")
    except BaseException as error:
        ignore_signals()
        is_known = is_stop(error) or isinstance(error, UserError)
        LOG.info("The run was ended by: %r", error, exc_info=not is_known)
        if not is_known:
            raise
        with contextlib.suppress(OSError):  # a closed terminal must not change the exit status
            print(error, file=sys.stderr)
        raise SystemExit(128 + session.stop.signal if is_stop(error) else 1) from None
    finally:
        logging.shutdown()
        if lock:
            lock.close()


def open_output(output: Path) -> Any:
    """Make the folder, and lock and open its log; raise UserError if another run writes there."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {output} cannot be written ({error.strerror}).") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when a run ends
    except BlockingIOError as error:
        raise UserError(f"OUTPUT_DIR {output} is in use by another run.") from error
    except OSError:  # some network file systems have no locks
        pass
    log = logging.FileHandler(output / "all_logs.log", encoding="utf-8", errors="replace")
    warnings_too = logging.StreamHandler()
    warnings_too.setLevel(logging.WARNING)
    logging.basicConfig(handlers=[log, warnings_too], format="%(message)s", force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # on a full disk each line would print a traceback
    LOG.setLevel(logging.INFO)
    LOG.info("\n---- %s %s", time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join(sys.argv))
    return lock
