"""What every module uses: the user's error, printed lines and tables, JSON files, hashes.

Nothing heavy is imported here: `info` answers in under a second, and in an environment without
torch.
"""

import argparse
import hashlib
import json
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO


class InspectError(Exception):
    """What a user can put right; its text says what is wrong, where, and what to do."""


def program() -> str:
    """Return how this was started, for the commands that are printed."""
    is_installed = Path(sys.argv[0]).name == "inspect-lora"
    return "inspect-lora" if is_installed else "python -m inspect_lora"


def say(section: str, lines: str | list[str], file: TextIO | None = None) -> None:
    """Print lines beside the name of their section: what was asked for, to stdout."""
    text = lines if isinstance(lines, str) else "\n".join(lines)
    print(f"{section:<10}{text}".replace("\n", "\n" + " " * 10), file=file, flush=True)


def tell(section: str, lines: str | list[str]) -> None:
    """Print progress, a warning or where files are, to stderr."""
    say(section, lines, sys.stderr)


def wrapped(sentence: str, width: int = 90) -> list[str]:
    """Return a sentence as lines, broken at spaces only, for say()."""
    return textwrap.wrap(sentence, width, break_long_words=False, break_on_hyphens=False)


def aligned(head: list[str], rows: list[list[Any]]) -> list[str]:
    """Return a table as lines: the first column starts at the left, the others end at the right."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *numbers in cells:
        padded = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return lines


def one_line(value: Any, width: int = 200) -> str:
    """Return value as one line, cut to width."""
    text = " ".join(str(value).split())
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def short(name: str, width: int = 20) -> str:
    """Return a name that keeps a table narrow."""
    return name if len(name) <= width else f"{name[: width - 3]}..."


def some(items: list[str], limit: int = 3) -> str:
    """Return the first items, and how many more there are."""
    rest = [f"and {len(items) - limit:,} more"] if len(items) > limit else []
    return ", ".join([*items[:limit], *rest])


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of a flag (of argparse) that takes whole numbers from least on."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} on")
        return int(text)

    return read


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; an empty one if there is none or it is damaged."""
    with suppress(OSError, ValueError):
        value = json.loads(path.read_bytes())
        return value if isinstance(value, dict) else {}
    return {}


def write_whole(path: Path, text: str) -> None:
    """Write a file in such a way that there is never half of it."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8", errors="backslashreplace")
    new.replace(path)


def hash_of(value: Any) -> str:
    """Return a short hash of numbers and texts."""
    return hashlib.sha256(repr(value).encode(errors="surrogatepass")).hexdigest()[:16]


def from_here(path: str | Path) -> str:
    """Return a path as seen from the working folder if it is below it, otherwise as it is."""
    with suppress(ValueError):
        return str(Path(path).resolve().relative_to(Path.cwd()))
    return str(path)
