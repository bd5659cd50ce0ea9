"""export: what is written has the logits of weights merged by hand, by NumPy and PEFT."""

import copy
import functools
import json
import re
import shlex
import warnings

import peft
import pytest
import safetensors.torch
import torch
import toys
import transformers
from conftest import TOY
from peft.tuners.lora.layer import Linear
from records import done
from runs import refused
from safetensors.torch import load_file
from toys import CONFIG, PREFIX, TENSORS, change_config, change_tensors, save_adapter
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from inspect_lora import vllm
from inspect_lora.__main__ import main

MERGE = ["--merge", "--device", "cpu"]


@pytest.fixture
def export(capfd):
    return functools.partial(done, capfd, "export")


@pytest.fixture
def not_exported(capfd, tmp_path):
    """Return what gives the command, which must be refused, name a key and leave nothing."""

    def run(adapter, *flags, key=""):
        before = set(tmp_path.iterdir())
        refused(capfd, ["export", adapter, tmp_path / "new", *flags], key, main=main)
        assert set(tmp_path.iterdir()) == before

    return run


def loaded(folder):
    """Return the toy with an adapter that PEFT alone loads, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of tensors and patterns without a place
        return peft.PeftModel.from_pretrained(copy.deepcopy(toys.base_model()), folder).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(2, 50)[None]).logits


def logits_by_hand(folder, scale):
    """Return the logits with PEFT's updates scaled and merged into W."""
    model = copy.deepcopy(toys.base_model())
    for path, layer in toys.layers_of(loaded(folder)).items():
        model.get_submodule(path).weight.data += scale * layer.get_delta_weight("default")
    return logits(model)


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True, "alpha_pattern": {"up_proj": 3}},
    "patterns": {
        "rank_pattern": {"o_proj": 1, "layers.0.mlp.up_proj": 3},
        "alpha_pattern": {r"layers\.[01]\.mlp\.down_proj": 3},
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_weaker_copy_has_the_logits_of_weights_merged_by_hand(variant, export, tmp_path, dtype):
    """By lora_alpha alone: the tensors and their type stay."""
    folder, new = save_adapter(tmp_path / "adapter", **VARIANTS[variant]), tmp_path / "new"
    change_tensors(folder, lambda own: {name: one.to(dtype) for name, one in own.items()})
    export(folder, new, "--scale", 0.75)
    expected = logits_by_hand(folder, 0.75)
    assert (expected - logits(loaded(folder))).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded(new)), expected, atol=1e-4, rtol=1e-4)
    before, after = (load_file(each / TENSORS) for each in (folder, new))
    assert before.keys() == after.keys()
    assert all(after[name].dtype == dtype and after[name].equal(before[name]) for name in before)


@pytest.mark.parametrize("kind", ["rslora", "wrapper"])
def test_vllm_gets_the_same_updates_under_its_names(adapters, copied, export, tmp_path, kind):
    """Patterns go along, and no vision tower that was not trained, which Unsloth saves."""
    targets = r".*\.([qo]_proj|in_proj_qkv|out_proj|(up|down)_proj|qkv)"
    folder = copied(kind, target_modules=targets)
    vision = f"{PREFIX}model.visual.blocks.0.qkv.lora_"
    expected = load_file(folder / TENSORS)
    zeros = {f"{vision}A.weight": torch.ones(4, 16), f"{vision}B.weight": torch.zeros(48, 4)}
    export(change_tensors(folder, lambda own: own | zeros), tmp_path / "new", "--vllm")
    found = load_file(tmp_path / "new" / TENSORS)
    text, both = ".model.model.layers.", ".model.model.language_model.layers."
    assert len(found) == len(expected) and all(both in name for name in found)
    assert all(found[name.replace(text, both)].equal(one) for name, one in expected.items())
    model = AutoModelForImageTextToText.from_pretrained(TOY, dtype=torch.float32)
    there = toys.layers_of(peft.PeftModel.from_pretrained(model, tmp_path / "new"))
    here = toys.layers_of(loaded(adapters["rslora" if kind == "rslora" else "plain"]))
    inside = {path.replace("model.", "model.language_model.", 1): path for path in here}
    assert there.keys() == inside.keys()
    for path, own in inside.items():
        assert there[path].scaling == here[own].scaling and there[path].r == here[own].r


@pytest.mark.parametrize(("version", "is_served"), [((0, 32), False), ((0, 33), True)])
def test_no_command_serves_names_that_vllm_ignores(
    plain, export, tmp_path, monkeypatch, version, is_served
):
    monkeypatch.setattr(vllm, "default_version", lambda: version)
    assert ("vllm serve" in export(plain, tmp_path / "new", "--scale", 2)) is is_served


def test_names_for_vllm_are_not_written_for_a_text_model(plain, not_exported, tmp_path):
    text = toys.model_of(toys.family("Llama"), tmp_path / "llama")
    not_exported(change_config(plain, base_model_name_or_path=text), "--vllm", key="--vllm")


SERVED = [  # of the training, of the command, and what the serving command must and must not have
    ({}, [], ["--revision", "abc"], ["--chat-template"]),
    ({}, ["--base", TOY], [TOY], ["--revision"]),
    ({}, ["--enable_thinking", "--chat_template", "own.jinja"], ["own.jinja"], []),
    ({"CHAT_TEMPLATE": "one_pass", "ENABLE_THINKING": True}, [], ["new/chat_template.jinja"], []),
]


@pytest.mark.parametrize(("settings", "flags", "there", "not_there"), SERVED)
def test_it_is_served_as_it_was_trained_or_as_asked_for(
    plain, export, tmp_path, monkeypatch, settings, flags, there, not_there
):
    (change_config(plain, revision="abc") / "chat_template.jinja").write_text("another one")
    (plain / "run.json").write_text(json.dumps({"settings": settings}))
    monkeypatch.chdir(tmp_path)
    (line,) = [row for row in export(plain, "new", "--vllm", *flags).splitlines() if "serve" in row]
    words = shlex.split(line)
    assert {"vllm", "adapter=new", *there} <= {*words} and not {*words}.intersection(not_there)
    thinks = "--enable_thinking" in flags or "ENABLE_THINKING" in settings
    assert json.dumps({"enable_thinking": thinks}) in words


def test_the_tokenizer_and_where_it_comes_from_go_along(plain, export, tmp_path):
    along = ["tokenizer.json", "chat_template.jinja", "learned.txt", "run.json"]
    for name in (*along, "optimizer.pt", "README.md"):
        (plain / name).write_text(f"{name} of the adapter")
    export(plain, tmp_path / "new", "--scale", 2)
    found = {path.name: path for path in (tmp_path / "new").iterdir()}
    assert found.keys() == {CONFIG, TENSORS, *along}
    assert all(found[name].read_text() == f"{name} of the adapter" for name in along)
    assert found[TENSORS].stat().st_mode == found[CONFIG].stat().st_mode  # others can serve it


UNKNOWN = {"base_model_name_or_path": "someone/not-on-this-machine-bnb-4bit"}
REFUSED = [  # an adapter, what is changed in its configuration, the flags, and what is named
    ("dora", {}, ["--scale", "0.5"], "use_dora"), ("plain", {"r": 2}, ["--vllm"], "rank"),
    ("plain", UNKNOWN, ["--vllm"], "--base"),  # the names may be wrong, which vLLM would not tell
    ("plain", {}, ["--scale", "75"], "--scale"), ("plain", {}, ["--scale", "nan"], "--scale"),
    ("plain", {}, [*MERGE, "--scale", "2"], "--scale"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "config", "flags", "key"), REFUSED)
def test_what_cannot_be_written_is_refused(copied, not_exported, kind, config, flags, key):
    not_exported(copied(kind, **config), *flags, key=key)


@pytest.mark.parametrize("place", [".", CONFIG, f"{CONFIG}/new"])
def test_nothing_is_overwritten_which_is_told_before_the_base_is_read(plain, capfd, place):
    before = {path: path.stat().st_mtime_ns for path in plain.parent.rglob("*")}
    words = ["export", plain, plain / place, *MERGE, "--base", "/nowhere"]
    assert "/nowhere" not in refused(capfd, words, str(plain), main=main).err
    assert {path: path.stat().st_mtime_ns for path in plain.parent.rglob("*")} == before


def test_what_was_not_written_as_asked_is_not_left_there(plain, not_exported, monkeypatch):
    save_file = safetensors.torch.save_file

    def lossy(tensors, *given):
        name = next(name for name in tensors if "lora_B" in name)
        save_file(tensors | {name: tensors[name] * 1.01}, *given)

    monkeypatch.setattr("safetensors.torch.save_file", lossy)
    not_exported(plain, "--scale", "2", key="proj")


@pytest.mark.parametrize("kind", ["rslora", "dora", "whole", "wrapper"])
def test_a_merged_model_has_the_logits_of_the_adapter_on_its_base(
    adapters, export, tmp_path, kind, tokenizer
):
    folder = tmp_path / "a merged one"
    before = {path.name: path.read_bytes() for path in adapters[kind].iterdir()}
    out = export(adapters[kind], folder, *MERGE)
    assert {path.name: path.read_bytes() for path in adapters[kind].iterdir()} == before
    assert f"'{folder}'" in out  # quoted, as a command
    merged = AutoModelForCausalLM.from_pretrained(folder).eval()
    on_base = adapters["plain"] if kind == "wrapper" else adapters[kind]  # with PEFT's names
    torch.testing.assert_close(logits(merged), logits(loaded(on_base)), atol=1e-4, rtol=0)
    assert logits(merged).sub(logits(toys.base_model())).abs().max() > 0.01
    again = AutoTokenizer.from_pretrained(folder)
    assert again.chat_template == tokenizer.chat_template and "lora" not in str(merged).lower()
    assert tokenizer.eos_token_id in merged.generation_config.eos_token_id


def test_a_small_adapter_is_merged_in_bfloat16_and_rounded_once(export, tmp_path):
    """Rounding takes more than half of what it changes, which is told and not called wrong."""
    folder = save_adapter(tmp_path / "adapter", std=1e-4)
    out = export(folder, tmp_path / "new", *MERGE, "--dtype", "bfloat16")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "new").state_dict()
    layers = toys.layers_of(loaded(folder))
    for name, weight in toys.base_model().state_dict().items():
        layer = layers.get(name.removesuffix(".weight"))
        update = layer.get_delta_weight("default").double() if layer else 0
        exact = weight.double() + update
        assert found[name].dtype == torch.bfloat16
        assert ((found[name].double() - exact).abs() <= 2.0**-8 * exact.abs()).all(), name
        assert not layer or (found[name] != weight.bfloat16()).any(), name
    assert float(re.search(r"to bfloat16 moves the logits by (\S+) %", out)[1]) > 50


def lossy_save(model, *given, real=transformers.PreTrainedModel.save_pretrained, **more):
    other = copy.deepcopy(model)
    other.model.norm.weight.data *= 1.01
    real(other, *given, **more)


def half_an_update(layer, adapter, real=Linear.get_delta_weight):
    return 0.5 * real(layer, adapter)


def no_update_of_down_proj(layer, adapter, real=Linear.get_delta_weight):
    return (layer.in_features <= layer.out_features) * real(layer, adapter)


WRONGLY_MERGED = [  # how large the adapter is, and what goes wrong
    (1e-4, Linear, "get_delta_weight", half_an_update),
    (1e-4, Linear, "get_delta_weight", no_update_of_down_proj),
    (0.05, Linear, "get_delta_weight", no_update_of_down_proj),
    (0.05, transformers.PreTrainedModel, "save_pretrained", lossy_save),
]


@pytest.mark.parametrize(("std", "owner", "name", "wrong"), WRONGLY_MERGED)
def test_a_merged_model_that_is_another_one_is_not_left_there(
    not_exported, tmp_path, monkeypatch, std, owner, name, wrong
):
    """However small the adapter is, and in bfloat16."""
    folder = save_adapter(tmp_path / "adapter", std=std)
    monkeypatch.setattr(owner, name, wrong)
    not_exported(folder, *MERGE, "--dtype", "bfloat16")


def test_a_head_that_shares_the_embeddings_weight_is_not_merged(not_exported, tmp_path):
    """The embedding would get the head's update, too."""
    folder = save_adapter(tmp_path / "adapter", target_modules=["lm_head", "down_proj"])
    not_exported(folder, *MERGE, key="embedding's")
