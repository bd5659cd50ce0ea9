"""Memory: in how many micro-batches a step goes, that this changes nothing, and what is tried."""

import contextlib
import types

import pytest
import runs
import torch
import transformers
from by_hand import ROUNDING, assert_near, token_loss
from toys import family, model_of

import train_lora_single as script
from train_lora.console import UserError
from train_lora.device import is_out_of_memory
from train_lora.losses import losses_of_replies, token_losses
from train_lora.memory import find_what_fits, trial_fits
from train_lora.tokens import pad

FULL = "CUDA out of memory. Tried to allocate 1.89 GiB"
LENGTHS = [47, 40, 12, 46, 45, 30, 44]  # each row counts as 64 tokens, as DeltaNet fills it up
WHOLE = len(LENGTHS) * 64


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """Return a trainer of one step of made-up examples, with an adapter that has an effect."""
    flags = [*runs.short_flags(tmp_path_factory.mktemp("memory")), "--batch_size", len(LENGTHS)]
    job = runs.prepared([*flags, "--gradient_accumulation_steps", "1"])
    job = runs.give_examples(job, LENGTHS)
    trainer = script.build_trainer(job)
    runs.set_b(trainer.model)
    for dropout in dropouts_of(trainer):
        dropout.p = 0.0
    return trainer


def dropouts_of(trainer):
    return [one for one in trainer.model.modules() if isinstance(one, torch.nn.Dropout)]


@pytest.fixture(scope="module")
def undivided(trainer):
    """Return the loss, a mean over all target tokens, and the gradients of a step in one pass."""
    loss, gradients, passes = one_step(trainer, 10_000)
    assert len(passes) == 1 and trainer.tokens_at_once == 10_000
    by_row = token_loss(trainer.model.eval(), trainer.job.data.examples)
    assert loss == pytest.approx(by_row, rel=ROUNDING)
    return loss, gradients


def one_step(trainer, tokens_at_once):
    """Do a step; return its loss, its gradients and its passes."""
    trainer.tokens_at_once, recorder = tokens_at_once, runs.Recorder(trainer)
    inputs = pad(trainer.job.data.examples, "cpu")
    trainer.model.zero_grad()
    try:
        loss = trainer.training_step(trainer.model, inputs).item()
    finally:
        recorder.stop()
    return loss, {n: p.grad.clone() for n, p in runs.lora(trainer.model).items()}, recorder.trained


def widths_of(passes):
    """Return (rows, tokens that they count as together) of each pass."""
    widths = [(len(one["rows"]), max(map(len, one["rows"]))) for one in passes]
    return [(rows, rows * 64 * -(-width // 64)) for rows, width in widths]


@pytest.mark.parametrize(
    ("tokens", "parts"), [(WHOLE - 1, 2), (130, 4), (64, 7), (63, 3), (40, 4), (0, 7)]
)
def test_the_loss_and_the_gradients_do_not_depend_on_the_parts(trainer, undivided, tokens, parts):
    loss, gradients, passes = one_step(trainer, tokens)
    assert loss == pytest.approx(undivided[0], rel=ROUNDING)
    assert_near(gradients, undivided[1])
    # Each row goes through once, in micro-batches that fit and are no wider than their longest row;
    # only what is too long to keep its activations is computed again.
    rows = [row for one in passes for row in one["rows"]]
    assert sorted(rows) == sorted(one.input_ids for one in trainer.job.data.examples)
    for one, (number, counted) in zip(passes, widths_of(passes), strict=True):
        assert one["size"] == number * max(map(len, one["rows"]))
        assert one["is_recomputed"] == (tokens < 64)
        assert number == 1 or counted <= tokens * (4 if tokens < 64 else 1)
    assert len(passes) == parts  # and not more than needed


def test_an_example_that_is_recomputed_has_the_same_dropout(trainer, monkeypatch):
    data = types.SimpleNamespace(examples=trainer.job.data.examples[:1])
    monkeypatch.setattr(trainer, "job", types.SimpleNamespace(data=data))
    without, _, _ = one_step(trainer, 64)
    for dropout in dropouts_of(trainer):
        monkeypatch.setattr(dropout, "p", 0.5)
    steps = []
    for tokens in (64, 0):
        torch.manual_seed(5)
        steps.append(one_step(trainer, tokens))
    (loss, gradients, (kept,)), (again, found, (recomputed,)) = steps
    assert (kept["is_recomputed"], recomputed["is_recomputed"]) == (False, True)
    assert again == pytest.approx(loss, rel=ROUNDING) != without
    assert_near(found, gradients)


@contextlib.contextmanager
def running_out(trainer, place, direction, times=1):
    """Let the pass at a place of a step (from 0) run out of memory, in forward or backward."""
    passes, failures, is_due = [], [], [False]

    def look(model, *_):
        if model.training:
            passes.append(None)
            is_due[0] = len(failures) < times and len(passes) > place
            if direction == "forward":
                fail()

    def fail(*_):
        if is_due[0]:
            is_due[0] = False
            failures.append(len(passes))
            passes.clear()
            raise torch.OutOfMemoryError(FULL)

    last = next(one for name, one in runs.lora(trainer.model).items() if "layers.0" in name)
    hooks = [trainer.model.register_forward_hook(look)]
    if direction == "backward":  # most gradients are there already
        hooks.append(last.register_hook(fail))
    yield failures
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_step_that_runs_out_of_memory_is_done_again(trainer, undivided, place, direction):
    """Whichever of its four micro-batches fails, the gradient is that of an undisturbed step."""
    with running_out(trainer, place, direction) as failures:
        loss, gradients, passes = one_step(trainer, 130)
    assert failures == [place + 1]
    assert loss == pytest.approx(undivided[0], rel=ROUNDING)
    assert_near(gradients, undivided[1])
    assert trainer.tokens_at_once == 64  # nine tenths of 130, in whole chunks
    assert widths_of(passes[place + 1 :]) == [(1, 64)] * 7


def test_each_time_nine_tenths_are_tried_until_it_fits(trainer, undivided, monkeypatch):
    monkeypatch.setattr(trainer, "chunk", 1)  # as in a model without DeltaNet
    with running_out(trainer, 0, "backward", times=3):
        _, gradients, passes = one_step(trainer, 1000)
    assert trainer.tokens_at_once == int(0.9 * int(0.9 * int(0.9 * 1000)))
    assert_near(gradients, undivided[1])
    assert all(one["size"] <= trainer.tokens_at_once for one in passes[3:])


def test_one_example_that_does_not_fit_is_recomputed_and_then_ends_the_run(trainer, undivided):
    with running_out(trainer, 0, "backward"):
        _, gradients, passes = one_step(trainer, 64)
    assert_near(gradients, undivided[1])
    assert [one["is_recomputed"] for one in passes] == [False] + [True] * 7
    with (
        running_out(trainer, 0, "forward", times=9) as failed,
        pytest.raises(UserError, match="47"),
    ):
        one_step(trainer, 0)
    assert len(failed) == 1  # nothing is smaller, so it is not tried again


@pytest.mark.parametrize("words", [
    FULL, "CUBLAS_STATUS_ALLOC_FAILED when calling x", "Triton Error: out of memory",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling y",
    'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp":1016',  # as on MIG
])  # fmt: skip
def test_full_memory_is_known_by_others_words_too(words):
    assert is_out_of_memory(RuntimeError(words))


@pytest.mark.parametrize(
    ("words", "is_wsl", "expected"),
    [
        ("CUDA error: an illegal memory access", True, False),
        ("CUDA error: device not ready", False, False),
        ("CUDA error: device not ready", True, True),
    ],
)
def test_other_errors_are_not_taken_for_full_memory(monkeypatch, words, is_wsl, expected):
    runs.replace_ours(monkeypatch, "IS_WSL", is_wsl)
    assert is_out_of_memory(RuntimeError(words)) == expected


@pytest.mark.parametrize("tokens", [10_000, 90, 47, 1])
def test_evaluation_does_not_depend_on_its_batches(trainer, tokens):
    """Where the memory is smaller than was thought, it goes on with half as many at once."""
    model, sizes, examples = trainer.model, [], trainer.job.data.examples
    expected = [token_loss(model.eval(), [one]) * len(one.reply_ids) for one in examples]

    def run_out(model, _, inputs):
        assert not model.training  # so dropout is off
        if inputs["input_ids"].numel() > 100:
            raise torch.OutOfMemoryError(FULL)
        sizes.append(inputs["input_ids"].numel())

    with model.register_forward_pre_hook(run_out, with_kwargs=True):
        losses = losses_of_replies(model.train(), examples, tokens)
        assert [loss for (loss,) in losses] == pytest.approx(expected, rel=ROUNDING)
        assert model.training
        assert max(sizes) <= max(min(tokens, 100), 47)
        with pytest.raises(UserError, match="made up: 198"):  # nothing is smaller than one
            losses_of_replies(model, [runs.made_up([5] * 99, [7] * 99)], tokens)


@pytest.fixture
def card(monkeypatch):
    """Have a GPU of 100 GiB, of which others hold 60 and torch 10; return the shares allowed."""
    shares = []
    answers = {"mem_get_info": (30 * 2**30, 100 * 2**30), "memory_reserved": 10 * 2**30}
    answers |= {"empty_cache": None, "reset_peak_memory_stats": None}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    return shares


def give_memory(trainer, kept, recomputed):
    """Let a pass over more tokens run out of memory, with activations kept or recomputed."""

    def run_out(model, _, inputs, __):
        room = recomputed if runs.is_recomputing(model) else kept
        if model.training and inputs["input_ids"].numel() > room:
            raise torch.OutOfMemoryError(FULL)

    return trainer.model.register_forward_hook(run_out, with_kwargs=True)


def look_for_memory(trainer, find_what_fits=find_what_fits):
    """Find what fits on the made-up card."""
    trainer.job.settings.DEVICE = "cuda"
    try:
        find_what_fits(trainer)
    finally:
        trainer.job.settings.DEVICE = "cpu"


@pytest.mark.parametrize(
    ("kept", "recomputed", "expected"),  # room with activations kept and recomputed: what is found
    [(WHOLE, 0, WHOLE), (200, 0, 3 * 64), (64, 0, 64), (63, 4 * 47, 0)],
)
def test_what_fits_is_found_by_trial_passes(trainer, card, kept, recomputed, expected):
    recorder, trainer.tokens_at_once = runs.Recorder(trainer), WHOLE
    with give_memory(trainer, kept, recomputed):
        look_for_memory(trainer)
    recorder.stop()
    assert trainer.tokens_at_once == expected
    tried = [one["size"] for one in recorder.trained if not one["is_recomputed"]]
    assert tried[0] == WHOLE and all(len(one["rows"]) == 1 for one in recorder.trained)
    assert len(tried) <= 4 and (expected in tried or expected == 0)
    assert expected + 64 in tried or expected == WHOLE  # nothing larger fits
    again = [one["size"] for one in recorder.trained if one["is_recomputed"]]
    assert bool(again) == (expected < 64) and {*again} <= {47}
    # A tenth and AdamW's two numbers for each trained weight are left while it tries, and later a
    # little for what allocates outside of torch's view.
    states = 2 * 4 * sum(p.numel() for p in runs.lora(trainer.model).values()) / (100 * 2**30)
    assert card == [pytest.approx(0.9 * 0.4 - states, rel=1e-9), pytest.approx(0.97 * 0.4)]
    assert not [n for n, p in trainer.model.named_parameters() if p.grad is not None]


def test_no_micro_batch_needs_more_than_was_tried(trainer, undivided, card, monkeypatch):
    """Shorter examples that are recomputed together may have more tokens than the longest."""
    monkeypatch.setattr(trainer, "chunk", 1)
    trainer.tokens_at_once = WHOLE
    with give_memory(trainer, 23, 64):  # with 22 at once, those of 44 and 40 would need 88
        look_for_memory(trainer)
        fitting = trainer.tokens_at_once
        _, gradients, passes = one_step(trainer, fitting)
    assert fitting == trainer.tokens_at_once == 15  # so nothing was done again
    assert_near(gradients, undivided[1])
    assert {len(one["rows"]) for one in passes if one["is_recomputed"]} == {1, 2}


def test_a_trial_needs_no_more_positions_than_the_model_has(tmp_path, card):
    """GPT-2's are learned, and the next one ends the run with no word of memory."""
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 3072}
    config = transformers.GPT2Config(**sizes)
    model = model_of(config, tmp_path / "model", has_weights=True)
    flags = [*runs.short_flags(tmp_path), "--model_name", model, "--lora_target_modules", "c_attn"]
    trainer = script.build_trainer(runs.give_examples(runs.prepared(flags), [60, 40, 50, 30]))
    recorder = runs.Recorder(trainer)
    look_for_memory(trainer)
    recorder.stop()
    assert [one["size"] for one in recorder.trained] == [4 * 60] == [trainer.tokens_at_once]


def test_where_the_loss_needs_the_logits_few_targets_go_at_once(tmp_path, card, monkeypatch):
    """Granite divides them after its head. The step and its trial are bounded alike."""
    config = family("Granite", logits_scaling=3.0, initializer_range=0.5)
    model = model_of(config, tmp_path / "model", has_weights=True)
    flags = [*runs.short_flags(tmp_path), "--model_name", model, "--lora_dropout", "0"]
    trainer = script.build_trainer(runs.give_examples(runs.prepared(flags), [60, 40, 50, 30]))
    runs.set_b(trainer.model)
    loss, gradients, _ = one_step(trainer, 240)
    assert loss == pytest.approx(token_loss(trainer.model.eval(), trainer.job.data.examples))
    counts, real = [], token_losses

    def count(model, part):
        counts.append((part["labels"][:, 1:] != -100).sum(1).tolist())
        return real(model, part)

    runs.replace_ours(monkeypatch, "token_losses", count)
    runs.replace_ours(monkeypatch, "MOST_TARGETS", 8)
    divided_loss, found, _ = one_step(trainer, 240)
    assert divided_loss == pytest.approx(loss, rel=ROUNDING)
    assert_near(found, gradients)
    assert sum(map(sum, counts)) == 90 and max(map(max, counts)) == 8 and len(counts) == 4
    assert trial_fits(trainer, 1, 240)
    assert counts[-1] == [4 * 8]


@pytest.fixture
def on_the_card(card, monkeypatch):
    """Have a whole run look for memory on the card."""
    runs.replace_ours(monkeypatch, "find_what_fits", look_for_memory)


def test_a_run_that_has_tried_is_the_same_run(flags, finished, tmp_path, on_the_card, monkeypatch):
    """Dropout included."""
    recorders = runs.record(monkeypatch)
    assert runs.run(flags) == 0
    whole = finished.output / runs.ADAPTER
    assert (tmp_path / "output" / runs.ADAPTER).read_bytes() == whole.read_bytes()
    # The longest example counts as 192 tokens, and what was tried came before the base's loss.
    tried, rest = recorders[0].trained[:1], recorders[0].trained[1:]
    assert [one["size"] for one in tried] == [4 * 192] and len(rest) == 8


def test_too_long_an_example_ends_the_run_at_once(flags, tmp_path, capfd, on_the_card, monkeypatch):
    evaluated = []
    runs.replace_ours(monkeypatch, "losses_of_replies", lambda *_: evaluated.append(None))
    longest = max(len(one.input_ids) for one in runs.prepared(flags).data.examples)
    runs.on_trainer(monkeypatch, lambda trainer: give_memory(trainer, 64, longest - 1))
    runs.refused(capfd, flags, str(longest), "MAX_SEQ_LEN")
    assert runs.checkpoints(tmp_path / "output") == [] and not evaluated
