"""The reader takes any file: there are examples, or one message that says where, after work in proportion."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_lora_single as t

MB = 1_000_000
CHECKS = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Lone surrogates among the letters: JSON can hold them, UTF-8 cannot.
LETTERS = st.characters() | st.characters(categories=["Cs"]) | st.sampled_from("\ufeff\x00\x85\u2028 \n")
TEXT = st.text(LETTERS, max_size=8) | st.sampled_from(["", " \u2028"])
NUMBERS = st.integers() | st.floats() | st.integers(10**30, 10**40)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT | st.sampled_from(["role", "content"]), inner),
    max_leaves=12,
)
NEARLY = ["", " \u2028", "\ud83d", "a\udfff", "assistant", "user", "system", "tool", None, [], {}, 0]
KEYS = st.sampled_from(["role", "content", "messages", "prompt", "completion", "name"]) | TEXT
CONTENT = st.text(max_size=20).filter(lambda text: text.strip())


@st.composite
def conversations(draw):
    """Return a valid line's object, in either form."""
    turns, system = draw(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4)), draw(st.none() | CONTENT)
    messages = [{"role": "system", "content": system}] * (system is not None)
    for said, reply in turns:
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
    row = {"messages": messages} if draw(st.booleans()) else {"prompt": messages[:-1], "completion": messages[-1:]}
    return row | draw(st.dictionaries(st.text(min_size=11, max_size=15), TEXT | st.integers(), max_size=2))


def places(value):
    """Return (container, key) of each thing within value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@st.composite
def near_conversations(draw):
    """Return a valid line's object in which one thing is replaced, removed, doubled or renamed, or one added."""
    row = draw(conversations())
    place, key = draw(st.sampled_from(places(row)))
    change = draw(st.sampled_from(["replace", "replace", "remove", "double or rename", "add"]))
    if change == "replace":
        place[key] = draw(st.sampled_from(NEARLY) | VALUES)
    elif change == "remove":
        del place[key]
    elif change == "double or rename":
        place.insert(key, place[key]) if isinstance(place, list) else place.update({draw(KEYS): place.pop(key)})
    else:
        place.append(draw(VALUES)) if isinstance(place, list) else place.update({draw(KEYS): draw(TEXT)})
    return row


def is_text(value):
    """Return whether value is a text that a tokenizer can take."""
    return isinstance(value, str) and value.strip() and value.encode("utf-8", "replace").decode("utf-8") == value


def assert_well_formed(example, path, lines):
    """Check all that later code relies on."""
    assert example.keys() == {"where", "messages", "reply", "prompt"}
    name, _, number = example["where"].rpartition(":")
    assert name == str(path) and 1 <= int(number) <= lines
    for message in example["messages"]:
        assert message.keys() == {"role", "content"} and is_text(message["content"])
    roles = [message["role"] for message in example["messages"]]
    turns = roles[1:] if roles[0] == "system" else roles
    assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
    assert roles[example["reply"]] == "assistant"


def read(path, data):
    """Write data to path and return (examples, the lines of the refusal); any other exception is an error."""
    path.write_bytes(data)
    try:
        examples = t.read_examples(str(path))
    except SystemExit as stop:
        lines = stop.code.split("\n")
        stop.code.encode("utf-8")  # it can be printed
        for line in lines:
            found = re.fullmatch(rf"{re.escape(str(path))}:(\d+): .+|\.\.\. and [\d,]+ more", line)
            if found and found[1]:
                assert 1 <= int(found[1]) <= data.count(b"\n") + 1
            assert found or lines == [f"{path}: no examples; write one JSON object a line"]
        return [], lines
    assert examples and data.decode("utf-8")
    for example in examples:
        assert_well_formed(example, path, data.count(b"\n") + 1)
    return examples, []


@CHECKS
@given(data=st.binary(max_size=200))
def test_any_bytes_are_examples_or_a_message_with_file_and_line(tmp_path, data):
    examples, lines = read(tmp_path / "data.jsonl", data)
    assert not examples and lines  # there is no conversation in so few random bytes


@CHECKS
@given(rows=st.lists(VALUES, min_size=1, max_size=3))
def test_any_json_values_are_examples_or_a_message_with_file_and_line(tmp_path, rows):
    examples, lines = read(tmp_path / "data.jsonl", "\n".join(map(json.dumps, rows)).encode())
    assert not examples and [line.split(":")[1] for line in lines] == [str(n + 1) for n in range(len(rows))]


@CHECKS
@given(rows=st.lists(conversations(), min_size=1, max_size=3), escaped=st.booleans(), end=st.sampled_from("\n\r"))
def test_any_valid_conversation_gives_its_replies_unchanged(tmp_path, rows, escaped, end):
    data = ((end + "\n").join(json.dumps(row, ensure_ascii=escaped) for row in rows)).encode("utf-8", "replace")
    examples, lines = read(tmp_path / "data.jsonl", data)
    expected = []
    for row in rows:
        messages = row.get("messages") or row["prompt"] + row["completion"]
        replies = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        expected += [(messages, n) for n in (replies if "messages" in row else replies[-1:])]
    assert not lines and [(example["messages"], example["reply"]) for example in examples] == expected


@CHECKS
@given(text=TEXT)
def test_any_text_is_taken_unchanged_or_is_blank_or_no_unicode(tmp_path, text):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
    examples, lines = read(tmp_path / "data.jsonl", json.dumps({"messages": messages}).encode())
    assert [example["messages"] for example in examples] == [messages] * bool(is_text(text)) and (examples or lines)


@CHECKS
@given(row=near_conversations(), good=conversations())
def test_a_line_that_is_nearly_valid_is_read_right_or_refused_alone(tmp_path, row, good):
    data = b"\n".join(json.dumps(one).encode() for one in (good, row, good))
    examples, lines = read(tmp_path / "data.jsonl", data)
    assert bool(examples) != bool(lines)
    assert {line.split(":")[1] for line in lines} <= {"2"}


@CHECKS
@given(row=conversations(), at=st.floats(0, 1), cut=st.integers(0, 3), inserted=st.binary(max_size=3))
def test_a_line_with_a_byte_changed_is_read_right_or_refused(tmp_path, row, at, cut, inserted):
    line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace")
    at = int(at * len(line))
    read(tmp_path / "data.jsonl", line[:at] + inserted + line[at + cut :])


HUGE = {
    "garbage": lambda n: b"x" * n,
    "no text at all": lambda n: bytes(n),
    "a byte that is not UTF-8 at its end": lambda n: b"x" * n + b"\xff",
    "deeply nested lists": lambda n: b"[" * n,
    "deeply nested objects": lambda n: b'{"messages": ' * (n // 13),
    "nested but closed": lambda n: b'{"messages": ' + b"[" * (n // 2) + b"]" * (n // 2) + b"}",
    "a huge integer": lambda n: b"1" * n,
    "a huge integer in a conversation": lambda n: b'{"messages": [' + b"-" + b"7" * n + b"]}",
    "a huge fraction": lambda n: b"0." + b"1" * n,
    "a huge exponent": lambda n: b'{"messages": 1e' + b"9" * n + b"}",
    "a text where a list belongs": lambda n: b'{"messages": "' + b"a" * n + b'"}',
    "lone surrogates": lambda n: b'{"messages": [{"role": "user", "content": "' + b"\\ud800" * (n // 6) + b'"}]}',
    "a blank text": lambda n: b'{"messages": [{"role": "user", "content": "' + b"\\n" * (n // 2) + b'"}]}',
    "a huge key": lambda n: b'{"' + b"k" * n + b'": 1}',
    "a quote that is not closed": lambda n: b'{"messages": [{"role": "' + b"a" * n,
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_line_of_fifty_megabytes_is_a_short_message(tmp_path, kind):
    before = time.process_time()
    examples, lines = read(tmp_path / "data.jsonl", b"\n" + HUGE[kind](50 * MB))
    assert not examples and len(lines) == 1 and lines[0].startswith(f"{tmp_path}/data.jsonl:2: ")
    assert len(lines[0]) < len(str(tmp_path)) + 400
    assert time.process_time() - before < 20  # it takes less than one: nothing here is quadratic


def line_of(messages):
    """Return a line of a conversation with so many messages."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"message {n}"} for n in range(messages)]
    return json.dumps({"messages": turns}).encode()


LINEAR = {
    "lines": (lambda n: b"\n".join([line_of(4)] * n), 2_000),
    "messages in a line": (line_of, 8_000),
    "bad lines": (lambda n: b"not JSON\n" * n, 10_000),
    "messages in a line whose last is bad": (lambda n: line_of(n)[:-2] + b", 1]}", 8_000),
    "messages that do not take turns": (lambda n: line_of(n).replace(b'"assistant"', b'"user"'), 8_000),
    "unused keys": (lambda n: line_of(2)[:-1] + b"".join(b', "key %d": %d' % (i, i) for i in range(n)) + b"}", 10_000),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_the_work_grows_as_the_file_does(tmp_path, kind):
    make, n = LINEAR[kind]
    seconds = {}
    for size in (n, 8 * n):
        data, times = make(size), []
        for _ in range(3):
            before = time.process_time()
            read_bare(tmp_path / "data.jsonl", data)
            times.append(time.process_time() - before)
        seconds[size] = min(times)
    assert seconds[8 * n] < 16 * max(seconds[n], 0.005), seconds


def read_bare(path, data):
    """Write data to path and read it, without checks that take their own time."""
    path.write_bytes(data)
    try:
        return t.read_examples(str(path))
    except SystemExit as stop:
        return stop


def test_a_long_refusal_names_twenty_lines_and_counts_the_rest(tmp_path):
    _, lines = read(tmp_path / "data.jsonl", b"x\n" * 1000)
    assert len(lines) == 21 and lines[-1] == "... and 980 more"


MEASURE = """
import re, sys
import train_lora_single as t

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

before = peak()
print("measured", len(t.read_examples(sys.argv[1])), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(("messages", "letters"), [(2, 300), (200, 150)], ids=["many short lines", "long lines"])
def test_a_large_file_takes_a_small_multiple_of_its_size_in_memory(tmp_path, messages, letters):
    turns = [{"role": ("user", "assistant")[n % 2], "content": "a" * letters} for n in range(messages)]
    line = json.dumps({"messages": turns}).encode() + b"\n"
    path, lines = tmp_path / "data.jsonl", 50 * MB // len(line)
    path.write_bytes(line * lines)
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(t.__file__).parent)
    word, examples, memory = done.stdout.split()[-3:]
    assert word == "measured" and int(examples) == lines * messages // 2
    assert path.stat().st_size / 2 < int(memory) < 8 * path.stat().st_size
