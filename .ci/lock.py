#!/usr/bin/env python3
"""Pin the newest versions that pyproject.toml permits, in the three places that have pins.

requirements.txt has what the script and inspect-lora need, tests/requirements.txt what the tests
need besides, and the block at the top of the script (PEP 723) the packages that it imports.
It needs uv (pip install uv) and the package index.
"""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST_LINE = """\
# Made from the ranges in pyproject.toml by `.ci/lock.py`, for Python 3.11 to 3.13 on Linux.
"""
WHY_OLD_TORCH = "# torch stays below 2.11, whose wheels have no kernels for the V100 (sm_70)."
# torch's wheels for CUDA name their exact versions, and its wheels for the CPU do without them.
LEFT_TO_TORCH = ("cuda-", "nvidia-", "triton==")


def resolve(*options: str) -> list[str]:
    """Return one line "name==version ; marker" for each package."""
    command = ["uv", "pip", "compile", "pyproject.toml", "--extra", "measure", *options]
    command += ["--universal", "--python-version", "3.11", "--no-annotate", "--no-header"]
    text = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [line for line in text.splitlines() if not line.startswith(LEFT_TO_TORCH)]


def pin_header(script: str, pins: list[str]) -> str:
    """Return the script with the versions of the pins in its header."""
    versions = dict(pin.split("==") for pin in pins if ";" not in pin)
    return re.sub(
        r'(?m)^(#     "([\w-]+)==)[^"]*',
        lambda line: line[1] + versions[line[2].replace("_", "-")],
        script,
    )


def name_of(pin: str) -> str:
    """Return the package's name, in the spelling of uv."""
    return pin.split("==")[0]


def main() -> None:
    """Resolve both files together, so that no package has two versions."""
    everything = resolve("--group", "test")
    names = {name_of(line) for line in resolve()}
    of_project = [line for line in everything if name_of(line) in names]
    of_tests = [line for line in everything if name_of(line) not in names]
    for name, lines in {
        "requirements.txt": [WHY_OLD_TORCH, *of_project],
        "tests/requirements.txt": ["-r ../requirements.txt", *of_tests],
    }.items():
        (ROOT / name).write_text(FIRST_LINE + "\n".join(lines) + "\n", encoding="utf-8")
    script = ROOT / "train_lora_single.py"
    script.write_text(pin_header(script.read_text(encoding="utf-8"), of_project), encoding="utf-8")


if __name__ == "__main__":
    main()
