"""Gated DeltaNet in segments: what transformers' own function computes for whole rows."""

import functools
import sys
import types

import peft
import pytest
import runs
import torch
from conftest import TOY
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

from inspect_lora.model import load_weights
from train_lora.delta_rule import DELTA_RULE, DeltaRuleInSegments
from train_lora.losses import token_losses
from train_lora.tokens import pad

SEGMENT, NEAR = 128, 1e-6


@pytest.fixture
def rule(monkeypatch):
    """Have segments of 128 tokens; return transformers' own function, which is in place."""
    function = getattr(modeling, DELTA_RULE)
    own = function.whole_rule if isinstance(function, DeltaRuleInSegments) else function
    monkeypatch.setattr(modeling, DELTA_RULE, own)
    runs.replace_ours(monkeypatch, "TOKENS_OF_A_SEGMENT", SEGMENT)
    monkeypatch.setitem(sys.modules, "fla", None)  # as a run has it without USE_FLA
    return own


def inputs_of(tokens, dtype):
    """Return random query, key, value, decay and beta of two rows, and a state before them."""
    draw = torch.Generator().manual_seed(tokens)
    sizes = [(2, 16), (2, 16), (4, 8), (4,), (4,)]  # heads and their width; value heads share keys
    query, key, value, decay, beta = (
        torch.randn(2, tokens, *size, generator=draw).to(dtype) for size in sizes
    )
    decay = -torch.nn.functional.softplus(decay.float())
    state = torch.randn(2, 4, 16, 8, generator=draw)
    inputs = [query, key, value, decay, beta.sigmoid(), state]
    return [tensor.detach().requires_grad_() for tensor in inputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("begins", ["at zero", "at a state"])
@pytest.mark.parametrize("tokens", [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT, 437])
def test_output_state_and_gradients_are_the_same_to_the_bit(rule, tokens, begins, dtype):
    """But in float32, where the rule fills a row up to 64 tokens and so sums in another order."""
    results = []
    for function in (rule, DeltaRuleInSegments(rule, SEGMENT)):
        *rows, state = inputs_of(tokens, dtype)
        output, last = function(
            *rows[:3],
            g=rows[3],
            beta=rows[4],
            initial_state=state if begins == "at a state" else None,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=None,
        )
        (output.float().square().sum() + last.square().sum()).backward()
        gradients = [tensor.grad for tensor in (*rows, state) if tensor.grad is not None]
        results.append([output, last, *gradients])
        with torch.no_grad():
            assert (
                function(*rows[:3], g=rows[3], beta=rows[4])[1] is None
            )  # it was not asked for its state
    assert len(results[0]) == len(results[1]) == 8 - (begins == "at zero")
    if dtype == torch.bfloat16 or tokens <= SEGMENT or tokens % 64 == 0:
        assert all(map(torch.equal, *results))
    for found, expected in zip(*results, strict=True):
        assert torch.dist(found, expected) <= NEAR * expected.norm()


def model_in_segments():
    """Return the toy with LoRA that has an effect, loaded as by a run."""
    model = load_weights(TOY, "", "float32", "cpu")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    runs.set_b(model)
    return model


def rows_of(*lengths):
    """Return rows of these lengths, whose second halves are targets, padded."""
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(10, 2000, (length,), generator=draw).tolist() for length in lengths]
    return pad([runs.made_up(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in rows], "cpu")


def loss_and_gradient(model, inputs):
    model.zero_grad()
    losses = token_losses(model, inputs)
    losses.sum().backward()
    return losses.detach(), torch.cat([p.grad.flatten() for p in runs.lora(model).values()])


@pytest.mark.parametrize("is_recomputed", [False, True], ids=["kept", "recomputed"])
def test_a_models_losses_and_gradients_are_the_same(rule, monkeypatch, is_recomputed):
    """With padding; in training, and in evaluation."""
    model, inputs = model_in_segments().train(), rows_of(300, 131, 40)
    if is_recomputed:
        model.activation_checkpointing_enable({"use_reentrant": False})
        assert runs.is_recomputing(model)
    segments = getattr(modeling, DELTA_RULE)
    assert isinstance(segments, DeltaRuleInSegments) and segments.whole_rule is rule
    losses, gradient = loss_and_gradient(model, inputs)
    with torch.no_grad():
        evaluated = token_losses(model.eval(), inputs)
    monkeypatch.setattr(modeling, DELTA_RULE, rule)
    expected_losses, expected = loss_and_gradient(model.train(), inputs)
    assert torch.dist(losses, expected_losses) <= NEAR * expected_losses.norm()
    assert torch.dist(gradient, expected) <= NEAR * expected.norm()
    assert torch.dist(evaluated, expected_losses) <= 1e-4


def test_what_follows_a_long_prompt_is_the_same(rule, monkeypatch):
    """The state after the prompt is kept in the cache, and each new token goes on from it."""
    model = model_in_segments().eval()
    prompt = rows_of(300)["input_ids"]
    options = {"max_new_tokens": 20, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": -1}
    found = model.generate(input_ids=prompt, **options)
    monkeypatch.setattr(modeling, DELTA_RULE, rule)
    expected = model.generate(input_ids=prompt, **options)
    assert found.sequences.shape == (1, 320) and found.sequences.equal(expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        assert torch.dist(ours, theirs) <= NEAR * theirs.norm()


def test_each_layer_of_the_network_computes_in_segments(rule, monkeypatch):
    """And no kernel of the hub computes in its place."""
    model = model_in_segments().train()
    assert not model.base_model.model.use_kernels
    segments, called = getattr(modeling, DELTA_RULE), []

    def count(*rows, **options):
        called.append(True)
        return segments(*rows, **options)

    monkeypatch.setattr(modeling, DELTA_RULE, count)
    loss_and_gradient(model, rows_of(300, 131))
    layers = model.config.get_text_config().layer_types.count("linear_attention")
    assert len(called) == layers > 0


def with_another_argument(rule, query, key, value, decay, beta, **options):
    return rule(query, key, value, g=decay, beta=beta, **options)


def with_a_state_that_is_ignored(rule, *rows, initial_state=None, **options):
    return rule(*rows, **options)


def with_a_state_without_gradient(rule, *rows, initial_state=None, **options):
    initial_state = None if initial_state is None else initial_state.detach()
    return rule(*rows, initial_state=initial_state, **options)


def with_a_state_that_is_a_little_off(rule, *rows, **options):
    output, state = rule(*rows, **options)
    return output, state * 0.999


@pytest.mark.parametrize(
    "change",
    [
        with_another_argument,
        with_a_state_that_is_ignored,
        with_a_state_without_gradient,
        with_a_state_that_is_a_little_off,
    ],
)
def test_a_rule_that_differs_in_segments_is_left_alone_and_told(rule, change, monkeypatch, capfd):
    another = functools.partial(change, rule)
    monkeypatch.setattr(modeling, DELTA_RULE, another)
    model_in_segments()
    assert getattr(modeling, DELTA_RULE) is another
    assert DELTA_RULE in capfd.readouterr().out


def test_a_network_without_the_rule_is_told(rule, monkeypatch, capfd):
    monkeypatch.delattr(modeling, DELTA_RULE)
    model_in_segments()
    assert DELTA_RULE in capfd.readouterr().out


def test_the_next_model_has_segments_of_the_rule_itself(rule, monkeypatch, capfd):
    """Also where another import of the script has put its own class in place."""
    earlier = types.SimpleNamespace(whole_rule=rule)
    monkeypatch.setattr(modeling, DELTA_RULE, earlier)
    for _ in range(2):
        model_in_segments()
        assert getattr(modeling, DELTA_RULE) == DeltaRuleInSegments(rule, SEGMENT)
    assert DELTA_RULE not in capfd.readouterr().out


def test_flas_kernels_are_left_alone(rule, monkeypatch):
    monkeypatch.delitem(sys.modules, "fla")  # as where it is used
    model_in_segments()
    assert getattr(modeling, DELTA_RULE) is rule
