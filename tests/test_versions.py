"""The versions: ranges stand in pyproject.toml alone, and `.ci/lock.py` writes every pin."""

import importlib.metadata
import os
import re
import tomllib

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LEFT_TO_TORCH = re.compile(r"cuda-|nvidia-|triton$")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RANGES = [
    *PROJECT["project"]["dependencies"],
    *PROJECT["project"]["optional-dependencies"]["measure"],
    *PROJECT["dependency-groups"]["test"],
]


def pins_of(lines):
    """Return {package: [its pins, for several Pythons]} of the lines that are requirements."""
    pins = {}
    for line in lines:
        if line and not line.startswith(("#", "-r")):
            pin = Requirement(line)
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    return pins


def header():
    """Return the requirements in the script's own block (PEP 723)."""
    source = (ROOT / "train_lora_single.py").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", source)
    return tomllib.loads(re.sub("(?m)^# ?", "", block))["dependencies"]


OF_PROJECT = pins_of((ROOT / "requirements.txt").read_text().splitlines())
PINS = OF_PROJECT | pins_of((ROOT / "tests" / "requirements.txt").read_text().splitlines())


@pytest.mark.parametrize("name", PINS)
def test_a_pin_is_one_version(name):
    for pin in PINS[name]:
        (version,) = pin.specifier
        assert version.operator == "==" and "*" not in version.version


@pytest.mark.parametrize("wanted", RANGES)
def test_each_version_is_in_its_range(wanted):
    """If not, someone has edited a file by hand: run `.ci/lock.py`."""
    wanted = Requirement(wanted)
    for pin in PINS[canonicalize_name(wanted.name)]:
        (version,) = pin.specifier
        assert wanted.specifier.contains(version.version)


@pytest.mark.parametrize("own", header())
def test_uv_gets_the_scripts_packages_in_the_same_versions_as_pip(own):
    own = Requirement(own)
    assert [own] == OF_PROJECT[canonicalize_name(own.name)]


def test_the_scripts_block_has_each_package_of_the_project_that_it_or_a_room_imports():
    paths = [ROOT / "train_lora_single.py", *(ROOT / "train_lora").glob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    imported = set(re.findall(r"(?m)^(?:import|from) (\w+)", text))
    installed = {canonicalize_name(name) for name in imported} & OF_PROJECT.keys()
    assert installed == {canonicalize_name(Requirement(line).name) for line in header()}


@pytest.mark.skipif("LOCKED" not in os.environ, reason="only where requirements.txt was installed")
def test_what_is_installed_is_pinned_and_nothing_else_is():
    installed = {
        canonicalize_name(one.metadata["Name"]): one.version
        for one in importlib.metadata.distributions()
    }
    for name in ("pip", "inspect-lora"):
        installed.pop(name, None)
    ours = {name for name in installed if not LEFT_TO_TORCH.match(name)}
    here = {
        name: pin.specifier
        for name, pins in PINS.items()
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }
    assert ours == here.keys()
    assert not [name for name in ours if not here[name].contains(installed[name])]
