"""inspect_lora.py compare: which run is better by more than the error? And a run's own verdict."""

import json
import math
import random
import re

import numpy as np
import peft
import pytest
from transformers import AutoModelForCausalLM

import train_lora_single as t

inspect_lora = pytest.importorskip("inspect_lora")


def section(text, name):
    """Return the lines of the only section of this name, each without its first ten columns."""
    (found,) = re.findall(rf"^{name:<10}.*\n(?: {{10}}.*\n)*", text, re.MULTILINE)
    return [line[10:] for line in found.splitlines()]


def listing(folder):
    """Return all that a write below folder would change."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def standard_error(numerators, denominators):
    """Return the error of a ratio of sums, as Cochran writes it (Sampling Techniques, 6.4)."""
    y, x = np.array(numerators), np.array(denominators)
    n, value = len(y), y.sum() / x.sum()
    return math.sqrt(((y - value * x) ** 2).sum() / (n - 1) / n) / abs(x.mean())


@pytest.fixture
def put(finished, tmp_path):
    """Return a function that writes the finished run's run.json, changed, below tmp_path.

    losses are the adapter's on each held-out example; the other flags change entries by name.
    """
    kept = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    tokens = [10, 20, 30, 40]

    def write(where, losses=(2.0, 2.0, 2.0, 2.0), settings=(), **changes):
        record = json.loads(json.dumps(kept)) | changes
        rows = record["evidence"]["losses"]
        record["evidence"]["losses"] = [
            row | {"tokens": n, "base": 3.0, "adapter": loss}
            for row, n, loss in zip(rows, tokens, losses, strict=True)
        ]
        record["evidence"]["adapter"] = float(np.average(losses, weights=tokens))
        record["settings"] |= dict(settings)
        path = tmp_path / where
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record), encoding="utf-8")
        return record

    return write


@pytest.fixture
def compare(capsys):
    """Return a function that gives what the command says of these folders."""

    def run(*folders):
        capsys.readouterr()
        inspect_lora.main(["compare", *map(str, folders)])
        out, err = capsys.readouterr()
        assert err == ""
        return section(out, "runs")

    return run


@pytest.fixture
def refusal(capsys):
    """Return a function that gives the one message with which the command ends."""

    def run(*folders):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            inspect_lora.main(["compare", *map(str, folders)])
        out, err = capsys.readouterr()
        assert stop.value.code == 1 and out == "" and "Traceback" not in err
        return " ".join(err.split())

    return run


def rows_of(lines):
    """Return [(held-out loss, difference, minutes, path)] of the listed runs."""
    row = re.compile(r" *(\d+\.\d{4})  (best|\S+ ± \S+(?: =)?) +(\d+\.\d\+?)  (\S+)")
    return [found.groups() for line in lines if (found := row.match(line))]


def test_runs_are_ranked_with_the_paired_difference_to_the_best(put, compare, tmp_path):
    """A small difference in each example is clear, though the examples differ far more."""
    put("a/run.json", (2.0, 3.0, 1.0, 2.5), train_seconds=754)
    put("b/run.json", (1.9, 2.8, 0.9, 2.3), train_seconds=60)
    put("c/deeper/run.json.2026-01-01-000000", (1.5, 3.4, 0.1, 2.6))
    before = listing(tmp_path)
    rows = rows_of(compare(tmp_path / "a", tmp_path / "b", tmp_path / "c"))
    assert listing(tmp_path) == before
    tokens = np.array([10, 20, 30, 40])
    losses = [(1.5, 3.4, 0.1, 2.6), (1.9, 2.8, 0.9, 2.3), (2.0, 3.0, 1.0, 2.5)]
    means = [np.average(one, weights=tokens) for one in losses]
    assert [row[0] for row in rows] == [f"{mean:.4f}" for mean in means] and means == sorted(means)
    expected = ["best"]
    for one in losses[1:]:
        change = (np.array(one) - losses[0]) * tokens
        value, error = change.sum() / tokens.sum(), standard_error(change, tokens)
        expected.append(f"{value:+.4f} ± {error:.4f}" + (" =" if abs(value) <= 2 * error else ""))
    assert [row[1] for row in rows] == expected and expected[1].endswith(" =")
    assert [row[3].rpartition("/")[2] for row in rows] == [
        "run.json.2026-01-01-000000", "run.json", "run.json",
    ]  # fmt: skip
    assert [row[2] for row in rows][1:] == ["1.0", "12.6"]


def test_only_a_difference_within_twice_its_error_is_marked_as_equal(put, compare, tmp_path):
    put("best/run.json", (2.0, 3.0, 1.0, 2.5))
    put("clear/run.json", (2.1, 3.11, 1.1, 2.59))
    put("equal/run.json", (2.9, 2.7, 1.6, 2.3))
    lines = compare(tmp_path)
    marks = {path.split("/")[-2]: found for _, found, _, path in rows_of(lines)}
    assert marks["best"] == "best"
    assert not marks["clear"].endswith("=") and marks["equal"].endswith(" =")
    assert any(line.startswith("=: ") for line in lines)


def test_among_several_runs_three_errors_make_a_difference_clear(put, compare, tmp_path):
    """This one is of two and a half."""
    put("best/run.json", (2.0, 2.0, 2.0, 2.0))
    change = np.array([0.1, 0.4, 0.2, 0.7]) * [10, 20, 30, 40]
    error = standard_error(change, [10, 20, 30, 40])
    assert 2 < change.sum() / 100 / error < 3
    put("next/run.json", (2.1, 2.4, 2.2, 2.7))
    assert not rows_of(compare(tmp_path))[1][1].endswith("=")
    put("third/run.json", (9.0, 9.0, 9.0, 9.0))
    assert rows_of(compare(tmp_path))[1][1].endswith(" =")


def test_what_differs_is_named_and_nothing_else(put, compare, tmp_path):
    names = ("OUTPUT_DIR", "LOGGING_STEPS", "SAVE_STEPS", "REPORT_TO", "NUM_SAMPLES", "EVAL_GROUP")
    names += ("MAX_NEW_TOKENS", "EVIDENCE_EXAMPLES")
    put("a/run.json", settings={"LORA_R": 4} | dict.fromkeys(names, "x"))
    put("b/run.json", (2.1,) * 4, settings={"LORA_R": 16} | dict.fromkeys(names, "y"))
    text = "\n".join(compare(tmp_path))
    assert text.index("LORA_R 4") < text.index("LORA_R 16")
    assert {*re.findall(r"\b[A-Z]+_[A-Z_]+\b", text)} == {"LORA_R"}


def test_long_settings_that_differ_are_shown_on_lines_of_a_terminals_width(put, compare, tmp_path):
    deep = "a-folder-for-the-runs-of-this-study-with-a-long-name"
    values = {"LORA_TARGET_MODULES": ["q_proj", "v_proj"], "LEARNING_RATE": 1e-4, "LORA_ALPHA": 4}
    put(f"{deep}/a/run.json")
    put(f"{deep}/b/run.json", settings=values)
    lines = compare(tmp_path)
    assert max(map(len, lines)) <= 100 and len(rows_of(lines)) == 2
    text = re.sub(r"\s+", " ", "\n".join(lines))
    assert "LEARNING_RATE 0.0001" in text and "LEARNING_RATE 0.01" in text
    assert "['q_proj', 'v_proj']" in text


def test_a_resumed_run_is_marked_since_its_minutes_are_not_all(put, compare, tmp_path):
    put("a/run.json", train_seconds=60)
    put("b/run.json", (2.5,) * 4, train_seconds=60, resumed_from="b/checkpoints/checkpoint-4")
    lines = compare(tmp_path)
    assert [row[2] for row in rows_of(lines)] == ["1.0", "1.0+"]
    assert any(line.startswith("+: ") and "resumed" in line for line in lines)


def other_hash(record):
    record["evidence"]["eval_sha256"] = "0" * 64


def other_lines(record):
    record["evidence"]["losses"][0]["where"] = "eval.jsonl:77"


def other_tokens(record):
    record["evidence"]["losses"][0]["tokens"] += 1


def fewer_examples(record):
    record["evidence"]["losses"].pop()


@pytest.mark.parametrize("change", [other_hash, other_lines, other_tokens, fewer_examples])
def test_a_run_on_other_held_out_examples_is_left_out_and_it_is_said(
    put, compare, tmp_path, change
):
    """The newest run's examples count, though the other run looks better."""
    put("a/run.json", started=200.0)
    record = put("b/run.json", (1.0,) * 4, started=100.0)
    change(record)
    (tmp_path / "b/run.json").write_text(json.dumps(record), encoding="utf-8")
    lines = compare(tmp_path)
    assert [row[3].split("/")[-2] for row in rows_of(lines)] == ["a"]
    assert "1 run on other held-out examples is left out" in lines


def test_the_same_file_at_another_place_is_the_same(put, compare, tmp_path):
    record = put("a/run.json")
    old = record["settings"]["EVAL_FILE"]
    record["data"]["moved.jsonl"] = record["data"].pop(old)
    record["settings"]["EVAL_FILE"] = "moved.jsonl"
    for row in record["evidence"]["losses"]:
        row["where"] = row["where"].replace(old, "moved.jsonl")
    (tmp_path / "a/run.json").write_text(json.dumps(record), encoding="utf-8")
    put("b/run.json", (2.1,) * 4)
    assert len(rows_of(compare(tmp_path))) == 2


def test_a_folder_given_twice_counts_once(put, compare, tmp_path):
    put("a/run.json")
    lines = compare(tmp_path, tmp_path / "a", tmp_path / "a" / ".." / "a")
    assert [row[1] for row in rows_of(lines)] == ["best"]


FOREIGN = ["", "[]", "[1]", '"text"', "null", "{}", '{"outcome": "finished"}', '{"out', "\x00"]


def test_damaged_foreign_and_unfinished_files_are_passed_over(put, compare, tmp_path):
    put("a/run.json")
    for number, text in enumerate(FOREIGN):
        (tmp_path / f"a/run.json.foreign-{number}").write_text(text, encoding="utf-8")
    (tmp_path / "a/run.json.latin-1").write_bytes(b'{"outcome": "\xe9"}')
    (tmp_path / "a/run.json.folder").mkdir()
    (tmp_path / "a/run.json.nowhere").symlink_to("nowhere")
    for outcome in ("running", "interrupted: stopped", "failed: train"):
        put(f"a/{outcome[:3]}/run.json", (1.0,) * 4, outcome=outcome)
    record = put("a/none/run.json", (1.0,) * 4)
    for name, evidence in {"empty": {}, "list": [], "parts alone": {"parts": {}}}.items():
        text = json.dumps(record | {"evidence": evidence})
        (tmp_path / f"a/none/run.json.{name}").write_text(text, encoding="utf-8")
    (tmp_path / "a/none/run.json").unlink()
    lines = compare(tmp_path / "a")
    assert [row[3].split("/")[-2:] for row in rows_of(lines)] == [["a", "run.json"]]


@pytest.mark.parametrize(
    ("content", "said"),
    [("no folder", "there is no folder"), ("nothing", "no run in"), ("unfinished", "no run in")],
)
def test_without_a_run_to_compare_there_is_one_message_that_says_why(
    put, refusal, tmp_path, content, said
):
    if content == "unfinished":
        put("a/run.json", outcome="running")
    elif content == "nothing":
        (tmp_path / "a").mkdir()
    message = refusal(tmp_path / "a")
    assert said in message and str(tmp_path / "a") in message


NO_FILE = {"settings": {"EVAL_FILE": ""}, "evidence": {}}
NOT_MEASURED = {"settings": {"EVAL_FILE": "eval.jsonl"}, "evidence": {}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([NO_FILE], ["1 had no held-out file (EVAL_FILE)"]),
        (
            [NOT_MEASURED],
            [
                "the held-out losses of 1 were not measured",
                "all_logs.log",
                "python inspect_lora.py evidence FOLDER/final_lora",
            ],
        ),
        (
            [NO_FILE, NOT_MEASURED, NOT_MEASURED],
            ["1 had no held-out file (EVAL_FILE)", "the held-out losses of 2 were not measured"],
        ),
        ([{"settings": None, "evidence": {}}], ["the run.json of 1 is damaged"]),
        ([{"evidence": [1]}], ["the run.json of 1 is damaged, edited or of another version"]),
    ],
)
def test_the_true_reason_is_said_why_finished_runs_have_no_losses(
    put, refusal, tmp_path, changes, said
):
    for number, change in enumerate(changes):
        path = tmp_path / f"a/{number}/run.json"
        path.write_text(json.dumps(put(f"a/{number}/run.json") | change), encoding="utf-8")
    message = refusal(tmp_path / "a")
    assert str(tmp_path / "a") in message and all(text in message for text in said)
    assert message.count("held-out file") == (NO_FILE in changes)


def test_a_folder_that_does_not_exist_is_not_passed_over(put, refusal, tmp_path):
    put("a/run.json")
    message = refusal(tmp_path / "a", tmp_path / "b")
    assert re.search(r"there is no folder .*/b", message)


EDITS = {
    "a losses row is a text": lambda evidence: evidence["losses"].append("text"),
    "a row without its tokens": lambda evidence: evidence["losses"][0].pop("tokens"),
    "a row without its place": lambda evidence: evidence["losses"][0].pop("where"),
    "a row with a place that is a number": lambda evidence: evidence["losses"][0].update(where=3),
    "a row with a text as its loss": lambda evidence: evidence["losses"][0].update(adapter="low"),
    "a row with no number of tokens": lambda evidence: evidence["losses"][0].update(tokens=None),
    "the losses are an object": lambda evidence: evidence.update(losses={"where": 1}),
    "the mean is a text": lambda evidence: evidence.update(adapter="2.0"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_run_json_edited_by_hand_is_said_to_be(put, refusal, compare, tmp_path, edit):
    record = put("a/run.json")
    EDITS[edit](record["evidence"])
    (tmp_path / "a/run.json").write_text(json.dumps(record), encoding="utf-8")
    assert "the run.json of 1 is damaged, edited or of another version" in refusal(tmp_path / "a")
    put("b/run.json")  # beside a whole one it is passed over
    assert [row[3].split("/")[-2] for row in rows_of(compare(tmp_path))] == ["b"]


@pytest.mark.parametrize("key", ["started", "settings", "data", "train_seconds"])
@pytest.mark.parametrize("value", ["text", None, [1]])
def test_an_entry_edited_by_hand_is_said_to_be(put, refusal, tmp_path, key, value):
    put("a/run.json", **{key: value} if key != "settings" else {})
    record = json.loads((tmp_path / "a/run.json").read_text(encoding="utf-8"))
    (tmp_path / "a/run.json").write_text(json.dumps(record | {key: value}), encoding="utf-8")
    assert "the run.json of 1 is damaged, edited or of another version" in refusal(tmp_path / "a")


@pytest.mark.parametrize("part", ["data", "EVAL_FILE"])
def test_facts_of_the_data_edited_by_hand_are_no_traceback(put, refusal, tmp_path, part):
    record = put("a/run.json")
    if part == "data":
        record["data"] = dict.fromkeys(record["data"], "text")
    else:
        record["settings"]["EVAL_FILE"] = ["eval.jsonl"]
    (tmp_path / "a/run.json").write_text(json.dumps(record), encoding="utf-8")
    assert "the run.json of 1 is damaged, edited or of another version" in refusal(tmp_path / "a")


# ==== What differs in LoraConfig


def put_with_config(put, tmp_path, where, losses, **changes):
    """Write a run whose LoraConfig was edited in the file."""
    record = put(where, losses)
    record["lora_config"] |= changes
    (tmp_path / where).write_text(json.dumps(record), encoding="utf-8")


def test_what_differs_in_loraconfig_is_named_beside_the_settings(put, compare, tmp_path):
    put_with_config(put, tmp_path, "a/run.json", (2.0,) * 4, use_rslora=True, r=99)
    put_with_config(
        put, tmp_path, "b/run.json", (2.1,) * 4, rank_pattern={"up_proj": 6}, lora_alpha=99,
        target_modules=["x"], lora_dropout=0.9, base_model_name_or_path="x",
    )  # fmt: skip
    text = " ".join(" ".join(compare(tmp_path)).split())
    assert text.index("LoraConfig.use_rslora True") < text.index("LoraConfig.use_rslora False")
    assert "LoraConfig.rank_pattern {}" in text
    assert "LoraConfig.rank_pattern {'up_proj': 6}" in text
    assert {*re.findall(r"LoraConfig\.\w+", text)} == {
        "LoraConfig.use_rslora", "LoraConfig.rank_pattern",
    }  # fmt: skip


@pytest.mark.parametrize("config", [None, "text", [1]])
def test_a_run_before_there_was_a_loraconfig_is_compared_all_the_same(
    put, compare, tmp_path, config
):
    put("a/run.json")
    record = put("b/run.json", (2.1,) * 4, lora_config=config)
    if config is None:
        del record["lora_config"]
    (tmp_path / "b/run.json").write_text(json.dumps(record), encoding="utf-8")
    assert len(rows_of(compare(tmp_path))) == 2


def test_the_difference_is_that_of_the_examples_not_of_the_means(put, compare, tmp_path):
    """On random losses: the printed error is numpy's, and far below the unpaired one."""
    draw = random.Random(3)
    a = [draw.uniform(1, 4) for _ in range(4)]
    b = [loss + draw.uniform(0.01, 0.05) for loss in a]
    put("a/run.json", a)
    put("b/run.json", b)
    (_, (_, difference, _, _)) = rows_of(compare(tmp_path))
    value, error = map(float, re.findall(r"\d+\.\d+", difference))
    tokens = np.array([10, 20, 30, 40])
    change = (np.array(b) - a) * tokens
    assert value == pytest.approx(change.sum() / tokens.sum(), abs=6e-5)
    assert error == pytest.approx(standard_error(change, tokens), abs=6e-5)
    assert error < standard_error(np.array(a) * tokens, tokens) / 10


# ==== A run's own end: the verdict, and the runs in its folder


@pytest.fixture
def run_with_losses(flags, monkeypatch, capsys):
    """Return a function that runs the job with these held-out losses: base, then each epoch."""

    def run(*losses, more=()):
        left = list(losses)

        def example_losses(model, examples, tokens_at_once, title):
            loss = left.pop(0) if len(left) > 1 else left[0]
            return [loss * len(example.reply_ids) for example in examples]

        monkeypatch.setattr(t, "example_losses", example_losses)
        capsys.readouterr()
        epochs = ["--num_epochs", str(len(losses) - 1), "--num_samples", "0"]
        t.main([*flags, *epochs, *more])
        return capsys.readouterr().out

    return run


def test_a_verdict_names_the_epoch_that_was_better_and_the_flag(run_with_losses, tmp_path, tiny):
    text = "\n".join(section(run_with_losses(3.0, 2.0, 2.5), "done"))
    assert "3.0000 -> 2.5000" in text and "fell by 0.5000" in text
    assert "after epoch 1 (2.0000)" in text and "--publish best" in text
    (best,) = re.findall(r"\S+/checkpoint-\d+", text)
    assert best == f"{tmp_path}/output/checkpoints/checkpoint-4"
    base = AutoModelForCausalLM.from_pretrained(tiny)
    assert peft.PeftModel.from_pretrained(base, best).peft_config["default"].r == 8


def test_with_the_flag_the_better_epoch_is_the_verdicts(run_with_losses):
    text = "\n".join(section(run_with_losses(3.0, 2.0, 2.5, more=["--publish", "best"]), "done"))
    assert "epoch 1 of 2" in text and "3.0000 -> 2.0000" in text
    assert "--publish" not in text and "lowest" not in text


def test_where_the_last_epoch_is_best_no_other_is_named(run_with_losses):
    text = "\n".join(section(run_with_losses(3.0, 2.5, 2.0), "done"))
    assert "3.0000 -> 2.0000" in text and "--publish" not in text


def test_a_loss_that_rose_is_said_not_to_have_fallen(run_with_losses):
    text = "\n".join(section(run_with_losses(2.0, 2.5), "done"))
    assert "NOT" in text and "2.0000 -> 2.5000" in text


def test_a_second_run_into_a_folder_is_compared_with_the_first(run_with_losses, tmp_path):
    first = run_with_losses(3.0, 2.0)
    assert not re.search("^runs ", first, re.MULTILINE)
    lines = section(run_with_losses(3.0, 2.25, more=["--lora_alpha", "4"]), "runs")
    (aside,) = (tmp_path / "output").glob("run.json.2*")
    found = [(loss, path.rpartition("/")[2]) for loss, _, _, path in rows_of(lines)]
    assert found == [("2.0000", aside.name), ("2.2500", "run.json")]
    text = "\n".join(lines)
    assert text.index("LORA_ALPHA 16") < text.index("LORA_ALPHA 4")


def test_a_finished_run_that_is_not_measured_yet_is_told_to_be_so(put, refusal, tmp_path):
    record = put("a/run.json")
    del record["evidence"]
    (tmp_path / "a" / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert "the held-out losses of 1 were not measured" in refusal(tmp_path / "a")
