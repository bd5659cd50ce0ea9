"""What a run leaves: the adapter and its verification, which epoch it is, learned.txt, run.json."""

import hashlib
import importlib.metadata
import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import TOY
from runs import (
    ADAPTER,
    before,
    checkpoints,
    files,
    job_folders,
    logged,
    on_trainer,
    prepared,
    read_json,
    read_record,
    refused,
    run,
    send,
    short_flags,
    talk,
    write_lines,
    write_talks,
)
from safetensors.torch import load_file
from toys import change_config, change_tensors
from transformers import TrainerCallback

import train_lora_single as t

RESULTS = ("final_lora", "final_lora_vllm")
ORIGIN = {"adapter_config.json", "adapter_model.safetensors", "learned.txt", "run.json"}
OLD = {"older.txt": b"of another run"}


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    """Return whether two adapters have the same tensors, to the bit."""
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def config_of(folder):
    return read_json(folder / "adapter_config.json")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def put_old_results(output):
    """Put results of an earlier run into output."""
    for name in RESULTS:
        (output / name).mkdir(parents=True)
        for file, data in OLD.items():
            (output / name / file).write_bytes(data)


def newest(output):
    """Return the folder of the newest checkpoint of the newest job."""
    paths = job_folders(output)[-1].glob("checkpoint-*")
    return max(paths, key=lambda path: int(path.name.rpartition("-")[2]))


# ---- the adapter's files ------------------------------------------------------------------------


def test_a_run_leaves_these_files(finished):
    """And none of them is a pickle, which could run code, but for what resuming needs."""
    there = {path.name for path in finished.output.iterdir()}
    assert there == {*RESULTS, "run.json", "checkpoints", "all_logs.log", ".lock"}
    names = {name: {one.name for one in (finished.output / name).iterdir()} for name in RESULTS}
    assert all(names[name] >= ORIGIN for name in RESULTS)
    assert names["final_lora"] >= {"README.md", "chat_template.jinja", "tokenizer.json"}
    found = files(finished.output)
    starts = (b"PK\x03\x04", *(bytes([0x80, version]) for version in range(2, 6)))
    pickles = {Path(name).name for name, data in found.items() if data.startswith(starts)}
    assert pickles <= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_the_adapter_is_the_last_steps_in_both_forms(finished, tmp_path):
    """For vLLM under the names that PEFT writes for the hub's class of model."""
    last, plain, renamed = map(
        tensors_of, [newest(finished.output), *(finished.output / name for name in RESULTS)]
    )
    assert checkpoints(finished.output)[-1] == 8 and same(plain, last)
    assert {tensor.dtype for tensor in plain.values()} == {torch.float32}
    wrapper = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(TOY)
    lora = peft.LoraConfig(target_modules=t.LORA_TARGET_MODULES)
    peft.get_peft_model(wrapper, lora).save_pretrained(tmp_path)
    assert renamed.keys() == tensors_of(tmp_path).keys() and len(plain) == len(renamed)
    for name, tensor in plain.items():
        other = name.replace(".model.model.", ".model.model.language_model.")
        assert tensor.equal(renamed[other]) and other not in plain
    config = config_of(finished.output / "final_lora")
    assert config == config_of(finished.output / "final_lora_vllm")
    # In the setting's order; PEFT makes a set of it, which has another order in every process.
    assert config["target_modules"] == t.LORA_TARGET_MODULES
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", TOY)


def test_a_model_that_is_no_wrapper_gets_no_second_form(flags, base, tokenizer, tmp_path):
    """What stands there under its name is another run's, and must not be served."""
    output, plain = tmp_path / "output", tmp_path / "plain"
    put_old_results(output)
    base.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    assert run([*flags, "--model_name", plain, "--max_steps", "1"]) == 0
    assert {path.name for path in output.glob("final_lora*")} & {*RESULTS} == {"final_lora"}
    for name in RESULTS:
        (renamed,) = output.glob(f"{name}.2*")
        assert files(renamed) == OLD


# ---- the verification ---------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def unverified(tmp_path_factory):
    """Return the flags and the output of a run that was stopped in its verification."""
    folder = tmp_path_factory.mktemp("unverified")
    flags = [*short_flags(folder), "--max_steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        before(patch, peft.PeftModel, "from_pretrained", send(signal.SIGTERM))
        assert run(flags) == 143
    assert checkpoints(folder / "output") == [2]
    return flags, folder / "output"


def test_a_file_that_is_not_as_trained_is_not_published(unverified, tmp_path, monkeypatch, capfd):
    flags, stopped = unverified
    output = shutil.copytree(stopped, tmp_path / "output")
    put_old_results(output)
    argv = [*flags, "--output_dir", output]
    for change, key in WRONG.values():
        with monkeypatch.context() as patch:
            tamper = lambda _, folder, change=change, **__: change(Path(folder))  # noqa: E731
            before(patch, peft.PeftModel, "from_pretrained", tamper)
            refused(capfd, argv, key)
        assert read_record(output)["outcome"].startswith("failed: ")
        assert all(files(output / name) == OLD for name in RESULTS)
        assert not [*output.glob("final_lora*.2*")] and checkpoints(output) == [2]
    assert run(argv) == 0  # the same command publishes it
    for name in RESULTS:
        (renamed,) = output.glob(f"{name}.2*")
        assert files(renamed) == OLD and len(tensors_of(output / name)) == 20
    assert {path.name.partition(".2")[0] for path in output.iterdir()} == {
        *RESULTS, "run.json", "checkpoints", "all_logs.log", ".lock",
    }  # fmt: skip


def test_an_adapter_that_changes_nothing_is_refused(flags, tmp_path, capfd):
    flags = [*flags, "--dtype", "bfloat16", "--learning_rate", "1e-9", "--max_steps", "1"]
    refused(capfd, flags, "LEARNING_RATE")
    assert checkpoints(tmp_path / "output") == [1]
    assert not (tmp_path / "output" / "final_lora").exists()


# ---- which epoch becomes final_lora -------------------------------------------------------------


def worsen(trainer):
    """Have the held-out loss be worse after each epoch."""

    def scale(model, _, output):
        if not model.training:
            output.logits = output.logits * (1 - 3 * trainer.state.global_step)

    handle = trainer.model.register_forward_hook(scale)

    class Stop(TrainerCallback):
        def on_train_end(self, *_, **__):
            handle.remove()  # the verification is not of this

    trainer.add_callback(Stop())


def test_the_best_epoch_is_kept_and_published_when_asked_for(tmp_path, monkeypatch):
    """From its checkpoint, without training, and although the base's loss is lower still."""
    flags = [*short_flags(tmp_path, train=3, held_out=2), "--num_epochs", "5", "--save_steps", "99"]
    output = tmp_path / "output"
    with monkeypatch.context() as patch:
        on_trainer(patch, worsen)
        assert run(flags) == 0
    losses = logged(read_record(output)["loss_history"], "eval_loss")
    assert losses[0] < losses[1] == min(losses[1:])
    assert checkpoints(output) == [1, 4, 5]  # of five; the two newest can be resumed from
    for owner, name in ((t.LoraTrainer, "training_step"), (t, "find_what_fits")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("trains"))
    for which, step in (("best", 1), ("best", 1), ("last", 5)):
        assert run([*flags, "--final_lora", which]) == 0
        record = read_record(output)
        assert record["outcome"] == "finished" and record["adapter"]["step"] == step
        (checkpoint,) = output.glob(f"checkpoints/*/checkpoint-{step}")
        assert same(tensors_of(output / "final_lora"), tensors_of(checkpoint))
        assert read_json(output / "final_lora" / "run.json")["adapter"]["step"] == step
        assert checkpoints(output) == [1, 4, 5]
    assert len([*output.glob("final_lora.2*")]) == 2  # the one that was there already stayed


# ---- where the adapter comes from ---------------------------------------------------------------


def learned_by(examples):
    """Return the lines of learned.txt: a hash of each prompt without its system message."""
    return sorted({t.key_of(example.messages[:-1]) for example in examples})


def test_an_adapter_says_what_it_learned_and_from_which_run(finished):
    job, record = prepared(finished.flags), read_record(finished.output)
    folders = [finished.output / name for name in RESULTS]
    for folder in [*folders, newest(finished.output)]:
        lines = (folder / "learned.txt").read_text(encoding="utf-8").split()
        assert lines == learned_by(job.examples) and len(lines) == 14
        assert (
            read_json(folder / "run.json")["job"]
            == record["job"]
            == job_folders(finished.output)[0].name
        )
    for folder in folders:
        assert read_json(folder / "run.json")["outcome"] == "finished"


def test_a_hash_of_a_prompt_does_not_depend_on_its_form():
    """But for what is said, and by whom."""
    one = talk(3)
    assert t.key_of(one) == t.key_of(one[1:])  # the system message
    spaced = [message | {"content": f" {message['content']}\n"} for message in one]
    assert t.key_of(one) == t.key_of(spaced)
    others = [talk(4), one[:2], [one[1], one[2] | {"content": "No."}], [one[2] | {"role": "user"}]]
    assert len({t.key_of(other) for other in [one, *others]}) == 5
    assert re.fullmatch("[0-9a-f]{16}", t.key_of(one))


def test_run_json_says_what_was_done(finished):
    record, job = read_record(finished.output), prepared(finished.flags)
    assert record["outcome"] == "finished" and record["started"] <= record["time"]
    assert shlex.split(record["command"])[0] == "python"
    assert record["settings"].keys() == t.SETTINGS.keys()
    assert record["settings"]["NUM_EPOCHS"] == 2 and record["settings"]["MODEL_NAME"] == TOY
    assert (record["matmul"], record["system_message"]) == ("native", "You are Nell.")
    for name in ("torch", "transformers", "peft", "trl"):
        assert record["versions"][name] == importlib.metadata.version(name)
    for key, setting, examples in (
        ("train", "TRAIN_FILE", job.examples), ("held_out", "EVAL_FILE", job.held_out),
    ):  # fmt: skip
        path = Path(record["settings"][setting])
        assert record["data"][key] == {
            "file": str(path), "sha256": sha256(path), "examples": len(examples),
            "tokens": sum(len(one.input_ids) for one in examples),
            "targets": sum(len(one.reply_ids) for one in examples),
        }  # fmt: skip
    assert record["adapter"] == {"step": 8, "sha256": sha256(finished.output / ADAPTER)}
    steps = [entry["step"] for entry in record["loss_history"] if "loss" in entry]
    evals = [entry["step"] for entry in record["loss_history"] if "eval_loss" in entry]
    assert steps == [*range(1, 9)] and evals == [0, 4, 8]


def test_what_was_held_out_lies_beside_the_adapter(tmp_path):
    """With its hash in run.json, so that it is found and known again; nothing of it was learned."""
    output, flags = tmp_path / "output", short_flags(tmp_path)
    train_file = write_talks(tmp_path / "train.jsonl", range(60))
    flags = [*flags, "--train_file", train_file, "--max_steps", "1"]
    assert run([*flags, "--eval_file", "50%"]) == 0
    path, record = output / "held_out.jsonl", read_record(output)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert record["data"]["held_out"]["file"] == str(path)
    assert record["data"]["held_out"]["sha256"] == sha256(path)
    assert record["data"]["held_out"]["examples"] == len(rows) == 30
    learned = (output / "final_lora" / "learned.txt").read_text(encoding="utf-8").split()
    assert len(learned) == record["data"]["train"]["examples"] == 30
    assert not {t.key_of(row["prompt"]) for row in rows} & {*learned}


def test_without_one_system_message_none_is_recorded(flags, tmp_path):
    rows = [{"messages": talk(number)[number % 2 :]} for number in range(4)]
    train_file = write_lines(tmp_path / "mixed.jsonl", rows)
    assert run([*flags, "--train_file", train_file, "--max_steps", "1"]) == 0
    assert read_record(tmp_path / "output")["system_message"] is None
