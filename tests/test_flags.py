"""The flags: one for each constant, typed, checked and explained by its comment; and --demo."""

import builtins
import importlib
import itertools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import train_lora_single as t

CONSTANTS = [name for name in itertools.takewhile(lambda name: name != "DEMO", vars(t)) if name.isupper()]
NUMBERS = [name for name in CONSTANTS if type(getattr(t, name)) in (int, float)]
MAY_BE_ZERO = ["SEED", "LORA_DROPOUT", "WARMUP_RATIO", "NUM_SAMPLES"]
OUT_OF_RANGE = [
    (name, value) for name in NUMBERS for value in (0, -1, "nan", "inf") if value != 0 or name not in MAY_BE_ZERO
]
HEAVY = {"torch", "numpy", "transformers", "trl", "peft", "datasets", "accelerate", "safetensors", "huggingface_hub"}
HEAVY |= {"matplotlib"}
TRACKERS = ["tensorboard", "trackio", "wandb", "mlflow"]


@pytest.fixture(autouse=True)
def trackers_are_installed(monkeypatch, tmp_path_factory):
    """Put an empty package of each tracker's name on the path."""
    folder = tmp_path_factory.mktemp("trackers")
    for name in TRACKERS:
        (folder / f"{name}.py").touch()
    monkeypatch.syspath_prepend(folder)


def another(constant):
    """Return a valid value that is not the constant's own."""
    value = getattr(t, constant)
    choices = {"DEVICE": "cpu", "DTYPE": "float32", "LR_SCHEDULER_TYPE": "linear"}
    choices |= {"RESUME": "never", "REPORT_TO": "tensorboard"}
    if isinstance(value, str):
        return choices.get(constant, "elsewhere")
    return ["up_proj", "k_proj"] if isinstance(value, list) else value + 1 if isinstance(value, int) else value / 2


def flag(constant, value):
    return [f"--{constant.lower()}", *(value if isinstance(value, list) else [str(value)])]


def refusal(argv, capsys):
    """Return what is said after "error:" when argv is refused with status 2."""
    with pytest.raises(SystemExit) as stop:
        t.parse_args(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.partition("error:")[2]


def test_the_flags_are_the_constants_and_two_switches_that_are_off():
    assert {"MODEL_NAME", "SAVE_STEPS"} < set(CONSTANTS)
    expected = {name.lower(): getattr(t, name) for name in CONSTANTS} | {"demo": False, "dry_run": False}
    assert vars(t.parse_args([])) == expected


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_flag_sets_its_constant_alone_and_in_its_type(constant):
    args = vars(t.parse_args(flag(constant, another(constant))))
    assert args == vars(t.parse_args([])) | {constant.lower(): another(constant)}
    assert type(args[constant.lower()]) is type(getattr(t, constant))


@pytest.mark.parametrize("constant", CONSTANTS)
def test_an_edited_constant_is_the_default_of_its_flag(constant, monkeypatch):
    value = another(constant)
    monkeypatch.setattr(t, constant, value)
    assert vars(t.parse_args([]))[constant.lower()] == value


def test_dry_run_is_a_switch():
    assert vars(t.parse_args(["--dry_run"])) == vars(t.parse_args([])) | {"dry_run": True}


@pytest.mark.parametrize("constant", CONSTANTS)
def test_the_help_of_a_flag_is_the_comment_of_its_constant_and_the_value(constant, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "2000")
    source = Path(t.__file__).read_text(encoding="utf-8")
    (line,) = [line for line in source.splitlines() if line.startswith(f"{constant} = ")]
    comment, value = line.partition("  # ")[2], getattr(t, constant)
    with pytest.raises(SystemExit) as stop:
        t.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.replace(" [VALUE ...]", "").split())
    assert stop.value.code == 0
    assert comment and f" --{constant.lower()} VALUE {comment} [{value}]" in text


def test_help_is_quick_because_it_imports_no_library_and_names_every_flag(tmp_path):
    before = os.times()
    command = [sys.executable, "-X", "importtime", t.__file__, "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    after = os.times()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert result.returncode == 0
    assert [name for name in ["demo", "dry_run", *CONSTANTS] if f"\n  --{name.lower()} " not in result.stdout] == []
    assert "argparse" in imported and imported.isdisjoint(HEAVY)
    assert sum(after[2:4]) - sum(before[2:4]) < 1, "seconds of processor time"
    assert os.listdir(tmp_path) == []


def test_importing_the_script_imports_no_library_prints_nothing_and_changes_nothing(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    imported, environment, real_import = set(), {}, builtins.__import__

    def recording_import(name, *args, **kwargs):
        imported.add(name.partition(".")[0])
        return real_import(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", recording_import)
        patch.setattr(os, "environ", environment)
        defined = runpy.run_path(t.__file__, run_name="imported")
    assert {"main", "LORA_R"} < set(defined)
    assert "argparse" in imported and imported.isdisjoint(HEAVY)
    assert os.listdir() == [] and environment == {}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--lora_rank 3", ["--lora_rank"]),
        ("--lora_al 3", ["--lora_al 3"]),
        ("--dry", ["--dry"]),
        ("--LORA_R 3", ["--LORA_R"]),
        ("--lora-r 3", ["--lora-r"]),
        ("stray", ["stray"]),
        ("--lora_r 8.0", ["--lora_r", "8.0"]),
        ("--lora_r eight", ["--lora_r", "eight"]),
        ("--lora_r", ["--lora_r"]),
        ("--learning_rate fast", ["--learning_rate", "fast"]),
        ("--learning_rate -1e-4", ["--learning_rate"]),
        ("--learning_rate 1e999", ["--learning_rate"]),
        ("--device tpu", ["--device", "tpu", "cuda", "cpu"]),
        ("--dtype float16", ["--dtype", "float16", "bfloat16", "float32"]),
        ("--lr_scheduler_type step", ["--lr_scheduler_type", "step", "cosine", "linear", "constant_with_warmup"]),
        ("--resume never_again", ["--resume", "never_again", "auto", "never"]),
        ("--resume", ["--resume"]),
        ("--num_samples -1", ["--num_samples", "-1"]),
        ("--num_samples 2.5", ["--num_samples", "2.5"]),
        ("--max_new_tokens 0", ["--max_new_tokens", "0"]),
        ("--max_new_tokens many", ["--max_new_tokens", "many"]),
        ("--report_to all", ["--report_to", "all", "none", *TRACKERS]),
        ("--report_to wandb mlflow", ["mlflow"]),
        ("--lora_dropout 1.0", ["--lora_dropout", "1"]),
        ("--warmup_ratio 1.0", ["--warmup_ratio", "1"]),
        ("--lora_r 513", ["--lora_r", "513"]),
        ("--lora_target_modules", ["--lora_target_modules"]),
        ("--lora_target_modules q_proj --demo v_proj", ["v_proj"]),
        ("--dry_run=1", ["--dry_run", "1"]),
    ],
)
def test_a_bad_flag_is_refused_by_name(argv, said, capsys):
    message = refusal(argv.split(), capsys)
    assert [part for part in said if part not in message] == []


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_is_taken_if_it_is_installed_and_otherwise_refused_with_the_command_to_install_it(
    tracker, monkeypatch, capsys
):
    assert t.parse_args(["--report_to", tracker]).report_to == tracker
    monkeypatch.setitem(sys.modules, tracker, None)
    message = refusal(["--report_to", tracker], capsys)
    assert f"--report_to {tracker}" in message and f"pip install {tracker}" in message


@pytest.mark.parametrize(("constant", "value"), OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused_by_name(constant, value, capsys):
    message = refusal(flag(constant, value), capsys)
    assert f"--{constant.lower()}" in message and str(value) in message


@pytest.mark.parametrize("constant", NUMBERS)
def test_a_constant_edited_out_of_range_is_refused_as_its_flag_is(constant, monkeypatch, capsys):
    monkeypatch.setattr(t, constant, -1)
    assert constant.lower() in refusal([], capsys)


@pytest.mark.parametrize(
    ("constant", "value"),
    [
        *((constant, 0) for constant in MAY_BE_ZERO),
        *((constant, 1) for constant in NUMBERS if type(getattr(t, constant)) is int),
        ("LORA_DROPOUT", 0.99),
        ("WARMUP_RATIO", 0.99),
        ("LORA_R", 512),
        ("LEARNING_RATE", 1),
        ("LEARNING_RATE", 1e-9),
    ],
)
def test_a_number_at_the_edge_of_its_range_is_accepted(constant, value):
    assert vars(t.parse_args(flag(constant, value)))[constant.lower()] == value


@pytest.mark.parametrize("targets", [["v_proj"], ["q_proj", "v_proj"], ["down_proj", "q_proj", "o_proj"]])
def test_target_modules_are_one_name_or_several_and_end_at_the_next_flag(targets):
    args = t.parse_args(["--lora_target_modules", *targets, "--lora_r", "4"])
    assert (args.lora_target_modules, args.lora_r) == (targets, 4)


def test_demo_changes_what_it_lists_and_nothing_else():
    assert vars(t.parse_args(["--demo"])) == vars(t.parse_args([])) | t.DEMO | {"demo": True}


def test_demo_overrides_constants_with_other_values_of_their_type():
    constants = {name.upper(): value for name, value in t.DEMO.items()}
    assert constants.keys() <= set(CONSTANTS)
    assert {name: type(value) for name, value in constants.items()} == {
        name: type(getattr(t, name)) for name in constants
    }
    assert [name for name, value in constants.items() if value == getattr(t, name)] == []


@pytest.mark.parametrize("name", t.DEMO)
def test_a_flag_beside_demo_wins_before_or_after_it_even_with_the_usual_value(name):
    usual = getattr(t, name.upper())
    given, expected = flag(name, usual), vars(t.parse_args(["--demo"])) | {name: usual}
    assert vars(t.parse_args([*given, "--demo"])) == vars(t.parse_args(["--demo", *given])) == expected


def edited(tmp_path, old, new):
    """Return parse_args of a copy of the script with one line edited."""
    source = Path(t.__file__).read_text(encoding="utf-8")
    assert len(re.findall(old, source, re.MULTILINE)) == 1
    (tmp_path / "edited.py").write_text(re.sub(old, lambda _: new, source, flags=re.MULTILINE), encoding="utf-8")
    return runpy.run_path(str(tmp_path / "edited.py"))["parse_args"]


@pytest.mark.parametrize("line", ["LORA_R = 16", "LORA_R = 16 # rank", "LORA_R: int = 16  # rank"])
def test_a_constant_counts_however_its_line_is_written(tmp_path, line):
    parse_args = edited(tmp_path, r"^LORA_R = 8 .*$", line)
    assert parse_args([]).lora_r == 16 and parse_args(["--lora_r", "4"]).lora_r == 4


def test_a_list_may_go_over_several_lines(tmp_path):
    lines = 'LORA_TARGET_MODULES = [\n    "q_proj",\n    "v_proj",\n]'
    assert edited(tmp_path, r"^LORA_TARGET_MODULES = [^]]*\].*$", lines)([]).lora_target_modules == [
        "q_proj",
        "v_proj",
    ]


def test_a_comment_may_hold_a_percent_sign(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        edited(tmp_path, r"^WARMUP_RATIO = .*$", "WARMUP_RATIO = 0.03  # 3 % of the steps")(["--help"])
    assert stop.value.code == 0 and "3 % of the steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("constant", "value"),
    [
        ("DTYPE", "float16"),
        ("DEVICE", "gpu"),
        ("LR_SCHEDULER_TYPE", "cosin"),
        ("RESUME", "yes"),
        ("RESUME", ""),
        ("RESUME", True),
        ("REPORT_TO", "all"),
        ("REPORT_TO", ""),
        ("REPORT_TO", None),
        ("NUM_SAMPLES", -1),
        ("LORA_TARGET_MODULES", []),
        ("LORA_TARGET_MODULES", "all-linear"),
        ("OUTPUT_DIR", ""),
        ("SEED", 2**32),
        ("LORA_R", 0),
    ],
)
def test_an_edited_constant_is_checked_like_a_flag(monkeypatch, capsys, constant, value):
    monkeypatch.setattr(t, constant, value)
    assert f"--{constant.lower()} {value}: must be" in refusal([], capsys)


def test_a_mere_folder_of_a_trackers_name_is_no_tracker(tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb").mkdir()  # as wandb itself leaves it where it ran
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    assert "pip install wandb" in refusal(["--report_to", "wandb"], capsys)


def test_the_training_file_is_not_taken_for_evaluation(capsys):
    assert f"--eval_file {t.TRAIN_FILE}:" in refusal(["--eval_file", t.TRAIN_FILE], capsys)


def test_only_the_eval_file_may_be_empty(capsys):
    assert t.parse_args(["--eval_file", ""]).eval_file == ""
    for name in ("model_name", "train_file", "output_dir"):
        assert f"--{name}" in refusal([f"--{name}", ""], capsys)


def test_a_rate_edited_to_a_whole_number_keeps_a_flag_for_fractions(monkeypatch):
    monkeypatch.setattr(t, "LORA_DROPOUT", 0)
    assert t.parse_args(["--lora_dropout", "0.1"]).lora_dropout == 0.1
