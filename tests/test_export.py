"""export: a weaker, a smaller and a renamed adapter have the logits of weights merged by hand."""

import copy
import json
import re
import warnings

import numpy as np
import peft
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from tiny_adapters import (
    CONFIG,
    TENSORS,
    change_config,
    change_tensors,
    command,
    copied,
    llama,
    save_adapter,
)
from transformers import AutoConfig, AutoModelForCausalLM

IDS = torch.arange(2, 50)[None]
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"v_proj": 1, "layers.0.mlp.up_proj": 3},
        "alpha_pattern": {"layers.[67].self_attn.q_proj": 3},
    },
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    """Return an adapter, and its updates: {path of the module: scaling x B A}."""
    config = VARIANTS[request.param]
    folder = save_adapter(tmp_path_factory.mktemp(request.param) / "adapter", **config)
    model = loaded(folder)
    return folder, {
        path: module.get_delta_weight("default").double().numpy()
        for path, module in model.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the folder of a plain adapter. Tests must not change it."""
    return save_adapter(tmp_path_factory.mktemp("plain") / "adapter")


@pytest.fixture
def export(capsys):
    """Return a function that does the command, and gives its status and what it said."""
    return lambda *words: command(capsys, "export", *words)


def loaded(folder, model=None):
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # PEFT warns of tensors and patterns without a place
        return peft.PeftModel.from_pretrained(copy.deepcopy(model or llama()), folder).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def logits_by_hand(updates, scale, rank):
    """Return the logits with each update cut by NumPy's SVD, scaled, and merged into W."""
    model = copy.deepcopy(llama())
    for path, update in updates.items():
        u, s, v = np.linalg.svd(update, full_matrices=False)
        whole = scale * (u[:, :rank] * s[:rank]) @ v[:rank]
        model.get_submodule(path).weight.data += torch.tensor(whole, dtype=torch.float32)
    return logits(model)


@pytest.mark.parametrize(("scale", "rank"), [(0.75, None), (1, 2), (1, 1), (1.5, 2)])
def test_a_written_adapter_has_the_logits_of_weights_merged_by_hand(
    variant, export, tmp_path, scale, rank
):
    folder, updates = variant
    flags = ["--scale", scale, *(["--rank", rank] if rank else [])]
    end = export(folder, tmp_path / "new", *flags)
    assert end.status == 0, end.err
    expected = logits_by_hand(updates, scale, rank)
    assert (expected - logits(loaded(folder))).abs().max() > 1e-3
    torch.testing.assert_close(logits(loaded(tmp_path / "new")), expected, atol=1e-5, rtol=1e-4)
    assert "read again" in end.said and f"info {tmp_path / 'new'}" in end.said
    if rank:
        ranks = {one.shape[0] for name, one in load_file(tmp_path / "new" / TENSORS).items()
                 if "lora_A" in name}  # fmt: skip
        assert max(ranks) == rank and f"the strongest {rank} make up" in end.said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_the_share_that_is_kept_is_told(plain, export, tmp_path):
    end = export(plain, tmp_path / "new", "--rank", 2)
    tensors = load_file(plain / TENSORS)
    squares = [
        np.linalg.svd(tensors[name.replace("_A", "_B")].numpy() @ one.numpy())[1] ** 2
        for name, one in tensors.items()
        if "lora_A" in name
    ]
    kept = np.mean([one[:2].sum() / one.sum() for one in squares])
    assert f"of 4 directions the strongest 2 make up {100 * kept:.1f} %" in end.said


def test_the_tokenizer_goes_along_and_the_card_does_not(plain, export, tmp_path):
    folder = copied(plain, tmp_path / "adapter")
    for name in ("tokenizer.json", "chat_template.jinja", "optimizer.pt"):
        (folder / name).touch()
    (folder / "tokenizer").mkdir()  # a folder of somebody's, which is left there
    assert export(folder, tmp_path / "new", "--scale", 2).status == 0
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {CONFIG, TENSORS, "tokenizer.json", "chat_template.jinja"}
    modes = {(tmp_path / "new" / name).stat().st_mode for name in (CONFIG, TENSORS)}
    assert len(modes) == 1  # a server of another user can read it


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "is DoRA"),
        ({"modules_to_save": ["lm_head"]}, "holds 1 whole tensor besides LoRA (lm_head.weight"),
        ({"init_lora_weights": "pissa"}, "began with init_lora_weights = pissa"),
    ],
)
def test_what_cannot_be_scaled_or_cut_is_refused(export, tmp_path, config, said):
    folder = save_adapter(tmp_path / "adapter", **config)
    for flags in (["--scale", 0.5], ["--rank", 2]):
        end = export(folder, tmp_path / "new", *flags)
        assert end.status == 1 and "cannot be scaled, cut or renamed" in end.err
        assert said in end.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("config", "rename", "said"),
    [
        ({}, (".weight", ".default.weight"), "the names of a state_dict()"),
        ({"target_modules": ["q_proj", "v_proj"]}, ("", ""), "8 modules outside target_modules"),
        (
            {"kasa_config": {"beta": 1}, "exclude_modules": ["q_proj"]},
            ("", ""),
            "not understood here (kasa_config). It holds 8 modules outside target_modules",
        ),
    ],
)
def test_what_peft_or_others_would_not_find_is_not_written_anew(
    plain, export, tmp_path, config, rename, said
):
    folder = change_config(copied(plain, tmp_path / "adapter"), **config)
    change_tensors(folder, lambda tensors: {n.replace(*rename): t for n, t in tensors.items()})
    end = export(folder, tmp_path / "new", "--scale", 0.5)
    assert end.status == 1 and said in end.err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("dtype", "factor", "flags"),
    [
        (torch.float16, 30_000, ["--scale", 10]),
        (torch.float16, 1e-7, ["--scale", 0.01]),
        (torch.float8_e4m3fn, 1, ["--scale", 0.02]),
        (torch.float8_e4m3fn, 1, ["--rank", 2]),
    ],
)
def test_numbers_that_do_not_fit_the_type_of_the_file_are_told(
    plain, export, tmp_path, dtype, factor, flags
):
    def converted(tensors):
        return {n: (one * (factor if "_B" in n else 1)).to(dtype) for n, one in tensors.items()}

    folder = change_tensors(copied(plain, tmp_path / "adapter"), converted)
    end = export(folder, tmp_path / "new", *flags)
    assert end.status == 1 and "too large or too small for the type of the file" in end.err
    assert f"{dtype}, or lose too many digits" in end.err and "--scale" in end.err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_cut_and_weakened(plain, export, tmp_path, dtype):
    folder = copied(plain, tmp_path / "adapter")
    change_tensors(folder, lambda tensors: {n: one.to(dtype) for n, one in tensors.items()})
    end = export(folder, tmp_path / "new", "--scale", 0.5, "--rank", 2)
    assert end.status == 0, end.err
    assert {one.dtype for one in load_file(tmp_path / "new" / TENSORS).values()} == {dtype}


def test_a_rank_above_the_size_of_a_matrix_is_cut_to_it(export, tmp_path):
    folder = save_adapter(tmp_path / "adapter", r=32, target_modules=["q_proj", "up_proj"])
    assert export(folder, tmp_path / "new", "--rank", 20).status == 0
    torch.testing.assert_close(
        logits(loaded(tmp_path / "new")), logits(loaded(folder)), atol=1e-5, rtol=1e-4
    )


def test_damaged_adapters_are_refused(plain, export, tmp_path):
    def zero(tensors):
        return {n: one * (0 if "lora_B" in n else 1) for n, one in tensors.items()}

    def broken(tensors):
        next(iter(tensors.values()))[0, 0] = float("nan")

    for change, said in ((zero, "Every B is 0"), (broken, "There is NaN or infinity")):
        folder = change_tensors(copied(plain, tmp_path / change.__name__), change)
        assert said in export(folder, tmp_path / "new", "--scale", 2).err
    folder = change_config(copied(plain, tmp_path / "config"), r=2)
    assert "does not fit the configuration" in export(folder, tmp_path / "new", "--scale", 2).err


def test_the_working_folder_is_no_new_folder(plain, export, tmp_path, monkeypatch):
    """Renaming a folder onto it would leave the shell in one that is gone."""
    monkeypatch.chdir(tmp_path)
    end = export(plain, ".", "--scale", 2)
    assert end.status == 1 and "FOLDER is where you are; name a new folder" in end.err
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "Say what to write"),
        (["--scale", "0"], "--scale is 0"),
        (["--scale", "11"], "at most 10"),
        (["--rank", "0"], "--rank is 0"),
        (["--rank", "4"], "cuts nothing: the adapter's rank is 4"),
    ],
)
def test_what_asks_for_nothing_or_too_much_is_refused(plain, export, tmp_path, flags, said):
    end = export(plain, tmp_path / "new", *flags)
    assert end.status == 1 and said in end.err and not (tmp_path / "new").exists()


def test_the_folder_must_be_new(plain, export, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    for folder, what in ((tmp_path / "used", "not empty"), (tmp_path / "used/file", "a file")):
        assert f"{folder} is {what};" in export(plain, folder, "--scale", 2).err
    assert "in the adapter's own folder" in export(plain, plain / "new", "--scale", 2).err
    end = export(plain, tmp_path / "used" / "file" / "new", "--scale", 2)
    assert end.status == 1 and "cannot be written" in end.err
    (tmp_path / "empty").mkdir()
    assert export(plain, tmp_path / "empty", "--scale", 2).status == 0


def test_what_was_not_written_as_asked_is_not_left_there(plain, export, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    def lossy(tensors, *given):
        name = next(name for name in tensors if "lora_B" in name)
        save_file(tensors | {name: tensors[name] * 1.001}, *given)

    monkeypatch.setattr("inspect_lora.export.save_file", lossy)
    end = export(plain, tmp_path / "new", "--scale", 2)
    assert end.status == 1 and "not what was asked for in 1 module, such as" in end.err
    assert not any(tmp_path.iterdir())


# ---- Names for vLLM


@pytest.fixture(scope="module")
def of_wrapper(tmp_path_factory):
    """Return an adapter of the text part of a model that also takes images."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    patterns = {"alpha_pattern": {"model.layers.0.mlp.down_proj": 3}}
    targets = {"target_modules": ["down_proj", "out_proj"]}
    return save_adapter(tmp_path_factory.mktemp("tiny") / "adapter", model, **targets, **patterns)


def written_names(folder):
    return sorted(load_file(folder / TENSORS))


def test_vllm_gets_the_same_updates_under_the_wrappers_names(of_wrapper, export, tmp_path):
    end = export(of_wrapper, tmp_path / "new", "--vllm")
    assert end.status == 0, end.err
    before, after = load_file(of_wrapper / TENSORS), load_file(tmp_path / "new" / TENSORS)
    inside = {n.replace(".model.model.", ".model.model.language_model."): n for n in before}
    assert after.keys() == inside.keys()
    of_one = "layers.0.mlp.down_proj.lora_B"  # alpha 3 instead of 8: its B has the rest
    for name, old in inside.items():
        expected = before[old] * (3 / 8 if of_one in name else 1)
        torch.testing.assert_close(after[name], expected)
    config = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert config["alpha_pattern"] == {}
    assert "in the base model, under its new name" in end.said
    assert "--max-lora-rank 8" in end.said
    # The server is asked about the adapter whose evidence there may be, else about the new one.
    asked = r"served http://localhost:8000 (\S+) --name new "
    assert re.search(asked, end.said)[1] == str(of_wrapper)
    weaker = export(of_wrapper, tmp_path / "weaker" / "new", "--vllm", "--scale", "0.5")
    assert re.search(asked, weaker.said)[1] == str(tmp_path / "weaker" / "new")


def test_for_vllm_all_modules_have_one_scaling(export, tmp_path):
    """Up to some version it reads r and lora_alpha alone; PEFT reads the patterns, too."""
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    patterns = {
        "use_rslora": True,
        "target_modules": ["down_proj", "out_proj"],
        "rank_pattern": {"out_proj": 2, "layers.0.mlp.down_proj": 3},
        "alpha_pattern": {"layers.1.mlp.down_proj": 5},
    }
    folder = save_adapter(tmp_path / "adapter", base, **patterns)
    end = export(folder, tmp_path / "new", "--vllm")
    assert end.status == 0, end.err
    config = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert config["use_rslora"] is False and 3 in config["rank_pattern"].values()
    back = change_tensors(
        copied(tmp_path / "new", tmp_path / "back"),
        lambda tensors: {n.replace("language_model.", ""): one for n, one in tensors.items()},
    )
    for pattern in ("rank_pattern", "alpha_pattern"):
        renamed = {n.replace("language_model.", ""): one for n, one in config[pattern].items()}
        change_config(back, **{pattern: renamed})
    model = loaded(back, base)
    layers = [one for one in model.modules() if isinstance(one, peft.tuners.lora.LoraLayer)]
    common = config["lora_alpha"] / config["r"]
    assert [one.scaling["default"] for one in layers] == pytest.approx([common] * len(layers))
    assert len({one.r["default"] for one in layers}) == 3
    torch.testing.assert_close(logits(model), logits(loaded(folder, base)), atol=1e-5, rtol=1e-4)


def test_all_flags_together_and_a_tower_of_zeros(of_wrapper, export, tmp_path):
    def as_unsloth(tensors):
        name = "base_model.model.model.visual.blocks.0.attn.qkv"
        tensors[f"{name}.lora_A.weight"] = torch.ones(4, 16)
        tensors[f"{name}.lora_B.weight"] = torch.zeros(48, 4)

    folder = change_tensors(copied(of_wrapper, tmp_path / "unsloth"), as_unsloth)
    change_config(folder, target_modules=r".*(down_proj|out_proj|qkv)")
    end = export(folder, tmp_path / "new", "--vllm", "--scale", 0.5, "--rank", 2)
    assert end.status == 0 and "left out: 1 module whose update is 0" in end.said, end.err
    config = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert config["target_modules"] == ["down_proj", "out_proj"] and config["r"] == 2
    assert not any("visual" in name for name in written_names(tmp_path / "new"))
    # Under the text model's names again it is the same as without --vllm.
    assert export(of_wrapper, tmp_path / "plain", "--scale", 0.5, "--rank", 2).status == 0
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    back = change_tensors(
        copied(tmp_path / "new", tmp_path / "back"),
        lambda tensors: {n.replace("language_model.", ""): one for n, one in tensors.items()},
    )
    pattern = {n.replace("language_model.", ""): a for n, a in config["alpha_pattern"].items()}
    change_config(back, alpha_pattern=pattern)
    assert logits(loaded(back, base)).equal(logits(loaded(tmp_path / "plain", base)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: {n.replace("layers.0", "layers.9"): t for n, t in tensors.items()}, "9"),
        (lambda tensors: {n: t.repeat(1, 2) if "_A" in n else t for n, t in tensors.items()}, ""),
    ],
)
def test_what_has_no_place_in_the_base_is_not_written(of_wrapper, export, tmp_path, change, said):
    folder = change_tensors(copied(of_wrapper, tmp_path / "adapter"), change)
    end = export(folder, tmp_path / "new", "--vllm")
    assert end.status == 1 and "base" in end.err and said in end.err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_names_that_were_written_are_verified(of_wrapper, export, tmp_path, monkeypatch):
    monkeypatch.setattr("inspect_lora.export.NamesForVllm.new_name", lambda _, name: name)
    end = export(of_wrapper, tmp_path / "new", "--vllm")
    assert end.status == 1 and not any(tmp_path.iterdir())


def test_what_vllm_does_not_serve_is_refused(export, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32")
    folder = save_adapter(tmp_path / "dora", model, use_dora=True, target_modules=["down_proj"])
    assert "is DoRA" in export(folder, tmp_path / "new", "--vllm").err


def test_of_a_4_bit_base_the_configuration_is_enough(of_wrapper, export, tmp_path, monkeypatch):
    """As Unsloth records it; no weight of it is loaded, and vLLM serves that copy."""
    four_bits = AutoConfig.from_pretrained(TINY)
    four_bits.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    monkeypatch.setattr("inspect_lora.trainer.load_config", lambda *_: four_bits)
    folder = copied(of_wrapper, tmp_path / "adapter")
    change_config(folder, base_model_name_or_path="unsloth/tiny-unsloth-bnb-4bit")
    end = export(folder, tmp_path / "new", "--vllm")
    assert end.status == 0, end.err
    assert "vllm serve unsloth/tiny-unsloth-bnb-4bit --revision main --enable-lora" in end.said
    config = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "unsloth/tiny-unsloth-bnb-4bit"
    assert all(".language_model." in name for name in written_names(tmp_path / "new"))


def test_another_base_in_the_copy_is_told(of_wrapper, export, tmp_path):
    folder = copied(of_wrapper, tmp_path / "adapter")
    change_config(folder, base_model_name_or_path="someone/of-old", revision="abc")
    end = export(folder, tmp_path / "new", "--vllm", "--base", TINY)
    assert end.status == 0
    assert f"base its adapter_config.json names {TINY} now, not someone/of-old" in end.said
    config = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (TINY, None)
    assert "adapter_config.json names" not in export(of_wrapper, tmp_path / "same", "--vllm").said
