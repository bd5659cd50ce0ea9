"""Talk to an adapter, at any strength, beside its base; nothing is written.

A pipe works, too: each of its lines is answered. Replies are greedy, always the likeliest token.
"""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import suppress

import transformers

from inspect_lora import adapters
from inspect_lora.adapters import (
    Adapter,
    can_scale_and_cut,
    open_adapter,
    refuse_system_message,
    rescaled,
    system_message_of,
    window_of,
)
from inspect_lora.common import at_least, report, report_sentence
from inspect_lora.conversations import why_it_is_not_asked
from inspect_lora.files import find_adapter, find_run
from inspect_lora.replies import generate_batch, greedy, reply_of

HELP = """/base and /adapter  choose who answers
/both               let both answer, one below the other
/scale 0.5          answer with the adapter at another strength; 1 is as trained
/new                forget what was said
/help               show this
/quit               end (also /exit, Ctrl-D, or Ctrl-C)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    adapters.add_arguments(parser)
    adapters.add_system_argument(parser)
    parser.add_argument(
        "--max_new_tokens", type=at_least(1), default=200, help="a reply is cut after so many"
    )


def run(options: argparse.Namespace) -> None:
    """Load the adapter and talk."""
    place = find_adapter(options.adapter)
    trained_by = find_run(place)
    adapter = open_adapter(options, place, trained_by)
    system = system_message_of(options, trained_by)
    refuse_system_message(system, adapter.chat_format)
    hint = "" if trained_by or options.system is not None else "; --system gives the training's"
    report_sentence("chat", f"system message: {system or '(none given)'}{hint}")
    report("", "type a message, or /help")
    talk(adapter, system, options.max_new_tokens)


def talk(adapter: Adapter, system: str, max_new_tokens: int) -> None:
    """Read lines and answer them, until the input ends.

    With /both the conversation goes on from the adapter's reply.
    """
    with suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and history at the prompt
    if sys.stdin is None:  # it was closed, as by <&-
        return
    sys.stdin.reconfigure(errors="replace")  # a file that is not in UTF-8 must not end the talk
    messages = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, str]] = []
    scales = [1.0]  # who answers, one after the other; 0 is the base
    while True:
        try:
            said = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(flush=True)
            return
        if not sys.stdin.isatty():
            print(said)  # the terminal did not show it
        word, _, rest = said.partition(" ")
        if word in ("/quit", "/exit"):
            return
        if word == "/new":
            turns = []
        elif word in ("/base", "/adapter", "/both"):
            scales = {"/base": [0.0], "/adapter": [1.0], "/both": [0.0, 1.0]}[word]
        elif word == "/scale" and not can_scale_and_cut(adapter.model):
            print("/scale is for plain LoRA; this adapter is more than scaling x B A")
        elif word == "/scale":
            scales = read_scale(rest, scales)
        elif word.startswith("/"):
            print(HELP if word == "/help" else f"{word} is an unknown command\n{HELP}")
        elif said:
            asked = [*turns, {"role": "user", "content": said}]
            asked = newest_that_fit(adapter, messages, asked, max_new_tokens)
            if not asked:
                continue
            if reason := why_it_is_not_asked(asked[-1:], adapter.chat_format):
                print(f"Not sent: {reason}. Write it otherwise.")
                continue
            try:
                for scale in scales:
                    text = say(adapter, messages + asked, scale, max_new_tokens)
                turns = [*asked, {"role": "assistant", "content": text}]
            except KeyboardInterrupt:
                print(" [stopped]", flush=True)


def newest_that_fit(
    adapter: Adapter,
    messages: list[dict[str, str]],
    turns: list[dict[str, str]],
    max_new_tokens: int,
) -> list[dict[str, str]]:
    """Return the newest turns that leave room for a reply in the model's window, and say it."""
    window = window_of(adapter.model)
    for first in range(0, len(turns), 2):  # a question is left out with its reply
        ids = adapter.chat_format.prompt_ids(messages + turns[first:])
        if len(ids) + max_new_tokens <= window:
            if first:
                print(f"(The model takes {window:,} tokens: the oldest turns are left out.)")
            return turns[first:]
    print(
        f"Not sent: {len(ids):,} tokens and a reply of {max_new_tokens:,} (--max_new_tokens) are "
        f"more than the {window:,} that the model takes. Shorten the message."
    )
    return []


def read_scale(text: str, before: list[float]) -> list[float]:
    """Return who answers after /scale, or say what is wrong with it and keep who did.

    After /both, the base goes on answering first.
    """
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if 0 <= scale <= 10:
        return [*before[:-1], scale]
    print("/scale needs a number from 0 (the base model) to 10, such as /scale 0.5")
    return before


def say(adapter: Adapter, messages: list[dict[str, str]], scale: float, max_new_tokens: int) -> str:
    """Print the reply to the conversation as it is generated, and return it."""
    model, chat_format = adapter.model, adapter.chat_format
    ids = chat_format.prompt_ids(messages)
    name = {0.0: "base", 1.0: "adapter"}.get(scale, f"adapter x {scale:g}")
    print(f"{name}> ", end="", flush=True)
    streamer = transformers.TextStreamer(
        chat_format.tokenizer, skip_prompt=True, skip_special_tokens=True
    )
    state = model.disable_adapter() if scale == 0 else rescaled(model, scale)
    with state:
        (row,) = generate_batch(model, [ids], greedy(chat_format, max_new_tokens), streamer)
    return reply_of(row, chat_format).text
