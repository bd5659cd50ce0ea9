"""The command `chat`: a talk with an adapter and its base."""

import argparse
import contextlib
import sys

from transformers import GenerationConfig, TextStreamer

from inspect_lora import model, replies
from inspect_lora.adapter_file import find_adapter, read_adapter
from inspect_lora.common import read_json, say, wrapped

HELP = """/base, /adapter or /both   who answers
/scale 0.5                 the adapter at another strength, if it is plain LoRA; 1 is as trained
/new                       forget what was said
/quit                      leave, as Ctrl-D does; Ctrl-C stops a reply"""


def run(options: argparse.Namespace) -> None:
    """Load the adapter; read lines and answer them until the input ends."""
    saved = read_adapter(find_adapter(options.adapter))
    with contextlib.redirect_stdout(sys.stderr):
        adapter = model.open_adapter(saved, *model.describe_base(options, saved))
    system = options.system
    if system is None:
        system = read_json(saved.place / "run.json").get("system_message") or ""
    advice = "type a message, /help, or /quit to leave"
    shown = system or "(none that all lines had; see --system)"
    say("chat", [*wrapped(f"system message: {shown}"), advice])
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - arrow keys and history at the prompt
    talk(adapter, system, options.max_new_tokens)


def talk(adapter: model.Adapter, system: str, max_new_tokens: int) -> None:
    """Read lines and answer them; after /both the talk goes on from the adapter's reply."""
    first = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, str]] = []
    strengths = [1.0]  # who answers, one after the other; 0 is the base
    while True:
        try:
            text = input("you> ").strip()
        except EOFError:
            print()
            return
        if not sys.stdin.isatty():
            print(text)  # the terminal did not show it
        word, _, rest = text.partition(" ")
        if word == "/quit":
            return
        if word == "/new":
            turns = []
        elif word in ("/base", "/adapter", "/both"):
            strengths = {"/base": [0.0], "/adapter": [1.0], "/both": [0.0, 1.0]}[word]
        elif word == "/scale" and adapter.is_plain:
            with contextlib.suppress(ValueError):
                strengths = [*strengths[:-1], float(rest)]
            print(f"strength {strengths[-1]:g}")
        elif word.startswith("/"):
            print(HELP)
        elif text:
            asked = [*turns, {"role": "user", "content": text}]
            try:
                prompt = model.prompt_ids(first + asked, adapter.base)
                for strength in strengths:
                    reply = answer(adapter, prompt, strength, max_new_tokens)
                turns = [*asked, {"role": "assistant", "content": reply}]
            except ValueError as error:  # the template refuses it, or it holds a special token
                print(f"not sent: {error}")
            except KeyboardInterrupt:
                print(" [stopped]")


def answer(adapter: model.Adapter, prompt: list[int], scale: float, max_new_tokens: int) -> str:
    """Print the reply as it is generated, and return it."""
    name = {0.0: "base", 1.0: "adapter"}.get(scale, f"adapter x {scale:g}")
    print(f"{name}> ", end="", flush=True)
    tokenizer, stops = adapter.base.tokenizer, adapter.base.stop_ids
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    limits = {"max_new_tokens": max_new_tokens, "eos_token_id": stops, "pad_token_id": stops[0]}
    with adapter.at_strength(scale):
        (tokens,) = replies.new_tokens(adapter, [prompt], GenerationConfig(**limits), streamer)
    return replies.text_of(adapter, tokens)
