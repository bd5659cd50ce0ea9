"""Before any weight is loaded: the plan, the disk, the GPU, config and tokenizer, foreign code."""

import importlib
import json
import os
import pathlib
import re
import shutil
import socket
import sys
import time

import huggingface_hub
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train_lora_single as t


def stopped(function, *arguments):
    """Return the message with which the call exits, one line."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


# ==== The plan


def plan(config, *flags, n_train=1000):
    args = t.parse_args([*map(str, flags)])
    return t.make_plan(args, config, n_train)


@pytest.fixture(scope="module")
def qwen_4b():
    """Return a config with the sizes of Qwen/Qwen3.5-4B."""
    text = {
        "vocab_size": 248320, "hidden_size": 2560, "intermediate_size": 9216,
        "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return transformers.Qwen3_5Config(text_config=text, tie_word_embeddings=True)


def test_the_figures_of_the_real_model(qwen_4b, capsys):
    found = plan(qwen_4b)
    assert (found.trainable, found.total) == (10_616_832, 4_216_368_128)
    assert (found.steps, found.steps_per_epoch) == (750, 250)
    text = capsys.readouterr().out
    assert "trainable params: 10,616,832 || all params: 4,216,368,128 || trainable%: 0.2518" in text
    assert "750 steps, 250 an epoch: ceil(1,000 / (2 x 2)) x 3" in text
    assert "r=8 alpha=16, scale alpha/r = 2, dropout 0.05" in text
    absent = "24 of 32 layers are Gated DeltaNet, without q_proj, k_proj, v_proj, o_proj"
    assert absent in text
    rows = [line.split() for line in text.splitlines() if "/32 " in line]
    assert rows == [
        ["q_proj", "8/32", "self_attn", "8192x2560", "8x2560", "8192x8", "688,128"],
        ["k_proj", "8/32", "self_attn", "1024x2560", "8x2560", "1024x8", "229,376"],
        ["v_proj", "8/32", "self_attn", "1024x2560", "8x2560", "1024x8", "229,376"],
        ["o_proj", "8/32", "self_attn", "2560x4096", "8x4096", "2560x8", "425,984"],
        ["gate_proj", "32/32", "mlp", "9216x2560", "8x2560", "9216x8", "3,014,656"],
        ["up_proj", "32/32", "mlp", "9216x2560", "8x2560", "9216x8", "3,014,656"],
        ["down_proj", "32/32", "mlp", "2560x9216", "8x9216", "2560x8", "3,014,656"],
    ]
    assert max(map(len, text.splitlines())) <= 100


def tiny_config(kind, more=()):
    """Return the config of another architecture, with small sizes."""
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return getattr(transformers, f"{kind}Config")(**sizes | dict(more))


MOE = {"num_experts": 4, "moe_intermediate_size": 8}
# The first layer's feed-forward part is wider than the shared experts of the others.
TWO_SHAPES = ("Qwen2Moe", MOE | {"mlp_only_layers": [0], "shared_expert_intermediate_size": 16})
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 96}
SEVEN = t.LORA_TARGET_MODULES
COUNTED = {
    "Qwen3.5": (None, SEVEN),
    "Qwen3.5, attention only": (None, ["q_proj", "v_proj"]),
    "Qwen3.5, DeltaNet": (None, ["out_proj", "in_proj_qkv", "o_proj"]),
    "Llama, untied": (("Llama", {"tie_word_embeddings": False}), SEVEN),
    "Qwen3, tied": (("Qwen3", {"tie_word_embeddings": True}), SEVEN),
    "Gemma3, text": (("Gemma3Text", {"sliding_window": 8}), ["q_proj", "down_proj"]),
    "Phi3, fused": (("Phi3", {}), ["qkv_proj", "o_proj", "gate_up_proj"]),
    "GPT-NeoX": (("GPTNeoX", {}), ["query_key_value", "dense", "dense_4h_to_h"]),
    "MoE, attention": (("Qwen3Moe", MOE), SEVEN[:4]),
    "MoE, two shapes": (TWO_SHAPES, SEVEN),
}


@pytest.mark.parametrize("r", [1, 12])
@pytest.mark.parametrize("name", COUNTED)
def test_the_plan_counts_what_peft_counts(tiny, name, r):
    what, targets = COUNTED[name]
    config = tiny_config(*what) if what else AutoConfig.from_pretrained(tiny)
    found = plan(config, "--lora_r", r, "--lora_target_modules", *targets)
    model = AutoModelForCausalLM.from_config(config)
    model = get_peft_model(model, LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM"))
    assert (found.trainable, found.total) == model.get_nb_trainable_parameters()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_projj", "v_proj"], "no layer has q_projj; the layers have .*"),
        (["q_projj", "v_proj", "gate"], "no layer has q_projj, gate; the layers have "),
        (["xyzzy", "v_proj"], "no layer has xyzzy; the layers have down_proj, "),
        (["lm_head"], "no layer has lm_head; "),  # an nn.Linear, but of no layer
        (["embed_tokens"], "no layer has embed_tokens; "),
        (["self_attn"], "no layer has self_attn; "),
        (["model.layers.1.self_attn.q_proj"], "no layer has model.layers.1.self_attn.q_proj; "),
    ],
)
def test_a_target_that_no_layer_has_is_refused_before_anything_is_printed(
    tiny, capsys, targets, message
):
    config = AutoConfig.from_pretrained(tiny)
    found = stopped(plan, config, "--lora_target_modules", *targets)
    assert re.match(f"LORA_TARGET_MODULES: {message}", found)
    assert "have down_proj, gate_proj, in_proj_a, " in found  # each name once
    assert capsys.readouterr().out == ""


def test_phi3s_names_are_not_repeated():
    found = stopped(
        plan, tiny_config("Phi3"), "--lora_target_modules", "q_proj", "k_proj", "qkvproj"
    )
    names = ["q_proj, k_proj, qkvproj", "qkv_proj", "down_proj, gate_up_proj, o_proj, qkv_proj"]
    assert all(name in found for name in names)
    assert found.count("qkv_proj") == 1


def test_a_name_that_has_two_shapes_is_listed_once():
    found = stopped(plan, tiny_config(*TWO_SHAPES), "--lora_target_modules", "xyzzy")
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "shared_expert_gate"]
    assert found.endswith(f"the layers have {', '.join(names)}, up_proj, v_proj")


def test_a_model_without_linear_layers_is_refused_by_its_kind():
    """GPT-2's layers are Conv1D, whose weights lie the other way round."""
    config = transformers.GPT2Config(**GPT2)
    found = stopped(plan, config, "--lora_target_modules", "c_attn")
    assert "no layer has c_attn; " in found and "no nn.Linear: another model" in found


def test_a_target_named_twice_counts_once(tiny, capsys):
    config, flag = AutoConfig.from_pretrained(tiny), "--lora_target_modules"
    once = plan(config, flag, "up_proj")
    printed = capsys.readouterr().out
    assert plan(config, flag, "up_proj", "up_proj") == once
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("n", "batch", "accumulation", "epochs", "per_epoch", "formula"),
    [
        (1000, 2, 2, 3, 250, "ceil(1,000 / (2 x 2)) x 3"),
        (9, 2, 2, 1, 3, "ceil(9 / (2 x 2)) x 1"),
        (3, 4, 2, 2, 1, "ceil(3 / (4 x 2)) x 2"),
        (8, 1, 4, 2, 2, "ceil(8 / (1 x 4)) x 2"),
    ],
)
def test_steps_are_counted_and_their_formula_is_shown(
    tiny, capsys, n, batch, accumulation, epochs, per_epoch, formula
):
    flags = ["--batch_size", batch, "--gradient_accumulation_steps", accumulation]
    config = AutoConfig.from_pretrained(tiny)
    found = plan(config, *flags, "--num_epochs", epochs, n_train=n)
    assert (found.steps_per_epoch, found.steps) == (per_epoch, epochs * per_epoch)
    line = f"{epochs * per_epoch} steps, {per_epoch} an epoch: {formula}\n"
    assert line in capsys.readouterr().out


RANKS = [(1, 8), (2, 8), (4, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32), (33, 64), (65, 128)]
RANKS += [(128, 128), (129, 256), (257, 512), (321, 512), (512, 512)]


@pytest.mark.parametrize(("r", "rank"), RANKS)
def test_the_rank_flag_is_one_that_vllm_takes_and_large_enough(r, rank, tmp_path, capsys):
    flags = ["--lora_r", str(r), "--output_dir", str(tmp_path)]
    t.summarize(t.Job(t.parse_args(flags)))
    served = capsys.readouterr().out.split("vllm serve ")[1]
    assert re.findall(r" --max-lora-rank (\d+) ", served) == [str(rank)]


def test_only_models_with_deltanet_are_told_of_it_and_only_if_a_target_is_absent(tiny, capsys):
    config = AutoConfig.from_pretrained(tiny)
    for target, is_absent in {"up_proj": False, "in_proj_z": False, "q_proj": True}.items():
        plan(config, "--lora_target_modules", target)
        text = capsys.readouterr().out
        assert ("DeltaNet" in text) == is_absent == (f"DeltaNet, without {target}\n" in text)
    plan(tiny_config("Llama"))
    assert "DeltaNet" not in capsys.readouterr().out
    plan(
        tiny_config("Qwen3Next", MOE | {"num_hidden_layers": 4}), "--lora_target_modules", "o_proj"
    )
    assert "3 of 4 layers are Gated DeltaNet, without o_proj\n" in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_asks_no_gpu_and_writes_nothing(
    lines, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    output = tmp_path / "output"
    t.main([*lines(tmp_path), "--dry_run", "--device", "cuda", "--output_dir", str(output)])
    text = capsys.readouterr().out
    assert "trainable params: 30,720 || all params: 435,396 ||" in text
    assert "8 steps, 4 an epoch: ceil(13 / (2 x 2)) x 2" in text and "\ndevice " not in text
    assert not output.exists()


# ==== The GPU

FLA = ["fla", "causal_conv1d"]
NO_KERNEL = """CUDA error: no kernel image is available for execution on the device
Search for `cudaErrorNoKernelImageForDevice' in the documentation of CUDA for more information.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below
might be incorrect. For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that makes torch.cuda answer; it returns what was asked, in order.

    With each question stands CUDA_VISIBLE_DEVICES as it was then. What check_device() sets in the
    process is undone.
    """
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    del os.environ["CUDA_VISIBLE_DEVICES"]
    for name in FLA:
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]

    def fake(capability=(8, 0), count=1, name="NVIDIA Test", first=None):
        asked = []
        answers = {
            "init": None, "is_available": count > 0, "device_count": count, "get_device_name": name,
            "get_device_capability": capability, "mem_get_info": (3 * 2**30, 32 * 2**30),
        }  # fmt: skip
        for question, answer in answers.items():

            def reply(*_, question=question, answer=answer):
                asked.append((question, os.environ.get("CUDA_VISIBLE_DEVICES")))
                return answer

            monkeypatch.setattr(torch.cuda, question, reply)
        for question in ("ones", "zeros"):
            make = getattr(torch, question)

            def on_cpu(*size, device="cpu", make=make, question=question, **kinds):
                if str(device).startswith("cuda"):
                    asked.append((question, os.environ.get("CUDA_VISIBLE_DEVICES")))
                    if first:
                        raise first
                return make(*size, **kinds)

            monkeypatch.setattr(torch, question, on_cpu)
        return asked

    return fake


def check_device(*flags):
    return t.check_device(t.parse_args(list(flags)))


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (12, 0)])
def test_a_gpu_that_works_is_described(gpu, capability):
    gpu(capability, name="Tesla X")
    described = f"Tesla X, sm_{capability[0]}{capability[1]}"
    assert check_device() == described


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Put fake fla and causal_conv1d on the path; return what transformers makes of them."""
    from transformers.utils import import_utils as utils

    checks = [utils.is_flash_linear_attention_available, utils.is_causal_conv1d_available]
    for name in FLA:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text('__version__ = "0.5.0"\n')
    monkeypatch.syspath_prepend(tmp_path)
    cached = [*checks, utils.is_torch_cuda_available]
    for function in cached:
        function.cache_clear()
    yield lambda: [check() for check in checks]
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5)])
def test_below_sm_80_fla_stays_out_even_if_installed(gpu, installed, capability):
    gpu(capability)
    assert f"sm_{capability[0]}{capability[1]}" in check_device()
    for name in FLA:
        with pytest.raises(ImportError):
            importlib.import_module(name)
    assert installed() == [False, False]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
def test_from_sm_80_on_fla_is_used_if_installed(gpu, installed, capability):
    gpu(capability)
    check_device()
    assert [importlib.import_module(name).__version__ for name in FLA] == ["0.5.0", "0.5.0"]
    assert installed() == [True, True]


NVRM = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Jan 1 00:00:00 UTC 2026\nGCC 12.3\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs@x)\n"
TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Please update it."
NONE_HERE = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"
WITHOUT_A_GPU = {  # driver, CUDA_VISIBLE_DEVICES, what torch says; what to expect
    "driver too old": (
        NVRM.format("470.82.01"), None, RuntimeError(TOO_OLD),
        ["(The NVIDIA driver on your system is too old (found version 11040).", " 470.82.01 "],
    ),
    "open driver too old": (
        OPEN.format("560.35.03"), None, RuntimeError(TOO_OLD),
        ["; NVRM version: NVIDIA UNIX Open Kernel Module for x86_64 560.35.03 "],
    ),
    "no driver": (
        None, None, RuntimeError(NONE_HERE),
        ["(Found no NVIDIA driver on your system. ", "; no NVIDIA driver; "],
    ),
    "none visible": (
        OPEN.format("550.54.14"), "", RuntimeError("No CUDA GPUs are available"),
        ["(No CUDA GPUs are available); NVRM", " 550.54.14 "],
    ),
    "not that many": (
        OPEN.format("550.54.14"), "7", RuntimeError("No CUDA GPUs are available"),
        ["(No CUDA GPUs are available); NVRM", " 550.54.14 "],
    ),
    "a torch for CPUs": (
        NVRM.format("550.54.14"), None,
        AssertionError("Torch not compiled with CUDA enabled"),
        ["(Torch not compiled with CUDA enabled); NVRM version: ", " 550.54.14 "],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_A_GPU)
def test_without_a_gpu_it_is_said_why(gpu, monkeypatch, name):
    driver, visible, error, expected = WITHOUT_A_GPU[name]
    gpu(count=0)
    read = pathlib.Path.read_text

    def read_text(path, *args, **kwargs):
        if str(path) != "/proc/driver/nvidia/version":
            return read(path, *args, **kwargs)
        if driver is None:
            raise FileNotFoundError(path)
        return driver

    def init():
        raise error

    monkeypatch.setattr(pathlib.Path, "read_text", read_text)
    monkeypatch.setattr(torch.cuda, "init", init)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    message = stopped(check_device)
    assert message.startswith("DEVICE cuda: torch sees no GPU (")
    assert [part for part in expected if part not in message] == []
    assert ("; no NVIDIA driver;" in message) == (driver is None)
    advice = "; driver 525 or newer is needed (README.md), or --demo or --device cpu"
    assert message.endswith(f"; CUDA_VISIBLE_DEVICES={visible}{advice}")


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (12, 0)])
def test_a_wheel_without_the_gpus_kernels_is_refused_with_the_torch_to_install(gpu, capability):
    gpu(capability, first=RuntimeError(NO_KERNEL))
    message = stopped(check_device)
    assert f"torch does not run on NVIDIA Test, sm_{capability[0]}{capability[1]} " in message
    assert "no kernel image is available" in message and "TORCH_USE_CUDA_DSA" not in message
    assert 'pip install "torch>=2.7,<2.11"' in message and "sm_70 (V100)" in message


class Products(TorchDispatchMode):
    """Note the dtype of each matrix product; one that is not to work in bfloat16 fails."""

    def __init__(self, fails=()):
        super().__init__()
        self.fails, self.seen = fails, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "mm" in function.name():
            self.seen.append(result.dtype)
            if len(self.seen) in self.fails and result.dtype == torch.bfloat16:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLt")
        return result


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_trial_runs_a_product_in_dtype(gpu, dtype):
    """An emulated bf16 may fail where float32 does not."""
    asked = gpu((7, 0))
    with Products(fails=[1]) as products:
        if dtype == "float32":
            assert "sm_70" in check_device("--dtype", "float32") and products.seen
        else:
            message = stopped(check_device)
            assert "torch does not run on" in message and "NOT_SUPPORTED" in message
            assert len(products.seen) == 1
    assert {*products.seen} == {getattr(torch, dtype)}
    assert {"ones", "zeros"} & {question for question, _ in asked}  # made on the GPU


def test_an_error_that_cuda_reports_only_with_a_result_is_seen(gpu, monkeypatch):
    """Kernels run behind Python's back: that one failed is said when its result is asked for."""
    gpu()
    item = torch.Tensor.item

    def late(tensor):
        if products.seen:
            raise RuntimeError(NO_KERNEL)
        return item(tensor)

    monkeypatch.setattr(torch.Tensor, "item", late)
    with Products() as products:
        assert "no kernel image is available" in stopped(check_device)


def test_on_a_cpu_cuda_is_asked_nothing(gpu):
    asked = gpu(count=2)
    line = check_device("--device", "cpu", "--dtype", "float32")
    assert line == "CPU" and asked == [] and "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_gpu_that_is_full_is_told_to_be_freed(gpu, lines, tmp_path, capsys):
    gpu(first=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"))
    with pytest.raises(SystemExit) as stop:
        t.main([*lines(tmp_path), "--device", "cuda", "--output_dir", str(tmp_path / "output")])
    message = capsys.readouterr().err
    assert stop.value.code == 1 and message.count("\n") == 1
    assert "NVIDIA Test" in message and "(CUDA out of memory. Tried to allocate 2.00" in message
    assert message.endswith(", or free its memory\n")


@pytest.mark.parametrize(
    ("visible", "first"),
    [(None, "0"), ("3", "3"), ("", ""), ("2,3", "2"), ("GPU-5a,GPU-7c,GPU-9e", "GPU-5a")],
)
def test_only_the_first_gpu_is_visible(monkeypatch, visible, first):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    t.set_environment(t.parse_args([]))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == first


# ==== Config and tokenizer


def load(name, *flags):
    """Return (args, config, tokenizer)."""
    args = t.parse_args(["--model_name", str(name), *flags])
    return args, *t.load_config_and_tokenizer(args)


@pytest.fixture
def folder(tiny, tmp_path):
    """Return a copy of the demo model's folder without its weights."""
    without = shutil.ignore_patterns("*.safetensors")
    return shutil.copytree(tiny, tmp_path / "model", ignore=without)


def change(path, **values):
    values = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(values), encoding="utf-8")


def test_a_models_config_and_tokenizer_load_without_its_weights(folder):
    args, config, tokenizer = load(folder)
    assert config.model_type == "qwen3_5" and tokenizer.eos_token == "<|im_end|>"
    assert args.model_revision == "main"


NOWHERE = ["nobody/nothing", "nothing", "./no/such/folder", "a b", "/no/such/folder", "a/b/c"]


@pytest.mark.parametrize("name", NOWHERE)
def test_offline_a_model_that_is_nowhere_is_one_message_at_once(name):
    started = time.monotonic()
    message = stopped(load, name)
    assert time.monotonic() - started < 3
    assert message.startswith(f"MODEL_NAME {name}: no model (")
    assert message.endswith("); check the name, the folder or the network")


def test_without_a_network_a_model_that_is_nowhere_is_one_message_at_once(monkeypatch, tmp_path):
    """Without the one request that is made first, libraries would try for 25 s."""
    tried = []

    def down(*where, **_):
        tried.append(where)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", down)
    monkeypatch.setattr(socket.socket, "connect", down)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    message = stopped(load, "nobody/nothing")
    assert time.monotonic() - started < 3 and tried
    assert "MODEL_NAME nobody/nothing: " in message and "the network" in message
    assert "offline" not in message


COMMITS = {"main": "0123456789abcdef" * 2 + "01234567", "dev": "fedcba98" * 5}


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch):
    """Return the name of a model in the hub's cache, with two branches; dev has another theta."""
    cache = tmp_path / "hub" / "models--org--model"
    for branch, commit in COMMITS.items():
        shutil.copytree(tiny, cache / "snapshots" / commit)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / branch).write_text(commit)
    config = cache / "snapshots" / COMMITS["dev"] / "config.json"
    change(config, vision_start_token_id=7)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return "org/model"


@pytest.mark.parametrize(
    ("asked", "commit"),
    [(None, COMMITS["main"]), ("dev", COMMITS["dev"]), (COMMITS["dev"], COMMITS["dev"])],
)
def test_a_branch_becomes_the_commit_that_is_read(hub, asked, commit):
    args, config, _ = load(hub, *(["--model_revision", asked] if asked else []))
    assert (config.vision_start_token_id == 7) == (commit == COMMITS["dev"])
    assert args.model_revision == commit and type(args.model_revision) is str


def test_a_branch_that_moves_while_it_is_read_is_read_at_one_commit(hub, tmp_path, monkeypatch):
    real = AutoConfig.from_pretrained

    def moved(*args, **kwargs):
        config = real(*args, **kwargs)
        snapshot = tmp_path / "hub/models--org--model/snapshots" / COMMITS["dev"]
        change(snapshot / "tokenizer_config.json", eos_token="<|endoftext|>")
        (snapshot.parent.parent / "refs" / "main").write_text(COMMITS["dev"])
        return config

    monkeypatch.setattr(AutoConfig, "from_pretrained", moved)
    _, config, tokenizer = load(hub)
    assert config.vision_start_token_id != 7 and tokenizer.eos_token == "<|im_end|>"


def test_a_run_on_a_model_of_the_hub_records_and_serves_the_commit(hub, lines, tmp_path, capsys):
    output, commit = tmp_path / "output", COMMITS["dev"]
    flags = ["--model_name", hub, "--model_revision", "dev", "--num_epochs", "1"]
    t.main([*lines(tmp_path, train=2, evaluation=0), *flags, "--output_dir", str(output)])
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    saved = json.loads((output / "final_lora/adapter_config.json").read_text(encoding="utf-8"))
    served = re.search(r"vllm serve org/model --revision (\S+) ", capsys.readouterr().out)[1]
    found = {record["constants"]["MODEL_REVISION"], saved["revision"], served}
    assert found == {commit} and saved["base_model_name_or_path"] == hub


def no_config(folder):
    (folder / "config.json").unlink()
    return "config.json"


def cut_config(folder):
    (folder / "config.json").write_text('{"model_type": ')
    return "config.json"


def unknown_type(folder):
    change(folder / "config.json", model_type="qwen9")
    return "qwen9"


def cut_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    return "no model"


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    return "no model"


@pytest.mark.parametrize("spoil", [no_config, cut_config, unknown_type, cut_tokenizer, empty])
def test_what_is_broken_in_a_folder_is_said(folder, spoil):
    part = spoil(folder)
    message = stopped(load, folder)
    assert message.startswith(f"MODEL_NAME {folder}: no model (") and part in message


def test_a_folder_without_a_tokenizer_is_refused_before_the_data_is_blamed(folder):
    """Transformers makes an empty one then, for which each line is without its end of turn."""
    for path in folder.glob("tokenizer*"):
        path.unlink()
    message = stopped(load, folder)
    assert message.startswith(f"MODEL_NAME {folder}: no tokenizer, ")


def no_template(folder):
    (folder / "chat_template.jinja").unlink()


def no_end(folder):
    change(folder / "tokenizer_config.json", eos_token=None)


@pytest.mark.parametrize("spoil", [no_template, no_end])
def test_a_model_that_is_not_for_chat_is_refused(folder, spoil):
    spoil(folder)
    message = stopped(load, folder)
    fault = "no tokenizer, chat template or end of turn; use a chat model"
    assert message == f"MODEL_NAME {folder}: {fault}"


QUANTIZED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
}


@pytest.mark.parametrize("where", ["config", "text_config"])
@pytest.mark.parametrize("method", QUANTIZED)
def test_a_quantized_model_is_refused(folder, method, where):
    path, entry = folder / "config.json", {"quantization_config": QUANTIZED[method]}
    config = json.loads(path.read_text(encoding="utf-8"))
    change(path, **(entry if where == "config" else {where: config[where] | entry}))
    message = stopped(load, folder)
    assert f"MODEL_NAME {folder}: quantized; use the model that it was made from" in message


# ==== Code that a model folder brings


@pytest.fixture
def armed(tiny, tmp_path, monkeypatch):
    """Return (a demo model that asks for its own code to be run, the file which that writes)."""
    folder, marker = shutil.copytree(tiny, tmp_path / "armed"), tmp_path / "marker"
    cache = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
    code = f"open({str(marker)!r}, 'w').close()\n"
    code += "".join(f"class {name}: pass\n" for name in ("Config", "Model", "Tokenizer"))
    (folder / "evil.py").write_text(code, encoding="utf-8")
    tokenizer = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    maps = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"} | tokenizer
    change(folder / "config.json", auto_map=maps | {"AutoModelForCausalLM": "evil.Model"})
    change(folder / "tokenizer_config.json", auto_map=tokenizer)
    return folder, marker


def test_the_armed_model_does_run_code_where_that_is_allowed(armed):
    folder, marker = armed
    with pytest.raises(AttributeError):  # its class is no config
        AutoConfig.from_pretrained(folder, trust_remote_code=True).to_dict()
    assert marker.exists()


def test_code_beside_a_known_model_is_not_run(armed, lines, tmp_path):
    folder, marker = armed
    flags = [*lines(tmp_path, train=2, evaluation=0), "--num_epochs", "1"]
    t.main([*flags, "--model_name", str(folder), "--output_dir", str(tmp_path / "output")])
    assert (tmp_path / "output" / "final_lora").exists() and not marker.exists()


def test_a_model_that_needs_its_own_code_is_refused(armed):
    folder, marker = armed
    change(folder / "config.json", model_type="evil")
    assert f"MODEL_NAME {folder}: " in stopped(load, folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "attack", ["cycler.__init__.__globals__.os", "messages.__class__.__mro__[1].__subclasses__()"]
)
def test_a_chat_template_that_reaches_for_python_is_refused(
    folder, lines, tmp_path, capsys, attack
):
    marker = tmp_path / "marker"
    template = f"{{{{ {attack}.system('touch {marker}') }}}}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        t.main([*lines(tmp_path), "--dry_run", "--model_name", str(folder)])
    assert stop.value.code == 1 and not marker.exists()
    assert "the chat template refuses it" in capsys.readouterr().err


def test_the_demo_model_has_the_shape_of_the_hubs(tiny):
    """Wrapper, both kinds of layers and real head sizes: else the demo would show little."""
    config, tokenizer = AutoConfig.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    text = config.text_config
    assert config.architectures == ["Qwen3_5ForConditionalGeneration"]
    assert {*text.layer_types} == {"linear_attention", "full_attention"}
    assert (text.head_dim, text.linear_key_head_dim, text.linear_value_head_dim) == (256, 128, 128)
    assert text.tie_word_embeddings and len(tokenizer) <= text.vocab_size
