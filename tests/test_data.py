"""Reading data: what is refused and how, what is accepted, and which repeats are named."""

import json
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_lora_single as t

ROLES = {"s": "system", "u": "user", "a": "assistant"}


def turns(roles):
    return [{"role": ROLES[r], "content": f"turn {n}"} for n, r in enumerate(roles, 1)]


def line(**row):
    return json.dumps(row).encode()


def reply_is(message):
    return line(messages=[*turns("u"), message])


def goes(roles):
    return line(messages=turns(roles))


def pair(prompt, completion):
    return line(prompt=turns(prompt), completion=turns(completion))


GOOD = goes("ua")
EITHER = ["either", "messages", "prompt and completion"]
MESSAGE = ["messages message 2", "role", "content"]

# name, bytes, the lines to blame, what the message must say
WHOLE_FILES = [
    ("empty file", b"", [], ["no examples", "one JSON object a line"]),
    ("only blank lines", b"\n  \n\r\n\t\n", [], ["no examples", "one JSON object a line"]),
    ("only a byte-order mark", b"\xef\xbb\xbf", [], ["no examples", "one JSON object a line"]),
    ("UTF-16", ("\ufeff" + GOOD.decode()).encode("utf-16-le"), [1], ["UTF-8"]),
    ("UTF-16 of three lines", "\n".join([GOOD.decode()] * 3).encode("utf-16"), [1, 2, 3], ["UTF-8"]),
    ("gzip", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff\xab", [1], ["UTF-8"]),
    ("pretty-printed", b'{\n  "messages": [\n    1\n  ]\n}\n', [1, 2, 3, 4, 5], ["not JSON", "one object a line"]),
    ("one list of all", b"[\n" + GOOD + b",\n" + GOOD + b"\n]\n", [1, 2, 4], ["not JSON", "one object a line"]),
    ("CSV", b"prompt,completion\nHello,Hi\n", [1, 2], ["not JSON", "one object a line"]),
    ("plain text", b"Hello\nHi\n", [1, 2], ["not JSON", "one object a line"]),
    ("cut off at the end", GOOD + b"\n" + GOOD[:40], [2], ["not JSON", "one object a line"]),
]
# name, bytes of the third line, what the message must say
LINES = [
    ("latin-1", '{"messages": "café"}'.encode("latin-1"), ["UTF-8"]),
    ("surrogate in bytes", b'{"messages": "\xed\xa0\xbd"}', ["UTF-8"]),
    ("trailing comma", GOOD[:-1] + b",}", ["not JSON"]),
    ("single quotes", GOOD.replace(b'"', b"'"), ["not JSON"]),
    ("truncated", GOOD[:-3], ["not JSON"]),
    ("two objects in one line", GOOD + b" " + GOOD, ["not JSON", "one object a line"]),
    ("comment", b"// " + GOOD, ["not JSON"]),
    ("raw tab in a string", GOOD.replace(b"turn 1", b"turn\t1"), ["not JSON"]),
    ("NUL byte", b"\0", ["not JSON"]),
    ("list", b"[" + GOOD + b"]", EITHER),
    ("string", b'"Hello"', ["'Hello'", *EITHER]),
    ("number", b"42", ["42", *EITHER]),
    ("null", b"null", EITHER),
    ("NaN", b'{"score": NaN, ' + GOOD[1:], ["NaN"]),
    ("Infinity", b'{"score": Infinity, ' + GOOD[1:], ["Infinity"]),
    ("-Infinity", b'{"score": -Infinity, ' + GOOD[1:], ["-Infinity"]),
    ("100,000 brackets", b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ["nested"]),
    ("integer of 5,000 digits", b'{"messages": ' + b"7" * 5_000 + b"}", ["messages", "list"]),
    ("prompt is an object", line(prompt=turns("u")[0], completion=turns("a")), ["prompt", "list"]),
    ("completion is an object", line(prompt=turns("u"), completion=turns("a")[0]), ["completion", "list"]),
    ("a form twice", GOOD[:-1] + b", " + GOOD[1:], ["twice"]),
    ("a content twice", GOOD.replace(b'"turn 1"', b'"turn 1", "content": "x"'), ["twice"]),
    ("empty object", b"{}", EITHER),
    ("neither form", line(text="Hello"), ["'text'", *EITHER]),
    ("ShareGPT", line(conversations=[{"from": "human", "value": "Hello"}]), ["'conversations'", *EITHER]),
    ("Alpaca", line(instruction="Greet", output="Hi"), ["'instruction'", *EITHER]),
    ("both forms", line(messages=turns("ua"), prompt=turns("u"), completion=turns("a")), EITHER),
    ("messages beside prompt", line(messages=turns("ua"), prompt=turns("u")), EITHER),
    ("prompt alone", line(prompt=turns("u")), EITHER),
    ("completion alone", line(completion=turns("a")), EITHER),
    ("key in capitals", line(Messages=turns("ua")), ["'Messages'", *EITHER]),
    ("prompt is a string", line(prompt="Hello", completion=turns("a")), ["prompt", "'Hello'"]),
    ("completion is a string", line(prompt=turns("u"), completion="Hi"), ["completion", "'Hi'"]),
    ("prompt is a list of strings", line(prompt=["Hello"], completion=turns("a")), ["prompt message 1", "'Hello'"]),
    ("messages is an object", line(messages=turns("u")[0]), ["messages"]),
    ("messages is null", line(messages=None), ["messages", "None"]),
    ("messages is empty", line(messages=[]), ["messages"]),
    ("message is a string", reply_is("Hi"), [*MESSAGE, "'Hi'"]),
    ("message is a list", reply_is(["assistant", "Hi"]), MESSAGE),
    ("message is null", reply_is(None), MESSAGE),
    ("message is empty", reply_is({}), MESSAGE),
    ("role missing", reply_is({"content": "Hi"}), MESSAGE),
    ("content missing", reply_is({"role": "assistant"}), MESSAGE),
    ("tool_calls", reply_is({"role": "assistant", "content": "Hi", "tool_calls": []}), [*MESSAGE, "'tool_calls'"]),
    ("name", reply_is({"role": "assistant", "content": "Hi", "name": "Nell"}), [*MESSAGE, "'name'"]),
    ("role human", reply_is({"role": "human", "content": "Hi"}), [*MESSAGE, "'human'"]),
    ("role tool", reply_is({"role": "tool", "content": "Hi"}), [*MESSAGE, "'tool'"]),
    ("role System", reply_is({"role": "System", "content": "Hi"}), [*MESSAGE, "'System'"]),
    ("role with a space", reply_is({"role": "assistant ", "content": "Hi"}), [*MESSAGE, "'assistant '"]),
    ("role null", reply_is({"role": None, "content": "Hi"}), [*MESSAGE, "None"]),
    ("role a list", reply_is({"role": ["assistant"], "content": "Hi"}), MESSAGE),
    ("content null", reply_is({"role": "assistant", "content": None}), [*MESSAGE, "None"]),
    ("content a number", reply_is({"role": "assistant", "content": 7}), [*MESSAGE, "7"]),
    ("content true", reply_is({"role": "assistant", "content": True}), [*MESSAGE, "True"]),
    ("content in parts", reply_is({"role": "assistant", "content": [{"type": "text", "text": "Hi"}]}), MESSAGE),
    ("content empty", reply_is({"role": "assistant", "content": ""}), [*MESSAGE, "blank"]),
    ("content white space", reply_is({"role": "assistant", "content": " \n\t\u3000"}), [*MESSAGE, "blank"]),
    ("high surrogate alone", reply_is({"role": "assistant", "content": "Hi \ud83d"}), [*MESSAGE, "surrogate"]),
    ("low surrogate alone", reply_is({"role": "assistant", "content": "\ude00 Hi"}), [*MESSAGE, "surrogate"]),
    ("prompt message", line(prompt=[{"role": "user"}], completion=turns("a")), ["prompt message 1"]),
    ("completion message", line(prompt=turns("u"), completion=[{"role": "assistant"}]), ["completion message 1"]),
    ("system not first", goes("usa"), ["messages", "user, system, assistant"]),
    ("two systems", goes("ssua"), ["messages", "system, system, user", "one system"]),
    ("system alone", goes("s"), ["messages", "system", "in turn"]),
    ("system and assistant", goes("sa"), ["messages", "system, assistant", "in turn"]),
    ("assistant first", goes("aua"), ["messages", "assistant, user, assistant", "in turn"]),
    ("assistant alone", goes("a"), ["messages", "in turn"]),
    ("two users in a row", goes("uua"), ["messages", "user, user, assistant", "in turn"]),
    ("two assistants in a row", goes("uaa"), ["messages", "user, assistant, assistant", "in turn"]),
    ("messages end with user", goes("uau"), ["messages", "user, assistant, user", "in turn"]),
    ("prompt is empty", pair("", "a"), ["prompt", "in turn"]),
    ("prompt is a system message", pair("s", "a"), ["prompt", "system", "in turn"]),
    ("prompt ends with assistant", pair("ua", "a"), ["prompt", "user, assistant", "in turn"]),
    ("prompt begins with assistant", pair("au", "a"), ["prompt", "assistant, user", "in turn"]),
    ("prompt has two users in a row", pair("uu", "a"), ["prompt", "user, user", "in turn"]),
    ("completion is empty", pair("u", ""), ["completion", "one assistant"]),
    ("completion of two", pair("u", "aa"), ["completion", "assistant, assistant", "one assistant"]),
    ("completion from user", pair("u", "u"), ["completion", "user", "one assistant"]),
]
BROKEN = WHOLE_FILES + [(name, GOOD + b"\n\n" + bad + b"\n", [3], parts) for name, bad, parts in LINES]


def write(folder, content, name="data.jsonl"):
    path = folder / name
    path.write_bytes(content)
    return str(path)


def refusal(path):
    with pytest.raises(SystemExit) as stop:
        t.read_examples(path)
    assert isinstance(stop.value.code, str)
    return stop.value.code


def blamed(message, path):
    return [int(number) for number in re.findall(rf"^{re.escape(path)}:(\d+): .", message, re.MULTILINE)]


@pytest.mark.parametrize(("content", "lines", "parts"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_file_is_refused_with_its_lines_and_the_reason(tmp_path, content, lines, parts):
    path = write(tmp_path, content)
    message = refusal(path)
    assert blamed(message, path) == lines
    text = message.replace(path, "")
    assert [part for part in parts if part not in text] == []
    assert len(text.splitlines()) == max(1, len(lines)) and max(map(len, text.splitlines())) < 400
    assert lines or message.startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("absent.jsonl", "No such file"), ("folder", "directory"), ("file.jsonl/train.jsonl", "Not a directory")],
    ids=["missing", "folder", "file used as a folder"],
)
def test_a_path_that_is_no_file_is_refused_with_the_constant_to_set(tmp_path, name, reason):
    (tmp_path / "folder").mkdir()
    write(tmp_path, GOOD, "file.jsonl")
    path = str(tmp_path / name)
    message = refusal(path)
    assert message.startswith(f"{path}: ") and reason in message and "TRAIN_FILE" in message
    assert "\n" not in message


def test_all_bad_lines_are_reported_with_their_own_numbers_and_reasons(tmp_path):
    content = [b"", b"{", GOOD, b"", b"\xff", b"\r", b'{"text": NaN}', GOOD, goes("uu"), b"   ", reply_is(7)]
    path = write(tmp_path, b"\n".join(content))
    message = refusal(path)
    assert blamed(message, path) == [2, 5, 7, 9, 11]
    for report, reason in zip(message.splitlines(), ["not JSON", "UTF-8", "NaN", "user, user", "7"], strict=True):
        assert reason in report.replace(path, "")


@pytest.mark.parametrize(
    ("count", "rest"), [(19, []), (20, []), (21, ["1 more"]), (1_520, ["1,500 more"])], ids=["19", "20", "21", "1520"]
)
def test_the_first_20_bad_lines_are_named_and_the_others_counted(tmp_path, count, rest):
    path = write(tmp_path, (GOOD + b"\n\nbad\n") * count)
    message = refusal(path)
    assert blamed(message, path) == list(range(3, 3 * count + 1, 3))[:20]
    last = message.splitlines()[20:]
    assert len(last) == len(rest) and all(part in text for part, text in zip(rest, last, strict=True))


def read(path):
    """Return (where, prompt, reply) of a file's examples, whose form is checked."""
    examples = t.read_examples(path)
    assert all(example.keys() == {"where", "messages", "reply", "prompt"} for example in examples)
    return [(e["where"], e["messages"][: e["reply"]], e["messages"][e["reply"]]) for e in examples]


def said(*contents):
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


HELLO = line(messages=said("Hello", "Hi"))
ACCEPTED = [
    ("LF", HELLO + b"\n" + HELLO + b"\n", [1, 2], said("Hello", "Hi")),
    ("no newline at the end", HELLO + b"\n" + HELLO, [1, 2], said("Hello", "Hi")),
    ("byte-order mark", b"\xef\xbb\xbf" + HELLO + b"\n" + HELLO, [1, 2], said("Hello", "Hi")),
    ("CRLF", HELLO + b"\r\n" + HELLO + b"\r\n", [1, 2], said("Hello", "Hi")),
    ("blank lines", b"\n \t\n" + HELLO + b"\n\r\n\n" + HELLO + b"\n\n", [3, 6], said("Hello", "Hi")),
    ("spaces around", b"  " + HELLO + b"\t ", [1], said("Hello", "Hi")),
    ("non-ASCII", json.dumps({"messages": said("你好", "Grüß 👋")}, ensure_ascii=False).encode(), [1],
     said("你好", "Grüß 👋")),
    ("escapes", line(messages=said("你好", "Grüß 👋")), [1], said("你好", "Grüß 👋")),
    ("line separators in a string", '{"messages": [{"role": "user", "content": "a\u2028b\x85c"}, '
     '{"role": "assistant", "content": "d\\ne"}]}'.encode(), [1], said("a\u2028b\x85c", "d\ne")),
    ("white space around a text", line(messages=said(" Hello\n", "\tHi ")), [1], said(" Hello\n", "\tHi ")),
    ("prompt and completion", line(prompt=said("Hello"), completion=[said("", "Hi")[1]]), [1], said("Hello", "Hi")),
    ("completion before prompt", line(completion=[said("", "Hi")[1]], prompt=said("Hello")), [1],
     said("Hello", "Hi")),
    ("content before role", b'{"messages": [{"content": "Hello", "role": "user"}, '
     b'{"content": "Hi", "role": "assistant"}]}', [1], said("Hello", "Hi")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "lines", "conversation"), [row[1:] for row in ACCEPTED], ids=[row[0] for row in ACCEPTED]
)
def test_an_accepted_file_keeps_its_texts_and_line_numbers(tmp_path, capsys, content, lines, conversation):
    path = write(tmp_path, content)
    assert read(path) == [(f"{path}:{n}", conversation[:1], conversation[1]) for n in lines]
    out = capsys.readouterr().out
    assert f"{path}: {len(lines)} example" in out and "not used" not in out and len(out.splitlines()) == 1


def test_messages_give_an_example_for_each_reply(tmp_path, capsys):
    chat = turns("suauaua")
    path = write(tmp_path, GOOD + b"\n" + line(messages=chat))
    assert read(path) == [
        (f"{path}:1", turns("u"), turns("ua")[1]),
        (f"{path}:2", chat[:2], chat[2]),
        (f"{path}:2", chat[:4], chat[4]),
        (f"{path}:2", chat[:6], chat[6]),
    ]
    assert "4 examples" in capsys.readouterr().out


def test_a_prompt_with_earlier_replies_gives_only_its_completion(tmp_path):
    path = write(tmp_path, pair("suauau", "a"))
    assert read(path) == [(f"{path}:1", turns("suauau"), turns("a")[0])]


def test_the_replies_of_one_line_share_its_messages_so_that_a_long_one_takes_no_square_of_its_memory(tmp_path):
    examples = t.read_examples(write(tmp_path, goes("ua" * 200)))
    assert len(examples) == 200 and len({id(example["messages"]) for example in examples}) == 1


def test_prompts_that_say_the_same_and_no_others_have_the_same_hash(tmp_path):
    chats = [goes("suauaua"), goes("uaua"), pair("suau", "a"), pair("uau", "a"), pair("u", "a")]
    prompts = [said(" turn 1"), said("turn 1 "), said("turn", "x1", "2"), said("turn", "x", "12")]
    prompts += [
        said("turn 1", "turn 2", "turn 1"),
        said("turn 1", "other", "turn 3"),
        said("other", "turn 2", "turn 3"),
    ]
    chats += [line(prompt=prompt, completion=turns("a")) for prompt in prompts]
    examples = t.read_examples(write(tmp_path, b"\n".join(chats)))
    pairs = {(json.dumps(e["messages"][: e["reply"]]), e["prompt"]) for e in examples}
    assert len(examples) == 15
    assert len(pairs) == len({text for text, _ in pairs}) == len({number for _, number in pairs}) == 12


def test_keys_not_used_are_named_once(tmp_path, capsys):
    rows = [{"id": n, "messages": turns("ua")} for n in range(9)] + [{"source": {"a": [1]}, "messages": turns("ua")}]
    path = write(tmp_path, b"\n".join(line(**row) for row in rows) + b"\n" + pair("u", "a"))
    assert len(t.read_examples(path)) == 11
    out = capsys.readouterr().out
    assert out.count("id, source") == out.count("not used") == len(out.splitlines()) == 1


def example(where, prompt="Hello", reply="Hi"):
    messages = [*said(*prompt.split("|")), {"role": "assistant", "content": reply}]
    return {"where": where, **t.parse_line(json.dumps({"messages": messages}))[0][-1]}


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        ([], []),
        ([example("t:1", "A", "x"), example("t:2", "B", "x")], [example("e:1", "C", "x")]),
        ([example("t:1", "A", "x"), example("t:2", "A", "y")], []),
        ([example("t:1", "B", "x")], [example("e:1", "A", "x"), example("e:2", "A", "y")]),
        ([example("t:1", "A|B|C", "x")], [example("e:1", "A", "B")]),
        ([example("t:1", "A", "x"), example("t:2", "a", "x")], []),
    ],
    ids=["no examples", "reply", "prompt in train", "prompt in eval", "beginning", "capitals"],
)
def test_what_is_no_repeat_is_not_warned_of(capsys, train, evaluation):
    t.warn_of_repeats(train, evaluation)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("train", "evaluation", "named"),
    [
        ([example("t:1"), example("t:2", "A"), example("t:3")], [], [("t:3", "t:1")]),
        ([example("t:1"), example("t:2"), example("t:3")], [], [("t:2", "t:1"), ("t:3", "t:1")]),
        ([], [example("e:1"), example("e:2", "A"), example("e:3")], [("e:3", "e:1")]),
        ([example("t:7", "A|B|C", "x")], [example("e:1"), example("e:2", "A|B|C", "y")], [("e:2", "t:7")]),
        ([example("t:7")], [example("e:2")], [("e:2", "t:7")]),
        (
            [example("t:1"), example("t:2")],
            [example("e:1", "A"), example("e:2", "A")],
            [("t:2", "t:1"), ("e:2", "e:1")],
        ),
    ],
    ids=["in train", "thrice in train", "in eval", "prompt in both", "example in both", "in each"],
)
def test_a_repeat_is_warned_of_with_both_lines(capsys, train, evaluation, named):
    t.warn_of_repeats(train, evaluation)
    out = capsys.readouterr().out
    assert out.startswith("warning")
    assert [tuple(re.findall(r"[te]:\d+", text)) for text in out.splitlines()] == named


@pytest.mark.parametrize(("count", "rest"), [(20, []), (21, ["1 more"]), (45, ["25 more"])])
def test_the_first_20_repeats_are_named_and_the_others_counted(capsys, count, rest):
    t.warn_of_repeats([example(f"t:{n}") for n in range(count + 1)], [])
    out = capsys.readouterr().out.splitlines()
    assert [re.findall(r"t:\d+", text) for text in out[:20]] == [[f"t:{n}", "t:0"] for n in range(1, 21)]
    assert len(out) == 20 + len(rest) and all(part in text for part, text in zip(rest, out[20:], strict=True))


def test_the_script_refuses_a_bad_line_with_status_1_before_any_heavy_import(tmp_path):
    path = write(tmp_path, GOOD + b"\n\n" + GOOD[:-1])
    command = [sys.executable, "-X", "importtime", t.__file__]
    command += ["--train_file", path, "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    imported = set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE))
    assert done.returncode == 1
    assert re.search(rf"^{re.escape(path)}:3: .*not JSON", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr + done.stdout
    assert "json" in imported
    assert not imported & {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy"}
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["all_logs.log"]
    assert f"{path}:3: " in (tmp_path / "out" / "all_logs.log").read_text(encoding="utf-8")


TEXT = st.text(st.characters(), max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
MESSAGES = st.fixed_dictionaries({"role": st.sampled_from([*ROLES.values()]) | JSON, "content": TEXT | JSON})
CONVERSATIONS = st.sampled_from(["u", "a", "ua", "sua", "uau", ""]).map(turns) | st.lists(MESSAGES, max_size=3) | JSON
CONVERSATIONS |= st.sampled_from([*turns("u"), *turns("a")])
ROWS = st.fixed_dictionaries({"messages": CONVERSATIONS}, optional={"id": JSON})
ROWS |= st.fixed_dictionaries({"prompt": CONVERSATIONS, "completion": CONVERSATIONS}, optional={"messages": JSON})
PIECES = st.sampled_from([GOOD, b"\n", b"\r", b"\xef\xbb\xbf", b"{", b"}", b'"', b"\\ud800", b"[", b"]"])


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.binary(max_size=40)
    | st.lists(PIECES | st.binary(max_size=4), max_size=8).map(b"".join)
    | st.lists(JSON | ROWS, min_size=1, max_size=2).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    | ROWS.map(lambda row: line(**row))
)
def test_any_bytes_give_examples_or_one_message(tmp_path_factory, content):
    path = write(tmp_path_factory.getbasetemp(), content, "any.jsonl")
    try:
        examples = t.read_examples(path)
    except SystemExit as stop:
        assert isinstance(stop.code, str) and stop.code.encode().startswith(f"{path}:".encode())
    else:
        assert examples
        for row in examples:
            *prompt, reply = row["messages"][: row["reply"] + 1]
            assert prompt[-1]["role"] == "user" and reply["role"] == "assistant"
            assert all(turn["content"].strip().encode() for turn in [*prompt, reply])


def test_a_key_that_cannot_be_printed_is_named_all_the_same(tmp_path, capsys):
    path = write(tmp_path, line(**{"\ud800": 1, "a\nb": 2, "messages": turns("ua")}))
    assert len(t.read_examples(path)) == 1
    out = capsys.readouterr().out
    assert "\\ud800" in out and len(out.splitlines()) == 1


def test_a_repeat_with_its_keys_in_another_order_or_in_the_other_form_is_warned_of(tmp_path, capsys):
    reversed_keys = line(messages=[dict(reversed(message.items())) for message in turns("sua")])
    other_form = line(completion=turns("sua")[2:], prompt=turns("sua")[:2])
    path = write(tmp_path, b"\n".join([goes("sua"), reversed_keys, other_form]))
    examples = t.read_examples(path)
    capsys.readouterr()
    t.warn_of_repeats(examples, [])
    assert [re.findall(r":(\d)\b", text) for text in capsys.readouterr().out.splitlines()] == [["2", "1"], ["3", "1"]]


def test_only_the_files_own_line_number_is_named(tmp_path):
    path = write(tmp_path, GOOD + b"\n\n" + GOOD[:-3] + b"\n")
    assert not re.search(r"line \d", refusal(path).replace(path, ""))


def test_a_huge_integer_in_a_key_that_is_not_used_is_no_error(tmp_path):
    assert len(t.read_examples(write(tmp_path, b'{"id": ' + b"7" * 5_000 + b", " + GOOD[1:]))) == 1


def test_a_repeated_line_of_three_replies_is_named_once(tmp_path, capsys):
    path = write(tmp_path, (line(messages=turns("uauaua")) + b"\n") * 2)
    examples = t.read_examples(path)
    capsys.readouterr()
    t.warn_of_repeats(examples, [])
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_roles_of_a_long_conversation_are_not_all_printed(tmp_path):
    assert len(refusal(write(tmp_path, line(messages=turns("ua" * 100 + "u"))))) < 600


def test_both_forms_are_named_whatever_other_keys_there_are(tmp_path):
    row = {"a": 1, "b": 1, "c": 1, "d": 1, "messages": turns("ua"), "prompt": turns("u")}
    path = write(tmp_path, json.dumps(row).encode())
    message = refusal(path).replace(path, "")
    assert "messages and prompt;" in message
