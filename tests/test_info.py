"""info: what it says of each kind of adapter, from the files alone."""

import contextlib
import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from tiny_adapters import (
    CONFIG,
    PLAIN,
    TENSORS,
    change_config,
    change_tensors,
    command,
    copied,
    llama,
    save_adapter,
)
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from inspect_lora.common import file_sha256
from inspect_lora.faults import KNOWN_KEYS
from inspect_lora.modules import read_adapter

LAYER = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the folder of a plain adapter. Tests must not change it."""
    return save_adapter(tmp_path_factory.mktemp("plain") / "adapter")


@pytest.fixture
def info(capsys):
    """Return a function that gives what info prints of an adapter, and as JSON."""

    def run(adapter, *flags):
        end = command(capsys, "info", adapter, *flags)
        assert all(len(line) <= 100 for line in end.out.splitlines() if str(adapter) not in line)
        if not flags:
            again = command(capsys, "info", adapter, "--json")
            assert again.status == end.status
            end.json = json.loads(again.out) if again.out else None
        return end

    return run


def module(found, name):
    """Return the one module of this name."""
    (row,) = [row for row in found.json["modules"] if row["name"] == name]
    return row


def test_every_module_has_the_size_and_directions_of_its_update(plain, info):
    found = info(plain)
    assert found.status == 0
    assert found.json.keys() == {
        "schema", "base", "r", "alpha", "parameters", "modules", "problems", "notes"
    }  # fmt: skip
    assert (found.json["schema"], found.json["r"], found.json["alpha"]) == (1, 4, 8)
    tensors = load_file(plain / TENSORS)
    assert found.json["parameters"] == sum(one.numel() for one in tensors.values())
    assert len(found.json["modules"]) == 24
    for row in found.json["modules"]:
        name = f"base_model.model.{row['name']}"
        b, a = (tensors[f"{name}.lora_{part}.weight"].double().numpy() for part in "BA")
        squares = np.linalg.svd(2 * b @ a, compute_uv=False)[:4] ** 2
        assert row["norm"] == pytest.approx(np.sqrt(squares.sum()), rel=1e-6)
        shares = squares.cumsum() / squares.sum()
        assert row["directions"] == 1 + (shares < 0.9).sum()
        assert row["target"] == name.rpartition(".")[2] and f"layers.{row['layer']}." in name
        assert (row["r"], row["scaling"], row["is_finite"], row["is_zero"]) == (4, 2, True, False)
    assert "alpha / r = 2" in found.said and "24 modules, float32" in found.said
    assert "q_proj ######## 4 2" in found.said and "layers 0 to 7" in found.said
    assert "evidence" in found.said and "note" not in found.said and "problem" not in found.said
    assert "sound Nothing wrong was found in the file: every matrix is finite, none" in found.said
    assert "layers 0 to 7 rank scaling size directions" in found.said
    assert "(`evidence` compares it with W)" in found.said
    assert len(found.out.splitlines()) < 26


@pytest.mark.parametrize(("layers", "signs"), [(36, 36), (40, 20)])
def test_a_map_of_many_layers_fits_the_terminal(plain, tmp_path, info, layers, signs):
    def deeper(tensors):
        return tensors | {
            name.replace("layers.7", f"layers.{layer}"): one.clone()
            for layer in range(8, layers)
            for name, one in tensors.items()
            if "layers.7" in name
        }

    found = info(change_tensors(copied(plain, tmp_path / "deep"), deeper))
    (row,) = [line for line in found.out.splitlines() if "q_proj" in line]
    assert len(row) <= 100 and f" {signs * '#'} " in row
    assert ("(one sign for 2 layers)" in found.said) == (layers > signs)


def test_the_real_scaling_is_told_by_rslora_and_by_pattern(tmp_path, info):
    found = info(save_adapter(tmp_path / "rslora", use_rslora=True))
    assert "alpha / sqrt(r) = 4, since it is rsLoRA (alpha / r = 2)" in found.said
    assert {row["scaling"] for row in found.json["modules"]} == {4}
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 2}}
    found = info(save_adapter(tmp_path / "patterns", **patterns))
    assert "ranks 2 to 4" in found.said and "alpha / r = 0.5 to 4" in found.said
    assert "q_proj ######## 2-4 2-4" in found.said
    row = module(found, "model.layers.0.self_attn.q_proj")
    assert (row["r"], row["scaling"]) == (2, 4)
    assert module(found, "model.layers.7.self_attn.v_proj")["scaling"] == 0.5


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "It is DoRA"),
        ({"modules_to_save": ["lm_head"]}, "1 whole tensor besides LoRA (lm_head.weight; 0.0 MB)"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa, which changed the base"),
        ({"target_modules": ["q_proj", "v_prj"]}, "target_modules names v_prj, but no module"),
    ],
)
def test_what_others_do_not_take_is_noted(tmp_path, info, config, said):
    found = info(save_adapter(tmp_path / "adapter", **config))
    assert found.status == 0 and said in found.said and not found.json["problems"]
    assert any(said in note for note in found.json["notes"])


# Rank, alpha and patterns that PEFT takes, and what each module is multiplied by, as PEFT says.
ODD = [
    {"r": 3, "lora_alpha": 7},
    {"r": 16, "lora_alpha": 1},
    {"r": 4, "lora_alpha": 0.5},
    {"r": 5, "lora_alpha": 5, "use_rslora": True},
    {"r": 4, "rank_pattern": {"q_proj": 2}},
    {"r": 4, "rank_pattern": {"layers.3.self_attn.q_proj": 1, "q_proj": 2}},
    {"r": 4, "rank_pattern": {"layers.3.self_attn.q_proj": 8}, "alpha_pattern": {"proj": 2}},
    {"r": 4, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    {"r": 4, "rank_pattern": {r"layers\.[0-3]\..*": 2}, "alpha_pattern": {r".*\.mlp\..*": 9}},
    {"r": 4, "alpha_pattern": {"^model.layers.5.mlp.up_proj": 1}},
    {"r": 2, "rank_pattern": {"proj": 1, "up_proj": 8}, "use_rslora": True},
    {"r": 4, "target_modules": "all-linear", "rank_pattern": {"k_proj|o_proj": 1}},
    {"r": 4, "layers_to_transform": [1, 2], "alpha_pattern": {"1.self_attn.v_proj": 5}},
]


@pytest.mark.parametrize("config", ODD)
def test_rank_and_scaling_are_those_that_peft_gives_each_module(tmp_path, config):
    folder = save_adapter(tmp_path / "adapter", **config)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(llama()), folder)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in loaded.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    modules = read_adapter(folder).modules
    assert {one.name for one in modules} == set(layers) and modules
    for one in modules:
        assert one.r == layers[one.name].r["default"], one.name
        assert one.scaling == pytest.approx(layers[one.name].scaling["default"]), one.name


@pytest.mark.parametrize("excluded", [["up_proj"], ".*up_proj"])
def test_a_target_that_is_excluded_as_well_is_not_called_misspelt(tmp_path, info, excluded):
    config = {"target_modules": ["q_proj", "up_proj"], "exclude_modules": excluded}
    found = info(save_adapter(tmp_path / "adapter", **config))
    assert found.status == 0 and "target_modules names" not in found.said


@pytest.mark.parametrize(
    ("target", "excluded", "is_told"),
    [
        ("up_pro", ["up_proj"], True),
        ("up_pro", ".*up_proj", True),
        ("proj", ["up_proj"], True),
        ("up_proj", ["layers.0.mlp.up_proj"], False),
        ("mlp.up_proj", ["up_proj"], False),
        ("up_proj", r".*\.\bup_proj$", False),
        ("up_proj", "(.*mlp.)?up_proj|lm_head", False),
        ("up_proj", None, True),
    ],
)
def test_a_misspelt_target_is_told_beside_an_excluded_one_like_it(
    plain, tmp_path, info, target, excluded, is_told
):
    """No module of the file is called so; a part of an excluded name is not that name."""
    folder = copied(plain, tmp_path / "new")
    change_tensors(folder, lambda tensors: {
        name: one for name, one in tensors.items() if "up_proj" not in name
    })  # fmt: skip
    targets = ["q_proj", "v_proj", target]
    found = info(change_config(folder, target_modules=targets, exclude_modules=excluded))
    assert found.status == 0, found.err
    assert (f"target_modules names {target}, but no module" in found.said) == is_told


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"bias": "all"}, "It trained biases of the base (bias = all)"),
        ({"task_type": "SEQ_CLS"}, "It is for another task than replying (SEQ_CLS)"),
        ({"alora_invocation_tokens": [5]}, "not understood here (alora_invocation_tokens)"),
        ({"use_dora": True}, "lora_magnitude_vector, which DoRA trains, of 0 of 24 modules"),
        ({"target_modules": ".*v_proj"}, "It holds 16 modules outside target_modules"),
        ({"layers_to_transform": [0, 1]}, "It holds 18 modules outside target_modules"),
        ({"exclude_modules": ["q_proj"]}, "It holds 8 modules outside target_modules"),
        ({"velora_config": {"scale": 1}}, "LoRA that is not understood here (velora_config)"),
        ({"use_bdlora": True}, "LoRA that is not understood here (use_bdlora)"),
        ({"megatron_config": {"a": 1}}, "LoRA that is not understood here (megatron_config)"),
    ],
)
def test_what_the_configuration_says_besides_is_noted(plain, tmp_path, info, config, said):
    found = info(change_config(copied(plain, tmp_path / "new"), **config))
    assert found.status == 0 and sum(said in note for note in found.json["notes"]) == 1
    assert "sound" not in found.said


def test_keys_of_a_newer_peft_are_noted(plain, tmp_path, info):
    assert {one.name for one in dataclasses.fields(peft.LoraConfig)} == KNOWN_KEYS
    found = info(change_config(copied(plain, tmp_path / "new"), use_zeta=True, zeta=None))
    assert found.status == 0 and "PEFT 0.21 does not know and leaves out: use_zeta." in found.said


@pytest.mark.parametrize("kind", [peft.KasaConfig, peft.MontecloraConfig, peft.VeloraConfig])
def test_other_kinds_of_lora_are_not_called_sound(tmp_path, info, kind):
    key = kind.__name__.removesuffix("Config").lower() + "_config"
    found = info(save_adapter(tmp_path / "adapter", **{key: kind()}))
    assert f"a kind of LoRA that is not understood here ({key}, model.layers.0." in found.said
    assert found.status == 0 and "sound" not in found.said


def with_lengths(tensors):
    tensors[LAYER.format(0, "q", "magnitude_vector").removesuffix(".weight")] = torch.ones(16)


def with_default(tensors):
    return {name.replace(".weight", ".default.weight"): one for name, one in tensors.items()}


def with_another_name(tensors):
    tensors[LAYER.format(0, "k", "A.mine")] = torch.ones(4, 16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_lengths, "which DoRA trains, of 1 of 24 modules, and use_dora is False"),
        (with_default, "It has the names of a state_dict(), with .default. in them"),
        (with_another_name, "It has what is of a kind of LoRA that is not understood here (model"),
    ],
)
def test_names_that_are_not_those_of_a_plain_lora_are_noted(plain, tmp_path, info, change, said):
    found = info(change_tensors(copied(plain, tmp_path / "new"), change))
    assert found.status == 0 and sum(said in note for note in found.json["notes"]) == 1
    assert len(found.json["modules"]) == 24


def test_a_vision_tower_that_was_never_trained_is_noted(plain, tmp_path, info):
    def as_unsloth(tensors):
        moved = {
            n.replace(".model.layers", ".model.language_model.layers"): t
            for n, t in tensors.items()
        }
        for layer in range(2):
            name = f"base_model.model.model.visual.blocks.{layer}.attn.qkv"
            moved[f"{name}.lora_A.weight"] = torch.ones(4, 16)
            moved[f"{name}.lora_B.weight"] = torch.zeros(48, 4)
        return moved

    folder = change_tensors(copied(plain, tmp_path / "unsloth"), as_unsloth)
    change_config(folder, base_model_name_or_path="unsloth/Qwen3.5-4B-unsloth-bnb-4bit")
    found = info(folder)
    assert found.status == 0 and "vision tower was trained" not in found.said
    assert "model.visual.blocks has B = 0 everywhere: it was never trained" in found.said
    assert "takes 0.0 MB of the file" in found.said
    assert "model.language_model.layers: " in found.said and "v_proj ########" in found.said
    assert "model.visual.blocks: qkv 00......" in found.said
    assert "named for the model that also takes images" in found.said
    assert "a quantized copy. On the full model (unsloth/Qwen3.5-4B)" in found.said


def test_a_vision_tower_that_was_trained_is_noted(plain, tmp_path, info):
    def with_vision(tensors):
        name = "base_model.model.model.visual.blocks.0.attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.ones(4, 16)
        tensors[f"{name}.lora_B.weight"] = torch.ones(48, 4)

    found = info(change_tensors(copied(plain, tmp_path / "vision"), with_vision))
    assert found.status == 0 and "vision tower was trained, too: 1 module, such as" in found.said
    assert "the text model alone, so they refuse it" in found.said


def test_nan_is_a_problem_and_null_in_json(plain, tmp_path, info):
    def break_one(tensors):
        tensors[LAYER.format(3, "q", "B")][0, 0] = float("nan")

    found = info(change_tensors(copied(plain, tmp_path / "nan"), break_one))
    assert found.status == 1 and "NaN or infinity in 1 of the 48 tensors" in found.said
    row = module(found, "model.layers.3.self_attn.q_proj")
    assert (row["norm"], row["directions"], row["is_finite"]) == (None, None, False)
    assert "q_proj ###!####" in found.said


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (1e30, "The update of 24 modules, such as model.layers.0.mlp.up_proj, is too large to be"),
        (1e-30, "The update of 24 modules, such as model.layers.0.mlp.up_proj, is too small to be"),
        (1e-200, "is too small to be computed in float32: its size is 0."),
        (1e200, "There is NaN or infinity in 48 of the 48 tensors"),
    ],
)
def test_an_update_that_cannot_be_computed_is_a_problem(plain, tmp_path, info, factor, said):
    def times(tensors):
        return {name: factor * one.double() for name, one in tensors.items()}

    found = info(change_tensors(copied(plain, tmp_path / "new"), times))
    assert found.status == 1 and said in found.said


def test_an_adapter_that_was_never_trained_is_a_problem(tmp_path, info):
    found = info(save_adapter(tmp_path / "untrained", std=0))
    assert found.status == 1 and "Every B is 0" in found.said and "sound" not in found.said
    assert all(row["is_zero"] and row["directions"] == 0 for row in found.json["modules"])
    zero = {"A": lambda name: "lora_A" in name, "A or B": lambda name: "q_proj.lora_A" in name
            or ("q_proj" not in name and "lora_B" in name)}  # fmt: skip
    for what, is_zero in zero.items():
        folder = save_adapter(tmp_path / what)
        change_tensors(folder, lambda t, z=is_zero: {n: one * (not z(n)) for n, one in t.items()})
        assert f"Every {what} is 0" in info(folder).said
    # The fully trained module may be right all the same.
    found = info(save_adapter(tmp_path / "head", std=0, modules_to_save=["lm_head"]))
    assert found.status == 0 and "model.layers has B = 0 everywhere" in found.said
    assert "every matrix is finite, all shapes fit." in found.said


def test_layers_without_what_their_neighbours_have_are_noted(plain, tmp_path, info):
    def without(*missing):
        return lambda tensors: {
            name: one
            for name, one in tensors.items()
            if not any(f"layers.{layer}." in name and part in name for layer, part in missing)
        }

    found = info(change_tensors(copied(plain, tmp_path / "one"), without((7, "v_proj"))))
    assert found.status == 0 and "layer 7 has no self_attn.v_proj" in found.said
    assert "v_proj #######." in found.said
    # Attention in every fourth layer alone is how Qwen3.5 is made.
    some = without(*((layer, "self_attn") for layer in (0, 1, 2, 4, 5, 6)))
    found = info(change_tensors(copied(plain, tmp_path / "two"), some))
    assert "has no" not in found.said and "q_proj ...#...#" in found.said


def test_a_layer_of_another_size_and_a_partly_zero_one_are_noted(plain, tmp_path, info):
    def change(tensors):
        tensors[LAYER.format(2, "q", "B")] *= 20
        tensors[LAYER.format(5, "v", "B")] *= 0

    found = info(change_tensors(copied(plain, tmp_path / "changed"), change))
    assert found.status == 0
    assert (
        "is far from that of the same target" in found.said
        and "layers.2.self_attn.q_proj (" in found.said
    )
    assert "1 of the 24 modules in model.layers change nothing, since their B is 0" in found.said


def test_experts_that_share_one_a_and_b_fit_and_have_no_size(tmp_path, info):
    """With target_parameters, PEFT stacks the directions of all experts in one A and one B."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    folder = save_adapter(tmp_path / "experts", model=model, lora_dropout=0.0, **targets)
    found = info(folder)
    assert found.status == 0 and not found.json["problems"], found.err
    assert "experts ## 4 2 - -" in found.said and "q_proj ## 4 2 " in found.said
    assert "LoRA on other things than linear layers" in found.said
    row = module(found, "model.layers.0.mlp.experts")
    assert (row["r"], row["norm"], row["is_zero"]) == (4, None, False)
    broken = change_tensors(folder, lambda tensors: {
        name: one[:, :8].clone() if "experts.lora_B" in name else one
        for name, one in tensors.items()
    })  # fmt: skip
    assert info(broken).status == 1


def test_an_update_of_few_directions_is_told_what_a_cut_would_keep(plain, tmp_path, info):
    def flatten(tensors):
        for name, one in tensors.items():
            if "lora_B" in name:
                one[:, 1:] *= 0.01

    found = info(change_tensors(copied(plain, tmp_path / "flat"), flatten))
    assert "Of 4 directions the strongest 1 make up 100 %" in found.said
    assert "export --rank 1" in found.said


def test_the_smallest_power_of_two_that_keeps_nearly_all_is_named(tmp_path, info):
    """Of 8 directions, a cut to 2 loses most, and one to 4 nearly nothing."""
    folder = save_adapter(tmp_path / "three", r=8)

    def flatten(tensors):
        for name, one in tensors.items():
            if "lora_B" in name:
                one[:, 3:] *= 0.01

    found = info(change_tensors(folder, flatten))
    assert "Of 8 directions the strongest 4 make up 100 %" in found.said
    assert "export --rank 4" in found.said


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (f"{ROOT}/tests/tiny-qwen3.5", "The base is a model that also takes images"),
        ("google/gemma-3-4b-it", "The base seems to be a model that also takes images"),
        (f"{ROOT}/tests", ""),
        ("meta-llama/Llama-3.1-8B", ""),
    ],
)
def test_names_that_a_server_would_ignore_are_noted(plain, tmp_path, info, base, said):
    found = info(change_config(copied(plain, tmp_path / "new"), base_model_name_or_path=base))
    assert found.status == 0 and bool(found.json["notes"]) == bool(said) and said in found.said
    assert ("--vllm" in found.said) == bool(said)


def test_of_this_trainer_it_knows_the_held_out_lines_and_what_to_serve(plain, tmp_path, info):
    base = f"{ROOT}/tests/tiny-qwen3.5"
    for name in ("final_lora", "final_lora_vllm"):
        change_config(copied(plain, tmp_path / name), base_model_name_or_path=base)
    record = {"settings": {}, "adapter_sha256": {"final_lora": file_sha256(plain / TENSORS)}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    found = info(tmp_path / "final_lora")
    assert found.out.endswith(f"evidence {tmp_path / 'final_lora'}\n")
    assert f"Serve {tmp_path / 'final_lora_vllm'}." in found.said
    with contextlib.chdir(tmp_path / "final_lora"):
        assert f"Serve {tmp_path / 'final_lora_vllm'}." in info(".").said
    with contextlib.chdir(plain):
        assert info(".").status == 0
    assert "--eval_file HELD_OUT.jsonl" in info(plain).out
    (tmp_path / "run.json").write_text('{"adapter_sha256": ["of another program"]}')
    assert "--eval_file HELD_OUT.jsonl" in info(tmp_path / "final_lora").out


@pytest.mark.parametrize(
    ("base", "is_asked"),
    [(None, True), ("/no/such/base", True), (f"{ROOT}/tests", False), ("gpt2", False)],
)
def test_the_next_command_asks_for_a_base_that_is_not_there(plain, tmp_path, info, base, is_asked):
    found = info(change_config(copied(plain, tmp_path / "new"), base_model_name_or_path=base))
    assert ("--base BASE" in found.out) == is_asked


@pytest.mark.parametrize("is_installed", [True, False])
@pytest.mark.parametrize(
    ("base", "plain_base"),
    [("a/b-bnb-4bit", "a/b"), ("a/b-AWQ", "a/b"), ("fp8", "FULL_PRECISION_BASE"), ("a/b", "")],
)
def test_the_next_command_names_a_base_that_evidence_takes(
    plain, tmp_path, info, monkeypatch, base, plain_base, is_installed
):
    """As `evidence` refuses a quantized copy that cannot be loaded here."""
    monkeypatch.setattr("inspect_lora.files.has_bitsandbytes", lambda: is_installed)
    monkeypatch.chdir(tmp_path)
    Path("fp8").mkdir()
    Path("fp8/config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    found = info(change_config(copied(plain, tmp_path / "new"), base_model_name_or_path=base))
    is_taken = not plain_base or ("bnb" in base and is_installed)
    flags = "--eval_file HELD_OUT.jsonl" + ("" if is_taken else f" --base {plain_base}")
    assert found.out.rstrip().endswith(flags)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"r": 8}, "The shape of 24 modules does not fit the configuration"),
        ({"rank_pattern": {"q_proj": 2}}, "The shape of 8 modules does not fit"),
        ({"peft_type": "IA3"}, "an adapter of the kind IA3; only LORA"),
        ({"r": "8"}, "r: Input should be a valid integer (it is '8')"),
        ({"r": None}, "r: Input should be a valid integer (it is None)"),
        ({"lora_alpha": None}, "lora_alpha: Input should be a valid number (it is None)"),
        ({"bias": None}, "bias: Input should be a valid string (it is None)"),
        ({"layers_to_transform": "3"}, "layers_to_transform: Input should be a valid integer"),
        ({"layers_to_transform": ["3"]}, "layers_to_transform: Input should be a valid integer"),
        ({"r": 0.5}, "r: Input should be a valid integer (it is 0.5)"),
        ({"r": float("inf")}, "r: Input should be"),
        ({"lora_alpha": float("inf")}, "lora_alpha: Input should be less than"),
        ({"rank_pattern": {"q_proj": 0.5}}, "rank_pattern: Input should be a valid integer"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern: Input should be"),
        ({"alpha_pattern": {"(": 2}}, "valid regular expression (it is '(')"),
        ({"target_modules": "("}, "valid regular expression (it is '(')"),
        ({"exclude_modules": 5}, "(it is 5)"),
    ],
)
def test_what_does_not_fit_is_a_problem(plain, tmp_path, info, change, said):
    found = info(change_config(copied(plain, tmp_path / "new"), **change))
    assert found.status == 1 and said in found.said


def renamed(tensors):
    return {f"lora_unet_{number}": one for number, one in enumerate(tensors.values())}


def twice(tensors):
    return tensors | {n.replace(".layers", ".language_model.layers"): t.clone()
                      for n, t in tensors.items()}  # fmt: skip


def half(tensors):
    del tensors[LAYER.format(0, "q", "B")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed, "There is nothing of LoRA in the file"),
        (half, "of 1 module A or B is missing"),
        (lambda tensors: {n: one.bool() for n, one in tensors.items()}, "no matrix of numbers"),
        (lambda tensors: {n: one.flatten() for n, one in tensors.items()}, "no matrix of numbers"),
        (lambda tensors: {n: one[:0] for n, one in tensors.items()}, "no matrix of numbers"),
        (twice, "The file holds 48 tensors twice"),
    ],
)
def test_a_file_without_whole_modules_is_a_problem(plain, tmp_path, info, change, said):
    found = info(change_tensors(copied(plain, tmp_path / "new"), change))
    assert found.status == 1 and said in found.said


def test_what_is_no_adapter_is_told_what_it_is(plain, tmp_path, info):
    assert "There is no adapter" in info(tmp_path / "nowhere").err
    assert "holds no adapter_config.json" in info(tmp_path).err
    assert "It looks like a whole model" in info(ROOT / "tests" / "tiny-qwen3.5").err
    assert f"Did you mean {plain}?" in info(plain.parent).err
    folder = copied(plain, tmp_path / "pickle")
    torch.save({}, (folder / TENSORS).with_suffix(".bin"))
    (folder / TENSORS).write_bytes(b"cut short")
    assert "cannot be read" in info(folder).err
    (folder / TENSORS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "a pointer of Git LFS" in info(folder).err and "lfs pull" in info(folder).err
    (folder / TENSORS).unlink()
    found = info(folder)
    assert found.status == 1 and "a pickle that could run code" in found.err and not found.out


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xef\xbb\xbf{}", b"[" * 100_000])
def test_a_damaged_configuration_is_told(plain, tmp_path, info, text):
    folder = copied(plain, tmp_path / "damaged")
    config = (folder / CONFIG).read_bytes()
    (folder / CONFIG).write_bytes(text.replace(b"{}", config))
    end = info(folder)
    assert end.status == 1 and "is damaged, or was not written by PEFT" in end.said


def test_it_answers_from_any_folder_without_the_large_libraries(plain, tmp_path):
    code = (
        "import runpy, sys; sys.argv = ['inspect_lora', 'info', sys.argv[1]]; "
        f"runpy.run_path({str(ROOT / 'inspect_lora')!r}, run_name='__main__'); "
        "found = {'transformers', 'peft', 'trl', 'train_lora_single'} & set(sys.modules); "
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    words = [sys.executable, "-c", code, str(plain)]
    end = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert end.returncode == 0 and end.stdout.startswith("adapter") and not end.stderr
    assert PLAIN["r"] == 4 and "r = 4, alpha = 8" in end.stdout
