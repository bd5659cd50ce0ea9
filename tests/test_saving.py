"""What a run leaves: the adapter and its verification, which epoch it is, learned.txt, run.json."""

import hashlib
import importlib.metadata
import re
import shlex
import shutil
import signal
from pathlib import Path

import peft
import pytest
import runs
import safetensors.torch
import torch
import transformers
from conftest import TOY
from safetensors.torch import load_file
from toys import EXPERTS, change_config, change_tensors, family, model_of

import train_lora_single as script
from train_lora.conversations import prompt_hash, system_message_of
from train_lora.losses import losses_of_replies
from train_lora.saving import summarize
from train_lora.trainer import MicroBatchedTrainer

RESULTS = ("final_lora", "final_lora_vllm")
OLD = {"older.txt": b"of another run"}


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    """Return whether two adapters have the same tensors, to the bit."""
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def put_old_results(output):
    """Put results of an earlier run into output."""
    for name in RESULTS:
        (output / name).mkdir(parents=True)
        (output / name / "older.txt").write_bytes(OLD["older.txt"])


def newest(output):
    """Return the folder of the newest checkpoint of the newest job."""
    paths = runs.job_folders(output)[-1].glob("checkpoint-*")
    return max(paths, key=lambda path: int(path.name.rpartition("-")[2]))


def test_no_file_is_a_pickle_but_what_resuming_needs(finished):
    """Which could run code."""
    starts = (b"PK\x03\x04", *(bytes([0x80, version]) for version in range(2, 6)))
    found = runs.files(finished.output).items()
    pickles = {Path(name).name for name, data in found if data.startswith(starts)}
    assert pickles <= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_no_file_has_weights_of_the_base(finished):
    adapters = [*finished.output.rglob("*.safetensors")]
    names = [name for path in adapters for name in load_file(path)]
    assert len(adapters) == 4  # of the newest two checkpoints, and of both forms
    assert [name for name in names if not re.search(r"\.lora_[AB]\.weight$", name)] == []


def test_the_adapter_is_the_last_steps_in_both_forms(finished, tmp_path):
    """For vLLM under the names that PEFT writes for the hub's class of model."""
    folders = [newest(finished.output), *(finished.output / name for name in RESULTS)]
    last, plain, renamed = map(tensors_of, folders)
    assert same(plain, last)
    assert {tensor.dtype for tensor in plain.values()} == {torch.float32}
    wrapper = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(TOY)
    lora = peft.LoraConfig(target_modules=script.LORA_TARGET_MODULES)
    peft.get_peft_model(wrapper, lora).save_pretrained(tmp_path)
    assert renamed.keys() == tensors_of(tmp_path).keys() and len(plain) == len(renamed)
    for name, tensor in plain.items():
        other = name.replace(".model.model.", ".model.model.language_model.")
        assert tensor.equal(renamed[other]) and other not in plain
    config, other = (runs.read_json(x / "adapter_config.json") for x in folders[1:])
    assert config == other
    # In the setting's order; PEFT makes a set of it, which has another order in every process.
    assert config["target_modules"] == script.LORA_TARGET_MODULES
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", TOY)


def test_a_model_that_is_no_wrapper_gets_no_second_form(flags, tmp_path):
    """What stands there under its name is another run's, and must not be served."""
    output = tmp_path / "output"
    put_old_results(output)
    folder = model_of(family("Qwen3Moe", **EXPERTS), tmp_path / "model", has_weights=True)
    targets = ["--lora_target_modules", *script.LORA_TARGET_MODULES[:4]]
    assert runs.run([*flags, "--model_name", folder, "--max_steps", "2", *targets]) == 0
    assert runs.read_record(output)["outcome"] == "finished"
    assert {path.name for path in output.glob("final_lora*")} & {*RESULTS} == {"final_lora"}
    for name in RESULTS:
        (renamed,) = output.glob(f"{name}.2*")
        assert runs.files(renamed) == OLD


def test_patterns_of_whole_paths_hold_in_both_forms(flags, tmp_path, monkeypatch):
    path = "model.layers.0.mlp.up_proj"
    runs.edit_config(monkeypatch, "lora_fields", rank_pattern={path: 4}, alpha_pattern={path: 3})
    assert runs.run([*flags, "--max_steps", "2"]) == 0
    for name, inside in zip(RESULTS, ("model", "model.language_model"), strict=True):
        config = runs.read_json(tmp_path / "output" / name / "adapter_config.json")
        own = path.replace("model", inside)
        assert (config["rank_pattern"], config["alpha_pattern"]) == ({own: 4}, {own: 3})


def first_of(tensors):
    return next(name for name in sorted(tensors) if "lora_A" in name)


def in_tensors(change):
    """Return a change of a folder's tensors."""
    return lambda folder: change_tensors(folder, lambda tensors: (change(tensors), tensors)[1])


WRONG = {  # what happens to the file before it is read again, and what must be named
    "a number": (in_tensors(lambda x: x[first_of(x)][0, 0].add_(1e-3)), "lora_A"),
    "a tensor is missing": (in_tensors(lambda x: x.pop(first_of(x))), "lora_A"),
    "another alpha": (lambda x: change_config(x, lora_alpha=24), "LEARNING_RATE"),
}  # fmt: skip


def spoil_what_vllm_gets(patch):
    """Have the file for vLLM written without the names that vLLM needs."""
    real = safetensors.torch.save_file

    def save(tensors, path, metadata):
        tensors = {name.replace("language_model.", ""): one for name, one in tensors.items()}
        real(tensors, path, metadata)

    patch.setattr(safetensors.torch, "save_file", save)


@pytest.fixture
def unverified(stopped, tmp_path, monkeypatch):
    """Return the command and the output of a job whose steps are done, and older results."""
    output = shutil.copytree(stopped.output, tmp_path / "output")
    argv = [*stopped.flags, "--output_dir", output]
    with monkeypatch.context() as patch:
        runs.before(patch, peft.PeftModel, "from_pretrained", runs.send(signal.SIGTERM))
        assert runs.run(argv) == 143
    shutil.rmtree(output / "final_lora")
    put_old_results(output)
    return argv, output


def refuses_to_publish(capfd, argv, output, key):
    """The run fails, names this, and leaves the older results and the checkpoint."""
    runs.refused(capfd, argv, key)
    assert runs.read_record(output)["outcome"].startswith("failed: ")
    assert all(runs.files(output / name) == OLD for name in RESULTS)
    assert not [*output.glob("final_lora*.2*")] and runs.checkpoints(output)[-1] == 8


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_is_not_as_trained_is_not_published(what, unverified, monkeypatch, capfd):
    change, key = WRONG[what]
    tamper = lambda _, folder, **__: change(Path(folder))  # noqa: E731
    runs.before(monkeypatch, peft.PeftModel, "from_pretrained", tamper)
    refuses_to_publish(capfd, *unverified, key)


def test_names_that_vllm_does_not_know_are_not_published(unverified, monkeypatch, capfd):
    spoil_what_vllm_gets(monkeypatch)
    refuses_to_publish(capfd, *unverified, "layers.0")


def test_an_adapter_that_changes_nothing_is_refused(flags, tmp_path, capfd):
    flags = [*flags, "--dtype", "bfloat16", "--learning_rate", "1e-9", "--max_steps", "1"]
    runs.refused(capfd, flags, "LEARNING_RATE")
    assert runs.checkpoints(tmp_path / "output") == [1]
    assert not (tmp_path / "output" / "final_lora").exists()


def weigh_losses(patch, *factors):
    """Multiply the held-out losses by these factors, one evaluation after the other."""
    real, left = losses_of_replies, iter(factors)

    def weighed(*given):
        factor = next(left)
        return [[factor * loss for loss in losses] for losses in real(*given)]

    runs.replace_ours(patch, "losses_of_replies", weighed)


def test_the_best_epoch_is_kept_and_published_when_asked_for(tmp_path, monkeypatch):
    """From its checkpoint, without training, and although the base's loss is lower still."""
    flags = runs.short_flags(tmp_path, train=3, held_out=2)
    flags += ["--num_epochs", "5", "--save_steps", "99"]
    output = tmp_path / "output"
    with monkeypatch.context() as patch:
        weigh_losses(patch, *range(1, 7))
        assert runs.run(flags) == 0
    losses = runs.logged(runs.history(output), "eval_loss")
    assert losses[0] < losses[1] == min(losses[1:])
    assert runs.checkpoints(output) == [1, 4, 5]  # of five; the two newest can be resumed from
    for owner, name in ((MicroBatchedTrainer, "training_step"), (script, "find_what_fits")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("trains"))
    for which, step in (("best", 1), ("best", 1), ("last", 5)):
        assert runs.run([*flags, "--final_lora", which]) == 0
        record = runs.read_record(output)
        assert record["outcome"] == "finished" and record["adapter"]["step"] == step
        (checkpoint,) = output.glob(f"checkpoints/*/checkpoint-{step}")
        assert same(tensors_of(output / "final_lora"), tensors_of(checkpoint))
        assert runs.checkpoints(output) == [1, 4, 5]
    assert len([*output.glob("final_lora.2*")]) == 2  # the one that was there already stayed


@pytest.mark.parametrize("lost", ["the best step", "the adapter's bytes"])
def test_a_finished_job_without_its_checkpoints_does_not_begin_again(lost, tmp_path, capfd):
    """They may be deleted, as output/README.md says; what is asked for then is not to be had."""
    flags, output = runs.short_flags(tmp_path, train=3, held_out=2), tmp_path / "output"
    with pytest.MonkeyPatch.context() as patch:
        weigh_losses(patch, 1, 2, 3)  # the first epoch is better
        assert runs.run(flags) == 0
    shutil.rmtree(output / "checkpoints")
    if lost == "the best step":
        flags += ["--final_lora", "best"]
    else:
        (output / runs.ADAPTER).write_bytes(b"damaged")
    left = runs.files(output)
    runs.refused(capfd, flags, "OUTPUT_DIR", str(output / "final_lora"))
    assert runs.run([*flags, "--dry_run"]) == 0
    assert runs.files(output) | {"run.json": left["run.json"]} == left


def test_the_held_out_loss_may_be_measured_within_an_epoch(tmp_path, monkeypatch, capfd):
    """And the best of these is kept. Its checkpoint must have been loaded when it is saved."""
    flags = [*runs.short_flags(tmp_path), "--eval_steps", "3", "--final_lora", "best"]
    output, load = tmp_path / "output", peft.PeftModel.load_adapter

    def load_no_checkpoint(model, folder, *given, **more):
        if "checkpoint" not in str(folder):
            return load(model, folder, *given, **more)

    with monkeypatch.context() as patch:
        weigh_losses(patch, 1, 0.5, 0.9, 0.9)
        patch.setattr(peft.PeftModel, "load_adapter", load_no_checkpoint)
        runs.refused(capfd, flags, "lora_")
    history = runs.history(output)
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 3, 6, 8]
    assert not (output / "final_lora").exists() and 3 in runs.checkpoints(output)
    end = runs.command(capfd, flags)
    assert end.status == 0 and "WARNING" not in end.out
    (checkpoint,) = output.glob("checkpoints/*/checkpoint-3")
    assert same(tensors_of(output / "final_lora"), tensors_of(checkpoint))
    assert runs.read_record(output)["adapter"]["step"] == 3


def test_a_lost_copy_for_vllm_is_written_again(finished, tmp_path, monkeypatch, capfd):
    output = shutil.copytree(finished.output, tmp_path / "out put")
    flags = [*finished.flags, "--output_dir", output]
    for path in (output / "final_lora_vllm" / "run.json", output / "run.json"):
        path.write_text("of another job")
    refuse = lambda *_, **__: pytest.fail("trains")  # noqa: E731
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    assert runs.run([*flags, "--dry_run"]) == 0
    assert not [*output.glob("final_lora_vllm.*")]
    with monkeypatch.context() as patch:
        spoil_what_vllm_gets(patch)
        runs.refused(capfd, flags, "layers.0")  # and it is written once more
    assert runs.run([*flags, "--matmul", "native"]) == 0  # the same job
    found, expected = (x / "final_lora_vllm" for x in (output, finished.output))
    assert same(tensors_of(found), tensors_of(expected))
    assert runs.files(found) == runs.files(expected)
    assert runs.read_record(output) == runs.read_record(finished.output / "final_lora")


NEXT = {  # the card's capability, fields of LoraConfig, and vLLM's rank; 0 where it cannot serve
    "as shipped": (None, {}, 8),
    "Ampere": ((8, 0), {}, 8),
    "Volta": ((7, 0), {}, 0),
    "DoRA": (None, {"use_dora": True}, 0),
    "a whole module": (None, {"modules_to_save": ["lm_head"]}, 0),
    "a larger rank": (None, {"rank_pattern": {"q_proj": 24}}, 32),
}


@pytest.mark.parametrize("case", NEXT)
def test_the_next_commands_can_be_given_as_they_are(case, finished, tmp_path, monkeypatch, capfd):
    """Quoted, and vLLM's only where it can serve the adapter."""
    capability, fields, rank = NEXT[case]
    output = shutil.copytree(finished.output, tmp_path / "out put")
    change_config(output / "final_lora", **fields)
    job = runs.prepared([*finished.flags, "--output_dir", output])
    job.session.loss_history = runs.history(output)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/inspect-lora")
    capfd.readouterr()
    summarize(job, 8)
    lines = capfd.readouterr().out.splitlines()
    served = [shlex.split(line) for line in lines if "vllm serve" in line]
    assert len(served) == (rank > 0)
    for words in served:
        assert f"adapter={output / 'final_lora_vllm'}" in words and words[2] == TOY
        assert words[words.index("--max-lora-rank") + 1] == str(rank)
    (evidence,) = [shlex.split(line) for line in lines if "inspect-lora evidence" in line]
    assert str(output / "final_lora") in evidence


def test_the_cards_lines_have_the_adapter_reply(finished, tmp_path, monkeypatch, capfd):
    text = (finished.output / "final_lora" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(finished.output)
    capfd.readouterr()
    exec(compile(code, "card", "exec"), {})
    assert "You are Nell." in capfd.readouterr().out


def test_an_adapter_says_what_it_learned_and_from_which_run(finished):
    """A hash of each prompt, without its system message."""
    examples = runs.prepared(finished.flags).data.examples
    learned = sorted({prompt_hash(example.messages[:-1]) for example in examples})
    (job,) = runs.job_folders(finished.output)
    folders = [finished.output / name for name in RESULTS]
    for folder in [finished.output / "final_lora", newest(finished.output)]:
        lines = (folder / "learned.txt").read_text(encoding="utf-8").split()
        assert lines == learned and len(lines) == 14
        assert runs.read_json(folder / "run.json")["job"] == job.name
    assert not (finished.output / "final_lora_vllm" / "learned.txt").exists()  # which is published
    for folder in [*folders, finished.output]:
        record = runs.read_record(folder)
        assert (record["outcome"], record["job"]) == ("finished", job.name)


def test_a_hash_of_a_prompt_does_not_depend_on_its_form():
    """But for what is said, and by whom."""
    one = runs.talk(3)
    assert prompt_hash(one) == prompt_hash(one[1:])  # the system message
    spaced = [message | {"content": f" {message['content']}\n"} for message in one]
    assert prompt_hash(one) == prompt_hash(spaced)
    others = [runs.talk(4), one[:2], [one[1], one[2] | {"content": "No."}]]
    others.append([one[2] | {"role": "user"}])
    assert len({prompt_hash(other) for other in [one, *others]}) == 5
    assert re.fullmatch("[0-9a-f]{16}", prompt_hash(one))


def test_run_json_says_what_was_done(finished):
    record = runs.read_record(finished.output)
    assert record["settings"].keys() == {*runs.SETTINGS}
    assert record["settings"]["NUM_EPOCHS"] == 2 and record["settings"]["MODEL_NAME"] == TOY
    assert record["sessions"][0]["versions"]["trl"] == importlib.metadata.version("trl")
    assert record["system_message"] == "You are Nell."
    for key, setting in (("train", "TRAIN_FILE"), ("held_out", "EVAL_FILE")):
        path = Path(record["settings"][setting])
        facts = record["data"][key]
        assert (facts["file"], facts["sha256"]) == (str(path), sha256(path))
    assert record["adapter"] == {"step": 8, "sha256": sha256(finished.output / runs.ADAPTER)}
    steps = [entry["step"] for entry in record["loss_history"] if "loss" in entry]
    evals = [entry["step"] for entry in record["loss_history"] if "eval_loss" in entry]
    assert steps == [*range(1, 9)] and evals == [0, 4, 8]


def test_a_system_message_that_not_all_have_is_none_of_all(finished, tmp_path):
    rows = [{"messages": runs.talk(number)[number % 2 :]} for number in range(4)]
    flags = [*finished.flags, "--train_file", runs.write_lines(tmp_path / "mixed.jsonl", rows)]
    assert system_message_of(runs.prepared(flags).data.examples) is None
