"""The acceptance of a card does all that a CPU can do of it, and a failed check is a row."""

import subprocess
import sys

import pytest
from benchmarks import gpu
from benchmarks.common import Options, Targets
from processes import run_in_a_fork


@pytest.fixture
def options(tmp_path):
    """Return what a part is given at tiny sizes."""
    return Options(tmp_path, Targets(limits_are_judged=False), tiny=True, pairs=1)


def test_the_acceptance_of_a_card_passes_on_a_cpu_at_tiny_sizes(
    monkeypatch, restored_environment, options, capsys
):
    monkeypatch.setattr(subprocess, "run", run_in_a_fork)
    gpu.gpu(options)
    printed = capsys.readouterr().out
    assert options.targets.missed == [], printed
    done = [row.split("|")[1].strip() for row in printed.splitlines() if row.startswith("| ")]
    wanted = ["loading", "chat", "SIGTERM in a step", "gone on", "torchrun, one process"]
    wanted += ["--demo with fla installed, a stub", "losses of the two runs"]
    assert set(wanted) <= set(done)
    assert printed.count("evidence and samples") == 2


def test_a_check_that_fails_is_a_row_and_not_the_end(monkeypatch, options, capsys):
    def broken(_):
        yield gpu.Row("one", "fine", True)
        raise RuntimeError("no luck | at all")

    def bad(_):
        yield gpu.Row("two", "9 instead of 8", False)

    def figure(_):
        yield gpu.Row("three", "12 ms")

    monkeypatch.setattr(gpu, "CHECKS", [broken, bad, figure])
    gpu.gpu(options)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        "| one | fine | ok |",
        "| broken | RuntimeError('no luck / at all') | **FAILED** |",
        "| two | 9 instead of 8 | **FAILED** |",
        "| three | 12 ms |  |",
    ]
    assert len(options.targets.missed) == 2


def test_checks_that_come_after_the_nine_minutes_are_not_done(monkeypatch, options):
    card = gpu.Card(options, is_gpu=True)
    card.began -= 60 * gpu.MINUTES - 10
    card.do(lambda _: pytest.fail("it was done"))
    assert "not done" in card.rows[0].found
    assert card.rows[0].is_good is False


def test_a_command_that_ends_otherwise_fails_its_check(options):
    card = gpu.Card(options, is_gpu=False)
    with pytest.raises(RuntimeError, match=r"status 3.*the reason"):
        gpu.finished(card, [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"])
