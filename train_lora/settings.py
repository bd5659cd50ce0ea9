"""Each constant of the script is a flag, is checked, and is recorded in run.json.

This room imports nothing slow, so that --help and mistakes in settings are told at once.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import os
import re
from pathlib import Path
from typing import Any

from train_lora.code import Sources, read_sources
from train_lora.console import report


class Settings(argparse.Namespace):
    """The constants as flags change them, each under its name, and what else a run is told."""

    dry_run: bool
    edited_code: bool
    names: list[str]  # of the constants
    sources: Sources  # of the script and of all rooms


HERE = Path(__file__).resolve().parent.parent
DEMO = {  # what --demo sets; the toy model was made by data/make_demo_model.py
    "MODEL_NAME": f"{HERE}/data/demo-model",
    "TRAIN_FILE": f"{HERE}/data/train.jsonl",
    "EVAL_FILE": f"{HERE}/data/eval.jsonl",
    "OUTPUT_DIR": "output/demo",
    "DEVICE": "cpu",
    "DTYPE": "float32",
    "MAX_STEPS": 100,
    "LEARNING_RATE": 2e-3,
}
ALSO_CALLED = {"--lr": "--learning_rate", "--rank": "--lora_r"}  # by those who know TRL or PEFT
MAY_BE_EMPTY = ("CHAT_TEMPLATE", "EVAL_FILE", "START_FROM")
PATHS = ("MODEL_NAME", "TRAIN_FILE", "OUTPUT_DIR", *MAY_BE_EMPTY)
# A type, a list of choices, a range of whole numbers, or the smallest and the largest number.
ALLOWED_VALUES: dict[str, Any] = {
    **dict.fromkeys(["MODEL_REVISION", *PATHS], str),
    "LORA_TARGET_MODULES": list,
    "DTYPE": ["bfloat16", "float32"],
    "DEVICE": ["cuda", "cpu"],
    "REPLIES": ["all", "last"],
    "LR_SCHEDULER_TYPE": ["cosine", "linear", "constant_with_warmup"],
    "FINAL_LORA": ["last", "best"],
    "REPORT_TO": ["none", "tensorboard", "wandb", "trackio"],
    "MATMUL": ["auto", "native", "float16"],
    "ENABLE_THINKING": [False, True],
    "USE_FLA": [False, True],
    **dict.fromkeys(["MAX_SEQ_LEN", "NUM_EPOCHS", "BATCH_SIZE", "SAVE_STEPS"], range(1, 2**31)),
    **dict.fromkeys(["GRADIENT_ACCUMULATION_STEPS", "LOGGING_STEPS"], range(1, 2**31)),
    **dict.fromkeys(["MAX_STEPS", "EVAL_STEPS"], range(2**31)),
    "LORA_R": range(1, 513),  # vLLM serves no higher rank
    "SEED": range(2**32),
    "LORA_ALPHA": (1e-9, 1e9),
    "LEARNING_RATE": (1e-9, 0.5),
    **dict.fromkeys(["LORA_DROPOUT", "WARMUP_RATIO"], (0.0, 0.99)),
}


def parse_settings(script: dict[str, Any], argv: list[str] | None = None) -> Settings:
    """Return a script's constants as flags change them; exit with status 2 and list every fault.

    script has the script's global names.
    """
    constants = {name: value for name, value in script.items() if name.isupper()}
    path = Path(script["__file__"])
    sources = read_sources(path)
    parser = make_parser(script["__doc__"], constants, sources[path].decode())
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        word, options = unknown[0].partition("=")[0], [f"--{name.lower()}" for name in constants]
        close = difflib.get_close_matches(ALSO_CALLED.get(word, word), options, 1, 0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    flags = vars(known)
    switches = {name: flags.pop(name, False) for name in ("dry_run", "edited_code")}
    values = constants | (DEMO if flags.pop("demo", False) else {}) | flags
    if problems := what_is_wrong(values, constants):
        parser.error("\n".join(problems))
    values |= {name: os.path.expanduser(values[name]) for name in PATHS}
    return Settings(**values, **switches, names=[*constants], sources=sources)


def make_parser(doc: str, constants: dict[str, Any], source: str) -> argparse.ArgumentParser:
    """Return the parser of a script's flags, whose help is the comment beside each constant."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--SETTING VALUE ...] [--dry_run] [--demo]",
        description=doc.partition("\n\nThe file")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # flags not given are absent
        allow_abbrev=False,
    )
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="only print the plan")
    parser.add_argument("--demo", action="store_true", help=f"sets {', '.join(DEMO)}")
    edited_help = "go on with a job although the code has been edited since"
    parser.add_argument("--edited_code", "--edited-code", action="store_true", help=edited_help)
    comments = dict(re.findall(r"(?m)^([A-Z_\d]+)(?:: .+?)? = .*?  # (.+)$", source))
    for name, constant in constants.items():
        parser.add_argument(
            *sorted({f"--{name.lower()}", f"--{name.lower().replace('_', '-')}"}),
            dest=name,
            nargs="+" if isinstance(constant, list) else None,
            type=str if isinstance(constant, str) else number_or_text,
            metavar="X",
            help=f"{comments.get(name, '')} [{constant}]".replace("%", "%%"),
        )
    return parser


def number_or_text(text: str) -> Any:
    """Return the number, True or False that a flag's text stands for, or else the text."""
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text.title() if text.isalpha() else text)
    return text


def what_is_wrong(values: dict[str, Any], constants: dict[str, Any]) -> list[str]:
    """Return one sentence for each wrong setting."""
    problems = []
    for name, value in values.items():
        rule, constant = ALLOWED_VALUES.get(name), constants[name]
        if isinstance(rule, list):
            is_right, wanted = repr(value) in map(repr, rule), f"one of {rule}"  # 1 is not True
        elif isinstance(rule, range):
            is_right = type(value) is int and value in rule
            wanted = f"a whole number from {rule[0]} to {rule[-1]}"
        elif isinstance(rule, tuple):
            is_right = type(value) in (int, float) and rule[0] <= value <= rule[1]
            wanted = f"a number from {rule[0]} to {rule[1]}"
        elif rule is list:
            is_right = isinstance(value, list) and {*map(type, value)} == {str}
            wanted = 'a list of names, such as ["q_proj"] or ["all-linear"]'
        elif rule is str:
            is_right = isinstance(value, str) and (value != "" or name in MAY_BE_EMPTY)
            wanted = 'a file, a percentage like "10%", or ""' if name == "EVAL_FILE" else "text"
        else:  # a setting of your own
            is_right = constant is None or kind_of(value) == kind_of(constant)
            wanted = f"like {constant!r}"
        if name == "DEVICE":
            wanted += "; the environment variable CUDA_VISIBLE_DEVICES=1 selects the second GPU"
        if not is_right:
            problems.append(f"{name} is {value!r}: it must be {wanted}")
    eval_file = str(values["EVAL_FILE"])
    if eval_file.endswith("%") and not 1 <= percent_of(eval_file) <= 50:
        problems.append(f'EVAL_FILE is {eval_file!r}: it must be from "1%" to "50%"')
    for name, file in (("CHAT_TEMPLATE", ""), ("START_FROM", "adapter_model.safetensors")):
        path = Path(str(values[name])).expanduser() / file
        is_word = values[name] == "" or (name, values[name]) == ("CHAT_TEMPLATE", "one_pass")
        if not is_word and not path.is_file():
            problems.append(f"{name} is {values[name]!r}: there is no file {path}")
    if values["FINAL_LORA"] == "best" and not eval_file:
        problems.append('FINAL_LORA is "best": EVAL_FILE is needed to find that step')
    return problems


def kind_of(value: Any) -> type:
    """Return the type of a value; all numbers are of one kind."""
    return float if type(value) is int else type(value)


def percent_of(eval_file: str) -> int:
    """Return the percentage of an EVAL_FILE like "10%", or 0 for the name of a file."""
    percentage = re.fullmatch(r"(\d+)\s*%", eval_file)
    return int(percentage[1]) if percentage else 0


def examples_per_step(settings: Settings) -> int:
    """Return the number of examples in one optimizer step, across all processes."""
    return settings.BATCH_SIZE * settings.GRADIENT_ACCUMULATION_STEPS


def tell_of_unused_settings(settings: Settings) -> None:
    """Print which constants, such as one's own, neither the script nor a room reads."""
    code = b"\n".join(settings.sources.values()).decode()
    for name in settings.names:
        if not re.search(rf"(?m)^[^#\n]*settings\.{name}\b", code):
            report("warning", f"{name} changes nothing: no line here reads settings.{name}")
