"""served: the verdict on recorded answers of vLLM 0.32, and on a server that imitates them."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import ROOT
from runs import command, refused

from inspect_lora.__main__ import main
from inspect_lora.record import Probe, Record, read_record, save_record

RECORDED = json.loads((ROOT / "tests" / "served_vllm_0_32.json").read_text(encoding="utf-8"))
APPLIED, IGNORED, CANNOT_TELL = "applied", "ignored", "cannot tell"
VERDICTS = {"served-demo": APPLIED, "plain": IGNORED, "twice": CANNOT_TELL}


@contextlib.contextmanager
def running(answer):
    """Run a server on this machine; answer(path, body, headers) gives the status and a reply."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            status, reply = answer(self.path, body, self.headers)
            text = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = reply

        def log_message(self, *_):
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.fixture
def of_vllm(tmp_path):
    """Return the report on the adapter that vLLM served as "served-demo"."""
    asked = [one | {"messages": one["messages"][:-1]} for one in RECORDED["replies"]]
    probes = [Probe("recorded", **one) for one in asked]
    save_record(Record("adapter", "id", {}, {}, probes=probes, folder=tmp_path))
    return tmp_path


def replayed(path, body, _):
    """Return vLLM's recorded answer to a recorded question; no other is known."""
    if path == "/tokenize":  # prompts were recorded under one of the names
        body = body | {"model": "served-demo"}
    for one in RECORDED["exchanges"]:
        if (one["path"], one["body"] or {}) == (path, body):
            return one["status"], one["answer"]
    return 500, "not recorded"


def loss_by_hand(name, probe):
    """Return the loss of a reply in vLLM's answer for a model."""
    ids, first = probe["prompt_ids"] + probe["reply_ids"], len(probe["prompt_ids"])
    (rows,) = [
        one["answer"]["choices"][0]["prompt_logprobs"]
        for one in RECORDED["exchanges"]
        if one["path"] == "/v1/completions"
        and (one["body"]["model"], one["body"]["prompt"]) == (name, ids)
    ]
    return -sum(rows[n][str(ids[n])]["logprob"] for n in range(first, len(ids)))


@pytest.mark.parametrize("name", VERDICTS)
def test_vllms_own_answers_tell_applied_ignored_and_twice_as_strong(of_vllm, capfd, name):
    with running(replayed) as url:
        words = ["served", of_vllm, "--url", url, "--name", name]
        end, as_json = (command(capfd, [*words, *more], main) for more in ([], ["--json"]))
    told = json.loads(as_json.out)
    assert (told["schema"], told["verdict"]) == (1, VERDICTS[name])
    assert end.status == as_json.status == int(VERDICTS[name] != APPLIED)
    assert end.err == "" and "500" not in end.out
    replies = RECORDED["replies"]
    here = np.array([[one["base"], one["adapter"]] for one in replies])
    there = np.array([[loss_by_hand(model, one) for model in ("toy", name)] for one in replies])
    size = np.linalg.norm(here @ [1, -1])
    percent = 100 * np.linalg.norm((here - there) @ [1, -1]) / size
    limit = 100 * max(0.03, 2 * np.linalg.norm((here - there)[:, 0]) / size)
    assert f" {percent:.1f} %" in end.out and f" {limit:.1f} %" in end.out
    assert [100 * told["apart"], 100 * told["allowed"]] == pytest.approx([percent, limit])
    tokens = sum(len(reply["reply_ids"]) for reply in replies)
    assert [*told["losses"]["here"].values()] == pytest.approx(here.sum(0) / tokens)
    assert [*told["losses"]["on the server"].values()] == pytest.approx(there.sum(0) / tokens)


def test_a_vllm_that_lets_the_model_think_is_told(of_vllm, capfd):
    def with_thinking(path, body, headers):
        if path == "/tokenize" and not body.pop("chat_template_kwargs", None):
            body["chat_template_kwargs"] = {"enable_thinking": True}
        return replayed(path, body, headers)

    with running(with_thinking) as url:
        end = command(capfd, ["served", of_vllm, "--url", url, "--name", "served-demo"], main)
    assert end.status == 1
    assert """--default-chat-template-kwargs '{"enable_thinking": false}'""" in end.out


class Imitation:
    """A server that knows the losses of some replies, and applies the adapter to a share."""

    def __init__(self, probes):
        self.probes = {tuple(one.prompt_ids + one.reply_ids): one for one in probes}
        self.prompts = {json.dumps(one.messages): one.prompt_ids for one in probes}
        self.parents = {"toy": None, "companion": "toy"}
        self.share = lambda number: 1.0  # of the adapter's effect, by the number of the reply
        self.noise = 0.0  # of the base's losses, as a share of the adapter's effect
        self.change = {}  # another answer by its path

    def __call__(self, path, body, _):
        if path in self.change:
            return self.change[path]
        if path == "/v1/models":
            rows = [{"id": name, "parent": parent} for name, parent in self.parents.items()]
            return 200, {"data": rows}
        if path == "/tokenize":
            return 200, {"tokens": self.prompts[json.dumps(body["messages"])]}
        probe = self.probes[tuple(body["prompt"])]
        number = [*self.probes.values()].index(probe)
        effect = probe.adapter - probe.base
        loss = probe.base + self.noise * effect * (-1) ** number
        loss += self.share(number) * effect if body["model"] == "companion" else 0
        each = {"logprob": -loss / len(probe.reply_ids)}
        rows = [None, *({str(token): each} for token in body["prompt"][1:])]
        return 200, {"choices": [{"prompt_logprobs": rows}]}


@pytest.fixture
def ask(record, capfd):
    """Return ask(...): it asks ask.server; with keys it must be refused, and name them."""

    def run(*flags, suffix="", keys=()):
        with running(run.server) as url:
            words = ["served", record, "--url", url + suffix, *flags]
            if keys:
                return refused(capfd, words, *keys, main=main)
            end = command(capfd, [*words, "--json"], main)
            end.told = json.loads(end.out)
            return end

    run.server = Imitation(read_record(record).probes)
    return run


@pytest.mark.parametrize(
    ("share", "noise", "verdict"),
    [  # a share of 0.03 may be apart, or twice the base's noise, at most 0.3
        (lambda _: 1.0, 0, APPLIED), (lambda _: 1.02, 0, APPLIED), (lambda _: 0.5, 0, CANNOT_TELL),
        (lambda _: 0.0, 0, IGNORED), (lambda _: 1.1, 0.06, APPLIED), (lambda _: 0.1, 0.06, IGNORED),
        (lambda _: 1.15, 0.06, CANNOT_TELL), (lambda _: 0.0, 1.1, CANNOT_TELL),
        (lambda _: 1.35, 2, CANNOT_TELL),
        (lambda number: 1 + 0.4 * (-1) ** number, 0, CANNOT_TELL),  # on average it is the same
    ],
)  # fmt: skip
def test_the_verdict_on_every_strength(ask, share, noise, verdict):
    ask.server.share, ask.server.noise = share, noise
    end = ask()
    assert (end.told["verdict"], end.status) == (verdict, int(verdict != APPLIED)) and not end.err
    assert noise or share(0) != 0.5 or end.told["apart"] == pytest.approx(0.5)


def test_the_rendering_is_compared_if_the_server_tells_it(ask):
    ask.server.change["/tokenize"] = (404, "closed")
    end = ask()
    assert end.status == 0 and "/tokenize:" in end.told["rendering"]
    ask.server.change["/tokenize"] = (200, {"tokens": [7, 8, 9]})
    end = ask()
    assert end.status == 1 and "--chat-template" in end.told["mend"].split()
    assert end.told["verdict"] == APPLIED
    ask.server.share = lambda _: 0.0
    assert ask().told["verdict"] == IGNORED


def test_of_several_adapters_one_is_named(ask):
    assert ask(suffix="/v1/").told["verdict"] == APPLIED
    ask.server.parents["other"] = "toy"
    ask(keys=["companion", "other", "--name"])
    assert ask("--name", "companion").told["verdict"] == APPLIED
    ask("--name", "toy", keys=["companion"])
    ask.server.parents = {"toy": None}
    ask(keys=["--lora-modules"])
