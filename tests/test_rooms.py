"""The rooms: their order, and what an import of them does."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FOLDER = ROOT / "train_lora"
ROOMS = re.findall(r"(?m)^    (\w+)  ", (FOLDER / "__init__.py").read_text(encoding="utf-8"))
OTHERS = {"train_lora_single", "inspect_lora"}


def imported_by(path):
    """Return the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


def rooms_of(modules):
    return {name.split(".")[1] for name in modules if name.startswith("train_lora.")}


def test_each_room_is_in_the_list_once():
    assert sorted(ROOMS) == sorted(path.stem for path in FOLDER.glob("*.py") if path.stem[0] != "_")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_that_stand_before_it(room):
    modules = imported_by(FOLDER / f"{room}.py")
    before = ROOMS[: ROOMS.index(room)]
    assert rooms_of(modules) <= {*before}
    assert not {name.partition(".")[0] for name in modules} & OTHERS


@pytest.mark.parametrize("room", ROOMS[: ROOMS.index("plan") + 1])
def test_up_to_the_plan_nobody_knows_a_job(room):
    tree = ast.parse((FOLDER / f"{room}.py").read_text(encoding="utf-8"))
    assert "Job" not in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_the_tool_imports_rooms_and_never_the_script():
    modules = set().union(*map(imported_by, (ROOT / "inspect_lora").glob("*.py")))
    assert "train_lora_single" not in modules and rooms_of(modules)


def test_an_import_of_all_rooms_changes_no_environment_variable():
    code = ["import os, peft, trl", "before = dict(os.environ)"]  # these two change some
    code += [*(f"import train_lora.{room}" for room in ROOMS), "assert before == os.environ"]
    given = os.environ | {"CUDA_VISIBLE_DEVICES": "1,2"}
    subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=ROOT, env=given, check=True)
