"""Which code decides a job's bytes, as a hash: other code does not continue a job unasked.

What can be compared as a value is part of a job's identity by itself: tokens, chat template, fields
of LoraConfig and SFTConfig, the files of the base. The hash covers what cannot: the functions of
the script, and the rooms of DECIDING. What these print does not count, nor how their lines are laid
out.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train_lora.console import UserError
from train_lora.files import short_hash

FOLDER = Path(__file__).parent
DECIDING = ("device", "delta_rule", "micro_batches", "losses", "fp16_matmul", "trainer", "memory")
PRINTING = {"report", "LOG", "UserError", "say", "tell", "InspectError"}  # what they get is text
Sources = dict[Path, bytes]


def read_sources(script: Path) -> Sources:
    """Return the source of a script and of all rooms."""
    return {path: path.read_bytes() for path in [script, *sorted(FOLDER.glob("*.py"))]}


def refuse_edited(sources: Sources) -> None:
    """Raise UserError if a file is not as it was read, as either may have been imported."""
    for path, source in sources.items():
        if path.read_bytes() != source:
            raise UserError(f"{path} was edited while the run began. Start it again.")


def code_of_job(sources: Sources, constants: Iterable[str]) -> str:
    """Return a hash of a script's functions, without its constants, and of the rooms that decide.

    The values of the constants are part of the identity by themselves.
    """
    deciding = [
        source for path, source in sources.items() if path.parent != FOLDER or path.stem in DECIDING
    ]
    return hash_of_code(deciding, constants)


def hash_of_code(sources: Iterable[bytes], constants: Iterable[str] = ()) -> str:
    """Return a hash of what sources execute, but for what they assign to constants."""
    return short_hash([what_is_executed(source, frozenset(constants)) for source in sources])


@functools.cache  # evidence asks twice, and parsing takes half a second
def what_is_executed(source: bytes, constants: frozenset[str]) -> Any:
    """Return a syntax tree as JSON values: no comments, no docstrings, no texts that are printed.

    ast.dump() writes the same tree differently in different versions of Python.
    """
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if name_of_assignment(node) not in constants]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            del node.body[: ast.get_docstring(node) is not None]
        if isinstance(node, ast.Call) and name_of_call(node) in PRINTING:
            node.args, node.keywords = [], []
    return as_lists(tree)


def as_lists(node: Any) -> Any:
    """Return a syntax tree, or a part of one, as nested lists, without the empty ones."""
    if isinstance(node, list):
        return [as_lists(each) for each in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: as_lists(value) for name, value in ast.iter_fields(node) if value != []}
    return [type(node).__name__, fields]


def name_of_assignment(node: ast.stmt) -> str:
    """Return the name to which a statement such as `SEED: int = 42` assigns, or ""."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return getattr(targets[0], "id", "")


def name_of_call(call: ast.Call) -> str:
    """Return the name of a called function, or of the object whose method is called, or ""."""
    function = call.func.value if isinstance(call.func, ast.Attribute) else call.func
    return getattr(function, "id", "")
