"""How replies are generated: in batches that change nothing, drawn by a seed for each prompt."""

import copy

import peft
import pytest
import torch
from on_tiny import base_model
from trainers import chat_format_of

import inspect_lora.replies as replies
from inspect_lora.replies import Chance, generate, greedy


@pytest.fixture(scope="module")
def model():
    """Return the tests' model with LoRA on it, whose replies differ from prompt to prompt."""
    torch.manual_seed(1)
    base = copy.deepcopy(base_model())
    for name, weight in base.named_parameters():
        if "proj" in name:
            weight.data.mul_(3)
    config = peft.LoraConfig(target_modules=["o_proj", "up_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config).eval()


@pytest.fixture(scope="module")
def chat_format(tiny):
    return chat_format_of(tiny)


def prompts_of(chat_format, words=("hello", "rain all day", "beans", "who rang? nobody yet?")):
    return [chat_format.prompt_ids([{"role": "user", "content": one}]) for one in words]


def replies_to(model, chat_format, prompts, seed=None):
    return generate(model, chat_format, prompts, greedy(chat_format, 6), "", seed)


def ids_of(found):
    return [one.ids for one in found]


@pytest.mark.parametrize("seed", [None, 42])
def test_replies_are_the_same_whatever_the_batch(model, chat_format, monkeypatch, seed):
    """Alone, in the file's order, in another, and beside other prompts."""
    prompts = prompts_of(chat_format)
    whole = replies_to(model, chat_format, prompts, seed)
    assert len({tuple(ids) for ids in ids_of(whole)}) == 4
    assert ids_of(replies_to(model, chat_format, prompts[::-1], seed)) == ids_of(whole)[::-1]
    assert ids_of(replies_to(model, chat_format, prompts[2:3], seed)) == ids_of(whole)[2:3]
    monkeypatch.setattr(replies, "ROWS_AT_ONCE", 1)
    assert ids_of(replies_to(model, chat_format, prompts, seed)) == ids_of(whole)


def test_another_seed_draws_other_replies(model, chat_format):
    prompts = prompts_of(chat_format)
    one, other, likeliest = (
        ids_of(replies_to(model, chat_format, prompts, seed)) for seed in (1, 2, None)
    )
    assert one != other and likeliest not in (one, other)
    assert one == ids_of(replies_to(model, chat_format, prompts, 1))


def test_tokens_are_drawn_with_the_models_own_odds():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, float("-inf")]])
    drawn = Chance(list(range(20_000)))(None, logits.repeat(20_000, 1)).argmax(1)
    counts = torch.bincount(drawn, minlength=5) / 20_000
    torch.testing.assert_close(counts, logits.softmax(-1)[0], atol=0.012, rtol=0)
    assert counts[4] == 0


FULL = {
    "torch's": torch.OutOfMemoryError("CUDA out of memory."),
    "cuBLAS's": RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "Triton's": RuntimeError("Triton Error [CUDA]: out of memory"),
}


def watched(monkeypatch, fits=lambda rows, width: True, error=FULL["torch's"]):
    """Return the (rows, width) of each batch; one that does not fit is out of memory."""
    batches, real = [], replies.generate_batch

    def run(model, prompts, config, **how):
        batches.append((len(prompts), max(map(len, prompts))))
        if not fits(*batches[-1]):
            raise error
        return real(model, prompts, config, **how)

    monkeypatch.setattr(replies, "generate_batch", run)
    return batches


def test_batches_are_sorted_by_length_and_bounded_by_tokens(model, chat_format, monkeypatch):
    words = [f"hello {n}" for n in range(5)] + ["rain " * 40]
    prompts = prompts_of(chat_format, words)
    longest, short = max(map(len, prompts)), len(prompts[0])
    monkeypatch.setattr(replies, "TOKENS_AT_ONCE", 3 * (short + 6))
    batches = watched(monkeypatch)
    found = replies_to(model, chat_format, prompts)
    assert batches == [(1, longest), (3, short), (2, short)]
    monkeypatch.undo()
    assert ids_of(found) == ids_of(replies_to(model, chat_format, prompts))


@pytest.mark.parametrize(("seed", "full"), [(None, "torch's"), *((7, name) for name in FULL)])
def test_half_as_many_go_together_where_memory_is_full(model, chat_format, monkeypatch, seed, full):
    prompts = prompts_of(chat_format)
    expected = ids_of(replies_to(model, chat_format, prompts, seed))
    batches = watched(monkeypatch, lambda rows, _: rows < 2, FULL[full])
    assert ids_of(replies_to(model, chat_format, prompts, seed)) == expected
    assert [rows for rows, _ in batches] == [4, 2, 1, 1, 1, 1]


def test_one_prompt_that_does_not_fit_is_out_of_memory(model, chat_format, monkeypatch):
    watched(monkeypatch, lambda *_: False)
    with pytest.raises(torch.OutOfMemoryError):
        replies_to(model, chat_format, prompts_of(chat_format))


def test_another_error_is_not_taken_for_full_memory(model, chat_format, monkeypatch):
    batches = watched(monkeypatch, lambda *_: False, RuntimeError("an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        replies_to(model, chat_format, prompts_of(chat_format))
    assert len(batches) == 1
