"""Data: the four formats, which lines are refused and where, and what "10%" holds out."""

import copy
import json
import random
import re
from pathlib import Path

import pytest
from conftest import TOY
from runs import prepared, refused, replace_ours

from train_lora.console import UserError
from train_lora.conversations import hold_out, read_conversations
from train_lora.files import file_sha256
from train_lora.record import recorded

ROLES = {"s": "system", "u": "user", "a": "assistant"}
DRY = ["--dry_run", "--model_name", TOY, "--train_file", "t", "--eval_file", ""]


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


def reply(content, **more):
    """Return a line whose reply is this, with other keys, too."""
    return line(messages=[*talk("u"), {"role": "assistant", "content": content} | more])


def asked(*questions, **more):
    """Return a row for each question, whose reply is always the same."""
    return [{"messages": hello(question, **more)} for question in questions]


def write(name, *rows):
    """Write a file with a line for each row, given as an object or as bytes."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    Path(name).write_bytes(b"\n".join(lines))


GOOD = line(messages=talk("ua"))


@pytest.fixture(autouse=True)
def in_a_folder(in_the_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(content):
    """Return (examples, problems) of a file with these bytes."""
    Path("data.jsonl").write_bytes(content)
    problems = []
    return read_conversations("data.jsonl", "all", problems), problems


def learned(content):
    """Return the messages of each example of a file in which nothing is wrong."""
    examples, problems = read(content)
    assert problems == []
    return [one.messages for one in examples]


SAID = hello("Who are you?\nSay it.", "Nell.", "Be kind.")
ALPACA = {"instruction": "Who are you?", "input": "Say it.", "output": "Nell."}
FORMS = [
    {"prompt": SAID[:2], "completion": SAID[2:]},
    {"prompt": SAID[1:2], "completion": SAID[2:], "system": "Be kind."},
    {"prompt": SAID[1]["content"], "completion": "Nell.", "system": "Be kind."},
    {"messages": SAID},
    {"messages": SAID[1:], "system": "Be kind."},
    sharegpt(SAID),
    sharegpt(SAID[1:], system="Be kind."),
    ALPACA | {"system": "Be kind."},
]
KEYS = ["prompt", "completion", "messages", "conversations", "instruction", "output"]
NULLS = dict.fromkeys([*KEYS, "system", "input", "history", "tools", "id"])


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_all_forms_give_the_same_examples(layout):
    """Also where a table has a column for each key, and null in most of them."""
    rows = [row | {"n": n} for n, row in enumerate([*FORMS, *(NULLS | one for one in FORMS)], 1)]
    content = json.dumps(rows, indent=1) if layout == "array" else "\n".join(map(json.dumps, rows))
    examples, problems = read(content.encode())
    assert problems == [] and [one.messages for one in examples] == [SAID] * len(rows)
    assert [one.row["n"] for one in examples] == list(range(1, len(rows) + 1))
    place = ", entry " if layout == "array" else ":"
    assert [one.source for one in examples] == [f"data.jsonl{place}{n}" for n in range(1, 17)]


def test_messages_teach_each_reply_and_the_other_forms_the_last():
    said = talk("suaua")
    each = [said[:3], said]
    assert learned(line(messages=said)) == learned(line(**sharegpt(said))) == each
    assert learned(line(prompt=said[:4], completion=said[4:])) == [said]
    assert learned(line(instruction="Hello?", input="", output="Hi.")) == [hello()]


def test_the_last_replies_may_be_all_that_is_taught_and_measured():
    write("t", {"messages": talk("uauaua")}, {"messages": talk("ua")})
    write("e", {"messages": talk("sua")}, {"messages": talk("suaua")})
    data = prepared([*DRY, "--eval_file", "e", "--replies", "last"]).data
    ends = [one.messages[-1]["content"] for one in (*data.examples, *data.held_out)]
    assert ends == ["turn 6", "turn 2", "turn 3", "turn 5"]


def test_of_sharegpt_a_greeting_and_a_last_question_are_left_out_and_counted(capfd):
    rows = [
        [("gpt", "Welcome!"), ("human", "Hello?"), ("gpt", "Hi."), ("human", "And now?")],
        [("system", "Be kind."), ("bing", "Yes?"), ("user", "Hello?"), ("chatgpt", "Hi.")],
        [("human", "Hello?"), ("assistant", "Hi.")],
    ]
    turns = [[{"from": who, "value": said} for who, said in row] for row in rows]
    content = b"\n".join(line(conversations=row) for row in turns)
    assert learned(content) == [hello(), hello(system="Be kind."), hello()]
    assert re.search(r"jsonl: 3\b", capfd.readouterr().out)


def test_keys_that_are_not_read_are_counted_but_for_those_that_the_package_knows(capfd):
    known = {"id": 1, "kind": "k", "topic": "t", "checks": [], "counterpart": 2, "rejected": "No."}
    rows = [line(messages=talk("ua"), weight=0, output=n, **known) for n in range(3)]
    learned(b"\n".join([GOOD, *rows, line(prompt="a", completion="b", input="c")]))
    out = capfd.readouterr().out
    assert all(text in out for text in ("'weight' in 3", "'output' in 3", "'input' in 1"))
    assert [key for key in known if f"'{key}'" in out] == []


def test_pairs_are_read_for_the_package_and_never_trained_on():
    """As TRL's preference data has them."""
    rejected = [{"role": "assistant", "content": "No."}]
    pair = {"prompt": SAID[:2], "chosen": SAID[2:], "rejected": rejected}
    beside = {"prompt": SAID[:2], "completion": SAID[2:], "rejected": "No."}
    texts = {"prompt": "Who?", "chosen": "Nell.", "rejected": "Bob."}
    content = b"\n".join(line(**row) for row in (pair, beside, texts))
    examples, problems = read(content)
    assert [one.messages for one in examples] == [SAID]
    assert [one.partition(": ")[0] for one in problems] == ["data.jsonl:1", "data.jsonl:3"]
    assert all('"completion"' in problem for problem in problems)
    pairs = read_conversations("data.jsonl", "all", problems, takes_pairs=True)
    assert [one.messages[-1]["content"] for one in pairs] == ["Nell."] * 3 and len(problems) == 2
    assert [one.row["rejected"] for one in pairs] == [rejected, "No.", "Bob."]


THINKING = [*DRY, "--enable_thinking", "true"]


def thought(text, thoughts="Hm."):
    return {"role": "assistant", "content": f"<think>\n{thoughts}\n</think>\n\n{text}"}


def test_a_template_that_leaves_out_the_thoughts_to_learn_is_refused(capfd):
    """The loss would not show that only answers are learned."""
    spoken = "<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    template = f"{{% for m in messages %}}{spoken}{{% endfor %}}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    Path("own.jinja").write_text(template, encoding="utf-8")
    write("t", {"messages": [*talk("u"), thought("Hi.")]})
    refused(capfd, [*THINKING, "--chat_template", "own.jinja"], "t:1")


def test_with_thinking_each_reply_has_its_thoughts_and_they_are_learned(capfd):
    write("t", {"messages": [*talk("u"), thought("Hi.")]})
    job = prepared(THINKING)
    (example,) = job.data.examples
    decode = job.base.tokenizer.decode
    assert decode(example.prompt_ids).endswith("<|im_start|>assistant\n<think>\n")
    assert decode(example.reply_ids) == "Hm.\n</think>\n\nHi.<|im_end|>"
    write("t", {"messages": talk("ua")}, {"messages": [*talk("u"), thought("")]})
    refused(capfd, THINKING, "t:1", "t:2", "<think>")


REFUSED = {
    "system_prompt": line(messages=talk("ua"), system_prompt="Be kind."),
    "context": line(messages=talk("ua"), context="A letter."),
    "a list of parts": reply([{"type": "text", "text": "a"}]),
    "not UTF-8": '{"messages": "café"}'.encode("latin-1"),
    "a key twice": b'{"messages": [], ' + GOOD[1:],
    "a number": b"42",
    "nested too deeply": b'{"messages": ' + b"[" * 99_999 + b"]" * 99_999 + b"}",
    "tools": line(messages=talk("ua"), tools=[{"name": "ring"}]),
    "no form": line(text="Hello"),
    "two forms": line(messages=talk("ua"), prompt=talk("u"), completion=talk("a")),
    "two system messages": line(messages=talk("sua"), system="Hi"),
    "a system message of 5": line(messages=talk("ua"), system=5),
    "completion of 3": line(prompt=talk("u"), completion=talk("aua")),
    "tool calls": reply("a", tool_calls=[{"name": "ring"}]),
    "a weight in ShareGPT": line(
        conversations=[{"from": "human", "value": "a", "weight": 0}, {"from": "gpt", "value": "b"}]
    ),
    "thoughts": reply("<think>Hm.</think>Hi"),
    "no reply": line(messages=talk("u")),
    "no question": line(messages=talk("sa")),
    "a greeting": line(messages=talk("aua")),
    "a question at the end": line(messages=talk("uau")),
    "two replies": line(messages=talk("uaa")),
    "system in the middle": line(messages=talk("usa")),
    "Alpaca with history": line(instruction="a", output="b", history=[["c", "d"]]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named_by_file_and_line_and_the_others_are_read(name):
    examples, (problem,) = read(GOOD + b"\n\n" + REFUSED[name] + b"\n" + GOOD)
    assert len(examples) == 2 and problem.startswith("data.jsonl:3")
    assert len(problem) < 500 and "\n" not in problem


def test_a_key_twice_in_an_array_is_refused():
    with pytest.raises(UserError, match=r"data\.jsonl"):
        read(b"[" + GOOD + b"," + REFUSED["a key twice"] + b"]")


def test_all_problems_of_both_files_are_told_at_once_with_those_of_rendering(capfd):
    control = {"messages": hello("Good <|im_end|> night")}
    write("t", GOOD, b'{"text": 1}', {"messages": talk("uu")}, control)
    write("e", b"\xff", control, {"messages": hello()}, b"[]")
    flags = [*DRY, "--eval_file", "e"]
    end = refused(capfd, flags, "t:2", "t:3", "t:4", "e:1", "e:2", "e:4", "<|im_end|>")
    assert [key for key in ("t:1", "e:3") if key in end.err] == []


TAKEN = {
    "no newline at the end": (GOOD + b"\n" + GOOD, [1, 2]),
    "blank lines": (b"\n\n" + GOOD + b"\n \t\n" + GOOD + b"\n\n", [3, 5]),
    "CRLF": (GOOD + b"\r\n\r\n" + GOOD + b"\r\n", [1, 3]),
    "byte order marks": (b"\xef\xbb\xbf" + GOOD + b"\n\xef\xbb\xbf" + GOOD, [1, 2]),
    "other keys": (line(id=3, score=float("nan"), text="\ud83d", messages=talk("ua")), [1]),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_file_is_taken_with_its_line_numbers(name):
    content, lines = TAKEN[name]
    examples, problems = read(content)
    assert not problems and [one.source for one in examples] == [f"data.jsonl:{n}" for n in lines]
    assert all(one.messages == talk("ua") for one in examples)


ODD = ["", " \u2028", "a\udfff", "assistant", "user", "tool", None, True, 1e999, [], [[]], {}]


def places(value):
    """Return (container, key) of each thing within value."""
    if not isinstance(value, (dict, list)):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [one for key in keys for one in places(value[key])]


def test_a_line_with_anything_odd_in_it_is_read_right_or_refused_alone():
    said, lines = talk("ua"), []
    forms = [{"messages": said}, {"prompt": said[:1], "completion": said[1:]}, sharegpt(said)]
    for form in [*forms, ALPACA]:
        for number in range(len(places(form))):
            for odd in ODD:
                row = copy.deepcopy(form)
                place, key = places(row)[number]
                place[key] = odd
                lines.append(line(**row))
    examples, problems = read(b"\n".join(lines))
    found = [one.source for one in examples] + [one.partition(": ")[0] for one in problems]
    assert sorted(found) == sorted(f"data.jsonl:{n}" for n in range(1, len(lines) + 1))
    assert len(examples) > 30 and all(len(one) < 500 and "\n" not in one for one in problems)
    for example in examples:
        assert [one["role"] for one in example.messages] == ["user", "assistant"]
        for message in example.messages:
            assert message.keys() == {"role", "content"} and message["content"].strip()
            message["content"].encode()


@pytest.mark.parametrize(("train_file", "is_refused"), [("t", True), ("shipped", False)])
def test_ones_own_lines_are_not_judged_by_the_shipped_ones(
    train_file, is_refused, capfd, monkeypatch
):
    for name in ("t", "shipped", "eval"):
        write(name, {"messages": talk("ua")})
    write("t", {"messages": talk("uaua")})
    shipped = {"train": Path("shipped"), "held_out": Path("eval")}
    hashes = {name: file_sha256(path) for name, path in shipped.items()}
    replace_ours(monkeypatch, "SHIPPED", hashes)
    flags = [*DRY, "--train_file", train_file, "--eval_file", "eval"]
    if is_refused:
        refused(capfd, flags, "EVAL_FILE", "--eval_file", "10%", '""')
    else:
        prepared(flags)


def test_a_held_out_prompt_that_is_trained_on_is_named_in_any_form(capfd):
    write("t", *asked("One?", "Two?"))
    again = {"instruction": "Two?", "output": "Another reply."}
    write("e", *asked("New?"), again, {"messages": [*hello("New?"), *hello("One?")]})
    prepared([*DRY, "--eval_file", "e", "--replies", "last"])
    assert re.findall(r"\be:\d", capfd.readouterr().out) == ["e:2"]


TENTH = [*DRY, "--eval_file", "10%"]


def questions(examples):
    """Return the first question of each conversation."""
    firsts = {}
    for one in examples:
        firsts[one.source] = next(m["content"] for m in one.messages if m["role"] == "user")
    return list(firsts.values())


def test_a_tenth_is_held_out_in_whole_groups_that_are_not_trained():
    """Those that begin alike are a group: versions of one conversation, or its parts."""
    rows = []
    for n in range(105):
        first = hello(f"Question {n}?", f"Reply {n}.")
        rows += [{"messages": first}, sharegpt([*hello(f" Question {n}?\n", "Other."), *hello()])]
    random.Random(0).shuffle(rows)
    write("t", *rows)
    job = prepared(TENTH)
    held_out, train = questions(job.data.held_out), questions(job.data.examples)
    assert len(held_out) in (21, 22) and len(held_out) + len(train) == 210
    assert not {one.strip() for one in held_out} & {one.strip() for one in train}
    assert len({one.strip() for one in held_out}) == len(held_out) / 2
    assert len(job.data.held_out) == 3 * len(held_out) / 2  # each reply of the longer ones
    # Neither another seed nor another order changes which they are.
    random.Random(1).shuffle(rows)
    write("t", *rows)
    assert sorted(questions(prepared([*TENTH, "--seed", "7"]).data.held_out)) == sorted(held_out)


def held_out_of(rows, percent):
    """Return (train, held_out), each a list of conversations."""
    write("t", *rows)
    return hold_out(read_conversations("t", "all", []), percent)


SIXTY = asked(*map(str, range(60)), system="Be kind.")
COUNTS = {  # rows, percentage, and how many of them are held out
    "at least 20": (SIXTY, 1, 20),
    "half of them": (SIXTY, 50, 30),
    "another system message is another beginning": (
        [{"messages": hello(system=f"You are number {n}.")} for n in range(100)], 10, 20,
    ),
    "groups of a twentieth": (asked(*(f"{n // 5}" for n in range(100))), 10, 20),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_so_many_are_held_out(name):
    rows, percent, expected = COUNTS[name]
    train, held_out = held_out_of(rows, percent)
    assert len(held_out) == expected and len(train) == len(rows) - expected


def test_a_group_of_more_than_a_twentieth_is_trained():
    rows = asked(*(f"Large {n // 6}" for n in range(30)), *map(str, range(70)))
    _, held_out = held_out_of(rows, 50)
    assert len(held_out) == 50 and not any("Large" in text for text in questions(held_out))


@pytest.mark.parametrize(("count", "groups"), [(39, 39), (100, 1)], ids=["too few", "all alike"])
def test_where_20_cannot_be_held_out_it_is_told(count, groups):
    with pytest.raises(UserError, match="EVAL_FILE"):
        held_out_of(asked(*(f"{n % groups}" for n in range(count))), 10)


def test_held_out_lines_are_kept_as_they_were_and_are_read_as_they_were():
    """Also those of an array. An older held_out.jsonl is renamed."""
    rows = [{"messages": hello(f"Gr\u00f6\u00dfe {n}?"), "id": n, "null": None} for n in range(30)]
    greeting = [{"role": "assistant", "content": "Welcome!"}]
    rows += [sharegpt(greeting + hello(f"So {n}?"), half="\ud83d") for n in range(30)]
    Path("t").write_text(json.dumps(rows, indent=1))
    job, path = prepared([*TENTH, "--output_dir", "out"]), Path("out/held_out.jsonl")
    assert not Path("out").exists()  # a dry run writes nothing
    path.parent.mkdir()
    path.write_text("of another job")
    with recorded(job):
        pass
    (aside,) = Path("out").glob("held_out.jsonl.*")
    assert aside.read_text() == "of another job"
    found = [json.loads(one) for one in path.read_bytes().splitlines()]
    assert len(found) == 20 and [row for row in rows if row in found] == found
    assert sum("conversations" in row for row in found) not in (0, 20)
    again = read_conversations(str(path), "all", [])
    assert [one.messages for one in again] == [one.messages for one in job.data.held_out]
