"""Scaled float16 matmul: one product, what is converted, when it is used, and its trial."""

import contextlib
import math
from dataclasses import replace

import pytest
import runs
import torch
from by_hand import ROUNDING, token_loss
from conftest import TOY
from safetensors.torch import load_file
from toys import family, model_of
from transformers import AutoConfig, AutoModelForCausalLM

from inspect_lora import model as opening
from inspect_lora.common import InspectError
from inspect_lora.model import load_weights
from train_lora.console import UserError
from train_lora.fp16_matmul import (
    scaled_fp16_matmul,
    try_fp16_matmul,
    use_fp16_matmul,
    uses_fp16_matmul,
)
from train_lora.jobs import request_of
from train_lora.losses import losses_of_replies, token_losses

RIGHT = scaled_fp16_matmul
DTYPES = [torch.bfloat16, torch.float32]
K = 96


def some(*shape, seed=0):
    """Return random numbers that bfloat16 and float16 both hold, none of them near zero."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (numbers + 0.125 * numbers.sign()).bfloat16().float()


def converted(weight, bias=None, dtype=torch.bfloat16):
    """Return a frozen linear module with these numbers, converted."""
    module = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None, dtype=dtype)
    module.weight.data = weight.to(dtype)
    if bias is not None:
        module.bias.data = bias.to(dtype)
    model = torch.nn.Sequential(module.requires_grad_(False))
    model.dtype, embedding = dtype, torch.nn.Embedding(3, 4, dtype=dtype)
    model.get_input_embeddings = lambda: embedding
    use_fp16_matmul(model)
    assert module.weight.dtype == torch.float16
    return module


# What a row may hold, and whether plain float16 gives infinity (or NaN) or zero for it.
HOSTILE = {
    "ordinary": (lambda row: row, None),
    "1e30": (lambda row: 1e30 * row, math.inf),
    "1e37": (lambda row: 1e37 * row / row.abs().max(), math.inf),
    "1e-30": (lambda row: 1e-30 * row, 0),
    "zeros": (lambda row: 0 * row, None),
    # which is met by a weight of about the others' size
    "outlier": (lambda row: torch.ones(K).index_fill(0, torch.tensor(7), 1e6), math.inf),
    "tiny beside ordinary": (lambda row: torch.where(row > 0, row, 1e-20), None),
    "float16's largest": (lambda row: 65504 * row.sign(), math.inf),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HOSTILE)
def test_both_passes_err_by_their_rounding_where_float16_fails(name, dtype):
    change, plain = HOSTILE[name]
    weight, bias = some(K, K), some(K, seed=2)
    numbers = torch.stack([change(row) for row in some(3, K, seed=1)]).to(dtype)
    module, rows = converted(weight, dtype=dtype), numbers.clone().requires_grad_()
    result = module(rows)
    result.backward(numbers)
    for found, matrix in ((result.detach(), weight.T), (rows.grad, weight)):
        exact = numbers.double() @ matrix.double()
        assert found.dtype == dtype and found.shape == (3, K) and exact.isfinite().all()
        share = 2**-8 if dtype == torch.bfloat16 else 2**-10  # twice what each number is rounded by
        error = (found.double() - exact).norm(dim=-1)
        assert (error <= share * exact.norm(dim=-1)).all()
        naive = numbers.half() @ matrix.half()
        if plain is not None:
            assert not naive.isfinite().all() if plain else not naive.any()
            assert exact.any()
    with_bias = converted(weight, bias, dtype)(numbers)
    assert with_bias.equal(result.detach() + bias.to(dtype))
    if name == "ordinary":  # rows that differ by powers of two give results that do
        powers = 2.0 ** torch.tensor([[-100], [-30], [-1], [0], [1], [15], [16], [100]])
        found = module((numbers[:1] * powers).to(dtype)).detach()
        assert found.any() and found.equal((found[3] * powers).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_spoils_no_other(bad, dtype):
    module, numbers = converted(some(K, K), dtype=dtype), some(4, K, seed=1).to(dtype)
    rows, spoilt = numbers.clone().requires_grad_(), numbers.clone()
    spoilt[2, 5] = bad
    module(rows).backward(spoilt)
    expected, found = module(numbers), module(spoilt)
    others = [0, 1, 3]
    assert not found[2].isfinite().any() and not rows.grad[2].isfinite().any()
    assert found[others].equal(expected[others]) and expected.isfinite().all()
    assert rows.grad[others].isfinite().all()


def load(folder, dtype, is_converted=False):
    """Return the model of a folder with weights of this type."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()
    if is_converted:
        use_fp16_matmul(model)
    return model


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_large_linear_modules_and_a_tied_embedding_are_converted(untied, is_tied, dtype):
    folder = TOY if is_tied else untied
    old, model = load(folder, dtype).state_dict(), load(folder, dtype, is_converted=True)
    linear = {n: one for n, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    # DeltaNet's two gates cost more kernels than they save.
    weights = {f"{name}.weight" for name in linear if "in_proj_a" not in name}
    weights = {name for name in weights if "in_proj_b" not in name}
    assert len(weights) == 3 + 4 + 2 * 3 + 1  # DeltaNet, attention, two feed-forwards, the head
    if is_tied:
        weights.add("model.embed_tokens.weight")
    for name, weight in model.state_dict().items():
        assert (weight.dtype == torch.float16) == (name in weights), name
        assert weight.equal(old[name].half() if name in weights else old[name]), name
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
    assert model(input_ids=ids).logits.dtype == embedded.dtype == getattr(torch, dtype)


WIDE = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 32, "initializer_range": 0.2}
WIDE |= {"sliding_window": 8}
KINDS = {"qwen3_5": None, "qwen3": "Qwen3", "llama": "Llama", "gemma3": "Gemma3Text"}


@pytest.mark.parametrize("name", KINDS)
def test_each_familys_losses_are_float32s_but_for_bfloat16s_rounding(name, tmp_path):
    """The distance is that of the model in bfloat16, or less; and no row sees its padding."""
    folder = TOY
    if KINDS[name]:
        config = family(KINDS[name], tie_word_embeddings=name in ("gemma3", "qwen3"), **WIDE)
        folder = model_of(config, tmp_path / "model", has_weights=True)
    generator, examples = torch.Generator().manual_seed(0), []
    for length in (9, 20, 31):
        ids = torch.randint(3, 3000, (length,), generator=generator).tolist()
        examples.append(runs.made_up(ids[:3], ids[3:]))
    losses, kinds = {}, {"exact": "float32", "native": "bfloat16", "float16": "bfloat16"}
    for kind, dtype in kinds.items():
        model = load(folder, dtype, kind == "float16")
        losses[kind] = torch.tensor(losses_of_replies(model, examples)).flatten()
    exact = load(folder, "float32")
    alone = [token_loss(exact, [one]) * len(one.reply_ids) for one in examples]
    assert losses["exact"].tolist() == pytest.approx(alone, rel=ROUNDING)
    distance = {kind: (losses[kind] - losses["exact"]).norm().item() for kind in losses}
    assert losses["exact"].isfinite().all() and losses["exact"].min() > 1
    assert 0 < distance["float16"] <= 1.5 * distance["native"] + 1e-3 * losses["exact"].norm()
    assert distance["native"] < 0.05 * losses["exact"].norm()


def test_an_embedding_that_scales_in_its_own_type_keeps_it(tmp_path):
    """Gemma's, with which its head shares the weight: in float16 it would be rounded otherwise."""
    config = family("Gemma3Text", tie_word_embeddings=True, **WIDE | {"hidden_size": 128})
    folder = model_of(config, tmp_path / "model", has_weights=True)
    native, converted = load(folder, "bfloat16"), load(folder, "bfloat16", is_converted=True)
    assert converted.lm_head.weight is converted.get_input_embeddings().weight
    assert converted.lm_head.weight.dtype == torch.bfloat16
    assert converted.model.layers[0].mlp.up_proj.weight.dtype == torch.float16
    ids = torch.arange(3, 60)[None]
    scale = converted.get_input_embeddings().embed_scale
    assert scale.dtype == torch.bfloat16 or scale.to(torch.half) != scale.bfloat16()
    with torch.no_grad():
        embedded = converted.get_input_embeddings()(ids)
        assert embedded.equal(native.get_input_embeddings()(ids))


V100, A100 = False, True  # whether bfloat16 is native; torch supports it where it is emulated, too


@pytest.mark.parametrize(
    ("card", "matmul", "dtype", "kind", "expected"),
    [
        (V100, "auto", "bfloat16", None, True),
        (V100, "native", "bfloat16", None, False),
        (V100, "auto", "float32", None, False),
        (V100, "auto", "bfloat16", "Phi3", False),
        (V100, "float16", "bfloat16", "Phi3", True),
        (A100, "auto", "bfloat16", None, False),
        (A100, "float16", "bfloat16", None, True),
    ],
)
def test_float16_is_used_where_bfloat16_is_emulated_and_the_model_was_tested(
    card, matmul, dtype, kind, expected, monkeypatch
):
    answer = lambda including_emulation=True: including_emulation or card  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
    settings = runs.settings_of("--dtype", dtype, "--matmul", matmul)
    config = family(kind) if kind else AutoConfig.from_pretrained(TOY)
    assert uses_fp16_matmul(request_of(settings), config) == expected


def test_a_run_in_float16_is_like_one_in_float32(flags, finished, tmp_path):
    """As on a V100: the frozen weights in bfloat16, those of linear modules in float16."""
    output = tmp_path / "output"
    more = ["--dtype", "bfloat16", "--matmul", "float16", "--max_steps", "2"]
    assert runs.run([*flags, *more]) == 0
    assert runs.read_record(output)["sessions"][0]["matmul"] == "float16"
    for key, count in (("loss", 2), ("eval_loss", 1), ("grad_norm", 2)):
        expected, found = (runs.logged(runs.history(x), key) for x in (finished.output, output))
        rounding = 0.01 if "loss" in key else 0.05
        assert found[:count] == pytest.approx(expected[:count], rel=rounding), key
    tensors, others = (load_file(one / runs.ADAPTER) for one in (output, finished.output))
    assert tensors.keys() == others.keys()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def without_a_row(rows, weight):
    """Forget a row of gradients, as a broken kernel might."""
    result = RIGHT(rows, weight).clone()
    if weight.is_contiguous():  # W on the way back, and its transpose forward
        result[..., 0, :] = 0
    return result


def losses_with(patch, difference):
    """Let each target have half a nat, and so much more as difference draws once it is float16."""
    real, draw, is_float16 = token_losses, torch.Generator().manual_seed(0), []

    def losses(model, inputs):
        is_target = (real(model, inputs) > 0).float()
        more = difference(is_target.shape, draw) if is_float16 else 0
        return is_target * (0.5 + more)

    runs.replace_ours(patch, "token_losses", losses)
    runs.before(patch, None, "use_fp16_matmul", lambda *_: is_float16.append(True))


def of_good_kernels(shape, draw):
    return 0.05 * torch.randn(shape, generator=draw).sign()


def of_one_sign(shape, draw):
    return torch.full(shape, 0.05)


@pytest.mark.parametrize(
    ("difference", "is_right"), [(of_good_kernels, True), (of_one_sign, False)]
)
def test_the_loss_of_a_short_first_reply_ends_no_run(monkeypatch, difference, is_right):
    """Its three targets together may differ by a tenth where nothing is wrong."""
    replies = [runs.made_up([5] * 9, [7] * count) for count in (3, 60, 20, 80, 50, 30)]
    model = load(TOY, "bfloat16")
    losses_with(monkeypatch, difference)
    with contextlib.nullcontext() if is_right else pytest.raises(UserError, match="220 targets"):
        try_fp16_matmul(model, replies)
    assert model.lm_head.weight.dtype == torch.float16


BROKEN = {
    "a scale": lambda rows, weight: 1.02 * RIGHT(rows, weight),
    "no number": lambda rows, weight: math.nan * RIGHT(rows, weight),
    "the way back": without_a_row,
}


@pytest.mark.parametrize("what", [*BROKEN, "the loss alone"])
def test_where_float16_is_wrong_the_run_ends(flags, tmp_path, monkeypatch, capfd, what):
    broken = BROKEN.get(what, lambda *given: 1.2 * RIGHT(*given))
    replace = lambda *_: runs.replace_ours(monkeypatch, "scaled_fp16_matmul", broken)  # noqa: E731
    if what in BROKEN:
        replace()
    else:  # the products that are tried are right, and what the model computes is not
        runs.before(monkeypatch, None, "use_fp16_matmul", replace)
    flags = [*flags, "--dtype", "bfloat16", "--matmul", "float16"]
    runs.refused(capfd, flags, "--matmul", *(["_proj"] if what in BROKEN else []))
    assert runs.checkpoints(tmp_path / "output") == []


def test_a_network_that_would_stay_slow_is_refused(flags):
    """Where a release gives its matrices a class of their own."""

    class Another(torch.nn.Linear):
        pass

    model = load_weights(TOY, "", "float32", "cpu")
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Another
    with pytest.raises(UserError):
        try_fp16_matmul(model, runs.prepared(flags).data.examples)


def test_measuring_tries_float16_as_training_does(opened, monkeypatch):
    """Else every number of a report would be wrong in silence."""
    request = replace(opened.base.request, dtype="bfloat16", matmul="float16")
    base = replace(opened.base, request=request)
    assert opening.load_base(base, None).matmul == "float16"
    runs.replace_ours(monkeypatch, "scaled_fp16_matmul", BROKEN["a scale"])
    with pytest.raises(InspectError, match="--dtype float32"):
        opening.load_base(base, None)
