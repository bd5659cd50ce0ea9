"""The installed package: a wheel, in a folder with numpy and safetensors alone."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest
import safetensors
from conftest import ROOT
from made_records import made, put
from toys import change_config

BUILD = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
# Neither the folder of the project nor the environment's packages can be imported there.
START = "import sys; sys.path.insert(0, {site!r}); sys.argv[0] = 'inspect-lora'; {lines}"
HEAVY = ("evidence", "chat", "export")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the folder of packages, and the line that the command `inspect-lora` runs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("inspect_lora", "train_lora"):
        shutil.copytree(ROOT / name, source / name)
    shutil.copy(ROOT / "pyproject.toml", source)
    words = [*BUILD, "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(words, check=True, cwd=folder)
    (wheel,) = folder.glob("inspect_lora-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    for package in (numpy, safetensors):
        home = Path(package.__file__).parent
        (folder / "site" / home.name).symlink_to(home)
    for libraries in Path(numpy.__file__).parent.parent.glob("numpy.libs"):
        (folder / "site" / "numpy.libs").symlink_to(libraries)
    return folder / "site"


@pytest.fixture
def installed(site, tmp_path):
    """Return installed(word, ...): the end of the command, given in another folder."""
    (points,) = site.glob("*.dist-info/entry_points.txt")
    module, function = points.read_text().partition("inspect-lora = ")[2].split()[0].split(":")
    start = START.format(site=str(site), lines=f"from {module} import {function}; {function}()")

    def run(*words):
        python = [sys.executable, "-I", "-S", "-c", start, *map(str, words)]
        return subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run


def test_no_package_but_these_can_be_imported(site):
    start = START.format(site=str(site), lines="import numpy, safetensors, torch")
    python = [sys.executable, "-I", "-S", "-c", start]
    end = subprocess.run(python, capture_output=True, text=True, check=False)
    assert end.returncode == 1 and "No module named 'torch'" in end.stderr


def test_files_alone_are_told_without_a_model(installed, adapters, tmp_path):
    put(made(tmp_path / "report"))
    put(made(tmp_path / "other", gain=0.9))
    info = installed("info", adapters["wrapper"], "--json")
    assert info.returncode == 0 and json.loads(info.stdout)["modules"]
    report = installed("report", "report")
    assert report.returncode == 0 and "matplotlib" in report.stderr
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert written == {"evidence.json", "report.md", "replies.html"}
    assert "picture.png" not in (tmp_path / "report" / "report.md").read_text()
    told = json.loads(installed("report", "report", "--json").stdout)
    assert told["schema"] == 3 and told["gain"]
    compared = installed("compare", "report", "other")
    assert compared.returncode == 0 and (tmp_path / "compared" / "replies.html").is_file()
    served = installed("served", "report", "--url", "http://127.0.0.1:9")
    assert served.returncode == 2 and "127.0.0.1:9" in served.stderr


def test_a_name_on_the_hub_says_what_to_install(installed, adapters, tmp_path):
    """An adapter's own name, and that of a base whose config.json is needed."""
    folder = shutil.copytree(adapters["plain"], tmp_path / "adapter")
    change_config(folder, base_model_name_or_path="someone/not-on-this-machine")
    end = installed("info", "someone/some-lora")
    assert end.returncode == 2 and len(end.stderr.splitlines()) == 1
    assert "huggingface_hub" in end.stderr
    end = installed("info", "adapter", "--for", "vllm")
    assert end.returncode == 1 and "huggingface_hub" in end.stdout


@pytest.mark.parametrize("name", HEAVY)
def test_what_needs_a_model_says_what_to_install(installed, adapters, name):
    words = [name, adapters["plain"], *(["new"] if name == "export" else [])]
    end = installed(*words)
    assert end.returncode == 2 and end.stdout == "" and len(end.stderr.splitlines()) == 1
    assert "inspect-lora[measure]" in end.stderr
