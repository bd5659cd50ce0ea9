"""What is printed, and a user's mistake, which is told in one message."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from tqdm import tqdm


class UserError(Exception):
    """A user's mistake: the message says what is wrong, where, and what to do."""


def is_main_process() -> bool:
    """Return whether this is the process that prints, decides and writes."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


LOG = logging.getLogger("train_lora_single")


def report(subject: str, text: str) -> None:
    """Print and log text beside a word for its subject; a closed terminal must not end a run."""
    if not is_main_process():
        return
    text = f"{subject:<10}{text}".replace("\n", "\n" + " " * 10)
    LOG.info(text)
    try:
        tqdm.write(text)  # a progress bar may be shown below
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except RuntimeError:
        pass  # a signal interrupted another print; the log has the line


def one_line(value: Any, width: int = 200) -> str:
    """Return a value as one line of text, shortened to width characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def join_limited(items: list[str], limit: int, separator: str) -> str:
    """Join the first items, and say how many more there are."""
    rest = [f"... and {len(items) - limit:,} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *rest])
