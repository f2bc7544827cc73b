"""The output of a loss: the global value, statistics, and explicit gradients attached to autograd.

Scale: every rank returns the loss of the global batch, and gradients world_size times its share, so that the mean over
ranks, as DeepSpeed and DDP compute it, is the gradient of the global loss.

Shape legend: m queries and n columns of this rank, D vector size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.distributed import Group
from bigdssm.losses.inputs import GlobalSizes, LossInputs
from bigdssm.losses.kernels import Gradients


@dataclass(frozen=True)
class LossOutput:
    """`loss`: scalar, the same on every rank; `stats`: scalars without gradient, over all ranks.

    in_batch_accuracy: fraction of the queries with weight > 0 whose positive scores above all their negatives, by the
    scores of the loss; dropped_fraction: fraction of the entries except positives that the masks drop;
    effective_negatives: unmasked negatives per query; lse_min, lse_max: range of the log-sum-exps (for losses without
    one, of the queries' best scores).
    """

    loss: Tensor
    stats: dict[str, Tensor]


@dataclass(frozen=True)
class LocalStats:
    """One rank's contribution to the statistics."""

    weight_m: Tensor
    positive_m: Tensor  # scores of the positives
    largest_m: Tensor  # scores of the best negatives
    lse_m: Tensor  # [m], or [directions, m]
    entries: Tensor  # number of score matrix entries except positives
    masked: Tensor  # number of them that are masked


def reduce_output(
    value_sum: Tensor, local: LocalStats, weight_sum: float, group: Group | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the global loss and statistics; two small all-reduces."""
    used = local.weight_m > 0
    above = ((local.positive_m > local.largest_m) & used).sum()
    counted = [value_sum, above, used.sum(), local.masked, local.entries, torch.ones_like(used).sum()]
    totals = torch.stack([count.double() for count in counted])
    distributed.all_reduce(totals, "sum", group)
    ends = torch.where(used, torch.stack([-local.lse_m, local.lse_m]), -math.inf).double().flatten(1)
    extremes = distributed.all_reduce(torch.nn.functional.pad(ends, (0, 1), value=-math.inf).amax(1), "max", group)
    loss = totals[0] / weight_sum if weight_sum > 0 else torch.zeros_like(totals[0])
    stats = {
        "in_batch_accuracy": totals[1] / totals[2].clamp(min=1),
        "dropped_fraction": totals[3] / totals[4].clamp(min=1),
        "effective_negatives": (totals[4] - totals[3]) / totals[5].clamp(min=1),
        "lse_min": -extremes[0],
        "lse_max": extremes[1],
    }
    return loss, stats


def finish_gradients(
    x: LossInputs, sizes: GlobalSizes, sums: Gradients, positive_grad_m: Tensor, beta_grad_m: Tensor
) -> list[Tensor | None]:
    """Convert sums over G, in place, into the gradients of U, W, alpha, beta, scaled by world_size.

    positive_grad_m: gradients of the positives' scores; beta_grad_m: their part that depends on beta.
    """
    factor = sizes.world_size / sizes.weight_sum if sizes.weight_sum > 0 else 0.0
    alpha = sizes.alpha
    grad_m1 = positive_grad_m.to(x.acc)[:, None]
    U_mD, alpha_grad = x.U.detach().to(x.acc), None
    if sums.U is not None:
        sums.U.addcmul_(x.W.detach()[x.positive].to(x.acc), grad_m1)
        alpha_grad = (sums.U * U_mD).sum(1).double().sum() * factor
        sums.U.mul_(alpha * factor)
    if sums.W is not None:
        sums.W.index_add_(0, x.positive, U_mD * grad_m1).mul_(alpha * factor)
    if sums.beta is not None:
        sums.beta.index_add_(0, x.positive, beta_grad_m.to(sums.beta.dtype)).mul_(factor)
    return [sums.U, sums.W, alpha_grad, sums.beta]


def attach(loss: Tensor, inputs: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> Tensor:
    """Return `loss` as an autograd node with the given gradients of its inputs; None inputs are skipped."""
    pairs = [(leaf, grad) for leaf, grad in zip(inputs, gradients, strict=True) if leaf is not None]
    leaves, grads = zip(*pairs, strict=True)
    with torch.enable_grad():
        result: Tensor = _Attach.apply(loss, len(pairs), *leaves, *grads)
    return result


class _Attach(torch.autograd.Function):
    """The identity on a value with precomputed gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, num: int, *tensors_and_gradients: Tensor | None) -> Tensor:
        inputs, gradients = tensors_and_gradients[:num], tensors_and_gradients[num:]
        ctx.like = [(t.shape, t.dtype, t.device) for t in inputs if t is not None]
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable would silently return 0 as the second derivative
            raise NotImplementedError("the losses have no second derivatives: differentiate without create_graph")
        results: list[Tensor | None] = []
        for needed, (shape, dtype, device), gradient in zip(
            ctx.needs_input_grad[2:], ctx.like, ctx.saved_tensors, strict=False
        ):
            if needed and gradient is not None:
                results.append((gradient * upstream).to(device=device, dtype=dtype).view(shape))
            else:
                results.append(None)
        return None, None, *results, *[None] * len(ctx.like)
