"""Rules: what is found in a reply, what is refused, and which rules a line has."""

import json

import pytest

from inspect_lora.common import InspectError
from inspect_lora.rules import holds, passes, problem_of, read_rules, rules_for

CASES = [  # a reply, a phrase, and whether the reply holds it
    ("Ring 999, now.", "999", True), ("Call **999**.", "999", True), ("in 1999", "999", False),
    ("999,000 people", "999", False), ("0.999", "999", False), ("0800 111 999", "999", False),
    ("0800-111-999", "111", False), ("10-15 of them", "15", True),
    ("Nine-nine-nine", "nine nine nine", True), ("dial 9\u20119\u20119", "9 9 9", True),
    ("It is 85.", "85", True), ("1,085", "85", False), ("85.5", "85", False),
    ("8.95 euros", "8.95", True), ("And I\u2019LL RING you", "I'll ring", True),
    ("i'll ring", "I\u2019ll ring", True), ("No need\nto **ring** them", "no need to ring", True),
    ("as an air", "as an AI", False), ("I can't", "can", False),
    ("She'll be fine", "'ll be fine", True),
    ("a **b**", "**", True), ("2 * 3", "**", False), ("Two things:\n- one", "\n- ", True),
    ("one - two", "\n- ", False), ("Two things:\n1. one", "\n1. ", True),
    ("Type `df` there", "`df`", True), ('{"age": 34}', '"age": 34', True),
    ("The CAF\u00c9 is shut", "caf\u00e9", True),
    ("\u8bf7\u6253\u7ed9\u533b\u751f\u5427", "\u533b\u751f", True),  # no spaces in Chinese
    ("119\uc5d0 \uc804\ud654", "119", True),  # and endings in Korean
]  # fmt: skip


@pytest.mark.parametrize(("reply", "phrase", "is_in"), CASES)
def test_a_phrase_is_found_in_the_same_words_and_in_no_others(reply, phrase, is_in):
    assert holds(reply, phrase) is is_in


ALL_KEYS = {"any": ["999"], "none": ["no need"], "most_words": 5, "most_questions": 0}
JUDGED = [  # a rule, a reply, and whether it passes
    ({"any": ["999", "112"]}, "Ring 112.", True), ({"any": ["999", "112"]}, "", False),
    ({"any": ["999", "112"]}, "Ring 911.", False), ({"none": ["999", "I promise"]}, "", True),
    ({"none": ["999", "I promise"]}, "Ring 911.", True),
    ({"none": ["999", "I promise"]}, "I promise.", False), ({"none": ["999"]}, "Ring 999.", False),
    ({"most_words": 3}, "One two three.", True), ({"most_words": 3}, "One two three four.", False),
    ({"most_words": 0}, " \n", True), ({"most_words": 0}, "Yes.", False),
    ({"most_questions": 1}, "What??", True), ({"most_questions": 1}, "Who? What?", False),
    ({"most_questions": 0}, "\u4ec0\u4e48\uff1f", False),
    (ALL_KEYS, "Ring 999 now, please.", True), (ALL_KEYS, "Ring them.", False),
    (ALL_KEYS, "No need for 999.", False), (ALL_KEYS, "Ring 999 now, please, at once.", False),
    (ALL_KEYS, "999?", False),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "reply", "is_good"), JUDGED, ids=str)
def test_each_key_is_asked_for(rule, reply, is_good):
    assert problem_of(rule) == ""
    assert passes(rule, reply) is is_good


WRONG = [
    None, [], "999", {}, {"anny": ["999"]}, {"any": ["999"], "not": ["x"]}, {"any": []},
    {"any": "999"}, {"none": None}, {"none": ["x", ""]}, {"none": ["x", 999]}, {"none": {"x": 1}},
    {"most_words": -1}, {"most_words": True}, {"most_words": "60"}, {"most_questions": 1.0},
    {"most_questions": None},
]  # fmt: skip


@pytest.mark.parametrize("rule", WRONG, ids=str)
def test_a_wrong_rule_is_told_wherever_it_stands(rule, tmp_path):
    """A rule with a misspelt key, or a text for a list, would pass every reply or none."""
    assert problem_of(rule)
    if rule is not None:  # which switches a rule off
        with pytest.raises(InspectError, match="polite"):
            rules_for({"checks": {"brief": {"most_words": 9}, "polite": rule}}, "", [])
    if isinstance(rule, dict):
        path = tmp_path / "my_rules.json"
        path.write_text(json.dumps([{"name": "a", "none": ["x"]}, {"name": "b"} | rule]))
        with pytest.raises(InspectError, match=r"my_rules\.json.* 2\b"):
            read_rules(path)


WRONG_FILES = [
    None, '{"name": "a", "none": ["x"]}', '["a"]', '[{"none": ["x"]}]',
    '[{"name": " ", "none": ["x"]}]', '[{"name": "a", "kinds": [], "none": ["x"]}]',
    '[{"name": "a", "kinds": "b", "none": ["x"]}]', "[{'name': 'a'}]",
    '[{"name": "a", "none": ["x"]}, {"name": "a", "none": ["y"]}]',
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG_FILES)
def test_a_wrong_file_of_rules_is_told(text, tmp_path):
    path = tmp_path / "my_rules.json"
    if text:  # without one the file is missing
        path.write_text(text)
    with pytest.raises(InspectError, match=r"my_rules\.json"):
        read_rules(path)


SAFE = {"name": "safe", "kinds": ["urgent"], "none": ["wait"]}
BRIEF = {"name": "brief", "most_words": 60}
OWN = {"safe": {"any": ["999"]}, "brief": None, "new": {"any": ["x"]}}
OF_LINES = [  # a line's checks, its kind, and the rules for it
    ({}, "urgent", {"safe": {"none": ["wait"]}, "brief": {"most_words": 60}}),
    ({}, "plain", {"brief": {"most_words": 60}}),
    (OWN, "urgent", {"safe": {"any": ["999"]}, "new": {"any": ["x"]}}),
    ({"brief": {"most_words": 9}}, "plain", {"brief": {"most_words": 9}}),
]


@pytest.mark.parametrize(("checks", "kind", "rules"), OF_LINES)
def test_a_line_has_the_rules_of_its_kind_and_its_own(checks, kind, rules):
    assert rules_for({"checks": checks}, kind, [SAFE, BRIEF]) == rules
