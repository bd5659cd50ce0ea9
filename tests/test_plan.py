"""The plan: what LoraConfig and the data come to, known before any weight is loaded."""

import json
import re

import peft
import pytest
import torch
import transformers
from conftest import TINY, write_short_data
from safetensors.torch import load_file
from trainers import (
    ADAPTER,
    chat_format_of,
    command_in,
    commands_in,
    edited_script,
    logged,
    read_record,
    refused,
    token_loss,
)
from transformers import AutoModelForCausalLM

import train_lora_single as t

SEVEN = t.LORA_TARGET_MODULES


# ---- Qwen3.5-4B ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen_4b():
    """Return a config with the sizes of Qwen/Qwen3.5-4B."""
    text = {
        "vocab_size": 248320, "hidden_size": 2560, "intermediate_size": 9216,
        "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return transformers.Qwen3_5Config(text_config=text, tie_word_embeddings=True)


def write_examples(path, number):
    """Write so many lines of one short conversation each; return the path as text."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * number, encoding="utf-8")
    return str(path)


@pytest.fixture
def no_weights(monkeypatch):
    """Fail as soon as weights are loaded or a GPU is asked for."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(torch.cuda, "init", lambda: 1 / 0)


def test_the_figures_of_qwen35_4b(qwen_4b, tiny, tmp_path, monkeypatch, capsys, no_weights):
    """The settings are those of the file; only the tokenizer is another one's."""
    train = write_examples(tmp_path / "train.jsonl", 1000)
    real = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: qwen_4b)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: real(tiny))
    files = ["--model_name", tiny, "--train_file", train, "--eval_file", ""]
    t.main([*files, "--dry_run", "--output_dir", str(tmp_path / "output")])
    text = capsys.readouterr().out
    assert "trainable params: 10,616,832 || all params: 4,216,368,128 || trainable%: 0.2518" in text
    assert "750 steps of 4 examples: ceil(1,000 / (2 x 2)) x 3\n" in text
    assert "r = 8, alpha = 16 (the update is scaled by 2), dropout 0.05" in text
    assert "24 of 32 layers are Gated DeltaNet" in text
    rows = [line.removeprefix("plan").split() for line in text.splitlines() if "/32 " in line]
    assert rows == [
        ["q_proj", "8/32", "self_attn", "8,192x2,560", "8x2,560", "8,192x8", "688,128"],
        ["k_proj", "8/32", "self_attn", "1,024x2,560", "8x2,560", "1,024x8", "229,376"],
        ["v_proj", "8/32", "self_attn", "1,024x2,560", "8x2,560", "1,024x8", "229,376"],
        ["o_proj", "8/32", "self_attn", "2,560x4,096", "8x4,096", "2,560x8", "425,984"],
        ["gate_proj", "32/32", "mlp", "9,216x2,560", "8x2,560", "9,216x8", "3,014,656"],
        ["up_proj", "32/32", "mlp", "9,216x2,560", "8x2,560", "9,216x8", "3,014,656"],
        ["down_proj", "32/32", "mlp", "2,560x9,216", "8x9,216", "2,560x8", "3,014,656"],
    ]
    plan = text[text.index("\nplan ") :]
    assert max(map(len, plan.splitlines())) <= 100
    assert not (tmp_path / "output").exists()  # a dry run writes nothing


# ---- other models, other numbers of examples ----------------------------------------------------


def job_of(config, *flags, n_train=1000):
    """Return a job for a model's config and so many examples."""
    job = t.Job(t.parse_settings([str(flag) for flag in flags]))
    job.config, job.chat_format = config, chat_format_of(TINY)
    job.train = [t.Example("made up", [], "", [1], [2])] * n_train
    return job


def tiny_config(kind, **more):
    """Return the config of another architecture, with small sizes."""
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return getattr(transformers, f"{kind}Config")(**sizes | more)


def moe():
    return tiny_config("Qwen3Moe", num_experts=4, moe_intermediate_size=8)


COUNTED = {
    "Qwen3.5, DeltaNet": (None, ["out_proj", "in_proj_qkv", "o_proj"]),
    "Llama, untied": (lambda: tiny_config("Llama", tie_word_embeddings=False), SEVEN),
    "Phi3, fused": (lambda: tiny_config("Phi3"), ["qkv_proj", "o_proj", "gate_up_proj"]),
    "MoE, attention": (moe, SEVEN[:4]),
}


@pytest.mark.parametrize("name", COUNTED)
def test_the_plan_counts_r_times_rows_plus_columns(tiny, name):
    make, targets = COUNTED[name]
    config = make() if make else transformers.AutoConfig.from_pretrained(tiny)
    found = t.make_plan(job_of(config, "--lora_r", 12, "--lora_target_modules", *targets))
    model = AutoModelForCausalLM.from_config(config)
    modules = [one for path, one in model.named_modules() if path.split(".")[-1] in targets]
    trainable = sum(12 * (one.in_features + one.out_features) for one in modules)
    assert trainable > 0 and found.trainable == trainable
    assert found.total == trainable + sum(p.numel() for p in model.parameters())


def test_the_table_shows_the_shapes_that_peft_makes(capsys):
    """GPT-2's weights lie the other way round."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96)
    plan = t.make_plan(job_of(config, "--lora_target_modules", "c_attn"))
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if "c_attn" in line]
    shapes = {tuple(map(int, cell.split("x"))) for cell in row if re.fullmatch(r"\d+x\d+", cell)}
    assert set(plan.trainable_shapes.values()) == {(8, 32), (96, 8)}
    assert {(8, 32), (96, 8)} <= shapes


def test_long_names_do_not_run_into_the_next_column(capsys):
    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=96,
    )  # fmt: skip
    targets = ["query_key_value", "dense_h_to_4h"]
    t.make_plan(job_of(config, "--lora_target_modules", *targets))
    lines = [line[10:] for line in capsys.readouterr().out.splitlines()]
    head = next(line for line in lines if line.startswith("target "))
    rows = [line for line in lines if line.startswith(tuple(targets))]
    assert [row.split()[:3] for row in rows] == [
        ["query_key_value", "2/2", "attention"], ["dense_h_to_4h", "2/2", "mlp"],
    ]  # fmt: skip
    assert {row.index("2/2") for row in rows} == {head.index("in layers")}
    assert {len(row) for row in rows} == {len(head)} and len(head) <= 90


def test_only_models_with_deltanet_are_told_of_it(tiny, capsys):
    t.make_plan(job_of(transformers.AutoConfig.from_pretrained(tiny)))
    assert "1 of 2 layers are Gated DeltaNet" in capsys.readouterr().out
    t.make_plan(job_of(tiny_config("Llama")))
    assert "DeltaNet" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("n", "batch", "accumulation", "epochs", "most", "per_epoch", "steps"),
    [
        (1000, 2, 2, 3, 0, 250, 750),
        (9, 2, 2, 1, 0, 3, 3),
        (3, 4, 2, 2, 0, 1, 2),
        (8, 1, 4, 2, 0, 2, 4),
        (9, 2, 2, 2, 4, 3, 4),
        (1000, 2, 2, 1, 80, 250, 80),
        (9, 2, 2, 2, 100, 3, 6),
    ],
)
def test_steps_are_counted_and_their_formula_is_shown(
    capsys, n, batch, accumulation, epochs, most, per_epoch, steps
):
    flags = ["--batch_size", batch, "--gradient_accumulation_steps", accumulation]
    flags += ["--num_epochs", epochs, "--max_steps", most]
    found = t.make_plan(job_of(tiny_config("Llama"), *flags, n_train=n))
    assert (found.steps_per_epoch, found.steps) == (per_epoch, steps)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " steps of " in line]
    size = f"{n}" if n < batch * accumulation else f"{batch * accumulation}"
    is_even = n % int(size) == 0 or steps < per_epoch
    assert f" {steps} steps of {'' if is_even else 'up to '}{size} examples: " in line
    whole = per_epoch * epochs
    if steps == whole:
        assert line.endswith(f"ceil({n:,} / ({batch} x {accumulation})) x {epochs}")
        return
    noun = "epochs" if epochs > 1 else "epoch"
    assert line.endswith(f"cut short by MAX_STEPS ({epochs} {noun} would be {whole})")
    seen = f"{steps * batch * accumulation} of the {n:,} examples; "
    assert (seen in line) == (steps < per_epoch)


@pytest.mark.parametrize(
    ("n", "size", "most", "said"),
    [
        (16, 100, 0, "1 step of 16 examples"),
        (16, 16, 0, "1 step of 16 examples"),
        (17, 16, 0, "2 steps of up to 16 examples"),
        (17, 16, 1, "1 step of 16 examples"),  # the step that is not full comes last
        (2, 1, 0, "2 steps of 1 example"),
    ],
)
def test_the_plan_and_the_card_say_how_many_examples_a_step_has(capsys, n, size, most, said):
    flags = ["--batch_size", size, "--gradient_accumulation_steps", 1, "--num_epochs", 1]
    job = job_of(tiny_config("Llama"), *flags, "--max_steps", most, n_train=n)
    job.plan = t.make_plan(job)
    assert f" {said}: " in capsys.readouterr().out
    job.train[0].messages.append({"role": "user", "content": "Hi"})
    assert f"\n{said}, learning rate" in t.card_text(job)


# ---- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["q_projj", "v_proj"], ["q_projj", "Did you mean q_proj?"]),
        (["v_proj", "gate_up"], ["gate_up", "Did you mean gate_proj?"]),
        (["v_proj", "xyzzy"], ["xyzzy", "down_proj, gate_proj, "]),
        (
            ["q_proj", "lm_head"],
            ["lm_head", 'modules_to_save=["lm_head"]'],
        ),  # TRL takes its loss from the head's weight
        (["all-linear"], ["no layer", 'target_modules="all-linear"', "lora_config()"]),
    ],
    ids=lambda value: value[-1],
)
def test_a_target_that_cannot_be_is_refused_in_the_plan(flags, capfd, targets, named):
    """PEFT says nothing as long as another target matches."""
    message = refused(capfd, [*flags, "--dry_run", "--lora_target_modules", *targets])
    assert "LORA_TARGET_MODULES" in message
    for part in named:
        assert part in message


def test_a_suggestion_is_only_made_where_one_is_close(flags, capfd):
    message = refused(capfd, [*flags, "--dry_run", "--lora_target_modules", "xyzzy", "v_proj"])
    assert "Did you mean" not in message


def test_a_target_named_twice_counts_once(tiny):
    config = transformers.AutoConfig.from_pretrained(tiny)
    once, twice = (
        t.make_plan(job_of(config, "--lora_target_modules", *["up_proj"] * n)) for n in (1, 2)
    )
    assert once == twice


# ---- LoraConfig is free to edit -----------------------------------------------------------------


def with_config(folder, *fields):
    """Return a copy of the script whose LoraConfig has these fields besides."""
    old = "    return peft.LoraConfig(\n"
    return edited_script(folder, (old, old + "".join(f"        {field},\n" for field in fields)))


@pytest.fixture
def one_step(flags, tmp_path):
    """Return the flags of a run of a single step."""
    for name, number in (("train", 4), ("eval", 2)):
        path = tmp_path / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:number]), encoding="utf-8")
    return [*flags, "--num_epochs", "1"]


PLAIN = 30_720
OUTPUTS = 1024 + 256 + 256 + 64 + 2 * (192 + 192 + 64)  # of all targets' matrices
EDITED = {  # the field, what PEFT then trains, and why vLLM does not serve it
    "use_dora=True": (PLAIN + OUTPUTS, "DoRA"),
    'rank_pattern={"q_proj": 16}': (PLAIN + 8 * (1024 + 64), ""),
    'rank_pattern={"q_proj": 520}': (PLAIN + 512 * (1024 + 64), "a rank above 512"),
    "layers_to_transform=[1]": (PLAIN - 8 * 3 * (192 + 64), ""),
    'exclude_modules=["up_proj"]': (PLAIN - 2 * 8 * (192 + 64), ""),
    'modules_to_save=["lm_head"]': (PLAIN + 2048 * 64, "fully trained modules"),
    "trainable_token_indices=[5, 6]": (PLAIN + 2 * 64, "fully trained modules"),
    "init_lora_weights=False": (PLAIN, ""),
}


@pytest.mark.parametrize("field", EDITED)
def test_an_edited_loraconfig_is_planned_trained_and_verified(
    one_step, field, tiny, tmp_path, capsys
):
    count, refusal = EDITED[field]
    with_config(tmp_path, field).main(one_step)
    text = capsys.readouterr().out
    assert f"trainable params: {count:,} ||" in text
    assert f"model     {count:,} of " in text and "\nverified  loaded again" in text
    output = tmp_path / "output"
    assert sum(tensor.numel() for tensor in load_file(output / ADAPTER).values()) == count
    served = [words for words in commands_in(text) if words[0] == "vllm"]
    assert (output / "final_lora_vllm").exists() == bool(served) == (not refusal)
    assert refusal in text
    card = (output / "final_lora" / "README.md").read_text(encoding="utf-8")
    assert ("rank_pattern" in card) == ("rank_pattern" in field)
    assert ("--max-lora-rank" in card) == (not refusal) and refusal in " ".join(card.split())
    if served:
        words = command_in(text, "vllm", "serve", tiny)
        rank = words[words.index("--max-lora-rank") + 1]
        assert rank == ("16" if "rank_pattern" in field else "8")
    # run.json holds the whole LoraConfig, which differs from the file's own in this field alone.
    plain = json.loads(json.dumps(t.config_as_recorded(t.lora_config(t.parse_settings(one_step)))))
    config = read_record(output)["lora_config"]
    assert config.keys() == plain.keys()
    assert [name for name in plain if config[name] != plain[name]] == [field.partition("=")[0]]
    # The losses before and after are those of the files, by PEFT.
    losses = logged(read_record(output)["loss_history"], "eval_loss")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32").eval()
    job = t.Job(t.parse_settings(one_step))
    t.prepare(job)
    assert losses[0] == pytest.approx(token_loss(model, job.held_out), rel=1e-4)
    model = peft.PeftModel.from_pretrained(model, output / "final_lora").eval()
    assert losses[1] == pytest.approx(token_loss(model, job.held_out), rel=1e-4)


def test_ranks_and_scalings_that_differ_are_shown_by_target(one_step, tmp_path, capsys):
    """The table has a row for each of them, and all rows together are what is trained."""
    patterns = 'rank_pattern={"q_proj": 16, "layers.0.mlp.up_proj": 4}, alpha_pattern={"k_proj": 8}'
    script = with_config(tmp_path, patterns)
    script.main([*one_step, "--dry_run"])
    text = capsys.readouterr().out
    plan = text[text.index("\nplan ") + 1 :]
    assert max(map(len, plan.splitlines())) <= 100
    assert "LoRA with r = 4 to 16, updates scaled by 1 to 4 (by target, below)" in plan
    rows = [line[10:].split() for line in plan.splitlines() if re.search(r" \d/2 ", line)]
    assert [(row[0], row[1], row[4], row[-1]) for row in rows] == [
        ("q_proj", "1/2", "16x64", "1"),
        ("k_proj", "1/2", "8x64", "1"),
        ("v_proj", "1/2", "8x64", "2"),
        ("o_proj", "1/2", "8x512", "2"),
        ("gate_proj", "2/2", "8x64", "2"),
        ("up_proj", "1/2", "8x64", "2"),
        ("up_proj", "1/2", "4x64", "4"),
        ("down_proj", "2/2", "8x192", "2"),
    ]
    trained = sum(int(row[-2].replace(",", "")) for row in rows)
    assert f"trainable params: {trained:,} ||" in plan
    with_config(tmp_path).main([*one_step, "--dry_run"])
    plain = capsys.readouterr().out
    assert "LoRA with r = 8, alpha = 16 (the update is scaled by 2)" in plain
    assert "scaled by" in plan.splitlines()[1] and "scaled by" not in plain.partition("target ")[2]


@pytest.mark.parametrize(
    ("target_modules", "count"),
    [('"all-linear"', PLAIN + 8 * (512 + 256 + 2 + 2 + 4 * 64 + 256 + 64)), ('r".*up_proj"', 4096)],
)
def test_targets_may_be_all_linear_or_a_regular_expression(
    one_step, target_modules, count, tmp_path, capsys
):
    old = "target_modules=settings.LORA_TARGET_MODULES"
    edited_script(tmp_path, (old, f"target_modules={target_modules}")).main(one_step)
    text = capsys.readouterr().out
    assert f"trainable params: {count:,} ||" in text and "\nverified  loaded again" in text


REFUSED = {
    'init_lora_weights="pissa"': "pissa",
    'init_lora_weights="pissa_niter_4"': "pissa_niter_4",
    'init_lora_weights="olora"': "olora",
    'init_lora_weights="eva"': '"eva" needs data',
    "layer_replication=[[0, 2], [0, 2]]": "layer_replication",
    "layers_to_transform=[7]": "PEFT refuses it",
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_loraconfig_that_would_not_be_what_it_seems_is_refused(flags, capfd, tmp_path, field):
    message = refused(capfd, [*flags, "--dry_run"], with_config(tmp_path, field).main)
    assert message.startswith("LoraConfig: ") and REFUSED[field] in message


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused(flags, capfd, tmp_path, bias):
    """PEFT keeps them where the adapter is switched off, so the base would not be the base."""
    script = edited_script(tmp_path, ('bias="none",  #', f'bias="{bias}",  #'))
    message = refused(capfd, [*flags, "--dry_run"], script.main)
    assert message.startswith("LoraConfig: ") and f'bias="{bias}"' in message
    assert '"none"' in message


def test_a_loraconfig_without_targets_is_refused(flags, capfd, tmp_path):
    old = "target_modules=settings.LORA_TARGET_MODULES"
    script = edited_script(tmp_path, (old, "target_modules=None"))
    message = refused(capfd, [*flags, "--dry_run"], script.main)
    assert message.startswith("LoraConfig: target_modules is missing") and "all-linear" in message


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_another_task_than_chat_is_refused(flags, capfd, tmp_path, task):
    script = edited_script(tmp_path, ('task_type="CAUSAL_LM",  #', f"task_type={task!r},  #"))
    message = refused(capfd, [*flags, "--dry_run"], script.main)
    assert "task_type" in message and "CAUSAL_LM" in message


def test_trained_weights_in_bfloat16_are_refused(flags, capfd, tmp_path):
    """A whole module is trained in the model's type, in which small steps are rounded away."""
    script = with_config(tmp_path, 'modules_to_save=["lm_head"]')
    message = refused(capfd, [*flags, "--dtype", "bfloat16"], script.main)
    assert "float32" in message and "torch.bfloat16" in message and "lm_head" in message
    assert not (tmp_path / "output" / "final_lora").exists()


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_key_of_a_pattern_that_matches_no_layer_is_refused(capfd, tmp_path, monkeypatch, name):
    plain = t.lora_config

    def edited(settings):
        config = plain(settings)
        setattr(config, name, {"down_projj": 16})
        return config

    monkeypatch.setattr(t, "lora_config", edited)
    data = write_short_data(tmp_path)
    said = refused(capfd, [*data, "--dry_run"])
    assert name in said and "down_projj" in said


def test_dora_is_named_in_plan_and_card():
    from peft import LoraConfig

    assert "DoRA" in t.lora_in_words(LoraConfig(use_dora=True))
    assert "DoRA" not in t.lora_in_words(LoraConfig())
