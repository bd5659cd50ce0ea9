"""Ask a running server whether it applies an adapter; the status is 0 only if it does.

A server can accept an adapter and ignore it without a word. So the server itself scores held-out
replies, under the adapter's name and under its base's, and what the adapter changes there is held
against what it changes here. It is asked as well whether it writes prompts as in training. vLLM
answers both questions.

The losses here are those in the adapter's newest evidence.json, so that nothing is loaded; without
one, or with --base, --base_revision, --dtype or --device, a dozen replies are measured first, which
needs the base model and held-out conversations.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from inspect_lora import adapters, conversations
from inspect_lora.common import (
    InspectError,
    file_sha256,
    path_from_here,
    place_in_file,
    report,
    this_program,
)
from inspect_lora.evidence_file import Evidence, Row, read_evidence, records_below
from inspect_lora.files import Run, find_adapter, find_run, folder_to_serve, why_run_is_unknown
from inspect_lora.scores import draw_numbers, losses_of
from inspect_lora.server import GIVE_THE_ADDRESS, Server
from inspect_lora.trainer import ChatFormat, Example, encode, name_on_server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("url", metavar="URL", help="such as http://localhost:8000")
    adapters.add_arguments(parser)
    conversations.add_arguments(parser)
    parser.add_argument("--name", help="what the server calls the adapter; default: found out")


def run(options: argparse.Namespace) -> None:
    """Ask the server, and print what it answers."""
    place = find_adapter(options.adapter)
    server = find_server(options, place)
    asked, chat_format = choose_replies(options, place, server)
    rendering, unchecked = check_rendering(server, asked, chat_format)
    ask_for_losses(server, asked)
    losses = judge_losses(server, asked, place)
    if losses or rendering:
        applied = f"The server applies the adapter as {server.adapter}, but:"
        raise InspectError("\n".join(filter(None, [losses or applied, rendering])))
    report(
        "applied",
        f"The server applies the adapter under the name {server.adapter}.\n"
        + (unchecked or "Ask it for the model of that name, with the training's system message."),
    )


@dataclass
class Asked:
    """What the server was asked about one held-out reply, and its answers; losses are in nats."""

    example: Example
    base_here: float
    adapter_here: float
    base_there: float = math.nan
    adapter_there: float = math.nan

    @property
    def here(self) -> float:
        """By how much the adapter lowers the loss of the reply here: above 0 is better."""
        return self.base_here - self.adapter_here

    @property
    def there(self) -> float:
        """By how much the adapter's name lowers it on the server."""
        return self.base_there - self.adapter_there


# ---- The server, and what it calls the adapter


def find_server(options: argparse.Namespace, place: Path) -> Server:
    """Return the server and its names for the adapter and its base."""
    server = Server(re.sub(r"(/v1)?/*$", "", options.url.strip()))
    models = server.ask("/v1/models", None, GIVE_THE_ADDRESS).get("data")
    if not isinstance(models, list) or not all(isinstance(one, dict) for one in models):
        raise InspectError(f"{server.url}/v1/models does not list models: is it an OpenAI server?")
    loaded = {str(one.get("id")): one for one in models}
    names = list(loaded)  # no set, since a parent may be of any type
    offered = {name: one for name, one in loaded.items() if one.get("parent") in names}
    printed = name_on_server(place)  # in the command that serves it
    only = next(iter(offered)) if len(offered) == 1 else printed
    server.adapter = options.name or (printed if printed in offered else only)
    if server.adapter not in offered:
        others = [name for name in loaded if name not in offered]
        raise InspectError(
            f"The server offers no adapter of the name {server.adapter}. Its adapters are "
            f"{', '.join(offered) or 'none'}, its other models {', '.join(others) or 'none'}.\nSay "
            "with --name which adapter is asked, or start the server with --enable-lora "
            f"--lora-modules {printed}={folder_to_serve(place)}."
        )
    found = offered[server.adapter]
    server.base, server.folder = str(found["parent"]), str(found.get("root") or "")
    windows = [one.get("max_model_len") for one in (found, loaded[server.base])]
    server.window = min([n for n in windows if isinstance(n, int)], default=math.inf)
    report("server", f"{server.url} offers {server.adapter}, an adapter of {server.base}")
    return server


# ---- The replies, and their losses here

REPLIES_TO_SCORE = 12
FEWEST_REPLIES = 3


def choose_replies(
    options: argparse.Namespace, place: Path, server: Server
) -> tuple[list[Asked], ChatFormat]:
    """Return some held-out replies with their losses here, and how prompts are rendered."""
    trained_by = find_run(place)
    evidence = find_evidence(options, place, trained_by)
    if evidence and not options.eval_file and Path(evidence.held_out.file).is_file():
        options.eval_file = evidence.held_out.file
    held_out = conversations.read_held_out(options, trained_by, why_run_is_unknown(place))
    is_asked_for = options.base or options.base_revision or options.dtype or options.device
    if evidence and not is_asked_for:
        base = (evidence.base, evidence.base_revision)
        chat_format = adapters.chat_format_of(options, place, *base)
        examples, _ = encode(held_out.examples, chat_format, options.max_seq_len)
        lengths = [(place_in_file(one.source), len(one.reply_ids)) for one in examples]
        if evidence.has_the_replies_of(held_out.as_known(), lengths):
            where = path_from_here(evidence.folder / "evidence.json")
            report("here", f"the losses with and without the adapter are those in\n{where}")
            chosen = numbers_to_score(examples, server.window)
            return [from_record(examples[n], evidence.losses[n]) for n in chosen], chat_format
    adapter = adapters.open_adapter(options, place, trained_by)
    examples = conversations.encode_held_out(held_out, adapter, options)
    examples = [examples[n] for n in numbers_to_score(examples, server.window)]
    with_it = losses_of(adapter.model, examples, "adapter")
    with adapter.model.disable_adapter():
        without = losses_of(adapter.model, examples, "base")
    report("here", "the losses with and without the adapter were measured just now")
    return list(map(Asked, examples, without, with_it)), adapter.chat_format


def find_evidence(
    options: argparse.Namespace, place: Path, trained_by: Run | None
) -> Evidence | None:
    """Return what `evidence` found last of this very adapter, known by the hash of its file.

    The run's two files, which differ in their names alone, are one adapter.
    """
    hashes = {file_sha256(place / "adapter_model.safetensors")}
    folders = [Path("inspected"), place.parent / "inspected"]
    if trained_by:
        folders.append(trained_by.path.parent / "inspected")
        published = set((trained_by.record.get("adapter_sha256") or {}).values())
        hashes |= published if hashes & published else set()  # a checkpoint is not among them
    read = (read_evidence(path) for one in folders for path in records_below(one))
    ours = [one for one in read if one and one.adapter_sha256 in hashes]
    with_losses = [one for one in ours if one.losses]
    if ours and not with_losses:
        where = path_from_here(ours[0].folder / "evidence.json")
        report("here", f"{where}\nis of prompts without replies and holds no losses")
    ours = [one for one in with_losses if one.enable_thinking == options.enable_thinking]
    return max(ours, key=lambda one: one.measured, default=None)


def from_record(example: Example, row: Row) -> Asked:
    """Return a reply with its losses in evidence.json, which are in nats a token there."""
    return Asked(example, row.tokens * row.base, row.tokens * row.adapter)


def numbers_to_score(examples: list[Example], window: float) -> list[int]:
    """Return the numbers of the replies to score, drawn of those that the server takes.

    A server generates at least one token, even if it is only asked for scores.
    """
    fitting = [n for n, one in enumerate(examples) if len(one.input_ids) < window]
    if len(fitting) < FEWEST_REPLIES:
        limit = f" in the {window:,.0f} tokens that it takes" if math.isfinite(window) else ""
        raise InspectError(
            f"The server can score {len(fitting)} of the {len(examples)} held-out replies{limit}, "
            f"and {FEWEST_REPLIES} are needed.\nGive more with --eval_file, or start the server "
            "with a larger --max-model-len."
        )
    return [fitting[n] for n in draw_numbers(len(fitting), REPLIES_TO_SCORE)]


# ---- What the server's scores say
#
# The token ids are sent, so the server's chat template has no say in it.

# Shares of the adapter's effect: what two right computations may be apart, at least and at most; in
# between it is twice what the base model's losses here and there are apart. docs/serving.md says
# what these limits tell apart.
MAY_BE_APART = 0.03
MAY_BE_APART_AT_MOST = 0.3
OTHER_BASE_FROM = 0.1  # nats a token


@dataclass
class Agreement:
    """How well what the adapter changes on the server agrees with what it changes here.

    Sizes are root mean squares over the replies: that the changes agree on average is not enough.
    """

    size: float  # of the changes here, in nats a reply
    noise: float  # what the base's losses there and here are apart, in nats a reply
    apart: float  # what the changes there and here are apart, as a share of the size
    effect: float  # the changes there, as a share of the size

    @property
    def relative_noise(self) -> float:
        """What the base's losses there and here are apart, as a share of the size."""
        return self.noise / self.size if self.size else math.inf

    @property
    def allowed(self) -> float:
        """What the changes there and here may be apart, as a share of the size."""
        return min(max(MAY_BE_APART, 2 * self.relative_noise), MAY_BE_APART_AT_MOST)

    def state(self) -> str:
        """Return whether the adapter is "applied", "ignored", "weak" (cannot tell), or "other"."""
        if self.apart <= self.allowed:
            return "applied"
        if self.relative_noise > 1:
            return "weak"
        if self.effect <= self.allowed:
            return "ignored"
        return "weak" if 2 * self.relative_noise > MAY_BE_APART_AT_MOST else "other"


def agreement_of(asked: list[Asked]) -> Agreement:
    """Return how well the adapter's changes on the server agree with those here."""
    size = root_mean_square([one.here for one in asked])
    noise = root_mean_square([one.base_there - one.base_here for one in asked])
    if size == 0:
        return Agreement(size, noise, math.inf, math.inf)
    apart = root_mean_square([one.there - one.here for one in asked])
    effect = root_mean_square([one.there for one in asked])
    return Agreement(size, noise, apart / size, effect / size)


def root_mean_square(numbers: list[float]) -> float:
    """Return the square root of the mean of the squares."""
    return math.sqrt(statistics.fmean(number * number for number in numbers))


def ask_for_losses(server: Server, asked: list[Asked]) -> None:
    """Have the server score each reply, once as the base and once as the adapter."""
    for one in tqdm(asked, desc="scoring", leave=False, disable=None):
        prompt, reply = one.example.prompt_ids, one.example.reply_ids
        one.base_there = -sum(score(server, server.base, prompt, reply))
        one.adapter_there = -sum(score(server, server.adapter, prompt, reply))


def score(server: Server, name: str, prompt: list[int], reply: list[int]) -> list[float]:
    """Return the log-probability of each of the reply's tokens, as the server computes it."""
    body = {"model": name, "prompt": prompt + reply, "max_tokens": 1, "temperature": 0}
    answer = server.ask("/v1/completions", body | {"prompt_logprobs": 0}, CANNOT_SCORE)
    try:
        rows = answer["choices"][0]["prompt_logprobs"][len(prompt) :]
        pairs = zip(rows, reply, strict=True)
        found = [float(row[str(token)]["logprob"]) for row, token in pairs]
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise InspectError(
            f"{server.url}/v1/completions: as {name} the server gives no probability for each "
            f"token of a prompt.\n{CANNOT_SCORE}"
        )
    return found


CANNOT_SCORE = (
    "So replies cannot be scored (prompt_logprobs of /v1/completions). vLLM can do it: ask it "
    "itself, without a gateway before it."
)


LEFT_OUT_BY_FLAG = (
    "If vLLM was started with --lora-target-modules, it leaves out all modules that the flag does "
    "not name, without a word: start it without the flag."
)


def judge_losses(server: Server, asked: list[Asked], place: Path) -> str:
    """Print how the losses there and here agree; return what is wrong and what to do, or ""."""
    found = agreement_of(asked)
    tokens = sum(len(one.example.reply_ids) for one in asked)

    def a_token(number_of: Callable[[Asked], float]) -> float:
        return sum(map(number_of, asked)) / tokens

    base_here, base_there = a_token(lambda one: one.base_here), a_token(lambda one: one.base_there)
    here, there = a_token(lambda one: one.here), a_token(lambda one: one.there)
    apart = f"on single replies the changes differ by {100 * found.apart:.1f} %"
    lines = [
        "loss, nats a token      here   on the server",
        f"base model           {base_here:7.4f}   {base_there:13.4f}",
        f"base - adapter       {here:+7.4f}   {there:+13.4f}",
    ]
    if found.size > 0:
        lines.append(f"{apart} (up to {100 * found.allowed:.1f} % counts as the same)")
    report("scored", "\n".join(lines))
    state = found.state()
    if state == "applied":
        return ""
    whence = f" It has {server.adapter} from {server.folder}." if server.folder else ""
    if state == "ignored":
        better = folder_to_serve(place)
        folder = f"the folder {better}"
        if better == place:
            folder = f"what `{this_program()} export {place} FOLDER --vllm` writes"
        return (
            "The base answers under the adapter's name: the server gives the replies the same "
            f"losses as {server.adapter} and as {server.base}, so it ignores the adapter.\nGive "
            f"the server {folder}, or use a newer version of the server. {LEFT_OUT_BY_FLAG}{whence}"
        )
    doubt = ""
    if abs(base_there - base_here) > OTHER_BASE_FROM:
        doubt = (
            " But first see whether it has the same base model, unquantized: its loss is "
            f"{base_here:.4f} here and {base_there:.4f} there."
        )
    if state == "weak":
        return (
            "The effect is too weak to tell whether the adapter is applied: it changes the loss of "
            f"a reply by {found.size:.2f} nats here, and the base model's losses here and there "
            f"are {found.noise:.2f} nats apart.\nGive longer held-out replies, or "
            f"some on which the adapter changes more, with --eval_file.{doubt}"
        )
    return (
        "The adapter is applied with another scaling or in part, or it is another adapter: "
        f"{apart}.\nCompare r, lora_alpha and use_rslora in the adapter_config.json that the "
        f"server reads with those in {place}, and look in its log for modules that it leaves "
        f"out. {LEFT_OUT_BY_FLAG}{whence}{doubt}"
    )


# ---- How the server renders prompts


def check_rendering(server: Server, asked: list[Asked], chat_format: ChatFormat) -> tuple[str, str]:
    """Print whether the server writes prompts as in training, if clients ask for nothing else.

    Returns:
        What is wrong, or "", and what could not be checked, or "".
    """
    unlike: list[tuple[Example, list[int]]] = []
    for one in asked:
        tokens, reason = rendered_by(server, one.example, {})
        if reason:
            report("rendered", f"not checked, since {reason}")
            return "", (
                "Whether it writes prompts as in training could not be checked, so replies may "
                "still\nbe worse than they should."
            )
        if tokens != one.example.prompt_ids:
            unlike.append((one.example, tokens))
    if not unlike:
        report("rendered", f"the server writes all {len(asked)} prompts as in training")
        return "", ""
    example, tokens = unlike[0]
    trained, there = where_they_part(example.prompt_ids, tokens, chat_format)
    report(
        "rendered",
        f"the server writes {len(unlike)} of {len(asked)} prompts otherwise\n"
        f"{example.source} in training:    {trained}\n"
        f"{example.source} on the server:  {there}",
    )
    wanted = {"enable_thinking": chat_format.enable_thinking}
    tokens, _ = rendered_by(server, example, {"chat_template_kwargs": wanted})
    advice = "Give the server the chat template of the training, with --chat-template."
    if tokens == example.prompt_ids:
        text = json.dumps(wanted)
        advice = (
            f"Start the server with --default-chat-template-kwargs '{text}', or let each client "
            f'send "chat_template_kwargs": {text}.'
        )
    return (
        f"The prompt is rendered otherwise than in training: {there} instead of {trained}, so the "
        f"adapter is asked what it was not trained on.\n{advice}"
    ), ""


def rendered_by(server: Server, example: Example, more: dict[str, Any]) -> tuple[list[int], str]:
    """Return the tokens of a prompt as the server writes it, and "", or why they cannot be had."""
    body = {
        "model": server.adapter,
        "messages": example.messages[:-1],
        "add_generation_prompt": True,
    }
    status, answer = server.send("/tokenize", body | more)
    if status in (401, 403, 404, 405):
        return [], f"/tokenize is closed ({status})"
    if status != 200 or not isinstance(answer, dict):
        return [], f"/tokenize answers {status}: {answer}"
    tokens = answer.get("tokens")
    if not tokens or not isinstance(tokens, list):
        return [], "/tokenize does not take messages"
    if not all(isinstance(one, int) and 0 <= one < 2**32 for one in tokens):
        return [], "/tokenize answers with what are no tokens"
    return tokens, ""


def where_they_part(
    trained: list[int], served: list[int], chat_format: ChatFormat
) -> tuple[str, str]:
    """Return the two texts around the first token in which they differ, as Python writes them."""
    pairs = zip(trained, served, strict=False)
    shorter = min(len(trained), len(served))
    first = next((n for n, (one, other) in enumerate(pairs) if one != other), shorter)
    around = slice(max(0, first - 6), first + 6)
    decode = chat_format.tokenizer.decode
    return repr(decode(trained[around])), repr(decode(served[around]))
