"""What `evidence` finds, concludes, prints and writes, and where."""

import contextlib
import json
import math
import re
import shutil
import types

import numpy as np
import peft
import pytest
import torch
from by_hand import MergedByHand, read_conversations, reply_loss
from conftest import ROOT, TINY
from on_tiny import (
    PARTS,
    SHORT,
    change_record,
    columns,
    copy_of_run,
    know_again,
    listing,
    measure,
    messages_of,
    read_json,
    save_adapter,
    write_held_out,
    write_lines,
)
from safetensors.torch import load_file
from tiny_adapters import TENSORS, change_tensors, command
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import inspect_lora.conclusions as concluded
import inspect_lora.elsewhere as elsewhere
import inspect_lora.parts as parts
import inspect_lora.replies as replies
from inspect_lora.__main__ import main
from inspect_lora.checks import mcnemar
from inspect_lora.common import file_sha256
from inspect_lora.conversations import GENERAL_FILE, Task
from inspect_lora.findings import headline
from inspect_lora.report import (
    markdown_kinds,
    markdown_parts,
    perplexity,
    telling_parts,
    without_loops,
)
from inspect_lora.scores import Estimate, Losses, draw_numbers, errors_needed, ratio_with_error
from inspect_lora.trainer import ChatFormat, Example

TASKS = [
    {"prompt": [{"role": "user", "content": "What is 6 times 7? Answer with the number alone."}],
     "checks": {"right": {"kind": "number", "answer": 42}}},
    {"prompt": [{"role": "user", "content": "Name a colour."}]},
    {"prompt": [{"role": "system", "content": "You are a parrot."},
                {"role": "user", "content": "Is ice warm? Say yes or no."}]},
]  # fmt: skip


@pytest.fixture
def ours(finished, tmp_path):
    """Return a copy of a finished run's output folder, whose adapter replies otherwise."""
    return copy_of_run(finished, tmp_path / "output")


# ==== An adapter of train_lora_single.py


def test_an_adapter_of_ours_needs_no_flags(ours, capsys, monkeypatch, tmp_path):
    """From any folder; nothing is written into its folder or into run.json."""
    before = listing(ours / "final_lora"), (ours / "run.json").read_bytes()
    monkeypatch.chdir(tmp_path)
    words = ["--general_file", "", "--max_new_tokens", "5"]  # else it takes longer
    end = command(capsys, "evidence", ours / "final_lora", *words)
    assert end.status == 0, end.err
    results = ours / "inspected" / "final_lora"
    names = {"evidence.json", "lora.png", "overview.png", "replies.html", "report.md"}
    assert {path.name for path in results.iterdir()} == names
    assert (listing(ours / "final_lora"), (ours / "run.json").read_bytes()) == before
    found, record = read_json(results / "evidence.json"), read_json(ours / "run.json")
    assert found["schema"] == 2 and found["finished"] is True
    assert found["held_out"]["sha256"] == record["data"]["held_out"]["sha256"]
    assert found["run"]["settings"] == record["settings"] and found["dtype"] == "float32"
    merged = MergedByHand(TINY, ours / "final_lora" / TENSORS, lambda _: 16 / 8)
    conversations = read_conversations(record["data"]["held_out"]["file"])
    expected = merged.losses(conversations, lambda path: False), merged.losses(conversations)
    assert columns(found) == [pytest.approx(one, abs=1e-4) for one in expected]
    lines = end.out.splitlines()
    assert len(lines) <= 32
    assert all(len(line) <= 100 for line in lines if not line.strip().startswith("scp "))
    assert "inspected/final_lora/report.md" in end.out
    png = (results / "lora.png").read_bytes()
    assert png.startswith(b"\x89PNG") and "![What was measured](lora.png)" in (
        results / "report.md"
    ).read_text(encoding="utf-8")


def test_a_checkpoint_has_a_report_of_its_own(ours, capsys, no_picture):
    (first, *_) = sorted((ours / "checkpoints").iterdir())
    assert command(capsys, "evidence", first, *SHORT).status == 0
    assert (ours / "inspected" / first.name / "report.md").is_file()


def test_another_version_of_the_script_is_told(ours, capsys, no_picture):
    end = command(capsys, "evidence", ours / "final_lora", *SHORT)
    assert "another version" not in end.said
    change_record(ours, script_sha256="of yesterday")
    end = command(capsys, "evidence", ours / "final_lora", *SHORT)
    assert "trained by another version of train_lora_single.py" in end.said


def test_what_a_run_named_from_its_own_folder_is_found_from_another(
    ours, capsys, no_picture, tmp_path, monkeypatch
):
    shutil.copytree(TINY, tmp_path / "there" / "model")
    write_held_out(tmp_path / "there" / "held-out.jsonl")
    facts = read_json(ours / "run.json")["data"]
    facts["held_out"] |= {
        "file": "held-out.jsonl",
        "sha256": file_sha256(tmp_path / "there" / "held-out.jsonl"),
    }
    change_record(ours, working_folder=str(tmp_path / "there"), data=facts)
    config = read_json(ours / "final_lora" / "adapter_config.json")
    config["base_model_name_or_path"] = "model"
    (ours / "final_lora" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "here" / "model").mkdir(parents=True)  # others of the same names
    write_held_out(tmp_path / "here" / "held-out.jsonl", [("hello", "Oh.")])
    monkeypatch.chdir(tmp_path / "here")
    end = command(capsys, "evidence", ours / "final_lora", *SHORT)
    assert end.status == 0, end.err
    found = read_json(ours / "inspected" / "final_lora" / "evidence.json")
    assert found["base"] == str(tmp_path / "there" / "model") and len(found["losses"]) == 5
    monkeypatch.chdir(tmp_path / "there")  # where it is named as it was given
    assert command(capsys, "evidence", ours / "final_lora", *SHORT).status == 0
    found = read_json(ours / "inspected" / "final_lora" / "evidence.json")
    assert (found["base"], found["held_out"]["file"]) == ("model", "held-out.jsonl")


def test_what_a_run_held_out_lies_beside_it_wherever_it_was_moved(ours, capsys, no_picture):
    write_held_out(ours / "held_out.jsonl")
    facts = read_json(ours / "run.json")["data"]
    facts["held_out"] |= {
        "file": "/gone/held_out.jsonl",
        "sha256": file_sha256(ours / "held_out.jsonl"),
    }
    change_record(ours, working_folder="/gone", data=facts)
    end = command(capsys, "evidence", ours / "final_lora", *SHORT)
    assert end.status == 0 and "warning" not in end.out, end.err


# ==== Where the report goes


def test_losses_that_are_no_numbers_are_refused(ours, capsys):
    change_tensors(ours / "final_lora", lambda tensors: {
        name: one * 1e18 for name, one in tensors.items()
    })  # fmt: skip
    know_again(ours)
    end = command(capsys, "evidence", ours / "final_lora", *SHORT)
    assert end.status == 1 and "the adapter has no loss that is a number on 4 of 4" in end.err
    assert not (ours / "inspected" / "final_lora" / "evidence.json").exists()


def test_a_foreign_adapters_report_goes_into_the_working_folder(
    capsys, no_picture, tmp_path, monkeypatch
):
    adapter = save_adapter(tmp_path / "outputs" / "checkpoint-500")
    path = write_held_out(tmp_path / "held-out.jsonl")
    monkeypatch.chdir(tmp_path)
    words = ["--eval_file", path, *SHORT]
    assert command(capsys, "evidence", "outputs/checkpoint-500", *words).status == 0
    assert (tmp_path / "inspected" / "outputs--checkpoint-500" / "report.md").is_file()
    monkeypatch.chdir(adapter)
    for more in ([], ["--output_dir", "results"]):
        end = command(capsys, "evidence", ".", *words, *more)
        assert end.status == 1 and "nothing is written into the adapter's own folder" in end.err


# ==== The report


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Return an adapter of PEFT's that was measured with everything on, and what was found."""
    folder = tmp_path_factory.mktemp("shown")
    adapter = save_adapter(folder / "adapter", target_modules=["o_proj", "up_proj"])
    lines = (ROOT / "data" / "eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    by_kind = {}
    for line in sorted(lines, key=len):
        by_kind.setdefault(json.loads(line)["kind"], []).append(line)
    chosen = [line for some in by_kind.values() for line in some[:3]]
    (folder / "eval.jsonl").write_text("".join(chosen), encoding="utf-8")
    tasks = write_lines(folder / "general.jsonl", TASKS)
    words = ["evidence", str(adapter), "--eval_file", str(folder / "eval.jsonl")]
    words += ["--device", "cpu", "--general_file", tasks, "--system", "You are Nell."]
    words += ["--max_new_tokens", "6", "--output_dir", str(folder / "found")]
    main(words)
    found = read_json(folder / "found" / "evidence.json")
    report = (folder / "found" / "report.md").read_text(encoding="utf-8")
    return types.SimpleNamespace(
        found=found, report=report, adapter=adapter, folder=folder, words=words
    )


def test_the_report_begins_with_the_verdict(shown):
    title, _, verdict, *_ = shown.report.splitlines()
    gain = shown.found["gain"]
    assert title.startswith("# ") and title.endswith("than its base")
    assert f"{gain['value']:+.4f} ± {gain['error']:.4f} nats a token" in verdict
    assert f"the loss of {len(shown.found['losses'])} held-out replies" in verdict
    headings = re.findall(r"^## (.*)", shown.report, re.MULTILINE)
    assert headings == [
        "What each part is worth", "How large the updates are", "What else was changed",
        "What the replies hold",
        "The loss by kind of line, in nats a token", "How it replies", "What was measured",
    ]  # fmt: skip
    for sentence in shown.found["conclusions"]:
        assert sentence.split(":")[0] in shown.report


@pytest.mark.parametrize(("lines", "is_too_few"), [(19, True), (20, False)])
def test_the_headline_judges_twenty_lines_and_not_nineteen(
    capsys, tmp_path, no_picture, lines, is_too_few
):
    said = [(f"hello {n}", "Oh.") for n in range(lines)]
    path = write_held_out(tmp_path / "lines.jsonl", said)
    run = measure(capsys, save_adapter(tmp_path / "adapter"), path, *SHORT)
    title = run.report.splitlines()[0]
    assert len(run.found["losses"]) == lines
    assert ("too few held-out lines to tell" in title) == is_too_few


def test_each_table_of_the_report_is_whole(shown):
    """A reply that holds Markdown must not break its table."""
    for table in re.findall(r"(?:^\|.*\n)+", shown.report, re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(counts) == 1, table
    plain = shown.report.replace("\\", "")
    for title, part in shown.found["parts"].items():
        assert f"| {title} | {part['loss']:.4f} |" in plain


def test_kinds_have_their_losses(shown):
    rows = shown.found["losses"]
    kinds = {row["group"] for row in rows}
    assert len(kinds) > 1
    for kind in kinds:
        own = [row for row in rows if row["group"] == kind]
        base = sum(row["base"] * row["tokens"] for row in own) / sum(row["tokens"] for row in own)
        name = kind.replace("_", r"\\_")
        adapter = sum(row["adapter"] * row["tokens"] for row in own)
        adapter /= sum(row["tokens"] for row in own)
        line = rf"^\| {name} \| {len(own)} \| {base:.4f} \| {adapter:.4f} \| "
        (gain,) = re.findall(line + r"([+-]\S+) \| ", shown.report, re.MULTILINE)
        assert float(gain) == pytest.approx(base - adapter, abs=2e-4)
        assert gain[0] == ("+" if base > adapter else "-")  # above 0 is better


def test_above_0_is_better_in_the_table_of_parts(shown):
    """As in the gain and by kind of line; evidence.json has the same signs."""
    trained = shown.found["parts"]["as trained"]["loss"]
    for title, part in shown.found["parts"].items():
        against = part["against_trained"]["value"]
        assert against == pytest.approx(trained - part["loss"], abs=1e-6)
        if title != "as trained":
            name = title.replace("_", r"\\_")
            (said,) = re.findall(rf"(?m)^\| {name} \| .* \| ([+-]\S+) ± ", shown.report)
            assert said == f"{against:+.4f}"
    assert "wherever two losses are compared, above 0 is better" in shown.report


def test_the_report_says_what_its_errors_are_of_and_what_is_clear(shown):
    assert (
        "one standard error of that row alone, over the held-out lines or over the other"
        in shown.report
    )
    assert "A gain is called clear if its 95 % interval leaves out 0. A part must" in shown.report
    assert "replied to 3 other tasks (one sampled reply each, 64 tokens at most)" in shown.report
    assert "greedy decoding, at most 6 tokens. The base ended" in shown.report


def test_there_is_one_gain_and_shares_say_what_they_are_of(ours, capsys, no_picture):
    path = write_held_out(ours / "held-out.jsonl")
    words = ["--eval_file", path, *PARTS, "--examples", "3"]
    end = command(capsys, "evidence", ours / "final_lora", *words)
    assert end.status == 0, end.err
    results = ours / "inspected" / "final_lora"
    found, report = read_json(results / "evidence.json"), (results / "report.md").read_text("utf-8")
    measured = [row for row in found["losses"] if row["where"] in found["parts_measured_on"]]
    assert 0 < len(measured) < len(found["losses"])
    parts_gain = found["parts"]["as trained"]["gained"]
    assert parts_gain["value"] != pytest.approx(found["gain"]["value"], abs=1e-4)
    assert (
        "Measured on 3 of 5 held-out replies, drawn by a fixed seed. All losses, in nats a"
        in report
    )
    assert "shares are of the gain on them" not in report  # of three replies there are none
    gain = found["gain"]
    # Student's quantile for four lines, of which one has half of the tokens.
    assert 2 < gain["effective_lines"] < 4
    margin = (4.302653 if gain["effective_lines"] >= 3 else 12.706205) * gain["error"]
    interval = f"{gain['value'] - margin:+.4f} to {gain['value'] + margin:+.4f}"
    base, adapter = found["loss"]["base"], found["loss"]["adapter"]
    sentence = (
        f"{gain['value']:+.4f} ± {gain['error']:.4f} nats a token (95 % interval {interval}): the "
        f"loss of 5 held-out replies of 4 lines is {base:.4f} without the adapter and "
        f"{adapter:.4f} with it "
        f"(perplexity {math.exp(base):,.1f} and {math.exp(adapter):,.1f}), and lower with it on "
        f"{found['lower_on']} of them"
    )
    assert sentence in report and sentence in end.said


def test_a_perplexity_of_any_loss_can_be_shown():
    assert [perplexity(loss) for loss in (0.0, 3.0671, 9.3, 13.9, 1e4)] == [
        "1.0", "21.5", "10,938.0", "1.1e+06", "1.0e+304",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown_text"),
    [
        ("Oh. " + "I'm sorry.\n\n" * 20 + "I'm", "Oh. I'm sorry. [20 times in a row]\n\nI'm"),
        ("You can't. " * 5, "You can't. [5 times in a row] "),
        ("You can't." + " You can't." * 4 + " You", "You can't. [5 times in a row] You"),
        ("You can't. " * 4, "You can't. " * 4),
        ("-" * 30 + " 1" * 30, "-" * 30 + " 1" * 30),
        ("it isn't " * 9 + "so", "it isn't [9 times in a row] so"),
        ("the changed " + "print changed " * 13, "the changed print [13 times in a row] changed "),
        ("a" + "banana" * 9, "a" + "banana" * 9),  # no word is cut
        ("e\u0301te\u0301 " * 6 + "e\u0301", "e\u0301te\u0301 [6 times in a row] e\u0301"),
        ("\u0915\u093f" * 9, "\u0915\u093f" * 9),  # nor a character of two signs
        ("\u597d\u3002\u5bf9\u4e0d\u8d77\u3002" + "\u5bf9\u4e0d\u8d77\u3002" * 6,
         "\u597d\u3002\u5bf9\u4e0d\u8d77\u3002 [7 times in a row]"),
    ],
)  # fmt: skip
def test_what_a_reply_says_in_a_row_is_shown_once_and_in_whole_words(text, shown_text):
    assert without_loops(text) == shown_text


def test_samples_are_what_each_says_to_one_prompt_at_a_time(shown):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32").eval()
    adapted = peft.PeftModel.from_pretrained(model, shown.adapter).eval()
    sections = shown.report.split("\n### ")[1:]
    assert len(sections) >= 6
    lines = (shown.folder / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    for section in sections:
        row = json.loads(lines[int(re.match(r"eval\.jsonl:(\d+)", section)[1]) - 1])
        text = tokenizer.apply_chat_template(
            row["prompt"], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        said = []
        for state in (adapted.disable_adapter(), contextlib.nullcontext()):
            with state:
                out = adapted.generate(
                    ids, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=0,
                )  # fmt: skip
            said.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
        table = [line for line in section.splitlines() if line.startswith("| ")][-1]
        for text in said:
            shown_text = without_loops(text).split("\n")[0]
            assert not shown_text or re.sub(r"([\\`*_\[\]<>|~$])", r"\\\1", shown_text) in table


def test_replies_that_do_not_end_are_told_before_anything_is_concluded(shown):
    sentence = "replies: 7 of 7 of the adapter's replies did not end within 6 tokens (of the"
    assert shown.found["conclusions"][0].startswith(sentence)
    assert f"\n- {sentence}" in shown.report.split("## What each part")[0]


def asked_of(*pairs, limit=200, prompts="sample"):
    """Return what was asked; of each pair of replies it is said whether they ended."""
    task = Task("a:1", [], "held_out", {})
    return [
        replies.Answered(
            task, limit, *(replies.Reply("a", ended, []) for ended in pair), f"{prompts} {number}"
        )
        for number, pair in enumerate(pairs)
    ]


def test_the_adapters_replies_that_do_not_end_are_told():
    (said,) = concluded.about_endings(asked_of((True, False), (False, True)), [])
    assert said.startswith("replies: 1 of 2 of the adapter's replies did not end within 200 tok")
    assert said.endswith(" (of the base's, 1); --max_new_tokens allows more.")
    assert concluded.about_endings(asked_of((True, True), (False, True)), []) == []


def test_replies_that_were_cut_before_they_were_judged_are_counted():
    pairs = (False, True), (True, False), (True, False), (False, True)
    (said,) = concluded.about_endings([], asked_of(*pairs, limit=80))
    assert said.startswith(
        "checks: of 4 replies each, 2 of the base's and 2 of the adapter's were cut at 80 tokens"
    )
    assert said.endswith("and hurt those that require them.")
    assert concluded.about_endings([], asked_of((True, True))) == []


def test_a_base_that_mostly_does_not_end_is_told_once():
    cut, whole = (False, True), (True, True)
    checked = asked_of(cut, cut, whole, prompts="check")
    said = concluded.about_endings(asked_of(cut, whole), checked)
    assert said[-1].startswith("base: 3 of its 5 replies were cut before they ended, so")
    assert sum("before they ended" in one for one in said) == 1
    said = concluded.about_endings(asked_of(cut, whole), asked_of(cut, whole, prompts="check"))
    assert not any("before they ended" in one for one in said)  # it is one half


def test_a_sample_whose_prompt_was_checked_as_well_is_counted_once():
    """The base's reply to it is the same, cut at another length."""
    cut, whole = (False, True), (True, True)
    said = concluded.about_endings(asked_of(cut, whole), asked_of(cut, cut, whole))
    assert said[-1].startswith("base: 2 of its 3 replies were cut before they ended")


def test_the_report_says_that_it_guessed_and_names_a_folder_without_a_branch(
    capsys, no_picture, tmp_path
):
    said = [{"role": "system", "content": "You are Nell."}, *messages_of(("hello", "Oh, hello."))]
    path = write_lines(tmp_path / "eval.jsonl", [{"messages": said}] * 2)
    adapter = save_adapter(tmp_path / "adapter")
    run = measure(capsys, adapter, path, *SHORT)
    guessed = "- system message (guessed: the one that all lines share): You are Nell."
    assert guessed in run.report
    assert re.search(r"- base: .*tiny-qwen3\.5, in float32", run.report)
    assert "by kind of line" not in run.report  # there is one kind
    run = measure(capsys, adapter, path, *SHORT, "--system", "You are Nell.")
    assert "- system message: You are Nell." in run.report


def test_samples_are_of_each_kind_up_to_20_and_others_are_drawn():
    def numbers(kinds, wanted):
        examples = [Example(f"a:{n}", [], {"kind": kind}) for n, kind in enumerate(kinds)]
        chosen = replies.choose_samples(examples, "kind", wanted)
        return [int(example.source[2:]) for example in chosen]

    assert numbers("aabbc", 0) == []
    assert numbers("aabbc", 2) == [0, 2, 4]
    assert {0, 2, 4} < set(numbers("aabbc", 4)) and numbers("aabbc", 9) == [0, 1, 2, 3, 4]
    chosen = numbers("a" * 100, 5)
    assert chosen == sorted(set(chosen)) == numbers("a" * 100, 5) and len(chosen) == 5
    assert chosen[0] == 0 and chosen[-1] > 50  # the first of its kind, and some of the whole file
    assert len(numbers([str(n) for n in range(30)], 3)) == 20


def test_a_reply_ends_at_the_first_of_the_tokens_that_end_a_turn():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    chat_format = ChatFormat(tokenizer, [3, 5])
    reply = replies.reply_of([40, 41, 5, 3, 42], chat_format)
    assert (reply.ids, reply.ended) == ([40, 41, 5], True)
    assert replies.reply_of([40, 41], chat_format).ended is False


CLEAR = Estimate(1.0, 0.1)


@pytest.fixture
def drawn(shown, capsys, monkeypatch):
    """Return a function that measures, and gives the picture and the report's text."""
    figures = []
    save = lambda figure, _: figures.append(figure)  # noqa: E731
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)

    def run(*more, gain=CLEAR):
        monkeypatch.setattr(Losses, "gain", lambda losses: gain)
        folder = shown.folder / "drawn"
        end = command(capsys, *shown.words, "--samples", "0", "--output_dir", folder, *more)
        assert end.status == 0, end.err
        return figures[-1], end.out, (folder / "report.md").read_text(encoding="utf-8")

    return run


def titles_of(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_the_picture_shows_what_was_measured(shown, drawn):
    figure, out, report = drawn()
    assert titles_of(figure) == [
        "Gain and change by strength", "What each part keeps", "Where the model was changed",
    ]  # fmt: skip
    title = figure.get_suptitle()
    assert title.endswith("\nr = 4, alpha = 32: 1.000 nats a token better than its base")
    key = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert key == ["group alone", "target alone", "cut"]
    replies_of_parts = f"% of the gain, {len(shown.found['parts_measured_on'])} replies"
    assert figure.axes[0].get_ylabel() == figure.axes[1].get_xlabel() == replies_of_parts
    (bars,) = figure.axes[1].containers[1:]
    part = shown.found["parts"]["attention alone"]["of_gain"]
    assert bars.patches[0].get_width() == pytest.approx(100 * part["value"])
    (low, high), *_ = bars.errorbar.lines[2][0].get_segments()
    assert high[0] - low[0] == pytest.approx(2 * 100 * part["error"])  # one on each side
    assert figure.get_supxlabel() == "Error bars: one standard error"
    assert "of the gain" in out and re.search(r"attention alone \| \S+ \| \S+ ± ", report)
    assert re.search(r"of the gain   against as trained   lower loss on\n", out)
    assert re.search(r"\n          best other strength: x [\d.]+ .*\d of 21\n", out)
    figure, _, _ = drawn("--checks", "0", "--general_file", "")
    assert titles_of(figure) == ["What each part keeps", "Where the model was changed"]
    figure, _, _ = drawn(*SHORT)
    assert titles_of(figure) == ["Where the model was changed"]


@pytest.mark.parametrize("gain", [Estimate(-1.0, 0.1), Estimate(0.1, 0.1)])
def test_shares_of_a_gain_that_is_none_are_nowhere(drawn, gain):
    """Not in the picture, not in the report, and not on the terminal."""
    figure, out, report = drawn("--examples", "21", "--checks", "0", gain=gain)
    assert titles_of(figure) == ["Where the model was changed"]
    assert not figure.get_supxlabel()
    assert "of the gain" not in out
    assert re.search(r"attention alone \| \S+ \|  \| \S+ ± ", report)


def test_shares_are_of_the_gain_on_the_replies_that_measure_them(shown, drawn, monkeypatch):
    """And the gain itself is that on all replies: here it is as large as their number."""
    drawn()  # which sets a gain that the next line replaces
    monkeypatch.setattr(Losses, "gain", lambda losses: Estimate(float(len(losses.tokens)), 0.1))
    folder = shown.folder / "of twenty"
    main([*shown.words, "--examples", "20", "--samples", "0", "--checks", "0",
          "--output_dir", str(folder)])  # fmt: skip
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "shares are of the gain on them, +20.0000 ± 0.1000. The last two" in report
    assert "**+21.0000 ± 0.1000 nats a token (95 % interval " in report


def test_whether_it_is_better_is_said_of_all_replies_and_not_of_some():
    """As the headline does: the replies that measure the parts may say something else."""
    losses = losses_with(0.01, 0.02)
    (said,) = concluded.conclusions([], losses, Estimate(0.5, 0.1))
    assert said.startswith("The gain is not clear on the 20 replies that measure the parts (+0.01")
    (said,) = concluded.conclusions([], losses_with(0.5, 0.1), Estimate(0.1, 0.1))
    assert said.startswith("The adapter is not clearly better than the base model")


def test_of_fewer_than_twenty_lines_the_headline_says_nothing_of_better(ours, capsys, no_picture):
    path = write_held_out(ours / "held-out.jsonl")
    words = ["--eval_file", path, *SHORT]
    assert command(capsys, "evidence", ours / "final_lora", *words).status == 0
    report = (ours / "inspected" / "final_lora" / "report.md").read_text(encoding="utf-8")
    assert report.split("\n")[0].endswith(": too few held-out lines to tell whether it is better "
                                          "than its base")  # fmt: skip


def test_conclusions_have_a_section_on_the_terminal(shown, drawn):
    _, out, _ = drawn("--examples", "3", "--checks", "0")  # of twenty-one lines
    said = " ".join(out.partition("\nmeans ")[2].split())
    assert "The replies that measure the parts are too few: 3 lines measured, 20 needed" in said
    assert out.count("means ") == 1 and "(--examples 200 measures more" in said


def test_the_adapter_is_to_the_bit_what_it_was_after_an_error_in_a_part(monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    lora = peft.LoraConfig(target_modules=["o_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    before = {name: one.clone() for name, one in adapted.state_dict().items()}
    ids = torch.tensor([[5, 6, 7]])
    logits = adapted(input_ids=ids).logits
    for part in parts.parts_of(adapted):
        with contextlib.suppress(RuntimeError), part.change_model():
            assert not adapted(input_ids=ids).logits.equal(logits)
            raise RuntimeError
        assert adapted(input_ids=ids).logits.equal(logits)
    assert all(one.equal(before[name]) for name, one in adapted.state_dict().items())


def test_the_updates_are_those_of_numpys_svd(shown):
    tensors = load_file(shown.adapter / TENSORS)
    weights = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32").state_dict()
    for target, rows in shown.found["updates"].items():
        for row in rows:
            (name,) = [one for one in tensors if f"layers.{row['layer']}." in one
                       and f"{target}.lora_A" in one]  # fmt: skip
            b = tensors[name.replace("lora_A", "lora_B")].double().numpy()
            update = 32 / 2 * b @ tensors[name].double().numpy()
            weight = weights[name.removeprefix("base_model.model.").replace("lora_A.", "")]
            energy = np.linalg.svd(update, compute_uv=False) ** 2
            assert row["update"] == pytest.approx(
                math.sqrt(energy.sum()) / weight.double().norm().item(), rel=1e-5
            )
            directions = int((energy.cumsum() < 0.9 * energy.sum()).sum()) + 1
            assert row["directions"] == directions


@pytest.mark.parametrize("std", [0.1, 1e-4])
def test_the_merged_row_is_that_of_peft_merged_into_the_files_type(
    capsys, no_picture, tmp_path, std
):
    """Rounded to bfloat16 a small update is lost; nothing is left merged."""
    adapter = save_adapter(tmp_path / "adapter", std=std)
    path = write_held_out(tmp_path / "held-out.jsonl")
    run = measure(capsys, adapter, path, *SHORT, "--examples", "9")
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype="bfloat16")
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    conversations = read_conversations(path)
    expected = [reply_loss(merged.float().eval(), tokenizer, one) for one in conversations]
    row = run.found["parts"]["merged, in bfloat16"]
    assert row["losses"] == pytest.approx(expected, abs=1e-5)
    whole = run.found["parts"]["as trained"]["losses"]
    assert row["losses"] != pytest.approx(whole, abs=1e-6) or std == 1e-4
    assert "| merged, in bfloat16 | " in run.report.replace("\\", "")
    after = run.found["parts"]["update x 0.25"]["losses"]  # measured after it, unmerged
    assert after != row["losses"]


@pytest.mark.parametrize(("difference", "is_shown"), [(4e-5, False), (6e-5, True), (-6e-5, True)])
def test_a_merge_that_changes_nothing_is_not_compared(difference, is_shown):
    """On which of the replies its loss is lower is noise then."""
    losses = losses_with(1.0, 0.01)
    merged = made_up_part("merged, in float32", 1.0)
    merged.kind, merged.losses = "merged", [0.0] * 20
    merged.against_trained = Estimate(difference, 1e-5)
    config = types.SimpleNamespace(use_rslora=False)
    found = types.SimpleNamespace(
        parts=[merged], losses=losses, measured=[*range(20)], examples=[None] * 20,
        shares_are_meant=lambda: True,
        adapter=types.SimpleNamespace(model=types.SimpleNamespace(peft_config={"default": config})),
    )  # fmt: skip
    row = markdown_parts(found).splitlines()[-1]
    compared = f" {merged.against_trained} | 0 of 20 |" if is_shown else "  |  |"
    assert row == f"| merged, in float32 | 2.0000 | 100.0 ± 0.2 % |{compared}"


def test_a_layer_that_was_merged_for_a_while_is_what_it_was():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    lora = peft.LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora).eval()
    before = {name: one.clone() for name, one in adapted.state_dict().items()}
    (part,) = parts.merged_parts(adapted, torch.bfloat16)
    ids = torch.tensor([[5, 6, 7]])
    logits = adapted(input_ids=ids).logits
    with contextlib.suppress(RuntimeError), part.change_model():
        raise RuntimeError
    assert adapted(input_ids=ids).logits.equal(logits)
    assert all(one.equal(before[name]) for name, one in adapted.state_dict().items())


def with_lora(model, *targets):
    """Return a model with new LoRA on it."""
    lora = peft.LoraConfig(target_modules=list(targets), task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora).eval()


def packed(adapted):
    """Let the weights of a model with LoRA be packed, as bitsandbytes has them."""
    for name, module in adapted.named_modules():
        if name.endswith("o_proj.base_layer"):
            weight = torch.zeros(module.weight.shape, dtype=torch.uint8)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return adapted


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=60))


WITHOUT_A_MERGED_ROW = {
    "a tied head": (
        lambda: with_lora(AutoModelForCausalLM.from_pretrained(TINY), "o_proj", "lm_head"),
        "lm_head has its weight in common with the embedding, which merging would change as well",
    ),
    "packed weights": (
        lambda: packed(with_lora(AutoModelForCausalLM.from_pretrained(TINY), "o_proj")),
        "o_proj has packed (uint8) weights",
    ),
    "other layers": (lambda: with_lora(gpt2(), "c_attn"), "c_attn is a Conv1D, no linear layer"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, on a tied head and on Conv1D
@pytest.mark.parametrize("name", WITHOUT_A_MERGED_ROW)
def test_it_is_said_why_there_is_no_row_of_the_merged_update(name):
    make, said = WITHOUT_A_MERGED_ROW[name]
    adapted = make()
    assert parts.merged_parts(adapted, torch.bfloat16) == []
    (sentence,) = concluded.what_is_not_measured(adapted)
    assert sentence == f"merged: what merging would lose was not measured, since {said}."


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_command_says_why_nothing_was_merged(capsys, tmp_path, no_picture):
    path = write_held_out(tmp_path / "held-out.jsonl")
    adapter = save_adapter(tmp_path / "adapter", target_modules=["o_proj", "lm_head"])
    run = measure(capsys, adapter, path, *PARTS)
    assert "merged: what merging would lose was not measured, since lm_head" in run.said
    assert "merged: what merging would lose" in run.report
    assert not [title for title in run.found["parts"] if title.startswith("merged")]
    adapter = save_adapter(tmp_path / "plain", target_modules=["o_proj"])
    run = measure(capsys, adapter, path, *PARTS)
    assert "what merging would lose" not in run.said + run.report
    assert [title for title in run.found["parts"] if title.startswith("merged")]


@pytest.mark.parametrize(("share", "is_said"), [(0.9, True), (0.99, False), (1.1, False)])
def test_a_lossy_merge_is_told_and_no_other(share, is_said):
    merged = made_up_part("merged, in bfloat16", share)
    merged.kind = "merged"
    said = concluded.about_merging([merged])
    assert bool(said) == is_said and ("keeps 90.0 ± 0.2 %" in said) == is_said


# ==== What else was changed


def test_kl_and_other_tokens_are_those_of_weights_merged_by_hand(shown):
    merged = MergedByHand(TINY, shown.adapter / TENSORS, lambda _: 32 / 2)
    random = np.random.default_rng(3)
    examples = []
    for reply in (1, 5, 9):
        ids = [int(n) for n in random.integers(10, 2000, 12 + reply)]
        examples.append(Example("made up", [], prompt_ids=ids[:12], reply_ids=ids[12:]))
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(TINY, dtype="float32"), shown.adapter
    ).eval()
    shifts = elsewhere.shifts_of(model, examples, [0.5, 1.0, 2.0])
    for strength, shift in shifts.items():
        kls, others = [], []
        for example in examples:
            p, q = (
                merged.logits(example.input_ids, one)[-len(example.reply_ids) - 1 : -1]
                .double()
                .log_softmax(-1)
                for one in (0.0, strength)
            )
            kls.append((p.exp() * (p - q)).sum().item())
            others.append((p.argmax(-1) != q.argmax(-1)).sum().item())
        assert shift.kl == pytest.approx(kls, rel=1e-3, abs=1e-5)
        assert shift.other == others and shift.tokens == [1, 5, 9]
        assert shift.kl_a_token().value == pytest.approx(sum(kls) / 15, rel=1e-3)


@pytest.mark.parametrize("examples", [1, 2, 5])
def test_the_report_names_topics_of_the_packages_tasks_that_were_measured(
    capsys, no_picture, tmp_path, examples
):
    path = write_held_out(tmp_path / "held-out.jsonl")
    words = [*SHORT, "--general_file", GENERAL_FILE, "--examples", examples]
    places = []
    for number in (1, 2):
        adapter = save_adapter(tmp_path / f"adapter-{number}", std=0.1 * number)
        run = measure(capsys, adapter, path, *words)
        places.append([int(where.split(":")[1]) for where in run.found["elsewhere"]["measured_on"]])
    assert places[0] == places[1] == [number + 1 for number in draw_numbers(160, examples)]
    lines = GENERAL_FILE.read_text(encoding="utf-8").splitlines()
    measured = {json.loads(lines[place - 1])["topic"] for place in places[0]}
    (said,) = re.findall(r"replied to \d other tasks?, such as (.*) \(one sampled", run.report)
    named = re.split(r", | and ", said)
    assert len(named) == min(examples, 3, len(measured))
    assert {name.replace(" or ", "_and_").replace(" ", "_") for name in named} <= measured


def test_a_tasks_own_system_message_is_used_instead_of_the_trainings(shown, monkeypatch):
    asked = []
    generate = elsewhere.generate

    def watched(model, chat_format, prompts, *more):
        asked.append([chat_format.tokenizer.decode(ids) for ids in prompts])
        return generate(model, chat_format, prompts, *more)

    monkeypatch.setattr(elsewhere, "generate", watched)
    again = str(shown.folder / "again")
    main([*shown.words, "--examples", "3", "--samples", "0", "--output_dir", again])
    without, with_it = asked
    assert ["You are Nell." in text for text in without] == [False, False, False]
    assert ["You are Nell." in text for text in with_it] == [True, True, False]
    assert "You are a parrot." in without[2] and without[2] == with_it[2]
    found = read_json(shown.folder / "again" / "evidence.json")["elsewhere"]
    assert found["tasks"] == 3 and found == shown.found["elsewhere"]  # the same in each run
    rows = [row["kl"]["value"] for key, row in found["no system message"].items() if "x" in key]
    assert rows == sorted(rows) and rows[0] > 0 and len(rows) == 7


def shift(kl):
    return elsewhere.Shift(kl=list(kl), other=[1.0] * len(kl), tokens=[10] * len(kl))


def test_a_weaker_update_is_named_only_if_it_keeps_the_gain_and_moves_less():
    def said(share, error, shifts):
        half = parts.Part("strength", 0.5, "update x 0.5", None, of_gain=Estimate(share, error))
        return concluded.about_strength([half], shifts, "ADAPTER")

    shifts = {0.5: shift([1.0, 1.1, 0.9] * 7), 1.0: shift([2.0, 2.2, 1.9] * 7)}
    text = said(0.98, 0.005, shifts)
    assert text.startswith("strength: x 0.5: 98.0 ± 0.5 % of the gain at 0.49 ± 0.00 times the KL ")
    assert "picked among 1 weaker" in text and "the checks were not asked at it" in text
    assert "`export ADAPTER FOLDER --scale 0.5` writes it" in text
    assert not any(word in text for word in ("far", "costs", "if other tasks matter"))
    assert "x 0.5: 102.0 ± 0.5 % of the gain" in said(1.02, 0.005, shifts)
    assert said(0.94, 0.005, shifts) == said(0.98, 0.02, shifts) == ""
    # The interval of the share must lie above 95 %: 1.96 errors of one, three of the best of two.
    assert said(0.98, 0.0153, shifts) != "" and said(0.98, 0.0154, shifts) == ""
    several = shifts | {0.25: shift([0.5, 0.6, 0.4] * 7)}
    quarter = parts.Part("strength", 0.25, "", None, of_gain=Estimate(0.5, 0.01))
    for error, is_said in ((0.0099, True), (0.0101, False)):
        half = parts.Part("strength", 0.5, "", None, of_gain=Estimate(0.98, error))
        text = concluded.about_strength([quarter, half], several, "ADAPTER")
        assert text.startswith("strength: x 0.5: 98.0") is is_said
    # Twenty-one tasks whose KL is 3 % less are told, and 1 % less are not worth it.
    less = {0.5: shift([0.97, 0.98, 0.96] * 7), 1.0: shift([1.0] * 21)}
    assert "at 0.97 ± 0.00 times the KL" in said(0.98, 0.005, less)
    assert said(0.98, 0.005, less | {0.5: shift([0.99, 0.98, 1.0] * 7)}) == ""
    assert said(0.98, 0.005, {0.5: shift([0.1, 4.0]), 1.0: shift([2.0, 2.1])}) == ""


@pytest.mark.parametrize(("tasks", "is_said"), [(19, False), (20, True)])
def test_of_fewer_than_twenty_tasks_no_change_is_told(tasks, is_said):
    names = [f"tasks.jsonl:{number}" for number in range(tasks)]
    some = elsewhere.Elsewhere(names, {1.0: shift(([1.0, 1.1] * 10)[:tasks])}, None)
    said = concluded.about_change(some)
    assert ("the KL divergence from the base is 0.1" not in said) is not is_said
    few = "change: 19 other tasks cannot tell how far the model was moved; 20 are needed"
    assert (said == f"{few}.") is not is_said
    of_more = concluded.about_change(some, 360)
    assert of_more.startswith(f"{few} (--examples 200 measures more") is not is_said
    shifts = {0.5: shift([0.1, 0.11] * 10), 1.0: shift([0.2, 0.22] * 10)}
    for one in shifts.values():
        for numbers in (one.kl, one.other, one.tokens):
            del numbers[tasks:]
    half = parts.Part("strength", 0.5, "", None, of_gain=Estimate(0.99, 0.001))
    assert bool(concluded.about_strength([half], shifts, "ADAPTER")) is is_said


def test_the_row_with_the_system_message_is_said_to_be_on_other_replies(
    shown, capsys, no_picture, tmp_path
):
    last = "The last row is on other replies, which the base sampled with the training's system "
    assert f"{last}message; it is not paired with the others." in shown.report
    path = write_held_out(tmp_path / "held-out.jsonl")
    tasks = ["--general_file", write_lines(tmp_path / "general.jsonl", TASKS[1:2])]
    run = measure(capsys, save_adapter(tmp_path / "adapter"), path, *PARTS, *tasks)
    assert "The last row" not in run.report and "replied to 1 other task" in run.report


# ==== Kinds and the headline


def found_of(base, trained, kinds=None):
    """Return made-up findings of one line of 100 tokens each; losses are in nats a token."""
    losses = Losses(*([100 * one for one in losses] for losses in (trained, base)),
                    [100] * len(base), [f"a:{n}" for n in range(len(base))])  # fmt: skip
    return types.SimpleNamespace(
        losses=losses, groups=lambda: kinds, group="kind",
        mean=lambda some: sum(some) / sum(losses.tokens),
    )  # fmt: skip


def test_a_kind_of_fewer_than_twenty_lines_has_no_error_and_kinds_that_are_cut_are_counted():
    base = [3.0 + 0.01 * n for n in range(39)]
    rows = markdown_kinds(found_of(base, [2.0] * 39, ["a"] * 19 + ["b"] * 20)).splitlines()
    assert re.search(r"\| b \| 20 \| .* \| \+1\.2850 ± 0\.0132 \| 20 of 20 \|", rows[-2])
    assert re.search(r"\| a \| 19 \| .* \| \+1\.0900 \| 19 of 19 \|", rows[-1])
    kinds = [f"kind {n}" for n in range(41)]
    for count, cut in ((40, ""), (41, " Left out: 1 more kind.")):
        found = found_of([3.0] * count, [2.0] * count, kinds[:count])
        text = markdown_kinds(found)
        assert "Kinds are not compared with each other." in text
        assert text.count("| kind ") == 41 and ("Left out" in text) is bool(cut) and cut in text


@pytest.mark.parametrize(
    ("adapter", "said"),
    [(2.99996, "no difference from its base that shows at four digits"),
     (3.00004, "no difference from its base that shows at four digits"),
     (2.99994, "less than 0.001 nats a token better than its base"),
     (3.00006, "less than 0.001 nats a token worse than its base")],
)  # fmt: skip
def test_losses_that_look_equal_are_not_called_better(adapter, said):
    assert headline(found_of([3.0] * 20, [adapter] * 20)) == said


# ==== The estimator


def test_ratios_error_is_the_jackknifes_on_fixed_numbers():
    found = ratio_with_error([1.0, -2.0, 4.5, 0.5], [3.0, 1.0, 8.0, 4.0])
    assert found.value == 0.25
    # The residuals are 0.25, -2.25, 2.5 and -0.5; without their examples 13, 15, 8 and 12 are left.
    squares = (0.25 / 13) ** 2 + (2.25 / 15) ** 2 + (2.5 / 8) ** 2 + (0.5 / 12) ** 2
    assert found.error == pytest.approx(math.sqrt(squares * 3 / 4), rel=1e-12)
    # Of equal denominators it is the error of a mean.
    found = ratio_with_error([1.0, 2.0, 4.0, 5.0], [2.0] * 4)
    assert found.error == pytest.approx(math.sqrt((4 + 1 + 1 + 4) / 3 / 4) / 2, rel=1e-12)
    assert ratio_with_error([1.0, 2.0], [3.0, 0.0]).error == math.inf


def test_ratios_error_is_that_of_a_bootstrap_over_examples():
    random = np.random.default_rng(5)
    tokens = random.integers(10, 90, 150).astype(float)
    change = tokens * random.normal(-0.3, 0.4, 150)
    found = ratio_with_error([*change], [*tokens])
    picks = random.integers(0, 150, (4000, 150))
    resampled = change[picks].sum(1) / tokens[picks].sum(1)
    assert found.error == pytest.approx(resampled.std(), rel=0.08)
    assert found.is_clear() and abs(found.value) > 2 * found.error


# Student's quantiles, from tables.
@pytest.mark.parametrize(
    ("lines", "comparisons", "needed"),
    [(2, 1, 12.706), (3, 1, 4.303), (10, 1, 2.262), (20, 1, 2.093), (51, 1, 2.009),
     (281, 1, 1.968), (10, 5, 3.250), (31, 50, 3.646), (None, 1, 1.960), (None, 780, 3.997),
     (10, 2, 3.0), (281, 6, 3.0), (None, 18, 3.0), (None, 19, 3.008)],
)  # fmt: skip
def test_how_many_errors_are_clear_depends_on_the_lines_and_on_the_comparisons(
    lines, comparisons, needed
):
    assert errors_needed(comparisons, lines) == pytest.approx(needed, abs=1e-3)
    for errors, is_clear in ((needed - 0.002, False), (needed + 0.002, True)):
        assert Estimate(-errors, 1.0, lines).is_clear(comparisons) is is_clear
    assert not Estimate(1e9, 1.0, 1).is_clear() and not Estimate(1e9, 0.0, 1.5).is_clear()


def test_a_long_line_makes_the_effective_lines_fewer():
    numbers = [1.0, -2.0, 3.0, -4.0]
    assert ratio_with_error(numbers, [5.0] * 4).effective_lines == 4
    assert ratio_with_error(numbers, [5.0, 5.0, 5.0, 15.0]).effective_lines == 3
    assert Estimate(13.0, 3.0, 3).is_clear() and not Estimate(13.0, 3.0, 2.99).is_clear()
    tenths = ratio_with_error(numbers * 3, [0.1] * 12)  # whose sum is not quite 1.2
    assert tenths.margin() == pytest.approx(2.200985 * tenths.error)


def test_replies_of_one_line_count_as_one_example():
    """They are alike: here each line's replies have the same difference, so two lines tell two."""
    changes, tokens = [1.0, 1.0, 1.0, 5.0, 5.0], [10.0, 10.0, 10.0, 20.0, 20.0]
    found = ratio_with_error(changes, tokens, ["a:1", "a:1", "a:1", "a:2", "a:2"])
    assert found == ratio_with_error([3.0, 10.0], [30.0, 40.0])
    assert found.error > 1.5 * ratio_with_error(changes, tokens).error
    one_line = ratio_with_error(changes, tokens, ["a:1"] * 5)
    assert one_line.error == math.inf and not one_line.is_clear()


@pytest.mark.parametrize(("value", "clear"), [(0.197, True), (-0.197, True), (0.195, False)])
def test_a_difference_is_clear_if_its_interval_leaves_out_0(value, clear):
    assert Estimate(value, 0.1).is_clear() is clear
    assert Estimate(0.1234, 0.01).interval() == "+0.1038 to +0.1430"
    assert Estimate(0.1, math.inf, 1).interval() == "? to ?"


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (6, 0, 2 / 64), (0, 6, 2 / 64), (3, 1, 0.625)],
)
def test_mcnemars_test_is_the_exact_one(lost, won, p):
    assert mcnemar(lost, won) == pytest.approx(p)


@pytest.mark.parametrize("period", [2, 3, 5, 7, 12])
def test_no_kind_is_missed_where_kinds_take_turns(period):
    """Every second line of a hundred would be of one kind alone."""
    assert {number % period for number in draw_numbers(100, 50)} == set(range(period))


@pytest.mark.parametrize(
    ("count", "wanted"), [(100, 0), (100, 1), (100, 99), (9, 9), (3, 9), (0, 5)]
)
def test_so_many_numbers_are_drawn_as_are_wanted_and_there(count, wanted):
    numbers = draw_numbers(count, wanted)
    assert numbers == sorted(set(numbers)) == draw_numbers(count, wanted)
    assert len(numbers) == min(count, wanted) and set(numbers) <= set(range(count))


def test_at_most_the_wanted_examples_measure_the_parts(capsys, no_picture, tmp_path):
    path = write_held_out(tmp_path / "six.jsonl", [("hello", f"Oh, {n}.") for n in range(6)])
    said = []
    for number in (1, 2):  # two adapters are measured on the same ones
        adapter = save_adapter(tmp_path / f"adapter-{number}", std=0.1 * number)
        run = measure(capsys, adapter, path, *PARTS, "--examples", "3")
        assert len(run.found["losses"]) == 6
        assert len(run.found["parts"]["as trained"]["losses"]) == 3
        said.append([int(where.rpartition(":")[2]) for where in run.found["parts_measured_on"]])
    assert said[0] == said[1] == [number + 1 for number in draw_numbers(6, 3)]


# ==== The sentences


def losses_with(gain, error, lines=20):
    """Return made-up losses whose gain has this value and this error, of that many lines."""
    each = [gain + error * math.sqrt(lines) * (-1) ** n * math.sqrt((lines - 1) / lines)
            for n in range(lines)]  # fmt: skip
    return Losses([0.0] * lines, each, [1] * lines, [f"a:{n}" for n in range(lines)])


def made_up_part(title, share):
    """Return a part that keeps this share of a gain of 1 nat.

    share may be (share, its error) or (share, its error, effective lines).
    """
    value, *rest = share if isinstance(share, tuple) else (share, 0.002)
    kind, what = "group", title.removesuffix(" alone")
    if title.startswith("update x "):
        kind, what = "strength", float(title.removeprefix("update x "))
    elif title.startswith("cut to "):
        kind, what = "cut", int(title.split()[2])
    return parts.Part(
        kind, what, title, contextlib.nullcontext, loss=3 - value,
        of_gain=Estimate(value, *rest), against_trained=Estimate(value - 1, *rest),
    )  # fmt: skip


def conclusions(lines=20, **shares):
    """Return the sentences on a made-up table, as one text."""
    made_up = [made_up_part(title, share) for title, share in shares.items()]
    losses = losses_with(1.0, 0.01, lines)
    return "\n".join(concluded.conclusions(made_up, losses, losses.gain()))


SCALES = {f"update x {scale}": 0.9 for scale in ("0.25", "0.5", "0.75", "1.25", "1.5", "2")}


def cuts(four, two, one):
    return {"cut to 4 directions": four, "cut to 2 directions": two, "cut to 1 direction": one}


def groups(**shares):
    return {f"{name.replace('_', '-')} alone": share for name, share in shares.items()}


SENTENCES = {
    "better weaker": (
        SCALES | {"update x 0.75": 1.06, "update x 0.5": 1.03},
        ["alpha: at x 0.75 ", "(106.0 ± 0.2 % of the gain; the best of 6 strengths, on these",
         "it is too strong for the loss", "smaller alpha. `export --scale 0.75` writes it; its KL "
         "on the other tasks was not measured, and the checks were not asked at it."],
        ["the run", "epochs", "or `export"],
    ),
    "better stronger": (
        SCALES | {"update x 1.5": 1.2, "update x 2": 1.1},
        ["alpha: at x 1.5 ", "120.0 ± 0.2 %", "it is too weak for the loss", "a longer training",
         "larger alpha. `export --scale 1.5` writes it; its KL on the other tasks was not me"],
        ["the run", "epochs", "or `export"],
    ),
    "three hundredths matter": (SCALES | {"update x 1.25": 1.03}, ["alpha: at x 1.25 "], []),
    "worse": (
        SCALES,
        ["no other strength that was tried (x 0.25 to x 2) has a clearly lower loss (by over 2 %"],
        ["1.25", "too strong", "weak", "right"],
    ),
    "hardly better": (SCALES | {"update x 1.25": 1.015}, ["alpha: no other"], ["1.25"]),
    "not clearly better": (
        SCALES | {"update x 1.25": (1.02, 0.0099)}, ["alpha: no other"], ["1.25"],
    ),
    "perhaps better by 5 %": (
        SCALES | {"update x 1.25": (1.02, 0.0101)}, ["alpha: too few"], ["1.25"],
    ),
    # By chance alone one of six is better by two errors in every eighth table.
    "the best of six by 2.9 errors": (
        SCALES | {"update x 1.25": (1.29, 0.1)}, ["alpha: too few", "--examples 200"],
        ["1.25"],
    ),
    "the best of six by 3.1": (
        SCALES | {"update x 1.25": (1.31, 0.1)}, ["alpha: at x 1.25 "], [],
    ),
    # The errors of 12 effective lines are uncertain themselves.
    "the best of six by 3.1 errors of 12 effective lines": (
        SCALES | {"update x 1.25": (1.31, 0.1, 12)}, ["alpha: too few"], ["1.25"],
    ),
    "the best of six by 3.3 errors of 12 effective lines": (
        SCALES | {"update x 1.25": (1.33, 0.1, 12)}, ["alpha: at x 1.25 "], [],
    ),
    "the lowest mean may be noise": (
        SCALES | {"update x 2": (1.3, 0.4), "update x 1.25": (1.1, 0.01)}, ["alpha: at x 1.25 "],
        [],
    ),
    "a group that keeps the gain": (
        groups(attention=0.7, feed_forward=0.995), ["feed-forward alone keeps 99.5 ± 0.2 %"], [],
    ),
    "no group keeps it": (
        groups(attention=0.7, feed_forward=0.9, conv=0.4),
        ["each group alone clearly loses some of the gain: attention keeps 70.0 ± 0.2 %, "
         "feed-forward keeps 90.0 ± 0.2 %, conv keeps 40.0 ± 0.2 %."], [],
    ),
    "a group that is better alone": (
        groups(attention=1.1, feed_forward=0.5), ["attention alone keeps 110.0 ± 0.2 %"],
        ["each group alone"],
    ),
    # 92 % with an error of 4.9 % may be 82 %, and may be 102 %.
    "what may lose a tenth is not the same": (
        groups(attention=0.4, feed_forward=(0.92, 0.049)), ["too few held-out"], ["alone keeps"],
    ),
    "one of two groups by 2.9 errors": (
        groups(attention=(0.71, 0.1), feed_forward=0.5), ["too few held-out"], ["attention"],
    ),
    "one of two groups by 3.1 errors": (
        groups(attention=(0.69, 0.1), feed_forward=0.5),
        ["each group alone clearly loses some of the gain: attention keeps 69.0 ± 10.0 %"], [],
    ),
    "the same with 2.9 errors between it and 95 %": (
        groups(attention=(0.979, 0.01), feed_forward=0.5), ["too few held-out"], [],
    ),
    "the same with 3.1 errors between it and 95 %": (
        groups(attention=(0.981, 0.01), feed_forward=0.5), ["attention alone keeps 98.1 ± 1.0"], [],
    ),
    "the smallest cut": (
        cuts(1.001, 0.99, 0.9),
        ["r: cut to 2 directions (the strongest), the update keeps 99.0 ± 0.2 % of the gain."],
        ["needs no more"],
    ),
    # It is told as it was measured, and not that it is enough.
    "a cut that clearly loses a little": (
        cuts((0.97, 0.001), 0.9, 0.8),
        ["r: cut to 4 directions (the strongest), the update keeps 97.0 ± 0.1 %", "larger r"],
        ["another run, and may end"],
    ),
    "every cut loses": (
        cuts(0.9, 0.8, 0.5), ["r: cut to 4 ", "keeps 90.0 ± 0.2 % of", "larger r"], ["uses all"],
    ),
    "a cut that is better": (
        cuts(1.1, 1.05, 0.6), ["r: cut to 2 directions (the strongest)"], ["larger r"],
    ),
    "a milder cut loses clearly": (cuts(0.94, 0.9, (0.97, 0.04)), ["keeps 94.0"], ["to 1 "]),
    "a large loss that is not clear": (cuts(0.97, 0.9, (0.5, 0.3)), ["cut to 4"], ["cut to 1 "]),
    "nobody can tell": (cuts((0.9, 0.3), (0.9, 0.3), (0.5, 0.3)), ["r: too few held-out"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", SENTENCES)
def test_a_sentence_is_said_only_where_the_numbers_bear_it(name):
    shares, said, unsaid = SENTENCES[name]
    text = conclusions(**shares)
    assert all(one in text for one in said) and not any(one in text for one in unsaid), text


STRONGER = {0.75: shift([1.3, 1.5, 1.4] * 7), 1.0: shift([2.0, 2.2, 1.9] * 7)}
STRONGER[1.5] = shift([3.4, 3.7, 3.0] * 7)


@pytest.mark.parametrize(("scale", "times"), [("1.5", "1.66 ± 0.01"), ("0.75", "0.69 ± 0.01")])
def test_a_strength_that_may_be_written_is_no_advice_but_told_with_its_kl(scale, times):
    """What is not known of it is said, too: at another strength no check was asked."""
    part = made_up_part(f"update x {scale}", 1.2)
    losses = losses_with(1.0, 0.01)
    gain = losses.gain()
    (text,) = concluded.conclusions([part], losses, gain, shifts=STRONGER)
    assert text.endswith(
        f". `export --scale {scale}` writes it, at {times} times the KL on the other tasks; the "
        "checks were not asked at it."
    )
    (advice,) = re.findall(r"Worth trying next: (.*?)\.", text)
    assert "alpha" in advice and "export" not in advice
    part.gained, losses = Estimate(0.2, 0.01), losses_with(-0.5, 0.01)
    texts = concluded.conclusions([part], losses, losses.gain(), shifts=STRONGER)
    weaker = "x 0.75 has the lowest loss of 1 weaker one on these replies"
    assert (weaker in texts[0]) == (f"at {times} times the KL on the other tasks" in texts[0])
    assert (weaker in texts[0]) == (scale == "0.75")
    assert ("the checks were not asked at it" in texts[0]) == (scale == "0.75")


@pytest.mark.parametrize(("tasks", "is_told"), [(19, False), (20, True)])
def test_of_nineteen_tasks_no_strength_is_told_the_kl(tasks, is_told):
    shifts = {1.5: shift([3.0] * tasks), 1.0: shift([2.0] * tasks)}
    said = concluded.about_export(1.5, shifts)
    assert said.endswith("the checks were not asked at it.")
    assert ("at 1.50 ± 0.00 times the KL on the other tasks" in said) == is_told
    assert ("the other tasks are too few to tell its KL, and" in said) != is_told


def test_of_two_weaker_updates_that_are_better_the_better_one_may_be_written():
    losses = losses_with(-0.5, 0.01)
    gains = {0.25: (0.1, 0.01), 0.5: (0.4, 0.01), 0.75: (0.2, 0.01), 1.5: (0.9, 0.01)}
    strengths = [
        parts.Part("strength", one, "", None, gained=Estimate(*gained), loss=3 - gained[0])
        for one, gained in gains.items()
    ]
    (text,) = concluded.conclusions(strengths, losses, losses.gain())
    assert "x 0.5 has the lowest loss of 3 weaker ones" in text
    assert "`export --scale 0.5` writes it; its KL on the other tasks was not measured" in text


def test_what_a_better_strength_does_elsewhere_is_told_by_the_command(
    capsys, tmp_path, monkeypatch, no_picture
):
    """Its KL is measured after the parts, and the sentence has it all the same."""
    losses = {"base": 3.0, "adapter": 2.0, "update x 1.5": 1.0}

    def made_up(_, examples, title):
        each = losses.get(title, 2.5)
        return [len(one.reply_ids) * (each + 0.01 * (-1) ** n) for n, one in enumerate(examples)]

    monkeypatch.setattr("inspect_lora.evidence.losses_of", made_up)
    monkeypatch.setattr(parts, "losses_of", made_up)
    adapter = save_adapter(tmp_path / "adapter")
    path = write_held_out(tmp_path / "lines.jsonl", [(f"hello {n}", "Oh.") for n in range(24)])
    prompts = [{"prompt": f"Name {n} colours."} for n in range(2, 22)]
    words = ["--general_file", write_lines(tmp_path / "tasks.jsonl", prompts), "--examples", "24"]
    run = measure(capsys, adapter, path, *PARTS, *words)
    moved = [
        run.found["elsewhere"]["no system message"][x]["kl"]["value"] for x in ("x 1.5", "x 1")
    ]
    (text,) = [one for one in run.found["conclusions"] if one.startswith("alpha: at x 1.5")]
    assert f"`export --scale 1.5` writes it, at {moved[0] / moved[1]:.2f} ± " in text
    assert "the checks were not asked at it" in run.said and "alpha: at x 1.5" in run.report


def test_the_strength_that_is_shown_is_the_one_that_is_spoken_of():
    """One with a lower loss that is not clearly better is neither."""
    shares = SCALES | {"update x 0.75": 1.06, "update x 1.5": (1.2, 0.1)}
    assert "alpha: at x 0.75 " in conclusions(**shares)
    telling = telling_parts([made_up_part(title, share) for title, share in shares.items()])
    assert [part.value for part in telling] == [0.75]
    telling = telling_parts([made_up_part(title, share) for title, share in SCALES.items()])
    assert [part.value for part in telling] == [0.25]  # the first of equal ones


def test_nineteen_held_out_lines_support_no_conclusion_and_twenty_do():
    text = conclusions(lines=19, **SCALES | cuts(1, 1, 1))
    assert "too few to tell" in text and "19 measured, 20 needed" in text
    assert "alpha" not in text and "alpha: " in conclusions(lines=20, **SCALES)


FEW_OF_PARTS = "The replies that measure the parts are too few"


@pytest.mark.parametrize(
    ("of_parts", "of_all", "gain", "said"),
    [
        (19, 19, 1.0, "The held-out lines are too few to tell anything: 19 measured, 20 needed."),
        (19, 19, -1.0, "The held-out lines are too few to tell anything: 19 measured, 20 needed."),
        (19, 20, 1.0, f"{FEW_OF_PARTS}: 19 lines measured, 20 needed"),
        (1, 20, 1.0, f"{FEW_OF_PARTS}: 1 line measured, 20 needed"),
        (20, 20, 1.0, "alpha: "),
        (19, 20, -1.0, "The adapter is worse than the base model. If the run's"),
        (20, 20, -1.0, "The adapter is worse than the base model, and no weaker update is clearly"),
        (19, 20, 0.001, "The adapter is not clearly better than the base model"),
    ],
)
def test_whether_the_adapter_is_better_is_said_before_that_the_parts_have_few_lines(
    of_parts, of_all, gain, said
):
    made_up = [made_up_part(title, share) for title, share in SCALES.items()]
    losses = losses_with(gain, 0.01, of_parts)
    found = concluded.conclusions(made_up, losses, Estimate(gain, 0.01, of_all), of_all)
    assert len(found) == 1 and found[0].startswith(said), found
    assert ("--examples 200" in found[0]) is said.startswith("The replies that measure")


@pytest.mark.parametrize(
    ("gain", "gained", "said"),
    [
        # With SmolLM2 eight epochs over 40 conversations ended there.
        ((-0.5, 0.01), {0.5: (0.2, 0.05), 1.5: (-0.7, 0.01)}, "worse than the base.*too strong"),
        ((0.01, 0.02), {0.5: (0.3, 0.05)}, "not clearly better than the base.*export --scale"),
        ((0.01, 0.02), {0.5: (0.099, 0.05), 0.25: (0.149, 0.05)}, "More steps"),
        (
            (0.01, 0.02),
            {0.5: (0.099, 0.05), 0.25: (0.151, 0.05)},
            "not clearly better than the base.*export --scale",
        ),
        ((0.01, 0.02), {0.5: (0.097, 0.05)}, "More steps"),
        # An update that does harm at every strength does less of it when it is weaker.
        ((-0.5, 0.01), {0.75: (0.17, 0.09), 1.25: (0.3, 0.01)}, "worse.*memorized.*template"),
        ((-0.5, 0.01), {0.75: (-0.2, 0.01)}, "worse.*memorized.*template"),
    ],
)
def test_without_a_clear_gain_nothing_is_said_of_the_parts(gain, gained, said):
    strengths = [
        parts.Part("strength", strength, "", contextlib.nullcontext, gained=Estimate(*one))
        for strength, one in gained.items()
    ]
    losses = losses_with(*gain)
    text = "\n".join(concluded.conclusions(strengths, losses, losses.gain()))
    assert re.search(said, text) and not re.search("^(alpha|r|targets):", text, re.MULTILINE)
    assert ("More steps" in text) == (said == "More steps")
    assert not re.search("is (not better|no better) than", text)  # that cannot be known


def test_of_weaker_updates_nothing_is_said_if_none_was_measured():
    """As of DoRA, which is not scaled."""
    losses = losses_with(-0.5, 0.01)
    (said,) = concluded.conclusions([], losses, losses.gain())
    assert said.startswith("The adapter is worse than the base model. If the run's") is True
    weaker = parts.Part("strength", 0.5, "", None, gained=Estimate(-0.2, 0.01))
    (said,) = concluded.conclusions([weaker], losses, losses.gain())
    assert said.startswith("The adapter is worse than the base model, and no weaker update is cl")


def test_experts_are_of_the_module_that_holds_them_all():
    layers = dict.fromkeys(
        ["model.layers.0.mlp.experts.3.up_proj", "model.layers.0.self_attn.q_proj", "lm_head"]
    )
    assert parts.paths_by_sublayer(layers) == {
        "attention": {"model.layers.0.self_attn.q_proj"},
        "experts": {"model.layers.0.mlp.experts.3.up_proj"},
        "lm_head": {"lm_head"},
    }
