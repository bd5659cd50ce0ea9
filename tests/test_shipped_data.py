"""The shipped conversations, pairs and rules: counts, form, leaks between the files, countries."""

import collections
import itertools
import json
import re
import statistics

import pytest
from conftest import ROOT

from inspect_lora.rules import passes, read_rules, rules_for


def read_lines(name):
    return [json.loads(line) for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]


ROWS = {name: read_lines(f"data/{name}.jsonl") for name in ("train", "eval")}
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
ALL_NUMBERS = {"988"}.union(*NUMBERS.values())
# Somebody holds a mobile, two users speak of 111 themselves, and 988 listens to one in despair.
ALSO_RIGHT = {"eval-0065": {"112"}}
MAY_STAND_BESIDE = {"eval-0120": {"111"}, "eval-0194": {"111"}, "eval-0200": {"988"}}


def rules_of(row):
    return rules_for(row, row["kind"], SHARED)


def test_each_line_has_its_keys_and_the_same_system_message():
    needed = {"id", "topic", "kind", "prompt", "completion"}
    optional = {"country", "counterpart", "rejected", "checks"}
    assert len(BY_ID) == len(BOTH)
    for row in BOTH:
        assert needed <= set(row) <= needed | optional, row["id"]
        assert row["prompt"][0] == BOTH[0]["prompt"][0], row["id"]


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in PAIRS}))
def test_the_replies_of_pairs_are_of_like_length(kind):
    texts = [(r["rejected"], r["completion"][0]["content"]) for r in PAIRS if r["kind"] == kind]
    ratios = [len(bad.split()) / len(good.split()) for bad, good in texts]
    assert 0.9 <= statistics.median(ratios) <= 1.1


def rows_of_the_card():
    """Yield rows that the tables of the card must have, by what the files hold."""
    train, held_out = (collections.Counter(row["kind"] for row in ROWS[name]) for name in ROWS)
    for kind, count in held_out.items():
        yield f"| `{kind}` | {train[kind]} | {count} |"
    for name in [*(rule["name"] for rule in SHARED), "the right number"]:
        judged = [(rules_of(row)[name], row) for row in ROWS["eval"] if name in rules_of(row)]
        passed = [passes(rule, row["rejected"]) for rule, row in judged if "rejected" in row]
        yield f"| `{name}` | {len(judged)} | {sum(passed)} of {len(passed)} |"


@pytest.mark.parametrize("row", [*rows_of_the_card()])
def test_the_card_tells_what_the_files_hold(row):
    assert row in CARD


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


def numbers_in(text):
    return ALL_NUMBERS & set(re.findall(r"\d+", text))


def test_an_emergencys_number_tells_no_reply_apart_and_stands_in_no_earlier_turn():
    for row in EMERGENCIES:
        of_both = numbers_in(row["completion"][0]["content"]), numbers_in(row["rejected"])
        assert of_both[0] == of_both[1] != set(), row["id"]
        earlier = [numbers_in(message["content"]) for message in row["prompt"][:-1]]
        assert not any(earlier), row["id"]


def test_each_emergency_has_a_harmless_counterpart_of_its_own():
    counterparts = {row["counterpart"] for row in EMERGENCIES}
    assert len(counterparts) == len(EMERGENCIES) == 40
    assert {BY_ID[name]["kind"] for name in counterparts} == {"false_alarm", "everyday"}


def test_no_prompt_stands_twice_nor_nearly_in_both_files():
    assert len({json.dumps(row["prompt"]) for row in BOTH}) == len(BOTH)
    begins = [{row["prompt"][1]["content"].lower() for row in ROWS[name]} for name in ROWS]
    assert [text for text in begins[0] & begins[1] if len(text.split()) > 3] == []  # greetings are
    runs = {name: [] for name in ROWS}
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


def test_every_reference_passes():
    failing = [
        (row["id"], name)
        for row in ROWS["eval"]
        for name, rule in rules_of(row).items()
        if not passes(rule, row["completion"][0]["content"])
    ]
    assert failing == []
