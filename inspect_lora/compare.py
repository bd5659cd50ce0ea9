"""Rank the adapters that `evidence` has measured, from the best to the worst held-out loss.

Every evidence.json in the folders and below them is read; reports that were renamed since a newer
one took their place are passed over. Compared are those on the same held-out replies as the newest
one, and on the same base model, which is known by its own loss on each reply: an adapter's file
does not tell in which type its base was loaded. Reports on prompts have no loss, so there the file
of the prompts, the base, its type and the versions must be the same. A check stands in the table
only if its rules and lines are those of the newest report. What is left out is said, with the
reason.

Of two reports, such as before and after an edit of a constant, replies.html shows what both said to
the same prompts, side by side or to be read blind.

+ is better, so what stands against the best is mostly below 0. "=" says that the difference is
not clear: its 95 % interval holds 0, or there are fewer than twenty held-out lines. Of several
adapters the intervals of all pairs hold 95 % together, since the best was picked among them.
What another SEED would change is not in it: train a close winner with two seeds.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from pathlib import Path
from typing import Any

from inspect_lora.common import (
    InspectError,
    join_limited,
    one_line,
    path_from_here,
    place_in_file,
    pluralize,
    rename_old,
    report,
    report_sentence,
    shorten_path,
    this_program,
)
from inspect_lora.evidence_file import Evidence, read_evidence, records_below
from inspect_lora.page import page_of_two, report_page
from inspect_lora.scores import FEWEST_LINES, ratio_with_error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folders."""
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="where reports are, at any depth, such as output or inspected",
    )
    parser.add_argument(
        "--output_dir", default="compared", help="where replies.html goes; default: compared"
    )


def run(options: argparse.Namespace) -> None:
    """Print the table, and what is left out."""
    left_out: list[str] = []
    found = read_reports(options.folders, left_out)
    of_prompts = [one for one in found if not one.losses]
    if of_prompts and len(of_prompts) == len(found):
        compare_on_prompts(found, left_out)
        write_replies(found, Path(options.output_dir))
        return
    if of_prompts:
        found = [one for one in found if one.losses]
        left_out.append(
            f"{in_words([one.folder for one in of_prompts])}: measured on prompts without replies "
            "(--prompts), so they have no held-out loss to be ranked by"
        )
    if found:
        newest = max(found, key=lambda one: one.measured)
        found = on_the_same_lines(found, newest, left_out)
        found = on_the_same_base(found, newest, left_out)
        forget_other_tasks(found, left_out)
        forget_other_checks(found, left_out)
    if not found:
        where = ", ".join(options.folders)
        reasons = "\n".join(["", *left_out]) if left_out else ""
        raise InspectError(
            f"There is nothing to compare in {where}: `{this_program()} evidence ADAPTER` "
            f"writes the evidence.json that is read here.{reasons}"
        )
    ranked = sorted(found, key=lambda one: one.mean("adapter"))
    report("compared", "\n".join(table_of(ranked)))
    for sentence in left_out:
        report_sentence("left out", sentence)
    if unknown := [one.folder for one in ranked if one.held_out.learned == "not known"]:
        report_sentence(
            "note",
            f"{in_words(unknown)}: it is not known whether the adapter learned some of these "
            "replies in its training. If it did, its loss on them looks better than it is.",
        )
    write_replies(found, Path(options.output_dir))


# ---- What is read


def read_reports(folders: list[str], left_out: list[str]) -> list[Evidence]:
    """Return the whole reports in the folders, and add a sentence on those that are not whole."""
    paths: dict[Path, None] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise InspectError(f"There is no folder {folder}.")
        paths |= dict.fromkeys(one.resolve() for one in records_below(Path(folder)))
    found, damaged, unfinished = [], [], []
    for path in paths:
        one = read_evidence(path)
        if one is None:
            damaged.append(path)
        elif one.finished:
            found.append(one)
        else:
            unfinished.append(path)
    if damaged:
        left_out.append(
            f"{in_words(damaged)}: damaged, edited, or of another version of this program"
        )
    if unfinished:
        left_out.append(
            f"{in_words(unfinished)}: the command was stopped, or an error ended it, before all "
            "was measured; give it again"
        )
    return found


def compare_on_prompts(found: list[Evidence], left_out: list[str]) -> None:
    """Print what two or more reports on prompts alone have: checks, and change elsewhere."""
    newest = max(found, key=lambda one: one.measured)
    found = on_the_same_prompts(found, newest, left_out)
    forget_other_tasks(found, left_out)
    forget_other_checks(found, left_out)
    lines = ["on prompts without replies there is no loss, so nothing is ranked"]
    columns = "{:<16}{}".format
    lines.append(columns("KL, other tasks", "report, and what its adapter passes"))
    for one in sorted(found, key=lambda one: str(one.folder)):
        passes = [
            f"{name} {row.get('after')}/{row.get('lines')}" for name, row in one.checks.items()
        ]
        words = textwrap.wrap(", ".join(passes), 74, break_on_hyphens=False)
        lines.append(columns(change_elsewhere(one), shorten_path(one.folder, 74)))
        lines += [columns("", line) for line in words]
    report("compared", "\n".join(lines))
    for sentence in left_out:
        report_sentence("left out", sentence)


def on_the_same_prompts(
    found: list[Evidence], newest: Evidence, left_out: list[str]
) -> list[Evidence]:
    """Return those on the newest one's prompts and base, and add a sentence on the others."""
    same = []
    others: dict[str, list[Path]] = {}
    for one in found:
        if reason := why_not_beside(one, newest):
            others.setdefault(reason, []).append(one.folder)
        else:
            same.append(one)
    left_out += [f"{in_words(folders)}: {reason}" for reason, folders in others.items()]
    return same


def why_not_beside(one: Evidence, newest: Evidence) -> str:
    """Return why a report on prompts cannot stand beside the newest one, or "" if it can."""
    if one.prompts.sha256 != newest.prompts.sha256:
        if one.prompts.file == newest.prompts.file:
            return f"measured on another content of {one.prompts.file} than the newest report"
        return (
            f"measured on other prompts ({one.prompts.file}) than the newest report "
            f"({newest.prompts.file})"
        )
    if one.enable_thinking != newest.enable_thinking:
        with_it, without = ("with", "without") if one.enable_thinking else ("without", "with")
        return f"measured {with_it} --enable_thinking, and the newest report {without} it"
    here, there = one.base_side.computed_with, newest.base_side.computed_with
    if not here or not there:  # the names are all that is known
        here, there = named_base(one), named_base(newest)
    differing = [name for name in there if here.get(name) != there[name] and here.get(name)]
    if not differing:
        return ""
    # Two hashes say nothing to a reader.
    values = {"base": (one.base, newest.base), "script": ("", "")}
    said = []
    for name in differing:
        was, now = values.get(name, (here[name], there[name]))
        values_in_words = f" ({one_line(was, 40)}, and not {one_line(now, 40)})"
        said.append(NAMES.get(name, name) + (values_in_words if was != now else ""))
    return f"measured with another {', '.join(said)} than the newest report"


# What computed_with calls otherwise than a reader would.
NAMES = {
    "base": "base model or date of its files",
    "script": "version of train_lora_single.py",
    "stop_token_ids": "set of tokens that end a reply",
}


def named_base(one: Evidence) -> dict[str, str]:
    """Return the names of a report's base and of its type."""
    return {"base": f"{one.base}@{one.base_revision}", "dtype": one.dtype}


def on_the_same_lines(
    found: list[Evidence], newest: Evidence, left_out: list[str]
) -> list[Evidence]:
    """Return those on the newest one's held-out replies, and add a sentence on the others."""
    same = [one for one in found if one.has_the_replies_of(newest.held_out, newest.lengths())]
    others = [one for one in found if one not in same]
    if others:
        files = ", ".join(sorted({one.held_out.file for one in others}))
        which = f"({files}) than the newest report ({newest.held_out.file})"
        if files == newest.held_out.file:
            which = (
                f"than the newest report, though both are of {files}: its content, --max_seq_len "
                "or the tokenizer was another"
            )
        left_out.append(
            f"{in_words([one.folder for one in others])}: measured on other held-out replies "
            f"{which}"
        )
    return same


SAME_BASE = 1e-3  # base losses of a reply, in nats a token, may differ by so much


def on_the_same_base(
    found: list[Evidence], newest: Evidence, left_out: list[str]
) -> list[Evidence]:
    """Return those with the newest one's losses of the base, and add a sentence on the others."""

    def largest_difference(one: Evidence) -> float:
        pairs = zip(one.losses, newest.losses, strict=True)
        return max(abs(here.base - there.base) for here, there in pairs)

    same = [one for one in found if largest_difference(one) <= SAME_BASE]
    others = [one for one in found if one not in same]
    if others:
        left_out.append(
            f"{in_words([one.folder for one in others])}: the base model there "
            f"({', '.join(sorted({one.base for one in others}))}) has other losses than that of "
            f"the newest report ({newest.base}), by up to "
            f"{max(map(largest_difference, others)):.4f} on a reply; measure all with the same "
            "--base, --dtype and --device"
        )
    return same


def forget_other_tasks(found: list[Evidence], left_out: list[str]) -> None:
    """Forget what was measured on other tasks than those of the newest report that has some."""
    measured = [one for one in found if one.elsewhere or one.checks]
    newest = max(measured, key=lambda one: one.measured, default=None)
    others = [one for one in measured if one.tasks_sha256() != newest.tasks_sha256()]
    for one in others:
        one.elsewhere = None
        asked = [reply.base.checks for reply in one.replies if reply.source != "tasks"]
        one.checks = {n: row for n, row in one.checks.items() if any(n in names for names in asked)}
    if others:
        left_out.append(
            f"KL and the tasks' checks of {in_words([one.folder for one in others])}"
            ": measured on another --general_file than that of the newest report"
        )
    moved = [one for one in found if one.elsewhere]
    newest = max(moved, key=lambda one: one.measured, default=None)
    others = [one for one in moved if one.tasks_measured_on() != newest.tasks_measured_on()]
    for one in others:
        one.elsewhere = None
    if others:
        left_out.append(
            f"KL of {in_words([one.folder for one in others])}: measured on other tasks of that "
            "file than the newest report (--examples, or another version of this program)"
        )


def forget_other_checks(found: list[Evidence], left_out: list[str]) -> None:
    """Forget the checks whose rules or lines are not those of the newest report that has them."""
    forgotten: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for one in found for name in one.checks):
        having = [one for one in found if name in one.checks]
        newest = max(having, key=lambda one: one.measured)
        others = [one for one in having if not is_same_check(name, one, newest)]
        for one in others:
            del one.checks[name]
        if others:
            reports = in_words([one.folder for one in others])
            forgotten.setdefault(reports, []).append(f'"{name}"')
    for reports, names in forgotten.items():
        checks = "the check" if len(names) == 1 else "the checks"
        left_out.append(
            f"{checks} {join_limited(names, 6, ', ')} of {reports}: asked by other rules, or on "
            "other lines, than in the newest report that has it"
        )


def is_same_check(name: str, one: Evidence, other: Evidence) -> bool:
    """Return whether a check was asked by the same rules on the same lines, as far as is known.

    Schema 1 has neither rules nor prompts.
    """
    if one.checks[name].get("lines") != other.checks[name].get("lines"):
        return False
    here, there = lines_of_check(name, one), lines_of_check(name, other)
    if not here or not there:
        return True
    if here.keys() != there.keys():
        return False
    pairs = [(here[place], there[place]) for place in here]
    return all(a == b for ones, twos in pairs for a, b in zip(ones, twos, strict=True) if a and b)


def lines_of_check(name: str, one: Evidence) -> dict[tuple[str, str], tuple[Any, ...]]:
    """Return the prompt, the rule and the length of a reply at each line that has a check."""
    return {
        (reply.source, place_in_file(reply.where)): (
            reply.messages,
            reply.rules.get(name),
            reply.max_new_tokens,
        )
        for reply in one.replies
        if name in reply.base.checks
    }


def in_words(paths: list[Path]) -> str:
    """Return some reports in words."""
    named = join_limited([path_from_here(path) for path in paths], 3, ", ")
    return f"{pluralize(len(paths), 'report')} ({named})"


# ---- replies.html


def write_replies(found: list[Evidence], folder: Path) -> None:
    """Write the page of two adapters' replies to the same prompts, in the order they were named."""
    if len(found) != 2:
        if len(found) > 2:
            report_sentence(
                "replies", "name two of the folders alone to read their replies, also blind"
            )
        return
    names = [shorten_path(one.adapter, 60) for one in found]
    if names[0] == names[1]:
        names = [shorten_path(one.folder, 60) for one in found]
    differing = [name for name in what_differs(found) if name not in ("adapter", "minutes")]
    details = [
        ", ".join(f"{name} {facts[name]}" for name in differing if name in facts)
        for facts in map(known_of, found)
    ]
    replies = [[reply.model_dump() for reply in one.replies] for one in found]
    page = page_of_two(names, details, *replies)
    if not page:
        report_sentence(
            "replies", "there is no prompt to which a reply of both is recorded, so no page of them"
        )
        return
    path = folder / "replies.html"
    new = path.with_name(f"{path.name}.new")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new.write_text(page, encoding="utf-8")
        if not path.is_file() or path.read_bytes() != new.read_bytes():
            rename_old(path)
        new.replace(path)
    except OSError as error:
        raise InspectError(
            f"{path} cannot be written ({one_line(error)}); choose another folder with "
            "--output_dir."
        ) from error
    report_page(path)


# ---- The table


def table_of(ranked: list[Evidence]) -> list[str]:
    """Return the lines of the table, the best first, and last the base model."""
    best = ranked[0]
    columns = "{:<10}{:<20}{:<16}{}".format
    head = ["held-out", "against the best", "KL, other tasks", "report, and what differs"]
    lines = [columns(*head)]
    differing = what_differs(ranked)
    against = against_best(ranked)
    for one, compared in zip(ranked, ["best", *against], strict=True):
        loss = f"{one.mean('adapter'):.4f}"
        lines.append(columns(loss, compared, change_elsewhere(one), shorten_path(one.folder, 44)))
        facts = known_of(one)
        words = [f"{name} {one_line(facts[name], 30)}" for name in differing if name in facts]
        for name, row in one.checks.items():
            words.append(f"{name} {row.get('after')}/{row.get('lines')}")
        wrapped = textwrap.wrap(", ".join(words), 44, break_on_hyphens=False)
        lines += [columns("", "", "", line) for line in wrapped]
    loss = f"{best.mean('base'):.4f}"
    against.append(difference(best, best, "base", len(ranked)))
    lines.append(columns(loss, against[-1], "", f"base model {best.base}"))
    if any(one.endswith("=") for one in against):
        lines.append("=: the difference is not shown; another SEED may change more than that")
    return lines


def against_best(ranked: list[Evidence]) -> list[str]:
    """Return what stands against the best of all others, as if every pair were compared.

    That is what choosing the best of them comes to: of 40 equal adapters the best and the worst
    are three errors apart in every second table.
    """
    pairs = math.comb(len(ranked), 2)
    return [difference(one, ranked[0], "adapter", pairs) for one in ranked[1:]]


def difference(one: Evidence, best: Evidence, whose: str, comparisons: int) -> str:
    """Return by how much one is better than the best adapter (mostly below 0), with its error."""
    pairs = list(zip(one.losses, best.losses, strict=True))
    changes = [
        (there.adapter - (here.base if whose == "base" else here.adapter)) * here.tokens
        for here, there in pairs
    ]
    tokens = [float(here.tokens) for here, _ in pairs]
    lines = [here.line or here.where for here, _ in pairs]
    found = ratio_with_error(changes, tokens, lines)
    is_clear = len(set(lines)) >= FEWEST_LINES and found.is_clear(comparisons)
    return f"{found}" + ("" if is_clear else " =")


def change_elsewhere(one: Evidence) -> str:
    """Return how far an adapter moves the model on other tasks, with its error, if it is known."""
    try:
        kl = one.elsewhere["no system message"]["x 1"]["kl"]
        value, error = kl["value"], kl.get("error")
    except (KeyError, TypeError):  # it was not measured, or the record was edited
        return "-"
    if not isinstance(value, float):
        return "-"
    return f"{value:.3f} ± {error:.3f}" if isinstance(error, float) else f"{value:.3f}"


# What cannot change a result, or is told of the adapter itself.
NOT_COMPARED = {"inference_mode", "auto_mapping", "peft_version", "base_model_name_or_path"}
NOT_COMPARED |= {"revision", "MODEL_NAME", "MODEL_REVISION", "DEVICE", "EVAL_FILE", "OUTPUT_DIR"}
NOT_COMPARED |= {"LOGGING_STEPS", "SAVE_STEPS", "REPORT_TO", "FINAL_LORA", "PUBLISH"}
NOT_COMPARED |= {"LORA_R", "LORA_ALPHA", "LORA_DROPOUT", "LORA_TARGET_MODULES"}


def known_of(one: Evidence) -> dict[str, str]:
    """Return what is known of an adapter's training: its LoraConfig, and its run's settings."""
    run = one.run or {}
    settings = run.get("settings")
    facts = one.adapter_config | (settings if isinstance(settings, dict) else {})
    known = {"adapter": shorten_path(one.adapter, 34)}
    for name, value in facts.items():
        if name not in NOT_COMPARED:
            # PEFT writes sets, such as the targets, in any order.
            known[name] = str(sorted(value, key=str) if isinstance(value, list) else value)
    if isinstance(run.get("train_seconds"), (int, float)):
        known["minutes"] = f"{run['train_seconds'] / 60:.1f}"
    return known


def what_differs(found: list[Evidence]) -> list[str]:
    """Return the names of what differs among those of which it is known."""
    known = [known_of(one) for one in found]
    names = dict.fromkeys(name for facts in known for name in facts)
    return [name for name in names if len({one[name] for one in known if name in one}) > 1]
