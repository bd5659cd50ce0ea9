"""The script knows nothing of the package, and one module of the package imports the script."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT
from tiny_adapters import command

import train_lora_single
from inspect_lora import trainer
from inspect_lora.common import InspectError
from inspect_lora.faults import CHANGES_THE_BASE

PACKAGE = ROOT / "inspect_lora"


def imported_by(path):
    """Return the names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def test_the_script_imports_nothing_of_the_package():
    names = imported_by(ROOT / "train_lora_single.py")
    assert "torch" in names and not any(name.startswith("inspect_lora") for name in names)
    tree = ast.parse((ROOT / "train_lora_single.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    by_name = [call.args[0] for call in calls if ast.unparse(call.func).endswith("import_module")]
    # fla, in a process of its own, and transformers' module that would use it.
    assert {ast.unparse(one) for one in by_name} == {"'fla'", "module"}


def test_one_module_of_the_package_imports_the_script():
    for path in PACKAGE.glob("*.py"):
        assert "train_lora_single" not in imported_by(path), path
        names_it = '"train_lora_single"' in path.read_text(encoding="utf-8")
        assert names_it == (path.name in ("trainer.py", "__main__.py")), path


def runs(tree):
    """Yield the nodes that run; what stands under TYPE_CHECKING is for types alone."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from runs(node)


def modules_needed():
    """Return {module: the modules of the package that it imports when it runs, anywhere in it}."""
    names = {path.stem for path in PACKAGE.glob("*.py")}
    needed = {}
    for path in PACKAGE.glob("*.py"):
        found = set()
        for node in runs(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.removeprefix("inspect_lora.") for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module == "inspect_lora":
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.removeprefix("inspect_lora."))
        needed[path.stem] = found & names
    return needed


def test_no_modules_of_the_package_import_each_other_in_a_circle():
    """What is left after all modules that need none, again and again, is a circle."""
    needed = modules_needed()
    assert "common" in needed["report"] and "adapters" in needed["evidence"]  # it does look
    while without := [name for name, others in needed.items() if not others]:
        needed = {name: others - set(without) for name, others in needed.items() if others}
    assert needed == {}, f"these import each other in a circle: {sorted(needed)}"


def test_both_know_the_same_ways_to_begin_that_change_the_base():
    """`info` must not import the script, so it has a list of its own."""
    assert set(CHANGES_THE_BASE) == set(train_lora_single.CHANGES_THE_BASE)


def run_python(*words, cwd):
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_the_script_beside_the_package_is_taken_and_not_another_copy(tmp_path, monkeypatch):
    (tmp_path / "train_lora_single.py").write_text("raise SystemExit('the wrong copy')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "train_lora_single")
    script = trainer.load_script()
    assert script is sys.modules["train_lora_single"]
    assert script.__file__ == str(ROOT / "train_lora_single.py")
    monkeypatch.setattr(trainer, "SCRIPT", tmp_path / "gone.py")
    with pytest.raises(InspectError, match=r"gone\.py is missing"):
        trainer.load_script()


def test_it_is_started_from_any_folder_by_its_path(tmp_path):
    """Its own folder must not lend its names, nor the working folder."""
    (tmp_path / "common.py").write_text("raise SystemExit('not of the package')")
    end = run_python(PACKAGE, "info", "--help", cwd=tmp_path)
    assert end.returncode == 0 and "python -m inspect_lora info" in end.stdout, end.stderr


# ==== The commands


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "COMMAND"),
        (["evidnece"], "invalid choice"),
        (["--evidence"], "COMMAND"),
        (["evidence"], "ADAPTER"),
        (["evidence", "a", "--eval_fil", "b"], "--eval_fil"),
        (["evidence", "a", "--examples", "many"], "a whole number from 0"),
        (["evidence", "a", "--max_new_tokens", "0"], "a whole number from 1"),
        (["evidence", "a", "--device", "tpu"], "tpu"),
        (["chat", "a", "--max-new-tokens", "x"], "a whole number from 1"),  # hyphens will do
    ],
)
def test_a_wrong_command_or_flag_exits_with_2(capsys, words, said):
    end = command(capsys, *words)
    assert end.status == 2 and said in end.said


def test_a_missing_package_is_named_with_what_installs_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "inspect_lora.evidence", None)
    end = command(capsys, "evidence", "adapter")
    assert end.status == 1 and "is missing: pip install -r" in end.err
    assert "requirements.txt" in end.err


def test_output_that_nobody_reads_is_no_traceback():
    end = subprocess.run(
        f"{sys.executable} {PACKAGE} | true", shell=True, capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in end.stderr and "BrokenPipe" not in end.stderr
