"""Data: what is refused and how, what is taken, which repeats are named, and any bytes at all."""

import itertools
import json
import os
import re
import signal
import sys
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_lora_single as t

ROLES = {"s": "system", "u": "user", "a": "assistant"}


def turns(roles):
    return [{"role": ROLES[r], "content": f"turn {n}"} for n, r in enumerate(roles, 1)]


def line(**row):
    return json.dumps(row).encode()


def goes(roles):
    return line(messages=turns(roles))


def pair(prompt, completion):
    return line(prompt=turns(prompt), completion=turns(completion))


def reply_is(message):
    return line(messages=[*turns("u"), message])


def says(content):
    return reply_is({"role": "assistant", "content": content})


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
    return [int(n) for n in re.findall(rf"^{re.escape(path)}:(\d+): .", message, re.MULTILINE)]


# ---- what is refused

GOOD = goes("ua")
ADVICE = "write one JSON object a line, in UTF-8; README.md shows the forms"
FORMS = "; write one list, messages, or two, prompt and completion"
RULE = "; write only role (system, user, assistant) and content (no blank or surrogate)"
MESSAGE = [": message 2 is ", RULE]
ARE = ": the messages are "
TURNS = "; write at most one system, then user and assistant in turn"
NONE = ": no conversation, or two: "
SEVERAL = ": completion has several messages; write the last one"

# name, bytes, the lines to blame, what the message must say
WHOLE_FILES = [
    ("empty file", b"", [], ["no examples"]),
    ("only blank lines", b"\n  \n\r\n\t\n", [], ["no examples"]),
    ("only a byte-order mark", b"\xef\xbb\xbf", [], ["no examples"]),
    (
        "UTF-16",
        ("\ufeff" + GOOD.decode()).encode("utf-16-le"),
        [1],
        ["'utf-8' codec can't decode byte"],
    ),
    ("gzip", b"\x1f\x8b\x08\x00\x00\x02\xff\xab", [1], ["'utf-8' codec can't decode byte"]),
    ("pretty-printed", b'{\n "messages": [\n  1\n ]\n}\n', [1, 2, 3, 4, 5], ["column 2"]),
    ("one list of all", b"[\n" + GOOD + b",\n" + GOOD + b"\n]\n", [1, 2, 4], ["column 2"]),
    ("CSV", b"prompt,completion\nHello,Hi\n", [1, 2], ["Expecting value: column 1"]),
    ("cut off at the end", GOOD + b"\n" + GOOD[:40], [2], [" column "]),
    ("old Mac's line ends", GOOD + b"\r" + GOOD, [1], ["Extra data"]),
]
# name, bytes of the third line, what the message must say
LINES = [
    ("latin-1", '{"messages": "café"}'.encode("latin-1"), ["byte 0xe9 in position 17"]),
    ("surrogate in bytes", b'{"messages": "\xed\xa0\xbd"}', ["'utf-8' codec can't decode byte"]),
    ("trailing comma", GOOD[:-1] + b",}", [" column "]),
    ("single quotes", GOOD.replace(b'"', b"'"), ["column 2"]),
    ("truncated", GOOD[:-3], [" column "]),
    ("two objects in one line", GOOD + b" " + GOOD, [" column "]),
    ("comment", b"// " + GOOD, ["column 1"]),
    ("raw tab in a string", GOOD.replace(b"turn 1", b"turn\t1"), ["control character"]),
    ("NUL byte", b"\0", ["column 1"]),
    ("list", b"[" + GOOD + b"]", [NONE + "[{'messages'", FORMS]),
    ("string", b'"Hello"', [NONE + "'Hello';", FORMS]),
    ("number", b"42", [NONE + "42;", FORMS]),
    ("null", b"null", [NONE + "None;", FORMS]),
    ("empty object", b"{}", [NONE + "{};", FORMS]),
    ("NaN for messages", b'{"messages": NaN}', [NONE + "{'messages': nan};", FORMS]),
    ("NaN for a text", GOOD.replace(b'"turn 2"', b"NaN"), [*MESSAGE, "nan"]),
    ("100,000 brackets", b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", []),
    ("integer of 5,000 digits", b'{"messages": ' + b"7" * 5_000 + b"}", ["digits"]),
    ("a form twice", GOOD[:-1] + b", " + GOOD[1:], ["a key twice", "remove it"]),
    ("a content twice", GOOD.replace(b'"turn 1"', b'"x", "content": "y"'), ["twice", "remove it"]),
    ("an unused key twice", b'{"id": 1, "id": 2, ' + GOOD[1:], ["a key twice", "remove it"]),
    ("neither form", line(text="Hello"), [NONE + "{'text': 'Hello'};", FORMS]),
    ("key in capitals", line(Messages=turns("ua")), [NONE + "{'Messages'", FORMS]),
    ("ShareGPT", line(conversations=[{"from": "human"}]), [NONE + "{'conversations'", FORMS]),
    ("Alpaca", line(instruction="Greet", output="Hi"), [NONE + "{'instruction'", FORMS]),
    ("both forms", line(messages=turns("ua"), prompt=turns("u"), completion=turns("a")),
     [NONE + "{'messages'", FORMS]),
    ("messages beside prompt", line(a=1, messages=turns("ua"), b=1, prompt=turns("u")),
     [NONE + "{'a'", FORMS]),
    ("messages beside a text", line(prompt="Hi", messages=turns("ua")),
     [NONE + "{'prompt': 'Hi'", FORMS]),
    ("prompt alone", line(prompt=turns("u")), [NONE + "{'prompt'", FORMS]),
    ("completion alone", line(completion=turns("a")), [NONE + "{'completion'", FORMS]),
    ("prompt is a string", line(prompt="Hi", completion=turns("a")),
     [NONE + "{'prompt': 'Hi'", FORMS]),
    ("completion is a string", line(completion="Hi", prompt=turns("u")),
     [NONE + "{'completion': 'Hi'", FORMS]),
    ("prompt is an object", line(prompt=turns("u")[0], completion=turns("a")),
     [NONE + "{'prompt': {", FORMS]),
    ("completion is an object", line(completion=turns("a")[0], prompt=turns("u")),
     [NONE + "{'completion': {", FORMS]),
    ("prompt is a list of strings", line(prompt=["Hello"], completion=turns("a")),
     [": message 1 is 'Hello';", RULE]),
    ("messages is an object", line(messages=turns("u")[0]), [NONE + "{'messages': {", FORMS]),
    ("messages is null", line(messages=None), [NONE + "{'messages': None};", FORMS]),
    ("messages is empty", line(messages=[]), [": the messages are ", TURNS]),
    ("message is a string", reply_is("Hi"), [*MESSAGE, "'Hi'"]),
    ("message is a list", reply_is(["assistant", "Hi"]), [*MESSAGE, "['assistant', 'Hi']"]),
    ("message is null", reply_is(None), [*MESSAGE, "None"]),
    ("message is empty", reply_is({}), [*MESSAGE, "{}"]),
    ("role missing", reply_is({"content": "Hi"}), [*MESSAGE, "{'content': 'Hi'}"]),
    ("content missing", reply_is({"role": "assistant"}), [*MESSAGE, "{'role': 'assistant'}"]),
    ("tool_calls", reply_is({"role": "assistant", "content": "Hi", "tool_calls": []}),
     [*MESSAGE, "'tool_calls'"]),
    ("role human", reply_is({"role": "human", "content": "Hi"}), [*MESSAGE, "'human'"]),
    ("role tool", reply_is({"role": "tool", "content": "Hi"}), [*MESSAGE, "'tool'"]),
    ("role System", reply_is({"role": "System", "content": "Hi"}), [*MESSAGE, "'System'"]),
    ("role with a space", reply_is({"role": "user ", "content": "Hi"}), [*MESSAGE, "'user '"]),
    ("role null", reply_is({"role": None, "content": "Hi"}), [*MESSAGE, "'role': None"]),
    ("role a list", reply_is({"role": ["user"], "content": "Hi"}), [*MESSAGE, "['user']"]),
    ("content null", says(None), [*MESSAGE, "'content': None"]),
    ("content a number", says(7), [*MESSAGE, "'content': 7"]),
    ("content true", says(True), [*MESSAGE, "'content': True"]),
    ("content in parts", says([{"type": "text", "text": "Hi"}]), [*MESSAGE, "[{'type'"]),
    ("content empty", says(""), [*MESSAGE, "'content': ''"]),
    ("content white space", says(" \n\t\u3000"), [*MESSAGE, r"' \n\t\u3000'"]),
    ("high surrogate alone", says("Hi \ud83d"), [*MESSAGE, r"'Hi \ud83d'"]),
    ("low surrogate alone", says("\ude00 Hi"), [*MESSAGE, r"'\ude00 Hi'"]),
    ("prompt message", line(prompt=[{}], completion=turns("a")), [": message 1 is {};", RULE]),
    ("completion message", line(prompt=turns("suau"), completion=[{}]),
     [": message 5 is {};", RULE]),
    *((f"messages {roles}", goes(roles), [ARE + found, TURNS]) for roles, found in {
        "usa": "user, system, assistant;", "ssua": "system, system, user, assistant;",
        "s": "system;", "sa": "system, assistant;", "aua": "assistant, user, assistant;",
        "a": "assistant;", "uua": "user, user, assistant;", "uaa": "user, assistant, assistant;",
        "uau": "user, assistant, user;",
    }.items()),
    *((f"prompt {roles}", pair(roles, "a"), [ARE + found, TURNS]) for roles, found in {
        "": "assistant;", "s": "system, assistant;", "ua": "user, assistant, assistant;",
        "au": "assistant, user, assistant;", "uu": "user, user, assistant;",
    }.items()),
    *((f"completion {roles}", pair("u", roles), [ARE + found, TURNS]) for roles, found in {
        "": "user;", "aa": "user, assistant, assistant;", "u": "user, user;",
    }.items()),
    ("many turns", goes("u" * 8), [ARE + "user, user, user, user, user, user, ... and 2 more;"]),
    *((f"prompt {prompt}, completion {reply}", pair(prompt, reply), [SEVERAL])
      for prompt, reply in (("u", "aua"), ("ua", "ua"), ("", "ua"), ("", "sua"), ("s", "ua"))),
    ("prompt ua, completion empty", pair("ua", ""), [": completion has", "the last one"]),
]  # fmt: skip
BROKEN = WHOLE_FILES + [
    (name, GOOD + b"\n\n" + bad + b"\n", [3], parts) for name, bad, parts in LINES
]


@pytest.mark.parametrize(
    ("content", "lines", "parts"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN]
)
def test_a_broken_file_is_refused_with_its_lines_the_reason_and_the_fix(
    tmp_path, content, lines, parts
):
    path = write(tmp_path, content)
    message = refusal(path)
    text = message.replace(path, "")
    assert blamed(message, path) == lines and message.startswith(f"{path}:")
    assert [part for part in parts if part not in text] == []
    *said, advice = text.splitlines()
    assert advice == ADVICE and len(said) == max(1, len(lines)) and max(map(len, said)) < 300
    assert not re.search(r"line \d", text)  # the JSON decoder's own, which is always 1


@pytest.mark.parametrize("name", ["absent.jsonl", "folder", "file.jsonl/train.jsonl", "fifo"])
def test_a_path_that_is_no_file_is_refused_with_the_constants_to_set(tmp_path, name):
    (tmp_path / "folder").mkdir()
    write(tmp_path, GOOD, "file.jsonl")
    os.mkfifo(tmp_path / "fifo")
    before = signal.signal(
        signal.SIGALRM, lambda *_: pytest.fail("it waits for a pipe's other end")
    )
    signal.alarm(10)
    try:
        message = refusal(str(tmp_path / name))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    fault = "not a file; set TRAIN_FILE and EVAL_FILE to JSONL files"
    assert message == f"{tmp_path / name}: {fault}"


def test_all_bad_lines_are_reported_at_once_with_their_own_reasons(tmp_path):
    content = [b"", b"{", GOOD, b"", b"\xff", b"\r", b"[]", GOOD, goes("uu"), b"   ", says(7)]
    path = write(tmp_path, b"\n".join(content))
    message = refusal(path)
    assert blamed(message, path) == [2, 5, 7, 9, 11]
    reasons = ["column 2", "utf-8", "two: []", "user, user", "'content': 7", ADVICE]
    for said, reason in zip(message.splitlines(), reasons, strict=True):
        assert reason in said.replace(path, "")


@pytest.mark.parametrize(
    ("count", "rest"), [(19, []), (20, []), (21, ["1 more"]), (1_520, ["1,500 more"])]
)
def test_the_first_20_bad_lines_are_named_and_the_others_counted(tmp_path, count, rest):
    path = write(tmp_path, (GOOD + b"\n\nbad\n") * count)
    message = refusal(path)
    assert blamed(message, path) == list(range(3, 3 * count + 1, 3))[:20]
    *last, advice = message.splitlines()[min(count, 20) :]
    assert len(last) == len(rest) and advice == ADVICE
    assert all(part in said for part, said in zip(rest, last, strict=True))


HUGE = {
    "garbage": lambda n: b"x" * n,
    "no text at all": lambda n: bytes(n),
    "a byte that is not UTF-8 at its end": lambda n: b"x" * n + b"\xff",
    "nested lists": lambda n: b"[" * n,
    "nested objects": lambda n: b'{"messages": ' * (n // 13),
    "nested but closed": lambda n: b'{"messages": ' + b"[" * (n // 2) + b"]" * (n // 2) + b"}",
    "an integer": lambda n: b"1" * n,
    "an integer for a message": lambda n: b'{"messages": [' + b"-" + b"7" * n + b"]}",
    "a fraction": lambda n: b"0." + b"1" * n,
    "an exponent": lambda n: b'{"messages": 1e' + b"9" * n + b"}",
    "a text for a list": lambda n: b'{"messages": "' + b"a" * n + b'"}',
    "words for a list": lambda n: b'{"messages": "' + b"a-b c " * (n // 6) + b'"}',
    "lone surrogates": lambda n: says("?").replace(b"?", b"\\ud800" * (n // 6)),
    "a blank text": lambda n: says("?").replace(b"?", b"\\n" * (n // 2)),
    "a key": lambda n: b'{"' + b"k" * n + b'": 1}',
    "an open quote": lambda n: b'{"messages": [{"role": "' + b"a" * n,
    "roles": lambda n: goes("u" * (n // 40)),
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_huge_line_is_a_short_message(tmp_path, kind):
    path = write(tmp_path, b"\n" + HUGE[kind](1_000_000))
    message = refusal(path)
    assert blamed(message, path) == [2]
    said, advice = message.split("\n")
    assert advice == ADVICE and len(said.replace(path, "")) < 250


def line_of(messages):
    """Return a line of a conversation with so many messages."""
    return goes("ua" * (messages // 2))


GROWING = {
    "lines": lambda n: (line_of(4) + b"\n") * (n // 4),
    "turns": line_of,
    "bad lines": lambda n: b"not JSON\n" * n,
    "turns before a bad one": lambda n: line_of(n)[:-2] + b", 1]}",
    "turns that do not alternate": lambda n: line_of(n).replace(b'"assistant"', b'"user"'),
    "unused keys": lambda n: GOOD[:-1] + b"".join(b', "%d": %d' % (i, i) for i in range(n)) + b"}",
}


def work(path):
    """Return how many calls, of Python's and of C's functions, it takes to read a file."""
    calls = [0]

    def count(*_):
        calls[0] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        t.read_examples(path)
    except SystemExit:
        pass
    finally:
        sys.setprofile(before)
    return calls[0]


def memory(path):
    """Return how many bytes are in use at the peak of reading a file."""
    tracemalloc.start()
    try:
        t.read_examples(path)
    except SystemExit:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("measure", [work, memory])
@pytest.mark.parametrize("kind", GROWING)
def test_work_and_memory_grow_as_the_file_does(tmp_path, kind, measure):
    small, large = (write(tmp_path, GROWING[kind](n), f"{n}.jsonl") for n in (500, 4_000))
    # Eight times the file: eight times as much, or less where a part is the same for each file.
    # Tables of dictionaries and lists grow in jumps, by up to two. Squared it would be 64.
    assert measure(small) <= measure(large) < 16 * measure(small)


# ---- what is taken


def read(path):
    """Return (where, prompt, reply) of a file's examples."""
    examples = t.read_examples(path)
    return [(e["where"], e["messages"][: e["reply"]], e["messages"][e["reply"]]) for e in examples]


def said(*contents):
    return [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]


TALK = said("Hello", "Hi")
HELLO = line(messages=TALK)
ACCEPTED = [
    ("LF", HELLO + b"\n" + HELLO + b"\n", [1, 2], TALK),
    ("no newline at the end", HELLO + b"\n" + HELLO, [1, 2], TALK),
    ("byte-order mark", b"\xef\xbb\xbf" + HELLO + b"\n" + HELLO, [1, 2], TALK),
    ("two files after each other", (b"\xef\xbb\xbf" + HELLO + b"\n") * 2, [1, 2], TALK),
    ("CRLF", HELLO + b"\r\n" + HELLO + b"\r\n", [1, 2], TALK),
    ("blank lines", b"\n \t\n" + HELLO + b"\n\r\n\n" + HELLO + b"\n\n", [3, 6], TALK),
    ("spaces around", b"  " + HELLO + b"\t ", [1], TALK),
    ("non-ASCII", '{"messages": [{"role": "user", "content": "你好"}, '
     '{"role": "assistant", "content": "Grüß 👋"}]}'.encode(), [1], said("你好", "Grüß 👋")),
    ("escapes", line(messages=said("你好", "Grüß 👋")), [1], said("你好", "Grüß 👋")),
    ("line separators in a text", '{"messages": [{"role": "user", "content": "a\u2028b\x85c"}, '
     '{"role": "assistant", "content": "d\\ne"}]}'.encode(), [1], said("a\u2028b\x85c", "d\ne")),
    ("white space around a text", line(messages=said(" Hello\n", "\tHi ")), [1],
     said(" Hello\n", "\tHi ")),
    ("prompt and completion", line(prompt=TALK[:1], completion=TALK[1:]), [1], TALK),
    ("completion before prompt", line(completion=TALK[1:], prompt=TALK[:1]), [1], TALK),
    ("content before role", b'{"messages": [{"content": "Hello", "role": "user"}, '
     b'{"content": "Hi", "role": "assistant"}]}', [1], TALK),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "lines", "talk"), [row[1:] for row in ACCEPTED], ids=[row[0] for row in ACCEPTED]
)
def test_an_accepted_file_keeps_its_texts_and_line_numbers(tmp_path, capsys, content, lines, talk):
    path = write(tmp_path, content)
    assert read(path) == [(f"{path}:{n}", talk[:1], talk[1]) for n in lines]
    out = capsys.readouterr().out
    assert out == f"data     {path}: {len(lines)} examples\n"


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


def test_prompt_and_completion_are_taken_only_as_one_reply_to_turns_in_order():
    """What each form's own rule took before there was one rule for both, and nothing else."""
    taken, roles = 0, ["".join(r) for n in range(5) for r in itertools.product("sua", repeat=n)]
    for prompt, reply in itertools.product(roles, roles[:40]):
        row = pair(prompt, reply).decode()
        if re.fullmatch("s?u(au)*", prompt) and reply == "a":
            (example,) = t.parse_line(row)
            assert example == {"messages": turns(prompt) + turns("a"), "reply": len(prompt)}
            taken += 1
        else:
            with pytest.raises(ValueError, match=r"^(the messages are|completion has) "):
                t.parse_line(row)
    assert taken == 4  # u, su, uau, suau


def test_a_line_has_one_form_and_each_part_of_it_is_a_list():
    parts = {"messages": TALK, "prompt": TALK[:1], "completion": TALK[1:]}
    forms = ({"messages"}, {"prompt", "completion"})
    others = [None, True, 0, 1.5, "", "Hi", {}, turns("ua")[0], [], ["Hi"], [[]], [None]]
    for states in itertools.product(["absent", "good", *range(len(others))], repeat=3):
        states = {key: state for key, state in zip(parts, states, strict=True) if state != "absent"}
        row = {key: parts[key] if s == "good" else others[s] for key, s in states.items()}
        if states.keys() in forms and {*states.values()} == {"good"}:
            assert [one["messages"] for one in t.parse_line(json.dumps(row))] == [TALK]
        else:
            with pytest.raises(ValueError, match=r"\w"):
                t.parse_line(json.dumps(row))


def test_parse_line_returns_a_lines_examples():
    examples = t.parse_line(line(id=3, messages=turns("uaua")).decode())
    assert [example["reply"] for example in examples] == [1, 3]
    with pytest.raises(ValueError, match="user, user"):
        t.parse_line(goes("uu").decode())


@pytest.mark.parametrize(
    "others",
    [
        {"id": 1, "source": {"a": [1]}},
        {"score": float("nan")},  # it reaches no text
        {"conversations": [], "instruction": ""},
        {"\ud800": 1, "a\nb": 2},
    ],
)
def test_other_keys_change_nothing(tmp_path, capsys, others):
    plain = read(write(tmp_path, b"\n".join([GOOD] * 10)))
    path = write(tmp_path, b"\n".join([line(**others, messages=turns("ua"))] * 9 + [GOOD]))
    capsys.readouterr()
    assert read(path) == plain and len(plain) == 10
    assert capsys.readouterr().out == f"data     {path}: 10 examples\n"


# ---- repeats


@pytest.fixture
def warnings_of(tmp_path, monkeypatch, capsys):
    """Return a function: the pairs of lines in the warnings of a run on two files, and the text.

    The run is ended where the model's config would be loaded.
    """

    def stop(_):
        raise SystemExit("read")

    monkeypatch.setattr(t, "load_config_and_tokenizer", stop)

    def run(train, evaluation=b""):
        files = write(tmp_path, train, "t"), write(tmp_path, evaluation, "e") if evaluation else ""
        with pytest.raises(SystemExit):
            t.main(["--dry_run", "--train_file", files[0], "--eval_file", files[1]])
        out, err = capsys.readouterr()
        assert err == "read\n"
        text = [one for one in out.splitlines() if not one.startswith("data ")]
        assert not text or text[0].startswith("warning ")
        text = [one.removeprefix("warning").strip() for one in text]
        return [tuple(re.findall(r"/([te]:\d+)\b", one)) for one in text], text

    return run


def chats(*contents):
    """Return lines of conversations, each given as "user|assistant|...|assistant"."""
    return b"\n".join(line(messages=said(*one.split("|"))) for one in contents)


def pairs(*contents):
    """Return the lines in the form of which only the last reply is learnt."""
    talks = [said(*one.split("|")) for one in contents]
    return b"\n".join(line(prompt=talk[:-1], completion=talk[-1:]) for talk in talks)


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        (["A|x", "B|x"], ["C|x"]),
        (["A|x", "A|y"], []),
        (["B|x"], ["A|x", "A|y"]),
        (["A|B|C|x"], ["A|B"]),
        (["A|x", "a|x"], ["A |x"]),
        (["turn|x1|2|y"], ["turn|x|12|y"]),
        (["A|B|A|x"], ["A|C|A|x"]),
        (["A|x|A|x|A|x"], []),
        (["A|x", "B|x", "A|x"], []),  # a repeat within a file is not
        (["C|x"], ["A|x", "B|x", "A|x"]),
    ],
)
def test_what_is_no_repeat_is_not_warned_of(warnings_of, train, evaluation):
    assert warnings_of(pairs(*train), pairs(*evaluation)) == ([], [])


@pytest.mark.parametrize(
    ("train", "evaluation", "named"),
    [
        (["C|x", "B|x"], ["A|x", "B|y"], {("e:2", "t:2")}),
        (["A|x", "A|y"], ["A|z"], {("e:1", "t:1")}),
        (["A|x"], ["B|x", "A|x"], {("e:2", "t:1")}),
        (["A|x", "A|x"], ["A|x", "A|x"], {("e:1", "t:1"), ("e:2", "t:1")}),
        (["A|x|B|y|C|z"], ["A|x|B|y|C|z"], {("e:1", "t:1")}),
        (["A|x|B|y"], ["A|z|B|y"], {("e:1", "t:1")}),
        (["A|x|B|y", "B|y"], ["C|z|A|x", "B|z"], {("e:2", "t:2")}),
    ],
)
def test_a_held_out_prompt_that_is_trained_on_is_warned_of_once_with_both_lines(
    warnings_of, train, evaluation, named
):
    found, text = warnings_of(chats(*train), chats(*evaluation))
    assert set(found) == named
    assert len(set(text)) == len(text) == len(named)


def test_a_held_out_prompt_that_is_trained_on_is_said_to_test_nothing(warnings_of):
    _, text = warnings_of(chats("A|x"), chats("A|y"))
    assert len(text) == 1 and "prompt" in text[0] and "nothing new" in text[0]


def test_a_prompt_with_its_keys_in_another_order_or_in_the_other_form_is_warned_of(warnings_of):
    reversed_keys = line(messages=[dict(reversed(one.items())) for one in turns("sua")])
    other_form = line(completion=turns("sua")[2:], prompt=turns("sua")[:2])
    found, _ = warnings_of(goes("sua"), b"\n".join([reversed_keys, other_form]))
    assert found == [("e:1", "t:1"), ("e:2", "t:1")]


@pytest.mark.parametrize(("count", "rest"), [(20, []), (21, ["1 more"]), (45, ["25 more"])])
def test_the_first_20_such_prompts_are_named_and_the_others_counted(warnings_of, count, rest):
    found, text = warnings_of(chats("A|x"), chats(*["A|x"] * count))
    assert found[:20] == [(f"e:{n}", "t:1") for n in range(1, 21)]
    assert len(text) == 20 + len(rest)
    assert all(part in one for part, one in zip(rest, text[20:], strict=True))


# ---- any bytes

CHECKS = settings(
    deadline=None, max_examples=100, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
# Lone surrogates among the letters: JSON can hold them, UTF-8 cannot.
LETTERS = (
    st.characters() | st.characters(categories=["Cs"]) | st.sampled_from("\ufeff\0\x85\u2028 ")
)
TEXT = st.text(LETTERS, max_size=8) | st.sampled_from(["", " \u2028"])
NUMBERS = st.integers() | st.floats() | st.integers(10**30, 10**40)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
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
    system = draw(st.none() | CONTENT)
    messages = [{"role": "system", "content": system}] * (system is not None)
    for question, reply in talk:
        messages += said(question, reply)
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


def outcome(folder, data):
    """Return (examples, lines of the refusal) for any bytes; any other exception is a failure."""
    path = write(folder, data)
    last = data.count(b"\n") + 1
    try:
        examples = t.read_examples(path)
    except SystemExit as stop:
        stop.code.encode("utf-8")  # it can be printed
        *lines, advice = stop.code.split("\n")
        assert lines and advice == ADVICE
        for one in lines:
            found = re.fullmatch(rf"{re.escape(path)}:(\d+): .+|\.\.\. and [\d,]+ more", one)
            assert found or lines == [f"{path}: no examples"]
            assert not (found and found[1]) or 1 <= int(found[1]) <= last
        return [], lines
    assert examples and data.decode("utf-8")
    for example in examples:
        name, _, number = example["where"].rpartition(":")
        assert name == path and 1 <= int(number) <= last
        messages = example["messages"]
        assert all(one.keys() == {"role", "content"} for one in messages)
        assert all(is_text(one["content"]) for one in messages)
        roles = [one["role"] for one in messages]
        roles = roles[roles[0] == "system" :]
        assert roles and roles == ["user", "assistant"] * (len(roles) // 2)
        assert messages[example["reply"]]["role"] == "assistant"
    return examples, []


@CHECKS
@given(data=st.binary(max_size=200))
def test_random_bytes_are_a_message_with_file_and_line(tmp_path, data):
    examples, lines = outcome(tmp_path, data)
    assert not examples and lines  # there is no conversation in so few random bytes


@CHECKS
@given(rows=st.lists(VALUES, min_size=1, max_size=3))
def test_any_json_that_is_no_conversation_is_refused_on_each_line(tmp_path, rows):
    examples, lines = outcome(tmp_path, "\n".join(map(json.dumps, rows)).encode())
    assert not examples
    assert [one.split(":")[1] for one in lines] == [str(n + 1) for n in range(len(rows))]


@CHECKS
@given(
    rows=st.lists(conversations(), min_size=1, max_size=3),
    escaped=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_any_valid_conversation_gives_its_replies_unchanged(tmp_path, rows, escaped, end):
    text = end.join(json.dumps(row, ensure_ascii=escaped) for row in rows)
    examples, lines = outcome(tmp_path, text.encode("utf-8", "replace"))
    expected = []
    for row in rows:
        messages = row.get("messages") or row["prompt"] + row["completion"]
        replies = [n for n, one in enumerate(messages) if one["role"] == "assistant"]
        expected += [(messages, n) for n in (replies if "messages" in row else replies[-1:])]
    assert not lines and [(one["messages"], one["reply"]) for one in examples] == expected


@CHECKS
@given(text=TEXT)
def test_any_text_is_taken_unchanged_or_is_blank_or_no_unicode(tmp_path, text):
    examples, lines = outcome(tmp_path, line(messages=said("a", text)))
    assert [one["messages"] for one in examples] == [said("a", text)] * is_text(text)
    assert bool(examples) != bool(lines)


@CHECKS
@given(row=near_conversations(), good=conversations())
def test_a_line_that_is_nearly_valid_is_read_right_or_refused_alone(tmp_path, row, good):
    data = b"\n".join(json.dumps(one).encode() for one in (good, row, good))
    examples, lines = outcome(tmp_path, data)
    assert bool(examples) != bool(lines)
    assert {one.split(":")[1] for one in lines} <= {"2"}


@CHECKS
@given(row=conversations(), at=st.floats(0, 1), cut=st.integers(0, 3), new=st.binary(max_size=3))
def test_a_line_with_bytes_changed_is_read_right_or_refused(tmp_path, row, at, cut, new):
    data = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")
    at = int(at * len(data))
    examples, lines = outcome(tmp_path, data[:at] + new + data[at + cut :])
    assert bool(examples) != bool(lines)
