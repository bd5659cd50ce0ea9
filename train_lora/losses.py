"""The loss of each target token, without the logits of a whole row.

The loss of a step is the sum of -log(probability) over its target tokens, divided by how many
there are; into how many micro-batches the step is split does not matter.

    the model's head             computed by                     kept for the backward pass
    frozen, nothing after it     last_states(), TargetLosses     a gradient for each target's state
    frozen, more comes after it  reply_logits()                  the logits of each target
    trained                      reply_logits()                  the logits of each target

With logits a row with many targets goes through the model several times, see with_few_targets().
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from train_lora.console import UserError
from train_lora.device import is_out_of_memory
from train_lora.micro_batches import Batch
from train_lora.tokens import Example, pad

MOST_TARGETS = 512  # of a row at once, where the loss needs their logits, see needs_logits()


def token_losses(model: nn.Module, inputs: Batch) -> Tensor:
    """Return -log(probability) of each target token, in nats, and 0 for all others.

    The result has a row for each example and a column for each token but the first. TRL's own loss
    has the same value, but bypasses scaled float16 in the head.
    """
    next_tokens = inputs["labels"][:, 1:]
    is_target = next_tokens != -100
    targets, states = next_tokens[is_target], last_states(model, inputs)
    losses = torch.zeros(next_tokens.shape, device=next_tokens.device)
    if states is None:
        logits = reply_logits(model, inputs).float()
        losses[is_target] = nn.functional.cross_entropy(logits, targets, reduction="none")
    else:
        losses[is_target] = TargetLosses.apply(states, targets, head_of(model))
    return losses


def reply_logits(model: nn.Module, inputs: Batch) -> Tensor:
    """Return a row of logits for each target token, and none for other tokens.

    With 248,320 tokens in the vocabulary the logits are the largest tensor of all. So the head
    gets only the positions that predict a target token: t for token t + 1. logits_to_keep, usually
    a number, may also be a mask (examples x tokens); the rows it keeps follow one another.
    """
    predicts_target = torch.zeros_like(inputs["labels"], dtype=torch.bool)
    predicts_target[:, :-1] = inputs["labels"][:, 1:] != -100
    return model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        logits_to_keep=predicts_target,
        use_cache=False,
    ).logits


# Heads whose output is not what their model returns: Gemma caps it, Granite divides it. Once this
# was seen, the model is not asked again.
HEADS_WITH_MORE_AFTER_THEM: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def head_of(model: nn.Module) -> nn.Module | None:
    """Return the module that makes logits of the last states, also where DDP wraps the model."""
    is_wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    return (model.module if is_wrapped else model).get_output_embeddings()


def needs_logits(model: nn.Module) -> bool:
    """Return whether the loss needs all logits at once: see last_states(), which finds out."""
    head = head_of(model)
    if head is None or head in HEADS_WITH_MORE_AFTER_THEM:
        return True
    is_trained = any(weight.requires_grad for weight in head.parameters())
    return is_trained and torch.is_grad_enabled()


def last_states(model: nn.Module, inputs: Batch) -> Tensor | None:
    """Return what the head would get for each target token; None if the loss needs the logits.

    The model runs with a head that returns what it gets. Where the model does not return this very
    tensor as logits, or changes it, more comes after the head, which the loss must not leave out:
    each pass is checked. A head that is trained needs the logits for its own gradient.
    """
    head, given = head_of(model), []
    if head is None or needs_logits(model):
        return None

    def forward(states: Tensor) -> Tensor:
        given.append((states, states._version))  # writing into a tensor raises its version
        return states

    own_forward = vars(head).get("forward")  # as use_fp16_matmul() sets it
    head.forward = forward
    try:
        returned = reply_logits(model, inputs)
    finally:
        del head.forward
        if own_forward is not None:
            head.forward = own_forward
    if len(given) == 1 and returned is given[0][0] and returned._version == given[0][1]:
        return returned
    HEADS_WITH_MORE_AFTER_THEM.add(head)
    return None


LOGITS_AT_ONCE = 2**25  # in memory: those of 135 targets of Qwen3.5, with their gradients 0.5 GB


class TargetLosses(torch.autograd.Function):
    """The loss of each target from its last state (targets x width).

    It depends on no other target's state. So its gradient is computed at once, a few targets at a
    time, and no logits are kept for the backward pass.
    """

    @staticmethod
    def forward(context: Any, states: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
        """Compute losses and, if states need them, gradients."""
        needs_gradient = context.needs_input_grad[0]
        at_once = max(1, LOGITS_AT_ONCE // len(next(head.parameters())))
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for part, ids in zip(states.split(at_once), targets.split(at_once), strict=True):
            with torch.set_grad_enabled(needs_gradient):
                part = part.detach().requires_grad_(needs_gradient)
                # Not head(part): hooks of the head have run already, in last_states().
                logits = head.forward(part).float()
                loss = nn.functional.cross_entropy(logits, ids, reduction="none")
                gradients += torch.autograd.grad(loss.sum(), part) if needs_gradient else []
            losses.append(loss.detach())
        context.gradient = torch.cat(gradients) if needs_gradient else None
        return torch.cat(losses)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Multiply in float32: 1 / targets must not be rounded to bfloat16 first."""
        product = context.gradient.float() * gradient[:, None]
        return product.to(context.gradient.dtype), None, None


def with_few_targets(batch: Batch) -> Iterator[Batch]:
    """Yield a micro-batch once for each MOST_TARGETS targets of its rows.

    The sum of the losses stays the same. What comes before these targets is computed again.
    """
    targets_so_far = (batch["labels"] != -100).cumsum(1)
    most = int(targets_so_far.max())
    if most <= MOST_TARGETS:
        yield batch
        return
    for first in range(0, most, MOST_TARGETS):
        is_kept = (targets_so_far > first) & (targets_so_far <= first + MOST_TARGETS)
        labels = batch["labels"].masked_fill(~is_kept, -100)
        width = labels.shape[1]
        if len(labels) == 1:  # of several rows, so many tokens fit with checkpointing alone
            width = int((labels[0] != -100).nonzero().max()) + 1
        yield {key: value[:, :width] for key, value in {**batch, "labels": labels}.items()}


def losses_of_replies(
    model: nn.Module,
    examples: list[Example],
    tokens_at_once: int = 1024,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[list[float]]:
    """Return -log(probability) of each reply, by example, in nats, without dropout.

    tokens_at_once includes padding; it is halved when memory runs out.
    is_stopped is called before each batch; once it is true, the remaining losses are 0.
    """
    order = sorted(range(len(examples)), key=lambda number: len(examples[number].input_ids))
    losses = [[0.0] * len(example.replies) for example in examples]
    was_training = model.training
    model.eval()
    with torch.no_grad(), tqdm(total=len(order), desc="losses", leave=False, disable=None) as bar:
        while order and not is_stopped():
            width = len(examples[order[-1]].input_ids)
            batch = order[-max(1, tokens_at_once // width) :]  # the longest remaining
            inputs = pad([examples[number] for number in batch], model.device)
            try:
                by_token = torch.zeros(len(batch), width - 1, dtype=torch.double)
                for rows in with_few_targets(inputs) if needs_logits(model) else [inputs]:
                    token_loss = token_losses(model, rows).double().cpu()
                    by_token[:, : token_loss.shape[1]] += token_loss
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    source = examples[batch[0]].source
                    raise UserError(
                        f"{source}: {width:,} tokens do not fit in the GPU's memory; lower "
                        "MAX_SEQ_LEN."
                    ) from error
                tokens_at_once = len(batch) // 2 * width
                continue
            for number, token_loss in zip(batch, by_token, strict=True):
                losses[number] = [  # a reply's first token is predicted by its prompt's last one
                    token_loss[len(reply.prompt_ids) - 1 : len(reply.input_ids) - 1].sum().item()
                    for reply in examples[number].replies
                ]
            order = order[: -len(batch)]
            bar.update(len(batch))
    model.train(was_training)
    return losses
