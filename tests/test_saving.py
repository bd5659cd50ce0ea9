"""What a run leaves: the adapter and its verification, which epoch it is, learned.txt, run.json."""

import hashlib
import importlib.metadata
import itertools
import re
import shlex
import signal
from pathlib import Path

import peft
import pytest
import runs
import torch
import transformers
from conftest import TOY
from safetensors.torch import load_file
from toys import EXPERTS, change_config, change_tensors, family, model_of

import train_lora_single as t

RESULTS = ("final_lora", "final_lora_vllm")
ORIGIN = {"adapter_config.json", "adapter_model.safetensors", "learned.txt", "run.json"}
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


def test_a_run_leaves_these_files(finished):
    """And none of them is a pickle, which could run code, but for what resuming needs."""
    there = {path.name for path in finished.output.iterdir()}
    assert there == {*RESULTS, "run.json", "checkpoints", "all_logs.log", ".lock"}
    names = {name: {one.name for one in (finished.output / name).iterdir()} for name in RESULTS}
    assert all(names[name] >= ORIGIN for name in RESULTS)
    assert names["final_lora"] >= {"README.md", "chat_template.jinja", "tokenizer.json"}
    found = runs.files(finished.output)
    log = (finished.output / "all_logs.log").read_text(encoding="utf-8")
    assert re.findall(r"^train .*\bstep (\d)/8 ", log, re.MULTILINE) == [*"12345678"]
    starts = (b"PK\x03\x04", *(bytes([0x80, version]) for version in range(2, 6)))
    pickles = {Path(name).name for name, data in found.items() if data.startswith(starts)}
    assert pickles <= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    # The newest two checkpoints stay, and the best epoch's, which is 8. No file has base weights.
    assert runs.checkpoints(finished.output) == [6, 8]
    adapters = [*finished.output.rglob("*.safetensors")]
    names = [name for path in adapters for name in load_file(path)]
    assert len(adapters) == 4
    assert [name for name in names if not re.search(r"\.lora_[AB]\.weight$", name)] == []


def test_the_adapter_is_the_last_steps_in_both_forms(finished, tmp_path):
    """For vLLM under the names that PEFT writes for the hub's class of model."""
    folders = [newest(finished.output), *(finished.output / name for name in RESULTS)]
    last, plain, renamed = map(tensors_of, folders)
    assert same(plain, last)
    assert {tensor.dtype for tensor in plain.values()} == {torch.float32}
    wrapper = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(TOY)
    lora = peft.LoraConfig(target_modules=t.LORA_TARGET_MODULES)
    peft.get_peft_model(wrapper, lora).save_pretrained(tmp_path)
    assert renamed.keys() == tensors_of(tmp_path).keys() and len(plain) == len(renamed)
    for name, tensor in plain.items():
        other = name.replace(".model.model.", ".model.model.language_model.")
        assert tensor.equal(renamed[other]) and other not in plain
    config, other = (runs.read_json(x / "adapter_config.json") for x in folders[1:])
    assert config == other
    # In the setting's order; PEFT makes a set of it, which has another order in every process.
    assert config["target_modules"] == t.LORA_TARGET_MODULES
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", TOY)


def test_a_model_that_is_no_wrapper_gets_no_second_form(flags, tmp_path):
    """What stands there under its name is another run's, and must not be served."""
    output = tmp_path / "output"
    put_old_results(output)
    folder = model_of(family("Qwen3Moe", **EXPERTS), tmp_path / "model", has_weights=True)
    targets = ["--lora_target_modules", *t.LORA_TARGET_MODULES[:4]]
    assert runs.run([*flags, "--model_name", folder, "--max_steps", "2", *targets]) == 0
    assert runs.read_record(output)["outcome"] == "finished"
    assert {path.name for path in output.glob("final_lora*")} & {*RESULTS} == {"final_lora"}
    for name in RESULTS:
        (renamed,) = output.glob(f"{name}.2*")
        assert runs.files(renamed) == OLD


def test_patterns_of_whole_paths_hold_in_both_forms(flags, tmp_path, monkeypatch):
    path = "model.layers.0.mlp.up_proj"
    runs.edit_config(monkeypatch, "lora_config", rank_pattern={path: 4}, alpha_pattern={path: 3})
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
    "a name": (in_tensors(lambda x: x.update({f"{first_of(x)}s": x.pop(first_of(x))})), "lora_A"),
    "another alpha": (lambda x: change_config(x, lora_alpha=24), ""),
    "what vLLM gets": (
        lambda x: change_tensors(x.with_name("final_lora_vllm"), lambda y: {
            name.replace("language_model.", ""): one for name, one in y.items()
        }), "layers.0",
    ),
}  # fmt: skip


def test_a_file_that_is_not_as_trained_is_not_published(flags, tmp_path, monkeypatch, capfd):
    argv, output = [*flags, "--max_steps", "2"], tmp_path / "output"
    with monkeypatch.context() as patch:
        runs.before(patch, peft.PeftModel, "from_pretrained", runs.send(signal.SIGTERM))
        assert runs.run(argv) == 143
    put_old_results(output)
    for change, key in WRONG.values():
        with monkeypatch.context() as patch:
            tamper = lambda _, folder, change=change, **__: change(Path(folder))  # noqa: E731
            runs.before(patch, peft.PeftModel, "from_pretrained", tamper)
            runs.refused(capfd, argv, key)
        assert runs.read_record(output)["outcome"].startswith("failed: ")
        assert all(runs.files(output / name) == OLD for name in RESULTS)
        assert not [*output.glob("final_lora*.2*")] and runs.checkpoints(output) == [2]
    assert runs.run(argv) == 0  # the same command publishes it
    for name in RESULTS:
        (renamed,) = output.glob(f"{name}.2*")
        assert runs.files(renamed) == OLD and len(tensors_of(output / name)) == 20
    assert not (output / ".partial").exists()


def test_an_adapter_that_changes_nothing_is_refused(flags, tmp_path, capfd):
    flags = [*flags, "--dtype", "bfloat16", "--learning_rate", "1e-9", "--max_steps", "1"]
    runs.refused(capfd, flags, "LEARNING_RATE")
    assert runs.checkpoints(tmp_path / "output") == [1]
    assert not (tmp_path / "output" / "final_lora").exists()


def test_the_best_epoch_is_kept_and_published_when_asked_for(tmp_path, monkeypatch):
    """From its checkpoint, without training, and although the base's loss is lower still."""
    flags = runs.short_flags(tmp_path, train=3, held_out=2)
    flags += ["--num_epochs", "5", "--save_steps", "99"]
    output = tmp_path / "output"
    factors, real = itertools.count(1), t.example_losses

    def worse_each_time(*given):
        factor = next(factors)
        return [factor * loss for loss in real(*given)]

    with monkeypatch.context() as patch:
        patch.setattr(t, "example_losses", worse_each_time)
        assert runs.run(flags) == 0
    losses = runs.logged(runs.history(output), "eval_loss")
    assert losses[0] < losses[1] == min(losses[1:])
    assert runs.checkpoints(output) == [1, 4, 5]  # of five; the two newest can be resumed from
    for owner, name in ((t.LoraTrainer, "training_step"), (t, "find_what_fits")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("trains"))
    for which, step in (("best", 1), ("best", 1), ("last", 5)):
        assert runs.run([*flags, "--final_lora", which]) == 0
        record = runs.read_record(output)
        assert record["outcome"] == "finished" and record["adapter"]["step"] == step
        (checkpoint,) = output.glob(f"checkpoints/*/checkpoint-{step}")
        assert same(tensors_of(output / "final_lora"), tensors_of(checkpoint))
        assert runs.read_json(output / "final_lora" / "run.json")["adapter"]["step"] == step
        assert runs.checkpoints(output) == [1, 4, 5]
    assert len([*output.glob("final_lora.2*")]) == 2  # the one that was there already stayed


def test_an_adapter_says_what_it_learned_and_from_which_run(finished):
    """A hash of each prompt, without its system message."""
    examples = runs.prepared(finished.flags).examples
    learned = sorted({t.key_of(example.messages[:-1]) for example in examples})
    (job,) = runs.job_folders(finished.output)
    folders = [finished.output / name for name in RESULTS]
    for folder in [*folders, newest(finished.output)]:
        lines = (folder / "learned.txt").read_text(encoding="utf-8").split()
        assert lines == learned and len(lines) == 14
        assert runs.read_json(folder / "run.json")["job"] == job.name
    for folder in [*folders, finished.output]:
        record = runs.read_record(folder)
        assert (record["outcome"], record["job"]) == ("finished", job.name)


def test_a_hash_of_a_prompt_does_not_depend_on_its_form():
    """But for what is said, and by whom."""
    one = runs.talk(3)
    assert t.key_of(one) == t.key_of(one[1:])  # the system message
    spaced = [message | {"content": f" {message['content']}\n"} for message in one]
    assert t.key_of(one) == t.key_of(spaced)
    others = [runs.talk(4), one[:2], [one[1], one[2] | {"content": "No."}]]
    others.append([one[2] | {"role": "user"}])
    assert len({t.key_of(other) for other in [one, *others]}) == 5
    assert re.fullmatch("[0-9a-f]{16}", t.key_of(one))


def test_run_json_says_what_was_done(finished, tmp_path):
    record = runs.read_record(finished.output)
    assert record["started"] <= record["time"]
    assert shlex.split(record["command"])[0] == "python"
    assert record["settings"].keys() == t.SETTINGS.keys()
    assert record["settings"]["NUM_EPOCHS"] == 2 and record["settings"]["MODEL_NAME"] == TOY
    assert (record["matmul"], record["system_message"]) == ("native", "You are Nell.")
    for name in ("torch", "transformers", "peft", "trl"):
        assert record["versions"][name] == importlib.metadata.version(name)
    for key, setting in (("train", "TRAIN_FILE"), ("held_out", "EVAL_FILE")):
        path = Path(record["settings"][setting])
        facts = record["data"][key]
        assert (facts["file"], facts["sha256"]) == (str(path), sha256(path))
    assert record["adapter"] == {"step": 8, "sha256": sha256(finished.output / runs.ADAPTER)}
    steps = [entry["step"] for entry in record["loss_history"] if "loss" in entry]
    evals = [entry["step"] for entry in record["loss_history"] if "eval_loss" in entry]
    assert steps == [*range(1, 9)] and evals == [0, 4, 8]
    # Where some have no system message, there is none of all.
    rows = [{"messages": runs.talk(number)[number % 2 :]} for number in range(4)]
    flags = [*finished.flags, "--train_file", runs.write_lines(tmp_path / "mixed.jsonl", rows)]
    assert t.system_message_of(runs.prepared(flags).examples) is None
