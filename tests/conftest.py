"""What all tests share, each made once; no network, and no torch before a test asks for it."""

import contextlib
import fcntl
import functools
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from importlib import import_module
from pathlib import Path

import pytest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: as many workers as cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Both commands set these themselves, but the tests import transformers first.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["USE_HUB_KERNELS"] = "NO"
# tqdm's own lock is shared with forked children: one that was killed while it held the lock would
# stop this process for ever at its next progress bar.
tqdm.set_lock(threading.RLock())


def make_toy(demo, folder):
    """Write two of the demo's four layers, whose replies are not empty, into a folder."""
    shutil.copytree(demo, folder, dirs_exist_ok=True)
    config = json.loads((demo / "config.json").read_text(encoding="utf-8"))
    kinds = config["text_config"]["layer_types"]
    layers = ["linear_attention", "full_attention"]
    places = {str(kinds.index(kind)): str(place) for place, kind in enumerate(layers)}
    config["text_config"] |= {"num_hidden_layers": 2, "layer_types": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    whole = (demo / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")  # after the header, which is JSON
    header, kept = {"__metadata__": {"format": "pt"}}, b""
    for name, entry in json.loads(whole[8:begin]).items():
        layer = name.partition("language_model.layers.")[2].partition(".")[0]
        if name != "__metadata__" and layer in ("", *places):
            start, end = entry["data_offsets"]
            offsets = [len(kept), len(kept) + end - start]
            name = name.replace(f"model.layers.{layer}.", f"model.layers.{places.get(layer)}.")
            header[name] = entry | {"data_offsets": offsets}
            kept += whole[begin + start : begin + end]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + kept)


# The workers of pytest-xdist inherit this folder: a path in a file is the same for all of them.
IS_FIRST = "TOY_MODEL" not in os.environ
if IS_FIRST:
    os.environ["TOY_MODEL"] = tempfile.mkdtemp(prefix="toy-model-")
    make_toy(ROOT / "data" / "demo-model", Path(os.environ["TOY_MODEL"]))
TOY = os.environ["TOY_MODEL"]  # the base model of nearly all tests

# A shell's background job ignores some of these, and the script leaves an ignored signal ignored.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LONGEST = ["resume", "evidence", "training", "story", "adapters", "saving", "memory", "page"]


def pytest_unconfigure():
    """Remove the toy when the process that made it ends."""
    if IS_FIRST:
        shutil.rmtree(TOY, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest: else one worker waits for the other at the end."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def default_handlers():
    """Hear signals as a new process does: main() leaves handlers of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def as_a_new_process():
    """Work in the root of the project; take back changes of the environment and of handlers."""
    folder, environment = Path.cwd(), dict(os.environ)
    os.chdir(ROOT)
    default_handlers()
    try:
        yield
    finally:
        default_handlers()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)


@pytest.fixture(scope="session", autouse=True)
def compiled_once():
    """Compile each chat template and model card once: it is a tenth of a short run."""
    import jinja2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2, "Template", functools.cache(jinja2.Template))
        yield


@pytest.fixture(autouse=True)
def in_the_root(request, monkeypatch):
    """Run each test where a user runs the script; pictures with rows are a few bytes."""

    def draw_nothing(panels, title, path):
        path.unlink(missing_ok=True)
        if any(panel.rows for panel in panels):
            path.write_bytes(b"picture")

    if "inspect_lora" in sys.modules and "real_picture" not in request.fixturenames:
        monkeypatch.setattr("inspect_lora.picture.draw_panels", draw_nothing)
    with as_a_new_process():
        yield


@pytest.fixture
def real_picture():
    """Have pictures drawn and saved in a test that asks for this."""


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Return shared(name, make): what make(folder) fills once for all; nobody changes it."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name, make):
        folder, is_made = root / name, root / f"{name} is made"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                with as_a_new_process():
                    make(folder)
                is_made.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def base():
    """Return the toy's text model in float32, which nobody changes."""
    return import_module("toys").base_model()


@pytest.fixture(scope="session")
def tokenizer():
    """Return the toy's tokenizer, which nobody changes."""
    return import_module("toys").tokenizer()


@pytest.fixture(scope="session")
def untied(shared):
    """Return the path of the toy with a head of its own, not the embedding's weight."""
    return str(shared("untied", import_module("toys").make_untied))


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """Return {kind: folder} of adapters of the toy that PEFT alone made; see toys.KINDS."""

    class Adapters(dict):
        def __missing__(self, kind):
            folder = tmp_path_factory.mktemp("adapters") / kind
            return self.setdefault(kind, import_module("toys").save_kind(folder, kind))

    return Adapters()


@pytest.fixture
def copied(adapters, tmp_path):
    """Return copied(kind, ...): a copy of such an adapter with other entries in its config."""

    def copy(kind="plain", **config):
        folder = shutil.copytree(adapters[kind], tmp_path / "copied")
        return import_module("toys").change_config(folder, **config)

    return copy


@pytest.fixture
def plain(copied):
    return copied()


@pytest.fixture(scope="session")
def three_lines(tmp_path_factory):
    """Return the path of three held-out lines."""
    path = tmp_path_factory.mktemp("held out") / "eval.jsonl"
    return import_module("records").write_talks_with(path, 1, 2, 3)


@pytest.fixture(scope="session")
def opened(tmp_path_factory):
    """Return an adapter on its base; each test leaves it as it was."""
    return import_module("records").open_one(tmp_path_factory.mktemp("opened") / "adapter")


@pytest.fixture
def flags(tmp_path):
    """Return the flags of a short run into tmp_path/output; later flags override these."""
    return import_module("runs").short_flags(tmp_path)


@pytest.fixture(scope="session")
def finished(shared):
    """Return a run of 8 steps, twice over 14 lines: .folder with its data, .output, .flags..."""
    runs = import_module("runs")
    return runs.short_run(shared("finished", runs.do_short_run))


@pytest.fixture(scope="session")
def stopped(shared):
    """Return the same run, stopped by Ctrl-C in step 7; an older final_lora lies in its output."""
    runs = import_module("runs")

    def make(folder):
        (folder / "output" / "final_lora").mkdir(parents=True)
        (folder / "output" / "final_lora" / "older.txt").write_text("of another run")
        runs.do_short_run(folder, stop_after=7)

    return runs.short_run(shared("stopped", make))


@pytest.fixture(scope="session")
def record(shared):
    """Return the folder of one report with everything in it, as tests/records.py makes it."""
    return shared("record", import_module("records").make_record)


@pytest.fixture
def gpu(monkeypatch):
    """Return gpu(capability, free, total): there is a GPU then, and the CPU computes for it."""
    with contextlib.ExitStack() as stack:
        yield functools.partial(import_module("toys").pretend_gpu, monkeypatch, stack)
