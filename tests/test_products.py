"""Section 7: products in scaled float16, what is converted, what is chosen, and whole runs."""

import json
import math
import re
import shutil
import signal
import sys
import types

import pytest
import torch
import torch.utils.benchmark
import transformers
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_layers import GradientCheckpointingLayer

import train_lora_single as t

ADAPTER = "final_lora/adapter_model.safetensors"
DTYPES = [torch.bfloat16, torch.float32]
# The most by which a dtype rounds a number, as a share of it: half of its step.
HALF_STEP = {dtype: torch.finfo(dtype).eps / 2 for dtype in (*DTYPES, torch.float16)}
K, D = 96, 40


# ---- one product -------------------------------------------------------------------------------


def some(*shape, seed=0):
    """Return random numbers that bfloat16 and float16 both hold, none of them near zero."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(*shape, generator=generator)
    return (numbers + 0.125 * numbers.sign()).bfloat16().float()


def outlier(row):
    """Return ones with one outlier, which is met by a weight of about the others' size."""
    row = torch.ones_like(row)
    row[7] = 1e6
    return row


# What a row may hold, and whether plain float16 gives infinity (or NaN) or zero for it.
HOSTILE = {
    "ordinary": (lambda row: row, None),
    "1e30": (lambda row: 1e30 * row, math.inf),
    "1e37": (lambda row: 1e37 * row / row.abs().max(), math.inf),
    "1e-30": (lambda row: 1e-30 * row, 0),
    "subnormal": (lambda row: 1e-39 * row, 0),
    "zeros": (lambda row: 0 * row, None),
    "outlier": (outlier, math.inf),
    "tiny beside ordinary": (lambda row: torch.where(row > 0, row, 1e-20), None),
    "float16's largest": (lambda row: 65504 * row.sign(), math.inf),
}


def error_allowed(rows, weight, exact):
    """Return how far rows @ weight, by element and in float64, may be from exact.

    The result is rounded to float16, then to its own dtype; float32's rows are rounded before.
    Below 2**-14 of a row's largest number, or of its power of two, float16 rounds by 2**-25.
    """
    dtype, rows = rows.dtype, rows.double().abs()
    size, largest = rows @ weight.abs(), rows.amax(-1, keepdim=True)
    rounded = (HALF_STEP[torch.float16] + HALF_STEP[dtype]) * exact.abs()
    sums = K * 2**-24 * size  # of float32's sums, in any order
    if dtype == torch.float32:
        sums = sums + HALF_STEP[torch.float16] * size
    # The least power of two is float32's least normal number.
    fixed = 2**-25 * largest.clamp_min(2.0**-126) * (weight.abs().sum(0) + 1)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # a subnormal step
    return (rounded + sums + fixed) * 1.01 + least  # 1.01: errors of errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_product_errs_by_bfloat16s_rounding_where_float16_fails(name, dtype):
    change, plain = HOSTILE[name]
    weight = some(K, D).half()
    rows = torch.stack([change(row) for row in some(3, K, seed=1)]).to(dtype)
    exact = rows.double() @ weight.double()
    assert rows.isfinite().all() and (rows.float() @ weight.float()).isfinite().all()
    found = t.scaled_product(rows, weight)
    assert found.dtype == dtype and found.shape == (3, D)
    error = (found.double() - exact).abs()
    assert (error <= error_allowed(rows, weight.double(), exact)).all()
    if name not in ("zeros", "subnormal"):  # the bound itself is small
        assert error.norm() <= 2**-8 * exact.norm()
    naive = rows.half() @ weight
    if plain is not None:
        assert not naive.isfinite().all() if plain else not naive.any()
        assert exact.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_power_of_two_costs_nothing(dtype):
    """Rows that differ by powers of two give results that do; so the scale is one."""
    weight, row = some(K, D).half(), some(1, K, seed=1).to(dtype)
    powers = 2.0 ** torch.tensor([[-100], [-30], [-1], [0], [1], [15], [16], [100]])
    found = t.scaled_product((row * powers).to(dtype), weight)
    assert found.any() and found.equal((found[3] * powers).to(dtype))


def test_rows_in_another_order_of_memory_are_one_product():
    """A transposed gradient must not become a product for each of its rows."""
    rows, weight = some(3, 5, K).transpose(0, 1), some(K, D).half()
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, _, args=(), kwargs=None):
            seen.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Products():
        found = t.scaled_product(rows, weight)
    torch.testing.assert_close(found, rows @ weight.float(), rtol=2**-9, atol=2**-9)
    assert "mm.default" in seen and not [name for name in seen if "bmm" in name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_so_and_spoils_no_other(bad, dtype):
    weight, rows = some(K, D).half(), some(4, K, seed=1).to(dtype)
    expected = t.scaled_product(rows, weight)
    rows[2, 5] = bad
    found = t.scaled_product(rows, weight)
    assert not found[2].isfinite().any()
    plain = rows[2].float() @ weight.float()  # infinite with the weights' signs
    assert found[2].float().equal(plain) or (found[2].isnan().all() and plain.isnan().all())
    others = [0, 1, 3]
    assert found[others].equal(expected[others]) and expected.isfinite().all()


# ---- a converted module ------------------------------------------------------------------------


class Model(torch.nn.Module):
    """What a model of transformers has, with these modules in its first layer."""

    def __init__(self, dtype=torch.bfloat16, **modules):
        super().__init__()
        self.dtype, self.embedding = dtype, torch.nn.Embedding(3, 4, dtype=dtype)
        self.layers = torch.nn.ModuleList([torch.nn.ModuleDict(modules)])

    def get_input_embeddings(self):
        return self.embedding


def converted(weight, bias=None, dtype=torch.bfloat16):
    """Return a frozen linear module with these numbers, converted."""
    module = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None, dtype=dtype)
    module.weight.data = weight.to(dtype)
    if bias is not None:
        module.bias.data = bias.to(dtype)
    t.use_float16(Model(dtype, projection=module.requires_grad_(False)))
    assert module.weight.dtype == torch.float16
    return module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 1e30, 1e-30, 0])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 3)], ids=str)
def test_the_gradient_of_a_converted_module_is_the_weights_product(shape, size, dtype):
    weight, bias = some(K, D), some(K, seed=2)  # K is what its backward pass sums over
    module = converted(weight, bias, dtype)
    rows = some(*shape, D, seed=1).to(dtype).requires_grad_()
    gradient = (size * some(*shape, K, seed=3)).to(dtype)
    result = module(rows)
    result.backward(gradient)
    assert result.dtype == rows.grad.dtype == dtype
    assert result.shape == (*shape, K) and rows.grad.shape == rows.shape
    exact = gradient.double() @ weight.double()
    error = (rows.grad.double() - exact).abs()
    assert (error <= error_allowed(gradient, weight.double(), exact)).all()
    assert bool(rows.grad.any()) == bool(size)
    product = rows.detach().double() @ weight.double().T
    allowed = error_allowed(rows.detach(), weight.double().T, product)
    exact = product + bias.double()
    error = (result.detach().double() - exact).abs()
    assert (error <= allowed + HALF_STEP[dtype] * (exact.abs() + allowed)).all()


def test_a_gradient_that_is_not_finite_spoils_no_other_row():
    module = converted(some(K, D))
    rows, gradient = some(3, D, seed=1).bfloat16().requires_grad_(), some(3, K, seed=3).bfloat16()
    gradient[1, 4] = math.inf
    module(rows).backward(gradient)
    assert rows.grad.isfinite().all(1).tolist() == [True, False, True]
    assert not rows.grad[1].isfinite().any()


def test_a_converted_module_keeps_no_rows_for_the_backward_pass():
    """What is kept of a batch is memory, which decides what is recomputed."""
    module, kept = converted(some(K, D)), []
    rows = some(3, D, seed=1).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        module(rows)
    assert kept == []


# ---- what use_float16() converts ---------------------------------------------------------------


def load(folder, dtype, products="dtype"):
    """Return the model of a folder as a run with these products has it."""
    args = t.parse_args(["--demo", "--model_name", str(folder), "--dtype", dtype])
    model = t.load_model(args).eval()
    if products == "float16":
        t.use_float16(model)
    return model


@pytest.fixture(params=["tied", "untied"])
def folder(request, tiny, untied):
    """Return the path of the demo model, with its head tied to the embedding and without."""
    return {"tied": tiny, "untied": untied}[request.param]


def left_out(text):
    """Return what the only line that is printed excepts."""
    line = r"products the frozen modules compute in scaled float16(?:, except (.*))?\n"
    return re.fullmatch(line, text)[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_exactly_the_linear_modules_and_a_tied_embedding_become_float16(folder, dtype, capsys):
    before, model = load(folder, dtype), load(folder, dtype, "float16")
    found, old = dict(before.named_modules()), before.state_dict()
    weights = {f"{n}.weight" for n, one in found.items() if type(one) is torch.nn.Linear}
    assert len(weights) == 5 + 4 + 2 * 3 + 1  # DeltaNet, attention, two feed-forwards, the head
    if before.lm_head.weight is before.get_input_embeddings().weight:
        weights.add("model.embed_tokens.weight")
    for name, weight in model.state_dict().items():
        assert (weight.dtype == torch.float16) == (name in weights), name
        if name in weights:
            assert weight.equal(old[name].half()), name
        else:
            assert weight.equal(old[name]) and weight.dtype == getattr(torch, dtype), name
    assert left_out(capsys.readouterr().out) is None
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        plain, scaled = before(input_ids=ids).logits, model(input_ids=ids).logits
    assert plain.dtype == scaled.dtype == getattr(torch, dtype)
    difference = (scaled.float() - plain.float()).norm() / plain.float().norm()
    assert 0 < difference < {"bfloat16": 2**-5, "float32": 2**-8}[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_embedding_gives_the_models_dtype(folder, dtype, tmp_path):
    """Some of its weights are between two numbers of float16."""

    def change(tensors):
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors:
                tensors[name] = tensors[name].float()
                tensors[name][7, :4] = torch.tensor([1 + 2**-11, -2e-8, 3e-5, 0.3])

    folder = changed(folder, tmp_path / "model", change)
    before, model = load(folder, dtype), load(folder, dtype, "float16")
    ids = torch.arange(2048)[None]
    expected, found = before.get_input_embeddings()(ids), model.get_input_embeddings()(ids)
    assert found.dtype == expected.dtype == getattr(torch, dtype)
    is_tied = before.lm_head.weight is before.get_input_embeddings().weight
    assert found.equal(expected) == (not is_tied)
    assert found.equal(expected.half().to(expected.dtype) if is_tied else expected)


def changed(folder, new, change):
    """Return the path of a copy of a model's folder whose tensors are changed."""
    shutil.copytree(folder, new)
    tensors = load_file(new / "model.safetensors")
    change(tensors)
    save_file(tensors, new / "model.safetensors", {"format": "pt"})
    return new


# ---- the head ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_heads_logits_are_finite_and_err_no_more_than_bfloat16s(folder, dtype, name):
    model, weight = load(folder, dtype, "float16"), load(folder, "float32").lm_head.weight
    size = weight.shape[1]
    rows = torch.stack([HOSTILE[name][0](row) for row in some(3, size, seed=1)])
    rows = rows.to(getattr(torch, dtype))
    exact = rows.double() @ weight.double().T
    with torch.no_grad():
        found = model.lm_head(rows[:, None])[:, 0]
    assert found.dtype == rows.dtype and found.isfinite().all()
    bfloat16s = (rows.float() @ weight.T).bfloat16()
    errors = [(one.double() - exact).norm() for one in (found, bfloat16s)]
    # A result in bfloat16 is rounded to float16 before.
    assert errors[0] <= {"bfloat16": 1.1, "float32": 0.5}[dtype] * errors[1] or name == "subnormal"
    assert (found.double() - exact).norm() <= 2**-8 * exact.norm() or name == "subnormal"


# What a token's logits are like; its gradient is (p - 1 where it is the token) / tokens of a step.
CERTAINTY = {
    "unsure": (lambda logits: logits, 5),
    "surely wrong": (lambda logits: 9 * logits, 5),
    "surely right": (lambda logits: 9 * logits, None),
    "all alike": (lambda logits: 0 * logits, 5),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 1000, 1e30])
def test_the_gradient_of_a_softmax_goes_through_the_head(folder, tokens, dtype):
    """Beside one large number, of the token, there are thousands of very small ones."""
    model = load(folder, str(dtype).removeprefix("torch."), "float16").requires_grad_(False)
    weight = load(folder, "float32").lm_head.weight.detach()
    logits = torch.stack([change(some(len(weight), seed=4)) for change, _ in CERTAINTY.values()])
    pairs = zip(logits, CERTAINTY.values(), strict=True)
    ids = [row.argmax() if n is None else n for row, (_, n) in pairs]
    logits.requires_grad_()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum")
    loss.backward()
    gradient = (logits.grad / tokens).to(dtype)
    assert gradient.any(1).all() and gradient.abs().max() > 1e4 * gradient.abs().median()
    rows = torch.zeros(len(ids), weight.shape[1], dtype=dtype, requires_grad=True)
    model.lm_head(rows).backward(gradient)
    exact = gradient.double() @ weight.double()
    error = (rows.grad.double() - exact).norm(dim=1)
    assert rows.grad.dtype == dtype and exact.any(1).all()
    assert (error <= 2**-8 * exact.norm(dim=1)).all()


def test_all_of_loras_gradients_are_float32s_but_for_float16s_rounding(folder, flags, tmp_path):
    """Through the head and all layers; those of bfloat16's products err ten times as much."""
    found = {}
    for products, dtype in [("dtype", "float32"), ("float16", "float32"), ("dtype", "bfloat16")]:
        more = ["--model_name", str(folder), "--dtype", dtype]
        trainer = trainer_of(command([*flags, *more], tmp_path, products))
        batch = trainer.data_collator([trainer.train_dataset[n] for n in (0, 5)])
        trained = with_b(trainer.model.eval())
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=100_000).backward()
        found[products, dtype] = {name: p.grad for name, p in trained.items()}
    exact, scaled, bfloat16s = found.values()
    for name, gradient in exact.items():
        errors = [(one[name] - gradient).norm() / gradient.norm() for one in (scaled, bfloat16s)]
        assert 0 < errors[0] < 2**-8 and errors[0] < errors[1] / 4, name


def spoilt(tensors):
    """Give one row of the head numbers that float16 holds, but not their sum."""
    tied = "model.language_model.embed_tokens.weight"
    tensors["lm_head.weight" if "lm_head.weight" in tensors else tied][3] = 600


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_head_with_too_large_a_norm_stays_and_is_named(folder, dtype, tmp_path, capsys):
    new = changed(folder, tmp_path / "model", spoilt)
    before, model = load(new, dtype), load(new, dtype, "float16")
    assert left_out(capsys.readouterr().out) == "lm_head"
    head, embedding = model.lm_head, model.get_input_embeddings()
    assert head.weight.dtype == embedding.weight.dtype == getattr(torch, dtype)
    rows, ids = some(5, 64).to(getattr(torch, dtype)), torch.arange(9)
    with torch.no_grad():
        assert head(rows).equal(before.lm_head(rows))
        assert embedding(ids).equal(before.get_input_embeddings()(ids))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float16


# A vocabulary's weight is looked at in parts; these are in none of the first.
LARGE_IN_PARTS = {
    "a sum over all": lambda weight: weight[:, 1].fill_(4),
    "a row at the end": lambda weight: weight[-1].fill_(9000),
    "not a number at the end": lambda weight: weight[-1, 2].fill_(math.nan),
    "infinite at the end": lambda weight: weight[-1, 2].fill_(math.inf),
}


@pytest.mark.parametrize("spoil", LARGE_IN_PARTS.values(), ids=LARGE_IN_PARTS)
def test_what_float16_may_not_hold_is_found_anywhere_in_a_large_weight(spoil, capsys):
    head = torch.nn.Linear(4, 9000, dtype=torch.bfloat16)
    spoil(head.weight.data)
    t.use_float16(Model(head=head))
    assert left_out(capsys.readouterr().out) == "layers.0.head"
    assert head.weight.dtype == torch.bfloat16


TOO_LARGE = {
    "a number": lambda weight: weight[1, 2].fill_(7e4),
    "the sum of a row": lambda weight: weight[1].fill_(400),
    "the sum of a column": lambda weight: weight[:, 1].fill_(400),
    "infinite": lambda weight: weight[1, 2].fill_(math.inf),
    "not a number": lambda weight: weight[1, 2].fill_(math.nan),
}


@pytest.mark.parametrize("spoil", TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_weight_that_float16_may_not_hold_is_left_and_named(spoil, capsys):
    """Of 100 x 100 numbers, 400 each, float16 holds all, but not the sum of a row or column."""
    layer = {name: torch.nn.Linear(100, 100, dtype=torch.bfloat16) for name in ("good", "odd")}
    spoil(layer["odd"].weight.data)
    before = layer["odd"].weight.clone()
    t.use_float16(Model(**layer).requires_grad_(False))
    assert left_out(capsys.readouterr().out) == "layers.0.odd"
    kept, rows = layer["odd"].weight, some(2, 100).bfloat16()
    assert kept.dtype == torch.bfloat16
    torch.testing.assert_close(kept.data, before, rtol=0, atol=0, equal_nan=True)
    expected = torch.nn.functional.linear(rows, before, layer["odd"].bias)
    torch.testing.assert_close(layer["odd"](rows), expected, rtol=0, atol=0, equal_nan=True)
    assert layer["good"].weight.dtype == torch.float16


def test_the_largest_sums_that_are_taken_stay_in_float16s_range():
    """Rows scaled to just below 2, a weight whose sums are just below half of float16's range."""
    weight = torch.full((4, 100), 326.0)
    rows = torch.full((1, 100), 1.9921875).bfloat16().requires_grad_()
    module = converted(weight)
    assert module(rows).isfinite().all()
    sums = converted(torch.full((100, 4), 326.0))
    rows = torch.ones(1, 4).bfloat16().requires_grad_()
    sums(rows).backward(torch.full((1, 100), 1.9921875).bfloat16())
    assert rows.grad.isfinite().all() and rows.grad.min() > 60000


def test_many_that_are_left_are_counted(capsys):
    modules = {name: torch.nn.Linear(4, 4) for name in "abcdefghi"}
    for module in modules.values():
        module.weight.data.fill_(1e6)
    t.use_float16(Model(**modules))
    left = left_out(capsys.readouterr().out)
    assert left.count("layers.0.") == 3 and left.endswith("and 6 more")


def test_float16s_sums_are_float32s():
    place = torch.backends.cuda.matmul
    before = place.allow_fp16_reduced_precision_reduction
    try:
        place.allow_fp16_reduced_precision_reduction = True
        converted(some(K, D))
        assert place.allow_fp16_reduced_precision_reduction is False
    finally:
        place.allow_fp16_reduced_precision_reduction = before


# ---- what is chosen ----------------------------------------------------------------------------

GPU = torch.device("cpu")  # which is not "cpu": the trial runs, on what there is


def job_with(*flags, device=GPU):
    """Return a job of rows of 10, 20 and 60 tokens and a largest module of 64 x 32."""
    job = t.Job(t.parse_args(["--demo", "--dtype", "bfloat16", *flags]))
    job.args.device = device
    job.train = [{"input_ids": [1] * n} for n in (60, 10, 20)]
    job.plan = types.SimpleNamespace(largest=(64, 32))
    return job


def never(*_, **__):
    raise AssertionError("timed without being asked")


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("choice", ["dtype", "float16"])
def test_a_forced_choice_is_taken_untimed(monkeypatch, capsys, choice, device):
    monkeypatch.setattr(torch.utils.benchmark, "Timer", never)
    job = job_with("--products", choice, device=device)
    assert t.choose_products(job) == {"used": choice}
    assert capsys.readouterr().out == ""


def test_on_a_cpu_auto_is_the_dtype_untimed(monkeypatch):
    monkeypatch.setattr(torch.utils.benchmark, "Timer", never)
    job = job_with(device="cpu")
    assert job.args.products == "auto" and t.choose_products(job) == {"used": "dtype"}


@pytest.mark.parametrize(
    ("rate", "scaled", "choice"),
    [
        (9.6, 80.0, "float16"),
        (9.6, 11.6, "float16"),
        (9.6, 11.4, "dtype"),  # a fifth more is not sure to be more in a step
        (300.0, 280.0, "dtype"),
    ],
)
def test_on_a_gpu_the_clearly_faster_is_taken(monkeypatch, capsys, rate, scaled, choice):
    shapes, rates = [], [rate, scaled]

    class Timer:
        def __init__(self, statement, **settings):
            shapes.append(eval(statement, settings["globals"]).shape)

        def blocked_autorange(self, **_):
            seconds = 2 * 60 * 64 * 32 / (rates[len(shapes) - 1] * 1e12)
            return types.SimpleNamespace(median=seconds)

    monkeypatch.setattr(torch.utils.benchmark, "Timer", Timer)
    found = t.choose_products(job_with("--batch_size", "3"))
    assert shapes == [(3 * 20, 64)] * 2  # three rows of median length
    assert found["used"] == choice
    assert [found["tflops"][kind] for kind in ("dtype", "float16")] == pytest.approx(rates)
    text = capsys.readouterr().out
    assert text.startswith("products ") and text.endswith(f": {choice} is used\n")
    assert f"{rate:.1f} TFLOP/s in bfloat16" in text and f"{scaled:.1f} in scaled float16" in text


def test_where_it_cannot_be_timed_the_dtype_is_taken_and_the_reason_told(monkeypatch, capsys):
    """torch's Timer asks for setuptools, which not every environment has."""
    monkeypatch.setitem(sys.modules, "torch.utils.benchmark", None)
    assert t.choose_products(job_with()) == {"used": "dtype"}
    text = capsys.readouterr().out
    assert text.startswith("products in bfloat16: ") and "torch.utils.benchmark" in text


def test_where_float16_fails_the_dtype_is_taken_and_the_reason_told(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(t, "scaled_product", fail)
    assert t.choose_products(job_with()) == {"used": "dtype"}
    text = capsys.readouterr().out
    assert text.startswith("products in bfloat16: ") and "CUBLAS_STATUS_NOT_SUPPORTED" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_trial_measures_what_there_is(capsys, dtype):
    found = t.choose_products(job_with("--dtype", dtype))
    assert found["tflops"].keys() == {"dtype", "float16"}
    assert all(0 < rate < 100 for rate in found["tflops"].values())
    assert f"TFLOP/s in {dtype}, " in capsys.readouterr().out


# ---- whole runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flags(lines, tmp_path_factory):
    return lines(tmp_path_factory.mktemp("data"))


def command(flags, output, products="float16"):
    return [*flags, "--output_dir", str(output), "--products", products]


def record(output):
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def logged(output, key):
    return [entry[key] for entry in record(output)["loss_history"] if key in entry]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """Return (output, text printed) of a run in float16 that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    t.main(command(flags, output))
    return output, (output / "all_logs.log").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def interrupted(flags, whole, tmp_path_factory):
    """Return the output of a run in float16 that a signal has stopped in step 5 of 8."""
    output, step = tmp_path_factory.mktemp("interrupted"), transformers.Trainer.training_step
    told = []

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 4 and not told:
            told.append(None)
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(transformers.Trainer, "training_step", training_step)
        t.main(command(flags, output))
    assert stop.value.code == 128 + signal.SIGINT
    assert (output / "checkpoints" / "checkpoint-5" / "complete.json").exists()
    return output


def test_a_run_in_float16_ends_with_a_proved_adapter_like_the_dtypes(whole, demo):
    output, text = whole
    found = re.search(r"its logits differ by (\S+) from the trained model's, by (\S+) from", text)
    assert found[1] == "0" and float(found[2]) > 0
    assert "frozen modules compute in scaled float16\n" in text and "; not " not in text
    assert "warning" not in text and (output / "samples.md").exists()
    assert record(output)["products"] == {"used": "float16"}
    assert record(demo[0])["products"] == {"used": "dtype"} and "scaled float16" not in demo[1]
    ours, theirs = (load_file(one / ADAPTER) for one in (output, demo[0]))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape and tensor.dtype == torch.float32, name
    assert (output / ADAPTER).read_bytes() != (demo[0] / ADAPTER).read_bytes()
    for key in ("loss", "eval_loss"):
        expected = logged(demo[0], key)
        assert len(expected) > 2 and logged(output, key) == pytest.approx(expected, rel=0.01), key


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_run_of_a_bfloat16_model_in_float16_is_like_one_without(
    flags, tiny, untied, tmp_path, name
):
    """As on a V100: the frozen weights in bfloat16, those of linear modules in float16."""
    folder, runs = {"tied": tiny, "untied": untied}[name], {}
    more = ["--model_name", folder, "--dtype", "bfloat16", "--num_epochs", "1"]
    for products in ("dtype", "float16"):
        runs[products] = tmp_path / products
        t.main(command([*flags, *more], runs[products], products))
        text = (runs[products] / "all_logs.log").read_text(encoding="utf-8")
        assert "warning" not in text and "proof " in text
        samples = (runs[products] / "samples.md").read_text(encoding="utf-8")
        assert re.findall(r"\*\*(\w+)\*\*", samples)[-3:] == ["base", "adapter", "written"]
    for key in ("loss", "eval_loss"):
        expected, found = (logged(output, key) for output in runs.values())
        assert len(found) > 1 and found == pytest.approx(expected, rel=0.01), key
        assert found != expected


def test_after_a_signal_the_same_command_ends_with_the_same_bytes(
    flags, whole, interrupted, tmp_path
):
    output = shutil.copytree(interrupted, tmp_path / "output")
    t.main(command(flags, output))
    assert record(output)["resumed_from"].endswith("checkpoint-5")
    assert (output / ADAPTER).read_bytes() == (whole[0] / ADAPTER).read_bytes()
    assert logged(output, "loss") == logged(whole[0], "loss")
    assert logged(output, "eval_loss") == logged(whole[0], "eval_loss")
    samples = [(one / "samples.md").read_text(encoding="utf-8") for one in (output, whole[0])]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("products", ["dtype", "auto"])
def test_other_products_do_not_go_on(flags, interrupted, capfd, products):
    before = (interrupted / "checkpoints" / "job.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        t.main(command(flags, interrupted, products))
    text = capfd.readouterr().err
    assert stop.value.code == 1 and "\n  PRODUCTS was float16, is dtype\n" in text
    assert (interrupted / "checkpoints" / "job.json").read_bytes() == before


def trainer_of(argv):
    """Return the trainer of a command before it trains."""
    args = t.parse_args(argv)
    job = t.Job(args, products={"used": args.products})
    t.check_device(args)
    job.config, job.tokenizer = t.load_config_and_tokenizer(args)
    job.train = t.encode(t.read_examples(args.train_file), job.tokenizer, args.max_seq_len)
    job.plan = t.make_plan(args, job.config, len(job.train))
    return t.build_trainer(job)


def with_b(model):
    """Return the trained parameters; B is zero at first, and A has no gradient then."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained.items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return trained


def test_recomputation_changes_nothing(flags, tmp_path):
    """Loss and gradients of one batch, with dropout."""
    trainer = trainer_of(command(flags, tmp_path))
    model = trainer.model.train()
    trained = with_b(model)
    model.activation_checkpointing_enable()
    model.disable_input_require_grads()
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    inputs = trainer.data_collator([trainer.train_dataset[n] for n in (0, 5)])
    passes, results = [], []
    layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(None))
    for recompute in (False, True):
        for layer in layers:
            layer.gradient_checkpointing = recompute
        torch.manual_seed(0)
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        results.append((loss.item(), {name: p.grad.clone() for name, p in trained.items()}))
        model.zero_grad()
    assert len(passes) == 1 + 2
    (loss, kept), (loss_again, recomputed) = results
    assert loss == loss_again
    for name, gradient in kept.items():
        assert gradient.any() and gradient.equal(recomputed[name]), name
