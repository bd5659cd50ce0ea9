"""served: every outcome, with answers of a real vLLM and of an imitation of it."""

import argparse
import contextlib
import copy
import io
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import on_tiny
import pytest
from conftest import ROOT, TINY
from tiny_adapters import TENSORS, command
from transformers import AutoTokenizer

from inspect_lora import served
from inspect_lora.__main__ import main
from inspect_lora.common import InspectError, file_sha256
from inspect_lora.trainer import ChatFormat, Example, encode, read_conversations

RECORDED = json.loads((ROOT / "tests" / "served_vllm_0_32.json").read_text(encoding="utf-8"))
THINKING_OFF = '{"enable_thinking": false}'


@contextlib.contextmanager
def running(answer, missing=0):
    """Run a server on this machine; answer(method, path, body, headers) gives status and reply.

    So many bytes of each reply are missing at its end.
    """

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, reply = answer(self.command, self.path, body, self.headers)
            text = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text) + missing))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = reply

        def log_message(self, *_):
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def without_keys(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


# ==== Answers that vLLM 0.32 gave


def recorded(path, model=None, status=200):
    """Return the recorded answers of a path, a model and a status."""
    return [
        one["answer"]
        for one in RECORDED["exchanges"]
        if one["path"] == path
        and one["status"] == status
        and (model is None or one["body"]["model"] == model)
    ]


@pytest.fixture(scope="module")
def replay():
    """Return the address of a server that knows the recorded questions, and no other."""

    def key(path, body):
        return path, json.dumps(body or {}, sort_keys=True)

    known = {}
    for one in RECORDED["exchanges"]:
        known.setdefault(key(one["path"], one["body"]), (one["status"], one["answer"]))

    def answer(_, path, body, __):
        return known.get(key(path, body), (500, "this question was not recorded"))

    with running(answer) as url:
        yield url


def asked_of_vllm():
    """Return the recorded replies, with their losses here."""
    return [
        served.Asked(
            Example("recorded", one["messages"], {}, one["prompt_ids"], one["reply_ids"]),
            one["base"],
            one["adapter"],
        )
        for one in RECORDED["replies"]
    ]


@pytest.mark.parametrize(
    ("name", "percent", "said"),
    [
        ("served-demo", 0.4, ""),
        ("plain", 100.0, "The base answers under the adapter's name"),
        ("twice", 155.1, "another scaling or in part"),
    ],
)
def test_vllms_own_answers_tell_applied_from_ignored_and_rescaled(
    replay, capsys, name, percent, said
):
    options = argparse.Namespace(url=replay, name=name)
    server = served.find_server(options, Path("output/demo/final_lora"))
    assert (server.adapter, server.base, server.window) == (name, "toy", 512)
    asked = asked_of_vllm()
    served.ask_for_losses(server, asked)
    found = served.agreement_of(asked)
    # The distance by other means, and the server's bfloat16 against the float32 of the training.
    here, there = (np.array([getattr(one, name) for one in asked]) for name in ("here", "there"))
    distance = np.linalg.norm(there - here) / np.linalg.norm(here)
    assert found.apart == pytest.approx(distance)
    assert found.noise < 0.1 < found.size
    problem = served.judge_losses(server, asked, Path("output/demo/final_lora"))
    assert said in problem and bool(problem) == bool(said)
    if said:
        assert f"It has {name} from {server.folder}." in problem
        assert "started with --lora-target-modules, it leaves out all modules" in problem
    change = there.sum() / sum(len(one.example.reply_ids) for one in asked)
    out = capsys.readouterr().out
    assert f"{change:+.4f}" in out and f"the changes differ by {percent} %" in out
    # The limit is a thirtieth, or twice what the base's losses there and here are apart.
    limit = 100 * max(0.03, 2 * found.noise / found.size)
    assert f" % (up to {limit:.1f} % counts as the same)" in out


def test_a_loss_is_the_sum_over_the_reply_in_vllms_answer(replay):
    reply = RECORDED["replies"][0]
    found = served.score(served.Server(replay), "toy", reply["prompt_ids"], reply["reply_ids"])
    rows = recorded("/v1/completions", "toy")[0]["choices"][0]["prompt_logprobs"]
    ids = reply["prompt_ids"] + reply["reply_ids"]
    assert rows[0] is None and len(rows) == len(ids)
    places = range(len(reply["prompt_ids"]), len(rows))
    assert found == [rows[place][str(ids[place])]["logprob"] for place in places]
    assert sum(found) == pytest.approx(-reply["base"], abs=0.1)


def test_vllm_renders_as_in_training_unless_it_lets_the_model_think(replay):
    server = served.Server(replay, "served-demo", "toy")
    for one in asked_of_vllm():
        trained = one.example.prompt_ids
        assert served.rendered_by(server, one.example, {}) == (trained, "")
        thinking, reason = served.rendered_by(
            server, one.example, {"chat_template_kwargs": {"enable_thinking": True}}
        )
        assert not reason and thinking == trained[:-4]  # without the end of the empty thought


def test_what_vllm_says_of_an_error_is_passed_on(replay):
    with pytest.raises(InspectError, match="The model `companion` does not exist") as stop:
        served.score(served.Server(replay), "companion", [1, 2, 3], [4])
    assert "So replies cannot be scored" in str(stop.value)


# ==== An imitation, for the whole command


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return a folder with an adapter of PEFT alone that `evidence` measured, in "inspected"."""
    folder = tmp_path_factory.mktemp("measured")
    adapter = on_tiny.save_adapter(folder / "adapter")
    held_out = on_tiny.write_held_out(folder / "held-out.jsonl")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        main(["evidence", str(adapter), "--eval_file", held_out, *on_tiny.SHORT])
    return folder


class Imitation:
    """A server with vLLM's answers, which applies the measured adapter as it is told to.

    Its answers are recorded ones, with other numbers in them.
    """

    def __init__(self, path, held_out):
        """Know an evidence.json, and the held-out file that it is of."""
        evidence = json.loads(path.read_text(encoding="utf-8"))
        self.tokenizer = AutoTokenizer.from_pretrained(TINY)
        chat_format = ChatFormat(self.tokenizer, [self.tokenizer.eos_token_id])
        examples, problems = read_conversations(held_out)
        examples, more = encode(examples, chat_format, None)
        assert not problems and not more
        self.rows = evidence["losses"]
        pairs = zip(examples, self.rows, strict=True)
        self.losses = {tuple(example.input_ids): row for example, row in pairs}
        self.models = {"toy": (TINY, None), "companion": ("output/final_lora_vllm", "toy")}
        self.share = {"toy": lambda _: 0.0, "companion": lambda _: 1.0}  # of the effect, by reply
        self.base_differs = 0.0  # in nats a token, in turn up and down
        self.window = 512
        self.kwargs = {"enable_thinking": False}  # --default-chat-template-kwargs
        self.change = {}  # {path: function of the answer}
        self.requests = []

    def __call__(self, method, path, body, headers):
        self.requests.append((method, path, body, headers.get("Authorization")))
        answers = {
            "/v1/models": self.list_models,
            "/tokenize": self.tokenize,
            "/v1/completions": self.complete,
        }
        if path not in answers:
            return 404, {"detail": "Not Found"}
        reply = 200, answers[path](body)
        return self.change[path](*reply) if path in self.change else reply

    def list_models(self, _):
        answer = copy.deepcopy(recorded("/v1/models")[0])
        row = answer["data"][0]
        answer["data"] = [
            row | {"id": name, "root": root, "parent": parent}
            | {"max_model_len": None if parent else self.window}
            for name, (root, parent) in self.models.items()
        ]  # fmt: skip
        return answer

    def tokenize(self, body):
        assert body["add_generation_prompt"] is True and body["model"] in self.models
        answer = copy.deepcopy(recorded("/tokenize")[0])
        kwargs = self.kwargs | body.get("chat_template_kwargs", {})
        answer["tokens"] = self.tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_dict=False, **kwargs
        )
        return answer

    def complete(self, body):
        assert body["temperature"] == body["prompt_logprobs"] == 0 and body["max_tokens"] == 1
        answer = copy.deepcopy(recorded("/v1/completions", "toy")[0])
        ids, row = body["prompt"], self.losses[tuple(body["prompt"])]
        number = self.rows.index(row)
        loss = row["base"] + self.share[body["model"]](number) * (row["adapter"] - row["base"])
        loss += self.base_differs * (-1) ** number
        rows = [{str(token): {"logprob": -loss, "rank": 1, "decoded_token": ""}} for token in ids]
        answer["choices"][0]["prompt_logprobs"] = [None, *rows[1:]]
        return answer


@pytest.fixture
def imitation(measured):
    (path,) = measured.glob("inspected/*/evidence.json")
    return Imitation(path, measured / "held-out.jsonl")


@pytest.fixture
def ask(measured, imitation, capsys, monkeypatch):
    """Return a function that gives the command; it returns the status and what was printed."""
    monkeypatch.chdir(measured)

    def run(*flags, adapter="adapter", suffix=""):
        with running(imitation) as url:
            end = command(capsys, "served", url + suffix, adapter, *flags)
        assert all(len(line) <= 100 for line in end.out.splitlines() if "/" not in line)
        return end

    return run


@pytest.mark.parametrize("suffix", ["", "/v1/"])
def test_an_applied_adapter_gives_status_0_whatever_the_address_ends_with(ask, imitation, suffix):
    found = ask(suffix=suffix)
    assert found.status == 0 and not found.err
    assert "The server applies the adapter under the name companion." in found.said
    assert "on single replies the changes differ by 0.0 %" in found.out
    tokens = sum(row["tokens"] for row in imitation.rows)
    gain = sum(row["tokens"] * (row["base"] - row["adapter"]) for row in imitation.rows) / tokens
    said = re.search(r"base - adapter +(\S+) +(\S+)\n", found.out)  # above 0 is better
    assert list(said.groups()) == [f"{gain:+.4f}"] * 2 and "adapter - base" not in found.out
    assert "the server writes all 5 prompts as in training" in found.out
    assert "evidence.json" in found.out and "measured just now" not in found.out
    assert "not checked" not in found.out.lower()
    bodies = [body for _, path, body, _ in imitation.requests if path == "/v1/completions"]
    assert [body["model"] for body in bodies] == ["toy", "companion"] * 5
    assert {path for _, path, _, _ in imitation.requests} == {
        "/v1/models", "/tokenize", "/v1/completions"
    }  # fmt: skip


def test_an_ignored_adapter_is_told_with_what_to_do(ask, imitation):
    imitation.share["companion"] = imitation.share["toy"]
    found = ask()
    assert found.status == 1 and "applied  " not in found.out
    assert "The base answers under the adapter's name" in found.err
    assert "the changes differ by 100.0 %" in found.out
    assert re.search(r"base - adapter +\S+ +\+0\.0000\n", found.out)
    assert "inspect_lora export adapter FOLDER --vllm` writes" in found.err
    assert "It has companion from output/final_lora_vllm." in found.err


@pytest.mark.parametrize("share", [lambda _: 0.5, lambda _: 2.0, lambda n: 1.0 + 0.3 * (-1) ** n])
def test_another_scaling_or_a_part_is_told(ask, imitation, share):
    imitation.share["companion"] = share
    found = ask()
    assert found.status == 1 and "another scaling or in part" in found.err
    assert "Compare r, lora_alpha and use_rslora" in found.err and "its log" in found.err
    assert "same base model" not in found.err


def effects(imitation):
    """Return by how much the adapter changes the loss of each reply, in nats."""
    return [row["tokens"] * (row["adapter"] - row["base"]) for row in imitation.rows]


def test_a_mean_of_0_is_not_called_ignored_if_the_adapter_changes_the_replies(ask, imitation):
    *here, last = effects(imitation)
    share = sum(x * x for x in here) / last**2  # so that the changes there and here seem unrelated
    imitation.share["companion"] = lambda number: -share if number == 4 else 1.0
    found = ask()
    assert found.status == 1
    assert "another scaling or in part" in found.err and "The base answers" not in found.err


def test_the_base_elsewhere_may_differ_by_less_than_the_effect(ask, imitation):
    effect = min(abs(row["adapter"] - row["base"]) for row in imitation.rows)
    imitation.base_differs = effect / 20
    assert ask().status == 0
    imitation.share["companion"] = imitation.share["toy"]
    assert "The base answers under the adapter's name" in ask().err
    # Where it differs by more, it is too weak to tell.
    imitation.base_differs = 3 * max(abs(row["adapter"] - row["base"]) for row in imitation.rows)
    imitation.share["companion"] = lambda number: 1.5 - number
    found = ask()
    assert found.status == 1 and "too weak to tell" in found.err and "--eval_file" in found.err


@pytest.mark.parametrize(
    ("noise", "apart", "effect", "state"),
    [
        # All are shares of the changes here. By itself, 0.03 may be apart ...
        (0, 0.03, 1, "applied"), (0, 0.031, 1, "other"),
        (0, 1, 0.03, "ignored"), (0, 1, 0.031, "other"),
        # ... and twice what the base differs by, but no more than 0.3.
        (0.1, 0.2, 1, "applied"), (0.1, 0.21, 1, "other"),
        (0.4, 0.3, 1, "applied"), (0.15, 0.31, 1, "other"), (0.16, 0.31, 1, "weak"),
        (1, 1, 0.3, "ignored"), (1.1, 1, 0.3, "weak"),
    ],
)  # fmt: skip
def test_what_may_be_apart_grows_with_what_the_base_differs_by(noise, apart, effect, state):
    assert served.Agreement(1, noise, apart, effect).state() == state


def test_no_effect_at_all_is_too_weak_to_tell(capsys):
    example = Example("", [], {}, [1], [2])
    asked = [served.Asked(example, 2.0, 2.0, 2.0, 2.0) for _ in range(4)]
    problem = served.judge_losses(served.Server("", "companion", "toy"), asked, Path("adapter"))
    assert "too weak to tell" in problem and "nan" not in problem + capsys.readouterr().out


def test_another_base_model_is_suspected_where_the_changes_differ_too(ask, imitation):
    imitation.share = {"toy": lambda _: -2.0, "companion": lambda _: -1.5}
    found = ask()
    assert found.status == 1 and "same base model, unquantized" in found.err


# ---- Rendering


def test_a_prompt_that_is_rendered_otherwise_is_shown_with_what_to_do(ask, imitation):
    imitation.kwargs = {}  # as a server is started by default: the model thinks
    found = ask()
    assert found.status == 1 and "applied  " not in found.out
    assert "the server writes 5 of 5 prompts otherwise" in found.out
    assert r"<think>\n\n</think>\n\n'" in found.out  # the place, decoded
    assert "The server applies the adapter as companion, but:" in found.err
    assert f"--default-chat-template-kwargs '{THINKING_OFF}'" in found.err
    assert f'"chat_template_kwargs": {THINKING_OFF}' in found.err


def test_another_chat_template_is_no_matter_of_thinking(ask, imitation):
    def with_a_bell(status, answer):
        return status, answer | {"tokens": [7, *answer["tokens"]]}

    imitation.change["/tokenize"] = with_a_bell
    found = ask()
    assert found.status == 1 and "--chat-template." in found.err
    assert "enable_thinking" not in found.err


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, "closed"), "/tokenize is closed (404)"),
        ((200, {"tokens": []}), "/tokenize does not take messages"),
        ((200, {"tokens": "abc"}), "/tokenize does not take messages"),
        ((200, {"tokens": 5}), "/tokenize does not take messages"),
        ((200, {"tokens": ["a", "b"]}), "/tokenize answers with what are no tokens"),
        ((200, {"tokens": [10**11]}), "/tokenize answers with what are no tokens"),
        ((200, "<html>"), "/tokenize answers 200: <html>"),
        ((500, {"error": {"message": "no template"}}), "/tokenize answers 500: no template"),
    ],
)
def test_what_could_not_be_checked_is_said_on_the_last_line(ask, imitation, answer, said):
    imitation.change["/tokenize"] = lambda *_: answer
    found = ask()
    assert found.status == 0 and f"not checked, since {said}" in found.out
    last = " ".join(found.out.split()).partition("under the name companion.")[2]
    assert last.startswith(" Whether it writes prompts as in training could not be checked")


# ---- Names


def test_of_several_adapters_the_printed_name_or_the_flag_tells_which(ask, imitation):
    imitation.models["other"] = ("elsewhere", "toy")
    found = ask()
    assert found.status == 1 and "Its adapters are companion, other" in found.err
    assert ask("--name", "companion").status == 0
    imitation.models["adapter"] = imitation.models.pop("companion")
    imitation.share["adapter"] = imitation.share["companion"]
    found = ask()
    assert found.status == 0 and "under the name adapter" in found.out


@pytest.mark.parametrize("name", ["nell", "toy"])
def test_a_name_that_is_no_adapters_is_told(ask, imitation, name):
    found = ask("--name", name)
    assert found.status == 1 and f"no adapter of the name {name}" in found.err
    assert "Its adapters are companion, its other models toy." in found.err
    assert [path for _, path, _, _ in imitation.requests] == ["/v1/models"]


def test_a_server_without_adapters_is_told_how_to_get_one(ask, imitation):
    del imitation.models["companion"]
    found = ask()
    assert found.status == 1 and "Its adapters are none, its other models toy" in found.err
    assert "--lora-modules adapter=adapter" in found.err


# ---- What cannot be asked


@pytest.mark.parametrize("value", [None, "left out", "not a number", "too large"])
def test_a_server_that_cannot_score_is_told(ask, imitation, value):
    def without_scores(status, answer):
        choice = answer["choices"][0]
        if value == "left out":
            del choice["prompt_logprobs"]
        elif value in ("not a number", "too large"):
            for row in choice["prompt_logprobs"][1:]:
                for number in row.values():
                    number["logprob"] = float("nan") if value == "not a number" else 10**400
        else:
            choice["prompt_logprobs"] = value
        return status, answer

    imitation.change["/v1/completions"] = without_scores
    found = ask()
    assert found.status == 1 and "gives no probability for each token" in found.err
    assert "So replies cannot be scored" in found.err


def test_a_refused_question_is_told_with_the_servers_words(ask, imitation):
    refusal = {"error": {"message": "prompt_logprobs is not supported", "code": 400}}
    imitation.change["/v1/completions"] = lambda *_: (400, refusal)
    found = ask()
    assert found.status == 1 and "answers 400: prompt_logprobs is not supported" in found.err


def test_too_small_a_window_or_too_few_replies_are_told(ask, imitation, tmp_path):
    imitation.window = min(map(len, imitation.losses))
    found = ask()
    assert found.status == 1 and "can score 0 of the 5 held-out replies" in found.err
    assert "--max-model-len" in found.err
    imitation.window = None  # other servers do not say it
    held_out = on_tiny.write_held_out(tmp_path / "two.jsonl", on_tiny.SAID[2:])
    found = ask("--eval_file", held_out, "--device", "cpu")
    assert found.status == 1 and "can score 2 of the 2 held-out replies, and 3 are" in found.err


def test_a_server_that_is_not_there_is_told(measured, capsys):
    with running(lambda *_: (200, {})) as url:
        pass  # and its port is free again
    found = command(capsys, "served", url, measured / "adapter")
    assert found.status == 1 and f"{url}/v1/models cannot be reached" in found.err
    assert "Is the server running" in found.err


@pytest.mark.parametrize(
    "address", ["localhost:8000", "ftp://x", "http://", "http://a b", "http://[::1"]
)
def test_what_is_no_address_is_told(measured, capsys, address):
    found = command(capsys, "served", address, measured / "adapter")
    assert found.status == 1 and "http://localhost:8000" in found.err


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, "<html>Welcome</html>"), "answers 200: <html>Welcome</html>"),
        ((200, ["toy"]), "answers 200: ['toy']"),
        ((200, "[" * 100_000), "answers 200: [[[["),
        ((200, {"models": []}), "does not list models"),
        ((200, {"data": [{"id": "a", "parent": ["b"]}, {"id": "b"}]}), "Its adapters are none"),
        ((404, "nothing"), "answers 404: nothing"),
        ((503, ""), "answers 503"),
    ],
)
def test_another_kind_of_server_is_told(ask, imitation, answer, said):
    imitation.change["/v1/models"] = lambda *_: answer
    found = ask()
    assert found.status == 1 and said in found.err


def test_an_answer_that_ends_halfway_is_told(measured, capsys):
    """Of an error, too, whose text is read apart."""
    for status in (200, 500):
        with running(lambda *_, status=status: (status, "half"), missing=9) as url:
            found = command(capsys, "served", url, measured / "adapter")
        assert found.status == 1 and "cannot be reached (IncompleteRead" in found.err


def test_the_key_of_the_environment_is_sent_with_every_question(ask, imitation, monkeypatch):
    ask()
    assert {key for *_, key in imitation.requests} == {None}
    monkeypatch.setenv("OPENAI_API_KEY", "one")
    monkeypatch.setenv("VLLM_API_KEY", "two")
    imitation.requests.clear()
    assert "two" not in ask().said.split()
    assert {key for *_, key in imitation.requests} == {"Bearer two"}
    (answer,) = recorded("/v1/models", status=401)
    imitation.change["/v1/models"] = lambda *_: (401, answer)
    found = ask()
    assert found.status == 1 and "answers 401: Unauthorized" in found.err
    assert "VLLM_API_KEY or OPENAI_API_KEY" in found.err


# ---- Where the losses here come from


def test_recorded_losses_are_taken_for_the_same_adapter_and_the_same_file_alone(
    ask, measured, tmp_path
):
    same = shutil.copytree(measured / "adapter", tmp_path / "copy")
    assert "are those in inspected" in ask(adapter=same).said
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text((measured / "held-out.jsonl").read_text() + "\n")  # the same lines
    found = ask("--eval_file", held_out, "--device", "cpu")
    assert found.status == 0 and "measured just now" in found.out
    assert "the changes differ by 0.0 %" in found.out
    for flags in (["--device", "cpu"], ["--dtype", "float32"], ["--base", TINY]):
        assert "measured just now" in ask(*flags).out  # on the recorded file
    on_tiny.save_adapter(tmp_path / "other", std=0.2)
    found = ask(adapter=tmp_path / "other")
    assert found.status == 1 and "Held-out conversations are needed" in found.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "held-out.jsonl", "other"]


def test_of_several_records_the_newest_is_taken(ask, measured):
    (path,) = measured.glob("inspected/*/evidence.json")
    record = on_tiny.read_json(path)
    for name, date in (("a", "2001-01-01"), ("z", "2999-01-01")):
        other = measured / "inspected" / name / "evidence.json"
        other.parent.mkdir()
        other.write_text(json.dumps(record | {"measured": f"{date} 12:00:00"}), encoding="utf-8")
    try:
        assert "are those in inspected/z/evidence.json" in ask().said
    finally:
        for name in ("a", "z"):
            shutil.rmtree(measured / "inspected" / name)


def test_the_two_files_of_a_run_are_one_adapter(ask, measured, tmp_path):
    place = shutil.copytree(measured / "adapter", tmp_path / "final_lora_vllm")
    # As if that one had other names in it, and final_lora were the one that was measured.
    with (place / TENSORS).open("rb+") as file:
        text = file.read()
        file.seek(0)
        file.write(text.replace(b'"format":"pt"', b'"format":"pq"'))
    hashes = [file_sha256(one / TENSORS) for one in (measured / "adapter", place)]
    assert hashes[0] != hashes[1]
    names = ("final_lora", "final_lora_vllm")
    record = {"settings": {}, "adapter_sha256": dict(zip(names, hashes, strict=True))}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert "are those in inspected" in ask(adapter=place).said
    # A checkpoint of that run is another adapter.
    checkpoint = on_tiny.save_adapter(tmp_path / "checkpoints" / "checkpoint-3", std=0.2)
    assert "Held-out conversations are needed" in ask(adapter=checkpoint).err
