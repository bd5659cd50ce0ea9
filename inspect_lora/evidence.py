"""Measure an adapter on held-out conversations, and show what it and its parts are worth.

It writes report.md (the verdict, the tables, and samples side by side), overview.png, lora.png,
replies.html (all replies, to be searched, and to be read blind in a browser) and evidence.json into
one folder: OUTPUT_DIR/inspected/NAME for an adapter of train_lora_single.py, which brings its
held-out file and its system message, else inspected/PARENT--NAME in the working folder. With
--prompts, "--prompts" is added to the name. An earlier report of the adapter stays until the new
one is whole, and is renamed then.

What is concluded is about this adapter and these conversations. What another run would reach may
not be concluded: train it, and compare. Nor does a lower loss say that the replies are good: read
them in the report.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from inspect_lora import adapters, conversations
from inspect_lora.adapters import (
    how_base_was_given,
    open_adapter,
    refuse_system_message,
    system_message_of,
    whose_template,
)
from inspect_lora.base_side import BaseSide, hash_of_tokens
from inspect_lora.checks import CheckRow, fewest_to_lose, rows_of_checks
from inspect_lora.common import (
    InspectError,
    Note,
    at_least,
    file_sha256,
    hash_of,
    join_limited,
    one_line,
    path_from_here,
    pluralize,
    report,
    report_note,
    report_sentence,
)
from inspect_lora.conclusions import (
    about_change,
    about_endings,
    about_strength,
    about_updates,
    conclusions,
    what_is_not_measured,
)
from inspect_lora.conversations import (
    GENERAL_FILE,
    Task,
    encode_held_out,
    read_held_out,
    read_prompts,
    read_tasks,
    refuse_bad_prompts,
    task_of_example,
    tasks_that_render,
)
from inspect_lora.elsewhere import measure_elsewhere
from inspect_lora.files import find_adapter, find_run, why_run_is_unknown
from inspect_lora.findings import Findings
from inspect_lora.held_out import key_of, lines_that_count
from inspect_lora.page import report_page
from inspect_lora.parts import measure_parts, measure_updates
from inspect_lora.replies import CHECKED_TOKENS, Answered, ask_both, choose_samples
from inspect_lora.report import gain_sentence, print_checks, print_conclusions, print_parts
from inspect_lora.report_folder import (
    PAGE,
    folder_for_report,
    keep_unfinished,
    prepare_folder,
    write_report,
)
from inspect_lora.scores import FEWEST_LINES, Estimate, Losses, draw_numbers, losses_of


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
        help="held-out replies and other tasks that measure the parts and what else changed, "
        "drawn by a fixed seed; default: 50; 0 leaves these out",
    )
    parser.add_argument(
        "--checks",
        type=at_least(0),
        help="so many lines of each check's name that both models reply to, drawn by a fixed seed; "
        "default: all; 0 leaves the checks out",
    )
    parser.add_argument(
        "--samples",
        type=at_least(0),
        default=6,
        help="so many prompts in report.md, with one of each kind; default: 6",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=at_least(1),
        default=200,
        help="a sample's replies are cut after so many tokens, and with --prompts every reply is "
        "(those to the other tasks after 80); default: 200",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='prompts without replies, instead of held-out conversations: {"prompt": [messages] '
        'or "text"}, one a line, with "checks" or without; there is no loss then',
    )
    parser.add_argument(
        "--fail_if",
        action="append",
        choices=("worse", "lost"),
        default=[],
        help="end with status 3 if the adapter is clearly worse than its base, or if clearly fewer "
        "replies pass a check; may be given twice",
    )
    parser.add_argument("--output_dir", help="where the report goes, if not as said above")


def run(options: argparse.Namespace) -> None:
    """Measure, print what carries a conclusion, and write the report."""
    place = find_adapter(options.adapter)
    trained_by = find_run(place)
    folder = folder_for_report(options, place, trained_by)
    refuse_what_cannot_fail(options)
    prompts, held_out = [], None
    notes: list[Note] = []
    if options.prompts:
        prompts = read_prompts(options.prompts, "prompts", notes)
    else:
        held_out = read_held_out(options, trained_by, why_run_is_unknown(place))
    tasks = read_tasks(options.general_file, notes)  # before the model is loaded
    adapter = open_adapter(options, place, trained_by)
    examples = encode_held_out(held_out, adapter, options) if held_out else []
    system_message = system_message_of(options, trained_by)
    is_guessed = options.system is None and not trained_by
    if held_out and not trained_by:
        report_sentence("note", f"learned lines: {held_out.learned_in_words()}.")
    systems = {one.system_message for one in (examples or prompts)}
    if is_guessed:
        system_message = min(systems) if len(systems) == 1 else ""
    refuse_system_message(system_message, adapter.chat_format)
    base_note = how_base_was_given(options, place)
    if base_note:
        report_sentence("base", f"{adapter.base}, {base_note}.")
    report_system_of_prompts(prompts, system_message)
    prompts = [one.with_system_message(system_message) for one in prompts]
    refuse_bad_prompts(prompts, adapter.chat_format)
    tasks = tasks_that_render(tasks, adapter.chat_format, notes)
    prepare_folder(folder)
    found = Findings(
        options.adapter, adapter, held_out, options.group, system_message, is_guessed, examples
    )
    found.base_note, found.systems = base_note, systems
    found.template = whose_template(adapter)
    found.notes = [*(held_out.notes if held_out else []), *notes]
    found.prompts_file = known_file(options.prompts)
    found.general_file = known_file(options.general_file)
    try:
        measure(found, prompts, tasks, BaseSide(adapter, folder), options)
        if not options.output_dir:  # another adapter's report may have come there meanwhile
            folder = folder_for_report(options, place, trained_by)
            prepare_folder(folder)
        write_report(found, folder)
    finally:  # also what was found before Ctrl-C
        if (found.losses or found.prompted) and not found.is_written:
            found.is_finished = False
            keep_unfinished(found, folder)
    report("report", path_from_here(folder / "report.md"))
    if (folder / PAGE).is_file():
        report_page(folder / PAGE, len(prompts))
    end_with_3_if_asked(found, options)


def report_system_of_prompts(prompts: list[Task], system_message: str) -> None:
    """Say which system message those prompts get that have none of their own."""
    without = sum(not one.system_message for one in prompts)
    if without:
        gets = f'this one: "{one_line(system_message)}"' if system_message else "none"
        hint = "" if system_message else "; --system gives one"
        of_all = f"{without} of {pluralize(len(prompts), 'prompt')}"
        report_sentence(
            "system", f"without a system message of their own {of_all} get {gets}{hint}"
        )


def known_file(path: str | None) -> dict[str, str] | None:
    """Return what evidence.json says of a file that was given, if one was."""
    return {"file": str(Path(path)), "sha256": file_sha256(Path(path))} if path else None


def refuse_what_cannot_fail(options: argparse.Namespace) -> None:
    """Refuse flags that cannot be given together."""
    if options.prompts and options.eval_file:
        raise InspectError(
            "Give --eval_file or --prompts, and not both: held-out conversations have replies, "
            "whose loss is measured, and prompts have none."
        )
    if options.prompts and "worse" in options.fail_if:
        raise InspectError(
            "--fail_if worse needs held-out replies (--eval_file): prompts alone have no loss."
        )
    if options.checks == 0 and "lost" in options.fail_if:
        raise InspectError("--fail_if lost needs checks, and --checks 0 leaves them out.")


def end_with_3_if_asked(found: Findings, options: argparse.Namespace) -> None:
    """End with status 3 if what --fail_if names was found: for a machine that waits for it."""
    reasons = []
    if "worse" in options.fail_if:
        lines = len(set(found.losses.lines))
        if lines < FEWEST_LINES:
            raise InspectError(
                f"--fail_if worse: {pluralize(lines, 'held-out line')} cannot tell; "
                f"{FEWEST_LINES} are needed."
            )
        gain = found.losses.gain()
        reasons += ["the adapter is worse than its base"] if is_worse(gain) else []
    if "lost" in options.fail_if:
        if not found.checks:
            raise InspectError("--fail_if lost: no line has checks, so nothing can be lost.")
        report_blind_checks(found.checks)
        reasons += [row.sentence() for row in found.checks if is_lost(row)]
    for reason in reasons:
        report_sentence("failed", reason)
    if reasons:
        raise SystemExit(3)


def report_blind_checks(rows: list[CheckRow]) -> None:
    """Name the rows in which no loss could show; raise InspectError if these are all of them."""
    blind = [row for row in rows if not row.can_lose]
    if not blind:
        return
    if len(blind) == len(rows):
        most, fewest = max(row.before for row in rows), fewest_to_lose(rows[0].needed)
        raise InspectError(
            f"--fail_if lost: no loss could show. The base passes {most} lines of a check at most, "
            f"and {fewest} must be lost for a row to be clear. Ask more lines that the base "
            "passes."
        )
    names = ", ".join(row.title for row in blind)
    said = f"cannot fail: {names}: too few of the base's replies pass for a loss to show"
    report_sentence("fail_if", said)


def is_worse(gain: Estimate) -> bool:
    """Return whether an adapter is worse than its base by a clear difference."""
    return gain.value < 0 and gain.is_clear()


def is_lost(row: CheckRow) -> bool:
    """Return whether clearly fewer replies pass now."""
    return row.is_clear and len(row.lost) > len(row.won)


def measure(
    found: Findings,
    prompts: list[Task],
    tasks: list[Task],
    before: BaseSide,
    options: argparse.Namespace,
) -> None:
    """Measure everything, and print each finding as soon as it is there."""
    model = found.adapter.model
    # A 4-bit weight is packed otherwise from the first pass on, so the updates come before it.
    found.updates = measure_updates(model)
    found.base_computed_with = before.computed_with
    found.conclusions += about_updates(found.updates)
    if found.held_out:
        measure_losses(found, before)
        if options.examples:
            measure_parts_of(found, options.examples)
    if options.examples and tasks:
        measure_change(found, tasks, options.examples)
    conclude(found, len(tasks))
    if prompts:
        ask_prompts(found, prompts, before, options)
    lines = list(found.held_out.checked) if found.held_out else []
    lines += [one for one in prompts if one.checks]
    ask_checked_lines(found, lines_with_checks(lines, tasks), before, options)
    if found.held_out:
        take_samples(found, before, options)
    asked = found.prompted or found.samples
    found.conclusions = about_endings(asked, found.judged) + found.conclusions
    print_conclusions(found)
    found.is_finished = True


def measure_losses(found: Findings, before: BaseSide) -> None:
    """Measure the loss of each held-out reply, with the adapter and without it."""
    model = found.adapter.model
    found.tokens_hash = hash_of_tokens(found.examples)
    with timed(found, "losses"):
        trained = losses_of(model, found.examples, "adapter")
        base = before.losses(found.examples)
        if base is None:
            with model.disable_adapter():
                base = losses_of(model, found.examples, "base")
    found.losses_of_base = before.losses_from
    for name, losses in (("the base model", base), ("the adapter", trained)):
        refuse_nan(name, losses, found)
    found.losses = Losses(
        trained,
        base,
        tokens=[len(example.reply_ids) for example in found.examples],
        lines=lines_that_count(found.examples),
    )
    report("gain", gain_sentence(found))


def ask_prompts(
    found: Findings, prompts: list[Task], before: BaseSide, options: argparse.Namespace
) -> None:
    """Have base and adapter reply to prompts of which no reply is known; some go into report.md."""
    model, chat_format = found.adapter.model, found.adapter.chat_format
    most = options.max_new_tokens
    with timed(found, "prompts"):
        found.prompted = ask_both(model, chat_format, prompts, most, "prompts", before)
    report("prompts", f"two replies to each of {pluralize(len(prompts), 'prompt')}")
    shown = choose_samples([one.task for one in found.prompted], options.group, options.samples)
    found.samples = [one for one in found.prompted if one.task in shown]


def ask_checked_lines(
    found: Findings, checked: list[Task], before: BaseSide, options: argparse.Namespace
) -> None:
    """Have base and adapter reply to lines with checks, and count the replies that pass.

    Prompts without held-out replies have been replied to.
    """
    model, chat_format = found.adapter.model, found.adapter.chat_format
    if options.checks != 0:
        checked = each_prompt_once(checked, found.notes)
    lines_in_all = Counter(name for one in checked for name in one.checks)
    if options.checks is not None:
        checked = some_of_each_name(checked, options.checks)
    found.prompted = judged_as_drawn(found.prompted, checked)
    if not checked:
        return
    lines = pluralize(len(checked), "line")
    several = "(a line may have several checks)"
    report("checks", f"{lines}, two replies to each {several}; --checks 0 leaves them out")
    asked = [one for one in checked if one.source != "prompts"]
    with timed(found, "checks"):
        found.checked = ask_both(model, chat_format, asked, CHECKED_TOKENS, "checks", before)
    of_prompts = [one for one in found.prompted if one.task.checks]
    found.judged = [*of_prompts, *found.checked]
    recorded = [one.as_recorded(found.group) for one in found.judged]
    found.checks = rows_of_checks(recorded, lines_in_all)
    print_checks(found)


def take_samples(found: Findings, before: BaseSide, options: argparse.Namespace) -> None:
    """Have base and adapter reply to some held-out prompts, which go into report.md."""
    chosen = choose_samples(found.examples, options.group, options.samples)
    if not chosen:
        return
    model, chat_format = found.adapter.model, found.adapter.chat_format
    prompts, most = list(map(task_of_example, chosen)), options.max_new_tokens
    with timed(found, "samples"):
        found.samples = ask_both(model, chat_format, prompts, most, "samples", before)


def lines_with_checks(held_out: list[Task], tasks: list[Task]) -> list[Task]:
    """Return all lines with checks; a task's check of a held-out check's name is "tasks NAME"."""
    taken = {name for line in held_out for name in line.checks}
    found = [line for line in held_out if line.checks]  # of --prompts, some have none
    names: dict[str, str] = {}
    for name in dict.fromkeys(name for task in tasks for name in task.checks):
        names[name] = name
        while names[name] in taken:  # that one may be called "tasks NAME" itself
            names[name] = f"tasks {names[name]}"
        taken.add(names[name])
    for task in tasks:
        if task.checks:
            checks = {names[name]: check for name, check in task.checks.items()}
            rules = {names[name]: task.rules[name] for name in task.checks}
            found.append(replace(task, checks=checks, rules=rules))
    return found


def each_prompt_once(checked: list[Task], notes: list[Note]) -> list[Task]:
    """Return lines without those checks that a line with the same prompt has before them.

    A file may have several replies to one prompt. What base and adapter say to it is the same each
    time, so it would be counted as so many lines.
    """
    asked: dict[str, str] = {}
    kept, again = [], []
    for line in checked:
        prompt = line.source, key_of(line.messages)
        keys = {name: hash_of((prompt, name, rule)) for name, rule in line.rules.items()}
        names = {name for name, key in keys.items() if key not in asked}
        for name in names:
            asked[keys[name]] = line.where
        if names:
            kept.append(with_checks(line, names))
        if others := [asked[key] for name, key in keys.items() if name not in names]:
            again.append(f"{line.where} has the prompt of {others[0]}")
    if again:
        report_note(
            notes,
            "left out",
            f"checks of {pluralize(len(again), 'line')}, since one prompt counts once: "
            f"{join_limited(again, 3, ', ')}.",
        )
    return kept


def some_of_each_name(checked: list[Task], wanted: int) -> list[Task]:
    """Return lines with so many checks of each name, in the order of the lines.

    A line keeps only the checks that it was drawn for: those of a name that more lines have would
    be counted too often otherwise, and mostly on lines of one kind.
    """
    names = dict.fromkeys(name for line in checked for name in line.checks)
    kept: dict[int, set[str]] = {}
    for name in names:
        asked = [number for number, line in enumerate(checked) if name in line.checks]
        for place in draw_numbers(len(asked), wanted):
            kept.setdefault(asked[place], set()).add(name)
    return [with_checks(checked[number], kept[number]) for number in sorted(kept)]


def with_checks(line: Task, names: set[str]) -> Task:
    """Return a line with the checks of these names alone."""
    checks = {name: check for name, check in line.checks.items() if name in names}
    return replace(line, checks=checks, rules={name: line.rules[name] for name in checks})


def judged_as_drawn(prompted: list[Answered], drawn_lines: list[Task]) -> list[Answered]:
    """Return what was replied to prompts, with the checks that each was drawn for."""
    names = {one.where: set(one.checks) for one in drawn_lines if one.source == "prompts"}
    return [
        replace(one, task=with_checks(one.task, names.get(one.task.where, set())))
        for one in prompted
    ]


def refuse_nan(name: str, losses: list[float], found: Findings) -> None:
    """Refuse losses that are no numbers, since every row would be wrong in silence."""
    bad = sum(not math.isfinite(loss) for loss in losses)
    if bad:
        raise InspectError(
            f"{name} has no loss that is a number on {bad} of {len(losses)} replies, in "
            f"{found.adapter.dtype} on {found.adapter.model.device.type}. Try --dtype float32; if "
            "it stays so, the training diverged or the base is not the one that was trained on."
        )


def measure_parts_of(found: Findings, wanted: int) -> None:
    """Measure the parts on some of the replies."""
    model = found.adapter.model
    found.measured = draw_numbers(len(found.examples), wanted)
    losses = found.losses.only(found.measured)
    with timed(found, "parts"):
        chosen = [found.examples[number] for number in found.measured]
        found.parts = measure_parts(model, chosen, losses, found.adapter.file_dtype)
    if found.shares_are_meant():
        print_parts(found)


def measure_change(found: Findings, tasks: list[Task], wanted: int) -> None:
    """Measure how far the model is moved on some of the other tasks."""
    model, chat_format = found.adapter.model, found.adapter.chat_format
    with timed(found, "other tasks"):
        some = [tasks[number] for number in draw_numbers(len(tasks), wanted)]
        found.elsewhere = measure_elsewhere(model, chat_format, some, found.system_message)


def conclude(found: Findings, tasks: int) -> None:
    """Note what the parts and the change elsewhere support; what is said of a strength needs both.

    It is not said of a report that was stopped before.

    Args:
        found: what was measured.
        tasks: how many other tasks there are, of which some were measured.
    """
    shifts = found.elsewhere.without_system if found.elsewhere else {}
    if found.parts:
        losses = found.losses.only(found.measured)
        gain, lines = found.losses.gain(), len(set(found.losses.lines))
        found.conclusions += conclusions(found.parts, losses, gain, lines, shifts)
        found.conclusions += what_is_not_measured(found.adapter.model)
    if not found.elsewhere:
        return
    found.conclusions.append(about_change(found.elsewhere, tasks))
    if found.shares_are_meant() and (said := about_strength(found.parts, shifts, found.name)):
        found.conclusions.append(said)


@contextmanager
def timed(found: Findings, what: str) -> Iterator[None]:
    """Note how long a measurement took."""
    began = time.monotonic()
    yield
    found.seconds[what] = time.monotonic() - began
