"""What comes from others is data: no code in a model or checkpoint is run, and a run writes only where it says."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import train_lora_single as t

SECRET = "s3cr3t-0f-the-user"
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags for a demo on the shortest 5 training and 2 eval lines, one epoch of two steps."""
    folder, flags = tmp_path_factory.mktemp("data"), ["--demo", "--save_steps", "1", "--num_samples", "1"]
    for name, lines in (("train", 5), ("eval", 2)):
        text = sorted(Path("data", f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True), key=len)
        (folder / f"{name}.jsonl").write_text("".join(text[:lines]), encoding="utf-8")
        flags += [f"--{name}_file", str(folder / f"{name}.jsonl")]
    return [*flags, "--max_new_tokens", "3"]


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Write a placeholder for loss.png: drawing would be a good part of a run's time."""
    monkeypatch.setattr(t, "draw_losses", lambda history, path, *_: path.write_bytes(b""))


# ---- code in a model folder -----------------------------------------------------------------------------------------


@pytest.fixture
def armed(tiny, tmp_path, monkeypatch):
    """Return (a copy of the demo model that asks for its own code to be run, the file which that code writes)."""
    folder, marker = shutil.copytree(tiny, tmp_path / "armed"), tmp_path / "marker"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = f"open({str(marker)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    (folder / "evil.py").write_text(code, encoding="utf-8")
    maps = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model"}
    set_key(folder / "config.json", "auto_map", maps | {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    set_key(folder / "tokenizer_config.json", "auto_map", {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    return folder, marker


def set_key(path, key, value):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {key: value}), encoding="utf-8")


def test_the_armed_model_does_run_code_where_that_is_allowed(armed):
    folder, marker = armed
    with pytest.raises(Exception):  # noqa: B017
        transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).to_dict()
    assert marker.exists()


def test_code_beside_a_known_model_is_not_run(armed, flags, tmp_path):
    folder, marker = armed
    t.main([*flags, "--model_name", str(folder), "--output_dir", str(tmp_path / "output")])
    assert not marker.exists() and (tmp_path / "output" / "final_lora").exists()


def test_a_model_that_needs_its_own_code_is_refused(armed, flags, tmp_path, capsys):
    folder, marker = armed
    set_key(folder / "config.json", "model_type", "evil")
    with pytest.raises(SystemExit) as stop:
        t.main([*flags, "--model_name", str(folder), "--output_dir", str(tmp_path / "output")])
    assert stop.value.code == 1 and not marker.exists()
    assert f"MODEL_NAME {folder}" in (text := capsys.readouterr().err) and "Traceback" not in text


@pytest.mark.parametrize(
    "attack", ["cycler.__init__.__globals__.os", "messages.__class__.__mro__[1].__subclasses__()"]
)
def test_a_chat_template_that_reaches_for_python_is_refused(armed, flags, tmp_path, capsys, attack):
    folder, marker = armed
    template = f"{{{{ {attack}.system('touch {marker}') }}}}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        t.main([*flags, "--model_name", str(folder), "--output_dir", str(tmp_path / "output")])
    assert stop.value.code == 1 and not marker.exists()
    assert "the chat template refuses it" in (text := capsys.readouterr().err) and "Traceback" not in text


# ---- code in a checkpoint -------------------------------------------------------------------------------------------


class Payload:
    """What writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def interrupted(flags, tmp_path_factory):
    """Return the output of a run interrupted after its first step of two."""
    output, step = tmp_path_factory.mktemp("interrupted"), transformers.Trainer.training_step

    def training_step(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(transformers.Trainer, "training_step", training_step)
        # One signal is enough, and a second one would end these tests.
        patch.setattr(os, "kill", lambda *_, kill=os.kill, sent=[]: sent or sent.append(kill(*_)))
        t.main([*flags, "--output_dir", str(output)])
    assert (output / "checkpoints" / "checkpoint-1" / "complete.json").exists()
    return output


def plant(output, name, data):
    """Write data over a file of the newest checkpoint, which still looks complete."""
    folder = output / "checkpoints" / "checkpoint-1"
    (folder / name).write_bytes(data)
    set_key(folder / "complete.json", name, hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin"])
def test_a_checkpoint_with_code_in_it_does_not_run_it(flags, interrupted, tmp_path, monkeypatch, name, form):
    output, marker = shutil.copytree(interrupted, tmp_path / "output"), tmp_path / "marker"
    torch.save(Payload(marker), tmp_path / "armed", _use_new_zipfile_serialization=form == "zip")
    plant(output, name, (tmp_path / "armed").read_bytes())
    if name == "adapter_model.bin":
        (output / "checkpoints" / "checkpoint-1" / "adapter_model.safetensors").unlink()
        saved = output / "checkpoints" / "checkpoint-1" / "complete.json"
        hashes = json.loads(saved.read_text(encoding="utf-8"))
        del hashes["adapter_model.safetensors"]
        saved.write_text(json.dumps(hashes), encoding="utf-8")
    loaded, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, *a, **k: loaded.append(Path(path).name) or load(path, *a, **k))
    with pytest.raises((SystemExit, pickle.UnpicklingError)):
        t.main([*flags, "--output_dir", str(output)])
    assert name in loaded and not marker.exists()
    load(output / "checkpoints" / "checkpoint-1" / name, weights_only=False)
    assert marker.exists()  # it was a loaded gun


def test_pickled_arguments_in_a_checkpoint_are_not_read(flags, interrupted, tmp_path):
    output, marker = shutil.copytree(interrupted, tmp_path / "output"), tmp_path / "marker"
    plant(output, "training_args.bin", pickle.dumps(Payload(marker)))
    t.main([*flags, "--output_dir", str(output)])
    assert not marker.exists() and (output / "final_lora").exists()
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["resumed_from"].endswith("checkpoint-1")


# ---- what a whole run touches ---------------------------------------------------------------------------------------

# The script as its own process runs it, with each path opened for writing and each connection written to a list.
SPY = """
import os, runpy, sys
spied = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def spy(event, args):
    writes = event == "open" and isinstance(args[0], (str, bytes)) and (
        args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(args[2], int) and args[1] is None
        else set("wax+") & set(args[1] or ""))
    moves = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate")
    if writes or moves:
        os.write(spied, b"write " + os.path.abspath(os.fsencode(args[0])) + b"\\n")
    elif event in ("socket.connect", "socket.getaddrinfo"):
        os.write(spied, f"network {args}\\n".encode())
sys.addaudithook(spy)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def tree(folder):
    """Return size and time of each file and folder below folder."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def demo(flags, tmp_path_factory):
    """Run the demo in a copy of the repository, as a user with secrets, online; return (folder, spied, before)."""
    folder, root = tmp_path_factory.mktemp("user"), Path(t.__file__).parent
    shutil.copytree(root / "tests" / "tiny-qwen3.5", folder / "repo" / "tests" / "tiny-qwen3.5")
    shutil.copytree(root / "data", folder / "repo" / "data")
    shutil.copy(t.__file__, folder / "repo")
    for name in ("home", "cache", "tmp", "elsewhere"):
        (folder / name).mkdir()
    (folder / "cache" / "token").write_text(SECRET)
    before = tree(folder)
    unset = ("HF_HUB_OFFLINE", "PYTHONPATH", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"HOME": str(folder / "home"), "HF_HOME": str(folder / "cache"), "TMPDIR": str(folder / "tmp")}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"} | dict.fromkeys(SECRETS, SECRET)
    # Of the flags all but the files, which are where the user has them.
    script = ["train_lora_single.py", *flags[:1], "--num_samples", "1", "--max_new_tokens", "3", *flags[5:9]]
    done = subprocess.run(
        [sys.executable, "-c", SPY, str(folder / "spied"), *script],
        cwd=folder / "repo", env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, (folder / "spied").read_text(encoding="utf-8").splitlines(), before


def test_a_run_writes_nothing_outside_its_output_but_caches(demo):
    folder, _, before = demo
    after = tree(folder)
    output = folder / "repo" / "output" / "demo"
    assert (output / "final_lora" / "adapter_model.safetensors") in after
    assert {path: after.get(path) for path in before} == before  # data, model, script and token are as they were
    new = {path for path in after.keys() - before.keys() if output not in path.parents} - {folder / "spied"}
    assert {path for path in new if path.relative_to(folder).parts[0] not in ("home", "cache")} == set()
    assert {path.relative_to(folder / "home").parts[0] for path in new if (folder / "home") in path.parents} <= {
        ".cache", ".config", ".triton"
    }  # fmt: skip


def test_a_run_opens_for_writing_only_its_output_caches_and_temporary_files(demo):
    folder, spied, _ = demo
    written = {Path(line.partition(" ")[2]) for line in spied if line.startswith("write ")}
    assert folder / "repo" / "output" / "demo" / "all_logs.log" in written
    allowed = [folder / "repo" / "output", folder / "home", folder / "cache", folder / "tmp", Path("/dev")]
    assert [path for path in written if not any(path.is_relative_to(one) for one in allowed)] == []


def test_a_run_on_a_model_in_a_folder_connects_to_nothing(demo):
    assert [line for line in demo[1] if line.startswith("network ")] == []


def test_no_secret_of_the_environment_is_in_any_file_of_the_output(demo):
    output = demo[0] / "repo" / "output" / "demo"
    contents = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert len(contents) > 20 and any(b"tests/tiny-qwen3.5" in data for data in contents.values())
    assert [path for path, data in contents.items() if SECRET.encode() in data] == []
    for path in output.rglob("*.safetensors"):
        assert load_file(path).keys()
