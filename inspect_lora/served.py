"""Ask a running server whether it applies an adapter.

A server can accept an adapter and silently ignore it. So it is asked to score the replies in a
report's record, under the adapter's name and under its base's; what the adapter changes there is
compared with what it changed here. The server is also asked whether it renders prompts as they were
measured. vLLM answers both; an API key is read from VLLM_API_KEY or OPENAI_API_KEY.

The status is 0 if it is applied, 3 if it is ignored, 4 if that cannot be told, and 5 if it is
applied but prompts are rendered differently.
"""

import argparse
import http.client
import json
import math
import os
import re
import statistics
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inspect_lora import record
from inspect_lora.common import InspectError, aligned, one_line, say, wrapped

# Shares of the adapter's effect that two right computations may be apart, at least and at most; in
# between it is twice what the base's losses here and there are apart (docs/serving.md).
MAY_BE_APART, MAY_BE_APART_AT_MOST = 0.03, 0.3
WRITTEN_OTHERWISE = 5  # an exit status, as those of the verdicts
VERDICTS = {
    "applied": (0, ""),
    "ignored": (3, "If the base also takes images, vLLM up to 0.32 ignores the names of a text "
    "model: serve final_lora_vllm, or what `export --vllm` writes. Otherwise see which folder "
    "/v1/models names for the adapter."),
    "cannot tell": (4, "It is applied at another strength or in part, or the server has another "
    "adapter or base: compare the adapter_config.json that it reads, and see its log."),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("folder", metavar="FOLDER", help="the report on the adapter")
    parser.add_argument("--url", default="http://localhost:8000", help="default: %(default)s")
    parser.add_argument("--name", help="what the server calls the adapter, if it has several")


def run(options: argparse.Namespace) -> None:
    """Ask the server, print what it answers, and judge it; the exit status is the verdict's."""
    found = record.read(Path(options.folder))
    server = find_server(re.sub(r"(/v1)?/*$", "", options.url), options.name)
    if not found.probes:
        raise InspectError(f"{options.folder} has no replies to score: measure with --replies.")
    here = [(one.base, one.adapter) for one in found.probes]
    names = (server.base, server.adapter)
    there = [tuple(score(server, name, one) for name in names) for one in found.probes]
    verdict, apart, allowed = judge(here, there)
    tokens = sum(len(one.reply_ids) for one in found.probes)
    rows = [["base"], ["base - adapter"]]
    for side in (here, there):
        base, adapter = (sum(column) / tokens for column in zip(*side, strict=True))
        rows[0].append(f"{base:.4f}")
        rows[1].append(f"{base - adapter:+.4f}")
    say("scored", aligned([f"{len(here)} replies, nats a token", "here", "on the server"], rows))
    say("", f"on single replies the changes differ by {100 * apart:.1f} %; up to "
        f"{100 * allowed:.1f} % is the same")  # fmt: skip
    is_otherwise = print_rendering(server, found)
    status, advice = VERDICTS[verdict]
    say("verdict", [f"{server.adapter} on {server.url}: {verdict}", *wrapped(advice)])
    raise SystemExit(WRITTEN_OTHERWISE if is_otherwise and not status else status)


@dataclass
class Server:
    """A running server, asked with the standard library alone."""

    url: str  # without /v1
    adapter: str = ""  # their names there
    base: str = ""

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the server's answer to a request, or raise with what it says."""
        key = os.environ.get("VLLM_API_KEY") or os.environ.get("OPENAI_API_KEY")
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(f"{self.url}{path}", data, headers)
            with urllib.request.urlopen(request, timeout=300) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise InspectError(f"{self.url}{path}: {error.code} {one_line(said)}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise InspectError(
                f"{self.url}{path} cannot be reached ({one_line(error)}): is --url right?"
            ) from error


Losses = list[tuple[float, float]]  # of each reply, in nats: the base's and the adapter's


def judge(here: Losses, there: Losses) -> tuple[str, float, float]:
    """Return "applied", "ignored" or "cannot tell", how far the changes differ, and what may be.

    Sizes are root mean squares over the replies, as shares of the changes here: it is not enough
    that the changes agree on average.
    """
    changes_here, changes_there = ([base - own for base, own in side] for side in (here, there))
    pairs = zip(changes_here, changes_there, strict=True)
    bases = zip(here, there, strict=True)
    size = root_mean_square(changes_here) or math.nan
    apart = root_mean_square([one - other for one, other in pairs]) / size
    noise = root_mean_square([one[0] - other[0] for one, other in bases]) / size
    allowed = min(max(MAY_BE_APART, 2 * noise), MAY_BE_APART_AT_MOST)
    if apart <= allowed:
        return "applied", apart, allowed
    is_ignored = noise <= 1 and root_mean_square(changes_there) / size <= allowed
    return "ignored" if is_ignored else "cannot tell", apart, allowed


def root_mean_square(numbers: list[float]) -> float:
    """Return the square root of the mean of the squares."""
    return math.sqrt(statistics.fmean(number * number for number in numbers))


def score(server: Server, name: str, probe: record.Probe) -> float:
    """Return the loss of a reply in nats, as the server computes it; the token ids are sent."""
    body = {"model": name, "prompt": probe.prompt_ids + probe.reply_ids, "max_tokens": 1}
    answer = server.ask("/v1/completions", body | {"temperature": 0, "prompt_logprobs": 0})
    try:
        rows = answer["choices"][0]["prompt_logprobs"][len(probe.prompt_ids) :]
        pairs = zip(rows, probe.reply_ids, strict=True)
        return -sum(float(row[str(token)]["logprob"]) for row, token in pairs)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InspectError(
            f"{server.url} gives no prompt_logprobs. vLLM does: ask it itself, without a gateway."
        ) from error


def print_rendering(server: Server, found: record.Record) -> bool:
    """Print whether the server writes prompts as they were measured; return whether it does not.

    Clients mostly ask for nothing else, and get what the server does by default: that is compared.
    """
    kwargs = {"enable_thinking": bool(found.on.get("enable_thinking"))}
    for probe in found.probes:
        try:
            if rendered_by(server, probe, {}) == probe.prompt_ids:
                continue
            tokens = rendered_by(server, probe, {"chat_template_kwargs": kwargs})
        except (InspectError, KeyError) as error:
            say("rendered", f"not checked: {one_line(error, 75)}")
            return False
        mend = "start it with --chat-template ADAPTER/chat_template.jinja"
        if tokens == probe.prompt_ids:
            mend = f"start it with --default-chat-template-kwargs '{json.dumps(kwargs)}'"
        say("rendered", ["differently from when it was measured:", mend])
        return True
    say("rendered", f"all {len(found.probes)} prompts as when it was measured")
    return False


def rendered_by(server: Server, probe: record.Probe, more: dict[str, Any]) -> list[int]:
    """Return the tokens of a prompt as the server writes it."""
    body = {"model": server.adapter, "messages": probe.messages, "add_generation_prompt": True}
    return server.ask("/tokenize", body | more)["tokens"]


def find_server(url: str, wanted: str | None) -> Server:
    """Return the server at an address, with what it calls the adapter and its base."""
    server = Server(url)
    models = {one["id"]: one.get("parent") for one in server.ask("/v1/models")["data"]}
    adapters = [name for name, parent in models.items() if parent in models]
    name = wanted or (adapters[0] if len(adapters) == 1 else "")
    if name not in adapters:
        raise InspectError(
            f"{url} offers the adapters {', '.join(adapters) or '(none)'}: choose one with --name, "
            "or start the server with --enable-lora --lora-modules NAME=FOLDER."
        )
    say("server", f"{url} offers {name}, an adapter of {models[name]}")
    return Server(url, name, models[name])
