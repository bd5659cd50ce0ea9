"""Pages: links resolve, commands parse and run small, settings and numbers are the code's."""

import argparse
import importlib
import io
import re
import shlex
import sys

import pytest
from conftest import ROOT, TOY
from runs import run, short_flags

PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/example/*.md")]
PAGES += [ROOT / folder / "README.md" for folder in ("data", "tests", "output")]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


def commands(text):
    """Return the words of each command of the project in the code blocks of a page."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for one in line.split("&&"):
                words = shlex.split(one, comments=True)
                words = words[words.index("python") + 1 :] if "python" in words else []
                if words and words[0] != "tests/accept_gpu.py":
                    found.append(words)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_resolve_and_its_commands_parse(page):
    """A file, a heading or a flag may have been renamed."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for words in commands(page.read_text(encoding="utf-8")):
        words = [word for word in words if word != "$@" and not word.startswith("${runs")]
        if words[0].endswith(("train_lora_single.py", "script.py")):
            importlib.import_module("train_lora_single").parse_settings(words[1:])
        elif words[:2] == ["-m", "inspect_lora"]:
            module = importlib.import_module(f"inspect_lora.{words[2]}")
            parser = argparse.ArgumentParser()
            module.add_arguments(parser)
            parser.parse_args(words[3:])
        else:
            assert words[0] == "-m" and words[1] in ("venv", "pytest"), words


def test_the_first_door_runs(tmp_path, monkeypatch, capsys):
    """README's first door, on the toy and short data: train, measure, talk, leave."""
    door = README.partition("## A first result")[2].partition("\n## ")[0]
    train, evidence, chat = commands(door)
    small = ["--model_name", TOY, "--max_steps", "2", *short_flags(tmp_path)]
    final = str(tmp_path / "output" / "final_lora")
    assert run([*train[1:], *small]) == 0
    main = importlib.import_module("inspect_lora.__main__").main
    few = ["--replies", "2", "--max_new_tokens", "4"]
    rules = evidence.index("--rules")
    kept = evidence[4:rules] + evidence[rules + 2 :]  # the short data have no kinds
    assert run(["evidence", final, *kept, *few], main=main) == 0
    assert (tmp_path / "output" / "inspected" / "final_lora" / "replies.html").is_file()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/quit\n"))
    assert run(["chat", final, *chat[4:], "--max_new_tokens", "4"], main=main) == 0
    assert capsys.readouterr().out


def test_settings_and_numbers_on_the_page_are_those_of_the_code():
    """Constants as shipped, the lines of the script, and what stands in the example's report."""
    script = importlib.import_module("train_lora_single")
    table = README.partition("## Settings")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[A-Z].*?) \| (`.*?) \|", table, re.MULTILINE)
    assert len(rows) >= 4
    for names, values in rows:
        for name, value in zip(names.split(", "), values.split(", "), strict=True):
            assert str(getattr(script, name.strip("`"))) == value.strip("`"), name
    lines = (ROOT / "train_lora_single.py").read_text(encoding="utf-8").count("\n")
    assert f"{lines:,} lines" in README
    report = (ROOT / "docs" / "example" / "report.md").read_text(encoding="utf-8")
    extract = README.partition("## What a run and a report print")[2].partition("\n## ")[0]
    numbers = re.findall(r"(?<![\w.])[+-]?\d+\.\d{4}(?![\d.])", extract.partition("gain ")[2])
    assert len(numbers) >= 5
    assert [number for number in numbers if number not in report] == []
