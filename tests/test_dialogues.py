"""A user's own dialogues: what they cost, which replies are learned, how a tenth is held out."""

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from trainers import Recorder, command_in, on_trainer, prepared, refused, rows_of

import train_lora_single as t

SCRIPT = t.__file__


def shipped_turns():
    """Return (system message, question, reply) of each shipped conversation of one turn."""
    lines = (ROOT / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    talks = [row["prompt"] + row["completion"] for row in rows if len(row["prompt"]) == 2]
    return [[message["content"] for message in talk] for talk in talks]


def dialogues(count, replies, words=1000, seed=0):
    """Return messages of dialogues of so many replies each, made from the shipped conversations.

    Args:
        count: how many dialogues.
        replies: the numbers of replies that a dialogue may have.
        words: at most so many of a text's words are kept, to make them short.
        seed: other ones give other dialogues.
    """
    turns, chance, made = shipped_turns(), random.Random(seed), []
    for _ in range(count):
        system, *_ = chance.choice(turns)
        talk = [{"role": "system", "content": system}]
        for _, question, reply in chance.sample(turns, chance.choice(replies)):
            talk.append({"role": "user", "content": short(question, words)})
            talk.append({"role": "assistant", "content": short(reply, words)})
        made.append(talk)
    return made


def short(text, words):
    return " ".join(text.split()[:words])


def write_jsonl(path, rows):
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def sharegpt(talk):
    """Return a conversation in the ShareGPT form."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[one["role"]], "value": one["content"]} for one in talk]


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    """Work where the files are, so that their names stay short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def quick(tmp_path_factory, tiny):
    """Return the path of a random model that is quicker than the tests' one, with its tokenizer."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("quick") / "model")
    config = transformers.Qwen3Config(
        vocab_size=2048, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return str(folder)


LAST = r'To pay less, set REPLIES to "last" \(--replies last\): (\d+) examples with ([\d,]+) tokens'


# ---- what is said and what is done --------------------------------------------------------------


def test_what_the_dry_run_says_is_what_the_run_does(
    quick, in_a_folder, monkeypatch, capsys, no_picture
):
    """Fifty dialogues of 5 to 12 replies."""
    made = dialogues(50, range(5, 13), words=4)
    rows = [{"messages": talk} for talk in made]
    flags = ["--demo", "--model_name", quick, "--train_file", write_jsonl("d.jsonl", rows)]
    flags += ["--eval_file", "", "--max_steps", "0", "--num_epochs", "1", "--save_steps", "1000"]
    for replies in ("all", "last"):
        given = [*flags, "--replies", replies, "--output_dir", replies]
        t.main([*given, "--dry_run"])
        said = " ".join(capsys.readouterr().out.split())
        recorders = []
        on_trainer(monkeypatch, lambda trainer, all=recorders: all.append(Recorder(trainer)))
        monkeypatch.setattr(t, "measure_worth", lambda *_: None)
        t.main(given)
        capsys.readouterr()
        monkeypatch.undo()
        os.chdir(in_a_folder)
        sent = rows_of(recorders[-1].trained)
        counts = {"all": sum(len(talk) // 2 for talk in made), "last": 50}
        each = {"all": "each reply", "last": "the last reply"}[replies]
        lines = f'50 lines with "messages", and of them {counts[replies]} examples, one for {each}.'
        tokens = sum(len(row) for row in sent)
        assert len(sent) == counts[replies]
        assert f"{lines} An epoch sends {tokens:,} tokens through the model" in said
        steps = -(-counts[replies] // 4)
        assert f"{steps} steps of " in said
        assert f"Training would send {tokens:,} tokens through the model in {steps} steps." in said
        repeated = repeats(prepared([*given, "--dry_run"]).train)
        share = f", and {repeated:,} of them ({repeated / tokens:.0%}) are repeated"
        assert (share in said) == (replies == "all")
        if replies == "all":
            assert repeated > tokens / 2
            advice = re.search(LAST, said)
            less = int(advice[2].replace(",", ""))
        else:
            assert "To pay less" not in said and int(advice[1]) == 50 and tokens == less


@pytest.mark.parametrize(
    ("epochs", "most", "said"),
    [
        (1, 0, "{} tokens through the model in 3 steps."),
        (5, 0, "{} tokens through the model in 15 steps."),
        (5, 6, "{} tokens through the model in 6 steps."),
        (5, 4, "about {} tokens through the model in 4 steps."),
        (5, 1, "about {} tokens through the model in 1 step."),
    ],
)
def test_the_dry_run_says_how_many_tokens_the_whole_training_has(
    tiny, in_a_folder, capsys, epochs, most, said
):
    rows = [{"messages": talk} for talk in dialogues(12, [1], words=8)]
    flags = ["--demo", "--dry_run", "--model_name", tiny, "--eval_file", ""]
    flags += ["--train_file", write_jsonl("d.jsonl", rows), "--max_seq_len", "9000"]
    flags += ["--num_epochs", str(epochs), "--max_steps", str(most)]
    t.main(flags)
    out = " ".join(capsys.readouterr().out.split())
    an_epoch = sum(len(one.input_ids) for one in prepared(flags).train)
    assert f"An epoch sends {an_epoch:,} tokens" in out
    tokens = round(an_epoch * (most or 3 * epochs) / 3)
    assert f"Training would send {said.format(f'{tokens:,}')}" in out


def repeats(examples):
    """Return how many tokens are a beginning that the example before of the same line has."""
    total = 0
    for before, example in itertools.pairwise(examples):
        if before.where == example.where:
            one, other = before.input_ids, example.input_ids
            total += next(n for n in range(len(one)) if one[: n + 1] != other[: n + 1])
    return total


@pytest.mark.parametrize(
    ("replies", "is_advised"), [(1, False), (2, False), (8, True)], ids=["one", "two", "eight"]
)
def test_advice_is_given_only_above_half(tiny, in_a_folder, capsys, replies, is_advised):
    long_replies = dialogues(12, [replies])
    file = write_jsonl("d.jsonl", [{"messages": talk} for talk in long_replies])
    flags = ["--demo", "--dry_run", "--model_name", tiny, "--max_seq_len", "9000"]
    t.main([*flags, "--train_file", file, "--eval_file", ""])
    out = capsys.readouterr().out
    assert f'12 lines with "messages", and of them {12 * replies} examples' in out
    assert ("To pay less" in out) == is_advised and ("are repeated" in out) == (replies > 1)
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("long_ones", "completions"), [(0, 0), (0, 7), (2, 0), (2, 7), (5, 0)], ids=str
)
def test_the_figures_for_last_replies_are_those_of_a_run_with_them(
    tiny, in_a_folder, capsys, long_ones, completions
):
    """Of some lines the last reply is too long; other lines are completions, which stay."""
    talks = dialogues(20, [8], words=12)
    for talk in talks[:long_ones]:
        talk[-1]["content"] = "yes " * 900
    rows = [{"messages": talk} for talk in talks]
    rows += [{"prompt": talk[:2], "completion": talk[2:3]} for talk in talks[:completions]]
    flags = ["--demo", "--dry_run", "--model_name", tiny, "--max_seq_len", "800"]
    flags += ["--train_file", write_jsonl("d.jsonl", rows), "--eval_file", ""]
    t.main(flags)
    said = " ".join(capsys.readouterr().out.split())
    advice = re.search(LAST, said)
    if long_ones == 5:  # more than a tenth of the lines
        assert not advice and "MAX_SEQ_LEN" in refused(capsys, [*flags, "--replies", "last"])
        assert "To pay less, cut the dialogues into shorter lines." in said
        assert "the last reply of 5 lines ends beyond MAX_SEQ_LEN" in said
        return
    run = prepared([*flags, "--replies", "last"]).train
    assert int(advice[1]) == len(run) == 20 - long_ones + completions
    assert int(advice[2].replace(",", "")) == sum(len(one.input_ids) for one in run)
    left_out = "2 lines are left out, since their last reply ends beyond MAX_SEQ_LEN."
    assert (left_out in said) == (long_ones == 2)


def test_the_held_out_file_is_counted_and_completions_are_not_explained(tiny, in_a_folder, capsys):
    talk = dialogues(1, [6])[0]
    eval_file = write_jsonl("e.jsonl", [{"messages": talk}])
    train_file = write_jsonl("t.jsonl", [{"prompt": talk[:2], "completion": talk[2:3]}] * 3)
    flags = ["--demo", "--dry_run", "--model_name", tiny, "--max_seq_len", "9000"]
    t.main([*flags, "--train_file", train_file, "--eval_file", eval_file])
    out = " ".join(capsys.readouterr().out.split())
    assert 'e.jsonl has 1 line with "messages", and of them 6 examples' in out
    assert "An evaluation sends" in out and "An epoch sends" not in out
    assert "To pay less" not in out  # an evaluation costs little


# ---- REPLIES ------------------------------------------------------------------------------------


def test_the_last_reply_alone_is_learned_and_the_others_are_read(tiny, in_a_folder):
    talk = dialogues(1, [4])[0]
    rows = [{"messages": talk}, {"prompt": talk[:4], "completion": talk[4:5]}]
    file = write_jsonl("d.jsonl", rows)
    flags = ["--demo", "--dry_run", "--model_name", tiny, "--max_seq_len", "9000"]
    flags += ["--train_file", file, "--eval_file", ""]
    every, last = (prepared([*flags, "--replies", which]).train for which in ("all", "last"))
    assert [len(one.messages) for one in every] == [3, 5, 7, 9, 5]
    assert [len(one.messages) for one in last] == [9, 5]
    assert last[0].input_ids == every[3].input_ids and last[0].reply_ids == every[3].reply_ids
    assert last[1].input_ids == every[4].input_ids


def test_held_out_lines_follow_replies_too(tiny, in_a_folder):
    talk = dialogues(1, [3])[0]
    train_file = write_jsonl("t.jsonl", [{"messages": talk[:3]}])
    eval_file = write_jsonl("e.jsonl", [{"messages": talk}])
    flags = ["--demo", "--dry_run", "--model_name", tiny, "--max_seq_len", "9000"]
    flags += ["--train_file", train_file, "--eval_file", eval_file, "--replies", "last"]
    assert [len(one.messages) for one in prepared(flags).held_out] == [7]


def test_what_follows_from_replies_is_compared_on_resume(flags, tmp_path, capsys, monkeypatch):
    """Lines of one reply teach the same either way; others do not."""
    one = dialogues(13, [1], words=6)
    two = dialogues(13, [2], words=6)
    flags = [*flags, "--eval_file", "", "--max_steps", "4", "--save_steps", "2"]
    for name, made, is_resumed in (("one", one, True), ("two", two, False)):
        file = write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": talk} for talk in made])
        given = [*flags, "--train_file", file, "--output_dir", str(tmp_path / name)]

        def stop(*_, **__):
            raise SystemExit("stopped before the end")

        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(t, "publish", stop)
            t.main(given)
        capsys.readouterr()
        again = [*given, "--replies", "last"]
        if is_resumed:
            t.main(again)
            assert "going on from" in capsys.readouterr().out
        else:
            with pytest.raises(SystemExit):
                t.main(again)
            said = " ".join(capsys.readouterr().err.split())
            assert "the tokens of TRAIN_FILE was" in said and "REPLIES" not in said


# ---- what is too long ---------------------------------------------------------------------------


def test_what_a_longer_limit_costs_is_said_where_examples_are_too_long(tiny, in_a_folder, capsys):
    made = [{"messages": talk} for talk in dialogues(9, [1], words=5)]
    long_one = [*dialogues(1, [1])[0][:2], {"role": "assistant", "content": "yes " * 2500}]
    flags = ["--demo", "--dry_run", "--model_name", tiny, "--max_seq_len", "200"]
    file = write_jsonl("d.jsonl", [*made, {"messages": long_one}])
    files = ["--train_file", file, "--eval_file", ""]
    t.main([*flags, *files])
    out = capsys.readouterr().out
    left_out = " ".join(out[out.index("left out") : out.index("tokens  ")].split())
    length = int(re.search(r"d\.jsonl:10: ([\d,]+) tokens", left_out)[1].replace(",", ""))
    assert 1968 < length < 6848
    cost = f"By a simulation of Qwen3.5-4B, an example of {length:,} tokens needs "
    assert cost in left_out and "on 16 GB it does not fit (1,968 tokens are the most)" in left_out
    assert "on 32 GB it fits with that extra work." in left_out
    write_jsonl(file, [*made[:4], {"messages": long_one}])
    said = refused(capsys, [*flags, *files])
    assert f"--max_seq_len {-(-length // 64) * 64} 0 " in said and cost in said


OFFER = r"(--max_seq_len (\d+)(?: --replies last)?) +([\d,]+) +([\d,]+) +([\d,]+)"


def offers_in(said):
    """Return {the flags that a refusal offers: (examples left out, tokens, steps)}."""
    found = re.findall(OFFER, said)
    return {one[0]: tuple(int(part.replace(",", "")) for part in one[2:]) for one in found}


@pytest.mark.parametrize("most", [0, 7])
@pytest.mark.parametrize("form", ["dialogues", "and completions", "one reply each"])
def test_what_a_refusal_offers_is_what_the_dry_run_says_with_it(
    tiny, in_a_folder, capsys, form, most
):
    """Each offer leaves out at most a tenth, and so many tokens and steps follow from it."""
    talks = dialogues(24, [1] if form == "one reply each" else range(1, 9))
    rows = [{"messages": talk} for talk in talks]
    if form == "and completions":
        rows += [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in dialogues(9, [7])]
    flags = ["--demo", "--dry_run", "--model_name", tiny, "--num_epochs", "3", "--eval_file", ""]
    flags += ["--train_file", write_jsonl("d.jsonl", rows), "--max_steps", str(most)]
    said = refused(capsys, [*flags, "--max_seq_len", "90"])
    offers = offers_in(said)
    lasts = ["--replies last" in one for one in offers]
    assert lasts == ([False] * 2 if form == "one reply each" else [False] * 2 + [True] * 2)
    assert ("the earlier replies are only read" in said) == any(lasts)
    assert [offer[0] == 0 for offer in offers.values()] == [False, True] * (len(offers) // 2)
    for words, (left_out, tokens, steps) in offers.items():
        given = [*flags, *words.split()]
        t.main(given)
        out = " ".join(capsys.readouterr().out.split())
        sends = f"Training would send {tokens:,} tokens through the model in {steps} steps."
        assert sends in out.replace("send about", "send")
        assert (f" left out {left_out} of " in out) == (left_out > 0)
        length = int(words.split()[1])
        assert length % 64 == 0
        if left_out:  # the next smaller multiple is too small
            given[given.index("--max_seq_len") + 1] = str(length - 64)
            assert "more than a tenth" in refused(capsys, given)


def test_offers_that_are_the_same_are_one_and_the_present_limit_may_do(tiny, in_a_folder, capsys):
    """Thirty short lines, and one dialogue of which most replies are too long, yet one line."""
    alike = [{"messages": [*talk[:2], {"role": "assistant", "content": "yes " * 300}]}
             for talk in dialogues(9, [1], words=3)]  # fmt: skip
    flags = ["--demo", "--dry_run", "--model_name", tiny, "--eval_file", "", "--max_seq_len", "99"]
    file = write_jsonl("a.jsonl", alike)
    assert len(offers_in(refused(capsys, [*flags, "--train_file", file]))) == 1
    rows = [{"messages": talk} for talk in dialogues(30, [1], words=3) + dialogues(1, [30], 9)]
    file = write_jsonl("b.jsonl", rows)
    offers = offers_in(refused(capsys, [*flags, "--train_file", file]))
    assert offers["--max_seq_len 99 --replies last"][0] == 1 and len(offers) == 4
    said = refused(capsys, [*flags, "--train_file", write_jsonl("c.jsonl", rows[-1:])])
    assert len(offers_in(said)) == 3  # of one line either all is kept, or nothing


def test_no_other_replies_are_offered_where_the_last_are_taken_already(tiny, in_a_folder, capsys):
    file = write_jsonl("d.jsonl", [{"messages": talk} for talk in dialogues(9, [4])])
    flags = ["--demo", "--dry_run", "--model_name", tiny, "--max_seq_len", "90"]
    said = refused(capsys, [*flags, "--train_file", file, "--eval_file", "", "--replies", "last"])
    assert offers_in(said) and "--replies" not in said


def test_a_held_out_example_is_not_priced(tiny, in_a_folder, capsys):
    """An evaluation needs far less memory than training, whose tokens are known."""
    short_ones = write_jsonl("t.jsonl", [{"messages": talk} for talk in dialogues(9, [1], 5)])
    long_ones = write_jsonl("e.jsonl", [{"messages": talk} for talk in dialogues(9, [9])])
    flags = ["--demo", "--dry_run", "--model_name", tiny, "--max_seq_len", "200"]
    flags += ["--train_file", short_ones]
    t.main([*flags, "--eval_file", ""])
    (sends,) = re.findall("Training would send .* steps?[.]", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        t.main([*flags, "--eval_file", long_ones])
    out, err = capsys.readouterr()
    said = " ".join(err.split())
    assert "longer than MAX_SEQ_LEN" in said and "simulation" not in said
    assert re.search(r"Raise MAX_SEQ_LEN to \d+ to keep them all", said) and not offers_in(said)
    assert out.count("Training would send") == 1 and sends in out


@pytest.mark.parametrize(
    ("tokens", "verdicts"),
    [
        (300, "13 GiB of GPU memory, or 9 GiB and nearly 50 % more work: on 16 GB and 32 GB it fits"
              " at full speed."),
        (1000, "on 16 GB it fits with that extra work, on 32 GB it fits at full speed."),
        (1500, "35 GiB of GPU memory, or 12 GiB and nearly 50 % more work: on 16 GB and 32 GB it"
               " fits with that extra work."),
        (9000, "on 16 GB it does not fit (1,968 tokens are the most), on 32 GB it does not fit"
               " (6,848 tokens are the most)."),
    ],
)  # fmt: skip
def test_the_cost_of_a_length_in_words(tokens, verdicts):
    assert t.cost_of_length(tokens).endswith(verdicts)


def test_the_limits_of_16_gb_are_those_of_the_simulation():
    """The next multiple of 16 tokens does not fit; the limits of 32 GB take too long for a test."""
    from benchmarks.common import QWEN
    from benchmarks.simulate import CARDS, CUDA, Pass, Simulation

    simulation = Simulation(QWEN, t.parse_settings([]))
    # As the script tries: a tenth stays free, and the optimizer's numbers are not there yet.
    room = 0.9 * (CARDS["16 GB"] - CUDA) + 4 * simulation.trainable
    for most, is_recomputed in zip(t.LONGEST_EXAMPLE["16 GB"], (False, True), strict=True):
        for tokens, fits in ((most, True), (most + 16, False)):
            one = Pass(1, tokens, tokens - 1, is_recomputed)
            assert (simulation.peak(one) <= room) == fits


# ---- --split ------------------------------------------------------------------------------------


def split(capsys, file, *flags):
    """Split a file; return the rows of both sides, and what was printed."""
    t.main(["--split", str(file), *flags])
    stem = Path(file).with_suffix("")
    sides = [rows_in(f"{stem}.{side}.jsonl") for side in ("train", "eval")]
    return *sides, capsys.readouterr().out


def rows_in(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def beginning(row):
    """Return the system message and the first user message of a line."""
    talk = row.get("messages") or row["prompt"]
    system = talk[0]["content"].strip() if talk[0]["role"] == "system" else ""
    return system, next(one["content"].strip() for one in talk if one["role"] == "user")


def many(count, replies=(1,)):
    """Return lines of dialogues, no two of which begin alike."""
    made = dialogues(count, replies, words=8)
    for number, talk in enumerate(made):
        talk[1]["content"] += f" ({number})"
    return [{"id": number, "messages": talk} for number, talk in enumerate(made)]


def test_a_tenth_is_held_out_by_dialogue_and_no_line_is_lost(in_a_folder, capsys):
    rows = many(300)
    parts = [{"messages": row["messages"][:3], "id": f"part {row['id']}"} for row in rows[:100]]
    spaced = json.loads(json.dumps(parts[0]))
    spaced["messages"][1]["content"] += "\n"
    everything = [*rows, *parts, spaced]
    train, held_out, said = split(capsys, write_jsonl("mine.jsonl", everything))
    assert sorted(map(str, train + held_out)) == sorted(map(str, everything))
    ours, theirs = ({beginning(row) for row in side} for side in (train, held_out))
    assert len(theirs) == 30 and len(ours) == 270 and not ours & theirs
    places = [everything.index(row) for row in train]
    assert places == sorted(places)
    assert "mine.jsonl: 300 dialogues in 401 lines" in said
    assert f"mine.eval.jsonl: 30 dialogues in {len(held_out)} lines, held out" in said
    assert "--dry_run --train_file mine.train.jsonl" in said
    assert "--eval_file mine.eval.jsonl" in said and max(map(len, said.splitlines())) <= 100


@pytest.mark.parametrize(("count", "held_out"), [(40, 20), (199, 20), (255, 26)])
def test_at_least_20_dialogues_are_held_out(in_a_folder, capsys, count, held_out):
    train, evaluated, _ = split(capsys, write_jsonl("mine.jsonl", many(count)))
    assert (len(train), len(evaluated)) == (count - held_out, held_out)


def test_the_seed_decides_and_not_the_order(in_a_folder, capsys):
    rows = many(120)
    sides = []
    for name, some, flags in (
        ("a", rows, ()), ("b", rows[::-1], ()), ("c", rows, ("--seed", "7")),
    ):  # fmt: skip
        _, held_out, _ = split(capsys, write_jsonl(f"{name}.jsonl", some), *flags)
        sides.append({row["id"] for row in held_out})
    assert sides[0] == sides[1] != sides[2]


def test_a_beginning_that_many_share_stays_in_training(in_a_folder, capsys):
    """Else one greeting could take half of the file along."""
    same = many(1)[0]["messages"]
    rows = [*many(60), *[{"id": f"same {n}", "messages": same} for n in range(200)]]
    for seed in range(5):
        file = write_jsonl(f"{seed}.jsonl", rows)
        _, held_out, _ = split(capsys, file, "--seed", str(seed))
        assert len(held_out) == 20 and beginning({"messages": same}) not in map(beginning, held_out)


def lines_of(*talks):
    """Return numbered lines of conversations, each of which is given by its texts, user first."""
    roles = ("user", "assistant")
    return [
        {"id": n, "messages": [{"role": roles[k % 2], "content": c} for k, c in enumerate(talk)]}
        for n, talk in enumerate(talks)
    ]


def texts_of(row):
    return [one["content"].strip() for one in row["messages"]]


def check_sides(train, held_out):
    """Check that what lines of both sides share begins more than a twentieth of all lines."""
    texts = [texts_of(row) for row in train + held_out]
    trained = {tuple(one[:n]) for one in map(texts_of, train) for n in range(1, len(one) + 1)}
    for row in map(texts_of, held_out):
        lengths = [n for n in range(1, len(row) + 1) if tuple(row[:n]) in trained]
        if lengths:
            assert max(lengths) < len(row)  # more follows
            shared = row[: max(lengths)]
            assert sum(one[: len(shared)] == shared for one in texts) > len(texts) / 20


def plain(count, start=0):
    return [(f"Question {n}?", f"Answer {n}.") for n in range(start, start + count)]


def split_talks(capsys, talks, seed=42, name="mine"):
    """Split lines of these conversations; return how many are on each side, and what is said."""
    file = write_jsonl(f"{name}.jsonl", lines_of(*talks))
    train, held_out, said = split(capsys, file, "--seed", str(seed))
    assert len(train) + len(held_out) == len(talks)
    check_sides(train, held_out)
    return train, held_out, " ".join(said.split())


def test_without_a_common_opening_the_same_dialogues_are_held_out_as_ever(in_a_folder, capsys):
    """These were held out before openings were told apart by what follows."""
    talks = [*plain(60), *[(*talk, "And?", "No.") for talk in plain(60)]]
    before = [4, 10, 12, 13, 15, 21, 22, 24, 27, 30, 33, 34, 36, 38, 42, 46, 47, 49, 56, 59]
    _, held_out, said = split_talks(capsys, talks)
    assert [row["id"] for row in held_out] == [*before, *[60 + n for n in before]]
    assert "opening" not in said and "warning" not in said


OPENINGS = {
    "then each reply differs": ("Hi", "Reply {}", "Then {}", "End {}"),
    "then a question differs": ("Hi", "Hello!", "Then {}", "End {}"),
    "then a later one differs": ("Hi", "Hello!", "A story, please.", "Of whom?", "Of {}", "End {}"),
    "and one reply differs": ("Hi", "Reply {}"),
}


@pytest.mark.parametrize("opening", OPENINGS.values(), ids=OPENINGS)
def test_lines_with_a_common_opening_are_told_apart_by_what_follows(in_a_folder, capsys, opening):
    """Of 800 dialogues 400 begin with "Hi"."""
    greeted = [[text.format(n) for text in opening] for n in range(400)]
    drawn = set()
    for seed in range(4):
        _, held_out, said = split_talks(capsys, [*plain(400), *greeted], seed, f"m{seed}")
        greetings = [row["id"] for row in held_out if texts_of(row)[0] == "Hi"]
        assert len(held_out) == 80 and 20 <= len(greetings) <= 60
        drawn |= set(greetings)
        text = f'{len(greetings)} held-out lines have an opening such as "Hi" in common with lines'
        assert text in said
        assert "800 dialogues" in said and "warning" not in said
    assert len(drawn) > 100


def test_the_order_of_lines_with_a_common_opening_does_not_matter(in_a_folder, capsys):
    rows = lines_of(*plain(100), *[("Hi", "Hello!", f"Then {n % 70}", f"{n}") for n in range(100)])
    sides = []
    for name, some in (("a", rows), ("b", rows[::-1]), ("c", random.Random(0).sample(rows, 200))):
        _, held_out, _ = split(capsys, write_jsonl(f"{name}.jsonl", some))
        sides.append(sorted(row["id"] for row in held_out))
    assert sides[0] == sides[1] == sides[2]


def test_what_shares_more_than_the_opening_stays_together(in_a_folder, capsys):
    """Each of 60 dialogues that begin with "Hi" is there in parts, three lines that grow."""
    talks = plain(60)
    for n in range(60):
        whole = ["Hi", "Hello!", f"Then {n}", f"So {n}", "Why?", f"Since {n}", "Yes?", "Yes."]
        talks += [whole[:4], whole[:6], whole]
    for seed in range(4):
        _, held_out, _ = split_talks(capsys, talks, seed, f"m{seed}")
        parts = [texts_of(row)[2] for row in held_out if len(texts_of(row)) > 2]
        assert parts and all(parts.count(one) == 3 for one in parts)


def test_a_line_that_ends_within_the_opening_is_not_held_out(in_a_folder, capsys):
    talks = [*plain(60), *[("Hi", "Hello!")] * 3]
    talks += [("Hi", "Hello!", f"Then {n}", "So.") for n in range(100)]
    for seed in range(8):
        train, held_out, _ = split_talks(capsys, talks, seed, f"m{seed}")
        assert [texts_of(row) for row in train].count(["Hi", "Hello!"]) == 3
        assert any(texts_of(row)[0] == "Hi" for row in held_out)


@pytest.mark.parametrize("branches", [1, 3])
def test_the_parts_of_one_long_dialogue_are_no_common_opening(in_a_folder, capsys, branches):
    """A line for each of its replies, also where some were given anew: few are whole dialogues."""
    long_one = [f"turn {n}" for n in range(120)]
    talks = [*plain(60), *[long_one[:n] for n in range(2, 121, 2)]]
    talks += [[*long_one[:100], f"other {n}", "yes"] for n in range(1, branches)]
    for seed in range(4):
        _, held_out, _ = split_talks(capsys, talks, seed, f"m{seed}")
        assert len(held_out) == 20 and all(len(row["messages"]) == 2 for row in held_out)


@pytest.mark.parametrize(
    ("talks", "reason"),
    [
        ([*plain(300), *[("Hi", "Hello!")] * 600],
         "Only 3.3% of the lines are held out, since 600 lines stay in training: they repeat one "
         "another, or are parts of one dialogue, and make up more than a twentieth of the file."),
        ([*plain(320), *[(f"Hi {n % 12}", "Hello!") for n in range(480)]],
         "% of the lines are held out, since a tenth of the dialogues are, and these are short of "
         "lines; another --seed draws others."),
        ([*plain(300), *[("Hi", "Hello!")] * 290], ""),
        (plain(500), ""),
    ],
    ids=["repeats", "unlucky", "enough", "plain"],
)  # fmt: skip
def test_it_is_said_if_much_less_than_a_tenth_is_held_out(in_a_folder, capsys, talks, reason):
    found = []
    for seed in range(12):
        train, held_out, said = split_talks(capsys, talks, seed, f"m{seed}")
        is_little = len(held_out) < 0.05 * len(train + held_out)
        assert ("of the lines are held out" in said) == is_little
        found.append(reason in said and is_little)
    assert any(found) == bool(reason)


@pytest.mark.parametrize("form", ["lines", "array", "array over lines"])
def test_sharegpt_is_converted_on_the_way(in_a_folder, capsys, form):
    talks = [row["messages"] for row in many(60, (2, 3))]
    rows = [{"id": n, "conversations": sharegpt(talk)} for n, talk in enumerate(talks)]
    rows[3]["conversations"].insert(1, {"from": "gpt", "value": "Hello, I am Nell."})
    rows[4]["conversations"].append({"from": "human", "value": "And then?"})
    rows[5] = {"id": 5, "system": talks[5][0]["content"], "conversations": sharegpt(talks[5][1:])}
    rows[6] = {"id": 6, "messages": talks[6]}
    if form == "lines":
        file = write_jsonl("mine.jsonl", rows)
    else:
        file = "mine.json"
        Path(file).write_text(json.dumps(rows, indent=1 if "over" in form else None))
    train, held_out, said = split(capsys, file)
    found = {row["id"]: row for row in train + held_out}
    assert found == {n: {"id": n, "messages": talk} for n, talk in enumerate(talks)}
    assert "59 were in the ShareGPT form" in said and "of 2, a greeting or a question" in said
    _, problems = t.read_examples("mine.train.jsonl")
    assert problems == []


def test_other_lines_stay_as_they_are_to_the_letter(in_a_folder, capsys):
    rows = many(60)
    lines = [json.dumps(row, indent=None, separators=(" , ", ":  ")) for row in rows]
    lines[7] = json.dumps(rows[7] | {"note": "é \ud83d", "rate": 1e5})
    Path("mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    split(capsys, "mine.jsonl")
    texts = [Path(f"mine.{side}.jsonl").read_text(encoding="utf-8") for side in ("train", "eval")]
    assert sorted("".join(texts).splitlines()) == sorted(lines)


@pytest.mark.parametrize("form", ["messages", "conversations", "array"])
@pytest.mark.parametrize(("lacking", "said"), [((4, 9, 30), True), ((), False), (range(60), False)])
def test_a_split_warns_of_a_system_message_that_only_some_have(
    in_a_folder, capsys, form, lacking, said
):
    talks = [row["messages"] for row in many(60)]
    talks = [talk[1:] if n in lacking else talk for n, talk in enumerate(talks)]
    key = "conversations" if form == "conversations" else "messages"
    rows = [{key: sharegpt(talk) if key == "conversations" else talk} for talk in talks]
    file = write_jsonl("mine.jsonl", rows)
    if form == "array":
        Path(file).write_text(json.dumps(rows), encoding="utf-8")
    *_, out = split(capsys, file)
    where = "mine.jsonl, entry 5" if form == "array" else "mine.jsonl:5"
    text = f"3 of the 60 conversations in mine.jsonl have no system message ({where} is one)"
    assert (text in " ".join(out.split())) == ("warning" in out) == said
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (["train"], "mine.train.jsonl is there already, so nothing was written. Move it away."),
        (["eval"], "mine.eval.jsonl is there already, so nothing was written. Move it away."),
        (["train", "eval"], "mine.train.jsonl and mine.eval.jsonl are there already, so nothing "
                            "was written. Move them away."),
    ],
    ids=["train", "eval", "both"],
)  # fmt: skip
def test_nothing_is_overwritten_and_nothing_is_half_written(in_a_folder, capsys, there, said):
    file = write_jsonl("mine.jsonl", many(60))
    for side in there:
        Path(f"mine.{side}.jsonl").write_text("mine")
    assert refused(capsys, ["--split", file]) == said
    assert sorted(os.listdir()) == sorted(["mine.jsonl", *[f"mine.{one}.jsonl" for one in there]])
    assert all(Path(f"mine.{side}.jsonl").read_text() == "mine" for side in there)


def test_the_next_command_of_a_split_has_what_was_given_for_the_training(in_a_folder, capsys):
    given = ["--model_name", "a folder/model", "--model_revision", "v2", "--replies", "last"]
    given += ["--max_seq_len", "2048"]
    *_, said = split(capsys, write_jsonl("mine.jsonl", many(60)), *given, "--seed", "7")
    words = command_in(said, "python", "train_lora_single.py", "--dry_run")
    files = ["--train_file", "mine.train.jsonl", "--eval_file", "mine.eval.jsonl"]
    assert words[3:] == [*given, *files]
    *_, said = split(capsys, write_jsonl("other.jsonl", many(60)), "--model_name", t.MODEL_NAME)
    assert "--model_name" not in said and "--replies" not in said


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("few", ["mine.jsonl has 39 dialogues", "Fewer than 40", "count as one dialogue"]),
        ("alike", ["mine.jsonl has 1 dialogue."]),
        ("bad line", ["mine.jsonl:2: the messages are user;", "so nothing was written"]),
        ("half a character", ["mine.jsonl:1: the line holds half a character"]),
        ("nothing", ["mine.jsonl has 0 dialogues"]),
        ("no array", ["no JSON array", "nothing was written"]),
        ("bad entry", ["mine.jsonl, entry 2: this is not an object but 5"]),
        ("missing", ["There is no file mine.jsonl", "check --split"]),
        ("folder", ["mine.jsonl is not a file"]),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_reason(in_a_folder, capsys, content, parts):
    bad = {"messages": [{"role": "user", "content": "Hi"}]}
    shared = {"id": "\ud83d", "conversations": sharegpt(many(1)[0]["messages"])}
    contents = {
        "few": many(39), "alike": many(1) * 50, "bad line": [many(1)[0], bad, *many(50)],
        "half a character": [shared, *many(50)], "nothing": [],
    }  # fmt: skip
    if content in contents:
        write_jsonl("mine.jsonl", contents[content])
    elif content == "no array":
        Path("mine.jsonl").write_text('[{"messages": ')
    elif content == "bad entry":
        Path("mine.jsonl").write_text(json.dumps([many(1)[0], 5]))
    elif content == "folder":
        Path("mine.jsonl").mkdir()
    before = os.listdir()
    said = refused(capsys, ["--split", "mine.jsonl"])
    for part in parts:
        assert part in said
    assert os.listdir() == before


def test_a_folder_that_cannot_be_written_is_named(in_a_folder, capsys, monkeypatch):
    real = Path.open

    def full(path, mode="r", *rest, **others):
        if mode == "x":
            raise OSError(28, "No space left on device")
        return real(path, mode, *rest, **others)

    file = write_jsonl("mine.jsonl", many(60))
    monkeypatch.setattr(Path, "open", full)
    assert "mine.train.jsonl cannot be written (No space left" in refused(capsys, ["--split", file])


@pytest.mark.parametrize("mode", ["--demo", "--dry_run"])
def test_a_split_with_another_mode_is_a_wrong_flag(capsys, mode):
    with pytest.raises(SystemExit) as stop:
        t.main(["--split", "mine.jsonl", mode])
    assert stop.value.code == 2 and "--split trains nothing" in capsys.readouterr().err


def test_a_split_takes_less_than_a_second_and_loads_no_library(in_a_folder):
    """800 dialogues; what the run leaves are the two files alone."""
    write_jsonl("mine.jsonl", many(800, (5, 6)))
    code = "import sys, runpy; sys.argv = ['x', '--split', 'mine.jsonl']; "
    code += f"runpy.run_path({SCRIPT!r}, run_name='__main__'); "
    code += "print([one for one in ('torch', 'transformers', 'jinja2') if one in sys.modules])"
    best = 9.0
    for _ in range(3):
        for side in ("train", "eval"):
            Path(f"mine.{side}.jsonl").unlink(missing_ok=True)
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        best = min(best, time.perf_counter() - began)
        assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stderr
    assert best < 1
    assert sorted(os.listdir()) == ["mine.eval.jsonl", "mine.jsonl", "mine.train.jsonl"]
