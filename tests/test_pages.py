"""Pages: links resolve, commands parse and run small."""

import argparse
import importlib
import io
import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, TOY
from runs import run, settings_of, short_flags

from train_lora.conversations import read_conversations

PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/example/*.md")]
PAGES += [ROOT / folder / "README.md" for folder in ("data", "tests", "output")]
SCRIPTS = ("train_lora_single.py", "script.py")


def blocks(page, language):
    """Return the code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}


def commands(script):
    """Return the words of each command of a shell script, without comments and operators."""
    for name, value in re.findall(r"\bfor (\w+) in (\S+)", script):
        script = script.replace(f"${name}", value)  # the loop's first turn
    lines = []
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        lines.append([])
        for word in words:
            if word in ("&&", "||", "|", ";", "&"):
                lines.append([])
            else:
                lines[-1].append(word)
    return [words for words in lines if words]


def parse(words):
    """Parse the flags of a command of the project; return whether it is one."""
    words = [word for word in words if not word.startswith(("$@", "${"))]
    for place, word in enumerate(words):
        if word.endswith(SCRIPTS) and "cp" not in words[:place]:
            settings_of(*words[place + 1 :])
            return True
        if word in ("inspect-lora", "inspect_lora"):
            name, *flags = words[place + 1 :]
            add_flags = importlib.import_module("inspect_lora.__main__").COMMANDS[name]
            parser = argparse.ArgumentParser()
            add_flags(parser)
            parser.parse_args(flags)
            return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_resolve_and_its_commands_parse(page):
    """A file, a heading or a flag may have been renamed; a job file may not be shell."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for script in blocks(page, "bash"):
        checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")
        for words in commands(script):
            if not parse(words) and "python" in words:
                known = ("-m venv", "-m pytest", "tests/accept_gpu.py")
                assert " ".join(words).partition("python ")[2].startswith(known), words


def test_the_first_door_runs(tmp_path, monkeypatch, capsys):
    """README's block that trains, measures and talks, on the toy and short data."""
    names = ("train_lora_single.py", " evidence ", " chat ")
    doors = [
        block for block in blocks(ROOT / "README.md", "bash") if all(n in block for n in names)
    ]
    train, evidence, chat = commands(doors[0])
    small = ["--model_name", TOY, "--max_steps", "2", *short_flags(tmp_path)]
    final = str(tmp_path / "output" / "final_lora")
    assert run([*train[2:], *small]) == 0
    main = importlib.import_module("inspect_lora.__main__").main
    few = ["--replies", "2", "--max_new_tokens", "4"]
    rules = evidence.index("--rules")
    kept = evidence[3:rules] + evidence[rules + 2 :]  # the short data have no kinds
    assert run(["evidence", final, *kept, *few], main=main) == 0
    assert (tmp_path / "output" / "inspected" / "final_lora" / "replies.html").is_file()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/quit\n"))
    assert run(["chat", final, *chat[3:], "--max_new_tokens", "4"], main=main) == 0
    assert capsys.readouterr().out


def test_the_page_cleans_a_dump(tmp_path, monkeypatch, capsys):
    """What docs/data.md tells to do with a ShareGPT dump leaves no bad line, and all good turns."""
    dump = [
        [("system", "Be kind."), ("human", "Hi?"), ("gpt", "<think>\nHm.\n</think>\n\nHello.")],
        [("human", "One."), ("human", "Two?"), ("chatgpt", "Three."), ("human", "And?")],
        [("human", "Look."), ("gpt", "Yes."), ("human", "Now."), ("function_call", "{}")],
        [("human", "Weather?"), ("function_call", "{}"), ("observation", "5"), ("gpt", "Cold.")],
        [("gpt", "How can I help?"), ("human", ""), ("gpt", "Well.")],
        [("human", "Why?"), ("gpt", "<think>\nThe dump was cut here")],
    ]
    lines = [
        {"id": "a", "conversations": [{"from": f, "value": v, "weight": None} for f, v in turns]}
        for turns in dump
    ]
    (tmp_path / "dump.json").write_text(json.dumps(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (cleaning,) = blocks(ROOT / "docs" / "data.md", "python")
    exec(compile(cleaning, "docs/data.md", "exec"), {})
    assert re.findall(r"\d+", capsys.readouterr().out) == ["3", "6"]  # kept, of all
    problems = []
    read = read_conversations("mine.jsonl", "all", problems)
    assert problems == []
    said = [[message["content"] for message in conversation.messages] for conversation in read]
    assert said == [["Be kind.", "Hi?", "Hello."], ["One.\n\nTwo?", "Three."], ["Look.", "Yes."]]
