"""inspect_lora.py served: every outcome, with answers of a real vLLM and of an imitation of it."""

import argparse
import contextlib
import copy
import json
import shutil
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from transformers import AutoTokenizer

import train_lora_single as t

inspect_lora = pytest.importorskip("inspect_lora")

RECORDED = json.loads((ROOT / "tests" / "served_vllm_0_32.json").read_text(encoding="utf-8"))
THINKING_OFF = '{"enable_thinking": false}'


@contextlib.contextmanager
def running(answer):
    """Run a server on this machine; answer(method, path, body, headers) gives status and reply."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, reply = answer(self.command, self.path, body, self.headers)
            text = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
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
        return path, json.dumps(body, sort_keys=True)

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
        inspect_lora.Asked(
            t.Example("recorded", one["messages"], "", one["prompt_ids"], one["reply_ids"]),
            one["base"],
            one["adapter"],
        )
        for one in RECORDED["replies"]
    ]


def options_of(url, *flags):
    return inspect_lora.parse_options(["served", url, "output/demo/final_lora", *flags])


@pytest.mark.parametrize(
    "name, slope, said",
    [
        ("served-demo", 1.0, ""),
        ("plain", 0.0, "The base answers under the adapter's name"),
        ("twice", None, "another scaling or in part"),
    ],
)
def test_vllms_own_answers_tell_applied_from_ignored_and_rescaled(
    replay, capsys, name, slope, said
):
    options = options_of(replay, "--name", name)
    server = inspect_lora.find_server(options, Path(options.adapter))
    assert (server.adapter, server.base, server.window) == (name, "toy", 512)
    asked = asked_of_vllm()
    inspect_lora.ask_for_losses(server, asked)
    found = inspect_lora.agreement_of(asked)
    if slope is not None:
        assert found.slope.value == pytest.approx(slope, abs=0.01)
    # The slope by other means, and the server's bfloat16 against the float32 that was trained in.
    xs, ys = [one.here for one in asked], [one.there for one in asked]
    by_hand = sum(x * y for x, y in zip(xs, ys, strict=True)) / sum(x * x for x in xs)
    assert found.slope.value == pytest.approx(by_hand)
    assert found.noise < 0.1 < found.size
    problem = inspect_lora.judge_losses(server, asked, options)
    assert problem.startswith(said) or said in problem
    assert bool(problem) == bool(said)
    if said:
        assert f"It has {name} from {server.folder}." in problem
    assert (
        f"{sum(ys) / sum(len(one.example.reply_ids) for one in asked):+.4f}"
        in capsys.readouterr().out
    )


def test_a_loss_is_the_sum_over_the_reply_in_vllms_answer(replay):
    server = inspect_lora.Server(replay, "served-demo", "toy")
    reply = RECORDED["replies"][0]
    found = inspect_lora.score(server, "toy", reply["prompt_ids"], reply["reply_ids"])
    rows = recorded("/v1/completions", "toy")[0]["choices"][0]["prompt_logprobs"]
    assert rows[0] is None and len(rows) == len(reply["prompt_ids"] + reply["reply_ids"])
    places = range(len(reply["prompt_ids"]), len(rows))
    ids = reply["prompt_ids"] + reply["reply_ids"]
    assert found == [rows[place][str(ids[place])]["logprob"] for place in places]
    assert sum(found) == pytest.approx(-reply["base"], abs=0.1)


def test_vllm_renders_as_in_training_unless_it_lets_the_model_think(replay):
    server = inspect_lora.Server(replay, "served-demo", "toy")
    for one in asked_of_vllm():
        trained = one.example.prompt_ids
        assert inspect_lora.rendered_by(server, one.example, {}) == (trained, "")
        thinking, reason = inspect_lora.rendered_by(server, one.example, {"enable_thinking": True})
        assert not reason and thinking == trained[:-4]  # without the end of the empty thought


@pytest.mark.parametrize("name, is_stale", [("toy", False), ("swap", True)])
def test_vllms_stale_cache_is_seen(replay, capsys, name, is_stale):
    server = inspect_lora.Server(replay, name, "toy", window=512)
    asked = [inspect_lora.Asked(t.Example("", [], "", RECORDED["long_prompt"], [1]), 2.0, 1.0)]
    problem = inspect_lora.check_generation(server, asked)
    assert ("are stale" in problem) == is_stale
    assert "(base: 0.0011)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "model, prompt, message",
    [("companion", [1, 2, 3], "The model `companion` does not exist"), ("toy", [1], "vocabulary")],
)
def test_what_vllm_says_of_an_error_is_passed_on(replay, model, prompt, message):
    reply = [4] if model == "companion" else [99999999]
    with pytest.raises(SystemExit, match=message) as stop:
        inspect_lora.score(inspect_lora.Server(replay), model, prompt, reply)
    assert "So replies cannot be scored" in str(stop.value)


# ==== An imitation, for the whole command


class Imitation:
    """A server with vLLM's answers, which applies the adapter of a finished run as it is told to.

    Its answers are recorded ones, with other numbers in them.
    """

    def __init__(self, output):
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
        self.tokenizer = AutoTokenizer.from_pretrained(TINY)
        chat_format = t.ChatFormat(self.tokenizer, [self.tokenizer.eos_token_id])
        examples, problems = t.read_examples(record["settings"]["EVAL_FILE"], "kind")
        examples, more = t.encode_file(examples, chat_format, 512)
        assert not problems and not more and len(examples) == 4
        self.losses = {
            tuple(example.input_ids): (len(example.prompt_ids), row)
            for example, row in zip(examples, record["evidence"]["losses"], strict=True)
        }
        self.models = {"toy": (TINY, None), "companion": ("output/final_lora_vllm", "toy")}
        self.share = {"toy": lambda _: 0.0, "companion": lambda _: 1.0}  # of the effect, by reply
        self.base_differs = 0.0  # in nats a token, in turn up and down
        self.window = 512
        self.kwargs = {"enable_thinking": False}  # --default-chat-template-kwargs
        self.generation_differs = {}  # in nats a token, by name
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
        assert body["temperature"] == 0
        ids, name = body["prompt"], body["model"]
        if body["max_tokens"] > 1:
            answer = copy.deepcopy(recorded("/v1/completions", "swap")[0])
            choice = answer["choices"][0]
            number = -1.0 + self.generation_differs.get(name, 0.0)
            choice["logprobs"]["token_logprobs"] = [number] * len(choice["token_ids"])
            return answer
        assert body["prompt_logprobs"] == 0 and body["max_tokens"] == 1
        answer = copy.deepcopy(recorded("/v1/completions", "toy")[0])
        length, row = self.losses.get(tuple(ids), (0, {"base": 1.0, "adapter": 1.0}))
        number = list(self.losses).index(tuple(ids)) if length else 0
        loss = row["base"] + self.share[name](number) * (row["adapter"] - row["base"])
        loss += self.base_differs * (-1) ** number if length else 0
        rows = [{str(token): {"logprob": -loss, "rank": 1, "decoded_token": ""}} for token in ids]
        answer["choices"][0]["prompt_logprobs"] = [None, *rows[1:]]
        return answer


@pytest.fixture
def imitation(finished):
    return Imitation(finished)


@pytest.fixture
def ask(finished, imitation, capsys):
    """Return a function that gives the command; it returns the status and what was printed."""

    def run(*flags, adapter=finished / "final_lora", suffix=""):
        capsys.readouterr()
        status = 0
        with running(imitation) as url:
            try:
                inspect_lora.main(["served", url + suffix, str(adapter), *flags])
            except SystemExit as stop:
                status = stop.code
        out, err = capsys.readouterr()
        assert all(len(line) <= 100 for line in out.splitlines() if "/" not in line)
        return types.SimpleNamespace(status=status, out=out, err=" ".join(err.split()), raw=err)

    return run


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_an_applied_adapter_gives_status_0_whatever_the_address_ends_with(ask, imitation, suffix):
    found = ask(suffix=suffix)
    assert found.status == 0 and not found.err
    assert "the server applies the adapter under the name companion" in found.out
    assert "slope 1.000 ± 0.000" in found.out and "single replies differ by 0.0 %" in found.out
    assert "by its defaults the server writes all 4 prompts as in training" in found.out
    assert "run.json" in found.out and "measured just now" not in found.out
    assert {path for _, path, _, _ in imitation.requests} == {
        "/v1/models", "/tokenize", "/v1/completions"
    }  # fmt: skip


def test_a_reply_is_generated_before_anything_is_scored_and_the_adapter_is_asked_twice(
    ask, imitation
):
    ask()
    bodies = [body for _, path, body, _ in imitation.requests if path == "/v1/completions"]
    generated = [body["max_tokens"] > 1 for body in bodies]
    names = [body["model"] for body in bodies]
    assert generated[:4] == [True, False, True, False] and not any(generated[4:])
    assert names[4:] == ["toy", "companion", "companion"] * 4
    longest = max(length for length, _ in imitation.losses.values())
    assert len(bodies[0]["prompt"]) == longest


def test_an_ignored_adapter_is_told_with_what_to_do(ask, imitation, finished):
    imitation.share["companion"] = imitation.share["toy"]
    imitation.models["companion"] = (str(finished / "final_lora"), "toy")
    found = ask()
    assert found.status == 1 and "applied  " not in found.out
    assert "The base answers under the adapter's name" in found.err and "slope 0.000" in found.err
    assert f"Give the server the folder {finished / 'final_lora_vllm'}" in found.err
    assert f"It has companion from {finished / 'final_lora'}." in found.err


def test_where_the_run_wrote_no_second_folder_for_vllm_is_the_advice(ask, imitation, finished):
    imitation.share["companion"] = imitation.share["toy"]
    adapter = finished / "final_lora_vllm"
    found = ask(adapter=adapter)
    assert found.status == 1 and f"inspect_lora.py for_vllm {adapter} FOLDER` writes" in found.err


@pytest.mark.parametrize("share", [lambda _: 0.5, lambda _: 2.0, lambda n: 1.0 + 0.3 * (-1) ** n])
def test_another_scaling_or_a_part_is_told(ask, imitation, share):
    imitation.share["companion"] = share
    found = ask()
    assert found.status == 1 and "another scaling or in part" in found.err
    assert "Compare r, lora_alpha and use_rslora" in found.err and "its log" in found.err
    assert "same base model" not in found.err


def test_a_slope_of_0_is_not_called_ignored_if_the_adapter_changes_the_replies(ask, imitation):
    rows = [row for _, row in imitation.losses.values()]
    here = [row["tokens"] * (row["adapter"] - row["base"]) for row in rows]
    last = sum(x * x for x in here[:-1]) / here[-1] ** 2  # so that the sum of x y is 0
    imitation.share["companion"] = lambda number: -last if number == 3 else 1.0
    found = ask()
    assert "slope 0.000" in found.out.replace("-0.000", "0.000") and found.status == 1
    assert "another scaling or in part" in found.err and "The base answers" not in found.err


@pytest.mark.parametrize("sign", [1, -1])
def test_the_base_elsewhere_may_differ_by_half_of_what_is_allowed(ask, imitation, sign):
    rows = [row for _, row in imitation.losses.values()]
    effect = min(abs(row["adapter"] - row["base"]) for row in rows)
    imitation.base_differs = sign * effect / 20
    assert ask().status == 0
    imitation.share["companion"] = imitation.share["toy"]
    assert "The base answers under the adapter's name" in ask().err


def test_an_effect_below_the_noise_is_too_weak_to_tell(ask, imitation):
    rows = [row for _, row in imitation.losses.values()]
    imitation.base_differs = 3 * max(abs(row["adapter"] - row["base"]) for row in rows)
    imitation.share["companion"] = lambda number: 1.5 - number
    found = ask()
    assert found.status == 1 and "too weak to tell" in found.err and "--eval_file" in found.err


def test_no_effect_at_all_is_too_weak_to_tell(capsys):
    example = t.Example("", [], "", [1], [2])
    asked = [inspect_lora.Asked(example, 2.0, 2.0, 2.0, 2.0, 2.0) for _ in range(4)]
    server = inspect_lora.Server("http://nowhere", "companion", "toy")
    problem = inspect_lora.judge_losses(server, asked, options_of("http://nowhere"))
    assert "too weak to tell" in problem and "nan" not in problem
    assert "nan" not in capsys.readouterr().out


def test_another_base_model_is_suspected_where_the_changes_differ_too(ask, imitation):
    for name in imitation.share:
        imitation.share[name] = lambda number, share=imitation.share[name]: share(number) - 2.0
    imitation.share["companion"] = lambda _: -1.5
    found = ask()
    assert found.status == 1 and "same base model, unquantized" in found.err


def test_replicas_that_answer_in_two_ways_are_told(ask, imitation):
    turn = iter(range(10**6))
    imitation.share["companion"] = lambda _: float(next(turn) % 2)
    found = ask()
    assert found.status == 1 and "The server's answers differ" in found.err
    assert "4 of 4 replies" in found.err and "by its own address" in found.err


# ---- Rendering


def test_a_prompt_that_is_rendered_otherwise_is_shown_with_what_to_do(ask, imitation):
    imitation.kwargs = {}  # as a server is started by default: the model thinks
    found = ask()
    assert found.status == 1 and "applied  " not in found.out
    assert "by its defaults the server writes 4 of 4 prompts otherwise" in found.out
    assert r"<think>\n\n</think>\n\n'" in found.out  # the place, decoded
    assert "The server applies the adapter as companion, but:" in found.err
    assert "The prompt is rendered otherwise than in training, by its defaults" in found.err
    assert f"--default-chat-template-kwargs '{THINKING_OFF}'" in found.err
    assert f'"chat_template_kwargs": {THINKING_OFF}' in found.err


def test_what_clients_send_is_rendered_too(ask, imitation):
    imitation.kwargs = {}
    found = ask("--chat_template_kwargs", THINKING_OFF)
    assert found.status == 0 and f"with {THINKING_OFF} the server writes all 4" in found.out
    imitation.kwargs = {"enable_thinking": False}
    found = ask("--chat-template-kwargs", '{"enable_thinking": true}')
    assert found.status == 1 and 'with {"enable_thinking": true}' in found.err


def test_another_chat_template_is_no_matter_of_thinking(ask, imitation):
    def with_a_bell(status, answer):
        return status, answer | {"tokens": [7, *answer["tokens"]]}

    imitation.change["/tokenize"] = with_a_bell
    found = ask()
    assert found.status == 1 and "--chat-template." in found.err
    assert "enable_thinking" not in found.err


@pytest.mark.parametrize("status", [401, 403, 404, 405])
def test_where_tokenize_is_closed_it_is_only_noted(ask, imitation, status):
    imitation.change["/tokenize"] = lambda *_: (status, "closed")
    found = ask()
    assert found.status == 0
    assert f"not checked, since /tokenize is closed ({status})" in found.out


@pytest.mark.parametrize(
    "answer, said",
    [
        ((200, {"tokens": []}), "/tokenize does not take messages"),
        ((200, "<html>"), "/tokenize answers 200: <html>"),
        ((500, {"error": {"message": "no template"}}), "/tokenize answers 500: no template"),
    ],
)
def test_what_else_tokenize_says_is_noted(ask, imitation, answer, said):
    imitation.change["/tokenize"] = lambda *_: answer
    found = ask()
    assert found.status == 0 and f"not checked, since {said}" in found.out


# ---- Generation


def test_stale_replies_are_told_though_the_scores_are_right(ask, imitation):
    imitation.generation_differs = {"companion": 0.05, "toy": 0.001}
    found = ask()
    assert found.status == 1 and "The server applies the adapter as companion, but:" in found.err
    assert "Replies under the name companion are stale" in found.err
    assert "another folder or under another name, or restart" in found.err


def test_rounding_that_the_base_has_as_well_is_not_called_stale(ask, imitation):
    imitation.generation_differs = {"companion": 0.05, "toy": -0.02}
    found = ask()
    assert found.status == 0 and "0.0500 nats from the server's own scores" in found.out


def test_a_server_that_does_not_tell_the_tokens_of_a_reply_is_only_noted(ask, imitation):
    def without_ids(status, answer):
        answer["choices"][0]["token_ids"] = None
        return status, answer

    imitation.change["/v1/completions"] = without_ids
    found = ask()
    assert found.status == 0 and "not compared with its scores" in found.out


def test_no_room_for_a_reply_is_noted(ask, imitation):
    imitation.window = max(map(len, imitation.losses)) + 1
    shortest = min(length for length, _ in imitation.losses.values())
    assert shortest + inspect_lora.TOKENS_TO_GENERATE >= imitation.window  # else choose others
    found = ask()
    assert found.status == 0 and "no prompt leaves room for a reply" in found.out


# ---- Names


def test_the_entry_with_a_parent_is_the_adapter_and_name_chooses(ask, imitation):
    imitation.models["other"] = ("elsewhere", "toy")
    found = ask()
    assert found.status == 1 and "several adapters: companion, other" in found.err
    assert "--name" in found.err
    assert ask("--name", "companion").status == 0


@pytest.mark.parametrize("name, root", [("mine", "final_lora_vllm"), ("output", "elsewhere")])
def test_of_several_adapters_the_folder_or_the_printed_name_tells_which(
    ask, imitation, finished, name, root
):
    del imitation.models["companion"]
    imitation.models |= {"other": ("x", "toy"), name: (str(finished / root), "toy")}
    imitation.share |= {"other": lambda _: 0.0, name: lambda _: 1.0}
    found = ask()
    assert found.status == 0 and f"under the name {name}" in found.out


def test_a_name_that_is_not_offered_is_told_with_those_that_are(ask, imitation):
    found = ask("--name", "nell")
    assert found.status == 1 and "does not offer nell; it offers toy, companion" in found.err
    assert [path for _, path, _, _ in imitation.requests] == ["/v1/models"]


def test_the_bases_name_is_no_adapter(ask):
    found = ask("--name", "toy")
    assert found.status == 1 and "as a model of its own" in found.err


def test_a_server_without_adapters_is_told_how_to_get_one(ask, imitation, finished):
    del imitation.models["companion"]
    found = ask()
    assert found.status == 1 and "offers no adapter, only toy" in found.err
    assert f"--lora-modules output={finished / 'final_lora_vllm'}" in found.err


# ---- What cannot be asked


@pytest.mark.parametrize("value", [None, [None], "left out", "not a number"])
def test_a_server_that_cannot_score_is_told(ask, imitation, value):
    def without_scores(status, answer):
        choice = answer["choices"][0]
        if value == "left out":
            del choice["prompt_logprobs"]
        elif value == "not a number":
            for row in choice["prompt_logprobs"] or []:
                for number in (row or {}).values():
                    number["logprob"] = float("nan")
        else:
            choice["prompt_logprobs"] = value
        return status, answer

    imitation.change["/v1/completions"] = without_scores
    found = ask()
    assert found.status == 1 and "gives no probability for each token" in found.err
    assert "So replies cannot be scored" in found.err


def test_a_refused_question_is_told_with_the_servers_words(ask, imitation):
    refusal = {"error": {"message": "prompt_logprobs is not supported", "code": 400}}

    def refuse(status, answer):
        asks_for_scores = imitation.requests[-1][2].get("prompt_logprobs") is not None
        return (400, refusal) if asks_for_scores else (status, answer)

    imitation.change["/v1/completions"] = refuse
    found = ask()
    assert found.status == 1 and "answers 400: prompt_logprobs is not supported" in found.err


def test_too_small_a_window_is_told(ask, imitation):
    imitation.window = min(map(len, imitation.losses))
    found = ask()
    assert found.status == 1 and "can score 0 of the 4 held-out replies" in found.err
    assert "--max-model-len" in found.err


def test_too_few_replies_are_told(finished, imitation, ask, tmp_path):
    lines = (finished.parent / "eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "two.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    imitation.window = None  # other servers do not say it
    found = ask("--eval_file", str(tmp_path / "two.jsonl"))
    assert found.status == 1 and "can score 2 of the 2 held-out replies, and 3 are" in found.err


def test_a_server_that_is_not_there_is_told(finished, capsys):
    with running(lambda *_: (200, {})) as url:
        pass  # and its port is free again
    with pytest.raises(SystemExit) as stop:
        inspect_lora.main(["served", url, str(finished / "final_lora")])
    text = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 1 and f"{url}/v1/models cannot be reached" in text
    assert "Is the server running" in text


@pytest.mark.parametrize("address", ["localhost:8000", "8000", "ftp://localhost", "http://"])
def test_what_is_no_address_is_told(finished, capsys, address):
    with pytest.raises(SystemExit) as stop:
        inspect_lora.main(["served", address, str(finished / "final_lora")])
    text = capsys.readouterr().err
    assert stop.value.code == 1 and "http://localhost:8000" in text and "Traceback" not in text


@pytest.mark.parametrize(
    "answer, said",
    [
        ((200, "<html>Welcome</html>"), "no object in JSON: <html>Welcome</html>"),
        ((200, ["toy"]), "no object in JSON: ['toy']"),
        ((200, {"models": []}), "does not list models"),
        ((404, "nothing"), "there is no such page (404)"),
        ((503, ""), "answers 503"),
        ((307, ""), "answers 307"),
    ],
)
def test_another_kind_of_server_is_told(ask, imitation, answer, said):
    imitation.change["/v1/models"] = lambda *_: answer
    found = ask()
    assert found.status == 1 and said in found.err and "Traceback" not in found.err


# ---- Keys


@pytest.mark.parametrize(
    "keys, sent",
    [
        ({}, None),
        ({"OPENAI_API_KEY": "one"}, "Bearer one"),
        ({"VLLM_API_KEY": "two"}, "Bearer two"),
        ({"OPENAI_API_KEY": "one", "VLLM_API_KEY": "two"}, "Bearer two"),
    ],
)
def test_the_key_of_the_environment_is_sent_with_every_question(
    ask, imitation, monkeypatch, keys, sent
):
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    found = ask()
    assert found.status == 0 and {key for *_, key in imitation.requests} == {sent}
    assert "one" not in found.out.split() and "two" not in found.out.split()


def test_a_server_that_asks_for_a_key_is_told(ask, imitation):
    (answer,) = recorded("/v1/models", status=401)
    imitation.change["/v1/models"] = lambda *_: (401, answer)
    found = ask()
    assert found.status == 1 and "asks for a key (401: Unauthorized)" in found.err
    assert "VLLM_API_KEY or OPENAI_API_KEY" in found.err


# ---- Where the losses here come from


@pytest.fixture
def moved(finished, tmp_path):
    """Return the adapter of a copy of the finished run, whose held-out file may be changed."""
    output = shutil.copytree(finished, tmp_path / "output")
    held_out = shutil.copy(finished.parent / "eval.jsonl", tmp_path / "eval.jsonl")
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    old = record["settings"]["EVAL_FILE"]
    record["settings"]["EVAL_FILE"] = str(held_out)
    record["data"][str(held_out)] = record["data"].pop(old)
    (output / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return output / "final_lora"


def test_losses_in_run_json_are_taken_only_for_the_very_same_file(ask, moved):
    assert "are those in" in ask(adapter=moved).out
    with (moved.parent.parent / "eval.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n")  # the same lines, but another file
    found = ask(adapter=moved)
    assert found.status == 0 and "measured just now" in found.out
    assert "single replies differ by 0.0 %" in found.out  # as the run measured them


def test_losses_in_run_json_are_taken_only_for_the_very_same_tokens(ask, moved):
    path = moved.parent / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["evidence"]["losses"][0]["tokens"] += 1
    path.write_text(json.dumps(record), encoding="utf-8")
    assert "measured just now" in ask(adapter=moved).out


def test_a_checkpoints_losses_are_its_own(ask, moved, imitation):
    path = moved.parent / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    checkpoint = sorted((moved.parent / "checkpoints").iterdir())[-1]
    assert "measured just now" in ask(adapter=checkpoint).out
    record["checkpoint_findings"] = {checkpoint.name: {"evidence": record["evidence"]}}
    path.write_text(json.dumps(record), encoding="utf-8")
    assert "are those in" in ask(adapter=checkpoint).out


def test_an_adapter_of_another_trainer_is_measured_first(ask, finished, tmp_path):
    adapter = shutil.copytree(finished / "final_lora", tmp_path / "foreign")
    found = ask(adapter=adapter)
    assert found.status == 1 and "Held-out conversations are needed" in found.err
    flags = ["--eval_file", str(finished.parent / "eval.jsonl")]
    found = ask(*flags, "--device", "cpu", "--dtype", "float32", adapter=adapter)
    assert found.status == 0 and "measured just now" in found.out
    assert sorted(tmp_path.iterdir()) == [adapter]  # nothing is written


# ---- The flags, and the line that a run prints


@pytest.mark.parametrize("value", ["", "enable_thinking", "[]", "{'enable_thinking': false}"])
def test_kwargs_that_are_no_object_are_refused(finished, capsys, value):
    with pytest.raises(SystemExit) as stop:
        options_of("http://localhost:8000", "--chat_template_kwargs", value)
    text = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and "it must be an object in JSON" in text and THINKING_OFF in text


def test_no_flag_of_the_other_commands_is_taken_and_not_used(capsys):
    with pytest.raises(SystemExit) as stop:
        options_of("http://localhost:8000", "--max_new_tokens", "5")
    assert stop.value.code == 2


def test_a_run_prints_this_command_after_vllm_serve(finished):
    log = (finished / "all_logs.log").read_text(encoding="utf-8")
    after = log.partition("vllm serve")[2].replace("\\\n", " ")
    adapter = finished / "final_lora"
    assert f"inspect_lora.py served http://localhost:8000 {adapter}" in " ".join(after.split())


def test_the_printed_command_names_the_adapter_that_was_converted():
    settings = argparse.Namespace(MODEL_NAME=TINY, MODEL_REVISION="main")
    text = t.vllm_command(settings, Path("somewhere/new"), 8, "someone/adapter")
    lines = text.splitlines()
    assert "--lora-modules new=somewhere/new" in text and lines[0].endswith("named new:")
    assert lines[-1] == "python inspect_lora.py served http://localhost:8000 someone/adapter"
