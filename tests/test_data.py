"""Data: the four formats, which lines are refused and how, and what "10%" holds out."""

import contextlib
import hashlib
import json
import os
import random
import re
from pathlib import Path

import pytest
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_lora_single as t

ROLES = {"s": "system", "u": "user", "a": "assistant"}


def talk(roles):
    """Return messages with these roles, such as "sua", and numbered texts."""
    return [{"role": ROLES[role], "content": f"turn {n}"} for n, role in enumerate(roles, 1)]


def hello(question="Hello?", reply="Hi.", system=""):
    """Return the messages of a conversation of one turn."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def sharegpt(messages, **more):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[one["role"]], "value": one["content"]} for one in messages]
    return {"conversations": turns, **more}


def line(**row):
    return json.dumps(row).encode()


def reply_line(**message):
    """Return a line whose reply is this message."""
    return line(messages=[*talk("u"), message])


def write(name, *rows):
    """Write a file with a line for each row, given as an object or as bytes; return its name."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    Path(name).write_bytes(b"".join(one + b"\n" for one in lines))
    return name


GOOD = line(messages=talk("ua"))


@pytest.fixture(autouse=True)
def in_a_folder(in_the_root, tmp_path, monkeypatch):
    """Work where the files are, so that their names stay short."""
    monkeypatch.chdir(tmp_path)


def read(content, **how):
    """Return (examples, problems) of a file with these bytes."""
    Path("data.jsonl").write_bytes(content)
    return t.read_conversations("data.jsonl", **how)


def learned(content, **how):
    """Return the messages of each example of a file in which nothing is wrong."""
    examples, problems = read(content, **how)
    assert problems == []
    return [one.messages for one in examples]


def dry_run(*flags):
    t.main(["--dry_run", "--model_name", TINY, "--train_file", "t", "--eval_file", "", *flags])


def refusal(capsys, *flags):
    """Return the lines of what a dry run is refused with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        dry_run(*flags)
    assert stop.value.code == 1
    return capsys.readouterr().err.splitlines()


# ---- the forms ----------------------------------------------------------------------------------

SAID = hello("Who are you?\nSay it.", "Nell.", "Be kind.")
DATA_FORMATS = {
    "prompt and completion": {"prompt": SAID[:2], "completion": SAID[2:]},
    "messages": {"messages": SAID},
    "ShareGPT": sharegpt(SAID),
    "ShareGPT with a system key": sharegpt(SAID[1:], system="Be kind."),
    "Alpaca": {
        "system": "Be kind.",
        "instruction": "Who are you?",
        "input": "Say it.",
        "output": "Nell.",
    },
}


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_all_forms_give_the_same_examples(layout):
    rows = [row | {"kind": name} for name, row in DATA_FORMATS.items()]
    content = json.dumps(rows, indent=1) if layout == "array" else "\n".join(map(json.dumps, rows))
    examples, problems = read(content.encode())
    assert problems == [] and [one.messages for one in examples] == [SAID] * len(DATA_FORMATS)
    where = "data.jsonl:{}" if layout == "lines" else "data.jsonl, entry {}"
    assert [one.source for one in examples] == [
        where.format(n + 1) for n in range(len(DATA_FORMATS))
    ]
    assert [one.row["kind"] for one in examples] == [*DATA_FORMATS]
    assert all(one.system_message == "Be kind." for one in examples)


@pytest.mark.parametrize("name", DATA_FORMATS)
def test_a_system_message_may_be_a_key_of_the_line_in_every_form(name):
    said = {"ShareGPT": sharegpt(SAID[1:]), "messages": {"messages": SAID[1:]}}
    said["prompt and completion"] = {"prompt": SAID[1:2], "completion": SAID[2:]}
    row = said.get(name, DATA_FORMATS[name]) | {"system": "Be kind."}
    (example,), problems = read(line(**row))
    assert not problems and example.messages[0] == {"role": "system", "content": "Be kind."}
    assert [one["role"] for one in example.messages] == ["system", "user", "assistant"]


def test_keys_that_are_null_are_ignored():
    """So are written the files that a table with a column for each key becomes."""
    keys = [key for keys in t.DATA_FORMATS for key in keys] + [
        "tools",
        "system",
        "input",
        "history",
    ]
    nulls = dict.fromkeys([*keys, "id"])
    said = talk("suaua")
    several = [{"messages": said}, sharegpt(said), {"prompt": said[:4], "completion": said[4:]}]
    for row in [*DATA_FORMATS.values(), *several]:
        assert learned(line(**nulls | row)) == learned(line(**row))
    nulls_of_messages = {"name": None, "tool_calls": None}
    assert learned(line(messages=[one | nulls_of_messages for one in SAID])) == [SAID]
    _, (problem,) = read(line(**nulls | {"messages": talk("uau")}))
    assert "missing" in problem.text
    # What belongs to another form, but is not one, is a key like any other.
    assert learned(line(messages=said, output="x", prompt="y")) == [said[:3], said]


def test_messages_teach_each_reply_and_the_other_forms_the_last():
    said = talk("suaua")
    each = [said[:3], said]
    assert learned(line(messages=said)) == learned(line(**sharegpt(said))) == each
    assert learned(line(prompt=said[:4], completion=said[4:])) == [said]
    assert learned(line(messages=said), replies="last") == [said]
    assert learned(line(instruction="Hello?", input="", output="Hi.")) == [hello()]


def test_replies_count_in_both_files(capsys):
    write("t", {"messages": talk("uauaua")}, {"messages": talk("ua")})
    write("e", {"messages": talk("sua")}, {"messages": talk("suaua")})
    for replies, counts in (("all", ["4", "3"]), ("last", ["2", "2"])):
        dry_run("--eval_file", "e", "--replies", replies)
        out = capsys.readouterr().out
        assert [re.search(rf"(?m)^ +{name} +(\d+) ", out)[1] for name in "te"] == counts


def test_of_sharegpt_a_greeting_and_a_last_question_are_left_out_and_counted(capsys):
    names = ("from", "value")
    rows = [
        [("gpt", "Welcome!"), ("human", "Hello?"), ("gpt", "Hi."), ("human", "And now?")],
        [("system", "Be kind."), ("bing", "Yes?"), ("user", "Hello?"), ("chatgpt", "Hi.")],
        [("human", "Hello?"), ("assistant", "Hi.")],
    ]
    turns = [[dict(zip(names, turn, strict=True)) for turn in row] for row in rows]
    content = b"\n".join(line(conversations=row) for row in turns)
    assert learned(content) == [hello(), hello(system="Be kind."), hello()]
    said = " ".join(capsys.readouterr().out.split())
    assert "3 conversations" in said and "in 2 of them a greeting or a question" in said
    # In the other forms they are refused, and what is missing is said.
    for roles, part in (("uau", "the reply to learn is missing"), ("aua", "before the first")):
        _, (problem,) = read(line(messages=talk(roles)))
        assert part in problem.text


# ---- what is refused ----------------------------------------------------------------------------

NEST = b'{"messages": ' + b"[" * 99_999 + b"]" * 99_999 + b"}"
REFUSED = [
    ("not UTF-8", '{"messages": "café"}'.encode("latin-1"), ["UTF-8", "byte 18"]),
    ("half a character's bytes", GOOD.replace(b"turn 1", b"\xed\xa0\xbd"), ["UTF-8"]),
    ("trailing comma", GOOD[:-1] + b",}", ["not JSON", "character"]),
    ("a quotation mark", GOOD.replace(b"turn 1", b'a "turn" 1'), ["character", "backslash"]),
    ("truncated", GOOD[:-3], ["not JSON"]),
    ("two objects", GOOD + b" " + GOOD, ["not JSON", f"character {len(GOOD) + 2}"]),
    ("CSV", b"user,assistant", ["not JSON", "write", "completion", "messages"]),
    ("a number", b"42", ["not an object", "42", "prompt", "completion", "messages"]),
    ("nested too deeply", NEST, ["deep"]),
    ("5,000 digits", b'{"messages": ' + b"7" * 5_000 + b"}", ["digits"]),
    ("a key twice", b'{"id": 1, "id": 2, ' + GOOD[1:], ['"id"', "twice", "remove"]),
    ("content twice", GOOD.replace(b'"turn 1"', b'"x", "content": "y"'), ['"content"', "twice"]),
    ("tools", line(messages=talk("ua"), tools=[]), ['"tools"', "remove"]),
    ("functions", line(messages=talk("ua"), functions=[]), ['"functions"', "remove"]),
    ("two system messages", line(messages=talk("sua"), system="Hi"), ["message 2", "system"]),
    ("no form", line(text="Hello"), ["text", "prompt", "completion", "messages"]),
    ("an empty object", b"{}", ["nothing", "messages"]),
    ("two forms", line(messages=[], conversations=[]), ["messages and conversations"]),
    ("prompt alone", line(prompt=talk("u")), ["prompt", "completion"]),
    ("prompt is a text", line(prompt="Hi", completion=talk("a")), ['"prompt" is "Hi"']),
    ("messages is empty", line(messages=[]), ['"messages" is []']),
    ("messages is an object", line(messages={"0": "Hi"}), ['"messages" is {']),
    ("completion of 3", line(prompt=talk("u"), completion=talk("aua")), ["3 messages", "prompt"]),
    ("a message is a text", line(messages=[*talk("u"), "Hi"]), ["message 2: ", 'is "Hi"']),
    ("a name", reply_line(role="assistant", content="a", name="N"), ["message 2", '"name"']),
    ("no role", reply_line(content="Hi"), ['2, "role": Field required']),
    ("no content", reply_line(role="assistant", content=None), ['2, "content": Field required']),
    ("role tool", reply_line(role="tool", content="Hi"), ['2, "role"', 'is "tool"', "'user'"]),
    ("role is a list", reply_line(role=["user"], content="Hi"), ['2, "role"', 'is ["user"]']),
    ("content in parts", reply_line(role="assistant", content=[{}]), ['2, "content"', "is [{}]"]),
    ("white space", reply_line(role="assistant", content=" \n\u3000"), ["message 2", "empty"]),
    ("half a character", reply_line(role="assistant", content="\ud83d"), ["message 2", "half"]),
    ("thoughts", reply_line(role="assistant", content="<think>Hm.</think>Hi"), ["2", "<think>"]),
    ("no user", line(messages=talk("sa")), ["question"]),
    ("a system message alone", line(messages=talk("s")), ["question"]),
    ("no reply", line(messages=talk("u")), ["reply", "missing"]),
    ("a reply first", line(messages=talk("saua")), ["before the first question"]),
    ("system in the middle", line(messages=talk("usa")), ["message 2", "system"]),
    ("two users", line(prompt=talk("uu"), completion=talk("a")), ["messages 1 and 2", "user"]),
    ("two replies", line(messages=talk("suaa")), ["messages 3 and 4", "assistant"]),
    ("ShareGPT's tool", line(conversations=[{"from": "tool", "value": "x"}]), ['"tool"']),
    ("ShareGPT's other keys", line(conversations=[{"who": "me"}]), ["message 1", '"role"']),
    ("ShareGPT is a text", line(conversations="Hi"), ['"conversations" is "Hi"']),
    ("ShareGPT without a question", line(**sharegpt(talk("a"))), ["question"]),
    ("ShareGPT with a weight", line(conversations=[
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hi", "weight": 0}]),
     ['message 2, "weight"', "not permitted"]),
    ("Alpaca with history", line(instruction="a", output="b", history=[["c", "d"]]), ["history"]),
    ("ShareGPT with two contents", line(conversations=[
        {"from": "human", "value": "Hi", "content": "Bye"}, {"from": "gpt", "value": "Hi"}]),
     ["message 1", "Field required"]),
    ("Alpaca's input is 0", line(instruction="a", input=0, output="b"), ['message 1, "content"']),
    ("a system message of 0", line(messages=talk("ua"), system=0), ['message 1, "content"']),
    ("Alpaca's numbers", line(instruction=1, output="b"), ['message 1, "content"']),
    ("Alpaca without output", line(instruction="a", output=None), ["instruction", "messages"]),
    ("a long text", line(**{"k" * 9_999: "v" * 9_999}), ["kkkkkkkk", "messages"]),
]  # fmt: skip


def is_json(text):
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text.decode())
        return True
    return False


@pytest.mark.parametrize(
    ("bad", "parts"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_what_is_wrong_is_named_with_file_and_line_and_the_fix(bad, parts):
    files = {"data.jsonl:3": GOOD + b"\n\n" + bad + b"\n" + GOOD}
    if is_json(bad) and "twice" not in parts:
        files["data.jsonl, entry 2"] = b"[" + b",\n".join([GOOD, bad, GOOD]) + b"]"
    for where, content in files.items():
        examples, (problem,) = read(content)
        assert len(examples) == 2 and problem.source == where
        assert len(problem.text) < 300 and "\n" not in problem.text
        assert [part for part in parts if part not in problem.text] == []


NO_ARRAYS = {
    "cut": (b"[\n" + GOOD + b",\n" + GOOD[:-9], "line 3"),
    "never closed": (b"[\n" + GOOD + b",", "line 2"),
    "two of them": (b"[" + GOOD + b"]\n[" + GOOD + b"]", ""),
    "5,000 digits": (b"[" + b"7" * 5000 + b"]", "digits"),
    "not UTF-8": (b"[" + GOOD.replace(b"turn", b"\xff") + b"]", "utf-8"),
    "nested too deeply": (b"[" * 99_999 + b"]" * 99_999, ""),
    "a key twice": (b"[" + GOOD[:-1] + b', "id": 1, "id": 2}]', '"id" occurs twice'),
}


@pytest.mark.parametrize("name", NO_ARRAYS)
def test_an_array_that_is_none_is_refused(name, capsys):
    content, part = NO_ARRAYS[name]
    Path("t").write_bytes(content)
    (said,) = refusal(capsys)
    assert said.startswith("t ") and "JSON array" in said and part in said


@pytest.mark.parametrize(
    "name", ["absent", "folder", "/dev/null", "locked", "empty", "blank", "[]"]
)
def test_a_file_that_cannot_be_read_or_is_empty_is_one_sentence(name, capsys, monkeypatch):
    Path("folder").mkdir()
    for file, content in (("empty", b""), ("blank", b"\xef\xbb\xbf\n \n"), ("[]", b"[]")):
        Path(file).write_bytes(content)
    write("locked", GOOD)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    if name == "locked":  # which would stop nobody who has a superuser's rights
        monkeypatch.setattr(Path, "read_bytes", refuse)
    (said,) = refusal(capsys, "--train_file", name)
    parts = {
        "absent": f"no file absent (in {os.getcwd()})",
        "folder": "is not a file",
        "/dev/null": "is not a file",
        "locked": "cannot be read (Permission",
    }
    assert name in said and parts.get(name, "no conversations; write") in said


def test_all_problems_of_both_files_are_one_list_with_what_the_tokenizer_finds(capsys):
    # Its two replies are two examples, but the line is named once.
    control = {"messages": [*hello("Good <|im_end|> night"), *hello()]}
    write("t", GOOD, *[b'{"text": 1}'] * 30, {"messages": talk("uu")}, control)
    write("e", b"\xff", control, {"messages": hello()}, *[b"[]" + b" " * n for n in range(30)])
    said = refusal(capsys, "--eval_file", "e")
    alike = [one for one in said if "the line has" in one]
    assert len(alike) == 1 and alike[0].startswith("t:2, t:3, t:4, ... and 27 more: ")
    assert any(one.startswith("t:32: ") for one in said)
    assert any(one.startswith("t:33, e:2: ") and "<|im_end|>" in one for one in said)
    assert any(one.startswith("e:1: ") and "UTF-8" in one for one in said)
    assert said[-1] == "The data has 64 problems, so nothing was trained."
    # What differs in a number or in what is quoted alone is of one kind.
    write("t", *[line(**{f"key {n}": 1}) for n in range(25)], b'{"a" 1}', b'{"text" 1}')
    said = refusal(capsys)
    assert len(said) == 3 and said[0].startswith("t:1, t:2, t:3, ... and 22 more: ")
    assert said[1].startswith("t:26, t:27: this is not JSON")


# ---- what is taken as it is ---------------------------------------------------------------------

LETTERS = hello("你好\u2028x\x85", " Grüß 👋\t")
TAKEN = {
    "no newline at the end": (GOOD + b"\n" + GOOD, [1, 2]),
    "blank lines": (b"\n\n" + GOOD + b"\n \t\n" + GOOD + b"\n\n", [3, 5]),
    "CRLF": (GOOD + b"\r\n\r\n" + GOOD + b"\r\n", [1, 3]),
    "byte order marks": (b"\xef\xbb\xbf" + GOOD + b"\n\xef\xbb\xbf" + GOOD, [1, 2]),
    "other keys": (line(id=3, score=float("nan"), text="\ud83d", messages=talk("ua")), [1]),
    "content first": (line(messages=[dict(reversed(one.items())) for one in talk("ua")]), [1]),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_file_is_taken_with_its_line_numbers(name):
    content, lines = TAKEN[name]
    examples, problems = read(content)
    assert not problems and [one.source for one in examples] == [f"data.jsonl:{n}" for n in lines]
    assert all(one.messages == talk("ua") for one in examples)


@pytest.mark.parametrize("escaped", [True, False])
def test_letters_white_space_and_a_tag_in_a_question_stay(escaped):
    tag = hello("What is <think>?")
    for said in (LETTERS, tag):
        row = json.dumps({"messages": said}, ensure_ascii=escaped)
        assert learned(row.encode()) == [said]
        assert learned(b"\xef\xbb\xbf\n [" + row.encode() + b"]") == [said]


def test_thoughts_are_taken_where_they_are_accepted():
    said = hello(reply="<think>\nHm.\n</think>\n\nHi")
    assert learned(line(messages=said), accepts_thinking=True) == [said]


# ---- any lines ----------------------------------------------------------------------------------

TEXT = st.text(
    st.characters(exclude_categories=["Cs"])
    | st.integers(0xD800, 0xDFFF).map(chr)  # JSON's texts can hold half a character
    | st.sampled_from("\ufeff\0\x85\u2028 "),
    max_size=8,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KEYS = [key for keys in t.DATA_FORMATS for key in keys] + [
    "role",
    "content",
    "from",
    "value",
    "input",
]
NEARLY = ["", " \u2028", "\ud83d", "a\udfff", "assistant", "user", "tool", None, [], {}, 10**30]


@st.composite
def lines(draw):
    """Return (what a line should teach or None, its bytes): valid, or with a thing or two changed.

    A thing is replaced, removed, doubled or renamed, or a few bytes are changed.
    """
    texts = st.text(max_size=8).filter(str.strip)
    said = hello(draw(texts), draw(texts), draw(texts | st.just("")))
    system = {"system": said[0]["content"]} if len(said) == 3 else {}
    alpaca = {"instruction": said[-2]["content"].strip() or "?", "output": said[-1]["content"]}
    forms = [{"messages": said}, {"prompt": said[:-1], "completion": said[-1:]}, sharegpt(said)]
    row = draw(st.sampled_from([*forms, alpaca | system]))
    row = json.loads(json.dumps(row))  # the same text twice is one object otherwise
    changes = draw(st.integers(0, 2))
    for _ in range(changes):
        place, key = draw(st.sampled_from(places(row) or [(row, "role")]))
        change = draw(st.sampled_from(["replace", "remove", "rename", "double"]))
        if change == "replace" or key not in places_of(place):
            place[key] = draw(st.sampled_from(NEARLY) | VALUES)
        elif change == "remove":
            del place[key]
        elif isinstance(place, list):
            place.insert(key, place[key])
        else:
            place[draw(st.sampled_from(KEYS) | TEXT)] = place.pop(key)
    data = json.dumps(row, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        at, cut = draw(st.integers(0, len(data))), draw(st.integers(0, 3))
        data = data[:at] + draw(st.binary(max_size=3)).replace(b"\n", b"") + data[at + cut :]
        changes += 1
    return (None if changes else said), data


def places_of(value):
    """Return the keys of a container."""
    return list(value) if isinstance(value, dict) else list(range(len(value)))


def places(value):
    """Return (container, key) of each thing within value."""
    if not isinstance(value, (dict, list)):
        return []
    keys = places_of(value)
    return [(value, key) for key in keys] + [one for key in keys for one in places(value[key])]


@settings(
    deadline=None,
    max_examples=120,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(drawn=lines())
def test_any_line_is_read_right_or_refused_alone(drawn):
    said, data = drawn
    examples, problems = read(b"\n".join([GOOD, data, GOOD]))
    assert {one.source for one in problems} <= {"data.jsonl:2"}
    read_right = [one for one in examples if one.source == "data.jsonl:2"]
    assert len(examples) == 2 + len(read_right)
    assert bool(read_right) != bool(problems) or not data.strip()
    for problem in problems:
        assert len(problem.text) < 400 and "\n" not in problem.text
    for example in read_right:
        roles = [one["role"] for one in example.messages]
        roles = roles[roles[0] == "system" :]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        for message in example.messages:
            assert message.keys() == {"role", "content"} and message["content"].strip()
            message["content"].encode()
    if said:
        assert len(read_right) == 1 and len(read_right[0].messages) == len(said)
        found = [one["content"].strip() for one in read_right[0].messages]
        assert found == [one["content"].strip() for one in said]


@settings(
    deadline=None,
    max_examples=100,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=st.binary(max_size=50) | VALUES.map(lambda one: json.dumps([one]).encode()))
def test_any_bytes_are_problems(content):
    with contextlib.suppress(t.UserError):
        examples, problems = read(content)
        assert not examples and problems  # so few bytes hold no conversation


# ---- what is warned of --------------------------------------------------------------------------


def warnings_in(text):
    return [" ".join(one.split()) for one in re.findall(r"(?m)^warning +(.*(?:\n {10}.*)*)", text)]


def test_a_system_message_that_only_some_have_is_warned_of(capsys):
    """A conversation counts once, however many replies it has."""
    cases = {
        ("sua", "ua", "suaua", "uaua"): "2 of 4 conversations",
        ("sua", "suaua"): "",
        ("ua",): "",
    }
    for roles, part in cases.items():
        write("t", *[{"messages": talk(one)} for one in roles])
        dry_run()
        said = warnings_in(capsys.readouterr().out)
        assert len(said) == bool(part)
        assert all(part in one and "t:2" in one and "no system message" in one for one in said)


def test_ones_own_conversations_are_not_judged_by_the_shipped_ones_in_silence(capsys):
    write("t", {"messages": talk("ua")})
    shipped = {name: str(t.HERE / "data" / f"{name}.jsonl") for name in ("train", "eval")}
    for train_file, part in (("t", '"10%"'), (shipped["train"], "")):
        dry_run("--train_file", train_file, "--eval_file", shipped["eval"])
        said = [one for one in warnings_in(capsys.readouterr().out) if "EVAL_FILE" in one]
        assert len(said) == bool(part) and all(part in one for one in said)


def test_a_held_out_prompt_that_is_trained_on_is_warned_of_in_any_form(capsys):
    def repeats(train, held_out):
        write("t", *train), write("e", *held_out)
        dry_run("--eval_file", "e")
        return re.findall(r"\b(e:\d+) has the same prompt as (t:\d+)", capsys.readouterr().out)

    asked = [{"messages": hello(f"Question {n}?", f"Reply {n}.")} for n in range(3)]
    again = {"instruction": "Question 1?", "output": "Another reply."}
    assert repeats(asked, [{"messages": hello("New?")}, again]) == [("e:2", "t:2")]
    assert repeats(asked, [sharegpt(hello("Question 0?")), again]) == [
        ("e:1", "t:1"),
        ("e:2", "t:2"),
    ]
    other_beginning = {"messages": [*hello("New?"), *hello("Question 1?")]}
    assert repeats(asked, [other_beginning]) == []
    same = {"messages": hello("Question 1?", system="Be kind.")}
    assert repeats([one | {"id": 1} for one in asked], [same]) == []
    found = repeats(asked[:1], [{"messages": hello("Question 0?")}] * 45)
    assert found == [(f"e:{n}", "t:1") for n in range(1, 21)]  # and 25 more


@pytest.mark.parametrize(("known", "is_told"), [(2, True), (1, False)])
def test_held_out_replies_that_are_trained_on_are_counted(known, is_told, capsys):
    """Stock answers in both files: their loss falls, and nothing was generalised."""
    write("t", *[{"messages": hello(f"Question {n}?", f"Reply {n}.")} for n in range(20)])
    replies = [f" Reply {n}." if n < known else f"New reply {n}." for n in range(10)]
    write("e", *[{"messages": hello(f"New {n}?", reply)} for n, reply in enumerate(replies)])
    dry_run("--eval_file", "e")
    said = [one for one in warnings_in(capsys.readouterr().out) if "word for word" in one]
    assert len(said) == is_told and all(one.startswith("2 of 10 ") for one in said)


# ---- EVAL_FILE "10%" ----------------------------------------------------------------------------


def prepared(*flags):
    """Return a job whose data is read and divided."""
    files = ["--model_name", TINY, "--train_file", "t", "--eval_file", "10%"]
    job = t.Job(t.parse_settings(["--dry_run", *files, *flags]))
    t.prepare(job)
    return job


def questions(examples):
    """Return the first question of each conversation."""
    firsts = {}
    for one in examples:
        firsts[one.source] = next(m["content"] for m in one.messages if m["role"] == "user")
    return list(firsts.values())


def test_a_tenth_is_held_out_in_whole_groups_that_are_not_trained():
    """Those that begin alike are a group: versions of one conversation, or its parts."""
    rows = []
    for n in range(150):
        first = hello(f"Question {n}?", f"Reply {n}.")
        rows += [{"messages": first}, sharegpt([*hello(f" Question {n}?\n", "Other."), *hello()])]
    random.Random(0).shuffle(rows)
    write("t", *rows)
    job = prepared()
    held_out, train = questions(job.held_out), questions(job.examples)
    assert len(held_out) in (30, 31) and len(held_out) + len(train) == 300
    assert not {one.strip() for one in held_out} & {one.strip() for one in train}
    assert len({one.strip() for one in held_out}) == len(held_out) / 2
    assert len(job.held_out) == 3 * len(held_out) / 2  # each reply of the longer ones
    # Neither another seed nor another order changes which they are.
    random.Random(1).shuffle(rows)
    write("t", *rows)
    assert sorted(questions(prepared("--seed", "7").held_out)) == sorted(held_out)


def test_another_system_message_is_another_beginning():
    """Or else all of these would stay in training, since they share their question."""
    write("t", *[{"messages": hello(system=f"You are number {n}.")} for n in range(100)])
    assert len(prepared().held_out) == 20


def test_at_least_20_are_held_out_and_a_large_group_is_trained():
    write("t", *[{"messages": hello(f"Question {n}?")} for n in range(60)])
    assert len(prepared("--eval_file", "1%").held_out) == 20
    assert len(prepared("--eval_file", "50 %").held_out) == 30
    # A group may have a twentieth of all, and no more.
    write("t", *[{"messages": hello(f"Question {n // 5}?")} for n in range(100)])
    assert len(prepared().held_out) == 20
    large = [{"messages": hello(f"Large {n // 6}?")} for n in range(30)]
    write("t", *large, *[{"messages": hello(f"Question {n}?")} for n in range(70)])
    job = prepared("--eval_file", "50%")
    assert len(job.held_out) == 50 and not any("Large" in one for one in questions(job.held_out))


@pytest.mark.parametrize(("count", "is_raised"), [(190, True), (191, False), (200, False)])
def test_it_is_said_where_a_share_is_raised_to_20(count, is_raised, capsys):
    """A tenth of 191 is rounded up to 20, which is enough."""
    write("t", *[{"messages": hello(f"Question {n}?")} for n in range(count)])
    assert len(prepared("--eval_file", "10%").held_out) == 20
    t.main(["--demo", "--dry_run", "--model_name", TINY, "--train_file", "t", "--eval_file", "10%"])
    said = " ".join(capsys.readouterr().out.split())
    assert ("(10% would be too few to measure with, so 20 are taken)" in said) == is_raised


@pytest.mark.parametrize("rows", ["few", "alike"])
def test_too_few_to_hold_out_is_a_sentence(rows, capsys):
    count, groups = (39, 39) if rows == "few" else (100, 1)
    write("t", *[{"messages": hello(f"Question {n % groups}?")} for n in range(count)])
    said = " ".join(refusal(capsys, "--eval_file", "10%"))
    assert f"{count} conversations" in said and "20" in said and "EVAL_FILE" in said
    if rows == "few":
        write("t", *[{"messages": hello(f"Question {n}?")} for n in range(40)])
        assert len(prepared().held_out) == 20


def test_held_out_lines_are_kept_as_they_were_beside_the_adapter(capsys):
    """Also those of an array. What is there already belongs to another job."""
    rows = [{"messages": hello(f"Größe {n}?"), "id": n, "null": None} for n in range(30)]
    greeting = [{"role": "assistant", "content": "Welcome!"}]
    rows += [sharegpt(greeting + hello(f"So {n}?"), half="\ud83d") for n in range(30)]
    Path("t").write_text(json.dumps(rows, indent=1))
    flags = ["--demo", "--model_name", TINY, "--train_file", "t", "--eval_file", "10%"]
    flags += ["--output_dir", "out", "--max_steps", "1"]
    t.main([*flags, "--dry_run"])
    assert not Path("out").exists()
    path = Path("out/held_out.jsonl")
    path.parent.mkdir()
    path.write_text("of another job")
    t.main(flags)
    (aside,) = Path("out").glob("held_out.jsonl.*")
    assert aside.read_text() == "of another job"
    kept = path.read_bytes()
    found = [json.loads(one) for one in kept.splitlines()]
    assert len(found) == 20 and [row for row in rows if row in found] == found
    assert sum("conversations" in row for row in found) not in (0, 20)
    data = json.loads(Path("out/run.json").read_bytes())["data"]
    assert (data["held_out"]["examples"], data["train"]["examples"]) == (20, 40)
    assert data["held_out"]["file"] == str(path)
    assert data["held_out"]["sha256"] == hashlib.sha256(kept).hexdigest()
    examples, _ = t.read_conversations(str(path))
    job = prepared(*flags)
    assert [one.messages for one in examples] == [one.messages for one in job.held_out]
    capsys.readouterr()
    t.main(flags)
    assert re.search("(?m)^finished ", capsys.readouterr().out) and path.read_bytes() == kept
    # The conversations count, and not the bytes; and a finished job is finished.
    for other in (kept[:-1] + b" \n", kept.replace(b"So ", b"Or ")):
        path.write_bytes(other)
        t.main(flags)
        assert re.search("(?m)^finished ", capsys.readouterr().out) and path.read_bytes() == other
