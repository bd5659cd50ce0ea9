"""The command: a flag for each setting, what is refused, the console, the environment, errors."""

import ast
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from conftest import HAS_INSPECTOR, write_short_data
from packaging.requirements import Requirement
from processes import begin_on_a_terminal, run_in_a_fork
from torch.overrides import TorchFunctionMode
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
    "GENERAL_FILE": "data/general.jsonl",
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
    "PUBLISH": "last",
    "REPORT_TO": "none",
    "EVIDENCE_EXAMPLES": 50,
    "EVAL_GROUP": "kind",
    "NUM_SAMPLES": 6,
    "MAX_NEW_TOKENS": 200,
    "MATMUL": "auto",
}  # fmt: skip
CHOICES = {
    "DTYPE": ["bfloat16", "float32"],
    "DEVICE": ["cuda", "cpu"],
    "REPLIES": ["all", "last"],
    "LR_SCHEDULER_TYPE": ["cosine", "linear", "constant_with_warmup"],
    "PUBLISH": ["last", "best"],
    "MATMUL": ["auto", "native", "float16"],
}
MODES = {"demo": False, "dry_run": False, "split": None}


@pytest.fixture(autouse=True)
def environment_restored():
    """Undo what a run sets in the environment, for the runs after it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def another(name):
    """Return a valid value that is not the setting's own."""
    value = SHIPPED[name]
    if name in CHOICES:
        return CHOICES[name][-1] if value != CHOICES[name][-1] else CHOICES[name][0]
    if isinstance(value, str):
        return "tensorboard" if name == "REPORT_TO" else f"another/{name}"
    if isinstance(value, list):
        return ["up_proj", "k_proj"]
    return value + 1 if isinstance(value, int) else value / 2


def failing(error):
    """Return a function that raises error."""

    def fail(*_, **__):
        raise error

    return fail


def words(value):
    return list(map(str, value if isinstance(value, list) else [value]))


@pytest.fixture
def tensorboard(tmp_path_factory, monkeypatch):
    """Install an empty package of that name."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Return a function that imports a copy of the script with lines replaced, as users edit it."""

    def edit(*changes):
        source = SOURCE
        for old, new in changes:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        path = tmp_path / "edited.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("edited", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "edited", module)
        spec.loader.exec_module(module)
        return module

    return edit


def line_of(name):
    """Return the line of a setting, or its lines."""
    node = STATEMENTS[name]
    return "\n".join(SOURCE.splitlines()[node.lineno - 1 : node.end_lineno])


def refusal(main, argv, capsys, status=2):
    """Return what is said, on one line, when main(argv) exits with this status."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err
    if isinstance(stop.value.code, str):  # Python prints it, and exits with 1
        return stop.value.code
    assert stop.value.code == status
    return " ".join((err.partition("error: ")[2] if status == 2 else err).split())


# ---- settings and their flags


def test_the_shipped_defaults_are_the_articles():
    assert vars(t.parse_settings([])) == SHIPPED | MODES


def test_each_setting_is_a_flag_in_both_spellings_and_in_its_type(tensorboard):
    for name in SHIPPED:
        value = another(name)
        for flag in (f"--{name.lower()}", f"--{name.lower().replace('_', '-')}"):
            given = vars(t.parse_settings([flag, *words(value)]))
            assert given == SHIPPED | MODES | {name: value}, flag
            assert type(given[name]) is type(SHIPPED[name])
            if not isinstance(value, list):
                assert vars(t.parse_settings([f"{flag}={value}"]))[name] == value


def test_help_shows_each_settings_comment_choices_and_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        t.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    said = {words[0]: " ".join(words) for words in map(str.split, re.split(r"\n  (?=-)", out))}
    for name, value in SHIPPED.items():
        comment = line_of(name).splitlines()[0].partition("  # ")[2]
        line = said[f"--{name.lower()}"]
        assert len(comment) > 8 and line.endswith(f" {comment} [{' '.join(words(value))}]")
        assert name not in CHOICES or "{" + ",".join(CHOICES[name]) + "}" in line
    assert {"--demo", "--dry_run", "--split"} < said.keys()
    assert "python train_lora_single.py --dry_run" in out and "inspect_lora.py --help" in out
    titles = re.findall("(?m)^## (.+)$", (SCRIPT.parent / "README.md").read_text(encoding="utf-8"))
    named = re.findall('under "(.+?)"', " ".join(out.split()))
    assert len(named) == 2 and {*named} <= {*titles}
    assert all(name in said["--demo"] for name in t.DEMO)


def test_settings_edited_in_the_file_are_the_defaults_of_their_flags(edited, tensorboard):
    changes = []
    for name in SHIPPED:
        kind = ast.unparse(STATEMENTS[name].annotation)
        changes.append((line_of(name), f"{name}: {kind} = {another(name)!r}  # mine"))
    copy = edited(*changes)
    assert vars(copy.parse_settings([])) == {name: another(name) for name in SHIPPED} | MODES
    assert copy.parse_settings(["--lora_r", "4"]).LORA_R == 4


@pytest.mark.parametrize(
    ("name", "line", "value"),
    [
        ("LORA_R", "LORA_R: int = 2 * 8", 16),
        ("OUTPUT_DIR", 'OUTPUT_DIR: str = "100 %s #2"  # results in %', "100 %s #2"),
        ("LORA_DROPOUT", "LORA_DROPOUT: float = 0  # none", 0),
    ],
    ids=["no comment", "hash and percent", "whole number"],
)
def test_a_setting_counts_however_its_line_is_written(edited, capsys, name, line, value):
    copy = edited((line_of(name), line))
    assert vars(copy.parse_settings([]))[name] == value
    assert copy.parse_settings(["--lora_dropout", "0.1"]).LORA_DROPOUT == 0.1
    with pytest.raises(SystemExit) as stop:
        copy.parse_settings(["--help"])
    assert stop.value.code == 0
    assert f"[{value}]" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("LORA_R", "8", "whole number"),
        ("LORA_R", True, "whole number"),
        ("LORA_R", 0, "from 1 to 512"),
        ("LORA_R", 513, "from 1 to 512"),
        ("LORA_ALPHA", 0, "at least 1"),
        ("SEED", 42.0, "whole number"),
        ("SEED", 2**32, "4,294,967,295"),
        ("LEARNING_RATE", "2e-4", "number"),
        ("LEARNING_RATE", True, "number"),
        ("LEARNING_RATE", float("nan"), "number"),
        ("LEARNING_RATE", 0, "above 0"),
        ("LEARNING_RATE", 1, "below 1"),
        ("LORA_DROPOUT", 1, "below 1"),
        ("WARMUP_RATIO", 1.0, "below 1"),
        ("LORA_TARGET_MODULES", "all-linear", "list of names"),
        ("LORA_TARGET_MODULES", ["q_proj", 3], "list of names"),
        ("LORA_TARGET_MODULES", [], "at least one layer"),
        ("DEVICE", "cud", '"cuda", "cpu"'),
        ("DTYPE", "float16", '"bfloat16", "float32"'),
        ("MODEL_REVISION", None, "text"),
        ("OUTPUT_DIR", Path("output"), "text"),
        ("OUTPUT_DIR", "", "folder"),
        ("MODEL_NAME", "", "hub"),
        ("TRAIN_FILE", "", "JSONL"),
        ("REPORT_TO", "no_such_tracker", "none"),
        *((name, 0, "at least 1") for name in (
            "MAX_SEQ_LEN", "NUM_EPOCHS", "BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS",
            "LOGGING_STEPS", "SAVE_STEPS", "MAX_NEW_TOKENS")),
        *((name, -1, "0 or more") for name in ("MAX_STEPS", "EVIDENCE_EXAMPLES", "NUM_SAMPLES")),
        *((name, -1, "from 0") for name in ("SEED", "LORA_DROPOUT", "WARMUP_RATIO")),
    ],
)  # fmt: skip
def test_a_setting_edited_to_what_it_cannot_be_is_refused(monkeypatch, capsys, name, value, rule):
    monkeypatch.setattr(t, name, value)
    said = refusal(t.main, ["--dry_run"], capsys)
    assert f"{name} is " in said and str(value) in said
    assert rule in said and said.endswith(".")


def test_all_wrong_settings_are_named_at_once(monkeypatch, capsys):
    said = refusal(t.main, ["--lora_r", "0", "--save_steps", "0", "--dry_run"], capsys)
    assert "LORA_R is 0" in said and "SAVE_STEPS is 0" in said
    monkeypatch.setattr(t, "SEED", "x")
    monkeypatch.setattr(t, "DEVICE", "tpu")
    said = refusal(t.main, ["--dry_run"], capsys)
    assert "SEED is 'x'" in said and "DEVICE is 'tpu'" in said


def test_values_at_the_edge_of_what_is_allowed_are_taken():
    edges = {
        "LORA_R": (1, 512), "LORA_ALPHA": (1,), "SEED": (0, 2**32 - 1), "MAX_STEPS": (0, 1),
        "LEARNING_RATE": (1e-9, 0.99), "LORA_DROPOUT": (0.0, 0.99), "WARMUP_RATIO": (0.0, 0.99),
        "NUM_SAMPLES": (0, 1), "EVIDENCE_EXAMPLES": (0, 1), "EVAL_FILE": ("",), "EVAL_GROUP": ("",),
        "GENERAL_FILE": ("",),
        **{name: (1,) for name in (
            "MAX_SEQ_LEN", "NUM_EPOCHS", "BATCH_SIZE", "GRADIENT_ACCUMULATION_STEPS",
            "LOGGING_STEPS", "SAVE_STEPS", "MAX_NEW_TOKENS")},
        **CHOICES,
    }  # fmt: skip
    for name, values in edges.items():
        for value in values:
            assert vars(t.parse_settings([f"--{name.lower()}={value}"]))[name] == value


def test_the_best_epoch_cannot_be_published_without_an_eval_file(capsys):
    said = refusal(t.main, ["--publish", "best", "--eval_file", "", "--dry_run"], capsys)
    assert "PUBLISH" in said and "EVAL_FILE" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--lora_rank 3", ["no flag --lora_rank", "did you mean --lora_r?"]),
        ("--lora-alpa 3", ["did you mean --lora_alpha?"]),
        ("--lora_al 3", ["did you mean --lora_alpha?"]),  # no abbreviations are taken
        ("--LORA_R 3", ["no flag --LORA_R", "did you mean --lora_r?"]),
        ("--epochs 3", ["did you mean --num_epochs?"]),
        ("--dry", ["did you mean --dry_run?"]),
        ("--resume never", ["no flag --resume", "--help"]),
        ("stray", ["stray has no flag before it", "--name_of_the_setting stray"]),
        ("--lora_r 8 16", ["16 has no flag before it"]),
        ("--lora_target_modules q_proj --demo v_proj", ["v_proj has no flag before it"]),
        ("--lora_r 8.0", ["--lora_r", "8.0"]),
        ("--lora_r", ["--lora_r", "one argument"]),
        ("--learning_rate fast", ["--learning_rate", "fast"]),
        ("--learning_rate 1e999", ["LEARNING_RATE is inf"]),
        ("--learning-rate -1", ["LEARNING_RATE is -1"]),
        ("--device tpu", ["--device", "tpu", "cuda", "cpu"]),
        ("--matmul fp16", ["--matmul", "fp16", "auto", "native", "float16"]),
        ("--model_name=", ["MODEL_NAME is ''"]),
        ("--lora_target_modules", ["--lora_target_modules"]),
        ("--lora_target_modules=", ["LORA_TARGET_MODULES"]),
        ("--dry_run=1", ["--dry_run", "1"]),
        ("--report_to no-such", ["REPORT_TO", "no-such"]),
        ("--report_to json", ["REPORT_TO", "json"]),  # a package, but no tracker
    ],
)
def test_a_bad_flag_is_named_and_touches_nothing(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    message = refusal(t.main, argv.split(), capsys)
    assert [part for part in said if part not in message] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--chat", "is now: python inspect_lora.py chat OUTPUT_DIR/final_lora"),
        ("--output_dir=o --chat", "is now: python inspect_lora.py chat OUTPUT_DIR/final_lora"),
        ("--compare a b", "is now: python inspect_lora.py compare FOLDER ..."),
        ("--compare=a", "is now: python inspect_lora.py compare FOLDER ..."),
        ("--matmul dtype", '"dtype" is now called "native"'),
        ("--matmul=dtype", '"dtype" is now called "native"'),
    ],
)
def test_what_an_earlier_version_took_is_answered_with_what_does_it_now(
    argv, said, tmp_path, monkeypatch, capsys
):
    """With status 2, in one sentence, and nothing is done; a folder may have the former name."""
    monkeypatch.chdir(tmp_path)
    message = refusal(t.main, argv.split(), capsys)
    assert message.endswith(said) and list(tmp_path.iterdir()) == []
    assert t.parse_settings(["--train_file", "dtype"]).TRAIN_FILE == "dtype"


def test_a_number_that_is_none_is_told_with_an_example(capsys):
    said = refusal(t.main, ["--learning_rate", "fast"], capsys)
    assert "--learning_rate" in said and "a number, such as 0.0002; it is 'fast'" in said
    said = refusal(t.main, ["--lora_r", "8.0"], capsys)
    assert "--lora_r" in said and "a whole number, such as 8; it is '8.0'" in said


def test_a_file_is_not_held_out_from_itself(capsys):
    same = ["--eval_file", t.TRAIN_FILE]
    said = refusal(t.main, [*same, "--dry_run"], capsys)
    assert "EVAL_FILE is TRAIN_FILE" in said and "on what was learned" in said


@pytest.mark.parametrize("how", ["a dot", "absolute", "symlink", "hard link"])
def test_a_file_under_another_name_is_not_held_out_from_itself(how, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").touch()
    other = {"a dot": "./t.jsonl", "absolute": str(tmp_path / "t.jsonl")}.get(how, "e.jsonl")
    if how == "symlink":
        Path(other).symlink_to("t.jsonl")
    elif how == "hard link":
        Path(other).hardlink_to("t.jsonl")
    files = ["--train_file", "t.jsonl", "--eval_file", other]
    said = refusal(t.main, [*files, "--dry_run"], capsys)
    assert "EVAL_FILE is TRAIN_FILE" in said and "on what was learned" in said


def test_two_files_of_equal_content_are_taken(tmp_path):
    files = [tmp_path / name for name in ("t.jsonl", "e.jsonl")]
    for file in files:
        file.write_text("{}")
    t.parse_settings(["--train_file", str(files[0]), "--eval_file", str(files[1])])


# ---- --demo


def test_demo_changes_what_it_lists_and_any_flag_beside_it_wins():
    demo = vars(t.parse_settings(["--demo"]))
    changed = {name for name in SHIPPED if demo[name] != SHIPPED[name]}
    files = {"MODEL_NAME", "TRAIN_FILE", "EVAL_FILE", "GENERAL_FILE", "OUTPUT_DIR"}
    assert changed == files | {
        "DEVICE", "DTYPE", "NUM_EPOCHS", "MAX_STEPS", "LEARNING_RATE", "EVIDENCE_EXAMPLES",
    }  # fmt: skip
    assert demo["DEVICE"] == "cpu" and demo["OUTPUT_DIR"] != SHIPPED["OUTPUT_DIR"]
    for name in changed:
        given = [f"--{name.lower()}", str(SHIPPED[name])]
        expected = demo | {name: SHIPPED[name]}
        assert vars(t.parse_settings([*given, "--demo"])) == expected
        assert vars(t.parse_settings(["--demo", *given])) == expected


def test_a_bad_value_of_the_demo_is_refused_by_name(monkeypatch, capsys):
    monkeypatch.setitem(t.DEMO, "NUM_EPOCHS", 0.5)
    assert "NUM_EPOCHS is 0.5" in refusal(t.main, ["--demo", "--dry_run"], capsys)


def test_only_the_toy_is_called_one(flags, capsys):
    for more, is_toy in ((["--model_name", t.DEMO["MODEL_NAME"]], True), ([], False)):
        t.main([*flags, *more, "--dry_run"])
        assert bool(re.search("(?m)^demo .* toy ", capsys.readouterr().out)) == is_toy


@pytest.mark.parametrize("name", ["SAVE_STEPS", "MAX_STEPS"])
def test_a_value_that_is_too_large_is_said_to_be(name, capsys):
    said = refusal(t.main, [f"--{name.lower()}", str(2**31), "--dry_run"], capsys)
    assert f"{name} is 2147483648" in said and "at most 2,147,483,647" in said
    assert "at least" not in said and "or more" not in said


def test_the_demos_dry_run_works_from_another_folder_and_writes_nothing(tmp_path):
    done = run_in_a_fork([sys.executable, str(SCRIPT), "--demo", "--dry_run"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1,000 examples" in done.stdout and "trainable params" in done.stdout
    assert "Nothing was trained" in done.stdout
    assert list(tmp_path.iterdir()) == []


# ---- settings that a user adds


def test_a_setting_needs_one_line_and_one_use(edited, flags, tmp_path, monkeypatch, capsys):
    """The flag, its help, the check, run.json, and the refusal of a checkpoint follow from it."""
    copy = edited(
        (line_of("SEED"), f"{line_of('SEED')}\nWEIGHT_DECAY: float = 0.0  # of A and B\n"
         'HF_TOKEN = "hf_abc"'),
        ("        learning_rate=settings.LEARNING_RATE,\n",
         "        learning_rate=settings.LEARNING_RATE,\n"
         "        weight_decay=settings.WEIGHT_DECAY,\n"),
    )  # fmt: skip
    flags = [*flags, "--max_steps", "2", "--save_steps", "1", "--eval_file", ""]
    for argv in (["--weight_decay", "x"], ["--weight_decay", "nan"], ["--hf_token", "x"]):
        assert argv[0].strip("-") in refusal(copy.main, argv, capsys).lower()
    with pytest.raises(SystemExit):
        copy.parse_settings(["--help"])
    assert re.search(r"--weight_decay X\s+of A and B \[0\.0\]", capsys.readouterr().out)
    with monkeypatch.context() as patch:
        patch.setattr(copy, "WEIGHT_DECAY", "0.1")
        assert "WEIGHT_DECAY is '0.1'" in refusal(copy.main, flags, capsys)
    optimizers = []
    make_optimizer = torch.optim.AdamW.__init__

    def remember(self, *args, **options):
        make_optimizer(self, *args, **options)
        optimizers.append(self)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", remember)
    with monkeypatch.context() as patch:  # the checkpoints stay if the check fails
        patch.setattr("peft.PeftModel.from_pretrained", failing(SystemExit("no check")))
        with pytest.raises(SystemExit):
            copy.main([*flags, "--weight-decay", "0.5"])
    assert 0.5 in {group["weight_decay"] for group in optimizers[0].param_groups}
    capsys.readouterr()
    said = refusal(copy.main, [*flags, "--weight_decay", "0.25"], capsys, status=1)
    assert "WEIGHT_DECAY was 0.5 and is now 0.25" in said
    copy.main([*flags, "--weight_decay", "0.5"])
    record = json.loads((tmp_path / "output" / "run.json").read_text(encoding="utf-8"))
    assert record["resumed_from"] and record["settings"]["WEIGHT_DECAY"] == 0.5
    assert record["settings"].keys() == SHIPPED.keys() | {"WEIGHT_DECAY"}
    files = [path for path in (tmp_path / "output").rglob("*") if path.is_file()]
    assert len(files) > 8
    assert [path for path in files if re.search(rb"hf_abc|HF_TOKEN", path.read_bytes())] == []


def test_a_new_setting_may_be_a_switch_or_a_choice_of_numbers(edited, monkeypatch, capsys):
    lines = "FAST: bool = False  # hurry\nLEVEL: Literal[1, 2] = 1  # of care\nTAGS: list[str] = []"
    copy = edited((line_of("SEED"), f"{line_of('SEED')}\n{lines}"))
    given = copy.parse_settings(["--fast", "true", "--tags", "a", "b"])
    assert given.FAST is True and given.TAGS == ["a", "b"]
    assert copy.parse_settings(["--fast=no"]).FAST is False
    assert "--fast" in refusal(copy.parse_settings, ["--fast", "perhaps"], capsys)
    assert copy.parse_settings(["--level", "2"]).LEVEL == 2
    monkeypatch.setattr(copy, "FAST", "yes")
    monkeypatch.setattr(copy, "LEVEL", 3)
    said = refusal(copy.parse_settings, [], capsys)
    assert "FAST is 'yes'; it must be True or False" in said and "LEVEL is 3" in said


def test_a_setting_of_another_type_is_refused_with_the_types(edited, capsys):
    copy = edited((line_of("SEED"), f"{line_of('SEED')}\nPARTS: dict = {{}}  # none"))
    said = refusal(copy.parse_settings, [], capsys)
    assert "PARTS" in said and "list[str]" in said and "Literal" in said


# ---- the console of a whole run

STUB = "def {0}(*args, **options):\n    raise RuntimeError('0 active drivers')\n"


def write_gpu_packages(folder):
    """Write packages that work on a GPU alone, as flash-linear-attention and causal-conv1d do."""
    (folder / "fla" / "ops" / "gated_delta_rule").mkdir(parents=True)
    (folder / "fla" / "__init__.py").write_text("__version__ = '0.6.0'\n")
    (folder / "fla" / "ops" / "__init__.py").write_text("")
    names = ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"]
    code = "\n".join(map(STUB.format, names))
    (folder / "fla" / "ops" / "gated_delta_rule" / "__init__.py").write_text(code)
    names = ["causal_conv1d_fn", "causal_conv1d_update"]
    (folder / "causal_conv1d.py").write_text("\n".join(map(STUB.format, names)))


def short_run(folder, *more):
    """Return the command of a short run in folder, with short names."""
    files = ["--train_file", "train.jsonl", "--eval_file", "eval.jsonl", "--output_dir", "out"]
    return [sys.executable, str(SCRIPT), *write_short_data(folder), *files, *more]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Return (what a whole run printed on a pipe, its folder); packages for GPUs are installed."""
    folder, packages = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("packages")
    write_gpu_packages(packages)
    flags = ["--evidence_examples", "200", "--num_samples", "2", "--eval_group", "kind"]
    done = subprocess.run(
        short_run(folder, *flags),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(packages)},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    return done, folder


def test_packages_that_need_a_gpu_are_not_used_on_a_cpu(whole_run):
    done, _ = whole_run
    assert "0 active drivers" not in done.stdout + done.stderr
    assert done.returncode == 0 and "\ndone " in done.stdout


def test_the_console_holds_lines_in_words_and_nothing_else(whole_run):
    done, _ = whole_run
    assert done.stderr == ""
    assert re.findall(r"\{'|it/s|\d%\||Warning|\r|\x1b", done.stdout) == []
    sections = ["data", "plan", "train", "eval", "verified", "evidence", "done", "next"]
    sections += ["learned", "kinds", "samples"] if HAS_INSPECTOR else []
    for section in sections:
        assert re.search(rf"(?m)^{section} ", done.stdout), section


def test_no_line_of_a_whole_run_is_wider_than_100_columns(whole_run):
    done, _ = whole_run
    story, _, commands = done.stdout.partition("\nnext ")
    assert max(map(len, story.splitlines())) <= 100
    for line in commands.splitlines():
        words = line.removesuffix(" \\").split()
        # One word cannot be cut, nor a flag from its value.
        assert len(line) <= 100 or len(words) == 1 + words[0].startswith("--"), line


def test_the_log_holds_what_was_printed(whole_run):
    done, folder = whole_run
    log = (folder / "out" / "all_logs.log").read_text(encoding="utf-8")
    head, _, rest = log.lstrip("\n").partition("\n")
    assert head.startswith("---- 20") and "--num_samples 2" in head
    assert rest == done.stdout


def on_a_terminal(command, folder):
    """Run a command on a terminal of 100 columns; return status and output."""
    process, terminal = begin_on_a_terminal(command, folder)
    output = b""
    with contextlib.suppress(OSError):  # it ends with an error when the process has ended
        while part := os.read(terminal, 65536):
            output += part
    os.close(terminal)
    process.join()
    return process.exitcode, output.decode("utf-8")


def screen(output):
    """Return the lines that a terminal shows after it was sent output."""
    lines, row, column = [[]], 0, 0
    for part in re.findall(r"\x1b\[A|.", output, re.DOTALL):
        if part == "\n":
            row += 1
        elif part == "\r":
            column = 0
        elif part == "\x1b[A":
            row -= 1
        else:
            line = lines[row]
            line += " " * (column + 1 - len(line))
            line[column] = part
            column += 1
        lines += [[] for _ in range(row + 1 - len(lines))]
    return ["".join(line).rstrip() for line in lines]


def test_on_a_terminal_a_bar_runs_below_whole_lines(tmp_path):
    flags = ["--max_steps", "4", "--num_samples", "0", "--evidence_examples", "2"]
    status, output = on_a_terminal(short_run(tmp_path, *flags), tmp_path)
    assert status == 0
    assert re.search(r"\r 75%\|█+ +\| 3/4 \[.*it/s\]", output)
    assert re.search(r"held-out loss: +\d+%\|", output) and "{'" not in output
    shown = iter(screen(output))
    log = (tmp_path / "out" / "all_logs.log").read_text(encoding="utf-8").splitlines()[2:]
    assert [line for line in log if line.startswith("train ") and "step" in line][3:]
    assert [line for line in log if line not in shown] == []  # each, in order, and nothing in it


# ---- trackers


def test_a_tracker_is_told_every_loss(flags, tensorboard, monkeypatch):
    """The package is empty, and transformers' callback for it a recorder."""
    told = []

    class Recorder(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            told.append((state.global_step, logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Recorder)
    flags = [*flags, "--max_steps", "2"]
    t.main([*flags, "--report_to", "tensorboard"])
    assert [step for step, logs in told if "loss" in logs] == [1, 2]
    assert [step for step, logs in told if "eval_loss" in logs] == [0, 2]
    told.clear()
    t.main(flags)
    assert told == []


def test_a_tracker_that_is_not_installed_is_refused_with_its_command(capsys):
    with contextlib.suppress(ImportError):
        import trackio  # noqa: F401

        pytest.skip("it is installed")
    message = refusal(t.main, ["--report_to", "trackio", "--dry_run"], capsys)
    assert "is not installed; pip install trackio" in message and '"none"' in message


def test_a_folder_of_a_trackers_name_is_no_package(tmp_path, monkeypatch, capsys):
    """wandb leaves its runs in such a folder, and the script's own folder is on Python's path."""
    with contextlib.suppress(ImportError):
        import wandb

        if getattr(wandb, "__file__", None):
            pytest.skip("it is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    message = refusal(t.main, ["--report_to", "wandb", "--dry_run"], capsys)
    assert "is not installed; pip install wandb" in message


# ---- the GPU


@pytest.fixture
def no_gpu(monkeypatch):
    """Make torch say what it says on a machine without a GPU, wherever the tests run."""
    error = RuntimeError("Found no NVIDIA driver on your system.")
    monkeypatch.setattr(torch.cuda, "init", failing(error))


GPU_FLAGS = ["--device", "cuda", "--dtype", "bfloat16"]


@pytest.mark.parametrize("visible", [None, "3", ""])
def test_without_a_gpu_the_message_says_why_and_what_to_do(
    no_gpu, edited, flags, monkeypatch, capsys, visible
):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(SystemExit):
        edited().main([*flags, *GPU_FLAGS])
    err = capsys.readouterr().err
    assert max(map(len, err.splitlines())) <= 100
    said = " ".join(err.split())
    assert "no GPU" in said and "--demo" in said
    if not Path("/proc/driver/nvidia/version").exists():
        assert said.count("no NVIDIA driver") == 1  # and not in torch's words besides
    assert "--demo" in said and "--device cpu" in said
    # What the script itself sets for the libraries is not the user's.
    assert f"CUDA_VISIBLE_DEVICES is {visible!r}" in said or visible is None
    assert "CUDA_VISIBLE_DEVICES" not in said or visible is not None


class NoKernels(TorchFunctionMode):
    """Let every computation on a GPU fail as a torch without the GPU's kernels does."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if torch.device((kwargs or {}).get("device") or "cpu").type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def two_rtx_4090(tmp_path, monkeypatch):
    """Pretend two RTX 4090 with a driver of 2023, for which torch has no kernels.

    accelerate asks nvidia-smi for their names and the driver (peft issue 1927).
    """
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(
        '#!/bin/sh\ncase "$*" in\n*driver_version*) echo 535.54.03; echo 535.54.03;;\n'
        "*) echo 2, NVIDIA GeForce RTX 4090; echo 2, NVIDIA GeForce RTX 4090;;\nesac\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(accelerate.PartialState, "_shared_state", {})
    answers = {
        "is_available": True, "set_device": None, "device_count": 2, "is_bf16_supported": True,
        "get_device_capability": (8, 9), "mem_get_info": (2**34, 2**34),
        "get_device_name": "NVIDIA GeForce RTX 4090",
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(torch.cuda, "init", lambda: stack.enter_context(NoKernels()))
        yield


def test_a_torch_without_the_gpus_kernels_is_named_with_the_gpu(two_rtx_4090, flags, capsys):
    said = refusal(t.main, [*flags, *GPU_FLAGS], capsys, status=1)
    assert f"torch {torch.__version__}" in said and "NVIDIA GeForce RTX 4090, sm_89" in said
    assert "no kernel image" in said and "requirements.txt" in said


def test_two_rtx_40_with_an_old_driver_do_not_stop_a_run(two_rtx_4090, flags, capsys):
    with pytest.raises(NotImplementedError):  # accelerate by itself
        accelerate.PartialState()
    accelerate.PartialState._shared_state.clear()
    refusal(t.main, [*flags, *GPU_FLAGS], capsys, status=1)
    assert accelerate.PartialState().device.type == "cuda"


def test_several_processes_must_share_the_examples_evenly(flags, monkeypatch, capsys):
    accelerate.PartialState(cpu=True)
    monkeypatch.setitem(accelerate.PartialState._shared_state, "num_processes", 2)
    for more in (["--batch_size", "4"], ["--batch_size", "1", "--gradient-accumulation-steps=1"]):
        said = refusal(t.main, [*flags, *more], capsys, status=1)
        assert "2 processes cannot share 13 examples" in said and "multiple of 2" in said


# ---- errors and exit statuses


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("Tried to allocate 1 GiB"),
            ["1 GiB", "MAX_SEQ_LEN", "same command", "resumes", "OUTPUT_DIR"],
        ),
        (ModuleNotFoundError("No module", name="peft"), ["peft", "-r requirements.txt"]),
    ],
    ids=["memory", "package"],
)
def test_what_is_known_to_be_wrong_is_one_message(flags, monkeypatch, capsys, error, said):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", failing(error))
    message = refusal(t.main, flags, capsys, status=1)
    assert [part for part in said if part not in message] == []
    log = Path(flags[-1], "all_logs.log").read_text(encoding="utf-8")
    assert "Traceback" in log and type(error).__name__ in log


@pytest.mark.parametrize("mode", [[], ["--dry_run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("a bug"), ModuleNotFoundError("No module named 'a_typo'", name="a_typo"),
     PermissionError(13, "Permission denied"), ConnectionError("the network"), EOFError()],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_is_not_known_is_a_traceback(flags, monkeypatch, capsys, error, mode):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", failing(error))
    with pytest.raises(type(error)):
        t.main([*flags, *mode])
    assert "requirements" not in capsys.readouterr().err
    log = Path(flags[-1], "all_logs.log")
    assert mode or "Traceback" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["trl", "peft", "filelock", "jinja2"])
def test_a_package_that_is_missing_is_one_message(flags, monkeypatch, capsys, name):
    """Neither its code nor its version is to be had; the versions are recorded first."""
    version = importlib.metadata.version

    def version_unless_missing(asked):
        if asked == name:
            raise importlib.metadata.PackageNotFoundError(asked)
        return version(asked)

    monkeypatch.setattr(importlib.metadata, "version", version_unless_missing)
    monkeypatch.setitem(sys.modules, name, None)
    message = refusal(t.main, flags, capsys, status=1)
    assert name in message and "pip install -r requirements.txt" in message


def test_an_older_python_is_one_message(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 12, "final", 0))
    with pytest.raises(SystemExit, match=r"Python 3\.11.*README"):
        runpy.run_path(str(SCRIPT))


def test_windows_is_refused_in_one_message(monkeypatch):
    """It has neither SIGHUP nor EDQUOT."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match=r"Linux.*WSL"):
        runpy.run_path(str(SCRIPT))


def test_importing_the_script_prints_nothing_and_changes_nothing(edited, tmp_path, capfd):
    before = dict(os.environ), os.getcwd(), signal.getsignal(signal.SIGINT)
    edited()
    assert (dict(os.environ), os.getcwd(), signal.getsignal(signal.SIGINT)) == before
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in tmp_path.iterdir()} <= {"edited.py", "__pycache__"}


@pytest.mark.parametrize("redirect", [">&-", "> /dev/full", "| true", "2>&-", "2> /dev/full"])
def test_an_output_that_cannot_be_written_changes_no_status(tmp_path, redirect):
    (tmp_path / "Grüße.jsonl").write_text("")
    shell = f'"$@" {redirect}; exit ${{PIPESTATUS[0]}}'
    command = ["bash", "-c", shell, "bash", sys.executable, str(SCRIPT), "--demo", "--train_file"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, "Grüße.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        env=environment,
        encoding="utf-8",
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr == "" if "2>" in redirect else done.stderr.startswith("Grüße.jsonl holds no")


# ---- the environment


def adapter_after(flags, folder):
    """Return the bytes of the adapter that a run of two steps leaves."""
    more = ["--eval_file", "", "--max_steps", "2", "--output_dir", str(folder)]
    t.main([*flags, *more])
    return (folder / "final_lora" / "adapter_model.safetensors").read_bytes()


def test_what_a_launcher_left_behind_changes_no_byte(flags, tmp_path, monkeypatch, capsys):
    alone = adapter_after(flags, tmp_path / "alone")
    left = {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_FSDP": "1",
    }  # fmt: skip
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    assert adapter_after(flags, tmp_path / "left") == alone
    assert "\ndone " in capsys.readouterr().out  # a second process would say nothing
    assert adapter_after([*flags, "--seed", "1"], tmp_path / "other") != alone


@pytest.mark.parametrize(
    ("flags", "before", "expected"),
    [
        (["--demo"], {}, {"OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}),
        (["--demo"], {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ([], {"CUDA_VISIBLE_DEVICES": "3,1"}, {"CUDA_VISIBLE_DEVICES": "3"}),
        ([], {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": ""}),
        ([], {}, {"OMP_WAIT_POLICY": None, "CUDA_VISIBLE_DEVICES": "0", "NCCL_P2P_DISABLE": "1",
                  "NCCL_IB_DISABLE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                  "HF_HUB_DISABLE_PROGRESS_BARS": "1", "RANK": None,
                  "ACCELERATE_USE_FSDP": None, "MPLBACKEND": None}),
        ([], {"TORCHELASTIC_RUN_ID": "1", "CUDA_VISIBLE_DEVICES": "3,1"},
         {"CUDA_VISIBLE_DEVICES": "3,1", "RANK": "0", "NCCL_P2P_DISABLE": None,
          "ACCELERATE_USE_FSDP": None}),
    ],
    ids=["CPU", "CPU, chosen by the user", "several GPUs", "GPUs hidden", "one GPU", "a launcher"],
)  # fmt: skip
def test_what_libraries_read_is_set_before_torch_is_imported(tmp_path, flags, before, expected):
    """A package named torch writes down the environment, and ends the run."""
    write_short_data(tmp_path)
    (tmp_path / "torch.py").write_text(
        "import json, os\njson.dump(dict(os.environ), open('seen.json', 'w'))\n"
        "raise SystemExit('enough')\n"
    )
    forget = r"OMP|CUDA|NCCL|HF_HUB_DISABLE|TORCHELASTIC"
    environment = {name: os.environ[name] for name in os.environ if not re.match(forget, name)}
    environment |= {"RANK": "0", "ACCELERATE_USE_FSDP": "1", "MPLBACKEND": "tkagg"}
    environment |= {"PYTHONPATH": str(tmp_path)} | before
    command = [sys.executable, SCRIPT, *flags, "--train_file", "train.jsonl", "--eval_file", ""]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr == "enough\n"
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert {name: seen.get(name) for name in expected} == expected


# ---- requirements.txt


def test_the_requirements_have_bounds_and_a_torch_with_the_v100s_kernels():
    lines = (SCRIPT.parent / "requirements.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    found = {one.name: one.specifier for one in found}
    imported = {
        "torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors",
        "matplotlib",
    }  # fmt: skip
    assert found.keys() == imported | {"huggingface_hub", "filelock", "tqdm", "jinja2"}
    for name in imported:
        assert found[name].contains(importlib.metadata.version(name)), name
        assert not found[name].contains("999"), name
    # PyPI's wheels hold the kernels of the V100 (sm_70) up to torch 2.10.
    assert found["torch"].contains("2.7.0") and found["torch"].contains("2.10.9")
    assert not found["torch"].contains("2.11.0") and not found["torch"].contains("2.6.0")
