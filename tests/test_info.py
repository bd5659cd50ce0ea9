"""info: what is in an adapter's file, by NumPy and PEFT; and the package's command line."""

import copy
import json
import re
import shutil
from importlib import metadata

import numpy as np
import peft
import pytest
import torch
import toys
from conftest import TOY
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from runs import command
from safetensors.torch import load_file
from toys import PREFIX, TENSORS, change_config, change_tensors, save_adapter
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from inspect_lora.__main__ import main
from inspect_lora.adapter import read_adapter
from inspect_lora.hub import original_of

LAYER = PREFIX + "model.layers.{}.mlp.{}_proj.lora_{}.weight"


@pytest.fixture
def info(capfd):
    """Return info(folder): its JSON; the status is 1 where it has a fault."""

    def ask(folder, *flags):
        end = command(capfd, ["info", folder, "--json", *flags], main)
        found = json.loads(end.out, parse_constant=pytest.fail)
        assert end.status == bool(found["faults"])
        return found

    return ask


def test_sizes_and_directions_are_those_of_numpys_svd(adapters, info):
    found = info(adapters["plain"])
    tensors = load_file(adapters["plain"] / TENSORS)
    assert len(found["modules"]) == len(tensors) / 2 > 6
    for row in found["modules"]:
        name = f"{PREFIX}{row['path']}.lora_"
        b, a = (tensors[f"{name}{part}.weight"].double().numpy() for part in "BA")
        squares = np.linalg.svd(toys.PLAIN_SCALE * b @ a, compute_uv=False)[:4] ** 2
        assert row["norm"] == pytest.approx(np.sqrt(squares.sum()), rel=1e-9)
        assert row["directions_for_90"] == 1 + (squares.cumsum() < 0.9 * squares.sum()).sum()
        assert row["path"].endswith(row["target"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_read_as_torch_reads_them(plain, dtype):
    change_tensors(plain, lambda tensors: {name: one.to(dtype) for name, one in tensors.items()})
    found = read_adapter(plain).tensors
    for name, one in load_file(plain / TENSORS).items():
        assert np.array_equal(found.pop(name).astype("f8"), one.double().numpy()), name
    assert not found


ODD = [  # ranks, alphas and patterns that PEFT takes
    {"r": 3, "lora_alpha": 7},
    {"r": 5, "lora_alpha": 0.5, "use_rslora": True},
    {"rank_pattern": {"layers.1.mlp.up_proj": 1, "up_proj": 2}, "alpha_pattern": {"proj": 2}},
    {"rank_pattern": {r"layers\.[01]\.mlp\..*": 2}, "alpha_pattern": {r".*\.mlp\..*": 9}},
    {"alpha_pattern": {"^model.layers.1.mlp.up_proj": 1}, "use_rslora": True},
    {"target_modules": r".*\.(q|o|up)_proj", "rank_pattern": {"q_proj|o_proj": 1}},
    {"target_modules": "all-linear", "alpha_pattern": {"1.self_attn.v_proj": 5}},
    {"r": 8, "lora_alpha": 8},  # PEFT's defaults, which a file need not name
]
OF_WRAPPER = [
    {"rank_pattern": {"model.language_model.layers.0.mlp.up_proj": 2}},
    {"alpha_pattern": {r"language_model\.layers\.1\..*": 3, "layers.0.mlp.up_proj": 64}},
]


@pytest.mark.parametrize("config", ODD + OF_WRAPPER)
def test_rank_and_scaling_are_those_that_peft_gives_each_module(config, tmp_path, base, info):
    model = base
    if config in OF_WRAPPER:
        model = AutoModelForImageTextToText.from_pretrained(TOY, dtype=torch.float32)
    folder = save_adapter(tmp_path / "adapter", model, **config)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    if config.get("r") == 8:
        change_config(folder, r=None, lora_alpha=None)
    rows = {row["path"]: row for row in info(folder)["modules"]}
    layers = toys.layers_of(loaded)
    assert rows.keys() == layers.keys() and rows
    for path, one in layers.items():
        expected = (one.r["default"], pytest.approx(one.scaling["default"]))
        assert (rows[path]["r"], rows[path]["scaling"]) == expected


NAME = LAYER.format(1, "up", "B")
OTHER = LAYER.format(1, "up", "A")
TWICE = [name.replace(".layers", ".language_model.layers") for name in (NAME, OTHER)]
CHANGES = {  # fault: what is done to the tensors of a file, and what is named
    "NaN": (lambda file: file | {NAME: file[NAME] + float("inf")}, "layers.1.mlp.up_proj"),
    "zero": (lambda file: {key: one * ("lora_A" in key) for key, one in file.items()}, "proj"),
    "unpaired": (lambda file: {key: one for key, one in file.items() if key != NAME}, OTHER),
    "doubled": (lambda file: file | {TWICE[0]: file[NAME], TWICE[1]: file[OTHER]}, "1.mlp.up_proj"),
    "no-LoRA": (lambda file: {f"unet_{n}": one for n, one in enumerate(file.values())}, "unet_0"),
}


@pytest.mark.parametrize("fault", CHANGES)
def test_tensors_that_make_it_useless_or_wrong_are_named(plain, info, fault):
    change, key = CHANGES[fault]
    (found,) = info(change_tensors(plain, change))["faults"]
    assert found.startswith(f"{fault}:") and key in found


WRONG_CONFIGS = [
    ({"rank_pattern": {"1.mlp.up_proj": 2}}, "rank", "layers.1.mlp.up_proj"),
    ({"r": 8}, "rank", "proj"), ({"init_lora_weights": "OLoRA"}, "init_lora_weights", "olora"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights", "loftq"),  # needs bitsandbytes
]  # fmt: skip


@pytest.mark.parametrize(("config", "fault", "key"), WRONG_CONFIGS)
def test_a_configuration_that_makes_it_wrong_is_named(copied, info, config, fault, key):
    (found,) = info(copied(**config))["faults"]
    assert found.startswith(f"{fault}:") and key in found


BY_PEFT = {  # initialisations, and what PEFT must have before
    "pissa": {}, "pissa_niter_2": {}, "olora": {}, "corda": {"corda_config": CordaConfig()},
    "lora_ga": {"lora_ga_config": peft.LoraGAConfig()}, "eva": {"eva_config": peft.EvaConfig()},
    "mica": {}, "orthogonal": {}, "gaussian": {},
}  # fmt: skip


@pytest.mark.parametrize("start", BY_PEFT)
def test_a_start_is_a_fault_if_peft_changes_the_bases_weights_for_it(start, plain, info):
    network = copy.deepcopy(toys.base_model())
    config = peft.LoraConfig(
        r=4, target_modules=["up_proj"], init_lora_weights=start, **BY_PEFT[start]
    )
    rows = {"input_ids": torch.arange(2, 50)[None], "attention_mask": torch.ones(1, 48).long()}
    if start == "corda":
        preprocess_corda(network, config, run_model=lambda: network(**rows))
    if start == "lora_ga":
        step = lambda: network(**rows, labels=rows["input_ids"]).loss.backward()  # noqa: E731
        preprocess_loraga(network, config, step)
    model = peft.get_peft_model(network, config)
    if start == "eva":
        peft.initialize_lora_eva_weights(model, [rows] * 4, show_progress_bar=False)
    before = toys.base_model().state_dict()
    is_changed = [
        not layer.get_base_layer().weight.equal(before[f"{path}.weight"])
        for path, layer in toys.layers_of(model).items()
    ]
    assert is_changed and len(set(is_changed)) == 1
    faults = info(change_config(plain, init_lora_weights=start))["faults"]
    assert bool(faults) is is_changed[0]


TOLD = [  # an adapter, what is changed in its configuration, and the fact with its words
    ("dora", {}, "more", "use_dora"), ("whole", {}, "more", "modules_to_save"),
    ("plain", {"bias": "all"}, "more", "bias"),
    ("plain", {"target_modules": ["up_proj", "v_prj"]}, "unused", "v_prj"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "fact", "key"), TOLD)
def test_what_is_not_as_it_looks_is_told(copied, info, kind, config, fact, key):
    facts = info(copied(kind, **config))["facts"]
    assert facts.keys() == {fact} and key in facts[fact]


def test_updates_that_are_zero_are_told(plain, info):
    assert info(plain)["facts"] == {}
    facts = info(change_tensors(plain, lambda file: file | {NAME: 0 * file[NAME]}))["facts"]
    assert "1.mlp.up" in facts["zero"]


NAMES = [  # the adapter's names, the base, a version, and whether it applies them
    ("plain", "Qwen3.5", "0.32", False), ("plain", "Qwen3.5", "0.33", True),
    ("plain", "Qwen3.5", "0.17", False), ("plain", "Qwen3.5", "0.99", True),
    ("plain", "Qwen3.5", "0.5", False), ("wrapper", "Qwen3.5", "0.17", True),
    ("wrapper", "Qwen3.5", "0.5", None), ("wrapper", "Llama", "0.33", False),
    ("wrapper", "Llama", "0.99", None), ("plain", "Llama", "0.17", True),
    ("plain", "Gemma 3", "0.32", False), ("plain", "Gemma 3n", "0.32", None),
    ("plain", "Gemma 3n", "0.33", True), ("wrapper", "Gemma 3n", "0.32", True),
    ("plain", "Qwen2-VL", "0.17", True), ("wrapper", "Qwen2-VL", "0.17", True),
    ("plain", "InternVL", "0.32", None), ("plain", "InternVL", "0.33", True),
    ("wrapper", "InternVL", "0.32", True), ("plain", "of no known kind", "0.33", None),
    ("plain", "not here", "0.33", None),
]  # fmt: skip
CONFIGS = {  # what tells of each base that it takes images, as the hub has it
    "Qwen2-VL": {"model_type": "qwen2_vl", "hidden_size": 8, "vision_config": {"depth": 2}},
    "InternVL": {"model_type": "internvl_chat", "llm_config": {"hidden_size": 8}},
    "of no known kind": {"model_type": "phi3_v", "hidden_size": 8, "img_processor": {"name": ""}},
}


def base_of(name, folder):
    """Return the path of a base, of which only config.json matters."""
    made = {"Llama": lambda: toys.family("Llama"), "Gemma 3": lambda: toys.wrapper("Gemma3")}
    made["Gemma 3n"] = lambda: toys.wrapper("Gemma3n")
    if name in CONFIGS:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    if name in made:
        toys.model_of(made[name](), folder)
    return TOY if name == "Qwen3.5" else str(folder)


@pytest.mark.parametrize(("kind", "base", "version", "applies"), NAMES)
def test_whether_vllm_applies_the_names_depends_on_base_and_version(
    adapters, tmp_path, capfd, kind, base, version, applies
):
    words = ["info", adapters[kind], "--base", base_of(base, tmp_path / "base")]
    end = command(capfd, [*words, "--for", f"vllm=={version}.1", "--json"], main)
    found = json.loads(end.out)
    assert (found["applies"], found["vllm"]) == (applies, version)
    assert end.status == (0 if applies else 1)


def test_the_version_is_the_newest_that_was_read_or_the_installed_one(plain, info, monkeypatch):
    assert info(plain)["vllm"] == "0.33"
    real = metadata.version
    version = lambda name: "0.20.1" if name == "vllm" else real(name)  # noqa: E731
    monkeypatch.setattr(metadata, "version", version)
    assert info(plain)["vllm"] == "0.20"


@pytest.mark.parametrize(
    ("config", "is_applied"),
    [({"alpha_pattern": {"up_proj": 3}}, False), ({"rank_pattern": {"up_proj": 2}}, False),
     ({"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 4}}, True),
     ({"use_rslora": True}, True)],
    ids=str,
)  # fmt: skip
def test_patterns_are_applied_from_0_32_on(tmp_path, capfd, config, is_applied):
    """Before, each update is scaled by the common alpha / r."""
    base = base_of("Llama", tmp_path / "base")
    words = ["info", save_adapter(tmp_path / "adapter", **config), "--base", base, "--for"]
    assert command(capfd, [*words, "vllm==0.31"], main).status == (0 if is_applied else 1)
    assert command(capfd, [*words, "vllm==0.32"], main).status == 0


OF_CONFIG = ("tokenizer_config.json", json.dumps({"chat_template": "another"}))  # of older versions


@pytest.mark.parametrize(("name", "text"), [("chat_template.jinja", "another"), OF_CONFIG])
def test_a_template_that_is_not_the_bases_is_told(plain, info, name, text):
    shutil.copy(f"{TOY}/chat_template.jinja", plain)
    assert "template" not in info(plain)["facts"]
    (plain / "chat_template.jinja").unlink()
    (plain / name).write_text(text)
    assert "template" in info(plain)["facts"]
    assert "template" not in info(plain, "--base", "not/here")["facts"]


@pytest.mark.filterwarnings("ignore")
def test_lora_on_experts_has_the_size_that_peft_gives_it(tmp_path, info):
    """A and B of all experts stand in one tensor each."""
    base = toys.model_of(
        toys.family("Qwen3Moe", **toys.EXPERTS), tmp_path / "moe", has_weights=True
    )
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = AutoModelForCausalLM.from_pretrained(base)
    folder = save_adapter(
        tmp_path / "adapter", model, target_modules=["q_proj"], target_parameters=targets
    )
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    expected = [
        layer.get_delta_weight("default").double().norm().item()
        for layer in toys.layers_of(loaded).values()
    ]
    found = info(folder)
    sizes = [module["norm"] for module in found["modules"]]
    assert len(expected) == 2 * 3 and sorted(sizes) == pytest.approx(sorted(expected), rel=1e-5)
    assert all(1 <= module["directions_for_90"] <= 4 for module in found["modules"])


@pytest.mark.parametrize(
    ("names", "status"),
    [(["plain"], 0), (["plain", "wrong"], 1), (["wrong", "nowhere", "plain"], 2)],
)
def test_of_several_adapters_the_status_is_the_highest(adapters, copied, capfd, names, status):
    folders = {"plain": adapters["plain"], "wrong": copied(r=2), "nowhere": "nowhere"}
    end = command(capfd, ["info", *(folders[name] for name in names)], main)
    assert end.status == status and ("nowhere" in end.err) is ("nowhere" in names)
    shown = re.findall("^adapter ", end.out, re.MULTILINE)
    assert len(shown) == len({*names} - {"nowhere"})


REFUSED = [  # by vLLM 0.32: PEFTHelper._validate_features and validate_legal
    {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"modules_to_save": ["norm"]},
    {"alora_invocation_tokens": [1, 2]}, {"layer_replication": [[0, 1], [0, 1]]},
    {"use_qalora": True}, {"use_bdlora": {"nblocks": 2}}, {"rank_pattern": {"nowhere": 600}},
]  # fmt: skip


@pytest.mark.parametrize("config", REFUSED, ids=lambda config: next(iter(config)))
def test_what_vllm_refuses_is_not_said_to_be_applied(copied, capfd, info, config):
    """Each of these has names that vLLM would apply."""
    folder = copied("wrapper", **config)
    assert info(folder)["applies"] is False
    end = command(capfd, ["info", folder, "--for", "vllm"], main)
    key = next(iter(config))
    assert end.status == 1 and (key if key != "rank_pattern" else "600") in end.out


@pytest.mark.parametrize("config", [{"init_lora_weights": "pissa"}, {"r": 2}], ids=str)
def test_a_faulty_adapter_is_not_said_to_be_applied(copied, info, config):
    assert info(copied("wrapper", **config))["applies"] is None


@pytest.mark.parametrize(
    ("name", "applies"), [("some/Model-4B", True), ("some/Model-4B-AWQ", True), ("other/M", None)]
)
def test_a_base_in_the_cache_of_the_hub_is_known(
    copied, tmp_path, monkeypatch, info, name, applies
):
    """Also the original of a quantized copy."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--some--Model-4B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copy(f"{TOY}/config.json", snapshot)
    assert info(copied(base_model_name_or_path=name))["applies"] is applies


QUANTIZED = {
    "unsloth/Qwen3-8B-unsloth-bnb-4bit": "unsloth/Qwen3-8B", "a/B-GPTQ-Int4": "a/B",
    "a/B-AWQ": "a/B", "a/B-FP8": "a/B", "models/b-nf4": "models/b",
}  # fmt: skip
WHOLE = ["Qwen/Qwen3.5-4B", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/B-4B-Instruct-2507"]


def test_the_original_of_a_quantized_base_is_known_by_the_name():
    assert {base: original_of(base) for base in QUANTIZED} == QUANTIZED
    assert [original_of(base) for base in WHOLE] == WHOLE
