"""inspect_lora.py compare: which run or adapter is better by more than the error?

And a run's own verdict.
"""

import json
import math
import random
import re
import shutil
import types

import numpy as np
import peft
import pytest
import torch
from conftest import TINY
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
        return section(out, "adapters" if re.search("^adapters ", out, re.MULTILINE) else "runs")

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
    row = re.compile(r" *(\d+\.\d{4})  (best|\S+ ± \S+(?: =)?) +(\d+\.\d\+?|-)  (\S+)")
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


# ==== Adapters of other trainers, measured by `evidence`


CONFIGS = {
    "small": {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj", "up_proj"]},
    "large": {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj", "o_proj"]},
}


def make_adapter(folder, seed, **config):
    """Save an adapter with random A and B, made by PEFT alone."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    adapted.save_pretrained(folder)


def measure(adapter, eval_file, folder, *more):
    """Measure an adapter by the command; return what was found."""
    words = ["evidence", adapter, "--eval_file", eval_file, "--output_dir", folder]
    words += ["--device", "cpu", "--dtype", "float32", "--evidence_examples", "0"]
    words += ["--num_samples", "0", "--general_file", ""]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda _, path: path.write_bytes(b""))
        inspect_lora.main([str(word) for word in [*words, *more]])
    return read(folder / "evidence.json")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def change(path, **entries):
    """Change entries of a JSON file."""
    path.write_text(json.dumps(read(path) | entries), encoding="utf-8")


def change_evidence(path, **entries):
    """Change entries of what was measured."""
    change(path, evidence=read(path)["evidence"] | entries)


def shift_base(path, by):
    """Add to the base model's loss on one example."""
    found = read(path)
    found["evidence"]["losses"][1]["base"] += by
    path.write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="module")
def measured(finished, tmp_path_factory):
    """Return a folder with two measured adapters of PEFT alone, on the finished run's lines."""
    folder = tmp_path_factory.mktemp("measured")
    eval_file = finished.parent / "eval.jsonl"
    for seed, (name, config) in enumerate(CONFIGS.items()):
        make_adapter(folder / "adapters" / name, seed, **config)
        measure(folder / "adapters" / name, eval_file, folder / "inspected" / name)
    return types.SimpleNamespace(
        adapters=folder / "adapters", inspected=folder / "inspected", eval_file=eval_file
    )


@pytest.fixture
def inspected(measured, tmp_path):
    """Return a copy of what was found, which a test may change."""
    return shutil.copytree(measured.inspected, tmp_path / "inspected")


def folders_of(lines):
    """Return the folder's name of each row of the table."""
    return [path.split("/")[-2] for _, _, _, path in rows_of(lines)]


def sums_by_line(found, kind):
    """Return the summed losses of each held-out line, or its tokens; "where" ends in its number."""
    sums = {}
    for row in found["evidence"]["losses"]:
        number = row["tokens"] * (1 if kind == "tokens" else row[kind])
        sums[row["where"]] = sums.get(row["where"], 0) + number
    return np.array(list(sums.values()))


def test_measured_adapters_are_ranked_with_the_paired_difference_computed_by_hand(
    measured, compare
):
    before = listing(measured.inspected)
    rows = rows_of(compare(measured.inspected))
    assert listing(measured.inspected) == before
    found = {name: read(measured.inspected / name / "evidence.json") for name in CONFIGS}
    best, other = sorted(found, key=lambda name: found[name]["evidence"]["adapter"])
    tokens = sums_by_line(found[best], "tokens")
    changes = sums_by_line(found[other], "adapter") - sums_by_line(found[best], "adapter")
    value, error = changes.sum() / tokens.sum(), standard_error(changes, tokens)
    mark = " =" if abs(value) <= 2 * error else ""
    assert value > 0.001 and len(tokens) == 4
    assert [row[:3] for row in rows] == [
        (f"{found[best]['evidence']['adapter']:.4f}", "best", "-"),
        (f"{found[other]['evidence']['adapter']:.4f}", f"{value:+.4f} ± {error:.4f}{mark}", "-"),
    ]
    assert [row[3].split("/")[-2:] for row in rows] == [
        [best, "evidence.json"], [other, "evidence.json"],
    ]  # fmt: skip


def test_what_differs_between_measured_adapters_is_their_loraconfig(measured, compare):
    """The order of the targets is none: PEFT writes a set."""
    lines = compare(measured.inspected)
    assert "adapter, and what differs" in lines[0]
    text = " ".join(" ".join(lines).split())
    for name, config in CONFIGS.items():
        row = text.partition(f"{name}/evidence.json")[2].partition("evidence.json")[0]
        assert f"LORA_R {config['r']}, LORA_ALPHA {config['lora_alpha']}" in row
        assert re.search(rf"adapter \S*adapters/{name}\b", row)
    assert {*re.findall(r"\b[A-Z]+_[A-Z_]+\b", text)} == {"LORA_R", "LORA_ALPHA"}
    assert "LoraConfig." not in text


def test_what_is_no_part_of_a_trained_adapter_does_not_differ(inspected, compare):
    """Each PEFT writes its version, and Unsloth a mark of its own; 0 and 0.0 are one dropout."""
    path = inspected / "small" / "evidence.json"
    config = read(path)["adapter_config"]
    config |= {"peft_version": "0.1", "auto_mapping": {"unsloth_fixed": True}, "lora_dropout": 0}
    config |= {"inference_mode": False, "base_model_name_or_path": "elsewhere", "use_rslora": True}
    del config["exclude_modules"]
    change(path, adapter_config=config)
    text = " ".join(" ".join(compare(inspected)).split())
    assert "LoraConfig.use_rslora True" in text and "LoraConfig.use_rslora False" in text
    assert {*re.findall(r"(?:LoraConfig\.|LORA_)\w+", text)} == {
        "LoraConfig.use_rslora", "LORA_R", "LORA_ALPHA",
    }  # fmt: skip


def test_evidence_writes_the_adapters_config_as_it_is(measured):
    for name in CONFIGS:
        found = read(measured.inspected / name / "evidence.json")
        assert found["adapter_config"] == read(measured.adapters / name / "adapter_config.json")
        assert found["base"] == TINY and found["adapter"] == str(measured.adapters / name)


@pytest.mark.parametrize("config", [None, "text", {"r": None, "target_modules": [1, "a"]}])
def test_a_measurement_without_a_config_is_compared_all_the_same(inspected, compare, config):
    change(inspected / "small" / "evidence.json", adapter_config=config)
    assert len(rows_of(compare(inspected))) == 2


def test_a_measurement_by_an_earlier_version_has_no_config(inspected, compare):
    path = inspected / "small" / "evidence.json"
    found = read(path)
    del found["adapter_config"]
    path.write_text(json.dumps(found), encoding="utf-8")
    lines = compare(inspected)
    assert len(rows_of(lines)) == 2 and "LORA_R" not in "\n".join(lines)


def test_change_elsewhere_and_right_answers_are_beside_an_adapter(inspected, compare):
    shift = {"no system message": {"x 1": {"kl": {"value": 0.123, "error": 0.01}}}}
    change(
        inspected / "small" / "evidence.json", elsewhere=shift, answers={"adapter": 7, "tasks": 9}
    )
    text = " ".join(" ".join(compare(inspected)).split())
    assert "KL elsewhere 0.1230 ± 0.0100" in text and "7 of 9 answers right" in text


def test_an_adapter_on_another_base_model_is_not_ranked_and_it_is_said(
    measured, inspected, compare, untied
):
    measure(measured.adapters / "small", measured.eval_file, inspected / "other", "--base", untied)
    change(inspected / "other" / "evidence.json", measured="2000-01-01 00:00:00")
    lines = compare(inspected)
    assert sorted(folders_of(lines)) == ["large", "small"]
    text = " ".join(" ".join(lines).split())
    base = [
        [row["base"] for row in read(inspected / name / "evidence.json")["evidence"]["losses"]]
        for name in ("other", "small")
    ]
    gap = np.abs(np.subtract(*base)).max()
    assert f"1 adapter is left out, since the base model there ({untied}) has other losses" in text
    assert f"by up to {gap:.4f} on an example" in text and TINY in text
    assert "the same --base and --dtype" in text


def test_the_newest_measurement_says_which_base_model_counts(inspected, compare):
    shift_base(inspected / "small" / "evidence.json", 0.5)
    for newest, oldest in (("small", "large"), ("large", "small")):
        change(inspected / newest / "evidence.json", measured="2026-02-01 10:00:00")
        change(inspected / oldest / "evidence.json", measured="2026-01-31 23:00:00")
        lines = compare(inspected)
        assert folders_of(lines) == [newest]
        assert "by up to 0.5000" in " ".join(" ".join(lines).split())


@pytest.mark.parametrize(("by", "compared"), [(0.0009, 2), (0.0011, 1), (-0.0011, 1)])
def test_base_losses_may_differ_by_a_thousandth(inspected, compare, by, compared):
    shift_base(inspected / "small" / "evidence.json", by)
    assert len(rows_of(compare(inspected))) == compared


@pytest.mark.parametrize("settings", [{"MODEL_NAME": "another/model"}, {"DTYPE": "bfloat16"}])
def test_a_run_on_another_base_model_is_left_out_too(put, compare, tmp_path, settings):
    """Under another name it may be the same model: its losses tell."""
    name = put("a/run.json", started=200.0)["settings"]["MODEL_NAME"]
    put("b/run.json", (1.0,) * 4, started=100.0, settings=settings)
    assert len(rows_of(compare(tmp_path))) == 2
    shift_base(tmp_path / "b/run.json", 0.1)
    lines = compare(tmp_path)
    assert folders_of(lines) == ["a"]
    text = " ".join(" ".join(lines).split())
    name = settings.get("MODEL_NAME", name)
    assert f"1 run is left out, since the base model there ({name}) has other losses" in text


def test_runs_that_record_one_base_model_may_round_its_losses_differently(put, compare, tmp_path):
    """In bfloat16 they depend on the batch, which each run chooses by the memory it finds."""
    put("a/run.json")
    put("b/run.json", (2.1,) * 4)
    shift_base(tmp_path / "b/run.json", 0.02)
    lines = compare(tmp_path)
    assert len(rows_of(lines)) == 2 and "left out" not in "\n".join(lines)


def test_an_adapter_on_another_held_out_file_is_left_out(measured, inspected, compare, tmp_path):
    """The same file under another name is the same."""
    lines = measured.eval_file.read_text(encoding="utf-8").splitlines(keepends=True)
    for name, some in (("copied", lines), ("other", lines[:3])):
        (tmp_path / f"{name}.jsonl").write_text("".join(some), encoding="utf-8")
        measure(measured.adapters / "small", tmp_path / f"{name}.jsonl", inspected / name)
    change(inspected / "other" / "evidence.json", measured="2000-01-01 00:00:00")
    lines = compare(inspected)
    assert sorted(folders_of(lines)) == ["copied", "large", "small"]
    assert "1 adapter on other held-out examples is left out" in lines


def test_what_was_measured_before_is_listed_as_a_renamed_run_is(measured, inspected, compare):
    measure(measured.adapters / "small", measured.eval_file, inspected / "small")
    rows = rows_of(compare(inspected))
    names = [path.split("/")[-1] for _, _, _, path in rows]
    assert len(rows) == 3 and sum(name.startswith("evidence.json.2") for name in names) == 1
    assert not [path for path in inspected.rglob("evidence.json*") if path.suffix == ".new"]


DAMAGED = {
    "half a file": lambda path: path.write_text(path.read_text("utf-8")[:-9], "utf-8"),
    "a list": lambda path: path.write_text("[1]", "utf-8"),
    "of another program": lambda path: path.write_text("{}", "utf-8"),
    "no date": lambda path: change(path, measured="yesterday"),
    "a number for the date": lambda path: change(path, measured=3),
    "no name": lambda path: change(path, adapter=None),
    "no base": lambda path: change(path, base=3),
    "a list as the evidence": lambda path: change(path, evidence=[1]),
    "no base losses": lambda path: path.write_text(
        path.read_text("utf-8").replace('"base": ', '"b": ').replace('"b": "', '"base": "'), "utf-8"
    ),
    "losses that are no numbers": lambda path: change_evidence(path, losses=[{"where": "a:1"}]),
    "a mean that is no number": lambda path: change_evidence(path, adapter="nan"),
    "no lines": lambda path: change_evidence(path, losses=[]),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_measurement_is_left_out_and_it_is_said(inspected, compare, refusal, damage):
    said = "the evidence.json of 1 is damaged, edited or of another version"
    DAMAGED[damage](inspected / "small" / "evidence.json")
    lines = compare(inspected)
    assert folders_of(lines) == ["large"] and said in " ".join(" ".join(lines).split())
    message = refusal(inspected / "small")
    assert said in message and str(inspected / "small") in message


def test_an_adapter_whose_measuring_was_stopped_is_told_to_be_measured(inspected, compare, refusal):
    path = inspected / "small" / "evidence.json"
    found = read(path)
    del found["evidence"]
    path.write_text(json.dumps(found), encoding="utf-8")
    for text in (" ".join(" ".join(compare(inspected)).split()), refusal(inspected / "small")):
        assert "the held-out losses of 1 adapter were not measured" in text
        assert "python inspect_lora.py evidence ADAPTER measures them" in text


def test_files_with_a_name_that_only_begins_alike_are_not_read(inspected, compare):
    for name in ("evidence.jsonl", "evidence.json5", "my-evidence.json"):
        (inspected / "small" / name).write_text("{}\n", encoding="utf-8")
    assert "damaged" not in "\n".join(compare(inspected))


def test_damaged_files_of_both_kinds_are_told_apart(put, inspected, refusal, tmp_path):
    record = put("inspected/run.json")
    (inspected / "run.json").write_text(json.dumps(record | {"evidence": [1]}), encoding="utf-8")
    for name in CONFIGS:
        (inspected / name / "evidence.json").write_text("{", encoding="utf-8")
    message = refusal(tmp_path)
    assert "no finished run or measured adapter" in message
    assert "the run.json of 1 is damaged" in message
    assert "the evidence.json of 2 is damaged" in message


def test_runs_and_measured_adapters_are_in_one_table(measured, finished, compare):
    """The run's base losses were measured by the run itself, the adapters' by the command."""
    lines = compare(finished, measured.inspected)
    rows = rows_of(lines)
    assert len(rows) == 3 and rows[0][1] == "best"
    assert "run or adapter, and what differs" in lines[0] and "left out" not in "\n".join(lines)
    minutes = {path.split("/")[-1]: minutes for _, _, minutes, path in rows}
    assert minutes["evidence.json"] == "-" and re.fullmatch(r"\d+\.\d", minutes["run.json"])
    text = " ".join(" ".join(lines).split())
    run = text.partition("run.json")[2].partition("evidence.json")[0]
    assert "LORA_R 8" in run and "LORA_R 2" in text and "LORA_R 4" in text
    assert "LEARNING_RATE" not in text  # is not known of an adapter of another trainer
    assert max(map(len, lines)) <= 100


def test_what_only_runs_record_is_shown_beside_the_runs_alone(put, compare, inspected, tmp_path):
    evidence = read(inspected / "large" / "evidence.json")["evidence"]
    for rate in (0.25, 0.5):
        record = put(f"{rate}/run.json", settings={"LEARNING_RATE": rate})
        change(tmp_path / f"{rate}/run.json", **record | {"evidence": evidence})
    lines = compare(tmp_path)
    text = " ".join(" ".join(lines).split())
    assert len(rows_of(lines)) == 4 and "None" not in text
    assert sorted(re.findall(r"LEARNING_RATE ([\d.]+)", text)) == ["0.25", "0.5"]


def test_a_run_with_the_same_targets_in_another_order_does_not_differ_in_them(
    put, compare, inspected, tmp_path
):
    run = json.loads((inspected / "large" / "evidence.json").read_text(encoding="utf-8"))
    targets = {"LORA_TARGET_MODULES": ["up_proj", "o_proj"], "LORA_DROPOUT": 0.0}
    record = put("a/run.json", settings=targets)
    record["evidence"] = run["evidence"]
    (tmp_path / "a/run.json").write_text(json.dumps(record), encoding="utf-8")
    text = "\n".join(compare(tmp_path))
    assert len(rows_of(text.splitlines())) == 3
    assert "LORA_R" in text and "LORA_TARGET" not in text and "LORA_DROPOUT" not in text


def test_one_run_and_one_adapter_left_out_are_counted_apart(put, compare, inspected, tmp_path):
    path = inspected / "small" / "evidence.json"
    change(path, measured="2000-01-01 00:00:00")
    change_evidence(path, eval_sha256="0" * 64)
    put("a/run.json", started=100.0)
    lines = compare(tmp_path)
    assert folders_of(lines) == ["large"]
    assert "1 run and 1 adapter on other held-out examples are left out" in lines


def test_the_table_at_a_runs_end_is_of_runs_alone(put, inspected, tmp_path, capsys):
    """Another base model leaves no run out of it, either."""
    put("run.json", settings={"LORA_R": 4})
    capsys.readouterr()
    inspect_lora.compare_with_others(tmp_path)
    assert capsys.readouterr().out == ""
    record = put("deeper/run.json", (2.1,) * 4)
    shift_base(tmp_path / "deeper/run.json", 0.5)
    change(tmp_path / "deeper/run.json", settings=record["settings"] | {"DTYPE": "bfloat16"})
    inspect_lora.compare_with_others(tmp_path)
    lines = section(capsys.readouterr().out, "runs")
    assert len(rows_of(lines)) == 2 and lines[0].endswith("run, and what differs")
    assert "adapter" not in "\n".join(lines) and "left out" not in "\n".join(lines)
    shutil.rmtree(inspected)
    inspect_lora.compare_with_others(tmp_path)
    assert section(capsys.readouterr().out, "runs") == lines


def test_without_anything_to_compare_it_is_said_where_results_come_from(refusal, tmp_path):
    message = refusal(tmp_path)
    assert f"no run in {tmp_path} has finished" in message and "evidence.json" in message


def test_the_help_says_that_measured_adapters_are_compared(capsys):
    for words, said in ((["compare", "--help"], "output/inspected"), (["--help"], "evidence")):
        with pytest.raises(SystemExit):
            inspect_lora.main(words)
        assert said in capsys.readouterr().out.partition("compare")[2]


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
