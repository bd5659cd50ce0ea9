"""A report's folder: whose it is, and that a finished report stays until the next one is whole."""

import errno
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from on_tiny import (
    PARTS,
    SHORT,
    copy_of_run,
    listing,
    measure,
    messages_of,
    read_json,
    save_adapter,
    write_held_out,
    write_lines,
)
from processes import Fork, run_in_a_fork
from tiny_adapters import command

import inspect_lora.elsewhere as elsewhere
import inspect_lora.evidence as evidence
import inspect_lora.parts as parts
import inspect_lora.report_folder as report_folder


@pytest.fixture
def ours(finished, tmp_path, no_picture):
    """Return a copy of a finished run's output folder."""
    return copy_of_run(finished, tmp_path / "output")


@pytest.fixture
def eval_file(tmp_path):
    return write_held_out(tmp_path / "held-out.jsonl")


# ==== Whose it is


def test_two_adapters_of_one_name_have_folders_of_their_own(
    capsys, no_picture, tmp_path, monkeypatch, eval_file
):
    """Many an adapter is called out/checkpoint-5, and `compare` must find each of them."""
    for number, folder in enumerate(("exp1", "exp2", "exp3/exp2")):
        save_adapter(tmp_path / folder / "out" / "checkpoint-5", std=0.1 + 0.1 * number)
    words = ["--eval_file", eval_file, *SHORT]
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second report of each takes the place of its own first one
        for folder in ("exp1", "exp2", "exp3/exp2"):
            end = command(capsys, "evidence", f"{folder}/out/checkpoint-5", *words)
            assert end.status == 0, end.err
    assert sorted(path.name for path in Path("inspected").iterdir()) == [
        "exp2--out--checkpoint-5", "exp3--exp2--out--checkpoint-5", "out--checkpoint-5",
    ]  # fmt: skip
    end = command(capsys, "compare", "inspected")
    assert end.status == 0 and "left out" not in end.out
    assert [end.out.count(f"adapter {one}/out/checkpoint-5") for one in ("exp1", "exp3/exp2")] == [
        1, 1,
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path / "exp2")
    assert command(capsys, "evidence", "out/checkpoint-5", *words).status == 0
    assert Path("inspected/out--checkpoint-5/report.md").is_file()


def test_another_adapters_output_dir_is_refused_before_anything_is_read(
    capsys, no_picture, tmp_path, eval_file
):
    words = ["--eval_file", eval_file, *SHORT, "--output_dir", tmp_path / "found"]
    first, second = (save_adapter(tmp_path / name, std=std) for name, std in (("a", 0.1), ("b", 1)))
    assert command(capsys, "evidence", first, *words).status == 0
    before = listing(tmp_path / "found")
    end = command(capsys, "evidence", second, *words)
    assert end.status == 1 and f"holds the report of another adapter ({first})" in end.err
    assert "give each its own --output_dir" in end.err and listing(tmp_path / "found") == before
    first.rename(tmp_path / "moved")  # the same adapter under its new name
    assert command(capsys, "evidence", tmp_path / "moved", *words).status == 0


# ==== A finished report stays until the next one is whole


def test_an_earlier_report_is_renamed_by_the_next(ours, capsys):
    for _ in range(2):
        assert command(capsys, "evidence", ours / "final_lora", *SHORT).status == 0
    names = sorted(path.name for path in (ours / "inspected" / "final_lora").iterdir())
    assert len(names) == 8 and names[0] == "evidence.json"
    assert all(re.fullmatch(r".*\.\d{4}-\d\d-\d\d-\d{6}", name) for name in names[1::2])


def stop(*_, **__):
    raise KeyboardInterrupt


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory.")


PHASES = {
    "the model is loaded": (evidence, "open_adapter"),
    "losses": (evidence, "losses_of"),
    "parts": (parts, "losses_of"),
    "change elsewhere": (elsewhere, "generate"),
    "replies": (evidence, "ask_both"),
    "the picture is drawn": (report_folder, "draw_picture"),
    "the report is written": (report_folder, "as_markdown"),
}
# From here on it is the new report that is kept; see the test after the next.
ITS_PLACE_IS_TAKEN = (report_folder, "rename_old")
ENDS = {"Ctrl-C": (stop, 130, "Stopped."), "memory": (no_memory, 1, "memory is full")}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_finished_report_stays_whatever_ends_the_next(
    ours, capsys, monkeypatch, tmp_path, phase, end
):
    tasks = write_lines(tmp_path / "tasks.jsonl", [{"prompt": [{"role": "user", "content": "a"}]}])
    words = [*PARTS, "--samples", "1", "--max_new_tokens", "3", "--general_file", tasks]
    assert command(capsys, "evidence", ours / "final_lora", *words).status == 0
    results = ours / "inspected" / "final_lora"
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    what_happens, status, said = ENDS[end]
    with monkeypatch.context() as patch:
        patch.setattr(*PHASES[phase], what_happens)
        found = command(capsys, "evidence", ours / "final_lora", *words)
    assert found.status == status and said in found.err
    after = {path.name: path.read_bytes() for path in results.iterdir()}
    assert {name: after[name] for name in before} == before
    assert read_json(results / "evidence.json")["finished"] is True
    has_losses = phase not in ("the model is loaded", "losses")
    assert set(after) - set(before) == ({"evidence.json.unfinished"} if has_losses else set())
    if has_losses:
        rest = read_json(results / "evidence.json.unfinished")
        assert rest["finished"] is False and len(rest["losses"]) == 4
        assert "what was found so far is in" in found.said
    compared = command(capsys, "compare", ours)
    assert compared.status == 0 and "left out" not in compared.out


@pytest.fixture
def another_thread():
    """Have one that blocks no signal, as torch starts some: the system may give it ours."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    yield
    end.set()
    thread.join()


def send(number):
    """Send this process a signal, and let Python see it."""
    os.kill(os.getpid(), number)
    time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", range(5))
@pytest.mark.usefixtures("another_thread")
def test_a_signal_waits_until_the_report_has_taken_its_place(
    ours, capsys, monkeypatch, number, moment
):
    """A half of it there would be none, and the older one would be gone."""
    assert command(capsys, "evidence", ours / "final_lora", *SHORT).status == 0
    results = ours / "inspected" / "final_lora"
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command has it
    module, name = ITS_PLACE_IS_TAKEN
    rename_old, renamed = getattr(module, name), []

    def interrupted(path):
        rename_old(path)
        renamed.append(path.name)
        if len(renamed) == moment + 1:
            send(number)

    monkeypatch.setattr(module, name, interrupted)
    end = command(capsys, "evidence", ours / "final_lora", *SHORT)
    assert end.status == 130 and end.err.endswith("Stopped.") and len(renamed) == 5
    after = {path.name: path.read_bytes() for path in results.iterdir()}
    assert "evidence.json.unfinished" not in after and "what was found so far" not in end.said
    assert read_json(results / "evidence.json")["finished"] is True
    assert set(before) < set(after) and len(after) == 2 * len(before)
    older = {
        re.sub(r"\.\d{4}-\d\d-\d\d-\d{6}$", "", name): name for name in after.keys() - before.keys()
    }
    assert {name: after[old] for name, old in older.items()} == before
    compared = command(capsys, "compare", ours)
    assert compared.status == 0 and "left out" not in compared.out


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_that_nobody_handles_ends_the_process_afterwards(tmp_path, number):
    def be_stopped():
        with report_folder.no_interruption():
            send(number)
            (tmp_path / "whole").touch()
        (tmp_path / "too late").touch()

    assert Fork(be_stopped).end() == -number
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_an_ignored_signal_stays_ignored_and_handlers_are_what_they_were(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup sets it
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(one) for one in numbers]
    with report_folder.no_interruption():
        send(signal.SIGHUP)
    assert [signal.getsignal(one) for one in numbers] == handlers
    with pytest.raises(KeyboardInterrupt), report_folder.no_interruption():
        send(signal.SIGINT)
        raise OSError  # the signal is not lost with an error
    assert [signal.getsignal(one) for one in numbers] == handlers


def test_in_another_thread_nothing_has_to_wait():
    done = []

    def write():
        with report_folder.no_interruption():
            done.append(True)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert done == [True]


@pytest.mark.parametrize("phase", ["losses", "parts", "replies"])
def test_what_was_found_before_ctrl_c_is_kept_as_unfinished(ours, capsys, monkeypatch, phase):
    monkeypatch.setattr(*PHASES[phase], stop)
    end = command(capsys, "evidence", ours / "final_lora", *PARTS, "--samples", "1")
    assert end.status == 130 and "Stopped." in end.err
    path = ours / "inspected" / "final_lora" / "evidence.json"
    assert path.exists() == (phase != "losses")
    if path.exists():
        assert read_json(path)["finished"] is False and len(read_json(path)["losses"]) == 4


@pytest.mark.parametrize("place", ["write_json", "draw_picture", "as_markdown"])
def test_a_full_disk_is_one_message_and_the_earlier_report_stays(ours, capsys, monkeypatch, place):
    assert command(capsys, "evidence", ours / "final_lora", *SHORT).status == 0
    results = ours / "inspected" / "final_lora"
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    reached = []

    def full(*_, **__):
        reached.append(place)
        monkeypatch.setattr(report_folder, "write_json", no_space)  # for what was found so far
        no_space()

    monkeypatch.setattr(report_folder, place, full)
    end = command(capsys, "evidence", ours / "final_lora", *SHORT)
    assert reached == [place]
    assert end.status == 1 and end.err.count("No space left on device") == 1
    assert "Free space there, or choose another folder with --output_dir" in end.err
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(
    ours, capsys, monkeypatch
):
    words = ["evidence", ours / "final_lora", *SHORT]
    end = command(capsys, *words, "--output_dir", ours / "run.json")
    assert end.status == 1 and "--output_dir" in end.err and "gain" not in end.out
    monkeypatch.setattr("tempfile.TemporaryFile", no_space)
    end = command(capsys, *words)
    assert end.status == 1 and "No space left on device" in end.err and "gain" not in end.out


def test_two_adapters_of_one_name_may_be_measured_at_once(
    capsys, no_picture, tmp_path, monkeypatch, eval_file
):
    """As by an array of jobs: neither had a report when the other one began."""
    for name, std in (("exp1", 0.1), ("exp2", 0.5)):
        save_adapter(tmp_path / name / "out" / "checkpoint-5", std=std)
    monkeypatch.chdir(tmp_path)
    words = ["--eval_file", eval_file, *SHORT]
    measure_one = evidence.measure

    def measure_the_other_first(*given):
        monkeypatch.setattr(evidence, "measure", measure_one)
        assert command(capsys, "evidence", "exp2/out/checkpoint-5", *words).status == 0
        measure_one(*given)

    monkeypatch.setattr(evidence, "measure", measure_the_other_first)
    assert command(capsys, "evidence", "exp1/out/checkpoint-5", *words).status == 0
    found = {path.name: read_json(path / "evidence.json") for path in Path("inspected").iterdir()}
    assert {name: one["adapter"] for name, one in found.items()} == {
        "out--checkpoint-5": "exp2/out/checkpoint-5",
        "exp1--out--checkpoint-5": "exp1/out/checkpoint-5",
    }


STOPPED_BY_A_QUEUE = """
import os, signal, tempfile
tempfile.TemporaryDirectory = lambda **_: os.kill(os.getpid(), signal.SIGTERM)
"""


def test_what_was_found_before_sigterm_is_kept_too(tmp_path, eval_file):
    adapter = save_adapter(tmp_path / "adapter")
    words = [sys.executable, "-m", "inspect_lora", "evidence", str(adapter), "--eval_file"]
    words += [eval_file, *SHORT, "--output_dir", str(tmp_path / "found")]
    end = run_in_a_fork(words, cwd=ROOT, first=STOPPED_BY_A_QUEUE)
    assert end.returncode == 130 and end.stderr.endswith("Stopped.\n")
    assert read_json(tmp_path / "found" / "evidence.json")["finished"] is False


def test_what_cannot_be_printed_or_written_does_not_cost_the_report(tmp_path):
    """A locale of ASCII has no plus-minus, and a kind may hold half a character."""
    adapter = save_adapter(tmp_path / "adapter")
    check = {"right": {"kind": "json", "keys": {"\ud83d": 1}}}
    rows = [{"messages": messages_of(("a", "b")), "kind": "\ud83d", "checks": check}]
    path = write_lines(tmp_path / "odd.jsonl", rows)
    words = [sys.executable, "-m", "inspect_lora", "evidence", str(adapter), "--eval_file", path]
    words += [*SHORT[:-1], "--output_dir", str(tmp_path / "found")]
    first = "import sys; sys.stdout.reconfigure(encoding='ascii')"
    end = run_in_a_fork(words, cwd=ROOT, first=first)
    assert end.returncode == 0, end.stderr
    assert r"\xb1 ? nats a token" in end.stdout and r"\ud83d" in end.stdout
    assert r"\ud83d" in (tmp_path / "found" / "report.md").read_text(encoding="utf-8")


def test_what_a_killed_command_left_half_done_is_no_report(ours, capsys):
    assert command(capsys, "evidence", ours / "final_lora", *SHORT).status == 0
    results = ours / "inspected" / "final_lora"
    (results / ".left").mkdir()
    (results / ".left" / "evidence.json").write_bytes((results / "evidence.json").read_bytes())
    end = command(capsys, "compare", ours)
    assert end.status == 0 and end.out.count("adapter ") == 0 and ".left" not in end.out


def test_a_report_of_the_earlier_version_is_known_as_its_adapters(
    capsys, no_picture, tmp_path, monkeypatch, eval_file
):
    """Schema 1 has the name that was typed, and no path."""
    adapter = save_adapter(tmp_path / "out" / "adapter")
    monkeypatch.chdir(tmp_path)
    run = measure(capsys, adapter, eval_file, *SHORT)
    old = {key: value for key, value in run.found.items() if key != "adapter_path"}
    old |= {"schema": 1, "adapter": "out/adapter"}
    folder = Path("inspected/out--adapter")
    folder.mkdir(parents=True)
    write_lines(folder / "evidence.json", [old])
    words = ["--eval_file", eval_file, *SHORT]
    assert command(capsys, "evidence", "out/adapter", *words).status == 0
    assert [path.name for path in Path("inspected").iterdir()] == ["out--adapter"]
