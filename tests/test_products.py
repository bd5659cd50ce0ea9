"""Float16 products: one product, what is converted, what is chosen, whole runs."""

import math
import time

import accelerate
import pytest
import torch
import transformers
from conftest import HAS_INSPECTOR, TINY, write_short_data
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import (
    ADAPTER,
    assert_near,
    changed_model,
    chat_format_of,
    give_examples,
    inputs_of,
    logged,
    lora,
    on_trainer,
    prepared,
    read_record,
    refused,
    set_b,
)
from transformers import AutoModelForCausalLM

import train_lora_single as t

DTYPES = [torch.bfloat16, torch.float32]
# The most by which a dtype rounds a number, as a share of it: half of its step.
HALF_STEP = {dtype: torch.finfo(dtype).eps / 2 for dtype in (*DTYPES, torch.float16)}
K, D = 96, 72


class Products(TorchDispatchMode):
    """Note the kind of each product of matrices, and the type that is multiplied."""

    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        if "mm" in function.__name__:
            self.products.append((function.__name__, args[0].dtype))
        return function(*args, **(kwargs or {}))


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
    # The least power of two is near float32's least normal number.
    fixed = 2**-25 * largest.clamp_min(2.0**-120) * (weight.abs().sum(0) + 1)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # a subnormal step
    return (rounded + sums + fixed) * 1.01 + least  # 1.01: errors of errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_product_errs_by_its_rounding_where_float16_fails(name, dtype):
    change, plain = HOSTILE[name]
    weight = some(K, D).half()
    rows = torch.stack([change(row) for row in some(3, K, seed=1)]).to(dtype)
    exact = rows.double() @ weight.double()
    assert rows.isfinite().all() and exact.isfinite().all()
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
    with Products() as seen:
        found = t.scaled_product(rows, weight)
    torch.testing.assert_close(found, rows @ weight.float(), rtol=2**-9, atol=2**-9)
    assert seen.products == [("mm.default", torch.float16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_spoils_no_other(bad, dtype):
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
    model = t.use_float16_products(Model(dtype, projection=module.requires_grad_(False)))
    module = model.layers[0]["projection"]
    assert module.weight.dtype == torch.float16
    return module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 1e30, 1e-30, 0])
@pytest.mark.parametrize("shape", [(3,), (2, 1, 3)], ids=str)
def test_the_gradient_of_a_converted_module_is_the_weights(shape, size, dtype):
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


def test_both_passes_multiply_in_float16():
    """The backward pass is half of the work."""
    module, rows = converted(some(K, D)), some(2, 3, D, seed=1).bfloat16().requires_grad_()
    with Products() as seen:
        module(rows).sum().backward()
    assert seen.products == [("mm.default", torch.float16)] * 2


def test_a_gradient_that_is_not_finite_spoils_no_other_row():
    module = converted(some(K, D))
    rows, gradient = some(3, D, seed=1).bfloat16().requires_grad_(), some(3, K, seed=3).bfloat16()
    gradient[1, 4] = math.inf
    module(rows).backward(gradient)
    assert rows.grad.isfinite().all(1).tolist() == [True, False, True]


def test_a_converted_module_keeps_no_rows_for_the_backward_pass():
    """What is kept of a batch is memory, which decides into how many parts a step is divided."""
    module, kept = converted(some(K, D)), []
    rows = some(3, D, seed=1).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        module(rows)
    assert kept == []


# ---- what is converted -------------------------------------------------------------------------


def load(folder, dtype):
    """Return the model of a folder with weights of this type."""
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()


def load_converted(folder, dtype):
    return t.use_float16_products(load(folder, dtype))


@pytest.fixture(params=["tied", "untied"])
def folder(request, tiny, untied):
    """Return the path of the tests' model, with its head tied to the embedding and without."""
    return {"tied": tiny, "untied": untied}[request.param]


def is_tied(model):
    return model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_large_linear_modules_and_a_tied_embedding_are_converted(folder, dtype, capsys):
    before, model = load(folder, dtype), load_converted(folder, dtype)
    old = before.state_dict()
    linear = {n: one for n, one in before.named_modules() if type(one) is torch.nn.Linear}
    small = {name for name, one in linear.items() if min(one.weight.shape) < 64}
    # DeltaNet's two gates cost more kernels than they save.
    assert {name.rpartition(".")[2] for name in small} == {"in_proj_a", "in_proj_b"}
    weights = {f"{name}.weight" for name in linear.keys() - small}
    assert len(weights) == 3 + 4 + 2 * 3 + 1  # DeltaNet, attention, two feed-forwards, the head
    if is_tied(before):
        weights.add("model.embed_tokens.weight")
    for name, weight in model.state_dict().items():
        assert (weight.dtype == torch.float16) == (name in weights), name
        if name in weights:
            assert weight.equal(old[name].half()), name
        else:
            assert weight.equal(old[name]) and weight.dtype == getattr(torch, dtype), name
    text = capsys.readouterr().out
    assert text.startswith("matmul ") and "14 frozen modules" in text and "stay" not in text
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        plain, scaled = before(input_ids=ids).logits, model(input_ids=ids).logits
        embedded = model.get_input_embeddings()(ids)
    assert plain.dtype == scaled.dtype == embedded.dtype == getattr(torch, dtype)
    difference = (scaled.float() - plain.float()).norm() / plain.float().norm()
    assert 0 < difference < {"bfloat16": 2**-5, "float32": 2**-8}[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_head_whose_sums_are_too_large_stays_and_is_named(folder, dtype, tmp_path, capsys):
    def spoil(tensors):
        tied = "model.language_model.embed_tokens.weight"
        tensors["lm_head.weight" if "lm_head.weight" in tensors else tied][3] = 600

    new = changed_model(folder, tmp_path / "model", spoil)
    before, model = load(new, dtype), load_converted(new, dtype)
    text = capsys.readouterr().out
    assert "13 frozen modules" in text and "1 stay" in text and "lm_head" in text
    head, embedding = model.lm_head, model.get_input_embeddings()
    assert head.weight.dtype == embedding.weight.dtype == getattr(torch, dtype)
    rows, ids = some(5, 64).to(getattr(torch, dtype)), torch.arange(9)
    with torch.no_grad():
        assert head(rows).equal(before.lm_head(rows))
        assert embedding(ids).equal(before.get_input_embeddings()(ids))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float16


TOO_LARGE = {
    "a number": lambda weight: weight[1, 2].fill_(7e4),
    "the sum of a row": lambda weight: weight[1].fill_(400),
    "the sum of a row at the end": lambda weight: weight[-1].fill_(400),
    "the sum of a column": lambda weight: weight[:, 1].fill_(4),
    "infinite at the end": lambda weight: weight[-1, 2].fill_(math.inf),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_weight_that_float16_may_not_hold_stays_and_is_named(name, capsys):
    """Each number fits but for the first case; a vocabulary's weight is looked at in parts."""
    layer = {name: torch.nn.Linear(100, 9000, dtype=torch.bfloat16) for name in ("good", "odd")}
    TOO_LARGE[name](layer["odd"].weight.data)
    before = layer["odd"].weight.clone()
    model = t.use_float16_products(Model(**layer).requires_grad_(False))
    text = capsys.readouterr().out
    assert "1 frozen modules" in text and "1 stay" in text and "layers.0.odd" in text
    odd, good = (model.layers[0][name] for name in ("odd", "good"))
    rows = some(2, 100).bfloat16()
    torch.testing.assert_close(odd.weight.data, before, rtol=0, atol=0, equal_nan=True)
    expected = torch.nn.functional.linear(rows, before, odd.bias)
    torch.testing.assert_close(odd(rows), expected, rtol=0, atol=0, equal_nan=True)
    assert good.weight.dtype == torch.float16


def test_the_largest_sums_that_are_taken_stay_in_float16s_range():
    """Rows scaled to just below 2, a weight whose sums are just below half of float16's range."""
    rows = torch.full((1, 100), 1.9921875).bfloat16().requires_grad_()
    weight = torch.zeros(100, 100)
    weight[0] = weight[:, 0] = 330
    weight[0, 0] = 0
    module = converted(weight)
    result = module(rows)
    assert result.isfinite().all() and result.max() > 60_000
    result.backward(torch.full((1, 100), 1.9921875).bfloat16())
    assert rows.grad.isfinite().all() and rows.grad.max() > 60_000


def test_many_that_stay_are_counted(capsys):
    modules = {name: torch.nn.Linear(64, 64) for name in "abcdefghi"}
    for module in modules.values():
        module.weight.data.fill_(1e6)
    t.use_float16_products(Model(torch.float32, **modules))
    text = capsys.readouterr().out
    assert "9 stay" in text and text.count("layers.0.") == 3 and "6 more" in text


def test_loras_gradients_are_float32s_but_for_float16s_rounding(folder, tmp_path):
    data = write_short_data(tmp_path)
    more = ["--model_name", str(folder), "--lora_dropout", "0", "--output_dir", str(tmp_path)]
    gradients = {}
    for kind in ("native", "float16"):
        job = prepared([*data, *more, "--matmul", kind])
        trainer = t.build_trainer(job)
        set_b(trainer.model)
        inputs = inputs_of(trainer, job.train[:4])
        trainer.compute_loss(trainer.model, inputs, num_items_in_batch=100).backward()
        gradients[kind] = {name: p.grad for name, p in lora(trainer.model).items()}
    assert_near(gradients["float16"], gradients["native"], share=0.01)
    name = next(iter(gradients["native"]))
    assert not gradients["float16"][name].equal(gradients["native"][name])


# ---- what is chosen ----------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path):
    """Return a job as it is on a GPU before products are chosen; its weights are in bfloat16."""
    job = prepared([*write_short_data(tmp_path), "--dtype", "bfloat16"])
    give_examples(job, [3, 5, 90])
    job.settings.DEVICE = "cuda"  # so it is measured, on what there is
    return job


class Gpu(TorchDispatchMode):
    """A clock that only products move, by so many seconds each; it notes what it multiplied."""

    def __init__(self, monkeypatch, plain, scaled):
        super().__init__()
        self.now, self.cost, self.shapes = 0.0, {torch.float16: scaled, torch.bfloat16: plain}, []
        self.narrow_sums = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.__name__ == "mm.default":
            self.now += self.cost.get(args[0].dtype, 0)
            self.shapes.append((*args[0].shape, args[1].shape[1]))
            place = torch.backends.cuda.matmul
            self.narrow_sums.append(place.allow_fp16_reduced_precision_reduction)
        return result


@pytest.fixture
def reduced():
    """Allow float16's sums to be narrow, as torch does; undo what the script makes of it."""
    place = torch.backends.cuda.matmul
    before = place.allow_fp16_reduced_precision_reduction
    place.allow_fp16_reduced_precision_reduction = True
    yield place
    place.allow_fp16_reduced_precision_reduction = before


@pytest.mark.parametrize(
    ("plain", "scaled", "choice"),
    [
        (10.0, 1.0, "float16"),
        (10.0, 8.2, "float16"),
        (10.0, 8.4, "native"),  # a fifth faster is not sure to be faster in a step
        (10.0, 12.0, "native"),
    ],
)
def test_on_a_gpu_the_clearly_faster_is_taken(
    job, reduced, monkeypatch, capsys, plain, scaled, choice
):
    with Gpu(monkeypatch, plain, scaled) as gpu:
        t.choose_matmul(job)
    assert job.matmul["used"] == choice
    assert job.matmul["native"]["seconds"] / job.matmul["float16"]["seconds"] == pytest.approx(
        plain / scaled
    )
    # As many rows as a step has at the median length, of all shapes that would be converted.
    assert {shape[0] for shape in gpu.shapes} == {4 * 5}
    shapes = {(d, k) for _, k, d in gpu.shapes}
    assert {(1024, 64), (256, 64), (64, 512), (192, 64), (64, 192)} <= shapes
    assert min(map(min, shapes)) >= 64
    assert not any(gpu.narrow_sums)  # not while it is measured either
    text = capsys.readouterr().out
    assert text.startswith("matmul ") and "TFLOP/s" in text and text.count("error 0.") == 2
    assert f"{'scaled float16' if choice == 'float16' else 'bfloat16'} is used" in text


def test_what_is_faster_but_less_true_is_not_taken(job, monkeypatch, capsys):
    real = t.scaled_product
    monkeypatch.setattr(t, "scaled_product", lambda rows, weight: real(rows, weight) * 1.01)
    with Gpu(monkeypatch, 10.0, 1.0):
        t.choose_matmul(job)
    assert job.matmul["used"] == "native"
    assert job.matmul["float16"]["error"] > 1.5 * job.matmul["native"]["error"] > 0
    assert "bfloat16 is used" in capsys.readouterr().out


def test_both_errors_are_those_of_bfloat16s_rounding(job, monkeypatch):
    """Each is rounded to bfloat16 in the end; before that to float16, which adds a fortieth."""
    with Gpu(monkeypatch, 10.0, 1.0):
        t.choose_matmul(job)
    errors = [job.matmul[kind]["error"] for kind in ("native", "float16")]
    assert 0.0010 < errors[0] < HALF_STEP[torch.bfloat16]
    assert errors[0] < errors[1] < 1.04 * errors[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("matmul", ["auto", "native", "float16"])
def test_nothing_is_measured_unasked(job, monkeypatch, capsys, dtype, device, matmul):
    """A CPU and float32 never become float16 by themselves; a forced choice is taken."""
    if (dtype, device, matmul) == ("bfloat16", "cuda", "auto"):
        pytest.skip("this is measured")
    job.settings.DTYPE, job.settings.DEVICE, job.settings.MATMUL = dtype, device, matmul
    capsys.readouterr()
    with Gpu(monkeypatch, 10.0, 1.0) as gpu:
        t.choose_matmul(job)
    assert job.matmul == {"used": "float16" if matmul == "float16" else "native"}
    assert gpu.shapes == [] and capsys.readouterr().out == ""


def test_where_float16_fails_the_dtype_is_taken_and_said_why(job, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(t, "scaled_product", fail)
    t.choose_matmul(job)
    assert job.matmul == {"used": "native"}
    text = capsys.readouterr().out
    assert "bfloat16" in text and "CUBLAS_STATUS_NOT_SUPPORTED" in text


def test_a_gpu_that_is_full_is_not_one_where_float16_fails(job, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(t, "scaled_product", fail)
    with pytest.raises(torch.OutOfMemoryError):
        t.choose_matmul(job)


def test_a_model_with_nothing_to_convert_keeps_its_dtype():
    """Such as GPT-2, whose layers are no linear modules of torch."""
    job = t.Job(t.parse_settings(["--lora_target_modules", "c_attn"]))
    job.chat_format = chat_format_of(TINY)
    job.config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96)
    job.train = [t.Example("made up", [], "", [1, 2], [3])] * 9
    job.plan = t.make_plan(job)
    accelerate.PartialState(cpu=True)
    t.choose_matmul(job)
    assert job.matmul["used"] == "native"


# ---- whole runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_run_in_float16_is_like_one_in_bfloat16(flags, tiny, untied, tmp_path, capsys, name):
    """As on a V100: the frozen weights in bfloat16, those of linear modules in float16."""
    runs = {}
    more = ["--model_name", {"tied": tiny, "untied": untied}[name], "--dtype", "bfloat16"]
    for matmul in ("native", "float16"):
        runs[matmul] = tmp_path / matmul
        t.main([*flags, *more, "--matmul", matmul, "--output_dir", str(runs[matmul])])
        text = capsys.readouterr().out
        assert "warning" not in text and "\nverified " in text
        assert ("frozen modules multiply in scaled float16" in text) == (matmul == "float16")
        assert read_record(runs[matmul])["matmul"] == {"used": matmul}
        assert (runs[matmul] / "samples.md").exists() == HAS_INSPECTOR
    for key in ("loss", "eval_loss"):
        expected, found = (
            logged(read_record(output)["loss_history"], key) for output in runs.values()
        )
        assert len(found) > 2 and found == pytest.approx(expected, rel=0.01), key
        assert found != expected
    ours, theirs = (load_file(output / ADAPTER) for output in runs.values())
    for tensor_name, tensor in ours.items():
        assert tensor.shape == theirs[tensor_name].shape and tensor.dtype == torch.float32
    assert ours.keys() == theirs.keys()


def test_a_checkpoint_of_other_products_is_not_resumed(flags, tmp_path, monkeypatch, capfd):
    def stop_in_step_5(trainer):
        def run_out(model, *_):
            if model.training and trainer.state.global_step == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")

        trainer.model.register_forward_pre_hook(run_out)

    with monkeypatch.context() as patch:
        on_trainer(patch, stop_in_step_5)
        refused(capfd, [*flags, "--matmul", "float16"])
    job = prepared([*flags, "--matmul", "native"])
    with pytest.raises(SystemExit, match=r"products.* float16 .* native"):
        t.resume_or_begin(job)
    # With "auto" a resumed run keeps what was decided, and also on a CPU.
    for matmul in ("float16", "auto"):
        job = prepared([*flags, "--matmul", matmul])
        t.resume_or_begin(job)
        assert job.checkpoint == tmp_path / "output" / "checkpoints" / "checkpoint-4"
