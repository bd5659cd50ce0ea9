"""The acceptance of a card: everything that can only be seen on a GPU, in under nine minutes.

A random Qwen3.5-4B of the real size is made on the GPU, so nothing is downloaded. Each check is a
row of the table or several; one that fails is a row as well, and does not end the others. Without
a GPU, or with --tiny, all that a CPU can do is done with a tiny model.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import (
    GENERAL,
    GIB,
    HELD_OUT,
    ROOT,
    SCRIPT,
    TRAIN,
    Options,
    in_a_new_process,
    prepared_job,
    quiet,
    qwen_config,
    qwen_folder,
    shipped_lines,
    t,
    write_lines,
)
from benchmarks.measure import MemoryWatch
from benchmarks.simulate import CARDS

MINUTES = 9
AS_CARD = str(Path(__file__).with_name("as_card.py"))
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
NO_INSPECTOR = "not done: there is no inspect_lora.py"


# ==== the acceptance


def gpu(options: Options) -> None:
    """Do all checks, and print one table."""
    import torch

    has_gpu = torch.cuda.is_available()
    options.tiny = options.tiny or not has_gpu
    card = Card(options, is_gpu=has_gpu and not options.tiny)  # no context of CUDA in this process
    for check in CHECKS:
        card.do(check)
    print(card.table())
    for row in card.rows:
        options.targets.require(f"gpu: {row.what}: {row.found}", row.is_good is not False)


@dataclass
class Row:
    """A line of the table."""

    what: str
    found: str
    is_good: bool | None = None  # None: a figure that is not judged, or a check that cannot be done

    def __str__(self) -> str:
        """Return it in Markdown."""
        mark = {True: "ok", False: "**FAILED**", None: ""}[self.is_good]
        return f"| {self.what} | {t.one_line(self.found, 300).replace('|', '/')} | {mark} |"


@dataclass
class Card:
    """The card that is looked at, what the checks share, and what they found."""

    options: Options
    is_gpu: bool
    rows: list[Row] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    name: str = "CPU with a tiny model"
    capability: int = 0  # 7 of sm_70
    model: str = ""  # the folder of the random model
    flags: list[str] = field(default_factory=list)  # of a short run

    def do(self, check: Callable[[Card], Iterator[Row]]) -> None:
        """Do a check; an error in it is a row, and so is a lack of time."""
        name = check.__name__.replace("_", " ")
        if self.seconds_left() < 20:
            self.rows.append(Row(name, f"not done: {MINUTES} minutes are over", False))
            return
        print(f"({time.monotonic() - self.began:.0f} s) {name}", file=sys.stderr, flush=True)
        try:
            self.rows.extend(check(self))
        except Exception as error:
            self.rows.append(Row(name, t.one_line(repr(error), 300), False))

    def seconds_left(self) -> float:
        """Return how much of the nine minutes is left; a CPU may take longer."""
        minutes = MINUTES if self.is_gpu else 60
        return 60 * minutes - (time.monotonic() - self.began)

    def output(self, name: str) -> Path:
        """Return the output folder of a run."""
        return self.options.folder / name

    def record(self, name: str) -> dict[str, Any]:
        """Return what a run wrote into its run.json."""
        return json.loads((self.output(name) / "run.json").read_text(encoding="utf-8"))

    def losses(self, name: str) -> list[float]:
        """Return the losses of a run's steps."""
        return [one["loss"] for one in self.record(name)["loss_history"] if "loss" in one]

    def table(self) -> str:
        """Return all rows as a table in Markdown, with the card's name above it."""
        seconds = time.monotonic() - self.began
        head = f"**{self.name}**, {time.strftime('%Y-%m-%d')}, {seconds:.0f} s"
        return "\n".join(
            [head, "", "| check | found | |", "| --- | --- | --- |", *map(str, self.rows)]
        )


# ==== running the script


def run_script(card: Card, name: str, *flags: str, kind: str = "plain", wanted: int = 0) -> str:
    """Do a short run into the folder of that name; return what it printed."""
    words = [sys.executable, AS_CARD, kind]
    if kind == "as is":
        words = [sys.executable, SCRIPT]
    if kind == "torchrun":
        port = str(free_port())
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1"]
        words += ["--master_addr", "127.0.0.1", "--master_port", port, SCRIPT]
    words += [*card.flags, *flags, "--output_dir", str(card.output(name))]
    return finished(card, words, wanted)


def finished(card: Card, words: list[str], wanted: int = 0, said: str = "", path: str = "") -> str:
    """Run a command to its end; return what it printed, or raise if it ended otherwise."""
    paths = [one for one in (path, os.environ.get("PYTHONPATH", "")) if one]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
        input=said,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=max(1.0, card.seconds_left()),
    )
    if done.returncode != wanted:
        raise RuntimeError(f"status {done.returncode}: {last_words(done.stdout)}")
    return done.stdout


def last_words(printed: str) -> str:
    """Return the end of what a command printed."""
    return " ".join(printed.split())[-200:]


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def line_of(printed: str, section: str) -> str:
    """Return the last line that begins with a section's name, without it."""
    lines = [line for line in printed.splitlines() if line.startswith(f"{section} ")]
    return lines[-1].removeprefix(section).strip() if lines else ""


# ==== the checks, in the order of the table


def versions(card: Card) -> Iterator[Row]:
    """The machine and the packages."""
    python = platform.python_version()
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    yield Row("packages", f"Python {python}, {packages}")
    if card.is_gpu:
        card.name, card.capability, found = apart(card, about_card)
        yield Row("card", f"{found}, {os.cpu_count()} CPU cores")


def about_card() -> tuple[str, int, str]:
    """Return the card's name, the first number of its sm, and what else is to be known of it."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    free, total = torch.cuda.mem_get_info()
    memory = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    driver = "unknown"
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        driver = re.findall(r"\d+\.\d+[.\d]*", text)[0]
    found = f"sm_{major}{minor}, {memory}, CUDA {torch.version.cuda}, driver {driver}"
    return torch.cuda.get_device_name(), major, found


def random_model(card: Card) -> Iterator[Row]:
    """The model is made, and the plan for it counts what the model has."""
    began = time.monotonic()
    card.model = qwen_folder(card.options)
    parameters = apart(card, make_model, card.model, card.options.sizes, card.is_gpu)
    card.flags = short_run_flags(card)
    seconds = time.monotonic() - began
    yield Row("random model made", f"{parameters:,} parameters of the text part in {seconds:.0f} s")
    plan = prepared_job(*card.flags).plan
    share = f"{plan.trainable:,} of {plan.total:,} parameters trained"
    is_good = plan.total - plan.trainable == parameters
    yield Row("plan", f"{share}, {plan.trainable / plan.total:.4%}", is_good)


def make_model(folder: str, sizes: dict[str, Any], is_gpu: bool) -> int:
    """Write a random model in the hub's wrapper shape; return the parameters of its text part.

    Some channels are far larger than the others, as in trained models.
    """
    import torch
    import transformers

    config = qwen_config(sizes)
    config.vision_config.depth = 1
    config.vision_config.out_hidden_size = sizes["hidden_size"]
    torch.manual_seed(0)
    with torch.device("cuda" if is_gpu else "cpu"), quiet(), torch.no_grad():
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        text = model.model.language_model
        for layer in text.layers:
            layer.mlp.down_proj.weight[:4] *= 30
            layer.post_attention_layernorm.weight.normal_(0, 0.3)
        model.save_pretrained(folder)
    return sum(weight.numel() for weight in text.parameters())


def short_run_flags(card: Card) -> list[str]:
    """Return the flags of a short run: a few lines, the longest among them."""
    tiny = card.options.tiny
    lines, held_out = shipped_lines(TRAIN), shipped_lines(HELD_OUT, 4 if tiny else 12, tiny)
    general = write_lines(card.options.folder / "general.jsonl", shipped_lines(GENERAL, 12))
    by_length = sorted(lines, key=len)
    chosen = by_length[:8] if tiny else by_length[-16:] + lines[:32]
    settings = {
        "model_name": card.model,
        "train_file": write_lines(card.options.folder / "train.jsonl", chosen),
        "eval_file": write_lines(card.options.folder / "eval.jsonl", held_out),
        "general_file": "" if tiny else general,
        "device": "cuda" if card.is_gpu else "cpu",
        "num_epochs": 2 if tiny else 1,
        "num_samples": 1 if tiny else 4,
        "max_new_tokens": 4 if tiny else 48,
        "logging_steps": 1,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


# Rounding a float32 sum to float16 and then to bfloat16 errs sqrt(1 + 1/32 + 1/64) = 1.023 times as
# much as rounding it to bfloat16 at once.
ROUNDED_TWICE = 1.05


def products_against_float64(card: Card) -> Iterator[Row]:
    """Scaled float16 products of rows of every size, and of rows that hold no numbers."""
    sizes = card.options.sizes
    shape = sizes["intermediate_size"], sizes["hidden_size"]
    plain, scaled, worst, finite = apart(card, product_errors, *shape, card.is_gpu)
    text = f"bfloat16 {plain:.3%}, scaled float16 {scaled:.3%}"
    found = f"{text}; over rows of 1e-30 to 1e30 at most {worst:.3f} of bfloat16's"
    yield Row("products against float64", found, worst <= ROUNDED_TWICE)
    is_good = finite == [True, False, False, True]
    yield Row("rows of 0, infinity, NaN, numbers", f"finite: {finite}", is_good)


def product_errors(d: int, k: int, is_gpu: bool) -> tuple[float, float, float, list[bool]]:
    """Return both products' errors, the largest ratio of them, and which odd rows are finite."""
    import torch

    device = "cuda" if is_gpu else "cpu"
    drawn = torch.Generator(device).manual_seed(0)
    weight = (torch.randn(d, k, generator=drawn, device=device) / math.sqrt(k)).bfloat16()
    half = weight.half().T
    errors = {}
    for size in (1e-30, 1e-6, 1.0, 1e5, 1e30):
        rows = (size * torch.randn(4, 129, k, generator=drawn, device=device)).bfloat16()
        exact = rows.double() @ weight.double().T
        products = rows @ weight.T, t.scaled_product(rows, half)
        errors[size] = [((one.double() - exact).norm() / exact.norm()).item() for one in products]
    rows = torch.randn(4, k, generator=drawn, device=device).bfloat16()
    rows[0], rows[1, 3], rows[2, 5] = 0, math.inf, math.nan
    finite = torch.isfinite(t.scaled_product(rows, half)).all(-1).tolist()
    worst = max(scaled / plain for plain, scaled in errors.values())
    return *errors[1.0], worst, finite


def loading(card: Card) -> Iterator[Row]:
    """How long loading takes, and how much of the host's memory."""
    found = apart(card, load_on_device, card.flags)
    own = (
        f"{found['own'] / GIB:.2f} GiB of the host's memory, {found['bytes'] / GIB:.2f} are a copy"
    )
    is_good = found["own"] <= 1.02 * found["bytes"]
    yield Row("loading", f"{found['seconds']:.1f} s, {own}", is_good)


def apart(card: Card, do: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, so that the card's memory is free again."""
    return in_a_new_process(do, *arguments) if card.is_gpu else do(*arguments)


def load_on_device(flags: list[str]) -> dict[str, float]:
    """Load the model as the script does; return seconds, bytes, and what the host gave for it."""
    import accelerate

    job = prepared_for_device(flags)
    with quiet(), MemoryWatch() as before:
        t.synchronize(accelerate.PartialState().device)
    began = time.monotonic()
    with quiet(), MemoryWatch() as watch:
        model = t.load_model(job.settings)
        t.synchronize(accelerate.PartialState().device)
    seconds = time.monotonic() - began
    size = sum(weight.nbytes for weight in model.parameters())
    return {"seconds": seconds, "bytes": size, "own": watch.peaks["own"] - before.peaks["own"]}


def prepared_for_device(flags: list[str]) -> t.Job:
    """Return the script's job with its data, its plan and its device."""
    os.chdir(ROOT)
    job = t.Job(t.parse_settings(flags))
    t.set_environment(job.settings)
    t.forbid_gpu_packages()
    with quiet():
        t.prepare(job)
    return job


def a_step(card: Card) -> Iterator[Row]:
    """Milliseconds and kernels of a step of median length, for both products."""
    output = f"--output_dir={card.output('step')}"
    auto = ""
    for kind in ("native", "float16"):
        found = apart(card, measure_step, [*card.flags, output], kind)
        size = f"{found['rows']} x {found['width']} tokens"
        text = f"{found['ms']:.0f} ms, {found['count']:,} {found['unit']}"
        if card.is_gpu:
            text += f", the card busy for {found['busy']:.0f} ms; {found['memory']}"
        yield Row(f"a step of {size}, {kind} products", text, math.isfinite(found["loss"]))
        auto = auto or found["auto"]
    yield Row("MATMUL auto", auto or "native, since a CPU is not measured")


def measure_step(flags: list[str], kind: str) -> dict[str, Any]:
    """Time and profile the step of the four examples in the middle, by length."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    job = prepared_for_device(flags)
    with quiet():
        t.choose_matmul(job)
        auto = dict(job.matmul)
        job.matmul = {"used": kind}
        trainer = t.build_trainer(job)
        t.find_what_fits(trainer, job)
    device = trainer.args.device
    size = t.examples_per_step(job.settings)
    by_length = sorted(job.train, key=lambda example: len(example.input_ids))
    middle = (len(by_length) - size) // 2
    examples = by_length[middle : middle + size]
    inputs = t.pad(examples, device)
    learned = sum(len(example.reply_ids) for example in examples)

    def step() -> float:
        loss = trainer.training_step(trainer.model, dict(inputs), learned)
        trainer.model.zero_grad()
        t.synchronize(device)
        return loss.item()

    times = []
    for _ in range(6):
        began = time.perf_counter()
        loss = step()
        times.append(1000 * (time.perf_counter() - began))
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities) as profiled:
        step()
    wanted = torch.autograd.DeviceType.CUDA if is_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiled.events() if event.device_type == wanted]
    rows, width = inputs["input_ids"].shape
    kept, recomputed = job.token_limits.tokens_at_once, job.token_limits.tokens_at_once_recomputed
    return {
        "rows": rows,
        "width": width,
        "loss": loss,
        "ms": statistics.median(times[1:]),
        "count": len(events),
        "unit": "kernels and copies" if is_gpu else "operations",
        "busy": sum(event.time_range.elapsed_us() for event in events) / 1000,
        "memory": f"{kept:,} tokens at once kept, {recomputed:,} recomputed",
        "auto": about_auto(auto),
    }


def about_auto(matmul: dict[str, Any]) -> str:
    """Return what the script's own trial of products found."""
    if "native" not in matmul:
        return ""
    rates = ", ".join(
        f"{name} {matmul[name]['tflops']:.1f} TFLOP/s with an error of {matmul[name]['error']:.2%}"
        for name in ("native", "float16")
    )
    return f"takes {matmul['used']}: {rates}"


def whole_runs(card: Card) -> Iterator[Row]:
    """A whole run with either kind of products; the second one is as on a V100."""
    for name, kind in (("native", "plain"), ("float16", "v100")):
        printed = run_script(card, name, "--matmul", name, kind=kind)
        record = card.record(name)
        losses = card.losses(name)
        speed = record["train_tokens"] / record["train_seconds"]
        text = f"{len(losses)} steps in {record['train_seconds']:.1f} s, {speed:,.0f} tokens/s"
        if card.is_gpu:
            text += f", {record['peak_memory_gib']:.1f} GiB; {line_of(printed, 'memory')}"
        is_good = record["outcome"] == "finished" and record["matmul"]["used"] == name
        note = " as on a V100" if kind == "v100" else ""
        yield Row(f"whole run, {name} products{note}", text, is_good)
        found = " ".join(re.findall(r"by(?: at most)? ([\d.e+-]+) from", printed))
        yield Row(f"verified, {name} products", f"error and effect {found}", bool(found))
    apart = largest_difference(card.losses("native"), card.losses("float16"))
    yield Row("losses of the two runs", f"at most {apart:.2%} apart", apart <= 0.02)


def largest_difference(ones: list[float], others: list[float]) -> float:
    """Return by how much two lists of losses differ at the most, as a share."""
    count = min(len(ones), len(others))
    if not count:
        return math.inf
    pairs = zip(ones[:count], others[:count], strict=True)
    return max(abs(one / other - 1) for one, other in pairs)


def evidence_and_samples(card: Card) -> Iterator[Row]:
    """What the whole runs left behind training: evidence, samples, picture, adapter."""
    for name in ("native", "float16"):
        if not t.has_inspector():
            yield Row(f"evidence and samples, {name}", NO_INSPECTOR)
            continue
        record = card.record(name)
        parts, samples = record["evidence"].get("parts", {}), record["samples"]
        log = (card.output(name) / "all_logs.log").read_text(encoding="utf-8")
        seconds = " ".join(re.findall(r"adapter on all [\d,]+, in (\d+ s)", log)[-1:])
        files = ("final_lora/adapter_model.safetensors", "samples.md", "lora.png")
        missing = [file for file in files if not (card.output(name) / file).is_file()]
        found = f"{len(parts)} rows in {seconds}, replies of {', '.join(samples) or 'nobody'}"
        if missing:
            found += f"; missing: {', '.join(missing)}"
        yield Row(f"evidence and samples, {name}", found, bool(parts and samples and not missing))


def a_card_of_16_gb_and_sigterm(card: Card) -> Iterator[Row]:
    """A run on a small card is stopped by SIGTERM in a step, and goes on to its end."""
    flags = ["--matmul", "float16", "--num_samples", "0", "--evidence_examples", "0"]
    with leave_only(card, CARDS["16 GB"]) as note:
        status, printed = stop_after(card, 2, "small", *flags)
        saved = [*card.output("small").glob("checkpoints/checkpoint-*")]
        memory = f"; {line_of(printed, 'memory')}" if card.is_gpu else ""
        is_good = status == 128 + signal.SIGTERM and bool(saved)
        found = f"status {status}, {len(saved)} checkpoints{memory}"
        yield Row(f"SIGTERM in a step{note}", found, is_good)
        printed = run_script(card, "small", *flags, kind="v100")
    record = card.record("small")
    apart = largest_difference(card.losses("small"), card.losses("float16"))
    text = f"{line_of(printed, 'resume').partition('checkpoints')[2] or 'begun anew'}, "
    text += f"losses at most {apart:.2%} from the run that was never stopped"
    if card.is_gpu:
        text += f", {record['peak_memory_gib']:.1f} GiB"
    is_good = record["outcome"] == "finished" and bool(record["resumed_from"]) and apart <= 0.02
    yield Row(f"gone on{note}", text, is_good)


def stop_after(card: Card, steps: int, name: str, *flags: str) -> tuple[int, str]:
    """Begin a run, send it SIGTERM when so many steps are printed; return status and output."""
    words = [sys.executable, AS_CARD, "v100", *card.flags, *flags]
    words += ["--output_dir", str(card.output(name))]
    lines: list[str] = []
    steps_seen = 0
    with subprocess.Popen(
        words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as run:
        clock = threading.Timer(card.seconds_left(), run.kill)
        clock.start()
        for line in run.stdout:
            lines.append(line)
            is_step = line.startswith("train     step")
            steps_seen += is_step
            if is_step and steps_seen == steps:  # once: a second signal stops at once
                run.send_signal(signal.SIGTERM)
        clock.cancel()
    return run.returncode, "".join(lines)


# Holds all of the GPU's memory but so many bytes until its standard input is closed.
BALLAST = """
import sys, torch
size = torch.cuda.mem_get_info()[0] - int(sys.argv[1])
held = torch.empty(max(size, 0), dtype=torch.uint8, device="cuda")
print("held" if size > 0 else "small", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def leave_only(card: Card, size: int) -> Iterator[str]:
    """Leave only so many bytes of the card within; yield a note on that for the table."""
    if not card.is_gpu:
        yield ""
        return
    words = [sys.executable, "-c", BALLAST, str(size)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, text=True, stdin=pipe, stdout=pipe) as ballast:
        said = ballast.stdout.readline().strip()
        if said not in ("held", "small"):
            raise RuntimeError("the rest of the card's memory could not be held")
        try:
            yield f" with {size / GIB:.1f} GiB left" if said == "held" else " on the whole card"
        finally:
            ballast.stdin.close()


def a_card_of_32_gb(card: Card) -> Iterator[Row]:
    """A step that is too large for a card goes through in parts."""
    flags = ["--matmul", "float16", "--batch_size", "24", "--max_steps", "2"]
    flags += ["--gradient_accumulation_steps", "1"]
    flags += ["--num_samples", "0", "--evidence_examples", "0"]
    with leave_only(card, CARDS["32 GB"]) as note:
        printed = run_script(card, "large", *flags, kind="v100")
    record = card.record("large")
    text = f"{len(card.losses('large'))} steps; {line_of(printed, 'memory') or 'not tried'}"
    if card.is_gpu:
        text += f"; {record['peak_memory_gib']:.1f} GiB"
    yield Row(f"steps of 24 examples{note}", text, record["outcome"] == "finished")


def chat(card: Card) -> Iterator[Row]:
    """The adapter and the base answer in the chat."""
    if not t.has_inspector():
        yield Row("chat", NO_INSPECTOR)
        return
    adapter = str(card.output("native") / "final_lora")
    words = [sys.executable, AS_CARD, "plain", "inspect", "chat", adapter]
    began = time.monotonic()
    printed = finished(card, words, said="Hello, who are you?\n/base\nAnd now?\n/quit\n")
    seconds = time.monotonic() - began
    names = re.findall(r"(adapter|base)> ", printed)
    yield Row(
        "chat", f"answers of {' and '.join(names)} in {seconds:.0f} s", names == ["adapter", "base"]
    )


def one_process_under_torchrun(card: Card) -> Iterator[Row]:
    """A launcher with one process does what the plain command does."""
    flags = ["--matmul", "native", "--max_steps", "3", "--num_samples", "0"]
    run_script(card, "launched", *flags, "--evidence_examples", "0", kind="torchrun")
    apart = abs(card.losses("launched")[0] / card.losses("native")[0] - 1)
    yield Row(
        "torchrun, one process", f"first loss {apart:.2%} from the plain run's", apart <= 0.01
    )


def flash_linear_attention(card: Card) -> Iterator[Row]:
    """A run with fla, where it is installed and can run."""
    if not importlib.util.find_spec("fla"):
        yield Row("flash-linear-attention", "not installed")
        return
    if not card.is_gpu or card.capability < 8:
        yield Row("flash-linear-attention", "does not run here, so the script does not use it")
        return
    flags = ["--matmul", "native", "--num_samples", "0", "--evidence_examples", "0"]
    run_script(card, "fla", *flags, kind="as is")
    apart = largest_difference(card.losses("fla"), card.losses("native"))
    record, plain = card.record("fla"), card.record("native")
    seconds = f"{record['train_seconds']:.1f} s of training, {plain['train_seconds']:.1f} without"
    found = f"{importlib.metadata.version('fla-core')}: {seconds}; losses at most {apart:.2%} apart"
    yield Row("flash-linear-attention", found, apart <= 0.02)


def demo_with_fla(card: Card) -> Iterator[Row]:
    """The demo runs on the CPU although fla is installed, which would crash there.

    Where it is not installed, a package of that name stands for it which no one may import.
    """
    stub = card.options.folder / "stub"
    is_installed = importlib.util.find_spec("fla") is not None
    if not is_installed:
        (stub / "fla").mkdir(parents=True)
        text = 'raise RuntimeError("fla was imported")\n'
        (stub / "fla" / "__init__.py").write_text(text, encoding="utf-8")
        for name in ("fla_core", "flash_linear_attention"):
            info = stub / f"{name}-0.6.0.dist-info"
            info.mkdir()
            metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0.6.0\n"
            (info / "METADATA").write_text(metadata, encoding="utf-8")
    words = [sys.executable, SCRIPT, "--demo", "--output_dir", str(card.output("demo"))]
    words += ["--num_samples", "0", "--evidence_examples", "0", "--max_steps", "3"]
    if card.options.tiny:
        words += [flag for flag in card.flags if flag.partition("=")[0] in DATA_FLAGS]
    finished(card, words, path="" if is_installed else str(stub))
    record = card.record("demo")
    kind = "" if is_installed else ", a stub"
    yield Row(
        f"--demo with fla installed{kind}", record["outcome"], record["outcome"] == "finished"
    )


DATA_FLAGS = ("--model_name", "--train_file", "--eval_file")


def room_left(card: Card) -> Iterator[Row]:
    """How much the checks wrote."""
    size = sum(path.stat().st_size for path in card.options.folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(card.options.folder).free
    yield Row("disk", f"{size / GIB:.1f} GiB written, {free / GIB:.0f} free")


CHECKS: list[Callable[[Card], Iterator[Row]]] = [
    versions,
    random_model,
    products_against_float64,
    loading,
    a_step,
    whole_runs,
    evidence_and_samples,
    a_card_of_16_gb_and_sigterm,
    a_card_of_32_gb,
    chat,
    one_process_under_torchrun,
    flash_linear_attention,
    demo_with_fla,
    room_left,
]
