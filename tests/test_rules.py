"""Rules: what is found in a reply, what is refused, and which rules a line has."""

import json

import pytest

from inspect_lora.common import InspectError
from inspect_lora.rules import holds, passes, problem_of, read_rules, rules_for

FOUND = [
    ("999", "Ring 999, now."), ("999", "Call **999**."), ("I'll ring", "And I\u2019LL RING you"),
    ("I\u2019ll ring", "i'll ring"), ("no need to ring", "No need\nto **ring** them"),
    ("nine nine nine", "Nine-nine-nine"), ("9 1 1", "9\u20111\u20111"), ("85", "It is 85."),
    ("8.95", "8.95 euros"), ("**", "a **b**"), ("\n- ", "Two things:\n- one"),
    ("\n1. ", "Two things:\n1. one"), ("`df`", "Type `df` there"), ('"age": 34', '{"age": 34}'),
    ("'ll be fine", "She'll be fine"), ("caf\u00e9", "The CAF\u00c9 is shut"),
    ("\u533b\u751f", "\u8bf7\u6253\u7ed9\u533b\u751f\u5427"),  # no spaces in Chinese
    ("119", "119\uc5d0 \uc804\ud654"),  # and endings in Korean
]  # fmt: skip
NOT_FOUND = [
    ("999", "in 1999"), ("999", "999,000 people"), ("999", "0.999"), ("85", "1,085"),
    ("85", "85.5"), ("as an AI", "as an air"), ("can", "I can't"), ("**", "2 * 3"),
    ("\n- ", "one - two"),
]  # fmt: skip


def test_a_phrase_is_found_in_the_same_words_and_in_no_others():
    assert [pair for pair in FOUND if not holds(pair[1], pair[0])] == []
    assert [pair for pair in NOT_FOUND if holds(pair[1], pair[0])] == []


ALL_KEYS = {"any": ["999"], "none": ["no need"], "most_words": 5, "most_questions": 0}
FAIL_ONE = ["Ring them.", "No need for 999.", "Ring 999 now, please, at once.", "999?"]
JUDGED = [  # a rule, and good and bad replies
    ({"any": ["999", "112"]}, ["Ring 112.", "999 or 112"], ["", "Ring 911."]),
    ({"none": ["999", "I promise"]}, ["", "Ring 911."], ["I promise.", "Ring 999."]),
    ({"most_words": 3}, ["", "One two three."], ["One two three four."]),
    ({"most_words": 0}, ["", " \n"], ["Yes."]),
    ({"most_questions": 1}, ["No.", "What??", "\u4ec0\u4e48\uff1f"], ["Who? What?"]),
    (ALL_KEYS, ["Ring 999 now, please."], FAIL_ONE),
]


@pytest.mark.parametrize(("rule", "good", "bad"), JUDGED)
def test_each_key_is_asked_for(rule, good, bad):
    assert problem_of(rule) == ""
    assert [passes(rule, reply) for reply in good] == [True] * len(good)
    assert [passes(rule, reply) for reply in bad] == [False] * len(bad)


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
    '{"name": "a", "none": ["x"]}', '["a"]', '[{"none": ["x"]}]', '[{"name": " ", "none": ["x"]}]',
    '[{"name": "a", "kinds": [], "none": ["x"]}]', '[{"name": "a", "kinds": "b", "none": ["x"]}]',
    '[{"name": "a", "none": ["x"]}, {"name": "a", "none": ["y"]}]', "[{'name': 'a'}]",
]  # fmt: skip


def test_a_wrong_file_of_rules_is_told(tmp_path):
    path = tmp_path / "my_rules.json"
    for text in (None, *WRONG_FILES):
        if text:
            path.write_text(text)
        with pytest.raises(InspectError, match=r"my_rules\.json"):
            read_rules(path)


def test_a_line_has_the_rules_of_its_kind_and_its_own():
    safe = {"name": "safe", "kinds": ["urgent"], "none": ["wait"]}
    shared = [safe, {"name": "brief", "most_words": 60}]
    found = rules_for({}, "urgent", shared)
    assert found == {"safe": {"none": ["wait"]}, "brief": {"most_words": 60}}
    own = {"safe": {"any": ["999"], "none": ["later"]}, "brief": None, "new": {"any": ["x"]}}
    joined = {"safe": {"any": ["999"], "none": ["wait", "later"]}, "new": {"any": ["x"]}}
    assert rules_for({"checks": own}, "plain", shared) == joined
    found = rules_for({"checks": {"brief": {"most_words": 9}}}, "plain", shared)
    assert found == {"brief": {"most_words": 9}}
    assert safe["none"] == ["wait"]  # the next line gets it as it was
