"""What is said of an adapter: the lines on the terminal, report.md, and evidence.json."""

from __future__ import annotations

import math
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inspect_lora.adapters import Adapter, scaling_in_words
from inspect_lora.common import (
    counted,
    file_sha256,
    join_limited,
    one_line,
    read_json,
    report,
    report_sentence,
    shorten_path,
)
from inspect_lora.conversations import HeldOut
from inspect_lora.elsewhere import Elsewhere, Shift
from inspect_lora.parts import Part, cut_that_is_enough, of_kind
from inspect_lora.replies import CheckRow, Sample, group_of, habits_of
from inspect_lora.scores import Losses, ratio_with_error
from inspect_lora.trainer import Example


@dataclass
class Findings:
    """What was measured of an adapter; what is not measured yet, or cannot be, is empty."""

    name: str  # the adapter, as it was named on the command line
    adapter: Adapter
    held_out: HeldOut
    group: str  # the key that groups held-out lines
    system_message: str  # of the training, or ""
    examples: list[Example]
    losses: Losses | None = None  # of all examples
    measured: list[int] = field(default_factory=list)  # the examples that the parts are measured on
    parts: list[Part] = field(default_factory=list)
    updates: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    elsewhere: Elsewhere | None = None
    checks: list[CheckRow] = field(default_factory=list)
    checked_replies: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    conclusions: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # what each measurement took
    is_finished: bool = False

    @property
    def history(self) -> list[dict[str, float]]:
        """What the trainer logged, if the adapter comes from a run that is known."""
        return self.adapter.run.record.get("loss_history", []) if self.adapter.run else []

    def mean(self, losses: list[float]) -> float:
        """Return the mean of all examples' losses over their tokens."""
        return sum(losses) / sum(self.losses.tokens)

    def lower_on(self) -> int:
        """Return on how many examples the adapter's loss is lower than the base's."""
        return sum(a < b for a, b in zip(self.losses.trained, self.losses.base, strict=True))


def logged(history: list[dict[str, float]], key: str) -> dict[int, float]:
    """Return {step: value} of "loss" or "eval_loss"; the eval loss at step 0 is the base's."""
    return {int(entry["step"]): entry[key] for entry in history if key in entry}


# ---- On the terminal


def print_gain(found: Findings) -> None:
    """Print what the adapter gained."""
    report("gain", verdict(found))


def print_parts(found: Findings) -> None:
    """Print the rows of the parts that a conclusion is drawn from."""
    columns = "{:<27}{:>16}{:>21}{:>12}".format
    rows = [columns("", "of the gain", "against as trained", "lower on")]
    for part in telling_parts(found.parts):
        better_on = f"{part.better_on} of {len(part.losses)}"
        rows.append(
            columns(part.title, part.of_gain.percent(), str(part.against_trained), better_on)
        )
    if len(rows) > 1:
        report("parts", "\n".join(rows))


def telling_parts(parts: list[Part]) -> list[Part]:
    """Return the best strength, the groups, and the cut that is spoken of, in the table's order."""
    telling = of_kind(parts, "group")[:6]
    strengths = of_kind(parts, "strength")
    if strengths:
        telling.append(min(strengths, key=lambda part: part.loss))
    if cuts := of_kind(parts, "cut"):
        telling.append(cut_that_is_enough(cuts) or cuts[0])
    return [part for part in parts if part in telling]


def print_checks(found: Findings) -> None:
    """Print a row for each name of a check."""
    if found.checks:
        columns = "{:<27}{:>16}{:>9}{:>9}{:>8}{:>8}{:>8}".format
        rows = [columns("", "lines", "base", "adapter", "lost", "won", "p")]
        for row in found.checks:
            name, counts = one_line(row.name, 26), (len(row.lost), len(row.won))
            rows.append(columns(name, row.lines, row.before, row.after, *counts, f"{row.p:.3f}"))
        report("checks", join_limited(rows, 7))


def print_conclusions(found: Findings) -> None:
    """Print what may be concluded."""
    for sentence in found.conclusions:
        report_sentence("", sentence)


def verdict(found: Findings) -> str:
    """Return what the adapter gained, in a sentence of two lines."""
    gain = found.losses.gain()
    base, adapter = found.mean(found.losses.base), found.mean(found.losses.trained)
    return (
        f"{gain.value:+.4f} ± {gain.error:.4f} nats a token: the loss of {len(found.examples)} "
        f"held-out replies is {base:.4f}\nwithout the adapter and {adapter:.4f} with it, and lower "
        f"with it on {found.lower_on()} of them"
    )


# ---- report.md


def short_line(where: str) -> str:
    """Return which line of which file it is, without the folder."""
    return Path(where).name


def as_markdown(found: Findings) -> str:
    """Return report.md: the verdict first, then what it rests on."""
    sections = [
        markdown_verdict(found),
        "![What was measured](lora.png)",
        markdown_parts(found),
        markdown_elsewhere(found),
        markdown_checks(found),
        markdown_kinds(found),
        markdown_samples(found),
        markdown_facts(found),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def markdown_verdict(found: Findings) -> str:
    """Return the heading, the gain and the conclusions."""
    gain = found.losses.gain()
    short = f"{abs(gain.value):.3f} nats a token {'better' if gain.value > 0 else 'worse'}"
    if not gain.is_clear():
        short = "neither better nor worse, by a clear difference,"
    title = f"# {escaped(shorten_path(found.name, 60))}: {short} than its base"
    lines = [title, "", f"**{verdict(found)}.**".replace("\n", " "), ""]
    lines += [f"- {escaped(sentence)}" for sentence in found.conclusions]
    return "\n".join(lines)


def markdown_parts(found: Findings) -> str:
    """Return the table of the parts."""
    if not found.parts:
        return ""
    has_gain = found.losses.only(found.measured).gain().value > 0
    rows = [
        [
            part.title,
            f"{part.loss:.4f}",
            part.of_gain.percent() if has_gain and part.kind not in ("whole", "base") else "",
            str(part.against_trained) if part.kind != "whole" else "",
            f"{part.better_on} of {len(part.losses)}" if part.kind != "whole" else "",
        ]
        for part in found.parts
    ]
    head = ["", "loss", "of the gain", "against as trained", "lower on"]
    config = found.adapter.model.peft_config["default"]
    return "\n\n".join(
        [
            "## What each part is worth",
            f"On {len(found.measured)} of the held-out replies, evenly spread. Each update is "
            f"{scaling_in_words(config)} x B A; it is scaled, switched off in parts, or cut to its "
            "strongest directions, and nothing is trained anew. Shares of the gain overlap, so "
            "they need not add up to 100 %. ± is one standard error.",
            table(head, rows),
            markdown_updates(found),
        ]
    ).strip()


def markdown_updates(found: Findings) -> str:
    """Return the table of how large the updates are, a row for each target."""
    rows = []
    for target, modules in found.updates.items():
        sizes = [100 * module["update"] for module in modules]
        largest = max(modules, key=lambda module: module["update"])
        directions = [module["directions"] for module in modules]
        rows.append(
            [
                target,
                str(len(modules)),
                f"{sum(sizes) / len(sizes):.2f} %",
                f"{max(sizes):.2f} %" + f" (layer {largest['layer']})" * (len(modules) > 1),
                f"{sum(directions) / len(directions):.1f}",
            ]
        )
    if not rows:
        return ""
    head = ["target", "modules", "update, mean", "largest", "directions that hold 90 % of it"]
    return (
        "The size of each update is compared with that of the weight W that it is added to "
        f"(Frobenius norms).\n\n{table(head, rows)}"
    )


def markdown_elsewhere(found: Findings) -> str:
    """Return the table of how far the model is moved on other tasks."""
    if not found.elsewhere:
        return ""
    rows = [
        row_of_shift("as trained" if strength == 1 else f"update x {strength:g}", shift)
        for strength, shift in found.elsewhere.without_system.items()
    ]
    if found.elsewhere.with_system:
        title = "as trained, with the training's system message"
        rows.append(row_of_shift(title, found.elsewhere.with_system))
    head = ["", "KL, nats a token", "another likeliest token"]
    return "\n\n".join(
        [
            "## What else was changed",
            f"On the base model's own replies to {found.elsewhere.tasks} ordinary tasks, such as "
            "sums, translations and lists, without the training's system message: how far the "
            "adapter's probabilities are from the base's, and how often it would go on otherwise.",
            table(head, rows),
        ]
    )


def row_of_shift(title: str, shift: Shift) -> list[str]:
    """Return a row of the table."""
    kl = shift.kl_a_token()
    return [title, f"{kl.value:.4f} ± {kl.error:.4f}", shift.other_tokens().percent()]


def markdown_checks(found: Findings) -> str:
    """Return the table of the checks, and the lines whose replies no longer pass."""
    if not found.checks:
        return ""
    rows = [
        [
            escaped(row.name),
            str(row.lines),
            str(row.before),
            str(row.after),
            str(len(row.lost)),
            str(len(row.won)),
            f"{row.p:.3f}",
        ]
        for row in found.checks
    ]
    head = ["check", "lines", "base passes", "adapter passes", "lost", "won", "p"]
    sentences = []
    for row in found.checks:
        lines = join_limited([short_line(where) for where in row.lost], 10, ", ")
        lost = f" Lost: {escaped(lines)}." if row.lost else ""
        sentences.append(f"- {escaped(row.conclusion())}{lost}")
    return "\n\n".join(
        [
            "## What the replies hold",
            "Base and adapter reply to every line that says what a reply must hold. p is the "
            "probability of so uneven a change by chance alone (McNemar's exact test).",
            table(head, rows),
            "\n".join(sentences),
        ]
    )


def markdown_kinds(found: Findings) -> str:
    """Return the loss by the kind of held-out line, and where it fell least."""
    losses, groups = found.losses, [group_of(example, found.group) for example in found.examples]
    changes = [a - b for a, b in zip(losses.trained, losses.base, strict=True)]
    rows = []
    for kind in sorted(set(groups), key=lambda kind: (-groups.count(kind), kind)):
        numbers = [number for number, group in enumerate(groups) if group == kind]
        own = losses.only(numbers)
        change = ratio_with_error([changes[n] for n in numbers], own.tokens, own.lines)
        rows.append(
            [
                escaped(kind or "(none)"),
                str(len(numbers)),
                f"{sum(own.base) / sum(own.tokens):.4f}",
                f"{sum(own.trained) / sum(own.tokens):.4f}",
                str(change) if math.isfinite(change.error) else f"{change.value:+.4f}",
                f"{sum(changes[number] < 0 for number in numbers)} of {len(numbers)}",
            ]
        )
    head = [escaped(found.group), "replies", "base", "adapter", "difference", "lower on"]
    text = "## By kind of line\n\n" + table(head, rows[:40]) if len(rows) > 1 else "## By line"
    worst = sorted(range(len(changes)), key=lambda n: -changes[n] / losses.tokens[n])[:3]
    shown = [
        f"{escaped(short_line(losses.lines[n]))} ({changes[n] / losses.tokens[n]:+.2f})"
        for n in worst
    ]
    return f"{text}\n\nThe loss fell least, or rose, on {', '.join(shown)}."


def markdown_samples(found: Findings) -> str:
    """Return held-out prompts with the replies of both side by side."""
    if not found.samples:
        return ""
    rows = [
        [
            name,
            str(habits["stopped"]),
            str(habits["different"]),
            f"{habits['words']:.0f}",
            f"{habits['repeated']:.0%}",
        ]
        for name, habits in habits_of_both(found.samples).items()
    ]
    head = ["", "ended on their own", "different", "mean words", "repeated word triples"]
    parts = [
        "## How it replies",
        f"{counted(len(found.samples), 'held-out prompt')}; always the likeliest token (greedy).",
        table(head, rows),
    ]
    for sample in found.samples:
        *prompt, reference = sample.example.messages
        kind = group_of(sample.example, found.group)
        said = [
            f"> **{message['role']}**: {escaped(message['content'])}".replace("\n", "  \n> ")
            for message in prompt
        ]
        replies = [
            cell(reply.text + ("" if reply.stopped else " [cut here]"))
            for reply in (sample.base, sample.adapter)
        ]
        parts += [
            f"### {escaped(short_line(sample.example.where))} {escaped(kind)}".rstrip(),
            "\n>\n".join(said),
            table(["base", "adapter", "reference"], [[*replies, cell(reference["content"])]]),
        ]
    return "\n\n".join(parts)


def habits_of_both(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """Return how base and adapter reply, in numbers."""
    return {
        "base": habits_of([sample.base for sample in samples]),
        "adapter": habits_of([sample.adapter for sample in samples]),
    }


def markdown_facts(found: Findings) -> str:
    """Return what was measured on what."""
    adapter, config = found.adapter, found.adapter.model.peft_config["default"]
    spent = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in found.seconds.items())
    facts = {
        "adapter": f"{found.name}, r = {config.r}, alpha = {config.lora_alpha}",
        "base": f"{adapter.base} ({adapter.revision}), in {adapter.dtype}",
        "held-out file": f"{found.held_out.path}, SHA-256 {found.held_out.sha256}",
        "system message": found.system_message or "(none)",
        "measured": f"{time.strftime('%Y-%m-%d %H:%M')}: {spent}",
    }
    if adapter.run:
        facts["run"] = str(adapter.run.path)
    return "## What was measured\n\n" + "\n".join(
        f"- {name}: {escaped(text)}" for name, text in facts.items()
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown; all columns but the first are numbers or texts as they are."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: str) -> str:
    """Return a text so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>|~$])", r"\\\1", text)


def cell(text: str) -> str:
    """Return a text of several lines for a cell of a table."""
    return escaped(text).replace("\n", "<br>")


# ---- evidence.json


def as_json_object(found: Findings) -> dict[str, Any]:
    """Return what `compare` and other programs read."""
    adapter = found.adapter
    record: dict[str, Any] = {
        "schema": 1,
        "finished": found.is_finished,
        "measured": time.strftime("%Y-%m-%d %H:%M:%S"),
        "adapter": found.name,
        "adapter_sha256": file_sha256(adapter.place / "adapter_model.safetensors"),
        "adapter_config": read_json(adapter.place / "adapter_config.json"),
        "base": adapter.base,
        "base_revision": adapter.revision,
        "dtype": adapter.dtype,
        "device": adapter.model.device.type,
        "enable_thinking": adapter.chat_format.enable_thinking,
        "system_message": found.system_message,
        "held_out": {
            "file": found.held_out.path,
            "sha256": found.held_out.sha256,
            "group": found.group,
        },
        "run": None,
        "losses": rows_of_losses(found),
        "parts": {part.title: part.as_recorded() for part in found.parts},
        "parts_measured_on": [found.examples[number].where for number in found.measured],
        "updates": found.updates,
        "elsewhere": found.elsewhere.as_recorded() if found.elsewhere else None,
        "checks": {row.name: asdict(row) | {"says": row.conclusion()} for row in found.checks},
        "checked_replies": found.checked_replies,
        "conclusions": found.conclusions,
        "seconds": found.seconds,
    }
    if adapter.run:
        kept = ("outcome", "settings", "lora_config", "train_seconds", "resumed_from", "published")
        known = {key: adapter.run.record.get(key) for key in (*kept, "script_sha256")}
        record["run"] = {"path": str(adapter.run.path)} | known
    if found.losses:
        record["loss"] = {
            "base": found.mean(found.losses.base),
            "adapter": found.mean(found.losses.trained),
        }
        record["gain"] = asdict(found.losses.gain())
        record["lower_on"] = found.lower_on()
    if found.samples:
        record["samples"] = habits_of_both(found.samples)
    return record


def rows_of_losses(found: Findings) -> list[dict[str, Any]]:
    """Return a row for each example, in nats a token."""
    if not found.losses:
        return []
    numbers = zip(
        found.examples, found.losses.tokens, found.losses.base, found.losses.trained, strict=True
    )
    return [
        {
            "where": example.where,
            "group": group_of(example, found.group),
            "tokens": tokens,
            "base": base / tokens,
            "adapter": trained / tokens,
        }
        for example, tokens, base, trained in numbers
    ]
