"""The command: a flag for each setting, what is refused, errors and statuses, the environment."""

import ast
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from conftest import ROOT, TOY
from runs import (
    ADAPTER,
    SETTINGS,
    command,
    command_of,
    edited_script,
    prepared,
    read_record,
    refused,
    replace_ours,
    run,
    send,
    settings_of,
)
from transformers.integrations import integration_utils

import train_lora_single as script
from train_lora import environment
from train_lora.console import UserError
from train_lora.device import prepare_device
from train_lora.stopping import Stop, Stopped, catch_signals

SCRIPT = Path(script.__file__)
SOURCE = SCRIPT.read_text(encoding="utf-8")
HELLO = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
ARTICLE = {  # as the article says, and as the file is shipped
    "MODEL_NAME": "Qwen/Qwen3.5-4B", "DTYPE": "bfloat16", "DEVICE": "cuda", "MAX_SEQ_LEN": 512,
    "LORA_R": 8, "LORA_ALPHA": 16, "LORA_DROPOUT": 0.05, "NUM_EPOCHS": 3, "MAX_STEPS": 0,
    "LORA_TARGET_MODULES": [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    ],
    "BATCH_SIZE": 2, "GRADIENT_ACCUMULATION_STEPS": 2, "LEARNING_RATE": 2e-4, "SEED": 42,
    "LR_SCHEDULER_TYPE": "cosine", "WARMUP_RATIO": 0.03, "USE_FLA": False, "MATMUL": "auto",
}  # fmt: skip
OTHER_CHOICE = {
    "DTYPE": "float32", "DEVICE": "cpu", "REPLIES": "last", "LR_SCHEDULER_TYPE": "linear",
    "FINAL_LORA": "best", "REPORT_TO": "tensorboard", "MATMUL": "native",
    "CHAT_TEMPLATE": "one_pass", "START_FROM": "an-adapter",
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_a_folder(in_the_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t").write_text((json.dumps({"messages": HELLO}) + "\n") * 8)


FILES = ["--model_name", TOY, "--train_file", "t", "--eval_file", ""]
RUN = [*FILES, "--device", "cpu", "--dtype", "float32", "--learning_rate", "1e-2"]
RUN += ["--output_dir", "output", "--max_steps", "2", "--save_steps", "1"]


def another(name):
    """Return a valid value that is not the setting's own."""
    value = getattr(script, name)
    if name in OTHER_CHOICE:
        return OTHER_CHOICE[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"another/{name}"
    if isinstance(value, list):
        return ["up_proj", "k_proj"]
    return value + 1 if isinstance(value, int) else value / 2


def statements():
    """Return {name: the text of its assignment} of the settings."""
    nodes = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.Assign)]
    lines = SOURCE.splitlines()
    texts = {
        ast.unparse(one.targets[0]): "\n".join(lines[one.lineno - 1 : one.end_lineno])
        for one in nodes
    }
    return {name: texts[name] for name in SETTINGS}


TRAVEL = {"names", "sources"}  # with the settings


def test_the_shipped_settings_are_the_articles():
    given = vars(settings_of())
    assert {name: given[name] for name in ARTICLE} == ARTICLE
    assert given.keys() == {*SETTINGS} | {"dry_run", "edited_code", *TRAVEL}
    assert not given["dry_run"]


@pytest.fixture
def an_adapter():
    """Have a file where START_FROM must have one."""
    Path("an-adapter").mkdir()
    Path("an-adapter/adapter_model.safetensors").touch()


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_is_a_flag_of_its_type_with_hyphens_or_underscores(name, an_adapter):
    shipped, value = vars(settings_of()), another(name)
    words = [*map(str, value)] if isinstance(value, list) else [str(value)]
    for flag in (f"--{name.lower()}", f"--{name.lower().replace('_', '-')}"):
        given = vars(settings_of(flag, *words))
        assert given == shipped | {name: value}
        assert type(given[name]) is type(shipped[name])


@pytest.mark.parametrize("middle", [" = ", ": object = "])
def test_a_line_typed_over_another_without_its_comment_is_the_default(middle, tmp_path, an_adapter):
    mine = {name: another(name) for name in SETTINGS}
    changes = [(text, f"{name}{middle}{mine[name]!r}") for name, text in statements().items()]
    copy = edited_script(tmp_path, *changes)
    assert vars(settings_of(script=copy)).items() >= mine.items()
    assert settings_of("--lora_r", "4", script=copy).LORA_R == 4


def test_a_new_setting_needs_one_line_and_one_use(tmp_path, capfd):
    """The flag, run.json and the comparison of jobs follow. One that nothing reads is named."""
    seed, rate = statements()["SEED"], "        learning_rate=settings.LEARNING_RATE,\n"
    changes = [(seed, f"{seed}\nWEIGHT_DECAY = 0.0\nNEVER_READ = 1")]
    changes.append((rate, f"{rate}        weight_decay=settings.WEIGHT_DECAY,\n"))
    copy = edited_script(tmp_path, *changes)
    for value in ("x", "0,3"):  # the latter is a tuple to Python
        refused(capfd, ["--weight_decay", value], "WEIGHT_DECAY", status=2, main=command_of(copy))
    decays = []
    with pytest.MonkeyPatch.context() as patch:
        see = lambda *_, optimizer, **__: decays.append(optimizer.param_groups[0]["weight_decay"])  # noqa: E731
        patch.setattr(transformers.TrainerCallback, "on_pre_optimizer_step", see)
        end = command(capfd, [*RUN, "--weight_decay", "0.5"], command_of(copy))
    assert end.status == 0 and {*decays} == {0.5}
    assert "NEVER_READ" in end.out and "WEIGHT_DECAY" not in end.out
    found = read_record(Path("output"))["settings"]
    assert found.keys() == {*SETTINGS} | {"WEIGHT_DECAY", "NEVER_READ"}
    assert found["WEIGHT_DECAY"] == 0.5
    jobs = [prepared([*RUN, "--weight_decay", value], copy) for value in ("0.5", "0.25")]
    assert jobs[0].folder.name != jobs[1].folder.name


WRONG_CONSTANTS = [
    ("LORA_R", "8"), ("LORA_R", True), ("LORA_R", 513), ("BATCH_SIZE", 2.0), ("SEED", -1),
    ("LEARNING_RATE", "2e-4"), ("LEARNING_RATE", float("nan")), ("LEARNING_RATE", 2),
    ("LORA_ALPHA", 0), ("LORA_DROPOUT", 1.0), ("WARMUP_RATIO", 3), ("MAX_STEPS", -1),
    ("LORA_TARGET_MODULES", "all-linear"), ("LORA_TARGET_MODULES", []),
    ("LORA_TARGET_MODULES", ["q_proj", 3]), ("DEVICE", "cud"), ("USE_FLA", "False"),
    ("ENABLE_THINKING", 0), ("OUTPUT_DIR", None), ("EVAL_FILE", "51%"), ("EVAL_FILE", 0.1),
    ("CHAT_TEMPLATE", "nowhere"), ("START_FROM", "nowhere"),
]  # fmt: skip


@pytest.mark.parametrize("name, value", WRONG_CONSTANTS)
def test_a_constant_that_cannot_be_is_named_first_of_all(monkeypatch, capfd, name, value):
    monkeypatch.setattr(script, name, value)
    refused(capfd, [], name, status=2)
    assert {path.name for path in Path.cwd().iterdir()} == {"t"}


WRONG_FLAGS = {  # and what is named
    "--lora_rank 3": "--lora_rank", "--lora_al 3": "--lora_al",  # no abbreviations are taken
    "--lr 1e-3": "--lr --learning_rate", "--epochs 2": "--epochs --num_epochs",
    "stray": "stray", "--lora_r 8.5": "LORA_R", "--learning_rate fast": "LEARNING_RATE",
    "--use_fla perhaps": "USE_FLA", "--device tpu": "DEVICE tpu",
    "--device cuda:1": "DEVICE CUDA_VISIBLE_DEVICES",
    "--final_lora best --eval_file=": "FINAL_LORA EVAL_FILE",
    "--eval_file=10.5%": "EVAL_FILE 10.5%", "--lora_r 0 --save_steps 0": "LORA_R SAVE_STEPS",
}  # fmt: skip


@pytest.mark.parametrize("argv", WRONG_FLAGS)
def test_a_wrong_flag_is_named_and_touches_nothing(argv, capfd):
    refused(capfd, argv.split(), *WRONG_FLAGS[argv].split(), status=2)
    assert {path.name for path in Path.cwd().iterdir()} == {"t"}


@pytest.mark.parametrize("name", ["MODEL_NAME", "TRAIN_FILE", "EVAL_FILE", "OUTPUT_DIR"])
def test_a_path_may_begin_with_the_home_folder(name, monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    given = vars(settings_of(f"--{name.lower()}=~/mine"))
    assert given[name] == str(Path.cwd() / "mine")


ALLOCATORS = [  # the kernel, what the user has set, and whether segments are made expandable
    ("6.8.0-generic", {}, True),
    ("5.15.0-microsoft-standard-WSL2", {}, False),
    ("6.8.0-generic", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"}, False),
    ("6.8.0-generic", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, False),
]


@pytest.mark.parametrize("kernel, own, is_set", ALLOCATORS)
def test_a_users_allocator_and_wsls_are_left_alone(kernel, own, is_set, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment, "IS_WSL", "microsoft" in kernel)
    environment.prepare()
    names = {name: os.environ[name] for name in os.environ if name.endswith("ALLOC_CONF")}
    assert names == ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if is_set else own)


def test_the_demo_is_a_small_model_on_a_cpu_and_flags_beside_it_win(capfd):
    """It works from any folder, and a dry run writes nothing."""
    given = settings_of("--demo", "--lora_r", "3")
    assert (given.DEVICE, given.LORA_R) == ("cpu", 3) and given.OUTPUT_DIR != script.OUTPUT_DIR
    assert Path(given.MODEL_NAME).is_dir() and Path(given.TRAIN_FILE).is_file()
    assert run(["--demo", "--dry_run", *FILES]) == 0
    assert {path.name for path in Path.cwd().iterdir()} == {"t"}


@pytest.mark.parametrize("how", ["the user", "Ctrl-C", "a bug"])
def test_how_a_run_ended_is_its_status_and_stands_in_its_record(how, monkeypatch, capfd):
    errors = {"the user": UserError("LORA_R"), "a bug": ZeroDivisionError("a bug")}
    action = Mock(side_effect=errors[how]) if how in errors else send(signal.SIGINT)
    replace_ours(monkeypatch, "build_trainer", action)
    end = command(capfd, RUN)
    assert end.status == (130 if how == "Ctrl-C" else 1)
    assert ("Traceback" in end.err) == (how == "a bug")
    outcome = read_record(Path("output"))["outcome"]
    assert outcome.startswith("interrupted: " if how == "Ctrl-C" else "failed: ")
    log = Path("output/all_logs.log").read_text(encoding="utf-8")
    assert how != "a bug" or "ZeroDivisionError" in log


def plan_in(printed):
    return re.search(r"(?ms)^plan .*?(?=^\S)", printed)[0]


def test_a_run_writes_what_it_prints_as_the_dry_run_did_and_tells_a_tracker(monkeypatch, capfd):
    """The tracker's package is made up, and transformers' callback for it a recorder."""
    told = []

    class Recorder(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            told.append((args.run_name, state.global_step, logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Recorder)
    Path("e").write_bytes(Path("t").read_bytes())
    flags = [*RUN, "--output_dir", "out/a-run", "--eval_file", "e", "--report_to", "tensorboard"]
    dry = command(capfd, [*flags, "--dry_run"])
    assert {path.name for path in Path.cwd().iterdir()} == {"t", "e"} and told == []
    end = command(capfd, flags)
    assert dry.status == 0 and plan_in(dry.out) == plan_in(end.out)
    log = Path("out/a-run/all_logs.log").read_text()
    assert end.status == 0 and all(line in log for line in end.out.splitlines())
    assert {name for name, *_ in told} == {"a-run"}
    assert [step for _, step, logs in told if "loss" in logs] == [1, 2]
    assert [step for _, step, logs in told if "eval_loss" in logs] == [0, 2]


@pytest.mark.parametrize(
    "number, is_launched, is_heard",
    [(signal.SIGTERM, False, True), (signal.SIGTERM, True, False), (signal.SIGHUP, False, False)],
)
def test_a_second_signal_is_heard_but_where_it_may_be_the_first(
    number, is_launched, is_heard, monkeypatch
):
    """A launcher passes on what its process has had; a closed terminal sends SIGHUP twice."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if is_launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        monkeypatch.setenv("RANK", "0")
    stop = Stop(finish_first="the step")
    catch_signals(stop)
    send(number)()
    assert stop.signal == number
    with pytest.raises(Stopped) if is_heard else contextlib.nullcontext():
        send(number)()


FLA = {  # where USE_FLA is on: the capability, whether fla is installed, and whether it is used
    "Ampere": ((8, 0), True, True),
    "not installed": ((8, 0), False, False),
    "Volta": ((7, 0), True, False),
    "Hopper": ((9, 0), True, False),
    "a CPU": (None, True, False),
}


@pytest.mark.parametrize("case", FLA)
@pytest.mark.parametrize("is_asked", [True, False])
def test_fla_is_there_where_it_is_right(case, is_asked, gpu, tmp_path, monkeypatch):
    """transformers takes it wherever it can be imported; causal_conv1d is never wanted."""
    capability, is_installed, may_be = FLA[case]
    if is_installed:
        (tmp_path / "fla.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
    for name in ("fla", "causal_conv1d"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if capability:
        gpu(capability)
    device = ["--device", "cuda" if capability else "cpu"]
    settings = settings_of(*FILES, *device, "--use_fla", str(is_asked))
    prepare_device(settings)
    is_blocked = "fla" in sys.modules and sys.modules["fla"] is None
    assert is_blocked != (is_asked and may_be)
    assert sys.modules["causal_conv1d"] is None


def test_float32_is_float32_and_cudnns_attention_is_off():
    """As in NVIDIA's containers, and in torch 2.9 on an H100."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(True)
    prepare_device(settings_of(*RUN))
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    ("visible", "is_launched", "left"),
    [(None, False, "0"), ("2,3", False, "2"), ("", False, ""), ("2,3", True, "2,3")],
)
def test_without_a_launcher_one_gpu_is_visible(visible, is_launched, left, monkeypatch):
    """A library that starts the driver with several would keep them."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if is_launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    environment.prepare()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


SPY = """
import json, os, runpy, sys

class Spy:
    def find_spec(name, *_):
        if name in ("torch", "accelerate", "peft", "transformers", "huggingface_hub"):
            print(json.dumps(dict(os.environ)))
            raise SystemExit

sys.meta_path.insert(0, Spy)
sys.path.insert(0, os.getcwd())
"""
RUNS = {
    "script": "runpy.run_path('train_lora_single.py', run_name='__main__')",
    "tool": "runpy.run_module('inspect_lora', run_name='__main__')",
    "import": "import train_lora_single",
}


@pytest.mark.parametrize("how", RUNS)
def test_both_commands_prepare_the_environment_before_the_libraries_and_an_import_does_not(how):
    """A library that starts the driver with several GPUs would keep them."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("USE_HUB")}
    own |= {"CUDA_VISIBLE_DEVICES": "2,3"}
    words = [sys.executable, "-c", SPY + RUNS[how], "evidence", "nowhere"] if how == "tool" else []
    words = words or [sys.executable, "-c", SPY + RUNS[how]]
    done = subprocess.run(words, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    is_prepared = how != "import"
    assert found["CUDA_VISIBLE_DEVICES"] == ("2" if is_prepared else "2,3")
    assert ("USE_HUB_KERNELS" in found) == is_prepared


def test_what_other_work_left_changes_nothing(finished, stopped, tmp_path, monkeypatch):
    left = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "1"}
    left |= {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    output = shutil.copytree(stopped.output, tmp_path / "output")
    assert run([*stopped.flags, "--output_dir", output]) == 0
    assert (output / ADAPTER).read_bytes() == (finished.output / ADAPTER).read_bytes()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_model_that_is_divided_among_gpus_is_refused(kind, capfd, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", f"ACCELERATE_USE_{kind}"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANK", "0")
    refused(capfd, RUN, "torchrun")
