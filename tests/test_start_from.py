"""START_FROM: an adapter whose tensors training begins with, and which are refused."""

import shutil
from pathlib import Path

import pytest
import runs
from by_hand import ROUNDING, token_loss
from conftest import TOY
from safetensors.torch import load_file, save_file
from toys import base_model, edit_json, save_adapter

import train_lora_single as t

PREFIX = "base_model.model."


@pytest.fixture
def flags(finished, tmp_path):
    """Return the flags of a run that goes on from the shared run's adapter with other lines."""
    path = runs.write_talks(tmp_path / "next.jsonl", range(100, 110))
    flags = [*finished.flags, "--train_file", path, "--output_dir", tmp_path / "output"]
    return [*flags, "--num_epochs", "1", "--start_from", finished.output / "final_lora"]


def test_training_goes_on_from_the_adapters_tensors(flags, finished, tmp_path, monkeypatch, capfd):
    """And after a stop from the checkpoint, to the same bytes; it is a job of its own."""
    output, older = tmp_path / "output", finished.output / "final_lora"
    recorders = runs.record(monkeypatch)
    with monkeypatch.context() as patch:
        runs.at_step(patch, 2, runs.send(2))
        assert runs.run(flags) == 130
    begun = {name.replace(".default", ""): one for name, one in recorders[0].weights[0].items()}
    tensors = load_file(older / "adapter_model.safetensors")
    assert begun.keys() == tensors.keys()
    assert all(begun[name].equal(tensor) for name, tensor in tensors.items())
    assert runs.run(flags) == 0
    assert runs.run([*flags, "--output_dir", tmp_path / "whole"]) == 0
    assert (output / runs.ADAPTER).read_bytes() == (tmp_path / "whole" / runs.ADAPTER).read_bytes()
    # The first held-out loss is the base's all the same, and that of the start is kept beside it.
    job = runs.prepared(flags)
    before = runs.logged(runs.history(output), "eval_loss")[0]
    assert before == pytest.approx(token_loss(base_model(), job.data.held_out), rel=ROUNDING)
    older_losses = runs.logged(runs.history(finished.output), "eval_loss")
    (start,) = runs.logged(runs.history(output), "start_loss")
    assert start == pytest.approx(older_losses[-1], rel=ROUNDING)
    # What it learned before is still learned, and a held-out line of it is told.
    learned = (output / "final_lora" / "learned.txt").read_text().split()
    now = {t.prompt_hash(example.messages[:-1]) for example in job.data.examples}
    assert learned == sorted({*(older / "learned.txt").read_text().split(), *now})
    capfd.readouterr()
    train_file = finished.flags[finished.flags.index("--train_file") + 1]
    runs.prepared([*flags, "--eval_file", train_file])
    assert "14 held-out prompts" in capfd.readouterr().out
    plain = runs.prepared([*flags, "--start_from", ""])
    assert plain.plan.folder != job.plan.folder
    copy = shutil.copytree(older, tmp_path / "copy")
    assert runs.prepared([*flags, "--start_from", copy]).plan.folder == job.plan.folder
    edit_tensors(copy)
    assert runs.prepared([*flags, "--start_from", copy]).plan.folder != job.plan.folder


@pytest.mark.parametrize("has_record", [True, False])
def test_a_start_that_saw_another_template_is_told(has_record, flags, finished, tmp_path, capfd):
    """An adapter of another trainer may have its template beside it."""
    folder = shutil.copytree(finished.output / "final_lora", tmp_path / "start")
    if not has_record:
        (folder / "run.json").unlink()
    dry = [*flags, "--dry_run", "--start_from", folder]
    assert "warning" not in runs.command(capfd, dry).out
    template = Path(TOY, "chat_template.jinja").read_text(encoding="utf-8")
    (tmp_path / "other.jinja").write_text(f"{template}{{# another one #}}", encoding="utf-8")
    other = runs.command(capfd, [*dry, "--chat_template", tmp_path / "other.jinja"])
    assert other.status == 0 and "warning" in other.out


def edit_tensors(folder):
    path = folder / "adapter_model.safetensors"
    tensors = {name: 2 * tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def model_with(folder, change):
    """Return the toy in a folder, with a change of its weights or of its configuration."""
    shutil.copytree(TOY, folder)
    if change == "weights":
        path = folder / "model.safetensors"
        tensors = {name: 1.01 * tensor for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    elif change == "config":
        edit_json(folder / "config.json", lambda x: x["text_config"].update(rms_norm_eps=1e-5))
    return folder


def test_another_kind_of_adapter_is_refused_by_name(flags, finished, tmp_path, capfd, monkeypatch):
    """By the dry run already, and nothing is lost."""
    dry = [*flags, "--dry_run"]
    for more, key in (
        (["--lora_r", "4"], "r=8"), (["--lora_alpha", "8"], "lora_alpha=16"),
        (["--lora_target_modules", "q_proj"], "_proj.lora_A"),
        (["--model_name", model_with(tmp_path / "other", "weights")], "weights"),
        (["--model_name", model_with(tmp_path / "config", "config")], "config.json"),
    ):  # fmt: skip
        runs.refused(capfd, [*dry, *more], "START_FROM", key)
    with monkeypatch.context() as patch:
        runs.edit_config(patch, "lora_fields", use_rslora=True)
        runs.refused(capfd, dry, "START_FROM", "use_rslora")
    # A copy of the same model elsewhere is the same model.
    same = ["--model_name", model_with(tmp_path / "same", None)]
    assert runs.command(capfd, [*dry, *same]).status == 0
    output = shutil.copytree(finished.output, tmp_path / "output")
    left = runs.files(output)
    runs.refused(capfd, [*flags, "--start_from", output / "final_lora"], "START_FROM", "OUTPUT_DIR")
    assert runs.files(output) == left


def test_an_adapter_of_peft_alone_is_known_by_its_bases_name(flags, tmp_path, capfd):
    targets = {"target_modules": t.LORA_TARGET_MODULES, "r": 8, "lora_alpha": 16}
    folder = save_adapter(tmp_path / "peft", **targets)
    dry = [*flags, "--dry_run", "--start_from", folder]
    edit_json(folder / "adapter_config.json", lambda x: x.update(base_model_name_or_path=TOY))
    assert runs.command(capfd, dry).status == 0
    edit_json(folder / "adapter_config.json", lambda x: x.update(base_model_name_or_path="other"))
    runs.refused(capfd, dry, "START_FROM", "base_model_name_or_path")
    (Path(folder) / "adapter_config.json").unlink()
    runs.refused(capfd, dry, "START_FROM")
