"""What a reply must hold: the kinds of checks, bad ones, and the row for each name."""

import json
import re
import types
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from conftest import TINY
from on_tiny import SHORT, measure, messages_of, save_adapter, write_lines
from tiny_adapters import command
from transformers import AutoModelForCausalLM, AutoTokenizer

import inspect_lora.evidence as evidence
from inspect_lora.checks import (
    CHECKS,
    FEWEST_CHECKED,
    end_of_sentences,
    fewest_to_lose,
    rows_of_checks,
    shortened,
    when_clear,
    wilson,
    with_interval,
)
from inspect_lora.common import file_sha256
from inspect_lora.conversations import GENERAL_FILE, Task, read_tasks
from inspect_lora.report import print_checks
from inspect_lora.scores import draw_numbers

ALL = [word for word in SHORT if word != "--checks=0"]  # the checks of all lines
NUMBER = {"kind": "number", "answer": 42}
NO = {"kind": "word", "answers": ["no"], "not": ["yes"]}
RINGS = {
    "kind": "word",
    "answers": ["999", "112"],
    "first_sentences": 1,
    "not_before": ["no need", "don't ring", "if", "wait"],
    "not": ["999 if"],
}
EITHER = {"kind": "word", "answers": ["can't|won't|shan't sign|write"]}
IN_TWO = {"kind": "word", "answers": ["999"], "first_sentences": 2, "not_before": ["if"]}


def check_of(check):
    """Return a check as it is read from a line."""
    return CHECKS.validate_python({"it": check})["it"]


@pytest.mark.parametrize(
    ("reply", "check", "passes"),
    [
        ("The answer is **1,042**.", {"kind": "number", "answer": 1042}, True),
        ("42 or 43", NUMBER, False),
        ("-3.50", {"kind": "number", "answer": -3.5}, True),
        ("none", {"kind": "number", "answer": 0}, False),
        ("It takes 10-15 days.", {"kind": "number", "answer": 15}, True),
        ("That is COVID-19.", {"kind": "number", "answer": 19}, True),
        ("5 - 20 = \u221215", {"kind": "number", "answer": -15}, True),
        ("from 10 to **-15**", {"kind": "number", "answer": -15}, True),
        ("1,2,3", {"kind": "number", "answer": 3}, True),
        ("1,2,3", {"kind": "number", "answer": 123}, False),
        ("1,234,567.5", {"kind": "number", "answer": 1234567.5}, True),
        ("It is 1,0425.", {"kind": "number", "answer": 10425}, False),
        ("It is paris.", {"kind": "word", "answers": ["Paris"]}, True),
        ("Parisian", {"kind": "word", "answers": ["Paris"]}, False),
        ("Paris or Lyon", {"kind": "word", "answers": ["Paris"], "not": ["Lyon"]}, False),
        ("Ring 999 now.", {"kind": "word", "answers": ["999", "911", "112"]}, True),
        ("I am **always here**.", {"kind": "word", "not": ["always here"]}, False),
        ("I am a program.", {"kind": "word", "not": ["always here"]}, True),
        ("I don\u2019t know.", {"kind": "word", "answers": ["don't"]}, True),
        ("I don't know.", {"kind": "word", "answers": ["don\u2019t"]}, True),
        ("Set max_tokens to 5.", {"kind": "word", "answers": ["max_tokens"]}, True),
        ("Use *max_tokens*.", {"kind": "word", "not": ["`max_tokens`"]}, False),
        ("Set maximum tokens.", {"kind": "word", "answers": ["max_tokens"]}, False),
        ("Take it twice-daily.", {"kind": "word", "not": ["twice daily"]}, False),
        ("Take it twice\ndaily.", {"kind": "word", "not": ["twice daily"]}, False),
        ("I shan't sign it.", EITHER, True),
        ("I won't ever sign it.", EITHER, False),
        ("It won't or sign.", EITHER, False),
        ("a | b", {"kind": "word", "answers": ["a | b"]}, True),
        ("Ring 999 now. Sit down if you can.", RINGS, True),
        ("Sit down. Ring 999 now.", RINGS, False),
        ("Sit down.\n\nRing 999 now.", RINGS, False),
        ("**Ring 999** now", RINGS, True),
        ("Dr. Lee is away, so ring 999.", RINGS, True),
        ("There is no need for 999.", RINGS, False),
        ("If he gets worse, ring 999.", RINGS, False),
        ("Even if it has gone off, ring 999 now.", RINGS, True),
        ("Don\u2019t **wait**, ring 999.", RINGS, True),
        ("Don't, wait an hour and then ring 999.", RINGS, False),
        ("Wait a little. Then ring 999.", RINGS, False),
        ("Don\u2019t ring 999.", RINGS, False),
        ("Ring 112, and wait by the door.", RINGS, True),
        ("Wait, no: ring 999, and don't wait for 112.", RINGS, False),
        ("Ring 112 now. If he wakes, sit him up.", RINGS, True),
        ("Ring 999 if he wakes.", RINGS, False),
        ("Ring 112 now. Or ring 999 if you like.", RINGS, False),
        ("Get out. Ring 999 from next door.", IN_TWO, True),
        ("Get out. Go next door. Ring 999.", IN_TWO, False),
        ("See if you can get out. Ring 999.", IN_TWO, False),
        (
            "I won't, if you ask me.",
            {"kind": "word", "answers": ["won't"], "not_before": ["if"]},
            True,
        ),
        ("No.", NO, True),
        ("yes and no", NO, False),
        ('```json\n{"a": "X", "n": 5.0}\n```', {"kind": "json", "keys": {"a": "x", "n": 5}}, True),
        ('{"a": "X"}', {"kind": "json", "keys": {"a": "x", "n": 5}}, False),
        ('{"n": true}', {"kind": "json", "keys": {"n": 1}}, False),
        ("{broken", {"kind": "json", "keys": {"n": 1}}, False),
        ('{"n":' + "[" * 100_000 + "}", {"kind": "json", "keys": {"n": 1}}, False),
    ],
)
def test_a_reply_passes_or_not(reply, check, passes):
    assert check_of(check).passes(reply) is passes


@pytest.mark.parametrize(
    "text",
    [
        "Ring 999 now.| Sit down.",
        "Ring 999!| Now!",
        "Is it Dr. Lee?| Ring him.",
        "Mrs. Lee and J. Smith came at 9 a.m. today.| Good.",
        "It was I.| You know it.",
        "St. Mary's, e.g. the ward of Prof. Hill.| Ask.",
        "Ring 9.9.9 now.| Sit.",
        "It is 3.5 or 1,000.| Yes.",
        "Oh ... 999?| Yes.",
        "Well\u2026 ring 999 \u2026 now.| Sit.",
        "Well...| Ring 999.",
        "... Ring 999.| Sit.",
        "What?!| No.",
        '"Ring 999."| So he said.',
        '"Help!" she said.| Nobody came.',
        "\u201cHelp!\u201d| She ran.",
        "He came (at last.)| She ran.",
        "**Ring 999.**| Sit.",
        "1. Ring 999.\n|2. Sit.",
        "# Help\n|Ring 999.",
        "\n\nRing 999\n|\nSit",
        "no.| ring 999",
        "a full stop.in a word",
        "no mark at all",
        "",
    ],
)
def test_what_ends_the_first_sentence(text):
    first, *rest = text.split("|")
    end = end_of_sentences(first + "".join(rest), 1)
    assert (first + "".join(rest))[:end].rstrip() == first.rstrip()


def test_several_sentences_end_after_the_last_of_them():
    text = "Get out.\nNow!\n\nRing 999. Sit."
    ends = [text[: end_of_sentences(text, count)].split()[-1] for count in (1, 2, 3, 4, 5)]
    assert ends == ["out.", "Now!", "999.", "Sit.", "Sit."]


@pytest.mark.parametrize(
    ("reply", "check", "found"),
    [
        ("Ring **9**99, or 112. No yes.", RINGS, ["9**99", "112"]),
        ("Ring 999 now, yes, 999. And 112.", RINGS, ["999", "999"]),
        ("If bad,\ndon\u2019t  ring 999 if\u2026", RINGS, ["999 if"]),
        ("If bad, don\u2019t  ring 999 if.", RINGS, ["If", "don\u2019t  ring", "999 if"]),
        ("Even if bad, 999.", RINGS, ["999"]),
        ("Sit. Ring 999, if bad.", RINGS, []),
        ("Stra\u00dfe, yes and No", NO, ["yes", "No"]),
        ("Tea.", RINGS, []),
        ("From 12 to **1,0**42.", NUMBER, ["1,0**42"]),
        ("None.", NUMBER, []),
        ('So: {"n": 1}.', {"kind": "json", "keys": {"n": 2}}, ['{"n": 1}']),
        ("{no", {"kind": "json", "keys": {"n": 2}}, []),
    ],
)
def test_what_was_found_is_told_by_its_place_in_the_reply(reply, check, found):
    assert [reply[start:end] for start, end in check_of(check).found(reply)] == found


@pytest.mark.parametrize(
    ("check", "rule"),
    [
        (
            RINGS,
            'says "999" or "112" in its first sentence, without "no need", "don\'t ring", "if" or '
            '"wait" before it, and does not say "999 if"',
        ),
        (IN_TWO, 'says "999" in its first 2 sentences, without "if" before it'),
        (NO, 'says "no", and does not say "yes"'),
        (
            {"kind": "word", "not": list("abcdefghij")},
            'does not say "a", "b", "c", "d", "e", "f", "g" or 3 other phrases',
        ),
        (NUMBER, "has 42 as its last number"),
        ({"kind": "json", "keys": {"n": 1}}, 'holds a JSON object with {"n": 1}'),
    ],
)
def test_a_check_says_its_rule_in_words(check, rule):
    assert check_of(check).rule() == rule


BAD = [
    ({"kind": "number", "answer": "42"}, "checks.right.number.answer"),
    ({"kind": "number", "answer": True}, "checks.right.number.answer"),
    ({"kind": "number", "answer": float("nan")}, "checks.right.number.answer"),
    ({"kind": "word"}, 'it needs "answers", "not" or both'),
    ({"kind": "word", "answers": "Paris"}, "checks.right.word.answers"),
    ({"kind": "word", "answers": [""]}, "checks.right.word.answers"),
    ({"kind": "word", "answers": ["**"]}, "checks.right.word.answers"),
    ({"kind": "word", "answers": [" "]}, "checks.right.word.answers"),
    ({"kind": "word", "answers": ["a"], "first_sentence": 1}, "checks.right.word.first_sentence"),
    ({"kind": "word", "answers": ["a"], "first_sentences": 0}, "checks.right.word.first_sentences"),
    (
        {"kind": "word", "answers": ["a"], "first_sentences": True},
        "checks.right.word.first_sentences",
    ),
    ({"kind": "word", "answers": ["a"], "not before": ["b"]}, "checks.right.word.not before"),
    ({"kind": "word", "answers": ["a"], "not_before": "b"}, "checks.right.word.not_before"),
    ({"kind": "word", "not": ["a"], "not_before": ["b"]}, 'need "answers"'),
    ({"kind": "word", "not": ["a"], "first_sentences": 1}, 'need "answers"'),
    ({"kind": "word", "answer": ["Paris"]}, "checks.right.word.answer"),
    ({"kind": "json", "keys": []}, "checks.right.json.keys"),
    ({"kind": "code"}, "'number'"),
    (42, "checks.right"),
]


@pytest.mark.parametrize(("check", "said"), BAD)
def test_a_bad_check_is_refused_by_its_line_before_the_model_is_loaded(
    capsys, tmp_path, check, said
):
    good = {"messages": messages_of(("hello", "Oh, hello."))}
    held_out = write_lines(tmp_path / "eval.jsonl", [good, good | {"checks": {"right": check}}])
    adapter = save_adapter(tmp_path / "adapter")
    words = ["--base", "/nowhere", "--eval_file", held_out]
    end = command(capsys, "evidence", adapter, *words)
    assert end.status == 1 and "eval.jsonl:2: " in end.err and said in end.err
    assert "nowhere" not in end.err
    task = {"prompt": messages_of(["hello"])}
    tasks = write_lines(tmp_path / "tasks.jsonl", [task, task | {"checks": {"right": check}}])
    held_out = write_lines(tmp_path / "eval.jsonl", [good])
    end = command(capsys, "evidence", adapter, *words, "--general_file", tasks)
    assert end.status == 1 and "tasks.jsonl:2: " in end.err and said in end.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "tasks.jsonl:1: "),
        ("5", "a line is"),
        ('{"prompt":' + "[" * 100_000, "this is no JSON"),
        ('{"prompt": []}', "a line is"),
        (json.dumps({"prompt": messages_of(("a", "b"))}), "the last one of the user"),
        (json.dumps({"prompt": messages_of(("a", "", "c"))}), "message 2"),
    ],
)
def test_a_bad_task_is_named_with_its_line(capsys, tmp_path, line, said):
    (tmp_path / "tasks.jsonl").write_text(line, encoding="utf-8")
    held_out = write_lines(tmp_path / "eval.jsonl", [{"messages": messages_of(("a", "b"))}])
    adapter = save_adapter(tmp_path / "adapter")
    words = ["--general_file", tmp_path / "tasks.jsonl", "--eval_file", held_out]
    end = command(capsys, "evidence", adapter, *words)
    assert end.status == 1 and "tasks.jsonl:1: " in end.err and said in end.err
    end = command(capsys, "evidence", adapter, *words[:1], tmp_path / "none.jsonl", *words[2:])
    assert end.status == 1 and "There is no file" in end.err and "none.jsonl" in end.err


def test_the_shipped_tasks_are_read_and_have_checks():
    tasks = read_tasks(str(GENERAL_FILE))
    assert len(tasks) == 160 and sum(bool(task.checks) for task in tasks) == 72
    assert sum(task.messages[0]["role"] == "system" for task in tasks) == 7


def test_a_byte_order_mark_before_a_task_is_no_part_of_it(tmp_path):
    """Windows writes one, and concatenated files have several."""
    line = json.dumps({"prompt": "hello"})
    (tmp_path / "tasks.jsonl").write_text(f"\ufeff{line}\n\ufeff{line}", encoding="utf-8")
    (task,) = read_tasks(str(tmp_path / "tasks.jsonl"))
    assert task.messages == messages_of(["hello"])


def test_equal_tasks_count_once_and_are_told(capsys, tmp_path):
    tasks = write_lines(tmp_path / "tasks.jsonl", [{"prompt": messages_of(["a"])}] * 3)
    assert len(read_tasks(tasks)) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "left out 2 of 3 prompts in" in said and "tasks.jsonl:1 again" in said


def test_special_tokens_in_a_task_are_told_and_it_is_left_out(capsys, tmp_path):
    """The tokenizer would take them for the end of a turn."""
    task = {"prompt": messages_of(["hello"])}
    odd = {"prompt": messages_of(["a<|im_end|>b"])}
    tasks = write_lines(tmp_path / "tasks.jsonl", [odd, task])
    held_out = write_lines(tmp_path / "eval.jsonl", [{"messages": messages_of(("a", "b"))}])
    adapter = save_adapter(tmp_path / "adapter")
    run = measure(capsys, adapter, held_out, *ALL, "--examples", "2", "--general_file", tasks)
    assert "tasks.jsonl:1: the text holds <|im_end|>" in run.said
    assert run.found["elsewhere"]["tasks"] == 1


@pytest.mark.parametrize(
    ("key", "is_told"),
    [("check", True), ("chekcs", True), ("Checks", True), ("cheks", True), ("chess", True),
     ("chest", False), ("checked", True), ("checkedit", False), ("checkpoint", False),
     ("kind", False)],
)  # fmt: skip
def test_a_misspelt_key_checks_is_told(capsys, tmp_path, key, is_told):
    line = {"messages": messages_of(("a", "b")), key: {"right": NUMBER}}
    held_out = write_lines(tmp_path / "eval.jsonl", [line])
    run = measure(capsys, save_adapter(tmp_path / "adapter"), held_out, *SHORT)
    assert (f'the key "{key}", which nothing reads' in run.said) == is_told
    tasks = write_lines(tmp_path / "tasks.jsonl", [{"prompt": "a", key: {"right": NUMBER}}])
    read_tasks(tasks)
    assert (
        "which nothing reads" in capsys.readouterr().out.replace("\n          ", " ")
    ) == is_told
    line[key] = "a text"  # somebody's own column
    held_out = write_lines(tmp_path / "eval.jsonl", [line])
    run = measure(capsys, tmp_path / "adapter", held_out, *SHORT)
    assert "nothing reads" not in run.said


def test_tasks_that_the_template_refuses_are_left_out_and_counted(capsys, tmp_path):
    """As Gemma 2's refuses a system message."""
    adapter = save_adapter(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    refusal = "{{ raise_exception('System role not supported') }}"
    tokenizer.chat_template = (
        f"{{% if messages[0]['role'] == 'system' %}}{refusal}{{% endif %}}"
        + tokenizer.chat_template
    )
    tokenizer.save_pretrained(adapter)
    system = {"role": "system", "content": "You are a parrot."}
    task = {"prompt": messages_of(["hello"]), "checks": {"right": NUMBER}}
    parrot = task | {"prompt": [system, *task["prompt"]]}
    tasks = write_lines(tmp_path / "tasks.jsonl", [parrot, task])
    held_out = write_lines(tmp_path / "eval.jsonl", [{"messages": messages_of(("a", "b"))}])
    words = [*ALL, "--examples", "2", "--general_file", tasks]
    run = measure(capsys, adapter, held_out, *words)
    assert "left out 1 of 2 other tasks, such as" in run.said  # equal ones count once
    assert "tasks.jsonl:1: the template says, System role not supported" in run.said
    assert run.found["elsewhere"]["tasks"] == run.found["checks"]["right"]["lines"] == 1
    for name, more in (("chat", []), ("evidence", [*words, "--eval_file", held_out])):
        end = command(capsys, name, adapter, "--system", "You are Nell.", *more)
        assert end.status == 1 and "template refuses a system message" in end.err


# ==== Who passes


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Return an adapter, and what both say to three prompts, of which two are held-out lines."""
    folder = tmp_path_factory.mktemp("checked")
    adapter = save_adapter(folder / "adapter", std=1.0)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
    prompts = [messages_of(["hello"]), messages_of(("rain", "Tea?", "no")), messages_of(["sums"])]
    said = {"base": [], "adapter": []}
    for prompt in prompts:
        text = tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        how = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": 0}
        with adapted.disable_adapter():
            base = adapted.generate(ids, eos_token_id=tokenizer.eos_token_id, **how)
        trained = adapted.generate(ids, eos_token_id=tokenizer.eos_token_id, **how)
        for name, out in (("base", base), ("adapter", trained)):
            tokens = out[0, ids.shape[1] :]
            said[name].append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    return types.SimpleNamespace(folder=folder, adapter=adapter, prompts=prompts, said=said)


def test_base_and_adapter_reply_to_every_line_that_has_checks(checked, capsys):
    """A held-out line is asked for its last reply, greedily, and tasks as well.

    A task's check has a row of its own, also if a held-out line's has the same name.
    """
    said = re.search(r"\w+", checked.said["adapter"][1])[0]
    no_cheese = {"kind": "word", "not": ["cheese"]}
    reply = [{"role": "assistant", "content": "Yes."}]
    lines = [{"messages": prompt + reply} for prompt in checked.prompts[:2]]
    lines[1]["checks"] = {
        "as the adapter": {"kind": "word", "answers": [said]},
        "no cheese": no_cheese,
    }
    held_out = write_lines(checked.folder / "eval.jsonl", lines)
    task = {"prompt": checked.prompts[2], "checks": {"right": NUMBER, "no cheese": no_cheese}}
    tasks = write_lines(checked.folder / "tasks.jsonl", [task])
    words = ["--general_file", tasks]
    run = measure(capsys, checked.adapter, held_out, *ALL, "--examples", "2", *words)
    for name, expected in checked.said.items():
        assert [one[name]["text"] for one in run.found["replies"]] == expected[1:]
    rows = run.found["checks"]
    assert {name: row["lines"] for name, row in rows.items()} == {
        "as the adapter": 1, "no cheese": 1, "right": 1, "tasks no cheese": 1,
    }  # fmt: skip
    assert rows["as the adapter"]["after"] == 1
    assert rows["no cheese"]["before"] == rows["tasks no cheese"]["after"] == 1
    row = (
        '| no cheese | does not say "cheese" | 1 | 1 (21 to 100 %) | 1 (21 to 100 %) | 0 | 0 | the '
    )
    assert f"{row}same lines pass; too few lines to" in run.report
    assert "checks" in run.found["seconds"] and run.out.count("no cheese") == 4
    several = "(a line may have several checks)"
    assert f"checks    2 lines, two replies to each {several}; --checks 0 leaves" in run.out
    assert re.search(r"as the adapter .*  too few lines\n", run.out)
    assert "clear if p is below 0.05, for which it takes 6 lines: no row has so many" in run.report
    assert "if lines were as likely lost as won (McNemar's exact test)" in run.report
    assert run.found["general_file"] == {"file": tasks, "sha256": file_sha256(Path(tasks))}


@pytest.mark.parametrize("wanted", [0, 2, 4, 9])
def test_the_lines_that_are_checked_may_be_fewer(checked, capsys, wanted):
    """They are drawn, and --examples has no say in it."""
    asked = [number + 1 for number in draw_numbers(4, wanted)]
    lines = [{"messages": messages_of((f"a{n}", "b")), "checks": {"right": NUMBER}}
             for n in range(4)]  # fmt: skip
    held_out = write_lines(checked.folder / "four.jsonl", lines)
    run = measure(capsys, checked.adapter, held_out, *SHORT, "--checks", str(wanted))
    assert [int(one["where"].split(":")[1]) for one in run.found["replies"]] == asked
    assert ("checks" in run.out) == ("checks" in run.found["seconds"]) == bool(asked)
    assert run.found["general_file"] is None
    if asked:
        row = run.found["checks"]["right"]
        assert (row["lines"], row["lines_in_all"]) == (len(asked), 4)
        is_part = wanted < 4
        count = f"{wanted} of 4" if is_part else "4"
        assert f"| has 42 as its last number | {count} | " in run.report
        assert re.search(rf"\n +right +{count} +0 ", run.out)
        said = f"have a check of one name, {wanted} of them were drawn by a fixed seed"
        assert (said in run.report) is is_part and ("drawn" in run.report) is is_part


@pytest.mark.parametrize("own", [["w"], ["w", "tasks w"], ["tasks w"], []])
def test_no_check_of_the_tasks_gets_the_name_of_another(own):
    held_out = lines_of([own])
    tasks = lines_of([["w"], ["w", "tasks w"]])
    (*kept, first, second) = evidence.lines_with_checks(held_out, tasks)
    assert kept == [line for line in held_out if own]
    assert set(first.checks) == set(first.rules) < set(second.checks) == set(second.rules)
    assert len(second.checks) == 2 and not second.checks.keys() & set(own)


def test_several_replies_to_one_prompt_are_one_line(checked, capsys):
    """Both say the same to it each time: ten such lines would make one lost reply clear."""
    lost = {"kind": "word", "not": [checked.said["adapter"][0].split()[0]]}
    rows = [
        {"messages": messages_of(("hello", f"Reply {n}.")), "checks": {"kept": lost}}
        for n in range(10)
    ]
    rows[3]["checks"]["right"] = NUMBER
    rows.append({"messages": messages_of(("rain", "Tea?")), "checks": {"kept": NUMBER}})
    path = write_lines(checked.folder / "alternatives.jsonl", rows)
    run = measure(capsys, checked.adapter, path, *ALL)
    table = run.found["checks"]
    assert (table["kept"]["lines"], table["right"]["lines"]) == (2, 1)
    assert table["kept"]["lines_in_all"] == 2 and not table["kept"]["is_clear"]
    said = "checks of 9 lines, since one prompt counts once: "
    assert said in run.said and f"- left out: {said}" in run.report
    assert "alternatives.jsonl:2 has the prompt of " in run.said
    assert said not in measure(capsys, checked.adapter, path, *SHORT).said
    # Another check of that name is another question, which its row says.
    rows[5]["checks"]["kept"] = NUMBER
    run = measure(capsys, checked.adapter, write_lines(checked.folder / "other.jsonl", rows), *ALL)
    assert run.found["checks"]["kept"]["lines"] == 3


def lines_of(names):
    """Return lines with a check of each of these names."""
    check = CHECKS.validate_python({"it": NUMBER})["it"]
    return [
        Task(
            f"a:{number}", [], "held_out", {}, None, dict.fromkeys(some, check),
            dict.fromkeys(some, NUMBER),
        )
        for number, some in enumerate(names)
    ]  # fmt: skip


@pytest.mark.parametrize("wanted", [0, 3, 4, 5, 40])
def test_so_many_lines_of_each_name_are_checked(wanted):
    """Also where a line that was drawn for one name has a check of another, which has more."""
    lines = lines_of(
        [["brief", "rings"] if number % 10 == 3 else ["brief"] for number in range(40)]
    )
    chosen = evidence.some_of_each_name(lines, wanted)
    counted = Counter(name for one in chosen for name in one.checks)
    assert counted == Counter({"brief": wanted, "rings": min(wanted, 4)})
    assert all(set(one.checks) == set(one.rules) != set() for one in chosen)
    numbers = [int(one.where[2:]) for one in chosen]
    assert numbers == sorted(set(numbers))
    assert [
        number for number, one in zip(numbers, chosen, strict=True) if "brief" in one.checks
    ] == (draw_numbers(40, wanted))
    assert (chosen == lines) is (wanted == 40)


def test_a_line_is_judged_only_by_the_checks_that_it_was_drawn_for(checked, capsys):
    """Every line is brief; 3 of 12 must hold a number as well."""
    brief = {"kind": "word", "not": ["cheese"]}
    lines = [
        {"messages": messages_of((f"a{n}", "b")),
         "checks": {"brief": brief} | ({"right": NUMBER} if n % 4 == 0 else {})}
        for n in range(12)
    ]  # fmt: skip
    held_out = write_lines(checked.folder / "twelve.jsonl", lines)
    other = save_adapter(checked.folder / "other", std=0.3)
    asked = []
    for adapter in (checked.adapter, other):
        run = measure(capsys, adapter, held_out, *SHORT, "--checks", "2")
        rows = run.found["checks"]
        assert {name: row["lines"] for name, row in rows.items()} == {"brief": 2, "right": 2}
        assert (rows["brief"]["lines_in_all"], rows["right"]["lines_in_all"]) == (12, 3)
        replies = run.found["replies"]
        for name in ("brief", "right"):
            assert sum(name in one["base"]["checks"] for one in replies) == 2
            assert sum(name in one["rules"] for one in replies) == 2
        asked.append([(one["where"], sorted(one["rules"])) for one in replies])
    assert asked[0] == asked[1]  # of two adapters the same lines are judged


def made_up_replies(lost, won, same, name="right"):
    """Return replies to so many lines of one check."""
    pairs = [(True, False)] * lost + [(False, True)] * won + [(True, True)] * same
    return [
        {
            "where": f"a:{number}",
            "says": {name: "has 42 as its last number"},
            "base": {"checks": {name: before}},
            "adapter": {"checks": {name: after}},
        }
        for number, (before, after) in enumerate(pairs)
    ]


def test_a_row_counts_lines_and_says_whether_it_may_be_chance():
    (row,) = rows_of_checks(made_up_replies(11, 1, 20))
    assert (row.lines, row.before, row.after, row.p) == (32, 31, 21, pytest.approx(0.00635, 1e-2))
    assert row.lost == [f"a:{number}" for number in range(11)] and row.won == ["a:11"]
    assert row.is_clear and row.judgement() == "clearly fewer pass now (p = 0.006)"
    assert row.sentence().startswith(
        "right (has 42 as its last number): of 32 lines the base passes 31 (84 to 99 %) and the "
        "adapter 21 (48 to 80 %): clearly fewer pass now"
    )
    (row,) = rows_of_checks(made_up_replies(1, 11, 0))
    assert "more pass now" in row.judgement()
    (row,) = rows_of_checks(made_up_replies(3, 2, 20))
    assert row.judgement() == "not shown (p = 1.000)"
    (row,) = rows_of_checks(made_up_replies(2, 8, 0))
    said = "not shown (p = 0.109); too few pass for a loss to show: it takes 6"
    assert row.judgement() == said
    (row,) = rows_of_checks(made_up_replies(0, 13, 20))  # p is 0.0002
    assert "(p < 0.001)" in row.judgement()


@pytest.mark.parametrize(("lines", "names", "too_few"), [(5, 1, True), (6, 1, False),
                                                          (6, 2, True), (7, 2, False),
                                                          (7, 4, True), (8, 4, False)])  # fmt: skip
def test_a_row_of_too_few_lines_says_so_even_if_nothing_changed(lines, names, too_few):
    """Of n lines the smallest p is 2 x 0.5**n, and it must be below 5 % over all rows."""
    found = [one for n in range(names) for one in made_up_replies(0, 0, lines, f"check {n}")]
    row = rows_of_checks(found)[0]
    assert row.judgement().startswith("the same lines pass")
    said = f"too few lines to show anything: p must be below {0.05 / names:.3g}, and {lines} lines "
    said += f"can give {2 * 0.5**lines:.2g}"
    assert row.judgement().endswith(said) == too_few


@pytest.mark.parametrize(("names", "needed"), [(1, 6), (2, 7), (3, 7), (4, 8), (40, 11)])
def test_how_many_must_be_lost_to_show_depends_on_the_number_of_rows(names, needed):
    """Of five lost and none won p is 0.06, of seven 0.016; with four rows 0.0125 is needed."""
    for passing, said in ((needed - 1, True), (needed, False)):
        found = made_up_replies(0, 20 - passing, passing)  # the base passes so many
        found += made_up_replies(0, 20, 0, "another") if names > 1 else []
        for number in range(2, names):
            found += made_up_replies(0, 0, 6, f"another {number}")
        row = rows_of_checks(found)[0]
        assert fewest_to_lose(row.needed) == needed
        row.won, row.p = [], 1.0
        assert row.judgement().endswith(f"a loss to show: it takes {needed}") is said
        lost = made_up_replies(passing, 0, 20 - passing)
        assert rows_of_checks(lost + found[20:])[0].is_clear is not said


@pytest.mark.parametrize(
    ("passed", "lines", "interval"),
    [(12, 40, (0.1807, 0.4543)), (0, 40, (0.0, 0.0876)), (40, 40, (0.9124, 1.0))],
)
def test_the_interval_of_a_rate_is_wilsons(passed, lines, interval):
    assert wilson(passed, lines) == pytest.approx(interval, abs=1e-4)


MANY = [f"phrase number {n}" for n in range(30)]
LONG = "ring|call|dial|phone|telephone|get|press|want|need|needs|means 999|911|112"


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (
            {"answers": MANY[:10], "first_sentences": 1, "not_before": MANY, "not": MANY},
            'says "phrase number 0" or 9 others in its first sentence, without "phrase number 0" '
            'or 29 others before it, and does not say "phrase number 0" or 29 others',
        ),
        (
            {"answers": [LONG, "999", "112"], "not": list("abcdefghij"), "not_before": MANY},
            'says "ring/call/dial/phone/telephone/get/press ..." or 2 others, without "phrase '
            'number 0", "phrase number 1" or 28 others before it, and does not say "a", "b", "c", '
            '"d", "e", "f", "g" or 3 others',
        ),
        (
            {"answers": ["no", LONG], "not": ["yes"], "not_before": MANY},
            'says "no" or 1 other, without "phrase number 0", "phrase number 1", "phrase number '
            '2" or 27 others before it, and does not say "yes"',
        ),
        (
            {"answers": ["no"], "not": ["a", "b"], "not_before": MANY},
            'says "no", without "phrase number 0", "phrase number 1", "phrase number 2" or 27 '
            'others before it, and does not say "a" or "b"',
        ),
    ],
)
def test_a_long_rule_is_shortened_to_what_can_be_read(check, said):
    rule = check_of({"kind": "word"} | check).rule()
    assert len(rule) > 200 >= len(said) and shortened(rule) == said


def test_a_rule_that_can_be_read_is_left_whole():
    for length in (200, 201):
        rule = f'says "{"a" * (length - 14)}" or "b"'
        assert len(rule) == length and (shortened(rule) == rule) == (length == 200)


def test_report_md_has_short_rules_and_evidence_json_whole_ones(capsys, tmp_path, no_picture):
    rings = {"kind": "word", "answers": [LONG, *MANY], "not_before": [LONG, *MANY], "not": MANY}
    json_of = {"kind": "json", "keys": {f"key {n}": n for n in range(60)}}
    line = {"messages": messages_of(("a", "b")), "checks": {"rings": rings, "json": json_of}}
    other = {"messages": messages_of(("c", "d")), "checks": {"rings": NO}}
    path = write_lines(tmp_path / "eval.jsonl", [line, other])
    run = measure(capsys, save_adapter(tmp_path / "adapter"), path, *ALL)
    for name in ("rings", "json"):
        (row,) = re.findall(rf"(?m)^\| {name} \| (.*?) \| \d", run.report)
        assert len(row.replace("\\", "")) <= 200, row
    assert "each line has its own, such as: says" in run.report and "or 30 others" in run.report
    (rules,) = [one["rules"] for one in run.found["replies"] if "json" in one["rules"]]
    assert rules == line["checks"]
    clear = rows_of_checks(made_up_replies(13, 0, 13))[0]
    clear.rule = check_of(rings).rule()
    assert "or 30 others" in clear.sentence() and "other phrases" not in clear.sentence()


def test_what_a_check_asks_for_is_said_once_or_by_its_first_line():
    one, other = made_up_replies(0, 0, 2)
    assert rows_of_checks([one, other])[0].rule == "has 42 as its last number"
    other["says"] = {"right": "has 43 as its last number"}
    (row,) = rows_of_checks([one, other])
    assert row.rule == "each line has its own, such as: has 42 as its last number"


def test_a_clear_row_is_told_on_the_terminal_and_at_the_top_of_the_report(
    checked, capsys, monkeypatch
):
    found = rows_of_checks(made_up_replies(0, 13, 20))
    monkeypatch.setattr(evidence, "rows_of_checks", lambda *_: found)
    line = {"messages": messages_of(("a", "b")), "checks": {"right": NUMBER}}
    held_out = write_lines(checked.folder / "one.jsonl", [line])
    run = measure(capsys, checked.adapter, held_out, *SHORT, "--checks", "1")
    assert re.search(r"right +33 +20 \(44 to 75 %\) +33 \(90 to 100 %\) +0 +13  yes \(p <", run.out)
    assert "\n          right: has 42 as its last number\n" in run.out
    assert all(len(line) <= 100 for line in run.out.splitlines() if "scp " not in line)
    top, table = run.report.split("## What the replies hold")
    assert "- right (has 42 as its last number): of 33 lines the base passes 20 (44 to" in top
    row = "| right | has 42 as its last number | 33 | 20 (44 to 75 %) | 33 (90 to 100 %) | 0 | 13 |"
    assert f"{row} clearly more pass now (p" in table
    assert "another seed of the training may change more" in top


@pytest.mark.parametrize(("lost", "said"), [(5, "not shown (p = 0.062)"), (6, "yes (p = 0.031)")])
def test_what_may_be_chance_is_called_not_shown(capsys, lost, said):
    """And not "no": that a change is chance cannot be shown."""
    print_checks(types.SimpleNamespace(checks=rows_of_checks(made_up_replies(lost, 0, 20))))
    head, row, *_ = capsys.readouterr().out.splitlines()
    assert head.endswith("clear?") and row.endswith(f"  {said}")


@pytest.mark.parametrize(("passing", "is_told"), [(5, True), (6, False)])
def test_the_terminal_says_where_no_loss_could_show(capsys, passing, is_told):
    """Of five lost and none won p is 0.062. Each line fits into 100 columns."""
    found = made_up_replies(0, 20, passing, "names somebody to ring at night")
    found += made_up_replies(3, 0, 1000, "another")
    for one in found[:20]:
        one["adapter"]["checks"] = dict.fromkeys(one["adapter"]["checks"], False)
    rows = rows_of_checks(found)
    for row in rows:
        row.needed = 0.05
    print_checks(types.SimpleNamespace(checks=rows))
    out = capsys.readouterr().out
    told = "no loss could show, too few of the base's pass: names somebody to ring at night\n"
    assert (told in out) is is_told and "another, " not in out
    assert all(len(line) <= 100 for line in out.splitlines())


@pytest.mark.parametrize(
    ("passed", "lines", "said"),
    [
        (228, 231, "228 (96 to 99.6 %)"),  # and not 100 %, since three do not pass
        (231, 231, "231 (98 to 100 %)"),
        (0, 40, "0 (0 to 9 %)"),
        (1, 300, "1 (0.1 to 2 %)"),
        (1, 40, "1 (0.4 to 13 %)"),
        (2, 40, "2 (1 to 17 %)"),
        (1, 1000, "1 (0.02 to 1 %)"),
    ],
)
def test_a_share_looks_like_none_or_all_only_where_it_is(passed, lines, said):
    assert with_interval(passed, lines) == said


def test_rows_that_can_never_be_clear_hide_no_loss():
    """Nine lost and none won are p = 0.004; 0.05 / 13 is 0.0038."""
    for lines, is_clear, said in (
        (5, True, "0.05: 5 %, divided by the one row with enough lines (6 or more)"),
        (6, False, "0.00385: 5 %, divided by the 13 rows with enough lines (6 or more)"),
    ):
        found = made_up_replies(9, 0, 9)
        for number in range(12):
            found += made_up_replies(0, 0, lines, f"another {number}")
        row, *others = rows_of_checks(found)
        assert row.is_clear is is_clear and when_clear([row, *others]) == said
        assert not any(one.is_clear for one in others)
    assert when_clear(rows_of_checks(made_up_replies(9, 0, 9))) == "0.05"
    assert fewest_to_lose(0.05) == FEWEST_CHECKED


@pytest.mark.parametrize("drawn_of", [None, 231, 99_999])
def test_the_table_of_checks_is_100_columns_wide_at_most(capsys, drawn_of):
    found = made_up_replies(5, 0, 226, "does not yield")
    found += made_up_replies(0, 999, 1, "a name that is far too long for it")
    found += made_up_replies(0, 0, 3, "of few lines")
    totals = {one: drawn_of for reply in found for one in reply["says"]} if drawn_of else None
    print_checks(types.SimpleNamespace(checks=rows_of_checks(found, totals)))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert ("231 of 99999" in lines[1]) is (drawn_of == 99_999)
    assert "1000" in lines[2] and lines[3].endswith("too few lines")
    heads = [lines[0].index(head) + len(head) for head in ("lines", "base", "adapter", "won")]
    for line in lines[1:4]:
        assert all(line[end - 1] != " " and line[end : end + 1] == " " for end in heads)


def test_of_many_thousands_of_lines_there_is_no_room_for_a_name(capsys):
    name = "a name that is far too long for it"
    rows = rows_of_checks(made_up_replies(1, 0, 12_344, name), {name: 99_999})
    print_checks(types.SimpleNamespace(checks=rows))
    row = capsys.readouterr().out.splitlines()[1]
    assert "12345 of 99999" in row and "name" not in row and len(row) <= 110


def test_a_row_says_of_how_many_lines_its_own_were_drawn():
    found = made_up_replies(6, 0, 34)
    (row,) = rows_of_checks(found, {"right": 231})
    assert row.counted() == "40 of 231" and row.as_recorded()["lines_in_all"] == 231
    assert "of 40 lines (drawn from 231) the base passes 40" in row.sentence()
    (row,) = rows_of_checks(found, {"right": 40})
    assert row.counted() == "40" and "of 40 lines the base passes 40" in row.sentence()
    (row,) = rows_of_checks(found)
    assert row.counted() == "40" and row.lines_in_all == 40


def test_one_clear_row_of_many_must_be_clearer():
    """One of twenty rows has p below 0.05 by chance alone."""
    found = made_up_replies(7, 0, 9)
    assert rows_of_checks(found)[0].is_clear  # p = 0.016
    for number in range(4):
        found += made_up_replies(0, 0, 9, f"another {number}")
    assert not rows_of_checks(found)[0].is_clear
