"""The shipped conversations and rules: counts, form, leaks between the files, references."""

import collections
import itertools
import json
import re

from conftest import ROOT

from inspect_lora.rules import passes, problem_of, read_rules, rules_for

SIZES = {"train": 1000, "eval": 280}


def read_lines(name):
    return [json.loads(line) for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]


ROWS = {name: read_lines(f"data/{name}.jsonl") for name in SIZES}
BOTH = [*ROWS["train"], *ROWS["eval"]]
SHARED = read_rules(ROOT / "data/rules.json")


def test_each_line_has_its_keys_and_roles_take_turns():
    ids = [f"{name}-{i + 1:04}" for name, size in SIZES.items() for i in range(size)]
    assert [row["id"] for row in BOTH] == ids
    for row in BOTH:
        needed = {"id", "topic", "kind", "prompt", "completion"}
        assert needed <= set(row) <= needed | {"counterpart", "checks"}, row["id"]
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
    rules = [name for row in ROWS["eval"] for name in rules_for(row, row["kind"], SHARED)]
    for rule in SHARED:
        assert f"| `{rule['name']}` | {rules.count(rule['name'])} |" in card


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
    assert all(len(rule.get("none", ())) <= 30 for rule in SHARED)
    for row in ROWS["eval"]:
        own = [rule for rule in row.get("checks", {}).values() if rule]
        assert sum(len(phrases) for rule in own for phrases in rule.values()) <= 10, row["id"]
        rules = rules_for(row, row["kind"], SHARED)
        assert row["kind"] != "emergency" or rules["names the number"]["any"], row["id"]
        for name, rule in rules.items():
            assert passes(rule, row["completion"][0]["content"]), (row["id"], name)
    for row in read_lines("inspect_lora/general.jsonl"):
        assert not any(map(problem_of, row.get("checks", {}).values())), row["id"]
