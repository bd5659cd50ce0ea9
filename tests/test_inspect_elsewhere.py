"""What else an adapter changed: KL and other tokens on other tasks, and right answers."""

import json
import random
import types

import peft
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_lora_single as t

inspect_lora = pytest.importorskip("inspect_lora")

TASKS = [
    {"prompt": [{"role": "user", "content": "What is 6 times 7? Answer with the number alone."}],
     "check": {"kind": "number", "answer": 42}},
    {"prompt": [{"role": "user", "content": "Name a colour."}]},
    {"prompt": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "Is ice warm? Say yes or no."}],
     "check": {"kind": "choice", "options": ["yes", "no"], "answer": "no"}},
]  # fmt: skip


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_adapter(folder, seed=0, size=0.3, **config):
    """Save an adapter with random A and B, made by PEFT alone; return its folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    asked = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "up_proj"]} | config
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **asked))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=size)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return what `evidence` printed and found for an adapter of PEFT's, with three tasks."""
    folder = tmp_path_factory.mktemp("elsewhere")
    adapter = make_adapter(folder / "adapter")
    text = (t.HERE / "data" / "eval.jsonl").read_text(encoding="utf-8")
    lines = sorted(text.splitlines(keepends=True), key=len)[:12]
    (folder / "eval.jsonl").write_text("".join(lines), encoding="utf-8")
    tasks = write_lines(folder / "general.jsonl", TASKS)
    command = ["evidence", str(adapter), "--eval_file", str(folder / "eval.jsonl")]
    command += ["--device", "cpu", "--dtype", "float32", "--num_samples", "0"]
    command += ["--general_file", tasks, "--system", "You are Nell.", "--evidence_examples", "12"]
    command += ["--output_dir", str(folder / "found")]
    inspect_lora.main(command)
    found = json.loads((folder / "found" / "evidence.json").read_text(encoding="utf-8"))
    return types.SimpleNamespace(
        found=found, adapter=adapter, tasks=tasks, folder=folder, command=command
    )


def by_hand(adapter):
    """Return base and adapted models without PEFT: the update is added to the weights."""
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()

    def merged(strength):
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
        weights, tensors = model.state_dict(), load_file(adapter / "adapter_model.safetensors")
        for name, a in tensors.items():
            if "lora_A" in name:
                path = name.removeprefix("base_model.model.").replace("lora_A.", "")
                weights[path] += strength * 8 / 4 * tensors[name.replace("lora_A", "lora_B")] @ a
        return model

    return base, merged


def test_kl_and_other_tokens_are_those_of_weights_merged_by_hand(measured):
    adapter = measured.adapter
    base, merged = by_hand(adapter)
    numbers = random.Random(3)
    examples = []
    for reply in (1, 5, 9):
        ids = [numbers.randrange(10, 2000) for _ in range(12 + reply)]
        examples.append(t.Example("made up", [], "", ids[:12], ids[12:]))
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), adapter
    ).eval()
    shifts = inspect_lora.shifts_of(model, examples, inspect_lora.strengths_of(model))
    assert list(shifts) == [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0]
    for strength in (0.5, 1.0, 2.0):
        moved, kls, others = merged(strength), [], []
        for example in examples:
            with torch.no_grad():
                ids, n = torch.tensor([example.input_ids]), len(example.reply_ids)
                p = base(input_ids=ids).logits[0, -n - 1 : -1].double().log_softmax(-1)
                q = moved(input_ids=ids).logits[0, -n - 1 : -1].double().log_softmax(-1)
            kls.append((p.exp() * (p - q)).sum().item())
            others.append((p.argmax(-1) != q.argmax(-1)).sum().item())
        assert shifts[strength].kl == pytest.approx(kls, rel=1e-3, abs=1e-5)
        assert shifts[strength].other == others
        assert shifts[strength].tokens == [1, 5, 9]
        estimate = shifts[strength].kl_a_token()
        assert estimate.value == pytest.approx(sum(kls) / 15, rel=1e-3)
    assert shifts[2.0].kl_a_token().value > shifts[0.5].kl_a_token().value > 0


def test_the_command_writes_each_strength_and_the_systems_message_as_trained(measured):
    elsewhere = measured.found["elsewhere"]
    assert elsewhere["tasks"] == 3
    rows = dict(elsewhere["no system message"])
    assert len(rows.pop("replies")) == 3
    assert list(rows) == [f"x {s:g}" for s in (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2)]
    kls = [row["kl"]["value"] for row in rows.values()]
    assert kls == sorted(kls) and kls[0] > 0
    assert all(0 <= row["other_tokens"]["value"] <= 1 for row in rows.values())
    table = elsewhere["table"]
    assert table[4].startswith("as trained") and f"{kls[3]:.4f}" in table[4]
    with_system = elsewhere["the training's"]
    assert list(with_system) == ["x 1", "replies"]  # the other strengths would tell little more
    assert table[8].startswith("as trained, system message")
    assert f"{with_system['x 1']['kl']['value']:.4f}" in table[8]


def test_the_bases_replies_are_the_same_in_each_run_and_do_not_depend_on_the_adapter(measured):
    other = make_adapter(measured.folder / "other", seed=5, size=1.0)
    command = [*measured.command[:1], str(other), *measured.command[2:-1]]
    inspect_lora.main([*command, str(measured.folder / "again")])
    again = json.loads((measured.folder / "again" / "evidence.json").read_text(encoding="utf-8"))
    replies = again["elsewhere"]["no system message"]["replies"]
    assert replies == measured.found["elsewhere"]["no system message"]["replies"]
    assert replies != measured.found["elsewhere"]["the training's"]["replies"]


def test_the_answers_are_those_of_greedy_generation_without_a_system_message(measured):
    answers = measured.found["answers"]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    base, merged = by_hand(measured.adapter)
    assert [row["where"].rpartition(":")[2] for row in answers["replies"]] == ["1", "3"]
    for model, name in ((base, "base"), (merged(1.0), "adapter")):
        for task, row in zip((TASKS[0], TASKS[2]), answers["replies"], strict=True):
            ids = tokenizer.apply_chat_template(
                task["prompt"], add_generation_prompt=True, enable_thinking=False, return_dict=False
            )
            out = model.generate(
                torch.tensor([ids]), max_new_tokens=64, do_sample=False, pad_token_id=0
            )
            said = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
            assert row[name] == said
            assert row[f"{name}_is_right"] == inspect_lora.is_right(said, task["check"])


@pytest.mark.parametrize(
    ("reply", "check", "is_right"),
    [
        ("The answer is **1,042**.", {"kind": "number", "answer": 1042}, True),
        ("42 or 43", {"kind": "number", "answer": 42}, False),
        ("-3.50", {"kind": "number", "answer": -3.5}, True),
        ("none", {"kind": "number", "answer": 0}, False),
        ("It is paris.", {"kind": "word", "answers": ["Paris"]}, True),
        ("Parisian", {"kind": "word", "answers": ["Paris"]}, False),
        ("Paris or Lyon", {"kind": "word", "answers": ["Paris"], "not": ["Lyon"]}, False),
        ("No.", {"kind": "choice", "options": ["yes", "no"], "answer": "no"}, True),
        ("yes and no", {"kind": "choice", "options": ["yes", "no"], "answer": "no"}, False),
        ('```json\n{"a": "X", "n": 5.0}\n```', {"kind": "json", "keys": {"a": "x", "n": 5}}, True),
        ('{"a": "X"}', {"kind": "json", "keys": {"a": "x", "n": 5}}, False),
        ('{"n": true}', {"kind": "json", "keys": {"n": 1}}, False),
        ("{broken", {"kind": "json", "keys": {"n": 1}}, False),
    ],
)
def test_answers_are_checked(reply, check, is_right):
    assert inspect_lora.is_right(reply, check) == is_right


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (6, 0, 2 / 64), (0, 6, 2 / 64), (3, 1, 0.625)],
)
def test_mcnemars_test_is_the_exact_one(lost, won, p):
    assert inspect_lora.mcnemar(lost, won) == pytest.approx(p)


def test_what_is_said_of_answers():
    said = inspect_lora.about_answers
    for before in (0, 5):  # all of them could be lost, and nothing would be clear
        lost = inspect_lora.mcnemar(before, 0)
        assert "right too seldom" in said(before, 0, before, 0, 60, lost)
    assert "fails more of" in said(30, 20, 11, 1, 60, inspect_lora.mcnemar(11, 1))
    assert "answers more of" in said(20, 30, 1, 11, 60, inspect_lora.mcnemar(1, 11))
    unclear = said(30, 29, 3, 2, 60, inspect_lora.mcnemar(3, 2))
    assert "does not show that nothing was lost" in unclear and "fewer than 6" in unclear


def shift(kl):
    return inspect_lora.Shift(kl=list(kl), other=[1.0] * len(kl), tokens=[10.0] * len(kl))


def row(value, error):
    return {"of_gain": {"value": value, "error": error}}


def test_a_weaker_update_is_named_only_if_it_keeps_the_gain_and_moves_less():
    shifts = {0.5: shift([1.0, 1.1, 0.9] * 5), 1.0: shift([2.0, 2.2, 1.9] * 5)}
    text = inspect_lora.about_strength({"update x 0.5": row(0.98, 0.005)}, shifts)
    assert "at x 0.5 the update keeps 98% of the gain and moves the model only 0.49 times" in text
    assert inspect_lora.about_strength({"update x 0.5": row(0.94, 0.005)}, shifts) == ""
    assert inspect_lora.about_strength({"update x 0.5": row(0.98, 0.02)}, shifts) == ""
    noisy = {0.5: shift([0.1, 4.0]), 1.0: shift([2.0, 2.1])}
    assert inspect_lora.about_strength({"update x 0.5": row(0.98, 0.005)}, noisy) == ""
    assert inspect_lora.about_strength({}, shifts) == ""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": []}, "a line is"),
        ({"prompt": [{"role": "system", "content": "x"}, *TASKS[1]["prompt"]]}, "system"),
        ({"prompt": [{"role": "assistant", "content": "y"}]}, "user and assistant in turn"),
        (TASKS[0] | {"check": {"kind": "number", "answer": "42"}}, '"check" is'),
        (TASKS[0] | {"check": {"kind": "word", "answers": []}}, '"check" is'),
        (TASKS[0] | {"check": {"kind": "choice", "options": ["a"], "answer": "b"}}, '"check" is'),
        (TASKS[0] | {"check": {"kind": "json", "keys": []}}, '"check" is'),
        (TASKS[0] | {"check": {"kind": "code"}}, '"check" is'),
        (TASKS[0] | {"check": 42}, '"check" is'),
    ],
)  # fmt: skip
def test_a_bad_task_is_named_with_its_line(tmp_path, line, said):
    path = write_lines(tmp_path / "tasks.jsonl", [TASKS[1], line])
    with pytest.raises(SystemExit, match=r"tasks\.jsonl:2") as stop:
        inspect_lora.read_tasks(path)
    assert said in str(stop.value)


def test_no_file_is_no_error():
    assert inspect_lora.read_tasks("") == inspect_lora.read_tasks("no/such/file.jsonl") == []


def test_the_shipped_tasks_are_120_of_which_60_can_be_checked():
    tasks = inspect_lora.read_tasks("data/general.jsonl")
    assert (len(tasks), sum(task.check is not None for task in tasks)) == (120, 60)
    text = (t.HERE / "data" / "general.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    topics = [one["topic"] for one in rows]
    assert {topics.count(topic) for topic in topics} == {10} and len({*topics}) == 12
    assert len({json.dumps(one["prompt"]) for one in rows}) == 120


def test_a_run_with_an_error_in_the_tasks_keeps_its_adapter(flags, tmp_path, capfd):
    path = write_lines(tmp_path / "tasks.jsonl", [{"prompt": 5}])
    held_out = ["--general_file", path, "--evidence_examples", "2"]
    t.main([*flags, *held_out])
    assert (tmp_path / "output" / "final_lora" / "adapter_model.safetensors").is_file()
    assert "tasks.jsonl:1" in capfd.readouterr().out
