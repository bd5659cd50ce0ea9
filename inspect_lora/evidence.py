"""Measure an adapter on held-out conversations: what it gained, what else changed, what it says.

What is counted goes into evidence.json after each measurement. report.md, the picture and
replies.html are made from that file, and are made again by `report FOLDER`, also after Ctrl-C. The
folder is inspected/NAME beside the adapter, or --output_dir; an earlier report there is renamed.

An adapter of train_lora_single.py brings its held-out file and what it learned. For another one,
--eval_file names conversations that it was not trained on. With --prompts, prompts without replies
are asked instead: what base and adapter say, and what changed on other tasks, but no losses.

Of a held-out conversation the last reply's prompt is asked. On a CPU not all of these are: those
with a rule that asks for something ("any"), and a draw of the others, up to 100 in all. With
--replies N it is N in all.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import train_lora_single as script
from inspect_lora import common, data, measure, model, record, report
from inspect_lora.adapter_file import find_adapter, read_adapter, report_folder
from inspect_lora.rules import read_rules

PROBES = 12  # of the adapter's replies: their tokens are kept for `served`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    model.add_arguments(parser)
    add, some, many = parser.add_argument, common.at_least(0), common.at_least(1)
    of_lines = parser.add_mutually_exclusive_group().add_argument
    of_lines("--eval_file", help="held-out conversations; default: those of the training")
    of_lines("--prompts", metavar="FILE", help="prompts without replies")
    add("--rules", metavar="FILE", help="rules that replies must pass")
    add("--general_file", default=str(data.GENERAL_FILE), help='other tasks; "" for none')
    add("--kind", default="kind", help="the key that groups lines in the table; default: kind")
    add("--parts", type=some, default=50, help="held-out replies to measure parts on; default: 50")
    add("--tasks", type=some, default=50, help="other tasks to measure on; default: 50")
    add("--replies", type=some, help="held-out conversations to answer; default: all on a GPU")
    add("--max_new_tokens", type=many, default=200, help="where a reply is cut; default: 200")
    add("--max_seq_len", type=many, help="leave longer lines out; default: as in the training")
    add("--output_dir", help="where the report goes; default: inspected/NAME beside the adapter")


def run(options: argparse.Namespace) -> None:
    """Measure; write and print the report."""
    saved = read_adapter(find_adapter(options.adapter))
    found = record.Record(
        options.adapter,
        common.hash_of(
            (common.file_sha256(saved.place / "adapter_model.safetensors"), saved.config)
        ),
        saved.config,
        common.read_json(saved.place / "run.json"),
    )
    found.folder = Path(options.output_dir or report_folder(options.adapter, saved.place))
    work = read_lines(options, saved.place, found)
    work.adapter = model.open_adapter(options, saved)
    render_lines(work)
    render_prompts(work)
    found.on, found.max_new_tokens = what_it_is_measured_on(work), options.max_new_tokens
    found.folder.parent.mkdir(parents=True, exist_ok=True)  # tells early if it cannot be written
    common.say("report", f"goes into {common.from_here(found.folder)}")
    measure_all(work)
    report.write(found)


# ---- What is measured, and on what


@dataclass
class Work:
    """What is measured on what, and the record that gets the results."""

    options: argparse.Namespace
    found: record.Record
    kinds: data.Kinds
    examples: list[script.Example]  # held-out replies; none with --prompts
    lengths: dict[str, int]  # of each line's conversation, in messages
    prompts: list[data.Prompt]  # of --prompts, or those of the held-out lines
    tasks: list[data.Prompt]
    adapter: model.Adapter = field(init=False)


def read_lines(options: argparse.Namespace, place: Path, found: record.Record) -> Work:
    """Read all files; leave out what the adapter learned, and count it in the record."""
    kinds = data.Kinds(options.kind, read_rules(options.rules) if options.rules else [])
    tasks = []
    if options.general_file:
        tasks = data.read_prompts(options.general_file, "tasks", data.Kinds("topic", []))
    examples, prompts = [], []
    if options.prompts:
        prompts = data.read_prompts(options.prompts, "prompts", kinds)
    else:
        options.eval_file = options.eval_file or data.file_held_out(place, found.run)
        replies = found.run.get("settings", {}).get("REPLIES", "all")
        examples = data.read_held_out(options.eval_file, replies, options.enable_thinking, kinds)
        for one in examples:
            one.messages = data.with_system(one.messages, options.system or "")
    lengths = {one.source: len(one.messages) for one in examples}  # the last of a line stays
    count = len(examples) + len(prompts)
    learned = data.read_learned(place)
    if learned:
        examples = [one for one in examples if script.key_of(one.messages[:-1]) not in learned]
        prompts = [one for one in prompts if script.key_of(one.messages) not in learned]
        found.learned = count - len(examples) - len(prompts)
    return Work(options, found, kinds, examples, lengths, prompts, tasks)


def render_lines(work: Work) -> None:
    """Give the held-out replies their tokens; leave out what is too long."""
    options, found = work.options, work.found
    problems: list[str] = []
    examples = script.encode(work.examples, work.adapter.job, problems)
    data.refuse(problems)
    if options.max_seq_len is None:
        options.max_seq_len = found.run.get("settings", {}).get("MAX_SEQ_LEN")
    limit = options.max_seq_len or math.inf
    work.examples = [one for one in examples if len(one.input_ids) <= limit]
    found.too_long = len(examples) - len(work.examples)
    if not (work.examples or work.prompts):
        raise common.InspectError(
            f"{options.eval_file or options.prompts}: no line is left. The adapter learned "
            f"{found.learned or 0}, and {found.too_long} are longer than --max_seq_len {limit}."
        )


def render_prompts(work: Work) -> None:
    """Choose the system message; refuse prompts, and leave out tasks, that cannot be rendered."""
    options, found = work.options, work.found
    found.system = found.run.get("system_message") or ""
    if options.system is not None:
        found.system = options.system
    elif "system_message" not in found.run and work.examples:
        found.system = script.system_message_of(work.examples) or ""
    for one in work.prompts:
        one.messages = data.with_system(one.messages, found.system)
    work.prompts = work.prompts or data.prompts_of(work.examples, work.lengths, work.kinds)
    problems = [(one.where, why_refused(work.adapter, one.messages)) for one in work.prompts]
    data.refuse([f"{where}: {problem}" for where, problem in problems if problem])
    tasks = []
    for one in work.tasks:
        with_system = data.with_system(one.messages, found.system)
        if not any(why_refused(work.adapter, each) for each in (one.messages, with_system)):
            tasks.append(one)
    found.refused = len(work.tasks) - len(tasks)
    work.tasks = [tasks[number] for number in data.draw(tasks, options.tasks)]


def why_refused(adapter: model.Adapter, messages: list[dict[str, str]]) -> str:
    """Return why a prompt cannot be rendered, or ""; some templates take no system message."""
    try:
        adapter.prompt_ids(messages)
    except ValueError as error:
        return str(error)
    return ""


def what_it_is_measured_on(work: Work) -> dict[str, Any]:
    """Return what the numbers depend on besides the adapter."""
    job, settings, options = work.adapter.job, work.adapter.job.settings, work.options
    names = ("eval_file", "prompts", "rules", "general_file")
    paths = {name: path for name in names if (path := getattr(options, name))}
    return {
        "base": settings.MODEL_NAME,
        "commit": job.commit,
        "tokenizer": job.tokenizer.name_or_path,
        "enable_thinking": job.enable_thinking,
        "dtype": settings.DTYPE,
        "device": settings.DEVICE,
        "matmul": job.matmul,
        "max_seq_len": options.max_seq_len,
        "measured": time.strftime("%Y-%m-%d %H:%M:%S"),
        **{
            name: {"file": common.from_here(path), "sha256": common.file_sha256(Path(path))}
            for name, path in paths.items()
        },
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }


# ---- The measurements, in their order


def measure_all(work: Work) -> None:
    """Make each measurement, and write the record after it."""
    found = work.found
    for name, step in STEPS.items():
        began = time.monotonic()
        step(work)
        if not found.seconds and (found.folder / record.FILE).exists():
            common.rename_old(found.folder)  # not before something was measured
        found.folder.mkdir(exist_ok=True)
        found.seconds[name] = round(time.monotonic() - began, 1)
        found.finished = len(found.seconds) == len(STEPS)
        record.save(found)


def losses(work: Work) -> None:
    """Measure the losses of all held-out replies."""
    if work.examples:
        kinds = [work.kinds.of(one.row) for one in work.examples]
        work.found.lines = measure.measure_lines(work.adapter, work.examples, kinds)
        report.print_gain(work.found)


def updates(work: Work) -> None:
    """Measure the size of the updates."""
    if work.adapter.is_plain:
        work.found.updates = measure.measure_updates(work.adapter)


def parts(work: Work) -> None:
    """Measure what parts of the adapter keep of the gain, on some of the held-out replies."""
    chosen = data.draw(work.examples, work.options.parts)
    if chosen and work.adapter.is_plain:
        examples = [work.examples[number] for number in chosen]
        work.found.parts = measure.measure_parts(work.adapter, examples)
        work.found.measured_on = chosen
        report.print_parts(work.found)


def elsewhere(work: Work) -> None:
    """Measure how far the adapter moves the model on other tasks."""
    found, tasks = work.found, work.tasks
    if tasks:
        shifts = measure.measure_shifts(work.adapter, tasks, "")
        if found.system:
            shifts += measure.measure_shifts(work.adapter, tasks, found.system)
        found.tasks, found.shifts = [one.where for one in tasks], shifts
        report.print_shifts(found)


def replies(work: Work) -> None:
    """Have both models reply, and keep the tokens of some of the adapter's replies."""
    adapter, options, prompts = work.adapter, work.options, work.prompts
    is_on_gpu = adapter.job.settings.DEVICE == "cuda"
    if options.replies is not None or not (is_on_gpu or options.prompts):
        prompts = data.choose(prompts, options.replies)
    exchanges, own = measure.ask_both(adapter, [*prompts, *work.tasks], options.max_new_tokens)
    probed = [own[number] for number in data.draw(prompts, PROBES)]  # none of the tasks
    work.found.exchanges, work.found.probes = exchanges, measure.measure_probes(adapter, probed)
    report.print_replies(work.found)


STEPS: dict[str, Callable[[Work], None]] = {
    "losses": losses,
    "updates": updates,
    "parts": parts,
    "elsewhere": elsewhere,
    "replies": replies,
}
