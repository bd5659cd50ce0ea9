"""The acceptance of a card: everything that can only be seen on a GPU, in twenty minutes.

A random Qwen3.5-4B of the real size is made on the GPU, so nothing is downloaded. Each check is a
row of the table or several; one that fails is a row as well, and does not end the others. All rows
stand in one file, which is to be sent back. What the model's own process can do comes first; what
there is no time for is "not done". Without a GPU, or with --tiny, all that a CPU can do is done
with a tiny model.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
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
import time
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import (
    FORKS,
    GIB,
    HELD_OUT,
    ROOT,
    SCRIPT,
    TRAIN,
    MemoryWatch,
    Options,
    float16_cores,
    in_a_new_process,
    prepared_job,
    quiet,
    qwen_config,
    qwen_folder,
    shipped_lines,
    t,
    write_lines,
)
from benchmarks.simulate import CARDS, Pass, Simulation

MINUTES = 20
AS_CARD = str(Path(__file__).with_name("as_card.py"))
GENERAL = ROOT / "inspect_lora" / "general.jsonl"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


# ==== the acceptance


def gpu(options: Options) -> None:
    """Do all checks, print one table, and write the file to send back."""
    has_gpu = torch.cuda.is_available()
    options.tiny = options.tiny or not has_gpu
    card = Card(options, is_gpu=has_gpu and not options.tiny)  # no context of CUDA in this process
    for check in CHECKS:
        card.do(check)
        card.write_report()  # so that it is there whatever comes
    print(card.table())
    print(f"\nAll of it stands in {t.path_from_here(str(options.report))}. Please send that file.")
    for row in card.rows:
        options.targets.require(f"gpu: {row.what}: {row.found}", row.is_good is not False)


@dataclass
class Row:
    """A line of the table."""

    what: str
    found: str
    is_good: bool | None = None  # None: a figure that is not judged, or a check that was not done

    def __str__(self) -> str:
        """Return it in Markdown."""
        mark = {True: "ok", False: "**FAILED**", None: ""}[self.is_good]
        return f"| {self.what} | {t.one_line(self.found, 300).replace('|', '/')} | {mark} |"


class NoTimeError(Exception):
    """The acceptance's own time is over, which says nothing about the card."""


NO_TIME = "not done: no time"


def rows_of(check: Callable[..., Iterator[Row]], *given: Any) -> Iterator[Row]:
    """Yield the rows of a check; an error in it is a row, and so is a lack of time."""
    name = check.__name__.replace("_", " ")
    try:
        yield from check(*given)
    except NoTimeError:
        yield Row(name, NO_TIME)
    except Exception as error:
        yield Row(name, repr(error), False)


@dataclass
class Card:
    """The card that is looked at, what the checks share, and what they found."""

    options: Options
    is_gpu: bool
    rows: list[Row] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    name: str = "CPU with a tiny model"
    about: dict[str, Any] = field(default_factory=dict)  # driver, capability and more
    capability: int = 0  # 7 of sm_70
    model: str = ""  # the folder of the random model
    flags: list[str] = field(default_factory=list)  # of a short run

    def do(self, check: Callable[[Card], Iterator[Row]]) -> None:
        """Do a check; an error in it is a row, and so is a lack of time."""
        name = check.__name__.replace("_", " ")
        if self.seconds_left() < 20:
            self.rows.append(Row(name, f"not done: {MINUTES} minutes are over"))
            return
        print(f"({time.monotonic() - self.began:.0f} s) {name}", file=sys.stderr, flush=True)
        self.rows.extend(rows_of(check, self))

    def write_report(self) -> None:
        """Write all that was found into the file to send back."""
        report = {
            "card": self.name,
            **self.about,
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.monotonic() - self.began),
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "script_sha256": t.script_sha256(),
            "rows": [asdict(row) for row in self.rows],
        }
        self.options.report.parent.mkdir(parents=True, exist_ok=True)
        t.write_json(self.options.report, report)

    def seconds_left(self) -> float:
        """Return how much of the time is left; a CPU may take longer."""
        minutes = MINUTES if self.is_gpu else 60
        return 60 * minutes - (time.monotonic() - self.began)

    def apart(self, do: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function in a process of its own, so that the card's memory is free again."""
        return in_a_new_process(do, *arguments) if self.is_gpu else do(*arguments)

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


# ==== running commands


def run_script(card: Card, name: str, *flags: str, kind: str = "plain", wanted: int = 0) -> str:
    """Do a short run into the folder of that name; return what it printed."""
    words = [sys.executable, AS_CARD, kind]
    if kind == "as is":
        words = [sys.executable, SCRIPT]
    if kind == "torchrun":  # with the kernels of the runs before
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1"]
        words += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
        words += [AS_CARD, "v100"]
    return finished(
        card, [*words, *card.flags, *flags, f"--output_dir={card.output(name)}"], wanted
    )


def run_inspector(card: Card, *words: str, said: str = "") -> str:
    """Run a command of the package; return what it printed."""
    device = "cuda" if card.is_gpu else "cpu"
    command = [sys.executable, "-m", "inspect_lora", *words, "--device", device]
    return finished(card, command, said=said)


def finished(card: Card, words: list[str], wanted: int = 0, said: str = "") -> str:
    """Run a command to its end; return what it printed, or raise if it ended otherwise."""
    status, printed = run_in_a_group(words, said, max(1.0, card.seconds_left()))
    if status != wanted:
        raise RuntimeError(f"status {status}: {' '.join(printed.split())[-200:]}")
    return printed


def run_in_a_group(words: list[str], said: str, seconds: float) -> tuple[int, str]:
    """Run a command; return its status and what it printed, or raise NoTimeError.

    A command that takes longer is killed with all that it started, such as a launcher's workers,
    which would hold the card.
    """
    with subprocess.Popen(
        words,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate(said, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            kill_group(process.pid)
            raise NoTimeError from error
        except BaseException:  # a terminal's Ctrl-C does not reach the group
            kill_group(process.pid)
            raise
    return process.returncode, printed


def kill_group(leader: int) -> None:
    """Kill what is left of a process's group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def line_of(printed: str, section: str) -> str:
    """Return the last line that begins with a section's name, without it."""
    lines = [line for line in printed.splitlines() if line.startswith(f"{section} ")]
    return lines[-1].removeprefix(section).strip() if lines else ""


def largest_difference(ones: list[float], others: list[float]) -> float:
    """Return by how much two lists of losses differ at the most, as a share.

    Lists of other lengths, empty ones and losses that are no numbers differ infinitely.
    """
    if not ones or len(ones) != len(others) or not all(map(math.isfinite, ones + others)):
        return math.inf
    return max(abs(one / other - 1) for one, other in zip(ones, others, strict=True))


# ==== the checks, in the order of the table


def versions(card: Card) -> Iterator[Row]:
    """The machine and the packages."""
    python = platform.python_version()
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    yield Row("packages", f"Python {python}, {packages}")
    if card.is_gpu:
        card.name, card.capability, card.about = card.apart(about_card)
        found = ", ".join(f"{name} {value}" for name, value in card.about.items())
        yield Row("card", f"{found}, {os.cpu_count()} CPU cores")


def about_card() -> tuple[str, int, dict[str, str]]:
    """Return the card's name, the first number of its sm, and what else is to be known of it."""
    major, minor = torch.cuda.get_device_capability()
    free, total = torch.cuda.mem_get_info()
    memory = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    driver = "unknown"
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        driver = re.findall(r"\d+\.\d+[.\d]*", text)[0]
    found = {"capability": f"sm_{major}{minor}", "memory": memory, "driver": driver}
    found |= {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
    return torch.cuda.get_device_name(), major, found


def random_model(card: Card) -> Iterator[Row]:
    """The model is made, and the plan for it counts what the model has."""
    began = time.monotonic()
    card.model = qwen_folder(card.options)
    parameters = card.apart(make_model, card.model, card.options.sizes, card.is_gpu)
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
    config = qwen_config(sizes)
    for name in ("hidden_size", "intermediate_size", "num_position_embeddings"):
        setattr(config.vision_config, name, 64)  # the vision tower is not used
    config.vision_config.depth, config.vision_config.num_heads = 1, 4
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
    tiny, folder = card.options.tiny, card.options.folder
    lines, held_out = shipped_lines(TRAIN), shipped_lines(HELD_OUT, 4 if tiny else 12, tiny)
    by_length = sorted(lines, key=len)
    chosen = by_length[:12] if tiny else by_length[-16:] + lines[:32]
    settings = {
        "model_name": card.model,
        "train_file": write_lines(folder / "train.jsonl", chosen),
        "eval_file": write_lines(folder / "eval.jsonl", held_out),
        "device": "cuda" if card.is_gpu else "cpu",
        "num_epochs": 1,
        "logging_steps": 1,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


# Rounding a float32 sum to float16 and then to bfloat16 errs sqrt(1 + 1/32 + 1/64) = 1.023 times as
# much as rounding it to bfloat16 at once.
ROUNDED_TWICE = 1.05


def products_against_float64(look: Look) -> Iterator[Row]:
    """Scaled float16 matmul of rows of every size, and of rows that hold no numbers."""
    shape = look.sizes["intermediate_size"], look.sizes["hidden_size"]
    plain, scaled, worst, finite = product_errors(*shape, look.is_gpu)
    text = f"bfloat16 {plain:.3%}, scaled float16 {scaled:.3%}"
    found = f"{text}; over rows of 1e-30 to 1e30 at most {worst:.3f} of bfloat16's"
    yield Row("matmul against float64", found, worst <= ROUNDED_TWICE)
    is_good = finite == [True, False, False, True]
    yield Row("rows of 0, infinity, NaN, numbers", f"finite: {finite}", is_good)


def product_errors(d: int, k: int, is_gpu: bool) -> tuple[float, float, float, list[bool]]:
    """Return both products' errors, the largest ratio of them, and which odd rows are finite."""
    device = "cuda" if is_gpu else "cpu"
    drawn = torch.Generator(device).manual_seed(0)
    weight = (torch.randn(d, k, generator=drawn, device=device) / math.sqrt(k)).bfloat16()
    half = weight.half().T
    errors = {}
    for size in (1e-30, 1e-6, 1.0, 1e5, 1e30):
        rows = (size * torch.randn(4, 129, k, generator=drawn, device=device)).bfloat16()
        exact = rows.double() @ weight.double().T
        products = rows @ weight.T, t.scaled_fp16_matmul(rows, half)
        errors[size] = [((one.double() - exact).norm() / exact.norm()).item() for one in products]
    rows = torch.randn(4, k, generator=drawn, device=device).bfloat16()
    rows[0], rows[1, 3], rows[2, 5] = 0, math.inf, math.nan
    finite = torch.isfinite(t.scaled_fp16_matmul(rows, half)).all(-1).tolist()
    worst = max(scaled / plain for plain, scaled in errors.values())
    return *errors[1.0], worst, finite


def the_model_in_one_process(card: Card) -> Iterator[Row]:
    """All that one process can find out about the model, which is loaded once for it."""
    path = card.options.folder / "rows.jsonl"
    given = card.flags, str(path), card.options.sizes
    ended = ended_apart(card, look_at_model, *given) if card.is_gpu else look_at_model(*given)
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in rows:
        yield Row(**json.loads(line))
    if ended is None:
        raise NoTimeError
    if ended:
        yield Row("the model in one process", f"it ended with {ended}", False)


def ended_apart(card: Card, do: Callable[..., Any], *given: Any) -> int | None:
    """Call a function in a process group of its own; return its status, None if time is over."""
    process = FORKS.Process(target=lead_a_group, args=(do, *given))
    process.start()
    try:
        process.join(card.seconds_left())
        return process.exitcode  # None while it runs
    finally:
        if process.is_alive():
            kill_group(process.pid)
            process.kill()  # if it had no time to lead a group
            process.join()


def lead_a_group(do: Callable[..., Any], *given: Any) -> None:
    """Do something as the first process of a group, so that all it starts can be killed."""
    os.setpgid(0, 0)
    do(*given)


def look_at_model(flags: list[str], path: str, sizes: dict[str, Any]) -> int:
    """Do all checks of Look, and append their rows to a file as they come."""
    look = Look(prepared_for_device([*flags, "--matmul", "native", "--lora_dropout", "0"]), sizes)
    for check in LOOKS:
        for row in rows_of(check, look):
            with open(path, "a", encoding="utf-8") as file:
                print(json.dumps(asdict(row)), file=file)
    return 0


@dataclass
class Look:
    """The model that one process looks at. LoRA has no dropout, so gradients can be compared."""

    job: t.Job
    sizes: dict[str, Any]
    trainer: Any = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.trainer.args.device

    @property
    def is_gpu(self) -> bool:
        """Whether that is a GPU."""
        return self.device.type == "cuda"

    @functools.cached_property
    def examples(self) -> list[t.Example]:
        """The examples of a step, of about the median length."""
        size = t.examples_per_step(self.job.settings)
        by_length = sorted(self.job.examples, key=lambda example: len(example.input_ids))
        middle = (len(by_length) - size) // 2
        return by_length[middle : middle + size]

    def step(self, examples: list[t.Example] | None = None) -> tuple[float, torch.Tensor]:
        """Do a step forward and backward; return its loss, and LoRA's gradients as one vector."""
        chosen = examples or self.examples
        model = self.trainer.model
        inputs = t.pad(chosen, self.device)
        learned = len(t.target_positions(inputs)[0])
        model.zero_grad()
        loss = self.trainer.training_step(model, inputs, torch.tensor(learned)).item()
        weights = [weight for weight in model.parameters() if weight.grad is not None]
        found = torch.cat([weight.grad.flatten() for weight in weights])
        model.zero_grad()
        wait_for(self.device)
        return loss, found

    def milliseconds(self, examples: list[t.Example] | None = None) -> float:
        """Return how long a step takes."""
        began = time.perf_counter()
        self.step(examples)
        return 1000 * (time.perf_counter() - began)


# Anonymous memory that loading may take, as a share of the weights, which lie in the file's pages:
# buffers for their way to the GPU. A tiny model drowns in what the process takes anyway.
OWN_WHILE_LOADING, OWN_AT_LEAST = 0.15, GIB // 4


def loading(look: Look) -> Iterator[Row]:
    """How long loading takes, and how much of the host's memory that is not a file's."""
    device = accelerate.PartialState().device
    found: list[float] = []
    real = t.load_model

    def load(*given: Any, **named: Any) -> Any:
        began = time.monotonic()
        with MemoryWatch() as watch:
            model = real(*given, **named)
            wait_for(device)
        found.extend([time.monotonic() - began, watch.peak])
        return model

    with MemoryWatch() as before:
        wait_for(device)
    with quiet(), unittest.mock.patch.object(t, "load_model", load):
        look.trainer = t.new_trainer(look.job)
    seconds, peak = found
    size = sum(weight.nbytes for weight in look.trainer.model.parameters())
    own = peak - before.peak
    text = f"{seconds:.1f} s, {own / GIB:.2f} GiB of the host's anonymous memory; the weights are "
    yield Row(
        "loading", f"{text}{size / GIB:.2f}", own <= max(OWN_WHILE_LOADING * size, OWN_AT_LEAST)
    )


def trial(look: Look) -> Iterator[Row]:
    """What fits at once, what tokens cost, and what the simulation says of the trial's peak."""
    began = time.monotonic()
    with quiet():
        t.find_what_fits(look.trainer, look.job)
    limits = look.job.token_limits
    text = f"{time.monotonic() - began:.1f} s; {json.dumps(asdict(limits))}"
    yield Row("trial of memory", text, limits.most() > 0)
    if not look.is_gpu:
        yield Row("the trial's peak, simulated", "not done: on a CPU nothing is tried")
        return
    longest, _ = t.most_tokens(look.job)
    is_recomputed = limits.tokens_at_once < t.whole_chunks(longest)
    tokens = limits.tokens_at_once_recomputed if is_recomputed else limits.tokens_at_once
    rows, width = t.hardest_shape(tokens, longest)
    needed = t.memory_of_pass(look.trainer, rows, width, 1.0, is_recomputed)
    simulation = Simulation(look.sizes, look.job.settings)
    code = "fla" if uses_fla(look) else "torch"
    peak = simulation.peak(Pass(rows, width, rows * (width - 1), is_recomputed, deltanet=code))
    simulated = peak - simulation.weight_bytes - 12 * simulation.trainable
    share = needed / simulated
    text = f"{rows} x {width} tokens need {needed / GIB:.2f} GiB more than the weights, "
    text += f"{share:.3f} of the simulated {simulated / GIB:.2f}"
    # Other attention than the simulation's may take less, but nothing should take much more.
    yield Row("the trial's peak, simulated", text, share <= 1.1)


def a_step(look: Look) -> Iterator[Row]:
    """Milliseconds and kernels of a step of median length."""
    kind = look.job.matmul
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if look.is_gpu else [])]
    with contextlib.nullcontext() if look.is_gpu else float16_cores():
        times = [look.milliseconds() for _ in range(6 if look.is_gpu else 2)]
        loss, gradients = look.step()
        with profile(activities=activities) as profiled:
            look.step()
    wanted = torch.autograd.DeviceType.CUDA if look.is_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiled.events() if event.device_type == wanted]
    width = max(len(example.input_ids) for example in look.examples)
    unit = "kernels and copies" if look.is_gpu else "operations"
    text = (
        f"{statistics.median(times[1:]):.0f} ms, the first {times[0]:.0f}; {len(events):,} {unit}"
    )
    if look.is_gpu:
        busy = sum(event.time_range.elapsed_us() for event in events) / 1000
        text += f", the card busy for {busy:.0f} ms"
    is_good = math.isfinite(loss) and bool(gradients.isfinite().all())
    yield Row(f"a step of {len(look.examples)} x {width} tokens, {kind} matmul", text, is_good)


def fla_against_torch(look: Look) -> Iterator[Row]:
    """Where fla is used: LoRA's gradients of a step with it and with the torch code it wraps."""
    chosen = look.job.delta_kernels or "no GPU, so nothing was tried"
    yield Row("DeltaNet's kernels", chosen)
    if not uses_fla(look):
        yield Row("fla against torch's code", "not done: fla is not used here")
        return
    module = importlib.import_module("transformers.models.qwen3_5.modeling_qwen3_5")
    name = "torch_chunk_gated_delta_rule"
    yield from compare_ways(look, module, name, getattr(module, name).__wrapped__)


def uses_fla(look: Look) -> bool:
    """Return whether DeltaNet is computed by fla's kernels."""
    return look.job.delta_kernels.startswith("fla")


def compare_ways(look: Look, module: Any, name: str, other: Callable[..., Any]) -> Iterator[Row]:
    """Compare steps with a function of a module and with another one in its place."""
    times, found = [], []
    for function in (other, getattr(module, name)):
        with unittest.mock.patch.object(module, name, function):
            look.step()
            found.append(look.step())
            times.append(look.milliseconds())
    (torch_loss, expected), (loss, gradients) = found
    apart = t.share_apart(expected, gradients)
    losses = abs(loss / torch_loss - 1)
    text = f"{times[1]:.0f} ms with it, {times[0]:.0f} without; loss {losses:.2%} and LoRA's "
    text += f"gradients {apart:.2%} apart"
    is_good = losses <= t.MOST_LOSS_APART and apart <= t.MOST_GRADIENTS_APART
    yield Row("fla against torch's code", text, is_good)


def out_of_memory_in_a_step(look: Look) -> Iterator[Row]:
    """A step that runs out of memory is done again, and its gradients stay."""
    _, expected = look.step()
    before = look.job.token_limits
    look.job.token_limits = t.MemoryLimits(**asdict(before) | {"costs": before.costs})
    look.job.token_limits.costs_recomputed = before.costs_recomputed
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(memory_for_half_a_step(look))
            with quiet():
                _, found = look.step()
        limit = look.job.token_limits.tokens_at_once
    finally:
        look.job.token_limits = before
    apart = t.share_apart(expected, found)
    text = f"{before.tokens_at_once:,} tokens at once, then {limit:,}; gradients {apart:.2%} apart"
    # Other shapes may have other kernels, which round otherwise; a lost micro-batch is far more.
    is_good = limit < before.tokens_at_once and apart <= t.MOST_GRADIENTS_APART
    yield Row("out of memory in a step", text, is_good)


@contextlib.contextmanager
def memory_for_half_a_step(look: Look) -> Iterator[None]:
    """Let a step find about half of the memory that it needs; on a CPU let it fail once."""
    if not look.is_gpu:
        failed: list[None] = []

        def fail(model: Any, _: Any, __: Any) -> None:
            if not failed:
                failed.append(None)
                raise torch.OutOfMemoryError("out of memory, as a check wants it")

        with look.trainer.model.register_forward_hook(fail):
            yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    look.step()
    needed = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    room = torch.cuda.memory_reserved() + 0.6 * needed
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(0.97)


def steps_of_new_widths(look: Look) -> Iterator[Row]:
    """Each new width costs little, and the allocator's memory does not fall into fragments."""
    made = [
        [t.Example("", [], prompt_ids=[5] * width, reply_ids=[6] * (width // 2))] * 2
        for width in range(20, 80, 5)
    ]
    torch.cuda.empty_cache()
    if look.is_gpu:
        torch.cuda.reset_peak_memory_stats()  # the trials before took far more than these steps
    times = [[look.milliseconds(examples) for examples in made] for _ in range(2)]
    first, again = (statistics.median(one) for one in times)
    text = f"{first:.0f} ms for a width's first step, {again:.0f} for its second one"
    yield Row("steps of new widths", text, first <= 3 * again + 200)
    if not look.is_gpu:
        yield Row("the allocator's fragments", "not done: no GPU")
        return
    reserved = torch.cuda.max_memory_reserved() / GIB
    allocated = torch.cuda.max_memory_allocated() / GIB
    setting = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    text = f"{reserved:.2f} GiB reserved, {allocated:.2f} in use at the most; {setting}"
    yield Row("the allocator's fragments", text, reserved <= 1.2 * allocated + 0.5)


def rates(look: Look) -> Iterator[Row]:
    """What the minutes in docs/gpu.md rest on: matmul of each type, copies, and solves."""
    size = 4096 if look.is_gpu else 128
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        matrix = torch.ones(size, size, dtype=dtype, device=look.device)
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds_of(lambda: matrix @ matrix)  # noqa: B023
    text = ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in found.items())
    is_faster = found["float16"] > 2 * found["bfloat16"]
    yield Row("matmul, TFLOP/s", text, not look.is_gpu or is_faster == emulates_bfloat16(look))
    moved = torch.ones(64 * size**2 // 16, device=look.device)
    rate = 2 * moved.nbytes / seconds_of(moved.clone)
    yield Row("copies", f"{rate / 1e9:.0f} GB/s")
    systems = torch.eye(64, device=look.device).expand(4, 32, 3, 64, 64).contiguous()
    values = torch.ones(4, 32, 3, 64, 128, device=look.device)
    seconds = seconds_of(
        lambda: torch.linalg.solve_triangular(systems, values, upper=False, unitriangular=True)
    )
    yield Row(
        "triangular solve of 384 x 64 x 64", f"{1e6 * seconds:.0f} us, {seconds / 64e-6:.2f} a row"
    )


def emulates_bfloat16(look: Look) -> bool:
    """Return whether it is a card without bfloat16 of its own, so that float16 is for it."""
    return look.is_gpu and torch.cuda.get_device_capability()[0] < 8


def seconds_of(do: Callable[[], Any]) -> float:
    """Return how long something takes on this process's device, as the best of some times."""
    device = accelerate.PartialState().device
    times = []
    for _ in range(8):
        wait_for(device)
        began = time.perf_counter()
        do()
        wait_for(device)
        times.append(time.perf_counter() - began)
    return min(times)


def float16_against_native(look: Look) -> Iterator[Row]:
    """The matmul of frozen weights becomes scaled float16: loss, gradients and times."""
    with contextlib.nullcontext() if look.is_gpu else float16_cores():
        t.set_recomputation(look.trainer.recomputing_layers, False)
        native = t.timed_pass(look.trainer, look.examples)
        with quiet():
            t.use_fp16_matmul(look.trainer.model.get_base_model())
        look.job.matmul = "float16"
        float16 = t.timed_pass(look.trainer, look.examples)
    reason = t.why_not_fp16(native, float16)
    apart = t.share_apart(native.gradients, float16.gradients)
    text = f"{1000 * native.seconds:.0f} ms native, {1000 * float16.seconds:.0f} float16; losses "
    text += f"{abs(float16.loss / native.loss - 1):.2%} and LoRA's gradients {apart:.2%} apart"
    is_good = reason == "" or (reason == t.SLOWER and not emulates_bfloat16(look))
    yield Row("float16 matmul against native", f"{text}; {reason}".rstrip("; "), is_good)


def matmul_auto(look: Look) -> Iterator[Row]:
    """MATMUL "auto" tries float16 just where the card only emulates bfloat16."""
    settings = t.parse_settings([])
    settings.DEVICE, settings.dry_run = look.device.type, False
    with quiet():
        chosen = t.choose_matmul(t.Job(settings, config=look.job.config))
    wanted = "float16" if emulates_bfloat16(look) else "native"
    yield Row("MATMUL auto", f"tries {chosen} matmul", chosen == wanted)


LOOKS: list[Callable[[Look], Iterator[Row]]] = [
    loading,
    trial,
    a_step,
    fla_against_torch,
    out_of_memory_in_a_step,
    steps_of_new_widths,
    float16_against_native,
    a_step,
    products_against_float64,
    matmul_auto,
    rates,
]


def prepared_for_device(flags: list[str]) -> t.Job:
    """Return the script's job with its data, its plan and its device."""
    os.chdir(ROOT)
    job = t.Job(t.parse_settings(flags))
    with quiet():
        t.prepare(job)
    return job


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def a_whole_run(card: Card) -> Iterator[Row]:
    """A whole run as on a V100, with float16 matmul."""
    printed = run_script(card, "float16", "--matmul", "float16", kind="v100")
    record = card.record("float16")
    speed = record["train_tokens"] / record["train_seconds"]
    steps = len(card.losses("float16"))
    text = f"{steps} steps in {record['train_seconds']:.1f} s, {speed:,.0f} tokens/s"
    if card.is_gpu:
        text += f", {record['peak_memory_gib']:.1f} GiB; {line_of(printed, 'memory')}"
    is_good = record["outcome"] == "finished" and record["products"] == "float16"
    yield Row("whole run as on a V100", text, is_good)
    found = " ".join(re.findall(r"by(?: at most)? ([\d.e+-]+) from", printed))
    is_there = (card.output("float16") / "final_lora" / "adapter_model.safetensors").is_file()
    yield Row("verified", f"error and effect {found}", bool(found) and is_there)


def evidence(card: Card) -> Iterator[Row]:
    """The package measures the adapter that was trained with float16 matmul, with it."""
    tiny = card.options.tiny
    general = write_lines(card.options.folder / "general.jsonl", shipped_lines(GENERAL, 12))
    words = ["evidence", str(card.output("float16") / "final_lora")]
    words += ["--general_file", "" if tiny else str(general), "--examples", "0" if tiny else "12"]
    words += ["--samples", "1", "--max_new_tokens", "4" if tiny else "48"]
    began = time.monotonic()
    run_inspector(card, *words)
    seconds = time.monotonic() - began
    folder = card.output("float16") / "inspected" / "final_lora"
    missing = [name for name in ("report.md", "lora.png") if not (folder / name).is_file()]
    found = json.loads((folder / "evidence.json").read_text(encoding="utf-8"))
    text = f"{len(found['losses'])} losses, {len(found['parts'])} parts in {seconds:.0f} s"
    text += f"; missing: {', '.join(missing)}" if missing else ""
    yield Row("evidence", text, not missing and (tiny or bool(found["parts"])))
    ours = card.record("float16")["loss_history"]
    losses = [one["eval_loss"] for one in ours if "eval_loss" in one]
    apart = largest_difference([found["loss"]["base"], found["loss"]["adapter"]], losses)
    yield Row("evidence's losses and the run's", f"at most {apart:.2%} apart", apart <= 0.02)


def chat(card: Card) -> Iterator[Row]:
    """The adapter, as another trainer's, and the base answer in the chat."""
    # As somebody else's adapter, with no record of a run beside it.
    adapter = str(shutil.copytree(card.output("float16") / "final_lora", card.output("foreign")))
    began = time.monotonic()
    limit = "4" if card.options.tiny else "48"
    said = "Hello, who are you?\n/base\nAnd now?\n/quit\n"
    words = ["chat", adapter, "--base", card.model, "--max_new_tokens", limit]
    printed = run_inspector(card, *words, said=said)
    names = re.findall(r"(adapter|base)> ", printed)
    text = f"answers of {' and '.join(names)} in {time.monotonic() - began:.0f} s"
    yield Row("chat", text, names == ["adapter", "base"])


def a_card_of_16_gb_and_slurm(card: Card) -> Iterator[Row]:
    """A run on a small card is stopped in a step, goes on to its end, and is finished then."""
    flags = ["--matmul", "float16"]
    stopped = 128 + signal.SIGUSR1
    with leave_only(card, CARDS["16 GB"]) as note:
        printed = run_script(card, "small", *flags, kind="stopped", wanted=stopped)
        saved = [*card.output("small").glob("checkpoints/checkpoint-*")]
        memory = f"; {line_of(printed, 'memory')}" if card.is_gpu else ""
        text = f"status {stopped}, {len(saved)} checkpoints{memory}"
        yield Row(f"SIGUSR1 in a step{note}", text, bool(saved))
        printed = run_script(card, "small", *flags, kind="v100")
    record = card.record("small")
    apart = largest_difference(card.losses("small"), card.losses("float16"))
    text = f"{line_of(printed, 'resume').partition('checkpoints')[2] or 'begun anew'}, "
    text += f"losses at most {apart:.2%} from the run that was never stopped"
    if card.is_gpu:
        text += f", {record['peak_memory_gib']:.1f} GiB"
    is_good = record["outcome"] == "finished" and bool(record["resumed_from"]) and apart <= 0.02
    yield Row(f"gone on{note}", text, is_good)
    line = line_of(run_script(card, "small", *flags, kind="v100"), "finished")
    yield Row("given once more", line or "not said to be finished", bool(line))


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
    """A step that is too large for 32 GB goes through in micro-batches."""
    if not card.is_gpu:
        yield Row("steps of 24 examples", "not done: on a CPU every step goes through whole")
        return
    flags = ["--matmul", "float16", "--batch_size", "24", "--max_steps", "2"]
    flags += ["--gradient_accumulation_steps", "1"]
    with leave_only(card, CARDS["32 GB"]) as note:
        printed = run_script(card, "large", *flags, kind="v100")
    record, memory = card.record("large"), line_of(printed, "memory")
    text = f"{len(card.losses('large'))} steps; {memory}; {record['peak_memory_gib']:.1f} GiB"
    is_good = record["outcome"] == "finished" and "whole step" not in memory
    yield Row(f"steps of 24 examples{note}", text, is_good)


def one_process_under_torchrun(card: Card) -> Iterator[Row]:
    """A launcher with one process does what the plain command does, with the same kernels."""
    run_script(card, "launched", "--matmul", "float16", "--max_steps", "2", kind="torchrun")
    apart = abs(card.losses("launched")[0] / card.losses("float16")[0] - 1)
    text = f"first loss {apart:.2%} from the plain run's"
    yield Row("torchrun, one process", text, apart <= 0.01)


def the_script_as_it_is(card: Card) -> Iterator[Row]:
    """The command that a user gives: it chooses matmul and kernels by itself, and says why."""
    run_script(card, "as is", "--max_steps", "6", kind="as is")
    record = card.record("as is")
    text = f"{record['products']} matmul; {record['delta_kernels'] or 'no trial of fla'}; "
    text += f"compared: {json.dumps(record['matmul_compared'])}; memory limits "
    text += json.dumps(record["memory_limits"])
    yield Row("the script as it is", text, record["outcome"] == "finished")


def the_demo_with_fla_installed(card: Card) -> Iterator[Row]:
    """Where fla is installed: it must not be used on the CPU of a machine with a GPU."""
    try:  # the module itself may be forbidden in this process, see forbid_gpu_packages()
        version = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        yield Row("demo on the CPU with fla installed", "not done: fla is not installed")
        return
    words = [sys.executable, SCRIPT, "--demo", "--max_steps", "3"]
    finished(card, [*words, "--output_dir", str(card.output("demo"))])
    yield Row("demo on the CPU with fla installed", f"finished, fla-core {version}", True)


def room_left(card: Card) -> Iterator[Row]:
    """How much the checks wrote."""
    size = sum(path.stat().st_size for path in card.options.folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(card.options.folder).free
    yield Row("disk", f"{size / GIB:.1f} GiB written, {free / GIB:.0f} free")


CHECKS: list[Callable[[Card], Iterator[Row]]] = [
    versions,
    random_model,
    the_model_in_one_process,
    a_whole_run,
    a_card_of_16_gb_and_slurm,
    a_card_of_32_gb,
    one_process_under_torchrun,
    evidence,
    chat,
    the_script_as_it_is,
    the_demo_with_fla_installed,
    room_left,
]
