"""`evidence`: what its record holds, when it is written, and where."""

import copy
import dataclasses
import itertools
import shutil
import signal
from pathlib import Path

import peft
import pytest
import records
import runs
import toys
from by_hand import ROUNDING, losses_of_peft, read_conversations, reply_loss, token_loss
from records import SHORT, TASKS, evidence, line_numbers, mean_losses, planned
from runs import SYSTEM, command, files, read_json, refused, talk, write_lines
from toys import TENSORS, base_model, change_tensors

from inspect_lora import measures, model, plan
from inspect_lora.__main__ import main
from inspect_lora.model import load_weights
from inspect_lora.record import read_record
from train_lora.files import file_sha256
from train_lora.losses import losses_of_replies


@pytest.fixture
def found(record):
    return read_json(record / "evidence.json")


def test_it_has_every_measurement_of_every_line(found, record):
    assert found["finished"] and found["system"] == SYSTEM and found["config"]["r"] == 4
    numbers = line_numbers(found["lines"])
    assert numbers == [*range(1, 6), *range(5, 23)]  # the fifth line has two replies
    assert (found["learned"], found["too_long"], found["refused"]) == (1, 1, 0)
    assert {one["kind"] for one in found["lines"]} == set(records.KINDS)
    assert len({*found["part_lines"]} & {*range(23)}) == 6
    assert {part["family"] for part in found["parts"]} == {"strength", "removed", "alone", "cut"}
    assert [one["strength"] for one in found["shifts"]] == [0.5, 0.75, 1.0, 1.5]
    assert len(found["tasks"]) == len(TASKS) == len(found["shifts"][0]["kl"])
    sources = [one["source"] for one in found["exchanges"]]
    assert sources == ["held_out"] * 22 + ["tasks"] * 3  # one for each conversation
    assert len(found["probes"]) == 12 and found["max_new_tokens"] == records.NEW_TOKENS
    assert found["seconds"].keys() == {"losses", "parts", "elsewhere", "replies"}
    for name in ("eval_file", "rules", "general_file"):
        file = found["conditions"][name]
        assert file_sha256(record / "inputs" / file["file"].rpartition("/")[2]) == file["sha256"]


def test_copies_and_replies_of_one_conversation_count_as_one(found):
    """A copy with other spaces, and the two replies of the fifth line."""
    clusters = [one["cluster"].rpartition(":")[2] for one in found["lines"]]
    copy = next(n for n, one in enumerate(found["lines"]) if one["where"].endswith(":22"))
    expected = [str(number) for number in line_numbers(found["lines"])]
    expected[copy] = "1"
    assert records.COPIED == 500 and clusters == expected
    assert len({one["id"] for one in found["lines"]}) == len(found["lines"])


def test_the_losses_are_those_of_peft_alone(found, record):
    folder, path = record / "inputs" / "adapter", record / "inputs" / "held_out.jsonl"
    conversations = read_conversations(path)
    del conversations[-2:]  # the line that was learned, and the one that is too long
    expected = losses_of_peft(folder, conversations)
    assert mean_losses(found) == [pytest.approx(one, abs=ROUNDING) for one in expected]
    assert sum(expected[0]) - sum(expected[1]) > 1  # the adapter learned something


def test_probes_are_the_adapters_own_replies_with_their_losses(found, record, tokenizer):
    """So that a server can be asked for them without a tokenizer or held-out replies."""
    said = {one["where"]: one["adapter"] for one in found["exchanges"]}
    network = copy.deepcopy(base_model())
    network = peft.PeftModel.from_pretrained(network, record / "inputs" / "adapter").eval()
    for probe in found["probes"]:
        text = tokenizer.decode(probe["reply_ids"], skip_special_tokens=True).strip()
        reply, count = said[probe["where"]], len(probe["reply_ids"])
        assert (text, count) == (reply["text"], reply["tokens"])
        assert probe["messages"][-1]["role"] == "user"
        example = runs.made_up(probe["prompt_ids"], probe["reply_ids"])
        near = ROUNDING * count
        assert probe["adapter"] == pytest.approx(count * token_loss(network, [example]), abs=near)
        with network.disable_adapter():
            assert probe["base"] == pytest.approx(count * token_loss(network, [example]), abs=near)


def test_thoughts_are_part_of_the_replies_where_thinking_is_on(capfd, plain, tmp_path, tokenizer):
    reply = "<think>\nThey want tea.\n</think>\n\nTea, then?"
    messages = [{"role": "user", "content": "rain"}, {"role": "assistant", "content": reply}]
    path = write_lines(tmp_path / "own.jsonl", [{"messages": messages}])
    words = ["--eval_file", path, "--general_file", "", "--parts", "0", "--enable_thinking"]
    found, _ = evidence(capfd, plain, tmp_path / "results", *words, "--max_new_tokens", "3")
    expected = reply_loss(base_model(), tokenizer, messages, thinks=True)
    assert mean_losses(found)[0] == pytest.approx([expected], abs=ROUNDING)
    assert found["conditions"]["enable_thinking"] is True
    (probe,) = found["probes"]
    assert tokenizer.decode(probe["prompt_ids"]).endswith("assistant\n<think>\n")


def test_both_reply_to_each_prompt_alone(capfd, plain, tmp_path):
    """There is no loss; KL, rules and the tokens for a server there are."""
    bob = [{"role": "system", "content": "You are Bob."}, {"role": "user", "content": "rain"}]
    rows = [
        {"prompt": "rain", "kind": "plain"},
        {"prompt": bob, "checks": {"is tea": {"any": ["tea"]}}},
        {"prompt": "rain"},  # again
        {"prompt": "learned"},
    ]  # fmt: skip
    records.say_origin(plain, [[{"role": "user", "content": "learned"}]], system_message=SYSTEM)
    words = ["--prompts", write_lines(tmp_path / "prompts.jsonl", rows), "--max_new_tokens", "3"]
    words += ["--general_file", write_lines(tmp_path / "tasks.jsonl", TASKS)]
    found, _ = evidence(capfd, plain, tmp_path / "results", *words)
    asked = [one for one in found["exchanges"] if one["source"] == "prompts"]
    assert line_numbers(asked) == [1, 2] and found["learned"] == 1
    assert [one["messages"][0]["content"] for one in asked] == [SYSTEM, "You are Bob."]
    assert asked[1]["adapter"]["passes"].keys() == {"is tea"} and asked[0]["reference"] is None
    assert found["lines"] == found["parts"] == [] and len(found["shifts"]) == 4
    assert len(found["probes"]) == 2 and found["finished"]
    assert all(one["base"] != one["adapter"] for one in found["probes"])  # as `served` needs


def test_tasks_that_the_template_refuses_are_counted(plain, tmp_path, tokenizer):
    """Gemma 2's takes no system message."""
    own = copy.deepcopy(tokenizer)
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    own.chat_template = refuses + own.chat_template
    own.save_pretrained(plain)
    tasks = write_lines(tmp_path / "tasks.jsonl", [*TASKS, {"prompt": "hi<|im_end|>"}])
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "rain"}])
    plan = planned(plain, "--prompts", prompts, "--general_file", tasks)
    assert plan.facts["refused"] == 2
    assert [task.prompt.where.rpartition(":")[2] for task in plan.tasks] == ["1", "3"]


STOPPED = [  # in which step, by which signal, and what was measured
    ("parts_of", signal.SIGINT, ["losses"]),
    ("drawn_from_base", signal.SIGUSR1, ["losses", "parts"]),
    ("probes", signal.SIGTERM, ["losses", "parts", "elsewhere"]),
]


@pytest.mark.parametrize(("step", "number", "measured"), STOPPED)
def test_a_signal_leaves_the_report_of_what_was_measured(
    capfd, plain, three_lines, tmp_path, monkeypatch, step, number, measured
):
    monkeypatch.setattr(measures, step, runs.send(number))
    tasks = write_lines(tmp_path / "tasks.jsonl", TASKS)
    words = ["--eval_file", three_lines, "--general_file", tasks, "--parts", "2", "--tasks", "2"]
    words += ["--max_new_tokens", "1", "--device", "cpu", "--output_dir", tmp_path / "new"]
    assert command(capfd, ["evidence", plain, *words], main).status == 128 + number
    found = read_json(tmp_path / "new" / "evidence.json")
    assert list(found["seconds"]) == measured and not found["finished"]
    assert len(found["lines"]) == 3 and bool(found["shifts"]) is ("elsewhere" in measured)
    assert (tmp_path / "new" / "report.md").is_file()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


NUMBERS = ("lines", "pairs", "parts", "shifts", "exchanges", "probes", "part_lines")


def test_several_adapters_share_a_base_and_have_the_numbers_that_each_has_alone(
    capfd, adapters, tmp_path, monkeypatch
):
    """The first one trains a module whole, and PEFT leaves it there: so the base is loaded anew."""
    tasks = write_lines(tmp_path / "tasks.jsonl", TASKS[:1])
    rows = [{"messages": talk(n), "rejected": "Nowhere."} for n in range(3)]
    words = ["--eval_file", write_lines(tmp_path / "own.jsonl", rows), "--general_file", tasks]
    words += ["--parts", 1, "--max_new_tokens", 2, "--device", "cpu"]
    names = ("whole", "plain", "rslora")
    folders = [shutil.copytree(adapters[name], tmp_path / name) for name in names]
    loads, scored = [], []
    load, losses = load_weights, losses_of_replies
    runs.replace_ours(monkeypatch, "load_weights", lambda *given: loads.append(1) or load(*given))
    runs.replace_ours(
        monkeypatch,
        "losses_of_replies",
        lambda *given: scored.append(len(given[1])) or losses(*given),
    )
    monkeypatch.setattr(measures, "TASK_TOKENS", 8)
    monkeypatch.chdir(tmp_path)
    records.done(capfd, "evidence", *folders, *words)
    assert len(loads) == 2 and (tmp_path / "compared" / "replies.html").is_file()
    assert scored.count(0) >= 4  # of the base's lines and bad replies, by the two that come later
    for folder in folders[1:]:
        found = read_json(tmp_path / "inspected" / folder.name / "evidence.json")
        alone, _ = evidence(capfd, folder, tmp_path / f"{folder.name} alone", *words)
        assert alone["request"] == found["request"] and alone["pairs"]
        assert [flat(alone[name]) for name in NUMBERS] == [flat(found[name]) for name in NUMBERS]


def doubled(tensors):
    return {name: 2 * one for name, one in tensors.items()}


def flat(value):
    """Return all numbers and texts within a value, the numbers to be compared nearly."""
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        return [each for inner in value for each in flat(inner)]
    return [pytest.approx(value, abs=1e-5) if isinstance(value, float) else value]


def test_what_is_finished_is_not_measured_again(capfd, plain, three_lines, tmp_path, monkeypatch):
    opened, real, results = [], model.open_adapter, tmp_path / "results"
    monkeypatch.setattr(model, "open_adapter", lambda *given: opened.append(1) or real(*given))
    words, counts = ["--eval_file", three_lines, *SHORT], []
    for flags in ([], [], ["--again"]):
        evidence(capfd, plain, results, *words, *flags)
        counts.append(len(opened))
    toys.edit_json(results / "evidence.json", lambda own: own.update(finished=False))
    assert evidence(capfd, plain, results, *words)[0]["finished"]
    assert [*counts, len(opened)] == [1, 1, 2, 3]


def test_several_adapters_do_not_share_a_folder(capfd, plain, tmp_path):
    refused(capfd, ["evidence", plain, tmp_path / "b", "--output_dir", "x"], main=main)


OTHER_REQUESTS = {  # what is changed in the base, in the adapter or in the file, or flags
    "the adapter's template": lambda base, adapter, lines: give_template(adapter),
    "the adapter's tensors": lambda base, adapter, lines: change_tensors(adapter, doubled),
    "the base's template": lambda base, adapter, lines: edit_template(base),
    "the base's configuration": lambda base, adapter, lines: toys.edit_json(
        base / "config.json", lambda config: config.update(of_no_use=1)
    ),
    "the base's weights": lambda base, adapter, lines: change_weights(base),
    "the held-out lines": lambda base, adapter, lines: records.write_talks_with(lines, 1, 3),
    "a template for both": lambda base, adapter, lines: ["--chat_template", "one_pass"],
    "another flag": lambda base, adapter, lines: ["--tasks", "2"],
    "nothing": lambda base, adapter, lines: [],
}


def give_template(folder):
    """Give an adapter's folder a tokenizer of its own, with another template."""
    toys.tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{# mine #}" + toys.tokenizer().chat_template)


def edit_template(base):
    (base / "chat_template.jinja").write_text("{# another #}" + toys.tokenizer().chat_template)


def change_weights(base):
    tensors = toys.load_file(base / toys.WEIGHTS)
    name = "model.language_model.embed_tokens.weight"
    toys.save_file(tensors | {name: 2 * tensors[name]}, base / toys.WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "has_own"),
    [*itertools.product(OTHER_REQUESTS, [False]), ("the base's template", True)],
)
def test_what_decides_a_number_makes_another_request(plain, tmp_path, change, has_own):
    """The content of templates counts, also of the base's own, by which it is served."""
    base = shutil.copytree(toys.TOY, tmp_path / "base")
    toys.change_config(plain, base_model_name_or_path=str(base))
    if has_own:
        give_template(plain)
    lines = tmp_path / "own.jsonl"
    words = ["--eval_file", records.write_talks_with(lines, 1, 2), *SHORT]
    before = planned(plain, *words)
    flags = OTHER_REQUESTS[change](base, plain, lines)
    after = planned(plain, *words, *(flags if isinstance(flags, list) else []))
    assert (before.request_hash == after.request_hash) == (change == "nothing")


def test_a_record_that_is_read_again_is_the_same(capfd, plain, tmp_path):
    """Each field, with entries of the kinds that they had when they were measured."""
    give_template(plain)
    rows = [{"messages": talk(n), "id": n, "rejected": "No.", "checks": {"a": {"any": ["tea"]}}}
            for n in (1, 2)]  # fmt: skip
    rows[0]["counterpart"] = 2
    words = ["--eval_file", write_lines(tmp_path / "own.jsonl", rows), "--max_new_tokens", 2]
    words += ["--general_file", write_lines(tmp_path / "tasks.jsonl", TASKS[:1]), "--parts", 1]
    found, _ = evidence(capfd, plain, tmp_path / "results", *words)
    again = read_record(tmp_path / "results")
    as_read = dataclasses.asdict(again)
    del as_read["folder"]
    assert as_read == found
    names = ["lines", "pairs", "couples", "parts", "shifts", "exchanges", "probes"]
    for name in names:
        assert found[name] and all(map(dataclasses.is_dataclass, getattr(again, name))), name
    for name in ("base", "adapter", "base_in_template"):
        assert dataclasses.is_dataclass(getattr(again.exchanges[0], name)), name
    is_empty = {name for name, value in found.items() if value in ([], {}, None, "")}
    assert is_empty <= {"run", "system", "learned", "trained_kinds", "couples_left_out"}


def test_pairs_have_the_likelihoods_that_peft_gives_both_replies(capfd, plain, tmp_path, tokenizer):
    """Each format, rendered as served, with the token that ends a reply; one was learned."""
    good = [*talk(2, 3)]
    rows = [
        {"prompt": talk(1)[:-1], "completion": talk(1)[-1:], "rejected": "Nowhere."},
        {"prompt": good[:-1], "chosen": good[-1:], "rejected": talk(5)[-1:], "kind": "second"},
        {"prompt": talk(3)[:-1], "completion": talk(3)[-1:]},
        {"messages": [*talk(6), *talk(7)[1:]], "rejected": "No."},
        {"prompt": talk(4)[:-1], "completion": talk(4)[-1:], "rejected": "Nowhere."},
    ]
    records.say_origin(plain, [talk(4)[:-1]])
    path = write_lines(tmp_path / "own.jsonl", rows)
    words = ["--eval_file", path, "--general_file", "", "--parts", 0, "--max_new_tokens", 1]
    found, _ = evidence(capfd, plain, tmp_path / "results", *words)
    assert line_numbers(found["lines"]) == [1, 2, 3, 4, 4]
    assert line_numbers(found["pairs"]) == [1, 2, 4] and found["learned"] == 1
    endings = [("Nowhere.", talk(1)), (talk(5)[-1]["content"], good), ("No.", rows[3]["messages"])]
    bad = [[*messages[:-1], {"role": "assistant", "content": text}] for text, messages in endings]
    expected = losses_of_peft(plain, [*(messages for _, messages in endings), *bad])
    for number, pair in enumerate(found["pairs"]):
        for side, losses in zip(("base", "adapter"), expected, strict=True):
            mean = -pair[f"{side}_good"] / pair["good_tokens"]
            assert mean == pytest.approx(losses[number], abs=ROUNDING)
            mean = -pair[f"{side}_bad"] / pair["bad_tokens"]
            assert mean == pytest.approx(losses[number + 3], abs=ROUNDING)
    assert found["pairs"][0]["bad_tokens"] == len(tokenizer("Nowhere.<|im_end|>").input_ids)
    assert [pair["kind"] for pair in found["pairs"]] == ["", "second", ""]
    assert [each["rejected"] for each in found["exchanges"]] == [
        "Nowhere.", talk(5)[-1]["content"], None, "No."
    ]  # fmt: skip


FINE = {"prompts": {"prompt": "fine"}}  # lines by the flag of their file
FINE["eval_file"] = {"prompt": talk(1)[:-1], "completion": talk(1)[-1:]}
BAD = {  # an answer, nothing asked, no prompt, a number, a misspelt rule
    "prompts": [
        {"prompt": talk(1)}, {"prompt": [{"role": "user", "content": ""}]}, {"question": "rain"},
        {"prompt": 5}, {"prompt": "fine", "checks": {"brief": {"mostwords": 3}}},
    ],
    "eval_file": [  # the good reply again, an empty one, two messages, a user's, a number
        FINE["eval_file"] | {"rejected": bad}
        for bad in (f" {talk(1)[-1]['content']}", "", talk(1)[1:], talk(1)[1:2], 5)
    ],
}  # fmt: skip
WITH_TOKEN = {"prompts": {"prompt": "rain<|im_end|>"}}
WITH_TOKEN["eval_file"] = FINE["eval_file"] | {"rejected": "No.<|im_end|>"}


@pytest.mark.parametrize("flag", FINE)
def test_bad_lines_are_refused_by_their_numbers(capfd, plain, tmp_path, flag):
    argv = ["evidence", plain, "--device", "cpu", f"--{flag}", tmp_path / "own.jsonl", *SHORT]
    write_lines(tmp_path / "own.jsonl", [FINE[flag], *BAD[flag]])
    end = refused(capfd, argv, *(f"own.jsonl:{n}" for n in range(2, 7)), main=main)
    assert "own.jsonl:1" not in end.err
    write_lines(tmp_path / "own.jsonl", [FINE[flag], WITH_TOKEN[flag]])
    refused(capfd, argv, "own.jsonl:2", "<|im_end|>", main=main)


def test_dialogues_go_through_the_model_once_where_that_is_exact(
    capfd, plain, tmp_path, monkeypatch, tokenizer
):
    """The losses are those of each reply alone."""
    own = copy.copy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (tmp_path / "own.jinja").write_text(own.chat_template, encoding="utf-8")
    messages = [*talk(1), *talk(2)[1:], *talk(3)[1:]]
    words = ["--eval_file", write_lines(tmp_path / "own.jsonl", [{"messages": messages}])]
    rows, real = [], losses_of_replies
    runs.replace_ours(
        monkeypatch, "losses_of_replies", lambda *given: rows.append(len(given[1])) or real(*given)
    )
    words += ["--chat_template", tmp_path / "own.jinja", *SHORT]
    found, _ = evidence(capfd, plain, tmp_path / "results", *words)
    assert rows[:2] == [1, 1]  # of base and adapter; the base is served by another template
    expected = [reply_loss(base_model(), own, messages[: 1 + 2 * n]) for n in (1, 2, 3)]
    assert mean_losses(found)[0] == pytest.approx(expected, abs=ROUNDING)


def test_another_adapter_of_the_same_name_leaves_the_earlier_record(capfd, plain, three_lines):
    """It is renamed, whole, and never written over."""
    words = ["evidence", plain, "--device", "cpu", "--eval_file", three_lines, *SHORT]
    records.done(capfd, *words)
    (first,) = plain.parent.glob("inspected/*")
    before = files(first)
    change_tensors(plain, doubled)
    records.done(capfd, *words)
    (renamed,) = set(plain.parent.glob("inspected/*")) - {first}
    assert files(renamed) == before
    assert read_json(first / "evidence.json")["id"] != read_json(renamed / "evidence.json")["id"]


def test_what_is_refused_leaves_the_earlier_report(capfd, plain, three_lines, tmp_path):
    """Also where it is refused late, since the losses are no numbers."""
    results = tmp_path / "results"
    evidence(capfd, plain, results, "--eval_file", three_lines, *SHORT)
    before = files(results)
    argv = ["evidence", plain, "--device", "cpu", "--output_dir", results, *SHORT]
    refused(capfd, [*argv, "--eval_file", tmp_path / "none.jsonl"], "none.jsonl", main=main)
    change_tensors(plain, lambda own: {name: 1e30 * one for name, one in own.items()})
    refused(capfd, [*argv, "--eval_file", three_lines], "--dtype", main=main)
    assert files(results) == before and not list(tmp_path.glob("results.*"))


@pytest.mark.parametrize("name", ["final_lora", "final_lora_vllm", "a checkpoint"])
def test_an_adapter_of_ours_needs_no_flags(capfd, finished, tmp_path, name):
    """Its held-out loss is the trainer's own, before the first step and after the last."""
    output = shutil.copytree(finished.output, tmp_path / "output")
    folder = output / name
    if name == "a checkpoint":
        (folder,) = output.glob("checkpoints/*/checkpoint-8")
    records.done(capfd, "evidence", folder, *SHORT)
    found = read_json(folder.parent / "inspected" / folder.name / "evidence.json")
    tokens = sum(one["tokens"] for one in found["lines"])
    history = runs.logged(runs.read_record(output)["loss_history"], "eval_loss")
    for whose, expected in (("base", history[0]), ("adapter", history[-1])):
        mean = sum(one[whose] for one in found["lines"]) / tokens
        assert mean == pytest.approx(expected, abs=1e-6)
    assert found["learned"] == 0 and found["system"] == SYSTEM
    sha256 = file_sha256(folder / TENSORS)
    assert found["run"]["adapter"]["sha256"] == sha256 or name == "final_lora_vllm"


NAMES = ["rules", "measures", "replies", "losses", "tokens", "tables", "report", "saving"]


@pytest.mark.parametrize("name", NAMES)
def test_a_report_is_finished_only_for_the_code_that_measured(name, monkeypatch):
    """A rule that is judged otherwise is measured again; what only shows a record is not."""
    before, real = plan.code_that_measures(), Path.read_bytes
    one_more = lambda path: real(path) + b"\nprint(1)\n" * (path.stem == name)  # noqa: E731
    monkeypatch.setattr(Path, "read_bytes", one_more)
    assert (plan.code_that_measures() != before) == (name in (*plan.MEASURING, *plan.ROOMS))
    assert {"rules", "measures", "replies"} <= {*plan.MEASURING} and "losses" in plan.ROOMS
