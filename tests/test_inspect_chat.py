"""inspect_lora.py chat: what the model is sent, commands, a pipe, a terminal, what is refused."""

import hashlib
import io
import json
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, write_short_data
from processes import begin_on_a_terminal, run_in_a_fork
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import GenerationMixin

import train_lora_single as t

inspect_lora = pytest.importorskip("inspect_lora")

TENSORS = "adapter_model.safetensors"
SYSTEM = "You are Nell, an older person's companion."
WINDOW = 130  # tokens that the parrot's model can see


def change_tensors(path, change):
    tensors = load_file(path)
    for name, tensor in tensors.items():
        change(name, tensor)
    save_file(tensors, path, {"format": "pt"})


def change_json(path, **values):
    text = path.read_text(encoding="utf-8")
    path.write_text(json.dumps(json.loads(text) | values), encoding="utf-8")


def say_that_it_is_the_adapter(output):
    """Write the hash of the adapter in output into its run.json, as the run does."""
    digest = hashlib.sha256((output / "final_lora" / TENSORS).read_bytes()).hexdigest()
    change_json(output / "run.json", adapter_sha256={"final_lora": digest})


def louder(name, tensor):
    if "proj" in name and "language_model" in name:
        tensor.mul_(3)


def at_random(name, tensor):
    """Change A and B, so that what the run learned, and so the shipped data, does not matter."""
    tensor.normal_(std=0.3 if "lora_B" in name else 0.07)


@pytest.fixture(scope="module")
def parrot(finished, tmp_path_factory):
    """Return flags, output and model of an adapter whose replies differ from prompt to prompt.

    Those of the finished run hardly do. Its model would draw replies by chance, and has a short
    window.
    """
    folder = tmp_path_factory.mktemp("parrot")
    model, output = shutil.copytree(TINY, folder / "model"), folder / "output"
    change_tensors(model / "model.safetensors", louder)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["max_position_embeddings"] = WINDOW
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    change_json(model / "generation_config.json", do_sample=True, temperature=5.0, top_k=50)
    shutil.copytree(finished / "final_lora", output / "final_lora")
    shutil.copy(finished / "run.json", output)
    change_json(output / "run.json", system_message=SYSTEM)
    torch.manual_seed(6)
    change_tensors(output / "final_lora" / TENSORS, at_random)
    say_that_it_is_the_adapter(output)
    change_json(output / "final_lora" / "adapter_config.json", base_model_name_or_path=str(model))
    flags = ["--device", "cpu", "--dtype", "float32", "--max_new_tokens", "8"]
    base = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
    return types.SimpleNamespace(
        flags=flags, output=output, name=str(model), base=base,
        tokenizer=AutoTokenizer.from_pretrained(model),
    )  # fmt: skip


@pytest.fixture
def talk(parrot, monkeypatch, capsys):
    """Return a function that holds a chat with these lines as its standard input.

    It gives the status, the prompts' ids, the replies as [(who, text)], and what was printed. The
    replies whose numbers are in stopped meet a Ctrl-C.
    """
    generate = GenerationMixin.generate

    def run(*said, output=parrot.output, more=(), stopped=()):
        prompts = []

        def watched(self, ids, *given, **how):
            prompts.append(ids[0].tolist())
            if len(prompts) in stopped:
                raise KeyboardInterrupt
            return generate(self, ids, *given, **how)

        monkeypatch.setattr(GenerationMixin, "generate", watched)
        lines = [line if isinstance(line, bytes) else line.encode() for line in said]
        stdin = io.TextIOWrapper(io.BytesIO(b"".join(line + b"\n" for line in lines)), "utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        status = 0
        try:
            inspect_lora.main(["chat", str(output / "final_lora"), *parrot.flags, *more])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        pieces = re.split(r"^(you|base|adapter(?: x \S+)?)> ?", out, flags=re.MULTILINE)
        pairs = [*zip(pieces[1::2], pieces[2::2], strict=True)]
        replies = [(who, text.strip()) for who, text in pairs if who != "you"]
        return types.SimpleNamespace(
            status=status, prompts=prompts, replies=replies, out=out, err=err
        )

    return run


def ids_of(tokenizer, *turns, system=SYSTEM):
    """Return the ids of user and assistant in turn, rendered as the README says for a server."""
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, tokenize=False
    )
    assert text.endswith("assistant\n<think>\n\n</think>\n\n")
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def reply_by_hand(parrot, ids, scale=1.0):
    """Return the likeliest reply of weights merged by hand, without generate() and its cache."""
    tensors = load_file(parrot.output / "final_lora" / TENSORS)
    weights = {name: weight.clone() for name, weight in parrot.base.state_dict().items()}
    merged, new = dict(weights), []
    for name in [name for name in tensors if "lora_A" in name]:
        path = name.removeprefix("base_model.model.").replace("lora_A.", "")
        update = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        merged[path] = weights[path] + scale * 16 / 8 * update
    try:
        parrot.base.load_state_dict(merged)
        with torch.no_grad():
            while len(new) < 8 and parrot.tokenizer.eos_token_id not in new:
                logits = parrot.base(input_ids=torch.tensor([ids + new])).logits[0, -1]
                (best, second), (token, _) = logits.topk(2)
                assert best - second > 1e-4, "rounding could change this: take another seed"
                new.append(token.item())
    finally:
        parrot.base.load_state_dict(weights)
    return parrot.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_adapter_base_and_scale_reply_as_weights_merged_by_hand(parrot, talk):
    tokenizer, said = parrot.tokenizer, ("what's the time", "so?", "ok", "and?")
    scales, turns, prompts, replies = (1, 0, 0.5, 1), [], [], []
    for text, scale in zip(said, scales, strict=True):
        turns.append(text)
        prompts.append(ids_of(tokenizer, *turns))
        replies.append(reply_by_hand(parrot, prompts[-1], scale))
        turns.append(replies[-1])
    assert len({*replies}) == 4
    end = talk(
        "", said[0], "/base", f"  {said[1]}  ", "   ", "/scale 0.5", said[2], "/adapter", said[3],
        "/new", said[0],
    )  # fmt: skip
    assert end.status == 0
    who = ["adapter", "base", "adapter x 0.5", "adapter", "adapter"]
    assert end.replies == [*zip(who, [*replies, replies[0]], strict=True)]
    assert end.prompts == [*prompts, prompts[0]]


def test_the_prompt_is_the_one_that_was_trained_on(parrot, talk, finished, tmp_path):
    """The system message and the ids before the first learned token of a training line."""
    shutil.copytree(parrot.output / "final_lora", tmp_path / "final_lora")
    shutil.copy(finished / "run.json", tmp_path)
    say_that_it_is_the_adapter(tmp_path)
    record = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    (example, *_), _ = t.read_examples(record["settings"]["TRAIN_FILE"])
    chat_format = t.ChatFormat(parrot.tokenizer, [parrot.tokenizer.eos_token_id])
    prompt_ids, _ = t.render(example.messages, chat_format)
    assert [message["role"] for message in example.messages] == ["system", "user", "assistant"]
    end = talk(example.messages[1]["content"], output=tmp_path)
    assert end.prompts == [prompt_ids]


def test_a_run_without_a_system_message_is_talked_to_without_one(parrot, talk, tmp_path):
    shutil.copytree(parrot.output, tmp_path / "output")
    change_json(tmp_path / "output" / "run.json", system_message="")
    end = talk("hello", output=tmp_path / "output")
    assert end.prompts == [ids_of(parrot.tokenizer, "hello", system="")]


@pytest.mark.parametrize("system", ["You are a parrot.", ""])
def test_another_system_message_may_be_given_or_none(parrot, talk, system):
    end = talk("hello", more=["--system", system])
    assert end.prompts == [ids_of(parrot.tokenizer, "hello", system=system)]
    assert f"system message: {system or '(none)'}\n" in end.out


def test_an_adapter_that_was_trained_to_think_is_asked_to(parrot, talk):
    end = talk("hello", more=["--enable_thinking"])
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "hello"}]
    thinking = parrot.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=True, return_dict=False
    )
    assert end.prompts == [thinking] != [ids_of(parrot.tokenizer, "hello")]


@pytest.mark.parametrize("word", ["/quit", "/exit"])
def test_these_words_end_it(talk, word):
    end = talk("hello", word, "not answered")
    assert end.status == 0 and len(end.replies) == 1 and "not answered" not in end.out


def test_help_lists_the_commands_and_an_unknown_one_is_no_message(talk):
    end = talk("/help", "/Base", "/unknown 3", "hello")
    commands = ("/base", "/adapter", "/scale", "/new", "/help", "/quit", "/exit")
    assert all(end.out.count(f"\n{command} ") <= 3 for command in commands)
    assert all(command in end.out.partition("/Base")[0] for command in commands)
    assert "/Base is an unknown command" in end.out and "/unknown is an unknown" in end.out
    assert [who for who, _ in end.replies] == ["adapter"] and len(end.prompts) == 1


@pytest.mark.parametrize("wrong", ["", "x", "-1", "10.5", "nan", "inf", "0.5 now", "0,5"])
def test_a_wrong_scale_is_told_and_changes_nothing(talk, wrong):
    end = talk("/scale 0.25", f"/scale {wrong}", "hello")
    assert "/scale needs a number from 0" in end.out
    assert [who for who, _ in end.replies] == ["adapter x 0.25"]


def test_only_plain_lora_has_a_scale(talk, monkeypatch):
    monkeypatch.setattr(inspect_lora, "can_scale_and_cut", lambda model: False)
    end = talk("/scale 0.5", "hello")
    assert "/scale is for plain LoRA" in end.out
    assert [who for who, _ in end.replies] == ["adapter"]


def test_scale_0_is_the_base_and_scale_1_the_adapter(parrot, talk):
    end = talk("/scale 0", "hello", "/new", "/scale 1", "hello")
    ids = ids_of(parrot.tokenizer, "hello")
    expected = [("base", reply_by_hand(parrot, ids, 0)), ("adapter", reply_by_hand(parrot, ids))]
    assert end.replies == expected


def test_a_full_window_drops_the_oldest_turns_and_no_more(parrot, talk):
    """A question and its reply are dropped together, and there is room for the next reply."""
    said = [f"{'and ' * [14, 0, 1, 0, 3][n % 5]}day {n}?" for n in range(14)]
    end = talk(*said, "/new", " ".join(said))
    assert end.status == 0 and len(end.prompts) == 15
    turns, before_last_drop, with_half_a_pair = [], [], []
    for text, (_, reply), ids in zip(said, end.replies[:14], end.prompts[:14], strict=True):
        turns.append(text)
        while len(ids_of(parrot.tokenizer, *turns)) > WINDOW - 8:
            before_last_drop.append(len(ids_of(parrot.tokenizer, *turns)))
            with_half_a_pair.append(len(ids_of(parrot.tokenizer, *turns[1:])))
            del turns[:2]
        assert ids == ids_of(parrot.tokenizer, *turns)
        turns.append(reply)
    # Else a window without room for the reply, or half a pair dropped, would not be seen.
    assert min(before_last_drop) <= WINDOW and min(with_half_a_pair) <= WINDOW - 8
    # A single message that is too long is still sent.
    assert end.prompts[14] == ids_of(parrot.tokenizer, " ".join(said))
    assert len(end.prompts[14]) > WINDOW - 8


def test_a_message_whose_reply_was_stopped_is_forgotten(parrot, talk):
    end = talk("a story", "hello", stopped=[1])
    assert "[stopped]" in end.out and end.prompts[1] == ids_of(parrot.tokenizer, "hello")


def test_half_a_character_does_not_end_the_talk(talk):
    """As a terminal or a file sends it that does not speak UTF-8."""
    end = talk(b"caf\xe9", "hello")
    assert end.status == 0 and [who for who, _ in end.replies] == ["adapter", "adapter"]


def listing(folder):
    """Return all that a write below folder would change."""
    paths = [folder, *folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def test_the_end_of_input_ends_it_and_nothing_is_written(parrot, talk):
    before = listing(parrot.output.parent)
    assert talk("hello", "/scale 2", "hello").status == 0
    assert talk().status == 0 and listing(parrot.output.parent) == before


def test_the_system_message_is_the_adapters_and_not_a_newer_runs(parrot, talk, tmp_path):
    """A newer run has begun in the folder, and has not finished."""
    output = shutil.copytree(parrot.output, tmp_path / "output")
    (output / "run.json").rename(output / "run.json.2026-01-01-000000")
    record = json.loads((parrot.output / "run.json").read_text(encoding="utf-8"))
    others = {"adapter_sha256": {"final_lora": "0" * 64}}
    older = record | others | {"system_message": "You are old."}
    (output / "run.json.2025-01-01-000000").write_text(json.dumps(older))
    newer = record | {"adapter_sha256": {}, "system_message": "You are new."}
    (output / "run.json").write_text(json.dumps(newer | {"outcome": "failed: no memory"}))
    end = talk("hello", output=output)
    assert end.prompts == [ids_of(parrot.tokenizer, "hello")]


# ==== What is refused


def test_a_closed_standard_input_is_one_message(parrot, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as stop:
        inspect_lora.main(["chat", str(parrot.output / "final_lora"), *parrot.flags])
    assert stop.value.code == 1 and "standard input is closed" in capsys.readouterr().err


def test_without_an_adapter_there_is_one_message_and_no_folder_is_made(talk, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "final_lora").mkdir()
    for name, reason in {"none": "There is no adapter", "empty": "is no adapter"}.items():
        end = talk("hello", output=tmp_path / name)
        assert end.status == 1 and reason in " ".join(end.err.split())
        assert f"{tmp_path / name}/final_lora" in end.err and "Traceback" not in end.err
    assert [*tmp_path.rglob("*")] == [tmp_path / "empty", tmp_path / "empty" / "final_lora"]


def test_the_base_is_the_one_that_the_adapter_names_with_its_revision(talk, tmp_path, monkeypatch):
    asked = []

    def resolve_revision(name, revision):
        asked.append((name, revision))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.resolve_revision", resolve_revision)
    (tmp_path / "final_lora").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "a/model", "revision": "abc"}
    (tmp_path / "final_lora" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "final_lora" / TENSORS).touch()
    end = talk("hello", output=tmp_path)
    assert end.status == 1 and "a/model" in end.err and asked == [("a/model", "abc")]


@pytest.fixture
def moved(parrot, tmp_path):
    """Return the output of an adapter whose model is no longer in the folder that it names."""
    output = shutil.copytree(parrot.output, tmp_path / "output")
    file = output / "final_lora" / "adapter_config.json"
    change_json(file, base_model_name_or_path=str(tmp_path / "old" / "model"))
    return output


def test_a_model_folder_that_was_moved_may_be_given(parrot, talk, moved):
    end = talk("hello", output=moved, more=["--base", parrot.name])
    ids = ids_of(parrot.tokenizer, "hello")
    assert end.replies == [("adapter", reply_by_hand(parrot, ids))]
    assert f"base model: {parrot.name}\n" in end.out and "old/model" not in end.out


def test_a_given_folder_without_a_model_is_not_said_to_be_the_adapters(talk, moved):
    (moved.parent / "empty").mkdir()
    end = talk("hello", output=moved, more=["--base", f"{moved.parent}/empty"])
    assert end.status == 1 and f"MODEL_NAME {moved.parent}/empty" in end.err
    assert "old/model" not in end.err


def test_else_the_message_names_the_folder_and_the_flag(talk, moved):
    end = talk("hello", output=moved)
    said = " ".join(end.err.split())
    assert end.status == 1 and f"base model {moved.parent}/old/model is not there" in said
    assert "--base" in said


@pytest.mark.parametrize(
    ("revision", "said"),
    [(None, "models/mine is not there"), ("main", "models/mine is not stored on this machine")],
)
def test_a_relative_folder_that_is_gone_is_no_name_on_the_hub(talk, moved, revision, said):
    """A run on a model of the hub has recorded its commit; one on a local folder has none."""
    file = moved / "final_lora" / "adapter_config.json"
    change_json(file, base_model_name_or_path="models/mine", revision=revision)
    end = talk("hello", output=moved)
    assert end.status == 1 and said in " ".join(end.err.split())


def test_a_given_folder_replaces_a_model_on_the_hub(parrot, talk, moved):
    file = moved / "final_lora" / "adapter_config.json"
    change_json(file, base_model_name_or_path="a/model", revision="abc")
    end = talk("hello", output=moved)
    assert end.status == 1 and "a/model" in end.err and not end.replies
    end = talk("hello", output=moved, more=["--base", parrot.name])
    assert end.status == 0 and len(end.replies) == 1


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def of_another_base(path):
    change_tensors(path.parent / TENSORS, lambda *_: None)
    tensors = load_file(path.parent / TENSORS)
    wider = {
        name: torch.cat([tensor, tensor], 1) if "lora_A" in name else tensor
        for name, tensor in tensors.items()
    }
    save_file(wider, path.parent / TENSORS, {"format": "pt"})


DAMAGES = {
    "config cut": ("adapter_config.json", cut),
    "config empty": ("adapter_config.json", lambda path: path.write_text("{}")),
    "config without base": (
        "adapter_config.json", lambda path: change_json(path, base_model_name_or_path=None),
    ),
    "another r": ("adapter_config.json", lambda path: change_json(path, r=3)),
    "another base": ("adapter_config.json", of_another_base),
    "tensors cut": (TENSORS, cut),
    "tensors empty": (TENSORS, lambda path: path.write_bytes(b"")),
    "tensors gone": (TENSORS, Path.unlink),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_adapter_is_one_message(parrot, talk, tmp_path, name):
    output = tmp_path / "output"
    shutil.copytree(parrot.output, output)
    file, damage = DAMAGES[name]
    damage(output / "final_lora" / file)
    end = talk("hello", output=output)
    assert end.status == 1 and not end.replies and "Traceback" not in end.err
    assert f"{output}/final_lora" in " ".join(end.err.split())


# ==== A pipe, and a terminal


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """Run the real command, into a folder with an odd name; return the folder and its output."""
    folder = tmp_path_factory.mktemp("real")
    output = folder / "Nell's $1 run"
    flags = [*write_short_data(folder, train=4, held_out=2), "--output_dir", str(output)]
    words = [sys.executable, "train_lora_single.py", *flags, "--max_steps", "1"]
    done = run_in_a_fork([*words, "--num_samples", "0"], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_the_printed_chat_command_works_as_printed_and_with_a_pipe(real_run):
    output, text = real_run
    command = re.search(r"^next +(python (?:.*\\\n)*.*)\n", text, re.MULTILINE)[1]
    words = ["python", "inspect_lora.py", "chat", str(output / "final_lora")]
    assert shlex.split(command.replace("\\\n", "")) == words
    python = Path(sys.executable).parent  # the one that is found as "python"
    before = listing(output)
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, input="hello\n/base\nhello\n", capture_output=True,
        text=True, timeout=300, env=os.environ | {"PATH": f"{python}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    shown = re.findall(r"^(you> .*|adapter>|base>)", done.stdout, re.MULTILINE)
    assert shown[:5] == ["you> hello", "adapter>", "you> /base", "you> hello", "base>"]
    assert listing(output) == before


def read_until(terminal, pattern, seconds=120):
    """Return what the terminal shows, up to pattern."""
    found, until = "", time.monotonic() + seconds
    while not re.search(pattern, found):
        left = max(0, until - time.monotonic())
        assert select.select([terminal], [], [], left)[0], f"waited for {pattern}: {found}"
        try:
            found += os.read(terminal, 65536).decode("utf-8", "replace")
        except OSError:  # the other end is closed
            pytest.fail(f"ended before {pattern}: {found}")
    return found


@pytest.fixture
def terminal(real_run, monkeypatch):
    """Return a function that begins a chat on a terminal, with these flags more."""
    begun = []

    def begin(*more):
        words = [sys.executable, "inspect_lora.py", "chat", str(real_run[0] / "final_lora"), *more]
        process, own = begin_on_a_terminal(words, ROOT)
        begun.append((own, process))
        return own, process

    yield begin
    for own, process in begun:
        process.kill()
        process.join()
        os.close(own)


def test_ctrl_c_stops_a_reply_and_at_the_prompt_the_talk(terminal, real_run):
    before = listing(real_run[0])
    own, process = terminal("--max_new_tokens", "4000")
    read_until(own, "you> $")
    os.write(own, b"/base\nhello\n")
    read_until(own, r"base> (?s:.{9})")  # it has begun, as it comes
    os.write(own, b"\x03")
    assert "Traceback" not in read_until(own, r"\[stopped\]\s+you> $", 30)
    os.write(own, b"/help\n")
    read_until(own, r"/quit(?s:.*)you> $", 30)
    time.sleep(0.5)  # Python's readline misses a signal in the moment before it waits
    os.write(own, b"\x03")
    process.join(30)
    assert process.exitcode == 0 and listing(real_run[0]) == before
    with pytest.raises(pytest.fail.Exception, match="ended before") as rest:
        read_until(own, "nothing more comes", 10)
    assert "Traceback" not in str(rest.value)
