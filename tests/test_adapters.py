"""Any adapter is opened as it was trained, or refused with the reason."""

import functools
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import trl
from by_hand import MergedByHand, read_conversations
from conftest import TINY
from datasets import Dataset
from huggingface_hub.errors import LocalEntryNotFoundError
from on_tiny import (
    PARTS,
    PLAIN_SCALE,
    SAID,
    SHORT,
    base_model,
    columns,
    listing,
    losses_of_peft,
    measure,
    messages_of,
    save_adapter,
    write_held_out,
    write_lines,
)
from safetensors.torch import load_file, save_file
from tiny_adapters import CONFIG, TENSORS, change_config, change_tensors, command
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import inspect_lora.adapters as adapters
import inspect_lora.files as files

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Write a few bytes for lora.png: drawing takes longer than measuring."""
    placeholder = lambda _, path: path.write_bytes(b"picture")  # noqa: E731
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", placeholder)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Return a file of four conversations with five replies."""
    return write_held_out(tmp_path_factory.mktemp("held out") / "held-out.jsonl")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the folder of an adapter that PEFT alone made. Tests must not change it."""
    return save_adapter(tmp_path_factory.mktemp("plain") / "adapter")


@pytest.fixture
def changed(plain, tmp_path):
    """Return a function that gives a copy of that adapter with these entries in its config."""

    def copied(folder="changed", **config):
        folder = shutil.copytree(plain, tmp_path / folder)
        return change_config(folder, **config)

    return copied


@pytest.fixture
def refused(capsys, held_out, tmp_path, monkeypatch):
    """Return a function that measures an adapter that is refused, and gives the one message."""
    monkeypatch.chdir(tmp_path)

    def run(adapter, *more):
        end = command(capsys, "evidence", adapter, "--eval_file", held_out, *SHORT, *more)
        assert end.status == 1 and "gain" not in end.out
        assert not (tmp_path / "inspected").exists()
        return end.err

    return run


# ==== Adapters of other trainers have the losses that they were trained to


def test_an_adapter_of_peft_alone_has_the_losses_of_weights_merged_by_hand(plain, capsys, held_out):
    """Nothing of the computation on the other side knows the script, TRL or PEFT."""
    before = listing(plain)
    run = measure(capsys, plain, held_out, *PARTS, "--samples", "2", "--max_new_tokens", "5")
    merged = MergedByHand(TINY, plain / TENSORS, lambda _: PLAIN_SCALE)
    losses = functools.partial(merged.losses, read_conversations(held_out))
    base, adapter = losses(lambda path: False), losses()
    assert columns(run.found) == [pytest.approx(one, abs=1e-4) for one in (base, adapter)]
    assert max(abs(one - other) for one, other in zip(base, adapter, strict=True)) > 0.03
    expected = {
        "as trained": {}, "base model": {"wanted": lambda path: False},
        "update x 0.5": {"strength": 0.5}, "update x 2": {"strength": 2},
        "attention alone": {"wanted": lambda path: "self_attn" in path},
        "DeltaNet alone": {"wanted": lambda path: "linear_attn" in path},
        "down_proj alone": {"wanted": lambda path: "down_proj" in path},
        "cut to 2 directions": {"divisor": 2}, "cut to 1 direction": {"divisor": 4},
    }  # fmt: skip
    parts = run.found["parts"]
    for title, how in expected.items():
        assert parts[title]["losses"] == pytest.approx(losses(**how), abs=1e-4), title
    kinds = [parts[title]["kind"] for title in expected]
    assert kinds == ["whole", "base", *["strength"] * 2, *["group"] * 2, "target", *["cut"] * 2]
    assert "adapter, on cpu\n          r = 4, alpha = 32 on 4 modules of " in run.out
    assert "alpha / sqrt(r) x B A" in run.report  # what rsLoRA multiplies by
    assert listing(plain) == before  # nothing is written into the adapter's folder
    assert {path.name for path in run.results.iterdir()} == {
        "evidence.json", "report.md", "lora.png", "overview.png", "replies.html",
    }  # fmt: skip


def test_an_adapter_of_trls_own_trainer_is_measured(capsys, held_out, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    rows = [{"messages": messages_of(("rain", "Tea, then?"))}] * 4
    arguments = trl.SFTConfig(
        str(tmp_path / "trl"), max_steps=2, learning_rate=1e-1, per_device_train_batch_size=2,
        use_cpu=True, bf16=False, report_to=[], save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    model = adapters.load_model(TINY, "main", "float32", torch.device("cpu"))
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    run = measure(capsys, tmp_path / "adapter", held_out, *SHORT)
    expected = losses_of_peft(tmp_path / "adapter", held_out)
    assert columns(run.found) == [pytest.approx(one, abs=1e-4) for one in expected]
    assert abs(sum(expected[0]) - sum(expected[1])) > 1e-2


SCALED, GROUPS = {"strength", "cut", "merged"}, {"group", "target"}
VARIANTS = {
    "DoRA": ({"use_dora": True}, GROUPS, "neither scaled nor cut"),
    "patterns": (
        {"rank_pattern": {"out_proj": 6, "down_proj": 1}, "alpha_pattern": {"out_proj": 3}},
        SCALED | GROUPS, "others by pattern",
    ),
    "modules_to_save": ({"modules_to_save": ["norm"]}, set(), "not taken apart"),
    "trained tokens": ({"trainable_token_indices": [5, 6]}, set(), "not taken apart"),
    "all linear layers": ({"target_modules": "all-linear"}, SCALED | GROUPS, ""),
    "one layer, one target": (
        {"target_modules": ["down_proj"], "layers_to_transform": [1]}, SCALED, "on 1 module of",
    ),
    "by expression": ({"target_modules": r".*mlp\.(up|down)_proj"}, SCALED | {"target"}, ""),
    "begun by chance": ({"init_lora_weights": "orthogonal"}, SCALED | GROUPS, ""),
    # It shares its weight with the embedding, which merging would change as well.
    "the head": (
        {"target_modules": ["lm_head", "down_proj"]}, (SCALED | GROUPS) - {"merged"}, "",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("name", VARIANTS)
def test_each_kind_of_lora_has_the_losses_that_peft_alone_gives_it(
    capsys, held_out, tmp_path, name
):
    config, kinds, said = VARIANTS[name]
    folder = save_adapter(tmp_path / "adapter", **config)
    run = measure(capsys, folder, held_out, *PARTS, "--examples", "1")
    base, adapter = losses_of_peft(folder, held_out)
    assert columns(run.found) == [pytest.approx(one, abs=1e-4) for one in (base, adapter)]
    assert abs(sum(base) - sum(adapter)) > 1e-3
    found = {part["kind"] for part in run.found["parts"].values()}
    assert found == kinds | {"whole", "base"}
    assert said in run.said + " ".join(run.report.split())


def test_fully_trained_modules_are_measured_in_bfloat16_too(capsys, held_out, tmp_path):
    """A saved float32 tensor is not its bfloat16 copy bit by bit, and need not be."""
    folder = save_adapter(tmp_path / "adapter", modules_to_save=["norm"])
    run = measure(capsys, folder, held_out, *SHORT, "--dtype", "bfloat16")
    expected = losses_of_peft(folder, held_out, "bfloat16")
    assert columns(run.found) == [pytest.approx(one, abs=0.02) for one in expected]


def test_a_cut_halves_each_layers_own_rank(capsys, held_out, tmp_path):
    """Of the ranks 1, 4 and 6 half is 1 (not 0), 2 and 3."""
    folder = save_adapter(tmp_path / "adapter", rank_pattern={"out_proj": 6, "down_proj": 1})
    run = measure(capsys, folder, held_out, *PARTS)
    scale = {"out_proj": 32 / 6**0.5, "down_proj": 32, "o_proj": 32 / 4**0.5}
    merged = MergedByHand(TINY, folder / TENSORS, scale.get)
    assert {len(a) for _, _, a in merged.factors.values()} == {1, 4, 6}
    for divisor in (2, 4):
        part = run.found["parts"][f"cut to 1/{divisor} of the directions"]
        losses = merged.losses(read_conversations(held_out), divisor=divisor)
        assert part["losses"] == pytest.approx(losses, abs=1e-4)


INTO_WRAPPER = {
    "Qwen3.5's": (".model.model.", ".model.model.language_model."),
    "Gemma 3's of old": (".model.model.", ".model.language_model.model."),
}
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:o_proj|down_proj|out_proj).*?)"
)


def wrapped(folder, form, **config):
    """Rename an adapter's tensors as if it had been trained in a wrapper; return its folder."""
    old, new = INTO_WRAPPER[form]
    change_tensors(folder, lambda tensors: {
        name.replace(old, new, 1): one for name, one in tensors.items()
    })  # fmt: skip
    return change_config(folder, **config)


@pytest.mark.parametrize("form", INTO_WRAPPER)
def test_an_adapter_in_unsloths_form_is_the_same(plain, changed, capsys, held_out, form):
    """Its names are a wrapper's, its targets an expression, its vision tower's updates 0."""
    config = {"target_modules": UNSLOTH, "exclude_modules": r".*visual\..*\.qkv"}
    config["base_model_name_or_path"] = "unsloth/tiny-unsloth-bnb-4bit"
    folder = wrapped(changed(), form, **config)
    vision = "base_model.model.model.visual.blocks.0.mlp.down_proj"
    change_tensors(folder, lambda tensors: tensors.update({
        f"{vision}.lora_A.weight": torch.ones(4, 64), f"{vision}.lora_B.weight": torch.zeros(64, 4),
    }))  # fmt: skip
    run = measure(capsys, folder, held_out, *SHORT, "--base", TINY)
    assert columns(run.found) == columns(measure(capsys, plain, held_out, *SHORT).found)
    name = vision.removeprefix("base_model.model.")
    assert f"1 module of the file have no place in the text model, such as {name};" in run.said
    assert "on 4 modules" in run.out


@pytest.mark.parametrize("form", INTO_WRAPPER)
@pytest.mark.parametrize(
    "written",
    [
        lambda path, inside: path.replace("model.", inside, 1),
        lambda path, _: f".*language_model.*{path.partition('layers.')[2]}",
        lambda path, inside: f"^{re.escape(path.replace('model.', inside, 1))}",
    ],
    ids=["a path", "an expression", "an escaped path"],
)
def test_names_that_were_written_for_a_wrapper_hold(capsys, held_out, tmp_path, form, written):
    """PEFT alone warns of a pattern that matches nothing, and scales as if there were none."""
    patterns = {"rank_pattern": {"model.layers.0.mlp.down_proj": 2}}
    patterns["alpha_pattern"] = {"model.layers.0.linear_attn.out_proj": 5}
    folder = save_adapter(tmp_path / "adapter", **patterns)
    expected = losses_of_peft(folder, held_out)
    inside = INTO_WRAPPER[form][1].removeprefix(".model.")
    moved = {
        name: {written(path, inside): value for path, value in pattern.items()}
        for name, pattern in patterns.items()
    }
    paths = {name[17:].partition(".lora_")[0] for name in load_file(folder / TENSORS)}
    moved["target_modules"] = [path.replace("model.", inside, 1) for path in sorted(paths)]
    run = measure(capsys, wrapped(folder, form, **moved), held_out, *SHORT)
    assert columns(run.found) == [pytest.approx(one, abs=1e-4) for one in expected]
    rows = json.loads(command(capsys, "info", folder, "--json").out)["modules"]
    scalings = {row["name"].partition("layers.")[2]: row["scaling"] for row in rows}
    assert scalings["0.mlp.down_proj"] == 32 / 2**0.5
    assert scalings["0.linear_attn.out_proj"] == 5 / 4**0.5
    assert scalings["1.mlp.down_proj"] == PLAIN_SCALE


def test_names_of_a_state_dict_are_measured(capsys, plain, changed, held_out):
    """PEFT takes them where the adapter is called "default", as it is here."""
    folder = change_tensors(changed(), lambda tensors: {
        name.replace(".weight", ".default.weight"): one for name, one in tensors.items()
    })  # fmt: skip
    run = measure(capsys, folder, held_out, *SHORT)
    assert columns(run.found) == columns(measure(capsys, plain, held_out, *SHORT).found)


def test_a_module_without_tensors_is_left_as_the_base_has_it(capsys, held_out, changed, tmp_path):
    """Also where PEFT would begin it by chance."""
    folder = changed(init_lora_weights=False, target_modules=["o_proj", "down_proj", "out_proj"])
    change_tensors(folder, lambda tensors: {k: v for k, v in tensors.items() if "o_proj" not in k})
    run = measure(capsys, folder, held_out, *SHORT)
    assert "no tensors for 1 module of the targets" in run.said
    merged = MergedByHand(TINY, folder / TENSORS, lambda _: PLAIN_SCALE)
    losses = merged.losses(read_conversations(held_out))
    assert columns(run.found)[1] == pytest.approx(losses, abs=1e-4)


def test_an_adapter_that_changes_nothing_is_better_nowhere(capsys, tmp_path):
    """There is no gain, so no part has a share of it."""
    path = write_held_out(tmp_path / "ten.jsonl", [("hello", "Oh, hello.")] * 10)
    folder = save_adapter(tmp_path / "adapter", std=0, modules_to_save=["norm"])
    run = measure(capsys, folder, path, *PARTS)
    base, adapter = columns(run.found)
    assert base == adapter and run.found["lower_on"] == 0
    assert "it changes nothing" in run.said and "it changes nothing" in run.report
    assert "nan" not in run.out + run.report


# ==== What is refused, and why


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named_before_the_base_is_looked_for(refused, changed, value):
    folder = changed(base_model_name_or_path=TINY)

    def damage(tensors):
        tensors[next(iter(tensors))][0, 0] = value

    said = refused(change_tensors(folder, damage), "--base", "/nowhere")
    assert "1 of the 8 tensors" in said and "NaN or infinity" in said and "lora_A" in said
    assert "nowhere" not in said


EMBEDDING = "base_model.model.model.embed_tokens.weight"


def test_what_switching_off_would_not_undo_is_refused(refused, changed):
    """PEFT loads it into the base itself, in silence."""
    weight = base_model().get_input_embeddings().weight
    folder = change_tensors(changed(), lambda tensors: tensors.update({EMBEDDING: weight * 1.1}))
    said = refused(folder)
    assert EMBEDDING in said and "would not undo" in said and "modules_to_save" in said


def test_a_copy_of_the_bases_own_embedding_changes_nothing(capsys, changed, plain, held_out):
    """PEFT saves it along in many cases."""
    weight = base_model().get_input_embeddings().weight.detach().clone()
    folder = change_tensors(changed(), lambda tensors: tensors.update({EMBEDDING: weight}))
    run = measure(capsys, folder, held_out, *SHORT)
    assert columns(run.found) == columns(measure(capsys, plain, held_out, *SHORT).found)


def with_module(folder, path):
    """Add a module that has an update to an adapter's file; return the folder."""
    return change_tensors(folder, lambda tensors: tensors.update({
        f"base_model.model.{path}.lora_A.weight": torch.ones(4, 64),
        f"base_model.model.{path}.lora_B.weight": torch.ones(64, 4),
    }))  # fmt: skip


def test_a_trained_vision_tower_is_refused_as_that(refused, changed):
    folder = with_module(changed(), "model.visual.blocks.0.mlp.down_proj")
    said = refused(folder)
    assert "vision tower was trained" in said and "only the text part of the base" in said
    assert "model.visual.blocks.0.mlp.down_proj" in said and "--base" not in said
    said = refused(with_module(folder, "model.layers.7.mlp.down_proj"))
    assert "4 of the 12 tensors" in said and "--base" in said


def test_a_tensor_that_finds_no_place_is_refused(refused, changed):
    """PEFT only warns, or says nothing."""
    path = "model.layers.7.mlp.down_proj"
    said = refused(with_module(changed(), path))
    assert "2 of the 10 tensors" in said and path in said and "--base" in said


@pytest.mark.filterwarnings("ignore::UserWarning")  # of other modules, which the file lacks
@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({}, "layers.0.mlp.up_proj"),
        ({"layers_to_transform": [0]}, "layers.1.mlp.down_proj"),
        ({"layers_to_transform": 0}, "layers.1.self_attn.o_proj"),
        ({"exclude_modules": ["layers.0.mlp.down_proj"]}, "layers.0.mlp.down_proj"),
        ({"target_modules": r".*\.(o_proj|out_proj)"}, "layers.0.mlp.down_proj"),
    ],
)
def test_a_module_that_peft_leaves_out_is_refused(refused, changed, held_out, config, path):
    folder = changed(**config)
    if path == "layers.0.mlp.up_proj":  # the file has the others
        name = f"base_model.model.model.{path}.lora_"
        more = {f"{name}A.weight": torch.ones(4, 64), f"{name}B.weight": torch.ones(128, 4)}
        change_tensors(folder, lambda tensors: tensors.update(more))
    assert "outside target_modules" in refused(folder)
    _, before = losses_of_peft(folder, held_out)
    b = f"base_model.model.model.{path}.lora_B.weight"
    change_tensors(folder, lambda tensors: tensors.update({b: 3 * tensors[b]}))
    assert losses_of_peft(folder, held_out)[1] == before


FIRST_B = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
DAMAGES = {
    "half of a module": (
        lambda tensors: {name: one for name, one in tensors.items() if name != FIRST_B},
        "A or B is missing",
    ),
    "two for one place": (
        lambda tensors: tensors.update({
            name.replace("model.layers", "model.language_model.layers"): one + 1
            for name, one in tensors.items()
        }), "under two names of one place",
    ),
    "another size": (
        lambda tensors: tensors.update({FIRST_B: torch.ones(5, 4)}), "does not fit the base model",
    ),
    "other names": (
        lambda tensors: {name.replace("base_model.", "my."): one for name, one in tensors.items()},
        "another library than PEFT",
    ),
}  # fmt: skip


def test_the_end_of_a_long_message_of_peft_is_kept(refused, changed, monkeypatch):
    """Mostly it says there what to do."""
    said = refused(change_tensors(changed(), lambda tensors: {
        name: torch.ones(5, 4) if "lora_B" in name else one for name, one in tensors.items()
    }))  # fmt: skip
    assert len(re.findall("size mismatch for", said)) == 4 and "does not fit the base" in said

    def refuse(_):
        raise ValueError(f"{'No such thing. ' * 40}Set it to 7.")

    monkeypatch.setattr("peft.LoraConfig.from_pretrained", refuse)
    assert "Set it to 7.)." in refused(changed(folder="again"))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_that_does_not_fit_is_one_message(refused, changed, name):
    change, said = DAMAGES[name]
    assert said in refused(change_tensors(changed(), change))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"init_lora_weights": "pissa"}, "changed the base model's own weights"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"bias": None}, "bias: Input should be a valid string (it is None)"),
        ({"trainable_token_indices": [1]}, "does not fit the base model"),
        ({"velora_config": {"scale": 1}}, "of LoRA that is not understood here (velora_config)"),
        ({"megatron_config": {"a": 1}}, "LoRA that is not understood here (megatron_config)"),
        ({"use_dora": True}, "which DoRA trains, of 0 of 4 modules, and use_dora is True"),
        ({"layer_replication": [[0, 2]]}, "not understood here (layer_replication)"),
        ({"alora_invocation_tokens": [5]}, "not understood here (alora_invocation_tokens)"),
        ({"peft_type": "IA3"}, "of the kind IA3"),
        ({"task_type": "SEQ_CLS"}, "another task than replying (SEQ_CLS)"),
        ({"r": "eight", "target_modules": 5}, ""),
        ({"target_modules": ["no_such_module"]}, "4 modules outside target_modules"),
    ],
)
def test_what_cannot_be_compared_with_its_base_is_refused_with_the_reason(
    refused, changed, config, said
):
    assert said in refused(changed(**config))


def test_what_the_file_lacks_is_named(refused, changed):
    said = refused(changed(modules_to_save=["lm_head"]))
    assert "the file lacks 'base_model.model.lm_head.weight'" in said
    assert "whether adapter_config.json is this adapter's" in said


def test_files_that_are_no_adapter_are_told_what_they_are(refused, plain, tmp_path, changed):
    assert "There is no adapter nowhere" in refused("nowhere")
    assert f"Did you mean {plain}" in refused(plain.parent)
    assert "whole model" in refused(TINY)
    folder = changed()
    (folder / CONFIG).write_text("{", encoding="utf-8")
    assert "damaged" in refused(folder)
    shutil.copy(plain / CONFIG, folder)
    (folder / TENSORS).write_bytes((plain / TENSORS).read_bytes()[:-9])
    assert "cannot be read" in refused(folder)
    save_file({}, folder / TENSORS)
    assert "holds no tensors" in refused(folder)
    (folder / TENSORS).unlink()
    assert "its weights are missing" in refused(folder)


def test_a_pickle_is_not_opened_and_the_printed_command_converts_it(refused, changed, monkeypatch):
    folder = changed()
    tensors = load_file(folder / TENSORS)
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / TENSORS).unlink()
    said = refused(folder)
    assert "a pickle that could run code" in said
    code = re.search(r"python -c '(.*)'", said)[1]
    monkeypatch.chdir(folder)
    exec(code)
    assert load_file(folder / TENSORS).keys() == tensors.keys()


def test_a_name_on_the_hub_is_asked_for_there(refused, monkeypatch, plain, capsys, held_out):
    asked = {}

    def download(name, **how):
        asked.update({"name": name} | how)
        if name == "someone/missing":
            raise LocalEntryNotFoundError("offline")
        return str(plain)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert "hub cannot be reached" in refused("someone/missing")
    end = command(capsys, "evidence", "someone/adapter", "--eval_file", held_out, *SHORT)
    assert end.status == 0 and "inspected/someone--adapter/report.md" in end.out
    assert asked["name"] == "someone/adapter" and asked["ignore_patterns"] == ["checkpoint-*"]
    assert "adapter_*" in asked["allow_patterns"]


# ==== The base model


def test_a_base_that_is_not_there_is_asked_for(refused, changed):
    assert "does not name its base" in refused(changed(base_model_name_or_path=None))


@pytest.mark.parametrize("base", ["/was/here/once", "my models/tiny", "models/qwen/tiny"])
def test_a_folder_that_is_gone_is_no_name_on_the_hub(refused, changed, base):
    said = refused(changed(base_model_name_or_path=base))
    assert f"base model {base} is not there" in said and "--base" in said


def test_a_base_that_is_no_language_model_is_one_message(refused, plain, tmp_path):
    sizes = {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1, "d_kv": 8, "vocab_size": 50}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "t5")
    said = refused(plain, "--base", tmp_path / "t5")
    assert "cannot be loaded as a language model" in said and "--base" in said


@pytest.mark.parametrize(
    ("name", "plain_name"),
    [
        ("unsloth/Qwen3-4B-unsloth-bnb-4bit", "unsloth/Qwen3-4B"),
        ("unsloth/tinyllama-bnb-4bit", "unsloth/tinyllama"),
    ],
)
def test_without_bitsandbytes_both_ways_are_named(refused, changed, monkeypatch, name, plain_name):
    monkeypatch.setattr(files, "has_bitsandbytes", lambda: False)
    said = refused(changed(base_model_name_or_path=name))
    assert f"--base {plain_name};" in said and "pip install bitsandbytes" in said


@pytest.mark.parametrize("name", ["Qwen/Qwen3-4B-AWQ", "someone/model-GPTQ-Int4", "a/b-FP8"])
def test_other_quantized_copies_are_never_loaded(refused, changed, monkeypatch, name):
    monkeypatch.setattr(files, "has_bitsandbytes", lambda: True)
    said = refused(changed(base_model_name_or_path=name))
    assert "a quantized copy" in said and "--base" in said and "pip install" not in said


def test_a_quantized_folder_is_known_by_its_config(refused, changed, tmp_path):
    model = shutil.copytree(TINY, tmp_path / "model")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8"}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "a quantized copy" in refused(changed(base_model_name_or_path=str(model)))


@needs_bitsandbytes
def test_an_adapter_of_a_4_bit_copy_is_measured_on_that_copy(capsys, held_out, tmp_path):
    """Switched off it leaves the copy's own losses, to the bit."""
    import transformers

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "plain")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=how, dtype="float32"
    )
    copy = tmp_path / "tiny-bnb-4bit"
    model.save_pretrained(copy)
    tokenizer.save_pretrained(copy)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    change_config(tmp_path / "adapter", base_model_name_or_path=str(copy))
    run = measure(capsys, tmp_path / "adapter", held_out, *PARTS)

    from by_hand import reply_loss

    fresh = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype="float32")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    conversations = read_conversations(held_out)
    expected = [reply_loss(again, tokenizer, one) for one in conversations]
    base, trained = columns(run.found)
    assert trained == pytest.approx(expected, abs=1e-3)
    with again.disable_adapter():
        expected = [reply_loss(again, tokenizer, one) for one in conversations]
    assert base == pytest.approx(expected, abs=1e-3)
    assert run.found["parts"]["cut to 2 directions"]["loss"] > 0
    assert all(0 < row["update"] < 9 for row in run.found["updates"]["q_proj"])


@pytest.mark.parametrize(
    ("saved", "flags", "asked"),
    [
        ({}, [], ("someone/base", "main")),
        ({"revision": "abc"}, [], ("someone/base", "abc")),
        ({"revision": "abc"}, ["--base_revision", "v2"], ("someone/base", "v2")),
        ({"revision": "abc"}, ["--base", "other/base"], ("other/base", "main")),
    ],
)
def test_the_hub_is_asked_for_the_right_base_and_revision(
    refused, changed, monkeypatch, saved, flags, asked
):
    def look(name, revision):
        raise adapters.UserError(f"asked for {name} at {revision}")

    monkeypatch.setattr(adapters, "commit_of", look)
    said = refused(changed(base_model_name_or_path="someone/base", **saved), *flags)
    assert f"asked for {asked[0]} at {asked[1]}" in said and "--base" in said


@pytest.mark.parametrize("place", ["load_model", "refuse_changes_of_base"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch's", "cuBLAS's"],
)
def test_a_full_gpu_is_one_message_and_says_nothing_of_checkpoints(
    refused, plain, monkeypatch, place, error
):
    def full(*_):
        raise error

    monkeypatch.setattr(adapters, place, full)
    said = refused(plain)
    assert "GPU's memory is full" in said and "--dtype bfloat16" in said
    assert "checkpoint" not in said and "MAX_SEQ_LEN" not in said
    assert "--max_new_tokens" in said and "--examples 0" in said


def test_a_relative_base_is_found_from_another_folder(
    changed, capsys, tmp_path, monkeypatch, held_out
):
    """It was named as seen from where the training was started, above the adapter."""
    start = tmp_path / "project"
    shutil.copytree(TINY, start / "models" / "tiny")
    folder = shutil.move(changed(base_model_name_or_path="models/tiny"), start / "out" / "adapter")
    monkeypatch.chdir(tmp_path)
    run = measure(capsys, Path(folder), held_out, *SHORT)
    assert run.found["base"] == str(start / "models" / "tiny")
    shutil.rmtree(start / "models")
    end = command(capsys, "evidence", folder, "--eval_file", held_out, *SHORT)
    assert end.status == 1 and "if that is a folder, give with --base where it is now" in end.err


def test_of_several_gpus_only_the_first_is_seen_when_torch_counts_them(
    monkeypatch, restored_environment
):
    seen = []
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    )
    for visible in ("2,3", "", "GPU-5a,GPU-5b"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        adapters.sees_a_gpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    adapters.sees_a_gpu()
    assert seen == ["2", "", "GPU-5a", "0"]


@pytest.mark.parametrize("is_right", [True, False])
def test_a_gpu_that_emulates_bfloat16_multiplies_in_float16_only_if_a_loss_stays(
    monkeypatch, capsys, changed, held_out, is_right
):
    """Of another trainer's adapter no run says how its base is to be multiplied."""
    real, plain = adapters.use_fp16_matmul, adapters.load_model
    loaded = []

    def wrong(model):
        model = real(model)
        model.get_input_embeddings().weight.data.mul_(50)
        return model

    def load(*how):
        loaded.append(how)
        return plain(*how)

    monkeypatch.setattr(adapters, "emulates_bfloat16", lambda *_: True)
    monkeypatch.setattr(adapters, "load_model", load)
    monkeypatch.setattr(adapters, "use_fp16_matmul", real if is_right else wrong)
    adapter = changed()
    run = measure(capsys, adapter, held_out, *SHORT)
    assert run.found["matmul"] == ("float16" if is_right else "native")
    assert len(loaded) == (1 if is_right else 2)
    assert ("not used" in run.out) != is_right
    monkeypatch.undo()
    native = measure(capsys, adapter, held_out, *SHORT).found
    assert columns(run.found) == [pytest.approx(one, rel=1e-3) for one in columns(native)]


def test_only_a_gpu_without_bfloat16_emulates_it(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for is_native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda n=is_native, **_: n)
        assert adapters.emulates_bfloat16(gpu, "bfloat16") is not is_native
        assert not adapters.emulates_bfloat16(gpu, "float32")
        assert not adapters.emulates_bfloat16(cpu, "bfloat16")


def test_no_flag_is_needed_on_a_laptop(plain, capsys, held_out):
    """The GPU is taken if there is one that works; else the CPU, in float32."""
    words = [word for word in SHORT if word not in ("--device", "cpu")]
    run = measure(capsys, plain, held_out, *words)
    if not torch.cuda.is_available():
        assert (run.found["device"], run.found["dtype"]) == ("cpu", "float32")


def test_a_gpu_that_does_not_work_is_told(refused, plain, monkeypatch):
    """In the words of this command: the script would advise its own flags."""

    def no_gpu(device, dtype):
        raise adapters.UserError("torch sees no GPU (old driver). Try --demo, or another.")

    monkeypatch.setattr(adapters, "prepare_device", no_gpu)
    said = refused(plain, "--device", "cuda")
    assert "On cuda it cannot be measured (torch sees no GPU (old driver)). --device cpu" in said
    assert "--demo" not in said


def test_on_a_gpu_the_kernels_are_tried_before_the_model_is_loaded(refused, plain, monkeypatch):
    """transformers takes fla wherever it can be imported, also where it computes wrong values."""
    seen = []

    def load(*_):
        seen.append("loaded")
        raise adapters.InspectError("far enough")

    gpu = torch.device("cuda")
    monkeypatch.setattr(adapters, "choose_device_and_dtype", lambda *_: (gpu, "bfloat16"))
    monkeypatch.setattr(adapters, "choose_delta_kernels", lambda *given: seen.append(given[1]))
    monkeypatch.setattr(adapters, "load_model", load)
    assert "far enough" in refused(plain)
    assert seen == ["bfloat16", "loaded"]


# ==== Tokenizer and template


def test_a_template_of_the_adapters_own_is_taken(capsys, changed, tmp_path, held_out):
    folder = changed()
    before = measure(capsys, folder, held_out, *SHORT)
    assert "\n- chat template: the base's\n" in before.report
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.save_pretrained(folder)
    same = measure(capsys, folder, held_out, *SHORT)
    assert "\n- chat template: the adapter's own, the same as the base's\n" in same.report
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_start|> ")
    tokenizer.save_pretrained(folder)
    own = measure(capsys, folder, held_out, *SHORT)
    assert columns(own.found) != columns(before.found)
    assert "\n- chat template: the adapter's own, which differs from the base's; both" in own.report


def test_a_base_without_a_template_is_told(capsys, changed, tmp_path, held_out):
    folder = changed()
    base = shutil.copytree(TINY, tmp_path / "base")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    (base / "chat_template.jinja").unlink()
    run = measure(capsys, folder, held_out, *SHORT, "--base", base)
    assert "\n- chat template: the adapter's own; the base has none, or it cannot" in run.report


def test_a_damaged_tokenizer_of_the_adapters_own_is_told(refused, changed):
    """The base's template would write other prompts, in silence."""
    folder = changed()
    (folder / "tokenizer_config.json").write_text('{"chat_template": "', encoding="utf-8")
    said = refused(folder)
    assert "tokenizer_config.json is damaged" in said and "or remove it" in said


def test_nothing_of_an_adapter_is_executed(capsys, changed, held_out, tmp_path):
    """Its tokenizer may name code of its own, which would run wherever it is trusted."""
    folder = changed()
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    marker = tmp_path / "executed"
    (folder / "own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import Qwen2TokenizerFast\n"
        "class Own(Qwen2TokenizerFast):\n    pass\n"
    )
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # it would
    assert marker.is_file()
    marker.unlink()
    for words in (["info"], ["evidence", "--eval_file", held_out, *SHORT], ["chat"]):
        command(capsys, words[0], folder, *words[1:])
        assert not marker.exists(), words


def test_a_tokenizer_with_more_tokens_than_the_base_has_is_refused(refused, changed, tmp_path):
    folder = changed()
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["beansareup"])
    tokenizer.save_pretrained(folder)
    path = write_held_out(tmp_path / "new.jsonl", [("beansareup", "Already!")])
    assert "do not belong together" in refused(folder, "--eval_file", path)


def test_a_tokenizer_without_a_vocabulary_is_refused(refused, changed):
    """transformers makes an empty one, and every text is one token."""
    folder = changed()
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    assert f"The tokenizer in {folder} turns no reply" in refused(folder)


def test_without_held_out_conversations_they_are_asked_for(capsys, plain):
    end = command(capsys, "evidence", plain, *SHORT)
    assert end.status == 1 and "--eval_file" in end.err and '{"messages"' in end.err


def test_a_bad_line_is_named_before_the_model_is_loaded(refused, plain, tmp_path):
    path = write_lines(tmp_path / "bad.jsonl", [{"messages": messages_of(("a", "b", "c"))}])
    said = refused(plain, "--eval_file", path, "--base", "/nowhere")
    assert "bad.jsonl:1" in said and "nowhere" not in said


def test_longer_lines_are_left_out_only_if_asked_for(capsys, plain, tmp_path):
    said = [("hello", f"Oh, {n}.") for n in range(12)] + [("rain " * 60, "Tea, then?")]
    path = write_held_out(tmp_path / "long.jsonl", said)
    assert len(measure(capsys, plain, path, *SHORT).found["losses"]) == 13
    run = measure(capsys, plain, path, *SHORT, "--max_seq_len", "50")
    assert len(run.found["losses"]) == 12 and "long.jsonl:13" in run.out


def test_lines_beyond_the_models_window_are_told(capsys, plain, tmp_path):
    """Nothing else would be: most models go on, with a loss that says little."""
    base = shutil.copytree(TINY, tmp_path / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["max_position_embeddings"] = 60
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    path = write_held_out(tmp_path / "long.jsonl", [("rain " * 60, "Tea, then?"), *SAID])
    run = measure(capsys, plain, path, *SHORT, "--base", base)
    assert "longer than the 60 tokens that the model was made for" in run.said
    assert "1 held-out reply with its conversation, such as" in run.said
    assert "long.jsonl:1. --max_seq_len 60 leaves such out" in run.said
    assert "was made for" not in measure(capsys, plain, path, *SHORT).said


def test_a_foreign_adapters_system_message_is_the_one_that_all_lines_share(capsys, tmp_path):
    folder = save_adapter(tmp_path / "adapter")
    system = {"role": "system", "content": "You are Nell."}
    alike = [{"messages": [system, *messages_of(said)]} for said in SAID]
    other = [{"messages": messages_of(("one more", "No."))}]
    for rows, expected in ((alike, "You are Nell."), (alike + other, "")):
        eval_file = write_lines(tmp_path / "held_out.jsonl", rows)
        assert measure(capsys, folder, eval_file, *SHORT).found["system_message"] == expected
