"""Memory: in how many parts a step goes through the model, and that this changes nothing."""

import pytest
import torch
import transformers
from conftest import write_short_data
from trainers import (
    ROUNDING,
    Recorder,
    assert_near,
    checkpoints,
    give_examples,
    is_recomputing,
    logged,
    lora,
    on_trainer,
    prepared,
    refused,
    set_b,
    token_loss,
)

import train_lora_single as t

LONGEST = 47
STEP = 4 * LONGEST  # tokens of a step of nothing but the longest example


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return the flags of a short run whose data stays for the whole module."""
    more = ["--lora_dropout", "0", "--num_epochs", "1"]
    return [*write_short_data(tmp_path_factory.mktemp("data")), *more]


@pytest.fixture
def gpu(monkeypatch):
    """Simulate a GPU of 100 GiB, of which others hold 60 and torch 10; return what is allowed."""
    shares = []
    fakes = {"mem_get_info": (30 * 2**30, 100 * 2**30), "memory_reserved": 10 * 2**30}
    fakes |= {"empty_cache": None, "reset_peak_memory_stats": None, "max_memory_allocated": 2**30}
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    return shares


def made(data, folder, lengths):
    """Return (job, trainer) on made-up examples, with an adapter that has an effect."""
    job = prepared([*data, "--output_dir", str(folder)])
    give_examples(job, lengths)
    job.held_out = job.examples[:3]
    trainer = t.build_trainer(job)
    set_b(trainer.model)
    return job, trainer


def give_memory(trainer, kept, recomputed=0):
    """Let a pass over more tokens run out of memory, with activations kept or recomputed."""

    def run_out(model, _, inputs, __):
        if model.training:
            room = max(kept, recomputed) if is_recomputing(model) else kept
            if inputs["input_ids"].numel() > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    return trainer.model.register_forward_hook(run_out, with_kwargs=True)


def look_for_memory(trainer, job):
    """Find what fits on the simulated GPU."""
    job.settings.DEVICE = "cuda"
    try:
        t.find_what_fits(trainer, job)
    finally:
        job.settings.DEVICE = "cpu"


# ---- what fits is found by trying --------------------------------------------------------------

FOUND = {  # room with activations kept, and recomputed: what is found, and a word of what is said
    "a whole step": ((STEP, 0), (STEP, STEP), "whole step"),
    "three examples": ((3 * LONGEST, 0), (128, 128), "parts"),
    "one example": ((LONGEST + 1, 0), (48, 48), "parts"),
    "one example, just": ((LONGEST, 0), (32, LONGEST), "are recomputed"),
    "recomputed": ((LONGEST - 1, 150), (32, 144), "are recomputed"),
    "always recomputed": ((0, STEP), (0, STEP), "every example"),
    "recomputed, just": ((0, LONGEST), (0, LONGEST), "every example"),
}


@pytest.fixture(scope="module")
def small(data, tmp_path_factory):
    """Return (job, trainer) of one step; a held-out example is longer than what is trained on."""
    job, trainer = made(data, tmp_path_factory.mktemp("small"), [LONGEST, 12, 30, 21])
    job.held_out = [t.Example("", [], prompt_ids=[5] * 99, reply_ids=[7] * 99)]
    return job, trainer


@pytest.mark.parametrize("name", FOUND)
def test_what_fits_is_found_by_trying(small, gpu, capsys, name):
    job, trainer = small
    (kept, recomputed), limits, word = FOUND[name]
    recorder = Recorder(trainer)
    with give_memory(trainer, kept, recomputed):
        look_for_memory(trainer, job)
    trainer.remove_callback(recorder)
    recorder.stop()
    found = job.token_limits
    assert (found.tokens_at_once, found.tokens_at_once_recomputed) == limits
    assert word in capsys.readouterr().out
    # The first trial is a whole step, as wide as the longest example, with every token learned.
    first = recorder.trained[0]
    assert first["size"] == STEP and len(first["rows"]) == 4
    assert first["scored"] == STEP - 4 and len(recorder.trained) <= 2 * 6
    for trial in recorder.trained:  # each is as hard as a step of so many tokens can be
        rows, width = trial["mask"].shape
        # Padding takes memory of its own, so it is there unless one row has all tokens.
        assert trial["mask"].sum() == rows * width - (rows - 1)
        assert width >= LONGEST or rows == 1
    # A tenth and AdamW's two numbers for each trained weight are left while trying, and later a
    # little for what allocates outside of torch's view.
    states = 2 * 4 * sum(p.numel() for p in lora(trainer.model).values()) / (100 * 2**30)
    assert gpu == [pytest.approx(0.9 * 0.4 - states, rel=1e-9), pytest.approx(0.97 * 0.4)]
    # Nothing is left of it: no gradient, and the random numbers are those of the seed.
    assert not [n for n, p in trainer.model.named_parameters() if p.grad is not None]
    drawn = torch.rand(3)
    transformers.set_seed(42)
    assert drawn.equal(torch.rand(3))


@pytest.mark.parametrize(("kept", "recomputed"), [(20, LONGEST - 7), (0, 0)])
def test_a_single_example_that_does_not_fit_ends_the_run(small, gpu, kept, recomputed):
    job, trainer = small
    fits = f"about {recomputed // 16 * 16:,} tokens"
    with give_memory(trainer, kept, recomputed), pytest.raises(t.UserError) as error:
        look_for_memory(trainer, job)
    message = str(error.value)
    assert f"{LONGEST} tokens" in message and "40.0 GiB" in message and "MAX_SEQ_LEN" in message
    assert fits in message and "BATCH_SIZE" not in message


def test_a_trained_part_that_is_larger_than_the_gpu_is_one_message(small, gpu, monkeypatch):
    job, trainer = small
    monkeypatch.setattr(job.plan, "trainable", 10**12)
    with give_memory(trainer, 0), pytest.raises(t.UserError, match="does not fit"):
        look_for_memory(trainer, job)
    assert gpu == [0]


def test_on_a_cpu_nothing_is_tried(small, monkeypatch):
    job, trainer = small
    monkeypatch.setattr(trainer.model, "forward", lambda *_, **__: pytest.fail("tried something"))
    t.find_what_fits(trainer, job)
    assert job.token_limits.most() >= STEP


# ---- a run in parts ----------------------------------------------------------------------------

LENGTHS = [*range(40, 51), 12, 30]  # four steps: 4 + 4 + 4 + 1
ROOMS = {  # room with activations kept, and recomputed; the passes, and how many are recomputed
    "two or three of four": ((120, 0), (7, 0)),
    "one by one": ((64, 0), None),
    "all recomputed": ((0, STEP + 12), (4, 4)),
    "recomputed in parts": ((0, 120), None),
    "long ones recomputed": ((45, 110), None),
}


def trained(data, folder, room=None, lengths=LENGTHS):
    """Train for an epoch, on a simulated GPU with this room; return (job, recorder)."""
    job, trainer = made(data, folder, lengths)
    if room is None:
        t.find_what_fits(trainer, job)
    else:
        give_memory(trainer, *room)
        look_for_memory(trainer, job)
    recorder = Recorder(trainer)
    t.train(trainer, job)
    return job, recorder


@pytest.fixture(scope="module")
def in_whole_steps(data, tmp_path_factory):
    """Return (job, recorder) of four steps, each in one pass."""
    return trained(data, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("name", ROOMS)
def test_the_loss_and_the_gradients_do_not_depend_on_the_parts(
    data, in_whole_steps, gpu, tmp_path, name
):
    room, counts = ROOMS[name]
    job, recorder = trained(data, tmp_path, room)
    whole_job, whole = in_whole_steps
    assert len(whole.trained) == 4 and not any(one["is_recomputed"] for one in whole.trained)
    for key in ("loss", "grad_norm", "eval_loss", "num_input_tokens_seen"):
        expected = logged(whole_job.history, key)
        assert logged(job.history, key) == pytest.approx(expected, rel=1e-3), key
    # Each step's weights differ by what the steps before have rounded, so the first one counts.
    assert_near(recorder.gradients[0], whole.gradients[0])
    # Each row goes through once, in parts that fit and are no wider than their longest row; only
    # what is too long to keep its activations is computed again.
    rows = [
        sorted(row for one in found.trained for row in one["rows"]) for found in (recorder, whole)
    ]
    assert rows[0] == rows[1]
    kept, recomputed = room
    for one in recorder.trained:
        lengths = [len(row) for row in one["rows"]]
        assert one["size"] == len(lengths) * max(lengths)
        assert one["size"] <= (max(kept, recomputed) if one["is_recomputed"] else kept)
        assert not one["is_recomputed"] or max(lengths) > kept - 16
    passes = len(recorder.trained), [one["is_recomputed"] for one in recorder.trained].count(True)
    if counts:
        assert passes == counts
    assert {"all recomputed": passes[1] == passes[0], "recomputed in parts": passes[1] > 4}.get(
        name, True
    )


def test_the_losses_are_those_of_each_row_alone(in_whole_steps):
    """So the padding of a row changes nothing, and nothing is a mean of means."""
    job, recorder = in_whole_steps
    recorder.stop()
    model = recorder.model.eval()
    for name, weight in lora(model).items():
        weight.data.copy_(recorder.weights[0][name])
    first = [one for one in job.examples if one.input_ids in recorder.trained[0]["rows"]]
    assert len({len(one.reply_ids) for one in first}) > 1
    loss = logged(job.history, "loss")[0]
    assert loss == pytest.approx(token_loss(model, first), rel=ROUNDING)


def test_recomputation_draws_the_same_dropout(data, gpu, tmp_path):
    found = []
    for name, room in (("kept", (10_000, 0)), ("recomputed", (0, 10_000))):
        data = [*data, "--lora_dropout", "0.5"]
        job, recorder = trained(data, tmp_path / name, room, [40] * 4)
        found.append((logged(job.history, "loss")[0], recorder.gradients[0]))
        assert recorder.trained[0]["is_recomputed"] == (name == "recomputed")
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert_near(found[0][1], found[1][1])


def test_logits_are_made_only_where_a_token_is_learned(in_whole_steps):
    """With 248,320 words in the vocabulary they are the largest tensor of all."""
    job, recorder = in_whole_steps
    learned = {tuple(one.input_ids): len(one.reply_ids) for one in job.examples}
    for one in recorder.trained + recorder.evaluated:
        assert one["scored"] == sum(learned[tuple(row)] for row in one["rows"])


# ---- evaluation --------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [10_000, 90, 47, 1])
def test_evaluation_does_not_depend_on_its_batches(small, room):
    """Where the memory is smaller than was thought, it goes on with fewer at once."""
    job, trainer = small
    model, sizes = trainer.model, []
    examples = [*job.examples, job.examples[1]]
    expected = [token_loss(model.eval(), [one]) * len(one.reply_ids) for one in examples]

    def run_out(model, _, inputs):
        assert not model.training  # so dropout is off
        if inputs["input_ids"].numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(inputs["input_ids"].numel())

    with model.register_forward_pre_hook(run_out, with_kwargs=True):
        losses = t.example_losses(model.train(), examples, room, "held-out loss")
    assert losses == pytest.approx(expected, rel=ROUNDING) and model.training
    assert max(sizes) <= max(min(room, 100), LONGEST)
    with (
        model.register_forward_pre_hook(run_out, with_kwargs=True),
        pytest.raises(torch.OutOfMemoryError),
    ):  # nothing is smaller than one example
        t.example_losses(model, job.held_out, room, "")


# ---- the message -------------------------------------------------------------------------------


def test_out_of_memory_in_a_step_is_one_message(flags, tmp_path, monkeypatch, capfd):
    def run_out(trainer):
        def check(model, *_):
            if model.training and trainer.state.global_step == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.89 GiB")

        trainer.model.register_forward_hook(check)

    on_trainer(monkeypatch, run_out)
    message = refused(capfd, flags)
    assert "1.89 GiB" in message and "MAX_SEQ_LEN" in message
    assert checkpoints(tmp_path / "output") == [3]
