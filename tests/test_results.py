"""What a run leaves: the adapter and its check, the model card, run.json; and what it touches."""

import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import accelerate
import matplotlib.figure
import pytest
import torch
import transformers
from conftest import (
    BY_INSPECTOR,
    HAS_INSPECTOR,
    default_handlers,
    needs_inspector,
    write_short_data,
)
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from trainers import command_in

import train_lora_single as t

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
TOKENIZER = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
RESULTS = ("final_lora", "final_lora_vllm", *BY_INSPECTOR)
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors")
UP = "base_model.model.model.layers.0.mlp.up_proj"


def read(path):
    return Path(path).read_text(encoding="utf-8")


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def record_of(output):
    """Return what run.json holds, read as strict JSON."""
    return json.loads(read(output / "run.json"), parse_constant=refuse_constant)


def files(path):
    """Return the bytes of a file, or of each file below a folder."""
    if path.is_file():
        return path.read_bytes()
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads(read(folder / "adapter_config.json"))


def base_of(name, dtype="float32"):
    return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()


def run(argv):
    """Give the command in this process; return its exit status."""
    default_handlers()
    try:
        t.main(argv)
    except SystemExit as stop:
        return stop.code
    return 0


def fill(model):
    """Give LoRA's B the values that training would."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.fixture
def trained(flags):
    """Return a function that gives (trainer, job) as they are when training is over."""

    def make(*more):
        job = t.Job(t.parse_settings([*flags, *more]))
        t.prepare(job)
        job.output.mkdir()
        t.resume_or_begin(job)
        trainer = t.build_trainer(job)
        fill(trainer.model)
        return trainer, job

    return make


@pytest.fixture
def after_saving(monkeypatch):
    """Return a function that has change(folder) called when final_lora has been saved."""

    def patch(change):
        real = PeftModel.save_pretrained

        def save_and_change(self, folder, *args, **kwargs):
            real(self, folder, *args, **kwargs)
            if Path(folder).name == "final_lora":
                change(Path(folder))

        monkeypatch.setattr(PeftModel, "save_pretrained", save_and_change)

    return patch


# ==== The adapter's files


def test_a_run_leaves_exactly_these_files(finished):
    """Of the checkpoints each epoch's adapter is left; nothing of steps 3 and 6."""
    expected = {"all_logs.log", ".lock", "run.json", *BY_INSPECTOR}
    folders = {"final_lora": {"README.md"} | ADAPTER | TOKENIZER, "final_lora_vllm": ADAPTER}
    kept = ADAPTER | {"complete.json"}
    folders |= {f"checkpoints/checkpoint-{step}": kept for step in (4, 8)}
    expected |= {f"{folder}/{name}" for folder, names in folders.items() for name in names}
    assert files(finished).keys() == expected


def test_no_result_is_a_pickle(finished):
    starts = (b"PK\x03\x04", *(bytes([0x80, version]) for version in range(2, 6)))
    for name, data in files(finished).items():
        assert not data.startswith(starts), name


def test_the_saved_tensors_are_the_trained_ones_in_float32(trained):
    trainer, job = trained("--dtype", "bfloat16")
    expected = {
        name: tensor.clone() for name, tensor in get_peft_model_state_dict(trainer.model).items()
    }
    model = t.publish(trainer, job)
    saved = tensors_of(job.output / "final_lora")
    assert saved.keys() == expected.keys() and len(saved) == 20
    assert all(saved[name].equal(tensor) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert sum(tensor.numel() for tensor in saved.values()) == job.plan.trainable
    loaded = get_peft_model_state_dict(model)  # what is returned comes from the file
    assert all(loaded[name].equal(tensor) for name, tensor in expected.items())


def test_a_finished_runs_adapter_is_the_last_epochs(finished):
    last = tensors_of(finished / "checkpoints" / "checkpoint-8")
    final = tensors_of(finished / "final_lora")
    assert last.keys() == final.keys() and all(final[name].equal(last[name]) for name in final)
    first = tensors_of(finished / "checkpoints" / "checkpoint-4")
    assert not all(final[name].equal(first[name]) for name in final)


def test_an_adapted_layer_returns_wx_plus_alpha_over_r_bax(finished, tiny):
    path, final = "model.layers.1.self_attn.q_proj", finished / "final_lora"
    base = base_of(tiny, torch.float64)
    weight, x = base.get_submodule(path).weight.detach().clone(), torch.randn(3, 64).double()
    a, b = (tensors_of(final)[f"base_model.model.{path}.lora_{m}.weight"].double() for m in "AB")
    model = PeftModel.from_pretrained(base, final).double().eval()
    by_hand = x @ weight.T + (16 / 8) * (x @ a.T) @ b.T
    torch.testing.assert_close(model.get_submodule(f"base_model.model.{path}")(x), by_hand)
    assert not torch.allclose(by_hand, x @ weight.T)


def test_the_adapters_config_says_what_the_settings_say(trained, tiny):
    targets = ["up_proj", "q_proj", "o_proj", "down_proj", "k_proj"]
    more = ["--lora_r", "12", "--lora_alpha", "20", "--lora_dropout", "0.1"]
    trainer, job = trained(*more, "--lora_target_modules", *targets)
    t.publish(trainer, job)
    config = config_of(job.output / "final_lora")
    found = (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"])
    assert found == (12, 20, 0.1, "none")
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", tiny)
    # In the setting's order; PEFT makes a set of it, which has another order in every process.
    assert config["target_modules"] == targets


def test_the_vllm_form_has_the_names_that_peft_writes_for_the_wrapper(finished, tiny, tmp_path):
    wrapper = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(tiny)
    lora = LoraConfig(target_modules=t.LORA_TARGET_MODULES)
    get_peft_model(wrapper, lora).save_pretrained(tmp_path)
    final, for_vllm = finished / "final_lora", finished / "final_lora_vllm"
    plain, renamed = tensors_of(final), tensors_of(for_vllm)
    assert renamed.keys() == tensors_of(tmp_path).keys() and len(plain) == len(renamed)
    for name, tensor in plain.items():
        other = name.replace(".model.model.", ".model.model.language_model.")
        assert tensor.equal(renamed[other]) and other not in plain
    assert config_of(final) == config_of(for_vllm)


def test_a_model_that_is_no_wrapper_gets_no_second_form(flags, tiny, tmp_path):
    base_of(tiny).save_pretrained(tmp_path / "plain")
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "plain")
    output = tmp_path / "output"
    (output / "final_lora_vllm").mkdir(parents=True)
    (output / "final_lora_vllm" / "older").write_text("older")
    t.main([*flags, "--model_name", str(tmp_path / "plain"), "--max_steps", "1"])
    assert (output / "final_lora").exists() and not (output / "final_lora_vllm").exists()
    (renamed,) = output.glob("final_lora_vllm.2*")  # the older one must not be served
    assert files(renamed) == {"older": b"older"}
    words = command_in(read(output / "all_logs.log"), "vllm", "serve")
    assert words[words.index("--lora-modules") + 1] == f"output={output}/final_lora"


def test_links_that_lead_nowhere_are_set_aside_like_older_results(flags, tmp_path, capsys):
    """As where an older result was moved to another disk that is not there now."""
    output = tmp_path / "output"
    output.mkdir()
    for name in (*RESULTS, "run.json", "checkpoints"):
        (output / name).symlink_to(f"/nowhere/{name}")
    assert run([*flags, "--max_steps", "1"]) == 0, capsys.readouterr().err
    for name in (*RESULTS, "run.json", "checkpoints"):
        (renamed,) = output.glob(f"{name}.2*")
        assert os.readlink(renamed) == f"/nowhere/{name}" and not (output / name).is_symlink()


def test_what_is_set_aside_takes_no_others_name(tmp_path):
    old, when = tmp_path / "final_lora", 1_700_000_000
    for number in range(3):
        old.symlink_to(f"/nowhere/{number}")
        os.utime(old, (when, when), follow_symlinks=False)
        t.rename_old(old)
    assert {os.readlink(path) for path in tmp_path.iterdir()} == {f"/nowhere/{n}" for n in range(3)}


def test_others_may_read_the_results(trained):
    before = os.umask(0o022)
    try:
        trainer, job = trained()
        t.publish(trainer, job)
    finally:
        os.umask(before)
    paths = [path for name in RESULTS[:2] for path in (job.output / name).iterdir()]
    modes = {path.name: path.stat().st_mode & 0o777 for path in paths}
    assert len(paths) == 8 and modes == dict.fromkeys(modes, 0o644)


# ==== The check of what was saved


@pytest.fixture
def adapted(tiny):
    """Return the tests' model with a LoRA that changes it."""
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=t.LORA_TARGET_MODULES, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base_of(tiny), lora)
    fill(model)
    return model.eval()


EXAMPLE = t.Example("a file:1", [], prompt_ids=[5, 6], reply_ids=[7, 8])


def change_tensors(folder, edit):
    tensors = tensors_of(folder)
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def change_config(folder, **values):
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | values))


def test_the_check_returns_the_base_with_the_adapter_from_disk(adapted, tmp_path, tiny, capsys):
    adapted.save_pretrained(tmp_path)
    ids = torch.tensor([EXAMPLE.input_ids])
    with torch.no_grad():
        wanted, plain = adapted(input_ids=ids).logits, base_of(tiny)(input_ids=ids).logits
        model = t.verify_saved_adapter(adapted, tmp_path, EXAMPLE)
        assert model(input_ids=ids).logits.equal(wanted)
        with model.disable_adapter():
            assert model(input_ids=ids).logits.equal(plain)
    wanted, plain = wanted[:, 1:3], plain[:, 1:3]  # where the two learned tokens are predicted
    said = " ".join(capsys.readouterr().out.split())
    error, effect = map(float, re.findall(r"by (?:at most )?([\d.e-]+) from", said))
    assert error == 0 and effect == pytest.approx((wanted - plain).abs().max().item(), rel=0.05)


def test_the_check_makes_logits_for_learned_tokens_alone(adapted, tmp_path):
    """With 248,320 tokens in the vocabulary, all those of a long prompt would take gigabytes."""
    adapted.save_pretrained(tmp_path)
    shapes = []
    adapted.get_output_embeddings().register_forward_hook(
        lambda _, __, logits: shapes.append(logits.shape[:-1].numel())
    )
    t.verify_saved_adapter(adapted, tmp_path, EXAMPLE)
    assert shapes == [2, 2, 2]


TAMPERED = {
    "changed": lambda x: x[f"{UP}.lora_A.weight"][0, 0].add_(1e-3),
    "zeroed": lambda x: x[f"{UP}.lora_A.weight"].zero_(),
    "missing": lambda x: x.pop(f"{UP}.lora_A.weight"),
    "no number": lambda x: x[f"{UP}.lora_A.weight"][0].fill_(math.nan),
}


def test_vllms_file_must_hold_the_same_tensors(adapted, tmp_path):
    folder, for_vllm = tmp_path / "final_lora", tmp_path / "final_lora_vllm"
    adapted.save_pretrained(folder)
    shutil.copytree(folder, for_vllm)
    tensors = tensors_of(folder)
    wrapped = {
        name.replace(".model.model.", ".model.model.language_model.", 1): x
        for name, x in tensors.items()
    }
    save_file(wrapped, for_vllm / "adapter_model.safetensors", {"format": "pt"})
    t.check_saved_tensors(adapted, for_vllm)
    change_tensors(for_vllm, lambda x: next(iter(x.values()))[0, 0].add_(1e-3))
    with pytest.raises(SystemExit, match=r"final_lora_vllm does not hold what was trained"):
        t.verify_saved_adapter(adapted, folder, EXAMPLE)


@pytest.mark.parametrize("how", TAMPERED)
def test_a_file_that_is_not_as_trained_is_refused_by_the_tensors_name(adapted, tmp_path, how):
    adapted.save_pretrained(tmp_path)
    change_tensors(tmp_path, TAMPERED[how])
    with pytest.raises(SystemExit) as stop:
        t.verify_saved_adapter(adapted, tmp_path, EXAMPLE)
    said = " ".join(str(stop.value).split())
    assert said.startswith(f"Not verified: {tmp_path} ") and f": {UP}.lora_A.weight." in said


USELESS = {
    "infinite": lambda x: x[f"{UP}.lora_B.weight"][0, 0].fill_(math.inf),
    "no number": lambda x: x[f"{UP}.lora_A.weight"][0, 0].fill_(math.nan),
}


@pytest.mark.parametrize("how", USELESS)
def test_an_adapter_of_no_use_is_refused_though_saved_as_trained(adapted, tmp_path, how):
    with torch.no_grad():
        USELESS[how](get_peft_model_state_dict(adapted))  # the parameters themselves
    adapted.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"(?s)^Not verified: .*(not published|not numbers)"):
        t.verify_saved_adapter(adapted, tmp_path, EXAMPLE)


NOTHING = {
    "all B are zero": lambda x: [x[name].zero_() for name in x if "lora_B" in name],
    "too small to matter": lambda x: [tensor.fill_(1e-30) for tensor in x.values()],
}


@pytest.mark.parametrize("how", NOTHING)
def test_an_adapter_that_changes_nothing_is_refused_with_the_reason(adapted, tmp_path, how):
    with torch.no_grad():
        NOTHING[how](get_peft_model_state_dict(adapted))
    adapted.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as stop:
        t.verify_saved_adapter(adapted, tmp_path, EXAMPLE)
    said = " ".join(str(stop.value).split())
    assert said.startswith("Not verified: ") and "changes nothing" in said
    assert "does not work" not in said


def test_a_rate_that_is_too_small_is_named_and_no_folder_that_is_gone(flags, tmp_path, capsys):
    assert run([*flags, "--learning_rate", "1e-30", "--max_steps", "1"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "the adapter changes nothing" in said and "LEARNING_RATE" in said
    assert ".partial" not in said and "checkpoints are still there" in said
    assert t.newest_complete(tmp_path / "output" / "checkpoints")


CONFIGS = {
    "another alpha": {"lora_alpha": 24}, "no alpha": {"lora_alpha": 0},
    "fewer targets": {"target_modules": ["q_proj"]},
}  # fmt: skip


@pytest.mark.parametrize("what", CONFIGS)
def test_equal_tensors_under_another_config_are_refused(adapted, tmp_path, what):
    adapted.save_pretrained(tmp_path)
    change_config(tmp_path, **CONFIGS[what])
    with pytest.raises(SystemExit, match=r"(?s)^Not verified: .*not published"):
        t.verify_saved_adapter(adapted, tmp_path, EXAMPLE)


def test_a_rounding_of_a_hundredth_is_not_refused(adapted, tmp_path):
    """As a GPU may round."""
    adapted.save_pretrained(tmp_path)
    change_config(tmp_path, lora_alpha=16.16)
    t.verify_saved_adapter(adapted, tmp_path, EXAMPLE)


def test_a_failed_check_touches_nothing_and_the_same_command_mends_it(
    finished, tmp_path, flags, after_saving, capsys
):
    output = shutil.copytree(finished, tmp_path / "output")
    before = {name: files(output / name) for name in RESULTS}
    spoil = [TAMPERED["changed"]]
    after_saving(lambda folder: [change_tensors(folder, edit) for edit in spoil])
    argv = [*flags, "--seed", "7", "--num_epochs", "1"]
    assert run(argv) == 1
    printed = capsys.readouterr()
    assert re.search("(?m)^Not verified:", printed.err) and "Traceback" not in printed.err
    assert not re.search("(?m)^(verified|done) ", printed.out)
    assert {name: files(output / name) for name in RESULTS} == before
    assert record_of(output)["outcome"].startswith("failed: Not verified: ")
    assert not (output / ".partial").exists() and not [*output.glob("final_lora.*")]

    spoil.clear()
    assert run(argv) == 0
    assert record_of(output)["resumed_from"].endswith("checkpoint-4")
    assert record_of(output)["outcome"] == "finished"
    for name in RESULTS:
        (renamed,) = output.glob(f"{name}.2*")
        assert files(renamed) == before[name] != files(output / name)
    printed = capsys.readouterr().out
    words = [line.split()[0] for line in printed.splitlines() if line[:1].isalpha()]
    assert words.index("verified") < words.index("moved")  # what is there stays until then


EXTRAS = {  # what fails, where, and how
    "learned": (torch.linalg, "svdvals", torch.OutOfMemoryError("CUDA out of memory")),
    "samples": (transformers.GenerationMixin, "generate", IndexError("a bug upstream")),
    "picture": (matplotlib.figure.Figure, "savefig", OSError(28, "No space left on device")),
}


@needs_inspector
@pytest.mark.parametrize("what", EXTRAS)
def test_an_error_after_the_check_is_a_warning(flags, tmp_path, tiny, monkeypatch, capsys, what):
    owner, method, error = EXTRAS[what]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(owner, method, fail)
    output = tmp_path / "output"
    t.main([*flags, "--max_steps", "1"])
    out, log = capsys.readouterr().out, read(output / "all_logs.log")
    (warning,) = re.findall("(?m)^warning .*", out)
    assert f"{what} failed" in warning and "the adapter is complete" in warning
    assert type(error).__name__ in warning
    assert "Traceback" in log and "Traceback" not in out and re.search("(?m)^done ", out)
    assert record_of(output)["outcome"] == "finished"
    there = {"samples.md", "lora.png"} & {path.name for path in output.iterdir()}
    missing = {"samples": {"samples.md"}, "picture": {"lora.png"}}.get(what, set())
    assert there == {"samples.md", "lora.png"} - missing
    assert PeftModel.from_pretrained(base_of(tiny), output / "final_lora")


@needs_inspector
@pytest.mark.parametrize(
    "error", [KeyError("a bug"), SystemExit("compare: a folder\nis gone."), RecursionError("deep")]
)
def test_an_error_in_the_comparison_is_a_warning_and_costs_no_command(
    flags, tmp_path, tiny, monkeypatch, capsys, error
):
    """It reads what other runs left."""
    import inspect_lora

    def fail(_):
        raise error

    monkeypatch.setattr(inspect_lora, "compare_with_others", fail)
    t.main([*flags, "--max_steps", "1"])
    out = capsys.readouterr().out
    (warning,) = re.findall("(?m)^warning .*", out)
    reason = " ".join(str(error).split())
    assert "comparing with earlier runs failed" in warning and reason in warning
    assert warning.endswith("the adapter is complete")
    assert out.index("\ndone ") < out.index(warning) < out.index("\nnext ")
    assert command_in(out, "python", "inspect_lora.py", "chat")
    assert command_in(out, "vllm", "serve", tiny)
    assert command_in(out, "python", "inspect_lora.py", "served")
    assert record_of(tmp_path / "output")["outcome"] == "finished"


def test_an_error_in_the_last_words_is_a_warning(monkeypatch, capsys):
    def fail(_):
        raise KeyError("a bug")

    monkeypatch.setattr(t, "verdict", fail)
    t.summarize(t.Job(t.parse_settings([])))
    said = "warning   summary failed (KeyError('a bug')); the adapter is complete\n"
    assert capsys.readouterr().out == said


# ==== Which epoch is published


def let_the_loss_rise(patch):
    """Have the held-out loss rise with each epoch, from the base's."""
    real, calls = t.example_losses, []

    def example_losses(*args):
        calls.append(None)
        factor = {2: 2, 3: 3}.get(len(calls), 1)
        return [factor * loss for loss in real(*args)]

    patch.setattr(t, "example_losses", example_losses)


@pytest.fixture
def rising(monkeypatch):
    """Have the held-out loss rise with each epoch."""
    let_the_loss_rise(monkeypatch)


def test_the_last_epoch_is_published_though_an_earlier_one_was_better(flags, tmp_path, rising):
    output = tmp_path / "output"
    t.main(flags)
    last = tensors_of(output / "checkpoints" / "checkpoint-8")
    final = tensors_of(output / "final_lora")
    assert all(final[name].equal(last[name]) for name in last)
    assert record_of(output)["published"] == "epoch 2 of 2"
    log = read(output / "all_logs.log")
    assert "lowest after epoch 1 " in log and "--publish best" in log


@pytest.mark.parametrize("stopped_in", [None, 6, 8])
def test_the_best_epoch_is_published_also_after_a_resume(
    flags, tmp_path, rising, monkeypatch, stopped_in
):
    output, argv, calls = tmp_path / "output", [*flags, "--publish", "best"], []
    real = accelerate.Accelerator.backward

    def backward(*args, **kwargs):
        calls.append(None)
        if len(calls) == stopped_in:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(accelerate.Accelerator, "backward", backward)
    if stopped_in:
        assert run(argv) == 143
    assert run(argv) == 0
    best = tensors_of(output / "checkpoints" / "checkpoint-4")
    final = tensors_of(output / "final_lora")
    assert best.keys() == final.keys() and all(best[name].equal(final[name]) for name in best)
    record = record_of(output)
    assert record["published"] == "epoch 1 of 2"
    assert bool(record["resumed_from"]) == bool(stopped_in)
    assert "epoch 1 of 2" in read(output / "final_lora" / "README.md")


@pytest.fixture(scope="module")
def before_publishing(tmp_path_factory):
    """Return the flags and the output of a run that was stopped when an older epoch was best."""
    folder = tmp_path_factory.mktemp("before publishing")
    flags = [*write_short_data(folder), "--publish", "best"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(t.__file__).parent)
        let_the_loss_rise(patch)
        stop = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        patch.setattr(t, "verify_saved_adapter", stop)
        assert run([*flags, "--output_dir", str(folder / "output")]) == 143
    return flags, folder / "output"


SPOILT = {  # what happens to the older epoch's adapter while the run is stopped
    "changed": lambda folder: change_tensors(folder, lambda x: next(iter(x.values())).add_(1e-3)),
    "cut": lambda folder: os.truncate(folder / "adapter_model.safetensors", 1000),
    "removed": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "its hash removed": lambda folder: (folder / "complete.json").unlink(),
}


@pytest.mark.parametrize("what", SPOILT)
def test_an_older_epochs_adapter_is_only_published_as_it_was_saved(
    before_publishing, no_picture, tmp_path, capsys, what
):
    flags, stopped = before_publishing
    output = shutil.copytree(stopped, tmp_path / "output")
    argv = [*flags, "--output_dir", str(output)]
    best = output / "checkpoints" / "checkpoint-4"
    before = files(best)
    assert before.keys() == ADAPTER | {"complete.json"}  # no longer enough to resume
    SPOILT[what](best)
    capsys.readouterr()
    assert run(argv) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"{best}/adapter_model.safetensors is not what was saved there" in said
    assert "Traceback" not in said and not (output / "final_lora").exists()
    assert record_of(output)["outcome"].startswith("failed: ")
    if what != "changed":
        return
    for name, data in before.items():
        (best / name).write_bytes(data)
    assert run(argv) == 0
    assert (
        files(output / "final_lora")["adapter_model.safetensors"]
        == before["adapter_model.safetensors"]
    )
    assert record_of(output)["published"] == "epoch 1 of 2"


# ==== The model card


def test_the_model_card_says_where_the_adapter_comes_from(finished, tiny):
    card, record = ModelCard.load(finished / "final_lora" / "README.md"), record_of(finished)
    assert "[More Information Needed]" not in card.content
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert "base_model" not in card.data.to_dict()  # a folder is no model of the hub
    assert card.text.strip().startswith("# A LoRA adapter for tiny-qwen3.5\n")
    assert str(Path(tiny).parent) not in card.content and "commit" not in card.content
    assert "r = 8, alpha = 16" in card.text and "epoch 2 of 2" in card.text
    for facts in record["data"].values():
        assert facts["sha256"] in card.text
    assert f"> {record['system_message']}" in card.text and record["system_message"]
    blocks = re.findall(r"(?s)```python\n(.*?)```", card.text)
    compile("\n".join(blocks), "card", "exec")


@needs_inspector
def test_the_model_card_holds_the_evidence(finished):
    card = ModelCard.load(finished / "final_lora" / "README.md")
    evidence = record_of(finished)["evidence"]
    assert f"{evidence['base']:.4f} to {evidence['adapter']:.4f}" in card.text
    assert all(line in card.text for line in evidence["table"] + evidence["conclusions"])
    assert len(evidence["table"]) > 8 and f"lower on {evidence['better']} of them" in card.text
    (result,) = card.data.eval_results
    assert result.metric_value == pytest.approx(evidence["adapter"], abs=1e-4)
    assert result.dataset_name == "eval.jsonl"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_model(tmp_path, tiny, monkeypatch):
    """Return the name of a model that lies in the hub's cache, under a commit."""
    cache = tmp_path / "cache"
    folder = cache / "models--someone--tiny"
    shutil.copytree(tiny, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for module in ("huggingface_hub.constants", "transformers.utils.hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache))
    return "someone/tiny"


def test_a_hub_models_name_and_commit_are_written_wherever_it_is_named(flags, tmp_path, hub_model):
    output = tmp_path / "output"
    t.main([*flags, "--model_name", hub_model, "--max_steps", "1", "--eval_file", ""])
    card = ModelCard.load(output / "final_lora" / "README.md")
    assert card.data.base_model == hub_model and f"commit `{COMMIT}`" in card.text
    assert f'from_pretrained("{hub_model}", revision="{COMMIT}"' in card.text
    assert "loss was not measured" in card.text and not card.data.eval_results
    for name in ("final_lora", "final_lora_vllm"):
        config = config_of(output / name)
        assert (config["base_model_name_or_path"], config["revision"]) == (hub_model, COMMIT)
    settings = record_of(output)["settings"]
    assert (settings["MODEL_NAME"], settings["MODEL_REVISION"]) == (hub_model, COMMIT)
    log = read(output / "all_logs.log")
    assert command_in(log, "vllm", "serve", hub_model)[3:5] == ["--revision", COMMIT]


@needs_inspector
def test_the_card_of_a_run_stopped_in_its_evidence_is_whole(flags, tmp_path, monkeypatch):
    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(torch.linalg, "svdvals", stop)
    assert run([*flags, "--max_steps", "2"]) == 130
    text = ModelCard.load(tmp_path / "output" / "final_lora" / "README.md").text
    history = record_of(tmp_path / "output")["loss_history"]
    first, last = (entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert f"from {first:.4f} to {last:.4f}" in " ".join(text.split())
    assert "step 2" in text and "[More Information Needed]" not in text


@needs_inspector
def test_a_card_that_cannot_be_written_again_stays_whole(flags, tmp_path, monkeypatch, capsys):
    """The disk is full when the evidence brings the numbers."""
    real, failed = ModelCard.save, []

    def save(self, path, *args, **more):
        if {".partial", "checkpoints"} & {*Path(path).parts}:
            return real(self, path, *args, **more)
        failed.append(path)
        Path(path).write_text("half a ca")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelCard, "save", save)
    t.main([*flags, "--max_steps", "2"])
    assert "evidence failed" in capsys.readouterr().out and len(failed) == 1
    final = tmp_path / "output" / "final_lora"
    assert "## How to use it" in read(final / "README.md")
    assert {path.name for path in final.iterdir()} == {"README.md"} | ADAPTER | TOKENIZER


def test_targets_that_are_no_list_are_named_whole(flags, tmp_path, monkeypatch):
    real = t.lora_config

    def all_linear(settings):
        config = real(settings)
        config.target_modules = "all-linear"
        return config

    monkeypatch.setattr(t, "lora_config", all_linear)
    t.main([*flags, "--max_steps", "1"])
    text = read(tmp_path / "output" / "final_lora" / "README.md")
    assert "all-linear" in text or "in_proj_qkv" in text


def rewrite(path, system_message):
    """Give each line number of a data file system_message(number), or none if that is empty."""
    lines = []
    for number, line in enumerate(read(path).splitlines()):
        row = json.loads(line)
        key = "prompt" if "prompt" in row else "messages"
        said = {"role": "system", "content": system_message(number)}
        rest = [message for message in row[key] if message["role"] != "system"]
        lines.append(json.dumps(row | {key: [said, *rest] if said["content"] else rest}))
    path.write_text("\n".join(lines), encoding="utf-8")


def test_data_without_a_system_message_is_served_without_one(flags, trained, tmp_path):
    for name in ("train", "eval"):
        rewrite(tmp_path / f"{name}.jsonl", lambda number: "")
    trainer, job = trained()
    t.publish(trainer, job)
    text = read(job.output / "final_lora" / "README.md")
    assert "no system message" in text and "\n>" not in text
    assert record_of(job.output)["system_message"] == ""


def test_where_most_lines_have_no_system_message_the_card_says_that_alone(trained, tmp_path):
    rewrite(tmp_path / "train.jsonl", lambda number: "Be odd." if number < 2 else "")
    _, job = trained()
    said = "Most often a training conversation has no system message; serve without one."
    assert t.card_system_message(job) == said


def test_of_several_system_messages_the_most_frequent_is_quoted_whole(flags, trained, tmp_path):
    kind = "Be kind.\n\nBe brief."
    rewrite(tmp_path / "train.jsonl", lambda number: "Be odd." if number < 2 else kind)
    trainer, job = trained()
    t.publish(trainer, job)
    text = read(job.output / "final_lora" / "README.md")
    assert "\n> Be kind.\n>" in text and "\n> Be brief.\n" in text
    assert "one of 2" in text and "Be odd" not in text
    assert record_of(job.output)["system_message"] == kind


# ==== The printed command


def test_the_printed_command_serves_the_adapter_whatever_its_folder(flags, tmp_path, tiny, capsys):
    output = tmp_path / "it's $a & #1"
    t.main([*flags, "--output_dir", str(output), "--max_steps", "1", "--lora_r", "12"])
    text = capsys.readouterr().out
    words = command_in(text, "vllm", "serve", tiny, "--enable-lora")
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert options["--lora-modules"] == f"it-s--a----1={output}/final_lora_vllm"
    assert "the adapter as the model named it-s--a----1:" in text  # as clients must ask for it
    assert options["--max-lora-rank"] == "16"  # the smallest that vLLM knows
    kwargs = json.loads(options["--default-chat-template-kwargs"])
    assert kwargs == {"enable_thinking": False}
    if HAS_INSPECTOR:
        chat = command_in(text, "python", "inspect_lora.py", "chat")
        assert chat[3:] == [f"{output}/final_lora"]


COMMAND = ["vllm", "serve", "/a/folder", "--enable-lora", "--max-lora-rank", "16", "--kwargs"]
COMMAND += ['{"a": false}', "--lora-modules", "name=/some where/with blanks/final_lora"]
HOSTILE = ["it's", "$HOME", "`date`", "a\\", "#1", "", "*", "é ü", "~", "!!", "a;b", "(1)", "\\n"]
for hostile in HOSTILE:
    COMMAND += [f"--flag-{len(COMMAND)}", hostile]


def test_a_printed_command_can_be_pasted_into_a_shell_at_any_width():
    """The shell gets the same words, and a flag stands on one line with its value."""
    texts = [t.wrap_command(COMMAND, width) for width in range(1, 300)]
    # Printed, a command stands ten columns to the right.
    pasted = [t.beside("next", text).removeprefix("next") for text in texts]
    script = "\n".join(f"printf '%s\\n' {text}" for text in [*texts, *pasted])
    done = subprocess.run(["bash"], input=script, capture_output=True, encoding="utf-8")
    assert done.stderr == "" and done.stdout.split("\n") == [*COMMAND * len(texts) * 2, ""]
    values = {flag: value for flag, value in itertools.pairwise(COMMAND) if flag[:2] == "--"}
    assert values.pop("--enable-lora") == "--max-lora-rank"  # a flag without a value
    for width, text in enumerate(texts, 1):
        lines = text.split("\n")
        assert all(line.endswith(" \\") for line in lines[:-1])
        assert all(line.startswith("  ") for line in lines[1:])
        for line in lines:
            words = shlex.split(line.removesuffix(" \\"))
            for place, word in enumerate(words):
                if word in values:
                    assert words[place + 1] == values[word], (width, line)
            # No line is too long but for one that could not be broken.
            whole = line.strip().removesuffix(" \\")
            assert len(line) <= width + 2 or len(words) == 1 + (words[0] in values), whole
        assert width < 30 or "vllm serve" in lines[0]


# ==== run.json


def test_run_json_says_running_then_finished_and_what_was_run(flags, tmp_path, monkeypatch):
    output, early = tmp_path / "output", []
    real = accelerate.Accelerator.backward

    def backward(*args, **kwargs):
        early.append(record_of(output))
        return real(*args, **kwargs)

    monkeypatch.setattr(accelerate.Accelerator, "backward", backward)
    words = ["a script.py", "--seed", "5"]
    monkeypatch.setattr(sys, "argv", words)
    argv = [*flags, "--lora_alpha", "4", "--max_steps", "2"]
    t.main(argv)
    settings = t.parse_settings(argv)
    late = record_of(output)
    assert (early[-1]["outcome"], late["outcome"]) == ("running", "finished")
    for record in (early[-1], late):
        wanted = {name: value for name, value in vars(settings).items() if name.isupper()}
        assert record["settings"] == wanted and wanted["LORA_ALPHA"] == 4
        assert shlex.split(record["command"])[1:] == words
        script = Path(t.__file__).read_bytes()
        assert record["script_sha256"] == hashlib.sha256(script).hexdigest()
        assert record["versions"].keys() >= {*PACKAGES, "python"}
        for name in PACKAGES:
            assert record["versions"][name] == importlib.metadata.version(name)
        assert record["working_folder"] == str(Path.cwd())
        assert record["lora_config"]["lora_alpha"] == 4
        assert record["device"] == "CPU" and record["matmul"] == {"used": "native"}
        assert record["resumed_from"] is None
        assert record["plan"]["steps"] == 2 and record["plan"]["trainable"] == 30_720
        for name in ("TRAIN_FILE", "EVAL_FILE"):
            facts = record["data"][wanted[name]]
            data = Path(wanted[name]).read_bytes()
            assert facts["sha256"] == hashlib.sha256(data).hexdigest()
            assert facts["examples"] == data.count(b"\n")
    assert late["published"] == "step 2" and not early[-1]["published"]
    hashes = {
        name: hashlib.sha256((output / name / "adapter_model.safetensors").read_bytes()).hexdigest()
        for name in ("final_lora", "final_lora_vllm")
    }
    assert late["adapter_sha256"] == hashes and early[-1]["adapter_sha256"] == {}


def test_run_json_holds_every_loss_that_was_printed(finished):
    record, log = record_of(finished), read(finished / "all_logs.log")
    history = record["loss_history"]
    printed = [(int(a), b) for a, b in re.findall(r"step (\d)/8  loss (\S+)", log)]
    trained = [(e["step"], f"{e['loss']:.4f}") for e in history if "loss" in e]
    assert printed == trained and [step for step, _ in trained] == [*range(1, 9)]
    held_out = [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e]
    assert [step for step, _ in held_out] == [0, 4, 8]
    found = re.findall(r"(?m)^eval +epoch \S+  loss (\S+)", log)
    assert found == [f"{loss:.4f}" for _, loss in held_out]
    assert record["train_tokens"] == 2 * next(iter(record["data"].values()))["tokens"]
    assert record["train_seconds"] > 0 and record["outcome"] == "finished"
    if HAS_INSPECTOR:
        assert {"learned", "evidence", "samples"} <= record.keys() and record["evidence"]["parts"]


def test_run_json_is_strict_json_also_after_a_loss_that_is_no_number(flags, tmp_path, tiny, capsys):
    model = shutil.copytree(tiny, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    next(x for name, x in tensors.items() if name.endswith("norm.weight"))[0] = math.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert run([*flags, "--model_name", str(model)]) == 1
    assert "base model's held-out loss is nan" in " ".join(capsys.readouterr().err.split())
    record = record_of(tmp_path / "output")
    assert record["outcome"].startswith("failed: The base model's held-out loss is nan")
    (entry,) = record["loss_history"]
    assert entry["eval_loss"] == "nan"


def test_after_a_resume_run_json_counts_what_this_start_did(flags, finished, tmp_path, monkeypatch):
    output, calls = tmp_path / "output", []
    real = accelerate.Accelerator.backward

    def backward(*args, **kwargs):
        calls.append(None)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(accelerate.Accelerator, "backward", backward)
    assert run(flags) == 143
    first = record_of(output)
    assert first["outcome"].startswith("interrupted: ")
    assert run(flags) == 0
    second, whole = record_of(output), record_of(finished)
    assert second["resumed_from"] == str(output / "checkpoints" / "checkpoint-5")
    assert first["train_tokens"] + second["train_tokens"] == whole["train_tokens"]
    assert min(first["train_tokens"], second["train_tokens"]) > 0
    assert len(calls) == 8
    for key in ("loss", "eval_loss"):
        history = [
            [(e["step"], e[key]) for e in record["loss_history"] if key in e]
            for record in (second, whole)
        ]
        assert history[0] == history[1]


# ==== What a whole run touches, as a user with secrets

# The script as its own process runs it, with each path opened for writing, each path that is made,
# moved or removed, and each connection written to a list.
SPY = """
import os, runpy, sys
spied = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MOVES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate")
def spy(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        by_flags = args[1] is None and isinstance(args[2], int) and args[2] & WRITES
        writes = by_flags or set("wax+") & set(args[1] or "")
    else:
        writes = event in MOVES
    if writes:
        os.write(spied, b"write " + os.path.abspath(os.fsencode(args[0])) + b"\\n")
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        os.write(spied, f"network {args}\\n".encode())
sys.addaudithook(spy)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SECRET = "s3cr3t-0f-the-user"
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MY_PASSWORD")
UNSET = ["HF_HUB_OFFLINE", "PYTHONPATH", "XDG_CACHE_HOME", "MPLCONFIGDIR"]
UNSET += ["TORCHINDUCTOR_CACHE_DIR"]  # other tests of this process have torch set it


def test_a_run_writes_only_its_output_asks_nobody_and_tells_no_secret(tmp_path):
    repo, root = tmp_path / "repo", Path(t.__file__).parent
    shutil.copytree(root / "tests" / "tiny-qwen3.5", repo / "model")
    shutil.copy(t.__file__, repo)
    if HAS_INSPECTOR:
        shutil.copy(root / "inspect_lora.py", repo)
    for name in ("home", "cache", "tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "cache" / "token").write_text(SECRET)
    flags = [*write_short_data(tmp_path, train=4), "--num_epochs", "1", "--model_name", "model"]
    before = files(tmp_path)
    environment = {key: value for key, value in os.environ.items() if key not in UNSET}
    environment |= {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "cache")}
    environment |= {"TMPDIR": str(tmp_path / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    # A notebook's backend of matplotlib, which is not installed.
    environment |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    environment |= dict.fromkeys(SECRETS, SECRET)
    done = subprocess.run(
        [sys.executable, "-c", SPY, str(tmp_path / "spied"), "train_lora_single.py", *flags],
        cwd=repo, env=environment, capture_output=True, text=True, timeout=300, umask=0o022,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    output = repo / "output" / "demo"
    assert not re.search("(?m)^warning ", done.stdout)
    assert (output / "lora.png").exists() == HAS_INSPECTOR

    after, spied = files(tmp_path), read(tmp_path / "spied").splitlines()
    assert {name: after.get(name) for name in before} == before
    caches = [tmp_path / name for name in ("home", "cache", "tmp", "spied")]
    new = [tmp_path / name for name in after.keys() - before.keys()]
    assert [path for path in new if not below(path, [output, *caches])] == []
    written = {Path(line.partition(" ")[2]) for line in spied if line.startswith("write ")}
    assert output / "all_logs.log" in written
    allowed = [repo / "output", *caches, Path("/dev")]
    assert [path for path in written if not below(path, allowed)] == []
    assert [line for line in spied if line.startswith("network ")] == []

    data = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert len(data) > 10 and SECRET not in done.stdout + done.stderr
    assert [path for path, found in data.items() if SECRET.encode() in found] == []


def below(path, folders):
    """Return whether path is one of the folders, or in one."""
    return any(path.is_relative_to(one) for one in folders)
