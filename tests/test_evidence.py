"""`evidence`: what its record holds, when it is written, and where."""

import copy
import shutil
import signal

import peft
import pytest
import records
import runs
from by_hand import ROUNDING, losses_of_peft, read_conversations, reply_loss, token_loss
from records import SHORT, TASKS, evidence, line_numbers, mean_losses
from runs import SYSTEM, command, files, read_json, refused, talk, write_lines
from toys import TENSORS, base_model, change_tensors

from inspect_lora import measure
from inspect_lora.__main__ import main
from inspect_lora.common import file_sha256


@pytest.fixture
def found(record):
    return read_json(record / "evidence.json")


def test_it_has_every_measurement_of_every_line(found, record):
    rows = (record / "inputs" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert found["finished"] and len(rows) == 24
    numbers = line_numbers(found["lines"])
    assert numbers == [*range(1, 6), *range(5, 23)]  # the fifth line has two replies
    assert (found["learned"], found["too_long"], found["refused"]) == (1, 1, 0)
    kinds = {one["kind"] for one in found["lines"]}
    assert kinds == set(records.KINDS) and found["system"] == SYSTEM
    assert found["run"] == {"system_message": SYSTEM} and found["config"]["r"] == 4
    assert len({*found["measured_on"]} & {*range(23)}) == 6
    assert {part["kind"] for part in found["parts"]} == {"strength", "group", "target", "cut"}
    assert [(one["strength"], one["system"]) for one in found["shifts"]] == [
        *((one, False) for one in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)), (1.0, True),
    ]  # fmt: skip
    assert len(found["tasks"]) == len(TASKS) == len(found["shifts"][0]["kl"])
    sources = [one["source"] for one in found["exchanges"]]
    assert sources == ["held_out"] * 22 + ["tasks"] * 3  # one for each conversation
    assert len(found["probes"]) == 12 and found["max_new_tokens"] == records.NEW_TOKENS
    assert found["seconds"].keys() == {"losses", "updates", "parts", "elsewhere", "replies"}
    for name in ("eval_file", "rules", "general_file"):
        file = found["on"][name]
        assert file_sha256(record / "inputs" / file["file"].rpartition("/")[2]) == file["sha256"]
    assert (found["on"]["device"], found["on"]["enable_thinking"]) == ("cpu", False)


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


def test_probes_are_the_adapters_own_replies_with_their_losses(found, record):
    """So that a server can be asked for them without a tokenizer or held-out replies."""
    said = {one["where"]: one["adapter"]["text"] for one in found["exchanges"]}
    network = copy.deepcopy(base_model())
    network = peft.PeftModel.from_pretrained(network, record / "inputs" / "adapter").eval()
    for probe in found["probes"]:
        assert probe["where"] in said and probe["messages"][-1]["role"] == "user"
        count = len(probe["reply_ids"])
        example = runs.made_up(probe["prompt_ids"], probe["reply_ids"])
        near = ROUNDING * count
        assert probe["adapter"] == pytest.approx(count * token_loss(network, [example]), abs=near)
        with network.disable_adapter():
            assert probe["base"] == pytest.approx(count * token_loss(network, [example]), abs=near)


def test_thoughts_are_part_of_the_replies_where_thinking_is_on(capfd, plain, tmp_path, tokenizer):
    reply = "<think>\nThey want tea.\n</think>\n\nTea, then?"
    messages = [{"role": "user", "content": "rain"}, {"role": "assistant", "content": reply}]
    path = write_lines(tmp_path / "own.jsonl", [{"messages": messages}])
    argv = ["evidence", plain, "--eval_file", path, *SHORT, "--output_dir", tmp_path / "results"]
    refused(capfd, argv, "own.jsonl:1", "<think>", main=main)
    words = ["--eval_file", path, "--general_file", "", "--parts", "0", "--enable_thinking"]
    found, _ = evidence(capfd, plain, tmp_path / "results", *words, "--max_new_tokens", "3")
    expected = reply_loss(base_model(), tokenizer, messages, thinks=True)
    assert mean_losses(found)[0] == pytest.approx([expected], abs=ROUNDING)
    assert found["on"]["enable_thinking"] is True
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
    assert found["lines"] == found["parts"] == [] and len(found["shifts"]) == 8
    assert len(found["probes"]) == 2 and found["updates"] and found["finished"]
    assert all(one["base"] != one["adapter"] for one in found["probes"])  # as `served` needs


def test_bad_prompts_are_refused_by_their_lines(capfd, plain, tmp_path):
    """A text alone, an answer, nothing asked, no prompt, a number, a misspelt rule, a token."""
    path, fine, token = tmp_path / "own.jsonl", {"prompt": "fine"}, {"prompt": "rain<|im_end|>"}
    empty, rule = [{"role": "user", "content": ""}], {"brief": {"mostwords": 3}}
    rows = [{"prompt": talk(1)}, {"prompt": empty}, {"question": "rain"}, {"prompt": 5}]
    argv = ["evidence", plain, "--device", "cpu", "--prompts", path, "--general_file", ""]
    write_lines(path, [fine, "hello", *rows, fine | {"checks": rule}])
    end = refused(capfd, argv, *(f"own.jsonl:{n}" for n in range(2, 8)), main=main)
    assert "own.jsonl:1" not in end.err
    write_lines(path, [fine, token])
    refused(capfd, argv, "own.jsonl:2", "<|im_end|>", main=main)


def test_tasks_that_the_template_refuses_are_counted(capfd, plain, tmp_path, tokenizer):
    """Gemma 2's takes no system message."""
    own = tokenizer.__class__.from_pretrained(tokenizer.name_or_path)
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    own.chat_template = refuses + own.chat_template
    own.save_pretrained(plain)
    tasks = write_lines(tmp_path / "tasks.jsonl", [*TASKS, {"prompt": "hi<|im_end|>"}])
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "rain"}])
    words = ["--prompts", prompts, "--general_file", tasks, "--max_new_tokens", "2"]
    found, _ = evidence(capfd, plain, tmp_path / "results", *words)
    assert found["refused"] == 2 and line_numbers(found["exchanges"]) == [1, 1, 3]


@pytest.mark.parametrize(("step", "count"), [("measure_updates", 1), ("measure_probes", 4)])
def test_ctrl_c_loses_the_running_measurement_alone(
    capfd, plain, three_lines, tmp_path, monkeypatch, step, count
):
    monkeypatch.setattr(measure, step, runs.send(signal.SIGINT))
    tasks = write_lines(tmp_path / "tasks.jsonl", TASKS)
    words = ["--eval_file", three_lines, "--general_file", tasks, "--parts", "2", "--tasks", "2"]
    argv = ["evidence", plain, "--device", "cpu", *words, "--max_new_tokens", "1"]
    assert command(capfd, [*argv, "--output_dir", tmp_path / "results"], main).status == 130
    found = read_json(tmp_path / "results" / "evidence.json")
    kept = ["losses", "updates", "parts", "elsewhere"][:count]
    assert list(found["seconds"]) == kept and not found["finished"]
    assert len(found["lines"]) == 3 and bool(found["shifts"]) is (count == 4)
    monkeypatch.undo()
    records.done(capfd, "report", tmp_path / "results")
    assert (tmp_path / "results" / "report.md").is_file()


def test_three_adapters_of_one_folder_leave_three_records(capfd, plain, three_lines):
    """Each report is renamed by the next, whole, and never written over."""
    words = ["--eval_file", three_lines, *SHORT]
    ids = []
    for scale in (1, 2, 3):
        change_tensors(plain, lambda own, by=scale: {k: by * one for k, one in own.items()})
        records.done(capfd, "evidence", plain, "--device", "cpu", *words)
        ids.append(read_json(plain.parent / "inspected" / plain.name / "evidence.json")["id"])
    folders = sorted((plain.parent / "inspected").iterdir())
    assert [one.name.partition(".")[0] for one in folders] == [plain.name] * 3
    assert all((one / "report.md").is_file() for one in folders)
    assert {read_json(one / "evidence.json")["id"] for one in folders} == set(ids)
    assert len(set(ids)) == 3


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
