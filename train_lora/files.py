"""JSON files, hashes, and what an earlier run left under a name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from train_lora.console import report

Facts = dict[str, Any]  # values by name, such as those of a JSON file


def read_json(path: Path) -> Facts:
    """Return a JSON file's object; an empty one if there is none, or if it is damaged."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
        return json.loads(path.read_bytes())
    return {}


def write_json(path: Path, value: Facts) -> None:
    """Write a JSON file so that a run that is killed never leaves it half written."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(value, indent=1, default=as_json_value), encoding="utf-8")
    new.replace(path)


def as_json_value(value: Any) -> Any:
    """Return a set as a list, and any other non-JSON value as text."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def short_hash(value: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, or "" if there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def rename_old(path: Path) -> None:
    """Rename what an earlier run left at path, adding the time."""
    if path.exists():
        aside = path.with_name(f"{path.name}.{datetime.now():%Y-%m-%d-%H%M%S.%f}")
        path.rename(aside)
        report("moved", f"{path} of an earlier run is now {aside.name}")


def is_full_disk(error: BaseException) -> bool:
    """Return whether a file could not be written; torch and safetensors have their own errors."""
    words = "No space left on device|Disk quota exceeded|PytorchStreamWriter|unexpected pos"
    return bool(re.search(words, str(error)))
