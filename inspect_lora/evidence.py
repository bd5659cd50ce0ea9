"""Measure an adapter on held-out conversations, and show what it and its parts are worth.

It writes report.md (the verdict, the tables, and samples side by side), lora.png, replies.html (all
replies, to be searched, and to be read blind in a browser) and evidence.json
into one folder: OUTPUT_DIR/inspected/NAME for an adapter of train_lora_single.py, which brings its
held-out file and its system message, else inspected/PARENT--NAME in the working folder. An earlier
report of the adapter stays until the new one is whole, and is renamed then.

What is concluded is about this adapter and these conversations. What another run would reach may
not be concluded: train it, and compare. Nor does a lower loss say that the replies are good: read
them in the report.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from inspect_lora import adapters, conversations
from inspect_lora.adapters import open_adapter, refuse_system_message, system_message_of
from inspect_lora.checks import rows_of_checks
from inspect_lora.common import InspectError, at_least, counted, file_sha256, path_from_here, report
from inspect_lora.conclusions import (
    about_change,
    about_cut_checks,
    about_endings,
    about_strength,
    conclusions,
    what_is_not_measured,
)
from inspect_lora.conversations import (
    GENERAL_FILE,
    Task,
    encode_held_out,
    read_held_out,
    read_tasks,
    task_of_example,
    tasks_that_render,
)
from inspect_lora.elsewhere import measure_elsewhere
from inspect_lora.files import find_adapter, find_run
from inspect_lora.findings import Findings
from inspect_lora.page import report_page
from inspect_lora.parts import measure_parts, measure_updates
from inspect_lora.replies import CHECKED_TOKENS, ask_both, choose_samples
from inspect_lora.report import gain_sentence, print_checks, print_conclusions, print_parts
from inspect_lora.report_folder import (
    PAGE,
    folder_for_report,
    keep_unfinished,
    prepare_folder,
    write_report,
)
from inspect_lora.scores import Losses, evenly_spread, losses_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    adapters.add_arguments(parser)
    adapters.add_system_argument(parser)
    conversations.add_arguments(parser)
    parser.add_argument(
        "--general_file",
        default=str(GENERAL_FILE),
        help='other tasks, to see what else changed; default: the package\'s own; "" for none',
    )
    parser.add_argument(
        "--group", default="kind", help='the key that groups held-out lines; default: "kind"'
    )
    parser.add_argument(
        "--examples",
        type=at_least(0),
        default=50,
        help="held-out replies and other tasks that measure the parts and what else changed; "
        "default: 50; 0 leaves these out",
    )
    parser.add_argument(
        "--checks",
        type=at_least(0),
        help="so many lines of each check's name that both models reply to; default: all; 0 leaves "
        "the checks out",
    )
    parser.add_argument(
        "--samples", type=at_least(0), default=6, help="prompts in the report, and one of each kind"
    )
    parser.add_argument(
        "--max_new_tokens", type=at_least(1), default=200, help="a sample is cut after so many"
    )
    parser.add_argument("--output_dir", help="where the report goes, if not as said above")


def run(options: argparse.Namespace) -> None:
    """Measure, print what carries a conclusion, and write the report."""
    place = find_adapter(options.adapter)
    trained_by = find_run(place)
    folder = folder_for_report(options, place, trained_by)
    held_out = read_held_out(options, trained_by)
    tasks = read_tasks(options.general_file)  # what is wrong is said before the model is loaded
    adapter = open_adapter(options, place, trained_by)
    examples = encode_held_out(held_out, adapter, options)
    system_message = system_message_of(options, trained_by)
    is_guessed = options.system is None and not trained_by
    if is_guessed:
        shared = {example.system_message for example in examples}
        system_message = shared.pop() if len(shared) == 1 else ""
    refuse_system_message(system_message, adapter.chat_format)
    tasks = tasks_that_render(tasks, adapter.chat_format)
    prepare_folder(folder)
    found = Findings(
        options.adapter, adapter, held_out, options.group, system_message, is_guessed, examples
    )
    if options.general_file:
        path = Path(options.general_file)
        found.general_file = {"file": str(path), "sha256": file_sha256(path)}
    is_written = False
    try:
        measure(found, tasks, options)
        write_report(found, folder)
        is_written = True
    finally:  # also what was found before Ctrl-C
        if found.losses and not is_written:
            found.is_finished = False
            keep_unfinished(found, folder)
    report("report", path_from_here(folder / "report.md"))
    if (folder / PAGE).is_file():
        report_page(folder / PAGE)


def measure(found: Findings, tasks: list[Task], options: argparse.Namespace) -> None:
    """Measure everything, and print each finding as soon as it is there."""
    model, chat_format = found.adapter.model, found.adapter.chat_format
    # A 4-bit weight is packed otherwise from the first pass on, so the updates come before it.
    found.updates = measure_updates(model)
    with timed(found, "losses"):
        trained = losses_of(model, found.examples, "adapter")
        with model.disable_adapter():
            base = losses_of(model, found.examples, "base")
    for name, losses in (("the base model", base), ("the adapter", trained)):
        refuse_nan(name, losses, found)
    found.losses = Losses(
        trained,
        base,
        tokens=[len(example.reply_ids) for example in found.examples],
        lines=[example.where for example in found.examples],
    )
    report("gain", gain_sentence(found))
    if options.examples:
        measure_parts_and_change(found, tasks, options.examples)
    checked = lines_with_checks(found.held_out.checked, tasks)
    if options.checks is not None:
        checked = some_of_each_name(checked, options.checks)
    if checked:
        lines = counted(len(checked), "line")
        several = "(a line may have several checks)"
        report("checks", f"{lines}, two replies to each {several}; --checks 0 leaves them out")
        with timed(found, "checks"):
            found.checked = ask_both(model, chat_format, checked, CHECKED_TOKENS, "checks")
        found.checks = rows_of_checks([one.as_recorded(found.group) for one in found.checked])
        print_checks(found)
        if sentence := about_cut_checks(found.checked, CHECKED_TOKENS):
            found.conclusions.insert(0, sentence)
    chosen = choose_samples(found.examples, options.group, options.samples)
    if chosen:
        with timed(found, "samples"):
            prompts = list(map(task_of_example, chosen))
            most = options.max_new_tokens
            found.samples = ask_both(model, chat_format, prompts, most, "samples")
        if sentence := about_endings(found.samples, options.max_new_tokens):
            found.conclusions.insert(0, sentence)
    print_conclusions(found)
    found.is_finished = True


def lines_with_checks(held_out: list[Task], tasks: list[Task]) -> list[Task]:
    """Return all lines with checks; a task's check of a held-out check's name is "tasks NAME"."""
    taken = {name for line in held_out for name in line.checks}
    found = list(held_out)
    for task in tasks:
        names = {name: f"tasks {name}" if name in taken else name for name in task.checks}
        if names:
            checks = {names[name]: check for name, check in task.checks.items()}
            rules = {names[name]: task.rules[name] for name in names}
            found.append(replace(task, checks=checks, rules=rules))
    return found


def some_of_each_name(checked: list[Task], wanted: int) -> list[Task]:
    """Return so many lines of each check's name, evenly spread, in the order of the lines."""
    names = dict.fromkeys(name for line in checked for name in line.checks)
    chosen: set[int] = set()
    for name in names:
        asked = [number for number, line in enumerate(checked) if name in line.checks]
        chosen |= {asked[place] for place in evenly_spread(len(asked), wanted)}
    return [checked[number] for number in sorted(chosen)]


def refuse_nan(name: str, losses: list[float], found: Findings) -> None:
    """Refuse losses that are no numbers, since every row would be wrong in silence."""
    bad = sum(not math.isfinite(loss) for loss in losses)
    if bad:
        raise InspectError(
            f"{name} has no loss that is a number on {bad} of {len(losses)} replies, in "
            f"{found.adapter.dtype} on {found.adapter.model.device.type}. Try --dtype float32; if "
            "it stays so, the training diverged or the base is not the one that was trained on."
        )


def measure_parts_and_change(found: Findings, tasks: list[Task], wanted: int) -> None:
    """Measure the parts on some of the replies, and how far the model is moved on other tasks."""
    model, chat_format = found.adapter.model, found.adapter.chat_format
    found.measured = evenly_spread(len(found.examples), wanted)
    losses = found.losses.only(found.measured)
    with timed(found, "parts"):
        chosen = [found.examples[number] for number in found.measured]
        found.parts = measure_parts(model, chosen, losses)
    found.conclusions = conclusions(found.parts, losses) + what_is_not_measured(model)
    if found.shares_are_meant():
        print_parts(found)
    if not tasks:
        return
    with timed(found, "other tasks"):
        some = [tasks[number] for number in evenly_spread(len(tasks), wanted)]
        found.elsewhere = measure_elsewhere(model, chat_format, some, found.system_message)
    found.conclusions.append(about_change(found.elsewhere))
    if found.shares_are_meant():
        shifts = found.elsewhere.without_system
        if sentence := about_strength(found.parts, shifts, found.name):
            found.conclusions.append(sentence)


@contextmanager
def timed(found: Findings, what: str) -> Iterator[None]:
    """Note how long a measurement took."""
    began = time.monotonic()
    yield
    found.seconds[what] = time.monotonic() - began
