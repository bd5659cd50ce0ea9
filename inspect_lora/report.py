"""What is said of an adapter: the lines on the terminal, and report.md."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from inspect_lora.checks import CheckRow, p_in_words, shortened, when_clear, with_interval
from inspect_lora.common import (
    file_sha256,
    join_limited,
    one_line,
    pluralize,
    report,
    report_sentence,
    shorten_path,
)
from inspect_lora.conclusions import best_strength, cut_that_is_enough, of_kind
from inspect_lora.conversations import GENERAL_FILE, Task, group_of
from inspect_lora.elsewhere import REPLY_TOKENS
from inspect_lora.findings import Findings, headline
from inspect_lora.modules import scaling_in_words
from inspect_lora.parts import Part
from inspect_lora.replies import Reply
from inspect_lora.scores import FEWEST_LINES, differences

# ---- On the terminal


def print_parts(found: Findings) -> None:
    """Print the rows of the parts that a conclusion is drawn from."""
    report("parts", what_shares_are_of(found))
    columns = "{:<27}{:>16}{:>21}{:>16}".format
    rows = [columns("", "of the gain", "against as trained", "lower loss on")]
    for part in telling_parts(found.parts):
        is_strength = part.kind == "strength"
        title = f"best other strength: x {part.value:g}" if is_strength else part.title
        better_on = f"{part.better_on} of {len(part.losses)}"
        rows.append(columns(title, part.of_gain.percent(), str(part.against_trained), better_on))
    if len(rows) > 1:
        report("", "\n".join(rows))


def what_shares_are_of(found: Findings) -> str:
    """Return the gain that parts have shares of: that on the replies that measure them."""
    gain = found.losses.only(found.measured).gain()
    replies = pluralize(len(found.examples), "held-out reply")
    return f"on {len(found.measured)} of {replies}; shares are of the gain on these, {gain}"


def telling_parts(parts: list[Part]) -> list[Part]:
    """Return the best strength, the groups, and the cut that is spoken of, in the table's order."""
    telling = of_kind(parts, "group")[:6]
    if best := best_strength(parts):
        telling.append(best)
    if cuts := of_kind(parts, "cut"):
        telling.append(cut_that_is_enough(cuts) or cuts[0])
    return [part for part in parts if part in telling]


def print_checks(found: Findings) -> None:
    """Print a row for each name of a check, and what each asks for."""
    rows = [["", "lines", "base", "adapter", "lost", "won", "clear?"]]
    for row in found.checks:
        rates = [with_interval(passed, row.lines) for passed in (row.before, row.after)]
        answer = f"{'yes' if row.is_clear else 'not shown'} ({p_in_words(row.p)})"
        answer = answer if row.can_be_clear else "too few lines"
        counts = (str(len(row.lost)), str(len(row.won)))
        rows.append([row.title, row.counted(), *rates, *counts, answer])
    report("", join_limited(in_columns(rows), 7))
    blind = [row.title for row in found.checks if row.can_be_clear and not row.can_lose]
    if blind:
        text = f"no loss could show, too few of the base's pass: {join_limited(blind, 4, ', ')}"
        report("", one_line(text, 90))
    rules = [one_line(f"{row.title}: {row.rule}", 90) for row in found.checks]
    report("", join_limited(rules, 6))


def in_columns(rows: list[list[str]], width: int = 90) -> list[str]:
    """Return rows of cells as lines; the names, which come first, get the room that is left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = max(3, min(17, width - sum(widths[1:]) - len(widths)))
    return [
        f"{one_line(name, room):<{room}}"
        + "".join(f" {cell:>{size}}" for cell, size in zip(cells, widths[1:-1], strict=True))
        + f"  {last}"
        for name, *cells, last in rows
    ]


def print_conclusions(found: Findings) -> None:
    """Print what may be concluded, but for the checks, whose rows say it."""
    for number, sentence in enumerate(found.conclusions):
        report_sentence("" if number else "means", sentence)


def gain_sentence(found: Findings) -> str:
    """Return what the adapter gained, in a sentence of three lines."""
    gain = found.losses.gain()
    base, adapter = found.mean(found.losses.base), found.mean(found.losses.trained)
    replies, lines = len(found.examples), len(set(found.losses.lines))
    of_lines = f" of {pluralize(lines, 'line')}" if lines < replies else ""  # what ± counts
    return (
        f"{gain} nats a token (95 % interval {gain.interval()}): the loss of\n"
        f"{pluralize(replies, 'held-out reply')}{of_lines} is {base:.4f} without the adapter and "
        f"{adapter:.4f} with it\n(perplexity {perplexity(base)} and {perplexity(adapter)}), and "
        f"lower with it on {found.lower_on()} of them"
    )


def perplexity(loss: float) -> str:
    """Return e to the power of a loss in nats a token: among how many tokens it is as if chosen."""
    value = math.exp(min(loss, 700.0))  # more is no number any longer
    return f"{value:,.1f}" if value < 1e6 else f"{value:.1e}"


# ---- report.md


def as_markdown(found: Findings, pictures: set[str]) -> str:
    """Return report.md: the verdict first, then what it rests on."""
    sections = [
        markdown_verdict(found),
        "![The adapter at a glance](overview.png)" if "overview.png" in pictures else "",
        "![What was measured](lora.png)" if "lora.png" in pictures else "",
        markdown_parts(found) if found.parts else "",
        markdown_updates(found) if found.updates else "",
        markdown_elsewhere(found) if found.elsewhere else "",
        markdown_checks(found) if found.checks else "",
        markdown_kinds(found) if found.losses else "",
        markdown_samples(found) if found.samples else "",
        markdown_facts(found),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def markdown_verdict(found: Findings) -> str:
    """Return the heading, the gain and the conclusions."""
    title = f"# {escaped(shorten_path(found.name, 60))}: {headline(found)}"
    gain = (
        gain_sentence(found)
        if found.losses
        else "Prompts without replies have no loss: nothing is said of a gain"
    )
    lines = [title, "", f"**{gain}.**".replace("\n", " "), ""]
    sentences = [row.sentence() for row in found.checks if row.is_clear] + found.conclusions
    if found.held_out and not found.are_unseen:
        sentences.append(f"learned lines: {found.held_out.learned_in_words()}.")
    lines += [f"- {escaped(sentence)}" for sentence in sentences]
    how_sure = OF_LOSSES if found.losses else OF_TASKS if found.elsewhere else ""
    if found.checks and not found.losses:
        how_sure += OF_CHECKS
    if found.losses or found.elsewhere or found.checks:
        how_sure += CHANCE
    return "\n".join([*lines, *([""] if sentences else []), how_sure]).rstrip()


# How sure the numbers are.
OF_LOSSES = (
    "In the tables, ± is one standard error of that row alone, over the held-out lines or over the "
    "other tasks, and wherever two losses are compared, above 0 is better. A gain is called clear "
    "if its 95 % interval leaves out 0. A part must also differ by over 2 % of the gain, and by at "
    "least three errors if it is one of several strengths or groups. A check needs a p below its "
    "limit. Single targets and kinds of line are not judged. "
)
OF_TASKS = "± is one standard error over the other tasks. "
OF_CHECKS = "A check is clear if its p is below the limit that is given. "
CHANCE = (
    "All of this is about the choice of these lines; another seed of the training may change more "
    "than that."
)


SHOWN = 5e-5  # a smaller difference of losses is 0.0000


def markdown_parts(found: Findings) -> str:
    """Return the table of the parts."""
    are_meant = found.shares_are_meant()
    rows = []
    for part in found.parts:
        of_gain = part.of_gain.percent() if are_meant and part.kind != "base" else ""
        better_on = f"{part.better_on} of {len(part.losses)}"
        compared = [of_gain, part.against_trained, better_on]
        if part.kind == "whole":
            compared = [""] * 3
        elif part.kind == "merged" and abs(part.against_trained.value) < SHOWN:
            compared[1:] = ["", ""]  # which reply is lower then is noise
        rows.append([part.title, f"{part.loss:.4f}", *compared])
    config = found.adapter.model.peft_config["default"]
    gain = found.losses.only(found.measured).gain()
    shares = f", and shares are of the gain on them, {gain}" if are_meant else ""
    is_drawn = len(found.measured) < len(found.examples)
    return (
        "## What each part is worth\n\n"
        f"Measured on {len(found.measured)} of {pluralize(len(found.examples), 'held-out reply')}"
        f"{', drawn by a fixed seed' if is_drawn else ''}. All losses, in nats a token, are on "
        f"these replies{shares}. The last two "
        "columns compare a row with the adapter as trained: above 0 is better. "
        f"Each update is {scaling_in_words(config.use_rslora)} x B A. It is scaled, "
        "switched off in parts, or cut to its strongest directions; nothing is retrained. "
        "Parts overlap, so their shares need not add up to 100 %."
        "\n\n" + table(["", "loss", "of the gain", "against as trained", "lower loss on"], rows)
    )


def markdown_updates(found: Findings) -> str:
    """Return the table of the sizes of the updates, which is measured of the adapter alone."""
    rows = []
    for target, modules in found.updates.items():
        sizes = [module["update"] for module in modules]
        directions = fmean(module["directions"] for module in modules)
        mean, largest = f"{100 * fmean(sizes):.2f} %", f"{100 * max(sizes):.2f} %"
        rows.append([target, len(modules), mean, largest, f"{directions:.1f}"])
    head = ["target", "modules", "update, mean", "largest", "directions that hold 90 % of it"]
    return (
        "## How large the updates are\n\n"
        "The size of each update is compared with that of the weight W that it is added to "
        "(Frobenius norms); directions count by their squares, and their number is a mean over "
        f"the modules.\n\n{table(head, rows)}"
    )


def markdown_elsewhere(found: Findings) -> str:
    """Return the table of how far the model is moved on other tasks."""
    elsewhere = found.elsewhere
    shifts = {
        "as trained" if strength == 1 else f"update x {strength:g}": shift
        for strength, shift in elsewhere.without_system.items()
    }
    of_last = ""
    if elsewhere.with_system:
        of_last = (
            " The last row is on other replies, which the base sampled with the training's system "
            "message; it is not paired with the others."
        )
        shifts["as trained, with the training's system message"] = elsewhere.with_system
    rows = [
        [name, shift.kl_a_token().without_sign(), shift.other_tokens().percent()]
        for name, shift in shifts.items()
    ]
    return (
        "## What else was changed\n\n"
        f"The base model replied to {pluralize(len(elsewhere.tasks), 'other task')}"
        f"{some_topics(found)} (one sampled reply each, {REPLY_TOKENS} tokens at most), without "
        "the training's system message. The table says how far the adapter's probabilities on "
        f"these replies are from the base's, and how often its top-1 token differs.{of_last}\n\n"
        + table(["", "KL, nats a token", "top-1 token differs"], rows)
    )


def some_topics(found: Findings) -> str:
    """Return of which topics most of the package's tasks were; nothing of a file of the user's."""
    if found.general_file["sha256"] != file_sha256(GENERAL_FILE):
        return ""
    topics = Counter(task.row["topic"] for task in found.elsewhere.tasks)
    words = [one.replace("_and_", " or ").replace("_", " ") for one, _ in topics.most_common(3)]
    *others, last = words
    return f", such as {', '.join(others)} and {last}" if others else f", such as {last}"


def markdown_checks(found: Findings) -> str:
    """Return the table of the checks, and the lines whose replies no longer pass."""
    rows, lost = [], []
    limits = sorted({one.max_new_tokens for one in found.answered() if one.task.checks})
    for row in found.checks:
        rates = [with_interval(passed, row.lines) for passed in (row.before, row.after)]
        counts = [row.counted(), *rates, len(row.lost), len(row.won)]
        rows.append([row.title, shortened(row.rule), *counts, row.judgement()])
        if row.lost:
            lines = join_limited([Path(where).name for where in row.lost], 10, ", ")
            lost.append(f"- {escaped(f'{row.title}, lost: {lines}.')}")
    head = ["check", "what passes", "lines", "base passes", "adapter passes"]
    head += ["lost", "won", "it shows"]
    parts = [
        "## What the replies hold",
        "Base and adapter replied to lines that say what a reply must hold, by greedy decoding, "
        f"with at most {' or '.join(map(str, limits))} tokens. In brackets is the "
        "95 % interval of the share (Wilson). p is the probability of a split at least this uneven "
        "if lines were as likely lost as won (McNemar's exact test). A row is "
        f"clear if p is below {when_clear(found.checks)}.",
        how_they_were_drawn(found.checks),
        table(head, rows),
        "\n".join(lost),
    ]
    return "\n\n".join(part for part in parts if part)


def how_they_were_drawn(rows: list[CheckRow]) -> str:
    """Return that the lines of some names were drawn, or "" if all were asked."""
    wanted = max((row.lines for row in rows if row.is_drawn), default=0)
    if not wanted:
        return ""
    were = "was" if wanted == 1 else "were"
    return (
        f"Where more lines have a check of one name, {wanted} of them {were} drawn by a fixed seed "
        "(--checks), and a line is judged only by the checks that it was drawn for."
    )


MOST_KINDS = 40


def markdown_kinds(found: Findings) -> str:
    """Return the loss by the kind of held-out line, or "" if there is only one."""
    losses, groups = found.losses, found.groups()
    rows = []
    for kind in sorted(set(groups), key=lambda kind: (-groups.count(kind), kind)):
        own = losses.only([number for number, group in enumerate(groups) if group == kind])
        gains, gain = differences(own.base, own.trained), own.gain()
        base = sum(own.base) / sum(own.tokens)
        lower = f"{sum(one > 0 for one in gains)} of {len(gains)}"
        means = [f"{base:.4f}", f"{base - gain.value:.4f}"]
        has_few = len(set(own.lines)) < FEWEST_LINES
        shown = f"{gain.value:+.4f}" if has_few else str(gain)
        rows.append([kind or "(none)", len(gains), *means, shown, lower])
    if len(rows) == 1:
        return ""
    head = [found.group, "replies", "base", "adapter", "gain", "adapter lower on"]
    more = pluralize(len(rows) - MOST_KINDS, "more kind")
    cut = f" Left out: {more}." if len(rows) > MOST_KINDS else ""
    return (
        "## The loss by kind of line, in nats a token\n\n"
        f"Kinds are not compared with each other. Below {FEWEST_LINES} lines no error is given."
        f"{cut}\n\n{table(head, rows[:MOST_KINDS])}"
    )


def markdown_samples(found: Findings) -> str:
    """Return prompts with the replies of both side by side."""
    prompt = "held-out prompt" if found.held_out else "prompt"
    parts = [
        "## How it replies",
        f"{pluralize(len(found.samples), prompt)}, greedy decoding, at most "
        f"{found.samples[0].max_new_tokens} tokens. "
        f"{habits('The base', [sample.base for sample in found.samples])} "
        f"{habits('The adapter', [sample.adapter for sample in found.samples])}",
    ]
    head = ["base", "adapter", "reference"]
    for sample in found.samples:
        task = sample.task
        heading = f"{Path(task.where).name} {group_of(task, found.group)}"
        said = [
            f"> **{message['role']}**: {escaped(message['content'])}".replace("\n", "  \n> ")
            for message in task.messages
        ]
        replies = [
            without_loops(one.text) if one.ended else f"{without_loops(one.text)} [cut here]"
            for one in (sample.base, sample.adapter)
        ]
        parts += [
            f"### {escaped(heading)}".rstrip(),
            "\n>\n".join(said),
            table(head if found.held_out else head[:2], [[*replies, *reference_of(task)]]),
        ]
    return "\n\n".join(parts)


def reference_of(task: Task) -> list[str]:
    """Return the reply that the file has, if there is one, as a list."""
    return [] if task.reference is None else [task.reference]


def without_loops(text: str) -> str:
    """Return a reply in which what is said five times in a row or more often is said once.

    What is said begins and ends at a space, so that no word and no character is cut; Chinese and
    Japanese have no spaces, so their stops count as well. It holds a letter: rules stay.
    """

    def once(match: re.Match[str]) -> str:
        unit, said = match["unit"] or match["stopped"], match[0]
        if not any(letter.isalpha() for letter in unit):
            return said
        return f"{unit} [{said.count(unit)} times in a row]"

    return re.sub(IN_A_ROW, once, text, flags=re.DOTALL)


STOPS = "\u3001\u3002\uff01\uff0c\uff1f"
IN_A_ROW = (
    rf"(?:(?<!\S)|(?<=[{STOPS}]))"
    r"(?:(?P<unit>\S.{1,98}?)(?P<space>\s+)(?:(?P=unit)(?P=space)){3,}(?P=unit)(?!\S)"
    rf"|(?P<stopped>\S.{{1,98}}?[{STOPS}])(?P=stopped){{4,}})"
)


def habits(who: str, replies: list[Reply]) -> str:
    """Return how many replies ended on their own, and how long they are."""
    words = fmean(len(reply.text.split()) for reply in replies)
    ended = sum(reply.ended for reply in replies)
    return f"{who} ended {ended} of its replies by itself, with {words:.0f} words on average."


def markdown_facts(found: Findings) -> str:
    """Return what was measured on what."""
    adapter, config = found.adapter, found.adapter.model.peft_config["default"]
    spent = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in found.seconds.items())
    is_folder = Path(adapter.base).is_dir()
    base = adapter.base if is_folder else f"{adapter.base} ({adapter.revision})"
    if found.base_note:
        base += f", {found.base_note};"
    system = "system message"
    if found.system_is_guessed and found.system_message:
        system += " (guessed: the one that all lines share)"
    file, known = "prompts", found.prompts_file
    if found.held_out:
        file, known = "held-out file", found.held_out.as_known().model_dump()
    facts = {
        "adapter": f"{found.name}, r = {config.r}, alpha = {config.lora_alpha}",
        "base": f"{base}{'' if found.base_note else ','} in {adapter.dtype}",
        file: f"{known['file']}, SHA-256 {known['sha256']}",
        "learned lines": found.held_out.learned_in_words() if found.held_out else "",
        system: found.system_message or why_no_system_message(found),
        "chat template": found.template,
        "losses of the base": found.losses_of_base if found.losses else "",
        "measured": f"{time.strftime('%Y-%m-%d %H:%M')}: {spent}",
    }
    said = [*facts.items(), *found.notes]
    lines = [f"- {name}: {escaped(text)}" for name, text in said if text]
    return "\n".join(["## What was measured", "", *lines])


def why_no_system_message(found: Findings) -> str:
    """Return that no system message of the training is known, and why not."""
    if not found.system_is_guessed:
        return "(none)"
    lines = "held-out lines" if found.held_out else "prompts"
    if len(found.systems) < 2:
        why = f"the {lines} have none"
    elif "" in found.systems:
        why = f"some {lines} have one, and others have none"
    else:
        why = f"the {lines} have different ones"
    return f"none: {why}; --system gives one"


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Return a table in Markdown; a cell may have several lines."""
    lines = [[escaped(str(cell)).replace("\n", "<br>") for cell in row] for row in [head, *rows]]
    lines.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Return a text so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>|~$])", r"\\\1", text)
