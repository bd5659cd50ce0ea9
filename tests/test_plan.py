"""The plan: what LoraConfig and the data come to, known before any weight is loaded."""

import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import TINY
from safetensors.torch import load_file
from trainers import edited_script, refused
from transformers import AutoModelForCausalLM

import train_lora_single as t

SEVEN = t.LORA_TARGET_MODULES
HELLO = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
ADAPTER = "output/final_lora/adapter_model.safetensors"


@pytest.fixture(autouse=True)
def in_a_folder(in_the_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_examples(4)


def write_examples(count):
    Path("t").write_text((json.dumps({"messages": HELLO}) + "\n") * count)


FILES = ["--train_file", "t", "--eval_file", ""]
DRY = ["--dry_run", "--model_name", TINY, *FILES]
RUN = ["--demo", "--model_name", TINY, *FILES, "--output_dir", "output", "--max_steps", "2"]
RUN += ["--learning_rate", "1e-2"]


def plan_of(capsys, *flags, main=t.main):
    """Return what a dry run prints of the plan, warnings included."""
    capsys.readouterr()
    main([*DRY, *map(str, flags)])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "_pattern" not in line]  # as long as they are
    assert max(map(len, lines)) <= 100
    return out[out.index("\nplan ") :]


def trainable(plan):
    """Return how many parameters are trained, as the table sums it, and how many there are."""
    found = re.search(r"trainable params: ([\d,]+) \|\| all params: ([\d,]+) \|\|", plan)
    trained, total = (int(one.replace(",", "")) for one in found.groups())
    table = plan[plan.index("scaled by\n") : found.start()].splitlines()[1:-1]
    # What is no matrix of LoRA has neither shapes nor a scaling.
    cells = [row.split()[-2 if re.search(r"\dx\d", row) else -1] for row in table]
    assert sum(int(one.replace(",", "")) for one in cells) == trained
    return trained, total


def tiny_config(kind, **more):
    """Return the config of another architecture, with small sizes."""
    sizes = {
        "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return getattr(transformers, f"{kind}Config")(**sizes | more)


def model_of(config):
    """Return the folder of a model with this config and the tests' tokenizer; it has no weights."""
    shutil.copytree(
        TINY, "model", ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True
    )
    config.save_pretrained("model")
    return "model"


# ---- Qwen3.5-4B ---------------------------------------------------------------------------------


def test_the_figures_of_qwen35_4b(capsys, monkeypatch):
    """As the settings are shipped, with 1,000 examples; no weight is loaded, no GPU asked for."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(torch.cuda, "init", lambda: 1 / 0)
    text = {
        "vocab_size": 248320, "hidden_size": 2560, "intermediate_size": 9216,
        "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "tie_word_embeddings": True,
    }  # fmt: skip
    config = transformers.Qwen3_5Config(text_config=text, tie_word_embeddings=True)
    write_examples(1000)
    plan = plan_of(capsys, "--model_name", model_of(config))
    assert "trainable params: 10,616,832 || all params: 4,216,368,128 || trainable%: 0.2518" in plan
    assert trainable(plan)[0] == 10_616_832
    assert "750 steps of 4 examples: ceil(1,000 / (2 x 2)) x 3\n" in plan
    assert "24 of 32 layers are Gated DeltaNet" in plan and "in 8 layers only" in plan
    rows = [line.split() for line in plan.splitlines() if "/32 " in line]
    shapes = {
        "q_proj": ["8/32", "self_attn", "8,192x2,560", "8x2,560", "8,192x8", "688,128", "2"],
        "k_proj": ["8/32", "self_attn", "1,024x2,560", "8x2,560", "1,024x8", "229,376", "2"],
        "v_proj": ["8/32", "self_attn", "1,024x2,560", "8x2,560", "1,024x8", "229,376", "2"],
        "o_proj": ["8/32", "self_attn", "2,560x4,096", "8x4,096", "2,560x8", "425,984", "2"],
        "gate_proj": ["32/32", "mlp", "9,216x2,560", "8x2,560", "9,216x8", "3,014,656", "2"],
        "up_proj": ["32/32", "mlp", "9,216x2,560", "8x2,560", "9,216x8", "3,014,656", "2"],
        "down_proj": ["32/32", "mlp", "2,560x9,216", "8x9,216", "2,560x8", "3,014,656", "2"],
    }
    assert rows == [[name, *cells] for name, cells in shapes.items()]


# ---- other models, other numbers of examples ----------------------------------------------------

COUNTED = {
    "Qwen3.5, DeltaNet": (None, ["out_proj", "in_proj_qkv", "o_proj"]),
    "Llama, untied": (lambda: tiny_config("Llama", tie_word_embeddings=False), SEVEN),
    "Phi3, fused": (lambda: tiny_config("Phi3"), ["qkv_proj", "o_proj", "gate_up_proj"]),
    "experts": (lambda: tiny_config("Qwen3Moe", num_experts=4, moe_intermediate_size=8), SEVEN[:4]),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_plan_counts_r_times_rows_plus_columns(name, capsys):
    make, targets = COUNTED[name]
    config = make() if make else transformers.AutoConfig.from_pretrained(TINY)
    folder = model_of(config)
    plan = plan_of(
        capsys, "--model_name", folder, "--lora_r", 12, "--lora_target_modules", *targets
    )
    model = AutoModelForCausalLM.from_config(config)
    modules = [one for path, one in model.named_modules() if path.split(".")[-1] in targets]
    trained = sum(12 * (one.in_features + one.out_features) for one in modules)
    whole = sum(weight.numel() for weight in model.parameters())
    assert trained > 0 and trainable(plan) == (trained, trained + whole)
    assert ("Gated DeltaNet" in plan) == ("Qwen3.5" in name)


def test_the_table_shows_the_shapes_that_peft_makes(capsys):
    """GPT-2's weights lie the other way round."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=2048)
    plan = plan_of(capsys, "--model_name", model_of(config), "--lora_target_modules", "c_attn")
    assert re.search(r" c_attn +2/2 attn +96x32 +8x32 +96x8 +2,048 +2$", plan, re.MULTILINE)


@pytest.mark.parametrize(
    ("n", "batch", "accumulation", "epochs", "most", "said"),
    [
        (9, 2, 2, 1, 0, "3 steps of 4 examples: ceil(9 / (2 x 2)) x 1"),
        (3, 4, 2, 2, 0, "2 steps of 3 examples: ceil(3 / (4 x 2)) x 2"),
        (8, 1, 4, 2, 0, "4 steps of 4 examples: ceil(8 / (1 x 4)) x 2"),
        (8, 1, 1, 1, 1, "1 step of 1 example, limited by MAX_STEPS (the full epochs would take 8)"),
        (9, 2, 2, 2, 6, "6 steps of 4 examples: ceil(9 / (2 x 2)) x 2"),
        (9, 2, 2, 2, 5, "5 steps of 4 examples, limited by MAX_STEPS"),
    ],
)
def test_steps_are_counted_and_their_formula_is_shown(
    capsys, n, batch, accumulation, epochs, most, said
):
    write_examples(n)
    flags = ["--batch_size", batch, "--gradient_accumulation_steps", accumulation]
    assert said in plan_of(capsys, *flags, "--num_epochs", epochs, "--max_steps", most)


# ---- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        (["q_projj", "v_proj"], ["named q_projj.", "Did you mean q_proj?"]),
        (["v_proj", "xyzzy"], ["named xyzzy.", "down_proj, gate_proj, "]),
        (["q_proj", "lm_head"], ["lm_head", 'modules_to_save=["lm_head"]']),
        (["all-linear"], ['target_modules="all-linear"', "lora_config()"]),
    ],
    ids=lambda value: value[-1],
)
def test_a_target_that_cannot_be_is_refused_in_the_plan(targets, parts, capfd):
    """PEFT says nothing as long as another target matches."""
    said = refused(capfd, [*DRY, "--lora_target_modules", *targets])
    assert "LORA_TARGET_MODULES" in said and [part for part in parts if part not in said] == []
    assert ("Did you mean" in said) == ("q_projj" in said)


OTHER_NAMES = {
    "GPT2": (["q_proj, up_proj, v_proj."], "c_attn, c_fc, c_proj."),
    "Phi3": (["gate_proj, k_proj, q_proj, up_proj"], "down_proj, gate_up_proj, o_proj, qkv_proj."),
    "Qwen3Moe": (["down_proj, gate_proj, up_proj."], "k_proj, o_proj, q_proj, v_proj."),
}


@pytest.mark.parametrize("kind", OTHER_NAMES)
def test_other_names_are_listed_and_all_linear_works_as_offered(kind, capfd, tmp_path):
    more = {"num_experts": 4, "moe_intermediate_size": 8} if kind == "Qwen3Moe" else {}
    model = ["--model_name", model_of(tiny_config(kind, **more))]
    missing, names = OTHER_NAMES[kind]
    said = refused(capfd, [*DRY, *model])
    assert f"The layers have {names}" in said and missing[0] in said and "Did you mean" not in said
    change = ("target_modules=settings.LORA_TARGET_MODULES", 'target_modules="all-linear"')
    plan = plan_of(capfd, *model, "--lora_dropout", 0, main=edited_script(tmp_path, change).main)
    listed = re.findall(r"(?m)^ +(\w+) +2/2 ", plan)
    assert {*names.removesuffix(".").split(", ")} <= {*listed}


# ---- LoraConfig is free to edit -----------------------------------------------------------------


def with_config(folder, *fields):
    """Return a copy of the script whose LoraConfig has these fields besides."""
    old = "    return peft.LoraConfig(\n"
    return edited_script(folder, (old, old + "".join(f"        {field},\n" for field in fields)))


PLAIN = 30_720
OUTPUTS = 1024 + 256 + 256 + 64 + 2 * (192 + 192 + 64)  # of all targets' matrices
EDITED = {  # the field, what PEFT then trains, and why vLLM does not serve it
    "use_dora=True": (PLAIN + OUTPUTS, "DoRA"),
    'rank_pattern={"q_proj": 16}, alpha_pattern={"q_proj": 8}': (PLAIN + 8 * (1024 + 64), ""),
    'rank_pattern={"layers.0.mlp.up_proj": 16}': (PLAIN + 8 * (64 + 192), "of the text model"),
    "use_rslora=True, layers_to_transform=[1]": (PLAIN - 8 * 3 * (192 + 64), ""),
    'modules_to_save=["lm_head"]': (PLAIN + 2048 * 64, "fully trained modules"),
    "trainable_token_indices=[5, 6]": (PLAIN + 2 * 64, "fully trained modules"),
}


@pytest.mark.parametrize("fields", EDITED)
def test_an_edited_loraconfig_is_planned_trained_and_verified(fields, tmp_path, capsys):
    count, refusal = EDITED[fields]
    with_config(tmp_path, fields).main(RUN)
    out = capsys.readouterr().out
    assert trainable(out[out.index("\nplan ") :])[0] == count
    assert f"model     {count:,} of " in out and "\nverified " in out
    assert sum(tensor.numel() for tensor in load_file(ADAPTER).values()) == count
    commands = re.findall(r"(?m)^ +vllm serve .*", out)
    assert Path("output/final_lora_vllm").exists() == bool(commands) == (not refusal)
    assert refusal in out
    record = json.loads(Path("output/run.json").read_bytes())
    wanted = eval(f"dict({fields})")
    assert {name: record["lora_config"][name] for name in wanted} == wanted
    assert record["plan"]["trainable"] == count
    if "q_proj" in fields:
        assert record["plan"]["max_rank"] == 16 and "--max-lora-rank 16 " in commands[0]
        assert re.search(r"(?m)^ +q_proj .* 16x64 .* 0\.5$", out)
    # PEFT alone loads it, and it does something.
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32").eval()
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        model = peft.PeftModel.from_pretrained(base, "output/final_lora").eval()
        assert (model(input_ids=ids).logits - plain).abs().max() > 1e-3


def test_a_model_of_another_family_is_trained_and_verified(capsys):
    """With fused experts, under names of its own."""
    config = tiny_config("Qwen3Moe", num_experts=4, moe_intermediate_size=8, num_experts_per_tok=2)
    folder = model_of(config)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    t.main([*RUN, "--model_name", folder, "--lora_target_modules", *SEVEN[:4]])
    out = capsys.readouterr().out
    assert "\nverified " in out and "\ndone " in out
    # No wrapper: vLLM takes the adapter under its own names.
    assert not Path("output/final_lora_vllm").exists()
    assert "--lora-modules output=output/final_lora " in out


@pytest.mark.parametrize(
    ("targets", "count"),
    [('"all-linear"', PLAIN + 8 * (512 + 256 + 2 + 2 + 4 * 64 + 256 + 64)), ('".*up_proj"', 4096)],
)
def test_targets_may_be_all_linear_or_a_regular_expression(targets, count, tmp_path, capsys):
    change = ("target_modules=settings.LORA_TARGET_MODULES", f"target_modules={targets}")
    plan = plan_of(capsys, main=edited_script(tmp_path, change).main)
    assert trainable(plan)[0] == count


REFUSED = {
    'init_lora_weights="pissa_niter_4"': "pissa_niter_4",
    'init_lora_weights="olora"': "olora",
    'init_lora_weights="eva"': '"eva" needs data',
    "layer_replication=[[0, 2], [0, 2]]": "layer_replication",
    "layers_to_transform=[7]": "PEFT refuses it",
    'rank_pattern={"down_projj": 16}': "down_projj",
    'alpha_pattern={"down_projj": 16}': "down_projj",
    f'rank_pattern={{"{"x" * 300}.the_end": 16}}': "the_end",  # PEFT's message is not cut
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_loraconfig_that_would_not_be_what_it_seems_is_refused(field, capfd, tmp_path):
    said = refused(capfd, DRY, with_config(tmp_path, field).main)
    assert said.startswith("LoraConfig: ") and REFUSED[field] in said


def test_trained_biases_are_refused(capfd, tmp_path):
    """PEFT keeps them where the adapter is switched off, so the base would not be the base."""
    script = edited_script(tmp_path, ('bias="none",  #', 'bias="all",  #'))
    said = refused(capfd, DRY, script.main)
    assert said.startswith("LoraConfig: ") and 'bias="all"' in said and '"none"' in said


def test_trained_weights_in_bfloat16_are_refused(capfd, tmp_path):
    """A whole module is trained in the model's type, in which small steps are rounded away."""
    main = with_config(tmp_path, 'modules_to_save=["lm_head"]').main
    said = refused(capfd, [*RUN, "--dtype", "bfloat16"], main)
    assert "float32" in said and "torch.bfloat16" in said and "lm_head" in said
    assert not Path("output/final_lora").exists()


# ---- the names for vLLM -------------------------------------------------------------------------


def wrapper(kind, **text):
    """Return the config of a model that sees pictures, too, as the hub has it."""
    sizes = {
        "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")
    return config(text_config=sizes | text, vision_config=vision)


def planned(*flags, script=t):
    """Return a job with its plan."""
    job = script.Job(script.parse_settings([*DRY, *flags]))
    script.prepare(job)
    return job


@pytest.mark.parametrize("kind", ["Qwen3_5", "Gemma3"])
def test_the_names_for_vllm_are_those_of_the_hubs_model(kind, capsys, tmp_path):
    config, script = transformers.AutoConfig.from_pretrained(TINY), t
    if kind == "Gemma3":  # whose vision tower has layers of the same names
        config = wrapper("Gemma3")
        plan = plan_of(capsys, "--model_name", model_of(config))
        assert re.search(r"warning +\d of these modules, such as \S*vision", plan)
        assert 'exclude_modules=".*vision.*"' in plan
        script = with_config(tmp_path, 'exclude_modules=".*vision.*"')
    job = planned("--model_name", model_of(config), script=script)
    assert "warning" not in capsys.readouterr().out and job.plan.vllm_refuses == ""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    places = {path for path, _ in model.named_modules()}
    prefix = "base_model.model."
    names = [f"{prefix}{name}".replace(".default.", ".") for name in job.plan.trainable_shapes]
    paths = {t.name_in_multimodal_model(name).partition(".lora_")[0] for name in names}
    assert 2 * len(paths) == len(names)
    assert {path.removeprefix(prefix) for path in paths} <= places
    assert not any("vision" in path for path in paths)


def test_a_model_in_which_the_names_have_no_place_is_said_not_to_be_served(capsys):
    """Llama 4 has its text model elsewhere; no adapter is written that vLLM would ignore."""
    config = wrapper("Llama4", num_local_experts=2, intermediate_size_mlp=48)
    folder = model_of(config)
    job = planned("--model_name", folder, "--lora_target_modules", "q_proj", "v_proj")
    assert "have no place in the model under the names that vLLM applies" in job.plan.vllm_refuses
    assert any("vLLM cannot serve it" in one for one in t.next_commands(job))


def test_tensors_of_another_shape_or_place_are_no_vllm_adapter():
    config = transformers.AutoConfig.from_pretrained(TINY)
    name = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_{}.weight"
    right = {name.format("A"): torch.zeros(8, 64), name.format("B"): torch.zeros(1024, 8)}
    t.check_names_for_vllm(right, config)
    for wrong in ({name.format("A"): torch.zeros(8, 63)}, {name.format("B"): torch.zeros(64, 8)}):
        with pytest.raises(t.UserError, match="1 of 2"):
            t.check_names_for_vllm(right | wrong, config)
    unwrapped = {one.replace("language_model.", ""): tensor for one, tensor in right.items()}
    with pytest.raises(t.UserError, match="2 of 2"):
        t.check_names_for_vllm(unwrapped, config)


def test_what_vllm_does_not_serve_is_said_before_training():
    plain = peft.LoraConfig()
    assert t.why_vllm_refuses(plain, 512) == "" and "512" in t.why_vllm_refuses(plain, 513)
