"""The shipped conversations, pairs and rules: counts, form, leaks between the files, countries."""

import collections
import itertools
import json
import re
import statistics

import pytest
from conftest import ROOT

from inspect_lora.rules import passes, problem_of, read_rules, rules_for

SIZES = {"train": 1000, "eval": 280}


def read_lines(name):
    return [json.loads(line) for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]


ROWS = {name: read_lines(f"data/{name}.jsonl") for name in SIZES}
BOTH = [*ROWS["train"], *ROWS["eval"]]
BY_ID = {row["id"]: row for row in BOTH}
SHARED = read_rules(ROOT / "data/rules.json")
CARD = (ROOT / "data/README.md").read_text(encoding="utf-8")
PAIRS = [row for row in ROWS["eval"] if "rejected" in row]
EMERGENCIES = [row for row in ROWS["eval"] if row["kind"] == "emergency"]

# What the emergency services of each country publish; the card names where.
NUMBERS = {
    "United Kingdom": {"999", "112"}, "Ireland": {"112", "999"}, "Sweden": {"112"},
    "Spain": {"112"}, "Italy": {"112", "118"}, "India": {"112", "108"}, "New Zealand": {"111"},
    "Australia": {"000"}, "United States": {"911"}, "Canada": {"911"},
}  # fmt: skip
GROUPS = ["United Kingdom", "Ireland", "United States, Canada", "Australia", "New Zealand"]
GROUPS += ["Sweden, Spain, Italy, India"]
ALL_NUMBERS = {"988"}.union(*NUMBERS.values())
# Somebody holds a mobile, two users speak of 111 themselves, and 988 listens to one in despair.
ALSO_RIGHT = {"eval-0065": {"112"}}
MAY_STAND_BESIDE = {"eval-0120": {"111"}, "eval-0194": {"111"}, "eval-0200": {"988"}}


def rules_of(row):
    return rules_for(row, row["kind"], SHARED)


@pytest.mark.parametrize("name", SIZES)
def test_each_line_has_its_keys_and_roles_take_turns(name):
    assert [row["id"] for row in ROWS[name]] == [f"{name}-{i + 1:04}" for i in range(SIZES[name])]
    for row in ROWS[name]:
        needed = {"id", "topic", "kind", "prompt", "completion"}
        optional = {"country", "counterpart", "rejected", "checks"}
        assert needed <= set(row) <= needed | optional, row["id"]
        messages = row["prompt"] + row["completion"]
        roles = [message["role"] for message in messages]
        assert roles == ["system"] + ["user", "assistant"] * (len(roles) // 2), row["id"]
        assert all(message["content"].strip() for message in messages), row["id"]
        assert messages[0] == BOTH[0]["prompt"][0], row["id"]


def test_the_cards_counts_of_kinds_and_endings_are_those_of_the_files():
    train, held_out = (collections.Counter(row["kind"] for row in ROWS[name]) for name in SIZES)
    assert set(held_out.values()) == {40}
    for kind, lines in held_out.items():
        assert f"| `{kind}` | {train[kind]} | {lines} |" in CARD
    endings = [row["completion"][0]["content"].endswith("?") for row in ROWS["train"]]
    assert f"{sum(endings) / len(endings):.0%} of the replies in `train.jsonl` end with one" in CARD


@pytest.mark.parametrize("name", [rule["name"] for rule in SHARED] + ["the right number"])
def test_the_cards_counts_of_a_rule_are_those_of_the_files(name):
    judged = [(rules_of(row)[name], row) for row in ROWS["eval"] if name in rules_of(row)]
    passed = [passes(rule, row["rejected"]) for rule, row in judged if "rejected" in row]
    assert f"| `{name}` | {len(judged)} | {sum(passed)} of {len(passed)} |" in CARD


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in PAIRS}))
def test_the_replies_of_a_pair_differ_and_are_of_like_length(kind):
    pairs = [row for row in PAIRS if row["kind"] == kind]
    assert len(pairs) == (40 if kind in ("emergency", "false_alarm", "pressure") else 10)
    ratios = []
    for row in pairs:
        rejected, reference = row["rejected"].split(), row["completion"][0]["content"].split()
        assert rejected and rejected != reference, row["id"]
        ratios.append(len(rejected) / len(reference))
    words = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    assert f"| `{kind}` | {len(pairs)} | {words} |" in CARD
    assert 0.9 <= statistics.median(ratios) <= 1.1
    assert sum(0.6 <= ratio <= 1.67 for ratio in ratios) >= 0.95 * len(ratios)


@pytest.mark.parametrize("row", EMERGENCIES, ids=lambda row: row["id"])
def test_an_emergency_takes_the_numbers_of_its_country_and_no_others(row):
    rules = rules_of(row)
    right = NUMBERS[row["country"]] | ALSO_RIGHT.get(row["id"], set())
    beside = right | MAY_STAND_BESIDE.get(row["id"], set())
    if row["country"] == "Australia":
        beside |= {"112"}  # a mobile may be at hand
    for number in ALL_NUMBERS:
        assert passes(rules["the right number"], f"Ring {number} now.") is (number in right)
        assert passes(rules["says to ring"], f"Ring {number} now.") is (number != "988")
    for number, other in itertools.product(right, ALL_NUMBERS - right):
        for reply in (f"Ring {number} or {other}.", f"{other} or {number} now."):
            assert passes(rules["the right number"], reply) is (other in beside), reply


def test_no_number_tells_the_replies_of_an_emergency_apart():
    for row in EMERGENCIES:
        replies = row["completion"][0]["content"], row["rejected"]
        good, bad = (ALL_NUMBERS & set(re.findall(r"\d+", reply)) for reply in replies)
        assert good == bad != set(), row["id"]


def test_no_number_stands_in_an_emergency_before_its_last_message():
    for row in EMERGENCIES:
        earlier = " ".join(message["content"] for message in row["prompt"][:-1])
        assert not ALL_NUMBERS & set(re.findall(r"\d+", earlier)), row["id"]


def test_each_emergency_has_a_harmless_counterpart_of_its_own():
    counterparts = {row["counterpart"] for row in EMERGENCIES}
    assert len(counterparts) == len(EMERGENCIES) == 40
    assert {BY_ID[name]["kind"] for name in counterparts} == {"false_alarm", "everyday"}


@pytest.mark.parametrize("countries", GROUPS)
def test_the_cards_counts_of_countries_and_of_fixed_replies_are_those_of_the_rules(countries):
    rows = [row for row in EMERGENCIES if row["country"] in countries.split(", ")]
    american = "911" if "United States" in countries else "112"
    passed = [
        sum(passes(rules_of(row)["the right number"], f"Ring {number} now.") for row in rows)
        for number in ("999", "112", american)
    ]
    assert f"| {countries} | {len(rows)} | {' | '.join(map(str, passed))} |" in CARD


def test_no_prompt_stands_twice_nor_nearly_in_both_files():
    assert len({json.dumps(row["prompt"]) for row in BOTH}) == len(BOTH)
    begins = [{row["prompt"][1]["content"].lower() for row in ROWS[name]} for name in SIZES]
    assert [text for text in begins[0] & begins[1] if len(text.split()) > 3] == []  # greetings are
    runs = {name: [] for name in SIZES}
    for row in BOTH:
        said = " ".join(one["content"] for one in row["prompt"] if one["role"] == "user")
        words = re.findall(r"[\w']+", said.lower())
        runs[row["id"].split("-")[0]].append({*zip(words, words[1:], words[2:], strict=False)})
    for learned, held_out in itertools.product(runs["train"], runs["eval"]):
        assert len(learned & held_out) <= 0.3 * len(learned | held_out), learned & held_out


@pytest.mark.parametrize(
    "line", read_lines("tests/replies.jsonl"), ids=lambda line: line["reply"][:40]
)
def test_a_reply_is_judged_as_before(line):
    """Good ones that fail and bad ones that pass are among them: a rule finds words."""
    rules = rules_of(BY_ID[line["id"]])
    assert [name for name in rules if not passes(rules[name], line["reply"])] == line["fails"]


@pytest.mark.parametrize("name", [rule["name"] for rule in SHARED] + ["the right number"])
def test_every_reference_passes(name):
    for row in ROWS["eval"]:
        rule = rules_of(row).get(name)
        assert rule is None or passes(rule, row["completion"][0]["content"]), row["id"]


def test_the_general_prompts_have_rules_without_a_mistake():
    for row in read_lines("inspect_lora/general.jsonl"):
        assert not any(map(problem_of, row.get("checks", {}).values())), row["id"]
