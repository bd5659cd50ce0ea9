"""The plan: what LoraConfig and the data come to, known before any weight is loaded."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import TOY
from runs import ADAPTER, command, edit_config, prepared, read_json, refused
from safetensors.torch import load_file
from toys import EXPERTS, SIZES, family, model_of, wrapper
from transformers import AutoModelForCausalLM

import train_lora_single as script

SEVEN = script.LORA_TARGET_MODULES
HELLO = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]


@pytest.fixture(autouse=True)
def in_a_folder(in_the_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_examples(4)


def write_examples(count):
    Path("t").write_text((json.dumps({"messages": HELLO}) + "\n") * count)


FILES = ["--model_name", TOY, "--train_file", "t", "--eval_file", ""]
DRY = ["--dry_run", *FILES]
RUN = [*FILES, "--device", "cpu", "--dtype", "float32", "--max_steps", "2"]
RUN += ["--learning_rate", "1e-2", "--output_dir", "output"]


def numbers(text):
    """Return the words of a text without the commas in its numbers."""
    return text.replace(",", "").split()


def trained(flags):
    """Return how many weights a job would train: the sum over the plan's shapes."""
    shapes = prepared(flags).plan.trained_shapes.values()
    return sum(torch.Size(shape).numel() for shape in shapes)


def test_the_figures_of_qwen35_4b(capfd, monkeypatch):
    """As the settings are shipped, with 1,000 examples; no weight is loaded, no GPU asked for."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: 1 / 0)
    text = {
        "vocab_size": 248320, "hidden_size": 2560, "intermediate_size": 9216,
        "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "tie_word_embeddings": True,
    }  # fmt: skip
    config = transformers.Qwen3_5Config(text_config=text, tie_word_embeddings=True)
    write_examples(1000)
    out = command(capfd, [*DRY, "--model_name", model_of(config, "model")]).out
    assert {"10616832", "4216368128", "0.2518", "750"} <= {*numbers(out)}
    rows = {row[0]: row for line in out.splitlines() for row in [line.split()] if row}
    assert {"8,192x2,560", "8x2,560", "8,192x8"} <= {*rows["q_proj"]}  # W, A and B


COUNTED = {
    "Qwen3.5, DeltaNet": (None, ["out_proj", "in_proj_qkv", "o_proj"]),
    "Phi3, fused": (lambda: family("Phi3"), ["qkv_proj", "o_proj", "gate_up_proj"]),
    "experts": (lambda: family("Qwen3Moe", **EXPERTS), SEVEN[:4]),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_plan_counts_r_times_rows_plus_columns(name, capfd):
    make, targets = COUNTED[name]
    config = make() if make else transformers.AutoConfig.from_pretrained(TOY)
    flags = [*DRY, "--model_name", model_of(config, "model")]
    flags += ["--lora_r", "12", "--lora_target_modules", *targets]
    model = AutoModelForCausalLM.from_config(config)
    modules = [one for path, one in model.named_modules() if path.split(".")[-1] in targets]
    count = sum(12 * (one.in_features + one.out_features) for one in modules)
    whole = count + sum(weight.numel() for weight in model.parameters())
    out = numbers(command(capfd, flags).out)
    assert count > 0 and {str(count), str(whole)} <= {*out}
    assert ("warning" in out) == (name == "experts")  # whose routers have another loss elsewhere


@pytest.mark.parametrize(
    ("n", "batch", "accumulation", "epochs", "most", "steps"),
    [
        (9, 2, 2, 1, 0, 3),
        (3, 4, 2, 2, 0, 2),
        (8, 1, 4, 2, 0, 4),
        (8, 1, 1, 1, 1, 1),
        (9, 2, 2, 2, 6, 6),
        (9, 2, 2, 2, 5, 5),
    ],
)
def test_steps_are_counted(n, batch, accumulation, epochs, most, steps):
    write_examples(n)
    flags = [*DRY, "--batch_size", batch, "--gradient_accumulation_steps", accumulation]
    assert prepared([*flags, "--num_epochs", epochs, f"--max_steps={most}"]).plan.steps == steps


@pytest.mark.parametrize(
    "kind, targets, named",
    [(None, ["q_projj", "v_proj"], ["q_projj", "q_proj"]), (None, ["v_proj", "xyzzy"], ["xyzzy"]),
     ("Phi3", ["q_proj", "o_proj"], ["q_proj", "qkv_proj"])],
)  # fmt: skip
def test_a_target_that_is_not_there_is_named(kind, targets, named, capfd):
    """PEFT says nothing as long as another target matches."""
    model = ["--model_name", model_of(family(kind), "model")] if kind else []
    flags = [*DRY, *model, "--lora_target_modules", *targets]
    refused(capfd, flags, "LORA_TARGET_MODULES", *named)


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_patterns_name_that_is_not_there_is_named(pattern, capfd, monkeypatch):
    """PEFT would train with the rank and alpha of all others."""
    edit_config(monkeypatch, "lora_fields", **{pattern: {"q_prjo": 4, "v_proj": 4}})
    refused(capfd, DRY, pattern, "q_prjo", "q_proj")
    edit_config(monkeypatch, "lora_fields", **{pattern: {r"layers\.\d+\.mlp\.up_proj": 4}})
    assert command(capfd, DRY).status == 0


def test_the_head_gets_no_lora(capfd):
    refused(capfd, [*DRY, "--lora_target_modules", "lm_head", "q_proj"], "lm_head")


WIDTHS = {
    "q_proj": (192, 1024), "k_proj": (192, 256), "v_proj": (192, 256), "o_proj": (512, 192),
    "gate_proj": (192, 448), "up_proj": (192, 448), "down_proj": (448, 192),
}  # fmt: skip
MLP = ["gate_proj", "up_proj", "down_proj"]  # in both layers; attention is in the second alone
PLAIN = 8 * sum(sum(WIDTHS[name]) for name in [*WIDTHS, *MLP])
OUTPUTS = sum(WIDTHS[name][1] for name in [*WIDTHS, *MLP])
EDITED = [  # what LoraConfig has besides, and the number of weights that PEFT then trains
    ({"use_dora": True}, PLAIN + OUTPUTS),
    ({"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"q_proj": 8}}, PLAIN + 8 * (1024 + 192)),
    ({"use_rslora": True, "layers_to_transform": [1]}, PLAIN - 8 * 3 * (448 + 192)),
    ({"modules_to_save": ["lm_head"]}, PLAIN + 3072 * 192),
    ({"exclude_modules": ["down_proj"]}, PLAIN - 8 * 2 * (448 + 192)),
]


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # of the tied head
@pytest.mark.parametrize(("fields", "count"), EDITED, ids=lambda one: str(one)[:15])
def test_an_edited_loraconfig_is_trained_as_planned(fields, count, capfd, base, monkeypatch):
    edit_config(monkeypatch, "lora_fields", **fields)
    end = command(capfd, RUN)
    assert end.status == 0 and str(count) in numbers(end.out)
    folder = Path("output") / ADAPTER
    assert sum(tensor.numel() for tensor in load_file(folder).values()) == count
    config = read_json(folder.parent / "adapter_config.json")
    assert {name: config[name] for name in fields} == fields
    # PEFT alone loads it, and it does something.
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        model = AutoModelForCausalLM.from_pretrained(TOY, dtype="float32")
        model = peft.PeftModel.from_pretrained(model, folder.parent).eval()
        assert (model(input_ids=ids).logits - plain).abs().max() > 1e-3


def test_targets_may_be_all_linear_or_a_regular_expression(monkeypatch):
    """DeltaNet has in_proj_qkv, _z, _a and _b, and out_proj."""
    count = PLAIN + 8 * (704 + 448 + 194 + 194 + 448)
    assert trained([*DRY, "--lora_target_modules", "all-linear"]) == count
    edit_config(monkeypatch, "lora_fields", target_modules=".*up_proj")
    assert trained(DRY) == 8 * 2 * (448 + 192)


@pytest.mark.parametrize(
    "field, value",
    [("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"),
     ("init_lora_weights", "corda"), ("init_lora_weights", "eva"), ("bias", "all")],
)  # fmt: skip
def test_what_changes_the_base_is_refused(field, value, capfd, monkeypatch):
    """A trained bias would stay where the adapter is switched off."""
    edit_config(monkeypatch, "lora_fields", **{field: value})
    refused(capfd, DRY, field, value)


def test_trained_weights_in_bfloat16_are_refused(capfd, monkeypatch):
    """A whole module is trained in the model's type, in which small steps are rounded away."""
    edit_config(monkeypatch, "lora_fields", modules_to_save=["lm_head"])
    refused(capfd, [*RUN, "--dtype", "bfloat16"], "DTYPE", "float32")
    assert not Path("output/final_lora").exists()


def test_a_vision_tower_gets_no_lora(capfd, monkeypatch):
    """The shipped names match its modules, too; the expression that is printed picks the text's."""
    flags = [*DRY, "--model_name", model_of(wrapper("Gemma3"), "model")]
    end = refused(capfd, flags, "LORA_TARGET_MODULES", "vision_tower")
    expression = re.search('target_modules=r"(.+)"', end.err)[1]
    edit_config(monkeypatch, "lora_fields", target_modules=expression)
    shapes = prepared(flags).plan.trained_shapes
    text = [name for name in shapes if "language_model.layers." in name]
    assert [*shapes] == text and len(text) == 2 * len(SEVEN) * SIZES["num_hidden_layers"]


def test_the_names_for_vllm_are_those_of_the_hubs_model(capfd, monkeypatch):
    """Here Gemma's; transformers alone says which modules the multimodal model has."""
    config = wrapper("Gemma3")
    edit_config(monkeypatch, "lora_fields", exclude_modules=".*vision.*")
    flags = [*RUN, "--model_name", model_of(config, "model", has_weights=True)]
    assert command(capfd, flags).status == 0
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    places = {path for path, _ in model.named_modules()}
    names = load_file(Path("output/final_lora_vllm/adapter_model.safetensors"))
    paths = {one.removeprefix("base_model.model.").partition(".lora_")[0] for one in names}
    assert 2 * len(paths) == len(names) and paths <= places
    assert not any("vision" in path for path in paths)
