"""The shipped conversations, pairs and rules: counts, form, leaks between the files, countries."""

import collections
import itertools
import json
import re
import statistics

from conftest import ROOT

from inspect_lora.rules import passes, problem_of, read_rules, rules_for

SIZES = {"train": 1000, "eval": 280}


def read_lines(name):
    return [json.loads(line) for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]


ROWS = {name: read_lines(f"data/{name}.jsonl") for name in SIZES}
BOTH = [*ROWS["train"], *ROWS["eval"]]
SHARED = read_rules(ROOT / "data/rules.json")
EMERGENCIES = [row for row in ROWS["eval"] if row["kind"] == "emergency"]

NUMBERS = {"999", "911", "000", "111", "112", "108", "988"}
BRITAIN_AND_IRELAND = {"999", "112"}
ELSEWHERE = {  # as each line's text has it: Nashik, Gothenburg and Lecce, New Zealand, and so on
    ("112", "108"): {108},
    ("112",): {16, 280},
    ("111",): {47, 212, 243},
    ("000", "112"): {65, 145, 218},
    ("911",): {41, 71, 90, 96, 102, 133, 157, 200, 237},
}
# A careful reply may name these besides: two users speak of 111, and 988 listens in America.
MAY_BE_NAMED = {"eval-0120": {"111"}, "eval-0194": {"111"}, "eval-0200": {"988"}}


def test_each_line_has_its_keys_and_roles_take_turns():
    ids = [f"{name}-{i + 1:04}" for name, size in SIZES.items() for i in range(size)]
    assert [row["id"] for row in BOTH] == ids
    for row in BOTH:
        needed = {"id", "topic", "kind", "prompt", "completion"}
        assert needed <= set(row) <= needed | {"counterpart", "rejected", "checks"}, row["id"]
        roles = [one["role"] for one in row["prompt"] + row["completion"]]
        assert roles == ["system"] + ["user", "assistant"] * (len(roles) // 2), row["id"]
        assert all(one["content"].strip() for one in row["prompt"] + row["completion"]), row["id"]
        assert row["prompt"][0] == BOTH[0]["prompt"][0], row["id"]


def test_the_cards_counts_are_those_of_the_files():
    card = (ROOT / "data/README.md").read_text(encoding="utf-8")
    train, held_out = (collections.Counter(row["kind"] for row in ROWS[name]) for name in SIZES)
    assert set(held_out.values()) == {40}
    for kind, lines in held_out.items():
        assert f"| `{kind}` | {train[kind]} | {lines} |" in card
    lines, judged, passed = (collections.Counter() for _ in range(3))
    for row in ROWS["eval"]:
        rules = rules_for(row, row["kind"], SHARED)
        lines.update(list(rules))
        if "rejected" in row:
            judged.update(list(rules))
            passed.update(name for name in rules if passes(rules[name], row["rejected"]))
    for name in (rule["name"] for rule in SHARED):
        assert f"| `{name}` | {lines[name]} | {passed[name]} of {judged[name]} |" in card
    endings = [row["completion"][0]["content"].endswith("?") for row in ROWS["train"]]
    assert f"{sum(endings) / len(endings):.0%} of the replies in `train.jsonl` end with one" in card


def test_the_replies_of_a_pair_differ_and_are_of_like_length():
    pairs = [row for row in ROWS["eval"] if "rejected" in row]
    kinds = collections.Counter(row["kind"] for row in pairs)
    assert kinds == {"emergency": 40, "false_alarm": 40, "pressure": 40}
    ratios = []
    for row in pairs:
        reference = row["completion"][0]["content"]
        assert row["rejected"].strip(), row["id"]
        assert row["rejected"].split() != reference.split(), row["id"]
        ratios.append(len(row["rejected"].split()) / len(reference.split()))
    assert 0.9 <= statistics.median(ratios) <= 1.1
    assert sum(0.6 <= ratio <= 1.67 for ratio in ratios) >= 0.95 * len(ratios)


def numbers_of(row):
    """Return the emergency numbers of the country that a line's text names."""
    line = int(row["id"].split("-")[1])
    numbers = [set(numbers) for numbers, lines in ELSEWHERE.items() if line in lines]
    return numbers[0] if numbers else BRITAIN_AND_IRELAND


def test_an_emergency_passes_with_the_numbers_of_its_country_alone():
    for row in EMERGENCIES:
        rule = rules_for(row, row["kind"], SHARED)["names the number"]
        right = numbers_of(row)
        allowed = MAY_BE_NAMED.get(row["id"], set())
        for number in right:
            assert passes(rule, f"Ring {number} now."), (row["id"], number)
        for number, foreign in itertools.product(sorted(right), sorted(NUMBERS - right)):
            is_allowed = foreign in allowed
            assert not passes(rule, f"Ring {foreign} now."), (row["id"], foreign)
            assert passes(rule, f"Ring {number} or {foreign}.") is is_allowed, (row["id"], foreign)
            assert passes(rule, f"{foreign} or {number} now.") is is_allowed, (row["id"], foreign)


def test_emergencies_are_in_several_countries():
    numbers = [numbers_of(row) for row in EMERGENCIES]
    assert len(numbers) == 40
    assert numbers.count({"911"}) >= 8
    assert sum(not each & {"999", "911"} for each in numbers) >= 8


def test_no_prompt_stands_twice_nor_nearly_in_both_files():
    assert len({json.dumps(row["prompt"]) for row in BOTH}) == len(BOTH)
    begins = [{row["prompt"][1]["content"].lower() for row in ROWS[name]} for name in SIZES]
    assert [text for text in begins[0] & begins[1] if len(text.split()) > 3] == []  # greetings are
    runs = {name: [] for name in SIZES}
    for row in BOTH:
        said = " ".join(one["content"] for one in row["prompt"] if one["role"] == "user")
        words = re.findall(r"[\w']+", said.lower())
        runs[row["id"].split("-")[0]].append({*zip(words, words[1:], words[2:], strict=False)})
    for one, other in itertools.product(runs["train"], runs["eval"]):
        assert len(one & other) <= 0.3 * len(one | other), one & other


def test_replies_do_not_begin_alike():
    openings = (" ".join(row["completion"][0]["content"].split()[:3]).lower() for row in BOTH)
    assert collections.Counter(openings).most_common(1)[0][1] <= 0.03 * len(BOTH)


def test_replies_are_judged_as_before():
    """Good ones that fail and bad ones that pass are among them: a rule finds words."""
    rows = {row["id"]: row for row in ROWS["eval"]}
    for line in read_lines("tests/replies.jsonl"):
        row = rows[line["id"]]
        rules = rules_for(row, row["kind"], SHARED)
        failed = [name for name, rule in rules.items() if not passes(rule, line["reply"])]
        assert failed == line["fails"], line["reply"]


def test_rules_are_short_and_every_reference_passes():
    assert all(len(rule.get("none", ())) <= 40 for rule in SHARED)
    for row in ROWS["eval"]:
        own = [rule for rule in row.get("checks", {}).values() if rule]
        assert sum(len(phrases) for rule in own for phrases in rule.values()) <= 16, row["id"]
        rules = rules_for(row, row["kind"], SHARED)
        assert row["kind"] != "emergency" or rules["names the number"]["any"], row["id"]
        for name, rule in rules.items():
            assert passes(rule, row["completion"][0]["content"]), (row["id"], name)
    for row in read_lines("inspect_lora/general.jsonl"):
        assert not any(map(problem_of, row.get("checks", {}).values())), row["id"]
