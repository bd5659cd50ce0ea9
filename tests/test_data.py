"""Data: which lines are refused and how, what is taken as it is, which repeats are named."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_lora_single as t

SCRIPT = t.__file__
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def conversation(roles):
    """Return messages with these roles, such as "sua", and numbered texts."""
    return [{"role": ROLES[role], "content": f"turn {n}"} for n, role in enumerate(roles, 1)]


def line(**row):
    return json.dumps(row).encode()


def messages_line(roles):
    return line(messages=conversation(roles))


def completion_line(prompt, completion):
    return line(prompt=conversation(prompt), completion=conversation(completion))


def line_with_reply(message):
    return line(messages=[*conversation("u"), message])


def line_with_text(text):
    return line_with_reply({"role": "assistant", "content": text})


def talk_of(*contents):
    """Return messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]


GOOD = messages_line("ua")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Work where the files are, so that their names stay short."""
    monkeypatch.chdir(tmp_path)


def write(content, name="data.jsonl"):
    Path(name).write_bytes(content)
    return name


def problems_of(content):
    """Return (examples, problems) of a file with these bytes."""
    return t.read_examples(write(content))


def taken(content, group_key=""):
    """Return (where, prompt, reply) of each example of a file that has no problems."""
    examples, problems = t.read_examples(write(content), group_key)
    assert problems == []
    return [(one.where, one.messages[:-1], one.messages[-1]) for one in examples]


# ---- what is refused

FORMS = ["prompt", "completion", "messages", "README"]
TURNS = ["user and assistant in turn"]

REFUSED = [
    ("latin-1", '{"messages": "café"}'.encode("latin-1"), ["not UTF-8", "byte 18"]),
    ("trailing comma", GOOD[:-1] + b",}", ["not JSON", "character"]),
    ("a quotation mark", GOOD.replace(b"turn 1", b'a "turn" 1'), ["character", "backslash"]),
    ("truncated", GOOD[:-3], ["not JSON", "character"]),
    ("two objects in one line", GOOD + b" " + GOOD, ["not JSON", f"character {len(GOOD) + 2}"]),
    ("a number", b"42", ["not an object", "42", *FORMS]),
    ("a list of objects", b"[1, " + GOOD + b"]", ["not an object", *FORMS]),
    ("nested too deeply", b'{"messages": ' + b"[" * 99_999 + b"]" * 99_999 + b"}", ["deep"]),
    ("integer of 5,000 digits", b'{"messages": ' + b"7" * 5_000 + b"}", ["digits"]),
    ("a key twice", b'{"id": 1, "id": 2, ' + GOOD[1:], ['"id"', "twice", "remove"]),
    ("content twice", GOOD.replace(b'"turn 1"', b'"x", "content": "y"'), ['"content"', "twice"]),
    ("tools", line(messages=conversation("ua"), tools=[]), ['"tools"', "remove"]),
    ("no form", line(text="Hello"), ["text", *FORMS]),
    ("an empty object", b"{}", ["nothing", *FORMS]),
    ("ShareGPT", line(conversations=[{"from": "human"}]),
     ['"conversations" to "messages"', '"from" to "role"', '"value" to "content"', "README"]),
    ("both forms", line(messages=[], prompt=[], completion=[]), ["messages and prompt", *FORMS]),
    ("messages and prompt", line(messages=conversation("ua"), prompt=[]), ["messages and prompt"]),
    ("prompt alone", line(prompt=conversation("u")), ["the line has prompt;", *FORMS]),
    ("completion alone", line(completion=conversation("a")), ["the line has completion;"]),
    ("prompt is a text", line(prompt="Hi", completion=conversation("a")), ['"prompt" is "Hi"']),
    ("messages is empty", line(messages=[]), ['"messages" is []', *FORMS]),
    ("completion is empty", completion_line("u", ""), ['"completion" is []', *FORMS]),
    ("a message is a text", line_with_reply("Hi"), ["message 2 is", '"Hi"', '"role"']),
    ("a name", line_with_reply({"role": "assistant", "content": "a", "name": "N"}),
     ["message 2", '"name"', "ignored"]),
    ("no role", line_with_reply({"content": "Hi"}), ["message 2", 'no "role"']),
    ("no content", line_with_reply({"role": "assistant"}), ["message 2", 'no "content"']),
    ("role tool", line_with_reply({"role": "tool", "content": "Hi"}),
     ["role of message 2", '"tool"', '"system", "user" or "assistant"']),
    ("role is a list", line_with_reply({"role": ["user"], "content": "Hi"}), ['["user"]']),
    ("content null", line_with_text(None), ["content of message 2", "null", "text"]),
    ("content in parts", line_with_text([{"type": "text"}]), ["content of message 2", '"type"']),
    ("content white space", line_with_text(" \n\t\u3000"), ["content of message 2", "empty"]),
    ("high surrogate", line_with_text("Hi \ud83d"), ["message 2", "surrogate", "whole character"]),
    ("low surrogate", line_with_text("\udfff Hi"), ["message 2", "surrogate"]),
    ("thoughts", line_with_text("<think>\nHm.\n</think>\n\nHi"), ["message 2", "<think>"]),
    ("end of thoughts", line_with_text("Hm.</think>Hi"), ["message 2", "<think>", "remove"]),
    ("no user", messages_line("sa"), ["system, assistant;", *TURNS]),
    ("no reply at the end", messages_line("uau"), ["user, assistant, user;", *TURNS]),
    ("system in the middle", messages_line("usa"), ["user, system, assistant;", *TURNS]),
    ("two systems", messages_line("ssua"), ["system, system, user, assistant;", *TURNS]),
    ("two users", completion_line("uu", "a"), ["user, user, assistant;", *TURNS]),
    ("many turns", messages_line("u" * 8), ["user, user, user, user, user, user, ... and 2 more"]),
    ("several replies", completion_line("u", "aua"), ['"completion" holds 3', '"prompt"']),
]  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "parts"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_a_bad_line_is_named_with_its_number_the_reason_and_the_fix(bad, parts):
    examples, problems = problems_of(GOOD + b"\n\n" + bad + b"\n" + GOOD)
    assert [one.where for one in examples] == ["data.jsonl:1", "data.jsonl:4"]
    (problem,) = problems
    assert problem.startswith("data.jsonl:3: ") and len(problem) < 300 and "\n" not in problem
    assert [part for part in parts if part not in problem] == []


@pytest.mark.parametrize(
    "content",
    [
        b"[\n" + GOOD + b",\n" + GOOD + b"\n]\n",
        b"\n[" + GOOD + b", " + GOOD + b"]",
        b"[ " + GOOD + b"]",
        b"\xef\xbb\xbf[\r\n" + GOOD + b"\r\n]\r\n",
    ],
    ids=["on lines", "on one line", "a space", "byte-order mark"],
)
def test_a_json_array_is_one_problem_that_says_so(content):
    examples, problems = problems_of(content)
    assert examples == [] and len(problems) == 1
    assert "JSON array" in problems[0] and "each object on a line of its own" in problems[0]


@pytest.mark.parametrize("content", [b"", b"\n  \n\r\n\t\n", b"\xef\xbb\xbf"])
def test_a_file_without_examples_is_refused_with_the_forms(content):
    with pytest.raises(SystemExit, match=r"data\.jsonl.*no examples.*prompt.*messages"):
        problems_of(content)


@pytest.mark.parametrize("name", ["absent.jsonl", "folder", "file.jsonl/train.jsonl", "fifo"])
def test_a_path_that_is_no_file_is_refused_with_the_settings_to_check(name):
    Path("folder").mkdir()
    write(GOOD, "file.jsonl")
    os.mkfifo("fifo")
    before = signal.signal(
        signal.SIGALRM, lambda *_: pytest.fail("it waits for a pipe's other end")
    )
    signal.alarm(10)
    try:
        with pytest.raises(SystemExit) as stop:
            t.read_examples(name)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert name in stop.value.code
    if name == "absent.jsonl":
        assert f"There is no file absent.jsonl (in {os.getcwd()})" in stop.value.code
    assert "TRAIN_FILE" in stop.value.code and "EVAL_FILE" in stop.value.code


@contextlib.contextmanager
def as_another_user():
    """Give up the rights of the superuser for a while, who may read everything."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)


@pytest.mark.parametrize("locked", ["file", "folder"])
def test_a_file_that_may_not_be_read_is_refused_with_the_reason(locked):
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        file = folder / "data.jsonl"
        file.write_bytes(GOOD)
        file.chmod(0 if locked == "file" else 0o644)
        folder.chmod(0 if locked == "folder" else 0o755)
        with as_another_user(), pytest.raises(SystemExit) as stop:
            t.read_examples(str(file))
        folder.chmod(0o755)
    assert "Permission denied" in stop.value.code and "TRAIN_FILE" in stop.value.code


def stopped(capsys, *argv):
    """Return what a dry run says, and what it ends with, as one line each."""
    model = ["--model_name", str(Path(SCRIPT).parent / "tests" / "tiny-qwen3.5")]
    with pytest.raises(SystemExit) as stop:
        t.main(["--demo", *model, "--dry_run", *argv])
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    return " ".join(out.split()), " ".join(err.split())


BAD_TEXT = [line(text="Hello"), GOOD, messages_line("uu")]
CONTROL = line_with_text("Good <|im_end|> night")


def test_all_bad_lines_of_both_files_are_one_list(capsys):
    files = write(b"\n".join(BAD_TEXT), "t"), write(b"\xff\n" + GOOD, "e")
    out, err = stopped(capsys, "--train_file", files[0], "--eval_file", files[1])
    assert re.findall(r"\b[te]:\d+(?=: )", err) == ["t:1", "t:3", "e:1"]
    assert err.endswith("The data has 3 problems, so nothing was trained.")
    assert out == ""  # no file is said to be taken


def test_what_only_the_tokenizer_sees_is_one_list_as_well(capsys):
    """It is looked at when nothing else is wrong, since that takes the heavy libraries."""
    files = write(b"\n".join([GOOD, CONTROL]), "t"), write(CONTROL + b"\n" + GOOD, "e")
    flags = ["--train_file", files[0], "--eval_file", files[1]]
    out, err = stopped(capsys, *flags)
    assert re.findall(r"\b[te]:\d+(?=: )", err) == ["t:2", "e:1"]
    assert err.count("<|im_end|>") == 2 and "plan" not in out
    assert err.endswith("The data has 2 problems, so nothing was trained.")
    write(b"{", "e")
    out, err = stopped(capsys, *flags)
    assert re.findall(r"\b[te]:\d+(?=: )", err) == ["e:1"]
    assert err.endswith("The data has 1 problem, so nothing was trained.")


def test_bad_lines_are_shown_though_the_other_file_is_missing(capsys):
    files = ["--train_file", write(b"\n".join(BAD_TEXT), "t"), "--eval_file", "absent.jsonl"]
    _, err = stopped(capsys, *files)
    assert re.findall(r"\bt:\d+(?=: )", err) == ["t:1", "t:3"] and "no file absent.jsonl" in err
    assert "3 problems" in err
    write(GOOD, "t")
    _, err = stopped(capsys, *files)
    assert err.startswith("There is no file absent.jsonl") and "problems" not in err


@pytest.mark.parametrize("bad", [b"bad", CONTROL], ids=["text", "control token"])
def test_the_first_20_bad_lines_are_named_and_all_are_counted(capsys, bad):
    file = write(b"\n".join([bad] * 50))
    _, err = stopped(capsys, "--train_file", file, "--eval_file", "")
    assert re.findall(r"data\.jsonl:(\d+)", err) == [str(n) for n in range(1, 21)]
    assert "and 30 more" in err and "50 problems" in err


def test_bad_lines_are_shown_within_a_second_before_heavy_imports():
    """A package named torch says so if it is imported."""
    write(b"print('TORCH', flush=True)\nraise SystemExit('enough')\n", "torch.py")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    files = ["--train_file", write(b"\n".join(BAD_TEXT * 300)), "--eval_file", write(b"{", "e")]
    done = subprocess.run(
        [sys.executable, SCRIPT, "--demo", *files],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        encoding="utf-8",
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 1 and "TORCH" not in done.stdout
    assert "data.jsonl:1: " in done.stderr and "and 581 more" in done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_no_example_of_a_file_with_bad_lines_is_said_to_be_taken(capsys):
    write(GOOD, "t"), write(b"{\n" + GOOD, "e")
    out, _ = stopped(capsys, "--train_file", "t", "--eval_file", "e")
    assert out == "data t: 1 examples"


# ---- huge lines, and files that grow

HUGE = {
    "garbage": lambda n: b"x" * n,
    "an integer for a message": lambda n: b'{"messages": [' + b"-" + b"7" * n + b"]}",
    "words for a list": lambda n: b'{"messages": "' + b"a-b c " * (n // 6) + b'"}',
    "a key": lambda n: b'{"' + b"k" * n + b'": 1}',
    "keys over several lines": lambda n: line(**{"a\nb" * n: 1}),
    "roles": lambda n: messages_line("u" * (n // 40)),
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_huge_line_is_a_short_problem(kind):
    _, problems = problems_of(b"\n" + HUGE[kind](200_000))
    assert len(problems) == 1 and len(problems[0]) < 300 and "\n" not in problems[0]
    assert problems[0].startswith("data.jsonl:2: ")


@pytest.mark.parametrize(
    ("line_of_words", "shown"),
    [
        (line(messages="こんにちは" * 40), "こんにちは"),
        (line_with_text(["x" * 300]), "xxxxxxxxxx"),
        (b'"' + b"x" * 300 + b'"', "xxxxxxxxxx"),
    ],
    ids=["a language without spaces", "a text in a list", "a text"],
)
def test_the_beginning_of_a_long_value_without_spaces_is_shown(line_of_words, shown):
    _, (problem,) = problems_of(line_of_words)
    assert shown in problem or json.dumps(shown)[1:-1] in problem


GROWING = {
    "lines": lambda n: (messages_line("uaua") + b"\n") * (n // 4),
    "bad lines": lambda n: b"not JSON\n" * n,
    "keys": lambda n: GOOD[:-1] + b"".join(b', "%d": %d' % (i, i) for i in range(n)) + b"}",
}


@pytest.mark.parametrize("kind", GROWING)
def test_a_file_of_20_000_parts_is_read_in_two_seconds_of_work(kind):
    began = time.process_time()
    problems_of(GROWING[kind](20_000))
    assert time.process_time() - began < 2


# ---- what is taken

HELLO = line(messages=talk_of("Hello", "Hi"))
TALK = talk_of("Hello", "Hi")
NUMERALS = talk_of("你好\u2028x\x85", "Grüß 👋")
ACCEPTED = [
    ("two lines", HELLO + b"\n" + HELLO + b"\n", [1, 2], TALK),
    ("no newline at the end", HELLO + b"\n" + HELLO, [1, 2], TALK),
    ("blank lines", b"\n\n" + HELLO + b"\n \t\n" + HELLO + b"\n\n", [3, 5], TALK),
    ("CRLF", HELLO + b"\r\n\r\n" + HELLO + b"\r\n", [1, 3], TALK),
    ("byte-order mark", b"\xef\xbb\xbf" + HELLO, [1], TALK),
    ("white space around", b" \t" + HELLO + b" \t", [1], TALK),
    ("letters", json.dumps({"messages": NUMERALS}, ensure_ascii=False).encode(), [1], NUMERALS),
    ("escapes", line(messages=NUMERALS), [1], NUMERALS),
    ("white space in a text", line(messages=talk_of(" Hello\n", "\tHi ")), [1],
     talk_of(" Hello\n", "\tHi ")),
    ("a think tag in a question", line(messages=talk_of("What is <think>?", "Hi")), [1],
     talk_of("What is <think>?", "Hi")),
    ("prompt and completion", line(prompt=TALK[:1], completion=TALK[1:]), [1], TALK),
    ("completion before prompt", line(completion=TALK[1:], prompt=TALK[:1]), [1], TALK),
    ("content before role", line(messages=[dict(reversed(one.items())) for one in TALK]), [1],
     TALK),
    ("other keys", line(id=3, score=float("nan"), conversations=[], messages=TALK), [1], TALK),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "lines", "talk"), [row[1:] for row in ACCEPTED], ids=[row[0] for row in ACCEPTED]
)
def test_an_accepted_file_keeps_its_texts_and_line_numbers(capsys, content, lines, talk):
    assert taken(content) == [(f"data.jsonl:{n}", talk[:1], talk[1]) for n in lines]
    assert capsys.readouterr().out.split() == f"data data.jsonl: {len(lines)} examples".split()


def test_messages_teach_each_reply_and_a_completion_only_its_own():
    chat = conversation("suauaua")
    assert taken(messages_line("suauaua") + b"\n" + completion_line("suauau", "a")) == [
        ("data.jsonl:1", chat[:2], chat[2]),
        ("data.jsonl:1", chat[:4], chat[4]),
        ("data.jsonl:1", chat[:6], chat[6]),
        ("data.jsonl:2", conversation("suauau"), conversation("a")[0]),
    ]


def test_each_example_has_its_lines_value_of_the_group_key():
    rows = [line(kind="short", messages=conversation("uaua")), line(messages=conversation("ua"))]
    examples, _ = t.read_examples(write(b"\n".join(rows)), "kind")
    assert [one.eval_group for one in examples] == ["short", "short", ""]
    examples, _ = t.read_examples("data.jsonl")
    assert [one.eval_group for one in examples] == ["", "", ""]


@pytest.mark.parametrize("value", ["\ud83d x", "x\udfff"])
def test_a_group_with_half_a_character_is_a_bad_line(value):
    """It could not be written into samples.md."""
    rows = [line(**{"kind": value, "": value}, messages=conversation("ua")), GOOD]
    examples, problems = t.read_examples(write(b"\n".join(rows)), "kind")
    assert [one.where for one in examples] == ["data.jsonl:2"]
    (said,) = problems
    assert said.startswith('data.jsonl:1: the value of "kind"') and "whole character" in said
    examples, problems = t.read_examples("data.jsonl")
    assert [one.eval_group for one in examples] == ["", ""] and not problems


def test_a_group_with_half_a_character_within_a_list_can_be_written():
    row = line(kind=["\ud83d"], messages=conversation("ua"))
    (example,), _ = t.read_examples(write(row), "kind")
    example.eval_group.encode("utf-8")


# ---- what is taken beyond that where an adapter of another trainer is measured


def sharegpt_line(*turns, **row):
    """Return a line of the ShareGPT form, each turn given as "from|value"."""
    keys = ("from", "value")
    return line(
        conversations=[dict(zip(keys, one.split("|"), strict=True)) for one in turns], **row
    )


def test_sharegpt_lines_are_taken_where_they_are_accepted():
    rows = [
        sharegpt_line("system|Be kind.", "human|Hello", "gpt|Hi", "human|So?", "gpt|So.", kind="a"),
        sharegpt_line("user|Hello", "chatgpt|Hi", system="Be brief."),
        sharegpt_line("human|Hello", "bing|Hi", system=" "),
        sharegpt_line("gpt|Welcome!", "human|Hello", "assistant|Hi", "human|And now?"),
        HELLO,
    ]
    path = write(b"\n".join(rows))
    examples, problems = t.read_examples(path, "kind", accepts_sharegpt=True)
    assert problems == []
    kind, brief = ({"role": "system", "content": text} for text in ("Be kind.", "Be brief."))
    longer = talk_of("Hello", "Hi", "So?", "So.")
    wanted = [(1, [kind, *TALK]), (1, [kind, *longer]), (2, [brief, *TALK])]
    wanted += [(3, TALK), (4, TALK), (5, TALK)]  # without what nobody asked, and the last question
    assert [(one.where, one.messages) for one in examples] == [
        (f"data.jsonl:{number}", talk) for number, talk in wanted
    ]
    assert [one.eval_group for one in examples] == ["a", "a", "", "", "", ""]
    # Training takes none of them but the last.
    examples, problems = t.read_examples(path)
    assert [one.where for one in examples] == ["data.jsonl:5"] and len(problems) == 4
    assert all('"conversations" to "messages"' in one for one in problems)


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (sharegpt_line("human|Hello", "function_call|f()"), 'role of message 2 is "function_call"'),
        (sharegpt_line("human|Hello", "gpt| "), "content of message 2 is empty"),
        (line(conversations=[{"from": "human", "text": "Hello"}]), 'message 1 has the key "from"'),
        (line(conversations=["Hello"]), 'message 1 is "Hello"'),
        (line(conversations="Hello"), '"conversations" to "messages"'),
        (sharegpt_line("gpt|Hi"), '"messages" is []'),
        (sharegpt_line("human|Hello", "gpt|Hi", tools=[]), '"tools"'),
    ],
    ids=["role", "empty", "other keys", "text", "no list", "no question", "tools"],
)
def test_a_sharegpt_line_that_cannot_be_taken_is_refused_as_any_other(bad, part):
    content = sharegpt_line("human|Hello", "gpt|Hi") + b"\n" + bad
    examples, (problem,) = t.read_examples(write(content), accepts_sharegpt=True)
    assert [one.where for one in examples] == ["data.jsonl:1"]
    assert problem.startswith("data.jsonl:2: ") and part in problem


def test_thoughts_are_taken_where_they_are_accepted():
    content = line_with_text("<think>\nHm.\n</think>\n\nHi")
    (example,), problems = t.read_examples(write(content), accepts_thinking=True)
    assert problems == [] and example.messages[-1]["content"].startswith("<think>")
    assert t.read_examples("data.jsonl")[0] == []


# ---- repeats


def repeats(capsys, train, held_out):
    """Return the pairs of lines that a run warns of; it ends where the model is looked for."""
    write(train, "t"), write(held_out, "e")
    flags = ["--dry_run", "--train_file", "t", "--eval_file", "e", "--model_name", "/none"]
    with pytest.raises(SystemExit):
        t.main([*flags, "--device", "cpu"])
    out = capsys.readouterr().out
    return re.findall(r"\b(e:\d+) has the prompt of (t:\d+)", out), out


def chats(*contents):
    """Return lines of conversations, each given as "user|assistant|...|assistant"."""
    return b"\n".join(line(messages=talk_of(*one.split("|"))) for one in contents)


@pytest.mark.parametrize(
    ("train", "held_out", "named"),
    [
        (["C|x", "B|x"], ["A|x", "B|y"], [("e:2", "t:2")]),
        (["A|x", "A|y"], ["A|z"], [("e:1", "t:1")]),
        (["A|x"], ["A|x", "A|x"], [("e:1", "t:1"), ("e:2", "t:1")]),
        (["A|x|B|y|C|z"], ["A|x|B|y|C|z"], [("e:1", "t:1")]),
        (["A|x|B|y"], ["A|z|B|y"], [("e:1", "t:1")]),
        (["A|x", "A|x"], ["B|x", "B|x"], []),
        (["A|x"], ["a|x", "A |x"], []),
        (["turn|x1|2|y"], ["turn2|x|12|y"], []),
    ],
)
def test_a_held_out_prompt_that_is_trained_on_is_warned_of_once(capsys, train, held_out, named):
    found, out = repeats(capsys, chats(*train), chats(*held_out))
    assert found == named
    assert ("warning" in out and "nothing new" in out) == bool(named)


def test_a_repeated_prompt_in_the_other_form_is_warned_of(capsys):
    reversed_keys = line(messages=[dict(reversed(one.items())) for one in conversation("sua")])
    chat = conversation("sua")
    other_form = line(completion=chat[2:], prompt=chat[:2])
    found, _ = repeats(capsys, messages_line("sua"), reversed_keys + b"\n" + other_form)
    assert found == [("e:1", "t:1"), ("e:2", "t:1")]


def test_the_first_20_repeats_are_named_and_the_others_counted(capsys):
    found, out = repeats(capsys, chats("A|x"), chats(*["A|x"] * 45))
    assert found == [(f"e:{n}", "t:1") for n in range(1, 21)] and "25 more" in out


# ---- a misspelt EVAL_GROUP


def warnings_of_group(capsys, group, *rows):
    """Return the warnings of a dry run with these held-out lines; no model is found for it."""
    write(chats("A|x"), "t"), write(b"\n".join(rows), "e")
    flags = ["--dry_run", "--train_file", "t", "--eval_file", "e", "--model_name", "/none"]
    with pytest.raises(SystemExit):
        t.main([*flags, "--device", "cpu", "--eval_group", group])
    return re.findall("^warning +(.*(?:\n {10}.*)*)", capsys.readouterr().out, re.MULTILINE)


def test_a_misspelt_group_is_warned_of_once_with_the_keys_there_are(capsys):
    rows = [
        line(messages=talk_of("B", "y"), topic="a", source="b"),
        line(messages=talk_of("C", "z"), **{f"key {n}": n for n in range(5)}),
    ]
    (said,) = warnings_of_group(capsys, "topics", *rows)
    assert 'EVAL_GROUP is "topics"' in said and said.count("\n") == 0
    assert re.findall(r'"(\w[^"]*)"', said)[1:] == ["topic", "source", "key 0", "key 1", "key 2"]
    assert "messages" not in said


def test_a_group_where_there_are_no_other_keys_is_warned_of(capsys):
    (said,) = warnings_of_group(capsys, "topic", line(messages=talk_of("B", "y")))
    assert 'EVAL_GROUP is "topic"' in said and "no other" in said


@pytest.mark.parametrize("group", ["topic", "blank", "kind", ""])
def test_a_group_that_a_line_has_none_and_the_default_are_not_warned_of(capsys, group):
    rows = [
        line(messages=talk_of("B", "y"), other=1),
        line(messages=talk_of("C", "z"), topic="a", blank=""),
    ]
    assert warnings_of_group(capsys, group, *rows) == []


# ---- system messages that only some lines have


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (
            ["sua", "ua", "suaua", "ua"],
            "2 of the 4 conversations in t have no system message (t:2 is one)",
        ),
        (["suaua", "uaua", "sua"], "1 of the 3 conversations in t has no system message (t:2)"),
        (["sua", "suaua"], ""),
        (["ua", "uaua"], ""),
    ],
    ids=["two lack it", "a dialogue lacks it", "all have one", "none has one"],
)
def test_a_system_message_that_only_some_lines_have_is_warned_of(capsys, roles, said):
    """Each line counts once, however many replies it has; held-out lines are not counted."""
    write(b"\n".join(map(messages_line, roles)), "t"), write(chats("B|y"), "e")
    flags = ["--dry_run", "--train_file", "t", "--eval_file", "e", "--model_name", "/none"]
    with pytest.raises(SystemExit):
        t.main([*flags, "--device", "cpu"])
    out = capsys.readouterr().out
    found = re.findall("^warning +(.*(?:\n {10}.*)*)", out, re.MULTILINE)
    assert len(found) == bool(said) and max(map(len, out.splitlines())) <= 100
    for text in found:
        text = " ".join(text.split())
        assert said in text and "may put one of its own there, which is then trained on" in text
        assert "Begin all of them with the system message that you will serve with" in text


# ---- any bytes

CHECKS = settings(
    deadline=None, max_examples=100, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
# Python's texts, and JSON's, can hold half a character (a lone surrogate); UTF-8 cannot.
LETTERS = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.integers(0xD800, 0xDFFF).map(chr),
    st.sampled_from("\ufeff\0\x85\u2028 "),
)
TEXT = st.text(LETTERS, max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(TEXT | st.sampled_from(["role", "content"]), inner, max_size=3)
    ),
    max_leaves=8,
)
NEARLY = ["", " \u2028", "\ud83d", "a\udfff", "assistant", "user", "system", "tool", None, [], {}]
KEYS = st.sampled_from(["role", "content", "messages", "prompt", "completion", "name"]) | TEXT
CONTENT = st.text(max_size=20).filter(str.strip)


@st.composite
def conversations(draw):
    """Return a valid line's object, in either form."""
    talk = draw(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3))
    messages = talk_of(*[text for pair in talk for text in pair])
    if draw(st.booleans()):
        messages.insert(0, {"role": "system", "content": draw(CONTENT)})
    row = {"messages": messages}
    if draw(st.booleans()):
        row = {"prompt": messages[:-1], "completion": messages[-1:]}
    return row | draw(st.dictionaries(st.text(min_size=11, max_size=15), TEXT, max_size=2))


def places(value):
    """Return (container, key) of each thing within value."""
    keys = list(value) if isinstance(value, dict) else []
    keys = range(len(value)) if isinstance(value, list) else keys
    return [(value, key) for key in keys] + [one for key in keys for one in places(value[key])]


@st.composite
def near_conversations(draw):
    """Return a valid object in which one thing is replaced, removed, doubled, renamed or added."""
    row = draw(conversations())
    place, key = draw(st.sampled_from(places(row)))
    change = draw(st.sampled_from(["replace", "replace", "remove", "double or rename", "add"]))
    if change == "replace":
        place[key] = draw(st.sampled_from(NEARLY) | VALUES)
    elif change == "remove":
        del place[key]
    elif isinstance(place, list):
        place.insert(key, place[key] if change != "add" else draw(VALUES))
    else:
        place[draw(KEYS)] = place.pop(key) if change != "add" else draw(TEXT)
    return row


def is_text(value):
    """Return whether value is a text that a tokenizer can take."""
    if not isinstance(value, str) or not value.strip():
        return False
    return value.encode("utf-8", "replace").decode("utf-8") == value


def outcome(data):
    """Return (examples, problems) of any bytes; any exception but SystemExit is a failure."""
    last = data.count(b"\n") + 1
    try:
        examples, problems = problems_of(data)
    except SystemExit as stop:
        return [], [stop.code]
    for problem in problems:
        problem.encode("utf-8")  # it can be printed, and written to a log
        found = re.fullmatch(r"data\.jsonl(:\d+)?: .+", problem)
        assert found and int((found[1] or ":1")[1:]) <= last and len(problem) < 400
    for example in examples:
        assert all(one.keys() == {"role", "content"} for one in example.messages)
        assert all(is_text(one["content"]) for one in example.messages)
        roles = [one["role"] for one in example.messages]
        roles = roles[roles[0] == "system" :]
        assert roles and roles == ["user", "assistant"] * (len(roles) // 2)
    return examples, problems


@CHECKS
@given(data=st.binary(max_size=200))
def test_random_bytes_are_problems_with_file_and_line(data):
    examples, problems = outcome(data)
    assert not examples and problems  # there is no conversation in so few random bytes


@CHECKS
@given(rows=st.lists(VALUES, min_size=1, max_size=3))
def test_any_json_that_is_no_conversation_is_refused_on_each_line(rows):
    content = b"\n".join(json.dumps(row).encode() for row in rows)
    examples, problems = outcome(content)
    assert not examples
    lines = [int(number) for number in re.findall(r"(?m)^data\.jsonl:(\d+): ", "\n".join(problems))]
    assert lines == [n + 1 for n in range(len(rows))] or "JSON array" in problems[0]


@CHECKS
@given(
    rows=st.lists(conversations(), min_size=1, max_size=3),
    escaped=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_any_valid_conversation_gives_its_replies_unchanged(rows, escaped, end):
    text = end.join(json.dumps(row, ensure_ascii=escaped) for row in rows)
    examples, problems = outcome(text.encode("utf-8", "replace"))
    expected = []
    for row in rows:
        messages = row.get("messages") or row["prompt"] + row["completion"]
        replies = [n for n, one in enumerate(messages) if one["role"] == "assistant"]
        replies = replies if "messages" in row else replies[-1:]
        expected += [messages[: reply + 1] for reply in replies]
    assert not problems and [one.messages for one in examples] == expected


def test_any_text_is_taken_unchanged_or_is_blank_or_no_unicode():
    drawn = {"taken": 0, "blank": 0, "half a character": 0}

    @CHECKS
    @given(text=TEXT)
    def check(text):
        examples, problems = outcome(line(messages=talk_of("a", text)))
        assert [one.messages for one in examples] == [talk_of("a", text)] * is_text(text)
        assert bool(examples) != bool(problems)
        kind = "taken" if examples else "half a character" if text.strip() else "blank"
        drawn[kind] += 1

    check()
    assert min(drawn.values()) > 0, drawn


@CHECKS
@given(row=near_conversations(), good=conversations())
def test_a_line_that_is_nearly_valid_is_read_right_or_refused_alone(row, good):
    data = b"\n".join(json.dumps(one).encode() for one in (good, row, good))
    examples, problems = outcome(data)
    blamed = re.findall(r"^data\.jsonl:(\d+): ", "\n".join(problems))
    assert blamed in ([], ["2"])
    assert {"data.jsonl:1", "data.jsonl:3"} <= {one.where for one in examples}
    assert ("data.jsonl:2" in {one.where for one in examples}) != bool(problems)


@CHECKS
@given(row=conversations(), at=st.floats(0, 1), cut=st.integers(0, 3), new=st.binary(max_size=3))
def test_a_line_with_bytes_changed_is_read_right_or_refused(row, at, cut, new):
    data = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")
    at = int(at * len(data))
    examples, problems = outcome(data[:at] + new + data[at + cut :])
    assert examples or problems
