"""The training and the held-out examples: both files are read, checked and rendered."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from train_lora.base import Base, one_pass_template
from train_lora.console import UserError, report
from train_lora.conversations import (
    SHIPPED,
    Conversation,
    hold_out,
    problems_as_text,
    prompt_hash,
    read_conversations,
)
from train_lora.files import Facts, file_sha256
from train_lora.settings import Settings, percent_of
from train_lora.tokens import Example, encode, join_replies


@dataclass(frozen=True)
class Data:
    """The examples, and what the records say about them."""

    examples: list[Example]  # to learn from
    held_out: list[Example]
    facts: Facts  # file, hash and counts of both
    held_out_lines: str  # the conversations that an EVAL_FILE like "10%" holds out, as JSONL


def read_data(settings: Settings, base: Base) -> Data:
    """Read, check and render all conversations; raise UserError with every fault."""
    problems: list[str] = []

    def read(path: str) -> list[Conversation]:
        return read_conversations(path, settings.REPLIES, problems, settings.ENABLE_THINKING)

    to_learn, lines = read(settings.TRAIN_FILE), ""
    to_hold_out: list[Conversation] = []
    eval_file, percent = settings.EVAL_FILE, percent_of(settings.EVAL_FILE)
    if percent and not problems:
        to_learn, to_hold_out = hold_out(to_learn, percent)
        rows = {conversation.source: conversation.row for conversation in to_hold_out}
        lines = "".join(f"{json.dumps(row)}\n" for row in rows.values())
        eval_file = str(Path(settings.OUTPUT_DIR, "held_out.jsonl"))
    elif eval_file and not percent:
        to_hold_out = read(eval_file)
    examples = encode(to_learn, base, settings.MAX_SEQ_LEN, problems, "training")
    held_out = encode(to_hold_out, base, settings.MAX_SEQ_LEN, problems)
    if problems:
        raise UserError(f"{problems_as_text(problems)}\nNothing was trained.")
    learned = learned_hashes(examples, settings)
    leaked = [reply.source for reply in held_out if prompt_hash(reply.messages[:-1]) in learned]
    if leaked:
        report("warning", f"{len(leaked):,} held-out prompts are trained on, such as {leaked[0]}")
    check_joining(examples, base, settings)
    examples, held_out = join_replies(examples), join_replies(held_out)
    facts = {
        "train": facts_of(settings.TRAIN_FILE, examples),
        "held_out": facts_of(eval_file, held_out, lines) if held_out else None,
    }
    shipped = [name for name, of in facts.items() if of and of["sha256"] == SHIPPED[name]]
    if shipped == ["held_out"]:
        raise UserError(
            f"EVAL_FILE {eval_file} is still the shipped one, whose losses say nothing about "
            f"{settings.TRAIN_FILE}: --eval_file 10% holds out a tenth of that, and "
            '--eval_file "" nothing.'
        )
    return Data(examples, held_out, facts, lines)


def check_joining(replies: list[Example], base: Base, settings: Settings) -> None:
    """Print the cost if the chat template keeps a dialogue's replies from sharing a row."""
    lengths = {reply.source: len(reply.input_ids) for reply in replies}  # to the last reply
    needed = sum(lengths.values())
    tokens = sum(len(example.input_ids) for example in join_replies(replies))
    if tokens <= 1.5 * needed:
        return
    if settings.CHAT_TEMPLATE == "one_pass":
        raise UserError(
            f"CHAT_TEMPLATE one_pass joins too few replies of {settings.MODEL_NAME}: "
            f"{tokens / needed:.1f} times the dialogues' tokens remain."
        )
    may_join = one_pass_template(base.tokenizer) not in ("", base.tokenizer.get_chat_template())
    advice = "; --chat_template one_pass trains a dialogue in one pass" if may_join else ""
    cost = f"{tokens / needed:.1f} times the tokens: {tokens:,} in place of {needed:,}"
    report("slower", f"{cost}, as the chat template changes earlier replies{advice}")


def learned_hashes(examples: list[Example], settings: Settings) -> set[str]:
    """Return the hashes of the prompts that an adapter has learned to reply to."""
    replies = [reply for example in examples for reply in example.replies]
    hashes = {prompt_hash(reply.messages[:-1]) for reply in replies}
    path = Path(settings.START_FROM, "learned.txt")
    if settings.START_FROM and path.is_file():
        hashes |= {*path.read_text(encoding="utf-8").split()}
    return hashes


def facts_of(path: str, examples: list[Example], lines: str = "") -> Facts:
    """Return what the records say about a file, which may not exist yet."""
    return {
        "file": path,
        "path": str(Path(path).resolve()),
        "sha256": hashlib.sha256(lines.encode()).hexdigest() if lines else file_sha256(Path(path)),
        "dialogues": len({example.source for example in examples}),
        "examples": len(examples),
        "replies": sum(len(example.replies) for example in examples),
        "tokens": sum(len(example.input_ids) for example in examples),
        "targets": sum(example.targets for example in examples),
    }
