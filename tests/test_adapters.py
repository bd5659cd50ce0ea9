"""Any adapter is opened as it was trained, or refused with the reason."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from by_hand import ROUNDING, MergedByHand, losses_of_peft, read_conversations
from conftest import TOY
from records import SHORT, evidence, mean_losses, write_talks_with
from runs import files, refused, talk, write_lines
from safetensors.torch import load_file
from toys import (
    PLAIN_SCALE,
    TENSORS,
    change_config,
    change_tensors,
    edit_json,
    family,
    model_of,
    save_adapter,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_lora_single as script
from inspect_lora.__main__ import main

PREFIX = "base_model.model."
EMBEDDING = f"{PREFIX}model.embed_tokens.weight"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Return the path of three held-out lines."""
    return write_talks_with(tmp_path_factory.mktemp("held out") / "eval.jsonl", 1, 2, 3)


@pytest.fixture
def measured(capfd, held_out, tmp_path):
    """Return a function that measures an adapter's losses, and gives the record."""

    def measure(adapter, *words):
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        words = ["--eval_file", held_out, *SHORT, *words]
        return evidence(capfd, adapter, tmp_path / "results", *words)[0]

    return measure


@pytest.fixture
def not_measured(capfd, held_out, tmp_path):
    """Return a function that gives an adapter that is refused, with what the message names."""

    def measure(adapter, *keys, more=()):
        results = tmp_path / "no results"
        argv = ["evidence", adapter, "--eval_file", held_out, "--device", "cpu", *SHORT]
        end = refused(capfd, [*argv, "--output_dir", results, *more], *keys, main=main)
        assert not results.exists() and "gain" not in end.out

    return measure


@pytest.fixture
def copied(adapters, tmp_path):
    """Return a function that copies an adapter of a kind, with other entries in its config."""

    def copy(kind="plain", **config):
        return change_config(shutil.copytree(adapters[kind], tmp_path / "copied"), **config)

    return copy


def near(losses):
    return pytest.approx(losses, abs=ROUNDING)


def by_peft(folder, path):
    """Return the losses that PEFT alone gives an adapter, and that it changes them."""
    base, adapter = losses_of_peft(folder, read_conversations(path))
    assert max(abs(a - b) for a, b in zip(base, adapter, strict=True)) > 20 * ROUNDING
    return [near(base), near(adapter)]


# ---- the losses are those of the adapter as it was trained


def test_losses_parts_and_cuts_are_those_of_weights_merged_by_hand(adapters, measured, held_out):
    """Nothing on the other side knows the script, TRL or PEFT."""
    folder = adapters["plain"]
    before = files(folder)
    found = measured(folder, "--parts", 9)
    assert files(folder) == before
    merged = MergedByHand(TOY, folder / TENSORS, lambda _: PLAIN_SCALE)
    conversations = read_conversations(held_out)
    base = merged.losses(conversations, wanted=lambda path: False)
    assert mean_losses(found) == [near(base), near(merged.losses(conversations))]
    expected = {
        "x 0.25": {"strength": 0.25}, "x 0.5": {"strength": 0.5}, "x 0.75": {"strength": 0.75},
        "x 1.25": {"strength": 1.25}, "x 1.5": {"strength": 1.5}, "x 2": {"strength": 2},
        "attention alone": {"wanted": lambda path: "self_attn" in path},
        "DeltaNet alone": {"wanted": lambda path: "linear_attn" in path},
        "feed-forward alone": {"wanted": lambda path: "mlp" in path},
        "cut to 2 of 4": {"divisor": 2}, "cut to 1 of 4": {"divisor": 4},
    }  # fmt: skip
    for target in ("q_proj", "o_proj", "in_proj_qkv", "out_proj", "up_proj", "down_proj"):
        expected[f"{target} alone"] = {"wanted": lambda path, name=target: path.endswith(name)}
    parts = {part["name"]: part for part in found["parts"]}
    assert parts.keys() == expected.keys()
    tokens = [line["tokens"] for line in found["lines"]]
    for name, how in expected.items():
        own = [loss / n for loss, n in zip(parts[name]["losses"], tokens, strict=True)]
        assert own == near(merged.losses(conversations, **how)), name


KINDS_OF_PARTS = {"strength", "group", "target", "cut"}
VARIANTS = {
    "rsLoRA with patterns": ("rslora", {}, KINDS_OF_PARTS),
    "DoRA": ("dora", {}, set()),
    "a whole module": ("whole", {}, set()),
    "trained tokens": ("plain", {"trainable_token_indices": [5, 6]}, set()),
    "all linear layers": ("plain", {"target_modules": "all-linear"}, KINDS_OF_PARTS),
    "the head": ("plain", {"target_modules": ["lm_head", "down_proj"]}, KINDS_OF_PARTS),
    "the embedding": ("plain", {"target_modules": ["embed_tokens", "down_proj"]}, set()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("name", VARIANTS)
def test_each_kind_of_lora_has_the_losses_that_peft_alone_gives_it(
    adapters, measured, held_out, tmp_path, name
):
    kind, config, kinds = VARIANTS[name]
    folder = save_adapter(tmp_path / "own", **config) if config else adapters[kind]
    found = measured(folder, "--parts", 1)
    assert mean_losses(found) == by_peft(folder, held_out)
    assert {part["kind"] for part in found["parts"]} == kinds
    assert bool(found["updates"]) is bool(kinds)


def test_a_cut_halves_each_modules_own_rank(adapters, measured, held_out):
    """Of the ranks 1, 4 and 6 half is 1 (not 0), 2 and 3."""
    folder = adapters["rslora"]
    scale = {"out_proj": 3 / 6**0.5, "down_proj": 8}
    merged = MergedByHand(TOY, folder / TENSORS, lambda target: scale.get(target, 8 / 4**0.5))
    assert {len(a) for _, _, a in merged.factors.values()} == {1, 4, 6}
    found = measured(folder, "--parts", 9)
    parts = {part["name"]: part["losses"] for part in found["parts"]}
    for name, divisor in (("cut to 3 of 6", 2), ("cut to 1 of 6", 4)):
        losses = merged.losses(read_conversations(held_out), divisor=divisor)
        tokens = [line["tokens"] for line in found["lines"]]
        assert [loss / n for loss, n in zip(parts[name], tokens, strict=True)] == near(losses)


INTO_WRAPPER = {
    "Qwen3.5's": (".model.model.", ".model.model.language_model."),
    "Gemma 3's of old": (".model.model.", ".model.language_model.model."),
}
UNSLOTH = r"(?:.*?(?:language|text).*?(?:self_attn|linear_attn|mlp).*?_(?:proj|qkv))"


def wrapped(folder, form, **config):
    """Rename an adapter's tensors as if it had been trained in a wrapper; return its folder."""
    old, new = INTO_WRAPPER[form]
    change_tensors(folder, lambda tensors: {
        name.replace(old, new, 1): one for name, one in tensors.items()
    })  # fmt: skip
    return change_config(folder, **config)


@pytest.mark.parametrize("form", INTO_WRAPPER)
def test_an_adapter_in_unsloths_form_is_the_same(copied, adapters, measured, form):
    """Its names are a wrapper's, its targets an expression, its vision tower's updates 0."""
    folder = wrapped(copied(), form, target_modules=UNSLOTH, exclude_modules=r".*visual.*")
    change_config(folder, base_model_name_or_path="unsloth/tiny-unsloth-bnb-4bit")
    vision = f"{PREFIX}model.visual.blocks.0.mlp.down_proj"
    change_tensors(folder, lambda tensors: tensors.update({
        f"{vision}.lora_A.weight": torch.ones(4, 64), f"{vision}.lora_B.weight": torch.zeros(64, 4),
    }))  # fmt: skip
    found = measured(folder, "--base", TOY)
    assert mean_losses(found) == mean_losses(measured(adapters["plain"]))


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
def test_patterns_that_were_written_for_a_wrapper_hold(measured, held_out, tmp_path, form, written):
    """PEFT alone warns of a pattern that matches nothing, and scales as if there were none."""
    patterns = {
        "rank_pattern": {"model.layers.0.mlp.down_proj": 2},
        "alpha_pattern": {"model.layers.0.linear_attn.out_proj": 40},
    }
    folder = save_adapter(tmp_path / "own", **patterns)
    expected = by_peft(folder, held_out)
    inside = INTO_WRAPPER[form][1].removeprefix(".model.")
    moved = {
        name: {written(path, inside): value for path, value in pattern.items()}
        for name, pattern in patterns.items()
    }
    assert mean_losses(measured(wrapped(folder, form, **moved))) == expected


def test_a_target_without_tensors_is_left_as_the_base_has_it(copied, measured, held_out):
    """Also where PEFT would begin it by chance."""
    folder = copied(init_lora_weights=False)
    change_tensors(folder, lambda tensors: {k: v for k, v in tensors.items() if "o_proj" not in k})
    merged = MergedByHand(TOY, folder / TENSORS, lambda _: PLAIN_SCALE)
    expected = merged.losses(read_conversations(held_out))
    assert mean_losses(measured(folder))[1] == near(expected)


@pytest.mark.parametrize("form", ["of a state_dict", "beside a copy of the base's embedding"])
def test_the_same_adapter_in_another_file_is_the_same(copied, adapters, measured, base, form):
    """PEFT saves the embedding along in many cases."""
    weight = base.get_input_embeddings().weight.detach().clone()

    def change(tensors):
        if form == "of a state_dict":
            return {k.replace(".weight", ".default.weight"): one for k, one in tensors.items()}
        return tensors | {EMBEDDING: weight}

    found = measured(change_tensors(copied(), change))
    assert mean_losses(found) == mean_losses(measured(adapters["plain"]))


# ---- what would not be this adapter, or not this base, is refused


def damage(tensors, name):
    """Change an adapter's tensors in one way."""
    a, b = (next(key for key in tensors if part in key) for part in ("lora_A", "lora_B"))
    vision = f"{PREFIX}model.visual.blocks.0.attn.qkv"
    if name in ("NaN", "infinity"):
        tensors[a][0, 0] = float(name[:3])
    elif name == "each B is 0":
        tensors.update({key: 0 * one for key, one in tensors.items() if "lora_B" in key})
    elif name == "A without B":
        del tensors[b]
    elif name == "two tensors for one place":
        tensors[a.replace("model.layers", "model.language_model.layers")] = tensors[a].clone()
    elif name == "another embedding":
        tensors[EMBEDDING] = torch.ones(3072, 192)
    elif name == "a trained vision tower":
        tensors[f"{vision}.lora_A.weight"] = torch.ones(4, 64)
        tensors[f"{vision}.lora_B.weight"] = torch.ones(192, 4)
    elif name == "another size than the base's":
        tensors[f"{PREFIX}model.layers.1.mlp.up_proj.lora_A.weight"] = torch.ones(4, 100)
    elif name == "finite, and its losses are not":
        return {key: 1e30 * one for key, one in tensors.items()}
    elif name == "a layer that is not there":
        return {key.replace("layers.1.mlp", "layers.9.mlp"): one for key, one in tensors.items()}
    return None


BAD_TENSORS = {
    "NaN": ["NaN:", "lora_A"], "infinity": ["NaN:", "lora_A"], "each B is 0": ["zero:"],
    "A without B": ["lora_A"], "two tensors for one place": ["doubled:"],
    "another embedding": ["embedding"], "a layer that is not there": ["layers.9.mlp"],
    "a trained vision tower": ["visual.blocks.0.attn.qkv"],
    "another size than the base's": ["up_proj"], "finite, and its losses are not": ["--dtype"],
}  # fmt: skip
QUANTIZED = "un/Q3-4B-unsloth-bnb-4bit"
BAD_CONFIGS = {
    "another rank than its tensors": ({"r": 8}, ["rank:"]),
    "begun from the base's own directions": ({"init_lora_weights": "pissa"}, ["pissa"]),
    "an activated LoRA": ({"alora_invocation_tokens": [5, 6]}, ["copied"]),
    "no base": ({"base_model_name_or_path": None}, ["--base"]),
    "no such base": ({"base_model_name_or_path": "/no/base"}, ["/no/base", "--base"]),
    "a quantized copy": ({"base_model_name_or_path": QUANTIZED}, ["un/Q3-4B", "--base"]),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_would_not_be_this_adapter_are_refused(copied, not_measured, name):
    folder = change_tensors(copied(), lambda tensors: damage(tensors, name))
    not_measured(folder, *BAD_TENSORS[name])


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_config_that_would_not_be_this_adapters_is_refused(copied, not_measured, name):
    config, keys = BAD_CONFIGS[name]
    not_measured(copied(**config), *keys)


def test_a_trained_token_of_an_embedding_of_its_own_is_found(untied, tmp_path, not_measured):
    """No ordinary text shows it: this token stands only between the turns."""
    base = AutoModelForCausalLM.from_pretrained(untied, dtype="float32")
    folder = save_adapter(tmp_path / "own", model=base)
    weight = base.get_input_embeddings().weight.detach().clone()
    weight[AutoTokenizer.from_pretrained(untied).convert_tokens_to_ids("<|im_start|>")] += 1
    change_tensors(folder, lambda tensors: tensors.update({EMBEDDING: weight}))
    not_measured(folder, "embedding", more=["--base", untied])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_the_base_are_refused(tmp_path, not_measured, bias):
    """They stay where the adapter is switched off."""
    base = model_of(family("Qwen2"), tmp_path / "base", has_weights=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    folder = save_adapter(tmp_path / "own", model=model, target_modules=["q_proj"], bias=bias)
    assert any(name.endswith(".bias") for name in load_file(folder / TENSORS))
    not_measured(folder, "biases")


def test_a_quantized_base_is_known_by_its_config(copied, tmp_path, not_measured):
    base = shutil.copytree(TOY, tmp_path / "base")
    how = {"quantization_config": {"quant_method": "fp8"}}
    edit_json(base / "config.json", lambda config: config.update(how))
    not_measured(copied(base_model_name_or_path=str(base)), "quantized", "--base")


# ---- which base, which tokenizer


def test_a_relative_base_is_found_from_another_folder(copied, measured, tmp_path, monkeypatch):
    """It was named as seen from where the training was started, above the adapter."""
    base = shutil.copytree(TOY, tmp_path / "project" / "models" / "toy")
    folder = copied(base_model_name_or_path="models/toy")
    folder = Path(shutil.move(folder, tmp_path / "project" / "out" / "adapter"))
    monkeypatch.chdir(tmp_path)
    assert measured(folder)["on"]["base"] == str(base)


@pytest.mark.parametrize(
    ("saved", "flags", "asked"),
    [
        ({}, [], ("some/base", "main")),
        ({"revision": "abc"}, [], ("some/base", "abc")),
        ({"revision": "abc"}, ["--base_revision", "v2"], ("some/base", "v2")),
        ({"revision": "abc"}, ["--base", "other/base"], ("other/base", "main")),
    ],
)
def test_the_hub_is_asked_for_the_right_base_and_revision(
    copied, not_measured, monkeypatch, saved, flags, asked
):
    def read(job):
        raise script.UserError(f"{job.settings.MODEL_NAME}@{job.settings.MODEL_REVISION}")

    monkeypatch.setattr(script, "read_model_files", read)
    not_measured(copied(base_model_name_or_path="some/base", **saved), "@".join(asked), more=flags)


def test_a_template_of_the_adapters_own_is_taken_for_both(copied, measured, held_out):
    """With its own end of a turn, as where a model without a template was trained to chat."""
    folder = copied()
    before = measured(folder)
    own = AutoTokenizer.from_pretrained(TOY)
    own.chat_template = own.chat_template.replace("<|im_start|>", "<|im_start|> ")
    own.save_pretrained(folder)
    found = measured(folder)
    assert found["on"]["tokenizer"] == str(folder)
    assert all(a != b for a, b in zip(mean_losses(found), mean_losses(before), strict=True))
    merged = MergedByHand(TOY, folder / TENSORS, lambda _: PLAIN_SCALE)
    merged.tokenizer = own
    assert mean_losses(found)[1] == near(merged.losses(read_conversations(held_out)))


def test_nothing_of_an_adapter_is_executed(capfd, copied, held_out, tmp_path):
    """Its tokenizer may name code of its own, which would run wherever it is trusted."""
    folder, marker = copied(), tmp_path / "executed"
    AutoTokenizer.from_pretrained(TOY).save_pretrained(folder)
    (folder / "own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import Qwen2TokenizerFast\n"
        "class Own(Qwen2TokenizerFast):\n    pass\n"
    )
    code = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(code))
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # it would
    marker.unlink()
    with pytest.raises((SystemExit, ValueError)):
        main(["evidence", str(folder), "--eval_file", held_out, "--device", "cpu", *SHORT])
    assert not marker.exists()


@pytest.mark.parametrize(
    ("systems", "recorded", "flags", "expected"),
    [
        (["You are Nell."] * 2, {}, [], "You are Nell."),
        (["You are Nell.", "You are Bob."], {}, [], ""),
        (["You are Nell.", None], {}, [], ""),
        (["You are Nell."] * 2, {"system_message": None}, [], ""),
        (["You are Nell."] * 2, {"system_message": "You are Ann."}, [], "You are Ann."),
        (["You are Nell."] * 2, {}, ["--system", "You are Eve."], "You are Eve."),
        (["You are Nell."] * 2, {"system_message": "You are Ann."}, ["--system", ""], ""),
    ],
)
def test_the_system_message_is_the_trainings(
    copied, measured, tmp_path, systems, recorded, flags, expected
):
    folder = copied()
    (folder / "run.json").write_text(json.dumps(recorded), encoding="utf-8")
    heads = [[{"role": "system", "content": one}] if one else [] for one in systems]
    rows = [{"messages": head + talk(n)[1:]} for n, head in enumerate(heads)]
    path = write_lines(tmp_path / "own.jsonl", rows)
    assert measured(folder, "--eval_file", path, *flags)["system"] == expected
