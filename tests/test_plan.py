"""The plan: exact for Qwen3.5-4B's sizes, equal to PEFT's count, and made without weights."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3_5Config

import train_lora_single as t


@pytest.fixture(scope="module")
def qwen_4b(tmp_path_factory, tiny):
    """Qwen3.5-4B's sizes, with the demo's tokenizer and without any weights."""
    folder = tmp_path_factory.mktemp("qwen3.5-4b")
    text = {
        "vocab_size": 248320,
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "tie_word_embeddings": True,
    }
    Qwen3_5Config(text_config=text, tie_word_embeddings=True).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return str(folder)


def plan(name, n_train=1000, *flags):
    args = t.parse_args(["--model_name", name, *flags])
    return t.make_plan(args, AutoConfig.from_pretrained(name), n_train)


def test_a_dry_run_on_the_real_sizes_prints_the_articles_figures(qwen_4b, capsys, tmp_path):
    t.main(["--dry_run", "--model_name", qwen_4b, "--max_seq_len", "1024", "--output_dir", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "trainable params: 10,616,832 || all params: 4,216,368,128 || trainable%: 0.2518" in text
    assert "750 steps, 250 an epoch: ceil(1,000 / (2 x 2)) x 3" in text
    assert "scale alpha/r = 2" in text
    assert "adapter file 42.5 MB, with the checkpoints at most 1,049 MB of disk" in text
    assert "vLLM needs --max-lora-rank 8 for r=8" in text
    assert "24 of 32 layers are Gated DeltaNet, without q_proj, k_proj, v_proj, o_proj" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if "/32 " in line}
    assert rows["q_proj"] == ["8/32", "attention", "8192x2560", "8x2560", "8192x8", "688,128"]
    assert rows["o_proj"] == ["8/32", "attention", "2560x4096", "8x4096", "2560x8", "425,984"]
    assert rows["down_proj"] == ["32/32", "FFN", "2560x9216", "8x9216", "2560x8", "3,014,656"]
    assert [*rows] == t.LORA_TARGET_MODULES
    assert max(map(len, text.splitlines())) <= 100
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("targets", [t.LORA_TARGET_MODULES, ["q_proj", "v_proj"], ["out_proj", "in_proj_qkv"]])
@pytest.mark.parametrize("r", [1, 12])
def test_the_plan_counts_what_peft_counts(tiny, targets, r):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model = get_peft_model(model, LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM"))
    counts = plan(tiny, 1000, "--lora_r", str(r), "--lora_target_modules", *targets)
    assert (counts["trainable"], counts["total"]) == model.get_nb_trainable_parameters()


def test_a_misspelt_target_is_refused_with_the_nearest_name(qwen_4b, capsys):
    with pytest.raises(SystemExit, match=r"no layer has q_projj, gate; did you mean q_proj, gate_proj.*out_proj"):
        plan(qwen_4b, 1000, "--lora_target_modules", "q_projj", "v_proj", "gate")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "norm", "self_attn"])
def test_a_module_that_is_not_a_linear_one_of_the_layers_is_refused(tiny, target):
    with pytest.raises(SystemExit, match=f"no layer has {target};"):
        plan(tiny, 1000, "--lora_target_modules", target)


def test_a_target_named_twice_counts_once(tiny):
    assert plan(tiny, 1000, "--lora_target_modules", "q_proj", "q_proj") == plan(
        tiny, 1000, "--lora_target_modules", "q_proj"
    )


@pytest.mark.parametrize(
    ("n", "batch", "accumulate", "epochs", "steps"), [(1000, 2, 2, 3, 750), (9, 2, 2, 1, 3), (3, 4, 2, 2, 2)]
)
def test_steps_are_counted_as_the_trainer_will(tiny, n, batch, accumulate, epochs, steps):
    flags = ["--batch_size", batch, "--gradient_accumulation_steps", accumulate, "--num_epochs", epochs]
    counts = plan(tiny, n, *map(str, flags))
    assert (counts["steps"], counts["per_epoch"]) == (steps, steps // epochs)


@pytest.mark.parametrize(("processes", "per_epoch", "batch"), [("1", 250, "2 x 2"), ("3", 84, "2 x 2 x 3")])
def test_a_launchers_processes_share_the_steps(tiny, monkeypatch, capsys, processes, per_epoch, batch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setenv("LOCAL_RANK", "0")
    counts = plan(tiny)
    assert (counts["steps"], counts["per_epoch"]) == (3 * per_epoch, per_epoch)
    assert f"{3 * per_epoch} steps, {per_epoch} an epoch: ceil(1,000 / ({batch})) x 3" in capsys.readouterr().out


def test_the_disk_that_is_planned_for_is_printed_and_grows_by_a_checkpoint_an_epoch(tiny, capsys):
    three, nine = plan(tiny, 1000, "--num_epochs", "3"), plan(tiny, 1000, "--num_epochs", "9")
    lines = [line for line in capsys.readouterr().out.splitlines() if "of disk" in line]
    assert [line.split()[-4:] for line in lines] == [
        [f"{counts['disk'] / 1e6:,.0f}", "MB", "of", "disk"] for counts in (three, nine)
    ]
    # Each epoch leaves the adapter, AdamW's two moments of it, and a tokenizer of up to 25 MB.
    assert nine["disk"] - three["disk"] == 6 * (3 * 4 * three["trainable"] + 25_000_000)


@pytest.mark.parametrize(("r", "rank"), [(1, 1), (4, 8), (8, 8), (12, 16), (64, 64), (65, 128), (512, 512)])
def test_the_rank_flag_is_the_smallest_that_vllm_takes(tiny, r, rank, capsys):
    plan(tiny, 1000, "--lora_r", str(r))
    assert f"--max-lora-rank {rank} for r={r}" in capsys.readouterr().out


def test_only_models_with_deltanet_layers_are_told_of_them(tiny, capsys):
    plan(tiny, 1000, "--lora_target_modules", "gate_proj")
    assert "Gated DeltaNet" not in capsys.readouterr().out
    plan(tiny, 1000, "--lora_target_modules", "q_proj")
    assert "1 of 2 layers are Gated DeltaNet, without q_proj" in capsys.readouterr().out
