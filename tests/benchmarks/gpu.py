"""The acceptance of a card: everything that can only be seen on a GPU, in under nine minutes.

A random Qwen3.5-4B of the real size is made on the GPU, so nothing is downloaded. Each check is a
row of the table or several; one that fails is a row as well, and does not end the others. Without
a GPU, or with --tiny, all that a CPU can do is done with a tiny model.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import (
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
from benchmarks.simulate import CARDS

MINUTES = 9
AS_CARD = str(Path(__file__).with_name("as_card.py"))
GENERAL = ROOT / "inspect_lora" / "general.jsonl"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


# ==== the acceptance


def gpu(options: Options) -> None:
    """Do all checks, and print one table."""
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
            self.rows.append(Row(name, repr(error), False))

    def seconds_left(self) -> float:
        """Return how much of the nine minutes is left; a CPU may take longer."""
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
    if kind == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1"]
        words += ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), SCRIPT]
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
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        input=said,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=max(1.0, card.seconds_left()),
    )
    if done.returncode != wanted:
        raise RuntimeError(f"status {done.returncode}: {' '.join(done.stdout.split())[-200:]}")
    return done.stdout


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
    """Return by how much two lists of losses differ at the most, as a share."""
    count = min(len(ones), len(others))
    if not count:
        return math.inf
    pairs = zip(ones[:count], others[:count], strict=True)
    return max(abs(one / other - 1) for one, other in pairs)


# ==== the checks, in the order of the table


def versions(card: Card) -> Iterator[Row]:
    """The machine and the packages."""
    python = platform.python_version()
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    yield Row("packages", f"Python {python}, {packages}")
    if card.is_gpu:
        card.name, card.capability, found = card.apart(about_card)
        yield Row("card", f"{found}, {os.cpu_count()} CPU cores")


def about_card() -> tuple[str, int, str]:
    """Return the card's name, the first number of its sm, and what else is to be known of it."""
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


def products_against_float64(card: Card) -> Iterator[Row]:
    """Scaled float16 products of rows of every size, and of rows that hold no numbers."""
    sizes = card.options.sizes
    shape = sizes["intermediate_size"], sizes["hidden_size"]
    plain, scaled, worst, finite = card.apart(product_errors, *shape, card.is_gpu)
    text = f"bfloat16 {plain:.3%}, scaled float16 {scaled:.3%}"
    found = f"{text}; over rows of 1e-30 to 1e30 at most {worst:.3f} of bfloat16's"
    yield Row("products against float64", found, worst <= ROUNDED_TWICE)
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
        products = rows @ weight.T, t.scaled_product(rows, half)
        errors[size] = [((one.double() - exact).norm() / exact.norm()).item() for one in products]
    rows = torch.randn(4, k, generator=drawn, device=device).bfloat16()
    rows[0], rows[1, 3], rows[2, 5] = 0, math.inf, math.nan
    finite = torch.isfinite(t.scaled_product(rows, half)).all(-1).tolist()
    worst = max(scaled / plain for plain, scaled in errors.values())
    return *errors[1.0], worst, finite


def loading(card: Card) -> Iterator[Row]:
    """How long loading takes, and how much of the host's memory."""
    seconds, own, size = card.apart(load_on_device, card.flags)
    text = f"{seconds:.1f} s, {own / GIB:.2f} GiB of the host's memory, {size / GIB:.2f} are a copy"
    yield Row("loading", text, own <= 1.02 * size)


def load_on_device(flags: list[str]) -> tuple[float, int, int]:
    """Load the model as the script does; return seconds, what the host gave, and a copy's bytes."""
    job = prepared_for_device(flags)
    device, settings = accelerate.PartialState().device, job.settings
    with MemoryWatch() as before:
        wait_for(device)
    began = time.monotonic()
    with quiet(), MemoryWatch() as watch:
        model = t.load_model(settings.MODEL_NAME, settings.MODEL_REVISION, settings.DTYPE, device)
        wait_for(device)
    seconds = time.monotonic() - began
    size = sum(weight.nbytes for weight in model.parameters())
    return seconds, watch.peak - before.peak, size


def prepared_for_device(flags: list[str]) -> t.Job:
    """Return the script's job with its data, its plan and its device."""
    os.chdir(ROOT)
    t.forbid_gpu_packages()
    job = t.Job(t.parse_settings(flags))
    with quiet():
        t.prepare(job)
    return job


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def a_step(card: Card) -> Iterator[Row]:
    """Milliseconds and kernels of a step of median length, for both products."""
    output = f"--output_dir={card.output('step')}"
    for kind in ("native", "float16"):
        found = card.apart(measure_step, [*card.flags, output], kind)
        size = f"{found['rows']} x {found['width']} tokens"
        text = f"{found['ms']:.0f} ms, {found['count']:,} {found['unit']}"
        if card.is_gpu:
            text += f", the card busy for {found['busy']:.0f} ms; {found['memory']}"
        yield Row(f"a step of {size}, {kind} products", text, math.isfinite(found["loss"]))
    wanted = "float16" if card.is_gpu and card.capability < 8 else "native"
    yield Row("MATMUL auto", f"takes {found['auto']} products", found["auto"] == wanted)


def measure_step(flags: list[str], kind: str) -> dict[str, Any]:
    """Time and profile the step of the four examples in the middle, by length."""
    job = prepared_for_device(flags)
    auto, job.products = job.products, kind
    with quiet():
        trainer = t.build_trainer(job)
        t.find_what_fits(trainer, job)
    device = trainer.args.device
    size = t.examples_per_step(job.settings)
    by_length = sorted(job.examples, key=lambda example: len(example.input_ids))
    middle = (len(by_length) - size) // 2
    examples = by_length[middle : middle + size]
    inputs = t.pad(examples, device)
    learned = sum(len(example.reply_ids) for example in examples)

    def step() -> float:
        loss = trainer.training_step(trainer.model, dict(inputs), learned)
        trainer.model.zero_grad()
        wait_for(device)
        return loss.item()

    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with contextlib.nullcontext() if is_gpu else float16_cores():
        times = []
        for _ in range(6 if is_gpu else 2):
            began = time.perf_counter()
            loss = step()
            times.append(1000 * (time.perf_counter() - began))
        with profile(activities=activities) as profiled:
            step()
    wanted = torch.autograd.DeviceType.CUDA if is_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiled.events() if event.device_type == wanted]
    rows, width = inputs["input_ids"].shape
    limits = job.token_limits
    return {
        "rows": rows,
        "width": width,
        "loss": loss,
        "ms": statistics.median(times[1:]),
        "count": len(events),
        "unit": "kernels and copies" if is_gpu else "operations",
        "busy": sum(event.time_range.elapsed_us() for event in events) / 1000,
        "memory": f"{limits.tokens_at_once:,} tokens at once kept, "
        f"{limits.tokens_at_once_recomputed:,} recomputed",
        "auto": auto,
    }


def whole_runs(card: Card) -> Iterator[Row]:
    """A whole run with either kind of products; the second one is as on a V100."""
    for name, kind in (("native", "plain"), ("float16", "v100")):
        printed = run_script(card, name, "--matmul", name, kind=kind)
        record = card.record(name)
        speed = record["train_tokens"] / record["train_seconds"]
        steps = len(card.losses(name))
        text = f"{steps} steps in {record['train_seconds']:.1f} s, {speed:,.0f} tokens/s"
        if card.is_gpu:
            text += f", {record['peak_memory_gib']:.1f} GiB; {line_of(printed, 'memory')}"
        is_good = record["outcome"] == "finished" and record["products"] == name
        note = " as on a V100" if kind == "v100" else ""
        yield Row(f"whole run, {name} products{note}", text, is_good)
        found = " ".join(re.findall(r"by(?: at most)? ([\d.e+-]+) from", printed))
        is_there = (card.output(name) / "final_lora" / "adapter_model.safetensors").is_file()
        yield Row(
            f"verified, {name} products", f"error and effect {found}", bool(found) and is_there
        )
    apart = largest_difference(card.losses("native"), card.losses("float16"))
    yield Row("losses of the two runs", f"at most {apart:.2%} apart", apart <= 0.02)


def evidence(card: Card) -> Iterator[Row]:
    """The package measures the adapter that was trained with float16 products, with these."""
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
    """The adapter and the base answer in the chat."""
    adapter = str(card.output("native") / "final_lora")
    began = time.monotonic()
    limit = "4" if card.options.tiny else "48"
    said = "Hello, who are you?\n/base\nAnd now?\n/quit\n"
    printed = run_inspector(card, "chat", adapter, "--max_new_tokens", limit, said=said)
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
    """A step that is too large for a card goes through in parts."""
    if not card.is_gpu:
        yield Row("steps of 24 examples", "not done: on a CPU every step goes through whole")
        return
    flags = ["--matmul", "float16", "--batch_size", "24", "--max_steps", "2"]
    flags += ["--gradient_accumulation_steps", "1"]
    with leave_only(card, CARDS["32 GB"]) as note:
        printed = run_script(card, "large", *flags, kind="v100")
    record = card.record("large")
    text = f"{len(card.losses('large'))} steps; {line_of(printed, 'memory')}; "
    text += f"{record['peak_memory_gib']:.1f} GiB"
    yield Row(f"steps of 24 examples{note}", text, record["outcome"] == "finished")


def one_process_under_torchrun(card: Card) -> Iterator[Row]:
    """A launcher with one process does what the plain command does."""
    run_script(card, "launched", "--matmul", "native", "--max_steps", "2", kind="torchrun")
    apart = abs(card.losses("launched")[0] / card.losses("native")[0] - 1)
    text = f"first loss {apart:.2%} from the plain run's"
    yield Row("torchrun, one process", text, apart <= 0.01)


def flash_linear_attention(card: Card) -> Iterator[Row]:
    """Where fla is installed: a run with it on a card that it runs on, and the demo without one."""
    try:  # the module itself is forbidden in this process, see forbid_gpu_packages()
        version = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        yield Row("flash-linear-attention", "not installed")
        return
    words = [sys.executable, SCRIPT, "--demo", "--max_steps", "3"]
    finished(card, [*words, "--output_dir", str(card.output("demo"))])
    yield Row("demo on the CPU with it installed", "finished", True)
    if card.capability < 8:
        yield Row("flash-linear-attention", "does not run here, so the script does not use it")
        return
    run_script(card, "fla", "--matmul", "native", kind="as is")
    apart = largest_difference(card.losses("fla"), card.losses("native"))
    record, plain = card.record("fla"), card.record("native")
    seconds = f"{record['train_seconds']:.1f} s of training, {plain['train_seconds']:.1f} without"
    found = f"{version}: {seconds}; losses at most {apart:.2%} apart"
    yield Row("flash-linear-attention", found, apart <= 0.02)


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
    evidence,
    a_card_of_16_gb_and_slurm,
    a_card_of_32_gb,
    chat,
    one_process_under_torchrun,
    flash_linear_attention,
    room_left,
]
