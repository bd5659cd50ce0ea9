"""Interrupted runs: what is saved, how the same command goes on, and what is never mixed or overwritten."""

import json
import os
import signal
from pathlib import Path

import pytest
import transformers

import train_lora_single as t

STEPS = 8  # two epochs of four


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags for a demo on the first 13 training and 4 eval lines, two epochs of four steps, a checkpoint every three."""
    folder = tmp_path_factory.mktemp("data")
    flags = ["--demo", "--num_epochs", "2", "--logging_steps", "1", "--save_steps", "3", "--num_samples", "1"]
    flags += ["--max_new_tokens", "3"]
    for name, lines in (("train", 13), ("eval", 4)):
        text = Path("data", f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(text[:lines]), encoding="utf-8")
        flags += [f"--{name}_file", str(folder / f"{name}.jsonl")]
    return flags


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """Return the adapter's bytes and the loss history of a run that was not interrupted."""
    output = tmp_path_factory.mktemp("whole")
    t.main([*flags, "--output_dir", str(output)])
    return adapter(output), losses(output)


def adapter(output):
    """Return the bytes of the adapter in output."""
    return Path(output, "final_lora", "adapter_model.safetensors").read_bytes()


def record(output):
    """Return what output/run.json holds."""
    return json.loads(Path(output, "run.json").read_text(encoding="utf-8"))


def losses(output):
    """Return (step, loss) and (step, eval loss) of a run, in order."""
    history = record(output)["loss_history"]
    return [(e["step"], e[key]) for e in history for key in ("loss", "eval_loss") if key in e]


def at_step(monkeypatch, number, action):
    """Do action within training step number (two batches each, but for the last of an epoch)."""
    step, calls = transformers.Trainer.training_step, []

    def training_step(self, *args, **kwargs):
        if self.state.global_step == number - 1 and not calls:
            calls.append(action())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)


def complete(output):
    """Return the steps of the checkpoints in output that are complete."""
    return sorted(int(path.parent.name.split("-")[1]) for path in Path(output).glob("checkpoints/*/complete.json"))


@pytest.mark.parametrize("number", range(1, STEPS + 1))
def test_after_ctrl_c_the_same_command_ends_with_the_same_bytes(flags, whole, tmp_path, monkeypatch, capfd, number):
    with monkeypatch.context() as patch:
        at_step(patch, number, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(SystemExit) as stop:
            t.main([*flags, "--output_dir", str(tmp_path)])
    text = capfd.readouterr()
    assert stop.value.code == 130 and "Traceback" not in text.err
    assert (
        f"stopped at step {number} of 8; the same command goes on from {tmp_path}/checkpoints/checkpoint-{number}"
        in text.err
    )
    assert not (tmp_path / "final_lora").exists()
    assert complete(tmp_path)[-1] == number
    assert record(tmp_path)["outcome"].startswith(f"interrupted: stopped at step {number} of 8")
    t.main([*flags, "--output_dir", str(tmp_path)])
    assert (
        f"resume   from {tmp_path}/checkpoints/checkpoint-{number}, {number} steps are done" in capfd.readouterr().out
    )
    assert adapter(tmp_path) == whole[0]
    assert losses(tmp_path) == whole[1]
