"""What the tests share: the script, no network, one thread, short data, one finished run."""

import contextlib
import functools
import gc
import json
import os
import shutil
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two workers, two cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # more threads than cores wait without work
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "tests" / "tiny-qwen3.5")
sys.path.insert(0, str(ROOT))
# A shell's background job ignores some of these, and the script leaves an ignored signal ignored.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def default_handlers():
    """Hear signals as a new process does: main() leaves handlers of its own, or ignores them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)


default_handlers()

import jinja2  # noqa: E402
import pytest  # noqa: E402

import train_lora_single as t  # noqa: E402

# PEFT makes a model card for each checkpoint, and compiles its template anew each time: that is a
# tenth of a short run.
jinja2.Template = functools.cache(jinja2.Template)


@contextlib.contextmanager
def handlers_restored():
    """Take back what main() does to the handlers of signals."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    """Run each test where a user runs the script, with a new process's handlers of signals."""
    monkeypatch.chdir(ROOT)
    default_handlers()
    yield
    default_handlers()


# The longest first, as they stand in this list: else one worker waits for the other at the end.
LONGEST = [
    f"test_{name}.py"
    for name in ("resume", "evidence", "adapters", "story", "results", "doors", "training")
]


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture
def restored_environment(monkeypatch):
    """Take back what a test sets in the environment."""
    for name, value in os.environ.items():
        monkeypatch.setenv(name, value)
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:
        del os.environ[name]


@pytest.fixture
def no_picture(monkeypatch):
    """Write a few bytes for lora.png: drawing takes longer than measuring."""
    placeholder = lambda _, path: path.write_bytes(b"picture")  # noqa: E731
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", placeholder)


@pytest.fixture(scope="session")
def tiny():
    """Return the path of the tests' model: Qwen3.5's architecture with random weights."""
    return TINY


@pytest.fixture(scope="session")
def untied(tmp_path_factory):
    """Return the path of that model with a head of its own, not the embedding's weight."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(TINY, tmp_path_factory.mktemp("untied") / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.language_model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def write_short_data(folder, train=13, held_out=4):
    """Write the shortest lines of the shipped data to folder; return the flags of a short run.

    The run is on the tests' model, has two epochs (of four steps with 13 lines), and a checkpoint
    every three steps. Later flags override these.
    """
    flags = ["--demo", "--model_name", TINY, "--learning_rate", "1e-2", "--num_epochs", "2"]
    flags += ["--logging_steps", "1", "--save_steps", "3", "--max_steps", "0"]
    for name, number in (("train", train), ("eval", held_out)):
        text = (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
        rows = sorted(text.splitlines(keepends=True), key=len)[:number]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        flags += [f"--{name}_file", str(folder / f"{name}.jsonl") if number else ""]
    return flags


@pytest.fixture
def flags(tmp_path):
    """Return the flags of a short run into tmp_path/output."""
    return [*write_short_data(tmp_path), "--output_dir", str(tmp_path / "output")]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return the output folder of one finished short run; its data lies beside that folder.

    What it printed is in all_logs.log there. Tests must not change the folder.
    """
    folder = tmp_path_factory.mktemp("finished")
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        with handlers_restored():
            default_handlers()
            t.main([*write_short_data(folder), "--output_dir", str(folder / "output")])
    finally:
        os.chdir(before)
    gc.collect()
    gc.freeze()  # each run collects garbage: what the imports made need not be looked through
    return folder / "output"
