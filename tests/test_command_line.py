"""The command: a flag for each setting, what is refused, errors and statuses, the environment."""

import ast
import contextlib
import importlib.metadata
import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from conftest import ROOT, TINY
from packaging.requirements import Requirement
from processes import run_in_a_fork
from torch.overrides import TorchFunctionMode
from trainers import edited_script
from transformers.integrations import integration_utils

import train_lora_single as t

SCRIPT = Path(t.__file__)
SOURCE = SCRIPT.read_text(encoding="utf-8")
STATEMENTS = {
    node.target.id: node for node in ast.parse(SOURCE).body if isinstance(node, ast.AnnAssign)
}

# As the article says, and as the file is shipped.
SHIPPED = {
    "MODEL_NAME": "Qwen/Qwen3.5-4B",
    "MODEL_REVISION": "main",
    "DTYPE": "bfloat16",
    "DEVICE": "cuda",
    "TRAIN_FILE": "data/train.jsonl",
    "EVAL_FILE": "data/eval.jsonl",
    "REPLIES": "all",
    "MAX_SEQ_LEN": 512,
    "LORA_R": 8,
    "LORA_ALPHA": 16,
    "LORA_DROPOUT": 0.05,
    "LORA_TARGET_MODULES": [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    ],
    "NUM_EPOCHS": 3,
    "MAX_STEPS": 0,
    "BATCH_SIZE": 2,
    "GRADIENT_ACCUMULATION_STEPS": 2,
    "LEARNING_RATE": 2e-4,
    "LR_SCHEDULER_TYPE": "cosine",
    "WARMUP_RATIO": 0.03,
    "SEED": 42,
    "OUTPUT_DIR": "output",
    "LOGGING_STEPS": 10,
    "SAVE_STEPS": 50,
    "FINAL_LORA": "last",
    "REPORT_TO": "none",
    "MATMUL": "auto",
}  # fmt: skip
CHOICES = {
    "DTYPE": ["bfloat16", "float32"],
    "DEVICE": ["cuda", "cpu"],
    "REPLIES": ["all", "last"],
    "LR_SCHEDULER_TYPE": ["cosine", "linear", "constant_with_warmup"],
    "FINAL_LORA": ["last", "best"],
    "REPORT_TO": ["none", "tensorboard", "wandb", "trackio"],
    "MATMUL": ["auto", "native", "float16"],
}
COUNTS = ["MAX_SEQ_LEN", "LORA_R", "LORA_ALPHA", "NUM_EPOCHS", "BATCH_SIZE", "SAVE_STEPS"]
COUNTS += ["GRADIENT_ACCUMULATION_STEPS", "LOGGING_STEPS"]
MODES = {"demo": False, "dry_run": False}
HELLO = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]


@pytest.fixture(autouse=True)
def in_a_folder(in_the_root, restored_environment, tmp_path, monkeypatch):
    """Work in a folder with eight lines, and leave the environment as it was."""
    monkeypatch.chdir(tmp_path)
    Path("t").write_text((json.dumps({"messages": HELLO}) + "\n") * 8)


FILES = ["--model_name", TINY, "--train_file", "t", "--eval_file", ""]
RUN = ["--demo", *FILES, "--output_dir", "output", "--max_steps", "2", "--save_steps", "1"]


def another(name):
    """Return a valid value that is not the setting's own."""
    value = SHIPPED[name]
    if name in CHOICES:
        return CHOICES[name][-1] if value != CHOICES[name][-1] else CHOICES[name][0]
    if isinstance(value, str):
        return f"another/{name}"
    if isinstance(value, list):
        return ["up_proj", "k_proj"]
    return value + 1 if isinstance(value, int) else value / 2


def words(value):
    return list(map(str, value if isinstance(value, list) else [value]))


def line_of(name):
    """Return the line of a setting, or its lines."""
    node = STATEMENTS[name]
    return "\n".join(SOURCE.splitlines()[node.lineno - 1 : node.end_lineno])


def failing(error):
    """Return a function that raises error."""

    def fail(*_, **__):
        raise error

    return fail


def refusal(main, argv, capsys, status=2):
    """Return what is said, on one line, when main(argv) exits with this status."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    said = capsys.readouterr().err
    if isinstance(stop.value.code, str):  # Python prints it, and exits with 1
        assert status == 1
        return stop.value.code
    assert stop.value.code == status
    return " ".join((said.partition("error: ")[2] if status == 2 else said).split())


# ---- settings and their flags -------------------------------------------------------------------


def test_the_shipped_defaults_are_the_articles():
    assert vars(t.parse_settings([])) == SHIPPED | MODES


def test_each_setting_is_a_flag_of_its_type():
    for name in SHIPPED:
        value, flag = another(name), f"--{name.lower()}"
        given = vars(t.parse_settings([flag, *words(value)]))
        assert given == SHIPPED | MODES | {name: value}
        assert type(given[name]) is type(SHIPPED[name])
        if not isinstance(value, list):
            assert vars(t.parse_settings([f"{flag}={value}"]))[name] == value


def test_help_shows_each_settings_comment_choices_and_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        t.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    said = {row.split()[0]: " ".join(row.split()) for row in re.split(r"\n  (?=-)", out)}
    for name, value in SHIPPED.items():
        comment = line_of(name).splitlines()[0].partition("  # ")[2]
        shown = said[f"--{name.lower()}"]
        assert len(comment) > 8 and shown.endswith(f" {comment} [{' '.join(words(value))}]")
        assert name not in CHOICES or "|".join(CHOICES[name]) in shown
    assert {"--demo", "--dry_run"} < said.keys() and all(name in said["--demo"] for name in t.DEMO)
    assert "python train_lora_single.py --dry_run" in out


def test_constants_edited_in_the_file_are_the_defaults_of_their_flags(tmp_path, capsys):
    changes = []
    for name in SHIPPED:
        kind = ast.unparse(STATEMENTS[name].annotation)
        changes.append((line_of(name), f"{name}: {kind} = {another(name)!r}  # mine %"))
    copy = edited_script(tmp_path, *changes)
    mine = {name: another(name) for name in SHIPPED}
    assert vars(copy.parse_settings([])) == mine | MODES
    assert copy.parse_settings(["--lora_r", "4"]).LORA_R == 4
    with pytest.raises(SystemExit):
        copy.parse_settings(["--help"])
    assert "mine % [another/OUTPUT_DIR]" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("LORA_R", "8", "integer"),
        ("LORA_R", True, "integer"),
        ("LORA_R", 513, "512"),
        ("SEED", 42.0, "integer"),
        ("SEED", -1, "0"),
        ("SEED", 2**32, "4294967295"),
        ("MAX_STEPS", -1, "0"),
        ("SAVE_STEPS", 2**31, "2147483647"),
        ("LEARNING_RATE", "2e-4", "number"),
        ("LEARNING_RATE", True, "number"),
        ("LEARNING_RATE", float("nan"), "than"),
        ("LEARNING_RATE", 0, "greater than 0"),
        ("LEARNING_RATE", 1, "less than 1"),
        ("LORA_DROPOUT", 1.0, "less than 1"),
        ("WARMUP_RATIO", -0.1, "0"),
        ("LORA_TARGET_MODULES", "all-linear", "list"),
        ("LORA_TARGET_MODULES", ["q_proj", 3], "string"),
        ("LORA_TARGET_MODULES", [], "at least 1"),
        ("DEVICE", "cud", "'cuda' or 'cpu'"),
        ("OUTPUT_DIR", Path("output"), "string"),
        *((name, "", "at least 1") for name in ("MODEL_NAME", "TRAIN_FILE", "OUTPUT_DIR")),
        *((name, 0, "1") for name in COUNTS),
    ],
)
def test_a_constant_edited_to_what_it_cannot_be_is_refused(monkeypatch, capsys, name, value, rule):
    monkeypatch.setattr(t, name, value)
    said = refusal(t.main, ["--dry_run"], capsys, status=1)
    assert f"{name} is {value!r}: " in said and rule in said.partition(": ")[2]


def test_values_at_the_edge_of_what_is_allowed_are_taken(monkeypatch):
    edges = {
        "LORA_R": (1, 512), "SEED": (0, 2**32 - 1), "MAX_STEPS": (0, 2**31 - 1),
        "LEARNING_RATE": (1e-9, 0.99), "LORA_DROPOUT": (0.0, 0.99), "WARMUP_RATIO": (0.0, 0.99),
        "EVAL_FILE": ("", "1%", "50%", "10 %"), **{name: (1,) for name in COUNTS}, **CHOICES,
    }  # fmt: skip
    for name, values in edges.items():
        for value in values:
            given = ["--eval_file", "e", f"--{name.lower()}={value}"]
            assert vars(t.parse_settings(given))[name] == value
    monkeypatch.setattr(t, "LORA_DROPOUT", 0)  # a whole number is a number
    assert t.parse_settings([]).LORA_DROPOUT == 0.0


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("--lora_rank 3", ["--lora_rank"]),
        ("--lora_al 3", ["--lora_al"]),  # no abbreviations are taken
        ("--LORA_R 3", ["--LORA_R"]),
        ("stray", ["stray"]),
        ("--lora_r 8 16", ["16"]),
        ("--lora_r", ["--lora_r", "argument"]),
        ("--lora_r 8.5", ["LORA_R is '8.5'", "integer"]),
        ("--lora_r 0", ["LORA_R is '0'", "1"]),
        ("--learning_rate fast", ["LEARNING_RATE is 'fast'", "number"]),
        ("--learning_rate=nan", ["LEARNING_RATE is 'nan'"]),
        ("--learning_rate=-1", ["LEARNING_RATE is '-1'", "greater than 0"]),
        ("--device tpu", ["DEVICE is 'tpu'", "'cuda' or 'cpu'"]),
        ("--model_name=", ["MODEL_NAME is ''"]),
        ("--lora_target_modules=", ["LORA_TARGET_MODULES"]),
        ("--dry_run=1", ["--dry_run"]),
        ("--lora_r 0 --seed x --save_steps 0", ["LORA_R is", "SEED is 'x'", "SAVE_STEPS is"]),
        ("--final_lora best --eval_file=", ["FINAL_LORA", "EVAL_FILE"]),
        ("--publish best", ["--publish is called --final_lora now"]),
        ("--publish=best", ["--publish is called --final_lora now"]),
        *((f"--eval_file={share}", ["EVAL_FILE is", share, '"1%" to "50%"'])
          for share in ("0%", "51%", "10.5%", "x%", "-5%")),
        ("--final_lora best --eval_file= --train_file=", ["TRAIN_FILE is ''"]),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_named_with_status_2_and_touches_nothing(argv, parts, capsys, tmp_path):
    before = {*tmp_path.iterdir()}
    said = refusal(t.main, argv.split(), capsys)
    assert [part for part in parts if part not in said] == []
    assert {*tmp_path.iterdir()} == before


def test_all_wrong_constants_are_named_at_once(tmp_path, capsys):
    """As in a script that was edited wrongly."""
    seed, device = (line_of(name).split(" = ")[0] for name in ("SEED", "DEVICE"))
    changes = [(line_of("SEED"), f'{seed} = "x"'), (line_of("DEVICE"), f"{device} = 'tpu'")]
    said = refusal(edited_script(tmp_path, *changes).main, ["--dry_run"], capsys, status=1)
    assert "SEED is 'x'" in said and "DEVICE is 'tpu'" in said and said.count("\n") == 1


@pytest.mark.parametrize("how", ["the same", "a dot", "absolute", "symlink", "hard link"])
def test_a_file_is_not_held_out_from_itself(how, capsys):
    other = {"the same": "t", "a dot": "./t", "absolute": os.path.abspath("t")}.get(how, "e")
    if how == "symlink":
        Path("e").symlink_to("t")
    elif how == "hard link":
        Path("e").hardlink_to("t")
    said = refusal(t.main, ["--dry_run", "--train_file", "t", "--eval_file", other], capsys)
    assert "EVAL_FILE is TRAIN_FILE" in said and '"10%"' in said
    Path("copy").write_bytes(Path("t").read_bytes())
    t.parse_settings(["--train_file", "t", "--eval_file", "copy"])


def test_flags_may_be_typed_with_hyphens():
    settings = t.parse_settings(["--lora-r", "4", "--eval-file=my-held-out.jsonl", "--dry-run"])
    assert (settings.LORA_R, settings.EVAL_FILE, settings.dry_run) == (4, "my-held-out.jsonl", True)


# ---- --demo -------------------------------------------------------------------------------------


def test_demo_changes_what_it_lists_and_any_flag_beside_it_wins():
    demo = vars(t.parse_settings(["--demo"]))
    changed = {name for name in SHIPPED if demo[name] != SHIPPED[name]}
    assert changed == t.DEMO.keys() and demo["DEVICE"] == "cpu"
    assert demo["OUTPUT_DIR"] != SHIPPED["OUTPUT_DIR"]
    for name in changed:
        given = [f"--{name.lower()}", str(SHIPPED[name])]
        for argv in ([*given, "--demo"], ["--demo", *given]):
            assert vars(t.parse_settings(argv)) == demo | {name: SHIPPED[name]}


def test_the_demo_works_from_another_folder_and_its_dry_run_writes_nothing(tmp_path):
    """The command itself, in a process of its own: python FILE --demo --dry_run."""
    assert all(Path(t.DEMO[name]).is_file() for name in ("TRAIN_FILE", "EVAL_FILE"))
    here = {*tmp_path.iterdir()}
    command = [sys.executable, str(SCRIPT), "--demo", "--dry_run", "--train_file", "t"]
    done = run_in_a_fork([*command, "--eval_file", ""], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search("(?m)^demo .* toy ", done.stdout) and "trainable params" in done.stdout
    assert "Nothing was trained" in done.stdout and {*tmp_path.iterdir()} == here


def test_the_demo_is_shorter_than_one_epoch(capsys):
    t.main(["--demo", "--dry_run"])
    examples = len(Path(t.DEMO["TRAIN_FILE"]).read_text(encoding="utf-8").splitlines())
    said = " ".join(capsys.readouterr().out.split())
    assert f"limited by MAX_STEPS (the full epochs would take {examples // 4})" in said


def test_only_the_toy_is_called_one(capsys):
    t.main(["--demo", *FILES, "--dry_run"])
    assert "toy" not in capsys.readouterr().out


# ---- settings that a user adds ------------------------------------------------------------------


def test_a_setting_needs_one_line_and_one_use(tmp_path, monkeypatch, capsys):
    """The flag, its help, the check, run.json, and the refusal of a checkpoint follow from it."""
    copy = edited_script(
        tmp_path,
        (line_of("SEED"), f"{line_of('SEED')}\nWEIGHT_DECAY: Share = 0.0  # of A and B\n"
         'HF_TOKEN = "hf_abc"'),
        ("        learning_rate=settings.LEARNING_RATE,\n",
         "        learning_rate=settings.LEARNING_RATE,\n"
         "        weight_decay=settings.WEIGHT_DECAY,\n"),
    )  # fmt: skip
    for argv in (["--weight_decay", "x"], ["--weight_decay", "1"], ["--hf_token", "x"]):
        assert argv[0].strip("-") in refusal(copy.main, argv, capsys).lower()
    with pytest.raises(SystemExit):
        copy.parse_settings(["--help"])
    assert re.search(r"--weight_decay VALUE\s+of A and B \[0\.0\]", capsys.readouterr().out)
    with monkeypatch.context() as patch:
        patch.setattr(copy, "WEIGHT_DECAY", "0.1")
        assert "WEIGHT_DECAY is '0.1'" in refusal(copy.main, RUN, capsys, status=1)
    optimizers = []
    make_optimizer = torch.optim.AdamW.__init__

    def remember(self, *args, **options):
        make_optimizer(self, *args, **options)
        optimizers.append(self)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", remember)
    with monkeypatch.context() as patch:  # the checkpoints stay, and no run is finished
        patch.setattr(copy, "save_final_lora", failing(copy.UserError("not yet")))
        refusal(copy.main, [*RUN, "--weight_decay", "0.5"], capsys, status=1)
    assert 0.5 in {group["weight_decay"] for group in optimizers[0].param_groups}
    said = refusal(copy.main, [*RUN, "--weight_decay", "0.25"], capsys, status=1)
    assert "WEIGHT_DECAY was 0.5 and is now 0.25" in said
    copy.main([*RUN, "--weight_decay", "0.5"])
    record = json.loads(Path("output/run.json").read_bytes())
    assert record["resumed_from"] and record["settings"]["WEIGHT_DECAY"] == 0.5
    assert record["settings"].keys() == SHIPPED.keys() | {"WEIGHT_DECAY"}
    files = [path for path in Path("output").rglob("*") if path.is_file()]
    assert len(files) > 8
    assert [path for path in files if re.search(rb"hf_abc|HF_TOKEN", path.read_bytes())] == []


def test_a_new_setting_may_be_a_switch_a_list_a_limit_or_a_choice(tmp_path, capsys):
    lines = "FAST: bool = False  # hurry\nLEVEL: Literal[1, 2] = 1  # of care\n"
    lines += "TAGS: list[str] = []\nMOST: float | None = None  # or none"
    copy = edited_script(tmp_path, (line_of("SEED"), f"{line_of('SEED')}\n{lines}"))
    given = copy.parse_settings(["--fast", "true", "--tags", "a", "b", "--most", "0.5"])
    assert (given.FAST, given.TAGS, given.MOST, given.LEVEL) == (True, ["a", "b"], 0.5, 1)
    assert copy.parse_settings(["--fast=no"]).FAST is False
    assert "FAST is 'perhaps'" in refusal(copy.parse_settings, ["--fast", "perhaps"], capsys)


# ---- errors and exit statuses -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "parts"),
    [
        (torch.OutOfMemoryError("Tried to allocate 1 GiB"), 1, ["1 GiB", "Stop other", "resumes"]),
        (RuntimeError("Triton Error [CUDA]: out of memory"), 1, ["Triton", "resumes"]),
        (t.UserError("This is it."), 1, ["This is it."]),
        (KeyboardInterrupt(), 128 + signal.SIGINT, ["Stopped"]),
    ],
    ids=["memory", "memory, by Triton", "the user", "Ctrl-C"],
)
def test_what_is_known_is_one_message(monkeypatch, capsys, error, status, parts):
    monkeypatch.setattr(t, "build_trainer", failing(error))
    said = refusal(t.main, RUN, capsys, status=status)
    assert [part for part in parts if part not in said] == [] and "Traceback" not in said
    log = Path("output/all_logs.log").read_text(encoding="utf-8")
    assert "Traceback" in log and type(error).__name__ in log
    record = json.loads(Path("output/run.json").read_bytes())
    assert record["outcome"].startswith("failed: " if status == 1 else "interrupted: ")


@pytest.mark.parametrize("mode", [[], ["--dry_run"]], ids=["run", "dry run"])
def test_what_is_not_known_is_a_traceback(monkeypatch, mode):
    monkeypatch.setattr(t, "make_plan", failing(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        t.main([*RUN, *mode])
    log = Path("output/all_logs.log")
    assert not log.exists() if mode else "a bug" in log.read_text(encoding="utf-8")


def test_an_output_folder_that_cannot_be_made_is_one_message(capsys):
    Path("output").write_text("a file")
    said = refusal(t.main, RUN, capsys, status=1)
    assert "OUTPUT_DIR output cannot be written" in said and "another folder" in said


def test_an_older_python_and_windows_are_refused_in_one_message(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 10, 12, "final", 0))
        with pytest.raises(SystemExit, match=r"Python 3\.11"):
            runpy.run_path(str(SCRIPT))
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match=r"Linux.*WSL"):
        runpy.run_path(str(SCRIPT))


# ---- what would be missing later ----------------------------------------------------------------

OPTIM = 'optim="adamw_torch_fused"'
MISSING = {  # flags, an edit of training_config(), and what is said
    "a tracker": (["--report_to", "wandb"], None, ["REPORT_TO wandb: ", "pip install wandb"]),
    "another": (["--report_to", "trackio"], None, ["REPORT_TO trackio: ", "pip install trackio"]),
    "the optimizer's package": (
        [], (OPTIM, 'optim="adamw_8bit"'), ["optim 'adamw_8bit' cannot be", "bitsandbytes"]
    ),
    "the hub": ([], (OPTIM, f"{OPTIM}, push_to_hub=True"), ["push_to_hub needs", "hf auth login"]),
}  # fmt: skip


@pytest.mark.parametrize("mode", [[], ["--dry_run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_told_before_anything_is_moved(what, mode, tmp_path, capsys):
    flags, edit, parts = MISSING[what]
    main = edited_script(tmp_path, edit).main if edit else t.main
    Path("output/final_lora").mkdir(parents=True)
    Path("output/run.json").write_text("{}")
    said = refusal(main, [*RUN, *flags, *mode], capsys, status=1)
    assert all(part in said for part in parts) and "Traceback" not in said
    left = {path.name for path in Path("output").iterdir()} - {"all_logs.log", ".lock"}
    assert left == {"final_lora", "run.json"} and Path("output/run.json").read_text() == "{}"


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_an_optimizer_that_is_there_is_taken(optim, tmp_path, capsys):
    edited_script(tmp_path, (OPTIM, f'optim="{optim}"')).main([*RUN, "--dry_run"])
    assert "Nothing was trained" in capsys.readouterr().out


# ---- a whole run --------------------------------------------------------------------------------


def test_a_run_does_what_its_dry_run_said_and_tells_a_tracker(monkeypatch, capsys):
    """The tracker's package is made up, and transformers' callback for it a recorder."""
    told = []

    class Recorder(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            told.append((args.run_name, state.global_step, logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Recorder)
    flags = [*RUN, "--output_dir", "out/a-run", "--eval_file", "e", "--report_to", "tensorboard"]
    Path("e").write_bytes(Path("t").read_bytes())
    t.main([*flags, "--dry_run"])
    promised = capsys.readouterr().out
    assert not Path("out").exists() and not told
    t.main(flags)
    done, errors = capsys.readouterr()
    # Whole lines in words, and all of them are in the log, too.
    assert errors == "" and re.findall(r"\{'|it/s|\d%\||Warning|\r|\x1b", done) == []
    assert max(len(line) for line in done.splitlines() if " serve " not in line) <= 100
    head, _, log = Path("out/a-run/all_logs.log").read_text().lstrip("\n").partition("\n")
    assert head.startswith("---- 20") and log == done
    said = [line for line in promised.splitlines() if not line.startswith("done ")]
    lines = iter(done.splitlines())
    assert len(said) > 20 and all(line in lines for line in said)  # in this order
    (tokens,) = re.findall(r"all steps together train on ([\d,]+) tokens", promised)
    record = json.loads(Path("out/a-run/run.json").read_bytes())
    assert record["device"] == "CPU" and "processes" not in done
    assert record["train_tokens"] == int(tokens.replace(",", "")) > 0
    assert {name for name, *_ in told} == {"a-run"}
    assert [step for _, step, logs in told if "loss" in logs] == [1, 2]
    assert [step for _, step, logs in told if "eval_loss" in logs] == [0, 2]


def test_on_a_terminal_bars_run_below_whole_lines(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    Path("e").write_bytes(Path("t").read_bytes())
    t.main([*RUN, "--eval_file", "e", "--logging_steps", "1"])
    bars, out = terminal.getvalue(), capsys.readouterr().out
    assert re.search(r"rendering: .*\| \d/8 \[", bars)
    assert re.search(r"held-out loss: .*\| \d/8 \[", bars)
    assert "{'" not in bars + out and "%|" not in out
    assert len(re.findall(r"(?m)^train +step \d/2  loss ", out)) == 2


# ---- the GPU ------------------------------------------------------------------------------------

GPU = ["--device", "cuda", "--dtype", "bfloat16"]


@pytest.mark.parametrize("visible", [None, "3", ""])
def test_without_a_gpu_one_message_says_why_and_what_to_do(monkeypatch, capsys, visible):
    error = RuntimeError("Found no NVIDIA driver on your system.")
    monkeypatch.setattr(torch.cuda, "init", failing(error))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    said = refusal(t.main, [*RUN, *GPU], capsys, status=1)
    assert "no GPU" in said and "--demo" in said and "--device cpu" in said
    assert said.count("no NVIDIA driver") == 1
    # What the script itself sets for the libraries is not the user's.
    assert f"CUDA_VISIBLE_DEVICES is {visible!r}" in said or visible is None
    assert "CUDA_VISIBLE_DEVICES" not in said or visible is not None


class NoKernels(TorchFunctionMode):
    """Let every computation on a GPU fail as a torch without the GPU's kernels does."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if torch.device((kwargs or {}).get("device") or "cpu").type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution")
        return function(*args, **(kwargs or {}))


def pretend_a_gpu(monkeypatch, capability):
    """Let there be a GPU of this capability, for which torch has no kernels."""
    monkeypatch.setattr(accelerate.PartialState, "_shared_state", {})
    answers = {
        "is_available": True, "set_device": None, "device_count": 1, "is_bf16_supported": True,
        "get_device_capability": capability, "mem_get_info": (2**34, 2**34),
        "get_device_name": "NVIDIA A GPU",
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)


FOR_GPUS = ("fla", "causal_conv1d")  # packages that work on newer GPUs alone


@pytest.mark.parametrize("capability", [(7, 0), (8, 9)])
@pytest.mark.parametrize("visible", [None, "3,1"])
def test_a_torch_without_the_gpus_kernels_is_named_with_the_gpu(
    capability, visible, monkeypatch, capsys
):
    """And of several GPUs the first one is used: TRL refuses several without a launcher."""
    pretend_a_gpu(monkeypatch, capability)
    for name in FOR_GPUS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(torch.cuda, "init", lambda: stack.enter_context(NoKernels()))
        said = refusal(t.main, [*RUN, *GPU], capsys, status=1)
    assert f"torch {torch.__version__}" in said and "requirements.txt" in said
    assert f"NVIDIA A GPU, sm_{capability[0]}{capability[1]}" in said and "no kernel image" in said
    assert os.environ["CUDA_VISIBLE_DEVICES"] == (visible or "0")[0]
    assert ("fla" in sys.modules) == (capability < (8, 0))
    assert sys.modules["causal_conv1d"] is None  # it is not tried before it would be used


@pytest.mark.parametrize("words", ["operation not supported", "unknown error"])
def test_a_driver_without_expandable_segments_is_told_how_to_do_without(words, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError(f"CUDA driver error: {words}")

    pretend_a_gpu(monkeypatch, (8, 0))
    monkeypatch.setattr(torch.cuda, "init", lambda: monkeypatch.setattr(torch, "ones", fail))
    said = refusal(t.main, [*RUN, *GPU], capsys, status=1)
    assert words in said and "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False" in said
    assert "free its memory" not in said


class OnTheCpu(TorchFunctionMode):
    """Let a CPU compute what a GPU should."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


GPUS = {  # what nvidia-smi says, and what is said of it; 16 GiB of the first one are free
    "only one": ("GPU-1, NVIDIA A GPU, 16384", ""),
    "the other is no freer": (
        "GPU-1, NVIDIA A GPU, 16384\nGPU-2, NVIDIA B GPU, 16384",
        "it is the first of 2 GPUs, since CUDA_VISIBLE_DEVICES is not set",
    ),
    "another is freer": (
        "GPU-1, NVIDIA A GPU, 16384\nGPU-2, NVIDIA B GPU, 30000\nGPU-3, NVIDIA C GPU, 20000",
        "set; 29.3 GiB are free on another one (NVIDIA B GPU): CUDA_VISIBLE_DEVICES=GPU-2 takes it",
    ),
    "it cannot be read": ("GPU-1, NVIDIA A GPU, [N/A]\nGPU-2, NVIDIA B GPU, [N/A]", ""),
    "it fails": (None, ""),
}


@pytest.mark.parametrize("name", GPUS)
def test_of_several_gpus_the_one_that_is_used_and_a_freer_one_are_named(
    name, monkeypatch, capsys, tmp_path
):
    pretend_a_gpu(monkeypatch, (7, 0))
    said, words = GPUS[name]
    command = tmp_path / "bin" / "nvidia-smi"
    command.parent.mkdir()
    answer = "exit 9" if said is None else f"cat <<'END'\n{said}\nEND"
    command.write_text(f"#!/bin/sh\n{answer}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    for visible in (None, "0"):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with contextlib.ExitStack() as stack:
            monkeypatch.setattr(torch.cuda, "init", lambda: stack.enter_context(OnTheCpu()))
            t.prepare_device("cuda", "bfloat16")
        line = " ".join(capsys.readouterr().out.split())
        assert "NVIDIA A GPU, sm_70, 16.0 of 16.0 GiB are free" in line
        rest = line.partition("are free")[2].lstrip(" ")
        assert rest.endswith(words) and bool(rest) == bool(words) if visible is None else not rest


def test_attention_does_not_plan_anew_for_each_width(monkeypatch):
    pretend_a_gpu(monkeypatch, (9, 0))
    torch.backends.cuda.enable_cudnn_sdp(True)
    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(torch.cuda, "init", lambda: stack.enter_context(OnTheCpu()))
        t.prepare_device("cuda", "bfloat16")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("mode", ["CPU", "dry run"])
def test_packages_for_newer_gpus_are_not_imported_elsewhere(mode, monkeypatch):
    for name in FOR_GPUS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    if mode == "CPU":
        t.prepare_device("cpu", "float32")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    else:
        t.main([*RUN, *GPU, "--dry_run"])
    for name in FOR_GPUS:
        with pytest.raises(ImportError):
            __import__(name)


# ---- importing, the environment, the packages ---------------------------------------------------


def test_importing_the_script_does_nothing_else(tmp_path, monkeypatch, capfd):
    before = dict(os.environ), os.getcwd(), [signal.getsignal(one) for one in t.SIGNALS]
    monkeypatch.setattr(torch.cuda, "init", failing(AssertionError))
    monkeypatch.setattr(accelerate.PartialState, "__init__", failing(AssertionError))
    edited_script(tmp_path)
    after = dict(os.environ), os.getcwd(), [signal.getsignal(one) for one in t.SIGNALS]
    assert after == before and capfd.readouterr() == ("", "")
    assert {path.name for path in tmp_path.iterdir()} <= {"t", "edited_script.py", "__pycache__"}


def imported_names():
    """Return the packages that the script imports, in order."""
    found = []
    for node in ast.walk(ast.parse(SOURCE)):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names = [one.name for one in node.names] if isinstance(node, ast.Import) else names
        found += [name.partition(".")[0] for name in names]
    return [name for name in dict.fromkeys(found) if name not in sys.stdlib_module_names]


@pytest.mark.parametrize("chosen", [None, "ACTIVE"])
def test_what_libraries_read_is_set_before_the_first_is_imported(tmp_path, chosen):
    """A package of its name writes down the environment, and ends the import."""
    first = imported_names()[0]
    (tmp_path / f"{first}.py").write_text(
        "import json, os\njson.dump(dict(os.environ), open('seen.json', 'w'))\n"
        "raise SystemExit('enough')\n"
    )
    environment = {
        name: os.environ[name] for name in os.environ if not re.match("OMP|HF_HUB|PYTORCH", name)
    }
    environment |= {"PYTHONPATH": str(tmp_path)}
    if chosen:
        environment |= {"OMP_WAIT_POLICY": chosen, "PYTORCH_ALLOC_CONF": "backend:native"}
    done = subprocess.run(
        [sys.executable, SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr == "enough\n"
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["OMP_WAIT_POLICY"] == (chosen or "PASSIVE")
    segments = seen.get("PYTORCH_CUDA_ALLOC_CONF")
    assert segments == (None if chosen else "expandable_segments:True")
    assert seen["HF_HUB_DISABLE_TELEMETRY"] == seen["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in seen.keys() - os.environ.keys()


def test_the_installed_torch_has_the_kernels_of_all_gpus_that_are_promised():
    """From the V100 to the RTX 50 series; a raised bound would lose the first ones in silence."""
    flags = torch._C._cuda_getArchFlags()
    if flags is None:
        pytest.skip("this torch was built without CUDA")
    assert {"sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"} <= {*flags.split()}


def requirements():
    """Return {name: specifier} of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {one.name.replace("-", "_"): one.specifier for one in found}


def test_what_is_imported_is_required_installed_and_nothing_else():
    """Only the inspector draws."""
    wanted = requirements()
    names = {*imported_names()} - {"fla", "causal_conv1d"}
    assert names | {"matplotlib"} == wanted.keys()
    for name, specifier in wanted.items():
        assert specifier.contains(importlib.metadata.version(name)), name
        assert not specifier or not specifier.contains("999"), name
    # PyPI's wheels hold the kernels of the V100 (sm_70) up to torch 2.10.
    assert all(wanted["torch"].contains(version) for version in ("2.7.0", "2.10.9"))
    assert not any(wanted["torch"].contains(version) for version in ("2.6.0", "2.11.0"))


def test_the_scripts_own_block_of_requirements_is_the_file():
    """`uv run` reads it (PEP 723)."""
    (block,) = re.findall(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$", SOURCE)
    values = tomllib.loads(re.sub("(?m)^# ?", "", block))
    own = {one.name: one.specifier for one in map(Requirement, values["dependencies"])}
    others = requirements()
    del others["matplotlib"]  # the package draws with it
    assert own == others
    assert values["requires-python"] == ">=3.11"
