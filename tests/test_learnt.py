"""What a run has learnt: the size of each update against W, the directions that it uses."""

import argparse
import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import Linear, Module, ModuleDict, ModuleList
from transformers import AutoModelForCausalLM

import train_lora_single as t

TENSORS = "adapter_model.safetensors"


def record_of(output):
    return json.loads((output / "run.json").read_text("utf-8"))


def section(text, name):
    """Return the lines of the only section of this name, each without its first nine columns."""
    (found,) = re.findall(rf"^{name:<9}.*\n(?: {{9}}.*\n)*", text, re.MULTILINE)
    return [line[9:] for line in found.splitlines()]


@pytest.mark.parametrize("d,k,r", [(20, 30, 8), (3, 30, 8), (30, 3, 8), (2, 3, 8), (20, 30, 1)])
def test_the_strengths_are_those_of_the_full_product(d, k, r):
    torch.manual_seed(0)
    a, b = torch.randn(r, k), torch.randn(d, r)
    full = torch.linalg.svdvals(2.5 * b.double() @ a.double())
    found, rank = t.singular_values(a, b, 2.5), min(d, k, r)
    assert len(found) <= r
    torch.testing.assert_close(found[:rank].double(), full[:rank], rtol=1e-5, atol=0)
    assert not found[rank:].gt(1e-5 * full[0]).any()


def net(shapes, dtype=torch.float32, **lora):
    """Return LoRA with random A and B over one up_proj of d x k a layer, and these modules."""
    model = Module()
    layers = [ModuleDict({"up_proj": Linear(k, d, bias=False)}) for d, k in shapes]
    model.layers = ModuleList(layers)
    adapted = get_peft_model(model.to(dtype), LoraConfig(target_modules=["up_proj"], **lora))
    modules = [layer["up_proj"] for layer in adapted.base_model.model.layers]
    for module in modules:
        torch.nn.init.normal_(module.lora_B["default"].weight)
    return adapted, modules


def by_hand(a, b, scale, weight):
    """Return update, half and directions of the full product."""
    product = scale * b.double() @ a.double()
    energy = torch.linalg.svdvals(product)[: len(a)] ** 2
    shares = (energy / energy.sum()).tolist()
    return {
        "update": (product.norm() / weight.double().norm()).item(),
        "half": sum(shares[: max(1, len(a) // 2)]),
        "directions": next(n for n in range(1, 99) if sum(shares[:n]) >= 0.9),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r,alpha", [(8, 16), (5, 1), (1, 4)])
def test_the_update_is_measured_against_w_as_by_the_full_product(dtype, r, alpha):
    torch.manual_seed(1)
    model, modules = net([(40, 50), (3, 30), (30, 3)], dtype, r=r, lora_alpha=alpha)
    rows = t.measure_update(model)
    assert [(row["layer"], row["target"]) for row in rows] == [(n, "up_proj") for n in range(3)]
    for row, module in zip(rows, modules, strict=True):
        weight, (a, b) = module.get_base_layer().weight, (module.lora_A, module.lora_B)
        assert weight.dtype == dtype
        expected = by_hand(a["default"].weight, b["default"].weight, alpha / r, weight)
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_a_w_as_large_as_the_real_models_is_measured_as_closely():
    """Float32 sums of so many squares lose a thousandth."""
    torch.manual_seed(2)
    model, (module,) = net([(4096, 4096)], torch.bfloat16, r=1, lora_alpha=1)
    (row,) = t.measure_update(model)
    weight, (a, b) = module.get_base_layer().weight, (module.lora_A, module.lora_B)
    size = a["default"].weight.double().norm() * b["default"].weight.double().norm()
    assert row["update"] == pytest.approx((size / weight.double().norm()).item(), rel=1e-5)


def test_an_update_of_two_equal_directions_saved_with_r_8_shows_two(tmp_path):
    torch.manual_seed(3)
    model, (module,) = net([(40, 50)], r=8, lora_alpha=16)
    strengths = torch.tensor([0.0, 3, 0, 0, 0, 0, 3, 0])
    a, b = (torch.linalg.qr(torch.randn(n, 8)).Q for n in (50, 40))
    mix = torch.linalg.qr(torch.randn(8, 8)).Q  # so that no row is zero
    module.lora_A["default"].weight.data = mix @ torch.diag(strengths) @ a.T
    module.lora_B["default"].weight.data = b @ mix.T
    model.save_pretrained(tmp_path)
    base = Module()
    base.layers = ModuleList([ModuleDict({"up_proj": module.get_base_layer()})])
    (row,) = t.measure_update(PeftModel.from_pretrained(base, tmp_path))
    assert row["directions"] == 2 and row["half"] == pytest.approx(1, abs=1e-6)
    size = 2 * 3 * 2**0.5 / module.get_base_layer().weight.norm().item()  # alpha / r is 2
    assert row["update"] == pytest.approx(size, rel=1e-5)


def test_no_update_has_size_0_and_no_directions():
    model, (module,) = net([(40, 50)], r=8, lora_alpha=16)
    module.lora_B["default"].weight.data.zero_()
    (row,) = t.measure_update(model)
    assert (row["update"], row["half"], row["directions"]) == (0, 0, 0)


def test_of_an_expert_the_layers_number_is_told():
    experts = ModuleDict({"experts": ModuleList([ModuleDict({"up_proj": Linear(9, 8)})])})
    model = Module()
    model.layers = ModuleList([Module(), experts])
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"]))
    assert [row["layer"] for row in t.measure_update(adapted)] == [1]


def learnt_by_hand(adapter, model_name, scale):
    """Return {(target, layer): values} of a saved adapter, by the full product."""
    tensors, found = load_file(adapter / TENSORS), {}
    base = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
    for name in [name for name in tensors if "lora_A" in name]:
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        layer, target = int(re.search(r"layers\.(\d+)\.", path)[1]), path.split(".")[-1]
        found[target, layer] = by_hand(a, b, scale, base.get_submodule(path).weight)
    return found


def assert_learnt(output, tiny, scale):
    """Fail unless run.json's numbers are those of final_lora, each module's once."""
    expected, rows = learnt_by_hand(output / "final_lora", tiny, scale), record_of(output)["learnt"]
    assert len(rows) == len(expected) == 10
    for row in rows:
        values = expected.pop((row["target"], row["layer"]))
        assert {key: row[key] for key in values} == pytest.approx(values, rel=1e-5)


def test_run_json_tells_of_each_adapted_module_what_is_true_of_the_saved_file(demo, tiny):
    assert_learnt(demo[0], tiny, 16 / 8)


def means(rows):
    """Return {target: (update, directions, half)} over layers."""
    found = {}
    for target in {row["target"] for row in rows}:
        mine = [row for row in rows if row["target"] == target]
        keys = ("update", "directions", "half")
        found[target] = [sum(row[key] for row in mine) / len(mine) for key in keys]
    return found


def assert_section(lines, rows, r):
    """Fail unless each target has one line, with the means of its rows."""
    assert len(lines) <= 10 and max(len(line) + 9 for line in lines) <= 100
    for target, (update, directions, half) in means(rows).items():
        (line,) = [line for line in lines if line.split()[0] == target]
        assert f" {100 * update:.3g} " in line and f" {directions:.1f} of {r} " in line
        assert line.endswith(f" {half:.0%}")


def test_the_printed_section_has_each_targets_means_between_proof_and_samples(demo):
    assert_section(section(demo[1], "learnt"), record_of(demo[0])["learnt"], 8)
    words = [line.split()[0] for line in demo[1].splitlines() if line[:1].isalpha()]
    assert words.index("proof") < words.index("learnt") < words.index("samples")


def test_for_32_layers_the_section_is_as_short_and_names_the_layers_that_changed_most(
    monkeypatch, capsys
):
    torch.manual_seed(4)
    sizes = torch.rand(7, 32).tolist()
    rows = [
        {"target": target, "layer": n, "update": size, "half": size / 2, "directions": n % 9}
        for target, row in zip(t.LORA_TARGET_MODULES, sizes, strict=True)
        for n, size in enumerate(row)
    ]
    monkeypatch.setattr(t, "measure_update", lambda _: rows)
    t.report_learnt(None, t.Job(argparse.Namespace(lora_r=128)), None)
    lines = section(capsys.readouterr().out, "learnt")
    assert_section(lines, rows, 128)
    for target, row in zip(t.LORA_TARGET_MODULES, sizes, strict=True):
        most = sorted(range(32), key=lambda n: -row[n])[:3]
        (line,) = [line for line in lines if line.startswith(f"{target} ")]
        assert f" {', '.join(map(str, most))} " in re.sub(" +", " ", line)


def test_an_update_that_cannot_be_measured_is_a_warning(lines, tmp_path, monkeypatch, capsys):
    def svdvals(*_):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svdvals", svdvals)
    output = tmp_path / "output"
    t.main(
        [*lines(tmp_path, train=2, evaluation=2), "--num_epochs", "1", "--output_dir", str(output)]
    )
    (line,) = re.findall(r"^warning .*$", capsys.readouterr().out, re.MULTILINE)
    assert "learnt" in line and "did not converge" in line
    record = record_of(output)
    assert (record["outcome"], record["learnt"]) == ("finished", [])
    assert (output / "final_lora" / TENSORS).exists() and (output / "samples.md").exists()
