"""The command: a flag for each constant, what is refused, exit statuses, the environment, the file.

Constants are edited in copies of the script, as its user edits them.
"""

import ast
import errno
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import symtable
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import train_lora_single as t

SCRIPT = Path(t.__file__)
SOURCE = SCRIPT.read_text("utf-8")
TREE = ast.parse(SOURCE)
BANNERS = [(int(m[1]), SOURCE.count("\n", 0, m.start()) + 1)
           for m in re.finditer(r"^# ==== (\d+) \w.*$", SOURCE, re.MULTILINE)]  # fmt: skip
CONSTANTS = [
    node.targets[0].id
    for node in TREE.body
    if isinstance(node, ast.Assign) and BANNERS[0][1] < node.lineno < BANNERS[1][1]
]
CONSTANTS.remove("DEMO")
NUMBERS = [name for name in CONSTANTS if type(getattr(t, name)) in (int, float)]
MAY_BE_ZERO = ["SEED", "LORA_DROPOUT", "WARMUP_RATIO", "NUM_SAMPLES"]
GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture(autouse=True)
def environment_is_restored():
    """Undo what a run sets in the environment, for the runs after it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def edited(folder, *changes):
    """Import a copy of the script in which each (pattern, text) has replaced what it matches."""
    source = SOURCE
    for old, new in changes:
        source, count = re.subn(old, lambda _, new=new: new, source, flags=re.MULTILINE)
        assert count == 1, old
    path = folder / "edited.py"
    path.write_text(source, "utf-8")
    spec = importlib.util.spec_from_file_location("edited", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line_of(name):
    """Return the pattern of the line, or lines, of a constant."""
    return rf"^{name} = " + (r"\[[^\]]*\].*$" if isinstance(getattr(t, name), list) else ".*$")


def refusal(main, argv, capsys):
    """Return the one line that is said when main(argv) exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    message = capsys.readouterr().err.partition("error: ")[2]
    assert stop.value.code == 2 and message.count("\n") == 1
    return message


def another(name):
    """Return a valid value that is not the constant's own."""
    value = getattr(t, name)
    if isinstance(t.RULES[name], tuple):
        return next(other for other in t.RULES[name] if other != value)
    if isinstance(value, str):
        return f"another/{name}"
    if isinstance(value, list):
        return ["up_proj", "k_proj"]
    return value + 1 if isinstance(value, int) else value / 2


def flag(name, value):
    return [f"--{name.lower()}", *map(str, value if isinstance(value, list) else [value])]


# ---- flags


def test_the_flags_are_the_constants_and_four_switches_that_are_off():
    assert {"MODEL_NAME", "MAX_NEW_TOKENS"} < set(CONSTANTS)
    expected = {name.lower(): getattr(t, name) for name in CONSTANTS}
    expected |= {"demo": False, "dry_run": False, "chat": False, "compare": None}
    assert vars(t.parse_args([])) == expected
    assert vars(t.parse_args(["--dry_run"])) == expected | {"dry_run": True}
    assert vars(t.parse_args(["--chat"])) == expected | {"chat": True}
    assert vars(t.parse_args(["--compare", "a", "b"])) == expected | {"compare": ["a", "b"]}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_flag_sets_its_constant_alone_and_in_its_type(name):
    args = vars(t.parse_args(flag(name, another(name))))
    assert args == vars(t.parse_args([])) | {name.lower(): another(name)}
    assert type(args[name.lower()]) is type(getattr(t, name))


def test_all_constants_edited_in_the_file_are_the_defaults_of_their_flags(tmp_path):
    lines = [(line_of(name), f"{name} = {another(name)!r}  # mine") for name in CONSTANTS]
    copy = edited(tmp_path, *lines)
    assert vars(copy.parse_args([])) == {name.lower(): another(name) for name in CONSTANTS} | {
        "demo": False, "dry_run": False, "chat": False, "compare": None
    }  # fmt: skip
    assert copy.parse_args(["--lora_r", "4"]).lora_r == 4


@pytest.mark.parametrize(
    ("name", "line", "value"),
    [
        ("LORA_R", "LORA_R = 16", 16),
        ("LORA_R", "LORA_R=16 # rank", 16),
        ("LORA_R", "LORA_R: int = 16  # rank", 16),
        ("LORA_R", "LORA_R = 2 * 8  # rank", 16),
        ("OUTPUT_DIR", 'OUTPUT_DIR = "100 %s #2"  # results', "100 %s #2"),
        ("LORA_TARGET_MODULES", 'LORA_TARGET_MODULES = ["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("LORA_TARGET_MODULES", 'LORA_TARGET_MODULES = [\n    "q_proj",\n]', ["q_proj"]),
        ("LORA_DROPOUT", "LORA_DROPOUT = 0  # a whole number for a fraction", 0),
    ],
    ids=["bare", "dense", "typed", "product", "hash and percent", "one line", "lines", "integer"],
)
def test_a_constant_counts_however_its_line_is_written(tmp_path, capsys, name, line, value):
    copy = edited(tmp_path, (line_of(name), line))
    assert vars(copy.parse_args([]))[name.lower()] == value
    with pytest.raises(SystemExit) as stop:
        copy.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.replace(" [VALUE ...]", "").split())
    assert stop.value.code == 0 and f" --{name.lower()} VALUE [{value}]" in said


def test_a_fraction_edited_to_a_whole_number_keeps_a_flag_for_fractions(tmp_path):
    copy = edited(tmp_path, (line_of("LORA_DROPOUT"), "LORA_DROPOUT = 0  # none"))
    assert copy.parse_args(["--lora_dropout", "0.1"]).lora_dropout == 0.1


def test_importing_the_script_prints_nothing_and_changes_nothing(tmp_path, capfd):
    before = dict(os.environ), os.getcwd(), signal.getsignal(signal.SIGINT)
    edited(tmp_path)
    assert (dict(os.environ), os.getcwd(), signal.getsignal(signal.SIGINT)) == before
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in tmp_path.iterdir()} <= {"edited.py", "__pycache__"}


def test_help_shows_each_constant_with_its_value(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit) as stop:
        t.main(["--help"])
    out = capsys.readouterr().out
    text = " ".join(out.replace(" [VALUE ...]", "").split())
    assert stop.value.code == 0
    for name in CONSTANTS:
        assert f" --{name.lower()} VALUE [{getattr(t, name)}]" in text
    assert all(f" {switch} " in text for switch in ("--demo", "--dry_run", "--chat", "--compare"))
    assert t.__doc__.strip() in out  # in its own lines


# ---- --demo


def test_demo_changes_what_it_lists_and_nothing_else():
    demo = {name.lower(): value for name, value in t.DEMO.items()}
    assert demo.keys() < vars(t.parse_args([])).keys()
    assert vars(t.parse_args(["--demo"])) == vars(t.parse_args([])) | demo | {"demo": True}


@pytest.mark.parametrize("name", t.DEMO)
def test_a_flag_beside_demo_wins_before_or_after_it_even_with_the_usual_value(name):
    given = flag(name, getattr(t, name))
    expected = vars(t.parse_args(["--demo"])) | {name.lower(): getattr(t, name)}
    assert vars(t.parse_args([*given, "--demo"])) == expected
    assert vars(t.parse_args(["--demo", *given])) == expected


def test_a_bad_value_in_demo_is_refused_by_name_with_demo_alone(tmp_path, capsys):
    copy = edited(tmp_path, (r'"NUM_EPOCHS": 1, ', '"NUM_EPOCHS": 0.5, '))
    assert "NUM_EPOCHS is 0.5" in refusal(copy.main, ["--demo", "--dry_run"], capsys)
    assert copy.parse_args([]).num_epochs == 3


# ---- what is refused

EDITED = [
    ("LORA_R", '"8"', "in range(1, 513)"),
    ("LORA_R", "8.0", "in range(1, 513)"),
    ("LORA_R", "True", "in range(1, 513)"),
    ("LORA_R", "None", "in range(1, 513)"),
    ("LORA_R", "0", "in range(1, 513)"),
    ("LORA_R", "513", "in range(1, 513)"),
    ("BATCH_SIZE", "2.0", "int, from 1 to below 2**31"),
    ("SEED", "42.0", "in range(0, 4294967296)"),
    ("SEED", "2**32", "in range(0, 4294967296)"),
    ("NUM_EPOCHS", "0.5", "int, from 1 to below 2**31"),
    ("NUM_EPOCHS", "True", "int, from 1 to below 2**31"),
    ("LEARNING_RATE", "0", "float, from 0 to below 1"),
    ("LEARNING_RATE", "1", "float, from 0 to below 1"),
    ("LEARNING_RATE", "True", "float"),
    ("LEARNING_RATE", '"2e-4"', "float"),
    ("LEARNING_RATE", 'float("nan")', "float"),
    ("LEARNING_RATE", 'float("inf")', "float"),
    ("LORA_DROPOUT", "1", "below 1"),
    ("WARMUP_RATIO", "1.0", "below 1"),
    ("NUM_SAMPLES", "-1", "in range(0, 1001)"),
    ("NUM_SAMPLES", "1001", "in range(0, 1001)"),
    ("NUM_SAMPLES", "5.0", "in range(0, 1001)"),
    ("LORA_TARGET_MODULES", '"all-linear"', "list of names"),
    ("LORA_TARGET_MODULES", '["q_proj", 3]', "list of names"),
    ("LORA_TARGET_MODULES", '["q_proj", ""]', "list of names"),
    ("LORA_TARGET_MODULES", '("q_proj", "v_proj")', "list of names"),
    ("LORA_TARGET_MODULES", "[]", "list of names"),
    ("LORA_TARGET_MODULES", "None", "list of names"),
    ("DEVICE", '"tpu"', "in ('cuda', 'cpu')"),
    ("DEVICE", "0", "in ('cuda', 'cpu')"),
    ("DEVICE", '"cud"', "in ('cuda', 'cpu')"),  # a part of a value is none
    ("DTYPE", '"float16"', "in ('bfloat16', 'float32')"),
    ("PRODUCTS", '"bfloat16"', "in ('auto', 'dtype', 'float16')"),
    ("PRODUCTS", "True", "in ('auto', 'dtype', 'float16')"),
    ("PRODUCTS", '""', "in ('auto', 'dtype', 'float16')"),
    ("LR_SCHEDULER_TYPE", '"cosin"', "in ('cosine', 'linear', 'constant_with_warmup')"),
    ("MODEL_NAME", '""', "a text"),
    ("MODEL_REVISION", "None", "a text"),
    ("TRAIN_FILE", '["a.jsonl", "b.jsonl"]', "a text"),
    ("TRAIN_FILE", '""', "a text"),
    ("EVAL_FILE", "None", "a text"),
    ("EVAL_FILE", r'"a\nb"', "a text"),  # it would break a line of what is said
    ("OUTPUT_DIR", 'Path("output")', "a text"),
    ("OUTPUT_DIR", '""', "a text"),
    *((name, "-1", "") for name in NUMBERS),
    *((name, "0", "") for name in NUMBERS if name not in MAY_BE_ZERO),
]


@pytest.mark.parametrize(("name", "literal", "rule"), EDITED)
def test_a_constant_edited_to_what_it_cannot_be_is_one_message(
    tmp_path, capsys, name, literal, rule
):
    copy = edited(tmp_path, (line_of(name), f"{name} = {literal}  # edited"))
    message = refusal(copy.main, ["--dry_run"], capsys)
    value = eval(literal, {"Path": Path})
    assert message.startswith(f"{name} is {value!r}; it must be ") and rule in message


@pytest.mark.parametrize(
    ("old", "new", "argv", "name"),
    [
        (r"^LORA_R = ", "LORA_RANK = ", [], "LORA_R"),
        (r"^NUM_EPOCHS = ", "EPOCHS = ", ["--demo"], "NUM_EPOCHS"),
    ],
)
def test_a_constant_that_was_renamed_is_one_message(tmp_path, capsys, old, new, argv, name):
    copy = edited(tmp_path, (old, new))
    assert name in refusal(copy.main, [*argv, "--dry_run"], capsys)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--lora_rank 3", ["--lora_rank"]),
        ("--lora_al 3", ["--lora_al 3"]),  # no abbreviations: one would change with a new flag
        ("--dry", ["--dry"]),
        ("--LORA_R 3", ["--LORA_R"]),
        ("--lora-r 3", ["--lora-r"]),
        ("stray", ["stray"]),
        ("--lora_r 8.0", ["--lora_r", "8.0"]),
        ("--lora_r eight", ["--lora_r", "eight"]),
        ("--lora_r", ["--lora_r"]),
        ("--lora_r 513", ["LORA_R", "513"]),
        ("--num_epochs 0.5", ["--num_epochs", "0.5"]),
        ("--learning_rate fast", ["--learning_rate", "fast"]),
        ("--learning_rate -1e-4", ["--learning_rate"]),
        ("--learning_rate 1e999", ["LEARNING_RATE", "inf"]),
        ("--device tpu", ["DEVICE", "'tpu'", "'cuda'", "'cpu'"]),
        ("--dtype float16", ["DTYPE", "'float16'", "'bfloat16'", "'float32'"]),
        ("--lr_scheduler_type step", ["LR_SCHEDULER_TYPE", "'step'", "'cosine'", "'linear'"]),
        ("--products fp16", ["PRODUCTS", "'fp16'", "'auto'", "'dtype'", "'float16'"]),
        ("--products", ["--products"]),
        ("--resume never", ["--resume"]),  # an earlier version's
        ("--num_samples 1001", ["NUM_SAMPLES", "1001"]),
        ("--model_name=", ["MODEL_NAME", "a text"]),
        ("--train_file=", ["TRAIN_FILE", "a text"]),
        ("--output_dir=", ["OUTPUT_DIR", "a text"]),
        ("--output_dir=l\udcf6", ["OUTPUT_DIR", "a text"]),
        ("--lora_target_modules", ["--lora_target_modules"]),
        ("--lora_target_modules=", ["LORA_TARGET_MODULES"]),
        ("--lora_target_modules q_proj --demo v_proj", ["v_proj"]),
        ("--dry_run=1", ["--dry_run", "1"]),
        ("--demo=1", ["--demo", "1"]),
        *((f"--{name.lower()}={value}", [name.lower(), value])
          for name in NUMBERS for value in ("-1", "nan", "inf")),
        *((f"--{name.lower()} 0", [name.lower(), "0"])
          for name in NUMBERS if name not in MAY_BE_ZERO),
    ],
)  # fmt: skip
def test_a_bad_flag_is_one_message_that_names_it(argv, said, capsys):
    message = refusal(t.main, argv.split(), capsys)
    assert [part for part in said if part not in message and part.upper() not in message] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in MAY_BE_ZERO),
        *((name, 1) for name in NUMBERS if type(getattr(t, name)) is int),
        ("LORA_DROPOUT", 0.99),
        ("WARMUP_RATIO", 0.99),
        ("LORA_R", 512),
        ("NUM_SAMPLES", 1000),
        *((name, value) for name, rule in t.RULES.items() if isinstance(rule, tuple)
          for value in rule),
        ("SEED", 2**32 - 1),
        ("LEARNING_RATE", 0.99),
        ("LEARNING_RATE", 1e-9),
        ("EVAL_FILE", ""),
        ("LORA_TARGET_MODULES", ["v_proj"]),
    ],
)  # fmt: skip
def test_a_value_at_the_edge_of_what_is_allowed_is_taken(name, value):
    assert vars(t.parse_args([*flag(name, value), "--dry_run"]))[name.lower()] == value


def test_a_refused_flag_touches_nothing(tmp_path, capsys):
    refusal(t.main, ["--demo", "--output_dir", str(tmp_path / "out"), "--lora_r", "0"], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, lines):
    """Return the output of a copy with a global of the user's, and a constant moved to the end."""
    folder = tmp_path_factory.mktemp("edited")
    mine = 'LEARNING_RATE = 0.005  # moved\nHF_TOKEN = "hf_abc"  # mine\n\n# ==== 2 Command'
    copy = edited(folder, (r"^LEARNING_RATE = .*\n", ""), (r"^# ==== 2 Command", mine))
    copy.DEMO.pop("LEARNING_RATE")
    before = os.getcwd()
    os.chdir(SCRIPT.parent)
    try:
        flags = [*lines(folder, train=2, evaluation=0), "--num_epochs", "1", "--save_steps", "9"]
        copy.main([*flags, "--output_dir", str(folder / "output")])
    finally:
        os.chdir(before)
    return copy, folder / "output"


def test_a_constant_counts_wherever_it_stands(recorded):
    copy, output = recorded
    record = json.loads((output / "run.json").read_text("utf-8"))
    assert copy.parse_args([]).learning_rate == record["constants"]["LEARNING_RATE"] == 0.005
    assert [e["learning_rate"] for e in record["loss_history"] if "loss" in e] == [0.005]


def test_a_global_that_a_user_adds_is_no_flag_and_is_written_nowhere(recorded, capsys):
    copy, output = recorded
    assert "--hf_token" in refusal(copy.main, ["--hf_token", "x"], capsys)
    record = json.loads((output / "run.json").read_text("utf-8"))
    assert record["constants"].keys() == set(CONSTANTS)
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert [path for path in files if re.search(rb"hf_abc|HF_TOKEN", path.read_bytes())] == []


def adapter_of(lines, folder, flags):
    """Return the bytes of the adapter that a run of one step leaves in folder."""
    flags = [*lines(folder, train=2, evaluation=0), "--num_epochs", "1", *flags]
    t.main([*flags, "--output_dir", str(folder / "output")])
    return (folder / "output/final_lora/adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(lines, tmp_path_factory):
    """Return the adapter's bytes after a run in a clean environment."""
    before = os.getcwd()
    os.chdir(SCRIPT.parent)
    try:
        return adapter_of(lines, tmp_path_factory.mktemp("alone"), [])
    finally:
        os.chdir(before)


# ---- exit statuses


@pytest.fixture
def two_files(tmp_path):
    """Return flags for a good training file and an eval file with a bad line, and its path."""
    (tmp_path / "train.jsonl").write_text(GOOD, "utf-8")
    (tmp_path / "eval.jsonl").write_text(GOOD + '\n{"text": "Grüße"}\n', "utf-8")
    flags = ["--output_dir", str(tmp_path / "out"), "--train_file", str(tmp_path / "train.jsonl")]
    return [*flags, "--eval_file", str(tmp_path / "eval.jsonl")], f"{tmp_path}/eval.jsonl:3: "


def test_a_finished_dry_run_returns_and_writes_nothing(lines, tmp_path, capsys):
    flags = lines(tmp_path, train=2, evaluation=0)
    assert t.main([*flags, "--dry_run", "--output_dir", str(tmp_path / "out")]) is None
    out, err = capsys.readouterr()
    assert "trainable params" in out and err == ""
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "eval.jsonl"}


def stopped_by(failure, argv, monkeypatch, capsys):
    """Return (status, what is said) when reading the data ends in what failure does."""
    monkeypatch.setattr(t, "read_examples", lambda _: failure())
    with pytest.raises(SystemExit) as stop:
        t.main(argv)
    return stop.value.code, capsys.readouterr().err


def throws(error):
    def failure():
        raise error

    return failure


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_a_run_with_128_and_its_number(monkeypatch, capsys, number, status):
    def failure():
        signal.raise_signal(number)

    code, said = stopped_by(failure, ["--dry_run"], monkeypatch, capsys)
    assert code == status and "stopped" in said and said.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_was_ignored_before_as_under_nohup_stays_ignored(monkeypatch, capsys, number):
    def failure():
        signal.raise_signal(number)
        raise SystemExit("it went on")

    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert stopped_by(failure, ["--dry_run"], monkeypatch, capsys) == (1, "it went on\n")
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (SystemExit("what, where, the fix"), 1, ["what, where, the fix"]),
        (KeyboardInterrupt(), 130, ["stopped"]),
        (torch.OutOfMemoryError("CUDA.\nTried 1 GiB"), 1, ["Tried 1 GiB", "BATCH_SIZE"]),
        (OSError(errno.ENOSPC, "No space left", "out/x"), 1, ["No space left", "out/x", "room"]),
        (ModuleNotFoundError("No module named 'trl'"), 1, ["'trl'", "pip install -r req"]),
    ],
    ids=["refused", "interrupted", "memory", "disk", "package"],
)
def test_what_a_user_can_mend_is_one_message_on_the_screen_and_in_the_log(
    tmp_path, monkeypatch, capsys, error, status, said
):
    argv = ["--output_dir", str(tmp_path / "out")]
    code, message = stopped_by(throws(error), argv, monkeypatch, capsys)
    assert code == status and message.count("\n") == 1
    log = (tmp_path / "out" / "all_logs.log").read_text("utf-8")
    assert [part for part in said if part not in message] == []
    assert type(error).__name__ in log  # with its traceback, for who wants to know
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["all_logs.log"]


def test_a_bug_is_a_traceback_on_the_screen_and_in_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(t, "read_examples", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        t.main(["--output_dir", str(tmp_path)])
    log = (tmp_path / "all_logs.log").read_text("utf-8")
    assert "Traceback" in log and "ZeroDivisionError" in log


def test_refused_data_writes_only_a_log_with_the_message(two_files, capsys):
    flags, where = two_files
    with pytest.raises(SystemExit) as stop:
        t.main(flags)
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and err.startswith(where) and err.count("\n") == 2
    assert "1 example" in out
    output = Path(flags[1])
    assert [path.name for path in output.iterdir()] == ["all_logs.log"]
    assert where in (output / "all_logs.log").read_text("utf-8")


def test_refused_data_in_a_dry_run_writes_nothing(two_files):
    flags, _ = two_files
    with pytest.raises(SystemExit, match="1"):
        t.main([*flags, "--dry_run"])
    assert not Path(flags[1]).exists()


@pytest.mark.parametrize(
    "left",
    [
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
        {"LOCAL_RANK": "0"},
        {"LOCAL_RANK": "abc", "WORLD_SIZE": "", "ACCELERATE_USE_FSDP": "1"},
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "1"},
    ],
    ids=["first of two", "second of two", "rank alone", "no numbers", "accelerate's"],
)
def test_what_a_launcher_left_in_the_environment_changes_no_byte(
    lines, alone, tmp_path, monkeypatch, capsys, left
):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert adapter_of(lines, tmp_path, []) == alone
    assert "done " in capsys.readouterr().out  # a second process says what a first does


def test_the_bytes_of_an_adapter_do_change_with_what_is_learnt(lines, alone, tmp_path):
    assert adapter_of(lines, tmp_path, ["--seed", "1"]) != alone


@pytest.mark.parametrize(
    ("redirect", "status"),
    [("", 1), (">&-", 1), ("> /dev/full", 1), ("| true", 1), ("2>&-", 1), ("2> /dev/full", 1)],
)
def test_an_output_that_cannot_be_written_changes_no_status(two_files, redirect, status):
    flags, where = two_files
    script = f'"$@" {redirect}; exit ${{PIPESTATUS[0]}}'
    command = ["bash", "-c", script, "bash", sys.executable, str(SCRIPT), *flags]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=environment, encoding="utf-8")
    assert done.returncode == status and "Traceback" not in done.stderr
    if "2>" in redirect:
        assert done.stdout.startswith("data ") and done.stderr == ""
    else:
        assert done.stderr.startswith(where) and "'Grüße'" in done.stderr
        assert done.stderr.count("\n") == 2


# ---- Python, packages, the environment


def test_an_older_python_is_one_message(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 12, "final", 0))
    with pytest.raises(SystemExit, match=r"^Python 3\.11.* needed.*README"):
        runpy.run_path(str(SCRIPT))
    monkeypatch.setattr(sys, "version_info", (3, 11, 0, "final", 0))
    assert "main" in runpy.run_path(str(SCRIPT))


def test_an_older_python_can_read_the_file_up_to_that_message():
    ast.parse(SOURCE, feature_version=(3, 9))


IMPORTED = """
import json, runpy, sys
before = set(sys.modules)
try:
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
finally:
    names = {name.partition(".")[0] for name in sys.modules.keys() - before}
    print(json.dumps(sorted(names)))
"""


def test_a_bad_line_is_refused_before_anything_but_the_standard_library_is_imported(two_files):
    flags, where = two_files
    command = [sys.executable, "-c", IMPORTED, str(SCRIPT), *flags]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    names = set(json.loads(done.stdout.splitlines()[-1]))
    assert done.returncode == 1 and done.stderr.startswith(where)
    assert "argparse" in names and names - sys.stdlib_module_names == set()


@pytest.mark.parametrize("name", ["torch", "trl", "transformers", "peft", "datasets"])
def test_a_missing_package_is_one_message(lines, tmp_path, monkeypatch, capsys, name):
    flags = lines(tmp_path, train=2, evaluation=0)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stop:
        t.main([*flags, "--output_dir", str(tmp_path / "out")])
    err = [one for one in capsys.readouterr().err.splitlines() if "Loading weights" not in one]
    assert stop.value.code == 1 and len([one for one in err if one]) == 1
    assert name in err[-1]
    if name in ("datasets", "trl", "peft"):
        assert err[-1].endswith("; pip install -r requirements.txt")


def test_a_signal_ends_a_process_whose_threads_still_run_after_an_error():
    """A download's thread can keep a process alive for long: it must not be deaf then."""
    code = (
        "import sys, threading, time, train_lora_single as t\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "t.run = lambda job: sys.exit('an error')\n"
        "t.main(['--demo', '--dry_run'])\n"
    )
    started = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    assert started.stderr.readline() == "an error\n"
    time.sleep(0.5)
    started.terminate()
    assert started.wait(20) == -signal.SIGTERM
    started.stderr.close()


def test_a_package_whose_version_is_not_to_be_had_either_is_one_message(
    lines, tmp_path, monkeypatch, capsys
):
    """Run.json asks for the versions of all, before one is imported."""
    real = importlib.metadata.version

    def version(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit) as stop:
        t.main([*lines(tmp_path, train=2, evaluation=0), "--output_dir", str(tmp_path / "output")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "peft" in said
    assert said.endswith("; pip install -r requirements.txt")


def test_a_package_that_is_too_old_is_one_message(lines, tmp_path, monkeypatch, capsys):
    flags = lines(tmp_path, train=2, evaluation=0)
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.ModuleType("huggingface_hub"))
    with pytest.raises(SystemExit) as stop:
        t.main([*flags, "--dry_run"])
    err = capsys.readouterr().err
    assert stop.value.code == 1 and err.count("\n") == 1
    assert "huggingface_hub" in err and "pip install -r requirements.txt" in err


@pytest.mark.parametrize(
    ("flags", "set_before", "policy"),
    [
        (["--demo"], {}, "PASSIVE"),
        (["--demo"], {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        (["--demo", "--device", "cuda"], {}, None),
    ],
    ids=["CPU", "CPU, chosen by the user", "GPU"],
)
def test_what_libraries_read_is_in_the_environment_before_torch_is_imported(
    two_files, tmp_path, flags, set_before, policy
):
    files, _ = two_files
    code = "import json, os\nraise SystemExit('SEEN ' + json.dumps(dict(os.environ)))\n"
    (tmp_path / "torch.py").write_text(code)  # it stops the run where torch would be imported
    environment = {key: value for key, value in os.environ.items() if "OMP" not in key}
    environment |= {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "1"} | set_before
    environment["PYTHONPATH"] = str(tmp_path)
    command = [sys.executable, str(SCRIPT), *flags, *files[:4], "--eval_file", ""]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    seen = json.loads(done.stderr.partition("SEEN ")[2])
    assert seen.get("OMP_WAIT_POLICY") == policy
    assert [name for name in seen if name.startswith("ACCELERATE_")] == []  # they add autocast
    assert seen["HF_HUB_DISABLE_TELEMETRY"] == "1"


# ---- the file


def test_the_file_is_short_enough_to_be_read():
    assert len(SOURCE.encode()) <= 64_000
    assert [line for line in SOURCE.splitlines() if len(line) > 100] == []


def test_a_function_has_at_most_50_lines_and_4_arguments():
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 50
    long = [f.name for f in functions if f.end_lineno - f.lineno >= 50]
    wide = []
    for f in functions:
        names = [one.arg for one in f.args.posonlyargs + f.args.args + f.args.kwonlyargs]
        if len([name for name in names if name != "self"]) > 4 and not f.name.startswith("on_"):
            wide.append(f.name)  # a callback's arguments are transformers' choice
    assert (long, wide) == ([], [])


def test_lora_is_injected_by_the_trainer_alone():
    assert not re.search(r"\bget_peft_model\b", SOURCE)
    assert SOURCE.count("peft_config=") == 1


def test_thirteen_banners_stand_in_order():
    assert [number for number, _ in BANNERS] == list(range(1, 14))


def globals_used(table):
    """Return the global names that a function or class, or one inside it, looks up."""
    used = {one.get_name() for one in table.get_symbols() if one.is_global()}
    return used.union(*map(globals_used, table.get_children()))


def test_a_section_uses_only_what_is_defined_in_it_or_above():
    def section(line):
        return max([number for number, start in BANNERS if start <= line], default=0)

    defined = {}
    for node in TREE.body:
        names = [node.name] if hasattr(node, "name") else []
        if isinstance(node, ast.Assign):
            (target,) = node.targets
            names = [one.id for one in getattr(target, "elts", [target])]
        defined |= {name: section(node.lineno) for name in names}
    wrong, count = [], 0
    for table in symtable.symtable(SOURCE, "script", "exec").get_children():
        for name in globals_used(table) & defined.keys():
            count += 1
            if defined[name] > section(table.get_lineno()):
                wrong.append(f"{table.get_name()} uses {name}")
    assert count > 100 and wrong == []
