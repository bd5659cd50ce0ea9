"""Gated DeltaNet's rule in segments, so that its time is linear in the length of a row.

In the backward pass transformers' torch_chunk_gated_delta_rule takes the square of the length, as
each step of its loop over chunks copies a gradient as large as the whole row. Once it unbinds the
chunks before the loop and stacks them after it, this room can be deleted.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from train_lora.console import LOG, one_line, report
from train_lora.device import is_kept_out

DELTA_RULE = "torch_chunk_gated_delta_rule"  # transformers' torch code for Gated DeltaNet
TOKENS_OF_A_SEGMENT = 512  # a multiple of the rule's own chunks of 64


def compute_delta_rule_in_segments(model: transformers.PreTrainedModel) -> None:
    """Have the model's Gated DeltaNet layers compute in segments, unless fla's kernels do it."""
    if chunk_of(model.config) == 1:
        return
    module = sys.modules[type(model).__module__]
    function = getattr(module, DELTA_RULE, None)  # a layer's forward() calls it by this name
    if function is None:
        what = f"{type(model).__name__} has linear attention, but no {DELTA_RULE}"
        report("deltanet", f"{what}: whole rows are computed, and long ones may take long")
        return
    whole_rule = getattr(function, "whole_rule", function)  # in place since an earlier model
    if fault := fault_of_segments(whole_rule):
        what = f"{DELTA_RULE} of transformers {transformers.__version__} {fault}"
        ways = "The transformers of requirements.txt has one that is computed in segments"
        report("deltanet", f"{what}: whole rows are computed, and long ones take longer. {ways}")
        return
    setattr(module, DELTA_RULE, DeltaRuleInSegments(whole_rule, TOKENS_OF_A_SEGMENT))
    # fault_of_fla() says why other GPUs have no choice.
    if torch.cuda.is_initialized() and torch.cuda.get_device_capability()[0] == 8:
        ways = "flash-linear-attention may be faster: install it, and give --use_fla true"
        report("deltanet", f"Gated DeltaNet runs torch's code; {ways}")
    LOG.info("deltanet  %s is called on %d tokens at a time", DELTA_RULE, TOKENS_OF_A_SEGMENT)


@dataclass(frozen=True)
class DeltaRuleInSegments:
    """The same rule, called on a few hundred tokens of a row at a time, with its state handed on.

    On a CPU 6,144 tokens took 5.5 s in place of 48 s. Outputs and gradients are the same to the
    bit; in float32 to rounding, where a row is no multiple of 64 tokens.
    """

    whole_rule: Callable
    tokens: int

    def __call__(
        self,
        *rows: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        **options,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute as the rule does, called as in a layer's forward(): rows are query, key, value.

        They have the shape (batch, tokens, heads, width), g and beta (batch, tokens, heads).
        """
        rule = functools.partial(self.whole_rule, **options)
        if g.shape[1] <= self.tokens:
            wanted = {"initial_state": initial_state, "output_final_state": output_final_state}
            return rule(*rows, g=g, beta=beta, **wanted)
        outputs, state = [], initial_state
        segments = [x.split(self.tokens, 1) for x in (*rows, g, beta)]
        for *segment, decay, strength in zip(*segments, strict=True):
            output, state = rule(
                *segment, g=decay, beta=strength, initial_state=state, output_final_state=True
            )
            outputs.append(output)
        return torch.cat(outputs, 1), state if output_final_state else None


def fault_of_segments(whole_rule: Callable) -> str:
    """Return why a rule is not to be computed in segments, or "": both ways compute 130 tokens.

    A release of transformers may change the function, and a state that is handed on wrongly would
    spoil the gradients of long rows without an error.
    """
    draw = torch.Generator().manual_seed(0)
    sizes = [(2, 16), (2, 16), (2, 8), (2,), (2,)]  # heads and their width
    query, key, value, decay, strength = (torch.randn(1, 130, *x, generator=draw) for x in sizes)
    inputs = [query, key, value, -0.1 * decay.exp(), strength.sigmoid()]
    inputs = [x.requires_grad_() for x in inputs]
    results: list[list[Tensor]] = []
    rules: list[Callable] = [whole_rule, DeltaRuleInSegments(whole_rule, 64)]
    for rule in rules:
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        try:
            output, state = rule(*inputs[:3], g=inputs[3], beta=inputs[4], **options)
            loss = output.square().sum() + state.square().sum()
            results.append([output, state, *torch.autograd.grad(loss, inputs)])
        except Exception as error:  # whatever it is, whole rows are still computed
            return f"cannot be tried in segments ({type(error).__name__}: {one_line(error)})"
    names = ["outputs", "state", *["gradients"] * len(inputs)]
    for name, whole, in_segments in zip(names, *results, strict=True):
        if not torch.dist(whole, in_segments) <= 1e-5 * whole.norm():  # NaN is not, either
            return f"has other {name} in segments"
    return ""


def chunk_of(config: transformers.PretrainedConfig) -> int:
    """Return 64 for Gated DeltaNet's torch code, which pads rows to multiples of 64; else 1."""
    layer_types = config.get_text_config().to_dict().get("layer_types") or []
    return 64 if "linear_attention" in layer_types and is_kept_out("fla") else 1


def round_up(tokens: int, chunk: int) -> int:
    """Return a number of tokens, rounded up to a multiple of chunk."""
    return math.ceil(tokens / chunk) * chunk
