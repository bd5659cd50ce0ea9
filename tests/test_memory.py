"""Memory: in how many parts a step goes through the model, and that this changes nothing."""

import contextlib
import math
import random
import types

import pytest
import torch
import transformers
from conftest import write_short_data
from trainers import (
    ROUNDING,
    Recorder,
    assert_near,
    give_examples,
    inputs_of,
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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return the flags of a short run whose data stays for the whole module."""
    return write_short_data(tmp_path_factory.mktemp("data"))


@contextlib.contextmanager
def recorded(trainer):
    """Record what the trainer's model is given for a while."""
    recorder = Recorder(trainer)
    try:
        yield recorder
    finally:
        trainer.remove_callback(recorder)
        for handle in recorder.handles:
            handle.remove()


# ---- a step in parts ----------------------------------------------------------------------------


def padded(lengths):
    """Return a step of examples of these lengths, padded on the right."""
    width = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    ids = torch.arange(1, len(lengths) * width + 1).view(-1, width) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)}


def rows_in(inputs):
    """Return the ids and labels of each row, without its padding."""
    columns = [inputs[key] for key in ("input_ids", "labels", "attention_mask")]
    return [
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for ids, labels, mask in zip(*columns, strict=True)
    ]


def test_the_parts_hold_every_row_once_and_fit():
    numbers = random.Random(0)
    for _ in range(300):
        lengths = [numbers.randint(1, 60) for _ in range(numbers.randint(1, 9))]
        widest = max(lengths)
        kept = numbers.choice([0, numbers.randint(0, 100), 10_000])
        recomputed = max(kept, widest, numbers.randint(1, 200))
        inputs = padded(lengths)
        parts = t.split_step(inputs, t.MemoryLimits(kept, recomputed))
        assert sorted(row for part, _ in parts for row in rows_in(part)) == sorted(rows_in(inputs))
        for part, is_recomputed in parts:
            assert part.keys() == inputs.keys()
            size, longest = part["input_ids"].numel(), part["attention_mask"].sum(1).max()
            assert size == len(part["input_ids"]) * longest  # no padding that none of it needs
            assert size <= (recomputed if is_recomputed else kept)
            assert is_recomputed == (longest > kept)


@pytest.mark.parametrize(
    ("lengths", "kept", "recomputed", "sizes"),
    [
        ([9, 10, 8, 10], 40, 40, [(40, False)]),
        ([9, 10, 8, 10], 39, 39, [(30, False), (8, False)]),
        ([9, 10, 8, 10], 20, 20, [(20, False), (18, False)]),
        ([9, 10, 8, 10], 19, 19, [(10, False), (10, False), (18, False)]),
        ([4, 10, 4, 10], 9, 20, [(20, True), (8, False)]),
        ([4, 10, 4, 10], 9, 10, [(10, True), (10, True), (8, False)]),
        ([4, 10, 4, 10], 0, 40, [(40, True)]),
    ],
)
def test_a_step_has_as_few_parts_as_fit(lengths, kept, recomputed, sizes):
    parts = t.split_step(padded(lengths), t.MemoryLimits(kept, recomputed))
    assert [(part["input_ids"].numel(), again) for part, again in parts] == sizes


LENGTHS = {"with padding": [30, 12, 47, 21], "without": [24, 24, 24, 24]}
SPLITS = {  # (kept, recomputed), and for either of the above passes and recomputed ones
    "whole": ((10_000, 10_000), {"with padding": (1, 0), "without": (1, 0)}),
    "two of two": ((2 * 47, 2 * 47), {"with padding": (2, 0), "without": (2, 0)}),
    "as long as the longest": ((47, 47), {"with padding": (3, 0), "without": (4, 0)}),
    "recomputed": ((0, 10_000), {"with padding": (1, 1), "without": (1, 1)}),
    "recomputed in parts": ((0, 50), {"with padding": (3, 3), "without": (2, 2)}),
    "long ones recomputed": ((25, 60), {"with padding": (4, 2), "without": (4, 0)}),
}


@pytest.fixture(scope="module")
def adapted(data, tmp_path_factory):
    """Return (job, trainer) before the first step, with an adapter that has an effect."""
    folder = tmp_path_factory.mktemp("adapted")
    job = prepared([*data, "--lora_dropout", "0", "--output_dir", str(folder)])
    trainer = t.build_trainer(job)
    t.find_what_fits(trainer, job)
    set_b(trainer.model)
    return job, trainer


@pytest.fixture(scope="module", params=LENGTHS)
def step(request, adapted):
    """Return a step's examples, and its loss and gradients by other means.

    Each row goes through the model alone and unpadded; the sum of all is divided by all tokens.
    """
    job, trainer = adapted
    give_examples(job, LENGTHS[request.param])
    total, count = 0, 0
    for example in job.train:
        n = len(example.reply_ids)
        logits = trainer.model(input_ids=torch.tensor([example.input_ids])).logits[0, -n - 1 : -1]
        targets = torch.tensor(example.reply_ids)
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        count += n
    (total / count).backward()
    gradients = {name: p.grad.clone() for name, p in lora(trainer.model).items()}
    trainer.model.zero_grad()
    loss = total.item() / count
    return types.SimpleNamespace(
        name=request.param, examples=job.train, tokens=count, loss=loss, gradients=gradients
    )


@pytest.mark.parametrize("split", SPLITS)
def test_loss_and_gradients_are_the_same_whatever_the_split(adapted, step, split):
    job, trainer = adapted
    limits, counts = SPLITS[split]
    passes, recomputed = counts[step.name]
    job.token_limits = t.MemoryLimits(*limits)
    calls = []
    layer = trainer.model.get_submodule("base_model.model.model.layers.0.mlp")
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(None))
    with recorded(trainer) as recorder:
        inputs = inputs_of(trainer, step.examples)
        loss = trainer.training_step(
            trainer.model, inputs, num_items_in_batch=torch.tensor(step.tokens)
        )
    handle.remove()
    gradients = {name: p.grad for name, p in lora(trainer.model).items()}
    trainer.model.zero_grad()
    assert loss.item() == pytest.approx(step.loss, rel=ROUNDING) and not loss.requires_grad
    assert_near(gradients, step.gradients)
    assert len(recorder.trained) == passes
    assert [one["is_recomputed"] for one in recorder.trained].count(True) == recomputed
    assert len(calls) == passes + recomputed  # the layers of those parts have run twice


def test_recomputation_draws_the_same_dropout(data, tmp_path):
    job = prepared([*data, "--lora_dropout", "0.5", "--output_dir", str(tmp_path)])
    trainer = t.build_trainer(job)
    t.find_what_fits(trainer, job)
    set_b(trainer.model)
    examples = sorted(job.train[:4], key=lambda one: -len(one.input_ids))  # as a part has them
    found = []
    for limits in ((10_000, 10_000), (0, 10_000)):
        job.token_limits = t.MemoryLimits(*limits)
        torch.manual_seed(0)
        inputs = inputs_of(trainer, examples)
        loss = trainer.training_step(trainer.model, inputs, num_items_in_batch=torch.tensor(99))
        found.append((loss, {name: p.grad.clone() for name, p in lora(trainer.model).items()}))
        trainer.model.zero_grad()
    assert found[0][0] == found[1][0]
    assert_near(found[0][1], found[1][1])


def test_logits_are_made_only_where_a_token_is_learned(adapted, step):
    """With 248,320 words they are the largest tensor of all."""
    job, trainer = adapted
    job.token_limits = t.MemoryLimits(10_000, 10_000)
    inputs = inputs_of(trainer, step.examples)
    with recorded(trainer) as recorder:
        t.example_losses(trainer.model, step.examples, 10_000, "")
        trainer.compute_loss(trainer.model.train(), inputs, num_items_in_batch=1)
    learned = (inputs["labels"][:, 1:] != -100).sum()
    assert recorder.trained[0]["scored"] == recorder.evaluated[0]["scored"] == learned
    assert learned <= inputs["labels"].numel() / 2


# ---- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [(10_000, 10_000), (60, 90), (0, 47), (100, 0)], ids=str)
def test_evaluation_does_not_depend_on_its_batches(adapted, limits):
    job, trainer = adapted
    model = trainer.model
    give_examples(job, [30, 12, 47, 21])
    examples = [*job.train, job.train[1]]
    job.token_limits = t.MemoryLimits(*limits)
    expected = [
        token_loss(model.eval(), [example]) * len(example.reply_ids) for example in examples
    ]
    for mode in (True, False):
        model.train(mode)
        with recorded(trainer) as recorder:
            losses = t.example_losses(model, examples, max(limits), "held-out loss")
        assert losses == pytest.approx(expected, rel=ROUNDING)
        assert model.training == mode and not recorder.trained  # so dropout was off
        sizes = [one["size"] for one in recorder.evaluated]
        assert max(sizes) <= max(*limits, 47)
        assert len(sizes) == {10_000: 1, 90: 3, 47: 4, 100: 2}[max(limits)]


def test_evaluation_that_runs_out_of_memory_goes_on_with_half_as_much(adapted):
    """As where another program takes the memory later; less stays enough, so it is tried once."""
    job, trainer = adapted
    give_examples(job, [30] * 7 + [12])
    expected = [token_loss(trainer.model.eval(), [one]) * len(one.reply_ids) for one in job.train]

    def run_out(model, _, inputs):
        if inputs["input_ids"].numel() > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = trainer.model.register_forward_pre_hook(run_out, with_kwargs=True)
    with handle, recorded(trainer) as recorder:
        room = 75
        losses = t.example_losses(trainer.model, job.train, 10_000, "")
        sizes = [one["size"] for one in recorder.evaluated]
        room = 29
        with pytest.raises(torch.OutOfMemoryError):  # nothing is smaller than one example
            t.example_losses(trainer.model, job.train, 10_000, "")
    assert losses == pytest.approx(expected, rel=ROUNDING)
    assert [size for size in sizes if size <= 75] == [60, 60, 60, 60]
    assert len(sizes) <= 2 + 4


def test_the_held_out_loss_is_a_mean_over_tokens(adapted):
    job, trainer = adapted
    job.token_limits = t.MemoryLimits(0, 100)
    trained = token_loss(trainer.model.eval(), job.held_out)
    with trainer.model.disable_adapter():
        base = token_loss(trainer.model, job.held_out)
    assert trained != pytest.approx(base, rel=3 * ROUNDING)
    for steps, expected in ((1, trained), (0, base)):  # before the first step it is the base's
        trainer.state.global_step = steps
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=ROUNDING)


# ---- what fits on a simulated GPU ---------------------------------------------------------------


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


def give_memory(trainer, kept, recomputed=0):
    """Let a pass over more tokens run out of memory, with activations kept or recomputed."""

    def run_out(model, _, inputs, __):
        if model.training and "input_ids" in inputs:
            room = max(kept, recomputed) if is_recomputing(model) else kept
            if inputs["input_ids"].numel() > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    return trainer.model.register_forward_hook(run_out, with_kwargs=True)  # removed by `with`


def look_for_memory(trainer, job):
    """Find what fits on the simulated GPU."""
    job.settings.DEVICE = "cuda"
    try:
        t.find_what_fits(trainer, job)
    finally:
        job.settings.DEVICE = "cpu"


WIDTH = 47
FOUND = {  # room with activations kept, and recomputed: the limits, and a word of what is said
    "a whole step": ((4 * WIDTH, 0), (188, 188), "whole step"),
    "three examples": ((3 * WIDTH, 0), (128, 128), "parts"),
    "one example": ((WIDTH + 1, 0), (48, 48), "parts"),
    "recomputed": ((WIDTH - 1, 150), (32, 144), "twice"),
    "always recomputed": ((0, 4 * WIDTH), (0, 188), "twice"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_fits_is_found_by_trying(adapted, gpu, capsys, monkeypatch, name):
    job, trainer = adapted
    (kept, recomputed), limits, word = FOUND[name]
    monkeypatch.setattr(job, "held_out", [])
    give_examples(job, [WIDTH, 12, 30, 21])
    capsys.readouterr()
    with recorded(trainer) as trials, give_memory(trainer, kept, recomputed):
        look_for_memory(trainer, job)
    found = job.token_limits
    assert (found.tokens_at_once, found.tokens_at_once_recomputed) == limits
    text = capsys.readouterr().out
    assert word in text and text.startswith("memory ")
    # The first trial is a whole step, as wide as the longest example, with every token learned.
    first = trials.trained[0]
    assert first["size"] == 4 * WIDTH and len(first["rows"]) == 4
    assert first["scored"] == 4 * (WIDTH - 1) and len(trials.trained) <= 2 * 6
    # A tenth and AdamW's two numbers for each trained weight are left while trying, and later a
    # little for what allocates outside of torch's view.
    states = 2 * 4 * sum(p.numel() for p in lora(trainer.model).values()) / (100 * 2**30)
    assert gpu == [pytest.approx(0.9 * 0.4 - states, rel=1e-9), pytest.approx(0.97 * 0.4)]
    # Nothing is left of it: no gradient, and the random numbers are those of the seed.
    assert not [n for n, p in trainer.model.named_parameters() if p.grad is not None]
    drawn = torch.rand(3)
    transformers.set_seed(42)
    assert drawn.equal(torch.rand(3))
    embedding = trainer.model.get_input_embeddings()
    assert not embedding(torch.tensor([1])).requires_grad


def test_a_trial_is_at_least_as_hard_as_any_step_of_so_many_tokens(adapted):
    """By its tokens, by its attention, which is a square for each row, and by what is learned."""
    _, trainer = adapted
    for tokens in (*range(16, 4 * WIDTH, 16), WIDTH - 1, WIDTH, WIDTH + 1, 4 * WIDTH):
        with recorded(trainer) as trials:
            assert t.pass_fits(trainer, tokens, WIDTH, False)
        (trial,) = trials.trained
        rows, width = trial["mask"].shape
        assert trial["mask"].all() and width >= min(WIDTH, tokens)
        for count in range(1, tokens + 1):  # the rows of a step, as long as they may be
            longest = min(WIDTH, tokens // count)
            assert count * longest <= rows * width
            assert count * longest**2 <= rows * width**2
            assert count * (longest - 1) <= trial["scored"]


def test_a_single_example_that_does_not_fit_ends_the_run(adapted, gpu, monkeypatch):
    job, trainer = adapted
    monkeypatch.setattr(job, "held_out", [])
    give_examples(job, [WIDTH, 12])
    with give_memory(trainer, 20, WIDTH - 7), pytest.raises(SystemExit) as stop:
        look_for_memory(trainer, job)
    message = str(stop.value.code)
    assert f"{WIDTH} tokens" in message and "40.0 GiB" in message and "MAX_SEQ_LEN" in message
    assert "about 32 tokens" in message and "BATCH_SIZE" not in message


@pytest.mark.parametrize("room", [(WIDTH, 0), (0, WIDTH)], ids=["kept", "recomputed"])
def test_a_single_example_that_just_fits_is_not_refused(adapted, gpu, monkeypatch, room):
    job, trainer = adapted
    monkeypatch.setattr(job, "held_out", [])
    give_examples(job, [WIDTH, 12])
    with give_memory(trainer, *room):
        look_for_memory(trainer, job)
    assert job.token_limits.most() == WIDTH


def test_a_long_held_out_example_refuses_no_training(adapted, gpu):
    """It is only evaluated, which takes less memory, and by itself if it is so long."""
    job, trainer = adapted
    give_examples(job, [10, 12])
    assert max(len(example.input_ids) for example in job.held_out) > 20
    with recorded(trainer) as trials, give_memory(trainer, 20):
        look_for_memory(trainer, job)
        losses = t.example_losses(trainer.model, job.held_out, job.token_limits.most(), "")
    assert trials.trained[0]["size"] == 4 * 12 and len(losses) == len(job.held_out)


def test_a_trained_part_that_is_larger_than_the_gpu_is_one_message(adapted, gpu, monkeypatch):
    job, trainer = adapted
    monkeypatch.setattr(job.plan, "trainable", 10**12)
    with give_memory(trainer, 0), pytest.raises(SystemExit, match="does not fit"):
        look_for_memory(trainer, job)
    assert gpu == [0]


def test_on_a_cpu_a_whole_step_goes_through_at_once(data, tmp_path, monkeypatch):
    """Without a trial: nobody needs to wait for one."""
    job = prepared([*data, "--output_dir", str(tmp_path)])
    trainer = t.build_trainer(job)
    monkeypatch.setattr(trainer.model, "forward", lambda *_, **__: pytest.fail("tried something"))
    t.find_what_fits(trainer, job)
    widest = max(len(example.input_ids) for example in job.train)
    assert job.token_limits == t.MemoryLimits(4 * widest, 4 * widest)


def test_the_largest_that_fits_is_found_in_few_trials():
    numbers = random.Random(0)
    for _ in range(300):
        most = numbers.randint(1, 3000)
        room = numbers.choice([0, most, numbers.randint(0, most), numbers.randint(0, 20)])
        tried = []

        def fits(tokens, tried=tried, room=room):
            tried.append(tokens)
            return tokens <= room

        found = t.largest_that_fits(fits, most)
        assert found == (most if room >= most else room // 16 * 16)
        assert len(tried) <= 2 + math.log2(most / 16 + 1)


# ---- whole runs ---------------------------------------------------------------------------------


def four_steps(data, folder, kept=None, recomputed=0):
    """Train for four steps, on a simulated GPU with this room; return log, gradients, passes."""
    more = ["--lora_dropout", "0", "--num_epochs", "1", "--output_dir", str(folder)]
    job = prepared([*data, *more])
    give_examples(job, range(40, 53))
    job.held_out = job.train[:3]
    trainer = t.build_trainer(job)
    if kept is None:
        t.find_what_fits(trainer, job)
    else:
        give_memory(trainer, kept, recomputed)
        look_for_memory(trainer, job)
    set_b(trainer.model)
    recorder = Recorder(trainer)
    t.train(trainer, job)
    return job.history, recorder.gradients, recorder.trained


@pytest.fixture(scope="module")
def on_a_cpu(data, tmp_path_factory):
    """Return log, gradients and passes of four steps, each in one pass."""
    return four_steps(data, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(("kept", "recomputed", "passes"), [(120, 0, 7), (64, 0, 13), (0, 120, 7)])
def test_a_run_in_parts_learns_what_one_in_whole_steps_does(
    data, on_a_cpu, gpu, tmp_path, kept, recomputed, passes
):
    """13 examples of like length are four steps: 4 + 4 + 4 + 1."""
    history, gradients, trained = four_steps(data, tmp_path, kept, recomputed)
    assert len(on_a_cpu[2]) == 4 and len(trained) == passes
    assert all(one["is_recomputed"] == (kept == 0) for one in trained)
    for key in ("loss", "grad_norm", "eval_loss", "num_input_tokens_seen"):
        assert logged(history, key) == pytest.approx(logged(on_a_cpu[0], key), rel=1e-3), key
    # Each step's weights differ by what the steps before have rounded, so the first one counts.
    assert_near(gradients[0], on_a_cpu[1][0])


def test_out_of_memory_in_a_step_is_one_message(flags, tmp_path, monkeypatch, capfd):
    def run_out(trainer):
        def check(model, *_):
            if model.training and trainer.state.global_step == 6:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.89 GiB")

        trainer.model.register_forward_hook(check)

    on_trainer(monkeypatch, run_out)
    message = refused(capfd, flags)
    assert "1.89 GiB" in message and "MAX_SEQ_LEN" in message
    assert (tmp_path / "output" / "checkpoints" / "checkpoint-6" / "complete.json").exists()
