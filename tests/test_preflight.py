"""The checks before training: the device, the room on it and on the disk, and the model's config and tokenizer."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from types import SimpleNamespace

import pytest
import torch

import train_lora_single as t

FLA = ["fla", "causal_conv1d"]
LAUNCHER = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"]
NO_KERNEL = """CUDA error: no kernel image is available for execution on the device
Search for `cudaErrorNoKernelImageForDevice' in the documentation of CUDA for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""


@pytest.fixture(autouse=True)
def process_is_restored(monkeypatch):
    """Begin without, and afterwards undo, the variables and modules that check_device may set."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    del os.environ["CUDA_VISIBLE_DEVICES"]
    for name in FLA:
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Return a function that makes torch.cuda answer, and returns what will be asked under which visible devices."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "cc")

    def fake(capability=(8, 0), count=1, name="NVIDIA Test", gib=32, kernels=(), fails=None):
        asked, ones = [], torch.ones
        answers = {
            "is_available": count > 0,
            "device_count": count,
            "get_device_name": name,
            "get_device_capability": capability,
            "get_arch_list": list(kernels),
            "set_device": None,
            "mem_get_info": (gib * 2**29, gib * 2**30),
        }
        for question, answer in answers.items():

            def reply(*arguments, question=question, answer=answer):
                asked.append((" ".join([question, *map(str, arguments)]), os.environ.get("CUDA_VISIBLE_DEVICES")))
                return answer

            monkeypatch.setattr(torch.cuda, question, reply)

        def ones_there(*size, device="cpu", **kinds):
            if device == "cuda":
                asked.append(("ones", os.environ.get("CUDA_VISIBLE_DEVICES")))
                if fails == "ones":
                    raise RuntimeError(NO_KERNEL)
                if fails == "memory":
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return ones(*size, **kinds)

        def fail(tensor, *_):
            if tensor.dtype == torch.bfloat16:
                raise RuntimeError(NO_KERNEL)
            raise AssertionError(f"asked for a kernel of {tensor.dtype}")

        monkeypatch.setattr(torch, "ones", ones_there)
        for method in {"product": ["matmul", "__matmul__", "mm"], "result": ["item"]}.get(fails, []):
            monkeypatch.setattr(torch.Tensor, method, fail)
        return asked

    return fake


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Put fake fla and causal_conv1d packages on the path, and return what transformers makes of each."""
    from transformers.utils import import_utils

    checks = [import_utils.is_flash_linear_attention_available, import_utils.is_causal_conv1d_available]
    for name in FLA:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text('__version__ = "0.5.0"\n')
    monkeypatch.syspath_prepend(tmp_path)
    cached = [*checks, import_utils.is_torch_cuda_available]
    for function in cached:
        function.cache_clear()
    yield lambda: [check() for check in checks]
    for function in cached:
        function.cache_clear()


def check_device(*flags):
    return t.check_device(t.parse_args(list(flags)))


def stopped(function, *arguments):
    """Return the message with which the call exits, one line."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def test_without_a_gpu_the_ways_out_are_named(gpu):
    gpu(count=0)
    message = stopped(check_device)
    assert "--demo" in message and "--device cpu" in message


def test_a_gpu_that_another_program_fills_is_said_to_be_full_not_unfit(gpu):
    gpu(fails="memory", name="Tesla V100-SXM2-32GB")
    message = stopped(check_device)
    assert "the memory of Tesla V100-SXM2-32GB is full" in message and "nvidia-smi" in message
    assert "torch>=" not in message


def test_a_v100_is_accepted_and_its_bf16_called_emulated(gpu):
    gpu((7, 0), name="Tesla V100-SXM2-32GB", gib=32)
    line = check_device()
    assert "Tesla V100-SXM2-32GB" in line and "sm_70" in line and "32 GiB" in line
    assert "emulated" in line and "native" not in line


def test_an_ampere_or_later_gpu_has_native_bf16(gpu):
    gpu((8, 0), name="NVIDIA A100", gib=80)
    line = check_device()
    assert "NVIDIA A100" in line and "sm_80" in line and "80 GiB" in line
    assert "native" in line and "emulated" not in line


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_before_ampere_fla_stays_out_even_if_installed(gpu, installed, capability):
    gpu(capability)
    line = check_device()
    for name in FLA:
        with pytest.raises(ImportError):
            importlib.import_module(name)
    assert installed() == [False, False]
    assert "without fla" in line


def test_from_ampere_on_fla_is_used_if_installed(gpu, installed):
    gpu((8, 9))
    line = check_device()
    assert [importlib.import_module(name).__version__ for name in FLA] == ["0.5.0", "0.5.0"]
    assert installed() == [True, True]
    assert "fla" not in line


@pytest.mark.parametrize(
    ("capability", "fails"), [((7, 0), "ones"), ((6, 1), "ones"), ((7, 0), "product"), ((12, 0), "result")]
)
def test_a_torch_that_cannot_run_bf16_on_the_gpu_is_refused_in_one_line_with_the_reason_and_the_torch_to_install(
    gpu, capability, fails
):
    gpu(capability, name="NVIDIA Test", fails=fails, kernels=[f"sm_{capability[0]}{capability[1]}"])
    message = stopped(check_device)
    assert re.search(rf"NVIDIA Test.*\bsm_{capability[0]}{capability[1]}\b", message)
    assert "no kernel image is available" in message and "TORCH_USE_CUDA_DSA" not in message
    assert 'pip install "torch>=2.7,<2.11"' in message and "sm_70 (V100)" in message


@pytest.mark.parametrize(
    ("capability", "kernels"),
    [
        ((7, 0), ["sm_75", "sm_80"]),
        ((8, 9), ["sm_80", "sm_86", "sm_90"]),
        ((9, 0), ["sm_80", "compute_80"]),
        ((9, 0), ["sm_90a"]),
        ((9, 0), ["gfx906", "gfx90a", "gfx942"]),
        ((9, 0), []),
    ],
)
def test_a_torch_that_runs_on_the_gpu_is_taken_whatever_it_says_it_was_built_for(gpu, capability, kernels):
    gpu(capability, kernels=kernels)
    assert f"sm_{capability[0]}{capability[1]}" in check_device()


@pytest.mark.parametrize(("visible", "first"), [(None, "0"), ("2,3", "2"), ("GPU-5a,GPU-7c,GPU-9e", "GPU-5a")])
def test_of_several_gpus_only_the_first_is_visible_before_cuda_starts(gpu, monkeypatch, visible, first):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    asked = gpu(count=3)
    line = check_device()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == first
    assert ("is_available", first) in asked
    assert {seen for question, seen in asked if question != "device_count"} == {first}
    assert "several visible GPUs" in line and "only the first" in line


def launch(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_a_launcher_that_asks_for_autocast_is_refused_with_the_option_that_does_not(gpu, monkeypatch, precision):
    gpu()
    launch(monkeypatch, ACCELERATE_MIXED_PRECISION=precision)
    assert "--mixed_precision no" in stopped(check_device)


def test_a_launcher_with_one_process_passes(gpu, monkeypatch):
    gpu()
    launch(monkeypatch, RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, LOCAL_WORLD_SIZE=1, ACCELERATE_MIXED_PRECISION="no")
    assert "sm_80" in check_device()


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2},
        {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2},
    ],
    ids=["one machine", "two machines"],
)
def test_of_several_processes_each_takes_its_own_gpu_and_leaves_the_others_visible(gpu, monkeypatch, variables):
    asked = gpu(count=2)
    launch(monkeypatch, **variables)
    line = check_device()
    assert "several" not in line and "CUDA_VISIBLE_DEVICES" not in os.environ
    questions = [question for question, _ in asked]
    assert [question for question in questions if question.startswith("set_device")] == ["set_device 1"]
    assert questions.index("set_device 1") < min(map(questions.index, ["get_device_name", "ones", "mem_get_info"]))


def test_more_processes_than_gpus_are_refused_with_both_numbers(gpu, monkeypatch):
    gpu(count=2)
    launch(monkeypatch, RANK=0, LOCAL_RANK=0, WORLD_SIZE=3, LOCAL_WORLD_SIZE=3)
    message = stopped(check_device)
    assert "3 processes" in message and "2 GPUs" in message and "--num_processes" in message


def test_without_a_compiler_or_pythons_headers_a_gpu_is_refused(gpu, monkeypatch, tmp_path):
    gpu()
    monkeypatch.delenv("CC")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "gcc" in stopped(check_device)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "clang" else None)
    assert "sm_80" in check_device()
    (tmp_path / "Python.h").unlink()
    assert f"{tmp_path}/Python.h" in stopped(check_device)


@pytest.mark.parametrize("visible", [None, "3"])
def test_one_gpu_stays_as_it_is(gpu, monkeypatch, visible):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu(count=1)
    assert "several" not in check_device()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_on_the_cpu_cuda_is_asked_nothing(gpu):
    asked = gpu((7, 0), count=2, fails="ones")
    line = check_device("--device", "cpu")
    assert "CPU" in line and "sm_" not in line
    assert asked == [] and "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.fixture
def room(monkeypatch, tmp_path):
    """Return a function that runs check_room with so many bytes free in OUTPUT_DIR, its own file system."""

    def check(device="cpu", total=1, disk=1, free=10**12, checkpoint=None):
        usage = {str(tmp_path): SimpleNamespace(free=free)}
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage[str(path)])
        args = t.parse_args(["--output_dir", str(tmp_path), "--device", device])
        t.check_room(args, {"total": total, "disk": disk}, checkpoint)

    return check


def test_a_cpu_takes_a_billion_parameters_and_not_one_more(room):
    room(total=10**9)
    message = stopped(room, "cpu", 10**9 + 1)
    assert "DEVICE cpu" in message and "1,000,000,001" in message


def test_a_gpu_takes_more_than_a_billion_parameters(room):
    room("cuda", 4_216_368_128)
    assert "4,216,368,128" in stopped(room, "cpu", 4_216_368_128)


def test_a_full_disk_is_refused_with_what_is_free_and_what_is_needed(room, tmp_path):
    message = stopped(room, "cuda", 1, 1_049_346_560, 23 * 10**6)
    assert f"OUTPUT_DIR {tmp_path}:" in message
    assert re.findall(r"\d[\d,]* MB \w+", message.split(str(tmp_path))[1]) == ["23 MB free", "1,049 MB needed"]
    room("cuda", disk=1_049_346_560, free=1_049_346_560)
    stopped(room, "cuda", 1, 1_049_346_560, 1_049_346_559)
    room("cuda", 1, 1_049_346_560, 1_049_346_559, tmp_path)  # to go on: most of it is there already


def load(name, *flags):
    return t.load_config_and_tokenizer(t.parse_args(["--model_name", str(name), *flags]))


@pytest.fixture
def folder(tiny, tmp_path):
    """Return a copy of the demo model's folder without its weights."""
    return shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_the_demo_model_loads_without_its_weights(folder):
    config, tokenizer = load(folder)
    assert config.model_type == "qwen3_5" and config.get_text_config().num_hidden_layers > 0
    assert tokenizer.eos_token == "<|im_end|>" and "<|im_start|>" in tokenizer.chat_template


def test_the_model_that_demo_names_loads():
    config, tokenizer = load(t.DEMO["model_name"])
    assert config.model_type == "qwen3_5" and len(tokenizer) <= config.get_text_config().vocab_size


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "./no/such/folder", "a b", "/no/such/folder"])
def test_offline_a_model_that_is_nowhere_is_refused_at_once(name):
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401, their import is not timed

    started = time.monotonic()
    message = stopped(load, name)
    assert time.monotonic() - started < 5
    assert f"MODEL_NAME {name}:" in message and "--demo" in message


def test_without_a_network_a_model_that_is_nowhere_is_refused_at_once(tmp_path):
    code = """if True:
        import time
        import train_lora_single as t
        from transformers import AutoConfig, AutoTokenizer
        started = time.monotonic()
        try:
            t.load_config_and_tokenizer(t.parse_args(["--model_name", "nobody/nothing"]))
        finally:
            print(time.monotonic() - started)
        """
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    del environment["HF_HUB_OFFLINE"]
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    (message,) = result.stderr.splitlines()
    assert "MODEL_NAME nobody/nothing:" in message and "--demo" in message and "offline" not in message
    assert float(result.stdout) < 5


def test_the_revision_is_the_one_that_is_asked_for_everywhere(monkeypatch):
    import huggingface_hub
    import transformers

    asked = []
    tokenizer = SimpleNamespace(chat_template="template", eos_token_id=1)

    def record(answer):
        return lambda *names, revision, **_: asked.append((names[-1], revision)) or answer

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file, revision: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", record(None))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", record("config"))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", record(tokenizer))
    assert load("some/model", "--model_revision", "5f3a9c1") == ("config", tokenizer)
    assert asked == [("some/model", "5f3a9c1")] * 3


def test_a_branch_of_the_hub_becomes_the_commit_that_was_read(tiny, tmp_path):
    commit, cache = "0123456789abcdef" * 2 + "01234567", tmp_path / "hub" / "models--org--model"
    shutil.copytree(tiny, cache / "snapshots" / commit, ignore=shutil.ignore_patterns("*.safetensors"))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    code = """if True:
        import train_lora_single as t
        args = t.parse_args(["--model_name", "org/model"])
        config, _ = t.load_config_and_tokenizer(args)
        print(args.model_revision, config.model_type)
        """
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == [commit, "qwen3_5"], result.stderr


def test_a_folder_without_a_config_is_refused(folder):
    (folder / "config.json").unlink()
    message = stopped(load, folder)
    assert f"MODEL_NAME {folder}:" in message and "config.json" in message


def test_a_folder_with_a_broken_config_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": ')
    message = stopped(load, folder)
    assert f"MODEL_NAME {folder}:" in message and "config.json" in message


def test_a_model_type_that_transformers_does_not_know_is_refused_by_name(folder):
    change(folder / "config.json", model_type="qwen9")
    message = stopped(load, folder)
    assert f"MODEL_NAME {folder}:" in message and "qwen9" in message


def test_a_model_that_brings_its_own_code_is_refused_and_the_code_not_run(folder, tmp_path):
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    (folder / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Own: pass\n")
    assert f"MODEL_NAME {folder}:" in stopped(load, folder)
    assert not (tmp_path / "was_run").exists()


def test_a_tokenizer_without_a_chat_template_is_refused(folder):
    (folder / "chat_template.jinja").unlink()
    message = stopped(load, folder)
    assert f"MODEL_NAME {folder}:" in message and "chat template" in message


def test_a_tokenizer_without_an_end_of_turn_token_is_refused(folder):
    change(folder / "tokenizer_config.json", eos_token=None)
    message = stopped(load, folder)
    assert f"MODEL_NAME {folder}:" in message and "end-of-turn token" in message


def test_a_broken_folder_is_not_called_absent(tmp_path):
    (tmp_path / "model").mkdir()
    message = stopped(load, tmp_path / "model")
    assert "broken folder" in message and "no folder" not in message
