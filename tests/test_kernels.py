"""Whether DeltaNet's layers are computed by fla or by torch's code: fla is tried before it is used.

The stand-ins for fla compute with torch's code, and fail in one way each, as real ones have.
"""

import faulthandler
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from conftest import ROOT, TINY
from processes import Fork, write_to
from trainers import at_step, read_record, run, send

import train_lora_single as t

GOOD = """
import torch

class Kernel(torch.autograd.Function):
    # Torch's code, a little rounded, as kernels in bfloat16 are.

    @staticmethod
    def forward(context, *given):
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule as f
        leaves = [one.detach().requires_grad_() for one in given]
        with torch.enable_grad():
            out, _ = f.__wrapped__(
                *leaves[:3], g=leaves[3], beta=leaves[4], use_qk_l2norm_in_kernel=True
            )
        context.leaves, context.out = leaves, out
        return out.detach() * (1 + VALUES)

    @staticmethod
    def backward(context, gradient):
        IN_BACKWARD
        found = torch.autograd.grad(context.out, context.leaves, gradient)
        return *found[:3], found[3] * (1 + DECAYS), found[4]

def chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=False):
    AT_FIRST
    return Kernel.apply(q, k, v, g, beta), None

fused_recurrent_gated_delta_rule = chunk_gated_delta_rule
"""
HANG = """
import os, pathlib, subprocess, time
compiler = subprocess.Popen(["sleep", "600"])
pathlib.Path(__file__).with_name("pids").write_text(f"{os.getpid()} {compiler.pid}")
time.sleep(600)
"""
RAISE = "raise RuntimeError('Triton >= 3.4.0 and < 3.7.1 on Hopper GPUs produces wrong results')"
STAND_INS = {  # what is put where, the version of fla-core, and what is said
    "good": ({}, "0.6.0", ""),
    "raises in backward": ({"IN_BACKWARD": RAISE}, "0.6.0", "RuntimeError: Triton >= 3.4.0"),
    "wrong values": ({"VALUES": "0.03"}, "0.6.0", "has values that are 3.0% away"),
    "wrong gradients": ({"DECAYS": "0.05"}, "0.4.1", "has gradients of g that are 5.0% away"),
    "gradients that are not numbers": ({"DECAYS": "float('nan')"}, "0.6.0", "nan% away"),
    "no compiler": (
        {"AT_FIRST": "raise RuntimeError('Failed to find C compiler. Please specify via CC')"},
        "0.6.0",
        "cannot be used: RuntimeError: Failed to find C compiler",
    ),
    "crashes": ({"AT_FIRST": "import os; os.kill(os.getpid(), 11)"}, "0.6.0", "status -11"),
    "another process's GPU": (
        {"AT_FIRST": "raise RuntimeError('CUDA-capable device(s) is/are busy or unavailable')"},
        "0.6.0",
        "could not be tried: CUDA admits no second process to this GPU",
    ),
    "cannot be imported": ({"import torch": "import no_such"}, "0.6.0", "ModuleNotFoundError"),
    "is not taken": ({"def chunk_gated": "def not_chunk_gated"}, "0.6.0", "not what transformers"),
}


def make_fla(folder, name, version=""):
    """Write a stand-in for fla into folder."""
    changes, its_version, _ = STAND_INS[name]
    text = GOOD
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    defaults = {"VALUES": "4e-3", "DECAYS": "1e-3", "IN_BACKWARD": "pass", "AT_FIRST": "pass"}
    for old, new in defaults.items():
        text = text.replace(old, new)
    (folder / "fla" / "ops").mkdir(parents=True)
    is_import = name == "cannot be imported"
    (folder / "fla" / "__init__.py").write_text("import no_such" if is_import else "")
    (folder / "fla" / "ops" / "__init__.py").write_text("")
    (folder / "fla" / "ops" / "gated_delta_rule.py").write_text(textwrap.dedent(text))
    write_version(folder, "fla-core", version or its_version)


def write_version(folder, name, version):
    """Let a package be installed in folder, as far as its metadata say."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@functools.cache
def config():
    return transformers.AutoConfig.from_pretrained(TINY)


MODELLING = "transformers.models.qwen3_5.modeling_qwen3_5"


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """Return {stand-in: what the trial prints of it}, each tried in a fork."""
    folder = tmp_path_factory.mktemp("fla")
    said = {}
    for name in STAND_INS:
        make_fla(folder / name, name)
        Fork(functools.partial(try_in_this_process, folder / name, folder / "said")).end()
        said[name] = (folder / "said").read_text(encoding="utf-8")
        (folder / "said").unlink()
    return said


def try_in_this_process(folder, said):
    """Be the process that tries fla, which has not yet imported the model's code."""
    faulthandler.disable()
    write_to(said, os.devnull)
    sys.path.insert(0, str(folder))
    sys.modules.pop(MODELLING, None)
    sys.modules.pop("fla", None)
    sys.argv = ["-c", MODELLING, "cpu", str(t.MOST_FLA_APART), "60", "2", "4", "128", "128"]
    t.compare_fla_with_torch()


@pytest.mark.parametrize("name", STAND_INS)
def test_fla_is_used_only_if_its_values_and_gradients_are_torchs(tried, name):
    words = STAND_INS[name][2]
    lines = tried[name].splitlines()
    if name == "crashes":
        assert lines == []
    else:
        assert len(lines) == 1 and lines[0].startswith("fla: ") and words in lines[0]
        assert (lines[0] == "fla: good") == (name == "good")


# ---- what is chosen, with the process that tries it ---------------------------------------------


@pytest.fixture
def choose(monkeypatch, capsys):
    """Return what chooses on a simulated card where fla lies in a folder, and tells what it did."""

    def on_a_card(folder=None, capability=(8, 0), of=None, dtype="bfloat16"):
        if folder is not None:
            monkeypatch.setenv("PYTHONPATH", str(folder))
            monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "fla", raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        accelerate.PartialState(cpu=True)
        chosen = t.choose_delta_kernels(of or config(), dtype)
        said = " ".join(capsys.readouterr().out.split())
        is_forbidden = "fla" in sys.modules and sys.modules["fla"] is None
        return chosen, said, is_forbidden

    yield on_a_card
    sys.modules.pop("fla", None)


def test_without_fla_or_deltanet_or_a_new_gpu_nothing_is_tried(choose, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    chosen, said, _ = choose()
    assert "not installed" in chosen and "pip install flash-linear-attention" in said
    make_fla(tmp_path, "good")
    assert choose(tmp_path, of=transformers.LlamaConfig()) == ("", "", False)
    chosen, said, _ = choose(tmp_path, capability=(7, 5))
    assert "capability 8.0 or newer" in chosen and said == ""


ON_HOPPER = {  # the versions of fla-core and Triton, and why fla is not tried; "" if it is
    ("0.4.2", "3.3.1"): "below version 0.5 has wrong gradients on Hopper GPUs",
    ("0.5.0", "3.3.1"): "",
    ("0.5.1", "3.4.0"): "0.5.0 to 0.6.0 cannot train on a Hopper GPU with Triton 3.4.0",
    ("0.6.0", "3.7.0"): "0.5.0 to 0.6.0 cannot train on a Hopper GPU with Triton 3.7.0",
    ("0.6.0", "3.7.1"): "",
    ("0.10.1", "3.6.0"): "",
    ("", "3.6.0"): "with Triton 3.6.0, so installing it would not help",
}


@pytest.mark.parametrize("versions", ON_HOPPER)
def test_on_hopper_versions_that_cannot_train_are_not_tried(
    choose, tmp_path, monkeypatch, versions
):
    """However small an old one's errors are; and nobody is told to install one."""
    tried = []
    monkeypatch.setattr(t, "why_not_fla", lambda *_: tried.append(1) or "")
    write_version(tmp_path, "triton", versions[1])
    if versions[0]:
        make_fla(tmp_path, "good", versions[0])
    chosen, said, is_forbidden = choose(tmp_path, capability=(9, 0))
    words = ON_HOPPER[versions]
    assert words in chosen and bool(tried) == (not words) and is_forbidden == bool(words)
    assert chosen in said and "pip install" not in said
    assert choose(tmp_path, capability=(8, 0))[0] != chosen or not words


def test_with_float32_weights_fla_is_not_tried(choose, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    make_fla(tmp_path, "good")
    chosen, said, is_forbidden = choose(tmp_path, dtype="float32")
    assert chosen == (
        "torch's code, since fla is tried only with bfloat16, which its kernels are for, and not "
        "with float32"
    )
    assert chosen in said and is_forbidden


@pytest.mark.parametrize(
    "other",
    [("", (8, 6)), ("below version 0.5 has wrong gradients", (9, 0)), ("is not installed", (8, 0))],
)
def test_processes_whose_gpus_or_packages_differ_all_take_torchs_code(
    choose, tmp_path, monkeypatch, other
):
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda own: [*own, other])
    make_fla(tmp_path, "good")
    chosen, said, is_forbidden = choose(tmp_path)
    assert "the GPUs or the packages of the processes differ" in chosen and chosen in said
    assert is_forbidden


def test_the_models_own_heads_are_tried(choose, tmp_path):
    """Kernels are compiled for their number and their sizes."""
    make_fla(tmp_path, "good")
    path = tmp_path / "fla" / "ops" / "gated_delta_rule.py"
    tell = "raise RuntimeError(f'{tuple(q.shape)} {tuple(v.shape)} {tuple(g.shape)}')"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("    pass\n    return", f"    {tell}\n    return"))
    of = transformers.AutoConfig.from_pretrained(TINY)
    text_config = of.get_text_config()
    text_config.linear_num_key_heads, text_config.linear_num_value_heads = 3, 6
    text_config.linear_key_head_dim, text_config.linear_value_head_dim = 64, 32
    chosen, _, _ = choose(tmp_path, of=of)
    assert "(1, 200, 3, 64) (1, 200, 6, 32) (1, 200, 6)" in chosen


def test_an_fla_that_crashes_is_left_out_with_its_status(choose, tmp_path):
    make_fla(tmp_path, "crashes")
    chosen, said, is_forbidden = choose(tmp_path)
    assert is_forbidden and chosen in said
    assert chosen.startswith("torch's code, since fla ended its trial with status -11")


def test_an_fla_that_hangs_is_ended_in_time_with_its_compiler(choose, tmp_path, monkeypatch):
    make_fla(tmp_path, "good")
    (tmp_path / "fla" / "__init__.py").write_text(HANG)
    pids = tmp_path / "fla" / "pids"
    for limit in (8, 60):  # on a loaded machine it may take longer to come so far
        monkeypatch.setattr(t, "SECONDS_FOR_FLA", limit)
        began = time.monotonic()
        chosen, said, is_forbidden = choose(tmp_path)
        assert limit <= time.monotonic() - began < limit + 30
        assert is_forbidden and f"was not ready after {limit} s" in chosen and chosen in said
        if pids.exists():
            break
    time.sleep(0.2)
    for pid in pids.read_text().split():
        state = Path(f"/proc/{pid}/stat")  # one that has ended may wait to be collected
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


PREPARE = """
import accelerate, importlib, json, sys, torch
import train_lora_single as t
torch.cuda.get_device_capability = lambda *_: (8, 0)
torch.cuda.is_bf16_supported = lambda **_: True
t.prepare_device = lambda *_: "a simulated GPU"
accelerate.PartialState(cpu=True)
job = t.Job(t.parse_settings())
t.prepare(job)
f = importlib.import_module("MODELLING").torch_chunk_gated_delta_rule
given = [torch.randn(1, 70, 2, 16).bfloat16() for _ in range(3)]
given += [-torch.rand(1, 70, 2), torch.rand(1, 70, 2).bfloat16()]
how = {"g": given[3], "beta": given[4], "use_qk_l2norm_in_kernel": True}
alike = f(*given[:3], **how)[0].equal(f.__wrapped__(*given[:3], **how)[0])
print(json.dumps([job.delta_kernels, alike]))
"""


@pytest.mark.parametrize("name", ["good", "wrong gradients"])
def test_it_is_tried_before_the_models_code_is_imported(flags, tmp_path, name):
    make_fla(tmp_path / "packages", name)
    paths = os.pathsep.join([str(tmp_path / "packages"), str(ROOT)])
    words = [*flags, "--device", "cuda", "--dtype", "bfloat16"]
    words += ["--lora_target_modules", "o_proj"]
    done = subprocess.run(
        [sys.executable, "-c", PREPARE.replace("MODELLING", MODELLING), *words],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    chosen, is_torchs = json.loads(done.stdout.splitlines()[-1])
    assert chosen.startswith("torch's code" if name != "good" else "fla, which agrees")
    assert is_torchs == (name != "good")


# ---- what a run records of it -------------------------------------------------------------------


def test_run_json_has_it_and_a_resumed_job_says_if_it_is_otherwise(flags, tmp_path, capsys):
    """It goes on all the same."""
    kernels = iter(["fla, which agrees", "fla, which agrees", "torch's code, since fla is broken"])
    with pytest.MonkeyPatch.context() as patch:
        real = t.read_model_files

        def read(job):
            real(job)
            job.delta_kernels = chosen[0]

        patch.setattr(t, "read_model_files", read)
        said = []
        for number in (1, 2, 3):
            chosen = [next(kernels)]
            with pytest.MonkeyPatch.context() as stop:
                if number < 3:
                    at_step(stop, 1, send(signal.SIGTERM))
                status = run(flags)
            said.append(" ".join(capsys.readouterr().out.split()))
            assert status == (0 if number == 3 else 128 + signal.SIGTERM)
            assert read_record(tmp_path / "output")["delta_kernels"] == chosen[0]
    assert ["until now they were computed by fla" in one for one in said] == [False, False, True]
