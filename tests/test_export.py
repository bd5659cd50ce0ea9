"""export: what is written has the logits of weights merged by hand, by NumPy and PEFT."""

import copy
import functools
import json
import re
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
from runs import refused, run
from safetensors.torch import load_file
from toys import CONFIG, PREFIX, TENSORS, change_config, change_tensors, save_adapter
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from inspect_lora import export as exporting
from inspect_lora import vllm
from inspect_lora.__main__ import main

RANKS = {"o_proj": 1, "layers.0.mlp.up_proj": 3}
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True, "alpha_pattern": {"up_proj": 3}},
    "patterns": {"rank_pattern": RANKS, "alpha_pattern": {r"layers\.[01]\.mlp\.down_proj": 3}},
}


@pytest.fixture
def export(capfd):
    return functools.partial(done, capfd, "export")


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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [0.75, 1.5])
def test_it_has_the_logits_of_weights_merged_by_hand(variant, export, tmp_path, scale):
    variant, new = save_adapter(tmp_path / "adapter", **VARIANTS[variant]), tmp_path / "new"
    export(variant, new, "--scale", scale)
    expected = logits_by_hand(variant, scale)
    assert (expected - logits(loaded(variant))).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded(new)), expected, atol=1e-4, rtol=1e-4)
    before, after = (load_file(folder / TENSORS) for folder in (variant, new))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "new"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_of_the_file_is_kept(plain, export, tmp_path, dtype):
    change_tensors(plain, lambda own: {name: one.to(dtype) for name, one in own.items()})
    export(plain, tmp_path / "new", "--scale", 0.75)
    before, after = (load_file(folder / TENSORS) for folder in (plain, tmp_path / "new"))
    assert {one.dtype for one in after.values()} == {dtype}
    assert all(before[name].equal(after[name]) for name in before)


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


def test_no_command_serves_names_that_vllm_ignores(plain, export, capfd, tmp_path, monkeypatch):
    assert "vllm serve" in export(plain, tmp_path / "1", "--scale", 2)
    monkeypatch.setattr(vllm, "default_version", lambda: (0, 32))
    assert "vllm serve" not in export(plain, tmp_path / "new", "--scale", 2)
    assert f"vllm serve {TOY}" in export(plain, tmp_path / "2", "--scale", 2, "--vllm")
    text = toys.model_of(toys.family("Llama"), tmp_path / "llama")
    change_config(plain, base_model_name_or_path=text)
    refused(capfd, ["export", plain, tmp_path / "3", "--vllm"], "--vllm", main=main)
    assert f"vllm serve {text} " in export(plain, tmp_path / "3", "--scale", 2)


def test_the_serving_command_is_for_what_was_trained_or_is_asked_for(export, tmp_path):
    plain = save_adapter(tmp_path / "adapter", r=9)
    change_config(plain, revision="abc")
    said = export(plain, tmp_path / "new", "--vllm")
    words = [f"vllm serve {TOY} --revision abc", "--max-lora-rank 16", f"={tmp_path / 'new'}"]
    words.append("""'{"enable_thinking": false}'""")
    assert [word for word in words if word not in said] == []
    flags = ["--base", TOY, "--enable_thinking", "--chat_template", "own.jinja"]
    said = export(plain, tmp_path / "2", "--vllm", *flags)
    assert f"vllm serve {TOY} --enable-lora" in said and "--chat-template own.jinja " in said
    assert """'{"enable_thinking": true}'""" in said
    (plain / "chat_template.jinja").write_text("another one")
    trained = {"CHAT_TEMPLATE": "one_pass", "ENABLE_THINKING": True}
    (plain / "run.json").write_text(json.dumps({"settings": trained}))
    said = export(plain, tmp_path / "3", "--vllm")
    assert f"--chat-template {tmp_path / '3' / 'chat_template.jinja'} " in said
    assert """'{"enable_thinking": true}'""" in said
    for r, served in {1: 1, 2: 8, 129: 256, 257: 320, 321: 512}.items():  # which vLLM takes
        said = export(save_adapter(tmp_path / f"{r}", r=r), tmp_path / f"new {r}", "--vllm")
        assert f"--max-lora-rank {served} " in said


def test_names_for_vllm_need_a_known_base(plain, export, capfd, tmp_path):
    """Of an unknown base they may be wrong, which vLLM would not tell."""
    change_config(plain, base_model_name_or_path="someone/not-on-this-machine-bnb-4bit")
    words = ["export", plain, tmp_path / "new", "--vllm"]
    refused(capfd, words, "--base", main=main)
    assert not (tmp_path / "new").exists()
    assert f"vllm serve {TOY} " in export(plain, tmp_path / "new", "--vllm", "--base", TOY)


def test_the_tokenizer_and_where_it_comes_from_go_along(plain, export, tmp_path):
    along = ["tokenizer.json", "chat_template.jinja", "learned.txt", "run.json"]
    for name in (*along, "optimizer.pt", "README.md"):
        (plain / name).write_text(f"{name} of the adapter")
    export(plain, tmp_path / "new", "--scale", 2)
    found = {path.name: path for path in (tmp_path / "new").iterdir()}
    assert found.keys() == {CONFIG, TENSORS, *along}
    assert all(found[name].read_text() == f"{name} of the adapter" for name in along)
    assert found[TENSORS].stat().st_mode == found[CONFIG].stat().st_mode  # others can serve it


@pytest.mark.parametrize(
    ("kind", "change", "key"),
    [
        ("dora", {}, "use_dora"), ("whole", {}, "modules_to_save"), ("plain", {"r": 2}, "rank"),
        ("plain", {"bias": "all"}, "bias"),
    ],
)  # fmt: skip
def test_what_is_more_or_damaged_is_refused(copied, capfd, tmp_path, kind, change, key):
    folder = copied(kind, **change)
    for flags in (["--scale", "0.5"], ["--vllm"]):
        refused(capfd, ["export", folder, tmp_path / "new", *flags], key, main=main)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_empty_is_told_before_the_base_is_read(plain, capfd, tmp_path):
    words = ["export", plain, plain, "--merge", "--base", "/nowhere", "--device", "cpu"]
    assert "/nowhere" not in refused(capfd, words, str(plain), main=main).err


def test_an_error_of_a_library_is_not_taken_for_a_full_folder(plain, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("Can't load the model")

    monkeypatch.setattr(exporting, "merge", fail)
    assert run(["export", plain, tmp_path / "new", "--merge"], main) == 1  # its own traceback


def test_nothing_is_overwritten(plain, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in plain.rglob("*")}
    for path in (plain, plain / CONFIG, plain / CONFIG / "new", "."):
        refused(capfd, ["export", plain, path, "--scale", "2"], str(path), main=main)
    for scale in ("0", "11", "nan"):
        refused(capfd, ["export", plain, "new", "--scale", scale], "--scale", main=main)
    assert {path: path.stat().st_mtime_ns for path in plain.rglob("*")} == before
    assert [*tmp_path.iterdir()] == [plain]


def test_what_was_not_written_as_asked_is_not_left_there(plain, capfd, tmp_path, monkeypatch):
    save_file = safetensors.torch.save_file

    def lossy(tensors, *given):
        name = next(name for name in tensors if "lora_B" in name)
        save_file(tensors | {name: tensors[name] * 1.01}, *given)

    monkeypatch.setattr("safetensors.torch.save_file", lossy)
    refused(capfd, ["export", plain, tmp_path / "new", "--scale", "2"], "proj", main=main)
    assert [*tmp_path.iterdir()] == [plain]


MERGED = ("plain", "rslora", "dora", "whole", "wrapper")


@pytest.mark.parametrize("kind", MERGED)
def test_a_merged_model_has_the_logits_of_the_adapter_on_its_base(
    adapters, export, tmp_path, kind, tokenizer
):
    folder = tmp_path / "a merged one"
    before = {path.name: path.read_bytes() for path in adapters[kind].iterdir()}
    out = export(adapters[kind], folder, "--merge", "--device", "cpu")
    assert {path.name: path.read_bytes() for path in adapters[kind].iterdir()} == before
    assert f"'{folder}'" in out  # quoted, as a command
    merged = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer("Is it the rain that makes the garden grow?").input_ids])
    on_base = adapters["plain"] if kind == "wrapper" else adapters[kind]  # with PEFT's names
    with torch.no_grad():
        logits = loaded(on_base)(ids).logits
        assert merged(ids).logits.sub(logits).abs().max() < 1e-4
        assert merged(ids).logits.sub(toys.base_model()(ids).logits).abs().max() > 0.01
    again = AutoTokenizer.from_pretrained(folder)
    assert again.chat_template == tokenizer.chat_template and "lora" not in str(merged).lower()
    assert tokenizer.eos_token_id in merged.generation_config.eos_token_id


def test_a_small_adapter_is_merged_in_bfloat16_and_rounded_once(export, tmp_path):
    """Rounding takes more than half of what it changes, which is told and not called wrong."""
    folder = save_adapter(tmp_path / "adapter", std=1e-4)
    out = export(folder, tmp_path / "new", "--merge", "--device", "cpu", "--dtype", "bfloat16")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "new").state_dict()
    layers, before = toys.layers_of(loaded(folder)), toys.base_model().state_dict()
    changed = 0
    for name, weight in before.items():
        layer = layers.get(name.removesuffix(".weight"))
        update = layer.get_delta_weight("default").double() if layer else 0
        exact = weight.double() + update
        assert found[name].dtype == torch.bfloat16
        assert ((found[name].double() - exact).abs() <= 2.0**-8 * exact.abs()).all(), name
        changed += (found[name] != weight.bfloat16()).sum().item() if layer else 0
    assert changed > 100
    assert float(re.search(r"to bfloat16 moves the logits by (\S+) %", out)[1]) > 50


@pytest.mark.parametrize("std", [1e-4, 0.05])
@pytest.mark.parametrize("fault", ["half", "nothing", "one module", "another file"])
def test_a_merged_model_that_is_another_one_is_not_left_there(
    capfd, tmp_path, monkeypatch, fault, std
):
    """However small the adapter is, and in bfloat16."""
    plain = save_adapter(tmp_path / "adapter", std=std)
    save, delta = transformers.PreTrainedModel.save_pretrained, Linear.get_delta_weight
    calls = []

    def lossy(model, *given, **more):
        other = copy.deepcopy(model)
        other.model.norm.weight.data *= 1.01
        save(other, *given, **more)

    def wrong(layer, adapter):
        calls.append(layer)
        share = {"half": 0.5, "nothing": 0.0}.get(fault, float(len(calls) != 1))
        return share * delta(layer, adapter)

    if fault == "another file":
        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", lossy)
    else:
        monkeypatch.setattr(Linear, "get_delta_weight", wrong)
    words = ["export", plain, tmp_path / "new", "--merge", "--device", "cpu"]
    refused(capfd, [*words, "--dtype", "bfloat16"], main=main)
    assert [*tmp_path.iterdir()] == [plain] and (calls or fault == "another file")


def test_a_head_that_shares_the_embeddings_weight_is_not_merged(capfd, tmp_path):
    """The embedding would get the head's update, too."""
    folder = save_adapter(tmp_path / "adapter", target_modules=["lm_head", "down_proj"])
    words = ["export", folder, tmp_path / "new", "--merge", "--device", "cpu"]
    refused(capfd, words, "embedding's", main=main)
    refused(capfd, [*words, "--scale", "2"], "--scale", main=main)
    assert [*tmp_path.iterdir()] == [folder]
