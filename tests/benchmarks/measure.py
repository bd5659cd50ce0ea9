"""What the script costs on this machine, which needs no GPU.

cpu        training time of SmolLM2-135M against TRL's own command, in the same run
refuse     time to refuse a file with one bad line
startup    time of a dry run with the real vocabulary and sizes, by function
scale      time and memory to read and encode many lines
loading    host memory to load a checkpoint of the real size
words      the loss of guessing each token by its frequency, for README's word about the demo
"""

from __future__ import annotations

import collections
import functools
import itertools
import json
import math
import os
import re
import resource
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    GIB,
    HELD_OUT,
    ROOT,
    SCRIPT,
    TRAIN,
    Options,
    in_a_new_process,
    memory_of_process,
    prepared_job,
    quiet,
    qwen_config,
    qwen_folder,
    run_python,
    shipped_lines,
    speaking_model,
    t,
    table,
    write_lines,
)

# ==== cpu

# The target, for want of a better one: what the script computes for what TRL's defaults compute, as
# `flops` counts it for Qwen3.5-4B and the shipped data, 1.012 / 1.837. SmolLM2's may differ.
WORK = 0.55


def cpu(options: Options) -> None:
    """Train a small model on some lines with the script and with TRL's command, in turn."""
    model = speaking_model(options)
    lines = shipped_lines(TRAIN, 8 if options.tiny else 64, shortest=options.tiny)
    data = write_lines(options.folder / "data" / "train.jsonl", lines)
    settings = t.parse_settings([])
    steps = len(lines) // t.examples_per_step(settings)
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    busy: dict[str, list[float]] = collections.defaultdict(list)
    for number in range(options.pairs):
        for name, train in (("this script", train_with_script), ("trl sft", train_with_trl)):
            before = processor_seconds()
            seconds[name].append(train(model, data, options.folder, number))
            busy[name].append(processor_seconds() - before)
    adapters = {
        "this script": options.folder / "script0" / "final_lora",
        "trl sft": options.folder / "trl0",
    }
    losses = {name: loss_of_adapter(model, path, options) for name, path in adapters.items()}
    print(
        f"CPU       {Path(model).name} in float32, {len(lines)} lines, {steps} steps of "
        f"{t.examples_per_step(settings)} examples; seconds of training"
    )
    row = table(16, 9, 9, 18, 15, 11)
    print(row("", "median", "a step", "processors' time", "held-out loss", "each run"))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, each in seconds.items():
        cells = [f"{medians[name]:.1f}", f"{medians[name] / steps:.2f}"]
        cells += [f"{statistics.median(busy[name]):.1f}", f"{losses[name]:.4f}"]
        print(row(name, *cells, "  ".join(f"{one:.1f}" for one in each)))
    ratio = medians["this script"] / medians["trl sft"]
    work = statistics.median(busy["this script"]) / statistics.median(busy["trl sft"])
    print(f"of the processors' time, which other work spoils less (whole commands): {work:.3f}")
    apart = abs(losses["this script"] / losses["trl sft"] - 1)
    print(f"ratio {ratio:.3f}   {options.targets.at_most('cpu: of the time of TRL', ratio, WORK)}")
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


def train_with_script(model: str, data: Path, folder: Path, number: int) -> float:
    """Train with the script; return the seconds of Trainer.train(), as TRL prints them."""
    output = folder / f"script{number}"
    own = {
        "model_name": model,
        "train_file": data,
        "eval_file": "",
        "general_file": "",
        "output_dir": output,
        "num_epochs": 1,
        "device": "cpu",
    }
    run_python(SCRIPT, *as_flags(own), *lora_flags())
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    # Each step's entry has a train_runtime, too; the last one is the whole's.
    whole = [entry for entry in record["loss_history"] if "train_runtime" in entry][-1]
    return whole["train_runtime"]


def train_with_trl(model: str, data: Path, folder: Path, number: int) -> float:
    """Train with TRL's command, whose defaults hold; return the seconds that it prints."""
    own = {
        "model_name_or_path": model,
        "dataset_name": data.parent,
        "output_dir": folder / f"trl{number}",
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


def loss_of_adapter(model: str, adapter: Path, options: Options) -> float:
    """Return an adapter's loss on held-out conversations, as a mean over their learned tokens."""
    import peft
    import torch
    import transformers

    lines = shipped_lines(HELD_OUT, 2 if options.tiny else 32)
    data = write_lines(options.folder / "held_out.jsonl", lines)
    flags = ["--model_name", model, "--train_file", str(data), "--eval_file", ""]
    examples = prepared_job(*flags).train
    with torch.no_grad(), quiet():
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        trained = peft.PeftModel.from_pretrained(base, adapter).eval()
        losses = [t.reply_losses(trained, t.pad([one], "cpu")).sum().item() for one in examples]
    return sum(losses) / sum(len(one.reply_ids) for one in examples)


# ==== refuse, startup, scale


def refuse(options: Options) -> None:
    """Time how soon one bad line in the middle of the training file is named."""
    lines = shipped_lines(TRAIN)
    bad = len(lines) // 2
    lines[bad] = lines[bad][:-1]
    data = write_lines(options.folder / "bad.jsonl", lines)
    flags = ["--dry_run", "--train_file", str(data), "--model_name", qwen_folder(options)]
    runs = [time_refusal(flags, f"bad.jsonl:{bad + 1}:") for _ in range(1 if options.tiny else 7)]
    print(f"REFUSE    one bad line among {len(lines):,}; seconds from the start of the command")
    row = table(44, 10, 10)
    print(row(f"{len(runs)} runs", "median", "slowest"))
    named, ended = ([run[part] for run in runs] for part in (0, 1))
    target = options.targets.at_most("refuse: seconds", statistics.median(named), 1.0)
    for text, seconds, note in (
        ("the line is named", named, target),
        ("the end of the command", ended, ""),
    ):
        middle, slowest = statistics.median(seconds), max(seconds)
        print(f"{row(text, f'{middle:.2f}', f'{slowest:.2f}')}   {note}".rstrip())


def time_refusal(flags: list[str], name: str) -> tuple[float, float]:
    """Run the script; return when a name was first printed, and when it ended with status 1."""
    start = time.perf_counter()
    words = [sys.executable, SCRIPT, *flags]
    named = math.inf
    with subprocess.Popen(
        words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as run:
        for line in run.stdout:
            if name in line:
                named = min(named, time.perf_counter() - start)
    if run.returncode != 1:
        raise RuntimeError(f"{words} ended with {run.returncode}, not with 1")
    return named, time.perf_counter() - start


FUNCTIONS = (
    "read_examples", "warn_of_repeats", "load_config_and_tokenizer", "encode", "report_tokens",
    "make_plan",
)  # fmt: skip


def timed_dry_run(flags: list[str]) -> tuple[dict[str, float], int]:
    """Return a dry run's seconds by function, and its peak bytes; for a new process."""
    os.chdir(ROOT)
    seconds, start = dict.fromkeys(["imports", *FUNCTIONS], 0.0), time.perf_counter()
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.qwen3_5 import modeling_qwen3_5  # noqa: F401

    seconds["imports"] = time.perf_counter() - start

    def timed(name: str, function: Any, *arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments, **named)
        seconds[name] += time.perf_counter() - start
        return result

    for name in FUNCTIONS:
        setattr(t, name, functools.partial(timed, name, getattr(t, name)))
    with quiet():
        t.main(["--dry_run", *flags])
    return seconds, memory_of_process("VmHWM")


def startup(options: Options) -> None:
    """Time a dry run on the shipped data with the real vocabulary and the real sizes."""
    flags = ["--model_name", qwen_folder(options)]
    runs = [run_python(SCRIPT, "--dry_run", *flags)[0] for _ in range(1 if options.tiny else 3)]
    print("STARTUP   --dry_run on the shipped data with the real vocabulary and sizes, in seconds")
    row = table(30, 8)
    by_function, _ = in_a_new_process(timed_dry_run, flags)
    for name, seconds in by_function.items():
        print(row(name, f"{seconds:.2f}"))
    median = statistics.median(runs)
    target = options.targets.at_most("startup: seconds", median, 12)
    print(row(f"the command, median of {len(runs)}", f"{median:.2f}") + f"   {target}")


def scale(options: Options) -> None:
    """Time many lines: the shipped ones again and again, each with its number in it."""
    rows = [json.loads(line) for line in shipped_lines(TRAIN)]
    counts = [10_000, 100_000, 1_000_000][: 3 if options.large else 2]
    if options.tiny:
        counts = [20, 40]
    flags = ["--model_name", qwen_folder(options), "--eval_file", ""]
    path = options.folder / "many.jsonl"
    print("SCALE     many lines with the real vocabulary; seconds")
    row = table(11, 10, 9, 9, 11, 10)
    print(row("lines", "validate", "encode", "lengths", "us a line", "peak GiB"))
    micros = []
    for count in counts:
        with path.open("w", encoding="utf-8") as file:
            for number, one in zip(range(count), itertools.cycle(rows), strict=False):
                file.write(f"{json.dumps(numbered(one, number))}\n")
        seconds, peak = in_a_new_process(timed_dry_run, [*flags, "--train_file", str(path)])
        validate = seconds["read_examples"] + seconds["warn_of_repeats"]
        parts = [validate, seconds["encode"], seconds["report_tokens"]]
        micros.append(sum(parts) / count * 1e6)
        cells = [f"{part:.1f}" for part in parts]
        print(row(f"{count:,}", *cells, f"{micros[-1]:.0f}", f"{peak / GIB:.2f}"), flush=True)
        if count == 1_000_000:
            print(options.targets.at_most("scale: GiB for a million lines", peak / GIB, 8))
    target = options.targets.at_most("scale: growth a line", micros[-1] / micros[0], 1.5)
    print(f"microseconds a line, many lines against few: {micros[-1] / micros[0]:.2f}   {target}")


def numbered(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a line of the shipped data with a number in what the user says first."""
    key = "messages" if "messages" in row else "prompt"
    messages = [dict(message) for message in row[key]]
    first = next(message for message in messages if message["role"] == "user")
    first["content"] += f" ({number})"
    return row | {key: messages}


# ==== loading


def loading(options: Options) -> None:
    """Measure the host memory that loading takes, with a checkpoint full of zeros."""
    folder = qwen_folder(options)
    size = write_zeros(Path(folder), options.sizes)
    found = in_a_new_process(load_and_watch, folder)
    print(
        f"LOADING   host memory while {found['parameters']:,} parameters are loaded, GiB\n"
        f"          from a file of {size / GIB:.2f}, vision tower included, all of it zeros"
    )
    row = table(44, 10, 16, 12)
    print(row("", "peak", "of the process", "of the file"))
    for name in ("before", "loaded", "every weight read"):
        print(row(name, *[f"{found[name][key] / GIB:.2f}" for key in ("rss", "own", "file")]))
    model = found["bytes"]
    print(row("one copy of the model", f"{model / GIB:.2f}"))
    added = found["every weight read"]["rss"] - found["before"]["rss"]
    copies = added / model
    target = options.targets.at_most("loading: copies of the model", copies, 1.02)
    print(f"copies of the model in memory at the most: {copies:.3f}   {target}")
    print("""\
Pages of the file are the system's to take back; what is the process's own is not. With a GPU the
same function reads the same pages and copies each tensor to the card (device_map), which takes no
memory of the process's own either: `gpu` measures it where there is one.""")


def write_zeros(folder: Path, sizes: dict[str, Any]) -> int:
    """Write a checkpoint in the hub's shape whose file has a header and a hole; return its size."""
    import torch
    from transformers import Qwen3_5ForConditionalGeneration

    config = qwen_config(sizes)
    config.vision_config.out_hidden_size = sizes["hidden_size"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen3_5ForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in model.named_parameters():
        begin, end = end, end + weight.nbytes
        header[name] = {"dtype": "BF16", "shape": [*weight.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)
    return path.stat().st_size


def load_and_watch(folder: str) -> dict[str, Any]:
    """Load a model with the script's function; return the peaks of memory; for a new process."""
    import accelerate
    import torch
    from transformers.models.qwen3_5 import modeling_qwen3_5  # noqa: F401

    accelerate.PartialState(cpu=True)
    settings = t.parse_settings(["--model_name", folder, "--device", "cpu"])
    found: dict[str, Any] = {}
    with quiet():
        with MemoryWatch() as before:
            torch.ones(8, 8) @ torch.ones(8, 8)
        with MemoryWatch() as loaded:
            model = t.load_model(settings)
        with MemoryWatch() as read, torch.no_grad():
            for weight in model.parameters():
                weight.view(-1)[:: 4096 // weight.itemsize].sum()  # a number of each page
    watches = {"before": before, "loaded": loaded, "every weight read": read}
    found |= {name: watch.peaks for name, watch in watches.items()}
    found["parameters"] = sum(weight.numel() for weight in model.parameters())
    found["bytes"] = sum(weight.nbytes for weight in model.parameters())
    return found


class MemoryWatch:
    """Looks at this process's memory again and again, and remembers the largest sizes.

    "rss" is all that is in memory, "own" what only the process has, "file" pages of files.
    """

    NAMES: dict[str, str] = {"rss": "VmRSS", "own": "RssAnon", "file": "RssFile"}  # noqa: RUF012

    def __init__(self) -> None:
        """Begin with nothing."""
        self.peaks = dict.fromkeys(self.NAMES, 0)
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def look(self) -> None:
        """Look once."""
        for key, name in self.NAMES.items():
            self.peaks[key] = max(self.peaks[key], memory_of_process(name))

    def watch(self) -> None:
        """Look until it is over."""
        while not self.is_over.wait(0.02):
            self.look()

    def __enter__(self) -> MemoryWatch:
        """Begin to look."""
        self.look()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look a last time."""
        self.is_over.set()
        self.thread.join()
        self.look()


# ==== words


def words(options: Options) -> None:
    """Print the held-out loss, in nats a token, of guessing by frequency in the training replies.

    Each token of the demo's vocabulary counts once more than it occurs, so that none is impossible.
    """
    job = prepared_job("--demo")
    counts = collections.Counter(token for one in job.train for token in one.reply_ids)
    total = counts.total() + len(job.chat_format.tokenizer)
    learned = [token for one in job.held_out for token in one.reply_ids]
    loss = statistics.fmean(-math.log((counts[token] + 1) / total) for token in learned)
    print(
        f"WORDS     {len(job.train):,} training and {len(job.held_out)} held-out examples, in the "
        f"tokens of the demo's model;\n"
        f"          guessing each of {len(learned):,} held-out tokens by its frequency in the "
        f"training replies: {loss:.3f}"
    )
