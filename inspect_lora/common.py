"""What every module of the package uses: messages, JSON files, hashes, paths.

It imports nothing heavy, since `info` must answer in seconds and without the trainer's script. Some
of it is written in the script as well, which stays one file that is complete alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


class InspectError(Exception):
    """A user's mistake: its text is one message that says what is wrong, where, and what to do."""


def report(section: str, text: str) -> None:
    """Print text beside the name of its section, in the look of the trainer's own lines."""
    lines = f"{section:<10}{text}".replace("\n", "\n" + " " * 10).split("\n")
    print("\n".join(line.rstrip() for line in lines), flush=True)


def report_sentence(section: str, sentence: str) -> None:
    """Print a sentence of any length, broken at spaces into lines of at most 100 columns."""
    report(section, textwrap.fill(sentence, 90, break_long_words=False, break_on_hyphens=False))


Note = tuple[str, str]  # a section, such as "left out", and a sentence


def report_note(notes: list[Note], section: str, sentence: str) -> None:
    """Print a sentence on the data that are measured, and keep it for report.md."""
    report_sentence(section, sentence)
    notes.append((section, sentence))


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads a flag's whole number, which must be at least so much."""

    def read(text: str) -> int:
        """Return the number, or say what the flag must be."""
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"it must be a whole number from {least}, not {text}")
        return int(text)

    return read


def one_line(value: Any, width: int = 200) -> str:
    """Return value as one line, shortened to width."""
    text = " ".join(str(value).split())
    return text if len(text) <= width else f"{text[: max(0, width - 4)]} ..."


def join_limited(items: list[str], limit: int = 20, separator: str = "\n") -> str:
    """Join the first items, and say how many more there are."""
    if len(items) <= limit:
        return separator.join(items)
    return separator.join([*items[:limit], f"... and {len(items) - limit:,} more"])


def pluralize(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 line", "1,000 lines" or "2 replies"."""
    plural = f"{noun[:-1]}ies" if noun.endswith("reply") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON file's object, or None if there is none or it is damaged."""
    with suppress(OSError, ValueError, RecursionError):
        value = json.loads(path.read_text(encoding="utf-8"))  # other programs take no BOM
        return value if isinstance(value, dict) else None
    return None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file in such a way that there is never half of it; NaN becomes null."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(as_json(value), encoding="utf-8")
    new.replace(path)


def as_json(value: Any) -> str:
    """Return value as JSON, with null for NaN and infinity, which JSON does not have."""
    return json.dumps(without_nan(value), indent=1, allow_nan=False, default=str)


def without_nan(value: Any) -> Any:
    """Return value with None in place of NaN and infinity, at any depth."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def place_in_file(where: str) -> str:
    """Return the line or the entry of "FILE:12" or "FILE, entry 12"."""
    return where.rpartition(", entry ")[2].rpartition(":")[2]


def file_of(where: str) -> str:
    """Return the file of "FILE:12" or "FILE, entry 12"."""
    return re.sub(r"(:|, entry )\d+$", "", where)


def hash_of(value: Any) -> str:
    """Return what tells a value of numbers and texts from others."""
    return hashlib.sha256(repr(value).encode(errors="surrogatepass")).hexdigest()[:32]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rename_old(path: Path) -> None:
    """Add the time of its last change to the name of what stands at path, if anything does."""
    if not os.path.lexists(path):  # a link that leads nowhere is there, too
        return
    when = time.strftime("%Y-%m-%d-%H%M%S", time.localtime(path.lstat().st_mtime))
    aside = path.with_name(f"{path.name}.{when}")
    while os.path.lexists(aside):
        aside = aside.with_name(f"{aside.name}+")
    path.rename(aside)


def path_from_here(path: str | Path) -> str:
    """Return a path as seen from the working folder if it is below it, otherwise as it is."""
    with suppress(ValueError):
        return str(Path(path).resolve().relative_to(Path.cwd()))
    return str(path)


def shorten_path(path: str | Path, width: int) -> str:
    """Return a path as seen from here; of a long one only the end."""
    shown = path_from_here(path)
    return shown if len(shown) <= width else "..." + shown[3 - width :]


def this_program() -> str:
    """Return how this program is called from the working folder, to print what to type next."""
    package = Path(__file__).resolve().parent
    is_here = package.parent == Path.cwd()
    return "python -m inspect_lora" if is_here else f"python {shlex.quote(str(package))}"
