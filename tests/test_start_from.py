"""START_FROM: an adapter whose tensors training begins with, and which are refused."""

import shutil
from pathlib import Path

import pytest
import runs
from by_hand import ROUNDING, token_loss
from conftest import TOY
from safetensors.torch import load_file, save_file
from toys import base_model, edit_json, save_adapter

import train_lora_single as script
from train_lora.conversations import prompt_hash

PREFIX = "base_model.model."


@pytest.fixture
def flags(finished, tmp_path):
    """Return the flags of a run that goes on from the shared run's adapter with other lines."""
    path = runs.write_talks(tmp_path / "next.jsonl", range(100, 110))
    flags = [*finished.flags, "--train_file", path, "--output_dir", tmp_path / "output"]
    return [*flags, "--num_epochs", "1", "--start_from", finished.output / "final_lora"]


def test_training_goes_on_from_the_adapters_tensors(flags, finished, tmp_path, monkeypatch):
    """And after a stop from the checkpoint, to the same bytes."""
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
    data = runs.prepared(flags).data
    before = runs.logged(runs.history(output), "eval_loss")[0]
    assert before == pytest.approx(token_loss(base_model(), data.held_out), rel=ROUNDING)
    older_losses = runs.logged(runs.history(finished.output), "eval_loss")
    (start,) = runs.logged(runs.history(output), "start_loss")
    assert start == pytest.approx(older_losses[-1], rel=ROUNDING)
    # What it learned before is still learned.
    learned = (output / "final_lora" / "learned.txt").read_text().split()
    now = {prompt_hash(example.messages[:-1]) for example in data.examples}
    assert learned == sorted({*(older / "learned.txt").read_text().split(), *now})


def test_a_held_out_line_that_the_start_has_learned_is_told(flags, finished, capfd):
    train_file = finished.flags[finished.flags.index("--train_file") + 1]
    runs.prepared([*flags, "--eval_file", train_file])
    assert "14 held-out prompts" in capfd.readouterr().out


def test_another_start_is_another_job(flags, finished, tmp_path):
    folder = runs.prepared(flags).folder
    assert runs.prepared([*flags, "--start_from", ""]).folder != folder
    copy = shutil.copytree(finished.output / "final_lora", tmp_path / "copy")
    assert runs.prepared([*flags, "--start_from", copy]).folder == folder
    double_tensors(copy / "adapter_model.safetensors")
    assert runs.prepared([*flags, "--start_from", copy]).folder != folder


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


def double_tensors(path):
    save_file({name: 2 * one for name, one in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    "change, key",
    [(["--lora_r", "4"], "r=8"), (["--lora_alpha", "8"], "lora_alpha=16"),
     (["--lora_target_modules", "q_proj"], "_proj.lora_A")],
)  # fmt: skip
def test_another_kind_of_adapter_is_refused_by_name(change, key, flags, capfd):
    """By the dry run already."""
    runs.refused(capfd, [*flags, "--dry_run", *change], "START_FROM", key)


def test_another_scale_is_refused(flags, capfd, monkeypatch):
    runs.edit_config(monkeypatch, "lora_fields", use_rslora=True)
    runs.refused(capfd, [*flags, "--dry_run"], "START_FROM", "use_rslora")


@pytest.mark.parametrize("change", ["weights", "config.json"])
def test_another_base_is_refused_and_a_copy_is_the_same(change, flags, tmp_path, capfd):
    model = shutil.copytree(TOY, tmp_path / "model")
    dry = [*flags, "--dry_run", "--model_name", model]
    assert runs.command(capfd, dry).status == 0
    if change == "weights":
        double_tensors(model / "model.safetensors")
    else:
        edit_json(model / change, lambda x: x["text_config"].update(rms_norm_eps=1e-5))
    runs.refused(capfd, dry, "START_FROM", change)


def test_a_start_that_would_be_replaced_is_refused(flags, finished, tmp_path, capfd):
    output = shutil.copytree(finished.output, tmp_path / "output")
    left = runs.files(output)
    runs.refused(capfd, [*flags, "--start_from", output / "final_lora"], "START_FROM", "OUTPUT_DIR")
    assert runs.files(output) == left


def test_an_adapter_of_peft_alone_is_known_by_its_bases_name(flags, tmp_path, capfd):
    targets = {"target_modules": script.LORA_TARGET_MODULES, "r": 8, "lora_alpha": 16}
    folder = save_adapter(tmp_path / "peft", **targets)
    dry = [*flags, "--dry_run", "--start_from", folder]
    edit_json(folder / "adapter_config.json", lambda x: x.update(base_model_name_or_path=TOY))
    assert runs.command(capfd, dry).status == 0
    edit_json(folder / "adapter_config.json", lambda x: x.update(base_model_name_or_path="other"))
    runs.refused(capfd, dry, "START_FROM", "base_model_name_or_path")
    (Path(folder) / "adapter_config.json").unlink()
    runs.refused(capfd, dry, "START_FROM")
