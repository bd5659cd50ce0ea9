"""The command `evidence`: what adapters are measured on, and in which order."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import math
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train_lora_single as script
from inspect_lora import common, data, measure, model, report
from inspect_lora.adapter_file import SavedAdapter, find_adapter, read_adapter, report_folder
from inspect_lora.common import InspectError
from inspect_lora.compare import compare
from inspect_lora.record import FILE, SCHEMA, Record, read_record, save_record
from inspect_lora.rules import read_rules

PROBES = 12  # of the adapter's replies: their tokens are kept for `served`
NOT_ASKED_FOR = ("adapters", "output_dir", "again")  # flags that change no number
FILES = ("eval_file", "prompts", "rules", "general_file", "train_file", "chat_template")


def run(options: argparse.Namespace) -> int:
    """Measure each adapter; write and print the reports. Returns 2 if one was not measurable."""
    if options.output_dir and len(options.adapters) > 1:
        raise InspectError("--output_dir is for one adapter; of several each has its own folder.")
    with contextlib.redirect_stdout(sys.stderr):
        plans = [plan_measurement(options, name) for name in dict.fromkeys(options.adapters)]
    folders = Counter(plan.record.folder.resolve() for plan in plans)
    if twice := [str(folder) for folder, count in folders.items() if count > 1]:
        raise InspectError(f"Two of these adapters would have their report in {twice[0]}.")
    if len(plans) == 1:
        measure_unless_known(plans[0], None)
        report.show_all(read_record(plans[0].record.folder))
        return 0
    adapter, measured = None, []
    for plan in plans:
        try:
            adapter = measure_unless_known(plan, adapter)
        except InspectError as error:
            common.tell("left out", str(error))
            adapter = None  # its base may hold a part of this one
        else:
            report.write(read_record(plan.record.folder))
            measured.append(str(plan.record.folder))
    try:
        compare(measured, Path("compared"))
    except InspectError as error:  # such as of different bases; each has its report
        common.tell("compare", str(error))
    return 0 if len(measured) == len(plans) else 2


def measure_unless_known(plan: Plan, before: model.Adapter | None) -> model.Adapter | None:
    """Measure one adapter, or say that it was measured; return what is on the base then."""
    if is_measured(plan):
        common.tell("report", f"{common.from_here(plan.record.folder)} is finished, with the "
                    "same files and flags: --again measures it anew")  # fmt: skip
        return before
    with contextlib.redirect_stdout(sys.stderr), stopped_by_signals():
        return measure_adapter(plan, before)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let the signals of a terminal and of job schedulers raise KeyboardInterrupt(number)."""

    def stop(number: int, _: Any) -> None:
        raise KeyboardInterrupt(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- What is measured, and on what


@dataclass
class Plan:
    """What an adapter is measured on, all of it rendered, before any weights are loaded."""

    options: argparse.Namespace
    saved: SavedAdapter
    record: Record
    settings: argparse.Namespace  # the script's
    base: script.Base
    kinds: data.Kinds
    eval_file: str | None
    examples: list[script.Example]  # held-out replies; none with --prompts
    bad_examples: dict[str, script.Example]  # by file:line, those of pairs
    clusters: dict[str, str]  # of each line, the line that it counts with
    line_kinds: Counter[str]  # of the file's replies, also of those that were learned
    prompts: list[data.Prompt]
    tasks: list[data.Prompt]


def plan_measurement(options: argparse.Namespace, name: str) -> Plan:
    """Read and render all files; leave out what the adapter learned or what is too long."""
    saved = read_adapter(find_adapter(name))
    run = common.read_json(saved.place / "run.json")
    weights = script.file_sha256(saved.place / "adapter_model.safetensors")
    record = Record(name, common.hash_of((weights, saved.config)), saved.config, run)
    record.folder = Path(options.output_dir or report_folder(name, saved.place))
    kinds = data.Kinds(options.kind, read_rules(options.rules) if options.rules else [])
    tasks, lines, rejected, prompts, eval_file = [], [], [], [], None
    if options.general_file:
        tasks = data.read_prompts(options.general_file, "tasks", data.Kinds("topic", []))
    thinks = options.enable_thinking or run.get("settings", {}).get("ENABLE_THINKING", False)
    if options.prompts:
        prompts = data.read_prompts(options.prompts, "prompts", kinds)
    else:
        eval_file = options.eval_file or data.file_held_out(saved.place, run)
        replies = run.get("settings", {}).get("REPLIES", "all")
        system = options.system or ""
        lines, rejected = data.read_held_out(eval_file, replies, thinks, kinds, system)
    lengths = {line.source: len(line.messages) for line in lines}  # the last of a line stays
    learned = data.read_learned(saved.place, options.train_file, thinks)

    def is_new(prompt: data.Turns) -> bool:
        return script.prompt_hash(prompt) not in (learned or ())

    kept = [line for line in lines if is_new(line.messages[:-1])]
    bad = [line for line in rejected if is_new(line.messages[:-1])]
    new = [prompt for prompt in prompts if is_new(prompt.messages)]
    if learned is not None:
        record.learned = len(lines) + len(prompts) - len(kept) - len(new)
    record.trained_kinds = data.count_trained_kinds(saved.place, run, options.train_file, kinds)
    settings, base = model.describe_base(options, saved)
    problems: list[str] = []
    examples = script.encode(kept, base, 10**9, problems)
    bad_examples = {each.source: each for each in script.encode(bad, base, 10**9, problems)}
    data.refuse(problems)
    plan = Plan(
        options, saved, record, settings, base, kinds, eval_file, examples, bad_examples,
        data.clusters_of(lines, options.cluster), Counter(kinds.of(line.row) for line in lines),
        new, tasks,
    )  # fmt: skip
    leave_out_long_lines(plan)
    record.system = system_of(plan)
    choose_prompts(plan, lengths)
    record.request = hash_of_request(plan)
    return plan


def leave_out_long_lines(plan: Plan) -> None:
    """Leave lines out, and pairs, that are longer than --max_seq_len or the training's limit."""
    record, limit = plan.record, limit_of(plan)
    count = len(plan.examples)
    plan.examples = [each for each in plan.examples if len(each.input_ids) <= limit]
    record.too_long = count - len(plan.examples)
    if not (plan.examples or plan.prompts):
        raise InspectError(
            f"{plan.eval_file or plan.options.prompts}: no line is left. The adapter learned "
            f"{record.learned or 0}, and {record.too_long} are longer than --max_seq_len {limit}."
        )
    kept = {(each.source, len(each.messages)) for each in plan.examples}
    plan.bad_examples = {
        source: each
        for source, each in plan.bad_examples.items()
        if (source, len(each.messages)) in kept and len(each.input_ids) <= limit
    }


def limit_of(plan: Plan) -> float:
    """Return how long a line may be, in tokens: as in the training, if nothing else is asked."""
    of_training = plan.record.run.get("settings", {}).get("MAX_SEQ_LEN")
    return plan.options.max_seq_len or of_training or math.inf


def system_of(plan: Plan) -> str:
    """Return the system message that prompts get: that of the flag, the training or the lines."""
    if plan.options.system is not None:
        return plan.options.system
    if "system_message" in plan.record.run:
        return plan.record.run["system_message"] or ""
    return script.system_message_of(plan.examples) or "" if plan.examples else ""


def choose_prompts(plan: Plan, lengths: dict[str, int]) -> None:
    """Take the prompts of the lines, and draw tasks; refuse what cannot be rendered."""
    system, options = plan.record.system, plan.options
    for prompt in plan.prompts:
        prompt.messages = data.with_system(prompt.messages, system)
    if not plan.prompts:
        plan.prompts = data.prompts_of(plan.examples, lengths, plan.bad_examples, plan.kinds)
    reasons = {prompt.where: why_refused(plan.base, prompt.messages) for prompt in plan.prompts}
    data.refuse([f"{where}: {reason}" for where, reason in reasons.items() if reason])
    plan.record.asked_of = dict(Counter(prompt.kind for prompt in plan.prompts))
    if options.replies is not None or not options.prompts:
        plan.prompts = data.choose(plan.prompts, options.replies, plan.settings.DEVICE)
    tasks = [
        task
        for task in plan.tasks
        if not why_refused(plan.base, task.messages)
        and not why_refused(plan.base, data.with_system(task.messages, system))
    ]
    plan.record.refused = len(plan.tasks) - len(tasks)
    plan.tasks = [tasks[place] for place in data.draw_prompts(tasks, options.tasks)]


def why_refused(base: script.Base, messages: data.Turns) -> str:
    """Return why a prompt cannot be rendered, or ""; some templates take no system message."""
    try:
        model.prompt_ids(messages, base)
    except ValueError as error:
        return str(error)
    return ""


def hash_of_request(plan: Plan) -> str:
    """Return a hash of the adapter's files, of the flags, and of the files that they name."""
    without = (*NOT_ASKED_FOR, *FILES)
    flags = {name: value for name, value in vars(plan.options).items() if name not in without}
    inside = {path.name: script.file_sha256(path) for path in sorted(plan.saved.place.iterdir())}
    named = {name: facts["sha256"] for name, facts in files_of(plan).items()}
    return common.hash_of((SCHEMA, inside, flags, named))


def files_of(plan: Plan) -> dict[str, dict[str, str]]:
    """Return the files that were read, with their SHA-256."""
    flags = vars(plan.options) | {"eval_file": plan.eval_file}
    paths = {name: Path(flags[name]) for name in FILES if flags[name]}
    return {
        name: {"file": common.from_here(path), "sha256": script.file_sha256(path)}
        for name, path in paths.items()
        if path.is_file()
    }


def is_measured(plan: Plan) -> bool:
    """Return whether the same was measured before, to its end."""
    with contextlib.suppress(InspectError):
        before = read_record(plan.record.folder)
        return before.finished and before.request == plan.record.request and not plan.options.again
    return False


def conditions_of(plan: Plan, adapter: model.Adapter) -> dict[str, Any]:
    """Return what the numbers depend on besides the adapter."""
    base, settings, limit = plan.base, plan.settings, limit_of(plan)
    return {
        "base": settings.MODEL_NAME,
        "commit": base.commit,
        "tokenizer": base.tokenizer.name_or_path,
        "chat_template": settings.CHAT_TEMPLATE,
        "enable_thinking": base.enable_thinking,
        "dtype": settings.DTYPE,
        "device": settings.DEVICE,
        "matmul": adapter.loaded.matmul,
        "max_seq_len": limit if math.isfinite(limit) else None,
        "measured": time.strftime("%Y-%m-%d %H:%M:%S"),
        **files_of(plan),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }


# ---- The measurements, in their order


def measure_adapter(plan: Plan, before: model.Adapter | None) -> model.Adapter:
    """Measure one adapter, on the base of the one before if it is the same."""
    record = plan.record
    adapter = model.open_adapter(plan.saved, plan.settings, plan.base, before)
    record.conditions = conditions_of(plan, adapter)
    record.max_new_tokens = plan.options.max_new_tokens
    record.folder.parent.mkdir(parents=True, exist_ok=True)  # tells early if it cannot be written
    common.say("report", f"goes into {common.from_here(record.folder)}")
    try:
        measure_all(plan, adapter)
    except BaseException:
        if record.seconds:  # the report of what was measured
            report.write(record)
        raise
    return adapter


def measure_all(plan: Plan, adapter: model.Adapter) -> None:
    """Make each measurement, and write the record after it."""
    record = plan.record
    for name, step in STEPS.items():
        began = time.monotonic()
        step(plan, adapter)
        if not record.seconds and (record.folder / FILE).exists():
            script.rename_old(record.folder)  # not before something was measured
        record.folder.mkdir(exist_ok=True)
        record.seconds[name] = round(time.monotonic() - began, 1)
        record.finished = len(record.seconds) == len(STEPS)
        save_record(record)
        common.say("measured", f"{name}, in {record.seconds[name]:.0f} s")


def losses(plan: Plan, adapter: model.Adapter) -> None:
    """Measure the losses of all held-out replies, and of the bad replies of pairs."""
    if plan.examples:
        kinds = [plan.kinds.of(example.row) for example in plan.examples]
        lines = measure.measure_lines(adapter, plan.examples, plan.clusters, kinds)
        plan.record.lines = lines
        ends = {line.where: line for line in lines}  # the last reply of each line
        if plan.bad_examples:
            plan.record.pairs = measure.measure_pairs(adapter, ends, plan.bad_examples)


def updates(plan: Plan, adapter: model.Adapter) -> None:
    """Measure the size of the updates."""
    if adapter.is_plain:
        plan.record.updates = measure.measure_updates(adapter)


def parts(plan: Plan, adapter: model.Adapter) -> None:
    """Measure what parts of the adapter keep of the gain, on some of the held-out replies."""
    items = [
        data.Drawable(example.messages, line.kind, line.cluster)
        for example, line in zip(plan.examples, plan.record.lines, strict=True)
    ]
    places = data.draw(items, plan.options.parts, plan.line_kinds)
    if places and adapter.is_plain:
        examples = [plan.examples[place] for place in places]
        plan.record.parts = measure.measure_parts(adapter, examples)
        plan.record.part_lines = places


def elsewhere(plan: Plan, adapter: model.Adapter) -> None:
    """Measure how far the adapter moves the model on other tasks."""
    record, tasks = plan.record, plan.tasks
    if tasks:
        shifts = measure.measure_shifts(adapter, tasks, "")
        if record.system:
            shifts += measure.measure_shifts(adapter, tasks, record.system)
        record.tasks, record.shifts = [task.where for task in tasks], shifts


def replies(plan: Plan, adapter: model.Adapter) -> None:
    """Have both models reply, and keep the tokens of some of the adapter's replies."""
    asked = [*plan.prompts, *plan.tasks]
    exchanges, of_adapter = measure.ask_both(adapter, asked, plan.options.max_new_tokens)
    probed = [of_adapter[place] for place in data.draw_prompts(plan.prompts, PROBES)]  # no tasks
    plan.record.exchanges = exchanges
    plan.record.probes = measure.measure_probes(adapter, probed)


STEPS: dict[str, Callable[[Plan, model.Adapter], None]] = {
    "losses": losses,
    "updates": updates,
    "parts": parts,
    "elsewhere": elsewhere,
    "replies": replies,
}
