"""Prompts without replies: what both say, the checks, and what else changed; no gain."""

import json
import re
import shutil
import types
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from on_tiny import messages_of, read_json, save_adapter, write_held_out, write_lines
from tiny_adapters import command
from transformers import AutoTokenizer

PARROT = [{"role": "system", "content": "You are a parrot."}, *messages_of(["rain"])]
ROWS = [
    {"id": "first", "prompt": "hello", "kind": "plain"},
    {"prompt": messages_of(("hello", "Oh.", "who rang?")), "kind": "plain"},
    {"messages": PARROT, "kind": "other",
     "checks": {"says no": {"kind": "word", "answers": ["no"]}, "right": {"kind": "number",
                                                                          "answer": 1}}},
]  # fmt: skip
TASK = {"prompt": "What is 6 times 7?", "checks": {"right": {"kind": "number", "answer": 42}}}
WORDS = ["--device", "cpu", "--max_new_tokens", "6", "--examples", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return an adapter, its prompts and tasks."""
    folder = tmp_path_factory.mktemp("prompts")
    return types.SimpleNamespace(
        folder=folder,
        adapter=save_adapter(folder / "adapter", std=0.5),
        prompts=write_lines(folder / "prompts.jsonl", ROWS),
        tasks=write_lines(folder / "tasks.jsonl", [TASK]),
    )


@pytest.fixture
def ask(made, capsys, no_picture):
    """Return a function that asks base and adapter, and gives what was said and found."""

    def run(*more, prompts=made.prompts, adapter=made.adapter):
        folder = made.folder / "found"
        words = ["--prompts", prompts, "--general_file", made.tasks, "--output_dir", folder]
        end = command(capsys, "evidence", adapter, *words, *WORDS, *more)
        if end.status in (0, 3):
            end.found = read_json(folder / "evidence.json")
            end.report = (folder / "report.md").read_text(encoding="utf-8")
            end.folder = folder
        return end

    return run


def test_both_reply_to_each_prompt_and_nothing_is_said_of_a_gain(ask, made):
    end = ask()
    assert end.status == 0, end.err
    found = end.found
    assert found["schema"] == 2 and found["finished"] is True
    assert [found[key] for key in ("held_out", "loss", "gain", "lower_on")] == [None] * 4
    assert found["losses"] == [] and found["parts"] == {}
    assert found["prompts"]["file"] == made.prompts
    replies = {reply["where"].rpartition("/")[2]: reply for reply in found["replies"]}
    assert list(replies) == [*(f"prompts.jsonl:{n}" for n in (1, 2, 3)), "tasks.jsonl:1"]
    one = replies["prompts.jsonl:1"]
    assert (one["id"], one["group"], one["source"]) == ("first", "plain", "prompts")
    assert one["messages"] == messages_of(["hello"]) and one["reference"] is None
    assert one["max_new_tokens"] == 6 and one["base"]["tokens"] == 6
    assert replies["prompts.jsonl:2"]["messages"] == ROWS[1]["prompt"]
    assert replies["prompts.jsonl:3"]["messages"] == PARROT
    assert set(replies["prompts.jsonl:3"]["adapter"]["checks"]) == {"says no", "right"}
    assert {name: row["lines"] for name, row in found["checks"].items()} == {
        "says no": 1, "right": 1, "tasks right": 1,
    }  # fmt: skip
    # Of the prompts with checks as of the tasks it is told how many were cut.
    judged = [reply for reply in found["replies"] if reply["base"]["checks"]]
    cut = [sum(not reply[who]["ended"] for reply in judged) for who in ("base", "adapter")]
    said = f"checks: of 2 replies each, {cut[0]} of the base's and {cut[1]} of the adapter's were "
    assert len(judged) == 2 and cut[0] > 0
    assert [one for one in found["conclusions"] if one.startswith(f"{said}cut at 6 or 80 tokens")]
    assert "checks    2 lines, two replies to each" in end.out
    assert found["elsewhere"]["tasks"] == 1
    assert not re.search(r"(?m)^(gain|parts)", end.out) and "gain" not in end.report.replace(
        "nothing is said of a gain", ""
    )
    assert "prompts   two replies to each of 3 prompts" in end.out
    title = end.report.split("\n")[0]
    assert title.endswith(": its replies to 3 prompts, beside its base's")
    assert "- prompts: " in end.report and "held-out" not in end.report
    assert (
        "\n± is one standard error over the other tasks. A check is clear if its p is" in end.report
    )
    assert "another seed of the training may change more than that.\n" in end.report
    assert end.report.count("| base | adapter |") == 3  # a table each, without a reference
    page = (end.folder / "replies.html").read_text(encoding="utf-8")
    assert "who rang?" in page


def test_what_the_packages_own_tasks_hold_is_called_theirs(ask):
    end = ask()
    (row,) = [one for one in end.report.splitlines() if one.startswith("| tasks: right |")]
    assert "has 42 as its last number" in row
    assert re.search(r"(?m)^ +tasks: right +1 ", end.out) and "tasks right" not in end.said
    assert end.found["checks"]["tasks right"]["source"] == "tasks"
    assert end.found["checks"]["right"]["source"] == "prompts"


def test_it_is_said_which_system_message_prompts_without_one_get(ask, made):
    end = ask("--general_file", "")
    facts = end.report.split("## What was measured")[1]
    said = "none: some prompts have one, and others have none; --system gives one"
    assert f"- system message: {said}" in facts and "guessed" not in facts
    assert "of their own 2 of 3 prompts get none; --system gives one" in end.said
    end = ask("--general_file", "", "--system", "You are Nell.")
    assert "- system message: You are Nell." in end.report
    assert 'of their own 2 of 3 prompts get this one: "You are Nell."' in end.said
    path = write_lines(made.folder / "plain.jsonl", ROWS[:2])
    end = ask("--general_file", "", prompts=path)
    assert "- system message: none: the prompts have none; --system gives one" in end.report
    other = [{"role": "system", "content": "You are a dog."}, *messages_of(["rain"])]
    path = write_lines(made.folder / "two.jsonl", [{"prompt": PARROT}, {"prompt": other}])
    end = ask("--general_file", "", prompts=path)
    assert "- system message: none: the prompts have different ones; --sys" in end.report
    assert "system    without" not in end.out
    path = write_lines(made.folder / "one.jsonl", [{"prompt": PARROT}])
    end = ask("--general_file", "", prompts=path)
    assert "(guessed: the one that all lines share): You are a parrot." in end.report


def test_another_base_than_the_adapter_names_is_told(ask, made, tmp_path):
    end = ask("--general_file", "", "--base", TINY)
    assert "given by --base" not in end.said + end.report  # it is the one that is named
    base = shutil.copytree(TINY, tmp_path / "other")
    end = ask("--general_file", "", "--base", base)
    named = read_json(made.adapter / "adapter_config.json")["base_model_name_or_path"]
    said = f"{base}, given by --base; adapter_config.json names {named}"
    assert said.replace(" ", "") in end.out.replace("\n", "").replace(" ", "")
    assert f"- base: {said}; in float32" in end.report.replace("\\", "")


@pytest.mark.parametrize("size", [0.39, 0.41])
def test_the_sizes_of_the_updates_are_shown_and_large_ones_are_told(ask, monkeypatch, size):
    import inspect_lora.evidence as evidence

    rows = [{"layer": 0, "update": size, "directions": 2}, {"layer": 1, "update": 0.02} | {
        "directions": 3}]  # fmt: skip
    monkeypatch.setattr(evidence, "measure_updates", lambda _: {"up_proj": rows})
    monkeypatch.setattr("inspect_lora.report_folder.draw_picture", lambda *_: None)
    end = ask("--general_file", "")
    assert (
        f"| up\\_proj | 2 | {50 * (size + 0.02):.2f} % | {100 * size:.2f} % | 2.5 |" in end.report
    )
    said = "updates: 1 of 2 updates are over 40 % of the weight W"
    assert (said in end.said) is (said in end.report) is (size > 0.4)
    assert ("the largest 41 % (up_proj)" in end.said) is (size > 0.4)


def test_the_last_lines_lead_to_the_reading(ask, made, monkeypatch):
    for name in ("SSH_CONNECTION", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    end = ask("--general_file", "")
    assert end.out.rstrip().endswith(
        'Now judge the replies there: choose "Blind reading", and read all.'
    )
    rows = [{"prompt": f"hello {number}"} for number in range(41)]
    path = write_lines(made.folder / "many.jsonl", rows)
    end = ask("--general_file", "", "--max_new_tokens", "1", prompts=path)
    assert end.out.rstrip().endswith('choose "Blind reading", and read 40.')


def test_the_help_names_the_defaults_of_samples_and_lengths(capsys):
    said = " ".join(command(capsys, "evidence", "--help").out.split())
    assert "with one of each kind; default: 6" in said
    assert "with --prompts every reply is (those to the other tasks after 80); default: 200" in said


def test_the_picture_of_the_updates_says_nothing_of_replies(ask, monkeypatch):
    figures = {}

    def save(figure, path):
        figures[path.name] = figure
        path.write_bytes(b"picture")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    assert ask("--general_file", "").status == 0
    assert figures["lora.png"].get_suptitle().endswith("\nr = 4, alpha = 32")
    assert [axes.get_title() for axes in figures["lora.png"].axes][:1] == [
        "Where the model was changed"
    ]


def test_without_checks_no_table_of_them_is_shown(ask, made):
    path = write_lines(made.folder / "plain.jsonl", ROWS[:2])
    end = ask("--general_file", "", prompts=path)
    assert end.status == 0 and len(end.found["replies"]) == 2
    assert "two replies to each of 2 prompts" in end.said and "clear?" not in end.said


@pytest.mark.parametrize(("wanted", "judged"), [(2, 2), (3, 3), (4, 3)])
def test_of_prompts_as_many_are_judged_as_are_drawn(ask, made, wanted, judged):
    """Base and adapter reply to all of them; the record has the checks that the rows count."""
    check = {"checks": {"right": TASK["checks"]["right"]}}
    path = write_lines(made.folder / "three.jsonl", [{"prompt": f"{n}?"} | check for n in range(3)])
    end = ask("--general_file", "", "--checks", str(wanted), prompts=path)
    row = end.found["checks"]["right"]
    assert (row["lines"], row["lines_in_all"], len(end.found["replies"])) == (judged, 3, 3)
    for key in ("base", "adapter"):
        assert sum("right" in one[key]["checks"] for one in end.found["replies"]) == judged
    assert f"| {'2 of 3' if wanted == 2 else 3} | " in end.report


def test_they_are_what_a_chat_would_say(ask, made, capsys, monkeypatch):
    """With the training's system message, unless a prompt has one of its own."""
    end = ask("--system", "You are Nell.", "--general_file", "")
    nell = {"role": "system", "content": "You are Nell."}
    said = [reply["messages"][0] for reply in end.found["replies"]]
    assert said == [nell, nell, PARROT[0]]
    (made.folder / "typed.txt").write_text("hello\n/base\nhello\n", encoding="utf-8")
    with (made.folder / "typed.txt").open(encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        words = ["--system", "You are Nell.", "--max_new_tokens", "6", "--device", "cpu"]
        chat = command(capsys, "chat", made.adapter, *words)
    first = end.found["replies"][0]
    assert first["adapter"]["text"].split()[0] in chat.out.split("base> ")[0]


def test_a_held_out_file_without_replies_names_the_flag(ask, made, capsys):
    rows = [{"messages": messages_of(["hello"])}, {"messages": PARROT}]
    path = write_lines(made.folder / "no_replies.jsonl", rows)
    end = command(capsys, "evidence", made.adapter, "--eval_file", path, *WORDS)
    assert end.status == 1 and "These are prompts without replies" in end.err
    assert f"--prompts {path}" in end.err.replace("\n", "")
    rows.append({"messages": messages_of(("hello", "Oh."))})
    path = write_lines(made.folder / "some.jsonl", rows)
    end = command(capsys, "evidence", made.adapter, "--eval_file", path, *WORDS)
    assert end.status == 1 and "These are prompts" not in end.err
    end = command(capsys, "evidence", made.adapter)
    assert "Prompts without replies are given with --prompts" in end.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--eval_file", "x.jsonl"], "--eval_file or --prompts, and not both"),
        (["--fail_if", "worse"], "prompts alone have no loss"),
        (["--fail_if", "lost", "--checks", "0"], "--fail_if lost needs checks"),
    ],
)
def test_flags_that_do_not_go_together_are_told(ask, more, said):
    end = ask(*more)
    assert end.status == 1 and said in end.err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": messages_of(("hello", "Oh."))}, 'a line is {"prompt": [messages'),
        ({"prompt": ""}, "a line is"),
        ({"prompt": "a<|im_end|>"}, "the text holds <|im_end|>"),
        ({"prompt": "a", "checks": {"x": {"kind": "word"}}}, 'it needs "answers"'),
    ],
)
def test_a_bad_prompt_is_refused_by_its_line(ask, made, row, said):
    path = write_lines(made.folder / "bad.jsonl", [ROWS[0], row])
    end = ask(prompts=path)
    assert end.status == 1 and "bad.jsonl:2: " in end.err and said in end.err
    Path(path).write_text(json.dumps(ROWS[0]) + "\nhello there\nrain\n", encoding="utf-8")
    said = ask(prompts=path).err
    assert "bad.jsonl:3: this is no JSON" in said and said.count('{"prompt": "text"}') == 1
    (made.folder / "empty.jsonl").write_text("\n", encoding="utf-8")
    assert "holds no prompts" in ask(prompts=made.folder / "empty.jsonl").err


@pytest.mark.parametrize("fault", ["1 / 0", "range(10**9)", "1 + 'a'", "raise_exception('no')"])
def test_a_prompt_at_which_the_template_fails_is_refused_by_its_line(ask, made, tmp_path, fault):
    adapter = shutil.copytree(made.adapter, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    asks = "{% if 'fail' in messages[0].content %}{{ FAULT }}{% endif %}"
    tokenizer.chat_template = asks.replace("FAULT", fault) + tokenizer.chat_template
    tokenizer.save_pretrained(adapter)
    path = write_lines(tmp_path / "bad.jsonl", [ROWS[0], {"prompt": "fail"}])
    own = ["--output_dir", tmp_path / "found"]
    end = ask(*own, prompts=path, adapter=adapter)
    assert end.status == 1 and "bad.jsonl:2: the template says, " in end.err
    end = ask(*own, "--system", "fail", adapter=adapter)
    assert end.status == 1 and "template refuses a system message" in end.err


def test_compare_sets_two_such_reports_side_by_side_and_ranks_nothing(
    ask, made, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    ask()
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        shutil.copy(made.folder / "found" / "evidence.json", tmp_path / name)
    end = command(capsys, "compare", "one", "other")
    assert end.status == 0, end.err
    assert "there is no loss, so nothing is ranked" in end.said
    assert end.said.count("says no 0/1") == 2
    assert (tmp_path / "compared" / "replies.html").is_file()
    assert "left out" not in end.said
    (tmp_path / "third").mkdir()
    record = ROOT / "tests" / "evidence_schema_2.json"
    shutil.copy(record, tmp_path / "third" / "evidence.json")
    end = command(capsys, "compare", ".")
    assert end.status == 0 and "2 reports (one, other): measured on prompts without" in end.said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": {"file": "b.jsonl", "sha256": "d"}}, "on other prompts (b.jsonl) than the ne"),
        ({"prompts": {"sha256": "d"}}, "measured on another content of "),
        ({"enable_thinking": True}, "measured with --enable_thinking, and the newest report wit"),
        ({"dtype": "bfloat16"}, "with another dtype (bfloat16, and not float32) than the newest"),
        ({"torch": "1.0"}, "with another torch (1.0, and not "),
        ({"script": "an edited one"}, "with another version of train_lora_single.py than the new"),
        ({"base": "somebody/else"}, "another base model or date of its files (somebody/else, and"),
    ],
)
@pytest.mark.parametrize("is_known", [True, False])
def test_reports_of_other_prompts_or_bases_do_not_stand_side_by_side(
    ask, made, capsys, tmp_path, monkeypatch, change, said, is_known
):
    """`computed_with` is empty for a base that is a branch of the hub."""
    monkeypatch.chdir(tmp_path)
    ask("--general_file", "")
    record = read_json(made.folder / "found" / "evidence.json")
    other = json.loads(json.dumps(record)) | {"measured": "2020-01-01 00:00:00"}
    for key, value in change.items():
        if key == "prompts":
            other["prompts"] |= value
        elif key == "enable_thinking":
            other[key] = value
        else:
            other["base_side"]["computed_with"][key] = value
            other |= {key: value} if key in other else {}
    if not is_known:
        other["base_side"]["computed_with"] = {}
    for name, one in (("newest", record), ("odd", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evidence.json").write_text(json.dumps(one), encoding="utf-8")
    end = command(capsys, "compare", "newest", "odd")
    assert end.status == 0, end.err
    is_left_out = is_known or not {"torch", "script"} & change.keys()
    assert end.said.count("says no 0/1") == (1 if is_left_out else 2)
    assert ("left out 1 report (odd): " in end.said and said in end.said) is is_left_out


def test_the_report_on_replies_stays_beside_that_on_prompts(
    made, capsys, no_picture, held_out, monkeypatch
):
    """`served` and `compare` need its losses, whichever was written last."""
    monkeypatch.chdir(made.folder)
    less = ["--general_file", "", "--examples", "0", "--checks", "0", "--samples", "0"]
    for flag, path in (("--eval_file", held_out), ("--prompts", made.prompts)):
        end = command(capsys, "evidence", made.adapter, flag, path, *WORDS, *less)
        assert end.status == 0, end.err
    found = {path.parent.name: read_json(path) for path in Path("inspected").glob("*/*.json")}
    assert found["adapter"]["losses"] and found["adapter--prompts"]["losses"] == []
    end = command(capsys, "compare", "inspected")
    assert end.status == 0 and "inspected/adapter" in end.out
    shutil.rmtree("inspected")


def test_served_says_what_a_report_on_prompts_lacks(ask, made, capsys, monkeypatch):
    from inspect_lora import served

    ask()
    monkeypatch.setattr(served, "find_server", lambda *_: types.SimpleNamespace(window=1e9))
    folder = made.adapter.parent / "inspected" / "adapter"
    folder.mkdir(parents=True)
    shutil.copy(made.folder / "found" / "evidence.json", folder)
    end = command(capsys, "served", "http://localhost:1", made.adapter)
    assert end.status == 1 and "is of prompts without replies and holds no losses" in end.said
    shutil.rmtree(folder)


# ==== For a machine that waits for the status


@pytest.fixture
def held_out(made):
    return write_held_out(
        made.folder / "held-out.jsonl", [(f"hello {n}", f"Oh, hello {n}.") for n in range(24)]
    )


def test_of_fewer_than_twenty_lines_it_cannot_be_told_whether_it_is_worse(made, capsys, no_picture):
    """Neither that it is, nor that it is not: the report says that the lines are too few."""
    words = ["--general_file", "", "--device", "cpu", "--examples", "0", "--samples", "0"]
    words += ["--checks", "0", "--output_dir", made.folder / "few", "--fail_if", "worse"]
    for lines in (19, 20):
        said = [(f"hello {n}", f"Oh, hello {n}.") for n in range(lines)]
        path = write_held_out(made.folder / "few.jsonl", said)
        end = command(capsys, "evidence", made.adapter, "--eval_file", path, *words)
        assert (made.folder / "few" / "report.md").is_file()
        told = "--fail_if worse: 19 held-out lines cannot tell; 20 are needed." in end.err
        assert told is (lines == 19) is (end.status == 1)


@pytest.mark.parametrize(("losses", "status"), [((3.0, 2.0), 0), ((2.0, 3.0), 3), ((2.0, 2.0), 0)])
def test_an_adapter_that_is_clearly_worse_ends_with_3(
    made, capsys, no_picture, monkeypatch, held_out, losses, status
):
    import inspect_lora.evidence as evidence

    base, adapter = losses

    def made_up(_, examples, title):
        value = {"base": base, "adapter": adapter}[title]
        return [value * len(one.reply_ids) * (1 + 0.01 * n) for n, one in enumerate(examples)]

    monkeypatch.setattr(evidence, "losses_of", made_up)
    monkeypatch.setattr(evidence.BaseSide, "losses", lambda *_: None)
    words = ["--eval_file", held_out, "--general_file", "", "--device", "cpu", "--examples", "0"]
    words += ["--samples", "0", "--checks", "0", "--output_dir", made.folder / "worse"]
    for more, expected in (([], 0), (["--fail_if", "worse"], status)):
        end = command(capsys, "evidence", made.adapter, *words, *more)
        assert end.status == expected, end.err
        assert (made.folder / "worse" / "report.md").is_file()
    assert ("failed    the adapter is worse than its base" in end.out) == (status == 3)


def replies_that_pass(name, lost, won, same, fail=0):
    """Return replies to so many lines of one check."""
    pairs = [(True, False)] * lost + [(False, True)] * won
    pairs += [(True, True)] * same + [(False, False)] * fail
    rule = {"kind": "number", "answer": 1}
    return [
        {"where": f"a:{number}", "rules": {name: rule}, "says": {name: "says 1"},
         "base": {"checks": {name: one}}, "adapter": {"checks": {name: other}}}
        for number, (one, other) in enumerate(pairs)
    ]  # fmt: skip


@pytest.mark.parametrize(("lost", "won", "status"), [(12, 0, 3), (0, 12, 0), (3, 0, 0)])
def test_checks_that_were_clearly_lost_end_with_3(ask, monkeypatch, lost, won, status):
    import inspect_lora.evidence as evidence

    replies = replies_that_pass("right", lost, won, 8)
    real = evidence.rows_of_checks
    monkeypatch.setattr(evidence, "rows_of_checks", lambda *_: real(replies))
    end = ask("--fail_if", "lost")
    assert end.status == status, end.err
    assert ("failed right" in end.said) == (status == 3)
    assert "cannot fail" not in end.said
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("rows", "status", "said"),
    [
        ([("rings", 5, 0, 0)], 1, "The base passes 5 lines of a check at most, and 6 must be lost"),
        ([("rings", 6, 0, 0)], 3, ""),
        ([("rings", 0, 6, 5, 9)], 1, "passes 5 lines of a check at most, and 6 must be lost"),
        ([("rings", 0, 6, 6, 9)], 0, ""),
        ([("rings", 0, 6, 6, 9), ("yields", 0, 0, 6)], 1, "6 lines of a check at most, and 7"),
        (
            [("rings", 0, 6, 3, 9), ("yields", 0, 0, 7), ("calm", 2, 0, 0)], 0,
            "fail_if cannot fail: rings, calm: too few of the base's replies pass for a loss to s",
        ),
        ([("rings", 0, 6, 3, 9), ("yields", 7, 0, 0)], 3, "fail_if cannot fail: rings: too few"),
    ],
)  # fmt: skip
def test_where_no_loss_could_show_it_is_no_success(ask, monkeypatch, rows, status, said):
    """Five lines, all of them lost, are p = 0.062: that nothing failed would say nothing."""
    import inspect_lora.evidence as evidence

    found = evidence.rows_of_checks([one for row in rows for one in replies_that_pass(*row)])
    monkeypatch.setattr(evidence, "rows_of_checks", lambda *_: found)
    end = ask("--fail_if", "lost")
    assert end.status == status, end.err
    told = " ".join(end.err.split()) if status == 1 else end.said
    assert said in told and ("cannot fail" in end.said) is said.startswith("fail_if")
    monkeypatch.undo()


def test_without_checks_nothing_can_be_lost(ask, made):
    path = write_lines(made.folder / "unchecked.jsonl", ROWS[:2])
    end = ask("--fail_if", "lost", "--general_file", "", prompts=path)
    assert end.status == 1 and "no line has checks" in end.err
