"""What a run leaves: the adapter, its check, which epoch it is, card, run.json, last lines."""

import hashlib
import importlib.metadata
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

import peft
import pytest
import safetensors.torch
import transformers
from conftest import ROOT, handlers_restored, write_short_data
from huggingface_hub import ModelCard
from huggingface_hub.errors import GatedRepoError
from processes import run_in_a_fork
from safetensors.torch import load_file, save_file
from trainers import (
    ADAPTER,
    before,
    changed_model,
    checkpoints,
    command_in,
    commands_in,
    files,
    logged,
    on_trainer,
    read_record,
    refused,
    run,
    send,
)
from transformers import AutoModelForCausalLM, TrainerCallback

import train_lora_single as t

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
RESULTS = ("final_lora", "final_lora_vllm")
UP = "base_model.model.model.layers.0.mlp.up_proj"


def read(path):
    return Path(path).read_text(encoding="utf-8")


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads(read(folder / "adapter_config.json"))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ==== The adapter's files


def test_a_run_leaves_exactly_these_files(finished):
    """And none of them is a pickle, which could run code, but for what resuming needs."""
    names = {name for name in files(finished) if not name.startswith("checkpoints/")}
    tokenizer = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    expected = {f"final_lora/{name}" for name in {"README.md"} | ADAPTER_FILES | tokenizer}
    expected |= {f"final_lora_vllm/{name}" for name in ADAPTER_FILES}
    assert names == expected | {"run.json"}
    there = {path.name for path in finished.iterdir()}
    assert there == {*RESULTS, "run.json", "checkpoints", "all_logs.log", ".lock"}
    starts = (b"PK\x03\x04", *(bytes([0x80, version]) for version in range(2, 6)))
    assert not [name for name in names if (finished / name).read_bytes().startswith(starts)]


def test_the_adapter_is_the_last_steps_in_both_forms(finished, tiny, tmp_path):
    """In vLLM's form under the names that PEFT writes for the wrapper model on the hub."""
    last, plain, renamed = (
        tensors_of(finished / name) for name in ("checkpoints/checkpoint-8", *RESULTS)
    )
    assert last.keys() == plain.keys() and all(plain[name].equal(last[name]) for name in plain)
    assert {str(tensor.dtype) for tensor in plain.values()} == {"torch.float32"}
    wrapper = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(tiny)
    lora = peft.LoraConfig(target_modules=t.LORA_TARGET_MODULES)
    peft.get_peft_model(wrapper, lora).save_pretrained(tmp_path)
    assert renamed.keys() == tensors_of(tmp_path).keys() and len(plain) == len(renamed)
    for name, tensor in plain.items():
        other = name.replace(".model.model.", ".model.model.language_model.")
        assert tensor.equal(renamed[other]) and other not in plain
    config = config_of(finished / "final_lora")
    assert config == config_of(finished / "final_lora_vllm")
    # In the setting's order; PEFT makes a set of it, which has another order in every process.
    assert config["target_modules"] == t.LORA_TARGET_MODULES
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", tiny)
    modes = {
        path.stat().st_mode & 0o044 for name in RESULTS for path in (finished / name).iterdir()
    }
    assert modes == {0o044 & ~os.umask(os.umask(0o022))}  # a server may be another user


@pytest.fixture
def plain_model(tiny, tmp_path):
    """Return a folder with the text model alone, as no wrapper model has it."""
    folder = tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(tiny, dtype="float32").save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return str(folder)


def test_a_model_that_is_no_wrapper_gets_no_second_form(flags, plain_model, tmp_path, capsys):
    """What stands there under its name must not be served; links that lead nowhere are no bar."""
    output = tmp_path / "output"
    (output / "final_lora_vllm").mkdir(parents=True)
    (output / "final_lora_vllm" / "older").write_text("older")
    for name in ("final_lora", "run.json", "checkpoints"):
        (output / name).symlink_to(f"/nowhere/{name}")
    t.main([*flags, "--model_name", plain_model, "--max_steps", "1"])
    assert (output / "final_lora").exists() and not (output / "final_lora_vllm").exists()
    (renamed,) = output.glob("final_lora_vllm.2*")
    assert files(renamed) == {"older": b"older"}
    for name in ("final_lora", "run.json", "checkpoints"):
        (renamed,) = output.glob(f"{name}.2*")
        assert os.readlink(renamed) == f"/nowhere/{name}" and not (output / name).is_symlink()
    words = command_in(capsys.readouterr().out, "vllm", "serve", plain_model)
    assert words[words.index("--lora-modules") + 1] == f"output={output}/final_lora"


# ==== The check of what was saved


@pytest.fixture(scope="module")
def unverified(tmp_path_factory):
    """Return the flags and the output of a run that was stopped in its verification."""
    folder = tmp_path_factory.mktemp("unverified")
    flags = [*write_short_data(folder), "--max_steps", "2"]
    with pytest.MonkeyPatch.context() as patch, handlers_restored():
        patch.chdir(ROOT)
        before(patch, peft.PeftModel, "from_pretrained", send(signal.SIGTERM))
        assert run([*flags, "--output_dir", folder / "output"]) == 143
    assert checkpoints(folder / "output") == [2]
    return flags, folder / "output"


@pytest.fixture
def ready(unverified, tmp_path):
    """Return the command that will save final_lora, and its output, where older results stand."""
    flags, stopped = unverified
    output = shutil.copytree(stopped, tmp_path / "output")
    for name in RESULTS:
        (output / name).mkdir()
        (output / name / "adapter_model.safetensors").write_bytes(b"old")
    return [*flags, "--output_dir", str(output)], output


def after_saving(patch, change, name="final_lora"):
    """Have change(folder) called when a form of the adapter has been saved."""
    real_save, real_file = peft.PeftModel.save_pretrained, safetensors.torch.save_file

    def save(self, folder, *args, **kwargs):
        real_save(self, folder, *args, **kwargs)
        if Path(folder).name == name == "final_lora":
            change(Path(folder))

    def save_file(tensors, path, *args):
        real_file(tensors, path, *args)
        if Path(path).parent.name == name == "final_lora_vllm":
            with pytest.MonkeyPatch.context() as undone:
                undone.setattr(safetensors.torch, "save_file", real_file)
                change(Path(path).parent)

    patch.setattr(peft.PeftModel, "save_pretrained", save)
    patch.setattr(safetensors.torch, "save_file", save_file)


def in_tensors(edit):
    """Return a change of a folder's tensors."""

    def change(folder):
        tensors = tensors_of(folder)
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

    return change


def in_config(**values):
    """Return a change of a folder's adapter_config.json."""
    return lambda folder: (folder / "adapter_config.json").write_text(
        json.dumps(config_of(folder) | values)
    )


def first_of(tensors):
    return next(name for name in sorted(tensors) if "lora_A" in name)


def rename(tensors, old, new):
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


WRONG = {  # what happens to the written file, in which form, and a word of what is said
    "a number": (in_tensors(lambda x: x[first_of(x)][0, 0].add_(1e-3)), "final_lora", "lora_A"),
    "a tensor is missing": (in_tensors(lambda x: x.pop(first_of(x))), "final_lora", "lora_A"),
    "no number": (in_tensors(lambda x: x[first_of(x)][0].fill_(math.nan)), "final_lora", "lora_A"),
    "a name": (in_tensors(lambda x: rename(x, "up_proj", "upproj")), "final_lora", "upproj"),
    "another alpha": (in_config(lora_alpha=24), "final_lora", "does not become final_lora"),
    "fewer targets": (
        in_config(target_modules=["q_proj"]), "final_lora", "does not become final_lora"
    ),
    "a number for vLLM": (
        in_tensors(lambda x: x[first_of(x)][0, 0].add_(1e-3)), "final_lora_vllm", "lora_A",
    ),
    "a name for vLLM": (
        in_tensors(lambda x: rename(x, "language_model.", "")), "final_lora_vllm", "layers.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_is_not_as_trained_is_not_published(ready, monkeypatch, capfd, what):
    change, name, word = WRONG[what]
    argv, output = ready
    after_saving(monkeypatch, change, name)
    said = refused(capfd, argv)
    assert "Not verified" in said and word in said and "checkpoints are still there" in said
    assert read_record(output)["outcome"].startswith("failed: Not verified: ")
    for name in RESULTS:
        assert files(output / name) == {"adapter_model.safetensors": b"old"}
    assert not (output / ".partial").exists() and not [*output.glob("final_lora*.2*")]


def test_names_for_vllm_that_have_no_place_in_the_hubs_model_are_refused(finished, tiny):
    """Whatever they are: a server would load such a file, and serve the base model."""
    config = transformers.AutoConfig.from_pretrained(tiny)
    plain, renamed = (tensors_of(finished / name) for name in RESULTS)
    t.check_names_for_vllm(renamed, config)
    odd = dict(renamed)
    odd[first_of(odd)] = odd[first_of(odd)][:, 1:].contiguous()
    norm = renamed | {f"{UP.replace('up_proj', 'act_fn')}.lora_A.weight": renamed[first_of(odd)]}
    for wrong in (plain, odd, norm):
        with pytest.raises(t.UserError, match="no place"):
            t.check_names_for_vllm(wrong, config)


def test_what_was_mended_is_published_by_the_same_command(ready, monkeypatch, capsys):
    argv, output = ready
    with monkeypatch.context() as patch:
        after_saving(patch, in_config(lora_alpha=24))
        assert run(argv) == 1
    after_saving(monkeypatch, in_config(lora_alpha=16.16))  # as a GPU may round
    capsys.readouterr()
    assert run(argv) == 0
    for name in RESULTS:
        (renamed,) = output.glob(f"{name}.2*")
        assert files(renamed) == {"adapter_model.safetensors": b"old"}
        assert len(tensors_of(output / name)) == 20
    printed = capsys.readouterr().out
    words = [line.split()[0] for line in printed.splitlines() if line[:1].isalpha()]
    assert words.index("verified") < words.index("moved")  # what is there stays until then


def test_an_adapter_that_changes_nothing_is_refused_with_the_reason(flags, tmp_path, capfd):
    said = refused(capfd, [*flags, "--learning_rate", "1e-30", "--max_steps", "1"])
    assert "changes nothing" in said and "LEARNING_RATE" in said
    assert checkpoints(tmp_path / "output") == [1]
    assert not (tmp_path / "output" / "final_lora").exists()


# ==== Which epoch becomes final_lora


def worsen(epochs):
    """Return a change of a trainer: after an epoch in epochs the held-out loss is a worse one."""

    def change(trainer):
        def scale(model, _, output):
            if not model.training and trainer.state.global_step in epochs:
                output.logits = output.logits * -3 * trainer.state.global_step

        handle = trainer.model.register_forward_hook(scale)

        class Stop(TrainerCallback):
            def on_train_end(self, *_, **__):
                handle.remove()  # the verification is not of this

        trainer.add_callback(Stop())

    return change


BEST = {
    "the first is best": {2, 3, 4, 5},
    "the first is best, but worse than the base": {*range(1, 6)},
}


@pytest.mark.parametrize("what", BEST)
def test_the_best_epoch_is_kept_and_published_when_asked_for(tmp_path, monkeypatch, capfd, what):
    """From the checkpoints, also after a stop, and of a job that has saved the last one."""
    flags = [*write_short_data(tmp_path, train=4, held_out=2), "--num_epochs", "5"]
    last, best, output = [], ["--final_lora", "best"], tmp_path / "output"
    flags += ["--save_steps", "100", "--output_dir", str(output)]
    with monkeypatch.context() as patch:
        on_trainer(patch, worsen(BEST[what]))
        assert run([*flags, *last]) == 0
    losses = logged(read_record(output)["loss_history"], "eval_loss")
    assert losses[1] == min(losses[1:]) and (losses[1] > losses[0]) == ("worse" in what)
    assert checkpoints(output) == [1, 4, 5]  # of five; the two newest can be resumed from
    printed = capfd.readouterr().out
    assert "epoch 5 of 5" in printed and "lowest after epoch 1 " in printed
    assert "--final_lora best" in printed
    for words, step in ((best, 1), (best, 1), (last, 5)):
        assert run([*flags, *words]) == 0
        record = read_record(output)
        assert record["published"] == {"step": step, "label": f"epoch {step} of 5"}
        expected = tensors_of(output / "checkpoints" / f"checkpoint-{step}")
        final = tensors_of(output / "final_lora")
        assert final.keys() == expected.keys()
        assert all(final[name].equal(expected[name]) for name in final)
        assert f"epoch {step} of 5" in read(output / "final_lora" / "README.md")
        assert record["outcome"] == "finished" and checkpoints(output) == [1, 4, 5]
    assert len([*output.glob("final_lora.2*")]) == 2  # the one that was there already stayed


@pytest.fixture(scope="module")
def best_unpublished(tmp_path_factory):
    """Return the command and output of a run, stopped when it verified an older, best epoch."""
    folder = tmp_path_factory.mktemp("best")
    flags = [*write_short_data(folder, train=4, held_out=2), "--num_epochs", "4"]
    flags += ["--save_steps", "100", "--final_lora", "best"]
    with pytest.MonkeyPatch.context() as patch, handlers_restored():
        patch.chdir(ROOT)
        on_trainer(patch, worsen({2, 3, 4}))
        before(patch, peft.PeftModel, "from_pretrained", send(signal.SIGTERM))
        assert run([*flags, "--output_dir", folder / "output"]) == 143
    return flags, folder / "output"


def change_it(path):
    in_tensors(lambda x: x.pop(first_of(x)))(path.parent)


@pytest.mark.parametrize(
    "spoil", [None, Path.unlink, lambda path: os.truncate(path, 1000), change_it]
)
def test_the_best_epoch_of_a_run_that_was_stopped_is_published_if_it_is_whole(
    best_unpublished, tmp_path, capfd, spoil
):
    flags, stopped = best_unpublished
    output = shutil.copytree(stopped, tmp_path / "output")
    argv = [*flags, "--output_dir", str(output)]
    best = output / "checkpoints" / "checkpoint-1"
    if spoil is None:
        assert run(argv) == 0
        assert read_record(output)["published"]["label"] == "epoch 1 of 4"
        assert (output / ADAPTER).read_bytes() == (best / "adapter_model.safetensors").read_bytes()
    else:
        spoil(best / "adapter_model.safetensors")
        assert str(best) in refused(capfd, argv)
        assert not (output / "final_lora").exists()


# ==== The model card


def test_the_model_card_says_where_the_adapter_comes_from(finished, tiny):
    card, record = ModelCard.load(finished / "final_lora" / "README.md"), read_record(finished)
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    assert "base_model" not in card.data.to_dict()  # a folder is no model of the hub
    assert card.text.strip().startswith("# A LoRA adapter for tiny-qwen3.5\n")
    assert str(Path(tiny).parent) not in card.content and "commit" not in card.content
    assert "r = 8, alpha = 16" in card.text and "epoch 2 of 2" in card.text
    for facts in record["data"].values():
        assert facts["sha256"] in card.text
    first, *_, last = logged(record["loss_history"], "eval_loss")
    assert f"from {first:.4f} to {last:.4f}" in " ".join(card.text.split())
    assert record["system_message"] and f"> {record['system_message']}" in card.text
    blocks = re.findall(r"(?s)```python\n(.*?)```", card.text)
    compile("\n".join(blocks), "card", "exec")


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


KIND = "Be kind.\n\nBe brief."
SYSTEM = {  # the messages of the 13 lines, the most frequent one, and what the card says of it
    "none": (lambda number: "", "", ["no system message"]),
    "most have none": (lambda number: "Be odd." if number < 2 else "", "", ["no system message"]),
    "one": (lambda number: "Be brief.", "Be brief.", ["\n> Be brief.\n"]),
    "several": (
        lambda number: "Be odd." if number < 2 else KIND, KIND, ["> Be kind.\n>", "\n> Be brief.\n"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SYSTEM)
def test_of_the_system_messages_the_most_frequent_is_quoted_whole(flags, tmp_path, what):
    said, most, words = SYSTEM[what]
    rewrite(tmp_path / "train.jsonl", said)
    t.main([*flags, "--max_steps", "1", "--eval_file", ""])
    text = read(tmp_path / "output" / "final_lora" / "README.md")
    assert all(word in text for word in words) and "Be odd" not in text
    assert ("\n>" in text) == bool(most) and "loss was not measured" in text
    of_several = {"most have none": 2, "several": 2}
    assert ("It is the most frequent of" in text) == (what in of_several)
    if what in of_several:
        assert f"(It is the most frequent of {of_several[what]} in the training data.)" in text
    assert read_record(tmp_path / "output")["system_message"] == most


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


def test_a_hub_models_name_and_commit_are_written_wherever_it_is_named(
    flags, tmp_path, hub_model, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr(
        "peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *given: asked.append(given)
    )
    output = tmp_path / "output"
    t.main([*flags, "--model_name", hub_model, "--max_steps", "1", "--eval_file", ""])
    card = ModelCard.load(output / "final_lora" / "README.md")
    assert card.data.base_model == hub_model and f"commit `{COMMIT}`" in card.text
    assert f'from_pretrained("{hub_model}", revision="{COMMIT}"' in card.text
    for name in RESULTS:
        config = config_of(output / name)
        assert (config["base_model_name_or_path"], config["revision"]) == (hub_model, COMMIT)
    settings = read_record(output)["settings"]
    assert (settings["MODEL_NAME"], settings["MODEL_REVISION"]) == (hub_model, COMMIT)
    words = command_in(capsys.readouterr().out, "vllm", "serve", hub_model)
    assert words[3:5] == ["--revision", COMMIT]
    assert asked == []  # the embeddings are not trained, so no save has to ask


@pytest.mark.parametrize("wrapped", [True, False])
def test_of_a_gated_model_the_licence_and_the_login_are_named(
    flags, monkeypatch, hub_model, capfd, wrapped
):
    def refuse(*_, **__):
        error = GatedRepoError.__new__(GatedRepoError)  # it wants an answer of the hub
        if wrapped:  # as transformers does
            raise OSError("You are trying to access a gated repo.") from error
        raise error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    said = refused(capfd, [*flags, "--model_name", hub_model])
    assert f"https://huggingface.co/{hub_model}" in said and "hf auth login" in said


# ==== run.json


def test_run_json_has_all_that_the_seam_lists(finished, tiny):
    record = read_record(finished)
    assert record.keys() == {
        "outcome", "started", "ended", "command", "working_folder", "script_sha256", "versions",
        "settings", "lora_config", "device", "products", "memory_limits", "plan", "data",
        "system_message", "resumed_from", "train_seconds", "train_tokens", "peak_memory_gib",
        "published", "adapter_sha256", "loss_history", "matmul_compared", "delta_kernels",
    }  # fmt: skip
    assert record["matmul_compared"] is None and record["delta_kernels"] == ""  # on a CPU
    assert record["outcome"] == "finished" and record["started"] < record["ended"]
    assert shlex.split(record["command"])[0] == "python"
    assert record["working_folder"] == str(ROOT)
    names = {name for name in t.__annotations__ if name.isupper()}
    assert record["settings"].keys() == names and record["settings"]["NUM_EPOCHS"] == 2
    assert record["lora_config"]["r"] == 8 and record["lora_config"]["bias"] == "none"
    assert record["device"] == "CPU" and record["products"] == "native"
    assert record["memory_limits"].keys() >= {"tokens_at_once", "tokens_at_once_recomputed"}
    plan = {"trainable": 30_720, "total": 435_396, "steps_per_epoch": 4, "steps": 8, "max_rank": 8}
    assert plan.items() <= record["plan"].items()
    for name in ("torch", "transformers", "peft", "trl"):
        assert record["versions"][name] == importlib.metadata.version(name)
    assert "python" in record["versions"]
    for key, setting in (("train", "TRAIN_FILE"), ("held_out", "EVAL_FILE")):
        facts, path = record["data"][key], Path(record["settings"][setting])
        assert facts["file"] == str(path) and facts["sha256"] == sha256(path)
        assert facts["examples"] == path.read_bytes().count(b"\n")
        assert facts["tokens"] > facts["learned_tokens"] > facts["examples"]
    assert record["resumed_from"] is None and record["train_seconds"] > 0
    assert record["train_tokens"] == 2 * record["data"]["train"]["tokens"]
    assert record["published"] == {"step": 8, "label": "epoch 2 of 2"}
    hashes = {name: sha256(finished / name / "adapter_model.safetensors") for name in RESULTS}
    assert record["adapter_sha256"] == hashes
    steps = [entry["step"] for entry in record["loss_history"] if "loss" in entry]
    evals = [entry["step"] for entry in record["loss_history"] if "eval_loss" in entry]
    assert steps == [*range(1, 9)] and evals == [0, 4, 8]


def test_the_scripts_hash_is_of_all_but_its_settings(tmp_path):
    text = read(t.__file__)
    copies = {
        "same": text,
        "setting": re.sub(r"(?m)^LORA_R(.*?)= 8", r"LORA_R\1= 4", text),
        "code": text.replace("AdamW without decay", "AdamW"),
    }
    hashes = {}
    for name, copy in copies.items():
        assert (copy == text) == (name == "same")
        (tmp_path / f"{name}.py").write_text(copy, encoding="utf-8")
        found = {"__file__": str(tmp_path / f"{name}.py"), "__name__": "other"}
        source = copy[copy.index("@functools.cache\ndef script_sha256") :]
        exec(source[: source.index("\n\n\n")], vars(t) | found, found)
        hashes[name] = found["script_sha256"]()
    assert hashes["same"] == hashes["setting"] != hashes["code"]


def test_run_json_is_strict_json_also_after_a_loss_that_is_no_number(flags, tmp_path, tiny):
    def spoil(tensors):
        tensors["model.language_model.norm.weight"][0] = math.nan

    model = changed_model(tiny, tmp_path / "model", spoil)
    assert run([*flags, "--model_name", model]) == 1
    record = read_record(tmp_path / "output")
    assert record["outcome"].startswith("failed: The base model's held-out loss is nan")
    (entry,) = record["loss_history"]
    assert entry["eval_loss"] in (None, "nan")


def test_max_steps_ends_a_run_within_an_epoch(flags, tmp_path, capsys):
    t.main([*flags, "--max_steps", "2"])
    record, text = read_record(tmp_path / "output"), capsys.readouterr().out
    evals = [entry["step"] for entry in record["loss_history"] if "eval_loss" in entry]
    assert evals == [0, 2] and record["plan"]["steps"] == 2 and "step 2/2 " in text
    assert record["published"] == {"step": 2, "label": "step 2"}
    assert record["train_tokens"] < record["data"]["train"]["tokens"]


# ==== The last lines


HELP_ONLY = """
import sys
if "--help" in sys.argv:
    print("I measure")
"""


@pytest.mark.parametrize("is_beside", [True, False])
def test_the_last_lines_name_only_commands_that_work_from_there(flags, tiny, tmp_path, is_beside):
    """In a folder whose name a shell would take apart, from a folder that is not the script's."""
    home, output = tmp_path / "home", tmp_path / "it's $a & #1"
    home.mkdir()
    shutil.copy(t.__file__, home / "my trainer.py")
    if is_beside:
        (home / "inspect_lora").mkdir()
        (home / "inspect_lora" / "__main__.py").write_text(HELP_ONLY)
    argv = [*flags, "--output_dir", str(output), "--max_steps", "1", "--lora_r", "12"]
    done = run_in_a_fork([sys.executable, f"{home}/my trainer.py", *argv], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = command_in(done.stdout, "vllm", "serve", tiny, "--enable-lora")
    options = dict(zip(words[4::2], words[5::2], strict=True))
    assert options["--lora-modules"] == f"it-s--a----1={output}/final_lora_vllm"
    assert "it-s--a----1:" in done.stdout  # as clients must ask for it
    assert options["--max-lora-rank"] == "16"  # the smallest that vLLM knows
    kwargs = json.loads(options["--default-chat-template-kwargs"])
    assert kwargs == {"enable_thinking": False}
    found = [words for words in commands_in(done.stdout) if words[0] == "python"]
    assert "inspect_lora" in done.stdout
    named = [words[2:] for words in found]
    final = f"{output}/final_lora"
    assert named == ([["evidence", final], ["chat", final]] if is_beside else [])
    for _, *words in found:
        measured = subprocess.run(
            [sys.executable, *words, "--help"], cwd=tmp_path, capture_output=True, text=True
        )
        assert measured.stdout == "I measure\n", measured.stderr


def test_of_the_toy_and_of_what_vllm_refuses_no_server_is_named(tmp_path, capsys, monkeypatch):
    flags = [*write_short_data(tmp_path), "--output_dir", str(tmp_path / "output")]
    real = t.lora_config

    def with_dora(settings):
        config = real(settings)
        config.use_dora = True
        return config

    monkeypatch.setattr(t, "lora_config", with_dora)
    t.main([*flags, "--max_steps", "1"])
    assert not (tmp_path / "output" / "final_lora_vllm").exists()
    text = capsys.readouterr().out
    following = text[text.index("\nnext ") :]
    assert "DoRA" in following and "vllm serve" not in following


# ==== The file alone, as a user with secrets runs it

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
UNSET = ["HF_HUB_OFFLINE", "PYTHONPATH", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"]
STOP_IN_STEP_3 = """
import accelerate, itertools, os, signal
calls, backward = itertools.count(1), accelerate.Accelerator.backward
def stop_once(*args, **kwargs):
    if next(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return backward(*args, **kwargs)
accelerate.Accelerator.backward = stop_once
"""


def below(path, folders):
    """Return whether path is one of the folders, or in one."""
    return any(path.is_relative_to(one) for one in folders)


def test_a_copy_alone_under_another_name_does_it_all_and_touches_nothing_else(tmp_path, tiny):
    """Trains, resumes, verifies and publishes with its edits; asks nobody, and tells no secret."""
    alone = tmp_path / "alone"
    (alone / "data").mkdir(parents=True)
    text = read(t.__file__)
    for name, old, new in (
        ("LORA_R", "8", "6"),
        ("NUM_EPOCHS", "3", "1"),
        ("SAVE_STEPS", "50", "9"),
    ):
        text, count = re.subn(rf"(?m)^({name}: .*?= ){old}\b", rf"\g<1>{new}", text)
        assert count == 1, name
    (alone / "my run.py").write_text(text, encoding="utf-8")
    write_short_data(tmp_path, train=16)
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").rename(alone / "data" / f"{name}.jsonl")
    for name in ("home", "cache", "tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "cache" / "token").write_text(SECRET)
    argv = ["my run.py", "--model_name", tiny, "--device", "cpu", "--dtype", "float32"]
    argv += ["--learning_rate", "1e-2"]
    before_it = files(tmp_path)

    stopped = run_in_a_fork([sys.executable, *argv], cwd=alone, first=STOP_IN_STEP_3)
    assert stopped.returncode == 143 and "after step 3 of 4" in stopped.stderr

    environment = {key: value for key, value in os.environ.items() if key not in UNSET}
    environment |= {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "cache")}
    environment |= {"TMPDIR": str(tmp_path / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= dict.fromkeys(SECRETS, SECRET)
    done = subprocess.run(
        [sys.executable, "-c", SPY, str(tmp_path / "spied"), *argv],
        cwd=alone, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"(?m)^resume .*checkpoint-3$", done.stdout)
    assert re.search("(?m)^verified ", done.stdout) and not re.search("(?m)^warning ", done.stdout)
    output = alone / "output"
    assert {min(x.shape) for x in tensors_of(output / "final_lora").values()} == {6}
    assert read_record(output)["settings"]["LORA_R"] == config_of(output / "final_lora")["r"] == 6

    after, spied = files(tmp_path), read(tmp_path / "spied").splitlines()
    assert {name: after.get(name) for name in before_it} == before_it
    caches = [tmp_path / name for name in ("home", "cache", "tmp", "spied")]
    new = [tmp_path / name for name in after.keys() - before_it.keys()]
    assert [path for path in new if not below(path, [output, *caches])] == []
    written = {Path(line.partition(" ")[2]) for line in spied if line.startswith("write ")}
    assert output / "all_logs.log" in written
    assert [path for path in written if not below(path, [output, *caches, Path("/dev")])] == []
    assert [line for line in spied if line.startswith("network ")] == []
    data = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert len(data) > 10 and SECRET not in done.stdout + done.stderr
    assert [path for path, found in data.items() if SECRET.encode() in found] == []
