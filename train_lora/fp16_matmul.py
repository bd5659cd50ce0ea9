"""Scaled float16 products, for GPUs that only emulate bfloat16, such as the V100.

A V100 multiplies bfloat16 matrices at about 10 TFLOP/s and float16 ones at 95 to 100 (mlxcel
issue 1654, measured on a V100). But ordinary float16 training gives NaN, as its largest number is
65,504. So the frozen weights are multiplied in float16, each row of activations or gradients
scaled into its range first. Norms, attention and DeltaNet stay in DTYPE, LoRA and the loss in
float32. A product that is too large becomes infinite and ends the run. This was tested on CPUs,
never on a V100, with the families below; others may cast activations to a weight's type.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from train_lora.base import BaseRequest
from train_lora.console import LOG, UserError, report
from train_lora.losses import losses_of_replies
from train_lora.tokens import Example

TARGETS_OF_THE_TRIAL = 200
TESTED_IN_FP16 = ("qwen3_5", "qwen3_5_text", "qwen3", "llama", "gemma3", "gemma3_text")


def uses_fp16_matmul(request: BaseRequest, config: transformers.PretrainedConfig) -> bool:
    """Return whether the frozen weights are multiplied in scaled float16."""
    if request.matmul != "auto" or request.device == "cpu" or request.dtype == "float32":
        return request.matmul == "float16"
    # Without the argument torch also says yes on a V100, which emulates bfloat16.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    if config.model_type in TESTED_IN_FP16:
        return True
    report("matmul", "--matmul float16 may be much faster; it was not tested with this model")
    return False


def try_fp16_matmul(model: transformers.PreTrainedModel, examples: list[Example]) -> None:
    """Switch a model to scaled float16; raise UserError if this GPU computes it wrongly.

    The first module of each name may err only by rounding, forward and backward. The loss of the
    examples with the most targets, TARGETS_OF_THE_TRIAL in all, may move by 1 % and 0.03 nats a
    target: equally exact computations differ by 0.03 to 0.08 nats on a single target.
    """
    names = {module: path.rpartition(".")[2] for path, module in fp16_modules(model).items()}
    first: dict[str, tuple[nn.Linear, Tensor]] = {}
    if not names:
        raise UserError("MATMUL float16: the model has no nn.Linear of torch; use --matmul native.")
    wrong = "MATMUL float16 is wrong on this GPU; use --matmul native:"
    tried: list[Example] = []
    for example in sorted(examples, key=lambda example: -example.targets):
        if sum(each.targets for each in tried) < TARGETS_OF_THE_TRIAL:
            tried.append(example)
    targets = sum(example.targets for example in tried)

    def note(module: nn.Linear, rows: tuple[Tensor]) -> None:
        first.setdefault(names[module], (module, rows[0].flatten(0, -2)[:512]))

    hooks = [module.register_forward_pre_hook(note) for module in names]
    before = sum(map(sum, losses_of_replies(model, tried)))
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for name, (module, rows) in first.items():
            weight, errors = module.weight, []
            gradient = rows @ weight.T  # a head would sum these logits beyond float16
            if len(weight) > 100_000:
                gradient = gradient.softmax(-1)
            for factor, matrix in ((rows, weight.T), (gradient, weight)):
                exact = factor.float() @ matrix.float()
                error = (scaled_fp16_matmul(factor, matrix.half()).float() - exact).norm()
                errors.append((error / exact.norm()).item())
                # Rounding to float16 and then to bfloat16 errs by 0.44 % at most. In the sums of
                # 248,320 terms of a head's gradient a V100 may truncate another 0.14 %.
                limit = 0.007 if len(matrix) > 100_000 else 0.005
                if not errors[-1] <= limit:  # also false for NaN
                    raise UserError(f"{wrong} a product of {name} errs by {errors[-1]:.2%}.")
            LOG.info("matmul    %s errs by %.3e and, backward, by %.3e", name, *errors)
    use_fp16_matmul(model)
    after = sum(map(sum, losses_of_replies(model, tried)))
    losses = f"the loss of {targets:,} targets is {after:.4f}, not {before:.4f}"
    if not abs(after - before) <= 0.01 * before + 0.03 * targets:
        raise UserError(f"{wrong} {losses}.")
    LOG.info("matmul    %s", losses)
    report("matmul", f"scaled float16: {len(names)} frozen modules, {len(first)} of them tried")


def scaled_fp16_matmul(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows @ weight, multiplied in float16 with float32 sums, in the type of rows.

    Each row is divided by the power of two at or below its largest number, which is exact, so that
    its numbers are below 2. rows (... x k) have any floating type, weight (k x d) is in float16.
    """
    largest = torch.linalg.vector_norm(rows, math.inf, -1, keepdim=True, dtype=torch.float32)
    # This mask keeps a float32's exponent, and clears its sign and its fraction.
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    power = power.clamp_(2.0**-120, 2.0**127)  # for all-zero rows and infinity
    small = torch.empty(rows.shape, dtype=torch.half, device=rows.device)
    product = torch.div(rows, power, out=small) @ weight
    out = torch.empty(product.shape, dtype=rows.dtype, device=rows.device)
    return torch.mul(product, power, out=out)


class ScaledFp16Matmul(torch.autograd.Function):
    """rows @ weight.T, with a gradient only for rows."""

    @staticmethod
    def forward(context: Any, rows: Tensor, weight: Tensor) -> Tensor:
        """Multiply, and keep the weight for the backward pass."""
        context.weight = weight
        return scaled_fp16_matmul(rows, weight.T)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient for rows, and none for the frozen weight."""
        return scaled_fp16_matmul(gradient, context.weight), None


def fp16_modules(model: transformers.PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linear modules that gain from float16, by path."""
    embedding = model.get_input_embeddings()
    # Gemma's embedding scales its rows in the type of its own weight, which its head may share.
    scaling_weight = None if type(embedding) is nn.Embedding else embedding.weight
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and min(module.weight.shape) >= 64  # DeltaNet's in_proj_a (32 x 2,560) would lose time
        and module.weight is not scaling_weight
    }


def use_fp16_matmul(model: transformers.PreTrainedModel) -> None:
    """Give the frozen linear modules float16 weights, and the forward of ScaledFp16Matmul."""
    dtype = model.dtype

    def forward(self: nn.Linear, rows: Tensor) -> Tensor:
        product = ScaledFp16Matmul.apply(rows, self.weight)
        return product if self.bias is None else product + self.bias

    for module in fp16_modules(model).values():
        module.weight.data = module.weight.data.half()
        module.forward = forward.__get__(module)
    # The embedding may share its weight with the head, and must still return the model's type.
    model.get_input_embeddings().register_forward_hook(lambda _, __, rows: rows.to(dtype))
