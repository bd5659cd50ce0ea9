"""The command `served`: whether a running server applies an adapter."""

import argparse
import http.client
import json
import math
import os
import re
import shlex
import statistics
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inspect_lora import vllm
from inspect_lora.common import InspectError, aligned, one_line, say, wrapped
from inspect_lora.record import Probe, Record, read_record

SCHEMA = 1  # of --json
# Shares of the adapter's effect that two right computations may be apart, at least and at most; in
# between it is twice what the base's losses here and there are apart (docs/serving.md).
MAY_BE_APART, MAY_BE_APART_AT_MOST = 0.03, 0.3
ADVICE = {
    "applied": "",
    "ignored": "If the base also takes images, vLLM before "
    f"{vllm.name_of(vllm.TEXT_NAMES_FROM)} ignores the names of a text model: serve "
    "final_lora_vllm, or what `export --vllm` writes. Otherwise see which folder /v1/models names "
    "for the adapter.",
    "cannot tell": "It is applied at another strength or in part, or the server has another "
    "adapter or base: compare the adapter_config.json that it reads, and see its log.",
}


def run(options: argparse.Namespace) -> int:
    """Ask the server, print what it answers; return 1 unless it applies and renders as here."""
    record = read_record(Path(options.folder))
    server = find_server(re.sub(r"(/v1)?/*$", "", options.url), options.name)
    if not record.probes:
        raise InspectError(f"{options.folder} has no replies to score: measure with --replies.")
    measured = [(probe.base, probe.adapter) for probe in record.probes]
    names = (server.base, server.adapter)
    scored = [tuple(score(server, name, probe) for name in names) for probe in record.probes]
    verdict, apart, allowed = judge(measured, scored)
    tokens = sum(len(probe.reply_ids) for probe in record.probes)
    sides = {"here": measured, "on the server": scored}
    losses = {
        side: [sum(column) / tokens for column in zip(*pairs, strict=True)]
        for side, pairs in sides.items()
    }
    rendering, mend = compare_rendering(server, record)
    if options.json:
        facts = {"server": server.url, "adapter": server.adapter, "base": server.base}
        facts |= {"verdict": verdict, "apart": apart, "allowed": allowed}
        facts |= {"rendering": rendering, "mend": mend}
        facts |= {"losses": {side: dict(zip(("base", "adapter"), pair, strict=True))
                             for side, pair in losses.items()}}  # fmt: skip
        print(json.dumps({"schema": SCHEMA} | facts, indent=1))
    else:
        say("server", f"{server.url} offers {server.adapter}, an adapter of {server.base}")
        rows = [
            ["base", *(f"{base:.4f}" for base, _ in losses.values())],
            ["base - adapter", *(f"{base - adapter:+.4f}" for base, adapter in losses.values())],
        ]
        say("scored", aligned([f"{len(measured)} replies, nats per token", *losses], rows))
        say("", f"on single replies the changes differ by {100 * apart:.1f} %; up to "
            f"{100 * allowed:.1f} % is the same")  # fmt: skip
        say("rendered", [rendering, *([mend] if mend else [])])
        say("verdict", [f"{server.adapter} on {server.url}: {verdict}", *wrapped(ADVICE[verdict])])
    return int(verdict != "applied" or bool(mend))


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
            answer = error.read().decode(errors="replace")
            raise InspectError(f"{self.url}{path}: {error.code} {one_line(answer)}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise InspectError(
                f"{self.url}{path} cannot be reached ({one_line(error)}): is --url right?"
            ) from error


Losses = list[tuple[float, float]]  # of each reply, in nats: the base's and the adapter's


def judge(measured: Losses, scored: Losses) -> tuple[str, float, float]:
    """Return "applied", "ignored" or "cannot tell", how far the changes differ, and may differ.

    Sizes are root mean squares over the replies, as shares of those measured: it is not enough
    that the changes agree on average.
    """
    changes, changes_scored = (
        [base - adapter for base, adapter in side] for side in (measured, scored)
    )
    size = root_mean_square(changes) or math.nan
    pairs = zip(changes, changes_scored, strict=True)
    apart = root_mean_square([change - other for change, other in pairs]) / size
    bases = zip(measured, scored, strict=True)
    noise = root_mean_square([reply[0] - other[0] for reply, other in bases]) / size
    allowed = min(max(MAY_BE_APART, 2 * noise), MAY_BE_APART_AT_MOST)
    if apart <= allowed:
        return "applied", apart, allowed
    is_ignored = noise <= 1 and root_mean_square(changes_scored) / size <= allowed
    return "ignored" if is_ignored else "cannot tell", apart, allowed


def root_mean_square(numbers: list[float]) -> float:
    """Return the square root of the mean of the squares."""
    return math.sqrt(statistics.fmean(number * number for number in numbers))


def score(server: Server, name: str, probe: Probe) -> float:
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


def compare_rendering(server: Server, record: Record) -> tuple[str, str]:
    """Return whether the server writes prompts as they were measured, and what mends it if not.

    Clients mostly ask for nothing else, and get what the server does by default: that is compared.
    """
    kwargs = {"enable_thinking": bool(record.conditions.get("enable_thinking"))}
    for probe in record.probes:
        try:
            if rendered_by(server, probe, {}) == probe.prompt_ids:
                continue
            tokens = rendered_by(server, probe, {"chat_template_kwargs": kwargs})
        except (InspectError, KeyError) as error:
            return f"not checked: {one_line(error, 75)}", ""
        flag = ["--chat-template", "ADAPTER/chat_template.jinja"]
        if tokens == probe.prompt_ids:
            flag = ["--default-chat-template-kwargs", json.dumps(kwargs)]
        return "differently from when it was measured", f"start it with {shlex.join(flag)}"
    return f"all {len(record.probes)} prompts as when it was measured", ""


def rendered_by(server: Server, probe: Probe, kwargs: dict[str, Any]) -> list[int]:
    """Return the tokens of a prompt as the server writes it."""
    body = {"model": server.adapter, "messages": probe.messages, "add_generation_prompt": True}
    return server.ask("/tokenize", body | kwargs)["tokens"]


def find_server(url: str, wanted: str | None) -> Server:
    """Return the server at an address, with what it calls the adapter and its base."""
    server = Server(url)
    models = {entry["id"]: entry.get("parent") for entry in server.ask("/v1/models")["data"]}
    adapters = [name for name, parent in models.items() if parent in models]
    name = wanted or (adapters[0] if len(adapters) == 1 else "")
    if name not in adapters:
        raise InspectError(
            f"{url} offers the adapters {', '.join(adapters) or '(none)'}: choose one with --name, "
            "or start the server with --enable-lora --lora-modules NAME=FOLDER."
        )
    return Server(url, name, models[name])
