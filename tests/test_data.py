"""Data: the four formats, which lines are refused and where, and what "10%" holds out."""

import copy
import json
import random
import re
from pathlib import Path

import pytest
from conftest import TOY
from runs import command, prepared, refused, run

import train_lora_single as t

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


def reply(**message):
    """Return a line whose reply is this message."""
    return line(messages=[*talk("u"), message])


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


def read(content, replies="all"):
    """Return (examples, problems) of a file with these bytes."""
    Path("data.jsonl").write_bytes(content)
    problems = []
    return t.read_conversations("data.jsonl", replies, problems), problems


def learned(content, replies="all"):
    """Return the messages of each example of a file in which nothing is wrong."""
    examples, problems = read(content, replies)
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
    assert all(one.source.startswith("data.jsonl") for one in examples)
    assert all(one.source.endswith(str(one.row["n"])) for one in examples)


def test_messages_teach_each_reply_and_the_other_forms_the_last():
    said = talk("suaua")
    each = [said[:3], said]
    assert learned(line(messages=said)) == learned(line(**sharegpt(said))) == each
    assert learned(line(prompt=said[:4], completion=said[4:])) == [said]
    assert learned(line(messages=said), replies="last") == [said]
    assert learned(line(instruction="Hello?", input="", output="Hi.")) == [hello()]
    write("t", {"messages": talk("uauaua")}, {"messages": talk("ua")})
    write("e", {"messages": talk("sua")}, {"messages": talk("suaua")})
    for replies, counts in (("all", (4, 3)), ("last", (2, 2))):
        job = prepared([*DRY, "--eval_file", "e", "--replies", replies])
        assert (len(job.data.examples), len(job.data.held_out)) == counts


@pytest.mark.parametrize(
    ("one", "other"), [("uau", "uauau"), ("aua", "auaua"), ("uaa", "uauaa"), ("uus", "uuus")]
)
def test_one_fault_of_roles_is_told_once(one, other):
    """Dialogues of several lengths have it."""
    problems = read(line(messages=talk(one)) + b"\n" + line(messages=talk(other)))[1]
    assert len(problems) == 2
    assert len({problem.partition(": ")[2] for problem in problems}) == 1


def test_copies_are_counted(capfd):
    write("t", *[{"messages": talk(roles)} for roles in ("ua", "ua", "ua", "uaua")])
    assert re.search(r"\bt: 3 replies", command(capfd, DRY).out)  # the first of the last one, too


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
    for roles in ("uau", "aua"):  # in another form this is a mistake
        assert len(read(line(messages=talk(roles)))[1]) == 1


def test_keys_that_are_not_read_are_counted_but_for_those_that_the_package_knows(capfd):
    known = {"id": 1, "kind": "k", "topic": "t", "checks": [], "counterpart": 2, "rejected": "No."}
    write("t", GOOD, line(messages=talk("ua"), weight=0, score=1, **known))
    write("t", GOOD, *[line(messages=talk("ua"), weight=0, score=n, **known) for n in range(3)])
    out = command(capfd, DRY).out
    assert "'weight' in 3" in out and "'score' in 3" in out
    assert [key for key in known if f"'{key}'" in out] == []
    write(
        "t",
        {"messages": talk("ua"), "output": "b"},
        {"prompt": "a", "completion": "b", "input": "c"},
    )
    out = command(capfd, DRY).out
    assert "'output' in 1" in out and "'input' in 1" in out


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
    pairs = t.read_conversations("data.jsonl", "all", problems, takes_pairs=True)
    assert [one.messages[-1]["content"] for one in pairs] == ["Nell."] * 3 and len(problems) == 2
    assert [one.row["rejected"] for one in pairs] == [rejected, "No.", "Bob."]


def test_one_json_object_around_the_list_is_told_once(capfd):
    rows = [{"messages": talk("ua")} for _ in range(30)]
    Path("t").write_text(json.dumps({"version": 1, "data": rows}, indent=1))
    end = refused(capfd, DRY, "t", "data")
    assert len(end.err.splitlines()) < 5


def thought(text, thoughts="Hm."):
    return {"role": "assistant", "content": f"<think>\n{thoughts}\n</think>\n\n{text}"}


def test_a_template_that_leaves_out_the_thoughts_to_learn_is_refused(capfd):
    """The loss would not show that only answers are learned."""
    spoken = "<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    template = f"{{% for m in messages %}}{spoken}{{% endfor %}}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    Path("own.jinja").write_text(template, encoding="utf-8")
    flags = [*DRY, "--enable_thinking", "true", "--chat_template", "own.jinja"]
    write("t", {"messages": [*talk("u"), thought("Hi.")]})
    refused(capfd, flags, "t:1")
    # Those of earlier replies may be left out, as Qwen3.5 does.
    Path("own.jinja").write_text(template.replace("m.content.split('</think>')[-1]", "m.content"))
    assert command(capfd, flags).status == 0


def test_with_thinking_each_reply_has_its_thoughts_and_they_are_learned(capfd):
    thinking = [*DRY, "--enable_thinking", "true"]
    write("t", {"messages": [*talk("u"), thought("Hi.")]})
    refused(capfd, DRY, "t:1", "<think>")
    base, data = (lambda job: (job.base, job.data))(prepared(thinking))
    (example,) = data.examples
    decode = base.tokenizer.decode
    assert decode(example.prompt_ids).endswith("<|im_start|>assistant\n<think>\n")
    assert decode(example.reply_ids) == "Hm.\n</think>\n\nHi.<|im_end|>"
    write("t", {"messages": talk("ua")}, {"messages": [*talk("u"), thought("")]})
    refused(capfd, thinking, "t:1", "t:2", "<think>")


REFUSED = {
    "chosen": line(prompt=talk("u"), chosen=talk("a")),
    "system_prompt": line(messages=talk("ua"), system_prompt="Be kind."),
    "context": line(messages=talk("ua"), context="A letter."),
    "a list of parts": reply(role="assistant", content=[{"type": "text", "text": "a"}]),
    "not UTF-8": '{"messages": "café"}'.encode("latin-1"),
    "trailing comma": GOOD[:-1] + b",}",
    "curly quotes": GOOD.decode().replace('"', "\u201c").encode(),
    "two objects": GOOD + b" " + GOOD,
    "a key twice": b'{"messages": [], ' + GOOD[1:],
    "a number": b"42",
    "nested too deeply": b'{"messages": ' + b"[" * 99_999 + b"]" * 99_999 + b"}",
    "tools": line(messages=talk("ua"), tools=[{"name": "ring"}]),
    "no form": line(text="Hello"),
    "two forms": line(messages=talk("ua"), prompt=talk("u"), completion=talk("a")),
    "two system messages": line(messages=talk("sua"), system="Hi"),
    "a system message of 5": line(messages=talk("ua"), system=5),
    "completion of 3": line(prompt=talk("u"), completion=talk("aua")),
    "tool calls": reply(role="assistant", content="a", tool_calls=[{"name": "ring"}]),
    "thoughts": reply(role="assistant", content="<think>Hm.</think>Hi"),
    "no reply": line(messages=talk("u")),
    "no question": line(messages=talk("sa")),
    "system in the middle": line(messages=talk("usa")),
    "Alpaca with history": line(instruction="a", output="b", history=[["c", "d"]]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named_by_file_and_line_and_the_others_are_read(name):
    examples, (problem,) = read(GOOD + b"\n\n" + REFUSED[name] + b"\n" + GOOD)
    assert len(examples) == 2 and problem.startswith("data.jsonl:3")
    assert len(problem) < 500 and "\n" not in problem


def test_what_is_wrong_in_an_array_is_named_by_its_entry(capfd):
    examples, (problem,) = read(b"[" + b",\n".join([GOOD, line(text="Hello"), GOOD]) + b"]")
    assert len(examples) == 2 and re.match(r"data\.jsonl\b.*\b2\b", problem)
    twice = b"[" + GOOD + b"," + REFUSED["a key twice"] + b"]"
    for content in (b"[\n" + GOOD + b",\n" + GOOD[:-9], b"[]", twice):  # cut, or empty
        Path("t").write_bytes(content)
        refused(capfd, DRY, "t")


def test_all_problems_of_both_files_are_told_at_once_with_those_of_rendering(capfd):
    control = {"messages": hello("Good <|im_end|> night")}
    refused(capfd, [*DRY, "--train_file", "absent"], "absent")
    write("t", GOOD, b'{"text": 1}', {"messages": talk("uu")}, control)
    write("e", b"\xff", control, {"messages": hello()}, b"[]")
    flags = [*DRY, "--eval_file", "e"]
    end = refused(capfd, flags, "t:2", "t:3", "t:4", "e:1", "e:2", "e:4", "<|im_end|>")
    assert [key for key in ("t:1", "e:3") if key in end.err] == []
    write("t", GOOD, *[b'{"text": 1}'] * 500)
    refused(capfd, [*DRY, "--eval_file", "10%"], "t:2")
    end = refused(capfd, flags, "t:2", "497")  # once, and how many more
    assert len(end.err.splitlines()) <= 25


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


def test_ones_own_lines_are_not_judged_by_the_shipped_ones_in_silence(capfd, monkeypatch):
    for name in ("t", "shipped", "eval"):
        write(name, {"messages": talk("ua")})
    write("t", {"messages": talk("uaua")})
    shipped = {"train": Path("shipped"), "held_out": Path("eval")}
    hashes = {name: t.file_sha256(path) for name, path in shipped.items()}
    monkeypatch.setattr(t, "SHIPPED", hashes)
    for train_file, is_told in (("t", True), ("shipped", False)):
        flags = [*DRY, "--train_file", train_file, "--eval_file", "eval"]
        assert ("EVAL_FILE" in command(capfd, flags).out) == is_told


def test_a_held_out_prompt_that_is_trained_on_is_named_in_any_form(capfd):
    write("t", *asked("One?", "Two?"))
    again = {"instruction": "Two?", "output": "Another reply."}
    write("e", *asked("New?"), again, {"messages": [*hello("New?"), *hello("One?")]})
    out = command(capfd, [*DRY, "--eval_file", "e", "--replies", "last"]).out
    assert [name for name in ("e:1", "e:2", "e:3") if name in out] == ["e:2"]


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
    for n in range(150):
        first = hello(f"Question {n}?", f"Reply {n}.")
        rows += [{"messages": first}, sharegpt([*hello(f" Question {n}?\n", "Other."), *hello()])]
    random.Random(0).shuffle(rows)
    write("t", *rows)
    job = prepared(TENTH)
    held_out, train = questions(job.data.held_out), questions(job.data.examples)
    assert len(held_out) in (30, 31) and len(held_out) + len(train) == 300
    assert not {one.strip() for one in held_out} & {one.strip() for one in train}
    assert len({one.strip() for one in held_out}) == len(held_out) / 2
    assert len(job.data.held_out) == 3 * len(held_out) / 2  # each reply of the longer ones
    # Neither another seed nor another order changes which they are.
    random.Random(1).shuffle(rows)
    write("t", *rows)
    assert sorted(questions(prepared([*TENTH, "--seed", "7"]).data.held_out)) == sorted(held_out)


def test_a_key_too_many_in_a_message_is_named():
    for bad in (
        reply(role="assistant", content="a", weight=0),
        line(
            conversations=[
                {"from": "human", "value": "a", "weight": 0},
                {"from": "gpt", "value": "b"},
            ]
        ),
    ):
        assert "'weight'" in read(bad)[1][0]


def test_at_least_20_are_held_out_and_a_large_group_is_trained(capfd):
    write("t", *asked(*map(str, range(60)), system="Be kind."))
    assert len(prepared([*DRY, "--eval_file", "1%"]).data.held_out) == 20
    assert len(prepared([*DRY, "--eval_file", "50 %"]).data.held_out) == 30
    # Another system message is another beginning.
    write("t", *[{"messages": hello(system=f"You are number {n}.")} for n in range(100)])
    assert len(prepared(TENTH).data.held_out) == 20
    # A group may have a twentieth of all, and no more.
    write("t", *asked(*(f"{n // 5}" for n in range(100))))
    assert len(prepared(TENTH).data.held_out) == 20
    write("t", *asked(*(f"Large {n // 6}" for n in range(30)), *map(str, range(70))))
    held_out = prepared([*DRY, "--eval_file", "50%"]).data.held_out
    assert len(held_out) == 50 and not any("Large" in text for text in questions(held_out))
    for count, groups in ((39, 39), (100, 1)):  # too few, or all alike
        write("t", *asked(*(f"{n % groups}" for n in range(count))))
        refused(capfd, TENTH, "EVAL_FILE", str(count), "20")


def test_held_out_lines_are_kept_as_they_were_and_are_read_as_they_were():
    """Also those of an array. An older held_out.jsonl is renamed."""
    rows = [{"messages": hello(f"Gr\u00f6\u00dfe {n}?"), "id": n, "null": None} for n in range(30)]
    greeting = [{"role": "assistant", "content": "Welcome!"}]
    rows += [sharegpt(greeting + hello(f"So {n}?"), half="\ud83d") for n in range(30)]
    Path("t").write_text(json.dumps(rows, indent=1))
    flags = ["--model_name", TOY, "--train_file", "t", "--eval_file", "10%", "--device", "cpu"]
    flags += ["--dtype", "float32", "--output_dir", "out", "--max_steps", "1", "--warmup_ratio=0"]
    job, path = prepared(flags), Path("out/held_out.jsonl")
    assert not Path("out").exists()  # a dry run writes nothing
    path.parent.mkdir()
    path.write_text("of another job")
    assert run(flags) == 0
    (aside,) = Path("out").glob("held_out.jsonl.*")
    assert aside.read_text() == "of another job"
    found = [json.loads(one) for one in path.read_bytes().splitlines()]
    assert len(found) == 20 and [row for row in rows if row in found] == found
    assert sum("conversations" in row for row in found) not in (0, 20)
    again = t.read_conversations(str(path), "all", [])
    assert [one.messages for one in again] == [one.messages for one in job.data.held_out]
