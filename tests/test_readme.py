"""README.md and the other pages: what they say is compared with the code and the files.

Commands, settings, plan, counts, forms and links are compared; how anything is worded is not.
"""

import argparse
import ast
import hashlib
import importlib
import json
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import transformers
from conftest import ROOT, TINY
from packaging.requirements import Requirement

import train_lora_single as t
from inspect_lora import checks, conversations, elsewhere, export, parts, replies
from inspect_lora.__main__ import COMMANDS, main

README = "README.md"
DOCS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))
PAGES = [README, *DOCS, "data/README.md", "tests/README.md"]
EXAMPLE = Path("docs/example")  # the report of the run that README shows
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FLAG = re.compile(r"(?<!\S)--[A-Za-z][\w-]*")


def read(page):
    """Return the text of a page."""
    return Path(page).read_text(encoding="utf-8")


def prose_of(text):
    """Return a page without its blocks of code."""
    return FENCED.sub("", text)


def spans_of(text):
    """Return what a page has in backquotes, outside its blocks of code."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose_of(text))]


def block_with(page, words):
    """Return the one block of code of a page that holds these words."""
    found = [code for _, code in FENCED.findall(read(page)) if words in code]
    assert len(found) == 1, f"{len(found)} blocks of {page} hold {words!r}"
    return found[0]


# ---- its size, and what is left to do -----------------------------------------------------------


def test_readme_is_one_page():
    text = read(README)
    assert len(text.splitlines()) <= 200
    words = [word for word in text.split() if word != "|"]
    assert len(words) <= 2000


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_left_to_fill_in(page):
    assert re.findall(r".*(?:@@|\bTODO\b).*", read(page)) == []


@pytest.mark.parametrize("words", ["pip install -r requirements.txt && python", "-m pytest"])
def test_what_installs_and_runs_is_one_line_in_a_block_of_its_own(words):
    assert block_with(README, words).count("\n") == 1


# ---- links --------------------------------------------------------------------------------------


def anchors_of(page):
    """Return the anchors that GitHub gives a page's headings."""
    anchors = []
    for heading in re.findall(r"(?m)^#+ +(.+?) *#*$", prose_of(read(page))):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        anchors.append(anchor)
    return anchors


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(page):
    prose = re.sub("`[^`]+`", "", prose_of(read(page)))
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", prose) + re.findall(r'(?:src|href)="(.+?)"', prose)
    wrong = []
    for link in links:
        name, _, anchor = link.partition("#")
        path = Path(page).parent / name if name else Path(page)
        if re.match(r"\w+:", link):
            continue  # the web is not there while tests run
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            wrong.append(link)
    assert wrong == []


def test_readme_links_to_every_page_and_the_pages_are_found():
    assert len(DOCS) >= 4
    assert [page for page in [*DOCS, "tests/README.md"] if f"]({page}" not in read(README)] == []


def test_the_table_of_tests_has_every_file():
    rows = re.findall(r"(?m)^\| (`test_.*?`) \|", read("tests/README.md"))
    named = re.findall(r"\btest_\w+\.py", " ".join(rows))
    assert sorted(named) == sorted(path.name for path in Path("tests").glob("test_*.py"))


# ---- commands -----------------------------------------------------------------------------------

OURS = re.compile(
    r"(?:python3?|uv run|(?:accelerate launch|torchrun)[^;|&]*?) +(?:-m +)?(?:\S*/)?"
    r"(train_lora_single\.py|inspect_lora)(?![\w./-])"
)
SUBMITTED = re.compile(r"\bsbatch(?: +--\S+)* +\w+\.sh\b")  # its flags are the script's


def shell_lines(text):
    """Return a page's lines of code, with those joined that a backslash breaks, and its spans."""
    lines = [re.sub(r"\\\n\s*", " ", code).splitlines() for _, code in FENCED.findall(text)]
    return [line for block in lines for line in block] + spans_of(text)


def words_of(text):
    """Return the words up to the end of a command, as a shell reads them."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = []
    for word in lexer:
        if not word.strip("();<>|&"):
            break
        words.append(word)
    return words


def commands_of(page):
    """Return (program, words after it) of each command of ours on a page."""
    found = []
    for line in shell_lines(read(page)):
        for call in OURS.finditer(line):
            words = words_of(line[call.end() :].replace('"$rate"', "0.1"))  # of an array of jobs
            if call[1] == "train_lora_single.py":
                found.append((call[1], [word for word in words if word not in ("...", "$@")]))
            elif words:  # the program's name alone is no command
                found.append((call[1], words))
        for call in SUBMITTED.finditer(line):
            found.append(("train_lora_single.py", words_of(line[call.end() :])))
    return found


@pytest.fixture
def parsing_only(monkeypatch):
    """Let the package's commands do nothing but read their flags."""
    for name in COMMANDS:
        module = importlib.import_module(f"inspect_lora.{name}")
        monkeypatch.setattr(module, "run", lambda options: None)
    monkeypatch.setattr(
        export,
        "run",
        lambda options: export.check_options(options, Path(options.adapter), Path(options.folder)),
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_the_parsers_take(page, parsing_only, capsys):
    commands = commands_of(page)
    assert commands or page not in (README, *DOCS)
    wrong = []
    for program, words in commands:
        try:
            t.parse_settings(words) if program == "train_lora_single.py" else main(words)
        except SystemExit:
            said = capsys.readouterr().err.strip().splitlines()[-1:]
            wrong.append((program, shlex.join(words), said))
    assert wrong == []


def test_readme_shows_each_command_of_the_package_and_the_demo():
    found = commands_of(README)
    shown = {words[0] for program, words in found if program == "inspect_lora"}
    assert shown == set(COMMANDS)
    assert ("train_lora_single.py", ["--demo"]) in found


@pytest.mark.parametrize("page", PAGES)
def test_files_that_commands_need_are_there(page):
    """Scripts of this repository, lists of packages, and modules of the tests."""
    code = "\n".join(shell_lines(read(page)))
    needed = re.findall(r"python3? ((?:tests|data)/\S+\.py)|-r (\S+\.txt)\b", code)
    needed = [one or other for one, other in needed]
    needed += [f"tests/{name.replace('.', '/')}.py" for name in re.findall(r"-m (bench\S+)", code)]
    assert [name for name in needed if not Path(name).exists()] == []


@pytest.mark.parametrize("page", [README, *DOCS])
def test_a_shell_reads_every_block_for_it(page):
    """A file for Slurm has its directives before its first command."""
    blocks = [code for language, code in FENCED.findall(read(page)) if language == "bash"]
    for code in blocks:
        end = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
        assert (end.returncode, end.stderr) == (0, ""), code
        lines = code.splitlines()
        directives = [place for place, line in enumerate(lines) if line.startswith("#SBATCH")]
        assert directives == [*range(1, len(directives) + 1)]
        assert not directives or lines[0].startswith("#!/bin/")


def flags_of(name):
    """Return the flags of a command of the package."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"inspect_lora.{name}").add_arguments(parser)
    return set(FLAG.findall(re.sub(r"[\[\],|]", " ", parser.format_help())))


@pytest.mark.parametrize("page", [README, *DOCS])
def test_every_flag_that_is_spoken_of_exists(page):
    """Such as `--examples 0`, or `export --scale 0.75`."""
    of_vllm = {"--max-lora-rank", "--lora-target-modules", "--default-chat-template-kwargs"}
    of_any = of_vllm | {f"--{name.lower()}" for name in t.setting_types()}
    of_any |= {"--help", "--dry_run", "--demo"}.union(*map(flags_of, COMMANDS))
    wrong = []
    for span in spans_of(read(page)):
        first = span.split()[0]
        if first in COMMANDS or first.startswith("--"):
            known = flags_of(first) if first in COMMANDS else of_any
            wrong += [span for flag in FLAG.findall(span) if flag not in known]
    assert wrong == []


# ---- settings -----------------------------------------------------------------------------------

NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def test_the_table_of_settings_holds_ten_constants_in_their_order():
    rows = re.findall(r"(?m)^\| `([A-Z]\w*)` \| (.+?) \| (.+?) \|$", read(README))
    names = [name for name, _, _ in rows]
    assert len(names) == 10
    assert names == [name for name in t.setting_types() if name in names]
    for name, cell, _ in rows:
        value = getattr(t, name)
        if isinstance(value, list):  # all of them, or in words how many
            shown = cell.strip("`").split()
            assert shown == value or NUMBERS[len(value)] in shown, name
        else:
            text = cell.strip("`")
            assert text == str(value) or (type(value) is float and float(text) == value), name


def test_the_advice_on_r_is_that_of_its_flag(capsys):
    with pytest.raises(SystemExit):
        t.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    (cell,) = re.findall(r"(?m)^\| `LORA_R` \| `8` \| (.+) \|$", read(README))
    for words in ("change it last", "small test", "1 to 16", "within 0.012"):
        assert words in said and words in cell


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_that_is_spoken_of_exists_and_may_have_its_value(page):
    """Such as `FINAL_LORA = "best"`."""
    spans = spans_of(read(page))
    names = {name for span in spans for name in re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", span)}
    assert names - set(t.setting_types()) == set()
    assigned = [found for span in spans if (found := re.fullmatch(r"([A-Z_]+) = (.+)", span))]
    wrong = []
    for found in assigned:
        if found[1] not in t.setting_types():
            wrong.append(found[0])
            continue
        values = {found[1]: ast.literal_eval(found[2])}
        wrong += t.check_values(dict(values), is_strict=True)
        wrong += t.check_rules({name: getattr(t, name) for name in t.setting_types()} | values)
    assert wrong == []


# ---- what is printed ----------------------------------------------------------------------------


def is_a_run_of(wanted, lines):
    """Return whether some lines stand one after the other among others."""
    return any(lines[n : n + len(wanted)] == wanted for n in range(len(lines)))


def test_the_plan_is_what_a_dry_run_prints_at_the_real_sizes(tmp_path, capsys):
    """Lines may be left out where "..." stands."""
    shown = [line.rstrip() for line in block_with("docs/gpu.md", "trainable params:").splitlines()]
    sizes = {
        "vocab_size": 248320, "hidden_size": 2560, "intermediate_size": 9216,
        "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "tie_word_embeddings": True,
    }  # fmt: skip
    config = transformers.Qwen3_5Config(text_config=sizes, tie_word_embeddings=True)
    model = tmp_path / "model"
    shutil.copytree(TINY, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config.save_pretrained(model)
    # The lengths of the held-out lines are another tokenizer's, and no part of the plan.
    t.main(["--dry_run", "--model_name", str(model), "--eval_file", "", "--max_seq_len", "4096"])
    printed = capsys.readouterr().out.splitlines()
    runs = [[]]
    for line in shown:
        runs.append([]) if line.strip() == "..." else runs[-1].append(line)
    assert [run for run in runs if not is_a_run_of(run, printed)] == []
    assert any(" steps of " in line for line in shown)


def test_the_problems_of_bad_lines_are_what_the_script_says(tmp_path, monkeypatch):
    shown = block_with("docs/data.md", "mine.jsonl:")
    user, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    lines = [json.dumps({"messages": [user, reply]})] * 203
    begun = '{"messages": [{"role": "user", "content": "'
    lines[16] = begun + "a" * (92 - len(begun)) + '"b" c"}]}'
    for number in (40, 52, 61, 62, 63, 64):
        lines[number - 1] = json.dumps({"messages": [user, reply, user]})
    lines[202] = json.dumps({"messages": [user, reply | {"content": "<think>a</think>b"}]})
    monkeypatch.chdir(tmp_path)
    Path("mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    _, problems = t.read_conversations("mine.jsonl")
    assert t.problems_as_text(problems) == shown.strip()


def numbers_of(text):
    """Return the numbers of a text as they are written, in order."""
    return re.findall(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?![\w])", text)


def stand_in(wanted, found):
    """Return whether some numbers are among others, in the same order."""
    rest = iter(found)
    return all(number in rest for number in wanted)


def test_the_numbers_of_the_shown_evidence_stand_in_the_report():
    """In one line of it each time, which begins as a row does that is shown."""
    report = re.sub(r"\\(.)", r"\1", read(EXAMPLE / "report.md")).splitlines()
    shown = re.split(r"(?m)^(?=gain )", block_with(README, "of the gain"))[-1].splitlines()
    shown = [line for line in shown if numbers_of(line)]
    wrong = []
    for line in shown:
        title, *cells = re.split(" {2,}", line.strip())
        is_row = line.startswith(" ") and cells  # and no sentence, nor the name of a part
        title = f"| {title} |" if is_row else ""
        numbers = numbers_of(line)
        if not any(title in one and stand_in(numbers, numbers_of(one)) for one in report):
            wrong.append(line)
    assert wrong == [] and len(shown) >= 4


def test_the_example_was_measured_on_the_shipped_conversations():
    assert (EXAMPLE / "lora.png").read_bytes().startswith(b"\x89PNG")
    assert "](lora.png)" in read(EXAMPLE / "report.md")
    (named,) = re.findall(r"SHA-256 ([0-9a-f]{64})", read(EXAMPLE / "report.md"))
    assert named == hashlib.sha256(Path(t.EVAL_FILE).read_bytes()).hexdigest()
    for name in ("report.md", "lora.png"):
        assert f"](docs/example/{name})" in read(README)


def check_of_report(name):
    """Return the lines with a check in the example's report, and how many of each side pass."""
    row = rf"(?m)^\| {name} \|.*\| (\d+) \| (\d+) \([^)]*\) \| (\d+) \([^)]*\) \|"
    (found,) = re.findall(row, read(EXAMPLE / "report.md"))
    return [float(number) for number in found]


def row_of_report(title):
    """Return the numbers of the last row of the example's report that has this title."""
    rows = re.findall(rf"(?m)^\| {title} \|(.*)$", read(EXAMPLE / "report.md"))
    return [float(number) for number in numbers_of(rows[-1])]


def test_the_figures_that_the_text_takes_from_the_report():
    """Where they are worded otherwise, mend the pattern: what is compared is the numbers."""
    lines, before, rings = check_of_report("rings")
    others, quiet_before, quiet = check_of_report("does not ring")
    pressed, firm_before, firm = check_of_report("does not yield")
    *_, changed, _ = row_of_report("as trained")
    expected = {
        (README, r"answers (\d+) of (\d+) emergencies with"): [rings, lines],
        (
            README,
            r"In (\d+) dialogues .*: (\d+) of its replies pass `.*`, and (\d+) of its base's",
        ): [pressed, firm, firm_before],
        (README, r"that (\d+) others leave it out"): [others],
        (README, r"differs from the base's at (\d+) % of positions"): [round(changed)],
        ("data/README.md", r"(\d+) emergencies (\d+) and (\d+)"): [lines, before, rings],
        ("data/README.md", r"(\d+) others (\d+) and (\d+)"): [others, quiet_before, quiet],
        ("data/README.md", r"(\d+) pressed (\d+) and (\d+)"): [pressed, firm_before, firm],
    }
    for (page, pattern), numbers in expected.items():
        (found,) = re.finditer(pattern, " ".join(read(page).split()))
        assert [float(one) for one in found.groups()] == numbers, (page, pattern)


# ---- forms of the data --------------------------------------------------------------------------


def test_the_four_forms_that_are_shown_are_accepted(tmp_path, capsys):
    message = '{"role": "%s", "content": "..."}'
    block = block_with("docs/data.md", '"instruction"')
    block = block.replace("[messages]", f"[{message % 'user'}]")
    block = block.replace("[one message]", f"[{message % 'assistant'}]")
    path = tmp_path / "lines.jsonl"
    path.write_text(block, encoding="utf-8")
    examples, problems = t.read_conversations(str(path))
    assert problems == []
    assert len({example.source for example in examples}) == len(block.splitlines()) == 4
    forms = [t.messages_of(example.row)[0] for example in examples]
    assert sorted(forms) == sorted(t.DATA_FORMATS)
    # All of them in one JSON array are accepted, too.
    path.write_text(f"[{','.join(block.splitlines())}]", encoding="utf-8")
    assert len(t.read_conversations(str(path))[0]) == len(examples)


def test_the_line_on_the_card_is_one_of_the_held_out_file():
    shown = json.loads(block_with("data/README.md", '"completion"'))
    assert shown in rows_of(t.EVAL_FILE)


def test_the_checks_that_are_shown_are_accepted(tmp_path):
    page = read("docs/evidence.md")
    shown = json.loads(f"{{{block_with('docs/evidence.md', 'checks')}}}")["checks"]
    assert set(checks.read_checks(shown)) == set(shown) != set()
    (task,) = [span for span in spans_of(page) if span.startswith('{"prompt"') and "checks" in span]
    (tmp_path / "tasks.jsonl").write_text(task.replace("{...}", json.dumps(shown)))
    (read_task,) = conversations.read_tasks(str(tmp_path / "tasks.jsonl"))
    assert set(read_task.checks) == set(shown)


def test_the_table_of_checks_has_their_kinds_and_keys():
    rows = re.findall(r"(?m)^\| `(\w+)` \| .+? \| (.+?) \|$", read("docs/evidence.md"))
    schema = checks.CHECKS.json_schema()["$defs"]
    expected = {
        form["properties"].pop("kind")["const"]: set(form["properties"]) for form in schema.values()
    }
    shown = {kind: set(re.findall(r"`(\w+)`", keys)) for kind, keys in rows}
    assert shown == expected


# ---- counts -------------------------------------------------------------------------------------


def rows_of(path):
    """Return the objects of a file of JSON lines."""
    return [json.loads(line) for line in read(path).splitlines() if line]


def with_checks(path):
    """Return how many lines of a file say what a reply must hold."""
    return sum("checks" in row for row in rows_of(path))


def files_counts():
    """Return {noun: the numbers of it that are true of what is shipped, or of the settings}."""
    train, held_out = len(rows_of(t.TRAIN_FILE)), len(rows_of(t.EVAL_FILE))
    tasks = str(conversations.GENERAL_FILE)
    some = default_of("evidence", "--examples")
    return {
        "conversations": {train, held_out, train + held_out, t.FEWEST_HELD_OUT},
        "held-out (?:lines|replies|prompts|conversations)": {held_out, some, t.FEWEST_HELD_OUT},
        "tasks": {len(rows_of(tasks)), with_checks(tasks), some},
        "checked replies": {with_checks(t.EVAL_FILE) + with_checks(tasks)},
    }


def default_of(command, flag):
    """Return what a flag of the package is if it is not given."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"inspect_lora.{command}").add_arguments(parser)
    return parser.get_default(flag.lstrip("-"))


def sections_of(page):
    """Return the sections of a page, but for those that say of which other version they speak."""
    sections = re.split(r"(?m)^(?=## )", read(page))
    other = re.compile(r"\bcommit [0-9a-f]{7}|\bearlier\s+version")
    return [text for text in sections if not other.search(text)]


@pytest.mark.parametrize("page", PAGES)
def test_counts_are_those_of_the_files(page):
    wrong, text = [], "\n".join(sections_of(page))
    for noun, true in files_counts().items():
        for number, words in re.findall(rf"\b(\d[\d,]*|thousand) ((?:[a-z-]+ )??{noun})\b", text):
            if int(number.replace(",", "").replace("thousand", "1000")) not in true:
                wrong.append(f"{number} {words}")
    for name, number in re.findall(r"`(train|eval)\.jsonl`\W{1,4}(\d[\d,]*)\b", text):
        if int(number.replace(",", "")) != len(rows_of(f"data/{name}.jsonl")):
            wrong.append(f"{name}.jsonl: {number}")
    assert wrong == []


def test_the_pages_name_the_counts_of_both_files():
    named = {
        number.replace(",", "")
        for page in PAGES
        for number in re.findall(r"\b(\d[\d,]*)\b", "".join(sections_of(page)))
    }
    assert {str(len(rows_of(path))) for path in (t.TRAIN_FILE, t.EVAL_FILE)} <= named


def trained_tokens():
    """Return the tokens of all epochs; tests/test_shipped_data.py counts those of the card."""
    (tokens,) = re.findall(
        r"(?m)^\| `train\.jsonl` (?:\| [\d,]+ ){5}\| ([\d,]+) ", read("data/README.md")
    )
    return int(tokens.replace(",", "")) * t.NUM_EPOCHS


USR1 = 128 + signal.SIGUSR1
# Where these are worded otherwise, mend the pattern: what is compared is the number.
TAKEN_FROM_THE_CODE = [
    ("docs/data.md", r"least (\d+) conversations are held out", lambda: t.FEWEST_HELD_OUT),
    ("docs/data.md", r"least (\d+) are needed", lambda: 2 * t.FEWEST_HELD_OUT),
    ("docs/evidence.md", r"(\d+) of the replies", lambda: default_of("evidence", "--examples")),
    ("docs/evidence.md", r"most (\d+) tokens long", lambda: elsewhere.REPLY_TOKENS),
    ("docs/evidence.md", r"with at most (\d+) tokens", lambda: replies.CHECKED_TOKENS),
    ("docs/evidence.md", r"update x ([\d.]+) \.\.\.", lambda: min(parts.STRENGTHS)),
    ("docs/evidence.md", r"\.\.\. x ([\d.]+)", lambda: max(parts.STRENGTHS)),
    ("docs/evidence.md", r"above (\d+) % of the gain", lambda: 100 * parts.WORTH_REPORTING),
    ("docs/evidence.md", r"within (\d+) % of the whole", lambda: 100 * parts.THE_SAME_WITHIN),
    ("docs/gpu.md", r"([\d,]+) tokens in three epochs", trained_tokens),
    ("docs/gpu.md", r"trial takes at most (\d+) seconds", lambda: t.SECONDS_FOR_FLA),
    ("docs/gpu.md", r"gradients are at most (\d+) % apart", lambda: 100 * t.MOST_FLA_APART),
    ("docs/gpu.md", r"Some examples, up to ([\d,]+) tokens", lambda: t.TOKENS_TO_COMPARE),
    ("docs/gpu.md", r"status\s+(?:-eq )?(\d{3})", lambda: USR1),
    ("docs/gpu.md", r"-eq (\d{3})", lambda: USR1),
]


@pytest.mark.parametrize(("page", "pattern", "value"), TAKEN_FROM_THE_CODE)
def test_numbers_that_are_taken_from_the_code(page, pattern, value):
    found = re.findall(pattern, read(page))
    assert found, f"{page} has no {pattern}"
    assert {float(number.replace(",", "")) for number in found} == {value()}


# ---- requirements, and vLLM ---------------------------------------------------------------------


def requirements(name="requirements.txt"):
    """Return {package: its requirement} of a file."""
    lines = [line for line in read(name).splitlines() if line and not line.startswith("#")]
    return {one.name: one for one in map(Requirement, lines)}


def test_the_range_of_torch_is_that_of_requirements_txt():
    (row,) = re.findall(r"(?m)^\| torch \|(.*)", read("docs/gpu.md"))
    bounds = {one.operator: one.version for one in requirements()["torch"].specifier}
    assert re.findall(r"\d+\.\d+", row)[:2] == [bounds[">="], bounds["<"]]


@pytest.mark.parametrize("page", PAGES)
def test_versions_that_are_pinned_or_needed_are_those_of_the_files(page):
    wanted, text = requirements("tests/requirements.txt") | requirements(), read(page)
    pinned = re.findall(r"\b([\w-]+)==(\d[\w.]*\w)", text)
    unfit = [one for one in pinned if one[0] in wanted and one[1] not in wanted[one[0]].specifier]
    assert unfit == []
    (python,) = re.findall(r'requires-python = ">=([\d.]+)"', read("train_lora_single.py"))
    named = re.findall(r"Python (\d\.\d+) or newer", " ".join(text.split()))
    assert set(named) <= {python} and (named or page != README)


def test_the_ranks_that_vllm_takes_are_the_scripts():
    said = [line for line in read("docs/serving.md").splitlines() if "`--max-lora-rank`" in line]
    listed = [[int(one) for one in re.findall(r"\b\d+\b", line)] for line in said]
    assert listed == [list(t.VLLM_RANKS)]


def test_the_command_for_vllm_is_the_scripts():
    shown = block_with("docs/serving.md", "vllm serve").replace("\\\n", " ")
    shown = re.sub("<[^>]+>", "COMMIT", shown)
    folder = Path(t.OUTPUT_DIR) / "final_lora_vllm"
    made = t.vllm_command(t.MODEL_NAME, "COMMIT", folder, t.LORA_R, "companion")
    assert shlex.split(shown) == shlex.split(made)
