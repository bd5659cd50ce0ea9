"""Float16 products: one product, what is converted, what is chosen, whole runs."""

import dataclasses
import json
import math
import shutil
import signal

import accelerate
import pytest
import torch
import transformers
from conftest import write_short_data
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import (
    ADAPTER,
    at_step,
    changed_model,
    logged,
    made_up,
    read_record,
    refused,
    run,
    send,
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


# ---- a converted module, forwards and backwards ------------------------------------------------


def some(*shape, seed=0):
    """Return random numbers that bfloat16 and float16 both hold, none of them near zero."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(*shape, generator=generator)
    return (numbers + 0.125 * numbers.sign()).bfloat16().float()


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
    model = t.use_fp16_matmul(Model(dtype, projection=module.requires_grad_(False)))
    module = model.layers[0]["projection"]
    assert module.weight.dtype == torch.float16
    return module


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
def test_both_passes_err_by_their_rounding_where_float16_fails(name, dtype):
    change, plain = HOSTILE[name]
    weight, bias = some(K, K), some(K, seed=2)
    numbers = torch.stack([change(row) for row in some(3, K, seed=1)]).to(dtype)
    module = converted(weight, dtype=dtype)
    rows = numbers.clone().requires_grad_()
    result = module(rows)
    result.backward(numbers)
    for found, matrix in ((result.detach(), weight.T), (rows.grad, weight)):
        exact = numbers.double() @ matrix.double()
        assert found.dtype == dtype and found.shape == (3, K) and exact.isfinite().all()
        error = (found.double() - exact).abs()
        assert (error <= error_allowed(numbers, matrix.double(), exact)).all()
        if name not in ("zeros", "subnormal"):  # the bound itself is small
            assert error.norm() <= 2**-8 * exact.norm()
        naive = numbers.half() @ matrix.half()
        if plain is not None:
            assert not naive.isfinite().all() if plain else not naive.any()
            assert exact.any()
    with_bias = converted(weight, bias, dtype)(numbers)
    assert with_bias.equal(result.detach() + bias.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_power_of_two_costs_nothing(dtype):
    """Rows that differ by powers of two give results that do; so the scale is one."""
    module, row = converted(some(D, K), dtype=dtype), some(1, K, seed=1).to(dtype)
    powers = 2.0 ** torch.tensor([[-100], [-30], [-1], [0], [1], [15], [16], [100]])
    found = module((row * powers).to(dtype))
    assert found.any() and found.equal((found[3] * powers).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_spoils_no_other(bad, dtype):
    module, numbers = converted(some(K, K), dtype=dtype), some(4, K, seed=1).to(dtype)
    rows, spoilt = numbers.clone().requires_grad_(), numbers.clone()
    spoilt[2, 5] = bad
    module(rows).backward(spoilt)  # the backward pass
    expected, found = module(numbers), module(spoilt)
    others = [0, 1, 3]
    assert not found[2].isfinite().any() and not rows.grad[2].isfinite().any()
    assert found[others].equal(expected[others]) and expected.isfinite().all()
    assert rows.grad[others].isfinite().all()


def test_both_passes_are_one_float16_product_and_keep_no_rows():
    """Whatever the rows' order in memory; what is kept of a batch decides what fits."""
    module, kept = converted(some(K, D)), []
    rows = some(3, 5, D, seed=1).transpose(0, 1).bfloat16().requires_grad_()
    with Products() as seen, torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        result = module(rows)
        result.backward(torch.ones_like(result).transpose(0, 1).contiguous().transpose(0, 1))
    assert seen.products == [("mm.default", torch.float16)] * 2
    assert kept == [] and rows.grad.shape == rows.shape == (5, 3, D)


# ---- what is converted -------------------------------------------------------------------------


def load(folder, dtype):
    """Return the model of a folder with weights of this type."""
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()


@pytest.fixture(params=["tied", "untied"])
def folder(request, tiny, untied):
    """Return the path of the tests' model, with its head tied to the embedding and without."""
    return {"tied": tiny, "untied": untied}[request.param]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_large_linear_modules_and_a_tied_embedding_are_converted(folder, dtype, capsys):
    before, model = load(folder, dtype), t.use_fp16_matmul(load(folder, dtype))
    old = before.state_dict()
    linear = {n: one for n, one in before.named_modules() if type(one) is torch.nn.Linear}
    small = {name for name, one in linear.items() if min(one.weight.shape) < 64}
    # DeltaNet's two gates cost more kernels than they save.
    assert {name.rpartition(".")[2] for name in small} == {"in_proj_a", "in_proj_b"}
    weights = {f"{name}.weight" for name in linear.keys() - small}
    assert len(weights) == 3 + 4 + 2 * 3 + 1  # DeltaNet, attention, two feed-forwards, the head
    if before.lm_head.weight is before.get_input_embeddings().weight:
        weights.add("model.embed_tokens.weight")
    for name, weight in model.state_dict().items():
        assert (weight.dtype == torch.float16) == (name in weights), name
        assert weight.equal(old[name].half() if name in weights else old[name]), name
    text = capsys.readouterr().out
    assert "14 frozen modules" in text and "stay" not in text
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
    assert model(input_ids=ids).logits.dtype == embedded.dtype == getattr(torch, dtype)


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
    model = t.use_fp16_matmul(Model(**layer).requires_grad_(False))
    text = capsys.readouterr().out
    assert "1 frozen modules" in text and "1 stay" in text and "layers.0.odd" in text
    odd, good = (model.layers[0][name] for name in ("odd", "good"))
    rows = some(2, 100).bfloat16()
    torch.testing.assert_close(odd.weight.data, before, rtol=0, atol=0, equal_nan=True)
    expected = torch.nn.functional.linear(rows, before, odd.bias)
    torch.testing.assert_close(odd(rows), expected, rtol=0, atol=0, equal_nan=True)
    assert good.weight.dtype == torch.float16


def test_a_tied_head_whose_sums_are_too_large_leaves_the_embedding_as_it_is(tiny, tmp_path):
    def spoil(tensors):
        tensors["model.language_model.embed_tokens.weight"][3] = 600

    new = changed_model(tiny, tmp_path / "model", spoil)
    before, model = load(new, "bfloat16"), t.use_fp16_matmul(load(new, "bfloat16"))
    ids = torch.arange(9)
    with torch.no_grad():
        assert model.lm_head.weight.equal(before.lm_head.weight)
        assert model.get_input_embeddings()(ids).equal(before.get_input_embeddings()(ids))
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float16


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


# ---- the losses of the families that are taken without being asked ------------------------------


def family(name, tiny):
    """Return a small model with random weights of a family, in float32."""
    if name == "qwen3_5":
        return load(tiny, "float32")
    config_type = {"qwen3": "Qwen3", "llama": "Llama", "gemma3": "Gemma3Text"}[name]
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "head_dim": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    sizes |= {"tie_word_embeddings": name in ("gemma3", "qwen3"), "pad_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, f"{config_type}Config")(**sizes, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3", "llama", "gemma3"])
def test_each_familys_losses_are_float32s_but_for_bfloat16s_rounding(name, tiny, tmp_path):
    """The distance is that of the model in bfloat16, or less."""
    family(name, tiny).save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in (9, 20, 31):
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        examples.append(made_up(ids[:3], ids[3:]))
    models = {"exact": load(tmp_path, "float32"), "native": load(tmp_path, "bfloat16")}
    models["float16"] = t.use_fp16_matmul(load(tmp_path, "bfloat16"))
    assert models["exact"].config.model_type in t.TESTED_IN_FP16
    embedding = models["float16"].get_input_embeddings()
    if name == "gemma3":  # scales its rows in the type of its own weight, which the head shares
        assert embedding.weight.dtype == torch.bfloat16
        assert models["float16"].lm_head.weight.dtype == torch.bfloat16
        assert embedding.embed_scale.dtype == torch.bfloat16 or embedding.embed_scale.dim() == 0
    losses = {
        kind: torch.tensor(t.example_losses(model, examples, 1000, ""))
        for kind, model in models.items()
    }
    distance = {kind: (losses[kind] - losses["exact"]).norm().item() for kind in losses}
    assert losses["exact"].isfinite().all() and losses["exact"].min() > 1
    assert 0 < distance["float16"] <= 1.5 * distance["native"] + 1e-3 * losses["exact"].norm()
    assert distance["native"] < 0.05 * losses["exact"].norm()


# ---- what is chosen ----------------------------------------------------------------------------

V100, A100 = (7, 0), (8, 0)
CHOICES = [  # capability, flags, model: products, and a word that is said of them
    (V100, [], "", "float16", ""),
    (V100, ["--matmul", "native"], "", "native", ""),
    (V100, ["--dtype", "float32"], "", "native", ""),
    (V100, [], "phi3", "native", "phi3"),
    (V100, ["--matmul", "float16"], "phi3", "float16", ""),
    (A100, [], "", "native", ""),
    (A100, ["--matmul", "float16"], "", "float16", ""),
]


@pytest.fixture
def card(flags, tiny, tmp_path, monkeypatch):
    """Return a function that prepares a job on a simulated GPU; its weights are in bfloat16."""

    def prepare(capability, more=(), kind=""):
        folder = tiny
        if kind:
            folder = shutil.copytree(tiny, tmp_path / "model")
            sizes = {"hidden_size": 96, "num_hidden_layers": 2, "vocab_size": 2048}
            sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
            getattr(transformers, f"{kind.title()}Config")(**sizes).save_pretrained(folder)
        for owner, name, fake in (
            (torch.cuda, "get_device_capability", lambda *_: capability),
            (torch.cuda, "is_bf16_supported", lambda including_emulation=True: (
                including_emulation or capability >= A100
            )),
            (t, "prepare_device", lambda *_: "a simulated GPU"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, fake)
        accelerate.PartialState(cpu=True)
        more = ["--model_name", str(folder), "--dtype", "bfloat16", *more, "--device", "cuda"]
        more += ["--lora_target_modules", "o_proj"]
        job = t.Job(t.parse_settings([*flags, *more]))
        t.prepare(job)
        return job

    return prepare


@pytest.mark.parametrize(("capability", "more", "kind", "matmul", "word"), CHOICES)
def test_float16_is_taken_where_bfloat16_is_emulated_and_the_model_was_tested(
    card, capsys, capability, more, kind, matmul, word
):
    assert card(capability, more, kind).matmul == matmul
    said = [line for line in capsys.readouterr().out.splitlines() if "phi3" in line]
    assert bool(said) == bool(word)


# ---- a whole run -------------------------------------------------------------------------------


def test_a_run_in_float16_is_like_one_in_bfloat16(flags, tmp_path, capsys):
    """As on a V100: the frozen weights in bfloat16, those of linear modules in float16."""
    runs = {kind: tmp_path / kind for kind in ("native", "float16")}
    for kind, output in runs.items():
        more = ["--dtype", "bfloat16", "--matmul", kind, "--output_dir", str(output)]
        t.main([*flags, *more, "--num_epochs", "1"])
        text = capsys.readouterr().out
        assert "warning" not in text and "\nverified " in text
        assert ("frozen modules multiply in scaled float16" in text) == (kind == "float16")
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
        assert record["products"] == kind
    for key in ("loss", "eval_loss", "grad_norm"):
        expected, found = (
            logged(read_record(output)["loss_history"], key) for output in runs.values()
        )
        assert found == pytest.approx(expected, rel=0.01 if "loss" in key else 0.05), key
        assert found != expected
    ours, theirs = (load_file(output / ADAPTER) for output in runs.values())
    assert ours.keys() == theirs.keys()
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}


# ---- tried on the GPU before it is used ---------------------------------------------------------


@pytest.fixture
def emulating(flags, tmp_path, monkeypatch, capfd):
    """Return what gives the command where float16 products are to be tried, with a stand-in.

    The GPU is a CPU that is said to emulate bfloat16, and to be fast in float16.
    """
    forward, backward = t.ScaledFp16Matmul.forward, t.ScaledFp16Matmul.backward

    def give(fault="", *more, choice="float16", begin=lambda patch: None):
        seconds = iter([1.0, 2.0] if fault == "slower" else [2.0, 1.0])
        with monkeypatch.context() as patch:
            real = t.timed_pass
            patch.setattr(t, "choose_matmul", lambda job: (
                choice if job.settings.MATMUL == "auto" else job.settings.MATMUL
            ))  # fmt: skip
            patch.setattr(t, "timed_pass", lambda *given: (
                dataclasses.replace(real(*given), seconds=next(seconds))
            ))  # fmt: skip
            if fault in FORWARD:
                change = FORWARD[fault]
                patch.setattr(t.ScaledFp16Matmul, "forward", lambda *given: change(forward(*given)))
            if fault in BACKWARD:
                change = BACKWARD[fault]
                patch.setattr(t.ScaledFp16Matmul, "backward", lambda *given: (
                    change(backward(*given)[0]), None
                ))  # fmt: skip
            begin(patch)
            status = run([*flags, "--dtype", "bfloat16", "--num_epochs", "1", *more])
        said = capfd.readouterr()
        return status, " ".join((said.out + said.err).split())

    return give


FORWARD = {
    "another loss": lambda product: product * 10,
    "an infinite loss": lambda product: product * math.inf,
}
BACKWARD = {
    "other gradients": lambda gradient: gradient * 0.5,
    "gradients that are not numbers": lambda gradient: gradient * math.nan,
}
TRIED = {
    "": "so scaled float16 is used",
    "slower": "so bfloat16 is used, since float16 is not faster",
    "another loss": "so bfloat16 is used, since the losses are more than 1% apart",
    "an infinite loss": "so bfloat16 is used, since a loss or a gradient is not finite",
    "other gradients": "so bfloat16 is used, since the gradients are more than 15% apart",
    "gradients that are not numbers": "so bfloat16 is used, since a loss or a gradient is not",
}


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory):
    """Return the adapter of the short run with bfloat16 products."""
    folder = tmp_path_factory.mktemp("native")
    more = ["--dtype", "bfloat16", "--num_epochs", "1", "--matmul", "native"]
    assert run([*write_short_data(folder), *more, "--output_dir", folder / "output"]) == 0
    return (folder / "output" / ADAPTER).read_bytes()


@pytest.mark.parametrize("fault", TRIED)
def test_float16_is_used_only_where_it_is_right_and_faster(emulating, in_bfloat16, tmp_path, fault):
    """If not, nothing of it is left: the adapter has the bytes of a run without it."""
    status, said = emulating(fault)
    output = tmp_path / "output"
    record = read_record(output)
    kind = "native" if fault else "float16"
    job = json.loads((output / "checkpoints" / "job.json").read_text(encoding="utf-8"))
    assert status == 0 and record["products"] == job["the products in use"] == kind
    assert said.count("tried on this GPU") == 1 and TRIED[fault] in said
    times = (1.0, 2.0) if fault == "slower" else (2.0, 1.0)
    assert "took {:.3f} s in bfloat16 and {:.3f} s in scaled float16".format(*times) in said
    compared = record["matmul_compared"]
    assert compared["seconds"] == [*times] and len(compared["loss"]) == 2
    assert bool(compared["float16_is_not_used_since"]) == bool(fault)
    assert ((output / ADAPTER).read_bytes() == in_bfloat16) == bool(fault)
    if not fault:
        assert compared["loss"][0] != compared["loss"][1]
        assert 0 < compared["gradients_apart"] < t.MOST_GRADIENTS_APART


def test_one_example_is_compared_where_more_find_no_memory(emulating):
    def has_room_for_one(patch):
        real = t.reply_losses

        def losses(model, inputs):
            if len(inputs["input_ids"]) > 1 and not failures:
                failures.append(None)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(model, inputs)

        failures = []
        patch.setattr(t, "reply_losses", losses)

    status, said = emulating(begin=has_room_for_one)
    assert status == 0 and "tried on this GPU: 1 example forward and backward" in said


def has_no_room_for_float16(patch):
    """Let each pass after the modules were replaced run out of memory."""
    real, losses = t.use_fp16_matmul, t.reply_losses

    def replace(model):
        real(model)
        patch.setattr(t, "reply_losses", run_out)

    def run_out(*_):
        patch.setattr(t, "reply_losses", losses)
        raise torch.OutOfMemoryError("CUDA out of memory")

    patch.setattr(t, "use_fp16_matmul", replace)


def test_where_float16_alone_finds_no_memory_bfloat16_is_used(emulating, in_bfloat16, tmp_path):
    """With all examples that were compared: nothing is shrunk for it."""
    status, said = emulating(begin=has_no_room_for_float16)
    output = tmp_path / "output"
    assert status == 0 and (output / ADAPTER).read_bytes() == in_bfloat16
    assert "tried on this GPU: 7 examples" in said and "losses" not in said.split("so bfloat16")[0]
    assert "so bfloat16 is used, since float16 matmul ran out of memory" in said
    compared = read_record(output)["matmul_compared"]
    assert compared == {"float16_is_not_used_since": "float16 matmul ran out of memory"}


def test_a_job_with_float16_matmul_is_not_resumed_where_it_finds_no_memory(emulating):
    emulating("", begin=stop_in_step_two)
    status, said = emulating("", begin=has_no_room_for_float16)
    assert status == 1 and "is not used on this GPU, since float16 matmul ran out" in said
    assert "--matmul float16 uses it all the same" in said and "Traceback" not in said


def stop_in_step_two(patch):
    at_step(patch, 2, send(signal.SIGTERM))


@pytest.mark.parametrize(
    ("made_with", "resumed", "choice", "words"),
    [
        ("", "", "native", "the job goes on with it; on this GPU a new one would take native"),
        ("", "slower", "float16", "so scaled float16 is used"),
        ("slower", "", "float16", "the job goes on with it; on this GPU a new one would take"),
    ],
    ids=["float16 on an A100", "float16 where it is slower", "bfloat16 on a V100"],
)
def test_a_job_that_goes_on_elsewhere_keeps_its_products_and_says_so(
    emulating, tmp_path, made_with, resumed, choice, words
):
    status, _ = emulating(made_with, begin=stop_in_step_two)
    assert status == 128 + signal.SIGTERM
    status, said = emulating(resumed, choice=choice)
    assert status == 0 and words in said and "resuming from" in said
    assert read_record(tmp_path / "output")["products"] == ("native" if made_with else "float16")
    assert ("tried on this GPU" in said) == (not made_with)


def test_a_job_is_not_resumed_with_float16_products_that_are_wrong(emulating, tmp_path):
    emulating("", begin=stop_in_step_two)
    before = (tmp_path / "output" / "checkpoints" / "job.json").read_bytes()
    status, said = emulating("other gradients")
    assert status == 1 and "is not used on this GPU, since the gradients are more" in said
    assert "--matmul float16 uses it all the same" in said and "Traceback" not in said
    assert (tmp_path / "output" / "checkpoints" / "job.json").read_bytes() == before
    status, said = emulating("", "--matmul", "float16")
    assert status == 0 and "resuming from" in said and "tried" not in said


def test_the_refusal_of_other_products_names_the_setting_that_resumes(
    emulating, flags, tmp_path, capfd
):
    emulating("", begin=stop_in_step_two)
    more = ["--dtype", "bfloat16", "--num_epochs", "1", "--matmul", "native"]
    text = refused(capfd, [*flags, *more])
    assert "the products in use was float16 and is now native" in text
    assert '(MATMUL "auto" or "float16" goes on with float16 matmul)' in text
