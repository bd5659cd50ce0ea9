"""Training time of SmolLM2-135M on this machine: the script against another, in turn.

The other is TRL's own command, or another copy of the script, to show that neither is slower.
"""

from __future__ import annotations

import collections
import json
import re
import resource
import shlex
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import transformers

from benchmarks.common import (
    HELD_OUT,
    SCRIPT,
    TRAIN,
    Options,
    prepared_job,
    quiet,
    run_python,
    shipped_lines,
    speaking_model,
    t,
    table,
    write_lines,
)

# The work that the script does for what TRL's defaults do with Qwen3.5-4B, counted: 1.014 / 1.894
# (docs/gpu.md). SmolLM2's may differ.
OF_TRL = 0.55
OF_ANOTHER_COPY = 1.03  # as long, but for what other work on this machine costs
OURS, TRLS = "this script", "trl sft"


def cpu(options: Options) -> None:
    """Train a small model on some lines with the script and with the other, in turn."""
    model = speaking_model(options)
    lines = shipped_lines(TRAIN, 4 if options.tiny else 64, shortest=options.tiny)
    data = write_lines(options.folder / "data" / "train.jsonl", lines)
    steps = len(lines) // t.examples_per_step(t.parse_settings([]))
    ways: dict[str, Callable[[Path], float]] = {
        OURS: lambda to: with_script(SCRIPT, model, data, to)
    }
    other, limit = TRLS, OF_TRL
    if options.against:
        other, limit = "the other copy", OF_ANOTHER_COPY
        ways[other] = lambda to: with_script(options.against, model, data, to)
    else:
        ways[other] = lambda to: with_trl(model, data, to)
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    busy: dict[str, list[float]] = collections.defaultdict(list)
    folders: dict[str, Path] = {}
    for number in range(options.pairs):
        for name, train in ways.items():
            folders[name] = options.folder / f"{name.replace(' ', '-')}-{number}"
            before = processor_seconds()
            seconds[name].append(train(folders[name]))
            busy[name].append(processor_seconds() - before)
    losses = {name: loss_of_adapter(model, folder, options) for name, folder in folders.items()}
    print(
        f"CPU       {Path(model).name} in float32, {len(lines)} lines, {steps} steps of "
        f"{len(lines) // steps} examples; seconds of training"
    )
    row = table(16, 9, 9, 18, 15)
    print(row("", "median", "a step", "processors' time", "held-out loss") + "  each run")
    for name, each in seconds.items():
        median = statistics.median(each)
        cells = [f"{median:.1f}", f"{median / steps:.2f}", f"{statistics.median(busy[name]):.1f}"]
        cells.append(f"{losses[name]:.4f}")
        print(row(name, *cells) + "".join(f"  {one:.1f}" for one in each))
    clock, work = (
        statistics.median(spent[OURS]) / statistics.median(spent[other])
        for spent in (seconds, busy)
    )
    target = options.targets.at_most(f"cpu: of the processors' time of {other}", work, limit)
    print(f"of the time of {other} by the clock, which other work spoils: {clock:.3f}")
    print(f"of the processors' time, whole commands: {work:.3f}   {target}")
    apart = abs(losses[OURS] / losses[other] - 1)
    target = options.targets.at_most("cpu: losses apart", apart, 0.01)
    print(f"the held-out losses are apart by {apart:.2%}   {target}")


def processor_seconds() -> float:
    """Return the time that all processors have spent on the commands that were run so far."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def lora_flags() -> list[str]:
    """Return the flags that the script and TRL's command share, by the same names."""
    shared = {
        "dtype": "float32",
        "seed": t.SEED,
        "lora_r": t.LORA_R,
        "lora_alpha": t.LORA_ALPHA,
        "lora_dropout": t.LORA_DROPOUT,
        "learning_rate": t.LEARNING_RATE,
        "lr_scheduler_type": t.LR_SCHEDULER_TYPE,
    }
    return [*as_flags(shared), "--lora_target_modules", *t.LORA_TARGET_MODULES]


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Return settings as flags."""
    return [f"--{name}={value}" for name, value in settings.items()]


def with_script(command: str, model: str, data: Path, output: Path) -> float:
    """Train with a copy of the script; return the seconds of Trainer.train(), as TRL does.

    Args:
        command: its path, and flags that only that copy has.
        model, data: folder and file.
        output: where its run goes.
    """
    own = {
        "model_name": model,
        "train_file": data,
        "eval_file": "",
        "output_dir": output,
        "num_epochs": 1,
        "device": "cpu",
    }
    run_python(*shlex.split(command), *as_flags(own), *lora_flags())
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    # Each step's entry has a train_runtime, too; the last one is the whole's.
    return [one for one in record["loss_history"] if "train_runtime" in one][-1]["train_runtime"]


def with_trl(model: str, data: Path, output: Path) -> float:
    """Train with TRL's command, whose defaults hold; return the seconds that it prints."""
    own = {
        "model_name_or_path": model,
        "dataset_name": data.parent,
        "output_dir": output,
        "num_train_epochs": 1,
        "per_device_train_batch_size": t.BATCH_SIZE,
        "gradient_accumulation_steps": t.GRADIENT_ACCUMULATION_STEPS,
        "max_length": t.MAX_SEQ_LEN,
        "use_peft": True,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    _, printed = run_python("-m", "trl.scripts.sft", *as_flags(own), *lora_flags())
    return float(re.findall(r"'train_runtime': '?([\d.e+]+)", printed)[-1])


def loss_of_adapter(model: str, run: Path, options: Options) -> float:
    """Return a run's loss on held-out conversations, as a mean over their learned tokens."""
    lines = shipped_lines(HELD_OUT, 2 if options.tiny else 32)
    data = write_lines(options.folder / "held_out.jsonl", lines)
    flags = ["--model_name", model, "--train_file", str(data), "--eval_file", ""]
    examples = prepared_job(*flags).examples
    adapter = run / "final_lora" if (run / "final_lora").is_dir() else run
    with quiet():
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        trained = peft.PeftModel.from_pretrained(base, adapter)
        losses = t.example_losses(trained, examples, t.MAX_SEQ_LEN, "held-out loss")
    return sum(losses) / sum(len(one.reply_ids) for one in examples)
