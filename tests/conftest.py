"""What the tests share: the product on the path, no network, and the demo model."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    """Run each test where a user runs the script."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def tiny():
    """Return the path of the demo model."""
    return str(ROOT / "tests" / "tiny-qwen3.5")
