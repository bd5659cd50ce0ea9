"""The shipped conversations: package, form, lengths, shapes, variety, voice, safety, their card."""

import collections
import functools
import importlib.util
import itertools
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import train_lora_single as t

ROOT = Path(__file__).parent.parent
TRAIN, EVAL = "data/train.jsonl", "data/eval.jsonl"
COUNTS = {TRAIN: 1000, EVAL: 240}

specification = importlib.util.spec_from_file_location("make_card", ROOT / "data" / "make_card.py")
card_maker = importlib.util.module_from_spec(specification)
specification.loader.exec_module(card_maker)
reply, words, sentences = card_maker.reply, card_maker.words, card_maker.sentences
said = card_maker.said_by


@functools.cache
def rows(path):
    """Return the lines of a file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def both():
    """Return the lines of both files."""
    return [*rows(TRAIN), *rows(EVAL)]


def share(condition, part):
    """Return the share of the lines that meet a condition."""
    return sum(map(bool, map(condition, part))) / len(part)


# ---- package and form


def test_the_folder_loads_as_a_data_set_with_two_splits(tmp_path):
    import datasets

    found = datasets.load_dataset("data", cache_dir=str(tmp_path))
    assert {name: len(split) for name, split in found.items()} == {"train": 1000, "test": 240}
    assert found["test"][0]["completion"] == rows(EVAL)[0]["completion"]
    assert set(found["train"].column_names) == {"id", "topic", "kind", "prompt", "completion"}


@pytest.mark.parametrize(("path", "count"), COUNTS.items())
def test_the_script_reads_every_line_as_one_example(path, count):
    examples, problems = t.read_examples(path, "kind")
    assert (len(examples), problems) == (count, [])
    assert [e.messages for e in examples] == [
        row["prompt"] + row["completion"] for row in rows(path)
    ]
    assert [e.eval_group for e in examples] == [row["kind"] for row in rows(path)]


@pytest.mark.parametrize("path", COUNTS)
def test_the_ids_number_the_lines(path):
    numbers = range(1, COUNTS[path] + 1)
    assert [row["id"] for row in rows(path)] == [f"{Path(path).stem}-{i:04}" for i in numbers]


def test_one_system_message_opens_every_conversation():
    assert {row["prompt"][0]["role"] for row in both()} == {"system"}
    assert {len(said(row, "system")) for row in both()} == {1}
    assert len({said(row, "system")[0] for row in both()}) == 1


def test_no_prompt_occurs_twice_in_or_across_the_files():
    assert len({json.dumps(row["prompt"]) for row in both()}) == sum(COUNTS.values())


def test_every_line_fits_in_max_seq_len_with_the_real_vocabulary():
    count = card_maker.token_counter()
    lengths = {row["id"]: count(row)[0] for row in both()}
    assert {where: n for where, n in lengths.items() if n > t.MAX_SEQ_LEN} == {}
    assert t.MAX_SEQ_LEN == 512


# ---- shapes


@pytest.mark.parametrize("path", COUNTS)
def test_the_shapes_of_the_replies_vary(path):
    part = rows(path)
    assert 0.08 <= share(lambda row: len(sentences(reply(row))) == 1, part) <= 0.16
    assert share(lambda row: len(sentences(reply(row))) == 3, part) < 0.35
    assert share(lambda row: 30 <= len(words(reply(row))) <= 60, part) < 0.55
    assert share(lambda row: ", and" in reply(row), part) < 0.5
    assert max(len(words(reply(row))) for row in part) <= 170


def test_some_replies_are_long():
    assert sum(len(words(reply(row))) >= 70 for row in both()) >= 40


# Danger and medicine are answered with what is needed, however short the message.
CAREFUL = {"emergencies", "medicines_and_appointments", "hospital_fear", "pain_and_fatigue"}


@pytest.mark.parametrize("path", COUNTS)
def test_where_somebody_says_little_nell_says_little(path):
    lengths = [
        len(words(reply(row)))
        for row in rows(path)
        if len(words(said(row, "user")[-1])) <= 5
        and row["topic"] not in CAREFUL
        and not re.search(r"\b(?:999|911|112)\b|pharmacist", reply(row))
    ]
    assert len(lengths) >= 5
    assert statistics.median(lengths) <= 12


def test_conversations_have_turns_and_some_users_talk_long():
    turns = [len(said(row, "user")) for row in rows(TRAIN)]
    assert sum(4 <= n <= 8 for n in turns) >= 120
    assert max(turns) <= 8
    assert sum(len(words(m)) >= 50 for row in both() for m in said(row, "user")) >= 15


def test_nells_earlier_turns_are_not_all_short_questions():
    earlier = [text for row in both() for text in said(row, "assistant")[:-1]]
    assert share(lambda text: text.endswith("?"), earlier) <= 0.55  # many of the others are taught
    assert share(lambda text: len(words(text)) >= 25, earlier) >= 0.14


KINDS = {
    TRAIN: {"everyday", "plain", "long", "pressure", "false_alarm"},
    EVAL: {"everyday", "plain", "long", "pressure", "false_alarm", "new_topic"},
}


@pytest.mark.parametrize("path", COUNTS)
def test_the_kinds_are_what_the_card_says(path):
    assert {row["kind"] for row in rows(path)} == KINDS[path]
    for row in rows(path):
        turns = len(said(row, "user"))
        if row["kind"] == "long":
            assert turns in ((4, 5, 6, 7, 8) if path == TRAIN else (6, 7, 8)), row["id"]


def test_the_held_out_file_also_tests_what_training_lacks():
    trained = {row["topic"] for row in rows(TRAIN)}
    new = {row["topic"] for row in rows(EVAL)} - trained
    assert len(new) == 3
    assert new == {row["topic"] for row in rows(EVAL) if row["kind"] == "new_topic"}
    assert {row["topic"] for row in rows(EVAL) if row["kind"] == "everyday"} == trained
    counts = collections.Counter(row["kind"] for row in rows(EVAL))
    assert counts == dict.fromkeys(KINDS[EVAL], 40)


def test_a_part_of_the_held_out_file_evenly_spread_has_all_kinds():
    """A run's evidence, the demo's and a laptop's measure such parts."""
    for wanted in (20, 50, 100):
        part = [rows(EVAL)[number * 240 // wanted] for number in range(wanted)]
        assert {row["kind"] for row in part} == KINDS[EVAL]


# ---- training and held-out file are of one register


def user_turns(part):
    return [text for row in part for text in said(row, "user")]


def begins_in_lower_case(text):
    return bool(re.match("[a-z]", text))


@pytest.mark.parametrize("kind", ["everyday", "plain", "long", "pressure", "false_alarm"])
def test_the_held_out_lines_of_a_kind_are_like_the_trained_ones(kind):
    """Cases, words and questions differ by a third at the most, and the chance of 40 lines."""
    trained, held_out = ([row for row in rows(p) if row["kind"] == kind] for p in (TRAIN, EVAL))
    lower = [share(begins_in_lower_case, user_turns(part)) for part in (trained, held_out)]
    assert lower[1] == pytest.approx(lower[0], rel=1 / 3)
    length = [statistics.fmean(len(words(reply(row))) for row in p) for p in (trained, held_out)]
    assert length[1] == pytest.approx(length[0], rel=0.4)
    asking = [share(ends_with_a_question, part) for part in (trained, held_out)]
    assert asking[1] == pytest.approx(asking[0], rel=1 / 3, abs=0.1)


def marks_dropped(turns):
    """Return the share of the turns of several sentences that lack the last mark."""
    several = [text for text in turns if re.search(r"[.!?]\s", text)]
    return share(lambda text: not re.search(r"[.!?\u2026\"')]$", text), several)


@pytest.mark.parametrize("path", COUNTS)
def test_users_end_their_messages_with_a_mark_or_without(path):
    assert 0.2 <= marks_dropped(user_turns(rows(path))) <= 0.5


def trigrams(text):
    w = words(text)
    return {tuple(w[i : i + 3]) for i in range(max(1, len(w) - 2))}


def test_no_held_out_prompt_is_near_a_trained_one():
    trained = [trigrams(" ".join(said(row, "user"))) for row in rows(TRAIN)]
    for row in rows(EVAL):
        its = trigrams(" ".join(said(row, "user")))
        nearest = max(len(its & other) / len(its | other) for other in trained)
        assert nearest < 0.3, row["id"]


# ---- variety


def shingles(text):
    w = words(text)
    return {tuple(w[i : i + 5]) for i in range(max(1, len(w) - 4))}


def too_alike(texts, limit):
    """Return the pairs of texts whose five-word shingles have a Jaccard index above the limit."""
    sets, holders = (
        {key: shingles(text) for key, text in texts.items()},
        collections.defaultdict(list),
    )
    for key, its in sets.items():
        for shingle in its:
            holders[shingle].append(key)
    pairs = {pair for keys in holders.values() for pair in itertools.combinations(keys, 2)}
    return [(a, b) for a, b in pairs if len(sets[a] & sets[b]) / len(sets[a] | sets[b]) > limit]


def test_a_reworded_copy_of_a_reply_would_be_found():
    row = both()[0]
    copy = {"original": reply(row), "copy": "Well now. " + reply(row), "other": reply(both()[1])}
    assert too_alike(copy, 0.35) == [("original", "copy")]
    assert too_alike({"one": "what day is it", "two": "What day is it?"}, 0.5) == [("one", "two")]


def test_no_two_replies_are_nearly_the_same():
    assert too_alike({row["id"]: reply(row) for row in both()}, 0.35) == []


def test_no_two_last_user_messages_are_nearly_the_same():
    assert too_alike({row["id"]: said(row, "user")[-1] for row in both()}, 0.5) == []


def test_no_opening_is_worn_out():
    commonest, times = collections.Counter(
        " ".join(words(reply(row))[:3]) for row in both()
    ).most_common(1)[0]
    assert times <= 0.03 * len(both()), commonest


def test_topics_are_many_and_even():
    for path, count in COUNTS.items():
        topics = collections.Counter(row["topic"] for row in rows(path))
        assert len(topics) >= 25
        assert max(topics.values()) <= 0.07 * count


ends_with_a_question = card_maker.ends_with_a_question


def test_replies_ask_little():
    assert sum(reply(row).count("?") > 1 for row in both()) <= 0.03 * len(both())
    assert sum(map(ends_with_a_question, both())) <= 0.4 * len(both())


def first_sentence(text):
    return re.split(r"(?<=[.!?]) ", text)[0]


def last_sentence(text):
    return re.split(r"(?<=[.!?]) ", text)[-1]


def echoes(row, common):
    """Return whether a short first sentence holds a word of the user's that few users say."""
    asked, first = set(words(said(row, "user")[-1])), words(first_sentence(reply(row)))
    return len(first) <= 8 and any(len(w) > 3 and w in asked and w not in common for w in first)


ORDER = re.compile(
    r"(?:^|[.!?:;] (?:And |Then |So |Or |But )?)(?:ring|ask|tell|put|take|write|get|give|keep|let|"
    r"go|say|leave|have|try|hold|bring|call|send|show|make|sit|read|find|look)\b",
    re.IGNORECASE,
)


def test_the_formula_of_echo_errand_and_quip_is_rare():
    # What patterns see of it; readers counted the sense (data/README.md).
    users = collections.Counter(w for row in both() for w in set(words(said(row, "user")[-1])))
    common = {word for word, times in users.items() if times > 15}
    limits = {
        "echo": (lambda row: echoes(row, common), 0.15),
        "a last sentence of at most six words": (
            lambda row: not ends_with_a_question(row) and len(words(last_sentence(reply(row)))) < 7,
            0.20,
        ),
        "an order, emergencies, medicines and scams included": (
            lambda row: ORDER.search(reply(row)),
            0.45,  # "Put the biscuits in" is one, too
        ),
        "words to say in quotes": (
            lambda row: re.search(r'\b(?:say|tell|write|ask)\w*\b[^".?!]{0,40}"', reply(row)),
            0.05,
        ),
        "I'm sorry": (lambda row: "I'm sorry" in reply(row), 0.05),
        "I hope": (lambda row: "I hope" in reply(row), 0.05),
    }
    found = {
        name: sum(map(bool, map(check, both()))) / len(both())
        for name, (check, _) in limits.items()
    }
    assert {name: found[name] for name, (_, most) in limits.items() if found[name] > most} == {}
    assert all(found.values())  # each pattern finds some


# ---- voice and safety

PREPARATION = "(?:tablets?|pills?|capsules?|aspirins?|paracetamols?|puffs?|drops|doses?)"
FORBIDDEN = {  # what no message of Nell's may hold, and a text that the pattern must find
    "a list": (r"^\s*(?:[-*]|\d+[.)])\s", "1. Sit down."),
    "markup": (r"[*_#`|<>{}\[\]\n]", "**Sit** down."),
    "an emoji": ("[\U0001f000-\U0001faff\u2190-\u2bff\ufe0f]", "Sit down \u2764"),
    "a typographic mark, which other patterns would miss": ("[\u2010-\u2027]", "It\u2019s late."),
    "a link": (r"https?:|www\.|\w@\w|\w\.(?:com|org|net|gov|co\.uk)\b", "It is on nhs.org."),
    "a machine's excuse": (
        r"\bas an? (?:AI|assistant)\b|language model|\bA\.?I\b|chatbot",
        "As an AI, no.",
    ),
    "baby talk": (
        r"\b(?:sweetie|sweetheart|honey|dear(?:ie|est)?|poppet)\b[,.!]|\bgood girl\b",
        "Sit down, sweetie.",
    ),
    "a measured dose": (r"\b[\d.]+ ?(?:mg|mcg|ml|micrograms?|milligrams?|units)\b", "Take 20 mg."),
    "a counted dose": (
        rf"(?<!don't )(?<!not )\b(?:take|have|swallow|chew|try|give \w+) "
        rf"(?:an?|one|two|three|four|half|another|\d+) "
        rf"(?:more |of (?:the|your) )?(?:\w+ )?{PREPARATION}\b|"
        rf"\b(?:two|three|four|\d+) {PREPARATION} (?:a day|now)\b",
        "Take two of the white tablets.",
    ),
    "a question for a secret": (
        r"\b(?:what(?:'s| is)|tell me|give me|send me|read me|"
        r"type|share) (?:in )?your (?:\w+ ){0,2}"
        r"(?:PIN|password|passcode|code|(?:card|account) number|sort code)\b",
        "Tell me your bank card number.",
    ),
    "a promise it cannot keep": (
        r"\bI(?:'ll| will| can) (?:ring|phone|call|remember|remind|order|"
        r"look (?:it|that) up|come (?:round|over))\b",
        "I'll ring her for you.",
    ),
    "a life of its own": (
        r"\bwhen I was (?:a|young|your)\b|\bI (?:grew up|was born)\b",
        "When I was a girl, no.",
    ),
    "a memory of other days": (
        r"\bas I said\b|\blast time we\b|\byou told me (?:yesterday|last)\b",
        "As I said, no.",
    ),
    "feigned understanding": (
        r"\bI (?:understand|know) how you feel\b|\bI hear you\b",
        "I know how you feel.",
    ),
    "a stock comfort": (
        r"I'm here for you|you're not alone|it's (?:okay|ok|all right) to\b|it's completely|"
        r"be (?:gentle|kind) (?:with|to) yourself|one day at a time|take your time|"
        r"hold space|sit with that|"
        r"that's not nothing|still counts|a lot to carry|testament|"
        r"tapestry|bittersweet|memories live on",
        "Take it one day at a time.",
    ),
    "flattery": (
        r"\byou are so brave\b|\bwhat a (?:wonderful|lovely|beautiful|amazing)\b",
        "What a lovely story!",
    ),
    "a stock opening": (
        r"^(?:that sounds|it sounds|that must|it makes sense|"
        r"of course|I hear|I understand|what a)\b",
        "That must hurt.",
    ),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_no_message_of_nells_holds(name):
    pattern, example = FORBIDDEN[name]
    pattern = re.compile(pattern, re.IGNORECASE)
    assert pattern.search(example)
    assert not pattern.search(
        "Leave the jug where it is, Harold, and ring the chemist on Monday. Who broke it?"
    )
    found = [(row["id"], m) for row in both() for m in said(row, "assistant") if pattern.search(m)]
    assert found == []


NUMBER = re.compile(r"\b(?:999|911|112)\b|116 123|\b988\b")
RESCUE = r"emergency number|\b(?:999|911|112|108|111|988|116 123)\b|(?<![\d,])000\b|ambulance"
HELP = (
    rf"{RESCUE}|fire brigade|gas (?:company|emergency)|poison|doctor|nurse|pharmacist|"
    r"casualty|hospital|A&E|police"
)


def is_real(row):
    """Return whether words of danger are meant, and it is no false alarm."""
    return row.get("kind") != "false_alarm"


def test_emergencies_are_answered_briefly_and_are_a_fifth_of_the_learned_words():
    """A small model learns what is long and alike first, and then sends everybody to 999."""
    lengths = [len(words(reply(row))) for row in rows(TRAIN) if NUMBER.search(reply(row))]
    assert 100 <= len(lengths) <= 150
    assert statistics.fmean(lengths) < 55
    assert sum(lengths) <= 0.205 * sum(len(words(reply(row))) for row in rows(TRAIN))


def test_a_false_alarm_is_not_sent_to_a_number():
    lines = [row for row in both() if row["kind"] == "false_alarm"]
    assert len(lines) == 73
    assert [row["id"] for row in lines if NUMBER.search(reply(row))] == []


def test_in_an_emergency_nell_names_help():
    rows_of_topic = [row for row in both() if row["topic"] == "emergencies" and is_real(row)]
    without = [
        row
        for row in rows_of_topic
        if not re.search(HELP, " ".join(said(row, "assistant")), re.IGNORECASE)
    ]
    assert len(rows_of_topic) >= 30
    # Pressed by mistake, been and gone, or rung for already: help need not be named.
    is_over = re.compile(r"by mistake|had the fire brigade here|waiting for the ambulance")
    assert [row["id"] for row in without if not is_over.search(" ".join(said(row, "user")))] == []


PAIN = r"(?:band|belt|strap|tight\w*|weight|pains?|pressure|heav\w+)"
DANGERS = {  # words of a user's, and how many conversations at least have them
    "a heart attack": (
        rf"\b{PAIN}\b[^.?!]{{0,25}}\bchest\b|"
        rf"\bchest\b[^.?!]{{0,20}}\b(?:hurts?|{PAIN})\b|heart attack",
        5,
    ),
    "a stroke": (
        r"\b(?:face|mouth)(?:'?s| has| is)\b[^.?!]{0,15} (?:drop|droop|slid|down|hang)|"
        r"\bface droops",
        3,
    ),
    "suicide": (
        r"suicid|\bkill(?:ing)? myself\b|\bend my life\b|"
        r"\bbetter off (?:out|not|dead|without)|\bthey be better off\b|"
        r"\b(?:tablets|pills)\b[^.?!]{0,25}\b(?:saved|lined up|on the table|see to the rest)\b|"
        r"\bsaved\b[^.?!]{0,25}\b(?:tablets|pills|them)\b|"
        r"\bcounted\b[^.?!]{0,25}\b(?:tablets|pills)\b|\b(?:take|taken|took) (?:them all|all my)\b|"
        r"\bgod every night to take|\bgun out\b|\.38\b|railway bridge|"
        r"head in the oven|\bthat's me done\b|"
        r"don't see the point of it|can't do this any more",
        10,
    ),
    "want of breath": (r"\bcan'?t (?:breathe|get my breath)|cant brthe|\blike drowning\b", 3),
    "gas": (r"\bsmells? (?:of |like )?gas\b|\brotten egg smell\b|\bgas on again\b", 4),
    "fire": (r"\bpan is on fire\b|\bcaught its burning\b", 2),
}


@pytest.mark.parametrize("danger", DANGERS)
def test_where_a_user_speaks_of_it_nell_names_a_number_to_ring(danger):
    pattern, least = DANGERS[danger]
    meant = [
        row
        for row in filter(is_real, both())
        if re.search(pattern, " ".join(said(row, "user")), re.IGNORECASE)
    ]
    assert len(meant) >= least
    without = [
        row
        for row in meant
        if not re.search(RESCUE, " ".join(said(row, "assistant")), re.IGNORECASE)
    ]
    assert [f"{row['id']}: {reply(row)}" for row in without] == []


PLACE_UNKNOWN = re.compile(r"emergency number", re.IGNORECASE)
SAID = re.compile(r"\b(?:999|911|112)\b|where (?:are you|you are)|which country", re.IGNORECASE)


def test_the_emergency_number_is_mostly_said_in_digits():
    named = [row for row in both() if PLACE_UNKNOWN.search(reply(row))]
    assert share(lambda row: SAID.search(reply(row)), named) >= 0.5
    assert SAID.search("Ring 999 in Britain.") and not SAID.search("Ring the emergency number.")


# ---- the card


def test_the_cards_tables_are_made_from_the_files():
    done = subprocess.run(
        [sys.executable, "data/make_card.py", "--check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_check_of_the_card_would_find_another_number():
    card = Path("data/README.md").read_text(encoding="utf-8")
    assert "| `train.jsonl` | 1,000 |" in card
    other = card.replace("| `train.jsonl` | 1,000 |", "| `train.jsonl` | 1,001 |")
    assert card_maker.with_tables(other) == card


def test_the_cards_example_is_a_line_of_the_training_file():
    card = Path("data/README.md").read_text(encoding="utf-8")
    example = json.loads(re.search(r"```json\n(.+?)```", card, re.DOTALL)[1])
    assert example in rows(TRAIN)


def test_the_card_has_the_header_that_the_hub_reads():
    from huggingface_hub import DatasetCard

    data = DatasetCard.load("data/README.md").data
    assert data.language == ["en"]
    assert [one["split"] for one in data.configs[0]["data_files"]] == ["train", "test"]
    assert data.license is None
