"""By which lines an adapter is judged: what its training held out, and nothing that it learned."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from records import SHORT, evidence, planned, say_origin, write_talks_with
from runs import SYSTEM, refused, run, talk, write_lines, write_talks
from toys import edit_json

from inspect_lora import inputs, sampling
from inspect_lora.__main__ import main
from inspect_lora.common import InspectError
from train_lora.conversations import Conversation
from train_lora.files import file_sha256


def lines_of(plan):
    """Return the numbers of the lines of a plan, one for each reply."""
    return [int(each.example.source.rpartition(":")[2]) for each in plan.held_out]


@pytest.fixture
def output(adapters, tmp_path):
    """Return the folder of a run that held out a tenth of its file, and is done."""
    output = tmp_path / "output"
    shutil.copytree(adapters["plain"], output / "final_lora")
    path = write_talks_with(output / "held_out.jsonl", 1, 2, 3)
    held_out = {"file": path, "sha256": file_sha256(Path(path))}
    learned = [talk(number)[:-1] for number in (10, 11)]
    say_origin(output / "final_lora", learned, data={"held_out": held_out}, system_message=SYSTEM)
    return output


@pytest.fixture
def not_measured(capfd, output):
    def measure(*keys, more=()):
        argv = ["evidence", output / "final_lora", "--device", "cpu", *SHORT, *more]
        return refused(capfd, argv, *keys, main=main)

    return measure


@pytest.mark.parametrize(
    "place",
    ["final_lora", "checkpoints/1f/checkpoint-8", "final_lora.2026-11-30-101112", "exports/x/half"],
)
def test_it_is_found_in_a_folder_above_the_adapter(output, place):
    """Also of a checkpoint, of what a later run renamed, and after all of it was moved."""
    if place != "final_lora":
        shutil.copytree(output / "final_lora", output / place)
    moved = Path(shutil.move(output, output.with_name("moved")))
    plan = planned(moved / place, *SHORT)
    assert lines_of(plan) == [1, 2, 3] and plan.facts["learned"] == 0
    assert plan.files["eval_file"]["file"] == str(moved.resolve() / "held_out.jsonl")


def test_another_file_is_where_run_json_says(output, tmp_path, monkeypatch):
    """As seen from where the training was started, above the adapter."""
    (output / "held_out.jsonl").rename(tmp_path / "mine.jsonl")
    held_out = {"file": "mine.jsonl", "sha256": file_sha256(tmp_path / "mine.jsonl")}
    say_origin(output / "final_lora", data={"held_out": held_out})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert lines_of(planned(output / "final_lora", *SHORT)) == [1, 2, 3]


def test_other_conversations_in_its_place_are_refused_and_no_file_is_guessed(output, not_measured):
    """A later run into the same folder may have learned or held out others."""
    write_talks_with(output / "held_out.jsonl", 1, 2, 4)
    not_measured(str(output / "held_out.jsonl"), "changed", "--eval_file")
    shutil.move(output / "held_out.jsonl", output / "other.jsonl")
    not_measured("held_out.jsonl", "looked", str(output), str(Path.cwd()), "--eval_file")
    say_origin(output / "final_lora", data={"train": {}, "held_out": None})
    not_measured("--eval_file", "--prompts")
    (output / "final_lora" / "run.json").unlink()
    not_measured("--eval_file", "--prompts")


def test_a_whole_run_brings_all_of_it(flags, tmp_path):
    """What a fifth held out is measured, and nothing of it was learned."""
    write_talks(tmp_path / "train.jsonl", range(40))
    assert run([*flags, "--eval_file", "20%", "--max_steps", "1"]) == 0
    adapter = shutil.copytree(tmp_path / "output", tmp_path / "moved") / "final_lora"
    (tmp_path / "output" / "held_out.jsonl").unlink()  # as if it had been moved
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:  # it grows afterwards
        file.write(json.dumps({"messages": talk(900)}) + "\n")
    count = len((tmp_path / "moved" / "held_out.jsonl").read_text().splitlines())
    plan = planned(adapter, *SHORT)
    assert len(plan.held_out) == count > 3
    assert plan.facts["learned"] == 0 and plan.system == SYSTEM
    plan = planned(adapter, *SHORT, "--eval_file", tmp_path / "train.jsonl")
    assert (len(plan.held_out), plan.facts["learned"]) == (count + 1, 40 - count)


def test_learned_prompts_are_left_out_and_counted(output, not_measured, tmp_path):
    """Also with another reply, another system message, and other spaces; no other word counts."""
    said, *others = (talk(number) for number in (10, 10, 10, 10, 10))
    others[0][-1] = others[0][-1] | {"content": "Somewhere else."}
    others[1][0] = others[1][0] | {"content": "You are somebody else."}
    others[2][1] = others[2][1] | {"content": f"  {others[2][1]['content'].replace(' ', '  ')}\n"}
    others[3][1] = others[3][1] | {"content": others[3][1]["content"].replace("Where", "When")}
    rows = [{"messages": one} for one in [said, *others, talk(1)]]
    path = write_lines(tmp_path / "own.jsonl", rows)
    plan = planned(output / "final_lora", *SHORT, "--eval_file", path)
    assert plan.facts["learned"] == 4 and lines_of(plan) == [5, 6]
    write_talks_with(tmp_path / "own.jsonl", 10, 11)  # nothing is left
    not_measured("own.jsonl", more=["--eval_file", path])


@pytest.mark.parametrize("content", [None, ""])
def test_what_it_learned_may_be_not_known(output, content):
    path = output / "final_lora" / "learned.txt"
    path.unlink() if content is None else path.write_text(content)
    plan = planned(output / "final_lora", *SHORT)
    assert plan.facts["learned"] is None and len(plan.held_out) == 3


def test_rules_are_about_the_end_of_a_conversation(output, tmp_path):
    """If its last reply was learned, or is too long, an earlier one is not judged instead."""
    longer = [*talk(1), *talk(2)[1:]]
    learned = [*talk(3), *talk(4)[1:]]
    too_long = [*talk(5), *talk(6, 40)[1:]]
    say_origin(output / "final_lora", [learned[:-1]])
    checks = {"any": {"any": ["tea"]}}
    rows = [{"messages": one, "checks": checks} for one in (longer, learned, too_long)]
    words = ["--eval_file", write_lines(tmp_path / "own.jsonl", rows), "--max_seq_len", 120]
    plan = planned(output / "final_lora", *SHORT, *words, "--replies", 9)
    assert lines_of(plan) == [1, 1, 2, 3]
    assert (plan.facts["learned"], plan.facts["too_long"]) == (1, 1)
    (asked,) = plan.asked
    assert asked.prompt.messages == longer[:-1]
    assert asked.prompt.reference == longer[-1]["content"]


def test_long_lines_are_left_out_and_counted(output, tmp_path):
    """However many they are; as in the training, or as asked for."""
    rows = [{"messages": talk(n, 1 if n < 3 else 12)} for n in range(6)]
    words = [output / "final_lora", *SHORT, "--eval_file", write_lines(tmp_path / "a.jsonl", rows)]
    assert len(planned(*words).held_out) == 6
    plan = planned(*words, "--max_seq_len", 80)
    assert (lines_of(plan), plan.facts["too_long"]) == ([1, 2, 3], 3)
    run_json = output / "final_lora" / "run.json"
    edit_json(run_json, lambda known: known.update(settings={"MAX_SEQ_LEN": 80}))
    assert planned(*words).facts["too_long"] == 3
    assert planned(*words, "--max_seq_len", 999).facts["too_long"] == 0


def test_bad_lines_and_rules_of_no_line_are_named_before_the_base_is_read(tmp_path, not_measured):
    rows = [{"messages": talk(1)[:2]}, {"messages": talk(1)}, {"messages": talk(2), "checks": 5}]
    rows.append({"messages": talk(3), "checks": {"brief": {"most_word": 3}}})
    words = ["--base", "/nowhere", "--eval_file", write_lines(tmp_path / "own.jsonl", rows)]
    end = not_measured("own.jsonl:1", "own.jsonl:3", "own.jsonl:4", "most_word", more=words)
    assert "/nowhere" not in end.err and "own.jsonl:2" not in end.err
    # A rule for a kind that no line has would judge nothing, in silence.
    path = write_talks_with(tmp_path / "own.jsonl", 1, kind="emergency")
    rings = [{"name": "rings", "kinds": ["emergencies"], "any": ["999"]}]
    words = ["--eval_file", path, "--rules", write_lines(tmp_path / "rules.json", [rings])]
    not_measured("emergencies", more=words)


def test_what_another_trainer_taught_is_left_out(capfd, adapters, tmp_path):
    """An adapter of PEFT alone has no learned.txt; lines that are no conversations are told."""
    train = [{"messages": [*talk(2), *talk(9)[1:]], "kind": "a"}, {"text": "a blog"}]
    train += [{"prompt": talk(4)[:-1], "chosen": talk(4)[-1:], "rejected": "No.", "kind": "b"}]
    words = ["--eval_file", write_talks_with(tmp_path / "eval.jsonl", 1, 2, 3, 4), *SHORT]
    plan = planned(adapters["plain"], *words)
    assert plan.facts["learned"] is None and plan.facts["trained_kinds"] is None
    words += ["--train_file", write_lines(tmp_path / "train.jsonl", train)]
    plan = planned(adapters["plain"], *words)
    assert lines_of(plan) == [1, 3] and plan.facts["learned"] == 2
    assert plan.facts["trained_kinds"] == {"a": 1, "": 1, "b": 1}
    assert "train.jsonl:2" in capfd.readouterr().out


def test_the_kinds_of_the_training_are_known_from_its_file(output, tmp_path):
    """As long as it is the same file; the key that groups is --kind's."""
    rows = [{"messages": talk(n), "kind": "a", "topic": f"{n}"} for n in (20, 21)]
    path = Path(write_lines(tmp_path / "train.jsonl", rows))
    files = {"held_out": output / "held_out.jsonl", "train": path}
    data = {name: {"file": str(file), "sha256": file_sha256(file)} for name, file in files.items()}
    say_origin(output / "final_lora", data=data)
    words = [output / "final_lora", *SHORT]
    assert planned(*words).facts["trained_kinds"] == {"a": 2}
    assert planned(*words, "--kind", "topic").facts["trained_kinds"] == {"20": 1, "21": 1}
    path.write_text(path.read_text() + "\n")
    assert planned(*words).facts["trained_kinds"] is None


JOINED = [  # flags, and the clusters of six lines
    ([], ["1", "2", "1", "1", "5", "6"]),
    (["--cluster", "patient"], ["1", "2", "1", "1", "5", "2"]),
]


@pytest.mark.parametrize(("flags", "clusters"), JOINED)
def test_lines_whose_prompts_continue_each_other_are_one_cluster(
    adapters, tmp_path, flags, clusters
):
    """A dialogue that is stored as one line a reply, in any order; and what a key joins."""
    talks = [*talk(1), *talk(2)[1:], *talk(3)[1:]]
    prompts = [talks[:6], talk(5)[:2], talks[:2], talks[:4], talk(6)[:2], talk(7)[:2]]
    rows = [{"prompt": prompt, "completion": talk(n)[-1:]} for n, prompt in enumerate(prompts)]
    for number in (1, 5):
        rows[number]["patient"] = 7
    words = ["--eval_file", write_lines(tmp_path / "eval.jsonl", rows), *SHORT, *flags]
    found = [each.cluster for each in planned(adapters["plain"], *words).held_out]
    first = {cluster: f"{found.index(cluster) + 1}" for cluster in found}
    assert [first[cluster] for cluster in found] == clusters


def conversations_of(*lines):
    """Return the replies of dialogues, as the script reads them: up to each reply of each line."""
    return [
        Conversation(f"own:{number}", messages[:end], {})
        for number, messages in enumerate(lines, 1)
        for end in range(2, len(messages) + 1, 2)
    ]


def dialogue(*texts):
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


GREETING = [  # dialogues, and the cluster of each
    ([("Hi", "Hello", "tea?", "Yes"), ("Hi", "Hello", "rain?", "No")], "12"),
    ([("Hi", "Hello", "tea?", "Yes"), ("Hi", "Hey", "tea?", "No")], "12"),  # another answer
    ([("Hi", "Hello", "tea?", "Yes"), ("Hi", "Hello", "tea?", "No")], "11"),
    ([("Hi", "Hello"), ("Hi", "Hey")], "11"),
    ([("Hi", "Hello"), ("Hi", "Hello", "tea?", "Yes")], "11"),  # one line a reply
    ([("Hi", "A"), ("Hi", "A", "tea?", "Yes"), ("Hi", "A", "rain?", "No"), ("Hi", "B")], "1231"),
    ([("Hi", "A", "x", "B", "y", "C"), ("Hi", "A", "x", "B", "z", "D"), ("Hi", "E", "w", "F")],
     "113"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "clusters"), GREETING)
def test_a_greeting_joins_no_dialogues(lines, clusters):
    """With one cluster alone there would be no interval."""
    found = inputs.clusters_of(conversations_of(*(dialogue(*texts) for texts in lines)))
    numbers = [root.rpartition(":")[2] for root in found.values()]
    names = {root: f"{numbers.index(root) + 1}" for root in numbers}
    assert "".join(names[root] for root in numbers) == clusters


def test_a_key_of_clusters_that_no_line_has_is_refused():
    """Each line would count by itself, and every interval be too narrow."""
    lines = conversations_of(dialogue("Hi", "Hello"), dialogue("Tea?", "Yes"))
    with pytest.raises(InspectError, match="persn"):
        inputs.clusters_of(lines, "persn")


@pytest.mark.parametrize(
    ("value", "kind"),
    [(0, "0"), (False, "false"), (None, ""), ("", ""), (["a", 1], '["a", 1]'), (1.5, "1.5"),
     ("0", "0")],
)  # fmt: skip
def test_a_kind_may_be_any_value(adapters, tmp_path, value, kind):
    rows = [{"messages": talk(1), "kind": value}, {"messages": talk(2)}]
    words = ["--eval_file", write_lines(tmp_path / "own.jsonl", rows), *SHORT]
    assert [each.kind for each in planned(adapters["plain"], *words).held_out] == [kind, ""]


def test_the_type_and_the_replies_are_those_of_the_training(capfd, adapters, tmp_path):
    """Else an adapter is measured as it was not trained."""
    folder = shutil.copytree(adapters["plain"], tmp_path / "adapter")
    path = write_lines(tmp_path / "eval.jsonl", [{"messages": [*talk(1), *talk(2)[1:]]}])
    words = ["--eval_file", path, *SHORT]
    plan = planned(folder, *words)
    assert len(plan.held_out) == 2 and plan.base.request.dtype == "float32"
    say_origin(folder, settings={"REPLIES": "last", "DTYPE": "bfloat16"})
    found, _ = evidence(capfd, folder, tmp_path / "bfloat16", *words)
    other, _ = evidence(capfd, folder, tmp_path / "float32", *words, "--dtype", "float32")
    (line,), (in_float32,) = found["lines"], other["lines"]
    assert found["conditions"]["dtype"] == "bfloat16"
    assert plan.held_out[1].example.source == line["where"]
    assert line["base"] != in_float32["base"] == pytest.approx(line["base"], rel=0.01)


def items_of(kinds, cluster=lambda n: n):
    return [
        sampling.Item([{"role": "user", "content": f"{n}"}], kind, f"{cluster(n)}")
        for n, kind in enumerate(kinds)
    ]


def test_a_draw_has_the_kinds_of_the_file_and_not_its_first_lines():
    kinds = ["a"] * 60 + ["b"] * 30 + ["c"] * 9 + ["d"]
    items = items_of(kinds)
    drawn = sampling.draw(items, 40, Counter(kinds))
    assert Counter(items[n].kind for n in drawn) in (
        {"a": 24, "b": 12, "c": 4}, {"a": 24, "b": 12, "c": 3, "d": 1}
    )  # fmt: skip
    assert drawn == sorted(drawn) != [*range(40)] and drawn[:24] != [*range(24)]
    assert sampling.draw(items, 100, Counter(kinds)) == [*range(100)]
    assert sampling.draw(items, 0, Counter(kinds)) == []
    shuffled = items[50:] + items[:50]
    assert {
        shuffled[n].messages[0]["content"] for n in sampling.draw(shuffled, 40, Counter(kinds))
    } == {items[n].messages[0]["content"] for n in drawn}


def test_a_line_that_is_left_out_does_not_change_the_draw_of_the_others():
    """So each adapter of a file is measured on the same lines, whatever it learned."""
    kinds = ["a", "b"] * 30
    items = items_of(kinds)
    drawn = {items[n].messages[0]["content"] for n in sampling.draw(items, 20, Counter(kinds))}
    for left_out in range(60):
        rest = items[:left_out] + items[left_out + 1 :]
        found = {rest[n].messages[0]["content"] for n in sampling.draw(rest, 20, Counter(kinds))}
        assert len(found - drawn) == (str(left_out) in drawn)


def test_a_draw_takes_one_reply_of_each_conversation_first():
    items = items_of(["a"] * 80, cluster=lambda n: n // 8)
    drawn = sampling.draw(items, 10, Counter({"a": 80}))
    assert len({items[n].cluster for n in drawn}) == 10
    counts = Counter(items[n].cluster for n in sampling.draw(items, 25, Counter({"a": 80})))
    assert {*counts.values()} == {2, 3}


def test_parts_are_measured_on_a_draw_by_kind(adapters, tmp_path):
    rows = [{"messages": talk(n), "kind": "ab"[n % 3 == 0]} for n in range(12)]
    words = ["--eval_file", write_lines(tmp_path / "eval.jsonl", rows), *SHORT, "--parts", 6]
    plan = planned(adapters["plain"], *words)
    kinds = Counter(plan.held_out[number].kind for number in plan.part_lines)
    assert kinds == {"a": 4, "b": 2} and plan.part_lines != [*range(6)]
