"""README's three doors: each command of their blocks, as a reader pastes it, in a fresh copy.

The copy holds the tracked files and nothing else. bash reads each block and gives its words; a
command that no step here knows fails, and so does a step that the block no longer shows.

What is not as it is for a reader, so that it takes seconds:

- The hub's models are folders of their names: SmolLM2-135M-Instruct from its wheel, and the tests'
  tiny model under the name of Qwen3.5-4B.
- The shipped files keep a few of their lines, the shortest ones.
- Flags are added: two steps for SmolLM2, replies of a few tokens, the CPU for Qwen3.5-4B. A GPU
  that is there is hidden.
- The placeholders are filled: conversations, prompts, an adapter that PEFT alone made, a server.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY
from make_smollm2 import make_smollm2
from on_tiny import listing, messages_of, read_json, save_adapter, write_held_out, write_lines
from peft import PeftModel
from processes import run_in_a_fork
from safetensors.torch import load_file
from test_readme import FENCED, README, read
from test_served import Imitation, running
from tiny_adapters import TENSORS, change_config
from trainers import logged, prepared, read_record, token_loss
from transformers import AutoModelForCausalLM

import train_lora_single as t
from inspect_lora.conversations import GENERAL_FILE

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
FIRST = "output/first/final_lora"
ON_THE_CPU = ["--device", "cpu", "--dtype", "float32"]
SHORT_REPLIES = ["--max_new_tokens", "8"]
LINES, HELD_OUT = 44, 20  # at least 20 are held out, also of a few


# ---- what README shows --------------------------------------------------------------------------


def commands_of_door(heading):
    """Return the words of each command in a section's blocks for a shell, as bash reads them."""
    (section,) = re.findall(rf"(?ms)^## {heading}[^\n]*\n(.*?)(?=^## |\Z)", read(README))
    found = []
    for language, block in FENCED.findall(section):
        assert language == "bash" or "python " not in block, block
        if language == "bash":
            # Nothing but python is found on an empty PATH, and printf is bash's own.
            say = "set -e; PATH=; python() { printf '%s\\0' \"$@\"; printf '\\n'; }\n"
            read_by = subprocess.run(["bash", "-c", say + block], capture_output=True, text=True)
            assert (read_by.returncode, read_by.stderr) == (0, ""), block
            found += [line.split("\0")[:-1] for line in read_by.stdout.splitlines()]
    return found


def is_step(marks, words):
    """Return whether a command is the one that these words tell from the others."""
    return set(marks.split()) <= set(words)


# ---- the reader ---------------------------------------------------------------------------------


class Reader:
    """Somebody in a fresh copy of the folder, who pastes commands."""

    def __init__(self, folder):
        """Copy what is tracked, and shorten the shipped files of conversations and tasks."""
        self.folder = folder
        names = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in names.stdout.split("\0")[:-1]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
        for name, number in ((t.TRAIN_FILE, 8), (t.EVAL_FILE, 3)):
            keep_shortest(folder / name, number)
        keep_shortest(folder / GENERAL_FILE.relative_to(ROOT), 4)

    def paste(self, words, *more, said="", status=0, **filled):
        """Run a command of README's with its placeholders filled; return what it printed.

        It may be given more flags, what is typed while it runs, and another status that it ends by.
        """
        words = [sys.executable, *(filled.get(word, word) for word in words), *more]
        hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        done = run_in_a_fork(words, cwd=self.folder, env=hidden, input=said)
        assert done.returncode == status, f"{words}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr
        return done.stdout if status == 0 else done.stderr


def keep_shortest(path, number):
    """Leave so many lines of a file, the shortest ones."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(sorted(lines, key=len)[:number]), encoding="utf-8")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Return a reader in a fresh copy, to whom the hub offers its two models."""
    if not (ROOT / ".git").exists():
        pytest.skip("git, which knows the tracked files, does not know this folder")
    reader = Reader(tmp_path_factory.mktemp("doors") / "copy")
    make_smollm2(reader.folder / SMOLLM2)
    shutil.copytree(TINY, reader.folder / t.MODEL_NAME)
    return reader


def open_door(reader, heading, steps):
    """Do all that a section's blocks show, in their order; the steps know every command.

    Args:
        reader: who does it.
        heading: how the section's begins.
        steps: {words: what does the command that has all of them}; the first one that fits.
    """
    commands = commands_of_door(heading)
    known = [[marks for marks in steps if is_step(marks, words)] for words in commands]
    assert [words for words, marks in zip(commands, known, strict=True) if not marks] == []
    for words, marks in zip(commands, known, strict=True):
        steps[marks[0]](reader, words)
    assert {marks[0] for marks in known} == set(steps)


# ---- no GPU -------------------------------------------------------------------------------------


def train_first(reader, words):
    """Two steps of SmolLM2; PEFT alone finds the losses that were printed."""
    out = reader.paste(words, "--max_steps", "2", "--logging_steps", "1")
    record = read_record(reader.folder / "output" / "first")
    assert record["outcome"] == "finished" and record["plan"]["steps"] == 2
    before, after = logged(record["loss_history"], "eval_loss")
    assert before - after > 0.1  # of about 4 nats; the tone of these lines is soon learned
    assert f"{before:.4f}" in out and f"{after:.4f}" in out
    copy = reader.folder
    files = ["--train_file", copy / t.TRAIN_FILE, "--eval_file", copy / t.EVAL_FILE]
    held_out = prepared(["--model_name", copy / SMOLLM2, *ON_THE_CPU, *files]).held_out
    model = AutoModelForCausalLM.from_pretrained(copy / SMOLLM2, dtype="float32").eval()
    assert before == pytest.approx(token_loss(model, held_out), rel=1e-4)
    model = PeftModel.from_pretrained(model, copy / FIRST).eval()
    assert after == pytest.approx(token_loss(model, held_out), rel=1e-4)
    # SmolLM2 is no multimodal model, so one form of the adapter serves all.
    assert not (copy / f"{FIRST}_vllm").exists()


def measure_first(reader, words):
    """The gain is that of the training, and the page is where README says."""
    out = reader.paste(words, *SHORT_REPLIES)
    (page,) = re.findall(r"`(output/first/\S+\.html)`", read(README))
    assert page in out and "</html>" in (reader.folder / page).read_text(encoding="utf-8")
    folder = (reader.folder / page).parent
    found = read_json(folder / "evidence.json")
    history = read_record(reader.folder / "output" / "first")["loss_history"]
    before, after = logged(history, "eval_loss")
    assert found["gain"]["value"] == pytest.approx(before - after, abs=1e-4)
    assert found["checks"] and len(found["replies"]) >= 3
    assert {path.name for path in folder.iterdir()} >= {"report.md", "overview.png", "lora.png"}


def chat_with_first(reader, words):
    """A message is answered."""
    out = reader.paste(words, *SHORT_REPLIES, said="my cat is lost\n/quit\n")
    assert re.search(r"(?m)^adapter> \w", out)


def test_the_door_without_a_gpu(reader):
    steps = {
        f"train_lora_single.py {SMOLLM2}": train_first,
        f"evidence {FIRST}": measure_first,
        f"chat {FIRST}": chat_with_first,
    }
    open_door(reader, "No GPU", steps)


# ---- your conversations -------------------------------------------------------------------------


def write_mine(path):
    """Write the shortest of the shipped conversations, in the four forms that are read."""
    lines = (ROOT / t.TRAIN_FILE).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in sorted(lines, key=len)[:LINES]]
    said = [(row["prompt"][-1]["content"], row["completion"][0]["content"]) for row in rows]
    write_lines(path, [in_form(number, *pair) for number, pair in enumerate(said)])


def in_form(number, question, reply):
    """Return a question and its reply in one of the forms."""
    user, assistant = messages_of([question, reply])
    sharegpt = [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]
    return (
        {"messages": [user, assistant]},
        {"prompt": [user], "completion": [assistant]},
        {"conversations": sharegpt},
        {"instruction": question, "input": "", "output": reply},
    )[number % 4]


def check_mine(reader, words):
    """All is said, and nothing is written; also with the flags for a machine without a GPU."""
    (without_gpu,) = re.findall(r"`(--model_name [^`]+)`", read(README))
    before = listing(reader.folder)
    for more in ([], without_gpu.split()):
        out = reader.paste(words, *more)
        assert "trainable params" in out and f"{HELD_OUT} of the {LINES}" in out
    assert listing(reader.folder) == before


def train_on_mine(reader, words):
    """What was held out is kept, and the adapter is there in both forms."""
    reader.paste(words, *ON_THE_CPU)
    output = reader.folder / "output" / "mine"
    record = read_record(output)
    assert record["outcome"] == "finished"
    before, *_, after = logged(record["loss_history"], "eval_loss")
    assert after < before
    held_out = (output / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(held_out) == HELD_OUT
    for name in ("final_lora", "final_lora_vllm"):
        assert (output / name / TENSORS).is_file()


def test_the_door_of_your_conversations(reader):
    write_mine(reader.folder / "mine.jsonl")
    steps = {"mine.jsonl --dry_run": check_mine, "train_lora_single.py mine.jsonl": train_on_mine}
    open_door(reader, "Your conversations", steps)


def test_the_bare_command_without_a_gpu_ends_with_one_message(reader):
    """As for somebody who has the article in hand."""
    assert "`python train_lora_single.py`" in read(README)
    before = set(listing(reader.folder))
    said = reader.paste(["train_lora_single.py"], status=1)
    assert said.count("no GPU") == 1 and "--demo" in said and len(said) < 1000
    new = {path.name for path in set(listing(reader.folder)) - before}
    assert new <= {".lock", "all_logs.log"}


# ---- any adapter --------------------------------------------------------------------------------

ADAPTERS = ("mine", "another")  # each is a reader's ADAPTER
REPLIES = [(f"hello {number}", f"Oh, hello {number}.") for number in range(12)]
PROMPTS = [{"prompt": "hello"}, {"prompt": messages_of(["rain", "Tea?", "no"])}]


@pytest.fixture
def adapters(reader):
    """Give the reader two adapters that PEFT alone made, and files; they must stay as they were."""
    for number, name in enumerate(ADAPTERS):
        folder = save_adapter(reader.folder / name, std=0.1 + 0.1 * number)
        change_config(folder, base_model_name_or_path=t.MODEL_NAME)
    write_held_out(reader.folder / "unseen.jsonl", REPLIES)
    write_lines(reader.folder / "prompts.jsonl", PROMPTS)
    before = [listing(reader.folder / name) for name in ADAPTERS]
    yield
    assert [listing(reader.folder / name) for name in ADAPTERS] == before


def look_into(reader, words):
    """The file is read, and has no problem."""
    out = reader.paste(words, ADAPTER="mine")
    assert "r = 4" in out and t.MODEL_NAME in out


def measure_on_replies(reader, words):
    """Gain, cost and replies are found, of both adapters."""
    for name in ADAPTERS:
        out = reader.paste(words, *SHORT_REPLIES, ADAPTER=name)
        folder = reader.folder / "inspected" / name
        found = read_json(folder / "evidence.json")
        assert re.search(r"(?m)^gain ", out) and len(found["losses"]) == len(REPLIES)
        assert found["elsewhere"] and found["replies"] and (folder / "replies.html").is_file()


def measure_on_prompts(reader, words):
    """Both models reply to each prompt."""
    out = reader.paste(words, *SHORT_REPLIES, ADAPTER="mine")
    (report,) = re.findall(r"(?m)^report +(\S+)$", out)
    found = read_json((reader.folder / report).with_name("evidence.json"))
    replies = [reply for reply in found["replies"] if reply["source"] == "prompts"]
    assert len(replies) == len(PROMPTS) and found["loss"] is None
    assert all(reply["base"]["tokens"] and reply["adapter"]["tokens"] for reply in replies)


def write_for_vllm(reader, words):
    """The copy has the names that vLLM applies."""
    reader.paste(words, ADAPTER="mine", FOLDER="for-vllm")
    old, new = (load_file(reader.folder / name / TENSORS) for name in ("mine", "for-vllm"))
    assert len(new) == len(old) and all("language_model" in name for name in new)
    assert not any("language_model" in name for name in old)


def ask_the_server(reader, words):
    """A server that applies it is found to do so."""
    evidence = reader.folder / "inspected" / "mine" / "evidence.json"
    with running(Imitation(evidence, reader.folder / "unseen.jsonl")) as url:
        out = reader.paste([url if "://" in word else word for word in words], ADAPTER="mine")
    assert "The server applies the adapter under the name companion." in out


def compare_both(reader, words):
    """Both are ranked, and their replies stand side by side."""
    out = reader.paste(words)
    assert all(f"inspected/{name}\n" in out for name in ADAPTERS) and "base model" in out
    assert (reader.folder / "compared" / "replies.html").is_file()


def test_the_door_of_any_adapter(reader, adapters):
    steps = {
        "info ADAPTER": look_into,
        "evidence ADAPTER --eval_file unseen.jsonl": measure_on_replies,
        "evidence ADAPTER --prompts prompts.jsonl": measure_on_prompts,
        "export ADAPTER FOLDER --vllm": write_for_vllm,
        "served ADAPTER": ask_the_server,
        "compare inspected": compare_both,
    }
    open_door(reader, "Any adapter", steps)
